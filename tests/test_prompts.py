"""Laws of prompts and label words."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_emo import parsing, prompts, protocols
from llm_emo.errors import PromptError
from llm_emo.types import Row, Utterance

SENTIMENT = ("positive", "negative", "neutral")
GOOD = """\
description: For tests
language: en
message: "{history}To {labels}, said by {speaker}: {text}"
answer: "{label}"
labels: {between: ", ", last: " or "}
history: {window: 2, turn: "{speaker}: {text}\\n"}
unknown_speaker: Someone
"""

PromptFile = Callable[[str], Path]


@pytest.fixture
def prompt_file(tmp_path: Path) -> PromptFile:
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def utterance(uid: str, text: str, speaker: str | None = "Ann") -> Utterance:
    return Utterance(uid, text, speaker=speaker, dialogue="d")


def row(text: str, *history: Utterance, speaker: str | None = "Ann") -> Row:
    return Row(utterance("u", text, speaker), "positive", history)


def test_the_reference_prompt_is_the_papers_word_for_word() -> None:
    labels = prompts.label_set(SENTIMENT, "en")
    example = prompts.load("paper").render(row("Nice to see you."), labels)
    assert example.message == (
        "Classify the sentiment of the sentence to Positive, Negative or Neutral: Nice to see you."
    )
    assert example.answer == "Positive"


def test_two_labels_are_joined_by_or_alone() -> None:
    labels = prompts.label_set(("positive", "negative"), "en")
    assert "to Positive or Negative: " in prompts.load("paper").render(row("Hm."), labels).message


def test_the_mandarin_prompt_is_mandarin_throughout() -> None:
    labels = prompts.label_set(SENTIMENT, "zh")
    example = prompts.load("paper_zh").render(row("很好。"), labels)
    assert example.message == "请将这句话的情感归类为积极、消极或中性：很好。"
    assert example.answer == "积极"


def test_the_dialogue_ends_with_the_sentence_and_has_its_speakers() -> None:
    labels = prompts.label_set(SENTIMENT, "en")
    turns = (utterance("a", "Hello!"), utterance("b", " Oh. ", None))
    example = prompts.load("dialogue").render(row("Fine.", *turns, speaker="Bob"), labels)
    assert example.message == (
        "Classify the sentiment of the last sentence to Positive, Negative or Neutral:\n"
        "Ann: Hello!\nSomeone: Oh.\nBob: Fine."
    )


@pytest.mark.parametrize("speaker", [None, "", " \n"])
@pytest.mark.parametrize(("name", "word"), [("dialogue", "Someone"), ("dialogue_zh", "某人")])
def test_a_missing_speaker_gets_the_prompts_own_word(
    name: str, word: str, speaker: str | None
) -> None:
    prompt = prompts.load(name)
    labels = prompts.label_set(SENTIMENT, prompt.language)
    assert word in prompt.render(row("x", speaker=speaker), labels).between


def test_a_speakers_name_stays_on_one_line() -> None:
    labels = prompts.label_set(SENTIMENT, "en")
    example = prompts.load("dialogue").render(row("x", speaker=" Ann\n Lee "), labels)
    assert example.message.endswith("\nAnn Lee: x")


@pytest.mark.parametrize("name", ["dialogue", "dialogue_zh"])
@given(texts=st.lists(st.text(), max_size=5), last=st.text().filter(str.strip))
def test_every_turn_of_a_dialogue_is_the_beginning_of_the_next(
    name: str, texts: list[str], last: str
) -> None:
    prompt = prompts.load(name)
    labels = prompts.label_set(SENTIMENT, prompt.language)
    turns = tuple(utterance(str(i), text) for i, text in enumerate([*texts, last]))
    earlier = prompt.render(row(last, *turns[:-1]), labels)
    later = prompt.render(row("y", *turns), labels)
    assert later.message.startswith(earlier.message)
    assert len(later.history) == len(earlier.history) + 1


@pytest.mark.parametrize(("window", "shown"), [(0, 0), (1, 1), (3, 3), (9, 4), (None, 2)])
def test_the_window_counts_the_last_turns(
    prompt_file: PromptFile, window: int | None, shown: int
) -> None:
    prompt = prompts.load(prompt_file(GOOD))
    labels = prompts.label_set(SENTIMENT, "en")
    turns = tuple(utterance(str(i), f"turn {i}") for i in range(4))
    example = prompt.render(row("x", *turns), labels, history_window=window)
    assert example.history == tuple(f"Ann: turn {i}\n" for i in range(4 - shown, 4))


def test_white_space_behind_an_empty_history_is_outer_white_space(prompt_file: PromptFile) -> None:
    prompt = prompts.load(prompt_file(GOOD.replace("{history}To", "{history}\\nTo")))
    labels = prompts.label_set(SENTIMENT, "en")
    assert prompt.render(row("x"), labels).message.startswith("To Positive")
    later = prompt.render(row("x", utterance("e", "Hi.")), labels)
    assert later.message.startswith("Ann: Hi.\n\nTo Positive")


def test_a_window_is_refused_where_the_prompt_shows_no_history() -> None:
    labels = prompts.label_set(SENTIMENT, "en")
    prompt = prompts.load("paper")
    assert prompt.render(row("x"), labels, history_window=0) == prompt.render(row("x"), labels)
    with pytest.raises(PromptError, match=r"shows no history, but history_window is 5"):
        prompt.render(row("x"), labels, history_window=5)


def test_a_negative_window_is_refused() -> None:
    labels = prompts.label_set(SENTIMENT, "en")
    with pytest.raises(PromptError, match="found history_window -1, expected 0 or more"):
        prompts.load("dialogue").render(row("x"), labels, history_window=-1)


@pytest.mark.parametrize("name", prompts.names())
@given(text=st.text(), speaker=st.none() | st.text(), earlier=st.text())
def test_user_text_survives_untouched_and_no_outer_white_space_remains(
    name: str, text: str, speaker: str | None, earlier: str
) -> None:
    prompt = prompts.load(name)
    labels = prompts.label_set(SENTIMENT, prompt.language)
    sample = row(text, utterance("e", earlier, speaker), speaker=speaker)
    if not text.strip():
        with pytest.raises(PromptError, match="row 'u' has no text"):
            prompt.render(sample, labels)
        return
    example = prompt.render(sample, labels)
    assert example.text == text.strip()
    assert example.message == example.message.strip()
    if example.history:
        assert earlier.strip() in example.history[0]


@pytest.mark.parametrize("name", prompts.names())
def test_holes_in_user_text_are_text(name: str) -> None:
    prompt = prompts.load(name)
    labels = prompts.label_set(SENTIMENT, prompt.language)
    hostile = "{labels} {text} {speaker} {history} {label} {{x}} {0} \\1 \\g<1> %s"
    example = prompt.render(row(hostile, utterance("e", hostile, hostile), speaker=hostile), labels)
    assert example.text == hostile
    assert all(piece.count(hostile) == 2 for piece in example.history)


@pytest.mark.parametrize("name", prompts.names())
def test_an_example_is_answered_by_the_prompts_form_of_the_gold_word(name: str) -> None:
    prompt = prompts.load(name)
    labels = prompts.label_set(SENTIMENT, prompt.language)
    example = prompt.render(row("x"), labels)
    assert example.answer == prompt.answer(labels.word("positive"))
    assert example.gold == "positive"


@pytest.mark.parametrize("name", prompts.names())
def test_every_shipped_prompt_says_what_it_is_and_keeps_its_source(name: str) -> None:
    prompt = prompts.load(name)
    assert prompt.name == name
    assert prompt.description in prompt.verbatim


def test_a_prompt_may_stand_anywhere(prompt_file: PromptFile) -> None:
    assert prompts.load(prompt_file(GOOD)).name == "mine"
    assert prompts.load(str(prompt_file(GOOD))).history_window == 2


def test_text_behind_the_utterance_and_an_answer_form_are_kept(prompt_file: PromptFile) -> None:
    text = """\
