"""What loading takes of memory at its peak: the weights that remain, and one layer beside them."""

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import orthrus
from orthrus.kernels.int8 import is_exact
from tests.families import tiny

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux, which tells a process's memory"
)
PAGE = os.sysconf("SC_PAGE_SIZE")

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""Four layers of 16 MB in float32, and views of 3 MB."""

WAYS = [
    {"pack": False},
    {"pack": False, "dtype": "bfloat16"},
    {"pack": False, "dtype": "float16"},
    {"pack": False, "offload_folder": "away"},
    *([{"dtype": "int8"}] if is_exact() else []),
]

LOADING = """
import gc, sys, orthrus
for line in sys.stdin:
    name, options = eval(line)
    model = None
    gc.collect()
    print(flush=True)
    sys.stdin.readline()
    model, _ = orthrus.load(name, **options)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()] if not t.is_meta}
    print(sum(tensors.values()), flush=True)
"""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is let go of goes back to the system at once


def in_memory(pages: IO[bytes]) -> int:
    """Bytes that a process holds beside files it has mapped, whose pages the system can take back."""
    pages.seek(0)
    _, resident, shared, *_ = pages.read().split()
    return (int(resident) - int(shared)) * PAGE


def loaded(process: Any, pages: IO[bytes], name: str, options: dict[str, Any]) -> tuple[int, int]:
    """Let a process load a model; return the bytes of its weights, and what memory grew by at its peak."""
    print((name, options), file=process.stdin, flush=True)
    process.stdout.readline()
    before = peak = in_memory(pages)
    print(file=process.stdin, flush=True)
    while not select.select([process.stdout], [], [], 0.001)[0]:
        peak = max(peak, in_memory(pages))
    return int(process.stdout.readline()), peak - before


def test_memory_peaks_at_the_weights_and_one_layer(tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """Whatever precision files and model have: no second copy of the weights, nor of the view."""
    for name, shape, kept in (
        ("small", {}, torch.float32),
        ("float32", SHAPE, torch.float32),
        ("bfloat16", SHAPE, torch.bfloat16),
    ):
        model = tiny("qwen3", **shape).to(kept)
        model.save_pretrained(tmp_path / name)
        characters.save_pretrained(tmp_path / name)
        orthrus.save(orthrus.attach(model, orthrus.OrthrusConfig(block_size=4)), tmp_path / name)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters()) * 2  # in float32
    del model
    command = [sys.executable, "-W", "ignore", "-c", LOADING]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with (
        subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, **pipes) as loading,
        Path(f"/proc/{loading.pid}/statm").open("rb", buffering=0) as pages,
    ):
        try:
            for options in WAYS:
                for name in ("small", "float32", "bfloat16"):  # the first sets up once what others find
                    weights, peak = loaded(loading, pages, name, options)
                    assert name == "small" or peak <= weights + layer, (name, options)
        finally:
            loading.kill()
