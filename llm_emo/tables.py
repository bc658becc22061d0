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
    table.columns[0].no_wrap = True
    table.columns[-1].no_wrap = True  # a name that is cut cannot be typed
    for entry in result["datasets"]:
        counts = {part: str(values["utterances"]) for part, values in entry["splits"].items()}
        table.add_row(
            entry["name"],
            entry["language"],
            *(counts.get(part, "") for part in ("train", "dev", "test", "all")),
            "\n".join(entry["protocols"]),
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
    llm = "facts" not in result
    columns = ["rows", "tokens (median)", "tokens (longest)", "shortened texts"]
    table = Table("split", *(columns if llm else ["rows", *result["labels"]]))
    for split, values in result["splits"].items():
        table.add_row(split, *(str(value) for value in values.values()))
    console.print(table)
    for name, value in ({} if llm else result["facts"]).items():
        console.print(f"{name.replace('_', ' ')}: {value}", markup=False)
    if result.get("test_texts_in_train"):
        console.print(f"{result['test_texts_in_train']} test texts also stand in train")
    console.print(f"recipe, {'prompt, data, tokenizer' if llm else 'data'} and model fit")


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
    spared = f"; {saved / (run + saved):.0%} of {run + saved:,} tokens saved" if run else ""
    rate = f" at {result['examples_per_second']:.1f} examples/s" if result["steps"] else ""
    reached = "".join(
        f"; dev {metric} {value:.4f} at step {result['kept_step']}"
        for metric, value in result["kept_dev"].items()
    )
    _console().print(
        f"{escape(result['run'])}: {result['trainable_parameters']:,} parameters learned from "
        f"{result['training_rows']:,} rows{rate}{spared}{reached}\n"
        f"next: llm-emo evaluate {escape(result['run'])}"
    )


def show_grids(result: dict[str, Any]) -> None:
    """Print the tables of grids: what was reached, and what it took."""
    console = _console()
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=100)  # a file has no edge
    for grid in result["grids"]:
        rows, even = grid["cells"][0]["n"], len(grid["seeds"]) > 1
        chose = ", which also chose the states that are measured" if grid["dev_chose"] else ""
        console.print(f"{escape(grid['title'])}", style="bold", soft_wrap=False)
        console.print(
            f"{grid['protocol']}, {grid['split']} split{chose}, {rows} rows, "
            f"seeds {', '.join(map(str, grid['seeds']))}"
            + ("" if grid["folds"] is None else f", {len(grid['folds'])} folds together")
            + f"; 95 % intervals {grid['interval']}",
            soft_wrap=False,
        )
        reached, took = Table(""), Table("", "parameters", "s/epoch", "rows/s", "memory")
        for name in grid["metrics"]:
            reached.add_column(escape(name), no_wrap=True)  # the names of cells make room
        for cell in grid["cells"]:
            name = escape(cell["cell"])
            reached.add_row(
                name, *(_with_interval(cell["metrics"][metric], even) for metric in grid["metrics"])
            )
            seconds, rate = cell["seconds_per_epoch"], cell["examples_per_second"]
            memory = cell["peak_memory_bytes"]
            took.add_row(
                name,
                f"{cell['trainable_parameters']:,}",
                "" if seconds is None else f"{seconds:.1f}",
                "" if rate is None else f"{rate:.0f}",
                "" if memory is None else _size(memory),
            )
        console.print(reached)
        console.print(took)
        for cell in grid["cells"]:
            if cell["fusion_weights"]:
                shares = (f"{name} {share:.2f}" for name, share in cell["fusion_weights"].items())
                console.print(f"{escape(cell['cell'])}: weights of the sum: {', '.join(shares)}")


def _with_interval(found: dict[str, Any], even: bool) -> str:
    if found["low"] is None:
        return f"{found['mean']:.4f}"
    if even:
        return f"{found['mean']:.4f} ± {found['high'] - found['mean']:.4f}"
    return f"{found['mean']:.4f} ({found['low']:.3f} to {found['high']:.3f})"


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


