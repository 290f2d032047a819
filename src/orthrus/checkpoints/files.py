"""Views on disk: the adapter (the twin's tensors and `orthrus_config.json`) and the official layout (one full model).

Every file is written under a temporary name and then renamed, so an interrupted save leaves what was there.
"""

import dataclasses
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.checkpoints.remote import MODELING
from orthrus.errors import CheckpointError, ConfigError, UnsupportedModel
from orthrus.model.attach import config_of
from orthrus.model.config import OrthrusConfig
from orthrus.model.fingerprint import (
    TWIN,
    backbone_tensors,
    fingerprint,
    identity,
    of_view,
    precision_of,
    quantization_of,
    twin_tensors,
)
from orthrus.writing import writing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Format = Literal["adapter", "official"]
ADAPTER_FILE = "orthrus.safetensors"
CONFIG_FILE = "orthrus_config.json"
OFFICIAL_FIELDS = (
    "architectures",
    "auto_map",
    "block_size",
    "lora_alpha",
    "markov_rank",
    "mask_token_id",
    "model_type",
    "r",
    "use_cache",
)
"""What the published config.json says otherwise than the backbone's own, or beside it."""
OFFICIAL: dict[str, dict[str, Any]] = {
    "qwen3": {
        "architectures": ["OrthrusLM"],
        "model_type": "qwen3",
        "auto_map": {"AutoModelForCausalLM": "modeling_orthrus.OrthrusLM"},
        # Left over in the published configs; nothing reads them, but readers may expect to find them.
        "r": 16,
        "lora_alpha": 32,
    },
    "qwen3_5_text": {"architectures": ["OrthrusQwen3_5ForCausalLM"], "model_type": "orthrus_qwen3_5"},
}
"""The backbones that have an official layout, by model type, and what their config.json says of itself."""
OFFICIAL_TYPES = {str(said["model_type"]): backbone for backbone, said in OFFICIAL.items()}
"""Their model types, by what that config.json calls them."""


