"""LoRA on ChatGLM2's `query_key_value` as LoRA on q, k and v, and back.

The original adapts `query_key_value` as one layer, the native model q, k and v apart. Apart, each
gets the same A and its own rows of B: the same function at the same rank. Together, equal A's
fuse again at their rank; different ones stand below one another in one A, beside a block-diagonal
B of as many times the rank, with alpha growing alike, so that the scale stays.

Letters: r rank.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from llm_emo.errors import AdapterError
from llm_emo.models import adapters
from llm_emo.models.chatglm2 import CHATGLM2_6B, Layout, split_rows

Pair = tuple[Tensor, Tensor]
"""A, shape (r, inputs), and B, shape (outputs, r)."""

BASE_NAME = "THUDM/chatglm2-6b"

_FUSED = "self_attention.query_key_value"
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NATIVE_NAMES = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_ORIGINAL_PATH = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")
_NATIVE_PATH = re.compile(r"model\.layers\.(\d+)\.(.+)")


def _shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Return the outputs and inputs of every linear layer of a block, under both names."""
    queries, keys, values = split_rows(layout)
    attention = {
        _FUSED: (queries + keys + values, layout.hidden),
        "self_attention.dense": (layout.hidden, queries),
        "mlp.dense_h_to_4h": (2 * layout.ffn, layout.hidden),
        "mlp.dense_4h_to_h": (layout.hidden, layout.ffn),
    }
    native = {_NATIVE_NAMES[name]: shape for name, shape in attention.items() if name != _FUSED}
    apart = zip(_SPLIT, (queries, keys, values), strict=True)
    return attention | native | {name: (rows, layout.hidden) for name, rows in apart}


def _by_layer(
    source: Path,
    adapter: adapters.Lora,
    path: re.Pattern[str],
    known: tuple[str, ...],
    layout: Layout,
    hint: str,
) -> dict[int, dict[str, Pair]]:
    """Sort A and B by layer and name within it; hold every shape and layer against the base."""
    shapes = _shapes(layout)
    found: dict[int, dict[str, Pair]] = {}
    for name, (down, up) in adapter.pairs.items():
        match = path.fullmatch(name)
        if match is None or match[2] not in known:
            raise AdapterError(
                f"{source}: adapts {name}, which has no counterpart in the other layout "
                f"(known: {', '.join(known)})"
            )
        outputs, inputs = shapes[match[2]]
        if (up.shape[0], down.shape[1]) != (outputs, inputs):
            raise AdapterError(
                f"{source}: {name} goes from {down.shape[1]} to {up.shape[0]}, but the base "
                f"model's from {inputs} to {outputs}{hint}"
            )
        found.setdefault(int(match[1]), {})[match[2]] = (down, up)
    every = set(range(layout.layers))
    expected = every if adapter.layers is None else set(adapter.layers)
    for name in sorted({name for modules in found.values() for name in modules}):
        layers = {layer for layer, modules in found.items() if name in modules}
        if layers != expected or not layers <= every:
            raise AdapterError(
                f"{source}: adapts {name} in {len(layers)} layers, numbers {_span(layers)}; its "
                f"config and the base model's say {len(expected)}, {_span(expected)}{hint}"
            )
    return dict(sorted(found.items()))


