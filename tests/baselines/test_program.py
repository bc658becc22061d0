"""Specialised models through the verbs: trained, resumed, measured, exported as LLMs are."""

import json
import shutil

import program
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from llm_emo import predictions, workflow
from llm_emo.baselines import exported
from llm_emo.errors import ModelError
from llm_emo.experiment import BaselineExperiment

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz",
         *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"))  # fmt: skip


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """An encoder of random weights, as a folder."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vectors(tmp_path_factory):
    """Word vectors of a few common words, as GloVe writes them."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    generator = torch.Generator().manual_seed(0)
    words = ("the", "a", "i", "is", "so", "my", "to", "it", "you", "and")
    lines = (
        " ".join([word, *(f"{x:.4f}" for x in torch.randn(8, generator=generator).tolist())])
        for word in words
    )
    path.write_text("\n".join(lines) + "\n")
    return path


QUICK = (
    "train.epochs=2",
    "data.dev_fraction=0.3",
    "train.batch_size=4",
    "train.micro_batch_size=4",
)


@pytest.fixture
def settings(bert, vectors):
    """What puts a shipped recipe of each kind on the fixtures."""
    return {
        "mastodon/majority": ("data.dev_fraction=0.3",),
        "mastodon/linear": ("data.dev_fraction=0.3",),
        "mastodon/text_cnn": (*QUICK, f"method.vectors={vectors}"),
        "mastodon/encoder": (*QUICK, f"method.name={bert}", "method.head.max_length=32"),
    }


KINDS = ["mastodon/majority", "mastodon/linear", "mastodon/text_cnn", "mastodon/encoder"]
TRAINED = KINDS[2:]
each_kind = pytest.mark.parametrize("recipe", KINDS)
each_trained = pytest.mark.parametrize("recipe", TRAINED)


def train(folder, recipe, changes, *options):
    return program.call(
        "train", recipe, "-o", folder, "--data-root", program.FIXTURES,
        *program.settings(*changes), *options,
    )  # fmt: skip


def rows(folder, split="test"):
    return predictions.read(folder / f"{split}.predictions.jsonl")


def test_check_counts_the_texts_of_every_row_that_lose_their_end(settings):
    changes = (*settings["mastodon/encoder"], "method.head.max_length=6")
    checked = program.call(
        "check", "mastodon/encoder", "--data-root", program.FIXTURES,
        *program.settings(*changes), "--json",
    )  # fmt: skip
    found = json.loads(checked.ok().out)
    assert found["facts"]["texts_cut"] == {
        split: values["rows"] for split, values in found["splits"].items()
    }


@each_kind
def test_a_run_is_trained_measured_and_exported_with_the_same_verbs(recipe, settings, tmp_path):
    told = json.loads(train(tmp_path / "run", recipe, settings[recipe], "--json").ok().out)
    assert told["trainable_parameters"] > 0
    assert told["seconds_per_epoch"] > 0
    assert told["peak_memory_bytes"] > 2**20
    checked = program.call(
        "check", recipe, "--data-root", program.FIXTURES, *program.settings(*settings[recipe]),
        "--json",
    )  # fmt: skip
    facts = json.loads(checked.ok().out)["facts"]
    assert facts["parameters"] >= told["trainable_parameters"]
    report = json.loads(program.call("evaluate", tmp_path / "run", "--json").ok().out)
    header, found = rows(tmp_path / "run")
    assert header.mode == "classify"
    assert header.model == recipe.partition("/")[2]
    assert report["n"] == len(found) == 7
    assert {row.outcome for row in found} == {"scored"}
    for row in found:
        assert sum(row.probabilities.values()) == pytest.approx(1)
        assert row.probabilities[row.label] == max(row.probabilities.values())
    again = json.loads(
        program.call("evaluate", tmp_path / "run/test.predictions.jsonl", "--json").ok().out
    )
    assert again["accuracy"] == report["accuracy"]
    program.call("export", tmp_path / "run", "-o", tmp_path / "out").ok()
    shutil.rmtree(tmp_path / "run" / "adapter")  # the export stands by itself
    experiment = BaselineExperiment.prepare(
        workflow.runs.Run(tmp_path / "run").recipe, program.FIXTURES
    )
    texts = [row.utterance.text for row in experiment.rows("test")]
    labelled = exported.load(tmp_path / "out").label(texts)
    by_uid = {row.uid: row for row in found}
    for row, told in zip(experiment.rows("test"), labelled, strict=True):
        assert told.label == by_uid[row.utterance.uid].label
        assert told.probabilities == pytest.approx(dict(by_uid[row.utterance.uid].probabilities))


@each_trained
def test_a_resumed_run_equals_the_uninterrupted_one(recipe, settings, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, recipe, settings[recipe]).ok()
    with program.interrupted():
        train(broken, recipe, settings[recipe]).refused("--resume", code=130)
    program.call("train", broken / "recipe.yaml", "-o", broken, "--resume").ok()
    for folder in (whole, broken):
        program.call("predict", folder).ok()
    assert rows(whole)[1] == rows(broken)[1]


