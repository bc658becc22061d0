"""Every count that the corpora are known to have, on the real files where they are."""

from collections import Counter
from pathlib import Path

import pytest

from llm_emo import datasets, gold, inventory, protocols
from llm_emo.datasets import vader
from llm_emo.errors import DatasetError, JobFailed, ProtocolError
from llm_emo.types import SPLITS

UTTERANCES = {
    "sst": (8544, 1101, 2210),
    "friends": (10561, 1178, 2764),
    "mastodon": (1063, None, 1142),
    "mosi": (1284, 229, 686),
    "ch_sims": (1368, 456, 457),
    "m3ed": (17427, 2821, 4201),
    "meld": (9989, 1109, None),
    "tweeteval_emotion": (3257, 374, None),
}
DIALOGUES = {"friends": (720, 80, 200), "m3ed": (685, 126, 179)}


@pytest.fixture(scope="module")
def corpora(shared_data):
    """Load each corpus once."""
    loaded = {}

    def get(name):
        if not (shared_data / name).is_dir():
            pytest.skip(f"no {name} in {shared_data}")
        if name not in loaded:
            loaded[name] = datasets.read(name, shared_data)
        return loaded[name]

    return get


@pytest.mark.parametrize("name", UTTERANCES)
def test_splits_have_their_published_sizes(corpora, name):
    parts = corpora(name)
    found = tuple(len(parts[split]) if split in parts else None for split in SPLITS)
    assert found == UTTERANCES[name]


@pytest.mark.parametrize("name", DIALOGUES)
def test_splits_have_their_published_dialogues(corpora, name):
    parts = corpora(name)
    found = tuple(len({row.dialogue for row in parts[split]}) for split in SPLITS)
    assert found == DIALOGUES[name]


@pytest.mark.parametrize("name", protocols.names())
def test_protocols_have_their_published_test_sizes(corpora, name):
    protocol = protocols.get(name)
    if protocol.dataset in ("iemocap", "vader"):
        pytest.skip("not in the shared data")
    if protocol.partition != "official":
        pytest.skip("cross-validation has no one test size")
    parts = corpora(protocol.dataset)
    splits = protocols.rows(protocol, parts, seed=0)
    if "test" not in parts:
        with pytest.raises(ProtocolError, match="empty split 'test'"):
            splits.get("test")
        pytest.skip("the test split is not in the shared data")
    assert len(splits.get("test")) == protocol.n_test


def test_table_of_protocols_is_complete():
    sizes = {
        "sst2": 1821,
        "sst5": 2210,
        "sst2-ascii": 1811,
        "sst5-ascii": 2200,
        "friends7": 2223,
        "friends8": 2764,
        "friends4": 1837,
        "mastodon3": 1142,
        "mastodon-posneg": 1142,
        "mosi2": 656,
        "mosi2-nonneg": 686,
        "mosi3": 686,
        "mosi7": 686,
        "ch_sims2": 388,
        "ch_sims2-nonpos": 457,
        "ch_sims3": 457,
        "ch_sims5": 457,
        "m3ed7": 4201,
        "meld7": 2610,
        "tweeteval4": 1421,
        "tweeteval-anger-joy": 916,
        "tweeteval-anger-optimism": 681,
        "iemocap4": None,
        "iemocap4-random": None,
        "iemocap6": None,
        "iemocap6-random": None,
        "emodb4": None,
        "emodb4-random": None,
        "vader3": None,
    }
    assert {name: protocols.get(name).n_test for name in protocols.names()} == sizes


def test_sst_roots_of_the_test_split(corpora):
    parts = corpora("sst")
    counts = Counter(row.label for row in parts["test"])
    assert [counts[digit] for digit in "01234"] == [279, 633, 389, 510, 399]


def test_sst_binary_rows_and_classes(corpora):
    parts = corpora("sst")
    splits = protocols.rows(protocols.get("sst2"), parts, seed=0)
    assert [splits.record["rows"][split] for split in SPLITS] == [6920, 872, 1821]
    assert splits.record["labels"]["test"] == {"negative": 912, "positive": 909}


def test_sst_repeats_are_kept_and_reported(corpora):
    parts = corpora("sst")
    assert 8544 - len({row.text for row in parts["train"]}) >= 10
    splits = protocols.rows(protocols.get("sst5"), parts, seed=0)
    leaked = protocols.leaks(splits.train, splits.test)
    assert len(leaked) == 2
    assert len(splits.test) == 2210


def test_sst_has_ten_duplicate_trees(shared_data):
    trees = (shared_data / "sst/trees/train.txt").read_text(encoding="utf-8").splitlines()
    assert len(trees) - len(set(trees)) == 10


