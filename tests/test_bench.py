"""The benchmark compares like with like; its timings are not tested."""

import importlib.util
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from benches import common, load
from torch.utils.flop_counter import FlopCounterMode

from llm_emo import attention, branches, decoder_layer, packed
from llm_emo.encoding import Encoded
from llm_emo.errors import JobFailed, RecipeError, RunError
from llm_emo.inference import score
from llm_emo.lean import lean
from llm_emo.steps import Steps
from llm_emo.training import answer_loss, collate
from llm_emo.trie import TokenTrie, node_logits

bench = load("train")
harness, matrix, trainers = common("harness"), common("matrix"), common("trainers")

LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra: bench)"
)
peers = pytest.mark.parametrize(
    "side",
    [
        pytest.param("trl", marks=needs_trl),
        pytest.param("trl_padding_free", marks=needs_trl),
        "padded",
        "padded_193",
    ],
)
ROWS = [*tiny.encoded(11), tiny.encoded(1)[0]]  # one row stands there twice


def trainer(side, folder, method="lora", **changes):
    """The trainer of a side over the tiny model: three steps of four rows."""
    return trainers.trainer_of(
        side,
        tiny.adapted("llama", method),
        tiny.tokenizer(),
        [ROWS[start : start + 4] for start in (0, 4, 8)],
        tiny.train(**changes),
        folder=folder,
        seed=1,
    )


def pairs_of(rows):
    return Counter(
        ((*row.prompt, *row.answer[:at]), token)
        for row in rows
        for at, token in enumerate(row.answer)
    )


@peers
def test_each_step_of_each_side_trains_the_same_tokens_after_the_same_tokens(side, tmp_path):
    ours = [trainers.trained(batch) for batch in trainers.batches(trainer("llm_emo", tmp_path))]
    theirs = [trainers.trained(batch) for batch in trainers.batches(trainer(side, tmp_path))]
    assert theirs == ours
    assert [pairs.total() for pairs in ours] != [0, 0, 0]
    assert sum(ours, Counter()) == pairs_of(ROWS)


@peers
def test_each_step_of_each_side_has_the_same_loss(side, tmp_path):
    _, ours = trainers.timed(
        trainer("llm_emo", tmp_path / "a", schedule="cosine", warmup_ratio=0.4)
    )
    _, theirs = trainers.timed(trainer(side, tmp_path / "b", schedule="cosine", warmup_ratio=0.4))
    assert len(ours) == 3
    assert theirs == pytest.approx(ours, rel=1e-4)
    # The second step would have another loss if the first had not learned alike.
    still = trainers.timed(trainer("llm_emo", tmp_path / "c", learning_rate=1e-9))[1]
    assert abs(still[-1] - ours[-1]) > 1e-2


@pytest.mark.parametrize("side", ["llm_emo", "padded", pytest.param("trl", marks=needs_trl)])
def test_the_checked_loss_is_that_of_the_first_step(side, tmp_path):
    made = trainer(side, tmp_path)
    batch = trainers.batches(made)[0]
    checked = trainers.loss_of(made, batch, trainers.trained(batch).total())
    assert trainers.timed(made)[1][0] == pytest.approx(checked, rel=1e-6)


def test_seconds_run_from_step_to_step(tmp_path):
    seconds, losses = trainers.timed(trainer("llm_emo", tmp_path))
    assert len(seconds) == len(losses) - 1
    assert all(second > 0 for second in seconds)


def test_what_is_done_between_steps_is_off_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    made = trainer("llm_emo", tmp_path)
    step = made.training_step

    def slow(*args, **kwargs):
        now[0] += 2.0
        return step(*args, **kwargs)

    def between():
        now[0] += 100.0

    made.training_step = slow
    monkeypatch.setattr(trainers.time, "perf_counter", lambda: now[0])
    assert trainers.timed(made, between)[0] == [2.0, 2.0]


def test_what_a_padded_batch_trains_is_read_from_its_labels():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]]),
    }
    assert trainers.trained(batch) == {((5, 6), 7): 1, ((5, 6, 7), 8): 1, ((5,), 9): 1}
    assert trainers.tokens_in(batch) == 8


