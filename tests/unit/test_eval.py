"""The evaluator in one process: lists and metrics against a plain search, resuming, guards. Many ranks: tests/dist."""

import dataclasses
import json
import math
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from oracle import assert_same_lists, plain_search, ranking, weight_by_path
from tiny_run import NUM_TEST, TRAIN_TARGETS, Plain

from igd_ds import distributed, eval
from igd_ds.backbones import causal_lm
from igd_ds.evaluation.recommender import Recommender
from igd_ds.items import decisiveness
from igd_ds.search.scoring import edge_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def evaluate(run, tmp_path, monkeypatch):
    """Run the entry point with flags added to the usual ones; returns (exit code, output folder)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(distributed, "init", lambda: None)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))

    def evaluation(*flags, output="out"):
        usual = [
            "--model",
            run / "model",
            "--dataset",
            run.parent / "data",
            "--output_dir",
            tmp_path / output,
            "--batch_size",
            3,
        ]
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, (*usual, *flags))])
        return eval.main(), tmp_path / output

    return evaluation


def predictions(output, alpha=0.0):
    """The lines of each row's list."""
    lines = [[] for _ in range(NUM_TEST)]
    for line in pq.read_table(output / f"predictions-alpha{alpha}.parquet").to_pylist():
        lines[line["row_id"]].append(line)
    assert all([line["rank"] for line in mine] == list(range(1, len(mine) + 1)) for mine in lines)
    return lines


def read_metrics(output):
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_lists_and_metrics_equal_a_plain_search(evaluate, run, search):
    code, output = evaluate("--alpha", 0, 0.3, "--num_beams", 5, "--search", search)
    assert code == 0 and not (output / "parts").exists()
    found, plain = read_metrics(output), Plain(run)
    test, paths = plain.dataset.splits["test"], plain.paths
    for alpha in (0.0, 0.3):
        weight = weight_by_path(plain.trie, edge_weights(plain.trie, plain.gain, "per-node", alpha))
        hits, gains, item_hits = 0, 0, 0
        for row, mine in enumerate(predictions(output, alpha)):
            prompt = plain.prompt(test.history(row))
            if search == "beam":
                expected = plain_search(plain.model, prompt, plain.different_paths, weight, 5, 0.0)
            else:
                expected = ranking(plain.model, prompt, plain.different_paths, weight, 0.0)[:5]
            assert_same_lists(
                [(line["score"], paths[line["item_ids"][0]]) for line in mine], expected
            )
            assert all(
                line["user_id"] == test.user_ids[row] and line["alpha"] == alpha for line in mine
            )
            assert all(len({paths[item] for item in line["item_ids"]}) == 1 for line in mine)
            assert all(line["certified"] == (search == "exact") for line in mine)
            for line in mine:
                if test.targets[row] in line["item_ids"]:
                    hits, gains = hits + 1, gains + 1 / math.log2(line["rank"] + 1)
                    item_hits += 1 / len(line["item_ids"])
        values = found["alpha"][str(alpha)]
        assert values["token_match"]["hr@5"] == pytest.approx(hits / NUM_TEST)
        assert values["token_match"]["ndcg@5"] == pytest.approx(gains / NUM_TEST)
        assert values["item_match"]["hr@5"] == pytest.approx(item_hits / NUM_TEST)
        assert set(values["token_match"]) == {
            f"{name}@{k}" for name in ("hr", "ndcg") for k in (1, 3, 5)
        }
        warm, cold = (
            values["token_match_warm_targets"]["hr@5"],
            values["token_match_cold_targets"]["hr@5"],
        )
        assert warm * (NUM_TEST - found["cold_targets"]) + cold * found[
            "cold_targets"
        ] == pytest.approx(hits)
    assert found["rows"] == NUM_TEST and found["cold_targets"] == sum(
        t in (8, 9) for t in test.targets
    )
    assert found["leaves"] == 9 and found["short_lists"] == 0
    entropy, nodes = (
        decisiveness.entropy(plain.trie, "prior"),
        weight_by_path(plain.trie, range(plain.trie.num_nodes)),
    )
    first = np.mean([entropy[int(nodes[paths[target][:1]])] for target in test.targets])
    assert found["target_prefix_entropy"]["nats"][0] == pytest.approx(first)


