"""The gated delta rule under any relation of who sees whom, against the recurrence one token at a time in float64."""

import random

import pytest
import torch
from torch import Tensor

from orthrus.model import delta

B, G, H, N, D, C, V = 2, 2, 4, 6, 5, 7, 3


def drawn(tokens: int, *, seed: int = 0) -> delta.Inputs:
    """Inputs as a layer's projections give them, some decays strong, some corrections over 1 (OLMo's may be)."""
    torch.manual_seed(seed)
    query, key = torch.randn(2, B, tokens, G, N)
    decay = -torch.rand(B, tokens, H) * torch.tensor([0.01, 0.1, 1.0, 9.0])
    return delta.inputs(query, key, torch.randn(B, tokens, H, D), decay, 2 * torch.rand(B, tokens, H))


def state_of(*, seed: int = 9) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, H, N, D)


def specified(inputs: delta.Inputs, state_BHND: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written down, float64: outputs, and the state after each token."""
    q, k, v, g, beta = (tensor.double() for tensor in inputs)
    q, k = (tensor.repeat_interleave(H // G, dim=2) for tensor in (q, k))
    state, outs, states = state_BHND.double(), [], []
    for t in range(v.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhnd,bhn->bhd", state, k[:, t]))
        state = state + torch.einsum("bhn,bhd->bhnd", k[:, t], u)
        outs.append(torch.einsum("bhnd,bhn->bhd", state, q[:, t]))
        states.append(state)
    return torch.stack(outs, 1), torch.stack(states, 1)


def near(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=3e-6 * float(expected.abs().max()))


def tree_of(parents: list[int]) -> Tensor:
    """Each token's path `[T, T]`, for parents that stand before their children; -1 is the text."""
    path = torch.eye(len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            path[token] |= path[parent]
    return path


TREE = tree_of([-1, 0, 0, 1, 2, 2, 3, 5])


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_chain_is_the_recurrence(tokens: int) -> None:
    inputs, state = drawn(tokens), state_of()
    outs, states = specified(inputs, state)
    for found, terms in (delta.solve(inputs, state), delta.in_order(inputs, state)):
        assert near(found, outs)
        for count in range(1, tokens + 1):
            picked = torch.arange(tokens).expand(B, -1) < count
            assert near(delta.fold(state, terms, picked), states[:, count - 1])


def test_each_token_of_a_tree_has_its_own_path_alone() -> None:
    inputs, state = drawn(len(TREE)), state_of()
    found, terms = delta.solve(inputs, state, TREE.expand(B, -1, -1))
    for token, path in enumerate(TREE):
        alone = delta.Inputs(*(tensor[:, path] for tensor in inputs))
        outs, states = specified(alone, state)
        assert near(found[:, token], outs[:, -1])
        assert near(delta.fold(state, terms, path.expand(B, -1)), states[:, -1])


def test_blocks_behind_tokens_of_a_tree_go_on_from_their_paths() -> None:
    """Two blocks of three: one behind token 6, one behind the text alone."""
    inputs, state = drawn(len(TREE) + 6), state_of()
    _, known = delta.solve(inputs.part(slice(0, len(TREE))), state, TREE.expand(B, -1, -1))
    own = torch.block_diag(*[torch.ones(3, 3)] * 2).bool().tril()
    before = torch.cat([TREE[6].expand(3, -1), torch.zeros(3, len(TREE), dtype=torch.bool)])
    blocks = inputs.part(slice(len(TREE), None))
    found, _ = delta.solve(blocks, state, torch.cat([before, own], dim=1).expand(B, -1, -1), known)
    for start, path in ((0, TREE[6]), (3, torch.zeros_like(TREE[6]))):
        chosen = torch.cat([path.nonzero()[:, 0], len(TREE) + torch.arange(start, start + 3)])
        outs, _ = specified(delta.Inputs(*(tensor[:, chosen] for tensor in inputs)), state)
        assert near(found[:, start : start + 3], outs[:, -3:])


def test_a_chain_read_in_two_parts_is_one_chain() -> None:
    inputs, state = drawn(9), state_of()
    outs, _ = specified(inputs, state)
    _, known = delta.solve(inputs.part(slice(0, 4)), state)
    assert near(delta.solve(inputs.part(slice(4, None)), state, earlier=known)[0], outs[:, 4:])


@pytest.mark.parametrize("tokens", [5, 64, 150])
def test_a_scan_is_the_recurrence_and_knows_the_state_before_every_token(tokens: int) -> None:
    inputs, state = drawn(tokens), state_of()
    outs, states = specified(inputs, state)
    found, scanned = delta.scan(inputs, state)
    assert near(found, outs)
    every = delta.states_at(scanned, torch.arange(tokens + 1).expand(B, -1))
    assert near(every, torch.cat([state[:, None].double(), states], dim=1))


def test_documents_of_a_packed_row_are_read_as_if_alone() -> None:
    """Borders inside a chunk, at one, and a document over three chunks; each row has its own."""
    lengths = ([64, 3, 130, 3], [10, 50, 10, 130])
    document = torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(each)) for each in lengths])
    inputs, zero = drawn(200), torch.zeros(B, H, N, D)
    found, scanned = delta.scan(inputs, zero, document)
    before = delta.states_at(scanned, torch.arange(200).expand(B, -1))
    for row, number in [(row, number) for row in range(B) for number in range(4)]:
        here = (document[row] == number).nonzero()[:, 0]
        outs, states = specified(inputs.part(slice(here[0], here[-1] + 1)), zero)
        assert near(found[row, here], outs[row])
        assert near(before[row, here], torch.cat([zero[row, None].double(), states[row, :-1]]))


