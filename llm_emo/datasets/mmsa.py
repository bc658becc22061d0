"""The label.csv of MMSA, in which MOSI and CH-SIMS are passed on. Not a corpus itself.

`dialogue` is the video, `turn` the number of the clip.
"""

from pathlib import Path

from llm_emo.datasets.base import (
    Layout,
    as_dicts,
    malformed,
    parse_choice,
    parse_count,
    parse_number,
    parse_text,
    read_csv,
)
from llm_emo.types import SPLITS, Utterance

COLUMNS = (
    "video_id",
    "clip_id",
    "text",
    "label",
    "label_T",
    "label_A",
    "label_V",
    "annotation",
    "mode",
)
MODES = {"train": "train", "dev": "valid", "test": "test"}


def layout(bound: float, *folders: str) -> Layout:
    """Return the layout of a corpus with scores in [-bound, bound].

    Its label.csv lies in the corpus's own folder or in one of `folders` below that.
    """
    return Layout(
        name="MMSA label.csv",
        files=dict.fromkeys(SPLITS, ("label.csv",)),
        read=lambda base, part: read_label_csv(base / "label.csv", part, bound),
        bases=(".", *folders),
    )


def read_label_csv(path: Path, part: str, bound: float) -> list[Utterance]:
    """Return the rows of one split, with scores in [-bound, bound].

    Ids stay text: a video id may start with a dash or be all digits, and the zeros before
    a clip id belong to it. Some copies have no header row; they have the nine columns of
    MMSA in its order. The single-modality labels may be empty and are not read.

    Raises:
        DatasetError: a cell is not as described, or the file has no row of this split.
    """
    table = [row for row in read_csv(path) if row]
    if not table:
        raise malformed(path, "the file", "", "rows")
    headed = "video_id" in table[0]
    header, rows = (table[0], table[1:]) if headed else (list(COLUMNS), table)
    required = ("video_id", "clip_id", "text", "label", "mode")
    found = []
    for number, row in enumerate(as_dicts(path, rows, header, required), 1 + headed):
        where = f"row {number}"
        if parse_choice(path, where, row["mode"], tuple(MODES.values())) != MODES[part]:
            continue
        video, clip = row["video_id"], row["clip_id"]
        found.append(
            Utterance(
                uid=f"{video}/{clip}",
                text=parse_text(path, where, row["text"]),
                dialogue=video,
                turn=parse_count(path, where, clip),
                score=parse_number(path, where, row["label"], -bound, bound),
            )
        )
    if not found:
        raise malformed(path, "column 'mode'", "no such row", f"rows of mode {MODES[part]!r}")
    return found
