"""The GGUF files that llama.cpp answers from: the one a backbone was read from, other forms of it, files by name."""

import importlib.util
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock
from transformers import PreTrainedModel

from orthrus.checkpoints.gguf import cache_folder, digest_of
from orthrus.errors import ConfigError
from orthrus.writing import replacing, writing

FORMS: Final = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "bf16", "f16", "f32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A file of weights: in which form most of its matrices are ("Q8_0", "BF16"), its digest, the model's shape."""

    file: Path
    quantisation: str
    sha256: str
    layers: int
    width: int

    def to_dict(self) -> dict[str, str]:
        """Return what results say of it, as JSON values."""
        return {"gguf": self.file.name, "quantisation": self.quantisation, "sha256": self.sha256}

    def check(self, model: PreTrainedModel) -> None:
        """Raise ConfigError unless the model that is measured is on the CPU and has the shape of the file's."""
        if model.device.type != "cpu":
            raise ConfigError(f"llama.cpp is measured on the CPU, found the model on {model.device}: add --device cpu")
        config = model.config.get_text_config()
        held, required = (self.layers, self.width), (config.num_hidden_layers, config.hidden_size)
        if held != required:
            raise ConfigError(
                f"{self.file} must hold the weights of the model that is measured, {required[0]} layers of width "
                f"{required[1]}; found {held[0]} of width {held[1]}: name another file with --gguf"
            )


def label(asked: str) -> str:
    """Return the short name of what `--gguf` names: a form, or a file's name without its suffix."""
    return Path(asked).stem if asked.endswith(".gguf") else asked.lower()


def weights(asked: Iterable[str], source: Path | None) -> dict[str | None, Weights]:
    """Return the files to answer from by their labels; None stands for the backbone's own, where nothing is asked for.

    Forms that the backbone's own file does not have are made from it once, into the cache. `source` is the file that
    the backbone was read from, if any.

    Raises:
        ConfigError: the package `gguf`, a file or the source is missing, or a form is unknown.
        CheckpointError, WriteError: a file cannot be read, or the cache cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("llama.cpp's files need the package gguf, found none: pip install 'orthrus-lm[peers]'")
    out: dict[str | None, Weights] = {}
    named: list[str | None] = [*asked]
    for one in named or [None]:
        name = None if one is None else label(one)
        if name in out:
            raise ConfigError(f"--gguf must name each file and form once, found {name!r} twice")
        if one is not None and one.endswith(".gguf"):
            out[name] = _described(Path(one))
        else:
            out[name] = _own(name, source)
    return out


def _own(form: str | None, source: Path | None) -> Weights:
    if form is not None and form not in FORMS:
        raise ConfigError(f"--gguf takes .gguf files and the forms {', '.join(FORMS)}, found {form!r}")
    if source is None:
        raise ConfigError("llama.cpp needs a GGUF file, and the backbone was not read from one: name it with --gguf")
    described = _described(source)
    return described if form is None or described.quantisation == form.upper() else _described(_made(described, form))


def _described(file: Path) -> Weights:
    digest = digest_of(file)
    read = _reader(file)
    architecture = _value(read, "general.architecture")
    kinds = Counter(tensor.tensor_type.name for tensor in read.tensors if len(tensor.shape) > 1)
    return Weights(
        file=file,
        quantisation=kinds.most_common(1)[0][0],
        sha256=digest,
        layers=int(_value(read, f"{architecture}.block_count")),
        width=int(_value(read, f"{architecture}.embedding_length")),
    )


def _made(source: Weights, form: str) -> Path:
    """Write another form of a file into the cache, once: the same values, rounded to that form."""
    path = cache_folder() / f"{source.file.stem}-{source.sha256[:12]}-{form}.gguf"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                with replacing(path) as scratch:
                    _write(source.file, form.upper(), scratch)
    return path


def _write(source: Path, form: str, target: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, quants

    read = _reader(source)
    writer = GGUFWriter(target, _value(read, "general.architecture"))
    for name, field in read.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        of = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=of)
    writer.add_file_type(LlamaFileType["ALL_F32" if form == "F32" else f"MOSTLY_{form}"])
    to = GGMLQuantizationType[form]
    for tensor in read.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        try:
            writer.add_tensor(tensor.name, quants.quantize(values, to), raw_dtype=to)
        except quants.QuantError as error:
            raise ConfigError(f"{source} has no form {form}: {tensor.name}: {error}") from error
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ConfigError(f"{file} must be a GGUF file, found one that cannot be read: {error}") from error


def _value(read: Any, name: str) -> Any:
    field = read.get_field(name)
    if field is None:
        raise ConfigError(f"a GGUF file of a language model is required, found one without {name}")
    return field.contents()
