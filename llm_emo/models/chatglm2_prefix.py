"""ChatGLM2's P-Tuning v2 prefix: the original tuning script's checkpoint and the native folder.

The script saves the tensors that learned, `transformer.prefix_encoder.*`, in `pytorch_model.bin`,
beside a config.json that says `pre_seq_len` and `prefix_projection`. Its keys are not rotated,
and neither are they in `models/prefix.py`; stock PEFT wants them turned on by the prefix's
length, which is what `methods.save_adapter` writes.

Letters: P prefix length, M layers, G key-value heads, D head dimension; width 2*M*G*D.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GlmConfig

from llm_emo import methods, recipes
from llm_emo.errors import AdapterError
from llm_emo.fetch import sha256_of
from llm_emo.machine import say
from llm_emo.models import adapters
from llm_emo.models.chatglm2 import PREFIX_ENCODER, Layout
from llm_emo.models.prefix import PTuningV2Model
from llm_emo.models.source import read_json

_NAMES = {
    "embedding.weight": "encoder.embedding.weight",
    "trans.0.weight": "encoder.transform.0.weight",
    "trans.0.bias": "encoder.transform.0.bias",
    "trans.2.weight": "encoder.transform.2.weight",
    "trans.2.bias": "encoder.transform.2.bias",
}
"""The original's encoder and ours; the first alone where there is no projection."""

# What the tuning script adds to the config.json of the base; no part of its architecture.
_TUNING_KEYS = ("pre_seq_len", "prefix_projection", "quantization_bit", "quantization_embeddings")


@dataclass(frozen=True)
class TuningConfig:
    """The script's config.json: its own keys, and `plain`, the base model's."""

    path: Path
    length: int | None
    projection: bool | None
    plain: Mapping[str, Any]


# --- the original's side ----------------------------------------------------------------------


def read_config(source: Path) -> TuningConfig | None:
    """Read the config.json that the tuning script wrote beside its weights, if it is there.

    Raises:
        ModelError: it is no JSON object.
    """
    path = source / "config.json"
    if not path.is_file():
        return None
    content = read_json(path)
    plain = {key: value for key, value in content.items() if key not in _TUNING_KEYS}
    projection = content.get("prefix_projection")
    return TuningConfig(
        path, content.get("pre_seq_len"), None if projection is None else bool(projection), plain
    )


def hold_shapes(source: Path, own: Layout, base: Layout) -> None:
    """Refuse a base of another shape than the one that the prefix was trained on.

    Raises:
        AdapterError: the shapes differ.
    """
    for name in ("layers", "hidden", "groups", "head_dim"):
        if getattr(own, name) != getattr(base, name):
            raise AdapterError(
                f"{source / 'config.json'}: the prefix was trained on a base whose {name} is "
                f"{getattr(own, name)}; this base has {getattr(base, name)}"
            )


def read(
    weights: Path, config: TuningConfig | None, layout: Layout, hint: str
) -> dict[str, Tensor]:
    """Return the original's encoder under its own names, in fp32.

    Raises:
        AdapterError: a tensor is missing, unexpected, misshapen or not finite, or contradicts
            config.json.
    """
    if not weights.is_file():
        raise AdapterError(f"{weights}: no such file, but the index beside it names it")
    content = adapters.read_weights(weights)
    state = {
        name.removeprefix(PREFIX_ENCODER): tensor.float().clone()
        for name, tensor in content.items()
        if name.startswith(PREFIX_ENCODER)
    }
    if len(content) > len(state):
        say(
            f"{weights}: {len(content) - len(state)} other tensors are left out; the base model "
            "is converted from its own checkpoint"
        )
    if set(state) not in ({"embedding.weight"}, set(_NAMES)):
        raise AdapterError(
            f"{weights}: the prefix encoder holds {', '.join(sorted(state))}; expected "
            f"embedding.weight, with a projection also {', '.join(list(_NAMES)[1:])}"
        )
    length, width, hidden = len(state["embedding.weight"]), _width(layout), layout.hidden
    shapes = {
        "embedding.weight": (length, width),
        "trans.0.weight": (hidden, width),
        "trans.0.bias": (hidden,),
        "trans.2.weight": (width, hidden),
        "trans.2.bias": (width,),
    }
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise AdapterError(
                f"{weights}: {name} has shape {tuple(tensor.shape)}, expected {shapes[name]} for "
                f"{layout.layers} layers of {layout.groups} key-value heads of "
                f"{layout.head_dim}{hint}"
            )
        if not tensor.isfinite().all():
            raise AdapterError(f"{weights}: {name} holds numbers that are not finite")
    if config is None:
        return state
    if config.length not in (None, length):
        raise AdapterError(
            f"{config.path}: pre_seq_len is {config.length}, but {weights.name} holds {length} "
            "positions"
        )
    if config.projection not in (None, len(state) > 1):
        raise AdapterError(
            f"{config.path}: prefix_projection is {str(config.projection).lower()}, but "
            f"{weights.name} holds {'one' if len(state) > 1 else 'none'}"
        )
    return state


