"""Converting checkpoints: what comes out computes the same, or nothing comes out."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import chatglm2_files
import chatglm2_tokens
import program
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_emo import convert as convert_module
from llm_emo import folders, recipes
from llm_emo.convert import convert
from llm_emo.errors import AdapterError, EmoError, JobFailed, ModelError, RunError
from llm_emo.models import auto, weights

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
IDS = torch.tensor([5, 17, 301, 44, 44, 9, 250, 2, 61, 128, 77])


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    return chatglm2_tokens.write_model(tmp_path_factory.mktemp("tokens") / "tokenizer.model")


@pytest.fixture
def write(tmp_path, tokenizer_file):
    """Write a checkpoint with its tokenizer beside it."""

    def made(name="original", **settings) -> Path:
        folder = chatglm2_files.write_checkpoint(tmp_path / name, **settings)
        shutil.copy(tokenizer_file, folder / "tokenizer.model")
        return folder

    return made


def refused(source, output, *pieces, error=ModelError, **options):
    """Hold that there is one message with the pieces, and no trace of an output."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(EmoError) as caught:
        convert(source, output, **options)
    assert type(caught.value) is error, caught.value
    assert "\n" not in str(caught.value)
    for piece in pieces:
        assert piece in str(caught.value), f"{piece!r} is not in {caught.value}"
    assert sorted(output.parent.iterdir()) == before


