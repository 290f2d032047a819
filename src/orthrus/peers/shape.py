"""The shape of a drafter's layers, taken from its backbone."""

from collections.abc import Iterable
from typing import Any, Final

from transformers import PreTrainedConfig

FIELDS: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
)
"""What a configuration says of a decoder layer."""
_ROPE_OF_BACKBONE: Final = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")


def shape_of(text: PreTrainedConfig, fields: Iterable[str] = FIELDS) -> dict[str, Any]:
    """Return these fields of a backbone, as a drafter's layers take them.

    Where a backbone has one rotary table per kind of layer, that of full attention is taken. Rotary options that
    drafters do not have are left out.
    """
    shape = {name: getattr(text, name) for name in fields if getattr(text, name, None) is not None}
    tables = shape.get("rope_parameters", {})
    rope = tables.get("full_attention", tables)
    shape["rope_parameters"] = {name: value for name, value in rope.items() if name not in _ROPE_OF_BACKBONE}
    shape.setdefault("head_dim", text.hidden_size // text.num_attention_heads)
    return shape
