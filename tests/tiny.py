"""Tiny random models and tokenizers, built in memory: nothing is fetched, nothing is trained.

The weights are far from the usual small initial ones. With those, attention is nearly uniform
and logits nearly flat, so a wrong mask or a wrong rotation would hide in the rounding.
"""

import json
import os
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from llm_emo import recipes
from llm_emo.encoding import Encoded
from llm_emo.types import Example

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB = 320
WINDOW = 6
"""Gemma-3's sliding window here: smaller than most test sequences."""

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "glm")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def config(architecture: str, **changes: Any) -> Any:
    """Return the config of a tiny model of one of `ARCHITECTURES`, or of "mistral"."""
    sizes = _SIZES | changes
    match architecture:
        case "llama":
            return LlamaConfig(**{"tie_word_embeddings": True} | sizes)
        case "mistral":
            return MistralConfig(**{"sliding_window": None} | sizes)
        case "qwen2":  # biases in attention
            return Qwen2Config(**sizes)
        case "qwen3":  # normalised queries and keys
            return Qwen3Config(**sizes)
        case "gemma3":  # two rotary bases, a sliding window, scaled embeddings
            own = {
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 8,
            }
            return Gemma3TextConfig(**own | sizes)
        case "glm":  # rotates half of each head, in interleaved pairs
            return GlmConfig(**{"attention_bias": True} | sizes)
    raise ValueError(architecture)


def model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny random causal LM in fp32, in eval mode."""
    made = AutoModelForCausalLM.from_config(
        config(architecture, **changes), attn_implementation="sdpa", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.copy_(parameter + 0.2 * noise)
            else:
                spread = 0.3 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5
                parameter.copy_(spread * noise)
    # What a published checkpoint may say must not leak into greedy decoding.
    made.generation_config.pad_token_id = 0
    return made.eval()


# --- tokenizers -----------------------------------------------------------------------------

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>", "[gMASK]")
"""Added tokens that are not marked as special, as reasoning models have them."""

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING_TEMPLATE = TEMPLATE.replace(
    "<|im_start|>assistant\n",
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
)

_SENTENCES = (
    "Classify the emotion of the sentence as anger, fear, joy or sadness.",
    "I was so happy that the old train was late again!",
    "user system assistant 开心 难过",
)


def tokenizer(*, template: str | None = TEMPLATE, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose padding token is its end token, as SmolLM2's is."""
    backend = Tokenizer(token_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=list(CONTROL),
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|endoftext|>" if bos else None,
    )
    made.chat_template = template
    return made


def metaspace_tokenizer(*, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks words as SentencePiece does, the first one included."""
    backend = Tokenizer(token_models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=[*string.ascii_letters, *string.punctuation, "▁", "\n"],
        show_progress=False,
        special_tokens=list(CONTROL),
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    # Bytes are plain entries of the vocabulary, not added tokens.
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    backend = Tokenizer.from_str(json.dumps(state))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = template
    return made


# --- examples and recipes ---------------------------------------------------------------------


def example(text: str = "the train was late", answer: str = "anger", **changes: Any) -> Example:
    """Return an example of two lines: an instruction, and the text."""
    fields: dict[str, Any] = {
        "uid": "row-1",
        "before": "Classify the emotion as anger or joy.\n",
        "history": (),
        "between": "Sentence: ",
        "text": text,
        "after": "",
        "answer": answer,
        "gold": answer,
    }
    return Example(**fields | changes)


def encoded(count: int, *, seed: int = 0, shared: int = 3) -> list[Encoded]:
    """Return rows of random ids: a common beginning, prompts and answers of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(5, VOCAB, (length,), generator=generator).tolist())

    start = ids(shared, shared) if shared else ()
    return [Encoded(f"row-{row}", (*start, *ids(1, 6)), (*ids(0, 4), 2)) for row in range(count)]


def train(**changes: Any) -> recipes.Train:
    """Return a training section; the one place where tests spell its fields."""
    fields: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 4,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "evaluations_per_epoch": 1,
        "early_stopping_patience": None,
        "gradient_checkpointing": False,
    }
    if "max_length" in recipes.Train.model_fields:
        fields["max_length"] = 64
    return recipes.Train(**fields | changes)


def lora(**changes: Any) -> recipes.Lora:
    """Return a LoRA section that fits every architecture of `ARCHITECTURES`."""
    fields: dict[str, Any] = {
        "kind": "lora",
        "rank": 2,
        "alpha": 4.0,
        "dropout": 0.0,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "tie_a": False,
    }
    return recipes.Lora(**fields | changes)


def p_tuning(**changes: Any) -> recipes.PTuningV2:
    """Return a P-Tuning v2 section with a random prefix of four positions."""
    fields: dict[str, Any] = {
        "kind": "p_tuning_v2",
        "prefix_length": 4,
        "projection": False,
        "projection_size": None,
        "projection_input": "layer",
        "dropout": 0.0,
        "init": "random",
        "init_text": None,
    }
    return recipes.PTuningV2(**fields | changes)


METHODS = ("lora", "p_tuning_v2")


def adapted(
    architecture: str,
    method: str,
    *,
    seed: int = 0,
    sizes: Mapping[str, Any] | None = None,
    **changes: Any,
) -> nn.Module:
    """Return an adapted tiny model that differs from its base, in eval mode.

    `sizes` are changes of the model's config, the others of the method.
    """
    from llm_emo.methods import adapt

    torch.manual_seed(seed)
    section = lora(**changes) if method == "lora" else p_tuning(**changes)
    made = adapt(model(architecture, **sizes or {}), section)
    with torch.no_grad():  # LoRA starts as the identity, which would hide that it is applied
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3)
    return made.eval()


# --- references: the plain way, without the trie ------------------------------------------------


def alone(made: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the logits of one sequence run by itself with a plain 2-D mask, shape (L, V)."""
    tokens = torch.tensor([list(ids)])
    logits: Tensor = made(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits[0]


def gradients(made: nn.Module) -> Tensor:
    """Return the gradients of all parameters that learn, shape (number of parameters,)."""
    found = [p.grad for p in made.parameters() if p.requires_grad]
    assert all(grad is not None for grad in found), "a parameter that learns got no gradient"
    return torch.cat([grad.flatten() for grad in found if grad is not None])


def distance(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|, in Frobenius norm."""
    return float((a - b).norm() / b.norm())
