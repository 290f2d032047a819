"""Sampled text has the backbone's own processed distribution: end to end, over every text of three tokens.

Each test draws thousands of texts and compares their counts with exact chances (enumerated in float64 from the
untouched model) by a chi-square. False alarms: p-values below 1e-8 fail, and there are fewer than 30 of them, so a
right implementation fails once in more than three million reseedings; with the seeds fixed, always or never.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode import accept
from orthrus.decode.accept import Verdict
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.model.attachment import config_of
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import configure, dual, finish
from tests.families import tiny

V = 8
PROMPT = [3, 1, 4]
LENGTH = 3
TEXTS = 1500
ALARM = 1e-8

MODEL = dual(vocab_size=V)
BEHIND = {
    attention: configure(dual(vocab_size=V), anchor="backbone", block_attention=attention)
    for attention in ("bidirectional", "causal")
}
PLAIN = tiny("qwen3", vocab_size=V)

SAMPLINGS = {
    "temperature 1": Sampling(do_sample=True),
    "top_k": Sampling(do_sample=True, temperature=1.3, top_k=4),
    "top_p": Sampling(do_sample=True, top_p=0.8),
    "min_p": Sampling(do_sample=True, temperature=0.7, min_p=0.15),
    "repetition_penalty": Sampling(do_sample=True, repetition_penalty=1.8),
    "all": Sampling(do_sample=True, temperature=0.9, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
}


def sample(
    sampling: Sampling, name: str = "fixed:4", *, texts: int = TEXTS, seed: int = 11, model: PreTrainedModel = MODEL
) -> Counter[tuple[int, ...]]:
    """Count the texts that one prompt gets, asked again and again, fifty at a time."""
    chosen = steps.parse(name)
    capacity = Engine.room(len(PROMPT), LENGTH, chosen.scratch(config_of(model).proposals + 1))
    engine = Engine(model, rows=50, capacity=capacity, plan=chosen)
    options = Options(max_new_tokens=LENGTH, sampling=sampling, seed=seed)
    for index in range(texts):
        engine.add(PROMPT, options, index=index)
    return Counter(tuple(row.token_ids) for row in finish(engine).values())


@cache
def exact(sampling: Sampling) -> dict[tuple[int, ...], float]:
    return reference.chain(PLAIN, PROMPT, LENGTH, V, sampling)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_drafted_texts_have_the_backbone_s_distribution(name: str) -> None:
    """Blocks of 4 from a random twin, rejection sampling, every option: joint distribution of three tokens."""
    sampling = SAMPLINGS[name]
    assert reference.chi_square(sample(sampling), exact(sampling)) > ALARM


@pytest.mark.parametrize("name", ["ar", "fixed:2", "tree:6", "onepass:2", "onepass:2:6"])
def test_any_plan_samples_the_same_distribution(name: str) -> None:
    """Plain steps, other blocks, trees, both fused: cycles end inside, at the end of and past the three tokens."""
    sampling = SAMPLINGS["temperature 1"]
    assert reference.chi_square(sample(sampling, name), exact(sampling)) > ALARM


@pytest.mark.parametrize(
    ("name", "attention"),
    [("fixed:2", "causal"), ("full", "bidirectional"), ("tree:6", "bidirectional"), ("onepass:2", "causal")],
)
def test_masks_behind_the_backbone_s_row_sample_the_same_distribution(name: str, attention: str) -> None:
    """The first token is a plain sample of the draft pass, the rest is kept by rejection."""
    sampling = SAMPLINGS["all" if name == "full" else "temperature 1"]
    assert reference.chi_square(sample(sampling, name, model=BEHIND[attention]), exact(sampling)) > ALARM


# ---------------------------------------------------------------- the test has teeth


def always_accept(draft_BM: Tensor, draft_score_BMV: Tensor, score_BM1V: Tensor, **noises: Any) -> Verdict:
    """Keep every draft: the distribution becomes the twin's."""
    verdict = rejection(draft_BM, draft_score_BMV, score_BM1V, **noises)
    tokens = torch.cat([draft_BM, verdict.tokens_BM1[:, -1:]], dim=1)
    return Verdict(tokens, torch.full_like(verdict.accepted_B, draft_BM.shape[1]))


def no_residual(draft_BM: Tensor, draft_score_BMV: Tensor, score_BM1V: Tensor, **noises: Any) -> Verdict:
    """Replace a rejected draft by a draw from p, where p - q belongs."""
    verdict = rejection(draft_BM, draft_score_BMV, score_BM1V, **noises)
    at_B = verdict.accepted_B
    drawn_B = (score_BM1V[torch.arange(len(at_B)), at_B].log_softmax(-1) + noises["residual"](at_B)).argmax(-1)
    return Verdict(verdict.tokens_BM1.scatter(1, at_B[:, None], drawn_B[:, None]), at_B)


def always_the_argmax(draft_BM: Tensor, draft_score_BMV: Tensor, score_BM1V: Tensor, **_: Any) -> Verdict:
    """Keep drafts that equal the backbone's best token, as prototypes do."""
    return accept.greedy(draft_BM, score_BM1V)


rejection = accept.rejection


@pytest.mark.parametrize(("broken", "texts"), [(always_accept, 2500), (no_residual, 4000), (always_the_argmax, 1000)])
def test_broken_rules_are_caught(broken: Callable[..., Verdict], texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted biases give p-values below 1e-8 with more texts: of three tokens, the first is no draft any longer."""
    monkeypatch.setattr(accept, "rejection", broken)
    sampling = SAMPLINGS["temperature 1"]
    assert reference.chi_square(sample(sampling, texts=texts), exact(sampling)) < ALARM


# ---------------------------------------------------------------- a row's text is its own


def test_a_row_s_text_depends_on_seed_and_index_alone() -> None:
    """Not on the rows beside it, their number, their options, or when it joined."""
    sampled = Options(max_new_tokens=12, sampling=Sampling(do_sample=True, temperature=1.5), seed=5)
    others = [
        Options(max_new_tokens=7),
        Options(max_new_tokens=15, sampling=Sampling(do_sample=True, top_k=3), seed=8),
        Options(max_new_tokens=10, sampling=Sampling(repetition_penalty=1.5)),
    ]
    model = dual()

    def texts(rows: int, crowd: list[Options]) -> list[list[int]]:
        engine = Engine(model, rows=rows, capacity=60, plan=steps.parse("fixed:4"))
        for place, options in enumerate(crowd):
            engine.add([20 + place, 9], options, index=100 + place)
        ids = [engine.add([5, 6, 7], sampled, index=i) for i in range(4)]
        done = finish(engine)
        return [done[id].token_ids for id in ids]

    alone = texts(1, [])
    assert len({tuple(text) for text in alone}) == 4
    assert texts(1, others) == texts(2, others) == texts(3, []) == texts(7, others) == alone


def test_seeds_give_different_texts_and_the_same_seed_the_same() -> None:
    """Twenty texts each: equal when repeated, different under another seed."""
    sampling = SAMPLINGS["temperature 1"]
    first = sample(sampling, texts=20, seed=1)
    assert sample(sampling, texts=20, seed=1) == first
    assert sample(sampling, texts=20, seed=2) != first
