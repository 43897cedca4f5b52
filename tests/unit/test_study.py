"""Run folders → a study: states and notes, refusals, ranks against the predictions, and the bytes that are kept."""

import json
import shutil

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import study_runs
import tiny_run
import torch
from study_runs import ROWS, TITLES, draw, ndcg, sweep_row, write_run, write_sweep

from igd_ds import distributed, eval
from igd_ds.data.collate import sample_rows
from igd_ds.data.dataset import InteractionDataset
from igd_ds.report.folders import read_runs, thinned
from igd_ds.report.study import family, labels, load, method_of, save
from igd_ds.report.tables import groups_of

UNIFORM = {"weighting": "uniform", "seed": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("source"), TITLES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def run(source, tmp_path):
    """Write one run folder below tmp_path/runs; returns it."""

    def write(name, seed=0, **settings):
        changes = settings.pop("changes", {})
        settings = {"weighting": "uniform", "seed": seed} | settings
        return write_run(tmp_path / "runs" / name, source, settings, draw(np.random.default_rng([seed, len(name)])), **changes)

    return write


def only(study):
    (run,) = study.runs
    return run


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"weighting": "uniform"}, "uniform"), ({"weighting": "igd", "igd_beta": 0.1}, "igd β=0.1"),
        ({"weighting": "igd-linear", "igd_beta": 1.0}, "igd-linear β=1"), ({"weighting": "rank", "rank_tau": 0.8}, "rank τ=0.8"),
        ({"weighting": "cft", "cft_lambda": 0.5, "position_floor": 0.1}, "cft"),
        ({"weighting": "front-greater"}, "front-greater"),
        ({"weighting": "multi-target", "curriculum_c": None}, "multi-target"),
        ({"weighting": "multi-target", "curriculum_cT": 2.0}, "multi-target + curriculum"),
        ({"recommender": "last-item-knn"}, "last-item kNN"), ({"recommender": "sasrec"}, "SASRec"),
    ],
)  # fmt: skip
def test_the_method_of_a_configuration(settings, method):
    assert method_of(settings) == method


def test_labels_name_what_differs_within_a_method():
    base = {"weighting": "cft", "seed": 0, "output_dir": "a", "cft_lambda": 0.5}
    many = [base, base | {"seed": 1, "output_dir": "b"}, base | {"cft_lambda": 1.0}, {"weighting": "uniform", "epochs": 3}]
    assert labels(many) == ["cft λ=0.5", "cft λ=0.5", "cft λ=1", "uniform"]
    assert [family(label) for label in ("cft λ=0.5", "igd β=0.1 epochs=2", "multi-target + curriculum c=2e-05")] == [
        "cft", "igd", "multi-target + curriculum",
    ]  # fmt: skip


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
    assert (found.seconds, found.eval_seconds, found.world_size) == (60.0, 4.0, 2)  # two evaluations of 10 rows at 5 rows/s
    assert found.curves.keys() == {"train/nll"} and len(found.curves["train/nll"]) == 200  # the last, cut line is passed over
    assert found.alpha == max(study_runs.ALPHAS, key=lambda alpha: found.valid["alpha"][alpha]["token_match"]["ndcg@10"])


def test_ranks_are_those_of_the_predictions(source, run):
    """Against a loop over the lines, and against what the lists were made from."""
    folder = run("uniform")
    study = read_runs([folder], 0)
    found, dataset = only(study), InteractionDataset.load(source.parent / "data")
    for split in ("valid", "test"):
        expected = dict.fromkeys(ROWS[split], 0)
        for line in pq.read_table(folder / "eval" / split / f"predictions-alpha{found.alpha}.parquet").to_pylist():
            if dataset.splits[split].targets[line["row_id"]] in line["item_ids"]:
                expected[line["row_id"]] = line["rank"]
        rows, ranks = found.ranks[split]
        assert dict(zip(rows.tolist(), ranks.tolist(), strict=True)) == expected
        results = getattr(found, split)["alpha"][found.alpha]
        assert np.mean([ndcg(rank) for rank in ranks]) == pytest.approx(results["token_match"]["ndcg@10"])
        assert study.rows["toy"][split]["user"].tolist() == dataset.splits[split].user_ids[ROWS[split]].tolist()
        assert study.rows["toy"][split]["history"].tolist() == [len(dataset.splits[split].history(row)) for row in ROWS[split]]


