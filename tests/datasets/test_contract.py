"""What every corpus module must do, checked on its fixture.

A new corpus is one module in llm_emo/datasets and one folder in tests/fixtures; this suite
finds both.
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from llm_emo import datasets, inventory, protocols
from llm_emo.datasets.base import ALL, Corpus
from llm_emo.datasets.table import FEATURES, to_dataset
from llm_emo.errors import DatasetError, EmoError, ProtocolError
from llm_emo.types import SPLITS, Utterance

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = datasets.names()


@pytest.fixture(params=NAMES)
def corpus(request) -> Corpus:
    return datasets.get(request.param)


@pytest.fixture
def parts(corpus) -> dict[str, list[Utterance]]:
    return datasets.read(corpus.name, FIXTURES)


@pytest.fixture
def rows(parts) -> list[Utterance]:
    return [row for part in parts.values() for row in part]


def splits_of(protocol, loaded, seed=0):
    fold = 0 if protocol.partition in ("speakers", "sessions", "random") else None
    return protocols.rows(protocol, loaded, seed=seed, fold=fold)


def test_module_is_named_like_its_corpus_and_has_a_fixture(corpus):
    assert (Path(datasets.__file__).parent / f"{corpus.name}.py").is_file()
    assert (FIXTURES / corpus.name).is_dir()


def test_corpus_says_what_it_is_and_where_it_comes_from(corpus):
    assert corpus.language in {"en", "zh", "de"}
    assert all([corpus.title, corpus.license, corpus.annotation, corpus.homepage])
    assert "http" in corpus.how_to_get or corpus.obtain is not None
    assert corpus.name in corpus.how_to_get or corpus.obtain is not None


def test_features_are_the_fixed_ones(corpus):
    for table in datasets.load(corpus.name, FIXTURES).values():
        assert table.features == FEATURES
        assert list(table.features) == [field.name for field in dataclasses.fields(Utterance)]


def test_keys_are_splits_or_the_one_key_all(parts):
    assert set(parts) == {ALL} or set(parts) <= set(SPLITS)
    assert all(parts.values())


def test_uids_are_text_and_unique_over_splits(rows):
    counts = Counter(row.uid for row in rows)
    assert all(isinstance(uid, str) and uid for uid in counts)
    assert [uid for uid, n in counts.items() if n > 1] == []


def test_exactly_one_of_label_and_score_is_set(rows):
    assert [row.uid for row in rows if (row.label is None) == (row.score is None)] == []
    assert len({row.label is None for row in rows}) == 1


def test_texts_are_neither_empty_nor_padded(rows):
    assert [row.uid for row in rows if not row.text or row.text != row.text.strip()] == []


def test_turns_order_their_dialogue_without_repeats(parts):
    for part in parts.values():
        turns = defaultdict(list)
        for row in part:
            assert (row.dialogue is None) == (row.turn is None), row.uid
            if row.dialogue is not None:
                turns[row.dialogue].append(row.turn)
        for dialogue, numbers in turns.items():
            assert numbers == sorted(set(numbers)), dialogue


def test_votes_are_whole_numbers(rows):
    for row in rows:
        assert row.votes is None or all(type(vote) is int for vote in row.votes)


def test_audio_is_a_file_where_it_is_given(corpus, rows):
    paths = [row.audio for row in rows if row.audio is not None]
    assert bool(paths) == corpus.audio
    assert all(Path(path).is_file() for path in paths)


def test_a_table_holds_the_utterances_that_are_read(corpus, parts):
    again = datasets.load(corpus.name, FIXTURES)
    assert {part: datasets.utterances(table) for part, table in again.items()} == parts


def test_every_layout_of_the_fixture_reads(corpus):
    layouts = corpus.all_layouts(FIXTURES)
    assert {layout.name for layout, _ in layouts} == {layout.name for layout in corpus.layouts}
    for layout, base in layouts:
        for part in layout.parts(base):
            assert layout.read(base, part)


def test_table_gives_back_the_utterances(rows):
    assert datasets.utterances(to_dataset(rows)) == rows


def test_only_the_splits_asked_for_are_read(corpus, parts):
    if ALL in parts:
        assert set(datasets.load(corpus.name, FIXTURES, splits=["train"])) == {ALL}
    else:
        assert set(datasets.load(corpus.name, FIXTURES, splits=["test"])) == {"test"}


def test_missing_corpus_names_a_file_and_how_to_get_it(corpus, tmp_path):
    if corpus.obtain is not None:
        pytest.skip("fetched instead")
    with pytest.raises(DatasetError) as caught:
        datasets.load(corpus.name, tmp_path)
    assert str(tmp_path / corpus.name) in str(caught.value)
    assert corpus.how_to_get in str(caught.value)
    with pytest.raises(DatasetError, match="data root"):
        datasets.load(corpus.name, None)


def test_doing_what_the_messages_say_file_by_file_ends_in_a_corpus(corpus, tmp_path):
    if corpus.obtain is not None:
        pytest.skip("fetched instead")
    advised = tmp_path / re.search(r"into the folder ([\w/]+)", corpus.how_to_get)[1]
    wanted = [part for part in SPLITS if part in corpus.layouts[0].files] or None
    for _ in range(20):
        try:
            datasets.load(corpus.name, tmp_path, splits=wanted)
        except DatasetError as error:
            named = Path(re.search(r"no file (.*?); ", str(error))[1])
            assert named.is_relative_to(advised)
            there = sorted(FIXTURES.glob(str(named.relative_to(tmp_path))))
            assert there, f"the fixture has no {named}"
            for path in there:
                target = tmp_path / path.relative_to(FIXTURES)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        else:
            return
    pytest.fail("still incomplete")


def test_missing_split_names_its_file_only_when_it_is_asked_for(corpus, tmp_path):
    layout, base = corpus.all_layouts(FIXTURES)[0]
    own = set(layout.files.get("test", ())) - set(layout.files.get("train", ()))
    if not own:
        pytest.skip("test rows have no file of their own")
    shutil.copytree(FIXTURES / corpus.name, tmp_path / corpus.name)
    place = tmp_path / corpus.name / base.relative_to(FIXTURES / corpus.name)
    for name in own:
        (place / name).unlink()
    assert "test" not in datasets.load(corpus.name, tmp_path)
    with pytest.raises(DatasetError) as caught:
        datasets.load(corpus.name, tmp_path, splits=["test"])
    assert any(str(place / name) in str(caught.value) for name in own)
    assert corpus.how_to_get in str(caught.value)


def test_truncated_file_is_never_a_traceback(corpus, tmp_path):
    layout, base = corpus.all_layouts(FIXTURES)[0]
    if corpus.name == "emodb":
        pytest.skip("the annotation is the file name")
    shutil.copytree(FIXTURES / corpus.name, tmp_path / corpus.name)
    place = tmp_path / corpus.name / base.relative_to(FIXTURES / corpus.name)
    for path in layout.paths(place, layout.parts(place)):
        raw = path.read_bytes()
        for keep in (0, len(raw) // 3, len(raw) - 7):
            path.write_bytes(raw[:keep])
            # A cut may still leave a valid file; anything but an EmoError fails here.
            with contextlib.suppress(EmoError):
                datasets.load(corpus.name, tmp_path)
        path.write_bytes(raw)


def test_file_hashes_cover_what_is_read(corpus):
    hashes = datasets.file_hashes(corpus.name, FIXTURES)
    assert hashes
    assert all(len(digest) == 64 for digest in hashes.values())
    assert not any(Path(name).is_absolute() for name in hashes)


def test_every_protocol_accepts_the_rows(corpus):
    loaded = datasets.read(corpus.name, FIXTURES)
    own = protocols.of(corpus.name)
    assert own
    for protocol in own:
        splits = splits_of(protocol, loaded)
        for split in SPLITS:
            got = splits.get(split)
            assert {row.gold for row in got} <= set(protocol.labels)
        used = {row.gold for split in SPLITS for row in splits.get(split)}
        assert used == set(protocol.labels), f"{protocol.name}: fixture lacks a class"


def test_no_row_is_in_two_splits_and_no_unit_is_parted_by_us(corpus):
    loaded = datasets.read(corpus.name, FIXTURES)
    for protocol in protocols.of(corpus.name):
        splits = splits_of(protocol, loaded)
        uids = [row.utterance.uid for split in SPLITS for row in splits.get(split)]
        assert len(uids) == len(set(uids))
        if protocol.partition == "random":  # it parts dialogues, as the paper it comes from does
            continue
        for split, how in splits.record["how"].items():
            if how.startswith("the corpus's"):
                continue
            mine = {row.utterance.dialogue for row in splits.get(split)} - {None}
            rest = {
                row.utterance.dialogue
                for other in SPLITS
                if other != split and not splits.record["how"][other].startswith("the corpus's")
                for row in splits.get(other)
            }
            assert not mine & rest


def test_history_is_the_earlier_turns_oldest_first(corpus):
    loaded = datasets.read(corpus.name, FIXTURES)
    splits = splits_of(protocols.of(corpus.name)[0], loaded)
    for row in (row for split in SPLITS for row in splits.get(split)):
        assert all(turn.dialogue == row.utterance.dialogue for turn in row.history)
        numbers = [turn.turn for turn in row.history] + [row.utterance.turn]
        assert numbers == sorted(set(numbers))


def test_record_is_json_and_deterministic(corpus):
    loaded = datasets.read(corpus.name, FIXTURES)
    for protocol in protocols.of(corpus.name):
        record = splits_of(protocol, loaded).record
        assert json.loads(json.dumps(record)) == record
        assert splits_of(protocol, loaded).record == record


def test_test_rows_do_not_depend_on_the_seed(corpus):
    loaded = datasets.read(corpus.name, FIXTURES)
    for protocol in protocols.of(corpus.name):
        digests = {splits_of(protocol, loaded, s).record["uids_sha256"]["test"] for s in range(4)}
        assert len(digests) == 1


def test_unknown_label_is_an_error_that_names_the_row(corpus, rows):
    if rows[0].label is None:
        pytest.skip("scores are cut, not named")
    strange = dataclasses.replace(rows[0], label="delighted")
    for protocol in protocols.of(corpus.name):
        with pytest.raises(ProtocolError, match=rows[0].uid):
            protocol.gold(strange)


def test_inventory_counts_what_load_gives(corpus, parts):
    entry = next(e for e in inventory.describe(FIXTURES) if e["name"] == corpus.name)
    assert entry["error"] is None
    assert json.loads(json.dumps(entry)) == entry
    assert {part: info["utterances"] for part, info in entry["splits"].items()} == {
        part: len(rows) for part, rows in parts.items()
    }
    own = protocols.of(corpus.name)
    assert list(entry["protocols"]) == [protocol.name for protocol in own]
    for protocol, told in zip(own, entry["protocols"].values(), strict=True):
        assert (told["test_rows"], told["used_by"]) == (protocol.n_test, protocol.used_by)


def test_unknown_corpus_names_the_nearest():
    with pytest.raises(DatasetError, match="did you mean 'mastodon'"):
        datasets.get("mastadon")


def test_inventory_of_nothing_says_how_to_get_each(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    for entry in inventory.describe(tmp_path):
        assert entry["splits"] == {}
        assert entry["how_to_get"] in entry["error"]
