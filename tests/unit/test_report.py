"""`igd report`: run folders to a report, the same report from its data, and bad input."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_run
from PIL import Image
from study_runs import TITLES, draw, sweep_row, write_run, write_sweep

from igd_ds.commands import report
from igd_ds.errors import UsageError

METHODS = {"uniform": {"objective": "uniform"}, "igd": {"objective": "igd", "igd_beta": 0.1}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of four whole run folders, as `make demo` leaves two."""
    source, folder = (
        tiny_run.make(tmp_path_factory.mktemp("source"), TITLES),
        tmp_path_factory.mktemp("runs") / "demo",
    )
    for name, settings in METHODS.items():
        for seed in range(2):
            ranks = draw(np.random.default_rng([len(name), seed]))
            write_run(folder / f"{name}-{seed}", source, settings | {"seed": seed}, ranks)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(*words) -> str:
    """Return the message of a call that must be refused."""
    with pytest.raises(UsageError) as raised:
        report.main(list(map(str, words)))
    return str(raised.value)


def test_run_folders_to_a_report_and_the_same_again(made, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert report.main([str(made), "-o", str(first), "--examples", "2"]) == 0

    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith(f"figures: {first / 'index.html'}")

    readme = (first / "README.md").read_text()
    assert f"igd report {made} -o {first} --examples 2" in readme

    for run in made.iterdir():
        assert run.name in readme
    test = [
        json.loads((made / f"igd-{seed}/eval/test/metrics.json").read_text())["alpha"]
        for seed in range(2)
    ]
    valid = [
        json.loads((made / f"igd-{seed}/eval/valid/metrics.json").read_text())["alpha"]
        for seed in range(2)
    ]
    best = [
        max(sorted(alphas), key=lambda alpha, of=alphas: of[alpha]["item_match"]["ndcg@10"])
        for alphas in valid
    ]
    mean = np.mean(
        [entries[alpha]["item_match"]["ndcg@10"] for entries, alpha in zip(test, best, strict=True)]
    )
    [line] = [
        line
        for line in (first / "tables" / "main-toy.md").read_text().splitlines()
        if line.startswith("| q | igd β=0.1")
    ]
    assert f"{mean:.4f} ±" in line

    [line] = [line for line in said if re.match(r"q +igd β=0.1 ", line)]  # on the terminal too
    assert f"{mean:.4f} ±" in line
    assert len(list((first / "figures").glob("*.svg"))) > 2
    assert report.main([str(first / "data"), "-o", str(second)]) == 0
    assert bytes_of(second) == bytes_of(first)
    assert report.main([str(first / "data"), "-o", str(first)]) == 0  # in its own place
    assert bytes_of(second) == bytes_of(first)
    assert report.main([str(first / "data"), "-o", str(second), "--command", "make it"]) == 0
    assert "```\nmake it\n```" in (second / "README.md").read_text()


def test_a_report_against_another_reference_and_back(made, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        report.main([str(made), "-o", str(first), "--examples", "0", "--reference", "igd β=0.1"])
        == 0
    )
    assert "vs igd β=0.1" in (first / "tables" / "main-toy.md").read_text().replace("\\", "")
    assert report.main([str(first / "data"), "-o", str(second)]) == 0
    assert bytes_of(second) == bytes_of(first)  # the study keeps it
    assert report.main([str(first / "data"), "-o", str(second), "--reference", "uniform"]) == 0
    assert "vs uniform" in (second / "tables" / "main-toy.md").read_text()
    capsys.readouterr()
    assert "no run is a 'SASRec'; the methods are: igd β=0.1, uniform" in refused(
        made, "-o", tmp_path / "out", "--baseline", "SASRec"
    )


PUBLISHED = sorted((Path(__file__).parents[2] / "docs" / "results").glob("*/data"))


@pytest.mark.isa
@pytest.mark.parametrize("data", PUBLISHED, ids=lambda data: data.parent.name)
def test_a_published_report_is_made_of_the_numbers_it_keeps(data, tmp_path):
    """On every CPU: texts byte for byte, data by their values, PNG by their pixels.

    zlib-ng, which compresses a PNG, uses vector instructions of the CPU.
    """
    assert report.main([str(data), "-o", str(tmp_path / "again")]) == 0
    again, published = bytes_of(tmp_path / "again"), bytes_of(data.parent)
    assert again.keys() == published.keys()
    readers = {"png": pixels, "json": json.loads, "parquet": rows_of}
    for name, content in again.items():
        reader = readers.get(name.rsplit(".")[-1], bytes)
        assert reader(content) == reader(published[name]), name


def pixels(content: bytes) -> tuple[tuple[int, int], bytes]:
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return image.size, image.tobytes()


def rows_of(content: bytes) -> list[dict]:
    return pq.read_table(io.BytesIO(content)).to_pylist()


def test_a_sweep_with_rows_that_are_not_whole(made, tmp_path, capsys):
    folder = shutil.copytree(made, tmp_path / "sweep", symlinks=True)
    (folder / "igd-1" / "eval" / "test" / "metrics.json").write_text('{"alpha": ')
    rows = [
        sweep_row("uniform-0"),
        sweep_row("uniform-1", seed=1),
        sweep_row("igd-0", method="igd β=0.1", group="i"),
        sweep_row("igd-1", method="igd β=0.1", group="i", seed=1),
        sweep_row("gone", "failed", seed=2, error="KeyError: 'x'"),
        sweep_row("large", "not run", backbone="llama"),
    ]
    assert (
        report.main(
            [str(write_sweep(folder, rows)), "-o", str(tmp_path / "out"), "--command", "make it"]
        )
        == 0
    )

    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("incomplete")]
    assert [line.split(" (")[0] for line in said] == ["incomplete: igd-1", "incomplete: gone"]
    assert (
        "eval/test/metrics.json is not JSON" in said[0]
        and said[1] == "incomplete: gone (failed): KeyError: 'x'"
    )

    readme = (tmp_path / "out" / "README.md").read_text()
    assert (
        "6: 3 finished, 1 unfinished, 1 failed, 1 not run" in readme
        and "**Budget.** little" in readme
    )
    assert "One seed" in readme and "make it" in readme


def test_bad_input_is_an_error_that_says_what_to_do(made, tmp_path, capsys):
    assert "no run folder (config.yaml) and holds none" in refused(
        tmp_path / "nothing", "-o", tmp_path / "out"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert "holds no report, but thesis.tex" in refused(made, "-o", tmp_path / "full")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "study.json").write_text("{}")
    assert "give it alone" in refused(made, tmp_path / "data", "-o", tmp_path / "out")
    assert "holds no study" in refused(tmp_path / "data", "-o", tmp_path / "out")
    other = shutil.copytree(made, tmp_path / "other", symlinks=True)
    path = other / "igd-0" / "eval" / "test" / "metrics.json"
    path.write_text(path.read_text().replace('"num_beams": 10', '"num_beams": 20'))
    assert "num_beams" in refused(other, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    words = ["report", tmp_path / "nothing", "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "igd_ds.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "no run folder (config.yaml) and holds none" in line
