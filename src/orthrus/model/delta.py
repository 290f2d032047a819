"""The gated delta rule and its short convolution, for any relation of who sees whom within a pass.

A layer of this kind keeps one state S per head in place of keys. Token i decays it, corrects what it holds for the
token's key, and reads it: `S ← e^g S; u = β (v − Sᵀk); S ← S + k uᵀ; o = Sᵀ q`. Within a pass the corrections u solve
a triangular system (the UT form: Yang et al., arXiv 2412.06464), whose entries are those pairs where one token sees the
other, in chains, trees and blocks alike. The state after any token is one weighted product of keys and corrections.

`solve` and `scan` are fast, and a token's last bits depend on where its pass began; with `in_order` they do not.

Shapes: B texts, T tokens, R earlier tokens of the same pass, M = R + T, G key heads, H value heads (H/G share a key),
N key dimension, D value dimension, C channels and W width of the convolution, A positions asked for.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

CHUNK: Final = 64
"""Tokens that `scan` solves at once."""


class Inputs(NamedTuple):
    """What the rule reads of each token, in float32; queries and keys are normalised, queries scaled, too.

    `decay_BTH` is the logarithm of what is left of the state, at most 0; `beta_BTH`, the strength of the correction.
    """

    query_BTGN: Tensor
    key_BTGN: Tensor
    value_BTHD: Tensor
    decay_BTH: Tensor
    beta_BTH: Tensor

    def part(self, tokens: slice) -> "Inputs":
        return Inputs(*(tensor[:, tokens] for tensor in self))


class Terms(NamedTuple):
    """What tokens add to the state: `Σ e^{decays since} k uᵀ` (`fold`), of normalised keys and corrections u."""

    key_BTGN: Tensor
    update_BTHD: Tensor
    decay_BTH: Tensor

    def part(self, tokens: slice) -> "Terms":
        return Terms(*(tensor[:, tokens] for tensor in self))


class Scan(NamedTuple):
    """What `scan` leaves, from which `states_at` takes the state after any token.

    `state_BCHND` is the state before each chunk of `CHUNK` tokens, and behind the last one; `document_BT` the document
    of each token, None where all are of one.
    """

    terms: Terms
    state_BCHND: Tensor
    document_BT: Tensor | None = None


def inputs(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, *, normalise: bool = True) -> Inputs:
    """Bring a layer's queries, keys, values `[B, T, heads, size]` and gates `[B, T, H]` to the rule's form."""
    query, key, value, decay, beta = (tensor.float() for tensor in (query, key, value, decay, beta))
    if normalise:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    return Inputs(query * query.shape[-1] ** -0.5, key, value, decay, beta)


def solve(
    inputs: Inputs,
    state_BHND: Tensor,
    path_BTM: Tensor | None = None,
    earlier: Terms | None = None,
    reads_BT: Tensor | None = None,
) -> tuple[Tensor, Terms]:
    """Apply the rule to all tokens of a pass at once; the state itself stays as it is.

    Args:
        path_BTM: which of the tokens each token's text consists of, itself included, the R earlier ones first; parents
            stand before children. None for a chain behind all earlier ones.
        reads_BT: whether a token's text goes on from the state; None where all do.

    Returns:
        Outputs `[B, T, H, D]`, and the terms of the T tokens.
    """
    T, H = inputs.value_BTHD.shape[1:3]
    share, R = H // inputs.key_BTGN.shape[2], 0 if earlier is None else earlier.decay_BTH.shape[1]
    query_BGTN, key_BGTN, value_BHTD = (tensor.transpose(1, 2) for tensor in inputs[:3])
    beta_BHT1 = inputs.beta_BTH.transpose(1, 2)[..., None]
    every = Terms(inputs.key_BTGN, inputs.value_BTHD, inputs.decay_BTH)
    if earlier is not None:
        every = Terms(*(torch.cat(pair, dim=1) for pair in zip(earlier, every, strict=True)))
    if path_BTM is None:
        path_BTM = torch.ones(1, T, R + T, dtype=torch.bool, device=state_BHND.device).tril(R)
    weight_BHTM, start_BHT1 = _decays(every.decay_BTH.transpose(1, 2)[:, :, None], path_BTM[:, None])
    if reads_BT is not None:
        start_BHT1 = start_BHT1.masked_fill(~reads_BT[:, None, :, None], 0.0)
    every_BGNM = every.key_BTGN.permute(0, 2, 3, 1)
    system_BHTM = beta_BHT1 * weight_BHTM * _shared(key_BGTN @ every_BGNM, share)
    read_BHTD = beta_BHT1 * (value_BHTD - start_BHT1 * (_shared(key_BGTN, share) @ state_BHND))
    if earlier is not None:
        read_BHTD = read_BHTD - system_BHTM[..., :R] @ earlier.update_BTHD.transpose(1, 2)
    update_BHTD = torch.linalg.solve_triangular(system_BHTM[..., R:], read_BHTD, upper=False, unitriangular=True)
    reach_BHTM = weight_BHTM * _shared(query_BGTN @ every_BGNM, share)
    out_BHTD = start_BHT1 * (_shared(query_BGTN, share) @ state_BHND) + reach_BHTM[..., R:] @ update_BHTD
    if earlier is not None:
        out_BHTD = out_BHTD + reach_BHTM[..., :R] @ earlier.update_BTHD.transpose(1, 2)
    return out_BHTD.transpose(1, 2), Terms(inputs.key_BTGN, update_BHTD.transpose(1, 2), inputs.decay_BTH)


def scan(inputs: Inputs, state_BHND: Tensor, document_BT: Tensor | None = None) -> tuple[Tensor, Scan]:
    """Apply the rule to a long chain, `CHUNK` tokens at a time; returns outputs `[B, T, H, D]` and what is left.

    A document's first token sees neither the state nor the tokens before it.
    """
    outs, parts, states = [], [], [state_BHND]
    for start in range(0, inputs.decay_BTH.shape[1], CHUNK):
        chunk = inputs.part(slice(start, start + CHUNK))
        if document_BT is None:
            out_BTHD, terms = solve(chunk, states[-1])
            picked_BT = torch.ones(1, 1, dtype=torch.bool, device=state_BHND.device).expand(chunk.decay_BTH.shape[:2])
            states.append(fold(states[-1], terms, picked_BT))
        else:
            here_BT = document_BT[:, start : start + CHUNK]
            reads_BT = here_BT == document_BT[:, max(start - 1, 0), None]
            same_BTT = here_BT[:, :, None] == here_BT[:, None, :]
            out_BTHD, terms = solve(chunk, states[-1], same_BTT.tril(), reads_BT=reads_BT)
            last_B111 = reads_BT[:, -1, None, None, None]
            states.append(fold(states[-1].masked_fill(~last_B111, 0.0), terms, same_BTT[:, -1]))
        outs.append(out_BTHD)
        parts.append(terms)
    terms = Terms(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
    return torch.cat(outs, dim=1), Scan(terms, torch.stack(states, dim=1), document_BT)


def states_at(scanned: Scan, at_BA: Tensor) -> Tensor:
    """Return the state before each of these tokens of a scan, `[B, A, H, N, D]`; T stands for the end.

    Where there are documents, it is that of the token's own document.
    """
    T = scanned.terms.decay_BTH.shape[1]
    row_B1, chunk_BA = torch.arange(len(at_BA), device=at_BA.device)[:, None], at_BA // CHUNK
    token_BAC = chunk_BA[..., None] * CHUNK + torch.arange(CHUNK, device=at_BA.device)
    picked_BAC, index_BAC = token_BAC < at_BA[..., None], token_BAC.clamp_max(T - 1)
    state_BAHND = scanned.state_BCHND[row_B1, chunk_BA]
    if (document_BT := scanned.document_BT) is not None:
        here_BA = document_BT.gather(1, at_BA)
        before_BA = document_BT.gather(1, (chunk_BA * CHUNK - 1).clamp_min(0))
        picked_BAC &= document_BT[row_B1[..., None], index_BAC] == here_BA[..., None]
        state_BAHND = state_BAHND.masked_fill((before_BA != here_BA)[..., None, None, None], 0.0)
    terms = Terms(*(tensor[row_B1[..., None], index_BAC].flatten(0, 1) for tensor in scanned.terms))
    return fold(state_BAHND.flatten(0, 1), terms, picked_BAC.flatten(0, 1)).view_as(state_BAHND)


def in_order(inputs: Inputs, state_BHND: Tensor) -> tuple[Tensor, Terms]:
    """Apply the rule token by token; the same bits for a token however many stand before it in the pass."""
    share = inputs.value_BTHD.shape[2] // inputs.key_BTGN.shape[2]
    query_BHTN, key_BHTN = (_shared(tensor.transpose(1, 2), share) for tensor in inputs[:2])
    outs, updates = [], []
    for t in range(inputs.decay_BTH.shape[1]):
        key_BHN1 = key_BHTN[:, :, t, :, None]
        state_BHND = state_BHND * inputs.decay_BTH[:, t, :, None, None].exp()
        held_BHD = (state_BHND * key_BHN1).sum(-2)
        updates.append((inputs.value_BTHD[:, t] - held_BHD) * inputs.beta_BTH[:, t, :, None])
        state_BHND = state_BHND + key_BHN1 * updates[-1][:, :, None]
        outs.append((state_BHND * query_BHTN[:, :, t, :, None]).sum(-2))
    terms = Terms(inputs.key_BTGN, torch.stack(updates, dim=1), inputs.decay_BTH)
    return torch.stack(outs, dim=1), terms


def fold(state_BHND: Tensor, terms: Terms, picked_BT: Tensor) -> Tensor:
    """Return the state after the picked tokens, which make up one text; where none is, the state, bit for bit."""
    weight_BHT, start_BH1 = _decays(terms.decay_BTH.transpose(1, 2), picked_BT[:, None])
    key_BTGN, update_BTHD = (tensor.masked_fill(~picked_BT[:, :, None, None], 0.0) for tensor in terms[:2])
    share = state_BHND.shape[1] // key_BTGN.shape[2]
    key_BHNT = _shared(key_BTGN.permute(0, 2, 3, 1), share) * weight_BHT[:, :, None]
    return state_BHND * start_BH1[..., None] + key_BHNT @ update_BTHD.transpose(1, 2)


def fold_in_order(state_BHND: Tensor, terms: Terms, picked_BT: Tensor) -> Tensor:
    """Return the state after the picked tokens with the bits that `in_order` gave it on its way."""
    share = state_BHND.shape[1] // terms.key_BTGN.shape[2]
    for t in range(terms.decay_BTH.shape[1]):
        key_BHN1 = _shared(terms.key_BTGN[:, t], share)[..., None]
        kept_BHND = state_BHND * terms.decay_BTH[:, t, :, None, None].exp()
        after_BHND = kept_BHND + key_BHN1 * terms.update_BTHD[:, t, :, None]
        state_BHND = torch.where(picked_BT[:, t, None, None, None], after_BHND, state_BHND)
    return state_BHND


def windows(
    before_BVC: Tensor,
    input_BTC: Tensor,
    path_BTM: Tensor | None = None,
    earlier_BRC: Tensor | None = None,
    document_BT: Tensor | None = None,
) -> Tensor:
    """Return the inputs that the convolution reads for each token, `[B, T, W, C]`: its own last, after those before it.

    Args:
        path_BTM: who is before whom, as in `solve`; None for a chain behind all earlier ones.
        document_BT: the document of each token of a chain that no other tokens precede: other documents' are zeros.
    """
    V, R = before_BVC.shape[1], 0 if earlier_BRC is None else earlier_BRC.shape[1]
    every_BEC = torch.cat([before_BVC, *([] if earlier_BRC is None else [earlier_BRC]), input_BTC], dim=1)
    if path_BTM is None:
        window_BTWC = every_BEC[:, R:].unfold(1, V + 1, 1).transpose(2, 3)
        if document_BT is None:
            return window_BTWC
        first_B1 = document_BT[:, :1]
        document_BTW = torch.cat([first_B1.expand(-1, V), document_BT], dim=1).unfold(1, V + 1, 1)
        return window_BTWC.masked_fill((document_BTW != document_BT[..., None])[..., None], 0.0)
    sees_BTE = torch.nn.functional.pad(path_BTM, (V, 0), value=True)
    order_E = torch.arange(sees_BTE.shape[2], device=path_BTM.device)
    last_BTW = torch.where(sees_BTE, order_E, -1).topk(V + 1, dim=-1).values.flip(-1)
    return every_BEC[torch.arange(every_BEC.shape[0], device=path_BTM.device)[:, None, None], last_BTW]


def convolve(window_BTWC: Tensor, weight_CW: Tensor) -> Tensor:
    """Return the depthwise convolution of each window, `[B, T, C]`: a float32 sum of products in one order."""
    total_BTC = window_BTWC[:, :, 0].float() * weight_CW[:, 0].float()
    for w in range(1, weight_CW.shape[1]):
        total_BTC = total_BTC + window_BTWC[:, :, w].float() * weight_CW[:, w].float()
    return total_BTC.to(window_BTWC.dtype)


def tails(before_BVC: Tensor, input_BTC: Tensor, at_BA: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """Return the V inputs before each of these tokens of a chain, `[B, A, V, C]`; T stands for the end.

    Where there are documents, zeros stand for those of others.
    """
    V = before_BVC.shape[1]
    row_B11 = torch.arange(len(at_BA), device=at_BA.device)[:, None, None]
    index_BAV = at_BA[..., None] + torch.arange(V, device=at_BA.device)
    tail_BAVC = torch.cat([before_BVC, input_BTC], dim=1)[row_B11, index_BAV]
    if document_BT is None:
        return tail_BAVC
    document_BE = torch.cat([document_BT[:, :1].expand(-1, V), document_BT], dim=1)
    other_BAV = document_BE[row_B11, index_BAV] != document_BT.gather(1, at_BA)[..., None]
    return tail_BAVC.masked_fill(other_BAV[..., None], 0.0)


def _decays(decay: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Return, over the last axis, the decay from each picked token to the last one (0 for others), and over all.

    Sums run backwards from the last one: differences of sums from the start would lose the small ones.
    """
    since = torch.where(picked, decay, 0.0).flip(-1).cumsum(-1).flip(-1)
    weight = torch.nn.functional.pad(since[..., 1:], (0, 1)).exp()
    return torch.where(picked, weight, 0.0), since[..., :1].exp()


