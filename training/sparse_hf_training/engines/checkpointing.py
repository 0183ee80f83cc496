"""Saving and resuming under every engine, as a base of `SparseTrainer`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, save_fsdp_optimizer
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import TrainOutput

from sparse_hf.lora import has_adapter, read_adapter
from sparse_hf_training.callbacks import MaskStepCallback
from sparse_hf_training.checkpoint import load_mask_state, save_mask_state
from sparse_hf_training.engines.engine import REPLICATED, Engine
from sparse_hf_training.engines.resume import ResumePlan, resume_plan
from sparse_hf_training.engines.unused import remove_unused_parameter
from sparse_hf_training.engines.weights import (
    load_trained_shards,
    load_whole_weights,
    save_trained_shards,
    saves_shards,
)

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)
SCHEDULER_FILE = "scheduler.pt"


class EngineCheckpoints(Trainer):
    """What a checkpoint holds and how a run goes on from it.

    Gates, multipliers and their optimizer: in every checkpoint, read under any engine and number of processes. Weights
    and their optimizer: as the engine saves them, and only in stages that train weights. Where another engine or number
    of processes goes on, and the engine cannot reshard its optimizer's state, whole weights are read and the weights'
    optimizer begins anew, which a warning says.
    """

    engine: Engine
    _mask_callback: MaskStepCallback | None
    _weights_train: bool
    _plan: ResumePlan | None = None

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._weights_train:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._save_masks(Path(output_dir or str(self.args.output_dir)))

    def _save_masks(self, folder: Path) -> None:
        if self._mask_callback is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_mask_state(self._mask_callback.learning, folder)
            self._mask_callback.optimizer.save(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The engines would write all frozen weights.
        if self._shards_an_adapter:
            sharded: Any = self.model
            save_trained_shards(sharded, Path(output_dir))
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, sharded, output_dir)
            self._save_scheduler(output_dir)
        elif self._weights_train or self.engine.name in REPLICATED:
            with self._frozen_left_out():
                super()._save_optimizer_and_scheduler(output_dir)
        else:
            self._save_scheduler(output_dir)

    def _save_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    @property
    def _has_adapter(self) -> bool:
        return self._weights_train and has_adapter(self.accelerator.unwrap_model(self.model))

    @property
    def _shards_an_adapter(self) -> bool:
        return self.engine.name == "fsdp2" and self._has_adapter and saves_shards(self.accelerator)

    @contextmanager
    def _frozen_left_out(self) -> Iterator[None]:
        """DeepSpeed leaves frozen weights out beside an adapter. transformers asks it to for a PeftModel alone."""
        engine: Any = self.model_wrapped
        if not self.engine.is_deepspeed or not self._has_adapter:
            yield
            return
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        try:
            yield
        finally:
            del engine.save_checkpoint

    # ---- resuming ----

    def _resume_plan(self, checkpoint: Path) -> ResumePlan:
        if self._plan is None:
            # Frozen weights are what the model was loaded with: nothing of the engine's is needed.
            self._plan = resume_plan(self.engine, checkpoint) if self._weights_train else "masks"
            if self._plan == "weights":
                logger.warning(
                    "%s was written by other processes than %s: weights, masks and the step go on, the moments of the "
                    "weights' optimizer begin anew",
                    checkpoint,
                    self.engine,
                )
        return self._plan

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The base class calls this before the model is wrapped (one process, DDP) or after it (FSDP).
        if self._resume_plan(Path(resume_from_checkpoint)) != "state":
            return
        own: Any = self.model
        if self.engine.name in REPLICATED and has_adapter(own):
            read_adapter(own, Path(resume_from_checkpoint))
        elif self._shards_an_adapter:
            load_trained_shards(own, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader[Any]]:
        self._leave_frozen_unwrapped()
        if resume_from_checkpoint is None:
            prepared: tuple[nn.Module, DataLoader[Any]] = super()._prepare_for_training(
                max_steps, train_dataloader, None
            )
            return prepared
        checkpoint = Path(resume_from_checkpoint)
        plan = self._resume_plan(checkpoint)
        if plan == "weights":
            # Before the engine makes its fp32 copies and shards of them.
            load_whole_weights(self.accelerator.unwrap_model(self.model), checkpoint)
        own = plan == "state" and self.engine.is_deepspeed and self._has_adapter
        given = resume_from_checkpoint if plan == "state" and not own else None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, given)
        if own:
            # Frozen weights are not in there, and what bitsandbytes keeps beside them is no parameter.
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if plan != "state":
            state = torch.load(checkpoint / SCHEDULER_FILE, weights_only=True)
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(state)
        if self._mask_callback is not None:
            load_mask_state(self._mask_callback.learning, checkpoint)
            self._mask_callback.optimizer.load(checkpoint)
        self._plan = None
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The base class asks whether the run is over after a step alone: a finished run would make one more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output: TrainOutput = super()._finalize_training(*args, **kwargs)
        remove_unused_parameter(self.accelerator.unwrap_model(self.model))
        return output

    def _leave_frozen_unwrapped(self) -> None:
        """accelerate wraps in DDP on the CPU what has no gradient, which DDP refuses; on GPUs it leaves it alone."""
        if self._weights_train or self.accelerator.distributed_type != DistributedType.MULTI_CPU:
            return
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        vars(model)["_is_accelerate_prepared"] = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":
            # In several processes transformers 5.17 loads to "cpu:0", which torch.load does not know.
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        super()._load_optimizer_and_scheduler(checkpoint)
