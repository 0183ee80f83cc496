"""What keeps the tree in shape: import direction, packaging, sizes, and an import without side effects.

The checks are plain functions of a root folder, so that each is also shown to fail on a tree that breaks its rule.
"""

import ast
import importlib.metadata
import importlib.resources
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "sparse_hf": "sparse_hf",
    "sparse_hf_kernels": "kernels/sparse_hf_kernels",
    "sparse_hf_training": "training/sparse_hf_training",
}
LAYERS = ("scripts", "training", "sparse_hf", "kernels")  # each may import those after it
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100

KERNELS_MAY_IMPORT = {"sparse_hf_kernels", "torch", "triton"} | sys.stdlib_module_names
NOBODY_IMPORTS = ("scripts", "training", "kernels.sparse_hf_kernels")  # folders, not import names

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENTRY_POINTS = [
    (group, name, value)
    for group, entries in {
        "console_scripts": PYPROJECT["project"]["scripts"],
        **PYPROJECT["project"]["entry-points"],
    }.items()
    for name, value in entries.items()
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every absolute import, wherever it stands; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str) and target.value[:1] != ".":
                yield node.lineno, target.value


def may_import(layer: str, name: str) -> bool:
    if any(name == banned or name.startswith(banned + ".") for banned in NOBODY_IMPORTS):
        return False
    top = name.split(".")[0]
    if layer == "kernels":
        return top in KERNELS_MAY_IMPORT
    return not (layer == "sparse_hf" and top == "sparse_hf_training")


def wrong_imports(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for layer in LAYERS
        for path in python_files(root, layer)
        for line, name in imported_names(path)
        if not may_import(layer, name)
    ]


def stray_packages(root: Path) -> list[str]:
    found = [root / folder / "__init__.py" for folder in ("kernels", "training", "scripts")]
    found += sorted((root / "tests").rglob("__init__.py"))
    return [str(path.relative_to(root)) for path in found if path.exists()]


def oversized(root: Path) -> list[str]:
    found = []
    for path in python_files(root, *LAYERS, "tests"):
        name = path.relative_to(root)
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            found.append(f"{name} has {lines} lines")
        for node in functions(path):
            if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES:
                found.append(f"{name}:{node.lineno} {node.name} has {lines} lines")
    return found


def unannotated_in_kernels(root: Path) -> list[str]:
    """Functions that mypy is not asked about (see pyproject.toml), the jit ones apart."""
    found = []
    for path in python_files(root, "kernels"):
        for node in functions(path):
            if any(ast.unparse(decorator).split("(")[0].endswith("jit") for decorator in node.decorator_list):
                continue
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            bare = [arg.arg for arg in args if arg and not arg.annotation and arg.arg not in ("self", "cls")]
            if node.returns is None and node.name != "__init__":
                bare.append("return")
            if bare:
                found.append(f"{path.relative_to(root)}:{node.lineno} {node.name} lacks types for {', '.join(bare)}")
    return found


@pytest.mark.parametrize("check", [wrong_imports, stray_packages, oversized, unannotated_in_kernels])
def test_tree(check: Callable[[Path], list[str]]) -> None:
    for folder in PACKAGES.values():
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} is no package"
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (wrong_imports, "kernels/sparse_hf_kernels/a.py", "import transformers"),
        (wrong_imports, "kernels/sparse_hf_kernels/a.py", "from sparse_hf.config import SparseConfig"),
        (wrong_imports, "kernels/sparse_hf_kernels/a.py", "def f():\n    import sparse_hf_training"),
        (wrong_imports, "sparse_hf/a.py", "if TYPE_CHECKING:\n    from sparse_hf_training import masks"),
        (wrong_imports, "sparse_hf/a.py", "import importlib\nimportlib.import_module('sparse_hf_training.cli')"),
        (wrong_imports, "training/sparse_hf_training/a.py", "from scripts.train import main"),
        (wrong_imports, "scripts/a.py", "from kernels import sparse_hf_kernels"),
        (stray_packages, "kernels/__init__.py", ""),
        (stray_packages, "training/__init__.py", ""),
        (stray_packages, "tests/sparse_hf/__init__.py", ""),
        (oversized, "sparse_hf/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
        (oversized, "tests/test_a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (unannotated_in_kernels, "kernels/sparse_hf_kernels/a.py", "def launch(q): ..."),
    ],
)
def test_checks_can_fail(tmp_path: Path, check: Callable[[Path], list[str]], file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert check(tmp_path) != []


def test_checks_accept_what_is_allowed(tmp_path: Path) -> None:
    sources = {
        "kernels/sparse_hf_kernels/a.py": "import math\nimport torch\nimport triton.language as tl\nfrom . import b\n"
        "@triton.jit\ndef _fwd_kernel(q, BLOCK: tl.constexpr):\n    pass\n",
        "sparse_hf/a.py": "import kernels\nimport transformers\nfrom sparse_hf_kernels import b\n",
        "training/sparse_hf_training/a.py": "from sparse_hf import config\nimport sparse_hf_kernels\n",
        "scripts/a.py": "from sparse_hf_training import trainer\n" + "x = 1\n" * (MAX_FILE_LINES - 1),
        "tests/test_a.py": "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(source)
    for check in (wrong_imports, stray_packages, oversized, unannotated_in_kernels):
        assert check(tmp_path) == []


# transformers itself loads triton, so sys.modules alone would prove nothing: the probe also notes who asks for what.
IMPORT_PROBE = """
import builtins, sys, time
import torch, transformers
# The auto classes load scikit-learn where it is installed (lm_eval needs it): transformers' time, not ours.
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

interfaces = (AttentionInterface, AttentionMaskInterface)
modules, names = set(sys.modules), [set(i().valid_keys()) for i in interfaces]
asked, original = [], builtins.__import__

def noting(name, globals=None, *args, **kwargs):
    importer = (globals or {}).get("__name__") or ""
    if importer.startswith("sparse_hf"):
        asked.append((importer, name))
    return original(name, globals, *args, **kwargs)

builtins.__import__ = noting
start = time.process_time()
import sparse_hf
seconds = time.process_time() - start
builtins.__import__ = original

new = set(sys.modules) - modules
for banned in ("triton", "datasets", "sparse_hf_training"):
    assert banned not in new, f"import sparse_hf loads {banned}"
    who = [importer for importer, name in asked if name.split(".")[0] == banned]
    assert not who, f"import sparse_hf imports {banned} in {who}"
for interface, before in zip(interfaces, names):
    added = set(interface().valid_keys()) - before
    assert not added, f"import sparse_hf registers {added} with {interface.__name__}"
assert seconds < 1.0, f"import sparse_hf takes {seconds:.2f} s of CPU time"
"""


def test_import_has_no_side_effect(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT_PROBE], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("group", "name", "value"), ENTRY_POINTS)
def test_entry_point_resolves(group: str, name: str, value: str) -> None:
    installed = importlib.metadata.distribution("sparse-hf").entry_points.select(group=group, name=name)
    assert [entry.value for entry in installed] == [value], "the installed metadata is stale: install again"
    (entry,) = installed
    assert callable(entry.load())


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_marked_as_typed(package: str) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
