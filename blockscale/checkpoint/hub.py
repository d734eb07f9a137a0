"""Hub repositories: how one is spelled, the commit a source stays with, the one commit a result becomes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from blockscale.errors import BlockscaleError

_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_SHORT = re.compile(rf"{_ID}(?:@(?P<revision>[\w./%+-]+?))?/?")
# As huggingface_hub reads it: the revision ends at the next slash, but for pull requests and conversions.
_URL = re.compile(
    rf"hf://(?!buckets/){_ID}(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.*?))?/?"
)


# Every repository has these from the start; they are no checkpoint.
GIVEN_FILES = (".gitattributes", "README.md")


@dataclass(frozen=True)
class HubPath:
    """A repository (or a folder in it) as the user wrote it; no revision means the main branch."""

    spec: str
    repo: str
    revision: str | None
    folder: str


def hub_path(text: str, revision: str | None = None) -> HubPath | None:
    """Parse `org/name`, `org/name@revision` or `hf://org/name[@revision][/folder]`; None if it is neither.

    Raises:
        BlockscaleError: `revision` contradicts the one in the text.
    """
    match = _URL.fullmatch(text) or (None if text.startswith((".", "/")) else _SHORT.fullmatch(text))
    if match is None:
        return None
    parts = match.groupdict()
    written = unquote(parts["revision"]) if parts["revision"] else None
    if revision and written and revision != written:
        raise BlockscaleError("two revisions", where=text, expected=written, got=revision)
    return HubPath(text, parts["repo"], revision or written, parts.get("folder") or "")


def pin_to_commit(path: HubPath) -> tuple[Any, str]:
    """Filesystem and root of a repository at the commit its revision is at now.

    Raises:
        BlockscaleError: no such repository or revision, no access, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, HfFileSystem

    try:
        commit = HfApi().model_info(path.repo, revision=path.revision).sha
    except Exception as error:
        raise _refusal(path, error) from error
    root = f"{path.repo}@{commit}"
    return HfFileSystem(), f"{root}/{path.folder}" if path.folder else root


@dataclass(frozen=True)
class HubTarget:
    """A branch of a repository to write to, and the commit it is at before the run."""

    path: HubPath
    head: str


def open_branch(path: HubPath) -> tuple[Any, str, HubTarget]:
    """Filesystem and root of a branch (or a folder in it) to write to.

    Raises:
        BlockscaleError: no such repository or branch, no access, or the Hub cannot be reached. A repository
            is not made here: whether it is to be public is for its owner to say.
    """
    from huggingface_hub import HfApi, HfFileSystem

    try:
        head = HfApi().model_info(path.repo, revision=path.revision).sha
    except Exception as error:
        raise _refusal(path, error, make=f"hf repo create {path.repo} --private") from error
    root = f"{path.repo}@{path.revision}" if path.revision else path.repo
    # The listing of a branch goes stale; a run reads it anew.
    fs = HfFileSystem(skip_instance_cache=True)
    return fs, f"{root}/{path.folder}" if path.folder else root, HubTarget(path, str(head))


def commit_folder(target: HubTarget, folder: Path, files: Iterable[str], stale: Iterable[str]) -> None:
    """Replace `stale` by `files` of a local folder, in one commit: readers see the old model or the new one.

    Files that the Hub has received already (of an upload that was cut off) are not sent again.

    Raises:
        BlockscaleError: the branch has moved since the run began, or the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    path, prefix = target.path, f"{target.path.folder}/" if target.path.folder else ""
    try:
        HfApi().create_commit(
            path.repo,
            operations=[
                *(CommitOperationDelete(prefix + name) for name in stale),
                *(CommitOperationAdd(prefix + name, folder / name) for name in files),
            ],
            commit_message="Upload a checkpoint converted with blockscale",
            revision=path.revision,
            parent_commit=target.head,
        )
    except Exception as error:
        raise _refusal(path, error) from error


def _refusal(path: HubPath, error: Exception, make: str | None = None) -> BlockscaleError:
    from huggingface_hub import errors as hub

    text = str(error).strip() or type(error).__name__
    absent = "" if path.spec.startswith("hf://") else "no such folder, and "
    what = f"{absent}the Hub cannot be reached: {text.splitlines()[0]}"
    remedy = "check the network"
    if isinstance(error, ValueError) and not isinstance(error, hub.HfHubHTTPError):
        what, remedy = f"the Hub does not take this: {' '.join(text.split())}", "mend it, then run again"
    elif isinstance(error, hub.GatedRepoError):
        what, remedy = "is a gated repository", "accept its terms on the Hub, then: hf auth login"
    elif isinstance(error, hub.RepositoryNotFoundError):
        what = f"{absent}no such Hub repository"
        remedy = "check the spelling; if it is private: hf auth login"
        remedy += f"; or make it: {make}" if make else ""
    elif isinstance(error, hub.RevisionNotFoundError):
        what, remedy = f"the repository has no revision {path.revision}", "check its branches and tags"
    elif isinstance(error, hub.OfflineModeIsEnabled):
        what, remedy = f"{absent}the Hub is switched off", "unset HF_HUB_OFFLINE"
    elif isinstance(error, hub.HfHubHTTPError) and error.response.status_code == 412:
        what, remedy = "the branch has moved since the run began", "look at it, then run again"
    elif isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403):
        what, remedy = "the Hub refuses access", "check the access token: hf auth login"
    return BlockscaleError(what, where=path.spec, remedy=remedy)
