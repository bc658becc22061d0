"""The command line: one verb a function; heavy modules are imported where they are used."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from llm_emo import __version__
from llm_emo.errors import EmoError, RecipeError, RunError
from llm_emo.types import SPLITS, Split

if TYPE_CHECKING:
    from llm_emo.experiment import Experiment
    from llm_emo.runs import Run

app = typer.Typer(
    name="llm-emo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Adapt chat LLMs to text emotion recognition with LoRA and P-Tuning v2, and measure "
    "them under comparable protocols.",
    epilog="Start with `llm-emo quickstart`. Every verb has `--help` with an example.",
)

# --- options that several verbs share ---------------------------------------------------------

Recipe_ = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped one: mastodon/lora.")
]
RunOrRecipe = Annotated[
    str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, or a zero-shot recipe.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="Folder that holds the corpora, one folder each.",
                 envvar="LLM_EMO_DATA", show_default=False),
]  # fmt: skip
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
SplitName = Annotated[str, typer.Option("--split", help="train, dev or test.")]
Out = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output folder.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llm_emo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- verbs -------------------------------------------------------------------------------------


@app.command(epilog="Example: `llm-emo quickstart`")
def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the three runs.")
    ] = Path("runs/quickstart"),
    json_: Json = False,
) -> None:
    """Run the embedded default end to end: zero-shot, LoRA, P-Tuning v2, table, adapters.

    Needs no data, no hub and no GPU: the model and the rated texts come from the Python
    package index. Interrupted, it continues where it stopped.
    """
    _quiet()
    from llm_emo import quickstart as main_job

    _print(main_job.run(output), json_, "show_quickstart")


@app.command(epilog="Example: `llm-emo datasets --data-root ~/corpora --json`")
def datasets(data_root: DataRoot = None, json_: Json = False) -> None:
    """List the corpora: language, protocols, where to get them, and what is found."""
    from llm_emo import datasets as corpora
    from llm_emo.experiment import data_root as resolve

    root = resolve(data_root)
    if root is not None and not root.is_dir():
        raise RunError(f"--data-root: {root} is no folder")
    inventory = corpora.inventory(root)
    _print({"data_root": None if root is None else str(root), "datasets": inventory}, json_,
           "show_inventory")  # fmt: skip


@app.command(epilog="Example: `llm-emo check mastodon/lora --data-root ~/corpora`")
def check(
    recipe: Recipe_, data_root: DataRoot = None, set_: Set = None, json_: Json = False
) -> None:
    """Check that recipe, prompt, data and model fit together; trains nothing."""
    _quiet()
    experiment, source = _experiment(recipe, set_, data_root)
    from llm_emo.encoding import Encoder
    from llm_emo.models import auto
    from llm_emo.protocols import leaks

    encoder = Encoder(
        auto.load_tokenizer(experiment.recipe.model), experiment.recipe.prompt.max_length
    )
    result: dict[str, Any] = {
        "recipe": str(source),
        "protocol": experiment.protocol.name,
        "labels": list(experiment.labels.words),
        "splits": {},
        "record": experiment.splits.record,
    }
    for split in SPLITS:
        needed = split != "test" and experiment.recipe.train is not None
        if not needed and not getattr(experiment.splits, split):
            continue
        rows = encoder.encode(experiment.examples(split))
        lengths = sorted(len(row.prompt) + len(row.answer) for row in rows)
        result["splits"][split] = {
            "rows": len(rows),
            "tokens_median": lengths[len(lengths) // 2],
            "tokens_longest": lengths[-1],
            "shortened": sum(row.dropped > 0 for row in rows),
        }
    if experiment.splits.train and experiment.splits.test:
        result["test_texts_in_train"] = len(leaks(experiment.splits.train, experiment.splits.test))
    _print(result, json_, "show_check")


@app.command(epilog="Example: `llm-emo show vader/lora -n 1`")
def show(
    recipe: Recipe_,
    count: Annotated[int, typer.Option("-n", min=1, help="How many examples.")] = 3,
    split: SplitName = "train",
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Show rendered prompts, their token ids, and which tokens are trained."""
    _quiet()
    experiment, _ = _experiment(recipe, set_, data_root)
    from llm_emo.encoding import Encoder
    from llm_emo.models import auto

    tokenizer = auto.load_tokenizer(experiment.recipe.model)
    encoder = Encoder(tokenizer, experiment.recipe.prompt.max_length)
    examples = experiment.render(experiment.rows(_split(split))[:count])
    shown = [
        {
            "uid": example.uid,
            "gold": example.gold,
            "message": example.message,
            "prompt": tokenizer.decode(list(row.prompt)),
            "answer": tokenizer.decode(list(row.answer)),
            "prompt_ids": list(row.prompt),
            "answer_ids": list(row.answer),
            "trained": f"the last {len(row.answer)} of {len(row.prompt) + len(row.answer)} tokens",
        }
        for example, row in zip(examples, encoder.encode(examples), strict=True)
    ]
    _print({"examples": shown}, json_, "show_examples")


