"""Baselines as models: `igd eval` and Recommender rank with them, filtered, on any split."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from tiny_run import NUM_TEST, TITLES

from igd_ds import baseline, distributed, eval
from igd_ds.baselines.sequential import SEQUENTIAL
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.evaluation.baseline_recommender import BaselineRecommender
from igd_ds.evaluation.recommender import Recommender
from igd_ds.folders import write_json

NUM_ITEMS, NUM_LEAVES = len(TITLES), len(TITLES) - 1
HISTORIES = [[1, 2], [0], [7, 7, 3, 9, 4], [5, 6]]


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(distributed, "init", lambda *_: None)
        patch.setattr(distributed, "device", lambda: torch.device("cpu"))
        patch.setattr(baseline.signal, "signal", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("made")).parent / "data"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of last-item-knn."""
    folder = tmp_path_factory.mktemp("knn") / "run"
    words = ["--dataset", data, "--recommender", "last-item-knn", "--output_dir", folder]
    more = ["--splits", "test", "--validation_rows", 5, "--seed", 3, "--num_beams", 5]
    call(baseline, *words, *more, "--exclude_seen", "no")
    return folder


@pytest.fixture(scope="module", params=["sasrec", "hstu", "gru4rec", "lrurec"])
def trained(request, data, tmp_path_factory):
    """A run folder of a sequential model with random weights."""
    torch.manual_seed(0)
    folder, preset = tmp_path_factory.mktemp("trained"), SEQUENTIAL[request.param]
    form = dict(preset.form) | {"num_items": NUM_ITEMS, "max_history": 4, "hidden_size": 8}
    preset.model(**form).save_pretrained(folder / "model")
    described = {"recommender": request.param, "form": form}
    described["dataset"] = InteractionDataset.load(data).fingerprint
    write_json(folder / "model" / "config.json", described)
    return folder


def call(module, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["entry", *map(str, words)])
        assert module.main() == 0


def evaluate(data, run, output, *flags):
    words = ["--model", run / "model", "--dataset", data, "--output_dir", output, *flags]
    call(eval, *words)
    return json.loads((output / "metrics.json").read_text())


def lists(folder):
    found = [[] for _ in range(NUM_TEST)]
    for line in pq.read_table(folder / "predictions-alpha0.0.parquet").to_pylist():
        found[line["row_id"]].append(line)
    return found


def items(lines):
    return [item for line in lines for item in line["item_ids"]]


def test_an_evaluation_is_that_of_the_baseline_itself(data, run, tmp_path):
    found = evaluate(data, run, tmp_path / "all", "--num_beams", 5, "--batch_size", 3)
    own = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert {key: found[key] for key in own} == own and found["search"] == "full ranking"
    assert lists(tmp_path / "all") == lists(run / "eval" / "test")
    evaluate(data, run, tmp_path / "whole", "--num_beams", NUM_LEAVES)
    targets = InteractionDataset.load(data).splits["test"].targets
    log_p = [
        next(line["score"] for line in mine if target in line["item_ids"])
        for mine, target in zip(lists(tmp_path / "whole"), targets, strict=True)
    ]
    assert found["target_nll"] == pytest.approx(-np.mean(log_p), rel=1e-6)

    sample = evaluate(data, run, tmp_path / "sample", "--num_beams", 5, "--num_rows", 4)
    assert sample["rows"] == 4
    train = evaluate(data, run, tmp_path / "train", "--split", "train")
    assert (train["split"], train["rows"]) == ("train", 12)


