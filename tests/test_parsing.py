"""Laws of reading labels out of answers."""

import random
import time
import unicodedata
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_emo import prompts, protocols
from llm_emo.labels import LabelSet
from llm_emo.parsing import fold, parse
from llm_emo.types import Outcome

EMOTIONS = ("neutral", "joy", "sadness", "fear", "anger", "surprise", "disgust")
GRADED = ("very negative", "negative", "neutral", "positive", "very positive")
ENGLISH = prompts.label_set(EMOTIONS, "en")
MANDARIN = prompts.label_set(
    ("happy", "neutral", "sad", "disgust", "anger", "fear", "surprise"), "zh"
)
SENTIMENT = prompts.label_set(("positive", "negative", "neutral"), "en")
SETS = sorted({protocols.get(name).labels for name in protocols.names()})
WITHOUT_LABEL = {"ambiguous", "refusal", "none"}


@pytest.mark.parametrize(
    ("text", "label", "outcome"),
    [
        ("", None, "none"),
        ("JOY", "joy", "exact"),
        ("happiness", "joy", "alias"),
        ("fearless", None, "none"),
        ("I am not angry; neutral", None, "ambiguous"),
    ],
)
def test_answers_that_nearest_spelling_gets_wrong_are_read_right_or_not_at_all(
    text: str, label: str | None, outcome: str
) -> None:
    parsed = parse(text, ENGLISH)
    assert (parsed.label, parsed.outcome) == (label, outcome)


@pytest.mark.parametrize(
    ("text", "label", "outcome"),
    [
        ("Joy", "joy", "exact"),
        (" \n**Joy.**\n", "joy", "exact"),
        ("“Joy”", "joy", "exact"),
        ("`joy`", "joy", "exact"),
        ("_Joy_", "joy", "exact"),
        ("# Joy", "joy", "exact"),
        ("<joy>", "joy", "exact"),
        ("Joy 😊", "joy", "exact"),
        ("Ｊｏｙ！", "joy", "exact"),
        ("𝐉𝐨𝐲", "joy", "exact"),
        ("j\u200boy", "joy", "exact"),
        ("angry", "anger", "alias"),
        ("Happy!", "joy", "alias"),
        ("The emotion is joy.", "joy", "contained"),
        ("Answer: Fear", "fear", "contained"),
        ("\\boxed{Fear}", "fear", "contained"),
        ("Joy Joy", "joy", "contained"),
        ("Joy.\nThe speaker is happy.", "joy", "contained"),
        ("The speaker doesn't quarrel, so it is neutral", "neutral", "contained"),
        ("It was never clear. Sadness", "sadness", "contained"),
        ("No, it is fear", "fear", "contained"),
        ("Neutral (no strong emotion)", "neutral", "contained"),
        ("Neutral: no strong emotion", "neutral", "contained"),
        ("Neutral - no strong emotion", "neutral", "contained"),
        ("Neutral—no strong emotion", "neutral", "contained"),
        ("- Joy", "joy", "exact"),
        ("— Joy —", "joy", "exact"),
        ("Joy? No.", None, "ambiguous"),
        ("joyless", None, "none"),
        ("unhappy", None, "none"),
        ("unhappiness", None, "none"),
        ("surprisingly", None, "none"),
        ("jo", None, "none"),
        ("joyy", None, "none"),
        ("joy5", None, "none"),
        ("?!", None, "none"),
        ("1", None, "none"),
        ("I'd be happy to help!", None, "none"),
        ("I am happy to classify it. Fear", "fear", "contained"),
        ("not angry", None, "ambiguous"),
        ("isn't angry", None, "ambiguous"),
        ("The speaker isn’t particularly angry", None, "ambiguous"),
        ("isnt angry", None, "ambiguous"),
        ("It's not so happy", None, "ambiguous"),
        ("never joy", None, "ambiguous"),
        ("without fear", None, "ambiguous"),
        ("no joy", None, "ambiguous"),
        ("non-neutral", None, "ambiguous"),
        ("un-happy", None, "ambiguous"),
        ("anger-free", None, "ambiguous"),
        ("fear-less", None, "ambiguous"),
        ("≠ joy", None, "ambiguous"),
        ("Joy is not it", None, "ambiguous"),
        ("anything rather than joy", None, "ambiguous"),
        ("joy, not joy", None, "ambiguous"),
        ("Joy or fear", None, "ambiguous"),
        ("It is joy, not fear", None, "ambiguous"),
        ("Neutral, Joy, Sadness, Fear, Anger, Surprise or Disgust", None, "ambiguous"),
        ("I cannot classify this.", None, "refusal"),
        ("I can’t help with that", None, "refusal"),
        ("As an AI, I have no feelings; neutral", None, "refusal"),
        ("I'm sorry, but this is anger", None, "refusal"),
        ("It is hard; I am unable to determine joy", None, "refusal"),
        ("The emotion cannot be determined: neutral", None, "refusal"),
        ("Sadness: the speaker is sorry", "sadness", "contained"),
    ],
)
def test_an_english_answer_has_this_outcome(text: str, label: str | None, outcome: str) -> None:
    parsed = parse(text, ENGLISH)
    assert (parsed.label, parsed.outcome) == (label, outcome)


