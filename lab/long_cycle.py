"""A cycle of two passes behind a long text, beside the authors' way of making it, in pairs in one process.

Theirs: transformers' own model of the same shape, `sdpa`, a cache that concatenates keys in every pass and is cropped
after it; a pass over the anchor and 15 masks, then one over the anchor and 15 drafts. Both run through the same layers,
where the view would have attention of its own, of the same shape. Ours: a draft pass (the anchor's row beside a block)
and a verification of the 15 tokens that come of it, as `load` prepares a model. Weights and keys are random. Writes a
JSON line for each precision and context, behind one that says how it was run:

    python lab/long_cycle.py recipes/shapes/qwen3-60m.json float32,bfloat16 1024,4096 > results/long-cycle.jsonl
"""

import json
import sys
from collections.abc import Callable
from random import Random
from statistics import median
from time import perf_counter

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from orthrus.bench.lines import head
from orthrus.bench.shapes import shaped
from orthrus.checkpoints.load import DTYPES
from orthrus.decode.passes import Passes
from orthrus.kernels import compiled
from orthrus.model.cache import ScratchCache

BLOCK, REPEATS, THREADS = 16, 20, 2
ROW = slice(0, 1)


def ours(config: str, dtype: str, context: int) -> Callable[[], None]:
    """Return a cycle of this engine."""
    model = shaped(config, dtype=dtype, device="cpu")
    cache = ScratchCache(rows=1, capacity=context + 4 * BLOCK)
    passes, anchor_B = Passes(model, cache), torch.ones(1, dtype=torch.long)
    passes.verify(ROW, anchor_B[:, None])
    for buffer in (*cache.keys, *cache.values):
        buffer.normal_()

    def cycle() -> None:
        cache.pretend(ROW, [context])
        made = passes.draft(ROW, anchor_B, BLOCK - 2)
        assert made.first_B1V is not None
        cache.commit(ROW, [1])
        token_BQ = torch.cat([made.first_B1V, made.logits_BMV], dim=1).argmax(-1)
        passes.verify(ROW, token_BQ).argmax(-1).tolist()

    for _ in range(passes.runner.uses):
        cycle()
    return cycle


def theirs(config: str, dtype: str, context: int) -> Callable[[], None]:
    """Return a cycle of transformers' model and cache."""
    settings = AutoConfig.from_pretrained(config)
    model = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()
    cache, token_BQ = DynamicCache(config=settings), torch.ones(1, BLOCK, dtype=torch.long)
    for layer in range(settings.num_hidden_layers):
        shape = (1, settings.num_key_value_heads, context, settings.head_dim)
        cache.update(*(torch.randn(shape, dtype=DTYPES[dtype]) for _ in range(2)), layer)
    seen = torch.ones(1, 1, BLOCK, context + BLOCK, dtype=torch.bool)

    def cycle() -> None:
        draft = model(input_ids=token_BQ, past_key_values=cache, attention_mask=seen).logits.argmax(-1)
        cache.crop(-BLOCK)
        tokens = torch.cat([token_BQ[:, :1], draft[:, :-1]], dim=1)
        model(input_ids=tokens, past_key_values=cache).logits.argmax(-1).tolist()
        cache.crop(-BLOCK)

    return cycle


@torch.inference_mode()
def main(config: str, dtypes: str, contexts: str) -> None:
    """Time both ways in turns, in an order of chance, after one that does not count."""
    torch.set_num_threads(THREADS)
    compiled.prepare()
    print(json.dumps(head(dtypes=dtypes.split(","), repeats=REPEATS, block=BLOCK)), flush=True)
    for dtype in dtypes.split(","):
        for context in map(int, contexts.split(",")):
            ways = {"ours": ours(config, dtype, context), "theirs": theirs(config, dtype, context)}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for repeat in range(REPEATS + 1):
                for way in Random(repeat).sample(sorted(ways), len(ways)):
                    began = perf_counter()
                    ways[way]()
                    if repeat:
                        seconds[way].append(perf_counter() - began)
            middle = {way: median(times) for way, times in seconds.items()}
            line = {"kind": "long cycle", "shape": config, "dtype": dtype, "context": context, **middle}
            print(
                json.dumps({**line, "ratio": middle["theirs"] / middle["ours"], "repeats_seconds": seconds}), flush=True
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
