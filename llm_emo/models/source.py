"""Where a recipe's model lies: the bundled one, a folder, or a model of the hub. No torch."""

import json
from pathlib import Path
from typing import Any

from llm_emo import recipes
from llm_emo.errors import ModelError
from llm_emo.models import bundled

AGAIN = "download or write it again"


def locate(spec: recipes.Model) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` is told: the folder or the hub's name, and arguments.

    Raises:
        ModelError: there is no such folder, or it holds ChatGLM2 in its original layout.
        JobFailed: the bundled model cannot be fetched or made.
    """
    match spec.origin:
        case "bundled":
            return str(bundled.folder()), revision(spec)
        case "folder":
            folder = Path(spec.name).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(
                    f"model.name: {spec.name!r} is no folder with a config.json; name a local "
                    f"model folder, {recipes.BUNDLED_MODEL!r} (bundled), or a Hugging Face id "
                    "with model.revision. ChatGLM2-6B: `llm-emo convert CHECKPOINT -o FOLDER` "
                    "once, then --set model.name=FOLDER"
                )
            if read_json(folder / "config.json").get("model_type") == "chatglm":
                raise ModelError(
                    f"{folder}: is in the layout of the original's code, which is never run here; "
                    f"`llm-emo convert {folder} -o FOLDER` once, then --set model.name=FOLDER"
                )
            return str(folder), revision(spec)
        case "hub":
            return spec.name, revision(spec)


def revision(spec: recipes.Model) -> dict[str, Any]:
    """Return the arguments that name a hub model's revision, or keep off the hub."""
    return {"revision": spec.revision} if spec.origin == "hub" else {"local_files_only": True}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no JSON object; {AGAIN}")
    return value