def test_the_steps_are_the_first_that_the_program_itself_would_train():
    rows = tiny.encoded(50)
    section = tiny.train(batch_size=8, micro_batch_size=8)
    dialogues = [list(range(start, min(start + 3, 50))) for start in range(0, 50, 3)]
    found = []
    for together, epoch in itertools.product((None, dialogues), (0, 1)):
        sampler = Steps(rows, section, seed=4, dialogues=together)
        sampler.set_epoch(epoch)
        own = [[rows[row] for part in step for row in part] for step in sampler]
        found.append(trainers.drawn(rows, section, 5, 4, together, epoch=epoch))
        assert found[-1] == own[:5]
        assert [len(step) for step in found[-1]] == [8] * 5
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert trainers.drawn(rows, section, 5, 3, None) != found[0]
    with pytest.raises(RunError, match=r"56 rows are wanted, but train has 50"):
        trainers.drawn(rows, section, 7, 0, None)


@pytest.mark.parametrize(
    ("options", "batch_by"),
    [
        (["--recipe", "friends/lora_dialogue"], "dialogue"),
        (["--recipe", "friends/lora_dialogue", "--by", "row"], "row"),
        (["--recipe", "friends/lora"], "row"),
        (["--recipe", "friends/lora", "--by", "dialogue"], "dialogue"),
    ],
)
def test_a_step_is_filled_as_the_recipe_says_unless_another_way_is_asked_for(options, batch_by):
    assert bench.recipe_of(bench.arguments(options)).train.batch_by == batch_by


def test_a_row_longer_than_what_the_original_pads_to_is_refused(tmp_path):
    long = [Encoded("a", tuple(range(5, 198)), (2,))]
    with pytest.raises(RunError, match=r"a row has 194 tokens; set prompt.max_length=193"):
        trainers.trainer_of(
            "padded_193", tiny.adapted("llama", "lora"), tiny.tokenizer(), [long],
            tiny.train(), folder=tmp_path, seed=1,
        )  # fmt: skip


