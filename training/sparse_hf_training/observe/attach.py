"""What observes a run: put on its trainer, begun in its folder, drawn at its end."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel, TrainingArguments

from sparse_hf.patching import get_handle
from sparse_hf.plots import has_matplotlib
from sparse_hf_training.checkpoint import checkpoint_step
from sparse_hf_training.config import RunConfig
from sparse_hf_training.engines import Engine
from sparse_hf_training.observe.heat_maps import HISTORY_NAME, MaskHistory, MaskHistoryCallback
from sparse_hf_training.observe.run_record import RECORD_NAME, RunRecord, describe_session
from sparse_hf_training.observe.summary import RunSummary, last_values
from sparse_hf_training.observe.throughput import ThroughputCallback
from sparse_hf_training.plots import plot_mask_history
from sparse_hf_training.trainer import SparseTrainer

logger = logging.getLogger(__name__)

HISTORY_PLOT = "mask_history.png"


def observe_training(trainer: SparseTrainer, config: RunConfig, output: Path) -> ThroughputCallback:
    """Adds the callbacks that measure speed and write down the masks."""
    throughput = ThroughputCallback(teacher=config.objective.needs_teacher, peak_tflops=config.observe.peak_tflops)
    trainer.add_callback(throughput)
    if trainer.learning is not None:
        steps = trainer.args.max_steps
        history = MaskHistoryCallback(
            trainer.learning,
            output / HISTORY_NAME,
            every=config.observe.history_interval(steps),
            image_every=config.observe.image_interval(steps),
            callbacks=trainer.callback_handler.callbacks,
        )
        trainer.add_callback(history)
    return throughput


def begin_record(trainer: SparseTrainer, config: RunConfig, output: Path, resume_from: Path | None) -> RunRecord | None:
    """Begins `run.json` on the main process; None on the others."""
    if not trainer.is_world_process_zero():
        return None
    seeds = {"trainer": trainer.args.seed, "data": config.data.seed, "evaluation": config.evaluation.seed}
    if trainer.learning is not None:
        seeds["masks"] = config.masks.seed
    session = describe_session(
        world_size=trainer.args.world_size,
        engine=str(trainer.engine),
        resumed_from=None if resume_from is None else checkpoint_step(resume_from),
    )
    return RunRecord.begin(output / RECORD_NAME, config=config.to_dict(), seeds=seeds, session=session)


def begin_selection_record(
    config: RunConfig, output: Path, arguments: TrainingArguments, resumed_from: int | None = None
) -> RunRecord | None:
    """Begins `run.json` of a stage that trains nothing, on the main process; None on the others.

    Args:
        config: the run.
        output: its folder.
        arguments: that know the processes.
        resumed_from: rounds of an earlier session, or None.
    """
    if arguments.process_index:
        return None
    seeds = {"data": config.data.seed, "evaluation": config.evaluation.seed}
    session = describe_session(
        world_size=arguments.world_size,
        engine=str(Engine.replicated(arguments.world_size, arguments.device.type)),
        resumed_from=resumed_from,
    )
    return RunRecord.begin(output / RECORD_NAME, config=config.to_dict(), seeds=seeds, session=session)


def draw_mask_history(output: Path) -> None:
    """Draws the masks' history beside it, where there is one and matplotlib is installed."""
    history = MaskHistory(output / HISTORY_NAME).read()
    if not history:
        return
    if not has_matplotlib():
        logger.warning("%s is not drawn: matplotlib is not installed", HISTORY_PLOT)
        return
    plot_mask_history(history, output / HISTORY_PLOT)


def summarize(trainer: SparseTrainer, model: PreTrainedModel, stage: str, throughput: ThroughputCallback) -> RunSummary:
    """The run as its trainer left it, the masks deployed; figures of judgements are added by who has them."""
    history = trainer.state.log_history
    return RunSummary(
        stage=stage,
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        seconds=last_values(history, ["train_runtime"]).get("train_runtime", 0.0),
        losses=last_values(history, ["loss"]),
        sparsity=last_values(history, ["sparsity"]),
        head_sparsity=1 - get_handle(model).head_masks.float().mean().item(),
        throughput=throughput.summary(trainer.args.world_size),
        figures=(),
        artefact=None,
    )
