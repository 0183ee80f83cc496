"""LoRA and QLoRA under masks: what trains, what the teacher is, what is saved and read back, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_hf import AutoSparseModelForCausalLM, SparseConfig, Streaming, dense, save_artefact, sparsify, unsparsify
from sparse_hf.artefact import load_artefact
from sparse_hf.lora import MARKER, adapter_targets, adapters_disabled, has_adapter
from sparse_hf.patching import get_handle
from sparse_hf_training.config import RunConfig
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.peft import LoraConfig, add_lora, load_base
from sparse_hf_training.run import RunResult, run_training
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.typed_config import build

Values = Callable[..., dict[str, Any]]
LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SPARSE = SparseConfig(sparse=Streaming(num_sink_tokens=2, window_size=8), head_masks=((1, 0), (0, 0)))
IDS = torch.arange(1, 49)[None]


def run(values: dict[str, Any]) -> RunResult:
    return run_training(build(RunConfig, values))


def lora_values(run_values: Values, **changes: Any) -> dict[str, Any]:
    objective = {"lm": 1.0, "kl": 0.5}
    return run_values(
        **{"stage": "masks_and_weights", "lora": LORA, "objective": objective, "evaluation": {}, **changes}
    )


def moved_lora(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """With an adapter that changes what the model computes."""
    add_lora(model, LoraConfig(**{"rank": 4, **changes}))
    with torch.no_grad():
        for parameter in adapter_targets(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


# ---- runs ----


def test_adapter_and_gates_train_and_reload_whole(run_values: Values, model_folder: Path, tmp_path: Path) -> None:
    result = run(lora_values(run_values))
    base = load(model_folder).state_dict()
    state = result.model.state_dict()
    kept = {name.replace(".base_layer", ""): t for name, t in state.items() if "lora_" not in name}
    assert set(kept) == set(base) and all(torch.equal(kept[name], tensor) for name, tensor in base.items())
    b = {name: t for name, t in state.items() if "lora_B" in name}
    assert len(b) == 6 and all(bool(tensor.any()) for tensor in b.values())  # they begin at 0
    assert result.scores is not None and not torch.equal(result.scores, torch.full_like(result.scores, 1.0))
    rows = [row for row in result.history if "loss/kl" in row]
    # Masks start full and the adapter at 0: the teacher is the student. A teacher with the adapter would stay at 0.
    assert rows[0]["loss/kl"] < rows[-1]["loss/kl"]

    files = {path.name for path in result.artefact.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "sparse_config.json"} <= files
    assert not {"model.safetensors", "config.json"} & files
    artefact = load_artefact(result.artefact)
    assert artefact.adapter and artefact.base_model_name_or_path == str(model_folder)
    expected = logits(result.model.eval())
    assert torch.equal(logits(AutoSparseModelForCausalLM.from_pretrained(result.artefact).eval()), expected)
    onto_base = load(model_folder)
    plain = logits(onto_base)
    assert torch.equal(logits(sparsify(onto_base, result.artefact).eval()), expected)
    assert not has_adapter(unsparsify(onto_base)) and torch.equal(logits(onto_base), plain)

    # A second stage goes on with the adapter, by the artefact alone.
    second = run(
        lora_values(
            run_values,
            stage="sft",
            lora=None,
            model=str(result.artefact),
            sparse=str(result.artefact),
            output_dir=str(tmp_path / "second"),
        )
    )
    assert load_artefact(second.artefact).base_model_name_or_path == str(model_folder)
    again = AutoSparseModelForCausalLM.from_pretrained(second.artefact).eval()
    assert torch.equal(logits(again), logits(second.model.eval())) and not torch.equal(logits(again), expected)


def test_resumed_run_is_the_run_that_was_not_killed(run_values: Values, tmp_path: Path) -> None:
    lora = {**LORA, "dropout": 0.1, "modules_to_save": ["lm_head"]}
    whole = run(lora_values(run_values, lora=lora))
    output = Path(str(whole.artefact.parent))
    expected = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    shutil.rmtree(output / "checkpoint-4")
    shutil.rmtree(output / "artefact")
    again = run(lora_values(run_values, lora=lora))
    assert [row["step"] for row in again.history if "loss" in row] == [1, 2, 3, 4]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    assert torch.equal(again.scores, whole.scores)  # type: ignore[arg-type]
    assert (output / "checkpoint-4" / "adapter_model.safetensors").is_file()
    assert not (output / "checkpoint-4" / "model.safetensors").exists()


def test_quantized_weights(run_values: Values, tmp_path: Path) -> None:
    """Gates alone, and an adapter, over 4-bit weights."""
    masks = run(run_values(quantization="nf4", evaluation={}, trainer={"max_steps": 2}))
    projection: Any = masks.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert projection.weight.dtype == torch.uint8
    assert torch.equal(get_handle(masks.model).head_masks, load_artefact(masks.artefact).head_masks)
    values = lora_values(run_values, quantization="nf4", trainer={"max_steps": 2}, output_dir=str(tmp_path / "qlora"))
    result = run(values)
    wrapped: Any = result.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert wrapped.base_layer.weight.dtype == torch.uint8 and bool(wrapped.lora_B["default"].weight.any())
    with dense(result.model), adapters_disabled(result.model):
        result.model.eval()
        exact = logits(load(Path(values["model"])))
        assert 0 < (logits(result.model) - exact).norm() < 0.3 * exact.norm()
    again = load_base(str(result.artefact), torch.float32, quantization="nf4").eval()
    assert has_adapter(again)
    assert torch.equal(logits(sparsify(again, result.artefact)), logits(result.model))
    with pytest.raises(ValueError, match="quantised weights do not train"):
        run(run_values(stage="masks_and_weights", quantization="nf4", output_dir=str(tmp_path / "none"), evaluation={}))


def test_refusals_of_the_configuration(run_values: Values) -> None:
    for changes, message in (
        ({"stage": "masks", "lora": LORA}, "lora trains in the stages"),
        ({"stage": "sft", "lora": {"rank": 0}}, "lora.rank"),
        ({"quantization": "int3"}, "nf4"),
        ({"activation_offload": True}, "gradient_checkpointing"),
        ({"compile": True, "seq_parallel_size": 2}, "seq_parallel_size=1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(RunConfig, run_values(**changes))


def test_missing_bitsandbytes_is_said(run_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    import sparse_hf_training.peft as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        run(run_values(quantization="nf4", evaluation={}))


# ---- stages ----


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("stage", ["masks", "masks_and_weights", "sft"])
def test_stages_leave_base_weights_frozen(model_folder: Path, stage: Any, wrapped: bool) -> None:
    model: Any = load(model_folder)
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    if wrapped:
        model = peft.get_peft_model(model, config)
    else:
        add_lora(model, LoraConfig(rank=4, modules_to_save=("lm_head",)))
    sparsify(model, SPARSE)
    prepare_stage(model, stage, MaskLearningConfig())
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save" in name}
    assert own and trains == (set() if stage == "masks" else own)


def test_peft_model_draws_gates(model_folder: Path) -> None:
    """PeftModel calls the inner model's `forward`, where hooks on that model do not run."""
    model: Any = peft.get_peft_model(load(model_folder), peft.LoraConfig(r=4, target_modules="all-linear"))
    learning = prepare_stage(sparsify(model, SPARSE), "masks_and_weights", MaskLearningConfig(init_log_alpha=0.0))
    assert learning is not None
    model.train()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert learning.micro_step == 1
    assert all(p.grad is not None and bool(p.grad.any()) for p in learning.gates.parameters())


