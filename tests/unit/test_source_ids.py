"""Whose ids are these? Source ids and dense item ids, wherever ids or orders come from outside."""

import importlib.util
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from raw_source import reading
from small_catalogue import context_of
from test_sources_d3_csv import TITLES as THEIR_TITLES
from test_sources_d3_csv import minionerec_text, write
from tiny_run import NUM_TEST

from igd_ds import baseline, distributed, eval
from igd_ds.commands import embed as embed_command
from igd_ds.commands import prepare as prepare_command
from igd_ds.data.id_files import read_ids
from igd_ds.errors import UsageError
from igd_ds.evaluation.recommender import Recommender
from igd_ds.items.embeddings import load_embeddings
from igd_ds.items.ids import ItemIds
from igd_ds.objectives import OBJECTIVES

SOURCE_IDS = ["2850", "17", "B3", "0", "5", "4", "9", "007", "x y", "3"]
"""Of the toy run's items. "0" and "9" are dense ids too, of other items."""
ORDER = [7, 0, 9, 4, 2, 8, 1, 6, 3, 5]
"""Another order of the items."""


@pytest.fixture(scope="module")
def ids():
    return ItemIds(pa.array(SOURCE_IDS))


# ---- one list of ids ----


@pytest.mark.parametrize(
    "listed",
    [
        ["2850", "17", "5"],
        [2850, 17, 5],
        ("2850", 17, np.int32(5)),
        np.array([2850, 17, 5], np.uint16),
        np.array(["2850", "17", "5"]),
        np.array(["2850", 17, 5], object),
        iter([2850, np.str_("17"), "5"]),
        pd.Series([2850, 17, 5]),
        torch.tensor([2850, 17, 5]),
    ],
    ids=lambda listed: type(listed).__name__,
)
def test_texts_and_whole_numbers_name_the_same_items(ids, listed):
    found = ids.item_ids(listed, "list")
    assert found.tolist() == [0, 1, 4]
    assert found.dtype == np.int64


def test_dense_ids_are_asked_for_by_name(ids):
    for listed in ([3, 0, 9], ["3", "0", "9"], np.array([3, 0, 9], np.int8)):
        assert ids.item_ids(listed, "list", "dense").tolist() == [3, 0, 9]
    assert ids.item_ids([3, 0, 9], "list").tolist() == [9, 3, 6]
    assert ids.item_ids([], "list").tolist() == []


@pytest.mark.parametrize(
    ("listed", "space", "message"),
    [
        ([17, 8], "source", r"list: '8' is no source id of this dataset; it is a dense item id"),
        ([7], "source", r"'7' is no source id .* choose ids='dense' if that is meant"),  # not "007"
        (["B4"], "source", "no source id .*, and no dense item id either; .* like '2850', '17'"),
        ([10], "source", "'10' is no source id .*, and no dense item id either"),
        (["B3 "], "source", "'B3 ' is no source id"),
        (["2850"], "dense", r"'2850' is no dense item id \(0 to 9\); it is a source id: choose"),
        (np.array([2850]), "dense", "'2850' is no dense item id .* choose ids='source' if"),
        (["007"], "dense", "'007' is no dense item id .* it is a source id"),
        ([-1], "dense", "'-1' is no dense item id .*, and no source id either"),
        (["9" * 5000], "dense", "and no source id either"),
        ([5.0], "source", "list: need a flat list of item ids, texts or whole numbers; found 5.0"),
        ([True], "source", "found True"),
        ([None], "source", "found None"),
        ([[5]], "source", r"found \[5\]"),
        ("5", "source", "found '5'"),  # a text is no list of characters
        (5, "source", "found 5"),
        (np.array(5), "source", "need a flat list"),
        (np.array([[5]]), "source", "need a flat list"),
        (np.array([5.0]), "source", "found 5.0"),
    ],
)
def test_unknown_ids_say_which_language_has_them(ids, listed, space, message):
    with pytest.raises(UsageError, match=message):
        ids.item_ids(listed, "list", space)


