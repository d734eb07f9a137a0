"""Hub repositories: how one is spelled, and the commit that a run stays with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from blockscale.errors import BlockscaleError

_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_SHORT = re.compile(rf"{_ID}(?:@(?P<revision>[\w./%+-]+?))?/?")
# As huggingface_hub reads it: the revision ends at the next slash, but for pull requests and conversions.
_URL = re.compile(
    rf"hf://(?!buckets/){_ID}(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.*?))?/?"
)


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


def _refusal(path: HubPath, error: Exception) -> BlockscaleError:
    from huggingface_hub import errors as hub

    text = str(error).strip() or type(error).__name__
    what = f"no such folder, and the Hub cannot be reached: {text.splitlines()[0]}"
    remedy = "check the network"
    if isinstance(error, hub.GatedRepoError):
        what, remedy = "is a gated repository", "accept its terms on the Hub, then: hf auth login"
    elif isinstance(error, hub.RepositoryNotFoundError):
        what = "no such folder, and no such Hub repository"
        remedy = "check the spelling; if it is private: hf auth login"
    elif isinstance(error, hub.RevisionNotFoundError):
        what, remedy = f"the repository has no revision {path.revision}", "check its branches and tags"
    elif isinstance(error, hub.OfflineModeIsEnabled):
        what, remedy = "no such folder, and the Hub is switched off", "unset HF_HUB_OFFLINE"
    elif isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403):
        what, remedy = "the Hub refuses access", "check the access token: hf auth login"
    return BlockscaleError(what, where=path.spec, remedy=remedy)
