"""An attention function that never repeats keys: grouped queries are folded into the query axis instead.

Registered with transformers as `attn_implementation="orthrus"`, for any architecture. Handles what scaled dot
product attention lacks (soft-capped scores, attention sinks) by plain arithmetic on the same grouped shapes.

Shapes: B rows, H query heads, G queries per key/value head, Q query rows, S keys, D head dimension.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from orthrus.kernels import compiled, in_blocks, products
from orthrus.kernels.masks import Behind, Chain, InBlocks
from orthrus.kernels.native import multiplies

NAME = "orthrus"

BLOCK = 512
"""Keys that torch's attention kernel for CPUs takes at a time, whatever their number."""

FEW = 32
"""Query rows that our own operator, where it is compiled, attends with faster than torch's kernel or plain products."""

_FEWEST_ROWS = 4
_USES = "uses_own_attention"  # attributes of modules: whether they attend by our own operator,
_ROUNDS = "rounds_keys"  # and whether keys are kept in bfloat16
_TYPES = (torch.float32, torch.bfloat16)  # of our own operator
_own: list[Callable[..., Tensor]] = []  # the operator, once a model uses it


def attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | InBlocks | Behind | Chain | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    tile: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with `[B, H, Q, D]` queries over `[B, H/G, S, D]` keys and values; returns `[B, Q, H, D]`.

    Args:
        attention_mask: additive or boolean, `[B, 1, Q, S]`, or FlexAttention's block mask (training on CUDA), or one in
            blocks (training on CPUs), or in parts (decoding on CUDA), or a chain (prompts on CPUs); None means causal
            for several queries, all for one.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask (Gemma 2).
        s_aux: one sink logit per head, which takes part in the softmax and in nothing else (gpt-oss).
        tile: keys are taken so many at a time, or `BLOCK` by the CPU's kernel, by operations whose shapes and order do
            not depend on S, a multiple of that: masked keys beyond a query's reach then change no bit of its result.
    """
    B, H, Q, D = query_BHQD.shape
    heads = key.shape[1]
    if isinstance(attention_mask, BlockMask):
        return _flex(query_BHQD, key, value, attention_mask, scaling, softcap, s_aux), None
    if isinstance(attention_mask, InBlocks):
        return _in_blocks(query_BHQD, key, value, attention_mask, scaling or D**-0.5, softcap, s_aux), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and Q > 1 and causal:
        attention_mask = Chain(key.shape[2] - Q, Q)
    if isinstance(attention_mask, Chain):
        start, rows, rest = attention_mask.start, attention_mask.rows, attention_mask.rest
        attend = partial(attention, module, scaling=scaling, dropout=dropout, softcap=softcap, s_aux=s_aux, tile=tile)
        chain = (query_BHQD[:, :, :rows], key[:, :, : start + rows], value[:, :, : start + rows])
        if rows > FEW and tile is None and rounds_keys(module) and not torch.is_grad_enabled():
            chain = (chain[0].bfloat16(), chain[1].bfloat16(), chain[2].bfloat16())
        if dropout == 0 and softcap is None and s_aux is None and tile is None and _chains(*chain):
            out = _chain(*chain, start, scaling or D**-0.5).transpose(1, 2).contiguous()
        else:
            seen = torch.ones(rows, start + rows, dtype=torch.bool, device=key.device).tril(start)
            out = attend(*chain, seen[None, None])[0]
        out = out.to(query_BHQD.dtype)
        behind = [] if rest is None else [attend(query_BHQD[:, :, rows:], key, value, rest)[0]]
        return torch.cat([out, *behind], dim=1) if behind else out, None
    plain = softcap is None and s_aux is None and dropout == 0
    own = plain and uses_own(module, Q, tiled=tile is not None) and _takes_own(query_BHQD, key, value)
    if own and not isinstance(attention_mask, Behind) and (attention_mask is None or attention_mask.shape[1] == 1):
        return _own[0](query_BHQD, key, value, attention_mask, scaling or D**-0.5), None
    key, value = key.to(query_BHQD.dtype), value.to(query_BHQD.dtype)  # others take no keys of another type
    grouped = query_BHQD.reshape(B, heads, -1, D)
    if isinstance(attention_mask, Behind):
        out = _split(grouped, key, value, attention_mask, scaling or D**-0.5, softcap, s_aux, Q, tile is not None)
        return out.reshape(B, H, Q, value.shape[-1]).transpose(1, 2).contiguous(), None
    mask = None if attention_mask is None else attention_mask[:, :, :, : key.shape[2]]
    if tile is None and softcap is None and s_aux is None and products.pays(query_BHQD, Q, key.shape[2]):
        out = products.attend(grouped.view(B, heads, -1, Q, D), key, value, mask, scaling or D**-0.5)
        return out.flatten(1, 2).transpose(1, 2).contiguous(), None
    mask = None if mask is None else _fold(mask, H // heads)
    if tile is not None:
        mask = query_BHQD.new_zeros(1, 1, 1, 1) if mask is None else mask
        mask = mask if mask.shape[3] == key.shape[2] else mask.expand(-1, -1, -1, key.shape[2])
        fits = value.shape[-1] == D and mask.dtype == grouped.dtype and grouped.dtype != torch.float16
        if softcap is None and s_aux is None and grouped.device.type == "cpu" and fits:
            out = _by_blocks(grouped, key, value, mask, scaling or D**-0.5)
        else:
            out = _tiled(grouped, key, value, mask, scaling or D**-0.5, softcap, s_aux, Q, tile)
    elif softcap is None and s_aux is None:
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        out = _explicit(grouped, key, value, mask, scaling or D**-0.5, softcap, s_aux, Q)
    return out.reshape(B, H, Q, value.shape[-1]).transpose(1, 2).contiguous(), None


def use_own(model: nn.Module) -> None:
    """Let a model attend with few rows by an operator of our own from now on, where it is compiled (`attention.cpp`).

    In inference mode on CPUs. In blocks of keys (`tile`) all numbers of rows are, since a row has the same bits then.
    """
    if (own := compiled.attention()) is not None:
        _own[:] = [own]
        for module in model.modules():
            if module is model or hasattr(module, "is_causal"):
                setattr(module, _USES, True)


def round_keys(model: nn.Module) -> None:
    """Let a model in float32 keep keys and values in bfloat16 from now on, and attend in it while it reads prompts.

    Where the CPU multiplies in bfloat16, but for soft caps and sinks. Passes of `FEW` rows and less, and all under
    `tile`, attend in float32.
    """
    attending = [module for module in model.modules() if hasattr(module, "is_causal")]
    others = [getattr(module, name, None) for module in attending for name in ("sinks", "attn_logit_softcapping")]
    if multiplies(torch.bfloat16) and all(other is None for other in others):
        for module in (model, *attending):
            setattr(module, _ROUNDS, True)


def rounds_keys(module: nn.Module) -> bool:
    """Tell whether a model, or an attention module of it, takes keys in bfloat16 beside queries in float32."""
    return getattr(module, _ROUNDS, False)


def rounded_layers(model: PreTrainedModel) -> range:
    """Return the layers of a model that keep keys in bfloat16; none without our own operator, which reads them so."""
    rounds = rounds_keys(model) and uses_own(model, rows=1)
    return range(model.config.get_text_config().num_hidden_layers if rounds else 0)


def leave_own(model: nn.Module) -> None:
    """Undo `use_own` and `round_keys`."""
    for module in model.modules():
        for name in (_USES, _ROUNDS):
            module.__dict__.pop(name, None)


def uses_own(module: nn.Module, rows: int, *, tiled: bool = False) -> bool:
    """Tell whether a model, or an attention module of it, attends with so many rows by our own operator."""
    return (rows <= FEW or tiled) and bool(_own) and getattr(module, _USES, False)


def _takes_own(query: Tensor, key: Tensor, value: Tensor) -> bool:
    kept = key.dtype == value.dtype in (query.dtype, torch.bfloat16)
    fits = kept and query.dtype in _TYPES and query.device.type == "cpu"
    return fits and torch.is_inference_mode_enabled() and all(x.stride(3) == 1 for x in (query, key, value))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _split(
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Behind,
    scaling: float,
    softcap: float | None,
    sink_H: Tensor | None,
    queries: int,
    in_order: bool,
) -> Tensor:
    from orthrus.kernels.split_attention import split_attention  # Triton is where CUDA is

    sink_NR = None if sink_H is None else sink_H.view(key.shape[1], -1).repeat_interleave(queries, dim=1)
    with torch.cuda.device_of(grouped):  # type: ignore[no-untyped-call]
        return split_attention(
            grouped, key, value, mask, scaling=scaling, softcap=softcap, sink_NR=sink_NR, in_order=in_order
        )


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    def cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _capped(score, softcap)

    attend: Callable[..., tuple[Tensor, AuxOutput]] = flex_attention
    # Its kernel for few queries, which torch would take below 128 of them, serves no training: it has no shape for some
    # numbers of queries and heads.
    options = {"BACKEND": "TRITON"} if query.is_cuda else None
    out, more = (torch.compile(attend) if query.is_cuda else attend)(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    if sink_H is not None:
        # A sink takes its share of the softmax: exp(sink) joins a total that was exp(lse).
        assert more.lse is not None
        out = out * torch.sigmoid(more.lse - sink_H[None, :, None])[..., None].to(out.dtype)
    attended: Tensor = out.transpose(1, 2).contiguous()
    return attended


def _chains(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether torch's kernel for CPUs takes a chain without a mask, and faster than plain products do."""
    alike = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype and query.shape[3] == value.shape[3]
    return alike and not torch.is_grad_enabled() and not products.pays(query, query.shape[2], key.shape[2])


