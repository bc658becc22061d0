"""Every error a user can cause is one clear message, an exit code, and nothing half-written."""

import errno
import json
import shutil
from pathlib import Path

import program
import pytest
import tiny
import torch
from safetensors import SafetensorError

from llm_emo import checkpoints, cli, errors, journal, methods, predictions, recipes, runs


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; what a refused command leaves in it is half-written."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LLM_EMO_DATA", raising=False)
    return folder


def corpora(folder: Path, *names: str) -> Path:
    """Copy the fixtures of some corpora, to break them."""
    for name in names:
        shutil.copytree(program.FIXTURES / name, folder / name)
    return folder


def kinds(error):
    return [error, *(kind for sub in error.__subclasses__() for kind in kinds(sub))]


def test_the_machine_failing_exits_with_1_and_wrong_input_with_2():
    codes = {kind.__name__: kind.exit_code for kind in kinds(errors.EmoError)}
    assert {name for name, code in codes.items() if code == 1} == {"JobFailed"}
    assert set(codes.values()) == {1, 2}


# --- recipes and options ------------------------------------------------------------------------


def test_an_unknown_recipe_key_names_the_nearest(here, tiny_folder):
    options = program.on(tiny_folder, "train.learning_rat=1")
    told = program.call("train", "mastodon/lora", *options)
    told.refused("--set train.learning_rat=1", "did you mean 'learning_rate'")
    assert not list(here.iterdir())


