"""`MaskLearning`: the gates of a sparsified model, in the place where its attention and its trainer find them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparse_hf.adapters import ModelShape
from sparse_hf.artefact import Artefact, load_artefact
from sparse_hf.hub import resolve_artefact_folder
from sparse_hf.lora import unwrapped
from sparse_hf.methods import Dense
from sparse_hf.patching import SparseHandle, get_handle, set_head_masks
from sparse_hf_training.masks.budgets import Budgets
from sparse_hf_training.masks.config import MaskLearningConfig

MODULE_NAME = "sparse_hf_masks"


class MaskLearning(nn.Module):
    """Gates and multipliers of one model, fp32 whatever the model's dtype.

    While the model trains, each forward pass draws one z per layer and KV head, and attention returns
    z * full + (1 - z) * sparse. In evaluation the deployed head masks count.

    Args:
        config: how masks are learned.
        num_layers, num_kv_heads: of the model.
        held: layers whose heads stay full whatever `layer_budgets` say.
    """

    def __init__(
        self, config: MaskLearningConfig, num_layers: int, num_kv_heads: int, *, held: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.config = config
        self.budgets = Budgets.of(config.layer_budgets, config.end_head_sparsity, num_layers, held=held)
        self.gates = config.make_gates(num_layers, num_kv_heads)
        self.regularizer = config.make_regularizer(tuple(self.budgets.shares))
        self._schedules = [config.schedule_to(end) for end in self.budgets.ends]
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
        self._z = self._held_full(self.gates.sample(generator), 1.0)
        self.micro_step += 1

    def layer_gate(self, layer: int) -> Tensor | None:
        """The drawn gates `[num_kv_heads]` of a layer, or None before the first draw."""
        return None if self._z is None else self._z[layer]

    def targets(self) -> list[float]:
        """The head sparsity that each constraint of `budgets` aims at in the present step."""
        return [schedule.target(self.step, self.max_steps) for schedule in self._schedules]

    @property
    def target(self) -> float:
        """The share of all KV heads that is to be sparse in the present step."""
        free = 1 - len(self.budgets.held) / self.budgets.num_layers
        return free * sum(share * t for share, t in zip(self.budgets.shares, self.targets(), strict=True))

    def expected_sparsity(self) -> Tensor:
        """Expected sparsity of each KV head in closed form, `[num_layers, num_kv_heads]`; 0 where a layer is held."""
        return self._held_full(self.gates.expected_sparsity(), 0.0)

    def penalty(self) -> Tensor:
        """The regulariser of the present step, a scalar to add to the loss once per optimizer step."""
        return self.regularizer(self.budgets.per_constraint(self.gates.expected_sparsity()), self.targets())

    def _held_full(self, x: Tensor, value: float) -> Tensor:
        """x `[num_layers, num_kv_heads]` with the rows of held layers at a constant."""
        if not self.budgets.held:
            return x
        return x.index_fill(0, torch.tensor(sorted(self.budgets.held), device=x.device), value)

    def after_step(self) -> None:
        """Applies the bounds after an optimizer step."""
        self.gates.clamp_()
        self.regularizer.clamp_()
        self._z = None

    def head_masks(self, head_sparsity: float | None = None) -> Tensor:
        """The masks that would be deployed, `[num_layers, num_kv_heads]`.

        Args:
            head_sparsity: by default the end's; of the layers that `layer_budgets` and `layers_from` leave free.
        """
        values = self.gates.values.detach().float().cpu()
        return self.budgets.round(values, head_sparsity).expand(-1, self.gates.num_kv_heads).contiguous()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Target, expected and realised sparsity, undecided gates and the multipliers, for logs."""
        expected, gates = self.gates.expected_sparsity(), self.gates.deterministic()
        realised = {} if self._z is None else {"sparsity/realised": (self._z == 0).float().mean().item()}
        gaps = self.budgets.per_constraint(expected) - expected.new_tensor(self.targets())
        worst = {"sparsity/largest_gap": gaps.abs().max().item()} if len(gaps) > 1 else {}
        return {
            "sparsity/target": self.target,
            "sparsity/expected": self._held_full(expected, 0.0).mean().item(),
            **realised,
            **worst,
            # Rounding decides these, not learning.
            "gates/undecided": ((gates > 0.25) & (gates < 0.75)).float().mean().item(),
            **self.regularizer.metrics(),
        }


