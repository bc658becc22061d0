import json

import program
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_emo import export, labelling, predictions, runs
from llm_emo.encoding import Encoder
from llm_emo.experiment import Experiment


@pytest.fixture(scope="module")
def prefixed(tiny_folder, tmp_path_factory):
    """A finished P-Tuning v2 run."""
    return program.train(
        tmp_path_factory.mktemp("prefixed") / "run", tiny_folder, "mastodon/p_tuning_v2"
    )


def label_log_probabilities(model, run, tokenizer_folder):
    """Return log P(label | prompt) of the test rows, each label run by itself, as anybody would."""
    opened = runs.open_run(run)
    experiment = Experiment.prepare(opened.recipe, program.FIXTURES)
    encoder = Encoder(
        AutoTokenizer.from_pretrained(tokenizer_folder), opened.recipe.prompt.max_length
    )
    answers = encoder.answers(experiment.answers)
    table = []
    with torch.no_grad():
        for row in encoder.encode(experiment.examples("test")):
            sums = []
            for answer in answers:
                logits = tiny.alone(model, row.prompt + answer)
                steps = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
                sums.append(steps.gather(1, torch.tensor(answer)[:, None]).sum())
            table.append(torch.stack(sums))
    return torch.stack(table)


def own_probabilities(run, folder):
    program.call("predict", run, "-o", folder).ok()
    header, rows = predictions.read(folder / "test.predictions.jsonl")
    return torch.tensor([[row.probabilities[name] for name in header.labels] for row in rows])


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["trained", "prefixed"])
def test_stock_peft_gives_the_label_log_probabilities_of_the_run(
    kind, request, tiny_folder, tmp_path
):
    run = request.getfixturevalue(kind)
    told = program.call("export", run, "-o", tmp_path / "out").ok()
    assert told.out.strip() == str(tmp_path / "out")
    stock = PeftModel.from_pretrained(base(tiny_folder), tmp_path / "out").eval()
    found = label_log_probabilities(stock, run, tiny_folder)
    expected = own_probabilities(run, tmp_path / "own")
    torch.testing.assert_close(found.softmax(-1), expected, atol=1e-5, rtol=1e-4)
    untouched = label_log_probabilities(base(tiny_folder), run, tiny_folder)
    assert (found - untouched).abs().max() > 0.1, "the adapter does nothing"

    opened = runs.open_run(run)
    experiment = Experiment.prepare(opened.recipe, program.FIXTURES)
    ours = labelling.open_labeller(experiment, opened)
    assert export.difference_from_stock(ours, tmp_path / "out", 7) < 1e-4
    unadapted = labelling.open_labeller(experiment)
    assert export.difference_from_stock(unadapted, tmp_path / "out", 7) > 0.1


def test_a_merged_model_gives_the_logits_of_base_and_adapter(trained, tiny_folder, tmp_path):
    program.call("export", trained, "-o", tmp_path / "peft").ok()
    program.call("export", trained, "-o", tmp_path / "merged", "--format", "merged").ok()
    merged = base(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(base(tiny_folder), tmp_path / "peft").eval()
    ids = tuple(range(5, 40))
    with torch.no_grad():
        found, expected = tiny.alone(merged, ids), tiny.alone(adapted, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - tiny.alone(base(tiny_folder), ids)).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == tiny.TEMPLATE


def test_a_merged_model_evaluates_as_its_run(trained, tmp_path):
    expected = own_probabilities(trained, tmp_path / "own")
    program.call("export", trained, "-o", tmp_path / "merged", "--format", "merged").ok()
    options = program.on(tmp_path / "merged", training=False)
    program.call("predict", "mastodon/zero_shot", "-o", tmp_path / "found", *options).ok()
    header, rows = predictions.read(tmp_path / "found/test.predictions.jsonl")
    found = torch.tensor([[row.probabilities[name] for name in header.labels] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_an_export_says_what_it_belongs_to(trained, tiny_folder, tmp_path):
    program.call("export", trained, "-o", tmp_path / "out").ok()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "fingerprint.json",
        "labels.json", "prompt.yaml",
    }  # fmt: skip
    config = json.loads((tmp_path / "out/adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(tiny_folder)
    card = (tmp_path / "out/README.md").read_text("utf-8")
    for piece in ("mastodon3", "Negative, Neutral, Positive", str(tiny_folder), "<text>"):
        assert piece in card
    assert json.loads((tmp_path / "out/labels.json").read_text("utf-8"))["words"] == [
        "Negative", "Neutral", "Positive"
    ]  # fmt: skip


def test_a_prefix_cannot_be_merged_and_the_message_says_why(prefixed, tmp_path):
    told = program.call("export", prefixed, "-o", tmp_path / "out", "--format", "merged")
    told.refused("P-Tuning v2 adds keys and values", "--format peft")
    assert not list(tmp_path.iterdir())


def test_merging_into_a_quantised_base_is_refused(trained, tmp_path):
    told = program.call("export", trained, "-o", tmp_path / "out", "--format", "merged",
                        "--set", "model.quantization=nf4")  # fmt: skip
    told.refused("--set model.quantization=none")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(trained, tmp_path):
    told = program.call("export", trained, "-o", tmp_path / "out", "--format", "gguf")
    told.refused("gguf", "peft or merged")


def test_a_folder_that_holds_something_is_left_alone(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    told = program.call("export", trained, "-o", tmp_path)
    told.refused(str(tmp_path), "is not empty", "-o")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_whole_model_of_full_training_is_exported_merged_only(tiny_folder, tmp_path):
    run = program.train(
        tmp_path / "run", tiny_folder, "mastodon/lora", "method={kind: full}", "train.epochs=1"
    )
    program.call("export", run, "-o", tmp_path / "peft").refused("--format merged")
    program.call("export", run, "-o", tmp_path / "merged", "--format", "merged").ok()
    found = label_log_probabilities(base(tmp_path / "merged"), run, tmp_path / "merged")
    expected = own_probabilities(run, tmp_path / "own")
    torch.testing.assert_close(found.softmax(-1), expected, atol=1e-5, rtol=1e-3)
