"""The run's record: it has known tags only, and each step once after a resume."""

import json
import re
import sys

import pytest

from igd_ds.config import training
from igd_ds.errors import UsageError
from igd_ds.folders import write_json
from igd_ds.objectives import OBJECTIVES
from igd_ds.runlog import LAYOUT, TAGS, RunLog, drop_entries_after


def tags_of_objectives() -> set[str]:
    """Return the tags that the objectives declare, and those of the losses of several targets."""
    declared = {tag for objective in OBJECTIVES.values() for tag in objective.tags}
    several = {name for o in OBJECTIVES.values() if len(o.targets) > 1 for name in o.targets}
    return declared | {f"train/loss_{name}" for name in several}


def test_unknown_tags_are_refused(tmp_path):
    log = RunLog(tmp_path, enabled=True)
    with pytest.raises(KeyError, match="not in runlog.TAGS"):
        log.log(1, {"train/lossy": 1.0})
    with pytest.raises(KeyError, match="not in runlog.TAGS"):
        log.show(1, {"eval/list": "text"})
    log.close()


def test_a_run_may_have_tags_of_its_own(tmp_path):
    log = RunLog(tmp_path, enabled=True, tags={"train/msl_tau": "temperature"})
    log.log(1, {"train/msl_tau": 1.5, "train/loss": 2.0})
    log.close()
    entry = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert entry == {"step": 1, "train/msl_tau": 1.5, "train/loss": 2.0}
    assert "train/msl_tau" not in TAGS


def test_objectives_declare_no_tag_again():
    assert tags_of_objectives() >= {"train/msl_tau", "train/alpha_fg", "train/loss_fg"}
    assert not tags_of_objectives() & set(TAGS)


def test_every_chart_has_curves():
    """TensorBoard matches a chart's regular expressions from the beginning of a tag."""
    every = set(TAGS) | tags_of_objectives()
    charts = {title: tags for charts in LAYOUT.values() for title, (_, tags) in charts.items()}
    drawn = {
        title: {tag for tag in every if any(re.match(pattern, tag) for pattern in patterns)}
        for title, patterns in charts.items()
    }
    assert all(drawn.values())
    assert drawn["nats per item"] == {"valid/nll"}
    both = {"train/nll_zero_gain", "train/nll_nonzero_gain"}
    assert drawn["training: zero and non-zero gain"] == both
    assert len(drawn["validation: zero gain and deciles of non-zero gain"]) == 11


def test_only_the_first_process_of_a_run_writes_the_layout(tmp_path):
    for resume_step in (0, 4):
        RunLog(tmp_path, enabled=True, resume_step=resume_step).close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [b"custom_scalars" in path.read_bytes() for path in files] == [True, False]


def test_ranks_that_do_not_write_touch_nothing(tmp_path):
    log = RunLog(tmp_path, enabled=False)
    log.log(1, {"train/loss": 1.0})
    log.show(1, {"eval/lists": "text"})
    log.hparams({}, {})
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_resumed_log_has_each_step_once(tmp_path):
    log = RunLog(tmp_path, enabled=True)
    for step in range(1, 6):
        log.log(step, {"train/loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')  # a kill cut this line off

    log = RunLog(tmp_path, enabled=True, resume_step=3)
    log.log(4, {"train/loss": 40.0})
    log.hparams({"igd_beta": 0.1, "alphas": [1]}, {"best_validation": 1.0})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entries = [(entry["step"], entry["train/loss"]) for entry in map(json.loads, lines)]
    assert entries == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_drop_entries_of_a_missing_file(tmp_path):
    drop_entries_after(tmp_path / "none.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_json_is_atomic_and_ordered(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1.5\n  ],\n  "b": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (lambda lines: lines, False),
        (lambda lines: [*lines, '{"step": 6, "train/loss": 6.0}\n'], False),
        (lambda lines: [], True),
        (lambda lines: lines[:-1], True),
        (lambda lines: lines[1:], True),
        (lambda lines: [lines[0].replace("1.0", "7.0"), *lines[1:]], True),
        (None, True),
    ],
    ids=["unchanged", "went on", "emptied", "cut", "beheaded", "changed", "gone"],
)
def test_a_log_that_changed_since_the_checkpoint_is_told(tmp_path, capsys, alter, told):
    log = RunLog(tmp_path, enabled=True)
    for step in range(1, 6):
        log.log(step, {"train/loss": float(step)})
    mark = log.mark()
    log.close()

    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    if alter is not None:
        path.write_text("".join(alter(lines)))
    RunLog(tmp_path, enabled=True, resume_step=5, mark=mark).close()
    assert ("metrics.jsonl has lost or changed lines" in capsys.readouterr().out) == told


def test_ranks_that_do_not_write_have_no_mark(tmp_path):
    assert RunLog(tmp_path, enabled=False).mark() == {}


class StandInWandb:
    """What the log uses of wandb."""

    def __init__(self):
        self.calls, self.summary = [], {}

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb_gets_the_scalars_too(tmp_path, monkeypatch):
    wandb = StandInWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    settings = {"objective": "igd", "output_dir": str(tmp_path)}
    run = {"report_to": "wandb", "settings": settings}

    log = RunLog(tmp_path, True, resume_step=0, **run)
    log.log(1, {"train/loss": 2.0, "train/nll": 1.0})
    log.hparams(settings, {"best_validation": 0.5})
    log.close()
    (_, begun), *rest = wandb.calls
    assert begun["config"] == settings and begun["project"] == "mine"
    assert begun["name"] == tmp_path.name and begun["dir"] == str(tmp_path)
    assert rest == [("log", 1, {"train/loss": 2.0, "train/nll": 1.0}), ("finish",)]
    assert wandb.summary == {"best_validation": 0.5}

    # A resumed run goes on with the same run at Weights & Biases; other ranks send nothing.
    wandb.calls.clear()
    RunLog(tmp_path, True, resume_step=1, **run).close()
    assert wandb.calls[0][1]["id"] == begun["id"] and begun["resume"] == "allow"
    wandb.calls.clear()
    RunLog(tmp_path, False, **run).close()
    RunLog(tmp_path, True).close()
    assert wandb.calls == []


def test_wandb_that_is_not_installed_is_told_before_training(monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    options = {"ds_config": "zero1", "dataset": "data", "output_dir": "run"}
    training.LoopOptions(**options).check()
    with pytest.raises(UsageError, match="wandb is not installed; pip install wandb"):
        training.LoopOptions(**options, report_to="wandb").check()
