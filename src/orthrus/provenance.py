"""Where a figure comes from: command line, code, versions, device, precision, date. Never a host's name.

Knows Python, git and the versions of a few packages; knows no model and no measurement.
"""

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
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

    Args:
        dtypes: precisions that the run measures, by name.
        device: the torch device it runs on.
        argv: the command line; None takes this process's own.
        now: the date to state; None takes the clock's, in UTC.
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
        "transformers": _version("transformers"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "dtypes": list(dtypes),
        "date": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
    }


def digest(value: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that tell JSON values apart, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