def test_groups_of_a_real_evaluation_are_those_that_it_measured(source, tmp_path, monkeypatch):
    """tiny_run's model, searched by eval.py: head, tail, warm and cold from the kept ranks equal metrics.json."""
    monkeypatch.setattr(distributed, "init", lambda: None)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    folder, data = shutil.copytree(source, tmp_path / "run"), source.parent / "data"
    settings = {"dataset": str(data), "weighting": "igd", "igd_beta": 0.1, "seed": 3, "model_config": "q.json"}
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "summary.json").write_text(json.dumps({"seconds": 1.0}))
    seed = next(seed for seed in range(99) if 4 not in sample_rows(tiny_run.NUM_TEST, 5, seed))  # row 4 of valid has no history
    usual = ["--model", folder / "model", "--dataset", data, "--num_beams", 10]
    valid = folder / "eval" / "valid"
    for split, flags in (("valid", ("--num_rows", 5, "--seed", seed, "--alpha", 0, 0.3)), ("test", ("--alpha_from", valid))):
        argv = ["eval.py", *usual, "--split", split, "--output_dir", folder / "eval" / split, *flags]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        assert eval.main() == 0
    study = read_runs([folder], 0)
    run = only(study)
    assert (run.state, run.method, run.seed, len(run.ranks["valid"][0])) == ("finished", "igd β=0.1", 3, 5)
    results = run.test["alpha"][run.alpha]
    gain, groups = np.array([ndcg(rank) for rank in run.ranks["test"][1]]), groups_of(study.rows["toy"]["test"])
    assert gain.mean() == pytest.approx(results["token_match"]["ndcg@10"]) and 0 < gain.mean() < 1
    for name in ("head", "tail", "warm", "cold"):
        measured = results[f"token_match_{name}_targets"]["ndcg@10"]
        assert gain @ groups[name] / groups[name].sum() == pytest.approx(measured), name


def test_states_and_notes_of_a_sweep(run, tmp_path):
    run("whole"), run("candidate", 1), run("half", 2), run("failed", 3), run("undecided", 4)
    folder = tmp_path / "runs"
    for name in ("candidate", "half", "undecided"):
        shutil.rmtree(folder / name / "eval" / "test")
    rows = [
        sweep_row("whole"), sweep_row("candidate", seed=1, chosen=False), sweep_row("half", "running", seed=2),
        sweep_row("failed", "failed", seed=3, error="RuntimeError: out of memory"), sweep_row("gone", "waiting", seed=5),
        sweep_row("large", "not run", seed=0, backbone="llama"), sweep_row("undecided", seed=4, chosen=None, family="f"),
    ]  # fmt: skip
    study = read_runs([write_sweep(folder, rows)], 0)
    assert (study.name, study.budget) == ("a sweep", "little")
    assert [(run.name, run.state, run.note) for run in study.runs] == [
        ("whole", "finished", ""), ("candidate", "no test", ""), ("half", "unfinished", "running"),
        ("failed", "failed", "RuntimeError: out of memory"), ("gone", "unfinished", "waiting"), ("large", "not run", ""),
        ("undecided", "no test", "not evaluated on test"),
    ]  # fmt: skip
    assert [run.name for run in study.runs if run.whole] == ["whole", "candidate", "undecided"]
    assert study.runs[0].family == "uniform" and study.runs[-1].family == "f"
    assert study.runs[5].settings == {"weighting": "uniform"}  # from the table


def drop(path, *keys):
    values = json.loads(path.read_text())
    for key in keys:
        del values[key]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "state", "note"),
    [
        (lambda run: (run / "summary.json").unlink(), "unfinished", "the training has not finished"),
        (lambda run: shutil.rmtree(run / "eval" / "valid"), "unfinished", "no eval/valid"),
        (lambda run: shutil.rmtree(run / "eval" / "test"), "no test", "not evaluated on test"),
        (lambda run: (run / "eval/test/metrics.json").write_text("{"), "unfinished", "eval/test/metrics.json is not JSON"),
        (lambda run: (run / "config.yaml").write_text("weighting: uniform\ndataset: d"), "unfinished", "KeyError: 'seed'"),
        (lambda run: (run / "config.yaml").write_text("weighting: uniform\nseed: 0"), "unfinished", "KeyError: 'dataset'"),
        (lambda run: (run / "config.yaml").write_text("weighting: igd\nseed: 0"), "unfinished", "KeyError: 'igd_beta'"),
        (lambda run: drop(run / "summary.json", "seconds"), "finished", "summary.json lacks seconds (an older version?)"),
        (lambda run: (run / "env.json").unlink(), "finished", "env.json lacks world_size"),
        (lambda run: drop(run / "eval/valid/metrics.json", "alpha"), "unfinished", "an older version's"),
        (lambda run: (run / "eval/test/timing.json").unlink(), "finished", ""),
    ],
)  # fmt: skip
def test_a_run_that_is_not_whole_is_noted(run, damage, state, note):
    folder = run("uniform")
    damage(folder)
    found = only(read_runs([folder], 0))
    assert found.state == state and note in found.note and bool(found.note) == bool(note)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_metric_that_is_not_a_number_leaves_the_run_out(run, split):
    folder = run("uniform")
    path = folder / "eval" / split / "metrics.json"
    results = json.loads(path.read_text())
    results["alpha"]["0.2"]["gini_index"] = float("nan")
    path.write_text(json.dumps(results))
    found = only(read_runs([folder], 0))
    assert found.state == "unfinished" and found.note == f"eval/{split}/metrics.json: alpha.0.2.gini_index is not finite"


