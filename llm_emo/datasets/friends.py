"""EmotionLines, the Friends part: television dialogues with seven votes an utterance.

Labels are the eight raw ones; `non-neutral` means that no emotion had a majority. `votes`
counts the annotators in the order neutral, joy, sadness, fear, anger, surprise, disgust.
C1 control characters are punctuation of cp1252 and are turned into it; other characters,
also typographic quotes beside them, stay as they are.
"""

from pathlib import Path
from typing import Any

from llm_emo.datasets.base import (
    Corpus,
    Hub,
    Layout,
    malformed,
    parse_choice,
    parse_name,
    parse_optional_text,
    parse_text,
    read_dialogues,
)
from llm_emo.types import SPLITS, Utterance

VOTES = ("neutral", "joy", "sadness", "fear", "anger", "surprise", "disgust")
LABELS = (*VOTES, "non-neutral")


def _punctuation() -> dict[int, str]:
    """Return the C1 code points that cp1252 gives a character; five have none and stay."""
    table = {}
    for code in range(0x80, 0xA0):
        try:
            table[code] = bytes([code]).decode("cp1252")
        except UnicodeDecodeError:
            continue
    return table


C1 = _punctuation()


def read(base: Path, part: str) -> list[Utterance]:
    """Read `friends_<part>.json`."""
    path = base / f"friends_{part}.json"
    rows = []
    for number, dialogue in enumerate(read_dialogues(path)):
        for turn, line in enumerate(dialogue):
            where = f"dialogue {number}, turn {turn}"
            if not isinstance(line, dict):
                raise malformed(path, where, line, "an object with the key 'utterance'")
            rows.append(
                Utterance(
                    uid=f"{part}/{number}/{turn}",
                    text=_text(path, where, line.get("utterance")),
                    speaker=_speaker(path, where, line.get("speaker")),
                    dialogue=f"{part}/{number}",
                    turn=turn,
                    label=parse_choice(path, where, line.get("emotion"), LABELS),
                    votes=_votes(path, where, line.get("annotation")),
                )
            )
    return rows


def _text(path: Path, where: str, text: object) -> str:
    # Remapped before it is stripped: U+0085, an ellipsis of cp1252, counts as white space.
    return parse_text(path, where, text.translate(C1) if isinstance(text, str) else text)


def _speaker(path: Path, where: str, speaker: object) -> str | None:
    named = parse_optional_text(path, where, speaker)
    return named.translate(C1) if named else None


def _votes(path: Path, where: str, digits: Any) -> tuple[int, ...] | None:
    if digits is None:
        return None
    if not isinstance(digits, str) or len(digits) != len(VOTES) or not digits.isdecimal():
        raise malformed(path, where, digits, f"{len(VOTES)} vote digits such as '2000030'")
    return tuple(int(digit) for digit in digits)


def read_hub(table: Any, part: str) -> list[Utterance]:
    """Read a dataset with one line a row; lines of one `dialogue_id` follow each other."""
    names = table.column_names
    source = Path(f"friends {part}")
    rows: list[Utterance] = []
    turns: dict[str, int] = {}
    for number, line in enumerate(table):
        where = f"row {number}"
        dialogue = None
        if "dialogue_id" in names:
            dialogue = f"{part}/{parse_name(source, where, line['dialogue_id'])}"
        turn = turns.get(dialogue, 0) if dialogue is not None else None
        if dialogue is not None and turn is not None:
            turns[dialogue] = turn + 1
        rows.append(
            Utterance(
                uid=f"{part}/{number}" if dialogue is None else f"{dialogue}/{turn}",
                text=_text(source, where, line["utterance"]),
                speaker=_speaker(source, where, line.get("speaker")),
                dialogue=dialogue,
                turn=turn,
                label=parse_choice(source, where, line["emotion"], LABELS),
                votes=_votes(source, where, line["annotation"]) if "annotation" in names else None,
            )
        )
    return rows


CORPUS = Corpus(
    name="friends",
    title="EmotionLines, Friends",
    language="en",
    license="for research; not to be redistributed",
    homepage="https://doraemon.iis.sinica.edu.tw/emotionlines/",
    how_to_get=(
        "ask for EmotionLines at https://doraemon.iis.sinica.edu.tw/emotionlines/ and put "
        "friends_train.json, friends_dev.json and friends_test.json into the folder friends"
    ),
    annotation="emotion of an utterance, 7 classes and non-neutral, 5 votes",
    layouts=(
        Layout(
            name="EmotionLines JSON",
            files={split: (f"friends_{split}.json",) for split in SPLITS},
            read=read,
            bases=(".", "Friends", "EmotionLines/Friends"),
        ),
    ),
    hub=Hub(
        example="OWNER/NAME@REVISION",
        columns=("utterance", "emotion"),
        read=read_hub,
    ),
)
