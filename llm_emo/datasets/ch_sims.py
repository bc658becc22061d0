"""CH-SIMS: clips of films and shows in Mandarin, each scored from -1 to 1 in steps of 0.2.

`dialogue` is the video and `turn` the number of the clip; the official splits part most
videos. Six texts occur twice, two of them with conflicting scores; all rows are kept.
"""

from llm_emo.datasets import mmsa
from llm_emo.datasets.base import Corpus

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
    layouts=(mmsa.layout(1.0, "CH-SIMS", "SIMS", "Raw"),),
)
