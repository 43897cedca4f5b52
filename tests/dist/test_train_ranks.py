"""Training on two DeepSpeed ranks.

Every ZeRO stage resumes bit-identically and leaves a model that loads without DeepSpeed.
"""

import itertools
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ranks
import torch
from safetensors.torch import load_file


def train(world, log: Path, flags: list[str], size: int = 2) -> str:
    return ranks.run(size, log, ranks.entry, *entry(flags))


def entry(flags: list[str]):
    from igd_ds import train

    return train.main, flags


def weights(run: Path) -> dict:
    return load_file(next((run / "model").glob("*.safetensors")))


def metrics(run: Path, tag: str) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [e[tag] for e in entries if tag in e]


LORA = {"model_config": None, "lora_r": 4, "lora_dropout": 0.1, "gradient_checkpointing": True}
ADAPTIVE_MSL = {"objective": "msl", "igd_beta": None, "msl_tau": "adaptive"}
# name: (stage, settings). Dropout is on with LoRA, so these show the same random numbers too.
KINDS = {
    "stage 0": (0, {}),
    "stage 1": (1, {}),
    "stage 2": (2, {}),
    "stage 3": (3, {}),
    "stage 1 long chains": (1, {"max_length": 512, "prompt": "list"}),
    "stage 2 rows": (2, {"packing": "rows", "batching": "rows"}),
    "stage 2 LoRA": (2, LORA),
    "stage 3 LoRA": (3, LORA),
    "stage 2 QLoRA": (2, LORA | {"load_in_4bit": True}),
    "stage 3 QLoRA": (3, LORA | {"load_in_4bit": True}),
    "stage 2 msl": (2, ADAPTIVE_MSL),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_bit_identically(world, tmp_path, monkeypatch, kind):
    # A model that has learned nothing is far below msl's least τ: without that bound, τ moves.
    monkeypatch.setattr("igd_ds.objectives.msl.TAU_LEAST", -math.inf)
    stage, settings = KINDS[kind]
    settings = settings | {"save_every": 1}
    if "model_config" in settings:
        settings |= {"model_name_or_path": world.pretrained}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(world, tmp_path / "whole.log", world.train_flags(whole, stage, **settings))

    # The same run, resumed from its last checkpoint after it was killed (stage 1) or stopped by
    # SIGUSR1 as SLURM does it.
    flags = world.train_flags(stopped, stage, **settings, resume="auto")
    processes = ranks.start(2, tmp_path / "stopped.log", ranks.entry, *entry(flags))
    while not list((stopped / "checkpoints").glob("step-*/manifest.json")):
        time.sleep(0.01)
        assert any(p.is_alive() for p in processes), (tmp_path / "stopped.log").read_text()
    if kind.startswith("stage 1"):
        for process in processes:
            process.kill()
        ranks.wait(processes)
    else:
        os.kill(processes[1].pid, signal.SIGUSR1)  # one rank gets it, all ranks stop
        assert ranks.wait(processes) == [85, 85], (tmp_path / "stopped.log").read_text()
    text = train(world, tmp_path / "stopped.log", flags)
    assert ("stopped by a signal" in text) != kind.startswith("stage 1") and "resumed" in text

    first, second = weights(whole), weights(stopped)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert all(tensor.numel() > 0 for tensor in first.values()), "ZeRO-3 must gather its parts"
    for tag in ("train/loss", "valid/nll", "train/grad_norm", "train/msl_tau"):
        assert metrics(whole, tag) == metrics(stopped, tag)
    losses = metrics(whole, "train/nll")
    assert len(losses) == 6 and (losses[-1] < losses[0] or kind == "stage 2 msl")
    check_model_loads(world, whole, settings)
    if kind == "stage 2 msl":
        check_masked_softmax(whole, stopped)


def check_masked_softmax(whole: Path, stopped: Path) -> None:
    """Check that τ moved in every step, and that both models say how they are to be searched."""
    taus = metrics(whole, "train/msl_tau")
    assert taus[0] == 1.5 and all(later < earlier for earlier, later in itertools.pairwise(taus))
    states = [(run / "model" / "objective.json").read_text() for run in (whole, stopped)]
    assert states[0] == states[1] and 0 < json.loads(states[0])["tau"] <= taus[3]
    description = json.loads((whole / "model" / "igd_ds.json").read_text())
    tau = json.loads(states[0])["tau"]
    assert description["likelihood"] == {"softmax": "masked", "temperature": tau}


def check_model_loads(world, run: Path, settings: dict) -> None:
    """Check that RUN/model loads through from_pretrained or PEFT and gives the NLL of training."""
    code = ranks.start(1, run / "load.log", _load_and_measure, world, run, settings)
    assert ranks.wait(code) == [0], (run / "load.log").read_text()


def _load_and_measure(world, run, settings) -> None:
    from igd_ds import training_inputs
    from igd_ds.backbones.saved import describe
    from igd_ds.config.model import ModelSource
    from igd_ds.config.options import parse
    from igd_ds.data.batches import sample_rows
    from igd_ds.evaluation.validation import validation_nll
    from igd_ds.generative_training import GenerativeTraining
    from igd_ds.train_config import TrainConfig

    config = parse(TrainConfig, world.train_flags(run, 2, **settings))
    training = GenerativeTraining(config, run, training_inputs.load_inputs(config), micro_batch=2)
    if (run / "model" / "objective.json").is_file():
        training.load_state_dict(json.loads((run / "model" / "objective.json").read_text()))

    quantised = describe(run / "model")["load_in_4bit"]
    assert quantised == settings.get("load_in_4bit", False)
    source = ModelSource(model=str(run / "model"), dataset=world.dataset)
    model = training.inputs.backbone.load(source, quantised, torch.device("cpu"))
    rows = sample_rows(len(training.validation.rows.split), 10, seed=0)
    with torch.no_grad():
        found = validation_nll(model, training.validation, [rows])["valid/nll"]
    best = json.loads((run / "summary.json").read_text())["best"]
    assert found == pytest.approx(best, rel=1e-5), (found, best)


def test_a_torn_checkpoint_is_reported_and_an_older_one_taken(world, tmp_path):
    run = tmp_path / "run"
    flags = world.train_flags(run, 2, max_steps=6)
    train(world, tmp_path / "log", flags)
    expected = weights(run)
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == [
        "step-00000003",
        "step-00000006",
    ]
    (run / "summary.json").unlink()
    newest = max((run / "checkpoints" / "step-00000006").glob("*optim_states.pt"))
    newest.write_bytes(newest.read_bytes()[:100])
    text = train(world, tmp_path / "log2", [*flags, "--resume", "auto"])
    assert (
        "checkpoint step-00000006 is not complete" in text
        and "resumed" in text
        and "step-00000003" in text
    )
    assert all(torch.equal(expected[n], t) for n, t in weights(run).items())
    # Finished: a third start reports that and touches nothing.
    assert "is finished" in train(world, tmp_path / "log3", [*flags, "--resume", "auto"])


def test_early_stopping_keeps_the_best_model(world, tmp_path):
    run = tmp_path / "run"
    settings = {"learning_rate": 0.5, "schedule": "constant", "patience": 1, "validate_every": 1}
    flags = world.train_flags(run, 1, **settings, epochs=40, max_steps=80)
    text = train(world, tmp_path / "log", flags)
    values = metrics(run, "valid/nll")
    summary = json.loads((run / "summary.json").read_text())
    assert "stopped early" in text and len(values) < 80
    assert summary["best"] == min(values) and summary["best_step"] == values.index(min(values)) + 1
    check_model_loads(world, run, {})

    # The model card tells the best validation, and the model with it can be pushed.
    from igd_ds.commands import push

    card = (run / "model" / "README.md").read_text()
    assert f"| best validation | nll {summary['best']:.4f} at step {summary['best_step']} |" in card
    push.check_run(run)


@pytest.mark.parametrize("stage", [2, 3])
def test_validation_by_ndcg(world, tmp_path, stage):
    """Ranks search for different numbers of steps.

    Under ZeRO-3 every forward pass is a collective, so all must go on until the last one is done.
    """
    run = tmp_path / "run"
    train(
        world,
        tmp_path / "log",
        world.train_flags(run, stage, validation_metric="ndcg@10", max_steps=2, validate_every=2),
    )
    (value,) = metrics(run, "valid/ndcg@10")
    assert 0 <= value <= 1 and json.loads((run / "summary.json").read_text())["best"] == value


def test_position_linear_and_offload(world, tmp_path):
    """Other objectives and CPU offload run too; the run folder holds what its readers expect."""
    offload, bf16 = {"stage": 2, "offload_optimizer": {"device": "cpu"}}, {"enabled": True}
    for name, settings in {
        "position": {"objective": "position", "igd_beta": None, "position_floor": 0.2},
        "linear": {
            "objective": "igd-linear",
            "ds_config": world.ds_config(2, zero_optimization=offload),
            "prompt": "alpaca",
        },
        "conditional": {
            "entropy": "conditional",
            "objective": "igd-linear",
            "ds_config": world.ds_config(3, bf16=bf16),
        },
    }.items():
        run = tmp_path / name
        train(
            world, tmp_path / "log", world.train_flags(run, **settings, max_steps=2, max_length=256)
        )
        files = {"config.yaml", "ds_config.json", "env.json", "inputs.json"}
        files |= {"metrics.jsonl", "summary.json"}
        folders = {"tensorboard", "checkpoints", "model", "catalogue"}
        assert {path.name for path in run.iterdir()} >= files | folders
        assert (run / "model" / "catalogue" / "catalogue.json").is_file() and (
            run / "model" / "tokenizer.json"
        ).is_file()
        (share, _) = metrics(run, "train/zero_gain_weight_share")
        assert 0 < share < 1


def test_msl_is_validated_and_evaluated_with_the_softmax_that_it_trains(world, tmp_path):
    """`igd eval` finds the masked softmax and its τ in the model's description."""
    from igd_ds import eval as evaluator

    run = tmp_path / "run"
    settings = {"objective": "msl", "igd_beta": 0.5, "msl_tau": 0.7, "validation_rows": 0}
    flags = world.train_flags(run, 2, **settings, validation_metric="ndcg@10", validate_every=6)
    train(world, tmp_path / "log", flags)
    assert metrics(run, "train/msl_tau") == [0.7] * 6
    description = json.loads((run / "model" / "igd_ds.json").read_text())
    assert description["likelihood"] == {"softmax": "masked", "temperature": 0.7}
    assert json.loads((run / "model" / "objective.json").read_text()) == {"tau": 0.7}

    source = ["--model", str(run / "model"), "--dataset", world.dataset, "--split", "valid"]
    scores = {}
    for name, more in {
        "auto": [],
        "same": ["--softmax", "masked", "--temperature", "0.7"],
        "full": ["--softmax", "full", "--temperature", "1"],
    }.items():
        words = [*source, "--output_dir", str(tmp_path / name), *more]
        ranks.run(2, tmp_path / "log", ranks.entry, evaluator.main, words)
        lists = pq.read_table(tmp_path / name / "predictions-alpha0.0.parquet")
        scores[name] = lists["score"].to_numpy()
    assert (scores["auto"] == scores["same"]).all() and scores["full"].max() < scores["auto"].min()
    found = json.loads((tmp_path / "auto" / "metrics.json").read_text())["alpha"]["0.0"]
    best = json.loads((run / "summary.json").read_text())["best"]
    assert found["token_match"]["ndcg@10"] == pytest.approx(best, rel=1e-6) and best > 0


def test_tensorboard_holds_every_tag_of_the_log(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(world, tmp_path / "log", world.train_flags(run, 1, max_steps=2))
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for tag in {key for entry in entries for key in entry} - {"step"}:
        logged = [(e["step"], e[tag]) for e in entries if tag in e]
        assert [
            (s.step, pytest.approx(s.value, rel=1e-6)) for s in accumulator.Scalars(tag)
        ] == logged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "uniform"}, "--igd_beta 0.1 has no effect"),
        ({"igd_beta": 1.5}, r"--igd_beta must lie in [0, 1]"),
        ({"global_batch_size": 7}, "--global_batch_size 7 is not a multiple"),
        ({"tokenizer": "no/such/tokenizer"}, "no tokenizer at 'no/such/tokenizer'"),
        ({"max_length": 1024}, "exceeds the model's context of 512"),
        ({"max_length": 20}, "tokens, which leaves no prompt within --max_length 20"),
        ({"max_length": 70}, "--max_length leaves"),
        ({"seed": -1}, "--seed must not be negative"),
        ({"lora_alpha": 8}, "--lora_alpha has no effect without --lora_r"),
        ({"dataset": "no/such/dataset"}, "no/such/dataset is not a dataset"),
        (
            {"prompt": "nothing"},
            "--prompt: no template 'nothing'; known names: alpaca, chat, codes, list, short",
        ),
    ],
)
def test_bad_settings_end_in_one_line_before_weights_load(world, tmp_path, change, message):
    processes = ranks.start(
        1, tmp_path / "log", ranks.entry, *entry(world.train_flags(tmp_path / "run", **change))
    )
    assert ranks.wait(processes) == [2]
    text = (tmp_path / "log").read_text()
    assert text.count("error: ") == 1 and message in text[text.index("error: ") :]
    assert "Traceback" not in text
    # Nothing is in the way of a second try with the mistake mended.
    train(world, tmp_path / "log2", world.train_flags(tmp_path / "run", max_steps=1), size=1)