def test_in_order_a_token_has_the_same_bits_wherever_its_pass_began() -> None:
    inputs, state = drawn(12), state_of()
    found, terms = delta.in_order(inputs, state)
    after = state
    for token in range(12):
        own = inputs.part(slice(token, token + 1))
        out, term = delta.in_order(own, after)
        after = delta.fold_in_order(after, term, torch.ones(B, 1, dtype=torch.bool))
        assert torch.equal(out[:, 0], found[:, token])
        assert torch.equal(after, delta.fold_in_order(state, terms, torch.arange(12).expand(B, -1) <= token))


def test_nothing_picked_leaves_a_state_bit_for_bit_whatever_the_terms_hold() -> None:
    state = state_of()
    lost = delta.Terms(*(torch.full_like(tensor, torch.nan) for tensor in delta.solve(drawn(3), state)[1]))
    for fold in (delta.fold, delta.fold_in_order):
        assert torch.equal(fold(state, lost, torch.zeros(B, 3, dtype=torch.bool)), state)


def test_rows_keep_their_own_counts() -> None:
    inputs, state = drawn(4), state_of()
    _, terms = delta.solve(inputs, state)
    folded = delta.fold(state, terms, torch.arange(4) < torch.tensor([[1], [3]]))
    _, states = specified(inputs, state)
    assert near(folded, torch.stack([states[0, 0], states[1, 2]]))


