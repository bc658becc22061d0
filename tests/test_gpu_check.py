"""The GPU check runs, says what it measured, and survives what a strange machine does to it."""

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from llm_emo.encoding import Encoded
from llm_emo.models import quantised
from llm_emo.models.chatglm2 import CHATGLM2_6B
from llm_emo.trie import TokenTrie

GPU = Path(__file__).parents[1] / "scripts" / "gpu"
CPU = torch.device("cpu")


def script(name):
    """A script of the folder, as a module."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = [str(GPU), *before]
    return module


check = script("check")
lengths = script("lengths")

from gpu_check import (  # noqa: E402
    exact,
    infer,
    machine,
    model,
    padded,
    parts,
    rows,
    table,
    train,
    turns,
    versions,
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """What the script does in its own process: one thread, and nothing old to collect."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return rows.load_tokenizer(shared_data / "chatglm2" / "tokenizer" / "tokenizer.model")


def settings(**changes):
    fields = {
        "device": "cpu", "tiny": True, "cap_gib": 24.0, "batch": 4, "rounds": 2, "steps": 1,
        "warm_up": 1, "new_tokens": 3, "minutes": 5.0, "seed": 0, "corpora": ("friends",),
        "data_root": None, "tokenizer": None,
    }  # fmt: skip
    return parts.Settings(**fields | changes)


def run(part, **changes):
    kept = []
    result = parts.run(part, settings(**changes), kept.append)
    return result, kept


# --- the model ------------------------------------------------------------------------------------


def build(quantization="none", dtype=torch.float32, seed=0):
    return model.build(model.TINY, dtype=dtype, quantization=quantization, device=CPU, seed=seed)


def test_the_model_that_is_measured_has_the_shape_of_chatglm2_6b():
    assert parts.Settings.layout.fget(settings(tiny=False)) is CHATGLM2_6B
    assert CHATGLM2_6B.parameters == 6_243_584_000


def test_weights_depend_on_the_seed_alone_and_no_tensor_is_left_without_numbers():
    first, again, other = build(), build(), build(seed=1)
    for name, tensor in model.tensors(first).items():
        assert tensor.device.type == "cpu", name
        assert torch.equal(tensor, model.tensors(again)[name]), name
    weight = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))
    logits = first(torch.arange(9)[None]).logits
    assert 0.3 < float(logits.std()) < 3  # neither saturated nor all alike


def test_its_rotary_frequencies_are_those_of_a_loaded_model(tmp_path):
    made = build()
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path, attn_implementation="sdpa")
    ids = torch.arange(40)[None]
    torch.testing.assert_close(made(ids).logits, loaded(ids).logits)


def test_nf4_made_layer_by_layer_is_what_transformers_makes_of_a_checkpoint(tmp_path):
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    made = build("nf4", torch.bfloat16)
    loaded = type(made).from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=quantised.config("nf4", torch.bfloat16),
        device_map={"": CPU},
    )
    theirs = dict(loaded.named_parameters())
    assert theirs.keys() == dict(made.named_parameters()).keys()
    for name, parameter in made.named_parameters():
        assert type(parameter) is type(theirs[name]), name
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter.data, theirs[name].data), name
    packed = made.get_submodule("model.layers.0.mlp.gate_up_proj").weight
    assert packed.quant_state.nested  # double quantisation
    assert made.is_loaded_in_4bit
    assert loaded.is_loaded_in_4bit


# --- the rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("corpus", rows.CORPORA)
def test_made_rows_have_the_recorded_lengths_and_share_the_instruction(corpus):
    facts = rows.recorded()["corpora"][corpus]
    made = rows.made(corpus, 400, seed=0)
    assert made.rows == rows.made(corpus, 400, seed=0).rows != rows.made(corpus, 400, seed=1).rows
    around = facts["shared"] + facts["tail"]
    texts = sorted(len(row.prompt) - around for row in made.rows)
    assert min(facts["text"]) <= texts[0]
    assert texts[-1] <= max(facts["text"])
    median = rows.at(rows.recorded()["percentiles"], facts["text"], 50)
    assert texts[200] == pytest.approx(median, abs=3)
    assert len({row.prompt[: facts["shared"]] for row in made.rows}) == 1
    assert sorted(map(len, made.answers)) == sorted(a["tokens"] for a in facts["answers"])
    assert all(row.answer in made.answers for row in made.rows)


