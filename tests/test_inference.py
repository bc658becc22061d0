import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_emo import inference
from llm_emo.inference import generate, passes, score, shared_length
from llm_emo.trie import TokenTrie

few = settings(max_examples=10, deadline=None)
architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
methods = pytest.mark.parametrize("method", tiny.METHODS)

prompts_of = st.lists(
    st.lists(st.sampled_from([3, 50, 200]), min_size=1, max_size=9).map(tuple),
    min_size=1,
    max_size=6,
)
END = 2
ANSWERS = [(30, END), (30, 31, END), (40, 41, 42, END), (END,)]


def label_by_label(model, prompt, answer):
    """log P(answer | prompt) from one plain forward pass."""
    logs = tiny.alone(model, [*prompt, *answer[:-1]]).log_softmax(-1)
    at = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
    return sum(float(logs[i, token]) for i, token in zip(at, answer, strict=True))


def by_generate(model, prompt, limit):
    """The greedy continuation that transformers' own `generate` writes."""
    tokens = torch.tensor([prompt])
    written = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=END,
        pad_token_id=0,
        use_cache=True,
    )[0, len(prompt) :].tolist()
    return tuple(written[: written.index(END)] if END in written else written)


def by_hand(model, prompt, limit):
    """The greedy continuation from one plain forward pass a token."""
    written = []
    while len(written) < limit:
        token = int(tiny.alone(model, [*prompt, *written])[-1].argmax())
        if token == END:
            break
        written.append(token)
    return tuple(written)


def ending(model):
    """Make the end token likely enough that some continuations stop early."""
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[END] = 3 * head[[101, 77, 9]].mean(0)
    return model


# --- scoring -----------------------------------------------------------------------------------


@architectures
@given(prompts=prompts_of)
@few
def test_scores_are_those_of_one_forward_pass_a_label(architecture, prompts):
    model = tiny.model(architecture)
    scored = dict(score(model, prompts, ANSWERS, tokens_per_pass=40))
    assert sorted(scored) == list(range(len(prompts)))
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            expected = [label_by_label(model, prompt, answer) for answer in ANSWERS]
            assert scored[row] == pytest.approx(expected, abs=1e-4)


@architectures
@methods
def test_scores_of_an_adapted_model_are_those_of_one_forward_pass_a_label(architecture, method):
    model = tiny.adapted(architecture, method)
    prompts = [(3, 50, 200, 7, 8, 9, 10, 11), (3, 50, 200), (3, 50, 200, 7, 99), (3, 50, 200)]
    scored = dict(score(model, prompts, ANSWERS, tokens_per_pass=1000))
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            expected = [label_by_label(model, prompt, answer) for answer in ANSWERS]
            assert scored[row] == pytest.approx(expected, abs=1e-4)


@given(prompts=prompts_of, order=st.randoms(use_true_random=False), budget=st.integers(1, 90))
@few
def test_a_score_does_not_depend_on_the_row_s_company(prompts, order, budget):
    model = tiny.model("qwen3")
    shuffled = list(range(len(prompts)))
    order.shuffle(shuffled)
    one_pass = dict(score(model, prompts, ANSWERS, tokens_per_pass=10**6))
    many = list(score(model, [prompts[i] for i in shuffled], ANSWERS, tokens_per_pass=budget))
    assert sorted(row for row, _ in many) == list(range(len(prompts)))
    for row, values in many:
        assert values == pytest.approx(one_pass[shuffled[row]], abs=1e-4)


def test_the_probabilities_of_all_answers_sum_to_one():
    # A complete prefix-free code over the vocabulary: every token, and every token behind one.
    model = tiny.model("llama")
    answers = [(first,) for first in range(tiny.VOCAB) if first != 5]
    answers += [(5, second) for second in range(tiny.VOCAB)]
    [(_, logs)] = score(model, [(3, 50, 200)], answers, tokens_per_pass=10)
    assert math.fsum(map(math.exp, logs)) == pytest.approx(1, abs=1e-5)


@methods
def test_scoring_and_generating_leave_the_model_in_eval_mode_and_without_gradients(method):
    model = tiny.adapted("llama", method, dropout=0.5).train()
    first = list(score(model, [(3, 4, 5)], ANSWERS, tokens_per_pass=50))
    assert not model.training
    assert first == list(score(model, [(3, 4, 5)], ANSWERS, tokens_per_pass=50))
    model.train()
    wrote = list(generate(model, [(3, 4)], ends=frozenset(), max_new_tokens=5, tokens_per_pass=9))
    assert not model.training
    assert wrote == list(
        generate(model, [(3, 4)], ends=frozenset(), max_new_tokens=5, tokens_per_pass=9)
    )
    assert all(p.grad is None for p in model.parameters())