def test_many_short_passes_do_not_drift() -> None:
    """16,384 tokens in passes of 16, of which 1 to 16 are kept, some decays slow enough to keep what stood first.

    The expected states are scanned in float64, which other tests compare with the recurrence.
    """
    tokens, chance = 1 << 14, random.Random(0)
    inputs, state = drawn(tokens), state_of()
    inputs = inputs._replace(decay_BTH=inputs.decay_BTH * torch.tensor([1e-3, 1e-2, 0.1, 0.1]))
    twice = delta.Inputs(*(tensor.double() for tensor in inputs))
    expected = delta.scan(twice, state.double())[1].state_BCHND
    read, errors = 0, []
    while read < tokens:
        _, terms = delta.solve(inputs.part(slice(read, read + 16)), state)
        kept = min(chance.randint(1, 16), delta.CHUNK - read % delta.CHUNK)
        state = delta.fold(state, terms.part(slice(0, kept)), torch.ones(B, kept, dtype=torch.bool))
        read += kept
        if read % delta.CHUNK == 0:
            after = expected[:, read // delta.CHUNK]
            errors.append(float((state - after).norm() / after.norm()))
    assert max(errors) < 1e-6
    assert max(errors[-32:]) < 2 * max(errors[:32])


def windows_of(before: Tensor, text: Tensor) -> Tensor:
    """The inputs before and at each of a text's tokens, taken one by one."""
    every = torch.cat([before, text], dim=1)
    return torch.stack([every[:, t : t + V + 1] for t in range(text.shape[1])], dim=1)


def test_windows_of_a_tree_are_those_of_each_path_alone() -> None:
    torch.manual_seed(0)
    before, text, known = torch.randn(B, V, C), torch.randn(B, len(TREE), C), torch.randn(B, 2, C)
    found = delta.windows(before, text, TREE.expand(B, -1, -1))
    for token, path in enumerate(TREE):
        assert torch.equal(found[:, token], windows_of(before, text[:, path])[:, -1])
    assert torch.equal(delta.windows(before, text), windows_of(before, text))
    assert torch.equal(
        delta.windows(before, text, earlier_BRC=known), windows_of(before, torch.cat([known, text], 1))[:, 2:]
    )
    behind = torch.cat([torch.tensor([[True, False]]).expand(len(TREE), -1), TREE], dim=1)
    for token, path in enumerate(TREE):
        alone = torch.cat([known[:, :1], text[:, path]], dim=1)
        found = delta.windows(before, text, behind.expand(B, -1, -1), known)
        assert torch.equal(found[:, token], windows_of(before, alone)[:, -1])


def test_a_documents_first_windows_and_tails_hold_nothing_of_the_one_before() -> None:
    torch.manual_seed(0)
    zero, text = torch.zeros(B, V, C), torch.randn(B, 9, C)
    document = torch.tensor([0] * 2 + [1] * 6 + [2]).expand(B, -1)
    found = delta.windows(zero, text, document_BT=document)
    tails = delta.tails(zero, text, torch.arange(9).expand(B, -1), document)
    for first, last in ((0, 2), (2, 8), (8, 9)):
        alone = windows_of(zero, text[:, first:last])
        assert torch.equal(found[:, first:last], alone)
        assert torch.equal(tails[:, first:last], alone[:, :, :-1])
    assert torch.equal(
        delta.tails(zero, text, torch.tensor([[9], [4]]))[:, 0], torch.stack([text[0, 6:], text[1, 1:4]])
    )


def test_the_convolution_is_torch_s() -> None:
    torch.manual_seed(0)
    before, text, weight = torch.randn(B, V, C), torch.randn(B, 6, C), torch.randn(C, V + 1)
    every = torch.cat([before, text], dim=1).transpose(1, 2)
    expected = torch.nn.functional.conv1d(every, weight[:, None], groups=C).transpose(1, 2)
    assert torch.allclose(delta.convolve(delta.windows(before, text), weight), expected, atol=1e-5)


def test_what_stands_behind_is_read_from_the_end_and_from_nothing() -> None:
    """Token by token from the end: what those behind have written, decayed at each place, and nothing of one's own."""
    inputs = drawn(5)
    found = delta.from_behind(inputs)
    query, key = (each.repeat_interleave(H // G, dim=2)[..., None] for each in inputs[:2])
    state, expected = torch.zeros(B, H, N, D), torch.zeros_like(found)
    for t in reversed(range(5)):
        state = state * inputs.decay_BTH[:, t, :, None, None].exp()
        expected[:, t] = (state * query[:, t]).sum(-2)
        update = inputs.beta_BTH[:, t, :, None] * (inputs.value_BTHD[:, t] - (state * key[:, t]).sum(-2))
        state = state + key[:, t] * update[..., None, :]
    assert near(found, expected)


def test_blocks_that_do_not_see_each_other_read_what_stands_behind_in_their_own() -> None:
    """Two blocks of three tokens under one relation: each as if it stood alone."""
    inputs = drawn(6)
    own = (torch.arange(6) // 3)[:, None] == torch.arange(6) // 3
    found = delta.from_behind(inputs, own.tril()[None])
    for part in (slice(0, 3), slice(3, 6)):
        assert near(found[:, part], delta.from_behind(inputs.part(part)))
