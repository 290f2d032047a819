"""EAGLE-3 leaves texts alone, and drafts in the engine what its training says, entry by entry."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.tree import Tree
from orthrus.errors import CheckpointError
from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig
from orthrus.peers import eagle3_model
from orthrus.peers.eagle3 import Eagle3Drafter, load
from orthrus.peers.eagle3_model import Eagle3, Eagle3Config
from orthrus.peers.serial import Reader
from orthrus.policy import steps
from orthrus.train import frozen
from orthrus.train.eagle3 import unrolled
from tests import reference
from tests.families import VOCAB, tiny

DRAFTS = 5
PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35], [9, 10, 11, 12, 13]]
COUNTS = [17, 7, 12, 1]
TEXTS = [reference.greedy_text(tiny("qwen3", num_hidden_layers=3), p, 24) for p in PROMPTS]


def backbone(family: str = "qwen3", *, layers: int = 3) -> PreTrainedModel:
    model = tiny(family, num_hidden_layers=layers)
    return attach(model, OrthrusConfig(layers=()), attn_implementation="orthrus")


def untrained(model: PreTrainedModel, **more: Any) -> Eagle3:
    """A drafter with weights wide enough that it is never sure of anything."""
    torch.manual_seed(3)
    drafter = Eagle3(Eagle3Config.of(model, drafts=DRAFTS, **more)).eval().requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return drafter


class Checked(Eagle3Drafter):
    """Compare all that is drafted with what training's pass over the whole text says."""

    checked = 0

    def __init__(self, model: PreTrainedModel, drafter: Eagle3) -> None:
        super().__init__(model, drafter)
        self.other = backbone()  # a pass of the engine's own would be read

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Reader]) -> Proposal:
        made = super().propose(passes, rows, anchor_B, drafts, states)
        for state, logits_MV in zip(states, made.logits_BMV, strict=True):
            path = logits_MV.argmax(-1).tolist()
            torch.testing.assert_close(logits_MV, self.said(state.row.text(), path), rtol=1e-3, atol=1e-3)
        self.checked += len(states)
        return made

    def grow(
        self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, nodes: int, states: Sequence[Reader]
    ) -> tuple[Tree, int]:
        tree, drew = super().grow(passes, rows, anchor_B, drafts, nodes, states)
        for b, state in enumerate(states):
            for node in range(1, tree.depth_BP.shape[1]):
                path, here = [], node
                while here:
                    path.insert(0, int(tree.token_BN[b, here - 1]))
                    here = int(tree.parent_BN[b, here - 1])
                assert len(path) == int(tree.depth_BP[b, node])
                logp_MV = self.said(state.row.text(), path).log_softmax(-1)
                expected = sum(float(logp_MV[i, token]) for i, token in enumerate(path)) - 1e-3 * len(path)
                assert float(tree.likely_BN[b, node - 1].log()) == pytest.approx(expected, abs=2e-3)
            self.checked += 1
        return tree, drew

    def said(self, text: list[int], path: list[int]) -> Tensor:
        """Logits of the drafts after a text, by the training-time test over text and drafts."""
        token_BT = torch.tensor([text + path])
        document_BT, position_BT = torch.zeros_like(token_BT), torch.arange(token_BT.shape[1])[None]
        tapped = frozen.read(self.other, token_BT, document_BT, position_BT, self.taps).tapped
        embedded = self.other.get_input_embeddings()(token_BT)
        steps_of = unrolled(self.drafter, embedded, self.drafter.fuse(tapped), document_BT, len(path))
        said = torch.stack([own.output_BTH[0, len(text) - 1] for own in steps_of])
        return self.drafter.logits(said[None], self._head, VOCAB)[0]


