"""CMU-MOSI: opinion videos in English, each clip scored from -3 to 3.

The text is in capitals without punctuation, as published. Scores are means of five ratings
and take 53 values, thirds and quarters among them: protocols cut them, nothing rounds them
here. `dialogue` is the video, `turn` the number of the clip.
"""

from llm_emo.datasets import mmsa
from llm_emo.datasets.base import Corpus

CORPUS = Corpus(
    name="mosi",
    title="CMU-MOSI",
    language="en",
    license="for research",
    homepage="http://multicomp.cs.cmu.edu/resources/cmu-mosi-dataset/",
    how_to_get=(
        "get MOSI's label.csv from the data folder that https://github.com/thuiar/MMSA links "
        "and put it into the folder mosi"
    ),
    annotation="sentiment of a clip, -3 to 3",
    layouts=(mmsa.layout(3.0, "MOSI", "Raw"),),
)
