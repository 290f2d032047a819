"""How passes call the model: eagerly, recorded, compiled, or captured as CUDA graphs; chosen when passes are made."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from orthrus.kernels import attention
from orthrus.model import graphs, traced
from orthrus.model.attach import config_of
from orthrus.model.cache import ScratchCache

Call = Callable[[list[Tensor]], list[Tensor]]


class Eager:
    """Call the model as it is.

    Attributes:
        compiled: whether passes are traced, so that each new shape costs a compilation.
        captured: whether they are replayed without Python.
        uses: how often a kind of pass is made before it takes as long as it will.
    """

    compiled = captured = False
    uses = 0

    def __init__(self, model: PreTrainedModel, cache: ScratchCache) -> None:
        self.model = model
        self.cache = cache

    def reach(self, end: int) -> int:
        """Round up how many cache slots a pass looks at."""
        return end

    def begin(self) -> None:
        """Look whether the model has other weights, which it may have before a text and not in the middle of one."""

    def logits(self, arguments: dict[str, Any], *, once: bool) -> Tensor:
        """Call the model; `once` is for widths that are never met again."""
        logits: Tensor = self.model(**arguments).logits
        return logits

    def replay(self, kind: object, rows: slice, given: list[Tensor], call: Call) -> list[Tensor]:
        """Make a pass; `given` is all that may differ between two of a kind, but for the texts' lengths."""
        return call(given)


class Recorded(Eager):
    """Run kinds of passes that are met often without Python, on CPUs."""

    uses = traced.USES + 1

    def __init__(self, model: PreTrainedModel, cache: ScratchCache, recorder: traced.Recorder) -> None:
        super().__init__(model, cache)
        self.recorder = recorder

    def begin(self) -> None:
        """Drop recordings of other weights."""
        self.recorder.look()

    def logits(self, arguments: dict[str, Any], *, once: bool) -> Tensor:
        """Run the recording of such a pass, where there is one."""
        logits = None if once or self.cache.empty else self.recorder.logits(arguments)
        return super().logits(arguments, once=once) if logits is None else logits


class Compiled(Eager):
    """Call the model through `torch.compile`, at few different reaches."""

    compiled = True

    def reach(self, end: int) -> int:
        """Round up to whole spans."""
        return min(-(-end // graphs.SPAN) * graphs.SPAN, self.cache.capacity)

    def logits(self, arguments: dict[str, Any], *, once: bool) -> Tensor:
        """Call the compiled model, but for the first pass, which allocates, and those met once."""
        if once or self.cache.empty:
            return super().logits(arguments, once=once)
        return graphs.run(self.model, arguments)


class Captured(Compiled):
    """Replay what compiled passes launch, one recording for all lengths."""

    captured = True

    def __init__(self, model: PreTrainedModel, cache: ScratchCache) -> None:
        super().__init__(model, cache)
        # What a recording reads beside the cache and its inputs: other weights make another one.
        self._state = hash((config_of(model), *(p.data_ptr() for p in model.parameters())))

    def reach(self, end: int) -> int:
        """Look at all slots; the kernel finds a text's end itself."""
        return self.cache.capacity

    def replay(self, kind: object, rows: slice, given: list[Tensor], call: Call) -> list[Tensor]:
        """Make a pass, or run it again as it was recorded."""
        if self.cache.empty:
            return call(given)
        return graphs.replayed(self.cache, (kind, rows.start, rows.stop, self._state), given, call)


def splits(model: PreTrainedModel, cache: ScratchCache) -> bool:
    """Tell whether attention takes masks in two parts, the text and the pass's own slots."""
    return attention.can_split(cache.device) and model.config._attn_implementation == attention.NAME


def runner_for(model: PreTrainedModel, cache: ScratchCache) -> Eager:
    """Choose how a model's passes over a cache are called."""
    if not graphs.is_compiled(model):
        recorder = None if splits(model, cache) else traced.recorder_for(model)
        return Eager(model, cache) if recorder is None else Recorded(model, cache, recorder)
    return (Captured if splits(model, cache) else Compiled)(model, cache)
