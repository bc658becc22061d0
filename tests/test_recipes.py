import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from llm_emo import datasets, grid, prompts, protocols, recipes, resources
from llm_emo.errors import RecipeError

SHIPPED = recipes.names()
BASELINES = tuple(
    name for name in SHIPPED if isinstance(recipes.load(name), recipes.BaselineRecipe)
)
LLMS = tuple(name for name in SHIPPED if name not in BASELINES)
HEX = "0123456789abcdef0123456789abcdef01234567"


def document(name="mastodon/lora"):
    return YAML(typ="safe", pure=True).load(recipes.source(name).read_text(encoding="utf-8"))


@lru_cache
def fixture(dataset):
    return datasets.read(dataset, Path(__file__).parent / "fixtures")


def refusal(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        recipes.load(str(path), overrides)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Write a recipe from YAML text, or from a shipped recipe with one text replaced."""

    def write(old, new=None, name="mastodon/lora"):
        text = old
        if new is not None:
            shipped = recipes.source(name).read_text(encoding="utf-8")
            assert old in shipped
            text = shipped.replace(old, new)
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def leaves(node, path=()):
    """Yield every key path of a recipe document, sections included."""
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


# --- what ships -----------------------------------------------------------------------------


def test_every_corpus_with_text_has_the_three_methods_for_both_models():
    folders = {name.split("/")[0] for name in LLMS}
    covered = {recipes.load(f"{folder}/lora").data.dataset for folder in folders}
    assert covered == {name for name in datasets.names() if name != "emodb"}
    for folder in folders:
        for method in ("zero_shot", "lora", "p_tuning_v2"):
            assert f"{folder}/{method}" in SHIPPED
            assert f"{folder}/chatglm2_{method}" in SHIPPED


@pytest.mark.parametrize("name", LLMS)
def test_a_shipped_recipe_does_what_its_name_says(name):
    recipe = recipes.load(name)
    stem = name.split("/")[1]
    assert recipe.method.kind in stem
    assert recipe.model.name == ("chatglm2-6b" if "chatglm2" in stem else recipes.BUNDLED_MODEL)
    assert (recipe.prompt.history_window != 0) == ("dialogue" in stem)
    if recipe.train is not None:
        by = "dialogue" if "dialogue" in stem else "row"
        assert recipe.train.batch_by == by
        assert (recipe.train.tokens_per_pass is not None) == (by == "dialogue")
    if "chatglm2" in stem and recipe.train is not None:
        assert recipe.train.batch_size == 16
        match recipe.method:
            case recipes.Lora():
                assert recipe.method.rank == 8
                assert recipe.method.target_modules == ("q_proj", "k_proj", "v_proj")
            case recipes.PTuningV2():
                assert recipe.method.prefix_length == 32


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("p_tuning_v2")])
def test_a_text_that_starts_a_prefix_names_every_label_as_the_prompt_does(name):
    recipe = recipes.load(name)
    if recipe.method.init_text is not None:
        language = prompts.load(recipe.prompt.name).language
        labels = prompts.label_set(protocols.get(recipe.data.protocol).labels, language)
        assert all(word in recipe.method.init_text for word in labels.words)


@pytest.mark.parametrize("name", LLMS)
def test_a_shipped_recipe_fits_the_fixture_of_its_corpus(name):
    recipe = recipes.load(name)
    protocol = protocols.get(recipe.data.protocol)
    prompt = prompts.load(recipe.prompt.name)
    labels = prompts.label_set(protocol.labels, prompt.language)
    assert prompt.language == datasets.get(recipe.data.dataset).language
    splits = protocols.rows(
        protocol,
        fixture(recipe.data.dataset),
        seed=recipe.seed,
        fold=recipe.data.fold,
        dev_fraction=recipe.data.dev_fraction,
    )
    rows = (*splits.train, *splits.dev, *splits.test)
    assert rows
    for row in rows:
        example = prompt.render(row, labels, history_window=recipe.prompt.history_window)
        assert row.utterance.text.strip() in example.message
        assert example.answer == prompt.answer(labels.word(row.gold))


@pytest.mark.parametrize("name", BASELINES)
def test_a_specialised_recipe_is_named_after_its_method_and_reads_its_corpus(name):
    recipe = recipes.load(name)
    assert recipe.method.kind in name.split("/")[1]
    splits = protocols.rows(
        protocols.get(recipe.data.protocol),
        fixture(recipe.data.dataset),
        seed=recipe.seed,
        fold=recipe.data.fold,
        dev_fraction=recipe.data.dev_fraction,
    )
    assert splits.train
    if recipe.train is not None:
        assert splits.dev


def test_every_corpus_of_an_llm_has_a_floor_on_the_same_rows():
    for folder in {name.split("/")[0] for name in LLMS}:
        data = recipes.load(f"{folder}/lora").data
        for floor in ("majority", "linear"):
            assert recipes.load(f"{folder}/{floor}").data == data
        chinese = datasets.get(data.dataset).language == "zh"
        unit = recipes.load(f"{folder}/linear").method.features.unit
        assert unit == ("character" if chinese else "word")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_names_its_schema_and_says_what_it_shows(name):
    path = recipes.source(name)
    lines = path.read_text(encoding="utf-8").splitlines()
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", lines[0])
    assert schema is not None
    assert (path.parent / schema[1]).resolve() == resources.folder("recipes") / "schema.json"
    assert lines[1].startswith("# ")
    assert all(len(line) <= 100 for line in lines)


def test_every_shipped_recipe_and_grid_has_one_row_in_the_tables():
    table = (resources.folder("recipes") / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE)
    assert sorted(rows) == sorted([*SHIPPED, *(f"grids/{name}" for name in grid.names())])


@pytest.mark.parametrize("part", ["cnn_lstm", "residual"])
def test_an_ablation_leaves_out_what_its_name_says_and_changes_nothing_else(part):
    whole, ablation = (
        document("meld/roberta_cnn_lstm"),
        document(f"meld/roberta_cnn_lstm_no_{part}"),
    )
    assert whole["method"]["network"].pop(part) is True
    assert ablation["method"]["network"].pop(part) is False
    assert ablation == whole


def test_the_schema_file_is_the_one_the_models_give():
    path = resources.folder("recipes") / "schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == recipes.json_schema(), (
        "run: python -m llm_emo.recipes > recipes/schema.json"
    )


def test_the_schema_accepts_every_shipped_recipe_and_refuses_a_misspelled_one():
    schema = recipes.json_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for name in SHIPPED:
        assert validator.is_valid(document(name)), name
    wrong = document()
    wrong["train"]["learning_rat"] = wrong["train"].pop("learning_rate")
    assert not validator.is_valid(wrong)


def test_every_field_says_what_it_is():
    for section in recipes.json_schema()["$defs"].values():
        assert section["description"]
        for name, field in section["properties"].items():
            # A section is described by its own class.
            assert "$ref" in field or "discriminator" in field or field["description"], name


# --- finding and reading --------------------------------------------------------------------


def test_a_shipped_recipe_is_found_by_name_and_by_checkout_path_from_anywhere(
    tmp_path, monkeypatch
):
    expected = recipes.load("mastodon/lora")
    monkeypatch.chdir(tmp_path)
    assert recipes.load("mastodon/lora") == expected
    assert recipes.load("recipes/mastodon/lora.yaml") == expected


def test_a_file_goes_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipes" / "mastodon" / "lora.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(recipes.source("mosi2/zero_shot").read_text(encoding="utf-8"))
    assert recipes.load("recipes/mastodon/lora.yaml").data.protocol == "mosi2"


@pytest.mark.parametrize("name", ["mastodon/lroa", "nowhere.yaml", "../mastodon/lora", ""])
def test_a_recipe_that_does_not_exist_is_named_with_the_ones_that_do(name):
    message = refusal(name)
    assert message.startswith(f"{name}: ")
    assert name == "" or "recipes/README.md lists all" in message


def test_the_nearest_recipe_is_suggested():
    assert "did you mean 'mastodon/lora'?" in refusal("mastodon/lroa")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found nothing"),
        ("- 1\n", "found a list of 1"),
        ("seed: 0\nseed: 1\n", 'line 2, column 1): found duplicate key "seed"'),
        ("seed: [\n", "not valid YAML (line 2, column 1)"),
        ("seed: 0\n---\nseed: 1\n", "not valid YAML"),
        ("%YAML 1.1\n---\nseed: 0\n", "remove the %YAML line"),
        ("seed: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_what_is_no_recipe_at_all_is_refused(write, text, said):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_a_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("seed: 0 # café".encode("latin-1"))
    assert "not UTF-8 text (byte 13)" in refusal(path)


# --- keys -----------------------------------------------------------------------------------


def test_a_misspelled_key_is_one_problem_with_the_nearest_name(write):
    path = write("learning_rate", "learning_rat")
    assert refusal(path) == (
        f"{path}: unknown key 'train.learning_rat'; did you mean 'learning_rate'? "
        "(known: batch_by, batch_size, betas, early_stopping_patience, epochs, "
        "evaluations_per_epoch, gradient_checkpointing, imbalance, keep, learning_rate, "
        "max_grad_norm, micro_batch_size, optimizer, schedule, tokens_per_pass, warmup_ratio, "
        "weight_decay)"
    )


def test_a_run_that_stops_early_does_not_keep_its_last_state(write):
    message = refusal(
        write("seed: 0", "seed: 0"), "train.keep=last", "train.early_stopping_patience=3"
    )
    assert "'train.keep': a run that stops early is chosen by dev; take best" in message


def test_all_problems_of_a_file_come_in_one_message(write):
    path = write("seed: 0\ndata:", "seed: 0.5\nzzz: 1\ndata:\n  dataste: 1")
    lines = refusal(path).splitlines()
    assert lines[0] == f"{path}: 3 problems"
    assert sorted(lines[1:]) == [
        "  'seed': expected a whole number; found 0.5",
        "  unknown key 'data.dataste'; did you mean 'dataset'? "
        "(known: dataset, dev_fraction, fold, hub, limit, protocol)",
        "  unknown key 'zzz' (known: data, inference, method, model, prompt, seed, train)",
    ]


@pytest.mark.parametrize("name", ["mastodon/lora", "mastodon/p_tuning_v2", "iemocap/zero_shot"])
def test_no_default_hides_in_code_any_key_that_is_left_out_is_missed(name, write):
    for path in leaves(document(name)):
        assert_required(name, path, write)


@pytest.mark.parametrize("folder", ["emodb", "iemocap"])
def test_no_size_of_a_network_that_hears_hides_in_code(folder, write):
    for name in (name for name in SHIPPED if name.startswith(f"{folder}/")):
        if getattr(recipes.load(name).method, "hears", False) or "fusion" in name:
            for path in leaves(document(name)):
                if path[0] == "method" and len(path) > 2:
                    assert_required(name, path, write)


@pytest.mark.parametrize("kind", ["text_cnn", "encoder", "roberta_cnn_lstm", "linear"])
def test_no_size_of_a_model_that_reads_hides_in_code(kind, write):
    name = f"mastodon/{kind}"
    inner = [path for path in leaves(document(name)) if path[0] == "method" and len(path) > 2]
    assert len(inner) > 1
    for path in inner:
        assert_required(name, path, write)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("class_weights", "strength"), ("resampling", "strength"), ("focal", "gamma"),
     ("logit_adjustment", "tau")],
)  # fmt: skip
def test_no_strength_of_a_remedy_hides_in_code(kind, key):
    with pytest.raises(RecipeError, match=rf"missing key 'train\.imbalance\.{key}'"):
        recipes.load("mastodon/text_cnn", [f"train.imbalance={{kind: {kind}}}"])


def assert_required(name, path, write):
    shorter = document(name)
    node = shorter
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    assert f"'{'.'.join(path)}'" in refusal(write(json.dumps(shorter)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.sampled_from(SHIPPED),
    key=st.text(min_size=1).filter(str.isprintable),
    data=st.data(),
)
def test_no_unknown_key_is_ignored_in_any_section(write, name, key, data):
    wrong = document(name)
    nodes = [wrong, *(node for node in wrong.values() if isinstance(node, dict))]
    node = data.draw(st.sampled_from(nodes))
    key = f"{key}_"  # the name of no field ends so
    node[key] = 1
    assert f"{key}'" in refusal(write(json.dumps(wrong, ensure_ascii=False)))


# --- values ---------------------------------------------------------------------------------


def test_numbers_are_those_of_yaml_1_2(write):
    assert recipes.load(str(write("1e-3", "1e-4"))).train.learning_rate == 1e-4
    assert recipes.load(str(write("seed: 0", "seed: 010"))).seed == 10
    assert recipes.load(str(write("alpha: 16", "alpha: 16.5"))).method.alpha == 16.5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs='3'", "'train.epochs': expected a whole number; found '3' (text)"),
        ("train.epochs=true", "'train.epochs': expected a whole number; found true (true/false)"),
        ("train.epochs=3.0", "'train.epochs': expected a whole number; found 3.0"),
        ("train.learning_rate=true", "expected a number; found true (true/false)"),
        ("train.learning_rate='1e-4'", "expected a number; found '1e-4' (text)"),
        ("train.learning_rate=.nan", "expected a finite number; found nan"),
        ("train.learning_rate=2024-01-01", "expected a number; found 2024-01-01"),
        ("train.learning_rate=0", "expected greater than 0; found 0"),
        ("train.warmup_ratio=1", "expected less than 1; found 1"),
        ("train.gradient_checkpointing=yes", "expected true or false; found 'yes' (text)"),
        ("train.gradient_checkpointing=1", "expected true or false; found 1"),
        ("train.schedule=linaer", "found 'linaer' (text); did you mean 'linear'?"),
        ("train.schedule=", "'train.schedule': found nothing (known: constant, cosine, linear)"),
        ("train.schedule=no", "found 'no' (text)"),
        ("model.revision=1234567", "expected a text (put it in quotes); found 1234567"),
        ("data.dataset=''", "expected a text that is not empty"),
        ("method.target_modules=[]", "expected at least one entry"),
        ("method.target_modules=q_proj", "expected a list; found 'q_proj' (text)"),
        ("method.target_modules=[1]", "'method.target_modules.0': expected a text"),
        ("method.target_modules=[a, a]", "names a layer twice: a, a"),
        ("prompt.history_window=-1", "expected greater than or equal to 0"),
        ("prompt.history_window=all", "expected a whole number; found 'all' (text)"),
        ("seed=-1", "expected greater than or equal to 0"),
        ("train=5", "'train': expected a mapping of epochs, batch_size"),
        ("method=7", "'method': expected a mapping of kind, rank"),
        ("method={kind: lroa}", "'method.kind': no method 'lroa'; did you mean 'lora'?"),
        ("method={rank: 8}", "missing key 'method.kind'"),
    ],
)
def test_a_value_is_never_bent_into_another_type_or_range(override, said):
    message = refusal("mastodon/lora", override)
    assert f": --set {override}: " in message
    assert said in message
    assert "problems" not in message


# --- overrides ------------------------------------------------------------------------------


def test_an_override_sets_one_key_and_leaves_the_rest():
    before = recipes.load("mastodon/lora")
    after = recipes.load("mastodon/lora", ["train.learning_rate=1e-4"])
    assert after.train.learning_rate == 1e-4
    assert after == before.model_copy(
        update={"train": before.train.model_copy(update={"learning_rate": 1e-4})}
    )


def test_the_last_override_of_a_key_counts():
    assert recipes.load("mastodon/lora", ["seed=1", "seed=2"]).seed == 2
    assert "--set seed=x: " in refusal("mastodon/lora", "seed=y", "seed=x")


def test_an_override_can_add_a_section_that_the_file_leaves_out():
    assert recipes.load("mastodon/lora", ["data.limit.test=5"]).data.limit.test == 5


def test_a_method_is_exchanged_as_a_whole():
    recipe = recipes.load("mastodon/lora", ["method={kind: zero_shot}", "train=null"])
    assert recipe.method == recipes.ZeroShot(kind="zero_shot")
    assert recipe.train is None
    message = refusal("mastodon/lora", "method.kind=zero_shot")
    assert "--set method.kind=zero_shot: the other keys of 'method' belong to 'lora'" in message
    assert recipes.load("mastodon/lora", ["method.kind=lora"]) == recipes.load("mastodon/lora")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("train..epochs=1", "expected KEY=VALUE"),
        ("seed.low=1", "'seed' has no keys below it"),
        ("seed=[1", "not valid YAML"),
        ("trian.epochs=1", "unknown key 'trian'; did you mean 'train'?"),
        ("train.learning_rat=1", "unknown key 'train.learning_rat'; did you mean 'learning_rate'?"),
        ("data.limit.tset=1", "unknown key 'data.limit.tset'; did you mean 'test'?"),
    ],
)
def test_an_error_of_an_override_names_it(override, said):
    message = refusal("mastodon/lora", override)
    assert message.startswith("recipes/mastodon/lora.yaml: ") or "recipes_files" in message
    assert f": --set {override}: {said}" in message


def test_an_override_is_not_blamed_for_what_the_file_got_wrong(write):
    lines = refusal(write("seed: 0", "seed: x"), "train.epochs=0").splitlines()
    assert sorted(lines[1:]) == [
        "  'seed': expected a whole number; found 'x' (text)",
        "  --set train.epochs=0: 'train.epochs': expected greater than or equal to 1; found 0",
    ]


# --- settings that must go together ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("mastodon/lora", ["train=null"], "missing section 'train': method lora needs it"),
        ("mastodon/lora", ["method={kind: zero_shot}"], "method zero_shot trains nothing"),
        ("mastodon/lora", ["model.name=some/where"], "needs 'model.revision'"),
        ("mastodon/lora", ["model.revision=v1"], "belongs to a Hugging Face id"),
        ("mastodon/lora", ["model.name=a/b", "model.revision=main"], "'main' moves"),
        ("mastodon/lora", ["method={kind: full}", "model.quantization=nf4"], "cannot be trained"),
        ("mastodon/p_tuning_v2", ["method.init=random"], "'method.init_text': has no effect"),
        ("mastodon/p_tuning_v2", ["method.init_text=null"], "text needs 'method.init_text'"),
        ("mastodon/p_tuning_v2", ["method.projection=true"], "needs 'method.projection_size'"),
        ("mastodon/p_tuning_v2", ["method.projection_size=8"], "has no effect with"),
        ("mastodon/p_tuning_v2", ["method.projection_input=all"], "has no effect with"),
        ("mastodon/lora", ["method.tie_a=true"], "true needs 'method.target_modules' [q_proj, "),
        ("mastodon/lora", ["prompt.history_window=2"], "shows no history; set it to 0"),
        ("mastodon/lora", ["prompt.name=papre"], "did you mean 'paper'?"),
        ("mastodon/lora", ["data.protocol=sst2"], "not of 'mastodon' (its own: mastodon"),
        ("mastodon/lora", ["data.protocol=mastodon2"], "did you mean 'mastodon3'?"),
        ("mastodon/lora", ["data.fold=0"], "mastodon3 has no folds; remove it"),
        (
            "iemocap/lora",
            ["data.fold=null"],
            "missing key 'data.fold': iemocap4 is cross-validated",
        ),
        ("mastodon/lora", ["data.dataset=mastodn"], "did you mean 'mastodon'?"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(name, overrides, said):
    message = refusal(name, *overrides)
    assert said in message
    assert f"--set {overrides[-1]}: " in message


def test_a_prefix_cannot_start_from_text_through_a_projection():
    message = refusal("mastodon/p_tuning_v2", "method.projection=true", "method.projection_size=64")
    assert "cannot start an MLP" in message


def test_the_layers_that_share_an_a_may_be_named_in_any_order():
    order = "method.target_modules=[v_proj, q_proj, k_proj]"
    assert recipes.load("mastodon/lora", [order, "method.tie_a=true"]).method.tie_a
    assert not recipes.load("mastodon/lora", [order]).method.tie_a


def test_a_recipe_without_the_newer_keys_means_what_it_always_meant():
    """Recipes and runs from before these keys existed go on loading."""
    for name in ("mastodon/lora", "mastodon/p_tuning_v2"):
        text = recipes.source(name).read_text("utf-8")
        assert "tie_a" not in text
        assert "projection_input" not in text
    assert recipes.load("mastodon/lora").method.tie_a is False
    assert recipes.load("mastodon/p_tuning_v2").method.projection_input == "layer"


def test_the_origin_of_a_model_follows_from_its_name_and_revision(tmp_path):
    def origin(*overrides):
        return recipes.load("mastodon/lora", overrides).model.origin

    assert origin() == "bundled"
    assert origin(f"model.name={tmp_path}") == "folder"
    assert origin("model.name=./base") == "folder"
    assert origin("model.name=a/b", f"model.revision={HEX}") == "hub"


def test_a_recipe_cannot_be_changed_after_it_was_loaded():
    recipe = recipes.load("mastodon/lora")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 9
    assert hash(recipe) == hash(recipes.load("mastodon/lora"))