def share_before(border, count):
    """Share of each path that stands before a border (a place) when paths are ranked by count; equal counts share places."""
    ranked = sorted(count, key=count.get, reverse=True)
    before = [min(max(border - place, 0), 1) for place in range(len(ranked))]
    return {
        path: np.mean(
            [b for b, other in zip(before, ranked, strict=True) if count[other] == count[path]]
        )
        for path in count
    }


def test_popularity_of_the_lists_and_relaxed_match(evaluate, run, monkeypatch):
    plain, build_task = Plain(run), eval.build_task

    def with_codes(config):
        task = build_task(config)
        catalogue = dataclasses.replace(
            task.recommender.stored.catalogue, kind="semantic-id"
        )  # a letter is a code
        task.recommender.stored = dataclasses.replace(task.recommender.stored, catalogue=catalogue)
        return task

    _, text = evaluate("--num_beams", 3, output="text")
    monkeypatch.setattr(eval, "build_task", with_codes)
    _, output = evaluate("--num_beams", 3)
    results, values = read_metrics(output), read_metrics(output)["alpha"]["0.0"]
    targets = [plain.paths[target] for target in plain.dataset.splits["test"].targets]
    lists = [[plain.paths[line["item_ids"][0]] for line in mine] for mine in predictions(output)]
    hit = np.array([target in mine for target, mine in zip(targets, lists, strict=True)])
    occurring = Counter(targets)
    head = np.array([share_before(len(occurring) / 2, occurring)[target] for target in targets])
    assert results["head_targets"] == pytest.approx(head.sum()) and 0 < hit @ head < head.sum()
    assert values["token_match_head_targets"]["hr@3"] == pytest.approx(hit @ head / head.sum())
    assert values["token_match_tail_targets"]["hr@3"] == pytest.approx(
        hit @ (1 - head) / (1 - head).sum()
    )
    trained = Counter(plain.paths[target] for target in TRAIN_TARGETS)
    trained = {path: trained[path] for path in plain.different_paths}
    before = [share_before(len(trained) * decile / 10, trained) for decile in range(11)]
    listed = Counter(path for mine in lists for path in mine)
    for times, found in (
        (occurring, results["target_popularity_deciles"]),
        (listed, values["popularity_deciles"]),
    ):
        expected = [
            sum(times[path] * share[path] for path in times) / times.total() for share in before
        ]
        assert found == pytest.approx(np.diff(expected)) and len(found) == 10
    every = np.array([listed[path] for path in plain.different_paths])
    assert values["coverage"] == np.mean(every > 0) < 1
    assert values["gini_index"] == pytest.approx(
        np.abs(every[:, None] - every).mean() / (2 * every.mean())
    )
    assert set(values["relaxed_match"]) == {
        str(k) for k in range(1, max(map(len, plain.paths)) - 1)
    }
    for k, relaxed in values["relaxed_match"].items():  # paths end in EOS, which is no code
        codes = [
            [path[:-1][: int(k)] for path in (target, *mine)]
            for target, mine in zip(targets, lists, strict=True)
        ]
        assert relaxed["hr@3"] == pytest.approx(
            np.mean([target in mine for target, *mine in codes])
        )
        assert relaxed["hr@1"] == pytest.approx(
            np.mean([target == first for target, first, *_ in codes])
        )
    del values["relaxed_match"]
    assert read_metrics(text)["alpha"]["0.0"] == values  # titles have none


