"""A run writes what it should, once, whatever happens to it on the way."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.contenders import contenders
from orthrus.bench.lines import Result
from orthrus.bench.race import Answer, Contender, Decoder
from orthrus.bench.session import Outlook
from orthrus.bench.speed import run as bench
from orthrus.bench.speed.run import Job, run
from orthrus.checkpoints.load import load
from orthrus.data.records import read_records
from orthrus.decode.output import Stats
from orthrus.errors import ConfigError, PromptError
from orthrus.model.fingerprint import weights_digest
from tests.bench.conftest import Ticks

Start = Callable[..., list[Result]]


class Stop(Exception):
    """Stands for a killed run."""


@pytest.fixture
def start(model_folder: Path, prompt_file: Path, ticks: Ticks, tmp_path: Path) -> Start:
    """Run over the prompt file into `out.jsonl` with the fake clock, and return the lines there."""

    def go(
        *,
        on_lap: Callable[[], None] = lambda: None,
        on_start: Callable[[Outlook], None] = lambda _: None,
        **job: Any,
    ) -> list[Result]:
        given = {
            "model": "tiny",
            "suites": (str(prompt_file),),
            "contenders": contenders(["ar", "orthrus"], ["full"]),
            "max_new_tokens": 6,
            "rounds": 2,
            **job,
        }
        output = tmp_path / "out.jsonl"
        run(Job(**given), output, load=_loader(model_folder), clock=ticks, on_lap=on_lap, on_start=on_start)
        return Result.read(read_records(output), where="out")

    return go


def test_every_prompt_has_a_line_for_every_contender(start: Start, tmp_path: Path) -> None:
    found = start()
    assert [(line.id, line.mode) for line in found] == [(f"t/{i}", m) for i in range(5) for m in ("ar", "orthrus")]
    head = read_records(tmp_path / "out.jsonl")[0]
    assert head["kind"] == "provenance"
    assert {(line.provenance, line.configuration) for line in found} == {(head["id"], head["configuration"])}
    assert {line.identical for line in found} == {True}
    assert {line.seconds for line in found} == {1.0}  # the clock moves by one within each lap
    assert all(line.rounds_seconds == [1.0, 1.0] for line in found)


def test_statistics_have_the_engine_s_names(start: Start) -> None:
    line = start(limit=1)[1]
    assert line.stats.keys() == Stats().to_dict().keys()
    assert line.stats["emitted"] == 6
    assert line.proposed_per_position[0] == line.stats["cycles"]
    assert sum(line.accepted_at_position) == line.stats["accepted"]


@pytest.mark.parametrize("batches", [(1,), (1, 3)])
def test_no_pass_is_recorded_while_the_clock_runs(
    batches: tuple[int, ...], start: Start, recordings: list[bool]
) -> None:
    """Those of all plans without fused passes, at every batch size."""
    who = contenders(["ar", "orthrus"], ["full", "auto", "tree:4"])
    start(contenders=who, batches=batches, limit=4, max_new_tokens=16, warmup=0)
    assert all(recordings)
    assert len(recordings) == 3 * len(batches)


def test_a_second_run_finds_everything_done(start: Start, ticks: Ticks) -> None:
    first = start()
    reads, outlooks = ticks.reads, []
    assert start(on_start=outlooks.append) == first
    assert ticks.reads == reads
    assert (outlooks[0].done, outlooks[0].heats) == (5, [])


def test_an_interrupted_run_is_taken_up_and_completed(start: Start, tmp_path: Path) -> None:
    """Killed after the laps of two prompts and one more, half a line written: the rest is measured, once."""
    laps = iter(range(9))

    def until_nine() -> None:
        if next(laps, None) is None:
            raise Stop

    with pytest.raises(Stop):
        start(on_lap=until_nine)
    output = tmp_path / "out.jsonl"
    before = Result.read(read_records(output), where="out")
    assert [line.id for line in before] == ["t/0", "t/0", "t/1", "t/1"]
    with output.open("a") as file:
        file.write('{"kind": "result", "id": "t/')
    outlooks: list[Outlook] = []
    after = start(on_start=outlooks.append)
    assert outlooks[0].done == 2
    assert after[:4] == before
    assert [(line.id, line.mode) for line in after] == [(f"t/{i}", m) for i in range(5) for m in ("ar", "orthrus")]
    assert [r["kind"] for r in read_records(output)].count("provenance") == 2


def test_a_larger_limit_adds_prompts_and_other_settings_add_runs(start: Start) -> None:
    few = start(limit=2)
    more = start(limit=3)
    assert more[:4] == few
    assert len(more) == 6
    other = start(limit=2, max_new_tokens=4)
    assert len(other) == 10
    assert len({line.configuration for line in other}) == 2


def test_a_wrong_text_is_not_identical(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender whose fourth token is wrong, on the second prompt only, in the second round only."""
    wrong = Contender("orthrus", "full", "distribution")
    monkeypatch.setattr(bench, "decoders", _with_a_mistake(bench.decoders, wrong, call=4, place=3))
    found = start(warmup=0)
    mistakes = [(line.id, line.mode, line.diverges_at) for line in found if not line.identical]
    assert mistakes == [("t/1", "orthrus", 3)]


