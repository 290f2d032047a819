"""What a dual-view model is, as data: its block and mask token, and the backbone it belongs to."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from orthrus.errors import ConfigError

BlockAttention = Literal["bidirectional", "causal"]
Anchor = Literal["twin", "backbone"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OrthrusConfig:
    """Describe the diffusion view of one backbone.

    Attributes:
        block_size: K, the anchor and its masks: one draft pass proposes at most K - 1 tokens (paper: 32).
        mask_token_id: embedding row that stands for "not written yet"; None lets `attach` take the last row of
            the embedding, which padded vocabularies such as Qwen3's never train.
        backbone: Hub id or path of the frozen model the view was trained for.
        revision: Hub revision of the backbone.
        fingerprint: digest of the backbone's weights (`orthrus.model.fingerprint.fingerprint`); None where they were
            quantised.
        identity: digest of what quantisation leaves of them (`orthrus.model.fingerprint.identity`).
        quantization: in which form the backbone kept its weights when the view was saved; None for plain ones.
        block_attention: "bidirectional" (the paper's): a draft slot sees its whole block; "causal": the slots up to
            itself.
        block_recurrence: the same of recurrent layers; "causal" is the published one: a slot reads the slots up to
            itself. "bidirectional" adds what a second chain, from the block's end, has read of the slots behind it.
        markov_rank: rank of the correction between neighbouring slots (`orthrus.model.markov`); 0 for none.
        anchor: who reads the anchor's row: "twin" (the paper's), a block's first slot being the anchor; "backbone": a
            block is K - 1 masks behind a row of the frozen view, the first of them at the position after the anchor.
        layers: decoder layers that have a twin, by index, "last:N", or "attention" (those that are not recurrent); None
            for all. Draft rows run through the frozen module of the others. `attach` settles it to indices.
            Without any, only other drafters are of use.
        trained_mask: whether masks have an embedding of the view's own (`orthrus.model.mask_row`), which began as that
            of `mask_token_id`.
    """

    block_size: int = 32
    mask_token_id: int | None = None
    backbone: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    identity: str | None = None
    quantization: str | None = None
    block_attention: BlockAttention = "bidirectional"
    block_recurrence: BlockAttention = "causal"
    markov_rank: int = 0
    anchor: Anchor = "twin"
    layers: tuple[int, ...] | list[int] | str | None = None
    trained_mask: bool = False

    def __post_init__(self) -> None:
        wholes = {"block_size": "2 (an anchor and one mask)", "mask_token_id": "0", "markov_rank": "0 (none)"}
        for name, least in wholes.items():
            value = getattr(self, name)
            if (type(value) is not int or value < int(least[0])) and (name, value) != ("mask_token_id", None):
                raise ConfigError(f"{name} must be an integer of at least {least}, found {value!r}")
        kinds = {"block_attention": BlockAttention, "block_recurrence": BlockAttention, "anchor": Anchor}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, found {getattr(self, name)!r}")
        if not isinstance(self.trained_mask, bool):
            raise ConfigError(f"trained_mask must be true or false, found {self.trained_mask!r}")
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not (self.layers in (None, "attention") or _LAST.fullmatch(str(self.layers)) or _indices(self.layers)):
            raise ConfigError(f"layers must be 'last:N', 'attention' or different layer indices, found {self.layers!r}")

    def layers_of(self, recurrent: Sequence[bool]) -> tuple[int, ...]:
        """Return the indices of the layers that have a twin; raises ConfigError for those out of range.

        `recurrent`: whether each layer of the model is a recurrent one.
        """
        count = len(recurrent)
        chosen = range(count) if self.layers is None else self.layers
        if chosen == "attention":
            chosen = [index for index in range(count) if not recurrent[index]]
        elif isinstance(chosen, str):
            chosen = range(count - int(chosen.removeprefix("last:")), count)
        if chosen and (min(chosen) < 0 or max(chosen) >= count):
            raise ConfigError(f"layers must be among the model's {count} layers, found {self.layers!r}")
        return tuple(chosen)

    @property
    def mask(self) -> int:
        """The mask token's id; raises ConfigError before `attach` has settled it."""
        if self.mask_token_id is None:
            raise ConfigError("mask_token_id is not set: attach() settles it, or give OrthrusConfig one")
        return self.mask_token_id

    @property
    def proposals(self) -> int:
        """Tokens after the anchor that one draft pass proposes at most: the backbone's own and the masks' drafts."""
        return self.block_size if self.anchor == "backbone" else self.block_size - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, without those that say no more than that they are not there."""
        left_out = {*_PAPER} - {*self.departures} | {name for name in _OPTIONAL if getattr(self, name) is None}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    @property
    def departures(self) -> dict[str, Any]:
        """The fields by which the view drafts otherwise than the paper's."""
        return {name: getattr(self, name) for name, value in _PAPER.items() if getattr(self, name) != value}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "OrthrusConfig") -> "OrthrusConfig":
        """Build a configuration from JSON values; an unknown key raises ConfigError and names the nearest one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(names)}"
                raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        return cls(**values)


def _indices(layers: object) -> bool:
    if not isinstance(layers, tuple) or not all(type(index) is int for index in layers):
        return False
    return len(set(layers)) == len(layers)


_LAST = re.compile(r"last:[1-9]\d*")
_PAPER: dict[str, Any] = {
    "block_attention": "bidirectional",
    "block_recurrence": "causal",
    "markov_rank": 0,
    "anchor": "twin",
    "layers": None,
    "trained_mask": False,
}
"""How the paper's view drafts."""
_OPTIONAL = ("identity", "quantization")
