"""The model card that goes with a view on disk: what it is, what it belongs to, how to load it, how it was trained."""

import re
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.checkpoints.files import Format
from orthrus.model.config import OrthrusConfig
from orthrus.model.fingerprint import backbone_tensors, twin_tensors


def model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: OrthrusConfig,
    *,
    format: Format,
    address: str,
    with_backbone: bool = False,
    licence: str | None = None,
    training: str = "",
) -> str:
    """Write the card of a view in markdown, from `card.md`.

    `address` is what others load it by: a directory or a Hub id; its last part is the title. `licence` is an identifier
    that the Hub knows, None leaves it to be filled in; `training` are tables in markdown.
    """
    head = ModelCardData(
        library_name="orthrus-lm",
        pipeline_tag="text-generation",
        license=licence,
        base_model=config.backbone if _on_the_hub(config.backbone) else None,
        tags=[
            *(["custom_generate"] if format == "adapter" else []),
            "orthrus",
            "speculative-decoding",
            "diffusion",
            str(model.config.model_type),
        ],
    )
    card = ModelCard.from_template(
        head,
        template_str=files("orthrus.checkpoints").joinpath("card.md").read_text(encoding="utf-8"),
        title=Path(address).name,
        called=f"`{config.backbone}`" if config.backbone else f"a {model.config.model_type} model",
        format=format,
        backbone=config.backbone,
        revision=config.revision,
        with_backbone=with_backbone,
        family=model.config.model_type,
        backbone_parameters=sum(parameter.numel() for parameter in backbone_tensors(model).values()),
        view_parameters=sum(tensor.numel() for tensor in twin_tensors(model).values()),
        block_size=config.block_size,
        mask=config.mask,
        mask_token=tokenizer.convert_ids_to_tokens(config.mask) if config.mask < len(tokenizer) else None,
        precision=str(model.dtype).removeprefix("torch."),
        address=address,
        licence=licence,
        training=training,
    )
    return f"{card.content}\n"


def _on_the_hub(name: str | None) -> bool:
    """Tell whether the Hub can know a backbone by this name: it is no directory here."""
    return name is not None and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def licence_of(card: str) -> str | None:
    """Return the licence that a card's head states; None where it states none."""
    head = card.split("---", 2)[1] if card.startswith("---") and card.count("---") > 1 else ""
    line = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", head, re.MULTILINE)
    return line[1] if line else None


def tables_of(card: str) -> str:
    """Return the tables of a card, such as a run's facts and last figures in its `RUN.md`, and nothing else of it."""
    return "\n\n".join(block for block in card.split("\n\n") if block.startswith("|"))
