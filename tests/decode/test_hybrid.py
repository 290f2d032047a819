"""Backbones that are mostly of the gated delta rule: every plan writes what `generate` does, in float32."""

import random
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import orthrus
from orthrus.decode import exact, prefixes
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.decode.rows import Row
from orthrus.errors import DecodingError, UnsupportedModel
from orthrus.model.attach import duals
from orthrus.model.mixer import DualMixer
from orthrus.model.snapshots import MOST
from orthrus.policy import steps
from orthrus.policy.steps import Step
from tests.decode.drive import BLOCK, Double, configure, decode, dual, engine_of, engine_with, scripted
from tests.families import HYBRID, tiny

PROMPTS = [[5, 6, 7], [9], [*range(30, 69)], [3, 4] * 9, [50, 51, 52, 53] * 3]
COUNTS = [20, 9, 14, 1, 20]
ASKED = [Options(max_new_tokens=count) for count in COUNTS]
FAMILY = "qwen3_5_text"
PLANS = ("ar", "full", "fixed:3", "tree:12", "onepass", "onepass:2", "onepass:2:10", "lookup", "auto")


@cache
def continued(prompt: tuple[int, ...], count: int, family: str = FAMILY) -> list[int]:
    """What transformers' `generate` says after a prompt, on a model that never had a view."""
    out = tiny(family).generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def generated(family: str = FAMILY) -> list[list[int]]:
    return [continued(tuple(prompt), count, family) for prompt, count in zip(PROMPTS, COUNTS, strict=True)]


MODEL = cache(dual)


def engine(plan: str, *, family: str = FAMILY, rows: int = 3, **more: Any) -> Engine:
    return Engine(MODEL(family), rows=rows, capacity=200, plan=steps.parse(plan), **more)


def texts(made: Engine) -> list[list[int]]:
    return [row.token_ids for row in decode(made, PROMPTS, ASKED)]


@pytest.mark.parametrize("family", HYBRID)
def test_a_view_leaves_the_backbone_as_it_is_bit_for_bit(family: str) -> None:
    model, ids = tiny(family), torch.arange(3, 20)[None]
    names, before = set(model.state_dict()), model(ids).logits
    orthrus.attach(model, orthrus.OrthrusConfig(block_size=BLOCK))
    assert [isinstance(one, DualMixer) for one in duals(model)] == [True, True, True, False]
    assert torch.equal(model(ids).logits, before)
    assert names < set(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.state_dict() if ".diffusion." in name}
    orthrus.detach(model)
    assert set(model.state_dict()) == names
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_writes_what_generate_does(plan: str) -> None:
    """Five prompts of 1 to 39 tokens over three rows, and one by one."""
    assert texts(engine(plan)) == generated()
    assert texts(engine(plan, rows=1, prefill_chunk=5)) == generated()


@pytest.mark.parametrize("plan", ["ar", "onepass:2", "auto"])
def test_rows_change_places_between_a_prompt_s_pass_and_its_token(plan: str) -> None:
    """A prompt of one token begins before those that joined ahead of it, whose last pass then finds its place taken."""
    made = engine(plan, rows=4, prefill_slice=8)
    prompts = [PROMPTS[0], [*range(30, 50)], [*range(40, 60)], PROMPTS[1]]
    ids = [made.add(prompts[0], Options(max_new_tokens=20))]
    made.step()
    ids += [made.add(prompt, Options(max_new_tokens=6)) for prompt in prompts[1:]]
    done = {progress.row.id: progress.row.token_ids for progress in made.run()}
    counts = (20, 6, 6, 6)
    assert [done[id] for id in ids] == [continued(tuple(p), n) for p, n in zip(prompts, counts, strict=True)]


OTHERS = [family for family in HYBRID if family != FAMILY]


@pytest.mark.parametrize(("family", "plan"), [*zip(cycle(OTHERS), PLANS), *((family, "auto") for family in OTHERS[:2])])
def test_so_does_every_family(family: str, plan: str) -> None:
    assert texts(engine(plan, family=family)) == generated(family)


@pytest.mark.parametrize(
    ("fields", "plan"),
    [
        ({"block_attention": "causal"}, "full"),
        ({"block_recurrence": "bidirectional"}, "onepass:2"),
        ({"anchor": "backbone"}, "full"),
        ({"anchor": "backbone"}, "onepass:2"),
    ],
)
def test_so_do_views_that_draft_otherwise(fields: dict[str, object], plan: str) -> None:
    made = Engine(configure(dual(FAMILY), **fields), rows=3, capacity=200, plan=steps.parse(plan))
    assert texts(made) == generated()


