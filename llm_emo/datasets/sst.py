r"""Stanford Sentiment Treebank: sentences of film reviews with five degrees of sentiment.

Labels are the digits 0 (very negative) to 4 (very positive) of the whole sentence. Text is
the tokenised sentence, tokens parted by one space, with the treebank's spelling undone:
-LRB- and -RRB- are brackets, `\/` and `\*` are escaped, the quotes are two accents or two
apostrophes. The uid is the split and the line in the file, or the official sentence number.

GLUE's SST-2 is phrase-level with another test set, and is refused here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_emo.datasets.base import (
    Corpus,
    Hub,
    Layout,
    malformed,
    parse_number,
    parse_text,
    read_lines,
)
from llm_emo.errors import DatasetError
from llm_emo.types import SPLITS, Utterance

# A leaf is "(label token)". Only the plain space parts them: some tokens hold U+00A0.
LEAF = re.compile(r"\([0-4] ([^() ]+)\)")

SPELLING = {"-LRB-": "(", "-RRB-": ")", "``": '"', "''": '"'}
SPLIT_CODES = {"1": "train", "2": "test", "3": "dev"}


def plain(token: str) -> str:
    r"""Return a treebank token as it is written in text.

    >>> [plain(token) for token in ("-LRB-", "and\\/or", "\\*", "``", "o'clock")]
    ['(', 'and/or', '*', '"', "o'clock"]
    """
    return SPELLING.get(token, token.replace("\\/", "/").replace("\\*", "*"))


def parse_tree(tree: str) -> tuple[str, str]:
    r"""Return the root label and the text of one parse tree.

    >>> parse_tree("(3 (2 A) (4 (4 fine) (2 -LRB-)))")
    ('3', 'A fine (')

    Raises:
        ValueError: the brackets do not close, or the labels are not 0 to 4.
    """
    depth = 0
    for position, character in enumerate(tree):
        depth += (character == "(") - (character == ")")
        if (depth == 0) != (position == len(tree) - 1):
            raise ValueError("brackets")
    tokens = LEAF.findall(tree)
    if not re.match(r"\([0-4] ", tree) or not tokens:
        raise ValueError("labels")
    # Whatever is no leaf must be inner nodes; a leaf that LEAF missed would be lost silently.
    if re.sub(r"\([0-4] |\)|\s", "", LEAF.sub("", tree)):
        raise ValueError("leaves")
    return tree[1], " ".join(plain(token) for token in tokens)


def degree(value: float) -> str:
    """Return the class of a sentiment value in [0, 1]: five bins, closed above.

    Rounded first: the hub keeps float32, where 0.4 is 0.4000000059 and would move up.

    >>> [degree(value) for value in (0.2, 0.20001, 0.4000000059604645, 1.0)]
    ['0', '1', '1', '4']
    """
    return str(sum(round(value, 5) > cut for cut in (0.2, 0.4, 0.6, 0.8)))


def read_trees(base: Path, part: str) -> list[Utterance]:
    """Read `<part>.txt`, one tree a line."""
    path = base / f"{part}.txt"
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            label, text = parse_tree(line.strip())
        except ValueError:
            raise malformed(
                path, f"line {number}", line, "a tree such as (3 (2 a) (4 b))"
            ) from None
        text = parse_text(path, f"line {number}", text)
        rows.append(Utterance(uid=f"{part}/{number}", text=text, label=label))
    return rows


def unspoil(text: str) -> str:
    """Undo UTF-8 that was read as Latin-1, which the official zip has in every non-ASCII line."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def read_zip(base: Path, part: str) -> list[Utterance]:
    """Read the official stanfordSentimentTreebank folder.

    Its split codes are 1 = train, 2 = test, 3 = dev. A sentence's value is that of the
    phrase with its text; the dictionary has brackets where the sentences have -LRB-.
    """
    splits = dict(_table(base / "datasetSplit.txt", ",", "sentence_index"))
    values = dict(_table(base / "sentiment_labels.txt", "|", "phrase ids"))
    exact: dict[str, str] = {}
    cleaned: dict[str, str] = {}
    for phrase, number in _table(base / "dictionary.txt", "|", None):
        exact[phrase] = number
        cleaned[_clean(phrase)] = number
    path = base / "datasetSentences.txt"
    rows = []
    for number, sentence in _table(path, "\t", "sentence_index"):
        code = splits.get(number)
        if code not in SPLIT_CODES:
            raise malformed(base / "datasetSplit.txt", f"sentence {number}", code, "1, 2 or 3")
        if SPLIT_CODES[code] != part:
            continue
        sentence = unspoil(sentence)
        phrase_id = exact.get(sentence) or cleaned.get(_clean(sentence))
        if phrase_id is None or phrase_id not in values:
            raise malformed(path, f"sentence {number}", sentence, "a phrase of dictionary.txt")
        where = f"phrase {phrase_id}"
        value = parse_number(base / "sentiment_labels.txt", where, values[phrase_id], 0.0, 1.0)
        text = parse_text(path, f"sentence {number}", _clean(sentence))
        rows.append(Utterance(uid=number, text=text, label=degree(value)))
    return rows


