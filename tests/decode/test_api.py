"""`generate` and `stream`: prompts in every form, text and tokens out, bad input refused before anything runs."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import orthrus
from orthrus.decode import api
from orthrus.decode.engine import Engine
from orthrus.errors import CacheFull, ConfigError, OrthrusError, PromptError
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import dual
from tests.families import tiny

TEXTS = ["abc", "x", "!#%&'()*+", "he"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return dual()


def plain(tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> list[int]:
    return reference.greedy_text(tiny("qwen3"), tokenizer(prompt)["input_ids"], count)


def test_completions_come_in_the_order_of_the_prompts(
    model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """Whatever the batch size, both modes, every plan: text, tokens, reason and counts of each."""
    expected = [plain(characters, p, 11) for p in TEXTS]
    for more in ({"mode": "ar"}, {}, {"plan": "full"}, {"plan": "fixed:3", "batch_size": 2}, {"batch_size": 1}):
        outs = orthrus.generate(model, characters, TEXTS, max_new_tokens=11, **more)  # type: ignore[arg-type]
        assert [out.prompt for out in outs] == TEXTS
        assert [out.token_ids for out in outs] == expected
        assert [out.text for out in outs] == [characters.decode(ids, skip_special_tokens=True) for ids in expected]
        assert {out.finish_reason for out in outs} == {"length"}
        assert {out.stats.emitted for out in outs} == {11}


def test_prompts_may_be_texts_chats_token_ids_or_lists_of_them(
    model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """A chat takes the tokenizer's template with a turn to answer in."""
    chat = [{"role": "user", "content": "hi"}]

    def write(prompts: Any) -> list[list[int]]:
        return [out.token_ids for out in orthrus.generate(model, characters, prompts, max_new_tokens=5)]

    text, answer = plain(characters, "abc", 5), plain(characters, "u:hi;a:", 5)
    assert write("abc") == [text]
    assert write(chat) == [answer]
    assert write([chat, "abc"]) == [answer, text]
    assert write(("abc", chat)) == [text, answer]
    ids = characters("abc")["input_ids"]
    assert write(ids) == write(torch.tensor(ids)) == [text]
    assert write([ids, "abc", chat]) == [text, text, answer]
    assert write(torch.tensor([ids, ids])) == [text, text]
    streamed = orthrus.stream(model, characters, torch.tensor(ids), max_new_tokens=5)
    assert [token for chunk in streamed for token in chunk.token_ids] == text
    assert write([]) == []


def test_special_tokens_end_the_text_and_stay_out_of_it(
    model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """The end token is among the ids, once; the text is without it; a model's own end token needs no asking."""
    ids = plain(characters, ".", 11)
    assert ids[:3] == [81, 39, 0]
    out = orthrus.generate(model, characters, ".", max_new_tokens=11, eos_token_id=[0, 1])[0]
    assert out.token_ids == ids[:3]
    assert out.text == characters.decode(ids[:2])
    assert out.finish_reason == "stop"
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, 0
    own = orthrus.generate(model, characters, ".", max_new_tokens=11)[0]
    model.generation_config.eos_token_id = before
    assert (own.token_ids, own.text) == (out.token_ids, out.text)


def test_stop_strings_end_the_text(model: PreTrainedModel, characters: PreTrainedTokenizerBase) -> None:
    """As soon as one is complete; it stays in the text, as in transformers."""
    text = characters.decode(plain(characters, "abc", 11))
    stop = text[4:6]
    for more in ({"mode": "ar"}, {"plan": "full"}, {"plan": "fixed:2"}):
        out = orthrus.generate(  # type: ignore[arg-type]
            model, characters, ["abc", "x"], max_new_tokens=11, stop_strings=[stop, "~never~"], **more
        )[0]
        assert out.text == text[: text.index(stop) + 2]
        assert out.finish_reason == "stop"


def test_progress_is_reported_for_every_prompt(model: PreTrainedModel, characters: PreTrainedTokenizerBase) -> None:
    """The pieces of each prompt join to its tokens."""
    pieces: dict[int, list[int]] = {}
    outs = orthrus.generate(
        model,
        characters,
        TEXTS,
        max_new_tokens=7,
        batch_size=2,
        on_progress=lambda index, progress: pieces.setdefault(index, []).extend(progress.token_ids),
    )
    assert [pieces[i] for i in range(4)] == [out.token_ids for out in outs]


SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 8, "plan": "fixed:4"}


