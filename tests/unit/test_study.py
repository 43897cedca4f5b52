"""Run folders to a study: states, notes, bad input, ranks of the predictions, stored bytes."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import study_runs
import tiny_run
import torch
import yaml
from study_runs import (
    ROWS,
    TITLES,
    draw,
    ndcg,
    sweep_row,
    write_evaluation,
    write_run,
    write_sweep,
)

from igd_ds import distributed, eval
from igd_ds.data.batches import sample_rows
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.studies import significance
from igd_ds.studies.report.analysis_tables import groups_of
from igd_ds.studies.report.run_files import thinned
from igd_ds.studies.report.runs import environment_of, read_runs
from igd_ds.studies.report.study import (
    Run,
    family_of,
    lines_by,
    load,
    method_names,
    method_of,
    objective_of,
    save,
)
from igd_ds.studies.report.tables import all_tables

UNIFORM = {"objective": "uniform", "seed": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("source"), TITLES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def run(source, tmp_path):
    """Write one run folder below tmp_path/runs; returns it."""

    def write(name, seed=0, **settings):
        changes = settings.pop("changes", {})
        settings = {"objective": "uniform", "seed": seed} | settings
        return write_run(
            tmp_path / "runs" / name,
            source,
            settings,
            draw(np.random.default_rng([seed, len(name)])),
            **changes,
        )

    return write


def only(study):
    (run,) = study.runs
    return run


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"objective": "uniform"}, "uniform"),
        ({"objective": "igd", "igd_beta": 0.1}, "igd β=0.1"),
        ({"objective": "igd-linear", "igd_beta": 1.0}, "igd-linear β=1"),
        ({"objective": "rank", "rank_tau": 0.8}, "rank τ=0.8"),
        ({"objective": "cft", "cft_lambda": 0.5, "position_floor": 0.1}, "cft"),
        ({"objective": "front-greater"}, "front-greater"),
        ({"objective": "multi-target", "curriculum_c": None}, "multi-target"),
        ({"objective": "multi-target", "curriculum_cT": 2.0}, "multi-target + curriculum"),
        ({"recommender": "last-item-knn"}, "last-item kNN"),
        ({"recommender": "sasrec"}, "SASRec"),
    ],
)
def test_the_method_of_a_configuration(settings, method):
    assert method_of(settings) == method


def test_labels_name_what_differs_within_a_method():
    base = {"objective": "cft", "seed": 0, "output_dir": "a", "cft_lambda": 0.5}
    many = [
        base,
        base | {"seed": 1, "output_dir": "b"},
        base | {"cft_lambda": 1.0},
        {"objective": "uniform", "epochs": 3},
    ]
    assert method_names(many) == ["cft λ=0.5", "cft λ=0.5", "cft λ=1", "uniform"]


def test_settings_that_are_newer_than_a_run_have_their_defaults():
    """Runs from before and after a `git pull` are seeds of one method and of one choice."""
    before = {"objective": "cft", "cft_lambda": 0.5, "seed": 0}
    after = before | {"seed": 1, "stop_margin": 0.0, "max_title_tokens": 0, "packing": "auto"}
    other = before | {"seed": 2, "max_title_tokens": 5}
    assert method_names([before, after]) == ["cft", "cft"]
    assert method_names([before, after, other]) == [
        "cft max_title_tokens=0",
        "cft max_title_tokens=0",
        "cft max_title_tokens=5",
    ]
    assert family_of(before) == family_of(after) != family_of(other)
    older = {"recommender": "sasrec", "dropout": 0.2, "seed": 0}
    assert method_names([older, older | {"loss": "cross-entropy", "patience": 3}]) == ["SASRec"] * 2


def test_a_baseline_is_called_by_its_loss_unless_it_is_cross_entropy():
    base = {"recommender": "sasrec", "loss": "cross-entropy", "seed": 0, "output_dir": "a"}
    many = [
        base,
        base | {"seed": 1, "exclude_seen": "no"},
        base | {"loss": "bce", "num_negatives": 1},
        base | {"recommender": "hstu"},
    ]
    assert method_names(many) == ["SASRec", "SASRec", "SASRec, bce", "HSTU"]


def test_a_family_shares_all_but_what_validation_chooses():
    base = {
        "objective": "multi-target",
        "seed": 0,
        "output_dir": "a",
        "epochs": 2,
        "curriculum_c": 1e-5,
        "mixing": None,
    }
    same = [base, base | {"seed": 1, "output_dir": "b"}, base | {"curriculum_c": 2e-5}]
    others = [
        base | other
        for other in (
            {"mixing": "fg-ce"},
            {"mixing_form": "logits"},
            {"epochs": 3},
            {"curriculum_c": None},
        )
    ]

    assert len({family_of(settings) for settings in same}) == 1
    assert len({family_of(settings) for settings in (base, *others)}) == 5


def test_a_line_differs_in_one_setting_and_the_seed_alone():
    settings = [
        {"objective": "multi-target", "mixing_form": form, "curriculum_c": c, "seed": seed}
        for form in ("loss", "logits") for c in (2e-5, 1e-5) for seed in (0, 1)
    ]  # fmt: skip
    settings.append(
        {
            "objective": "multi-target",
            "mixing_form": "loss",
            "curriculum_c": 1e-5,
            "epochs": 9,
            "seed": 0,
        }
    )
    runs = [
        Run(str(i), "toy", "q", method, method, one["seed"], "finished", settings=one)
        for i, (one, method) in enumerate(zip(settings, method_names(settings), strict=True))
    ]
    found = lines_by(runs, "curriculum_c")

    assert {
        line: {c: [run.name for run in its] for c, its in by_value.items()}
        for line, by_value in found.items()
    } == {
        "multi-target + curriculum epochs=3 mixing_form=logits": {
            1e-5: ["6", "7"],
            2e-5: ["4", "5"],
        },
        "multi-target + curriculum epochs=3 mixing_form=loss": {1e-5: ["2", "3"], 2e-5: ["0", "1"]},
    }
    assert list(found["multi-target + curriculum epochs=3 mixing_form=loss"]) == [1e-5, 2e-5]


def test_the_environment_says_what_is_not_recorded(tmp_path):
    described = {
        "igd_ds": {"version": "1", "commit": ""},
        "versions": {"torch": "2"},
        "hardware": {"gpu": None},
    }
    (tmp_path / "env.json").write_text(json.dumps(described))
    found = environment_of([tmp_path / "env.json", tmp_path / "never started" / "env.json"])
    assert found == {"igd_ds": "1", "commit": "not recorded", "torch": "2", "gpu": "None"}


def test_curves_are_means_over_equal_stretches():
    points = thinned([[step, 2.0 * step] for step in range(400)], 200)
    assert len(points) == 200 and points[0] == [0.5, 1.0] and points[-1] == [398.5, 797.0]
    assert thinned([[1, 2.0]]) == [[1.0, 2.0]] and thinned([]) == []


def test_a_whole_run(run):
    found = only(read_runs([run("uniform")], 0))

    assert (found.state, found.note, found.dataset, found.backbone, found.method, found.seed) == (
        "finished",
        "",
        "toy",
        "q",
        "uniform",
        0,
    )
    assert (found.seconds, found.eval_seconds, found.world_size) == (
        60.0,
        4.0,
        2,
    )  # two evaluations of 10 rows at 5 rows/s
    assert found.rank_seconds == 2 * 60.0 + 3 * 4.0
    assert (
        found.curves.keys() == {"train/nll"} and len(found.curves["train/nll"]) == 200
    )  # the last, cut line is passed over
    assert found.best_alpha == max(
        study_runs.ALPHAS, key=lambda alpha: found.valid["alpha"][alpha]["item_match"]["ndcg@10"]
    )


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"objective": "igd", "igd_beta": 0.1}, True),
        ({"objective": "igd-linear", "igd_beta": 0.1}, True),
        ({"objective": "uniform"}, False),
        ({"objective": "cft"}, False),
        ({"objective": "multi-target"}, False),
        ({"recommender": "sasrec"}, False),
    ],
)
def test_igd_alone_is_reported_at_the_best_alpha(source, tmp_path, settings, best):
    ranks = {
        split: {"0.0": [2] * len(rows), "0.2": [1] * len(rows)} for split, rows in ROWS.items()
    }
    run = only(read_runs([write_run(tmp_path / "run", source, settings | {"seed": 0}, ranks)], 0))
    assert (run.alpha, run.best_alpha) == ("0.2" if best else "0.0", "0.2")
    assert all(set(run.ranks[split].rank) == {1 if best else 2} for split in ("valid", "test"))


@pytest.mark.parametrize(
    ("objective", "lacking", "state"),
    [
        ("igd", "0.2", "unfinished"),
        ("uniform", "0.2", "finished"),
        ("igd", "0.0", "finished"),
        ("uniform", "0.0", "unfinished"),
    ],
)
def test_a_test_must_hold_the_alpha_that_is_reported(source, tmp_path, objective, lacking, state):
    ranks = {
        split: {"0.0": [2] * len(rows), "0.2": [1] * len(rows)} for split, rows in ROWS.items()
    }
    del ranks["test"][lacking]
    run = only(
        read_runs(
            [
                write_run(
                    tmp_path / "run",
                    source,
                    {"objective": objective, "igd_beta": 0.1, "seed": 0},
                    ranks,
                )
            ],
            0,
        )
    )

    assert run.state == state
    assert run.note == (
        ""
        if state == "finished"
        else f"eval/test lacks α = {lacking}, at which the run is reported"
    )


def test_a_validation_without_alpha_0_is_not_whole(source, tmp_path):
    ranks = {split: {"0.2": [1] * len(rows)} for split, rows in ROWS.items()}
    run = only(
        read_runs(
            [
                write_run(
                    tmp_path / "run",
                    source,
                    {"objective": "igd", "igd_beta": 0.1, "seed": 0},
                    ranks,
                )
            ],
            0,
        )
    )
    note = "eval/valid/metrics.json: no α = 0, at which validation chooses; evaluate with it too"
    assert (run.state, run.note) == ("unfinished", note)


def test_ranks_are_those_of_the_predictions(source, run):
    """Against a loop over the lines, and against what the lists were made from."""
    folder = run("uniform")
    study = read_runs([folder], 0)
    found, dataset = only(study), InteractionDataset.load(source.parent / "data")

    for split in ("valid", "test"):
        expected = dict.fromkeys(ROWS[split], 0)
        for line in pq.read_table(
            folder / "eval" / split / f"predictions-alpha{found.alpha}.parquet"
        ).to_pylist():
            if dataset.splits[split].targets[line["row_id"]] in line["item_ids"]:
                expected[line["row_id"]] = line["rank"]
        rows, ranks, credit = found.ranks[split]
        assert dict(zip(rows.tolist(), ranks.tolist(), strict=True)) == expected
        results = getattr(found, split)["alpha"][found.alpha]
        assert np.mean([ndcg(rank) for rank in ranks]) == pytest.approx(
            results["token_match"]["ndcg@10"]
        )
        assert significance.ndcg(found.ranks[split]).mean() == pytest.approx(
            results["item_match"]["ndcg@10"]
        )
        assert set(credit[ranks > 0]) == {0.5, 1.0} and not credit[ranks == 0].any()
        assert (
            study.rows["toy"][split]["user"].tolist()
            == dataset.splits[split].user_ids[ROWS[split]].tolist()
        )
        assert study.rows["toy"][split]["history"].tolist() == [
            len(dataset.splits[split].history(row)) for row in ROWS[split]
        ]


def test_exact_lists_have_ranks_at_the_alpha_that_they_were_made_at(source, run, tmp_path):
    """Exact lists at α = 0 alone, of a method that is reported at another α."""
    folder = run("igd", objective="igd", igd_beta=0.1)
    dataset = InteractionDataset.load(source.parent / "data")
    ranks = [3, 0] * (len(ROWS["test"]) // 2) + [1] * (len(ROWS["test"]) % 2)
    write_evaluation(folder / "eval/test-exact", dataset, "test", {"0.0": ranks}, {})
    study = read_runs([folder], 0)
    found = only(study)

    assert found.ranks["exact"].rank.tolist() == ranks and found.alpha_of("exact") == "0.0"
    assert study.rows["toy"]["exact"]["user"].tolist() == study.rows["toy"]["test"]["user"].tolist()
    assert significance.ndcg(found.ranks["exact"]).mean() == pytest.approx(
        found.exact["alpha"]["0.0"]["item_match"]["ndcg@10"]
    )
    save(study, tmp_path / "kept")
    again = only(load(tmp_path / "kept"))
    assert again.ranks["exact"].rank.tolist() == ranks and again.ranks.keys() == found.ranks.keys()


def test_runs_that_call_their_objective_a_weighting_are_read_alike(source, run, tmp_path):
    """Before version 0.2 the setting `objective` was called `weighting`."""
    now, before = run("now", objective="igd", igd_beta=0.1), tmp_path / "before"
    shutil.copytree(now, before, symlinks=True)
    path = before / "config.yaml"
    path.write_text(path.read_text().replace("objective", "weighting"))
    assert "weighting" in yaml.safe_load(path.read_text())
    one, other = only(read_runs([now], 0)), only(read_runs([before], 0))
    assert (one.method, one.objective, one.alpha, one.family) == (
        other.method,
        other.objective,
        other.alpha,
        other.family,
    )
    assert one.settings == other.settings
    old = {"weighting": "igd-linear", "igd_beta": 0.3}  # in a stored study it stays
    assert method_of(old) == "igd-linear β=0.3" and objective_of(old) == "igd-linear"


def test_groups_of_a_real_evaluation_are_those_that_it_measured(source, tmp_path, monkeypatch):
    """NDCG of head, tail, warm and cold rows from the stored ranks equals that of metrics.json."""
    monkeypatch.setattr(distributed, "init", lambda *_: None)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    folder, data = shutil.copytree(source, tmp_path / "run"), source.parent / "data"
    settings = {
        "dataset": str(data),
        "objective": "igd",
        "igd_beta": 0.1,
        "seed": 3,
        "model_config": "q.json",
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "summary.json").write_text(json.dumps({"seconds": 1.0}))
    seed = next(
        seed for seed in range(99) if 4 not in sample_rows(tiny_run.NUM_TEST, 5, seed)
    )  # row 4 of valid has no history
    usual = ["--model", folder / "model", "--dataset", data, "--num_beams", 10]
    valid = folder / "eval" / "valid"
    for split, flags in (
        ("valid", ("--num_rows", 5, "--seed", seed, "--alpha", 0, 0.3)),
        ("test", ("--alpha_from", valid)),
    ):
        argv = [
            "eval.py",
            *usual,
            "--split",
            split,
            "--output_dir",
            folder / "eval" / split,
            *flags,
        ]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        assert eval.main() == 0
    study = read_runs([folder], 0)
    run = only(study)
    assert (run.state, run.method, run.seed, len(run.ranks["valid"].row)) == (
        "finished",
        "igd β=0.1",
        3,
        5,
    )

    results = run.test["alpha"][run.alpha]
    gain, groups = (
        np.array([ndcg(rank) for rank in run.ranks["test"].rank]),
        groups_of(study.rows["toy"]["test"]),
    )
    assert gain.mean() == pytest.approx(results["token_match"]["ndcg@10"]) and 0 < gain.mean() < 1

    for name in ("head", "tail", "warm", "cold"):
        measured = results[f"token_match_{name}_targets"]["ndcg@10"]
        assert gain @ groups[name] / groups[name].sum() == pytest.approx(measured), name


def test_states_and_notes_of_a_sweep(run, tmp_path):
    out_of_memory = {"state": "failed", "error": "RuntimeError: out of memory"}
    names = (
        "whole",
        "candidate",
        "training",
        "failed",
        "undecided",
        "due",
        "testing",
        "untested",
        "exact",
    )

    for seed, name in enumerate(names):
        run(name, seed)
    folder = tmp_path / "runs"
    for name in set(names) - {"whole", "exact"}:
        shutil.rmtree(folder / name / "eval" / "test")
    for name in ("training", "failed"):
        shutil.rmtree(folder / name / "eval")
    rows = [
        sweep_row("whole"),
        sweep_row("candidate", chosen=False, seed=1),
        sweep_row("training", "running", chosen=None, seed=2),
        sweep_row("failed", chosen=None, seed=3, **out_of_memory),
        sweep_row("undecided", "waiting", chosen=None, seed=4, family="f"),
        sweep_row("due", "waiting", seed=5),
        sweep_row("testing", "running", seed=6),
        sweep_row("untested", seed=7, **out_of_memory),
        sweep_row("exact", seed=8, **out_of_memory),
        sweep_row("gone", "waiting", chosen=None, seed=9),
        sweep_row("large", "not run", chosen=None, backbone="llama"),
    ]
    study = read_runs([write_sweep(folder, rows)], 0)
    assert (study.name, study.budget) == ("a sweep", "little")
    assert [(run.name, run.state, run.note) for run in study.runs] == [
        ("whole", "finished", ""),
        ("candidate", "no test", ""),
        ("training", "unfinished", "running"),
        ("failed", "failed", "RuntimeError: out of memory"),
        ("undecided", "no test", "validation has not chosen yet"),
        ("due", "no test", "chosen, not tested yet"),
        ("testing", "no test", "chosen, not tested yet"),
        ("untested", "no test", "chosen, not tested yet; RuntimeError: out of memory"),
        ("exact", "finished", "RuntimeError: out of memory"),
        ("gone", "waiting", ""),
        ("large", "not run", ""),
    ]
    assert all(run.valid and "valid" in run.ranks for run in study.runs if run.is_complete)
    assert study.runs[0].family == family_of(study.runs[0].settings) and study.runs[4].family == "f"
    assert study.runs[-1].settings == {"objective": "uniform"}  # from the table


def drop(path, *keys):
    values = json.loads(path.read_text())
    for key in keys:
        del values[key]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "state", "note"),
    [
        (
            lambda run: (run / "summary.json").unlink(),
            "unfinished",
            "the training has not finished",
        ),
        (lambda run: shutil.rmtree(run / "eval" / "valid"), "unfinished", "no eval/valid"),
        (lambda run: shutil.rmtree(run / "eval" / "test"), "no test", "not evaluated on test"),
        (
            lambda run: (run / "eval/test/metrics.json").write_text("{"),
            "unfinished",
            "eval/test/metrics.json is not JSON",
        ),
        *(
            (
                lambda run, content=content: (run / "config.yaml").write_bytes(content),
                "unfinished",
                why,
            )
            for content, why in (
                (b"{", "config.yaml is not valid YAML (line 1: "),
                (
                    b"seed: 1\n\xff",
                    "config.yaml is not valid YAML (line 2: byte 0xff is not UTF-8)",
                ),
                (b"- a", "config.yaml: expected 'setting: value' lines, found a list"),
                (b"", "config.yaml: expected 'setting: value' lines, found nothing"),
            )
        ),
        (
            lambda run: (run / "config.yaml").write_text("objective: uniform\ndataset: d"),
            "unfinished",
            "KeyError: 'seed'",
        ),
        (
            lambda run: (run / "config.yaml").write_text("objective: uniform\nseed: 0"),
            "unfinished",
            "KeyError: 'dataset'",
        ),
        (
            lambda run: (run / "config.yaml").write_text("objective: igd\nseed: 0"),
            "unfinished",
            "KeyError: 'igd_beta'",
        ),
        (
            lambda run: drop(run / "summary.json", "seconds"),
            "finished",
            "summary.json lacks seconds (written by an older version?)",
        ),
        (lambda run: (run / "env.json").unlink(), "finished", "env.json lacks world_size"),
        (
            lambda run: drop(run / "eval/valid/metrics.json", "alpha"),
            "unfinished",
            "written by an older version",
        ),
        (lambda run: (run / "eval/test/timing.json").unlink(), "finished", ""),
    ],
)
def test_a_run_that_is_not_whole_is_noted(run, damage, state, note):
    folder = run("uniform")
    damage(folder)
    found = only(read_runs([folder], 0))
    assert found.state == state and note in found.note and bool(found.note) == bool(note)
    assert "\n" not in found.note


def put(name, *keys, value):
    """Return a function that sets an entry of a JSON file of a run folder."""

    def change(run):
        content = json.loads((run / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (run / name).write_text(json.dumps(content))

    return change


def cut(name):
    """Return a function that leaves the beginning of a file of a run folder."""
    return lambda run: (run / name).write_text((run / name).read_text()[:9])


VALID, TEST = "eval/valid/metrics.json", "eval/test/metrics.json"


@pytest.mark.parametrize(
    ("damage", "state", "note"),
    [
        (cut("eval/valid/request.json"), "unfinished", "eval/valid/request.json is not JSON"),
        (cut("eval/test/request.json"), "unfinished", "eval/test/request.json is not JSON"),
        (put(VALID, "alpha", "0.0", value=[]), "unfinished", f"{VALID} is damaged: alpha.0.0 is"),
        (put(TEST, "alpha", "0.0", "item_match", value=None), "unfinished", f"{TEST}: no ndcg@10"),
        (
            put(TEST, "alpha", "0.2", "item_match", "hr@10", value="x"),
            "unfinished",
            f"{TEST} is damaged: alpha.0.2.item_match.hr@10 is",
        ),
        (put(VALID, "dataset", value=None), "unfinished", f"{VALID}: written by an older version"),
        (put(TEST, "target_popularity_deciles", value=None), "finished", ""),
        (put(TEST, "popularity_baseline", value="x"), "unfinished", f"{TEST} is damaged"),
        (put(TEST, "alpha", "much", value={}), "unfinished", f"{TEST}: damaged: 'much' is no α"),
        (
            put(TEST, "alpha", "0.0", "popularity_deciles", value=[None]),
            "unfinished",
            f"{TEST} is damaged: alpha.0.0.popularity_deciles is",
        ),
        (put("summary.json", "seconds", value="x"), "unfinished", "summary.json is damaged"),
        (put("env.json", "versions", value=[]), "finished", "env.json is damaged: versions is"),
        (cut("eval/test/timing.json"), "finished", "eval/test/timing.json is not JSON"),
        (
            put("eval/test/timing.json", "rows_searched", value="x"),
            "finished",
            "eval/test/timing.json is damaged: rows_searched is",
        ),
        (
            lambda run: (run / "config.yaml").write_text("{objective: igd, igd_beta: x, seed: 0}"),
            "unfinished",
            "config.yaml is no configuration of a run",
        ),
        (
            lambda run: (run / "config.yaml").write_text(
                "{objective: uniform, seed: 0, dataset: d, model_config: 5}"
            ),
            "unfinished",
            "config.yaml is damaged: model_config is",
        ),
    ],
)
def test_a_damaged_run_is_named_and_the_report_is_made_of_the_others(run, damage, state, note):
    folders = [run("uniform"), run("igd", objective="igd", igd_beta=0.1)]
    damage(folders[0])
    study = read_runs(folders, 1)
    assert study.runs[0].state == state and note in study.runs[0].note
    assert study.runs[1].state == "finished" and not study.runs[1].note
    assert any(table.name == "main-toy" for table in all_tables(study))


def test_a_damaged_catalogue_costs_no_other_run_its_groups(run):
    folders = [run("uniform"), run("igd", objective="igd", igd_beta=0.1)]
    catalogue = folders[0] / "model" / "catalogue"
    whole = catalogue.resolve()
    catalogue.unlink()
    shutil.copytree(whole, catalogue)
    (catalogue / "gain.npy").write_bytes(b"")
    study = read_runs(folders, 0)
    assert "model/catalogue/gain.npy has 0 bytes" in study.runs[0].note
    assert not study.runs[1].note and "test" in study.rows["toy"]


@pytest.mark.parametrize("rows", [None, [], [{"name": "uniform"}], ["uniform"]])
def test_a_damaged_list_of_a_sweep_is_refused_by_name(tmp_path, rows):
    sweep = {"version": 1, "name": "a", "budget": "", "rows": rows}
    if rows == []:
        del sweep["budget"]
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    with pytest.raises(UsageError, match=r"sweep.json is damaged: `igd sweep TABLE --output .*"):
        read_runs([tmp_path], 0)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_metric_that_is_not_a_number_leaves_the_run_out(run, split):
    folder = run("uniform")
    path = folder / "eval" / split / "metrics.json"
    results = json.loads(path.read_text())
    results["alpha"]["0.2"]["gini_index"] = float("nan")
    path.write_text(json.dumps(results))
    found = only(read_runs([folder], 0))
    assert (
        found.state == "unfinished"
        and found.note == f"eval/{split}/metrics.json: alpha.0.2.gini_index is not finite"
    )


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        (lambda path: path.unlink(), "missing"),
        (
            lambda path: pq.write_table(pq.read_table(path).drop_columns("item_ids"), path),
            "damaged",
        ),
    ],
)
def test_damaged_predictions_cost_a_run_its_groups_alone(run, split, damage, why):
    folders = [run("uniform"), run("igd", objective="igd", igd_beta=0.1)]
    damage(folders[0] / "eval" / split / "predictions-alpha0.0.parquet")
    study = read_runs(folders, 2)
    assert [found.state for found in study.runs] == ["finished", "finished"] and not study.runs[
        1
    ].note
    assert f"eval/{split}/predictions-alpha0.0.parquet is {why}" in study.runs[0].note
    assert (
        "test" not in study.runs[0].ranks
        and study.rows["toy"]["test"]["row"].tolist() == ROWS["test"]
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"train/loss": 1.0}',
        "[1]",
        '{"step": 9, "train',
        '{"step": "a", "train/loss": 1.0}',
        '{"step": 9, "train/loss": null}',
    ],
)
def test_a_log_is_read_up_to_what_is_no_step_of_it(run, line):
    folder = run("uniform")
    before = only(read_runs([folder], 0)).curves
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(line)
    assert only(read_runs([folder], 0)).curves == before


def test_baselines_alone_have_groups_and_tests_and_the_sizes_of_their_dataset(run):
    folder = run("popularity")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings = {
        "dataset": settings["dataset"],
        "seed": 0,
        "recommender": "popularity",
        "item_kind": "text",
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    for place in ("catalogue", "model"):
        shutil.rmtree(folder / place, ignore_errors=True)
    study = read_runs([folder], 0)
    assert only(study).state == "finished" and not only(study).note
    sizes = {"items": 14, "train_rows": 12, "valid_rows": 11, "test_rows": 11}
    assert study.catalogues == {"toy": {"kind": "text"} | sizes}
    [statistics, *_] = all_tables(study)
    shown = ["toy", "text", "14", "12", "11", "11", "–", "–", "–"]
    assert [cell.text for cell in statistics.rows[0]] == shown
    assert "11 of 11 test rows of toy" in next(
        table.caption for table in all_tables(study) if table.name == "main-toy"
    )
    assert study.rows["toy"]["test"]["row"].tolist() == ROWS["test"]


def test_lists_too_short_to_choose_by(run):
    folder = run("uniform")
    path = folder / "eval" / "test" / "metrics.json"
    results = json.loads(path.read_text())
    del results["alpha"]["0.0"]["item_match"]["ndcg@10"]
    path.write_text(json.dumps(results))
    assert "its lists hold 10 items" in only(read_runs([folder], 0)).note


@pytest.mark.parametrize(
    ("key", "value"),
    [("rows", 7), ("num_beams", 20), ("popularity_baseline", {"hr@5": 0.2}), ("seed", 1),
     ("exclude_seen", "yes")],
)  # fmt: skip
def test_runs_that_were_not_evaluated_alike_are_refused(run, key, value):
    folders = [run("uniform"), run("other", changes={key: value})]
    with pytest.raises(
        ValueError,
        match=rf"other/eval/valid and .*uniform/eval/valid .*\({key}( \(.* and .*\))? differ\)",
    ):
        read_runs(folders, 0)


def test_ways_to_decode_are_compared_within_a_backbone(run):
    """As BIGRec and D3, which share rows and beams but not the length penalty."""
    penalty = {"length_penalty": 1.0}
    folders = [run("d3"), run("bigrec", model_config="m/bigrec.json", changes=penalty)]
    assert [run.state for run in read_runs(folders, 0).runs] == ["finished", "finished"]
    with pytest.raises(
        ValueError,
        match=r"other/eval/valid and .*d3/eval/valid .*\(length_penalty \(1.0 and .*\) differ\)",
    ):
        read_runs([*folders, run("other", 1, changes=penalty)], 0)
    with pytest.raises(
        ValueError,
        match=r"other2/eval/valid and .*d3/.* not alike \(num_beams \(20 and 10\) differ\)",
    ):
        read_runs(
            [
                *folders,
                run("other2", 1, model_config="m/bigrec.json", changes=penalty | {"num_beams": 20}),
            ],
            0,
        )


BEAM = {"search": "beam", "softmax": "full", "temperature": 1.0}
EXACT = {"search": "exact", "softmax": "masked", "temperature": 1.0}


def test_msl_is_reported_beside_other_objectives(run):
    """`igd eval` ranks each model as it was trained, and the tables tell."""
    folders = [
        run("uniform", changes=BEAM),
        run("igd", objective="igd", igd_beta=0.1, changes=BEAM),
        run("msl", objective="msl", msl_tau="1", changes=EXACT),
    ]
    study = read_runs(folders, 0)
    assert [found.state for found in study.runs] == ["finished"] * 3
    note = (
        "Lists come from different searches: beam search under the full softmax for q, uniform, q, "
        "igd β=0.1; exact search under the masked softmax for q, msl. A difference between these "
        "methods is one of training and search together."
    )
    tables = {table.name: table for table in all_tables(study)}
    assert note in tables["main-toy"].notes and note in tables["significance-toy"].notes
    alike = read_runs(folders[:2], 0)
    assert not any("searches" in note for table in all_tables(alike) for note in table.notes)


def test_a_temperature_that_was_learned_is_as_trained(run):
    """Each training of the adaptive τ ends at another one; one that was asked for is refused."""
    folders = []
    for seed, temperature in enumerate((3.1, 3.4)):
        changes = EXACT | {"temperature": temperature}
        folder = run(f"msl{seed}", seed, objective="msl", msl_tau="adaptive", changes=changes)
        described = {"prompt": {}, "max_length": 0, "load_in_4bit": False}
        likelihood = {"softmax": "masked", "temperature": temperature}
        (folder / "model/igd_ds.json").write_text(
            json.dumps(described | {"likelihood": likelihood})
        )
        folders.append(folder)
    assert [found.state for found in read_runs(folders, 0).runs] == ["finished"] * 2

    likelihood["temperature"] = 2.0
    (folder / "model/igd_ds.json").write_text(json.dumps(described | {"likelihood": likelihood}))
    with pytest.raises(UsageError, match=r"not alike \(temperature \(3.4 and 3.1\) differ\)"):
        read_runs(folders, 0)


@pytest.mark.parametrize(
    ("objective", "changes", "differ"),
    [
        ("cft", EXACT, r"search \(exact and beam\), softmax \(masked and full\)"),
        ("cft", BEAM | {"search": "exact"}, r"search \(exact and beam\)"),
        ("cft", BEAM | {"temperature": 2.0}, r"temperature \(2.0 and 1.0\)"),
        ("msl", EXACT | {"search": "beam"}, r"search \(beam and exact\)"),
        ("msl", BEAM, r"search \(beam and exact\), softmax \(full and masked\)"),
        ("msl", EXACT | {"num_beams": 20}, r"num_beams \(20 and 10\)"),
    ],
)
def test_a_search_that_does_not_follow_from_the_objective_is_refused(
    run, objective, changes, differ
):
    folders = [
        run("uniform", changes=BEAM),
        run("msl", objective="msl", changes=EXACT),
        run("other", 1, objective=objective, changes=changes),
    ]
    with pytest.raises(UsageError, match=rf"other/eval/valid and .* not alike \({differ} differ\)"):
        read_runs(folders, 0)


def test_the_interactions_of_a_dataset_are_those_that_its_rows_were_made_of(
    run, source, monkeypatch
):
    folder, loaded = run("uniform"), InteractionDataset.load(source.parent / "data")
    assert "users" not in read_runs([folder], 0).catalogues["toy"]  # given rows: nothing is known
    funnel = [
        {"step": "source", "users": 9, "items": 9, "interactions": 90},
        {"step": "left out", "items": 1},
        {"step": "sample", "users": 4, "items": 8, "interactions": 30},
        {"step": "rows", "train": 7},
    ]
    known = dataclasses.replace(loaded, info=loaded.info | {"funnel": funnel})
    monkeypatch.setattr(InteractionDataset, "load", lambda *_: known)
    found = read_runs([folder], 0).catalogues["toy"]
    assert (found["users"], found["interactions"]) == (4, 30)


def test_runs_of_another_dataset_of_the_same_name_are_refused(run):
    folders = [run("uniform"), run("other")]
    (folders[1] / "eval" / "test" / "request.json").write_text(json.dumps({"dataset": "0"}))
    with pytest.raises(
        ValueError, match=r"other/eval/test and .* not alike \(fingerprint \(0 and .*\) differ\)"
    ):
        read_runs(folders, 0)


def test_runs_of_another_protocol_are_refused(run, source, tmp_path):
    folders = [run("uniform"), run("other")]
    data = shutil.copytree(source.parent / "data", tmp_path / "moved")
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(info | {"protocol": "d3"}))
    text = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(text.replace(str(source.parent / "data"), str(data)))
    with pytest.raises(
        ValueError, match=rf"not alike \(protocol \(d3 and {info['protocol']}\) differ\)"
    ):
        read_runs(folders, 0)


def test_runs_of_two_datasets_stand_side_by_side(run):
    study = read_runs([run("uniform"), run("other", changes={"dataset": "toy 2", "rows": 5})], 0)
    assert [run.dataset for run in study.runs] == ["toy", "toy 2"] and study.catalogues.keys() == {
        "toy",
        "toy 2",
    }


def test_a_folder_of_run_folders_is_read_and_others_are_refused(run, tmp_path):
    run("uniform"), run("igd", objective="igd", igd_beta=0.1)
    (tmp_path / "runs" / "data").mkdir()
    study = read_runs([tmp_path / "runs"], 0)
    assert [run.method for run in study.runs] == ["igd β=0.1", "uniform"] and study.name == "runs"
    with pytest.raises(ValueError, match="is no sweep"):
        read_runs([tmp_path / "runs" / "data"], 0)

    # The same run, given twice, counts once.
    twice = read_runs([tmp_path / "runs", tmp_path / "runs" / "igd"], 0)
    assert [run.state for run in twice.runs] == ["finished", "finished"]


def test_folders_at_any_depth_make_one_report(run, tmp_path):
    """Two experiments, whose runs are called alike, in folders of one folder."""
    for seed, name in enumerate(("first", "second")):
        run("uniform", seed=seed), run("igd", objective="igd", igd_beta=0.1, seed=seed)
        (tmp_path / "runs").rename(tmp_path / name)
        (tmp_path / "all" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / name).rename(tmp_path / "all" / "deep" / name)
    deep = tmp_path / "all" / "deep"
    together = read_runs([tmp_path / "all"], 0)
    assert {run.name for run in together.runs} == {
        f"deep/{name}/{method}" for name in ("first", "second") for method in ("uniform", "igd")
    }
    assert {run.state for run in together.runs} == {"finished"}
    beside = read_runs([deep / "first", deep / "second"], 0)
    assert {run.name for run in beside.runs} == {
        f"{deep / name}/{method}" for name in ("first", "second") for method in ("uniform", "igd")
    }

    # The run folders themselves are called by their paths.
    alone = read_runs([deep / "first" / "igd", deep / "second" / "igd"], 0)
    assert [run.name for run in alone.runs] == [
        f"{deep}/{name}/igd" for name in ("first", "second")
    ]


def test_a_run_that_is_there_twice_counts_once(run):
    study = read_runs([run("uniform"), run("again")], 0)
    assert [run.state for run in study.runs] == ["finished", "unfinished"]
    assert study.runs[1].note == "left out: same method and seed as uniform"


def test_without_its_dataset_a_study_has_no_groups_but_its_figures(run, source, tmp_path):
    folder = run("uniform")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        text.replace(str(source.parent / "data"), str(tmp_path / "gone"))
    )
    study = read_runs([folder], 3)
    assert only(study).state == "finished" and "the dataset is not at" in only(study).note
    assert not study.rows and not study.catalogues and not study.examples


def test_a_dataset_that_changed_is_not_taken_for_the_old_one(run):
    folder = run("uniform")
    for split in ("valid", "test"):
        (folder / "eval" / split / "request.json").write_text(json.dumps({"dataset": "0"}))
    assert "is not the dataset that was evaluated" in only(read_runs([folder], 0)).note


def test_examples_show_rows_that_the_methods_rank_differently(run, source):
    folders = [run("uniform"), run("igd", objective="igd", igd_beta=0.1)]
    study = read_runs(folders, 3)
    dataset, ranks = (
        InteractionDataset.load(source.parent / "data"),
        [run.ranks["test"].rank for run in study.runs],
    )
    assert len(study.examples) == 3 and not read_runs(folders, 0).examples
    for example in study.examples:
        row = example["row"]
        assert ranks[0][row] != ranks[1][row]
        assert example["target"] == TITLES[dataset.splits["test"].targets[row]]
        assert example["history"] == [TITLES[item] for item in dataset.splits["test"].history(row)]
        for run_, (method, titles) in zip(study.runs, example["lists"].items(), strict=True):
            rank = run_.ranks["test"].rank[row]
            assert method == run_.method and len(titles) == 3
            assert (example["target"] in titles) == (0 < rank <= 3)


def test_equal_runs_give_equal_bytes_and_so_does_what_was_kept(run, tmp_path):
    folders = [run("uniform"), run("uniform1", 1), run("igd", objective="igd", igd_beta=0.1)]
    for name in ("first", "second"):
        save(read_runs(folders, 2), tmp_path / name)
    save(load(tmp_path / "first"), tmp_path / "third")
    for file in ("study.json", "ranks.parquet"):
        first = (tmp_path / "first" / file).read_bytes()
        assert all((tmp_path / other / file).read_bytes() == first for other in ("second", "third"))
    kept, study = load(tmp_path / "first"), read_runs(folders, 2)
    assert groups_of(kept.rows["toy"]["test"]).keys() == groups_of(study.rows["toy"]["test"]).keys()

    for one, other in zip(kept.runs, study.runs, strict=True):
        assert one.name == other.name and one.test == other.test and one.curves == other.curves
        assert all(
            np.array_equal(one.ranks[split], other.ranks[split]) for split in ("valid", "test")
        )
    with pytest.raises(ValueError, match="holds no study"):
        load(tmp_path / "runs")
    for name in ("study.json", "ranks.parquet"):
        damaged = shutil.copytree(tmp_path / "first", tmp_path / f"damaged {name}")
        (damaged / name).write_bytes((damaged / name).read_bytes()[:-9])
        with pytest.raises(
            ValueError,
            match=f"damaged {name}/{name} is damaged .*; make the report from its runs again",
        ):
            load(damaged)
    (tmp_path / "third" / "study.json").write_text(
        '{"runs": [{"name": "uniform", "of": "another version"}]}'
    )
    with pytest.raises(ValueError, match="third is damaged or was written by another version"):
        load(tmp_path / "third")
