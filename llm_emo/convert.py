"""`llm-emo convert`: ChatGLM2 checkpoints into transformers' layout and back, file by file.

    DIR/config.json, generation_config.json    what transformers needs
    DIR/model*.safetensors (+ index)           the weights, in the dtype in which they were stored
    DIR/tokenizer*.json, tokenizer.model       the tokenizer, and what it was made of
    DIR/manifest.json                          sha256 of every file that was read or written

The folder appears under its name when it is complete. What a killed run left is removed at the
next start. Adapters go to `models.chatglm2_adapters`.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from llm_emo import __version__, runs
from llm_emo.errors import ModelError
from llm_emo.fetch import sha256_of
from llm_emo.folders import appearing
from llm_emo.models import chatglm2, chatglm2_checks, chatglm2_tokenizer, weights
from llm_emo.models.chatglm2 import Layout
from llm_emo.models.source import read_json

To = Literal["native", "chatglm2"]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
_SLACK = 64 << 20
"""Bytes beside the weights: tokenizer, configs, manifest, and what a file system rounds up."""


def convert(
    source: Path,
    output: Path,
    *,
    to: To = "native",
    tokenizer: Path | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """Convert a ChatGLM2 checkpoint or adapter; the output is complete or absent.

    Memory holds one tensor at a time, beside what is mapped of the file being read. Weights keep
    the dtype in which they are stored.

    Args:
        source: A checkpoint folder (`.bin` or safetensors, with or without shards), a native
            folder, or an adapter of either kind.
        output: A new or empty folder.
        to: `native`, transformers' own GLM, or `chatglm2`, the original's names.
        tokenizer: The tokenizer.model, where it does not lie in `source`.
        base: For an adapter, the folder of the checkpoint that it belongs to, in either layout;
            without it, the base that the adapter names, else ChatGLM2-6B.

    Returns:
        What was done, as JSON has it: `converted`, `to`, `source`, `kind`, sizes, the sha256 of
        each file written, and notes for the user, which stderr gets too.

    Raises:
        ModelError: `source` is no such checkpoint, is incomplete or damaged.
        AdapterError: it is an adapter that cannot be converted.
        RunError: `output` holds something, or another process writes it.
        JobFailed: the disk is full or cannot be written.
    """
    runs.require_free(output)
    if not source.is_dir():
        what = "is a file; name its folder" if source.exists() else "no such folder"
        raise ModelError(f"{source}: {what}")
    if _is_adapter(source):
        from llm_emo.models import chatglm2_adapters  # loads PEFT, which checkpoints do not need

        if tokenizer is not None:
            raise ModelError("--tokenizer: an adapter has no tokenizer; leave the option out")
        change = chatglm2_adapters.to_native if to == "native" else chatglm2_adapters.to_chatglm2
        return change(source, output, base=base)
    if base is not None:
        raise ModelError("--base: belongs to an adapter, not to a checkpoint; leave the option out")
    checkpoint = _open_original(source) if to == "native" else _open_native(source)
    model_file = _model_file(source, tokenizer, required=to == "native")
    with appearing(output, checkpoint.bytes + _SLACK) as folder:
        done = (_to_native if to == "native" else _to_original)(checkpoint, folder, model_file)
        _finish(checkpoint, folder, model_file, done)
    notes = [*checkpoint.notes, *done.notes]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)  # noqa: T201
    return {
        "converted": str(output),
        "to": to,
        "source": str(source),
        "kind": "checkpoint",
        "parameters": checkpoint.layout.parameters,
        "dtype": checkpoint.layout.dtype,
        "bytes": sum(entry["bytes"] for entry in done.weights.values()),
        "written": {name: entry["sha256"] for name, entry in _manifest(output)["files"].items()},
        "notes": notes,
    }


def _is_adapter(source: Path) -> bool:
    """Whether this is LoRA, or P-Tuning v2 with or without the base model around it."""
    if (source / "adapter_config.json").is_file():
        return True
    return weights.file_holding(source, chatglm2.PREFIX_ENCODER) is not None


# --- what there is to convert --------------------------------------------------------------------


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose tensors are all there, of the right shapes and of one dtype."""

    folder: Path
    config: Mapping[str, Any]
    layout: Layout
    files: Sequence[Path]
    index: Path | None
    where: Mapping[str, Path]
    """The file of each tensor."""
    bytes: int
    """Of all tensors."""
    notes: Sequence[str]


def _open_original(folder: Path) -> _Checkpoint:
    config = _config(folder)
    layout = Layout.from_original(config, folder)
    found = _open(folder, config, layout, chatglm2.shapes(layout))
    if chatglm2.INV_FREQ not in found.where:
        return found
    exact = chatglm2.inverse_frequencies(dataclasses.replace(layout, dtype="float32"))
    if chatglm2_checks.same_frequencies(_frequencies(found), exact):
        return found
    note = (
        f"{chatglm2.INV_FREQ} is not that of rotary base 10000; the original's code does not read "
        "it, but if this model was trained with another base, it computes something else here"
    )
    return dataclasses.replace(found, notes=[*found.notes, note])