def test_sampled_prompts_draw_noise_of_their_own(model: PreTrainedModel, characters: PreTrainedTokenizerBase) -> None:
    """Equal prompts of one call differ; the same call again, at any batch size, does not; another seed does."""
    first = [o.text for o in orthrus.generate(model, characters, ["abc"] * 3, seed=1, **SAMPLED)]
    assert len(set(first)) == 3
    again = orthrus.generate(model, characters, ["abc"] * 3, seed=1, batch_size=1, **SAMPLED)
    assert [o.text for o in again] == first
    assert [o.text for o in orthrus.generate(model, characters, ["abc"] * 3, seed=2, **SAMPLED)] != first
    streamed = "".join(chunk.text for chunk in orthrus.stream(model, characters, "abc", seed=1, **SAMPLED))
    assert streamed == first[0]


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("name", ["ar", "fixed:4", "full"])
def test_chunks_join_to_the_completion(name: str, model: PreTrainedModel, characters: PreTrainedTokenizerBase) -> None:
    """Text, tokens, accepted drafts, reason and counts; drafts and bonus are told apart."""
    out = orthrus.generate(model, characters, "abc", max_new_tokens=11, plan=name)[0]
    chunks = list(orthrus.stream(model, characters, "abc", max_new_tokens=11, plan=name))
    assert "".join(chunk.text for chunk in chunks) == out.text
    assert [token for chunk in chunks for token in chunk.token_ids] == out.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert sum(chunk.accepted for chunk in chunks) == out.stats.accepted
    assert chunks[-1].stats == out.stats
    counts = list(accumulate(len(chunk.token_ids) for chunk in chunks))
    assert [chunk.stats.emitted for chunk in chunks] == counts
    for index, chunk in enumerate(chunks):
        first = len(chunk.first_text)
        assert first == (name != "ar" and index != 1)  # the prompt's pass has drafted for it
        assert characters.decode(chunk.token_ids[:first]) == chunk.first_text
        assert characters.decode(chunk.token_ids[first : first + chunk.accepted]) == chunk.draft_text
        assert characters.decode(chunk.token_ids[first + chunk.accepted :]) == chunk.bonus_text


def test_streams_hold_characters_back_until_they_are_whole(bytelevel: PreTrainedTokenizerBase) -> None:
    """Over a byte-level tokenizer, the pieces still join to the text of the whole, broken bytes at its end included."""
    model = dual(vocab_size=256)
    for prompt in ("é", "→x", "abc"):
        text = orthrus.generate(model, bytelevel, prompt, max_new_tokens=23)[0].text
        assert "".join(c.text for c in orthrus.stream(model, bytelevel, prompt, max_new_tokens=23)) == text


class Forgetful:
    """A tokenizer that cannot decode one token."""

    chat_template = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token: int) -> None:
        self._tokenizer, self._token = tokenizer, token
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

    def __call__(self, text: str) -> Any:
        return self._tokenizer(text)

    def decode(self, tokens: list[int], **options: bool) -> str:
        if self._token in tokens:
            raise LookupError("no such token")
        return str(self._tokenizer.decode(tokens, **options))