def write_original(
    folder: Path, source: Path, model: PTuningV2Model, layout: Layout
) -> dict[str, Any]:
    """Write a native prefix as the tuning script does; return what is worth saying."""
    own = methods.trainable_state(model)
    first = own.get("encoder.transform.0.weight")
    # The original knows one form of projection; what another one computes is a prefix as any.
    projected = first is not None and first.shape == (layout.hidden, _width(layout))
    if projected:
        state = {name: own[mine] for name, mine in _NAMES.items()}
    else:
        state = {"embedding.weight": model.prefix().detach().flatten(1)}
    tensors = {f"{PREFIX_ENCODER}{name}": tensor.float().clone() for name, tensor in state.items()}
    adapters.write_pickle(tensors, folder / "pytorch_model.bin")
    length = model.peft_config.num_virtual_tokens
    tuning = {"pre_seq_len": length, "prefix_projection": projected}
    adapters.write_json(folder / "config.json", layout.original_config() | tuning)
    names = (*methods.WEIGHTS_FILES, methods.PREFIX_FILE)
    read = {name: sha256_of(source / name) for name in names if (source / name).is_file()}
    return {
        "kind": "p_tuning_v2",
        "prefix_length": length,
        "projection": projected,
        "read": read,
    }


# --- the native side --------------------------------------------------------------------------


def read_native(source: Path, layout: Layout, hint: str) -> PTuningV2Model:
    """Read a native prefix folder onto a model that has the base's heads and rotation.

    Raises:
        AdapterError: it is of another shape than the base, or damaged.
    """
    shape = adapters.read_prefix_shape(source)
    found = (shape.layers, shape.groups, shape.token_dim)
    expected = (layout.layers, layout.groups, layout.groups * layout.head_dim)
    if found != expected:
        raise AdapterError(
            f"{source}: a prefix for {found[0]} layers of {found[1]} key-value heads, together "
            f"{found[2]} wide; the base has {expected[0]}, {expected[1]} and {expected[2]}{hint}"
        )
    method = adapters.method_of(source)
    assert isinstance(method, recipes.PTuningV2)
    model = _skeleton(layout, method)
    methods.load_adapter(model, source)
    return model


def write_native(
    folder: Path, weights: Path, state: Mapping[str, Tensor], layout: Layout, base: Path | None
) -> dict[str, Any]:
    """Write the original's encoder as `methods.save_adapter` does; return what is worth saying."""
    length, projected = len(state["embedding.weight"]), len(state) > 1
    method = recipes.PTuningV2(
        kind="p_tuning_v2",
        prefix_length=length,
        projection=projected,
        projection_size=layout.hidden if projected else None,
        projection_input="all" if projected else "layer",
        dropout=0.0,
        init="random",
        init_text=None,
    )
    model = _skeleton(layout, method)
    own = {_NAMES[name]: tensor for name, tensor in state.items()}
    methods.load_trainable_state(model, own, weights)
    methods.save_adapter(model, folder)
    # Turning the keys on and back rounds them; here are the floats themselves.
    save_file(methods.trainable_state(model), folder / methods.PREFIX_FILE)
    config = adapters.read_config(folder)
    config["base_model_name_or_path"] = None if base is None else str(base)
    adapters.write_json(folder / adapters.CONFIG_FILE, config)
    return {
        "kind": "p_tuning_v2",
        "prefix_length": length,
        "projection": projected,
        "read": {weights.name: sha256_of(weights)},
    }


def _width(layout: Layout) -> int:
    return 2 * layout.layers * layout.groups * layout.head_dim


def _skeleton(layout: Layout, method: recipes.PTuningV2) -> PTuningV2Model:
    """Return a prefix on a model with the base's layers, heads and rotation, and 8 words."""
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config = GlmConfig.from_dict(layout.native_config() | small)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = methods.adapt(base, method)
    assert isinstance(model, PTuningV2Model)
    return model