def test_the_output_folder_of_another_run_is_refused(world, tmp_path):
    run = tmp_path / "run"
    train(world, tmp_path / "log", world.train_flags(run, 1, max_steps=1), size=1)
    other = world.ds_config(1, bf16={"enabled": True})
    for flags, message in [
        (world.train_flags(run, 1, max_steps=1), "holds a run already"),
        (
            world.train_flags(run, 1, max_steps=1, learning_rate=1.0, resume="auto"),
            "settings differ: learning_rate",
        ),
        (
            world.train_flags(run, 1, max_steps=1, resume="auto", ds_config=other),
            "settings differ: ds_config: bf16.enabled (False then, True now)",
        ),
        (world.train_flags(tmp_path, 1), "is not empty and holds no run"),
    ]:
        processes = ranks.start(1, tmp_path / "log2", ranks.entry, *entry(flags))
        assert ranks.wait(processes) == [2]
        assert message in (tmp_path / "log2").read_text()


def test_a_moved_run_is_resumed(world, tmp_path):
    run = tmp_path / "run"
    flags = world.train_flags(run, 1, max_steps=4, save_every=1, validate_every=4)
    train(world, tmp_path / "log", flags)
    (run / "summary.json").unlink()
    run.rename(tmp_path / "moved")
    flags[flags.index(str(run))] = str(tmp_path / "moved")
    assert "resumed" in train(world, tmp_path / "log2", [*flags, "--resume", "auto"])