@pytest.mark.parametrize("plan", ["full", "fixed:3", "tree:12", "tree:3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_texts_are_the_backbone_s_and_drafts_are_training_s(plan: str, rows: int) -> None:
    """Chains and trees, ragged rows, prompts of one token, rows that end and trade places."""
    model = backbone()
    drafter = Checked(model, untrained(model))
    engine = Engine(model, rows=rows, capacity=96, plan=steps.parse(plan), drafter=drafter, prefill_slice=2)
    done = engine.finish(PROMPTS, [Options(max_new_tokens=count) for count in COUNTS])
    for row, text, count in zip(done, TEXTS, COUNTS, strict=True):
        assert row.token_ids == text[:count]
    assert drafter.checked >= 10
    drafts = {"fixed:3": 2}.get(plan, DRAFTS)
    passes = [row.stats.draft_passes.get("eagle3", 0) for row in done]
    assert passes == [drafts * row.stats.cycles for row in done]
    assert [row.stats.forwards for row in done] == [1 + row.stats.cycles for row in done]


@pytest.mark.parametrize("plan", ["full", "tree:12"])
def test_eight_ragged_rows_have_the_texts_that_plain_decoding_gives(plan: str) -> None:
    """Ten prompts of one to ten tokens and texts of different lengths, so that rows end and others begin."""
    model, plain = backbone(), tiny("qwen3", num_hidden_layers=3)
    prompts = [[7 + row, *range(20, 20 + row)] for row in range(10)]
    counts = [3 + 5 * row % 17 for row in range(10)]
    drafter = Eagle3Drafter(model, untrained(model))
    engine = Engine(model, rows=8, capacity=96, plan=steps.parse(plan), drafter=drafter)
    done = engine.finish(prompts, [Options(max_new_tokens=count) for count in counts])
    expected = [reference.greedy_text(plain, p, n) for p, n in zip(prompts, counts, strict=True)]
    assert [row.token_ids for row in done] == expected
    assert sum(row.stats.cycles for row in done) > 10


@pytest.mark.parametrize("plan", ["full", "tree:12"])
def test_a_second_turn_goes_on_from_the_first_one_s_keys(plan: str) -> None:
    """Keys of the drafter itself are made anew; the features beside them are the first turn's."""
    model = backbone()
    drafter = Checked(model, untrained(model))
    engine = Engine(model, rows=2, capacity=96, plan=steps.parse(plan), drafter=drafter)
    (first,) = engine.finish(PROMPTS[:1], Options(max_new_tokens=9))
    longer = [*PROMPTS[0], *first.token_ids, 40, 41]
    other = [*PROMPTS[0], 50, 51]
    rows = engine.finish([longer, other], Options(max_new_tokens=9))
    assert rows[0].cached > 0
    plain = tiny("qwen3", num_hidden_layers=3)
    assert [row.token_ids for row in rows] == [reference.greedy_text(plain, p, 9) for p in (longer, other)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "qwen3_5_text"])
def test_other_families_are_drafted_for_as_well(family: str) -> None:
    """Windows and scaled embeddings are the backbone's own affair."""
    model = attach(tiny(family), OrthrusConfig(layers=()), attn_implementation="orthrus")
    engine = Engine(
        model, rows=2, capacity=96, plan=steps.parse("full"), drafter=Eagle3Drafter(model, untrained(model))
    )
    plain = tiny(family)
    for row, prompt in zip(engine.finish(PROMPTS[:2], Options(max_new_tokens=9)), PROMPTS, strict=False):
        assert row.token_ids == reference.greedy_text(plain, prompt, 9)


def test_a_drafter_is_read_as_it_was_written(tmp_path: Path) -> None:
    """In `speculators`' layout, and in that of EAGLE's authors, whose vocabulary may be a part."""
    model = backbone()
    drafter = untrained(model, norm_before_residual=True)
    eagle3_model.save(drafter, model, tmp_path)
    again = load(str(tmp_path), model)
    assert again.proposals == DRAFTS
    assert again.drafter.config.taps == drafter.config.taps
    assert again.drafter.config.norm_before_residual
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(again.drafter.state_dict()[name], tensor), name

    tensors = load_file(tmp_path / "model.safetensors")
    assert {"embed_tokens.weight", "lm_head.weight", "fc.weight", "norm.weight"} <= tensors.keys()
    known = torch.tensor([3, 5, 9, 40])
    tensors["lm_head.weight"], tensors["d2t"] = tensors["lm_head.weight"][known], known - torch.arange(4)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool)
    theirs = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    flat = values["transformer_layer_config"] | {"draft_vocab_size": 4, "architectures": ["LlamaForCausalLMEagle3"]}
    (tmp_path / "config.json").write_text(json.dumps(flat | {"norm_before_residual": True}))
    part = load(str(tmp_path), model)
    said = torch.randn(1, 2, 48)
    whole, own = (one.logits(said, *eagle3_model.head_of(model)) for one in (drafter, part.drafter))
    torch.testing.assert_close(own[..., known], whole[..., known])
    assert set(own.argmax(-1).flatten().tolist()) <= set(known.tolist())


def test_what_is_no_drafter_of_this_backbone_is_refused(tmp_path: Path) -> None:
    """No files; tensors of another shape."""
    model = backbone()
    with pytest.raises(CheckpointError, match=r"must hold config\.json, found none: it is not an EAGLE-3 drafter"):
        load(str(tmp_path), model)
    eagle3_model.save(untrained(model), model, tmp_path)
    other = attach(tiny("qwen3", hidden_size=24), OrthrusConfig(layers=()), attn_implementation="orthrus")
    with pytest.raises(CheckpointError):
        load(str(tmp_path), other)


@pytest.mark.parametrize("content", ["[]", "{", '{"transformer_layer_config": 3}', '{"hidden_size": "wide"}'])
def test_a_configuration_that_says_nothing_is_refused_by_its_file(content: str, tmp_path: Path) -> None:
    """Weights that are cut short as well."""
    model = backbone()
    eagle3_model.save(untrained(model), model, tmp_path)
    described = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(str(tmp_path), model)
    (tmp_path / "config.json").write_text(described)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load(str(tmp_path), model)
