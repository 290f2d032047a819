"""Block-diffusion decoding over a cache writes what decoding without one writes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.errors import CheckpointError, ConfigError, UnsupportedModel
from orthrus.peers import blocks
from orthrus.peers.blocks import BlocksConfig, Unmasking, write
from tests.families import tiny

MASK = 95


def naive(
    model: PreTrainedModel, config: BlocksConfig, how: Unmasking, prompt: list[int], most: int, eos: list[int]
) -> list[int]:
    """The decoder written out: every pass reads the whole text so far, under the mask that training has."""
    limit, text = len(prompt) + most, list(prompt)
    K = config.block_size or limit
    while len(text) < limit and not set(text[len(prompt) :]) & set(eos):
        stop = (len(text) // K + 1) * K
        known = len(text)
        text = text + [MASK] * (stop - known)
        while MASK in text[known:]:
            block = torch.arange(stop) // K
            allowed = block[:, None] >= block[None, :]
            mask = torch.zeros(stop, stop).masked_fill(~allowed, torch.finfo(torch.float32).min)
            logits = model(
                input_ids=torch.tensor([text]), position_ids=torch.arange(stop)[None], attention_mask=mask[None, None]
            ).logits[0]
            # A block's first token is predicted by the block before, which sees nothing of this one.
            said = logits.roll(1, 0) if config.shift else logits.clone()
            said[:, MASK] = torch.finfo(said.dtype).min
            probability, token = said.softmax(-1).max(-1)
            entropy = torch.distributions.Categorical(logits=said).entropy()
            sure = probability if how.order == "probability" else -entropy
            masked = [i for i in range(known, stop) if text[i] == MASK]
            if how.part is not None:
                start = stop - K
                first = min((i - start) // how.part for i in masked)
                masked = [i for i in masked if (i - start) // how.part == first]
            surest = sorted(masked, key=lambda i: -float(sure[i]))[: how.least]
            fixed = [i for i in masked if i in surest or (how.threshold and float(probability[i]) > how.threshold)]
            for i in fixed:
                text[i] = int(token[i])
            whole = text.index(MASK, known) if MASK in text[known:] else stop
            if set(text[known:whole]) & set(eos):
                text = text[:whole]
                break
    answer = text[len(prompt) : limit]
    ends = [i for i, token in enumerate(answer) if token in eos]
    return answer[: ends[0] + 1] if ends else answer


HOWS = {
    "threshold": Unmasking(threshold=0.05),
    "two a pass": Unmasking(threshold=None, least=2),
    "in parts": Unmasking(threshold=0.05, part=2),
    "by entropy": Unmasking(threshold=None, least=3, order="entropy"),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [4, 6, None])
def test_a_cache_of_whole_blocks_changes_nothing(size: int | None, shift: bool, how: str) -> None:
    """Prompts that end inside a block, at its end, and before the first; with ends of text and without."""
    model, config = tiny("qwen3"), BlocksConfig(block_size=size, shift=shift, mask=MASK)
    for prompt, most, eos in (([5, 6, 7, 8, 9], 13, [2]), ([30, 31, 32, 33], 9, []), ([8, 9], 10, list(range(40, 60)))):
        with torch.inference_mode():
            written = write(model, config, HOWS[how], prompt, max_new_tokens=most, eos=eos)
            assert written.token_ids == naive(model, config, HOWS[how], prompt, most, eos)
        assert MASK not in written.token_ids


def test_passes_are_counted_with_those_that_write_keys() -> None:
    """Blocks of four, two tokens a pass: one pass for the prompt, and of each block two, and one before the next."""
    model, config = tiny("qwen3"), BlocksConfig(block_size=4, shift=True, mask=MASK)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.zeros(0)))
    written = write(model, config, HOWS["two a pass"], [5, 6, 7, 8], max_new_tokens=12)
    assert (written.denoising, written.committing, len(seen)) == (6, 3, 9)
    assert written.forwards == 9


def test_a_higher_threshold_takes_more_passes() -> None:
    """None is passed by one token a pass."""
    model, config = tiny("qwen3"), BlocksConfig(block_size=8, shift=True, mask=MASK)
    passes = [
        write(model, config, Unmasking.parse(text), [5, 6], max_new_tokens=22).denoising
        for text in ("0.01", "0.05", "0.99", "1")
    ]
    assert passes == sorted(passes)
    assert passes[0] < passes[-2] == passes[-1] == 22


def test_unmasking_is_read_from_its_text() -> None:
    """Dream's order by entropy and Fast-dLLM v2's parts of a block too."""
    assert Unmasking.parse("0.9") == Unmasking()
    assert Unmasking.parse("1:entropy") == Unmasking(threshold=None, order="entropy")
    assert Unmasking.parse("0.95:8") == Unmasking(threshold=0.95, part=8)
    assert Unmasking.parse("2:entropy:4") == Unmasking(threshold=None, least=2, order="entropy", part=4)


def test_a_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    """With its tokens a block; anything else is refused, windows too."""
    config = BlocksConfig(block_size=4, shift=False, mask=MASK, backbone="some")
    blocks.save(tiny("qwen3"), config, tmp_path)
    model, again = blocks.load(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert again == config
    how = HOWS["threshold"]
    assert write(model, again, how, [5], max_new_tokens=9) == write(tiny("qwen3"), config, how, [5], max_new_tokens=9)
    with pytest.raises(CheckpointError, match=r"must hold blocks\.json, found none"):
        blocks.load(tmp_path / "none", dtype=torch.float32, device=torch.device("cpu"))
    for bad in ("[]", "{}", '{"block_size": "x", "shift": true, "mask": 1}'):
        (tmp_path / "blocks.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"blocks\.json must"):
            blocks.load(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    (tmp_path / "blocks.json").write_text('{"block_size": 4, "shift": true, "mask": 1}')
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="a whole model is required"):
        blocks.load(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="sliding_attention"):
        blocks.require_full_attention(tiny("gemma3_text"))
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        blocks.require_full_attention(tiny("qwen3_5_text"))


@pytest.mark.parametrize(
    "text", ["", "0", "0.0", "-1", "1.5", "all", "nan", "inf", "0.9:", "0.9:0", "0.9:8:8", "0.9:x"]
)
def test_what_says_nothing_of_unmasking_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a threshold between 0 and 1"):
        Unmasking.parse(text)
