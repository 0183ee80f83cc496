"""DDP, FSDP2 and ZeRO-1/2/3 in two processes on the CPU give the losses, gradients and weights of one process.

With LoRA, compiled layers and shared rows too; and a run goes on under another number of processes.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

WORKER = Path(__file__).parent / "workers" / "engine_parity.py"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STAGES = ("masks", "masks_and_weights", "sft", "sft_taught", "lora", "qlora")
PARITY = [f"{engine}:masks_and_weights" for engine in ENGINES]
PARITY += ["ddp:masks", "zero2:masks", "zero3:masks", "fsdp2:masks", "zero3:sft", "fsdp2:sft"]
PARITY += ["zero3:sft_taught", "fsdp2:sft_taught", "zero2_offload:masks_and_weights", "zero3_offload:masks"]
PARITY += ["fsdp2:lora", "zero3:lora", *(f"{engine}_sp2:lora" for engine in ENGINES if engine != "zero1")]
PARITY += ["ddp:qlora", "zero2:qlora", "ddp_sp2:qlora"]
PARITY += ["ddp_compiled:masks_and_weights", "fsdp2_compiled:masks_and_weights", "fsdp2_compiled:lora"]
RESUMED = [f"{engine}:masks_and_weights:own" for engine in ("ddp", "zero2", "zero3", "fsdp2")] + ["zero3:masks:own"]
RESUMED += ["fsdp2:lora:own", "zero3:lora:own", "fsdp2_sp2:lora:own", "zero2:qlora:own"]
TAKEN_OVER = ["zero2:masks_and_weights:single-masks_and_weights", "zero3:masks_and_weights:zero2-masks_and_weights"]
TAKEN_OVER += ["fsdp2:masks_and_weights:single-masks_and_weights"]


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_parity", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    pytest.importorskip("deepspeed")
    return load_worker()


@pytest.fixture(scope="module")
def folder(worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    worker.save_base_model(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(worker: ModuleType, folder: Path) -> dict[str, Any]:
    return {stage: worker.run_case(folder, "single", stage) for stage in STAGES}


@pytest.fixture(scope="module")
def two_processes(folder: Path, one_process: dict[str, Any]) -> dict[str, Any]:
    return launch("cpu", folder, PARITY + RESUMED + TAKEN_OVER)


def launch(device: str, folder: Path, cases: list[str], num_processes: int = 2) -> dict[str, Any]:
    """What the worker saw, case by case; one launch for all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [*LAUNCHER, str(num_processes), str(WORKER), device, str(folder), *cases],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(500)  # DeepSpeed builds its shared-memory collectives at the first use on a machine
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    assert code == 0, (folder / "log").read_text()[-4000:]
    return {case: torch.load(folder / f"{case.replace(':', '-')}.pt") for case in cases}


