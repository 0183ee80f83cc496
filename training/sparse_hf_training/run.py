"""`run_training`: one run from its configuration to its artefact."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from sparse_hf.adapters import adapter_for
from sparse_hf.artefact import save_artefact
from sparse_hf.config import SparseConfig
from sparse_hf.figures import Figure, write_figures
from sparse_hf.patching import dense, get_handle
from sparse_hf.sparsify import sparsify
from sparse_hf_training.build import TrainingData, build_judge, build_training_data, load_model
from sparse_hf_training.config import RunConfig
from sparse_hf_training.data import collate
from sparse_hf_training.evaluation import Judge, Judgement, measure_kv_bytes
from sparse_hf_training.masks import detach_mask_learning
from sparse_hf_training.masks.learning import get_mask_learning
from sparse_hf_training.progress import RichProgressCallback
from sparse_hf_training.run_folder import claim_output, find_resume_point, from_main_process, training_arguments
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.trainer import SparseTrainer

ARTEFACT_NAME, FIGURES_NAME, HISTORY_NAME = "artefact", "figures.json", "history.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run left.

    Args:
        model: the sparsified model under its final head masks.
        artefact: the artefact's folder.
        scores: the gates' scores `[num_layers, num_kv_heads]`, or None for `sft`.
        dense, sparse: judgements of the dense model before and of the sparse one after, or None without held text.
        history: the trainer's logged rows.
        data: what was trained on.
    """

    model: PreTrainedModel
    artefact: Path
    scores: Tensor | None
    dense: Judgement | None
    sparse: Judgement | None
    history: list[dict[str, float]]
    data: TrainingData


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
    resume_from = from_main_process(lambda: find_resume_point(config, output))
    model, tokenizer = load_model(config.model, config.dtype)
    spec = SparseConfig.from_dict(config.sparse) if isinstance(config.sparse, dict) else config.sparse
    shape = adapter_for(model).shape(model.config)
    masks = None if config.stage == "sft" else torch.ones(shape.num_layers, shape.num_kv_heads)
    sparsify(model, spec, head_masks=masks)
    rows_needed = arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    data = build_training_data(config.data, tokenizer, rows_needed * arguments.world_size)
    judge = build_judge(config.evaluation, tokenizer)
    learning = prepare_stage(model, config.stage, config.masks)
    # While only gates train, the model itself with dense attention is the base model, and no copy is needed.
    needs_teacher = config.objective.kl > 0 and config.stage != "masks"
    progress = RichProgressCallback(console, f"training ({config.stage})")
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=data.rows,
        eval_dataset=None if judge is None else judge.rows,
        data_collator=collate,
        objective=config.objective,
        teacher=load_model(config.model, config.dtype)[0] if needs_teacher else None,
        judge=None if judge is None else _in_loop(judge),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # prints rows on stdout, which belongs to the result
    # Only now: a folder that holds a configuration which never worked would refuse the corrected one.
    from_main_process(lambda: claim_output(config, output))
    if before is None and judge is not None and trainer.is_world_process_zero():
        # The dense model as it came: training may change its weights.
        with console.status("judging the dense model"), dense(model):
            before = judge(model)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    finally:
        progress.stop()
    scores = None
    if learning is not None:
        scores = get_mask_learning(model).gates.scores()
        detach_mask_learning(model)
    return _finish(config, trainer, model, tokenizer, scores, judge, before, data, console, command)


def _in_loop(judge: Judge) -> Any:
    return lambda model: {f"recall/{r.task}": r.exact_match for r in judge.recall(model)}


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
    if trainer.is_world_process_zero():
        if judge is not None and before is not None:
            with console.status("judging sparse heads"):
                after = judge(model)
            figures = judgement_figures(judge, before, after, model)
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
            base_model_name_or_path=config.model,
            save_weights=config.stage != "masks",
            tokenizer=None if config.stage == "masks" else tokenizer,
            overwrite=True,
        )
        write_figures(output / FIGURES_NAME, figures, command=command)
        (output / HISTORY_NAME).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return RunResult(
        model=model,
        artefact=output / ARTEFACT_NAME,
        scores=scores,
        dense=before,
        sparse=after,
        history=history,
        data=data,
    )


def judgement_figures(judge: Judge, before: Judgement, after: Judgement, model: PreTrainedModel) -> list[Figure]:
    """Recall, loss and KV bytes of a sparse model beside dense ones from the same run."""
    seq_len = judge.seq_len
    ids = torch.as_tensor(judge.filler.tokens[:seq_len]).long()[None].to(model.device)
    kv_bytes, dense_kv_bytes = measure_kv_bytes(model, ids)
    figures = [
        Figure(
            case=f"recall {sparse.task}, {seq_len} tokens, {sparse.num_samples} samples",
            value=sparse.exact_match,
            unit="share",
            lower_is_better=False,
            baseline=full.exact_match,
        )
        for full, sparse in zip(before.recall, after.recall, strict=True)
    ]
    loss = Figure(
        case="loss on held text",
        value=after.text_loss,
        unit="nats/token",
        lower_is_better=True,
        baseline=before.text_loss,
    )
    kv = Figure(
        case=f"KV cache at {ids.shape[1]} tokens",
        value=kv_bytes,
        unit="bytes",
        lower_is_better=True,
        baseline=dense_kv_bytes,
    )
    return [*figures, loss, kv]