_PARTS = {
    "weights": "base model",
    "copies": "copies of its weights, laid out for products",
    "adapter": "adapter",
    "optimizer": "optimiser (AdamW)",
    "activations": "activations kept for the backward pass",
    "logits": "logits, their softmax and gradient",
    "work": "gradients and work space",
    "allowance": "beside tensors: driver, libraries, fragmentation",
}
_KEPT = {"none": "as it is", "nf4": "NF4", "int8": "int8"}


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def show_plan(result: dict[str, Any]) -> None:
    """Print what a recipe needs; the last line says what to do."""
    console = _console()
    console.print(
        f"{escape(result['model'])} ({result['parameters']:,} parameters, {result['dtype']}), "
        f"{result['method']} ({result['trainable_parameters']:,} learn), on {result['place']}"
    )
    memory = result["memory"]
    table = Table(f"memory at the peak (in {memory['stage']})", "")
    for key, name in _PARTS.items():
        if key == "copies" and not memory[key]:
            continue
        table.add_row(name, _size(memory[key]))
    table.add_row("in all", f"{_size(memory['needed'])} of {_size(result['capacity'])}")
    console.print(table)
    _show_run(console, result)
    _show_choices(console, result)
    if "measured" in result:
        found = result["measured"]
        pairs = (
            f"{name} {_size(found[key]['predicted'])} predicted, {_size(found[key]['measured'])} "
            "measured"
            for key, name in (("saved", "kept for the backward pass"), ("peak", "at the peak"))
        )
        console.print(f"one step of {found['rows']} rows on {found['device']}: {'; '.join(pairs)}")
    for note in result["notes"]:
        console.print(f"note: {escape(note)}")
    console.print(f"assumed: {result['attention']}")
    console.print(f"[bold]{escape(result['verdict'])}[/bold]")


def _show_run(console: Console, result: dict[str, Any]) -> None:
    training, evaluation, disk = result["training"], result["evaluation"], result["disk"]
    if training is not None:
        saved = training["tokens_saved"] / training["tokens"]
        console.print(
            f"training: {training['rows']:,} rows, {training['epochs']} epochs, "
            f"{training['steps']:,} steps of {training['batch_size']}; {training['tokens']:,} "
            f"tokens, {saved:.0%} of them saved by the trie; the largest of "
            f"{training['micro_batches']:,} micro-batches, {training['largest']:,} tokens, was "
            "planned with"
        )
    console.print(
        f"evaluation: {evaluation['rows']:,} {evaluation['split']} rows, {evaluation['times']} "
        f"times in {evaluation['passes']:,} passes ({evaluation['mode']})"
    )
    if training is not None:
        console.print(
            f"disk: checkpoints {_size(disk['checkpoints'])}, adapter {_size(disk['adapter'])}; "
            f"merged into the base {_size(disk['merged'])}"
        )
    seconds = result["seconds"]
    time = "unknown (another machine)"
    if seconds is not None:
        rate = seconds["products_per_second"] / 1e12
        time = f"about {_duration(seconds['estimate'])} (an estimate, from {rate:.2g} TFLOP/s here)"
    console.print(f"work: {result['operations']:.2g} floating-point operations; time: {time}")
    if (labelling := result.get("labelling")) is not None:
        took = labelling["seconds"]
        console.print(
            f"labelling {labelling['texts']:,} texts like those of {evaluation['split']}: "
            f"{labelling['operations']:.2g} operations; time: "
            + ("unknown (another machine)" if took is None else f"about {_duration(took)}")
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _show_choices(console: Console, result: dict[str, Any]) -> None:
    sizes = sorted({choice["micro_batch_size"] for choice in result["choices"]})
    trains = result["training"] is not None
    heads = [f"micro-batch {size}" for size in sizes] if trains else ["evaluation"]
    table = Table("base", *(["checkpointing"] if trains else []), *heads)
    rows: dict[tuple[str, bool], dict[int, str]] = {}
    for choice in result["choices"]:
        text = f"{choice['needed'] / 2**30:.1f} GiB"
        if choice["fits"]:
            text = f"[green]{text}[/green]"
            if choice["relative_time"] > 1.005:
                text += f", {choice['relative_time']:.1f}x"
        else:
            text = f"[red]{text} no[/red]"
        if result["suggestion"] is not None and choice["set"] == result["suggestion"]["set"]:
            text = f"[bold]{text} <=[/bold]"
        key = (choice["quantization"], choice["gradient_checkpointing"])
        rows.setdefault(key, {})[choice["micro_batch_size"]] = text
    for (kept, checkpointing), cells in rows.items():
        second = ["yes" if checkpointing else "no"] if trains else []
        table.add_row(_KEPT[kept], *second, *(cells[size] for size in sizes))
    console.print(table)
    console.print("2.0x: takes twice as long as the choice marked <=, by a model of its work")
    by_tokens = result["by_tokens"]
    if by_tokens is not None and by_tokens["set"]:
        options = " ".join(f"--set {option}" for option in by_tokens["set"])
        console.print(
            f"with passes bounded by tokens instead of rows: {_size(by_tokens['needed'])}, "
            f"{by_tokens['relative_time']:.2f}x: {escape(options)}"
        )
