"""Which terms make up the loss, and how they are computed."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = ("auto", "torch", "liger")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the terms, each a mean over the label tokens, and how they are computed.

    Args:
        lm: cross-entropy with the labels.
        kl: KL divergence from the teacher's next-token distribution to the sparse model's, at the label tokens.
        hidden: squared distance of the final hidden states from the teacher's, at the label tokens (DuoAttention).
        temperature: of both distributions in the KL term.
        chunk_tokens: label tokens whose logits exist at one time.
        kernel: what computes `lm` alone: `torch`, `liger` (Liger's fused linear cross-entropy), or `auto`: Liger where
            it is installed, on CUDA. Sums of terms are computed by torch.
    """

    lm: float = 0.0
    kl: float = 1.0
    hidden: float = 0.0
    temperature: float = 1.0
    chunk_tokens: int = 2048
    kernel: str = "auto"

    def __post_init__(self) -> None:
        weights = (self.lm, self.kl, self.hidden)
        # `not >=` and `not >`, so that NaN is refused.
        if not all(weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(
                "objective: weights must not be negative and one must be positive, "
                f"got lm {self.lm}, kl {self.kl}, hidden {self.hidden}"
            )
        if not self.temperature > 0:
            raise ValueError(f"objective: temperature must be positive, got {self.temperature}")
        if self.chunk_tokens < 1:
            raise ValueError(f"objective: chunk_tokens must be positive, got {self.chunk_tokens}")
        if self.kernel not in KERNELS:
            raise ValueError(f"objective: kernel must be one of {list(KERNELS)}, got {self.kernel!r}")
        if self.kernel == "liger" and not self.only_lm:
            raise ValueError("objective: kernel liger computes lm alone; set kl and hidden to 0, or kernel to auto")

    @property
    def only_lm(self) -> bool:
        return self.kl == 0 and self.hidden == 0

    @property
    def needs_teacher(self) -> bool:
        return not self.only_lm

    @property
    def needs_logits(self) -> bool:
        return self.lm > 0 or self.kl > 0
