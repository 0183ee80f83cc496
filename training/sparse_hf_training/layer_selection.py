"""Which layers may be sparse as a whole: TriangleMix's gradient probe on training rows, as a stage of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from sparse_hf.calibrate.framework import Target
from sparse_hf.calibrate.triangle import TriangleCalibrator, TriangleOptions
from sparse_hf_training.data import Row


@dataclass(frozen=True, kw_only=True)
class LayerSelectionConfig:
    """How layers are selected.

    Args:
        num_sequences: training rows to look at. The probe follows each row's last token, which is an answer's in recall
            samples: TriangleMix probes on retrieval.
        triangle: the options of `sparse-hf calibrate triangle`, with underscores.
    """

    num_sequences: int = 8
    triangle: TriangleOptions = field(default_factory=TriangleOptions)

    def __post_init__(self) -> None:
        if self.num_sequences < 1:
            raise ValueError(f"layer_selection.num_sequences must be positive, got {self.num_sequences}")

    def calibrator(self, model: PreTrainedModel, seq_len: int, seed: int) -> TriangleCalibrator:
        """What `sparse-hf calibrate triangle` runs, for sequences of this length.

        Raises:
            ValueError: if they are too short for a Middle, or more layers are asked for than there are.
        """
        return TriangleCalibrator(self.triangle, Target.of(model, seq_len), seed)


def training_sequences(rows: Dataset[Row], count: int) -> Tensor:
    """Token ids of the first training rows, int64 `[count, seq_len]`."""
    return torch.stack([torch.as_tensor(rows[n]["input_ids"], dtype=torch.int64) for n in range(count)])
