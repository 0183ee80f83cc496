"""The artefact: a folder that carries what was learned. `sparse_config.json` + `head_masks.safetensors` + a card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf.adapters import ModelShape, adapter_for
from sparse_hf.config import HEAD_MASKS_FILE, SparseConfig, read_mapping, reject_unknown
from sparse_hf.head_masks import check_head_masks
from sparse_hf.lora import ADAPTER_FILES, base_module, has_adapter, holds_adapter, save_adapter, unwrapped

CONFIG_FILE = "sparse_config.json"
FORMAT_VERSION = 1
PROBE_SIZE = 256
WEIGHTS_FILES = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin")
"""What transformers and peft name files of weights."""
ADAPTER_ALONE = (
    ". It holds a LoRA adapter without the head masks that it was trained under; write both by "
    "save_artefact(model, ...), or load it by peft on a model that stays dense, if it was trained so"
)
_REQUIRED = ("format_version", "base_model_name_or_path", "base_model", "config")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What a folder holds.

    Args:
        config: the configuration; `head_masks` of it is "file".
        head_masks: integer `[num_layers, num_kv_heads]`.
        shape: attention shape of the base model.
        base_model_name_or_path: where the base model is found.
        scores: learned scores of the masks' shape, fp32, or None.
        probe: some weights of the base model, fp32, by which another model is told apart; or None.
        training: what was learned on what, JSON-plain, for the card.
        native_windows: the base model's own sliding window in each layer, UNBOUNDED without one; None when unknown.
        folder: where it was loaded from.
        adapter: it carries a LoRA adapter that was trained under the masks.
    """

    config: SparseConfig
    head_masks: Tensor
    shape: ModelShape
    base_model_name_or_path: str
    scores: Tensor | None = None
    probe: Tensor | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    native_windows: tuple[int, ...] | None = None
    folder: Path | None = None
    adapter: bool = False

    def check_base_model(self, model: PreTrainedModel) -> None:
        """Raises ValueError if the artefact was made for another model: another shape, or other weights."""
        model = unwrapped(model)
        shape = adapter_for(model).shape(model.config)
        if shape != self.shape:
            pairs = zip(self.shape.to_dict().items(), shape.to_dict().items(), strict=True)
            differ = [f"{name} {ours} != {theirs}" for (name, ours), (_, theirs) in pairs if ours != theirs]
            raise ValueError(
                f"this artefact was made for {self.base_model_name_or_path!r}; the model differs: {', '.join(differ)}"
            )
        # Earlier artefacts have the probe of a half.
        probes = [weight_probe(model, half=half) for half in (False, True)]
        if self.probe is not None and not any(probe is None or _same_weights(self.probe, probe) for probe in probes):
            raise ValueError(
                f"this artefact was made for {self.base_model_name_or_path!r}; the model has the same shape but other "
                "weights. If that is meant (a fine-tuned relative), pass check_base_model=False"
            )


def weight_probe(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None = None, *, half: bool = False
) -> Tensor | None:
    """`PROBE_SIZE` embedding weights in fp32, which casts leave recognisable; None where they are not in memory.

    Args:
        model: whose weights are asked for.
        state_dict: its whole weights, where its own are sharded.
        half: read the first half of the rows, which moves with every added token.
    """
    weight = base_module(model.get_input_embeddings()).weight
    assert isinstance(weight, Tensor)
    if state_dict is not None:
        weight = state_dict[next(name for name, own in model.named_parameters() if own is weight)]
    if weight.is_meta or weight.numel() < PROBE_SIZE:
        return None
    # Rows of an extended vocabulary come last: a power of two of the first rows stays the same when some are added.
    rows = max(1, weight.shape[0] // 2)
    flat = weight.detach()[: rows if half else 1 << rows.bit_length() - 1].flatten()
    # In integers: a float32 linspace rounds beyond the end of an 8B model's embedding.
    index = torch.arange(PROBE_SIZE) * (flat.numel() - 1) // (PROBE_SIZE - 1)
    return flat[index.to(flat.device)].float().cpu()


def _same_weights(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).norm() <= 1e-2 * a.norm()).item())


