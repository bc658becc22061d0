"""A corpus of tones in EMO-DB's form: four emotions that anything which hears can tell apart."""

from types import SimpleNamespace

import numpy as np
import soundfile

from llm_emo import datasets, protocols
from llm_emo.experiment import BaselineExperiment
from llm_emo.recipes import BaselineRecipe

PITCH = {"W": 300, "F": 900, "N": 1800, "T": 3600}
"""Hertz."""
SPEAKERS, SENTENCES = ("03", "08", "09"), ("a01", "b02", "b10")

CNN = {"channels": [2, 4], "kernel": 3, "pool": 2, "dropout": 0.0}  # 40 features
TRANSFORMER = {"layers": 1, "heads": 4, "inner": 16, "dropout": 0.0}
NETWORKS = {
    "ilt": {"structure": "ilt", "fusion": "trainable_sum", "weight": 0.5},
    "cat": {"structure": "cat", "window": 8, "filters": 8},
}
for _network in NETWORKS.values():
    _network |= {"positional_encoding": False, "mask": True}
    _network |= {"cnn": CNN, "transformer": TRANSFORMER}
NOISE = {"copies": 1, "low": 20.0, "high": 30.0}


def corpus(root, seconds=0.3):
    """Write `root`/emodb/wav: three speakers say three sentences in four emotions."""
    folder = root / "emodb" / "wav"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for speaker in SPEAKERS:
        for sentence in SENTENCES:
            for letter, pitch in PITCH.items():
                samples = int(16_000 * seconds * generator.uniform(0.7, 1.3))
                t = np.arange(samples) / 16_000
                tone = 0.3 * np.sin(2 * np.pi * pitch * t * generator.uniform(0.95, 1.05))
                tone += 0.01 * generator.standard_normal(samples)
                soundfile.write(folder / f"{speaker}{sentence}{letter}a.wav", tone, 16_000)
    return root


def experiment(root, method, seed=0, fold=0, epochs=2, **train):
    """Return the experiment of a recipe with this method on the fixture."""
    settings = {
        "epochs": epochs,
        "batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 5e-3,
        "weight_decay": 0.0,
        "schedule": "constant",
        "optimizer": "adam",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "evaluations_per_epoch": 1,
        **train,
    }
    data = {"dataset": "emodb", "protocol": "emodb4", "fold": fold, "dev_fraction": 0.1}
    recipe = {"seed": seed, "data": data, "method": method, "train": settings}
    return BaselineExperiment.prepare(BaselineRecipe.model_validate(recipe), root)


def rows_of(root, split="train"):
    """Return rows of the fixture without an experiment."""
    made = protocols.rows(protocols.get("emodb4"), datasets.read("emodb", root), seed=0, fold=0)
    return made.get(split)


def stand_in(rows, names=("anger", "happy", "neutral", "sad")):
    """Return what a task reads of an experiment."""
    return SimpleNamespace(
        labels=SimpleNamespace(names=names),
        recipe=SimpleNamespace(seed=0),
        rows=lambda split: rows,
    )
