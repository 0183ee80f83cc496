"""Opening a text data set, wherever it lies, with errors that say what to change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Data file suffix -> the builder of `datasets` that reads it, with its options. A .txt file is one document:
# the builder's own default, one document per line, would cut a book into sentences.
_BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {"sample_by": "document"}),
}


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where training text comes from.

    Raises:
        ValueError: `path` or a column name is empty, or `max_documents` is below 1.
    """

    path: str
    """A .parquet, .json, .jsonl or .txt file, a folder of them, a `save_to_disk` folder, or a Hub id."""
    split: str = "train"
    """Split to read; a single file is all `train`."""
    text_column: str = "text"
    """Column with the documents; unused when `chat_column` is set."""
    chat_column: str | None = None
    """Column with lists of messages, rendered by the chat template; only assistant answers are trained on."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    max_documents: int | None = None
    """Read only this many documents; a Hub data set is then streamed rather than downloaded whole."""

    def __post_init__(self) -> None:
        for field in ("path", "split", "text_column"):
            if not getattr(self, field):
                raise ValueError(f"TextSource.{field} must not be empty")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"TextSource.max_documents must be None or >= 1, got {self.max_documents}")

    @property
    def column(self) -> str:
        """The column that is read."""
        return self.chat_column or self.text_column


def load_text(source: TextSource) -> Dataset | IterableDataset:
    """Open `source` and check that it has documents.

    Raises:
        ValueError: the path does not exist or cannot be read, the split or column is missing, or there are no rows.
        ImportError: `datasets` is not installed.
    """
    dataset = _open(source)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{source.path!r}, split {source.split!r}, has no rows; choose another split or file")
    if source.column not in first:
        option = "chat_column" if source.chat_column else "text_column"
        raise ValueError(
            f"{source.path!r} has no column {source.column!r}; set {option} to one of: {', '.join(sorted(first))}"
        )
    if source.max_documents is None:
        return dataset
    if hasattr(dataset, "select"):
        return dataset.select(range(min(source.max_documents, len(dataset))))
    return dataset.take(source.max_documents)


def _open(source: TextSource) -> Any:
    datasets = _import_datasets()
    path = Path(source.path).expanduser()
    is_local = path.exists()
    if not is_local and (source.path.startswith((".", "/", "~")) or path.suffix in _BUILDERS):
        raise ValueError(
            f"{source.path!r} does not exist; give an existing file or folder, or a Hub id such as user/name"
        )
    try:
        if path.is_file():
            return _open_file(datasets, path, source.split)
        if is_local:
            return _open_folder(datasets, path, source)
        # A slice such as train[:10%] cannot be streamed.
        streaming = source.max_documents is not None and "[" not in source.split
        return datasets.load_dataset(source.path, name=source.name, split=source.split, streaming=streaming)
    # IndexError is what load_from_disk says of a folder saved with no rows.
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
        where = "from disk" if is_local else "from the Hub"
        remedy = "check path, split and name" + ("" if is_local else ", the network and your login")
        reason = " ".join(str(error).split())
        raise ValueError(
            f"could not read {source.path!r} (split {source.split!r}) {where}: {reason}; {remedy}"
        ) from error


def _open_file(datasets: Any, path: Path, split: str) -> Any:
    if path.suffix not in _BUILDERS:
        raise ValueError(f"unknown suffix {path.suffix!r}, known suffixes are {', '.join(_BUILDERS)}")
    builder, options = _BUILDERS[path.suffix]
    return datasets.load_dataset(builder, data_files=str(path), split=split, **options)


def _open_folder(datasets: Any, path: Path, source: TextSource) -> Any:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        if not isinstance(saved, dict):
            return saved
        if source.split not in saved:
            raise ValueError(f"the folder holds the splits {', '.join(saved)}")
        return saved[source.split]
    suffixes = {file.suffix for file in path.rglob("*")} & set(_BUILDERS)
    if not suffixes:
        raise ValueError(f"the folder holds no {', '.join(_BUILDERS)} file")
    options = _BUILDERS[".txt"][1] if suffixes == {".txt"} else {}
    return datasets.load_dataset(str(path), name=source.name, split=source.split, **options)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading text needs the package `datasets`; install it with: pip install datasets") from error
    return datasets
