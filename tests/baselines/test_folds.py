"""The speech papers' random folds."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_emo import datasets, protocols
from llm_emo.baselines.folds import FOLDS, random_fold
from llm_emo.errors import ProtocolError

SIZES = {"anger": 1103, "happy": 1636, "sad": 1084, "neutral": 1708}
"""IEMOCAP's four classes in the paper: 5,531 rows."""


def rows(sizes):
    return {f"{label}-{n}": label for label, size in sizes.items() for n in range(size)}


def test_folds_of_the_papers_corpus_are_55_25_and_20_percent_of_every_class():
    gold = rows(SIZES)
    for fold in range(FOLDS):
        splits = random_fold(gold, fold, seed=0)
        for label, size in SIZES.items():
            counts = Counter(splits[uid] for uid in gold if gold[uid] == label)
            for split, share in (("train", 0.55), ("dev", 0.25), ("test", 0.20)):
                assert abs(counts[split] - share * size) <= 2


@given(
    sizes=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 70), min_size=1),
    seed=st.integers(0, 5),
)
def test_every_row_is_tested_in_exactly_one_fold(sizes, seed):
    gold = rows(sizes)
    splits = [random_fold(gold, fold, seed) for fold in range(FOLDS)]
    assert all(set(made) == set(gold) for made in splits)
    for uid in gold:
        assert [made[uid] for made in splits].count("test") == 1


def test_the_seed_and_not_the_order_of_the_rows_decides():
    gold = rows({"anger": 40, "sad": 30})
    backwards = dict(reversed(gold.items()))
    assert random_fold(backwards, 1, seed=0) == random_fold(gold, 1, seed=0)
    assert random_fold(gold, 1, seed=1) != random_fold(gold, 1, seed=0)


@pytest.mark.parametrize("fold", [-1, 5])
def test_another_fold_is_refused(fold):
    with pytest.raises(ProtocolError, match="expected 0 to 4"):
        random_fold({"a": "anger"}, fold, seed=0)


def test_random_folds_share_speakers_and_the_protocols_do_not(shared_data):
    if not (shared_data / "emodb" / "wav").is_dir():
        pytest.skip("EMO-DB is not there")
    corpus = datasets.read("emodb", shared_data)
    protocol = protocols.get("emodb4")
    everything = corpus["all"]
    gold = {row.uid: protocol.gold(row) for row in everything}
    splits = random_fold(gold, 0, seed=0)
    heard = {
        split: {row.speaker for row in everything if splits[row.uid] == split}
        for split in ("train", "test")
    }
    assert heard["train"] & heard["test"]
    apart = protocols.rows(protocol, corpus, seed=0, fold=0)
    speakers = [{row.utterance.speaker for row in part} for part in (apart.train, apart.test)]
    assert not speakers[0] & speakers[1]


def test_folds_and_settings_load_no_torch():
    modules = "llm_emo.baselines.folds, llm_emo.baselines.speech_settings"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
