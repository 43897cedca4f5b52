"""Files and folders are whole or absent; an output folder belongs to one request."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igd_ds import folders
from igd_ds.errors import UsageError
from igd_ds.folders import (
    claim,
    differing,
    is_made,
    is_temporary,
    new_folder,
    replaced_folder,
    temporary_name,
    write_json,
    write_table,
    write_text,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- files ----

OLD, NEW = pa.table({"a": [1]}), pa.table({"a": [2, 3]})
WRITERS = {
    "text": (write_text, "old ü", "new ü", lambda path: path.read_text(encoding="utf-8")),
    "json": (write_json, {"b": 1, "a": [1.5, None]}, {"a": 2}, lambda p: json.loads(p.read_text())),
    "table": (write_table, OLD, NEW, pq.read_table),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_written_or_replaced_in_one_go(tmp_path, monkeypatch, kind):
    write, old, new, read = WRITERS[kind]
    path = tmp_path / "file"
    write(path, old)
    assert read(path) == old and names(tmp_path) == ["file"]

    # A process that is killed before the rename leaves the old file, and a name that tells.
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(path, new)
    assert read(path) == old
    (left,) = set(tmp_path.iterdir()) - {path}
    assert is_temporary(left) and not is_temporary(path) and left == temporary_name(path)

    # The next write is not disturbed by what was left.
    write(path, new)
    assert read(path) == new and names(tmp_path) == ["file"]


def test_equal_json_has_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": {"b": 0.1, "a": 2}})
    write_json(tmp_path / "b", {"y": {"a": 2, "b": 0.1}, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text().endswith("}\n")


# ---- folders ----


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "parent" / "folder"
    with new_folder(target) as unfinished:
        write_text(unfinished / "a", "1")
        assert is_temporary(unfinished) and not target.exists()
    assert names(target) == ["a"] and names(target.parent) == ["folder"]


def test_a_new_folder_does_not_appear_when_its_block_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder") as unfinished:
        write_text(unfinished / "a", "1")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_what_an_earlier_process_of_this_number_left_is_removed(tmp_path):
    for make in (new_folder, replaced_folder):
        left = temporary_name(tmp_path / make.__name__)
        left.mkdir()
        (left / "old").touch()
        with make(tmp_path / make.__name__) as unfinished:
            assert names(unfinished) == []
    assert names(tmp_path) == ["new_folder", "replaced_folder"]


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    target = tmp_path / "model"
    for content in ("first", "second"):
        with replaced_folder(target) as unfinished:
            write_text(unfinished / content, content)
        assert names(target) == [content] and names(tmp_path) == ["model"]


def test_the_old_folder_stays_when_the_block_raises(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ZeroDivisionError), replaced_folder(target) as unfinished:
        (unfinished / "new").touch()
        1 / 0  # noqa: B018
    assert names(target) == ["old"] and names(tmp_path) == ["model"]


KILLED = """
import os, signal, sys
from pathlib import Path
from igd_ds import folders

with getattr(folders, sys.argv[1])(Path(sys.argv[2])) as unfinished:
    (unfinished / "new").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["new_folder", "replaced_folder"])
