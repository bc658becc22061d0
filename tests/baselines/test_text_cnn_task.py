"""The convolution over word vectors as a recipe trains it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_emo import recipes
from llm_emo.baselines import text_cnn_task, vectors
from llm_emo.baselines.text_cnn_task import TextCnnClassifier, create, load
from llm_emo.baselines.tweets import words
from llm_emo.errors import ModelError, ProtocolError
from llm_emo.experiment import BaselineExperiment
from llm_emo.types import Row, Utterance

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def vector_file(tmp_path):
    """Vectors of four words of the fixture, and of one that only its dev texts have."""
    path = tmp_path / "vectors.txt"
    lines = [("dog", 1), ("bike", 2), ("book", 3), ("the", 4), ("pancakes", 5)]
    path.write_text("".join(f"{word} {number}.5 -{number} 0.25\n" for word, number in lines))
    return path


@pytest.fixture
def experiment(vector_file):
    def experiment(*overrides):
        settings = [f"method.vectors={vector_file}", "method.network.filters=6", *overrides]
        recipe = recipes.load("tweeteval/text_cnn", settings)
        return BaselineExperiment.prepare(recipe, FIXTURES)

    return experiment


def made(experiment, seed=0):
    torch.manual_seed(seed)
    return create(experiment.recipe.method, experiment)


def row(text, gold="joy", uid="row-1"):
    return Row(Utterance(uid, text, label=gold), gold)


def probabilities(classifier, rows):
    return list(classifier.probabilities(rows, "dev"))


def texts(experiment, split):
    return [words(row.utterance.text) for row in experiment.rows(split)]


# --- the vocabulary -------------------------------------------------------------------------------


def test_the_vocabulary_is_the_words_of_the_training_rows_alone(experiment):
    prepared = experiment()
    found = set(made(prepared).vocabulary.words)
    assert found == {word for text in texts(prepared, "train") for word in text}
    for split in ("dev", "test"):
        assert {word for text in texts(prepared, split) for word in text} - found, "some are new"


def test_a_word_of_dev_is_unknown_even_where_the_vectors_have_it(experiment):
    prepared = experiment()
    classifier = made(prepared)
    assert "pancakes" in {word for text in texts(prepared, "dev") for word in text}
    [item] = classifier.items([row("pancakes the")], "dev", augmented=False)
    assert item.inputs == [vectors.UNKNOWN, *classifier.vocabulary.encode(["the"])]


def test_a_cap_on_the_training_rows_caps_the_vocabulary(experiment):
    few = experiment("data.limit={train: 2}")
    assert set(made(few).vocabulary.words) == {
        word for text in texts(few, "train") for word in text
    }


def test_rare_words_are_left_out_as_the_recipe_says(experiment):
    common = made(experiment("method.min_count=2")).vocabulary.words
    assert 0 < len(common) < len(made(experiment()).vocabulary.words)
    with pytest.raises(ProtocolError, match=r"no word occurs 99 times in the \d+ training texts"):
        made(experiment("method.min_count=99"))


def test_the_facts_count_what_is_known(experiment):
    prepared = experiment()
    classifier = made(prepared)
    dev = [word for text in texts(prepared, "dev") for word in text]
    train = {word for text in texts(prepared, "train") for word in text}
    found = len(train & {"dog", "bike", "book", "the"})
    assert found > 1
    assert classifier.facts() == {
        "vocabulary": len(train),
        "vector_dimensions": 3,
        "vectors_found": found,
        "vectors_found_share": found / len(train),
        "unknown_dev_words_share": sum(word not in train for word in dev) / len(dev),
    }


# --- vectors --------------------------------------------------------------------------------------


def test_known_words_start_from_their_vectors_and_others_from_the_seed(experiment):
    one, again, other = made(experiment()), made(experiment()), made(experiment("seed=1"))
    table, spoken = one.model.embedding.weight, one.vocabulary.encode(["the"])
    assert table[spoken].tolist() == [[4.5, -4.0, 0.25]]
    assert torch.equal(table, again.model.embedding.weight)
    assert not torch.equal(table, other.model.embedding.weight)
    assert torch.equal(table[spoken], other.model.embedding.weight[spoken])


def test_named_vectors_are_asked_for_the_training_words_only(experiment, monkeypatch):
    asked = []

    def glove(wanted):
        asked.extend(wanted)
        return {"the": np.ones(50, np.float32)}

    monkeypatch.setattr(vectors, "glove", glove)
    classifier = made(experiment(f"method.vectors={vectors.NAMED}"))
    assert tuple(asked) == classifier.vocabulary.words
    assert classifier.model.embedding.embedding_dim == 50


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("glove-6b-500d", "did you mean 'glove-6b-50d'?"),
        ("nowhere/vectors.txt", "a text file of GloVe or word2vec"),
    ],
)
def test_vectors_that_are_not_there_are_named_with_what_would_do(experiment, name, said):
    with pytest.raises(ModelError) as caught:
        made(experiment(f"method.vectors={name}"))
    assert f"method.vectors: no file {name}; expected glove-6b-50d" in str(caught.value)
    assert said in str(caught.value)


def test_vectors_of_another_language_are_refused(experiment, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("Hund 1 2 3\n")
    with pytest.raises(ModelError, match=r"none of the \d+ words of the training texts"):
        made(experiment(f"method.vectors={path}"))


# --- scores ---------------------------------------------------------------------------------------


def test_a_row_becomes_an_item_with_its_class(experiment):
    prepared = experiment()
    rows = prepared.rows("train")
    items = made(prepared).items(rows, "train", augmented=True)
    assert [item.uids for item in items] == [(row.utterance.uid,) for row in rows]
    assert [prepared.labels.names[item.labels[0]] for item in items] == [row.gold for row in rows]


def test_a_text_has_the_same_scores_in_every_company(experiment):
    prepared = experiment()
    classifier, rows = made(prepared), prepared.rows("train")
    together = dict(probabilities(classifier, rows))
    for size in (1, 3):
        classifier.items_per_pass = size
        for uid, shares in probabilities(classifier, rows):
            assert shares == pytest.approx(together[uid], abs=1e-6)
    assert dict(probabilities(classifier, rows[::-1])) == {
        uid: pytest.approx(shares, abs=1e-6) for uid, shares in together.items()
    }


@pytest.mark.parametrize("text", ["", "123 !!", "zzz"])
def test_a_text_without_known_words_gets_probabilities(experiment, text):
    [(uid, shares)] = probabilities(made(experiment()), [row(text)])
    assert uid == "row-1"
    assert sum(shares) == pytest.approx(1)
    assert all(share > 0 for share in shares)


def test_features_and_probabilities_are_those_of_the_network(experiment):
    prepared = experiment("method.network.sizes=[2, 3]")
    classifier, rows = made(prepared), prepared.rows("dev")
    encoding = classifier.encode(rows, "dev")
    assert encoding.features.shape == (len(rows), 12)
    with torch.no_grad():
        again = classifier.model.output(encoding.features).softmax(1)
    assert torch.allclose(again, encoding.scores, atol=1e-6)
    wanted = [shares for _, shares in probabilities(classifier, rows)]
    assert torch.allclose(encoding.scores, torch.tensor(wanted), atol=1e-6)


def test_rows_that_no_class_belongs_to_have_features(experiment):
    encoding = made(experiment()).encode([row("the dog", gold="")], "dev")
    assert encoding.features.shape == (1, 6)


def test_encoding_many_rows_is_encoding_each(experiment, monkeypatch):
    prepared = experiment()
    classifier, rows = made(prepared), prepared.rows("train")
    whole = classifier.encode(rows, "train")
    monkeypatch.setattr(text_cnn_task, "_ROWS_PER_PASS", 3)
    parts = classifier.encode(rows, "train")
    assert torch.allclose(whole.features, parts.features, atol=1e-6)
    assert torch.allclose(whole.scores, parts.scores, atol=1e-6)


# --- on disk --------------------------------------------------------------------------------------


def test_saved_and_loaded_it_gives_the_same_bits_without_the_vectors(
    experiment, vector_file, tmp_path
):
    prepared = experiment("method.network.dropout=0.5")
    classifier = made(prepared)
    folder = tmp_path / "adapter"
    folder.mkdir()
    classifier.save(folder)
    vector_file.unlink()
    torch.manual_seed(9)
    again = load(prepared.recipe.method, prepared, folder)
    rows = prepared.rows("dev")
    assert probabilities(again, rows) == probabilities(classifier, rows)
    assert again.facts() == classifier.facts()
    assert isinstance(again, TextCnnClassifier)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "vocabulary.json",
    ]


@pytest.mark.parametrize("damage", ["absent", "cut", "no words"])
def test_a_damaged_vocabulary_is_one_message(experiment, tmp_path, damage):
    prepared = experiment()
    made(prepared).save(tmp_path)
    path = tmp_path / "vocabulary.json"
    match damage:
        case "absent":
            path.unlink()
        case "cut":
            path.write_text(path.read_text()[:20])
        case "no words":
            path.write_text(json.dumps({"dimensions": 3}))
    with pytest.raises(ModelError, match=r"vocabulary.json: the vocabulary cannot be read"):
        load(prepared.recipe.method, prepared, tmp_path)


def test_weights_of_another_vocabulary_are_refused(experiment, tmp_path):
    prepared = experiment()
    made(prepared).save(tmp_path)
    path = tmp_path / "vocabulary.json"
    rest = json.loads(path.read_text())
    path.write_text(json.dumps(rest | {"words": rest["words"][:-1]}))
    with pytest.raises(ModelError, match=r"embedding.weight has shape"):
        load(prepared.recipe.method, prepared, tmp_path)


# --- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_cnn_anger_joy", "text_cnn_anger_optimism", "text_cnn"])
def test_the_recipes_on_tweets_are_the_third_run_of_the_report(name):
    recipe = recipes.load(f"tweeteval/{name}")
    network, train = recipe.method.network, recipe.train
    assert (network.filters, network.sizes, network.stride, network.dropout) == (100, (3,), 1, 0)
    assert (train.optimizer, train.learning_rate, train.batch_size) == ("sgd_momentum", 0.01, 50)
    assert (
        recipe.data.protocol
        == {
            "text_cnn_anger_joy": "tweeteval-anger-joy",
            "text_cnn_anger_optimism": "tweeteval-anger-optimism",
            "text_cnn": "tweeteval4",
        }[name]
    )


@pytest.mark.parametrize("pair", [("anger", "joy"), ("anger", "optimism")])
def test_a_pair_holds_the_rows_of_its_two_classes_only(pair, shared_data):
    recipe = recipes.load(f"tweeteval/text_cnn_{'_'.join(pair)}")
    prepared = BaselineExperiment.prepare(recipe, shared_data)
    counts = {"anger": 1400, "joy": 708, "optimism": 294}  # of the published training split
    gold = [row.gold for row in prepared.rows("train")]
    assert {name: gold.count(name) for name in set(gold)} == {name: counts[name] for name in pair}
