"""A short soak; `python -m tests.serve.soak` is the long one."""

from collections.abc import Callable

from tests.serve.conftest import Running
from tests.serve.soak import KINDS, soak


def test_mixed_requests_leave_nothing_behind(server: Running, expected: Callable[..., str]) -> None:
    outcome = soak(server, expected, requests=60, concurrency=16)
    assert outcome.wrong == []
    assert set(outcome.kinds) == set(KINDS)
    server.settle()
    assert server.service.loop.open == 0
    assert server.service.loop.running == 0
    engines = [lane.engine for lane in server.service.loop._lanes.values()]
    assert not any(engine.busy for engine in engines)
