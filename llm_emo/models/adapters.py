"""Adapter folders of any origin, read strictly: what one says is used, or refused by name.

LoRA is read as every version of PEFT writes it: `adapter_config.json` beside
`adapter_model.safetensors` or, from before 2023-09, `adapter_model.bin`. A setting that would
change what the adapter computes and that is not understood here is an error, because PEFT's own
versions pass over the keys that they do not know.

Letters: r rank, P prefix length, M layers, G key-value heads, D head dimension.
"""

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from llm_emo import methods, recipes
from llm_emo.errors import AdapterError, ModelError
from llm_emo.fetch import sha256_of
from llm_emo.machine import say
from llm_emo.models.source import read_json

CONFIG_FILE = "adapter_config.json"
Kind = Literal["lora", "p_tuning_v2"]
PEFT_NAMES: dict[str, Kind] = {"LORA": "lora", "PREFIX_TUNING": "p_tuning_v2"}
"""What PEFT calls the methods that are known here."""

# Settings that say where an adapter comes from or how it was trained, not what it computes.
_PROVENANCE = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision",
    "auto_mapping", "inference_mode", "lora_dropout", "layers_pattern", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "token_dim", "encoder_hidden_size", "init_weights",
}  # fmt: skip
_LORA_KEYS = {"r", "lora_alpha", "target_modules", "use_rslora", "layers_to_transform"}
_PREFIX_KEYS = {
    "num_virtual_tokens", "num_layers", "num_attention_heads", "num_transformer_submodules",
    "prefix_projection",
}  # fmt: skip
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Starts of A and B that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ move them."""

_PAIR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter of linear layers: every one of them adds `scale * B @ A`.

    `pairs` holds A, shape (r, inputs), and B, shape (outputs, r), by the path of the layer in the
    model. `layers` names the decoder layers that are adapted where they are not all.
    """

    rank: int
    scale: float
    dropout: float
    layers: tuple[int, ...] | None
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    base: str | None
    files: Mapping[str, str]

    @property
    def alpha(self) -> float:
        """The number that PEFT divides by the rank."""
        return self.scale * self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The last names of the adapted layers, sorted."""
        return tuple(sorted({path.rpartition(".")[2] for path in self.pairs}))


def kind(folder: Path) -> Kind | None:
    """Return which adapter a folder in PEFT's layout holds; None for another folder.

    Raises:
        AdapterError: the folder holds an adapter of another method.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    config = read_config(folder)
    found = PEFT_NAMES.get(str(config.get("peft_type")))
    if found is None:
        hint = (
            "; what PEFT calls P_TUNING is the first P-Tuning, which trains input embeddings only"
            if config.get("peft_type") == "P_TUNING"
            else ""
        )
        raise AdapterError(
            f"{folder / CONFIG_FILE}: peft_type is {config.get('peft_type')!r}; only "
            f"{' and '.join(PEFT_NAMES)} are known{hint}"
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return what `adapter_config.json` holds.

    Raises:
        AdapterError: it is absent, or no JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder}: no adapter: it holds no {CONFIG_FILE}")
    try:
        return read_json(path)
    except ModelError as error:
        raise AdapterError(str(error)) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, mapped.

    A `.bin` is a pickle: torch's restricted unpickler reads it, which takes plain tensors only.
    That is no full protection against a file that was made to do harm, so its hash is printed.

    Raises:
        AdapterError: the file is damaged, or holds something else than tensors by name.
    """
    if path.suffix != ".safetensors":
        say(f"{path}: a pickle, read as plain tensors only; SHA-256 {sha256_of(path)}")
    return methods.read_weights(path)


def write_pickle(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write plain tensors as `torch.save` does, for programs that read nothing else."""
    stream = io.BytesIO()  # torch hides a full disk behind an error of its own
    torch.save(dict(tensors), stream)
    path.write_bytes(stream.getbuffer())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as PEFT and transformers do, with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def read_lora(folder: Path) -> Lora:
    """Read a LoRA adapter.

    Raises:
        AdapterError: the files contradict each other, or say something that would be lost.
    """
    where, config = folder / CONFIG_FILE, read_config(folder)
    _refuse_unknown(where, config, _LORA_KEYS)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _whole(rank) or rank < 1:
        raise AdapterError(f"{where}: r is {rank!r}, expected a whole number above 0")
    if not ((_whole(alpha) or isinstance(alpha, float)) and math.isfinite(alpha)):
        raise AdapterError(f"{where}: lora_alpha is {alpha!r}, expected a number")
    dropout = config.get("lora_dropout") or 0.0
    if not ((_whole(dropout) or isinstance(dropout, float)) and 0 <= dropout <= 1):
        raise AdapterError(f"{where}: lora_dropout is {dropout!r}, expected a number from 0 to 1")
    path = methods.weights_of(folder)
    pairs = _pairs(path, rank)
    _match_targets(where, config.get("target_modules"), path, pairs)
    layers = config.get("layers_to_transform")
    if config.get("layers_pattern") not in (None, [], "layers", ["layers"]):
        raise AdapterError(
            f"{where}: layers_pattern is {config['layers_pattern']!r}; only 'layers' is known"
        )
    name = config.get("base_model_name_or_path")
    return Lora(
        rank=rank,
        scale=alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank,
        dropout=float(dropout),
        layers=None if layers is None else tuple([layers] if isinstance(layers, int) else layers),
        pairs=pairs,
        base=name if isinstance(name, str) and name else None,
        files={path.name: sha256_of(path)},
    )


