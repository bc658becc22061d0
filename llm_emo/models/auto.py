"""Loading any causal LM of transformers, from disk or from the hub, never with remote code."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from llm_emo import attention, recipes
from llm_emo.errors import JobFailed, ModelError
from llm_emo.models import bundled

# Of the config, what a user may change without changing the function that is computed.
_VOLATILE = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "quantization_config", "_attn_implementation_autoset", "attn_implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base model with its tokenizer, and what identifies it."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    revision: str | None
    vectors: str
    """Hash of the weights as they were loaded, from the norms and biases: see `hash_vectors`."""

    @property
    def dtype(self) -> str:
        """The dtype of activations, as the recipe spells it."""
        return str(self.model.dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        """Hash of weights and architecture: the config without what leaves the function alone."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _VOLATILE}
        text = json.dumps(config, sort_keys=True, default=str) + self.vectors
        return hashlib.sha256(text.encode()).hexdigest()


def hash_vectors(model: nn.Module) -> str:
    """Hash the norms and biases of a model, which tell two models of one architecture apart.

    They are small, and quantisation leaves them alone; rounded to bfloat16 they are the same
    whichever dtype the model was loaded in.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().bfloat16().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def device() -> torch.device:
    """Return the accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def best_dtype(where: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it natively, else float32.

    Never float16: on CPUs it is emulated (tens of times slower), and it overflows in training.
    """
    if where.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_of(spec: recipes.Model, method: recipes.Method) -> torch.dtype:
    """Return what `spec.dtype` means on this machine.

    Full fine-tuning keeps its weights in float32 under `auto`: updates of 1e-5 of a weight's
    size vanish in bfloat16's eight bits.
    """
    match spec.dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            full = isinstance(method, recipes.Full)
            return torch.float32 if full else best_dtype(device())


def load_tokenizer(spec: recipes.Model) -> Any:
    """Load the tokenizer alone.

    Raises:
        ModelError: there is no tokenizer at this name.
    """
    source, arguments = _source(spec)
    with _explained(spec):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **arguments)


def load(spec: recipes.Model, method: recipes.Method) -> Base:
    """Load model and tokenizer as the recipe says.

    Raises:
        ModelError: absent, unreadable, of an unknown architecture, or in need of remote code.
        JobFailed: the hub cannot be reached.
    """
    source, arguments = _source(spec)
    where, dtype = device(), dtype_of(spec, method)
    if not sys.stderr.isatty():  # in a log file a bar is noise
        logging.disable_progress_bar()
    if spec.quantization != "none":
        arguments["quantization_config"] = _quantization(spec.quantization, dtype)
    tokenizer = load_tokenizer(spec)
    with _explained(spec):
        AutoConfig.from_pretrained(source, trust_remote_code=False, **_revision(spec))
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": where},
            attn_implementation=attention.NAME,
            trust_remote_code=False,
            use_safetensors=True,  # a pickled checkpoint is code
            output_loading_info=True,
            **arguments,
        )
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise ModelError(
            f"{spec.name}: its checkpoint lacks {len(info['missing_keys'])} of the model's "
            f"tensors, such as {min(info['missing_keys'])}; is it complete?"
        )
    if spec.quantization == "nf4" and where.type == "cpu":
        # On CPUs with AVX512-BF16 an eval-mode forward repacks the weights in place, and the
        # next training step fails; without the repacking train and eval can alternate.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return Base(model, tokenizer, spec.name, spec.revision, hash_vectors(model))


def _quantization(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _revision(spec: recipes.Model) -> dict[str, Any]:
    return {"revision": spec.revision} if spec.origin == "hub" else {"local_files_only": True}


def _source(spec: recipes.Model) -> tuple[str, dict[str, Any]]:
    match spec.origin:
        case "bundled":
            return str(bundled.folder()), _revision(spec)
        case "folder":
            folder = Path(spec.name).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(
                    f"model.name: {spec.name!r} is no folder with a config.json; name a local "
                    f"model folder, {recipes.BUNDLED_MODEL!r} (bundled), or a Hugging Face id "
                    "with model.revision. ChatGLM2-6B: a folder with its weights in transformers' "
                    "own GLM layout, --set model.name=FOLDER"
                )
            return str(folder), _revision(spec)
        case "hub":
            return spec.name, _revision(spec)


_EXPECTED = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


class _explained:  # reads as a statement: `with _explained(spec)`
    """Turn what transformers raises on loading into one message for the user."""

    def __init__(self, spec: recipes.Model) -> None:
        self.spec = spec

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, _EXPECTED) or isinstance(error, torch.OutOfMemoryError):
            return
        name = self.spec.name
        text = " ".join(str(error).split())
        if "trust_remote_code" in text or "custom code" in text:
            raise ModelError(
                f"{name}: its checkpoint asks to run code that it ships, which is never done "
                "here; take a model whose architecture transformers has itself"
            ) from error
        if self.spec.origin == "hub" and any(
            word in text.lower() for word in ("connect", "offline", "resolve", "network", "timed")
        ):
            raise JobFailed(
                f"{name}: the Hugging Face hub cannot be reached; download the model elsewhere "
                "and name its folder with --set model.name=FOLDER --set model.revision=null"
            ) from error
        raise ModelError(f"{name}: cannot be loaded: {text[:400]}") from error
