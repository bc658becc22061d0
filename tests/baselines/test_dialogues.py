"""Utterances as dialogues."""

from hypothesis import given
from hypothesis import strategies as st

from llm_emo.baselines.dialogues import dialogues
from llm_emo.types import Utterance


def said(uid, dialogue=None, turn=None):
    return Utterance(uid, f"text of {uid}", dialogue=dialogue, turn=turn, label="joy")


def test_turns_are_sorted_and_unscored_ones_stay():
    rows = [said("b", "d1", 2), said("x"), said("a", "d1", 1), said("c", "d1", 3)]
    made = dialogues(rows, {"b": "joy", "x": "anger"})
    assert [[turn.uid for turn in dialogue.turns] for dialogue in made] == [["a", "b", "c"], ["x"]]
    assert [dialogue.golds for dialogue in made] == [(None, "joy", None), ("anger",)]


def test_a_dialogue_without_a_scored_turn_is_left_out():
    assert dialogues([said("a", "d1", 1)], {}) == []


def test_rows_of_a_document_are_no_dialogue():
    rows = [said("a", "document"), said("b", "document")]
    assert len(dialogues(rows, {"a": "joy", "b": "joy"})) == 2


def test_a_uid_and_a_dialogue_of_one_name_stay_apart():
    rows = [said("same"), said("a", "same", 1), said("b", "same", 2)]
    assert [len(d.turns) for d in dialogues(rows, dict.fromkeys(("same", "a"), "joy"))] == [1, 2]


TURNS = st.lists(st.tuples(st.sampled_from([None, "d1", "d2"]), st.booleans()), max_size=20)


@given(TURNS)
def test_every_scored_row_comes_once_with_all_of_its_dialogue(turns):
    rows = [said(str(n), name, n if name else None) for n, (name, _) in enumerate(turns)]
    gold = {str(n): "joy" for n, (_, scored) in enumerate(turns) if scored}
    made = dialogues(rows, gold)
    seen = [
        turn.uid
        for dialogue in made
        for turn, label in zip(dialogue.turns, dialogue.golds, strict=True)
        if label
    ]
    assert sorted(seen) == sorted(gold)
    for dialogue in made:
        name = dialogue.turns[0].dialogue
        assert len(dialogue.turns) == (1 if name is None else sum(r.dialogue == name for r in rows))
