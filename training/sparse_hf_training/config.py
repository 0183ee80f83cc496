"""What one training run is: typed, validated, written beside its results."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparse_hf.config import SparseConfig, read_mapping
from sparse_hf_training.compile_layers import CompileConfig
from sparse_hf_training.data import LongDocuments, Packing, TextSource
from sparse_hf_training.elimination import EliminationConfig
from sparse_hf_training.layer_selection import LayerSelectionConfig
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.objectives import ObjectiveConfig
from sparse_hf_training.observe.config import ObserveConfig
from sparse_hf_training.peft import LoraConfig, Quantization, check_peft_settings
from sparse_hf_training.stages import UNTRAINED_STAGES, Stage
from sparse_hf_training.tasks import RecallTask, make_task
from sparse_hf_training.typed_config import apply_overrides, build, convert


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Recall samples in the training mix.

    Args:
        ratio: their share of the rows.
        tasks: names, or mappings with `task` and its parameters.
        question_loss: take the loss on question and answer; off: on answers alone.
    """

    ratio: float = 0.5
    tasks: tuple[str | dict[str, Any], ...] = ("needle", "key_value", "chain")
    question_loss: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"data.recall.ratio must lie in [0, 1], got {self.ratio}")
        _ = self.built

    @property
    def built(self) -> list[RecallTask]:
        return build_tasks(self.tasks)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training rows.

    Args:
        text: sources, also the filler of recall samples. Without ratios they are read in turn and packed together; with
            ratios each is packed by itself and gives its share of the text's tokens.
        seq_len: tokens per row; the largest where lengths are scheduled.
        recall: the built-in recall tasks, or null for text alone.
        seed: of the mixture, the order and the samples.
        packing: `in_order` joins documents and cuts every `seq_len` tokens; `best_fit` cuts none that fits a row.
        long_documents: what becomes of documents longer than a row: `split`, `truncate`, `drop` or `refuse`.
        length_schedule: pairs of optimizer step and tokens per row from there on, such as [[0, 2048], [200, 8192]].
        max_epochs: refuse a run that reads a source more often; null repeats as often as the run needs.
        num_proc: processes that tokenise.
    """

    text: tuple[TextSource, ...]
    seq_len: int = 2048
    recall: RecallConfig | None = field(default_factory=RecallConfig)
    seed: int = 0
    packing: Packing = "in_order"
    long_documents: LongDocuments = "split"
    length_schedule: tuple[tuple[int, ...], ...] = ()
    max_epochs: int | None = None
    num_proc: int | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("data.text must name at least one source")
        if self.seq_len <= 1:
            raise ValueError(f"data.seq_len must be at least 2, got {self.seq_len}")
        for name in ("max_epochs", "num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be null or at least 1, got {value}")
        given = [source.ratio is not None for source in self.text]
        if any(given) and not all(given):
            raise ValueError("data.text: either all sources have a ratio or none")
        if len(self.text) > 1 and not any(given) and any(source.streaming for source in self.text):
            raise ValueError("data.text: a streamed source beside others needs ratios; give each source its ratio")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if not self.length_schedule:
            return
        if any(len(entry) != 2 for entry in self.length_schedule):
            raise ValueError(f"data.length_schedule must hold pairs [step, seq_len], got {self.length_schedule}")
        steps, lengths = zip(*self.length_schedule, strict=True)
        if steps[0] != 0 or sorted(set(steps)) != list(steps):
            raise ValueError(f"data.length_schedule must begin at step 0 and ascend, got the steps {list(steps)}")
        if min(lengths) < 2 or max(lengths) != self.seq_len:
            raise ValueError(
                f"data.length_schedule must hold lengths from 2 to data.seq_len={self.seq_len}, the largest one, "
                f"got {list(lengths)}"
            )

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """First optimizer step and tokens per row of each phase of the curriculum."""
        return tuple((step, length) for step, length in self.length_schedule) or ((0, self.seq_len),)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How masks are judged.

    Args:
        text: held-out text; without it neither loss nor recall is judged.
        seq_len: tokens per sample and row.
        num_samples: recall samples per task.
        num_rows: text rows for the loss.
        tasks: as in `data.recall`.
        seed: of the samples.
    """

    text: TextSource | None = None
    seq_len: int = 2048
    num_samples: int = 20
    num_rows: int = 16
    tasks: tuple[str | dict[str, Any], ...] = ("needle", "key_value", "chain")
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.seq_len <= 1:
            raise ValueError(f"evaluation.seq_len must be at least 2, got {self.seq_len}")
        for name in ("num_samples", "num_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} must be positive, got {getattr(self, name)}")
        names = [task.name for task in self.built]
        if len(set(names)) < len(names):  # of two figures of one name the last would stay
            raise ValueError(
                f"evaluation.tasks must be different tasks, got {names}; sparse-hf eval takes several of one"
            )

    @property
    def built(self) -> list[RecallTask]:
        return build_tasks(self.tasks)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run.

    Args:
        model: folder or Hub id of the base model.
        output_dir: checkpoints, artefact and figures go here.
        data: training rows.
        stage: `layer_selection`, `head_elimination`, `masks`, `masks_and_weights` or `sft`.
        sparse: preset, artefact (folder or Hub id), file, or the keys of a `SparseConfig`.
        dtype: of the weights.
        lora: an adapter that trains in the weights' place, or null.
        quantization: `nf4` holds the linear layers in 4 bits (QLoRA), or null.
        compile: true, or how, compiles each layer while it trains.
        activation_offload: keep checkpointed activations in CPU memory; needs trainer.gradient_checkpointing.
        seq_parallel_size: processes that share each row (Ulysses); must divide their number and the query heads.
        masks: how masks are learned.
        layer_selection: how the stage of this name selects layers.
        head_elimination: how the stage of this name takes heads away.
        objective: terms of the loss.
        evaluation: how masks are judged.
        observe: what the run tells about itself.
        num_processes: processes that the run must get, so that a launcher that starts fewer is noticed; null for any.
        trainer: arguments of `transformers.TrainingArguments`.
        resume: go on from the newest complete checkpoint in `output_dir`.
    """

    model: str
    output_dir: str
    data: DataConfig
    stage: Stage = "masks"
    sparse: str | dict[str, Any] = "prulong"
    dtype: str = "float32"
    lora: LoraConfig | None = None
    quantization: Quantization | None = None
    compile: bool | CompileConfig = False
    activation_offload: bool = False
    seq_parallel_size: int = 1
    masks: MaskLearningConfig = field(default_factory=MaskLearningConfig)
    layer_selection: LayerSelectionConfig = field(default_factory=LayerSelectionConfig)
    head_elimination: EliminationConfig = field(default_factory=EliminationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    num_processes: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    resume: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.seq_parallel_size < 1:
            raise ValueError(f"seq_parallel_size must be at least 1, got {self.seq_parallel_size}")
        check_peft_settings(self.stage, self.lora, self.quantization)
        if self.stage == "head_elimination":
            self._check_head_elimination()
        if self.compile and self.seq_parallel_size > 1:
            raise ValueError("compile: layers that share rows are not compiled; set seq_parallel_size=1")
        if self.activation_offload and not self.trainer.get("gradient_checkpointing"):
            raise ValueError("activation_offload needs trainer.gradient_checkpointing=true")
        if isinstance(self.sparse, dict):
            SparseConfig.from_dict(self.sparse)
        object.__setattr__(self, "trainer", checked_trainer_arguments(self.trainer, self.stage not in UNTRAINED_STAGES))
        workers = self.trainer.get("dataloader_num_workers", 0)
        if workers > 1 and any(source.streaming for source in self.data.text):
            raise ValueError(
                f"each of trainer.dataloader_num_workers={workers} would read all of a streamed source; set 0 or 1"
            )

    def _check_head_elimination(self) -> None:
        if self.data.recall is None or not self.data.recall.ratio or not self.data.recall.tasks:
            raise ValueError(
                "head_elimination judges heads by the answers of recall tasks, but data.recall has none; name tasks, "
                "such as data.recall.tasks=[needle,key_value,chain]"
            )
        if self.seq_parallel_size > 1 or self.compile:
            raise ValueError(
                "head_elimination runs whole rows, and layers as they are; leave seq_parallel_size and compile out"
            )

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """From a YAML file, with `key=value` or `section.key=value` overrides.

        Raises:
            ValueError: for a file that cannot be read, or any key or value that is not understood.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no such file: {path}")
        return build(cls, apply_overrides(read_mapping(path), overrides), path.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the YAML file."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def save(self, path: Path) -> None:
        """Writes YAML that `load` reads back."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


RESERVED = (
    "output_dir",
    "remove_unused_columns",
    "prediction_loss_only",
    "disable_tqdm",
    "dataloader_drop_last",
    "resume_from_checkpoint",  # `resume`
    "load_best_model_at_end",  # knows nothing of gates
    "save_only_model",  # a run that goes on would begin its optimizer anew
    "ignore_data_skip",  # and would see its first rows again
    "train_sampling_strategy",  # rows have the order of `data`, with `data.seed`
    "data_seed",
)

COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_steps")


def checked_trainer_arguments(arguments: dict[str, Any], trains: bool = True) -> dict[str, Any]:
    """The arguments, with numbers that YAML reads as text (1e-3) as numbers, and strategies that it reads as false: no.

    Raises:
        ValueError: for keys that `TrainingArguments` does not know or that the run sets itself, text for a number or a
            boolean, a count that is not positive, or without `max_steps` where something `trains`.
    """
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - set(RESERVED)
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"trainer: {unknown} are no arguments of transformers.TrainingArguments, or set by the run")
    arguments = {
        name: "no" if value is False and name.endswith("_strategy") else value for name, value in arguments.items()
    }
    hints = typing.get_type_hints(TrainingArguments)
    numbers = {name for name in arguments if hints[name] in (int, float, int | None, float | None)}
    # Any text is true: bf16: "false" would be on.
    typed = numbers | {name for name in arguments if hints[name] in (bool, bool | None)}
    checked = {
        name: convert(hints[name], value, f"trainer.{name}") if name in typed else value
        for name, value in arguments.items()
    }
    # Counts of steps may also be shares of the run, so they are typed as floats; written as integers they stay so.
    checked |= {name: value for name, value in arguments.items() if isinstance(value, int) and name in numbers}
    for name in COUNTS:
        if not checked.get(name, 1) > 0:
            raise ValueError(f"trainer.{name} must be positive, got {checked[name]}")
    if trains and checked.get("max_steps", 0) <= 0:
        raise ValueError("trainer.max_steps must be positive: schedules and the length of the data depend on it")
    return checked


def build_tasks(tasks: Sequence[str | dict[str, Any]]) -> list[RecallTask]:
    """Recall tasks from names or mappings with `task` and its parameters.

    Raises:
        ValueError: for an unknown task or parameter.
    """
    built = []
    for spec in tasks:
        parameters = {"task": spec} if isinstance(spec, str) else dict(spec)
        if "task" not in parameters:
            raise ValueError(f"a recall task is a name or a mapping with `task`, got {spec!r}")
        name = parameters.pop("task")
        built.append(make_task(name, **{str(option): value for option, value in parameters.items()}))
    return built


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
