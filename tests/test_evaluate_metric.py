"""The `evaluate.Metric` gives our numbers, alone and combined, and fetches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import llm_emo

SCRIPT = """
import socket

def refuse(*_, **__):
    raise AssertionError("a socket was opened")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

import evaluate
from llm_emo import metrics
from llm_emo.evaluate_metric import UNPARSED, EmotionMetric

labels = ["joy", "anger", "fear"]
gold = ["joy", "anger", "fear", "joy", "anger"]
answers = ["joy", "anger", "joy", None, "fear"]
encoded = [UNPARSED if answer is None else answer for answer in answers]
expected = metrics.evaluate(gold, answers, labels, bootstrap=0).as_dict()

for in_memory in (True, False):
    metric = EmotionMetric(labels, keep_in_memory=in_memory)
    assert metric.compute(predictions=encoded, references=gold) == expected
    for start in range(0, 5, 2):
        end = start + 2
        metric.add_batch(predictions=encoded[start:end], references=gold[start:end])
    assert metric.compute() == expected
    for prediction, reference in zip(encoded, gold):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == expected

both = {"all": EmotionMetric(labels), "some": EmotionMetric(labels, averaged_over=["joy"])}
combined = evaluate.combine(both)
merged = combined.compute(predictions=encoded, references=gold)
assert merged["all_accuracy"] == merged["some_accuracy"] == expected["accuracy"]
assert merged["f1"] == expected["per_class"]["joy"]["f1"]
for start in range(0, 5, 2):
    end = start + 2
    combined.add_batch(predictions=encoded[start:end], references=gold[start:end])
assert combined.compute() == merged

intervals = EmotionMetric(labels, bootstrap=100, seed=3)
assert intervals.compute(predictions=encoded, references=gold)["ci"] == {
    name: list(ends)
    for name, ends in metrics.evaluate(gold, answers, labels, bootstrap=100, seed=3).ci.items()
}
print("same")
"""


def test_the_metric_equals_ours_in_every_use_without_a_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        cwd=Path(llm_emo.__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.stdout == "same\n", done.stderr
