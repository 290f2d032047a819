"""DFlash, DSpark and JetSpec: texts stay the backbone's, and drafts are those of one pass over the whole text."""

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.checkpoints.drafters import load_drafter
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes
from orthrus.errors import CheckpointError, ConfigError
from orthrus.kernels import masks
from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig
from orthrus.peers import dflash, dflash_files
from orthrus.peers.dflash import DFlash, DFlashConfig
from orthrus.peers.dflash_drafter import DFlashDrafter
from orthrus.policy import steps
from tests import reference
from tests.families import tiny

PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35], [9, 10, 11, 12, 13], [30, 31, 32, 33, 34, 35, 36]]
COUNTS = [23, 7, 16, 1, 11]
TEXTS = {tuple(p): reference.greedy_text(tiny("qwen3"), p, 30) for p in PROMPTS}
VARIANTS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dspark": {"shift": True, "markov_rank": 3},
    "jetspec": {"causal": True, "sliding_causal": True},
}


def backbone(family: str = "qwen3") -> PreTrainedModel:
    """A model that has no view: no layer has a twin."""
    return attach(tiny(family), OrthrusConfig(layers=()), attn_implementation="orthrus")


def drafter(model: PreTrainedModel, *, layers: int = 2, windowed: bool = False, **more: Any) -> DFlash:
    """An untrained drafter, moved at random."""
    torch.manual_seed(0)
    config = DFlashConfig.of(model, layers=layers, block_size=6, mask_token_id=95, **more)
    if windowed:
        config.shape.layer_types = ["sliding_attention", "full_attention"][:layers]
        config.shape.sliding_window = 5
    own = DFlash(config)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return own


