"""Method `roberta_cnn_lstm`: dialogues over the features of a finished encoder run."""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_encoder_task import made, passes  # noqa: F401 (a fixture)

from llm_emo.baselines import roberta_cnn_lstm_task as task
from llm_emo.baselines.kinds import RobertaCnnLstm
from llm_emo.errors import ModelError, RecipeError
from llm_emo.grouping import with_history
from llm_emo.runs import folder_sum
from llm_emo.types import IGNORED, Utterance

NAMES = ("joy", "anger", "neutral")
EXPERIMENT = SimpleNamespace(labels=SimpleNamespace(names=NAMES))
NETWORK = {
    "cnn_lstm": True, "residual": True, "dropout": 0.0, "reduced": 10, "units": 6, "head": 12,
}  # fmt: skip
TEXTS = (
    "so sad", "we are glad", "glad", "are we", "so so", "we", "sad we are", "so glad", "we so",
)  # fmt: skip


def said(uid, label, dialogue=None, turn=None):
    return Utterance(uid, TEXTS[int(uid) % len(TEXTS)], dialogue=dialogue, turn=turn, label=label)


SAID = (
    said("0", "joy", "a", 0), said("1", None, "a", 1), said("2", "anger", "a", 2),
    said("3", "anger"),
    said("4", None, "b", 0), said("5", "neutral", "b", 1),
    said("6", "joy", "b", 2), said("7", "joy", "b", 3), said("8", "anger", "b", 4),
)  # fmt: skip
ROWS = with_history(SAID, lambda utterance: utterance.label)


def method(**network):
    return RobertaCnnLstm(
        kind="roberta_cnn_lstm", encoder_run="runs/encoder", network=NETWORK | network
    )


@pytest.fixture
def encoder(tmp_path, passes, monkeypatch):  # noqa: F811
    """A classifier that stands for the finished run `runs/encoder`."""
    stands = made(tmp_path)
    adapter = tmp_path / "below" / "adapter"
    adapter.mkdir(parents=True)
    stands.save(adapter)
    opened = SimpleNamespace(
        run=SimpleNamespace(adapter=adapter), classifier=stands, learned=folder_sum(adapter)
    )
    monkeypatch.setattr(task.opening, "open_run", lambda run, experiment: opened)
    return stands


def scored(classifier, items):
    """Return class scores in eval mode, shape (N, C), of the turns of dialogues in one batch."""
    classifier.model.eval()
    with torch.inference_mode():
        return classifier.scores(classifier.model, classifier.batch(items))


def test_dialogues_hold_their_turns_and_unscored_ones_have_no_label(encoder):
    items = task.create(method(), EXPERIMENT).items(ROWS, "train", augmented=False)
    assert [item.labels for item in items] == [
        (0, IGNORED, 1), (1,), (IGNORED, 2, 0, 0, 1)
    ]  # fmt: skip
    assert [item.uids for item in items] == [
        ("0", None, "2"), ("3",), (None, "5", "6", "7", "8")
    ]  # fmt: skip
    assert [tuple(item.inputs.shape) for item in items] == [(3, 64), (1, 64), (5, 64)]


def test_turns_carry_the_features_of_their_own_text(encoder):
    items = task.create(method(), EXPERIMENT).items(ROWS, "train", augmented=False)
    turns = with_history(SAID, lambda utterance: utterance.label or "")
    expected = encoder.encode(turns, "train").features
    assert torch.equal(torch.cat([item.inputs for item in items]), expected)


TURNS = st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.booleans()), max_size=16)


@given(TURNS)
def test_every_scored_row_stands_in_one_place_and_no_other_turn_has_a_label(turns):
    utterances = [
        said(str(n), "joy" if scored else None, name, n if name else None)
        for n, (name, scored) in enumerate(turns)
    ]
    rows = with_history(utterances, lambda utterance: utterance.label)
    dialogues = task._together(rows)
    seen = [
        turn.uid
        for dialogue in dialogues
        for turn, gold in zip(dialogue.turns, dialogue.golds, strict=True)
        if gold is not None
    ]
    assert sorted(seen) == sorted(row.utterance.uid for row in rows)
    read = [turn.uid for dialogue in dialogues for turn in dialogue.turns]
    assert len(read) == len(set(read))
    for row in rows:
        assert {turn.uid for turn in row.history} <= set(read)


def test_rows_that_a_limit_leaves_out_are_read_as_history_without_a_label(encoder):
    last = [row for row in ROWS if row.utterance.uid == "8"]
    [item] = task.create(method(), EXPERIMENT).items(last, "train", augmented=False)
    assert item.labels == (IGNORED,) * 4 + (1,)
    assert item.uids == (None,) * 4 + ("8",)


