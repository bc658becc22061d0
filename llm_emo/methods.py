"""Adaptation methods: how a base model is wrapped, and how what it learned is kept.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) is PEFT's own; P-Tuning v2 is in
`models/prefix.py`.

A quantised base (QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) is wrapped like
any other. PEFT's `prepare_model_for_kbit_training` would turn all that is not quantised into
float32: embeddings and head alone cost 1 GiB at 6B, and the residual stream doubles. It is
meant for float16, which is never used here; in bfloat16 the norms compute in float32 anyway, the
loss takes logits in float32, and adapters learn in float32 over any base.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_emo import recipes
from llm_emo.decoder_layer import write_out
from llm_emo.errors import AdapterError, ModelError
from llm_emo.lean import lean
from llm_emo.models import auto, weights
from llm_emo.models.prefix import PTuningV2Model as PTuningV2Model
from llm_emo.models.prefix import p_tuning_v2
from llm_emo.models.prefix import rotate_keys as rotate_keys

PREFIX_FILE = "prefix_encoder.safetensors"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Where PEFT keeps an adapter: now, and before 2023-09."""


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, and how many of them learn."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters learn ({share:.4f} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters, each once; those packed by bitsandbytes count as what they hold."""
    trainable = total = 0
    for parameter in model.parameters():
        number = parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            number = 2 * number * parameter.element_size()
        total += number
        trainable += number if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def adapt(
    base: PreTrainedModel,
    method: recipes.Method,
    *,
    prefix_ids: Sequence[int] = (),
) -> nn.Module:
    """Wrap `base` so that the method's parameters, and no others, learn.

    Args:
        base: The causal LM.
        method: The recipe's method.
        prefix_ids: For P-Tuning v2 with `init: text`, the tokens whose keys and values start
            the prefix; repeated or cut to the prefix length.

    Raises:
        ModelError: a LoRA target module does not exist in this architecture, or no block has
            the projections that are to share their A.
    """
    base.config.use_cache = False
    model: nn.Module
    match method:
        case recipes.ZeroShot():
            model = base.requires_grad_(False)
        case recipes.Full():
            model = base.requires_grad_(True)
        case recipes.Lora():
            model = _lora(base, method)
        case recipes.PTuningV2():
            model = p_tuning_v2(base, method, prefix_ids)
    lean(model)
    write_out(model)
    return model


def _lora(base: PreTrainedModel, method: recipes.Lora) -> PeftModel:
    auto.require_linear(base, method.target_modules)
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=list(method.target_modules),
            bias="none",
        ),
    )
    if method.tie_a:
        _tie_a(model)
    return model


def _tie_a(model: PeftModel) -> None:
    """Let the query, key and value projections of every block train one and the same A.

    The update of one layer whose rows are [q | k | v] is B·A with B = [Bq; Bk; Bv]: three
    updates Bq·A, Bk·A, Bv·A. With dropout 0 that is LoRA on ChatGLM2's `query_key_value`,
    step for step; with dropout each of the three draws its own mask.
    """
    tied = 0
    for block in model.modules():
        layers: list[Any] = [getattr(block, name, None) for name in recipes.QUERY_KEY_VALUE]
        if None in layers:
            continue
        query, *others = (layer.lora_A["default"] for layer in layers)
        for other in others:
            if other.weight.shape != query.weight.shape:
                raise ModelError(
                    f"method.tie_a: in {model.config.model_type} the query, key and value "
                    "projections read inputs of different widths; remove method.tie_a"
                )
            other.weight = query.weight
        tied += 1
    if not tied:
        raise ModelError(
            f"method.tie_a: {model.config.model_type} has no attention block with "
            f"{', '.join(recipes.QUERY_KEY_VALUE)} side by side"
        )


