"""Damaged files: whatever is wrong with a cell, it is one message, never a traceback."""

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_emo import datasets
from llm_emo.datasets import base
from llm_emo.datasets.table import to_dataset_dict, utterances
from llm_emo.errors import DatasetError

FIXTURES = Path(__file__).parents[1] / "fixtures"
CELL = re.compile(r"[^\s,|:\[\](){}\"]+|[\s,|:\[\](){}\"]")
ODD_TEXT = [
    "",
    " ",
    "-1",
    "99",
    "1e400",
    "nan",
    "9" * 5000,
    "\x00",
    "é",
    "\r",
    "\t",
    '"',
    "[" * 9999,
]
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    float("nan"),
    "",
    " ",
    "x",
    "\ud800",
    [],
    ["x"],
    {},
    {"a": 1},
]

fuzzed = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def layouts():
    for name in datasets.names():
        corpus = datasets.get(name)
        for layout, place in corpus.all_layouts(FIXTURES):
            if any(path.suffix != ".wav" for path in layout.paths(place, layout.parts(place))):
                yield pytest.param(name, layout, place, id=f"{name}, {layout.name}")


def read(name, layout, place):
    """Load as `datasets.load` does; a DatasetError must say where, anything else fails."""
    with says(rf"{re.escape(str(place))}/.+: .+|{name}: \w+ row "):
        parts = {part: layout.read(place, part) for part in layout.parts(place)}
        loaded = to_dataset_dict(name, parts)
        hold(loaded, parts)


def hold(loaded, parts):
    for part, rows in parts.items():
        assert utterances(loaded[part]) == rows
        for row in rows:
            assert row.text == row.text.strip() != ""


@contextlib.contextmanager
def says(pattern):
    """Allow a DatasetError, if its message matches."""
    told = None
    try:
        yield
    except DatasetError as error:
        told = str(error)
    assert told is None or re.match(pattern, told), told


@contextlib.contextmanager
def damaged(path, content):
    """Replace a file's bytes for a while."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


@pytest.fixture
def place(original, tmp_path):
    """A copy of the layout's folder, of which each example damages one file."""
    return Path(shutil.copytree(original, tmp_path / "corpus"))


@pytest.mark.parametrize(("name", "layout", "original"), layouts())
@given(data=st.data())
@fuzzed
def test_a_damaged_cell_of_a_text_file_is_one_message(name, layout, place, data):
    path = data.draw(st.sampled_from(layout.paths(place, layout.parts(place))))
    text = path.read_bytes().decode()
    cells = list(CELL.finditer(text))
    cell = data.draw(st.sampled_from(cells))
    odd = data.draw(st.sampled_from(ODD_TEXT) | st.text(max_size=3))
    content = text[: cell.start()] + odd + text[cell.end() :]
    with damaged(path, content.encode(errors="ignore")):
        read(name, layout, place)


@pytest.mark.parametrize(("name", "layout", "original"), layouts())
@given(data=st.data())
@fuzzed
def test_a_lost_or_doubled_line_is_one_message(name, layout, place, data):
    path = data.draw(st.sampled_from(layout.paths(place, layout.parts(place))))
    lines = path.read_bytes().splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at : at + 1] = data.draw(st.sampled_from([[], [lines[at], lines[at]], [b"\n"]]))
    with damaged(path, b"".join(lines)):
        read(name, layout, place)


