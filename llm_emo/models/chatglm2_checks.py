"""What is no ChatGLM2 checkpoint, and why: told from its config, its files and its tensors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_emo.errors import ModelError, nearest

Shape = tuple[int, ...]

EOS = 2
"""The end token, always: without it, GLM's config class puts GLM-4's."""

# The switches that change what is computed: the one value that native GLM computes, and whether
# the original's config class has that value when the key is absent.
SWITCHES: dict[str, tuple[Any, bool]] = {
    "add_bias_linear": (False, True),
    "add_qkv_bias": (True, False),
    "apply_residual_connection_post_layernorm": (False, True),
    "attention_dropout": (0, True),
    "fp32_residual_connection": (False, True),
    "hidden_dropout": (0, True),
    "interleaved_qkv": (False, True),  # of the first revision of the original's config class
    "multi_query_attention": (True, False),
    "original_rope": (True, False),
    "post_layer_norm": (True, True),
    "quantization_embeddings": (False, True),
    "rmsnorm": (True, True),
    # It divides positions in one revision of the original and multiplies the base in another.
    "rope_ratio": (1, True),
    "tie_word_embeddings": (False, True),
}

# Keys that leave the function alone: names, bookkeeping, how the original computes, dropout of a
# head that is not here. Scaling by layer is undone inside the original's attention.
_INDIFFERENT = frozenset({
    "_name_or_path", "_commit_hash", "apply_query_key_layer_scaling", "architectures",
    "attention_softmax_in_fp32", "auto_map", "bias_dropout_fusion", "bos_token_id",
    "classifier_dropout", "dtype", "eos_token_id", "layernorm_epsilon", "model_type",
    "pad_token_id", "pre_seq_len", "prefix_projection", "quantization_bit", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size",
})  # fmt: skip

_FIRST_GENERATION = ("position_encoding_2d", "inner_hidden_size", "max_sequence_length")
_GLM4_VOCABULARY = 150_000
_ROLES = "<|user|>"
_ROLE_FILES = (
    "tokenizer_config.json", "tokenization_chatglm.py", "modeling_chatglm.py",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
TAKE = "name a folder with ChatGLM2-6B (THUDM/chatglm2-6b)"


# --- configs ----------------------------------------------------------------------------------


def another_model(config: Mapping[str, Any], folder: Path) -> str | None:
    """Return what a checkpoint is, and by which mark, unless it may be ChatGLM2.

    ChatGLM3 has ChatGLM2's tensors and shapes; its sequence length, its recorded name, and the
    role tokens in its tokenizer's files tell it apart.
    """
    kind = config.get("model_type")
    if mark := next((key for key in _FIRST_GENERATION if key in config), None):
        return f"ChatGLM-6B, the first generation (its config.json has {mark})"
    if "vision_config" in config:
        return "GLM-4V or another model with images (its config.json has vision_config)"
    if kind in ("glm4", "glm4_moe") or (
        kind in ("chatglm", "glm")
        and (
            isinstance(config.get("eos_token_id"), list)
            or _exceeds(config.get("padded_vocab_size", config.get("vocab_size")), _GLM4_VOCABULARY)
        )
    ):
        return "GLM-4 (by its vocabulary), which transformers opens by itself in its -hf form"
    if kind == "glm":
        return "in transformers' own layout already (--to chatglm2 gives the original's names back)"
    if kind != "chatglm":
        return f"no ChatGLM2 checkpoint (model_type {kind!r}, expected 'chatglm')"
    if mark := _third_generation(config, folder):
        return (
            f"ChatGLM3 ({mark}); its tensors have ChatGLM2's names and shapes, but it was trained "
            "on other prompts, with role tokens that ChatGLM2's tokenizer lacks"
        )
    return None


def _exceeds(value: Any, limit: int) -> bool:
    return isinstance(value, int) and value > limit


def _third_generation(config: Mapping[str, Any], folder: Path) -> str | None:
    if "chatglm3" in str(config.get("_name_or_path", "")).lower():
        return f"its config.json says {config['_name_or_path']}"
    published = {"num_layers": 28, "padded_vocab_size": 65024, "seq_length": 8192}
    if all(config.get(key) == value for key, value in published.items()):
        return (
            "its config.json has seq_length 8192, where ChatGLM2-6B has 32768; put that there if "
            "it is ChatGLM2 all the same"
        )
    for name in _ROLE_FILES:
        path = folder / name
        if path.is_file():
            text = path.read_text("utf-8", errors="replace")
            if _ROLES in text or "chatglm3" in text.lower():
                return f"by its {name}"
    return None


def refuse_switches(config: Mapping[str, Any], where: Path, sizes: Iterable[str]) -> None:
    """Hold every key of the original's config against what native GLM computes.

    Args:
        config: its content.
        where: the file, for messages.
        sizes: the keys that hold sizes, which are any number.

    Raises:
        ModelError: a switch differs from ChatGLM2-6B's, or nobody knows what a key does.
    """
    if bits := config.get("quantization_bit"):
        raise ModelError(
            f"{where}: quantization_bit is {bits}: the original program has rounded these "
            f"weights to {bits} bits, which cannot be undone; {TAKE} unquantised, and let "
            "model.quantization=nf4 or int8 quantise it in training"
        )
    if length := config.get("pre_seq_len"):
        raise ModelError(
            f"{where}: pre_seq_len is {length}: this model expects a P-Tuning v2 prefix of that "
            "length, but no weights of one (transformer.prefix_encoder) lie here; remove "
            "pre_seq_len for the model without it"
        )
    known = {*SWITCHES, *_INDIFFERENT, *sizes}
    for key in config:
        if key not in known:
            raise ModelError(
                f"{where}: key {key!r} is unknown, and may change what the model computes; "
                f"{nearest(key, known)}; remove it if it changes nothing"
            )
    for key, (value, default) in SWITCHES.items():
        if key not in config and not default:
            raise ModelError(
                f"{where}: key {key!r} is missing; ChatGLM2-6B has {json.dumps(value)} there, and "
                "without the key the original does something else"
            )
        if config.get(key, value) != value and config[key] is not None:
            raise ModelError(
                f"{where}: {key} is {json.dumps(config[key])}; only {json.dumps(value)}, as in "
                "ChatGLM2-6B, has a counterpart in transformers' GLM"
            )
    eos = config.get("eos_token_id")
    if eos not in (None, EOS):
        raise ModelError(
            f"{where}: eos_token_id is {json.dumps(eos)}; ChatGLM2's end token is {EOS} (</s>)"
        )


# --- tensors --------------------------------------------------------------------------------------


def check_tensors(
    given: Mapping[str, tuple[torch.dtype, Shape]], expected: Mapping[str, Shape], folder: Path
) -> torch.dtype:
    """Hold what a checkpoint has against what its config asks for; return the weights' dtype.

    Raises:
        ModelError: tensors are missing, too many, misshapen, of several dtypes or of one that
            is not float16, bfloat16 or float32.
    """
    again = "download the checkpoint again"
    if missing := [name for name in expected if name not in given]:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(expected)} tensors are missing, such as "
            f"{missing[0]}; is a file of weights missing? {again}"
        )
    if extra := sorted(given.keys() - expected.keys()):
        raise ModelError(
            f"{folder}: {_count(extra, 'tensor')} that ChatGLM2 with this config.json does not "
            f"have, such as {extra[0]}; {_why_extra(extra[0])}"
        )
    for name, shape in expected.items():
        if given[name][1] != shape:
            raise ModelError(
                f"{folder}: {name} has shape {given[name][1]}, but its config.json asks for "
                f"{shape}; config.json and weights are of two models, {again}"
            )
    dtypes = [dtype for dtype, _ in given.values()]
    for name, (dtype, _) in given.items():
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ModelError(
                f"{folder}: {name} is stored as {_dtype(dtype)}; expected float16, bfloat16 or "
                f"float32, so unquantised weights: {TAKE}"
            )
    if len(set(dtypes)) > 1:
        usual = max(set(dtypes), key=dtypes.count)
        odd = next(name for name, (dtype, _) in given.items() if dtype != usual)
        raise ModelError(
            f"{folder}: most tensors are {_dtype(usual)}, but {odd} is {_dtype(given[odd][0])}; "
            "store all of them in one dtype"
        )
    return dtypes[0]


def same_frequencies(found: Tensor, exact: Tensor) -> bool:
    """Whether a checkpoint's `inv_freq` is that of rotary base 10000, up to half precision.

    It is a mark only: the original's code computes its angles anew, from the base in its source.
    """
    # Half precision rounds by up to 1 %; another base is off by far more.
    return found.shape == exact.shape and torch.allclose(
        found.float(), exact.float(), rtol=2e-2, atol=0
    )


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}s" if len(names) > 1 else f"a {what}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_extra(name: str) -> str:
    if name.endswith("weight_scale"):
        return f"it was quantised by the original program; {TAKE} unquantised"
    if ".prefix_encoder." in name:
        return "convert the adapter by itself"
    return "config.json and weights are of two models, download the checkpoint again"
