"""EMO-DB (Berlin): ten actors speak ten German sentences in seven emotions; audio.

A file name is the annotation: `03a01Wa` is speaker 03, sentence a01, W for Wut (anger),
version a. Labels are the letters: W anger, L boredom, E disgust, A fear, F happiness,
T sadness, N neutral. `text` is the code of the sentence, which all actors share: it says
nothing about the emotion, and the words themselves are not part of the audio files.
"""

import re
from pathlib import Path

from llm_emo.datasets.base import ALL, Corpus, Layout, malformed
from llm_emo.types import Utterance

NAME = re.compile(r"(\d{2})([ab]\d{2})([WLEAFTN])[a-z]?")


def read(base: Path, part: str) -> list[Utterance]:
    """Read the names of the files in `wav`."""
    rows = []
    for path in sorted((base / "wav").glob("*.wav")):
        if path.name.startswith("."):
            continue
        match = NAME.fullmatch(path.stem)
        if match is None:
            raise malformed(
                path, "the file name", path.name, "speaker, sentence, letter: 03a01Wa.wav"
            )
        rows.append(
            Utterance(path.stem, match[2], speaker=match[1], label=match[3], audio=str(path))
        )
    return rows


CORPUS = Corpus(
    name="emodb",
    title="EMO-DB, Berlin database of emotional speech",
    language="de",
    license="CC0-1.0",
    homepage="http://emodb.bilderbar.info/",
    how_to_get=(
        "get the wav files from http://emodb.bilderbar.info/ and put them into the folder emodb/wav"
    ),
    annotation="acted emotion of a sentence, 7 classes",
    layouts=(Layout(name="wav folder", files={ALL: ("wav/*.wav",)}, read=read),),
    audio=True,
)
