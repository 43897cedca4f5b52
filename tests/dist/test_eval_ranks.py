"""The evaluator over ranks: the same bytes on 1, 2 and 3 ranks, more ranks than batches, after a kill, on a real protocol."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ranks


def entry(flags):
    from igd_ds import eval as evaluator

    return evaluator.main, [str(flag) for flag in flags]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A run trained for a few steps on two ranks."""
    from igd_ds import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    ranks.run(
        2,
        folder.parent / "log",
        ranks.entry,
        train.main,
        world.train_flags(folder, 1, max_steps=20, validate_every=20),
    )
    return folder


def flags(world, run, output, *more):
    return [
        "--model",
        run / "model",
        "--dataset",
        world.dataset,
        "--output_dir",
        output,
        "--batch_size",
        16,
        *more,
    ]


GRID = ("--alpha", 0, 0.3, "--num_beams", 5)


@pytest.fixture(scope="module")
def single(world, run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("single") / "test"
    ranks.run(1, output.parent / "log", ranks.entry, *entry(flags(world, run, output, *GRID)))
    return output


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.isa), 3])
def test_any_number_of_ranks_gives_the_same_bytes(world, run, single, tmp_path, size):
    output = tmp_path / "test"
    text = ranks.run(size, tmp_path / "log", ranks.entry, *entry(flags(world, run, output, *GRID)))
    assert (output / "metrics.json").read_bytes() == (single / "metrics.json").read_bytes()
    for path in single.glob("predictions-*.parquet"):
        assert pq.read_table(output / path.name).equals(pq.read_table(path))
    assert json.loads((output / "timing.json").read_text())["world_size"] == size
    assert "alpha 0.3: hr@1" in text and not (output / "parts").exists()


def test_exact_filtered_and_guided_lists_are_the_same_on_any_number_of_ranks(world, run, tmp_path):
    import numpy as np
    import pyarrow as pa

    num_items = pq.read_metadata(Path(world.dataset) / "items.parquet").num_rows
    num_rows = pq.read_metadata(Path(world.dataset) / "test.parquet").num_rows
    deny = pa.array([[row % num_items] for row in range(num_rows)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"row_id": np.arange(num_rows), "deny": deny}), tmp_path / "lists")
    np.save(
        tmp_path / "q.npy", np.random.default_rng(0).random((num_rows, num_items), dtype=np.float32)
    )
    per_row = (
        "--item_filter",
        tmp_path / "lists",
        "--guidance",
        tmp_path / "q.npy",
        "--guidance_weight",
        0.5,
    )
    results = []
    for size in (1, 2, 3):
        output = tmp_path / f"on-{size}"
        words = flags(
            world,
            run,
            output,
            *GRID,
            "--batch_size",
            4,
            "--search",
            "exact",
            "--row_positions",
            200,
            *per_row,
        )
        ranks.run(size, tmp_path / "log", ranks.entry, *entry(words))
        results.append((output / "metrics.json").read_bytes())
        lists = pq.read_table(output / "predictions-alpha0.3.parquet").to_pydict()
        assert all(
            row % num_items not in items
            for row, items in zip(lists["row_id"], lists["item_ids"], strict=True)
        )
    assert results[0] == results[1] == results[2]
    found = json.loads(results[0])
    assert (
        found["search_per_row"]["positions"] > 200 and 0 <= found["alpha"]["0.3"]["proof_share"] < 1
    )  # a pass may exceed it


@pytest.mark.isa
def test_more_ranks_than_batches(world, run, tmp_path):
    results = []
    for size in (1, 3):
        output = tmp_path / f"on-{size}"
        few = flags(world, run, output, "--num_rows", 20, "--num_beams", 3)
        ranks.run(size, tmp_path / "log", ranks.entry, *entry(few))
        results.append((output / "metrics.json").read_bytes())
    assert results[0] == results[1]


def test_users_own_many_rows(world, single):
    """The d3 protocol: rows, not users, are counted and keyed."""
    table = pq.read_table(single / "predictions-alpha0.0.parquet").to_pydict()
    rows = json.loads((single / "metrics.json").read_text())["rows"]
    assert len(set(table["row_id"])) == rows > len(set(table["user_id"]))


