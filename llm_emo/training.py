"""Training: a thin `transformers.Trainer`, the one loop of LLMs and specialised models.

A step is a list of passes; an LLM's are one token trie each. The loss is the mean over the targets
(answer tokens, or rows) of the *global* batch, whatever the number of processes, passes and answer
lengths: (x1 / n1) + (x2 / n2) is not (x1 + x2) / (n1 + n2).
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from llm_emo import checkpoints
from llm_emo.decoder_layer import unchanged
from llm_emo.encoding import Encoded
from llm_emo.errors import JobFailed
from llm_emo.inference import targets
from llm_emo.lean import log_probabilities
from llm_emo.machine import say, settled
from llm_emo.methods import untrained
from llm_emo.optimizers import ADAM
from llm_emo.recipes import Train
from llm_emo.steps import sequence
from llm_emo.trie import TokenTrie, node_logits
from llm_emo.types import IGNORED

Batch = dict[str, Any]

COUNTS = "counts"
"""The key of a checkpoint's trainer state under which the totals of the run so far stand."""


class _EpochLoader(DataLoader[Any]):
    """A loader that passes the epoch on to its batch sampler, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _Rows(Dataset[list[Any]]):
    """The rows, several at a time: those of a pass."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: Sequence[int]) -> list[Any]:
        return [self.rows[number] for number in numbers]


def collate(rows: Sequence[Encoded]) -> Batch:
    """Fold the rows of a pass into one trie and its targets.

    Returns `trie`; `nodes`, shape (K,), where logits are needed; `where`, shape (T,), the place
    in `nodes` of every answer token; `labels`, shape (T,), those tokens.
    """
    if not rows:
        # A single node with one ignored target: it keeps processes in step, costs nothing and
        # adds nothing.
        zero = torch.zeros(1, dtype=torch.long)
        return {
            "trie": TokenTrie.build([(0,)]),
            "nodes": zero,
            "where": zero,
            "labels": zero + IGNORED,
        }
    trie = TokenTrie.build([sequence(row) for row in rows])
    at, labels = targets(trie, [len(row.prompt) for row in rows], [row.answer for row in rows])
    nodes, where = torch.unique(at, return_inverse=True)
    return {"trie": trie, "nodes": nodes, "where": where, "labels": labels}


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of the batch's answer tokens, in nats; shape ().

    Summed, so that the caller divides once by the answer tokens of the global batch.
    """
    logits = node_logits(model, batch["trie"], batch["nodes"])  # (K, V)
    where, labels = batch["where"].to(logits.device), batch["labels"].to(logits.device)
    real = labels != IGNORED
    known = log_probabilities(logits, where, labels.where(real, 0))  # (T,)
    return -known.where(real, 0).sum()


class Size(NamedTuple):
    """What a pass holds."""

    targets: int
    """What the loss is a mean over."""
    tokens_run: int
    tokens_saved: int
    examples: int


class Task(Protocol):
    """What a model learns: how rows become a pass, and what the pass loses."""

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Return a pass over rows; without rows, one that adds nothing to loss and size."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss summed over the targets of a pass, shape ()."""
        ...

    def size(self, batch: Batch) -> Size:
        """Return what a pass holds."""
        ...

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write what a checkpoint must hold of the model."""
        ...

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read what `save` wrote."""
        ...

    def idle(self, model: nn.Module) -> list[str]:
        """Return the layers that have learned nothing."""
        ...


