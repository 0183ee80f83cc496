"""The chunked objectives inside real models, against the whole logits and autograd."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_hf_kernels.testing import assert_close_to_truth
from sparse_hf_training.objectives import LossHead, ObjectiveConfig, TeacherStates, check_teacher, label_positions

VOCAB, HIDDEN, SEQ = 101, 32, 13
MIX = ObjectiveConfig(lm=0.5, kl=2.0, hidden=3.0, temperature=2.0)


def tiny(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    values |= (
        {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4}
        if family == "gpt2"
        else {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**values, **overrides})).train()


def batch(seed: int = 0, labels: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[2, SEQ]`, and 10 label tokens of ragged rows, or none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
    targets = ids.clone()
    targets[0, :6] = -100
    targets[1, 1:] = -100
    targets[1, 4:7] = ids[1, 4:7]
    return ids, *label_positions(targets if labels else torch.full_like(ids, -100))


def whole(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    data: tuple[Tensor, Tensor, Tensor],
    objective: ObjectiveConfig,
    scale: float,
) -> Tensor:
    """The objective from all logits, by definition."""
    ids, kept, targets = data
    output = model(ids, use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        reference = teacher(ids, use_cache=False, output_hidden_states=True)
    logits = output.logits[kept].float()
    log_q = (logits / objective.temperature).log_softmax(-1)
    log_p = (reference.logits[kept].float() / objective.temperature).log_softmax(-1)
    terms = {
        "lm": F.cross_entropy(logits, targets, reduction="sum"),
        "kl": (log_p.exp() * (log_p - log_q)).sum() * objective.temperature**2,
        "hidden": (output.hidden_states[-1][kept].float() - reference.hidden_states[-1][kept].float())
        .square()
        .mean(-1)
        .sum(),
    }
    return scale * sum(getattr(objective, name) * term for name, term in terms.items())


def chunked(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    data: tuple[Tensor, Tensor, Tensor],
    objective: ObjectiveConfig,
    scale: float,
) -> Tensor:
    ids, kept, targets = data
    head = LossHead(teacher)
    states = head.final_states(lambda: teacher(ids, use_cache=False), kept)
    value = LossHead(model).loss(
        lambda: model(ids, use_cache=False),
        kept,
        targets,
        objective,
        teacher=TeacherStates(states=states, project=head.module),
        scale=scale,
    )
    return value.loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def assert_same(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    theirs = gradients(expected)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())
    for name, gradient in gradients(actual).items():
        torch.testing.assert_close(
            gradient, theirs[name], msg=lambda text, n=name: f"{n}: {text}", rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_families(family: str, tied: bool) -> None:
    model, teacher = tiny(family, tie_word_embeddings=tied), tiny(family, seed=1)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    teacher.eval()
    expected = copy.deepcopy(model)
    loss = chunked(model, teacher, batch(), MIX, 0.1)
    truth = whole(expected, teacher, batch(), MIX, 0.1)
    torch.testing.assert_close(loss, truth)
    (2 * loss).backward()
    (2 * truth).backward()
    assert_same(model, expected)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 10, 2048])
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2, 3)], ids=["lm", "kl", "hidden", "sum"])
def test_terms_and_chunk_sizes(chunk_tokens: int, weights: tuple[float, float, float]) -> None:
    lm, kl, hidden = weights
    objective = ObjectiveConfig(lm=lm, kl=kl, hidden=hidden, temperature=1.5, chunk_tokens=chunk_tokens)
    model, teacher = tiny(), tiny(seed=1)
    expected = copy.deepcopy(model)
    loss, truth = (
        chunked(model, teacher, batch(), objective, 0.1),
        whole(expected, teacher, batch(), objective, 0.1),
    )
    torch.testing.assert_close(loss, truth)
    loss.backward()
    truth.backward()
    if not (lm or kl):
        # Its weight has no part in the loss; DDP still waits for its gradient.
        assert not gradients(model)["lm_head.weight"].any()
        expected.lm_head.weight.grad = torch.zeros_like(expected.lm_head.weight)
    assert_same(model, expected)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 2048])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bf16_is_as_exact_as_the_whole_logits_in_bf16(chunk_tokens: int, autocast: bool) -> None:
    objective = ObjectiveConfig(lm=0.5, kl=2.0, hidden=3.0, chunk_tokens=chunk_tokens)
    truth, teacher = tiny().bfloat16().float(), tiny(seed=1).bfloat16().float()
    low = copy.deepcopy(truth) if autocast else copy.deepcopy(truth).bfloat16()
    same, teacher_low = copy.deepcopy(low), copy.deepcopy(teacher) if autocast else copy.deepcopy(teacher).bfloat16()
    whole(truth, teacher, batch(), objective, 0.1).backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        baseline = whole(same, teacher_low, batch(), objective, 0.1)
        loss = chunked(low, teacher_low, batch(), objective, 0.1)
    baseline.backward()
    loss.backward()
    for name, gradient in gradients(truth).items():
        assert gradients(low)[name].dtype == low.get_parameter(name).dtype
        assert_close_to_truth(gradients(low)[name], gradients(same)[name], gradient, eps=5e-3, name=name)


class Adapted(nn.Module):
    """An output embedding that is no plain linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(HIDDEN, 4), nn.Linear(4, VOCAB)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("adapted", [False, True])
