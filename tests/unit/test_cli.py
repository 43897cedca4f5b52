"""The command `igd`: its overview, its subcommands' help, and what it answers to a mistake."""

import importlib
import re
import subprocess
import sys

import pytest

from igd_ds import cli
from igd_ds.cli import COMMANDS, dispatch
from igd_ds.errors import EXIT_USAGE, UsageError


def igd(*words) -> subprocess.CompletedProcess:
    """Run `igd` in a process of its own."""
    command = [sys.executable, "-m", "igd_ds.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_lists_all_subcommands(capsys, words):
    assert dispatch(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: igd SUBCOMMAND")
    assert re.findall(r"^  (\w+) ", text, re.MULTILINE) == list(COMMANDS)
    assert all(what in text for _, what in COMMANDS.values())


@pytest.mark.parametrize(
    ("words", "near"), [(["trian"], "train"), (["baselin", "--help"], "baseline"), (["xyz"], None)]
)
def test_an_unknown_subcommand_names_the_nearest_one(words, near):
    with pytest.raises(UsageError) as caught:
        dispatch(words)
    hint = f", did you mean '{near}'?" if near else ""
    known = ", ".join(COMMANDS)
    assert str(caught.value) == f"igd: no subcommand '{words[0]}'{hint} (known: {known})"


def test_a_process_ends_a_mistake_with_one_line_and_exit_code_2():
    done = igd("evall", "--model", "RUN")
    assert done.returncode == EXIT_USAGE == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: igd: no subcommand 'evall', did you mean 'eval'? (known: ")


def test_a_process_shows_the_overview():
    done = igd("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.strip() == cli.usage()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_explains_itself(capsys, monkeypatch, name):
    """`igd NAME --help` describes the subcommand, names its flags and ends with 0."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        dispatch([name, "--help"])
    assert ended.value.code in (0, None)
    text = capsys.readouterr().out
    assert text.startswith(f"usage: igd {name} ") and "--help" in text
    assert sys.argv == [f"igd {name}", "--help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_refuses_an_unknown_flag(capsys, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as ended:
        dispatch([name, "--no_such_flag", "1"])
    assert ended.value.code == EXIT_USAGE
    assert f"usage: igd {name} " in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_subcommand(monkeypatch):
    """The words behind the subcommand reach its main as the arguments of the process."""
    seen = []

    def main():
        seen.append(list(sys.argv))
        return 85

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(importlib.import_module(COMMANDS["train"][0]), "main", main)
    assert dispatch(["train", "--epochs", "3"]) == 85
    assert seen == [["igd train", "--epochs", "3"]]
