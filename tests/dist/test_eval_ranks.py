"""The evaluator over ranks: equal bytes on 1, 2 and 3 ranks, more ranks than batches, kills.

Metrics and lists are compared byte for byte, which is a promise for ranks of one machine.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ranks

GRID = ("--alpha", 0, 0.3, "--num_beams", 5)


def train(world, run: Path, **settings) -> Path:
    """Train for a few steps on two ranks; return the run folder."""
    from igd_ds import train

    flags = world.train_flags(run, 1, max_steps=20, validate_every=20, **settings)
    ranks.run(2, run.parent / "log", ranks.entry, train.main, flags)
    return run


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    return train(world, tmp_path_factory.mktemp("trained") / "run")


def flags(world, run, output, *more) -> list[str]:
    """Return the words of an evaluation's command line."""
    usual = {
        "--model": run / "model",
        "--dataset": world.dataset,
        "--output_dir": output,
        "--batch_size": 16,
    }
    words = [word for flag in usual.items() for word in flag]
    return [str(word) for word in (*words, *more)]


def start(size: int, log: Path, words) -> list:
    """Start an evaluation on `size` ranks; return their processes."""
    from igd_ds import eval as evaluator

    return ranks.start(size, log, ranks.entry, evaluator.main, list(words))


def evaluate(size: int, log: Path, words) -> str:
    """Evaluate on `size` ranks to the end; return what they printed."""
    from igd_ds import eval as evaluator

    return ranks.run(size, log, ranks.entry, evaluator.main, list(words))


def refusal(log: Path, words) -> str:
    """Return what one rank prints when it refuses bad input."""
    assert ranks.wait(start(1, log, words)) == [2]
    text = log.read_text()
    assert "Traceback" not in text
    return text


def read_metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def metrics_bytes(output: Path) -> bytes:
    return (output / "metrics.json").read_bytes()


def until_the_first_batch(processes, output: Path) -> None:
    """Wait until a batch's lists are written."""
    while not list(output.glob("parts/part-*.parquet")):
        time.sleep(0.005)
        assert processes[0].is_alive()


@pytest.fixture(scope="module")
def single(world, run, tmp_path_factory) -> Path:
    """Evaluate on one rank."""
    output = tmp_path_factory.mktemp("single") / "test"
    evaluate(1, output.parent / "log", flags(world, run, output, *GRID))
    return output


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.isa), 3])
def test_any_number_of_ranks_gives_the_same_bytes(world, run, single, tmp_path, size):
    output = tmp_path / "test"
    text = evaluate(size, tmp_path / "log", flags(world, run, output, *GRID))
    assert metrics_bytes(output) == metrics_bytes(single)
    for path in single.glob("predictions-*.parquet"):
        assert pq.read_table(output / path.name).equals(pq.read_table(path))
    assert json.loads((output / "timing.json").read_text())["world_size"] == size
    assert "alpha 0.3: hr@1" in text
    assert not (output / "parts").exists()


def test_exact_filtered_and_guided_lists_are_the_same_on_any_number_of_ranks(world, run, tmp_path):
    import numpy as np
    import pyarrow as pa

    # Each row may not get one item, and has the probabilities of a second scorer.
    num_items = pq.read_metadata(Path(world.dataset) / "items.parquet").num_rows
    num_rows = pq.read_metadata(Path(world.dataset) / "test.parquet").num_rows
    deny = pa.array([[row % num_items] for row in range(num_rows)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"row_id": np.arange(num_rows), "deny": deny}), tmp_path / "lists")
    q = np.random.default_rng(0).random((num_rows, num_items), dtype=np.float32)
    np.save(tmp_path / "q.npy", q)
    per_row = ("--item_filter", tmp_path / "lists", "--guidance", tmp_path / "q.npy")
    search = ("--guidance_weight", 0.5, "--search", "exact", "--row_positions", 200)

    results = []
    for size in (1, 2, 3):
        output = tmp_path / f"on-{size}"
        words = flags(world, run, output, *GRID, *per_row, *search, "--batch_size", 4)
        evaluate(size, tmp_path / "log", words)
        results.append(metrics_bytes(output))
        lists = pq.read_table(output / "predictions-alpha0.3.parquet").to_pydict()
        for row, items in zip(lists["row_id"], lists["item_ids"], strict=True):
            assert row % num_items not in items
    assert results[0] == results[1] == results[2]

    found = json.loads(results[0])
    assert found["search_per_row"]["positions"] > 200  # the last pass may exceed the budget
    assert 0 <= found["alpha"]["0.3"]["proof_share"] < 1


