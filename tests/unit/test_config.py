"""Configuration: defaults < YAML < flags, strict."""

import dataclasses

import pytest

from igd_ds.config.options import parse
from igd_ds.config.search import Limits, ScoringOptions
from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.errors import UsageError
from igd_ds.eval_config import EvalConfig
from igd_ds.run_folder import claim_run_folder
from igd_ds.train_config import TrainConfig

REQUIRED = [
    "--ds_config",
    "c.json",
    "--dataset",
    "d",
    "--output_dir",
    "o",
    "--model_name_or_path",
    "m",
]


UNIFORM = ("--objective", "uniform")  # needs no flag of its own
EVALUATION = ["--model", "m", "--dataset", "d", "--output_dir", "o"]


def train(*flags):
    return parse(TrainConfig, [*REQUIRED, *flags])


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 0.5\nepochs: 7\nlength_grouping: false\nigd_beta: 1\n")
    config = train("--config", str(file), "--epochs", "2")
    assert (config.learning_rate, config.epochs, config.length_grouping, config.igd_beta) == (
        0.5,
        2,
        False,
        1.0,
    )
    assert config.patience == 1
    assert train("--config", str(file), "--length_grouping").length_grouping is True


def test_the_run_folders_settings_read_back(tmp_path):
    """What claim_run_folder writes as config.yaml is a --config file."""
    config = train("--igd_beta", "0.3", "--prompt", "alpaca", "--output_dir", str(tmp_path / "run"))
    claim_run_folder(tmp_path / "run", config, {"gradient_accumulation_steps": 1}, world_size=1)
    assert parse(TrainConfig, ["--config", str(tmp_path / "run" / "config.yaml")]) == config


def test_the_launchers_local_rank_is_accepted():
    assert parse(TrainConfig, ["--local_rank=1", *REQUIRED, *UNIFORM]) == train(*UNIFORM)


def test_a_merged_mapping_may_set_a_key_anew(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\n")
    found = read_yaml_settings(path)
    assert found == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1.0", "did you mean 'learning_rate'"),
        ("epochs: two", "'epochs' takes int"),
        ("epochs: 1.5", "'epochs' takes int"),
        ("learning_rate: 1e-4", "'learning_rate' takes float, found '1e-4' .*write 1.0e-4"),
        ("gradient_checkpointing: 1", "takes bool"),
        ("schedule: cosin", "'schedule' is one of cosine, linear, constant"),
        ("- 1", "expected 'setting: value'"),
        ("seed: 1\nepochs: 2\nseed: 1", r"line 3: key 'seed' occurs twice, first on line 1"),
        ("dataset: 2020-13-45", "not valid YAML .*month must be in"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        train("--config", str(file))
    assert "bad.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_config", "x.json"], "exactly one of --model_name_or_path"),
        (["--load_in_4bit"], "give --lora_r"),
        (["--warmup_ratio", "1"], "--warmup_ratio"),
        (["--global_batch_size", "0"], "--global_batch_size"),
        (["--max_steps", "-1"], "--max_steps"),
        (["--learning_rate", "0"], "--learning_rate"),
    ],
)
def test_values_no_run_can_use(flags, message):
    with pytest.raises(UsageError, match=message):
        train(*flags)


def test_missing_settings_are_named():
    with pytest.raises(UsageError, match="--ds_config.*--output_dir"):
        parse(TrainConfig, ["--dataset", "d"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "0", "1.5"], r"--alpha must lie in \[0, 1\], found 1.5"),
        (["--alpha", "0.1", "0.1"], "none twice"),
        (["--num_beams", "0"], "--num_beams"),
        (["--length_penalty", "-1"], "--length_penalty"),
        (["--popularity_prior", "nan"], "--popularity_prior"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--guidance", "q.npy"], "--guidance and --guidance_weight, larger than 0, go together"),
        (["--guidance_weight", "1"], "go together"),
        (
            ["--guidance", "q.npy", "--guidance_weight", "-1"],
            "--guidance_weight must not be negative",
        ),
    ],
)
def test_bad_evaluations(flags, message):
    with pytest.raises(UsageError, match=message):
        parse(EvalConfig, [*EVALUATION, *flags])


def test_an_evaluations_defaults_are_those_of_the_search():
    config = parse(EvalConfig, EVALUATION)
    assert config.scoring_options() == ScoringOptions()
    for defaults in (ScoringOptions(), Limits()):
        for name, value in dataclasses.asdict(defaults).items():
            assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--objective", "idg"],
            r"--objective idg: unknown, did you mean 'igd'\? \(known: uniform, igd",
        ),
        (
            ["--objective", "nothing-like-it"],
            r"--objective nothing-like-it: unknown \(known: uniform",
        ),
        (["--objective", "igd"], "--objective igd needs --igd_beta"),
        (
            [*UNIFORM, "--decisiveness", "gini", "--entropy", "conditional"],
            "--entropy conditional has no effect with --decisiveness gini",
        ),
        (
            ["--objective", "uniform", "--igd_beta", "0.1"],
            "--igd_beta 0.1 has no effect with --objective uniform: drop it, or use igd, ",
        ),
        (
            ["--objective", "igd", "--igd_beta", "0.1", "--position_floor", "0.1"],
            "--position_floor 0.1 has no effect",
        ),
        (["--objective", "position"], "--objective position needs --position_floor"),
    ],
)
def test_flags_and_objective_must_fit(flags, message):
    with pytest.raises(UsageError, match=message):
        train(*flags)


def test_the_former_name_of_the_objective_is_still_accepted(tmp_path):
    """`--weighting` and the YAML key `weighting` set the objective."""
    expected = train("--objective", "position", "--position_floor", "0.5")
    assert expected.objective == "position"
    assert train("--weighting", "position", "--position_floor", "0.5") == expected
    file = tmp_path / "run.yaml"
    file.write_text("weighting: position\nposition_floor: 0.5\n")
    assert train("--config", str(file)) == expected
    assert "weighting" not in dataclasses.asdict(expected)

    # A flag wins over the file, by whichever name.
    for flag in ("--objective", "--weighting"):
        assert train("--config", str(file), flag, "cft", "--cft_lambda", "1").objective == "cft"


def test_a_resumed_run_may_have_the_former_name_in_its_config_yaml(tmp_path):
    run = tmp_path / "run"
    flags = ("--output_dir", str(run), "--objective", "position", "--position_floor", "0.5")
    ds = {"zero_optimization": {"stage": 1}}
    claim_run_folder(run, train(*flags), ds, world_size=1)
    (run / "metrics.jsonl").write_text("")
    text = (run / "config.yaml").read_text()
    assert "objective: position\n" in text
    (run / "config.yaml").write_text(text.replace("objective:", "weighting:"))

    claim_run_folder(run, train(*flags, "--resume", "auto"), ds, world_size=1)
    other = train(*flags[:2], *UNIFORM, "--resume", "auto")
    with pytest.raises(UsageError, match="these settings differ: .*objective"):
        claim_run_folder(run, other, ds, world_size=1)
