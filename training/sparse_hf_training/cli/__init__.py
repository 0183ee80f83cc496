"""Commands that need the training package; `sparse-hf` finds them through the entry points of the installed wheel.

Each imports what it needs when it runs, so that the list of commands is quick.
"""

from importlib.util import find_spec


def require(*packages: str) -> None:
    """Raises ImportError if one of the packages is not installed, without importing any."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f"no module named {', '.join(missing)}")


require("accelerate", "datasets")
