"""Result lines made by hand."""

from typing import Any

from orthrus.bench.lines import Result


def result(**given: Any) -> Result:
    """Return a result of ten tokens in one second, with the fields given in place of the usual ones."""
    usual: dict[str, Any] = {
        "provenance": "p",
        "configuration": "c",
        "suite": "s",
        "id": "0",
        "domain": "d",
        "mode": "ar",
        "plan": None,
        "exact": "distribution",
        "dtype": "float32",
        "batch": 1,
        "rows": 1,
        "group": given.get("id", "0"),
        "prompt_tokens": 5,
        "seconds": 1.0,
        "rounds_seconds": [1.0],
        "stats": stats(plain_steps=10),
        "token_hash": "h",
        "identical": True,
        "diverges_at": None,
        "right": None,
    }
    return Result(**{**usual, **given})


def stats(*, cycles: int = 0, accepted: int = 0, plain_steps: int = 0) -> dict[str, Any]:
    """Return a completion's statistics as they are counted: a bonus token with each cycle and plain step."""
    emitted, forwards = accepted + cycles + plain_steps, 1 + 2 * cycles + plain_steps
    return {
        "cycles": cycles,
        "accepted": accepted,
        "emitted": emitted,
        "forwards": forwards,
        "tokens_per_forward": emitted / forwards,
    }
