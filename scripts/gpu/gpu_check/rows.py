"""The rows that every part runs: real ones where the corpora are at hand, else made ones.

Made rows have the lengths of the real ones and no text. What decides speed and memory is how long
rows are and how many tokens they share, so `lengths.json` keeps, for each corpus, how many tokens
the instruction has (shared by all rows), how the lengths of the texts are distributed, and how
long the answers are. Made rows share the instruction only; real ones share a few words more.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_emo import recipes
from llm_emo.encoding import Encoded, Encoder
from llm_emo.errors import ModelError, RunError
from llm_emo.experiment import Experiment
from llm_emo.inference import Ids

CORPORA = ("friends", "sst5")
LENGTHS = Path(__file__).parents[1] / "lengths.json"

END = 2
"""ChatGLM2's end token."""
_PLAIN = range(300, 64000)
"""Ids of ordinary pieces in ChatGLM2's vocabulary: made rows hold no control token."""


@dataclass(frozen=True)
class Rows:
    """Rows of one corpus, drawn by a seed, and the k answers that scoring compares."""

    corpus: str
    source: str
    rows: tuple[Encoded, ...]
    answers: tuple[Ids, ...]

    def batches(self, size: int) -> list[tuple[Encoded, ...]]:
        """Return the rows in batches of `size`, each complete."""
        whole = len(self.rows) - len(self.rows) % size
        return [self.rows[start : start + size] for start in range(0, whole, size)]

    def folded(self, vocabulary: int) -> "Rows":
        """Return the same rows for a model of a smaller vocabulary.

        Equal tokens stay equal, so rows share at least what they shared.
        """
        rows = tuple(
            Encoded(row.uid, _fold(row.prompt, vocabulary), _fold(row.answer, vocabulary))
            for row in self.rows
        )
        answers = tuple(_fold(answer, vocabulary) for answer in self.answers)
        return Rows(self.corpus, self.source, rows, answers)


def _fold(ids: Ids, vocabulary: int) -> Ids:
    return tuple(token % vocabulary for token in ids)


def recipe_of(corpus: str, method: str) -> recipes.Recipe:
    """Return the reference recipe of a corpus for ChatGLM2-6B; `method` as recipes name it."""
    return recipes.load(f"{corpus}/chatglm2_{method}")


def draw(
    corpus: str, count: int, *, seed: int, root: Path | None, tokenizer: Path | None
) -> Rows:  # fmt: skip
    """Return `count` rows of a corpus: real ones if `root` is given, else made ones.

    Raises:
        DatasetError: the corpus is not under `root`.
        ModelError: `tokenizer` is none of ChatGLM2.
        RunError: the corpus has fewer rows.
    """
    if root is None:
        return made(corpus, count, seed=seed)
    assert tokenizer is not None
    recipe = recipe_of(corpus, "lora")
    experiment = Experiment.prepare(recipe, root)
    examples = experiment.examples("train")
    if count > len(examples):
        raise RunError(
            f"{corpus}: {count} rows are wanted, but train has {len(examples)}; take fewer "
            "--steps or --rounds, or a smaller --batch"
        )
    chosen = random.Random(f"{seed}/{corpus}").sample(examples, count)
    encoder = Encoder(load_tokenizer(tokenizer), recipe.prompt.max_length)
    answers = tuple(encoder.answers(experiment.answers))
    return Rows(corpus, "corpus", tuple(encoder.encode(chosen)), answers)


def load_tokenizer(path: Path) -> Any:
    """Return ChatGLM2's tokenizer from its `tokenizer.model` or from a converted folder.

    Raises:
        ModelError: it is neither.
    """
    if path.is_dir():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    if not path.is_file():
        raise ModelError(f"--tokenizer: no file or folder {path}")
    from llm_emo.models import chatglm2_tokenizer

    return chatglm2_tokenizer.build(path)


def recorded(path: Path = LENGTHS) -> dict[str, Any]:
    """Return what `lengths.py` wrote."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def made(corpus: str, count: int, *, seed: int) -> Rows:
    """Return `count` rows of random ids with a corpus's recorded lengths."""
    content = recorded()
    facts: Mapping[str, Any] = content["corpora"][corpus]
    # The words around the texts are one draw, the same for every seed.
    fixed = random.Random(corpus)
    shared = tuple(fixed.choices(_PLAIN, k=facts["shared"]))
    tail = tuple(fixed.choices(_PLAIN, k=facts["tail"]))
    # Answers part at their first token, as the labels of one set mostly do.
    firsts = fixed.sample(_PLAIN, len(facts["answers"]))
    answers = tuple(
        (first, *fixed.choices(_PLAIN, k=answer["tokens"] - 2), END)
        for first, answer in zip(firsts, facts["answers"], strict=True)
    )
    drawn = random.Random(f"{seed}/{corpus}")
    weights = [answer["share"] for answer in facts["answers"]]
    rows = []
    for row in range(count):
        length = at(content["percentiles"], facts["text"], 100 * drawn.random())
        text = drawn.choices(_PLAIN, k=length)
        (answer,) = drawn.choices(answers, weights)
        rows.append(Encoded(f"{corpus}-{row}", (*shared, *text, *tail), answer))
    return Rows(corpus, "recorded lengths", tuple(rows), answers)


def at(percentiles: Sequence[float], values: Sequence[float], place: float) -> int:
    """Return the value at a percentile, 0 to 100, between recorded ones by a straight line.

    >>> at([0, 50, 100], [2, 10, 30], 75)
    20
    """
    upper = next(i for i, percentile in enumerate(percentiles) if place <= percentile and i)
    low, high = percentiles[upper - 1], percentiles[upper]
    share = (place - low) / (high - low)
    return round(values[upper - 1] + share * (values[upper] - values[upper - 1]))
