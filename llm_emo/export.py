"""Adapters for use elsewhere: for PEFT, for ChatGLM2's own code, or merged into the base model."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from llm_emo import convert, methods, recipes, runs
from llm_emo.encoding import Encoder
from llm_emo.errors import AdapterError, RunError
from llm_emo.experiment import Experiment
from llm_emo.folders import appearing
from llm_emo.inference import score
from llm_emo.labelling import Labeller, open_labeller
from llm_emo.machine import say
from llm_emo.models import auto, chatglm2_adapters, meta

Format = Literal["peft", "chatglm2", "merged"]
MergeDtype = Literal["auto", "float32", "bfloat16", "float16", "nf4"]

_SLACK = 16 << 20
"""Bytes beside a merged model's weights: tokenizer, configs, card."""

ROWS_COMPARED = 4
"""Training rows whose logits tell what merging or rounding changes."""


def export(
    experiment: Experiment,
    run: runs.Run,
    folder: Path,
    format: Format,
    merge_dtype: MergeDtype = "auto",
) -> dict[str, Any]:
    """Write what the run learned to `folder`, complete or not at all.

    Args:
        experiment: The run's experiment.
        run: A finished run.
        folder: A new or empty folder.
        format: `peft`, an adapter folder; `chatglm2`, one for programs that run ChatGLM2's
            original code; `merged`, the whole model.
        merge_dtype: How `merged` stores the weights: `auto` takes the dtype in which the recipe
            computes on this machine; `float16` and `nf4` round them after merging.

    Returns:
        What was written and, for a merged model, by how much its logits differ; for JSON.

    Raises:
        RunError: the folder exists and is not empty, is the working directory, or the run is
            not finished.
        AdapterError: this method, or this base, has no such form.
        JobFailed: there is no room for a merged model, or the folder cannot be written.
    """
    runs.require_free(folder)
    run.require_finished()
    if merge_dtype != "auto" and format != "merged":
        raise RunError(f"--merge-dtype {merge_dtype}: belongs to --format merged, not to {format}")
    need, because = 0, ""
    if format == "merged":
        _require_mergeable(experiment, run)
        need, because = _room(experiment, merge_dtype)
    with appearing(folder, need, because) as hidden:
        match format:
            case "peft":
                told = _peft(experiment, run, hidden)
            case "chatglm2":
                told = _chatglm2(experiment, run, hidden)
            case "merged":
                told = _merged(experiment, run, hidden, merge_dtype)
        shutil.copy(run.folder / "prompt.yaml", hidden)
        shutil.copy(run.folder / "labels.json", hidden)
        (hidden / "README.md").write_text(_card(experiment, run, format), "utf-8")
    files = sorted(path.name for path in folder.iterdir())
    return {"exported": str(folder), "format": format, **told, "files": files}


# --- adapters -----------------------------------------------------------------------------------


