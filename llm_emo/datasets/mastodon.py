"""Mastodon dialogues with a sentiment and a dialogue act for every post.

Labels are the raw signs: `+`, `-`, and `*` for neutral. The native text files have the
original wording and no dev split; the JSON files that later work passes on have one, and
differ in 40 texts (anonymised). Native files are taken where both lie there.
"""

import re
from pathlib import Path

from llm_emo.datasets.base import (
    Corpus,
    Layout,
    malformed,
    parse_choice,
    parse_text,
    read_dialogues,
    read_lines,
)
from llm_emo.types import SPLITS, Utterance

LINE = re.compile(r"(\d{1,9}) ([-+*])_(\S+) (.*)")
SIGNS = ("+", "-", "*")


def read_native(base: Path, part: str) -> list[Utterance]:
    """Read `data<part>Joint.txt`: lines `index sign_act text`; index 0 starts a dialogue."""
    path = base / f"data{part}Joint.txt"
    rows: list[Utterance] = []
    dialogue, turn = -1, -1
    for number, line in enumerate(read_lines(path), 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise malformed(path, f"line {number}", line, "'index sign_act text'")
        index = int(match[1])
        if index == 0:
            dialogue += 1
        elif index != turn + 1 or dialogue < 0:
            raise malformed(path, f"line {number}", index, f"turn {turn + 1} or a new dialogue (0)")
        turn = index
        text = parse_text(path, f"line {number}", match[4])
        rows.append(_utterance(part, dialogue, turn, text, match[2]))
    return rows


def read_json_files(base: Path, part: str) -> list[Utterance]:
    """Read `<part>.json`: a list of dialogues, each a list of utterance, sentiment, act."""
    path = base / f"{part}.json"
    rows = []
    for dialogue, lines in enumerate(read_dialogues(path)):
        for turn, line in enumerate(lines):
            where = f"dialogue {dialogue}, turn {turn}"
            if not isinstance(line, dict):
                raise malformed(path, where, line, "an object with the key 'utterance'")
            sign = parse_choice(path, where, line.get("sentiment"), SIGNS)
            text = parse_text(path, where, line.get("utterance"))
            rows.append(_utterance(part, dialogue, turn, text, sign))
    return rows


def _utterance(part: str, dialogue: int, turn: int, text: str, sign: str) -> Utterance:
    name = f"{part}/{dialogue}"
    return Utterance(f"{name}/{turn}", text, dialogue=name, turn=turn, label=sign)


CORPUS = Corpus(
    name="mastodon",
    title="Mastodon dialogues with sentiment and dialogue acts",
    language="en",
    license="for research",
    homepage="https://github.com/cerisara/DialogSentimentMastodon",
    how_to_get=(
        "get datatrainJoint.txt and datatestJoint.txt from "
        "https://github.com/cerisara/DialogSentimentMastodon and put them into the folder "
        "mastodon/native"
    ),
    annotation="sentiment of a post, 3 classes",
    layouts=(
        Layout(
            name="native text files",
            files={"train": ("datatrainJoint.txt",), "test": ("datatestJoint.txt",)},
            read=read_native,
            bases=("native", "."),
        ),
        Layout(
            name="JSON files",
            files={split: (f"{split}.json",) for split in SPLITS},
            read=read_json_files,
            bases=("json", "."),
        ),
    ),
)