def test_an_unknown_key_in_a_recipe_file_names_file_and_nearest(here, tmp_path):
    text = recipes.source("mastodon/lora").read_text("utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("weight_decay:", "weight_deca:"), "utf-8")
    told = program.call("train", path, "--data-root", program.FIXTURES)
    told.refused(str(path), "weight_deca", "did you mean 'weight_decay'")
    assert not list(here.iterdir())


def test_an_unknown_recipe_names_the_nearest(here):
    told = program.call("train", "mastodon/lorra")
    told.refused("mastodon/lorra", "did you mean 'mastodon/lora'")
    assert not list(here.iterdir())


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_an_unknown_split_names_the_nearest(verb, trained):
    program.call(verb, trained, "--split", "tst").refused("--split", "'tst'", "mean 'test'")


def test_an_unknown_mode_says_which_there_are(trained, here):
    told = program.call("predict", trained, "--mode", "scored", "-o", here / "out")
    told.refused("mode", "'scored'", "score", "generate")
    assert not list(here.iterdir())


def test_a_zero_shot_recipe_cannot_be_trained(here, tiny_folder):
    told = program.call("train", "mastodon/zero_shot", *program.on(tiny_folder, training=False))
    told.refused("zero_shot trains nothing", "llm-emo evaluate mastodon/zero_shot")
    assert not list(here.iterdir())


def test_a_recipe_that_must_be_trained_first_is_not_evaluated(here, tiny_folder):
    told = program.call("evaluate", "mastodon/lora", *program.on(tiny_folder))
    told.refused("must be trained first", "llm-emo train mastodon/lora")
    assert not list(here.iterdir())


def test_dialogues_that_the_corpus_does_not_have_are_not_batched_by(here, tiny_folder):
    for verb in ("check", "train", "plan"):
        options = program.on(tiny_folder, "train.batch_by=dialogue")
        told = program.call(verb, "sst5/lora", *options)
        told.refused("train.batch_by: dialogue", "sst", "train.batch_by=row")
    assert not list(here.iterdir())


# --- corpora ------------------------------------------------------------------------------------


def test_no_data_root_says_how_to_give_one_and_where_to_get_the_files(here):
    told = program.call("train", "mastodon/lora")
    told.refused("--data-root", "github.com/cerisara/DialogSentimentMastodon")
    assert not list(here.iterdir())


def test_a_data_root_that_is_no_folder_is_named(here, tiny_folder):
    program.call("datasets", "--data-root", "nowhere").refused("nowhere", "--data-root")
    options = program.on(tiny_folder, root=here / "nowhere")
    told = program.call("train", "mastodon/lora", *options)
    told.refused("nowhere", "github.com/cerisara/DialogSentimentMastodon")
    assert not list(here.iterdir())


def test_a_missing_data_file_is_named_with_where_to_get_it(here, tmp_path, tiny_folder):
    root = corpora(tmp_path / "data", "mastodon")
    shutil.rmtree(root / "mastodon/json")
    (root / "mastodon/native/datatrainJoint.txt").unlink()
    told = program.call("train", "mastodon/lora", *program.on(tiny_folder, root=root))
    told.refused("train", "github.com/cerisara/DialogSentimentMastodon")
    assert not list(here.iterdir())


STRANGE = {
    "friends": ("friends_test.json", '"emotion": "joy"', '"emotion": "boredom"', "boredom"),
    "meld": ("train_sent_emo.csv", ",joy,", ",boredom,", "boredom"),
    "mastodon": ("native/datatestJoint.txt", "+_", "!_", "!_"),
    "tweeteval": ("train_labels.txt", "1", "9", "9"),
}


@pytest.mark.parametrize("recipe", STRANGE)
def test_a_label_that_is_not_in_the_set_is_named_with_file_and_row(
    recipe, here, tmp_path, tiny_folder
):
    file, usual, strange, shown = STRANGE[recipe]
    corpus = "tweeteval_emotion" if recipe == "tweeteval" else recipe
    path = corpora(tmp_path / "data", corpus) / corpus / file
    text = path.read_bytes().decode()
    assert usual in text
    path.write_bytes(text.replace(usual, strange, 1).encode())
    line = text[: text.index(usual)].count("\n") + 1
    options = program.on(tiny_folder, root=tmp_path / "data")
    told = program.call("train", f"{recipe}/lora", *options)
    told.refused(str(path), shown)
    if not file.endswith(".json"):
        told.refused(f"line {line}" if recipe != "meld" else "")
    assert not list(here.iterdir())


@pytest.mark.parametrize("verb", ["evaluate", "show"])
def test_an_empty_split_says_that_it_is_absent_and_where_to_get_it(
    verb, here, tmp_path, tiny_folder
):
    root = corpora(tmp_path / "data", "meld")
    (root / "meld/test_sent_emo.csv").unlink()
    options = program.on(tiny_folder, root=root, training=False)
    told = program.call(verb, "meld/zero_shot", "--split", "test", *options)
    told.refused("test", "meld", "github.com/declare-lab/MELD")
    assert not list(here.iterdir())


def test_check_refuses_to_call_a_recipe_fitting_that_has_nothing_to_train_on(
    here, tmp_path, tiny_folder
):
    root = corpora(tmp_path / "data", "meld")
    (root / "meld/train_sent_emo.csv").unlink()
    told = program.call("check", "meld/lora", *program.on(tiny_folder, root=root))
    told.refused("train", "meld", "github.com/declare-lab/MELD")


def test_a_split_that_is_absent_does_not_hinder_the_others(tmp_path, tiny_folder):
    root = corpora(tmp_path / "data", "meld")
    (root / "meld/test_sent_emo.csv").unlink()
    options = program.on(tiny_folder, root=root, training=False)
    told = program.call("evaluate", "meld/zero_shot", "--split", "dev", "-o", tmp_path / "out",
                        *options, "--json")  # fmt: skip
    assert json.loads(told.ok().out)["n"] == 4


@pytest.mark.parametrize("verb", ["train", "check"])
def test_text_without_room_for_the_answer_is_an_error_with_the_row(verb, here, tiny_folder):
    told = program.call(verb, "mastodon/lora", *program.on(tiny_folder, "prompt.max_length=16"))
    told.refused("row ", "prompt.max_length = 16", "raise prompt.max_length")
    assert not list(here.iterdir())


def test_corpus_files_that_changed_since_the_run_are_noticed(run_copy, tmp_path):
    root = corpora(tmp_path / "data", "mastodon")
    path = root / "mastodon/native/datatrainJoint.txt"
    path.write_bytes(path.read_bytes().replace(b" the ", b" a ", 1))
    for verb in (["evaluate", run_copy], ["export", run_copy, "-o", tmp_path / "out"]):
        told = program.call(*verb, "--data-root", root)
        told.refused(str(run_copy), "corpus files have changed", "--data-root")
    assert not (tmp_path / "out").exists()


# --- models and adapters ------------------------------------------------------------------------


def test_a_model_that_is_absent_leaves_no_run_folder(here):
    told = program.call("train", "mastodon/lora", *program.on(here / "nowhere"))
    told.refused("model.name", "nowhere", "config.json")
    assert not list(here.iterdir())


def test_target_modules_that_the_model_lacks_leave_no_run_folder(here, tiny_folder):
    options = program.on(tiny_folder, "method.target_modules=[query_key_value]")
    program.call("train", "mastodon/lora", *options).refused("query_key_value", "q_proj")
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "how",
    ["offline", pytest.param("unreachable", marks=pytest.mark.slow)],  # many retries
)
def test_no_network_is_a_failure_of_the_machine(how, here):
    # Two processes of their own, because the hub's client reads its settings on import.
    environment = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"
    }  # fmt: skip
    options = program.on(Path("owner/model"), "model.revision=v1", training=False)
    told = program.spawn("-m", "llm_emo", "check", "mastodon/zero_shot", *options,
                         environment=environment | {"HF_HOME": str(here)})  # fmt: skip
    told.refused("owner/model", "hub cannot be reached", "model.name=FOLDER", code=1)


