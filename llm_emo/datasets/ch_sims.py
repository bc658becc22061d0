"""CH-SIMS: clips of films and shows in Mandarin, each scored from -1 to 1 in steps of 0.2.

`dialogue` is the video and `turn` the number of the clip; the official splits part most
videos. Six texts occur twice, two of them with conflicting scores; all rows are kept.
"""

from pathlib import Path

from llm_emo.datasets.base import Corpus, Layout
from llm_emo.datasets.mmsa import read_label_csv
from llm_emo.types import SPLITS, Utterance


def read(base: Path, part: str) -> list[Utterance]:
    """Read the rows of one split out of `label.csv`."""
    return read_label_csv(base / "label.csv", part, bound=1.0)


CORPUS = Corpus(
    name="ch_sims",
    title="CH-SIMS",
    language="zh",
    license="for research",
    homepage="https://github.com/thuiar/MMSA",
    how_to_get=(
        "get CH-SIMS's label.csv from the data folder that https://github.com/thuiar/MMSA "
        "links and put it into the folder ch_sims"
    ),
    annotation="sentiment of a clip, -1 to 1",
    layouts=(
        Layout(
            name="MMSA label.csv",
            files=dict.fromkeys(SPLITS, ("label.csv",)),
            read=read,
            bases=(".", "CH-SIMS", "SIMS", "Raw"),
        ),
    ),
)
