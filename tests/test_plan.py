"""What `plan` says is what runs, and what it suggests fits."""

import json
from pathlib import Path

import program
import pytest
from program import FIXTURES

from llm_emo import decoder_layer, recipes, tables
from llm_emo import plan as planning
from llm_emo import planner as planner_module
from llm_emo.encoding import Encoder
from llm_emo.errors import RecipeError, RunError
from llm_emo.experiment import Experiment, dialogues_of
from llm_emo.models import auto
from llm_emo.planner import GIB, Place, Planner
from llm_emo.sizes import parse_memory
from llm_emo.steps import Steps
from llm_emo.training import collate
from llm_emo.trie import begin

FULL = ("method={kind: full}",)


def experiment(model, *values, recipe="mastodon/lora"):
    small = program.SMALL if recipes.load(recipe).train else program.SMALL[:1]
    chosen = [f"model.name={model}", *small, *values]
    return Experiment.prepare(recipes.load(recipe, chosen), FIXTURES)


def on_gpu(given, capacity):
    return Planner(given, Place.of(capacity))


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), (" 1.5 gib ", 1.5 * 2**30), ("512MiB", 2**29)],
)
def test_memory_is_read_with_its_unit(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "24 apples", "-1GiB", "0GiB", "", "24GiBs"])
def test_memory_without_a_number_or_unit_is_refused(text):
    with pytest.raises(RunError, match="expected a number with its unit, such as 24GiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        ("mastodon/lora", ()),
        ("mastodon/lora", ("train.micro_batch_size=3", "train.tokens_per_pass=150")),
        ("friends/lora_dialogue", ("train.batch_size=4", "train.tokens_per_pass=150")),
    ],
)
def test_tokens_and_steps_are_those_of_training(tiny_folder, recipe, values):
    given = experiment(tiny_folder, "train.epochs=7", *values, recipe=recipe)
    result = planning.plan(given, gpu_memory=GIB)["training"]
    tokenizer = auto.load_tokenizer(given.recipe.model)
    rows = Encoder(tokenizer, given.recipe.prompt.max_length).encode(given.examples("train"))
    train = given.recipe.train
    steps = Steps(rows, train, seed=given.recipe.seed, dialogues=dialogues_of(given))
    tries, several = [], False
    for epoch in range(train.epochs):
        steps.set_epoch(epoch)
        for step in steps:
            tries += [collate([rows[row] for row in batch])["trie"] for batch in step]
            several |= len(step) > 1
    assert several, "more passes than steps"
    assert result["tokens_run"] == sum(map(len, tries))
    assert result["tokens_saved"] == sum(trie.saved for trie in tries)
    assert result["largest"] == max(map(len, tries))
    assert result["micro_batches"] == len(tries)
    assert result["steps"] == train.epochs * -(-len(rows) // train.batch_size)


@pytest.mark.parametrize("mode", ["score", "generate"])
def test_passes_are_those_of_an_evaluation(tiny_folder, mode, monkeypatch):
    from llm_emo import inference
    from llm_emo.trie import TokenTrie
    from llm_emo.workload import Workload

    given = experiment(tiny_folder, f"inference.mode={mode}", "inference.max_new_tokens=3")
    work = Workload.of(given)
    found = work.passes(100)
    built, build = [], TokenTrie.build.__func__
    monkeypatch.setattr(
        TokenTrie,
        "build",
        classmethod(lambda cls, rows: built.append(build(cls, rows)) or built[-1]),
    )
    model = auto.load(given.recipe.model, given.recipe.method).model
    if mode == "score":
        list(inference.score(model, work.prompts, work.answers, tokens_per_pass=100))
    else:
        list(inference.generate(
            model, work.prompts, ends=frozenset(), max_new_tokens=3, tokens_per_pass=100
        ))  # fmt: skip
    assert len(found.groups) > 1
    # What all prompts begin with is run once and for all, in front of the first pass.
    ahead = [len(trie) for trie in built[: len(built) - len(found.groups)]]
    assert found.ahead.tolist() == ahead
    assert len(ahead) == 1
    assert found.nodes.tolist() == [len(trie) for trie in built[len(ahead) :]]
    assert set(found.behind.tolist()) == set(ahead)
    assert found.run == sum(map(len, built))


@pytest.mark.parametrize("budget", [100, 10_000])
def test_a_beginning_that_all_windows_share_is_counted_once(tiny_folder, budget, monkeypatch):
    from llm_emo import inference
    from llm_emo.workload import Workload

    monkeypatch.setattr(inference, "WINDOW", 3)
    work = Workload.of(experiment(tiny_folder, "inference.mode=score"))
    found = work.passes(budget)
    begun = []
    monkeypatch.setattr(
        inference, "begin", lambda model, ids: begun.append(len(ids)) or begin(model, ids)
    )
    model = auto.load(work.experiment.recipe.model, work.experiment.recipe.method).model
    list(inference.score(model, work.prompts, work.answers, tokens_per_pass=budget))
    assert found.ahead.tolist() == begun
    assert len(begun) <= 1 < len(found.groups)
    # Less what is spared, it is what every pass would run by itself.
    whole = work.passes(budget).nodes + found.behind
    spared = int(found.behind.sum() - found.ahead.sum())
    assert found.run == int(whole.sum()) - spared


def test_a_suggestion_fits_and_is_a_recipe(tiny_folder):
    batch = ("train.batch_size=16", "train.micro_batch_size=16")
    given = experiment(tiny_folder, *batch)
    own = on_gpu(given, GIB).own.needed
    least = min(choice.needed for choice in on_gpu(given, GIB).choices)
    assert least < own
    result = planning.plan(given, gpu_memory=int(least + own) // 2)
    assert not result["memory"]["fits"]
    suggestion = result["suggestion"]
    assert suggestion["fits"]
    assert suggestion["needed"] <= result["capacity"]
    assert suggestion["relative_time"] == 1
    assert all(row["relative_time"] >= 1 for row in result["choices"] if row["fits"])
    assert all(f"--set {option}" in result["verdict"] for option in suggestion["set"])
    again = planning.plan(
        experiment(tiny_folder, *batch, *suggestion["set"]), gpu_memory=result["capacity"]
    )
    assert again["memory"]["fits"]
    assert again["memory"]["needed"] == pytest.approx(suggestion["needed"], rel=1e-6)
    assert again["verdict"].startswith("FITS")


def test_a_budget_of_tokens_is_the_largest_power_of_two_that_fits(tiny_folder):
    batch = ("train.batch_size=16", "train.micro_batch_size=4")
    given = experiment(tiny_folder, *batch)
    roomy = on_gpu(given, 100 * GIB)
    whole = roomy.by_tokens(roomy.own)
    step = int(roomy.batches(16, None).nodes.max())
    assert step <= whole.budget < 2 * step
    assert len(roomy.batches(16, whole.budget).rows) == roomy.work.steps, "a step is one pass"
    half = roomy.choice("none", False, 16, whole.budget // 2, whole.tokens_per_pass)
    assert half.needed < whole.needed
    narrow = on_gpu(given, int(half.needed + whole.needed) // 2)
    found = narrow.by_tokens(narrow.own)
    assert found.budget == whole.budget // 2
    assert narrow.fits(found)
    assert narrow.options(found) == [
        "train.micro_batch_size=16", f"train.tokens_per_pass={found.budget}"
    ]  # fmt: skip
    drawn = narrow.batches(16, found.budget)
    assert all(len(rows) == 1 for rows, n in zip(drawn.rows, drawn.nodes, strict=True)
               if n > found.budget)  # fmt: skip
    result = planning.plan(given, gpu_memory=narrow.place.capacity)
    assert result["by_tokens"]["fits"]
    recipes.load("mastodon/lora", result["by_tokens"]["set"])


def test_where_nothing_is_trained_no_tokens_are_suggested_for_it(tiny_folder):
    given = experiment(tiny_folder, recipe="mastodon/zero_shot")
    assert planning.plan(given, gpu_memory=GIB)["by_tokens"] is None


def test_where_nothing_fits_the_verdict_says_what_is_missing(tiny_folder):
    result = planning.plan(experiment(tiny_folder), gpu_memory=2**20)
    assert result["suggestion"] is None
    assert result["verdict"].startswith("DOES NOT FIT a GPU")
    assert "still" in result["verdict"]


def test_passes_shrink_where_the_evaluation_is_what_does_not_fit(tiny_folder, monkeypatch):
    monkeypatch.setattr(planner_module, "LEAST_TOKENS_PER_PASS", 32)
    given = experiment(tiny_folder, "inference.tokens_per_pass=4096")
    planner = on_gpu(given, GIB)
    own, small = planner.own, planner.evaluation("none", 64)
    assert own.evaluation.peak > own.training.peak > small.peak
    room = own.fixed + own.allowance + (own.evaluation.peak + own.training.peak) / 2
    result = planning.plan(given, gpu_memory=int(room))
    assert not result["memory"]["fits"]
    assert result["suggestion"]["tokens_per_pass"] < 4096
    assert any(o.startswith("inference.tokens_per_pass=") for o in result["suggestion"]["set"])


def test_more_rows_and_fewer_recomputations_need_more(tiny_folder):
    planner = on_gpu(experiment(tiny_folder, "train.batch_size=8"), GIB)
    sizes = planner.micro_batch_sizes
    for kept in ("none", "nf4", "int8"):
        peaks = [planner.training(kept, False, micro, None, 512).peak for micro in sizes]
        assert peaks == sorted(peaks)
        deep = [planner.training(kept, True, micro, None, 512).peak for micro in sizes]
        assert all(few < many for few, many in zip(deep, peaks, strict=True))


def test_a_recipe_that_trains_nothing_is_planned_for_its_test_split(tiny_folder):
    given = experiment(tiny_folder, recipe="mastodon/zero_shot")
    result = planning.plan(given, gpu_memory=GIB)
    assert result["training"] is None
    assert result["evaluation"]["split"] == "test"
    assert result["evaluation"]["rows"] == len(given.rows("test"))
    assert result["memory"]["stage"] == "evaluation"
    assert {row["quantization"] for row in result["choices"]} == {"none", "nf4", "int8"}
    assert result["trainable_parameters"] == 0
    assert result["operations"] > 0


def test_labelling_is_linear_in_the_texts(tiny_folder):
    given = experiment(tiny_folder, recipe="mastodon/zero_shot")
    found = [planning.plan(given, texts=texts)["labelling"] for texts in (1000, 1_000_000)]
    assert [one["texts"] for one in found] == [1000, 1_000_000]
    assert found[1]["operations"] == pytest.approx(1000 * found[0]["operations"])
    whole = planning.plan(given)
    assert "labelling" not in whole
    own = planning.plan(given, texts=whole["evaluation"]["rows"])["labelling"]
    assert own["operations"] == pytest.approx(whole["evaluation"]["operations"])
    assert own["seconds"] > 0
    assert planning.plan(given, gpu_memory=24 * 2**30, texts=5)["labelling"]["seconds"] is None


def test_full_fine_tuning_is_never_quantised_and_pays_for_its_optimiser(tiny_folder):
    result = planning.plan(experiment(tiny_folder, *FULL), gpu_memory=GIB)
    assert {row["quantization"] for row in result["choices"]} == {"none"}
    memory = result["memory"]
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "p_tuning_v2", "zero_shot"])
def test_chatglm2_is_planned_before_it_is_downloaded(method, monkeypatch, tiny_folder):
    load = auto.load_tokenizer  # not the bundled one: it would be fetched
    spec = recipes.load("mastodon/lora", [f"model.name={tiny_folder}"]).model
    monkeypatch.setattr(auto, "load_tokenizer", lambda _: load(spec))
    monkeypatch.setattr(planner_module, "MICRO_BATCHES", 2)
    recipe = recipes.load(f"mastodon/chatglm2_{method}", ["data.dev_fraction=0.3"])
    result = planning.plan(Experiment.prepare(recipe, FIXTURES), gpu_memory=24 * GIB)
    assert result["parameters"] == 6_243_584_000
    assert "chatglm2-6b is not there" in result["notes"][0]
    assert result["verdict"].startswith("FITS")
    assert result["seconds"] is None


def test_another_folder_that_is_not_there_is_an_error():
    recipe = recipes.load("mastodon/lora", ["model.name=./no/such/folder"])
    with pytest.raises(recipes.EmoError, match=r"no folder with a config\.json"):
        planning.plan(Experiment.prepare(recipe, FIXTURES), gpu_memory=GIB)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prediction_and_a_real_step_agree(tiny_folder, dtype):
    given = experiment(tiny_folder, f"model.dtype={dtype}")
    result = planning.plan(given, measure=True)
    for pair in (result["measured"]["saved"], result["measured"]["peak"]):
        assert pair["predicted"] == pytest.approx(pair["measured"], rel=0.15)
        assert pair["measured"] > 0
    assert result["seconds"]["estimate"] > 0
    assert result["place"] in ("this machine's memory",) or result["device"] == "cuda"


def test_there_is_no_step_to_measure_without_training(tiny_folder):
    with pytest.raises(RecipeError, match="no step to measure"):
        planning.measured(experiment(tiny_folder, recipe="mastodon/zero_shot"))


def test_the_last_line_printed_is_the_verdict(tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for recipe in ("mastodon/lora", "mastodon/zero_shot"):
        result = planning.plan(experiment(tiny_folder, recipe=recipe), gpu_memory=GIB)
        assert json.loads(json.dumps(result)) == result
        tables.show_plan(result)
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == result["verdict"]
        assert "time: unknown (another machine)" in out


LLMS = [name for name in recipes.names() if isinstance(recipes.load(name), recipes.Recipe)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LLMS)
def test_every_shipped_recipe_can_be_planned(name, shared_data: Path):
    recipe = recipes.load(name)
    if recipe.data.dataset == "iemocap":
        pytest.skip("IEMOCAP is licensed; its fixture is planned elsewhere")
    planner = on_gpu(Experiment.prepare(recipe, shared_data), 24 * GIB)
    assert planner.fits(planner.own)


@pytest.mark.parametrize(
    ("recipe", "options", "copies", "heads"),
    [
        ("mastodon/lora", (), 2, 2),
        ("mastodon/lora", ("train.gradient_checkpointing=true",), 1, 2),
        ("mastodon/lora", ("method.dropout=0.1",), 1, 2),
        ("mastodon/zero_shot", (), 1, 1),
    ],
)
def test_copies_of_weights_are_counted_where_there_are_any(
    recipe, options, copies, heads, tiny_folder, monkeypatch
):
    given = experiment(tiny_folder, "model.dtype=float32", *options, recipe=recipe)
    fixed = []
    for kept in (True, False):
        monkeypatch.setattr(decoder_layer, "worthwhile", lambda size, kept=kept: kept)
        monkeypatch.setattr(decoder_layer, "available", lambda dtype: True)
        place = Place("cpu", GIB, "this machine's memory", here=True)
        fixed.append(Planner(given, place).own.fixed)
    drawing = Planner(given, place).drawing("none")
    layers = drawing.base.get_decoder().layers.parameters()
    matrices = [p for p in layers if p.ndim == 2 and not p.requires_grad]
    head = drawing.base.get_output_embeddings().weight.nbytes
    assert fixed[0] - fixed[1] == copies * sum(p.nbytes for p in matrices) + heads * head
    monkeypatch.setattr(decoder_layer, "worthwhile", lambda size: True)
    assert on_gpu(given, GIB).own.fixed == fixed[1]
