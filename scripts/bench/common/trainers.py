"""The trainers that `train.py` and `time_to_score.py` compare, over the same steps of rows.

Whoever trains, the model is one that this program wrapped (or, for PEFT's prefix tuning, PEFT's
own with the same start), the rows are ones that this program encoded, and the arguments are those
that this program gives to transformers.
"""

import hashlib
import importlib.util
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.harness import OURS, stock, synchronise

SIDES = {
    OURS: "this program: one pass over the batch's token trie",
    "trl": "TRL's SFTTrainer: dynamic padding, its default",
    "trl_padding_free": "TRL's SFTTrainer with padding_free: one row, block-diagonal mask",
    "padded": "transformers' Trainer: dynamic padding, logits at every position",
    "padded_193": "the same, every row padded to 193 tokens, as ChatGLM2's own script pads",
    "llama_factory": "LLaMA-Factory's SFT trainer on the same tokens, in an environment of its own",
    "peft_prefix": "PEFT's prefix tuning under transformers' Trainer: dynamic padding",
}
PEERS = {"lora": ("trl", "trl_padding_free"), "p_tuning_v2": ("peft_prefix",)}
"""Whom a method is compared with unless `--peers` says otherwise."""
ORIGINAL_LENGTH = 193
"""Source 64, target 128 and one more: what ChatGLM2's P-Tuning script pads every row to."""

Steps = Sequence[Sequence[Any]]
"""Encoded rows, step by step."""


def drawn(
    rows: Sequence[Any], settings: Any, steps: int, seed: int, dialogues: Any, *, epoch: int = 0
) -> list[list[Any]]:
    """Return an epoch's first steps, all of them full, as this program's own training draws them.

    Args:
        rows: All rows.
        settings: The recipe's training section.
        steps: How many steps.
        seed: Which rows, in which order.
        dialogues: The numbers of the rows that stay together, as `llm_emo.steps` finds them.
        epoch: With the seed, it decides the order.

    Raises:
        RunError: there are not so many rows.
    """
    from llm_emo.errors import RunError
    from llm_emo.steps import Steps

    count = settings.batch_size * steps
    if count > len(rows):
        raise RunError(
            f"{count} rows are wanted, but train has {len(rows)}; take fewer --steps, or a "
            "smaller --batch-size"
        )
    sampler = Steps(rows, settings, seed=seed, dialogues=dialogues)
    sampler.set_epoch(epoch)
    return [[rows[row] for row in step] for step in itertools.islice(sampler.drawn(), steps)]


class FixedSteps:
    """Steps that were drawn already, in the place of the program's own sampler."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def set_epoch(self, epoch: int) -> None:
        """There is one epoch."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[list[int]]]:
        start = 0
        for size in self.sizes:
            yield [list(range(start, start + size))]  # one pass a step
            start += size


def trainer_of(
    side: str, model: Any, tokenizer: Any, steps: Steps, settings: Any, *,
    folder: Path, seed: int,
) -> Any:  # fmt: skip
    """Return the trainer of `side`, whose step i takes the rows `steps[i]`.

    Raises:
        RunError: a row is longer than what the side pads to.
        RecipeError: the method's settings have no counterpart in the side.
    """
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from llm_emo.errors import RunError
    from llm_emo.training import EmoTrainer, training_arguments
    from llm_emo.workflow import Progress

    rows = [row for step in steps for row in step]
    own = training_arguments(folder, settings, seed=seed, metric="none")
    if side == OURS:
        trainer: EmoTrainer
        trainer = EmoTrainer(
            model, own, rows=rows, steps=FixedSteps([len(step) for step in steps]),
            validate=lambda model: {"none": 0.0},  # behind the last step, off the clock
            callbacks=[Progress(folder / "log.jsonl", lambda: trainer.counts())],
        )  # fmt: skip
        return trainer

    shared = shared_arguments(own)
    stock(model)
    if side.startswith("trl"):
        return sft_trainer(model, tokenizer, rows, shared, padding_free=side == "trl_padding_free")
    if side == "peft_prefix":
        model = peft_prefix(model)
    padding: dict[str, Any] = {"padding": True}
    if side == "padded_193":
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        if longest > ORIGINAL_LENGTH:
            raise RunError(
                f"padded_193: a row has {longest} tokens; set prompt.max_length="
                f"{ORIGINAL_LENGTH} or leave this side out"
            )
        padding = {"padding": "max_length", "max_length": ORIGINAL_LENGTH}
    return Trainer(
        model, TrainingArguments(**shared), train_dataset=labelled(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, **padding),
    )  # fmt: skip


def shared_arguments(own: Any) -> dict[str, Any]:
    """Return the arguments that every side of transformers gets, out of this program's."""
    shared = {
        name: getattr(own, name)
        for name in (
            "output_dir", "num_train_epochs", "per_device_train_batch_size",
            "gradient_accumulation_steps", "learning_rate", "weight_decay", "lr_scheduler_type",
            "warmup_steps", "max_grad_norm", "optim", "gradient_checkpointing", "seed", "use_cpu",
            "disable_tqdm", "report_to",
        )
    }  # fmt: skip
    # Rows stand in the order of the steps already.
    return shared | {"train_sampling_strategy": "sequential", "logging_strategy": "no",
                     "save_strategy": "no", "eval_strategy": "no"}  # fmt: skip


