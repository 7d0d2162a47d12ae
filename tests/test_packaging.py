"""Layers import downward only, and the package itself is light."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dualpipe_engine"
LAYERS = [
    "schedule",
    "viz",
    "comm",
    "faults",
    "runtime",
    "profiling",
    "models",
    "engine",
    "adapters",
]  # a layer may import itself and those before it
FOREIGN = {
    "schedule": set(),
    "viz": {"rich", "matplotlib", "numpy"},
    "comm": {"torch"},
    "faults": {"torch"},
    "runtime": {"torch"},
    "profiling": {"rich"},
    "models": {"torch", "deepspeed"},
    "engine": {"torch", "deepspeed", "pydantic", "numpy", "safetensors"},
    "adapters": {"torch", "deepspeed", "transformers", "safetensors"},
    "compat": {"torch"},
    "testing": {"torch"},
    "cli": set(),
}
#: What a package beside the layers may import; compat re-exports the integrations.
ABOVE = {
    "compat": {"schedule", "comm", "runtime", "compat", "integrations"},
    "testing": {"schedule"},
    "cli": {"cli", "schedule", "viz", "profiling", "engine", "__version__"},
}
OPTIONAL = {
    ("apex_support.py", "apex"),
    ("deep_ep.py", "deep_ep"),
    ("deepspeed_schedule.py", "deepspeed"),
    ("profiler.py", "torch"),  # collects on the ranks; the rest of profiling reads files without torch
    ("clocks.py", "torch"),
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
    allowed = {"errors", *(ABOVE[layer] if layer in ABOVE else LAYERS[: LAYERS.index(layer) + 1])}
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            top, *rest = module.split(".")
            if top == "dualpipe_engine":
                assert rest[0] in allowed, f"{path.name} imports {module}"
            elif top not in sys.stdlib_module_names:
                assert top in FOREIGN[layer] or (path.name, top) in OPTIONAL, f"{path.name} imports {module}"


def test_lightning_stands_on_compat():
    for path in sorted((PACKAGE.parent / "integrations" / "lightning").glob("*.py")):
        for module in imports(path):
            top, *rest = module.split(".")
            assert top in {"torch", "lightning", "integrations", *sys.stdlib_module_names} or (
                top == "dualpipe_engine" and rest[0] in ("compat", "errors")
            ), f"{path.name} imports {module}"


def test_import_needs_neither_torch_nor_deepspeed():
    heavy = ("torch", "deepspeed", "rich", "transformers", "lightning", "matplotlib", "numpy")
    code = f"import sys, dualpipe_engine, dualpipe_engine.compat; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "extra", "name"),
    [("transformers", "hf", "DualPipeTrainer"), ("lightning", "lightning", "DualPipeLightningModule")],
)
def test_a_missing_extra_is_named(package, extra, name):
    code = f"""
import sys
sys.modules["{package}"] = None
import dualpipe_engine
import dualpipe_engine.compat as compat
try:
    compat.{name}
except dualpipe_engine.MissingExtraError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f'pip install "dualpipe_engine[{extra}]"' in result.stdout


def test_drawing_without_matplotlib_names_the_command(tmp_path):
    arguments = ["draw", "--schedule", "1f1b", "--ranks", "2", "--micro-batches", "2", "--out", str(tmp_path / "a.svg")]
    code = f"""
import sys
sys.modules["matplotlib"] = None
from dualpipe_engine.cli import main
sys.exit(main({arguments}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "pip install matplotlib" in result.stderr + result.stdout


def test_public_names():
    import dualpipe_engine

    for name in dualpipe_engine.__all__:
        assert getattr(dualpipe_engine, name) is not None
    with pytest.raises(AttributeError):
        _ = dualpipe_engine.no_such_name


def test_source_distribution_is_complete(tmp_path):
    root, copy = PACKAGE.parent, tmp_path / "copy"
    copy.mkdir()
    for name in ("csrc", "integrations", "dualpipe_engine", "tests"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(root / name, copy)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(root).as_posix()
        for folder in (PACKAGE, root / "csrc", root / "integrations")
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".typed")
    }
    assert wanted | {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= found
    assert not any(name.startswith("tests/") for name in found), "tests without what they import"
