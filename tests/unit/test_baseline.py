"""Baselines in one process: rows chained to sequences, lists by hand, guidance, bad input.

How they train is tested in tests/dist.
"""

import dataclasses
import itertools
import json
import types
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
import yaml
from tiny_run import NUM_TEST, TITLES, TRAIN_TARGETS

from igd_ds import baseline, distributed, eval
from igd_ds.baseline_config import BaselineConfig
from igd_ds.baselines.leaves import Leaves, build_catalogue
from igd_ds.baselines.losses import Negatives
from igd_ds.baselines.sequences import Chains, SequenceBatch
from igd_ds.config.options import TUNED, parse
from igd_ds.contracts import MASKED_ROW
from igd_ds.data.batches import sample_rows
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.engine.step import optimizer_step
from igd_ds.errors import UsageError
from igd_ds.evaluation.full_ranking import Ranker
from igd_ds.evaluation.results import Ranked
from igd_ds.sequential_training import SequenceLoss, SequentialTraining

NUM_ITEMS = len(TITLES)
# The sample of validation rows leaves out the row that has no history.
SMALL = ("--splits", "test", "--validation_rows", 5, "--seed", 3)


def make_split(rows, name="train"):
    """Return a split of (user, history, target) rows."""
    users, histories, targets = zip(*rows, strict=True)
    offsets = np.cumsum([0, *map(len, histories)])
    return Split(
        name,
        np.array(users),
        np.concatenate(histories).astype(np.int32),
        offsets,
        np.array(targets, np.int32),
        None,
    )


def random_rows(longest, seed):
    """Return every prefix of random users' items, cut to its last `longest`, in random order.

    There are few items, so that much is alike.
    """
    random, rows = np.random.default_rng(seed), []
    for user in range(30):
        items = random.integers(4, size=random.integers(2, 12))
        rows += [
            (user, items[max(0, end - longest) : end], items[end]) for end in range(1, len(items))
        ]
        # A row that stands alone, and one that is there twice.
        if user % 5 == 0:
            rows += [(user, random.integers(4, size=3), 0), rows[-1]]
    return [rows[i] for i in random.permutation(len(rows))]


def test_sequences_of_a_step_are_drawn_at_random_and_sorted_by_length():
    """A step is a mean over its targets: steps of short sequences would give these more weight."""
    rows = random_rows(20, seed=0)
    config = BaselineConfig(
        dataset="", output_dir="", recommender="sasrec", global_batch_size=16, epochs=1, seed=0
    )
    data = SimpleNamespace(
        train=Chains.build(make_split(rows)), negatives=None, seen_filter=lambda *split: None
    )
    training = SequentialTraining(config, Path(), data, micro_batch=4)
    steps = list(itertools.islice(training.micro_batches(0), training.steps_per_epoch))

    targets = Counter(target for step in steps for part in step for target in part.targets.tolist())
    assert targets == Counter(int(target) for _, _, target in rows)
    widths = [[part.histories.shape[1] for part in step] for step in steps]
    assert all(step == sorted(step, reverse=True) for step in widths)
    assert len(steps) > 1 and all(step[0] >= 2 * step[-1] for step in widths)

    resumed = next(training.micro_batches(1))
    for part, same in zip(resumed, steps[1], strict=True):
        assert torch.equal(part.histories, same.histories)


class LastItem(torch.nn.Module):
    """Scores items by their distance to a history's last item, and keeps how wide batches were."""

    def __init__(self, num_items):
        super().__init__()
        self.num_items, self.widths = num_items, []

    def log_probabilities(self, histories, positions):
        self.widths.append(histories.shape[1])
        last = histories.flatten()[positions]
        return -(torch.arange(self.num_items) - last[:, None]).abs().float()


def test_batches_of_a_ranking_hold_histories_of_similar_length(made, monkeypatch):
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    dataset = InteractionDataset.load(made.parent / "data")
    stored = build_catalogue(dataset, "auto")
    split = dataset.splits["test"]
    lengths = np.diff(split.history_offsets)
    rows = np.flatnonzero(lengths)

    def ranked(chosen, model, batch_size):
        leaves = Leaves.build(stored.trie, torch.device("cpu"))
        table = Ranked(stored, dataset, split, chosen, 3, run=None)
        return Ranker(model, leaves, batch_size).rank(table, None)[0]

    model = LastItem(dataset.num_items)
    lists = ranked(rows, model, 2)
    longest_first = sorted(lengths[rows], reverse=True)
    assert model.widths == longest_first[::2] and len(set(model.widths)) > 1
    for row, found in zip(rows, lists, strict=True):
        alone = ranked(np.array([row]), LastItem(dataset.num_items), 1)
        assert found.tolist() == alone[0].tolist()


