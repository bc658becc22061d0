"""ChatGLM2's adapters, from its original code's names to the native model's and back."""

from pathlib import Path
from typing import Any

from llm_emo import runs
from llm_emo.errors import AdapterError
from llm_emo.fetch import sha256_of
from llm_emo.folders import appearing
from llm_emo.models import adapters, chatglm2_lora, chatglm2_prefix, weights
from llm_emo.models.chatglm2 import CHATGLM2_6B, PREFIX_ENCODER, Layout
from llm_emo.models.source import read_json


def kind(source: Path) -> adapters.Kind | None:
    """Return which adapter a folder holds, in either layout; None where it holds none.

    Raises:
        AdapterError: it holds one of each, or one of another method.
    """
    found = adapters.kind(source)
    encoder = weights.file_holding(source, PREFIX_ENCODER)
    if found and encoder:
        raise AdapterError(
            f"{source}: holds two adapters, {adapters.CONFIG_FILE} and a prefix encoder in "
            f"{encoder.name}; move one of them into a folder of its own"
        )
    return "p_tuning_v2" if encoder else found


def to_native(source: Path, output: Path, *, base: Path | None = None) -> dict[str, Any]:
    """Convert an adapter of the original ChatGLM2 code for the native model.

    The folder is what `methods.save_adapter` writes, so stock PEFT reads it too. It has no
    fingerprint: nobody knows which prompt a foreign adapter was trained with.

    Args:
        source: A LoRA folder of PEFT on the original code, or a checkpoint folder of the
            original tuning script.
        output: The new folder; it appears complete or not at all.
        base: A folder, of either layout, whose config.json says the base model's shape. Without
            it, the folder that the adapter names, if it is there, else ChatGLM2-6B's shape.

    Returns:
        What was read and written, with hashes; for JSON.

    Raises:
        AdapterError: there is no such adapter, or it contradicts its config or the base.
        ModelError: `base` is no ChatGLM2.
        RunError: `output` holds something.
        JobFailed: the disk failed.
    """
    runs.require_free(output)
    encoder = weights.file_holding(source, PREFIX_ENCODER)
    match kind(source):
        case "lora":
            adapter = adapters.read_lora(source)
            layout, hint = _layout(base, adapter.base)
            pairs = chatglm2_lora.split(source, adapter, layout, hint)
            with appearing(output) as folder:
                found = chatglm2_lora.write_native(folder, adapter, pairs, base)
        case "p_tuning_v2" if encoder:
            config = chatglm2_prefix.read_config(source)
            own = None if config is None else Layout.from_original(config.plain, source)
            layout, hint = (own, "") if own and base is None else _layout(base, None)
            if own:
                chatglm2_prefix.hold_shapes(source, own, layout)
            state = chatglm2_prefix.read(encoder, config, layout, hint)
            with appearing(output) as folder:
                found = chatglm2_prefix.write_native(folder, encoder, state, layout, base)
        case "p_tuning_v2":
            raise AdapterError(
                f"{source}: a prefix in PEFT's layout, which is what a native folder looks like; "
                "there is nothing to convert"
            )
        case _:
            raise _no_adapter(source)
    return _result(found, source, output, "native")


def to_chatglm2(source: Path, output: Path, *, base: Path | None = None) -> dict[str, Any]:
    """Convert an adapter of the native model for programs that run the original ChatGLM2 code.

    LoRA becomes a folder that PEFT from 0.3 on reads, with the keys of 0.4 and nothing else:
    those versions pass over keys that they do not know. A prefix becomes a checkpoint folder
    of the original tuning script: `pytorch_model.bin` and config.json.

    Args:
        source: An adapter folder of this program or of stock PEFT on the native model.
        output: The new folder; it appears complete or not at all.
        base: As in `to_native`.

    Returns:
        What was read and written, with hashes; for JSON.

    Raises:
        AdapterError: there is no such adapter, or it contradicts its config or the base.
        ModelError: `base` is no ChatGLM2.
        RunError: `output` holds something.
        JobFailed: the disk failed.
    """
    runs.require_free(output)
    encoder = weights.file_holding(source, PREFIX_ENCODER)
    match kind(source):
        case "lora":
            adapter = adapters.read_lora(source)
            layout, hint = _layout(base, adapter.base)
            rank, pairs = chatglm2_lora.fuse(source, adapter, layout, hint)
            with appearing(output) as folder:
                found = chatglm2_lora.write_original(folder, adapter, rank, pairs, layout)
        case "p_tuning_v2" if encoder:
            raise AdapterError(
                f"{encoder}: holds {PREFIX_ENCODER}*, the original's names already; there is "
                "nothing to convert"
            )
        case "p_tuning_v2":
            layout, hint = _layout(
                base, adapters.read_config(source).get("base_model_name_or_path")
            )
            model = chatglm2_prefix.read_native(source, layout, hint)
            with appearing(output) as folder:
                found = chatglm2_prefix.write_original(folder, source, model, layout)
        case _:
            raise _no_adapter(source)
    return _result(found, source, output, "chatglm2")


def _no_adapter(source: Path) -> AdapterError:
    if not source.is_dir():
        return AdapterError(f"{source}: no such folder; name the folder that holds the adapter")
    held = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
    return AdapterError(
        f"{source}: no adapter: neither {adapters.CONFIG_FILE} nor weights called "
        f"{PREFIX_ENCODER}* (it holds {held})"
    )


def _result(found: dict[str, Any], source: Path, output: Path, to: str) -> dict[str, Any]:
    files = sorted(path for path in output.iterdir() if path.is_file())
    return {
        "converted": str(output),
        "to": to,
        "source": str(source),
        **found,
        "written": {path.name: sha256_of(path) for path in files},
    }


def _layout(base: Path | None, named: object) -> tuple[Layout, str]:
    """Return the base's shape, and what an error about it should add.

    `base` is what the user says; `named` what the adapter says, which may be a name on the hub
    or a folder of another machine.
    """
    if base is not None:
        return read_layout(base), ""
    if isinstance(named, str) and (Path(named) / "config.json").is_file():
        return read_layout(Path(named)), f" (its base model: {named})"
    return CHATGLM2_6B, (
        "; without --base FOLDER, which holds the base model's config.json, the base is taken "
        "to be ChatGLM2-6B"
    )


def read_layout(folder: Path) -> Layout:
    """Return the shape of the ChatGLM2 model in a folder of either layout.

    Raises:
        AdapterError: there is no config.json.
        ModelError: it is damaged, or another model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; name the folder of the base model")
    config = read_json(path)
    if config.get("model_type") == "glm":
        return Layout.from_native(config, folder)
    return Layout.from_original(config, folder)
