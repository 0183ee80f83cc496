"""The cases of the training benchmark, by the number of GPUs that it runs on, and the figures that each yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sparse_hf.figures import Figure
from sparse_hf_training.bench import report
from sparse_hf_training.bench.steps import KL, LM, Steps, TrainingCase

K = 1024
SPARSITY = 0.7
TakeSteps = Callable[[TrainingCase], Steps]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is measured.

    Args:
        num_gpus: GPUs of the run.
        num_layers: of the 8B shape; all 32 in the case that says so.
        lengths: tokens of rows.
        share_len: tokens per GPU where sequence-parallel groups are compared with single ranks.
        whole_layers: layers of the whole model, trained over all GPUs at the longest length; 0 leaves it out.
    """

    num_gpus: int = 1
    num_layers: int = 4
    lengths: tuple[int, ...] = (32 * K, 128 * K)
    share_len: int = 32 * K
    whole_layers: int = 32

    def figures(self, take: TakeSteps) -> Iterator[list[Figure]]:
        """Figures of one comparison after the other."""
        if self.num_gpus == 1:
            for seq_len in self.lengths:
                yield from self._one_gpu(seq_len, take)
        else:
            yield from self._shared_rows(take)
            if self.whole_layers:
                yield from self._whole_model(take)

    def _one_gpu(self, seq_len: int, take: TakeSteps) -> Iterator[list[Figure]]:
        case = TrainingCase(name="", num_layers=self.num_layers, seq_len=seq_len)
        peers = [
            take(replace(case, name="dense, cuDNN SDPA", attention="cudnn")),
            take(replace(case, name="dense, flash SDPA", attention="flash")),
        ]
        dense = report.better(*peers)
        yield [figure for peer in peers for figure in report.step_figures(peer, None, 1)]
        sft = take(replace(case, name=f"{SPARSITY:.0%} streaming heads", head_sparsity=SPARSITY))
        bounded = seq_len == 128 * K
        yield [*report.step_figures(sft, dense, 1), *report.speedup_figures(sft, dense, 1, bounded)]
        for name, stage, objective in (
            ("masks alone, cross-entropy", "masks", LM),
            ("masks and weights, cross-entropy", "masks_and_weights", LM),
            ("masks alone, KL to the dense model", "masks", KL),
        ):
            learning = take(replace(case, name=name, stage=stage, objective=objective))  # type: ignore[arg-type]
            yield [*report.step_figures(learning, dense, 1), report.mask_step_figure(learning, dense, 1)]

    def _shared_rows(self, take: TakeSteps) -> Iterator[list[Figure]]:
        """Rows shared by all GPUs, beside rows of their own that are the documents of those."""
        n = self.num_gpus
        for head_sparsity in (0.0, SPARSITY):
            name = f"{head_sparsity:.0%} streaming heads"
            case = TrainingCase(
                name=name, num_layers=self.num_layers, seq_len=self.share_len, head_sparsity=head_sparsity
            )
            alone = take(case)
            shared = take(replace(case, seq_len=n * self.share_len, document_len=self.share_len, seq_parallel_size=n))
            yield [
                *report.step_figures(alone, None, n),
                *report.step_figures(shared, alone, n),
                report.efficiency_figure(shared, alone, n),
                *report.exchange_figures(shared, n),
            ]

    def _whole_model(self, take: TakeSteps) -> Iterator[list[Figure]]:
        n = self.num_gpus
        case = TrainingCase(name="", num_layers=self.whole_layers, seq_len=self.lengths[-1], seq_parallel_size=n)
        dense = take(replace(case, name="dense heads"))
        yield [*report.step_figures(dense, None, n), *report.exchange_figures(dense, n)]
        sft = take(replace(case, name=f"{SPARSITY:.0%} streaming heads", head_sparsity=SPARSITY))
        yield [
            *report.step_figures(sft, dense, n),
            *report.speedup_figures(sft, dense, n, False),
            *report.exchange_figures(sft, n),
        ]
        masks = take(replace(case, name="masks alone, cross-entropy", stage="masks"))
        yield [*report.step_figures(masks, dense, n), report.mask_step_figure(masks, dense, n)]


def all_figures(plan: TrainingPlan, take: TakeSteps, done: Callable[[Sequence[Figure]], None]) -> list[Figure]:
    """Runs the plan; `done` gets all figures so far after each comparison."""
    found: list[Figure] = []
    for figures in plan.figures(take):
        found += figures
        done(found)
    return found
