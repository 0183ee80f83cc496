"""Kernels in Triton's interpreter. They import as interpreted or as compiled for a whole process, so this is its own:
`TRITON_INTERPRET=1 pytest tests/kernels/interpreter`, which `make test` runs after the other tests."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def language_is_replaced_once_a_launch() -> Iterator[None]:
    """The interpreter replaces Triton's language at each call of a device function too, over again what the launch and
    the first call to the same module have replaced: a third of the time of some tests."""
    from triton.runtime import interpreter

    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced: set[int] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in replaced:
            replaced.add(id(self.fn.__globals__))
            replace(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