# --- generating --------------------------------------------------------------------------------


@architectures
@given(prompts=prompts_of)
@few
def test_greedy_tokens_equal_those_of_generate(architecture, prompts):
    model = ending(tiny.model(architecture))
    written = dict(
        generate(model, prompts, ends=frozenset({END}), max_new_tokens=8, tokens_per_pass=60)
    )
    assert sorted(written) == list(range(len(prompts)))
    for row, prompt in enumerate(prompts):
        assert written[row] == by_generate(model, prompt, 8)


@architectures
@methods
def test_greedy_tokens_of_an_adapted_model_equal_those_of_one_sequence_alone(architecture, method):
    model = tiny.adapted(architecture, method)
    prompts = [(3, 50, 200, 7, 8, 9, 10, 11), (3, 50, 200), (3, 50, 200, 7, 99), (3, 50, 200), (4,)]
    written = dict(
        generate(model, prompts, ends=frozenset({END}), max_new_tokens=6, tokens_per_pass=1000)
    )
    with torch.no_grad():
        assert written == {row: by_hand(model, p, 6) for row, p in enumerate(prompts)}


def test_some_continuations_of_these_tests_do_end_early():
    # Otherwise the equality above would say nothing about ending.
    model = ending(tiny.model("llama"))
    prompts = [(3, token) for token in range(5, 60)]
    lengths = [
        len(text)
        for _, text in generate(
            model, prompts, ends=frozenset({END}), max_new_tokens=8, tokens_per_pass=10**4
        )
    ]
    assert min(lengths) < 8
    assert max(lengths) == 8
    assert len(set(lengths)) > 2


@given(prompts=prompts_of, order=st.randoms(use_true_random=False), budget=st.integers(1, 90))
@few
def test_a_continuation_does_not_depend_on_the_row_s_company(prompts, order, budget):
    model = ending(tiny.model("gemma3"))
    shuffled = list(range(len(prompts)))
    order.shuffle(shuffled)
    ends = frozenset({END})
    one_pass = dict(generate(model, prompts, ends=ends, max_new_tokens=6, tokens_per_pass=10**6))
    many = list(
        generate(
            model,
            [prompts[i] for i in shuffled],
            ends=ends,
            max_new_tokens=6,
            tokens_per_pass=budget,
        )
    )
    assert sorted(row for row, _ in many) == list(range(len(prompts)))
    assert all(text == one_pass[shuffled[row]] for row, text in many)


def test_generation_settings_of_the_checkpoint_do_not_leak_in():
    model = tiny.model("llama")
    prompts, ends = [(3, 50, 200)], frozenset({END})
    before = list(generate(model, prompts, ends=ends, max_new_tokens=8, tokens_per_pass=50))
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=before[0][1][0]
    )
    again = list(generate(model, prompts, ends=ends, max_new_tokens=8, tokens_per_pass=50))
    assert again == before


def test_any_of_several_end_tokens_ends_and_none_is_returned():
    model = tiny.model("llama")
    [(_, free)] = generate(model, [(3, 50)], ends=frozenset(), max_new_tokens=6, tokens_per_pass=50)
    stop = free[2]
    cut = free[: free.index(stop)]
    ends = frozenset({stop, END})
    assert list(generate(model, [(3, 50)], ends=ends, max_new_tokens=6, tokens_per_pass=50)) == [
        (0, cut)
    ]


def test_one_new_token_is_one_forward_pass():
    model = tiny.model("llama")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    list(generate(model, [(3, 4)], ends=frozenset(), max_new_tokens=1, tokens_per_pass=50))
    assert len(calls) == 1


# --- streams and beginnings --------------------------------------------------------------------


def scored(model, prompts, budget=1000):
    return list(score(model, prompts, ANSWERS, tokens_per_pass=budget))


def written(model, prompts, budget=1000):
    ends = frozenset({END})
    return list(generate(model, prompts, ends=ends, max_new_tokens=5, tokens_per_pass=budget))


BOTH = pytest.mark.parametrize("run", [scored, written])
START = (3, 50, 200, 7, 8, 9, 10)


