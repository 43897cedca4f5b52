"""The evaluator in one process: lists and metrics compared with a plain search, resuming, checks.

Many ranks: tests/dist. pytest.approx compares with its relative default, 1e-6: both sides are means
in fp64 of some dozen terms, which agree to about 1e-14. Scores are compared by
`oracle.assert_same_lists`.
"""

import dataclasses
import json
import math
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from oracle import assert_same_lists, plain_search, ranking, weight_by_path
from tiny_run import NUM_TEST, TRAIN_TARGETS, Plain

from igd_ds import distributed, eval
from igd_ds.errors import UsageError
from igd_ds.evaluation.parts import RankingTask
from igd_ds.evaluation.recommender import Recommender
from igd_ds.items import decisiveness
from igd_ds.search.scoring import edge_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def plain(run):
    return Plain(run)


@pytest.fixture
def evaluate(run, tmp_path, monkeypatch):
    """Run the entry point with the usual flags and more; return exit code and output folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distributed, "init", lambda *_: None)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))

    def evaluation(*flags, output="out"):
        usual = {
            "--model": run / "model",
            "--dataset": run.parent / "data",
            "--output_dir": tmp_path / output,
            "--batch_size": 3,
        }
        words = [word for flag in usual.items() for word in flag]
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, (*words, *flags))])
        return eval.main(), tmp_path / output

    return evaluation


@pytest.fixture
def no_weights(monkeypatch):
    """Fail the test if the model's weights are loaded."""
    monkeypatch.setattr(Recommender, "load_weights", lambda self: pytest.fail("weights are loaded"))


def predictions(output, alpha=0.0):
    """Return the lines of each row's list."""
    lines = [[] for _ in range(NUM_TEST)]
    for line in pq.read_table(output / f"predictions-alpha{alpha}.parquet").to_pylist():
        lines[line["row_id"]].append(line)
    assert all([line["rank"] for line in mine] == list(range(1, len(mine) + 1)) for mine in lines)
    return lines


def leaves(output, alpha=0.0):
    """Return the trie leaves of each row's list."""
    return [[line["leaf_id"] for line in mine] for mine in predictions(output, alpha)]


def items(output, alpha=0.0):
    """Return the items of each row's list."""
    return [[i for line in mine for i in line["item_ids"]] for mine in predictions(output, alpha)]


def scored_paths(plain, lines):
    """Return a list as [(score, path)]."""
    return [(line["score"], plain.paths[line["item_ids"][0]]) for line in lines]


def read_metrics(output):
    return json.loads((output / "metrics.json").read_text())


