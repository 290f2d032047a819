"""Tests that start vLLM's own engine: collected only when `-m vllm` asks for them (`make test-vllm`)."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this directory alone in every other run: it needs an environment of its own, and minutes."""
    return None if config.getoption("-m") == "vllm" else True


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in the official layout, as a user converts it."""
    import orthrus

    out = tmp_path_factory.mktemp("vllm") / "nano"
    model, tokenizer = orthrus.load("nano")
    orthrus.save(model, out, format="official")
    tokenizer.save_pretrained(out)
    return out
