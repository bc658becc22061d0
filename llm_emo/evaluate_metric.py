"""The measures of `llm_emo.metrics` as one `evaluate.Metric`.

For code that works with `evaluate`: it can be combined, fed batch by batch, and computed. It is
made here and not loaded by name, so nothing is fetched. Importing this module imports
`evaluate`, which takes seconds and loads torch; nothing else in the text half does.
"""

from typing import Any

import datasets
import evaluate

from llm_emo import metrics

UNPARSED = ""
"""How a prediction says that its answer gave no label."""

_DESCRIPTION = "Accuracy, F1, UA and parse rate of emotion labels; unparsed answers are wrong."
_INPUTS = """
Args:
    predictions: list of str, the canonical label names; "" for an answer without a label.
    references: list of str, the gold labels.
"""


class EmotionMetric(evaluate.Metric):  # type: ignore[misc]  # untyped library
    """Accuracy, macro-F1, weighted-F1, UA, parse rate, per class and confusion.

    The results are those of `metrics.evaluate(...).as_dict()`.

    Args:
        labels: The protocol's labels, in order.
        averaged_over: The labels of the mean F1, for protocols that leave some out.
        bootstrap: Resamples for the intervals; 0 makes none.
        seed: Of the resampling.
        cache_dir: Where `evaluate` makes its folder; its own default when None.
        keep_in_memory: Hold the rows in memory instead of in a file there.
    """

    def __init__(
        self,
        labels: list[str],
        *,
        averaged_over: list[str] | None = None,
        bootstrap: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
        keep_in_memory: bool = True,
    ) -> None:
        self.labels = labels
        self.averaged_over = averaged_over
        self.bootstrap = bootstrap
        self.bootstrap_seed = seed
        super().__init__(cache_dir=cache_dir, keep_in_memory=keep_in_memory)

    def _info(self) -> Any:
        """Describe the inputs: two columns of strings."""
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Return the report of all rows that were added."""
        return metrics.evaluate(
            references,
            [None if label == UNPARSED else label for label in predictions],
            self.labels,
            averaged_over=self.averaged_over,
            bootstrap=self.bootstrap,
            seed=self.bootstrap_seed,
        ).as_dict()
