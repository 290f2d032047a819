"""`orthrus convert`: write a view in another layout, with a model card, and upload it to the Hub if asked."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orthrus.cli import common
from orthrus.cli.common import err, say
from orthrus.errors import CheckpointError, ConfigError, OrthrusError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD_FILE = "README.md"
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "config.json",
    "orthrus_config.json",
    "modeling_orthrus.py",
    "custom_generate/*",
)
"""Files that make a directory a model; leftovers of another layout would be read as part of this one."""

Source = Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a directory, or a Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write, or the file of a GGUF.")]
Format = Annotated[
    Literal["adapter", "hub", "official", "gguf"],
    typer.Option(
        "--format",
        help="adapter: the view alone; hub: one that others can open; official: a full Qwen3 model, as published; "
        "gguf: the same as one file, for the llama.cpp fork.",
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The backbone (a directory, a Hub id) to name in an adapter, or to load where MODEL names none.",
    ),
]
WithBackbone = Annotated[bool, typer.Option("--with-backbone", help="Write the backbone beside an adapter.")]
Force = Annotated[bool, typer.Option("--force", help="Write over another model, here and on the Hub.")]
Push = Annotated[
    str | None, typer.Option(metavar="REPO_ID", help="Upload what was written to the Hugging Face Hub, too.")
]
Private = Annotated[bool, typer.Option("--private", help="Let a repository that --push makes be private.")]


def convert(
    model: Source,
    out: Out,
    format: Format,
    backbone: Backbone = None,
    with_backbone: WithBackbone = False,
    dtype: common.FloatDtype = None,
    force: Force = False,
    push: Push = None,
    private: Private = False,
) -> None:
    """Write a model's view as an adapter, or with its backbone in the official layout or as GGUF; with a model card."""
    lacking = backbone is not None and _names_no_backbone(model)  # then the option says what to load
    if format in ("official", "gguf") and (with_backbone or (backbone and not lacking)):
        raise typer.BadParameter(f"the {format} layout holds the backbone: leave --backbone and --with-backbone out")
    if backbone and with_backbone and not lacking:
        raise typer.BadParameter("--backbone names one elsewhere, --with-backbone writes one: give one of them")
    if private and not push:
        raise typer.BadParameter("--private is about the repository of --push: give that too")
    if format == "gguf":
        if push:
            raise typer.BadParameter("--push uploads the other formats: leave it out, and upload the file by hand")
        _write_gguf(model, out, backbone if lacking else None, dtype, force=force)
        return
    _check_target(model, out, force=force)
    layout: Literal["adapter", "official"] = "official" if format == "official" else "adapter"
    if push:
        _check_repository(push, force=force)
    from orthrus.checkpoints.card import model_card
    from orthrus.checkpoints.remote import custom_generate
    from orthrus.model.attach import config_of

    loaded, tokenizer = common.load(model, backbone=backbone if lacking else None, dtype=dtype or "auto", device="cpu")
    origin = config_of(loaded)
    if layout == "adapter":
        shared = format == "hub" or push is not None
        _settle_backbone(loaded, backbone, with_backbone=with_backbone, shared=shared)
        origin = origin if with_backbone else config_of(loaded)
    address = push or f"./{out.resolve().name}"
    card = model_card(
        loaded, tokenizer, origin, format=layout, address=address, with_backbone=with_backbone, **_said_of(model)
    )
    texts = custom_generate(push or str(out.resolve())) if layout == "adapter" else {}
    if not (out / CARD_FILE).exists():
        texts[CARD_FILE] = card
    written = _write(loaded, tokenizer, out, layout, texts, with_backbone=with_backbone)
    for stale in _model_files(out) - written:
        (out / stale).unlink()
        with suppress(OSError):
            (out / stale).parent.rmdir()  # where it was the last one there
    say(f"{out}: {format}, {common.precision(loaded)}: {', '.join(sorted(written))}")
    if CARD_FILE not in written:
        say(f"{out / CARD_FILE} stays as it was: remove it to have a new card written", to=err)
    if push:
        say(_upload(out, push, files=written | {CARD_FILE}, private=private))


def _write_gguf(model: str, out: Path, backbone: str | None, dtype: str | None, *, force: bool) -> None:
    if out.suffix != ".gguf" or out.is_dir():
        raise CheckpointError(f"OUT must be the name of a .gguf file, found {out}: name one")
    if out.exists() and not force:
        raise CheckpointError(f"{out} is there already: name another file, or write over it with --force")
    from orthrus.checkpoints.gguf_export import save_gguf

    loaded, tokenizer = common.load(model, backbone=backbone, dtype=dtype or "auto", device="cpu")
    for left_out in save_gguf(loaded, tokenizer, out):
        say(f"the layout has no place for {left_out}", to=err)
    say(f"{out}: gguf, {common.precision(loaded)}, {out.stat().st_size / 1e6:.0f} MB")


