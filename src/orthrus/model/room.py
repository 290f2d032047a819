"""What a device's memory has room for, told before anything is allocated."""

import psutil
import torch

from orthrus.errors import CacheFull


def free_memory(device: torch.device) -> int:
    """Return the bytes that could be allocated on a device now; the limit of a container is not seen."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free: int = psutil.virtual_memory().available
    return free


def require_memory(needed: int, device: torch.device, *, rows: int, capacity: int) -> None:
    """Raise CacheFull where a cache of so many rows takes more bytes than are free."""
    if needed > (free := free_memory(device)):
        raise CacheFull(
            f"a cache of {rows} rows of {capacity} positions takes {needed / 1e9:.3g} GB, found {free / 1e9:.3g} GB "
            f"free on {device}: take fewer rows (prompts at once) or positions (max_new_tokens)"
        )
