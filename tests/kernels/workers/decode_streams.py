"""Two caches decode on two streams at once, eager and by graphs, and each has the bits of a run by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_hf_kernels.kv_cache import HeadStorage, KVStorage, StorageLayout, decode_attention, store_tokens
from sparse_hf_kernels.testing import parts_left

ROUNDS, LAUNCHES, DIM, GROUP = 50, 20, 128, 4
CUDA = torch.device("cuda")
RING = HeadStorage(recent=1023, num_sink_tokens=64)
LAYOUTS = [StorageLayout(heads=(HeadStorage(),) * 8), StorageLayout(heads=(HeadStorage(), HeadStorage(), RING, RING))]


class Cache:
    """One storage, a token for it, and a graph of steps."""

    def __init__(self, layout: StorageLayout, seed: int) -> None:
        torch.manual_seed(seed)
        heads, length = len(layout.heads), 6000
        self.storage = KVStorage(
            layout, batch=1, head_dim=DIM, value_dim=DIM, dtype=torch.bfloat16, device=CUDA, capacity=16384
        )
        store_tokens(self.storage, *(self.new(heads, length) for _ in range(2)), seen=0)
        self.token = [self.new(n) for n in (heads * GROUP, heads, heads)]
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        _, self.work = decode_attention(*self.token, self.storage, scale=DIM**-0.5)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            for _ in range(LAUNCHES):
                self.out = self.step()

    @staticmethod
    def new(heads: int, length: int = 1) -> Tensor:
        return torch.randn(1, length, heads, DIM, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)

    def step(self) -> Tensor:
        out, _ = decode_attention(*self.token, self.storage, scale=DIM**-0.5, work=self.work)
        return out

    def round(self) -> list[Tensor]:
        """LAUNCHES steps by the graph, and as many one by one."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()
            return [self.out.clone(), *(self.step() for _ in range(LAUNCHES))]


def main() -> None:
    alone = []
    for number, layout in enumerate(LAYOUTS):
        cache = Cache(layout, number)
        alone.append([out for _ in range(ROUNDS) for out in cache.round()])
        torch.cuda.synchronize()
    caches = [Cache(layout, number) for number, layout in enumerate(LAYOUTS)]
    together: list[list[Tensor]] = [[], []]
    for _ in range(ROUNDS):
        for cache, outs in zip(caches, together, strict=True):
            outs.extend(cache.round())
    torch.cuda.synchronize()
    for cache, outs, expected in zip(caches, together, alone, strict=True):
        for number, (out, other) in enumerate(zip(outs, expected, strict=True)):
            assert out.isfinite().all() and torch.equal(out, other), f"step {number}"
        assert cache.work is not None and max(parts_left(cache.work.counters)) > 1
    print(2 * ROUNDS * 2 * LAUNCHES, "steps")


if __name__ == "__main__":
    main()
