"""Train: an experiment, a model and a run folder brought together."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_emo import checkpoints, methods, metrics, recipes, runs, training
from llm_emo.encoded_rows import encoded
from llm_emo.encoding import Encoded
from llm_emo.errors import JobFailed, RecipeError
from llm_emo.experiment import Experiment
from llm_emo.labelling import Labeller, open_labeller
from llm_emo.machine import processes, say, writing
from llm_emo.models import auto
from llm_emo.steps import Steps, dialogues_of
from llm_emo.types import Example


class Progress(TrainerCallback):
    """The progress bar, and `log.jsonl`.

    The bar shows the loss, examples per second, and how many of the batches' tokens were run
    and how many the trie saved.
    """

    def __init__(self, log: Path, counts: Any) -> None:
        self.log, self.counts = log, counts
        self.idle: list[str] = []
        self.bar: Any = None
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step that training continues from, and take the log back to it."""
        if state.is_world_process_zero and self.log.exists():
            lines = self.log.read_text("utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= state.global_step]
            partial = self.log.with_name(f".{self.log.name}.tmp")
            partial.write_text("".join(kept), "utf-8")
            partial.replace(self.log)
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step",
                        disable=not state.is_world_process_zero)  # fmt: skip
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on."""
        self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers and append them to the log."""
        if not state.is_world_process_zero or logs is None:
            return
        counts = self.counts()
        entry = {"step": state.global_step, **logs}
        if "loss" in logs:
            entry |= counts
            share = counts["tokens_saved"] / (counts["tokens_run"] + counts["tokens_saved"])
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {counts['examples_per_second']:.1f} examples/s, "
                f"{share:.0%} of tokens saved"
            )
        elif any(name.startswith("eval_") for name in logs):
            shown = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
            text = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
            tqdm.write(f"dev at step {state.global_step}: {text}", file=sys.stderr)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which layers have learned nothing so far; afterwards the best state is loaded."""
        self.idle = methods.untrained(kwargs["model"])

    def close(self) -> None:
        """Close the bar, so that nothing is drawn over what is printed next."""
        if self.bar is not None:
            self.bar.close()


def _step(line: str) -> float:
    """Return the step of a line of the log; of a half-written one, infinity."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return float("inf")


@dataclass(frozen=True)
class Job:
    """Everything that training needs, before anything is written."""

    labeller: Labeller
    rows: Sequence[Encoded]
    dev: Sequence[Example]
    steps: Steps
    settings: recipes.Train

    @property
    def shortened(self) -> int:
        """Training texts that lost their end or some history to `prompt.max_length`."""
        return sum(row.dropped > 0 for row in self.rows)


def prepare(experiment: Experiment) -> Job:
    """Load the model and encode the rows: all that can fail before there is a run folder.

    Raises:
        RecipeError: the method trains nothing, or there are no dialogues to batch by.
        ModelError: the model cannot be used.
        PromptError: an example leaves no room for its answer.
    """
    recipe = experiment.recipe
    settings = recipe.train
    if settings is None:
        raise RecipeError("method zero_shot trains nothing; use `llm-emo evaluate RECIPE`")
    state = processes()
    if (
        state.num_processes == 1
        and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and "MASTER_ADDR" in os.environ  # set for several processes only
    ):
        say(
            "one process: `accelerate launch --cpu` starts more only through MPI; "
            "`accelerate launch --multi_gpu --num_processes 2` starts two, also without a GPU"
        )
    dialogues = dialogues_of(experiment)
    dev = experiment.examples("dev")
    labeller = open_labeller(experiment)
    base, model = labeller.base, labeller.model
    say(f"{base.name} in {base.dtype} on {base.model.device}: {methods.count_parameters(model)}")
    rows = encoded(labeller.encoder, experiment.examples("train"))
    # Found now rather than after an epoch.
    auto.require_known(base.name, base.model, [*rows, *labeller.encoder.encode(dev)])

    steps = Steps(
        rows, settings, seed=recipe.seed, dialogues=dialogues,
        rank=state.process_index, world=state.num_processes,
    )  # fmt: skip
    job = Job(labeller, rows, dev, steps, settings)
    if job.shortened:
        say(f"{job.shortened} of {len(rows)} training texts were shortened to prompt.max_length")
    return job


