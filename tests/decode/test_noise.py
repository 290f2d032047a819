"""Noise is a pure function of stream, position, purpose and lane, and is as uniform as it says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus.decode import noise

PURPOSES = [noise.DRAFT, noise.ACCEPT, noise.RESIDUAL, noise.TARGET]


def chi_square_uniform(u: torch.Tensor, bins: int) -> float:
    """Return the p-value of the hypothesis that numbers are uniform on (0, 1)."""
    counts = torch.histc(u.double(), bins=bins, min=0, max=1)
    expected = u.numel() / bins
    statistic = ((counts - expected) ** 2 / expected).sum() / 2
    return float(torch.special.gammaincc(torch.tensor((bins - 1) / 2, dtype=torch.float64), statistic))


def many(streams: int, positions: int, lanes: int, purpose: int = noise.DRAFT) -> torch.Tensor:
    stream = torch.tensor([noise.stream_of(0, i) for i in range(streams)])
    return noise.uniform(stream, torch.arange(positions).expand(streams, -1), purpose, lanes)


@given(seed=st.integers(0, 2**63 - 1), rows=st.integers(1, 4), purpose=st.sampled_from(PURPOSES), data=st.data())
def test_a_number_depends_on_its_own_key_alone(seed: int, rows: int, purpose: int, data: st.DataObject) -> None:
    """Whatever the batch, the block and the vocabulary around it: the same stream, position and lane, the same bits."""
    stream = torch.tensor([noise.stream_of(seed, i) for i in range(rows)])
    position = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 10**6), min_size=3, max_size=3), min_size=rows, max_size=rows))
    )
    whole = noise.uniform(stream, position, purpose, 7)
    row, slot, lane = (data.draw(st.integers(0, n - 1)) for n in (rows, 3, 7))
    alone = noise.uniform(stream[row : row + 1], position[row : row + 1, slot : slot + 1], purpose, lane + 1)
    assert torch.equal(alone[0, 0, lane], whole[row, slot, lane])


def test_numbers_are_pinned() -> None:
    """Sampled text can be reproduced by a later version: these bits are a promise."""
    u = noise.uniform(torch.tensor([noise.stream_of(7, 1)]), torch.tensor([[0, 5]]), noise.TARGET, 2)
    assert (u * 2**24).int().tolist() == [[[10022941, 7586857], [13964135, 5772841]]]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_uniform(purpose: int) -> None:
    """Chi-square on 100 bins of 60,000 numbers; a fair generator fails once in 10^7 draws (the seed is fixed)."""
    u = many(30, 100, 20, purpose)
    assert u.shape == (30, 100, 20)
    assert chi_square_uniform(u, 100) > 1e-7
    assert chi_square_uniform(many(3000, 10, 1, purpose), 100) > 1e-7


@pytest.mark.parametrize(("bits", "number"), [(0, 2.0**-24), (-1, 1 - 2.0**-24)])
def test_noise_is_never_infinite(bits: int, number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least and the greatest number are exact and strictly inside (0, 1).

    The greatest once rounded to 1: its Gumbel noise, infinite, let tokens of chance zero through once in 2^24 lanes,
    which is one position in a hundred for a vocabulary of 152,000.
    """
    monkeypatch.setattr(noise, "_mix", lambda z: torch.full_like(z, bits))
    key = (torch.tensor([1]), torch.tensor([[0]]), noise.TARGET, 1)
    assert noise.uniform(*key).double().item() == number
    assert noise.gumbel(*key).isfinite().all()


def test_gumbel_maximum_samples_the_distribution() -> None:
    """argmax(log p + noise) has distribution p: chi-square of 30,000 draws, false alarms once in 10^7."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    stream = torch.tensor([noise.stream_of(3, i) for i in range(300)])
    drawn = (p.log() + noise.gumbel(stream, torch.arange(100).expand(300, -1), noise.TARGET, 4)).argmax(-1)
    counts = torch.bincount(drawn.flatten(), minlength=4).double()
    expected = p.double() * drawn.numel()
    statistic = ((counts - expected) ** 2 / expected).sum() / 2
    assert torch.special.gammaincc(torch.tensor(1.5, dtype=torch.float64), statistic) > 1e-7


def test_streams_positions_and_purposes_differ() -> None:
    """Seeds, prompts, neighbouring positions and purposes give numbers unlike each other, and uncorrelated.

    The correlation of n independent pairs has spread 1/√n; six times that is passed once in 10^9.
    """
    streams = {noise.stream_of(seed, index) for seed in range(50) for index in range(50)}
    assert len(streams) == 2500
    base = many(20, 50, 20)
    others = [
        many(21, 50, 20)[1:],
        many(20, 51, 20)[:, 1:],
        many(20, 50, 21)[..., 1:],
        *(many(20, 50, 20, purpose) for purpose in PURPOSES[1:]),
    ]
    for other in others:
        assert not torch.equal(base, other)
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 6 / math.sqrt(base.numel())


def test_cycles_draw_afresh() -> None:
    """The same position, decided in cycles that began at others, gets unrelated numbers; the same cycle the same."""
    stream = torch.tensor([noise.stream_of(0, i) for i in range(100)])
    position = torch.full((100, 1), 40)
    numbers = [
        noise.uniform(noise.fresh(stream, torch.full((100,), start)), position, noise.DRAFT, 50).flatten()
        for start in (37, 38, 38)
    ]
    assert torch.equal(numbers[1], numbers[2])
    correlation = torch.corrcoef(torch.stack([numbers[0], numbers[1]]))[0, 1]
    assert abs(float(correlation)) < 6 / math.sqrt(numbers[0].numel())
    assert chi_square_uniform(torch.cat(numbers[:2]), 100) > 1e-7


def test_a_purpose_does_not_run_into_the_next_position() -> None:
    """Position and purpose are packed into one key: four purposes per position, no two keys alike."""
    u = torch.stack([many(1, 200, 1, purpose)[0, :, 0] for purpose in PURPOSES])
    assert u.unique().numel() == 4 * 200
