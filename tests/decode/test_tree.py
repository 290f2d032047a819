"""Draft trees: grown as a plain search grows them, walked as a plain walk does, and never to be seen in a text.

False alarms: each chi-square alarms below 1e-8 and there are fewer than 30 of them, so a right implementation fails
once in more than three million reseedings; with the seeds fixed, always or never.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import orthrus
from orthrus.decode import noise, tree
from orthrus.decode.cycle import Batch, cycle
from orthrus.decode.drafters import ViewDrafter
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.decode.passes import Passes
from orthrus.decode.rows import Row
from orthrus.decode.sampling import Chooser, Context, Drafts
from orthrus.decode.tree import BRANCH, Tree
from orthrus.model.cache import ScratchCache
from orthrus.policy import steps
from orthrus.policy.steps import Step
from tests import reference
from tests.decode.drive import BLOCK, Double, decode, dual, finish
from tests.families import VOCAB, perturb, tiny

ALARM = 1e-8

Path = tuple[int, ...]


def draw_scores(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def paths_of(grown: Tree, row: int) -> list[Path]:
    """Each node's tokens from the root on, in the nodes' order; parents must come first."""
    paths: list[Path] = [()]
    for node, (token, parent) in enumerate(
        zip(grown.token_BN[row].tolist(), grown.parent_BN[row].tolist(), strict=True)
    ):
        assert parent <= node
        paths.append((*paths[parent], token))
    return paths


# ---------------------------------------------------------------- growing


@given(
    rows=st.integers(1, 3),
    slots=st.integers(1, 5),
    vocabulary=st.integers(1, 12),
    nodes=st.integers(1, 60),
    barred=st.sampled_from([0.0, 0.6]),
    scale=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 10**6),
)
def test_grow_equals_best_first_search(
    rows: int, slots: int, vocabulary: int, nodes: int, barred: float, scale: float, seed: int
) -> None:
    """The likeliest paths, whatever the budget: smaller than the block, larger than all the tree there could be.

    Always a tree: parents first, no node twice, depths and ancestors those of the paths. That holds too where most
    tokens are impossible (as after top_k) or all but one as good as impossible: the budget is filled up then.
    """
    scores = draw_scores(seed, rows, slots, vocabulary) * scale
    scores[torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < barred] = -torch.inf
    scores[:, :, 0] = 0.0
    budget = min(nodes, tree.largest(slots, vocabulary))
    grown = tree.grow(scores, nodes=budget)
    assert grown.token_BN.shape == (rows, budget)
    for row in range(rows):
        paths = paths_of(grown, row)
        assert len(set(paths)) == budget + 1
        assert grown.depth_BP[row].tolist() == [len(path) for path in paths]
        above = [[other == path[: len(other)] for other in paths] for path in paths]
        assert grown.ancestor_BPP[row].tolist() == above
        if scale == 1.0:
            logp = scores[row].double().log_softmax(-1).tolist()
            likely = [math.exp(sum(slot[token] for slot, token in zip(logp, path, strict=False))) for path in paths[1:]]
            least = math.exp(-30)  # what a token costs at most
            assert grown.likely_BN[row].tolist() == pytest.approx(likely, rel=0.01, abs=least)
            found = reference.best_first(logp, budget + 1, BRANCH)
            assume(len(found) <= budget or found[budget - 1][0] - found[budget][0] > 0.01)  # no near-tie at the edge
            assert {path for _, path in found[:budget]} <= set(paths)


@given(rows=st.integers(1, 2), slots=st.integers(1, 4), nodes=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_likely_ends_are_where_a_backbone_of_these_odds_leaves(rows: int, slots: int, nodes: int, seed: int) -> None:
    """All walks of a backbone that writes what the drafts' odds say, weighed: the likeliest ends come first."""
    scores = draw_scores(seed, rows, slots, 3)
    grown = tree.grow(scores, nodes=min(nodes, tree.largest(slots, 3)))
    places = grown.token_BN.shape[1] + 1
    for row in range(rows):
        paths, odds = paths_of(grown, row), scores[row].double().softmax(-1).tolist()
        ends = [0.0] * places
        for text in itertools.product(range(3), repeat=slots):
            chance = math.prod(slot[token] for slot, token in zip(odds, text, strict=True))
            ends[max(i for i, path in enumerate(paths) if path == text[: len(path)])] += chance
        for stops in (1, 2, places, places + 3):
            chosen = tree.likely_ends(grown, stops)[row].tolist()
            assert len(set(chosen)) == len(chosen) == min(stops, places)
            best = sorted(ends, reverse=True)[: len(chosen)]
            assert [ends[place] for place in chosen] == pytest.approx(best, abs=0.02)


