"""The weighted sum of the terms over chunks of label tokens, so that only one chunk's logits exist at a time.

The gradients of the hidden states and of the output embedding are computed chunk by chunk in the forward pass, where
the chunk's logits are, and scaled in the backward pass: no logits are kept and none are computed twice (as in
https://github.com/mgmalek/efficient_cross_entropy and Liger). The embedding's weight is then not needed in the backward
pass, which suits engines that release it after the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_hf_training.objectives.config import ObjectiveConfig
from sparse_hf_training.objectives.hidden_distillation import hidden_distillation_loss
from sparse_hf_training.objectives.language_modeling import language_modeling_loss
from sparse_hf_training.objectives.logit_distillation import distillation_loss

Project = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LabelTokens:
    """The positions that predict a label, `[num_labels]` into the flattened `[batch * seq_len]`, and the labels."""

    positions: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class TeacherStates:
    """What the terms need of the teacher.

    Args:
        states: its final hidden states at the label tokens, `[num_labels, teacher_hidden_size]`.
        project: its output embedding; None where it shares the student's.
    """

    states: Tensor
    project: Project | None = None


class OutputProjection:
    """Logits from rows, and the leaves whose gradients they have.

    A plain linear layer is computed on aliases of its weights, cast once to autocast's dtype: autograd then meets no
    hook that an engine put on the parameters. Any other module or function (adapters, offload hooks) is called as is.
    """

    def __init__(self, module: nn.Module, forward: Project) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        device = next(module.parameters()).device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device)
        if not is_plain_linear(module, forward):
            self.leaves: list[Tensor] = list(self.parameters)
            self.project = forward
            self.precision: Callable[[], AbstractContextManager[Any]] = nullcontext
            return
        aliases = {
            name: p.detach().to(dtype if autocast else p.dtype).requires_grad_(p.requires_grad)
            for name, p in module.named_parameters()
        }
        weight, bias = aliases["weight"], aliases.get("bias")
        self.leaves = [alias for alias in aliases.values() if alias.requires_grad]
        self.project = lambda rows: F.linear(rows.to(weight.dtype), weight, bias)
        self.precision = partial(torch.autocast, device, dtype, False)


def is_plain_linear(module: nn.Module, forward: Project) -> bool:
    # By the function, not the class: FSDP2 gives what it shards a class of its own, and wrappers replace the function.
    return isinstance(module, nn.Linear) and getattr(forward, "__func__", None) is nn.Linear.forward


def chunked_objective(
    hidden: Tensor,
    projection: OutputProjection,
    tokens: LabelTokens,
    objective: ObjectiveConfig,
    teacher: TeacherStates | None = None,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms over all label tokens, times `scale`.

    Args:
        hidden: final hidden states `[batch, seq_len, hidden_size]`.
        projection: the output embedding.
        tokens: where the loss is taken.
        objective: terms, weights, temperature and chunk size.
        teacher: for the KL and hidden terms.
        scale: of the loss, such as 1 / number of label tokens. Given here, the backward pass receives 1, which no
            engine's output cast can round.

    Returns:
        The loss (fp32, differentiable once, in `hidden` and the embedding's parameters), and each term's sum,
        unweighted and unscaled. `lm` is among them wherever logits are computed.
    """
    chunks = _Chunks(projection, tokens, objective, teacher, torch.is_grad_enabled())
    scale = torch.as_tensor(scale, dtype=torch.float32, device=hidden.device)
    loss = _ChunkedObjective.apply(chunks, scale, hidden, *projection.parameters)
    return loss, chunks.terms