def _clean(sentence: str) -> str:
    return " ".join(plain(token) for token in sentence.split(" "))


def _table(path: Path, separator: str, header: str | None) -> list[tuple[str, str]]:
    """Return the two columns of a file; phrases may hold the separator themselves."""
    lines = read_lines(path)
    if header is not None and (not lines or not lines[0].startswith(header)):
        raise malformed(path, "line 1", lines[0] if lines else "", f"a header {header!r}")
    pairs = []
    for number, line in enumerate(lines[header is not None :], 1 + (header is not None)):
        left, found, right = (line.rpartition if header is None else line.partition)(separator)
        if not found:
            raise malformed(path, f"line {number}", line, f"two columns parted by {separator!r}")
        pairs.append((left, right))
    return pairs


def read_hub(table: Any, part: str) -> list[Utterance]:
    """Read a dataset with the columns of `stanfordnlp/sst`, whose label is a float."""
    rows = []
    for number, row in enumerate(table, 1):
        if not isinstance(row["label"], float) or not 0 <= row["label"] <= 1:
            raise DatasetError(
                f"sst: {part} row {number}: found label {row['label']!r}; expected a sentiment "
                "value from 0.0 to 1.0 as in stanfordnlp/sst"
            )
        sentence = parse_text(Path(f"sst {part}"), f"row {number}", row["sentence"])
        text = _clean(unspoil(sentence)).strip()
        rows.append(Utterance(uid=f"{part}/{number}", text=text, label=degree(row["label"])))
    return rows


def refuse_glue(hub: str, features: Mapping[str, Any]) -> str | None:
    """Return why a dataset is GLUE's SST-2, or None."""
    names = getattr(features.get("label"), "names", None)
    if re.search(r"glue|sst-?2", hub.split("@")[0].rpartition("/")[2], re.IGNORECASE) or (
        names is not None and len(names) == 2
    ):
        return (
            "this is GLUE's SST-2, another set: phrases, 67,349 / 872 rows and an unlabelled "
            "test split; use stanfordnlp/sst with protocol sst2"
        )
    return None


CORPUS = Corpus(
    name="sst",
    title="Stanford Sentiment Treebank",
    language="en",
    license="not stated by its authors; for research",
    homepage="https://nlp.stanford.edu/sentiment/",
    how_to_get=(
        "get trainDevTestTrees_PTB.zip (or stanfordSentimentTreebank.zip) from "
        "https://nlp.stanford.edu/sentiment/ and unpack it into the folder sst"
    ),
    annotation="sentiment of a sentence, 0 to 4",
    layouts=(
        Layout(
            name="parse trees",
            files={split: (f"{split}.txt",) for split in SPLITS},
            read=read_trees,
            bases=("trees", ".", "trainDevTestTrees_PTB/trees"),
        ),
        Layout(
            name="official zip",
            files=dict.fromkeys(
                SPLITS,
                (
                    "datasetSentences.txt",
                    "datasetSplit.txt",
                    "dictionary.txt",
                    "sentiment_labels.txt",
                ),
            ),
            read=read_zip,
            bases=("stanfordSentimentTreebank", "."),
        ),
    ),
    hub=Hub(
        example="stanfordnlp/sst@refs/convert/parquet",
        columns=("sentence", "label"),
        read=read_hub,
        config="default",
        refuse=refuse_glue,
    ),
)
