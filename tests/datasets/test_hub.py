"""Hugging Face datasets instead of native files, on local folders with the hub's columns."""

import datasets as hf
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from llm_emo import datasets, protocols
from llm_emo.errors import DatasetError, JobFailed

TWEETS = Features(
    {
        "text": Value("string"),
        "label": ClassLabel(names=["anger", "joy", "optimism", "sadness"]),
    }
)
SST = Features(
    {
        "sentence": Value("string"),
        "label": Value("float32"),
        "tokens": Value("string"),
        "tree": Value("string"),
    }
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what load_dataset caches out of the user's folders."""
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


def parquet(folder, splits, features):
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def tweets(folder):
    columns = {"text": ["so angry ", "a good day &amp; night "], "label": [0, 1]}
    return parquet(folder, {"train": columns, "validation": columns, "test": columns}, TWEETS)


def sentiment(folder):
    columns = {
        "sentence": ["A -LRB- dull -RRB- film .", "A fiancÃ© I liked .", "Fine .", "So so ."],
        "label": [0.2, 0.9, 0.8, 0.4],
        "tokens": ["", "", "", ""],
        "tree": ["", "", "", ""],
    }
    return parquet(folder, {"train": columns, "validation": columns, "test": columns}, SST)


def rows_of(name, hub, split, **options):
    return datasets.utterances(datasets.load(name, None, hub=hub, **options)[split])


def test_tweeteval_class_ids_become_names(tmp_path):
    rows = rows_of("tweeteval_emotion", tweets(tmp_path / "d"), "dev")
    assert [row.label for row in rows] == ["anger", "joy"]
    assert rows[1].text == "a good day &amp; night"
    assert rows[1].uid == "dev/2"


def test_tweeteval_config_is_taken_from_a_folder_that_has_configs(tmp_path):
    tweets(tmp_path / "d" / "emotion")
    parquet(
        tmp_path / "d" / "irony",
        {"train": {"text": ["x"], "label": [1]}},
        Features({"text": Value("string"), "label": ClassLabel(names=["no", "irony"])}),
    )
    (tmp_path / "d" / "README.md").write_text(
        "---\nconfigs:\n- config_name: irony\n  data_files: irony/*.parquet\n"
        "- config_name: emotion\n  data_files:\n"
        "  - {split: train, path: emotion/train.parquet}\n"
        "  - {split: validation, path: emotion/validation.parquet}\n---\n"
    )
    assert [row.label for row in rows_of("tweeteval_emotion", str(tmp_path / "d"), "train")] == [
        "anger",
        "joy",
    ]


def test_tweeteval_of_another_task_is_refused(tmp_path):
    other = Features({"text": Value("string"), "label": ClassLabel(names=["no", "irony"])})
    folder = parquet(tmp_path / "d", {"train": {"text": ["x"], "label": [1]}}, other)
    with pytest.raises(DatasetError, match="config 'emotion'"):
        datasets.load("tweeteval_emotion", None, hub=folder)


def test_sst_float32_values_fall_into_the_trees_classes(tmp_path):
    rows = rows_of("sst", sentiment(tmp_path / "d"), "train")
    assert [row.label for row in rows] == ["0", "4", "3", "1"]
    assert rows[0].text == "A ( dull ) film ."
    assert rows[1].text == "A fiancé I liked ."


def test_protocols_take_hub_rows_like_native_ones(tmp_path):
    loaded = datasets.read("sst", None, hub=sentiment(tmp_path / "d"))
    splits = protocols.rows(protocols.get("sst2-ascii"), loaded, seed=0)
    assert splits.record["rows"] == {"train": 4, "dev": 4, "test": 3}


@pytest.mark.parametrize("hub", ["nyu-mll/glue@main", "stanfordnlp/sst2@main", "SetFit/sst-2@x"])
def test_glue_sst2_is_refused_by_name_before_anything_is_fetched(hub):
    with pytest.raises(DatasetError, match=r"another set.*stanfordnlp/sst"):
        datasets.load("sst", None, hub=hub)


def test_glue_sst2_is_refused_by_its_columns(tmp_path):
    glue = Features(
        {
            "sentence": Value("string"),
            "label": ClassLabel(names=["negative", "positive"]),
            "idx": Value("int32"),
        }
    )
    columns = {"sentence": ["a phrase"], "label": [1], "idx": [0]}
    folder = parquet(tmp_path / "films", {"train": columns, "validation": columns}, glue)
    with pytest.raises(DatasetError, match="GLUE's SST-2"):
        datasets.load("sst", None, hub=folder)


def test_meld_columns_of_the_csv_read_like_the_csv(tmp_path, fixtures):
    import csv

    splits = {}
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        with (fixtures / f"meld/{name}_sent_emo.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        splits[split] = {key: [row[key] for row in rows] for key in rows[0]}
        splits[split]["Dialogue_ID"] = [int(n) for n in splits[split]["Dialogue_ID"]]
    folder = parquet(tmp_path / "d", splits, None)
    native = datasets.load("meld", fixtures)
    loaded = datasets.load("meld", None, hub=folder)
    for split in ("train", "dev", "test"):
        assert datasets.utterances(loaded[split]) == datasets.utterances(native[split])


def test_friends_lines_with_dialogue_ids_read_like_the_json(tmp_path, fixtures):
    native = datasets.utterances(datasets.load("friends", fixtures)["train"])
    columns = {
        "dialogue_id": [row.dialogue.split("/")[1] for row in native],
        "speaker": [row.speaker for row in native],
        "utterance": [row.text for row in native],
        "emotion": [row.label for row in native],
        "annotation": ["".join(map(str, row.votes)) for row in native],
    }
    folder = parquet(tmp_path / "d", {"train": columns}, None)
    assert rows_of("friends", folder, "train") == native


def test_folder_of_save_to_disk_is_read(tmp_path):
    columns = {"text": ["grim", "glad"], "label": [3, 1]}
    table = Dataset.from_dict(columns, features=TWEETS)
    DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "d")
    rows = rows_of("tweeteval_emotion", str(tmp_path / "d"), "train")
    assert [row.label for row in rows] == ["sadness", "joy"]


def test_lost_column_is_named_with_those_there(tmp_path):
    folder = parquet(tmp_path / "d", {"train": {"tweet": ["x"], "label": [1]}}, None)
    with pytest.raises(DatasetError, match=r"no column 'text' \(there: tweet, label\)"):
        datasets.load("tweeteval_emotion", None, hub=folder)


def test_split_that_is_asked_for_and_absent_is_an_error(tmp_path):
    columns = {"text": ["x"], "label": [1]}
    folder = parquet(tmp_path / "d", {"train": columns}, TWEETS)
    assert set(datasets.load("tweeteval_emotion", None, hub=folder)) == {"train"}
    with pytest.raises(DatasetError, match="no test split"):
        datasets.load("tweeteval_emotion", None, hub=folder, splits=["test"])


def test_hub_id_without_a_revision_is_refused():
    with pytest.raises(DatasetError, match="revision"):
        datasets.load("tweeteval_emotion", None, hub="cardiffnlp/tweet_eval")


@pytest.mark.parametrize(
    ("hub", "config", "folder", "revision"),
    [
        ("cardiffnlp/tweet_eval@b3a375b", "emotion", None, "b3a375b"),
        ("cardiffnlp/tweet_eval@refs/convert/parquet", None, "emotion", "refs/convert/parquet"),
    ],
)
def test_hub_id_loads_its_config_at_the_revision(
    tmp_path, monkeypatch, hub, config, folder, revision
):
    loaded = hf.load_dataset(tweets(tmp_path / "d"))
    asked = []

    def load_dataset(name, config=None, data_dir=None, revision=None):
        asked.append((name, config, data_dir, revision))
        return loaded

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    assert rows_of("tweeteval_emotion", hub, "test")[0].label == "anger"
    assert asked == [("cardiffnlp/tweet_eval", config, folder, revision)]


def test_hub_out_of_reach_says_what_to_do(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hf, "load_dataset", load_dataset)
    with pytest.raises(JobFailed, match="cannot be reached"):
        datasets.load("meld", None, hub="someone/MELD@1234567")


def test_corpus_without_a_hub_form_says_so():
    with pytest.raises(DatasetError, match="no Hugging Face form"):
        datasets.load("mosi", None, hub="someone/mosi@main")
