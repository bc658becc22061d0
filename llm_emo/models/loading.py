"""What transformers raises at files and names that it cannot use, as one message for the user."""

import contextlib
from collections.abc import Iterator

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from llm_emo.errors import JobFailed, ModelError

REFUSED = (
    OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""The last is raised at a config.json with a value of a wrong type."""

_UNREACHED = ("connect", "offline", "resolve", "network", "timed")
"""Words of which one stands in whatever is said of a hub that does not answer."""


def reason(error: Exception) -> str:
    """Return what an error says, on one line of bearable length."""
    return " ".join(str(error).split())[:400]


@contextlib.contextmanager
def explained(
    name: str, *, kind: str = "", offline: str | None, native: str = ""
) -> Iterator[None]:
    """Turn what transformers raises on loading `name` into one message.

    Args:
        name: as the recipe names it.
        kind: what it was loaded as, with its article; for the message.
        offline: what to do where the hub cannot be reached; None for what needs no hub.
        native: what else to do about a checkpoint that brings its own code.

    Raises:
        ModelError: absent, unreadable, of an unknown architecture, or in need of remote code.
        JobFailed: the hub cannot be reached.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the files
        raise
    except REFUSED as error:
        text = reason(error)
        if "trust_remote_code" in text or "custom code" in text:
            raise ModelError(
                f"{name}: its checkpoint asks to run code that it ships, which is never done "
                f"here; take a model whose architecture transformers has itself{native}"
            ) from error
        if offline is not None and any(word in text.lower() for word in _UNREACHED):
            raise JobFailed(f"{name}: the Hugging Face hub cannot be reached; {offline}") from error
        as_kind = f" as {kind}" if kind else ""
        raise ModelError(f"{name}: cannot be loaded{as_kind}: {text}") from error
