"""Label examples with a model: a recipe's own, adapted or not, and the predictions it leaves."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from llm_emo import inspection, methods, parsing, recipes, runs
from llm_emo.encoding import Encoder
from llm_emo.errors import RunError
from llm_emo.experiment import AnyExperiment, BaselineExperiment, Experiment
from llm_emo.fetch import sha256_of
from llm_emo.inference import Ids, generate, score
from llm_emo.journal import Journal
from llm_emo.machine import processes, say, settled
from llm_emo.models import auto
from llm_emo.predictions import Header, Mode, read
from llm_emo.trie import verify
from llm_emo.types import Completion, Example, Prediction, Row, Split


@dataclass(frozen=True)
class Labeller:
    """A model, adapted or not, with everything that turns examples into predictions."""

    experiment: Experiment
    base: auto.Base
    model: nn.Module
    encoder: Encoder

    @property
    def shown(self) -> str:
        """What is said before it begins."""
        return f"{self.base.name} in {self.base.dtype} on {self.base.model.device}"

    def require_room(self, rows: Sequence[Row]) -> None:
        """Raise PromptError where a row leaves no room for its answer."""
        for _ in self.encoder.stream(self.rendered(rows)):
            pass

    def label(self, rows: Sequence[Row]) -> Iterator[Prediction]:
        """Yield one prediction per row."""
        return self.predict(self.rendered(rows))

    def rendered(self, rows: Iterable[Row]) -> Iterator[Example]:
        """Render rows one at a time, as they are asked for."""
        for row in rows:
            yield from self.experiment.render([row])

    def predict(self, examples: Iterable[Example]) -> Iterator[Prediction]:
        """Yield one prediction per example, in the order in which they were computed.

        Examples are taken some thousands at a time, and kept no longer than until they are
        predicted.
        """
        inference = self.experiment.recipe.inference
        waiting: dict[int, Example] = {}

        def prompts() -> Iterator[Ids]:
            for index, (example, row) in enumerate(self.encoder.stream(examples)):
                waiting[index] = example
                yield row.prompt

        match inference.mode:
            case "score":
                for index, values in score(
                    self.model,
                    prompts(),
                    self.encoder.answers(self.experiment.answers),
                    tokens_per_pass=inference.tokens_per_pass,
                ):
                    yield self._scored(waiting.pop(index), values)
            case "generate":
                for index, ids in generate(
                    self.model,
                    prompts(),
                    ends=frozenset({self.encoder.end}),
                    max_new_tokens=inference.max_new_tokens,
                    tokens_per_pass=inference.tokens_per_pass,
                ):
                    example = waiting.pop(index)
                    yield self._parsed(example, Completion(example.uid, self.encoder.decode(ids)))

    def _scored(self, example: Example, log_probabilities: list[float]) -> Prediction:
        names = self.experiment.labels.names
        shares = torch.tensor(log_probabilities, dtype=torch.float64).softmax(0).tolist()
        best = max(range(len(names)), key=shares.__getitem__)
        return Prediction(
            uid=example.uid,
            gold=example.gold,
            label=names[best],
            outcome="scored",
            probabilities=dict(zip(names, shares, strict=True)),
        )

    def _parsed(self, example: Example, completion: Completion) -> Prediction:
        parsed = parsing.parse(
            completion.text, self.experiment.labels, self.experiment.prompt.answer
        )
        return Prediction(
            uid=example.uid,
            gold=example.gold,
            label=parsed.label,
            outcome=parsed.outcome,
            completion=completion.text,
        )

    def fingerprint(self) -> dict[str, str]:
        """Return what an adapter trained here belongs to."""
        experiment = self.experiment
        return {
            "base model": self.base.fingerprint(),
            "tokenizer": self.encoder.fingerprint()["tokenizer"],
            "chat template": self.encoder.fingerprint()["template"],
            "prompt": _sha256(experiment.prompt.verbatim),
            "label set": _sha256(json.dumps(experiment.labels_json(), sort_keys=True)),
        }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Foreign:
    """An adapter folder in PEFT's layout that no run of this program vouches for."""

    folder: Path