@pytest.mark.parametrize(
    ("text", "label", "outcome"),
    [
        ("高兴", "happy", "exact"),
        ("高兴。", "happy", "exact"),
        ("「高兴」", "happy", "exact"),
        ("开心", "happy", "alias"),
        ("这句话的情感是愤怒。", "anger", "contained"),
        ("情感类别：悲伤", "sad", "contained"),
        ("答案是anger。", "anger", "contained"),
        ("非常高兴", "happy", "contained"),
        ("毫无疑问是愤怒", "anger", "contained"),
        ("他不说话，悲伤", "sad", "contained"),
        ("中性（没有明显的情感）", "neutral", "contained"),
        ("中性——没有明显的情感", "neutral", "contained"),
        ("不高兴", None, "ambiguous"),
        ("没有恐惧", None, "ambiguous"),
        ("并非愤怒", None, "ambiguous"),
        ("高兴并不是", None, "ambiguous"),
        ("高兴、中性或悲伤", None, "ambiguous"),
        ("无法判断", None, "refusal"),
        ("抱歉，我不能回答", None, "refusal"),
        ("作为一个人工智能语言模型，愤怒", None, "refusal"),
        ("你好", None, "none"),
    ],
)
def test_a_mandarin_answer_has_this_outcome(text: str, label: str | None, outcome: str) -> None:
    parsed = parse(text, MANDARIN)
    assert (parsed.label, parsed.outcome) == (label, outcome)


@pytest.mark.parametrize(
    ("text", "label", "outcome"),
    [
        ("Very positive", "very positive", "exact"),
        ("very-positive", "very positive", "exact"),
        ("very_positive", "very positive", "exact"),
        ("Very\npositive", "very positive", "exact"),
        ("I call it very positive", "very positive", "contained"),
        ("I call it positive", "positive", "contained"),
        ("extremely positive", None, "ambiguous"),
        ("somewhat negative", None, "ambiguous"),
        ("not very positive", None, "ambiguous"),
        ("very positive or positive", None, "ambiguous"),
    ],
)
def test_the_longest_label_is_found_and_a_strange_degree_is_no_label(
    text: str, label: str | None, outcome: str
) -> None:
    parsed = parse(text, prompts.label_set(GRADED, "en"))
    assert (parsed.label, parsed.outcome) == (label, outcome)


def test_a_degree_is_harmless_in_a_set_without_grades() -> None:
    assert parse("It is very positive", SENTIMENT).label == "positive"


def test_a_label_that_begins_with_non_is_not_its_own_negation() -> None:
    labels = prompts.label_set(("non-neutral", "neutral"), "en")
    assert parse("Non-neutral", labels).outcome == "exact"
    assert parse("I say non-neutral, yes: non neutral", labels).label == "non-neutral"
    assert parse("It is not non-neutral", labels).outcome == "ambiguous"
    mandarin = prompts.label_set(("non-negative", "negative"), "zh")
    assert parse("情感是非消极", mandarin).label == "non-negative"


def test_a_mandarin_degree_is_read_in_a_graded_set() -> None:
    labels = prompts.label_set(GRADED, "zh")
    assert parse("这句话非常积极", labels).label == "very positive"
    assert parse("这句话有点积极", labels).outcome == "ambiguous"


