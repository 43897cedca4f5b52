"""What a disturbed command must leave: the same as an undisturbed one, and nothing else."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

TEMPORARY = re.compile(r"\.tmp-\d+$|\.replaced-by-igd$|\.lock$")
# Files that hold times, places or process numbers.
VARYING = ("tensorboard", "timing.json", "env.json", "lock.json")
EVALUATION = ("metrics.json", "predictions-*.parquet")


def check_nothing_is_left(output: Path) -> None:
    """Check that no temporary file of the command is there."""
    left = [path for path in output.parent.rglob("*") if TEMPORARY.search(path.name)]
    assert not left, f"left behind: {left}"


def check_same_training(output: Path, whole: Path) -> None:
    """Check that weights, log and lists of a training equal those of an undisturbed one."""
    names = [path.relative_to(whole) for path in whole.glob("model/*.safetensors")]
    assert names
    for name in names:
        here, there = load_file(output / name), load_file(whole / name)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in there), f"{name} differs"

    assert log_of(output) == log_of(whole)
    check_same_files(output / "catalogue", whole / "catalogue")
    check_same_files(output / "model" / "catalogue", whole / "model" / "catalogue")
    for part in whole.glob("eval/*"):
        check_same_evaluation(output / "eval" / part.name, part)


def log_of(run: Path) -> list[dict[str, float]]:
    """Return the entries of metrics.jsonl without what depends on the machine's speed."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    kept = [
        {key: value for key, value in entry.items() if not key.startswith(("speed/", "time"))}
        for entry in entries
    ]
    return [entry for entry in kept if set(entry) != {"step"}]


def check_same_evaluation(output: Path, whole: Path) -> None:
    """Check that metrics and lists of an evaluation are equal byte for byte."""
    for pattern in EVALUATION:
        names = sorted(path.name for path in whole.glob(pattern))
        assert names and names == sorted(path.name for path in output.glob(pattern))
        for name in names:
            assert (output / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


def check_same_files(output: Path, whole: Path) -> None:
    """Check that two folders hold the same files, byte for byte but for the folders' names."""
    here, there = files_of(output), files_of(whole)
    assert here.keys() == there.keys()
    differing = [name for name in there if here[name] != there[name]]
    assert not differing, f"these differ: {differing}"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a folder's files by name, with the folder's own name as OUTPUT."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUTPUT")
        for path in paths
        if not set(path.relative_to(folder).parts) & set(VARYING)
    }


def check_same(name: str, output: Path, whole: Path) -> None:
    """Check that the command `name` has left the same as undisturbed, and nothing else."""
    check_nothing_is_left(output)
    if (whole / "checkpoints").is_dir():
        check_same_training(output, whole)
    elif name == "evaluation":
        check_same_evaluation(output, whole)
    else:
        check_same_files(output, whole)