def open_labeller(experiment: Experiment, trained: runs.Run | Foreign | None = None) -> Labeller:
    """Load the recipe's model, wrapped by its method; with what was trained, its adapter too.

    A foreign adapter comes without a fingerprint, or with that of the run it was exported from,
    which is then held to.

    Raises:
        ModelError: the model cannot be used.
        AdapterError: the adapter belongs to another base, tokenizer, template or label set.
        RunError: the run has no adapter yet.
    """
    recipe = experiment.recipe
    processes()  # before any weight is placed: it chooses each process's device
    if isinstance(trained, runs.Run):
        trained.require_finished()
    set_seed(recipe.seed)
    base = auto.load(recipe.model, recipe.method)
    encoder = Encoder(base.tokenizer, recipe.prompt.max_length)
    inspection.remember(experiment, encoder)
    prefix_ids: Sequence[int] = ()
    match recipe.method:
        case recipes.PTuningV2(init_text=str(text)):
            prefix_ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    model = methods.adapt(base.model, recipe.method, prefix_ids=prefix_ids)
    verify(model)
    labeller = Labeller(experiment, base, model, encoder)
    match trained:
        case runs.Run():
            methods.check_fingerprint(trained.adapter, labeller.fingerprint())
            methods.load_adapter(model, trained.adapter)
        case Foreign(folder):
            if (folder / methods.FINGERPRINT).exists():
                methods.check_fingerprint(folder, labeller.fingerprint())
            else:
                say(
                    f"{folder}: no {methods.FINGERPRINT}; that it belongs to this base model and "
                    "prompt is taken on your word"
                )
            methods.load_adapter(model, folder)
    return labeller


class _Baseline:
    """A run of a specialised model, which labels rows."""

    def __init__(self, experiment: BaselineExperiment, run: runs.Run, split: Split) -> None:
        from llm_emo.baselines import opening

        self.experiment, self.split = experiment, split
        self.model = opening.load(experiment, run.adapter)
        network = getattr(self.model, "model", None)
        if isinstance(network, nn.Module):  # the floor has none
            network.to(processes().device)

    @property
    def shown(self) -> str:
        """What is said before it begins."""
        return str(self.experiment.recipe.method.kind)

    def require_room(self, rows: Sequence[Row]) -> None:
        """Accept all rows: what is too long is cut."""

    def label(self, rows: Sequence[Row]) -> Iterator[Prediction]:
        """Yield one prediction per row."""
        experiment, names = self.experiment, self.experiment.labels.names
        wanted = {row.utterance.uid: row.gold for row in rows}
        # A dialogue is read whole, also where only some of its turns are asked for.
        whole = experiment.recipe.method.reads_dialogues
        read = experiment.rows(self.split) if whole else rows
        for uid, shares in self.model.probabilities(read, self.split) if wanted else ():
            if uid in wanted:
                best = max(range(len(names)), key=shares.__getitem__)
                yield Prediction(
                    uid=uid,
                    gold=wanted[uid],
                    label=names[best],
                    outcome="scored",
                    probabilities=dict(zip(names, shares, strict=True)),
                )


Labelling = Labeller | _Baseline
"""What `predict` asks: `shown`, `require_room`, `label`."""


def predict(
    experiment: AnyExperiment, trained: runs.Run | Foreign | None, split: Split, folder: Path
) -> Path:
    """Predict a split into `folder`, continuing what an earlier job left; return the file.

    What is predicted already needs no model. Every process of an `accelerate launch` calls this
    and takes a share of the rows; the first one writes.

    Raises:
        RunError: the file is there already, made under something else.
    """
    split_rows = experiment.rows(split)
    uids = [row.utterance.uid for row in split_rows]
    path = runs.predictions_path(folder, split)
    if isinstance(trained, runs.Run):
        trained.require_finished()
    expected = header(experiment, trained, split)
    if path.exists():
        found, rows = read(path)
        # Finished predictions stay what they are when a package is upgraded.
        found = found.model_copy(update={"versions": expected.versions})
        if found != expected or {row.uid for row in rows} != set(uids):
            differing = [
                name
                for name in Header.model_fields
                if getattr(found, name) != getattr(expected, name)
            ]
            raise RunError(
                f"{path}: made under another {', '.join(differing) or 'set of rows'}; move it "
                "away, or choose another folder with -o"
            )
        return path
    labeller: Labelling
    if isinstance(experiment, Experiment):
        labeller = open_labeller(experiment, trained)
    else:
        assert isinstance(trained, runs.Run)
        labeller = _Baseline(experiment, trained, split)
    state = processes()
    say(labeller.shown)
    with contextlib.ExitStack() as stack:
        journal, done = None, [set[str]()]
        if state.is_main_process:
            journal = stack.enter_context(Journal(path, expected))
            if journal.note:
                say(journal.note)
            done = [journal.done]
        if state.num_processes > 1:
            broadcast_object_list(done)
        left = [row for row in split_rows if row.utterance.uid not in done[0]]
        if state.num_processes > 1:
            # A row without room for its answer ends every process, also that which prints.
            labeller.require_room(left)
        bar = stack.enter_context(
            tqdm(
                total=len(uids), initial=len(done[0]), desc=split, unit="row",
                disable=not state.is_main_process,
            )
        )  # fmt: skip
        stack.enter_context(settled())  # rows come and go by the thousand
        for predictions in _shared(labeller, left, state):
            if journal is not None:
                for prediction in predictions:
                    journal.append(prediction)
                journal.flush()
            bar.update(len(predictions))
        if journal is not None:
            journal.finish(uids)
    state.wait_for_everyone()
    return path


