"""Refusals in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` and an HTTP status."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from orthrus.errors import CacheFull, ConfigError, OrthrusError, PromptError, UnsupportedModel
from orthrus.serve.jobs import Draining, Overloaded, TimedOut


class Refused(OrthrusError):
    """A request that is answered with an error: its HTTP `status`, the field at fault, a name that programs compare."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """Describe what is required, what was found and what to do."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}

_KINDS: tuple[tuple[type[Exception], int, str | None], ...] = (
    (Overloaded, 429, "queue_full"),
    (Draining, 503, "shutting_down"),
    (TimedOut, 504, "timeout"),
    (CacheFull, 400, "context_length_exceeded"),
    (PromptError, 400, None),
    (ConfigError, 400, None),
    (UnsupportedModel, 400, None),
)


def refusal(error: Exception) -> Refused:
    """Return what a client is told of any error; of one that nobody foresaw, only its kind."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(error.errors())
    if isinstance(error, HTTPException):
        return Refused(str(error.detail), status=error.status_code)
    for kind, status, code in _KINDS:
        if isinstance(error, kind):
            return Refused(str(error), status=status, code=code)
    return Refused(
        f"the server failed on this request ({type(error).__name__}): its log says more", status=500, code="internal"
    )


def invalid(errors: Sequence[Any]) -> Refused:
    """Return what a client is told of a body that its model refused: the first fault, with the field's name."""
    first = errors[0]
    # Pydantic names the branches of a union among the fields; clients know none of them.
    branches = ("function-", "constrained-", "list[")
    path = [part for part in map(str, first["loc"]) if part not in ("body", "str") and not part.startswith(branches)]
    param = ".".join(path) or None
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return Refused(f"the body must be JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json")
    if kind == "extra_forbidden":
        return Refused(f"the field {param!r} is not supported here: leave it out", param=param, code="unknown_field")
    if kind == "missing" and param is None:
        return Refused("the body must be a JSON object, found none", code="invalid_json")
    if kind == "missing":
        return Refused(f"the field {param!r} is required: add it", param=param, code="missing_field")
    shown = repr(first.get("input"))
    shown_as = f" (found {shown if len(shown) <= 80 else shown[:77] + '…'})" if kind != "value_error" else ""
    return Refused(f"{param or 'the body'}: {message}{shown_as}", param=param, code="invalid_value")