def _span(layers: set[int]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "none"


def split(source: Path, adapter: adapters.Lora, layout: Layout, hint: str) -> dict[str, Pair]:
    """Return A and B by the path of the native layer.

    Raises:
        AdapterError: a layer has no native counterpart, is misshapen, or is missing.
    """
    if all(_NATIVE_PATH.fullmatch(name) for name in adapter.pairs):
        raise AdapterError(
            f"{source}: adapts {next(iter(adapter.pairs))}, a native name already; there is "
            "nothing to convert"
        )
    known = (_FUSED, *_NATIVE_NAMES)
    pairs: dict[str, Pair] = {}
    for layer, modules in _by_layer(source, adapter, _ORIGINAL_PATH, known, layout, hint).items():
        for name, (down, up) in modules.items():
            if name == _FUSED:
                parts = zip(_SPLIT, torch.split(up, list(split_rows(layout))), strict=True)
                pairs |= {f"model.layers.{layer}.{to}": (down, part) for to, part in parts}
            else:
                pairs[f"model.layers.{layer}.{_NATIVE_NAMES[name]}"] = (down, up)
    return pairs


def fuse(
    source: Path, adapter: adapters.Lora, layout: Layout, hint: str
) -> tuple[int, dict[str, Pair]]:
    """Return the rank of the fused adapter, and A and B by the path of the original's layer.

    Raises:
        AdapterError: a layer has no counterpart in the original, is misshapen, or is missing.
    """
    if all(_ORIGINAL_PATH.fullmatch(name) for name in adapter.pairs):
        raise AdapterError(
            f"{source}: adapts {next(iter(adapter.pairs))}, the original's name already; there "
            "is nothing to convert"
        )
    known = (*_SPLIT, *_NATIVE_NAMES.values())
    layers = _by_layer(source, adapter, _NATIVE_PATH, known, layout, hint)
    downs = [
        [modules[name][0] for name in _SPLIT if name in modules] for modules in layers.values()
    ]
    tied = all(torch.equal(down, own[0]) for own in downs for down in own)
    blocks = 1 if tied else len(downs[0])
    rank = blocks * adapter.rank
    rows = split_rows(layout)
    original = {native: name for name, native in _NATIVE_NAMES.items()}
    pairs: dict[str, Pair] = {}
    for layer, modules in layers.items():
        at = f"transformer.encoder.layers.{layer}"
        own = {name: pair for name, pair in modules.items() if name in _SPLIT}
        if own:
            pairs[f"{at}.{_FUSED}"] = _together(own, rows, tied=tied)
        for name, (down, up) in modules.items():
            if name not in own:
                # One rank for all layers: rows and columns of zeros add nothing.
                more = rank - adapter.rank
                pairs[f"{at}.{original[name]}"] = (
                    torch.nn.functional.pad(down, (0, 0, 0, more)),
                    torch.nn.functional.pad(up, (0, more)),
                )
    return rank, pairs


def _together(own: Mapping[str, Pair], rows: tuple[int, int, int], *, tied: bool) -> Pair:
    """Fuse the pairs of q, k and v; those that are not adapted get rows of zeros."""
    rank = next(iter(own.values()))[0].shape[0]
    present = [name for name in _SPLIT if name in own]
    down = own[present[0]][0] if tied else torch.cat([own[name][0] for name in present])
    up = down.new_zeros(sum(rows), down.shape[0])
    for name, part in zip(_SPLIT, torch.split(up, list(rows)), strict=True):
        if name in own:
            at = 0 if tied else rank * present.index(name)
            part[:, at : at + rank] = own[name][1]
    return down, up


def write_native(
    folder: Path, adapter: adapters.Lora, pairs: Mapping[str, Pair], base: Path | None
) -> dict[str, Any]:
    """Write a native adapter as stock PEFT does; return what is worth saying."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=_number(adapter.alpha),
        lora_dropout=adapter.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in pairs}),
        layers_to_transform=None if adapter.layers is None else list(adapter.layers),
        bias="none",
        inference_mode=True,
        base_model_name_or_path=None if base is None else str(base),
    )
    config.save_pretrained(str(folder))
    save_file(_named(pairs), folder / "adapter_model.safetensors")
    return _said(adapter, adapter.rank, pairs)


def write_original(
    folder: Path,
    adapter: adapters.Lora,
    rank: int,
    pairs: Mapping[str, Pair],
    layout: Layout,
) -> dict[str, Any]:
    """Write an adapter for the original's code; return what is worth saying.

    The weights lie there twice: PEFT 0.4 takes safetensors first, 0.3 knows the pickle only.
    """
    config = {  # the keys of PEFT 0.4.0, all of them
        "auto_mapping": None,
        "base_model_name_or_path": _base_name(layout),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None if adapter.layers is None else list(adapter.layers),
        "lora_alpha": _number(adapter.scale * rank),
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "task_type": "CAUSAL_LM",
    }
    adapters.write_json(folder / adapters.CONFIG_FILE, config)
    tensors = _named(pairs)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapters.write_pickle(tensors, folder / "adapter_model.bin")
    return _said(adapter, rank, pairs)


def _said(adapter: adapters.Lora, rank: int, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    return {
        "kind": "lora",
        "rank": rank,
        "alpha": _number(adapter.scale * rank),
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "read": dict(adapter.files),
    }


def _base_name(layout: Layout) -> str | None:
    """Return the hub's name of the published model, if this is its shape."""
    published = dataclasses.replace(CHATGLM2_6B, dtype=layout.dtype)
    return BASE_NAME if layout == published else None


def _named(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Return the tensors under PEFT's names, each with memory of its own."""
    return {
        f"base_model.model.{name}.lora_{letter}.weight": tensor.clone().contiguous()
        for name, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def _number(value: float) -> float:
    """Return a whole number as an int, as PEFT's own configs write alpha."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1.0, abs(value)) else value
