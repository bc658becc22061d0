"""Train and predict: an experiment, a model and a run folder brought together."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from llm_emo import checkpoints, methods, metrics, parsing, recipes, runs, training
from llm_emo.encoding import Encoded, Encoder
from llm_emo.errors import JobFailed, RecipeError, RunError
from llm_emo.experiment import Experiment
from llm_emo.fetch import sha256_of
from llm_emo.inference import generate, score
from llm_emo.models import auto
from llm_emo.predictions import Header, Journal, read
from llm_emo.trie import verify
from llm_emo.types import Completion, Example, Prediction, Split


@dataclass(frozen=True)
class Labeller:
    """A model, adapted or not, with everything that turns examples into predictions."""

    experiment: Experiment
    base: auto.Base
    model: nn.Module
    encoder: Encoder

    def predict(self, examples: Sequence[Example]) -> Iterator[Prediction]:
        """Yield one prediction per example, in the order in which they were computed."""
        encoded = self.encoder.encode(examples)
        inference = self.experiment.recipe.inference
        prompts = [row.prompt for row in encoded]
        match inference.mode:
            case "score":
                for index, values in score(
                    self.model,
                    prompts,
                    self.encoder.answers(self.experiment.answers),
                    tokens_per_pass=inference.tokens_per_pass,
                ):
                    yield self._scored(examples[index], values)
            case "generate":
                for index, ids in generate(
                    self.model,
                    prompts,
                    ends=frozenset({self.encoder.end}),
                    max_new_tokens=inference.max_new_tokens,
                    tokens_per_pass=inference.tokens_per_pass,
                ):
                    example = examples[index]
                    yield self._parsed(example, Completion(example.uid, self.encoder.decode(ids)))

    def _scored(self, example: Example, log_probabilities: list[float]) -> Prediction:
        names = self.experiment.labels.names
        shares = torch.tensor(log_probabilities, dtype=torch.float64).softmax(0).tolist()
        best = max(range(len(names)), key=shares.__getitem__)
        return Prediction(
            uid=example.uid,
            gold=example.gold,
            label=names[best],
            outcome="scored",
            probabilities=dict(zip(names, shares, strict=True)),
        )

    def _parsed(self, example: Example, completion: Completion) -> Prediction:
        parsed = parsing.parse(
            completion.text, self.experiment.labels, self.experiment.prompt.answer
        )
        return Prediction(
            uid=example.uid,
            gold=example.gold,
            label=parsed.label,
            outcome=parsed.outcome,
            completion=completion.text,
        )

    def fingerprint(self) -> dict[str, str]:
        """Return what an adapter trained here belongs to."""
        experiment = self.experiment
        return {
            "base model": self.base.fingerprint(),
            "tokenizer": self.encoder.fingerprint()["tokenizer"],
            "chat template": self.encoder.fingerprint()["template"],
            "prompt": _sha256(experiment.prompt.verbatim),
            "label set": _sha256(json.dumps(experiment.labels_json(), sort_keys=True)),
        }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def open_labeller(experiment: Experiment, run: runs.Run | None = None) -> Labeller:
    """Load the recipe's model, wrapped by its method; with a run, its adapter too.

    Raises:
        ModelError: the model cannot be used.
        AdapterError: the adapter belongs to another base, tokenizer, template or label set.
        RunError: the run has no adapter yet.
    """
    recipe = experiment.recipe
    processes()  # before any weight is placed: it chooses each process's device
    if run is not None:
        _require_finished(run)
    set_seed(recipe.seed)
    base = auto.load(recipe.model, recipe.method)
    encoder = Encoder(base.tokenizer, recipe.prompt.max_length)
    prefix_ids: Sequence[int] = ()
    match recipe.method:
        case recipes.PTuningV2(init_text=str(text)):
            prefix_ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    model = methods.adapt(base.model, recipe.method, prefix_ids=prefix_ids)
    verify(model)
    labeller = Labeller(experiment, base, model, encoder)
    if run is not None:
        methods.check_fingerprint(run.adapter, labeller.fingerprint())
        methods.load_adapter(model, run.adapter)
    return labeller


def _require_finished(run: runs.Run) -> None:
    if not run.finished:
        raise RunError(
            f"{run.folder}: training has not finished; continue it with "
            f"`llm-emo train {run.folder / 'recipe.yaml'} -o {run.folder} --resume`"
        )


def processes() -> PartialState:
    """Return this process's place among those that `accelerate launch` or `torchrun` started.

    Without a GPU they talk through gloo; accelerate would take each for a job of its own unless
    told that there is none.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def say(text: str) -> None:
    """Write a line of progress, once per job."""
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def writing(place: Path, then: str) -> Iterator[None]:
    """Turn a disk that is full or cannot be written into one message about `place`.

    Args:
        place: what is written.
        then: what to do once there is room.

    Raises:
        JobFailed: the disk failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in runs.DISK:
            raise
        raise JobFailed(f"{place}: cannot be written: {error.strerror}; {then}") from error
    except SafetensorError as error:  # no OSError, whatever its reason
        if "os error" not in str(error):
            raise
        reason = str(error).rpartition("I/O error: ")[2]
        raise JobFailed(f"{place}: cannot be written: {reason}; {then}") from error


# --- predict ------------------------------------------------------------------------------------


def predict(experiment: Experiment, run: runs.Run | None, split: Split, folder: Path) -> Path:
    """Predict a split into `folder`, continuing what an earlier job left; return the file.

    What is predicted already needs no model. Every process of an `accelerate launch` calls this
    and takes a share of the rows; the first one writes.

    Raises:
        RunError: the file is there already, made under something else.
    """
    examples = experiment.examples(split)
    path = runs.predictions_path(folder, split)
    if run is not None:
        _require_finished(run)
    header = _header(experiment, run, split)
    if path.exists():
        found, rows = read(path)
        # Finished predictions stay what they are when a package is upgraded.
        found = found.model_copy(update={"versions": header.versions})
        if found != header or {row.uid for row in rows} != {example.uid for example in examples}:
            differing = [
                name
                for name in Header.model_fields
                if getattr(found, name) != getattr(header, name)
            ]
            raise RunError(
                f"{path}: made under another {', '.join(differing) or 'set of rows'}; move it "
                "away, or choose another folder with -o"
            )
        return path
    labeller = open_labeller(experiment, run)
    state = processes()
    say(f"{labeller.base.name} in {labeller.base.dtype} on {labeller.base.model.device}")
    with contextlib.ExitStack() as stack:
        journal, done = None, [set[str]()]
        if state.is_main_process:
            journal = stack.enter_context(Journal(path, header))
            if journal.note:
                say(journal.note)
            done = [journal.done]
        if state.num_processes > 1:
            broadcast_object_list(done)
        left = [example for example in examples if example.uid not in done[0]]
        if state.num_processes > 1:
            # A row without room for its answer ends every process, also that which prints.
            labeller.encoder.encode(left)
        bar = stack.enter_context(
            tqdm(
                total=len(examples), initial=len(done[0]), desc=split, unit="row",
                disable=not state.is_main_process,
            )
        )  # fmt: skip
        for predictions in _shared(labeller, left, state):
            if journal is not None:
                for prediction in predictions:
                    journal.append(prediction)
                journal.flush()
            bar.update(len(predictions))
        if journal is not None:
            journal.finish([example.uid for example in examples])
    state.wait_for_everyone()
    return path


ROWS_PER_FLUSH = 64
"""Rows that a process predicts before they are put on disk."""


def _shared(
    labeller: Labeller, examples: Sequence[Example], state: PartialState
) -> Iterator[list[Prediction]]:
    """Yield the predictions of all processes' shares, some at a time.

    A share is a stretch of the split, whose turns have their history in common. All processes
    gather equally often, also those whose share is short or empty.
    """
    world, rank = state.num_processes, state.process_index
    cuts = [len(examples) * i // world for i in range(world + 1)]
    longest = max(end - start for start, end in itertools.pairwise(cuts))
    own = labeller.predict(examples[cuts[rank] : cuts[rank + 1]])
    for _ in range(-(-longest // ROWS_PER_FLUSH)):
        chunk = list(itertools.islice(own, ROWS_PER_FLUSH))
        yield gather_object(chunk) if world > 1 else chunk


def _header(experiment: Experiment, run: runs.Run | None, split: Split) -> Header:
    recipe, prompt = experiment.recipe, experiment.prompt
    return Header(
        protocol=experiment.protocol.name,
        dataset=experiment.protocol.dataset,
        split=split,
        labels=experiment.labels.names,
        files=experiment.files,
        run=None if run is None else run.id,
        model=recipe.model.name,
        revision=recipe.model.revision,
        adapter=None if run is None else _adapter_sum(run),
        versions=runs.versions(),
        mode=recipe.inference.mode,
        prompt=f"{prompt.name}@{_sha256(prompt.verbatim)[:12]}",
        settings=_settings(recipe),
    )


def _adapter_sum(run: runs.Run) -> str:
    weights = run.adapter / "adapter_model.safetensors"
    return sha256_of(weights if weights.exists() else run.adapter / "model.safetensors")


def _settings(recipe: recipes.Recipe) -> str:
    """Hash what of the recipe can change a prediction, training apart: that is the adapter's.

    `dtype: auto` counts as what this machine makes of it.
    """
    content = recipe.model_dump(mode="json", exclude={"train": True})
    content["model"]["dtype"] = str(auto.dtype_of(recipe.model, recipe.method))
    del content["inference"]["tokens_per_pass"]
    if recipe.inference.mode == "score":
        del content["inference"]["max_new_tokens"]
    return _sha256(json.dumps(content, sort_keys=True))[:12]


# --- train --------------------------------------------------------------------------------------


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
    batches: training.GlobalBatches
    settings: recipes.Train

    @property
    def shortened(self) -> int:
        """Training texts that lost their end or some history to `prompt.max_length`."""
        return sum(row.dropped > 0 for row in self.rows)


def prepare(experiment: Experiment) -> Job:
    """Load the model and encode the rows: all that can fail before there is a run folder.

    Raises:
        RecipeError: the method trains nothing.
        ModelError: the model cannot be used.
        PromptError: an example leaves no room for its answer.
        RunError: the batch does not divide over the processes.
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
    dev = experiment.examples("dev")
    labeller = open_labeller(experiment)
    base, model = labeller.base, labeller.model
    say(f"{base.name} in {base.dtype} on {base.model.device}: {methods.count_parameters(model)}")
    rows = labeller.encoder.encode(experiment.examples("train"))
    labeller.encoder.encode(dev)  # found now rather than after an epoch

    micro = min(settings.micro_batch_size, max(1, settings.batch_size // state.num_processes))
    try:
        batches = training.GlobalBatches(
            len(rows), batch_size=settings.batch_size, micro_batch_size=micro,
            seed=recipe.seed, rank=state.process_index, world=state.num_processes,
        )  # fmt: skip
    except ValueError as error:
        raise RunError(f"train.batch_size: {error}") from error
    job = Job(labeller, rows, dev, batches, settings)
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
            accumulation=job.batches.accumulation,
            seed=experiment.recipe.seed,
            metric=experiment.protocol.metrics[0],
        ),
        rows=job.rows,
        batches=job.batches,
        validate=_Dev(job.labeller, job.dev).measure,
        callbacks=[
            progress,
            training.EvaluateAndSave(
                -(-len(job.rows) // settings.batch_size), settings.evaluations_per_epoch
            ),
            *training.stopping(settings),
            *training.tensorboard(run.folder / "tensorboard"),
        ],
    )
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
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
