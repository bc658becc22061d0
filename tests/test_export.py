import json
import shutil

import program
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmConfig

from llm_emo import export, folders, labelling, methods, opening, predictions, recipes, runs
from llm_emo.encoding import Encoder
from llm_emo.errors import AdapterError, JobFailed, RunError
from llm_emo.experiment import Experiment
from llm_emo.fetch import sha256_of
from llm_emo.models import auto, chatglm2, chatglm2_adapters


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
    told.refused("gguf", "peft", "merged")


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


# --- dtypes of a merged model -------------------------------------------------------------------


def exported(run, folder, *options, **changes):
    """Export through the function behind the verb; return what it tells."""
    opened = runs.open_run(run)
    experiment = opening.from_run(opened, [f"model.{k}={v}" for k, v in changes.items()], None)
    return export.export(experiment, opened, folder, *options)


def refused(act, kind, *pieces):
    with pytest.raises(kind) as caught:
        act()
    for piece in pieces:
        assert piece in str(caught.value)


def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return tiny.alone(model, tuple(range(5, 40))).float()


def packed_logits(folder, **keys):
    spec = recipes.Model(name=str(folder), revision=None, dtype="float32", **keys)
    loaded = auto.load(spec, recipes.ZeroShot(kind="zero_shot")).model.eval()
    assert loaded.is_quantized
    with torch.no_grad():
        return tiny.alone(loaded, tuple(range(5, 40))).float()


