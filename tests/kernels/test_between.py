"""Norms and rotations in C++: torch's own bits, and recordings in which they stand for torch's operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.kernels import compiled, rewritten
from orthrus.kernels.compiled import instructions
from orthrus.kernels.recorded import record
from orthrus.model import traced
from orthrus.model.attachment import attachment_of
from orthrus.policy import steps
from tests import families
from tests.decode.drive import decode, dual
from tests.kernels.conftest import HERE, Operator
from tests.kernels.test_int8 import threads

pytestmark = pytest.mark.skipif(
    instructions() is None or not compiled._compiler(), reason="needs Linux on an x86 CPU, and a compiler"
)

DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 1e-5


@pytest.fixture
def names(own: tuple[str, Operator], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The operators' names; what is recorded from now on has them."""
    found = (f"normed_{own[0]}", f"rotated_{own[0]}")
    monkeypatch.setattr(rewritten, "between", lambda: found)
    return found


def operator(name: str) -> Operator:
    found: Operator = getattr(torch.ops.orthrus, name).default
    return found


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """The specification, as models write it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * wide.to(x.dtype)


def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The specification, as models write it."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 64, 100, 576, 1000, 2048, 5120, 20000])
def test_norms_have_torchs_bits(names: tuple[str, str], size: int, dtype: torch.dtype) -> None:
    """Of rows side by side or apart, tiny ones, zeros and such as are not finite."""
    x, weight = torch.randn(2, 9, 3, size).to(dtype) * 3, torch.randn(size).to(dtype)
    x[0, 0], x[0, 1], x[0, 2, 0, 0], x[0, 3] = 0, 1e-20, torch.inf, 1e18
    for count in (1, 2):
        with threads(count):
            for rows in (x, x[:, 3:5], x.transpose(1, 2)):
                expected = norm(rows, weight)
                torch.testing.assert_close(
                    operator(names[0])(rows, weight, EPSILON), expected, rtol=0, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 6, 64, 80])
def test_rotations_have_torchs_bits(names: tuple[str, str], size: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 5, size + 8).to(dtype)[..., :size].transpose(1, 2)
    for angles in (1, 2):
        cos, sin = torch.randn(2, angles, 1, 7, size).to(dtype)
        found, expected = operator(names[1])(x, cos, sin), rotation(x, cos, sin)
        assert torch.equal(found, expected)
        assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("index", "given", "message"),
    [
        (0, (torch.zeros(2, 7), torch.zeros(7), 1e-5), "8 wide"),
        (0, (torch.zeros(2, 8), torch.zeros(9), 1e-5), "weights must be 8"),
        (0, (torch.zeros(2, 8), torch.zeros(8).bfloat16(), 1e-5), "float32 or bfloat16"),
        (0, (torch.zeros(8, 2).T, torch.zeros(8), 1e-5), "side by side"),
        (1, (torch.zeros(1, 2, 3, 4), *torch.zeros(2, 1, 1, 3, 2)), "angles must be"),
        (1, (torch.zeros(1, 2, 3, 5), *torch.zeros(2, 1, 1, 3, 5)), "C even"),
    ],
)
def test_what_does_not_fit_is_refused(names: tuple[str, str], index: int, given: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator(names[index])(*given)


def kinds(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[str]:
    """The operations of a rewritten recording, whose results are compared with the call's over other sizes."""
    found: list[str] = []

    def rewrite(graph: Any) -> None:
        rewritten.rewrite(graph)
        found.extend(node.kind() for node in graph.nodes())

    with torch.inference_mode():
        graph = record(call, inputs, rewrite)
        assert torch.equal(graph(*inputs), call(*inputs))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_recordings_have_them(names: tuple[str, str], dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 3, 8).to(dtype), torch.randn(8).to(dtype)
    assert [kind for kind in kinds(norm, (x, weight)) if "prim" not in kind] == [f"orthrus::{names[0]}"]
    row, (cos, sin) = torch.randn(1, 2, 3, 8).to(dtype), torch.randn(2, 1, 1, 3, 8).to(dtype)
    assert [kind for kind in kinds(rotation, (row, cos, sin)) if "prim" not in kind] == [f"orthrus::{names[1]}"]


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPSILON)),
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPSILON)),
        lambda x, w: w * (x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + EPSILON)),
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
        lambda x, w: w[None, None] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)),
        lambda x, w: torch.cat([x[..., 4:], x[..., :4]], dim=-1) * w + x * w,
        lambda x, w: torch.cat([-x[..., 3:], x[..., :3]], dim=-1) * w + x * w,
    ],
)
def test_other_forms_stay_as_they_are(other: Callable[..., Tensor]) -> None:
    found = kinds(other, (torch.randn(1, 3, 8).abs(), torch.randn(8)))
    assert not any("orthrus" in kind for kind in found)


def test_what_does_nothing_is_left_out(names: tuple[str, str]) -> None:
    def call(x: Tensor) -> Tensor:
        return x.to(torch.float32)[:, :][:1, : x.shape[1]].neg()

    assert sorted(kind for kind in kinds(call, (torch.randn(2, 3),)) if "Constant" not in kind) == [
        "aten::neg",
        "aten::size",
        "aten::slice",
        "aten::slice",
    ]


FAMILIES = [family for family in families.FAMILIES if family not in families.MOE]


@pytest.mark.parametrize("own", HERE[:1], indirect=True)  # tests above compare the bits of each set of instructions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_of_many_families(
    names: tuple[str, str], family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of pass is recorded at the first attempt, which gives the bits of the eager one."""
    monkeypatch.setattr(traced, "USES", 1)
    counts: list[tuple[int, int]] = []

    def rewrite(graph: Any) -> bool:
        changed = rewritten.rewrite(graph)
        found = [node.kind() for node in graph.nodes()]
        norms, rotations = (found.count(f"orthrus::{name}") for name in names)
        counts.append((norms, rotations))
        return changed

    monkeypatch.setattr(traced, "rewrite", rewrite)
    monkeypatch.setattr(traced, "uses_own", lambda *_: True)
    model = dual(family, num_hidden_layers=2).to(dtype)
    engine = Engine(model, rows=1, capacity=96, plan=steps.parse("full"))
    decode(engine, [[5, 6, 7, 8]], Options(max_new_tokens=12))
    recorded = [kind for kind in attachment_of(model).memo("recorder")[""]._kinds.values() if kind.graph is not None]
    assert len(recorded) == len(counts) > 0
    others = (family, dtype) == ("olmo2", torch.bfloat16)  # whose norms multiply by the weight before they round
    assert all(rotations == 4 and (norms == 0 if others else norms >= 5) for norms, rotations in counts)