def opened(folder: Path) -> torch.nn.Module:
    """The folder as anybody opens it: transformers alone, no remote code."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit by bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


# --- what comes out ------------------------------------------------------------------------------


def test_the_tiny_checkpoint_gives_the_logits_of_the_original_code(shared_data, tmp_path, capsys):
    data = shared_data / "chatglm2"
    result = convert(
        data / "checkpoint", tmp_path / "native",
        tokenizer=data / "tokenizer" / "tokenizer.model",
    )  # fmt: skip
    # Its vocabulary is smaller than the tokenizer's: said, and no error.
    assert "64,794 ids and the model rows for 199" in capsys.readouterr().err
    assert any("199" in note for note in result["notes"])
    model, cases = opened(tmp_path / "native"), load_file(data / "cases.safetensors")
    for number in range(5):
        ids = cases[f"nopad.{number}.input_ids"]
        assert (model(ids).logits - cases[f"nopad.{number}.logits"]).abs().max() <= 1e-5
    assert model.generation_config.do_sample is False
    assert model.generation_config.eos_token_id == 2
    padded = {key: cases[f"leftpad.{key}"] for key in ("input_ids", "attention_mask")}
    model.generation_config.eos_token_id = None  # the original's tokens were made without an end
    made = model.generate(**padded, max_new_tokens=40)
    assert torch.equal(made, cases["generate.sequences"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native", trust_remote_code=False)
    with (data / "tokenizer" / "cases.jsonl").open(encoding="utf-8") as lines:
        for case in map(json.loads, list(lines)[:50]):
            assert tokenizer(case["text"]).input_ids[2:] == case["ids"]  # after [gMASK] sop


def test_the_plain_forward_pass_of_the_tests_is_the_original(shared_data):
    data = shared_data / "chatglm2"
    config = json.loads((data / "checkpoint" / "config.json").read_text("utf-8"))
    named = load_file(data / "checkpoint" / "model.safetensors")
    cases = load_file(data / "cases.safetensors")
    for number in range(5):
        for row, expected in zip(
            cases[f"nopad.{number}.input_ids"], cases[f"nopad.{number}.logits"], strict=True
        ):
            found = chatglm2_files.logits(config, named, row)
            assert (found - expected).abs().max() <= 5e-5


SHAPES = {
    "one .bin": {},
    "four .bin shards": {"shards": 4},
    "safetensors": {"kind": "safetensors", "seed": 1},
    "safetensors shards": {"kind": "safetensors", "shards": 3, "seed": 2},
    "deep and thin": {"layers": 5, "hidden": 12, "ffn": 20, "heads": 2, "groups": 1, "head_dim": 4},
    "no shared keys": {"heads": 4, "groups": 4, "head_dim": 12},
}


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_a_checkpoint_of_any_shape_computes_what_the_original_does(write, tmp_path, settings):
    source = write(**settings)
    result = convert(source, tmp_path / "native")
    config = json.loads((source / "config.json").read_text("utf-8"))
    expected = chatglm2_files.logits(config, weights_in(source), IDS)
    model = opened(tmp_path / "native")
    assert (model(IDS[None]).logits[0] - expected).abs().max() <= 5e-5 * expected.abs().max()
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["notes"] == []
    files = sorted(path.name for path in (tmp_path / "native").glob("model*"))
    shards = settings.get("shards", 1)
    assert len(files) == (1 if shards == 1 else shards + 1), "as many files, and an index"


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"shards": 4}, {"kind": "safetensors", "shards": 5}])
def test_there_and_back_every_bit_is_as_it_was(write, tmp_path, dtype, settings):
    source = write(dtype=dtype, **settings)
    convert(source, tmp_path / "native")
    assert {t.dtype for t in weights_in(tmp_path / "native").values()} == {dtype}
    convert(tmp_path / "native", tmp_path / "back", to="chatglm2")
    assert same(weights_in(tmp_path / "back"), weights_in(source))
    for name in ("config.json", "tokenizer.model"):
        found, expected = (tmp_path / "back" / name), (source / name)
        if name.endswith(".json"):
            assert json.loads(found.read_bytes()) == json.loads(expected.read_bytes())
        else:
            assert found.read_bytes() == expected.read_bytes()
    convert(tmp_path / "back", tmp_path / "again")
    assert same(weights_in(tmp_path / "again"), weights_in(tmp_path / "native"))


def test_frequencies_that_were_rounded_elsewhere_come_back_as_they_were(write, tmp_path):
    source = write(dtype=torch.float16)
    named = weights_in(source)
    name = INV_FREQ
    rounded = (named[name].float() * 1.002).half()  # as when every step is taken in half precision
    assert not torch.equal(rounded, named[name])
    chatglm2_files.write_weights(source, named | {name: rounded})
    convert(source, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back", to="chatglm2")
    assert torch.equal(weights_in(tmp_path / "back")[name], rounded)
    # And where there were none, none come back.
    chatglm2_files.write_weights(source, {k: t for k, t in named.items() if k != name})
    convert(source, tmp_path / "native2")
    convert(tmp_path / "native2", tmp_path / "back2", to="chatglm2")
    assert name not in weights_in(tmp_path / "back2")


def test_strange_frequencies_are_noted_and_kept(write, tmp_path):
    source = write()  # training programs that load a model piece by piece leave such
    edit(source, lambda named: named.update({INV_FREQ: torch.zeros(4)}))
    (note,) = convert(source, tmp_path / "native")["notes"]
    assert "rotary base" in note
    convert(tmp_path / "native", tmp_path / "back", to="chatglm2")
    assert same(weights_in(tmp_path / "back"), weights_in(source))


def test_a_folder_that_transformers_saved_goes_back_too(write, tmp_path):
    source = write()
    convert(source, tmp_path / "native")
    # Its shards part queries from keys, and there is no manifest.
    opened(tmp_path / "native").save_pretrained(tmp_path / "resaved", max_shard_size="20KB")
    assert len(list((tmp_path / "resaved").glob("*.safetensors"))) > 5
    result = convert(tmp_path / "resaved", tmp_path / "back", to="chatglm2")
    assert any("tokenizer.model" in note for note in result["notes"])
    assert same(weights_in(tmp_path / "back"), weights_in(source))
    shutil.copy(source / "tokenizer.model", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    assert same(weights_in(tmp_path / "again"), weights_in(tmp_path / "native"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_half_precision_stays_on_disk_and_is_never_computed_in(write, tmp_path, dtype):
    convert(write(dtype=torch.float16), tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text("utf-8"))
    assert config["dtype"] == "float16"
    spec = recipes.Model(
        name=str(tmp_path / "native"), revision=None, dtype=dtype, quantization="none"
    )
    model = auto.load(spec, recipes.ZeroShot(kind="zero_shot")).model
    assert {p.dtype for p in model.parameters()} <= {torch.float32, torch.bfloat16}
    if dtype == "float32":
        native = weights_in(tmp_path / "native")
        assert all(torch.equal(p, native[n].float()) for n, p in model.named_parameters())


def test_the_tokenizer_puts_its_marks_in_front_once(write, tmp_path):
    convert(write(), tmp_path / "native")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native", trust_remote_code=False)
    ids = tokenizer("[gMASK] sop </s>").input_ids
    marks = tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])
    assert ids[:2] == marks
    assert not {*marks, 2} & set(ids[2:])


def test_the_manifest_has_the_hash_of_every_file(write, tmp_path):
    source = write(shards=3)
    (source / "MODEL_LICENSE").write_text("a licence", "utf-8")
    result = convert(source, tmp_path / "native")
    manifest = json.loads((tmp_path / "native" / "manifest.json").read_text("utf-8"))

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    for folder, entries in ((source, manifest["inputs"]), (tmp_path / "native", manifest["files"])):
        for name, entry in entries.items():
            assert entry == {
                "bytes": (folder / name).stat().st_size,
                "sha256": digest(folder / name),
            }
    assert manifest["inputs"].keys() >= {
        "config.json", "tokenizer.model", "pytorch_model.bin.index.json",
        "pytorch_model-00003-of-00003.bin",
    }  # fmt: skip
    there = {path.name for path in (tmp_path / "native").iterdir()}
    assert manifest["files"].keys() == there - {"manifest.json"}
    assert {"MODEL_LICENSE", "tokenizer.model", "tokenizer.json"} < there
    assert result["written"] == {n: entry["sha256"] for n, entry in manifest["files"].items()}
    assert json.loads(json.dumps(result)) == result


def test_the_same_checkpoint_gives_the_same_files(write, tmp_path):
    first = convert(write("a", shards=2), tmp_path / "one")
    second = convert(write("b", shards=2), tmp_path / "two")
    assert first["written"] == second["written"]


def test_weights_of_another_dtype_than_the_config_says_are_taken_as_they_are(write, tmp_path):
    source = write(dtype=torch.float16)
    chatglm2_files.write_config(source, chatglm2_files.config())
    result = convert(source, tmp_path / "native")
    assert (result["dtype"], len(result["notes"])) == ("float16", 1)
    assert "float32" in result["notes"][0]


# --- what is refused -----------------------------------------------------------------------------


def edit(source: Path, change) -> None:
    """Write the checkpoint's weights again, changed."""
    named = dict(weights_in(source))
    change(named)
    torch.save(named, source / "pytorch_model.bin")


