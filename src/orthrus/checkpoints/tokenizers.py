"""A model's tokenizer, or what is wrong with its files."""

import json
from pathlib import Path
from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orthrus.errors import CheckpointError

QWEN2_PIECES: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""How Qwen2 and its successors cut text before merging: contractions, words with one leading space, single digits,
punctuation with its newlines, and white space. llama.cpp knows it as `qwen2`."""


def read_tokenizer(home: Path | str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a directory or a Hub id; raises CheckpointError where there is none, or a damaged file."""
    missing = f"{home} must hold the model's tokenizer, found none: copy its tokenizer files there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(home, revision=revision)
    except Exception as error:  # of a damaged file, tokenizers raises bare ones
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if (damaged := _damaged(Path(home))) is not None:
            raise CheckpointError(f"{damaged} is damaged ({reason}): fetch or write it again") from error
        raise CheckpointError(f"{missing} ({reason})") from error
    # Where files are missing, some families of transformers 5 give a tokenizer of special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise CheckpointError(missing)
    return tokenizer


def _damaged(home: Path) -> Path | None:
    """Return which file of a tokenizer that cannot be read is to blame; None where none is there."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        try:
            json.loads((home / name).read_bytes())
        except ValueError:
            return home / name
        except OSError:
            continue
    whole = home / "tokenizer.json"
    return whole if whole.exists() else None
