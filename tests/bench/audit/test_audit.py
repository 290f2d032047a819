"""An audit finds every text that is not plain decoding's, says where and how close it was, and what was promised."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench import texts
from orthrus.bench.audit import run
from orthrus.bench.audit.contract import contract
from orthrus.bench.audit.report import AuditReport, quantiles, read_audit, summaries
from orthrus.bench.audit.run import Job
from orthrus.bench.audit.tables import tables, verdict
from orthrus.bench.audit.verdicts import Divergence, Reference, Verdict, close, from_hf, read
from orthrus.checkpoints.load import load
from orthrus.data.records import read_records
from orthrus.decode.rows import Row
from orthrus.errors import ConfigError, DataError
from tests.bench.conftest import Ticks
from tests.bench.lines_of import result, stats

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

# ---------------------------------------------------------------- comparing


def test_a_parting_is_the_first_token_that_differs_and_the_reference_s_gap_there() -> None:
    gaps = [0.5, 0.25, 0.125]
    assert Divergence.of([7, 8, 9], [7, 8, 9], gaps) is None
    assert Divergence.of([7, 5, 9], [7, 8, 9], gaps) == Divergence(1, 0.25)
    assert Divergence.of([7, 8], [7, 8, 9], gaps) == Divergence(2, 0.125)
    assert Divergence.of([7, 8, 9, 1], [7, 8, 9], gaps) == Divergence(3, None)


def test_a_gap_against_hugging_face_is_known_while_the_text_is_the_reference() -> None:
    """Beyond the place where a text leaves the reference, the reference's gaps are those of another text."""
    reference, gaps = [7, 8, 9], [0.5, 0.25, 0.125]
    assert from_hf([7, 8, 9], [7, 8, 9], reference, gaps) is None
    assert from_hf([7, 8, 9], [7, 1, 9], reference, gaps) == Divergence(1, 0.25)
    assert from_hf([7, 3, 9], [7, 8, 9], reference, gaps) == Divergence(1, 0.25)
    assert from_hf([7, 3, 9], [7, 3, 1], reference, gaps) == Divergence(2, None)


def test_close_positions_are_counted_below_each_margin() -> None:
    """0.001, 0.01, 0.1, 0.5; a gap of just as much is not below."""
    assert close([0.0, 0.001, 0.05, 0.1, 0.7]) == [1, 2, 3, 4]


@given(
    st.lists(st.tuples(st.floats(1, 1e6), st.booleans()), max_size=30),
    st.integers(1, 5),
)
def test_quantiles_split_texts_evenly_and_in_order(given_texts: list[tuple[float, bool]], count: int) -> None:
    """Every text is in one of them, sizes differ by one at most, and none overlaps the next."""
    found = quantiles(given_texts, count)
    assert sum(q.prompts for q in found) == len(given_texts)
    assert sum(q.identical for q in found) == sum(same for _, same in given_texts)
    if len(given_texts) >= count:
        assert max(q.prompts for q in found) - min(q.prompts for q in found) <= 1
    ends = [end for q in found for end in (q.low, q.high)]
    assert ends == sorted(ends)


# ---------------------------------------------------------------- what is promised


def judged(*, gap: float | None = None, **fields: Any) -> Verdict:
    """Return a verdict made by hand; of a mismatch at position 3 when a gap is given."""
    at = fields.pop("at", None if gap is None else 3)
    line = result(**{"identical": at is None, "diverges_at": at, **fields})
    return Verdict(**asdict(line), gap=gap, hf=None, conditions={"device": "a toaster"})


@pytest.mark.parametrize(
    ("dtype", "exact", "promised"),
    [
        ("float32", "distribution", True),
        ("float32", "token", True),
        ("bfloat16", "distribution", False),
        ("bfloat16", "token", True),
        ("float16", "distribution", False),
        ("float16", "token", True),
    ],
)
@pytest.mark.parametrize("mode", ["ar", "orthrus"])
def test_one_text_breaks_the_contract_where_it_is_promised(dtype: str, exact: str, promised: bool, mode: str) -> None:
    """However small the gap, of a dense backbone; plain decoding at another batch size is promised too."""
    found = contract([judged(dtype=dtype, exact=exact, mode=mode), judged(dtype=dtype, exact=exact, gap=0.0, id="9")])
    assert found.holds is not promised
    assert found.texts == 2 * promised
    assert [m.id for m in found.broken] == ["9"] * promised


