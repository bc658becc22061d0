"""ChatGLM2's tokenizer as a fast tokenizer of transformers, id for id.

The original is a SentencePiece BPE model and a Python class that ships with the checkpoint.
`build` reads the first and needs none of the second. What it returns is saved and loaded as
any other tokenizer is, without remote code and without SentencePiece.

A control token cannot be spelled: with `split_special_tokens` the text `[gMASK]` is seven
letters, as it was for the original. Therefore the chat template writes text alone, and the
tokenizer puts `[gMASK] sop` in front. The right prompt of a chat is

    tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

With `tokenize=True` transformers leaves out what a tokenizer puts in front, whatever the model.

Decoding differs from the original's in one thing: where bytes that a model generated are no
UTF-8, every byte of their run is shown as U+FFFD, not the wrong ones alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from llm_emo.errors import ModelError

PIECES = 64_789
"""Pieces of the published model; the specials have the ids that follow."""

SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

CHAT_TEMPLATE = r"""
{%- set turn = namespace(round=0, last='assistant', system='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and loop.first -%}
    {%- set turn.system = message['content'] ~ '\n\n' -%}
  {%- elif message['role'] == 'user' and turn.last == 'assistant' -%}
    {%- set turn.round = turn.round + 1 -%}
    {{- '\n\n' if turn.round > 1 -}}
    {{- '[Round ' ~ turn.round ~ ']\n\n问：' ~ turn.system ~ message['content'] -}}
    {%- set turn.system = '' -%}
    {%- set turn.last = 'user' -%}
  {%- elif message['role'] == 'assistant' and turn.last == 'user' -%}
    {{- '\n\n答：' ~ message['content'] -}}
    {%- set turn.last = 'assistant' -%}
  {%- else -%}
    {{- raise_exception('ChatGLM2 takes a system turn or none, then user and assistant in turn') -}}
  {%- endif -%}
{%- endfor -%}
{{- '\n\n答：' if add_generation_prompt and turn.last == 'user' -}}
""".strip()
"""Rounds of question and answer. The model knows no system turn: it opens the first question."""

_TOY = 10_000
"""No published model has so few pieces; a file with fewer was made for a test."""

_OTHERS = {32_000: "Llama or Mistral", 32_016: "Code Llama", 64_000: "Yi or Baichuan"}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_LFS = b"version https://git-lfs"

_PROBES = (
    "", " ", "  a  b ", "\ta\r\n\n", "▁", "a▁b", "2024年1月, 3.14",
    "ｆｕｌｌ　ｗｉｄｔｈ", "é e\u0301 ﬁ", "😀👩\u200d👧 🇨🇳", "\u0000\ufffd\U0010ffff",
    "[Round 1]\n\n问：今天怎么样？\n\n答：", "</s><unk><0x0A>[gMASK]sop",
)  # fmt: skip
"""Texts on which models of other settings differ: white space, digits, forms, bytes."""


def build(model_file: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a ChatGLM2 `tokenizer.model`.

    The result is compared with SentencePiece itself on the text of every piece, so that a
    file of other settings cannot pass as one of these.

    Raises:
        ModelError: the file is absent, damaged, or another model's.
    """
    processor = _read(model_file)
    pieces = [processor.id_to_piece(id_) for id_ in range(len(processor))]
    normal = {
        piece: id_
        for id_, piece in enumerate(pieces)
        if not (
            processor.is_byte(id_)
            or processor.is_control(id_)
            or processor.is_unknown(id_)
            or processor.is_unused(id_)
        )
    }
    _recognise(model_file, processor, pieces)
    tokenizer = _tokenizer(
        pieces, merges([processor.get_score(i) for i in normal.values()], normal)
    )
    _compare(model_file, processor, tokenizer, (*_PROBES, *pieces))
    return tokenizer


def merges(scores: Sequence[float], normal: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that may merge, in the order in which they do.

    SentencePiece joins whichever neighbours spell the piece with the best score, however that
    piece was learned; so every way to part a piece in two is a merge. Control tokens and bytes
    take no part.

    Args:
        scores: Of the pieces in `normal`, in its order.
        normal: Pieces of ordinary text and their ids.
    """
    ranked = sorted(
        (-score, normal[piece[:cut]], normal[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in zip(normal, scores, strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    )
    return [(left, right) for *_, left, right in ranked]


def _read(path: Path) -> SentencePieceProcessor:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); ChatGLM2's tokenizer.model lies beside "
            "its config.json"
        ) from error
    if content.startswith(_LFS):
        raise ModelError(f"{path}: is a Git LFS pointer, not the file; run `git lfs pull`")
    if _TIKTOKEN.match(content):
        raise ModelError(f"{path}: is a tiktoken vocabulary, such as GLM-4's, not ChatGLM2's")
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: is not a whole SentencePiece model ({len(content):,} bytes); ChatGLM2's "
            "has 1,018,370 bytes; download it again"
        ) from error
    return processor


def _recognise(path: Path, processor: SentencePieceProcessor, pieces: Sequence[str]) -> None:
    """Refuse the models of others by what their vocabularies hold."""
    if processor.piece_to_id("<n>") != processor.unk_id():
        raise ModelError(
            f"{path}: is the tokenizer of ChatGLM-1 (ice_text.model), which is another model; "
            "only ChatGLM2's can be converted"
        )
    if len(pieces) != PIECES and len(pieces) >= _TOY:
        owner = _OTHERS.get(len(pieces), "another model")
        raise ModelError(
            f"{path}: has {len(pieces):,} pieces (as of {owner}) where ChatGLM2's has {PIECES:,}; "
            "take the tokenizer.model that came with the checkpoint"
        )
    found = tuple(pieces[:3])
    if found != ("<unk>", "<s>", "</s>") or not all(map(processor.is_byte, range(3, 259))):
        raise ModelError(
            f"{path}: begins with {', '.join(pieces[:4])}, where ChatGLM2's has <unk>, <s>, </s> "
            "and the 256 bytes; take the tokenizer.model that came with the checkpoint"
        )


def _tokenizer(pieces: Sequence[str], pairs: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.BPE(
            vocab={piece: id_ for id_, piece in enumerate(pieces)},
            merges=list(pairs),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([*pieces[:3], *SPECIALS])
    leading = ("[gMASK]", "sop")
    backend.post_processor = processors.TemplateProcessing(
        single=[*leading, "$A"],
        # A prompt and its answer, as the original joins two texts: what it is trained on.
        pair=[*leading, "$A", "$B", "</s>"],
        special_tokens=[(token, backend.token_to_id(token)) for token in (*leading, "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(SPECIALS),
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def _compare(
    path: Path,
    processor: SentencePieceProcessor,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
) -> None:
    """Hold the tokenizer against SentencePiece on `texts`."""
    step = 4096
    for start in tqdm(range(0, len(texts), step), desc="tokenizer", delay=2, leave=False):
        batch = list(texts[start : start + step])
        ours = tokenizer(batch, add_special_tokens=False)["input_ids"]
        for text, expected, found in zip(batch, processor.encode(batch), ours, strict=True):
            if expected != found:
                raise ModelError(
                    f"{path}: is no BPE model in ChatGLM2's settings: {text!r} has the ids "
                    f"{expected}, where such a model gives {found}; take the tokenizer.model "
                    "that came with the checkpoint"
                )
