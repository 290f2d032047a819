"""Bad requests: a 4xx in OpenAI's form that names the field, and nothing else disturbed."""

import json
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError

from tests.serve.conftest import Running

ASK = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 4}

FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"foo": 1}, "foo"),
    ({"functions": []}, "functions"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": 10**40}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 10**9}, "messages"),
    ({"seed": 0.5}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"stop": ""}, "stop.0"),
    ({"stop": 7}, "stop"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, None),  # type: ignore[list-item]
    ({"min_tokens": -3}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"96": 1}}, "logit_bias"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, None),  # type: ignore[list-item]
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object"}}, None),  # type: ignore[list-item]
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None),  # type: ignore[list-item]
    ({"tool_choice": "required"}, None),  # type: ignore[list-item]
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, None),  # type: ignore[list-item]
    ({"modalities": ["audio"]}, "modalities.0"),
    ({"orthrus": {"mode": "fast"}}, "orthrus.mode"),
    ({"orthrus": {"plan": "full"}}, "orthrus.plan"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, None),  # type: ignore[list-item]
    ({"messages": [{"role": "user", "content": ""}]}, None),  # type: ignore[list-item]
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
]

BODIES = [
    b"{",
    b"",
    b"[]",
    b"7",
    b"\xff\xfe{}",
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
    b"[" * 50_000,
    b'{"a":' * 50_000,
]


@pytest.mark.parametrize(("change", "param"), FIELDS, ids=[str(change)[:40] for change, _ in FIELDS])
def test_a_bad_field_is_named(server: Running, change: dict[str, Any], param: str | None) -> None:
    answer = server.raw().post(
        "/v1/chat/completions", content=json.dumps(CHAT | change), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("body", BODIES, ids=[str(body[:12]) for body in BODIES])
def test_a_body_that_is_no_json_object_is_refused(server: Running, path: str, body: bytes) -> None:
    answer = server.raw().post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [[], [[]], [""], "", [10**6], [-1], [1.5], {}, None, [["a"]], 7, [True]])
def test_a_bad_prompt_is_refused(server: Running, prompt: Any) -> None:
    answer = server.raw().post("/v1/completions", json={"model": "tiny", "prompt": prompt})
    assert answer.status_code == 400
    assert "prompt" in answer.json()["error"]["message"]


def test_a_body_beyond_the_limit_is_refused_with_413(server: Running) -> None:
    with server.raw() as http:
        answer = http.post("/v1/chat/completions", content=b"x" * 10_000_000)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        chunked = http.post("/v1/chat/completions", content=(b"x" * 100_000 for _ in range(100)))
        assert chunked.status_code == 413


def test_clients_raise_their_own_errors_with_the_reason(server: Running) -> None:
    client = server.client()
    with pytest.raises(NotFoundError, match="'gpt-4'") as missing:
        client.chat.completions.create(model="gpt-4", messages=ASK)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(BadRequestError, match="'foo' is not supported") as unknown:
        client.chat.completions.create(model="tiny", messages=ASK, extra_body={"foo": 1})  # type: ignore[arg-type]
    assert unknown.value.param == "foo"
    with pytest.raises(BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 300)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/v1/chat/completions", 405), ("/page/../x", 404)])
def test_wrong_addresses_are_refused_in_the_same_form(server: Running, path: str, status: int) -> None:
    answer = server.raw().get(path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert ("/v1/chat/completions" in answer.json()["error"]["message"]) == (status == 404)


def test_nothing_else_is_disturbed(server: Running) -> None:
    """A stream goes on while every bad request is answered, and no job of theirs is left."""
    with server.raw() as http:
        stream = server.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=200, stream=True)  # type: ignore[call-overload]
        chunks = [next(stream)]
        for change, _ in FIELDS:
            headers = {"Content-Type": "application/json"}
            assert http.post("/v1/chat/completions", content=json.dumps(CHAT | change), headers=headers).is_error
        chunks += stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    again = server.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=200)  # type: ignore[arg-type]
    assert text == again.choices[0].message.content
    server.settle()
    assert server.service.loop.open == 0