def test_own_teacher_under_autocast_leaves_no_cast_without_gradient(adapted: bool) -> None:
    model, objective = tiny(), ObjectiveConfig(kl=1.0, lm=0.5)
    if adapted:
        model.set_output_embeddings(Adapted(model.get_output_embeddings()))
    ids, kept, targets = batch()
    head = LossHead(model)
    with torch.autocast("cpu", torch.bfloat16):
        states = head.final_states(lambda: model(ids), kept)
    with torch.autocast("cpu", torch.bfloat16):
        value = head.loss(lambda: model(ids), kept, targets, objective, teacher=TeacherStates(states=states))
    value.loss.backward()
    assert value.terms["kl"].abs() < 1e-3  # the same model
    assert all(gradient.any() for gradient in gradients(model).values())


def test_weight_gradient_of_many_chunks_is_summed_in_fp32() -> None:
    model = tiny().bfloat16()
    whole_logits, truth = copy.deepcopy(model), copy.deepcopy(model).float()
    ids = torch.randint(0, VOCAB, (4, 128))
    kept, targets = label_positions(ids)
    LossHead(model).loss(
        lambda: model(ids), kept, targets, ObjectiveConfig(lm=1.0, kl=0.0, chunk_tokens=1)
    ).loss.backward()
    for other in (whole_logits, truth):
        F.cross_entropy(other(ids).logits[kept].float(), targets, reduction="sum").backward()
    assert_close_to_truth(
        model.lm_head.weight.grad, whole_logits.lm_head.weight.grad, truth.lm_head.weight.grad, eps=5e-4, name="weight"
    )


def test_value_is_fp32_where_an_engine_casts_what_the_model_returns() -> None:
    """As FSDP2's output_dtype: the loss passes through bf16, of which three digits remain."""
    model, objective = tiny(), ObjectiveConfig(lm=1.0, kl=0.0)
    ids, kept, targets = batch()

    def cast() -> Any:
        outputs = model(ids)
        outputs.logits = outputs.logits.bfloat16()
        return outputs

    exact = LossHead(model).loss(lambda: model(ids), kept, targets, objective, scale=1 / 3)
    exact.loss.backward()
    expected, model = model, tiny()
    value = LossHead(model).loss(cast, kept, targets, objective, scale=1 / 3)
    value.loss.backward()
    assert value.loss == exact.loss and value.loss.bfloat16().float() != value.loss
    assert all(torch.equal(g, gradients(expected)[name]) for name, g in gradients(model).items())


def test_no_label_tokens() -> None:
    model, teacher = tiny(), tiny(seed=1)
    for objective in (MIX, ObjectiveConfig(lm=1.0, kl=0.0)):
        model.zero_grad()
        loss = chunked(model, teacher, batch(labels=False), objective, 1.0)
        loss.backward()
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients(model).values())


def test_gradient_checkpointing_and_accumulation() -> None:
    model, teacher = tiny(), tiny(seed=1)
    expected = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(3):
        chunked(model, teacher, batch(seed), MIX, 0.1).backward()
        whole(expected, teacher, batch(seed), MIX, 0.1).backward()
    assert_same(model, expected)


@pytest.mark.parametrize("frozen", ["weights", "body", "head"])
def test_frozen_parts(frozen: str) -> None:
    """`weights`: gates alone would train; here the embeddings' output stands for what they feed."""
    model, teacher = tiny(), tiny(seed=1)
    for name, parameter in model.named_parameters():
        is_head = name.startswith("lm_head")
        trained = {"weights": False, "body": is_head, "head": not is_head}[frozen]
        parameter.requires_grad_(trained)
    if frozen == "weights":
        model.get_parameter("model.norm.weight").requires_grad_(True)
    expected = copy.deepcopy(model)
    loss = chunked(model, teacher, batch(), MIX, 0.1)
    loss.backward()
    whole(expected, teacher, batch(), MIX, 0.1).backward()
    assert_same(model, expected)


