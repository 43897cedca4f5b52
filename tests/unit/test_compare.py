"""igd compare: paired differences of evaluations, and the bad input that it names."""

import json
import shutil

import numpy as np
import pytest
import tiny_run
from study_runs import LENGTH, ROWS, TITLES, match, write_evaluation

from igd_ds.commands import compare
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.studies.report.dataset_details import target_ranks
from igd_ds.studies.report.study import Ranks
from igd_ds.studies.significance import bootstrap_over_users, interval_over_seeds, ndcg


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_run.make(folder, TITLES)
    return folder / "data"


@pytest.fixture
def evaluate(data, tmp_path):
    """Write an evaluation of random lists; returns its folder."""
    dataset = InteractionDataset.load(data)

    def write(name: str, seed: int, split: str = "test", alphas=("0.0",), **changes):
        random = np.random.default_rng(seed)
        lists = {a: random.integers(0, LENGTH + 1, len(ROWS[split])).tolist() for a in alphas}
        changes = {"dataset": dataset.info["name"]} | changes
        write_evaluation(tmp_path / name, dataset, split, lists, changes)
        return tmp_path / name

    return write


def compared(capsys, data, first, against, *flags) -> dict:
    words = [*map(str, first), "--against", *map(str, against), "--dataset", str(data)]
    assert compare.main([*words, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_means_are_those_of_metrics_json_and_the_interval_is_paired(evaluate, data, capsys):
    first = [evaluate(f"a{seed}", seed) for seed in range(3)]
    against = [evaluate(f"b{seed}", 10 + seed) for seed in range(3)]
    result = compared(capsys, data, first, against)
    assert (result["rows"], result["seeds"]) == (len(ROWS["test"]), 3)

    for measure in ("hr@10", "ndcg@10"):
        means = {}
        for side, folders in (("first", first), ("against", against)):
            values = [
                json.loads((folder / "metrics.json").read_text())["alpha"]["0.0"]["item_match"][
                    measure
                ]
                for folder in folders
            ]
            means[side] = np.mean(values)
            assert result[measure][side] == pytest.approx(means[side])
            assert result[measure][f"{side}_sd"] == pytest.approx(np.std(values, ddof=1))
        assert result[measure]["difference"] == pytest.approx(means["first"] - means["against"])

    dataset = InteractionDataset.load(data)
    targets = dataset.splits["test"].targets
    by_row = [
        np.mean(
            [ndcg(target_ranks(f / "predictions-alpha0.0.parquet", targets)) for f in side], axis=0
        )
        for side in (first, against)
    ]
    users = dataset.splits["test"].user_ids[ROWS["test"]]
    expected = bootstrap_over_users(by_row[0] - by_row[1], users)
    found = result["ndcg@10"]
    assert (found["low"], found["high"], found["p"]) == pytest.approx(tuple(expected))

    # Seed by seed: the first of one side against the first of the other.
    pairs = [
        compared(capsys, data, [a], [b])["ndcg@10"] for a, b in zip(first, against, strict=True)
    ]
    seeds = interval_over_seeds(np.array([pair["difference"] for pair in pairs]))
    assert (found["seeds_low"], found["seeds_high"]) == pytest.approx(seeds)
    assert pairs[0]["seeds_low"] is None


def test_an_evaluation_equals_itself(evaluate, data, capsys):
    folder = evaluate("a", 0)
    found = compared(capsys, data, [folder], [folder])["ndcg@10"]
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)
    assert found["first_sd"] is None


def test_the_table_has_a_line_per_measure(evaluate, data, capsys):
    first, against = evaluate("a", 0), evaluate("b", 1)
    assert compare.main([str(first), "--against", str(against), "--dataset", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    users = len(np.unique(InteractionDataset.load(data).splits["test"].user_ids[ROWS["test"]]))
    counted = f"{len(ROWS['test'])} rows of {users} users"
    assert lines[0] == f"{counted}, mean over rows, 1 evaluation on each side"
    assert [line.split()[0] for line in lines[2:]] == ["hr@10", "ndcg@10"]
    assert "over seeds" not in lines[1]

    sides = [first, evaluate("c", 2), "--against", against, against]
    assert compare.main([*map(str, sides), "--dataset", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].index("95 % over seeds") == lines[2].rindex(" to ") - len("+0.0000")
    assert lines[1].index("95 % over users") == lines[2].index(" to ") - len("+0.0000")


def test_one_evaluation_named_twice_is_not_two_seeds(evaluate, data, capsys):
    first, against = evaluate("a", 0), evaluate("b", 1)
    found = compared(capsys, data, [first, first], [against, against])
    assert found["ndcg@10"]["seeds_low"] is None
    other = evaluate("c", 2)
    found = compared(capsys, data, [first, other], [against, against], "--mean_over", "users")
    assert found["ndcg@10"]["seeds_low"] < found["ndcg@10"]["seeds_high"]


def test_splits_are_not_compared_by_common_rows(evaluate, data):
    first, against = evaluate("a", 0), evaluate("b", 1, split="valid")
    dataset = InteractionDataset.load(data)
    with pytest.raises(UsageError, match="different splits"):
        compare.compare([first], [against], dataset, common_rows=True)
    with pytest.raises(UsageError, match="mean_over 'user': give one of rows, users"):
        compare.compare([first], [first], dataset, mean_over="user")


def test_one_of_several_alphas_is_chosen(evaluate, data, capsys):
    folder, other = evaluate("a", 0, alphas=("0.0", "0.2")), evaluate("b", 1, alphas=("0.2",))
    stored = json.loads((folder / "metrics.json").read_text())["alpha"]["0.2"]["item_match"]
    found = compared(capsys, data, [folder], [other], "--alpha", "0.2")
    assert found["hr@10"]["first"] == pytest.approx(stored["hr@10"])


def test_the_measures_are_those_of_the_evaluator():
    ranks = [0, 1, 3, 10]
    found = compare.Ranks(np.arange(4), np.array(ranks), np.array([0, 1, 0.5, 1]))
    stored = match(ranks, np.array([1, 1, 0.5, 1]))
    assert {name: f(found).mean() for name, f in compare.MEASURES.items()} == pytest.approx(
        {name: stored[name] for name in compare.MEASURES}
    )


def test_each_side_may_have_its_own_alpha(evaluate, data, capsys):
    folder, other = evaluate("a", 0, alphas=("0.0", "0.2")), evaluate("b", 1)
    found = compared(capsys, data, [folder], [other], "--alpha", "0.2", "--against_alpha", "0")
    stored = json.loads((other / "metrics.json").read_text())["alpha"]["0.0"]["item_match"]
    assert found["hr@10"]["against"] == pytest.approx(stored["hr@10"])


def test_a_mean_over_users_counts_every_user_once(evaluate, data, capsys):
    first, against = evaluate("a", 0), evaluate("b", 1)
    found = compared(capsys, data, [first], [against], "--mean_over", "users")
    assert found["mean_over"] == "users"

    split = InteractionDataset.load(data).splits["test"]
    users = split.user_ids[ROWS["test"]]
    assert 1 < found["users"] == len(np.unique(users)) < len(users)
    for side, folder in (("first", first), ("against", against)):
        values = ndcg(target_ranks(folder / "predictions-alpha0.0.parquet", split.targets))
        by_user = [values[users == user].mean() for user in np.unique(users)]
        assert found["ndcg@10"][side] == pytest.approx(np.mean(by_user))
        assert found["ndcg@10"][side] != pytest.approx(values.mean())
    assert found["ndcg@10"]["low"] <= found["ndcg@10"]["difference"] <= found["ndcg@10"]["high"]


def test_a_sample_is_compared_with_all_rows(evaluate, data, capsys):
    folder, other = evaluate("a", 0), evaluate("b", 1)
    plain = compared(capsys, data, [folder], [other])
    assert compared(capsys, data, [folder], [other], "--common_rows") == plain

    def side(rows, ranks):
        return compare.Side("test", Ranks(np.array(rows), np.array(ranks), np.ones(len(rows))))

    every, sample = side([0, 1, 2, 5], [1, 0, 3, 2]), side([1, 4, 5], [7, 8, 9])
    common = compare.on_common_rows([every, sample])
    assert [list(ranks.row) for _, ranks in common] == [[1, 5], [1, 5]]
    assert [list(ranks.rank) for _, ranks in common] == [[0, 2], [7, 9]]
    with pytest.raises(UsageError, match="--common_rows: no row was ranked by all"):
        compare.on_common_rows([every, side([3], [1])])


def test_bad_input_is_named(evaluate, data, tmp_path):
    folder = evaluate("a", 0)
    damaged = evaluate("damaged", 1)
    (damaged / "predictions-alpha0.0.parquet").write_bytes(b"PAR1")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(folder, unfinished)
    (unfinished / "metrics.json").unlink()

    cases = {
        "cannot be read": damaged,
        "give the folder of a finished evaluation": unfinished,
        "ranked different rows": evaluate("valid", 0, split="valid"),
        r"choose one with --alpha": evaluate("two", 0, alphas=("0.0", "0.2")),
        "is an evaluation on 'other'": evaluate("other", 0, dataset="other"),
        "does not hold the lists of metrics.json": evaluate("rows", 0, rows=7),
        "another dataset that is called": evaluate("foreign", 0),
        "has no hr@10, because its lists are shorter": evaluate("short", 0),
        "lacks the split or the α": evaluate("list", 0, alpha=[0.0]),
        "0.0.parquet is missing": evaluate("gone", 0),
    }
    (tmp_path / "foreign" / "request.json").write_text('{"dataset": "of another fingerprint"}')
    (tmp_path / "gone" / "predictions-alpha0.0.parquet").unlink()
    short = json.loads((tmp_path / "short" / "metrics.json").read_text())
    del short["alpha"]["0.0"]["item_match"]["hr@10"]
    (tmp_path / "short" / "metrics.json").write_text(json.dumps(short))
    for message, other in cases.items():
        words = [str(folder), "--against", str(other), "--dataset", str(data)]
        with pytest.raises(UsageError, match=message):
            compare.main(words)

    words = [str(folder), "--against", str(folder), "--dataset", str(data)]
    with pytest.raises(UsageError, match=r"--alpha 0\.7: .* has the α 0\.0"):
        compare.main([*words, "--alpha", "0.7"])
    with pytest.raises(UsageError, match="1 evaluations are compared with 2"):
        compare.main([str(folder), "--against", str(folder), str(folder), "--dataset", str(data)])
