"""The weights' parameter groups, and the optimizer of the gates, which belongs to no training engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_hf.artefact import read_tensors
from sparse_hf_training.masks import MaskLearning

OPTIMIZER_FILE = "mask_optimizer.safetensors"


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters. Gates and multipliers are none of them: they belong to `MaskOptimizer`."""
    return [p for p in model.parameters() if p.requires_grad]


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: trainable weights with and without decay; one empty group where none trains.

    Args:
        model: with gates attached, or without.
        weight_decay: of matrices; biases and norms (fewer than two dimensions) never decay.
    """
    weights = weight_parameters(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if _ndim(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if _ndim(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] or groups[:1]


def _ndim(parameter: nn.Parameter) -> int:
    # ZeRO-3 leaves an empty 1-D tensor in the place of what it shards, and the shape beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))


class MaskOptimizer:
    """AdamW over the gates and multipliers of one model, the same under every training engine.

    The engine that trains the weights (DDP, FSDP, DeepSpeed) never sees the gates, so what it does to its parameters
    (sharding, casts, loss scaling, clipping, schedules, weight decay) does not reach them. Weight decay alone would
    drive gates to 1/2: PruLong's recipe decays log_alpha from 4.0 to 1.4 in 10 steps without any gradient.

    Args:
        learning: gates and multipliers; their learning rates come from its configuration.
        betas, eps: of AdamW.
    """

    def __init__(self, learning: MaskLearning, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> None:
        self._learning, self._named = learning, dict(learning.named_parameters())
        gates = [p for name, p in self._named.items() if name.startswith("gates.")]
        multipliers = [p for name, p in self._named.items() if not name.startswith("gates.")]
        groups = [
            {"params": gates, "lr": learning.config.mask_learning_rate},
            {"params": multipliers, "lr": learning.config.reg_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=0.0)
        self._rates: list[float] = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Gates first, then multipliers."""
        return self._optimizer.param_groups

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Takes the mean of the gradients over all processes. Call it once per step, after the last micro-batch.

        One collective over a few hundred numbers. Every process must call it; a missing gradient counts as zero.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        parameters = list(self._named.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = mean.view_as(parameter).clone()

    def step(self) -> None:
        """Updates gates and multipliers and drops their gradients."""
        factor = self._learning.config.rate_factor(self._learning.step, self._learning.max_steps)
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Writes the moments and step counts."""
        tensors = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in self._named.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        save_file(tensors, folder / OPTIMIZER_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Reads them back.

        Raises:
            ValueError: if the file is missing or corrupt, or belongs to other gates.
        """
        tensors = read_tensors(folder / OPTIMIZER_FILE)
        state: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter_name, _, key = name.rpartition(".")
            parameter = self._named.get(parameter_name)
            if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
                raise ValueError(f"{folder / OPTIMIZER_FILE}: {name} {list(tensor.shape)} belongs to other gates")
            state.setdefault(parameter_name, {})[key] = tensor if key == "step" else tensor.to(parameter.device)
        for name, values in state.items():
            self._optimizer.state[self._named[name]] = values
