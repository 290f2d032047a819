"""Between text and tokens: prompts of every form become token ids, tokens become text as they arrive.

Needs a tokenizer and nothing else: no model, no engine; importing it loads no torch.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from jinja2 import TemplateError

from orthrus.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
Chat: TypeAlias = Sequence[Message]
Prompt: TypeAlias = str | Chat | Sequence[int]
Tool: TypeAlias = Mapping[str, Any] | Callable[..., Any]

_FORMS: Final = 'a text, a chat (a list of {"role": …, "content": …}) or token ids (a list of ints, a tensor)'
_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT: Final = "\ufffd"
_PROBE: Final = "orthrus0probe"

_REASONING: Final = ("reasoning", "reasoning_content", "thinking")
"""Names that transformers gives to one and the same field, so a template may read any of them."""

_IDENTIFIERS: Final = ("tool_call_id", "id")
"""Keys that say which message belongs to which, and carry no text of their own."""

_SETTLED_HERE: Final = (
    "conversation", "tools", "tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
_TEMPLATE_ARGUMENTS: Final = (
    "chat_template", "documents", "add_generation_prompt", "continue_final_message", "sanitize_control_tokens",
)  # fmt: skip
"""Arguments of `apply_chat_template` that are its own and not variables of the template."""


# ---------------------------------------------------------------- prompts


def as_list(prompts: Any) -> list[Prompt]:
    """Return one prompt or many as a list of prompts, with token ids as lists of ints.

    Args:
        prompts: a text, a chat, token ids (a list of ints or a tensor `[T]`), or a list of these in any mixture; a
            tensor `[B, T]` is B prompts of token ids.

    Raises:
        PromptError: anything else.
    """
    prompts = _listed(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping | bytes | set | frozenset) or not isinstance(prompts, Iterable):
        raise PromptError(f"a prompt is {_FORMS}, found {_kind(prompts)}")
    items = [_listed(item) for item in prompts]
    one = bool(items) and (all(isinstance(i, Mapping) for i in items) or all(map(_is_id, items)))
    return [items] if one else items


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "Prompt | Tensor",
    *,
    tools: Sequence[Tool] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Turn one prompt into token ids.

    Args:
        tokenizer: the model's tokenizer.
        prompt: a text (encoded with the tokenizer's special tokens), a chat (rendered by its chat template) or token
            ids (taken as they are).
        tools: JSON schemas or documented functions that the chat's template presents to the model.
        chat_template_kwargs: more variables for the template, such as `{"enable_thinking": False}`.

    Raises:
        PromptError: an empty prompt, a form that is not a prompt, text that is not Unicode, a malformed chat, or one
            that holds what the template does not read.
        ConfigError: template variables that the template does not read.
    """
    prompt = _listed(prompt)
    if not isinstance(prompt, str) and isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return _encode_chat(tokenizer, prompt, tools, dict(chat_template_kwargs or {}))  # type: ignore[arg-type]
    if isinstance(prompt, list | tuple) and not prompt:
        raise PromptError("the chat must hold at least one message, found none")
    if tools or chat_template_kwargs:
        name = "tools" if tools else "chat_template_kwargs"
        raise PromptError(f"{name} need a chat, found {_kind(prompt)}: give a list of messages")
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt must not be empty, found an empty text: give it at least one character")
        _check_unicode(prompt)
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    if isinstance(prompt, list | tuple) and all(map(_is_id, prompt)):
        return list(prompt)
    raise PromptError(f"a prompt is {_FORMS}, found {_kind(prompt)}")


def _listed(value: Any) -> Any:
    """Return a tensor or array of integers as nested lists; anything else as it is."""
    if not (hasattr(value, "tolist") and hasattr(value, "dtype")):
        return value
    name = f"a {type(value).__name__} of {str(value.dtype).removeprefix('torch.')} and shape {list(value.shape)}"
    if not re.search(r"int\d+$", str(value.dtype)) or len(value.shape) not in (1, 2):
        raise PromptError(f"token ids are integers of shape [T] or [B, T], found {name}")
    return value.tolist()


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = "message" if "role" in value else f"{type(value).__name__} with the keys {', '.join(map(str, value))}"
        return f"a single {kind}: put its messages or token ids into a list"
    if isinstance(value, list | tuple):
        return f"a list of {' and '.join(sorted({type(item).__name__ for item in value}))}"
    return f"{value!r}" if value is None or isinstance(value, int | float) else type(value).__name__


