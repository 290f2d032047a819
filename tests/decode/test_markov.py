"""Drafts corrected by the token before: chosen as specified, worth what they should be, and never seen in a text.

Sampling is compared with exact chances as in `test_distribution`: p-values below 1e-8 fail and there are 3 of them, so
a right implementation fails once in more than thirty million reseedings; with the seeds fixed, always or never.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import orthrus
from orthrus.decode import noise, tree
from orthrus.decode.cycle import Batch, _draft
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.decode.passes import Passes
from orthrus.decode.sampling import Chooser, Context
from orthrus.model.cache import ScratchCache
from orthrus.model.markov import Before, Markov, install
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import BLOCK, decode, finish
from tests.families import VOCAB, perturb, tiny

PLANS = ["full", "fixed:3", "tree:12", "onepass:2", "onepass", "auto"]
PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35], [9, 10, 11, 12, 13]]


def corrected(rank: int = 4, **overrides: object) -> PreTrainedModel:
    """A view and a correction that have both moved at random."""
    config = orthrus.OrthrusConfig(block_size=BLOCK, markov_rank=rank)
    model = orthrus.attach(tiny("qwen3", **overrides), config, attn_implementation="orthrus")
    perturb(model)
    with torch.no_grad():
        model.markov.before_VR.normal_()
    return model


def engine_of(model: PreTrainedModel, name: str, *, rows: int = 3, room: int = 32, **more: object) -> Engine:
    chosen = steps.parse(name)
    capacity = room + chosen.scratch(BLOCK)
    return Engine(model, rows=rows, capacity=capacity, plan=chosen, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- choosing


V = 12
MATRIX = torch.randn(V, V, generator=torch.Generator().manual_seed(3)) * 2
MARKOV = Markov(V, V, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(False)
with torch.no_grad():
    MARKOV.before_VR.copy_(MATRIX)
    MARKOV.after_VR.copy_(torch.eye(V))
samplings = st.sampled_from(
    [
        Sampling(),
        Sampling(repetition_penalty=1.5),
        Sampling(do_sample=True, temperature=0.7),
        Sampling(do_sample=True, top_k=4, repetition_penalty=1.3),
    ]
)


@given(samplings, st.booleans(), st.integers(0, 1000), st.integers(1, 5))
def test_each_slot_is_chosen_after_the_draft_before_it(
    sampling: Sampling, coupled: bool, seed: int, slots: int
) -> None:
    """Against one slot of one row at a time, in float64; the scores kept are those that the drafts were drawn from."""
    logits = torch.randn(3, slots, V, generator=torch.Generator().manual_seed(seed)) * 2
    anchors, texts = [1, 7, 7], [[1], [2, 7], [0, 5, 7]]
    seen = torch.tensor([text + text[-1:] * (3 - len(text)) for text in texts])
    context = Context(torch.tensor([11, 12, seed]), torch.tensor([4, 9, 20]), seen)
    chooser = Chooser(sampling, coupled=coupled)
    drafts = chooser.draft(logits, context, Before(torch.tensor(anchors), MARKOV))
    gumbel = noise.gumbel(
        context.stream_B if coupled else noise.fresh(context.stream_B, context.position_B),
        context.position_B[:, None] + torch.arange(1, slots + 1),
        noise.TARGET if coupled else noise.DRAFT,
        V,
    )
    assert (drafts.scores_BMV is not None) is (sampling.do_sample and not coupled)
    for row, before in enumerate(anchors):
        for slot in range(slots):
            shifted = (logits[row, slot] + MATRIX[before]).tolist()
            q = reference.distribution(shifted, set(texts[row]), sampling)
            with np.errstate(divide="ignore"):
                best = np.log(q) + (gumbel[row, slot].numpy() if sampling.do_sample else 0)
            before = int(drafts.tokens_BM[row, slot])
            assert before == int(best.argmax())
            assert float(drafts.confidence_BM[row, slot]) == pytest.approx(q[before], abs=1e-5)
            if drafts.scores_BMV is not None:
                np.testing.assert_allclose(drafts.scores_BMV[row, slot].softmax(-1).numpy(), q, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_change_are_taken_up(dtype: torch.dtype) -> None:
    """Slots are shifted by copies of the factors: after either is written to, and in every precision."""
    markov = Markov(V, V, device=torch.device("cpu"), dtype=dtype).requires_grad_(False)
    logits = torch.zeros(1, 3, V)

    def chosen() -> list[int]:
        return markov.in_turn(logits, torch.tensor([2]), lambda shifted, _: shifted.argmax(-1))[0].tolist()

    with torch.inference_mode():
        markov.before_VR.copy_(torch.eye(V))
        for step in (1, 4):
            markov.after_VR.copy_(torch.eye(V).roll(step, 0))  # after t comes t + step
            assert chosen() == [(2 + step * slot) % V for slot in (1, 2, 3)]
        markov.before_VR.zero_()
        assert chosen() == [0, 0, 0]
        assert chosen() == chosen()
    markov.double()
    markov.before_VR.data = torch.eye(V, dtype=torch.float64)
    assert chosen() == [6, 10, 2]


def test_rows_of_every_group_follow_their_own_anchors() -> None:
    """Greedy and sampled rows between one another propose what each group proposes alone."""
    markov = corrected().markov
    logits = torch.randn(5, 4, VOCAB, generator=torch.Generator().manual_seed(0))
    anchor, context = torch.arange(5) * 7, Context(torch.arange(5), torch.arange(5) + 3)
    choosers = {Chooser(Sampling()): [0, 3], Chooser(Sampling(do_sample=True)): [1, 2, 4]}
    groups: list[tuple[Chooser, Tensor | None]] = [(c, torch.tensor(rows)) for c, rows in choosers.items()]
    every = slice(0, 5)
    batch = Batch(rows=every, anchor_B=anchor, context=context, groups=groups, drawing=every)
    mixed = _draft(batch, logits, markov)
    for chooser, rows in choosers.items():
        index = torch.tensor(rows)
        alone = chooser.draft(logits[index], context.rows(index), Before(anchor[index], markov))
        assert torch.equal(mixed.tokens_BM[index], alone.tokens_BM)


def test_a_tree_weighs_likely_tokens_after_each_token_before() -> None:
    """Two slots: the best paths are those of the first slot's chances times the second's, shifted by the pair."""
    markov = Markov(3, 3, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        markov.before_VR.copy_(torch.tensor([[0.0, 0, 9], [9, 0, 0], [0, 9, 0]]))
        markov.after_VR.copy_(torch.eye(3))
    scores = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 2.0]]])
    # After 0 comes 2, after 1 comes 0, after 2 comes 1; the anchor is a 2, so the first slot's token is a 1.
    grown = tree.grow(scores, nodes=2, anchor_B=torch.tensor([2]), markov=markov)
    assert grown.token_BN.tolist() == [[1, 0]]
    assert grown.parent_BN.tolist() == [[0, 1]]
    assert tree.grow(scores, nodes=2).token_BN.tolist() == [[1, 2]]
    # Among many tokens, one that is not likely by itself, and follows one that is not.
    wide = Markov(40, 40, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        wide.before_VR[[7, 31], [31, 33]] = 30.0
        wide.after_VR.copy_(torch.eye(40))
    scores = torch.arange(40.0, 0.0, -1.0).expand(1, 3, 40) / 40
    grown = tree.grow(scores, nodes=3, anchor_B=torch.tensor([7]), markov=wide)
    assert tree.BRANCH < 31
    assert grown.token_BN.tolist()[0][:2] == [31, 33]
    # A first slot of equal chances is decided by the anchor: after 0 comes 2.
    grown = tree.grow(torch.zeros(1, 2, 3), nodes=2, anchor_B=torch.tensor([0]), markov=markov)
    assert grown.token_BN.tolist() == [[2, 1]]


# ---------------------------------------------------------------- texts and worth


@pytest.mark.parametrize("name", PLANS)
def test_greedy_texts_are_the_backbone_s(name: str) -> None:
    """Four prompts over three rows, whatever the plan."""
    rows = decode(engine_of(corrected(), name), PROMPTS, Options(max_new_tokens=20))
    assert [row.token_ids for row in rows] == [reference.greedy_text(tiny("qwen3"), p, 20) for p in PROMPTS]


def test_exact_tokens_stay_exact() -> None:
    """Passes of fixed shape, coupled draws: a sampled text is the plain one's, token for token."""
    options = Options(max_new_tokens=12, sampling=Sampling(do_sample=True, temperature=0.8), seed=4)
    model, texts = corrected(), []
    for name in ("ar", "full"):
        rows = decode(engine_of(model, name, exact="token"), PROMPTS, options)
        texts.append([row.token_ids for row in rows])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["full", "onepass", "tree:15"])