def test_a_killed_evaluation_goes_on_where_it_was(world, run, single, tmp_path):
    output = tmp_path / "test"
    processes = ranks.start(
        2, tmp_path / "log", ranks.entry, *entry(flags(world, run, output, *GRID))
    )
    while not list(output.glob("parts/batch-*.parquet")):
        time.sleep(0.005)
        assert processes[0].is_alive()
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = len(list(output.glob("parts/batch-*.parquet")))
    assert not (output / "metrics.json").exists()
    ranks.run(
        3, tmp_path / "log", ranks.entry, *entry(flags(world, run, output, *GRID))
    )  # on another number of ranks
    assert (output / "metrics.json").read_bytes() == (single / "metrics.json").read_bytes()
    timing = json.loads((output / "timing.json").read_text())
    assert 0 < timing["rows_already_there"] <= 16 * done
    # Finished: says so. Another request in the same folder: refused.
    assert "is finished" in ranks.run(
        2, tmp_path / "log2", ranks.entry, *entry(flags(world, run, output, *GRID))
    )
    other = ranks.start(
        1, tmp_path / "log3", ranks.entry, *entry(flags(world, run, output, "--alpha", 0.1))
    )
    assert (
        ranks.wait(other) == [2]
        and "belongs to another evaluation" in (tmp_path / "log3").read_text()
    )


def test_usr1_stops_an_evaluation_for_requeue(world, run, tmp_path):
    output = tmp_path / "test"
    processes = ranks.start(
        2, tmp_path / "log", ranks.entry, *entry(flags(world, run, output, *GRID))
    )
    while not list(output.glob("parts/batch-*.parquet")):
        time.sleep(0.005)
        assert processes[0].is_alive()
    for process in processes:
        os.kill(process.pid, signal.SIGUSR1)
    assert ranks.wait(processes) == [85, 85]


def test_alpha_from_takes_the_validated_alpha(world, run, single, tmp_path):
    from igd_ds.evaluation.metrics import best_alpha

    valid, short, output = tmp_path / "valid", tmp_path / "short", tmp_path / "test"
    few = ("--split", "valid", "--alpha", 0, 0.3, 0.6)
    ranks.run(1, tmp_path / "log", ranks.entry, *entry(flags(world, run, valid, *few)))
    ranks.run(
        1, tmp_path / "log", ranks.entry, *entry(flags(world, run, short, *few, "--num_beams", 5))
    )
    ranks.run(
        1, tmp_path / "log", ranks.entry, *entry(flags(world, run, output, "--alpha_from", valid))
    )
    found = set(json.loads((output / "metrics.json").read_text())["alpha"])
    values = {
        a: e["token_match"]["ndcg@10"]
        for a, e in json.loads((valid / "metrics.json").read_text())["alpha"].items()
    }
    best = best_alpha(json.loads((valid / "metrics.json").read_text()))
    assert values[best] == max(values.values()) and found == {"0.0", best}
    other = tmp_path / "other"
    shutil.copytree(valid, other)
    request = json.loads((other / "request.json").read_text())
    (other / "request.json").write_text(json.dumps(request | {"model": {}}))
    for folder, message in [
        (short, "cannot choose α by ndcg@10"),
        (single, "evaluated test itself"),
        (other, "evaluated something else; these differ: model"),
        (tmp_path, "no finished evaluation"),
    ]:
        processes = ranks.start(
            1,
            tmp_path / "log2",
            ranks.entry,
            *entry(flags(world, run, tmp_path / "x", "--alpha_from", folder)),
        )
        assert ranks.wait(processes) == [2] and message in (tmp_path / "log2").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alpha", "1.2"), "--alpha must lie in [0, 1]"),
        (("--decoding_rule", "pernode"), "known are per-node"),
        (("--max_length", "4000"), "--max_length 4000 exceeds"),
        (
            ("--num_beams", "100000000"),
            "--pass_positions 512 is less than one position for each of 100000000 beams",
        ),
        (("--pass_positions", "100000000000"), "GiB are free: lower it"),
        (("--search", "exact", "--decoding_rule", "pooled"), "use --search beam"),
    ],
)
def test_bad_requests(world, run, tmp_path, more, message):
    processes = ranks.start(
        1, tmp_path / "log", ranks.entry, *entry(flags(world, run, tmp_path / "out", *more))
    )
    assert ranks.wait(processes) == [2]
    text = (tmp_path / "log").read_text()
    assert message in text and "Traceback" not in text


def test_models_and_datasets_that_do_not_belong_together(world, run, tmp_path):
    for change, message in [
        (["--model", world.pretrained], "no igd_ds.json"),
        (["--dataset", tmp_path / "none"], "is not a dataset"),
    ]:
        words = flags(world, run, tmp_path / "out")
        words[words.index(change[0]) + 1] = change[1]
        processes = ranks.start(1, tmp_path / "log", ranks.entry, *entry(words))
        assert ranks.wait(processes) == [2]
        assert message in (tmp_path / "log").read_text()
