"""Rules of the house that a machine can check.

Imports flow one way, importing does nothing, no module shadows another, and what the text names
exists.
"""

import ast
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import igd_ds
from igd_ds.cli import COMMANDS, dispatch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "igd_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high, as in the docstring of igd_ds/__init__.py. A part may import what stands in an
# earlier group, and not its neighbours in the group.
GROUPS = [
    {"errors", "process"},
    {"locks"},
    {"ending"},
    {"config", "folders", "heartbeat", "memory"},
    {"distributed", "runlog", "run_folder", "contracts"},
    {"items", "console"},
    {"backbones", "data", "engine"},
    {"objectives", "search", "baselines", "semantic_ids"},
    {"train_config", "eval_config", "baseline_config"},
    {"prefer_config"},
    {"evaluation"},
    {"studies"},
    {"loop", "training_inputs"},
    {"planning"},
    {"generative_training", "sequential_training"},
    {"preference"},
    {"train", "prefer", "eval", "baseline"},
    {"commands"},
    {"cli"},
]
LEVEL = {name: level for level, group in enumerate(GROUPS) for name in group}

# Folders with files of others, or made by a command.
NOT_OURS = {".venv", ".git", "runs", "build", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
PROSE = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "slurm").iterdir(),
        *(ROOT / "tools").glob("*.sh"),
    ]
    if path.is_file()
)


def part_of(path: Path) -> str:
    """Return the name of the package's child that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a syntax tree without the blocks that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from nodes_at_run_time(other)
        else:
            yield node
            yield from nodes_at_run_time(node)


def imported_parts(tree: ast.AST) -> Iterator[str]:
    """Yield the children of igd_ds that a module imports, inside of functions too."""
    for node in nodes_at_run_time(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "igd_ds":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("igd_ds."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name.split(".")[1] for name in names if name.startswith("igd_ds."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrow(path):
    if path == PACKAGE / "__init__.py":
        return
    own = part_of(path)
    assert own in LEVEL, f"{own} is new: give it a place in GROUPS and in igd_ds/__init__.py"
    for other in set(imported_parts(ast.parse(path.read_text()))) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} must not import {other}"


def test_blocks_for_type_checkers_are_left_out_of_the_arrow():
    text = """
    if TYPE_CHECKING:
        from igd_ds.cli import main
    else:
        from igd_ds.items import trie
    def f():
        from igd_ds import data
        import igd_ds.engine.build
    """
    lines = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    assert set(imported_parts(ast.parse(lines))) == {"items", "data", "engine"}


def test_the_map_shows_every_part_in_the_order_of_the_arrow():
    arrow = igd_ds.__doc__.split("\n\n")[3]
    groups = [set(group.split(" · ")) for group in re.split(r"\s*→\s*", arrow.strip())]
    assert groups == GROUPS
    for name in LEVEL:
        assert f"`{name}`" in igd_ds.__doc__ or name.endswith("_config"), f"{name} has no line"


def test_only_the_engine_imports_deepspeed():
    importing = re.compile(r"^\s*(import|from) deepspeed", re.MULTILINE)
    assert {part_of(path) for path in MODULES if importing.search(path.read_text())} == {"engine"}


def test_importing_does_nothing():
    """Every module imports without network, prints nothing, and leaves heavy libraries alone."""
    names = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in MODULES
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


def test_public_names_load_at_first_use():
    code = (
        "import sys, igd_ds\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'igd_ds is not light'\n"
        "assert set(igd_ds._PUBLIC) <= set(dir(igd_ds))\n"
        "for name in igd_ds._PUBLIC: assert getattr(igd_ds, name).__name__ == name\n"
        "igd_ds.Recommender.load\n"
        "try: igd_ds.Recomender\n"
        "except AttributeError: pass\n"
        "else: raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_no_module_shadows_another():
    """`deepspeed igd_ds/train.py` puts igd_ds/ first on sys.path.

    A child called `datasets` would hide the library of that name.
    """
    installed = set(packages_distributions())
    assert {"torch", "transformers", "tokenizers", "yaml"} <= installed
    taken = sys.stdlib_module_names | installed | {"evaluate"}  # of Hugging Face, often installed
    assert not {part_of(path) for path in MODULES} & taken


def test_no_test_folder_is_left_out(pytestconfig):
    """pytest silently passes over folders that match `norecursedirs`; its default has `dist`."""
    folders = [
        path.name
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and not path.name.startswith((".", "__"))
    ]
    patterns = pytestconfig.getini("norecursedirs")
    assert folders
    assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in patterns)]


def test_every_json_and_yaml_file_parses():
    for pattern, parse in (("*.json", json.loads), ("*.y*ml", yaml.safe_load)):
        paths = [path for path in ROOT.rglob(pattern) if not NOT_OURS & set(path.parts)]
        assert paths
        for path in paths:
            parse(path.read_text())


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_in_the_text_exists(path):
    """Paths of this repository; those in runs/ and placeholders in capitals are not ours.

    Nor are the files that a worked example of docs/extending adds.
    """
    folders = "igd_ds|ds_configs|slurm|tools|tests|docs|examples"
    text = re.sub(r'^```python title="[^"]+"$', "", path.read_text(), flags=re.MULTILINE)
    for name in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*[\w/])", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}, which does not exist"


def test_every_name_of_a_table_is_on_the_site():
    from igd_ds.data.presets import PRESETS
    from igd_ds.data.sources import SOURCES
    from igd_ds.items.decisiveness import INFORMATION_GAIN, MEASURES
    from igd_ds.objectives import OBJECTIVES
    from igd_ds.prefer_config import OBJECTIVES as PREFERENCES
    from igd_ds.search.scoring import DECODING_RULES
    from igd_ds.semantic_ids.quantizers import QUANTIZERS

    parts = ("concepts", "reference", "guides")
    pages = [page for part in parts for page in sorted((ROOT / "docs" / part).glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    measures = set(MEASURES) - {INFORMATION_GAIN}  # the default, which has a whole page
    for name in [*OBJECTIVES, *PREFERENCES, *DECODING_RULES, *SOURCES, *QUANTIZERS, *measures]:
        assert f"`{name}`" in text, f"{name} is in no page of docs/{{{','.join(parts)}}}"
    for name in PRESETS:
        assert re.search(rf"`{name}`|--preset {name}\b", text), (
            f"preset {name} is in no page of docs/{{{','.join(parts)}}}"
        )


def test_every_subcommand_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert re.search(rf"\bigd {name}\b|[ |`]{name}[ |`]", readme), f"igd {name} is missing"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_explains_itself(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["igd"])
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        dispatch([name, "--help"])
    assert ended.value.code == 0
    assert printed.getvalue().startswith(f"usage: igd {name}")