def test_a_hub_id_without_a_revision_is_refused(here):
    told = program.call("train", "mastodon/lora", *program.on(Path("owner/model")))
    told.refused("owner/model", "model.revision")
    assert not list(here.iterdir())


OTHER_BASES = {
    "weights": lambda folder: program.save_model(folder, seed=1),
    "architecture": lambda folder: program.save_model(folder, rope_theta=50_000.0),
}


@pytest.mark.parametrize("kind", OTHER_BASES)
def test_an_adapter_of_another_base_is_refused(kind, run_copy, tmp_path):
    other = OTHER_BASES[kind](tmp_path / "other")
    change = ["--set", f"model.name={other}"]
    told = program.call("evaluate", run_copy, "-o", tmp_path / "out", *change)
    told.refused("another base model", str(run_copy / "adapter"))
    program.call("export", run_copy, "-o", tmp_path / "m", "--format", "merged", *change).refused(
        "another base model"
    )
    assert not list(tmp_path.glob("out")) + list(tmp_path.glob("m"))


def test_an_adapter_of_another_tokenizer_is_refused(run_copy, tiny_folder, tmp_path):
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    tiny.metaspace_tokenizer().save_pretrained(other)
    told = program.call("evaluate", run_copy, "--set", f"model.name={other}")
    told.refused("another", "tokenizer")


def test_an_adapter_of_another_chat_template_is_refused(run_copy, tiny_folder, tmp_path):
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("assistant", "model"), "utf-8")
    told = program.call("evaluate", run_copy, "--set", f"model.name={other}")
    told.refused("another chat template")


def test_an_adapter_of_another_prompt_is_refused(run_copy):
    changes = program.settings("prompt.name=paper_zh")
    program.call("evaluate", run_copy, *changes).refused("another prompt")


def test_a_run_reads_its_own_prompt_and_refuses_it_edited(run_copy):
    path = run_copy / "prompt.yaml"
    path.write_text(path.read_text("utf-8").replace("Classify", "Tell"), "utf-8")
    program.call("evaluate", run_copy).refused("another prompt")


def test_an_adapter_of_other_labels_is_refused(run_copy):
    path = run_copy / "adapter/fingerprint.json"
    found = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(found | {"label set": "0" * 64}), "utf-8")
    program.call("evaluate", run_copy).refused("another label set")


