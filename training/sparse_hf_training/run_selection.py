"""Runs of the stages that train nothing: they look at the model as it is, and leave layers or heads to start from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from sparse_hf.artefact import save_artefact
from sparse_hf.calibrate.framework import calibrate
from sparse_hf.figures import Figure, write_figures
from sparse_hf.lora import has_adapter, is_quantized
from sparse_hf.patching import dense, get_handle, set_head_masks
from sparse_hf.sparsify import sparsify
from sparse_hf_training.build import build_judge, build_training_data, load_model, sparsify_for
from sparse_hf_training.config import RunConfig
from sparse_hf_training.data.row_kinds import RowsByKind, build_rows_by_kind
from sparse_hf_training.elimination import (
    MaskedLoss,
    Round,
    eliminate,
    elimination_masks,
    elimination_scores,
    row_passes,
    tokens_read,
)
from sparse_hf_training.evaluation import Judgement
from sparse_hf_training.head_elimination import (
    ELIMINATION_NAME,
    ELIMINATION_PLOT,
    RoundsFile,
    SharedMeasure,
    candidate_heads,
    draw_rounds,
    settings_of,
)
from sparse_hf_training.layer_selection import training_sequences
from sparse_hf_training.observe.attach import begin_selection_record
from sparse_hf_training.observe.run_record import recorded
from sparse_hf_training.peft import base_name
from sparse_hf_training.progress import WorkProgress, doing
from sparse_hf_training.run_folder import claim_output, from_main_process
from sparse_hf_training.run_result import (
    ARTEFACT_NAME,
    DATA_REPORT_NAME,
    FIGURES_NAME,
    RunResult,
    judgement_figures,
    tell_data,
)


def run_selection(
    config: RunConfig, arguments: TrainingArguments, before: Judgement | None, console: Console, command: str
) -> RunResult:
    """A run of `layer_selection` or `head_elimination`; arguments as `run_training`.

    Raises:
        ValueError: for anything in the configuration, the data or the output folder that cannot be used.
    """
    _check_processes(config, arguments)
    with doing(console, "loading the model"):
        where = arguments.device
        model, tokenizer = load_model(config.model, config.dtype, quantization=config.quantization, device=where)
    run = _select_layers if config.stage == "layer_selection" else _eliminate_heads
    return run(config, arguments, model, tokenizer, before, console, command)


def _check_processes(config: RunConfig, arguments: TrainingArguments) -> None:
    if config.stage == "layer_selection" and arguments.world_size > 1:
        raise ValueError(f"layer_selection runs in one process, not in {arguments.world_size}: leave the launcher out")
    sharded = {
        "DeepSpeed": arguments.deepspeed_plugin is not None,
        "FSDP": bool(arguments.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
    }
    if used := [name for name, given in sharded.items() if given]:
        raise ValueError(
            f"{config.stage} holds the whole model in each process; leave {used[0]} out, of the launcher and of trainer"
        )


def _select_layers(
    config: RunConfig,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    before: Judgement | None,
    console: Console,
    command: str,
) -> RunResult:
    output = Path(config.output_dir)
    count = config.layer_selection.num_sequences
    data = build_training_data(replace(config.data, length_schedule=()), tokenizer, count)
    judge = build_judge(config.evaluation, tokenizer)
    sequences = training_sequences(data.rows, count)
    calibrator = config.layer_selection.calibrator(model, sequences.shape[1], config.data.seed)
    claim_output(config, output)
    tell_data(data, output, console)
    record = begin_selection_record(config, output, arguments)
    model.to(arguments.device)  # type: ignore[arg-type]
    with recorded(record), doing(console, "selecting layers"):
        found = calibrate(
            model,
            sequences,
            calibrator,
            output / ARTEFACT_NAME,
            data=", ".join(source.path for source in config.data.text),
            resume=True,
            base_model_name_or_path=config.model,
            command=command,
            progress=lambda text: console.print(text, highlight=False, markup=False) if text else None,
        )
        before = judge(model) if judge is not None and before is None else before
        sparsify(model, found.folder)
        after = None if judge is None else judge(model)
        figures = list(found.outcome.figures)
        if judge is not None and before is not None and after is not None:
            figures += judgement_figures(judge, before, after, model)
        write_figures(output / FIGURES_NAME, figures, command=command)
        if record is not None:
            record.end("finished", result={"stage": config.stage, "figures": [asdict(figure) for figure in figures]})
    return RunResult(
        model=model,
        artefact=found.folder,
        scores=None,
        dense=before,
        sparse=after,
        history=[],
        data=data,
        figures=tuple(figures),
    )


def _eliminate_heads(
    config: RunConfig,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    before: Judgement | None,
    console: Console,
    command: str,
) -> RunResult:
    output, settings = Path(config.output_dir), config.head_elimination
    sparsify_for(model, config)
    if not is_quantized(model):  # it lies on the device already
        model.to(arguments.device)  # type: ignore[arg-type]
    model.eval()
    candidates = candidate_heads(model, settings.start_from, config.data.seq_len)
    num_rows = settings.num_rows(candidates, _num_kinds(config))
    with doing(console, "loading data"):
        num_text_rows = num_rows if settings.text_weight else 1
        rows = build_rows_by_kind(config.data, tokenizer, num_rows, num_text_rows=num_text_rows)
        judge = build_judge(config.evaluation, tokenizer)
    file = RoundsFile(path=output / ELIMINATION_NAME, settings=settings_of(config, model, candidates, rows))
    done = from_main_process(lambda: file.read(resume=config.resume))
    from_main_process(lambda: claim_output(config, output))
    tell_data(rows.everything, output, console)
    record = begin_selection_record(config, output, arguments, resumed_from=len(done) or None)
    with recorded(record):
        rounds = _all_rounds(config, arguments, model, rows, candidates, file, done, console)
        masks, scores = elimination_masks(rounds, candidates), elimination_scores(rounds, candidates)
        set_head_masks(model, masks)
        sparse_share = 1 - masks.float().mean().item()
        figures = [Figure(case="sparse KV heads", value=sparse_share, unit="share", lower_is_better=False)]
        after = None
        if record is not None:
            if judge is not None and before is None:
                with doing(console, "judging the dense model"), dense(model):
                    before = judge(model)
            if judge is not None and before is not None:
                with doing(console, "judging sparse heads"):
                    after = judge(model)
                figures += judgement_figures(judge, before, after, model)
            _write_elimination(config, model, tokenizer, rounds, scores, figures, command)
            rows.everything.report.write(output / DATA_REPORT_NAME)  # again: streams are counted as they are read
            record.end("finished", result={"stage": config.stage, "figures": [asdict(figure) for figure in figures]})
        PartialState().wait_for_everyone()
    return RunResult(
        model=model,
        artefact=output / ARTEFACT_NAME,
        scores=scores,
        dense=before,
        sparse=after,
        history=[],
        data=rows.everything,
        figures=tuple(figures),
    )


def _all_rounds(
    config: RunConfig,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    rows: RowsByKind,
    candidates: Tensor,
    file: RoundsFile,
    done: list[Round],
    console: Console,
) -> list[Round]:
    """The rounds that are done, and those that are left, each of which is written down when it ends."""
    settings, rank, world_size = config.head_elimination, arguments.process_index, arguments.world_size
    num_kinds = _num_kinds(config)
    total = settings.num_row_passes(candidates, num_kinds)
    with WorkProgress(console, "eliminating heads", total=total, completed=row_passes(done)) as progress:

        def after_round(rounds: list[Round], left: int) -> None:
            if not rank:
                file.write(rounds)
            best = min(rounds[-1].losses.values())
            text = f"round {len(rounds)}, {left} heads left, loss without the least missed {best:.4f}"
            progress.report(text, completed=row_passes(rounds))

        loss = MaskedLoss(
            model,
            rows.tasks,
            rows.text,
            text_weight=settings.text_weight,
            batch_size=settings.batch_size,
            after_mask=lambda num_rows: progress.advance(num_rows * world_size),
        )
        shared = SharedMeasure(measure=loss, rank=rank, world_size=world_size, device=arguments.device)
        return eliminate(shared, candidates, settings, num_kinds=num_kinds, before=done, after_round=after_round)


def _num_kinds(config: RunConfig) -> int:
    assert config.data.recall is not None
    return len(config.data.recall.tasks) + (config.head_elimination.text_weight > 0)


def _write_elimination(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: list[Round],
    scores: Tensor,
    figures: list[Figure],
    command: str,
) -> None:
    output, plain = Path(config.output_dir), config.to_dict()
    training = {
        "stage": config.stage,
        "data": [source.path for source in config.data.text],
        "head_sparsity": 1 - get_handle(model).head_masks.float().mean().item(),
        "recall_tasks": plain["data"]["recall"]["tasks"],
        "head_elimination": plain["head_elimination"],
        "rounds": len(rounds),
        "tokens_read": tokens_read(rounds, config.data.seq_len),
        "figures": [asdict(figure) for figure in figures],
    }
    adapter = has_adapter(model)
    save_artefact(
        model,
        output / ARTEFACT_NAME,
        scores=scores,
        training=training,
        base_model_name_or_path=base_name(model, config.model),
        tokenizer=tokenizer if adapter else None,
        overwrite=True,
    )
    write_figures(output / FIGURES_NAME, figures, command=command)
    draw_rounds(rounds, scores, output / ELIMINATION_PLOT)
