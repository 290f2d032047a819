"""llama.cpp through the package xllamacpp: its own server in a process of its own, asked over the loopback interface.

In this process its threads would count among OpenMP's, whose workers then sleep between torch's operations.
"""

import importlib
import importlib.util
import json
import multiprocessing
import weakref
from collections.abc import Sequence
from http.client import HTTPConnection
from typing import Any, Final
from urllib.parse import urlsplit

import torch

from orthrus.bench.peers.ggufs import Weights
from orthrus.bench.peers.llamacpp_process import PACKAGE, serve
from orthrus.bench.race import Answer, Decoder
from orthrus.decode.stop import until_end
from orthrus.errors import ConfigError, DecodingError

_PADDING: Final = 256  # llama.cpp rounds contexts up to it


def check() -> None:
    """Raise ConfigError unless the package is installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"llama.cpp needs the package {PACKAGE}, found none installed: pip install 'orthrus-lm[peers]'"
        )


def build() -> dict[str, str]:
    """Return the package's version and the instructions that it was built for, as JSON values."""
    binding: Any = importlib.import_module(PACKAGE)
    return {PACKAGE: binding.__version__, "build": binding.get_system_info().strip(" |")}


def decoder(weights: Weights, eos: Sequence[int], *, context: int, lookup: bool) -> Decoder:
    """Return a decoder that has a server, with torch's number of threads; answers end with one of `eos`."""
    server = Server(weights, threads=torch.get_num_threads(), context=context, lookup=lookup)

    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        return [server.answer(prompt, max_new_tokens, eos) for prompt in prompts]

    return decode


class Server:
    """One model in llama.cpp, with one slot, greedy and without any memory of earlier prompts.

    `context` holds prompt and answer together; `lookup` drafts by `ngram-simple` with llama.cpp's own settings.
    Raises ConfigError where the package is missing, or llama.cpp cannot load the file.
    """

    def __init__(self, weights: Weights, *, threads: int, context: int, lookup: bool = False) -> None:
        check()
        context = -(-context // _PADDING) * _PADDING
        processes = multiprocessing.get_context("spawn")
        here, there = processes.Pipe()
        process = processes.Process(
            target=serve, args=(there, str(weights.file), threads, context, lookup), daemon=True
        )
        process.start()
        there.close()
        weakref.finalize(self, here.close)  # which ends the process
        try:
            address, error = here.recv()
        except EOFError:
            process.join()
            address, error = "", f"its process ended with exit code {process.exitcode}"
        if error:
            raise ConfigError(f"llama.cpp cannot load {weights.file}: {error}")
        self._weights = weights
        self._address = urlsplit(address)

    def answer(self, prompt: Sequence[int], max_new_tokens: int, eos: Sequence[int] = ()) -> Answer:
        """Answer one prompt, greedily, up to one of `eos`; a pass counts for each token but those that a draft gave.

        Raises DecodingError where llama.cpp refuses or reads other tokens.
        """
        request = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        reply = self._ask(request)
        timings = reply["timings"]
        if timings["prompt_n"] != len(prompt):
            raise DecodingError(
                f"llama.cpp must read the prompt's own {len(prompt)} tokens, found that it read {timings['prompt_n']}"
            )
        accepted = timings.get("draft_n_accepted", 0)
        return Answer.counted(
            until_end(reply["tokens"], eos),
            len(reply["tokens"]) - accepted,
            drafted=timings.get("draft_n", 0),
            accepted=accepted,
            first_token_seconds=timings["prompt_ms"] / 1000,  # by llama.cpp's own clock
            **self._weights.to_dict(),
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        connection = HTTPConnection(self._address.hostname or "127.0.0.1", self._address.port)
        try:
            body = json.dumps(request)
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise DecodingError(f"llama.cpp cannot answer from {self._weights.file}: {text.decode(errors='replace')}")
        reply: dict[str, Any] = json.loads(text)
        return reply
