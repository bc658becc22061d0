"""The benchmarks of scoring and generation compare like with like; timings are not tested."""

import pytest
import tiny
import torch
from benches import common, load

from llm_emo.errors import JobFailed, RunError

scoring = load("score")
PROMPTS = [row.prompt for row in tiny.encoded(9)]
ANSWERS = [(7, 8, 2), (7, 9, 2), (11, 2)]


@pytest.mark.parametrize("architecture", ["llama", "glm"])
def test_one_padded_forward_per_label_scores_what_the_trie_scores(architecture):
    model = tiny.model(architecture)
    _, ours = scoring.by_trie(model, PROMPTS, ANSWERS, tokens_per_pass=40)
    _, padded = scoring.by_padding(model, PROMPTS, ANSWERS, batch_size=4)
    assert torch.allclose(torch.tensor(ours), torch.tensor(padded), atol=1e-4)
    assert scoring.require_same({"llm_emo": ours, "padded": padded})["padded"] < 1e-4


@pytest.mark.parametrize("by", [1e-3, float("nan")])
def test_sides_with_other_log_probabilities_are_not_compared(by):
    with pytest.raises(JobFailed, match="padded: log-probabilities differ"):
        scoring.require_same({"llm_emo": [[-1.0, -2.0]], "padded": [[-1.0, -2.0 + by]]})


def test_words_are_labels_without_the_token_that_ends_them():
    assert scoring.answers_of(ANSWERS, "ended") == ANSWERS
    assert scoring.answers_of(ANSWERS, "words") == [(7, 8), (7, 9), (11,)]


def test_words_that_begin_like_others_need_the_token_that_ends_them():
    with pytest.raises(RunError, match="take --answers ended"):
        scoring.answers_of([(7, 2), (7, 8, 2)], "words")


def test_a_report_of_scores_shows_ratios_shares_and_agreement():
    def measured(rate, chosen):
        return {
            "rows_per_second": rate, "seconds": 10 / rate, "rows": 10, "chosen": chosen,
            "answers": [[7], [8]], "prompt_tokens": 100, "peak_memory_bytes": 2**20,
            "matrix": {"operations": 1e9, "operations_per_second": 1e10, "nodes": 30,
                       "measured_at": {"nodes": 30, "logits": 10}},
            "dtype": "bfloat16", "device": "cpu", "model": "tiny",
            "machine": {"versions": {"torch": "2"}, "started": "today", "cpu": "chip",
                        "gpu": None, "cores": 2, "threads": 1},
        }  # fmt: skip

    results = {"llm_emo": [measured(20.0, [0, 1])], "padded": [measured(4.0, [0, 0])]}
    common("harness").with_shares(results)
    text = scoring.report({"padded": 1e-6}, results, scoring.arguments([]))
    assert "llm_emo / padded: 5.00x" in text
    assert "same label in 50.0% in bfloat16" in text
    assert "2 labels of 1, 1 tokens (words)" in text
    assert "30 distinct tokens of 200" in text
    row = next(line for line in text.splitlines() if line.startswith("llm_emo "))
    assert row.split() == ["llm_emo", "20.00", "20.00", "20.00", "20%", "1", "MiB"]


# --- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "glm"])
def test_left_padded_generation_writes_what_the_trie_writes(architecture):
    generation = load("generate")
    model = tiny.model(architecture)
    prompts = [row.prompt for row in tiny.encoded(12, seed=3)]
    first = generation.by_trie(model, prompts, end=2, max_new_tokens=8, tokens_per_pass=60)[1]
    end = first[0][2]  # a token that ends some rows early
    _, ours = generation.by_trie(model, prompts, end=end, max_new_tokens=8, tokens_per_pass=60)
    _, padded = generation.by_padding(model, prompts, end=end, max_new_tokens=8, batch_size=5)
    assert padded == ours
    assert len({len(row) for row in ours}) > 1
    generation.require_same({"llm_emo": ours, "padded": padded})
    with pytest.raises(JobFailed, match="padded writes other tokens"):
        generation.require_same({"llm_emo": ours, "padded": [*padded[:-1], (1, 2, 3)]})