def _whole(value: Any) -> TypeGuard[int]:
    """Whether JSON has a whole number here; Python takes its `true` for a 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_unknown(where: Path, config: Mapping[str, Any], known: set[str]) -> None:
    """Refuse every setting that changes what an adapter computes and is not understood."""
    for key, value in config.items():
        neutral = value is None or value is False or value in ("", "none", [], {})
        if key in _PROVENANCE or key in known or neutral:
            continue
        if key == "init_lora_weights":
            if value in _INITIAL:
                continue
            raise AdapterError(
                f"{where}: init_lora_weights is {value!r}, which trains on changed base weights; "
                "convert it to a plain LoRA with PEFT first (path_initial_model_for_weight_"
                "conversion)"
            )
        raise AdapterError(
            f"{where}: {key} is {value!r}, which is not understood here and would change what "
            "the adapter computes"
        )


def _pairs(path: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Read A and B of every layer, and hold them against the config's rank."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_weights(path).items():
        match = _PAIR.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{path}: holds {name}; only lora_A and lora_B of linear layers are understood "
                "(no biases, embeddings or whole modules)"
            )
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise AdapterError(f"{path}: {name} is no matrix of floating-point numbers")
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {name} holds numbers that are not finite")
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise AdapterError(f"{path}: holds no lora_A and lora_B")
    pairs = {}
    for layer, parts in sorted(found.items()):
        if missing := {"A", "B"} - parts.keys():
            raise AdapterError(f"{path}: {layer} lacks lora_{missing.pop()}")
        down, up = parts["A"], parts["B"]
        if down.shape[0] != rank or up.shape[1] != rank:
            raise AdapterError(
                f"{path}: {layer} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, "
                f"but {CONFIG_FILE} says r = {rank}"
            )
        pairs[layer] = (down, up)
    return pairs


def _match_targets(where: Path, targets: Any, path: Path, pairs: Mapping[str, Any]) -> None:
    """Hold the layers in the weights against those that the config names."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise AdapterError(
                f"{where}: target_modules is {targets!r}, no regular expression: {error}"
            ) from error
        matched = {layer: pattern.fullmatch(layer) is not None for layer in pairs}
        unused: list[str] = []
    elif isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
        ends = {
            name: {layer for layer in pairs if f".{layer}".endswith(f".{name}")} for name in targets
        }
        matched = {layer: any(layer in found for found in ends.values()) for layer in pairs}
        unused = [name for name, found in ends.items() if not found]
    else:
        raise AdapterError(f"{where}: target_modules is {targets!r}, expected names of layers")
    if unused:
        raise AdapterError(
            f"{path}: holds nothing for {', '.join(unused)}, which {CONFIG_FILE} names as "
            "target_modules"
        )
    foreign = [layer for layer, fits in matched.items() if not fits]
    if foreign:
        raise AdapterError(
            f"{path}: holds {foreign[0]}, which the target_modules of {CONFIG_FILE} do not name"
        )


@dataclass(frozen=True)
class PrefixShape:
    """What `adapter_config.json` says of a prefix, shape (P, 2*M*G*D)."""

    length: int
    layers: int
    groups: int
    token_dim: int
    projection: bool


def read_prefix_shape(folder: Path) -> PrefixShape:
    """Read the config of a prefix in PEFT's layout.

    Raises:
        AdapterError: a number is missing, or a setting is not understood.
    """
    where, config = folder / CONFIG_FILE, read_config(folder)
    _refuse_unknown(where, config, _PREFIX_KEYS)
    for key in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"):
        if not _whole(config.get(key)):
            raise AdapterError(f"{where}: {key} is {config.get(key)!r}, expected a number")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(f"{where}: num_transformer_submodules is not 1: not of a decoder")
    return PrefixShape(
        length=config["num_virtual_tokens"],
        layers=config["num_layers"],
        groups=config["num_attention_heads"],
        token_dim=config["token_dim"],
        projection=bool(config.get("prefix_projection")),
    )


def method_of(folder: Path) -> recipes.Lora | recipes.PTuningV2:
    """Return the recipe section that wraps a base model as this adapter needs it.

    Dropout is 0 there: it is for using the adapter, not for training it on.

    Raises:
        AdapterError: the folder holds no adapter, or one that no recipe can state.
    """
    match kind(folder):
        case "lora":
            adapter = read_lora(folder)
            if "query_key_value" in adapter.targets:
                raise AdapterError(
                    f"{folder}: adapts query_key_value, as ChatGLM2's own code names it; "
                    f"`llm-emo convert {folder} -o NEW` makes a native adapter of it"
                )
            if adapter.layers is not None:
                raise AdapterError(
                    f"{folder / CONFIG_FILE}: layers_to_transform is set; an adapter of some "
                    "layers only can be used with PEFT itself"
                )
            return recipes.Lora(
                kind="lora",
                rank=adapter.rank,
                alpha=adapter.alpha,
                dropout=0.0,
                target_modules=adapter.targets,
            )
        case "p_tuning_v2":
            return _prefix_method(folder)
    raise AdapterError(
        f"{folder}: no adapter: it holds no {CONFIG_FILE}; `llm-emo convert` makes one of "
        "ChatGLM2's own prefix checkpoints"
    )


def _prefix_method(folder: Path) -> recipes.PTuningV2:
    shape = read_prefix_shape(folder)
    encoder = folder / methods.PREFIX_FILE
    size, inputs = None, shape.token_dim
    # Without the encoder there is only what it computed: a prefix as any other.
    if encoder.is_file() and "encoder.transform.0.weight" in (state := read_weights(encoder)):
        size, inputs = state["encoder.transform.0.weight"].shape
    return recipes.PTuningV2(
        kind="p_tuning_v2",
        prefix_length=shape.length,
        projection=size is not None,
        projection_size=size,
        projection_input="layer" if inputs == shape.token_dim else "all",
        dropout=0.0,
        init="random",
        init_text=None,
    )
