"""The chunked objectives under DDP and FSDP2: gradients of two processes, against one process on the same rows.

    torchrun --nproc_per_node 2 loss_head.py

Each process takes one row; in some cases the second has no label token. Prints one JSON line with the names of the
cases that ran, and fails where a gradient differs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf_training.objectives import LossHead, ObjectiveConfig, TeacherStates, label_positions

VOCAB, SEQ_LEN = 97, 32
SUM = ObjectiveConfig(lm=0.5, kl=2.0, hidden=3.0, chunk_tokens=5)
HIDDEN = ObjectiveConfig(lm=0.0, kl=0.0, hidden=1.0)


def tiny_model(seed: int, tied: bool) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config).train()


def ddp(model: PreTrainedModel) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: PreTrainedModel) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2_head_apart(model: PreTrainedModel) -> nn.Module:
    fully_shard(model.lm_head)
    return fsdp2(model)


def fsdp2_bf16_output(model: PreTrainedModel) -> nn.Module:
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))


def backward(
    model: PreTrainedModel, wrapped: nn.Module, rows: Tensor, labels: Tensor, objective: ObjectiveConfig, scale: float
) -> Tensor:
    teacher = tiny_model(1, tied=False)
    head, (kept, targets) = LossHead(teacher), label_positions(labels)
    states = head.final_states(lambda: teacher(rows), kept)
    sources = TeacherStates(states=states, project=head.module)
    value = LossHead(model).loss(lambda: wrapped(rows), kept, targets, objective, teacher=sources, scale=scale)
    value.loss.backward()
    return value.loss.detach()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(
    wrap: Callable[[PreTrainedModel], nn.Module], *, objective: ObjectiveConfig, tied: bool = False, empty: bool = False
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.randint(0, VOCAB, (world, SEQ_LEN), generator=torch.Generator().manual_seed(7))
    labels = rows.clone()
    labels[0, :9] = -100
    if empty:
        labels[1] = -100
    scale = 1 / int((labels[:, 1:] != -100).sum())
    expected = tiny_model(0, tied)
    loss = backward(expected, expected, rows, labels, objective, scale)
    model = copy.deepcopy(tiny_model(0, tied))
    wrapped = wrap(model)
    for _ in range(2):  # DDP misses a gradient in the step after
        model.zero_grad()
        own = slice(rank, rank + 1)
        part = backward(model, wrapped, rows[own], labels[own], objective, scale * world)
        dist.all_reduce(part)
        torch.testing.assert_close(part / world, loss)
        for name, parameter in model.named_parameters():
            theirs = expected.get_parameter(name).grad
            assert parameter.grad is not None and theirs is not None, name
            torch.testing.assert_close(whole(parameter.grad), theirs, msg=lambda text, n=name: f"{n}: {text}")


def main() -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    cases: dict[str, dict[str, Any]] = {
        "ddp": {"wrap": ddp, "objective": SUM},
        "ddp, no labels on one": {"wrap": ddp, "objective": SUM, "empty": True},
        "ddp, hidden alone": {"wrap": ddp, "objective": HIDDEN},
        "ddp, tied": {"wrap": ddp, "objective": SUM, "tied": True},
        "fsdp2": {"wrap": fsdp2, "objective": SUM},
        "fsdp2, no labels on one": {"wrap": fsdp2, "objective": SUM, "empty": True},
        "fsdp2, hidden alone": {"wrap": fsdp2, "objective": HIDDEN},
        "fsdp2, tied": {"wrap": fsdp2, "objective": SUM, "tied": True},
        "fsdp2, head apart": {"wrap": fsdp2_head_apart, "objective": SUM},
        "fsdp2, bf16 output": {"wrap": fsdp2_bf16_output, "objective": SUM},
    }
    for name, case in cases.items():
        try:
            check(**case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    if dist.get_rank() == 0:
        print(json.dumps(list(cases)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
