"""Sweeps: rows of a table, the choice by validation, rows that fail, stop or run side by side."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from igd_ds.baseline_config import BaselineConfig
from igd_ds.commands.sweep import main
from igd_ds.config.options import parse
from igd_ds.engine.ds_config import resolve_ds_config
from igd_ds.errors import UsageError
from igd_ds.eval_config import EvalConfig
from igd_ds.studies import sweep
from igd_ds.studies import sweep_table as _sweep_table
from igd_ds.studies.report.dataset_details import ALIKE
from igd_ds.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
FAKE = f"{sys.executable} {Path(__file__).parent / 'fake_entry.py'}"
ENTRY = {
    "dataset": "toys",
    "backbone": "tiny",
    "objective": "igd",
    "igd_beta": [0.1, 0.3],
    "seed": [0, 1],
}
UNIFORM = {"dataset": "toys", "backbone": "tiny", "objective": "uniform", "seed": [0, 1]}
U0, U1 = "toys-tiny-uniform-seed0", "toys-tiny-uniform-seed1"
A0, A1, B0, B1 = [
    f"toys-tiny-igd-igd_beta{beta}-seed{seed}" for beta in (0.1, 0.3) for seed in (0, 1)
]


CONFIGS = {"train.py": TrainConfig, "eval.py": EvalConfig, "baseline.py": BaselineConfig}
DEFAULTS = {
    script: {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }
    for script, config in CONFIGS.items()
}


def table_of(folder: Path, **changes) -> dict:
    """Return a table of one dataset and one backbone: uniform and two β, two seeds each."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset.json").touch()
    table = {
        "name": "test",
        "budget": "little",
        "datasets": {"toys": str(folder / "data")},
        "backbones": {
            "tiny": {
                "model_config": str(ROOT / "tools/models/qwen2-1m.json"),
                "tokenizer": "T/{dataset}",
            }
        },
        "defaults": {"ds_config": str(ROOT / "ds_configs/zero1-fp32.json"), "frequency_beta": 0.9},
        "evaluation": {"alpha": [0, 0.2], "num_rows": 50},
        "select": ["igd_beta"],
        "runs": [UNIFORM, ENTRY],
    }
    return table | changes


def write(folder: Path, table: dict) -> str:
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return str(path)


