"""Layers import downward only, and the package itself is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dualpipe_engine"
LAYERS = ["schedule", "viz", "comm", "runtime", "engine", "adapters"]  # a layer may import itself and those before it
FOREIGN = {
    "schedule": set(),
    "viz": {"rich", "matplotlib", "numpy"},
    "comm": {"torch"},
    "runtime": {"torch"},
    "engine": {"torch", "deepspeed", "pydantic", "numpy"},
    "adapters": {"torch", "deepspeed", "transformers", "safetensors"},
}


def imports(path):
    """(absolute module, is inside the package) of every import, relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = path.parent
            for _ in range(node.level - 1):
                base = base.parent
            prefix = ".".join(base.relative_to(PACKAGE.parent).parts) if node.level else ""
            module = ".".join(filter(None, [prefix, node.module]))
            if module == "dualpipe_engine":
                yield from (f"dualpipe_engine.{alias.name}" for alias in node.names)
            else:
                yield module


@pytest.mark.parametrize("layer", FOREIGN)
def test_layers_import_downward(layer):
    allowed = {"errors", *LAYERS[: LAYERS.index(layer) + 1]}
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            top, *rest = module.split(".")
            if top == "dualpipe_engine":
                assert rest[0] in allowed, f"{path.name} imports {module}"
            elif top not in sys.stdlib_module_names:
                optional = path.name == "apex_support.py" and top == "apex"
                assert top in FOREIGN[layer] or optional, f"{path.name} imports {module}"


def test_import_needs_neither_torch_nor_deepspeed():
    code = "import sys, dualpipe_engine; print([m for m in ('torch', 'deepspeed', 'rich') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names():
    import dualpipe_engine

    for name in dualpipe_engine.__all__:
        assert getattr(dualpipe_engine, name) is not None
    with pytest.raises(AttributeError):
        _ = dualpipe_engine.no_such_name