def test_sst_non_ascii_test_sentences(corpora):
    parts = corpora("sst")
    assert sum(not row.text.isascii() for row in parts["test"]) == 10


def test_friends_labels_of_the_test_split(corpora):
    parts = corpora("friends")
    assert Counter(row.label for row in parts["test"]) == {
        "neutral": 1287,
        "non-neutral": 541,
        "joy": 304,
        "surprise": 286,
        "anger": 161,
        "sadness": 85,
        "disgust": 68,
        "fear": 32,
    }


def test_friends_without_non_neutral(corpora):
    parts = corpora("friends")
    record = protocols.rows(protocols.get("friends7"), parts, seed=0).record
    assert [record["rows"][split] for split in SPLITS] == [8544, 964, 2223]


def test_friends_has_five_votes_and_no_control_characters(corpora):
    parts = corpora("friends")
    rows = [row for part in parts.values() for row in part]
    assert {(len(row.votes), sum(row.votes)) for row in rows} == {(7, 5)}
    shown = "".join(row.text + row.speaker for row in rows)
    assert not any(0x80 <= ord(character) <= 0x9F for character in shown)
    assert {"’", "é", "è", "…", "—"} <= set(shown)


def test_mastodon_signs_of_the_test_split(corpora):
    parts = corpora("mastodon")
    assert Counter(row.label for row in parts["test"]) == {"*": 479, "-": 372, "+": 291}


def test_mastodon_json_beside_the_native_files(shared_data, tmp_path, corpora):
    native = corpora("mastodon")
    (tmp_path / "mastodon").mkdir()
    (tmp_path / "mastodon/json").symlink_to((shared_data / "mastodon/json").resolve())
    parts = datasets.read("mastodon", tmp_path)
    assert {split: len(parts[split]) for split in SPLITS} == {
        "train": 967,
        "dev": 108,
        "test": 1142,
    }
    assert sum(len(part) for part in parts.values()) == 2217
    test = parts["test"]
    assert Counter(row.label for row in test) == {"*": 479, "-": 372, "+": 291}
    assert [row.uid for row in test] == [row.uid for row in native["test"]]


def test_mastodon_has_no_dev_split_and_one_is_made_by_dialogue(corpora, shared_data):
    parts = corpora("mastodon")
    with pytest.raises(DatasetError, match="no dev split"):
        datasets.load("mastodon", shared_data, splits=["dev"])
    splits = protocols.rows(protocols.get("mastodon3"), parts, seed=0)
    assert len(splits.train) + len(splits.dev) == 1063
    train = {row.utterance.dialogue for row in splits.train}
    assert not train & {row.utterance.dialogue for row in splits.dev}
    assert 0.05 < len(splits.dev) / 1063 < 0.15


def test_mosi_scores(corpora):
    parts = corpora("mosi")
    rows = [row for part in parts.values() for row in part]
    assert len({row.score for row in rows}) == 53
    assert {0.25, 0.333333} <= {row.score for row in rows}
    signs = Counter(gold.sign(row.score) for row in parts["test"])
    assert signs == {"negative": 379, "neutral": 30, "positive": 277}


def test_mosi_is_in_capitals_and_keeps_its_ids(corpora):
    parts = corpora("mosi")
    rows = [row for part in parts.values() for row in part]
    assert not any(character.islower() for row in rows for character in row.text)
    assert all(row.uid == f"{row.dialogue}/{row.turn}" for row in rows)


def test_ch_sims_scores_and_repeats(corpora):
    parts = corpora("ch_sims")
    rows = [row for part in parts.values() for row in part]
    assert len({row.score for row in rows}) == 11
    signs = Counter(gold.sign(row.score) for row in parts["test"])
    assert signs == {"negative": 248, "neutral": 69, "positive": 140}
    scores = {}
    for row in rows:
        scores.setdefault(row.text, []).append(row.score)
    repeated = [found for found in scores.values() if len(found) > 1]
    assert len(repeated) == 6
    assert sum(len(set(found)) > 1 for found in repeated) == 2
    assert all(len(row.uid.split("/")[1]) == 4 for row in rows)


def test_m3ed_labels_of_the_test_split(corpora):
    parts = corpora("m3ed")
    assert Counter(row.label for row in parts["test"]) == {
        "Neutral": 1855,
        "Anger": 736,
        "Sad": 734,
        "Happy": 358,
        "Surprise": 235,
        "Disgust": 218,
        "Fear": 65,
    }


def test_m3ed_has_twelve_utterances_without_a_speaker(corpora):
    parts = corpora("m3ed")
    assert sum(row.speaker is None for part in parts.values() for row in part) == 12


