"""Specialised models under `accelerate launch`: two processes learn what one does, or refuse."""

import json
import shutil
import socket

import program
import pytest
import test_program
from safetensors.torch import load_file

bert, vectors = test_program.bert, test_program.vectors

SCRIPT = """
import json, os, pathlib, sys
from llm_emo.cli import main
folder, codes = pathlib.Path(sys.argv[1]), []
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["llm-emo", *arguments]
    try:
        main()
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code or 0)
(folder / f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))
"""

# Without dropout, whose masks no two processes would share; by plain gradients, because Adam makes
# whole steps of the rounding where a gradient is zero.
STEPS = ("train.epochs=3", "train.batch_size=4", "train.micro_batch_size=2",
         "train.optimizer=sgd", "train.learning_rate=0.1", "train.weight_decay=0.0",
         "data.dev_fraction=0.3")  # fmt: skip


@pytest.fixture(scope="module")
def recipes(bert, vectors, tmp_path_factory):
    """Settings of both kinds, and of one that takes whole batches."""
    still = tmp_path_factory.mktemp("still") / "bert"
    shutil.copytree(bert, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    head = "method.head={max_length: 32, dropout: 0.0}"
    return {
        "encoder": (*STEPS, f"method.name={still}", head),
        "text_cnn": (*STEPS, f"method.vectors={vectors}"),
        "roberta_cnn_lstm": ("train.batch_size=4", "train.micro_batch_size=4",
                             "method.encoder_run=nowhere"),
    }  # fmt: skip


def verb(kind, settings, folder):
    options = program.settings(*settings)
    named = ["train", f"mastodon/{kind}", "-o", folder, "--data-root", program.FIXTURES]
    return [str(word) for word in (*named, *options)]


@pytest.fixture(scope="module")
def together(recipes, tmp_path_factory):
    """What one launch of two processes did with all of them: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    verbs = [verb(kind, settings, folder / kind) for kind, settings in recipes.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = program.spawn(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
        "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", port, script, folder, json.dumps(verbs),
        environment={"PYTHONPATH": str(program.ROOT)},
    ).ok()  # fmt: skip
    return folder, told.err


def ended(run):
    """Return the parameters that the last step left; `adapter/` has those of the best on dev."""
    last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    return load_file(last / "model.safetensors")


def trail(run):
    """Return the losses and the dev metrics of a run, by step."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    told = ("step", "loss", "eval_accuracy", "eval_macro_f1")
    return [{key: line[key] for key in told if key in line} for line in lines]


def largest(one, two):
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", ["encoder", "text_cnn"])
def test_two_processes_learn_the_parameters_of_one(kind, recipes, together, tmp_path):
    two, one, less = together[0] / kind, tmp_path / "one", tmp_path / "less"
    program.call(*verb(kind, recipes[kind], one)).ok()
    program.call(*verb(kind, [*recipes[kind], "train.epochs=1"], less)).ok()
    assert largest(ended(one), ended(two)) < 1e-5
    assert largest(ended(one), ended(less)) > 1e-2, "nothing was learned that could differ"
    assert len(trail(one)) == len(trail(two))
    for alone, shared in zip(trail(one), trail(two), strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)


def test_what_takes_whole_batches_refuses_several_processes(together):
    folder, err = together
    kinds = ["encoder", "text_cnn", "roberta_cnn_lstm"]
    for rank in (0, 1):
        codes = json.loads((folder / f"codes-{rank}.json").read_text())
        assert dict(zip(kinds, codes, strict=True)) == {
            "encoder": 0, "text_cnn": 0, "roberta_cnn_lstm": 2,
        }  # fmt: skip
    message = "method roberta_cnn_lstm normalises over the rows of a step, which cannot be parted"
    assert message in err
    assert not (folder / "roberta_cnn_lstm").exists()