@given(text=st.text())
@pytest.mark.parametrize("labels", [ENGLISH, MANDARIN], ids=["en", "zh"])
def test_any_text_gets_one_outcome_and_a_label_exactly_where_it_says_so(
    labels: LabelSet, text: str
) -> None:
    parsed = parse(text, labels)
    assert parsed.outcome in set(get_args(Outcome)) - {"scored"}
    assert (parsed.label is None) == (parsed.outcome in WITHOUT_LABEL)
    assert parsed.label is None or parsed.label in labels.names


PIECES = st.sampled_from(
    [
        *ENGLISH.words,
        *ENGLISH.aliases,
        "not",
        "n't",
        "very",
        "I",
        "cannot",
        ",",
        ".",
        "\n",
        " ",
        "-",
    ]
)


@given(text=st.text() | st.lists(PIECES, max_size=6).map(" ".join))
def test_compatibility_forms_change_nothing(text: str) -> None:
    assert parse(unicodedata.normalize("NFKC", text), ENGLISH) == parse(text, ENGLISH)


@given(text=st.lists(PIECES, max_size=6).map(" ".join))
def test_a_label_is_only_given_where_one_and_no_other_occurs(text: str) -> None:
    parsed = parse(text, ENGLISH)
    mentioned = {
        name
        for surface, name in [
            *((word, name) for word, name in zip(ENGLISH.words, ENGLISH.names, strict=True)),
            *ENGLISH.aliases.items(),
        ]
        if surface.casefold() in fold(text)
    }
    if parsed.label is not None:
        assert mentioned == {parsed.label}


def decorated(text: str, chance: random.Random) -> str:
    """Change the case of each letter by chance, and put punctuation and white space around."""
    cased = "".join(chance.choice((c.upper(), c.lower())) for c in text)
    around = [*" \n\t.,!?:;\"'“”‘’「」《》（）()[]*_`#。，！？：；~-…"]
    left = "".join(chance.choices(around, k=chance.randrange(5)))
    right = "".join(chance.choices(around, k=chance.randrange(5)))
    return left + cased + right


@pytest.mark.parametrize("prompt_name", prompts.names())
@pytest.mark.parametrize("names", SETS, ids="/".join)
@settings(max_examples=15)
@given(chance=st.randoms(use_true_random=False))
def test_every_labels_word_parses_to_itself_in_every_answer_form(
    prompt_name: str, names: tuple[str, ...], chance: random.Random
) -> None:
    prompt = prompts.load(prompt_name)
    labels = prompts.label_set(names, prompt.language)
    for name, word in zip(labels.names, labels.words, strict=True):
        for text in (decorated(word, chance), decorated(prompt.answer(word), chance)):
            parsed = parse(text, labels, prompt.answer)
            assert (parsed.label, parsed.outcome) == (name, "exact"), text


@pytest.mark.parametrize("language", prompts.languages())
@pytest.mark.parametrize("names", SETS, ids="/".join)
@settings(max_examples=15)
@given(chance=st.randoms(use_true_random=False))
def test_every_alias_parses_to_its_label(
    names: tuple[str, ...], language: str, chance: random.Random
) -> None:
    labels = prompts.label_set(names, language)
    for alias, name in labels.aliases.items():
        parsed = parse(decorated(alias, chance), labels)
        assert (parsed.label, parsed.outcome) == (name, "alias"), alias


def test_reading_takes_time_in_proportion_to_the_answer() -> None:
    started = time.perf_counter()
    for unit in (" ", "\n", "not ", "- ", "很", "jo", "\u0301"):
        parse(unit * 50_000 + "joy", ENGLISH)
    assert time.perf_counter() - started < 5


def test_an_answer_form_may_be_kept_or_left_out() -> None:
    def answer(word: str) -> str:
        return f'{{"emotion": "{word}"}}'

    assert parse('{"emotion": "joy"}', ENGLISH, answer).outcome == "exact"
    assert parse('{"emotion": "happy"}', ENGLISH, answer).outcome == "alias"
    assert parse("joy", ENGLISH, answer).outcome == "exact"
    assert parse('{"emotion": "joy"}', ENGLISH).outcome == "contained"
