"""A short soak; `python -m tests.serve.soak` is the long one."""

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.serve.conftest import Running, running
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


def test_a_signal_in_the_middle_ends_the_server_and_no_text_that_it_has_begun(
    small: PreTrainedModel, characters: PreTrainedTokenizerBase, expected: Callable[..., str]
) -> None:
    """Requests sent before it are answered as ever or told 503, those sent after it are refused; nothing stays open."""
    with running(small, characters, rows=4, queue=100, plan="full") as server:
        outcome = soak(server, expected, requests=60, concurrency=16, seed=1, stop_after=30)
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert outcome.wrong == []
        assert 0 < outcome.refused <= 30 + 15
        assert server.service.loop.open == 0
