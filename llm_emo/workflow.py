"""Train and predict: an experiment, a model and a run folder brought together."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

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
    adapter: str | None = None

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
    set_seed(recipe.seed)
    base = auto.load(recipe.model, recipe.method)
    encoder = Encoder(base.tokenizer, recipe.prompt.max_length)
    prefix_ids: Sequence[int] = ()
    match recipe.method:
        case recipes.PTuningV2(init_text=str(text)):
            prefix_ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    model = methods.adapt(base.model, recipe.method, prefix_ids=prefix_ids)
    labeller = Labeller(experiment, base, model, encoder)
    if run is None:
        return labeller
    if not run.finished:
        raise RunError(
            f"{run.folder}: training has not finished; continue it with "
            f"`llm-emo train {run.folder / 'recipe.yaml'} -o {run.folder} --resume`"
        )
    methods.check_fingerprint(run.adapter, labeller.fingerprint())
    methods.load_adapter(model, run.adapter)
    weights = run.adapter / "adapter_model.safetensors"
    if not weights.exists():
        weights = run.adapter / "model.safetensors"
    return Labeller(experiment, base, model, encoder, sha256_of(weights))


def say(text: str) -> None:
    """Write a line of progress, once per job."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


# --- predict ------------------------------------------------------------------------------------


def predict(experiment: Experiment, run: runs.Run | None, split: Split, folder: Path) -> Path:
    """Predict a split into `folder`, continuing what an earlier job left; return the file.

    Raises:
        RunError: the file is there already, made under something else.
    """
    examples = experiment.examples(split)
    path = runs.predictions_path(folder, split)
    labeller = open_labeller(experiment, run)
    header = _header(labeller, run, split)
    if path.exists():
        found, rows = read(path)
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
    say(f"{labeller.base.name} in {labeller.base.dtype} on {labeller.base.model.device}")
    with (
        Journal(path, header) as journal,
        tqdm(
            total=len(examples), initial=len(journal.done), desc=split, unit="row",
            disable=not PartialState().is_main_process,
        ) as bar,
    ):  # fmt: skip
        if journal.note:
            say(journal.note)
        left = [example for example in examples if example.uid not in journal.done]
        for count, prediction in enumerate(labeller.predict(left), start=1):
            journal.append(prediction)
            bar.update()
            if count % 64 == 0:
                journal.flush()
        journal.finish([example.uid for example in examples])
    return path


def _header(labeller: Labeller, run: runs.Run | None, split: Split) -> Header:
    experiment = labeller.experiment
    return Header(
        protocol=experiment.protocol.name,
        dataset=experiment.protocol.dataset,
        split=split,
        labels=experiment.labels.names,
        files=experiment.files,
        run=None if run is None else run.id,
        model=labeller.base.name,
        revision=labeller.base.revision,
        adapter=labeller.adapter,
        versions=runs.versions(),
        mode=experiment.recipe.inference.mode,
        prompt=experiment.prompt.name,
    )


# --- train --------------------------------------------------------------------------------------


class Progress(TrainerCallback):
    """The progress bar, and `log.jsonl`.

    The bar shows the loss, examples per second, and how many of the batches' tokens were run
    and how many the trie saved.
    """

    def __init__(self, log: Path, counts: Any) -> None:
        self.log, self.counts = log, counts
        self.bar: Any = None
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step that training continues from."""
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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.bar.close()


def train(experiment: Experiment, run: runs.Run, *, resume: bool) -> dict[str, Any]:
    """Train the recipe's method and leave the best state on dev in the run's adapter folder.

    Every process of an `accelerate launch` calls this; the first one writes.

    Raises:
        RunError: nothing to resume from, or the batch does not divide over the processes.
        JobFailed: an adapter layer learned nothing.
    """
    recipe = experiment.recipe
    settings = recipe.train
    if settings is None:
        raise RecipeError("method zero_shot trains nothing; use `llm-emo evaluate RECIPE`")
    state = PartialState()
    checkpoint = checkpoints.newest(run.checkpoints) if resume else None
    labeller = open_labeller(experiment)
    base, model = labeller.base, labeller.model
    verify(model)
    count = methods.count_parameters(model)
    say(f"{base.name} in {base.dtype} on {base.model.device}: {count}")
    rows = labeller.encoder.encode(experiment.examples("train"))
    shortened = sum(row.dropped > 0 for row in rows)
    if shortened:
        say(f"{shortened} of {len(rows)} training texts were shortened to prompt.max_length")

    micro = min(settings.micro_batch_size, max(1, settings.batch_size // state.num_processes))
    try:
        batches = training.GlobalBatches(
            len(rows), batch_size=settings.batch_size, micro_batch_size=micro,
            seed=recipe.seed, rank=state.process_index, world=state.num_processes,
        )  # fmt: skip
    except ValueError as error:
        raise RunError(f"train.batch_size: {error}") from error
    dev = _Dev(labeller, experiment.examples("dev"))
    steps = -(-len(rows) // settings.batch_size)
    trainer: training.TrieTrainer
    trainer = training.TrieTrainer(
        model,
        training.training_arguments(
            run.checkpoints,
            settings,
            accumulation=batches.accumulation,
            seed=recipe.seed,
            metric=experiment.protocol.metrics[0],
        ),
        rows=rows,
        batches=batches,
        validate=dev.measure,
        callbacks=[
            Progress(run.log, lambda: trainer.counts()),
            training.EvaluateAndSave(steps, settings.evaluations_per_epoch),
            *training.stopping(settings),
            *training.tensorboard(run.folder / "tensorboard"),
        ],
    )
    if checkpoint is not None:
        say(f"continuing from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    summary = _summary(trainer, count, labeller, rows, shortened)
    if state.is_main_process:
        _keep(labeller, run, summary)
    state.wait_for_everyone()
    return summary


def _summary(
    trainer: training.TrieTrainer, count: methods.ParameterCount, labeller: Labeller,
    rows: Sequence[Encoded], shortened: int,
) -> dict[str, Any]:  # fmt: skip
    idle = methods.untrained(trainer.model)
    if idle:
        raise JobFailed(
            f"{len(idle)} adapter layers learned nothing (first: {idle[0]}); "
            "the gradient does not reach them"
        )
    state = trainer.state
    return {
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "dtype": labeller.base.dtype,
        "device": str(labeller.base.model.device),
        "training_rows": len(rows),
        "shortened_texts": shortened,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "best_dev": {trainer.args.metric_for_best_model: state.best_metric},
        **trainer.counts(),
    }


def _keep(labeller: Labeller, run: runs.Run, summary: Mapping[str, Any]) -> None:
    """Write the adapter, complete or not at all, then the summary."""
    partial = run.folder / ".adapter.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        methods.save_adapter(labeller.model, partial)
        methods.write_fingerprint(partial, labeller.fingerprint())
        shutil.rmtree(run.adapter, ignore_errors=True)
        partial.rename(run.adapter)
    except OSError as error:
        raise JobFailed(f"{run.adapter}: cannot be written: {error}") from error
    runs.write_json(run.folder / "environment.json", {**run.environment, "training": dict(summary)})


class _Dev:
    """The dev split, scored in shares by all processes."""

    def __init__(self, labeller: Labeller, examples: Sequence[Example]) -> None:
        self.labeller, self.examples = labeller, examples

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the protocol's metrics on dev."""
        state = PartialState()
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
