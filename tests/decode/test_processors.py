"""Options that depend on the text: under every plan the tokens are those of transformers' `generate`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, SynthIDTextWatermarkingConfig, WatermarkingConfig

import orthrus
from orthrus.decode import noise
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.processors import BEFORE, LAST, WARPERS, CountPenalty
from orthrus.errors import ConfigError
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import BLOCK, dual
from tests.families import VOCAB, tiny

PLANS = ["ar", "fixed:3", "full", "tree:6", "onepass:2", "onepass:2:6", "lookup:3", "auto"]
PROMPT = [5, 6, 7, 5, 6]
COUNT = 14
PLAIN = tiny("qwen3")
MODEL = dual()
SEED = 3


@cache
def base() -> tuple[int, ...]:
    """The greedy text without options."""
    return tuple(reference.greedy_text(PLAIN, PROMPT, COUNT))


def parity(text_L: Tensor) -> list[int]:
    """Tokens that are even after an odd one and odd after an even one."""
    return list(range(1 - int(text_L[-1]) % 2, VOCAB, 2))


def after_itself(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A caller's processor: works in place, and forbids the tokens around the last one and the text's length."""
    for near in (input_ids[0, -1] - 1, input_ids[0, -1], input_ids[0, -1] + 1, input_ids.shape[1]):
        scores[:, int(near) % VOCAB] = -torch.inf
    return scores


def even_sum(input_ids: Tensor, scores: Any) -> Tensor:
    """A caller's criterion: the last two tokens add up to an even number, past some length."""
    assert scores is None
    return (input_ids[:, -2:].sum(1) % 2 == 0) & torch.tensor(input_ids.shape[1] > len(PROMPT) + 2)


GREEDY: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "sequence_bias": lambda t: {"sequence_bias": [[[t[3]], -9.0], [[t[0], t[1]], -9.0]]},
    "repetition_penalty": lambda t: {"repetition_penalty": 1.6, "suppress_tokens": [t[6]]},
    "no_repeat_ngram_size": lambda t: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda t: {"bad_words_ids": [[t[1], t[2]], [t[7]]]},
    "min_length": lambda t: {"min_length": len(PROMPT) + 9, "eos_token_id": t[4]},
    "min_new_tokens": lambda t: {"min_new_tokens": 9, "eos_token_id": [t[4], t[5]]},
    "prefix_allowed_tokens_fn": lambda t: {"prefix_allowed_tokens_fn": lambda _, text: parity(text)},
    "forced_eos_token_id": lambda t: {"forced_eos_token_id": 9, "eos_token_id": 9},
    "exponential_decay_length_penalty": lambda t: {"exponential_decay_length_penalty": (3, 1.9), "eos_token_id": 11},
    "suppress_tokens": lambda t: {"suppress_tokens": [t[2], t[8]]},
    "begin_suppress_tokens": lambda t: {"begin_suppress_tokens": [t[0]]},
    "watermarking_config": lambda t: {"watermarking_config": WatermarkingConfig(bias=6.0, context_width=2)},
    "renormalize_logits": lambda t: {"renormalize_logits": True, "suppress_tokens": [t[3]]},
    "logits_processor": lambda t: {"logits_processor": [after_itself]},
    "stopping_criteria": lambda t: {"stopping_criteria": [even_sum]},
}
"""Options by name, as asked for; the argument is the text without them."""

SAMPLED: dict[str, dict[str, Any]] = {
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.012},
    "eta_cutoff": {"eta_cutoff": 0.2},
    "top_h": {"top_h": 0.5},
    "all": {
        "temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2, "suppress_tokens": [3, 4], "renormalize_logits": True,
    },
}  # fmt: skip


def greedy_expected(asked: dict[str, Any]) -> list[int]:
    """What transformers' `generate` writes."""
    own = {k: LogitsProcessorList(v) if k == "logits_processor" else v for k, v in asked.items()}
    out = PLAIN.generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, pad_token_id=0, **own)
    return list(out[0, len(PROMPT) :].tolist())


def sampled_expected(asked: dict[str, Any], index: int) -> list[int]:
    """What plain sampling writes with this engine's noise and the processors that transformers' `generate` builds."""
    config = GenerationConfig(do_sample=True, top_k=0, **{k: v for k, v in asked.items() if k != "top_k"})
    config.top_k = asked.get("top_k", 0)
    PLAIN._prepare_special_tokens(config, True)
    processors = PLAIN._get_logits_processor(config, input_ids_seq_length=len(PROMPT), model_kwargs={})
    ids, stream = torch.tensor([PROMPT]), torch.tensor([noise.stream_of(SEED, index)])
    for position in range(len(PROMPT), len(PROMPT) + COUNT):
        with torch.no_grad():
            scores = processors(ids, PLAIN(input_ids=ids, use_cache=False).logits[:, -1].clone())
        own = noise.gumbel(stream, torch.tensor([[position]]), noise.TARGET, VOCAB)[:, 0]
        ids = torch.cat([ids, (scores + own).argmax(-1, keepdim=True)], dim=1)
    return list(ids[0, len(PROMPT) :].tolist())


