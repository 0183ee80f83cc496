"""What `sparse-hf eval` does: target to model, text to samples, cells to a report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf.artefact import load_artefact
from sparse_hf.auto import AutoSparseModelForCausalLM
from sparse_hf.cli.output import RUN_ARTEFACT, find_artefact
from sparse_hf.figures import write_figures
from sparse_hf.hub import resolve_artefact_folder
from sparse_hf.patching import get_handle
from sparse_hf.progress import progress_bar
from sparse_hf.sparsify import sparsify
from sparse_hf_training.build import filler_of, read_sources
from sparse_hf_training.config import build_tasks
from sparse_hf_training.data import PackedTextDataset, TextSource, pack_documents
from sparse_hf_training.demo.recipe import ASSETS
from sparse_hf_training.evaluation.cells import CellStore
from sparse_hf_training.evaluation.lab import DENSE, Lab, check_length
from sparse_hf_training.evaluation.report import LabReport, folder_beside
from sparse_hf_training.tasks import Filler, RecallTask, available_tasks, make_task

FIGURES_FILE = "figures.json"
HELD_TEXT = ASSETS / "text" / "validation"
QUICK_TASKS = ("needle", "key_value", "chain", "two_turns")
HOPS = tuple({"task": "vt", "num_hops": hops} for hops in (2, 4, 8))
SPARSE = "sparse"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `sparse-hf eval`, as its help says."""

    target: str
    text: str | None = None
    model: str | None = None
    seq_len: int = 2048
    tasks: str | None = None
    num_samples: int = 200
    num_rows: int = 32
    seed: int = 1234
    batch_size: int = 8
    chunk: int | None = None
    quick: bool = False
    min_dense: float = 0.5
    strict_length: bool = False
    dtype: str = "auto"
    revision: str | None = None
    name: str | None = None
    out: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")

    @property
    def command(self) -> str:
        """The line that repeats it; where files lie on this machine is nobody's business."""
        words = ["sparse-hf eval", _short(self.target), f"--seq-len {self.seq_len}", f"--seed {self.seed}"]
        words += [f"--num-samples {self.num_samples}", f"--num-rows {self.num_rows}"]
        words += [f"--text {_short(self.text)}"] if self.text else []
        words += [f"--model {_short(self.model)}"] if self.model else []
        words += [f"--tasks {self.tasks}"] if self.tasks else ["--quick"] * self.quick
        return " ".join(words)

    @property
    def folder(self) -> Path:
        """Where the cells lie: in a run's folder, beside an artefact's, or under `runs/`."""
        if self.out is not None:
            return self.out
        target = Path(self.target)
        if (target / RUN_ARTEFACT).is_dir():
            return target / "evaluation"
        if target.is_dir():
            return folder_beside(target)
        return Path("runs") / "evaluation" / self.target.replace("/", "--")


def default_tasks() -> tuple[str | dict[str, Any], ...]:
    """Every task, variable tracking with 2, 4 and 8 hops."""
    return (*(name for name in available_tasks() if name != "vt"), *HOPS)


def fitting_tasks(
    specs: Sequence[str | dict[str, Any]],
    filler: Filler,
    tokenizer: PreTrainedTokenizerBase,
    options: EvaluationOptions,
) -> tuple[list[RecallTask], list[str]]:
    """The tasks that the length and the text have room for, and why the others have none."""
    fitting: list[RecallTask] = []
    left_out: list[str] = []
    for task in build_tasks(specs):
        try:
            task.sample(random.Random(options.seed), filler, tokenizer, options.seq_len)
            fitting.append(task)
        except ValueError as error:
            left_out.append(str(error))
    return fitting, left_out


def task_rows() -> list[dict[str, Any]]:
    """The tasks and what they ask."""
    return [{"task": name, "asks": make_task(name).summary} for name in available_tasks()]


def parse_tasks(text: str) -> list[RecallTask]:
    """Tasks from `name,name:option=value:option=value`.

    Raises:
        ValueError: for an unknown task or option, or a value that is no number.
    """
    specs: list[dict[str, Any]] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, *options = word.split(":")
        spec: dict[str, Any] = {"task": name}
        for option in options:
            key, _, value = option.partition("=")
            try:
                spec[key] = float(value) if "." in value else int(value)
            except ValueError:
                raise ValueError(f"--tasks: {word!r}: expected option=NUMBER, got {option!r}") from None
        specs.append(spec)
    return build_tasks(specs)


