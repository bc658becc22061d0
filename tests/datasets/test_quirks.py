"""Each oddity of the native files, on the fixture that has it."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_emo import datasets
from llm_emo.datasets import friends, m3ed, sst
from llm_emo.errors import DatasetError


@pytest.fixture
def root(fixtures, tmp_path) -> Path:
    """A copy of the fixtures that a test may change."""
    for folder in fixtures.iterdir():
        if folder.is_dir() and folder.name in datasets.names():
            shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path


def read(root, name, part):
    return datasets.utterances(datasets.load(name, root)[part])


def by_uid(root, name, part):
    return {row.uid: row for row in read(root, name, part)}


def edit(path, old, new):
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new).encode())


# SST


def test_sst_brackets_escapes_and_quotes_are_written_as_in_text(fixtures):
    rows = by_uid(fixtures, "sst", "train")
    assert rows["train/4"].text == "A pleasant ( if slight ) comedy ."
    assert rows["train/5"].text == "Part thriller/part lecture , and dull at both ."
    assert rows["train/6"].text == "Rated *** by my aunt ."
    assert rows["train/7"].text == 'They call it " daring " .'


def test_sst_token_with_a_no_break_space_stays_one_token(fixtures):
    assert by_uid(fixtures, "sst", "train")["train/8"].text == (
        "It lasts 2\u00a01/2 hours and I wanted more ."
    )


def test_sst_duplicate_trees_are_kept(fixtures):
    rows = by_uid(fixtures, "sst", "train")
    assert rows["train/4"].text == rows["train/9"].text


def test_sst_tree_that_does_not_close_is_named_by_its_line(root):
    edit(root / "sst/trees/dev.txt", "(2 .))", "(2 .)")
    with pytest.raises(DatasetError, match=r"dev.txt: line 1"):
        datasets.load("sst", root)


@pytest.mark.parametrize(
    "tree", ["", "(5 (2 a) (2 b))", "(2 (2 a) b)", "(2 (2 a))x", "(2 )", "2 a"]
)
def test_sst_no_token_is_lost_in_a_malformed_tree(tree):
    with pytest.raises(ValueError, match=r"brackets|labels|leaves"):
        sst.parse_tree(tree)


TOKENS = st.text(
    st.characters(exclude_characters="() \n\r\t\\", exclude_categories=["Cs"]), min_size=1
)


@given(
    st.lists(TOKENS.filter(lambda token: token not in sst.SPELLING), min_size=1),
    st.sampled_from("01234"),
)
def test_sst_every_token_of_a_tree_comes_out_in_order(tokens, label):
    tree = f"(2 {tokens[-1]})"
    for token in reversed(tokens[:-1]):
        tree = f"({label} (2 {token}) {tree})"
    assert sst.parse_tree(tree)[1] == " ".join(tokens)


def test_sst_official_zip_says_the_same_as_the_trees(root):
    trees = datasets.load("sst", root)
    shutil.rmtree(root / "sst/trees")
    official = datasets.load("sst", root)
    for split in ("train", "dev", "test"):
        assert official[split]["text"][:] == trees[split]["text"][:]
        assert official[split]["label"][:] == trees[split]["label"][:]


def test_sst_official_zip_code_2_is_test_and_3_is_dev(root):
    shutil.rmtree(root / "sst/trees")
    parts = datasets.load("sst", root)
    codes = dict(
        line.split(",")
        for line in (root / "sst/stanfordSentimentTreebank/datasetSplit.txt").read_text().split()
    )
    assert {codes[uid] for uid in parts["test"]["uid"]} == {"2"}
    assert {codes[uid] for uid in parts["dev"]["uid"]} == {"3"}


def test_sst_official_zip_undoes_latin_1(root):
    path = root / "sst/stanfordSentimentTreebank/datasetSentences.txt"
    assert "fiancÃ©" in path.read_text(encoding="utf-8")
    shutil.rmtree(root / "sst/trees")
    assert "A fiancé worth waiting for ." in datasets.load("sst", root)["test"]["text"][:]


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.0, "0"), (0.2, "0"), (0.20001, "1"), (0.4, "1"), (0.6, "2"), (0.8, "3"), (0.80556, "4")],
)
def test_sst_degrees_are_closed_above_also_in_float32(value, label):
    import numpy

    assert sst.degree(value) == sst.degree(float(numpy.float32(value))) == label


# Friends


def test_friends_control_characters_become_cp1252_punctuation_and_nothing_else_changes(fixtures):
    rows = by_uid(fixtures, "friends", "train")
    assert rows["train/0/1"].text == "You’re kidding — that’s wonderful!"
    assert rows["train/0/2"].text == "It’s torn, though."
    assert rows["train/0/4"].text == "I have no idea…"
    assert rows["train/1/0"].text == "There is a spider in the café."
    assert rows["train/1/1"].speaker == "Mr. O’Hara"


@given(st.text())
def test_friends_only_control_characters_are_remapped(text):
    for before, after in zip(text, text.translate(friends.C1), strict=True):
        assert before == after or 0x80 <= ord(before) <= 0x9F


def test_friends_votes_are_in_the_order_of_the_digits(fixtures):
    row = by_uid(fixtures, "friends", "train")["train/1/1"]
    assert dict(zip(friends.VOTES, row.votes, strict=True))["surprise"] == 4
    assert row.label == "surprise"


def test_friends_non_neutral_is_kept_raw(fixtures):
    assert by_uid(fixtures, "friends", "train")["train/0/4"].label == "non-neutral"


@pytest.mark.parametrize("shape", ["object", "objects", "both"])
def test_friends_wrapped_emotionx_files_read_like_plain_ones(root, shape):
    plain = read(root, "friends", "dev")
    path = root / "friends/friends_dev.json"
    dialogues = json.loads(path.read_text())
    if shape != "object":
        dialogues = [{"id": n, "utterances": lines} for n, lines in enumerate(dialogues)]
    if shape != "objects":
        dialogues = {"name": "eval", "dialogues": dialogues}
    path.write_text(json.dumps(dialogues))
    assert read(root, "friends", "dev") == plain


def test_friends_unknown_emotion_is_named_with_its_place(root):
    edit(root / "friends/friends_dev.json", '"fear"', '"feer"')
    with pytest.raises(DatasetError, match=r"friends_dev.json: dialogue 0, turn 2: found 'feer'"):
        datasets.load("friends", root)


def test_friends_vote_digits_must_be_seven(root):
    edit(root / "friends/friends_dev.json", '"1003010"', '"100301"')
    with pytest.raises(DatasetError, match="vote digits"):
        datasets.load("friends", root)


# Mastodon


def test_mastodon_index_zero_starts_a_dialogue(fixtures):
    rows = read(fixtures, "mastodon", "train")
    assert [row.dialogue for row in rows[:4]] == ["train/0"] * 3 + ["train/1"]
    assert [row.turn for row in rows[:4]] == [0, 1, 2, 0]


def test_mastodon_star_is_neutral_and_raw_signs_stay(fixtures):
    assert {row.label for row in read(fixtures, "mastodon", "test")} == {"+", "-", "*"}


def test_mastodon_native_wording_wins_over_json(root):
    assert any("@anon" in row.text for row in read(root, "mastodon", "train"))
    shutil.rmtree(root / "mastodon/native")
    parts = datasets.load("mastodon", root)
    assert set(parts) == {"train", "dev", "test"}
    texts = [text for part in parts.values() for text in part["text"]]
    assert any("<user>" in text for text in texts)


def test_mastodon_skipped_index_is_an_error(root):
    edit(root / "mastodon/native/datatestJoint.txt", "2 +_T", "3 +_T")
    with pytest.raises(DatasetError, match="line 3"):
        datasets.load("mastodon", root)


# MOSI and CH-SIMS


def test_mosi_ids_stay_text(fixtures):
    rows = by_uid(fixtures, "mosi", "train")
    assert {row.dialogue for row in rows.values()} == {"-aB3xYz", "0071234"}
    assert "-aB3xYz/10" in rows


def test_mosi_clips_are_ordered_by_number_not_by_text(fixtures):
    turns = [r.turn for r in read(fixtures, "mosi", "train") if r.dialogue == "-aB3xYz"]
    assert turns == [1, 2, 10, 11]


def test_mosi_scores_are_not_rounded(fixtures):
    assert by_uid(fixtures, "mosi", "train")["-aB3xYz/2"].score == -0.333333


def test_mosi_cells_with_commas_survive(fixtures):
    assert by_uid(fixtures, "mosi", "test")["Qr-2/2"].text == "I LAUGHED A LOT, REALLY"


def test_ch_sims_clip_ids_keep_their_zeros(fixtures):
    assert "video_0001/0003" in by_uid(fixtures, "ch_sims", "train")


def test_ch_sims_repeated_texts_with_other_scores_are_kept(fixtures):
    scores = [r.score for r in read(fixtures, "ch_sims", "train") if r.text == "嗯，还可以"]
    assert scores == [0.2, -0.2]


@pytest.mark.parametrize("name", ["mosi", "ch_sims"])
def test_label_csv_without_a_header_reads_the_same(root, name):
    headed = {part: read(root, name, part) for part in ("train", "dev", "test")}
    path = root / name / "label.csv"
    path.write_text(path.read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
    assert {part: read(root, name, part) for part in ("train", "dev", "test")} == headed


def test_label_csv_with_columns_in_another_order_reads_the_same(root):
    before = read(root, "mosi", "dev")
    path = root / "mosi/label.csv"
    with path.open(newline="") as stream:
        rows = [row[::-1] for row in csv.reader(stream)]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    assert read(root, "mosi", "dev") == before


def test_label_csv_with_filled_modality_labels_reads_the_same(root):
    before = read(root, "ch_sims", "dev")
    edit(root / "ch_sims/label.csv", ",,,,", ",0.2,0.0,-0.4,")
    assert read(root, "ch_sims", "dev") == before


@pytest.mark.parametrize("value", ["", "nan", "high", "1.2", "-3"])
def test_ch_sims_score_out_of_range_is_named_by_its_row(root, value):
    edit(root / "ch_sims/label.csv", ",0.8,", f",{value},")
    with pytest.raises(DatasetError, match=r"label.csv: row 2: found .* from -1 to 1"):
        datasets.load("ch_sims", root)


def test_label_csv_with_an_unknown_mode_is_an_error(root):
    edit(root / "mosi/label.csv", ",valid\n", ",validation\n")
    with pytest.raises(DatasetError, match="train, valid, test"):
        datasets.load("mosi", root)


# M3ED


def test_m3ed_number_gaps_and_disorder_stay_in_the_uid_and_turns_are_places(fixtures):
    rows = [r for r in read(fixtures, "m3ed", "train") if r.dialogue == "chuntian_2"]
    assert [row.uid.rsplit("_", 1)[1] for row in rows] == ["1", "2", "9", "3"]
    assert [row.turn for row in rows] == [0, 1, 2, 3]


def test_m3ed_utterance_without_a_speaker_is_kept(fixtures):
    assert by_uid(fixtures, "m3ed", "train")["chuntian_1_6"].speaker is None


def test_m3ed_last_series_of_a_list_without_final_newline_is_read(fixtures):
    lists = (fixtures / "m3ed/splitInfo/movie_list_train.txt").read_bytes()
    assert not lists.endswith(b"\n")
    assert {r.dialogue for r in read(fixtures, "m3ed", "train")} >= {"chuntian_1", "xiatian_1"}


def test_m3ed_annotators_become_votes_also_where_one_names_two(fixtures):
    row = by_uid(fixtures, "m3ed", "train")["chuntian_2_9"]
    votes = dict(zip(m3ed.LABELS, row.votes, strict=True))
    assert votes["Sad"] == 2
    assert votes["Anger"] == votes["Neutral"] == 1


def test_m3ed_reconstructed_file_reads_the_same_without_votes(root):
    import dataclasses

    full = read(root, "m3ed", "test")
    (root / "m3ed/annotation.json").unlink()
    assert read(root, "m3ed", "test") == [dataclasses.replace(row, votes=None) for row in full]


def test_m3ed_series_without_annotation_is_named(root):
    (root / "m3ed/splitInfo/movie_list_val.txt").write_text("qiutian\nshangtian")
    with pytest.raises(DatasetError, match=r"movie_list_val.txt: a series: found 'shangtian'"):
        datasets.load("m3ed", root)


# MELD


def test_meld_uid_carries_the_split_because_dialogue_numbers_restart(fixtures):
    parts = datasets.load("meld", fixtures)
    assert parts["train"][0]["uid"] == "train/0/0"
    assert parts["dev"][0]["uid"] == "dev/0/0"


def test_meld_has_crlf_and_typographic_quotes(fixtures):
    raw = (fixtures / "meld/train_sent_emo.csv").read_bytes()
    assert b"\r\n" in raw
    assert by_uid(fixtures, "meld", "train")["train/0/1"].text == (
        "You\u2019re kidding, that\u2019s wonderful!"
    )


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8-sig"])
def test_meld_copies_in_other_encodings_read_the_same(root, encoding):
    before = read(root, "meld", "train")
    path = root / "meld/train_sent_emo.csv"
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    assert read(root, "meld", "train") == before


# TweetEval


def test_tweeteval_keeps_user_entities_and_literal_newlines_and_drops_the_last_space(fixtures):
    rows = by_uid(fixtures, "tweeteval_emotion", "train")
    assert rows["train/1"].text == "Who let the @user dog out AGAIN #furious"
    assert rows["train/3"].text == "one page a day &amp; the book gets done"
    assert rows["train/4"].text == "line one\\nline two, both grey"


def test_tweeteval_line_separators_inside_a_tweet_do_not_shift_the_labels(fixtures):
    row = by_uid(fixtures, "tweeteval_emotion", "train")["train/6"]
    assert "\u2028" in row.text
    assert row.label == "joy"


def test_tweeteval_mapping_has_no_final_newline_and_is_checked(root):
    path = root / "tweeteval_emotion/mapping.txt"
    assert not path.read_bytes().endswith(b"\n")
    edit(path, "1\tjoy", "1\tlove")
    with pytest.raises(DatasetError, match=r"mapping.txt: line 2"):
        datasets.load("tweeteval_emotion", root)


def test_tweeteval_works_without_the_mapping(root):
    before = read(root, "tweeteval_emotion", "test")
    (root / "tweeteval_emotion/mapping.txt").unlink()
    assert read(root, "tweeteval_emotion", "test") == before


def test_tweeteval_texts_and_labels_of_unequal_number_are_an_error(root):
    path = root / "tweeteval_emotion/val_labels.txt"
    path.write_text("0\n1\n2\n")
    with pytest.raises(DatasetError, match="3 labels"):
        datasets.load("tweeteval_emotion", root)


# IEMOCAP


def test_iemocap_speaker_comes_from_the_end_of_the_name(fixtures):
    rows = by_uid(fixtures, "iemocap", "all")
    assert rows["Ses01F_impro01_M000"].speaker == "Ses01M"
    assert rows["Ses01F_impro01_F000"].speaker == "Ses01F"


def test_iemocap_turns_follow_the_clock_not_the_file(fixtures):
    rows = [r for r in read(fixtures, "iemocap", "all") if r.dialogue == "Ses01F_impro01"]
    assert [row.speaker[-1] for row in rows] == list("MFMFMFM")


def test_iemocap_crosstalk_and_stage_directions_are_no_utterances(fixtures):
    assert not any("MXX" in row.uid for row in read(fixtures, "iemocap", "all"))


def test_iemocap_no_agreement_is_kept_raw_and_stays_in_histories(fixtures):
    assert "xxx" in {row.label for row in read(fixtures, "iemocap", "all")}


def test_iemocap_copy_without_sound_has_text_only(root):
    shutil.rmtree(root / "iemocap/Session1/sentences")
    rows = by_uid(root, "iemocap", "all")
    assert rows["Ses01F_impro01_M000"].audio is None
    assert rows["Ses02M_impro01_M003"].audio is None
    assert rows["Ses02M_impro01_M000"].audio.endswith(
        "Session2/sentences/wav/Ses02M_impro01/Ses02M_impro01_M000.wav"
    )


def test_iemocap_files_that_macos_leaves_are_ignored(root):
    before = read(root, "iemocap", "all")
    folder = root / "iemocap/Session1/dialog/EmoEvaluation"
    (folder / "._Ses01F_impro01.txt").write_bytes(b"\x00\x05\x16\x07")
    assert read(root, "iemocap", "all") == before


def test_iemocap_turn_without_words_is_named(root):
    path = root / "iemocap/Session1/dialog/transcriptions/Ses01F_impro01.txt"
    edit(path, "Ses01F_impro01_F001", "Ses01F_impro01_F009")
    with pytest.raises(DatasetError, match="Ses01F_impro01_F001"):
        datasets.load("iemocap", root)


# EMO-DB


def test_emodb_name_is_speaker_sentence_and_letter(fixtures):
    row = by_uid(fixtures, "emodb", "all")["03a01Wa"]
    assert (row.speaker, row.text, row.label) == ("03", "a01", "W")


def test_emodb_file_of_another_name_is_an_error(root):
    (root / "emodb/wav/take2.wav").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"take2.wav"):
        datasets.load("emodb", root)


# VADER


def test_vader_uid_and_dialogue_keep_the_source(fixtures):
    rows = by_uid(fixtures, "vader", "all")
    assert rows["tweets/1"].dialogue is None
    assert rows["products/1_3"].dialogue == "products/1"
    assert rows["products/1_3"].turn == 3
    assert rows["newspaper/1_1"].dialogue == "newspaper/1"


def test_vader_votes_of_another_mean_are_not_joined(fixtures):
    rows = by_uid(fixtures, "vader", "all")
    assert len(rows["tweets/1"].votes) == 20
    assert rows["tweets/2"].votes is None


def test_vader_byte_order_mark_does_not_hide_the_first_votes(fixtures):
    assert (fixtures / "vader/amazonReviewSnippets_anonDataRatings.txt").read_bytes()[:3] == (
        b"\xef\xbb\xbf"
    )
    assert by_uid(fixtures, "vader", "all")["products/1_1"].votes is not None


def test_vader_reads_without_the_single_ratings(root):
    for path in (root / "vader").glob("*Ratings.txt"):
        path.unlink()
    assert all(row.votes is None for row in read(root, "vader", "all"))