def test_a_certain_block_gives_the_chain() -> None:
    """Where every slot is sure of one token, a budget of the block's length is that one path."""
    scores = torch.full((1, 6, 10), -torch.inf)
    tokens = [3, 1, 4, 1, 5, 9]
    scores[0, range(6), tokens] = 0.0
    assert paths_of(tree.grow(scores, nodes=6), 0)[-1] == tuple(tokens)


@given(st.integers(1, 6), st.integers(1, 20))
def test_largest_counts_every_node_there_can_be(slots: int, vocabulary: int) -> None:
    """Paths over the likeliest tokens of each slot; beyond a million, only that there are so many."""
    branch = min(BRANCH, vocabulary)
    count = sum(branch**depth for depth in range(1, slots + 1))
    assert tree.largest(slots, vocabulary) == count or min(tree.largest(slots, vocabulary), count) > 1 << 20


# ---------------------------------------------------------------- walking


def backbone(path: Path, seed: int, vocabulary: int) -> int:
    """What a backbone would write after a path: anything, but always the same."""
    return hash((seed, *path)) % vocabulary


def choices_of(grown: Tree, seed: int, vocabulary: int) -> Tensor:
    rows = range(grown.token_BN.shape[0])
    return torch.tensor([[backbone(path, seed + row, vocabulary) for path in paths_of(grown, row)] for row in rows])


@given(
    rows=st.integers(1, 3),
    slots=st.integers(1, 5),
    vocabulary=st.integers(2, 4),
    nodes=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_walk_equals_a_plain_walk(rows: int, slots: int, vocabulary: int, nodes: int, seed: int) -> None:
    """Accepted tokens, bonus, and the nodes the path runs through; past them, each place stands for itself.

    And of the chain of likeliest nodes, how many are accepted and how many there are.
    """
    grown = tree.grow(draw_scores(seed, rows, slots, vocabulary), nodes=min(nodes, tree.largest(slots, vocabulary)))
    path = tree.walk(grown, choices_of(grown, seed, vocabulary), slots=slots)
    assert path.node_BM.shape == (rows, slots)
    assert path.verdict.tokens_BM1.shape == (rows, slots + 1)
    for row in range(rows):
        paths = paths_of(grown, row)
        expected = reference.walk(paths, lambda text, row=row: backbone(text, seed + row, vocabulary))
        accepted = int(path.verdict.accepted_B[row])
        assert path.verdict.tokens_BM1[row, : accepted + 1].tolist() == expected
        nodes_on_path = [paths.index(tuple(expected[:depth])) for depth in range(1, accepted + 1)]
        assert path.node_BM[row].tolist() == nodes_on_path + list(range(accepted + 1, slots + 1))
        chain: Path = ()
        while likeliest := [p for p in paths if len(p) == len(chain) + 1 and p[:-1] == chain]:
            chain = likeliest[0]
        kept = next((i for i, token in enumerate(chain) if expected[i] != token), len(chain))
        assert path.chain_B2[row].tolist() == [kept, len(chain)]


@given(slots=st.integers(1, 4), vocabulary=st.integers(2, 4), seed=st.integers(0, 10**6), data=st.data())
def test_a_tree_that_holds_the_chain_accepts_at_least_what_the_chain_does(
    slots: int, vocabulary: int, seed: int, data: st.DataObject
) -> None:
    """For the same logits, from the first budget that covers the likeliest token of each slot up to all there is."""
    scores = draw_scores(seed, 1, slots, vocabulary)
    drafts = tuple(scores[0].argmax(-1).tolist())
    chain = 0
    while chain < slots and backbone(drafts[:chain], seed, vocabulary) == drafts[chain]:
        chain += 1
    largest = tree.largest(slots, vocabulary)
    ranked = [path for _, path in reference.best_first(scores[0].double().log_softmax(-1).tolist(), largest, BRANCH)]
    enough = min(largest, ranked.index(drafts) + 1 + slots)  # with room to spare for near-ties
    grown = tree.grow(scores, nodes=data.draw(st.integers(enough, largest)))
    verdict = tree.walk(grown, choices_of(grown, seed, vocabulary), slots=slots).verdict
    assert int(verdict.accepted_B[0]) >= chain


# ---------------------------------------------------------------- cycles over a model


class Ranked(Double):
    """A double whose right token is only the second likeliest at every other place."""

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Tensor:
        logits = 8 * super().propose(passes, rows, anchor_B, drafts, states)
        for b, row in enumerate(self.engine.live[rows] if self.engine else []):
            for j in range(len(row.token_ids) % 2, drafts, 2):
                logits[b, j, (int(logits[b, j].argmax()) + 7) % VOCAB] = 9.0
        return logits


PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42], [9, 10, 11, 12, 13]]
COUNTS = [17, 9, 14, 20]