@pytest.mark.parametrize(("gap", "ties", "broken"), [(0.0, 1, 0), (1e-3, 1, 0), (1.1e-3, 0, 1)])
def test_experts_may_part_at_a_tie(gap: float, ties: int, broken: int) -> None:
    """Within epsilon it is reported, beyond it breaks the contract."""
    found = contract([judged(gap=gap)], experts=True)
    assert (len(found.ties), len(found.broken)) == (ties, broken)
    assert contract([judged(gap=gap)], experts=True, epsilon=1.0).holds
    assert not contract([judged(gap=gap)], experts=False, epsilon=1.0).holds


def test_a_parting_without_a_gap_is_no_tie() -> None:
    """The reference has ended there: no closeness of logits explains it."""
    assert not contract([judged(at=4)], experts=True).holds


@pytest.mark.parametrize(("plan", "passes", "holds"), [("full", 10, True), ("full", 11, False), ("auto", 99, True)])
def test_more_passes_than_plain_decoding_break_the_contract_under_full(plan: str, passes: int, holds: bool) -> None:
    """Ten tokens are ten passes plainly, the prompt's among them; at any precision."""
    taken = stats(plain_steps=10) | {"forwards": passes}
    found = contract([judged(mode="orthrus", plan=plan, dtype="bfloat16", stats=taken)])
    assert (found.holds, found.counted, len(found.wasteful)) == (holds, plan == "full", not holds)
    json.dumps(found.to_dict())


@pytest.mark.parametrize("trusted", [False, True])
def test_passes_of_exact_token_are_counted_where_first_tokens_need_no_verification(trusted: bool) -> None:
    taken = stats(plain_steps=10) | {"forwards": 20}
    text = judged(mode="orthrus", plan="full", exact="token", stats=taken)
    found = contract([replace(text, conditions={"finding": {"drafts_exact": trusted}})])
    assert (found.holds, found.counted) == (not trusted, int(trusted))


def test_the_verdict_in_a_line() -> None:
    taken = stats(plain_steps=10) | {"forwards": 20}
    broken = verdict(contract([judged(mode="orthrus", plan="full", stats=taken)]))
    assert broken == "BROKEN: of 1 texts under full 1 took more passes than plain decoding"
    assert verdict(contract([judged()])).startswith("holds: 1 texts")
    assert verdict(contract([judged(gap=0.0)], experts=True)).endswith("up to ties within 0.001")
    assert verdict(contract([judged(), judged(gap=0.5, id="1")])).startswith("BROKEN: of 2 texts")
    assert verdict(contract([judged(dtype="bfloat16", gap=0.5)])).startswith("nothing was promised")


# ---------------------------------------------------------------- figures


def _reference(id: str, perplexity: float, **fields: Any) -> Reference:
    usual: dict[str, Any] = {
        "provenance": "p",
        "configuration": "c",
        "suite": "s",
        "domain": "d",
        "dtype": "float32",
        "exact": "distribution",
        "tokens": 10,
        "token_hash": "h",
        "close": [0, 1, 2, 3],
        "hf": None,
    }
    return Reference(**{**usual, **fields, "id": id, "perplexity": perplexity})


def test_figures_of_a_setting() -> None:
    """Two prompts, plainly and with drafts in half the time; one parts, the one whose text surprises more."""
    drafted = {"mode": "orthrus", "plan": "full", "seconds": 0.5, "stats": stats(cycles=4, accepted=6)}
    verdicts = [judged(id="0"), judged(id="1"), judged(id="0", **drafted), judged(id="1", gap=0.25, **drafted)]
    plain, own = summaries([_reference("0", 2.0), _reference("1", 8.0)], verdicts)
    assert (plain.prompts, plain.identical, plain.speed, plain.tokens_per_cycle) == (2, 2, None, None)
    assert (own.prompts, own.identical, own.tokens_per_cycle) == (2, 1, 2.5)
    assert (own.tokens_per_forward, own.least_tokens_per_forward, own.below_one_token_per_forward) == (
        10 / 9,
        10 / 9,
        0,
    )
    assert (plain.least_tokens_per_forward, plain.below_one_token_per_forward) == (10 / 11, 2)
    assert own.speed is not None
    assert own.speed.value == 2.0
    assert own.partings == [Divergence(3, 0.25)]
    assert [(q.low, q.identical) for q in own.by_perplexity] == [(2.0, 1), (8.0, 0)]