def train(job: Job, run: runs.Run, *, resume: bool) -> dict[str, Any]:
    """Train the recipe's method and leave the best state on dev in the run's adapter folder.

    Every process of an `accelerate launch` calls this; the first one writes.

    Raises:
        JobFailed: an adapter layer learned nothing, or the disk is full.
    """
    experiment, settings = job.labeller.experiment, job.settings
    checkpoint = checkpoints.newest(run.checkpoints) if resume else None
    trainer: training.TrieTrainer
    progress = Progress(run.log, lambda: trainer.counts())
    trainer = training.TrieTrainer(
        job.labeller.model,
        training.training_arguments(
            run.checkpoints,
            settings,
            seed=experiment.recipe.seed,
            metric=experiment.protocol.metrics[0],
        ),
        rows=job.rows,
        steps=job.steps,
        validate=_Dev(job.labeller, job.dev).measure,
        callbacks=[
            progress,
            training.EvaluateAndSave(len(job.steps), settings.evaluations_per_epoch),
            *training.stopping(settings),
            *training.tensorboard(run.folder / "tensorboard"),
        ],
    )
    if resume:
        say(
            f"{run.folder}: no checkpoint yet; training starts from the beginning"
            if checkpoint is None
            else f"continuing from {checkpoint}"
        )
    with writing(run.folder, "make room and continue with --resume"):
        with contextlib.closing(progress):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if progress.idle:
            raise JobFailed(
                f"{len(progress.idle)} adapter layers learned nothing (first: "
                f"{progress.idle[0]}): the gradient does not reach them, or every step was a "
                "warm-up step with a learning rate of 0"
            )
        summary = _summary(trainer, job)
        state = processes()
        if state.is_main_process:
            _keep(job.labeller, run, summary)
        state.wait_for_everyone()
    return summary


def _summary(trainer: training.TrieTrainer, job: Job) -> dict[str, Any]:
    state, labeller = trainer.state, job.labeller
    count = methods.count_parameters(labeller.model)
    return {
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "dtype": labeller.base.dtype,
        "device": str(labeller.base.model.device),
        "training_rows": len(job.rows),
        "shortened_texts": job.shortened,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "best_dev": {trainer.args.metric_for_best_model: state.best_metric},
        **trainer.counts(),
    }


def _keep(labeller: Labeller, run: runs.Run, summary: Mapping[str, Any]) -> None:
    """Write the summary, then the adapter, complete or not at all: it is what marks the end."""
    partial = run.folder / ".adapter.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        methods.save_adapter(labeller.model, partial)
        methods.write_fingerprint(partial, labeller.fingerprint())
        recorded = {**run.environment, "training": dict(summary)}
        runs.write_json(run.folder / "environment.json", recorded)
        partial.rename(run.adapter)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Dev:
    """The dev split, scored in shares by all processes."""

    def __init__(self, labeller: Labeller, examples: Sequence[Example]) -> None:
        self.labeller, self.examples = labeller, examples

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the protocol's metrics on dev."""
        state = processes()
        share = self.examples[state.process_index :: state.num_processes]
        own = [(p.uid, p.gold or "", p.label) for p in self.labeller.predict(share)]
        rows = gather_object(own) if state.num_processes > 1 else own
        if len({uid for uid, _, _ in rows}) != len(self.examples):
            raise JobFailed("dev rows were lost or doubled between processes")
        protocol = self.labeller.experiment.protocol
        gold, predicted = [gold for _, gold, _ in rows], [label for _, _, label in rows]
        return {
            name: metrics.point(
                gold, predicted, protocol.labels, name, averaged_over=protocol.averaged_over
            )
            for name in protocol.metrics
        }
