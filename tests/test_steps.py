import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_emo.encoding import Encoded
from llm_emo.errors import RecipeError
from llm_emo.experiment import dialogues, dialogues_of
from llm_emo.steps import AHEAD, Steps, sequence
from llm_emo.training import collate
from llm_emo.types import Row, Utterance

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)
"""Turns of each dialogue."""


def rows_of(count):
    return tiny.encoded(count)


def grouped(turns):
    """Number the rows of dialogues of so many turns."""
    numbers = itertools.count()
    return [list(itertools.islice(numbers, count)) for count in turns]


def made(count, *, size=4, micro=None, budget=None, groups=None, seed=0, rank=0, world=1, epoch=0):
    section = tiny.train(
        batch_size=size, micro_batch_size=micro or size, tokens_per_pass=budget,
        batch_by="row" if groups is None else "dialogue",
    )  # fmt: skip
    steps = Steps(
        rows_of(count), section, seed=seed, dialogues=groups, rank=rank, world=world
    )  # fmt: skip
    steps.set_epoch(epoch)
    return steps


def flat(step):
    return [row for own in step for row in own]


def test_a_dialogue_longer_than_a_step_fills_whole_steps_first():
    groups = grouped([25, 3, 2, 4, 6, 2, 5, 1])
    long = groups[0]
    for seed in range(20):
        drawn = list(made(48, size=10, groups=groups, seed=seed).drawn())
        cut = [[row for row in step if row in long] for step in drawn]
        pieces = [rows for rows in cut if rows]
        assert list(itertools.chain(*pieces)) == long
        assert len(pieces) <= 4  # what was left of a step, two whole ones, the rest
        begun = [step[0] in long for step in drawn]
        assert sum(begun) >= len(pieces) - 1  # all but the first piece begin their step


# --- which rows meet ---------------------------------------------------------------------------


