"""Hugging Face's own decoding, on the untouched backbone and the very same weights."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from orthrus.bench.race import Answer, Decoder
from orthrus.decode.stop import until_end
from orthrus.model.attach import detach

LOOKUP_TOKENS = 10  # transformers' documentation of prompt lookup uses as many


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the backbone of a dual-view model as Hugging Face would load it; weights are shared, not copied.

    Attention is transformers' default for it (scaled dot product attention).
    """
    tensors = [*model.parameters(), *model.buffers()]
    backbone = detach(copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}))
    backbone.requires_grad_(False)  # its parameters are the model's own
    backbone.set_attn_implementation("sdpa")
    backbone.generation_config = GenerationConfig()
    return backbone


def settings(mode: str, eos_token_id: Sequence[int], max_new_tokens: int) -> GenerationConfig:
    """Return greedy decoding: dynamic cache (`hf`), static one (`hf-static`), prompt lookup, DFlash."""
    eos = list(eos_token_id) or None
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos[0] if eos else 0,
        cache_implementation="static" if mode == "hf-static" else None,
        prompt_lookup_num_tokens=LOOKUP_TOKENS if mode == "hf-lookup" else None,
        speculation_type="dflash" if mode == "hf-dflash" else None,
    )


@torch.inference_mode()
def generate(
    backbone: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, **more: Any
) -> list[list[int]]:
    """Answer a batch of prompts, padded on the left; returns each answer's tokens up to its end."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = [[config.pad_token_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    seen = [[0] * pad + [1] * (longest - pad) for pad in pads]
    out = backbone.generate(
        input_ids=torch.tensor(ids, device=backbone.device),
        attention_mask=torch.tensor(seen, device=backbone.device),
        generation_config=config,
        **more,
    )
    rows: list[list[int]] = out[:, longest:].tolist()
    return [until_end(row, config.eos_token_id or []) for row in rows]


def decoder(backbone: PreTrainedModel, mode: str, eos_token_id: Sequence[int], **more: Any) -> Decoder:
    """Return a decoder in one of the modes of `settings`; `more` are transformers' own arguments."""

    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        config = settings(mode, eos_token_id, max_new_tokens)
        if mode in ("hf", "hf-static"):
            # One pass a token; a hook would stand in the way of a compiled forward.
            return [Answer.counted(tokens, len(tokens)) for tokens in generate(backbone, prompts, config)]
        passes: list[None] = []
        with backbone.register_forward_pre_hook(lambda *_: passes.append(None)):
            written = generate(backbone, prompts, config, **more)
        return [Answer.counted(tokens, len(passes)) for tokens in written]

    return decode
