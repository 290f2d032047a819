"""Signals that a block of code handles in its own way."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handled(handler: Callable[[], None], *numbers: signal.Signals) -> Iterator[None]:
    """Call a handler for these signals inside the block, where this is the main thread: no other can."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, lambda *_: handler()) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