@cache
def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A backbone and its twin-bearing copy; one family's window is shorter than the paths of a tree."""
    more = {"sliding_window": 3} if family == "gemma3_text" else {}
    return tiny(family, **more), dual(family, **more)


@cache
def plain_texts(family: str) -> dict[Path, list[int]]:
    return {tuple(p): reference.greedy_text(pair(family)[0], p, max(COUNTS) + BLOCK) for p in PROMPTS}


def right_at_times(row: Row, place: int) -> bool:
    return hash((row.prompt_ids[0], place)) % 5 != 0


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_accepted_keys_end_where_prefill_would_have_put_them(family: str) -> None:
    """Ragged rows, windows shorter than the texts, paths through siblings: after each cycle, valid keys and values
    are those of a plain prefill of the same text, to 1e-5, and the text is the backbone's.
    """
    texts, model = plain_texts(family), pair(family)[1]
    double = Ranked(texts, right_at_times)
    chosen = steps.parse("tree:20")
    engine = Engine(model, rows=3, capacity=64, plan=chosen, drafter=double)
    double.engine = engine
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        engine.add(prompt, Options(max_new_tokens=count))
    accepted: Counter[int] = Counter()
    while engine.busy:
        for progress in engine.step():
            accepted[progress.accepted] += 1
            row = progress.row
            assert row.token_ids == texts[tuple(row.prompt_ids)][: len(row.token_ids)]
        for place, row in enumerate(engine.live):
            valid = (row.prompt_ids + row.token_ids)[:-1]
            assert engine.cache.lengths[place] == len(valid)
            fresh = ScratchCache(rows=1, capacity=64)
            with torch.inference_mode():
                Passes(model, fresh).prefill(slice(0, 1), [valid], chunk=512)
            for kept, plain in zip(engine.cache.keys + engine.cache.values, fresh.keys + fresh.values, strict=True):
                torch.testing.assert_close(kept[place, : len(valid)], plain[0, : len(valid)], rtol=1e-5, atol=1e-5)
    assert max(accepted) >= 3  # else nothing was moved


def test_a_tree_cycle_accepts_at_least_what_a_chain_cycle_does() -> None:
    """The same rows, the same draft logits (a twin's of two slots), all of the tree there is."""
    model = orthrus.attach(
        tiny("qwen3", vocab_size=8), orthrus.OrthrusConfig(block_size=3), attn_implementation="orthrus"
    )
    perturb(model)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 8, rng.integers(1, 9)).tolist() for _ in range(40)]
    outcomes = []
    for step in (Step(2), Step(2, nodes=tree.largest(2, 8))):
        cache = ScratchCache(rows=40, capacity=9 + step.scratch)
        passes, rows = Passes(model, cache), slice(0, 40)
        with torch.inference_mode():
            passes.prefill(rows, [p[:-1] for p in prompts], chunk=512)
            batch = Batch(
                rows=rows,
                anchor_B=torch.tensor([p[-1] for p in prompts]),
                context=Context(torch.arange(40), cache.length_R),
                groups=[(Chooser(Sampling()), None)],
                drawing=rows,
            )
            outcomes.append(cycle(passes, batch, step, drafter=ViewDrafter()).tokens)
    chains, trees = outcomes
    assert all(grown[: len(short)] == short for short, grown in zip(chains, trees, strict=True))
    assert sum(map(len, trees)) > 1.2 * sum(map(len, chains))


@pytest.mark.parametrize("nodes", [1, 6, 40])
def test_repetition_penalty_in_trees_equals_the_plain_loop(nodes: int) -> None:
    """Each node has the past of its own path; penalties of several strengths and none share a batch."""
    plain, model = pair("qwen3")
    samplings = [Sampling(repetition_penalty=x) for x in (1.0, 1.7, 1.3, 0.7)]
    expected = [reference.greedy_text(plain, p, 12, s) for p, s in zip(PROMPTS, samplings, strict=True)]
    double = Ranked({tuple(p): [*t, *[0] * BLOCK] for p, t in zip(PROMPTS, expected, strict=True)}, right_at_times)
    options = [Options(max_new_tokens=12, sampling=s) for s in samplings]
    engine = Engine(model, rows=3, capacity=80, plan=steps.parse(f"tree:{nodes}"), drafter=double)
    double.engine = engine
    rows = decode(engine, PROMPTS, options)
    assert [row.token_ids for row in rows] == expected
    assert sum(row.stats.accepted for row in rows) > 0


