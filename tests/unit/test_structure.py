"""The house rules that a machine can check: imports flow one way, importing does nothing, names shadow nothing, text is alive."""

import ast
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "igd_ds"
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
# Low to high; packages of one group do not import each other.
GROUPS = [
    {"config", "distributed", "runlog"},
    {"items", "loss", "metrics"},
    {"weighting", "data", "models", "decoding"},
    {"engine", "recommender", "validation", "results"},
    {"train", "eval", "baseline", "stats", "show"},
    {"report"},
]
LEVEL = {name: level for level, group in enumerate(GROUPS) for name in group}
DEPENDENCIES = {
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "tensorboard",
    "pyarrow",
    "tokenizers",
}
DEPENDENCIES |= {
    "numpy",
    "yaml",
    "tqdm",
    "mpi4py",
    "pytest",
    "evaluate",
    "accelerate",
    "duckdb",
    "matplotlib",
    "hypothesis",
}
DEPENDENCIES |= {"scipy", "jinja2"}
PROSE = [
    p
    for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "slurm").glob("*")]
    if p.is_file()
]


def child(path: Path) -> str:
    """Name of the package's child that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_children(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "igd_ds":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("igd_ds."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("igd_ds."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrow(path):
    if path == PACKAGE / "__init__.py":
        return
    own = child(path)
    assert own in LEVEL, (
        f"{own} is new: give it a place in GROUPS and in the arrow of igd_ds/__init__.py"
    )
    for other in imported_children(ast.parse(path.read_text())):
        if other == own:
            continue
        allowed = LEVEL[other] < LEVEL[own] or (own, other) in {
            ("runlog", "config"),
            ("runlog", "distributed"),
        }
        assert allowed, f"{own} must not import {other}"


def test_the_arrow_names_every_child():
    arrow = (PACKAGE / "__init__.py").read_text().split("\n\n")[0]
    for name in {child(p) for p in MODULES} - {"__init__"}:
        assert name in arrow


def test_only_the_engine_imports_deepspeed():
    importers = [
        child(p) for p in MODULES if re.search(r"^\s*(import|from) deepspeed", p.read_text(), re.M)
    ]
    assert set(importers) == {"engine"}


def test_importing_does_nothing():
    """Every module imports with sockets blocked, prints nothing, and drags in no heavy library that it loads lazily."""
    names = [
        str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for p in MODULES
    ]
    code = (
        "import socket, sys\n"
        "def blocked(*a, **k): raise RuntimeError('network at import time')\n"
        "socket.socket.connect = blocked; socket.getaddrinfo = blocked\n"
        "import importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "heavy = {'deepspeed', 'peft', 'bitsandbytes', 'mpi4py', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_no_child_shadows_another_module():
    """`deepspeed igd_ds/train.py` puts igd_ds/ first on sys.path: a child called `datasets` would hide the library."""
    taken = sys.stdlib_module_names | DEPENDENCIES
    assert not {child(p) for p in MODULES} & taken


def test_budgets():
    """The entries stay short, functions one thing each."""
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 400
    assert len((PACKAGE / "eval.py").read_text().splitlines()) <= 310
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path.name}:{node.lineno} {node.name} has {lines} lines"
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, (
                    f"{path.name}: {node.name} takes too much"
                )


def test_no_test_folder_is_left_out(pytestconfig):
    """pytest passes over folders that match `norecursedirs`, silently; its default holds `dist`."""
    folders = [
        path.name
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and not path.name.startswith((".", "__"))
    ]
    left_out = [
        name
        for name in folders
        for pattern in pytestconfig.getini("norecursedirs")
        if fnmatch(name, pattern)
    ]
    assert folders and not left_out


def test_every_json_and_yaml_file_parses():
    for path in [p for p in ROOT.rglob("*.json") if not {".venv", "runs", ".git"} & set(p.parts)]:
        json.loads(path.read_text())
    for path in [p for p in ROOT.rglob("*.y*ml") if not {".venv", "runs", ".git"} & set(p.parts)]:
        yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_in_the_text_exists(path):
    """A path of this repository named in README, docs, slurm/ is there; runs/ and placeholders in capitals are not ours."""
    for name in re.findall(
        r"(?<![\w./-])((?:igd_ds|ds_configs|slurm|tools|tests|docs)/[\w./-]*[\w/])",
        path.read_text(),
    ):
        assert (ROOT / name).exists(), f"{path.name} names {name}, which does not exist"


def test_every_table_name_is_in_the_readme():
    from igd_ds.data.presets import PRESETS
    from igd_ds.data.sources import SOURCES
    from igd_ds.objectives import WEIGHTINGS
    from igd_ds.search.scoring import DECODING_RULES
    from igd_ds.semantic_ids.quantizers import QUANTIZERS

    readme = (ROOT / "README.md").read_text()
    for name in [*WEIGHTINGS, *DECODING_RULES, *SOURCES, *QUANTIZERS]:
        assert f"`{name}`" in readme, f"{name} has no row in the README"
    for name in PRESETS:
        assert re.search(rf"`{name}`|--preset {name}\b", readme), (
            f"preset {name} is not in the README"
        )