@cache
def cases() -> tuple[dict[str, dict[str, Any]], dict[str, list[int]]]:
    """Every option as asked for, and what it should give; one row without any, one of plain sampling."""
    asked: dict[str, dict[str, Any]] = {"none": {}, **{name: make(base()) for name, make in GREEDY.items()}}
    expected = {name: greedy_expected(options) for name, options in asked.items()}
    for name, options in {"sampling": {}, **SAMPLED}.items():
        expected[name] = sampled_expected(options, len(asked))
        asked[name] = {"do_sample": True, "seed": SEED, **options}
    return asked, expected


def test_every_option_moves_the_text_here() -> None:
    """Else the next test would say nothing; and the table is whole."""
    asked, expected = cases()
    for name, options in asked.items():
        assert expected[name] != (expected["sampling"] if "do_sample" in options else expected["none"]) or name in (
            "none",
            "sampling",
        ), name
    tested = {option for options in asked.values() for option in options}
    untested = {"presence_penalty", "frequency_penalty", "forced_bos_token_id", "remove_invalid_values"}
    assert {*BEFORE, *WARPERS, *LAST} - tested == untested  # further down


@pytest.mark.parametrize("plan", PLANS)
def test_a_mixed_batch_writes_what_generate_writes_for_each(plan: str) -> None:
    """Every option in a row of its own beside all others, greedy and sampled, drafts only costing acceptance.

    Chains of one length sample by rejection, unless exact to the token: the next two tests.
    """
    asked, expected = cases()
    engine = Engine(MODEL, rows=9, capacity=Engine.room(len(PROMPT), COUNT, 40), plan=steps.parse(plan))
    names = list(asked)
    rows = engine.finish([PROMPT] * len(names), [Options.of(max_new_tokens=COUNT, **asked[n]) for n in names])
    made = {name: row.token_ids for name, row in zip(names, rows, strict=True)}
    differs = {n for n in names if made[n] != expected[n] and (engine.coupled or "do_sample" not in asked[n])}
    assert differs == set()
    assert plan == "ar" or sum(row.stats.accepted for row in rows) > 0


@pytest.mark.slow
def test_chains_that_are_exact_to_the_token_sample_the_same_tokens() -> None:
    """As plain sampling does with the same noise and the same processors."""
    asked, expected = cases()
    names = [name for name, options in asked.items() if "do_sample" in options]
    room = Engine.room(len(PROMPT), COUNT, BLOCK)
    engine = Engine(MODEL, rows=1, capacity=room, plan=steps.parse("full"), exact="token")
    for name in names:
        engine.add(PROMPT, Options.of(max_new_tokens=COUNT, **asked[name]), index=list(asked).index(name))
    made = {names[progress.row.id]: progress.row.token_ids for progress in engine.run()}
    assert made == {name: expected[name] for name in names}
    assert engine.finding is not None
    assert engine.finding.holds


def test_rejection_leaves_the_processed_distribution() -> None:
    """Chains over a vocabulary of 8, options that look at the text: chi-square, a false alarm once in 10^6."""
    plain, model = tiny("qwen3", vocab_size=8), dual(vocab_size=8)
    asked: dict[str, Any] = {
        "no_repeat_ngram_size": 2,
        "typical_p": 0.95,
        "sequence_bias": [[[1, 4], -2.0], [[3], 1.0]],
        "temperature": 0.4,
    }
    options = Options.of(max_new_tokens=2, do_sample=True, seed=5, **asked)
    config = GenerationConfig(do_sample=True, top_k=0, **asked)
    config._eos_token_tensor = None
    processors = plain._get_logits_processor(config, input_ids_seq_length=3, model_kwargs={})
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(2):
        grown = {}
        for text, chance in chances.items():
            ids = torch.tensor([[3, 1, 4, *text]])
            with torch.no_grad():
                p = processors(ids, plain(input_ids=ids).logits[:, -1].clone()).double().softmax(-1)[0]
            grown |= {(*text, token): chance * float(p[token]) for token in range(8)}
        chances = grown
    engine = Engine(model, rows=100, capacity=Engine.room(3, 2, BLOCK), plan=steps.parse("fixed:3"))
    counts: dict[tuple[int, ...], int] = {}
    for row in engine.finish([[3, 1, 4]] * 400, options):
        counts[tuple(row.token_ids)] = counts.get(tuple(row.token_ids), 0) + 1
    assert not engine.coupled
    assert reference.chi_square(counts, chances) > 1e-6