class Answers:
    """An LLM learns the tokens of its answers."""

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Fold rows into one trie."""
        return collate(rows)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of the answer tokens, in nats."""
        return answer_loss(model, batch)

    def size(self, batch: Batch) -> Size:
        """Count answer tokens, and what the trie ran and spared."""
        targets = int((batch["labels"] != IGNORED).sum())
        if not targets:
            return Size(0, 0, 0, 0)
        trie = batch["trie"]
        return Size(targets, len(trie), trie.saved, len(trie.lengths))

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write the parameters that learn."""
        checkpoints.save_model(folder, model)

    def load(self, folder: Path, model: nn.Module) -> None:
        """Read the parameters that learn."""
        checkpoints.load_model(folder, model)

    def idle(self, model: nn.Module) -> list[str]:
        """Return the adapter layers that are still what training started from."""
        return untrained(model)


class EmoTrainer(Trainer):
    """The one training loop: every method, every model.

    Args:
        model: What learns.
        args: Arguments from `training_arguments`.
        rows: Training rows, as the task reads them.
        steps: Which of them meet in a step and in a pass, and in what order.
        validate: Measures the model on dev; returns metrics without the `eval_` in front.
        callbacks: What else happens at steps.
        task: What is learned; by default an LLM's answers.
        optimizer: By default AdamW, as the arguments say.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        rows: Sequence[Any],
        steps: Sampler[list[list[int]]],
        validate: Callable[[nn.Module], Mapping[str, float]],
        callbacks: Sequence[TrainerCallback],
        task: Task | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not rows:
            raise JobFailed("no training rows to learn from")
        self.steps, self.validate, self.task = steps, validate, task or Answers()
        self.learning = [part for part in model.parameters() if part.requires_grad]
        self.control: TrainerControl
        # Of the whole run and of all processes; checkpoints carry them over an interruption.
        self.totals: dict[str, float] = dict.fromkeys(
            ("tokens_run", "tokens_saved", "examples", "seconds"), 0
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Rows(rows),
            eval_dataset=_Rows(rows[:1]),  # never read: `evaluate` measures dev by itself
            data_collator=self._collate,
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )
        # It would print every log entry on stdout, where results belong.
        self.remove_callback(PrinterCallback)

    def _collate(self, passes: Sequence[Sequence[Any]]) -> list[Batch]:
        return [self.task.collate(rows) for rows in passes]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's steps, each a list of passes, which are made as they are drawn."""
        return _EpochLoader(self.train_dataset, batch_sampler=self.steps, collate_fn=self._collate)

    def _get_num_items_in_batch(
        self, batch_samples: list[list[Batch]], device: torch.device
    ) -> Tensor:
        """Return the targets of the global batch, shape (), and count what it holds."""
        sizes = [self.task.size(batch) for step in batch_samples for batch in step]
        own = torch.tensor(sizes, dtype=torch.long, device=device).sum(0)
        whole = torch.as_tensor(self.accelerator.gather(own)).view(-1, len(own)).sum(0)
        if not whole[0]:
            raise JobFailed("no answer tokens or labels to learn from in a whole step")
        counted = zip(("tokens_run", "tokens_saved", "examples"), whole[1:].tolist(), strict=True)
        for name, count in counted:
            self.totals[name] += count
        return whole[0]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does; all modules are told that they train, once."""
        model = self.model
        model.train()  # parts that came from files are in eval mode, whatever the whole says
        # The Trainer would walk through all of them for the gradients of the few that learn.
        model.zero_grad = self._zero_grad
        try:
            with settled(), unchanged(model):
                return super().train(*args, **kwargs)
        finally:
            del model.zero_grad

    def _zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.learning:
            part.grad = None

    def training_step(
        self,
        model: nn.Module,
        inputs: list[Batch],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run a step's passes forward and backward, on the clock; return its loss, shape ().

        Written out, because the Trainer's own walks through all modules of the model in each pass,
        to say to them that they train. `train` and `evaluate` have said it.
        """
        started = time.perf_counter()
        loss = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs, start=1):
            # Processes exchange gradients once a step, however many passes each of them has.
            last = number == len(inputs)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                ready = self._prepare_inputs(batch)  # tensors on the device
                share = self.compute_loss(model, ready, num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(share)
                loss += share.detach()
        if loss.is_cuda:  # the last kernels are only queued
            torch.cuda.synchronize(loss.device)
        self.totals["seconds"] += time.perf_counter() - started
        return loss

    def kept(self) -> tuple[str, int, float]:
        """Return the metric on dev, and the step and the value of the state that is kept."""
        name, state = str(self.args.metric_for_best_model), self.state
        if self.args.load_best_model_at_end:
            return name, state.best_global_step, float(state.best_metric or 0)
        last = next(entry for entry in reversed(state.log_history) if f"eval_{name}" in entry)
        return name, int(last["step"]), float(last[f"eval_{name}"])

    def counts(self) -> dict[str, float]:
        """Return the tokens run and saved, and the examples per second, of the run so far.

        Time is that of forward and backward passes; evaluations and checkpoints are not in it.
        """
        totals = self.totals
        return {
            "tokens_run": totals["tokens_run"],
            "tokens_saved": totals["tokens_saved"],
            "examples_per_second": totals["examples"] / (totals["seconds"] or math.inf),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this share's part of the global mean, shape ()."""
        assert num_items_in_batch is not None
        # Gradients are averaged over processes, hence the factor.
        share: Tensor = self.task.loss(model, inputs) * self.accelerator.num_processes
        return share / num_items_in_batch

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        # The Trainer's own looks for gradients in frozen layers too.
        norm: Tensor = self.accelerator.clip_grad_norm_(self.learning, self.args.max_grad_norm)
        return norm

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return 0: the estimate of transformers counts padded tokens, of which there are none."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure dev through the program's own scoring and metrics."""
        was_training = self.model.training
        metrics = {f"eval_{name}": value for name, value in self.validate(self.model).items()}
        self.model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # --- checkpoints: safetensors and JSON, complete or absent ---------------------------------

    def _folder(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = self._folder(self.state.global_step)
        partial = final.with_name(f".{final.name}.partial")
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        checkpoints.save_rng(partial, self.args.process_index)
        if self.args.should_save:
            self.task.save(partial, self.model)
            checkpoints.save_optimizer(partial, self.optimizer, self.lr_scheduler)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(self._folder(self.state.best_global_step))
            for callback in [*self.callback_handler.callbacks, self.control]:
                name = type(callback).__name__
                if name in self.state.stateful_callbacks:
                    self.state.stateful_callbacks[name] = callback.state()
            self.state.stateful_callbacks[COUNTS] = dict(self.totals)
            self.state.save_to_json(str(partial / checkpoints.STATE))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            needed = {final, self._folder(self.state.best_global_step or 0)}
            for old in set(final.parent.glob("checkpoint-*")) - needed:
                shutil.rmtree(old)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        trained: tuple[int, int] = super()._init_training_state(*args)
        if self.state.best_global_step:  # the run folder may have been moved since
            self.state.best_model_checkpoint = str(self._folder(self.state.best_global_step))
        # A run whose patience was spent has ended; no epoch is left to it.
        spent = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        return (int(args[2]), 0) if spent else trained

    def _load_callback_state(self) -> None:
        # Taken out, because the Trainer would look for a callback of this name.
        self.totals |= self.state.stateful_callbacks.pop(COUNTS, {})
        super()._load_callback_state()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.task.load(Path(resume_from_checkpoint), self.model)

    def _load_best_model(self) -> None:
        self.task.load(self._folder(self.state.best_global_step), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_rng(Path(checkpoint), self.args.process_index)


class EvaluateAndSave(TrainerCallback):
    """Evaluates and saves at evenly spaced steps, the last of each epoch among them."""

    def __init__(self, steps_per_epoch: int, evaluations_per_epoch: int) -> None:
        count = min(evaluations_per_epoch, steps_per_epoch)
        self.steps_per_epoch = steps_per_epoch
        self.at = {
            math.ceil(steps_per_epoch * (i + 1) / count) % steps_per_epoch for i in range(count)
        }

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for an evaluation and a checkpoint where one is due."""
        if state.global_step % self.steps_per_epoch in self.at:
            control.should_evaluate = control.should_save = True
        return control


def training_arguments(folder: Path, train: Train, *, seed: int, metric: str) -> TrainingArguments:
    """Translate a recipe's training section into the Trainer's arguments."""
    never = 10**9
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        # What the Trainer draws is a whole step; its passes are cut already.
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        lr_scheduler_type=train.schedule
        if not (train.schedule == "constant" and train.warmup_ratio)
        else "constant_with_warmup",
        warmup_steps=train.warmup_ratio,  # a float below 1 is a share of all steps
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        adam_beta1=(train.betas or ADAM)[0],
        adam_beta2=(train.betas or ADAM)[1],
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="steps",  # `EvaluateAndSave` says when
        eval_steps=never,
        save_strategy="steps",
        save_steps=never,
        restore_callback_states_from_checkpoint=True,  # a resume does not renew patience
        load_best_model_at_end=train.keep == "best",
        metric_for_best_model=metric,
        greater_is_better=True,
        seed=seed,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,  # every adapter parameter takes part in every step
    )
    if arguments.n_gpu > 1:
        # transformers would wrap the model in nn.DataParallel, which deals the rows of tensors out
        # to the devices; a trie is one row.
        count = arguments.n_gpu
        say(
            f"{count} GPUs are visible, but one process trains on one, {arguments.device}; "
            f"`accelerate launch --num_processes {count} -m llm_emo train ...` takes all"
        )
        arguments._n_gpu = 1
    return arguments


def stopping(train: Train) -> list[TrainerCallback]:
    """Return the callback that stops early, if the recipe asks for one."""
    if train.early_stopping_patience is None:
        return []
    return [EarlyStoppingCallback(early_stopping_patience=train.early_stopping_patience)]


def tensorboard(folder: Path) -> list[TrainerCallback]:
    """Return the callback that writes TensorBoard's files, where it is installed."""
    if not is_tensorboard_available() or not PartialState().is_main_process:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(folder)))]
