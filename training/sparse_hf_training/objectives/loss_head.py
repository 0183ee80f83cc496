"""`LossHead`: a model's output embedding that returns the loss instead of logits, for one forward pass at a time.

The loss is computed where the engines have the embedding's weight gathered: inside its `forward`, within the hooks that
FSDP2 and ZeRO-3 put around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_hf_training.objectives.chunked import (
    LabelTokens,
    OutputProjection,
    TeacherStates,
    chunked_objective,
    is_plain_linear,
)
from sparse_hf_training.objectives.config import ObjectiveConfig
from sparse_hf_training.objectives.liger import is_liger_installed, liger_cross_entropy

logger = logging.getLogger(__name__)

# Stands beside the loss where logits are expected; scaling or a softcap would change it. Exact in bf16 and fp16.
_MARK = 8192.0


@dataclass(frozen=True, kw_only=True)
class ObjectiveValue:
    """The loss, and each term's sum over the label tokens, unweighted and detached."""

    loss: Tensor
    terms: dict[str, Tensor]
    outputs: Any


class LossHead:
    """The output embedding of one causal language model, with or without an engine around the model.

    Between calls the model is untouched: its logits are logits.

    Raises:
        ValueError: if the model has no output embedding.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Module):
            raise ValueError(f"{type(model).__name__} has no output embedding; the objectives need a causal LM")
        self.module = module
        self.kernels: set[str] = set()
        """What computed losses so far: `torch`, `liger`."""
        self._compute: Callable[[Tensor], Tensor] | None = None
        self._original: Callable[[Tensor], Tensor] | None = None
        self._marks_checked: set[str] = set()
        # One object for all calls, so that a compiled model meets the same function each time.
        self._forward = torch.compiler.disable(self._replaced_forward)

    def loss(
        self,
        run: Callable[[], Any],
        kept: Tensor,
        targets: Tensor,
        objective: ObjectiveConfig,
        *,
        teacher: TeacherStates | None = None,
        scale: Tensor | float = 1.0,
    ) -> ObjectiveValue:
        """The objective of a forward pass.

        Args:
            run: calls the model, engine and all, without labels, and returns its output.
            kept: `[batch, seq_len]`, where a label is predicted.
            targets: `[num_labels]`, those labels.
            objective: terms and how to compute them.
            teacher: for the KL and hidden terms.
            scale: of the loss, such as 1 / number of label tokens in the optimizer step.

        Returns:
            `loss` scaled, with gradients; 0, with gradients of zero, where nothing is kept. `outputs` has no logits.

        Raises:
            ValueError: for a model that changes its logits after the embedding (scaling, softcap), or hidden states
                that do not fit `kept`.
        """
        tokens = LabelTokens(positions=kept.flatten().nonzero().squeeze(1), targets=targets)
        exact: list[Tensor] = []
        terms: dict[str, Tensor] = {}

        def compute(hidden: Tensor) -> Tensor:
            _check_shape(hidden, kept)
            loss, values = self._objective(hidden, tokens, objective, teacher, scale)
            exact.append(loss.detach())
            terms.update(values)
            return torch.stack([loss, loss.new_full((), _MARK)])

        outputs = self._run(run, compute, "loss")
        through = outputs.logits[0].float()
        outputs.logits = None
        # An engine may cast what a model returns to bf16; the gradient goes through it, the value need not.
        return ObjectiveValue(loss=exact[0] + (through - through.detach()), terms=terms, outputs=outputs)

    @torch.no_grad()
    def final_states(self, run: Callable[[], Any], kept: Tensor) -> Tensor:
        """The final hidden states `[num_labels, hidden_size]` at the kept positions; arguments and errors as `loss`."""
        states: list[Tensor] = []

        def compute(hidden: Tensor) -> Tensor:
            _check_shape(hidden, kept)
            states.append(hidden[kept])
            return hidden.new_full((2,), _MARK, dtype=torch.float32)

        self._run(run, compute, "states")
        return states[0]

    def _run(self, run: Callable[[], Any], compute: Callable[[Tensor], Tensor], kind: str) -> Any:
        with self._replaced(compute):
            outputs = run()
            if self._compute is not None:
                raise ValueError("the model did not use its output embedding; the objectives need a causal LM")
        if kind not in self._marks_checked:
            logits = outputs.logits
            if logits.shape != (2,) or logits[1].item() != _MARK:
                raise ValueError(
                    "the model changes its logits after the output embedding (scaling or a softcap), which the "
                    "chunked objectives do not follow; use a model without final logit scaling"
                )
            self._marks_checked.add(kind)
        return outputs

    @contextmanager
    def _replaced(self, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
        own = self.module.__dict__.get("forward")  # another wrapper's, to be put back
        self._original, self._compute = self.module.forward, compute
        self.module.forward = self._forward
        try:
            yield
        finally:
            self._original = self._compute = None
            if own is None:
                del self.module.forward
            else:
                self.module.forward = own

    def _replaced_forward(self, hidden: Tensor) -> Tensor:
        compute, self._compute = self._compute, None
        if compute is None:
            raise ValueError("the model uses its output embedding twice in one forward pass, which is not supported")
        return compute(hidden)

    def _objective(
        self,
        hidden: Tensor,
        tokens: LabelTokens,
        objective: ObjectiveConfig,
        teacher: TeacherStates | None,
        scale: Tensor | float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._original is not None
        kernel = self._choose(hidden, objective, is_plain_linear(self.module, self._original))
        # Liger takes no empty batch, and skips the weight's gradient when the rows have none.
        if kernel == "torch" or not tokens.targets.numel() or (torch.is_grad_enabled() and not hidden.requires_grad):
            projection = OutputProjection(self.module, self._original)
            return chunked_objective(hidden, projection, tokens, objective, teacher, scale)
        rows = hidden.flatten(0, -2).index_select(0, tokens.positions)
        lm = liger_cross_entropy(rows, self.module.weight, self.module.bias, tokens.targets)  # type: ignore[arg-type]
        return objective.lm * lm * scale, {"lm": lm.detach()}

    def _choose(self, hidden: Tensor, objective: ObjectiveConfig, plain: bool) -> str:
        reasons = {
            "the objective has other terms than lm": not objective.only_lm,
            "the tensors are not on CUDA": hidden.device.type != "cuda",
            "the output embedding is no plain linear layer": not plain,
            "liger_kernel is not installed": not is_liger_installed(),
        }
        against = [reason for reason, holds in reasons.items() if holds]
        if objective.kernel == "liger" and against:
            raise ValueError(f"objective: kernel liger cannot be used: {against[0]}; set kernel to auto or torch")
        kernel = "torch" if objective.kernel == "torch" or against else "liger"
        if kernel not in self.kernels:
            logger.info("the loss is computed by %s%s", kernel, f" ({against[0]})" if against else "")
            self.kernels.add(kernel)
        return kernel


def _check_shape(hidden: Tensor, kept: Tensor) -> None:
    if hidden.shape[:-1] != kept.shape:
        raise ValueError(f"hidden states of {list(hidden.shape[:-1])} tokens do not fit labels of {list(kept.shape)}")