def read(folder: Path, **changes) -> _sweep_table.Table:
    return _sweep_table.read_table(write(folder, table_of(folder, **changes)))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A table, fake entry scripts that follow a plan, and a function that runs the sweep."""
    return World(tmp_path, monkeypatch)


class World:
    scores = {
        U0: 0.1,
        U1: 0.2,
        A0: 0.3,
        A1: 0.1,
        B0: 0.15,
        B1: 0.28,
    }  # β = 0.3: 0.215, β = 0.1: 0.2

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.plan, self.runs = folder, folder / "plan", folder / "runs"
        self.plan.mkdir()
        monkeypatch.setenv("FAKE_PLAN", str(self.plan))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.write()
        (self.plan / "scores.json").write_text(json.dumps(self.scores))
        (self.plan / "defaults.json").write_text(json.dumps(DEFAULTS))
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers

    def write(self, **changes) -> None:
        self.table = write(self.folder, table_of(self.folder, **changes))

    def order(self, row: str, part: str, what: str | None) -> None:
        path = self.plan / f"{row}.{part}"
        path.unlink() if what is None else path.write_text(what)

    def run(self, *words) -> int:
        """Run the sweep and return its exit code; print bad input as `igd` does."""
        try:
            return main([self.table, "--output", str(self.runs), "--launcher", FAKE, *words])
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    def calls(self) -> list[tuple[str, str]]:
        path = self.plan / "calls.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        path.unlink(missing_ok=True)
        self.last = [json.loads(line) for line in lines]
        for call in self.last:  # what the real scripts would do with their flags
            script, *words = call["words"]
            call["script"] = script
            parse(CONFIGS[Path(script).name], words)
        return [(call["row"], call["part"]) for call in self.last]

    def rows(self) -> dict[str, dict]:
        return {
            row["name"]: row for row in json.loads((self.runs / "sweep.json").read_text())["rows"]
        }

    def states(self) -> dict[str, str]:
        return {name: row["state"] for name, row in self.rows().items()}


# What a table expands to


def test_an_entry_is_the_product_of_its_lists(tmp_path):
    entry = {
        "dataset": ["toys", "books"],
        "backbone": ["tiny", "big"],
        "objective": "igd",
        "igd_beta": [0.1, 0.3, 1],
    }
    entry |= {"epochs": 2, "seed": [0, 7]}
    table = table_of(tmp_path, runs=[entry, ENTRY | {"seed": 3, "igd_beta": 0.5, "run": False}])
    table["datasets"]["books"] = "other"
    table["backbones"]["big"] = {
        "model_name_or_path": "M",
        "epochs": 9,
        "evaluation": {"length_penalty": 1},
    }
    rows = _sweep_table.read_table(write(tmp_path, table)).rows
    expected = list(
        itertools.product(entry["dataset"], entry["backbone"], [0.1, 0.3, 1.0], [0, 7])
    ) + [("toys", "tiny", 0.5, 3)]
    assert [(r.dataset, r.backbone, r.settings["igd_beta"], r.seed) for r in rows] == expected
    assert [r.name for r in rows[-2:]] == [
        "books-big-igd-igd_beta1.0-epochs2-seed7",
        "toys-tiny-igd-igd_beta0.5-seed3",
    ]
    assert [r.run for r in rows] == [True] * 24 + [False]
    assert rows[0].group == rows[1].group == "toys-tiny-igd-igd_beta0.1-epochs2" != rows[2].group

    big, last = rows[6], rows[-1]
    assert big.settings["epochs"] == 2 and big.evaluation == {
        "alpha": (0.0, 0.2),
        "num_rows": 50,
        "length_penalty": 1.0,
    }
    assert rows[0].settings["tokenizer"] == "T/toys" and rows[12].settings["dataset"] == "other"
    assert (
        "epochs" not in last.settings
        and last.config.epochs == 3
        and "length_penalty" not in last.evaluation
    )
    assert "frequency_beta" not in last.settings  # a default that igd has no use for


def test_defaults_reach_the_objectives_that_use_them(tmp_path):
    entry = UNIFORM | {"objective": ["uniform", "frequency"], "seed": 0}
    uniform, frequency = read(tmp_path, runs=[entry]).rows
    assert frequency.settings["frequency_beta"] == 0.9 and "frequency_beta" not in uniform.settings
    for row in (uniform, frequency):
        row.check_inputs()
    with_own = entry | {"objective": "uniform", "frequency_beta": 0.5}
    with pytest.raises(
        ValueError,
        match="toys-tiny-uniform-frequency_beta0.5-seed0: --frequency_beta 0.5 has no effect",
    ):
        read(tmp_path, runs=[with_own]).rows[0].check_inputs()


def test_the_exact_search_is_where_it_is_asked_for(tmp_path):
    runs = [
        ENTRY | {"seed": 0, "igd_beta": 0.1},
        ENTRY | {"seed": 1, "igd_beta": 0.1, "exact": {"num_rows": 5}},
    ]
    without, asked = read(tmp_path, runs=runs).rows
    assert without.exact is None and asked.exact == {
        "alpha": (0.0, 0.2),
        "num_rows": 5,
        "search": "exact",
    }
    names = [step.done.parent.name for step in sweep.steps(asked, tmp_path, 2)]
    assert names == ["test", "test-exact"] and len(sweep.steps(without, tmp_path, 2)) == 1
    line = " ".join(sweep.steps(asked, tmp_path, 2)[1].words)
    assert "--search exact" in line and "--num_rows 5 " in line and "--alpha " not in line
    assert f"--alpha_from {tmp_path / asked.name / 'eval/valid'}" in line


def test_baselines_are_evaluated_like_the_others(world):
    world.write(
        baseline={
            "ds_config": str(ROOT / "ds_configs/zero1-fp32.json"),
            "epochs": 5,
            "dropout": 0.4,
        },
        evaluation={"num_rows": 50, "num_beams": 12, "seed": 3},
        select=["igd_beta", "hidden_size"],
        runs=[
            {"dataset": "toys", "recommender": "popularity", "seed": 0},
            {"dataset": "toys", "recommender": "sasrec", "hidden_size": [8, 16], "seed": 0},
        ],
    )
    names = [
        "toys-popularity-seed0",
        "toys-sasrec-hidden_size8-seed0",
        "toys-sasrec-hidden_size16-seed0",
    ]
    (world.plan / "scores.json").write_text(
        json.dumps(dict(zip(names, (0.1, 0.2, 0.3), strict=True)))
    )
    assert world.run() == 0
    assert world.calls() == [(name, "valid") for name in names] + [
        (name, "test") for name in (names[0], names[2])
    ]

    flags = world.last[1]["flags"]
    assert (
        flags["dropout"] == ["0.4"] and "dropout" not in world.last[0]["flags"]
    )  # popularity has none
    assert world.last[1]["script"] == str(ROOT / "igd_ds/baseline.py") and flags["recommender"] == [
        "sasrec"
    ]
    assert (flags["num_rows"], flags["num_beams"], flags["rows_seed"], flags["epochs"]) == (
        ["50"],
        ["12"],
        ["3"],
        ["5"],
    )
    assert flags["output_dir"] == [str(world.runs / names[1])] and flags["splits"] == ["valid"]

    row = world.rows()[names[2]]
    assert (row["backbone"], row["method"].split()[0], row["state"], row["chosen"]) == (
        "",
        "SASRec",
        "finished",
        True,
    )


def test_baselines_take_from_the_other_rows_of_their_dataset_how_they_are_evaluated(tmp_path):
    popularity = {"dataset": ["toys", "books"], "recommender": "popularity", "seed": 0}
    table = table_of(
        tmp_path, runs=[popularity, UNIFORM | {"backbone": "wide"}, UNIFORM | {"dataset": "books"}]
    )
    table["datasets"]["books"] = "other"
    table["backbones"]["wide"] = table["backbones"]["tiny"] | {
        "item_kind": "text",
        "evaluation": {"num_beams": 15, "seed": 4},
    }
    rows = _sweep_table.read_table(write(tmp_path, table)).rows
    assert [row.is_baseline for row in rows] == [True, True] + [False] * 4  # in the table's order

    assert {row.settings["exclude_seen"] for row in rows[:2]} == {"auto"}
    names = ("num_beams", "num_rows", "rows_seed", "item_kind")
    assert [row.settings[name] for row in rows[:2] for name in names] == [
        15,
        50,
        4,
        "text",
        10,
        50,
        0,
        "auto",
    ]

    table["runs"][0] = popularity | {"num_beams": 12, "dataset": "books"}
    with pytest.raises(
        ValueError,
        match="books: evaluation: num_beams is 12 for books-popularity-.*, 10 for books-tiny-",
    ):
        _sweep_table.read_table(write(tmp_path, table))


@pytest.mark.parametrize(
    ("evaluated", "message"),
    [
        (
            {"evaluation": {"num_beams": 20}},
            f"dataset toys: evaluation: num_beams is 10 for {U0}, 20 for {A0}",
        ),
        ({"evaluation": {"num_rows": 9}}, "evaluation: num_rows is 50"),
        ({"evaluation": {"seed": 1}}, "evaluation: seed is 0"),
        ({"evaluation": {"exclude_seen": True}}, "evaluation: exclude_seen is auto"),
        ({"exact": {"num_rows": 6}}, "exact: num_rows is 5"),
    ],
)
def test_rows_of_a_dataset_are_evaluated_alike(tmp_path, evaluated, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, runs=[UNIFORM | {"exact": {"num_rows": 5}}, ENTRY | evaluated])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "unknown key 'nmae', did you mean 'name'"),
        ({"name": ""}, "name: expected a text"),
        ({"runs": []}, "runs: expected a list, found \\[\\]"),
        ({"runs": ["x"]}, "run 1: expected 'setting: value' lines, found 'x'"),
        (
            {"runs": [ENTRY | {"igd_bta": 0.1}]},
            "run 1: unknown setting 'igd_bta', did you mean 'igd_beta'",
        ),
        (
            {"runs": [ENTRY, ENTRY | {"backbone": "tinny"}]},
            "run 2: backbone: unknown name 'tinny', did you mean 'tiny'",
        ),
        (
            {"runs": [ENTRY | {"dataset": ["toys", "toyz"]}]},
            "run 1: dataset: unknown name 'toyz', did you mean 'toys'",
        ),
        (
            {"runs": [ENTRY | {"objective": "idg"}]},
            "run 1: objective: unknown name 'idg', did you mean 'igd'",
        ),
        ({"runs": [{k: v for k, v in ENTRY.items() if k != "seed"}]}, "run 1: 'seed' is missing"),
        (
            {"runs": [{k: v for k, v in ENTRY.items() if k != "backbone"}]},
            "run 1: give either 'backbone'",
        ),
        ({"runs": [ENTRY | {"recommender": "sasrec"}]}, "run 1: give either 'backbone'"),
        (
            {"runs": [{"dataset": "toys", "recommender": "sasrek", "seed": 0}]},
            "'recommender' is one of .*; found 'sasrek'",
        ),
        (
            {"runs": [{"dataset": "toys", "recommender": "popularity", "seed": 0, "dropout": 0.1}]},
            "--dropout has no effect on",
        ),
        ({"runs": [ENTRY | {"seed": []}]}, "run 1: the list of 'seed' is empty"),
        ({"runs": [ENTRY | {"seed": ["0"]}]}, "run 1: 'seed' takes int, found '0'"),
        ({"runs": [ENTRY | {"learning_rate": "1e-4"}]}, "write 1.0e-4"),
        ({"runs": [ENTRY | {"epochs": 0}]}, "run 1: --epochs must be at least 1"),
        ({"runs": [ENTRY | {"run": "no"}]}, "run 1: 'run' is true or false"),
        (
            {"runs": [ENTRY | {"output_dir": "x"}]},
            "run 1: 'output_dir' is set by the sweep",
        ),
        (
            {"runs": [ENTRY | {"evaluation": {"aplha": [0]}}]},
            "run 1: evaluation: unknown setting 'aplha', did you mean 'alpha'",
        ),
        (
            {"defaults": {"ds_confg": "x"}},
            "defaults: unknown setting 'ds_confg', did you mean 'ds_config'",
        ),
        ({"defaults": {}}, "run 1: 'ds_config' is missing in the entry and in the shared settings"),
        (
            {"backbones": {"tiny": "qwen"}},
            "backbone tiny: expected settings of train.py, found 'qwen'",
        ),
        ({"backbones": {"a/b": {}}}, "backbones: 'a/b' becomes part of folder names"),
        (
            {"datasets": {2018: "data"}},
            "datasets: 2018 becomes part of folder names: .*; quote a number",
        ),
        (
            {"runs": [ENTRY | {"dataset": 2018}], "datasets": {"2018": "d"}},
            "unknown name 2018, did you mean '2018'",
        ),
        ({"defaults": {7: 1}}, "defaults: unknown setting '7'"),
        ({"datasets": {"toys": ["a"]}}, "datasets: toys: expected a folder"),
        ({"select": ["igd_betta"]}, "select: unknown setting 'igd_betta', did you mean 'igd_beta'"),
        ({"select": ["seed"]}, "select: unknown setting 'seed'"),
        (
            {"evaluation": {"alpha": [0, 1.5]}},
            "run 1: evaluation: --alpha must lie in \\[0, 1\\], found 1.5",
        ),
        ({"evaluation": {"alpha": []}}, "run 1: evaluation: --alpha needs at least one value"),
        ({"evaluation": {"alpha": [0.1]}}, "alpha \\[0.1\\] lacks 0"),
        ({"evaluation": {"num_beams": 5}}, "lists of num_beams 5 have no ndcg@10"),
        ({"evaluation": {"split": "test"}}, "evaluation: 'split' is set by the sweep"),
        (
            {"backbones": {"tiny": {"model_name_or_path": "m", "tokenizer": "{data_set}/tok"}}},
            "run 1: tokenizer: .* nothing replaces {data_set}, did you mean 'dataset'",
        ),
        ({"evaluation": {"item_filter": "{spilt}"}}, "nothing replaces {spilt}, did you mean 'spl"),
    ],
)
def test_bad_tables_are_named(tmp_path, change, message):
    path = write(tmp_path, table_of(tmp_path, **change))
    with pytest.raises(UsageError) as raised:
        main([path, "--output", str(tmp_path / "runs")])
    error = str(raised.value)
    assert error.startswith(f"{path}: ") and re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_no_table_and_no_yaml(tmp_path):
    with pytest.raises(ValueError, match="no table nowhere.yaml"):
        _sweep_table.read_table("nowhere.yaml")
    (tmp_path / "t.yaml").write_text("runs: [")
    with pytest.raises(ValueError, match="t.yaml is not valid YAML .*line 1"):
        _sweep_table.read_table(str(tmp_path / "t.yaml"))


def test_rows_that_share_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"two rows are called {A1}: they are the same run"):
        read(tmp_path, runs=[ENTRY, ENTRY | {"igd_beta": 0.1, "seed": 1}])
    with pytest.raises(
        ValueError,
        match=f"two rows are called {A0}: they differ in evaluation, which is not in the name",
    ):
        read(tmp_path, runs=[ENTRY, ENTRY | {"evaluation": {"num_rows": 9}}])
    with pytest.raises(ValueError, match="prompta.yaml-seed0: they differ in prompt, which"):
        read(tmp_path, runs=[ENTRY | {"igd_beta": 0.1, "prompt": ["x/a.yaml", "y/a.yaml"]}])


def test_a_table_may_call_the_objective_by_its_former_name(tmp_path):
    former = {"weighting" if key == "objective" else key: value for key, value in ENTRY.items()}
    now, before = (read(tmp_path, runs=[entry]).rows for entry in (ENTRY, former))
    assert now == before and now[0].settings["objective"] == "igd"


def test_a_run_of_the_former_name_is_not_another_one(world):
    assert world.run() == 0
    for path in world.runs.glob("*/config.yaml"):
        path.write_text(path.read_text().replace("objective", "weighting"))
    assert world.run("--list") == 0


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    words = ["sweep", "nowhere.yaml", "--output", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "igd_ds.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    expected = (2, "", "error: no table nowhere.yaml\n")
    assert (done.returncode, done.stdout, done.stderr) == expected


# What validation chooses


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_mean_of_each_family(tmp_path, seed):
    """Against a search by hand over every (dataset, backbone, weighting, epochs)."""
    random = np.random.default_rng(seed)
    runs = [ENTRY | {"dataset": ["toys", "books"], "epochs": [1, 2], "igd_beta": [0.1, 0.3, 0.5]}]
    runs += [
        ENTRY | {"objective": "igd-linear", "run": False},
        ENTRY | {"objective": "igd-linear", "igd_beta": 0.7},
    ]
    table = table_of(tmp_path, runs=runs)
    table["datasets"]["books"] = "other"
    table = _sweep_table.read_table(write(tmp_path, table))
    scores = {row.name: float(random.integers(0, 6)) for row in table.to_run}  # with ties
    missing = table.to_run[random.integers(len(table.to_run))].name if seed % 2 else None
    chosen = table.choose(scores | ({missing: None} if missing else {}))
    best, undecided = {}, set()

    for row in table.to_run:
        family = (row.dataset, row.settings["objective"], row.settings.get("epochs"))
        if (
            row.name == missing and row.settings["objective"] != "igd-linear"
        ):  # which has one group: nothing to choose from
            undecided.add(family)
        total = sum(scores[other.name] for other in table.to_run if other.group == row.group)
        if family not in best or total > best[family][0]:
            best[family] = (total, row.group)
    for row in table.to_run:
        family = (row.dataset, row.settings["objective"], row.settings.get("epochs"))
        is_open = family in undecided or row.name == missing
        assert chosen[row.name] == (None if is_open else best[family][1] == row.group)
    assert set(chosen) == {row.name for row in table.rows if row.run}


# Running


def test_a_sweep_trains_chooses_and_tests(world):
    assert world.run() == 0

    calls = world.calls()
    names = list(World.scores)
    assert calls[:12] == [(name, part) for name in names for part in ("train", "valid")]
    assert calls[12:] == [
        (name, "test") for name in (U0, U1, B0, B1)
    ]  # the mean over seeds, not the best seed, which is A0

    train, valid, test = world.last[4], world.last[5], world.last[-1]
    assert train["script"] == str(ROOT / "igd_ds/train.py")

    expected = {
        "igd_beta": ["0.1"],
        "seed": ["0"],
        "resume": ["auto"],
        "output_dir": [str(world.runs / A0)],
    }
    assert expected.items() <= train["flags"].items() and train["flags"]["tokenizer"] == ["T/toys"]
    assert valid["flags"]["alpha"] == ["0.0", "0.2"] and valid["flags"]["split"] == ["valid"]
    assert valid["flags"]["model"] == [str(world.runs / A0 / "model")] and valid["flags"][
        "num_rows"
    ] == ["50"]
    assert (
        test["flags"]["alpha_from"] == [str(world.runs / B1 / "eval/valid")]
        and "alpha" not in test["flags"]
    )

    rows = world.rows()
    assert {name: row["chosen"] for name, row in rows.items()} == {
        U0: True,
        U1: True,
        A0: False,
        A1: False,
        B0: True,
        B1: True,
    }
    assert (
        set(world.states().values()) == {"finished"}
        and not (world.runs / A0 / "eval/test").exists()
    )

    method = {
        "method": "igd β=0.3",
        "group": B0.removesuffix("-seed0"),
        "dataset": "toys",
        "backbone": "tiny",
        "seed": 0,
    }
    assert (method | {"state": "finished", "error": None}).items() <= rows[B0].items()

    about = json.loads((world.runs / "sweep.json").read_text())
    assert (about["version"], about["name"], about["table"], about["budget"]) == (
        1,
        "test",
        world.table,
        "little",
    )
    assert about["select"] == {"metric": "ndcg@10", "over": ["igd_beta"]}
    assert world.run() == 0 and world.calls() == []  # finished rows are skipped


def test_where_nothing_is_to_choose_a_row_is_tested_without_waiting_for_other_seeds(world):
    world.order(U1, "train", "fail")
    assert world.run() == 1
    assert (U0, "test") in world.calls() and world.states()[U0] == "finished"


def test_a_failed_row_is_listed_and_holds_up_its_family_only(world, capsys):
    world.order(A1, "valid", "fail")
    assert world.run() == 1
    assert [call for call in world.calls() if call[1] == "test"] == [(U0, "test"), (U1, "test")]
    assert world.states() == {
        U0: "finished",
        U1: "finished",
        A0: "waiting",
        A1: "failed",
        B0: "waiting",
        B1: "waiting",
    }

    rows = world.rows()
    assert rows[A1]["error"] == "ValueError: the model is broken" and rows[B0]["chosen"] is None

    log = (world.runs / "logs" / f"{A1}.log").read_text()
    assert "igd_ds/eval.py --alpha 0.0 0.2" in log and "ChildFailedError" in log

    capsys.readouterr()
    assert world.run("--list") == 0 and world.calls() == []
    assert f"{A1}: ValueError: the model is broken" in capsys.readouterr().out

    world.order(A1, "valid", None)
    assert world.run() == 1 and world.calls() == []  # not run again without being asked
    assert world.run("--retry") == 0
    assert world.calls() == [(A1, "valid"), (B0, "test"), (B1, "test")]  # its training was done
    assert set(world.states().values()) == {"finished"} and world.rows()[A1]["error"] is None


def test_a_failed_candidate_can_be_left_out_on_record(world):
    world.order(B1, "train", "fail")
    assert world.run() == 1
    world.write(runs=[UNIFORM, ENTRY | {"igd_beta": 0.1}, ENTRY | {"igd_beta": 0.3, "run": False}])
    world.calls()
    assert world.run() == 0
    assert world.calls() == [(A0, "test"), (A1, "test")]
    assert world.states() == dict.fromkeys((U0, U1, A0, A1), "finished") | {
        B0: "not run",
        B1: "not run",
    }


def test_a_stopped_row_waits_and_is_resumed(world):
    world.order(A0, "train", "stop")
    assert world.run() == 85
    assert world.states()[A0] == "waiting" and world.rows()[A0]["error"] is None
    assert len(world.calls()) == 2 * 6 - 1 + 2  # the others go on
    world.order(A0, "train", None)
    assert world.run() == 0
    assert world.calls() == [(A0, "train"), (A0, "valid"), (B0, "test"), (B1, "test")]
    assert world.last[0]["flags"]["resume"] == ["auto"]


@pytest.mark.parametrize(
    ("order", "sent", "received"),
    [("hang", "SIGTERM", 15), ("hang", "SIGINT", 15), ("hang", "SIGUSR1", 10)]
    # A launcher that dies at once, with a rank in a session of its own, which saves.
    + [("launch", "SIGTERM", 15), ("launch", "SIGUSR1", 10)],
)
def test_signals_reach_the_rows_and_end_the_sweep(world, order, sent, received):
    world.order(U0, "train", order)
    words = [world.table, "--output", str(world.runs), "--launcher", FAKE]
    process = subprocess.Popen(
        [sys.executable, "-m", "igd_ds.cli", "sweep", *words], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (world.plan / "hanging").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    while world.states()[U0] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, sent))
    assert process.wait(timeout=30) == 85
    assert (world.runs / U0 / f"saved-on-{received}").exists()
    assert set(world.states().values()) == {"waiting"}
    assert set(world.calls()) == {(U0, "train")}, "no other row began"


def test_a_row_that_a_killed_sweep_left_is_told_from_one_that_runs(world):
    table = _sweep_table.read_table(world.table)
    row, attempt = table.rows[0], sweep.attempt_file(world.runs, table.rows[0])
    attempt.parent.mkdir(parents=True)
    process = psutil.Process()
    running = {
        "state": "running",
        "host": sweep.socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
    }
    for change, state in [
        ({}, "running"),
        ({"started": process.create_time() + 0.5}, "running"),  # the clock was adjusted
        ({"started": 1.0}, "waiting"),
        ({"pid": 2**22 - 1}, "waiting"),
        ({"host": "x"}, "running"),
    ]:
        attempt.write_text(json.dumps(running | change))
        assert sweep.survey(table, world.runs)[row.name].state == state
    attempt.write_text(json.dumps(running | {"host": "a node that died"}))
    os.utime(attempt, (0, time.time() - sweep.SILENCE - 1))
    assert sweep.survey(table, world.runs)[row.name].state == "waiting"

    attempt.write_text(json.dumps(running))
    assert world.run("--row", "0") == 2 and world.calls() == []
    assert world.run() == 1 and (U0, "train") not in world.calls()  # the others are run


def test_a_running_row_is_heard_of(world, monkeypatch):
    touched, utime = [], os.utime
    monkeypatch.setattr(sweep, "HEARTBEAT", 0.01)
    monkeypatch.setattr(sweep.os, "utime", lambda path: touched.append(path) or utime(path))
    assert world.run("--row", "0") == 0
    assert set(touched) == {world.runs / "logs" / f"{U0}.json"}


def test_a_row_that_another_sweep_has_begun_meanwhile_is_left_to_it(world, monkeypatch, capsys):
    table, execute, process = (
        _sweep_table.read_table(world.table),
        sweep.Runner.execute,
        psutil.Process(),
    )
    running = {
        "state": "running",
        "host": sweep.socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
    }

    def beside_another(self, row, *more):
        if row.name == U0:
            sweep.attempt_file(world.runs, table.rows[1]).write_text(json.dumps(running))
        return execute(self, row, *more)

    monkeypatch.setattr(sweep.Runner, "execute", beside_another)
    assert world.run() == 1
    assert (U1, "train") not in world.calls() and world.states() == dict.fromkeys(
        World.scores, "finished"
    ) | {U1: "running"}
    assert f"{U1}: running already, as process {process.pid}" in capsys.readouterr().out


def test_of_two_sweeps_that_start_a_row_at_once_one_leaves_it_alone(world, capsys):
    """The other one has the row's lock and has not recorded its process yet."""
    (world.runs / "logs").mkdir(parents=True)
    row = _sweep_table.read_table(world.table).to_run[1]
    with sweep.claimed(world.runs, row) as first, sweep.claimed(world.runs, row) as second:
        assert (first, second) == (True, False)
        assert world.run() == 1
    assert (U1, "train") not in world.calls()
    assert f"{U1}: another sweep runs it now" in capsys.readouterr().out
    assert not sweep.attempt_file(world.runs, row).exists(), "no failure is recorded"
    assert world.run() == 0 and set(world.states().values()) == {"finished"}


