"""transformers' own OpenAI-compatible server, `transformers serve`, with a model that is sparse once it is loaded."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

REMEDY = 'pip install "sparse-hf[serve]"'


def serve(
    model: str, made_sparse: Callable[[PreTrainedModel], PreTrainedModel], *, host: str, port: int, **options: Any
) -> None:
    """Serves one model until SIGINT or SIGTERM; requests that are being answered are finished first.

    Call it in the main thread.

    Args:
        model: folder or Hub id, with "@revision" where that is not main; requests name it so, or not at all.
        made_sparse: makes the model that was loaded sparse.
        host, port: where to listen.
        **options: of `transformers serve`, such as device, dtype, quantization.

    Raises:
        ImportError: if the server's packages are missing.
        OSError: if nothing can listen there.
        ValueError: if the model cannot be made sparse.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(f"the server needs fastapi, uvicorn, openai and pydantic; {REMEDY}")
    check_port(host, port)  # before minutes of loading
    from transformers.cli.serve import Serve

    with loading_sparse(made_sparse):
        server: Any = Serve(force_model=model, host=host, port=port, non_blocking=True, **options)
    # In a thread of its own uvicorn leaves signals alone.
    before = {number: signal.signal(number, server.server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server._thread.join()
        server.kill_server()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.server.started:
        raise OSError(f"the server could not start on {host}:{port}; its log above says why")


@contextmanager
def loading_sparse(made_sparse: Callable[[PreTrainedModel], PreTrainedModel]) -> Iterator[None]:
    """Servers that are made in the block sparsify what they load; others, made before or after, do not."""
    from transformers.cli.serving import model_manager

    original: Any = model_manager.ModelManager

    class SparseModelManager(original):
        """Loads models as the server's own manager does, and makes them sparse."""

        def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
            return made_sparse(super()._load_model(*args, **kwargs))

    setattr(model_manager, "ModelManager", SparseModelManager)  # noqa: B010  (no type may be assigned to)
    try:
        yield
    finally:
        setattr(model_manager, "ModelManager", original)  # noqa: B010


def check_port(host: str, port: int) -> None:
    """Raises OSError if nothing can listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        cause = str(error.strerror).partition(" (")[0]
        raise OSError(f"cannot listen on {host}:{port} ({cause}); choose another --host or --port") from error