@each_trained
def test_a_seed_gives_the_same_run_twice_and_another_one_another(recipe, settings, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, recipe, [*settings[recipe], f"seed={seed}"]).ok()
        program.call("predict", tmp_path / name).ok()
    found = {name: rows(tmp_path / name)[1] for name in "abc"}
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]


@each_trained
@pytest.mark.parametrize(
    "option",
    ["{kind: class_weights, strength: 1.0}", "{kind: focal, gamma: 2.0}",
     "{kind: logit_adjustment, tau: 1.0}", "{kind: resampling, strength: 1.0}"],
)  # fmt: skip
def test_every_remedy_for_rare_classes_changes_what_is_learned(recipe, option, settings, tmp_path):
    for name, changes in (("plain", []), ("remedied", [f"train.imbalance={option}"])):
        train(tmp_path / name, recipe, [*settings[recipe], *changes]).ok()
        program.call("predict", tmp_path / name).ok()
    assert rows(tmp_path / "plain")[1] != rows(tmp_path / "remedied")[1]


def test_the_dialogue_network_builds_on_a_finished_run_and_stands_without_it(settings, tmp_path):
    below, above = tmp_path / "below", tmp_path / "above"
    small = ("method.network.reduced=8", "method.network.units=4", "method.network.head=8")
    changes = (*QUICK, f"method.encoder_run={below}", *small)
    train(above, "mastodon/roberta_cnn_lstm", changes).refused("below", "train it first")
    train(below, "mastodon/encoder", settings["mastodon/encoder"]).ok()
    train(above, "mastodon/roberta_cnn_lstm", [*changes, "seed=1"]).refused("below", "seed")
    assert not above.exists()
    train(above, "mastodon/roberta_cnn_lstm", changes).ok()
    program.call("evaluate", above).ok()
    shutil.rmtree(below)
    program.call("predict", above, "-o", tmp_path / "again").ok()
    assert rows(above)[1] == rows(tmp_path / "again")[1]
    program.call("export", above, "-o", tmp_path / "out").ok()
    turns = exported.load(tmp_path / "out").label(["so sad", "oh no", "why"], dialogue=True)
    alone = exported.load(tmp_path / "out").label(["so sad", "oh no", "why"])
    assert len(turns) == 3
    assert turns != alone, "a dialogue is read as one"


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["show", "mastodon/linear"], ["show", "linear", "check"]),
        (["plan", "mastodon/linear"], ["plan", "linear", "check"]),
        (["evaluate", "mastodon/linear"], ["linear must be trained first"]),
        (["evaluate", "mastodon/linear", "--mode", "score"], ["--mode", "specialised"]),
        (["train", "mastodon/text_cnn", "--set", "train.batch_by=dialogue"], ["batch_by", "LLM"]),
        (["train", "mastodon/text_cnn", "--set", "train.gradient_checkpointing=true"],
         ["gradient_checkpointing", "LLM"]),
        (["check", "mastodon/text_cnn", "--set", "method.network.sizes=[0]"], ["sizes"]),
        (["check", "mastodon/text_cnn", "--set", "method.network.size=[3]"],
         ["did you mean 'sizes'"]),
        (["check", "mastodon/text_cnn", "--set", "method.vectors=nowhere.txt"], ["nowhere.txt"]),
        (["check", "mastodon/encoder", "--set", "method.name=nowhere"], ["nowhere"]),
        (["check", "mastodon/linear", "--set", "method={kind: text_cn}"], ["text_cnn"]),
        (["check", "mastodon/encoder", "--set", "method.name=a/b", "--set", "method.revision=main"],
         ["'method.revision': 'main' moves"]),
        (["check", "mastodon/encoder", "--set", "method.revision=v1"],
         ["'method.revision': belongs to a Hugging Face id", "'method.name' is 'minilm-l6'"]),
        (["check", "iemocap/speech_encoder", "--set", "method.name=/some/folder"],
         ["'method.revision': belongs to a Hugging Face id", "'method.name' is '/some/folder'"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_message(arguments, pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program.call(*arguments, "--data-root", program.FIXTURES).refused(*pieces)
    assert not list(tmp_path.iterdir())


def test_a_specialised_run_has_one_export_of_its_own(settings, tmp_path):
    train(tmp_path / "run", "mastodon/linear", settings["mastodon/linear"]).ok()
    told = program.call("export", tmp_path / "run", "-o", tmp_path / "out", "--format", "merged")
    told.refused("--format", "specialised")
    program.call("export", tmp_path / "run", "-o", tmp_path / "out").ok()
    (tmp_path / "out" / "recipe.json").write_text("{}")
    with pytest.raises(ModelError, match="no exported"):
        exported.load(tmp_path / "out")
