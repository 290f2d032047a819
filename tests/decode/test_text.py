"""Between text and tokens: streams equal the whole, prompts of every form are taken or refused by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orthrus.checkpoints.load import tokenizer_of
from orthrus.decode.text import TextStream, as_list, checked_message, decode, encode
from orthrus.errors import ConfigError, PromptError


@pytest.fixture(scope="module")
def nano() -> PreTrainedTokenizerBase:
    return tokenizer_of("nano")


@pytest.fixture(scope="module")
def python() -> PreTrainedTokenizerBase:
    """A tokenizer without a backend in Rust; it leaves invalid bytes out."""
    return ByT5Tokenizer(extra_ids=3)


@pytest.fixture(scope="module", params=["bytefallback", "bytelevel", "nano", "characters", "python"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


def streamed(tokenizer: PreTrainedTokenizerBase, tokens: list[int], *, skip: bool = True) -> str:
    """Join a stream's pieces; at every point they and what is pending are the text so far."""
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    text = ""
    for count, token in enumerate(tokens, start=1):
        text += stream.push(token)
        assert text + stream.pending == tokenizer.decode(tokens[:count], skip_special_tokens=skip)
    return text + stream.finish()


# ---------------------------------------------------------------- streams


@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_random_tokens_equals_the_whole(
    tokenizer: PreTrainedTokenizerBase, data: st.DataObject, skip: bool
) -> None:
    """Bytes that are no UTF-8, special tokens, spaces at the start: any sequence of tokens."""
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    assert streamed(tokenizer, tokens, skip=skip) == tokenizer.decode(tokens, skip_special_tokens=skip)


SPELLED = [3 + byte for byte in "😀é\n".encode()] + [3 + 0xFF, 3 + 0xE2]


@given(st.lists(st.sampled_from([*SPELLED, 2, *range(259, 271)]), max_size=30))
def test_a_stream_of_spelled_characters_equals_the_whole(
    bytefallback: PreTrainedTokenizerBase, tokens: list[int]
) -> None:
    """Runs of bytes, whole characters and broken ones, an end token between them, which is left out."""
    assert streamed(bytefallback, tokens) == bytefallback.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=20))
def test_a_stream_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """What a tokenizer makes of a text, streamed, is what it makes of it as a whole."""
    tokens = tokenizer(text)["input_ids"]
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_invalid_bytes_become_replacement_characters(bytefallback: PreTrainedTokenizerBase) -> None:
    """The example of the report: "ab", a line break and the first three bytes of an emoji, "ab"."""
    a = bytefallback.convert_tokens_to_ids("ab")
    tokens = [a, *(3 + byte for byte in b"\n\xf0\x9f\x98"), a]
    assert streamed(bytefallback, tokens) == "ab" + 4 * "\ufffd" + "ab" == bytefallback.decode(tokens)


def test_a_stream_decodes_a_short_window(bytelevel: PreTrainedTokenizerBase) -> None:
    """Each token costs the same, however long the text is."""
    lengths: list[int] = []

    class Counting:
        convert_ids_to_tokens = bytelevel.convert_ids_to_tokens

        def decode(self, tokens: list[int], **options: bool) -> str:
            lengths.append(len(tokens))
            return bytelevel.decode(tokens, **options)

    stream = TextStream(Counting())  # type: ignore[arg-type]
    text = "é→x abc" * 50
    assert "".join(map(stream.push, bytelevel(text)["input_ids"])) == text
    assert max(lengths) <= 8


# ---------------------------------------------------------------- prompts

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abc", ["abc"]),
        (CHAT, [CHAT]),
        ([CHAT, "abc", [5, 6]], [CHAT, "abc", [5, 6]]),
        (("abc", tuple(CHAT)), ["abc", tuple(CHAT)]),
        ([5, 6], [[5, 6]]),
        ((5, 6), [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([torch.tensor([5, 6]), torch.tensor([7], dtype=torch.int32)], [[5, 6], [7]]),
        (np.array([5, 6]), [[5, 6]]),
        ([], []),
        ((text for text in ("a", "b")), ["a", "b"]),
    ],
)
def test_prompts_come_in_every_form(prompts: Any, expected: list[Any]) -> None:
    """Texts, chats and token ids; one of them or many."""
    assert as_list(prompts) == expected


