import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import chatglm2_tokens
import program
import pytest
import tiny
import torch
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_emo import encoded_rows, fetch, inspection, opening, recipes
from llm_emo.encoding import Encoder
from llm_emo.errors import ModelError
from llm_emo.models import auto, bundled, chatglm2_tokenizer, facts

CONTROLS = (*tiny.CONTROL, *tiny.MARKS, "[gMASK]", "sop", "</s>", "<unk>")


@functools.cache
def toy_chatglm2(folder):
    return chatglm2_tokenizer.build(chatglm2_tokens.write_model(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers of every kind, each with what is kept of it."""
    made = {
        "byte level": tiny.tokenizer(),
        "reasoning": tiny.tokenizer(template=tiny.REASONING_TEMPLATE),
        "no template": tiny.tokenizer(template=None, bos=True),
        "metaspace": tiny.metaspace_tokenizer(),
        "chatglm2": toy_chatglm2(tmp_path_factory.mktemp("toy")),
    }
    return {kind: (tokenizer, kept_of(tokenizer)) for kind, tokenizer in made.items()}


KINDS = ("byte level", "reasoning", "no template", "metaspace", "chatglm2")


def kept_of(tokenizer, system=None):
    """What is read back of a tokenizer."""
    content = facts._content(Encoder(tokenizer, 512), system)
    assert content is not None
    return facts.Kept(tokenizer.name_or_path, json.loads(json.dumps(content)))


texts = st.lists(
    st.one_of(
        st.sampled_from([*CONTROLS, "\r\n", "\r", "\n\n", "👩\u200d👧", "开心", "नमस्ते", "e\u0301"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    min_size=1, max_size=8,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@also(text="one\r\ntwo\rthree\n😀 今天 مرحبا <|im_end|> [gMASK]")
@settings(max_examples=40, deadline=None)
def test_a_kept_tokenizer_encodes_as_transformers_does(kind, text, tokenizers):
    own, kept = tokenizers[kind]
    rows = [tiny.example(text), tiny.example("x " * 200 + text, history=(f"A: {text}\n",))]
    assert Encoder(kept, 300).encode(rows) == Encoder(own, 300).encode(rows)
    for how in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
        assert kept(text, **how)["input_ids"] == own(text, **how)["input_ids"]


def test_the_system_turn_is_part_of_what_is_kept():
    tokenizer = tiny.tokenizer()
    rows = [tiny.example(system="You are brief.")]
    kept = kept_of(tokenizer, system="You are brief.")
    assert Encoder(kept, 64).encode(rows) == Encoder(tokenizer, 64).encode(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_encoded_by_what_is_kept_are_found_by_training(kind, tokenizers):
    rows = [tiny.example()]
    own, kept = (encoded_rows._key(Encoder(one, 64), rows) for one in tokenizers[kind])
    assert own == kept


def test_a_tokenizer_that_its_rust_part_does_not_explain_is_not_kept():
    class Odd(type(tiny.tokenizer())):
        def __call__(self, *texts, **options):
            found = super().__call__(*texts, **options)
            found["input_ids"] = found["input_ids"][::-1]
            return found

    odd = tiny.tokenizer()
    odd.__class__ = Odd
    assert facts._content(Encoder(odd, 64), None) is None


def test_a_tokenizer_without_a_rust_part_is_not_kept():
    class Plain:
        added_tokens_decoder: dict = {}  # noqa: RUF012
        chat_template = None

    assert facts._content(Encoder(Plain(), 64), None) is None


def wary():
    """A tokenizer whose template demands the system turn that the recipe's prompt has."""
    return tiny.tokenizer(
        template="{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}"
        "{% endif %}" + tiny.TEMPLATE
    )


def narrow():
    """A tokenizer that has a few words, and no token for others."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "anger", "a", "b"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.mark.parametrize(("made", "says"), [(wary, "no system turn"), (narrow, "Missing")])
def test_a_tokenizer_that_refuses_to_be_probed_ends_no_run(made, says, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    encoder = Encoder(made(), 64)
    with pytest.raises(Exception, match=says):
        facts._content(encoder, "You are brief.")
    place = facts.place(program.save_model(tmp_path / "model"), "You are brief.")
    facts.keep(place, facts.Shape("llama", 320, ("q_proj",)), encoder)
    known = facts.recall(place)
    assert known.shape == facts.Shape("llama", 320, ("q_proj",))
    assert known.tokenizer is None, "the next check asks again"


def test_a_mistake_in_the_probing_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))

    def mistaken(encoder, system):
        raise AttributeError("no such thing")

    monkeypatch.setattr(facts, "_content", mistaken)
    place = facts.place(program.save_model(tmp_path / "model"), None)
    with pytest.raises(AttributeError):
        facts.keep(place, facts.Shape("llama", 320, ()), Encoder(tiny.tokenizer(), 64))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_shape_is_that_of_the_model(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    model = tiny.model(architecture)
    encoder = Encoder(tiny.tokenizer(), 64)
    program.save_model(tmp_path / "model")
    place = facts.place(tmp_path / "model", None)
    facts.keep(place, auto.shape(model), encoder)
    shape = facts.recall(place).shape
    assert shape == auto.shape(model)
    assert (shape.kind, shape.words) == (model.config.model_type, tiny.VOCAB)
    with pytest.raises(ModelError) as by_model:
        auto.require_linear(model, ["q_prj"])
    with pytest.raises(ModelError) as by_shape:
        facts.require_linear(shape.kind, shape.linear, ["q_prj"])
    assert str(by_shape.value) == str(by_model.value)
    assert "q_proj" in str(by_shape.value)
    rows = tiny.encoded(2)
    rows[1] = type(rows[1])("last", (tiny.VOCAB,), (2,))
    with pytest.raises(ModelError) as by_model:
        auto.require_known("m", model, rows)
    with pytest.raises(ModelError) as by_shape:
        facts.require_known("m", shape.words, rows)
    assert str(by_shape.value) == str(by_model.value)


# --- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "facts"


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the tiny model, to tamper with."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def asked(monkeypatch):
    """How often transformers was asked for a tokenizer or a model."""
    seen = []
    for name in ("load_tokenizer", "sketch"):
        own = getattr(auto, name)
        monkeypatch.setattr(auto, name, lambda spec, own=own: seen.append(spec) or own(spec))
    return seen


def check(model, *values, recipe="mastodon/lora"):
    return program.call("check", recipe, *program.on(model, *values), "--json")


@pytest.mark.parametrize("recipe", ["mastodon/lora", "mastodon/zero_shot", "ch_sims/p_tuning_v2"])
def test_a_second_check_finds_the_same_without_transformers(recipe, cache, model, asked):
    options = program.on(model, training="zero_shot" not in recipe)
    first = program.call("check", recipe, *options, "--json").ok()
    assert len(asked) == 2
    assert program.call("check", recipe, *options, "--json").ok() == first
    assert len(asked) == 2


WRONG = {
    "no such layer": ["method.target_modules=[q_proj,k_prj]"],
    "the original's layer": ["method.target_modules=[query_key_value]"],
    "no room for a text": ["prompt.max_length=8"],
    "another corpus's protocol": ["data.protocol=friends7"],
    "no such prompt": ["prompt.name=papre"],
    "an unknown key": ["train.learning_rat=1"],
    "a fold where there are none": ["data.fold=1"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_refused_alike_by_what_is_kept_and_by_transformers(
    name, cache, model, asked
):
    told = check(model, *WRONG[name]).refused()
    assert not cache.exists() or not list(cache.iterdir()), "a refusal is not kept"
    check(model).ok()
    count = len(asked)
    assert check(model, *WRONG[name]).refused() == told
    assert len(asked) == count


def test_training_refuses_layers_in_the_words_of_check(cache, model, tmp_path):
    wrong = "method.target_modules=[q_proj,k_prj]"
    check(model).ok()
    told = check(model, wrong).refused("k_proj")
    trained = program.call(
        "train", "mastodon/lora", "-o", tmp_path / "run", *program.on(model, wrong)
    ).refused("k_proj")
    assert trained.err[trained.err.index("error: ") :] == told.err


def test_tokens_without_an_embedding_are_refused_by_check_and_by_training_alike(cache, tmp_path):
    model = program.save_model(tmp_path / "model", vocab_size=40)
    told = check(model).refused("belongs to another model")
    trained = program.call(
        "train", "mastodon/lora", "-o", tmp_path / "run", *program.on(model)
    ).refused("belongs to another model")
    # Training looks at its own rows only, so the largest token may differ.
    assert trained.err.rpartition("; ")[2] == told.err.rpartition("; ")[2]


def rename_architecture(model):
    change(model / "config.json", model_type="no_such_architecture")


def break_config(model):
    change(model / "config.json", num_hidden_layers="two")


def empty_tokenizer(model):
    (model / "tokenizer.json").write_text("{}")


def break_template(model):
    (model / "chat_template.jinja").write_text("{{ 'nobody' }}")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


@pytest.mark.parametrize(
    "damage", [rename_architecture, break_config, empty_tokenizer, break_template]
)
def test_a_model_that_was_damaged_since_is_refused(damage, cache, model):
    check(model).ok()
    damage(model)
    message = check(model).refused(str(model)).err
    shutil.rmtree(cache)
    assert check(model).refused().err == message


def test_another_template_gives_other_rows(cache, model):
    first = json.loads(check(model).ok().out)["splits"]["test"]["tokens_median"]
    template = (model / "chat_template.jinja").read_text("utf-8")
    (model / "chat_template.jinja").write_text("Hm, hm. " + template, "utf-8")
    assert json.loads(check(model).ok().out)["splits"]["test"]["tokens_median"] > first


@pytest.mark.parametrize("content", [b"", b"{}", b"0" * 64 + b"\n{}"])
def test_a_damaged_file_of_facts_is_written_anew(content, cache, model, asked):
    first = check(model).ok()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(content or whole[:-1])
    assert check(model).ok() == first
    assert len(asked) == 4
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]


def test_without_a_cache_folder_check_asks_every_time(tmp_path, model, monkeypatch, asked):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_EMO_CACHE", str(tmp_path / "file" / "cache"))
    assert check(model).ok() == check(model).ok()
    assert len(asked) == 4


def test_only_the_newest_facts_are_kept(cache, model, monkeypatch):
    monkeypatch.setattr(facts, "FILES", 2)
    for number in range(4):
        (model / f"note-{number}.txt").touch()
        check(model).ok()
    assert len(list(cache.iterdir())) == 2
    assert facts.place(model, None).file in cache.iterdir()


SCRIPT = """
import sys
from llm_emo import cli
sys.argv = ["llm-emo", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    assert end.code == 0, end.code
heavy = ("torch", "transformers", "peft", "accelerate", "datasets")
print("loaded:", *[name for name in heavy if name in sys.modules])
"""


def loaded_by(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True, text=True, cwd=program.ROOT, env=program.clean(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_second_check_loads_neither_torch_nor_transformers_nor_datasets(cache, model):
    check(model, recipe="vader/lora").ok()
    assert loaded_by("check", "vader/lora", *program.on(model)) == "loaded:"


def test_loading_the_bundled_model_spares_its_first_check_the_imports(
    cache, model, monkeypatch, asked
):
    monkeypatch.setattr(bundled, "folder", lambda: model)
    options = program.on(recipes.BUNDLED_MODEL)
    root = Path(options[1])
    made, _ = opening.from_recipe("mastodon/lora", options[3::2], root)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    inspection.remember(made, Encoder(auto.load_tokenizer(made.recipe.model), 64))
    assert torch.equal(torch.get_rng_state(), state), "a cache must not change what is drawn"
    count = len(asked)
    first = program.call("check", "mastodon/lora", *options, "--json").ok()
    assert len(asked) == count
    shutil.rmtree(cache)
    assert program.call("check", "mastodon/lora", *options, "--json").ok() == first


@pytest.mark.slow
def test_a_second_check_of_the_quickstart_loads_neither_torch_nor_transformers():
    loaded_by("check", "vader/lora")
    assert loaded_by("check", "vader/lora") == "loaded:"


def test_the_bundled_tokenizer_is_kept_whole():
    folder = fetch.cache_dir() / "models" / f"smollm2-135m-instruct-{fetch.SMOLLM2_SHA256[:12]}"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the bundled model was never made here")
    own = AutoTokenizer.from_pretrained(folder)
    kept = kept_of(own)
    for text in facts.PROBES:
        rows = [tiny.example(text or "x"), tiny.example(text + " a\r\nb")]
        assert Encoder(kept, 512).encode(rows) == Encoder(own, 512).encode(rows)
