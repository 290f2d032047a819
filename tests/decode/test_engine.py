"""The engine's text is the untouched backbone's own, whatever the family, the batch and the blocks."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import orthrus
from orthrus.decode import exact
from orthrus.decode.engine import Engine
from orthrus.decode.learned import begin_anew
from orthrus.decode.options import Options, Sampling
from orthrus.decode.prompts import CHUNK
from orthrus.errors import CacheFull, PromptError
from orthrus.policy import steps
from orthrus.policy.steps import Step
from tests import reference
from tests.decode.drive import BLOCK, decode, dual, engine_of, finish, held
from tests.families import FAMILIES, VOCAB, WINDOWED, perturb, tiny

PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42], [9, 10, 11, 12, 13], [8, 9]]
COUNTS = [20, 9, 14, 1, 20]
VARIANTS = [*((family, {}) for family in FAMILIES), *WINDOWED.items()]


@cache
def generated(family: str, **overrides: object) -> list[list[int]]:
    """What transformers' `generate` says after each prompt, alone, on a model that never had a view."""
    model = tiny(family, **overrides)
    texts = []
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def asked(counts: Sequence[int]) -> list[Options]:
    return [Options(max_new_tokens=count) for count in counts]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_ragged_batches_equal_generate_row_by_row(family: str, overrides: dict[str, object]) -> None:
    """Five prompts of 1 to 13 tokens and 1 to 20 new ones over three rows, which join and leave as they finish.

    Plain decoding and blocks of 2, 5 and the trained 8, prompts read whole, two and three tokens at a time, with the
    model's own attention function and with the package's. float32: token for token, always.
    """
    expected = generated(family, **overrides)
    for attn, block, chunk in (("orthrus", 1, 512), (None, 2, 3), ("orthrus", 5, 512), ("orthrus", BLOCK, 2)):
        engine = engine_of(dual(family, attn=attn, **overrides), block=block, prefill_chunk=chunk)
        rows = decode(engine, PROMPTS, asked(COUNTS))
        assert [row.token_ids for row in rows] == expected
        assert {row.finish_reason for row in rows} == {"length"}
        assert [row.stats.emitted for row in rows] == COUNTS


MODEL = dual()
"""One model for what does not depend on the family."""

TEXTS = {tuple(p): reference.greedy_text(tiny("qwen3"), p, 24) for p in PROMPTS}


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_any_number_of_rows(rows: int) -> None:
    """More prompts than rows, as many, fewer: the same texts."""
    engine = engine_of(MODEL, rows=rows)
    assert [r.token_ids for r in decode(engine, PROMPTS, Options(max_new_tokens=12))] == [
        TEXTS[tuple(p)][:12] for p in PROMPTS
    ]


@pytest.mark.parametrize("block", range(1, BLOCK + 1))
def test_end_of_text_in_the_middle_of_a_block(block: int) -> None:
    """The text ends with the first end token, which belongs to it; what a cycle decided beyond is dropped.

    Several rows end at different times, so that their places are taken by others.
    """
    options, expected = [], []
    for place, prompt in enumerate(PROMPTS):
        text = TEXTS[tuple(prompt)]
        options.append(Options(max_new_tokens=20, eos_token_id=(text[3 + 2 * place], 0)))
        expected.append(text[: text.index(text[3 + 2 * place]) + 1])
    rows = decode(engine_of(MODEL, block=block), PROMPTS, options)
    assert [row.token_ids for row in rows] == expected
    assert {row.finish_reason for row in rows} == {"stop"}


def test_end_of_text_in_the_prompt_ends_nothing() -> None:
    """Only new tokens are looked at."""
    prompt = PROMPTS[0]
    text = TEXTS[tuple(prompt)][:10]
    eos = next(token for token in prompt if token not in text)
    row = decode(engine_of(MODEL), [prompt], Options(max_new_tokens=10, eos_token_id=(eos,)))[0]
    assert (row.token_ids, row.finish_reason) == (text, "length")


def test_repetition_penalty_equals_the_plain_loop() -> None:
    """Each slot of a block has its own past; rows with and without a penalty share a batch, joiners bring theirs."""
    samplings = [Sampling(repetition_penalty=x) for x in (1.0, 1.7, 1.0, 1.3, 0.7)]
    plain = tiny("qwen3")
    expected = [reference.greedy_text(plain, p, 12, s) for p, s in zip(PROMPTS, samplings, strict=True)]
    options = [Options(max_new_tokens=12, sampling=s) for s in samplings]
    for rows, block in ((2, 1), (3, 4), (5, BLOCK)):
        engine = engine_of(MODEL, rows=rows, block=block)
        assert [row.token_ids for row in decode(engine, PROMPTS, options)] == expected
        # Used again, without penalties this time, nothing of the past remains.
        again = decode(engine, PROMPTS, Options(max_new_tokens=12))
        assert [row.token_ids for row in again] == [TEXTS[tuple(p)][:12] for p in PROMPTS]