@pytest.mark.parametrize("longest", [3, 20])
def test_chained_rows_are_the_datasets_rows_each_once_with_its_own_history(longest):
    rows = random_rows(longest, seed=longest)
    chains, seen = Chains.build(make_split(rows)), []
    for begin in range(0, len(chains), 4):
        sequences = np.append(np.arange(begin, min(begin + 4, len(chains))), MASKED_ROW)
        batch = chains.collate(sequences)
        width = batch.histories.shape[1]
        assert width == max(chains.lengths[np.maximum(sequences, 0)])
        members = [
            chains.rows[chains.offsets[s] : chains.offsets[s + 1]].tolist() for s in sequences[:-1]
        ]
        for place, target, row in zip(
            batch.positions.tolist(), batch.targets.tolist(), sum(members, []), strict=True
        ):
            sequence, end = divmod(place, width)
            assert (
                batch.histories[sequence, : end + 1].tolist() == rows[row][1].tolist()
                and target == rows[row][2]
            )
            assert sequence < len(sequences) - 1, "the masked sequence predicts nothing"
            seen.append(row)
    assert sorted(seen) == list(range(len(rows)))
    assert len(chains) < len(rows) * (0.9 if longest == 3 else 0.4)


def test_a_users_prefixes_are_one_sequence_and_truncated_or_other_rows_stay_alone():
    prefixes = [(7, [5], 6), (7, [5, 6], 5), (7, [5, 6, 5], 8)]
    assert [len(Chains.build(make_split(rows))) for rows in (prefixes, prefixes[::-1])] == [1, 1]
    others = [(8, [5, 6, 5, 8], 1), (7, [6, 5, 8], 1), (7, [5, 6, 5, 1], 2), (7, [5, 6, 1, 8], 1)]
    # Another user; a truncated history; another last item; another item within.
    for row in others:
        assert len(Chains.build(make_split([*prefixes, row]))) == 2
    assert len(Chains.of_rows(make_split(prefixes), np.array([1, 2]))) == 2


