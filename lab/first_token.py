"""What the exact first token gives: blocks of views with it, and with the view's own guess in its place.

All take two passes a cycle under the plan `full`, greedily, in float32. A view with `anchor="twin"` has a slot that
guesses that token, so its very blocks are decoded both ways. One with `anchor="backbone"` has none, and no row that it
was trained to guess by: it is decoded with the exact token alone, and stands beside a twin's guesses as trained for as
many steps. Writes a JSON line for each suite and view, behind one that says how it was run; ratios are cycles of the
first view's guesses over cycles:

    python lab/first_token.py nano FOLDER gsm8k math500 humaneval mt_bench > results/nano-first-token.jsonl
    orthrus sweep recipes/sweeps/first.sweep.toml -o runs/first.jsonl --set data.folder=runs/smollm2/data
    python lab/first_token.py runs/first/twin-0/model,runs/first/backbone-0/model FOLDER \
        gsm8k humaneval mt_bench > results/smollm2-first-token.jsonl
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import orthrus
from orthrus.bench.lines import head
from orthrus.bench.suites import read_suite
from orthrus.decode.drafters import Drafter, ViewDrafter
from orthrus.decode.frames import Reading
from orthrus.decode.passes import Passes
from orthrus.decode.text import encode
from orthrus.model.attachment import config_of
from orthrus.model.markov import markov_of
from orthrus.train.answered import decoded_by

PROMPTS, TOKENS = 10, 64


class Guessed(ViewDrafter):
    """Draft all tokens after the anchor by the view's block; nothing comes of the backbone's row."""

    ahead = False

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Tensor:
        """Return draft logits `[B, M, V]`."""
        before_B1 = torch.full_like(anchor_B, -1)[:, None]
        block = Reading(token_BQ=anchor_B[:, None], stop_BS=before_B1, shown_BJ=anchor_B[:, None], drafts=drafts)
        ahead_BSMV = passes.run(rows, block).ahead_BSMV
        assert ahead_BSMV is not None
        return ahead_BSMV[:, 0]


def main(names: str, folder: str, *suites: str) -> None:
    """Decode each suite's first prompts in every way of every view."""
    torch.set_num_threads(1)
    models = {name: orthrus.load(name, dtype="float32") for name in names.split(",")}
    print(json.dumps(head(dtypes=["float32"], prompts=PROMPTS, tokens=TOKENS)), flush=True)
    for suite in suites:
        items = read_suite(suite, folder=Path(folder), limit=PROMPTS)
        guesses: tuple[int, int] | None = None
        for name, (model, tokenizer) in models.items():
            prompts, anchor = [encode(tokenizer, list(item.messages)) for item in items], config_of(model).anchor
            ways: dict[str, Drafter | None] = {"exact": None}
            if anchor == "twin":
                ways["guessed"] = Guessed(markov_of(model))
            stats = {way: decoded_by(model, prompts, TOKENS, drafter) for way, drafter in ways.items()}
            guesses = guesses or (stats["guessed"].cycles, stats["guessed"].emitted)
            assert {one.emitted for one in stats.values()} == {guesses[1]}, "the same texts are required"
            line = {"kind": "first token", "suite": suite, "cycles_ratio": guesses[0] / stats["exact"].cycles}
            line |= {way: counted.to_dict() for way, counted in stats.items()}
            print(json.dumps(line | ({"view": name, "anchor": anchor} if len(models) > 1 else {})), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