FIRST = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"

DAMAGES = {
    "a missing tensor": (lambda t: t.pop(FIRST), ("1 of 17 tensors are missing", FIRST)),
    "an unknown tensor": (
        lambda t: t.update({"transformer.extra": torch.ones(2)}),
        ("a tensor that ChatGLM2", "transformer.extra"),
    ),
    "a misshapen tensor": (
        lambda t: t.update({FIRST: t[FIRST].T.contiguous()}),
        (FIRST, "(56, 40)", "(40, 56)"),
    ),
    "one odd dtype": (
        lambda t: t.update({FIRST: t[FIRST].half()}),
        ("most tensors are float32", FIRST, "float16"),
    ),
    "integers": (lambda t: t.update({FIRST: t[FIRST].to(torch.int8)}), (FIRST, "int8")),
    "the original's quantisation": (
        lambda t: t.update({f"{FIRST}_scale": torch.ones(40)}),
        ("quantised by the original program",),
    ),
    "something other than tensors": (lambda t: t.update(step=3), ("'step'", "int")),
    "names without a parent": (
        lambda t: [t.update({n.removeprefix("transformer."): t.pop(n)}) for n in list(t)],
        ("17 of 17 tensors are missing",),
    ),
}


@pytest.mark.parametrize(("change", "pieces"), DAMAGES.values(), ids=DAMAGES)
def test_weights_that_do_not_fit_their_config_are_refused(write, tmp_path, change, pieces):
    source = write()
    edit(source, change)
    refused(source, tmp_path / "native", *pieces)


def test_a_whole_model_is_recognised_before_its_weights_are_read(write, tmp_path):
    source = write(shards=2)
    config = json.loads((source / "config.json").read_text("utf-8"))
    for changes, piece in (
        ({"position_encoding_2d": True, "inner_hidden_size": 160}, "first generation"),
        ({"_name_or_path": "THUDM/chatglm3-6b"}, "ChatGLM3"),
        ({"eos_token_id": [151329, 151336, 151338]}, "GLM-4"),
        ({"quantization_bit": 4}, "4 bits"),
        ({"rope_ratio": 50}, "rope_ratio"),
        ({"mystery": 1}, "'mystery'"),
    ):
        chatglm2_files.write_config(source, config | changes)
        refused(source, tmp_path / "native", piece)


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_truncated_shard_is_refused_by_name(write, tmp_path, kind, share):
    source = write(shards=3, kind=kind)
    shard = next(source.glob("*-00002-of-*"))
    cut(shard, share)
    refused(source, tmp_path / "native", shard.name)