def test_lists_too_short_to_choose_by_and_a_chosen_alpha_without_test(run):
    folder = run("uniform")
    path = folder / "eval" / "test" / "metrics.json"
    results = json.loads(path.read_text())
    chosen = only(read_runs([folder], 0)).alpha
    path.write_text(json.dumps(results | {"alpha": {a: entry for a, entry in results["alpha"].items() if a != chosen}}))
    assert only(read_runs([folder], 0)).note == f"eval/test lacks α = {chosen}, the best one on validation"
    del results["alpha"]["0.0"]["token_match"]["ndcg@10"]
    path.write_text(json.dumps(results))
    assert "its lists hold 10 items" in only(read_runs([folder], 0)).note


@pytest.mark.parametrize(("key", "value"), [("rows", 7), ("num_beams", 20), ("popularity_baseline", {"hr@5": 0.2}), ("seed", 1)])
def test_runs_that_were_not_evaluated_alike_are_refused(run, key, value):
    folders = [run("uniform"), run("other", changes={key: value})]
    with pytest.raises(ValueError, match=f"other/eval/valid and .*uniform/eval/valid .* not alike: {key} differ"):
        read_runs(folders, 0)


def test_runs_of_another_dataset_of_the_same_name_are_refused(run):
    folders = [run("uniform"), run("other")]
    (folders[1] / "eval" / "test" / "request.json").write_text(json.dumps({"dataset": "0"}))
    with pytest.raises(ValueError, match="other/eval/test and .* not alike: fingerprint differ"):
        read_runs(folders, 0)


def test_runs_of_two_datasets_stand_side_by_side(run):
    study = read_runs([run("uniform"), run("other", changes={"dataset": "toy 2", "rows": 5})], 0)
    assert [run.dataset for run in study.runs] == ["toy", "toy 2"] and study.catalogues.keys() == {"toy", "toy 2"}


def test_a_folder_of_run_folders_is_read_and_others_are_refused(run, tmp_path):
    run("uniform"), run("igd", weighting="igd", igd_beta=0.1)
    (tmp_path / "runs" / "data").mkdir()
    study = read_runs([tmp_path / "runs"], 0)
    assert [run.method for run in study.runs] == ["igd β=0.1", "uniform"] and study.name == "runs"
    with pytest.raises(ValueError, match="is no sweep"):
        read_runs([tmp_path / "runs" / "data"], 0)
    with pytest.raises(ValueError, match="two runs are called igd"):
        read_runs([tmp_path / "runs", tmp_path / "runs" / "igd"], 0)


def test_a_run_that_is_there_twice_counts_once(run):
    study = read_runs([run("uniform"), run("again")], 0)
    assert [run.state for run in study.runs] == ["finished", "unfinished"]
    assert study.runs[1].note == "left out: method and seed of uniform"


def test_without_its_dataset_a_study_has_no_groups_but_its_figures(run, source, tmp_path):
    folder = run("uniform")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(source.parent / "data"), str(tmp_path / "gone")))
    study = read_runs([folder], 3)
    assert only(study).state == "finished" and "the dataset is not at" in only(study).note
    assert not study.rows and not study.catalogues and not study.examples


def test_a_dataset_that_changed_is_not_taken_for_the_old_one(run):
    folder = run("uniform")
    for split in ("valid", "test"):
        (folder / "eval" / split / "request.json").write_text(json.dumps({"dataset": "0"}))
    assert "is not the dataset that was evaluated" in only(read_runs([folder], 0)).note


def test_examples_show_rows_that_the_methods_rank_differently(run, source):
    folders = [run("uniform"), run("igd", weighting="igd", igd_beta=0.1)]
    study = read_runs(folders, 3)
    dataset, ranks = InteractionDataset.load(source.parent / "data"), [run.ranks["test"][1] for run in study.runs]
    assert len(study.examples) == 3 and not read_runs(folders, 0).examples
    for example in study.examples:
        row = example["row"]
        assert ranks[0][row] != ranks[1][row]
        assert example["target"] == TITLES[dataset.splits["test"].targets[row]]
        assert example["history"] == [TITLES[item] for item in dataset.splits["test"].history(row)]
        for run_, (method, titles) in zip(study.runs, example["lists"].items(), strict=True):
            rank = run_.ranks["test"][1][row]
            assert method == run_.method and len(titles) == 3
            assert (example["target"] in titles) == (0 < rank <= 3)


def test_equal_runs_give_equal_bytes_and_so_does_what_was_kept(run, tmp_path):
    folders = [run("uniform"), run("uniform1", 1), run("igd", weighting="igd", igd_beta=0.1)]
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
        assert all(np.array_equal(one.ranks[split], other.ranks[split]) for split in ("valid", "test"))
    with pytest.raises(ValueError, match="holds no study"):
        load(tmp_path / "runs")
    (tmp_path / "third" / "study.json").write_text('{"runs": [{"name": "uniform", "of": "another version"}]}')
    with pytest.raises(ValueError, match="third: damaged, or of another version"):
        load(tmp_path / "third")