ROWS_PER_FLUSH = 64
"""Rows that a process predicts before they are put on disk."""


def _shared(
    labeller: Labelling, rows: Sequence[Row], state: PartialState
) -> Iterator[list[Prediction]]:
    """Yield the predictions of all processes' shares, some at a time.

    A share is a stretch of the split, whose turns have their history in common. All processes
    gather equally often, also those whose share is short or empty.
    """
    world, rank = state.num_processes, state.process_index
    cuts = [len(rows) * i // world for i in range(world + 1)]
    longest = max(end - start for start, end in itertools.pairwise(cuts))
    own = labeller.label(rows[cuts[rank] : cuts[rank + 1]])
    for _ in range(-(-longest // ROWS_PER_FLUSH)):
        chunk = list(itertools.islice(own, ROWS_PER_FLUSH))
        yield gather_object(chunk) if world > 1 else chunk


def header(experiment: AnyExperiment, trained: runs.Run | Foreign | None, split: Split) -> Header:
    """Return what predictions of this split by this run, adapter or bare model are made under."""
    model: str
    mode: Mode
    if isinstance(experiment, BaselineExperiment):
        assert isinstance(trained, runs.Run)
        model, revision, mode, prompt = experiment.recipe.method.kind, None, "classify", None
        adapter: str | None = runs.folder_sum(trained.adapter)
    else:
        own, text = experiment.recipe, experiment.prompt
        model, revision, mode = own.model.name, own.model.revision, own.inference.mode
        prompt = f"{text.name}@{_sha256(text.verbatim)[:12]}"
        adapter = None if trained is None else _adapter_sum(trained)
    return Header(
        protocol=experiment.protocol.name,
        dataset=experiment.protocol.dataset,
        split=split,
        labels=experiment.labels.names,
        files=experiment.files,
        run=trained.id if isinstance(trained, runs.Run) else None,
        model=model,
        revision=revision,
        adapter=adapter,
        versions=runs.versions(),
        mode=mode,
        prompt=prompt,
        settings=_settings(experiment.recipe),
    )


def _adapter_sum(trained: runs.Run | Foreign) -> str:
    folder = trained.adapter if isinstance(trained, runs.Run) else trained.folder
    whole = folder / "model.safetensors"  # of full training
    return sha256_of(whole if whole.is_file() else methods.weights_of(folder))


def _settings(recipe: recipes.AnyRecipe) -> str:
    """Hash what of the recipe can change a prediction, training apart: that is the adapter's.

    `dtype: auto` counts as what this machine makes of it.
    """
    content = recipe.model_dump(mode="json", exclude={"train": True})
    if isinstance(recipe, recipes.BaselineRecipe):
        return _sha256(json.dumps(content, sort_keys=True))[:12]
    content["model"]["dtype"] = str(auto.dtype_of(recipe.model, recipe.method))
    del content["inference"]["tokens_per_pass"]
    if recipe.inference.mode == "score":
        del content["inference"]["max_new_tokens"]
    return _sha256(json.dumps(content, sort_keys=True))[:12]