class Checked(DFlashDrafter):
    """Is made right two times in three, and compares each proposal with a pass over the whole text, without a cache."""

    def __init__(self, model: PreTrainedModel, own: DFlash) -> None:
        super().__init__(model, own)
        self.plain = tiny("qwen3")
        self.engine: Engine | None = None
        self.checked = 0

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Tensor:
        logits_BMV = super().propose(passes, rows, anchor_B, drafts, states)
        assert self.engine is not None
        for b, row in enumerate(self.engine.live[rows]):
            text = row.text()
            torch.testing.assert_close(logits_BMV[b], self.whole(text, drafts), rtol=1e-3, atol=1e-4)
            self.checked += 1
            after = TEXTS[tuple(row.prompt_ids)][len(row.token_ids) :]
            for slot, token in enumerate(after[:drafts]):
                if (row.prompt_ids[0] + len(row.token_ids) + slot) % 3:
                    logits_BMV[b, slot, token] += 100
        return logits_BMV

    def whole(self, text: list[int], drafts: int) -> Tensor:
        """Return the logits of a block behind a text, `[M, V]`, as the method is written down."""
        own, config = self.drafter, self.drafter.config
        states: dict[int, Tensor] = {}
        for tap in {*config.taps} if text[:-1] else ():
            layer = self.plain.base_model.layers[tap]
            hook = layer.register_forward_hook(lambda _, __, out, tap=tap: states.__setitem__(tap, out))
            self.plain(input_ids=torch.tensor([text[:-1]]))
            hook.remove()
        T, K = len(text) - 1, drafts + (not config.shift)
        nothing = torch.empty(1, 0, 48)
        context = torch.cat([states.get(tap, nothing) for tap in config.taps], dim=-1)
        tokens = torch.tensor([[text[-1]] + [config.mask_token_id] * (K - 1)])
        position = torch.arange(T + K)

        def seen(causal: bool) -> masks.LayerMasks:
            allowed = torch.ones(1, K, T + K, dtype=torch.bool)
            return masks.layer_masks(
                allowed.tril(T) if causal else allowed,
                query_position_BQ=position[None, T:],
                key_position_BS=position[None],
                windows=own.windows,
                dtype=torch.float32,
            )

        embedded = torch.nn.functional.embedding(tokens, self.plain.get_input_embeddings().weight)
        hidden = own(embedded, context, position[None], seen(config.causal), seen(config.sliding_causal))
        logits: Tensor = self.plain.lm_head(hidden)[0]
        return logits[K - drafts :]


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("plan", ["full", "fixed:4", "tree:9"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_are_those_of_a_pass_over_the_whole_text(variant: str, plan: str, windowed: bool) -> None:
    """Whatever was rejected, moved along a tree, traded places or began with keys of another prompt.

    And texts are plain decoding's.
    """
    model = backbone()
    checked = Checked(model, drafter(model, windowed=windowed, **VARIANTS[variant]))
    engine = Engine(model, rows=3, capacity=96, plan=steps.parse(plan), drafter=checked, prefill_slice=2)
    checked.engine = engine
    rows = engine.finish(PROMPTS, [Options(max_new_tokens=count) for count in COUNTS])
    for row in rows:
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][: row.options.max_new_tokens]
    assert checked.checked > 10
    assert any(row.stats.accepted for row in rows)
    assert rows[-1].cached > 0


# ---------------------------------------------------------------- on disk


def saved(folder: Path, own: DFlash) -> Path:
    folder.mkdir(parents=True)
    dflash_files.save(own, folder)
    return folder


def same(one: DFlash, other: DFlash) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_drafter_is_read_as_it_was_written(variant: str, tmp_path: Path) -> None:
    """Every tensor and every field, under the names that z-lab's code reads."""
    model = backbone()
    own = drafter(model, taps=(0, 1), backbone="some/backbone", **VARIANTS[variant])
    folder = saved(tmp_path / "own", own)
    values, names = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors").keys()
    assert values["architectures"] == ["DFlashDraftModel"]
    assert values["dflash_config"]["target_layer_ids"] == [0, 1]
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.k_norm.weight"} <= names
    again = dflash_files.read(folder)
    same(again, own)
    assert again.config.to_dict() == own.config.to_dict()
    loaded = load_drafter(f"dflash:{folder}", model)
    assert (loaded.proposals, list(loaded.taps)) == (6 if variant == "dspark" else 5, [0, 1])
    assert (loaded.markov is None) == (variant != "dspark")


def theirs(own: DFlash, **fields: object) -> dict[str, Any]:
    """A configuration of another's layout, about this drafter's layers."""
    layer = {**own.config.shape.to_dict(), "model_type": "qwen3"}
    nested = {"transformer_layer_config": layer} if "speculators_model_type" in fields else layer
    return {**nested, "block_size": 6, "mask_token_id": 95, **fields}


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "z-lab": ("dflash", {"dflash_config": {"mask_token_id": 95, "target_layer_ids": [0, 1]}}),
    "jetspec": ("jetspec", {"dflash_config": {"target_layer_ids": [0, 1], "causal_head": True}}),
    "speculators dflash": ("dflash", {"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": [1, 2]}),
    "speculators dspark": (
        "dspark",
        {"speculators_model_type": "dspark", "aux_hidden_state_layer_ids": [1, 2], "markov_rank": 3},
    ),
    "deepspec": (
        "dspark",
        {"architectures": ["Qwen3DSparkModel"], "target_layer_ids": [0, 1], "num_anchors": 8, "markov_rank": 3},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read(layout: str, tmp_path: Path) -> None:
    """Embeddings and heads of the backbone are passed over; a confidence head is, with a warning."""
    variant, fields = LAYOUTS[layout]
    own = drafter(backbone(), taps=(0, 1), **VARIANTS[variant])
    folder = saved(tmp_path / "own", own)
    (folder / "config.json").write_text(json.dumps(theirs(own, **fields)))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"embed_tokens.weight": torch.zeros(96, 48), "lm_head.weight": torch.zeros(96, 48)}
    tensors["confidence_head.proj.weight"] = torch.zeros(1, 51)
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"confidence head is not used \(confidence_head\.proj\.weight\)"):
        again = dflash_files.read(folder)
    same(again, own)
    for name in ("taps", "block_size", "mask_token_id", "shift", "causal", "markov_rank"):
        assert getattr(again.config, name) == getattr(own.config, name)


