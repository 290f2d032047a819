"""Sampled text with drafts has the distribution of sampled text without them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.drive import BASE, drafting, prompts, serve

pytestmark = pytest.mark.vllm

SAMPLES, PLACES = 2000, 4
ENGINE = {**BASE, "max_num_seqs": 64, "max_num_batched_tokens": 2048}


def sampled(checkpoint: Path, **more: Any) -> dict[str, Any]:
    """Draw the first tokens of many answers to one open question; no seeds, which crash the CPU build in chunks."""
    sampling = {"temperature": 0.8, "top_p": 0.95, "max_tokens": PLACES, "ignore_eos": True, "n": SAMPLES}
    calls = [{"prompts": prompts(checkpoint)[80:81], "sampling": sampling}]
    return serve(checkpoint, {**ENGINE, **more}, calls, patches="expand")[0]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> dict[str, Any]:
    """What vLLM draws without drafts."""
    return sampled(checkpoint)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_the_distribution_is_the_plain_one(method: str, checkpoint: Path, plain: dict[str, Any]) -> None:
    """Chi-square of homogeneity at each of 4 places, 2,000 texts against 2,000: a false alarm in 2,500 runs."""
    drawn = sampled(checkpoint, **drafting(checkpoint, draft_sample_method=method))
    assert drawn["accepted"] > 0
    first, second = torch.tensor(drawn["tokens"][0]), torch.tensor(plain["tokens"][0])
    assert first.shape == second.shape == (SAMPLES, PLACES)
    print(method, drawn["accepted_at"], drawn["drafts"])
    for place in range(PLACES):
        assert homogeneity(first[:, place], second[:, place]) > 1e-4, f"token {place + 1}"


def homogeneity(first: torch.Tensor, second: torch.Tensor) -> float:
    """The chance that two samples of one distribution differ by as much; rare tokens are counted as one."""
    size = int(max(first.max(), second.max())) + 1
    counts = torch.stack([first.bincount(minlength=size), second.bincount(minlength=size)]).double()
    common = counts.sum(0) >= 20
    counts = torch.cat([counts[:, common], counts[:, ~common].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.shape[1] - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2)) if freedom > 0 else 1.0
