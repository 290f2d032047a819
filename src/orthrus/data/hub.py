"""Rows of Hugging Face datasets: by Hub id or local directory, configuration, revision and split."""

from collections.abc import Iterable, Mapping
from typing import Any

from orthrus.errors import DataError


def dataset_rows(
    name: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Iterable[Mapping[str, Any]]:
    """Open a dataset; `streaming` reads it as it comes, without a copy on disk.

    Without a `split` it is `test`, `validation` or the first one, whichever there is.

    Raises DataError: `datasets` is not installed, or there is no such dataset.
    """
    try:
        import datasets  # lazily: optional, and slow to import
    except ImportError as error:
        raise DataError(
            f"{name}: Hugging Face datasets need the package datasets: pip install 'orthrus-lm[train]'"
        ) from error
    try:
        if split is None:
            splits = datasets.get_dataset_split_names(name, config)
            split = next((one for one in ("test", "validation") if one in splits), splits[0])
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            name, config, split=split, revision=revision, streaming=streaming
        )
    except Exception as error:  # datasets raises its own, huggingface_hub's and httpx's
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(f"{name}: a dataset that can be read is required; {type(error).__name__}: {reason}") from error
    return rows
