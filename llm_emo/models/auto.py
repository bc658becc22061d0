"""Loading any causal LM of transformers, from disk or from the hub, never with remote code."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from llm_emo import attention, recipes
from llm_emo.encoding import Encoded
from llm_emo.errors import ModelError
from llm_emo.models import facts, loading
from llm_emo.models.source import locate, revision

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
    weights: str
    """Hash of the weights that were loaded, whatever they are kept as: see `hash_weights`."""

    @property
    def dtype(self) -> str:
        """The dtype of activations, as the recipe spells it."""
        return str(self.model.dtype).removeprefix("torch.")

    def fingerprint(self) -> str:
        """Hash of weights and architecture: the config without what leaves the function alone."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _VOLATILE}
        text = json.dumps(config, sort_keys=True, default=str) + self.weights
        return hashlib.sha256(text.encode()).hexdigest()


SAMPLE = 4096
"""Numbers that are hashed of every matrix."""


def hash_weights(model: PreTrainedModel, files: list[Path]) -> str:
    """Hash samples of a model's weights, which tell two models of one architecture apart.

    All norms and biases, and of every matrix its middle row: whoever trains a matrix, or merges
    a LoRA update into it, changes that row too. Quantisation leaves norms and biases alone, but
    not matrices, so these are read from the files. Rounded to bfloat16, numbers are the same in
    whichever dtype a model was saved and loaded.

    A matrix whose name in the files is not its name in the model is left out (old checkpoints
    that transformers renames on loading).
    """
    parameters = dict(model.named_parameters())
    samples = {name: p.detach() for name, p in parameters.items() if p.dim() == 1}
    samples |= {name: row for name, row in _middle_rows(files) if name in parameters}
    digest = hashlib.sha256()
    for name, numbers in sorted(samples.items()):
        digest.update(name.encode())
        digest.update(numbers.cpu().bfloat16().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _middle_rows(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the beginning of the middle row of every matrix, without reading the rest."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                matrix = file.get_slice(name)
                rows, *columns = matrix.get_shape() or [0]
                if rows and columns:
                    yield name, matrix[rows // 2].flatten()[:SAMPLE]


def weight_files(spec: recipes.Model, commit: str | None) -> list[Path]:
    """Return the safetensors files that `spec` was loaded from.

    Args:
        spec: The recipe's model.
        commit: Of a hub model, the commit that its revision stands for.
    """
    source, _ = locate(spec)

    def find(name: str) -> Path | None:
        if spec.origin != "hub":
            path = Path(source) / name
            return path if path.is_file() else None
        found = try_to_load_from_cache(source, name, revision=commit or spec.revision)
        return Path(found) if isinstance(found, str) else None

    if single := find("model.safetensors"):
        return [single]
    if index := find("model.safetensors.index.json"):
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return [path for name in sorted(names) if (path := find(name))]
    return []


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
    source, arguments = locate(spec)
    with _explained(spec):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **arguments)


def load(spec: recipes.Model, method: recipes.Method) -> Base:
    """Load model and tokenizer as the recipe says.

    Raises:
        ModelError: absent, unreadable, of an unknown architecture, or in need of remote code.
        JobFailed: the hub cannot be reached.
    """
    source, arguments = locate(spec)
    where, dtype = device(), dtype_of(spec, method)
    if not sys.stderr.isatty():  # in a log file a bar is noise
        logging.disable_progress_bar()
    if spec.quantization != "none":
        from llm_emo.models import quantised

        arguments["quantization_config"] = quantised.config(spec.quantization, dtype)
    tokenizer = load_tokenizer(spec)
    with _explained(spec):
        AutoConfig.from_pretrained(source, trust_remote_code=False, **revision(spec))
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
    if getattr(model, "hf_quantizer", None) is not None:  # asked for, or stored so
        from llm_emo.models import quantised  # bitsandbytes takes a second to import

        quantised.settle(model)
    files = weight_files(spec, getattr(model.config, "_commit_hash", None))
    return Base(model, tokenizer, spec.name, spec.revision, hash_weights(model, files))


def sketch(spec: recipes.Model) -> PreTrainedModel:
    """Return the model without weights, on the meta device: its layers, names and shapes.

    Raises:
        ModelError: absent, of an unknown architecture, or in need of remote code.
        JobFailed: the hub cannot be reached.
    """
    source, arguments = locate(spec)
    with _explained(spec), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **arguments)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def shape(model: nn.Module) -> facts.Shape:
    """Return what a check holds a recipe against."""
    return facts.Shape(
        kind=model.config.model_type,  # type: ignore[union-attr, arg-type]
        words=model.get_input_embeddings().num_embeddings,  # type: ignore[operator]
        linear=_linear(model),
    )


def require_linear(model: nn.Module, names: Sequence[str]) -> None:
    """Hold that `model` has linear layers of these names.

    Raises:
        ModelError: it has not; the message names those that it has.
    """
    facts.require_linear(model.config.model_type, _linear(model), names)  # type: ignore[union-attr, arg-type]


def require_known(name: str, model: nn.Module, rows: Iterable[Encoded]) -> None:
    """Hold that `model` has an embedding for every token of these rows.

    Raises:
        ModelError: it has not.
    """
    facts.require_known(name, model.get_input_embeddings().num_embeddings, rows)  # type: ignore[operator]


def _linear(model: nn.Module) -> tuple[str, ...]:
    """Return the last names of all linear layers, sorted."""
    layers = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return tuple(sorted({name.rpartition(".")[2] for name in layers}))


def _explained(spec: recipes.Model) -> contextlib.AbstractContextManager[None]:
    """Return what turns transformers' errors about a recipe's model into one message."""
    instead = "download the model elsewhere and name its folder with --set model.name=FOLDER "
    return loading.explained(
        spec.name,
        offline=f"{instead}--set model.revision=null" if spec.origin == "hub" else None,
        native=" (ChatGLM2: download it, and `llm-emo convert` makes one of it)",
    )