@pytest.mark.parametrize(
    "changes", [{}, {"cnn_lstm": False}, {"residual": False}], ids=["whole", "no CNN", "no sum"]
)
def test_other_dialogues_of_the_batch_change_nothing(changes, encoder):
    classifier = task.create(method(**changes), EXPERIMENT)
    items = classifier.items(ROWS, "dev", augmented=False)
    together = scored(classifier, items)
    assert together.shape == (9, 3)
    alone = torch.cat([scored(classifier, [item]) for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_scores_stand_in_the_order_of_the_labels(encoder):
    classifier = task.create(method(), EXPERIMENT)
    items = classifier.items(ROWS, "dev", augmented=False)
    found = scored(classifier, items)
    whole = classifier.model(**classifier.batch(items))
    assert torch.allclose(found[3], whole[1, 0], atol=1e-6)
    assert torch.allclose(found[4:], whole[2], atol=1e-6)
    assert not torch.allclose(found[3], found[4], atol=1e-6)


def test_probabilities_come_once_for_every_scored_row(encoder):
    classifier = task.create(method(), EXPERIMENT)
    classifier.items_per_pass = 2
    found = [uid for uid, _ in classifier.probabilities(ROWS, "test")]
    assert sorted(found) == sorted(row.utterance.uid for row in ROWS)


def test_features_are_computed_once(encoder, passes):  # noqa: F811
    facts = []
    for _ in range(2):
        classifier = task.create(method(), EXPERIMENT)
        classifier.items(ROWS, "train", augmented=False)
        facts.append(classifier.facts()["splits"]["train"])
    assert passes == [9]  # unscored turns among them
    assert [fact["features_cached"] for fact in facts] == [False, True]
    assert {(fact["dialogues"], fact["turns"]) for fact in facts} == {(3, 9)}
    json.dumps(facts)


def saved(tmp_path):
    """Return the folder of a saved classifier, and the classifier."""
    classifier = task.create(method(), EXPERIMENT)
    torch.nn.functional.cross_entropy(  # moves the running statistics
        classifier.model.train()(torch.randn(2, 3, 64), torch.tensor([3, 2])).flatten(0, 1),
        torch.zeros(6, dtype=torch.long),
    )
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    classifier.save(folder)
    return folder, classifier


def test_loaded_it_gives_the_bits_of_what_was_saved(encoder, tmp_path):
    folder, classifier = saved(tmp_path)
    before = torch.get_rng_state()
    loaded = task.load(method(), EXPERIMENT, folder)
    assert torch.equal(torch.get_rng_state(), before)
    items = classifier.items(ROWS, "dev", augmented=False)
    assert torch.equal(scored(loaded, items), scored(classifier, items))


def test_what_becomes_of_the_encoder_run_does_not_matter(encoder, tmp_path):
    folder, classifier = saved(tmp_path)
    items = classifier.items(ROWS, "dev", augmented=False)
    with torch.no_grad():  # it is trained again
        next(encoder.model.parameters()).add_(1)
    encoder.save(tmp_path / "below" / "adapter")
    for _ in range(2):
        loaded = task.load(method(), EXPERIMENT, folder)
        again = loaded.items(ROWS, "dev", augmented=False)
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(items, again, strict=True))
        shutil.rmtree(tmp_path / "below", ignore_errors=True)


def test_saved_again_from_what_was_loaded_it_is_whole(encoder, tmp_path, monkeypatch):
    folder, classifier = saved(tmp_path)
    loaded = task.load(method(), EXPERIMENT, folder)
    monkeypatch.setattr("os.link", mock.Mock(side_effect=OSError("no links here")))
    other = tmp_path / "other"
    other.mkdir()
    for _ in range(2):
        loaded.save(other)
    items = classifier.items(ROWS, "dev", augmented=False)
    again = task.load(method(), EXPERIMENT, other)
    assert torch.equal(scored(again, items), scored(classifier, items))


def test_damage_is_told(encoder, tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(ModelError, match="does not fit the network"):
        task.load(method(units=7), EXPERIMENT, folder)
    (folder / "encoder" / "method.json").unlink()
    with pytest.raises(ModelError, match=r"method\.json: cannot be read .*; the run is damaged"):
        task.load(method(), EXPERIMENT, folder)


def test_a_run_of_another_method_is_refused(tmp_path, monkeypatch):
    other = SimpleNamespace(recipe=SimpleNamespace(method=SimpleNamespace(kind="linear")))
    monkeypatch.setattr(task.runs, "is_run", lambda path: True)
    monkeypatch.setattr(task.runs, "Run", lambda path: other)
    with pytest.raises(RecipeError, match=r"runs/encoder is a run of method linear.*encoder"):
        task.create(method(), EXPERIMENT)


@pytest.mark.parametrize("changes", [{}, {"cnn_lstm": False}, {"residual": False}])
def test_it_learns_dialogues_by_heart(changes, encoder):
    torch.manual_seed(0)
    classifier = task.create(method(**changes), EXPERIMENT)
    items = classifier.items(ROWS, "train", augmented=False)
    batch = classifier.batch(items)
    labels = torch.tensor([label for item in items for label in item.labels])
    optimizer = torch.optim.AdamW(classifier.model.parameters(), lr=1e-2)
    for _ in range(300):
        scores = classifier.scores(classifier.model.train(), batch)
        if (scores.argmax(1) == labels)[labels != IGNORED].all():
            return
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED).backward()
        optimizer.step()
    pytest.fail("not learned in 300 steps")