@pytest.mark.parametrize("words", [(), ("--row", "0")])
def test_the_snapshot_is_there_before_any_row_has_a_folder(world, monkeypatch, words):
    there = []
    monkeypatch.setattr(
        sweep.Runner, "execute", lambda *_: there.append((world.runs / "sweep.json").is_file())
    )
    world.run(*words)
    assert there and all(there)


def test_what_validation_chooses_among_is_one_family_in_the_snapshot(world):
    assert world.run() == 0
    before = {name: row["family"] for name, row in world.rows().items()}
    assert before[A0] == before[A1] == before[B0] == before[B1] != before[U0] == before[U1]
    world.write(
        runs=[ENTRY | {"igd_beta": [0.05], "run": False}, ENTRY, UNIFORM, UNIFORM | {"epochs": 1}]
    )
    assert world.run("--list") == 0
    after = {name: row["family"] for name, row in world.rows().items()}
    assert (
        before.items() <= after.items() and after["toys-tiny-igd-igd_beta0.05-seed0"] == before[A0]
    )
    assert after["toys-tiny-uniform-epochs1-seed0"] not in before.values()


def test_rows_run_side_by_side(world):
    for name in (U0, U1):
        world.order(name, "train", "meet")
    assert world.run("--jobs", "2") == 0  # one alone would wait for ever
    assert world.calls() and {call["gpu"] for call in world.last} == {None}