def test_a_download_with_holes_is_refused(write, tmp_path):
    source = write(shards=2)
    shard = next(source.glob("*-00002-of-*"))
    content = bytearray(shard.read_bytes())
    start, stop = len(content) // 2, len(content) // 2 + 64
    content[start:stop] = bytes(64)  # the length is right, and so is the directory at the end
    shard.write_bytes(content)
    assert zipfile.is_zipfile(shard)
    refused(source, tmp_path / "native", shard.name, "checksum")


def test_a_checkpoint_that_torch_saved_without_checksums_is_not_called_damaged(write, tmp_path):
    source = write()
    state = weights_in(source)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, source / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(source / "pytorch_model.bin") as archive:
        assert archive.testzip() is not None, "what a zip reader calls damaged"
    convert(source, tmp_path / "native")
    convert(write("summed"), tmp_path / "other")
    assert same(weights_in(tmp_path / "native"), weights_in(tmp_path / "other"))


def test_a_pointer_in_place_of_a_shard_is_told_from_damage(write, tmp_path):
    source = write(shards=2)
    shard = next(source.glob("*-00001-of-*"))
    shard.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{'0' * 64}\nsize 1827781090\n", "utf-8",
    )  # fmt: skip
    refused(source, tmp_path / "native", shard.name, "git-lfs pointer", "git lfs pull")


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_unread(write, tmp_path, capsys, zipped):
    source = write()
    path = source / "pytorch_model.bin"
    named = weights_in(source) | {"transformer.evil": Evil()}
    if zipped:
        torch.save(named, path)
    else:
        path.write_bytes(pickle.dumps(named))
    refused(source, tmp_path / "native", path.name)
    assert "never be printed" not in capsys.readouterr().out


def test_an_index_that_names_absent_files_is_refused(write, tmp_path):
    source = write(shards=4)
    for number in (2, 4):
        (source / f"pytorch_model-{number:05d}-of-00004.bin").unlink()
    refused(
        source, tmp_path / "native",
        "pytorch_model.bin.index.json", "names 4 files", "2 are absent",
        "pytorch_model-00002-of-00004.bin", "pytorch_model-00004-of-00004.bin",
    )  # fmt: skip


def test_an_index_may_not_lead_out_of_its_folder(write, tmp_path):
    source = write(shards=2)
    path = source / "pytorch_model.bin.index.json"
    path.write_text(path.read_text("utf-8").replace("pytorch_model-", "../pytorch_model-"), "utf-8")
    refused(source, tmp_path / "native", "no file of its own folder")


def test_an_index_without_its_weights_does_not_hide_those_that_are_there(write, tmp_path):
    source = write(shards=2)
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    convert(source, tmp_path / "native")
    (source / "pytorch_model.bin.index.json").unlink()  # the shards say by themselves what they are
    convert(source, tmp_path / "again")
    assert same(weights_in(tmp_path / "again"), weights_in(tmp_path / "native"))


def test_files_of_two_checkpoints_in_one_folder_are_refused(write, tmp_path):
    source = write(shards=2)
    (source / "pytorch_model.bin.index.json").unlink()
    shutil.copy(
        source / "pytorch_model-00001-of-00002.bin", source / "pytorch_model-00001-of-00007.bin"
    )
    refused(source, tmp_path / "native", "lies in", "-of-00002", "-of-00007")


def test_a_stale_total_size_is_only_noted(write, tmp_path):
    source = write(shards=2)
    path = source / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text("utf-8"))
    total = sum(t.nbytes for t in weights_in(source).values())
    assert index["metadata"]["total_size"] == total, "with the frequencies, as the official one"
    index["metadata"]["total_size"] = 2 * total
    path.write_text(json.dumps(index), "utf-8")
    assert f"{2 * total:,}" in convert(source, tmp_path / "native")["notes"][0]


def test_folders_that_are_no_checkpoint_are_refused(write, tmp_path, tokenizer_file):
    source, output = write(), tmp_path / "native"
    refused(tmp_path / "absent", output, "no such folder")
    refused(source / "pytorch_model.bin", output, "name its folder")
    (source / "pytorch_model.bin").rename(tmp_path / "elsewhere.bin")
    refused(source, output, "holds no weights")
    (tmp_path / "elsewhere.bin").rename(source / "pytorch_model.bin")
    for text in ("{", "[]", "\x00"):
        (source / "config.json").write_text(text, "utf-8")
        refused(source, output, "config.json")
    (source / "config.json").unlink()
    refused(source, output, "has no config.json")


