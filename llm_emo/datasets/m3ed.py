"""M3ED: dialogues of Chinese television series, seven emotions.

Labels are the official names. `votes` counts, in the official order of the classes, how
often the three annotators named each (one may name several); copies without their fields
have none. The official splits are by series. Utterance numbers have gaps, and one dialogue
counts out of order, so `turn` is the place in the file and the number stays in the uid.
`speaker` is the official letter, unique within a dialogue only; twelve rows have none.
"""

from pathlib import Path
from typing import Any

from llm_emo.datasets.base import (
    Corpus,
    Layout,
    malformed,
    parse_choice,
    parse_optional_text,
    parse_text,
    read_json,
    read_lines,
)
from llm_emo.types import Utterance

LABELS = ("Happy", "Neutral", "Sad", "Disgust", "Anger", "Fear", "Surprise")
"""In the official order of ids, 0 to 6."""

LISTS = {
    split: f"movie_list_{'val' if split == 'dev' else split}.txt"
    for split in ("train", "dev", "test")
}


def reader(name: str) -> Layout:
    """Return the layout whose annotation file is called `name`."""

    def read(base: Path, part: str) -> list[Utterance]:
        return read_annotation(base / name, base / "splitInfo" / LISTS[part])

    return Layout(
        name=name,
        files={split: (name, f"splitInfo/{file}") for split, file in LISTS.items()},
        read=read,
        bases=(".", "M3ED"),
    )


def read_annotation(path: Path, movies: Path) -> list[Utterance]:
    """Return the utterances of the series that the file `movies` lists, in its order."""
    annotation = _object(path, "top level", read_json(path))
    rows = []
    for movie in read_lines(movies):
        if movie.strip() not in annotation:
            raise malformed(movies, "a series", movie, f"one that {path.name} annotates")
        dialogues = _object(path, movie, annotation[movie.strip()])
        for dialogue, content in dialogues.items():
            lines = _object(path, dialogue, _object(path, dialogue, content).get("Dialog"))
            for turn, (uid, line) in enumerate(lines.items()):
                rows.append(_utterance(path, uid, dialogue, turn, _object(path, uid, line)))
    return rows


def _object(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise malformed(path, where, value, "an object: series, dialogue, Dialog, utterance")
    return value


def _utterance(path: Path, uid: str, dialogue: str, turn: int, line: dict[str, Any]) -> Utterance:
    emotions = _object(path, f"{uid}, EmoAnnotation", line.get("EmoAnnotation"))
    where = f"{uid}, final_main_emo"
    return Utterance(
        uid=parse_text(path, uid, uid),
        text=parse_text(path, f"{uid}, Text", line.get("Text")),
        speaker=parse_optional_text(path, f"{uid}, Speaker", line.get("Speaker")),
        dialogue=parse_text(path, dialogue, dialogue),
        turn=turn,
        label=parse_choice(path, where, emotions.get("final_main_emo"), LABELS),
        votes=_votes(path, uid, emotions),
    )


def _votes(path: Path, uid: str, emotions: dict[str, Any]) -> tuple[int, ...] | None:
    ballots = [
        parse_optional_text(path, f"{uid}, {key}", value) or ""
        for key, value in emotions.items()
        if key.startswith("EmoAnnotator")
    ]
    if not ballots:
        return None
    named = [name.strip() for ballot in ballots for name in ballot.split(",")]
    for name in named:
        parse_choice(path, uid, name, (*LABELS, ""))
    return tuple(named.count(label) for label in LABELS)


CORPUS = Corpus(
    name="m3ed",
    title="M3ED",
    language="zh",
    license="for research; ask its authors",
    homepage="https://github.com/AIM3-RUC/RUCM3ED",
    how_to_get=(
        "ask for M3ED at https://github.com/AIM3-RUC/RUCM3ED and put annotation.json and "
        "splitInfo/ into the folder m3ed"
    ),
    annotation="emotion of an utterance, 7 classes",
    layouts=(reader("annotation.json"), reader("annotation_reconstructed.json")),
)