@pytest.mark.parametrize("corpus", rows.CORPORA)
def test_batches_of_made_rows_cost_what_batches_of_real_ones_do(corpus):
    real = rows.recorded()["corpora"][corpus]["tokens_of_16_rows"]
    batches = rows.made(corpus, 1600, seed=3).batches(16)
    assert len(batches) == 100
    trie = sum(train.trie_tokens(batch, 16) for batch in batches) / 100
    plain = sum(padded.tokens(batch, 16) for batch in batches) / 100
    assert trie == pytest.approx(real["trie"], rel=0.06)
    assert plain == pytest.approx(real["padded"], rel=0.06)


def test_folding_ids_keeps_equal_tokens_equal():
    drawn = rows.made("sst5", 20, seed=0)
    folded = drawn.folded(512)
    assert max(token for row in folded.rows for token in row.prompt + row.answer) < 512
    for before, after in zip(drawn.rows, folded.rows, strict=True):
        assert (len(before.prompt), len(before.answer)) == (len(after.prompt), len(after.answer))
    count = len(TokenTrie.build([row.prompt for row in drawn.rows]))
    assert len(TokenTrie.build([row.prompt for row in folded.rows])) <= count


def test_recorded_lengths_are_those_of_the_real_corpora(shared_data, tokenizer):
    sample = lengths.encoded("friends", shared_data, tokenizer, 640)
    recorded = rows.recorded()["corpora"]["friends"]
    assert len({row.prompt[: recorded["shared"]] for row in sample}) == 1
    found = lengths.facts(sample)["tokens_of_16_rows"]
    assert found["trie"] == pytest.approx(recorded["tokens_of_16_rows"]["trie"], rel=0.1)


def test_real_rows_are_drawn_by_the_seed(shared_data, tokenizer, monkeypatch):
    monkeypatch.setattr(rows, "load_tokenizer", lambda path: tokenizer)
    first, again, other = (
        rows.draw("sst5", 8, seed=seed, root=shared_data, tokenizer=Path()) for seed in (0, 0, 1)
    )
    assert first.rows == again.rows != other.rows
    assert first.source == "corpus"
    assert len(first.answers) == 5


# --- the padded baseline --------------------------------------------------------------------------

ROWS = (
    Encoded("a", (5, 6, 7), (8, 2)),
    Encoded("b", (5, 6, 9, 10, 11), (12, 13, 2)),
    Encoded("c", (5,), (2,)),
    Encoded("a again", (5, 6, 7), (8, 2)),
)


def test_a_padded_batch_trains_the_answers_and_nothing_else():
    batch = padded.collate(ROWS[:2], CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2, 0, 0, 0], [5, 6, 9, 10, 11, 12, 13, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 8, 2, -100, -100, -100],
        [-100, -100, -100, -100, -100, 12, 13, 2],
    ]
    assert padded.collate(ROWS, CPU, 193)["input_ids"].shape == (4, 193)
    assert padded.tokens(ROWS, 4) == 4 * 8
    assert padded.tokens(ROWS, 2) == 2 * 8 + 2 * 5
    assert padded.tokens(ROWS, 4, 193) == 4 * 193


@pytest.mark.parametrize("method", exact.METHODS)
def test_trie_and_padded_rows_have_the_same_gradients_in_any_number_of_passes(method):
    recipe = exact.without_dropout(rows.recipe_of("friends", method))
    _, made = exact.adapted(model.TINY, recipe.method, CPU, 0)
    made.train()
    drawn = rows.made("friends", 6, seed=1).folded(512).rows
    loss, reference = exact.gradients(made, train.padded_loss(made), drawn)
    for way in (train.trie_loss(made), train.padded_loss(made, 193)):
        found, gradients = exact.gradients(made, way, drawn)
        assert found == pytest.approx(loss, rel=1e-6)
        assert exact.apart(gradients, reference) < 1e-5
    train.whole(train.trie_loss(made), drawn, 2, backward=True)
    parted = torch.cat([p.grad.flatten().double() for p in made.parameters() if p.requires_grad])
    assert exact.apart(parted, reference) < 1e-5


