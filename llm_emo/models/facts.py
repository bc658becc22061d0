"""What a check asks of a model and its tokenizer, kept in the cache folder. No torch.

The answers come from transformers: the real model without weights, the real tokenizer. To ask
takes seconds of imports, so they are written down, in a file named after a hash of everything that
decides them: the folder and its files, the versions and the code that asked. What a model was
refused for is never written down, so the next check asks again.

The tokenizer's own Rust part is kept whole, with the chats that its template wrote; with both, rows
are encoded as by transformers, and before they are kept it is tried whether that is so.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llm_emo import fetch
from llm_emo.encoding import Encoded, Encoder
from llm_emo.errors import JobFailed, ModelError, nearest

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
"""Suffixes of files that decide neither a model's shape nor its tokenizer."""

TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps further templates."""

PACKAGES = ("transformers", "tokenizers", "torch", "huggingface_hub", "jinja2")
"""Packages that read a model's files and refuse what is wrong with them."""

CODE = ("facts.py", "auto.py", "../encoding.py")
"""What asks, and what uses the answers."""

FILES = 16
"""Files that are kept, a few MB each; then the one that was not used for longest goes."""

PROBES = (
    "", " ", "  a  b ", "\ta\r\n\n", "no\rline\r\nbreak", "Naïve café, 3.14 e\u0301 ﬁ",
    "今天怎么样？ 私は嬉しい 좋아요", "مرحبا بك नमस्ते Привет", "😀👩\u200d👧 🇨🇳 ❤\ufe0f",
    "ｆｕｌｌ　ｗｉｄｔｈ ▁", "\u0000\ufffd\U0010ffff",
    "<|im_start|>user\n<s></s><unk><pad>[gMASK]<think></think><0x0A>",
)  # fmt: skip
"""Texts on which tokenizers of other settings differ: white space, scripts, bytes, control."""


@dataclass(frozen=True)
class Shape:
    """Of a model: its architecture's name, how many tokens it embeds, its linear layers."""

    kind: str
    words: int
    linear: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What is known of a recipe's model; the tokenizer may be of a kind that cannot be kept."""

    shape: Shape
    tokenizer: "Kept | None"


@dataclass(frozen=True)
class Place:
    """The file that facts are kept in, and what they are about.

    `system` is the system turn of the recipe's prompt, which a template may show.
    """

    folder: Path
    system: str | None
    file: Path


