r"""TweetEval, task emotion: tweets with one of four emotions.

The text is kept as published, because published numbers are on it: `@user`, `&amp;` and a
literal backslash-n stay; only the trailing space of every line goes. The uid is the split
and the line in the file.
"""

from pathlib import Path
from typing import Any

from llm_emo.datasets.base import (
    Corpus,
    Hub,
    Layout,
    malformed,
    parse_choice,
    parse_text,
    read_lines,
)
from llm_emo.errors import DatasetError
from llm_emo.types import Utterance

LABELS = ("anger", "joy", "optimism", "sadness")
"""In the order of the ids, 0 to 3."""

NAMES = {"train": "train", "dev": "val", "test": "test"}


def read(base: Path, part: str) -> list[Utterance]:
    """Read `<part>_text.txt` beside `<part>_labels.txt`, line by line."""
    _check_mapping(base / "mapping.txt")
    texts_path, labels_path = (base / f"{NAMES[part]}_{kind}.txt" for kind in ("text", "labels"))
    texts, labels = read_lines(texts_path), read_lines(labels_path)
    if len(texts) != len(labels):
        raise malformed(
            labels_path, "the file", f"{len(labels)} labels", f"{len(texts)}, one a text"
        )
    rows = []
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
        label = parse_choice(labels_path, f"line {number}", label.strip(), ("0", "1", "2", "3"))
        text = parse_text(texts_path, f"line {number}", text)
        rows.append(Utterance(f"{part}/{number}", text, label=LABELS[int(label)]))
    return rows


def _check_mapping(path: Path) -> None:
    """Compare mapping.txt, where it is there, with the order of classes that is built in."""
    if not path.is_file():
        return
    for number, line in enumerate(read_lines(path)):
        if line.split("\t") != [str(number), *LABELS[number : number + 1]]:
            raise malformed(path, f"line {number + 1}", line, f"the classes {', '.join(LABELS)}")


def read_hub(table: Any, part: str) -> list[Utterance]:
    """Read a dataset with the columns of `cardiffnlp/tweet_eval`, config emotion."""
    names = getattr(table.features["label"], "names", None)
    if names is not None and tuple(names) != LABELS:
        raise DatasetError(
            f"tweeteval_emotion: the dataset has the classes {', '.join(names)}; expected "
            f"{', '.join(LABELS)}: choose the config 'emotion'"
        )
    source = Path(f"tweeteval_emotion {part}")
    rows = []
    for number, row in enumerate(table, 1):
        where = f"row {number}"
        label = parse_choice(source, where, str(row["label"]), ("0", "1", "2", "3"))
        text = parse_text(source, where, row["text"])
        rows.append(Utterance(f"{part}/{number}", text, label=LABELS[int(label)]))
    return rows


CORPUS = Corpus(
    name="tweeteval_emotion",
    title="TweetEval, emotion",
    language="en",
    license="for research; tweets under Twitter's terms",
    homepage="https://github.com/cardiffnlp/tweeteval",
    how_to_get=(
        "get the files of datasets/emotion from https://github.com/cardiffnlp/tweeteval and "
        "put them into the folder tweeteval_emotion"
    ),
    annotation="emotion of a tweet, 4 classes",
    layouts=(
        Layout(
            name="official text files",
            files={
                split: (f"{name}_text.txt", f"{name}_labels.txt") for split, name in NAMES.items()
            },
            read=read,
            bases=(".", "datasets/emotion", "emotion"),
            extra=("mapping.txt",),
        ),
    ),
    hub=Hub(
        example="cardiffnlp/tweet_eval@REVISION",
        columns=("text", "label"),
        read=read_hub,
        config="emotion",
    ),
)
