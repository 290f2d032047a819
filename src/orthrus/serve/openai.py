"""What clients may ask, in the shapes of OpenAI's API, and what each field becomes here.

A field is honoured or refused by name; one that this server does not know is refused too. Fields that cannot change
a text (`user`, `metadata`, …) are accepted. Null stands for "not given", as in OpenAI's own client.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from orthrus.decode.options import Options

UNSUPPORTED: Final = (
    "functions", "function_call", "audio", "prediction", "web_search_options", "reasoning_effort", "verbosity",
    "prompt_cache_retention",
)  # fmt: skip
"""Fields of OpenAI's API that this server does not have; null, which some clients send, asks for nothing."""

MAX_CHOICES: Final = 64
MAX_STOPS: Final = 16
MAX_PROMPTS: Final = 64
MAX_LOGPROBS: Final = 20

Probability = Annotated[float, Field(ge=0, le=1)]


def _utf8(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"must be text that UTF-8 can hold, found half a surrogate pair at {error.start}") from error
    return text


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_utf8)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=False)


class StreamOptions(_Body):
    """`stream_options`: a last chunk with the usage, or the usage so far in every chunk (vLLM's extension)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Extension(_Body):
    """`orthrus`: what only this server knows; `blocks` tells of each chunk its cycle, and which tokens were drafts."""

    mode: Literal["orthrus", "ar"] = "orthrus"
    blocks: bool = False


class Request(_Body):
    """The fields that chats and completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_listed)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    orthrus: Annotated[Extension, BeforeValidator(lambda value: {} if value is None else value)] = Extension()
    # Without an effect on the text.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_asked_for(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in UNSUPPORTED}

    @model_validator(mode="after")
    def _together(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams: add stream=true, or leave them out")
        return self

    @property
    def choices(self) -> int:
        """How many completions each prompt gets."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """The tokens to write at most, where the request says so."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are wanted beside each token's log probability; None for no log probabilities."""
        return None

    def options(self, *, eos_token_id: tuple[int, ...], max_new_tokens: int, processors: Sequence[Any] = ()) -> Options:
        """Return the generation options; without a sampling field the text is greedy."""
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = {name: value for name, value in asked.items() if value is not None}
        sampling = bool(given) and self.temperature != 0
        if not sampling:
            given = {}  # the likeliest token is within any top_k, top_p and min_p
        elif given.get("top_k", 0) < 0:
            given["top_k"] = 0
        made = Options.of(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(self.min_tokens or 0, max_new_tokens) or None,
            do_sample=sampling,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or None,
            frequency_penalty=self.frequency_penalty or None,
            sequence_bias={(int(token),): value for token, value in (self.logit_bias or {}).items()} or None,
            logits_processor=list(processors) or None,
            eos_token_id=() if self.ignore_eos else eos_token_id,
            stop_strings=self.stops,
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**63,
            **given,
        )
        return replace(made, keep_logits=self.top is not None)


class TextPart(_Body):
    """A part of a message that is text; others (images, sound) are refused."""

    type: Literal["text"]
    text: Text


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)] | None = None
    name: Text | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None


class JsonSchema(_Body):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """`response_format`: free text, any JSON object, or what a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type 'json_schema' go together: give both or neither")
        return self

    @property
    def schema_(self) -> dict[str, Any] | None:
        """The schema that the answer must fit; None for text."""
        if self.type == "text":
            return None
        return (self.json_schema.schema_ if self.json_schema else None) or {"type": "object"}


class Function(_Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    name: str


class NamedTool(_Body):
    """`tool_choice` that names one function."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs need logprobs=true: add it, or leave top_logprobs out")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice must name one of the tools, found {self.tool_choice.function.name!r}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice 'required' needs tools, found none")
        return self

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates take them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def forced(self) -> list[dict[str, Any]]:
        """The functions of which one must be called; empty where the model may as well write text."""
        choice = self.tool_choice
        functions = [tool["function"] for tool in self.offered]
        if isinstance(choice, NamedTool):
            return [function for function in functions if function["name"] == choice.function.name]
        return functions if choice == "required" else []

    @property
    def single(self) -> bool:
        """Whether one call is all that is wanted."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def chat(self) -> list[dict[str, Any]]:
        """Return the messages as `orthrus.generate` takes them; developers speak as the system."""
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        return [m | {"role": "system" if m["role"] == "developer" else m["role"]} for m in messages]


def _prompts(value: Any) -> Any:
    """Return a list of prompts for one that stands alone: a text, or a list of tokens."""
    alone = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if alone else value


class CompletionRequest(Request):
    """The body of `/v1/completions`."""

    prompt: Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _best(self) -> "CompletionRequest":
        if self.best_of not in (None, self.choices):
            raise ValueError("best_of is not supported: leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("log probabilities of the prompt are not supported: leave echo or logprobs out")
        return self

    @property
    def top(self) -> int | None:
        return self.logprobs
