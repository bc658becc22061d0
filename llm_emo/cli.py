"""The command line: one verb a function; heavy modules are imported where they are used."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from llm_emo import __version__
from llm_emo.errors import EmoError, RecipeError, RunError, nearest
from llm_emo.types import SPLITS, Split

if TYPE_CHECKING:
    from llm_emo.experiment import AnyExperiment, Experiment

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
Mode = Annotated[
    str | None, typer.Option(help="score or generate, instead of the recipe's own mode.")
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", show_default=False,
                 help="An adapter folder from elsewhere, for a zero-shot recipe's model."),
]  # fmt: skip


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
    from llm_emo import inventory
    from llm_emo.experiment import data_root as resolve

    root = resolve(data_root)
    if root is not None and not root.is_dir():
        raise RunError(f"--data-root: {root} is no folder")
    found = inventory.describe(root)
    _print({"data_root": None if root is None else str(root), "datasets": found}, json_,
           "show_inventory")  # fmt: skip


@app.command(epilog="Example: `llm-emo check mastodon/lora --data-root ~/corpora`")
def check(
    recipe: Recipe_, data_root: DataRoot = None, set_: Set = None, json_: Json = False
) -> None:
    """Check that recipe, prompt, data and model fit together; trains nothing."""
    _quiet()
    experiment, source = _experiment(recipe, set_, data_root)
    from llm_emo.experiment import BaselineExperiment

    if isinstance(experiment, BaselineExperiment):
        from llm_emo.baselines import inspection as of_baselines

        result = of_baselines.fit(experiment, source)
    else:
        from llm_emo import inspection

        result = inspection.fit(experiment, source)
    if "test" in result["splits"]:
        _warn(experiment.protocol.size_warning("test", result["splits"]["test"]["rows"]))
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
    from llm_emo import inspection

    shown = inspection.examples(_llm(experiment, "show"), _split(split), count)
    _print({"examples": shown}, json_, "show_examples")


@app.command(
    epilog="Example: `llm-emo plan friends/chatglm2_lora --gpu-memory 24GiB`; for this machine, "
    "with one small step measured: `llm-emo plan mastodon/lora --measure`"
)
def plan(
    recipe: Recipe_,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Memory of a GPU elsewhere, such as 24GiB; without it, the plan is for "
                     "this machine.", show_default=False),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run one small step here and compare.")
    ] = False,
    texts: Annotated[
        int | None,
        typer.Option(min=1, help="Also say what labelling so many texts takes, such as 1000000.",
                     show_default=False),
    ] = None,
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Say what a recipe needs, before anything runs: memory, tokens, steps, time, disk.

    The model need not be there. The last line names the fastest way that fits.
    """
    _quiet()
    from llm_emo.sizes import parse_memory

    room = None if gpu_memory is None else parse_memory(gpu_memory)
    experiment, _ = _experiment(recipe, set_, data_root)
    from llm_emo.plan import plan as estimate

    _print(
        estimate(_llm(experiment, "plan"), gpu_memory=room, measure=measure, texts=texts),
        json_,
        "show_plan",
    )


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
    from llm_emo import opening, runs
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
        experiment = opening.from_run(run, [], data_root)
        runs.require_same_below(run, runs.runs_below(experiment.recipe))
    else:
        runs.require_free(folder)
        experiment, source = _experiment(recipe, set_, data_root)
        if experiment.recipe.method.kind == "zero_shot":
            raise RecipeError(
                f"{source}: method zero_shot trains nothing; see `llm-emo evaluate {recipe}`"
            )
    # The heavy half, only for input that fits.
    from llm_emo import workflow
    from llm_emo.machine import processes

    prepared = workflow.prepare(experiment)
    state = processes()
    if not resume:
        if state.is_main_process:
            runs.create(folder, source, set_ or [], experiment)
        state.wait_for_everyone()
    summary = workflow.train(prepared, runs.Run(folder), resume=resume)
    if state.is_main_process:
        _print({"run": str(folder), **summary}, json_, "show_training")


