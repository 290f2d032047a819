"""Which floating-point types the CPU at hand multiplies in; torch computes the others many times slower."""

import torch


def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has matrix products in float32, bfloat16 or float16; False for other types."""
    if dtype == torch.float32:
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    check = getattr(torch.ops.mkldnn, name, None) if name else None
    return check is not None and bool(check())