description: For tests
language: en
system: Be brief.
message: "Sentence: {text}\\nOne of {labels}?\\n"
answer: '{"emotion": "{label}"}'
labels: {between: " / ", last: " / "}
"""
    prompt = prompts.load(prompt_file(text))
    labels = prompts.label_set(SENTIMENT, "en")
    example = prompt.render(row(" Hm. "), labels)
    assert example.message == "Sentence: Hm.\nOne of Positive / Negative / Neutral?"
    assert example.answer == '{"emotion": "Positive"}'
    assert example.system == "Be brief."
    assert parsing.parse(example.answer, labels, prompt.answer).outcome == "exact"


def test_labels_of_another_language_are_refused() -> None:
    with pytest.raises(PromptError, match="found label words in 'zh', expected 'en'"):
        prompts.load("paper").render(row("x"), prompts.label_set(SENTIMENT, "zh"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{text}"', 'nothing"', r"key 'message': found \{text\} 0 times, expected it exactly"),
        ('{text}"', '{text}{text}"', r"\{text\} 2 times"),
        ("{labels}", "labels", r"\{labels\} 0 times"),
        ("{labels}", "{label}", r"unknown hole '\{label\}'; did you mean 'labels'"),
        ("{labels}", "{ labels }", r"unknown hole '\{ labels \}'"),
        ("{labels}", "{}", r"unknown hole '\{\}'"),
        ("{history}To", "To", r"found \{history\} 0 times and a key 'history'"),
        ("{history}To", "{history}{history}To", r"found \{history\} 2 times"),
        ("{history}To", "{speaker}{history}To", r"found \{speaker\} before \{history\}"),
        ('{text}"', '{text}{history}"', r"found \{history\} 2 times"),
        ('answer: "{label}"', "answer: Yes", r"key 'answer': found 'Yes', expected \{label\}"),
        ('"{label}"', '"{label}{label}"', r"\{label\} exactly once"),
        ('"{label}"', '"{labels}"', r"unknown hole '\{labels\}'; did you mean 'label'"),
        ("language: en", "language: enn", r"no label words for 'enn'; did you mean 'en'"),
        ("language: en", "language: no", r"no label words for 'no'"),
        ("answer:", "anser:", r"unknown key 'anser'; did you mean 'answer'"),
        ("unknown_speaker: Someone\n", "", r"missing key 'unknown_speaker'"),
        ("window: 2", "window: -1", r"'history.window': expected greater .*; found -1"),
        ("window: 2", 'window: "2"', r"'history.window': expected a whole number; found '2'"),
        ("window: 2", "windw: 2", r"unknown key 'history.windw'; did you mean 'window'"),
        (": {text}\\n", ":\\n", r"key 'history.turn': found \{text\} 0 times"),
        ('turn: "{', 'turn: " {', r"expected no white space at its start"),
        ("description: For tests", "system: '{text}'\ndescription: x", r"unknown hole '\{text\}'"),
        ("description: For tests\n", "", r"missing key 'description'"),
        ("language: en", "language: en\nlanguage: en", r"is not YAML.*duplicate key"),
        (GOOD, "[", r"is not YAML"),
        (GOOD, "", r"expected a mapping of description, .*; found nothing"),
        (GOOD, "- a", r"expected a mapping of .*; found a list of 1"),
    ],
)
def test_a_malformed_prompt_file_is_refused_by_name(
    prompt_file: PromptFile, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    path = prompt_file(GOOD.replace(old, new, 1))
    with pytest.raises(PromptError, match=message) as error:
        prompts.load(path)
    assert str(path) in str(error.value)


def test_history_behind_the_text_is_refused(prompt_file: PromptFile) -> None:
    text = GOOD.replace("{history}To", "To").replace('{text}"', '{text} {history}"', 1)
    with pytest.raises(PromptError, match=r"found \{history\} behind \{text\}"):
        prompts.load(prompt_file(text))


def test_a_history_hole_needs_its_key(prompt_file: PromptFile) -> None:
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith("history:"))
    with pytest.raises(PromptError, match=r"found \{history\} 1 times and no key 'history'"):
        prompts.load(prompt_file(text))


def test_an_unknown_prompt_names_the_nearest() -> None:
    with pytest.raises(PromptError, match="did you mean 'paper'"):
        prompts.load("papr")
    with pytest.raises(PromptError, match=r"no prompt file papr\.yaml"):
        prompts.load("papr.yaml")


def test_every_language_has_a_word_for_every_label() -> None:
    english, *others = (set(prompts._label_words(language)) for language in prompts.languages())
    assert others
    assert all(english == other for other in others)


@pytest.mark.parametrize("language", prompts.languages())
@pytest.mark.parametrize("protocol", protocols.names())
def test_every_protocol_has_label_words_that_never_collide(protocol: str, language: str) -> None:
    names = protocols.get(protocol).labels
    labels = prompts.label_set(names, language)
    assert labels.names == tuple(names)
    surfaces = [parsing.fold(word) for word in labels.words]
    surfaces += [parsing.fold(alias) for alias in labels.aliases]
    assert len(set(surfaces)) == len(surfaces)


def test_a_labels_own_word_wins_over_anothers_alias() -> None:
    assert prompts.label_set(("joy", "fear"), "en").aliases["happy"] == "joy"
    # Sad is an alias of sadness in English, and both share one word in Mandarin.
    both = prompts.label_set(("sadness", "sad"), "en")
    assert parsing.parse("sad", both).label == "sad"
    assert parsing.parse("sadness", both).label == "sadness"
    assert "sad" not in both.aliases


def test_two_labels_that_share_an_alias_cannot_stand_in_one_set() -> None:
    with pytest.raises(PromptError, match="'joy' and 'happy' share the alias"):
        prompts.label_set(("joy", "happy"), "en")


def test_two_labels_that_share_a_word_cannot_stand_in_one_set() -> None:
    with pytest.raises(PromptError, match="'sadness' and 'sad' share the word '悲伤'"):
        prompts.label_set(("sadness", "sad"), "zh")


def test_an_unknown_label_or_language_names_the_nearest() -> None:
    with pytest.raises(PromptError, match="no label 'angr'; did you mean 'anger'"):
        prompts.label_set(("angr", "joy"), "en")
    with pytest.raises(PromptError, match=r"no label words for 'xx'; \(known: en, zh\)"):
        prompts.label_set(("anger", "joy"), "xx")


def test_one_label_or_a_doubled_one_is_no_set() -> None:
    with pytest.raises(PromptError, match="at least two distinct names"):
        prompts.label_set(("anger",), "en")
    with pytest.raises(PromptError, match="at least two distinct names"):
        prompts.label_set(("anger", "anger"), "en")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("joy: {word: Joy}", r"label 'joy': missing key 'aliases'"),
        ("joy: {word: Joy, aliases: [joy]}", r"'joy' stands twice"),
        ('joy: {word: "-", aliases: []}', r"found '-', expected a word"),
        ("joy: {word: Joy, alias: []}", r"unknown key 'alias'; did you mean 'aliases'"),
        ("- joy", r"found \['joy'\], expected labels with their words"),
        ("joy: Joy", r"label 'joy': expected a mapping of word, aliases; found 'Joy'"),
    ],
)
def test_a_malformed_label_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "en.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PromptError, match=message) as error:
        prompts._read_label_words(path)
    assert str(path) in str(error.value)
