"""What a recipe comes to, before anything is trained: do its parts fit, how do examples look."""

from pathlib import Path
from typing import Any

from llm_emo import recipes
from llm_emo.encoded_rows import encoded
from llm_emo.encoding import Encoder
from llm_emo.experiment import Experiment
from llm_emo.models import auto
from llm_emo.protocols import leaks
from llm_emo.steps import dialogues_of
from llm_emo.types import SPLITS, Split


def fit(experiment: Experiment, source: Path) -> dict[str, Any]:
    """Encode every split that the recipe needs; return what was found, lengths in tokens.

    Raises:
        ModelError: model and tokenizer cannot be used, or not together, or the method names
            layers that the model has not.
        PromptError: a row leaves no room for its answer.
        ProtocolError: a split that training needs is empty.
        RecipeError: training batches by dialogue, and the corpus has none.
    """
    recipe, encoder = experiment.recipe, _encoder(experiment)
    dialogues_of(experiment)  # raises where there are none to batch by
    model = auto.sketch(recipe.model)
    if isinstance(recipe.method, recipes.Lora):
        auto.require_linear(model, recipe.method.target_modules)
    result: dict[str, Any] = {
        "recipe": str(source),
        "protocol": experiment.protocol.name,
        "labels": list(experiment.labels.words),
        "splits": {},
        "record": experiment.splits.record,
    }
    for split in SPLITS:
        needed = split != "test" and recipe.train is not None
        if not needed and not getattr(experiment.splits, split):
            continue
        rows = encoded(encoder, experiment.examples(split))
        auto.require_known(recipe.model.name, model, rows)
        lengths = sorted(len(row.prompt) + len(row.answer) for row in rows)
        result["splits"][split] = {
            "rows": len(rows),
            "tokens_median": lengths[len(lengths) // 2],
            "tokens_longest": lengths[-1],
            "shortened": sum(row.dropped > 0 for row in rows),
        }
    if experiment.splits.train and experiment.splits.test:
        result["test_texts_in_train"] = len(leaks(experiment.splits.train, experiment.splits.test))
    return result


def examples(experiment: Experiment, split: Split, count: int) -> list[dict[str, Any]]:
    """Return the first `count` rows of a split as the model sees them."""
    encoder = _encoder(experiment)
    rendered = experiment.render(experiment.rows(split)[:count])
    return [
        {
            "uid": example.uid,
            "gold": example.gold,
            "message": example.message,
            "prompt": encoder.tokenizer.decode(list(row.prompt)),
            "answer": encoder.tokenizer.decode(list(row.answer)),
            "prompt_ids": list(row.prompt),
            "answer_ids": list(row.answer),
            "trained": f"the last {len(row.answer)} of {len(row.prompt) + len(row.answer)} tokens",
        }
        for example, row in zip(rendered, encoder.encode(rendered), strict=True)
    ]


def _encoder(experiment: Experiment) -> Encoder:
    recipe = experiment.recipe
    return Encoder(auto.load_tokenizer(recipe.model), recipe.prompt.max_length)
