"""Train: an experiment, a model and a run folder brought together."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_emo import checkpoints, methods, metrics, native, optimizers, recipes, runs, training
from llm_emo.decoder_layer import packed_bytes
from llm_emo.encoded_rows import encoded
from llm_emo.encoding import Encoded
from llm_emo.errors import JobFailed, RecipeError
from llm_emo.experiment import AnyExperiment, BaselineExperiment, Experiment, dialogues_of
from llm_emo.labelling import Labeller, open_labeller
from llm_emo.machine import PeakMemory, processes, say, writing
from llm_emo.models import auto
from llm_emo.protocols import Protocol
from llm_emo.steps import Steps
from llm_emo.types import Example


class Progress(TrainerCallback):
    """The progress bar, and `log.jsonl`.

    The bar shows the loss, examples per second, and how many of the batches' tokens were run
    and how many the trie saved.
    """

    def __init__(
        self,
        log: Path,
        counts: Any,
        idle: Callable[[nn.Module], list[str]] = methods.untrained,
    ) -> None:
        self.log, self.counts, self.find_idle = log, counts, idle
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
            shown = f"loss {logs['loss']:.3f}, {counts['examples_per_second']:.1f} examples/s"
            if counts["tokens_saved"]:
                share = counts["tokens_saved"] / (counts["tokens_run"] + counts["tokens_saved"])
                shown += f", {share:.0%} of tokens saved"
            self.bar.set_postfix_str(shown)
        elif any(name.startswith("eval_") for name in logs):
            values = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
            text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            tqdm.write(f"dev at step {state.global_step}: {text}", file=sys.stderr)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which layers have learned nothing so far; afterwards the best state is loaded."""
        self.idle = self.find_idle(kwargs["model"])

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

    experiment: AnyExperiment
    model: nn.Module
    rows: Sequence[Any]
    steps: Steps
    settings: recipes.Train
    task: training.Task
    measure: Callable[[nn.Module], Mapping[str, float]]
    """Gives the protocol's metrics on dev."""
    keep: Callable[[Path], None]
    """Writes what was learned, into a folder that it makes."""
    facts: Mapping[str, Any]
    """What the run folder says of model and rows."""
    learned: Callable[[], Mapping[str, Any]] = dict
    """Gives what it says of the trained parameters."""
    peak: PeakMemory = field(default_factory=PeakMemory)
    """Of memory, since the model was opened."""


@dataclass(frozen=True)
class Fitted:
    """A model that is fitted at once, without steps."""

    rows: int
    parameters: int
    seconds: float
    keep: Callable[[Path], None]
    facts: Mapping[str, Any]
    peak: PeakMemory = field(default_factory=PeakMemory)


def prepare(experiment: AnyExperiment) -> Job | Fitted:
    """Load the model and encode the rows: all that can fail before there is a run folder.

    Raises:
        RecipeError: the method trains nothing, or there are no dialogues to batch by.
        ModelError: the model cannot be used.
        PromptError: an example leaves no room for its answer.
    """
    peak = PeakMemory.begin()
    return dataclasses.replace(_prepare(experiment), peak=peak)


def _prepare(experiment: AnyExperiment) -> Job | Fitted:
    settings = experiment.recipe.train
    if isinstance(experiment, BaselineExperiment) and settings is None:
        from llm_emo.baselines import fitting

        return fitting.fit(experiment)
    if settings is None:
        kind = experiment.recipe.method.kind
        raise RecipeError(f"method {kind} trains nothing; use `llm-emo evaluate RECIPE`")
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
    if isinstance(experiment, Experiment):
        return _prepare_llm(experiment, settings)
    from llm_emo.baselines import fitting

    return fitting.prepare(experiment, settings)


def _prepare_llm(experiment: Experiment, settings: recipes.Train) -> Job:
    recipe, state = experiment.recipe, processes()
    dialogues = dialogues_of(experiment)
    dev = experiment.examples("dev")
    labeller = open_labeller(experiment)
    base, model = labeller.base, labeller.model
    say(f"{base.name} in {base.dtype} on {base.model.device}: {methods.count_parameters(model)}")
    rows = encoded(labeller.encoder, experiment.examples("train"))
    # Found now rather than after an epoch.
    auto.require_known(base.name, base.model, [*rows, *labeller.encoder.encode(dev)])

    task, order = _remedied(labeller, rows, settings)
    steps = Steps(
        rows, settings, seed=recipe.seed, dialogues=dialogues, order=order,
        rank=state.process_index, world=state.num_processes,
    )  # fmt: skip
    shortened = sum(row.dropped > 0 for row in rows)
    if shortened:
        say(f"{shortened} of {len(rows)} training texts were shortened to prompt.max_length")

    def keep(folder: Path) -> None:
        methods.save_adapter(model, folder)
        methods.write_fingerprint(folder, labeller.fingerprint())

    return Job(
        experiment,
        model,
        rows,
        steps,
        settings,
        task,
        _Dev(labeller, dev).measure,
        keep,
        {
            "dtype": base.dtype,
            "native": native.serves(base.model.get_input_embeddings().weight),
            "packed": base.model.device.type == "cpu" and packed_bytes(model) > 0,
            "shortened_texts": shortened,
        },
    )