@pytest.mark.parametrize(("layers", "taps"), [(1, [32]), (2, [1, 61]), (4, [1, 21, 41, 61])])
def test_layers_that_are_not_named_are_the_first_publications(layers: int, taps: list[int]) -> None:
    """One in the middle, or evenly from the second to the third from the end."""
    values = {"num_hidden_layers": layers, "num_target_layers": 64, "block_size": 16, "mask_token_id": 1}
    assert list(DFlashConfig.from_dict(values, where="here").taps) == taps


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"mask_token_id": None}, {}, "mask_token_id and block_size of a DFlash drafter are required"),
        ({"projector_type": "domino"}, {}, "projector_type must be 'dflash', found 'domino'"),
        ({"projector_type": "domino", "markov_rank": 0}, {}, "projector_type must be 'dflash', found 'domino'"),
        ({"block_size": "long"}, {}, "config.json must describe a model, found ValueError"),
        ({"target_layer_ids": 3}, {}, "config.json must describe a model, found TypeError"),
        ({}, {"d2t": torch.tensor([99999])}, "d2t must name tokens below"),
        ({"selector_rank": 256}, {}, "selector_rank is of a drafter that is not served, found 256"),
        ({"markov_rank": 3, "markov_head_type": "rnn"}, {}, "markov_head_type must be 'vanilla', found 'rnn'"),
        ({}, {"d2t": torch.zeros(5)}, "Missing key.*head.weight"),
        ({}, {"layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}, "Unexpected key.*layers.7"),
        ({"markov_rank": 3}, {}, "Missing key.*before_VR"),
    ],
)
def test_drafters_that_are_not_served_are_refused(
    fields: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    """By name, before anything is decoded."""
    folder = saved(tmp_path / "own", drafter(backbone(), taps=(0, 1)))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "dflash_config": {**values["dflash_config"], **fields}}))
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        dflash_files.read(folder)


def test_a_drafter_of_a_part_of_the_vocabulary_drafts_no_other_token(tmp_path: Path) -> None:
    """As `speculators` writes it: a head for some tokens, how far each is from its place, and a correction of these.

    Every third token can be drafted; texts hold others too, and stay plain.
    """
    model = backbone()
    own = drafter(model, taps=(0, 1), **VARIANTS["dspark"])
    folder, token_D = saved(tmp_path / "own", own), torch.arange(0, 96, 3)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"lm_head.weight": model.lm_head.weight[token_D], "d2t": token_D - torch.arange(32)}
    tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][token_D].clone()
    save_file(tensors, folder / "model.safetensors")
    part = load_drafter(f"dflash:{folder}", model)
    whole = DFlashDrafter(model, own)
    for plan in ("full", "tree:9"):
        drafts: list[Tensor] = []
        engine = Engine(model, rows=2, capacity=96, plan=steps.parse(plan), drafter=part)
        propose = part.propose

        def spy(
            passes: Passes,
            rows: slice,
            anchor_B: Tensor,
            *more: Any,
            propose: Any = propose,
            drafts: list[Tensor] = drafts,
        ) -> Tensor:
            logits_BMV: Tensor = propose(passes, rows, anchor_B, *more)
            expected = whole.propose(passes, rows, anchor_B, *more)
            torch.testing.assert_close(logits_BMV[..., token_D], expected[..., token_D])
            drafts.append(logits_BMV)
            return logits_BMV

        part.propose = spy
        for row in engine.finish(PROMPTS[:2], Options(max_new_tokens=12)):
            assert row.token_ids == TEXTS[tuple(row.prompt_ids)][:12]
        part.propose = propose
        assert all(int(token) % 3 == 0 for logits in drafts for token in logits.argmax(-1).flatten())