def test_settings_keep_their_order_in_every_section() -> None:
    """Whatever order the lines have: those of one precision and promise stay together, domains come before all."""
    made = [
        judged(domain=domain, id=domain, exact=exact, mode=mode)
        for domain, order in (("a", 1), ("b", -1))
        for mode in ("ar", "orthrus")[::order]
        for exact in ("distribution", "token")[::order]
    ]
    found = summaries([_reference(d, 1.0, exact=e) for d in "ab" for e in ("distribution", "token")], made)
    settings = [("distribution", "ar"), ("distribution", "orthrus"), ("token", "ar"), ("token", "orthrus")]
    assert [(s.domain, s.setting.exact, s.setting.mode) for s in found] == [
        (domain, *setting) for domain in ("a", "b", "all") for setting in settings
    ]


# ---------------------------------------------------------------- a run

Start = Callable[..., AuditReport]


class Stop(Exception):
    """Stands for a killed run."""


@pytest.fixture
def start(loaded: Loaded, model_folder: Path, prompt_file: Path, ticks: Ticks, tmp_path: Path) -> Start:
    """Audit the prompt file into `out.jsonl` with the fake clock, and return the report."""

    def go(*, on_lap: Callable[[], None] = lambda: None, change: Callable[..., Any] | None = None, **job: Any) -> Any:
        def loader(dtype: str) -> Loaded:
            model, tokenizer = load(model_folder, dtype=dtype, device="cpu") if change else loaded
            if change:
                change(model)
            return model, tokenizer

        given = {"dtypes": ("float32",), "plans": ("full",), "batches": (1, 2), "max_new_tokens": 6, **job}
        made, output = Job(model="tiny", suites=(str(prompt_file),), **given), tmp_path / "out.jsonl"
        return read_audit(output, run.run(made, output, load=loader, clock=ticks, on_lap=on_lap))

    return go


def test_every_prompt_is_answered_by_everyone(start: Start, tmp_path: Path) -> None:
    """Five prompts, two promises, two modes, two batch sizes; the conditions are in every line."""
    report = start()
    records = read_records(tmp_path / "out.jsonl")
    kinds = [record["kind"] for record in records]
    assert (kinds.count("provenance"), kinds.count("reference"), kinds.count("result")) == (1, 5 * 2, 5 * 2 * 2 * 2)
    assert report.contract.holds
    assert report.contract.texts == 40
    lines = [record for record in records if record["kind"] == "result"]
    for line in lines:
        known = line["audit"]["conditions"]
        assert (known["attention"], known["operators"], known["threads"]) == ("orthrus", [], 1)
        assert known["device"]
        assert (known["finding"] is None) is (line["exact"] == "distribution")
    assert {line["seconds"] for line in lines} == {1 / 4, 1.0}  # chunks of four prompts and of one take a second each
    assert {s.prompts for s in report.summaries} == {2, 3, 5}
    assert {s.domain for s in report.summaries} == {"writing", "maths", "all"}
    assert json.loads(json.dumps(report.to_dict()))["contract"]["holds"] is True
    assert len(tables(report)) == 4


def test_references_know_their_gaps_and_their_perplexity(start: Start, loaded: Loaded, tmp_path: Path) -> None:
    """Both as the untouched model has them, computed here from one pass over prompt and text; within 1e-4 (float32)."""
    start(exacts=("distribution",), batches=(1,))
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 2 to meme"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    plain = texts.Writer(model, tokenizer, 6).plain(prompt, "distribution")
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *plain.token_ids]])).logits[0, len(prompt) - 1 : -1]
    top = logits.topk(2).values
    assert logits.argmax(-1).tolist() == plain.token_ids
    torch.testing.assert_close(torch.tensor(plain.gaps), top[:, 0] - top[:, 1], rtol=0, atol=1e-4)
    likely = logits.log_softmax(-1)[range(len(plain.token_ids)), plain.token_ids]
    references, _ = read(
        read_records(tmp_path / "out.jsonl"), read_records(tmp_path / "out.jsonl")[0]["configuration"], where="out"
    )
    reference = next(r for r in references if r.id == "t/2")
    assert reference.perplexity == pytest.approx(math.exp(-likely.mean().item()), rel=1e-4)
    assert reference.close == close(plain.gaps)
    assert (reference.tokens, reference.hf) == (len(plain.token_ids), None)