# ---------------------------------------------------------------- what a step returns


@pytest.mark.parametrize("plan", ["ar", "full", "onepass:2", "auto"])
def test_a_step_names_a_row_once(plan: str) -> None:
    """Beside a row that decodes, others join with a first token of their own and end in the next step."""
    engine = Engine(MODEL, rows=3, capacity=96, plan=steps.parse(plan))
    running = engine.add(PROMPTS[0], Options(max_new_tokens=24))
    engine.step()
    ids = [engine.add(prompt, Options(max_new_tokens=2)) for prompt in PROMPTS[1:]]
    told: dict[int, list[tuple[list[int], str | None]]] = {id: [] for id in (running, *ids)}
    while engine.busy:
        progress = engine.step()
        assert len({one.row.id for one in progress}) == len(progress)
        for one in progress:
            told[one.row.id].append((one.token_ids, one.row.finish_reason))
    for id, prompt in zip(ids, PROMPTS[1:], strict=True):
        first, second = TEXTS[tuple(prompt)][:2]
        assert told[id] == [([first], None), ([second], "length")]
    assert [token for tokens, _ in told[running] for token in tokens] == TEXTS[tuple(PROMPTS[0])][1:24]


def test_a_first_token_outlives_a_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that it has ended is what the next step returns, alone; then the others go on."""

    def fail(*_: object) -> Step:
        raise RuntimeError("no step")

    engine = engine_of(MODEL)
    running = engine.add(PROMPTS[0], Options(max_new_tokens=12))
    engine.step()
    short = engine.add(PROMPTS[1], Options(max_new_tokens=1))
    with monkeypatch.context() as patch:
        patch.setattr(engine.policy, "choose", fail)
        with pytest.raises(RuntimeError, match="no step"):
            engine.step()
    (told,) = engine.step()
    assert (told.row.id, told.token_ids, told.row.finish_reason) == (short, TEXTS[tuple(PROMPTS[1])][:1], "length")
    assert finish(engine)[running].token_ids == TEXTS[tuple(PROMPTS[0])][:12]


# ---------------------------------------------------------------- leaving early


def test_abort_frees_the_row_and_disturbs_nobody() -> None:
    """A live completion and a waiting one are ended; the others' texts are whole."""
    engine = engine_of(MODEL, rows=3)
    ids = [engine.add(p, Options(max_new_tokens=12)) for p in PROMPTS]
    engine.step()
    aborted = engine.live[0]
    assert engine.abort(ids[0])
    assert engine.abort(ids[4])
    assert not engine.abort(ids[0])
    assert not engine.abort(99)
    rows = finish(engine)
    assert aborted.finish_reason == "abort"
    assert aborted.token_ids == TEXTS[tuple(PROMPTS[0])][: len(aborted.token_ids)]
    assert len(aborted.token_ids) < 12
    assert ids[4] not in rows
    assert [rows[ids[i]].token_ids for i in (1, 2, 3)] == [TEXTS[tuple(PROMPTS[i])][:12] for i in (1, 2, 3)]