def _remedied(
    labeller: Labeller, rows: Sequence[Encoded], settings: recipes.Train
) -> tuple[training.Task, Callable[[int], Sequence[int]] | None]:
    """Return what is learned and in what order, with what the recipe does about rare classes."""
    option, seed = settings.imbalance, labeller.experiment.recipe.seed
    if option is None:
        return training.Answers(), None
    from llm_emo import llm_imbalance as remedies
    from llm_emo.baselines.imbalance import class_counts

    answers = labeller.encoder.answers(labeller.experiment.answers)
    counts = class_counts(remedies.classes_of(rows, answers), len(answers))
    task = remedies.RemediedAnswers(option, answers, counts)
    if option.kind != "resampling":
        return task, None
    return task, lambda epoch: remedies.order(option, rows, answers, seed=seed, epoch=epoch)


def train(job: Job | Fitted, run: runs.Run, *, resume: bool) -> dict[str, Any]:
    """Train the recipe's method and leave the best state on dev in the run's adapter folder.

    Every process of an `accelerate launch` calls this; the first one writes.

    Raises:
        JobFailed: a layer learned nothing, or the disk is full.
    """
    if isinstance(job, Fitted):
        return _keep_fitted(job, run)
    experiment, settings = job.experiment, job.settings
    checkpoint = checkpoints.newest(run.checkpoints) if resume else None
    trainer: training.EmoTrainer
    progress = Progress(run.log, lambda: trainer.counts(), job.task.idle)
    trainer = training.EmoTrainer(
        job.model,
        training.training_arguments(
            run.checkpoints,
            settings,
            seed=experiment.recipe.seed,
            metric=experiment.protocol.metrics[0],
        ),
        rows=job.rows,
        steps=job.steps,
        validate=job.measure,
        callbacks=[
            progress,
            training.EvaluateAndSave(len(job.steps), settings.evaluations_per_epoch),
            *training.stopping(settings),
            *training.tensorboard(run.folder / "tensorboard"),
        ],
        task=job.task,
        optimizer=optimizers.make(settings, job.model.parameters()),
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
            keep(run, summary, job.keep)
        state.wait_for_everyone()
    return summary


def _summary(trainer: training.EmoTrainer, job: Job) -> dict[str, Any]:
    state, count = trainer.state, methods.count_parameters(job.model)
    metric, step, value = trainer.kept()
    epochs = state.global_step / len(job.steps)
    return {
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "device": str(next(job.model.parameters()).device),
        "training_rows": len(job.rows),
        "steps": state.global_step,
        "kept_step": step,
        "kept_dev": {metric: value},
        **job.facts,
        **job.learned(),
        **trainer.counts(),
        "seconds_per_epoch": trainer.totals["seconds"] / epochs if epochs else None,
        "peak_memory_bytes": job.peak.read(),
    }


def _keep_fitted(job: Fitted, run: runs.Run) -> dict[str, Any]:
    summary = {
        "trainable_parameters": job.parameters,
        "total_parameters": job.parameters,
        "device": "cpu",
        "training_rows": job.rows,
        "steps": 0,
        "kept_step": 0,
        "kept_dev": {},
        **job.facts,
        "tokens_run": 0,
        "tokens_saved": 0,
        "examples_per_second": job.rows / job.seconds,
        "seconds_per_epoch": job.seconds,
        "peak_memory_bytes": job.peak.read(),
    }
    state = processes()
    with writing(run.folder, "make room and begin anew"):
        if state.is_main_process:
            keep(run, summary, job.keep)
    state.wait_for_everyone()
    return summary


def keep(run: runs.Run, summary: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write the summary, then what was learned, complete or not at all: it marks the end."""
    partial = run.folder / ".adapter.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        recorded = {**run.environment, "training": dict(summary)}
        runs.write_json(run.folder / "environment.json", recorded)
        partial.rename(run.adapter)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def measured(rows: Sequence[tuple[str, str, str | None]], protocol: Protocol) -> dict[str, float]:
    """Return the protocol's metrics of rows of uid, gold label and predicted label."""
    gold, predicted = [gold for _, gold, _ in rows], [label for _, _, label in rows]
    return {
        name: metrics.point(
            gold, predicted, protocol.labels, name, averaged_over=protocol.averaged_over
        )
        for name in protocol.metrics
    }


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
        return measured(rows, self.labeller.experiment.protocol)
