"""The errors a user can cause, each with one message that says what to do next.

EmoError                  exit 2: wrong input; the message is the whole report
├── DatasetError          a corpus file is missing, malformed or empty
├── ProtocolError         rows and label sets do not fit, or numbers are not comparable
├── PromptError           a prompt file is malformed
├── RecipeError           a recipe or an override is malformed
├── ModelError            a base model or tokenizer cannot be used
├── AdapterError          an adapter does not belong to this base, tokenizer, prompt or labels
├── PredictionsError      a predictions file is malformed or belongs to something else
└── RunError              a run folder is unusable (exists, absent, incomplete)
JobFailed                 exit 1: the input was right, the machine failed (disk, network, memory)
"""

import difflib
from collections.abc import Iterable


class EmoError(Exception):
    """Wrong input; the command line prints the message and exits with 2."""

    exit_code = 2


class DatasetError(EmoError):
    """A corpus file is missing, malformed or empty."""


class ProtocolError(EmoError):
    """Rows, labels and protocol do not fit, or two numbers are not comparable."""


class PromptError(EmoError):
    """A prompt file is malformed."""


class RecipeError(EmoError):
    """A recipe or an override is malformed."""


class ModelError(EmoError):
    """A base model or its tokenizer cannot be used."""


class AdapterError(EmoError):
    """An adapter does not belong to this base, tokenizer, prompt or label set."""


class PredictionsError(EmoError):
    """A predictions file is malformed or was made under something else."""


class RunError(EmoError):
    """A run folder is unusable: it exists already, is absent, or is incomplete."""


class JobFailed(EmoError):
    """The input was right but the machine failed: disk, network, memory."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that names the closest known name, and all of them.

    >>> nearest("learning_rat", ["learning_rate", "epochs"])
    "did you mean 'learning_rate'? (known: epochs, learning_rate)"
    >>> nearest("zzz", ["b", "a"])
    '(known: a, b)'
    """
    names = sorted(known)
    listing = f"(known: {', '.join(names) or 'none'})"
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}? {listing}" if close else listing
