"""Several CPU processes of one run, forked from the test: no start-up time, and gloo between them."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed
import torch.multiprocessing
from accelerate import PartialState


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_processes(count: int, work: Callable[..., None], *arguments: Any) -> list[int]:
    """Call `work(rank, *arguments)` in so many processes at once; returns their exit codes.

    When one fails the others, who would wait for it in vain, are ended.
    """
    context = torch.multiprocessing.get_context("fork")
    port = free_port()
    children = [
        context.Process(target=_child, args=(r, count, port, work, arguments), daemon=True) for r in range(count)
    ]
    for child in children:
        child.start()
    for child in _as_they_end(children):
        if child.exitcode:
            for other in children:
                other.terminate()
    return [int(child.exitcode or 0) for child in children]


def _child(rank: int, count: int, port: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    PartialState._reset_state()
    work(rank, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _as_they_end(children: Sequence[Any]) -> Iterator[Any]:
    waiting = list(children)
    while waiting:
        ended = wait([child.sentinel for child in waiting], timeout=120)
        if not ended:
            for child in waiting:
                child.kill()
        for child in [c for c in waiting if c.sentinel in ended or not ended]:
            child.join()
            waiting.remove(child)
            yield child


def last_state(output: Path) -> dict[str, Any]:
    """The last checkpoint's contents."""
    path = sorted((output / "checkpoints").glob("step-????????"))[-1] / "state.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state
