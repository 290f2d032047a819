"""Few bfloat16 rows times weights as they lie, by tiles (AMX), beside oneDNN's product over a copy laid out for it.

A tile of 16 rows of weights is loaded as it lies; rows are put into pairs once. Products are those of SmolLM2-135M's 30
layers and its head, weights are random, so that they come from memory. Both take turns. Writes a JSON line for each
number of rows, behind one that says how it was run; needs a compiler and a CPU with AMX:

    python lab/few_rows.py 2 > results/few-rows.jsonl
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

from orthrus.bench.lines import head
from orthrus.kernels import compiled
from orthrus.kernels.packed import _product, _reorder

ROWS, REPEATS = (1, 2, 4, 8, 16), 15
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LAYERS, HEAD = 30, (49_152, 576)
SOURCE = r"""
#include "operators.h"

namespace orthrus {
constexpr int64_t AT_ONCE = 1 << 17;

// input [R, K], R up to 16, and weight [N, K], in bfloat16; N is a multiple of 16, K of 32.
Tensor few(const Tensor& input, const Tensor& weight) {
  int64_t R = input.size(0), K = input.size(1), N = weight.size(0);
  Tensor out = at::empty({R, N}, input.options());
  const uint16_t *in = (const uint16_t*)input.const_data_ptr(), *matrix = (const uint16_t*)weight.const_data_ptr();
  uint16_t* to = (uint16_t*)out.mutable_data_ptr();
  TORCH_CHECK(tile_rows() == 16, "needs tiles");
  std::vector<uint16_t> pairs(K * 16);  // [K / 2, 16, 2]
  for (int64_t r = 0; r < R; r++)
    for (int64_t k = 0; k < K; k++) pairs[(k / 2 * 16 + r) * 2 + k % 2] = in[r * K + k];
  at::parallel_for(0, N / 16, std::max<int64_t>(1, AT_ONCE / (K * 16)), [&](int64_t start, int64_t stop) {
    Tiles set;
    alignas(64) float sums[16 * 16];
    for (int64_t g = start; g < stop; g++) {
      const uint16_t* from = matrix + g * 16 * K;
      _tile_zero(0);
      for (int64_t k = 0; k < K; k += 32) {
        for (int64_t i = 0; i < 16; i++) _mm_prefetch((const char*)(from + (16 + i) * K + k), _MM_HINT_T1);
        _tile_loadd(1, from + k, K * 2);
        _tile_loadd(2, pairs.data() + k * 16, 64);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, sums, 64);
      for (int64_t r = 0; r < R; r++)
        for (int64_t i = 0; i < 16; i++) narrow(sums[i * 16 + r], to + r * N + g * 16 + i);
    }
  });
  return out;
}
}  // namespace orthrus

TORCH_LIBRARY(orthrus_lab, library) { library.def("few(Tensor input, Tensor weight) -> Tensor", &orthrus::few); }
"""


def load() -> None:
    """Compile and load the operator."""
    home = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "few.cpp", Path(folder) / "few.so"
        source.write_text(SOURCE)
        options = [*compiled._options("amx"), "-fopenmp", "-shared", f"-I{home}/include", f"-I{compiled._FOLDER}"]
        made = [*compiled._compiler(), *options, source, "-o", library, f"-L{home}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run(made, check=True)
        torch.ops.load_library(library)


@torch.inference_mode()
def main(threads: int) -> None:
    torch.set_num_threads(threads)
    load()
    weights = [torch.randn(shape).bfloat16() / 24 for shape in (*SHAPES * LAYERS, HEAD)]
    copies = [_reorder(weight, 16) for weight in weights]
    print(json.dumps(head(dtypes=["bfloat16"])), flush=True)
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size).bfloat16() for size in {shape[1] for shape in SHAPES}}
        seconds: dict[str, list[float]] = {"tiles": [], "onednn": []}
        for _ in range(REPEATS):
            started = perf_counter()
            tiled = [torch.ops.orthrus_lab.few(inputs[weight.shape[1]], weight) for weight in weights]
            between = perf_counter()
            packed = [
                _product(inputs[weight.shape[1]], copy, None, "none", [], "")
                for weight, copy in zip(weights, copies, strict=True)
            ]
            seconds["tiles"].append(between - started)
            seconds["onednn"].append(perf_counter() - between)
        difference = max(map(apart, tiled, packed))
        medians = {name: median(times) for name, times in seconds.items()}
        print(json.dumps({"kind": "few rows", "rows": rows, **medians, "difference": difference}), flush=True)


def apart(one: Tensor, other: Tensor) -> float:
    """Return how far results are apart, relative to their size."""
    return float((one.float() - other.float()).norm() / other.float().norm())


if __name__ == "__main__":
    main(int(sys.argv[1]))
