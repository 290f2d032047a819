"""Small files that outlive a process: what was measured or found out on this machine, for the next one to begin with.

A file that is missing, damaged or about something else is as good as none.
"""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from orthrus.provenance import device_name, digest, digest_of, processor

FOLDER: Final = "ORTHRUS_CACHE"
"""Environment variable that names the folder; empty: nothing is kept. `~/.cache/orthrus` unless given."""

_OF_A_PROCESSOR: Final = ("vendor_id", "cpu family", "model", "stepping", "microcode", "cache size", "flags")
_OF_KERNELS: Final = ("ATEN_", "CUBLAS_", "CUDA_", "DNNL_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_", "TORCH_")

_log = logging.getLogger(__name__)


def folder() -> Path | None:
    """Return where files are kept; None where none are, as for a user without a home."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = os.environ.get(FOLDER, f"{caches}/orthrus")
    try:
        return Path(named).expanduser() if named else None
    except RuntimeError:  # it is not known where `~` is
        return None


def recall(kind: str, about: Mapping[str, Any]) -> Any:
    """Return what was kept about just this, a JSON value; None where nothing was."""
    file = _file(kind, about)
    if file is None:
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return kept["record"] if kept["about"] == about else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:  # someone else's folder, or half a file
        _log.info("%s cannot be read (%s): as good as none", file, error)
        return None


def keep(kind: str, about: Mapping[str, Any], record: Any) -> None:
    """Write a JSON value about something, whole or not at all; of several processes the last one's stays."""
    file = _file(kind, about)
    if file is None:
        return
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"about": about, "record": record}), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        _log.info("%s cannot be written: %s", file, error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def machine(device: torch.device) -> dict[str, Any]:
    """Return all that decides how fast, and by which kernels, this process computes on a device, as JSON values."""
    about: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": digest_of(torch.__version__ + torch.__config__.show()),
        "processor": digest({name: value for name, value in processor().items() if name in _OF_A_PROCESSOR}),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_OF_KERNELS)},
        "settings": list(settings(device)),
    }
    if device.type == "cuda":
        about["cuda"] = [torch.version.cuda, *torch.cuda.get_device_capability(device)]
    return about


def settings(device: torch.device) -> tuple[Any, ...]:
    """Return what a program may have told torch that changes kernels on a device, as JSON values."""
    backends = torch.backends
    # Not torch's own summary of these: it raises once one of them was set by itself.
    libraries = [getattr(backends.mkldnn, "matmul", None), backends.mkldnn, backends.cuda.matmul, backends]
    casts = torch.is_autocast_enabled(device.type)
    return (
        *(getattr(library, "fp32_precision", None) for library in libraries),
        torch.are_deterministic_algorithms_enabled(),
        backends.mkldnn.enabled,
        str(torch.get_autocast_dtype(device.type)) if casts else None,
    )


def _file(kind: str, about: Mapping[str, Any]) -> Path | None:
    home = folder()
    return None if home is None else home / kind / f"{digest(about)}.json"