# ---------------------------------------------------------------- sampling

V = 4
SAMPLED = [
    Sampling(do_sample=True),
    Sampling(do_sample=True, temperature=1.6, top_k=3, repetition_penalty=1.4),
]


@cache
def small_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Four tokens, two draft slots."""
    config = orthrus.OrthrusConfig(block_size=3)
    model = orthrus.attach(tiny("qwen3", vocab_size=V), config, attn_implementation="orthrus")
    perturb(model)
    return tiny("qwen3", vocab_size=V), model


@pytest.mark.parametrize("sampling", SAMPLED)
def test_sampled_trees_write_what_the_same_noise_writes_plainly(sampling: Sampling) -> None:
    """Forty seeds of seven tokens: the very tokens of a plain loop that adds the noise of each position, any budget."""
    plain, model = small_pair()
    prompt, count, seeds = [1, 2], 7, range(40)
    expected = [
        reference.coupled_text(plain, prompt, count, sampling, lambda position, s=seed: noise_at(s, position))
        for seed in seeds
    ]
    assert len({tuple(text) for text in expected}) > 20
    for nodes in (2, 5, 50):
        engine = Engine(model, rows=40, capacity=80, plan=steps.parse(f"tree:{nodes}"))
        options = [Options(max_new_tokens=count, sampling=sampling, seed=seed) for seed in seeds]
        ids = [engine.add(prompt, each) for each in options]
        rows = finish(engine)
        assert [rows[id].token_ids for id in ids] == expected
        assert sum(rows[id].stats.accepted for id in ids) > 0


def noise_at(seed: int, position: int) -> np.ndarray:
    stream = torch.tensor([noise.stream_of(seed, 0)])
    return noise.gumbel(stream, torch.tensor([[position]]), noise.TARGET, V)[0, 0].double().numpy()


def test_sampled_trees_have_the_backbone_s_distribution() -> None:
    """All 64 texts of three tokens against their exact chances; 2,500 draws, budgets that cut off half the tree."""
    plain, model = small_pair()
    engine = Engine(model, rows=100, capacity=40, plan=steps.parse("tree:5"))
    for index in range(2500):
        engine.add([1, 2], Options(max_new_tokens=3, sampling=SAMPLED[1], seed=5), index=index)
    counts = Counter(tuple(row.token_ids) for row in finish(engine).values())
    assert reference.chi_square(counts, reference.chain(plain, [1, 2], 3, V, SAMPLED[1])) > ALARM


@pytest.mark.parametrize(("coupled", "nodes"), [(False, 2), (False, 3), (True, 2)])
def test_plain_steps_after_trees_leave_the_distribution(coupled: bool, nodes: int) -> None:
    """A tree of two slots over a toy backbone, then a plain step where only one token came of it: 200,000 pairs.

    A tree decides by its nodes where the cycle stops. Were they chosen by noise of positions past that stop, which
    the next cycle draws anew, the pairs' distribution would shift (planted, this gives p-values below 1e-20).
    """
    B, generator = 200_000, torch.Generator().manual_seed(3)
    first, second, slots = (torch.randn(*shape, generator=generator) for shape in ((V,), (V, V), (2, V)))
    chooser = Chooser(Sampling(do_sample=True), coupled=coupled)
    stream = torch.randint(-(2**62), 2**62, (B,), generator=generator)
    start, later = (Context(stream, torch.full((B,), place)) for place in (2, 3))
    grown = tree.grow(chooser.branch(slots.expand(B, 2, V) * 1.5, start), nodes=nodes)
    # After a node of depth 1 the backbone says `second`; what it says deeper down is beyond the pair.
    after = second[torch.nn.functional.pad(grown.token_BN, (1, 0))]
    after[:, 0] = first
    verdict = tree.walk(grown, chooser.choices(after, start, grown), slots=2).verdict
    one = verdict.tokens_BM1[:, 0]
    nothing = Drafts(torch.empty(B, 0, dtype=torch.long), None)
    redrawn = chooser.judge(nothing, second[one][:, None], later).tokens_BM1[:, 0]
    two = torch.where(verdict.accepted_B > 0, verdict.tokens_BM1[:, 1], redrawn)
    counts = Counter(zip(one.tolist(), two.tolist(), strict=True))
    chances = first.double().softmax(0)[:, None] * second.double().softmax(1)
    assert 0 < int((verdict.accepted_B > 0).sum()) < B
    pairs = {(i, j): float(chances[i, j]) for i in range(V) for j in range(V)}
    assert reference.chi_square(counts, pairs) > ALARM
