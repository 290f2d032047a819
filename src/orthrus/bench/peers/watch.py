"""Time drafts and verifications while an engine decodes, without reading prompts, choosing tokens or accepting them."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from orthrus.bench.race import Clock
from orthrus.decode.drafters import Drafter, TreeDrafter
from orthrus.decode.geometry import Geometry
from orthrus.decode.passes import Passes
from orthrus.model.cache import ScratchCache


class Watch:
    """Keep the seconds of one drafter's drafts and verifications, by batch and `context`, None in a race.

    `key_bytes` are those of a token's keys and values in the drafter's layers.
    """

    def __init__(self, clock: Clock, model: PreTrainedModel) -> None:
        self.clock = clock
        self.key_bytes = 0
        self.batch = 1
        self.context: int | None = None
        self._device = model.device
        self._drafting = False
        self._seconds: dict[tuple[int, int | None], dict[str, list[float]]] = {}

    def follow(self, drafter: Drafter) -> None:
        """Time all later drafts of a drafter."""
        drafter.propose = self._timed("draft", drafter.propose)  # type: ignore[method-assign]
        if isinstance(drafter, TreeDrafter):
            drafter.grow = self._timed("draft", drafter.grow)  # type: ignore[method-assign]

    def passes(self, model: PreTrainedModel, cache: ScratchCache, geometry: Geometry | None = None) -> Passes:
        """Make an engine's passes; those outside a draft count as verifications."""
        made = Passes(model, cache, geometry)
        made.run = self._timed("verify", made.run)  # type: ignore[method-assign]
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the medians of a draft's and a verification's seconds, and bytes of keys, as JSON values."""
        costs = [
            {"batch": batch, "context": context} | {f"{name}_seconds": median(t) for name, t in seconds.items()}
            for (batch, context), seconds in self._seconds.items()
        ]
        return {"costs": costs, "key_bytes_per_token": self.key_bytes}

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            if self._drafting:
                return call(*given, **named)
            self._drafting = name == "draft"
            self._wait()
            began = self.clock()
            try:
                return call(*given, **named)
            finally:
                self._wait()
                seconds = self._seconds.setdefault((self.batch, self.context), {})
                seconds.setdefault(name, []).append(self.clock() - began)
                self._drafting = False

        return timed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