def test_without_plain_decoding_identity_is_not_known(start: Start) -> None:
    found = start(contenders=contenders(["orthrus", "hf"], ["full"]), limit=1)
    assert [(line.identical, line.diverges_at) for line in found] == [(None, None)] * 2


def test_token_exactness_is_compared_with_plain_decoding_as_exact(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of plain decoding with `exact="distribution"` touches nobody who is exact to the token."""
    wrong = Contender("ar", None, "distribution")
    monkeypatch.setattr(bench, "decoders", _with_a_mistake(bench.decoders, wrong, call=1, place=0))
    made = contenders(["ar", "orthrus", "hf"], ["full"], ["distribution", "token"])
    found = start(contenders=made, limit=1, rounds=1, warmup=0)
    assert [(line.mode, line.exact, line.identical) for line in found] == [
        ("ar", "distribution", True),
        ("ar", "token", True),
        ("orthrus", "distribution", False),
        ("orthrus", "token", True),
        ("hf", None, False),
    ]


def test_batches_share_their_seconds_and_leave_out_who_cannot(start: Start) -> None:
    found = start(batches=(1, 2), contenders=contenders(["ar", "hf-lookup"]), rounds=1)
    assert len([line for line in found if line.batch == 1]) == 10
    pairs = [line for line in found if line.batch == 2]
    assert [(line.id, line.group, line.rows, line.seconds) for line in pairs] == [
        ("t/0", "t/0", 2, 0.5),
        ("t/1", "t/0", 2, 0.5),
        ("t/2", "t/2", 2, 0.5),
        ("t/3", "t/2", 2, 0.5),
        ("t/4", "t/4", 1, 1.0),
    ]
    assert {line.mode for line in pairs} == {"ar"}


def test_batches_and_precisions_write_the_same_lines_whichever_was_first(start: Start) -> None:
    found = start(dtypes=("float32", "bfloat16"), limit=2, rounds=1)
    assert [line.dtype for line in found] == ["float32"] * 4 + ["bfloat16"] * 4
    assert len({line.configuration for line in found}) == 1


def test_synthetic_suites_say_what_is_right(start: Start) -> None:
    found = start(suites=("synthetic:maths@heldout",), limit=2, rounds=1)
    assert {(line.domain, line.right) for line in found} == {("maths", False)}


def test_answers_shrink_to_the_context_and_longer_prompts_are_left_out(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("0" * 480 + "\n" + "0" * 600 + "\n")
    outlooks: list[Outlook] = []
    found = start(suites=(str(path),), max_new_tokens=64, rounds=1, on_start=outlooks.append)
    assert outlooks[0].too_long == 1
    assert [(line.prompt_tokens + line.stats["emitted"], line.identical) for line in found] == [(512, True)] * 2


def test_a_suite_of_nothing_but_long_prompts_is_an_error(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("0" * 600)
    with pytest.raises(PromptError, match="512"):
        start(suites=(str(path),))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("max_new_tokens", 0),
        ("warmup", -1),
        ("batches", (0,)),
        ("batches", (1, 1)),
        ("suites", ()),
    ],
)
def test_jobs_that_make_no_sense_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError):
        Job(**{"model": "m", "suites": ("s",), "contenders": contenders(["ar"]), field: value})


def test_who_can_run_no_batch_asked_for_is_named() -> None:
    with pytest.raises(ConfigError, match=r"hf-lookup takes one prompt at a time.*found \[8\]"):
        Job(model="m", suites=("s",), contenders=contenders(["ar", "hf-lookup"]), batches=(8,))


def test_a_batch_that_nobody_can_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="hf-lookup"):
        Job(model="m", suites=("s",), contenders=contenders(["hf-lookup"]), batches=(2,))


def test_suites_whose_lines_could_not_be_told_apart_are_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'synthetic:json' and 'synthetic:json@heldout' both have"):
        start(suites=("synthetic:json", "synthetic:json@heldout"), limit=1)
    assert not (tmp_path / "out.jsonl").exists()


def test_other_weights_are_another_configuration(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model = loaded[0]
    before = weights_digest(model)
    twin = next(p for name, p in model.named_parameters() if ".diffusion." in name)
    saved = twin.data.clone()
    twin.data[0, 0] += 1
    assert weights_digest(model) != before
    twin.data.copy_(saved)
    assert weights_digest(model) == before


def _loader(folder: Path) -> Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    return lambda dtype: load(folder, dtype=dtype, device="cpu")


def _with_a_mistake(
    make: Callable[..., dict[Contender, Decoder]], contender: Contender, *, call: int, place: int
) -> Callable[..., dict[Contender, Decoder]]:
    """Change one token of what a contender writes when it is called for the `call`-th time."""

    def made(*arguments: Any, **options: Any) -> dict[Contender, Decoder]:
        run = make(*arguments, **options)
        honest, calls = run[contender], iter(range(1, 100))

        def wrong(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
            answers = honest(prompts, max_new_tokens)
            if next(calls) != call:
                return answers
            tokens = list(answers[0].token_ids)
            tokens[place] += 1
            return [dataclasses.replace(answers[0], token_ids=tokens), *answers[1:]]

        return {**run, contender: wrong}

    return made
