"""Ways to run a recipe, and what each needs.

The batches that training would draw are counted (`workload`); the largest of them is run on the
meta device (`memory`) for every way of keeping the base, with and without gradient checkpointing,
in micro-batches of several sizes. What fits is ranked by a cost model of two terms (`relative`).

Letters: N nodes of a trie, P prefix length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llm_emo import machine, memory, recipes
from llm_emo.decoder_layer import head_of, packed_bytes
from llm_emo.errors import RunError
from llm_emo.experiment import Experiment
from llm_emo.inference import targets
from llm_emo.models import auto, meta
from llm_emo.models.ledger import Footprint
from llm_emo.training import collate
from llm_emo.trie import TokenTrie
from llm_emo.workload import Batches, Passes, Workload

GIB = 2**30

CUDA_CONTEXT = 512 * 2**20
"""Bytes of a GPU that hold driver and kernels instead of tensors.

About 300 MiB since kernels are loaded lazily (https://github.com/pytorch/pytorch/issues/107667);
the rest is for the workspaces of matrix products and for kernels that are loaded later.
"""

FRAGMENTATION = 0.05
"""Share by which torch's caching allocator on a GPU holds more than is alive. A guess on the safe
side; it differs from run to run."""

PROCESS = 800 * 2**20
"""Bytes of main memory that a training process holds beside tensors: 540 MiB after importing torch,
transformers, peft and bitsandbytes, 830 after some steps of the bundled model, on Linux."""

BALANCE = {"cuda": 100.0, "cpu": 10.0}
"""Operations that a device does in the time in which it reads one byte, as far as products reach.

The RTX 3090's data sheet says 71 TFLOP/s of bfloat16 products and 936 GB/s: 76; an A100's 208.
"""

FASTER = 0.97
"""A suggestion must take at most this share of the recipe's own time to be worth a change."""

LEAST_TOKENS_PER_PASS = 256
MICRO_BATCHES = 5
"""Sizes of micro-batches that are looked at: the batch, its halves, and one row."""


@dataclass(frozen=True)
class Place:
    """Where the recipe is to run."""

    kind: meta.Kind
    capacity: int
    name: str
    here: bool

    @classmethod
    def of(cls, gpu_memory: int | None) -> "Place":
        """Return a GPU of so many bytes, or without that this machine.

        Raises:
            RunError: this machine does not say how much memory it has.
        """
        if gpu_memory is not None:
            return cls("cuda", gpu_memory, f"a GPU with {gpu_memory / GIB:.1f} GiB", here=False)
        if torch.cuda.is_available():
            seen = torch.cuda.get_device_properties(torch.cuda.current_device())
            return cls("cuda", seen.total_memory, f"this machine's {seen.name}", here=True)
        capacity = machine.memory()
        if capacity is None:
            raise RunError(
                "this system does not say how much memory it has; name a GPU's with --gpu-memory"
            )
        return cls("cpu", capacity, "this machine's memory", here=True)

    def allowance(self, peak: float) -> float:
        """Return what is taken beside tensors, given the bytes that come and go at the peak."""
        return CUDA_CONTEXT + FRAGMENTATION * peak if self.kind == "cuda" else PROCESS


@dataclass(frozen=True)
class Choice:
    """One way to run the recipe: what it needs at its peak, and how long it takes for that."""

    quantization: str
    checkpointing: bool
    micro_batch_size: int
    budget: int | None
    """`train.tokens_per_pass`."""
    tokens_per_pass: int
    training: Footprint | None
    evaluation: Footprint
    fixed: int
    """Bytes of weights, of copies of them, of adapter and optimiser."""
    stepping: int
    """Bytes of gradients, and of what the optimiser's step writes beside them."""
    allowance: float
    operations: float
    streamed: float
    """Bytes of weights that pass through the processor in the whole run."""

    @property
    def _in_training(self) -> float:
        return 0 if self.training is None else max(self.training.peak, self.stepping)

    @property
    def evaluation_is_highest(self) -> bool:
        """Whether evaluating needs more than training."""
        return self.evaluation.peak > self._in_training

    @property
    def peak(self) -> float:
        """The most bytes that tensors take."""
        return self.fixed + max(self._in_training, self.evaluation.peak)

    @property
    def needed(self) -> float:
        """The most bytes in all."""
        return self.peak + self.allowance


class Planner:
    """Everything that is asked about one recipe at one place; what was asked is kept.

    Args:
        experiment: The recipe with its corpus.
        place: Where it is to run.
    """

    def __init__(self, experiment: Experiment, place: Place) -> None:
        self.experiment, self.place = experiment, place
        self.recipe = experiment.recipe
        self.work = Workload.of(experiment)
        self._drawings: dict[str, meta.Drawing] = {}
        self._batches: dict[tuple[int, int | None], Batches] = {}
        self._evaluations: dict[tuple[str, int], Footprint] = {}
        self._flops: dict[bool, tuple[Footprint, int, int]] = {}
        self._passes: dict[int, Passes] = {}
        self._trained: dict[tuple[str, bool, int, int | None], Footprint] = {}

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of weights and activations; `auto` is bfloat16 on a GPU that is not here."""
        spec = self.recipe.model
        if not self.place.here and spec.dtype == "auto":
            full = isinstance(self.recipe.method, recipes.Full)
            return torch.float32 if full else torch.bfloat16
        return auto.dtype_of(spec, self.recipe.method)

    def drawing(self, quantization: str) -> meta.Drawing:
        """Return the adapted model, its base kept in this way."""
        if quantization not in self._drawings:
            config = meta.config_of(self.recipe.model)[0]
            self._drawings[quantization] = meta.draw(
                config, self.recipe.method, dtype=self.dtype, quantization=quantization
            )
        return self._drawings[quantization]

    def batches(self, micro: int, budget: int | None) -> Batches:
        """Return the run's passes of so many rows and, where there is a budget, tokens at most."""
        if (micro, budget) not in self._batches:
            self._batches[micro, budget] = self.work.batches(micro, budget)
        return self._batches[micro, budget]

    def passes(self, tokens_per_pass: int) -> Passes:
        """Return the passes of one evaluation."""
        if tokens_per_pass not in self._passes:
            self._passes[tokens_per_pass] = self.work.passes(tokens_per_pass)
        return self._passes[tokens_per_pass]

    # --- footprints ---------------------------------------------------------------------------

    def training(
        self,
        quantization: str,
        checkpointing: bool,
        micro: int,
        budget: int | None,
        tokens_per_pass: int,
    ) -> Footprint:
        """Return the footprint of the largest micro-batch, or one that is known to be larger.

        Micro-batches that stay below the evaluation's footprint change nothing, and then nor do
        smaller ones.
        """
        evaluation = self.evaluation(quantization, tokens_per_pass)
        for larger in self.micro_batch_sizes:
            known = self._trained.get((quantization, checkpointing, larger, budget))
            if larger >= micro and known and (larger == micro or known.peak <= evaluation.peak):
                return known
        drawn = self.batches(micro, budget)
        footprint = memory.training_step(
            self.drawing(quantization), collate(drawn.largest()), self.place.kind,
            checkpointing=checkpointing, accumulating=drawn.accumulating,
        )  # fmt: skip
        self._trained[quantization, checkpointing, micro, budget] = footprint
        return footprint

    def evaluation(self, quantization: str, tokens_per_pass: int) -> Footprint:
        """Return the larger of the footprints of the passes with most tokens and most logits.

        Each is drawn with its beginning, of which only keys and values are there: at most.
        """
        key = (quantization, tokens_per_pass)
        if key not in self._evaluations:
            drawing = self.drawing(quantization)
            found = [
                self._evaluate(drawing, prompts)
                for prompts in self.passes(tokens_per_pass).largest()
            ]
            self._evaluations[key] = max(found, key=lambda footprint: footprint.peak)
        return self._evaluations[key]

    def _evaluate(self, drawing: meta.Drawing, prompts: Sequence[tuple[int, ...]]) -> Footprint:
        inference = self.recipe.inference
        if inference.mode == "generate":
            trie = TokenTrie.build(prompts)
            return memory.generating_pass(drawing, trie, inference.max_new_tokens, self.place.kind)
        answers = self.work.answers
        trie = TokenTrie.build([p + answer[:-1] for p in prompts for answer in answers])
        lengths = [len(prompt) for prompt in prompts for _ in answers]
        at, _ = targets(trie, lengths, answers * len(prompts))
        return memory.scoring_pass(drawing, trie, torch.unique(at), self.place.kind)

    # --- operations -----------------------------------------------------------------------------

    def training_operations(self, checkpointing: bool, micro: int, budget: int | None) -> float:
        """Return the floating-point operations of all training steps."""
        if checkpointing not in self._flops:
            batch = collate(self.batches(micro, budget).largest())
            footprint = memory.training_step(
                self.drawing("none"), batch, self.place.kind,
                checkpointing=checkpointing, accumulating=False,
            )  # fmt: skip
            self._flops[checkpointing] = (footprint, len(batch["trie"]), len(batch["nodes"]))
        footprint, nodes, logits = self._flops[checkpointing]
        drawn = self.batches(micro, budget)
        return self._scaled(footprint, nodes, logits, drawn.nodes, 0, drawn.logits)

    @cached_property
    def evaluation_operations(self) -> float:
        """Return the floating-point operations of one evaluation; at most, where it generates."""
        found = self.passes(self.recipe.inference.tokens_per_pass)
        place = found.highest
        prompts = [found.prompts[row] for row in found.groups[place]]
        footprint = self._evaluate(self.drawing("none"), prompts)
        return self._scaled(
            footprint, int(found.nodes[place] + found.behind[place]), int(found.logits[place]),
            np.concatenate([found.nodes, found.ahead]),
            np.concatenate([found.behind, np.zeros_like(found.ahead)]), found.logits,
        )  # fmt: skip

    def _scaled(
        self,
        footprint: Footprint,
        nodes: int,
        logits: int,
        all_nodes: Any,
        behind: Any,
        all_logits: Any,
    ) -> float:
        """Carry the operations of one pass over to all, which stand `behind` so many tokens."""
        method, flops = self.recipe.method, footprint.flops
        prefix = method.prefix_length if isinstance(method, recipes.PTuningV2) else 0
        pairs = (all_nodes * (all_nodes + behind + prefix)).sum() / (nodes * (nodes + prefix))
        return float(
            flops.tokens * all_nodes.sum() / nodes
            + flops.attention * pairs
            + flops.head * all_logits.sum() / logits
        )

    @property
    def evaluations(self) -> int:
        """How often a split is predicted in the run."""
        train = self.recipe.train
        if train is None:
            return 1
        steps = self.work.steps // train.epochs
        return train.epochs * min(train.evaluations_per_epoch, steps)

    # --- choices ----------------------------------------------------------------------------------

    def choice(
        self,
        quantization: str,
        checkpointing: bool,
        micro: int,
        budget: int | None,
        tokens_per_pass: int,
    ) -> Choice:
        """Return what one way to run the recipe needs."""
        drawing = self.drawing(quantization)
        training, operations, streams = None, 0.0, 0.0
        evaluation = self.evaluation(quantization, tokens_per_pass)
        if self.recipe.train is not None:
            training = self.training(quantization, checkpointing, micro, budget, tokens_per_pass)
            operations = self.training_operations(checkpointing, micro, budget)
            # Forward, backward, and forward once more where layers are recomputed.
            streams = len(self.batches(micro, budget).rows) * (3.0 if checkpointing else 2.0)
        found = self.passes(tokens_per_pass)
        steps = self.recipe.inference.max_new_tokens
        generates = self.recipe.inference.mode == "generate"
        passes = len(found.groups) * (steps if generates else 1) + len(found.ahead)
        streams += self.evaluations * passes
        peaks = max(0.0 if training is None else training.peak, evaluation.peak)
        return Choice(
            quantization=quantization,
            checkpointing=checkpointing,
            micro_batch_size=micro,
            budget=budget,
            tokens_per_pass=tokens_per_pass,
            training=training,
            evaluation=evaluation,
            fixed=drawing.weights
            + drawing.adapter
            + drawing.optimizer
            + self.copies(drawing, checkpointing),
            # On a GPU, AdamW's step takes all parameters at once, and so do its intermediates.
            stepping=drawing.trainable * (2 if self.place.kind == "cuda" else 1),
            allowance=self.place.allowance(peaks),
            operations=operations + self.evaluations * self.evaluation_operations,
            streamed=streams * drawing.multiplied * self._bytes_per_weight(quantization),
        )

    def copies(self, drawing: meta.Drawing, checkpointing: bool) -> int:
        """Return the bytes of copies of weights (see `packed`).

        One for evaluations; one for training too, where layers are written out then. The head,
        which has neither dropout nor checkpoints, is multiplied by copies in every training.
        """
        if self.place.kind != "cpu":
            return 0
        dropout = getattr(self.recipe.method, "dropout", 0.0)
        kept = packed_bytes(drawing.model)
        if not kept or self.recipe.train is None:
            return kept
        head = head_of(drawing.model)
        alone = 0 if head is None else head.weight.nbytes
        return kept + (alone if checkpointing or dropout else kept)

    def _bytes_per_weight(self, quantization: str) -> float:
        """Return the bytes that are moved to multiply with a weight once."""
        size = self.dtype.itemsize
        match quantization:
            case "nf4":
                return 0.5 + 2 * size  # read, written out, read
            case "int8":
                return 1 + 2 * size
        return size

    def relative(self, choice: Choice) -> float:
        """Return the time of a choice in the unit of one operation: products, and reading weights.

        Small micro-batches read all weights for few tokens; quantised weights are written out
        before they are multiplied. What else a step does is the same for every choice.
        """
        return choice.operations + BALANCE[self.place.kind] * choice.streamed

    @cached_property
    def own(self) -> Choice:
        """The recipe as it is."""
        train = self.recipe.train
        return self.choice(
            self.recipe.model.quantization,
            train is not None and train.gradient_checkpointing,
            1 if train is None else train.micro_batch_size,
            self.budget,
            self.recipe.inference.tokens_per_pass,
        )

    @property
    def budget(self) -> int | None:
        """The recipe's own `train.tokens_per_pass`."""
        return None if self.recipe.train is None else self.recipe.train.tokens_per_pass

    def by_tokens(self, choice: Choice) -> Choice | None:
        """Return a choice with its passes bounded by tokens alone instead of by rows.

        The budget is the largest power of two that fits, no larger than a whole step needs; rows
        of unequal lengths fill such passes evenly. None where nothing is trained, or where no
        budget that is worth a pass fits.
        """
        train = self.recipe.train
        if train is None:
            return None
        rows = train.batch_size
        most = int(self.batches(rows, None).nodes.max())
        budget = 1 << (most - 1).bit_length()
        while budget >= min(LEAST_TOKENS_PER_PASS, most):
            found = self.choice(
                choice.quantization, choice.checkpointing, rows, budget, choice.tokens_per_pass
            )
            if self.fits(found):
                return found
            budget //= 2
        return None

    def fits(self, choice: Choice) -> bool:
        """Whether the place has the memory."""
        return choice.needed <= self.place.capacity

    @cached_property
    def choices(self) -> list[Choice]:
        """Every way that is looked at; those with smaller passes only where these are needed."""
        made = []
        bar = tqdm(list(self._ways()), desc="plan", unit="choice", leave=False)
        for quantization, checkpointing, micro in bar:
            tokens = self.recipe.inference.tokens_per_pass
            choice = self.choice(quantization, checkpointing, micro, self.budget, tokens)
            while (
                not self.fits(choice)
                and choice.evaluation_is_highest
                and choice.fixed < self.place.capacity
                and tokens // 2 >= LEAST_TOKENS_PER_PASS
            ):
                tokens //= 2
                choice = self.choice(quantization, checkpointing, micro, self.budget, tokens)
            made.append(choice)
        return made

    def _ways(self) -> Iterator[tuple[str, bool, int]]:
        train = self.recipe.train
        full = isinstance(self.recipe.method, recipes.Full)
        for quantization in ("none",) if full else ("none", "nf4", "int8"):
            if train is None:
                yield quantization, False, 1
                continue
            for checkpointing in (False, True):
                for micro in reversed(self.micro_batch_sizes):
                    yield quantization, checkpointing, micro

    @property
    def micro_batch_sizes(self) -> list[int]:
        """Sizes that are looked at, the recipe's own among them."""
        train = self.recipe.train
        assert train is not None
        halves = [train.batch_size]
        while halves[-1] % 2 == 0 and len(halves) < MICRO_BATCHES - 1:
            halves.append(halves[-1] // 2)
        return sorted({*halves, 1, train.micro_batch_size})

    def options(self, choice: Choice) -> list[str]:
        """Return the `--set` values that turn the recipe into this choice."""
        recipe, train, options = self.recipe, self.recipe.train, []
        if choice.quantization != recipe.model.quantization:
            options.append(f"model.quantization={choice.quantization}")
        if train is not None and choice.micro_batch_size != train.micro_batch_size:
            options.append(f"train.micro_batch_size={choice.micro_batch_size}")
        if train is not None and choice.budget != train.tokens_per_pass:
            options.append(f"train.tokens_per_pass={choice.budget}")
        if train is not None and choice.checkpointing != train.gradient_checkpointing:
            options.append(f"train.gradient_checkpointing={str(choice.checkpointing).lower()}")
        if choice.tokens_per_pass != recipe.inference.tokens_per_pass:
            options.append(f"inference.tokens_per_pass={choice.tokens_per_pass}")
        return options

    def fastest(self, choices: Sequence[Choice]) -> Choice | None:
        """Return the fastest choice that fits; of equals, the one with fewest changes."""
        fitting = [choice for choice in choices if self.fits(choice)]
        return min(fitting, key=lambda c: (self.relative(c), len(self.options(c))), default=None)