@pytest.mark.parametrize("stop", [None, ["~never~"]])
def test_a_text_that_cannot_be_decoded_leaves_its_neighbours_alone(
    stop: list[str] | None, model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """Whether the decoding is for stop strings, within the engine, or for the text at the end."""
    expected = [plain(characters, p, 11) for p in TEXTS]
    token = next(t for t in expected[1] if not any(t in ids for ids in (expected[0], *expected[2:])))
    outs = orthrus.generate(
        model, Forgetful(characters, token), TEXTS, max_new_tokens=11, stop_strings=stop, plan="full"
    )
    assert [out.finish_reason for out in outs] == ["length", "error", "length", "length"]
    assert isinstance(outs[1].error, LookupError)
    assert [outs[i].token_ids for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    with pytest.raises(LookupError, match="no such token"):
        list(orthrus.stream(model, Forgetful(characters, token), TEXTS[1], max_new_tokens=11, stop_strings=stop))


def test_texts_spelled_in_bytes_stream_and_stop_as_a_whole(bytefallback: PreTrainedTokenizerBase) -> None:
    """A random model writes invalid bytes between pieces: no row fails, and streams equal the whole text."""
    model = dual(vocab_size=len(bytefallback))
    prompts = ["ab", "é a", "abc.", "\n"]
    outs = orthrus.generate(model, bytefallback, prompts, max_new_tokens=23)
    assert any("\ufffd" in out.text for out in outs)
    assert [out.text for out in outs] == [bytefallback.decode(o.token_ids, skip_special_tokens=True) for o in outs]
    for prompt, out in zip(prompts, outs, strict=True):
        chunks = orthrus.stream(model, bytefallback, prompt, max_new_tokens=23)
        assert "".join(chunk.text for chunk in chunks) == out.text
    stopped = orthrus.generate(model, bytefallback, prompts, max_new_tokens=23, stop_strings=["\ufffd"])
    assert [o.finish_reason for o in stopped] == ["stop" if "\ufffd" in o.text else "length" for o in stopped]
    assert [out.token_ids[: len(o.token_ids)] for out, o in zip(outs, stopped, strict=True)] == [
        o.token_ids for o in stopped
    ]


@pytest.mark.parametrize("interruption", [GeneratorExit, KeyboardInterrupt])
def test_a_stream_left_early_leaves_the_engine_ready(
    interruption: type[BaseException], model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """Closed, or broken by Ctrl-C: the next text from the same engine is whole."""
    engine = Engine(model, rows=1, capacity=64, plan=steps.parse("fixed:4"))
    stream = orthrus.stream(model, characters, "abc", engine=engine, max_new_tokens=20)
    first = next(stream)
    with pytest.raises(interruption):
        stream.throw(interruption)
    assert not engine.busy
    assert first.stats.emitted < 20
    chunks = orthrus.stream(model, characters, "x", engine=engine, max_new_tokens=9)
    assert [t for chunk in chunks for t in chunk.token_ids] == plain(characters, "x", 9)


def test_a_stream_takes_an_idle_engine_as_it_is(model: PreTrainedModel, characters: PreTrainedTokenizerBase) -> None:
    """Two texts at a time would be mixed up, and another plan beside an engine passed over; the first text goes on."""
    engine = Engine(model, rows=1, capacity=64, plan=steps.parse("fixed:4"))
    for more in ({"mode": "ar"}, {"plan": "full"}, {"exact": "token"}):
        with pytest.raises(ConfigError, match="mode, plan and exact are settled with the engine"):
            orthrus.stream(model, characters, "abc", engine=engine, **more)  # type: ignore[arg-type]
    first = orthrus.stream(model, characters, "abc", engine=engine, max_new_tokens=20)
    tokens = next(first).token_ids
    with pytest.raises(ConfigError, match="needs an idle engine, found one with a text in flight"):
        next(orthrus.stream(model, characters, "x", engine=engine, max_new_tokens=9))
    assert tokens + [t for chunk in first for t in chunk.token_ids] == plain(characters, "abc", 20)


def test_a_conversation_keeps_its_keys(
    model: PreTrainedModel, characters: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second turn reads its own words only."""
    engine = Engine(model, rows=1, capacity=96, plan=steps.parse("fixed:4"))
    read: list[int] = []
    real = engine.passes.prefill

    def prefill(rows: slice, pending: list[list[int]], **how: Any) -> Any:
        read.append(len(pending[0]))
        return real(rows, pending, **how)

    monkeypatch.setattr(engine.passes, "prefill", prefill)
    first = "".join(c.text for c in orthrus.stream(model, characters, "hello", engine=engine, max_new_tokens=10))
    prompt = "hello" + first + "more"
    second = [
        t for c in orthrus.stream(model, characters, prompt, engine=engine, max_new_tokens=10) for t in c.token_ids
    ]
    assert second == plain(characters, prompt, 10)
    assert read[0] == 4
    assert read[1] <= 4


# ---------------------------------------------------------------- bad input

BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "the prompt must not be empty"),
    (["abc", ""], "the prompt must not be empty"),
    ([[]], "the chat must hold at least one message"),
    ([{"role": "user"}], 'chat messages are {"role"'),
    ([{"content": "x"}], 'chat messages are {"role"'),
    ([{"role": "user", "content": 3}], 'chat messages are {"role"'),
    ([{"role": "user", "content": ""}], "the chat must say something"),
    ({"role": "user", "content": "x"}, "found a single message"),
    ([[5, 96]], "ids from 0 to 95, found 5 to 96"),
    (None, "found None"),
    (b"abc", "found bytes"),
    ("a" * 256, "reads at most 256 tokens, the prompt has 256: shorten it"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts_are_refused(
    prompt: Any, message: str, model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """Before anything is decoded, whatever else is in the list."""
    with pytest.raises(PromptError, match=message):
        orthrus.generate(model, characters, prompt, max_new_tokens=4)


def test_a_chat_needs_a_template(model: PreTrainedModel, bytelevel: PreTrainedTokenizerBase) -> None:
    """And the message says what to do without."""
    with pytest.raises(PromptError, match="a chat needs a tokenizer with a chat template"):
        orthrus.generate(model, bytelevel, [{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: Input should be greater than 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature: Input should be a finite number"),
        ({"do_sample": True, "top_p": 0}, "top_p: Input should be greater than 0"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"num_beams": 2}, "'num_beams' is not honoured"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"mode": "fast"}, "mode must be 'orthrus' or 'ar', found 'fast'"),
        ({"mode": "ar", "plan": "full"}, "decodes plainly, but plan 'full' asks for drafts"),
        ({"plan": "fixed:9"}, "blocks of 9, this view was trained for at most 8"),
        ({"plan": "nonsense"}, "a plan is"),
        ({"exact": "mostly"}, "exact must be one of distribution, token, found 'mostly'"),
    ],
)
def test_bad_options_are_refused(
    asked: dict[str, Any], message: str, model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """By `generate`, and by `stream` when it is called, not when it is first read."""
    with pytest.raises(ConfigError, match=message):
        orthrus.generate(model, characters, "abc", **asked)
    if "batch_size" not in asked:
        with pytest.raises(ConfigError, match=message):
            orthrus.stream(model, characters, "abc", **asked)


def test_a_plain_model_is_refused(characters: PreTrainedTokenizerBase) -> None:
    """It has no view to draft with; the message says how to get one."""
    with pytest.raises(ConfigError, match=r"found a plain one: orthrus\.attach"):
        orthrus.generate(tiny("qwen3"), characters, "abc")


def test_an_engine_too_small_for_the_prompt_says_so(
    model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """A stream over a given engine asks for no more than it has."""
    engine = Engine(model, rows=1, capacity=16, plan=steps.parse("fixed:4"))
    with pytest.raises(CacheFull, match="a row has 16"):
        next(orthrus.stream(model, characters, "abc", engine=engine, max_new_tokens=10))
    assert not engine.busy


def test_every_error_is_one_tree() -> None:
    """Callers may catch as widely as they like."""
    from orthrus import errors

    named = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(named) > 5
    assert all(issubclass(e, OrthrusError) for e in named)


def test_texts_fill_the_context_and_no_more(characters: PreTrainedTokenizerBase) -> None:
    """A model of 16 positions asked for 99 tokens: each prompt gets what its length leaves."""
    model = dual(max_position_embeddings=16)
    outs = orthrus.generate(model, characters, ["abc", "abcdefghijklmno"], max_new_tokens=99)
    assert [len(out.token_ids) for out in outs] == [13, 1]
    assert [out.token_ids for out in outs] == [
        plain(characters, "abc", 13),
        plain(characters, "abcdefghijklmno", 1),
    ]


def test_engines_have_just_enough_room(model: PreTrainedModel) -> None:
    """Prompt, new tokens and one step's scratch; the longest prompt is not always the largest request."""
    options = api.Options.of(None, max_new_tokens=100)
    engine = api.engine_for(model, [[5] * 200, [5] * 150], options, steps.parse("fixed:4"), rows=2)
    assert engine.capacity == Engine.room(200, 56, 5)
    engine = api.engine_for(model, [[5] * 3], options, steps.parse("ar"), rows=1)
    assert engine.capacity == Engine.room(3, 100, 1)