def test_an_adapter_that_lacks_a_tensor_is_refused(run_copy):
    from safetensors.torch import load_file, save_file

    path = run_copy / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)
    program.call("evaluate", run_copy).refused(str(path), "missing")
    path.write_bytes(path.read_bytes()[:100])
    program.call("evaluate", run_copy).refused(str(path), "is truncated or damaged")


# --- run folders --------------------------------------------------------------------------------


def test_the_working_directory_itself_cannot_become_a_run(here, tiny_folder):
    told = program.call("train", "mastodon/lora", "-o", ".", *program.on(tiny_folder))
    told.refused("name a new folder with -o")
    assert not list(here.iterdir())


def test_out_of_memory_is_one_message_that_says_what_to_lower(monkeypatch, here):
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(cli, "app", full)
    program.call().refused("out of memory", "train.micro_batch_size", code=1)


def test_a_run_is_never_overwritten(run_copy, tiny_folder):
    before = sorted(path.name for path in run_copy.iterdir())
    told = program.call("train", "mastodon/lora", "-o", run_copy, *program.on(tiny_folder))
    told.refused(str(run_copy), "holds a run already", "-o", "--resume")
    assert sorted(path.name for path in run_copy.iterdir()) == before
    # Said before corpus or model are read.
    program.call("train", "mastodon/lora", "-o", run_copy).refused("holds a run already")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    for verb in (["evaluate", tmp_path], ["predict", tmp_path],
                 ["export", tmp_path, "-o", tmp_path / "out"]):  # fmt: skip
        program.call(*verb).refused(str(tmp_path), "no run folder")
    told = program.call("train", "mastodon/lora", "-o", tmp_path, "--resume")
    told.refused(str(tmp_path), "no run folder")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_unfinished_run_is_not_evaluated(run_copy, tmp_path):
    shutil.rmtree(run_copy / "adapter")
    for verb in (["evaluate", run_copy], ["export", run_copy, "-o", tmp_path / "out"]):
        program.call(*verb).refused(str(run_copy), "has not finished", "--resume")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_resumed(run_copy):
    told = program.call("train", "mastodon/lora", "-o", run_copy, "--resume")
    told.refused("has finished", f"llm-emo evaluate {run_copy}")


def test_a_run_is_resumed_as_it_was_begun(run_copy):
    shutil.rmtree(run_copy / "adapter")
    told = program.call("train", "mastodon/lora", "-o", run_copy, "--resume", "--set", "seed=1")
    told.refused("leave out --set")
    told = program.call("train", "sst2/lora", "-o", run_copy, "--resume")
    told.refused("another recipe", str(run_copy / "recipe.yaml"))


@pytest.mark.parametrize("name", ["environment.json", "overrides.json"])
def test_a_damaged_run_folder_is_named(name, run_copy):
    (run_copy / name).write_text("{", "utf-8")
    program.call("evaluate", run_copy).refused(str(run_copy / name), "JSON")


# --- predictions --------------------------------------------------------------------------------


def test_a_predictions_file_that_is_absent_is_named(tmp_path):
    path = tmp_path / "test.predictions.jsonl"
    program.call("evaluate", path).refused(str(path), "llm-emo predict")


@pytest.mark.parametrize(
    ("line", "text", "pieces"),
    [
        (0, "{}", ["line 1", "protocol"]),
        (2, '{"uid": ', ["line 3", "JSON"]),
        (2, "[]", ["line 3", "object"]),
        (3, None, ["line 4", "uid"]),
    ],
)
def test_a_malformed_predictions_file_is_named_with_its_line(line, text, pieces, run_copy):
    program.call("predict", run_copy).ok()
    path = run_copy / "test.predictions.jsonl"
    lines = path.read_text("utf-8").splitlines()
    lines[line] = lines[line - 1] if text is None else text  # None: a uid stands twice
    path.write_text("\n".join(lines) + "\n", "utf-8")
    for source in (path, run_copy):
        program.call("evaluate", source).refused(str(path), *pieces)