def test_prefix_tuning_of_peft_starts_from_the_same_prefix(tmp_path):
    made = [trainer(side, tmp_path / side, "p_tuning_v2") for side in ("llm_emo", "peft_prefix")]
    batches = [trainers.batches(each)[0] for each in made]
    ours, theirs = (trainers.trained(batch) for batch in batches)
    assert ours == theirs
    losses = [
        trainers.loss_of(each, batch, ours.total())
        for each, batch in zip(made, batches, strict=True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with torch.no_grad():  # the loss depends on the prefix at all
        made[1].model.prompt_encoder["default"].embedding.weight.zero_()
    assert abs(trainers.loss_of(made[1], batches[1], ours.total()) - losses[0]) > 1e-3


def test_a_prefix_with_a_projection_has_no_counterpart_in_peft():
    model = tiny.adapted("llama", "p_tuning_v2", projection=True, projection_size=8)
    with pytest.raises(RecipeError, match="without projection"):
        trainers.peft_prefix(model)


def result(rate, *, trained="a"):
    return {"examples_per_second": rate, "trained": trained}


def test_a_ratio_is_taken_round_by_round():
    results = {"llm_emo": [result(8.0), result(4.0)], "trl": [result(1.0), result(1.0)]}
    assert harness.ratios(results, "examples_per_second") == {"trl": [8.0, 4.0]}


@pytest.mark.parametrize("loss", [1.00002, math.nan])
def test_sides_with_different_losses_are_not_compared(loss):
    bench.require_same({"llm_emo": 1.0, "trl": 1.000001}, {"llm_emo": []})
    with pytest.raises(JobFailed, match="trl"):
        bench.require_same({"llm_emo": 1.0, "trl": loss}, {"llm_emo": []})


def test_sides_with_different_targets_are_not_compared():
    same = {"llm_emo": [result(1.0)], "trl": [result(1.0)]}
    bench.require_same({"llm_emo": 1.0}, same)
    with pytest.raises(JobFailed, match="trl trained on other tokens"):
        bench.require_same({"llm_emo": 1.0}, same | {"trl": [result(1.0, trained="b")]})


def test_the_arguments_of_the_help_text_parse():
    given = bench.arguments(
        ["--data-root", "data", "--recipe", "sst2/lora", "--steps", "2", "--rounds", "1",
         "--peers", "trl,padded", "--set", "model.dtype=float32", "-o", "out.json"]
    )  # fmt: skip
    assert given.peers == ["trl", "padded"]
    assert given.overrides == ["model.dtype=float32"]
    assert (given.steps, given.rounds, given.batch_size) == (2, 1, 16)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "trl,unsloth"], "unknown unsloth"),
        (["--peers", "llm_emo"], "unknown llm_emo"),
        (["--steps", "0"], "--steps: expected 1 or more"),
    ],
)
def test_wrong_arguments_exit_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.arguments(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_without_trl_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(trainers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install -e .\[bench\]"):
        bench.peers_for(bench.arguments([]), "lora")
    assert bench.peers_for(bench.arguments(["--peers", "padded"]), "lora") == ["padded"]


def test_a_peer_is_measured_only_with_the_method_it_trains():
    assert bench.peers_for(bench.arguments([]), "p_tuning_v2") == ["peft_prefix"]
    with pytest.raises(RunError, match="padded does not train method p_tuning_v2"):
        bench.peers_for(bench.arguments(["--peers", "padded"]), "p_tuning_v2")
    with pytest.raises(RunError, match="peft_prefix does not train method lora"):
        bench.peers_for(bench.arguments(["--peers", "peft_prefix"]), "lora")


def test_encoded_rows_become_labels_behind_the_prompt():
    assert list(trainers.labelled([Encoded("a", (3, 4), (7, 2))])) == [
        {"input_ids": [3, 4, 7, 2], "attention_mask": [1] * 4, "labels": [-100, -100, 7, 2]}
    ]


# --- operations and shares ----------------------------------------------------------------------


def in_all_layers(model, depths, counted, **kwargs):
    """Count linear layers and head of a pass whose last layer computes every state."""
    everywhere = matrix.operations(model, depths, depths, **kwargs)
    assert everywhere["linear"] > counted["linear"]
    assert everywhere["attention"] > counted["attention"] > 0  # torch counts it in some kernels
    return everywhere["linear"] + everywhere["adapter"] + counted["head"]


@pytest.mark.parametrize("method", tiny.METHODS)
def test_the_operations_of_a_step_are_those_that_torch_counts(method, monkeypatch):
    monkeypatch.setattr(decoder_layer, "worthwhile", lambda size: False)  # nor others' products
    monkeypatch.setattr(branches, "SHARE", 0.0)  # torch does not count products added in place
    model = tiny.adapted("llama", method)
    rows = tiny.encoded(4)
    with FlopCounterMode(display=False) as counter:
        answer_loss(model, collate(rows)).backward()
    prefix = 4 if method == "p_tuning_v2" else 0
    counted, _, _ = matrix.of_step(model, [(row.prompt, row.answer) for row in rows], prefix=prefix)
    depths = matrix.depths_in([(*row.prompt, *row.answer[:-1]) for row in rows])
    found = counter.get_flop_counts()["Global"]
    assert in_all_layers(model, depths, counted, prefix=prefix, training=True) == sum(
        found[op] for op in LINEAR if op in found
    )


def test_a_peer_has_the_attention_and_the_layers_of_transformers():
    made = tiny.adapted("llama", "lora")
    lean(made)
    decoder_layer.write_out(made)
    ours = [module for module in made.modules() if "forward" in vars(module)]
    assert len(ours) > 4
    harness.stock(made)
    assert not any("forward" in vars(module) for module in made.modules())
    assert made.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_operations_of_scoring_are_those_that_torch_counts(architecture):
    model, prompts = tiny.model(architecture), [row.prompt for row in tiny.encoded(4)]
    answers = [(7, 8, 2), (7, 9, 2), (11, 2)]
    with FlopCounterMode(display=False) as counter:
        list(score(model, prompts, answers, tokens_per_pass=1000))
    total, ((nodes, logits),) = matrix.of_scoring(model, [prompts], answers)
    depths = matrix.depths_in([(*p, *a[:-1]) for p in prompts for a in answers])
    read = [len(prompt) - 1 + at for prompt in prompts for at in (0, 1, 1, 2, 2)]
    counted = matrix.operations(model, depths, read, training=False)
    assert (nodes, logits, total) == (len(depths), len(read), sum(counted.values()))
    found = counter.get_flop_counts()["Global"]
    assert in_all_layers(model, depths, counted, training=False) == sum(
        found[op] for op in LINEAR if op in found
    )


def test_the_last_layer_is_counted_where_it_is_read(monkeypatch):
    monkeypatch.setattr(decoder_layer, "worthwhile", lambda size: False)  # torch counts no others
    model = tiny.model("llama").requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    decoder_layer.write_out(model)
    trie = TokenTrie.build([row.prompt + row.answer for row in tiny.encoded(9, shared=9)])
    with FlopCounterMode(display=False) as counter:
        node_logits(model, trie, trie.last)
    depths, read = trie.depth.tolist(), trie.depth[trie.last].tolist()
    counted = matrix.operations(model, depths, read, training=False)
    # Queries are not needed where nothing is read; gathering them would cost as much.
    query = model.model.layers[-1].self_attn.q_proj.weight.numel()
    needless = 2 * (len(depths) - len(read)) * query
    found = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted["linear"] + counted["head"] + needless == found


def test_attention_is_counted_along_each_tokens_own_path():
    depths = matrix.depths_in([(5, 6, 7), (5, 6, 8)])
    assert matrix.pairs_in(depths) == 1 + 2 + 3 + 3
    assert matrix.pairs_in(depths, prefix=4) == 1 + 2 + 3 + 3 + 4 * 4


def test_a_profile_says_what_time_went_to():
    def event(key, shapes, seconds, count=1):
        return SimpleNamespace(
            key=key, input_shapes=shapes, count=count,
            self_cpu_time_total=seconds * 1e6, self_device_time_total=0.0,
        )  # fmt: skip

    text = bench.by_kind(
        [
            event("aten::mm", [[50, 64], [64, 100]], 3.0, count=2),
            event("mkldnn::_linear_pointwise", [[50, 64], [100, 64], [], [], [], []], 1.0),
            event("aten::addmm_", [[50, 64], [50, 8], [8, 64], [], []], 1.0),
            event("aten::bmm", [[3, 50, 64], [3, 64, 50]], 0.5),
            event("aten::baddbmm_", [[3, 50, 50], [3, 50, 64], [3, 64, 50]], 0.5),
            event("aten::mm", [[5, 64], [64, 999]], 1.0),
            event("mkldnn::_linear_pointwise", [[5, 64], [999, 64], [], [], [], []], 0.5),
            event("mkldnn::_linear_pointwise", [[5, 999], [64, 999], [], [], [], []], 0.5),
            event("aten::mul", [[50, 64], [50, 64]], 2.0),
        ],
        vocabulary=999,
        ranks={8, 16, 24},
    )
    shares = {line[:26].strip(): line[26:].split() for line in text.splitlines()}
    assert shares["products of frozen layers"][0] == "40.0%"
    assert shares["products of the adapter"][0] == shares["products of attention"][0] == "10.0%"
    assert shares["products of the head"][0] == shares["all else"][0] == "20.0%"
    assert "1.25 times as fast" in text
    _, done = bench.kind_of("aten::baddbmm_", [[3, 50, 50], [3, 50, 64], [3, 64, 50]], 999, set())
    assert done == 2 * 3 * 50 * 64 * 50


@pytest.mark.parametrize("training", [True, False])
def test_the_products_alone_are_those_that_are_counted(training, monkeypatch):
    monkeypatch.setattr(decoder_layer, "worthwhile", lambda size: False)  # torch counts no others
    model = tiny.adapted("llama", "lora")
    products = matrix.Products(model, nodes=8, logits=3, training=training)
    with FlopCounterMode(display=False) as counter:
        seconds = products.several(2)
    assert counter.get_total_flops() == 3 * products.operations  # once for warming up
    counted = matrix.operations(model, range(8), range(3), training=training)
    # One product with keys and values, so the last layer's queries are of all nodes.
    query = model.base_model.model.model.layers[-1].self_attn.q_proj.base_layer.weight.numel()
    needless = 2 * 5 * query * (2 if training else 1)
    assert products.operations == counted["linear"] + counted["head"] + needless
    # How fast is a benchmark's matter: a machine that does much else may be very slow.
    assert len(seconds) == 2
    assert all(second > 0 for second in seconds)


def test_the_products_alone_are_by_the_copies_that_a_step_uses(monkeypatch):
    calls = []
    for name in ("product", "back"):
        monkeypatch.setattr(packed.Packed, name, lambda *args, name=name: calls.append(name))
    if not packed.available(torch.float32):
        pytest.skip("no copies of weights are kept on this machine")
    model = tiny.adapted("llama", "lora")
    layers = len(model.base_model.model.model.layers)
    matrix.Products(model, nodes=8, logits=3, training=True).seconds()
    # And the head's; nobody asks the first layer's q, k and v for the gradient of embeddings.
    assert Counter(calls) == {"product": 4 * layers + 1, "back": 4 * layers}


def test_a_round_warms_up_by_its_largest_steps():
    def row(number, size):
        return Encoded(str(number), tuple(range(5, 4 + size)), (2,))

    alike, apart, long = [row(0, 9)] * 3, [row(1, 9), row(2, 3)], [row(3, 20), row(4, 2)]
    different = [Encoded("5", (50, 51, 52, 53), (2,)), Encoded("6", tuple(range(60, 90)), (2,))]
    steps = [alike, apart, different, long]
    # Padded: 27, 18, 62, 40 tokens; distinct ones: 9, 10, 36, 22.
    assert bench.warmed_up(steps) == [different, different, *steps]
    assert bench.warmed_up([alike, apart]) == [alike, apart, alike, apart]
    assert bench.warmed_up([alike * 9, long]) == [alike * 9, long, alike * 9, long]


def test_what_training_needs_is_counted_step_by_step():
    model, recipe = tiny.model("llama"), SimpleNamespace(method=tiny.lora())
    steps = [tiny.encoded(2), tiny.encoded(6), tiny.encoded(4)]
    needed = matrix.of_training(model, recipe, steps)
    alone = [matrix.of_training(model, recipe, [step]) for step in steps]
    for kind, count in needed["operations"].items():
        assert count == sum(one["operations"][kind] for one in alone)
    assert needed["nodes"] == [one["nodes"][0] for one in alone]
    products = matrix.products_of_training(model, needed)
    assert products.sizes == {"nodes": alone[2]["nodes"][0], "logits": alone[2]["logits"][0]}


def test_the_rate_is_the_mean_of_the_time_that_products_took():
    products = matrix.Products(tiny.model("llama"), nodes=8, logits=3, training=True)
    rate = products.rate([1.0, 3.0])
    assert rate["operations_per_second"] == products.operations / 2
    assert rate["measured_at"] == {"nodes": 8, "logits": 3}


def test_twice_the_time_is_half_the_share():
    own = {
        "matrix": {"operations": {"linear": 6e9, "head": 2e9}, "operations_per_second": 1e9},
        "seconds_per_step": [4.0, 6.0],
    }
    assert harness.share_of(own, own) == pytest.approx(0.8)
    assert harness.share_of(own, {"seconds_per_step": [20.0]}) == pytest.approx(0.4)
    # Who took other steps says what they needed.
    other = {"seconds": 20.0, "operations": {"linear": 4e9}}
    assert harness.share_of(own, other) == pytest.approx(0.2)


def measured(side, rate, trl=None):
    versions = {"torch": "2.0", "transformers": "5.0", "peft": "0.2", "trl": trl}
    versions = {name: version for name, version in versions.items() if version}
    return result(rate) | {
        "machine": {
            "versions": versions, "started": "today", "cpu": "chip", "gpu": None,
            "cores": 2, "threads": 1,
        },
        "model": "tiny",
        "method": {"kind": "lora", "rank": 8},
        "dtype": "bfloat16",
        "device": "cpu",
        "losses": [1.0 if side == "llm_emo" else 1.25],
        "targets": 40,
        "tokens_per_step": 100.0,
        "tokens_of_rows_per_step": 300.0,
        "peak_memory_bytes": (3 if side == "llm_emo" else 12) * 2**20,
        "seconds_per_step": [1 / rate],
        "matrix": {
            "operations": {"linear": 9e8, "head": 1e8}, "operations_per_second": 2e10,
            "nodes": [100], "measured_at": {"nodes": 100, "logits": 7},
        } if side == "llm_emo" else None,
    }  # fmt: skip


def test_the_report_shows_rates_ratios_differences_and_versions():
    results = {
        "llm_emo": [measured("llm_emo", rate) for rate in (12.0, 20.0, 14.0)],
        "padded": [measured("padded", rate) for rate in (4.0, 4.0, 4.0)],
        "trl": [measured("trl", rate, trl="1.16.0") for rate in (2.0, 2.0, 2.0)],
    }
    harness.with_shares(results)
    losses = {"llm_emo": 1.0, "padded": 1.0, "trl": 1.000001}
    text = bench.report(losses, results, bench.arguments(["--peers", "padded"]))
    assert "torch 2.0, transformers 5.0, peft 0.2, trl 1.16.0" in text
    assert "llm_emo / trl: 7.00x (rounds: 6.00, 10.00, 7.00), 25% of its memory" in text
    assert "llm_emo / padded: 3.50x" in text
    assert "differ by 1.0e-06 in float32, 2.5e-01 in bfloat16" in text
    assert "120 targets" in text
    assert "matrix products alone at 100 nodes and 7 logits: 20.0 GFLOP/s" in text
    assert "a step needs 1.0 GFLOP of distinct tokens: linear 90%, head 10%" in text
    row = next(line for line in text.splitlines() if line.startswith("llm_emo "))
    assert row.split() == ["llm_emo", "14.00", "12.00", "20.00", "100", "70%", "3", "MiB"]


# --- LLaMA-Factory ------------------------------------------------------------------------------


def test_llama_factory_gets_the_rows_in_their_order_and_the_programs_arguments(
    tmp_path, tiny_folder
):
    from datasets import load_from_disk

    from llm_emo import recipes

    factory = common("llama_factory")
    recipe = recipes.load(
        "mastodon/lora",
        [f"model.name={tiny_folder}", "model.dtype=float32", "train.batch_size=4",
         "train.micro_batch_size=4", "train.learning_rate=3e-3"],
    )  # fmt: skip
    written = factory.prepare(tmp_path, recipe, [ROWS[:4], ROWS[4:8]], 1)
    arguments = json.loads(written.read_text())["arguments"]
    model = Path(arguments["model_name_or_path"])
    assert {file.name for file in model.iterdir()} == {file.name for file in tiny_folder.iterdir()}
    assert json.loads((model / "config.json").read_text())["dtype"] == "float32"
    assert (model / "model.safetensors").samefile(tiny_folder / "model.safetensors")
    assert (arguments["lora_rank"], arguments["lora_alpha"], arguments["bf16"]) == (8, 16, False)
    assert arguments["lora_target"] == "q_proj,k_proj,v_proj,o_proj"
    assert (arguments["learning_rate"], arguments["per_device_train_batch_size"]) == (3e-3, 4)
    rows = load_from_disk(arguments["tokenized_path"])["train"]
    assert [row["input_ids"] for row in rows] == [[*r.prompt, *r.answer] for r in ROWS[:8]]
    assert rows[0]["labels"] == [-100] * len(ROWS[0].prompt) + list(ROWS[0].answer)


def test_a_peer_whose_packages_cannot_be_had_is_left_out_and_named(monkeypatch):
    def fails():
        raise JobFailed("no matching distribution")

    monkeypatch.setattr(bench.llama_factory, "python", fails)
    sides, why = bench.to_be_had(["llm_emo", "llama_factory", "padded"])
    assert sides == ["llm_emo", "padded"]
    assert "llama_factory" in why[0]
    assert "no matching distribution" in why[0]
    assert bench.to_be_had(["llm_emo", "trl"]) == (["llm_emo", "trl"], [])