def _peft(experiment: Experiment, run: runs.Run, folder: Path) -> dict[str, Any]:
    """The run's adapter is in PEFT's layout already; say which base it needs."""
    _require_adapter(experiment)
    for path in run.adapter.iterdir():
        shutil.copy(path, folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = experiment.recipe.model.name
    config["revision"] = experiment.recipe.model.revision
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return {}


def _chatglm2(experiment: Experiment, run: runs.Run, folder: Path) -> dict[str, Any]:
    _require_adapter(experiment)
    model = experiment.recipe.model
    base = Path(model.name).expanduser()
    if model.origin != "folder" or _model_type(base) != "glm":
        raise AdapterError(
            f"--format chatglm2: the run's base model, {model.name}, is no ChatGLM2 that "
            "`llm-emo convert` made; ChatGLM2's code can load no adapter of it; use --format peft"
        )
    done = chatglm2_adapters.to_chatglm2(run.adapter, folder, base=base)
    return {key: value for key, value in done.items() if key not in ("converted", "to", "source")}


def _model_type(base: Path) -> Any:
    try:
        return json.loads((base / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _require_adapter(experiment: Experiment) -> None:
    if isinstance(experiment.recipe.method, recipes.Full):
        raise AdapterError("method full trains the whole model; export it with --format merged")


# --- merged -------------------------------------------------------------------------------------


def _require_mergeable(experiment: Experiment, run: runs.Run) -> None:
    recipe, trained = experiment.recipe, _trained_on(run)
    if isinstance(recipe.method, recipes.PTuningV2):
        raise AdapterError(
            "P-Tuning v2 adds keys and values, which no weight of the base model holds, so "
            "there is nothing to merge; use --format peft"
        )
    if recipe.model.quantization not in ("none", trained):
        raise AdapterError(
            f"merging into an {recipe.model.quantization} base would round the merged weights "
            "again; load the base unquantised for the merge (--set model.quantization=none), and "
            "where the result should be small, add --merge-dtype nf4, which rounds once, at the "
            "end"
        )


def _trained_on(run: runs.Run) -> str:
    """Return how the base was stored when the run was trained."""
    recipe = run.recipe
    assert isinstance(recipe, recipes.Recipe)
    return recipe.model.quantization


def _room(experiment: Experiment, merge_dtype: MergeDtype) -> tuple[int, str]:
    """Return the bytes that merging writes, and what of them does not stay."""
    spec, method = experiment.recipe.model, recipes.ZeroShot(kind="zero_shot")
    own = auto.dtype_of(spec, experiment.recipe.method)
    dtype = own if merge_dtype in ("auto", "nf4") else getattr(torch, merge_dtype)
    kept = "nf4" if merge_dtype == "nf4" else "none"
    drawing = meta.draw(meta.config_of(spec)[0], method, dtype=dtype, quantization=kept)
    need, because = drawing.weights + _SLACK, ""
    if kept == "nf4":
        need += drawing.parameters * dtype.itemsize
        because = "to make nf4 of it, the unquantised model is written in between"
    return need, because


def _merged(
    experiment: Experiment, run: runs.Run, folder: Path, merge_dtype: MergeDtype
) -> dict[str, Any]:
    """Merge into the unquantised base, and say how far that is from what the run computes."""
    trained = _trained_on(run)
    differences: dict[str, float] = {}
    own = None
    if trained != "none":
        own = _logits(open_labeller(_on(experiment, quantization=trained), run))
        say(f"trained on an {trained} base; merging into the base as it is stored, unquantised")
    dtype = experiment.recipe.model.dtype
    if merge_dtype in ("float32", "bfloat16"):
        dtype = merge_dtype
    elif merge_dtype == "float16" and dtype == "auto":
        dtype = "float32"  # has room for every number of a base in float16; bfloat16 rounds them
    plain = _on(experiment, quantization="none", dtype=dtype)
    labeller, packed = _unquantised(plain, run, merge_dtype)
    before = _logits(labeller)
    if isinstance(labeller.model, PeftModel):
        labeller = dataclasses.replace(labeller, model=labeller.model.merge_and_unload())
    merged = _logits(labeller)
    differences["merging"] = _largest(merged - before)
    if own is not None:
        differences["another_base_than_trained_on"] = _largest(merged - own)
    stored = labeller.base.dtype
    labeller.model.config.use_cache = True  # type: ignore[union-attr]
    if merge_dtype == "nf4":
        differences["requantising"] = _largest(
            _requantised(labeller, folder, packed=packed) - merged
        )
        stored = "nf4"
    else:
        if merge_dtype == "float16":
            differences["rounding"] = _largest(_halved(labeller) - merged)
            stored = "float16"
        labeller.model.save_pretrained(str(folder), save_original_format=not packed)  # type: ignore[operator]
    labeller.base.tokenizer.save_pretrained(str(folder))
    model = experiment.recipe.model
    if model.origin == "folder":
        _pass_on(Path(model.name).expanduser(), folder)
    for step, value in differences.items():
        say(f"largest change of an answer's logits by {step.replace('_', ' ')}: {value:.2g}")
    return {"merge_dtype": stored, "logit_difference": differences}


def _on(experiment: Experiment, **model: str) -> Experiment:
    """Return the experiment with other keys of `model`."""
    spec = experiment.recipe.model.model_copy(update=model)
    recipe = experiment.recipe.model_copy(update={"model": spec})
    return dataclasses.replace(experiment, recipe=recipe)


def _unquantised(
    experiment: Experiment, run: runs.Run, merge_dtype: MergeDtype
) -> tuple[Labeller, bool]:
    """Open the run on a base in floating point, also where its files are in 4 or 8 bits.

    Returns:
        The run's model, and whether the files are: transformers would give the names back their
        form in the files, which it cannot do for packed weights.
    """
    labeller = open_labeller(experiment, run)
    if not getattr(labeller.base.model, "is_quantized", False):
        return labeller, False
    name = experiment.recipe.model.name
    if merge_dtype == "auto":
        raise AdapterError(
            f"{name}: is stored quantised, and merging into such weights rounds them again; take "
            "the unquantised base, or say --merge-dtype bfloat16 (written as it computes, larger) "
            "or nf4 (rounded again)"
        )
    del labeller  # its weights
    method = experiment.recipe.method
    base = auto.load(experiment.recipe.model, method)
    # Before the adapter is attached: its layers are made for the kind of layer they stand on.
    base = dataclasses.replace(base, model=base.model.dequantize())
    model = methods.adapt(base.model, method)
    methods.load_adapter(model, run.adapter)
    encoder = Encoder(base.tokenizer, experiment.recipe.prompt.max_length)
    return Labeller(experiment, base, model, encoder), True


@torch.no_grad()
def _halved(labeller: Labeller) -> Tensor:
    """Keep the weights in float16; return the logits that they give, computed as before.

    Raises:
        AdapterError: float16 has no such number.
    """
    for name, parameter in labeller.model.named_parameters():
        half = parameter.half()
        if not half.isfinite().all():
            raise AdapterError(
                f"--merge-dtype float16: {name} holds numbers beyond 65,504, where float16 ends; "
                "take bfloat16 or float32"
            )
        parameter.data = half.to(parameter.dtype)
    logits = _logits(labeller)
    for parameter in labeller.model.parameters():
        parameter.data = parameter.half()  # to be stored; nothing is computed in it
    return logits


def _pass_on(base: Path, folder: Path) -> None:
    """Copy what belongs with a base's weights and transformers does not save."""
    for path in (*convert.licences(base), base / convert.TOKENIZER):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _requantised(labeller: Labeller, folder: Path, *, packed: bool) -> Tensor:
    """Write the model in NF4; return its logits."""
    experiment = _on(labeller.experiment, quantization="nf4")
    with tempfile.TemporaryDirectory(dir=folder) as plain:
        labeller.model.save_pretrained(plain, save_original_format=not packed)  # type: ignore[operator]
        labeller.base.tokenizer.save_pretrained(plain)
        spec = experiment.recipe.model.model_copy(update={"name": plain, "revision": None})
        base = auto.load(spec, recipes.ZeroShot(kind="zero_shot"))
        base.model.save_pretrained(str(folder))
        return _logits(Labeller(experiment, base, base.model, labeller.encoder))


@torch.inference_mode()
def _logits(labeller: Labeller) -> Tensor:
    """Return the logits of the first training rows' answers, shape (answer tokens, V), fp32."""
    model = labeller.model.eval()
    examples = labeller.experiment.render(labeller.experiment.rows("train")[:ROWS_COMPARED])
    found = []
    for row in labeller.encoder.encode(examples):
        ids = torch.tensor([row.prompt + row.answer], device=labeller.base.model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        found.append(logits[len(row.prompt) - 1 : -1].float().cpu())
    return torch.cat(found)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


# --- what it is, in words -------------------------------------------------------------------------


def _card(experiment: Experiment, run: runs.Run, format: Format) -> str:
    recipe, example = experiment.recipe, experiment.render(experiment.rows("train")[:1])[0]
    instruction = example.before if example.before else example.between
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
library_name: {"transformers" if format == "merged" else "peft"}
base_model: {recipe.model.name}
---
# {experiment.protocol.name}: {recipe.method.kind}, run {run.id}

- base model: {recipe.model.name}{where}
- labels: {", ".join(experiment.labels.words)}
- protocol: {experiment.protocol.name} (corpus {experiment.protocol.dataset})
- load: {_loading(recipe.method, format)}
- prompt: the chat template around this user message, answered by one label
  (`prompt.yaml` holds the form, `labels.json` the answers):

      {instruction.strip()} <text>
"""


def _loading(method: recipes.Method, format: Format) -> str:
    original = "AutoModel.from_pretrained('THUDM/chatglm2-6b', trust_remote_code=True"
    match format:
        case "peft":
            return "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)`"
        case "merged":
            return "`AutoModelForCausalLM.from_pretrained(FOLDER)`"
        case "chatglm2" if isinstance(method, recipes.PTuningV2):
            return (
                "the tuning script's `--ptuning_checkpoint FOLDER` with `--pre_seq_len "
                f"{method.prefix_length}`; elsewhere `{original}, pre_seq_len="
                f"{method.prefix_length})`, then the tensors of `pytorch_model.bin` into its "
                "`transformer.prefix_encoder`"
            )
        case "chatglm2":
            return f"`PeftModel.from_pretrained({original}), FOLDER)`, PEFT 0.3 or later"


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
