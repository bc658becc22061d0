"""Runs opened again: what has changed since they were begun is told, not guessed."""

import json

import program
import pytest

DATA = ("--data-root", program.FIXTURES)


@pytest.fixture
def run(tmp_path):
    program.call("train", "mastodon/majority", "-o", tmp_path / "run", *DATA).ok()
    return tmp_path / "run"


def rename(run, change):
    path = run / "labels.json"
    content = json.loads(path.read_text())
    content["names"] = change(content["names"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [lambda names: names[::-1], lambda names: names[:2], lambda names: ["x", *names[1:]]],
    ids=["order", "number", "name"],
)
def test_a_specialised_run_of_other_classes_than_the_protocol_s_is_refused(run, change):
    rename(run, change)
    refused = program.call("predict", run, "--split", "test", *DATA)
    refused.refused(str(run), "learned the classes", "mastodon3 has", "train it again")
    assert not (run / "test.predictions.jsonl").exists()


def test_a_run_whose_labels_are_damaged_is_named(run):
    for content, said in (("{}", "lacks names"), ("[]", "dict"), ("{", "no JSON")):
        (run / "labels.json").write_text(content)
        program.call("predict", run, "--split", "test", *DATA).refused("labels.json", said)


def test_an_unchanged_run_opens(run):
    program.call("predict", run, "--split", "test", *DATA).ok()