def test_m3ed_ids_are_in_the_official_order():
    assert protocols.get("m3ed7").labels == (
        "happy",
        "neutral",
        "sad",
        "disgust",
        "anger",
        "fear",
        "surprise",
    )


def test_tweeteval_keeps_literal_newlines_and_entities(corpora):
    parts = corpora("tweeteval_emotion")
    assert sum("\\n" in row.text for row in parts["train"]) == 157
    assert sum("&amp;" in row.text for row in parts["train"]) == 140


def test_emodb_files_speakers_and_letters(corpora):
    parts = corpora("emodb")
    assert len(parts["all"]) == 266
    speakers = {row.speaker for row in parts["all"]}
    assert speakers == {"03", "08", "09", "10", "11", "12", "13", "14"}
    assert {row.label for row in parts["all"]} == set("WFNT")


def test_emodb_folds_hold_out_one_speaker_each(corpora):
    parts = corpora("emodb")
    protocol = protocols.get("emodb4")
    tested = []
    for fold in range(8):
        splits = protocols.rows(protocol, parts, seed=3, fold=fold)
        heard = [{row.utterance.speaker for row in splits.get(split)} for split in SPLITS]
        assert [len(speakers) for speakers in heard] == [6, 1, 1]
        assert set.union(*heard) == {row.speaker for row in parts["all"]}
        tested += [row.utterance.uid for row in splits.test]
    assert len(tested) == len(set(tested)) == 266


def test_emodb_random_folds_test_every_row_once_whatever_the_seed(corpora):
    parts = corpora("emodb")
    protocol = protocols.get("emodb4-random")
    tested = []
    for fold in range(5):
        one, other = (protocols.rows(protocol, parts, seed=n, fold=fold) for n in (0, 3))
        assert (one.train, one.dev, one.test) == (other.train, other.dev, other.test)
        sizes = [len(one.get(split)) for split in SPLITS]
        assert all(
            abs(n - share * 266) < 5 for n, share in zip(sizes, (0.55, 0.25, 0.2), strict=True)
        )
        tested += [row.utterance.uid for row in one.test]
    assert len(tested) == len(set(tested)) == 266


@pytest.fixture(scope="module")
def rated():
    try:
        folder = vader.obtain()
    except JobFailed as error:
        pytest.skip(str(error))
    return {source: vader.read_source(folder, source) for source in vader.SOURCES}


def test_vader_sources_have_their_published_sizes(rated):
    sizes = {source: len(rows) for source, rows in rated.items()}
    assert sizes == {"tweets": 4200, "movies": 10605, "products": 3708, "newspaper": 5190}
    texts = [row.text for rows in rated.values() for row in rows]
    assert len(texts) == 23703
    assert sum(n - 1 for n in Counter(texts).values()) == 84


def test_vader_tweets_at_one_half(rated):
    classes = Counter(gold.rated(row.score) for row in rated["tweets"])
    assert classes == {"negative": 1087, "neutral": 768, "positive": 2345}


def test_vader_votes_average_to_the_score(rated):
    for rows in rated.values():
        for row in rows:
            assert row.votes is None or abs(sum(row.votes) / len(row.votes) - row.score) < 2e-3
    assert sum(row.votes is None for row in rated["tweets"]) == 199


def test_vader_splits_part_no_document_and_no_repeated_text(rated, tmp_path):
    parts = datasets.read("vader", None)
    splits = protocols.rows(protocols.get("vader3"), parts, seed=1)
    assert sum(splits.record["rows"].values()) == 4200
    texts = [
        {" ".join(row.utterance.text.casefold().split()) for row in splits.get(split)}
        for split in SPLITS
    ]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_inventory_lists_the_counts(shared_data):
    entries = {entry["name"]: entry for entry in inventory.describe(shared_data)}
    for name, sizes in UTTERANCES.items():
        found = entries[name]["splits"]
        expected = {s: n for s, n in zip(SPLITS, sizes, strict=True) if n is not None}
        assert {split: info["utterances"] for split, info in found.items()} == expected
    for name, sizes in DIALOGUES.items():
        found = entries[name]["splits"]
        assert tuple(found[split]["dialogues"] for split in SPLITS) == sizes
    json_files = entries["mastodon"]["other_layouts"][0]["splits"]
    assert [json_files[split]["utterances"] for split in SPLITS] == [967, 108, 1142]
    assert entries["emodb"]["splits"]["all"]["utterances"] == 266
    assert entries["iemocap"]["error"]
    assert Path(entries["sst"]["folder"]).is_dir()
