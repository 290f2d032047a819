"""The correction between slots: nothing to begin with, kept in the adapter, gone with the view."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import orthrus
from orthrus.checkpoints import files
from orthrus.errors import CheckpointError, ConfigError, UnsupportedModel
from orthrus.model.attach import config_of
from orthrus.model.fingerprint import fingerprint, twin_tensors
from orthrus.model.markov import Markov, markov_of
from tests.families import VOCAB, perturb, tiny

RANK = 3


def corrected(rank: int = RANK, **fields: Any) -> PreTrainedModel:
    return orthrus.attach(tiny("qwen3"), orthrus.OrthrusConfig(block_size=6, markov_rank=rank, **fields))


def trained() -> PreTrainedModel:
    """A view and a correction that have moved."""
    model = corrected()
    perturb(model)
    correction = markov_of(model)
    assert correction is not None
    with torch.no_grad():
        correction.before_VR.normal_()
    return model


def test_it_starts_as_exact_zeros_and_draws_no_one_else_s_noise() -> None:
    """Every pair of tokens; both factors the same whatever was drawn before; the next random number is as without."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = Markov(VOCAB, RANK, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(torch.rand(1), expected)
    again = Markov(VOCAB, RANK, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(first.after_VR, again.after_VR)
    assert first.after_VR.std() > 0.9
    assert not first(torch.arange(VOCAB)).any()


def test_it_adds_a_row_of_a_matrix_of_low_rank() -> None:
    """Rows by the token before, columns by the token after; pairs are entries of the same matrix."""
    model = trained()
    correction = markov_of(model)
    assert correction is not None
    matrix_VV = correction.before_VR @ correction.after_VR.T
    assert int(torch.linalg.matrix_rank(matrix_VV)) == RANK
    token = torch.randint(VOCAB, (2, 5))
    torch.testing.assert_close(correction(token), matrix_VV[token])
    after = torch.randint(VOCAB, (2, 4))
    torch.testing.assert_close(correction.pairs(token, after), matrix_VV[token[:, :, None], after[:, None]])


def test_only_the_view_and_the_correction_are_trainable() -> None:
    """Both factors, beside the twin; the backbone stays frozen, and its fingerprint what it was."""
    model = corrected()
    movable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"markov.before_VR", "markov.after_VR"} == {name for name in movable if ".diffusion." not in name}
    assert movable == twin_tensors(model).keys()
    assert fingerprint(model) == fingerprint(corrected(0))


def test_detaching_leaves_the_plain_model() -> None:
    """Names and bits of a model that never had a view."""
    plain, model = tiny("qwen3").state_dict(), orthrus.detach(trained()).state_dict()
    assert plain.keys() == model.keys()
    assert all(torch.equal(plain[name], model[name]) for name in plain)


def test_the_adapter_carries_it(tmp_path: Path) -> None:
    """Rank in the configuration, both factors among the tensors; loaded onto another copy they are equal."""
    model = trained()
    orthrus.save(model, tmp_path)
    assert json.loads((tmp_path / "orthrus_config.json").read_text())["markov_rank"] == RANK
    assert {"markov.before_VR", "markov.after_VR"} <= load_file(tmp_path / "orthrus.safetensors").keys()
    other = orthrus.attach(tiny("qwen3"), files.read_config(tmp_path))
    files.load_adapter(other, tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())