class Kept:
    """What an `Encoder` asks of a tokenizer when it encodes, without transformers.

    Args:
        name: The folder of the tokenizer.
        content: What `_content` returned for it.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        self.name_or_path = name
        self.chat_template = content["chat_template"]
        self.eos_token_id = content["eos_token_id"]
        self.split_special_tokens = content["split_special_tokens"]
        self.backend_tokenizer = Tokenizer.from_str(content["backend"])
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self._chats = content["chats"]

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id."""
        added: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return added

    def apply_chat_template(self, turns: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Return a chat as the template wrote it."""
        written: str = self._chats[Encoder.chat_key(turns, options["add_generation_prompt"])]
        return written

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool | None = None,
    ) -> dict[str, Any]:
        """Encode a text, or several."""
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        self.backend_tokenizer.encode_special_tokens = split
        texts = [text] if isinstance(text, str) else text
        # Without the offsets into the text, which nobody asks for.
        rows = self.backend_tokenizer.encode_batch_fast(
            texts, add_special_tokens=add_special_tokens
        )
        ids = [row.ids for row in rows]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


# --- what a recipe is held against ----------------------------------------------------------------


def require_linear(kind: str, linear: Collection[str], names: Sequence[str]) -> None:
    """Hold that a model of architecture `kind` has linear layers of these names.

    Raises:
        ModelError: it has not; the message names those that it has.
    """
    missing = [name for name in names if name not in linear]
    if missing:
        raise ModelError(
            f"method.target_modules: {kind} has no linear module called {', '.join(missing)}; "
            f"{nearest(missing[0], linear)}"
            + ("; ChatGLM2's query_key_value is q_proj, k_proj and v_proj here"
               if "query_key_value" in missing and "q_proj" in linear else "")
        )  # fmt: skip


def require_known(name: str, words: int, rows: Iterable[Encoded]) -> None:
    """Hold that a model that embeds `words` tokens has one for every token of these rows.

    Raises:
        ModelError: it has not.
    """
    require_ids(name, words, max((max(row.prompt + row.answer) for row in rows), default=0))


def require_ids(name: str, words: int, largest: int) -> None:
    """Hold that a model that embeds `words` tokens has one for the largest token id in use.

    Raises:
        ModelError: it has not.
    """
    if largest >= words:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest}, but the model knows {words} tokens; "
            "the tokenizer belongs to another model"
        )


# --- the cache folder -----------------------------------------------------------------------------


def place(folder: Path, system: str | None) -> Place | None:
    """Return where the facts of the model in `folder` are kept; None where they cannot be."""
    try:
        files = [
            path
            for path in (*sorted(folder.iterdir()), *sorted((folder / TEMPLATES).glob("*")))
            if path.is_file() and path.suffix not in WEIGHTS
        ]
        parts = {
            "folder": str(folder),
            "system": system,
            "files": [(str(path.relative_to(folder)), fetch.sha256_of(path)) for path in files],
            "packages": [(name, metadata.version(name)) for name in PACKAGES],
            "code": [fetch.sha256_of(Path(__file__).parent / name) for name in CODE],
        }
        text = json.dumps(parts, sort_keys=True)
        name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return Place(folder, system, fetch.cache_dir() / "facts" / name)
    except (OSError, JobFailed):
        return None


def recall(place: Place) -> Facts | None:
    """Return what is kept; None where the file is absent or damaged."""
    try:
        digest, _, body = place.file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    with contextlib.suppress(OSError):  # somebody else's file can be read all the same
        os.utime(place.file)  # used just now
    kept = json.loads(body)
    shape = Shape(kept["kind"], kept["words"], tuple(kept["linear"]))
    content = kept["tokenizer"]
    return Facts(shape, None if content is None else Kept(str(place.folder), content))


def keep(place: Place, shape: Shape, encoder: Encoder) -> None:
    """Write down what was found; where the cache folder cannot be written, nothing is.

    A tokenizer that cannot be probed is left out: what only spares time must not end a run.

    Args:
        place: Where.
        shape: The model's.
        encoder: Of the model's own tokenizer.
    """
    path = place.file
    body = json.dumps({**asdict(shape), "tokenizer": _probed(encoder, place.system)}).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):  # nothing is lost but the seconds that asking takes
        path.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as sink:
                sink.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                sink.flush()
                os.fsync(sink.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        used = sorted(path.parent.glob("[!.]*"), key=lambda file: file.stat().st_mtime)
        for file in used[:-FILES]:
            file.unlink(missing_ok=True)


def _probed(encoder: Encoder, system: str | None) -> dict[str, Any] | None:
    """Return `_content`, or None for a tokenizer that refuses a chat or a text that no row has.

    Its recipe's rows were encoded, so the run may go on; only the next check asks again.
    """
    from jinja2 import TemplateError  # whoever asked a tokenizer has it loaded

    try:
        return _content(encoder, system)
    except (ModelError, TemplateError, TypeError, ValueError):  # of templates, of transformers
        return None
    except Exception as error:
        # tokenizers has no class of its own for what it refuses: it raises the bare one. What is
        # of another class is a mistake here, and not hidden.
        if type(error) is not Exception:
            raise
        return None


def _content(encoder: Encoder, system: str | None) -> dict[str, Any] | None:
    """Return what `Kept` needs; None where it would not encode as the tokenizer does."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    if "strftime_now" in str(tokenizer.chat_template):  # it shows the day, which no key holds
        return None
    content = {
        "backend": backend.to_str(),
        "chat_template": tokenizer.chat_template,
        "eos_token_id": tokenizer.eos_token_id,
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "chats": encoder.chats(system),
    }
    kept = Kept(str(tokenizer.name_or_path), content)
    same = all(
        tokenizer(texts, **how)["input_ids"] == kept(texts, **how)["input_ids"]
        for texts in (list(PROBES), "a")
        for how in ({}, {"add_special_tokens": False},
                    {"add_special_tokens": False, "split_special_tokens": True})
    )  # fmt: skip
    return content if same else None
