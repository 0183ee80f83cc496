"""Calibration sequences: any text, tokenised in order and cut to one length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As in training, a .txt file is one document: lines would cut a book into sentences.
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Where calibration text comes from.

    Args:
        path: a .txt, .jsonl or .parquet file, a folder of them, or a data set's id on the Hub; by default the books
            that the demo ships. .parquet and the Hub need the package `datasets`.
        text_column: column with the documents; .txt files have none.
        split: of a data set on the Hub.
    """

    path: str | None = None
    text_column: str = "text"
    split: str = "train"

    @property
    def described(self) -> str:
        return self.path or "the demo's books"

    def documents(self) -> Iterator[str]:
        """The documents in order, files sorted by their names.

        Raises:
            ValueError: if nothing is found there, it cannot be read, or the column is missing.
            ImportError: if it needs `datasets`, which is not installed.
        """
        path = demo_text() if self.path is None else Path(self.path).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
            if not files:
                raise ValueError(f"{path} holds no {', '.join(_SUFFIXES)} file")
            yield from chain.from_iterable(map(self._read, files))
        elif path.is_file():
            yield from self._read(path)
        elif path.suffix in _SUFFIXES or str(path).startswith((".", "/")):
            raise ValueError(f"no such file or folder: {path}; --data takes one, or a data set's id on the Hub")
        else:
            yield from self._load(str(self.path), split=self.split, streaming=True)

    def _read(self, file: Path) -> Iterator[str]:
        if file.suffix == ".parquet":
            yield from self._load("parquet", data_files=str(file), split="train", streaming=True)
            return
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{file}: unknown suffix {file.suffix!r}; known: {', '.join(_SUFFIXES)}")
        try:
            text = file.read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines() if line] if file.suffix == ".jsonl" else [text]
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        yield from (row if file.suffix == ".txt" else self._column(row, str(file)) for row in rows)

    def _load(self, name: str, **arguments: Any) -> Iterator[str]:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                'reading .parquet files and the Hub needs the package `datasets`; pip install "sparse-hf[train]"'
            ) from error
        try:
            rows = datasets.load_dataset(name, **arguments)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"the data set {self.path!r} cannot be read: {' '.join(str(error).split())}") from error
        yield from (self._column(row, str(self.path)) for row in rows)

    def _column(self, row: Any, where: str) -> str:
        columns = sorted(row) if isinstance(row, dict) else []
        if self.text_column not in columns:
            raise ValueError(f"{where} has no column {self.text_column!r}; set --text-column to one of {columns}")
        value = row[self.text_column]
        if not isinstance(value, str):
            raise ValueError(f"{where}, column {self.text_column!r}: expected text, got {type(value).__name__}")
        return value


def demo_text() -> Path:
    """The folder of the books that ship with the demo, in the package above this one, found without importing it.

    Raises:
        ValueError: if they are not installed.
    """
    spec = find_spec("sparse_hf_training")
    for place in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(place) / "demo" / "assets" / "text" / "train"
        if folder.is_dir():
            return folder
    raise ValueError("the demo's books are not installed here; give text with --data")


def load_sequences(
    text: CalibrationText, tokenizer: PreTrainedTokenizerBase, *, num_sequences: int, seq_len: int
) -> Tensor:
    """The first `num_sequences` * `seq_len` tokens of the text, in order.

    Documents follow each other, each closed by the end-of-sequence token where the tokenizer has one; only as many are
    read as are needed. A sequence may hold parts of several documents, which then see each other.

    Returns:
        int64 ids `[num_sequences, seq_len]`.

    Raises:
        ValueError: if the text is too short, saying for how many sequences it would do, or cannot be read.
    """
    if num_sequences < 1 or seq_len < 2:
        raise ValueError(f"--num-sequences must be >= 1 and --seq-len >= 2, got {num_sequences} and {seq_len}")
    wanted, ids = num_sequences * seq_len, list[int]()
    for document in text.documents():
        found = list(tokenizer(document, verbose=False)["input_ids"])
        if found and tokenizer.eos_token_id is not None and found[-1] != tokenizer.eos_token_id:
            found.append(tokenizer.eos_token_id)
        ids += found
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted], dtype=torch.int64).view(num_sequences, seq_len)
    raise ValueError(
        f"{text.described} holds {len(ids)} tokens, enough for {len(ids) // seq_len} sequences of {seq_len}, and "
        f"{num_sequences} were asked for; give more text with --data, or lower --num-sequences or --seq-len"
    )
