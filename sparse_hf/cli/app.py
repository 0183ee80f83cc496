"""The application: its own commands, those that are installed beside it, and how errors reach a user."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import typer
from rich.markup import escape

from sparse_hf.cli.bench import bench
from sparse_hf.cli.calibrate import calibrate
from sparse_hf.cli.env import env
from sparse_hf.cli.export import export
from sparse_hf.cli.generate import generate
from sparse_hf.cli.import_ import import_
from sparse_hf.cli.inspect import inspect
from sparse_hf.cli.methods import methods
from sparse_hf.cli.serve import serve
from sparse_hf.cli.tune import tune
from sparse_hf.hub import one_line

COMMAND_GROUP = "sparse_hf.commands"
DEBUG_VARIABLE = "SPARSE_HF_DEBUG"
REMEDY = 'pip install "sparse-hf[train]"'
_REMEDIES = {"lm-eval": 'pip install "sparse-hf[train,eval]"'}
"""Of commands that need more."""
_FILE_REMEDIES = {
    errno.ENOENT: "check the path, or make the folder first",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.EISDIR: "this is a folder; give a file in it",
    errno.EEXIST: "choose another place",
    errno.EACCES: "choose another place, or change who may use this one",
    errno.EPERM: "choose another place, or change who may use this one",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some, or choose another place",
}
"""What to do where the operating system only says what is wrong."""

_EXAMPLES: dict[str, tuple[Callable[..., Any], str]] = {
    "inspect": (inspect, "sparse-hf inspect RUN/artefact --seq-len 131072"),
    "export": (export, "sparse-hf export RUN --out my-masks --push user/name --private"),
    "import": (import_, "sparse-hf import duo PATTERN_FOLDER --model meta-llama/Llama-3.1-8B --out my-masks"),
    "methods": (methods, "sparse-hf methods --json"),
    "env": (env, "sparse-hf env --json"),
    "generate": (generate, "sparse-hf generate meta-llama/Llama-3.1-8B-Instruct --sparse user/masks 'Who are you?'"),
    "serve": (serve, "sparse-hf serve meta-llama/Llama-3.1-8B-Instruct --sparse user/masks --port 8000"),
}

_GROUPS = {"bench": bench, "calibrate": calibrate, "tune": tune}


def build_app(args: Sequence[str] = ()) -> typer.Typer:
    """The application.

    Args:
        args: the command line that it is for. If it names one of the commands here, those of other packages are not
            loaded: they may import much, and must not slow this one down. By default every command is there.
    """
    app = typer.Typer(
        name="sparse-hf",
        help="Sparse attention for Hugging Face Transformers.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    if not args or args[0] not in (*_EXAMPLES, *_GROUPS):
        for entry in sorted(entry_points(group=COMMAND_GROUP), key=lambda entry: entry.name):
            if entry.name not in (*_EXAMPLES, *_GROUPS):
                _add_entry(app, entry)
    for name, (function, example) in _EXAMPLES.items():
        app.command(
            name,
            epilog=f"Example:\n\n{escape(example)}",
            no_args_is_help=name not in ("methods", "env"),
        )(function)
    for name, group in _GROUPS.items():
        app.add_typer(group, name=name)
    return app


def _root() -> None:
    """Sparse attention for Hugging Face Transformers: learn head masks, look at them, share them, use them."""


def _add_entry(app: typer.Typer, entry: EntryPoint) -> None:
    """Registers an installed command; one whose packages are missing stays listed and says what to install."""
    try:
        with redirect_stdout(sys.stderr):  # some libraries print when they are imported
            function = entry.load()
    except ImportError as error:
        app.command(
            entry.name,
            help=escape(f"Not available here: {_REMEDIES.get(entry.name, REMEDY)}"),
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(_unavailable(entry.name, error))
    else:
        # A command that hands its options to another program says so here.
        app.command(entry.name, context_settings=getattr(function, "context_settings", None))(function)


def _unavailable(name: str, cause: ImportError) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        remedy = _REMEDIES.get(name, REMEDY)
        raise ImportError(f"{name!r} needs packages that are not installed ({cause}); {remedy}") from cause

    return command


def main() -> None:
    """The console script. Exits with 0; 1 and one line for what a user can mend; 2 for usage; 130 when interrupted.

    `SPARSE_HF_DEBUG=1` lets the traceback through.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            build_app(sys.argv[1:])(prog_name="sparse-hf")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) == "1" or not is_user_error(error):
            raise
        typer.echo(f"error: {_message(error)}", err=True)
        sys.exit(1)


def is_user_error(error: Exception) -> bool:
    """Whether the message is meant for users: bad values, files, the network, the Hub, packages that are missing."""
    origin = type(error).__module__.split(".")[0]
    return isinstance(error, (ValueError, OSError, ImportError)) or origin in ("huggingface_hub", "httpx")


def _message(error: Exception) -> str:
    remedy = _FILE_REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    if remedy is None or not isinstance(error, OSError):
        return one_line(error) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {remedy}"


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    text = message if isinstance(message, str) else one_line(message)
    typer.echo(f"warning: {text}", err=True)
