"""Layers import downward only, and the package itself is light."""

from __future__ import annotations

import ast
import re
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
    "page",
    "models",
    "engine",
    "adapters",
]  # a layer may import itself and those before it
FOREIGN = {
    "schedule": {"numpy"},
    "viz": {"rich", "matplotlib", "numpy"},
    "comm": {"torch"},
    "faults": {"torch"},
    "runtime": {"torch", "typing_extensions"},  # which torch brings
    "profiling": {"rich"},
    "page": {"plotly"},
    "models": {"torch", "deepspeed", "transformers", "safetensors"},
    "engine": {"torch", "typing_extensions", "deepspeed", "pydantic", "numpy", "safetensors"},
    "adapters": {"torch", "deepspeed", "transformers", "safetensors", "peft"},
    "compat": {"torch"},
    "testing": {"torch"},
    "cli": set(),
}
#: What a package beside the layers may import; compat re-exports the integrations.
ABOVE = {
    "compat": {"schedule", "comm", "runtime", "compat", "integrations"},
    "testing": {"schedule", "runtime"},
    "cli": {"cli", "schedule", "viz", "profiling", "page", "engine", "__version__"},
}
#: Each room imports itself and rooms before it. Of the folders that have folders, the files on top are rooms where the
#: order among them matters.
ROOMS = [
    "errors",
    "schedule",
    "schedule.timing",
    "schedule.passes",
    "schedule.orders",
    "schedule.search",
    "schedule.cuts",
    "schedule.jobs",
    "viz",
    "comm",
    "faults",
    "runtime",
    "profiling",
    "page",
    "models",
    "engine.given",
    "engine.section",
    "engine.keys",
    "engine.methods",
    "engine.config",
    "engine.checks",
    "engine.placing",
    "engine.batches",
    "engine.context",
    "engine.reduction",
    "engine.checkpoint",
    "engine.auto",
    "engine.plan",
    "engine.timelines",
    "engine.load_report",
    "engine.reporting",
    "engine.surface",
    "engine.life_cycle",
    "engine.engine",
    "engine.initialize",
    "adapters",
    "compat",
    "testing",
    "cli",
    "run",
    "utils",
]
OPTIONAL = {
    ("apex_support.py", "apex"),
    ("tiles.py", "deepspeed"),
    ("deep_ep.py", "deep_ep"),
    ("deepspeed_schedule.py", "deepspeed"),
    ("profiler.py", "torch"),  # collects on the ranks; the rest of profiling reads files without torch
    ("clocks.py", "torch"),
    ("plain_json.py", "hjson"),  # reads configurations of DeepSpeed, which brings it
}


def imports(path, names=False):
    """The absolute module of every import, relative ones resolved; `names`: with the name that is taken from it."""
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
            if names or module == "dualpipe_engine":
                yield from (f"{module}.{alias.name}" for alias in node.names)
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


def modules():
    """Module below the package -> the modules below it that it imports, wherever in its text."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    known = {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}
    found = {}
    for name, path in known.items():
        wanted = set()
        for module in imports(path, names=True):
            below = module.removeprefix("dualpipe_engine.")
            wanted.add(below if below in known else below.rpartition(".")[0])
        found[name] = wanted & known.keys() - {name}
    return found


def room_of(module):
    top, *rest = module.split(".")
    inner = f"{top}.{rest[0]}" if rest else top
    return inner if inner in ROOMS else top


def test_modules_import_each_other_in_no_circle():
    left = modules()
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "these, and what stands on them, import one another"


def test_rooms_import_downward():
    for name, wanted in modules().items():
        for other in wanted:
            assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(name)), f"{name} imports {other}"


def test_the_drawing_has_the_rooms_in_their_order():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    whole, inner = text.split("The rooms of")[:2]
    drawn = [name for row in re.findall(r"^\| (`\w+/`.*?) \|", whole, re.M) for name in re.findall(r"`(\w+)/`", row)]
    assert [name for name in drawn if name in LAYERS] == LAYERS
    columns = zip(*re.findall(r"^\| `(\w+)/` \|[^|]*\| `(\w+)/` \|", inner, re.M), strict=True)
    for top, *names in columns:
        assert [f"{top}.{name}" for name in names] == [
            room for room in ROOMS if room.startswith(f"{top}.") and (PACKAGE / room.replace(".", "/")).is_dir()
        ]


#: What has no type, by the file that names it: DeepSpeed's and the user's objects, and what torch gives a Function.
UNTYPED = {
    "comm/nest.py": {"Nest"},
    "engine/given.py": {
        *("Settings", "ParamGroup", "Optimizer", "Scheduler", "Dataset", "Loader", "LayerEntry", "ParamEntry"),
        *("ClientState", "SavedState", "EngineAttribute", "CheckpointEngine"),
    },
    "runtime/weight_grad_split.py": {"AutogradContext", "AutogradNode"},
}


def test_signatures_say_what_they_take():
    """`Any` stands in no signature, no field and no alias but those of `UNTYPED`."""

    def holds_any(node):
        return node is not None and re.search(r"\bAny\b", ast.unparse(node))

    untyped = {}
    for path in (path for layer in ("comm", "runtime", "engine") for path in (PACKAGE / layer).rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = node.args
                arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                notes = [node.returns, *(each.annotation for each in arguments if each is not None)]
            elif isinstance(node, ast.ClassDef):
                notes = [each.annotation for each in node.body if isinstance(each, ast.AnnAssign)]
            else:
                continue
            assert not any(map(holds_any, notes)), f"{node.name} in {name}"
        for node in tree.body:  # at the top an assignment of types is an alias
            if isinstance(node, ast.AnnAssign) and holds_any(node.value):
                untyped.setdefault(name, set()).add(node.target.id)
            assert not (isinstance(node, ast.Assign) and holds_any(node.value)), f"an alias in {name}"
    assert untyped == UNTYPED


def test_docstrings_have_a_line_for_each_argument():
    """Two names on a line are those of no argument to who reads the site's pages of the API."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                told = re.findall(r"^ +([a-z]\w*(?:, [a-z]\w*)+): ", ast.get_docstring(node, clean=False) or "", re.M)
                found += [f"{path.name}: {names}" for names in told]
    assert found == []


def test_parts_of_the_engine_do_not_know_it():
    """What they need is a context, or single arguments."""
    for path in (path for layer in LAYERS for path in (PACKAGE / layer).rglob("*.py") if layer != "adapters"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [each.arg for each in [*node.args.args, *node.args.kwonlyargs]]
                assert "engine" not in names, f"{node.name} in {path.name}"


def test_integrations_stand_on_the_engine():
    for path in sorted((PACKAGE.parent / "integrations").glob("**/*.py")):
        assert not any(module.startswith("dualpipe_engine.compat") for module in imports(path)), path.name


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