def test_every_row_has_a_gpu_of_its_own(world, monkeypatch):
    for name in (U0, U1):
        world.order(name, "train", "meet")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert world.run("--gpus", "2") == 0
    world.calls()
    assert {
        call["gpu"] for call in world.last if call["row"] in (U0, U1) and call["part"] == "train"
    } == {"3", "5"}
    assert (
        world.run("--gpus", "4") == 2
        and world.run("--jobs", "0") == 2
        and world.run("--launcher", "no-such-program") == 2
    )


def test_rows_one_by_one_as_in_an_array(world, capsys):
    assert world.run("--count") == 0 and capsys.readouterr().out == "6\n"

    for index in (4, 5, 2):
        assert world.run("--row", str(index)) == 0
    assert world.calls() == [(name, part) for name in (B0, B1, A0) for part in ("train", "valid")]

    capsys.readouterr()
    assert world.run("--test_row", "4") == 2
    assert (
        f"{B0}: validation cannot choose before all candidates have finished; missing: {A1}\n"
        in capsys.readouterr().err
    )

    world.order(A1, "train", "fail")
    assert world.run("--row", "3") == 1 and world.run("--row", "3") == 2
    assert (
        "failed before (ValueError: the model is broken); --retry runs it again"
        in capsys.readouterr().err
    )

    world.order(A1, "train", None)
    assert world.run("--row", "3", "--retry") == 0

    world.calls()
    assert [world.run("--test_row", str(index)) for index in (2, 3, 4, 5)] == [0] * 4
    assert world.calls() == [(B0, "test"), (B1, "test")]
    assert "did not choose it; nothing to do" in capsys.readouterr().out
    assert (
        world.run("--test_row", "4") == 0 and world.run("--row", "4") == 0 and world.calls() == []
    )

    world.order(U0, "train", "stop")
    assert world.run("--row", "0") == 85
    assert world.run("--row", "6") == 2
    assert "has no row 6: 6 are to run, counted from 0" in capsys.readouterr().err