def attach_mask_learning(model: PreTrainedModel, config: MaskLearningConfig) -> MaskLearning:
    """Gives a sparsified model gates to learn. They are no parameters of it: `MaskOptimizer` steps them.

    Raises:
        ValueError: if the model is not sparsified, has gates already, or an artefact that the
            configuration names does not fit it.
    """
    handle = get_handle(model)
    if hasattr(unwrapped(model), MODULE_NAME):
        raise ValueError("the model has gates already; call detach_mask_learning(model) first")
    shape = handle.shape
    held = frozenset[int]() if config.layers_from is None else _dense_layers(config.layers_from, shape)
    learning = MaskLearning(config, shape.num_layers, shape.num_kv_heads, held=held)
    if config.init_scores is not None:
        learning.gates.spread_(_scores_of(config.init_scores, shape), config.init_spread)
    if config.init_masks is not None:
        learning.gates.start_from_(fitting_artefact(config.init_masks, shape, "init_masks").head_masks)
    device = next(handle.modules[0].parameters()).device
    learning.to("cpu" if device.type == "meta" else device)
    # No submodule: DDP, FSDP and ZeRO would wrap, shard and cast the gates, `model.to(torch.bfloat16)` round them.
    vars(unwrapped(model))[MODULE_NAME] = learning
    for state, module in zip(handle.states, handle.modules, strict=True):
        state.gate = _LayerGate(learning, state.layer_idx, module)
        state.skip_saturated = learning.gates.saturates or state.layer_idx in learning.budgets.held
    # The decoder, not the model: PeftModel calls the model's `forward`, past its hooks.
    learning.hook = unwrapped(model).base_model.register_forward_pre_hook(_DrawBeforeForward(learning))
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
    delattr(unwrapped(model), MODULE_NAME)
    set_head_masks(model, masks)
    return masks


def get_mask_learning(model: nn.Module) -> MaskLearning:
    """The gates of a model.

    Raises:
        ValueError: if it has none.
    """
    learning = getattr(unwrapped(model), MODULE_NAME, None)
    if learning is None:
        raise ValueError("the model has no gates; call attach_mask_learning(model, config) first")
    return learning


def fitting_artefact(name: str, shape: ModelShape, field: str) -> Artefact:
    """The artefact that a field of a configuration names, a folder or a Hub id.

    Raises:
        ValueError: if it is none, or for another number of layers or KV heads.
    """
    artefact = load_artefact(resolve_artefact_folder(name))
    expected, found = [shape.num_layers, shape.num_kv_heads], list(artefact.head_masks.shape)
    if found != expected:
        raise ValueError(f"{field} must name an artefact with head masks {expected}, {name} has {found}")
    return artefact


def _scores_of(name: str, shape: ModelShape) -> Tensor:
    scores = fitting_artefact(name, shape, "init_scores").scores
    if scores is None:
        raise ValueError(
            f"init_scores must name an artefact with head scores {[shape.num_layers, shape.num_kv_heads]}, {name} has "
            "none; sparse-hf calibrate scores makes one"
        )
    return scores


def _dense_layers(name: str, shape: ModelShape) -> frozenset[int]:
    """The layers that an artefact leaves dense."""
    artefact = fitting_artefact(name, shape, "layers_from")
    methods = artefact.config.resolve(artefact.head_masks.tolist())
    return frozenset(n for n, row in enumerate(methods) if all(isinstance(method, Dense) for method in row))


@dataclass
class _LayerGate:
    """What a layer's attention asks for its gates. A class, not a closure, so that models can be copied."""

    learning: MaskLearning
    layer: int
    module: nn.Module

    def __call__(self) -> Tensor | None:
        return self.learning.layer_gate(self.layer) if self.module.training else None


@dataclass
class _DrawBeforeForward:
    learning: MaskLearning

    def __call__(self, decoder: nn.Module, args: Any) -> None:
        # A teacher's forward pass (no gradient) and evaluation draw nothing.
        if decoder.training and torch.is_grad_enabled():
            device = next(decoder.parameters()).device
            if next(self.learning.parameters()).device.type == "cpu" and device.type not in ("cpu", "meta"):
                self.learning.to(device)  # `model.to` does not reach the gates
            self.learning.draw()
