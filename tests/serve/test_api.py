"""The unmodified `openai` client, synchronous and asynchronous, against a server over a tiny model."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.serve.conftest import Running

ASK: list[Any] = [{"role": "user", "content": "hello"}]
Texts = Callable[..., str]


def test_the_model_is_listed_and_found_by_name(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model


def test_a_chat_is_generates_text(client: OpenAI, expected: Texts) -> None:
    made = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=30)
    (choice,) = made.choices
    assert choice.message.content == expected(ASK, 30)
    assert choice.finish_reason == "length"
    assert made.usage is not None
    assert made.usage.completion_tokens == 30
    assert made.usage.total_tokens == made.usage.prompt_tokens + 30


def test_answers_have_the_fields_of_openais_types(server: Running) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 5}
    answer = server.raw().post("/v1/chat/completions", json=body).json()
    ChatCompletion.model_validate(answer, strict=True)
    assert ChatCompletion.model_construct(**answer).object == "chat.completion"


def test_streamed_chunks_join_to_the_same_text(client: OpenAI, expected: Texts) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=ASK, max_tokens=30, stream=True))
    assert all(isinstance(chunk, ChatCompletionChunk) and chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(ASK, 30)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_usage_of_a_stream_comes_last_and_tells_what_drafts_were_worth(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, stream=True, stream_options=options
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    usage = last.usage
    assert usage is not None
    details = usage.completion_tokens_details
    assert details is not None
    stats = usage.model_extra["orthrus"]  # type: ignore[index]
    assert stats["emitted"] == usage.completion_tokens == 30
    assert stats["accepted"] == details.accepted_prediction_tokens > 0
    assert stats["drafted"] - stats["accepted"] == details.rejected_prediction_tokens


def test_blocks_tell_of_every_character_which_cycle_and_source_wrote_it(client: OpenAI, expected: Texts) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, stream=True, extra_body={"orthrus": {"blocks": True}}
    )
    blocks = [chunk.model_extra["orthrus"] for chunk in stream if "orthrus" in (chunk.model_extra or {})]
    pieces = [piece for block in blocks for piece in block["pieces"]]
    assert "".join(piece["text"] for piece in pieces) == expected(ASK, 30)
    assert [block["cycle"] for block in blocks] == list(range(len(blocks)))  # the prompt's pass is 0
    for block in blocks:  # a token is a character here, or a special token without a text
        length = {"draft": 0, "bonus": 0}
        for piece in block["pieces"]:
            length[piece["source"]] += len(piece["text"])
        assert length["draft"] <= block["accepted"] <= block["drafted"]
        assert length["bonus"] <= block["emitted"] - block["accepted"] <= 2  # a first token and the bonus
    assert {piece["source"] for piece in pieces} == {"draft", "bonus"}


def test_plain_decoding_on_request_writes_the_same_text(client: OpenAI, expected: Texts) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, extra_body={"orthrus": {"mode": "ar"}}
    )
    assert made.choices[0].message.content == expected(ASK, 30)
    assert made.usage is not None
    assert made.usage.model_extra["orthrus"]["drafted"] == 0  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_blocks_ends_the_text_and_is_no_part_of_it(
    client: OpenAI, expected: Texts, stream: bool
) -> None:
    whole = expected(ASK, 40)
    for at in (3, 9, 17):
        stop = whole[at : at + 7]
        end = whole.index(stop)
        assert _text(client, stream=stream, max_tokens=40, stop=["never so", stop]) == (whole[:end], "stop")


def test_a_stop_string_that_only_begins_is_given_in_the_end(client: OpenAI, expected: Texts) -> None:
    whole = expected(ASK, 20)
    assert _text(client, stream=True, max_tokens=20, stop=whole[-3:] + "~") == (whole, "length")


def test_completions_take_texts_tokens_and_lists_of_either(client: OpenAI, server: Running, expected: Texts) -> None:
    texts = ["hello", "other"]
    ids = [server.tokenizer(text)["input_ids"] for text in texts]
    wanted = [expected(text, 12) for text in texts]
    prompts: list[Any] = [texts[0], texts, ids[0], ids]
    for prompt in prompts:
        made = client.completions.create(model="tiny", prompt=prompt, max_tokens=12)
        assert [choice.text for choice in made.choices] == wanted[: len(made.choices)]
    echoed = client.completions.create(model="tiny", prompt="hello", max_tokens=12, echo=True)
    assert echoed.choices[0].text == "hello" + wanted[0]
    chunks = client.completions.create(model="tiny", prompt="hello", max_tokens=12, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello" + wanted[0]


def test_a_completion_without_a_length_has_sixteen_tokens_and_a_chat_fills_its_row(
    client: OpenAI, server: Running
) -> None:
    made = client.completions.create(model="tiny", prompt="hello")
    assert made.usage is not None
    assert made.usage.completion_tokens == 16
    filled = client.chat.completions.create(model="tiny", messages=ASK)
    assert filled.usage is not None
    assert filled.usage.total_tokens == server.service.context
    assert filled.choices[0].finish_reason == "length"


def test_a_seed_gives_the_same_text_again_and_choices_differ(client: OpenAI) -> None:
    def texts(seed: int | None) -> list[str | None]:
        made = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=12, n=3, seed=seed, temperature=1.5, top_p=0.95,
            extra_body={"top_k": 40, "min_p": 0.01},
        )  # fmt: skip
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        return [choice.message.content for choice in made.choices]

    first = texts(7)
    assert first == texts(7)
    assert len(set(first)) == 3
    assert texts(None) != texts(None)  # equal by chance about once in 10^30 runs


def test_sampled_text_is_generates_under_the_same_seed(client: OpenAI, expected: Texts) -> None:
    made = client.completions.create(model="tiny", prompt="hello", max_tokens=12, seed=5, temperature=0.8)
    assert made.choices[0].text == expected("hello", 12, seed=5, do_sample=True, temperature=0.8, plan="full")


def test_temperature_zero_is_greedy_whatever_stands_beside_it(client: OpenAI, expected: Texts) -> None:
    made = client.completions.create(model="tiny", prompt="hello", max_tokens=12, temperature=0, top_p=0.1)
    assert made.choices[0].text == expected("hello", 12)


def test_the_repetition_penalty_is_honoured(client: OpenAI, expected: Texts) -> None:
    body = {"repetition_penalty": 1.7}
    made = client.completions.create(model="tiny", prompt="hello", max_tokens=12, extra_body=body)
    assert made.choices[0].text == expected("hello", 12, repetition_penalty=1.7)


def test_parts_nulls_and_fields_without_effect_are_taken_as_clients_send_them(client: OpenAI, expected: Texts) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    made = client.chat.completions.create(
        model="tiny", messages=parts, max_completion_tokens=9, stop=None, user="me", seed=None,
        extra_body={"ignore_eos": True, "min_tokens": 9, "logit_bias": None, "tools": None, "functions": None},
    )  # fmt: skip
    assert made.choices[0].message.content == expected(ASK, 9)


def test_every_text_is_right_under_load_streamed_or_not(server: Running, expected: Texts) -> None:
    lengths = [5 + 3 * i for i in range(12)]
    asks: list[list[Any]] = [[{"role": "user", "content": f"say {i % 4}"}] for i in range(12)]

    async def one(client: AsyncOpenAI, i: int) -> str:
        if i % 2:
            made = await client.chat.completions.create(model="tiny", messages=asks[i], max_tokens=lengths[i])
            return made.choices[0].message.content or ""
        chunks = await client.chat.completions.create(
            model="tiny", messages=asks[i], max_tokens=lengths[i], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(12)))

    assert asyncio.run(all_at_once()) == [expected(asks[i], lengths[i]) for i in range(12)]


def _text(client: OpenAI, *, stream: bool, **options: Any) -> tuple[str, str | None]:
    if not stream:
        (choice,) = client.chat.completions.create(model="tiny", messages=ASK, **options).choices
        return choice.message.content or "", choice.finish_reason
    chunks = list(client.chat.completions.create(model="tiny", messages=ASK, stream=True, **options))
    return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
