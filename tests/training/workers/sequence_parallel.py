"""Started by torchrun: sequence-parallel losses and gradients against the whole rows in one process.

Every rank computes the reference by itself, without sequence parallelism, then takes its share with it. Rank 0 prints
one JSON line per case: the largest absolute errors. With the argument `cuda` all of it runs in bf16 over NCCL, on rows
and heads that fused kernels serve.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainingArguments

from sparse_hf.config import SparseConfig
from sparse_hf.patching import apply_config, dense
from sparse_hf_training.data import collate
from sparse_hf_training.masks import MaskLearningConfig, attach_mask_learning
from sparse_hf_training.masks.learning import MODULE_NAME, get_mask_learning
from sparse_hf_training.sequence_parallel import (
    SequenceGroup,
    disable_sequence_parallel,
    enable_sequence_parallel,
    sequence_parallel_disabled,
    shard_batch,
    time_exchanges,
)
from sparse_hf_training.trainer import SparseTrainer

CUDA = sys.argv[1:] == ["cuda"]
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
HEAD_DIM, TIMES = (64, 16) if CUDA else (16, 1)
VOCABULARY = 97
STREAMING = {"method": "streaming", "num_sink_tokens": 2, "window_size": 6}
TRIANGLE = {"method": "triangle", "num_sink_tokens": 2, "window_size": 6, "num_last_tokens": 5}
XATTENTION = {"method": "xattention", "block_size": 64, "stride": 16, "threshold": [0.2, 0.9, 0.5, 0.35]}
MASKS = torch.tensor([[1, 0], [0, 1]])
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
MANY = XATTENTION | {"threshold": [0.2, 0.9, 0.5, 0.35, 0.7, 0.3, 0.8, 0.6]}


def make_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM} | changes
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, max_position_embeddings=8192, **shape
    )
    return AutoModelForCausalLM.from_config(config).to(DEVICE, torch.bfloat16 if CUDA else torch.float32)


def make_rows(lengths: list[list[int]]) -> dict[str, Tensor]:
    """One row of packed documents per list; a fifth of the labels are left out, each document's first among them."""
    lengths = [[n * TIMES for n in row] for row in lengths]
    generator = torch.Generator().manual_seed(1)
    size = (len(lengths), sum(lengths[0]))
    ids = torch.randint(0, VOCABULARY, size, generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    dropped = (torch.rand(size, generator=generator) < 0.2) | (positions == 0)
    rows = {"input_ids": ids, "labels": ids.masked_fill(dropped, -100), "position_ids": positions}
    return {name: value.to(DEVICE) for name, value in rows.items()}


def losses(model: PreTrainedModel, batch: dict[str, Tensor], with_teacher: bool) -> Tensor:
    """Summed cross-entropy at the labels, plus the KL divergence from the dense model."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    kept = batch["shift_labels"] != -100
    teacher = None
    if with_teacher:
        model.eval()
        with torch.no_grad(), dense(model):
            teacher = model(**inputs).logits[kept].float().log_softmax(-1)
        model.train()
    logits = model(**inputs).logits[kept].float()
    loss = F.cross_entropy(logits, batch["shift_labels"][kept], reduction="sum")
    if teacher is not None:
        loss = loss + F.kl_div(logits.log_softmax(-1), teacher, reduction="sum", log_target=True)
    return loss


def take(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of the weights, and of the gates under `gates.` names."""
    learned = [get_mask_learning(model)] if hasattr(model, MODULE_NAME) else []
    for module in (model, *learned):
        module.zero_grad()
    loss.backward()
    # Only now: FSDP2 puts other parameters in their place in the forward pass.
    named = [item for module in (model, *learned) for item in module.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def parity(
    group: SequenceGroup,
    lengths: list[list[int]],
    sparse: dict[str, Any],
    gated: bool,
    model: PreTrainedModel | None = None,
    checkpointing: bool = False,
    masks: Tensor = MASKS,
) -> dict[str, float]:
    model = make_model() if model is None else model
    model.train()
    apply_config(model, SparseConfig.from_dict({"sparse": sparse}), None if gated else masks)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if gated:
        attach_mask_learning(model, MaskLearningConfig(init_log_alpha=0.3))
        get_mask_learning(model).begin_step(0, 10)
    rows = make_rows(lengths)
    alone = SequenceGroup(name="", rank=0, size=1, data_rank=0, data_size=1)
    number = shard_batch(rows, alone)["shift_labels"].ne(-100).sum()
    expected_loss = losses(model, shard_batch(rows, alone), gated) / number
    expected = gradients(model, expected_loss)

    enable_sequence_parallel(model, group)
    if gated:
        get_mask_learning(model).begin_step(0, 10)  # the same noise again
    share = len(lengths) // group.data_size
    mine = take(rows, slice(group.data_rank * share, (group.data_rank + 1) * share))
    rows_of_mine = [{key: value[n] for key, value in mine.items()} for n in range(share)]
    whole = collate(rows_of_mine, pad_to_multiple_of=group.size)
    batch = {name: value.to(DEVICE) for name, value in shard_batch(whole, group).items()}
    with time_exchanges() as timer:
        loss = losses(model, batch, gated) * dist.get_world_size() / number
        found = gradients(model, loss)
    assert timer.calls and timer.seconds > 0
    assert found.keys() == expected.keys()
    for value in (total := {"loss": loss.detach(), **found}).values():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    errors = {name: (total[name] - grad).abs().max().item() for name, grad in expected.items()}
    gates = [name for name in expected if name.startswith("gates.")]
    disable_sequence_parallel(model)
    return {
        "loss": abs(total["loss"].item() - expected_loss.item()),
        "gradient": max(errors.values()),
        "gate_error": max((errors[name] for name in gates), default=0.0),
        "largest": max(grad.abs().max().item() for grad in expected.values()),
        "gate_gradient": max((expected[name].abs().max().item() for name in gates), default=-1.0),
        "exchanges": timer.calls,
    }


def check_fsdp(group: SequenceGroup) -> dict[str, float]:
    """FSDP2 over all ranks, which averages gradients itself."""
    model, rows = make_model().train(), make_rows([[20, 44], [33, 31]])
    apply_config(model, SparseConfig.from_dict({"sparse": STREAMING}), MASKS)
    alone = SequenceGroup(name="", rank=0, size=1, data_rank=0, data_size=1)
    number = shard_batch(rows, alone)["shift_labels"].ne(-100).sum()
    expected_loss = losses(model, shard_batch(rows, alone), False) / number
    expected = gradients(model, expected_loss)
    enable_sequence_parallel(model, group)
    for layer in model.base_model.layers:
        fully_shard(layer)
    fully_shard(model)
    share = 2 // group.data_size
    mine = take(rows, slice(group.data_rank * share, (group.data_rank + 1) * share))
    loss = losses(model, shard_batch(mine, group), False) * dist.get_world_size() / number
    found = {name: grad.full_tensor() for name, grad in gradients(model, loss).items()}
    return {
        "loss": 0.0,
        "gradient": max((found[name] - grad).abs().max().item() for name, grad in expected.items()),
        "largest": max(grad.abs().max().item() for grad in expected.values()),
    }


def check_disabled(group: SequenceGroup) -> dict[str, float]:
    """Within `sequence_parallel_disabled` and after undoing, whole rows give bitwise what they gave before."""
    model = make_model().eval()
    apply_config(model, SparseConfig.from_dict({"sparse": STREAMING}), MASKS)
    ids = make_rows([[64]])["input_ids"]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        tokens = model.generate(ids[:, :16], max_new_tokens=4, do_sample=False)
        enable_sequence_parallel(model, group)
        with sequence_parallel_disabled(model):
            within = model(ids, use_cache=False).logits
            again = model.generate(ids[:, :16], max_new_tokens=4, do_sample=False)
        disable_sequence_parallel(model)
        after = model(ids, use_cache=False).logits
    assert torch.equal(tokens, again)
    return {"loss": max((x - before).abs().max().item() for x in (within, after)), "gradient": 0.0}


def check_saved(group: SequenceGroup) -> dict[str, float]:
    """Bytes that the backward pass keeps, as a share of those of whole rows; weights apart."""
    model = make_model(num_key_value_heads=4)
    apply_config(model, SparseConfig.from_dict({"sparse": STREAMING}), torch.ones(2, 4))
    rows = make_rows([[256]])
    alone = SequenceGroup(name="", rank=0, size=1, data_rank=0, data_size=1)
    kept = []
    for place in (alone, group):
        if place is group:
            enable_sequence_parallel(model, group)
        batch = shard_batch(rows, place)
        storages: dict[int, int] = {}

        def keep(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = losses(model, batch, False)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for pointer, size in storages.items() if pointer not in weights))
        loss.backward()
    return {"loss": 0.0, "gradient": 0.0, "saved_share": kept[1] / kept[0]}


def check_plain_teacher(group: SequenceGroup) -> dict[str, float]:
    """A model that was never sparsified runs dense on slices, and gets its own attention back."""
    model = make_model("mistral", sliding_window=20).eval()
    rows = make_rows([[64]])
    with torch.no_grad():
        whole = model(rows["input_ids"], position_ids=rows["position_ids"]).logits
        enable_sequence_parallel(model, group)
        batch = shard_batch(rows, group)
        part = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        disable_sequence_parallel(model)
        assert torch.equal(model(rows["input_ids"], position_ids=rows["position_ids"]).logits, whole)
    error = (part - _slice(whole, group)).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return {"loss": error.item(), "gradient": 0.0}


def check_evaluation(group: SequenceGroup) -> dict[str, float]:
    """`SparseTrainer.evaluate` over slices, five rows with unequal numbers of labels: the mean of the rows' losses.

    `predict`, which returns logits, takes whole rows, each process its own.
    """
    model = make_model(**GROUPED).eval()
    apply_config(model, SparseConfig.from_dict({"sparse": STREAMING}), torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]]))
    rows = [take(make_rows([[20, 44], [64], [33, 31], [7, 57], [40, 24]]), slice(n, n + 1)) for n in range(5)]
    for number, row in enumerate(rows):
        row["labels"][:, : 12 * number * TIMES] = -100  # the first ranks' slices of the later rows have none
    alone = SequenceGroup(name="", rank=0, size=1, data_rank=0, data_size=1)
    with torch.no_grad():
        batches = [shard_batch(row, alone) for row in rows]
        expected = [losses(model, batch, False) / batch["shift_labels"].ne(-100).sum() for batch in batches]
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"per_device_eval_batch_size": 1, "report_to": "none", "disable_tqdm": True}
        arguments = TrainingArguments(folder, use_cpu=not CUDA, bf16=CUDA, remove_unused_columns=False, **settings)
        unbatched = [{key: value[0].cpu() for key, value in row.items()} for row in rows]
        trainer = SparseTrainer(model, arguments, eval_dataset={"held": unbatched}, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        enable_sequence_parallel(model, group)
        found = trainer.evaluate()["eval_held_loss"]
        slices, seen[:] = list(seen), []
        predicted = trainer.predict(unbatched)
    assert predicted.predictions.shape == (5, 64 * TIMES, VOCABULARY) and set(seen) == {64 * TIMES}
    disable_sequence_parallel(model)
    hook.remove()
    number = -(-len(rows) // group.data_size)
    assert slices == [64 * TIMES // group.size] * number, slices
    truth = torch.stack(expected).mean().item()
    return {"loss": max(abs(found - truth), abs(predicted.metrics["test_loss"] - truth)), "gradient": 0.0}


def _slice(x: Tensor, group: SequenceGroup) -> Tensor:
    return x.chunk(group.size, dim=1)[group.rank]


def main() -> None:
    if CUDA:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if CUDA else "gloo")
    world = dist.get_world_size()
    groups = [SequenceGroup.create(size) for size in (2, 4) if world % size == 0]
    assert [group.size * group.data_size for group in groups] == [world] * len(groups)
    plain, packed = [[64], [64]], [[20, 44], [33, 31]]
    long = [[160, 224], [384]]
    cases: dict[str, Callable[[SequenceGroup], dict[str, float]]] = {
        "streaming, gates": lambda g: parity(g, plain, STREAMING, True),
        "streaming, gates, packed, checkpointing": lambda g: parity(g, packed, STREAMING, True, checkpointing=True),
        "streaming, frozen, packed, padded to the group": lambda g: parity(g, [[20, 41], [33, 28]], STREAMING, False),
        "triangle, frozen": lambda g: parity(g, plain, TRIANGLE, False),
        "triangle, gates, packed": lambda g: parity(g, packed, TRIANGLE, True),
        "xattention, frozen, packed": lambda g: parity(g, long, XATTENTION, False),
        "xattention, gates, packed": lambda g: parity(g, long, XATTENTION, True),
        # Two ranks take the heads 0 and 1, 2 and 3 of the one layer and 0 and 2, 1 and 3 of the other.
        "heads in another order": lambda g: parity(
            g, long, MANY, False, make_model(**GROUPED), masks=torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])
        ),
        # One and three dense heads for two ranks: each takes a half of every head.
        "halves of heads": lambda g: parity(
            g, long, MANY, False, make_model(**GROUPED), masks=torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1]])
        ),
        "qwen3": lambda g: parity(g, packed, STREAMING, True, make_model("qwen3")),
        "frozen, packed, FSDP2": check_fsdp,
        "disabled": check_disabled,
        "memory": check_saved,
        "plain model": check_plain_teacher,
        "evaluation": check_evaluation,
    }
    for name, run in cases.items():
        for group in groups:
            result = run(group)
            if dist.get_rank() == 0:
                label = f"{name}: SP {group.size} x DP {group.data_size}"
                print(json.dumps({"case": label, **result}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