def save_artefact(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    scores: Tensor | None = None,
    training: Mapping[str, Any] | None = None,
    base_model_name_or_path: str | None = None,
    save_weights: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a sparsified model's artefact. The folder appears whole or not at all; an old one stays until then.

    Args:
        model: a sparsified model. Its LoRA adapter, if it has one, is always written: pass the `PeftModel` where peft
            made one.
        folder: where to.
        scores: learned scores `[num_layers, num_kv_heads]`.
        training: what was learned, on what, with which figures; goes into the card.
        base_model_name_or_path: by default where the model was loaded from.
        save_weights: also write the model's weights, when they were trained; the adapter alone where there is one.
        state_dict: whole weights, where the model's own are sharded; the embedding's at least.
        tokenizer: also written, so that an artefact with weights is a model folder like any other.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        ValueError: if the model is not sparsified or has gates that are being learned, the scores do not fit it, the
            folder exists and `overwrite` is off, it holds something else than an artefact, or it holds weights and none
            would take their place.
        OSError: if writing fails (disk full); the old folder is then untouched.
    """
    from sparse_hf.patching import get_handle

    def write_more(staging: Path) -> None:
        if adapter:
            save_adapter(model, staging, base_model_name_or_path=base, state_dict=state_dict)
        elif save_weights:
            model.save_pretrained(staging, state_dict=None if state_dict is None else dict(state_dict))
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)

    handle = get_handle(model)
    if any(state.gate is not None for state in handle.states):
        raise ValueError(
            "an artefact holds deployed head masks, and the model's gates still stand in their place; call "
            "detach_mask_learning(model) first"
        )
    adapter, inner = has_adapter(model), unwrapped(model)
    base = base_model_name_or_path or inner.config._name_or_path
    if not base:
        raise ValueError("the model does not know where it was loaded from; pass base_model_name_or_path")
    return write_artefact(
        folder,
        config=handle.config,
        head_masks=handle.head_masks,
        shape=handle.shape,
        base_model_name_or_path=base,
        scores=scores,
        probe=weight_probe(inner, state_dict),
        adapter=adapter,
        training=training,
        native_windows=[state.layout.max_distance for state in handle.states],
        write_more=write_more,
        overwrite=overwrite,
    )


def write_artefact(
    folder: str | Path,
    *,
    config: SparseConfig,
    head_masks: Tensor,
    shape: ModelShape,
    base_model_name_or_path: str,
    scores: Tensor | None = None,
    probe: Tensor | None = None,
    training: Mapping[str, Any] | None = None,
    native_windows: Sequence[int] | None = None,
    adapter: bool = False,
    write_more: Callable[[Path], Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an artefact without a model in memory; `save_artefact` is the way from a model.

    Args:
        folder: where to.
        config: its own `head_masks` are replaced by "file".
        head_masks, shape, base_model_name_or_path, scores, probe, training, native_windows: as in `Artefact`.
        adapter: `write_more` writes a LoRA adapter.
        write_more: called with the folder before the card is written, to add files.
        overwrite: replace an existing artefact.

    Returns:
        The folder.

    Raises:
        ValueError: if masks, scores or the configuration's rules do not fit the shape, the training record is not
            JSON-plain, the folder exists and `overwrite` is off, it holds something else than an artefact, or it holds
            weights and none would take their place.
        OSError: if writing fails (disk full); the old folder is then untouched.
    """
    from sparse_hf.model_card import write_model_card

    masks = check_head_masks(head_masks, shape)
    config.resolve(masks.tolist())
    tensors = {"head_masks": masks.to(torch.uint8)}
    if scores is not None:
        tensors["scores"] = _check_scores(scores, masks)
    if probe is not None:
        tensors["base_model_probe"] = probe
    document = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": base_model_name_or_path,
        "base_model": shape.to_dict(),
        "native_windows": None if native_windows is None else list(native_windows),
        "config": {**config.to_dict(), "head_masks": "file"},
        "training": dict(training or {}),
        **({"adapter": True} if adapter else {}),
    }
    try:
        text = json.dumps(document, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"the training record must hold plain JSON values: {error}") from error
    with replace_folder(Path(folder), overwrite=overwrite) as staging:
        save_file(tensors, staging / HEAD_MASKS_FILE, metadata={"format": "pt"})
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
        if write_more is not None:
            write_more(staging)
        write_model_card(staging)
    return Path(folder)


def _check_scores(scores: Tensor, masks: Tensor) -> Tensor:
    if scores.shape != masks.shape:
        raise ValueError(f"scores must be [num_layers, num_kv_heads] = {list(masks.shape)}, got {list(scores.shape)}")
    return scores.detach().float().cpu().contiguous()


