"""Training state on disk: safetensors and JSON only, so that reading it runs no code.

    checkpoint-120/
      trainable.safetensors    the parameters that learn
      optimizer.safetensors    AdamW's moments, `<parameter index>.<name>`
      optimizer.json           its groups; the learning-rate schedule beside it
      rng-<rank>.json          Python, NumPy, torch (and CUDA) generators of each process
      trainer_state.json       step, epoch, best metric, log history, tokens and seconds so far

A folder without its final name is not a checkpoint: it is written under a name that starts with
a dot and renamed when complete.
"""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llm_emo.errors import RunError
from llm_emo.methods import load_trainable_state, trainable_state

STATE = "trainer_state.json"


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step in `folder`, if there is one."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save_model(folder: Path, model: nn.Module) -> None:
    """Write the parameters that learn."""
    save_file(trainable_state(model), folder / "trainable.safetensors")


def load_model(folder: Path, model: nn.Module) -> None:
    """Read the parameters that learn; every one must be there.

    Raises:
        RunError: the file is absent.
    """
    path = folder / "trainable.safetensors"
    if not path.exists():
        raise RunError(f"{path}: no such file; the checkpoint is incomplete, remove {folder}")
    load_trainable_state(model, load_file(path), path)


def save_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Write the optimiser's tensors, its groups and the schedule's position."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, folder / "optimizer.safetensors")
    rest = {"groups": state["param_groups"], "schedule": scheduler.state_dict()}
    (folder / "optimizer.json").write_text(json.dumps(rest, indent=1), "utf-8")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into one message."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{folder}: the checkpoint is damaged ({type(error).__name__}: {error}); remove it "
            "and continue from an older one, or begin anew"
        ) from error


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Read what `save_optimizer` wrote.

    Raises:
        RunError: the files are damaged.
    """
    with _whole(folder):
        rest = json.loads((folder / "optimizer.json").read_text("utf-8"))
        values: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / "optimizer.safetensors").items():
            index, _, name = key.partition(".")
            values.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": values, "param_groups": rest["groups"]})
        scheduler.load_state_dict(rest["schedule"])


def save_rng(folder: Path, rank: int) -> None:
    """Write this process's random number generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, following = random.getstate()
    state = {
        "python": [version, list(internal), following],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()],
    }
    (folder / f"rng-{rank}.json").write_text(json.dumps(state), "utf-8")


def load_rng(folder: Path, rank: int) -> None:
    """Restore this process's random number generators.

    Raises:
        RunError: the checkpoint was written by fewer processes, or is damaged.
    """
    path = folder / f"rng-{rank}.json"
    if not path.exists():
        raise RunError(
            f"{path}: no such file; resume with as many processes as the run was started with"
        )
    with _whole(folder):
        state = json.loads(path.read_text("utf-8"))
        version, internal, following = state["python"]
        random.setstate((version, tuple(internal), following))
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if torch.cuda.is_available() and state["cuda"]:
            torch.cuda.set_rng_state_all(
                [torch.tensor(values, dtype=torch.uint8) for values in state["cuda"]]
            )