def test_a_predictions_file_takes_no_overrides(run_copy):
    program.call("predict", run_copy).ok()
    path = run_copy / "test.predictions.jsonl"
    program.call("evaluate", path, "--set", "seed=1").refused("leave out --set")


# --- the machine --------------------------------------------------------------------------------


def no_room(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_room_for_tensors(*_args, **_kwargs):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def test_a_full_disk_at_the_start_leaves_no_run_folder(here, tiny_folder, monkeypatch):
    monkeypatch.setattr(Path, "write_text", no_room)
    told = program.call("train", "mastodon/lora", "-o", here / "run", *program.on(tiny_folder))
    told.refused(str(here / "run"), "No space left on device", code=1)
    assert not list(here.iterdir())


@pytest.mark.parametrize("place", ["save_model", "save_optimizer", "save_rng"])
@pytest.mark.parametrize("fails", [no_room, no_room_for_tensors])
def test_a_full_disk_at_a_checkpoint_says_how_to_continue(
    place, fails, here, tiny_folder, monkeypatch
):
    monkeypatch.setattr(checkpoints, place, fails)
    told = program.call("train", "mastodon/lora", "-o", here / "run", *program.on(tiny_folder))
    told.refused(str(here / "run"), "No space left on device", "--resume", code=1)
    assert not list((here / "run/checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("fails", [no_room, no_room_for_tensors])
def test_a_full_disk_at_the_adapter_leaves_a_run_to_resume(fails, here, tiny_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(methods, "save_adapter", fails)
        told = program.call("train", "mastodon/lora", "-o", here / "run", *program.on(tiny_folder))
    told.refused(str(here / "run"), "No space left on device", "--resume", code=1)
    left = {path.name for path in (here / "run").iterdir()}
    assert not any("adapter" in name for name in left)
    program.call("train", "mastodon/lora", "-o", here / "run", "--resume").ok()
    assert runs.open_run(here / "run").finished


def test_a_full_disk_at_the_predictions_keeps_what_was_written(run_copy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal, "write", predictions_without_room)
        told = program.call("predict", run_copy, "-o", tmp_path / "out")
    told.refused("test.predictions.jsonl", "No space left on device", code=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "test.predictions.jsonl.partial"
    ]  # fmt: skip
    program.call("predict", run_copy, "-o", tmp_path / "out").ok()


def predictions_without_room(path, *_):
    raise predictions.disk_failed(path, OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_full_disk_at_the_export_leaves_nothing(form, run_copy, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "copy", no_room)
    told = program.call("export", run_copy, "-o", tmp_path / "out", "--format", form)
    told.refused(str(tmp_path / "out"), "No space left on device", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_written_is_named(here, tiny_folder, monkeypatch):
    def denied(self, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    told = program.call("train", "mastodon/lora", "-o", here / "run", *program.on(tiny_folder))
    told.refused(str(here / "run"), "Permission denied", code=1)


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_tokenizer_of_another_model_is_refused_before_anything_runs(verb, tmp_path):
    model = program.save_model(tmp_path / "model", vocab_size=100)
    output = ["-o", tmp_path / "run"] if verb == "train" else []
    told = program.call(verb, "mastodon/lora", *output, *program.on(model))
    told.refused("the model knows 100 tokens", "belongs to another model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["check", "train"])
def test_layers_that_the_model_has_not_are_named_before_anything_runs(verb, tiny_folder, tmp_path):
    output = ["-o", tmp_path / "run"] if verb == "train" else []
    other = "method.target_modules=[query_key_value]"
    told = program.call(verb, "mastodon/lora", *output, *program.on(tiny_folder, other))
    told.refused("query_key_value", "q_proj, k_proj and v_proj")
    assert not (tmp_path / "run").exists()
