"""MELD: television dialogues with seven emotions; an extension of EmotionLines-Friends.

Dialogue numbers restart in every split, so a uid carries its split. Files are UTF-8; copies
that a spreadsheet saved as cp1252 are read as such. MELD shares dialogues with Friends: a
model trained on one has seen test text of the other (see `protocols.leaks`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_emo.datasets.base import (
    Corpus,
    Hub,
    Layout,
    as_dicts,
    malformed,
    parse_choice,
    parse_count,
    parse_name,
    parse_optional_text,
    parse_text,
    read_csv,
)
from llm_emo.types import SPLITS, Utterance

LABELS = ("neutral", "joy", "sadness", "fear", "anger", "surprise", "disgust")
COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")


def read(base: Path, part: str) -> list[Utterance]:
    """Read `<part>_sent_emo.csv`."""
    path = base / f"{part}_sent_emo.csv"
    table = read_csv(path, ("utf-8-sig", "cp1252"))
    if not table:
        raise malformed(path, "the file", "", "rows")
    return _utterances(path, as_dicts(path, table[1:], table[0], COLUMNS), part, first=2)


def read_hub(table: Any, part: str) -> list[Utterance]:
    """Read a dataset with the columns of the CSV files."""
    return _utterances(Path(f"meld {part}"), table, part, first=1)


def _utterances(
    path: Path, rows: Iterable[Mapping[str, Any]], part: str, first: int
) -> list[Utterance]:
    found = []
    for number, row in enumerate(rows, first):
        where = f"row {number}"
        dialogue = parse_name(path, f"{where}, Dialogue_ID", row["Dialogue_ID"])
        number_in = f"{where}, Utterance_ID"
        turn = parse_name(path, number_in, row["Utterance_ID"])
        found.append(
            Utterance(
                uid=f"{part}/{dialogue}/{turn}",
                text=parse_text(path, f"{where}, Utterance", row["Utterance"]),
                speaker=parse_optional_text(path, f"{where}, Speaker", row["Speaker"]),
                dialogue=f"{part}/{dialogue}",
                turn=parse_count(path, number_in, turn),
                label=parse_choice(path, where, row["Emotion"], LABELS),
            )
        )
    return found


CORPUS = Corpus(
    name="meld",
    title="MELD",
    language="en",
    license="GPL-3.0",
    homepage="https://affective-meld.github.io/",
    how_to_get=(
        "get train_sent_emo.csv, dev_sent_emo.csv and test_sent_emo.csv from "
        "https://github.com/declare-lab/MELD (data/MELD) and put them into the folder meld"
    ),
    annotation="emotion of an utterance, 7 classes",
    layouts=(
        Layout(
            name="official CSV",
            files={split: (f"{split}_sent_emo.csv",) for split in SPLITS},
            read=read,
            bases=(".", "data/MELD", "MELD.Raw"),
        ),
    ),
    hub=Hub(example="TwinkStart/MELD@REVISION", columns=COLUMNS, read=read_hub),
)