@app.command(
    epilog="Example: `llm-emo train mastodon/lora --data-root ~/corpora -o runs/mastodon "
    "--set train.epochs=1`; on two devices: `accelerate launch --multi_gpu --num_processes 2 "
    "-m llm_emo train ...` (without a GPU: two processes on the CPU)"
)
def train(
    recipe: Recipe_,
    output: Out = None,
    data_root: DataRoot = None,
    set_: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder.")
    ] = False,
    json_: Json = False,
) -> None:
    """Train the recipe's method; the best state on dev is kept, test rows take no part."""
    _quiet()
    from llm_emo import runs
    from llm_emo.recipes import source as find

    source = find(recipe)
    folder = output if output is not None else runs.default_folder(source)
    if resume:
        run = runs.open_run(folder)
        if set_:
            raise RunError("--resume continues the run as it was begun; leave out --set")
        if run.finished:
            raise RunError(f"{folder}: training has finished; see `llm-emo evaluate {folder}`")
        if source.read_bytes() != (run.folder / "recipe.yaml").read_bytes():
            raise RunError(
                f"{folder}: was begun with another recipe than {source}; to continue it, name "
                f"its own: {run.folder / 'recipe.yaml'}"
            )
        experiment = _reopen(run, None, data_root)
    else:
        runs.require_free(folder)
        experiment, source = _experiment(recipe, set_, data_root)
        if experiment.recipe.train is None:
            raise RecipeError(
                f"{source}: method zero_shot trains nothing; see `llm-emo evaluate {recipe}`"
            )
    # The heavy half, only for input that fits.
    from llm_emo import workflow

    job = workflow.prepare(experiment)
    state = workflow.processes()
    if not resume:
        if state.is_main_process:
            runs.create(folder, source, set_ or [], experiment)
        state.wait_for_everyone()
    summary = workflow.train(job, runs.Run(folder), resume=resume)
    if state.is_main_process:
        _print({"run": str(folder), **summary}, json_, "show_training")


