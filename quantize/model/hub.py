"""The Hugging Face hub: a repository's commit, its files in a folder here; what goes wrong, as errors of this program.

In: an id, org/name, and a revision. Out: a commit, or a folder of the hub client's own cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from quantize.errors import CheckpointError, MissingExtraError, first_line
from quantize.events import Reporter, note, status

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")


def fetch(repo: str, commit: str, patterns: Sequence[str], reporter: Reporter) -> Path:
    """The files of a repository at a commit that match one of the patterns, in a folder here.

    Raises CheckpointError: the hub has no such thing, or can't be reached. MissingExtraError.
    """
    with _hub_errors(f"source {repo}@{commit}", "or name a local folder"):
        from huggingface_hub import snapshot_download

        status(reporter, "", f"fetching {repo}@{commit}")
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(patterns)))


def hub_commit(kind: Literal["model", "dataset"], repo: str, asked: str, reporter: Reporter) -> str:
    """The commit that a revision of a hub repository is now; a commit is its own, without asking the hub.

    Raises CheckpointError: the hub has no such thing, or can't be reached. MissingExtraError.
    """
    if COMMIT.match(asked):
        return asked
    name = "source" if kind == "model" else "calibration dataset"
    with _hub_errors(f"{name} {repo}@{asked}", "or name a commit, which needs no question"):
        from huggingface_hub import HfApi

        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        commit = str(ask(repo, revision=asked, timeout=20).sha)
    note(reporter, "", f"{repo}@{asked} is commit {commit}; pin it with `revision: {commit}`")
    return commit


@contextmanager
def _hub_errors(what: str, otherwise: str) -> Iterator[None]:
    """Turn what the hub's client raises into this program's errors."""
    try:
        import huggingface_hub  # noqa: F401 - the package itself, before one of its modules
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as exc:
        raise MissingExtraError(f"{what}: fetching from the hub", "hub") from exc
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError) as exc:
        hint = f"check the id and the revision; a gated one needs `hf auth login`, {otherwise}"
        raise CheckpointError(f"{what}: the hub does not give it ({first_line(exc)})", hint=hint) from exc
    except Exception as exc:
        if not _is_network_error(exc):
            raise
        raise CheckpointError(f"{what}: the hub can't be reached", hint=f"check the network, {otherwise}") from exc


def _is_network_error(exc: BaseException) -> bool:
    """Whether any cause of an error is of the HTTP client or the system: the client's classes move between versions."""
    chain: BaseException | None = exc
    while chain is not None:
        if isinstance(chain, OSError) or type(chain).__module__.partition(".")[0].startswith(("http", "requests")):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