def test_kept_numbers_are_both_languages():
    ids = ItemIds.numbered(10)
    assert ids.in_dense_order
    assert ids.item_ids(np.array([9, 0]), "list").tolist() == [9, 0]
    assert ids.item_ids(["9", 0], "list").tolist() == [9, 0]
    for listed in (np.array([3, 10]), ["3", "10"]):
        with pytest.raises(UsageError, match="'10' is no source id .*, and no dense item id"):
            ids.item_ids(listed, "list")

    # A dataset that lost its item 1, and one in another order.
    assert not ItemIds(pa.array(["0", "2"])).in_dense_order
    assert not ItemIds(pa.array(["1", "0"])).in_dense_order


def test_source_ids_that_name_two_items_are_refused():
    twice = ItemIds(pa.array(["a", "b", "a"]))
    with pytest.raises(UsageError, match="items 0 and 2 have the same source_id 'a'"):
        twice.item_ids(["b"], "list")
    assert twice.item_ids([2], "list", "dense").tolist() == [2]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3, 17, 2850]),
        pa.array(["3", "17", "2850"]),
        pa.array(["3", "17", "2850"]).dictionary_encode(),
    ],
)
def test_files_of_ids(tmp_path, column):
    pq.write_table(pa.table({"source_id": column, "x": [0, 0, 0]}), tmp_path / "ids.parquet")
    np.save(tmp_path / "ids.npy", [3, 17, 2850])
    assert read_ids(tmp_path / "ids.parquet", "--item_ids") == ["3", "17", "2850"]
    assert read_ids(tmp_path / "ids.npy", "--item_ids") == ["3", "17", "2850"]


@pytest.mark.parametrize("column", [[3.0, 17.0], ["3", None], [3, None]])
def test_files_of_ids_that_are_no_ids(tmp_path, column):
    pq.write_table(pa.table({"source_id": column}), tmp_path / "ids.parquet")
    with pytest.raises(UsageError, match=r"--item_ids .*ids.parquet: ids are texts or whole"):
        read_ids(tmp_path / "ids.parquet", "--item_ids")


# ---- Recommender ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a dataset whose source has other ids; its model ignores them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny_run.make(tmp_path_factory.mktemp("trained"), source_ids=SOURCE_IDS)


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.load(run, device="cpu")


def test_histories_and_results_speak_source_ids(recommender):
    dense = recommender.recommend([[0, 2, 9], [3, 3]], k=9, ids="dense")
    assert recommender.recommend([["2850", "B3", "3"], ["0", "0"]], k=9) == dense
    assert recommender.recommend([[2850, "B3", np.int64(3)], np.array([0, 0])], k=9) == dense
    assert recommender.recommend([["2850"]], k=np.int64(2)) == recommender.recommend(
        [[0]], k=2, ids="dense"
    )

    for ranked in dense:
        assert len(ranked) == 9
        for entry in ranked:
            assert entry.source_ids == tuple(SOURCE_IDS[item] for item in entry.item_ids)
    assert {entry.source_ids for entry in dense[0]} >= {("B3", "0")}  # they share a leaf


def test_lists_of_allowed_and_denied_items_speak_source_ids(recommender):
    listed = recommender.recommend([["17"], [17]], k=9, allow=[["007", 0, 2850], None])
    assert {name for entry in listed[0] for name in entry.source_ids} == {"007", "0", "2850"}
    assert len(listed[1]) == 9

    listed = recommender.recommend([["17"]], k=9, deny=[{"B3", "x y", "9"}])
    rest = {*SOURCE_IDS} - {"B3", "x y", "9"}
    assert {name for entry in listed[0] for name in entry.source_ids} == rest