# ---------------------------------------------------------------- those that plain greedy decoding does not show


def test_a_first_token_is_forced_after_a_prompt_of_one() -> None:
    """As in transformers, where the prompt stands for the start of the text."""
    (row,) = Engine(MODEL, rows=1, capacity=40, plan=steps.parse("full")).finish(
        [[8]], Options.of(max_new_tokens=6, forced_bos_token_id=17)
    )
    assert (
        row.token_ids == PLAIN.generate(torch.tensor([[8]]), max_new_tokens=6, forced_bos_token_id=17)[0, 1:].tolist()
    )


@pytest.mark.parametrize("plan", ["ar", "full", "tree:6"])
def test_invalid_logits_are_removed_where_asked(plan: str) -> None:
    """NaN counts as 0 then, and the row goes on as in transformers; beside it one that did not ask ends."""
    plain, model = tiny("qwen3"), dual()
    for each in (plain, model):
        with torch.no_grad():
            each.get_output_embeddings().weight[50] = torch.nan
    expected = plain.generate(torch.tensor([PROMPT]), max_new_tokens=6, remove_invalid_values=True)
    engine = Engine(model, rows=2, capacity=60, plan=steps.parse(plan))
    for asked in ({"remove_invalid_values": True}, {}):
        engine.add(PROMPT, Options.of(max_new_tokens=6, **asked))
    rows = {progress.row.id: progress.row for progress in engine.run()}
    assert rows[0].token_ids == expected[0, len(PROMPT) :].tolist()
    assert (rows[1].token_ids, rows[1].finish_reason) == ([], "error")


def test_count_penalties_are_subtracted() -> None:
    """Once for a token that was written, and for each time it was; the prompt does not count."""
    texts, scores = torch.tensor([[1, 2, 3, 3, 1], [1, 2, 0, 0, 0]]), torch.zeros(2, 5)
    made = CountPenalty(2, presence=1.0, frequency=0.5)(texts, scores)
    assert made.tolist() == [[0, -1.5, 0, -2.0, 0], [-2.5, 0, 0, 0, 0]]


