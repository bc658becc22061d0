"""What the verbs print for people, on stdout."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

METRICS = ("accuracy", "macro_f1", "weighted_f1", "unweighted_accuracy")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def show_report(report: dict[str, Any]) -> None:
    """Print a report: metrics with intervals, classes, confusion."""
    console = _console()
    console.print(
        f"{report['protocol']}, {report['split']} split: {report['n']} rows, "
        f"parse rate {report['parse_rate']:.4f}"
    )
    table = Table("metric", "value", f"95 % interval (over {report['ci_unit']}s)")
    for name in (*METRICS, "f1"):
        if report.get(name) is not None:
            low, high = report["ci"][name]
            table.add_row(name, f"{report[name]:.4f}", f"{low:.4f} to {high:.4f}")
    if report["ece"] is not None:
        table.add_row("ece", f"{report['ece']:.4f}", "")
    console.print(table)
    classes = Table("class", "precision", "recall", "f1", "support")
    for name, values in report["per_class"].items():
        numbers = [f"{values[key]:.4f}" for key in ("precision", "recall", "f1")]
        classes.add_row(escape(name), *numbers, str(values["support"]))
    console.print(classes)
    names = list(report["per_class"])
    confusion = Table("gold \\ predicted", *names, "unparsed")
    for name, row in zip(names, report["confusion"], strict=True):
        confusion.add_row(escape(name), *map(str, row))
    console.print(confusion)
    shown = {name: count for name, count in report["outcomes"].items() if count}
    console.print("outcomes: " + ", ".join(f"{name} {count}" for name, count in shown.items()))


def show_inventory(result: dict[str, Any]) -> None:
    """Print the corpora, and where to get those that are not found."""
    console = _console()
    table = Table("dataset", "language", "train", "dev", "test", "all", "protocols")
    for entry in result["datasets"]:
        counts = {part: str(values["utterances"]) for part, values in entry["splits"].items()}
        table.add_row(
            entry["name"],
            entry["language"],
            *(counts.get(part, "") for part in ("train", "dev", "test", "all")),
            ", ".join(entry["protocols"]),
        )
    console.print(table)
    for entry in result["datasets"]:
        if entry["error"]:
            error = entry["error"].removeprefix(f"{entry['name']}: ")
            console.print(f"{entry['name']}: {escape(error)}")


def show_check(result: dict[str, Any]) -> None:
    """Print the splits of a checked recipe."""
    console = _console()
    console.print(
        f"{escape(result['recipe'])}: {result['protocol']}, {', '.join(result['labels'])}"
    )
    table = Table("split", "rows", "tokens (median)", "tokens (longest)", "shortened texts")
    for split, values in result["splits"].items():
        table.add_row(split, *(str(value) for value in values.values()))
    console.print(table)
    if result.get("test_texts_in_train"):
        console.print(f"{result['test_texts_in_train']} test texts also stand in train")
    console.print("recipe, prompt, data and tokenizer fit")


def show_examples(result: dict[str, Any]) -> None:
    """Print rendered examples and their token ids."""
    console = _console()
    for example in result["examples"]:
        console.print(f"[bold]{escape(example['uid'])}[/bold], gold {escape(example['gold'])}")
        console.print(escape(example["prompt"]) + f"[green]{escape(example['answer'])}[/green]")
        ids = " ".join(map(str, example["prompt_ids"]))
        console.print(f"{ids} [green]{' '.join(map(str, example['answer_ids']))}[/green]")
        console.print(f"trained: {example['trained']}\n")


def show_training(result: dict[str, Any]) -> None:
    """Print where a finished run lies and how it was trained."""
    run, saved = result["tokens_run"], result["tokens_saved"]
    speed = ""
    if run:  # nothing was left to run when a resumed run had only to be saved
        speed = (
            f" at {result['examples_per_second']:.1f} examples/s; "
            f"{saved / (run + saved):.0%} of {run + saved:,} tokens saved"
        )
    ((metric, value),) = result["best_dev"].items()
    _console().print(
        f"{escape(result['run'])}: {result['trainable_parameters']:,} parameters learned from "
        f"{result['training_rows']:,} rows{speed}; "
        f"dev {metric} {value:.4f} at step {result['best_step']}\n"
        f"next: llm-emo evaluate {escape(result['run'])}"
    )


def show_quickstart(result: dict[str, Any]) -> None:
    """Print the quickstart's table."""
    console = _console()
    table = Table("method", "rows", "accuracy", "macro-F1", "parse rate", "examples/s")
    for row in result["methods"]:
        rate = "" if row["examples_per_second"] is None else f"{row['examples_per_second']:.1f}"
        scores = [f"{row[key]:.4f}" for key in ("accuracy", "macro_f1", "parse_rate")]
        table.add_row(row["method"], str(row["n"]), *scores, rate)
    console.print(f"{result['model']} on {result['protocol']}, test split, seed {result['seed']}")
    console.print(table)
    for name, entry in result["exports"].items():
        console.print(
            f"{name} adapter for stock PEFT: {escape(entry['folder'])} (label "
            f"log-probabilities differ by at most {entry['difference']:.1e} over "
            f"{entry['rows']} rows)"
        )
    console.print(f"cache folder: {escape(result['cache'])}")


def show_path(result: dict[str, Any]) -> None:
    """Print the path of what was written, which is the result's first value."""
    print(next(iter(result.values())))  # noqa: T201
