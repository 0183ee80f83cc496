"""How much a run tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

HISTORY_POINTS, IMAGE_POINTS = 100, 10


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """How often a run writes down its masks, and what its speed is a share of. None of it changes what is trained.

    Args:
        mask_history_steps: steps between two entries of the masks' history; None: 100 entries over the run.
        mask_image_steps: steps between two mask maps sent to wandb or tensorboard, 0 for none; None: 10 over the run.
        peak_tflops: dense peak of one device in the computing dtype, TFLOP/s, where the device is not known here.
    """

    mask_history_steps: int | None = None
    mask_image_steps: int | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        if self.mask_history_steps is not None and self.mask_history_steps < 1:
            raise ValueError(f"observe.mask_history_steps must be positive, got {self.mask_history_steps}")
        if self.mask_image_steps is not None and self.mask_image_steps < 0:
            raise ValueError(f"observe.mask_image_steps must not be negative, got {self.mask_image_steps}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"observe.peak_tflops must be positive, got {self.peak_tflops}")

    def history_interval(self, max_steps: int) -> int:
        return self.mask_history_steps or max(1, max_steps // HISTORY_POINTS)

    def image_interval(self, max_steps: int) -> int:
        """0 for no images."""
        return max(1, max_steps // IMAGE_POINTS) if self.mask_image_steps is None else self.mask_image_steps