def test_a_killed_process_leaves_no_half_folder(tmp_path, name):
    target = tmp_path / "folder"
    if name == "replaced_folder":
        target.mkdir()
        (target / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, name, target], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    made = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    whole = [path for path in made if not is_temporary(path)]
    assert whole == ([target] if name == "replaced_folder" else [])
    assert len(made) == len(whole) + 1, "what it left has a temporary name"

    with getattr(folders, name)(target) as unfinished:
        (unfinished / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["folder"], "lock and leftovers are gone"


# ---- whose folder it is ----


def test_differing_settings_are_named():
    old, new = {"a": 1, "b": 2, "d": None}, {"a": 1, "b": 3, "c": 4, "d": None}
    assert differing(old, new) == ["b", "c"]
    assert differing(old, new, but=["c"]) == ["b"]
    assert differing({}, {"a": None}) == [], "a setting that was not there yet counts as None"


def test_a_folder_is_made_once_from_one_request(tmp_path):
    folder, request = tmp_path / "data", {"k_core": 5, "splits": ("a", "b"), "rate": 0.1}
    assert not is_made(folder, "dataset.json", request)
    with new_folder(folder) as unfinished:
        write_json(unfinished / "dataset.json", request)

    assert is_made(folder, "dataset.json", request), "a tuple is a list in JSON"
    with pytest.raises(UsageError) as caught:
        is_made(folder, "dataset.json", request | {"k_core": 6, "rate": 0.2}, "--to")
    assert str(caught.value) == (
        f"--to {folder} exists and was made from another request (these differ: k_core, rate): "
        "delete it or choose another"
    )

    with pytest.raises(UsageError, match=r"\(these differ: splits\)"):
        is_made(folder, "dataset.json", {"k_core": 5, "rate": 0.1})

    (folder / "dataset.json").rename(folder / "other.json")
    message = f"--output {folder} exists and holds no dataset.json: delete it or choose another"
    with pytest.raises(UsageError) as caught:
        is_made(folder, "dataset.json", request)
    assert str(caught.value) == message


def test_an_empty_folder_may_be_filled_and_a_link_to_one_not(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    assert not is_made(folder, "dataset.json", {})
    with new_folder(folder) as unfinished:
        write_json(unfinished / "dataset.json", {})
    assert is_made(folder, "dataset.json", {})

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for here in (Path("."), tmp_path / "here"):
        with pytest.raises(UsageError, match="is the current folder"):
            is_made(here, "dataset.json", {})

    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(UsageError, match="link exists already"), new_folder(tmp_path / "link"):
        pass


def test_a_folder_is_claimed_by_its_record(tmp_path):
    run = tmp_path / "parent" / "run"
    assert not claim(run, "config.yaml", "--output_dir", "run")
    assert run.is_dir()

    # An empty folder, or one in which a write was cut off, is free. Its leftovers are removed.
    temporary_name(run / "config.yaml").touch()
    (run / "config.yaml.tmp-1").touch()
    (run / "model.tmp-1").mkdir()
    assert not claim(run, "config.yaml", "--output_dir", "run")
    assert names(run) == [temporary_name(run / "config.yaml").name, "lock.json"], "ours stays"
    (run / "config.yaml").touch()
    (run / "metrics.jsonl").touch()
    assert claim(run, "config.yaml", "--output_dir", "run")


def test_a_folder_of_others_is_not_claimed(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for folder, message in [
        (
            tmp_path,
            f"--output_dir {tmp_path} is not empty and holds no evaluation: give a new folder",
        ),
        (tmp_path / "thesis.tex", f"--output_dir {tmp_path}/thesis.tex is a file: give a folder"),
    ]:
        with pytest.raises(UsageError) as caught:
            claim(folder, "request.json", "--output_dir", "evaluation")
        assert str(caught.value) == message
    assert names(tmp_path) == ["thesis.tex"]


# ---- what a kill between two renames leaves, and places that take no folder ----


def test_a_folder_that_was_killed_between_its_two_renames_is_put_back(tmp_path):
    run = tmp_path / "run"
    model, old = run / "model", run / ".model.replaced-by-igd"
    claim(run, "config.yaml", "--output_dir", "run")
    (run / "config.yaml").touch()
    old.mkdir()
    (old / "first").touch()

    assert claim(run, "config.yaml", "--output_dir", "run")
    assert names(model) == ["first"] and not old.exists()

    # The next one who replaces the folder finds it too, and keeps it if he fails.
    model.rename(old)
    with pytest.raises(ZeroDivisionError), replaced_folder(model):
        1 / 0  # noqa: B018
    assert names(model) == ["first"] and not old.exists()


def test_a_half_deleted_old_folder_takes_nobodys_place(tmp_path):
    """Killed after both renames: the new folder stands, and the old one is removed later."""
    model, old = tmp_path / "model", tmp_path / ".model.replaced-by-igd"
    for folder in (model, old):
        folder.mkdir()
    (model / "new").touch()
    folders.put_back(old)
    assert names(model) == ["new"]

    with replaced_folder(model) as unfinished:
        (unfinished / "newer").touch()
    assert names(model) == ["newer"] and not old.exists()


def test_a_folder_of_the_users_beside_a_replaced_one_stays(tmp_path):
    """Earlier versions took model.old for their own, put it back and removed it."""
    run = tmp_path / "run"
    (run / "model.old").mkdir(parents=True)
    (run / "model.old" / "mine").touch()
    (run / "config.yaml").touch()

    claim(run, "config.yaml", "--output_dir", "run")
    for name in ("first", "second"):
        with replaced_folder(run / "model") as unfinished:
            (unfinished / name).touch()
    assert names(run / "model") == ["second"] and names(run / "model.old") == ["mine"]


@pytest.mark.parametrize("place", ["/proc/igd_ds/run", "FILE/run"])
def test_a_place_that_takes_no_folder_is_named(tmp_path, place):
    (tmp_path / "FILE").touch()
    with pytest.raises(UsageError, match="run: no folder can be made there .* give another path"):
        claim(tmp_path / place, "config.yaml", "--output_dir", "run")
    with (
        pytest.raises(UsageError, match="no folder can be made there"),
        new_folder(tmp_path / place / "data"),
    ):
        pass


def test_a_lock_left_when_the_folder_was_made_already_is_removed(tmp_path):
    """Killed between the rename and the release of the lock; a living holder's lock stays."""
    target, lock = tmp_path / "data", tmp_path / "data.lock"
    with new_folder(target) as unfinished:
        write_json(unfinished / "request.json", {"a": 1})

    dead = "import os, sys; from pathlib import Path; from igd_ds import locks; "
    dead += "locks.acquire(Path(sys.argv[1]), 'x'); os._exit(0)"
    subprocess.run([sys.executable, "-c", dead, lock], check=True)
    assert lock.exists() and is_made(target, "request.json", {"a": 1})
    assert not lock.exists()

    living = dead.replace("os._exit(0)", "print(flush=True); sys.stdin.read()")
    words = [sys.executable, "-c", living, lock]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert is_made(target, "request.json", {"a": 1}) and lock.exists()
        process.stdin.close()