def test_both_ways_of_answering_agree():
    base = build()
    prompts = [row.prompt for row in ROWS]
    answers = [(8, 2), (12, 13, 2), (2,)]
    assert infer.trie_generate(base, prompts, 4) == padded.generate(base, prompts, 4)
    scores = torch.tensor(infer.trie_score(base, prompts, answers))
    torch.testing.assert_close(scores, padded.score(base, prompts, answers), rtol=1e-4, atol=1e-4)


# --- the parts ------------------------------------------------------------------------------------


def test_exactness_holds_and_is_recorded_with_its_bounds():
    result, _ = run("exact")
    assert result["passed"]
    checks = {check["check"]: check for check in result["checks"]}
    for method in ("lora", "p_tuning_v2"):
        gradients = checks[f"{method}: gradients, trie and padded"]
        assert gradients["value"] <= gradients["bound"] == 1e-5
    assert checks["generated tokens that differ, trie and padded"]["value"] == 0
    assert len(checks) == 14


def test_exactness_fails_where_the_trie_sees_another_prompt(monkeypatch):
    shifted = [Encoded(row.uid, (*row.prompt[:-1], 3), row.answer) for row in ROWS]
    monkeypatch.setattr(exact.train, "trie_loss", lambda made: lambda given, count: (
        train.answer_loss(made, train.collate(shifted)) / count))  # fmt: skip
    recipe = rows.recipe_of("friends", "lora")
    found = exact.of_method(model.TINY, recipe, ROWS, device=CPU, seed=0)
    failed = [check["check"] for check in found if not check["passed"]]
    assert "lora: loss, trie and padded" in failed
    assert "lora: gradients, trie and padded" in failed


@pytest.mark.parametrize("part", ["lora/nf4", "p_tuning_v2/bf16"])
def test_training_is_recorded_side_by_side_on_the_same_batches(part):
    result, kept = run(part)
    assert result["status"] == "measured"
    assert result["method"]["kind"] == part.partition("/")[0]
    assert 0 < result["parameters"]["trainable"] < result["parameters"]["total"]
    friends = result["corpora"]["friends"]
    assert friends["rows"] == "recorded lengths"
    assert friends["first_losses"]["relative_difference"] < 0.05
    assert list(friends["sides"]) == ["trie", "padded", "padded to 193"]
    for side in friends["sides"].values():
        assert side["micro_batch"] == 4
        assert [len(turn) for turn in side["seconds_per_step"]] == [1, 1]
        assert side["examples_per_second"]["min"] > 0
        assert side["peak_memory"] is None  # of a GPU only
    tokens = [side["tokens_per_step"] for side in friends["sides"].values()]
    assert tokens[0] < tokens[1] < tokens[2] == 4 * 193
    assert friends["ratios"].keys() == {"padded", "padded to 193"}
    assert kept[-1]["corpora"] == result["corpora"]
    json.dumps(result, allow_nan=False)


def test_answering_is_recorded_for_generation_and_scores():
    result, _ = run("answers/bf16")
    friends = result["corpora"]["friends"]
    assert result["parameters"]["trainable"] == 0
    assert friends["labels"] == 7
    for name in ("generate", "score"):
        assert friends[name]["ratios"].keys() == {"padded"}
        assert friends[f"{name}_wide"]["batch"] == 8
    sides = friends["score"]["sides"]
    assert sides["trie"]["tokens_per_step"] < sides["padded"]["tokens_per_step"] / 5
    json.dumps(result, allow_nan=False)


# --- turns ----------------------------------------------------------------------------------------

CLOCK = turns.Clock(rounds=3, steps=2, warm_up=1, seconds=60)
BATCHES = [ROWS] * 6


def side(name, log, fits=99):
    def work(batch, micro):
        log.append(name)
        if micro > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return turns.Side(name, work, lambda batch, micro: len(batch), lambda: log.append(f"-{name}"))


def test_sides_take_turns():
    log = []
    result = turns.measure([side("a", log), side("b", log)], BATCHES, CLOCK, CPU)
    assert log == ["a"] * 2 + ["b"] * 2 + (["a"] * 3 + ["b"] * 3) * 3
    assert result["ratios"]["b"].keys() == {"median", "min", "max"}
    assert [len(turn) for turn in result["sides"]["b"]["seconds_per_step"]] == [2, 2, 2]


