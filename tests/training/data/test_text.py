"""Opening text: every kind of local source, and errors that name the remedy without asking the Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sparse_hf_training.data import TextSource, load_text

datasets = pytest.importorskip("datasets")
ROWS = [{"text": "one\ntwo", "kind": "book"}, {"text": "three", "kind": "code"}, {"text": "four", "kind": "book"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", fail)


def _write(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif kind == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
            for row in ROWS:
                writer.write(row)
            writer.finalize()
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "arrow"])
def test_files(tmp_path: Path, kind: str) -> None:
    path = str(_write(tmp_path, kind))
    assert list(load_text(TextSource(path=path))["text"]) == ["one\ntwo", "three", "four"]
    streamed = load_text(TextSource(path=path, streaming=True))
    assert isinstance(streamed, datasets.IterableDataset)
    assert [row["text"] for row in streamed] == ["one\ntwo", "three", "four"]


def test_folders_are_streamed(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("one\ntwo")
    for name, texts in (("saved", ["one\ntwo", "three", "four"]), ("books", ["one\ntwo"])):
        streamed = load_text(TextSource(path=str(tmp_path / name), streaming=True))
        assert isinstance(streamed, datasets.IterableDataset) and [row["text"] for row in streamed] == texts


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one\n\ntwo\nthree")
    assert list(load_text(TextSource(path=str(tmp_path / "book.txt")))["text"]) == ["one\n\ntwo\nthree"]


def test_a_folder_of_text_files_has_a_document_per_file(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo")
    (folder / "b.txt").write_text("three\nfour")
    assert list(load_text(TextSource(path=str(folder)))["text"]) == ["one\ntwo", "three\nfour"]


def test_a_folder_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "train.parquet"))
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(str(folder / "validation.parquet"))
    assert len(load_text(TextSource(path=str(folder)))) == 3
    assert len(load_text(TextSource(path=str(folder), split="validation"))) == 1
    with pytest.raises(ValueError, match=r"could not read .*split 'test'.*check path, split and name"):
        load_text(TextSource(path=str(folder), split="test"))


def test_saved_to_disk(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    assert len(load_text(TextSource(path=str(tmp_path / "one")))) == 3
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "many")
    assert len(load_text(TextSource(path=str(tmp_path / "many")))) == 3
    with pytest.raises(ValueError, match="the folder holds the splits train"):
        load_text(TextSource(path=str(tmp_path / "many"), split="test"))


def test_max_documents(tmp_path: Path) -> None:
    path = str(_write(tmp_path, "parquet"))
    assert list(load_text(TextSource(path=path, max_documents=2))["text"]) == ["one\ntwo", "three"]
    assert len(load_text(TextSource(path=path, max_documents=99))) == 3


def test_hub_is_streamed_when_the_number_of_documents_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path, **kwargs):
        calls.append((path, kwargs))
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset.to_iterable_dataset() if kwargs["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    limited = load_text(TextSource(path="user/corpus", name="en", max_documents=2))
    assert [row["text"] for row in limited] == ["one\ntwo", "three"]
    assert len(load_text(TextSource(path="user/corpus", split="train[:50%]", revision="v2"))) == 3
    load_text(TextSource(path="user/corpus", streaming=True))
    assert calls == [
        ("user/corpus", {"name": "en", "split": "train", "revision": None, "streaming": True}),
        ("user/corpus", {"name": None, "split": "train[:50%]", "revision": "v2", "streaming": False}),
        ("user/corpus", {"name": None, "split": "train", "revision": None, "streaming": True}),
    ]


def test_hub_errors_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("doesn't exist\nor is gated")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"^could not read 'user/no'.* from the Hub: doesn't exist or is gated; .*login$"
    ):
        load_text(TextSource(path="user/no"))


@pytest.mark.parametrize(
    "path", ["./missing", "/missing/folder", "~/missing-folder", "../x", "missing.parquet", "a/b.txt"]
)
@pytest.mark.usefixtures("no_hub")
def test_missing_local_path_fails_at_once(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # so that nobody's ../x lies beside
    with pytest.raises(ValueError, match="does not exist; give an existing file or folder"):
        load_text(TextSource(path=path))


@pytest.mark.usefixtures("no_hub")
def test_unknown_suffix_and_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(ValueError, match=r"unknown suffix '.docx', known suffixes are .parquet"):
        load_text(TextSource(path=str(tmp_path / "notes.docx")))
    with pytest.raises(ValueError, match=r"the folder holds no .parquet"):
        load_text(TextSource(path=str(tmp_path)))


def test_missing_column_lists_the_columns(tmp_path: Path) -> None:
    path = str(_write(tmp_path, "parquet"))
    with pytest.raises(ValueError, match="no column 'body'; set text_column to one of: kind, text"):
        load_text(TextSource(path=path, text_column="body"))
    with pytest.raises(ValueError, match="no column 'messages'; set chat_column to one of: kind, text"):
        load_text(TextSource(path=path, chat_column="messages"))
    with pytest.raises(ValueError, match="no column 'answer'; set prompt_column and completion_column to one of"):
        load_text(TextSource(path=path, prompt_column="text", completion_column="answer"))


def test_empty_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = datasets.Dataset.from_dict({"text": []}, features=datasets.Features({"text": datasets.Value("string")}))
    empty.to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(ValueError, match=r"corresponds to no data!; check path, split and name"):
        load_text(TextSource(path=str(tmp_path / "empty.parquet")))
    empty.save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"could not read .* from disk"):
        load_text(TextSource(path=str(tmp_path / "empty")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: empty)
    with pytest.raises(ValueError, match="'user/empty', split 'train', has no rows; choose another split or file"):
        load_text(TextSource(path="user/empty"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "path must not be empty"),
        ({"path": "x", "max_documents": 0}, "None or >= 1, got 0"),
        ({"path": "x", "ratio": 0.0}, "ratio must be positive and finite, got 0.0"),
        ({"path": "x", "ratio": float("inf")}, "ratio must be positive and finite"),
        ({"path": "x", "prompt_column": "p"}, "must be named together"),
        ({"path": "x", "prompt_column": "p", "completion_column": "c", "chat_column": "m"}, "got both"),
        ({"path": "x", "loss": "answers"}, "plain text has none; name chat_column"),
        ({"path": "x", "shuffle_buffer": 5}, "needs streaming, got 5"),
        ({"path": "x", "streaming": True, "split": "train[:5]"}, "a slice cannot be streamed"),
    ],
)
def test_bad_source(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSource(**options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "folder/a.jsonl"])
def test_empty_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(ValueError, match=r"could not read .* from disk: it is empty; check path"):
        load_text(TextSource(path=str(path.parent if "/" in name else path)))


def test_without_datasets_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_text(TextSource(path="user/corpus"))
