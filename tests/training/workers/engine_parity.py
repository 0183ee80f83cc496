"""Trains a tiny model under one engine after another and writes what it saw; started by torchrun, or called in-process.

    torchrun --nproc_per_node 2 engine_parity.py cpu|cuda|cuda-bf16 FOLDER CASE ...

FOLDER holds the base model in `model` and an adapter for it in `adapter`. A case is `engine:stage` and leaves
`FOLDER/engine-stage.pt`: the losses of the steps, every gradient of the first optimizer step (whole, averaged over the
processes), and what was trained. A case `engine:stage:RUN` goes on from `FOLDER/RUN/checkpoint-2`, or from its own
where RUN is `own`, and leaves `FOLDER/engine-stage-RUN.pt`. An engine's name may end in `_offload`, `_sp2` (two
processes share each row) or `_compiled` (the layers); all see the same rows, whatever the number of processes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf.lora import adapter_targets, save_adapter
from sparse_hf.patching import set_head_masks
from sparse_hf_training.compile_layers import CompileConfig, compile_layers
from sparse_hf_training.data import collate
from sparse_hf_training.engines import whole_weights
from sparse_hf_training.engines.cpu import allow_fsdp_on_cpu
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.objectives import ObjectiveConfig, outside_zero3
from sparse_hf_training.peft import LoraConfig, add_lora, load_base
from sparse_hf_training.sequence_parallel import sequence_parallel
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.trainer import SparseTrainer

CONFIGS = Path(__file__).parents[3] / "configs" / "deepspeed"
STEPS, ACCUMULATION, SEQ_LEN, VOCAB = 3, 2, 64, 97
ROWS = 4
"""Of all processes in a micro-batch."""
MASKS = MaskLearningConfig(end_head_sparsity=0.5, mask_learning_rate=0.1, reg_learning_rate=0.1, init_log_alpha=0.5)
DEVICE = "cpu"
"""`cuda` for the fused kernels and NCCL; `cuda-bf16` for bf16 weights as well."""
OBJECTIVES = {
    "masks": ObjectiveConfig(lm=0.5, kl=1.0),
    "masks_and_weights": ObjectiveConfig(lm=1.0, kl=0.5),
    "lora": ObjectiveConfig(lm=1.0, kl=0.5),  # masks and weights, with an adapter
    "qlora": ObjectiveConfig(lm=1.0, kl=0.5),  # the same over weights in 4 bits
    "sft": ObjectiveConfig(lm=1.0, kl=0.0),
    "sft_taught": ObjectiveConfig(lm=0.5, kl=1.0),  # with a teacher of its own
}


class PackedRows(Dataset):  # type: ignore[type-arg]
    """Random rows of two packed documents each; label tokens differ in number from row to row."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCAB, (SEQ_LEN,), generator=torch.Generator().manual_seed(index))
        border = 20 + 5 * (index % 6)
        labels = ids.clone()
        labels[: 7 * (index % 4)] = -100
        labels[border] = -100
        positions = torch.cat([torch.arange(border), torch.arange(SEQ_LEN - border)])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def save_base_model(folder: Path) -> None:
    """A tiny random Llama with grouped queries, which every engine loads: under ZeRO-3 random ones would differ.

    The adapter moves what the model computes: a fresh one's A has no gradient.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    add_lora(model, LoraConfig(rank=4, alpha=8))
    with torch.no_grad():
        for parameter in adapter_targets(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, folder / "adapter", base_model_name_or_path=str(folder / "model"))


def dtype() -> torch.dtype:
    return torch.bfloat16 if DEVICE.endswith("bf16") else torch.float32


def split(engine: str) -> tuple[str, str]:
    """The engine that `SparseTrainer` sees, and what is special about the case."""
    base, _, variant = engine.partition("_")
    return base, variant


def load_model(folder: Path, stage: str) -> PreTrainedModel:
    device = DEVICE if DEVICE == "cpu" else torch.device("cuda", torch.cuda.current_device())
    name = str(folder / ("adapter" if "lora" in stage else "model"))
    model = load_base(name, dtype(), quantization="nf4" if stage == "qlora" else None, device=device)
    return sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=1, window_size=6), head_masks="all_full"))


def deepspeed_config(name: str) -> dict[str, Any]:
    """The configuration that is shipped, made to shard the tiny model's weights and not to pin memory for a GPU."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 100
    for part in ("offload_optimizer", "offload_param"):
        zero.get(part, {}).pop("pin_memory", None)
    return config


def arguments(folder: Path, engine: str, **overrides: Any) -> TrainingArguments:
    base, variant = split(engine)
    world = 1 if base == "single" else int(os.environ["WORLD_SIZE"])
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS * (2 if variant == "sp2" else 1) // world,
        "gradient_accumulation_steps": ACCUMULATION,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-4,  # or the rounding of gradients near 0 becomes steps of the whole rate
        "max_grad_norm": 0.2,  # the gradients are larger
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": DEVICE == "cpu",
        "bf16": DEVICE.endswith("bf16"),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": base in ("ddp", "zero3"),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    if base.startswith("zero"):
        values["deepspeed"] = deepspeed_config(engine if variant == "offload" else base)
    if base == "fsdp2":
        values |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
        values["fsdp_config"]["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer"]
    args = TrainingArguments(**{**values, **overrides})
    args._n_gpu = min(args.n_gpu, 1)  # no DataParallel where one process sees several GPUs
    return args


