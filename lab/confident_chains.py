"""Whether a chain that is cut by the view's own confidence before it is verified would be faster, by replay.

SmolLM2 in int8 answers prompts plainly. Behind every token of an answer a draft pass then says what the view drafts,
how probable each draft is, and so how many are kept: whatever a policy does, its next cycle is known. Prices of passes
come from files that `orthrus bench passes` wrote; those of the 8B shape on an H100 stand for a GPU. Ways to decode:

* `counts`: as many drafts as `orthrus.policy.acceptance` expects the highest speed of, all of them verified;
* `online`: the same, but of the drafts only the first n are verified, the n of the most tokens less their time at the
  speed that counts expect. A logistic regression on the log-odds of the draft and of its slot's count says how surely
  each is kept. It learns from drafts that were verified, and counts take its word for those that were not;
* `fitted`: the same regression, fitted beforehand to all these answers, which no engine can have;
* `oracle`: just as many drafts are verified as are kept.

Each also with a fixed number of tokens drafted, the backbone's own first one included. Writes a JSON line for each
price list and way, behind one that says how it was run:

    python lab/confident_chains.py FOLDER 20 gsm8k humaneval mt_bench > results/confident-chains.jsonl
"""

import json
import sys
from dataclasses import dataclass
from itertools import product
from math import log
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import orthrus
from orthrus.bench.lines import head
from orthrus.bench.session import encoded
from orthrus.bench.speed.prices import Prices
from orthrus.bench.suites import read_suites
from orthrus.decode.passes import Passes
from orthrus.kernels import compiled
from orthrus.model.cache import ScratchCache
from orthrus.policy.acceptance import FADE, VIEW, Acceptance, RowOutcome, RowState, expected
from orthrus.policy.policy import TRIAL, WAIT
from orthrus.policy.steps import LENGTHS, slots

TOKENS, ORDERS, CONTEXT, RESAMPLED = 96, 4, 256, 1000
LISTS = {
    "int8, Xeon with AMX": ("results/smollm2-passes-amx.jsonl", "int8"),
    "int8, EPYC with AVX-512": ("results/smollm2-passes.jsonl", "int8"),
    "bfloat16, 8B shape on an H100": ("results/qwen3-8b-passes-h100.jsonl", "bfloat16"),
}
WAYS = ("counts", "online", "fitted", "oracle")
FIXED = (None, 3, 4, 6, 8)


@dataclass
class Answer:
    """An answer, and what the view drafts behind each of its tokens: how probable each draft is, how many are kept."""

    suite: str
    steps: int
    chance: list[list[float]]
    kept: list[int]


class Calibration:
    """How surely a draft is kept once those before it are: a logistic regression, newer drafts a little heavier."""

    def __init__(self, learns: bool = True) -> None:
        self.learns = learns
        self.weight = np.array([0.0, 0.7, 0.3])
        self.curve = 4 * np.eye(3)

    def __call__(self, chance: float, rate: float) -> float:
        return float(1 / (1 + np.exp(-self.weight @ _inputs(chance, rate))))

    def learn(self, chance: float, rate: float, kept: bool) -> None:
        """Take a step of Newton's method."""
        if self.learns:
            x, said = _inputs(chance, rate), self(chance, rate)
            self.curve = 0.9995 * self.curve + said * (1 - said) * np.outer(x, x)
            self.weight = self.weight + np.linalg.solve(self.curve, x) * (kept - said)


def _inputs(*chances: float) -> np.ndarray[Any, Any]:
    inside = (min(max(chance, 1e-4), 1 - 1e-4) for chance in chances)
    return np.array([1.0, *(log(chance / (1 - chance)) for chance in inside)])


