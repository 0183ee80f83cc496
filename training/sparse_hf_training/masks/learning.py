"""`MaskLearning`: the gates of a sparsified model, in the place where its attention and its trainer find them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparse_hf.artefact import load_artefact
from sparse_hf.head_masks import round_scores
from sparse_hf.hub import resolve_artefact_folder
from sparse_hf.patching import SparseHandle, get_handle, set_head_masks
from sparse_hf_training.masks.gates import HardConcreteGates
from sparse_hf_training.masks.lagrangian import Lagrangian
from sparse_hf_training.masks.schedule import SparsitySchedule

MODULE_NAME = "sparse_hf_masks"


@dataclass(frozen=True, kw_only=True)
class MaskLearningConfig:
    """How masks are learned.

    Args:
        start_head_sparsity, end_head_sparsity: target at the first step and after the warm-up; the masks that are
            deployed have the end's.
        sparsity_warmup_ratio: share of the steps over which the target moves.
        schedule: `linear`, `logarithmic` or `cubic`.
        mask_learning_rate: of log_alpha. Constant: the weights' schedule does not touch it.
        reg_learning_rate: of the Lagrangian's multipliers, likewise.
        init_log_alpha: first value of all gates, or their mean with `init_scores`.
        init_scores: artefact folder or Hub id whose head scores order the gates' first values (`sparse-hf calibrate
            scores` writes one); None for equal ones.
        init_spread: how far the first values of the lowest and the highest score lie from the mean.
        clamp_log_alpha, clamp_multipliers: bounds, or None.
        seed: of the gates' noise. A draw depends on the seed, the step and the micro-batch alone: all ranks draw the
            same, and a resumed run goes on as if nothing had happened.
    """

    start_head_sparsity: float = 0.0
    end_head_sparsity: float = 0.5
    sparsity_warmup_ratio: float = 0.6
    schedule: str = "linear"
    mask_learning_rate: float = 0.2
    reg_learning_rate: float = 0.05
    init_log_alpha: float = 4.0
    init_scores: str | None = None
    init_spread: float = 1.0
    clamp_log_alpha: float | None = 6.0
    clamp_multipliers: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mask_learning_rate", "reg_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.init_spread > 0:
            raise ValueError(f"init_spread must be positive, got {self.init_spread}; leave init_scores out for none")
        _ = self.sparsity_schedule

    @property
    def sparsity_schedule(self) -> SparsitySchedule:
        return SparsitySchedule(
            start=self.start_head_sparsity,
            end=self.end_head_sparsity,
            warmup_ratio=self.sparsity_warmup_ratio,
            kind=self.schedule,  # type: ignore[arg-type]
        )


class MaskLearning(nn.Module):
    """Gates and multipliers of one model, fp32 whatever the model's dtype.

    While the model trains, each forward pass draws one z per layer and KV head, and attention returns
    z * full + (1 - z) * sparse. In evaluation the deployed head masks count.
    """

    def __init__(self, config: MaskLearningConfig, num_layers: int, num_kv_heads: int) -> None:
        super().__init__()
        self.config = config
        self.gates = HardConcreteGates(
            num_layers, num_kv_heads, init=config.init_log_alpha, clamp=config.clamp_log_alpha
        )
        self.lagrangian = Lagrangian(clamp=config.clamp_multipliers)
        self.step, self.max_steps, self.micro_step = 0, 1, 0
        self._z: Tensor | None = None
        self.hook: RemovableHandle | None = None

    def begin_step(self, step: int, max_steps: int) -> None:
        """Says which optimizer step comes next."""
        self.step, self.max_steps, self.micro_step = step, max_steps, 0

    def draw(self) -> None:
        """Draws the gates of the next forward pass."""
        digest = hashlib.sha256(f"{self.config.seed}:{self.step}:{self.micro_step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._z = self.gates.sample(generator)
        self.micro_step += 1

    def layer_gate(self, layer: int) -> Tensor | None:
        """The drawn gates `[num_kv_heads]` of a layer, or None when the deployed masks count."""
        return self._z[layer] if self.training and self._z is not None else None

    @property
    def target(self) -> float:
        """The head sparsity aimed at in the present step."""
        return self.config.sparsity_schedule.target(self.step, self.max_steps)

    def penalty(self) -> Tensor:
        """The Lagrangian of the present step, a scalar to add to the loss once per optimizer step."""
        return self.lagrangian(self.gates.zero_probability().mean(), self.target)

    def after_step(self) -> None:
        """Applies the bounds after an optimizer step."""
        self.gates.clamp_()
        self.lagrangian.clamp_()
        self._z = None

    def head_masks(self, head_sparsity: float | None = None) -> Tensor:
        """The masks that would be deployed: `[num_layers, num_kv_heads]`, at the end's sparsity by default."""
        sparsity = self.config.end_head_sparsity if head_sparsity is None else head_sparsity
        return round_scores(self.gates.scores(), sparsity)

    def metrics(self) -> dict[str, float]:
        """Target, expected and realised sparsity and the multipliers, for logs."""
        realised = {} if self._z is None else {"sparsity/realised": (self._z == 0).float().mean().item()}
        return {
            "sparsity/target": self.target,
            "sparsity/expected": self.gates.zero_probability().mean().item(),
            **realised,
            "lagrangian/linear": self.lagrangian.linear.item(),
            "lagrangian/quadratic": self.lagrangian.quadratic.item(),
        }

    def _apply(self, fn: Any, recurse: bool = True) -> MaskLearning:
        super()._apply(fn, recurse)
        # `model.to(torch.bfloat16)` must not reach the gates: their updates would round away.
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        return self


def attach_mask_learning(model: PreTrainedModel, config: MaskLearningConfig) -> MaskLearning:
    """Gives a sparsified model gates to learn; they become parameters of the model.

    Raises:
        ValueError: if the model is not sparsified, has gates already, or `init_scores` has no scores of its shape.
    """
    handle = get_handle(model)
    if hasattr(model, MODULE_NAME):
        raise ValueError("the model has gates already; call detach_mask_learning(model) first")
    learning = MaskLearning(config, handle.shape.num_layers, handle.shape.num_kv_heads)
    if config.init_scores is not None:
        learning.gates.spread_(_scores_of(config.init_scores, learning.gates.log_alpha.shape), config.init_spread)
    learning.to(next(handle.modules[0].parameters()).device)
    learning.train(model.training)
    model.add_module(MODULE_NAME, learning)
    for state in handle.states:
        state.gate = _LayerGate(learning, state.layer_idx)
        state.skip_saturated = True
    learning.hook = model.register_forward_pre_hook(_draw_before_forward)
    return learning


def detach_mask_learning(model: PreTrainedModel, head_sparsity: float | None = None) -> Tensor:
    """Takes the gates off, deploys their masks and returns them.

    Raises:
        ValueError: if the model has no gates.
    """
    learning = get_mask_learning(model)
    handle: SparseHandle = get_handle(model)
    masks = learning.head_masks(head_sparsity)
    for state in handle.states:
        state.gate, state.skip_saturated = None, False
    if learning.hook is not None:
        learning.hook.remove()
    delattr(model, MODULE_NAME)
    set_head_masks(model, masks)
    return masks


def get_mask_learning(model: nn.Module) -> MaskLearning:
    """The gates of a model.

    Raises:
        ValueError: if it has none.
    """
    learning = getattr(model, MODULE_NAME, None)
    if learning is None:
        raise ValueError("the model has no gates; call attach_mask_learning(model, config) first")
    return learning


def _scores_of(artefact: str, shape: torch.Size) -> Tensor:
    scores = load_artefact(resolve_artefact_folder(artefact)).scores
    if scores is None or scores.shape != shape:
        raise ValueError(
            f"init_scores must name an artefact with head scores {list(shape)}, {artefact} has "
            f"{'none' if scores is None else list(scores.shape)}; sparse-hf calibrate scores makes one"
        )
    return scores


@dataclass
class _LayerGate:
    """What a layer's attention asks for its gates. A class, not a closure, so that models can be copied."""

    learning: MaskLearning
    layer: int

    def __call__(self) -> Tensor | None:
        return self.learning.layer_gate(self.layer)


def _draw_before_forward(model: nn.Module, args: Any) -> None:
    # A teacher's forward pass (no gradient) and evaluation draw nothing.
    if model.training and torch.is_grad_enabled():
        get_mask_learning(model).draw()
