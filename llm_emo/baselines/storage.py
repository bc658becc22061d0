"""Weights of a baseline on disk: one safetensors file, whole or absent, read strictly."""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llm_emo.errors import ModelError
from llm_emo.machine import writing

CLASSIFIER = "classifier.safetensors"
"""The file of a network that stands on an encoder."""


def save_weights(path: Path, model: nn.Module) -> None:
    """Write all parameters and buffers, running statistics among them.

    Raises:
        JobFailed: the disk is full or cannot be written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, "make room, or name another folder"):
        try:
            save_file(state, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what `save_weights` wrote; every tensor must be there, and no other.

    Raises:
        ModelError: the file is absent or damaged, or belongs to a network of other settings.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; the model was not saved completely") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise ModelError(
            f"{path}: does not fit the network: {'; '.join(sorted(problems)[:5])}; was it saved "
            "under other settings?"
        )
    model.load_state_dict(state)
