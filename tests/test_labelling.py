import gc
import json
import threading
import weakref
from dataclasses import dataclass

import program
import pytest
import tiny

from llm_emo import encoding, inference, labelling, predictions, recipes
from llm_emo.encoding import Encoder
from llm_emo.errors import PromptError
from llm_emo.experiment import Experiment
from llm_emo.types import Example

MODES = pytest.mark.parametrize("mode", ["score", "generate"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return program.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def labeller(folder, mode):
    changes = [f"model.name={folder}", "model.dtype=float32", f"inference.mode={mode}",
               "inference.max_new_tokens=3", "data.dev_fraction=0.3"]  # fmt: skip
    recipe = recipes.load("mastodon/lora", changes)
    return labelling.open_labeller(Experiment.prepare(recipe, program.FIXTURES))


def examples(count):
    words = ("the train was late", "so happy", "late again", "was I")
    for row in range(count):
        yield tiny.example(f"{words[row % 4]} {row % 7}", uid=f"row-{row}")


@MODES
def test_a_stream_gives_each_row_what_it_gets_alone_and_once(labeller, monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 5)
    monkeypatch.setattr(encoding, "CHUNK", 3)
    found = {row.uid: row for row in labeller.predict(examples(23))}
    assert sorted(found) == sorted(example.uid for example in examples(23))
    for example in examples(23):
        [alone] = labeller.predict([example])
        row = found[example.uid]
        assert (row.gold, row.label, row.completion) == (alone.gold, alone.label, alone.completion)
        if alone.probabilities is not None:
            assert row.probabilities == pytest.approx(alone.probabilities, abs=1e-4)


@MODES
def test_memory_holds_two_chunks_and_a_window_of_any_number_of_rows(labeller, monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 8)
    monkeypatch.setattr(encoding, "CHUNK", 8)

    @dataclass(frozen=True)
    class Watched(Example):
        __slots__ = ("__weakref__",)

    alive, most = weakref.WeakSet(), 0

    def stream():
        for example in examples(100):
            watched = Watched(*(getattr(example, name) for name in Example.__slots__))
            alive.add(watched)
            yield watched

    for _ in labeller.predict(stream()):
        most = max(most, len(alive))
    assert 8 <= most <= 3 * 8


@pytest.mark.parametrize("mode", ["score"])
def test_the_next_chunk_is_encoded_while_one_is_used(labeller, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 4)
    encoded = threading.Semaphore(0)
    own = Encoder.encode

    def encode(self, rows):
        made = own(self, rows)
        encoded.release()
        return made

    monkeypatch.setattr(Encoder, "encode", encode)
    stream = labeller.encoder.stream(examples(20))
    next(stream)
    assert encoded.acquire(timeout=10)
    assert encoded.acquire(timeout=10), "nothing is encoded ahead"
    assert not encoded.acquire(timeout=0.2), "more than one chunk is encoded ahead"
    before = threading.active_count()
    stream.close()
    assert threading.active_count() == before - 1


@MODES
def test_a_row_without_room_is_told_when_it_is_reached(labeller, monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 4)
    monkeypatch.setattr(encoding, "CHUNK", 4)
    rows = [*examples(8), tiny.example("x", uid="long", before="word " * 500)]
    stream = labeller.predict(rows)
    done = {next(stream).uid for _ in range(4)}
    assert done == {f"row-{row}" for row in range(4)}
    with pytest.raises(PromptError, match="row long: the instruction"):
        list(stream)


@MODES
def test_a_prediction_interrupted_and_continued_equals_the_uninterrupted_one(
    folder, mode, tmp_path, monkeypatch
):
    monkeypatch.setattr(inference, "WINDOW", 3)
    monkeypatch.setattr(encoding, "CHUNK", 2)
    monkeypatch.setattr(labelling, "ROWS_PER_FLUSH", 2)
    changes = [f"model.name={folder}", "model.dtype=float32", f"inference.mode={mode}",
               "inference.max_new_tokens=3", "data.dev_fraction=0.3"]  # fmt: skip
    experiment = Experiment.prepare(recipes.load("mastodon/lora", changes), program.FIXTURES)
    whole = labelling.predict(experiment, None, "train", tmp_path / "whole")
    total = len(experiment.rows("train"))
    assert total > 6

    own, left = labelling.Labeller.predict, [4]
    gc.unfreeze()

    def interrupted(self, rows):
        assert gc.get_freeze_count(), "walks for garbage should pass over what exists"
        for prediction in own(self, rows):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield prediction

    with monkeypatch.context() as patch:
        patch.setattr(labelling.Labeller, "predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            labelling.predict(experiment, None, "train", tmp_path / "broken")
    assert not gc.get_freeze_count()
    [partial] = (tmp_path / "broken").iterdir()
    assert len(partial.read_text("utf-8").splitlines()) == 1 + 4
    broken = labelling.predict(experiment, None, "train", tmp_path / "broken")
    (header, rows), (other, expected) = predictions.read(broken), predictions.read(whole)
    assert header == other
    for row, one in zip(rows, expected, strict=True):
        assert (row.uid, row.gold, row.label, row.completion) == (
            one.uid, one.gold, one.label, one.completion
        )  # fmt: skip
        if one.probabilities is not None:
            assert row.probabilities == pytest.approx(one.probabilities, abs=1e-4)
    assert json.loads(broken.read_text("utf-8").splitlines()[1])["uid"] == rows[0].uid
