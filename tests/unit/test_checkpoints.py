"""Damaged, foreign and lost files of a run: what is told, and what goes on."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from igd_ds.config.options import option, parse
from igd_ds.config.training import LoopOptions
from igd_ds.engine import checkpoint as module
from igd_ds.engine import universal
from igd_ds.engine.checkpoint import (
    Manifest,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    update_state,
)
from igd_ds.errors import UsageError
from igd_ds.run_folder import claim_run_folder, read_summary
from igd_ds.runlog import RunLog, drop_entries_after

# ---- checkpoints ----


class Engine:
    """What saving and loading use of a DeepSpeed engine."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = torch.nn.Linear(3, 2)

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        (Path(folder) / tag).mkdir()
        for name in ("a.pt", "b.pt"):
            torch.save(self.module.state_dict(), Path(folder) / tag / name)

    def load_checkpoint(self, folder, tag, load_module_strict):
        assert not universal.PATTERN_CHARACTERS & set(folder)
        self.module.load_state_dict(torch.load(Path(folder) / tag / "a.pt"))
        return tag, {}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return RUN/checkpoints with three checkpoints, below a name that looks like a pattern."""
    folder = tmp_path / "run [ab]*" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (1, 2, 3):
        save_checkpoint(Engine(), folder, {"step": step, "tau": 0.25}, 9, without_frozen=False)
    return folder


def newest(folder: Path, capsys) -> tuple[str | None, list[str]]:
    """Return the newest whole checkpoint, and the warnings."""
    capsys.readouterr()
    tag = newest_checkpoint(folder)
    return tag, capsys.readouterr().out.splitlines()


def flip(path: Path, at: int = -9) -> None:
    """Flip one bit; the size stays."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_whole_checkpoints_load(folder, capsys):
    assert newest(folder, capsys) == ("step-00000003", [])
    update_state(folder, {"step": 3, "tau": 0.5})
    assert newest(folder, capsys) == ("step-00000003", [])
    assert load_checkpoint(Engine(), folder, "step-00000003", False) == {"step": 3, "tau": 0.5}
    save_checkpoint(Engine(), folder, {"step": 4}, 2, without_frozen=False)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]


DAMAGES = {
    "flipped bit": (lambda c: flip(c / "b.pt"), "is damaged (the SHA-256 of b.pt is not the one"),
    "cut file": (lambda c: os.truncate(c / "a.pt", 5), "is not complete (a.pt has 5 of "),
    "lost file": (lambda c: (c / "a.pt").unlink(), "is not complete (a.pt has 0 of "),
    "lost manifest": (lambda c: (c / "manifest.json").unlink(), "is not complete (the process was"),
    "empty manifest": (
        lambda c: (c / "manifest.json").write_text(""),
        "is damaged (manifest.json ",
    ),
    "no object": (lambda c: (c / "manifest.json").write_text("[]"), "is damaged (manifest.json "),
    "other object": (lambda c: (c / "manifest.json").write_text("{}"), "is damaged (manifest.json"),
    "bad byte": (
        lambda c: (c / "manifest.json").write_bytes(b"\xff" + (c / "manifest.json").read_bytes()),
        "is damaged (manifest.json cannot be read",
    ),
    "other number": (
        lambda c: (c / "manifest.json").write_text(
            (c / "manifest.json").read_text().replace("0.25", "0.26")
        ),
        "is damaged (manifest.json has changed",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_older_checkpoint_is_used_when_the_newest_is_not_whole(folder, capsys, kind):
    damage, reason = DAMAGES[kind]
    damage(folder / "step-00000003")
    tag, (warning,) = newest(folder, capsys)
    assert tag == "step-00000002"
    assert warning.startswith("warning: checkpoint step-00000003 " + reason)
    assert warning.endswith(" and is removed")
    # It is gone, so that pruning never counts it.
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_run_without_any_whole_checkpoint_begins_anew_and_says_so(folder, capsys):
    for step in (1, 2, 3):
        flip(folder / f"step-{step:08d}" / "a.pt")
    tag, warnings = newest(folder, capsys)
    assert tag is None and len(warnings) == 4
    assert "no whole checkpoint left: the run begins anew" in warnings[-1]
    assert newest(folder, capsys) == (None, [])


def test_checkpoints_of_earlier_versions_are_used(folder, capsys):
    path = folder / "step-00000003" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("sha256", "digest")}))
    assert newest(folder, capsys) == ("step-00000003", [])
    assert Manifest.read(path.parent).sha256 == {}


def test_a_checkpoint_of_another_user_is_refused_unless_it_is_trusted(folder, monkeypatch):
    """DeepSpeed's files are pickles."""
    own = os.stat(folder / "step-00000003" / "b.pt").st_uid
    monkeypatch.setattr(module.os, "geteuid", lambda: own + 1)
    # A file system that gives all files to one user is no reason to refuse.
    assert newest_checkpoint(folder) == "step-00000003"

    fields = list(os.stat(folder))
    fields[4] = own + 1  # st_uid
    monkeypatch.setattr(module.os, "fstat", lambda _: os.stat_result(fields))
    with pytest.raises(UsageError, match=rf"step-00000003 .*id {own}\).*add --trust_checkpoint"):
        newest_checkpoint(folder)
    assert newest_checkpoint(folder, trust=True) == "step-00000003"
    assert len(list(folder.iterdir())) == 3


