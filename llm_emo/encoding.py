"""Examples to token ids: the template's specials as ids, everything else as plain text.

Two rules. User text can never become a control token: whatever a corpus contains, their ids
come from the chat template alone. And the template is never cut: when an example is too long,
the oldest turns of the history go first, then the end of the text.

Control tokens are a tokenizer's added tokens, except those of white space only: Gemma's line
break and runs of spaces are added tokens too, and ordinary text.

Some tokenizers let nobody spell a control token, a template as little as a text
(`split_special_tokens`, as ChatGLM2's). Then what leads a prompt comes from the tokenizer.
"""

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llm_emo.errors import ModelError, PromptError
from llm_emo.types import Example

# Private-use characters: no chat template contains them, and none trims them.
_USER, _ANSWER = "\ue000\ue001", "\ue002\ue003"


CHUNK = 2048
"""Rows of a stream that are encoded together: half a second's work at most."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example.

    `answer` ends with the token that ends a turn. `dropped` counts the characters of history
    and text that did not fit.
    """

    uid: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around the user's message: control tokens as ids, the rest as text.

    `rendered` is the same as the template wrote it, before and behind the message; there is none
    where no template spells a control token. `trims` says on which sides it cuts white space off
    the message.
    """

    before: tuple[int | str, ...]
    behind: tuple[int | str, ...]
    rendered: tuple[str, str] | None = None
    trims: tuple[bool, bool] = (False, False)

    def around(self, message: str) -> list[int | str]:
        """Return the whole prompt; plain stretches that touch are one.

        Joined, because a tokenizer may merge across the seam of template and message, and the
        model was trained on the merged form.
        """
        layout: list[int | str] = []
        for part in (*self.before, message, *self.behind):
            if layout and isinstance(part, str) and isinstance(layout[-1], str):
                layout[-1] += part
            else:
                layout.append(part)
        return layout

    def cut(self, message: str) -> str:
        """Return the message as the template shows it."""
        left, right = self.trims
        message = message.lstrip() if left else message
        return message.rstrip() if right else message


class Encoder:
    """Encodes examples for one tokenizer.

    Args:
        tokenizer: A `transformers` tokenizer, with or without a chat template. Without one, the
            message stands behind the tokenizer's own leading tokens and ends with a line break.
        max_length: The most tokens that prompt and answer together may have.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._control: dict[str, int] = {
            token.content: id_
            for id_, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content.replace("▁", " ").strip()
        }
        self._control_ids = frozenset(self._control.values())
        # Longest first, so that a token that begins like another is not torn.
        names = sorted(self._control, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._frames: dict[str | None, _Frame] = {}
        self._written: dict[str, str] = {}
        # A tokenizer is set up anew from call to call, so that it serves one thread at a time.
        self._turn = threading.Lock()

    # --- the template ---------------------------------------------------------------------

    def _chat(self, system: str | None, user: str, answer: str | None) -> str:
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": user})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        key = self.chat_key(turns, answer is None)
        if key not in self._written:
            # Reasoning models answer at once when told so; other templates ignore the switch.
            written = self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=answer is None,
                enable_thinking=False,
            )
            self._written[key] = str(written)
        return self._written[key]

    @staticmethod
    def chat_key(turns: Sequence[Mapping[str, str]], asks: bool) -> str:
        """Return a name for a chat, and for whether its template asks for an answer."""
        return json.dumps([turns, asks])

    def chats(self, system: str | None) -> dict[str, str]:
        """Return the few chats that it takes to encode rows of a system turn, and of none.

        They are as the template writes them, by `chat_key`.
        """
        for turn in (None, system):
            self._frame(turn)
        _ = self.end
        return dict(self._written)

    def _parts(self, text: str) -> tuple[int | str, ...]:
        """Split template text into the ids of control tokens and plain strings."""
        pieces = self._splitter.split(text) if self._splitter else [text]
        return tuple(self._control.get(piece, piece) for piece in pieces if piece)

    def _frame(self, system: str | None) -> _Frame:
        """Return what stands before and behind the user's message."""
        if system not in self._frames:
            self._frames[system] = (
                self._template(system) if self.tokenizer.chat_template else self._bare(system)
            )
        return self._frames[system]

    @cached_property
    def _leading(self) -> tuple[int, ...]:
        """The ids that the tokenizer itself puts in front of a text."""
        probe = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return tuple(probe[: len(probe) - len(bare)])

    @cached_property
    def _spells_nothing(self) -> bool:
        """Whether the template is text alone, in which a control token's name is text too."""
        if not self.tokenizer.split_special_tokens:
            return False
        rendered = [self._chat(None, _USER, answer) for answer in (None, _ANSWER)]
        return all(self._parts(text) == (text,) for text in rendered)

    def _template(self, system: str | None) -> _Frame:
        head, found, tail = self._chat(system, _USER, None).partition(_USER)
        if not found:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: the chat template does not show the "
                "user's message as it is; take a model whose template does"
            )
        left, _, right = self._chat(system, f" {_USER} ", None).partition(_USER)
        trims = (left == head, right == tail)
        if self._spells_nothing:
            return _Frame((*self._leading, head), (tail,), trims=trims)
        return _Frame(self._parts(head), self._parts(tail), (head, tail), trims)

    def _bare(self, system: str | None) -> _Frame:
        instruction = () if system is None else (f"{system}\n",)
        return _Frame((*self._leading, *instruction), ("\n",))

    @cached_property
    def end(self) -> int:
        """The id that ends an answer: what the template puts behind it, else eos."""
        if self.tokenizer.chat_template:
            rendered = self._chat(None, _USER, _ANSWER)
            behind = self._parts(rendered.partition(_ANSWER)[2].lstrip())
            if behind and isinstance(behind[0], int):
                return behind[0]
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: neither the chat template nor the tokenizer "
                "names a token that ends an answer; set tokenizer.eos_token"
            )
        return int(self.tokenizer.eos_token_id)

    # --- plain text -------------------------------------------------------------------------

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts in which no control token may come into being."""
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        return [
            row if self._control_ids.isdisjoint(row) else self._broken_up(text)
            for text, row in zip(texts, rows, strict=True)
        ]

    def _broken_up(self, text: str) -> list[int]:
        """Encode text that spells a control token which the tokenizer insists on.

        `split_special_tokens` spares only the tokens marked as special; the others (a model's
        tool or reasoning marks) are torn here in their middle.
        """
        assert self._splitter is not None
        ids: list[int] = []
        for piece in self._splitter.split(text):
            halves = (piece[: len(piece) // 2], piece[len(piece) // 2 :])
            for part in halves if piece in self._control else (piece,):
                if part:
                    ids += self.tokenizer(
                        part, add_special_tokens=False, split_special_tokens=True
                    )["input_ids"]
        # A one-character token cannot be torn; it has no plain spelling.
        return [id_ for id_ in ids if id_ not in self._control_ids]

    def _prompts(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Encode the whole prompts."""
        frames = [self._frame(example.system) for example in examples]
        messages = [
            frame.cut(example.message) for frame, example in zip(frames, examples, strict=True)
        ]
        return [
            whole if whole is not None else self._in_parts(frame.around(message))
            for frame, message, whole in zip(
                frames, messages, self._wholes(frames, messages), strict=True
            )
        ]

    def _wholes(
        self, frames: Sequence[_Frame], messages: Sequence[str]
    ) -> list[tuple[int, ...] | None]:
        """Encode prompts as everybody does, in one go; None where that lets the text take control.

        Only the tokenizer itself knows what its tokens do to the text beside them: some swallow
        a line break, some take the mark of a word's beginning away.
        """
        texts = [
            frame.rendered[0] + message + frame.rendered[1]
            for frame, message in zip(frames, messages, strict=True)
            if frame.rendered is not None
        ]
        rows = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        wholes: list[tuple[int, ...] | None] = []
        for frame in frames:
            row = next(rows) if frame.rendered is not None else None
            expected = [part for part in (*frame.before, *frame.behind) if isinstance(part, int)]
            harmless = row is not None and expected == [i for i in row if i in self._control_ids]
            wholes.append(tuple(row) if row is not None and harmless else None)
        return wholes

    def _in_parts(self, layout: Sequence[int | str]) -> tuple[int, ...]:
        """Encode a prompt stretch by stretch, so that no text becomes a control token."""
        plain = iter(self._plain([part for part in layout if isinstance(part, str)]))
        return tuple(
            token
            for part in layout
            for token in (next(plain) if isinstance(part, str) else (part,))
        )

    def answers(self, texts: Iterable[str]) -> list[tuple[int, ...]]:
        """Encode answers, each with the token that ends it.

        Apart from the prompt: joined, a tokenizer may merge across the seam and train on
        prompt ids that generation never sees.
        """
        return [(*ids, self.end) for ids in self._plain(list(texts))]

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Encode examples, shortening the corpus's text where one is too long.

        Raises:
            PromptError: instruction, labels and answer alone exceed `max_length`.
        """
        with self._turn:
            words = list(dict.fromkeys(example.answer for example in examples))
            answers = dict(zip(words, self.answers(words), strict=True))
            encoded = []
            for example, prompt in zip(examples, self._prompts(examples), strict=True):
                answer = answers[example.answer]
                dropped = 0
                if len(prompt) + len(answer) > self.max_length:
                    prompt, dropped = self._shortened(example, self.max_length - len(answer))
                encoded.append(Encoded(example.uid, prompt, answer, dropped))
            return encoded

    def stream(self, examples: Iterable[Example]) -> Iterator[tuple[Example, Encoded]]:
        """Encode any number of examples, a chunk at a time, and yield both.

        While one chunk is used, a thread takes and encodes the next: most of that is the
        tokenizer's own code, which leaves the interpreter to the model.

        Raises:
            PromptError: as `encode`, when the example's chunk is reached.
        """
        rest = iter(examples)

        def chunk() -> list[tuple[Example, Encoded]]:
            rows = list(itertools.islice(rest, CHUNK))
            return list(zip(rows, self.encode(rows), strict=True))

        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(chunk)
            while rows := coming.result():
                coming = thread.submit(chunk)
                yield from rows

    def _shortened(self, example: Example, room: int) -> tuple[tuple[int, ...], int]:
        """Return the longest prompt of at most `room` tokens, and the characters dropped."""

        def length(candidate: Example) -> int:
            return len(self._prompts([candidate])[0])

        history = example.history
        while history and length(replace(example, history=history)) > room:
            history = history[1:]
        low, high = 0, len(example.text)
        if length(replace(example, history=history)) <= room:
            low = high
        while low < high:  # the longest beginning of the text that fits
            middle = (low + high + 1) // 2
            if length(replace(example, history=history, text=example.text[:middle])) <= room:
                low = middle
            else:
                high = middle - 1
        short = replace(example, history=history, text=example.text[:low])
        if low == 0 and (example.text or length(short) > room):
            least = length(replace(example, history=(), text="")) + self.max_length - room
            raise PromptError(
                f"row {example.uid}: the instruction, the labels and the answer take {least} of "
                f"prompt.max_length = {self.max_length} tokens and leave none for the text; "
                "raise prompt.max_length"
            )
        return self._prompts([short])[0], len(example.message) - len(short.message)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without the ending token."""
        with self._turn:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of what turns text into ids: the tokenizer and its chat template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            words = sorted(self.tokenizer.get_vocab().items())
            model = json.dumps(words, ensure_ascii=False)
        else:
            model = backend.to_str()
        frame = self._frame(None)
        return {
            # Truncation and padding are the caller's passing wishes, not the tokenizer's nature.
            "tokenizer": _sha256(_without(model, ("truncation", "padding"))),
            "template": _sha256(json.dumps([list(frame.before), list(frame.behind), self.end])),
        }


def _without(serialised: str, keys: Sequence[str]) -> str:
    data = json.loads(serialised)
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key not in keys}
    return json.dumps(data, sort_keys=True, ensure_ascii=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
