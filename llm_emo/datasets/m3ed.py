"""M3ED: dialogues of Chinese television series, seven emotions.

Labels are the official names. `votes` counts, in the official order of the classes, how
often the three annotators named each (one may name several); copies without their fields
have none. The official splits are by series. Utterance numbers have gaps, and one dialogue
counts out of order, so `turn` is the place in the file and the number stays in the uid.
`speaker` is the official letter, unique within a dialogue only; twelve rows have none.
"""

from pathlib import Path
from typing import Any

from llm_emo.datasets.base import Corpus, Layout, malformed, parse_choice, read_json, read_lines
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
    annotation = read_json(path)
    rows = []
    for movie in read_lines(movies):
        try:
            dialogues = annotation[movie.strip()]
        except (KeyError, TypeError):
            raise malformed(movies, "a series", movie, f"one that {path.name} annotates") from None
        for dialogue, content in dialogues.items():
            try:
                lines = content["Dialog"].items()
            except (KeyError, TypeError, AttributeError):
                raise malformed(path, dialogue, content, "an object with Dialog") from None
            for turn, (uid, line) in enumerate(lines):
                rows.append(_utterance(path, uid, dialogue, turn, line))
    return rows


def _utterance(path: Path, uid: str, dialogue: str, turn: int, line: Any) -> Utterance:
    try:
        text, emotions = line["Text"], line["EmoAnnotation"]
        label = emotions["final_main_emo"]
    except (KeyError, TypeError):
        raise malformed(path, uid, line, "Text and EmoAnnotation.final_main_emo") from None
    return Utterance(
        uid=uid,
        text=text.strip(),
        speaker=line.get("Speaker") or None,
        dialogue=dialogue,
        turn=turn,
        label=parse_choice(path, uid, label, LABELS),
        votes=_votes(path, uid, emotions),
    )


def _votes(path: Path, uid: str, emotions: dict[str, str]) -> tuple[int, ...] | None:
    ballots = [value for key, value in emotions.items() if key.startswith("EmoAnnotator")]
    if not ballots:
        return None
    named = [name.strip() for ballot in ballots for name in (ballot or "").split(",")]
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
