"""Log probabilities, biases and penalties; answers held to a JSON schema; tools and thoughts."""

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import APIError, AsyncOpenAI, BadRequestError, OpenAI
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import orthrus
from tests.families import perturb, tiny
from tests.serve.conftest import Running, running
from tests.serve.scripted import FAILS, Scripted

EOS, END_THINK = 256, 258
TEMPLATE = (
    "{% if tools %}T:{{ tools | tojson }};{% endif %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}a:"
    "{% if enable_thinking is not defined %}<think></think>{% elif enable_thinking %}<think>{% endif %}{% endif %}"
)
ASK: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 6},
    },
    "required": ["colour", "count", "name"],
    "additionalProperties": False,
}
PAINT: Any = {"type": "function", "function": {"name": "paint", "description": "Paint it", "parameters": SCHEMA}}
NOW: Any = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def tokenizer(bytelevel: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Byte by byte, with an end of text and the tags of thoughts."""
    made = PreTrainedTokenizerFast(tokenizer_object=bytelevel.backend_tokenizer, chat_template=TEMPLATE)
    made.add_special_tokens({"eos_token": "<eos>"})
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    assert made.convert_tokens_to_ids(["<eos>", "</think>"]) == [EOS, END_THINK]
    return made


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = tiny("qwen2", vocab_size=260, max_position_embeddings=1024)
    made.generation_config.eos_token_id = EOS
    orthrus.attach(made, orthrus.OrthrusConfig(block_size=6))
    perturb(made, scale=0.01)
    return made


@pytest.fixture(scope="module")
def server(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    with running(model, tokenizer, rows=3, plan="full") as made:
        yield made


@pytest.fixture
def client(server: Running) -> OpenAI:
    return server.client()


def chat(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 24, **options})


def held_to(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}


# ---------------------------------------------------------------- log probabilities, biases, penalties


def test_log_probabilities_are_those_of_the_model(
    client: OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = client.completions.create(model="tiny", prompt="hello", max_tokens=15, logprobs=3)
    told = made.choices[0].logprobs
    assert told is not None
    prompt = tokenizer("hello")["input_ids"]
    (row,) = orthrus.generate(model, tokenizer, "hello", max_new_tokens=15)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row.token_ids])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1)
    own = wanted[range(15), row.token_ids]
    torch.testing.assert_close(torch.tensor(told.token_logprobs), own, atol=1e-4, rtol=1e-4)
    likeliest = torch.tensor([sorted(top.values(), reverse=True)[0] for top in told.top_logprobs or []])
    torch.testing.assert_close(likeliest, wanted.max(-1).values, atol=1e-4, rtol=1e-4)
    assert len(told.text_offset or []) == 15


@pytest.mark.parametrize("stream", [False, True])
def test_chat_log_probabilities_spell_the_text_in_bytes(client: OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "stream": stream}
    answer = chat(client, **options)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    text = "".join(c.delta.content or "" for c in choices) if stream else choices[0].message.content
    spelled = b"".join(bytes(token.bytes) for token in tokens if not token.token.startswith("<"))
    whole = spelled.decode(errors="replace").replace("\ufffd", "")  # how many stand for a broken end is not agreed upon
    assert whole == text.replace("\ufffd", "")
    assert len(tokens) == 24
    for token in tokens:
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].logprob == token.logprob  # greedy


def test_no_log_probabilities_are_told_unless_asked_for(client: OpenAI) -> None:
    assert chat(client).choices[0].logprobs is None


def test_a_bias_forbids_and_forces_tokens(client: OpenAI) -> None:
    prompt: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "logprobs": 0}
    free = client.completions.create(**prompt).choices[0].logprobs
    assert free is not None
    ids = {top: i for i, top in enumerate(free.tokens or [])}
    assert ids
    forced = client.completions.create(**prompt, logit_bias={"65": 100, "66": 99.5}).choices[0]
    unforced = client.completions.create(**prompt, logit_bias={"65": 100, "66": 99.5, "67": -100}).choices[0]
    assert forced.text == unforced.text
    assert len(set(forced.text)) == 1
    assert forced.text != client.completions.create(**prompt).choices[0].text


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_are_generates(
    client: OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, field: str
) -> None:
    value = 1.5
    made = client.completions.create(model="tiny", prompt="hello", max_tokens=20, extra_body={field: value})
    (wanted,) = orthrus.generate(model, tokenizer, "hello", max_new_tokens=20, **{field: value})
    assert made.choices[0].text == wanted.text


def test_a_text_is_not_shorter_than_its_least_length(client: OpenAI) -> None:
    made = client.completions.create(
        model="tiny", prompt="hello", max_tokens=20, logit_bias={str(EOS): 100}, extra_body={"min_tokens": 5}
    )
    assert made.usage is not None
    assert made.usage.completion_tokens == 6  # the end of the text is a token too
    assert made.choices[0].finish_reason == "stop"


# ---------------------------------------------------------------- grammars


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 3}, {"n": 3, "temperature": 1.0, "seed": 1}])
def test_an_answer_fits_its_schema(client: OpenAI, options: dict[str, Any]) -> None:
    made = chat(client, response_format=held_to(SCHEMA), max_tokens=120, **options)
    for choice in made.choices:
        thing = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert set(thing) == {"colour", "count", "name"}
        assert thing["colour"] in ("red", "green")
        assert 0 <= thing["count"] <= 99
        assert len(thing["name"]) <= 6


def test_a_held_text_is_the_same_drafted_and_plain(client: OpenAI) -> None:
    both = [
        chat(client, response_format=held_to(SCHEMA), max_tokens=120, extra_body={"orthrus": {"mode": mode}})
        for mode in ("orthrus", "ar")
    ]
    assert both[0].choices[0].message.content == both[1].choices[0].message.content


def test_tokens_that_a_grammar_forces_are_drafts_that_are_always_right(client: OpenAI) -> None:
    schema = {"const": "These fifty letters or so are all that may be written."}
    made = chat(
        client, max_tokens=120, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    assert json.loads(made.choices[0].message.content) == schema["const"]
    stats = made.usage.model_extra["orthrus"]
    assert stats["emitted"] - stats["accepted"] - stats["first_tokens"] <= stats["cycles"]
    assert stats["tokens_per_cycle"] > 5.5  # of six


def test_any_json_object_is_one(client: OpenAI) -> None:
    made = chat(client, response_format={"type": "json_object"}, max_tokens=4)
    assert made.choices[0].message.content.startswith("{")
    assert made.choices[0].finish_reason == "length"


def test_a_schema_that_is_none_is_refused(server: Running) -> None:
    for schema in ({"type": "wizard"}, {"properties": 7}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        body = {"model": "tiny", "messages": ASK, "response_format": held_to(schema)}
        answer = server.raw().post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "schema" in answer.json()["error"]["message"]


# ---------------------------------------------------------------- tools and thoughts


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_call_that_must_be_made_is_made_and_fits(client: OpenAI, choice: Any) -> None:
    tools = [PAINT] if choice == "required" else [NOW, PAINT]
    made = chat(client, tools=tools, tool_choice=choice, parallel_tool_calls=False, max_tokens=200)
    (call,) = made.choices[0].message.tool_calls
    assert made.choices[0].finish_reason == "tool_calls"
    assert made.choices[0].message.content is None
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "green")
    stream = chat(client, tools=tools, tool_choice=choice, parallel_tool_calls=False, max_tokens=200, stream=True)
    deltas = [d for chunk in stream if chunk.choices for d in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "paint"
    assert deltas[0].id
    assert len(deltas) > 1
    assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments


@pytest.mark.parametrize("form", ["<tool_call><function=paint>", "[TOOL_CALLS]"])
def test_a_call_that_must_be_made_is_refused_where_the_template_has_another_form(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, form: str
) -> None:
    """By name, as a schema beside tools is; tools without either are offered as ever."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE.replace("<tool_call>", form)
    held = [{"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "paint"}}}]
    with running(model, other, rows=1) as made:
        for options in (*held, {"response_format": held_to(SCHEMA)}):
            body = {"model": "tiny", "messages": ASK, "tools": [PAINT], "max_tokens": 2, **options}
            answer = made.raw().post("/v1/chat/completions", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in options
            assert "Hermes" in answer.json()["error"]["message"]
        assert chat(made.client(), tools=[PAINT], max_tokens=2).choices[0].finish_reason == "length"


@pytest.mark.parametrize(("first", "called"), [("{", False), ("<", True)])
def test_a_schema_beside_tools_holds_the_answer_and_leaves_calls_free(
    client: OpenAI, tokenizer: PreTrainedTokenizerFast, first: str, called: bool
) -> None:
    """The first character decides: an answer that fits the schema, or calls that fit the tools' parameters."""
    (token,) = tokenizer(first)["input_ids"]
    bias = {str(token): 100}
    made = chat(
        client, tools=[PAINT, NOW], response_format=held_to(SCHEMA), logit_bias=bias, max_tokens=200, temperature=1.0,
        seed=2, parallel_tool_calls=False,
    ).choices[0]  # fmt: skip
    assert bool(made.message.tool_calls) == called
    if called:
        json.loads(made.message.tool_calls[0].function.arguments)
        assert made.message.content is None
    else:
        assert json.loads(made.message.content)["colour"] in ("red", "green")


@pytest.fixture
def scripted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Running, Scripted, dict[str, str]]]:
    """A server whose answers are what the test puts under "text"."""
    says = {"text": ""}
    with running(model, tokenizer, rows=2) as made:
        engine = Scripted(tokenizer, lambda _: says["text"])
        made.service.loop._make = {"orthrus": lambda: engine}  # type: ignore[dict-item, return-value]
        yield made, engine, says


CALLS = (
    'First.\n<tool_call>\n{"name": "paint", "arguments": {"colour": "réd"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def test_calls_that_a_model_chooses_to_make_are_found(scripted: Any) -> None:
    server, engine, says = scripted
    says["text"] = CALLS
    client = server.client()
    made = chat(client, tools=[PAINT, NOW], max_tokens=400).choices[0]
    assert engine.prompts[-1].startswith("T:[{")
    assert made.message.content == "First.\n"
    assert [(c.function.name, c.function.arguments) for c in made.message.tool_calls] == [
        ("paint", '{"colour": "réd"}'),
        ("now", "{}"),
    ]
    assert len({call.id for call in made.message.tool_calls}) == 2
    assert made.finish_reason == "tool_calls"
    single = chat(client, tools=[PAINT, NOW], max_tokens=400, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in single.message.tool_calls] == ["paint"]
    assert single.finish_reason == "tool_calls"
    off = chat(client, tools=[PAINT, NOW], tool_choice="none", max_tokens=400).choices[0]
    assert off.message.content == CALLS
    assert engine.prompts[-1].startswith("u:")
    asked = [
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    chat(client, messages=asked, tools=[NOW], max_tokens=400)
    assert engine.prompts[-1].endswith("t:noon;a:<think></think>")


@pytest.mark.parametrize("opened", [False, True])
def test_thoughts_stand_apart(scripted: Any, opened: bool) -> None:
    server, engine, says = scripted
    says["text"] = ("" if opened else "<think>") + "\nhm, so\n</think>\n\nYes."
    body = {"chat_template_kwargs": {"enable_thinking": opened}}
    message = chat(server.client(), max_tokens=99, extra_body=body).choices[0].message
    assert message.content == "Yes."
    assert message.model_extra["reasoning_content"].strip() == "hm, so"
    chunks = list(chat(server.client(), max_tokens=99, extra_body=body, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(d.content or "" for d in deltas) == "Yes."
    assert "".join((d.model_extra or {}).get("reasoning_content", "") for d in deltas).strip() == "hm, so"
    assert engine.prompts[-1].endswith("<think>") == opened


def test_a_schema_holds_after_the_thought(client: OpenAI) -> None:
    """The end of the thought is made likely; what follows it is JSON, what stands before it is free."""
    made = chat(
        client, max_tokens=200, response_format=held_to(SCHEMA),
        logit_bias={str(END_THINK): 12.0, str(EOS): -100}, temperature=1.0, seed=1,
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    ).choices[0].message  # fmt: skip
    assert json.loads(made.content)["colour"] in ("red", "green")


def test_a_row_that_fails_leaves_its_neighbours_alone(scripted: Any) -> None:
    server, _, says = scripted
    client = server.client()
    says["text"] = "fine " * 20
    stream = chat(client, max_tokens=400, stream=True)
    first = [next(stream), next(stream)]  # the first chunk names the assistant, the second is of the row
    says["text"] = FAILS
    with pytest.raises(APIError, match="ValueError"):
        chat(client, max_tokens=400)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in [*first, *stream]) == "fine " * 20


ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "choices": {"n": 2, "temperature": 1.0, "seed": 4},
    "a schema": {"response_format": held_to(SCHEMA), "max_tokens": 120},
    "a call": {"tools": [PAINT, NOW], "tool_choice": "required", "max_tokens": 200, "parallel_tool_calls": False},
    "log probabilities": {"logprobs": True, "top_logprobs": 2},
    "a stop string": {"stop": ["e", "a"]},
}


def test_the_asynchronous_client_gets_what_the_synchronous_one_gets(server: Running, client: OpenAI) -> None:
    """All kinds of requests at once, in one piece and streamed; an error has its type."""

    async def ask(other: AsyncOpenAI, options: dict[str, Any]) -> tuple[list[Any], list[str]]:
        body = {"model": "tiny", "messages": ASK, "max_tokens": 24, **options}
        made = await other.chat.completions.create(**body)
        said = [""] * len(made.choices)
        async for chunk in await other.chat.completions.create(**body, stream=True):
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
                said[choice.index] += "".join(c.function.arguments or "" for c in choice.delta.tool_calls or [])
        return made.choices, said

    async def all_at_once() -> list[tuple[list[Any], list[str]]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as other:
            with pytest.raises(BadRequestError, match="temperature"):
                await ask(other, {"temperature": -1})
            return await asyncio.gather(*(ask(other, options) for options in ASKED.values()))

    for options, (choices, streamed) in zip(ASKED.values(), asyncio.run(all_at_once()), strict=True):
        wanted = chat(client, **options).choices
        said, expected = ([(_content(c), c.finish_reason, _spelled(c)) for c in both] for both in (choices, wanted))
        assert said == expected
        assert streamed == [_content(choice) for choice in wanted]


def _spelled(choice: Any) -> list[str]:
    """The tokens of its log probabilities; the numbers may differ in their last bits with the rows beside them."""
    return [token.token for token in choice.logprobs.content] if choice.logprobs else []


def _content(choice: Any) -> str:
    """What a choice says or calls; calls have names of their own each time."""
    calls = choice.message.tool_calls or []
    return (choice.message.content or "") + "".join(call.function.arguments for call in calls)
