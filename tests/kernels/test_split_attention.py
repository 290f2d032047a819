"""The kernel for decoding passes against plain arithmetic; on a CPU with `TRITON_INTERPRET=1` where Triton is there."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device")]
DEVICE = "cpu" if INTERPRETED else "cuda"

from orthrus.kernels.masks import Behind  # noqa: E402
from orthrus.kernels.split_attention import split_attention, write  # noqa: E402
from orthrus.model import split_attention as module  # noqa: E402


def drawn(
    B: int, N: int, G: int, Q: int, W: int, S: int, D: int, lengths: list[int], window: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Behind]:
    """Queries, keys and values as views of `[B, S, N, D]` buffers, and a random mask; each query sees itself."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(B, N, G * Q, D, generator=random).to(DEVICE, dtype)
    key, value = (torch.randn(B, S, N, D, generator=random).to(DEVICE, dtype).transpose(1, 2) for _ in range(2))
    own = torch.rand(B, Q, W, generator=random) < 0.5
    own[:, range(Q), range(Q)] = True
    length = torch.tensor(lengths)
    place = length[:, None] + torch.arange(Q)
    first = None if window is None else (place - window + 1).clamp_min(0).to(DEVICE)
    return query, key, value, Behind(length.to(DEVICE), own.to(DEVICE), first)


def plainly(
    query: Tensor, key: Tensor, value: Tensor, mask: Behind, scaling: float, softcap: float | None, sink: Tensor | None
) -> Tensor:
    """One row, head and query at a time, in float64."""
    B, N, R, _ = query.shape
    Q, W = mask.self_BQW.shape[1:]
    out = torch.empty(B, N, R, value.shape[3], dtype=torch.float64)
    for b in range(B):
        length = int(mask.length_B[b])
        for r in range(R):
            q = r % Q
            seen = [*range(0 if mask.first_BQ is None else int(mask.first_BQ[b, q]), length)]
            seen += [length + w for w in range(W) if mask.self_BQW[b, q, w]]
            for n in range(N):
                score = key[b, n, seen].double().cpu() @ query[b, n, r].double().cpu() * scaling
                score = score if softcap is None else softcap * torch.tanh(score / softcap)
                more = [] if sink is None else [sink[n, r].double().cpu()[None]]
                weight = torch.softmax(torch.cat([score, *more]), 0)[: len(seen)]
                out[b, n, r] = weight @ value[b, n, seen].double().cpu()
    return out


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    ("lengths", "G", "Q", "W", "D", "window", "softcap", "sinks"),
    [
        ([70], 1, 1, 1, 16, None, None, False),
        ([300, 5], 2, 3, 3, 16, None, None, False),
        ([0], 1, 4, 6, 12, None, None, False),
        ([200, 129], 4, 20, 27, 32, None, None, False),
        ([300, 40], 2, 3, 5, 16, 9, None, False),
        ([300, 40], 2, 3, 3, 24, 150, 5.0, False),
        ([130], 2, 2, 2, 16, None, None, True),
        ([2300], 1, 2, 2, 16, None, None, False),
    ],
)
def test_results_are_those_of_plain_arithmetic(
    lengths: list[int],
    G: int,
    Q: int,
    W: int,
    D: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    in_order: bool,
) -> None:
    """Rows of different lengths, no text at all, heads of any size, windows, caps, sinks; more rows than a block."""
    parts = drawn(len(lengths), 2, G, Q, W, max(lengths) + 80, D, lengths, window, torch.float32)
    sink = torch.randn(2, G * Q).to(DEVICE) if sinks else None
    found = split_attention(*parts, scaling=0.3, softcap=softcap, sink_NR=sink, in_order=in_order)
    torch.testing.assert_close(found.double().cpu(), plainly(*parts, 0.3, softcap, sink), rtol=1e-5, atol=1e-5)


REAL = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter multiplies bfloat16 as if it were integers")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=REAL)])
def test_tiles_beyond_reach_change_no_bit(dtype: torch.dtype) -> None:
    """More slots in the cache, whatever they hold, leave every result as it is."""
    query, key, value, mask = drawn(1, 2, 2, 4, 4, 1024, 16, [200], None, dtype)
    short = split_attention(query, key[:, :, :256], value[:, :, :256], mask, scaling=0.3, in_order=True)
    for slots in (384, 1024):
        long = split_attention(query, key[:, :, :slots], value[:, :, :slots], mask, scaling=0.3, in_order=True)
        assert torch.equal(short, long)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=REAL)])
@pytest.mark.parametrize("window", [None, 70])
def test_where_a_pass_begins_changes_no_bit(window: int | None, dtype: torch.dtype) -> None:
    """Keys that are text in one pass are the pass's own in another, in whole blocks of keys and in others."""
    query, key, value, _ = drawn(1, 2, 2, 8, 8, 512, 16, [200], None, dtype)
    last, found = 261, []
    for length in (254, 256, 261):
        own = torch.ones(1, 8, 8, dtype=torch.bool, device=DEVICE).tril()
        own[0, 5] = torch.arange(8, device=DEVICE) <= last - length
        first = None if window is None else torch.full((1, 8), last - window + 1, device=DEVICE)
        mask = Behind(torch.tensor([length], device=DEVICE), own, first)
        out = split_attention(query, key, value, mask, scaling=0.3, in_order=True)
        found.append(out.view(1, 2, 2, 8, 16)[:, :, :, 5])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("size", "dtype"), [(256, torch.bfloat16), (256, torch.float32), (128, torch.float32)])
@pytest.mark.parametrize("shared", [99 << 10, 163 << 10, 227 << 10])
def test_programs_fit_the_devices_memory(
    size: int, dtype: torch.dtype, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of keys, values, queries and scores, the widest that go in."""
    monkeypatch.setattr(module, "_SHARED", shared)
    block, keys, stages = module._shape(torch.empty(1, dtype=dtype), 128, size, size)
    assert (stages * keys * 2 * size + block * size) * dtype.itemsize + 4 * block * keys <= shared
    roomy = module._shape(torch.empty(1, dtype=torch.bfloat16), 128, 64, 64)
    assert roomy == ((64, 128, 2) if shared > 128 << 10 else (64, 64, 2))


@REAL
def test_bfloat16_is_as_near_as_its_digits_allow() -> None:
    parts = drawn(1, 2, 4, 16, 16, 384, 64, [300], None, torch.bfloat16)
    found = split_attention(*parts, scaling=0.125)
    torch.testing.assert_close(found.double().cpu(), plainly(*parts, 0.125, None, None), rtol=2e-2, atol=2e-2)


def test_keys_are_written_where_they_belong() -> None:
    """Rows of different lengths, part of a pass, keys and values of different sizes; nothing else is touched."""
    random = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 5, 3, 8, generator=random), torch.randn(2, 3, 5, 12, generator=random).transpose(1, 2)
    row, slot = torch.tensor([[1], [2]]), torch.tensor([[4, 5, 6], [0, 2, 1]])
    keys, values = torch.randn(4, 9, 5, 8, generator=random), torch.randn(4, 9, 5, 12, generator=random)
    expected = [keys.clone(), values.clone()]
    for buffer, new in zip(expected, (key, value), strict=True):
        buffer[row, slot[:, 1:]] = new[:, :, 1:].transpose(1, 2)
    found = [keys.to(DEVICE), values.to(DEVICE)]
    write(*found, *(x.to(DEVICE) for x in (key[:, :, 1:], value[:, :, 1:], row, slot[:, 1:])))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
