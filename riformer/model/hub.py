"""Models on the Hugging Face Hub: fetched from there, and pushed to it as timm reads them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session
from torch import nn

from riformer.model.checkpoint import shorten
from riformer.model.weights import CARD, CONFIG, WEIGHTS, load

_NAME = r"[\w.-]+/[\w.-]+"
CONNECT_SECONDS = 5


@contextmanager
def cache_if_offline() -> Iterator[None]:
    """Where the Hub cannot be reached, its client reads from its cache alone. By itself it would retry for a minute."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_reachable() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception:  # of the client's HTTP library, which differs between its versions
        return False
    return True


def from_pretrained(reference: str | Path) -> nn.Module:
    """The model in a folder, as `load` reads it, or on the Hub; in eval mode.

    From the Hub only configuration and safetensors are fetched, into its cache, and read as strictly as from a folder.

    Args:
        reference: what `load` takes, or OWNER/NAME of a model on the Hub, followed by @REVISION for another revision
            than the newest. A folder of that name comes first; hf-hub:OWNER/NAME is always the Hub.

    Raises:
        ValueError: there is no such folder and no such model on the Hub, the Hub cannot be reached, or what is there
            cannot be read or does not fit the architecture that it names.
    """
    text = str(reference)
    if Path(reference).exists() and not text.startswith("hf-hub:"):
        return load(reference)
    match = re.fullmatch(rf"(?:hf-hub:)?({_NAME})(?:@(.+))?", text)
    if not match:
        raise ValueError(f"reference is {text!r}, where no folder is; it must be one, or hf-hub:OWNER/NAME on the Hub")
    try:
        with cache_if_offline():
            folder = HfApi().snapshot_download(match[1], revision=match[2], allow_patterns=[CONFIG, WEIGHTS])
    except Exception as error:  # of the Hub, of the client's HTTP library, or of the system
        raise ValueError(
            f"reference is {text!r}, where no folder is, and the Hub gave no such model: {shorten(str(error), 500)}\n"
            f"Without a network, only models that were fetched before can be read"
        ) from error
    return load(folder)


def push(folder: str | Path, repository: str, private: bool = False) -> None:
    """Pushes a model folder to the Hub, file by file as it is; the repository is created where there is none.

    Args:
        folder: as `save_pretrained` wrote it.
        repository: OWNER/NAME on the Hub.
        private: makes a new repository visible to its owner only.

    Raises:
        ValueError: `repository` is not OWNER/NAME, or the folder holds no model.
        RuntimeError: the Hub cannot be reached, or refuses; the folder is as it was.
    """
    check_repository(repository)
    load(folder)
    try:
        HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=[CONFIG, WEIGHTS, CARD], commit_message="Add model"
        )
    except Exception as error:  # of the Hub, of the client's HTTP library, or of the system
        raise RuntimeError(
            f"{folder} is as it was, but was not pushed to {repository}: {error}\nPushing takes a network and a token "
            f"with write access (`hf auth login`, or HF_TOKEN in the environment)"
        ) from error


def check_repository(name: str) -> None:
    """Refuses names that the Hub cannot have.

    Raises:
        ValueError: the name is not OWNER/NAME.
    """
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"repository is {name!r}; it must be OWNER/NAME, of letters, digits, '.', '-' and '_'")