# What is refused before anything starts


def test_missing_files_are_refused_before_anything_starts(world, capsys):
    for change, message in [
        ({"datasets": {"toys": "nowhere"}}, f"{U0}: no dataset at nowhere"),
        ({"defaults": {"ds_config": "no.json"}}, f"{U0}: --ds_config: no file no.json"),
        (
            {"backbones": {"tiny": {"model_config": "qwen3-1m", "tokenizer": "tok"}}},
            f"{U0}: --model_config: no file qwen3-1m",
        ),
        (
            {"evaluation": {"item_filter": "{split}.parquet"}},
            f"{U0}: evaluation: item_filter: no file valid.parquet",
        ),
        (
            {"runs": [ENTRY, ENTRY | {"objective": "rank"}]},
            "igd_beta 0.1 has no effect with --objective rank",
        ),
    ]:
        world.write(**change)
        assert world.run() == 2 and message in capsys.readouterr().err
    assert world.calls() == [] and not world.runs.exists()


def test_names_that_come_with_igd_ds_are_taken_as_train_takes_them(world):
    """The table of docs/guides/sweeps.md has them."""
    shape = {"model_config": "tiger", "tokenizer": "tok"}
    world.write(defaults={"ds_config": "zero1-fp32"}, backbones={"tiny": shape})
    assert world.run() == 0


