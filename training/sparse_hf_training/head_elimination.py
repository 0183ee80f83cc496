"""Head elimination as a stage: where it starts, its rounds on disk, its share of the masks, its picture."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_hf.calibrate.plots import plot_maps
from sparse_hf.config import read_mapping
from sparse_hf.figures import replace_json
from sparse_hf.layer_ranges import format_ranges
from sparse_hf.layer_state import LayerState
from sparse_hf.patching import get_handle
from sparse_hf.plots import has_matplotlib
from sparse_hf_training.config import RunConfig
from sparse_hf_training.data.row_kinds import RowsByKind
from sparse_hf_training.elimination import Measure, Round
from sparse_hf_training.evaluation.lab import weight_digest
from sparse_hf_training.masks.learning import fitting_artefact

logger = logging.getLogger(__name__)

ELIMINATION_NAME, ELIMINATION_PLOT = "elimination.json", "elimination.png"


def candidate_heads(model: PreTrainedModel, start_from: str | None, seq_len: int) -> Tensor:
    """The heads that are full at the start, int64 `[num_layers, num_kv_heads]`.

    Args:
        model: sparsified.
        start_from: as in `EliminationConfig`.
        seq_len: tokens per row.

    Raises:
        ValueError: if the artefact does not fit, or a head reads the same full and sparse, of which losses say nothing.
    """
    handle = get_handle(model)
    if start_from is None:
        candidates = torch.ones_like(handle.head_masks)
    else:
        candidates = fitting_artefact(start_from, handle.shape, "head_elimination.start_from").head_masks
    same = [
        layer for layer, head in candidates.nonzero().tolist() if _reads_the_same(handle.states[layer], head, seq_len)
    ]
    if same:
        raise ValueError(
            f"KV heads of layers {format_ranges(same)} read the same full and sparse in rows of {seq_len} tokens, so "
            "their losses say nothing; raise data.seq_len, or take what makes them so (a rule, a wide window, "
            "min_seq_len) out of sparse"
        )
    return candidates


def _reads_the_same(state: LayerState, head: int, seq_len: int) -> bool:
    full, sparse = state.full.patterns[head], state.sparse.patterns[head]
    if full.selected or sparse.selected:
        return state.full_methods[head] == state.sparse_methods[head]
    return torch.equal(state.full.row_counts(full, seq_len), state.sparse.row_counts(sparse, seq_len))


def settings_of(config: RunConfig, model: PreTrainedModel, candidates: Tensor, rows: RowsByKind) -> dict[str, Any]:
    """What losses depend on, JSON-plain; of the rows, the first of each kind stand for all."""
    first = torch.stack([kind[0]["input_ids"] for kind in (*rows.tasks, rows.text)])
    plain = config.to_dict()
    settings = {
        **{name: plain[name] for name in ("model", "dtype", "quantization", "data", "head_elimination")},
        "sparse": get_handle(model).config.to_dict(),
        "start": candidates.tolist(),
        "weights": weight_digest(model),
        "rows": hashlib.sha256(first.numpy().tobytes()).hexdigest()[:16],
    }
    plain_settings: dict[str, Any] = json.loads(json.dumps(settings))
    return plain_settings


@dataclass(frozen=True, kw_only=True)
class RoundsFile:
    """`elimination.json`: the settings and all rounds so far, whole at any instant.

    Args:
        path: of the file.
        settings: JSON-plain; rounds of others are refused.
    """

    path: Path
    settings: dict[str, Any]

    def read(self, *, resume: bool) -> list[Round]:
        """The rounds to go on from.

        Raises:
            ValueError: if the file is damaged or holds rounds of other settings, or `resume` is off.
        """
        if not self.path.exists():
            return []
        if not resume:
            raise ValueError(f"{self.path} holds rounds already; choose another output_dir, or set resume=true")
        document = read_mapping(self.path)
        try:
            before = dict(document["settings"])
            rounds = [Round.from_dict(values) for values in document["rounds"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} holds no rounds ({error!r}); delete the file to begin again") from error
        if differ := sorted(name for name in {*before, *self.settings} if before.get(name) != self.settings.get(name)):
            raise ValueError(
                f"{self.path} holds rounds of other settings ({', '.join(differ)} differ); choose another output_dir, "
                "or delete the file to begin again"
            )
        return rounds

    def write(self, rounds: Sequence[Round]) -> None:
        """Replaces the file: whoever is killed here leaves the rounds before."""
        replace_json(self.path, {"settings": self.settings, "rounds": [past.to_dict() for past in rounds]})


@dataclass(frozen=True, kw_only=True)
class SharedMeasure:
    """Masks shared out over processes that hold the whole model: each measures every `world_size`-th, all get all.

    Args:
        measure: a process's own.
        rank, world_size: of the processes.
        device: where they meet.
    """

    measure: Measure
    rank: int
    world_size: int
    device: torch.device

    def __call__(self, many: Sequence[Tensor], first: int, count: int) -> list[float]:
        # Doubles: a loss is the same number whoever measured it, and zeros add nothing to it.
        losses = torch.zeros(len(many), dtype=torch.float64)
        mine = slice(self.rank, None, self.world_size)
        losses[mine] = torch.tensor(self.measure(many[mine], first, count), dtype=torch.float64)
        if self.world_size > 1:
            losses = losses.to(self.device)
            torch.distributed.all_reduce(losses)
        return losses.tolist()


def draw_rounds(rounds: Sequence[Round], scores: Tensor, path: Path) -> None:
    """Draws the scores, and the losses of the first and the last round, where matplotlib is installed."""
    if not has_matplotlib():
        logger.warning("%s is not drawn: matplotlib is not installed", path.name)
        return
    maps = {"score": scores}
    for title, found in (("loss without it, first round", rounds[0]), ("last round", rounds[-1])):
        maps[title] = torch.full(scores.shape, math.nan)
        for head, loss in found.losses.items():
            maps[title][head] = loss
    plot_maps(maps, path)
