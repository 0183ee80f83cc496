"""Published recipes as files: what they say is what was published."""

import re
from pathlib import Path

import pytest
import torch

from sparse_hf.presets import preset
from sparse_hf_training.config import RunConfig
from sparse_hf_training.elimination import EliminationConfig
from sparse_hf_training.masks import L1, DuoGates, HardConcreteGates, Lagrangian

FOLDER = Path(__file__).parents[3] / "configs" / "train"


def test_prulong() -> None:
    config = RunConfig.load(FOLDER / "prulong.yaml")
    masks = config.masks
    assert config.stage == "masks" and isinstance(masks.make_gates(2, 2), HardConcreteGates)
    regularizer = masks.make_regularizer((1.0,))
    assert isinstance(regularizer, Lagrangian) and len(list(regularizer.parameters())) == 2
    schedule = masks.schedule_to(masks.end_head_sparsity)
    assert [schedule.target(step, 1000) for step in (0, 400, 800, 999)] == pytest.approx([0.0, 0.35, 0.7, 0.7])
    assert (masks.mask_learning_rate, masks.reg_learning_rate, masks.init_log_alpha) == (1.0, 1.0, 4.0)
    assert config.objective.only_lm and config.objective.lm == 1.0 and config.data.recall is None
    assert config.trainer["max_steps"] == 1000
    assert config.data.seq_len * config.trainer["gradient_accumulation_steps"] == 2**20  # tokens a step
    assert isinstance(config.sparse, str) and preset(config.sparse).sparse.to_dict() == {
        "method": "streaming",
        "num_sink_tokens": 128,
        "window_size": 1024,
    }


def test_duo_attention() -> None:
    config = RunConfig.load(FOLDER / "duo_attention.yaml")
    masks = config.masks
    gates, regularizer = masks.make_gates(2, 2), masks.make_regularizer((1.0,))
    assert isinstance(gates, DuoGates) and gates.values.eq(1).all()
    assert isinstance(regularizer, L1) and regularizer.weight == 0.05
    assert masks.mask_learning_rate == 0.02
    assert [masks.rate_factor(step, 2000) for step in (0, 399, 1600, 1999)] == pytest.approx([0.1, 1.0, 1.0, 0.1])
    assert (config.objective.hidden, config.objective.lm, config.objective.kl) == (1.0, 0.0, 0.0)
    assert config.trainer["max_steps"] == 2000 and config.data.seq_len == 32000
    assert config.data.recall is not None and not config.data.recall.question_loss
    assert isinstance(config.sparse, dict) and config.sparse["sparse"]["window_size"] == 256


def test_layer_selection() -> None:
    config = RunConfig.load(FOLDER / "layer_selection.yaml")
    assert config.stage == "layer_selection" and config.layer_selection.triangle.max_loss_increase == 0.01
    assert "max_steps" not in config.trainer


def test_head_elimination() -> None:
    config = RunConfig.load(FOLDER / "head_elimination.yaml")
    masks, settings = RunConfig.load(FOLDER / "masks.yaml"), config.head_elimination
    assert config.stage == "head_elimination" and settings.end_head_sparsity == masks.masks.end_head_sparsity
    assert settings == EliminationConfig(end_head_sparsity=0.7, row_passes=2048, batch_size=1), "else the defaults"
    assert config.sparse == masks.sparse and config.data.seq_len == masks.data.seq_len
    assert config.data.recall is not None and len(config.data.recall.tasks) == 3 and "max_steps" not in config.trainer


def test_the_docs_say_what_head_elimination_costs() -> None:
    text = (FOLDER.parents[1] / "docs" / "training" / "masks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)(?:, (\d+) of .*?)? \| (0\.\d) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)
    assert len(rows) == 6
    for num_heads, left, end, row_passes, *said in rows:
        candidates = torch.zeros(int(num_heads), 1)
        candidates[: int(left or num_heads)] = 1
        config = EliminationConfig(end_head_sparsity=float(end), row_passes=int(row_passes))
        found = (len(config.plan(candidates, 4)), config.num_rows(candidates, 4), config.num_row_passes(candidates, 4))
        assert found == tuple(map(int, said))
