"""Models on the Hugging Face Hub: fetched from there, and pushed to it through timm."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from timm.models import push_to_hf_hub
from torch import nn

from riformer.model.weights import CARD, CONFIG, WEIGHTS, hub_config, load

_NAME = r"[\w.-]+/[\w.-]+"


def from_pretrained(reference: str | Path) -> nn.Module:
    """The model in a folder, as `load` reads it, or on the Hub; in eval mode.

    From the Hub only configuration and safetensors are fetched, into its cache, and read as strictly as from a folder.

    Args:
        reference: what `load` takes, or OWNER/NAME of a model on the Hub, with @REVISION after it where it is not to be
            the newest. A folder of that name comes first; hf-hub:OWNER/NAME is the Hub in any case.

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
        folder = HfApi().snapshot_download(match[1], revision=match[2], allow_patterns=[CONFIG, WEIGHTS])
    except Exception as error:  # of the Hub, of the client's HTTP library, or of the system
        raise ValueError(
            f"reference is {text!r}, where no folder is, and the Hub gave no such model: {error}"
        ) from error
    return load(folder)


def push(folder: str | Path, repository: str, private: bool = False) -> None:
    """Pushes a model folder to the Hub, through timm, which makes the repository where there is none.

    The card comes after the model: timm by itself would write another one, and leave one that is there as it is.

    Args:
        folder: as `save_pretrained` wrote it.
        repository: OWNER/NAME on the Hub.
        private: makes the repository visible to its owner only, where it is new.

    Raises:
        ValueError: `repository` is not OWNER/NAME, or the folder holds no model.
        RuntimeError: the Hub cannot be reached, or refuses; the folder is as it was.
    """
    check_repository(repository)
    model, card = load(folder), Path(folder) / CARD
    try:
        push_to_hf_hub(model, repository, private=private, safe_serialization=True, **hub_config(model))
        if card.is_file():
            HfApi().upload_file(
                path_or_fileobj=card, path_in_repo=CARD, repo_id=repository, commit_message="Update model card"
            )
    except Exception as error:  # of the Hub, of the client's HTTP library, or of the system
        raise RuntimeError(
            f"{folder} is as it was, but was not pushed to {repository}: {error}\nIt takes a network, and a token that "
            f"may write there (`hf auth login`, or HF_TOKEN in the environment); then try again"
        ) from error


def check_repository(name: str) -> None:
    """Passes names that the Hub can have.

    Raises:
        ValueError: the name is not OWNER/NAME.
    """
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"repository is {name!r}; it must be OWNER/NAME, of letters, digits, '.', '-' and '_'")
