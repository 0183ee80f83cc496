"""What calibrations share: text in, statistics sequence by sequence, an artefact out; a killed run resumes.

A method is a `Calibrator`. It looks at the dense model, adds up statistics that are small beside the activations, and
in the end turns them into a `SparseConfig`. What it measured is kept in the artefact, so that another target is solved
without another look at the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.adapters import ModelShape, adapter_for
from sparse_hf.artefact import CONFIG_FILE, read_tensors, refuse_weights, replace_folder, weight_probe, write_artefact
from sparse_hf.calibrate.plots import plot_maps
from sparse_hf.calibrate.probe import LayerCall, observed
from sparse_hf.config import SparseConfig, read_mapping
from sparse_hf.figures import Figure, figure_rows, replace_json
from sparse_hf.head_masks import check_head_masks
from sparse_hf.plots import has_matplotlib
from sparse_hf_kernels import UNBOUNDED

REPORT_FILE = "calibration.json"
STATISTICS_FILE = "calibration.safetensors"
PLOT_FILE = "calibration.png"
_DONE = "done"

Progress = Callable[[str], None]
"""Called after each sequence with the latest figures."""


def option(default: Any, about: str, *, solves: bool = False) -> Any:
    """A field of a calibrator's options.

    Args:
        default: its value unless the user gives one.
        about: one line for `--help`.
        solves: it is read by `finish` alone, so that a resumed run may change it. Statistics depend on the others.
    """
    return field(default=default, metadata={"help": about, "solves": solves})


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model and the text that are calibrated on.

    Args:
        shape: the model's attention shape.
        windows: each layer's own sliding window, UNBOUNDED without one.
        seq_len: tokens per sequence.
    """

    shape: ModelShape
    windows: tuple[int, ...]
    seq_len: int

    @classmethod
    def of(cls, model: PreTrainedModel, seq_len: int) -> Target:
        """Raises ValueError if the model's family is not supported."""
        adapter = adapter_for(model)
        shape = adapter.shape(model.config)
        windows = tuple(adapter.native_window(model.config, layer) for layer in range(shape.num_layers))
        return cls(shape=shape, windows=windows, seq_len=seq_len)

    @property
    def free_layers(self) -> tuple[int, ...]:
        """The layers without a sliding window of the model's own: dynamic methods serve these alone."""
        return tuple(layer for layer, window in enumerate(self.windows) if window == UNBOUNDED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a calibration found.

    Args:
        config: the configuration; its `head_masks` are replaced by the file's.
        head_masks: `[num_layers, num_kv_heads]` of 0 and 1.
        scores: fp32 of the same shape, or None.
        figures: what was reached, for the card and the summary.
        report: JSON-plain details for `calibration.json`.
        maps: title -> values `[num_layers, heads]`, drawn as heat maps where matplotlib is installed.
    """

    config: SparseConfig
    head_masks: Tensor
    figures: Sequence[Figure]
    scores: Tensor | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    maps: Mapping[str, Tensor] = field(default_factory=dict)


class Calibrator(ABC):
    """One method's calibration.

    Args:
        options: an instance of `Options`.
        target: model and length that it is for.
        seed: of whatever is drawn; draws depend on it and the sequence's number alone (`generator`).

    Raises:
        ValueError: if the options do not fit the target.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type]
    """A frozen, keyword-only dataclass whose fields are made by `option`; the command line shows them."""
    num_passes: int = 1
    """Times that all sequences are read; more for a search that narrows."""

    def __init__(self, options: Any, target: Target, seed: int = 0) -> None:
        self.options, self.target, self.seed = options, target, seed
        self.sequence = 0

    def begin_pass(self, number: int) -> None:  # noqa: B027 (most have one pass)
        """Called before the first sequence of each pass. What it sets must be in `state`."""

    def run(self, model: PreTrainedModel, ids: Tensor, sequence: int) -> str:
        """Looks at one sequence, int64 ids `[1, seq_len]` on the model's device; by default a forward pass without
        gradients or logits that shows each layer to `observe`. Returns a few figures for the progress bar.
        """
        self.sequence = sequence
        with torch.inference_mode(), observed(model, self.observe):
            model.base_model(input_ids=ids, use_cache=False)
        return ""

    def observe(self, call: LayerCall) -> Tensor | None:
        """Adds one layer's statistics; what it returns, if anything, goes on in place of the layer's output."""
        raise NotImplementedError(f"{type(self).__name__} must define observe or run")

    def generator(self, *more: int) -> torch.Generator:
        """Random numbers on the CPU that depend on the seed, the present sequence and `more` alone."""
        text = ":".join(map(str, (self.seed, self.sequence, *more)))
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All statistics so far: contiguous CPU tensors that share no memory."""

    @abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from what `state` gave."""

    @abstractmethod
    def finish(self) -> Outcome:
        """Solves for the options' target; the statistics stay as they are.

        Raises:
            ValueError: if the target cannot be reached, saying what can.
        """


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A finished calibration: what was found, and the figures as rows for tables and JSON."""

    outcome: Outcome
    folder: Path
    figures: list[dict[str, Any]]


def calibrate(
    model: PreTrainedModel,
    sequences: Tensor,
    calibrator: Calibrator,
    out: str | Path,
    *,
    data: str = "",
    resume: bool = False,
    overwrite: bool = False,
    base_model_name_or_path: str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Calibration:
    """Runs a calibration and writes its artefact.

    Args:
        model: a dense model of a supported family, in evaluation mode from here on.
        sequences: int64 ids `[num_sequences, seq_len]`.
        calibrator: of the same model and length.
        out: the folder. Statistics are written there after each sequence; the artefact takes its place at the end.
        data: where the sequences come from, for the card.
        resume: go on with the statistics in `out`. Options that only `finish` reads may differ.
        overwrite: replace what is in `out`, an artefact or a calibration that was begun.
        base_model_name_or_path: by default where the model was loaded from.
        command: the command line, for the figures.
        progress: called after each sequence.

    Raises:
        ValueError: if `out` holds something and neither `resume` nor `overwrite` is given, or it was begun with other
            settings, or the target cannot be reached.
    """
    out, base = Path(out), base_model_name_or_path or model.config._name_or_path
    if not base:
        raise ValueError("the model does not know where it was loaded from; pass base_model_name_or_path")
    model.eval()
    settings = _settings(model, sequences, calibrator)
    total = calibrator.num_passes * len(sequences)
    done = _begin(out, settings, calibrator, resume=resume, overwrite=overwrite)
    for step in range(done, total):
        number, sequence = divmod(step, len(sequences))
        if sequence == 0:
            calibrator.begin_pass(number)
        text = calibrator.run(model, sequences[sequence][None].to(model.device), sequence)
        _save(out / STATISTICS_FILE, calibrator.state(), step + 1)
        if progress is not None:
            progress(text)
    outcome = calibrator.finish()
    rows = figure_rows(outcome.figures, command=command)
    _write(out, model, base, calibrator, outcome, settings, rows, data)
    return Calibration(outcome=outcome, folder=out, figures=rows)


def steps_done(out: str | Path) -> int:
    """Sequences (times passes) that a calibration in this folder has behind it."""
    file = Path(out) / STATISTICS_FILE
    if not file.is_file():
        return 0
    read_tensors(file)  # says what is wrong with a broken file
    with safe_open(file, framework="pt") as opened:
        return int((opened.metadata() or {}).get(_DONE, 0))


def _settings(model: PreTrainedModel, sequences: Tensor, calibrator: Calibrator) -> dict[str, Any]:
    """What the statistics depend on, JSON-plain."""
    probe = weight_probe(model)
    measured = {
        entry.name: getattr(calibrator.options, entry.name)
        for entry in dataclasses.fields(calibrator.options)
        if not entry.metadata.get("solves")
    }
    settings = {
        "method": calibrator.name,
        "seed": calibrator.seed,
        "base_model": calibrator.target.shape.to_dict(),
        "weights": None if probe is None else _digest(probe),
        "num_sequences": len(sequences),
        "seq_len": sequences.shape[1],
        "tokens": _digest(sequences),
        **measured,
    }
    return json.loads(json.dumps(settings))


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def check_folder(out: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ValueError if a calibration may not be written there."""
    out = Path(out)
    if resume and overwrite:
        raise ValueError("give --resume or --overwrite, not both")
    if not out.exists():
        return
    begun = (out / REPORT_FILE).is_file()
    if resume and not begun and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds no calibration to resume ({REPORT_FILE} is missing); choose another folder")
    if not resume and not overwrite:
        raise ValueError(f"{out} exists already; --resume goes on with it, --overwrite replaces it")
    known = begun or (out / CONFIG_FILE).is_file()
    if overwrite and (not out.is_dir() or (not known and any(out.iterdir()))):
        raise ValueError(f"{out} holds something else than a calibration; it is not overwritten")
    if overwrite:
        refuse_weights(out)  # now, not after hours of measuring


