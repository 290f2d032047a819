"""What the exact first token gives: the same view's blocks with it, and with the view's own guess in its place.

Both take two passes a cycle under the plan `full`, greedily, in float32. Needs a view with `anchor="twin"`, whose first
slot guesses that token. Writes a JSON line for each suite, behind one that says how it was run:

    python lab/first_token.py nano FOLDER gsm8k math500 humaneval mt_bench > results/nano-first-token.jsonl
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
from orthrus.train.heldout import decoded_by

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


def main(name: str, folder: str, *suites: str) -> None:
    """Decode each suite's first prompts both ways."""
    torch.set_num_threads(1)
    model, tokenizer = orthrus.load(name, dtype="float32")
    assert config_of(model).anchor == "twin", "a view that reads the anchor is required"
    print(json.dumps(head(dtypes=["float32"], prompts=PROMPTS, tokens=TOKENS)))
    ways: dict[str, Drafter | None] = {"exact": None, "guessed": Guessed(markov_of(model))}
    for suite in suites:
        prompts = [
            encode(tokenizer, list(item.messages)) for item in read_suite(suite, folder=Path(folder), limit=PROMPTS)
        ]
        stats = {way: decoded_by(model, prompts, TOKENS, drafter) for way, drafter in ways.items()}
        assert stats["exact"].emitted == stats["guessed"].emitted, "the same texts are required"
        ratio = stats["guessed"].cycles / stats["exact"].cycles
        counts = {way: counted.to_dict() for way, counted in stats.items()}
        print(json.dumps({"kind": "first token", "suite": suite, "cycles_ratio": ratio, **counts}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