@pytest.mark.parametrize("plan", ["full", "tree:9"])
def test_a_second_turn_goes_on_from_the_first_one_s_keys(plan: str) -> None:
    """One engine for eight rows: what a first turn left is read again by nobody, and both turns are plain."""
    model = backbone()
    checked = Checked(model, drafter(model, taps=(0, 1)))
    engine = checked.engine = Engine(model, rows=8, capacity=96, plan=steps.parse(plan), drafter=checked)
    (first,) = engine.finish(PROMPTS[:1], Options(max_new_tokens=9))
    turns = [[*PROMPTS[0], *first.token_ids, 40, 41], [*PROMPTS[0], 50, 51]]
    for turn in turns:
        TEXTS[tuple(turn)] = reference.greedy_text(tiny("qwen3"), turn, 30)
    for row in engine.finish(turns, Options(max_new_tokens=9)):
        assert row.cached > 0
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][:9]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3_moe", "qwen3_5_text", "olmo_hybrid"])
def test_other_families_are_drafted_for_as_well(family: str) -> None:
    """Windows, scaled embeddings, soft caps and recurrent states are the backbone's own affair. So under `auto`."""
    model, plain = backbone(family), tiny(family)
    own = DFlashDrafter(model, drafter(model))
    auto = Engine(model, rows=2, capacity=96, plan=steps.parse("auto"), drafter=own)
    for row, prompt in zip(auto.finish(PROMPTS[:2], Options(max_new_tokens=9)), PROMPTS, strict=False):
        assert row.token_ids == reference.greedy_text(plain, prompt, 9)
    engine = Engine(model, rows=2, capacity=96, plan=steps.parse("full"), drafter=own)
    for row, prompt in zip(engine.finish(PROMPTS[:2], Options(max_new_tokens=9)), PROMPTS, strict=False):
        assert row.token_ids == reference.greedy_text(plain, prompt, 9)


@pytest.mark.slow
def test_the_same_tokens_at_any_precision() -> None:
    """In bfloat16 with `exact="token"`: passes of fixed shapes, fillers beside the tokens that the drafter reads."""
    model = backbone().to(torch.bfloat16)
    own, options = DFlashDrafter(model, drafter(model)), Options(max_new_tokens=12)
    texts = []
    for plan in ("ar", "full"):
        engine = Engine(model, rows=2, capacity=96, plan=steps.parse(plan), drafter=own, exact="token")
        assert plan == "ar" or engine.drafter is own
        texts.append([row.token_ids for row in engine.finish(PROMPTS[:3], options)])
    assert texts[0] == texts[1]


def test_sampled_texts_are_plain_sampling_s_under_trees() -> None:
    """With the same noise: trees of a drafter decide nothing but how fast it goes."""
    model = backbone()
    options = Options.of(None, max_new_tokens=12, do_sample=True, temperature=0.7, seed=3)
    texts = []
    for plan, own in (("tree:9", DFlashDrafter(model, drafter(model, **VARIANTS["dspark"]))), ("tree:9", None)):
        engine = Engine(model, rows=2, capacity=96, plan=steps.parse(plan), drafter=own)
        texts.append([row.token_ids for row in engine.finish(PROMPTS[:2], options)])
    assert texts[0] == texts[1]


def test_a_transformers_without_the_class_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On use and by its version, not when the package is imported."""
    name = "transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"transformers 5\.19 or newer"):
        runpy.run_path(str(dflash.__file__))


def test_a_drafter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    """One that reads layers or sizes that there are not."""
    folder = saved(tmp_path / "own", drafter(backbone(), taps=(0, 1)))
    other = attach(tiny("qwen3", num_hidden_layers=1), OrthrusConfig(layers=()))
    with pytest.raises(ConfigError, match=r"reads layers \[0, 1\] of size 48 .*found 1 layers of size 48"):
        load_drafter(f"dflash:{folder}", other)
    few = attach(tiny("qwen3", vocab_size=8), OrthrusConfig(layers=()))
    with pytest.raises(ConfigError, match="needs a backbone of as many, found 8"):
        load_drafter(f"dflash:{folder}", few)
    with pytest.raises(ConfigError, match="taps must be among the backbone's 2 layers"):
        drafter(backbone(), taps=(0, 2))
