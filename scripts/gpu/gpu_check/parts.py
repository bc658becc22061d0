"""The parts of the check, each a measurement that stands by itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_check import exact, infer, machine, model, train
from gpu_check.rows import Rows, draw, recipe_of
from gpu_check.turns import Clock, forget_peak, peak, say
from llm_emo import methods, recipes, trie
from llm_emo.errors import ModelError
from llm_emo.models.chatglm2 import CHATGLM2_6B, Layout

EXACT = "exact"
TRAIN = ("lora/bf16", "p_tuning_v2/bf16", "lora/nf4", "p_tuning_v2/nf4")
ANSWERS = ("answers/bf16", "answers/nf4")
PARTS = (EXACT, *TRAIN, *ANSWERS)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    device: str
    tiny: bool
    cap_gib: float
    batch: int
    rounds: int
    steps: int
    warm_up: int
    new_tokens: int
    minutes: float
    seed: int
    corpora: tuple[str, ...]
    data_root: Path | None
    tokenizer: Path | None

    @property
    def layout(self) -> Layout:
        """Sizes of the model that is timed."""
        return model.TINY if self.tiny else CHATGLM2_6B

    @property
    def clock(self) -> Clock:
        """How long one measurement takes."""
        return Clock(self.rounds, self.steps, self.warm_up, 60 * self.minutes)

    def rows(self, corpus: str, count: int, vocabulary: int) -> Rows:
        """Return rows of a corpus, the same for every part and side."""
        drawn = draw(
            corpus, count, seed=self.seed, root=self.data_root, tokenizer=self.tokenizer
        )  # fmt: skip
        return drawn.folded(vocabulary)


Keep = Callable[[dict[str, Any]], None]
"""Takes what is measured so far, lest a crash lose it."""


def run(part: str, settings: Settings, keep: Keep) -> dict[str, Any]:
    """Run one part; return what it measured.

    Raises:
        torch.OutOfMemoryError: the model itself does not fit, or what no smaller pass helps.
        EmoError: rows, tokenizer or method do not fit.
    """
    device = torch.device(settings.device)
    memory = machine.cap(device, settings.cap_gib)
    started = time.perf_counter()
    if part == EXACT:
        result = _exact(settings, device)
    else:
        measure = _train if part in TRAIN else _answers
        result = measure(part, settings, device, keep)
    return {
        "status": "measured",
        "seconds": round(time.perf_counter() - started, 1),
        "memory": memory and {**memory, "outside_allocator": machine.outside_allocator(device)},
        **result,
    }


def _exact(settings: Settings, device: torch.device) -> dict[str, Any]:
    layout = model.TINY if settings.tiny else model.SMALL
    # Two passes of one batch must be possible.
    size = max(2, settings.batch - settings.batch % 2)
    rows = settings.rows(settings.corpora[0], size, layout.vocab)
    of = {method: recipe_of(settings.corpora[0], method) for method in exact.METHODS}
    return exact.compare(
        layout, rows.rows, rows.answers, of,
        new_tokens=settings.new_tokens, device=device, seed=settings.seed,
    )  # fmt: skip


def _base(part: str, settings: Settings, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Return the base model of a part, and what it takes."""
    weights: model.Quantization = "nf4" if part.endswith("nf4") else "none"
    say("    making the model")
    forget_peak(device)
    started = time.perf_counter()
    base = model.build(
        settings.layout, dtype=torch.bfloat16, quantization=weights, device=device,
        seed=settings.seed,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return base, {
        "seconds_to_make": round(time.perf_counter() - started, 1),
        "peak_memory_to_make": peak(device),
        "memory_of_base": _allocated(device),
    }


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _adapted(base: Any, method: recipes.Method, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Return the model as the program wraps it, and what the program sees of it."""
    torch.manual_seed(settings.seed)
    adapted = methods.adapt(base, method)
    try:  # the program asks every model that it loads
        verified: float | str = trie.verify(adapted)
    except ModelError as error:
        verified = str(error)
        say(f"    {error}")
    return adapted, {
        "method": method.model_dump(mode="json"),
        "parameters": train.counted(adapted),
        "memory_of_model": _allocated(adapted_device(adapted)),
        "verified": verified,
    }


def adapted_device(adapted: Any) -> torch.device:
    """Return where an adapted model is."""
    return next(adapted.parameters()).device  # type: ignore[no-any-return]


def _train(part: str, settings: Settings, device: torch.device, keep: Keep) -> dict[str, Any]:
    kind = part.partition("/")[0]
    base, made = _base(part, settings, device)
    first = recipe_of(settings.corpora[0], kind)
    adapted, wrapped = _adapted(base, first.method, settings)
    result, corpora = {**made, **wrapped}, {}
    for corpus in settings.corpora:
        rows = settings.rows(
            corpus, settings.rounds * settings.steps * settings.batch, base.config.vocab_size
        )
        say(f"  {part}: {corpus}, {rows.source}")
        corpora[corpus] = {
            "rows": rows.source,
            **train.compare(
                adapted, base, recipe_of(corpus, kind), rows.batches(settings.batch),
                settings.clock, device,
            ),
        }  # fmt: skip
        keep({**result, "corpora": corpora})
    return {**result, "corpora": corpora}


def _answers(part: str, settings: Settings, device: torch.device, keep: Keep) -> dict[str, Any]:
    base, made = _base(part, settings, device)
    adapted, wrapped = _adapted(base, recipes.ZeroShot(kind="zero_shot"), settings)
    result, corpora = {**made, **wrapped}, {}
    for corpus in settings.corpora:
        rows = settings.rows(
            corpus, settings.rounds * settings.steps * settings.batch, base.config.vocab_size
        )
        say(f"  {part}: {corpus}, {rows.source}")
        corpora[corpus] = {
            "rows": rows.source,
            **infer.compare(
                adapted, rows.batches(settings.batch), rows.answers, settings.new_tokens,
                settings.clock, device,
            ),
        }  # fmt: skip
        keep({**result, "corpora": corpora})
    return {**result, "corpora": corpora}