def assert_equal_rows(found, expected):
    assert len(found) == len(expected)
    for (row, one), (_, other) in zip(sorted(found), sorted(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-4), row
    assert [row for row, _ in sorted(found)] == list(range(len(found)))


@BOTH
@methods
@pytest.mark.parametrize("architecture", ["gemma3", "glm"])
@given(tails=prompts_of, shared=st.integers(0, 7), window=st.integers(1, 4))
@settings(max_examples=6, deadline=None)
def test_windows_and_their_beginnings_change_no_result(
    run, method, architecture, tails, shared, window
):
    model = tiny.adapted(architecture, method)
    # The last row begins otherwise, so that what was run for those before does not hold.
    prompts = [START[:shared] + tail for tail in tails] + [(4, *START)]
    alone = [(row, run(model, [prompt])[0][1]) for row, prompt in enumerate(prompts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "WINDOW", window)
        for budget in (1, 20):
            assert_equal_rows(run(model, iter(prompts), budget), alone)


@BOTH
def test_what_all_prompts_begin_with_is_run_once(run, monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 8)
    model = tiny.model("llama")
    prompts = [(*START, 20 + row, 90 - row) for row in range(32)]
    places = []
    model.register_forward_pre_hook(
        lambda m, args, inputs: places.extend(inputs["position_ids"][0].tolist()), with_kwargs=True
    )
    run(model, prompts, 30)
    assert [place for place in places if place < len(START)] == list(range(len(START)))


@BOTH
def test_a_beginning_is_run_anew_where_a_window_shares_another(run, monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 8)
    model = tiny.model("llama")
    begun = []
    own = inference.begin
    monkeypatch.setattr(inference, "begin", lambda model, ids: begun.append(ids) or own(model, ids))
    prompts = [(*START, 20 + row) for row in range(16)]
    prompts += [(*START[:3], 20 + row) for row in range(8)]
    prompts += [(*START, 60 + row) for row in range(8)]
    prompts += [(300 + row, 5) for row in range(8)]
    assert_equal_rows(run(model, prompts, 30), run(model, prompts, 10**6))
    assert begun[:2] == [START, START[:3]]
    # Longer ones of later windows are not worth a pass of their own; nothing in common is none.
    assert len(begun) == 2


@BOTH
def test_one_pass_needs_no_beginning_of_its_own(run):
    model = tiny.model("llama")
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    run(model, [(*START, 20), (*START, 21)])
    assert seen[0] > len(START)


@BOTH
def test_a_model_that_keeps_no_beginning_gives_the_same(run, monkeypatch):
    model = tiny.model("llama")
    prompts = [(*START, 20 + row) for row in range(9)]
    expected = run(model, prompts, 30)
    monkeypatch.setattr(inference, "begin", lambda model, ids: None)
    assert_equal_rows(run(model, prompts, 30), expected)


@BOTH
def test_a_stream_is_read_one_window_at_a_time(run, monkeypatch):
    monkeypatch.setattr(inference, "WINDOW", 5)
    model = tiny.model("llama")
    taken = []

    def prompts():
        for row in range(23):
            taken.append(row)
            yield (*START, 20 + row)

    stream = (
        score(model, prompts(), ANSWERS, tokens_per_pass=40)
        if run is scored
        else generate(model, prompts(), ends=frozenset(), max_new_tokens=2, tokens_per_pass=40)
    )
    for done, _ in enumerate(stream):
        assert len(taken) <= 5 * (done // 5 + 1)
    assert len(taken) == 23


# --- passes ------------------------------------------------------------------------------------


@given(prompts=prompts_of, extra=st.integers(0, 9), budget=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_passes_hold_every_row_once_and_keep_to_the_budget(prompts, extra, budget):
    groups = list(passes(prompts, extra, budget))
    assert sorted(row for group in groups for row in group) == list(range(len(prompts)))
    for group in groups:
        nodes = len(TokenTrie.build([prompts[row] for row in group])) + extra * len(group)
        assert nodes <= budget or len(group) == 1


@pytest.mark.parametrize("budget", [12, 30, 75])
def test_scoring_and_generating_keep_to_the_budget(budget):
    model = tiny.model("llama")
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    prompts = [(3, first, second) for first in (4, 5, 6) for second in range(10, 20)]
    list(score(model, prompts, ANSWERS, tokens_per_pass=budget))
    assert max(seen) <= budget
    assert len(seen) < len(prompts) or budget == 12
    seen.clear()
    list(generate(model, prompts, ends=frozenset(), max_new_tokens=4, tokens_per_pass=budget))
    # The beginning, which was run once, a pass and the steps behind it fill one cache.
    beginning, *rest = seen
    assert beginning == 1
    starts = range(0, len(rest), 4)
    assert all(beginning + sum(rest[i : i + 4]) <= budget for i in starts)


def test_no_rows_are_no_passes():
    model = tiny.model("llama")
    assert list(score(model, [], ANSWERS, tokens_per_pass=9)) == []
    ends = frozenset({END})
    assert list(generate(model, [], ends=ends, max_new_tokens=3, tokens_per_pass=9)) == []


def test_shared_length_counts_leading_tokens_only():
    assert shared_length((1, 2, 3), (1, 2, 4, 3)) == 2
    assert shared_length((), (1,)) == 0
    assert shared_length((1, 2), (1, 2, 3)) == 2
