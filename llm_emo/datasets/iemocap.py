"""IEMOCAP: acted dyadic dialogues in five sessions, text and audio.

Read from the official tree: `Session*/dialog/EmoEvaluation` gives labels and times,
`Session*/dialog/transcriptions` the words, `Session*/sentences/wav` the sound. Labels are
the official codes (neu, hap, exc, sad, ang, fru, fea, sur, dis, oth; xxx where the
annotators did not agree). Turns are ordered by start time. A speaker is one of two actors
of a session: `Ses01F` and `Ses01M`, taken from the end of the utterance's name, since the
start names who wore the markers. Transcribed lines without an evaluation (crosstalk) are no
utterances of the corpus. `audio` is None in a copy without sound.
"""

import re
from pathlib import Path

from llm_emo.datasets.base import (
    ALL,
    Corpus,
    Layout,
    malformed,
    parse_choice,
    parse_text,
    read_lines,
)
from llm_emo.types import Utterance

LABELS = ("neu", "hap", "exc", "sad", "ang", "fru", "fea", "sur", "dis", "oth", "xxx")

SECONDS = r"\s*(\d+(?:\.\d*)?)\s*"
EVALUATION = re.compile(rf"\[{SECONDS}-{SECONDS}\]\s+(\S+)\s+(\S+)\s+\[.*\]\s*")
TRANSCRIPT = re.compile(r"(\S+)\s*\[\s*[-\d.]+\s*-\s*[-\d.]+\s*\]\s*:\s*(.*)")
NAME = re.compile(r"(Ses\d{2})[FM]_\w+_([FM])[A-Z]*\d+")

# Headers are ASCII, but transcribers left some accents in one byte.
ENCODINGS = ("utf-8-sig", "cp1252")


def read(base: Path, part: str) -> list[Utterance]:
    """Read every session that lies under `base`."""
    rows = []
    for evaluation in sorted(base.glob("Session[1-5]/dialog/EmoEvaluation/Ses*.txt")):
        rows.extend(_dialogue(evaluation))
    return rows


def _dialogue(evaluation: Path) -> list[Utterance]:
    session = evaluation.parents[2]
    dialogue = evaluation.stem
    transcription = session / "dialog" / "transcriptions" / evaluation.name
    words = _words(transcription)
    timed = []
    for number, line in enumerate(read_lines(evaluation, ENCODINGS), 1):
        # Below each header line stand the single evaluations, which start with a letter.
        if not line.startswith("[") or "TURN_NAME" in line:
            continue
        match = EVALUATION.fullmatch(line)
        name = NAME.fullmatch(match[3]) if match else None
        if match is None or name is None:
            expected = "'[start - end] name code [v, a, d]'"
            raise malformed(evaluation, f"line {number}", line, expected)
        timed.append((float(match[1]), match[3], f"{name[1]}{name[2]}", match[4], number))
    rows = []
    for turn, (_, uid, speaker, code, number) in enumerate(sorted(timed)):
        if uid not in words:
            raise malformed(transcription, "the file", f"no line {uid}", "the words of each turn")
        wav = session / "sentences" / "wav" / dialogue / f"{uid}.wav"
        rows.append(
            Utterance(
                uid=uid,
                text=parse_text(transcription, uid, words[uid]),
                speaker=speaker,
                dialogue=dialogue,
                turn=turn,
                label=parse_choice(evaluation, f"line {number}", code, LABELS),
                audio=str(wav) if wav.is_file() else None,
            )
        )
    return rows


def _words(path: Path) -> dict[str, str]:
    """Return the words of every named line; lines of another form are stage directions."""
    matches = (TRANSCRIPT.fullmatch(line) for line in read_lines(path, ENCODINGS))
    return {match[1]: match[2].strip() for match in matches if match is not None}


CORPUS = Corpus(
    name="iemocap",
    title="IEMOCAP",
    language="en",
    license="licensed by USC SAIL; not to be redistributed",
    homepage="https://sail.usc.edu/iemocap/",
    how_to_get=(
        "ask for the IEMOCAP release at https://sail.usc.edu/iemocap/ and put its folders "
        "Session1 to Session5 into the folder iemocap"
    ),
    annotation="emotion of a turn, 9 classes, other, and no agreement",
    layouts=(
        Layout(
            name="official tree",
            files={
                ALL: (
                    "Session[1-5]/dialog/EmoEvaluation/Ses*.txt",
                    "Session[1-5]/dialog/transcriptions/Ses*.txt",
                )
            },
            read=read,
            bases=(".", "IEMOCAP_full_release", "IEMOCAP"),
        ),
    ),
    audio=True,
)