def _begin(out: Path, settings: dict[str, Any], calibrator: Calibrator, *, resume: bool, overwrite: bool) -> int:
    """Prepares the folder; returns the number of steps that were done before, whose statistics are then loaded."""
    check_folder(out, resume=resume, overwrite=overwrite)
    if resume and (out / REPORT_FILE).is_file():
        before = read_mapping(out / REPORT_FILE).get("settings", {})
        if differ := sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key)):
            pairs = ", ".join(f"{key} {before.get(key)!r} != {settings.get(key)!r}" for key in differ)
            raise ValueError(f"{out} was begun with other settings ({pairs}); give the same, or --overwrite")
    else:
        (out / STATISTICS_FILE).unlink(missing_ok=True)
        replace_json(out / REPORT_FILE, {"settings": settings})
    done = steps_done(out)
    if done:
        calibrator.load_state(read_tensors(out / STATISTICS_FILE))
    return done


def _save(path: Path, tensors: Mapping[str, Tensor], done: int) -> None:
    """Under a temporary name first: whoever is killed here leaves the statistics of the sequence before."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(dict(tensors), temporary, metadata={"format": "pt", _DONE: str(done)})
    os.replace(temporary, path)


def _write(
    out: Path,
    model: PreTrainedModel,
    base: str,
    calibrator: Calibrator,
    outcome: Outcome,
    settings: dict[str, Any],
    figures: list[dict[str, Any]],
    data: str,
) -> None:
    """The artefact with statistics, report and plot takes the place of the folder."""
    target = calibrator.target
    options = json.loads(json.dumps(dataclasses.asdict(calibrator.options)))
    total = calibrator.num_passes * settings["num_sequences"]

    def write_more(folder: Path) -> None:
        _save(folder / STATISTICS_FILE, calibrator.state(), total)
        report = {"settings": settings, "options": options, "figures": figures, "report": dict(outcome.report)}
        replace_json(folder / REPORT_FILE, report)
        if outcome.maps and has_matplotlib():
            plot_maps(outcome.maps, folder / PLOT_FILE)

    training = {
        "stage": f"calibration of {calibrator.name}",
        "data": f"{settings['num_sequences']} sequences of {settings['seq_len']} tokens" + (f" of {data}" * bool(data)),
        **{name: value for name, value in options.items() if value is not None},
        "figures": [{"case": row["case"], "value": row["value"], "unit": row["unit"]} for row in figures],
    }
    # Statistics lie in the folder: it is known by them, and not yet by an artefact's configuration.
    with replace_folder(out, overwrite=True, marker=REPORT_FILE) as staging:
        write_artefact(
            staging,
            config=outcome.config,
            head_masks=check_head_masks(outcome.head_masks, target.shape),
            shape=target.shape,
            base_model_name_or_path=base,
            scores=outcome.scores,
            probe=weight_probe(model),
            training=training,
            native_windows=target.windows,
            write_more=write_more,
            overwrite=True,
        )
