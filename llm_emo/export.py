"""Adapters for use elsewhere: as PEFT folders, or merged into the base model."""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import nn

from llm_emo import recipes, runs
from llm_emo.encoding import Encoder
from llm_emo.errors import AdapterError, RunError
from llm_emo.experiment import Experiment
from llm_emo.inference import score
from llm_emo.labelling import Labeller, open_labeller
from llm_emo.machine import writing
from llm_emo.models import auto

Format = Literal["peft", "merged"]


def export(experiment: Experiment, run: runs.Run, folder: Path, format: Format) -> None:
    """Write the run's adapter to `folder`, complete or not at all.

    Raises:
        RunError: the folder exists and is not empty, is the working directory, or the run is
            not finished.
        AdapterError: this method cannot be merged.
        JobFailed: the folder cannot be written.
    """
    runs.require_free(folder)
    if not run.finished:
        raise RunError(f"{run.folder}: training has not finished; continue it with --resume")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder, "make room and export again"):
            partial.mkdir(parents=True)
            match format:
                case "peft":
                    _peft(experiment, run, partial)
                case "merged":
                    _merged(experiment, run, partial)
            shutil.copy(run.folder / "prompt.yaml", partial)
            shutil.copy(run.folder / "labels.json", partial)
            (partial / "README.md").write_text(_card(experiment, run, format), "utf-8")
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _peft(experiment: Experiment, run: runs.Run, folder: Path) -> None:
    """The run's adapter is in PEFT's layout already; say which base it needs."""
    if isinstance(experiment.recipe.method, recipes.Full):
        raise AdapterError("method full trains the whole model; export it with --format merged")
    for path in run.adapter.iterdir():
        shutil.copy(path, folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = experiment.recipe.model.name
    config["revision"] = experiment.recipe.model.revision
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _merged(experiment: Experiment, run: runs.Run, folder: Path) -> None:
    if experiment.recipe.model.quantization != "none":
        raise AdapterError(
            "merging into a quantised base would round the merged weights again; load the base "
            "unquantised for the merge: --set model.quantization=none"
        )
    if isinstance(experiment.recipe.method, recipes.PTuningV2):
        raise AdapterError(
            "P-Tuning v2 adds keys and values, which no weight of the base model holds, so "
            "there is nothing to merge; use --format peft"
        )
    labeller = open_labeller(experiment, run)
    match labeller.model:
        case PeftModel():
            merged: nn.Module = labeller.model.merge_and_unload()
        case model:
            merged = model
    merged.config.use_cache = True  # type: ignore[union-attr]
    merged.save_pretrained(str(folder))  # type: ignore[operator]
    labeller.base.tokenizer.save_pretrained(str(folder))


def _card(experiment: Experiment, run: runs.Run, format: Format) -> str:
    recipe, example = experiment.recipe, experiment.render(experiment.rows("train")[:1])[0]
    instruction = example.before if example.before else example.between
    load = (
        "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)"
        if format == "peft"
        else "AutoModelForCausalLM.from_pretrained(FOLDER)"
    )
    match recipe.model.origin:
        case "bundled":
            where = (
                " (bundled with llm_emo; its folder: "
                '`python -c "from llm_emo.models import bundled; print(bundled.folder())"`)'
            )
        case "hub":
            where = f" at revision {recipe.model.revision}"
        case "folder":
            where = ""
    return f"""---
library_name: {"peft" if format == "peft" else "transformers"}
base_model: {recipe.model.name}
---
# {experiment.protocol.name}: {recipe.method.kind}, run {run.id}

- base model: {recipe.model.name}{where}
- labels: {", ".join(experiment.labels.words)}
- protocol: {experiment.protocol.name} (corpus {experiment.protocol.dataset})
- load: `{load}`
- prompt: the chat template around this user message, answered by one label
  (`prompt.yaml` holds the form, `labels.json` the answers):

      {instruction.strip()} <text>
"""


@torch.inference_mode()
def difference_from_stock(labeller: Labeller, folder: Path, rows: int) -> float:
    """Return how far stock PEFT is from this program, as the largest difference in nats.

    Loads `folder` with `PeftModel` onto a fresh base in float32 and runs each label of the
    first `rows` test rows by itself, as anybody would with transformers alone.
    """
    experiment = labeller.experiment
    examples = experiment.examples("test")[:rows]
    base = auto.load(experiment.recipe.model, recipes.ZeroShot(kind="zero_shot"))
    stock = PeftModel.from_pretrained(base.model, str(folder)).eval()
    encoder = Encoder(base.tokenizer, experiment.recipe.prompt.max_length)
    answers = encoder.answers(experiment.answers)
    encoded_rows = encoder.encode(examples)
    budget = experiment.recipe.inference.tokens_per_pass
    prompts = [row.prompt for row in encoded_rows]
    ours = dict(score(labeller.model, prompts, answers, tokens_per_pass=budget))
    worst = 0.0
    for index, encoded in enumerate(encoded_rows):
        sums = []
        for answer in answers:
            ids = torch.tensor([encoded.prompt + answer], device=base.model.device)
            logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
            steps = logits[len(encoded.prompt) - 1 : -1].log_softmax(-1)
            sums.append(steps.gather(1, ids[0, len(encoded.prompt) :, None]).sum())
        theirs = torch.stack(sums).tolist()
        worst = max(worst, *(abs(a - b) for a, b in zip(ours[index], theirs, strict=True)))
    return worst