def test_head_that_is_no_plain_linear_layer() -> None:
    model, teacher = tiny(), tiny(seed=1)
    model.set_output_embeddings(Adapted(model.get_output_embeddings()))
    model.get_output_embeddings().base.requires_grad_(False)
    expected = copy.deepcopy(model)
    objective = ObjectiveConfig(lm=0.5, kl=2.0, hidden=3.0, chunk_tokens=3)
    chunked(model, teacher, batch(), objective, 0.1).backward()
    whole(expected, teacher, batch(), objective, 0.1).backward()
    assert_same(model, expected)


def test_linear_head_with_a_bias() -> None:
    model, teacher = tiny(), tiny(seed=1)
    model.lm_head = nn.Linear(HIDDEN, VOCAB)
    expected = copy.deepcopy(model)
    chunked(model, teacher, batch(), MIX, 0.1).backward()
    whole(expected, teacher, batch(), MIX, 0.1).backward()
    assert_same(model, expected)


def test_no_gradients_in_evaluation_and_no_logits() -> None:
    model = tiny().eval()
    ids, kept, targets = batch()
    with torch.no_grad():
        value = LossHead(model).loss(lambda: model(ids), kept, targets, ObjectiveConfig(lm=1.0, kl=0.0, chunk_tokens=3))
        expected = F.cross_entropy(model(ids).logits[kept], targets, reduction="sum")
    torch.testing.assert_close(value.loss, expected)
    torch.testing.assert_close(value.terms, {"lm": expected})
    assert value.outputs.logits is None and not value.loss.requires_grad


def test_model_is_untouched_between_calls_and_after_a_failure() -> None:
    model = tiny()
    ids, kept, targets = batch()
    before = model(ids).logits
    chunked(model, tiny(seed=1), batch(), MIX, 1.0)
    assert "forward" not in model.lm_head.__dict__ and torch.equal(model(ids).logits, before)
    with pytest.raises(ZeroDivisionError):
        LossHead(model).loss(lambda: 1 / 0, kept, targets, MIX)
    assert "forward" not in model.lm_head.__dict__

    calls = []

    def wrapper(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape)
        return nn.Linear.forward(model.lm_head, hidden)

    model.lm_head.forward = wrapper  # another library's, which must be used, and found again
    chunked(model, tiny(seed=1), batch(), MIX, 1.0)
    assert model.lm_head.forward is wrapper and calls == [(10, HIDDEN)]


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation returns, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_no_tensor_grows_with_label_tokens_times_vocabulary() -> None:
    vocab, seq = 4096, 512
    model, teacher = tiny(vocab_size=vocab), tiny(vocab_size=vocab, seed=1)
    ids = torch.randint(0, vocab, (1, seq))
    data = ids, *label_positions(ids)
    objective = ObjectiveConfig(lm=0.5, kl=2.0, hidden=3.0, chunk_tokens=16)
    with LargestTensor() as small:
        chunked(model, teacher, data, objective, 1.0).backward()
    assert small.largest == vocab * HIDDEN * 4  # the embedding's gradient; a chunk's logits have half of it
    with LargestTensor() as large:
        whole(model, teacher, data, objective, 1.0).backward()
    assert large.largest >= (seq - 1) * vocab * 4


