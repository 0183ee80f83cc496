"""What tests and benchmarks assert: tolerances relative to what the precision costs, counters of decode launches."""

from __future__ import annotations

from torch import Tensor


def assert_close_to_truth(actual: Tensor, same_precision: Tensor, truth: Tensor, *, eps: float, name: str) -> None:
    """Asserts |actual - truth| <= |same_precision - truth| + eps, the rule of ml-cross-entropy's tests.

    Errors are relative in the Frobenius norm, so that neither the size of the tensor nor its scale matters.

    Args:
        actual: what is tested.
        same_precision: a trusted computation in the tested precision.
        truth: the fp32 reference.
        eps: allowance on the relative error.
        name: what the message calls the tensor.
    """
    norm = truth.float().norm().clamp_min(1e-30)
    error = ((actual.float() - truth.float()).norm() / norm).item()
    baseline = ((same_precision.float() - truth.float()).norm() / norm).item()
    # `not <=` instead of `>`, so that a NaN fails.
    if not error <= baseline + eps:
        raise AssertionError(
            f"{name}: relative error {error:.2e} exceeds {baseline:.2e} of the same precision + {eps:.0e}"
        )


def parts_left(counters: Tensor) -> list[int]:
    """How many programs left a part of each row (0: one had it to itself) in the last of the decode launches with these
    counters, see `Workspace`.

    Raises:
        AssertionError: if it did not leave them as the next one needs them.
    """
    values, rows = counters.tolist(), (len(counters) - 2) // 2
    (ended, turn), sets = values[:2], (values[2 : 2 + rows], values[2 + rows :])
    if ended != 0 or turn not in (0, 1) or any(sets[turn]):
        raise AssertionError(f"expected 0, a turn and its counters at 0 (one of two sets), got {ended}, {turn}, {sets}")
    return sets[1 - turn]