def test_guidance_names_its_columns(recommender):
    q = np.random.default_rng(0).random((2, 10))
    users = {"histories": [["17"], ["4"]], "k": 5}
    dense = {"histories": [[1], [5]], "k": 5, "ids": "dense"}
    expected = recommender.recommend(**dense, guidance=(q, 3.0))
    names = [SOURCE_IDS[item] for item in ORDER]

    of_names = recommender.recommend(**users, guidance=(q[:, ORDER], 3.0), guidance_ids=names)
    frame = pd.DataFrame(q[:, ORDER], columns=names)
    assert of_names == recommender.recommend(**users, guidance=(frame, 3.0)) == expected
    of_numbers = recommender.recommend(**dense, guidance=(q[:, ORDER], 3.0), guidance_ids=ORDER)
    assert of_numbers == expected

    # Scores of items that the dataset has not kept do not matter.
    more = {"guidance": (np.hstack([q, q]), 3.0)}
    more["guidance_ids"] = [*SOURCE_IDS, *(f"gone {column}" for column in range(10))]
    assert recommender.recommend(**users, **more) == expected
    assert recommender.recommend(**users, guidance=(q[:, ORDER], 3.0), guidance_ids=SOURCE_IDS) != (
        expected
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"guidance": (np.ones((1, 10)), 1.0)},
            "guidance: nothing says whose order its columns are in, and item 0 of this dataset is "
            "the source's '2850'; give guidance_ids=",
        ),
        (
            {"guidance": (np.ones((1, 10)), 1.0), "guidance_ids": range(10)},
            r"guidance_ids: no column for item 0 \(source id '2850'; 5 of 10 items lack one\)",
        ),
        (
            {"guidance": (np.ones((1, 9)), 1.0), "guidance_ids": SOURCE_IDS},
            "guidance_ids: 10 ids for 9 columns",
        ),
        (
            {"guidance": (pd.DataFrame(np.ones((1, 10))), 1.0)},
            "guidance: nothing says whose order its columns are in",
        ),
        ({"guidance_ids": SOURCE_IDS}, "guidance_ids has no effect without guidance"),
        ({"ids": "ours"}, "ids is one of source, dense, found 'ours'"),
        (
            {"histories": [[8]]},
            r"histories\[0\]: '8' is no source id of this dataset; it is a dense item id: choose "
            "ids='dense'",
        ),
        ({"allow": [[0, 1]]}, r"allow\[0\]: '1' is no source id of this dataset; it is a dense"),
        ({"deny": [["B5"]]}, r"deny\[0\]: 'B5' is no source id .*, and no dense item id either"),
        (
            {"histories": [[1]], "deny": [["B3"]], "ids": "dense"},
            r"deny\[0\]: 'B3' is no dense item id \(0 to 9\); it is a source id: choose ids='sour",
        ),
        ({"histories": ["17"]}, r"histories\[0\]: need a flat list of item ids"),
        ({"k": True}, "k must be a whole number"),
    ],
)
def test_mistaken_ids_are_refused(recommender, arguments, message):
    with pytest.raises(UsageError, match=message):
        recommender.recommend(**({"histories": [["17"]]} | arguments))


# ---- igd eval ----


