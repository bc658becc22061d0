"""Sides that take turns on the same batches, each on the clock and on the allocator's books.

A B A B, so that a device that slows down slows all sides. A side that runs out of memory gives
its memory back and goes on with half the rows in a pass, as a user would; that is recorded.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_emo.encoding import Encoded

Batch = Sequence[Encoded]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Side:
    """One way of doing the same work.

    `work` does a batch in passes of at most so many rows; `tokens` says how many tokens the
    transformer runs for that; `clean` drops what a pass that was cut short left behind; `around`
    is entered before the clock starts.
    """

    name: str
    work: Callable[[Batch, int], object]
    tokens: Callable[[Batch, int], int]
    clean: Callable[[], None] = _nothing
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Clock:
    """How long to measure.

    `seconds` bounds all turns of all sides together: on a slow device turns are shortened to as
    many steps as fit, at least one.
    """

    rounds: int
    steps: int
    warm_up: int
    seconds: float


@dataclass
class _State:
    side: Side
    micro: int
    out_of_memory_at: list[int] = field(default_factory=list)
    message: str | None = None
    turns: dict[int, list[float]] = field(default_factory=dict)
    """Seconds of each step, by round."""
    tokens: list[int] = field(default_factory=list)
    peak: dict[str, int] | None = None


def say(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Give unused memory back, and let the peak begin here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int] | None:
    """Return the most bytes in use and the most held by the allocator; on a CPU, nothing."""
    if device.type != "cuda":
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def guarded(run: Callable[[], object], clean: Callable[[], None] = _nothing) -> str | None:
    """Run; return None, or why there was no memory for it.

    Other errors pass. The message is all that is kept of the error: its traceback would hold the
    tensors that must go.
    """
    message: str | None = None
    try:
        run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:300]
    if message is not None:
        clean()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return message


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, in torch's words or in those of a library below it."""
    text = str(error).lower()
    known = ("out of memory", "alloc_failed", "allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in known)
    )


def measure(
    sides: Sequence[Side], batches: Sequence[Batch], clock: Clock, device: torch.device
) -> dict[str, Any]:
    """Measure all sides on the same batches; return rates, memory and ratios to the first side.

    Args:
        sides: The first is the one that the others are compared with.
        batches: At least `clock.rounds * clock.steps` batches of one size.
        clock: How long to measure.
        device: Where the sides run.
    """
    states = [_State(side, len(batches[0])) for side in sides]
    seconds = sum(_probe(state, batches, device) for state in states)
    steps = clock.steps
    if seconds > 0:
        steps = max(1, min(clock.steps, int(clock.seconds / (clock.rounds * seconds))))
    for turn in range(clock.rounds):
        share = batches[turn * clock.steps : turn * clock.steps + steps]
        for state in states:
            _take_turn(state, turn, share, clock, device)
        rates = [
            f"{state.side.name} {_rate(state.turns[turn], len(batches[0])):.3g}/s"
            for state in states
            if turn in state.turns
        ]
        say(f"    round {turn + 1} of {clock.rounds}: {', '.join(rates) or 'nothing fits'}")
    return {
        "batch": len(batches[0]),
        "rounds": clock.rounds,
        "steps_per_round": steps,
        "sides": {state.side.name: _report(state, len(batches[0])) for state in states},
        "ratios": _ratios(states),
    }


def _probe(state: _State, batches: Sequence[Batch], device: torch.device) -> float:
    """Find how many rows fit into a pass, on the batch with the most tokens; return a step's time.

    It also loads kernels and makes the optimiser's state, and its peak counts.
    """
    side = state.side
    while state.micro:
        largest = max(batches, key=lambda batch: side.tokens(batch, state.micro))
        forget_peak(device)
        seconds: list[float] = []

        def twice(batch: Batch = largest, into: list[float] = seconds) -> None:
            with side.around():
                into.extend(_timed(state, batch, device) for _ in range(2))

        message = guarded(twice, side.clean)
        if message is None:
            state.peak = peak(device)
            return seconds[-1]
        _halve(state, message)
    return 0.0


def _halve(state: _State, message: str) -> None:
    """Go on with half the rows in a pass; what was timed with more is not comparable."""
    say(f"    {state.side.name}: {state.micro} rows do not fit into a pass: {message}")
    state.out_of_memory_at.append(state.micro)
    state.message = message
    state.micro //= 2
    state.turns.clear()
    state.tokens.clear()
    state.peak = None


def _take_turn(
    state: _State, turn: int, share: Sequence[Batch], clock: Clock, device: torch.device
) -> None:
    """Time a side on `share`, with fewer rows in a pass each time that memory runs out."""
    while state.micro:
        message = guarded(lambda: _turn(state, turn, share, clock, device), state.side.clean)
        if message is None:
            return
        _halve(state, message)


def _turn(
    state: _State, turn: int, share: Sequence[Batch], clock: Clock, device: torch.device
) -> None:
    forget_peak(device)
    with state.side.around():
        for _ in range(clock.warm_up):
            _timed(state, share[0], device)
        state.turns[turn] = [_timed(state, batch, device) for batch in share]
    state.tokens += [state.side.tokens(batch, state.micro) for batch in share]
    now = peak(device)
    if now is not None:
        before = state.peak or {}
        state.peak = {name: max(before.get(name, 0), value) for name, value in now.items()}


def _timed(state: _State, batch: Batch, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    state.side.work(batch, state.micro)
    synchronize(device)
    return time.perf_counter() - started


def _rate(seconds: Sequence[float], size: int) -> float:
    return size * len(seconds) / sum(seconds)


def _report(state: _State, size: int) -> dict[str, Any]:
    trouble = {"out_of_memory_at": state.out_of_memory_at, "message": state.message}
    if not state.turns:
        return {"status": "out of memory", **trouble}
    return {
        "status": "measured",
        **trouble,
        "micro_batch": state.micro,
        "examples_per_second": spread([_rate(turn, size) for turn in state.turns.values()]),
        "seconds_per_step": list(state.turns.values()),
        "tokens_per_step": statistics.mean(state.tokens),
        "peak_memory": state.peak,
    }


def _ratios(states: Sequence[_State]) -> dict[str, dict[str, float]]:
    """Return the first side's rate over each other's, round by round on the same batches."""
    first, *others = states
    ratios = {}
    for other in others:
        common = [turn for turn in first.turns if turn in other.turns]
        if common:
            ratios[other.side.name] = spread(
                [sum(other.turns[turn]) / sum(first.turns[turn]) for turn in common]
            )
    return ratios


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
