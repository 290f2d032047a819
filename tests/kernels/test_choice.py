"""Tokens of the highest scores, and drafts chosen in turn, in C++: the same tokens as by torch's operations."""

import math

import pytest
import torch
from torch import Tensor

from orthrus.kernels import compiled, vocabulary
from orthrus.kernels.compiled import instructions
from orthrus.model import markov
from orthrus.model.markov import Markov
from tests.kernels.conftest import Operator
from tests.kernels.test_int8 import threads

pytestmark = pytest.mark.skipif(
    instructions() is None or not compiled._compiler(), reason="needs Linux on an x86 CPU, and a compiler"
)


@pytest.fixture
def chosen(own: tuple[str, Operator], monkeypatch: pytest.MonkeyPatch) -> Operator:
    """The operator; what chooses tokens from now on has it."""
    operator: Operator = getattr(torch.ops.orthrus, f"chosen_{own[0]}").default
    monkeypatch.setattr(vocabulary, "chosen", lambda: operator)
    return operator


def slow(scores: Tensor) -> list[list[int]]:
    """The specification: the first of the highest, -1 where any is NaN or the highest is not finite."""
    rows = scores.float().tolist()
    return [[-1 if any(map(math.isnan, s)) or not math.isfinite(max(s)) else s.index(max(s)) for s in r] for r in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 63, 512, 1300])
def test_the_first_of_the_highest_scores_is_chosen(chosen: Operator, size: int, dtype: torch.dtype) -> None:
    """Among small integers, where equal ones abound, of either sign and with zeros of both; also of rows set apart."""
    generator = torch.Generator().manual_seed(size)
    scores = torch.randint(-9, 1, (4, 7, size + 3), generator=generator).to(dtype)
    scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.5, scores, -scores.abs())[..., :size]
    scores[0, 0] = -0.0
    assert vocabulary.best(scores).tolist() == slow(scores)
    assert vocabulary.best(scores[1:, ::2]).tolist() == slow(scores[1:, ::2])


@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
def test_nothing_is_chosen_where_no_score_is_the_highest(chosen: Operator, wrong: float) -> None:
    """A single NaN of either sign, an infinity; of minus infinity only where all tokens have it."""
    scores = torch.zeros(2, 2, 700)
    scores[0, 0, 650] = wrong
    scores[0, 1] = -math.inf
    scores[1, 0].copysign_(torch.tensor(-1.0)).sub_(3)
    assert vocabulary.best(scores).tolist() == slow(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 16, 37])
@pytest.mark.parametrize("known", [0, 300, 1300])
def test_drafts_are_those_of_the_whole_sum(chosen: Operator, known: int, rank: int, dtype: torch.dtype) -> None:
    """Whichever tokens a correction knows, on one thread or two; of integers, whose sums are exact: many tie."""
    generator = torch.Generator().manual_seed(known + rank)
    correction = Markov(1300, rank, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(False)
    correction.before_VR.copy_(torch.randint(-2, 3, (1300, rank), generator=generator))
    odd = 257 if rank == 37 else 2  # which bfloat16 cannot hold
    correction.after_VR.zero_()[torch.randperm(1300, generator=generator)[:known]] = float(odd)
    correction.after_VR *= torch.randint(-1, 2, (1300, rank), generator=generator)
    logits = torch.randint(-30, 31, (9, 5, 1300), generator=generator).to(dtype)
    anchor = torch.randint(0, 1300, (9,), generator=generator)
    tokens = correction.in_turn(logits, anchor, lambda slot, _: slot.argmax(-1))
    for count in (1, 2):
        with threads(count):
            assert torch.equal(correction.best(logits, anchor), tokens)


def test_a_shift_that_its_bound_only_just_allows_wins(chosen: Operator) -> None:
    """A token whose row points where the token before does: its shift is the product of both lengths, rounded."""
    generator = torch.Generator().manual_seed(0)
    correction = Markov(200, 64, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(False)
    correction.before_VR.copy_(torch.randn(200, 64, generator=generator))
    correction.after_VR.zero_()[77] = correction.before_VR[5]
    reached = correction.before_VR[5].double().square().sum()
    for by in (-1e-4, 1e-4):
        logits = torch.zeros(1, 1, 200)
        logits[0, 0, 3] = reached * (1 + by)
        assert correction.best(logits, torch.tensor([5])).item() == (77 if by < 0 else 3)


def test_drafts_of_scores_that_are_no_numbers_are_tokens(chosen: Operator) -> None:
    """The pass that verifies them tells what is wrong."""
    correction = Markov(90, 4, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(False)
    correction.before_VR.copy_(torch.ones(90, 4))
    logits = torch.full((1, 3, 90), math.nan)
    assert correction.best(logits, torch.tensor([1])).tolist() == [[0, 0, 0]]


def test_what_does_not_fit_is_refused(chosen: Operator) -> None:
    """Anchors outside the vocabulary, factors of another size, numbers of another type."""
    scores, factor, length = torch.zeros(1, 2, 8), torch.ones(8, 4), torch.ones(8)
    with pytest.raises(RuntimeError, match=r"tokens must be from 0 to 7, found 8"):
        chosen(scores, torch.tensor([8]), factor, factor, length)
    with pytest.raises(RuntimeError, match="after must be 32 contiguous numbers"):
        chosen(scores, torch.tensor([1]), factor, factor[:4], length)
    with pytest.raises(RuntimeError, match="come with anchors"):
        chosen(scores, torch.tensor([1]), factor, factor, None)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        chosen(scores.half(), None, None, None, None)
    assert markov.choosing(scores.half()) is None
