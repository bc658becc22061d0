"""A pre-trained model of transformers under a classifier: loaded, kept in a run, and read back.

Text and sound differ in what stands in front of the model, a tokenizer or a feature extractor, and
in what is asked of it (`Kind`). A run keeps in `adapter/` config.json and the files of what stands
in front, as transformers writes them, and the weights of model and head together. Nothing is asked
again of the place that the model once came from.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from llm_emo.baselines.storage import CLASSIFIER, load_weights, save_weights
from llm_emo.errors import ModelError
from llm_emo.machine import writing
from llm_emo.models import loading

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Kind:
    """What a method takes from transformers."""

    what: str
    """For messages, with its article."""
    names: str
    """For messages: what it can be named by, besides a Hugging Face id."""
    front: Any
    """AutoTokenizer or AutoFeatureExtractor."""
    spare: str
    """The part that a checkpoint may lack, because it is not used."""
    settle: Callable[[str, PreTrainedConfig], None]
    """Given the model's name and config, refuses or changes the config before weights are read."""


def load(
    kind: Kind, name: str, revision: str | None, *, source: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Return a pre-trained model in float32, in eval mode, and what stands in front of it.

    Args:
        kind: text or sound.
        name: a local folder, or with `revision` a Hugging Face id.
        revision: commit or tag of a Hugging Face id.
        source: the folder that `name` stands for, where it is no folder's.

    Raises:
        ModelError: absent, unreadable, incomplete, or refused by `kind.settle`.
        JobFailed: the hub cannot be reached.
    """
    source = source or name
    if revision is None and not (Path(source) / "config.json").is_file():
        raise ModelError(
            f"{name!r} is no folder with a config.json; name {kind.names}, or a Hugging Face id "
            "with its revision"
        )
    where: dict[str, Any] = {"trust_remote_code": False}
    where |= {"local_files_only": True} if revision is None else {"revision": revision}
    if not sys.stderr.isatty():  # in a log file a bar is noise
        logging.disable_progress_bar()
    offline = None if revision is None else "download the encoder elsewhere and name its folder"
    with loading.explained(name, kind=kind.what, offline=offline):
        front = kind.front.from_pretrained(source, **where)
        config = AutoConfig.from_pretrained(source, **where)
        kind.settle(name, config)
        # A pickled checkpoint is code.
        model, info = AutoModel.from_pretrained(
            source, config=config, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, **where,
        )  # fmt: skip
    missing = [key for key in info["missing_keys"] if kind.spare not in key.split(".")]
    if missing:  # transformers fills them with random numbers and goes on
        raise ModelError(
            f"{name}: its checkpoint lacks {len(missing)} of the encoder's tensors, such as "
            f"{min(missing)}; is it complete, and {kind.what}?"
        )
    return model, front


def save(folder: Path, network: Any, front: Any) -> None:
    """Write what `read` needs into an existing folder; nothing is pickled.

    Args:
        folder: of the run.
        network: model and head, the model as its `encoder`.
        front: its tokenizer or feature extractor.

    Raises:
        JobFailed: the disk is full or cannot be written.
    """
    with writing(folder, "make room, or name another folder"):
        network.encoder.config.save_pretrained(folder)
        front.save_pretrained(folder)
    save_weights(folder / CLASSIFIER, network)


def read(
    kind: Kind, folder: Path, network: Callable[[PreTrainedModel], Network]
) -> tuple[Network, Any]:
    """Return what `save` wrote, in eval mode, and what stands in front of it.

    Args:
        kind: text or sound.
        folder: of the run.
        network: puts the head on a model.

    Raises:
        ModelError: a file is absent, damaged, or belongs to other settings.
    """
    where = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **where)
        front = kind.front.from_pretrained(folder, **where)
        # Numbers are drawn for weights that are then read: nobody's randomness depends on them.
        with torch.random.fork_rng(devices=[]):
            base = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
            made = network(base)
    except loading.REFUSED as error:
        reason = loading.reason(error)
        raise ModelError(f"{folder}: its encoder cannot be read: {reason}") from error
    load_weights(folder / CLASSIFIER, made)
    return made.eval(), front
