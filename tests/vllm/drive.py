"""What the tests share: prompts, engine arguments, and a way to run a request and read its result."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from orthrus.data.prompts import read_prompts

ROOT = Path(__file__).parents[2]
BENCH = ROOT.parent / "shared" / "data" / "bench"
SETS = ("gsm8k", "mbpp", "humaneval", "math500", "spec_bench")
DRAFTS = 15
CONTEXT = 384
BASE = {
    "dtype": "float32",
    "max_model_len": CONTEXT,
    "max_num_seqs": 16,
    "block_size": 32,
    "enforce_eager": True,
    "disable_log_stats": False,
    "enable_prefix_caching": True,
}


@cache
def prompts(model: Path, count: int = 100, longest: int = 200) -> list[list[int]]:
    """The first short chats of each prompt set, as tokens."""
    if not BENCH.is_dir():
        pytest.skip(f"no prompt sets in {BENCH}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: list[list[int]] = []
    for name in SETS:
        own: list[list[int]] = []
        for record in read_prompts(BENCH / f"{name}.jsonl"):
            chat = list(record.turns[0])
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            if len(ids) <= longest and len(own) < count // len(SETS):
                own.append(list(ids))
        found += own
    assert len(found) == count, "too few short prompts"
    return found


def drafting(model: Path, drafts: int = DRAFTS, **more: Any) -> dict[str, Any]:
    """The engine argument that turns drafts on."""
    spec = {"method": "draft_model", "model": str(model), "num_speculative_tokens": drafts, **more}
    return {"speculative_config": spec}


def serve(
    model: Path,
    engine: dict[str, Any],
    calls: list[dict[str, Any]],
    *,
    patches: dict[str, str] | None = None,
    processes: bool = True,
    timeout: int = 7000,
) -> list[dict[str, Any]]:
    """Run calls in a fresh engine; `patches` names changes of `tests.vllm.patches` to its processes.

    Without `processes` it has just one, which starts sooner.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        request, result = place / "request.json", place / "result.json"
        request.write_text(json.dumps({"model": str(model), "engine": engine, "calls": calls}))
        plugin = place / "orthrus_vllm_tests-0.0.1.dist-info"
        plugin.mkdir()
        (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: orthrus-vllm-tests\nVersion: 0.0.1\n")
        (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\npatches = tests.vllm.patches:apply\n")
        surroundings = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{place}",  # the sources beside these tests, installed or not
            "ORTHRUS_VLLM_PATCHES": json.dumps(patches or {}),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)),
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # so that workers can be asked what they hold
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "tests.vllm.serving", str(request), str(result)]
        done = subprocess.run(
            command, env=surroundings, cwd=ROOT, timeout=timeout, capture_output=True, text=True, check=False
        )
        assert result.exists(), f"the engine failed:\n{(done.stdout + done.stderr)[-6000:]}"
        return list(json.loads(result.read_text()))


def texts(call: dict[str, Any]) -> list[list[int]]:
    """The one answer to each prompt."""
    return [tokens[0] for tokens in call["tokens"]]


def agreement(found: list[list[int]], expected: list[list[int]]) -> str:
    """How many texts are the same, for the record."""
    return f"{sum(a == b for a, b in zip(found, expected, strict=True))} of {len(expected)}"