@pytest.fixture
def entry(run, tmp_path, monkeypatch):
    """Run an entry point with flags; return the folder of what it wrote."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distributed, "init", lambda *_: None)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(baseline.signal, "signal", lambda *_: None)

    def command(program, name, *flags):
        words = ["--dataset", run.parent / "data", "--output_dir", tmp_path / name, *flags]
        monkeypatch.setattr("sys.argv", [program.__name__, *map(str, words)])
        assert program.main() == 0
        return tmp_path / name

    return command


@pytest.fixture
def evaluate(entry, run):
    """Evaluate with flags; return the lines of the predictions, and check their source ids."""

    def evaluation(name, *flags):
        output = entry(eval, name, "--model", run / "model", "--num_beams", 5, *flags)
        lines = pq.read_table(output / "predictions-alpha0.0.parquet").to_pylist()
        for line in lines:
            assert line["source_ids"] == [SOURCE_IDS[item] for item in line["item_ids"]]
        return lines

    return evaluation


def test_item_filters_speak_source_ids(evaluate, tmp_path):
    def lists(name, allow, deny):
        columns = {"row_id": [0, 1, 2], "allow": allow, "deny": deny}
        pq.write_table(pa.table(columns), tmp_path / name)
        return ("--item_filter", tmp_path / name)

    texts = lists("texts", [["2850", "9"], None, None], [None, ["17", "0", "4"], []])
    numbers = lists("numbers", [[2850, 9], None, None], [None, [17, 0, 4], []])
    dense = lists("dense", [[0, 6], None, None], [None, [1, 3, 5], []])
    found = evaluate("a", *texts)
    assert found == evaluate("b", *numbers) == evaluate("c", *dense, "--ids", "dense")
    allowed = {name for line in found if line["row_id"] == 0 for name in line["source_ids"]}
    assert allowed == {"2850", "9"}
    denied = {name for line in found if line["row_id"] == 1 for name in line["source_ids"]}
    assert not denied & {"17", "0", "4"}

    # The same file in the other language is another request, or names no items.
    request = json.loads((tmp_path / "c" / "request.json").read_text())
    assert request["ids"] == "dense"
    with pytest.raises(UsageError, match="dense: row 0, column allow: '6' .* choose --ids dense"):
        evaluate("d", *dense)
    with pytest.raises(UsageError, match="row 0, column allow: '2850' is no dense item id"):
        evaluate("e", *texts, "--ids", "dense")
    with pytest.raises(UsageError, match="--ids has no effect without --item_filter"):
        evaluate("f", "--ids", "dense")
    with pytest.raises(UsageError, match="row 0, column allow: need a flat list .* found None"):
        evaluate("g", *lists("nulls", [["17", None], None, None], [["0"], None, None]))


def test_guidance_of_eval_names_its_columns(evaluate, run, tmp_path):
    q = np.random.default_rng(0).random((NUM_TEST, 10))
    np.save(tmp_path / "dense.npy", q)
    np.save(tmp_path / "own.npy", np.hstack([q[:, ORDER], q]))
    names = [SOURCE_IDS[item] for item in ORDER]
    np.save(tmp_path / "ids.npy", [*names, *(f"gone {column}" for column in range(10))])

    def guided(scores, *ids):
        return ("--guidance", tmp_path / scores, "--guidance_weight", 5, *ids)

    own = evaluate("own", *guided("own.npy", "--guidance_ids", tmp_path / "ids.npy"))
    items = run.parent / "data" / "items.parquet"
    dense = evaluate("dense", *guided("dense.npy", "--guidance_ids", items))
    assert own == dense != evaluate("free")

    message = "dense.npy: nothing says whose order its columns are in, and item 0 of this dataset"
    with pytest.raises(UsageError, match=message):
        evaluate("bare", *guided("dense.npy"))
    with pytest.raises(UsageError, match="ids.npy: 20 ids for 10 columns"):
        evaluate("few", *guided("dense.npy", "--guidance_ids", tmp_path / "ids.npy"))
    with pytest.raises(UsageError, match="--guidance_ids has no effect without --guidance"):
        evaluate("none", "--guidance_ids", items)


def test_scores_of_a_baseline_say_what_they_are_of(entry, evaluate, run, tmp_path):
    flags = ("--recommender", "last-item-knn", "--save_scores", "--splits", "test")
    folder = entry(baseline, "knn", *flags, "--validation_rows", 5, "--seed", 3) / "eval" / "test"
    guided = ("--guidance", folder / "scores.npy", "--guidance_weight", 5)
    items = run.parent / "data" / "items.parquet"
    found = evaluate("knn-guided", *guided)
    assert found == evaluate("knn-named", *guided, "--guidance_ids", items)

    # Both splits have as many rows.
    record = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps(record | {"split": "valid"}))
    with pytest.raises(UsageError, match="holds scores of the split valid, not of test"):
        evaluate("a", *guided)
    (folder / "scores.json").write_text(json.dumps(record | {"items": "others"}))
    with pytest.raises(UsageError, match=r"for another dataset \(these differ: items\)"):
        evaluate("b", *guided)
    (folder / "scores.json").write_text("{")
    with pytest.raises(UsageError, match="scores.json is damaged"):
        evaluate("c", *guided)

    # Without a record, or with a file of another kind beside it, they are any array.
    (folder / "scores.json").write_text("[]")
    with pytest.raises(UsageError, match="nothing says whose order its columns are in"):
        evaluate("d", *guided)


# ---- embeddings ----


@pytest.fixture(scope="module")
def lcrec(shared, tmp_path_factory):
    """The case embeddings_in_source_order: LC-Rec's files and the dataset of them."""
    path = shared / "faults" / "make_inputs.py"
    spec = importlib.util.spec_from_file_location("make_inputs", path)
    make_inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_inputs)

    folder = tmp_path_factory.mktemp("lcrec")
    make_inputs.embeddings_in_source_order(folder / "raw")
    flags = ["--source", "lcrec-json", "--protocol", "leave-one-out", "--titles", "verbatim"]
    words = [*flags, "--input", folder / "raw", "--output", folder / "data"]
    assert prepare_command.main(list(map(str, words))) == 0
    return folder


