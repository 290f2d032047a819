"""A tool call read as it comes, in the forms that models write: Hermes' JSON and Qwen's tags.

    {"name": "paint", "arguments": {"colour": "red"}}       Hermes, Qwen2.5, Qwen3

    <function=paint>                                        Qwen3-Coder, Qwen3.5
    <parameter=colour>
    red
    </parameter>
    </function>

Readers get the text between `<tool_call>` and `</tool_call>` in pieces. They return the arguments as JSON text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from orthrus.serve.transcript import overlap

Functions = Mapping[str, Mapping[str, Any]]
"""The parameters' JSON schemas of each function, by their names."""

_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_TAIL: Final = re.compile(r"[}\s]*\Z")
_FUNCTION: Final = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER: Final = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_ENDS: Final = ("\n</parameter>", "</parameter>")
_KINDS: Final = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None), "integer": int}


class Reader(Protocol):
    """Reads one call: whether the function's name has been read, and whether the text turned out to be no call."""

    named: bool
    failed: bool

    def push(self, text: str, *, closed: bool) -> tuple[str | None, str]:
        """Return the name, if this piece completes it, and the next certain part of the arguments.

        `closed` says that the call ends here.
        """
        ...


def functions_of(tools: Sequence[Mapping[str, Any]]) -> Functions:
    """Return the parameters' schemas of tools as chat templates take them."""
    functions = [tool["function"] for tool in tools]
    return {f["name"]: (f.get("parameters") or {}).get("properties") or {} for f in functions}


def reader_for(text: str, functions: Functions, *, closed: bool) -> Reader | None:
    """Return the reader for a call's first characters; None for nothing but space, unless the call is closed."""
    began = text.lstrip()
    if not began and not closed:
        return None
    return Tagged(functions) if began.startswith("<") else Hermes()


class Hermes:
    """Read a JSON object: its name, then its arguments piece by piece, without the brace that closes the call."""

    def __init__(self) -> None:
        self.named = self.failed = False
        self._text = ""

    def push(self, text: str, *, closed: bool) -> tuple[str | None, str]:
        """Return the name, if this piece completes it, and the next certain part of the arguments."""
        self._text += text
        name = None
        if not self.named and (head := _HEAD.match(self._text)):
            name, self.named = json.loads(head[1]), True
            self._text = self._text[head.end() :]
        if not self.named:
            return self._whole() if closed else (None, "")
        if closed:
            rest = self._text.rstrip()
            return name, rest.removesuffix("}").rstrip() if rest.endswith("}") else rest
        tail = _TAIL.search(self._text)
        certain = self._text[: tail.start() if tail else None]
        self._text = self._text[len(certain) :]
        return name, certain

    def _whole(self) -> tuple[str | None, str]:
        """Read a complete call whose keys are in another order."""
        try:
            call = _read(self._text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError):
            name = None
        if not isinstance(name, str):
            self.failed = True
            return None, ""
        self.named = True
        return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class Tagged:
    """Read the tags of a function and its parameters; pass texts on piece by piece, other values when complete."""

    def __init__(self, functions: Functions) -> None:
        self.named = self.failed = False
        self._functions, self._schemas = functions, dict[str, Any]()
        self._text = ""
        self._parameter: str | None = None
        self._count = 0
        self._written = False  # whether the parameter's text has begun

    def push(self, text: str, *, closed: bool) -> tuple[str | None, str]:
        """Return the name, if this piece completes it, and the next certain part of the arguments."""
        self._text += text
        name, made = None, ""
        if not self.named:
            head = _FUNCTION.match(self._text)
            if head is None:
                self.failed = closed
                return None, ""
            name, self.named, made = head[1].strip(), True, "{"
            self._schemas = dict(self._functions.get(name, {}))
            self._text = self._text[head.end() :]
        while (more := self._next(closed=closed)) is not None:
            made += more
        return name, made + ("}" if closed else "")

    def _next(self, *, closed: bool) -> str | None:
        """Return the next part of the arguments' text; None where nothing more is certain."""
        if self._parameter is None:
            return self._opened()
        if (at := self._text.find(_ENDS[1])) >= 0:
            value, self._text = self._text[:at].removesuffix("\n"), self._text[at + len(_ENDS[1]) :]
        elif closed:
            value, self._text = self._text.removesuffix("\n"), ""
        else:
            return self._passed_on()
        schema = self._schemas.get(self._parameter)
        made = _json_of(value, schema) if not _is_text(schema) else f'{self._quote()}{_escaped(value)}"'
        self._parameter, self._written = None, False
        return made

    def _opened(self) -> str | None:
        """Take the next parameter's tag."""
        head = _PARAMETER.match(self._text)
        # The tag's line break may come with the next piece.
        if head is None or (head.end() == len(self._text) and not head[0].endswith("\n")):
            return None
        self._parameter, self._text = head[1].strip(), self._text[head.end() :]
        self._count += 1
        return f"{', ' if self._count > 1 else ''}{json.dumps(self._parameter, ensure_ascii=False)}: "

    def _passed_on(self) -> str | None:
        """Pass on the part of a text that cannot belong to its closing tag."""
        if not _is_text(self._schemas.get(str(self._parameter))):
            return None
        sure = len(self._text) - max(overlap(self._text, end) for end in _ENDS)
        value, self._text = self._text[:sure], self._text[sure:]
        return f"{self._quote()}{_escaped(value)}" if value else None

    def _quote(self) -> str:
        quote, self._written = "" if self._written else '"', True
        return quote


def _is_text(schema: Any) -> bool:
    """Return whether a parameter's values are texts: by its schema, or because it has none."""
    if not isinstance(schema, Mapping) or not schema:
        return True
    if "enum" in schema and "type" not in schema:
        return all(isinstance(value, str) for value in schema["enum"])
    return schema.get("type") in ("string", ["string"])


def _json_of(value: str, schema: Any) -> str:
    """Return a value as JSON: unchanged if it is JSON of a type that the schema allows, else as a string."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    allowed = [kinds] if isinstance(kinds, str) else kinds
    try:
        read = _read(value)
    except ValueError:
        return json.dumps(value, ensure_ascii=False)
    fits = not allowed or any(_is_a(read, kind) for kind in allowed)
    return value.strip() if fits else json.dumps(value, ensure_ascii=False)


def _read(text: str) -> Any:
    """Parse JSON; raises ValueError for NaN and infinities too, which Python's parser takes and JSON has not."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, int | float) if kind == "number" else isinstance(value, _KINDS.get(kind, object))


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