def test_batches_hold_rows_of_similar_length_each_row_once(plain):
    split = plain.dataset.splits["test"]
    rows = np.arange(len(split))[1:]
    task = RankingTask(None, split, rows, None, None, None, "beam", "score")
    batches = task.batches(3)
    assert [len(batch) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    together = np.concatenate(batches)
    assert sorted(together) == rows.tolist()
    lengths = [len(split.history(row)) for row in together]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_lists_and_metrics_equal_a_plain_search(evaluate, plain, search):
    code, output = evaluate("--alpha", 0, 0.3, "--num_beams", 5, "--search", search)
    assert code == 0
    assert not (output / "parts").exists()
    found, test = read_metrics(output), plain.dataset.splits["test"]
    num_cold = found["cold_targets"]

    for alpha in (0.0, 0.3):
        weight = weight_by_path(plain.trie, edge_weights(plain.trie, plain.gain, "per-node", alpha))
        hits, gains, item_hits = 0, 0, 0
        for row, mine in enumerate(predictions(output, alpha)):
            # The list.
            prompt = plain.prompt(test.history(row))
            if search == "beam":
                expected = plain_search(plain.model, prompt, plain.different_paths, weight, 5, 0.0)
            else:
                expected = ranking(plain.model, prompt, plain.different_paths, weight, 0.0)[:5]
            assert_same_lists(scored_paths(plain, mine), expected)

            # The other columns of its lines, and its metrics.
            for line in mine:
                assert line["user_id"] == test.user_ids[row]
                assert line["alpha"] == alpha
                assert line["certified"] == (search == "exact")
                assert len({plain.paths[item] for item in line["item_ids"]}) == 1
                if test.targets[row] in line["item_ids"]:
                    hits += 1
                    gains += 1 / math.log2(line["rank"] + 1)
                    item_hits += 1 / len(line["item_ids"])

        values = found["alpha"][str(alpha)]
        names = {f"{name}@{k}" for name in ("hr", "ndcg") for k in (1, 3, 5)}
        assert set(values["token_match"]) == names
        assert values["token_match"]["hr@5"] == pytest.approx(hits / NUM_TEST)
        assert values["token_match"]["ndcg@5"] == pytest.approx(gains / NUM_TEST)
        assert values["item_match"]["hr@5"] == pytest.approx(item_hits / NUM_TEST)
        warm = values["token_match_warm_targets"]["hr@5"]
        cold = values["token_match_cold_targets"]["hr@5"]
        assert warm * (NUM_TEST - num_cold) + cold * num_cold == pytest.approx(hits)


def test_what_is_said_of_the_targets(evaluate, plain):
    _, output = evaluate("--num_beams", 2)
    found, targets = read_metrics(output), plain.dataset.splits["test"].targets
    assert found["rows"] == NUM_TEST
    assert found["cold_targets"] == sum(target in (8, 9) for target in targets)
    assert found["leaves"] == 9
    assert found["short_lists"] == 0

    entropy = decisiveness.entropy(plain.trie, "prior")
    nodes = weight_by_path(plain.trie, range(plain.trie.num_nodes))
    first = np.mean([entropy[int(nodes[plain.paths[target][:1]])] for target in targets])
    assert found["target_prefix_entropy"]["nats"][0] == pytest.approx(first)


def share_before(border, count):
    """Return the share of each path that stands before a border when paths are ranked by count.

    The border is a place. Paths of equal count share their places.
    """
    ranked = sorted(count, key=count.get, reverse=True)
    before = [min(max(border - place, 0), 1) for place in range(len(ranked))]
    share_of_count = {
        number: np.mean([b for b, p in zip(before, ranked, strict=True) if count[p] == number])
        for number in set(count.values())
    }
    return {path: share_of_count[count[path]] for path in count}


@pytest.fixture
def lists_of_codes(evaluate, plain, monkeypatch):
    """Evaluate as if each letter of a title was a code: metrics.json and the lists as paths."""
    build_task = eval.build_task

    def with_codes(config):
        task = build_task(config)
        stored = task.recommender.stored
        catalogue = dataclasses.replace(stored.catalogue, kind="semantic-id")
        task.recommender.stored = dataclasses.replace(stored, catalogue=catalogue)
        return task

    monkeypatch.setattr(eval, "build_task", with_codes)
    _, output = evaluate("--num_beams", 3, output="codes")
    monkeypatch.setattr(eval, "build_task", build_task)
    return read_metrics(output), [
        [plain.paths[line["item_ids"][0]] for line in mine] for mine in predictions(output)
    ]


def test_head_and_tail(evaluate, plain):
    _, output = evaluate("--num_beams", 3)
    results, values = read_metrics(output), read_metrics(output)["alpha"]["0.0"]
    targets = plain.dataset.splits["test"].targets
    hit = np.array([target in mine for target, mine in zip(targets, items(output), strict=True)])

    paths = [plain.paths[target] for target in targets]
    occurring = Counter(paths)
    share = share_before(len(occurring) / 2, occurring)
    head = np.array([share[path] for path in paths])
    tail = 1 - head
    assert 0 < hit @ head < head.sum()
    assert results["head_targets"] == pytest.approx(head.sum())
    assert values["token_match_head_targets"]["hr@3"] == pytest.approx(hit @ head / head.sum())
    assert values["token_match_tail_targets"]["hr@3"] == pytest.approx(hit @ tail / tail.sum())


def test_popularity_of_the_lists(lists_of_codes, plain):
    results, lists = lists_of_codes
    values = results["alpha"]["0.0"]
    targets = Counter(plain.paths[target] for target in plain.dataset.splits["test"].targets)
    listed = Counter(path for mine in lists for path in mine)

    trained = Counter(plain.paths[target] for target in TRAIN_TARGETS)
    trained = {path: trained[path] for path in plain.different_paths}
    before = [share_before(len(trained) * decile / 10, trained) for decile in range(11)]
    for times, found in (
        (targets, results["target_popularity_deciles"]),
        (listed, values["popularity_deciles"]),
    ):
        up_to = [sum(times[path] * share[path] for path in times) for share in before]
        assert found == pytest.approx(np.diff(up_to) / times.total())
        assert len(found) == 10

    every = np.array([listed[path] for path in plain.different_paths])
    difference = np.abs(every[:, None] - every).mean()
    assert values["coverage"] == np.mean(every > 0) < 1
    assert values["gini_index"] == pytest.approx(difference / (2 * every.mean()))


def test_relaxed_match(evaluate, lists_of_codes, plain):
    results, lists = lists_of_codes
    values = results["alpha"]["0.0"]
    targets = [plain.paths[target] for target in plain.dataset.splits["test"].targets]
    longest = max(map(len, plain.paths))
    assert set(values["relaxed_match"]) == {str(k) for k in range(1, longest - 1)}

    for k, relaxed in values["relaxed_match"].items():
        # Paths end in EOS, which is no code.
        codes = [
            [path[:-1][: int(k)] for path in (target, *mine)]
            for target, mine in zip(targets, lists, strict=True)
        ]
        hits = np.mean([target in mine for target, *mine in codes])
        first = np.mean([target == first for target, first, *_ in codes])
        assert relaxed["hr@3"] == pytest.approx(hits)
        assert relaxed["hr@1"] == pytest.approx(first)

    # Titles have none. All other metrics are the same.
    _, text = evaluate("--num_beams", 3, output="text")
    del values["relaxed_match"]
    assert read_metrics(text)["alpha"]["0.0"] == values


def test_an_exact_evaluation_shows_what_the_beam_misses(evaluate, capsys):
    _, beam = evaluate("--num_beams", 2, "--search", "beam", output="beam")
    _, exact = evaluate("--num_beams", 2, "--search", "exact", output="exact")
    assert "; proven for 100.00% of rows" in capsys.readouterr().out
    of_beam, of_exact = read_metrics(beam), read_metrics(exact)
    values = of_exact["alpha"]["0.0"]
    assert values["proof_share"] == 1
    assert "beam" not in of_beam["alpha"]["0.0"]
    assert values["beam"]["token_match"] == of_beam["alpha"]["0.0"]["token_match"]

    missed = [
        [leaf not in by_beam for leaf in truth]
        for by_beam, truth in zip(leaves(beam), leaves(exact), strict=True)
    ]
    assert sum(map(sum, missed)) > 0
    expected = {
        "1": np.mean([row[0] for row in missed]),
        "2": np.mean([sum(row) for row in missed]),
    }
    assert values["beam"]["missed_of_true_top"] == pytest.approx(expected)

    counts, beam_counts = of_exact["search_per_row"], of_beam["search_per_row"]
    assert counts["positions"] > beam_counts["positions"] > 0
    assert counts["beam_positions"] == beam_counts["beam_positions"]
    assert set(counts) >= {"passes", "positions", "token_steps", "beam_positions"}


def test_too_small_a_budget_leaves_lists_unproven(evaluate):
    _, output = evaluate("--num_beams", 4, "--search", "exact", "--row_positions", 4)
    values, lists = read_metrics(output)["alpha"]["0.0"], predictions(output)
    proven = np.mean([all(line["certified"] for line in mine) for mine in lists])
    assert values["proof_share"] == proven < 1
    assert all(len(mine) == 4 for mine in lists)


@pytest.fixture
def trained_masked(run, tmp_path):
    """The same model, described as trained with a softmax over the trie's next tokens and τ = 2."""
    model = tmp_path / "masked" / "model"
    shutil.copytree(run / "model", model)
    tiny_run.set_likelihood(model, {"softmax": "masked", "temperature": 2.0})
    return model


def test_auto_is_the_softmax_that_the_model_was_trained_with(evaluate, plain, trained_masked):
    search = ("--num_beams", 5, "--alpha", 0, 0.3, "--search", "exact")
    _, auto = evaluate(*search, "--model", trained_masked, output="auto")
    _, given = evaluate(*search, "--softmax", "masked", "--temperature", 2, output="given")

    # The same computation on the same machine: equal bytes.
    assert (auto / "metrics.json").read_bytes() == (given / "metrics.json").read_bytes()
    for name in ("predictions-alpha0.0.parquet", "predictions-alpha0.3.parquet"):
        assert (auto / name).read_bytes() == (given / name).read_bytes()
    assert read_metrics(auto)["softmax"] == "masked"
    assert read_metrics(auto)["temperature"] == 2.0

    for row, mine in enumerate(predictions(auto)):
        prompt = plain.prompt(plain.dataset.splits["test"].history(row))
        assert_same_lists(scored_paths(plain, mine), plain.masked_ranking(prompt, 2.0)[:5])


def test_a_masked_softmax_gives_probabilities(evaluate, plain, trained_masked, capsys):
    _, output = evaluate("--num_beams", 5, "--model", trained_masked, output="probabilities")
    results = read_metrics(output)
    assert results["search"] == "exact" and results["scores"] == "log-probability"
    assert "token_steps" not in results["search_per_row"]
    values = results["alpha"]["0.0"]
    assert values["proof_share"] == 1 and "beam" not in values
    said = capsys.readouterr().out
    assert "search: exact; a list's scores: log-probability of the item" in said
    assert "calibration error" in said and "renormalised" not in said
    evaluate("--num_beams", 2, "--num_rows", 1, "--softmax", "masked", output="renormalised")
    assert "its probabilities are renormalised" in capsys.readouterr().out

    # What would have no effect is refused.
    for flags, message in (
        (("--coverage", 0.5), "--coverage has no effect"),
        (("--coverage", 0.5, "--softmax", "masked", "--alpha", 0.2), "--coverage has no effect"),
        (("--renormalise",), "--renormalise has no effect"),
        (("--renormalise", "--softmax", "masked"), "--renormalise has no effect"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(*flags, output="refused")

    # Coverage and calibration, from the lists.
    lists = predictions(output)
    probability = np.exp([line["score"] for mine in lists for line in mine])
    assert values["mean_coverage"] == pytest.approx(probability.sum() / NUM_TEST)
    bins = values["calibration"]["bins"]
    assert sum(one["items"] for one in bins) == len(probability) and len(bins) == 10
    hits = sum(one["items"] * one["hit_rate"] for one in bins) / NUM_TEST
    assert hits == pytest.approx(values["token_match"]["hr@5"])

    # The targets' likelihood, from scoring every item of the catalogue.
    split, nll, tokens = plain.dataset.splits["test"], 0.0, 0
    for row in range(NUM_TEST):
        path = plain.paths[split.targets[row]]
        scores = dict(map(reversed, plain.masked_ranking(plain.prompt(split.history(row)), 2.0)))
        nll, tokens = nll - scores[path], tokens + len(path)
    assert results["target_nll"] == pytest.approx(nll / NUM_TEST, rel=1e-5)
    perplexity = np.exp(nll / tokens)
    assert results["target_perplexity_per_token"] == pytest.approx(perplexity, rel=1e-5)


def test_models_without_a_likelihood_have_the_full_softmax(evaluate, run):
    description = json.loads((run / "model" / "igd_ds.json").read_text())
    assert "likelihood" not in description  # as models saved before it was recorded

    _, auto = evaluate("--num_beams", 5, output="auto")
    _, given = evaluate("--num_beams", 5, "--softmax", "full", "--temperature", 1, output="given")
    assert (auto / "metrics.json").read_bytes() == (given / "metrics.json").read_bytes()
    assert predictions(auto) == predictions(given)
    assert read_metrics(auto)["softmax"] == "full"
    assert read_metrics(auto)["temperature"] == 1.0


def test_options_override_what_the_model_was_trained_with(evaluate, trained_masked):
    full = ("--softmax", "full", "--temperature", 1, "--num_beams", 5)
    _, other = evaluate(*full, "--model", trained_masked, output="other")
    _, plain_model = evaluate("--num_beams", 5, output="plain")
    assert predictions(other) == predictions(plain_model)

    # One of the two alone leaves the other as trained.
    one = ("--temperature", 1, "--search", "beam")
    _, cold = evaluate(*one, "--model", trained_masked, output="cold")
    assert read_metrics(cold)["softmax"] == "masked"
    assert read_metrics(cold)["temperature"] == 1.0
    assert predictions(cold) != predictions(plain_model)


def write_lists(path, row_ids, **lists):
    """Write a file for --item_filter."""
    columns = {name: pa.array(values, pa.list_(pa.int32())) for name, values in lists.items()}
    pq.write_table(pa.table({"row_id": pa.array(row_ids, pa.int32()), **columns}), path)
    return path


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_item_filters(evaluate, tmp_path, capsys, search):
    """Row 0 may get three items, row 2 all but four, row 5 one of two items that share a leaf."""
    allow = [None, [3], [4, 7, 9, 0]]
    deny = [[0, 1, 2, 9], None, [0]]
    path = write_lists(tmp_path / "lists", [2, 5, 0], allow=allow, deny=deny)
    _, output = evaluate("--num_beams", 6, "--item_filter", path, "--search", search)
    assert "warning: 2 lists are shorter than --num_beams" in capsys.readouterr().out
    found, listed = read_metrics(output), [sorted(mine) for mine in items(output)]
    assert listed[0] == [4, 7, 9]
    assert listed[2] == [3, 4, 5, 6, 7, 8]
    assert listed[5] == [3]
    assert found["short_lists"] == 2

    _, free = evaluate("--num_beams", 6, "--search", search, output="free")
    for row in set(range(NUM_TEST)) - {0, 5}:
        assert len(leaves(output)[row]) == 6
    for row in set(range(NUM_TEST)) - {0, 2, 5}:
        assert leaves(output)[row] == leaves(free)[row]
    assert found["item_filter"] != read_metrics(free)["item_filter"] is None


def test_seen_items_are_left_out_as_by_a_filter(evaluate, plain, tmp_path, capsys):
    """And what the lists without the option hold of them is what is reported."""
    split = plain.dataset.splits["test"]
    histories = [split.history(row).tolist() for row in range(NUM_TEST)]
    repeats = [split.targets[row] in histories[row] for row in range(NUM_TEST)]
    pq.write_table(
        pa.table({"row_id": range(NUM_TEST), "deny": histories}), tmp_path / "filter.parquet"
    )

    flags = ("--num_beams", 3, "--alpha", 0, 0.3)
    _, kept = evaluate(*flags, output="kept")
    assert "seen items are kept in the lists (--exclude_seen auto; 8.3%" in capsys.readouterr().out
    _, filtered = evaluate(*flags, "--item_filter", tmp_path / "filter.parquet", output="filtered")
    _, excluded = evaluate(*flags, "--exclude_seen", "yes", output="excluded")
    assert f"{sum(repeats)} of {NUM_TEST} targets are seen items" in capsys.readouterr().out

    before, after = read_metrics(kept), read_metrics(excluded)
    assert (before["exclude_seen"], after["exclude_seen"]) == ("no", "yes")
    for alpha in (0.0, 0.3):
        assert predictions(excluded, alpha) == predictions(filtered, alpha)
        by_row = zip(predictions(kept, alpha), histories, strict=True)
        shares = [
            [np.mean([item in seen for item in line["item_ids"]]) for line in mine]
            for mine, seen in by_row
        ]
        found = before["alpha"][str(alpha)]["repeat_rate"]
        assert found["first"] == pytest.approx(np.mean([mine[0] for mine in shares]))
        assert found["first"] > 0
        assert found["top10"] == pytest.approx(np.mean(sum(shares, [])))
        assert after["alpha"][str(alpha)]["repeat_rate"] == {"first": 0, "top10": 0}
        credit = [
            sum((t in line["item_ids"]) / len(line["item_ids"]) for line in mine)
            for mine, t in zip(predictions(excluded, alpha), split.targets, strict=True)
        ]
        assert after["alpha"][str(alpha)]["item_match"]["hr@3"] == pytest.approx(np.mean(credit))
    for found in (before, after):
        assert found["seen_targets"] == sum(repeats) > 0
        assert found["target_repeat_rate"] == pytest.approx(np.mean(repeats))

    # Evaluations of earlier versions kept seen items and did not say so.
    request = json.loads((kept / "request.json").read_text())
    del request["exclude_seen"]
    (kept / "request.json").write_text(json.dumps(request))
    assert evaluate(*flags, output="kept")[0] == 0
    with pytest.raises(UsageError, match="these differ: exclude_seen"):
        evaluate(*flags, "--exclude_seen", "yes", output="kept")


def test_item_match_draws_from_the_items_a_row_may_get(evaluate, plain, tmp_path):
    targets = plain.dataset.splits["test"].targets
    assert 3 in targets  # it shares its leaf with item 2
    for denied in (2, 3):
        path = write_lists(tmp_path / "lists", range(NUM_TEST), deny=[[denied]] * NUM_TEST)
        _, output = evaluate("--num_beams", 9, "--item_filter", path, output=f"without-{denied}")
        values = read_metrics(output)["alpha"]["0.0"]
        listed = [
            {item for line in mine[:5] for item in line["item_ids"]} for mine in predictions(output)
        ]
        assert not any(denied in mine for mine in listed)

        pairs = list(zip(targets, listed, strict=True))
        hits = sum(target in mine for target, mine in pairs)
        titles = sum(target == denied and 5 - denied in mine for target, mine in pairs)
        assert values["item_match"]["hr@5"] == pytest.approx(hits / NUM_TEST)
        assert values["token_match"]["hr@5"] == pytest.approx((hits + titles) / NUM_TEST)


def test_guidance_moves_lists(evaluate, tmp_path):
    q = np.full((NUM_TEST, 10), 0.01)
    q[np.arange(NUM_TEST), np.arange(NUM_TEST) % 10] = 1
    np.save(tmp_path / "q.npy", q)
    flags = ("--num_beams", 3, "--guidance", tmp_path / "q.npy", "--guidance_weight")
    _, output = evaluate(*flags, 50)
    assert all(row % 10 in mine[0]["item_ids"] for row, mine in enumerate(predictions(output)))

    # The guide forbids all items but two.
    q[:, :] = 0
    q[:, 4:6] = 1
    np.save(tmp_path / "q.npy", q)
    _, output = evaluate(*flags, 0.1, output="few")
    assert all(set(mine) == {4, 5} for mine in items(output))
    assert read_metrics(output)["short_lists"] == NUM_TEST

    path = write_lists(tmp_path / "lists", [7], allow=[[1, 2]])
    message = "row 7 of test: item filter and guidance together leave nothing"
    with pytest.raises(UsageError, match=message):
        evaluate(*flags, 1, "--item_filter", path, output="nothing")


def test_files_are_part_of_the_request(evaluate, tmp_path):
    path = write_lists(tmp_path / "lists", [1], deny=[[0]])
    evaluate("--item_filter", path, "--num_beams", 2)
    moved = write_lists(tmp_path / "same", [1], deny=[[0]])
    assert evaluate("--item_filter", moved, "--num_beams", 2)[0] == 0

    write_lists(path, [1], deny=[[1]])
    with pytest.raises(UsageError, match="these differ: item_filter"):
        evaluate("--item_filter", path, "--num_beams", 2)


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(evaluate, monkeypatch, search):
    flags = ("--alpha", 0, 0.2, "--num_beams", 4, "--search", search)
    _, whole = evaluate(*flags, output="whole")
    searched, calls = Recommender.search, []

    def killed_in_the_second_call(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return searched(*arguments, **options)

    monkeypatch.setattr(Recommender, "search", killed_in_the_second_call)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*flags)
    _, resumed = evaluate(*flags)
    assert len(calls) == 2 + 3  # the other three of four batches

    predicted = [f"predictions-alpha{alpha}.parquet" for alpha in (0.0, 0.2)]
    names = ["metrics.json", "request.json", *predicted]
    for name in names:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    others = ["timing.json", "metrics.jsonl", "tensorboard", "lock.json"]  # this process lives on
    assert {path.name for path in resumed.iterdir()} == {*names, *others}
    assert json.loads((resumed / "timing.json").read_text())["rows_already_there"] == 3


def test_a_finished_evaluation_is_not_repeated(evaluate, monkeypatch, capsys):
    evaluate()
    monkeypatch.setattr(Recommender, "load_weights", lambda self: pytest.fail("weights are loaded"))
    assert evaluate()[0] == 0
    assert "finished" in capsys.readouterr().out


def test_another_evaluation_in_the_same_folder_is_refused(evaluate):
    evaluate()
    with pytest.raises(UsageError, match="these differ: alpha, num_beams"):
        evaluate("--alpha", 0.1, "--num_beams", 3)


def test_alpha_from_takes_the_best_alpha_of_another_split(evaluate, tmp_path, monkeypatch):
    # An evaluation of another split. This catalogue has too few items for lists of 10.
    valid = tmp_path / "valid"
    _, source = evaluate("--alpha", 0, 0.3, 0.6, "--num_beams", 2, output="source")
    shutil.copytree(source, valid)
    results = read_metrics(valid) | {"split": "valid"}
    for alpha, value in (("0.0", 0.1), ("0.3", 0.4), ("0.6", 0.2)):
        results["alpha"][alpha]["item_match"]["ndcg@10"] = value
    (valid / "metrics.json").write_text(json.dumps(results))

    _, output = evaluate("--alpha_from", valid, "--num_beams", 2, output="chosen")
    assert set(read_metrics(output)["alpha"]) == {"0.0", "0.3"}
    assert read_metrics(output)["search"] == "beam"
    (valid / "metrics.json").write_text(json.dumps(results | {"search": "exact"}))
    _, output = evaluate("--alpha_from", valid, "--num_beams", 2, output="as chosen")
    assert read_metrics(output)["search"] == "exact"
    with pytest.raises(UsageError, match="evaluated test itself"):
        evaluate("--alpha_from", source, output="same-split")
    with pytest.raises(UsageError, match="no finished evaluation"):
        evaluate("--alpha_from", tmp_path / "none", output="none-there")
    for damaged in ("", "{}", "[1]", '{"split": "valid", "alpha": {}}', '{"alpha": {"0.0": 1}}'):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "metrics.json").write_text(damaged)
        with pytest.raises(UsageError, match="broken/metrics.json .*or give --alpha") as caught:
            evaluate("--alpha_from", tmp_path / "broken", output="none-there")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="give --alpha or --alpha_from, not both"):
        evaluate("--alpha_from", valid, "--alpha", 0.1, output="both")


def test_a_beam_wider_than_the_catalogue_lists_every_leaf(evaluate, capsys):
    with pytest.warns(UserWarning, match="at 10, 20 are omitted"):
        _, output = evaluate("--num_beams", 12)
    assert "9 different items" in capsys.readouterr().out
    assert read_metrics(output)["alpha"]["0.0"]["token_match"].keys() >= {"hr@5"}
    assert [len(mine) for mine in leaves(output)] == [9] * NUM_TEST
    assert sorted(items(output)[0]) == list(range(10))


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
        (["--temperature", 0], "--temperature must be positive"),
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
def test_bad_input_is_refused_before_the_weights_are_loaded(evaluate, no_weights, flags, message):
    with pytest.raises(UsageError, match=message):
        evaluate(*flags)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"row_id": [0], "deny": [list(range(10))]},
            r"\(row 0 of test\): nothing is left",
        ),
        (
            {"row_id": [0, 3], "allow": [[1], [10]]},
            "lists: row 3, column allow: '10' is no source id of this dataset",
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
def test_bad_item_filters_are_refused_before_the_weights_are_loaded(
    evaluate, no_weights, tmp_path, table, message
):
    pq.write_table(pa.table(table), tmp_path / "lists")
    with pytest.raises(UsageError, match=message):
        evaluate("--item_filter", tmp_path / "lists")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.ones((NUM_TEST, 9)),
            r"floats of shape \(11, 10\): rows, items; found float64 of shape \(11, 9\)",
        ),
        (np.ones((NUM_TEST, 10), int), "found int64"),
        # An array of objects is pickled.
        (np.full((NUM_TEST, 10), None), "is not a .npy file of floats"),
    ],
)
def test_bad_guidance_is_refused_before_the_weights_are_loaded(
    evaluate, no_weights, tmp_path, array, message
):
    np.save(tmp_path / "q.npy", array)
    with pytest.raises(UsageError, match=message):
        evaluate("--guidance", tmp_path / "q.npy", "--guidance_weight", 1)


def test_a_foreign_folder_is_never_written_to(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("…")
    with pytest.raises(UsageError, match="not empty and holds no evaluation"):
        evaluate()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
