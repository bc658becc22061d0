"""Tweets into words, step by step."""

import string
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_emo.baselines import tweets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>Fine</p> day<br>here", "fine day here"),
        ("<a href='x.html'>LINK</a><!-- a > b -->", "link"),
        ("i <3 you, 2 < 3 > 1", "i you"),
        ("I CAN'T", "i cant"),
        ("it’s", "its"),
        ("so happy😂😂", "so happy face with tears of joy face with tears of joy"),
        ("🤶🏽", "mrs claus medium skin tone"),
        ("👩‍👩‍👧", "family woman woman girl"),
        ("❤️!", "red heart"),
        ("1️⃣ step", "keycap step"),
        ("in 2022, gr8", "in gr"),
        ("½ of ² and Ⅷ", "of and"),
        ("#so_angry @user", "so angry user"),
        ("well...no—yes €5 $", "well no yes"),
        ("«oui» „ja“ ¿no?", "oui ja no"),
        (r"one\ntwo", "one two"),
        ("salt &amp; pepper &lt;b&gt;x&lt;/b&gt;", "salt pepper x"),
        ("zero​width\x00", "zerowidth"),
        ("tab\tand\xa0space\u2028line", "tab and space line"),
        ("naïve Ünder", "naïve ünder"),
        ("一二三", "一二三"),
        ("?! 12 ...", ""),
        ("", ""),
    ],
)
def test_a_tweet_becomes_these_words(text, expected):
    assert tweets.words(text) == expected.split()


@given(st.text(max_size=60))
def test_words_hold_neither_space_nor_number_nor_mark(text):
    for word in tweets.words(text):
        assert word
        assert not any(sign.isspace() for sign in word)
        assert all(unicodedata.category(sign)[0] not in "NPS" for sign in word)


@given(st.text(alphabet=string.ascii_letters + string.punctuation + " ", max_size=60))
def test_words_of_ascii_are_lower_case(text):
    assert all(word == word.lower() for word in tweets.words(text))


@given(st.text(alphabet=string.ascii_letters + " 😂🤶", max_size=40))
def test_words_are_words_of_themselves(text):
    once = tweets.words(text)
    assert tweets.words(" ".join(once)) == once


def test_the_order_of_the_steps_shows_where_it_matters():
    # Lower-casing comes before emojis: the one that has a small form is one no more.
    assert tweets.name_emojis("Ⓜ") == " circled_m "
    assert tweets.words("Ⓜ") == []
    # Numbers and marks in their names go after.
    assert tweets.words("🥇") == ["st", "place", "medal"]
    # Tags go before marks, which would leave their names behind.
    assert tweets.words("<em>no</em>") == ["no"]


def test_text_land_of_the_baselines_loads_no_torch():
    names = ("tweets", "vectors", "settings", "dialogues", "linear")
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module('llm_emo.baselines.' + name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
