"""The model card that goes with a view on disk: what it is, what it belongs to, how to load it, how it was trained."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.checkpoints.files import Format
from orthrus.model.config import OrthrusConfig
from orthrus.model.fingerprint import backbone_tensors, twin_tensors

_PAPER = "[arXiv 2605.12825](https://arxiv.org/abs/2605.12825)"
_LAYOUTS: dict[Format, str] = {
    "adapter": "adapter: the view's tensors (`orthrus.safetensors`) and `orthrus_config.json`",
    "official": "official: backbone and view in one model, as the published Orthrus code names its tensors",
}
_LOAD = """With the Python package `orthrus-lm`:

```python
import orthrus

model, tokenizer = orthrus.load("{address}")
print(orthrus.generate(model, tokenizer, "…", max_new_tokens=128)[0].text)
```"""
_CUSTOM = """With transformers, where `orthrus-lm` is installed, on the backbone as it is:

```python
text_ids = model.generate(**inputs, custom_generate="{address}", trust_remote_code=True)
```

The first call gives the model the view. Streamers work, stop strings need `tokenizer=`; an option that is \
not honoured is refused by name."""
_OFFICIAL = """With transformers, where `orthrus-lm` is installed, `model.generate` drafts:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{address}", trust_remote_code=True)
```

The published Orthrus code reads this layout too, with its own `modeling_orthrus.py` in place of the one here. So does \
vLLM, with the plugin that comes with `orthrus-lm[vllm]`:

```
vllm serve {address} \\
  --speculative-config '{{"method": "draft_model", "model": "{address}", "num_speculative_tokens": {drafts}}}'
```"""


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
    """Write the card of a view in markdown.

    Args:
        model: the dual-view model that is saved.
        tokenizer: its tokenizer.
        config: the view's configuration, naming the backbone where that is known.
        format: the layout on disk.
        address: what others load it by: a directory or a Hub id; its last part is the title.
        with_backbone: whether the backbone lies beside an adapter.
        licence: an identifier that the Hub knows; None leaves it to be filled in.
        training: tables of facts about the training, in markdown.
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
    called = f"`{config.backbone}`" if config.backbone else f"a {model.config.model_type} model"
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {Path(address).name}",
        f"An Orthrus diffusion view ({_PAPER}) of {called}: it drafts several tokens per step, and the untouched "
        "backbone keeps those it would have written itself.",
        _table(_facts(model, tokenizer, config, format, with_backbone=with_backbone)),
        "## Load",
        _LOAD.format(address=address),
    ]
    if format == "official" and model.config.model_type == "qwen3":
        parts.append(_OFFICIAL.format(address=address, drafts=config.block_size - 1))
    elif format == "adapter":
        parts.append(_CUSTOM.format(address=address))
    if training:
        parts += ["## Training", training]
    stated = licence or (
        "To be filled in, here and as `license:` at the head of this file: see those of the backbone and of what the "
        "view was trained on."
    )
    return "\n\n".join([*parts, "## Licence", stated]) + "\n"


def licence_of(card: str) -> str | None:
    """Return the licence that a card's head states; None where it states none."""
    head = card.split("---", 2)[1] if card.startswith("---") and card.count("---") > 1 else ""
    line = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", head, re.MULTILINE)
    return line[1] if line else None


def tables_of(card: str) -> str:
    """Return the tables of a card, such as a run's facts and last figures in its `RUN.md`, and nothing else of it."""
    return "\n\n".join(block for block in card.split("\n\n") if block.startswith("|"))


def _facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: OrthrusConfig,
    format: Format,
    *,
    with_backbone: bool,
) -> dict[str, str]:
    backbone = f"`{config.backbone}`" if config.backbone else "not named"
    if config.revision:
        backbone += f", revision `{config.revision}`"
    if with_backbone:
        backbone += ", beside the view"
    view = sum(tensor.numel() for tensor in twin_tensors(model).values())
    whole = sum(parameter.numel() for parameter in backbone_tensors(model).values())
    mask = tokenizer.convert_ids_to_tokens(config.mask) if config.mask < len(tokenizer) else None
    return {
        "Layout": _LAYOUTS[format],
        "Backbone": f"{backbone}; {model.config.model_type}, {whole:,} parameters",
        "View": f"{view:,} parameters",
        "Block size": f"{config.block_size}: an anchor and up to {config.block_size - 1} drafts",
        "Mask token": f"{config.mask}" + (f" (`{_escaped(mask)}`)" if mask else " (a spare row of the embedding)"),
        "Precision": str(model.dtype).removeprefix("torch."),
    }


def _escaped(text: str) -> str:
    """Keep a cell in one piece."""
    return text.replace("|", "\\|")


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _on_the_hub(name: str | None) -> bool:
    """Whether a backbone's name can be one that the Hub knows, and is no directory here."""
    return name is not None and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()
