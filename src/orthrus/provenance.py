"""Where a figure comes from: command line, code, versions, device, precision, date. Never a host's name."""

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orthrus import __version__

_PACKAGE = Path(__file__).parent


def provenance(
    *,
    dtypes: Sequence[str],
    device: torch.device | str = "cpu",
    argv: Sequence[str] | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """Describe this process as plain JSON values, for the head of a file of results.

    `dtypes` are those that the run measures; `argv` and `now` (in UTC) are this process's own unless given.
    """
    command = [Path(sys.argv[0]).name, *sys.argv[1:]] if argv is None else argv
    commit, dirty = git_state(_PACKAGE)
    return {
        "command": shlex.join(command),
        "commit": commit,
        "dirty": dirty,
        "orthrus": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "dtypes": list(dtypes),
        "date": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
    }


def digest(value: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that tell JSON values apart, whatever the order of their keys."""
    return digest_of(json.dumps(value, sort_keys=True, ensure_ascii=False))


def digest_of(data: str | bytes) -> str:
    """Return twelve hexadecimal digits that tell texts, or contents of files, apart."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:12]


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit that a folder of source is at, and whether the folder differs from it.

    Both are None where the folder is not tracked by git (an installed wheel, even one inside a repository).
    """
    if not _git(folder, "ls-files", "--", "."):
        return None, None
    return _git(folder, "rev-parse", "HEAD") or None, bool(_git(folder, "status", "--porcelain", "--", "."))


def device_name(device: torch.device) -> str:
    """Return the name of the processor or accelerator that a torch device stands for.

    A processor's with the vector instructions that torch uses on it, since one name may stand for several
    generations, whose figures do not compare: "AMD EPYC (AVX2)".
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = processor().get("model name") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def processor() -> dict[str, str]:
    """Return what Linux says of the first processor, by its names for it; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