def test_a_folder_of_another_sweep_is_refused(world, capsys):
    world.runs.touch()
    assert world.run() == 2 and "is a file: give a folder" in capsys.readouterr().err
    world.runs.unlink()
    world.runs.mkdir()
    (world.runs / "something").touch()
    assert world.run() == 2 and "is not empty and holds no sweep" in capsys.readouterr().err
    (world.runs / "something").unlink()
    (world.runs / "logs").mkdir()
    (world.runs / "sweep.json.tmp-7").touch()  # another task of the array begins just now
    assert world.run() == 0
    world.write(name="other")
    assert world.run() == 2 and "holds the sweep 'test'" in capsys.readouterr().err


def test_other_settings_than_a_row_was_run_with_are_refused(world, capsys):
    world.write(exact={"num_rows": 5})
    assert world.run() == 0

    shutil.rmtree(world.runs / "logs")  # rows may have been run by hand
    defaults = table_of(world.folder)["defaults"]
    for change, differing in [
        (
            {"defaults": defaults | {"epochs": 5}, "evaluation": {"alpha": [0], "num_rows": 50}},
            "epochs, evaluation.alpha",
        ),
        ({"evaluation": {"alpha": [0, 0.2]}}, "evaluation.num_rows"),
        (
            {"evaluation": {"alpha": [0, 0.2], "num_rows": 50, "item_filter": "f"}},
            "evaluation.item_filter, exact.item_filter",
        ),
        ({"exact": {"num_rows": 6}}, "exact.num_rows"),
    ]:
        world.write(**{"exact": {"num_rows": 5}} | change)
        assert world.run("--list") == 2
        assert (
            f"{U0} was run with other settings, these differ: {differing}; undo it"
            in capsys.readouterr().err
        )
    evaluation = {
        "alpha": [0.0, 0.2],
        "num_rows": 50,
        "num_beams": 10,
        "max_length": 512,
    }  # the same, written out
    world.write(
        exact={"num_rows": 5},
        defaults=defaults | {"epochs": 3, "log_every": 7},
        evaluation=evaluation,
    )
    assert world.run("--list") == 0

    # Earlier versions kept seen items in their lists and did not record it.
    path = world.runs / U0 / "eval/valid/request.json"
    recorded = path.read_text()
    older = json.loads(recorded)
    del older["exclude_seen"]
    path.write_text(json.dumps(older))
    assert world.run("--list") == 2
    differ = "these differ: evaluation.exclude_seen; undo it"
    assert f"{U0} was run with other settings, {differ}" in capsys.readouterr().err
    path.write_text(recorded)

    (world.runs / U1 / "eval/valid/request.json").unlink()
    changed = json.loads((world.runs / U1 / "eval/test/request.json").read_text()) | {
        "dtype": "float16"
    }
    (world.runs / U1 / "eval/test/request.json").write_text(json.dumps(changed))
    assert (
        world.run("--list") == 2
        and f"{U1} was run with other settings, these differ: evaluation.dtype"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("content", ["", '{"split": "va', "[]", "{}"])
@pytest.mark.parametrize("words", [(), ("--list",)])
def test_a_damaged_request_is_refused_by_name(world, capsys, content, words):
    path = world.runs / U0 / "eval/valid/request.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    (world.runs / "sweep.json").write_text(json.dumps({"name": "test"}))
    assert world.run(*words) == 2 and world.calls() == []
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path} ")
    assert f"remove {path.parent}, and the next start evaluates again" in message


@pytest.mark.parametrize(
    "content",
    ["", '{"state": "fai', "[]", '{"state": "failed", "when": 3}', '{"state": "over"}',
     '{"state": "running", "pid": "x"}', '{"state": "running", "pid": 1, "started": "x"}'],
)  # fmt: skip
def test_a_damaged_file_of_an_attempt_counts_as_none(world, capsys, content):
    path = world.runs / "logs" / f"{U0}.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert world.run("--list") == 0 and world.states()[U0] == "waiting"
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(told) == 1 and told[0].startswith(f"warning: {path} ")
    assert told[0].endswith("the row counts as not tried yet")
    assert world.run("--row", "0") == 0 and (U0, "train") in world.calls()


def test_what_a_model_was_trained_with_is_no_other_setting(world, capsys):
    """The table leaves softmax and temperature to the model; the request says what they were."""
    model = world.runs / U1 / "model/igd_ds.json"
    model.parent.mkdir(parents=True)
    description = {"prompt": {}, "max_length": 0, "load_in_4bit": False}
    likelihood = {"softmax": "masked", "temperature": 4.5}
    model.write_text(json.dumps(description | {"likelihood": likelihood}))
    (world.runs / "sweep.json").write_text(json.dumps({"name": "test"}))
    assert world.run() == 0
    request = json.loads((world.runs / U1 / "eval/valid/request.json").read_text())
    assert (request["softmax"], request["temperature"]) == ("masked", 4.5)

    assert world.run("--list") == 0
    world.write(evaluation={"alpha": [0, 0.2], "num_rows": 50, "softmax": "masked"})
    assert world.run("--list") == 2
    message = f"{U0} was run with other settings, these differ: evaluation.softmax; undo it"
    assert message in capsys.readouterr().err


def test_a_search_that_was_not_begun_may_be_added(world):
    assert world.run() == 0
    world.calls()
    world.write(exact={"num_rows": 5})
    assert world.run() == 0
    assert world.calls() == [(name, "test-exact") for name in (U0, U1, B0, B1)]


