"""On CUDA: Liger's kernel against torch, and the memory that chunks save."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf_kernels.testing import assert_close_to_truth
from sparse_hf_training.objectives import LossHead, ObjectiveConfig, TeacherStates, label_positions

pytestmark = pytest.mark.gpu

VOCAB, HIDDEN, SEQ = 32_003, 256, 1023


def tiny(dtype: torch.dtype, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.1,
        "max_position_embeddings": 32_768,
        **overrides,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).to("cuda", dtype).train()


def labelled(seq: int = SEQ, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, vocab, (2, seq), device="cuda")
    labels = ids.clone()
    labels[0, : seq // 3] = -100
    return ids, *label_positions(labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_liger_is_as_exact_as_torch(dtype: torch.dtype, tied: bool, frozen_head: bool) -> None:
    pytest.importorskip("liger_kernel")
    truth = tiny(dtype, tie_word_embeddings=tied).float()
    truth.get_output_embeddings().weight.requires_grad_(not frozen_head)
    ids, kept, targets = labelled()
    models = {"torch": copy.deepcopy(truth).to(dtype), "liger": copy.deepcopy(truth).to(dtype)}
    scale = 3.0 / targets.numel()
    expected = scale * F.cross_entropy(truth(ids).logits[kept], targets, reduction="sum")
    expected.backward()
    losses = {}
    for kernel, model in models.items():
        head, objective = LossHead(model), ObjectiveConfig(lm=1.0, kl=0.0, kernel=kernel, chunk_tokens=256)
        value = head.loss(lambda m=model: m(ids), kept, targets, objective, scale=scale)
        assert head.kernels == {kernel}
        value.loss.backward()
        losses[kernel] = value.loss.detach()
    assert_close_to_truth(losses["liger"], losses["torch"], expected.detach(), eps=1e-4, name="loss")
    eps = 1e-4 if dtype == torch.float32 else 5e-3
    for name, parameter in truth.named_parameters():
        if parameter.requires_grad:
            ours, theirs = (models[k].get_parameter(name).grad for k in ("liger", "torch"))
            assert ours is not None and theirs is not None and parameter.grad is not None
            assert ours.dtype == dtype
            assert_close_to_truth(ours, theirs, parameter.grad, eps=eps, name=name)


def test_auto_takes_liger_for_lm_alone_and_torch_for_a_batch_without_labels() -> None:
    pytest.importorskip("liger_kernel")
    model = tiny(torch.bfloat16)
    ids, kept, targets = labelled()
    head = LossHead(model)
    head.loss(lambda: model(ids), kept, targets, ObjectiveConfig(lm=1.0, kl=0.0))
    assert head.kernels == {"liger"}
    empty = head.loss(lambda: model(ids), torch.zeros_like(kept), targets[:0], ObjectiveConfig(lm=1.0, kl=0.0))
    empty.loss.backward()
    assert empty.loss == 0 and not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_sum_of_terms_is_as_exact_as_the_whole_logits(autocast: bool) -> None:
    truth, teacher = tiny(torch.bfloat16).float(), tiny(torch.bfloat16, seed=1).float()
    dtype = torch.float32 if autocast else torch.bfloat16
    chunks, whole = copy.deepcopy(truth).to(dtype), copy.deepcopy(truth).to(dtype)
    ids, kept, targets = labelled()
    objective = ObjectiveConfig(lm=0.5, kl=2.0, hidden=3.0, temperature=2.0, chunk_tokens=100)

    def by_definition(model: PreTrainedModel, other: PreTrainedModel) -> Tensor:
        output = model(ids, output_hidden_states=True)
        with torch.no_grad():
            reference = other(ids, output_hidden_states=True)
        logits, theirs = output.logits[kept].float(), reference.logits[kept].float()
        kl = F.kl_div((logits / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), reduction="sum", log_target=True)
        states, aims = output.hidden_states[-1][kept].float(), reference.hidden_states[-1][kept].float()
        distance = (states - aims).square().mean(-1).sum()
        return (0.5 * F.cross_entropy(logits, targets, reduction="sum") + 8 * kl + 3 * distance) / targets.numel()

    by_definition(truth, teacher).backward()
    low = copy.deepcopy(teacher).to(dtype)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        baseline = by_definition(whole, low)
        other = LossHead(low)
        sources = TeacherStates(states=other.final_states(lambda: low(ids), kept), project=other.module)
        value = LossHead(chunks).loss(
            lambda: chunks(ids), kept, targets, objective, teacher=sources, scale=1 / targets.numel()
        )
    baseline.backward()
    value.loss.backward()
    for name, parameter in truth.named_parameters():
        ours, theirs = chunks.get_parameter(name).grad, whole.get_parameter(name).grad
        assert ours is not None and theirs is not None and parameter.grad is not None
        assert_close_to_truth(ours, theirs, parameter.grad, eps=5e-3, name=name)


def peak_bytes(objective: ObjectiveConfig, seq: int, vocab: int) -> int:
    """Allocated at most during a forward and backward pass of the head, beyond what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    model = tiny(torch.bfloat16, vocab_size=vocab)
    ids, kept, targets = labelled(seq, vocab)
    head = LossHead(model)
    sources = TeacherStates(states=head.final_states(lambda: model(ids), kept)) if objective.needs_teacher else None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head.loss(lambda: model(ids), kept, targets, objective, teacher=sources).loss.backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("kl", [0.0, 1.0], ids=["lm", "kl"])
def test_memory_is_that_of_one_chunk(kl: float) -> None:
    seq, vocab = 8192, 128_256
    objective = ObjectiveConfig(lm=1.0, kl=kl, chunk_tokens=512, kernel="torch")
    peak = peak_bytes(objective, seq, vocab)
    # A chunk in fp32, a few times over, and the weight's gradient in fp32 and bf16; all logits would be 3.5 GB in bf16.
    assert peak < 8 * 512 * vocab * 4 + 3 * vocab * HIDDEN * 4 + 40 * 2 * seq * HIDDEN * 4