def test_an_exact_evaluation_shows_what_the_beam_misses(evaluate, capsys):
    beam, exact = (
        evaluate("--num_beams", 2, "--search", name, output=name)[1] for name in ("beam", "exact")
    )
    assert "; proven for 100.00% of rows" in capsys.readouterr().out
    of_beam, of_exact = (read_metrics(output) for output in (beam, exact))
    values = of_exact["alpha"]["0.0"]
    assert values["proof_share"] == 1 and "beam" not in of_beam["alpha"]["0.0"]
    assert values["beam"]["token_match"] == of_beam["alpha"]["0.0"]["token_match"]
    listed = [
        [[line["leaf_id"] for line in mine] for mine in predictions(output)]
        for output in (beam, exact)
    ]
    missed = [
        [leaf not in by_beam for leaf in truth] for by_beam, truth in zip(*listed, strict=True)
    ]
    assert sum(map(sum, missed)) > 0
    expected = {
        "1": np.mean([row[0] for row in missed]),
        "2": np.mean([sum(row) for row in missed]),
    }
    assert values["beam"]["missed_of_true_top"] == pytest.approx(expected)
    counts = of_exact["search_per_row"]
    assert counts["positions"] > of_beam["search_per_row"]["positions"] > 0
    assert counts["beam_positions"] == of_beam["search_per_row"]["beam_positions"]
    assert set(counts) >= {"passes", "positions", "token_steps", "beam_positions"}


def test_too_small_a_budget_leaves_lists_unproven(evaluate):
    _, output = evaluate("--num_beams", 4, "--search", "exact", "--row_positions", 4)
    values = read_metrics(output)["alpha"]["0.0"]
    lists = predictions(output)
    assert (
        values["proof_share"]
        == np.mean([all(line["certified"] for line in mine) for mine in lists])
        < 1
    )
    assert all(len(mine) == 4 for mine in lists)


def write_lists(path, row_ids, **lists):
    columns = {name: pa.array(values, pa.list_(pa.int32())) for name, values in lists.items()}
    pq.write_table(pa.table({"row_id": pa.array(row_ids, pa.int32()), **columns}), path)
    return path


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_item_filters(evaluate, tmp_path, capsys, search):
    """Row 0 may get three items, row 2 all but four, row 5 one of two items that share a leaf."""
    path = write_lists(
        tmp_path / "lists",
        [2, 5, 0],
        allow=[None, [3], [4, 7, 9, 0]],
        deny=[[0, 1, 2, 9], None, [0]],
    )
    _, output = evaluate("--num_beams", 6, "--item_filter", path, "--search", search)
    assert "warning: 2 lists are shorter than --num_beams" in capsys.readouterr().out
    found, lists = read_metrics(output), predictions(output)
    items = [sorted(item for line in mine for item in line["item_ids"]) for mine in lists]
    assert items[0] == [4, 7, 9] and items[2] == [3, 4, 5, 6, 7, 8] and items[5] == [3]
    assert (
        all(len(mine) == 6 for row, mine in enumerate(lists) if row not in (0, 5))
        and found["short_lists"] == 2
    )
    _, free = evaluate("--num_beams", 6, "--search", search, output="free")
    for row in set(range(NUM_TEST)) - {0, 2, 5}:
        assert [line["leaf_id"] for line in lists[row]] == [
            line["leaf_id"] for line in predictions(free)[row]
        ]
    assert found["item_filter"] != read_metrics(free)["item_filter"] is None


def test_item_match_draws_from_the_items_a_row_may_get(evaluate, run, tmp_path):
    targets = Plain(run).dataset.splits["test"].targets
    assert 3 in targets  # which shares its leaf with item 2
    for denied in (2, 3):
        path = write_lists(tmp_path / "lists", range(NUM_TEST), deny=[[denied]] * NUM_TEST)
        _, output = evaluate("--num_beams", 9, "--item_filter", path, output=f"without-{denied}")
        values = read_metrics(output)["alpha"]["0.0"]
        listed = [
            {item for line in mine[:5] for item in line["item_ids"]} for mine in predictions(output)
        ]
        assert not any(denied in items for items in listed)
        hits = sum(target in items for target, items in zip(targets, listed, strict=True))
        assert values["item_match"]["hr@5"] == pytest.approx(hits / NUM_TEST)
        titles = sum(
            target == denied and 5 - denied in items
            for target, items in zip(targets, listed, strict=True)
        )
        assert values["token_match"]["hr@5"] == pytest.approx((hits + titles) / NUM_TEST)