@app.command(
    epilog="Example: `llm-emo grid mastodon --data-root ~/corpora`; its file, to be copied and "
    "changed: recipes/grids/mastodon.yaml"
)
def grid(
    table: Annotated[
        list[str],
        typer.Argument(metavar="GRID...", help="Grid files, or shipped ones: mastodon friends."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the runs, one below it for each grid.")
    ] = Path("runs/grids"),
    seeds: Annotated[
        str | None,
        typer.Option(help="Only these seeds, such as 0,1.", show_default="the grid's"),
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(help="Only these folds, such as 0,1.", show_default="the grid's"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Measure these rows: train, dev or test.", show_default="the grid's"),
    ] = None,
    data_root: DataRoot = None,
    json_: Json = False,
) -> None:
    """Train and measure a table of recipes on the same rows, and print it.

    What is finished is not run again: interrupted, it continues where it stopped.
    """
    _quiet()
    from llm_emo import grid as grids
    from llm_emo.experiment import data_root as resolve

    loaded = [grids.load(name) for name in table]
    names = [name for name, _ in loaded]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RunError(
            f"{' '.join(table)}: two grids are called {twice}, and would share {output / twice}; "
            "rename one, or run them one by one with other folders (-o)"
        )
    numbers = {"seeds": _numbers("--seeds", seeds), "folds": _numbers("--folds", folds)}
    rows = None if split is None else _split(split)
    chosen = [(name, found.only(**numbers, split=rows)) for name, found in loaded]
    for name, found in chosen[1:]:  # each checks itself too, but only when it begins
        grids.check(found, output / name, resolve(data_root))
    made = [grids.run(found, output / name, resolve(data_root)) for name, found in chosen]
    _print({"grids": made}, json_, "show_grids")


@app.command(epilog="Example: `llm-emo predict runs/mastodon --split test --mode generate -o out`")
def predict(
    source: RunOrRecipe,
    split: SplitName = "test",
    mode: Mode = None,
    adapter: Adapter = None,
    output: Out = None,
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Write `<split>.predictions.jsonl`; interrupted, it continues where it stopped."""
    _quiet()
    path, _ = _predicted(source, split, mode, adapter, output, data_root, set_)
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
    mode: Mode = None,
    adapter: Adapter = None,
    output: Out = None,
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Report accuracy, F1 and the rest; predicts first what is not predicted yet.

    From a predictions file it needs neither model nor torch. With the corpus at hand the 95 %
    intervals resample whole dialogues; from the file alone they resample rows.
    """
    from llm_emo import predictions, protocols, runs

    groups = None
    if source.endswith(".jsonl"):
        if set_ or mode or output or adapter:
            raise RunError(
                "a predictions file is reported as it is; leave out --set, --mode, --adapter, -o"
            )
        path = Path(source)
        header, rows = predictions.read(path)
    else:
        _quiet()
        path, experiment = _predicted(source, split, mode, adapter, output, data_root, set_)
        header, rows = predictions.read(path)
        groups = experiment.clusters
        if not _first_process():
            return
    report = predictions.report(header, rows, groups)
    _warn(protocols.get(header.protocol).size_warning(header.split, report["n"]))
    # Not by replacing ".predictions": a file of another name would be overwritten by its report.
    name = path.name.removesuffix(".jsonl").removesuffix(".predictions")
    runs.write_json(path.with_name(f"{name}.report.json"), report)
    _print(report, json_, "show_report")


@app.command(
    epilog="Example: `llm-emo export runs/mastodon -o adapter`, "
    "`llm-emo export runs/mastodon -o model --format merged --merge-dtype bfloat16`"
)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    format_: Annotated[
        str | None,
        typer.Option("--format", show_default="peft",
                     help="peft (an adapter folder), merged (a whole model), or chatglm2 (an "
                     "adapter for programs that run ChatGLM2's original code). A specialised "
                     "model has one form of its own."),
    ] = None,
    merge_dtype: Annotated[
        str,
        typer.Option(help="With --format merged: auto (what the run computes in), float32, "
                     "bfloat16, or, rounded after merging and saying by how much, float16 or "
                     "nf4 (4 bits)."),
    ] = "auto",
    data_root: DataRoot = None,
    set_: Set = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Write the adapter for use elsewhere; stock PEFT and transformers read it."""
    _quiet()
    from llm_emo import opening, runs
    from llm_emo.experiment import BaselineExperiment

    _one_of("--format", format_ or "peft", ("peft", "merged", "chatglm2"))
    _one_of("--merge-dtype", merge_dtype, ("auto", "float32", "bfloat16", "float16", "nf4"))
    opened = runs.open_run(run)
    experiment = opening.from_run(opened, set_ or [], data_root)
    result: dict[str, Any]
    if isinstance(experiment, BaselineExperiment):
        if format_ or merge_dtype != "auto":
            raise RunError(f"--format, --merge-dtype: {run} is a specialised model; leave them out")
        from llm_emo.baselines import exported

        result = exported.export(experiment, opened, output)
    else:
        from llm_emo.export import export as write

        result = write(
            experiment, opened, output, cast("Any", format_ or "peft"), cast("Any", merge_dtype)
        )
    _print(result, json_, "show_path")


@app.command(
    epilog="Example: `llm-emo convert ~/chatglm2-6b -o models/chatglm2-6b`; back: "
    "`llm-emo convert models/chatglm2-6b -o original --to chatglm2`"
)
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT",
                       help="A ChatGLM2 checkpoint, or an adapter of it (LoRA, P-Tuning v2)."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    to: Annotated[
        str,
        typer.Option(help="native (transformers' own GLM layout) or chatglm2 (the original's)."),
    ] = "native",
    base: Annotated[
        Path | None,
        typer.Option(help="For an adapter: the folder of the checkpoint that it belongs to, where "
                     "that is not ChatGLM2-6B.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The tokenizer.model, where it does not lie in the checkpoint folder.",
                     show_default=False),
    ] = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Convert ChatGLM2 checkpoints and adapters, shard by shard and without remote code.

    The result opens with plain AutoModelForCausalLM and AutoTokenizer. The way back restores
    the original's names bit by bit.
    """
    _quiet()
    _one_of("--to", to, ("native", "chatglm2"))
    from llm_emo.convert import convert as run

    result = run(checkpoint, output, to=cast("Any", to), tokenizer=tokenizer, base=base)
    _print(result, json_, "show_path")


# --- what the verbs share -----------------------------------------------------------------------


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RunError(f"{option}: {value!r} is not known; {nearest(value, known)}")


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RunError(f"{option}: found {text!r}; expected numbers, such as 0,1") from None


def _warn(text: str | None) -> None:
    if text is not None:
        typer.echo(f"warning: {text}", err=True)


def _split(name: str) -> Split:
    _one_of("--split", name, SPLITS)
    return cast("Split", name)


def _experiment(
    recipe: str, overrides: list[str] | None, root: Path | None
) -> tuple["AnyExperiment", Path]:
    from llm_emo import opening

    return opening.from_recipe(recipe, overrides or [], root)


def _llm(experiment: "AnyExperiment", verb: str) -> "Experiment":
    from llm_emo.experiment import BaselineExperiment

    if isinstance(experiment, BaselineExperiment):
        raise RecipeError(
            f"`llm-emo {verb}` is about prompts and tokens, and method "
            f"{experiment.recipe.method.kind} has none; see `llm-emo check`"
        )
    return experiment


def _predicted(
    source: str,
    split: str,
    mode: str | None,
    adapter: Path | None,
    output: Path | None,
    root: Path | None,
    overrides: list[str] | None,
) -> tuple[Path, "AnyExperiment"]:
    from llm_emo import opening

    return opening.predicted(
        source, _split(split), mode=mode, adapter=adapter, output=output, root=root,
        overrides=overrides or [],
    )  # fmt: skip


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