def test_a_side_without_memory_goes_on_with_fewer_rows_in_a_pass():
    log = []
    result = turns.measure([side("a", log), side("b", log, fits=1)], BATCHES, CLOCK, CPU)
    report = result["sides"]["b"]
    assert report["status"] == "measured"
    assert report["out_of_memory_at"] == [4, 2]
    assert report["micro_batch"] == 1
    assert "2.00 GiB" in report["message"]
    assert log.count("-b") == 2
    assert result["sides"]["a"]["micro_batch"] == 4
    assert "b" in result["ratios"]


def test_a_side_that_never_fits_is_recorded_and_the_other_is_measured():
    result = turns.measure([side("a", []), side("b", [], fits=0)], BATCHES, CLOCK, CPU)
    assert result["sides"]["b"]["status"] == "out of memory"
    assert result["sides"]["b"]["out_of_memory_at"] == [4, 2, 1]
    assert result["sides"]["a"]["status"] == "measured"
    assert result["ratios"] == {}


def test_memory_that_runs_out_late_discards_what_was_timed_with_more_rows():
    calls = []

    def work(batch, micro):
        calls.append(micro)
        if micro == 4 and len(calls) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")

    late = turns.Side("late", work, lambda batch, micro: micro)
    result = turns.measure([side("a", []), late], BATCHES, CLOCK, CPU)
    report = result["sides"]["late"]
    assert report["micro_batch"] == 2
    assert len(report["seconds_per_step"]) == 2
    assert report["tokens_per_step"] == 2
    assert "late" in result["ratios"]


def test_a_slow_device_gets_shorter_turns():
    import time

    slow = turns.Side("slow", lambda batch, micro: time.sleep(0.02), lambda batch, micro: 1)
    clock = turns.Clock(rounds=2, steps=3, warm_up=0, seconds=0.06)
    result = turns.measure([slow], BATCHES, clock, CPU)
    assert result["steps_per_round"] == 1


def test_other_errors_are_no_lack_of_memory():
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        turns.guarded(fail)
    assert turns.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"))
    assert not turns.is_out_of_memory(ValueError("out of memory"))


# --- the device -----------------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as on a machine with a card of 80 GiB, with the real functions' signatures."""
    properties = SimpleNamespace(
        name="Card", major=9, minor=0, multi_processor_count=132, total_memory=80 * GIB
    )
    answers = {
        "mem_get_info": (30 * GIB, 80 * GIB), "set_device": None, "synchronize": None,
        "set_per_process_memory_fraction": None, "get_device_properties": properties,
        "is_bf16_supported": True, "empty_cache": None, "reset_peak_memory_stats": None,
        "max_memory_allocated": 3 * GIB, "max_memory_reserved": 4 * GIB,
        "memory_allocated": GIB, "memory_reserved": 2 * GIB,
    }  # fmt: skip
    for name, value in answers.items():
        fake = create_autospec(getattr(torch.cuda, name), return_value=value)
        monkeypatch.setattr(torch.cuda, name, fake)
    return torch.device("cuda", 0)


def test_the_cap_is_a_share_of_the_device_and_never_more_than_it(cuda, capsys):
    assert machine.cap(cuda, 24) == {
        "cap": 24 * GIB, "total": 80 * GIB, "free_at_start": 30 * GIB
    }  # fmt: skip
    torch.cuda.set_per_process_memory_fraction.assert_called_with(24 / 80, cuda)
    assert capsys.readouterr().err == ""
    assert machine.cap(cuda, 100)["cap"] == 80 * GIB
    torch.cuda.set_per_process_memory_fraction.assert_called_with(1.0, cuda)
    assert "only 30.0 are free" in capsys.readouterr().err


def test_memory_is_read_from_the_allocator_of_the_device(cuda):
    turns.forget_peak(cuda)
    turns.synchronize(cuda)
    assert turns.peak(cuda) == {"allocated": 3 * GIB, "reserved": 4 * GIB}
    assert machine.outside_allocator(cuda) == (80 - 30 - 2) * GIB
    assert machine.cap(CPU, 24) is turns.peak(CPU) is None


