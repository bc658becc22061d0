#!/usr/bin/env python
"""Record how long rows are under ChatGLM2's tokenizer, so that `check.py` needs no corpus.

    python scripts/gpu/lengths.py --data-root DATA --tokenizer tokenizer.model

Lengths and counts only; no text of a corpus is kept.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

PERCENTILES = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9, 100)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description="Write the lengths of the training rows of Friends and SST-5, in tokens of "
        "ChatGLM2, to scripts/gpu/lengths.json.",
        epilog="example: python scripts/gpu/lengths.py --data-root DATA --tokenizer "
        "chatglm2-6b/tokenizer.model",
    )
    add = parser.add_argument
    add("--data-root", type=Path, required=True, help="folder with the corpora")
    add("--tokenizer", type=Path, required=True,
        help="ChatGLM2's tokenizer.model, or a folder that `llm-emo convert` wrote")  # fmt: skip
    add("-o", "--output", type=Path, default=HERE / "lengths.json", help="(default: %(default)s)")
    return parser.parse_args(argv)


def facts(rows: Sequence[Any], seed: int = 0) -> dict[str, Any]:
    """Return the lengths of encoded rows, and what batches of 16 of them come to."""
    import random

    from gpu_check import padded
    from gpu_check.train import trie_tokens

    from llm_emo.inference import shared_length

    prompts = [row.prompt for row in rows]
    # What the first and the last in order have in common, all between them have.
    shared = shared_length(min(prompts), max(prompts))
    behind = [prompt[::-1] for prompt in prompts]
    tail = shared_length(min(behind), max(behind))
    texts = sorted(len(prompt) - shared - tail for prompt in prompts)
    answers = Counter(row.answer for row in rows)
    order = random.Random(seed).sample(range(len(rows)), len(rows) - len(rows) % 16)
    batches = [[rows[i] for i in order[at : at + 16]] for at in range(0, len(order), 16)]
    return {
        "rows": len(rows),
        "shared": shared,
        "tail": tail,
        "text": [texts[round(p / 100 * (len(texts) - 1))] for p in PERCENTILES],
        "answers": [
            {"tokens": len(answer), "share": round(count / len(rows), 4)}
            for answer, count in answers.most_common()
        ],
        "tokens_of_16_rows": {
            "trie": round(statistics.mean(trie_tokens(b, 16) for b in batches), 1),
            "padded": round(statistics.mean(padded.tokens(b, 16) for b in batches), 1),
        },
    }


def encoded(corpus: str, root: Path, tokenizer: Any, count: int | None = None) -> list[Any]:
    """Return a corpus's training rows as token ids, all of them or the first `count`."""
    from gpu_check.rows import recipe_of

    from llm_emo.encoding import Encoder
    from llm_emo.experiment import Experiment

    recipe = recipe_of(corpus, "lora")
    examples = Experiment.prepare(recipe, root).examples("train")[:count]
    return Encoder(tokenizer, recipe.prompt.max_length).encode(examples)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all corpora; return the exit code."""
    given = arguments(argv)
    from gpu_check import rows as drawing

    from llm_emo.errors import EmoError
    from llm_emo.runs import write_json

    try:
        tokenizer = drawing.load_tokenizer(given.tokenizer)
        corpora = {}
        for corpus in drawing.CORPORA:
            print(f"{corpus} ...", file=sys.stderr)
            found = facts(encoded(corpus, given.data_root, tokenizer))
            corpora[corpus] = {"recipe": f"{corpus}/chatglm2_lora", **found}
        write_json(given.output, {"percentiles": PERCENTILES, "corpora": corpora})
    except EmoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({name: facts["tokens_of_16_rows"] for name, facts in corpora.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
