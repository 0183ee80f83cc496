"""LoRA with masks in two processes, under every engine and on shared rows, does what one process does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparse_hf import AutoSparseModelForCausalLM
from sparse_hf.artefact import load_artefact
from sparse_hf.lora import read_adapter_tensors
from sparse_hf_training.config import RunConfig
from sparse_hf_training.run import run_training

WORKERS = Path(__file__).parent / "workers"
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, shared rows": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
    **{
        f"zero{stage}": {
            "deepspeed": {
                "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
            }
        }
        for stage in (2, 3)
    },
}


def launch(*paths: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    process = subprocess.run(
        [*command, str(WORKERS / "run_engines.py"), *paths],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stderr


def test_runs_equal_one_process(run_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    def written(name: str, batch: int, whole: list[str], extra: dict[str, Any]) -> str:
        values = run_values(
            stage="masks_and_weights",
            lora={"rank": 4, "alpha": 8, "modules_to_save": whole},
            objective={"lm": 1.0, "kl": 0.5},
            evaluation={},
            trainer={"per_device_train_batch_size": batch, "save_steps": 4, "learning_rate": 1e-3, **extra},
            seq_parallel_size=2 if "shared" in name else 1,
            output_dir=str(tmp_path / name),
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    head = {name: [] if name == "zero3" else ["lm_head"] for name in ENGINES}
    for name, whole in (("one", ["lm_head"]), ("one-zero3", [])):
        run_training(RunConfig.load(written(name, 2, whole, {})))
    told = launch(*(written(name, 2 if "shared" in name else 1, head[name], extra) for name, extra in ENGINES.items()))
    for name in ("DDP, 2", "FSDP2, 2", "ZeRO-2, 2", "ZeRO-3, 2"):
        assert name in told
    for name in ENGINES:
        one, two = tmp_path / ("one" if head[name] else "one-zero3"), tmp_path / name
        histories = [json.loads((folder / "history.json").read_text()) for folder in (one, two)]
        expected_losses, losses = ([row["loss"] for row in history if "loss" in row] for history in histories)
        assert losses == pytest.approx(expected_losses, abs=2e-4), name
        a, b = (load_artefact(folder / "artefact") for folder in (one, two))
        assert a.scores is not None and b.scores is not None
        torch.testing.assert_close(b.scores, a.scores, rtol=1e-3, atol=1e-4)
        expected, tensors = (read_adapter_tensors(folder / "artefact") for folder in (one, two))
        assert set(tensors) == set(expected)
        for key, tensor in expected.items():
            # Adam's first steps turn rounding of gradients near 0 into steps of the whole rate.
            assert (tensors[key] - tensor).abs().mean() < 2e-4, f"{name} {key}"
        AutoSparseModelForCausalLM.from_pretrained(two / "artefact")
