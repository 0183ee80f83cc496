"""Tables of tile configurations that were measured: the kernels run with what the table says, and the results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from sparse_hf.tune.kernels import described, tune_key
from sparse_hf.tune.workloads import make_workloads
from sparse_hf_kernels import tuned
from sparse_hf_kernels.sparse_attention.triton.configs import INTERPRETER, tile_config
from sparse_hf_kernels.tuned import INTERPRETER_ARCH, Config, Key

CPU = torch.device("cpu")


class Clock:
    """The fewer rows, the faster; runs nothing."""

    def record(self, label: str, call: Callable[[], object]) -> float:
        return float(label.split(",")[0].removeprefix("rows "))

    def read(self, handles: Sequence[float]) -> list[float]:
        return list(handles)


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tuned.VARIABLE, "")
    with tuned.in_force(None):
        yield


def config(rows: int, columns: int) -> Config:
    return (("rows", rows), ("columns", columns), ("num_warps", 1), ("num_stages", 1))


@pytest.mark.parametrize("kind", ["forward", "decode", "dkdv", "dq"])
def test_candidates_reach_the_kernels_and_agree(kind: str) -> None:
    key = Key("triton", kind, INTERPRETER_ARCH, 64, torch.float32)
    workloads = make_workloads(key, CPU, seq_len=12, num_heads=2, num_kv_heads=1)
    uneven, right = config(24, 16), config(16, 16)
    baseline = tuple(INTERPRETER[kind]._asdict().items())  # type: ignore[index]
    result = tune_key(key, workloads, [uneven, right], baseline, Clock(), budget_ms=1e-3)
    # 24 rows are no power of two, which only a kernel that was built with them can refuse.
    assert {skip.config: skip.reason for skip in result.skipped} == {uneven: "does not run"}, result.skipped
    expected = baseline if INTERPRETER[kind].rows == 16 else right  # type: ignore[index]
    assert result.config == expected, described(result.config)
    assert len(result.times_ms) == len(workloads)


def test_configurations_are_those_of_the_table() -> None:
    key = Key("triton", "forward", INTERPRETER_ARCH, 64, torch.float32)
    with tuned.in_force(tuned.TunedTable(source="test", configs={key: config(64, 32)})):
        assert tile_config(CPU, 48, torch.float32, "forward") == (64, 32, 1, 1)
        assert tile_config(CPU, 65, torch.float32, "forward") == INTERPRETER["forward"]
    assert tile_config(CPU, 48, torch.float32, "forward") == INTERPRETER["forward"]