def test_so_do_views_with_twins_of_attention_alone() -> None:
    """Draft rows run through the frozen layers of the gated delta rule."""
    model = orthrus.attach(tiny(FAMILY), orthrus.OrthrusConfig(block_size=BLOCK, layers="attention"))
    assert [one.diffusion is not None for one in duals(model)] == [False, False, False, True]
    for plan in ("full", "onepass:2"):
        assert texts(Engine(model, rows=3, capacity=200, plan=steps.parse(plan))) == generated()


class Sure(Double):
    """So sure of its tokens that its trees are as deep as its chains."""

    def propose(self, *args: Any) -> Tensor:
        return 20 * super().propose(*args)


@pytest.mark.parametrize("nodes", [0, 9])
@pytest.mark.parametrize("chance", [0.5, 0.85, 1.0])
def test_acceptance_may_stop_anywhere(chance: float, nodes: int) -> None:
    """A drafter that is right by a coin, chains and trees, over one, three and four rows."""
    kept, coin = set[int](), random.Random(0)
    known = {tuple(prompt): continued(tuple(prompt), 24) for prompt in PROMPTS}
    for rows in (1, 3, 4):
        made = engine_with(Sure(known, lambda *_: coin.random() < chance), MODEL(FAMILY), rows=rows, capacity=200)
        scripted(made, lambda *_: Step(BLOCK - 1, nodes=nodes))
        for prompt in PROMPTS:
            made.add(prompt, Options(max_new_tokens=24))
        done: dict[int, Row] = {}
        for progress in made.run():
            done[progress.row.id] = progress.row
            kept.add(progress.accepted)
        assert [done[i].token_ids for i in range(len(PROMPTS))] == list(known.values())
    assert kept >= ({BLOCK - 1} if chance == 1.0 else set(range(4)))


@pytest.mark.parametrize(("seed", "family"), [*enumerate(HYBRID)])
def test_rows_of_all_kinds_share_passes(seed: int, family: str) -> None:
    """Plain steps between chains, copies, trees and one-pass steps, drawn at random; greedy and sampled rows."""
    chance = random.Random(seed)
    sampled = [Options(max_new_tokens=14, sampling=Sampling(do_sample=True, temperature=0.9), seed=i) for i in (3, 4)]
    prompts, asked = [*PROMPTS, *PROMPTS[:2]], [*ASKED, *sampled]
    expected = [row.token_ids for row in decode(engine("ar", family=family), prompts, asked)]
    assert expected[: len(PROMPTS)] == generated(family)
    made = engine("auto", family=family, rows=4)
    kinds = [
        Step(),
        Step(7),
        Step(3),
        Step(3, lookup=True),
        Step(7, nodes=9),
        Step(7, stops=2),
        Step(7, nodes=9, stops=2),
    ]
    scripted(made, lambda *_: chance.choice(kinds))
    assert [row.token_ids for row in decode(made, prompts, asked)] == expected


@pytest.mark.parametrize("plan", ["full", "tree:12", "onepass:2"])
def test_a_seed_draws_plain_sampling_s_text(plan: str) -> None:
    """Under plans whose noise is coupled; a chain by rejection has the distribution alone."""
    drawn = [Options(max_new_tokens=16, sampling=Sampling(do_sample=True, temperature=0.9), seed=i) for i in range(3)]
    plain = [row.token_ids for row in decode(engine("ar"), PROMPTS[:3], drawn)]
    made = engine(plan)
    made.coupled = True
    assert [row.token_ids for row in decode(made, PROMPTS[:3], drawn)] == plain


@pytest.mark.parametrize("count", range(1, 10))
def test_a_text_that_ended_inside_a_block_is_gone_on_from(count: int) -> None:
    """All drafts are right, so the end lies at every place of a block; the next turn reads its own words only."""
    prompt, words = PROMPTS[0], [40, 41, 42, 43]
    known = {tuple(prompt): continued(tuple(prompt), 24)}
    double = Double(known, lambda row, place: True)
    made = engine_with(double, MODEL(FAMILY), block=BLOCK, rows=2, capacity=200)
    first = decode(made, [prompt], Options(max_new_tokens=count))[0]
    assert first.token_ids == known[tuple(prompt)][:count]
    turn = (*prompt, *first.token_ids, *words)
    double.texts = {turn: continued(turn, 12)}
    second = decode(made, [turn], Options(max_new_tokens=12))[0]
    assert second.token_ids == continued(turn, 12)
    assert second.cached >= len(prompt) + count - 1