def test_guidance_moves_lists(evaluate, tmp_path):
    q = np.full((NUM_TEST, 10), 0.01)
    q[np.arange(NUM_TEST), np.arange(NUM_TEST) % 10] = 1
    np.save(tmp_path / "q.npy", q)
    _, output = evaluate(
        "--num_beams", 3, "--guidance", tmp_path / "q.npy", "--guidance_weight", 50
    )
    assert all(row % 10 in mine[0]["item_ids"] for row, mine in enumerate(predictions(output)))
    q[:, :] = 0
    q[:, 4:6] = 1  # the guide forbids all other items
    np.save(tmp_path / "q.npy", q)
    _, output = evaluate(
        "--num_beams", 3, "--guidance", tmp_path / "q.npy", "--guidance_weight", 0.1, output="few"
    )
    assert all(
        {item for line in mine for item in line["item_ids"]} == {4, 5}
        for mine in predictions(output)
    )
    assert read_metrics(output)["short_lists"] == NUM_TEST
    with pytest.raises(
        ValueError, match="row 7 of test: item filter and guidance together leave nothing"
    ):
        path = write_lists(tmp_path / "lists", [7], allow=[[1, 2]])
        evaluate(
            "--guidance",
            tmp_path / "q.npy",
            "--guidance_weight",
            1,
            "--item_filter",
            path,
            output="nothing",
        )


def test_files_are_part_of_the_request(evaluate, tmp_path):
    path = write_lists(tmp_path / "lists", [1], deny=[[0]])
    evaluate("--item_filter", path, "--num_beams", 2)
    moved = write_lists(tmp_path / "same", [1], deny=[[0]])
    assert evaluate("--item_filter", moved, "--num_beams", 2)[0] == 0
    write_lists(path, [1], deny=[[1]])
    with pytest.raises(ValueError, match="these differ: item_filter"):
        evaluate("--item_filter", path, "--num_beams", 2)


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(evaluate, monkeypatch, search):
    flags = ("--alpha", 0, 0.2, "--num_beams", 4, "--search", search)
    _, whole = evaluate(*flags, output="whole")
    searched, calls = Recommender.search, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return searched(*arguments)

    monkeypatch.setattr(Recommender, "search", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*flags)
    _, resumed = evaluate(*flags)
    assert len(calls) == 2 + 3  # the other three of four batches
    names = [
        "metrics.json",
        "request.json",
        "predictions-alpha0.0.parquet",
        "predictions-alpha0.2.parquet",
    ]
    for name in names:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert sorted(path.name for path in resumed.iterdir()) == sorted(
        [*names, "timing.json", "metrics.jsonl", "tensorboard"]
    )
    assert json.loads((resumed / "timing.json").read_text())["rows_already_there"] == 3


def test_a_finished_evaluation_is_not_repeated_and_another_one_is_refused(
    evaluate, monkeypatch, capsys
):
    evaluate()
    monkeypatch.setattr(causal_lm, "load_trained", lambda *_: pytest.fail("weights are loaded"))
    assert evaluate()[0] == 0
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="these differ: alpha, num_beams"):
        evaluate("--alpha", 0.1, "--num_beams", 3)


def test_a_beam_wider_than_the_catalogue_lists_every_leaf(evaluate, capsys):
    with pytest.warns(UserWarning, match="at 10, 20 are omitted"):
        _, output = evaluate("--num_beams", 12)
    assert "9 different items" in capsys.readouterr().out
    assert read_metrics(output)["alpha"]["0.0"]["token_match"].keys() >= {"hr@5"}
    lists = pq.read_table(output / "predictions-alpha0.0.parquet")
    assert lists.num_rows == 9 * NUM_TEST
    assert sorted(item for items in lists["item_ids"].to_pylist()[:9] for item in items) == list(
        range(10)
    )


