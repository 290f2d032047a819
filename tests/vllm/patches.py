"""Changes to vLLM that only tests make, in every process of an engine: found as a plugin of their own.

`expand` repairs a defect of the CPU build 0.32.0: values expanded from rows to drafts are written to a copy, so a
sampled row with drafts reads an uninitialised temperature. `attention` compares every layer's draft attention with a
float64 softmax over the cache, and writes to a file, for each pass, the lengths of its rows and, for each layer, the
largest output and how far from float64 it lies, as vLLM computes it and as torch does in float32. `drafts` writes to a
file what stock drafters draft for the rows of each pass.
"""

import json
import os
from pathlib import Path
from typing import Any


def apply() -> None:
    """Make the changes that the environment names: a JSON object of names and what each one is told."""
    from orthrus.integrations.vllm.dispatch import when_imported

    named = json.loads(os.environ.get("ORTHRUS_VLLM_PATCHES", "{}"))
    if "expand" in named:
        when_imported("vllm.v1.sample.rejection_sampler", _expand)
    if "attention" in named:
        when_imported("orthrus.integrations.vllm.v1", lambda module: _attention(module, Path(named["attention"])))
    if "drafts" in named:
        when_imported("vllm.v1.spec_decode.llm_base_proposer", lambda module: _drafts(module, Path(named["drafts"])))


def _expand(module: Any) -> None:
    import torch

    def expand(x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
        expanded = x.repeat_interleave(counts)
        return torch.where(expanded == replace_from, replace_to, expanded) if replace_from != replace_to else expanded

    module.expand_batch_to_tokens = expand


def _drafts(module: Any, notes: Path) -> None:
    propose = module.SpecDecodeBaseProposer.propose

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = propose(self, *args, **kwargs)
        with notes.open("a") as file:
            file.write(json.dumps(tokens.tolist()) + "\n")
        return tokens

    module.SpecDecodeBaseProposer.propose = noted


def _attention(module: Any, notes: Path) -> None:
    """Record queries and outputs of each layer in the draft pass, and compare them with what the cache holds."""
    import torch
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.attention.attention import Attention

    stock_forward, stock_pass = Attention.forward, module.OrthrusProposer._draft_pass

    def draft_pass(self: Any, block: Any, verified: Any) -> Any:
        calls: list[tuple[Any, Any, Any]] = []

        def forward(layer: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            out = stock_forward(layer, query, key, value, *args, **kwargs)
            metadata = get_forward_context().attn_metadata[layer.layer_name]
            assert metadata.causal is False
            calls.append((layer, query.clone(), out.clone()))
            return out

        Attention.forward = forward
        try:
            hidden = stock_pass(self, block, verified)
        finally:
            Attention.forward = stock_forward
        layers = []
        for layer, query, out in calls:
            given = (layer, query, block, verified.block_table_tensor, self.block_size)
            exact, plain = (attend(*given, dtype=dtype) for dtype in (torch.float64, torch.float32))
            found = {"largest": exact, "vllm": out.view_as(exact) - exact, "torch": plain - exact}
            layers.append({name: x.abs().max().item() for name, x in found.items()})
        assert len(calls) == len(self._draft_attn_layer_names)
        with notes.open("a") as file:
            file.write(json.dumps({"seen": block.seen_B.tolist(), "layers": layers}) + "\n")
        return hidden

    def attend(layer: Any, query: Any, block: Any, pages: Any, size: int, *, dtype: Any) -> Any:
        B, K = block.token_BK.shape
        query = query.view(B, K, layer.num_heads, layer.head_size).to(dtype)
        rows = []
        for row in range(B):
            seen = int(block.seen_B[row])
            at = torch.arange(seen)
            slots = pages[row].long()[at // size] * size + at % size
            key, value = cached(layer, slots)
            shared = layer.num_heads // layer.num_kv_heads
            key, value = (x.to(dtype).repeat_interleave(shared, dim=1) for x in (key, value))
            scores = torch.einsum("khd,shd->hks", query[row], key) * layer.impl.scale
            rows.append(torch.einsum("hks,shd->khd", scores.softmax(-1), value).reshape(K, -1))
        return torch.cat(rows)

    def cached(layer: Any, slots: Any) -> tuple[Any, Any]:
        """Read keys and values `[S, heads, D]` out of the CPU cache.

        A page holds, for each head, its keys and then its values; keys lie transposed.
        """
        pages, heads, size, both = layer.kv_cache.shape
        keys, values = layer.kv_cache.view(pages, heads, 2 * size, both // 2).chunk(2, dim=2)
        page, inside = slots // size, slots % size
        transposed = keys[page].reshape(len(slots), heads, both // 2, size)
        return transposed[torch.arange(len(slots)), :, :, inside], values[page, :, inside]

    module.OrthrusProposer._draft_pass = draft_pass
