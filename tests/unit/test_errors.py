"""What the operating system refuses is one line, in every command."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import igd_ds
from igd_ds.errors import EXIT_FAILURE, EXIT_NO_READER, EXIT_USAGE, refused_by_system
from igd_ds.folders import reserve

RUN = Path("RUN")
PACKAGE = Path(igd_ds.__file__).parent


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """Return an error as it is caught: raised from a cause, or while the cause was handled."""
    if cause is not None:
        error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "RUN/model/a.bin"),
            "RUN/model/a.bin: no space left on the device; make room, then start again",
            EXIT_FAILURE,
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "RUN/a"),
            "RUN/a: the disk quota is used up; make room, then start again",
            EXIT_FAILURE,
        ),
        # Arrow and print name no file.
        (
            OSError(errno.ENOSPC, "Error writing bytes to file"),
            "RUN: no space left on the device; make room, then start again",
            EXIT_FAILURE,
        ),
        # torch.save raises this while it closes the file after a failed write.
        (
            raised(
                RuntimeError("unexpected pos 64 vs 0"),
                RuntimeError("basic_ios::clear: iostream error"),
            ),
            "RUN: writing failed, probably no space left on the device; make room, then start "
            "again",
            EXIT_FAILURE,
        ),
        (
            ValueError("Error while serializing: IoError(Os { code: 28, kind: StorageFull, … })"),
            "RUN: no space left on the device; make room, then start again",
            EXIT_FAILURE,
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/srv/x"),
            "/srv/x: permission denied; change that, or give another path",
            EXIT_USAGE,
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/mnt/x"),
            "/mnt/x: the file system is read-only; change that, or give another path",
            EXIT_USAGE,
        ),
    ],
)
def test_a_refusal_is_one_line(error, line, code):
    assert refused_by_system(error, [RUN]) == (line, code)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a defect"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        raised(ValueError("a defect"), PermissionError(errno.EACCES, "Permission denied", "x")),
    ],
)
def test_a_defect_keeps_its_traceback(error):
    assert refused_by_system(error, [RUN]) is None


PIPE = """
import os, sys
from igd_ds.ending import run

def main():
    if sys.argv[1] == "stdout":
        while True:
            print("a long output")
    readable, writable = os.pipe()
    os.close(readable)
    os.write(writable, b"x")

run(main)
"""


@pytest.mark.parametrize(("pipe", "code"), [("stdout", EXIT_NO_READER), ("own", EXIT_FAILURE)])
def test_an_output_that_nobody_reads_ends_a_command_quietly(pipe, code):
    """Only where it is the output: a broken pipe within the command is a defect."""
    command = [sys.executable, "-c", PIPE, pipe]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if pipe == "stdout":
            process.stdout.readline()
            process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == code
    assert bool(said) == (pipe == "own")
    assert pipe == "stdout" or said.splitlines()[-1].startswith("BrokenPipeError")


FILL = """
import sys
from pathlib import Path
import pyarrow as pa
import torch
from igd_ds import distributed
from igd_ds.folders import claim, new_folder, write_table, write_text
from safetensors.torch import save_file

def main():
    folder, how = Path(sys.argv[1]) / "run", sys.argv[2]
    claim(folder, "config.yaml", "--output_dir", "run")
    if how == "text":
        write_text(folder / "file", "x" * 2**21)
    elif how == "table":
        write_table(folder / "file", pa.table({"a": torch.rand(2**19).numpy()}))
    elif how == "torch":
        torch.save(torch.rand(2**19), folder / "file")
    elif how == "safetensors":
        save_file({"a": torch.rand(2**19)}, folder / "file")
    else:
        with new_folder(folder / "made") as unfinished:
            write_text(unfinished / "file", "x" * 2**21)

distributed.run(main)
"""


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MiB, where the user may do that."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("how", ["text", "table", "torch", "safetensors", "folder"])
def test_a_full_disk_is_told_in_one_line(small_disk, how):
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(small_disk), how], capture_output=True, text=True
    )
    assert done.returncode == EXIT_FAILURE
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {small_disk}") and "no space left on the device" in line
    kept = {"torch": ["file"], "safetensors": ["file"]}
    left = sorted(path.name for path in (small_disk / "run").iterdir())
    assert left in ([], kept.get(how, []))


def test_a_file_that_is_mapped_has_its_space(small_disk):
    path = small_disk / "array"
    with open(path, "wb") as file:
        file.truncate(2**19)
    reserve(path)
    assert path.stat().st_blocks * 512 == 2**19
    with open(path, "wb") as file:
        file.truncate(2**21)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        reserve(path)


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "igd_ds.cli", "prepare", "--help"],
        *([f"{PACKAGE / name}.py", "--help"] for name in ("train", "eval", "baseline")),
    ],
)
def test_a_deleted_working_folder_is_told_before_torch_is_imported(tmp_path, words):
    command = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    folder = tmp_path / "gone"
    folder.mkdir()
    done = subprocess.run(
        ["sh", "-c", command, "sh", str(folder), sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    assert done.stderr == "error: the working folder was deleted: change to another one\n"
