"""scripts/train.py under each launcher and a sharded engine: judged by all processes, exported whole; and refusals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_hf.artefact import load_artefact
from sparse_hf_training.config import RunConfig
from sparse_hf_training.engines import Engine, check_engine, check_processes
from sparse_hf_training.engines.resume import resume_plan
from sparse_hf_training.run import run_training

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train.py"
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
ZERO3 = f"trainer.deepspeed={ROOT}/configs/deepspeed/zero3.json"
FSDP = ["trainer.fsdp=true", "trainer.fsdp_config={version: 2, state_dict_type: SHARDED_STATE_DICT}"]


def launch(launcher: list[str], *arguments: str, limit: float = 400) -> subprocess.CompletedProcess[str]:
    """Runs scripts/train.py in two processes; a deadlock ends in a failure, with no process left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *launcher, str(TRAIN), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end after {limit} s: {process.communicate()[1][-2000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_launchers_and_sharded_engines_end_as_one_process(run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    config = run_yaml(stage="masks_and_weights", objective={"lm": 1.0, "kl": 0.5}, trainer={"optim": "sgd"})
    alone = run_training(
        RunConfig.load(config, [f"output_dir={tmp_path / 'alone'}", "trainer.per_device_train_batch_size=2"])
    )
    assert alone.scores is not None and alone.dense is not None and alone.sparse is not None
    expected = load_file(alone.artefact / "model.safetensors")
    launches = {
        "DeepSpeed ZeRO-3, 2 processes, cpu": (DEEPSPEED, [ZERO3]),
        "FSDP2, 2 processes, cpu": (TORCHRUN, FSDP),
        "DeepSpeed ZeRO-2, 2 processes, cpu": (
            [*ACCELERATE, "--config_file", str(ROOT / "configs" / "accelerate" / "zero2.yaml"), "--num_processes", "2"],
            [],
        ),
    }
    for number, (engine, (launcher, overrides)) in enumerate(launches.items()):
        folder = tmp_path / f"two{number}"
        done = launch(launcher, str(config), f"output_dir={folder}", "num_processes=2", *overrides)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"engine: {engine}" in done.stdout + done.stderr
        weights = load_file(folder / "artefact" / "model.safetensors")
        assert set(weights) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{engine}: {name}")
        artefact = load_artefact(folder / "artefact")
        assert artefact.scores is not None
        torch.testing.assert_close(artefact.scores, alone.scores, rtol=1e-4, atol=1e-5)
        artefact.check_base_model(AutoModelForCausalLM.from_pretrained(folder / "artefact"))
        figures = {row["case"]: row for row in json.loads((folder / "figures.json").read_text())}
        loss = figures["loss on held text"]
        assert loss["value"] == pytest.approx(alone.sparse.text_loss, abs=1e-3)
        assert loss["baseline"] == pytest.approx(alone.dense.text_loss, abs=1e-4)


def test_accelerate_launch_that_starts_one_process_for_two_is_refused(
    run_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    done = launch([*ACCELERATE, "--cpu", "--num_processes", "2"], str(run_yaml()), f"output_dir={tmp_path / 'run'}")
    assert done.returncode != 0 and "asked for several processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


def engine(name: str = "ddp", num_processes: int = 2) -> Engine:
    return Engine(name=name, num_processes=num_processes, device="cpu")


def test_launches_that_fall_short_are_refused() -> None:
    launched = {"ACCELERATE_DYNAMO_BACKEND": "no", "MASTER_PORT": "29500"}
    check_processes(2, expected=2, environment={})
    check_processes(1, environment={"ACCELERATE_DYNAMO_BACKEND": "no"})
    check_processes(2, environment={**launched, "WORLD_SIZE": "2"})
    check_engine(engine("zero2"), environment={"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(ValueError, match=r"num_processes is 8, but the run got 2; start it with"):
        check_processes(2, expected=8, environment={})
    with pytest.raises(ValueError, match="asked for several processes and started one"):
        check_processes(1, environment=launched)
    with pytest.raises(ValueError, match="asked for DeepSpeed, but the run got DDP"):
        check_engine(engine(), environment={"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(ValueError, match="asked for FSDP, but the run got one process"):
        check_engine(engine("single", 1), environment={"ACCELERATE_USE_FSDP": "true"})


@pytest.mark.parametrize(
    "wrote, reads, whole, plan",
    [
        (("ddp", 2), ("single", 1), False, "state"),
        (("single", 1), ("ddp", 4), False, "state"),
        (("fsdp2", 8), ("fsdp2", 4), False, "state"),
        (("zero2", 4), ("zero2", 4), True, "state"),
        (("zero2", 4), ("zero2", 2), True, "weights"),
        (("zero3", 4), ("fsdp2", 4), True, "weights"),
        (("fsdp2", 4), ("zero3", 4), False, None),
        (("zero1", 2), ("zero2", 2), True, "weights"),
    ],
)
def test_resume_plan(
    tmp_path: Path, wrote: tuple[str, int], reads: tuple[str, int], whole: bool, plan: str | None
) -> None:
    from sparse_hf_training.engines import record_engine

    record_engine(engine(*wrote), tmp_path)
    if whole:
        (tmp_path / "model.safetensors").touch()
    if plan is None:
        with pytest.raises(ValueError, match="holds no whole weights that DeepSpeed ZeRO-3"):
            resume_plan(engine(*reads), tmp_path)
    else:
        assert resume_plan(engine(*reads), tmp_path) == plan


ACCELERATE_CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [None, 1, 2, 4, 8])
def test_accelerate_configs_are_what_their_names_say(path: Path, gpus: int | None) -> None:
    """accelerate's own parser and loader, with the number of GPUs on the command line."""
    pytest.importorskip("deepspeed")
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DistributedType

    loaded = load_config_from_file(str(path))
    name, _, nodes = path.stem.partition("_")
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert loaded.distributed_type == kinds.get(name, DistributedType.DEEPSPEED)
    words = ["--config_file", str(path), *([] if gpus is None else ["--num_processes", str(gpus)]), "scripts/train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    machines = 2 if nodes == "2nodes" else 1
    assert arguments.num_machines == machines and arguments.num_processes == (gpus or 8 * machines)
    if name == "fsdp2":
        assert arguments.use_fsdp and int(arguments.fsdp_version) == 2
        assert "SHARDED" in arguments.fsdp_state_dict_type
        assert str(arguments.fsdp_cpu_ram_efficient_loading).lower() == "false"
    elif name.startswith("zero"):
        assert arguments.use_deepspeed and (arguments.zero3_init_flag in (True, "true")) == (name == "zero3")
        assert json.loads((ROOT / arguments.deepspeed_config_file).read_text())["zero_optimization"]["stage"] == int(
            name[-1]
        )


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_configs_are_what_their_names_say(path: Path, tmp_path: Path) -> None:
    """transformers fills in `auto`, and DeepSpeed reads what comes out."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=3, gradient_accumulation_steps=4)
    shape = AutoModelForCausalLM.from_config(_tiny())
    filled = HfTrainerDeepSpeedConfig(str(path))
    try:
        filled.trainer_config_process(arguments)
        filled.trainer_config_finalize(arguments, shape, 3)
        config = DeepSpeedConfig(filled.config)
    finally:
        unset_hf_deepspeed_config()
    zero: Any = config.zero_config
    assert int(zero.stage) == int(path.stem[4]) and config.gradient_accumulation_steps == 4
    offloaded = {"zero2_offload": (True, False), "zero3_offload": (True, True)}.get(path.stem, (False, False))
    assert (zero.offload_optimizer is not None, zero.offload_param is not None) == offloaded
    assert "optimizer" not in filled.config and "auto" not in json.dumps(filled.config)


def _tiny() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("stage", ["masks", "masks_and_weights", "sft"])
def test_launch_script_starts_each_stage(stage: str, tmp_path: Path) -> None:
    """The command that it would run, from a stand-in for accelerate."""
    (tmp_path / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NUM_GPUS": "4", "NUM_NODES": "2"}
    environment |= {"NODE_RANK": "1", "MAIN_ADDRESS": "10.0.0.1"}
    script = ROOT / "scripts" / "launch" / "stage.sh"
    done = subprocess.run(
        [str(script), stage, "fsdp2", "output_dir=x y"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    words = done.stdout.splitlines()
    assert done.returncode == 0 and words[0] == "launch", done.stderr
    assert words[words.index("--num_processes") + 1] == "8" and words[words.index("--machine_rank") + 1] == "1"
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    at = words.index("scripts/train.py")
    assert (ROOT / words[at + 1]).is_file() and words[at + 2 :] == ["num_processes=8", "output_dir=x y"]
    loaded = RunConfig.load(ROOT / words[at + 1])
    assert loaded.stage == stage and yaml.safe_load((ROOT / words[at + 1]).read_text())["output_dir"]