def labelled(rows: Sequence[Any]) -> Any:
    """Return rows as transformers wants them: ids, and labels that are -100 in the prompt."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.answer],
                "attention_mask": [1] * (len(row.prompt) + len(row.answer)),
                "labels": [-100] * len(row.prompt) + list(row.answer),
            }
            for row in rows
        ]
    )


def sft_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Any], shared: Mapping[str, Any], *,
    padding_free: bool,
) -> Any:  # fmt: skip
    """Return TRL's trainer, set up as fast as its documentation allows for this work.

    A tokenised prompt-completion dataset with completion-only loss; no gradient checkpointing
    (its default costs about a fifth of the speed) and no autocast (the weights have the dtype
    that both sides train in).
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.answer],
                "completion_mask": [0] * len(row.prompt) + [1] * len(row.answer),
            }
            for row in rows
        ]
    )
    config = SFTConfig(
        **shared,
        completion_only_loss=True,
        packing=False,  # it would put other rows together than the batch's
        padding_free=padding_free,
        max_length=None,  # rows were shortened by the program
        bf16=False,
    )
    return SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)


def peft_prefix(model: Any) -> Any:
    """Return PEFT's own prefix tuning of the same base, starting from the same prefix.

    Raises:
        RecipeError: the prefix has a projection, whose MLP is not stored in PEFT's layout.
    """
    import torch
    from peft import get_peft_model

    from llm_emo import methods
    from llm_emo.errors import RecipeError

    config = model.peft_config
    if config.prefix_projection:
        raise RecipeError(
            "peft_prefix: takes a prefix without projection; add --set method.projection=false "
            "--set method.projection_size=null"
        )
    # PEFT injects the prefix as a cache, which moves every token by its length.
    start = methods.rotate_keys(model.base, model.prefix().detach(), config.num_virtual_tokens)
    made = get_peft_model(model.base, config)
    with torch.no_grad():
        made.prompt_encoder["default"].embedding.weight.copy_(start.flatten(1))
    return made


def require(side: str) -> None:
    """Refuse a side that is not installed.

    Raises:
        RunError: it is not.
    """
    from llm_emo.errors import RunError

    if side.startswith("trl") and not importlib.util.find_spec("trl"):
        raise RunError("TRL is not installed; pip install -e .[bench] -c constraints.txt")


# --- what a batch holds -------------------------------------------------------------------------


def batches(trainer: Any) -> list[Mapping[str, Any]]:
    """Return all batches of a trainer, ours one for each pass of a step."""
    drawn = list(trainer.get_train_dataloader())
    return [batch for step in drawn for batch in (step if isinstance(step, list) else [step])]


def trained(batch: Mapping[str, Any]) -> Counter[tuple[tuple[int, ...], int]]:
    """Return what a collated batch trains: (tokens so far, next token), with multiplicity."""
    if "trie" in batch:
        trie = batch["trie"]
        paths: dict[int, tuple[int, ...]] = {}  # node -> the tokens up to and with it
        for nodes, length in zip(trie.nodes.tolist(), trie.lengths.tolist(), strict=True):
            tokens = tuple(trie.tokens[nodes[:length]].tolist())
            paths |= {node: tokens[: at + 1] for at, node in enumerate(nodes[:length])}
        at = batch["nodes"][batch["where"]].tolist()
        return Counter(
            (paths[node], label)
            for node, label in zip(at, batch["labels"].tolist(), strict=True)
            if label != -100
        )
    pairs: Counter[tuple[tuple[int, ...], int]] = Counter()
    for ids, labels in _rows(batch):
        pairs.update((tuple(ids[:at]), label) for at, label in enumerate(labels) if label != -100)
    return pairs


def fingerprint(batches: Iterable[Mapping[str, Any]]) -> str:
    """Hash what batches train."""
    pairs = [sorted(trained(batch).items()) for batch in batches]
    return hashlib.sha256(repr(pairs).encode()).hexdigest()


def _rows(batch: Mapping[str, Any]) -> Iterable[tuple[list[int], list[int]]]:
    """Yield the rows (ids, labels) of a padded or of a flattened batch, without padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        for row, own, mask in zip(ids, labels, batch["attention_mask"].bool(), strict=True):
            yield row[mask].tolist(), own[mask].tolist()
        return
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    for start, end in itertools.pairwise(starts):
        yield ids[0, start:end].tolist(), labels[0, start:end].tolist()


def tokens_in(batch: Mapping[str, Any]) -> int:
    """Return how many tokens the transformer runs for a batch, padding included."""
    return len(batch["trie"]) if "trie" in batch else int(batch["input_ids"].numel())


# --- on the clock -------------------------------------------------------------------------------


def timed(
    trainer: Any, between: Callable[[], object] | None = None
) -> tuple[list[float], list[float]]:
    """Train; return the seconds of each step but the first, and all the losses.

    A step's time is all of it, from what follows the step before to its own end. What `between`
    does after each step is off the clock.
    """
    from transformers import TrainerCallback

    starts: list[float] = []
    ends: list[float] = []
    losses: list[Any] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            ends.append(time.perf_counter())
            if between:
                between()
            starts.append(time.perf_counter())

    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        losses.append(step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = recorded
    trainer.add_callback(Clock())
    trainer.train()
    seconds = [end - start for start, end in zip(starts, ends[1:], strict=False)]
    return seconds, [float(loss) for loss in losses]


def loss_of(trainer: Any, batch: Mapping[str, Any], targets: int) -> float:
    """Return the mean loss of a batch's targets, as the trainer computes it."""
    import torch

    trainer.model.train()
    with torch.no_grad():
        inputs = trainer._prepare_inputs(batch)
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(targets))
    return float(loss)
