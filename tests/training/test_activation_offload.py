"""Checkpointed activations in CPU memory: the same losses and gradients, less memory on the GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_hf import SparseConfig, Streaming, sparsify
from sparse_hf_training.config import RunConfig
from sparse_hf_training.masks import MaskLearningConfig
from sparse_hf_training.run import run_training
from sparse_hf_training.stages import prepare_stage
from sparse_hf_training.typed_config import build


def test_runs_are_bitwise_the_same(
    run_values: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[torch.Size] = []

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool, device_type: str) -> None:
            super().__init__(False, device_type)  # there is no device to pin memory for
            pack = self.pack_hook

            def counted(tensor: torch.Tensor) -> Any:
                packed.append(tensor.shape)
                return pack(tensor)

            self.pack_hook = counted

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Counted)
    outcomes = []
    for name, changes in (("kept", {}), ("offloaded", {"activation_offload": True})):
        values = run_values(
            output_dir=str(tmp_path / name),
            stage="masks_and_weights",
            evaluation={},
            trainer={"gradient_checkpointing": True},
            **changes,
        )
        outcomes.append(run_training(build(RunConfig, values)))
        if name == "kept":
            assert not packed
    # The input of each of 2 layers in each of 4 steps, and nothing else.
    assert packed.count(torch.Size([1, 256, 32])) == 8 == sum(len(shape) == 3 for shape in packed)
    for name, tensor in outcomes[0].model.state_dict().items():
        assert torch.equal(tensor, outcomes[1].model.state_dict()[name]), name
    assert torch.equal(outcomes[0].scores, outcomes[1].scores)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_peak_memory_falls_by_the_layers_inputs() -> None:
    hidden, seq_len, layers = 1024, 8192, 16
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=seq_len,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
    sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=64, window_size=512), head_masks="all_full"))
    learning = prepare_stage(model, "masks", MaskLearningConfig(init_log_alpha=0.5))
    assert learning is not None
    ids = torch.randint(0, 256, (1, seq_len), device="cuda")
    peaks, grads = [], []
    for offload in (False, True):
        model.gradient_checkpointing_enable(offload=offload)
        for _ in range(2):  # the second step has met all one-time allocations
            learning.zero_grad()
            learning.begin_step(1, 10)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        grads.append([p.grad.clone() for p in learning.gates.parameters() if p.grad is not None])
    saved = (layers - 2) * seq_len * hidden * 2
    assert peaks[1] - peaks[3] >= 0.8 * saved, f"peaks {peaks}, layers' inputs {saved} bytes"
    for kept, offloaded in zip(*grads, strict=True):
        torch.testing.assert_close(offloaded, kept, rtol=1e-3, atol=1e-5)
