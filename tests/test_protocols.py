"""Protocols: classes, rows, splits, and what may be compared."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_emo import datasets, gold, protocols
from llm_emo.errors import ProtocolError
from llm_emo.metrics import METRICS
from llm_emo.types import SPLITS, Row, Utterance

ALL = [protocols.get(name) for name in protocols.names()]


def scored(score):
    return Utterance("a", "text", score=score)


def labels_of(name, scores):
    return [protocols.get(name).gold(scored(score)) for score in scores]


@pytest.mark.parametrize("protocol", ALL, ids=lambda protocol: protocol.name)
def test_every_protocol_names_known_parts(protocol):
    assert protocol.dataset in datasets.names()
    assert len(set(protocol.labels)) == len(protocol.labels) >= 2
    assert all(label == label.lower() for label in protocol.labels)
    assert protocol.metrics
    assert set(protocol.metrics) <= set(METRICS)
    assert ("f1" in protocol.metrics) == (protocol.averaged_over is not None)
    assert set(protocol.averaged_over or ()) <= set(protocol.labels)


def test_headline_metrics_are_those_of_the_users_of_each_protocol():
    headline = {protocol.name: protocol.metrics[0] for protocol in ALL}
    others = {
        "mastodon-posneg": "f1",
        "m3ed7": "weighted_f1",
        "meld7": "weighted_f1",
        "iemocap6": "weighted_f1",
        "tweeteval4": "macro_f1",
        "tweeteval-anger-optimism": "macro_f1",
        "vader3": "macro_f1",
    }
    assert headline == {name: others.get(name, "accuracy") for name in headline}


def test_every_corpus_has_a_protocol_and_each_belongs_to_one():
    assert {protocol.dataset for protocol in ALL} == set(datasets.names())
    assert sum(len(protocols.of(name)) for name in datasets.names()) == len(ALL)


def test_unknown_protocol_names_the_nearest():
    with pytest.raises(ProtocolError, match="did you mean 'friends7'"):
        protocols.get("friend7")


# Comparing


@pytest.mark.parametrize("one", protocols.names())
def test_only_a_protocol_is_comparable_with_itself(one):
    for other in protocols.names():
        if one == other:
            protocols.require_comparable(one, other)
        else:
            with pytest.raises(ProtocolError, match="not comparable"):
                protocols.require_comparable(one, other)


def test_refused_comparison_says_in_what_the_two_differ():
    with pytest.raises(ProtocolError, match=r"classes .*test rows \(2223 and 2764\)"):
        protocols.require_comparable("friends7", "friends8")


# Classes


def test_mosi2_leaves_out_zero_and_its_twins_do_not():
    scores = (-0.2, 0.0, 0.333333)
    assert labels_of("mosi2", scores) == ["negative", None, "positive"]
    assert labels_of("mosi2-nonneg", scores) == ["negative", "non-negative", "non-negative"]
    assert labels_of("ch_sims2", scores) == ["negative", None, "positive"]
    assert labels_of("ch_sims2-nonpos", scores) == ["non-positive", "non-positive", "positive"]
    assert labels_of("mosi3", scores) == ["negative", "neutral", "positive"]


@given(st.floats(-3, 3))
def test_mosi7_is_mmsas_rounding(score):
    import numpy

    place = int(numpy.round(numpy.clip(score, -3.0, 3.0))) + 3
    assert labels_of("mosi7", [score]) == [gold.SEVEN[place]]


def test_ch_sims_classes_of_all_eleven_values():
    values = [n / 5 for n in range(-5, 6)]
    weak, strong = ["weakly negative"] * 3, ["negative"] * 2
    expected = [*strong, *weak, "neutral", *["weakly positive"] * 3, *["positive"] * 2]
    assert labels_of("ch_sims5", values) == expected
    assert labels_of("ch_sims3", values) == ["negative"] * 5 + ["neutral"] + ["positive"] * 5


@given(st.floats(-4, 4), st.floats(-4, 4))
def test_classes_of_scores_never_run_against_the_scores(low, high):
    low, high = sorted((low, high))
    for name in ("mosi3", "mosi7", "ch_sims3", "ch_sims5"):
        order = protocols.get(name).labels
        first, second = labels_of(name, [low, high])
        assert order.index(first) <= order.index(second)


def test_rated_text_is_cut_at_one_half_inclusive():
    assert [gold.rated(s) for s in (-0.5, -0.499, 0.0, 0.499, 0.5)] == [
        "negative",
        "neutral",
        "neutral",
        "neutral",
        "positive",
    ]


def test_vader3_takes_tweets_only():
    tweet = Utterance("tweets/1", "a", score=2.0)
    assert protocols.get("vader3").gold(tweet) == "positive"
    assert protocols.get("vader3").gold(dataclasses.replace(tweet, uid="movies/1")) is None


def test_iemocap4_merges_excited_and_iemocap6_does_not():
    row = Utterance("Ses01F_impro01_F000", "a", label="exc")
    assert protocols.get("iemocap4").gold(row) == "happy"
    assert protocols.get("iemocap6").gold(row) == "excited"
    for code in ("xxx", "oth", "fea", "sur", "dis"):
        assert protocols.get("iemocap6").gold(dataclasses.replace(row, label=code)) is None


def test_friends7_drops_non_neutral_and_friends4_more():
    row = Utterance("a", "a", label="non-neutral")
    assert protocols.get("friends7").gold(row) is None
    assert protocols.get("friends8").gold(row) == "non-neutral"
    assert protocols.get("friends4").gold(dataclasses.replace(row, label="fear")) is None


# Rows


def test_ascii_protocols_drop_test_sentences_only(fixtures):
    loaded = datasets.read("sst", fixtures)
    full = protocols.rows(protocols.get("sst5"), loaded, seed=0)
    narrow = protocols.rows(protocols.get("sst5-ascii"), loaded, seed=0)
    assert narrow.train == full.train
    assert any(not row.utterance.text.isascii() for row in narrow.train)
    assert {r.utterance.text for r in full.test} - {r.utterance.text for r in narrow.test} == {
        "A fiancé worth waiting for ."
    }


def test_rows_left_out_stay_in_the_history(fixtures):
    splits = protocols.rows(protocols.get("friends7"), datasets.read("friends", fixtures), seed=0)
    row = next(row for row in splits.test if row.utterance.uid == "test/1/2")
    assert [turn.label for turn in row.history] == ["joy", "non-neutral"]


def test_made_dev_split_takes_whole_dialogues_and_is_recorded(fixtures):
    loaded = datasets.read("mastodon", fixtures)
    protocol = protocols.get("mastodon3")
    splits = protocols.rows(protocol, loaded, seed=5, dev_fraction=0.3)
    dialogues = [{row.utterance.dialogue for row in part} for part in (splits.train, splits.dev)]
    assert not dialogues[0] & dialogues[1]
    assert len(splits.train) + len(splits.dev) == len(loaded["train"])
    assert "by dialogue, fraction 0.3, seed 5" in splits.record["how"]["dev"]
    assert splits.record["seed"] == 5


def test_seed_changes_the_made_dev_split(fixtures):
    loaded = datasets.read("mastodon", fixtures)
    protocol = protocols.get("mastodon3")
    digests = {
        protocols.rows(protocol, loaded, seed=seed).record["uids_sha256"]["dev"]
        for seed in range(8)
    }
    assert len(digests) > 1


def test_corpus_with_a_dev_split_ignores_the_seed(fixtures):
    loaded = datasets.read("friends", fixtures)
    one, two = (protocols.rows(protocols.get("friends7"), loaded, seed=s) for s in (0, 1))
    assert one.train == two.train
    assert one.dev == two.dev


def test_split_that_is_absent_is_an_error_only_when_asked_for(fixtures):
    loaded = datasets.read("meld", fixtures, splits=["train", "dev"])
    splits = protocols.rows(protocols.get("meld7"), loaded, seed=0)
    assert splits.get("dev")
    with pytest.raises(ProtocolError, match=r"meld7: empty split 'test'.*test_sent_emo.csv"):
        splits.get("test")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_dev_fraction_must_be_a_fraction(fixtures, fraction):
    loaded = datasets.read("mastodon", fixtures)
    with pytest.raises(ProtocolError, match="dev_fraction"):
        protocols.rows(protocols.get("mastodon3"), loaded, seed=0, dev_fraction=fraction)


# Folds


def test_iemocap4_holds_out_a_session_and_selects_on_other_speakers(fixtures):
    loaded = datasets.read("iemocap", fixtures)
    protocol = protocols.get("iemocap4")
    for fold in range(5):
        splits = protocols.rows(protocol, loaded, seed=0, fold=fold)
        speakers = [{r.utterance.speaker for r in splits.get(split)} for split in SPLITS]
        assert speakers[2] == {f"Ses0{fold + 1}F", f"Ses0{fold + 1}M"}
        assert not speakers[0] & speakers[1]
        assert not speakers[2] & (speakers[0] | speakers[1])
        assert splits.record["fold"] == fold


def test_iemocap6_tests_on_the_fifth_session(fixtures):
    splits = protocols.rows(protocols.get("iemocap6"), datasets.read("iemocap", fixtures), seed=0)
    assert {row.utterance.uid[:5] for row in splits.test} == {"Ses05"}
    assert {row.utterance.uid[:5] for row in splits.train + splits.dev} == {
        "Ses01",
        "Ses02",
        "Ses03",
        "Ses04",
    }


@pytest.mark.parametrize("fold", [None, -1, 4, 99])
def test_emodb4_needs_a_fold_that_exists(fixtures, fold):
    loaded = datasets.read("emodb", fixtures)
    with pytest.raises(ProtocolError, match=r"expected 0 to 3.*03, 08, 09, 11"):
        protocols.rows(protocols.get("emodb4"), loaded, seed=0, fold=fold)


@pytest.mark.parametrize("name", ["emodb4-random", "iemocap4-random", "iemocap6-random"])
def test_random_folds_part_the_rows_of_their_speaker_independent_twins(fixtures, name):
    protocol, twin = protocols.get(name), protocols.get(name.removesuffix("-random"))
    loaded = datasets.read(protocol.dataset, fixtures)
    whole = protocols.rows(
        twin, loaded, seed=0, fold=None if twin.partition == "fifth session" else 0
    )
    everything = {row.utterance.uid: row.gold for part in SPLITS for row in whole.get(part)}
    tested = []
    for fold in range(5):
        splits = protocols.rows(protocol, loaded, seed=fold, fold=fold)
        parted = {row.utterance.uid: row.gold for p in SPLITS for row in getattr(splits, p)}
        assert parted == everything
        assert "speakers are shared" in splits.record["how"]["test"]
        tested += [row.utterance.uid for row in splits.test]
    assert sorted(tested) == sorted(everything)


@pytest.mark.parametrize("fold", [None, -1, 5])
def test_random_folds_are_five(fixtures, fold):
    loaded = datasets.read("emodb", fixtures)
    with pytest.raises(ProtocolError, match="expected 0 to 4"):
        protocols.rows(protocols.get("emodb4-random"), loaded, seed=0, fold=fold)


@pytest.mark.parametrize("name", ["friends7", "iemocap6", "vader3"])
def test_fold_is_refused_where_there_are_none(fixtures, name):
    protocol = protocols.get(name)
    loaded = datasets.read(protocol.dataset, fixtures)
    with pytest.raises(ProtocolError, match="no folds"):
        protocols.rows(protocol, loaded, seed=0, fold=0)


def test_two_speakers_are_too_few_for_three_splits():
    rows = [Utterance(f"0{n}a01Wa", "a01", speaker=f"0{n}", label="W") for n in (1, 2)]
    with pytest.raises(ProtocolError, match="at least three"):
        protocols.rows(protocols.get("emodb4"), {"all": rows}, seed=0, fold=0)


# Repeated texts


def test_repeated_tweets_are_never_parted(fixtures):
    loaded = datasets.read("vader", fixtures)
    for seed in range(6):
        splits = protocols.rows(protocols.get("vader3"), loaded, seed=seed)
        texts = [{r.utterance.text.casefold() for r in splits.get(split)} for split in SPLITS]
        assert sum(map(len, texts)) == len(set.union(*texts))


def test_leaks_are_reported_with_their_labels_and_nothing_is_removed(fixtures):
    splits = protocols.rows(protocols.get("sst5"), datasets.read("sst", fixtures), seed=0)
    assert protocols.leaks(splits.train, splits.test) == [
        {"test": "test/2", "train": ["train/2"], "same_label": True}
    ]
    assert len(splits.test) == 7


def test_leaks_notice_conflicting_labels():
    train = [Row(Utterance(str(n), "same", label=x), x) for n, x in enumerate("ab")]
    test = [
        Row(Utterance("t", "same", label="a"), "a"),
        Row(Utterance("u", "other", label="a"), "a"),
    ]
    assert protocols.leaks(train, test) == [{"test": "t", "train": ["0", "1"], "same_label": False}]


# Sizes


@pytest.mark.parametrize("name", protocols.names())
def test_another_number_of_test_rows_than_published_is_warned_of(name):
    protocol = protocols.get(name)
    if protocol.n_test is None:
        assert protocol.size_warning("test", 5) is None
        return
    assert protocol.size_warning("test", protocol.n_test) is None
    for rows in (protocol.n_test - 1, protocol.n_test + 1):
        warning = protocol.size_warning("test", rows)
        assert f"{name}: found {rows:,} rows" in warning
        assert f"expected {protocol.n_test:,}" in warning
    assert protocol.size_warning("train", 1) is protocol.size_warning("dev", 1) is None
