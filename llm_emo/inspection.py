"""What a recipe comes to, before anything is trained: do its parts fit, how do examples look."""

from pathlib import Path
from typing import Any

from llm_emo import recipes
from llm_emo.encoded_rows import encoded
from llm_emo.encoding import Encoder
from llm_emo.experiment import Experiment, dialogues_of
from llm_emo.models import facts
from llm_emo.models.source import locate
from llm_emo.protocols import leaks
from llm_emo.types import SPLITS, Split


def fit(experiment: Experiment, source: Path) -> dict[str, Any]:
    """Encode every split that the recipe needs; return what was found, lengths in tokens.

    What transformers says of a local model is kept, so that only the first check loads it.

    Raises:
        ModelError: model and tokenizer cannot be used, or not together, or the method names
            layers that the model has not.
        PromptError: a row leaves no room for its answer.
        ProtocolError: a split that training needs is empty.
        RecipeError: training batches by dialogue, and the corpus has none.
    """
    recipe = experiment.recipe
    place = _place(experiment)
    known = None if place is None else facts.recall(place)
    if known is None or known.tokenizer is None:
        encoder = _encoder(experiment)
    else:
        encoder = Encoder(known.tokenizer, recipe.prompt.max_length)
    dialogues_of(experiment)  # raises where there are none to batch by
    if known is None:
        from llm_emo.models import auto  # loads torch and transformers

        shape = auto.shape(auto.sketch(recipe.model))
    else:
        shape = known.shape
    if isinstance(recipe.method, recipes.Lora):
        facts.require_linear(shape.kind, shape.linear, recipe.method.target_modules)
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
        facts.require_known(recipe.model.name, shape.words, rows)
        lengths = sorted(len(row.prompt) + len(row.answer) for row in rows)
        result["splits"][split] = {
            "rows": len(rows),
            "tokens_median": lengths[len(lengths) // 2],
            "tokens_longest": lengths[-1],
            "shortened": sum(row.dropped > 0 for row in rows),
        }
    if experiment.splits.train and experiment.splits.test:
        result["test_texts_in_train"] = len(leaks(experiment.splits.train, experiment.splits.test))
    # Asked again: a folder that was rewritten meanwhile must not keep what it was.
    if known is None and place is not None and _place(experiment) == place:
        facts.keep(place, shape, encoder)
    return result


def remember(experiment: Experiment, encoder: Encoder) -> None:
    """Keep what a check of the bundled model will ask, while transformers is loaded anyway.

    Args:
        experiment: Of any recipe.
        encoder: Of the recipe's model.
    """
    if experiment.recipe.model.origin != "bundled":
        return
    place = _place(experiment)
    if place is None or place.file.exists():
        return
    import torch

    from llm_emo.models import auto

    with torch.random.fork_rng(devices=[]):  # what is drawn next must not depend on a cache
        shape = auto.shape(auto.sketch(experiment.recipe.model))
    facts.keep(place, shape, encoder)


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


def _place(experiment: Experiment) -> facts.Place | None:
    """Return where the facts of a recipe's model are kept; None where they cannot be.

    A hub model may have changed since, which only the hub can tell.
    """
    name, _ = locate(experiment.recipe.model)
    if experiment.recipe.model.origin == "hub":
        return None
    return facts.place(Path(name), experiment.prompt.system)


def _encoder(experiment: Experiment) -> Encoder:
    from llm_emo.models import auto  # loads torch and transformers

    recipe = experiment.recipe
    return Encoder(auto.load_tokenizer(recipe.model), recipe.prompt.max_length)
