"""Few bfloat16 rows times weights as they lie, by tiles (AMX), beside oneDNN's product over a copy laid out for it.

Products are those of SmolLM2-135M's 30 layers and its head; weights are random. Both take turns, over enough weights
that these come from memory. Writes a JSON line for each number of rows, behind one that says how it was run. `same`
says whether all results have the same bits. Needs a compiler and a CPU with AMX:

    python lab/few_rows.py 2 > results/few-rows.jsonl
"""

import json
import sys
from statistics import median
from time import perf_counter

import torch

from orthrus.bench.lines import head
from orthrus.kernels import compiled
from orthrus.kernels.packed import _copied, _multiply

ROWS, REPEATS = (1, 2, 4, 8, 16, 32, 64), 15
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LAYERS, HEAD = 30, (49_152, 576)


@torch.inference_mode()
def main(threads: int) -> None:
    torch.set_num_threads(threads)
    own = compiled.required("linear_few", by="lab/few_rows.py")
    assert compiled.instructions() == "amx", "a CPU with AMX is required"
    weights = [torch.randn(shape).bfloat16() / 24 for shape in (*SHAPES * LAYERS, HEAD)]
    copies = [_copied([weight]) for weight in weights]
    print(json.dumps(head(dtypes=["bfloat16"])), flush=True)
    for rows in ROWS:
        inputs = {size: torch.randn(1, rows, size).bfloat16() for size in {shape[1] for shape in SHAPES}}
        seconds: dict[str, list[float]] = {"tiles": [], "onednn": []}
        for _ in range(REPEATS):
            started = perf_counter()
            tiled = [own(inputs[weight.shape[1]], weight, None) for weight in weights]
            between = perf_counter()
            packed = [_multiply(inputs[w.shape[1]], copy, None) for w, copy in zip(weights, copies, strict=True)]
            seconds["tiles"].append(between - started)
            seconds["onednn"].append(perf_counter() - between)
        same = all(map(torch.equal, tiled, packed))
        medians = {name: median(times) for name, times in seconds.items()}
        print(json.dumps({"kind": "few rows", "rows": rows, **medians, "same": same}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
