"""The wheel alone is enough: built, installed beside its dependencies, used in an empty folder."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from igd_ds.cli import COMMANDS

ROOT = Path(__file__).parents[2]

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
}


def source_files() -> set[str]:
    """Return the package's files, as they are named in a wheel."""
    # `rglob` leaves out the folders that are links: DeepSpeed files and model shapes.
    folders = os.walk(ROOT / "igd_ds", followlinks=True)
    paths = [Path(folder, name) for folder, _, names in folders for name in names]
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that no `build` folder is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "igd_ds", source / "igd_ds", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--quiet", "--wheel-dir", folder, source], check=True)
    (built,) = folder.glob("igd_ds-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return the scripts folder of a new environment that holds the wheel and its dependencies.

    The dependencies are those of this test's own environment. Their folder comes last on the path,
    and its .pth files are not read: an editable igd_ds in it is not found.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", wheel], check=True)

    (packages,) = folder.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    return python.parent


def run(scripts: Path, folder: Path, *words: object) -> str:
    """Run a script of the environment in a folder; return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [str(scripts / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_has_every_file_of_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("igd_ds/")} == source_files()
    assert "igd_ds/py.typed" in names and "igd_ds/data/templates/short.yaml" in names
    assert "igd_ds/ds_configs/zero2.json" in names
    assert "igd_ds/backbones/shapes/tiger.json" in names
    assert "igd_ds/config/tuned/sasrec-beauty-2014.yaml" in names
    assert not [name for name in names if name.startswith(("tests", "tools"))]


def declared_dependencies(wheel: Path) -> set[str]:
    """Return the packages that the wheel asks for, with those of extras for users."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line]
    return {
        normal(re.split(r"[<>=!~; \[]", line)[0])
        for line in asked
        if not re.search(r"extra == .dev.", line)
    }


def normal(package: str) -> str:
    """Return a package's name as the index compares it."""
    return package.lower().replace("_", "-")


def imported_modules(path: Path) -> set[str]:
    """Return the top-level modules that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
    return modules - sys.stdlib_module_names - {"igd_ds"}


def test_every_import_is_a_declared_dependency(wheel):
    declared = declared_dependencies(wheel)
    packages_of = packages_distributions()  # a module may have another name than its package
    assert {"torch", "mpi4py"} <= declared and "pytest" not in declared
    for path in (ROOT / "igd_ds").rglob("*.py"):
        for module in imported_modules(path):
            names = {normal(name) for name in packages_of.get(module, [module])}
            assert names & declared, f"{path.relative_to(ROOT)} imports {module}: declare it"


def test_prepare_train_and_evaluate_with_the_wheel_alone(installed, tmp_path):
    place = run(installed, tmp_path, "python", "-c", "import igd_ds; print(igd_ds.__file__)")
    assert Path(place.strip()).is_relative_to(installed.parent)
    overview = run(installed, tmp_path, "igd", "--help")
    assert all(re.search(rf"^  {name} ", overview, re.MULTILINE) for name in COMMANDS)

    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    size = ("--num_items", 60, "--num_users", 80)
    kind = ("--source", "synthetic", "--protocol", "leave-one-out")
    run(installed, tmp_path, "igd", "prepare", *kind, *size, "--output", "data")
    vocabulary = ("--vocab_size", 400, "--output", "tokenizer")
    run(installed, tmp_path, "igd", "tokenizer", "--dataset", "data", *vocabulary)

    model = ("--model_config", "model.json", "--tokenizer", "tokenizer", "--max_length", 200)
    length = ("--global_batch_size", 8, "--max_steps", 6, "--validation_rows", 10)
    objective = ("--objective", "igd", "--igd_beta", 0.1, "--learning_rate", 3e-3)
    folders = ("--ds_config", "ds.json", "--dataset", "data", "--output_dir", "run")
    run(installed, tmp_path, "igd", "train", *folders, *model, *objective, *length)

    where = ("--model", "run/model", "--dataset", "data", "--output_dir", "run/eval/test")
    run(installed, tmp_path, "igd", "eval", *where, "--num_beams", 5, "--alpha", 0, 0.3)
    metrics = json.loads((tmp_path / "run" / "eval" / "test" / "metrics.json").read_text())
    assert metrics["rows"] == 80 and set(metrics["alpha"]) == {"0.0", "0.3"}
    assert 0 <= metrics["alpha"]["0.3"]["token_match"]["hr@5"] <= 1