def test_filters_and_seen_items(data, run, tmp_path):
    """Each list is the unfiltered one without the items that the row may not get."""
    split = InteractionDataset.load(data).splits["test"]
    evaluate(data, run, tmp_path / "all", "--num_beams", 12)
    whole = lists(tmp_path / "all")
    assert all(len(mine) == NUM_LEAVES for mine in whole)

    allow = [[0, 2, 5], None] * (NUM_TEST // 2) + [[1]]
    deny = [[5], [3, 6]] * (NUM_TEST // 2) + [None]
    table = pa.table({"row_id": range(NUM_TEST), "allow": allow, "deny": deny})
    pq.write_table(table, tmp_path / "filter.parquet")
    filtered = ("--item_filter", tmp_path / "filter.parquet", "--num_beams", 12)
    evaluate(data, run, tmp_path / "filtered", *filtered)
    evaluate(data, run, tmp_path / "unseen", "--exclude_seen", "yes", "--num_beams", 12)

    for row in range(NUM_TEST):
        may = set(range(NUM_ITEMS) if allow[row] is None else allow[row]) - set(deny[row] or ())
        unseen = set(range(NUM_ITEMS)) - set(split.history(row).tolist())
        for name, rest in (("filtered", may), ("unseen", unseen)):
            mine = lists(tmp_path / name)[row]
            expected = [set(line["item_ids"]) & rest for line in whole[row]]
            # A title that loses one of its two items keeps the probability of the other one alone.
            alone = [found for found in expected if found and not found & {2, 3}]
            assert [set(line["item_ids"]) for line in mine if {2, 3}.isdisjoint(line["item_ids"])] \
                == alone  # fmt: skip
            assert set(items(mine)) == rest
            scores = [line["score"] for line in mine]
            assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--alpha", 0.2], "alpha"),
        (["--search", "exact"], "search"),
        (["--length_penalty", 1], "length_penalty"),
        (["--softmax", "masked"], "softmax"),
        (["--guidance", "s.npy", "--guidance_weight", 1], "guidance"),
        (["--pass_positions", 64], "pass_positions"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--max_length", 64], "max_length"),
    ],
)
def test_what_means_nothing_for_a_baseline_is_refused(data, run, tmp_path, flags, name):
    with pytest.raises(UsageError, match=f"--{name} has no effect on last-item-knn: leave it out"):
        evaluate(data, run, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_recommendations_are_the_evaluated_lists(data, run):
    recommender = Recommender.load(run)
    assert isinstance(recommender, BaselineRecommender)
    split = InteractionDataset.load(data).splits["test"]
    histories = [split.history(row) for row in range(NUM_TEST)]
    found = recommender.recommend(histories, k=5)
    for mine, expected in zip(found, lists(run / "eval" / "test"), strict=True):
        assert [list(place.item_ids) for place in mine] == [line["item_ids"] for line in expected]
        assert [place.score for place in mine] == [line["score"] for line in expected]
        assert all(place.certified for place in mine) and not mine.short

    arguments = [{"alpha": 0.2}, {"search": "beam"}, {"length_penalty": 1.0}]
    for argument in arguments:
        (name,) = argument
        with pytest.raises(UsageError, match=f"{name} has no effect on last-item-knn"):
            recommender.recommend([[1]], **argument)
    with pytest.raises(UsageError, match="positions has no effect on last-item-knn"):
        recommender.stream([1], positions=3)
    with pytest.raises(UsageError, match="--dtype has no effect on last-item-knn"):
        Recommender.load(run, dtype="float16")


def test_a_trained_model_ranks_each_history_for_itself(data, trained):
    recommender = Recommender.load(trained, dataset=data)
    together = recommender.recommend(HISTORIES, k=NUM_ITEMS, exclude_seen="no")
    for history, mine in zip(HISTORIES, together, strict=True):
        scores = [place.score for place in mine]
        assert len(mine) == NUM_LEAVES and mine.short and scores == sorted(scores, reverse=True)
        # fp32: a sum of ten probabilities, and sums of products in another order.
        assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)
        (alone,) = recommender.recommend([history], k=NUM_ITEMS, exclude_seen="no")
        assert {p.item_ids: p.score for p in alone} == pytest.approx(
            {p.item_ids: p.score for p in mine}, rel=1e-5
        )
        (cut,) = recommender.recommend([history[-4:]], k=NUM_ITEMS, exclude_seen="no")
        assert cut == alone, "the longest history of the dataset has four items"

        streamed = list(recommender.stream(history, exclude_seen="yes"))
        (left,) = recommender.recommend([history], k=NUM_ITEMS, exclude_seen="yes")
        assert [place.item_ids for place in streamed] == [place.item_ids for place in left]
        assert set(sum((p.item_ids for p in left), ())) == set(range(NUM_ITEMS)) - set(history)
        assert [p.bound for p in streamed] == [p.score for p in streamed[1:]] + [-np.inf]


def test_another_dataset_is_refused(run, tmp_path):
    tiny_run.write_data(tmp_path / "data", ["zz", *TITLES[1:]])
    with pytest.raises(UsageError, match="is not the dataset that .* was trained on"):
        Recommender.load(run, dataset=tmp_path / "data")
