"""Kernels in Triton's interpreter. They import as interpreted or as compiled for a whole process, so this is its own:
`TRITON_INTERPRET=1 pytest tests/kernels/interpreter`, which `make test` runs after the other tests."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