def _open_native(folder: Path) -> _Checkpoint:
    config = _config(folder)
    if config.get("model_type") == "chatglm":
        raise ModelError(
            f"{folder}: has the original's names already; without --to it is converted into "
            "transformers' layout"
        )
    layout = Layout.from_native(config, folder)
    if config.get("quantization_config"):
        raise ModelError(
            f"{folder}: its weights are stored quantised, which the original's code cannot read; "
            "name the unquantised model (`llm-emo export --merge-dtype float32`)"
        )
    return _open(folder, config, layout, chatglm2.native_shapes(layout))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: has no config.json; name the folder of a ChatGLM2 checkpoint, with its "
            "config.json, weights and tokenizer.model"
        )
    return read_json(path)


def _open(
    folder: Path, config: Mapping[str, Any], layout: Layout, expected: Mapping[str, Any]
) -> _Checkpoint:
    """Hold what the files say that they contain against the config; reads no tensor."""
    files, index = weights.files_of(folder)
    where: dict[str, Path] = {}
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for file in files:
        for name, tensor in weights.read(file).items():
            if name in where:
                raise ModelError(
                    f"{folder}: {name} lies in {where[name].name} and in {file.name}; remove "
                    "the files that do not belong to this checkpoint"
                )
            where[name], specs[name] = file, (tensor.dtype, tuple(tensor.shape))
    parameters = {name: spec for name, spec in specs.items() if name != chatglm2.INV_FREQ}
    dtype = str(chatglm2_checks.check_tensors(parameters, expected, folder))
    dtype = dtype.removeprefix("torch.")
    size = weights.size_of(specs)
    notes = []
    if dtype != layout.dtype:
        notes.append(f"the weights are {dtype}, although config.json says {layout.dtype}")
    stated = None if index is None else weights.total_size(index)
    if stated not in (None, size):
        notes.append(f"{index} states {stated:,} bytes of tensors, and there are {size:,}")
    layout = dataclasses.replace(layout, dtype=dtype)
    return _Checkpoint(folder, config, layout, files, index, where, size, notes)


def _frequencies(checkpoint: _Checkpoint) -> Tensor:
    return weights.read(checkpoint.where[chatglm2.INV_FREQ])[chatglm2.INV_FREQ].clone()


def _model_file(source: Path, named: Path | None, *, required: bool) -> Path | None:
    path = named or source / TOKENIZER
    if path.is_file():
        return path
    if named is not None:
        raise ModelError(f"--tokenizer: no file {named}")
    if required:
        raise ModelError(
            f"{source}: has no {TOKENIZER}; download it into the folder, or name it with "
            "--tokenizer FILE"
        )
    return None


# --- both ways -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """What one direction wrote."""

    inputs: Mapping[str, Any]
    """Size and sha256 of each file of weights that was read."""
    weights: Mapping[str, Any]
    """The same of each that was written."""
    original: Mapping[str, Any] | None
    """The original's config and frequencies word for word, for the way back."""
    notes: Sequence[str]