def test_a_tokenizer_is_needed_and_must_be_one(write, tmp_path):
    source, output = write(), tmp_path / "native"
    (source / "tokenizer.model").rename(tmp_path / "kept.model")
    refused(source, output, "tokenizer.model", "--tokenizer")
    refused(source, output, "--tokenizer", "absent.model", tokenizer=tmp_path / "absent.model")
    refused(source, output, tokenizer=source / "config.json")
    convert(source, output, tokenizer=tmp_path / "kept.model")
    assert (output / "tokenizer.model").read_bytes() == (tmp_path / "kept.model").read_bytes()


def test_what_is_converted_already_is_not_converted_again(write, tmp_path):
    source = write()
    convert(source, tmp_path / "native")
    refused(tmp_path / "native", tmp_path / "out", "already", "--to chatglm2")
    (tmp_path / "native" / "manifest.json").unlink()  # as where transformers saved it
    refused(tmp_path / "native", tmp_path / "out", "already", "--to chatglm2")
    refused(source, tmp_path / "out", "already", to="chatglm2")


def test_quantised_weights_do_not_go_back(write, tmp_path):
    convert(write(), tmp_path / "native")
    path = tmp_path / "native" / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"quantization_config": {"load_in_4bit": True}}
    path.write_text(json.dumps(config), "utf-8")
    refused(tmp_path / "native", tmp_path / "out", "stored quantised", to="chatglm2")


def test_the_command_line_says_one_thing_and_exits_with_2(write, tmp_path):
    source, output = write(shards=2), tmp_path / "native"
    found = json.loads(program.call("convert", source, "-o", output, "--json").ok().out)
    assert (found["to"], found["parameters"]) == ("native", opened(output).num_parameters())
    shard = next(source.glob("*-00002-of-*"))
    cut(shard, 0.5)
    again = tmp_path / "again"
    program.call("convert", source, "-o", again).refused(shard.name, "truncated")
    program.call("convert", source, "-o", output).refused("is not empty")
    program.call("convert", source, "-o", again, "--to", "original").refused("--to", "chatglm2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "original"]


def test_adapters_are_told_from_checkpoints(write, tmp_path, tokenizer_file):
    source = write()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", "utf-8")
    refused(tmp_path / "adapter", tmp_path / "out", "--tokenizer", tokenizer=tokenizer_file)
    refused(tmp_path / "adapter", tmp_path / "out", "adapter", error=AdapterError)
    refused(source, tmp_path / "out", "--base", base=source)
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.randn(4, 2 * 2 * 3 * 16)}
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    chatglm2_files.write_config(tuned, chatglm2_files.config() | {"pre_seq_len": 4})
    # The tuning script saves the prefix alone; others the model around it.
    for named in (prefix, weights_in(source) | prefix):
        chatglm2_files.write_weights(tuned, named)
        assert convert(tuned, tmp_path / "out", base=source)["kind"] == "p_tuning_v2"
        shutil.rmtree(tmp_path / "out")
    for path in tuned.glob("pytorch_model*"):
        path.unlink()
    chatglm2_files.write_weights(tuned, weights_in(source) | prefix, shards=2)
    assert convert(tuned, tmp_path / "out", base=source)["kind"] == "p_tuning_v2"


# --- disks and interruptions ---------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_left_alone(write, tmp_path):
    source, output = write(), tmp_path / "native"
    output.mkdir()
    convert(source, output)  # empty is free
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    refused(source, output, "is not empty", error=RunError)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    refused(source, source / "config.json", "is a file", error=RunError)


def test_room_is_asked_for_before_anything_is_written(write, tmp_path, monkeypatch):
    source = write()

    def nothing(*_):
        raise AssertionError("written without room")

    monkeypatch.setattr(weights, "write", nothing)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    refused(source, tmp_path / "native", "needs 0.06 GiB", "0.00 GiB free", error=JobFailed)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_midway_leaves_nothing(write, tmp_path, monkeypatch, number):
    source, real = write(shards=3), weights.write

    def failing(path, *rest):
        if "00002" in path.name:
            raise OSError(number, os.strerror(number), "a file that is read")  # as a copy says it
        return real(path, *rest)

    monkeypatch.setattr(weights, "write", failing)
    refused(source, tmp_path / "native", f"native: {os.strerror(number)}", error=JobFailed)
    monkeypatch.undo()
    convert(source, tmp_path / "native")