def test_test_is_touched_once(world, capsys):
    assert world.run() == 0

    world.write(
        runs=[UNIFORM, ENTRY, ENTRY | {"igd_beta": 0.5}]
    )  # one more candidate, once the test rows have been seen
    assert world.run() == 2
    assert f"{B0} was tested already" in capsys.readouterr().err

    for left in [
        ENTRY | {"igd_beta": 0.1},
        ENTRY | {"igd_beta": 0.3, "run": False},
    ]:  # B0 is gone, or out of the choice
        world.write(runs=[UNIFORM, left])
        assert world.run() == 2
        assert (
            f"{B0} was tested already, but {world.table} now has no such row to run"
            in capsys.readouterr().err
        )
    world.write(
        runs=[UNIFORM, ENTRY, ENTRY | {"igd_beta": 0.5, "epochs": 1}]
    )  # a family of its own
    scores = World.scores | {
        f"toys-tiny-igd-igd_beta0.5-epochs1-seed{seed}": 0.0 for seed in (0, 1)
    }
    (world.plan / "scores.json").write_text(json.dumps(scores))
    assert world.run() == 0


def test_a_metric_that_is_no_number_fails_the_row(world):
    (world.plan / "scores.json").write_text(json.dumps(World.scores | {A1: float("nan")}))
    assert world.run() == 1

    rows = world.rows()
    assert (
        rows[A1]["state"] == "failed"
        and "no ndcg@10 at α = 0 that is a number" in rows[A1]["error"]
    )
    assert (
        f"remove {world.runs / A1} to train it again, or mark the row `run: false`"
        in rows[A1]["error"]
    )
    assert rows[B0]["chosen"] is None and rows[U0]["state"] == "finished"

    (world.plan / "scores.json").write_text(json.dumps(World.scores))
    world.calls()
    assert world.run("--retry") == 1 and world.calls() == []

    shutil.rmtree(world.runs / A1)
    assert world.run() == 0 and world.calls() == [
        (A1, "train"),
        (A1, "valid"),
        (B0, "test"),
        (B1, "test"),
    ]


@pytest.mark.parametrize("text", [
    "{", "[]", '{"alpha": {"0.2": {}}}', '{"ndcg@10": 0.3}',
    '{"alpha": {"0.0": {"item_match": {"ndcg@10": "x"}}}}',
])  # fmt: skip
def test_a_torn_or_older_validation_fails_the_row_and_names_the_file(world, text):
    assert world.run() == 0
    path = world.runs / A1 / "eval" / "valid" / "metrics.json"
    path.write_text(text)
    (
        shutil.rmtree(world.runs / B0 / "eval" / "test"),
        shutil.rmtree(world.runs / B1 / "eval" / "test"),
    )
    assert world.run("--list") == 0
    row = world.rows()[A1]
    assert row["state"] == "failed" and f"{path} has no ndcg@10 at α = 0" in row["error"]


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("step 1\nerror: --epochs must be at least 1\n", 2, "error: --epochs must be at least 1"),
        (
            "Traceback\n  x\nKeyError: 'a'\nW1 torch\nsubprocess.CalledProcessError: died\n",
            1,
            "KeyError: 'a'",
        ),
        (
            "[rank1]: torch.OutOfMemoryError: CUDA out\nclosing\n",
            1,
            "[rank1]: torch.OutOfMemoryError: CUDA out",
        ),
        ("10%|#\r20%|##\rsegfault\n\n", 139, "segfault"),
        ("working\n", -9, "killed by SIGKILL; working"),
        ("", 3, "exit code 3, no output"),
    ],
)
def test_the_last_error(text, code, expected):
    assert sweep.last_error(text, code) == expected


# The checked-in tables


BETAS, FIVE = 8, 5
COUNTS = {
    "igd-main": 4 * 2
    + 4 * 5 * 3
    + 4 * 2 * (1 + 2 + 2 * 2 + BETAS) * 3
    + 4 * 9 * 3
    + 4 * (1 + BETAS)
    + (1 + BETAS),
    "mtc": 4 * 2
    + 4 * FIVE * (5 + 1 + 4 + 2 + 2 * 2 + BETAS + 5 + 2)
    + 3 * FIVE * (1 + 2 + 5)
    + 3 * FIVE * (1 + 5),
    "decisiveness": 5,
    "batching": 2 * 2 * 3,
    "tuned-baselines": 2 * 2,
    "ledger": 3 * (2 + 4 * 3 + 3) + 3 + (1 + 3) + 1 + 2 + 1,
    "titles": 2 + 2 * 3 + 3 * 5,
    "pretrained": 2 + 2 + 2 * 3,
    "demo": 6,
    "cpu": 3 * (1 + 1 + 1 + 6 + 1) + 3 * (1 + 1 + 1 + 2) + 3 * (1 + 2 + 1 + 2) + 3 * (2 + 3 * 3),
}
NOT_RUN = {"cpu": 2 + 2 + 1 + 3 * (4 + 1 + 1 + 3)}
# Of the study, by dataset: beams, rows, the sample's seed.
EVALUATED = dict.fromkeys(("instruments", "industrial-rq", "industrial-pq"), {(20, 3000, 0)})
EVALUATED |= {"books-small": {(10, 2000, 0)}, "industrial": {(10, 1000, 0)}}


