"""What the CPU at hand multiplies in: torch computes in other floating-point types many times slower."""

import torch

from orthrus.provenance import processor


def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has matrix products in float32, bfloat16 or float16; False for other types."""
    if dtype == torch.float32:
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    check = getattr(torch.ops.mkldnn, name, None) if name else None
    return check is not None and bool(check())


def has_tiles() -> bool:
    """Tell whether this CPU multiplies tiles of matrices (AMX)."""
    abilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13
    if "amx_tile" in abilities:
        return bool(abilities["amx_tile"])
    return "amx_tile" in processor().get("flags", "").split()