def test_a_second_audit_finds_everything_done_and_a_third_adds_what_is_new(start: Start, tmp_path: Path) -> None:
    first = start(batches=(1,))
    before = read_records(tmp_path / "out.jsonl")
    assert start(batches=(1,)).to_dict() == first.to_dict()
    assert read_records(tmp_path / "out.jsonl") == before
    more = start(batches=(1, 2))
    assert len([r for r in read_records(tmp_path / "out.jsonl") if r["kind"] == "result"]) == 40
    assert more.contract.texts == 40


def test_a_killed_audit_is_taken_up(start: Start, tmp_path: Path) -> None:
    """Chunks written before are kept as they are; the rest is made, and nothing twice."""
    laps = 0

    def kill() -> None:
        nonlocal laps
        laps += 1
        if laps == 11:  # a chunk takes 7 laps
            raise Stop

    with pytest.raises(Stop):
        start(batches=(1,), on_lap=kill)
    before = read_records(tmp_path / "out.jsonl")
    assert 0 < len(before) < 31
    report = start(batches=(1,))
    after = read_records(tmp_path / "out.jsonl")
    assert after[: len(before)] == before
    assert len([r for r in after if r["kind"] == "result"]) == report.contract.texts == 20


class Noisy(nn.Module):
    """An MLP whose result moves with the number of rows in the pass, as a kernel's might."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x) * (1 + 0.5 * (x.shape[0] - 1))
        return out


def test_kernels_that_depend_on_the_batch_are_found_out(start: Start) -> None:
    """Fault injection, in float32: rows that share a pass disturb each other.

    The looser promise breaks at batch 2; exact="token", warned by its probe, lets rows decode alone, and holds.
    """

    def disturb(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            layer.mlp = Noisy(layer.mlp)

    report = start(change=disturb)
    broken = {(m.setting.exact, m.setting.batch) for m in report.contract.broken}
    assert broken == {("distribution", 2)}
    assert all(m.parting.gap is not None for m in report.contract.broken)
    token = next(p for p in report.plain if p.exact == "token")
    assert "neighbours in a pass of 2 rows" in str(token.conditions["finding"]["broken"])
    assert "Broken" in tables(report)[-1].title


def test_one_wrong_token_is_found_and_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of one prompt of five, in one of four settings."""
    real = texts.Writer.answers

    def wrong(self: texts.Writer, prompts: list[list[int]], who: Any, rows: int) -> list[Row]:
        found = real(self, prompts, who, rows)
        if (who.mode, who.exact, len(prompts)) == ("orthrus", "token", 4):
            found[2].token_ids[-1] += 1
        return found

    monkeypatch.setattr(texts.Writer, "answers", wrong)
    (mismatch,) = start(batches=(2,)).contract.broken
    assert (mismatch.id, mismatch.diverges_at) == ("t/2", 5)
    assert (mismatch.setting.exact, mismatch.setting.label) == ("token", "orthrus full")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("job", "named"),
    [
        ({"suites": ()}, "suites"),
        ({"dtypes": ("float33",)}, "float33"),
        ({"exacts": ("bitwise",)}, "bitwise"),
        ({"exacts": ()}, "exact"),
        ({"plans": ("wide",)}, "wide"),
        ({"batches": (1, 1)}, "batches"),
        ({"batches": (0,)}, "batches"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused(job: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Job(**{"model": "tiny", "suites": ("s",), **job})


def test_suites_whose_lines_could_not_be_told_apart_are_refused(tmp_path: Path) -> None:
    """Before a model is loaded."""
    job = Job(model="tiny", suites=("synthetic:json", "synthetic:json@heldout"), limit=1)
    with pytest.raises(ConfigError, match="'synthetic:json' and 'synthetic:json@heldout' both have"):
        run.run(job, tmp_path / "out.jsonl", load=lambda _: pytest.fail("a model was loaded"))


def test_lines_that_no_audit_wrote_are_refused(tmp_path: Path) -> None:
    """A line of `orthrus bench run` under an audit's configuration, half a reference, and a file without any."""
    line = result().to_record()
    with pytest.raises(DataError, match=r"must have the fields \['audit'\]"):
        read([line], "c", where="out")
    with pytest.raises(DataError, match=r"must have the fields \['hf'\]"):
        read([{"kind": "reference", "configuration": "c"}], "c", where="out")
    assert read([line], "another", where="out") == ([], [])
    path = tmp_path / "out.jsonl"
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="at least one audited text"):
        read_audit(path, "c")
