"""A tiny `tokenizer.model` in ChatGLM2's settings, for tests that have no real one."""

import io
import random
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

PIECES = 480
"""Of `write_model`; the specials are 480 to 484, so an embedding needs 485 rows."""

SENTENCES = (
    "The late train made her angry, but the tea made her happy again.",
    "I was afraid of the dark and glad of the morning light.",
    "He said nothing, smiled a little and walked away in the rain.",
    "What a surprise to see you here after all these years!",
    "Classify the sentiment of the sentence to anger, disgust, fear, joy, neutral or sadness.",
    "She waited for the answer; the answer never came, and she was sad.",
    "Nobody told them that the party was over at 10 o'clock on 24 May 2019.",
    "    indented lines   and    long  gaps are text like any other",
    "[Round 1] [Round 2] [Round 3]",
    "问：今天天气很好，你高兴吗？答：我很高兴，谢谢你。",
    "问：他为什么生气？答：因为火车又晚点了，他等了三个小时。",
    "我们都很难过，因为朋友要走了。",
    "她害怕黑暗，但是喜欢早上的阳光。",
    "这句话的情感是愤怒、厌恶、恐惧、高兴、中性、悲伤还是惊讶？",
    "多么惊讶的一天！我没有想到会在这里见到你。",
)

SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}


def write_model(path: Path, *, seed: int = 0, pieces: int = PIECES, **changes: Any) -> Path:
    """Train a tiny SentencePiece model on `SENTENCES`, write it to the file `path`, return that.

    Other seeds give other vocabularies; `changes` replace entries of `SETTINGS`.
    """
    sentences = random.Random(seed).choices(SENTENCES, k=60) + list(SENTENCES)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=pieces,
        **SETTINGS | changes,
    )
    path.write_bytes(model.getvalue())
    return path


def add_pieces(content: bytes, count: int) -> bytes:
    """Return a model file with ordinary pieces appended until it has `count` more.

    A serialised model may be continued: repeated fields of a second part follow the first's.
    """
    parts = [content]
    for number in range(count):
        name = f"extra{number}".encode()
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + b"\x00\x00\x80\xc7"  # score -65536
        parts.append(b"\x0a" + bytes([len(piece)]) + piece)
    return b"".join(parts)
