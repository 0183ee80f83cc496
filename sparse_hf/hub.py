"""Artefacts on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from sparse_hf.artefact import ADAPTER_ALONE, CONFIG_FILE, load_artefact
from sparse_hf.config import HEAD_MASKS_FILE
from sparse_hf.lora import ADAPTER_CONFIG_FILE, ADAPTER_FILES
from sparse_hf.presets import names_preset

ARTEFACT_FILES = (CONFIG_FILE, HEAD_MASKS_FILE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, and without what the Hub adds for its own support."""
    return " ".join(re.sub(r"\(Request ID: [^)]*\)", "", str(error)).split())


def is_hub_id(name: str) -> bool:
    """Whether a model's name looks like `user/model` on the Hub and is no folder here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def resolve_artefact_folder(
    spec: str, *, revision: str | None = None, token: str | bool | None = None, **options: Any
) -> Path:
    """The local folder of an artefact: the folder itself, or the Hub repository's configuration, masks and
    LoRA adapter, downloaded.

    Args:
        spec: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        token: Hub token.
        **options: go to `hf_hub_download` (`cache_dir`, `local_files_only`).

    Raises:
        ValueError: if there is neither a folder nor a reachable repository of that name, or it holds no artefact.
    """
    if Path(spec).is_dir():
        return Path(spec)
    if names_preset(spec):
        raise ValueError(
            f"{spec!r} is a preset and names no model; name one, as in `sparse-hf eval {spec} --model MODEL`, "
            f"`sparse-hf generate MODEL --sparse {spec}` or sparsify(model, {spec!r})"
        )
    if "/" not in spec:  # most likely a misspelt preset: the Hub, which retries for long, has no such artefacts
        raise ValueError(_nothing(spec))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = Path(hf_hub_download(spec, CONFIG_FILE, revision=revision, token=token, **options))
        # All files of one commit, even if somebody pushes in between.
        for name in (HEAD_MASKS_FILE, *(ADAPTER_FILES if _names_adapter(config) else ())):
            hf_hub_download(spec, name, revision=config.parent.name, token=token, **options)
    except HFValidationError as error:
        raise ValueError(_nothing(spec)) from error
    except LocalEntryNotFoundError as error:
        cause = one_line(error.__cause__ or error)
        raise ValueError(f"{spec!r} is no folder here, and the Hub cannot be reached for it: {cause}") from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"the Hub repository {spec!r} holds no sparse artefact ({', '.join(ARTEFACT_FILES)})"
            f"{_adapter_alone(spec, revision, token)}"
        ) from error
    except HfHubHTTPError as error:
        where = spec if revision is None else f"{spec}@{revision}"
        raise ValueError(
            f"{spec!r} is no preset or folder here, and the Hub refuses {where}: {one_line(error)}"
        ) from error
    return config.parent


def _nothing(spec: str) -> str:
    return (
        f"{spec!r} is neither a preset, a folder here, a file, nor a Hub id of an artefact, which looks like "
        "user/name; `sparse-hf methods` lists presets"
    )


def _names_adapter(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("adapter"))
    except (ValueError, AttributeError):
        return False  # `load_artefact` says what is wrong with it


def _adapter_alone(spec: str, revision: str | None, token: str | bool | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(spec, ADAPTER_CONFIG_FILE, revision=revision, token=token)
    except EntryNotFoundError:
        return ""
    return ADAPTER_ALONE


def has_weights(artefact: str, *, revision: str | None = None, token: str | bool | None = None, **options: Any) -> bool:
    """Whether the artefact carries the model's weights too; arguments as those of `resolve_artefact_folder`."""
    if Path(artefact).is_dir():
        return (Path(artefact) / "config.json").is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    # A download, not a question to the API: it also answers offline, from the cache.
    try:
        hf_hub_download(artefact, "config.json", revision=revision, token=token, **options)
    except EntryNotFoundError:
        return False
    return True


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload sparse attention artefact",
) -> str:
    """Checks an artefact's folder and uploads it; creates the repository (and branch) if need be.

    Args:
        folder: the artefact.
        repo_id: `user/name`.
        private: visibility of a repository that is created; None leaves it to the account's default.
        token: Hub token, by default the one that is logged in.
        revision: branch to write to, by default the main one.
        commit_message: first line of the commit.

    Returns:
        The commit's URL.

    Raises:
        ValueError: if the folder is no valid artefact, or `private` is asked for and the repository is public.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    from huggingface_hub import HfApi

    artefact = load_artefact(folder)
    base = artefact.base_model_name_or_path
    if not is_hub_id(base) and not (Path(folder) / "config.json").is_file() and Path(base).exists():
        warnings.warn(
            f"the artefact names the local folder {base!r} as its base model: others can use it with "
            f"sparsify(model, {repo_id!r}), but not with AutoSparseModelForCausalLM",
            stacklevel=2,
        )
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo.repo_id).private:
        raise ValueError(f"{repo.repo_id} exists and is public; make it private in its settings, or drop private=True")
    if revision is not None:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id, folder_path=folder, revision=revision, commit_message=commit_message
    )
    return str(commit.commit_url)
