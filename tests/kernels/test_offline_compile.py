"""Every kernel and configuration, compiled for GPUs that are not there: what fits, what spills, which instructions.

By default sm_90 and sm_80 with the configurations that differ most; `pytest --all-archs tests/kernels` adds sm_89,
sm_100 and sm_120, the other dtypes and layouts (about 20 minutes on two cores). To see the figures themselves:
`python tests/kernels/offline_compile.py sm_90 gluon`. Compiling happens in processes of its own, so no setting, driver
or cache of Triton's in this one changes.
"""

from __future__ import annotations

import ast
import dataclasses
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the worker processes need an ordinary module, under an ordinary name
try:
    from offline_compile import SHARED_LIMITS, Group, Report, compile_group, isolate, kernel_names
finally:
    sys.path.remove(str(HERE))

HEAD_DIMS = (64, 128, 256)
MAIN_GLUON = ("causal", "last rows, padded", "both ways, padded")
MAIN = ("streaming", "lists", "holes, cut blocks")

DEFAULT = [
    Group(family="gluon", arch=90, head_dims=(128,)),
    Group(family="gluon", arch=90, head_dims=(128,), dtypes=("float16",), names=MAIN_GLUON),
    *(Group(family="gluon", arch=90, head_dims=(dim,), names=MAIN_GLUON) for dim in (64, 256)),
    *(Group(family="triton", arch=90, head_dims=(dim,), names=(*MAIN, "both ways, padded")) for dim in HEAD_DIMS),
    *(Group(family="triton", arch=80, head_dims=(dim,), names=MAIN) for dim in (64, 128)),
    Group(family="scoring", arch=90, head_dims=(64, 128)),
    Group(family="scoring", arch=80, head_dims=(128,)),
    *(Group(family="cache", arch=90, head_dims=(dim,)) for dim in (64, 128)),
    Group(family="cache", arch=80, head_dims=(128,)),
]  # fmt: skip

ALL = [
    *(Group(family="gluon", arch=90, head_dims=(dim,), dtypes=("bfloat16", "float16")) for dim in HEAD_DIMS),
    *(Group(family="triton", arch=arch, head_dims=(dim,), dtypes=("bfloat16", "float16"))
      for arch in SHARED_LIMITS for dim in HEAD_DIMS),
    *(Group(family="scoring", arch=arch, head_dims=(dim,), dtypes=("bfloat16", "float16", "float32"))
      for arch in SHARED_LIMITS for dim in HEAD_DIMS),
    *(Group(family="cache", arch=arch, head_dims=(dim,), dtypes=("bfloat16", "float16"))
      for arch in SHARED_LIMITS for dim in HEAD_DIMS),
]  # fmt: skip

