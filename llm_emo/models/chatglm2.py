"""ChatGLM2 in transformers' own GLM layout: names, shapes, switches, and the way back.

With the right config `GlmForCausalLM` computes what the original code does, so a checkpoint
needs other names and nothing else. One tensor is divided: `query_key_value`, whose rows are
[queries | keys | values].

Letters in shapes: H hidden, F ffn, N heads, G groups (of keys and values), D head_dim, V vocab.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llm_emo.errors import ModelError
from llm_emo.models.chatglm2_checks import (
    EOS,
    SWITCHES,
    TAKE,
    Shape,
    another_model,
    refuse_switches,
)

_SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "groups": "multi_query_group_num",
    "head_dim": "kv_channels",
    "vocab": "padded_vocab_size",
    "positions": "seq_length",
}
_NATIVE_SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}

PREFIX_ENCODER = "transformer.prefix_encoder."
"""What the names of a P-Tuning v2 adapter of the original begin with."""

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
"""The one tensor of a checkpoint that is no parameter: rotary frequencies, computed here."""


@dataclass(frozen=True)
class Layout:
    """The sizes of a ChatGLM2 model; with its switches fixed, they are all there is to say."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    positions: int
    eps: float = 1e-5
    dtype: str = "float16"
    """Of the stored weights, as torch spells it."""

    @classmethod
    def from_original(cls, config: Mapping[str, Any], folder: Path) -> Self:
        """Read the original's `config.json`.

        Args:
            config: its content.
            folder: where it lies; the files beside it tell ChatGLM3 from ChatGLM2.

        Raises:
            ModelError: another model, or a switch that native GLM does not have.
        """
        where = folder / "config.json"
        if name := another_model(config, folder):
            raise ModelError(f"{folder}: is {name}; {TAKE}")
        refuse_switches(config, where, _SIZES.values())
        values = {name: _size(config, key, where) for name, key in _SIZES.items()}
        stored = config.get("torch_dtype") or config.get("dtype") or "float16"
        made = cls(**values, eps=_eps(config, "layernorm_epsilon", where), dtype=str(stored))
        made._check(where, _SIZES)
        if config.get("vocab_size", made.vocab) != made.vocab:
            raise ModelError(
                f"{where}: vocab_size {config['vocab_size']} and padded_vocab_size {made.vocab} "
                "differ; ChatGLM2 has one vocabulary"
            )
        return made

    @classmethod
    def from_native(cls, config: Mapping[str, Any], folder: Path) -> Self:
        """Read a `config.json` of transformers' GLM that is ChatGLM2's.

        Args:
            config: its content.
            folder: where it lies, for messages.

        Raises:
            ModelError: another model, or one that the original's code cannot compute.
        """
        where = folder / "config.json"
        if config.get("model_type") != "glm":
            raise ModelError(
                f"{folder}: is no ChatGLM2 in transformers' layout (model_type "
                f"{config.get('model_type')!r}, expected 'glm'); name a folder that "
                "`llm-emo convert` or `llm-emo export --format merged` wrote"
            )
        rope = config.get("rope_parameters") or {}
        found = {
            "attention_bias": config.get("attention_bias", True),
            "eos_token_id": config.get("eos_token_id"),
            "hidden_act": config.get("hidden_act", "silu"),
            "partial_rotary_factor": rope.get(
                "partial_rotary_factor", config.get("partial_rotary_factor", 0.5)
            ),
            "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000)),
            "rope_type": rope.get("rope_type", "default"),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
        }
        wanted = {
            "attention_bias": True,
            "eos_token_id": EOS,
            "hidden_act": "silu",
            "partial_rotary_factor": 0.5,
            "rope_theta": 10_000,
            "rope_type": "default",
            "tie_word_embeddings": False,
        }
        for key, value in wanted.items():
            if found[key] != value:
                raise ModelError(
                    f"{where}: {key} is {found[key]!r}, and ChatGLM2's is {value!r}; this is "
                    "another GLM model (GLM-4?), which has no ChatGLM2 form"
                )
        values = {name: _size(config, key, where) for name, key in _NATIVE_SIZES.items()}
        stored = config.get("dtype") or config.get("torch_dtype") or "float32"
        made = cls(**values, eps=_eps(config, "rms_norm_eps", where), dtype=str(stored))
        made._check(where, _NATIVE_SIZES)
        return made

    def _check(self, where: Path, keys: Mapping[str, str]) -> None:
        if self.heads % self.groups:
            raise ModelError(
                f"{where}: {keys['heads']} {self.heads} is no multiple of "
                f"{keys['groups']} {self.groups}"
            )
        if self.head_dim % 4:
            raise ModelError(
                f"{where}: {keys['head_dim']} {self.head_dim} is no multiple of 4; rotary "
                "embeddings turn pairs in one half of a head"
            )

    @property
    def parameters(self) -> int:
        """The number of parameters; the rotary frequencies are none."""
        return sum(math.prod(shape) for shape in shapes(self).values())

    def native_config(self) -> dict[str, Any]:
        """Return `config.json` for transformers' `GlmForCausalLM`."""
        sizes = dataclasses.asdict(self)
        return {
            "architectures": ["GlmForCausalLM"],
            "model_type": "glm",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": self.dtype,
            "eos_token_id": EOS,
            "hidden_act": "silu",
            **{key: sizes[name] for name, key in _NATIVE_SIZES.items()},
            "pad_token_id": 0,
            "rms_norm_eps": self.eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
            "tie_word_embeddings": False,
            "use_cache": True,
        }

    def original_config(self) -> dict[str, Any]:
        """Return `config.json` for the original's code."""
        sizes = dataclasses.asdict(self)
        sequence_model = "modeling_chatglm.ChatGLMForConditionalGeneration"
        return {
            "_name_or_path": "THUDM/chatglm2-6b",
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "auto_map": {
                "AutoConfig": "configuration_chatglm.ChatGLMConfig",
                "AutoModel": sequence_model,
                "AutoModelForCausalLM": sequence_model,
                "AutoModelForSeq2SeqLM": sequence_model,
            },
            **{key: sizes[name] for name, key in _SIZES.items()},
            **{
                key: float(value) if key.endswith("_dropout") else value
                for key, (value, _) in SWITCHES.items()
                if key not in ("interleaved_qkv", "quantization_embeddings", "rope_ratio")
            },
            "apply_query_key_layer_scaling": True,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "layernorm_epsilon": self.eps,
            "torch_dtype": self.dtype,
            "use_cache": True,
            "eos_token_id": EOS,
            "pad_token_id": 0,
        }