@pytest.mark.parametrize("plan", ["ar", "full", "tree:6"])
def test_count_penalties_decide_texts(plan: str) -> None:
    """The plain loop with both penalties writes the same."""
    ids, counts = list(PROMPT), [0] * VOCAB
    for _ in range(COUNT):
        with torch.no_grad():
            logits = PLAIN(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()
        best = max(range(VOCAB), key=lambda t: logits[t] - 0.4 * counts[t] - 0.7 * (counts[t] > 0))
        ids.append(best)
        counts[best] += 1
    options = Options.of(max_new_tokens=COUNT, presence_penalty=0.7, frequency_penalty=0.4)
    (row,) = Engine(MODEL, rows=1, capacity=80, plan=steps.parse(plan)).finish([PROMPT], options)
    assert row.token_ids == ids[len(PROMPT) :] != list(base())


# ---------------------------------------------------------------- what callers may do


@pytest.mark.parametrize("plan", PLANS)
def test_a_processor_that_raises_ends_its_row_where_plain_decoding_would(plan: str) -> None:
    """Texts that only drafts have are not held against it; neighbours go on."""
    text = base()

    def fussy(input_ids: Tensor, scores: Tensor) -> Tensor:
        written = input_ids[0, len(PROMPT) :].tolist()
        if written != list(text[: len(written)]) or len(written) == 9:
            raise KeyError(f"a text of {len(written)}")
        return scores

    engine = Engine(MODEL, rows=2, capacity=80, plan=steps.parse(plan))
    for own in ([fussy], []):
        engine.add(PROMPT, Options.of(max_new_tokens=COUNT, logits_processor=own))
    rows = {progress.row.id: progress.row for progress in engine.run()}
    assert (rows[0].token_ids, str(rows[0].error)) == (list(text[:9]), "'a text of 9'")
    assert rows[1].token_ids == list(text)


def test_verified_slots_are_processed_once_each() -> None:
    """One call chooses a prompt's token; M drafts cost M to draft and M + 1 to verify; a plain step one."""
    calls: list[int] = []

    def counting(input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(input_ids.shape[1])
        return scores

    options = Options.of(max_new_tokens=5, logits_processor=[counting])
    for plan, most in (("ar", [[5], [6], [7], [8], [9]]), ("fixed:3", [[5], [6, 6, 7]])):
        calls.clear()
        engine = Engine(MODEL, rows=1, capacity=60, plan=steps.parse(plan))
        engine.add(PROMPT, options)
        for expected in most:
            before = len(calls)
            engine.step()
            assert calls[before:] == expected


def test_time_is_up_after_the_token_it_is_noticed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cycle still had; the reason is the length, and the text is a beginning of plain decoding's."""
    engine = Engine(MODEL, rows=1, capacity=80, plan=steps.parse("full"))
    engine.add(PROMPT, Options.of(max_new_tokens=COUNT, max_time=1e-9))
    (row,) = {progress.row.id: progress.row for progress in engine.run()}.values()
    assert (tuple(row.token_ids), row.finish_reason) == (base()[:1], "length")
    (row,) = engine.finish([PROMPT], Options.of(max_new_tokens=COUNT, max_time=3600))
    assert tuple(row.token_ids) == base()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sampled", [False, True])
def test_logits_of_kept_tokens_come_with_them(plan: str, sampled: bool) -> None:
    """Beside each token the backbone's logits for its place, raw and processed, as a plain pass gives them."""
    more: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 1} if sampled else {}
    engine = Engine(MODEL, rows=2, capacity=80, plan=steps.parse(plan))
    for asked in ({"suppress_tokens": [4]}, {}):
        options = Options.of(max_new_tokens=COUNT, **asked, **more)
        engine.add(PROMPT, Options(**{f: getattr(options, f) for f in Options.__slots__} | {"keep_logits": True}))
    kept: dict[int, list[Any]] = {0: [], 1: []}
    rows = {}
    for progress in engine.run():
        assert progress.kept is not None
        assert len(progress.kept.logits_NV) == len(progress.token_ids)
        kept[progress.row.id].append(progress.kept)
        rows[progress.row.id] = progress.row
    for id, row in rows.items():
        with torch.no_grad():
            logits_TV = PLAIN(input_ids=torch.tensor([row.prompt_ids + row.token_ids])).logits[0, len(PROMPT) - 1 : -1]
        torch.testing.assert_close(torch.cat([k.logits_NV for k in kept[id]]), logits_TV, rtol=0, atol=1e-4)
        scores_TV = logits_TV.clone() / (0.7 if sampled else 1)
        if id == 0:
            scores_TV[:, 4] = -torch.inf
        torch.testing.assert_close(torch.cat([k.scores_NV for k in kept[id]]), scores_TV, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size cannot be -1"),
        ({"min_new_tokens": 2.5, "eos_token_id": 3}, "min_new_tokens cannot be 2.5"),
        ({"typical_p": 0.5}, "typical_p has an effect only when sampling"),
        ({"do_sample": True, "typical_p": 1.5}, "typical_p cannot be 1.5"),
        ({"exponential_decay_length_penalty": (3, 1.5)}, "needs an eos_token_id"),
        ({"sequence_bias": [[["x"], 1.0]]}, "sequence_bias cannot be"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1], ngram_len=3)}, "must be a WatermarkingConfig"),
        ({"logits_processor": [3]}, "logits_processor: Input should be callable, found 3"),
        ({"stopping_criteria": "end"}, "stopping_criteria: Input should be callable"),
        ({"max_time": "soon"}, "max_time: Input should be a valid number"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(asked: dict[str, Any], message: str) -> None:
    """By the option's name, with what its processor says."""
    with pytest.raises(ConfigError, match=message):
        Options.of(**asked)


def test_options_reach_generate_and_stream(characters: Any) -> None:
    """By their names, like any other."""
    forbidden = characters.convert_ids_to_tokens(base()[0])
    asked = {"suppress_tokens": [base()[0]], "max_new_tokens": 6}
    (whole,) = orthrus.generate(MODEL, characters, [PROMPT], **asked)
    streamed = [t for chunk in orthrus.stream(MODEL, characters, PROMPT, **asked) for t in chunk.token_ids]
    assert whole.token_ids == streamed != list(base()[:6])
    assert forbidden not in whole.text


def test_texts_sampled_without_a_seed_are_fresh(characters: Any) -> None:
    """torch's generator decides, in `generate` and `stream`; a seed goes before."""

    def sample(**more: Any) -> list[int]:
        asked = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, **more}
        return orthrus.generate(MODEL, characters, [PROMPT], **asked)[0].token_ids

    torch.manual_seed(5)
    first, second = sample(), sample()
    torch.manual_seed(5)
    assert sample() == first != second
    assert sample(seed=1) == sample(seed=1) != first