@contextmanager
def fresh_state() -> Iterator[None]:
    """accelerate's process-wide state, for one engine after another."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    def reset() -> None:
        for variable in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[variable]
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    try:
        yield
    finally:
        reset()
        gc.collect()


class Watch(TrainerCallback):
    """Keeps what a run begins with and saves, and the gradients of its first step, whole, before they are clipped."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = trainer
        self.weights: dict[str, torch.Tensor] = {}
        self.begun_with: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}
        self.gates: dict[str, torch.Tensor] = {}

    def state(self) -> dict[str, Any]:
        trainer = self.trainer
        moments = [float(state["step"]) for state in trainer.optimizer.state.values() if "step" in state]
        return {
            "weights": weights_of(trainer),
            "gates": gates_of(trainer),
            "step": trainer.state.global_step,
            "moments": max(moments, default=0),
        }

    def on_save(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.saved = self.state()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun_with = self.state()
        # accelerate lets DeepSpeed clip and step at the end of the backward pass.
        deepspeed = self.trainer.engine.is_deepspeed
        owner, name = (self.trainer.model_wrapped, "step") if deepspeed else (self.trainer, "_clip_grad_norm")
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            self.keep_weights()
            return original(*args)

        setattr(owner, name, watched)

    def keep_weights(self) -> None:
        if not self.weights:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            self.weights = {n: whole_gradient(p) for n, p in model.named_parameters() if p.requires_grad}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.learning is not None and not self.gates:
            for name, parameter in self.trainer.learning.named_parameters():
                assert parameter.grad is not None and parameter.dtype == torch.float32
                self.gates[name] = parameter.grad.cpu().clone()


def weights_of(trainer: SparseTrainer) -> dict[str, torch.Tensor]:
    """Whole weights, on the main process."""
    found = whole_weights(trainer.accelerator, trainer.model_wrapped)
    return {name: tensor.cpu().clone() for name, tensor in found.items()}


def gates_of(trainer: SparseTrainer) -> dict[str, torch.Tensor]:
    """Gates and multipliers; none where masks are frozen."""
    learning = trainer.learning
    return {} if learning is None else {n: t.cpu().clone() for n, t in learning.state_dict().items()}


def whole_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
    else:
        gradient = parameter.grad
    assert gradient is not None
    full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return full.detach().float().cpu().clone()


def make_trainer(folder: Path, engine: str, stage: str, **overrides: Any) -> SparseTrainer:
    args = arguments(folder / f"{engine}-{stage}", engine, **overrides)
    allow_fsdp_on_cpu(args)
    model = load_model(folder, stage)
    teacher = None
    if stage.startswith("sft"):
        set_head_masks(model, torch.tensor([[1, 0], [0, 1]]))
    if stage == "sft_taught":
        with outside_zero3():
            teacher = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype())
    real: Any = {"lora": "masks_and_weights", "qlora": "masks_and_weights", "sft_taught": "sft"}.get(stage, stage)
    prepare_stage(model, real, MASKS)
    if split(engine)[1] == "compiled":
        compile_layers(model, CompileConfig())
    objective = OBJECTIVES[stage]
    return SparseTrainer(
        model, args, train_dataset=PackedRows(), data_collator=collate, objective=objective, teacher=teacher
    )


def run_case(folder: Path, engine: str, stage: str, resume: Path | None = None) -> dict[str, Any]:
    with fresh_state():
        trainer = make_trainer(folder, engine, stage, **({} if resume is None else {"save_strategy": "no"}))
        watch = Watch(trainer)
        trainer.add_callback(watch)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with sequence_parallel([trainer.model], 2 if split(engine)[1] == "sp2" else 1):
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        check_engine(trainer, engine, stage)
        result: dict[str, Any] = {
            "engine": trainer.engine.name,
            "num_processes": trainer.engine.num_processes,
            "begun_with": watch.begun_with,
            "saved": watch.saved,
            "gradients": {**watch.weights, **watch.gates},
            "weights": weights_of(trainer),
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "gates": gates_of(trainer),
        }
    return result


def check_engine(trainer: SparseTrainer, engine: str, stage: str) -> None:
    """That the weights really are where the engine should have put them."""
    base, variant = split(engine)
    expected = 1 if base == "single" else int(os.environ["WORLD_SIZE"])
    found = trainer.engine
    assert (found.name, found.num_processes) == (base, expected), found
    assert expected == 1 or dist.get_world_size() == expected
    kind = type(trainer.model_wrapped).__name__
    weight = trainer.accelerator.unwrap_model(trainer.model).model.layers[0].mlp.up_proj.weight
    if variant == "compiled":
        # Both layers share one, unless the first one's input, of a frozen embedding, has no gradient.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if stage == "lora" else 1)
    if base == "ddp":
        assert (kind == "DistributedDataParallel") == (stage != "masks"), kind
    elif base == "fsdp2":
        from torch.distributed.tensor import DTensor

        assert kind.startswith("FSDP") and isinstance(weight, DTensor), kind
        assert weight.to_local().shape[0] * expected == weight.shape[0]
    elif base.startswith("zero"):
        assert kind == "DeepSpeedEngine" and trainer.model_wrapped.zero_optimization_stage() == int(engine[4]), kind
        assert trainer.engine.offload == {"zero2_offload": ("optimizer",), "zero3_offload": ("optimizer", "param")}.get(
            engine, ()
        )
        assert base != "zero3" or weight.ds_tensor.numel() * expected == weight.ds_numel


def main(device: str, folder: Path, cases: list[str]) -> None:
    global DEVICE
    DEVICE = device
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    for case in cases:
        engine, stage, *source = case.split(":")
        own = f"{engine}-{stage}"
        run = own if source == ["own"] else "".join(source)
        result = run_case(folder, engine, stage, folder / run / "checkpoint-2" if source else None)
        gates: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gates, result["gates"])
        assert all(torch.equal(gates[0][n], other[n]) for other in gates for n in gates[0]), "gates differ by rank"
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{'-'.join([own, *source])}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