def _chain(query_BHRD: Tensor, key: Tensor, value: Tensor, start: int, scaling: float) -> Tensor:
    """Attend to the rows' own keys, causally, and to all before them, and weigh the two by their sums."""
    B, H, R, D = query_BHRD.shape
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own_BHRD, own_BHR = flash(query_BHRD, key[:, :, start:], value[:, :, start:], is_causal=True, scale=scaling)
    if start == 0:
        return cast(Tensor, own_BHRD)
    grouped = query_BHRD.reshape(B, key.shape[1], -1, D)
    text, sums = flash(grouped, key[:, :, :start], value[:, :, :start], scale=scaling)
    share_BHR = torch.sigmoid(sums.reshape(B, H, R) - own_BHR)
    wide = share_BHR.dtype  # the kernel's sums are not rounded to bfloat16, and what is made of them is rounded once
    both = torch.lerp(own_BHRD.to(wide), text.reshape(B, H, R, D).to(wide), share_BHR[..., None])
    return both.to(own_BHRD.dtype)


def _fold(mask_B1QS: Tensor, groups: int) -> Tensor:
    """Repeat the mask for the queries that share a key/value head: `[B, 1, G*Q, S]`."""
    return mask_B1QS if groups == 1 or mask_B1QS.shape[2] == 1 else torch.cat([mask_B1QS] * groups, dim=2)