def test_a_model_trained_by_msl_is_searched_with_its_softmax(world, tmp_path):
    run = train(world, tmp_path / "run", objective="msl", msl_tau=2.0, igd_beta=None)
    description = json.loads((run / "model" / "igd_ds.json").read_text())
    assert description["likelihood"] == {"softmax": "masked", "temperature": 2.0}

    # "auto" on one and on two ranks, and the options given.
    outputs = {name: tmp_path / name for name in ("one", "two", "given")}
    given = ("--softmax", "masked", "--temperature", 2.0)
    evaluate(1, tmp_path / "log", flags(world, run, outputs["one"], *GRID))
    evaluate(2, tmp_path / "log", flags(world, run, outputs["two"], *GRID))
    evaluate(1, tmp_path / "log", flags(world, run, outputs["given"], *GRID, *given))
    one, two, explicit = (metrics_bytes(output) for output in outputs.values())
    assert one == two == explicit
    assert read_metrics(outputs["one"])["softmax"] == "masked"


@pytest.mark.isa
def test_more_ranks_than_batches(world, run, tmp_path):
    results = []
    for size in (1, 3):
        output = tmp_path / f"on-{size}"
        words = flags(world, run, output, "--num_rows", 20, "--num_beams", 3)
        evaluate(size, tmp_path / "log", words)
        results.append(metrics_bytes(output))
    assert results[0] == results[1]


def test_users_own_many_rows(world, single):
    """In the d3 protocol rows, not users, are counted and are the keys."""
    table = pq.read_table(single / "predictions-alpha0.0.parquet").to_pydict()
    assert len(set(table["row_id"])) == read_metrics(single)["rows"] > len(set(table["user_id"]))


def test_a_killed_evaluation_goes_on_where_it_was(world, run, single, tmp_path):
    output = tmp_path / "test"
    words = flags(world, run, output, *GRID)
    processes = start(2, tmp_path / "log", words)
    until_the_first_batch(processes, output)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = len(list(output.glob("parts/part-*.parquet")))
    assert not (output / "metrics.json").exists()

    # On another number of ranks.
    evaluate(3, tmp_path / "log", words)
    assert metrics_bytes(output) == metrics_bytes(single)
    timing = json.loads((output / "timing.json").read_text())
    assert 0 < timing["rows_already_there"] <= 16 * done

    # A finished evaluation is left as it is. Another one in the same folder is refused.
    assert "is finished" in evaluate(2, tmp_path / "log2", words)
    text = refusal(tmp_path / "log3", flags(world, run, output, "--alpha", 0.1))
    assert "belongs to another evaluation" in text


def test_usr1_stops_an_evaluation_for_requeue(world, run, tmp_path):
    output = tmp_path / "test"
    processes = start(2, tmp_path / "log", flags(world, run, output, *GRID))
    until_the_first_batch(processes, output)
    for process in processes:
        os.kill(process.pid, signal.SIGUSR1)
    assert ranks.wait(processes) == [85, 85]


def test_alpha_from_takes_the_validated_alpha(world, run, single, tmp_path):
    from igd_ds.evaluation.metrics import best_alpha

    # An evaluation of the validation rows, and one with lists shorter than 10.
    valid, short, output = (tmp_path / name for name in ("valid", "short", "test"))
    few = ("--split", "valid", "--alpha", 0, 0.3, 0.6)
    evaluate(1, tmp_path / "log", flags(world, run, valid, *few))
    evaluate(1, tmp_path / "log", flags(world, run, short, *few, "--num_beams", 5))
    evaluate(1, tmp_path / "log", flags(world, run, output, "--alpha_from", valid))

    entries = read_metrics(valid)["alpha"]
    values = {alpha: entry["token_match"]["ndcg@10"] for alpha, entry in entries.items()}
    best = best_alpha(read_metrics(valid))
    assert values[best] == max(values.values())
    assert set(read_metrics(output)["alpha"]) == {"0.0", best}

    # An evaluation of another model.
    other = tmp_path / "other"
    shutil.copytree(valid, other)
    request = json.loads((other / "request.json").read_text())
    (other / "request.json").write_text(json.dumps(request | {"model": {}}))
    for number, (folder, message) in enumerate(
        [
            (short, "cannot choose α by ndcg@10"),
            (single, "evaluated test itself"),
            (other, "evaluated something else; these differ: model"),
            (tmp_path, "no finished evaluation"),
        ]
    ):
        words = flags(world, run, tmp_path / "x", "--alpha_from", folder)
        assert message in refusal(tmp_path / f"refused-{number}", words)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alpha", "1.2"), "--alpha must lie in [0, 1]"),
        (("--decoding_rule", "pernode"), "known: per-node"),
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
    assert message in refusal(tmp_path / "log", flags(world, run, tmp_path / "out", *more))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--model", "pretrained", "no igd_ds.json"),
        ("--dataset", "none", "is not a dataset"),
    ],
)
def test_models_and_datasets_that_do_not_belong_together(
    world, run, tmp_path, flag, value, message
):
    words = flags(world, run, tmp_path / "out", flag, world.folder / value)
    assert message in refusal(tmp_path / "log", words)