def test_what_a_killed_conversion_left_is_removed(folder):
    left = folder / "universal.tmp-1" / "step-00000003"
    left.mkdir(parents=True)
    assert newest_checkpoint(folder) == "step-00000003" and not left.parent.exists()


def test_a_conversion_that_fails_leaves_the_checkpoint_and_nothing_else(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    usage = shutil.disk_usage(folder)._replace(free=10)
    monkeypatch.setattr(universal.shutil, "disk_usage", lambda _: usage)
    with (
        pytest.raises(UsageError, match="converting step-00000002 .* needs about"),
        universal._converted(folder / "step-00000002", stage=2),
    ):
        raise AssertionError("nothing is converted")
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@dataclasses.dataclass
class ZeroEngine:
    """What decides whether a universal checkpoint can be loaded."""

    stage: int
    nvme: bool = False
    shares: tuple[object, ...] = ()
    """Per parameter of the only group: what this rank holds of it, or None."""

    def zero_optimization_stage(self):
        return self.stage

    def zero_nvme_offload_optimizer(self):
        return self.nvme

    @property
    def optimizer(self):
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in self.shares]
        for parameter, share in zip(parameters, self.shares, strict=True):
            parameter._hp_mapping = share
        self.bit16_groups = [parameters]
        return self


def test_engines_that_cannot_load_a_universal_checkpoint_are_refused():
    universal._check_engine(ZeroEngine(2, shares=(None, "a part")))
    universal._check_engine(ZeroEngine(3))
    with pytest.raises(UsageError, match="lie on NVMe"):
        universal._check_engine(ZeroEngine(3, nvme=True))
    with pytest.raises(UsageError, match="1 ranks are too many for this small model"):
        universal._check_engine(ZeroEngine(1, shares=(None, None)))


# ---- the run folder ----

DS = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LoopOptions):
    """Settings of a training whose loss may depend on the micro-batch."""

    normalization: str = option("how Ω is taken", "global")


def options(run: Path, **settings) -> Options:
    usual = {"ds_config": "ds.json", "dataset": "data", "output_dir": str(run)}
    return Options(**usual | settings)


@pytest.fixture
def run(tmp_path) -> Path:
    """Return a run that has made steps and saved a checkpoint."""
    run = tmp_path / "run"
    claim_run_folder(run, options(run), DS, world_size=2)
    (run / "checkpoints" / "step-00000001").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


@pytest.mark.parametrize("lost", ["metrics.jsonl", "checkpoints"])
def test_a_run_stays_a_run_when_a_file_of_it_is_lost(run, capsys, lost):
    """New settings never go on with an old checkpoint."""
    path = run / lost
    path.rename(run.parent / "lost")
    with pytest.raises(UsageError, match="holds a run already"):
        claim_run_folder(run, options(run, learning_rate=1.0), DS, world_size=2)
    with pytest.raises(UsageError, match="settings differ: learning_rate"):
        claim_run_folder(run, options(run, learning_rate=1.0, resume="auto"), DS, world_size=2)

    claim_run_folder(run, options(run, resume="auto"), DS, world_size=2)
    told = "metrics.jsonl is missing; the log begins anew" in capsys.readouterr().out
    assert told == (lost == "metrics.jsonl")


def test_a_run_that_never_came_to_a_step_is_free(tmp_path):
    run = tmp_path / "run"
    for rate in (1.0, 2.0):
        claim_run_folder(run, options(run, learning_rate=rate), DS, world_size=2)
    assert "learning_rate: 2.0" in (run / "config.yaml").read_text()


def test_a_run_does_not_go_on_with_a_file_that_has_changed(run):
    """The path in config.yaml is the same."""
    shutil.rmtree(run)
    content = {"prompt": {"prefix": "Recent:"}, "model_config": "abc"}
    claim_run_folder(run, options(run), DS, 2, content)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    resumed = options(run, resume="auto")
    claim_run_folder(run, resumed, DS, 2, content)
    with pytest.raises(UsageError, match="the content of --prompt has changed since"):
        claim_run_folder(run, resumed, DS, 2, content | {"prompt": {"prefix": "Met:"}})

    claim_run_folder(run, resumed, DS, 2, content | {"recorded_by_a_later_version": 1})

    (run / "inputs.json").unlink()  # a run of an earlier version
    claim_run_folder(run, resumed, DS, 2, content | {"model_config": "def"})


