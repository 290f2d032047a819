"""Sampled text with drafts has the distribution of sampled text without them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.drive import BASE, drafting, prompts, serve

pytestmark = pytest.mark.vllm

SAMPLES, PLACES = 2000, 4
SPANS = [slice(start, start + width) for width in (1, 2) for start in range(PLACES + 1 - width)]
ENGINE = {**BASE, "max_num_seqs": 64, "max_num_batched_tokens": 2048}


def sampled(checkpoint: Path, **more: Any) -> dict[str, Any]:
    """Draw the first tokens of many answers to one open question; no seeds, which crash the CPU build in chunks."""
    sampling = {"temperature": 0.8, "top_p": 0.95, "max_tokens": PLACES, "ignore_eos": True, "n": SAMPLES}
    calls = [{"prompts": prompts(checkpoint)[80:81], "sampling": sampling}]
    return serve(checkpoint, {**ENGINE, **more}, calls, patches={"expand": ""})[0]


@pytest.fixture(scope="module")
def plain(converted: Path) -> dict[str, Any]:
    """What vLLM draws without drafts."""
    return sampled(converted)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_the_distribution_is_the_plain_one(
    method: str, checkpoint: Path, plain: dict[str, Any], record_property: Any
) -> None:
    """Chi-square of homogeneity, 2,000 texts against 2,000, of single tokens and pairs: a false alarm in 1,400 runs."""
    drawn = sampled(checkpoint, **drafting(checkpoint, draft_sample_method=method))
    assert drawn["accepted"] > 0
    first, second = torch.tensor(drawn["tokens"][0]), torch.tensor(plain["tokens"][0])
    assert first.shape == second.shape == (SAMPLES, PLACES)
    chances = {
        f"tokens {span.start + 1} to {span.stop}": homogeneity(first[:, span], second[:, span]) for span in SPANS
    }
    record_property("chances", chances)
    record_property("accepted at position", drawn["accepted_at"])
    record_property("drafts", drawn["drafts"])
    record_property("different texts", len(second.unique(dim=0)))
    assert len(second.unique(dim=0)) > 50, "too few texts to tell distributions apart"
    assert min(chances.values()) > 1e-4


def homogeneity(first: torch.Tensor, second: torch.Tensor) -> float:
    """The chance that two samples `[N, width]` of one distribution differ by as much; rare ones are counted as one."""
    kinds = torch.cat([first, second]).unique(dim=0, return_inverse=True)[1].split(len(first))
    size = int(max(kind.max() for kind in kinds)) + 1
    counts = torch.stack([kind.bincount(minlength=size) for kind in kinds]).double()
    common = counts.sum(0) >= 20
    counts = torch.cat([counts[:, common], counts[:, ~common].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.shape[1] - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2)) if freedom > 0 else 1.0
