"""The `sparse-hf` command: one file per subcommand; packages above this one add theirs by entry point."""

from sparse_hf.cli.app import build_app, main

__all__ = ["build_app", "main"]