@app.command(epilog="Example: `llm-emo predict runs/mastodon --split test --mode generate -o out`")
def predict(
    source: RunOrRecipe,
    split: SplitName = "test",
    mode: Annotated[
        str | None, typer.Option(help="score or generate, instead of the recipe's own mode.")
    ] = None,
    output: Out = None,
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Write `<split>.predictions.jsonl`; interrupted, it continues where it stopped."""
    _quiet()
    path, _ = _predicted(source, _split(split), mode, output, data_root, set_)
    if _first_process():
        _print({"predictions": str(path)}, json_, "show_path")


@app.command(
    epilog="Example: `llm-emo evaluate runs/mastodon`, `llm-emo evaluate mastodon/zero_shot`, "
    "`llm-emo evaluate runs/mastodon/test.predictions.jsonl --json`"
)
def evaluate(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_RECIPE_OR_PREDICTIONS",
                       help="A run, a zero-shot recipe, or a predictions file."),
    ],
    split: SplitName = "test",
    mode: Annotated[
        str | None, typer.Option(help="score or generate, instead of the recipe's own mode.")
    ] = None,
    output: Out = None,
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Report accuracy, F1 and the rest; predicts first what is not predicted yet.

    From a predictions file it needs neither model nor torch. With the corpus at hand the 95 %
    intervals resample whole dialogues; from the file alone they resample rows.
    """
    from llm_emo import predictions, runs

    groups = None
    if source.endswith(".jsonl"):
        if set_ or mode or output:
            raise RunError("a predictions file is reported as it is; leave out --set, --mode, -o")
        path = Path(source)
        header, rows = predictions.read(path)
    else:
        _quiet()
        path, experiment = _predicted(source, _split(split), mode, output, data_root, set_)
        header, rows = predictions.read(path)
        groups = experiment.clusters
        if not _first_process():
            return
    report = predictions.report(header, rows, groups)
    # Not by replacing ".predictions": a file of another name would be overwritten by its report.
    name = path.name.removesuffix(".jsonl").removesuffix(".predictions")
    runs.write_json(path.with_name(f"{name}.report.json"), report)
    _print(report, json_, "show_report")


@app.command(epilog="Example: `llm-emo export runs/mastodon -o adapter --format peft`")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    format_: Annotated[
        str, typer.Option("--format", help="peft (an adapter folder) or merged (a whole model).")
    ] = "peft",
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Write the adapter for use elsewhere; stock PEFT and transformers read it."""
    _quiet()
    from llm_emo import runs

    if format_ not in ("peft", "merged"):
        raise RunError(f"--format: {format_!r} is not known; peft or merged")
    opened = runs.open_run(run)
    experiment = _reopen(opened, set_, data_root)
    from llm_emo.export import export as write

    write(experiment, opened, output, cast("Any", format_))
    _print({"exported": str(output), "format": format_}, json_, "show_path")


# --- what the verbs share -----------------------------------------------------------------------


def _split(name: str) -> Split:
    if name not in SPLITS:
        from llm_emo.errors import nearest

        raise RunError(f"--split: no split {name!r}; {nearest(name, SPLITS)}")
    return name


def _experiment(
    recipe: str, overrides: list[str] | None, root: Path | None
) -> tuple["Experiment", Path]:
    from llm_emo import recipes
    from llm_emo.experiment import Experiment, data_root

    loaded = recipes.load(recipe, overrides or [])
    return Experiment.prepare(loaded, data_root(root)), recipes.source(recipe)


def _reopen(run: "Run", overrides: list[str] | None, root: Path | None) -> "Experiment":
    """Prepare a run's experiment again, from its own recipe and prompt."""
    import dataclasses

    from llm_emo import prompts, recipes
    from llm_emo.experiment import Experiment, data_root

    recipe = recipes.load(str(run.folder / "recipe.yaml"), [*run.overrides, *(overrides or [])])
    recorded = run.environment
    found = data_root(root) or (recorded["data_root"] and Path(recorded["data_root"]))
    prompt = None
    if recipe.prompt.name == run.recipe.prompt.name:
        # The shipped prompt may have been edited since; the adapter learned the run's own.
        kept = prompts.load(str(run.folder / "prompt.yaml"))
        prompt = dataclasses.replace(kept, name=Path(recipe.prompt.name).stem)
    experiment = Experiment.prepare(recipe, found, prompt)
    if experiment.files != recorded["files"]:
        raise RunError(
            f"{run.folder}: the corpus files have changed since the run was begun; "
            "name the data root that it was begun with (--data-root)"
        )
    return experiment


def _predicted(
    source: str,
    split: Split,
    mode: str | None,
    output: Path | None,
    root: Path | None,
    overrides: list[str] | None,
) -> tuple[Path, "Experiment"]:
    from llm_emo import recipes, runs

    changes = list(overrides or [])
    if mode is not None:
        changes.append(f"inference.mode={mode}")
    if runs.is_run(Path(source)):
        run: Run | None = runs.Run(Path(source))
        assert run is not None
        experiment = _reopen(run, changes, root)
        folder = output or run.folder
    else:
        if Path(source).is_dir():
            raise RunError(f"{source}: is a folder, but no run folder; it has no environment.json")
        experiment, path = _experiment(source, changes, root)
        if not isinstance(experiment.recipe.method, recipes.ZeroShot):
            raise RunError(
                f"{path}: method {experiment.recipe.method.kind} must be trained first: "
                f"`llm-emo train {source}`; then name its run folder here"
            )
        run, folder = None, output or runs.default_folder(path)
    experiment.rows(split)  # an empty split is refused before torch is loaded
    from llm_emo import workflow

    return workflow.predict(experiment, run, split, folder), experiment


def _quiet() -> None:
    """Set what libraries read on import: fewer notices on the terminal, no spinning threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    # OpenMP's threads spin while they wait for one another; on a machine that does anything else
    # besides, they then wait for a core that a spinning one holds. A short spin costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _print(result: dict[str, Any], as_json: bool, table: str) -> None:
    """Print a result: as JSON, or through the function of `tables` called `table`."""
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        from llm_emo import tables

        getattr(tables, table)(result)


def _first_process() -> bool:
    """Whether this is the process that prints, among those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


INTERRUPTED = 128 + signal.SIGINT


def main() -> NoReturn:
    """Run the command line; a user's error ends in one line on stderr, never in a traceback."""
    try:
        app()
    except EmoError as error:
        _fail(str(error), error.exit_code)
    except SystemExit as end:
        # Typer turns Ctrl-C into this exit code, and wrong usage into 2 with its own message.
        if end.code == INTERRUPTED:
            _fail(
                "interrupted; `train` continues with --resume, the other verbs when typed again",
                INTERRUPTED,
            )
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}", 1)
    except Exception as error:
        # By name, because torch, whose class it is, may never have been loaded.
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
            raise
        _fail(
            f"out of memory: {str(error).partition('. ')[0] or 'the machine has no more'}; lower "
            "train.micro_batch_size or inference.tokens_per_pass, set "
            "train.gradient_checkpointing=true, or store the base in 4 bits with "
            "model.quantization=nf4",
            1,
        )
    raise SystemExit(0)


def _fail(message: str, code: int) -> NoReturn:
    # Wrong input is wrong in every process, a failing machine perhaps in one.
    if _first_process() or code == 1:
        typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)