@pytest.mark.parametrize("case", PARITY)
def test_two_processes_equal_one(case: str, one_process: dict[str, Any], two_processes: dict[str, Any]) -> None:
    engine, stage = case.split(":")
    expected, found = one_process[stage], two_processes[case]
    assert (found["engine"], found["num_processes"]) == (engine.partition("_")[0], 2)
    assert (expected["engine"], expected["num_processes"]) == ("single", 1)
    found["gradients"].pop("sparse_hf_unused", None)
    assert set(found["gradients"]) == set(expected["gradients"])
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-5) and len(found["losses"]) == 3
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    for name, tensor in expected["gates"].items():
        torch.testing.assert_close(found["gates"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda-bf16"])
def test_two_gpus_equal_one(device: str, worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernels over NCCL. In bf16 engines round at different places: the first gradients point one way."""
    worker.save_base_model(tmp_path)
    monkeypatch.setattr(worker, "DEVICE", device)
    quantizes = importlib.util.find_spec("bitsandbytes") is not None  # GPU machines may lack it
    cases = [case for case in PARITY if quantizes or not case.endswith(":qlora")]
    found = launch(device, tmp_path, cases)
    stages = {case.split(":")[1] for case in cases}
    one = {stage: worker.run_case(tmp_path, "single", stage) for stage in stages}
    bf16 = device.endswith("bf16")
    for case, seen in found.items():
        expected = one[case.split(":")[1]]
        assert seen["num_processes"] == 2 and seen["losses"] == pytest.approx(
            expected["losses"], abs=0.05 if bf16 else 1e-3
        )
        for name, gradient in expected["gradients"].items():
            other = seen["gradients"][name]
            if not bf16:
                torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item() + 1e-9)
            elif gradient.norm() > 0:
                assert (other * gradient).sum() / (other.norm() * gradient.norm()) > 0.98, (case, name)
                assert 0.9 < other.norm() / gradient.norm() < 1.1, (case, name)


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_run_ends_bitwise_as_one_left_alone(case: str, two_processes: dict[str, Any]) -> None:
    resumed, alone = two_processes[case], two_processes[case.removesuffix(":own")]
    for part in ("weights", "gates"):
        for name, tensor in alone[part].items():
            assert torch.equal(resumed[part][name], tensor), name
    assert resumed["losses"][-1] == alone["losses"][-1]


@pytest.mark.parametrize("case", TAKEN_OVER)
def test_other_processes_go_on_with_masks_step_and_weights(
    case: str, one_process: dict[str, Any], two_processes: dict[str, Any]
) -> None:
    """The step after the checkpoint: the same loss, and gates that go on bitwise close; moments of weights are new."""
    check_taken_over(two_processes[case], one_process["masks_and_weights"])


def check_taken_over(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["losses"]) == 3 and found["losses"][-1] == pytest.approx(expected["losses"][-1], abs=1e-4)
    for name, tensor in expected["gates"].items():
        torch.testing.assert_close(found["gates"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


FRESH = ["ddp:masks_and_weights", "fsdp2:masks_and_weights", "zero3:masks_and_weights", "fsdp2:lora"]
OTHER_NUMBER = [f"{case}:own" for case in FRESH]


@pytest.fixture(scope="module")
def four_processes(
    folder: Path, two_processes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Four that go on from two, and then four that begin anew, in a copy of the folder."""
    four = tmp_path_factory.mktemp("four") / "runs"
    shutil.copytree(folder, four)
    return four, launch("cpu", four, OTHER_NUMBER + FRESH, num_processes=4)


def check_other_number(case: str, found: dict[str, Any], saved: dict[str, Any], alone: dict[str, Any]) -> None:
    """Weights, masks and the step go on as they were saved, and end as in one process that was left alone.

    FSDP2's optimizer state is resharded; ZeRO's begins anew, so that its weights end elsewhere.
    """
    begun = found["begun_with"]
    assert begun["step"] == saved["step"] == 2 and len(found["losses"]) == 3
    assert begun["moments"] == (0 if "zero3" in case else 2)
    for part in ("weights", "gates"):
        assert saved[part] and set(begun[part]) == set(saved[part])
        for name, tensor in saved[part].items():
            assert torch.equal(begun[part][name], tensor), name
    check_taken_over(found, alone)
    for name, tensor in alone["weights"].items():
        if "zero3" not in case:
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def test_four_processes_take_over_two(
    one_process: dict[str, Any], two_processes: dict[str, Any], four_processes: tuple[Path, dict[str, Any]]
) -> None:
    for case in OTHER_NUMBER:
        left, found = two_processes[case.removesuffix(":own")], four_processes[1][case]
        assert (left["num_processes"], found["num_processes"]) == (2, 4)
        check_other_number(case, found, left["saved"], one_process[case.split(":")[1]])


def test_two_processes_take_over_four(one_process: dict[str, Any], four_processes: tuple[Path, dict[str, Any]]) -> None:
    folder, four = four_processes
    for case, found in launch("cpu", folder, OTHER_NUMBER).items():
        left = four[case.removesuffix(":own")]
        assert (left["num_processes"], found["num_processes"]) == (4, 2)
        check_other_number(case, found, left["saved"], one_process[case.split(":")[1]])


@pytest.mark.parametrize("run", ["ddp-masks_and_weights", "zero3-masks_and_weights"])
def test_one_process_takes_over_two(
    run: str, worker: ModuleType, folder: Path, one_process: dict[str, Any], two_processes: dict[str, Any]
) -> None:
    found = worker.run_case(folder, "single", "masks_and_weights", folder / run / "checkpoint-2")
    check_taken_over(found, one_process["masks_and_weights"])


def test_sharded_weights_are_refused_by_another_engine(
    worker: ModuleType, folder: Path, two_processes: dict[str, Any]
) -> None:
    checkpoint = folder / "fsdp2-masks_and_weights" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"written under fsdp2 with 2 processes and holds no whole weights"):
        worker.run_case(folder, "single", "masks_and_weights", checkpoint)
    found = worker.run_case(folder, "single", "masks", folder / "fsdp2-masks" / "checkpoint-2")
    assert len(found["losses"]) == 3


def test_checkpoints_of_frozen_weights_hold_none(folder: Path, two_processes: dict[str, Any]) -> None:
    for engine in ("ddp", "zero2", "zero3", "fsdp2"):
        checkpoint = folder / f"{engine}-masks" / "checkpoint-2"
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        assert (checkpoint / "mask_learning.safetensors").is_file() and size < 100_000, (engine, size)


@pytest.mark.parametrize(
    "run, part",
    [("zero3-lora", "global_step2"), ("zero2-qlora", "global_step2"), ("fsdp2-lora", "pytorch_model_fsdp_0")],
)
def test_checkpoints_of_adapters_hold_no_base_weights(
    run: str, part: str, folder: Path, two_processes: dict[str, Any]
) -> None:
    """Beside the optimizer's state, what an engine writes is the adapter and how its parts lie."""
    files = [path for path in (folder / run / "checkpoint-2" / part).iterdir() if "optim" not in path.name]
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert files and sum(path.stat().st_size for path in files) < 4 * adapter
    assert 8 * adapter < (folder / "model" / "model.safetensors").stat().st_size