def test_a_full_disk_is_one_message_when_the_tokenizer_meets_it(write, tmp_path, monkeypatch):
    def failing(*_):
        raise Exception("No space left on device (os error 28)")  # as tokenizers do

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", failing)
    refused(write(), tmp_path / "native", "No space left", error=JobFailed)


STOPPED = """
import sys, time
from pathlib import Path
from llm_emo import convert
from llm_emo.models import weights

real = weights.write
def slow(path, *rest):
    if "00002" in path.name:
        path.write_bytes(b"half a file")
        print("in the middle", flush=True)
        time.sleep(600)
    return real(path, *rest)
weights.write = slow
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_conversion_leaves_no_output_and_the_next_one_is_clean(write, tmp_path, capsys):
    source, output = write(shards=3), tmp_path / "out" / "native"
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(source), str(output)],
        stdout=subprocess.PIPE, text=True, env=program.clean(), cwd=program.ROOT,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "in the middle\n"
        # As long as it lives, nobody else may write there.
        with pytest.raises(RunError, match="another process"):
            convert(source, output)
        assert (output.parent / ".native.partial").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    assert not output.exists()
    assert (output.parent / ".native.partial").exists()
    convert(source, output)
    assert "removing what a stopped run left" in capsys.readouterr().err
    assert [path.name for path in output.parent.iterdir()] == ["native"]
    convert(source, tmp_path / "other")
    one, other = (
        {p.name: p.read_bytes() for p in f.iterdir()} for f in (output, tmp_path / "other")
    )
    assert one == other


@pytest.mark.parametrize("shards", [1, 3])
def test_the_progress_bar_ends_at_its_total_either_way(write, tmp_path, monkeypatch, shards):
    bars = []

    class Kept(convert_module.tqdm):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            bars.append(self)

    monkeypatch.setattr(convert_module, "tqdm", Kept)
    # In one direction the frequencies are read and not written, in the other the reverse.
    convert(write(shards=shards), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back", to="chatglm2")
    assert INV_FREQ in weights_in(tmp_path / "back")
    assert [(bar.n, bar.total) for bar in bars] == [(bar.total, bar.total) for bar in bars]
    assert len(bars) == 2


def test_what_appears_is_on_the_disk_before_its_name_is(write, tmp_path, monkeypatch):
    synced, real, output = [], os.fsync, tmp_path / "native"

    def noting(handle):
        synced.append((os.fstat(handle).st_ino, output.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", noting)
    convert(write(shards=2), output)
    assert {(path.stat().st_ino, False) for path in (output, *output.iterdir())} <= set(synced)
    assert synced[-1] == (tmp_path.stat().st_ino, True), "the new name itself"


def test_an_interrupted_conversion_removes_what_it_wrote(write, tmp_path, monkeypatch):
    source = write()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out" / "native")
    assert list((tmp_path / "out").iterdir()) == []


# --- the writer ----------------------------------------------------------------------------------


def test_what_is_written_piece_by_piece_is_what_the_library_writes(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7, 2).T,  # not contiguous
        "scalar": torch.tensor(1.5),
        "none": torch.empty(0, 4),
        "half": torch.randn(3).half(),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    seen: list[int] = []
    entry = weights.write(tmp_path / "ours.safetensors", specs, tensors.values(), seen.append)
    assert sum(seen) == weights.size_of(specs)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    content = (tmp_path / "ours.safetensors").read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(ValueError, match="expected"):
        weights.write(tmp_path / "x", specs, reversed(list(tensors.values())), seen.append)


# --- the benchmark ----------------------------------------------------------------------------


def test_the_benchmark_converts_there_and_back_and_removes_everything(tmp_path):
    script = program.ROOT / "scripts" / "bench" / "convert.py"
    (tmp_path / "work").mkdir()
    done = program.spawn(
        script, "--small", "--folder", tmp_path / "work", "-o", tmp_path / "record.json"
    ).ok()
    assert "bits equal after there and back: yes" in done.out
    assert list((tmp_path / "work").iterdir()) == []
    record = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert record["bits_equal"] is True
    for run in record["runs"].values():
        assert 0 < run["RssAnon"] < run["VmHWM"] < record["limit_bytes"]
