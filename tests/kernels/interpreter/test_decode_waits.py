"""Programs of a decode launch that wait for each other, as on a GPU: each in a process of its own, on shared memory.

And how many of them a multiprocessor has room for, as none may wait for one that is not there.
"""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from sparse_hf_kernels.kv_cache import HeadStorage, KVStorage, StorageLayout, launch, store_tokens
from sparse_hf_kernels.kv_cache.decode_kernel import _decode_kernel
from sparse_hf_kernels.kv_cache.parts import FEW
from sparse_hf_kernels.testing import parts_left

LAYOUT = StorageLayout(heads=(HeadStorage(), HeadStorage(recent=60, num_sink_tokens=4)))
DIM, TIMEOUT = 24, 120.0


def run_one(program: int, programs: int, delay: float, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """One program of a launch, in this process."""
    builder = interpreter.interpreter_builder
    builder.set_grid_dim = lambda *_: setattr(builder, "grid_dim", (programs, 1, 1))
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", (program, 0, 0))
    # It would copy what it read onto itself, over what others have written since.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    time.sleep(delay)
    _decode_kernel[(1,)](*arguments, **options)


def run_all(programs: int, delays: list[float], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_one, args=(n, programs, delays[n], arguments, options), daemon=True)
        for n in range(programs)
    ]
    end = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * programs, "None: still waiting"
    finally:
        for process in processes:
            process.kill()
            process.join()


def shared(*tensors: Tensor) -> None:
    for x in tensors:
        x.share_memory_()


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(
    ("programs", "length", "config", "group"),
    [
        (7, 200, {}, 3),  # heads that end amid a program's share
        (7, 200, {"head_cost": 3}, 1),  # a program may begin in the units before a head's first block
        (9, 40, {"min_share": 2}, 8),  # programs without work
        (26, 420, {}, 4),
    ],
    ids=str,
)
def test_the_bits_of_the_last_to_come(
    programs: int, length: int, config: dict[str, int], group: int, monkeypatch: pytest.MonkeyPatch,
    new_tokens: Callable,
) -> None:  # fmt: skip
    """Whoever comes first or last: what one program sums over all slices, launch after launch."""
    monkeypatch.setattr(launch, "decode_config", lambda *_: launch.DecodeConfig(block=16, **config))
    one = KVStorage(
        LAYOUT, batch=1, head_dim=DIM, value_dim=DIM, dtype=torch.float32, device=torch.device("cpu"), capacity=450
    )
    store_tokens(one, *new_tokens(1, 2, length, DIM, torch.float32), seen=0)
    other = copy.deepcopy(one)
    works = [launch.Workspace(one.keys.device, 2, group, DIM, programs) for _ in range(2)]
    shared(other.keys, other.values, other.state, works[1].parts, works[1].stats, works[1].counters)
    options = launch.decode_options(2 * group, 2, DIM, 1, torch.float32, one, True)
    assert options["WAITS"] is False, "the interpreter would never end"
    delays = [
        [0.0] * programs,
        [0.01 * n for n in range(programs)],
        [0.01 * (programs - n) for n in range(programs)],
    ]
    for number, wait in enumerate(delays):
        q, k, v = new_tokens(1, 2, 1, DIM, torch.float32, group)
        valid = torch.tensor([number != 1])
        outs = [torch.full((1, 1, 2 * group, DIM), float("nan")) for _ in range(2)]
        shared(outs[1])
        calls = [
            launch.decode_arguments(q, k, v, out, storage, work, DIM**-0.5, valid)
            for out, storage, work in zip(outs, (one, other), works, strict=True)
        ]
        _decode_kernel[(programs,)](*calls[0], **options)
        run_all(programs, wait, calls[1], {**options, "WAITS": True})
        assert outs[0].any() == (number != 1) and torch.equal(*outs)
        assert torch.equal(works[0].counters, works[1].counters)
        assert max(parts_left(works[1].counters)) > (FEW.value if programs > 20 else 1)
        assert one.state.tolist() == other.state.tolist() == [length + number + 1, length + number + (number == 0)]


@pytest.mark.parametrize(
    ("shared_bytes", "registers", "num_warps", "expected"),
    [
        (71680, 252, 4, 2),  # 2 * 4 * 32 * 256 registers are all that there are
        (71680, 168, 4, 3),
        (115712, 128, 4, 2),  # twice 114 KB, of which 1 KB each is the system's, are all that there is
        (115713, 128, 4, 1),
        (1024, 16, 16, 4),  # as many threads as there may be
        (71680, 255, 8, 1),
        (200000, 255, 16, 0),
    ],
)
def test_programs_that_fit_a_multiprocessor(shared_bytes: int, registers: int, num_warps: int, expected: int) -> None:
    """Of a Hopper GPU; by CUDA's occupancy calculator."""
    hopper = SimpleNamespace(
        shared_memory_per_multiprocessor=233472, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048
    )
    assert launch.fitting(shared_bytes, registers, num_warps, hopper) == expected
