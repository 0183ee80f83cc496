"""How much a model's first generated token depends on the middle of each layer's attention matrix.

With S_ij the scaled scores before softmax, P = softmax(S), O = P V and G the gradient of a number by O:
dS_ij = P_ij (G_i . v_j - G_i . o_i). A layer's backward pass gives G; P is made again from q, k and the log-sum-exp,
for some queries at a time, so that memory grows linearly with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_hf.calibrate.probe import LayerCall, observed
from sparse_hf.methods import Triangle

CELLS_AT_ONCE = 2**26
"""Scores that are made at a time, all query heads of one KV head together."""
FP16_SCALE = 2.0**12
"""Factor on the logit of models in fp16, whose gradients would fall below its range."""

Found = Callable[[int, Tensor, int], None]
"""Takes a layer's number, sums of |dS| over the Middle, fp64 `[num_heads]` on the CPU, and the cells of one head."""


def num_middle_cells(triangle: Triangle, length: int, max_distance: int) -> int:
    """Pairs (i, j) of the Middle: j >= sinks, i - j >= window, i < length - last; and i - j < `max_distance`."""
    sinks, window = triangle.num_sink_tokens, triangle.window_size
    # Of query i: keys from max(sinks, i - max_distance + 1) to i - window.
    i = torch.arange(max(length - triangle.num_last_tokens, 0))
    first = (i - max_distance + 1).clamp_min(sinks)
    return int((i - window + 1 - first).clamp_min(0).sum())


@torch.no_grad()
def middle_gradients(call: LayerCall, grad: Tensor, triangle: Triangle, max_distance: int) -> Tensor:
    """Sums of |dS_ij| over the Middle, one unpadded sequence.

    Args:
        call: the layer's call; its `out` is the layer's output.
        grad: gradient by `out`, `[1, num_heads, q_len, head_dim]`.
        triangle: whose Middle.
        max_distance: the model's own window, beyond which it reads nothing.

    Returns:
        fp64 `[num_heads]` on the CPU.
    """
    _, num_heads, length, _ = call.q.shape
    num_kv_heads, device = call.k.shape[1], call.q.device
    group = num_heads // num_kv_heads
    sinks, window = triangle.num_sink_tokens, triangle.window_size
    begin, end = sinks + window, length - triangle.num_last_tokens
    sums = torch.zeros(num_heads, dtype=torch.float64, device=device)
    rows_at_once = max(1, CELLS_AT_ONCE // (group * length))
    for start in range(begin, end, rows_at_once):
        rows = slice(start, min(start + rows_at_once, end))
        keys = slice(max(sinks, start - max_distance + 1), rows.stop - window)
        if keys.start >= keys.stop:
            continue
        distance = torch.arange(rows.start, rows.stop, device=device)[:, None]
        distance = distance - torch.arange(keys.start, keys.stop, device=device)
        outside = (distance < window) | (distance >= max_distance)
        for head in range(num_kv_heads):
            heads = slice(head * group, (head + 1) * group)
            q, out, given = (x[0, heads, rows].float() for x in (call.q, call.out, grad))
            k, v = (x[0, head, keys].float() for x in (call.k, call.v))
            weights = (q @ k.T * call.scale - call.lse[0, heads, rows, None]).exp()
            change = given @ v.T - (given * out).sum(-1, keepdim=True)
            cells = (weights * change).abs_().masked_fill_(outside, 0)
            sums[heads] += cells.sum((1, 2), dtype=torch.float64)
    return sums.cpu()


def probe_middles(
    model: PreTrainedModel, ids: Tensor, triangle: Triangle, max_distances: tuple[int, ...], found: Found
) -> float:
    """Shows what the logit of a sequence's last token, predicted from all before it, owes to each layer's Middle.

    Activations are kept for one layer at a time (gradient checkpointing), besides q, k, v and output of each.

    Args:
        model: a dense model in evaluation mode.
        ids: int64 `[1, length + 1]`: the prompt and the ground truth of the first generated token.
        triangle: whose Middle.
        max_distances: each layer's own window.
        found: called for each layer that has a Middle at this length.

    Returns:
        The logit.
    """
    prompt, truth = ids[:, :-1], int(ids[0, -1])
    factor = FP16_SCALE if model.dtype == torch.float16 else 1.0
    length = prompt.shape[1]

    def observe(call: LayerCall) -> None:
        cells = num_middle_cells(triangle, length, max_distances[call.layer])
        if not cells or not call.out.requires_grad:
            return
        # Without the graph: a hook that holds its own tensor's graph is never freed.
        kept = {name: getattr(call, name).detach() for name in ("q", "k", "v", "out", "lse")}
        seen = LayerCall(**kept, layer=call.layer, scale=call.scale, positions=call.positions, module=call.module)

        def hook(grad: Tensor) -> None:
            sums = middle_gradients(seen, grad, triangle, max_distances[seen.layer])
            found(seen.layer, sums / factor, cells)

        call.out.register_hook(hook)

    with _differentiable(model), observed(model, observe), torch.enable_grad():
        hidden = model.base_model(input_ids=prompt, use_cache=False).last_hidden_state[:, -1]
        logit = model.get_output_embeddings()(hidden)[0, truth]
        (logit.float() * factor).backward()
    return logit.item()


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow through activations and stop at weights; layers are computed again in the backward pass."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    training, had = [layer.training for layer in layers], model.is_gradient_checkpointing
    for parameter in weights:
        parameter.requires_grad_(False)
    if not had:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    for layer in layers:
        layer.training = True  # of the layer alone, not of the dropouts in it: transformers checkpoints in training
    try:
        yield
    finally:
        for layer, before in zip(layers, training, strict=True):
            layer.training = before
        hook.remove()
        if not had:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # which enabling it asks for too
        for parameter in weights:
            parameter.requires_grad_(True)