def test_the_device_is_described_for_the_record(cuda):
    facts = machine.facts(cuda)
    assert (facts["name"], facts["capability"], facts["native_bfloat16"]) == ("Card", "9.0", True)
    json.dumps(facts)
    assert "Card, 80.0 GiB, capability 9.0" in table.text(
        record_of(exact={"status": "failed"}) | {"machine": facts}
    )


def test_a_card_without_bfloat16_is_told_apart(cuda):
    torch.cuda.is_bf16_supported.return_value = False
    record = record_of(exact={"status": "failed"}) | {"machine": machine.facts(cuda)}
    assert "no bfloat16 of its own" in table.text(record)


@pytest.mark.parametrize(
    ("device", "own", "seen"),
    [
        ("cuda", {}, "0"),
        ("cuda:2", {}, "2"),
        ("cuda:1", {"CUDA_VISIBLE_DEVICES": "3, 5"}, "5"),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-8f"}, "GPU-8f"),
        ("cpu", {"CUDA_VISIBLE_DEVICES": "3"}, ""),
    ],
)
def test_a_process_sees_one_device(device, own, seen):
    assert check.environment(device, own | {"HOME": "x"})["CUDA_VISIBLE_DEVICES"] == seen
    assert check.environment(device, own | {"HOME": "x"})["HOME"] == "x"


def test_without_bitsandbytes_nf4_is_not_available_and_bf16_is_measured(monkeypatch):
    absent = create_autospec(quantised.config, side_effect=ImportError("no bitsandbytes"))
    monkeypatch.setattr(quantised, "config", absent)
    sent = []
    given = check.arguments(["--device", "cpu", "--tiny", "--corpora", "friends"])
    given.child = "lora/bf16,lora/nf4,answers/nf4"
    assert check.child(given, sent.append) == 1
    results = {sent_["part"]: sent_["result"] for sent_ in sent if "result" in sent_}
    assert results["lora/bf16"]["status"] == "measured"
    assert results["lora/nf4"] == {"status": "not available", "reason": "no bitsandbytes"}
    assert "answers/nf4" not in results  # for the next process


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_part_runs_on_a_gpu(tmp_path):
    file = tmp_path / "gpu.json"
    assert check.main(["--tiny", "--json", str(file)]) == 0
    record = json.loads(file.read_text("utf-8"))
    trie = record["parts"]["lora/nf4"]["corpora"]["friends"]["sides"]["trie"]
    assert trie["peak_memory"]["allocated"] > 0


# --- the command ----------------------------------------------------------------------------------


def record_of(**parts_):
    given = check.arguments(["--device", "cpu", "--tiny", "--parts", ",".join(parts_)])
    return {
        "settings": {**vars(given), "parts": tuple(parts_)},
        "machine": {"name": "chip"},
        "versions": dict.fromkeys((*versions.PACKAGES, "git"), "1"),
        "started": "today",
        "parts": parts_,
    }


def test_a_part_that_kills_its_process_is_recorded_and_the_others_go_on(monkeypatch):
    shares = []

    def run_child(argv, share, given, take):
        shares.append(tuple(share))
        for part in share:
            if part == "lora/bf16":
                take({"part": part, "partial": {"corpora": {"friends": 1}}})
                return "the process was ended by SIGSEGV"
            if part == "lora/nf4":
                take({"part": part, "result": {"status": "not available", "reason": "no bnb"}})
                return "the process ended with exit code 1"
            take({"part": part, "result": {"status": "measured"}})
        return None

    monkeypatch.setattr(check, "run_child", run_child)
    given = check.arguments(["--tiny", "--device", "cpu"])
    record = {"parts": {}, "machine": None}
    check.run_parts([], given, record, lambda: None)
    status = {part: result["status"] for part, result in record["parts"].items()}
    assert status.pop("lora/bf16") == "failed"
    assert status.pop("lora/nf4") == "not available"
    assert set(status.values()) == {"measured"}
    assert len(status) == 5
    assert record["parts"]["lora/bf16"]["corpora"] == {"friends": 1}
    assert "SIGSEGV" in record["parts"]["lora/bf16"]["reason"]
    assert [share[0] for share in shares] == ["exact", "p_tuning_v2/bf16", "p_tuning_v2/nf4"]


