"""A specialised model outside its run: one folder, read back without corpus and recipe file.

from llm_emo.baselines import exported
model = exported.load("folder")
model.label(["what a day!"])        # [Labelled(label="joy", probabilities={...})]
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm_emo import protocols, runs
from llm_emo.baselines import features, kinds, opening
from llm_emo.errors import ModelError
from llm_emo.experiment import BaselineExperiment
from llm_emo.folders import appearing
from llm_emo.labels import LabelSet
from llm_emo.protocols import Splits
from llm_emo.recipes import BaselineRecipe
from llm_emo.types import Row, Utterance

MODEL, RECIPE = "model", "recipe.json"


def export(experiment: BaselineExperiment, run: runs.Run, folder: Path) -> dict[str, Any]:
    """Write what a run learned to `folder`, complete or not at all.

    Raises:
        RunError: the folder exists and is not empty, or the run is not finished.
        JobFailed: the folder cannot be written.
    """
    runs.require_free(folder)
    run.require_finished()
    with appearing(folder) as hidden:
        shutil.copytree(run.adapter, hidden / MODEL)
        runs.write_json(hidden / RECIPE, experiment.recipe.model_dump(mode="json"))
        shutil.copy(run.folder / "labels.json", hidden)
        (hidden / "README.md").write_text(_card(experiment, run), "utf-8")
    files = sorted(path.name for path in folder.iterdir())
    return {"exported": str(folder), "format": experiment.recipe.method.kind, "files": files}


@dataclass(frozen=True)
class Labelled:
    """A label and the probability of every class."""

    label: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Exported:
    """A model that labels texts, or sound files where it hears."""

    names: tuple[str, ...]
    model: opening.Predictor
    reads: bool
    hears: bool

    def label(
        self, inputs: Sequence[str | Path | tuple[str, Path | str]], *, dialogue: bool = False
    ) -> list[Labelled]:
        """Label texts, paths of sound files, or pairs of both, as the model takes them, in order.

        Args:
            inputs: N of them.
            dialogue: whether they are the turns of one dialogue, oldest first.
        """
        said: list[Utterance] = []
        for number, given in enumerate(inputs):
            text, sound = given if isinstance(given, tuple) else (given, given)
            said.append(
                Utterance(
                    uid=str(number),
                    text=str(text) if self.reads else "",
                    dialogue="given" if dialogue else None,
                    turn=number if dialogue else None,
                    audio=str(sound) if self.hears else None,
                )
            )
        rows = [
            Row(utterance, self.names[0], tuple(said[:number]) if dialogue else ())
            for number, utterance in enumerate(said)
        ]
        with features.unkept():
            found = dict(self.model.probabilities(rows, "test")) if rows else {}
        return [
            Labelled(
                self.names[max(range(len(shares)), key=shares.__getitem__)],
                dict(zip(self.names, shares, strict=True)),
            )
            for shares in (found[utterance.uid] for utterance in said)
        ]


def load(folder: Path | str) -> Exported:
    """Read what `export` wrote.

    Raises:
        ModelError: a file is absent or damaged.
    """
    folder = Path(folder)
    try:
        recipe = BaselineRecipe.model_validate_json((folder / RECIPE).read_text("utf-8"))
        names = tuple(json.loads((folder / "labels.json").read_text("utf-8"))["names"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(
            f"{folder}: is no exported specialised model ({type(error).__name__}); name a folder "
            "that `llm-emo export RUN -o FOLDER` wrote"
        ) from error
    experiment = BaselineExperiment(
        root=None,
        protocol=protocols.get(recipe.data.protocol),
        labels=LabelSet(names, names),
        splits=Splits((), (), (), {}),
        files={},
        recipe=recipe,
    )
    reads, hears = _senses(recipe.method)
    return Exported(names, opening.load(experiment, folder / MODEL), reads, hears)


def _senses(method: kinds.Kind) -> tuple[bool, bool]:
    """Return whether a method reads and whether it hears."""
    if isinstance(method, kinds.Fusion):
        return method.text_run is not None, method.audio_run is not None
    return not method.hears, method.hears


def _card(experiment: BaselineExperiment, run: runs.Run) -> str:
    recipe, training = experiment.recipe, run.environment.get("training", {})
    shown = ", ".join(f"dev {name} {value:.4f}" for name, value in training["kept_dev"].items())
    reads, hears = _senses(recipe.method)
    what = (
        '"what a day!"' if not hears else '("what a day!", "clip.wav")' if reads else '"clip.wav"'
    )
    return f"""# {recipe.method.kind} for {experiment.protocol.name}

A specialised model of llm_emo, trained on {experiment.protocol.dataset}
({training.get("training_rows", 0):,} rows, seed {recipe.seed}{", " + shown if shown else ""}).
Classes: {", ".join(experiment.labels.names)}.

```python
from llm_emo.baselines import exported

model = exported.load("this folder")
model.label([{what}])
```

`recipe.json` states how it was trained, run {run.id}.
"""
