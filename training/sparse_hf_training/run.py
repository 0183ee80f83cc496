"""`run_training`: one run from its configuration to its artefact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from sparse_hf.artefact import save_artefact
from sparse_hf.figures import Figure, replace_json, write_figures
from sparse_hf.lora import has_adapter
from sparse_hf.patching import dense, get_handle
from sparse_hf_training.build import TrainingData, build_judge, build_training_data, load_model, sparsify_for
from sparse_hf_training.compile_layers import CompileConfig, compile_layers
from sparse_hf_training.config import RunConfig
from sparse_hf_training.data import collate
from sparse_hf_training.engines import check_processes
from sparse_hf_training.engines.judging import DENSE_NAME, JudgeDenseCallback
from sparse_hf_training.engines.weights import export_weights
from sparse_hf_training.evaluation import Judge, Judgement
from sparse_hf_training.masks import detach_mask_learning
from sparse_hf_training.masks.learning import get_mask_learning
from sparse_hf_training.objectives import outside_zero3
from sparse_hf_training.observe.attach import (
    begin_record,
    draw_mask_history,
    observe_training,
    summarize,
)
from sparse_hf_training.observe.run_record import recorded
from sparse_hf_training.peft import add_lora, base_name, check_adapter_engine
from sparse_hf_training.progress import RichProgressCallback, doing
from sparse_hf_training.run_folder import claim_output, find_resume_point, from_main_process, training_arguments
from sparse_hf_training.run_result import (
    ARTEFACT_NAME,
    DATA_NAME,
    DATA_REPORT_NAME,
    FIGURES_NAME,
    HISTORY_NAME,
    RunResult,
    judgement_figures,
    tell_data,
)
from sparse_hf_training.run_selection import run_selection
from sparse_hf_training.sequence_parallel import sequence_parallel
from sparse_hf_training.sequence_parallel.enable import check_model
from sparse_hf_training.sequence_parallel.groups import check_world
from sparse_hf_training.stages import UNTRAINED_STAGES, prepare_stage
from sparse_hf_training.trainer import SparseTrainer


def run_training(
    config: RunConfig,
    *,
    before: Judgement | None = None,
    console: Console | None = None,
    command: str = "sparse-hf train",
) -> RunResult:
    """Trains, judges and exports; goes on from the newest complete checkpoint when there is one.

    Args:
        config: the run.
        before: the dense model's judgement, when an earlier stage made it already.
        console: where progress is shown.
        command: how to repeat it, for the figures.

    Raises:
        ValueError: for anything in the configuration, the data or the output folder that cannot be used.
        TrainingDiverged: if the loss is no longer finite.
    """
    console = console or Console(stderr=True)
    output = Path(config.output_dir)
    arguments = training_arguments(config, output)
    check_processes(arguments.world_size, expected=config.num_processes)
    console = Console(quiet=True) if arguments.process_index else console  # one process tells
    resume_from = from_main_process(lambda: find_resume_point(config, output))
    if config.stage in UNTRAINED_STAGES:
        return run_selection(config, arguments, before, console, command)
    with doing(console, "loading the model"):
        where = arguments.device
        model, tokenizer = load_model(config.model, config.dtype, quantization=config.quantization, device=where)
    sparsify_for(model, config)
    if config.lora is not None:
        add_lora(model, config.lora, seed=arguments.seed)
    if (sp_size := config.seq_parallel_size) > 1:
        check_world(sp_size)
        check_model(model, sp_size)
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size // sp_size
    with doing(console, "loading data"):
        data = build_training_data(
            config.data,
            tokenizer,
            arguments.max_steps * rows_per_step,
            rows_per_step=rows_per_step,
            state_dir=output / DATA_NAME,
        )
        judge = build_judge(config.evaluation, tokenizer)
    prepare_stage(model, config.stage, config.masks)
    # While only gates or an adapter train, the base model is there: without its adapter, with dense attention.
    needs_teacher = config.objective.needs_teacher and config.stage != "masks" and not has_adapter(model)
    if config.compile:
        compile_layers(model, CompileConfig() if config.compile is True else config.compile)
    progress = RichProgressCallback(console, f"training ({config.stage})")
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=data.rows,
        eval_dataset=None if judge is None else judge.rows,
        data_collator=partial(collate, pad_to_multiple_of=sp_size),
        objective=config.objective,
        teacher=_load_teacher(config) if needs_teacher else None,
        judge=None if judge is None else _in_loop(judge, progress),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # prints rows on stdout, which belongs to the result
    check_adapter_engine(model, trainer.engine, compiled=bool(config.compile))
    console.print(f"engine: {trainer.engine}", highlight=False)
    # Only now: a folder that holds a configuration which never worked would refuse the corrected one.
    from_main_process(lambda: claim_output(config, output))
    tell_data(data, output, console)
    throughput = observe_training(trainer, config, output)
    record = begin_record(trainer, config, output, resume_from)
    with recorded(record):
        result = _train(config, trainer, model, tokenizer, judge, before, data, progress, resume_from, command)
        summary = summarize(trainer, model, config.stage, throughput)
        summary = replace(summary, figures=result.figures, artefact=result.artefact)
        if record is not None:
            record.end("finished", result=summary.to_dict())
    return replace(result, summary=summary)


def _train(
    config: RunConfig,
    trainer: SparseTrainer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge | None,
    before: Judgement | JudgeDenseCallback | None,
    data: TrainingData,
    progress: RichProgressCallback,
    resume_from: Path | None,
    command: str,
) -> RunResult:
    """Judges the dense model, trains, deploys the masks and writes what is left."""
    console = progress.console
    if before is None and judge is not None:
        before = _judge_dense(config, trainer, model, judge, progress)
    trainer.accelerator.wait_for_everyone()
    sharing = [model] if trainer.teacher is None else [model, trainer.teacher]
    try:
        with sequence_parallel(sharing, config.seq_parallel_size):
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    finally:
        progress.stop()
    if isinstance(before, JudgeDenseCallback):
        before = before.judgement
    scores = None
    if trainer.learning is not None:
        scores = get_mask_learning(model).gates.scores()
        detach_mask_learning(model)
    return _finish(config, trainer, model, tokenizer, scores, judge, before, data, console, command)


def _judge_dense(
    config: RunConfig, trainer: SparseTrainer, model: PreTrainedModel, judge: Judge, progress: RichProgressCallback
) -> Judgement | JudgeDenseCallback | None:
    """The dense model as it came, since training may change its weights; on the main process where that can."""
    file = Path(config.output_dir) / DENSE_NAME
    if trainer.engine.shards_weights:
        callback = JudgeDenseCallback(trainer, judge, file)
        trainer.add_callback(callback)
        return callback
    if not trainer.is_world_process_zero():
        return None
    with doing(progress.console, "judging the dense model"), dense(model):
        judgement = judge(model)
    # For an engine that shards the weights and goes on with this run, where they have moved when it can judge.
    replace_json(file, judgement.to_dict())
    return judgement


def _load_teacher(config: RunConfig) -> PreTrainedModel:
    with outside_zero3():
        return load_model(config.model, config.dtype)[0]


def _in_loop(judge: Judge, progress: RichProgressCallback) -> Callable[[PreTrainedModel], dict[str, float]]:
    def recall(model: PreTrainedModel) -> dict[str, float]:
        with progress.during("judging recall"):
            return {f"recall/{r.task}": r.exact_match for r in judge.recall(model)}

    return recall


def _finish(
    config: RunConfig,
    trainer: SparseTrainer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scores: Tensor | None,
    judge: Judge | None,
    before: Judgement | None,
    data: TrainingData,
    console: Console,
    command: str,
) -> RunResult:
    output = Path(config.output_dir)
    history = trainer.state.log_history
    after = None
    figures: list[Figure] = []
    main, sharded = trainer.is_world_process_zero(), trainer.engine.shards_weights
    # Every process takes part where each holds a part of the weights.
    if judge is not None and before is not None and (main or sharded):
        with doing(console, "judging sparse heads"):
            after = judge(model)
        figures = judgement_figures(judge, before, after, model)
    trained, adapter = config.stage != "masks", has_adapter(model)
    # An adapter's fp32 stays.
    dtype = None if adapter else getattr(torch, config.dtype)
    weights = export_weights(trainer, trained or adapter, dtype) if sharded else None
    if main:
        training = {
            "stage": config.stage,
            "objective": asdict(config.objective),
            "data": [source.path for source in config.data.text],
            "steps": trainer.state.global_step,
            "head_sparsity": 1 - get_handle(model).head_masks.float().mean().item(),
            "figures": [asdict(figure) for figure in figures],
        }
        save_artefact(
            model,
            output / ARTEFACT_NAME,
            scores=scores,
            training=training,
            base_model_name_or_path=base_name(model, config.model),
            save_weights=trained,
            state_dict=weights,
            tokenizer=tokenizer if trained or adapter else None,
            overwrite=True,
        )
        write_figures(output / FIGURES_NAME, figures, command=command)
        replace_json(output / HISTORY_NAME, history)
        data.report.write(output / DATA_REPORT_NAME)  # again: streams are counted as they are read
        draw_mask_history(output)
    trainer.accelerator.wait_for_everyone()
    return RunResult(
        model=model,
        artefact=output / ARTEFACT_NAME,
        scores=scores,
        dense=before,
        sparse=after,
        history=history,
        data=data,
        figures=tuple(figures),
    )
