"""Processed scores equal transformers' own and the float64 specification; coupled drafts equal plain sampling."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from orthrus.decode import accept, noise
from orthrus.decode.options import Sampling
from orthrus.decode.sampling import Chooser, Context, Drafts
from orthrus.kernels.vocabulary import NucleusWarper
from tests import reference
from tests.families import tiny

V = 12

samplings = st.builds(
    Sampling,
    do_sample=st.just(True),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
)


def draw_logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * 2


def contained(texts: list[list[int]]) -> Tensor:
    """The tokens of each text, filled up with its first one: `[B, L]`."""
    longest = max(map(len, texts))
    return torch.tensor([text + text[:1] * (longest - len(text)) for text in texts])


@given(samplings, st.integers(0, 1000), st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
def test_scores_equal_transformers_processors(sampling: Sampling, seed: int, text: list[int]) -> None:
    """Bit for bit what `generate` would sample from, built by transformers itself in its own order."""
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
    )
    logits = draw_logits(seed, 1)
    processors = PLAIN._get_logits_processor(prepared(config), input_ids_seq_length=len(text))
    expected = processors(torch.tensor([text]), logits.clone())
    made = Chooser(sampling).scores(logits[:, None], contained([text])[:, None])[:, 0]
    assert torch.equal(made, expected)


PLAIN = tiny("llama", vocab_size=V)


def prepared(config: GenerationConfig) -> GenerationConfig:
    config._eos_token_tensor = None
    return config


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.5, 0.9, 0.999]), st.sampled_from([0.0, 0.25, 2.0]))
def test_long_vocabularies_keep_the_same_nucleus(seed: int, top_p: float, step: float) -> None:
    """As transformers' warper; logits in steps, as of half precision, tie in crowds: as many of these stay."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(seed)) * 3
    logits = (logits / step).round() * step if step else logits
    made = NucleusWarper(top_p)(torch.empty(0), logits)
    expected = TopPLogitsWarper(top_p)(torch.empty(0), logits)
    assert torch.equal(made.sort(1).values, expected.sort(1).values)
    assert torch.equal(made[made > -torch.inf], logits[made > -torch.inf])


@given(samplings, st.integers(0, 1000), st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
def test_scores_equal_the_specification(sampling: Sampling, seed: int, text: list[int]) -> None:
    """And what transformers does is what the float64 specification says, tokens of chance zero included."""
    logits = draw_logits(seed, 1)
    made = Chooser(sampling).scores(logits[:, None], contained([text])[:, None])[0, 0].softmax(-1)
    expected = reference.distribution(logits[0].tolist(), set(text), sampling)
    np.testing.assert_allclose(made.double().numpy(), expected, rtol=0, atol=1e-6)
    assert ((made == 0).numpy() == (expected == 0)).all()


@given(st.sampled_from([0.5, 1.0, 1.7]), st.integers(0, 1000), st.lists(st.integers(0, V - 1), min_size=1))
def test_greedy_scores_are_only_penalised(penalty: float, seed: int, text: list[int]) -> None:
    """The repetition penalty moves a greedy choice too; nothing else is computed."""
    logits = draw_logits(seed, 1)
    expected = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])(torch.tensor([text]), logits.clone())
    made = Chooser(Sampling(repetition_penalty=penalty)).scores(logits[:, None], contained([text])[:, None])
    assert torch.equal(made[:, 0], expected)


def test_half_precision_logits_are_processed_in_float32() -> None:
    """Scores of a bfloat16 model lose nothing more."""
    logits = draw_logits(0, 1, 1).to(torch.bfloat16)
    scores = Chooser(Sampling(do_sample=True, temperature=0.7)).scores(logits, None)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, logits.float() / 0.7)


def test_every_verify_slot_has_its_own_context() -> None:
    """Slot j is penalised for the text and for the drafts before it, not for those after it."""
    sampling = Sampling(repetition_penalty=2.0)
    logits = draw_logits(5, 1, 4)
    drafts, text = [3, 4, 3], [0, 7]
    context = Context(torch.tensor([1]), torch.tensor([9]), contained([text]))
    chooser = Chooser(sampling)
    scores = chooser.scores(logits, chooser._seen_along(torch.tensor([drafts]), context))[0].tolist()
    for slot in range(4):
        expected = reference.scores(logits[0, slot].tolist(), {*text, *drafts[:slot]}, sampling)
        assert scores[slot] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("coupled", [False, True])
def test_only_coupled_cycles_meet_the_same_noise_twice(coupled: bool) -> None:
    """Position 9, drafted in a cycle that began at 7 and again in one that began at 8, over equal logits.

    Drafts of rejected cycles must not foretell those of the next (else a proposal chosen by how the last one went
    is no fair draw); coupled ones must, as there the noise of a position decides its token.
    """
    chooser = Chooser(Sampling(do_sample=True, temperature=2.0), coupled=coupled)
    stream = torch.tensor([noise.stream_of(1, i) for i in range(200)])
    logits = draw_logits(3, 1, 1).expand(200, 2, V)
    first = chooser.draft(logits, Context(stream, torch.full((200,), 7))).tokens_BM[:, 1]
    again = chooser.draft(logits, Context(stream, torch.full((200,), 8))).tokens_BM[:, 0]
    assert torch.equal(first, again) is coupled


# ---------------------------------------------------------------- drafts and verdicts over a toy backbone


def backbone(text: tuple[int, ...]) -> Tensor:
    """Logits `[V]` after a text: random, but always the same for the same text."""
    return draw_logits(hash(text) % 2**31)