def test_a_folder_with_a_config_yaml_of_the_users_is_not_claimed(tmp_path):
    """Its config.yaml would be replaced, and its catalogue/ deleted."""
    (tmp_path / "config.yaml").write_text("learning_rate: 1.0  # mine\n")
    (tmp_path / "catalogue").mkdir()
    with pytest.raises(UsageError, match="is not empty, and its config.yaml is not that of such"):
        claim_run_folder(tmp_path, options(tmp_path), DS, world_size=2)
    assert (tmp_path / "config.yaml").read_text() == "learning_rate: 1.0  # mine\n"
    assert (tmp_path / "catalogue").is_dir()


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json", "env.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe{", b"{a: [", None])
def test_damaged_records_of_a_run_are_named(run, name, content):
    if content is None:
        (run / name).unlink()
        message = "holds no run" if name == "config.yaml" else "missing or damaged"
    else:
        (run / name).write_bytes(content)
        message = "missing or damaged"
    with pytest.raises(UsageError, match=message) as caught:
        claim_run_folder(run, options(run, resume="auto"), DS, world_size=2)
    text = str(caught.value)
    assert "\n" not in text and (name in text or content is None)


def test_the_micro_batch_is_free_on_another_number_of_ranks(run):
    other = DS | {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    resumed = options(run, resume="auto")
    claim_run_folder(run, resumed, DS | {"gradient_accumulation_steps": 8}, world_size=1)
    claim_run_folder(run, resumed, other, world_size=1)
    with pytest.raises(UsageError, match=r"train_micro_batch_size_per_gpu \(2 then, 4 now\)"):
        claim_run_folder(run, resumed, other, world_size=2)


def test_the_micro_batch_is_not_free_where_the_loss_depends_on_it(tmp_path):
    run = tmp_path / "run"
    per_batch = options(run, normalization="per_batch", resume="auto")
    claim_run_folder(run, per_batch, DS, world_size=2)
    (run / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match="train_micro_batch_size_per_gpu"):
        claim_run_folder(run, per_batch, DS | {"train_micro_batch_size_per_gpu": 4}, world_size=1)


def test_other_keys_of_the_deepspeed_file_are_named(run):
    resumed = options(run, resume="auto")
    other = DS | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}}
    with pytest.raises(UsageError, match=r"zero_optimization.reduce_bucket_size \(None then, 5"):
        claim_run_folder(run, resumed, other, world_size=1)
    with pytest.raises(UsageError, match="begun at ZeRO stage 2, and --ds_config now says stage 3"):
        claim_run_folder(run, resumed, DS | {"zero_optimization": {"stage": 3}}, world_size=1)


def test_a_damaged_summary_is_told_and_ignored(tmp_path, capsys):
    assert read_summary(tmp_path) is None
    whole = {"dataset": "abc", "best": 1.5, "step": 4}
    (tmp_path / "summary.json").write_text(json.dumps(whole))
    assert read_summary(tmp_path) == whole and not capsys.readouterr().out
    for content in (b"", b"[]", b"{}", b"\xff", b'{"dataset": "a'):
        (tmp_path / "summary.json").write_bytes(content)
        assert read_summary(tmp_path) is None
        text = capsys.readouterr().out
        assert text.count("\n") == 1 and "summary.json is damaged" in text


# ---- metrics.jsonl ----

LINES = [
    b'{"step": 2, "train/loss": 3.0}\n',
    b'{"step": 4, "train/loss": 2.0}\n',
    b'{"step": 4, "valid/nll": 9.0}\n',
    b'{"step": 6, "train/loss": 1.0}\n',
]


@pytest.mark.parametrize(
    "bad", [b'{"step": 3, "train/loss": \xff}\n', b"\x00\x00\n", b"[]\n", b'{"step": "x"}\n', b"\n"]
)
def test_a_damaged_line_is_dropped_alone(tmp_path, capsys, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([LINES[0], bad, *LINES[1:], b'{"step": 7, "tr']))
    entries = drop_entries_after(path, 4)
    assert path.read_bytes() == b"".join(LINES[:3])
    assert entries == [json.loads(line) for line in LINES[:3]]
    text = capsys.readouterr().out
    assert text == f"warning: {path}, line 2 is damaged and is dropped\n"


@pytest.mark.parametrize("validated", [2, 4])
def test_a_validation_that_the_run_does_not_know_of_is_made_again(tmp_path, validated):
    """A process was killed between the log line and the checkpoint's note of the validation."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, enabled=True)
    for line in LINES:
        entry = json.loads(line)
        log.log(entry.pop("step"), entry)
    log.close()

    log = RunLog(tmp_path, True, resume_step=4, validated=validated)
    if validated < 4:
        log.log(4, {"valid/nll": 9.0})
    log.log(6, {"train/loss": 1.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(LINES)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("valid/nll")] == [(4, 9.0)]
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(2, 3), (4, 2), (6, 1)]


# ---- settings ----


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1"])
@pytest.mark.parametrize("name", ["learning_rate", "max_grad_norm"])
def test_no_rate_or_norm_that_cannot_train(name, value):
    words = ["--ds_config", "a", "--dataset", "b", "--output_dir", "c", f"--{name}", value]
    with pytest.raises(UsageError, match=f"--{name} must be positive and finite"):
        parse(LoopOptions, words)