def test_a_merged_model_is_stored_in_the_dtype_that_was_asked_for(trained, tmp_path):
    told = exported(trained, tmp_path / "bf16", "merged", "bfloat16")
    stored = load_file(tmp_path / "bf16/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert told["merge_dtype"] == "bfloat16"
    told = exported(trained, tmp_path / "fp32", "merged")
    assert told["merge_dtype"] == "float32", "as the run computed"
    assert told["logit_difference"]["merging"] < 1e-4
    rounding = (logits(tmp_path / "bf16") - logits(tmp_path / "fp32")).abs().max()
    assert 0 < rounding < 0.5


def test_half_precision_is_stored_and_never_computed_in(trained, tmp_path, monkeypatch):
    real, computed = export._logits, []

    def noting(labeller):
        computed.append({parameter.dtype for parameter in labeller.model.parameters()})
        return real(labeller)

    monkeypatch.setattr(export, "_logits", noting)
    out = tmp_path / "fp16"
    program.call(
        "export", trained, "-o", out, "--format", "merged", "--merge-dtype", "float16"
    ).ok()
    assert computed == [{torch.float32}] * 3
    stored = load_file(out / "model.safetensors")
    exported(trained, tmp_path / "fp32", "merged")
    exact = load_file(tmp_path / "fp32/model.safetensors")
    assert stored.keys() == exact.keys()
    assert all(torch.equal(stored[name], exact[name].half()) for name in exact), "rounded once"
    assert json.loads((out / "config.json").read_text("utf-8"))["dtype"] == "float16"
    rounding = (logits(out, dtype=torch.float32) - logits(tmp_path / "fp32")).abs().max()
    assert 0 < rounding < 0.05
    spec = recipes.Model(name=str(out), revision=None, dtype="auto", quantization="none")
    loaded = auto.load(spec, recipes.ZeroShot(kind="zero_shot"))
    assert loaded.model.dtype in (torch.float32, torch.bfloat16)


def test_numbers_that_half_precision_does_not_have_are_refused(trained):
    opened = runs.open_run(trained)
    labeller = labelling.open_labeller(opening.from_run(opened, [], None), opened)
    labeller.model.get_input_embeddings().weight.data[3, 3] = 70_000
    with pytest.raises(AdapterError, match=r"embed_tokens.*65,504.*bfloat16"):
        export._halved(labeller)


def test_a_merged_chatglm2_keeps_its_licence_and_the_model_of_its_tokenizer(glm_folder, tmp_path):
    base = shutil.copytree(glm_folder, tmp_path / "base")
    passed_on = {"MODEL_LICENSE": b"terms", "LICENSE.md": b"more", "tokenizer.model": b"pieces"}
    for name, content in passed_on.items():
        (base / name).write_bytes(content)
    run = program.train(tmp_path / "run", base, "mastodon/lora", QKV, "train.epochs=1")
    for dtype in ("float32", "nf4"):
        told = exported(run, tmp_path / dtype, "merged", dtype)
        for name, content in passed_on.items():
            assert (tmp_path / dtype / name).read_bytes() == content
            assert name in told["files"]


def test_a_model_merged_into_four_bits_tells_what_that_costs(trained, tmp_path, capsys):
    told = exported(trained, tmp_path / "nf4", "merged", "nf4")
    exported(trained, tmp_path / "fp32", "merged")
    cost = told["logit_difference"]["requantising"]
    assert f"by requantising: {cost:.2g}" in capsys.readouterr().err
    config = json.loads((tmp_path / "nf4/config.json").read_text("utf-8"))["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"] is True
    # Quantising the merged model directly gives the same: weights were rounded once, at the end.
    expected = packed_logits(tmp_path / "fp32", quantization="nf4")
    found = packed_logits(tmp_path / "nf4", quantization="none")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert cost > 0.01
    assert {path.name for path in (tmp_path / "nf4").iterdir()} == set(told["files"])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_is_merged_into_the_base_as_it_is_stored(
    kind, tiny_folder, tmp_path, capsys
):
    options = f"model.quantization={kind}", "train.epochs=1"
    qlora = program.train(tmp_path / "run", tiny_folder, "mastodon/lora", *options)
    told = exported(qlora, tmp_path / "merged", "merged")
    assert f"trained on an {kind} base" in capsys.readouterr().err
    assert told["logit_difference"]["merging"] < 1e-4
    assert told["logit_difference"]["another_base_than_trained_on"] > 1e-3
    exported(qlora, tmp_path / "peft", "peft")
    adapted = PeftModel.from_pretrained(base(tiny_folder), tmp_path / "peft").eval()
    with torch.no_grad():
        expected = tiny.alone(adapted, tuple(range(5, 40)))
    torch.testing.assert_close(
        logits(tmp_path / "merged", dtype=torch.float32), expected, atol=1e-4, rtol=1e-4
    )


def test_a_base_that_is_stored_in_four_bits_is_merged_only_when_asked_how(tiny_folder, tmp_path):
    spec = recipes.Model(name=str(tiny_folder), revision=None, dtype="float32", quantization="nf4")
    stored = auto.load(spec, recipes.ZeroShot(kind="zero_shot"))
    stored.model.save_pretrained(tmp_path / "base")
    stored.tokenizer.save_pretrained(tmp_path / "base")
    run = program.train(tmp_path / "run", tmp_path / "base", "mastodon/lora", "train.epochs=1")
    refused(
        lambda: exported(run, tmp_path / "out", "merged"), AdapterError,
        "stored quantised", "--merge-dtype bfloat16",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    told = exported(run, tmp_path / "out", "merged", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    found = label_log_probabilities(base(tmp_path / "out"), run, tiny_folder)
    expected = own_probabilities(run, tmp_path / "own")
    # Attached to dequantised weights, the adapter computes what it computed on the packed ones.
    torch.testing.assert_close(found.softmax(-1), expected, atol=1e-4, rtol=1e-3)
    assert told["logit_difference"]["merging"] < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "nf4"])
def test_room_for_a_merged_model_is_asked_for_before_any_weight_is_read(
    dtype, trained, tiny_folder, tmp_path, monkeypatch
):
    folder = tmp_path / "merged"
    exported(trained, folder, "merged", dtype)
    written = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    monkeypatch.setattr(export, "_SLACK", 0)
    need, _ = export._room(opening.from_run(runs.open_run(trained), [], None), dtype)
    # nf4 writes the unquantised model, as large as the base, and what is made of it.
    between = (tiny_folder / "model.safetensors").stat().st_size if dtype == "nf4" else 0
    assert need == pytest.approx(written + between, rel=0.1)

    def nothing(*_):
        raise AssertionError("read without room")

    monkeypatch.setattr(auto, "load", nothing)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(JobFailed, match="GiB free") as caught:
        exported(trained, tmp_path / "again", "merged", dtype)
    assert ("in between" in str(caught.value)) is (dtype == "nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_merge_dtype_without_a_merge_is_refused(trained, tmp_path):
    refused(
        lambda: exported(trained, tmp_path / "out", "peft", "bfloat16"), RunError, "--format merged"
    )


# --- for ChatGLM2's own code ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def glm_folder(tmp_path_factory):
    """A tiny model of ChatGLM2's architecture with a tokenizer, as `convert` leaves one."""
    layout = chatglm2.Layout(
        layers=2, hidden=32, ffn=48, heads=4, groups=2, head_dim=8, vocab=tiny.VOCAB, positions=256
    )
    made = tiny.model("glm")
    config = GlmConfig.from_dict(layout.native_config() | {"dtype": "float32"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(made.state_dict())
    folder = tmp_path_factory.mktemp("models") / "glm"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


QKV = "method.target_modules=[q_proj, k_proj, v_proj]"


@pytest.mark.parametrize(("tied", "times"), [(False, 3), (True, 1)])
def test_a_lora_run_is_written_fused_and_computes_the_same(tied, times, glm_folder, tmp_path):
    run = program.train(
        tmp_path / "run", glm_folder, "mastodon/lora", QKV, f"method.tie_a={str(tied).lower()}",
        "method.dropout=0.0",
    )  # fmt: skip
    told = exported(run, tmp_path / "out", "chatglm2")
    rank = runs.open_run(run).recipe.method.rank
    assert told["rank"] == times * rank
    config = json.loads((tmp_path / "out/adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["target_modules"]) == (times * rank, ["query_key_value"])
    chatglm2_adapters.to_native(tmp_path / "out", tmp_path / "back", base=glm_folder)
    stock = PeftModel.from_pretrained(base(glm_folder), tmp_path / "back").eval()
    found = label_log_probabilities(stock, run, glm_folder)
    expected = own_probabilities(run, tmp_path / "own")
    torch.testing.assert_close(found.softmax(-1), expected, atol=2e-5, rtol=1e-4)
    untouched = label_log_probabilities(base(glm_folder), run, glm_folder)
    assert (found - untouched).abs().max() > 0.05, "the adapter does nothing"


def test_an_adapter_from_elsewhere_labels_rows_under_a_zero_shot_recipe(glm_folder, tmp_path):
    run = program.train(tmp_path / "run", glm_folder, "mastodon/lora", QKV)
    exported(run, tmp_path / "foreign", "chatglm2")
    chatglm2_adapters.to_native(tmp_path / "foreign", tmp_path / "native", base=glm_folder)

    told = program.call(
        "predict", "mastodon/zero_shot", "--adapter", tmp_path / "native",
        "-o", tmp_path / "theirs", *program.on(glm_folder, training=False),
    ).ok()  # fmt: skip
    assert "taken on your word" in told.err
    head, rows = predictions.read(tmp_path / "theirs/test.predictions.jsonl")
    assert head.run is None
    assert head.adapter is not None
    table = {row.uid: row.probabilities for row in rows}
    program.call("predict", run, "-o", tmp_path / "own").ok()
    _, expected = predictions.read(tmp_path / "own/test.predictions.jsonl")
    assert len(expected) == len(table)
    for row in expected:
        assert table[row.uid] == pytest.approx(row.probabilities, abs=1e-5)


def test_an_adapter_is_named_beside_a_zero_shot_recipe_and_an_output_folder_only(
    glm_folder, tmp_path
):
    on = program.on(glm_folder, training=False)
    for words in (["mastodon/zero_shot", *on], [tmp_path, "-o", tmp_path / "out"]):
        told = program.call("predict", *words, "--adapter", tmp_path)
        told.refused("--adapter", "zero-shot recipe", "-o FOLDER")
    told = program.call(
        "predict", "mastodon/zero_shot", "--adapter", tmp_path, "-o", tmp_path / "out", *on
    )
    told.refused("no adapter")


def foreign(adapter, output, folder):
    """Predict with an adapter folder from elsewhere."""
    return program.call(
        "predict", "mastodon/zero_shot", "--adapter", adapter, "-o", output,
        *program.on(folder, training=False),
    )  # fmt: skip


def test_an_adapter_from_elsewhere_that_cannot_be_read_is_refused_with_what_to_do(
    glm_folder, tmp_path
):
    run = program.train(tmp_path / "run", glm_folder, "mastodon/lora", QKV)
    exported(run, tmp_path / "original", "chatglm2")
    exported(run, tmp_path / "empty", "peft")
    (tmp_path / "empty/adapter_model.safetensors").unlink()
    for name, pieces in (
        ("original", ("query_key_value", "llm-emo convert")),
        ("empty", ("adapter_model.safetensors or adapter_model.bin",)),
    ):
        told = foreign(tmp_path / name, tmp_path / "out", glm_folder)
        told.refused(str(tmp_path / name), *pieces)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["trained", "prefixed"])
def test_an_adapter_that_old_peft_pickled_labels_as_the_same_in_safetensors(
    kind, request, tiny_folder, tmp_path
):
    exported(request.getfixturevalue(kind), tmp_path / "new", "peft")
    (tmp_path / "new" / methods.PREFIX_FILE).unlink(missing_ok=True)  # PEFT knows none
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    stored = tmp_path / "old/adapter_model.safetensors"
    torch.save(load_file(stored), tmp_path / "old/adapter_model.bin")
    stored.unlink()
    found = {}
    for name in ("new", "old"):
        foreign(tmp_path / name, tmp_path / f"{name}-out", tiny_folder).ok()
        found[name] = predictions.read(tmp_path / f"{name}-out/test.predictions.jsonl")
    assert found["old"][1] == found["new"][1]
    assert found["old"][0].adapter == sha256_of(tmp_path / "old/adapter_model.bin")


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_run_is_written_as_the_tuning_script_writes_one(projection, glm_folder, tmp_path):
    options = (
        ["method.init=random", "method.init_text=null", "method.projection=true",
         "method.projection_size=32", "method.projection_input=all"]
        if projection
        else []
    )  # fmt: skip
    run = program.train(tmp_path / "run", glm_folder, "mastodon/p_tuning_v2", *options)
    told = exported(run, tmp_path / "out", "chatglm2")
    state = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    opened = runs.open_run(run)
    labeller = labelling.open_labeller(opening.from_run(opened, [], None), opened)
    own = methods.trainable_state(labeller.model)
    found = state["transformer.prefix_encoder.embedding.weight"]
    assert torch.equal(found, own["encoder.embedding.weight"])
    assert len(state) == (5 if projection else 1)
    assert told["projection"] is projection
    config = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert config["pre_seq_len"] == len(found) == opened.recipe.method.prefix_length
    assert (config["num_layers"], config["model_type"]) == (2, "chatglm")
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert f"--pre_seq_len {len(found)}" in card


def test_a_run_on_another_base_has_no_form_for_chatglm2(trained, tmp_path):
    refused(
        lambda: exported(trained, tmp_path / "out", "chatglm2"), AdapterError,
        "no ChatGLM2", "--format peft",
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