def test_aborting_everything_leaves_an_idle_engine() -> None:
    """Which serves the next completion as if nothing had been."""
    engine = engine_of(MODEL)
    ids = [engine.add(p, Options(max_new_tokens=12)) for p in PROMPTS]
    engine.step()
    assert all(engine.abort(id) for id in ids)
    assert not engine.busy
    assert engine.step() == []
    assert decode(engine, PROMPTS[:1], Options(max_new_tokens=12))[0].token_ids == TEXTS[tuple(PROMPTS[0])][:12]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_prompt_that_could_not_be_read_waits_for_the_next_step(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the first or second pass of two that read it: all texts are whole in the end."""
    engine = engine_of(MODEL, rows=3, prefill_chunk=2)
    ids = [engine.add(p, Options(max_new_tokens=12)) for p in PROMPTS]
    real, passes = engine.passes._call, list[int]()

    def run(*args: Any, **more: Any) -> Any:
        passes.append(len(passes) + 1)
        if passes[-1] == failing:
            raise MemoryError
        return real(*args, **more)

    monkeypatch.setattr(engine.passes, "_call", run)
    with pytest.raises(MemoryError):
        engine.step()
    assert len(passes) == failing
    assert (engine.live, [row.id for row in engine.rows.reading], len(engine.waiting)) == ([], ids[:3], 2)
    rows = finish(engine)
    assert [rows[id].token_ids for id in ids] == [TEXTS[tuple(p)][:12] for p in PROMPTS]


def test_a_prompt_whose_keys_could_not_be_copied_waits_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that joined before it in the same step is read in the next one."""
    engine = engine_of(MODEL, rows=3)
    decode(engine, PROMPTS[2:3], Options(max_new_tokens=4))
    ids = [engine.add(p, Options(max_new_tokens=12)) for p in (PROMPTS[0], PROMPTS[2])]
    real, calls = engine.cache.copy_start, list[int]()

    def copy_start(source: int, target: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 1:
            raise MemoryError
        real(source, target, length)

    monkeypatch.setattr(engine.cache, "copy_start", copy_start)
    with pytest.raises(MemoryError):
        engine.step()
    assert (engine.live, [row.id for row in engine.rows.reading]) == ([], ids[:1])
    assert [row.id for row in engine.waiting] == ids[1:]
    rows = finish(engine)
    assert [rows[id].token_ids for id in ids] == [TEXTS[tuple(p)][:12] for p in (PROMPTS[0], PROMPTS[2])]


# ---------------------------------------------------------------- room


def state(engine: Engine) -> tuple[object, ...]:
    return (
        list(engine.cache.lengths),
        [(row.id, list(row.token_ids)) for row in engine.live],
        [row.id for row in engine.waiting],
        [buffer.clone() for buffer in (*engine.cache.keys, *engine.cache.values)],
    )


def same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    buffers = zip(a[3], b[3], strict=True)  # type: ignore[call-overload]
    return a[:3] == b[:3] and all(torch.equal(x, y) for x, y in buffers)


@pytest.mark.parametrize(
    ("prompt", "count", "error", "message"),
    [
        ([5] * 20, 13, CacheFull, "20 prompt tokens, 13 new ones and .* need 38 cache positions, a row has 36"),
        ([], 5, PromptError, "must hold at least one token, found none"),
        ([5, VOCAB], 5, PromptError, f"ids from 0 to {VOCAB - 1}, found 5 to {VOCAB}"),
        ([-1], 5, PromptError, f"ids from 0 to {VOCAB - 1}, found -1 to -1"),
        ([5] * 256, 5, PromptError, "reads at most 256 tokens, the prompt has 256: shorten it"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    prompt: list[int], count: int, error: type[Exception], message: str
) -> None:
    """In the middle of decoding others: cache, rows and queue stay as they are, and the others finish."""
    engine = engine_of(MODEL, capacity=36)
    id = engine.add(PROMPTS[0], Options(max_new_tokens=12))
    engine.step()
    before = state(engine)
    with pytest.raises(error, match=message):
        engine.add(prompt, Options(max_new_tokens=count))
    assert same(before, state(engine))
    assert finish(engine)[id].token_ids == TEXTS[tuple(PROMPTS[0])][:12]


@pytest.mark.parametrize("block", [1, 4, BLOCK])
def test_a_completion_may_fill_its_row_exactly(block: int) -> None:
    """`room` is enough to the last position, for every row at once."""
    capacity = Engine.room(3, 20, Step(block - 1).scratch)
    engine = engine_of(MODEL, capacity=capacity, block=block)
    texts = decode(engine, [PROMPTS[0]] * 3, Options(max_new_tokens=20))
    assert [row.token_ids for row in texts] == [TEXTS[tuple(PROMPTS[0])][:20]] * 3
    with pytest.raises(CacheFull):
        engine.add(PROMPTS[0], Options(max_new_tokens=21))


@pytest.mark.parametrize("length", [3, 120])
def test_drafts_take_no_memory_of_their_own(length: int) -> None:
    """In the middle of a text an engine with drafts holds the keys of a plain one and a block of scratch per row, at
    whatever context; with the same capacity, not a byte more. All else it holds is less than that scratch.
    """
    held_by, cached_by = [], []
    for block in (1, BLOCK):
        for capacity in (Engine.room(length, 20, Step(block - 1).scratch), 160):
            engine = engine_of(MODEL, rows=2, capacity=capacity, block=block)
            for token in (9, 10):  # equal prompts would be read one after the other
                engine.add([token] * length, Options(max_new_tokens=20))
            engine.step()
            assert len(engine.live) == 2
            buffers = {id(thing): thing for thing in held(engine) if isinstance(thing, torch.Tensor)}
            held_by.append(sum(buffer.nbytes for buffer in buffers.values()))
            cached_by.append(engine.cache.nbytes)
    scratch = 2 * BLOCK * 2 * 2 * 2 * 12 * 4  # rows, positions, layers, keys and values, heads of 12 float32
    plain, plain_roomy, drafting, drafting_roomy = cached_by
    assert (drafting - plain, drafting_roomy - plain_roomy) == (scratch, 0)
    assert held_by[2] - held_by[0] < 2 * scratch
    assert held_by[3] - held_by[1] < scratch


def test_the_context_ends_a_text() -> None:
    """A model of 16 positions writes no more than fit, drafts beyond its end notwithstanding."""
    model = dual(max_position_embeddings=16)
    rows = decode(engine_of(model, block=BLOCK), [PROMPTS[0], PROMPTS[2]], Options(max_new_tokens=24))
    assert [row.token_ids for row in rows] == [TEXTS[tuple(PROMPTS[0])][:13], TEXTS[tuple(PROMPTS[2])][:3]]
    assert [row.finish_reason for row in rows] == ["length", "length"]


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_end_with_the_context(kind: str) -> None:
    """Models that look positions up in a table of 32 rows: drafts past its end look nowhere, the text is whole."""
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        "opt": {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "max_position_embeddings": 32, "word_embed_proj_dim": 32},
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, eos_token_id=None, pad_token_id=0, **sizes[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    prompts = [[5, 6, 7, 8, 9], [10]]
    texts = [reference.greedy_text(model, prompt, 32 - len(prompt)) for prompt in prompts]
    orthrus.attach(model, orthrus.OrthrusConfig(block_size=BLOCK))
    rows = decode(engine_of(model, block=BLOCK), prompts, Options(max_new_tokens=40))
    assert [row.token_ids for row in rows] == texts


# ---------------------------------------------------------------- the first drafts


@pytest.mark.parametrize("name", ["full", "tree:6", "onepass:1", "onepass", "auto"])
def test_the_pass_that_reads_the_prompt_makes_the_first_drafts(name: str) -> None:
    """It gives a text's first token too, which is told at once; the first cycle takes one pass, that of verifying."""
    for prompt in (PROMPTS[2], PROMPTS[0], [8]):
        begin_anew(MODEL)
        engine = Engine(MODEL, rows=1, capacity=200, plan=steps.parse(name))
        engine.add(prompt, Options(max_new_tokens=20))
        (progress,) = engine.step()
        text = reference.greedy_text(tiny("qwen3"), prompt, 20)
        assert (progress.token_ids, progress.accepted, progress.row.stats.forwards) == (text[:1], 0, 1)
        (progress,) = engine.step()
        assert progress.row.stats.forwards == 2
        finish(engine)
        assert progress.row.token_ids == text


def test_rows_that_join_have_drafts_whether_or_not_the_others_have() -> None:
    """All stops are drafted for, so no row ever waits for a draft pass; with one stop a row may miss it, and pays."""
    for name, more in (("onepass", 1), ("onepass:1", 2)):
        engine = Engine(MODEL, rows=2, capacity=200, plan=steps.parse(name))
        engine.add(PROMPTS[2], Options(max_new_tokens=20))
        engine.step()
        engine.add(PROMPTS[0], Options(max_new_tokens=20))
        engine.step()
        running, begun = engine.live
        taken = running.stats.forwards
        if more == 2:
            running.ready = None
        engine.step()
        assert (running.stats.forwards, begun.stats.forwards) == (taken + more, 1 + 1)


@pytest.mark.parametrize("exactness", ["distribution", "token"])
@pytest.mark.parametrize("name", ["ar", "full", "tree:6", "lookup", "onepass:2", "auto"])
def test_a_text_may_end_with_the_prompt_s_own_token(name: str, exactness: exact.Exact) -> None:
    """By its length, its end token or a criterion: one pass in all, and rows beside it are whole."""
    ends = [
        Options(max_new_tokens=1),
        Options(max_new_tokens=20, eos_token_id=(TEXTS[tuple(PROMPTS[1])][0],)),
        Options(max_new_tokens=20, stopping_criteria=(lambda ids, _: torch.ones(len(ids), dtype=torch.bool),)),
    ]
    prompts, options = [PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[2]], [ends[0], Options(max_new_tokens=9), *ends[1:]]
    engine = Engine(MODEL, rows=3, capacity=200, plan=steps.parse(name), exact=exactness)
    for row, prompt, count in zip(decode(engine, prompts, options), prompts, (1, 9, 1, 1), strict=True):
        assert row.token_ids == TEXTS[tuple(prompt)][:count]
        if count == 1:
            assert (row.stats.emitted, row.stats.forwards, row.stats.cycles, row.stats.plain_steps) == (1, 1, 0, 0)


@pytest.mark.parametrize("name", ["ar", "full", "fixed:4", "tree:6", "onepass:2", "lookup", "auto"])
def test_no_text_takes_more_passes_than_tokens(name: str) -> None:
    """Of any length, alone or beside others, whatever it ends with: a first token, a draft or a bonus."""
    for seed, rows in ((0, 8), (1, 1), (2, 8)):
        model = dual()
        perturb(model, scale=float(seed), seed=seed)
        engine = Engine(model, rows=rows, capacity=200, plan=steps.parse(name))
        options = [
            Options(max_new_tokens=1 + count, eos_token_id=(TEXTS[tuple(prompt)][count],) if count % 2 else ())
            for count in range(11)
            for prompt in PROMPTS
        ]
        for row in decode(engine, PROMPTS * 11, options):
            assert row.stats.forwards <= row.stats.emitted
            assert name != "ar" or row.stats.tokens_per_forward == 1.0


def test_no_other_plan_drafts_while_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without the view have no use for its drafts."""
    for name in ("ar", "lookup"):
        engine = Engine(MODEL, rows=1, capacity=200, plan=steps.parse(name))
        asked: list[object] = []
        real = engine.passes.prefill

        def spy(*args: Any, asked: list[object] = asked, real: Any = real, **how: Any) -> Tensor | None:
            asked.append(how)
            drafts: Tensor | None = real(*args, **how)
            return drafts

        monkeypatch.setattr(engine.passes, "prefill", spy)
        decode(engine, PROMPTS[2:3], Options(max_new_tokens=5))
        assert asked == [{"chunk": CHUNK, "anchors": PROMPTS[2][-1:], "drafts": 0}]


# ---------------------------------------------------------------- what is read again


def count_prefill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Note how many tokens of each row every prefill reads."""
    read: list[list[int]] = []
    real = engine.passes.prefill

    def spy(rows: slice, pending: Sequence[Sequence[int]], **how: Any) -> Tensor | None:
        read.append([len(tokens) for tokens in pending])
        return real(rows, pending, **how)

    monkeypatch.setattr(engine.passes, "prefill", spy)
    return read


@pytest.mark.parametrize(("block", "unread"), [(1, 3), (4, 2)])
def test_a_text_that_goes_on_is_not_read_again(block: int, unread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation: the next prompt is the last text and three tokens more; only what has no keys yet is read.

    That is, of those three, all but the last, which becomes the anchor; and before them the old text's own last
    token, unless a block that went on beyond the text wrote its keys too.
    """
    engine = engine_of(MODEL, rows=1, block=block)
    read = count_prefill(engine, monkeypatch)
    first = decode(engine, [PROMPTS[2]], Options(max_new_tokens=9))[0]
    longer = [*PROMPTS[2], *first.token_ids, 50, 51, 52]
    second = decode(engine, [longer], Options(max_new_tokens=9))[0]
    assert second.token_ids == reference.greedy_text(tiny("qwen3"), longer, 9)
    assert read == [[12], [unread]]
    # The same prompt again needs nothing at all; another that shares 5 tokens with it needs the rest.
    assert decode(engine, [longer], Options(max_new_tokens=9))[0].token_ids == second.token_ids
    assert read == [[12], [unread]]
    other = [*longer[:5], 60, 61, 62]
    third = decode(engine, [other], Options(max_new_tokens=9))[0]
    assert read == [[12], [unread], [2]]
    assert third.token_ids == reference.greedy_text(tiny("qwen3"), other, 9)


def test_a_shared_start_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that begin alike: keys of the start come from a live row, from an ended one, and are never shared."""
    engine = engine_of(MODEL, rows=3)
    read = count_prefill(engine, monkeypatch)
    system = [3 + i % 70 for i in range(20)]
    prompts = [[*system, 80 + i, 90 + i] for i in range(4)]
    texts = {tuple(prompt): reference.greedy_text(tiny("qwen3"), prompt, 9) for prompt in prompts}
    engine.add(prompts[0], Options(max_new_tokens=9))
    done = [p.row for p in engine.step() if p.row.finish_reason]
    for prompt in prompts[1:3]:  # beside a live row
        engine.add(prompt, Options(max_new_tokens=9))
    while engine.busy:
        done += [p.row for p in engine.step() if p.row.finish_reason]
    done += decode(engine, [prompts[3]], Options(max_new_tokens=9))  # after all have ended
    assert read == [[21], [1, 1], [1]]
    assert {tuple(row.prompt_ids): row.token_ids for row in done} == texts


@pytest.mark.parametrize("exactness", ["distribution", "token"])
def test_completions_that_join_together_read_their_prompt_once(
    exactness: exact.Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait a step for the first one's keys; so do prompts that begin with most of its own."""
    prompt = [3 + i % 70 for i in range(40)]
    prompts = [prompt, [*range(60, 70)], prompt, [*prompt[:30], 8, 9], prompt, [*prompt[:12], *range(50, 70)]]
    engine = engine_of(dual(), rows=6, admit_free=6, exact=exactness)
    read = count_prefill(engine, monkeypatch)
    rows = decode(engine, prompts, Options(max_new_tokens=9))
    for row in rows:
        assert row.token_ids == reference.greedy_text(tiny("qwen3"), row.prompt_ids, 9)
    assert sum(map(sum, read)) == 39 + 9 + 1 + 31
    assert [row.cached for row in rows] == [0, 0, 39, 30, 39, 0]


def test_who_waits_for_keys_keeps_a_place_and_outlives_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others join in the meantime, but not in that place; the one that read is given up in the middle of its prompt."""
    engine, prompt = engine_of(MODEL, rows=3, prefill_slice=8), [3 + i % 70 for i in range(40)]
    read = count_prefill(engine, monkeypatch)
    running = engine.add(PROMPTS[0], Options(max_new_tokens=60))
    engine.step()
    reader, waiting, late = (engine.add(p, Options(max_new_tokens=9)) for p in (prompt, prompt, PROMPTS[1]))
    engine.step()
    assert ([row.id for row in engine.rows.reading], len(engine.waiting)) == ([reader], 2)
    read.clear()
    assert engine.abort(reader)
    rows = finish(engine)
    assert rows[waiting].token_ids == reference.greedy_text(tiny("qwen3"), prompt, 9)
    assert {*rows} == {running, waiting, late}
    assert sum(map(sum, read)) == 39 - 8 + len(PROMPTS[1]) - 1


def test_an_aborted_text_is_kept_as_far_as_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of an answer: the next prompt reuses what was read and written."""
    engine = engine_of(MODEL, rows=1)
    read = count_prefill(engine, monkeypatch)
    id = engine.add(PROMPTS[2], Options(max_new_tokens=20))
    engine.step()
    row = engine.step()[0].row
    engine.abort(id)
    longer = [*PROMPTS[2], *row.token_ids, 50]
    text = decode(engine, [longer], Options(max_new_tokens=9))[0].token_ids
    assert read == [[12], [1]]
    assert text == reference.greedy_text(tiny("qwen3"), longer, 9)


def test_reuse_beside_a_new_prompt_stays_within_the_row() -> None:
    """One row keeps a long text while its neighbour reads a long prompt: together they need no more room than apart."""
    prompt = [3 + i % 80 for i in range(40)]
    capacity = Engine.room(40, 6, 5)
    engine = engine_of(MODEL, rows=2, capacity=capacity)
    expected = [reference.greedy_text(tiny("qwen3"), p, 6) for p in (prompt, prompt[::-1])]
    assert decode(engine, [prompt], Options(max_new_tokens=6))[0].token_ids == expected[0]
    both = decode(engine, [prompt, prompt[::-1]], Options(max_new_tokens=6))
    assert [row.token_ids for row in both] == expected


def test_rows_join_together_when_told_to_wait() -> None:
    """`admit_free` holds newcomers back until so many rows are free; an empty engine never waits."""
    engine = engine_of(MODEL, rows=3, admit_free=2)
    counts = [1, 20, 20, 20, 20]
    for prompt, count in zip(PROMPTS, counts, strict=True):
        engine.add(prompt, Options(max_new_tokens=count))
    live = []
    while engine.busy:
        engine.step()
        live.append((len(engine.live), len(engine.waiting)))
    assert live[0] == (2, 2)
    assert (2, 2) in live
    assert (3, 1) not in live
