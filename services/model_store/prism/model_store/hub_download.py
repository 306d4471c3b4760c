"""`python -m prism.model_store.hub_download ID`: fetch a model of the Hugging Face hub and print its folder.

A program of its own, because a process can be ended when nobody wants its result any more. What goes wrong is
told in the last line of its standard error.
"""

import sys

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

LOOKUP_S = 10.0
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def fetch(hub_id: str) -> str:
    """The folder of the model `hub_id`: fetched, or the copy that this node has if the hub can't be reached.

    A hub that does not answer is given up after LOOKUP_S, where the library alone would go on trying.
    """
    try:
        huggingface_hub.HfApi().model_info(hub_id, timeout=LOOKUP_S)
    except (httpx.TransportError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, RepositoryNotFoundError | GatedRepoError):
            raise
        try:
            return huggingface_hub.snapshot_download(hub_id, allow_patterns=WANTED, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
    return huggingface_hub.snapshot_download(hub_id, allow_patterns=WANTED)


def reason(error: Exception) -> str:
    """What to tell of `error`, in one line."""
    if isinstance(error, GatedRepoError):
        return "its owner grants access to it by name; ask for it on the hub, and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no model of this name, or it is private (then set HF_TOKEN)"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and there is no copy of it on this node"
    if isinstance(error, httpx.TransportError):
        told = str(error) or type(error).__name__
        return f"the hub cannot be reached ({told}), and there is no copy of it on this node"
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    try:
        print(fetch(sys.argv[1]))
    except Exception as error:
        sys.exit(reason(error))
