"""Opening a text data set, wherever it lies, with errors that say what to change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Data file suffix -> the builder of `datasets` that reads it, with its options. A .txt file is one document:
# the builder's own default, one document per line, would cut a book into sentences.
_BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {"sample_by": "document"}),
}


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where training text comes from.

    Raises:
        ValueError: `path` or a column name is empty, columns that exclude each other, or a number out of range.
    """

    path: str
    """A .parquet, .arrow, .json, .jsonl or .txt file, a folder of them, a `save_to_disk` folder, or a Hub id."""
    split: str = "train"
    """Split to read; a single file is all `train`."""
    text_column: str = "text"
    """Column with the documents; unused when other columns are named."""
    chat_column: str | None = None
    """Column with lists of messages, rendered by the chat template."""
    prompt_column: str | None = None
    """Column with prompts, each followed by its completion."""
    completion_column: str | None = None
    """Column with completions, named together with `prompt_column`."""
    loss: Literal["all", "answers"] | None = None
    """Tokens with loss: `answers` are the assistant's messages or the completions. None is `answers` where there are
    some and `all` for plain text."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    max_documents: int | None = None
    """Read only this many documents; of a Hub data set only these are then downloaded."""
    ratio: float | None = None
    """Share of the text's tokens, relative to the other sources'. Without ratios the sources are read in turn."""
    streaming: bool = False
    """Read, tokenise and pack while training, and keep nothing on disk."""
    shuffle_buffer: int = 0
    """Documents among which a streamed source is shuffled; 0 keeps the stream's order."""

    def __post_init__(self) -> None:
        for field in ("path", "split", "text_column"):
            if not getattr(self, field):
                raise ValueError(f"TextSource.{field} must not be empty")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"TextSource.max_documents must be None or >= 1, got {self.max_documents}")
        if self.ratio is not None and not 0 < self.ratio < float("inf"):
            raise ValueError(f"TextSource.ratio must be positive and finite, got {self.ratio}; leave out the source")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("TextSource.prompt_column and completion_column must be named together")
        if self.chat_column and self.prompt_column:
            raise ValueError("TextSource takes chat_column or prompt_column with completion_column, got both")
        if self.loss == "answers" and self.kind == "text":
            raise ValueError(
                "TextSource.loss is 'answers', but plain text has none; name chat_column, or prompt_column and "
                "completion_column"
            )
        if self.shuffle_buffer < 0 or (self.shuffle_buffer and not self.streaming):
            raise ValueError(
                f"TextSource.shuffle_buffer must be >= 0 and needs streaming, got {self.shuffle_buffer}; "
                "rows of other sources are shuffled as a whole"
            )
        if self.streaming and "[" in self.split:
            raise ValueError(f"a slice cannot be streamed, got split {self.split!r}; use max_documents")

    @property
    def kind(self) -> Literal["text", "chat", "prompt"]:
        """What a row of the source holds."""
        return "chat" if self.chat_column else "prompt" if self.prompt_column else "text"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        if self.prompt_column and self.completion_column:
            return self.prompt_column, self.completion_column
        return (self.chat_column or self.text_column,)


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
    if missing := [column for column in source.columns if column not in first]:
        option = {"text": "text_column", "chat": "chat_column", "prompt": "prompt_column and completion_column"}
        raise ValueError(
            f"{source.path!r} has no column {missing[0]!r}; set {option[source.kind]} to one of: "
            f"{', '.join(sorted(first))}"
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
            return _open_file(datasets, path, source)
        if is_local:
            return _open_folder(datasets, path, source)
        # A slice such as train[:10%] cannot be streamed.
        streaming = source.streaming or (source.max_documents is not None and "[" not in source.split)
        return datasets.load_dataset(
            source.path, name=source.name, split=source.split, revision=source.revision, streaming=streaming
        )
    # load_from_disk says IndexError of a folder saved with no rows, load_dataset StopIteration of an empty file.
    except (OSError, ValueError, IndexError, StopIteration, datasets.exceptions.DatasetsError) as error:
        where = "from disk" if is_local else "from the Hub"
        remedy = "check path, split and name" + ("" if is_local else ", revision, the network and your login")
        reason = " ".join(str(error).split()) or "it is empty"
        raise ValueError(
            f"could not read {source.path!r} (split {source.split!r}) {where}: {reason}; {remedy}"
        ) from error


def _open_file(datasets: Any, path: Path, source: TextSource) -> Any:
    if path.suffix not in _BUILDERS:
        raise ValueError(f"unknown suffix {path.suffix!r}, known suffixes are {', '.join(_BUILDERS)}")
    builder, options = _BUILDERS[path.suffix]
    return datasets.load_dataset(
        builder, data_files=str(path), split=source.split, streaming=source.streaming, **options
    )


def _open_folder(datasets: Any, path: Path, source: TextSource) -> Any:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, dict):
            if source.split not in saved:
                raise ValueError(f"the folder holds the splits {', '.join(saved)}")
            saved = saved[source.split]
        return saved.to_iterable_dataset() if source.streaming else saved
    suffixes = {file.suffix for file in path.rglob("*")} & set(_BUILDERS)
    if not suffixes:
        raise ValueError(f"the folder holds no {', '.join(_BUILDERS)} file")
    options = _BUILDERS[".txt"][1] if suffixes == {".txt"} else {}
    return datasets.load_dataset(str(path), name=source.name, split=source.split, streaming=source.streaming, **options)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading text needs the package `datasets`; install it with: pip install datasets") from error
    return datasets
