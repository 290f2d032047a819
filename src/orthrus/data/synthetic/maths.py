"""The families of word problems, in the order in which they are drawn."""

from collections.abc import Callable
from typing import Final

from orthrus.data.synthetic import counting, measuring
from orthrus.data.synthetic.draw import Draft, Draw

FAMILIES: Final[tuple[Callable[[Draw], Draft], ...]] = (
    counting.shopping,
    counting.change,
    measuring.distance,
    counting.sharing,
    counting.comparing,
    counting.doubling,
    counting.giving,
    measuring.rectangle,
    counting.percent,
    measuring.average,
    measuring.ages,
    measuring.conversion,
    measuring.equation,
    measuring.sequence,
    counting.budget,
)