def places_in(value, path=()):
    """Return the path of every value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(inner, (*path, key))


def changed(document, path, odd):
    """Return a copy in which the value at `path` is `odd`, or is gone."""
    if not path:
        return odd
    document = copy.deepcopy(document)
    *parents, last = path
    inner = document
    for key in parents:
        inner = inner[key]
    if odd == "gone":
        del inner[last]
    else:
        inner[last] = odd
    return document


@pytest.mark.parametrize(
    ("name", "layout", "original"),
    [case for case in layouts() if case.values[0] in ("friends", "mastodon", "m3ed")],
)
@given(data=st.data())
@fuzzed
def test_a_value_of_another_type_in_json_is_one_message(name, layout, place, data):
    files = [p for p in layout.paths(place, layout.parts(place)) if p.suffix == ".json"]
    if not files:
        return
    path = data.draw(st.sampled_from(files))
    document = json.loads(path.read_text("utf-8"))
    at = data.draw(st.sampled_from(list(places_in(document))))
    odd = data.draw(st.sampled_from([*ODD, "gone"]))
    with damaged(path, json.dumps(changed(document, at, odd)).encode()):
        read(name, layout, place)


HUB = {
    "sst": {"sentence": "A fine film .", "label": 0.9},
    "friends": {
        "dialogue_id": "0", "speaker": "Ann", "utterance": "Oh no!", "emotion": "fear",
        "annotation": "1003010",
    },
    "meld": {
        "Utterance": "Oh no!", "Speaker": "Ann", "Emotion": "fear", "Dialogue_ID": 0,
        "Utterance_ID": "0",
    },
    "tweeteval_emotion": {"text": "Oh no!", "label": 0},
}  # fmt: skip


def test_every_corpus_with_a_hub_form_is_damaged_below():
    assert {name for name in datasets.names() if datasets.get(name).hub is not None} == set(HUB)
    for name, row in HUB.items():
        assert datasets.get(name).hub.read(Dataset.from_list([row]), "train")


@pytest.mark.parametrize("name", HUB)
@given(data=st.data())
@fuzzed
def test_a_damaged_row_of_a_hub_dataset_is_one_message(name, data):
    column = data.draw(st.sampled_from(list(HUB[name])))
    odd = data.draw(st.sampled_from([value for value in ODD if value not in ("\ud800", 10**30)]))
    table = Dataset.from_list([{**HUB[name], column: odd}])
    with says(rf"{name}:? train:? row [01]"):
        parts = {"train": datasets.get(name).hub.read(table, "train")}
        hold(to_dataset_dict(name, parts), parts)


def test_a_dataset_folder_of_damaged_files_is_one_message(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("train", "validation"):
        (folder / f"{name}.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match="cannot be loaded"):
        datasets.load("tweeteval_emotion", None, hub=str(folder))
    (folder / "dataset_dict.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be loaded"):
        datasets.load("tweeteval_emotion", None, hub=str(folder))


def test_a_key_that_stands_twice_in_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(DatasetError, match=r"a\.json: an object: found \"the key 'b' twice\""):
        base.read_json(path)


RARE = [
    ("vader", "nytEditorialSnippets_GroundTruth.txt", "_1\t", "_x\t"),
    ("vader", "tweets_anonDataRatings.txt", "[3, ", "[{}, "),
    ("vader", "tweets_anonDataRatings.txt", "[3, ", "[99999999999, "),
    ("vader", "tweets_anonDataRatings.txt", "[3, ", "[\x1f3, "),  # no white space to `int`
    ("iemocap", "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", "[4.5000", "[4.5.0"),
    ("mosi", "label.csv", ",text,", ",text,text,"),
    ("mosi", "label.csv", "I ", "I" * 200_000),
    ("ch_sims", "label.csv", ",0003,", ",00030000000003,"),
    ("mastodon", "native/datatestJoint.txt", "1 ", "9" * 5000 + " "),
    ("meld", "dev_sent_emo.csv", ",0,1,1,1,", ",0,99999999999999999999,1,1,"),
]


@pytest.mark.parametrize(("name", "file", "usual", "odd"), RARE)
def test_rare_damage_is_one_message(name, file, usual, odd, tmp_path):
    path = tmp_path / name / file
    shutil.copytree(FIXTURES / name, tmp_path / name)
    text = path.read_bytes().decode()
    assert usual in text
    path.write_bytes(text.replace(usual, odd, 1).encode())
    with pytest.raises(DatasetError, match=re.escape(str(path))):
        datasets.load(name, tmp_path)
