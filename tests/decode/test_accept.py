"""Acceptance: greedy equals a plain loop; rejection leaves the backbone's distribution exactly as it was."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthrus.decode import accept
from tests import reference
from tests.reference import Distribution

V = 3


def logs(p: Distribution | list[Distribution]) -> torch.Tensor:
    """Scores whose softmax is p, zeros included."""
    return torch.tensor(np.array(p)).log().float()


def emitted(verdict: accept.Verdict) -> list[list[int]]:
    pairs = zip(verdict.tokens_BM1.tolist(), verdict.accepted_B.tolist(), strict=True)
    return [tokens[: count + 1] for tokens, count in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 256, 384, 700])
@pytest.mark.parametrize("slots", [1, 9])
def test_the_best_token_is_the_first_of_the_highest_or_none(dtype: torch.dtype, vocabulary: int, slots: int) -> None:
    """Whatever the size: with scores of which many are equal, and rows of NaN, infinity, or nothing possible."""
    score = torch.randint(5, (4, slots, vocabulary), generator=torch.Generator().manual_seed(0)).to(dtype)
    score[1, 0, 1] = torch.nan
    score[2, 0, 2] = torch.inf
    score[3, 0] = -torch.inf
    found, rows = accept.best(score).tolist(), score.float().tolist()
    for b, q in itertools.product(range(4), range(slots)):
        possible = q > 0 or b == 0
        assert found[b][q] == (rows[b][q].index(max(rows[b][q])) if possible else accept.NONE)


@given(st.data(), st.integers(1, 4), st.integers(0, 5))
def test_greedy_equals_the_plain_loop(data: st.DataObject, rows: int, drafts: int) -> None:
    """Over a vocabulary of 2, so that long agreements, early breaks and none at all all occur."""
    token = st.integers(0, 1)
    draft = data.draw(st.lists(st.lists(token, min_size=drafts, max_size=drafts), min_size=rows, max_size=rows))
    own = data.draw(st.lists(st.lists(token, min_size=drafts + 1, max_size=drafts + 1), min_size=rows, max_size=rows))
    scores = torch.nn.functional.one_hot(torch.tensor(own), 2).float()
    verdict = accept.greedy(torch.tensor(draft, dtype=torch.long).view(rows, drafts), scores)
    assert emitted(verdict) == [reference.accept_greedy(d, o) for d, o in zip(draft, own, strict=True)]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    """As argmax does in plain decoding: a tie must not depend on who asks."""
    verdict = accept.greedy(torch.tensor([[1]]), torch.tensor([[[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]]]))
    assert emitted(verdict) == [[1, 0]]


# ---------------------------------------------------------------- the rule leaves p as it was

UNIFORM = np.full(V, 1 / V)
KINDS: dict[str, tuple[list[Distribution], list[Distribution]]] = {
    # name: (q of each slot, p of each slot whatever came before)
    "different": ([np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])], [np.array([0.2, 0.2, 0.6])] * 3),
    "equal": ([np.array([0.5, 0.3, 0.2])] * 2, [np.array([0.5, 0.3, 0.2])] * 3),
    "disjoint": ([np.array([1.0, 0.0, 0.0])] * 2, [np.array([0.0, 0.25, 0.75])] * 3),
    "q has zeros": ([np.array([0.0, 1.0, 0.0]), np.array([0.5, 0.0, 0.5])], [UNIFORM] * 3),
    "p has zeros": ([UNIFORM] * 2, [np.array([0.0, 1.0, 0.0]), np.array([0.5, 0.0, 0.5]), UNIFORM]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_specification_emits_p_exactly(kind: str) -> None:
    """All drafts, decisions and residual draws enumerated: the text's chance is the product of p's, to 1e-12."""
    q, p = KINDS[kind]
    chances = reference.emitted_chances(q, lambda text: p[len(text)])
    for text in itertools.product(range(V), repeat=3):
        expected = math.prod(float(p[i][token]) for i, token in enumerate(text))
        assert chances.get(text, 0.0) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_specification_emits_any_chain_exactly(seed: int) -> None:
    """p depends on all that came before, q only on the slot (drafts of a block do not know one another)."""
    rng = np.random.default_rng(seed)
    q = [rng.dirichlet(np.full(V, 0.5)) for _ in range(2)]
    p = {text: rng.dirichlet(np.full(V, 0.5)) for n in range(3) for text in itertools.product(range(V), repeat=n)}
    chances = reference.emitted_chances(q, p.__getitem__)
    for text in itertools.product(range(V), repeat=3):
        expected = math.prod(float(p[text[:i]][text[i]]) for i in range(3))
        assert chances.get(text, 0.0) == pytest.approx(expected, abs=1e-12)


def test_a_broken_rule_would_not_emit_p(monkeypatch: pytest.MonkeyPatch) -> None:
    """The enumeration has teeth: drawing the replacement from p itself, not from its residual, shows at once."""
    monkeypatch.setattr(reference, "residual", lambda p, _: p)
    q, p = KINDS["different"]
    chances = reference.emitted_chances(q, lambda text: p[len(text)])
    assert abs(chances[0, 0, 0] - math.prod(float(x[0]) for x in p)) > 1e-3


# ---------------------------------------------------------------- the function follows the rule


def at_slot(noise_BM1V: Tensor) -> Callable[[Tensor], Tensor]:
    """Noise for the slot that each row stops at."""
    return lambda stop_B: noise_BM1V[torch.arange(len(stop_B)), stop_B]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0]))
def test_rejection_follows_the_specification(seed: int, spread: float) -> None:
    """Every pair of drafts as a row of one batch, noise drawn at random: the same tokens, row by row."""
    rng = np.random.default_rng(seed)
    drafts = list(itertools.product(range(V), repeat=2))
    B = len(drafts)
    q = rng.dirichlet(np.full(V, spread), size=(B, 2))
    p = rng.dirichlet(np.full(V, spread), size=(B, 3))
    uniform, gumbel = rng.uniform(size=(B, 2)), rng.gumbel(size=(B, 3, V))
    verdict = accept.rejection(
        torch.tensor(drafts),
        logs(q),
        logs(p),
        accept_BM=torch.tensor(uniform).float(),
        residual=at_slot(torch.tensor(gumbel).float()),
    )
    expected = [reference.accept_sampled(drafts[b], q[b], p[b], uniform[b], gumbel[b]) for b in range(B)]
    assert emitted(verdict) == expected


@pytest.mark.parametrize("token", range(V))
def test_share_of_kept_drafts_is_the_ratio(token: int) -> None:
    """On a grid of 2,520 uniform draws, chances being twelfths, exactly min(1, p/q) of the drafts stay."""
    q, p = np.array([6, 4, 2]) / 12, np.array([3, 1, 8]) / 12
    N = 2520
    verdict = accept.rejection(
        torch.full((N, 1), token),
        logs([q]).expand(N, 1, V),
        logs([p, p]).expand(N, 2, V),
        accept_BM=((torch.arange(N) + 0.5) / N)[:, None],
        residual=at_slot(torch.zeros(N, 2, V)),
    )
    assert int(verdict.accepted_B.sum()) == round(N * min(1.0, p[token] / q[token]))


def one_row(q: Distribution, p: Distribution, draft: int, uniform: float, gumbel: list[float]) -> list[int]:
    verdict = accept.rejection(
        torch.tensor([[draft]]),
        logs([q])[None],
        logs([p, UNIFORM])[None],
        accept_BM=torch.tensor([[uniform]]),
        residual=at_slot(torch.tensor([[gumbel, gumbel]])),
    )
    return emitted(verdict)[0]


@pytest.mark.parametrize("uniform", [1e-7, 0.5, 1 - 1e-7])
@pytest.mark.parametrize("draft", range(V))
def test_equal_distributions_keep_every_draft(draft: int, uniform: float) -> None:
    """p = q leaves nothing to reject."""
    p = np.array([0.5, 0.3, 0.2])
    assert one_row(p, p, draft, uniform, [0.0, 0.0, 9.0]) == [draft, 2]


@pytest.mark.parametrize("uniform", [1e-7, 0.5, 1 - 1e-7])
def test_disjoint_supports_reject_every_draft(uniform: float) -> None:
    """And what p has is drawn instead, never what it has not, whatever the noise says."""
    q, p = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.25, 0.75])
    assert one_row(q, p, 0, uniform, [16.0, 0.0, 0.0]) == [2]
    assert one_row(q, p, 0, uniform, [16.0, 5.0, 0.0]) == [1]


def test_a_rejected_token_is_not_drawn_again() -> None:
    """Where q exceeds p, the residual is zero: the largest noise cannot bring the token back."""
    q, p = np.array([0.8, 0.1, 0.1]), np.array([0.4, 0.3, 0.3])
    assert one_row(q, p, 0, 0.9, [16.0, 0.0, 1.0]) == [2]


def test_without_drafts_it_is_plain_sampling() -> None:
    """No draft, one slot: the token is the Gumbel maximum over p."""
    p, gumbel = np.array([0.2, 0.5, 0.3]), torch.tensor([[[1.0, -1.0, 0.9]]])
    verdict = accept.rejection(
        torch.empty(1, 0, dtype=torch.long),
        torch.empty(1, 0, V),
        logs([p])[None],
        accept_BM=torch.empty(1, 0),
        residual=at_slot(gumbel),
    )
    assert emitted(verdict) == [[int((torch.tensor(p).log() + gumbel[0, 0]).argmax())]]
