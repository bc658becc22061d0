"""Laws of grouped splits."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llm_emo import grouping
from llm_emo.types import Utterance

NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"])
ROWS = st.lists(st.tuples(NAMES, st.sampled_from(["joy", "fear"])), min_size=2, max_size=40)


def table(rows):
    groups = {str(n): name for n, (name, _) in enumerate(rows)}
    gold = {str(n): label for n, (_, label) in enumerate(rows)}
    return groups, gold


@given(ROWS, st.floats(0.05, 0.5), st.integers(0, 5))
def test_at_least_one_group_is_chosen_and_one_is_left(rows, fraction, seed):
    groups, gold = table(rows)
    chosen = grouping.choose(groups, gold, fraction, seed)
    everything = set(groups.values())
    assert chosen <= everything
    if len(everything) > 1:
        assert chosen
        assert chosen != everything


@given(ROWS, st.integers(0, 5))
def test_choice_does_not_depend_on_the_order_of_rows(rows, seed):
    groups, gold = table(rows)
    back = dict(reversed(groups.items()))
    gold_back = dict(reversed(gold.items()))
    assert grouping.choose(groups, gold, 0.3, seed) == grouping.choose(back, gold_back, 0.3, seed)


def test_choice_holds_about_the_fraction_of_every_label():
    rows = [(f"g{n % 200}", "joy" if n % 5 else "fear") for n in range(2000)]
    groups, gold = table(rows)
    for seed in range(5):
        chosen = grouping.choose(groups, gold, 0.2, seed)
        counts = Counter(gold[uid] for uid in gold if groups[uid] in chosen)
        assert abs(counts["joy"] - 320) <= 16
        assert abs(counts["fear"] - 80) <= 16


def test_seeds_choose_differently():
    groups, gold = table([(f"g{n}", "joy") for n in range(100)])
    assert len({grouping.choose(groups, gold, 0.1, seed) for seed in range(10)}) == 10


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(["Hm", "hm ", "No", "Yes"]))))
def test_rows_that_share_a_document_or_a_text_share_a_group(pairs):
    rows = [Utterance(str(n), t, dialogue=d, turn=n) for n, (d, t) in enumerate(pairs)]
    groups = grouping.group(rows, "document and text")
    for one in rows:
        for other in rows:
            same_text = one.text.casefold().split() == other.text.casefold().split()
            if one.dialogue == other.dialogue or same_text:
                assert groups[one.uid] == groups[other.uid]


def test_rows_that_share_nothing_do_not_share_a_group():
    rows = [Utterance("1", "a"), Utterance("2", "b", dialogue="d", turn=0), Utterance("3", "c")]
    assert len(set(grouping.group(rows, "document and text").values())) == 3


def test_history_keeps_turns_that_are_not_scored():
    rows = [
        Utterance("1", "one", dialogue="d", turn=0, label="joy"),
        Utterance("2", "two", dialogue="d", turn=1, label="unclear"),
        Utterance("3", "three", dialogue="e", turn=0, label="joy"),
        Utterance("4", "four", dialogue="d", turn=2, label="joy"),
    ]
    kept = grouping.with_history(rows, lambda row: row.label if row.label == "joy" else None)
    assert [row.utterance.uid for row in kept] == ["1", "3", "4"]
    assert [turn.uid for turn in kept[2].history] == ["1", "2"]
    assert kept[1].history == ()


def test_history_follows_turn_numbers_not_the_order_of_rows():
    rows = [Utterance(str(n), "x", dialogue="d", turn=n, label="joy") for n in (3, 1, 2)]
    kept = grouping.with_history(rows, lambda row: row.label)
    assert [turn.uid for turn in kept[0].history] == ["1", "2"]


def test_digest_names_a_set_of_rows_whatever_their_order():
    assert grouping.digest(["b", "a"]) == grouping.digest(["a", "b"])
    assert grouping.digest(["ab"]) != grouping.digest(["a", "b"])
