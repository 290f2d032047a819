"""Block-diffusion language models: backbones whose weights were trained further to fill masked blocks.

Each token sees its whole block and all blocks before it. A block starts as masks, and each pass fixes its most probable
tokens; one more pass over the finished block writes its keys. SDAR (arXiv 2510.06303), Fast-dLLM v2 (arXiv 2509.26328)
and Dream (arXiv 2508.15487, one block for the whole text) are configurations of this model.

Shapes: K tokens of a block, V vocabulary, S cached positions.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from orthrus.checkpoints import files
from orthrus.decode.stop import until_end
from orthrus.errors import CheckpointError, ConfigError, UnsupportedModel
from orthrus.kernels import masks
from orthrus.model.cache import ScratchCache

CONFIG: Final = "blocks.json"
_UNMASKING: Final = re.compile(r"(?P<number>0?\.\d+|[1-9]\d*)(?P<entropy>:entropy)?(:(?P<part>[1-9]\d*))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksConfig:
    """Describe a block-diffusion language model; raises ConfigError where block_size or mask is out of range.

    Attributes:
        block_size: tokens of a block; None for one block, the whole text.
        shift: whether a position predicts the next token, as in the backbone, or the token at the position.
        backbone: name or path of the model that this one was trained from.
    """

    block_size: int | None
    shift: bool
    mask: int
    backbone: str | None = None

    def __post_init__(self) -> None:
        if (self.block_size is not None and self.block_size < 1) or self.mask < 0:
            raise ConfigError(
                f"block_size must be at least 1 and mask a token, found {self.block_size} and {self.mask}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmasking:
    """Choose the masked tokens that a pass fixes.

    Attributes:
        threshold: fix all tokens with a greater probability; None for none.
        least: fix at least this many.
        order: rank tokens by the greatest probability or the least entropy.
        part: fix a block in parts of this many tokens, from left to right; None for the whole block at once.
    """

    threshold: float | None = 0.9
    least: int = 1
    order: Literal["probability", "entropy"] = "probability"
    part: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Unmasking":
        """Read a threshold below 1 or a number of tokens per pass, then `:entropy` for that order, `:N` for parts.

        Raises ConfigError for anything else.
        """
        found = _UNMASKING.fullmatch(text)
        if found is None or not (number := float(found["number"])):
            raise ConfigError(
                "unmasking is a threshold between 0 and 1 or a number of tokens a pass, then :entropy for its order, "
                f":N for parts of N tokens, found {text!r}"
            )
        return cls(
            threshold=number if number < 1 else None,
            least=max(1, int(number)),
            order="entropy" if found["entropy"] else "probability",
            part=int(found["part"]) if found["part"] else None,
        )

    def choose(self, logits_KV: Tensor, masked_K: Tensor) -> Tensor:
        """Return which masked tokens to fix now, `[K]` boolean."""
        logp_KV = logits_KV.float().log_softmax(-1)
        best_K = logp_KV.max(-1).values
        sure_K = best_K if self.order == "probability" else (logp_KV.exp() * logp_KV).sum(-1)
        open_K = masked_K
        if self.part is not None:
            index_K = torch.arange(len(masked_K), device=masked_K.device) // self.part
            open_K = masked_K & (index_K == index_K[masked_K].min())
        chosen_K = torch.zeros_like(masked_K)
        surest = sure_K.masked_fill(~open_K, -torch.inf).topk(min(self.least, int(open_K.sum()))).indices
        chosen_K[surest] = True
        if self.threshold is not None:
            chosen_K |= open_K & (best_K.exp() > self.threshold)
        return chosen_K


class Written(NamedTuple):
    """An answer, and how many passes denoised blocks and how many wrote keys, the prompt's included."""

    token_ids: list[int]
    denoising: int
    committing: int

    @property
    def forwards(self) -> int:
        return self.denoising + self.committing


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    config: BlocksConfig,
    how: Unmasking,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos: Sequence[int] = (),
) -> Written:
    """Answer one prompt block by block, with a cache of the finished blocks.

    Tokens at the prompt's end that fill no whole block start the first block, unmasked.
    """
    limit = len(prompt) + max_new_tokens
    K = config.block_size or limit
    cache = ScratchCache(rows=1, capacity=-(-limit // K) * K, device=model.device)
    start = len(prompt) // K * K
    text, spent, kept = list(prompt), 0, 0
    before_V = None
    if start:
        before_V = _pass(model, cache, text[:start], 0, block=K)[-1]
        cache.commit(slice(0, 1), [start])
        kept += 1
    while True:
        block = text[start:] + [config.mask] * (start + K - len(text))
        open_from = len(text) - start
        spent += _fill(model, cache, config, how, block, open_from, start, before_V, eos)
        text = text[:start] + block
        answer = until_end(text[len(prompt) : limit], eos)
        if len(text) >= limit or (answer and answer[-1] in eos):
            return Written(answer, spent, kept)
        before_V = _pass(model, cache, block, start, block=K)[-1]
        cache.commit(slice(0, 1), [K])
        kept, start = kept + 1, start + K


def _fill(
    model: PreTrainedModel,
    cache: ScratchCache,
    config: BlocksConfig,
    how: Unmasking,
    block: list[int],
    open_from: int,
    start: int,
    before_V: Tensor | None,
    eos: Sequence[int],
) -> int:
    """Fix a block's masks in place, up to the end of the block or of the text; returns the number of passes."""
    passes = 0
    masked_K = torch.arange(len(block), device=model.device) >= open_from
    while bool(masked_K.any()):
        logits_KV = predictions(_pass(model, cache, block, start, block=len(block)), before_V, shift=config.shift)
        logits_KV[:, config.mask] = torch.finfo(logits_KV.dtype).min
        passes += 1
        chosen_K = how.choose(logits_KV, masked_K)
        masked_K = masked_K & ~chosen_K
        for index in chosen_K.nonzero()[:, 0].tolist():
            block[index] = int(logits_KV[index].argmax())
        whole = next((index for index, mask in enumerate(masked_K.tolist()) if mask), len(block))
        if any(token in eos for token in block[open_from:whole]):
            break
    return passes


def predictions(logits_KV: Tensor, before_V: Tensor | None, *, shift: bool) -> Tensor:
    """Return the logits of each token of a block, from those of its positions and of the position before it."""
    if not shift:
        return logits_KV.clone()
    first_V = torch.zeros_like(logits_KV[0]) if before_V is None else before_V  # a text's first token is given
    return torch.cat([first_V[None], logits_KV[:-1]])


def _pass(model: PreTrainedModel, cache: ScratchCache, tokens: Sequence[int], start: int, *, block: int) -> Tensor:
    """Run whole blocks, which see themselves and all before; returns logits `[Q, V]`. Their keys are scratch."""
    position_1Q = torch.arange(start, start + len(tokens), device=model.device)[None]
    end = start + len(tokens)
    cache.begin(slice(0, 1), position_1Q, end=end, start=start)
    seen_1QS = masks.up_to(position_1Q // block * block + block - 1, span=end)
    logits: Tensor = model(
        input_ids=torch.tensor([list(tokens)], device=model.device),
        position_ids=position_1Q,
        attention_mask=masks.additive(seen_1QS, model.dtype)[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits[0]


def require_full_attention(model: PreTrainedModel, what: str = "a block-diffusion model") -> None:
    """Raise UnsupportedModel for windows and recurrent layers, which `what` cannot have."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if kinds or (getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None)):
        held = ", ".join(sorted(kinds)) or "sliding windows"
        raise UnsupportedModel(f"{what} needs full attention in every layer, found {held} in {type(model).__name__}")


def save(model: PreTrainedModel, config: BlocksConfig, path: Path) -> None:
    """Write a model for `from_pretrained`, with its `BlocksConfig` beside it."""
    model.save_pretrained(path)
    (path / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load(path: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, BlocksConfig]:
    """Read what `save` wrote; raises CheckpointError for missing or damaged files, UnsupportedModel for windows."""
    values = files.read_object(path / CONFIG, missing="it is not a block-diffusion model")
    with files.described_by(path / CONFIG):
        config = BlocksConfig(**values)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: a whole model is required, found {error}: fetch or write it again") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if config.mask >= rows:
        raise CheckpointError(f"{path / CONFIG}: mask must be below {rows}, found {config.mask}")
    require_full_attention(model)
    return model.to(device).eval(), config
