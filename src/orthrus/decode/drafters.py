"""Who proposes drafts: what they have in common, and the model's own diffusion view as its first implementation.

A drafter may read hidden states of the backbone and keep keys of its own as more layers of the engine's cache
(`ScratchCache.update` with layer indices past the model's): they are then moved, copied and overwritten with the rest.

Shapes: B rows, Q query rows, M drafts, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.rows import Row
from orthrus.decode.tree import Tree
from orthrus.errors import ConfigError
from orthrus.model.attach import layers_of
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import FusedView
from orthrus.model.markov import Markov

VIEW: Final = "view"
"""The name of the model's own view, whose draft passes are passes of the backbone."""


class Drafter(ABC):
    """Propose drafts for the rows of a cache; what a drafter has no use for it leaves as it is here.

    Attributes:
        name: what statistics count its passes under; those of `VIEW` count as the backbone's.
        proposals: tokens after the anchor that it proposes at most; None for as many as the model's view.
        taps: the decoder layers whose outputs it reads, by index; none for most.
        markov: what each token adds to the logits of the draft after it; None for nothing.
    """

    name: str
    proposals: int | None = None
    taps: Sequence[int] = ()
    markov: Markov | None = None

    def reset(self, row: Row) -> Any:
        """Return the state of a row that begins, `row.cached` tokens of whose prompt were read before."""
        return None

    @abstractmethod
    def propose(
        self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]
    ) -> Tensor | Proposal:
        """Return draft logits `[B, M, V]` for the tokens after each row's anchor.

        Or a `Proposal`, which says how many passes they took. In what a draft pass of the view gives, the first of
        these M tokens is the backbone's own.
        """

    def read(self, cache: ScratchCache, hidden: Sequence[Tensor]) -> None:
        """Take the tapped layers' outputs, `[B, Q, H]` each, of one pass of the backbone.

        Called in the middle of the pass, while `cache.current` says which rows and slots it writes, and which positions
        these have. Slots past what is kept are written again by the next pass.
        """
        return  # most tap nothing

    def accepted(self, states: Sequence[Any], counts: Sequence[int]) -> None:
        """Learn how many tokens each row has kept in a step: accepted drafts and the bonus."""
        return  # most learn nothing


class TreeDrafter(Drafter):
    """A drafter whose trees depend on the path: under `tree:N` it grows them itself, which takes passes of its own."""

    @abstractmethod
    def grow(
        self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, nodes: int, states: Sequence[Any]
    ) -> tuple[Tree, int]:
        """Return a tree of `nodes` nodes, `drafts` deep at most, behind each row's anchor; and the passes it took."""


class ViewDrafter(Drafter):
    """Propose by the backbone and its own diffusion view, in one pass.

    Attributes:
        ahead: whether passes that read a prompt may draft for it as well.
    """

    name = VIEW
    ahead = True

    def __init__(self, markov: Markov | None = None) -> None:
        self.markov = markov

    def propose(
        self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]
    ) -> Tensor | Proposal:
        """Return the backbone's own token after each row's anchor, and draft logits of those behind it."""
        return passes.draft(rows, anchor_B, drafts - 1)


@contextmanager
def tapped(model: PreTrainedModel, cache: ScratchCache, drafter: Drafter) -> Iterator[None]:
    """Let a drafter read the layers that it taps in each pass of the backbone inside the block.

    Of a pass that drafts as well it gets the backbone's rows alone, and of one that only drafts nothing.
    """
    taps = list(drafter.taps)
    if not taps:
        yield
        return
    layers = layers_of(model)
    if not all(0 <= tap < len(layers) for tap in taps):
        raise ConfigError(f"taps of {drafter.name} must be layers 0 to {len(layers) - 1}, found {taps}")
    hidden: dict[int, Tensor] = {}

    def keep(tap: int, _: nn.Module, __: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        view = given.get("view")
        rows = view.rows if isinstance(view, FusedView) else None
        if view is None or (rows is None and view.name != "ar"):
            return
        states_BQH: Tensor = output[0] if isinstance(output, tuple) else output
        hidden[tap] = states_BQH[:, :rows]
        if len(hidden) == len(set(taps)):
            drafter.read(cache, [hidden[tap] for tap in taps])
            hidden.clear()

    with ExitStack() as hooks:
        for tap in set(taps):
            hooks.enter_context(layers[tap].register_forward_hook(partial(keep, tap), with_kwargs=True))
        yield
