"""Imports go one way, and importing owlore stays light."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lower layers first: a module imports from layers below its own, and from siblings in its own
# unless the layer is one of `SEPARATE`.
LAYERS = (
    ("kernels", "reference", "_extension"),
    ("ops",),
    (
        "config",
        "sampling",
        "outliers",
        "projection",
        "projected",
        "blocks",
        "checkpoints",
        "distributed",
    ),
    ("members", "optimizer"),
    ("trainer", "data", "models", "options", "report", "planner", "finetune"),
    ("cli", "__init__"),
    ("__main__",),
)
SEPARATE = LAYERS[0]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Outside owlore's own modules these may import, besides the standard library, only:
ALLOWED = {"kernels": {"torch", "triton"}, "reference": {"torch"}, "_extension": {"torch"}}


def modules() -> dict[str, list[Path]]:
    """Files of each module of the package, those of a sub-package together."""
    found = {path.stem: [path] for path in sorted((ROOT / "owlore").glob("*.py"))}
    found["kernels"] = sorted((ROOT / "kernels").glob("**/*.py"))
    return found


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in the file the import stands."""
    package = "owlore.kernels" if path.parent.name == "kernels" else "owlore"
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            names.add(base)
            if base in ("owlore", "owlore.kernels"):
                names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def test_every_module_has_a_layer() -> None:
    assert set(modules()) <= set(LEVEL), "put the new module into LAYERS (DESIGN.md 4)"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    for path in modules()[module]:
        for name in imported(path):
            root, _, rest = name.partition(".")
            if root != "owlore" or rest.split(".")[0] not in LEVEL or rest.startswith(module):
                continue
            other = rest.split(".")[0]
            assert LEVEL[other] <= LEVEL[module], f"{path.name} imports {name}, a layer above it"
            assert module not in SEPARATE or other not in SEPARATE, f"{path.name} imports {name}"


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module: {
            name.split(".")[1] for path in paths for name in imported(path) if "owlore." in name
        }
        - {module}
        for module, paths in modules().items()
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_lowest_layer_imports_little(module: str) -> None:
    standard = set(sys.stdlib_module_names)
    own = {"owlore"} if module == "kernels" else set()
    for path in modules()[module]:
        others = {name.split(".")[0] for name in imported(path)} - standard - own
        assert others <= ALLOWED[module], f"{path.name} imports {others - ALLOWED[module]}"
        if module == "kernels":
            ours = {n for n in imported(path) if n.startswith("owlore")}
            assert all(n.startswith("owlore.kernels") for n in ours), f"{path.name} imports {ours}"


def test_imported_sees_relative_and_nested_imports(tmp_path: Path) -> None:
    file = tmp_path / "kernels" / "probe.py"
    file.parent.mkdir()
    file.write_text(
        "from . import common\nfrom ..ops import x\ndef f():\n    import triton.language\n"
    )
    assert imported(file) == {"owlore.kernels", "owlore.kernels.common", "owlore.ops"} | {
        "triton.language"
    }


def test_import_is_light_and_leaves_cuda_alone() -> None:
    script = """
import sys, torch
torch.cuda.init = torch.cuda._lazy_init = lambda: sys.exit("CUDA was initialised")
import owlore
from owlore import OwLore, OwLoreConfig
heavy = {"transformers", "accelerate", "matplotlib", "datasets", "rich", "gguf", "triton.language"}
loaded = sorted(heavy & (set(sys.modules) - before))
assert not loaded, f"import owlore loaded {loaded}"
assert not torch.cuda.is_initialized()
"""
    script = script.replace("import owlore\n", "before = set(sys.modules)\nimport owlore\n", 1)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