def plain_text(start: tuple[int, ...], count: int, sampling: Sampling, stream: int) -> list[int]:
    """Sample token by token with the noise of purpose TARGET at each position."""
    text = start
    for _ in range(count):
        scores = Chooser(sampling).scores(backbone(text)[None, None], contained([list(text)])[:, None])
        position = torch.tensor([[len(text)]])
        noised = scores + noise.gumbel(torch.tensor([stream]), position, noise.TARGET, V)
        text = (*text, int(noised.argmax()))
    return list(text[len(start) :])


@given(samplings, st.integers(0, 1000), st.integers(0, 4), st.sampled_from([0.0, 0.3, 1.0]))
def test_coupled_cycles_equal_plain_sampling(sampling: Sampling, seed: int, drafts: int, blur: float) -> None:
    """Token for token, for drafts near the backbone's logits, far from them, and none at all."""
    stream, text, count = noise.stream_of(seed, 0), (1, 2, 3), 8
    chooser, done = Chooser(sampling, coupled=True), (1, 2, 3)
    while len(done) < len(text) + count:
        context = Context(torch.tensor([stream]), torch.tensor([len(done) - 1]), contained([list(done)]))
        foreseen = [backbone(done)] * drafts
        logits = torch.stack([*foreseen, torch.zeros(V)])[None, :drafts]
        proposal = chooser.draft(logits + blur * draw_logits(seed + len(done), 1, drafts), context)
        tokens = proposal.tokens_BM[0].tolist()
        after = torch.stack([backbone((*done, *tokens[:i])) for i in range(drafts + 1)])[None]
        verdict = chooser.judge(proposal, after, context)
        done = (*done, *verdict.tokens_BM1[0, : int(verdict.accepted_B[0]) + 1].tolist())
    assert list(done[3 : 3 + count]) == plain_text(text, count, sampling, stream)


def test_coupled_good_drafts_are_all_kept() -> None:
    """Where draft and backbone agree on the logits, shared noise makes them agree on the token."""
    sampling = Sampling(do_sample=True, temperature=1.5)
    chooser = Chooser(sampling, coupled=True)
    context = Context(torch.tensor([4]), torch.tensor([7]))
    logits = draw_logits(1, 1, 6)
    proposal = chooser.draft(logits[:, :5], context)
    assert proposal.scores_BMV is None
    assert chooser.judge(proposal, logits, context).accepted_B.tolist() == [5]


def test_rejection_uses_independent_noise_for_each_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft, acceptance and replacement of one position never share a draw; positions are those decided.

    A vocabulary of numbers is drawn for each draft and once for the token after them, and nowhere else.
    """
    asked: list[tuple[int, list[int], int]] = []
    real = noise.uniform

    def spy(stream_B: Tensor, position_BQ: Tensor, purpose: int, lanes: int) -> Tensor:
        asked.append((purpose, position_BQ[0].tolist(), lanes))
        return real(stream_B, position_BQ, purpose, lanes)

    monkeypatch.setattr(noise, "uniform", spy)
    chooser, context = Chooser(Sampling(do_sample=True)), Context(torch.tensor([4]), torch.tensor([7]))
    verdict = chooser.judge(chooser.draft(draw_logits(1, 1, 2), context), draw_logits(2, 1, 3), context)
    assert sorted(asked) == [
        (noise.DRAFT, [8, 9], V),
        (noise.ACCEPT, [8, 9], 1),
        (noise.RESIDUAL, [8 + int(verdict.accepted_B)], V),
    ]


@pytest.mark.parametrize("drafts", [1, 7])
def test_a_repetition_penalty_touches_the_tokens_of_the_text_alone(drafts: int) -> None:
    """Nothing is made of the size of drafts by vocabulary but the scores themselves, and no 64-bit numbers at all."""
    made: list[tuple[torch.dtype, int]] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend((t.dtype, t.numel()) for t in (out if isinstance(out, tuple | list) else [out]))
            return out

    context = Context(torch.tensor([4]), torch.tensor([7]), contained([[3, 5, 7]]))
    logits, own = torch.randn(1, drafts + 1, 5000), torch.arange(drafts)[None]
    with Sizes():
        Chooser(Sampling(repetition_penalty=1.3)).judge(Drafts(own, None), logits, context)
    assert [dtype for dtype, size in made if size >= 5000] == [torch.float32]


# ---------------------------------------------------------------- where nothing can be chosen


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True), Sampling(do_sample=True, top_p=0.9)])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_logits_that_are_not_numbers_choose_nothing(
    sampling: Sampling, coupled: bool, broken: float, slot: int
) -> None:
    """No token is made up after a slot with one NaN or infinity; slots before it and rows beside it are as ever."""
    chooser, context = Chooser(sampling, coupled), Context(torch.tensor([4, 5]), torch.tensor([7, 9]))
    logits = draw_logits(1, 1, 3).expand(2, -1, -1).clone()
    drafts = chooser.draft(logits[:, :2], context)
    whole = chooser.judge(drafts, logits, context)
    logits[0, slot, 4] = broken
    verdict = chooser.judge(drafts, logits, context)
    assert whole.accepted_B.tolist() == [2, 2]
    assert int(verdict.accepted_B[0]) == slot
    assert verdict.tokens_BM1[0, : slot + 1].tolist() == [*whole.tokens_BM1[0, :slot].tolist(), accept.NONE]
    assert torch.equal(verdict.tokens_BM1[1], whole.tokens_BM1[1])


def test_broken_drafts_are_turned_down() -> None:
    """Logits of the view that are not numbers cost their drafts, no more."""
    chooser, context = Chooser(Sampling(do_sample=True)), Context(torch.tensor([4]), torch.tensor([7]))
    drafts = chooser.draft(torch.full((1, 2, V), math.nan), context)
    verdict = chooser.judge(drafts, draw_logits(1, 1, 3), context)
    assert verdict.accepted_B.tolist() == [0]
    assert verdict.tokens_BM1[0, 0] >= 0
