"""What a dual-view model is, as data: block length, mask token, and the backbone it belongs to.

Knows nothing about modules, tensors or files beyond the JSON text of its own fields.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from orthrus.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class OrthrusConfig:
    """Describe the diffusion view of one backbone.

    Attributes:
        block_size: K, the anchor and its masks: one draft pass proposes at most K - 1 tokens (paper: 32).
        mask_token_id: embedding row that stands for "not written yet"; None lets `attach` take the last row of
            the embedding, which padded vocabularies such as Qwen3's never train.
        backbone: Hub id or path of the frozen model the view was trained for.
        revision: Hub revision of the backbone.
        fingerprint: digest of the backbone's weights (`orthrus.model.checkpoint.fingerprint`).
    """

    block_size: int = 32
    mask_token_id: int | None = None
    backbone: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 2:
            raise ConfigError(
                f"block_size must be an integer of at least 2 (an anchor and one mask), found {self.block_size!r}"
            )
        mask = self.mask_token_id
        if mask is not None and (isinstance(mask, bool) or not isinstance(mask, int) or mask < 0):
            raise ConfigError(f"mask_token_id must be an integer of at least 0, found {mask!r}")

    @property
    def mask(self) -> int:
        """The mask token's id; raises ConfigError before `attach` has settled it."""
        if self.mask_token_id is None:
            raise ConfigError("mask_token_id is not set: attach() settles it, or give OrthrusConfig one")
        return self.mask_token_id

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "OrthrusConfig") -> "OrthrusConfig":
        """Build a configuration from JSON values; an unknown key raises ConfigError and names the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        return cls(**values)
