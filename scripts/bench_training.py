"""What does a training step cost with sparse heads, with gates, and over several GPUs? Beside dense attention by SDPA.

    python scripts/bench_training.py --out docs/benchmarks
    torchrun --nproc_per_node 4 scripts/bench_training.py --out docs/benchmarks

Writes training_1gpu.json (or 2gpu, 4gpu): real steps of `SparseTrainer` on a model of Llama-3.1-8B's shape with random
weights. One GPU takes fewer layers and as many fewer tokens in the vocabulary, so that all parts keep their share.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from sparse_hf.figures import Figure, write_figures
from sparse_hf_training.bench.plan import TrainingPlan, all_figures
from sparse_hf_training.bench.steps import Steps, TrainingCase, take_steps


def lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=TrainingPlan.num_layers, help="of the 8B shape")
    parser.add_argument("--seq-lens", type=lengths, default=TrainingPlan.lengths, help="tokens of rows")
    parser.add_argument("--whole-layers", type=int, default=TrainingPlan.whole_layers, help="0: no whole model")
    parser.add_argument("--steps", type=int, default=4, help="per case; the first does not count")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    num_gpus, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    plan = TrainingPlan(
        num_gpus=num_gpus, num_layers=options.layers, lengths=options.seq_lens, whole_layers=options.whole_layers
    )
    console = Console(stderr=True, quiet=rank > 0)

    def take(case: TrainingCase) -> Steps:
        begun = time.perf_counter()
        steps = take_steps(case, options.steps)
        shown = f"{case.seq_len} tokens, {case.num_layers} layers, {case.name}, SP {case.seq_parallel_size}"
        console.print(
            f"{shown}: {steps.step_seconds:.3f} s a step, {steps.peak_bytes / 2**30:.1f} GiB "
            f"({time.perf_counter() - begun:.0f} s in all)"
        )
        return steps

    launcher = "python" if num_gpus == 1 else f"torchrun --nproc_per_node {num_gpus}"
    words = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if arguments is None else arguments)]
    command = " ".join([launcher, "scripts/bench_training.py", *words])

    def write(figures: Sequence[Figure]) -> None:
        if rank == 0:  # after each comparison: a run that is cut short leaves what it measured
            write_figures(options.out / f"training_{num_gpus}gpu.json", figures, command=command)

    all_figures(plan, take, write)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