def embed(lcrec, output, *flags):
    words = ["--dataset", lcrec / "data", "--output", output, *flags]
    embed_command.embed(embed_command.parse(list(map(str, words))))
    return np.load(output / "embeddings.npy")


def test_a_bare_array_is_refused_where_the_source_has_another_order(lcrec, tmp_path):
    array = ("--embeddings", lcrec / "raw" / "X.emb.npy")
    message = "X.emb.npy: nothing says whose order its rows are in, .* give --item_ids FILE"
    with pytest.raises(UsageError, match=message):
        embed(lcrec, tmp_path / "bare", *array)
    assert not list(tmp_path.iterdir())

    # The rows are in the source's order: that is 0, 1, 2 …
    np.save(tmp_path / "ids.npy", np.arange(64))
    found = embed(lcrec, tmp_path / "e", *array, "--item_ids", tmp_path / "ids.npy")
    theirs = np.load(lcrec / "raw" / "X.emb.npy")
    source_ids = ItemIds.read(lcrec / "data").source_ids
    assert source_ids != [str(item) for item in range(64)]
    np.testing.assert_array_equal(found, theirs[[int(name) for name in source_ids]])

    # The rows are in the dataset's order: its items.parquet says so.
    np.save(tmp_path / "dense.npy", found)
    ours = ("--embeddings", tmp_path / "dense.npy")
    items = lcrec / "data" / "items.parquet"
    np.testing.assert_array_equal(embed(lcrec, tmp_path / "f", *ours, "--item_ids", items), found)


def test_folders_that_an_earlier_version_made_from_a_bare_array_are_refused(lcrec, tmp_path):
    array = ("--embeddings", lcrec / "raw" / "X.emb.npy")
    np.save(tmp_path / "ids.npy", np.arange(64))
    embed(lcrec, tmp_path / "e", *array, "--item_ids", tmp_path / "ids.npy")
    record = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    del record["item_ids"]
    (tmp_path / "e" / "embeddings.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="made from X.emb.npy: nothing says whose order its rows"):
        load_embeddings(tmp_path / "e", pq.read_table(lcrec / "data" / "items.parquet"))


@pytest.mark.parametrize("name", ["front-greater", "multi-target"])
def test_weights_are_those_of_the_sources_rows(lcrec, tmp_path, name):
    """The codes follow the clusters of the embeddings, so the first one narrows down the most."""
    theirs = lcrec / "raw" / "X.emb.npy"
    np.save(tmp_path / "ids.npy", np.arange(64))
    embed(lcrec, tmp_path / "e", "--embeddings", theirs, "--item_ids", tmp_path / "ids.npy")
    items = [int(source_id) for source_id in ItemIds.read(lcrec / "data").source_ids]
    paths = [[1 + item // 8, 9 + item % 8, 0] for item in items]
    context = context_of(paths, np.ones(64, int), dataset=lcrec / "data")

    def weights(embeddings):
        given = {"item_embeddings": str(embeddings)}
        if name == "multi-target":
            given["frequency_beta"] = 0.9
        objective = OBJECTIVES[name](OBJECTIVES[name].Options(**given), 10)
        return objective.weights(context)[:3, 0]

    first, second, eos = weights(tmp_path / "e")
    assert first > 10 * second
    assert eos == 1
    message = "--item_embeddings .*X.emb.npy: nothing says whose order its rows are in, .* give the"
    with pytest.raises(UsageError, match=message):
        weights(theirs)


def test_a_dataset_of_minionerec_numbers_its_items_anew(tmp_path):
    """Their number of an item is its source id; the same number is another item of ours."""
    folder = write(tmp_path / "m", minionerec_text)
    with reading("d3-csv", [folder]) as data:
        ids, titles = ItemIds(data.item_names), list(data.titles)
    assert not ids.in_dense_order
    for number, title in THEIR_TITLES.items():
        assert (titles[ids.item_ids([number], "list")[0]] or "") == title
    with pytest.raises(UsageError, match="'1' is no source id .* it is a dense item id"):
        ids.item_ids([4, 1], "list")
