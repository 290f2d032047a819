"""vLLM's own server with drafts: texts over HTTP, and acceptance on Prometheus's own page."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.drive import BASE, DRAFTS, agreement, drafting, prompts, serve, texts

pytestmark = pytest.mark.vllm

TOKENS = 32
STARTS_WITHIN = 600


@pytest.mark.timeout(3000)
def test_the_server_drafts_and_says_so(checkpoint: Path, tmp_path: Path, record_property: Any) -> None:
    """20 prompts at once: plain vLLM's texts, and counters by position that add up to what was emitted."""
    asked = prompts(checkpoint)[::5]
    sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
    (plain,) = serve(checkpoint, BASE, [{"prompts": asked, "sampling": sampling}])
    with server(checkpoint, tmp_path / "server.log") as address:
        body = {"model": str(checkpoint), "prompt": asked, "return_token_ids": True, **sampling}
        answer = json.loads(fetch(f"{address}/v1/completions", body))
        page = fetch(f"{address}/metrics").decode()
    found = [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    drafts, accepted = (counted(page, name) for name in ("num_drafts", "num_accepted_tokens"))
    at_position = counted(page, "num_accepted_tokens_per_pos")
    record_property("texts", agreement(found, texts(plain)))
    record_property("drafts", drafts[0])
    record_property("accepted at position", at_position)
    assert found == texts(plain)
    assert len(at_position) == DRAFTS
    assert sum(at_position) == accepted[0] > 0
    # Every cycle emits its accepted drafts and one token more; the last one's may go past a text's end.
    assert accepted[0] + drafts[0] >= len(asked) * (TOKENS - 1)


def counted(page: str, name: str) -> list[float]:
    """The counters of drafts by that name on a page of Prometheus, in the order of positions if there are any."""
    lines = re.findall(rf"^vllm:spec_decode_{name}_total{{(.*)}} (\S+)$", page, re.MULTILINE)
    places = [re.search(r'position="(\d+)"', labels) for labels, _ in lines]
    order = sorted(range(len(lines)), key=lambda i: int(places[i][1]) if places[i] else 0)  # type: ignore[index]
    return [float(lines[i][1]) for i in order]


def fetch(url: str, body: dict[str, Any] | None = None) -> bytes:
    """Get a page, or post JSON to it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return bytes(response.read())


@contextmanager
def server(checkpoint: Path, log: Path) -> Iterator[str]:
    """Run `vllm serve` until the block ends; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--dtype", "float32", "--max-model-len", str(BASE["max_model_len"]), "--enforce-eager"]
    flags += ["--max-num-seqs", str(BASE["max_num_seqs"]), "--block-size", str(BASE["block_size"])]
    flags += ["--speculative-config", json.dumps(drafting(checkpoint)["speculative_config"])]
    # What `vllm serve` runs; the command itself asks for the version of a distribution that the CPU build is not named.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    surroundings = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=surroundings, stdout=out, stderr=subprocess.STDOUT)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_WITHIN
        while not answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-6000:]  # noqa: PT018
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        fetch(url)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True
