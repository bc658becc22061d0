"""Labelling at volume: does a row cost the same, and memory stay flat, however many there are?

    python scripts/bench/volume.py

Short texts are generated one by one, labelled as `predict` labels them, and written down as they
finish, on a tiny random model: so what is measured is the program around the model. Every number of
rows is a process of its own, in turn. Memory is the most that the process held. Few rows take a
fraction of a second, so they are labelled again and again, other ones each time, until the clock
has seen as many as the larger numbers give it.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import harness
from common.harness import Result

ROUGHLY = 0.10
"""By which share time per row and memory may differ from those of the fewest rows."""
WORDS = (
    "the a my your our old new long short rain train house dog friend letter morning evening "
    "never always today again really almost was is felt looks went came lost found broke made "
    "happy tired late early quiet loud warm cold strange fine terrible lovely"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RATE = "rows_per_second"
TIMED = 20_000
"""Rows that every clock sees at least."""
WARM_UP = 2000
"""Rows before the clock starts: a window, so that shapes and memory pools are what they stay."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        description="Print time per row and peak memory of labelling few and many rows.",
        epilog="example: python scripts/bench/volume.py --rows 1000,10000,50000 -o volume.json",
    )
    parser.add_argument(
        "--rows", default="1000,10000,50000", metavar="A,B",
        help="how many rows, each measured in turn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--mode", choices=("score", "generate"), default="score")
    harness.add_common(parser, rounds=3)
    parser.add_argument("--side", type=harness.positive, metavar="N", help="measure N rows once")
    given = parser.parse_args(argv)
    try:
        given.rows = [harness.positive(number) for number in given.rows.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--rows: expected numbers of 1 or more, found {given.rows}")
    return given


def texts(count: int, seed: int) -> Iterator[str]:
    """Yield generated texts of 4 to 20 words."""
    random_, words = random.Random(seed), WORDS.split()
    for _ in range(count):
        yield " ".join(random_.choices(words, k=random_.randint(4, 20)))


def save_model(folder: Path) -> None:
    """Write a tiny random model and a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    backend.train_from_iterator(texts(500, 0), learn)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def experiment_of(folder: Path, mode: str) -> Any:
    """Return an experiment on the tiny model, without a corpus."""
    from llm_emo import prompts, protocols, recipes
    from llm_emo.experiment import Experiment

    settings = [
        f"model.name={folder}", "model.dtype=float32", f"inference.mode={mode}",
        "inference.max_new_tokens=4", "inference.tokens_per_pass=2048",
    ]  # fmt: skip
    recipe = recipes.load("mastodon/zero_shot", settings)
    protocol = protocols.get(recipe.data.protocol)
    prompt = prompts.load(recipe.prompt.name)
    labels = prompts.label_set(protocol.labels, prompt.language)
    return Experiment(
        recipe=recipe, root=None, protocol=protocol, prompt=prompt, labels=labels,
        splits=protocols.Splits((), (), (), {}), files={},
    )  # fmt: skip


def examples(experiment: Any, count: int, seed: int) -> Iterator[Any]:
    """Yield rendered examples, each made when it is asked for."""
    from llm_emo.types import Row, Utterance

    gold = experiment.labels.names[0]
    for place, text in enumerate(texts(count, seed)):
        row = Row(Utterance(uid=f"row-{place}", text=text, label=gold), gold)
        yield experiment.prompt.render(row, experiment.labels, history_window=0)


def measure(given: argparse.Namespace) -> Result:
    """Label `given.side` rows in this process."""
    from llm_emo.labelling import open_labeller
    from llm_emo.machine import settled

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        experiment = experiment_of(folder, given.mode)
        labeller = open_labeller(experiment)
        for _ in labeller.predict(examples(experiment, WARM_UP, given.seed)):
            pass  # for warming up
        harness.forget_peak()
        before = harness.peak_memory()
        times = -(-TIMED // given.side)
        first = given.seed + 1 + given.round * times
        seen = 0
        with settled():  # as `predict` does
            started = time.perf_counter(), time.process_time()
            for again in range(times):
                with (folder / "labels.jsonl").open("w", encoding="utf-8") as file:
                    rows = examples(experiment, given.side, first + again)
                    for prediction in labeller.predict(rows):
                        line = {"uid": prediction.uid, "label": prediction.label}
                        file.write(json.dumps(line) + "\n")
                        seen += 1
            seconds = (time.perf_counter() - started[0]) / times
            processor = (time.process_time() - started[1]) / times
    assert seen == given.side * times
    return {
        "rows": given.side,
        "times": times,
        "round": given.round,
        RATE: given.side / seconds,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_memory_bytes": harness.peak_memory(),
        "peak_memory_before_bytes": before,
        "machine": harness.machine(),
    }


def report(results: dict[str, list[Result]], given: argparse.Namespace) -> str:
    """Return everything that is printed."""
    fewest = next(iter(results))
    rows = []
    for size, rounds in results.items():
        each = [statistics.median(result["seconds"] / result["rows"] for result in rounds)]
        spread = [result["seconds"] / result["rows"] * 1000 for result in rounds]
        memory = statistics.median(result["peak_memory_bytes"] for result in rounds)
        if size == fewest:
            least = spread, memory
        # Of one round, whose sides follow each other: a machine that slows down slows all of them.
        ratios = [own / other for own, other in zip(spread, least[0], strict=True)]
        time_share, memory_share = statistics.median(ratios) - 1, memory / least[1] - 1
        inside = abs(time_share) <= ROUGHLY and memory_share <= ROUGHLY
        rows.append(
            [size, f"{each[0] * 1000:.3f} ms", f"{min(spread):.3f}", f"{max(spread):.3f}",
             f"{time_share:+.1%}", " ".join(f"{ratio - 1:+.0%}" for ratio in ratios),
             f"{memory / 2**20:.0f} MiB", f"{memory_share:+.1%}", "yes" if inside else "no"]
        )  # fmt: skip
    heads = ["rows", "time a row", "min", "max", "change", "by round", "peak memory", "change",
             "within 10%"]  # fmt: skip
    return "\n".join(
        [
            f"mode {given.mode}, tiny random model, float32; {given.rounds} rounds; seed "
            f"{given.seed}; change: median over the rounds of the ratio within each",
            *harness.machine_lines({harness.OURS: results[fewest]}, "torch", "transformers"),
            "",
            harness.columns(heads, rows),
        ]
    )


def compare(argv: Sequence[str], given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure every number of rows in turn; return what is printed and what is written."""
    sizes = [str(count) for count in given.rows]
    results = harness.in_turn(sizes, given.rounds, harness.side_of(__file__, argv), rate=RATE)
    return report(results, given), {"results": results}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    return harness.bench(__file__, argv, arguments, measure, compare)


if __name__ == "__main__":
    raise SystemExit(main())