SPILLS: dict[tuple[str, int], dict[int, int]] = {
    ("_dkdv_kernel", 90): {128: 32, 256: 96},
    ("_dkdv_kernel general", 90): {64: 144, 128: 80, 256: 560},
    ("_dq_kernel general", 90): {64: 224, 256: 32},
    ("_forward_kernel", 90): {128: 32, 256: 64},
    ("_forward_kernel decode", 90): {64: 16, 128: 16},
    ("_forward_kernel general", 90): {64: 272, 128: 400, 256: 176},
    ("attention_backward_kernel", 90): {64: 32, 128: 16},
    ("attention_backward_kernel general", 90): {64: 496, 128: 240},
    ("attention_forward_kernel", 90): {128: 48, 256: 224},
    ("attention_forward_kernel general", 90): {64: 64, 128: 336, 256: 112},
    ("_dkdv_kernel", 80): {64: 32, 128: 48, 256: 64},
    ("_dkdv_kernel general", 80): {64: 656, 128: 784, 256: 656},
    ("_dq_kernel", 80): {256: 48},
    ("_dq_kernel general", 80): {64: 48, 128: 48, 256: 48},
    ("_forward_kernel", 80): {64: 48, 128: 80},
    ("_forward_kernel decode", 80): {64: 16, 128: 16, 256: 32},
    ("_forward_kernel decode general", 80): {256: 16},
    ("_forward_kernel general", 80): {64: 384, 128: 144},
    ("_dkdv_kernel", 89): {64: 80},
    ("_dkdv_kernel general", 89): {64: 576, 128: 16, 256: 16},
    ("_dq_kernel general", 89): {64: 64, 256: 48},
    ("_forward_kernel", 89): {64: 48, 128: 176},
    ("_forward_kernel decode", 89): {64: 16, 128: 16},
    ("_forward_kernel general", 89): {64: 432, 128: 224, 256: 64},
    ("_delta_kernel", 100): {64: 32, 128: 16, 256: 16},
    ("_dkdv_kernel", 100): {128: 336},
    ("_dkdv_kernel general", 100): {64: 992, 128: 1680},
    ("_dq_kernel", 100): {128: 48},
    ("_dq_kernel general", 100): {256: 112},
    ("_forward_kernel", 100): {128: 16, 256: 32},
    ("_forward_kernel decode", 100): {64: 16, 128: 16, 256: 16},
    ("_forward_kernel general", 100): {64: 608, 128: 736, 256: 112},
    ("_dkdv_kernel", 120): {64: 96, 128: 32},
    ("_dkdv_kernel general", 120): {64: 736, 128: 32},
    ("_dq_kernel general", 120): {64: 64, 128: 16, 256: 16},
    ("_forward_kernel", 120): {64: 48, 128: 80},
    ("_forward_kernel decode", 120): {64: 16},
    ("_forward_kernel general", 120): {64: 576, 128: 272, 256: 16},
    ("_column_dkdv_kernel", 80): {64: 32, 128: 144, 256: 224},
    ("_column_forward_kernel", 80): {64: 64, 128: 32, 256: 16},
    ("_column_dkdv_kernel", 89): {64: 32, 128: 32},
    ("_column_forward_kernel", 89): {64: 112},
    ("_column_dkdv_kernel", 90): {64: 16, 256: 64},
    ("_column_dq_kernel", 100): {64: 16},
    ("_column_forward_kernel", 100): {256: 16},
    ("_column_dkdv_kernel", 120): {64: 96, 128: 48},
    ("_column_forward_kernel", 120): {64: 96},
}
"""Bytes that (kernel and form, arch) may spill by head dimension, 0 where it is not named: the largest over dtypes and
layouts with the ptxas that comes with Triton 3.6.0, rounded up."""

PRODUCTS = {
    "attention_forward_kernel", "attention_backward_kernel", "_forward_kernel", "_dkdv_kernel", "_dq_kernel",
    "_block_lse_pointer_kernel", "_block_lse_tma_kernel", "_row_lse_kernel", "_last_q_sums_kernel",
    "_pooled_scores_kernel", "_column_forward_kernel", "_column_dq_kernel", "_column_dkdv_kernel", "_decode_kernel",
}  # fmt: skip
"""Kernels that multiply matrices: in fp32, as only scoring is asked to, without the tensor cores."""

TF32 = {"_pooled_scores_kernel"}
"""Those that multiply fp32 by TF32 products whatever the dtype of queries and keys."""