# --- what was learned, on disk --------------------------------------------------------------


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that learn, by name, on the CPU; a shared one once."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copy `state` into the parameters that learn; every name must fit.

    Raises:
        AdapterError: a tensor is missing, unexpected or misshapen: never leave one untouched.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise AdapterError(f"{source}: does not fit the model: {'; '.join(sorted(problems)[:5])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def untrained(model: nn.Module) -> list[str]:
    """Return the adapter layers that are still what training started from.

    They are the LoRA B matrices that are still zero, and the layers whose prefix has not moved.
    A is not asked: it has no gradient before its B has moved, so after a single step it rightly
    stands where it stood, and while B is zero the layer is named anyway.
    """
    match model:
        case PTuningV2Model():
            return model.unmoved()
    return [
        name
        for name, parameter in model.named_parameters()
        if ".lora_B." in name and not parameter.any()
    ]


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write what was learned in the layout that stock PEFT reads.

    A prefix is written turned on by P positions, as stock PEFT injects it; beside it lies the
    encoder itself, which comes back to the bit, and which PEFT's layout has no place for when
    there is a projection. An A that several layers share is written once for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    match model:
        case PTuningV2Model():
            config = model.peft_config
            prefix = model.prefix().detach().float()
            flat = rotate_keys(model.base, prefix, config.num_virtual_tokens).flatten(1)
            config.inference_mode = True
            config.save_pretrained(str(folder))
            config.inference_mode = False
            save_file(
                {"prompt_embeddings": flat.cpu().contiguous()}, folder / "adapter_model.safetensors"
            )
            save_file(trainable_state(model), folder / PREFIX_FILE)
        case PeftModel():
            # Embeddings are never resized here, and looking for them asks the hub.
            model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        case _:
            model.save_pretrained(str(folder))  # type: ignore[operator]


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Read into an adapted model what `save_adapter` wrote, or any version of PEFT.

    Raises:
        AdapterError: files are absent, or tensors are missing, unexpected or misshapen.
    """
    match model:
        case PTuningV2Model():
            _load_prefix(model, folder)
        case PeftModel():
            path = weights_of(folder)
            state = {
                name.replace(".weight", ".default.weight") if ".lora_" in name else name: tensor
                for name, tensor in read_weights(path).items()
            }
            load_trainable_state(model, _each_once(model, state, path), path)
        case _:
            load_trainable_state(model, read_weights(folder / "model.safetensors"), folder)


def _load_prefix(model: PTuningV2Model, folder: Path) -> None:
    path, encoder = weights_of(folder), folder / PREFIX_FILE
    state = read_weights(path)
    if set(state) != {"prompt_embeddings"}:
        raise AdapterError(
            f"{path}: found {sorted(state)[:3]}, expected "
            "prompt_embeddings; is it a P-Tuning v2 adapter?"
        )
    flat, shape = state["prompt_embeddings"].float(), model.start.shape
    if flat.shape != model.start.flatten(1).shape:
        raise AdapterError(
            f"{path}: prompt_embeddings has shape {tuple(flat.shape)}, "
            f"expected {tuple(model.start.flatten(1).shape)}"
        )
    prefix = rotate_keys(model.base, flat.view(shape).to(model.base.device), -shape[0])
    if encoder.exists():
        before = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
        load_trainable_state(model, read_weights(encoder), encoder)
        if not torch.allclose(model.prefix().float(), prefix, atol=1e-3, rtol=1e-3):
            load_trainable_state(model, before, encoder)
            raise AdapterError(
                f"{folder}: {PREFIX_FILE} and {path.name} hold different prefixes, so one of "
                "them was exchanged; take both files from one training"
            )
    elif model.peft_config.prefix_projection:
        raise AdapterError(
            f"{folder}: no {PREFIX_FILE}, which a prefix with a projection is read from"
        )
    else:
        model.encoder.embedding.weight.data.copy_(prefix.flatten(1))


def _each_once(model: nn.Module, state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Return `state` without the further copies of parameters that `model` shares.

    Raises:
        AdapterError: the copies of a shared parameter are not all there, or differ.
    """
    kept = dict(state)
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(parameter), name)
        if own == name or not parameter.requires_grad:
            continue
        copy, original = kept.pop(name, None), state.get(own)
        if copy is None:
            raise AdapterError(f"{source}: does not fit the model: missing {name}")
        if original is not None and not torch.equal(copy, original):
            raise AdapterError(
                f"{source}: {own} and {name} differ, but method.tie_a: true has one A for both; "
                "load it with --set method.tie_a=false"
            )
    return kept


def weights_of(folder: Path) -> Path:
    """Return the weights file of a folder in PEFT's layout; safetensors where there are both.

    Raises:
        AdapterError: there is none.
    """
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    inside = folder.iterdir() if folder.is_dir() else ()
    held = ", ".join(sorted(path.name for path in inside)) or "nothing"
    raise AdapterError(f"{folder}: no {' or '.join(WEIGHTS_FILES)} (it holds {held})")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, mapped.

    Raises:
        AdapterError: it is absent or damaged, or holds something else than tensors by name.
    """
    if not path.exists():
        raise AdapterError(f"{path}: no such file")
    try:
        return weights.read(path)
    except ModelError as error:
        raise AdapterError(str(error)) from error


FINGERPRINT = "fingerprint.json"


def write_fingerprint(folder: Path, fingerprint: dict[str, str]) -> None:
    """Write beside an adapter what it belongs to."""
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint, indent=2) + "\n", "utf-8")


def check_fingerprint(folder: Path, expected: dict[str, str]) -> None:
    """Refuse an adapter that was trained on another base, tokenizer, template or label set."""
    path = folder / FINGERPRINT
    if not path.exists():
        raise AdapterError(
            f"{path}: no such file; it is written by `llm-emo train`, and without "
            "it nobody knows which base model and prompt the adapter belongs to"
        )
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: cannot be read as a JSON object: {error}") from error
    differing = [key for key in expected if found.get(key) != expected[key]]
    if differing:
        raise AdapterError(
            f"{folder}: trained with another {', '.join(differing)} than this model and prompt "
            "have; load it with the recipe it was trained with"
        )
