"""`orthrus serve` as a process: it says where it listens, and a signal lets it finish what it has begun."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from openai import OpenAI

from tests.cli.conftest import CONTEXT, Ran


def test_a_signal_lets_the_running_answer_end_and_then_the_server(model_dir: Path) -> None:
    command = [sys.executable, "-m", "orthrus", "serve", str(model_dir), "--port", "0", "--rows", "2", "--plan", "full"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        while "serving on " not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert f"{model_dir.name} · float32 · cpu · 2 rows of {CONTEXT} tokens" in said
        url = said.split("serving on ")[1].strip()
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        assert [model.id for model in client.models.list()] == [model_dir.name]
        stream = client.completions.create(
            model=model_dir.name, prompt="What is", max_tokens=200, stream=True, extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )  # fmt: skip
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage is not None
        assert last.usage.completion_tokens == 200
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_what_cannot_be_served_is_said_at_once(cli: Callable[..., Ran], model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, reason in (
            (["--port", taken.getsockname()[1]], "cannot be used"),
            (["--plan", "fast", "--port", 0], "plan"),
            (["--context", 10**6, "--port", 0], "context must be from 2 to"),
            (["--host", "no.such.host.invalid", "--port", 0], "cannot be used"),
        ):
            ran = cli("serve", model_dir, *arguments)
            assert ran.code == 2, ran.err
            assert reason in ran.err
