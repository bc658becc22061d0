"""LLaMA-Factory's side of `train.py`, in an environment of its own.

    python scripts/bench/common/llama_factory.py CONFIG

Run so, by the Python of that environment, it trains what CONFIG says, a JSON file that `prepare`
wrote, and prints what `train.py` prints for a side.

LLaMA-Factory pins other versions of transformers, PEFT, TRL and datasets than this program; they
are installed where only that environment sees them, over this one's torch.
"""

import importlib.machinery
import importlib.util
import itertools
import json
import sys
import time
import types
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common import environment, harness, trainers

REQUIREMENTS = ("llamafactory==0.9.5",)
CONFIG = "config.json"
SETTINGS = (
    "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "max_grad_norm",
    "optim", "seed", "use_cpu", "per_device_train_batch_size",
)  # fmt: skip
"""What this program's arguments and LLaMA-Factory's have in common."""


def python() -> Path:
    """Return the Python of LLaMA-Factory's environment, made on first use.

    Raises:
        JobFailed: its dependencies cannot be had.
    """
    torch = metadata.version("torch").partition("+")[0]
    return environment.python_of(
        "llama_factory",
        REQUIREMENTS,
        constraints=[f"torch=={torch}"],
        # For images and sound only; built for CUDA, they cannot be imported beside a torch without.
        without=("torchvision", "torchaudio"),
    )


def prepare(folder: Path, recipe: Any, steps: trainers.Steps, warm_up: int) -> Path:
    """Write rows and arguments for LLaMA-Factory; return the config.

    Raises:
        RecipeError: the model is in no local folder, or its weights are quantised.
    """
    from llm_emo.errors import RecipeError
    from llm_emo.models import auto, bundled
    from llm_emo.training import training_arguments

    model, method = recipe.model, recipe.method
    if model.origin == "hub" or model.quantization != "none":
        raise RecipeError("llama_factory: takes the bundled model or a local folder, not quantised")
    source = bundled.folder() if model.origin == "bundled" else Path(model.name)
    trainers.labelled([row for step in steps for row in step]).save_to_disk(
        folder / "rows" / "train"
    )
    (folder / "rows" / "dataset_dict.json").write_text('{"splits": ["train"]}', "utf-8")
    own = training_arguments(folder / "out", recipe.train, seed=recipe.seed, metric="none")
    dtype = str(auto.dtype_of(model, method)).rpartition(".")[2]
    arguments = {name: getattr(own, name) for name in SETTINGS} | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(_loaded_in(dtype, source, folder / "model")),
        "dataset": "rows",
        "template": "empty",  # rows are encoded already
        "tokenized_path": str(folder / "rows"),
        "finetuning_type": "lora",
        "lora_rank": method.rank,
        "lora_alpha": int(method.alpha),
        "lora_dropout": 0.0,
        "lora_target": ",".join(method.target_modules),
        "output_dir": str(folder / "out"),
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "bf16": dtype == "bfloat16",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments["lr_scheduler_type"] = str(getattr(own.lr_scheduler_type, "value", "linear"))
    arguments["optim"] = str(getattr(own.optim, "value", own.optim))
    written = folder / CONFIG
    written.write_text(json.dumps({"arguments": arguments, "warm_up": warm_up}), "utf-8")
    return written


def _loaded_in(dtype: str, source: Path, folder: Path) -> Path:
    """Make a folder that holds the same model, in this dtype as its config has it.

    LLaMA-Factory loads weights in the dtype that their config names and lays autocast over them;
    so a checkpoint in float32 would keep norms and residuals in float32 under its `bf16`.
    """
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)  # as older versions call it
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}), "utf-8")
    return folder


def _without_sound() -> None:
    """Let LLaMA-Factory import torchaudio, which it does at once and texts have no use for."""
    name = "torchaudio"
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Train with LLaMA-Factory; return seconds, losses, and what its batches held."""
    import torch

    _without_sound()
    from llamafactory.train.tuner import run_exp
    from transformers import Trainer, TrainerCallback

    ends: list[float] = []
    losses: list[Any] = []
    batches: list[Any] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            harness.forget_peak()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            harness.synchronise()
            ends.append(time.perf_counter())

    step = Trainer.training_step

    def recorded(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept = ("input_ids", "labels", "attention_mask")
        batches.append({name: inputs[name] for name in kept})
        losses.append(step(self, model, inputs, *args, **kwargs))
        return losses[-1]

    Trainer.training_step = recorded
    run_exp(args=config["arguments"], callbacks=[Clock()])
    memory = harness.peak_memory()
    names = ("llamafactory", "torch", "transformers", "peft")
    seconds = [end - start for start, end in itertools.pairwise(ends)][config["warm_up"] - 1 :]
    tokens: Sequence[int] = [trainers.tokens_in(batch) for batch in batches[config["warm_up"] :]]
    rows = config["arguments"]["per_device_train_batch_size"]
    return {
        "side": "llama_factory",
        "examples_per_second": rows * len(seconds) / sum(seconds) if seconds else None,
        "loss": float(losses[0]),
        "losses": [float(loss) for loss in losses],
        "seconds_per_step": seconds,
        "trained": trainers.fingerprint(batches),
        "targets": sum(trainers.trained(batch).total() for batch in batches),
        "tokens_per_step": sum(tokens) / max(len(tokens), 1),
        "peak_memory_bytes": memory,
        "matrix": None,
        "machine": {
            "versions": {name: metadata.version(name) for name in names},
            "threads": torch.get_num_threads(),
        },
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text("utf-8")))))
