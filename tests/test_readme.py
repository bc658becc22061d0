"""The README's commands for ChatGLM2 users, typed one after the other on a tiny checkpoint."""

import re
import shlex
from pathlib import Path

import chatglm2_files
import chatglm2_tokens
import pytest
from program import FIXTURES, ROOT, call, settings

SECTION = "## ChatGLM2-6B, from download to exported adapter"

TINY = settings(
    "model.dtype=float32", "train.batch_size=4", "train.micro_batch_size=2", "train.epochs=1",
    "train.learning_rate=1e-2", "data.dev_fraction=0.3",
)  # fmt: skip
"""What makes the recipes train on a fixture in seconds; nothing of what the README shows."""


def commands() -> list[list[str]]:
    """Return the words of every command of the section, without comments."""
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.partition(SECTION)[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for line in "".join(blocks).splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with the checkpoint as somebody downloaded it."""
    folder = tmp_path_factory.mktemp("home")
    chatglm2_tokens.write_model(folder / "tokenizer.model", seed=0)
    checkpoint = chatglm2_files.write_checkpoint(folder / "chatglm2-6b", shards=3)
    (folder / "tokenizer.model").rename(checkpoint / "tokenizer.model")
    return folder


def test_every_command_of_the_section_does_what_the_reader_expects(home, monkeypatch):
    (home / "work").mkdir()
    monkeypatch.chdir(home / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LLM_EMO_DATA", str(FIXTURES))
    typed = commands()
    assert len(typed) > 8
    for words in typed:
        program, verb, *rest = words
        assert program == "llm-emo"
        tiny = TINY if verb == "train" else []
        call(verb, *(str(Path(word).expanduser()) for word in rest), *tiny).ok()
        if "-o" in rest:
            assert any(Path(rest[rest.index("-o") + 1]).iterdir())