def _explicit(
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_H: Tensor | None,
    queries: int,
) -> Tensor:
    scores = _capped(grouped @ key.transpose(2, 3) * scaling, softcap)
    if mask is not None:
        scores = _masked(scores, mask)
    return _softmax(scores.float(), sink_H, queries).to(value.dtype) @ value


def _in_blocks(
    query_BHQD: Tensor,
    key: Tensor,
    value: Tensor,
    mask: InBlocks,
    scaling: float,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Attend to earlier keys, which come first, and to each row's own block, under one softmax."""
    dtype = mask.groups[0].additive.dtype  # under autocast some norms leave queries and keys in float32
    query_BHQD, key, value = query_BHQD.to(dtype), key.to(dtype), value.to(dtype)
    if softcap is None and sink_H is None:
        out: Tensor = in_blocks.Attend.apply(query_BHQD, key, value, mask, scaling)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2).contiguous()
    outs = []
    for group in mask.groups:
        query, keys, values = in_blocks.read(group, query_BHQD, key, value)
        grouped, queries = query.reshape(1, len(keys), -1, query.shape[2]), query.shape[1]
        seen = _fold(group.additive[None, None], len(query) // len(keys))
        attended = _explicit(grouped, keys[None], values[None], seen, scaling, softcap, sink_H, queries)
        outs.append(attended.view(len(query), queries, -1))
    groups = len(outs) // len(query_BHQD)
    rows = [torch.cat(outs[start : start + groups], dim=1) for start in range(0, len(outs), groups)]
    return torch.stack(rows).transpose(1, 2).contiguous()


def _softmax(scores: Tensor, sink_H: Tensor | None, queries: int) -> Tensor:
    """Normalise over keys, and over a sink per head where there are sinks."""
    if sink_H is None:
        return torch.softmax(scores, dim=-1)
    heads = scores.shape[1]
    sinks = _sinks(sink_H, heads, queries).expand(scores.shape[0], -1, -1, 1).to(scores.dtype)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def _by_blocks(grouped: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attend with the CPU's own kernel, which takes `BLOCK` keys at a time, one block after another.

    A block out of reach adds exact zeros at the end of each sum. (In float16 the kernel may pack keys, where there are
    enough of them for their number to pay.)
    """
    rows = grouped.shape[2]
    if rows < _FEWEST_ROWS:
        # Kernels for fewer rows associate their sums in another way.
        times = -(-_FEWEST_ROWS // rows)
        grouped, mask = torch.cat([grouped] * times, dim=2), _fold(mask, times)
    return scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)[:, :, :rows]


def _tiled(
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sink_H: Tensor | None,
    queries: int,
    tile: int,
) -> Tensor:
    """Attend tile by tile: a matrix product per tile, then running sums over tiles, in order; the last one filled up.

    A tile out of reach adds exact zeros at the end of each sum. (A plain sum over tiles would associate its terms
    differently for another number of tiles; a cumulative one cannot.)
    """
    B, heads, rows, D = grouped.shape
    if lacking := -key.shape[2] % tile:
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, lacking)) for x in (key, value))
        unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = torch.nn.functional.pad(mask, (0, lacking), value=unseen)
    tiles = key.shape[2] // tile

    def cut(x: Tensor) -> Tensor:
        return x.reshape(B * heads * tiles, tile, x.shape[3])

    query = grouped[:, :, None].expand(B, heads, tiles, rows, D).flatten(0, 2)
    scores = torch.bmm(query, cut(key).transpose(1, 2)).view(B, heads, tiles, rows, tile) * scaling
    reach = mask.reshape(*mask.shape[:3], tiles, tile).transpose(2, 3)
    scores = _masked(_capped(scores, softcap), reach).float()
    top = scores.amax(dim=(2, 4), keepdim=True)
    if sink_H is not None:
        sinks = _sinks(sink_H, heads, queries)[:, :, None].float()
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True).cumsum(2)[:, :, -1]
    if sink_H is not None:
        total = total + torch.exp(sinks - top)[:, :, 0]
    parts = torch.bmm(weights.to(value.dtype).flatten(0, 2), cut(value)).view(B, heads, tiles, rows, -1)
    return (parts.float().cumsum(2)[:, :, -1] / total).to(value.dtype)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _sinks(sink_H: Tensor, heads: int, queries: int) -> Tensor:
    """Lay one sink logit per query head out along the folded query axis: `[1, heads, G*Q, 1]`."""
    return sink_H.view(heads, -1).repeat_interleave(queries, dim=1)[None, :, :, None]


def can_split(device: torch.device) -> bool:
    """Tell whether attention over masks in parts (`masks.Behind`) runs on a device: on CUDA, where Triton is."""
    return device.type == "cuda" and find_spec("triton") is not None


def register() -> str:
    """Make `attn_implementation="orthrus"` known to transformers (again and again is fine); returns the name."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
