"""`orthrus doctor`: facts, and a verdict that is right when decoding is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus import __version__, zoo
from orthrus.checkpoints import integers
from orthrus.cli import doctor, selfcheck
from orthrus.cli.selfcheck import random_model
from orthrus.decode import accept
from orthrus.decode.accept import Verdict
from orthrus.kernels import compiled, fbgemm, int8, native
from tests.cli.conftest import BLOCK, Ran

Cli = Callable[..., Ran]


@pytest.fixture(autouse=True)
def brief(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every check write less than it does for users."""
    monkeypatch.setattr(selfcheck, "_TOKENS", 12)
    monkeypatch.setattr(doctor, "_PROMPTS", 2)
    monkeypatch.setattr(doctor, "_TOKENS", 8)


@pytest.fixture
def bundled(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the tiny model stand in for the bundled one."""
    monkeypatch.setitem(zoo.BUNDLED, "nano", model_dir)
    return model_dir


def test_everything_is_told_as_data_and_in_words(cli: Cli, bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = cli("doctor", "--json")
    assert ran.code == 0
    facts: dict[str, Any] = json.loads(ran.out)
    assert facts["versions"]["orthrus"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["memory"] == {"folder": None, "files": 0}
    assert facts["dtypes"]["cpu"]["float32"] is True
    assert facts["multiplies"].keys() == facts["dtypes"]["cpu"].keys()
    assert facts["multiplies"]["float32"] == "by oneDNN"
    timed = {"float32", "bfloat16"} | ({"int8"} if facts["dtypes"]["cpu"]["int8"] else set())
    assert {facts["fastest"]["dtype"], *facts["fastest"]["others"]} == timed
    assert facts["bundled"]["products"].keys() == {"float32", "bfloat16"}
    assert (facts["bundled"]["present"], facts["bundled"]["block_size"]) == (True, BLOCK)
    assert facts["bundled"]["view_parameters"] > 0
    for products in facts["bundled"]["products"].values():
        assert products.keys() == {"one", "several"}
        assert {*products.values()} <= {"weights", "copies"}
    checks = {(c["model"], c["dtype"], c["device"]): c for c in facts["checks"]}
    assert {("random", "float32", "cpu"), ("nano", "float32", "cpu")} <= checks.keys()
    assert any(dtype == "bfloat16" for _, dtype, _ in checks)
    assert all(c["passed"] for c in facts["checks"])
    assert facts["passed"] is True
    passes = {(c["pass"], c["width"]) for c in facts["costs"] if (c["model"], c["dtype"]) == ("nano", "float32")}
    assert passes == {("ar", 1), ("draft", 4), ("verify", 4), ("draft", 8), ("verify", 8)}
    assert all(c["seconds"] > 0 and c["device"] == "cpu" for c in facts["costs"])
    doctor._show(facts)
    said = capsys.readouterr().out
    for words in (
        f"orthrus       {__version__}",
        "24 of 24 texts identical",
        "verify 8",
        "on cpu: ",
        "decoding is lossless here",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("halves", "reads", "words"),
    [
        (True, True, "by oneDNN"),
        (False, True, "in float32, weights read in float16"),
        (False, False, "in float32, one row by itself"),
    ],
)
@pytest.mark.parametrize(
    ("exact", "rounds", "integers"),
    [
        (True, True, "as integers, inputs in 8 bits"),
        (True, False, "as integers, inputs in two parts of 7 bits"),
        (False, False, "not here"),
    ],
)
def test_how_the_cpu_multiplies_is_told(
    monkeypatch: pytest.MonkeyPatch, halves: bool, reads: bool, words: str, exact: bool, rounds: bool, integers: str
) -> None:
    monkeypatch.setattr(native, "multiplies", lambda dtype: halves or dtype == torch.float32)
    monkeypatch.setattr(fbgemm, "can_half", lambda: reads)
    monkeypatch.setattr(int8, "is_exact", lambda: exact)
    monkeypatch.setattr(int8, "rounds_inputs", lambda: rounds)
    told = {"float32": "by oneDNN", "bfloat16": words, "float16": words, "int8": integers, "int4": "not here"}
    assert doctor._multiplies() == told
    monkeypatch.setattr(int8, "own_operator", lambda: print)
    own = ", by an operator compiled here" if exact else ""
    assert doctor._multiplies() == told | {"int8": integers + own}
    monkeypatch.setattr(compiled, "compiles", lambda: True)
    assert "blocks of 32" in doctor._multiplies()["int4"]


def test_a_compiler_that_failed_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "is_exact", lambda: True)
    monkeypatch.setattr(compiled, "failure", lambda: Path("linear.log"))
    assert doctor._multiplies()["int8"].endswith(" (the compiler of operators failed: linear.log)")


def test_the_fastest_precision_is_named_with_its_device() -> None:
    """Where there are two to choose from."""
    found = doctor._fastest({"float32": 3.0, "bfloat16": 2.0}, "cuda:0")
    assert found == {"device": "cuda:0", "dtype": "bfloat16", "others": {"float32": 1.5}}
    assert doctor._fastest({"float32": 3.0}, "cpu") == {}


def test_what_is_kept_on_disk_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    (tmp_path / "exact").mkdir()
    (tmp_path / "exact" / "0123.json").write_text("{}")
    assert doctor._memory() == {"folder": str(tmp_path), "files": 1}


def test_an_absent_bundled_model_is_no_failure(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.BUNDLED, "nano", tmp_path)
    ran = cli("doctor")
    assert ran.code == 0
    assert "not in this installation" in ran.out


def test_integers_that_cannot_be_compiled_are_no_failure(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here int4 has no folder for its operator; the model itself is sound."""
    monkeypatch.setattr(integers, "computes", lambda precision: precision == "int4")
    ran = cli("doctor", "--json")
    assert ran.code == 0
    assert "error" not in json.loads(ran.out)["bundled"]
    assert "int4 is not used here: dtype int4 requires a folder" in " ".join(ran.err.split())


def test_a_damaged_bundled_model_is_a_failure(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(model_dir, tmp_path / "nano"))
    (home / "orthrus.safetensors").write_bytes(b"no tensors")
    monkeypatch.setitem(zoo.BUNDLED, "nano", home)
    ran = cli("doctor", "--json")
    assert ran.code == 1
    facts = json.loads(ran.out)
    assert "is damaged" in facts["bundled"]["error"]
    assert facts["verdict"].startswith("the bundled model cannot be used")


def test_decoding_that_is_not_lossless_is_found_out(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance is broken on purpose: the first draft is always taken."""

    def gullible(draft_BM, score_BM1V):  # type: ignore[no-untyped-def]
        own = greedy(draft_BM, score_BM1V)
        if draft_BM.shape[1]:
            own.tokens_BM1[:, 0] = draft_BM[:, 0]
        return Verdict(own.tokens_BM1, own.accepted_B.clamp(min=min(1, draft_BM.shape[1])))

    greedy = accept.greedy
    monkeypatch.setattr(accept, "greedy", gullible)
    monkeypatch.setitem(zoo.BUNDLED, "nano", tmp_path)
    ran = cli("doctor", "--json")
    assert ran.code == 1
    facts = json.loads(ran.out)
    assert facts["passed"] is False
    assert "NOT lossless here: random in float32 on cpu" in facts["verdict"]


def test_the_random_model_is_always_the_same_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    one, other = random_model("cpu"), random_model("cpu")
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