def _names_no_backbone(model: str) -> bool:
    """Tell whether a model is an adapter without a backbone beside it or in its configuration."""
    from orthrus.checkpoints.files import read_config
    from orthrus.checkpoints.load import is_adapter, locate

    home = locate(model)
    return is_adapter(home) and not (home / "config.json").exists() and read_config(home).backbone is None


def _check_target(model: str, out: Path, *, force: bool) -> None:
    """Refuse to write over a file, over the source, or over another model."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"OUT must be a directory, found the file {out}: name another")
    if out.is_dir() and Path(model).is_dir() and out.samefile(model):
        raise CheckpointError(f"{out} is the model to convert: name another directory to write to")
    held = _model_files(out)
    if held and not force:
        raise CheckpointError(
            f"{out} holds a model already ({', '.join(sorted(held))}): name another directory, or write "
            "over it with --force"
        )


def _settle_backbone(model: "PreTrainedModel", backbone: str | None, *, with_backbone: bool, shared: bool) -> None:
    """Record where an adapter's backbone is; refuse to write one that nobody (or nobody else, if shared) could load."""
    from orthrus.model.attachment import attachment_of, config_of

    config = config_of(model)
    if with_backbone:
        config = dataclasses.replace(config, backbone=None, revision=None)
    elif backbone:
        name = str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone
        config = dataclasses.replace(config, backbone=name, revision=None)
    elif config.backbone is None:
        raise CheckpointError(
            "an adapter must name its backbone, this model does not know it: name it with --backbone, "
            "or write it beside the adapter with --with-backbone"
        )
    if shared and config.backbone is not None and Path(config.backbone).is_dir():
        raise ConfigError(
            f"an adapter that others can load is required, found one whose backbone is the directory "
            f"{config.backbone}: name the backbone's Hub id with --backbone, or write it beside the adapter with "
            "--with-backbone; nothing was written"
        )
    attachment_of(model).config = config


def _said_of(source: str) -> dict[str, Any]:
    """Return what a card says beside the view: the licence of the source's own, and how a finished run trained it."""
    from orthrus.checkpoints.card import licence_of, tables_of
    from orthrus.checkpoints.load import locate

    home = locate(source)
    runs = [home, home.parent] if home.name == "model" else [home]
    run_card = next(filter(None, (_text(folder / "RUN.md") for folder in runs)), "")
    return {"licence": licence_of(_text(home / CARD_FILE)), "training": tables_of(run_card)}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _write(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    layout: Literal["adapter", "official"],
    texts: Mapping[str, str],
    *,
    with_backbone: bool,
) -> set[str]:
    """Write everything under a temporary name, move it into place, and return the names of the files."""
    from orthrus.checkpoints.files import names_in, replacing, save
    from orthrus.model.attach import detach

    with replacing(out) as scratch:
        save(model, scratch, format=layout)
        tokenizer.save_pretrained(scratch)
        if with_backbone:
            detach(model).save_pretrained(scratch)
        for name, text in texts.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8")
        return names_in(scratch)


def _model_files(directory: Path) -> set[str]:
    files = [file for pattern in MODEL_FILES for file in directory.glob(pattern) if file.is_file()]
    return {file.relative_to(directory).as_posix() for file in files}


def _check_repository(repo_id: str, *, force: bool) -> None:
    """Make sure that there is a network, a token, and a place on the Hub that a model can be uploaded to."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _asking(repo_id, otherwise="nothing was written"):
        api.whoami()
        held = _of_models(api.list_repo_files(repo_id)) if api.repo_exists(repo_id) else []
    if held and not force:
        raise CheckpointError(
            f"--push {repo_id}: the repository holds a model already ({', '.join(held)}): name another, or "
            "replace it with --force; nothing was written"
        )


def _upload(folder: Path, repo_id: str, *, files: Iterable[str], private: bool) -> str:
    """Upload these files of a folder, making the repository if need be, in place of its model; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _asking(repo_id, otherwise=f"{folder} is complete: `hf upload {repo_id} {folder}` tries again"):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=sorted(files),
            delete_patterns=_of_models(api.list_repo_files(repo_id)),
            commit_message="Upload with orthrus convert",
        )
    return str(address)


def _of_models(files: Iterable[str]) -> list[str]:
    """Return the files that match `MODEL_FILES`, sorted; `*` stands for no slash."""
    return sorted(f for f in files if any(fnmatch(f, p) and f.count("/") == p.count("/") for p in MODEL_FILES))


@contextmanager
def _asking(repo_id: str, *, otherwise: str) -> Iterator[None]:
    """Say what the Hub's errors mean, and how things stand then."""
    from huggingface_hub import errors

    # The first is httpx's or httpx2's, whichever the Hub's client has: no network at all is one of those.
    refusals = (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError)  # type: ignore[attr-defined]
    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise OrthrusError(
            f"--push {repo_id}: a token of the Hugging Face Hub is required, found none: `hf auth login`, or set "
            f"HF_TOKEN; {otherwise}"
        ) from None
    except refusals as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise OrthrusError(
            f"--push {repo_id}: the Hub must be reachable and let you write there, found {type(error).__name__}: "
            f"{reason}; {otherwise}"
        ) from error
