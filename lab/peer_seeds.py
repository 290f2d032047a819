"""Put the seeds of a race of peers together: means over seeds, with the least and the most.

    python lab/peer_seeds.py results/nano-peers.jsonl 6

A peer's seed is the number at the end of its folder's name (`eagle3-0`). The last number is the backbone's of layers:
tokens are also given for that many layers of work, with those of a peer's own passes.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

file, layers = Path(sys.argv[1]), int(sys.argv[2])
records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

texts: dict[tuple[str, str], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
for one in records:
    if one["kind"] == "result" and one["mode"] != "ar" and "+" not in one["suite"]:  # not behind other questions
        name = one["mode"].partition(":")[2] or one["mode"]
        seed = re.search(r"-(\d+)$", name)
        texts[name[: seed.start()] if seed else name, one["plan"]][seed[0] if seed else ""].append(one)


def total(results: list[Any], key: str) -> int:
    return sum(one["stats"].get(key, 0) for one in results)


def of_a_seed(name: str, results: list[Any]) -> list[float]:
    cycles, own = total(results, "cycles"), sum(sum(one["stats"].get("draft_passes", {}).values()) for one in results)
    kept, first, passes = (total(results, key) for key in ("accepted", "first_tokens", "forwards"))
    deep = 2 if "dflash2" in name else 1  # layers of a drafter
    return [
        kept / max(cycles, 1),
        (kept + first) / max(cycles, 1) + 1,
        total(results, "emitted") / passes,
        own / max(cycles, 1),
        total(results, "emitted") / (passes + own * deep / layers),
        100 * mean(bool(one["right"]) for one in results),
    ]


def spread(values: tuple[float, ...]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{mean(values):.2f}" + ("" if least == most else f" ({least}–{most})")


print(
    "| peer | plan | seeds | accepted | tokens/cycle | tokens/pass | draft passes | by layers | right % | identical |"
)
print("|---" * 10 + "|")
for (name, plan), seeds in sorted(texts.items()):
    figures = zip(*(of_a_seed(name, results) for results in seeds.values()), strict=True)
    same = [one["identical"] for results in seeds.values() for one in results]
    print("|", " | ".join([name, plan, str(len(seeds)), *map(spread, figures), f"{sum(same)} of {len(same)}"]), "|")