def _shared(heads: Tensor, share: int) -> Tensor:
    """Repeat key heads (axis 1) for the value heads that share them."""
    return heads if share == 1 else heads.repeat_interleave(share, dim=1)


def from_behind(inputs: Inputs, path_BTT: Tensor | None = None) -> Tensor:
    """Return what tokens read of those behind them, `[B, T, H, D]`, by a second rule from the end and from nothing.

    Added to the outputs of `solve`, it lets tokens see both ways. `path_BTT` is as there: a token reads those whose
    paths it is on. The token itself is left out; what it reads is decayed once at its own position, as in `solve`.
    """
    flipped = Inputs(*(tensor.flip(1) for tensor in inputs))
    behind_BTT = None if path_BTT is None else path_BTT.mT.flip(1, 2)
    (B, _, H, D), N = inputs.value_BTHD.shape, inputs.key_BTGN.shape[3]
    out_BTHD, terms = solve(flipped, inputs.value_BTHD.new_zeros(B, H, N, D), behind_BTT)
    itself_BGT = (flipped.query_BTGN * flipped.key_BTGN).sum(-1).mT
    out_BTHD = out_BTHD - _shared(itself_BGT, H // itself_BGT.shape[1]).mT[..., None] * terms.update_BTHD
    return out_BTHD.flip(1)