def test_on_a_gpu_every_part_has_a_process_of_its_own(monkeypatch):
    shares = []

    def run_child(argv, share, given, take):
        shares.append(tuple(share))
        take({"part": share[0], "result": {"status": "measured"}})

    monkeypatch.setattr(check, "run_child", run_child)
    check.run_parts([], check.arguments([]), {"parts": {}}, lambda: None)
    assert shares == [(part,) for part in parts.PARTS]


def test_the_record_is_good_only_if_all_was_measured_and_exact():
    measured = {"status": "measured"}
    assert table.good(record_of(exact={**measured, "passed": True}))
    assert not table.good(record_of(exact={**measured, "passed": False}))
    assert not table.good(record_of(exact={"status": "failed"}))
    record = record_of(exact=measured)
    record["parts"] = {}
    assert not table.good(record)


def test_the_table_tells_what_failed_and_what_did_not_fit():
    out = {"status": "out of memory", "out_of_memory_at": [2, 1], "message": "no room"}
    trie = {
        "status": "measured", "micro_batch": 2, "out_of_memory_at": [], "message": None,
        "examples_per_second": {"median": 3.0, "min": 2.0, "max": 4.0}, "tokens_per_step": 300,
        "peak_memory": {"allocated": 3 * 2**30, "reserved": 4 * 2**30},
    }  # fmt: skip
    corpus = {"rows": "corpus", "batch": 16, "sides": {"trie": trie, "padded": out}, "ratios": {}}
    text = table.text(
        record_of(
            **{
                "exact": {"status": "failed", "reason": "RuntimeError: broken"},
                "lora/bf16": {"status": "measured", "corpora": {"friends": corpus}},
            }
        )
    )
    assert "exact: failed: RuntimeError: broken" in text
    assert "out of memory" in text
    line = next(line for line in text.splitlines() if line.startswith("    trie"))
    assert line.split() == ["trie", "3.00", "2.00", "4.00", "300", "3.00", "4.00", "2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parts", "lora"], "unknown lora (known: exact, lora/bf16"),
        (["--corpora", "meld"], "unknown meld (known: friends, sst5)"),
        (["--device", "cpu"], "add --tiny"),
        (["--device", "tpu"], "found tpu, expected cuda, cuda:N or cpu"),
        (["--cap", "0"], "--cap: expected more than 0"),
        (["--steps", "0"], "--steps: expected 1 or more"),
        (["--data-root", "x"], "belong together"),
        (["--json", "no/such/folder/x.json"], "--json: no folder"),
    ],
)
def test_wrong_arguments_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        check.main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_in_one_message_and_exits_with_2(capsys):
    assert check.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: no CUDA device: ")
    assert err.count("\n") == 1
    assert "--device cpu --tiny" in err


def test_a_missing_corpus_is_told_before_anything_runs(tmp_path, capsys):
    argv = ["--device", "cpu", "--tiny", "--data-root", str(tmp_path)]
    assert check.main([*argv, "--tokenizer", str(tmp_path / "tokenizer.model")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: friends: no file ")
    assert err.count("\n") == 1


def test_parts_and_corpora_are_called_alike_everywhere():
    assert check.PARTS == parts.PARTS
    assert check.CORPORA == rows.CORPORA


def test_the_command_writes_table_and_record(tmp_path):
    file = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, GPU / "check.py", "--device", "cpu", "--tiny", "--parts",
         "exact,lora/bf16", "--corpora", "sst5", "--seed", "5", "--json", file],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "exact (float32, small model): passed" in done.stdout
    assert "trie / padded to 193:" in done.stdout
    record = json.loads(file.read_text("utf-8"), parse_constant=pytest.fail)
    assert record["settings"]["seed"] == 5
    assert record["settings"]["parts"] == ["exact", "lora/bf16"]
    assert record["command"].startswith("scripts/gpu/check.py --device cpu")
    assert record["started"] <= record["finished"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["type"] == "cpu"
    assert record["parts"]["exact"]["passed"]
    assert list(record["parts"]["lora/bf16"]["corpora"]) == ["sst5"]