def test_teacher_of_an_adapter_is_the_base_model(model_folder: Path) -> None:
    model = load(model_folder)
    expected = logits(model)
    moved_lora(model, modules_to_save=("lm_head",))
    sparsify(model, SPARSE)
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not torch.allclose(logits(model), expected)
    with dense(model), adapters_disabled(model):
        assert torch.equal(logits(model), expected)
        assert frozen == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not torch.allclose(logits(model), expected)


# ---- artefacts ----


@pytest.mark.parametrize("wrapped", [False, True])
def test_artefact_of_either_kind_of_model(model_folder: Path, tmp_path: Path, wrapped: bool) -> None:
    model: Any = load(model_folder)
    if wrapped:
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter in adapter_targets(model).values():
                parameter.add_(0.2 * torch.randn_like(parameter))
    else:
        moved_lora(model)
    plain = logits(model)
    sparsify(model, SPARSE)
    expected = logits(model)
    assert not torch.allclose(expected, plain)
    folder = save_artefact(model, tmp_path / "artefact")
    assert torch.equal(logits(AutoSparseModelForCausalLM.from_pretrained(folder).eval()), expected)
    assert torch.equal(logits(unsparsify(model)), plain)
    # The adapter that is there already is recognised, and stays.
    assert torch.equal(logits(sparsify(model, folder)), expected)
    assert has_adapter(unsparsify(model))
    with torch.no_grad():
        next(iter(adapter_targets(model).values())).add_(1.0)
    with pytest.raises(ValueError, match="but not the one of"):
        sparsify(model, folder)
    if wrapped:
        sparsify(model, SPARSE)
        with pytest.raises(ValueError, match="pass the PeftModel"):
            save_artefact(model.get_base_model(), tmp_path / "inner")


