"""Benchmarks of the kernels against what users would pick instead. Needs the package alone; peers are optional."""

from sparse_hf.bench.kernels import run_kernels, write_result
from sparse_hf.bench.plan import CASES, Options
from sparse_hf.bench.runner import Result, cuda_session

__all__ = ["CASES", "Options", "Result", "cuda_session", "run_kernels", "write_result"]
