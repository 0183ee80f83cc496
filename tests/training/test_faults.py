"""A full disk, a damaged checkpoint, NaN: the run stops with one line, and the last good checkpoint still counts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerState

from sparse_hf_training import checkpoint as checkpoint_module
from sparse_hf_training.checkpoint import CheckpointNotSaved, checkpoints, is_complete
from sparse_hf_training.config import RunConfig
from sparse_hf_training.engines import checkpointing
from sparse_hf_training.masks.learning import MaskLearning
from sparse_hf_training.observe.run_record import RECORD_NAME
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.trainer import TrainingDiverged
from sparse_hf_training.typed_config import build

Values = Callable[..., dict[str, Any]]
TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


def losses(result: RunResult) -> list[dict[str, float]]:
    return [row for row in result.history if "loss" in row]


def disk_is_full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


# What of a checkpoint cannot be written, once the first checkpoint is there.
POINTS: dict[str, tuple[Any, str]] = {
    "gates": (checkpointing, "save_mask_state"),
    "weights": (PreTrainedModel, "save_pretrained"),
    "optimizer": (torch, "save"),
    "trainer state": (TrainerState, "save_to_json"),
    "marker": (checkpoint_module, "_to_disk"),
}


def test_full_disk_while_saving(run_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops; the checkpoint before it counts, nothing of the new one is in the way, and the run goes on."""
    for point, target in POINTS.items():
        output = tmp_path / point.replace(" ", "_")
        with monkeypatch.context() as patched:
            fill_disk_in_step_3(patched, target)
            with pytest.raises(CheckpointNotSaved) as caught:
                run(weights_run(run_values, output))
        message = str(caught.value)
        assert "checkpoint-4 cannot be written: " in message and "No space left on device" in message, point
        assert f"last good checkpoint: {output / 'checkpoint-2'}" in message and f"Make room in {output}" in message
        assert [path.name for path in checkpoints(output)] == ["checkpoint-2"], point
        assert is_complete(output / "checkpoint-2") and '"failed"' in (output / RECORD_NAME).read_text()
    resumed = run(weights_run(run_values, tmp_path / "optimizer"))
    assert losses(resumed) == losses(run(weights_run(run_values, tmp_path / "alone")))


def weights_run(run_values: Values, output: Path) -> dict[str, Any]:
    objective = {"lm": 1.0, "kl": 0.0}
    return run_values(stage="masks_and_weights", objective=objective, evaluation={}, output_dir=str(output))


def fill_disk_in_step_3(monkeypatch: pytest.MonkeyPatch, target: tuple[Any, str]) -> None:
    begin = MaskLearning.begin_step

    def fills_up(self: MaskLearning, step: int, max_steps: int) -> None:
        if step == 3:
            monkeypatch.setattr(*target, disk_is_full)
        begin(self, step, max_steps)

    monkeypatch.setattr(MaskLearning, "begin_step", fills_up)


def test_file_size_limit_of_the_system(run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    """The system itself refuses the bytes, in the middle of a tensor file: one line, and no checkpoint that counts."""
    config = run_yaml(stage="masks_and_weights", objective={"lm": 1.0, "kl": 0.0}, evaluation={})
    limit = 40_000  # bytes of one file; the weights are larger
    code = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    code += f"sys.argv[:] = [{str(TRAIN)!r}, {str(config)!r}]; runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "checkpoint-2 cannot be written" in last and "none yet" in last, last
    assert "Traceback" not in done.stderr
    assert checkpoints(tmp_path / "run") == []


def test_flipped_bit_in_the_newest_checkpoint(
    run_values: Values, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = weights_run(run_values, tmp_path / "run")
    alone, newest = run(values), tmp_path / "run" / "checkpoint-4"
    for file in ("mask_learning.safetensors", "model.safetensors", "optimizer.pt"):
        content = bytearray((newest / file).read_bytes())
        content[-9] ^= 0x10
        (newest / file).write_bytes(content)
        caplog.clear()
        again = run(values)
        assert f"checkpoint-4 is corrupt ({file} not as written); going back to the one before" in caplog.text
        assert losses(again) == losses(alone) and is_complete(newest)


def spoil_gates_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """One gate becomes NaN when an optimizer step is done, the loss of that step still being finite."""
    after = MaskLearning.after_step

    def ending(self: MaskLearning) -> None:
        after(self)
        if self.step == step:
            with torch.no_grad():
                self.gates.values[0, 0] = float("nan")

    monkeypatch.setattr(MaskLearning, "after_step", ending)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (2, r"gates or multipliers are not finite in step 3; last good checkpoint: .*checkpoint-2"),
        (3, r"gates are not finite after step 4; last good checkpoint: .*checkpoint-2"),
    ],
    ids=["before a step", "before a save"],
)
def test_nan_in_gates(
    run_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, message: str
) -> None:
    values = run_values(evaluation={})
    with monkeypatch.context() as patched:
        spoil_gates_after(patched, step)
        with pytest.raises(TrainingDiverged, match=message):
            run(values)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    result = run(values)
    assert result.scores is not None and bool(result.scores.isfinite().all())


def spoil_weights_after_step_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last update makes a weight infinite, the loss of that step still being finite."""
    step, calls = torch.optim.AdamW.step, [0]

    def broken(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        weights = [p for group in self.param_groups for p in group["params"] if p.ndim == 2 and p.numel() > 100]
        calls[0] += bool(weights)
        if calls[0] == 4 and weights:
            with torch.no_grad():
                weights[-1][0, 0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)


def test_nan_in_weights_is_not_saved(run_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = weights_run(run_values, tmp_path / "run")
    spoil_weights_after_step_4(monkeypatch)
    with pytest.raises(TrainingDiverged, match=r"weights or gates are not finite after step 4; .*checkpoint-2"):
        run(values)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_nan_in_the_last_step_of_a_run_without_checkpoints_makes_no_artefact(
    run_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = weights_run(run_values, tmp_path / "run")
    values["trainer"]["save_strategy"] = "no"
    spoil_weights_after_step_4(monkeypatch)
    with pytest.raises(TrainingDiverged, match=r"weights or gates are not finite after step 4; .*none yet"):
        run(values)
    assert not (tmp_path / "run" / "artefact").exists()