def test_without_it_the_files_are_what_they_were(tmp_path: Path) -> None:
    """No key and no tensor of an option that is off."""
    orthrus.save(corrected(0), tmp_path)
    fields = {"block_size", "mask_token_id", "backbone", "revision", "fingerprint", "identity"}
    assert json.loads((tmp_path / "orthrus_config.json").read_text()).keys() == fields
    assert all(".diffusion." in name for name in load_file(tmp_path / "orthrus.safetensors"))
    assert markov_of(corrected(0)) is None


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "2 unexpected tensors: markov.after_VR, markov.before_VR"),
        (RANK + 1, rf"markov.after_VR is \[{VOCAB}, {RANK}\], the model's is \[{VOCAB}, {RANK + 1}\]"),
    ],
)
def test_another_rank_is_refused_by_name(rank: int, message: str, tmp_path: Path) -> None:
    """A correction has nowhere to go, or does not fit."""
    orthrus.save(trained(), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        files.load_adapter(corrected(rank), tmp_path)


def test_the_official_layout_carries_it(tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """Two tensors and a key beside the published ones; loaded back, view and correction are equal."""
    model = trained()
    orthrus.save(model, tmp_path, format="official")
    characters.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["markov_rank"] == RANK
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name for name in tensors if name.startswith("markov.")} == {"markov.before_VR", "markov.after_VR"}
    other, _ = orthrus.load(tmp_path)
    assert config_of(other).markov_rank == RANK
    expected = twin_tensors(model)
    assert twin_tensors(other).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twin_tensors(other).items())
    del tensors["markov.after_VR"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing tensors: markov.after_VR"):
        orthrus.load(tmp_path)


def test_the_official_layout_has_no_place_for_causal_blocks(tmp_path: Path) -> None:
    """The published code would draft otherwise than the view was trained to; nothing is written."""
    with pytest.raises(UnsupportedModel, match="has no place for block_attention, found 'causal': save an adapter"):
        orthrus.save(corrected(block_attention="causal"), tmp_path / "out", format="official")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"markov_rank": -1}, r"markov_rank must be an integer of at least 0 \(none\), found -1"),
        ({"markov_rank": True}, "markov_rank must be an integer of at least 0"),
        ({"block_attention": "causl"}, "block_attention must be one of bidirectional, causal, found 'causl'"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    """As for every other field of the configuration."""
    with pytest.raises(ConfigError, match=message):
        orthrus.OrthrusConfig.from_dict(values)


def test_the_configuration_says_departures_only() -> None:
    """Written out where they are, read back equal."""
    config = orthrus.OrthrusConfig(markov_rank=4, block_attention="causal")
    assert config.departures == {"markov_rank": 4, "block_attention": "causal"}
    assert orthrus.OrthrusConfig.from_dict(config.to_dict()) == config
    assert config_of(corrected(0)).departures == {}


def test_copies_of_the_factors_follow_their_data() -> None:
    """Adding to a factor's `.data` changes what it says of the next slot."""
    model = corrected(2)
    correction = markov_of(model)
    assert correction is not None
    logits, anchor = torch.zeros(1, 1, VOCAB), torch.tensor([3])
    for _ in range(2):
        correction.before_VR.data += 1
        _, shifted = correction.likeliest(logits, anchor)
        torch.testing.assert_close(shifted[:, 0], correction(anchor))


@pytest.mark.parametrize("shifted", [0, 3, VOCAB // 2, VOCAB // 2 + 1, VOCAB])
def test_tokens_that_are_not_shifted_are_compared_once(shifted: int) -> None:
    """Chains and logits are those of a product over all tokens, whichever half of them a correction knows.

    Logits are small integers, so equal ones abound.
    """
    generator = torch.Generator().manual_seed(shifted)
    correction = Markov(VOCAB, 2, device=torch.device("cpu"), dtype=torch.bfloat16).requires_grad_(False)
    known = torch.randperm(VOCAB, generator=generator)[:shifted]
    correction.before_VR.copy_(torch.randint(-2, 3, (VOCAB, 2), generator=generator))
    correction.after_VR.zero_()[known] = torch.randint(1, 3, (shifted, 2), generator=generator).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randint(-3, 4, (64, 5, VOCAB), generator=generator).to(dtype)
        anchor = torch.randint(0, VOCAB, (64,), generator=generator)
        kept: list[torch.Tensor] = []

        def choose(slot: torch.Tensor, _: int, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(slot)
            return slot.argmax(-1)

        tokens = correction.in_turn(logits, anchor, choose)
        found, scores = correction.likeliest(logits, anchor)
        assert torch.equal(found, tokens)
        assert torch.equal(scores, torch.stack(kept, 1))
        assert torch.equal(correction.best(logits, anchor), tokens)