@given(
    turns=sizes,
    by=st.sampled_from(["row", "dialogue"]),
    size=st.integers(1, 8),
    micro=st.integers(1, 8),
    budget=st.sampled_from([None, 1, 12, 40]),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_neither_processes_nor_passes_change_which_rows_meet(
    turns, by, size, micro, budget, world, epoch, seed
):
    count = sum(turns)
    shape = {"size": size, "groups": grouped(turns) if by == "dialogue" else None}
    single = made(count, **shape, seed=seed, epoch=epoch)
    ranks = [
        made(count, **shape, micro=micro, budget=budget, seed=seed, epoch=epoch, rank=rank,
             world=world)
        for rank in range(world)
    ]  # fmt: skip
    shares = [list(rank) for rank in ranks]
    steps = [flat(step) for step in single]
    for share, rank in zip(shares, ranks, strict=True):
        assert len(share) == len(rank) == len(steps), "processes would wait for each other"
    for step, own in zip(steps, zip(*shares, strict=True), strict=True):
        assert Counter(row for share in own for row in flat(share)) == Counter(step)
        for share in own:
            assert all(len(rows) <= micro for rows in share)
            assert all(share) or share == [[]]
    assert sorted(flat(steps)) == list(range(count)), "every row once an epoch"
    assert [len(step) for step in steps[:-1]] == [size] * (len(steps) - 1)
    assert len(steps) == -(-count // size)


@pytest.mark.parametrize("groups", [None, grouped([3] * 16)])
def test_the_order_is_a_function_of_seed_and_epoch(groups):
    def order(seed, epoch, noise):
        torch.manual_seed(noise)
        return flat(flat(made(48, groups=groups, seed=seed, epoch=epoch)))

    assert order(1, 0, 5) == order(1, 0, 6)
    assert len({tuple(order(seed, epoch, 0)) for seed in range(3) for epoch in range(3)}) == 9


def test_steps_of_rows_are_the_epoch_s_permutation_cut():
    generator = torch.Generator().manual_seed(7 * 1_000_003 + 2)
    order = torch.randperm(10, generator=generator).tolist()
    steps = list(made(10, size=4, micro=2, seed=7, epoch=2))
    assert steps == [[order[0:2], order[2:4]], [order[4:6], order[6:8]], [order[8:10]]]


def test_processes_deal_rows_out_in_turn():
    order = flat(flat(made(8, size=8)))
    assert [flat(next(iter(made(8, size=8, rank=rank, world=2)))) for rank in (0, 1)] == [
        order[0::2], order[1::2]
    ]  # fmt: skip


def test_a_process_without_a_row_has_an_empty_pass():
    shares = [list(made(5, size=4, rank=rank, world=2)) for rank in (0, 1)]
    assert [len(flat(share[1])) for share in shares] == [1, 0]
    assert shares[1][1] == [[]]


# --- dialogues ---------------------------------------------------------------------------------


def stretches(step, groups):
    """Return the turns that a step has of each dialogue, in the step's order."""
    owner = {row: number for number, group in enumerate(groups) for row in group}
    return [
        (number, [groups[number].index(row) for row in rows])
        for number, rows in itertools.groupby(step, key=owner.__getitem__)
    ]


@given(turns=sizes, size=st.integers(1, 8), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_turns_stay_neighbours_and_a_dialogue_is_cut_only_where_a_step_is_full(turns, size, seed):
    groups = grouped(turns)
    seen = Counter()
    steps = [flat(step) for step in made(sum(turns), size=size, groups=groups, seed=seed)]
    for step in steps:
        found = stretches(step, groups)
        assert len({number for number, _ in found}) == len(found), "a dialogue's rows are together"
        for place, (number, places) in enumerate(found):
            assert places == list(range(seen[number], seen[number] + len(places)))
            seen[number] += len(places)
            whole = seen[number] == len(groups[number])
            assert whole or place == len(found) - 1, "only the last of a step is cut"
        cut = [number for number, _ in found if seen[number] < len(groups[number])]
        assert not cut or len(step) == size


@given(turns=st.lists(st.integers(1, 6), min_size=1, max_size=AHEAD), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_no_dialogue_is_cut_while_another_fits(turns, seed):
    # With no more dialogues than are looked at, all that is left can be compared.
    groups, size = grouped(turns), 7
    left = {number: len(group) for number, group in enumerate(groups)}
    for step in made(sum(turns), size=size, groups=groups, seed=seed):
        for number, places in stretches(flat(step), groups):
            room = size
            if len(places) < left[number]:
                others = sum(len(p) for n, p in stretches(flat(step), groups) if n != number)
                room -= others
                assert all(left[n] > room for n in left if n != number and left[n])
            left[number] -= len(places)


@pytest.mark.parametrize("turns", [[4] * 6, [8, 4, 4, 2, 2, 2, 2], [1, 1, 2, 4, 8, 4, 2, 2]])
def test_steps_that_dialogues_fill_cut_none(turns):
    # Halves of halves: in whatever order they come, one that is left fits what room is left.
    groups = grouped(turns)
    for seed in range(20):
        for step in made(sum(turns), size=8, groups=groups, seed=seed):
            for number, places in stretches(flat(step), groups):
                assert len(places) == turns[number]


def test_dialogues_meet_others_in_each_epoch():
    groups = grouped([4] * 8)
    met = {
        frozenset(number for number, _ in stretches(flat(step), groups))
        for epoch in range(4)
        for step in made(32, size=8, groups=groups, epoch=epoch)
    }
    assert len(met) > 8


def test_a_process_s_share_of_dialogues_is_a_stretch_of_neighbours():
    groups = grouped([4] * 8)
    whole = [flat(step) for step in made(32, size=8, groups=groups)]
    for rank in range(3):
        for step, share in zip(
            whole, made(32, size=8, groups=groups, rank=rank, world=3), strict=True
        ):
            at = [step.index(row) for row in flat(share)]
            assert at == list(range(at[0], at[-1] + 1))


def utterance(uid, dialogue=None, turn=None):
    return Row(Utterance(uid, f"text {uid}", dialogue=dialogue, turn=turn), "joy")


def test_the_rows_of_a_dialogue_are_found_in_the_order_of_its_turns():
    rows = [
        utterance("a", "one", 2), utterance("b", "two", 0), utterance("c"),
        utterance("d", "one", 0), utterance("e", "one", 1),
    ]  # fmt: skip
    assert dialogues(rows) == [[3, 4, 0], [1], [2]]


def test_a_row_without_a_dialogue_belongs_to_none_whatever_its_name():
    rows = [utterance("a", "7", 0), utterance("7"), utterance("b", "7", 1)]
    assert dialogues(rows) == [[0, 2], [1]]


@pytest.mark.parametrize("by", ["row", "dialogue"])
def test_dialogues_that_a_corpus_does_not_have_cannot_be_batched_by(by):
    class Stand:
        recipe = SimpleNamespace(
            train=tiny.train(batch_by=by), data=SimpleNamespace(dataset="tweets")
        )
        given = (utterance("a"), utterance("b"))

        def rows(self, split):
            assert split == "train"
            return self.given

    if by == "row":
        assert dialogues_of(Stand()) is None
        return
    with pytest.raises(RecipeError, match=r"tweets belong to no dialogues.*train\.batch_by=row"):
        dialogues_of(Stand())
    Stand.given = (utterance("a"), utterance("b", "one", 0))
    assert dialogues_of(Stand()) == [[0], [1]]


# --- passes ------------------------------------------------------------------------------------

ids = st.lists(st.sampled_from([3, 50, 200]), min_size=1, max_size=8).map(tuple)


@given(prompts=st.lists(ids, min_size=1, max_size=9), budget=st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_a_pass_is_as_many_rows_as_the_budget_of_distinct_tokens_holds(prompts, budget):
    rows = [Encoded(str(n), prompt, (31, 2)) for n, prompt in enumerate(prompts)]
    section = tiny.train(
        batch_size=len(rows), micro_batch_size=len(rows), tokens_per_pass=budget
    )  # fmt: skip
    (step,) = list(Steps(rows, section, seed=0))
    assert sorted(flat(step)) == list(range(len(rows)))
    for own in step:
        assert len(own) == 1 or len(collate([rows[row] for row in own])["trie"]) <= budget
    read = [[sequence(rows[row]) for row in own] for own in step]
    assert flat(read) == sorted(flat(read)), "rows that begin alike lie together"
    for own, after in itertools.pairwise(step):
        more = [rows[row] for row in [*own, after[0]]]
        assert len(collate(more)["trie"]) > budget, "the next row had room"


def test_both_bounds_of_a_pass_hold():
    rows = rows_of(12)
    section = tiny.train(batch_size=12, micro_batch_size=3, tokens_per_pass=10_000)
    (step,) = list(Steps(rows, section, seed=0))
    assert [len(own) for own in step] == [3, 3, 3, 3]
    tight = section.model_copy(update={"tokens_per_pass": 12})
    (step,) = list(Steps(rows, tight, seed=0))
    assert all(
        len(own) == 1 or len(collate([rows[row] for row in own])["trie"]) <= 12 for own in step
    )


def test_a_row_beyond_the_budget_runs_alone():
    long = Encoded("long", tuple(range(5, 105)), (2,))
    rows = [*rows_of(3), long]
    section = tiny.train(batch_size=4, micro_batch_size=4, tokens_per_pass=60)
    (step,) = list(Steps(rows, section, seed=0))
    assert [3] in step
    assert len(step) == 2
