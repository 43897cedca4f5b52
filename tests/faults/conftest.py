"""The fault campaign's inputs, and what its commands give when nobody disturbs them."""

import functools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

import faults_world  # noqa: E402
import ranks  # noqa: E402
from operations import Fault, faulty  # noqa: E402


@dataclass(frozen=True)
class Campaign:
    """The commands, their undisturbed results, and how to disturb them."""

    folder: Path
    commands: dict[str, faults_world.Command]
    undisturbed: Callable[[str], tuple[Path, int]]
    """Name of a command → its result and the number of its file operations."""

    def run(self, name: str, output: Path, log: Path, fault: Fault | None = None) -> list[int]:
        """Run a command; return the exit codes of its ranks."""
        command = self.commands[name]
        words = command.words(output)
        if fault is None:
            processes = ranks.start(command.size, log, ranks.entry, command.main, words)
        else:
            processes = ranks.start(command.size, log, faulty, fault, command.main, words)
        if fault is not None and fault.at and fault.kind == "kill":
            processes[0].join(120)
            for process in processes[1:]:  # as a launcher does
                process.kill()
        return ranks.wait(processes, 120)


@pytest.fixture(scope="session")
def campaign(tmp_path_factory) -> Campaign:
    """Build the inputs once per session."""
    ranks.warm_up()
    folder = tmp_path_factory.mktemp("faults")
    ranks.run(1, folder / "log", faults_world.build, folder)
    commands = faults_world.commands(folder)

    @functools.cache
    def undisturbed(name: str) -> tuple[Path, int]:
        place = folder / "whole" / name
        place.mkdir(parents=True)
        fault = Fault(place, place / "journal")
        whole = Campaign(folder, commands, undisturbed)
        codes = whole.run(name, place / "output", place / "log", fault)
        text = (place / "log").read_text()
        assert codes == [0] * commands[name].size, f"{codes}\n{text[-4000:]}"
        return place / "output", len((place / "journal").read_text().splitlines())

    # What evaluation and report read.
    whole = Campaign(folder, commands, undisturbed)
    shutil.copytree(undisturbed("full")[0], folder / "trained")
    log = folder / "evaluation.log"
    codes = whole.run("evaluation", folder / "trained" / "eval" / "test", log)
    assert codes == [0], log.read_text()[-4000:]
    return whole