def test_leaves_are_the_different_names_and_their_probabilities_add_up():
    names = [["a"], ["b", "a"], ["a"], ["b"], ["a", "b"], ["a"], ["b"]]
    train = make_split([(user, [1], target) for user, target in enumerate([0, 2, 2, 3])])
    dataset = InteractionDataset(Path(), {}, [None] * 7, names, {"train": train}, "")
    stored = build_catalogue(dataset, "auto")
    leaves = Leaves.build(stored.trie, torch.device("cpu"))
    assert stored.catalogue.kind == "semantic-id" and len(leaves.nodes) == 4
    p = torch.rand(5, 7).softmax(1)
    found = leaves.log_probabilities(p.log()).exp()
    for item, name in enumerate(names):
        column = np.flatnonzero(leaves.nodes == stored.trie.leaf_of_item[item])[0]
        alike = [other for other in range(7) if names[other] == name]
        assert torch.allclose(found[:, column], p[:, alike].sum(1))
        assert stored.trie.train_count[leaves.nodes[column]] == sum(
            other in (0, 2, 2, 3) for other in alike
        ) + (name == ["a"])
    with pytest.raises(UsageError, match="--item_kind text: item 0 has no title"):
        build_catalogue(dataset, "text")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def entry(made, tmp_path, monkeypatch):
    """Return a function that runs an entry point with flags and returns its exit code."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distributed, "init", lambda *_: None)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(baseline.signal, "signal", lambda *_: None)

    def run(module, *flags):
        monkeypatch.setattr(
            "sys.argv", ["entry", "--dataset", str(made.parent / "data"), *map(str, flags)]
        )
        return module.main()

    return run


def flags(tmp_path, name, *more):
    """Return the flags of a small run."""
    return ["--recommender", name, "--output_dir", tmp_path / name, "--num_beams", 5, *SMALL, *more]


def lists(folder):
    table = pq.read_table(folder / "predictions-alpha0.0.parquet").to_pylist()
    return [[line for line in table if line["row_id"] == row] for row in range(NUM_TEST)]


def test_popularity_lists_the_catalogue_by_training_count(entry, tmp_path):
    assert entry(baseline, *flags(tmp_path, "popularity")) == 0
    run = tmp_path / "popularity"
    left = run / "eval/test/metrics.json.tmp-1"  # of a start that was killed here
    (run / "eval/test/metrics.json").rename(left)
    assert entry(baseline, *flags(tmp_path, "popularity", "--resume", "auto")) == 0
    assert not left.exists()
    files = [
        "config.yaml",
        "ds_config.json",
        "env.json",
        "lock.json",
        "metrics.jsonl",
        "summary.json",
    ]
    folders = ["checkpoints", "eval", "model", "tensorboard"]
    assert sorted(path.name for path in run.iterdir()) == sorted(files + folders)
    assert json.loads((run / "summary.json").read_text())["seconds"] > 0
    count = {title: sum(TITLES[target] == title for target in TRAIN_TARGETS) for title in TITLES}
    ranked = sorted(count.values(), reverse=True)
    for mine in lists(run / "eval" / "test"):
        assert [count[TITLES[line["item_ids"][0]]] for line in mine] == ranked[:5]
        assert [line["rank"] for line in mine] == [1, 2, 3, 4, 5] and all(
            line["certified"] for line in mine
        )
        assert (2, 3) in {tuple(line["item_ids"]) for line in mine}, "written alike: one entry"
        assert np.isclose(
            np.exp([line["score"] for line in mine]).sum(), (sum(ranked[:5]) + 0.6) / 13, atol=0.02
        )
    found = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert found["popularity_baseline"]["hr@5"] == pytest.approx(
        found["alpha"]["0.0"]["token_match"]["hr@5"], abs=0.2
    )
    assert found["alpha"]["0.0"]["coverage"] == 5 / 9 and found["short_lists"] == 0


def test_seen_items_are_left_out_of_a_baselines_lists(entry, made, tmp_path):
    """Also of its validation, by which a training stops."""
    split = InteractionDataset.load(made.parent / "data").splits["test"]
    found = {}
    for exclude in ("no", "yes"):
        more = ("--output_dir", tmp_path / exclude, "--exclude_seen", exclude, "--num_beams", 9)
        name = "last-item-knn"
        assert entry(baseline, "--recommender", name, *SMALL, *more) == 0
        found[exclude] = json.loads((tmp_path / exclude / "eval/test/metrics.json").read_text())
        assert found[exclude]["exclude_seen"] == exclude
    for row in range(NUM_TEST):
        kept, left = (
            {item: line for line in lists(tmp_path / e / "eval/test")[row]
             for item in line["item_ids"]}
            for e in ("no", "yes")
        )  # fmt: skip
        assert len(kept) == NUM_ITEMS
        assert left.keys() == kept.keys() - set(split.history(row).tolist())
        alone = [item for item in left if len(kept[item]["item_ids"]) == 1]
        assert [kept[item]["score"] for item in alone] == [left[item]["score"] for item in alone]
    assert found["yes"]["short_lists"] > 0 == found["no"]["short_lists"]
    assert found["yes"]["alpha"]["0.0"]["repeat_rate"] == {"first": 0, "top10": 0}
    logs = [(tmp_path / e / "metrics.jsonl").read_text() for e in ("no", "yes")]
    assert logs[0] != logs[1]
    config = tmp_path / "no" / "config.yaml"  # of an earlier version
    config.write_text(config.read_text().replace("exclude_seen: 'no'\n", ""))
    again = ("--output_dir", tmp_path / "no", "--num_beams", 9, "--resume", "auto")
    with pytest.raises(UsageError, match="these settings differ: exclude_seen"):
        entry(baseline, "--recommender", name, *SMALL, *again)
    assert entry(baseline, "--recommender", name, *SMALL, *again, "--exclude_seen", "no") == 0


def test_the_metrics_have_eval_pys_keys_and_rows(entry, made, tmp_path):
    """Rows and catalogue are the same, so that runs of both can be compared."""
    sample = ("--num_rows", 6, "--num_beams", 5)
    assert (
        entry(
            eval,
            "--model",
            made / "model",
            "--output_dir",
            tmp_path / "other",
            *sample,
            "--seed",
            3,
        )
        == 0
    )
    assert entry(baseline, *flags(tmp_path, "last-item-knn"), *sample, "--rows_seed", 3) == 0
    mine = json.loads((tmp_path / "last-item-knn" / "eval" / "test" / "metrics.json").read_text())
    other = json.loads((tmp_path / "other" / "metrics.json").read_text())
    settings = ("dataset", "rows", "num_rows", "seed", "num_beams", "length_penalty", "leaves")
    targets = ("cold_targets", "head_targets", "target_popularity_deciles", "popularity_baseline")
    for key in (*settings, *targets):
        assert mine[key] == other[key], key
    assert mine["alpha"]["0.0"].keys() == other["alpha"]["0.0"].keys()
    folders = (tmp_path / "last-item-knn" / "eval" / "test", tmp_path / "other")
    tables = [pq.read_table(folder / "predictions-alpha0.0.parquet") for folder in folders]
    assert tables[0].schema == tables[1].schema and tables[0]["row_id"] == tables[1]["row_id"]
    assert set(tables[0]["row_id"].to_pylist()) == set(sample_rows(NUM_TEST, 6, 3))


def test_scores_guide_the_search_of_eval_py(entry, made, tmp_path):
    assert entry(baseline, *flags(tmp_path, "last-item-knn", "--save_scores")) == 0
    folder = tmp_path / "last-item-knn" / "eval" / "test"
    scores = np.load(folder / "scores.npy")
    assert (
        scores.dtype == np.float32
        and scores.shape == (NUM_TEST, NUM_ITEMS)
        and np.allclose(scores.sum(1), 1)
    )
    for row, mine in enumerate(lists(folder)):
        for line in mine:
            assert np.log(scores[row, line["item_ids"]].sum()) == pytest.approx(
                line["score"], abs=1e-5
            )
    guided = (
        "--guidance",
        folder / "scores.npy",
        "--guidance_weight",
        10000,
        "--num_beams",
        5,
        "--search",
        "exact",
    )
    assert entry(eval, "--model", made / "model", "--output_dir", tmp_path / "guided", *guided) == 0
    for row, (mine, other) in enumerate(
        zip(lists(folder), lists(tmp_path / "guided"), strict=True)
    ):
        mass = [[scores[row, line["item_ids"]].sum() for line in found] for found in (mine, other)]
        assert mass[0] == pytest.approx(mass[1], rel=0.01), (
            "the guidance weighs a thousand times as much as the model"
        )


def test_a_finished_run_is_evaluated_on_further_splits_and_not_again(
    entry, tmp_path, capsys, monkeypatch
):
    assert entry(baseline, *flags(tmp_path, "popularity")) == 0
    model = tmp_path / "popularity" / "model" / "model.safetensors"
    written = (
        model.stat().st_mtime_ns,
        (tmp_path / "popularity" / "eval" / "test" / "metrics.json").stat().st_mtime_ns,
    )
    with pytest.raises(UsageError, match="holds a run already"):
        entry(baseline, *flags(tmp_path, "popularity"))
    capsys.readouterr()
    assert (
        entry(
            baseline,
            *flags(tmp_path, "popularity", "--resume", "auto", "--splits", "train", "test"),
        )
        == 0
    )
    assert "12 rows of train" in (text := capsys.readouterr().out) and "rows of test" not in text
    assert written == (
        model.stat().st_mtime_ns,
        (tmp_path / "popularity" / "eval" / "test" / "metrics.json").stat().st_mtime_ns,
    )
    with pytest.raises(UsageError, match="these settings differ: num_beams"):
        entry(baseline, *flags(tmp_path, "popularity", "--resume", "auto", "--num_beams", 4))
    summary = tmp_path / "popularity" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"dataset": "another"}))
    with pytest.raises(UsageError, match="popularity was trained on another dataset"):
        entry(baseline, *flags(tmp_path, "popularity", "--resume", "auto"))


@pytest.mark.parametrize(
    ("score", "norm", "message"), [(torch.nan, 1.0, "the loss"), (0.0, torch.nan, "the gradient")]
)
def test_a_step_that_is_not_finite_ends_the_run(score, norm, message):
    class Engine:
        """What a step uses of a DeepSpeed engine; each item has the given score."""

        weight = torch.tensor(score, requires_grad=True)
        updates = 0
        optimizer = types.SimpleNamespace(_global_grad_norm=None)

        def __call__(self, *_):
            return self.weight.expand(1, 4)

        def backward(self, loss, scale_wrt_gas):
            loss.backward()

        def step(self):
            self.updates += 1

        def fp16_enabled(self):
            return False

        def get_global_grad_norm(self):
            return norm

    batch = SequenceBatch(torch.tensor([[0]]), torch.tensor([0]), torch.tensor([2]))
    loss, engine = SequenceLoss("cross-entropy", Negatives(torch.ones(4), 0)), Engine()
    with pytest.raises(FloatingPointError, match=f"step 7: {message} is not finite"):
        optimizer_step(engine, [batch], loss, step=6)
    assert engine.updates == (message == "the gradient")


TRAINED = ["--ds_config", "ds_configs/zero1-fp32.json"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recommender", "gru4rec"], "gru4rec is trained: give --ds_config"),
        (
            ["--recommender", "popularity", "--dropout", 0.1],
            "--dropout has no effect on popularity",
        ),
        (
            ["--recommender", "last-item-knn", "--loss", "bce"],
            "--loss has no effect on last-item-knn",
        ),
        (
            [*TRAINED, "--recommender", "lrurec", "--num_heads", 2],
            "--num_heads has no effect on lrurec",
        ),
        (
            [*TRAINED, "--recommender", "sasrec", "--num_heads", 3],
            "--hidden_size 50 is not divisible by --num_heads 3",
        ),
        (
            [*TRAINED, "--recommender", "sasrec", "--num_negatives", 3],
            "--num_negatives has no effect on --loss cross-entropy",
        ),
        (
            [*TRAINED, "--recommender", "sasrec", "--loss", "bpr-max"],
            "--num_negatives 2048 of --loss bpr-max: .* hold 8 items",
        ),
        (
            [*TRAINED, "--recommender", "sasrec", "--loss", "bce", "--num_negatives", 10],
            "--num_negatives 10 .* hold 9 items",
        ),
        (
            [*TRAINED, "--recommender", "gru4rec", "--loss", "bpr-max", "--num_negatives", 1],
            "must be at least 2, found 1",
        ),
        (
            [*TRAINED, "--recommender", "sasrec", "--dropout", 1.0],
            r"--dropout must lie in \[0, 1\)",
        ),
        (
            [*TRAINED, "--recommender", "sasrec", "--hidden_size", 0],
            "--hidden_size must be at least 1",
        ),
        (
            [*TRAINED, "--recommender", "sasrec", "--global_batch_size", 12],
            "not a multiple of micro-batch 8",
        ),
        (
            ["--recommender", "popularity", "--splits", "test", "test"],
            "--splits needs at least one and none twice",
        ),
        (
            ["--recommender", "popularity", "--splits", "valid"],
            "row 4 of valid has an empty history",
        ),
        (
            ["--recommender", "popularity", "--item_kind", "semantic-id"],
            "--item_kind semantic-id: item 0 has no semantic ID",
        ),
    ],
)
def test_bad_input_is_refused_before_a_run_folder_is_made(entry, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        entry(baseline, "--output_dir", tmp_path / "run", *SMALL, *more)
    assert not (tmp_path / "run").exists()


def test_an_unknown_recommender_or_loss_is_refused_with_the_known_ones(capsys):
    for flag, known in (("--recommender", "sasrec"), ("--loss", "bpr-max")):
        with pytest.raises(SystemExit):
            parse(BaselineConfig, ["--dataset", "d", "--output_dir", "o", flag, "unknown"])
        assert known in capsys.readouterr().err


def test_presets_fill_in_what_is_not_given():
    given = parse(
        BaselineConfig,
        [
            "--dataset",
            "d",
            "--output_dir",
            "o",
            "--recommender",
            "sasrec",
            *TRAINED,
            "--dropout",
            "0.2",
        ],
    )
    config = given.with_preset()
    assert (config.hidden_size, config.num_layers, config.num_heads, config.dropout) == (
        50,
        2,
        1,
        0.2,
    )
    assert (config.global_batch_size, config.learning_rate, config.num_negatives) == (
        128,
        1e-3,
        None,
    )
    assert dataclasses.replace(given, loss="bce").with_preset().num_negatives == 1


@pytest.mark.parametrize("file", sorted(TUNED.glob("*.yaml")), ids=lambda file: file.stem)
def test_tuned_settings_come_by_name_and_say_what_found_them(file):
    words = ["--config", file.stem, "--dataset", "d", "--output_dir", "o", *TRAINED]
    config = parse(BaselineConfig, [*words, "--epochs", "1"])
    assert file.stem.startswith(config.recommender) and config.epochs == 1
    assert config.with_preset().num_layers == 2

    sweep = Path(__file__).parents[2] / "tools/sweeps/tuned-baselines.yaml"
    assert f"igd sweep {sweep.relative_to(sweep.parents[2])}" in file.read_text()
    tried = yaml.safe_load(sweep.read_text())
    settings = yaml.safe_load(file.read_text())
    assert settings["dropout"] in tried["runs"][0]["dropout"]
    for name in ("hidden_size", "num_heads", "learning_rate", "global_batch_size", "patience"):
        assert settings[name] == tried["baseline"][name]


def test_a_name_without_tuned_settings_is_refused():
    words = ["--config", "sasrec-beauty", "--dataset", "d", "--output_dir", "o", *TRAINED]
    with pytest.raises(UsageError, match="no file sasrec-beauty, did you mean 'sasrec-beauty-2014"):
        parse(BaselineConfig, words)