def test_bytes_kept_for_the_backward_pass() -> None:
    """Counted by autograd's hooks and on the node itself: neither grows with label tokens times vocabulary."""

    def kept_bytes(chunk: bool, num_labels: int, vocab: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model, teacher = tiny(vocab_size=vocab), tiny(vocab_size=vocab, seed=1)
        model.lm_head.requires_grad_(False)
        ids = torch.randint(0, vocab, (1, 256))
        labels = ids.clone()
        labels[:, : 256 - num_labels] = -100
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = (chunked if chunk else whole)(model, teacher, (ids, *label_positions(labels)), MIX, 1.0)
        pending: list[Any] = [loss.grad_fn]
        seen = set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
            for gradient in tree_leaves(getattr(node, "gradients", None)):
                if isinstance(gradient, Tensor):
                    note(gradient)
        return sum(sizes.values())

    # 200 more label tokens cost less than their hidden states, whatever the vocabulary.
    for vocab in (512, 2048):
        assert abs(kept_bytes(True, 250, vocab) - kept_bytes(True, 50, vocab)) <= 200 * HIDDEN * 4
        assert kept_bytes(False, 250, vocab) - kept_bytes(False, 50, vocab) >= 200 * vocab * 4


def test_models_that_change_their_logits_are_refused() -> None:
    model = tiny("gemma2", final_logit_softcapping=30.0)
    ids, kept, targets = batch()
    with pytest.raises(ValueError, match="changes its logits after the output embedding"):
        LossHead(model).loss(lambda: model(ids), kept, targets, ObjectiveConfig(lm=1.0, kl=0.0))
    with pytest.raises(ValueError, match="changes its logits after the output embedding"):
        LossHead(model).final_states(lambda: model(ids), kept)
    scaled = tiny("cohere", logit_scale=0.5)
    with pytest.raises(ValueError, match="changes its logits"):
        LossHead(scaled).loss(lambda: scaled(ids), kept, targets, ObjectiveConfig(lm=1.0, kl=0.0))


def test_models_without_one_use_of_the_output_embedding_are_refused() -> None:
    model = tiny()
    ids, kept, targets = batch()
    with pytest.raises(ValueError, match="did not use its output embedding"):
        LossHead(model).loss(lambda: model.model(ids), kept, targets, ObjectiveConfig(lm=1.0, kl=0.0))
    with pytest.raises(ValueError, match="twice in one forward pass"):
        LossHead(model).loss(lambda: [model(ids), model(ids)], kept, targets, ObjectiveConfig(lm=1.0, kl=0.0))
    with pytest.raises(ValueError, match="has no output embedding"):
        LossHead(model.model)
    with pytest.raises(ValueError, match=r"hidden states of \[2, 13\] tokens do not fit labels of \[2, 12\]"):
        LossHead(model).loss(lambda: model(ids), kept[:, 1:], targets, ObjectiveConfig(lm=1.0, kl=0.0))


def test_teacher_of_another_size() -> None:
    model, teacher = tiny(), tiny(seed=1, hidden_size=48, num_attention_heads=6)
    objective = ObjectiveConfig(lm=0.5, kl=2.0, chunk_tokens=3)
    check_teacher(model, teacher, objective)
    expected = copy.deepcopy(model)
    chunked(model, teacher, batch(), objective, 0.1).backward()
    ids, kept, targets = batch()
    logits = expected(ids).logits[kept]
    log_p = teacher(ids).logits[kept].detach().log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), log_p, reduction="sum", log_target=True)
    (0.1 * (0.5 * F.cross_entropy(logits, targets, reduction="sum") + 2 * kl)).backward()
    assert_same(model, expected)
    with pytest.raises(ValueError, match=r"objective\.hidden needs a teacher of the student's hidden_size 32, got 48"):
        check_teacher(model, teacher, MIX)
    with pytest.raises(ValueError, match=r"objective\.kl needs a teacher of the student's vocab_size 101, got 99"):
        check_teacher(model, tiny(vocab_size=99), MIX)


def test_compiled_model() -> None:
    model, teacher = tiny(), tiny(seed=1)
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    head, other = LossHead(model), LossHead(teacher)
    for seed in range(4):
        ids, kept, targets = batch(seed)
        states = other.final_states(lambda ids=ids: teacher(ids), kept)
        sources = TeacherStates(states=states, project=other.module)
        value = head.loss(lambda ids=ids: compiled(ids), kept, targets, MIX, teacher=sources, scale=0.1)
        value.loss.backward()
        if seed == 0:
            frames = torch._dynamo.utils.counters["frames"]["total"]
            assert frames > 0
        whole(expected, teacher, batch(seed), MIX, 0.1).backward()
    assert torch._dynamo.utils.counters["frames"]["total"] == frames, "each step compiles again"
    assert_same(model, expected)


def test_kernel_is_said_once_and_liger_refused_where_it_cannot_run(caplog: pytest.LogCaptureFixture) -> None:
    model, objective = tiny(), ObjectiveConfig(lm=1.0, kl=0.0)
    ids, kept, targets = batch()
    head = LossHead(model)
    with caplog.at_level(logging.INFO, logger="sparse_hf_training.objectives"):
        for _ in range(2):
            head.loss(lambda: model(ids), kept, targets, objective)
    assert [r.message for r in caplog.records] == ["the loss is computed by torch (the tensors are not on CUDA)"]
    assert head.kernels == {"torch"}
    with pytest.raises(ValueError, match="kernel liger cannot be used: the tensors are not on CUDA"):
        head.loss(lambda: model(ids), kept, targets, ObjectiveConfig(lm=1.0, kl=0.0, kernel="liger"))
