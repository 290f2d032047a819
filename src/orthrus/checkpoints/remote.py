"""Python files that lie beside a view, by which transformers alone opens it or decodes with it (`trust_remote_code`).

They import this package, which does the work (`orthrus.integrations.hub`).
"""

from typing import Final

from orthrus import __version__

MODELING: Final = {
    "modeling_orthrus.py": """\
# config.json's auto_map names this file: AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True) opens it.

from orthrus.integrations.hub import OrthrusLM

__all__ = ["OrthrusLM"]
"""
}
"""Beside the official layout."""

_GENERATE: Final = """\
# model.generate(…, custom_generate=REPOSITORY, trust_remote_code=True) opens this file.

from orthrus.integrations.hub import generate as decode

REPOSITORY = {repository!r}


def generate(*inputs, model, **arguments):
    \"\"\"Write what `model.generate` writes; a plain backbone gets the view of this repository at its first call.\"\"\"
    return decode(model, REPOSITORY, *inputs, **arguments)
"""


def custom_generate(repository: str) -> dict[str, str]:
    """Return what lies beside an adapter, by relative path; `repository` is a Hub id or an absolute path."""
    return {
        "custom_generate/generate.py": _GENERATE.format(repository=repository),
        "custom_generate/requirements.txt": f"orthrus-lm>={__version__}\n",
    }