def save(model: PreTrainedModel, path: str | Path, *, format: Format = "adapter") -> Path:
    """Write a dual-view model's view to a directory, and return it; other files in it stay.

    "adapter" writes the view alone; "official" one full Qwen3 or Qwen3.5 model that the published Orthrus code reads
    (tokenizer files are the caller's to add). That code knows no correction between slots and passes its tensors over:
    its texts are the same, fewer of its drafts are kept.

    Raises:
        ConfigError: an unknown format, a file where the directory should be, or a model without a view.
        UnsupportedModel: a view in integers; the official layout is defined for Qwen3 and Qwen3.5 backbones, and views
            like the paper's.
    """
    config_of(model)
    if format == "adapter":
        tensors = twin_tensors(model)
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise UnsupportedModel(f"a view in {precision_of(model)} is not saved: load the model in floating point")
        described = _described(model)
        files = {CONFIG_FILE: described.to_dict()}
    elif format == "official":
        tensors = official_tensors(model)
        files = {"config.json": official_config(model)}
        if model.generation_config is not None:
            generation = {**model.generation_config.to_diff_dict(), "use_cache": False}
            files["generation_config.json"] = generation
    else:
        raise ConfigError(f"format must be 'adapter' or 'official', found {format!r}")
    stem = Path(ADAPTER_FILE).stem if format == "adapter" else "model"
    with replacing(Path(path)) as scratch:
        plain = {name: _alone(t.detach().cpu()) for name, t in tensors.items()}
        save_torch_state_dict(plain, scratch, filename_pattern=stem + "{suffix}.safetensors")
        for name, values in files.items():
            (scratch / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        for name, text in (MODELING if "auto_map" in files.get("config.json", {}) else {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
        written = {file.name for file in scratch.iterdir()}
    # A whole file must not be shadowed by the shards and the index of an earlier, larger save, or the reverse.
    for file in [*Path(path).glob(f"{stem}.safetensors*"), *Path(path).glob(f"{stem}-*-of-*.safetensors")]:
        if file.name not in written:
            file.unlink()
    return Path(path)


def _alone(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that shares its memory with no other (merged layers' do), which files cannot say."""
    shares = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()


def load_adapter(model: PreTrainedModel, path: Path, *, backbone: str | None = None) -> None:
    """Load an adapter's tensors into a model whose view has just been attached, in place.

    `backbone` is the backbone's fingerprint, where its weights were rounded to float16, which changes it; found out
    from the model otherwise. Another form of the same backbone, such as a quantised one, gives a warning.

    Raises CheckpointError: a missing or damaged file, missing, unexpected, misshapen or useless tensors, or another
    backbone.
    """
    _check_backbone(model, path, backbone)
    fill(model, read_tensors(path, ADAPTER_FILE), where=str(path))


def _described(model: PreTrainedModel) -> OrthrusConfig:
    """Return a view's configuration with what is to be known of the weights of its backbone."""
    config, form = config_of(model), quantization_of(model)
    exact = config.fingerprint if form else fingerprint(model)
    return dataclasses.replace(config, fingerprint=exact, identity=identity(model), quantization=form)


def _check_backbone(model: PreTrainedModel, path: Path, digest: str | None) -> None:
    """Refuse another backbone than the view was trained for; say so where it is the same one in another form."""
    config, form = config_of(model), quantization_of(model)
    plain = form is None and config.quantization is None
    kind, expected, actual = "fingerprint", config.fingerprint, digest
    if plain:
        actual = actual or fingerprint(model)
        if expected in (None, actual):
            return
    # Rounding to float16 changes more than digits: nothing can be said of what quantisation left alone.
    comparable = config.identity is not None and model.get_input_embeddings().weight.dtype != torch.float16
    same = comparable and identity(model) == config.identity
    if not same and (plain or comparable):
        if not plain:
            kind, expected, actual = "identity", config.identity, identity(model)
        raise CheckpointError(
            f"{path} holds a view trained for a backbone with {kind} {expected} ({config.backbone or 'unnamed'}), "
            f"this model's is {actual}: load it with its own backbone"
        )
    which = "embedding and norms are the same" if same else "whether it is the same backbone cannot be told"
    now = form or ("other" if plain else "plain")
    warnings.warn(
        f"the view of {path} was trained on {config.quantization or 'plain'} weights, this backbone has {now} ones "
        f"({which}): texts are this backbone's own, drafts may be kept less often",
        stacklevel=4,
    )


def read_config(path: Path) -> OrthrusConfig:
    """Read `orthrus_config.json`; raises CheckpointError when it is missing or is not one."""
    file = path / CONFIG_FILE
    values = read_object(file, missing="it is not an adapter")
    try:
        return OrthrusConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}: write it again, or update orthrus") from None


def read_object(file: Path, *, missing: str) -> dict[str, Any]:
    """Read one JSON object from a file; `missing` says what a directory without that file is not."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} must hold {file.name}, found none: {missing}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} must be JSON, found {error}: write it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold one JSON object, found {type(values).__name__}")
    return values


@contextmanager
def described_by(file: Path) -> Iterator[None]:
    """Name the file whose values the block cannot use.

    Raises CheckpointError: a value is missing, of another type or out of its bounds.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        raise CheckpointError(f"{file} must describe a model, found {error!r}: fetch or write it again") from error


def fill(model: PreTrainedModel, tensors: dict[str, Tensor], *, where: str) -> None:
    """Copy tensors into the twin by name; nothing is copied unless every one of them fits and holds numbers."""
    wanted = twin_tensors(model)
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shapes = [n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape]
    if missing or unexpected or shapes:
        problems = [_names("missing", missing), _names("unexpected", unexpected)]
        problems += [
            f"{n} is {list(tensors[n].shape)}, the model's is {list(wanted[n].shape)}" for n in sorted(shapes)[:3]
        ]
        raise CheckpointError(f"{where} does not fit this backbone: {'; '.join(filter(None, problems))}")
    for name in sorted(wanted):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise CheckpointError(f"{where}: {name} must be one of {kinds}, found {tensor.dtype}: write it again")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{where}: {name} ({tensor.dtype}) must hold finite numbers, found others: damaged")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def official_name(name: str) -> str:
    """Rename a view's tensor to the published layout: `…self_attn.diffusion.q_proj.weight` → `…q_proj_diff.weight`.

    What the layout does not know keeps its name.
    """
    if TWIN not in name:
        return name
    module, inner = name.split(TWIN)
    head, dot, rest = inner.partition(".")
    return f"{module}.{head}_diff{dot}{rest}"


def official_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all tensors of a dual-view model under the published names; tied weights once."""
    require_published(model, "the official layout", families=tuple(OFFICIAL))
    tensors = backbone_tensors(model)
    tensors |= {official_name(name): p for name, p in model.named_parameters() if of_view(name)}
    return tensors


def require_published(model: PreTrainedModel, layout: str, *, families: Sequence[str] = ("qwen3",)) -> None:
    """Refuse what a layout made for the published models cannot say, a correction between slots excepted.

    Raises UnsupportedModel: another family, a view that drafts otherwise, quantised weights or weights kept elsewhere.
    """
    if model.config.model_type not in families:
        raise UnsupportedModel(
            f"{layout} is defined for {' and '.join(families)} backbones, found {model.config.model_type}: save an "
            "adapter"
        )
    for name, value in config_of(model).departures.items():
        if name != "markov_rank":  # without it fewer drafts are kept, of the same texts
            raise UnsupportedModel(f"{layout} has no place for {name}, found {value!r}: save an adapter")
    form = quantization_of(model)
    if form or any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModel(
            f"{layout} holds plain weights, found {form or 'offloaded ones'}: load plain ones, or save an adapter"
        )


def official_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the published layout's config.json: the backbone's fields and what the Orthrus code reads beside them."""
    config = config_of(model)
    local = ("_name_or_path", "id2label", "label2id", "problem_type")
    fields = {name: value for name, value in model.config.to_dict().items() if name not in local}
    correction = {"markov_rank": config.markov_rank} if config.markov_rank else {}
    orthrus = {
        "block_size": config.block_size,
        "mask_token_id": config.mask,
        "dtype": str(model.dtype).removeprefix("torch."),
        "use_cache": False,
    }
    return fields | correction | orthrus | OFFICIAL[model.config.model_type]


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read a safetensors file of a directory, or the shards that its index lists."""
    index = path / f"{name}.index.json"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [name]
        tensors: dict[str, Tensor] = {}
        for file in files:
            with safe_open(path / file, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} must hold {name}, found none (or not all of its shards): {error}") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / name} is damaged ({error}): fetch or write it again") from error
    return tensors


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a scratch directory whose files replace those of `path` when the block ends without an error."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"a model is written to a directory, found the file {path}: name another place")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield scratch
            path.mkdir(exist_ok=True)
            for name in sorted(names_in(scratch), key=lambda name: not name.endswith(".safetensors")):
                (path / name).parent.mkdir(exist_ok=True)
                (scratch / name).replace(path / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def names_in(folder: Path) -> set[str]:
    """Return the files of a folder and of those in it, as paths from there with slashes."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def _names(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind} tensors: {', '.join(names[:3])}{more}"
