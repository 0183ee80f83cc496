"""Parameter groups and learning rates: gates and multipliers go their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sparse_hf_training.masks.learning import MODULE_NAME, get_mask_learning

MASK_GROUP = "sparse_hf_mask_group"


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are not gates or multipliers."""
    return [p for name, p in model.named_parameters() if p.requires_grad and MODULE_NAME not in name.split(".")]


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: weights with and without decay, then gates and multipliers.

    Gates and multipliers get their own learning rates and never decay: weight decay alone drives gates to 1/2
    (reference: PruLong's recipe decays log_alpha from 4.0 to 1.4 in 10 steps without any gradient).

    Args:
        model: with gates attached, or without (then the groups of its weights alone).
        weight_decay: of matrices; biases and norms (fewer than two dimensions) never decay.
    """
    weights = weight_parameters(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if hasattr(model, MODULE_NAME):
        learning = get_mask_learning(model)
        for module, rate in (
            (learning.gates, learning.config.mask_learning_rate),
            (learning.lagrangian, learning.config.reg_learning_rate),
        ):
            groups.append({"params": list(module.parameters()), "lr": rate, "weight_decay": 0.0, MASK_GROUP: True})
    return groups


def keep_mask_rates_constant(scheduler: LRScheduler, optimizer: Optimizer) -> LambdaLR:
    """A scheduler that does what `scheduler` does to the weights and leaves the mask groups' rates alone.

    Raises:
        ValueError: for a scheduler that is no `LambdaLR`.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"mask learning needs a scheduler made of multipliers (linear, cosine, constant, ...), "
            f"got {type(scheduler).__name__}; set trainer.lr_scheduler_type to one of those"
        )
    factors: list[Callable[[int], float]] = [
        _one if group.get(MASK_GROUP) else factor
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True)
    ]
    for group in optimizer.param_groups:
        # The first scheduler has applied its factor for step 0 (0 under warm-up) to every group.
        group["lr"] = group.pop("initial_lr")
    return LambdaLR(optimizer, factors)


def _one(step: int) -> float:
    return 1.0
