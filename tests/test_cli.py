import json
import sys

import program
import pytest

from llm_emo import __version__, cli

VERBS = sorted(
    command.name or command.callback.__name__
    for command in cli.app.registered_commands
    if command.callback
)
LIGHT = """
import sys
from llm_emo.cli import main
sys.argv = ["llm-emo", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
# pydantic is not among them: typer itself loads it for a verb's help.
heavy = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "sklearn", "ruamel")
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
"""


def test_help_names_every_verb():
    shown = program.call("--help").ok().out
    assert VERBS
    for verb in VERBS:
        assert verb in shown


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example(verb):
    shown = program.call(verb, "--help").ok().out
    assert "Example" in shown
    assert f"llm-emo {verb}" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_and_version_load_nothing_heavy(arguments):
    program.spawn("-c", LIGHT, *arguments).ok()


def test_the_module_is_the_program():
    assert program.spawn("-m", "llm_emo", "--version").ok().out == f"llm_emo {__version__}\n"


def test_an_unknown_verb_names_the_nearest():
    told = program.spawn("-m", "llm_emo", "evalute")
    assert told.code == 2
    assert "evalute" in told.err
    assert "Did you mean 'evaluate'" in told.err
    assert "Traceback" not in told.err


def test_no_verb_shows_the_help_and_fails():
    assert program.call().code == 2


def test_datasets_counts_every_corpus_under_the_data_root():
    told = program.call("datasets", "--data-root", program.FIXTURES, "--json").ok()
    found = {entry["name"]: entry for entry in json.loads(told.out)["datasets"]}
    assert told.err == ""
    assert not [entry["error"] for entry in found.values() if entry["error"]]
    assert found["mastodon"]["splits"]["test"]["utterances"] == 7
    assert found["iemocap"]["splits"]["all"]["utterances"] == 35


def test_datasets_says_once_per_absent_corpus_where_to_get_it(tmp_path):
    told = program.call("datasets", "--data-root", tmp_path).ok()
    (line,) = [line for line in told.out.splitlines() if line.startswith("mastodon:")]
    assert line.count("mastodon: ") == 1
    assert "github.com/cerisara/DialogSentimentMastodon" in line


def test_the_data_root_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("LLM_EMO_DATA", str(program.FIXTURES))
    found = json.loads(program.call("datasets", "--json").ok().out)
    assert found["data_root"] == str(program.FIXTURES.resolve())
    assert all(entry["splits"] for entry in found["datasets"])


def test_check_fits_a_recipe_to_its_data(tiny_folder):
    told = program.call("check", "mastodon/lora", *program.on(tiny_folder), "--json").ok()
    result = json.loads(told.out)
    assert result["protocol"] == "mastodon3"
    assert result["splits"]["test"]["rows"] == 7
    assert result["splits"]["train"]["rows"] + result["splits"]["dev"]["rows"] == 15
    assert result["record"]["labels"]["test"] == {"negative": 2, "neutral": 2, "positive": 3}


def test_check_warns_of_texts_that_are_shortened(tiny_folder):
    fits = program.call("check", "mastodon/lora", *program.on(tiny_folder), "--json").ok()
    longest = json.loads(fits.out)["splits"]["test"]["tokens_longest"]
    options = program.on(tiny_folder, f"prompt.max_length={longest - 1}")
    cut = program.call("check", "mastodon/lora", *options, "--json").ok()
    assert json.loads(fits.out)["splits"]["test"]["shortened"] == 0
    assert json.loads(cut.out)["splits"]["test"]["shortened"] == 1


def test_show_prints_what_the_model_sees_and_what_is_trained(tiny_folder):
    options = program.on(tiny_folder)
    told = program.call("show", "mastodon/lora", "-n", 2, "--split", "test", *options, "--json")
    first, second = json.loads(told.ok().out)["examples"]
    assert first["uid"] != second["uid"]
    assert first["message"] in first["prompt"]
    assert first["answer"].casefold().startswith(first["gold"])
    total = len(first["prompt_ids"]) + len(first["answer_ids"])
    assert first["trained"] == f"the last {len(first['answer_ids'])} of {total} tokens"


@pytest.mark.parametrize("verb", ["check", "show"])
def test_people_read_the_same_without_json(verb, tiny_folder):
    told = program.call(verb, "mastodon/lora", *program.on(tiny_folder)).ok()
    assert told.out.strip()
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(told.out)


def test_a_failing_machine_is_reported_by_every_process_and_wrong_input_by_the_first(
    monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1")
    for code, shown in ((2, ""), (1, "error: it\n")):
        with pytest.raises(SystemExit) as end:
            cli._fail("it", code)
        assert end.value.code == code
        assert capsys.readouterr().err == shown


def test_every_verb_of_the_design_that_is_built_is_here():
    assert {"quickstart", "datasets", "check", "show", "train", "predict", "evaluate",
            "export"} <= set(VERBS)  # fmt: skip
    assert "llm_emo.cli" in sys.modules