def test_a_correction_that_knows_what_follows_is_right_everywhere(name: str) -> None:
    """A view that knows nothing, and a matrix of what comes after each token of a text: every draft is kept.

    The text is cut before a token comes again, as one may be followed by another; so the first slot, too, must have
    been shifted by its anchor, under fused passes by one that was not written when the block was drafted.
    """
    text = [73, *reference.greedy_text(tiny("qwen3"), [73], 24)]
    length = next((i for i, token in enumerate(text) if token in text[:i]), len(text))
    assert length > BLOCK + 2
    model = corrected()
    full = Markov(VOCAB, VOCAB, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        full.after_VR.copy_(torch.eye(VOCAB))
        for before, after in pairwise(text[:length]):
            full.before_VR[before, after] = 100.0
    install(model, full)
    row = decode(engine_of(model, name, rows=1), [text[:1]], Options(max_new_tokens=length - 1))[0]
    assert row.token_ids == text[1:length]
    assert row.stats.cycles == 2
    assert row.stats.forwards == (3 if name == "onepass" else 4)


SMALL = corrected(vocab_size=8)


@pytest.mark.parametrize("name", ["fixed:4", "tree:6", "onepass:2"])
def test_sampled_texts_have_the_backbone_s_distribution(name: str) -> None:
    """Rejection sampling (chains) and shared noise (the others): the joint distribution of three tokens."""
    sampling, prompt, length = Sampling(do_sample=True, temperature=0.9), [3, 1, 4], 3
    engine = engine_of(SMALL, name, rows=50, room=len(prompt) + length)
    assert engine.coupled is (name != "fixed:4")
    options = Options(max_new_tokens=length, sampling=sampling, seed=11)
    for index in range(1500):
        engine.add(prompt, options, index=index)
    counts = Counter(tuple(row.token_ids) for row in finish(engine).values())
    exact = reference.chain(tiny("qwen3", vocab_size=8), prompt, length, 8, sampling)
    assert reference.chi_square(counts, exact) > 1e-8


def test_passes_know_a_model_s_correction() -> None:
    """And none where there is none."""
    model = corrected()
    cache = ScratchCache(rows=1, capacity=8)
    assert Passes(model, cache).markov is model.markov
    install(model, None)
    assert Passes(model, cache).markov is None
