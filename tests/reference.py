"""Slow, obvious specifications that the package is tested against.

Written from the definitions, with loops over single numbers, and sharing nothing with the package but the names of
its options. Shapes: B rows, Q query rows, S cache slots, V vocabulary; `[V]` alone is a list or a numpy array.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orthrus.decode.options import Sampling

Grid = list[list[list[bool]]]
Distribution = NDArray[np.float64]


# ---------------------------------------------------------------- masks


def up_to(limit: list[list[int]], span: int) -> Grid:
    """Slot s is seen when it is not past the query's limit."""
    return [[[s <= last for s in range(span)] for last in row] for row in limit]


def tree(length: list[int], parent: list[list[int | None]], span: int) -> Grid:
    """Node i sees the prefix and every node on its path to the root; a root has no parent."""
    grid: Grid = []
    for n, parents in zip(length, parent, strict=True):
        rows = []
        for node in range(len(parents)):
            path: set[int] = set()
            at: int | None = node
            while at is not None:
                path.add(at)
                at = parents[at]
            rows.append([s < n or s - n in path for s in range(span)])
        grid.append(rows)
    return grid


def ahead(length: list[int], stop: list[list[int]], rows: int, block: int, span: int, causal: bool = False) -> Grid:
    """A slot of block s sees the text up to the s-th stop, and the slots of block s; blocks lie behind the AR rows.

    In causal blocks it sees those up to itself.
    """
    grid: Grid = []
    for n, stops in zip(length, stop, strict=True):
        seen = []
        for s, accepted in enumerate(stops):
            first = n + rows + s * block
            for j in range(block):
                last = first + (j if causal else block - 1)
                seen.append([slot <= n + accepted or first <= slot <= last for slot in range(span)])
        grid.append(seen)
    return grid


def packed(document: list[list[int]]) -> Grid:
    """A position sees earlier ones of its own document, and itself; padding (-1) sees itself alone."""
    grid: Grid = []
    for row in document:
        T = len(row)
        grid.append([[q == k or (k < q and row[q] == row[k] != -1) for k in range(T)] for q in range(T)])
    return grid


def training(
    document: list[list[int]], anchor: list[list[int]], valid: list[list[bool]], block: int, causal: bool = False
) -> Grid:
    """Draft row (b, j) sees AR keys of its document before its anchor, and all of block b; if causal, up to itself."""
    grid: Grid = []
    for row, anchors, alive in zip(document, anchor, valid, strict=True):
        rows = []
        for b, a in enumerate(anchors):
            for j in range(block):
                prefix = [alive[b] and k < a and row[k] == row[a] for k in range(len(row))]
                own = [
                    other // block == b and (not causal or other % block <= j) for other in range(len(anchors) * block)
                ]
                rows.append(prefix + own)
        grid.append(rows)
    return grid


def windowed(allowed: Grid, query: list[list[int]], key: list[int], window: int) -> Grid:
    """Narrow a mask: a query at p sees keys at positions p - window + 1 and later."""
    return [
        [[ok and key[s] > p - window for s, ok in enumerate(seen)] for seen, p in zip(rows, positions, strict=True)]
        for rows, positions in zip(allowed, query, strict=True)
    ]


# ---------------------------------------------------------------- attention and cache


