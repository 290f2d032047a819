"""The operator in C++: the bits of what it stands in for, and a compiler that nobody waits for."""

import copy
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from orthrus.decode.passes import Passes
from orthrus.errors import ConfigError
from orthrus.kernels import compiled, fbgemm, int8, packed
from orthrus.kernels.attention import FEW
from orthrus.kernels.compiled import INSTRUCTIONS, command, instructions, linear_int8, loaded
from orthrus.kernels.recorded import record
from orthrus.model import traced
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from tests.decode.drive import dual
from tests.kernels.conftest import HERE, Operator
from tests.kernels.test_int8 import WIDTHS, group, products, threads

pytestmark = pytest.mark.skipif(
    instructions() is None or not compiled._compiler(), reason="needs Linux on an x86 CPU, and a compiler"
)


@pytest.fixture(scope="module")
def one(own: tuple[str, Operator]) -> Operator:
    """The operator for one row, of the same file."""
    found: Operator = getattr(torch.ops.orthrus, f"linear_few_{own[0]}").default
    return found


@pytest.fixture
def use(own: tuple[str, Operator], monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let layers that are made from now on have the operator, or what it stands in for."""
    name, operator = own
    works = fbgemm.is_exact(127) if name != "avx2" else fbgemm.is_exact()
    if not works:
        pytest.skip("no other product to compare with")
    monkeypatch.setattr(int8, "by_onednn", lambda: False)
    monkeypatch.setattr(int8, "by_fbgemm", lambda: name != "avx2")
    return lambda ours: monkeypatch.setattr(int8, "own_operator", lambda: operator if ours else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("outputs", [(48, 24, 25), (1,), (1000,)])
@pytest.mark.parametrize("inputs", [72, 1536])
def test_bits_are_those_of_the_product_it_stands_in_for(
    use: Callable[[bool], None], inputs: int, outputs: tuple[int, ...], smooth: bool, dtype: torch.dtype
) -> None:
    """At every width, with one thread and two; rows of zeros and such as are not finite too."""
    x = (torch.randn(32, inputs) * torch.logspace(-3, 3, 32)[:, None]).to(dtype)
    x[3], x[4, 0], x[5, 1] = 0, torch.inf, torch.nan
    x[6] *= 1e-36
    use(False)
    expected = products(group(*outputs, inputs=inputs, bias=smooth, smooth=smooth), x)
    use(True)
    model = group(*outputs, inputs=inputs, bias=smooth, smooth=smooth)
    for count in (1, 2):
        with threads(count):
            for width in WIDTHS:
                found = products(model, x[:width])
                assert found.dtype == dtype
                finite = x[:width].isfinite().all(-1)
                assert torch.equal(found[finite], expected[:width][finite])
                assert not found[~finite].isfinite().any()
    assert products(model, x[:0]).shape == (0, sum(outputs))


def test_inputs_that_do_not_come_in_fours_are_left_to_others(use: Callable[[bool], None]) -> None:
    use(True)
    model, x = group(40, inputs=71), torch.randn(3, 71)
    use(False)
    assert torch.equal(products(model, x), products(group(40, inputs=71), x))


def test_recordings_have_the_same_bits(use: Callable[[bool], None]) -> None:
    use(True)
    model, x = group(40, 24), torch.randn(5, 72)
    expected = products(model, x)
    recorded = record(lambda x: products(model, x), (torch.zeros(2, 72),))
    assert torch.equal(recorded(x), expected)


def test_another_width_than_the_weights_is_refused(own: tuple[str, Operator]) -> None:
    blocks, scale = int8.in_blocks(torch.ones(16, 8, dtype=torch.int8)), torch.ones(16)
    with pytest.raises(RuntimeError, match="8 wide"):
        own[1](torch.ones(1, 12), blocks, scale.int(), scale, None, None)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("weight", torch.ones(1, 2, 16, 4)),
        ("weight", torch.ones(2, 2, 16, 4, dtype=torch.int8)),
        ("zero", torch.ones(16)),
        ("scale", torch.ones(16).double()),
        ("factor", torch.ones(7)),
        ("bias", torch.ones(32)[::2]),
    ],
)
def test_what_does_not_belong_to_the_weights_is_refused(own: tuple[str, Operator], name: str, wrong: Tensor) -> None:
    blocks, scale = int8.in_blocks(torch.ones(16, 8, dtype=torch.int8)), torch.ones(16)
    given: dict[str, Any] = {"weight": blocks, "zero": scale.int(), "scale": scale, "factor": None, "bias": None}
    with pytest.raises(RuntimeError, match=f"{name} must be"):
        own[1](torch.ones(1, 8), **given | {name: wrong})


def test_without_inputs_the_bias_is_left(own: tuple[str, Operator], one: Operator) -> None:
    bias, blocks = torch.arange(16.0), torch.empty(1, 0, 16, 4, dtype=torch.int8)
    found = own[1](torch.ones(2, 0), blocks, bias.int() * 0, bias, None, bias)
    assert torch.equal(found, bias.expand(2, 16))
    assert torch.equal(one(torch.ones(1, 0), torch.ones(16, 0), bias), bias[None])


def test_an_operator_of_other_bits_is_not_used(
    own: tuple[str, Operator], use: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiler makes it that was told to compute as it likes; also where only few rows or many differ."""
    name, operator = own
    monkeypatch.setattr(int8, "instructions", lambda: name)
    slightly = 1 + 2**-20
    for found, expected in (
        (operator, operator),
        (lambda *given: operator(*given) * slightly, None),
        (lambda row, *given: operator(row, *given) * (slightly if len(row) > 16 else 1), None),
        (lambda row, *given: operator(row, *given) * (slightly if len(row) < 5 else 1), None),
    ):
        monkeypatch.setattr(int8, "linear_int8", lambda found=found: found)
        assert int8.own_operator() is expected


def test_a_process_keeps_its_first_library(
    own: tuple[str, Operator], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one, of another source or in another folder, would register the same operators, which ends Python."""
    name, operator = own
    folder.mkdir()
    monkeypatch.setattr(compiled, "instructions", lambda: name)
    monkeypatch.setattr(compiled, "_library", [folder / "first.so"])
    assert linear_int8() is operator
    assert loaded(f"linear_int8_{name}", folder / "second.so") is operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (7, 48), (1000, 576)])
def test_one_row_is_multiplied_by_weights_as_they_are(
    one: Operator, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Sums are made in float32 and rounded once; the number of threads changes no bit."""
    weight, bias = torch.randn(outputs, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)
    row = torch.randn(1, 1, inputs, dtype=dtype)
    for b in (None, bias):
        expected = nn.functional.linear(row.double(), weight.double(), None if b is None else b.double())
        found = one(row, weight, b)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        with threads(2):
            assert torch.equal(one(row, weight, b), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 48), (64, 96), (160, 576)])
