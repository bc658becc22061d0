"""The random folds of the speech papers, which share speakers between train and test.

He, Minematsu and Saito, "Effective Integration of Transformer for Network-based Speech Emotion
Recognition", section 3.1: 55 % train, 25 % validation and 20 % test, five folds. Folds that hold
out speakers or sessions are made by `protocols`; a number on these is not one on those, because a
network may know a speaker's voice instead of the emotion. Paper 002 (Petec and Popoviciu) has a
random 80/20 split, on whose 20 % it both chooses epochs and reports; a fold here tests on 20 %
and chooses on others.

Where the paper is silent: the five test parts share no row and cover all; every class is parted
by itself, so that each part has a fifth of it (give or take one row).
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from llm_emo.errors import ProtocolError
from llm_emo.types import Split

FOLDS = 5
PARTS = 20
"""5 % each: 4 of them test, 5 dev, 11 train."""


def random_fold(gold: Mapping[str, str], fold: int, seed: int) -> dict[str, Split]:
    """Return the split of every row.

    A hash of seed and uid orders the rows, so neither the files' order nor a version of Python
    decides.

    Args:
        gold: the label of every uid.
        fold: 0 to 4.
        seed: another one parts the rows otherwise.

    Raises:
        ProtocolError: there is no such fold.
    """
    if not 0 <= fold < FOLDS:
        raise ProtocolError(f"found fold {fold}; expected 0 to {FOLDS - 1}: the fold is a fifth")
    classes: dict[str, list[str]] = defaultdict(list)
    for uid in sorted(gold, key=lambda uid: hashlib.sha256(f"{seed}/{uid}".encode()).digest()):
        classes[gold[uid]].append(uid)
    splits: dict[str, Split] = {}
    for uids in classes.values():
        for place, uid in enumerate(uids):
            part = (place * PARTS // len(uids) - 4 * fold) % PARTS
            splits[uid] = "test" if part < 4 else "dev" if part < 9 else "train"
    return splits