def test_a_sample_of_rows_is_seeded(evaluate):
    row_ids = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _, output = evaluate("--num_rows", 5, "--seed", seed, "--num_beams", 1, output=name)
        row_ids.append(pq.read_table(output / "predictions-alpha0.0.parquet")["row_id"].to_pylist())
        assert read_metrics(output)["rows"] == 5
    assert row_ids[0] == row_ids[1] == sorted(set(row_ids[0])) != row_ids[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", 1.5], r"--alpha must lie in \[0, 1\]"),
        (["--decoding_rule", "pernode"], "per-node"),
        (["--max_length", 500], "--max_length 500 exceeds the 160"),
        (["--max_length", 20], "--max_length leaves"),
        (["--model", "nowhere"], "no igd_ds.json"),
        (["--length_penalty", -1], "--length_penalty"),
        (
            ["--search", "exact", "--decoding_rule", "pooled"],
            "--decoding_rule pooled depends on which beams",
        ),
        (
            ["--pass_positions", 9],
            "--pass_positions 9 is less than one position for each of 10 beams",
        ),
        (
            ["--pass_positions", 10**12],
            "--pass_positions 1000000000000 × 257 tokens of logits take .* GiB are free: lower it",
        ),
        (["--split", "valid"], "row 4 of valid has an empty history"),
        (["--item_filter", "nowhere"], "--item_filter: no file nowhere"),
        (["--guidance", "nowhere", "--guidance_weight", 1], "--guidance: no file nowhere"),
    ],
)
def test_bad_input_is_refused_before_the_weights_are_loaded(evaluate, monkeypatch, flags, message):
    monkeypatch.setattr(causal_lm, "load_trained", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(ValueError, match=message):
        evaluate(*flags)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"row_id": [0], "deny": [list(range(10))]},
            r"\(row 0 of test\): the item filter leaves nothing",
        ),
        (
            {"row_id": [0, 3], "allow": [[1], [10]]},
            r"\(row 3 of test\): item 10 of the allow list is not in the catalogue",
        ),
        (
            {"row_id": [NUM_TEST], "deny": [[1]]},
            f"the split has no row {NUM_TEST}; row ids are 0 to {NUM_TEST - 1}",
        ),
        ({"row_id": [2, 1, 2], "deny": [[1]] * 3}, "row 2 is there more than once"),
        (
            {"row_id": [1], "forbid": [[1]]},
            "columns row_id and allow, deny or both; found row_id, forbid",
        ),
        ({"row_id": [1], "deny": [[0.5]]}, "column deny must hold lists of item ids"),
        ({"row_id": ["a"], "deny": [[1]]}, "row_id must be whole numbers"),
    ],
)
def test_item_filters_that_cannot_be_are_refused_before_the_weights_are_loaded(
    evaluate, monkeypatch, tmp_path, table, message
):
    monkeypatch.setattr(causal_lm, "load_trained", lambda *_: pytest.fail("weights are loaded"))
    pq.write_table(pa.table(table), tmp_path / "lists")
    with pytest.raises(ValueError, match=message):
        evaluate("--item_filter", tmp_path / "lists")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.ones((NUM_TEST, 9)),
            r"floats of shape \(11, 10\): rows, items; found float64 of shape \(11, 9\)",
        ),
        (np.ones((NUM_TEST, 10), int), "found int64"),
        (
            np.full((NUM_TEST, 10), None),
            "is not a .npy file of floats",
        ),  # an array of objects is pickled
    ],
)
def test_guidance_that_cannot_be_is_refused_before_the_weights_are_loaded(
    evaluate, monkeypatch, tmp_path, array, message
):
    monkeypatch.setattr(causal_lm, "load_trained", lambda *_: pytest.fail("weights are loaded"))
    np.save(tmp_path / "q.npy", array)
    with pytest.raises(ValueError, match=message):
        evaluate("--guidance", tmp_path / "q.npy", "--guidance_weight", 1)


def test_a_foreign_folder_is_never_written_to(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("…")
    with pytest.raises(ValueError, match="not empty and holds no evaluation"):
        evaluate()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