def test_incomplete_artefacts_are_refused(model_folder: Path, tmp_path: Path) -> None:
    model = sparsify(moved_lora(load(model_folder)), SPARSE)
    whole = save_artefact(model, tmp_path / "whole")
    alone = tmp_path / "alone"
    model.save_pretrained(alone)
    for use in (AutoSparseModelForCausalLM.from_pretrained, lambda folder: sparsify(load(model_folder), folder)):
        with pytest.raises(ValueError, match="a LoRA adapter without the head masks"):
            use(alone)
    for name, message in (("adapter_model.safetensors", "lacks"), ("head_masks.safetensors", "no such file")):
        broken = tmp_path / name
        shutil.copytree(whole, broken)
        (broken / name).unlink()
        with pytest.raises(ValueError, match=message):
            AutoSparseModelForCausalLM.from_pretrained(broken)
    strange = tmp_path / "strange"
    shutil.copytree(whole, strange)
    document = json.loads((strange / "sparse_config.json").read_text())
    (strange / "sparse_config.json").write_text(json.dumps({k: v for k, v in document.items() if k != "adapter"}))
    with pytest.raises(ValueError, match="does not know"):
        AutoSparseModelForCausalLM.from_pretrained(strange)


def test_adapter_that_does_not_fit_leaves_the_model_alone(model_folder: Path, tmp_path: Path) -> None:
    folder = save_artefact(sparsify(moved_lora(load(model_folder)), SPARSE), tmp_path / "artefact")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    model = load(model_folder)
    names, before = set(dict(model.named_modules())), logits(model)
    with pytest.raises(ValueError, match="another adapter"):
        sparsify(model, folder)
    assert set(dict(model.named_modules())) == names and torch.equal(logits(model), before)
    assert not has_adapter(model)


def test_plain_peft_warns_of_missing_masks(model_folder: Path, tmp_path: Path) -> None:
    folder = save_artefact(sparsify(moved_lora(load(model_folder)), SPARSE), tmp_path / "artefact")
    with pytest.warns(UserWarning, match=MARKER):
        peft.PeftModel.from_pretrained(load(model_folder), folder)
    assert "adapter and masks belong together" in (folder / "README.md").read_text()


def test_adapter_in_bf16_models_stays_fp32(model_folder: Path, tmp_path: Path) -> None:
    model = moved_lora(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16))
    assert {p.dtype for p in adapter_targets(model).values()} == {torch.float32}
    folder = save_artefact(sparsify(model, SPARSE), tmp_path / "artefact")
    again = AutoSparseModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(again), logits(model))