GLUON = {"attention_forward_kernel", "attention_backward_kernel"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" in metafunc.fixturenames:
        groups = ALL if metafunc.config.getoption("--all-archs") else DEFAULT
        metafunc.parametrize("group", groups, ids=str)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a fork would inherit Triton as this process configured it
    folder = str(tmp_path_factory.mktemp("triton"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        number = min(4, os.cpu_count() or 1)
        with ProcessPoolExecutor(number, mp_context=context, initializer=isolate, initargs=(folder,)) as pool:
            yield pool
            pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def compiled(workers: ProcessPoolExecutor, request: pytest.FixtureRequest) -> dict[Group, Future[list[Report]]]:
    """The reports to come of every group that this run asks for."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    groups = [params["group"] for params in calls if isinstance(params.get("group"), Group)]
    return {group: workers.submit(compile_group, group) for group in groups}


def expected_instructions(report: Report) -> list[set[str]]:
    """Instructions that have to be in the machine code: one of each set."""
    if report.kernel in GLUON:
        names = ["HGMMA", "UTMALDG", "USETMAXREG", *(["UTMAREDG"] if "with dq" in report.label else [])]
        return [{name} for name in names]
    if report.kernel not in PRODUCTS or (" float32 " in report.label and report.kernel not in TF32):
        return []
    # 16 rows of a decode step are too few for a WGMMA, and three products of TF32 halves stay with HMMA.
    small = "decode" in report.kind or report.kernel in TF32
    # Nor are tiles of 32 rows enough for tcgen05 on sm_100.
    product = {90: {"HGMMA"}, 100: {"UTCHMMA", "HMMA"}}.get(report.arch, {"HMMA"})
    loads = {"UTMALDG"} if "tma" in report.kernel else {"LDGSTS"} if report.kernel == "_decode_kernel" else None
    return [{"HMMA"} if small else product, *([loads] if loads else [])]


def faults(report: Report) -> list[str]:
    """What is wrong with a kernel, in words."""
    if report.error:
        return [f"{report.label}: {report.error}"]
    found = []
    if report.shared > (limit := SHARED_LIMITS[report.arch]):
        found.append(f"{report.shared} bytes of shared memory, of {limit}")
    allowed = SPILLS.get((report.kind, report.arch), {}).get(report.head_dim or 0, 0)
    if report.spilled > allowed:
        found.append(f"spills {report.spilled} bytes, SPILLS allows {report.kind} {allowed}")
    missing = [" or ".join(sorted(some)) for some in expected_instructions(report) if not some & report.counts.keys()]
    if missing:
        found.append(f"lacks {', '.join(missing)}, has {report.counts}")
    found += report.serialized
    return [f"{report.label}: {fault}" for fault in found]


def test_resources_and_instructions(group: Group, compiled: dict[Group, Future[list[Report]]]) -> None:
    reports = compiled[group].result()
    assert reports
    assert [fault for report in reports for fault in faults(report)] == []


def test_every_kernel_is_compiled(workers: ProcessPoolExecutor) -> None:
    """The default groups reach each kernel of the package, by the name that its source gives it."""
    package = HERE.parents[1] / "kernels/sparse_hf_kernels"
    kernels = {
        node.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and _is_jit(node)
    }
    assert len(kernels) > 10
    assert set().union(*workers.map(kernel_names, DEFAULT)) == kernels


def _is_jit(function: ast.FunctionDef) -> bool:
    return any(re.search(r"\bjit\b", ast.unparse(decorator)) for decorator in function.decorator_list)


def _report(**changes: object) -> Report:
    counts = {"HGMMA": 1, "UTMALDG": 1, "USETMAXREG": 1, "UTMAREDG": 1}
    label = "sm_90 hd64 bfloat16 causal: simple backward with dq"
    report = Report(label=label, kernel="attention_backward_kernel", arch=90, seconds=0.0, counts=counts)
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"error": "CompilationError"}, "CompilationError"),
        ({"shared": 232449}, "shared memory"),
        ({"spilled": 100_000}, "spills"),
        ({"counts": {"HGMMA": 1, "UTMALDG": 1, "USETMAXREG": 1}}, "UTMAREDG"),
        ({"kernel": "_dq_kernel", "counts": {"HMMA": 1}}, "HGMMA"),
        ({"kernel": "_dq_kernel", "arch": 80, "counts": {}}, "HMMA"),
        ({"kernel": "_decode_kernel", "counts": {"HMMA": 1}}, "LDGSTS"),
        ({"serialized": ("C7510: serialized",)}, "C7510"),
    ],
)
def test_faults_are_seen(changes: dict[str, object], word: str) -> None:
    assert faults(_report()) == []
    (fault,) = faults(_report(**changes))
    assert word in fault
