import re
from pathlib import Path

import program
import pytest

from llm_emo import prompts, recipes
from llm_emo.errors import DatasetError, ProtocolError, RecipeError
from llm_emo.experiment import Experiment, data_root


def prepare(name, *overrides, root=program.FIXTURES):
    return Experiment.prepare(recipes.load(name, overrides), root)


def uids(experiment, split):
    return [row.utterance.uid for row in experiment.rows(split)]


def test_the_data_root_given_beats_the_one_in_the_environment(monkeypatch):
    monkeypatch.delenv("LLM_EMO_DATA", raising=False)
    assert data_root(None) is None
    monkeypatch.setenv("LLM_EMO_DATA", "/there")
    assert data_root(None) == Path("/there")
    assert data_root(Path("/here")) == Path("/here")
    assert data_root(Path("~/corpora")) == Path.home() / "corpora"


LLMS = [name for name in recipes.names() if isinstance(recipes.load(name), recipes.Recipe)]


@pytest.mark.parametrize("name", [name for name in LLMS if "chatglm2" not in name])
def test_every_shipped_recipe_renders_its_rows(name):
    experiment = prepare(name)
    for split in ("train", "dev"):
        examples = experiment.examples(split)
        assert len(examples) == len(experiment.rows(split)) > 0
        assert all(example.answer in experiment.answers for example in examples)
    assert len(experiment.answers) == len(experiment.labels.names)
    assert experiment.files


def test_a_cap_keeps_rows_of_the_split_in_its_order_and_depends_on_the_seed_alone():
    whole = uids(prepare("friends/lora", "data.protocol=friends8"), "train")
    seeds = []
    for seed in range(6):
        capped = ["data.protocol=friends8", "data.limit={train: 3}", f"seed={seed}"]
        kept = uids(prepare("friends/lora", *capped), "train")
        assert kept == uids(prepare("friends/lora", *capped), "train")
        assert kept == [uid for uid in whole if uid in kept]
        assert len(kept) == 3
        seeds.append(tuple(kept))
    assert len(set(seeds)) > 1


def test_a_cap_above_the_number_of_rows_changes_nothing():
    whole = prepare("friends/lora")
    capped = prepare("friends/lora", "data.limit={train: 1000}")
    assert uids(whole, "train") == uids(capped, "train")
    assert uids(whole, "test") == uids(capped, "test")


def test_train_dev_and_test_share_no_row_and_no_dialogue():
    for name in ("mastodon/lora", "iemocap/lora", "friends/lora", "vader/lora"):
        experiment = prepare(name)
        train, dev, test = (
            {experiment.clusters[uid] for uid in uids(experiment, split)}
            for split in ("train", "dev", "test")
        )
        assert train.isdisjoint(dev)
        assert test.isdisjoint(train | dev)


def test_a_protocol_of_another_corpus_is_refused():
    recipe = recipes.load("mastodon/lora")
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dataset": "sst"})})
    with pytest.raises(ProtocolError, match=r"mastodon3 .*not of sst .*sst2"):
        Experiment.prepare(other, program.FIXTURES)


def test_a_corpus_that_is_absent_says_where_to_get_it(tmp_path):
    with pytest.raises(DatasetError, match=r"nlp\.stanford\.edu"):
        prepare("sst2/lora", root=tmp_path)


def test_labels_json_holds_what_the_answers_are_parsed_with():
    content = prepare("m3ed/lora").labels_json()
    assert content["language"] == "zh"
    assert len(content["names"]) == len(content["words"]) == len(content["answers"]) == 7
    assert set(content["aliases"].values()) <= set(content["names"])


def test_a_window_of_null_is_the_prompt_files_own_and_must_be_written_down(tmp_path):
    def longest(*changes):
        experiment = prepare("friends/lora_dialogue", *changes)
        return max(len(example.history) for example in experiment.examples("train"))

    shipped = prompts.load("dialogue").verbatim
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.replace("window: null", "window: 1"), "utf-8")
    assert longest("prompt.history_window=null") > 2  # the whole dialogue
    assert longest("prompt.history_window=2") == 2
    assert longest(f"prompt.name={mine}", "prompt.history_window=null") == 1
    assert longest(f"prompt.name={mine}", "prompt.history_window=2") == 2
    source = recipes.source("friends/lora_dialogue").read_text("utf-8")
    (tmp_path / "r.yaml").write_text(re.sub(r"\n *history_window:.*", "", source), "utf-8")
    with pytest.raises(RecipeError, match=r"missing key 'prompt\.history_window'"):
        recipes.load(str(tmp_path / "r.yaml"))
