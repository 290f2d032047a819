"""Backbones kept as GGUF files: converted once into a cache, from which they load like any directory of weights."""

import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from orthrus import memory
from orthrus.errors import CheckpointError
from orthrus.writing import replacing, writing

FORM: Final = 1  # of what a conversion writes: another number, another folder
_NOTE: Final = "conversion.json"


def cache_folder() -> Path:
    """Return where converted backbones are kept: with what else is, or in the system's temporary folder."""
    return memory.folder() or Path(tempfile.gettempdir()) / "orthrus"


def converted(file: Path, *, sha256: str | None = None) -> Path:
    """Return a directory with the weights of a GGUF file in float32 and its tokenizer, made if need be.

    A directory is there whole or not at all, and goes by the file's digest, which has to be `sha256`.

    Raises:
        CheckpointError: no such file, another one than is wanted, or one that cannot be converted.
        WriteError: the cache cannot be written.
    """
    digest = digest_of(file)
    if sha256 is not None and digest != sha256:
        raise CheckpointError(
            f"{file} must have the sha256 {sha256}, found {digest}: it is damaged or another model; install its "
            "package again"
        )
    folder = cache_folder() / f"{file.stem}-{digest[:12]}-{FORM}"
    if _whole(folder):
        return folder
    with writing(f"{folder} (about {6 * file.stat().st_size // 2**20} MB; {memory.FOLDER} names another folder)"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _whole(folder):
                _convert(file, folder)
    return folder


def digest_of(file: Path) -> str:
    """Return the sha256 of a file; raises CheckpointError for one that cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def _whole(folder: Path) -> bool:
    """Whether a conversion is there and its files have the sizes that they were written with."""
    try:
        sizes = json.loads((folder / _NOTE).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _convert(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file} needs the package gguf to be read, found none: pip install gguf")
    print(f"{file.name} is converted once into {folder}, which takes half a minute", file=sys.stderr, flush=True)
    with replacing(folder) as scratch:
        scratch.mkdir()
        _write(file, scratch)
        sizes = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
        note = {"from": file.name, "bytes": sizes}
        (scratch / _NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, folder: Path) -> None:
    """Have transformers read a GGUF file and write what it found."""
    try:
        kept = {"gguf_file": file.name, "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, quantization_config=GgufConfig(dequantize=True), **kept
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # readers of a damaged file raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} cannot be converted: {reason}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
