"""Collating rows to a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_hf_training.data import collate


def test_rows_become_int64_tensors() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": np.array([-100, 2, 3], dtype=np.int32)},
        {"input_ids": [4, 5, 6], "labels": torch.tensor([-100, -100, 6])},
    ]
    batch = collate(rows)
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, 6]]
    assert all(value.dtype == torch.int64 and value.shape == (2, 3) for value in batch.values())


def test_unequal_lengths_are_listed() -> None:
    with pytest.raises(ValueError, match=r"one length, got \[\{'input_ids': 2\}, \{'input_ids': 3\}\]"):
        collate([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match=r"got \[\{'input_ids': 2, 'labels': 1\}\]"):
        collate([{"input_ids": [1, 2], "labels": [1]}])


def test_different_keys_and_no_rows() -> None:
    with pytest.raises(ValueError, match=r"same keys, got \['input_ids'\] and \['labels'\]"):
        collate([{"input_ids": [1]}, {"labels": [1]}])
    with pytest.raises(ValueError, match="at least one row"):
        collate([])


def test_rows_are_padded_with_a_document_without_loss() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "position_ids": [0, 1, 2]}] * 2
    batch = collate(rows, pad_to_multiple_of=4, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9]] * 2
    assert batch["labels"].tolist() == [[-100, 2, 3, -100]] * 2
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0]] * 2
    five = collate(rows, pad_to_multiple_of=5)
    assert five["position_ids"].tolist() == [[0, 1, 2, 0, 1]] * 2 and five["input_ids"].dtype == torch.int64
    assert collate(rows, pad_to_multiple_of=3)["input_ids"].tolist() == [[1, 2, 3]] * 2


def test_padding_errors() -> None:
    with pytest.raises(ValueError, match="can be padded, got shift_labels too"):
        collate([{"input_ids": [1], "shift_labels": [1]}], pad_to_multiple_of=2)
    with pytest.raises(ValueError, match="None or >= 1, got 0"):
        collate([{"input_ids": [1]}], pad_to_multiple_of=0)