CHATGLM2_6B = Layout(
    layers=28, hidden=4096, ffn=13696, heads=32, groups=2, head_dim=128, vocab=65024,
    positions=32768,
)  # fmt: skip
"""The published model."""


def _size(config: Mapping[str, Any], key: str, where: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = repr(value) if key in config else "nothing"
        raise ModelError(f"{where}: key {key!r}: found {found}, expected a positive integer")
    return value


def _eps(config: Mapping[str, Any], key: str, where: Path) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        found = repr(value) if key in config else "nothing"
        raise ModelError(f"{where}: key {key!r}: found {found}, expected a small positive number")
    return float(value)


# --- names and shapes ---------------------------------------------------------------------------

_OUTER = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
_INNER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.query_key_value.weight": (
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    ),
    "self_attention.query_key_value.bias": (
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias",
    ),
    "self_attention.dense.weight": ("self_attn.o_proj.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.dense_h_to_4h.weight": ("mlp.gate_up_proj.weight",),  # [gate | up] in both
    "mlp.dense_4h_to_h.weight": ("mlp.down_proj.weight",),
}  # fmt: skip
_LAYER = "transformer.encoder.layers."


def split_rows(layout: Layout) -> tuple[int, int, int]:
    """Return how many rows of `query_key_value` are queries, keys and values: N*D, G*D, G*D."""
    keys = layout.groups * layout.head_dim
    return layout.heads * layout.head_dim, keys, keys


def shapes(layout: Layout) -> dict[str, Shape]:
    """Return the original's parameters and their shapes, in the original's order."""
    hidden, ffn, queries = layout.hidden, layout.ffn, layout.heads * layout.head_dim
    rows = sum(split_rows(layout))
    inner: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.query_key_value.weight": (rows, hidden),
        "self_attention.query_key_value.bias": (rows,),
        "self_attention.dense.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, ffn),
    }
    embedding, norm, head = _OUTER
    return {
        embedding: (layout.vocab, hidden),
        **{
            f"{_LAYER}{layer}.{name}": shape
            for layer in range(layout.layers)
            for name, shape in inner.items()
        },
        norm: (hidden,),
        head: (layout.vocab, hidden),
    }


def native_names(name: str) -> tuple[str, ...]:
    """Return the native tensors that hold the rows of an original one, in their order.

    >>> native_names("transformer.encoder.layers.7.self_attention.query_key_value.bias")[1]
    'model.layers.7.self_attn.k_proj.bias'

    Raises:
        KeyError: ChatGLM2 has no parameter of this name.
    """
    if name in _OUTER:
        return (_OUTER[name],)
    if not name.startswith(_LAYER):
        raise KeyError(name)
    layer, _, inner = name.removeprefix(_LAYER).partition(".")
    return tuple(f"model.layers.{layer}.{part}" for part in _INNER[inner])


def native_shapes(layout: Layout) -> dict[str, Shape]:
    """Return the native parameters and their shapes."""
    made: dict[str, Shape] = {}
    for name, shape in shapes(layout).items():
        names = native_names(name)
        rows: Iterable[int] = split_rows(layout) if len(names) == 3 else shape[:1]
        made |= {part: (n, *shape[1:]) for part, n in zip(names, rows, strict=True)}
    return made


def to_native(name: str, tensor: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return an original tensor under its native names; views, no copies.

    Args:
        name: the original's; `transformer.rotary_pos_emb.inv_freq` gives nothing.
        tensor: of the shape that `shapes` says.
        layout: tells where `query_key_value` is divided.
    """
    if name == INV_FREQ:
        return {}
    names = native_names(name)
    parts = torch.split(tensor, list(split_rows(layout))) if len(names) == 3 else (tensor,)
    return dict(zip(names, parts, strict=True))


def to_original(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the original tensor called `name` from native ones, which may be more than it needs.

    Raises:
        KeyError: a part is missing.
    """
    needed = [parts[part] for part in native_names(name)]
    return needed[0] if len(needed) == 1 else torch.cat(needed)


def inverse_frequencies(layout: Layout) -> Tensor:
    """Return what the original keeps as `inv_freq`, shape (D/4,), in the layout's dtype."""
    half = layout.head_dim // 2
    exact = 1.0 / 10_000 ** (torch.arange(0, half, 2) / half)
    return exact.to(getattr(torch, layout.dtype))