@torch.inference_mode()
def answers(folder: str, limit: int, suites: tuple[str, ...]) -> tuple[list[Answer], int]:
    """Let the model answer, and draft behind every token; returns the answers, and how many tokens a pass proposes."""
    model, tokenizer = orthrus.load("smollm2", dtype="int8")
    prompts, _ = encoded(read_suites(suites, folder=Path(folder), limit=limit), model, tokenizer)
    out, row = [], slice(0, 1)
    for prompt in prompts:
        ids = prompt.token_ids
        (done,) = orthrus.generate(model, tokenizer, [ids], mode="ar", max_new_tokens=TOKENS)
        text = [*ids, *done.token_ids]
        cache = ScratchCache(rows=1, capacity=len(text) + 32)
        passes = Passes(model, cache)
        assert passes.markov is not None
        passes.prefill(row, [ids], chunk=512)
        answer = Answer(prompt.item.suite, len(done.token_ids) - 1, [], [])
        for n in range(len(ids), len(text) - 1):
            made = passes.draft(row, torch.tensor(text[n : n + 1]), passes.config.proposals - 1)
            cache.commit(row, [1])
            assert made.first_B1V is not None
            assert int(made.first_B1V.argmax()) == text[n + 1], "a draft pass must write plain decoding's token"
            token_BM, score_BMV = passes.markov.likeliest(made.logits_BMV, torch.tensor(text[n + 1 : n + 2]))
            answer.chance.append(score_BMV.softmax(-1).gather(2, token_BM[:, :, None]).flatten().tolist())
            right = [draft == token for draft, token in zip(token_BM[0].tolist(), text[n + 2 :], strict=False)]
            answer.kept.append([*right, False].index(False))
        out.append(answer)
    return out, passes.config.proposals


class Replay:
    """Decode answers in some order by a price list, in one way; experience stays from each answer to the next."""

    def __init__(self, prices: Prices, proposals: int, way: str, fixed: int | None, calibration: Calibration) -> None:
        def seconds(kind: str, width: int) -> float:
            return prices.seconds(kind, width, batch=1, context=CONTEXT)

        self.verify = [seconds("verify", width) for width in range(proposals + 1)]  # by positions; 1 is a plain step
        # `bench passes` names draft passes by the block that an anchor of the view's would begin.
        self.draft = [0.0, self.verify[1], *(seconds("draft", tokens + 1) for tokens in range(2, proposals + 1))]
        self.way, self.fixed, self.calibration = way, fixed, calibration
        self.lengths = [m for m in LENGTHS if m <= proposals] if fixed is None else [fixed]
        self.usual = Acceptance(slots(proposals + 1), FADE**0.2)
        self.block, self.idle, self.wait = proposals + 1, 0, WAIT[0]
        self.seen: list[tuple[float, float, bool]] = []

    def seconds(self, answer: Answer) -> float:
        """Return what the cycles of an answer take."""
        row, at, taken = RowState(Acceptance(slots(self.block))), 0, 0.0
        while at < answer.steps:
            token_M = expected([row], self.usual)[0, VIEW]
            speed, drafts = max((token_M[m] / (self.draft[m] + self.verify[m]), m) for m in self.lengths)
            if self.fixed is None and speed < 1 / self.verify[1]:
                speed, drafts = 1 / self.verify[1], 0
            trial = drafts == 0 and self.idle >= self.wait
            drafts = TRIAL.drafts if trial else drafts
            if drafts == 0:
                written, spent, self.idle = 1, self.verify[1], self.idle + 1
                self._count(row, RowOutcome())
            else:
                written, spent = self._cycle(answer, row, at, drafts, speed)
                vain, self.idle = trial and written < spent / self.verify[1], 0
                self.wait = min(2 * self.wait, WAIT[1]) if vain else WAIT[0]
            at, taken = at + written, taken + spent
        return taken

    def tried(self, answer: Answer) -> list[tuple[float, float, bool]]:
        """Decode an answer; return what was known of each draft that was tried, and whether it was kept."""
        self.seen = []
        self.seconds(answer)
        return self.seen

    def _cycle(self, answer: Answer, row: RowState, at: int, drafts: int, speed: float) -> tuple[int, float]:
        """Return what a cycle of so many drafts, the first token among them, writes and takes."""
        token_M = expected([row], self.usual)[0, VIEW]
        gain = np.diff(token_M)
        rates, chances, all_kept = (gain[1:] / gain[:-1]).tolist(), answer.chance[at][: drafts - 1], answer.kept[at]
        sure = [self.calibration(*pair) for pair in zip(chances, rates, strict=False)]
        verified = drafts - 1
        if self.way == "oracle":
            verified = min(all_kept, verified)
        elif self.way != "counts":
            reach = np.cumsum([0.0, *np.cumprod(sure)])
            verified = int(np.argmax(reach - speed * np.array(self.verify[1 : drafts + 1])))
        kept = min(all_kept, verified)
        tried = range(min(kept + 1, verified))
        for j in tried:
            self.seen.append((chances[j], rates[j], j < kept))
            self.calibration.learn(*self.seen[-1])
        judged = drafts - 1 if self.way == "oracle" else verified
        self._count(row, RowOutcome("view", judged + 1, min(all_kept, judged) + 1, True))
        if kept == judged < drafts - 1:  # the others count as they are likely to have gone
            likely = np.cumprod([1.0, *sure[judged:]])
            for counts in (row.acceptance.counts, self.usual.counts):
                counts[:, VIEW, judged + 1 : drafts] += likely[:-1], likely[1:]
        return kept + 2, self.draft[drafts] + self.verify[verified + 1]

    def _count(self, row: RowState, outcome: RowOutcome) -> None:
        for acceptance in (row.acceptance, self.usual):
            acceptance.learn(outcome, None)