@dataclass
class _Chunks:
    projection: OutputProjection
    tokens: LabelTokens
    objective: ObjectiveConfig
    teacher: TeacherStates | None
    with_gradient: bool

    def __post_init__(self) -> None:
        self.terms: dict[str, Tensor] = {}

    def run(self, hidden: Tensor, hidden_needs_grad: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The loss, and its gradients in `hidden` and in the projection's leaves."""
        flat = hidden.detach().flatten(0, -2)
        total = flat.new_zeros((), dtype=torch.float32)
        self.terms = {name: torch.zeros_like(total) for name in self._names()}
        leaves = self.projection.leaves if self.with_gradient else []
        hidden_needs_grad = hidden_needs_grad and self.with_gradient
        grad_hidden = torch.zeros_like(flat) if hidden_needs_grad else None
        accumulators: list[Tensor | None] = [None] * len(leaves)
        num_labels, size = self.tokens.targets.numel(), self.objective.chunk_tokens
        for part in (slice(start, start + size) for start in range(0, num_labels, size)):
            rows = flat[self.tokens.positions[part]].requires_grad_(hidden_needs_grad)
            # A chunk's tensors live for a moment: the caller's hooks (offload to the CPU) must not see them.
            hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
            with torch.set_grad_enabled(self.with_gradient), self.projection.precision(), hooks:
                loss = self._loss(rows, part)
            total += loss.detach()
            wanted = ([rows] if hidden_needs_grad else []) + leaves
            if not (wanted and loss.requires_grad):
                continue
            gradients = list(torch.autograd.grad(loss, wanted, allow_unused=True))
            del loss
            if grad_hidden is not None:
                row_gradient = gradients.pop(0)
                assert row_gradient is not None
                grad_hidden[self.tokens.positions[part]] = row_gradient
            for i, gradient in enumerate(gradients):
                accumulators[i] = _add(accumulators[i], gradient, last=num_labels <= size)
        sums = [torch.zeros_like(leaf) if a is None else a for leaf, a in zip(leaves, accumulators, strict=True)]
        return total, None if grad_hidden is None else grad_hidden.view_as(hidden), sums

    def _names(self) -> list[str]:
        active = {"lm": self.objective.needs_logits, "kl": self.objective.kl > 0, "hidden": self.objective.hidden > 0}
        return [name for name, on in active.items() if on]

    def _loss(self, rows: Tensor, part: slice) -> Tensor:
        objective, values = self.objective, {}
        if objective.needs_logits:
            logits = self.projection.project(rows)
            targets = self.tokens.targets[part]
            # Before the teacher's logits: autocast's cache would serve a cast made without gradient to the student.
            values["lm"] = language_modeling_loss(logits if objective.lm else logits.detach(), targets)
            if objective.kl:
                values["kl"] = distillation_loss(logits, self._teacher_logits(part), objective.temperature)
        if objective.hidden:
            values["hidden"] = hidden_distillation_loss(rows, self._teacher_states(part))
        for name, value in values.items():
            self.terms[name] += value.detach()
        weights = {"lm": objective.lm, "kl": objective.kl, "hidden": objective.hidden}
        return torch.stack([weights[name] * value for name, value in values.items() if weights[name]]).sum()

    def _teacher_states(self, part: slice) -> Tensor:
        if self.teacher is None:
            raise ValueError("the kl and hidden terms need a teacher's final hidden states")
        return self.teacher.states[part]

    @torch.no_grad()
    def _teacher_logits(self, part: slice) -> Tensor:
        states = self._teacher_states(part)
        assert self.teacher is not None
        if self.teacher.project is None:
            return self.projection.project(states)
        with torch.autocast(states.device.type, enabled=False):  # in the precision of the teacher's own forward pass
            return self.teacher.project(states)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _add(accumulator: Tensor | None, gradient: Tensor | None, *, last: bool) -> Tensor | None:
    """Adds a chunk's gradient, in fp32 where there are several chunks."""
    if gradient is None or (accumulator is None and last):
        return gradient if accumulator is None else accumulator
    if accumulator is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return accumulator.add_(gradient)


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, scale: Tensor, hidden: Tensor, *parameters: Tensor) -> Tensor:
        total, grad_hidden, grad_leaves = chunks.run(hidden, ctx.needs_input_grad[2])
        # Not by save_for_backward: used at once, they are nothing to pack or to send to another device.
        ctx.gradients, ctx.scale, ctx.dtypes = (grad_hidden, grad_leaves), scale, [p.dtype for p in parameters]
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the objective's gradients were used already; compute the loss again")
        grad_hidden, grad_leaves = ctx.gradients
        ctx.gradients = None
        grad = grad.float() * ctx.scale
        scaled = [g.mul_(grad).to(dtype) for g, dtype in zip(grad_leaves, ctx.dtypes, strict=True)]
        return None, None, None if grad_hidden is None else grad_hidden.mul_(grad), *scaled