def test_few_rows_have_the_bits_of_one(
    own: tuple[str, Operator], one: Operator, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """So that passes of any width have the same; by tiles (AMX) they are oneDNN's over a copy, in such shapes."""
    weight, bias = torch.randn(outputs, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)
    rows = torch.randn(1, 40, inputs, dtype=dtype)
    for b in (None, bias):
        whole = one(rows, weight, b)
        expected = nn.functional.linear(rows.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(whole.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        for part in (slice(0, 1), slice(3, 5), slice(7, 23), slice(8, 40)):
            assert torch.equal(one(rows[:, part], weight, b), whole[:, part])
    if own[0] == "amx" and dtype == torch.bfloat16 and outputs % 16 == 0:
        with torch.inference_mode():
            assert torch.equal(packed._multiply(rows, packed._copied([weight]), bias), whole)


@pytest.mark.parametrize(("row", "weight"), [((1, 24), (5, 32)), ((1, 36), (5, 36)), ((2, 16), (5, 32))])
def test_rows_that_do_not_fit_their_weights_are_refused(
    one: Operator, row: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    with pytest.raises(RuntimeError, match="rows must be"):
        one(torch.ones(row), torch.ones(weight), None)
    with pytest.raises(RuntimeError, match="type"):
        one(torch.ones(1, 32), torch.ones(5, 32, dtype=torch.bfloat16), None)
    for bias in (torch.ones(4), torch.ones(5, dtype=torch.bfloat16), torch.ones(10)[::2]):
        with pytest.raises(RuntimeError, match="bias must be"):
            one(torch.ones(1, 32), torch.ones(5, 32), bias)


def test_packed_layers_take_it_where_it_is_measured_to_be_faster(
    one: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row alone; several rows, other types and widths have the kernels that they had, and copies have none."""
    calls: list[int] = []

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return one(*arguments)

    for faster in (True, False):
        monkeypatch.setattr(packed, "_tuned", {})
        monkeypatch.setattr(packed, "linear_few", lambda **_: counted)
        monkeypatch.setattr(packed, "_faster_as_is", lambda *_, faster=faster: faster)
        model = nn.Sequential(nn.Linear(1024, 640), nn.Linear(640, 1000, bias=False), nn.Linear(1000, 1024))
        plain = copy.deepcopy(model)
        packed.pack(model)
        with torch.inference_mode():
            model(torch.randn(1, 3, 1024))
        packed.tune(model)
        without = packed.AsIs(one=faster, several=faster)
        assert packed.kernels_of(model) == {without, without._replace(own=faster)}, "the last is of another width"
        assert all((layer._shared.copy is None) >= faster for layer in model), "copies that nothing reads are dropped"
        for rows, taken in ((1, 2), (3, 0)):
            x = torch.randn(1, rows, 1024)
            calls.clear()
            with torch.inference_mode():
                torch.testing.assert_close(model(x), plain(x))
            assert len(calls) == faster * taken
        again = copy.deepcopy(model)
        calls.clear()
        with torch.inference_mode():
            again(torch.randn(1, 1, 1024))
        assert not calls
        assert packed.kernels_of(again) == {without}
        packed.unpack(model)
        assert all("_own" not in layer.__dict__ for layer in model)


def test_packed_layers_take_it_for_few_rows_by_tiles(one: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, up to `FEW` rows of one text, where measured to be faster; copies serve more rows and texts."""
    calls: list[int] = []

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return one(*arguments)

    monkeypatch.setattr(packed, "_tuned", {})
    monkeypatch.setattr(packed, "instructions", lambda: "amx")
    monkeypatch.setattr(packed, "linear_few", lambda **_: counted)
    monkeypatch.setattr(packed, "_faster_as_is", lambda _, rows, *more: rows == 1 or more[-1].few)
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Sequential(nn.Linear(1024, 640), nn.Linear(640, 1024)).to(dtype)
        plain = copy.deepcopy(model)
        packed.pack(model)
        packed.tune(model)
        few = dtype == torch.bfloat16
        assert packed.kernels_of(model) == {packed.AsIs(one=True, own=True, few=few)}
        each = [((1, 1), 2), ((1, 3), 2 * few), ((1, FEW), 2 * few), ((1, FEW + 1), 0), ((2, 1), 0), ((3,), 0)]
        for shape, taken in each:
            x = torch.randn(*shape, 1024, dtype=dtype)
            calls.clear()
            with torch.inference_mode():
                torch.testing.assert_close(model(x), plain(x), rtol=0.02, atol=0.02)
            assert len(calls) == taken


@torch.inference_mode()
def test_recordings_multiply_as_eager_passes_do(one: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One over few rows of a text serves no more of them, nor more texts: the operator has bits of its own."""
    monkeypatch.setattr(traced, "USES", 1)
    model = dual("llama").to(torch.bfloat16)
    packed.pack(model)
    for layer in packed._of_class(model, packed.PackedLinear):
        layer.as_is, layer._own = packed.AsIs(one=True, own=True, few=True), one
    passes = Passes(model, ScratchCache(rows=8, capacity=128))
    passes.prefill(slice(0, 8), [[3, 4, 5 + i] for i in range(8)], chunk=64)
    recorder = attachment_of(model).memo("recorder")[""]
    for texts, width in ((1, 5), (1, 6), (1, FEW + 8), (1, FEW + 9), (2, 3), (2, 4), (8, 9), (1, 7), (8, 10)):
        token_BQ = torch.arange(width).expand(texts, -1)
        recorded = passes.verify(slice(0, texts), token_BQ)
        with patch.object(recorder, "logits", lambda _: None):
            assert torch.equal(passes.verify(slice(0, texts), token_BQ), recorded)
    assert sum(kind.graph is not None for kind in recorder._kinds.values()) == 3


def test_the_compiler_starts_behind_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(packed, "_tuned", {})
    monkeypatch.setattr(packed, "linear_few", lambda *, start=True: seen.append("started") if start else None)
    monkeypatch.setattr(packed, "_faster_as_is", lambda *_: bool(seen.append("timed")))
    model = nn.Sequential(nn.Linear(1024, 640))
    packed.pack(model)
    packed.tune(model)
    assert seen == ["timed", "timed", "started"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    return tmp_path / "compiled"


def test_the_compiler_runs_beside_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes is taken once it is whole; a compiler that fails is not tried again at every load."""
    made: list[Path] = []
    monkeypatch.setattr(compiled, "command", lambda name, file, scratch: made.append(file) or "echo failed")
    monkeypatch.setattr(compiled, "instructions", lambda: "nowhere")
    monkeypatch.setitem(INSTRUCTIONS, "nowhere", ())
    assert linear_int8() is None
    assert linear_int8() is None
    compiled._running[-1].wait()
    (file,) = made
    log = file.with_suffix(".log")
    assert log.read_text() == "failed\n"
    assert compiled.failure() == log
    for told, seconds, again in (("failed\n", 700, 0), ("", 500, 0), ("", 700, 1), ("failed\n", 90000, 1)):
        made.clear()
        log.write_text(told)
        os.utime(log, (time() - seconds,) * 2)
        assert linear_int8() is None
        assert len(made) == again
        compiled._running[-1].wait()
    file.write_text("not a library")
    file.chmod(0o644)
    assert linear_int8() is None
    assert not file.exists()
    assert compiled.failure() == log


def test_a_compiler_that_fails_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    (scratch := tmp_path / "scratch").mkdir()
    line = command("avx2", tmp_path / "operators.so", scratch)
    assert subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout == "failed\n"
    assert not [*tmp_path.iterdir()]


def test_every_source_is_compiled_and_of_the_librarys_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [*Path(compiled.__file__).parent.glob("*.cpp")]
    line = command("avx2", Path("a.so"), Path("scratch"))
    assert sources
    assert all(line.count(f"-include {source} ") == 1 for source in sources)
    keys = {compiled._file("avx2")}
    for source in (*sources, next(Path(compiled.__file__).parent.glob("*.h"))):
        read = Path.read_text
        changed = lambda path, **how: read(path, **how) + " " * (path == source)  # noqa: B023, E731
        monkeypatch.setattr(Path, "read_text", changed)
        keys.add(compiled._file("avx2"))
        monkeypatch.setattr(Path, "read_text", read)
    assert len(keys) == 2 + len(sources)


def test_what_others_may_write_to_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = compiled._file(HERE[0])
    assert file is not None
    folder.mkdir(mode=0o755)
    file.write_text("not a library")
    file.chmod(0o644)
    for path in (file, folder):
        before = path.stat().st_mode
        path.chmod(0o777)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert linear_int8() is None
        assert "others than this user may write" in caplog.text
        path.chmod(before)
    assert file.exists()


@pytest.mark.parametrize("who", ["owner", "mode"])
def test_a_folder_that_cannot_be_trusted_is_named(
    who: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its owner and mode and what to do, before anything is compiled; measuring goes on without operators."""
    folder.mkdir(mode=0o755)
    if who == "mode":
        folder.chmod(0o777)
    elif os.geteuid() == 0:  # whom everybody trusts
        os.chown(folder, 4712, -1)
    owner, mode = folder.stat().st_uid, 755 if who == "owner" else 777
    if who == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(compiled, "_library", [])
    found = rf"found {folder} of user {owner} with mode {mode}: change its owner and mode"
    told = rf"only this user or root may write to, {found}, or let ORTHRUS_CACHE name another"
    with pytest.raises(ConfigError, match=told):
        compiled.required("linear_blocks", by="dtype int4")
    assert linear_int8() is None
    compiled.prepare()
    assert "no operators are compiled: " in capsys.readouterr().err
    assert not [*folder.iterdir()]


def test_all_is_compiled_before_anything_is_timed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While its caller waits, once; not where a compiler failed not long ago, nor where there is none."""
    made: list[Path] = []
    answer = "echo failed"
    monkeypatch.setattr(compiled, "command", lambda name, file, scratch: made.append(file) or answer.format(file))
    monkeypatch.setattr(compiled, "instructions", lambda: HERE[0])
    monkeypatch.setattr(compiled, "_library", [])
    for _ in range(2):
        compiled.prepare()
    assert len(made) == 1
    log, told = made[0].with_suffix(".log"), "compiling the operators once, which takes some 10 seconds\n"
    assert capsys.readouterr().err == told + 2 * f"no operators are compiled: see {log}\n"
    assert [*folder.iterdir()] == [log]
    os.utime(log, (time() - 90000,) * 2)
    answer = "touch {}"
    for _ in range(2):
        compiled.prepare()
    assert len(made) == 2
    assert capsys.readouterr().err == told
    assert made[0].exists()
    made[0].unlink()
    for lack in ("CXX", "ORTHRUS_CACHE"):
        monkeypatch.setenv(lack, "")
        compiled.prepare()
    assert len(made) == 2


def test_a_compiler_that_is_stopped_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder nor half a log, for which others would wait; the log of a compiler elsewhere stays as it is."""

    def stopped(line: list[str], **_: object) -> None:
        raise KeyboardInterrupt

    file = compiled._file(HERE[0])
    assert file is not None
    monkeypatch.setattr(compiled, "instructions", lambda: HERE[0])
    monkeypatch.setattr(compiled, "_library", [])
    monkeypatch.setattr(subprocess, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        compiled.prepare()
    assert not [*folder.iterdir()]
    (log := file.with_suffix(".log")).write_text("begun")
    with pytest.raises(KeyboardInterrupt):
        compiled.prepare()
    assert [*folder.iterdir()] == [log]
    assert log.read_text() == "begun"


@pytest.mark.parametrize(
    ("unknown", "expected"), [("amx", "avx512_vnni"), ("vnni", "avx2"), ("", "amx"), (None, "amx")]
)
def test_the_compiler_takes_part_in_choosing_instructions(
    unknown: str | None, expected: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not know the fastest is given the next; where none helps, or there is none, what is compiled."""
    flags = {flag for needed in INSTRUCTIONS.values() for flag in needed}
    monkeypatch.setattr(compiled, "processor", lambda: {"flags": " ".join(flags)})
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *{unknown}*) exit 1;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "" if unknown is None else str(compiler))
    assert instructions.__wrapped__() == expected
    for name in ("avx2", "avx512_vnni", "amx"):
        file = compiled._file(name)
        assert file is not None
        file.parent.mkdir(exist_ok=True)
        file.touch()
        if not unknown:
            assert instructions.__wrapped__() == name


def test_a_compiler_may_be_named_with_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are of the library's key; those that change bits are taken back."""
    before = compiled._file("avx2")
    monkeypatch.setenv("CXX", "ccache 'my c++' -Ofast")
    line = command("avx2", Path("a.so"), Path("scratch"))
    assert line.startswith("ccache 'my c++' -Ofast -O3 ")
    assert line.count("-fno-fast-math -ffp-contract=off") == 2
    assert compiled._file("avx2") != before


def test_a_file_that_cannot_be_loaded_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "damaged.so").write_text("nothing")
    with caplog.at_level(logging.INFO):
        assert loaded("linear_few_nowhere", tmp_path / "damaged.so") is None
    assert "damaged.so cannot be loaded" in caplog.text


def refuse(*_: object, **__: object) -> bool:
    raise PermissionError(13, "another user's folder")


@pytest.mark.parametrize("lack", ["folder", "instructions", "compiler", "room", "CXX", "quote", "rights"])
def test_nothing_is_compiled_without(lack: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lack == "folder":
        monkeypatch.setenv("ORTHRUS_CACHE", "")
    elif lack == "room":
        folder.write_text("a file where the folder would be")
    elif lack in ("CXX", "quote"):
        monkeypatch.setenv("CXX", {"CXX": "", "quote": "c++ '"}[lack])
    elif lack == "rights":
        monkeypatch.setattr(Path, "exists", refuse)
    elif lack == "instructions":
        monkeypatch.setattr(compiled, "instructions", lambda: None)
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(shutil, "which", lambda _: None)
    before = len(compiled._running)
    assert linear_int8() is None
    assert len(compiled._running) == before


def test_other_rounding_leaves_the_operator_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "linear_int8", lambda: "ours")
    monkeypatch.setattr(int8, "_agrees", lambda own: True)
    monkeypatch.setattr(int8, "rounds_inputs", lambda: True)
    for name in INSTRUCTIONS:
        monkeypatch.setattr(int8, "instructions", lambda name=name: name)
        assert int8.own_operator() == (None if name == "avx2" else "ours")