def fitted(seen: list[tuple[float, float, bool]]) -> Calibration:
    """Fit a calibration to drafts."""
    out, x_NF = Calibration(learns=False), np.array([_inputs(*pair) for *pair, _ in seen])
    kept_N = np.array([kept for *_, kept in seen], dtype=float)
    for _ in range(20):
        said_N = 1 / (1 + np.exp(-x_NF @ out.weight))
        curve_FF = (x_NF * (said_N * (1 - said_N))[:, None]).T @ x_NF + 1e-3 * np.eye(3)
        out.weight = out.weight + np.linalg.solve(curve_FF, x_NF.T @ (kept_N - said_N))
    return out


def main(folder: str, limit: str, *suites: str) -> None:
    """Replay every way by every price list, in a few orders of the answers, and compare with `counts`."""
    torch.set_num_threads(1)
    compiled.prepare()
    made, proposals = answers(folder, int(limit), suites)
    shared: dict[str, Any] = {
        "answers": len(made),
        "tokens": sum(a.steps for a in made),
        "orders": ORDERS,
        "prices": LISTS,
    }
    print(json.dumps(head(dtypes=["int8"], max_new_tokens=TOKENS, **shared)), flush=True)
    for name, (file, dtype) in LISTS.items():
        prices = Prices.read(Path(file), dtype)
        beforehand, base_N = Calibration(), np.empty(0)
        for fixed, way in product(FIXED, WAYS):
            seconds_N = np.zeros(len(made))
            for seed in range(ORDERS):
                calibration = beforehand if way == "fitted" else Calibration()
                replay = Replay(prices, proposals, way, fixed, calibration)
                for i in Random(seed).sample(range(len(made)), len(made)):
                    seconds_N[i] += replay.seconds(made[i])
            if (way, fixed) == ("counts", None):
                whole, base_N = Replay(prices, proposals, way, proposals, Calibration()), seconds_N
                beforehand = fitted([pair for answer in made for pair in whole.tried(answer)])
            compared = _compared(made, base_N, seconds_N, prices)
            print(json.dumps({"kind": "chains", "list": name, "way": way, "drafted": fixed, **compared}), flush=True)


def _compared(made: list[Answer], base_N: Any, seconds_N: Any, prices: Prices) -> dict[str, Any]:
    """Return how many times as fast as `counts` a way is, pooled, with a 90 % interval over answers, and by suite."""
    drawn = np.random.default_rng(0).integers(0, len(made), (RESAMPLED, len(made)))
    ratios = base_N[drawn].sum(1) / seconds_N[drawn].sum(1)
    plain = sum(a.steps for a in made) * prices.seconds("verify", 1, batch=1, context=CONTEXT) * ORDERS
    of = {suite: np.array([a.suite == suite for a in made]) for suite in dict.fromkeys(a.suite for a in made)}
    return {
        "speed": base_N.sum() / seconds_N.sum(),
        "interval": np.quantile(ratios, [0.05, 0.95]).tolist(),
        "against_plain": plain / seconds_N.sum(),
        "by_suite": {suite: base_N[some].sum() / seconds_N[some].sum() for suite, some in of.items()},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
