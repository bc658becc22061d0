"""Features kept in the cache: how long a network over a frozen encoder takes first and again.

    python scripts/bench/features.py --data-root DATA

The same command, `llm-emo train RECIPE` of the dialogue network, from its start to its end: once
with a cache that has everything but features, and once more. The encoder is fine-tuned before, on a
few rows only, because what it has learned takes no time; features are taken of all rows.

What is spared grows with the encoder. `--encoder-of large` takes one of the size that the paper has
(24 layers, 1024 wide, as RoBERTa-large) with random weights, which cost what trained ones cost.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common import harness
from common.harness import ROOT, Result

SIDES = ("first", "again")

BUNDLED, LARGE = "bundled", "large"
LARGE_SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
"""Of RoBERTa-large (https://arxiv.org/abs/1907.11692, section 4)."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print what keeping an encoder's features spares.",
        epilog="example: python scripts/bench/features.py --data-root ~/corpora -o features.json",
    )
    harness.add_recipe(parser, "meld/roberta_cnn_lstm")
    parser.add_argument(
        "--encoder", default="meld/encoder", help="the encoder's recipe (default: %(default)s)"
    )
    parser.add_argument(
        "--encoder-of", choices=(BUNDLED, LARGE), default=BUNDLED,
        help="size: the recipe's own encoder, or 24 random layers (default: %(default)s)",
    )  # fmt: skip
    harness.add_common(parser, rounds=2)
    return parser.parse_args(argv)


def save_large(folder: Path) -> None:
    """Write an encoder of RoBERTa-large's size, random, with the bundled one's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from llm_emo.baselines import minilm

    tokenizer = AutoTokenizer.from_pretrained(minilm.folder(), local_files_only=True)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), **LARGE_SIZES)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def cache_without_features() -> Iterator[Path]:
    """Yield a cache folder that has all that the program's own has, but no features."""
    from llm_emo import fetch

    with tempfile.TemporaryDirectory() as name:
        for path in fetch.cache_dir().iterdir():
            if path.name != "features":
                (Path(name) / path.name).symlink_to(path)
        yield Path(name)


def trained(given: argparse.Namespace, recipe: str, run: Path, cache: Path, *changes: str) -> float:
    """Train a recipe as a user does; return the seconds that the command took.

    Raises:
        SystemExit: the command failed.
    """
    options = [word for value in changes for word in ("--set", value)]
    if given.data_root:
        options += ["--data-root", str(given.data_root)]
    started = time.perf_counter()
    harness.run(
        ROOT / "scripts/bench/common/verb.py", ["train", recipe, "-o", str(run), *options],
        environment={"LLM_EMO_CACHE": str(cache)},
    )  # fmt: skip
    return time.perf_counter() - started


def measured(given: argparse.Namespace) -> dict[str, list[Result]]:
    """Train first and again, in rounds."""
    results: dict[str, list[Result]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        encoder = Path(name) / "encoder"
        few = ["data.limit={train: 64, dev: 64}", "train.epochs=1"]
        if given.encoder_of == LARGE:
            save_large(Path(name) / LARGE)
            few.append(f"method.name={Path(name) / LARGE}")
        from llm_emo import fetch

        trained(given, given.encoder, encoder, fetch.cache_dir(), *few)
        for turn in range(given.rounds):
            with cache_without_features() as cache:
                for side in SIDES:
                    run = Path(name) / f"{side}{turn}"
                    changes = (f"method.encoder_run={encoder}", *given.overrides)
                    seconds = trained(given, given.recipe, run, cache, *changes)
                    results[side].append({"round": turn, "seconds": seconds})
                    harness.tell(f"round {turn + 1}: {side}: {seconds:.1f} s")
    return results


def report(results: dict[str, list[Result]], machine: Result, given: argparse.Namespace) -> str:
    """Return everything that is printed."""
    middle = {
        side: statistics.median(result["seconds"] for result in results[side]) for side in SIDES
    }
    rows = [
        [side, f"{middle[side]:.1f} s", *(f"{result['seconds']:.1f}" for result in results[side])]
        for side in SIDES
    ]
    shown = {BUNDLED: "the recipe's encoder", LARGE: "an encoder of RoBERTa-large's size, random"}
    heads = ["run", "median", *(f"round {turn + 1}" for turn in range(given.rounds))]
    return "\n".join(
        [
            f"{given.recipe} over {given.encoder}: the whole command; {shown[given.encoder_of]}",
            *harness.machine_lines({harness.OURS: [{"machine": machine}]}, "torch", "transformers"),
            "",
            harness.columns(heads, rows),
            "",
            f"again is {middle['first'] / middle['again']:.1f} times as fast as first",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    given = arguments(argv)

    def body() -> None:
        results, machine = measured(given), harness.machine()
        harness.write(given, "features.py", argv, machine=machine, results=results)
        print(report(results, machine, given))

    return harness.main(body)


if __name__ == "__main__":
    raise SystemExit(main())