def test_one_failing_rank_ends_all(world, tmp_path):
    """Rank 0 alone sees that the folder is taken: both ranks end, and one line gives the reason."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    processes = ranks.start(
        2, tmp_path / "log", ranks.entry, *entry(world.train_flags(tmp_path / "run"))
    )
    codes = ranks.wait(processes)
    text = (tmp_path / "log").read_text()
    assert codes[0] == 2 and codes[1] != 0
    assert "error: --output_dir" in text and "is not empty and holds no run" in text


def test_a_foreign_tokenizer_is_refused(world, tmp_path):
    config = json.loads(Path(world.model_config).read_text()) | {"vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(config))
    flags = world.train_flags(tmp_path / "run", model_config=tmp_path / "small.json")
    processes = ranks.start(1, tmp_path / "log", ranks.entry, *entry(flags))
    assert ranks.wait(processes) == [2]
    assert "this tokenizer belongs to another model" in (tmp_path / "log").read_text()
    # A model that comes with its own tokenizer takes no other, be it of the same size.
    shutil.copytree(world.pretrained, tmp_path / "model")
    shutil.copytree(world.tokenizer, tmp_path / "model", dirs_exist_ok=True)
    shutil.copytree(world.tokenizer, tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    backend = json.loads(text)
    (first, a), (second, b) = list(backend["model"]["vocab"].items())[-2:]
    backend["model"]["vocab"] |= {first: b, second: a}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(backend))
    flags = {"model_config": None, "model_name_or_path": tmp_path / "model"}
    processes = ranks.start(
        1,
        tmp_path / "log2",
        ranks.entry,
        *entry(world.train_flags(tmp_path / "run2", **flags, tokenizer=tmp_path / "other")),
    )
    assert ranks.wait(processes) == [2]
    assert "--tokenizer does not belong to" in (tmp_path / "log2").read_text()
    train(
        world,
        tmp_path / "log3",
        world.train_flags(tmp_path / "run3", **flags, tokenizer=None, max_steps=1),
        size=1,
    )
