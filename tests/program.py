"""The program as a user types it, in this process or in one of its own, on a tiny model."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from llm_emo import cli, workflow

ROOT = Path(cli.__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"

SMALL = ("model.dtype=float32", "train.batch_size=4", "train.micro_batch_size=2",
         "train.epochs=2", "train.learning_rate=1e-2", "data.dev_fraction=0.3")  # fmt: skip
"""What makes a shipped recipe train on a fixture in a second, exactly repeatable."""


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def ok(self) -> "Outcome":
        assert self.code == 0, self.err
        return self

    def refused(self, *pieces: str, code: int = 2) -> "Outcome":
        """Hold that there is one message, that it holds the pieces, and nothing else happened."""
        assert self.code == code, f"exit {self.code}\n{self.out}\n{self.err}"
        assert self.out == ""
        assert "Traceback" not in self.err
        message = self.err[self.err.index("error: ") :]
        assert message.count("error: ") == 1
        assert message.count("\n") == 1, "one line"
        for piece in pieces:
            assert piece in message, f"{piece!r} is not in {message!r}"
        return self


def call(*arguments: object) -> Outcome:
    """Run `llm-emo ARGUMENTS` in this process; a traceback is an exception here."""
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["llm-emo", *map(str, arguments)]
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def spawn(
    *command: object, environment: Mapping[str, str] | None = None, timeout: int = 180
) -> Outcome:
    """Run `python COMMAND` in a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=clean() | dict(environment or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def clean() -> dict[str, str]:
    """Return an environment without what would steer the program."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LLM_EMO_DATA", "RANK")}
    return environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def settings(*values: str) -> list[str]:
    """Return the options that override recipe keys."""
    return [word for value in values for word in ("--set", value)]


def on(model: Path, *values: str, root: Path = FIXTURES, training: bool = True) -> list[object]:
    """Return the options that put a recipe on the fixtures and a tiny model."""
    small = [value for value in SMALL if training or not value.startswith("train.")]
    return ["--data-root", root, *settings(f"model.name={model}", *small, *values)]


def train(folder: Path, model: Path, recipe: str = "mastodon/lora", *values: str) -> Path:
    """Train a recipe on the fixtures into `folder`."""
    call("train", recipe, "-o", folder, *on(model, *values)).ok()
    return folder


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Press Ctrl-C a step beyond half of every training in this process."""
    own = workflow.Progress.on_step_end

    def pressed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own(self, args, state, control, **kwargs)
        if state.global_step == state.max_steps // 2 + 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workflow.Progress, "on_step_end", pressed)
        yield


def save_model(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Write a tiny model and its tokenizer."""
    tiny.model(seed=seed, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