@pytest.mark.parametrize("name", COUNTS)
def test_the_checked_in_tables_expand_to_runs_that_could_start(name, tmp_path, monkeypatch):
    table = _sweep_table.read_table(str(ROOT / "tools" / "sweeps" / f"{name}.yaml"))
    assert (len(table.to_run), len(table.rows) - len(table.to_run)) == (
        COUNTS[name],
        NOT_RUN.get(name, 0),
    )
    assert table.name == (f"{name}-study" if name == "cpu" else name)

    monkeypatch.chdir(tmp_path)
    for folder in ("ds_configs", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for row in table.rows:
        for path in (row.settings["dataset"], row.settings.get("item_embeddings")):
            if path:
                (tmp_path / path).mkdir(parents=True, exist_ok=True)
                (tmp_path / path / "dataset.json").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for row in table.rows:
        row.check_inputs()
        for num_ranks in (1, 8):  # of one GPU, and of slurm/sweep.sbatch
            if row.config.global_batch_size:  # None: it only counts
                in_4bit = getattr(row.config, "load_in_4bit", False)
                resolve_ds_config(row.config, num_ranks, in_4bit)
    evaluated = defaultdict(set)
    for row in table.rows:
        config = parse(
            BaselineConfig if row.is_baseline else EvalConfig,
            sweep.steps(row, tmp_path, 1)[-1].words[1:],
        )
        evaluated[row.dataset].add(
            (
                config.num_beams,
                config.num_rows,
                config.rows_seed if row.is_baseline else config.seed,
            )
        )
    assert all(len(values) == 1 for values in evaluated.values()), evaluated

    if name == "cpu":
        assert evaluated == EVALUATED


def test_a_curriculum_and_none_are_two_methods_whatever_its_speed():
    """In MTC Table 4, runs without a curriculum and runs on logits are no candidates for c."""
    table = _sweep_table.read_table(str(ROOT / "tools/sweeps/mtc.yaml"))
    mixed = [
        row
        for row in table.rows
        if row.dataset == "yelp-rq-vae" and row.settings.get("objective") == "multi-target"
    ]
    families = [
        len({row.group for row in mixed if row.family == family})
        for family in dict.fromkeys(r.family for r in mixed)
    ]
    assert families == [5, 1, 1, 1, 5]  # grid of c; learned; two schedules; grid of c on logits


def test_every_checked_in_table_is_expanded_here():
    assert {path.stem for path in (ROOT / "tools/sweeps").glob("*.yaml")} == set(COUNTS)


def run_script(folder, name, cases):
    """Run a script of tools/ in a folder, with a command `igd` of these cases; return its code."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / name, folder / "tools")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").write_text("#!/bin/sh\n")
    (programs / "igd").write_text(f"#!/bin/sh\ncase $1 in {cases} esac\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(folder / "tools" / name), "data"], env=environment
    ).returncode


@pytest.mark.parametrize("code", [0, 1, 2, 85])
def test_the_study_is_reported_though_a_row_failed(tmp_path, code):
    for ids in ("industrial-rq", "industrial-pq"):
        (tmp_path / "runs/cpu" / ids).mkdir(parents=True)
    cases = f"sweep) exit {code};; report) touch reported;;"
    assert run_script(tmp_path, "cpu_study.sh", cases) == code
    assert (tmp_path / "reported").exists() == (code < 2)


@pytest.mark.parametrize("code", [0, 1, 2, 85])
def test_the_ledger_ranks_baselines_with_seen_items_too(tmp_path, code):
    runs = tmp_path / "runs/baselines/ledger"
    for name, settings in (("sasrec", "recommender: sasrec\n"), ("tiger", "objective: igd\n")):
        (runs / name / "model").mkdir(parents=True)
        (runs / name / "eval/test").mkdir(parents=True)
        (runs / name / "config.yaml").write_text(f"{settings}dataset: runs/d\n")
    cases = f"sweep) exit {code};; eval) echo $* >> ranked;; report) touch reported;;"
    assert run_script(tmp_path, "ledger.sh", cases) == code

    assert (tmp_path / "reported").exists() == (tmp_path / "ranked").exists() == (code < 2)
    if code < 2:
        (words,) = [line.split() for line in (tmp_path / "ranked").read_text().splitlines()]
        given = dict(zip(words[1::2], words[2::2], strict=True))
        assert given["--model"] == "runs/baselines/ledger/sasrec/model"  # what igd eval takes
        assert (given["--exclude_seen"], given["--dataset"]) == ("no", "runs/d")


# The real train.py and eval.py


def test_a_real_sweep(tmp_path):
    from igd_ds.commands import prepare as prepare_data
    from igd_ds.commands import tokenizer as train_tokenizer

    data, tokenizer = str(tmp_path / "data"), str(tmp_path / "tokenizer")
    prepare_data.main(
        [
            "--source",
            "synthetic",
            "--num_items",
            "60",
            "--num_users",
            "80",
            "--protocol",
            "d3",
            "--k_core",
            "0",
            "--min_items",
            "1",
            "--output",
            data,
        ]
    )
    train_tokenizer.main(["--dataset", data, "--vocab_size", "400", "--output", tokenizer])
    model = json.loads((ROOT / "tools/models/qwen2-demo.json").read_text()) | {
        "vocab_size": 400,
        "hidden_size": 32,
    }
    (tmp_path / "model.json").write_text(json.dumps(model | {"intermediate_size": 64}))
    table = table_of(
        tmp_path,
        datasets={"toys": data},
        backbones={"tiny": {"model_config": str(tmp_path / "model.json")}},
    )
    table["defaults"] |= {
        "tokenizer": tokenizer,
        "global_batch_size": 8,
        "max_steps": 4,
        "max_length": 160,
    }
    table["evaluation"] = {"alpha": [0, 0.4], "num_rows": 12}
    table["runs"] = [
        ENTRY | {"seed": 0},
        {"dataset": "toys", "recommender": "popularity", "seed": 0},
    ]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    words = [
        sys.executable,
        "-m",
        "igd_ds.cli",
        "sweep",
        write(tmp_path, table),
        "--output",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    again = subprocess.run([*words, "--list"], capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = {
        row["name"]: row for row in json.loads((tmp_path / "runs/sweep.json").read_text())["rows"]
    }
    popularity = "toys-popularity-seed0"
    assert [(name, row["state"]) for name, row in rows.items()] == [
        (name, "finished") for name in (A0, B0, popularity)
    ]
    results = [
        json.loads((tmp_path / "runs" / name / "eval/valid/metrics.json").read_text())
        for name in rows
    ]
    alike = [{key: result[key] for key in ALIKE if key in result} for result in results]
    assert alike[0] == alike[1] == alike[2] and alike[0].keys() >= {
        "num_beams",
        "num_rows",
        "seed",
        "popularity_baseline",
    }
    assert (
        json.loads((tmp_path / "runs" / popularity / "eval/test/metrics.json").read_text())["rows"]
        == 12
    )
    del rows[popularity]
    valid = {}
    for name in rows:
        settings = yaml.safe_load((tmp_path / "runs" / name / "config.yaml").read_text())
        assert rows[name]["settings"].items() <= settings.items()
        valid[name] = json.loads(
            (tmp_path / "runs" / name / "eval/valid/metrics.json").read_text()
        )["alpha"]
        assert set(valid[name]) == {"0.0", "0.4"}
    ndcg = {name: alphas["0.0"]["item_match"]["ndcg@10"] for name, alphas in valid.items()}
    chosen = max(sorted(ndcg), key=ndcg.get)
    assert [name for name in rows if rows[name]["chosen"]] == [chosen]
    test = json.loads((tmp_path / "runs" / chosen / "eval/test/metrics.json").read_text())
    best = max(("0.0", "0.4"), key=lambda alpha: valid[chosen][alpha]["item_match"]["ndcg@10"])
    assert test["split"] == "test" and test["rows"] == 12 and set(test["alpha"]) == {"0.0", best}
    assert {path.parents[1].name for path in (tmp_path / "runs").glob("*/eval/test")} == {
        chosen,
        popularity,
    }