BAD: list[tuple[Any, str]] = [
    ({"role": "user", "content": "x"}, "found a single message: put"),
    ({"input_ids": [1]}, "found a single dict with the keys input_ids: put"),
    (5, "found 5"),
    (None, "found None"),
    (True, "found True"),
    (b"abc", "found bytes"),
    ([None], "found None"),
    (["abc", 5], "found 5"),
    ([b"abc"], "found bytes"),
    ([["a", "b"]], "found a list of str"),
    ([[1, "b"]], "found a list of int and str"),
    ([[1.0, 2.0]], "found a list of float"),
    ([True, False], "found True"),
    (torch.tensor([0.5]), r"found a Tensor of float32 and shape \[1\]"),
    (torch.tensor([True]), r"found a Tensor of bool and shape \[1\]"),
    (torch.tensor(5), r"found a Tensor of int64 and shape \[\]"),
    (torch.zeros(1, 1, 1, dtype=torch.long), r"shape \[1, 1, 1\]"),
    ("a\ud800", r"found a lone surrogate \('\\ud800'\) at character 1"),
    ([{"role": "user", "content": "\udc80"}], "found a lone surrogate"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "found 'image_url': only text is read"),
    ([{"role": "user", "content": None}], 'chat messages are {"role"'),
    ([CHAT[0], "x"], "found a single message"),
    ([{"role": "assistant", "tool_calls": ["x"]}], "tool_calls must be a list of objects"),
    ([CHAT[0], {"role": "u", "tool_calls": [{"function": {"arguments": "{"}}]}], "must be JSON, found '{'"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD)
def test_what_is_no_prompt_is_refused(characters: PreTrainedTokenizerBase, prompts: Any, message: str) -> None:
    """By what it is, with a PromptError."""
    with pytest.raises(PromptError, match=message):
        [encode(characters, prompt) for prompt in as_list(prompts)]


# ---------------------------------------------------------------- chats

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }};{% endif %}{% if enable_thinking %}think;{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
USERS_ALONE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }};{% endif %}{% endfor %}"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
ASKED = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "42"},
]


@pytest.fixture
def template(bytelevel: PreTrainedTokenizerFast) -> Callable[[str], PreTrainedTokenizerFast]:
    def with_template(text: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=bytelevel.backend_tokenizer, chat_template=text)

    return with_template


def test_tool_calls_and_text_parts_reach_the_template(template: Callable[[str], PreTrainedTokenizerFast]) -> None:
    """As OpenAI's clients send them: arguments as JSON text, content in parts, keys without a value."""
    tokenizer = template(TEMPLATE)
    tool = {"type": "function", "function": {"name": "f"}}
    said = decode(tokenizer, encode(tokenizer, ASKED, tools=[tool]))
    assert said == '[{"type": "function", "function": {"name": "f"}}];user:one\ntwo;assistant:f({"x": 1});tool:42;a:'
    thought = encode(tokenizer, CHAT, chat_template_kwargs={"enable_thinking": True})
    assert decode(tokenizer, thought) == "think;user:hi;a:"
    started = [*CHAT, {"role": "assistant", "content": "well"}]
    going_on = encode(tokenizer, started, chat_template_kwargs={"continue_final_message": True})
    assert decode(tokenizer, going_on) == "user:hi;assistant:well"


def test_a_message_is_not_changed_in_its_owners_hands() -> None:
    """Arguments become objects in a copy."""
    checked = checked_message(ASKED[1])
    assert checked == {
        "role": "assistant",
        "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert CALL["function"] == {"name": "f", "arguments": '{"x": 1}'}


@pytest.mark.parametrize(
    ("text", "chat", "more", "error", "message"),
    [
        (USERS_ALONE, CHAT, {"tools": [{"name": "f"}]}, PromptError, "chat template presents none"),
        (USERS_ALONE, ASKED[:2], {}, PromptError, "does not read 'tool_calls' of a message"),
        (USERS_ALONE, [*CHAT, ASKED[2]], {}, PromptError, "drops messages of role 'tool'"),
        (USERS_ALONE, [CHAT[0] | {"name": "Ann"}], {}, PromptError, "does not read 'name' of a message"),
        (USERS_ALONE, CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, ConfigError, "'enable_thinking'"),
        (TEMPLATE, CHAT, {"chat_template_kwargs": {"tokenize": False}}, ConfigError, "found 'tokenize'"),
        (TEMPLATE, "text", {"tools": [{"name": "f"}]}, PromptError, "tools need a chat, found str"),
        ("{{ raise_exception('no') }}", CHAT, {}, PromptError, "the chat template refuses this chat: no"),
    ],
)
def test_what_a_template_would_drop_is_refused(
    template: Callable[[str], PreTrainedTokenizerFast],
    text: str,
    chat: Any,
    more: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """By name, instead of an answer to a part of the question."""
    with pytest.raises(error, match=message):
        encode(template(text), chat, **more)