def load_artefact(folder: str | Path) -> Artefact:
    """Reads and checks an artefact.

    Raises:
        ValueError: if files are missing, truncated or corrupt, keys are unknown, or the masks do not fit the shape
            that is written beside them.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        alone = ADAPTER_ALONE if holds_adapter(folder) else ""
        raise ValueError(f"{folder} is no artefact: it has no {CONFIG_FILE}{alone}")
    document = read_mapping(folder / CONFIG_FILE)
    if missing := [key for key in _REQUIRED if key not in document]:
        raise ValueError(f"{folder / CONFIG_FILE} lacks {missing}; write it with save_artefact or `sparse-hf export`")
    if document["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format_version {document['format_version']}, this sparse_hf reads "
            f"{FORMAT_VERSION}; update sparse_hf"
        )
    reject_unknown(str(folder / CONFIG_FILE), document, (*_REQUIRED, "native_windows", "training", "adapter"))
    adapter = bool(document.get("adapter"))
    _check_adapter_files(folder, adapter)
    try:
        shape = ModelShape(**document["base_model"])
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: base_model is not understood: {error}") from error
    tensors = read_tensors(folder / HEAD_MASKS_FILE)
    if "head_masks" not in tensors:
        raise ValueError(f"{folder / HEAD_MASKS_FILE} holds {sorted(tensors)}, not 'head_masks'")
    masks = check_head_masks(tensors["head_masks"], shape)
    windows, probe = document.get("native_windows"), tensors.get("base_model_probe")
    if windows is not None and not (isinstance(windows, list) and all(type(window) is int for window in windows)):
        raise ValueError(f"{folder / CONFIG_FILE}: native_windows must be a list of integers, got {windows!r}")
    if probe is not None and probe.dtype != torch.float32:
        raise ValueError(f"{folder / HEAD_MASKS_FILE}: base_model_probe must be float32, got {probe.dtype}")
    return Artefact(
        config=SparseConfig.from_dict(document["config"]),
        head_masks=masks,
        shape=shape,
        base_model_name_or_path=document["base_model_name_or_path"],
        scores=_check_scores(tensors["scores"], masks) if "scores" in tensors else None,
        probe=probe,
        training=document.get("training") or {},
        native_windows=None if windows is None else tuple(windows),
        folder=folder,
        adapter=adapter,
    )


def _check_adapter_files(folder: Path, expected: bool) -> None:
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if expected and missing:
        raise ValueError(f"{folder} lacks {missing}: its masks were learned with a LoRA adapter; copy it whole")
    if not expected and holds_adapter(folder):
        raise ValueError(
            f"{folder} holds a LoRA adapter that its {CONFIG_FILE} does not know; write both by "
            "save_artefact(model, ...) from a sparsified model that has the adapter"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: if it is missing, truncated or corrupt.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); write or download it again") from error


def holds_weights(folder: Path) -> bool:
    """Whether a model's or an adapter's weights lie in the folder."""
    return any(next(folder.glob(pattern), None) is not None for pattern in WEIGHTS_FILES)


def refuse_weights(folder: Path) -> None:
    """Raises ValueError if the folder holds weights; for what would replace it by a folder without any."""
    if holds_weights(folder):
        raise ValueError(
            f"{folder} holds weights, and what would replace it has none; choose another folder, or move or delete the "
            "weights yourself"
        )


@contextmanager
def replace_folder(folder: Path, *, overwrite: bool, marker: str = CONFIG_FILE) -> Iterator[Path]:
    """Yields an empty folder beside `folder` that takes its place when the block ends well, and vanishes when not.

    Args:
        folder: where the result shall stand; the target of a link is replaced, not the link.
        overwrite: replace a folder that holds `marker`, or an empty one.
        marker: the file by which a folder of this kind is known, so that nobody's home is overwritten.

    Raises:
        ValueError: if `folder` exists and `overwrite` is off, it holds something else, or it holds weights and what the
            block wrote has none: those may be the only copy of what was trained.
    """
    folder = folder.resolve()
    if folder.exists() and (not overwrite or not folder.is_dir()):
        raise ValueError(f"{folder} exists already; choose another folder or pass overwrite=True (--overwrite)")
    if folder.exists() and not (folder / marker).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no {marker}; it is not overwritten, choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield staging
        if not holds_weights(staging):
            refuse_weights(folder)
        staging.chmod(0o755)
        if folder.exists():
            # A folder cannot be renamed over another: step aside, take the place, then remove.
            aside = staging.with_name(staging.name + ".old")
            os.rename(folder, aside)
            try:
                os.rename(staging, folder)
            except OSError:
                os.rename(aside, folder)
                raise
            shutil.rmtree(aside)
        else:
            os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
