"""What `auto` gives by the clock under the policy of this tree, and under the planner of an older one.

Both let nano answer the same prompts, greedily, plainly and under `auto`, in turns: a process each a round. Neither has
operators compiled, nor reads what earlier processes kept, since the older tree knows other operators than this one.
Engines differ too, so each `auto` is also compared with its own plain decoding. Texts must be equal. Writes a JSON
line for each round and one for all, behind one that says how it was run:

    git worktree add --detach /tmp/old fadca35
    python lab/policy_clock.py /tmp/old FOLDER gsm8k humaneval mt_bench > results/policy-clock-trees.jsonl
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from orthrus.bench.lines import head
from orthrus.data.records import read_records
from orthrus.provenance import git_state

ROUNDS, PROMPTS, TOKENS, THREADS = 5, 8, 96, 2
MODES = ("ar", "orthrus")


def answers(tree: Path, folder: str, suites: tuple[str, ...]) -> list[dict[str, Any]]:
    """Let a tree's own `orthrus bench run` answer the prompts in a process; returns its lines."""
    with TemporaryDirectory() as place:
        output = Path(place) / "lines.jsonl"
        options = {"data": folder, "modes": ",".join(MODES), "plans": "auto", "limit": PROMPTS, "rounds": 1}
        options |= {"max-new-tokens": TOKENS, "threads": THREADS, "output": output}
        named = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "orthrus", "bench", "run", "nano", *named, *(f"--suite={s}" for s in suites)]
        where = {**os.environ, "PYTHONPATH": str(tree / "src"), "ORTHRUS_CACHE": ""}
        subprocess.run(command, env=where, check=True, capture_output=True)
        return [line for line in read_records(output) if line["kind"] == "result"]


def main(old: str, folder: str, *suites: str) -> None:
    """Race the trees, and compare seconds pooled over the prompts of a suite."""
    trees = {"old": Path(old), "new": Path(__file__).parents[1]}
    commits = {name: git_state(tree)[0] for name, tree in trees.items()}
    more = {"commits": commits, "prompts": PROMPTS, "tokens": TOKENS, "rounds": ROUNDS, "threads": THREADS}
    print(json.dumps(head(dtypes=["float32"], **more)), flush=True)
    rounds: list[dict[str, dict[str, float]]] = []
    for turn in range(ROUNDS):
        lines = {name: answers(trees[name], folder, suites) for name in (("old", "new"), ("new", "old"))[turn % 2]}
        texts = [{(line["id"], line["mode"]): line["token_hash"] for line in lines[name]} for name in trees]
        assert texts[0] == texts[1], "the same texts are required"
        seconds = {
            suite: {
                f"{name} {mode}": sum(x["seconds"] for x in lines[name] if (x["suite"], x["mode"]) == (suite, mode))
                for name in trees
                for mode in MODES
            }
            for suite in suites
        }
        seconds["all"] = {key: sum(seconds[suite][key] for suite in suites) for key in next(iter(seconds.values()))}
        rounds.append({suite: ratios(of) for suite, of in seconds.items()})
        print(json.dumps({"kind": "round", "round": turn, "seconds": seconds, "ratios": rounds[-1]}), flush=True)
    for suite in (*suites, "all"):
        each = {name: [one[suite][name] for one in rounds] for name in rounds[0][suite]}
        figures = {name: {"median": median(of), "least": min(of), "most": max(of)} for name, of in each.items()}
        print(json.dumps({"kind": "policy clock", "suite": suite, **figures}), flush=True)


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Return how much faster this tree is under `auto` and plainly, and how much `auto` gains over plain in each."""
    old, new = (seconds[f"{name} ar"] / seconds[f"{name} orthrus"] for name in ("old", "new"))
    faster = {mode: seconds[f"old {mode}"] / seconds[f"new {mode}"] for mode in MODES}
    return {"auto": faster["orthrus"], "plain": faster["ar"], "old gain": old, "new gain": new, "gain": new / old}


if __name__ == "__main__":
    main(*sys.argv[1:])
