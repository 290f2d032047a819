"""Upload a directory to the Hugging Face Hub. Network, token and repository are checked before anything is written."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from orthrus.errors import CheckpointError, OrthrusError


def check_repository(repo_id: str, *, patterns: Sequence[str], force: bool) -> None:
    """Make sure that there is a network, a token, and a place on the Hub that a model can be uploaded to.

    `patterns` are files that make a repository a model; with `force` another model there may be replaced.

    Raises:
        CheckpointError: the repository holds a model already.
        OrthrusError: network or token are missing, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _asking(repo_id, otherwise="nothing was written"):
        api.whoami()
        held = _matching(api.list_repo_files(repo_id), patterns) if api.repo_exists(repo_id) else []
    if held and not force:
        raise CheckpointError(
            f"--push {repo_id}: the repository holds a model already ({', '.join(held)}): name another, or "
            "replace it with --force; nothing was written"
        )


def upload(folder: Path, repo_id: str, *, files: Iterable[str], patterns: Sequence[str], private: bool) -> str:
    """Upload these files of a folder, making the repository if need be; returns its address.

    Files of it that match `patterns` and are not among them are removed; everything else stays.

    Raises OrthrusError: the Hub refuses, or cannot be reached any more.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _asking(repo_id, otherwise=f"{folder} is complete: `hf upload {repo_id} {folder}` tries again"):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=sorted(files),
            delete_patterns=_matching(api.list_repo_files(repo_id), patterns),
            commit_message="Upload with orthrus convert",
        )
    return str(address)


def _matching(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the files that match, sorted; `*` stands for no slash."""
    return sorted(f for f in files if any(fnmatch(f, p) and f.count("/") == p.count("/") for p in patterns))


@contextmanager
def _asking(repo_id: str, *, otherwise: str) -> Iterator[None]:
    """Say what the Hub's errors mean, and how things stand then."""
    from huggingface_hub import errors

    # The first is httpx's or httpx2's, whichever the Hub's client has: no network at all is one of those.
    refusals = (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError)  # type: ignore[attr-defined]
    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise OrthrusError(
            f"--push {repo_id}: a token of the Hugging Face Hub is required, found none: `hf auth login`, or set "
            f"HF_TOKEN; {otherwise}"
        ) from None
    except refusals as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise OrthrusError(
            f"--push {repo_id}: the Hub must be reachable and let you write there, found {type(error).__name__}: "
            f"{reason}; {otherwise}"
        ) from error