def cached(made: Engine, prompts: list[list[int]], *, count: int = 8) -> list[int]:
    """Complete prompts one after another, as `generate` does; returns how many tokens of each were not read again."""
    rows = [decode(made, [prompt], Options(max_new_tokens=count))[0] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.token_ids == continued(tuple(prompt), count)
    return [row.cached for row in rows]


@pytest.mark.parametrize("exactness", ["distribution", "token"])
def test_a_system_prompt_is_read_twice_and_then_no_more(exactness: exact.Exact) -> None:
    """The second prompt that begins so shows where others go on; states are kept after whole blocks."""
    system = [*range(20, 20 + 2 * prefixes.BLOCK + 4)]
    prompts = [[*system, one, *range(3, 27)] for one in (60, 61, 62, 63, 64)]
    assert cached(engine("full", rows=3, exact=exactness), prompts) == [0, 0, *[2 * prefixes.BLOCK] * 3]


@pytest.mark.parametrize("chunk", [None, 5])
def test_completions_of_one_prompt_go_on_from_its_end(chunk: int | None) -> None:
    """While the first of them decodes, after it, and after others have taken its row."""
    prompt, other = [*range(20, 60)], [*range(3, 40)]
    made = engine("full", rows=2, prefill_chunk=chunk)
    assert cached(made, [prompt, prompt, other, prompt], count=20) == [0, 39, 0, 39]
    made.add(prompt, Options(max_new_tokens=20))
    made.step()
    assert [row.cached for row in decode(made, [prompt], Options(max_new_tokens=20))] == [39]


def test_prompts_that_join_together_are_read_once() -> None:
    """Completions of one prompt, prompts with most of their start in common, and such as part at two lengths."""
    prompt, system, B = [*range(20, 60)], [*range(60, 60 + 2 * prefixes.BLOCK + 4)], prefixes.BLOCK
    long = [3 + (7 * i) % 80 for i in range(6 * B + 5)]
    for prompts, expected in (
        ([prompt] * 3, [0, 39, 39]),
        ([[*system, 5, 6], [*system, 7, 8], [*system, 9, 10]], [0, 2 * B, 2 * B]),
        ([long, [*long[: 4 * B + 3], 5, 6], [*long[: 2 * B + 3], 7, 8]], [0, 4 * B, 2 * B]),
    ):
        rows = decode(engine("full", rows=3), prompts, Options(max_new_tokens=20))
        assert [row.token_ids for row in rows] == [continued(tuple(one), 20) for one in prompts]
        assert [row.cached for row in rows] == expected


def test_a_turn_goes_on_although_the_answer_s_opening_is_written_otherwise() -> None:
    """As templates do that leave thoughts out of earlier turns; only the answer is read once more."""
    question, opening = [*range(20, 55)], [70, 71, 72]
    made = engine("full", rows=1)
    first = decode(made, [[*question, *opening]], Options(max_new_tokens=9))[0]
    turn = [*question, *first.token_ids, 80, 81]
    assert cached(made, [turn]) == [len(question) // prefixes.BLOCK * prefixes.BLOCK - prefixes.BLOCK]


def test_snapshots_are_few_however_long_a_chat_grows() -> None:
    made, chat, sizes = engine("full", rows=2), [*range(20, 40)], []
    for turn in range(8):
        row = decode(made, [chat], Options(max_new_tokens=6))[0]
        assert row.token_ids == continued(tuple(chat), 6)
        assert row.cached >= (0 if turn == 0 else len(chat) - 4)
        chat = [*chat, *row.token_ids, 80 + turn, 4, 5]
        sizes.append(made.cache.states.nbytes)
    assert sizes[-1] == sizes[-2] == max(sizes)


def test_rows_leave_and_others_join_at_any_time() -> None:
    """Completions are ended while they decode and while they are read; those beside them do not notice."""
    made = engine("full", rows=3, prefill_slice=6)
    chance = random.Random(0)
    asked = {made.add(prompt, Options(max_new_tokens=20)): prompt for prompt in PROMPTS * 3}
    ended, done = set(), {}
    while made.busy:
        for progress in made.step():
            done[progress.row.id] = progress.row
        if chance.random() < 0.3 and (taken := [*made.live, *made.rows.reading]):
            victim = chance.choice(taken).id
            made.abort(victim)
            ended.add(victim)
    for number, prompt in asked.items():
        if number not in ended:
            assert done[number].token_ids == continued(tuple(prompt), 20)
    assert 0 < len(ended) < len(asked)


@pytest.mark.parametrize(("family", "dtype"), [("olmo_hybrid", torch.float32), (FAMILY, torch.bfloat16)])
def test_exact_tokens_are_plain_decoding_s_bit_for_bit(dtype: torch.dtype, family: str) -> None:
    """Alone and three at once."""
    model = dual(family).to(dtype)

    def written(plan: str, rows: int) -> list[list[int]]:
        return texts(Engine(model, rows=rows, capacity=200, plan=steps.parse(plan), exact="token"))

    plain = written("ar", 1)
    made = Engine(model, rows=1, capacity=200, plan=steps.parse("full"), exact="token")
    assert made.finding is not None
    assert made.finding.holds
    for plan in ("full", "tree:6", "onepass:2"):
        assert written(plan, 3) == plain


def test_a_state_at_a_length_that_is_not_known_is_refused() -> None:
    made = engine("full")
    decode(made, PROMPTS[:1], Options(max_new_tokens=20))
    with torch.inference_mode():
        made.cache.set_length(0, 4)
        with pytest.raises(DecodingError, match="needs the recurrent state of row 0 after 4 tokens"):
            made.passes.verify(slice(0, 1), torch.tensor([[5]]))
        made.cache.set_length(0, 0)
        made.passes.verify(slice(0, 1), torch.tensor([[5]]))


def test_memory_is_the_formula_s_and_does_not_grow() -> None:
    """Per row and layer: a state and three inputs of the convolution, snapshots of both, terms of the widest pass."""
    made, rows = engine_of(MODEL(FAMILY), block=BLOCK, rows=2, capacity=160), 2
    config = MODEL(FAMILY).config
    G, H = config.linear_num_key_heads, config.linear_num_value_heads
    N, D = config.linear_key_head_dim, config.linear_value_head_dim
    channels = 2 * G * N + H * D
    state, term = H * N * D + 3 * channels, channels + G * N + H * D + H
    prompts = [[one, *range(20, 20 + 40 + one)] for one in (3, 4)]
    sizes = []
    for count, snapshots in ((60, 2 * 2), (4, 2 * 2)):  # each prompt leaves two; repeated ones none
        for prompt in prompts:
            made.add(prompt, Options(max_new_tokens=count))
        while made.busy:
            made.step()
            sizes.append(made.cache.states.nbytes)
        assert sizes[-1] == 3 * 4 * (rows * (state + (BLOCK - 1) * term) + snapshots * state)
    assert len(sizes) > 10
    assert len(set(sizes[1:])) == 1  # the first step reads prompts and verifies nothing yet
    for turn in range(6):  # texts that share starts of every length
        decode(made, [[*range(20, 30 + 12 * turn), 80 + turn]], Options(max_new_tokens=4))
        most = rows * ((1 + MOST) * state + (BLOCK - 1) * term)
        assert made.cache.states.nbytes <= 3 * 4 * most


def test_a_view_is_saved_and_loaded(tmp_path: Path, characters: PreTrainedTokenizerFast) -> None:
    """As an adapter, which decodes inside Hugging Face's generate too."""
    for part in (tiny(FAMILY), characters):
        part.save_pretrained(tmp_path / "backbone")
    model = dual(FAMILY)
    orthrus.save(model, tmp_path / "view")
    loaded, _ = orthrus.load(tmp_path / "view", backbone=tmp_path / "backbone", dtype="float32", device="cpu")
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    out = loaded.generate(torch.tensor(PROMPTS[:1]), custom_generate=orthrus.hf_generate, max_new_tokens=COUNTS[0])
    assert out[0, len(PROMPTS[0]) :].tolist() == generated()[0]
    with pytest.raises(UnsupportedModel, match="compiled passes need attention in every layer"):
        orthrus.load(tmp_path / "view", backbone=tmp_path / "backbone", device="cpu", compile=True)


def test_the_text_model_of_a_multimodal_checkpoint_takes_a_view(tmp_path: Path) -> None:
    text = tiny(FAMILY)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text.config.to_dict(), vision_config=vision)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    model = orthrus.attach(AutoModelForCausalLM.from_pretrained(tmp_path), orthrus.OrthrusConfig(block_size=BLOCK))
    made = Engine(model, rows=2, capacity=200, plan=steps.parse("full"))
    assert texts(made) == generated()


def test_frozen_layers_of_a_draft_pass_run_once() -> None:
    """Of a view with twins of attention alone: all rows share their products, as they do in MLPs."""
    model = orthrus.attach(tiny(FAMILY), orthrus.OrthrusConfig(block_size=BLOCK, layers="attention"))
    made, calls = Engine(model, rows=2, capacity=100, plan=steps.parse("full")), []
    decode(made, PROMPTS[:2], Options(max_new_tokens=4))
    for dual_ in duals(model)[:3]:
        dual_.ar.out_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        made.passes.draft(slice(0, 1), torch.tensor([5]), 3)
    assert len(calls) == 3