def _check_unicode(value: Any) -> None:
    """Refuse text with lone surrogates, wherever it stands in a prompt."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt must be Unicode text, found a lone surrogate ({value[error.start]!a}) at character "
                f"{error.start}: decode its source with errors='replace'"
            ) from None
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_unicode(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_unicode(item)


# ---------------------------------------------------------------- chats


def _encode_chat(
    tokenizer: "PreTrainedTokenizerBase", chat: Chat, tools: Sequence[Tool] | None, settings: dict[str, Any]
) -> list[int]:
    messages = [checked_message(message) for message in chat]
    if not any(m.get("content") or m.get("tool_calls") for m in messages):
        raise PromptError("the chat must say something, found only empty messages")
    _check_unicode(messages)
    for name in settings:
        if name in _SETTLED_HERE:
            raise ConfigError(f"chat_template_kwargs must be variables of the chat template, found {name!r}")
    if tokenizer.chat_template is None and "chat_template" not in settings:
        raise PromptError("a chat needs a tokenizer with a chat template, this one has none: give the prompt as text")
    settings = {"add_generation_prompt": not settings.get("continue_final_message"), **settings}
    check_template(tokenizer, messages, tools, settings)
    ids: list[int] = _apply(tokenizer, messages, tools, settings, tokenize=True)
    return ids


def checked_message(message: Any) -> dict[str, Any]:
    """Return a message as chat templates take it.

    Content given as a list of text parts becomes one text, its parts joined by line breaks; arguments of tool calls
    given as JSON text, as OpenAI's clients send them, become objects; keys without a value are dropped.

    Raises:
        PromptError: no role, no content (only tool calls may go without), or content that is not text.
    """
    if not isinstance(message, Mapping):
        raise PromptError(f'chat messages are {{"role": …, "content": …}}, found {message!r}')
    out = {key: value for key, value in message.items() if value is not None and value != [] and value != {}}
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "\n".join(map(_part, content))
    if not isinstance(out.get("role"), str) or not (isinstance(content, str) or (content is None and _calls(out))):
        raise PromptError(f'chat messages are {{"role": …, "content": …}}, found {message!r}')
    if content is not None:
        out["content"] = content
    if "tool_calls" in out:
        out["tool_calls"] = [_with_arguments(call) for call in _calls(out)]
    return out


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise PromptError(f'parts of a message are {{"type": "text", "text": …}}, found {kind!r}: only text is read')


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise PromptError(f"tool_calls must be a list of objects, found {calls!r}")
    return list(calls)


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, wherever they stand."""
    out = dict(call)
    if isinstance(out.get("function"), Mapping):
        out["function"] = _with_arguments(out["function"])
    if isinstance(out.get("arguments"), str):
        try:
            out["arguments"] = json.loads(out["arguments"] or "{}")
        except ValueError:
            raise PromptError(f"arguments of a tool call must be JSON, found {out['arguments']!r}") from None
    return out


def check_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    settings: Mapping[str, Any],
) -> None:
    """Refuse what a chat template would drop without a word: tools, keys of messages, a role's messages, variables.

    Raises:
        PromptError: the chat holds such a thing.
        ConfigError: the settings do.
    """
    try:
        template = tokenizer.get_chat_template(settings.get("chat_template"), tools)
    except (ValueError, AttributeError):  # a tokenizer that renders chats by itself
        return

    def reads(*names: str) -> bool:
        return any(re.search(rf"\b{re.escape(name)}\b", template) for name in names)

    if tools and not reads("tools"):
        raise PromptError("tools were given, but this tokenizer's chat template presents none: leave them out")
    for name in settings:
        if name not in _TEMPLATE_ARGUMENTS and not reads(name):
            raise ConfigError(f"this tokenizer's chat template does not read {name!r}: leave it out")
    for message in messages:
        for key in message.keys() - {"role", "content", *_IDENTIFIERS}:
            aside = key == "name" and message["role"] == "tool"
            if not aside and not reads(*(_REASONING if key in _REASONING else (key,))):
                raise PromptError(
                    f"this tokenizer's chat template does not read {key!r} of a message: leave it out, or put it into "
                    "the content"
                )
    for role in sorted({m["role"] for m in messages} - {"system", "user", "assistant"}):
        marked = [{**m, "content": _PROBE} if m["role"] == role else m for m in messages]
        if _PROBE not in _apply(tokenizer, marked, tools, settings, tokenize=False):
            raise PromptError(f"this tokenizer's chat template drops messages of role {role!r}: say it in another role")


def _apply(
    tokenizer: "PreTrainedTokenizerBase", messages: Any, tools: Any, settings: Mapping[str, Any], *, tokenize: bool
) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=tokenize, return_dict=False, **settings)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise PromptError(f"the chat template refuses this chat: {str(error) or type(error).__name__}") from error


# ---------------------------------------------------------------- text as it comes


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text of tokens; bytes that are not UTF-8 become U+FFFD."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    return text


class TextStream:
    """Turn tokens into text as they come; the pieces join to what `decode` gives for all tokens.

    Text that a later token may still change is held back: the beginning of a character split over tokens, and
    characters spelled in byte tokens (`<0xE2>`) until another token ends the run, since one wrong byte spoils all of
    them. `pending` is what is held back, `finish` returns it when no token will follow.

    Only a window of the last tokens is decoded again: some that are settled, for spaces depend on what stands before,
    and those after them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._context = 0
        """How many tokens of the window are there for context only."""
        self._text = ""
        """The window's text, of which so many characters are given away."""
        self._given = 0

    @property
    def pending(self) -> str:
        """Text of the tokens so far that later ones may change."""
        return self._text[self._given :]

    def push(self, token: int) -> str:
        """Return the text that this token settles."""
        self._window.append(token)
        text = decode(self._tokenizer, self._window, skip_special_tokens=self._skip)
        if text == self._text:  # a token that is left out, or one more byte of a character
            return ""
        self._text = text
        name = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(name, str) and _BYTE.fullmatch(name):
            return ""
        settled = len(text) - text.endswith(_REPLACEMENT)  # further bytes can change one such character at most
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if settled == len(text):
            self._forget()
        return piece

    def finish(self) -> str:
        """Return what was held back; no token follows."""
        rest, self._given = self.pending, len(self._text)
        return rest

    def _forget(self) -> None:
        """Drop the context, and let the tokens after it be the new one."""
        fresh = self._window[self._context :]
        text = decode(self._tokenizer, fresh, skip_special_tokens=self._skip)
        if text:  # context without text would not tell the next token that it stands within a text
            self._window, self._context, self._text, self._given = fresh, len(fresh), text, len(text)