def attention(
    query_BHQD: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Callable[[int, int, int], bool],
    *,
    scaling: float,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention in float64, one query at a time, keys repeated for grouped queries; `[B, Q, H, D]`."""
    B, H, Q, _ = query_BHQD.shape
    groups, S = H // key.shape[1], key.shape[2]
    out = torch.zeros(B, Q, H, value.shape[3], dtype=torch.float64)
    for b, h, q in itertools.product(range(B), range(H), range(Q)):
        weights: dict[int, float] = {}
        for s in range(S):
            if allowed(b, q, s):
                score = float(query_BHQD[b, h, q].double() @ key[b, h // groups, s].double()) * scaling
                weights[s] = math.exp(score if softcap is None else softcap * math.tanh(score / softcap))
        total = sum(weights.values()) + (0.0 if sink_H is None else math.exp(float(sink_H[h])))
        for s, weight in weights.items():
            out[b, q, h] += weight / total * value[b, h // groups, s].double()
    return out


class ListCache:
    """A cache of one number per position, as lists; slots past a row's length may hold anything."""

    def __init__(self, rows: int) -> None:
        self.valid: list[list[float]] = [[] for _ in range(rows)]
        self.scratch: list[dict[int, float]] = [{} for _ in range(rows)]

    def write(self, row: int, slot: int, number: float) -> None:
        """Put a number in a slot, valid or not."""
        if slot < len(self.valid[row]):
            self.valid[row][slot] = number
        else:
            self.scratch[row][slot] = number

    def commit(self, row: int, count: int) -> None:
        """Keep the next `count` slots, which have been written."""
        start = len(self.valid[row])
        self.valid[row] += [self.scratch[row][slot] for slot in range(start, start + count)]

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's end."""
        del self.valid[row][length:]

    def swap_rows(self, one: int, other: int) -> None:
        """Exchange two rows."""
        self.valid[one], self.valid[other] = self.valid[other], self.valid[one]

    def move_slots(self, row: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy scratch slots; all sources are read before anything is written."""
        numbers = [self.scratch[row][slot] for slot in sources]
        for slot, number in zip(targets, numbers, strict=True):
            self.scratch[row][slot] = number


# ---------------------------------------------------------------- choosing tokens


def scores(logits: Sequence[float], seen: set[int], sampling: Sampling) -> list[float]:
    """Penalise what the text contains already; nothing else moves a greedy choice."""
    penalty = sampling.repetition_penalty
    return [(x * penalty if x < 0 else x / penalty) if token in seen else x for token, x in enumerate(logits)]


def distribution(logits: Sequence[float], seen: set[int], sampling: Sampling) -> Distribution:
    """The processed distribution: penalty, temperature, top-k, top-p, min-p, in transformers' order, in float64."""
    x = np.array(scores(logits, seen, sampling), dtype=np.float64) / sampling.temperature
    if sampling.top_k:
        x[x < np.sort(x)[-min(sampling.top_k, len(x))]] = -np.inf
    if sampling.top_p < 1:
        # A token stays when it and everything less likely weigh more than 1 - top_p; the likeliest always stays.
        p, kept = _softmax(x), x.copy()
        order = np.argsort(x, kind="stable")
        for i, token in enumerate(order[:-1]):
            if p[order[: i + 1]].sum() <= 1 - sampling.top_p:
                kept[token] = -np.inf
        x = kept
    if sampling.min_p > 0:
        p = _softmax(x)
        x[p < sampling.min_p * p.max()] = -np.inf
    return _softmax(x)


def _softmax(x: Distribution) -> Distribution:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def greedy_text(model: nn.Module, prompt: Sequence[int], count: int, sampling: Sampling | None = None) -> list[int]:
    """The plain loop: the whole text through the model, the best token appended, again and again; no cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token_1T = torch.tensor([ids], device=next(model.parameters()).device)
            logits = model(input_ids=token_1T, use_cache=False).logits[0, -1].tolist()
            best = scores(logits, set(ids), sampling or Sampling())
            ids.append(best.index(max(best)))
    return ids[len(prompt) :]


def chain(
    model: nn.Module, prompt: list[int], length: int, vocabulary: int, sampling: Sampling
) -> dict[tuple[int, ...], float]:
    """The exact chance of every text of `length` tokens under plain sampling."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        texts = list(chances)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + list(t) for t in texts]), use_cache=False).logits[:, -1]
        grown = {}
        for text, row in zip(texts, logits.tolist(), strict=True):
            p = distribution(row, {*prompt, *text}, sampling)
            grown |= {(*text, token): chances[text] * float(p[token]) for token in range(vocabulary)}
        chances = grown
    return chances


def chi_square(counts: dict[tuple[int, ...], int], chances: dict[tuple[int, ...], float]) -> float:
    """Return the p-value of Pearson's test; outcomes expected fewer than 10 times share one bin.

    An outcome of chance zero that was seen gives 0.
    """
    total = sum(counts.values())
    if any(chances.get(outcome, 0.0) == 0.0 for outcome in counts):
        return 0.0
    bins: list[tuple[float, float]] = []
    rare_seen = rare_expected = 0.0
    for outcome, chance in chances.items():
        if chance * total < 10:
            rare_seen, rare_expected = rare_seen + counts.get(outcome, 0), rare_expected + chance * total
        else:
            bins.append((counts.get(outcome, 0), chance * total))
    if rare_expected >= 10:
        bins.append((rare_seen, rare_expected))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    freedom = torch.tensor((len(bins) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def coupled_text(
    model: nn.Module, prompt: Sequence[int], count: int, sampling: Sampling, noise: Callable[[int], Distribution]
) -> list[int]:
    """Plain sampling with given noise: the likeliest token once position p's Gumbel noise is added, one by one."""
    ids = list(prompt)
    with torch.no_grad(), np.errstate(divide="ignore"):
        for _ in range(count):
            token_1T = torch.tensor([ids], device=next(model.parameters()).device)
            logits = model(input_ids=token_1T, use_cache=False).logits[0, -1].tolist()
            chances = distribution(logits, set(ids), sampling)
            ids.append(int(np.argmax(np.log(chances) + noise(len(ids)))))
    return ids[len(prompt) :]


# ---------------------------------------------------------------- acceptance


def accept_greedy(drafts: Sequence[int], own: Sequence[int]) -> list[int]:
    """Emit the backbone's own tokens for as long as the drafts foresaw them."""
    emitted = []
    for slot, token in enumerate(own):
        emitted.append(token)
        if slot < len(drafts) and drafts[slot] != token:
            break
    return emitted


def residual(p: Distribution, q: Distribution) -> Distribution:
    """What p has more than q, as a distribution; p itself where it has nothing more."""
    left = np.maximum(p - q, 0)
    return left / left.sum() if left.sum() > 0 else p


def accept_sampled(
    drafts: Sequence[int],
    q: Sequence[Distribution],
    p: Sequence[Distribution],
    uniform: Sequence[float],
    gumbel: Sequence[Distribution],
) -> list[int]:
    """Leviathan et al. (2211.17192), algorithm 1, one draft at a time, with the noise given."""
    emitted: list[int] = []
    for slot, token in enumerate(drafts):
        if uniform[slot] * q[slot][token] < p[slot][token]:
            emitted.append(token)
            continue
        left = residual(p[slot], q[slot])
        break
    else:
        left = p[len(drafts)]
    with np.errstate(divide="ignore"):
        return [*emitted, int(np.argmax(np.log(left) + gumbel[len(emitted)]))]


def emitted_chances(
    q: Sequence[Distribution], p_after: Callable[[tuple[int, ...]], Distribution]
) -> dict[tuple[int, ...], float]:
    """The exact chance of each text of len(q) + 1 tokens when one cycle of rejection sampling begins it.

    Every draft sequence, every decision and every residual draw is enumerated; where the cycle ends early, the text
    goes on by p. `p_after` gives the backbone's distribution after some tokens.
    """
    length = len(q) + 1
    chances: dict[tuple[int, ...], float] = {}

    def go_on(text: tuple[int, ...], chance: float) -> None:
        if chance == 0.0:
            return
        if len(text) == length:
            chances[text] = chances.get(text, 0.0) + chance
            return
        for token, own in enumerate(p_after(text)):
            go_on((*text, token), chance * float(own))

    for drafts in itertools.product(*(range(len(slot)) for slot in q)):
        chance = math.prod(float(q[slot][token]) for slot, token in enumerate(drafts))
        for slot, token in enumerate(drafts):
            if chance == 0.0:
                break
            text, p = drafts[:slot], p_after(drafts[:slot])
            keep = min(1.0, float(p[token]) / float(q[slot][token]))
            for other, share in enumerate(residual(p, q[slot])):
                go_on((*text, other), chance * (1 - keep) * float(share))
            chance *= keep
        go_on(drafts, chance)
    return chances


# ---------------------------------------------------------------- trees


def best_first(logp: Sequence[Sequence[float]], nodes: int, branch: int) -> list[tuple[float, tuple[int, ...]]]:
    """The likeliest paths, best first, by a heap: whatever is taken offers its children; impossible tokens are none."""
    likely = [
        [t for t in sorted(range(len(slot)), key=lambda t: -slot[t])[:branch] if slot[t] > -math.inf] for slot in logp
    ]
    heap = [(-logp[0][token], (token,)) for token in likely[0]]
    heapq.heapify(heap)
    taken = []
    while heap and len(taken) < nodes:
        cost, path = heapq.heappop(heap)
        taken.append((-cost, path))
        if len(path) < len(logp):
            for token in likely[len(path)]:
                heapq.heappush(heap, (cost - logp[len(path)][token], (*path, token)))
    return taken


def walk(paths: Sequence[tuple[int, ...]], choice: Callable[[tuple[int, ...]], int]) -> list[int]:
    """Write what `choice` says after each prefix; where that is no path of the tree, it is the last token."""
    text: tuple[int, ...] = ()
    while True:
        text = (*text, choice(text))
        if text not in paths:
            return list(text)


# ---------------------------------------------------------------- statistics


@dataclass
class Trace:
    """Statistics of one completion, counted cycle by cycle."""

    cycles: int = 0
    accepted: int = 0
    emitted: int = 0
    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)


def trace(length: int, drafts: int, right: Callable[[int], bool]) -> Trace:
    """Count a text of `length` tokens decoded with drafts whose token at place i is right when `right(i)` says so."""
    slots = drafts if length else 0
    out = Trace(proposed_at=[0] * slots, accepted_at=[0] * slots)
    while out.emitted < length:
        out.cycles += 1
        agreed = 0
        while agreed < drafts and right(out.emitted + agreed):
            agreed += 1
        kept = min(agreed + 1, length - out.emitted)
        for slot in range(drafts):
            out.proposed_at[slot] += 1
            out.accepted_at[slot] += slot < min(agreed, kept)
        out.accepted += min(agreed, kept)
        out.emitted += kept
    return out