def _to_native(checkpoint: _Checkpoint, folder: Path, model_file: Path | None) -> _Done:
    assert model_file is not None
    layout, notes = checkpoint.layout, []
    # The tokenizer first: a wrong file should be refused before the long part.
    tokenizer = chatglm2_tokenizer.build(model_file)
    tokenizer.save_pretrained(str(folder))
    if len(tokenizer) > layout.vocab:
        notes.append(
            f"the tokenizer has {len(tokenizer):,} ids and the model rows for {layout.vocab:,}: "
            "they are of two models, and a text with other ids cannot be run"
        )
    shapes = chatglm2.native_shapes(layout)
    targets = [
        _Target(part, shapes[part], checkpoint.where[name], partial(_part, name, part, layout))
        for name in chatglm2.shapes(layout)
        for part in chatglm2.native_names(name)
    ]
    inputs, written = _write_weights(checkpoint, targets, folder)
    _write_json(folder / "config.json", layout.native_config())
    # Greedy, with nothing that would reweigh what the model says.
    ids = {key: layout.native_config()[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    generation = {f"{key}_token_id": value for key, value in ids.items()}
    _write_json(folder / "generation_config.json", generation | {"do_sample": False})
    original: dict[str, Any] = {"config": checkpoint.config, "inv_freq": None}
    if chatglm2.INV_FREQ in checkpoint.where:
        found = _frequencies(checkpoint)
        dtype = str(found.dtype).removeprefix("torch.")
        original["inv_freq"] = {"dtype": dtype, "values": found.double().tolist()}
    return _Done(inputs, written, original, notes)


def _to_original(checkpoint: _Checkpoint, folder: Path, model_file: Path | None) -> _Done:
    layout, notes = checkpoint.layout, []
    if model_file is None:
        notes.append(f"no {TOKENIZER} was found; the original's code needs it beside the weights")
    config, frequencies = _recorded(checkpoint)
    targets = []
    for name, shape in chatglm2.shapes(layout).items():
        home = checkpoint.where[chatglm2.native_names(name)[0]]
        targets.append(_Target(name, shape, home, partial(_whole, name)))
    if frequencies is not None:
        shape, home = tuple(frequencies.shape), targets[0].home
        make: Make = lambda get: frequencies  # noqa: E731
        targets.append(_Target(chatglm2.INV_FREQ, shape, home, make, frequencies.dtype))
    inputs, written = _write_weights(checkpoint, targets, folder)
    _write_json(folder / "config.json", config)
    notes.append(
        "programs that run the original's code need its *.py files and tokenizer_config.json "
        "beside this; copy them from THUDM/chatglm2-6b"
    )
    return _Done(inputs, written, None, notes)


def _recorded(checkpoint: _Checkpoint) -> tuple[Mapping[str, Any], Tensor | None]:
    """Return the original's config and frequencies: as they were, if the manifest tells."""
    layout = checkpoint.layout
    try:
        original = _manifest(checkpoint.folder)["original"]
        config, kept = original["config"], original["inv_freq"]
        same = dataclasses.replace(
            Layout.from_original(config, checkpoint.folder), dtype=layout.dtype
        )
        if same == layout:
            return config, kept and torch.tensor(
                kept["values"], dtype=getattr(torch, kept["dtype"])
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError):
        pass  # a folder of transformers or PEFT has no manifest of ours
    return layout.original_config(), chatglm2.inverse_frequencies(layout)


# --- weights -------------------------------------------------------------------------------------

Get = Callable[[str], Tensor]
Make = Callable[[Get], Tensor]


@dataclass(frozen=True)
class _Target:
    """A tensor to write: what it is called, how it is made, and whose file it follows."""

    name: str
    shape: tuple[int, ...]
    home: Path
    """The file that is read for it; what follows one file is written into one file."""
    make: Make
    dtype: torch.dtype | None = None
    """None: that of the weights."""


def _part(name: str, part: str, layout: Layout, get: Get) -> Tensor:
    return chatglm2.to_native(name, get(name), layout)[part]


def _whole(name: str, get: Get) -> Tensor:
    return chatglm2.to_original(name, {part: get(part) for part in chatglm2.native_names(name)})


def _write_weights(
    checkpoint: _Checkpoint, targets: Sequence[_Target], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the targets, with an index where there are several files.

    Returns:
        Size and sha256 of each file read, and of each file written.
    """
    usual = getattr(torch, checkpoint.layout.dtype)
    groups = {file: [t for t in targets if t.home == file] for file in checkpoint.files}
    count = sum(bool(group) for group in groups.values())
    inputs: dict[str, Any] = {}
    written: dict[str, Any] = {}
    where: dict[str, str] = {}
    total = 0
    to_read = sum(file.stat().st_size for file in checkpoint.files)
    to_write = weights.size_of({t.name: (t.dtype or usual, t.shape) for t in targets})
    with tqdm(total=to_read + to_write, desc="convert", unit="B", unit_scale=True) as bar:
        for file, group in groups.items():
            inputs[file.name] = weights.verify(file, bar.update)
            if not group:
                continue
            opened: dict[Path, dict[str, Tensor]] = {}

            def get(name: str, opened: dict[Path, dict[str, Tensor]] = opened) -> Tensor:
                path = checkpoint.where[name]
                if path not in opened:  # nearly always the file at hand
                    opened[path] = weights.read(path)
                return opened[path][name]

            specs = {t.name: (t.dtype or usual, t.shape) for t in group}
            name = "model.safetensors"
            if count > 1:
                name = f"model-{len(written) + 1:05d}-of-{count:05d}.safetensors"
            made = (t.make(get) for t in group)
            written[name] = weights.write(folder / name, specs, made, bar.update)
            where |= dict.fromkeys(specs, name)
            total += weights.size_of(specs)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
    return inputs, written


# --- files ---------------------------------------------------------------------------------------


def _finish(checkpoint: _Checkpoint, folder: Path, model_file: Path | None, done: _Done) -> None:
    """Copy what is passed on as it is, and write the manifest."""
    inputs = dict(done.inputs)
    for path in (checkpoint.folder / "config.json", checkpoint.index, model_file):
        if path is not None:
            inputs[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    if model_file is not None:
        shutil.copyfile(model_file, folder / TOKENIZER)
    for path in licences(checkpoint.folder):
        shutil.copyfile(path, folder / path.name)
    files = {
        path.name: done.weights.get(path.name)
        or {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    manifest = {
        "llm_emo": __version__,
        "packages": {name: metadata.version(name) for name in packages},
        "parameters": checkpoint.layout.parameters,
        "dtype": checkpoint.layout.dtype,
        "original": done.original,
        "inputs": inputs,
        "files": files,
    }
    _write_json(folder / MANIFEST, manifest)


def licences(folder: Path) -> list[Path]:
    """Return the licence files of a model; ChatGLM2's asks to be passed on."""
    found = (*folder.glob("MODEL_LICENSE*"), *folder.glob("LICENSE*"))
    return sorted(path for path in found if path.is_file())


def _manifest(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