def evaluate_target(options: EvaluationOptions, console: Console) -> tuple[LabReport, Path]:
    """Measures dense and sparse, writes the report, and returns it with its folder.

    Raises:
        ValueError: for a target, text or option that cannot be used, or a folder with cells of other settings.
    """
    asked = None if options.tasks is None else parse_tasks(options.tasks)
    model, base, tokenizer_name = _load(options)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    check_length(model, options.seq_len, strict=options.strict_length)
    documents = read_sources((TextSource(path=options.text or str(HELD_TEXT)),), tokenizer)
    filler = filler_of(documents)
    if asked is None:
        asked, left_out = fitting_tasks(QUICK_TASKS if options.quick else default_tasks(), filler, tokenizer, options)
        for line in left_out:
            console.print(f"left out: {line}", highlight=False, markup=False)
    lab = Lab(
        tokenizer=tokenizer,
        tasks=asked,
        filler=filler,
        rows=PackedTextDataset(pack_documents(documents, options.seq_len)[0]),
        seq_len=options.seq_len,
        num_samples=options.num_samples,
        num_rows=options.num_rows,
        seed=options.seed,
        batch_size=options.batch_size,
        chunk=options.chunk,
    )
    handle = get_handle(model)
    variant = {"config": handle.resolved.to_dict(), "head_masks": handle.head_masks.tolist()}
    store = CellStore(options.folder, {**lab.settings(model), **variant}, overwrite=options.overwrite)
    with progress_bar(console) as progress:
        bar = progress.add_task("measuring", total=2 * lab.steps, figures="")

        def step(what: str, done: int, name: str) -> None:
            progress.update(bar, advance=done, figures=f"{name}: {what}")

        dense = lab.measure(model, DENSE, store, lambda what, done: step(what, done, DENSE))
        sparse = lab.measure(model, SPARSE, store, lambda what, done: step(what, done, SPARSE))
    report = LabReport(
        name=options.name or _short(options.target),
        about=about(model, base),
        settings=store.settings,
        dense=dense,
        sparse=sparse,
        min_dense=options.min_dense,
    )
    report.save(options.folder)
    write_figures(options.folder / FIGURES_FILE, report.figures(), command=options.command)
    return report, options.folder


def about(model: PreTrainedModel, base: str) -> dict[str, Any]:
    """What was measured, for people."""
    handle = get_handle(model)
    masks = handle.head_masks
    names = sorted({method.name for row in handle.methods for method in row})
    num_sparse = int((masks == 0).sum())
    return {
        "base_model": _short(base),
        "sparsity": f"{num_sparse} of {masks.numel()} KV heads sparse ({num_sparse / masks.numel():.1%})",
        "methods": names,
    }


def _load(options: EvaluationOptions) -> tuple[PreTrainedModel, str, str]:
    """The sparse model, its base model's name, and where its tokenizer is."""
    on_gpu = torch.cuda.is_available()
    name = ("bfloat16" if on_gpu else "float32") if options.dtype == "auto" else options.dtype
    dtype: torch.dtype = getattr(torch, name)
    artefact = _artefact(options)
    if options.model is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"model {options.model!r} cannot be loaded: {reason}") from error
        return sparsify(model, artefact, revision=options.revision), options.model, options.model
    # Says what is wrong before weights are loaded.
    folder = resolve_artefact_folder(artefact, revision=options.revision)
    base = load_artefact(folder).base_model_name_or_path
    sparse = AutoSparseModelForCausalLM.from_pretrained(artefact, revision=options.revision, dtype=dtype)
    own = (Path(folder) / "tokenizer_config.json").is_file()
    return sparse, base, str(folder) if own else base


def _artefact(options: EvaluationOptions) -> str:
    # A Hub id stays one: its repository may hold weights, which are looked for where the model is loaded.
    if Path(options.target).is_dir() and options.revision is None:
        return str(find_artefact(options.target))
    return options.target


def _short(place: str | None) -> str:
    """A folder's or file's last part, a Hub id as it is."""
    text = place or ""
    return Path(text).name if Path(text).exists() or text.startswith(("/", ".")) else text
