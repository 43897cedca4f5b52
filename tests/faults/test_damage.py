"""Files that were altered: each is named in one line, or an older one is taken and that is said.

What may never happen is another result with exit code 0, or a traceback.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import results
from faults_world import ALL
from operations import Fault


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def flip_data(path: Path) -> None:
    """Flip a bit in the scores of a Parquet file; a small file is mostly schema."""
    group = pq.read_metadata(path).row_group(0)
    column = group.column(group.num_columns - 3)  # the score
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start + column.total_compressed_size - 1] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    """Leave nothing of a file."""
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bad_byte(path: Path) -> None:
    """Put a byte that is no UTF-8 into a file of text."""
    content = path.read_bytes()
    middle = content.index(b"\n", len(content) // 3)
    path.write_bytes(content[:middle] + b"\xff" + content[middle:])


Alteration = Callable[[Path], None]
NEWEST = "checkpoints/step-00000006"
# A training whose summary is missing, as after a kill: altered file and how.
UNFINISHED: list[tuple[str, Alteration]] = [
    (f"{NEWEST}/mp_rank_00_model_states.pt", flip),
    (f"{NEWEST}/zero_pp_rank_0_mp_rank_00_optim_states.pt", flip),
    (f"{NEWEST}/zero_pp_rank_0_mp_rank_00_optim_states.pt", cut),
    (f"{NEWEST}/manifest.json", empty),
    ("catalogue/gain.npy", flip),
    ("catalogue/child_begin.npy", flip),
    ("config.yaml", empty),
    ("metrics.jsonl", bad_byte),
    (f"{NEWEST}/mp_rank_00_model_states.pt", empty),
    (f"{NEWEST}/manifest.json", flip),
    ("catalogue/token_ids.npy", flip),
    ("catalogue/catalogue.json", empty),
    ("catalogue/catalogue.json", cut),
    ("config.yaml", cut),
    ("env.json", empty),
]
# A finished training, which is started again.
FINISHED: list[tuple[str, Alteration]] = [("summary.json", empty), ("summary.json", cut)]
# A finished training that is evaluated.
EVALUATED: list[tuple[str, Alteration]] = [
    ("model/model.safetensors", flip),
    ("model/catalogue/gain.npy", flip),
    ("model/catalogue/child_begin.npy", flip),
    ("model/model.safetensors", cut),
    ("model/catalogue/token.npy", flip),
    ("model/catalogue/catalogue.json", empty),
    ("model/igd_ds.json", empty),
    ("model/config.json", empty),
    ("model/tokenizer.json", cut),
]
# An evaluation that was killed between its parts and its end.
PARTS: list[tuple[str, Alteration]] = [
    ("request.json", empty),
    ("parts/*", flip_data),
    ("parts/*", cut),
    ("request.json", cut),
    ("parts/*", empty),
]
# A run with its evaluation, of which a report is made.
REPORTED: list[tuple[str, Alteration]] = [
    ("eval/test/metrics.json", empty),
    ("summary.json", empty),
    ("config.yaml", cut),
    ("metrics.jsonl", bad_byte),
    ("eval/test/metrics.json", cut),
]
HARMLESS = {"metrics.jsonl"}
"""Files whose damage costs a report a point of a curve."""
TOLD_BY_FOLDER = {"config.yaml"}
"""Files whose damage reads as other settings: the message names the folder."""
DEFAULT = {id(UNFINISHED): 8, id(EVALUATED): 3, id(PARTS): 3, id(REPORTED): 4}


def alterations(table: list[tuple[str, Alteration]]) -> pytest.MarkDecorator:
    """Return the parameters (file, alter) of a test: the first few of a table, or all."""
    chosen = table if ALL else table[: DEFAULT.get(id(table), len(table))]
    ids = [f"{name} {alter.__name__}" for name, alter in chosen]
    return pytest.mark.parametrize(("name", "alter"), chosen, ids=ids)


def altered(campaign, source: Path, folder: Path, name: str, alter: Alteration) -> Path:
    """Copy a folder and alter one of its files; return the copy."""
    shutil.copytree(source, folder)
    path = sorted(folder.glob(name))[0]
    before = path.read_bytes()
    alter(path)
    assert path.read_bytes() != before
    return folder


def check_told(codes: list[int], text: str, file: str) -> bool:
    """Check that the altered file is named; return whether the command went on without it."""
    assert "Traceback" not in text, text[-4000:]
    assert set(codes) in ({0}, {2}), f"{codes}\n{text[-4000:]}"
    names = [line for line in text.splitlines() if Path(file).name in line or file in line]
    if codes[0] == 2:
        last = text.strip().splitlines()[-1]
        assert last.startswith("error: "), text[-2000:]
    assert names, f"nothing names {file}:\n{text[-3000:]}"
    return codes[0] == 0


@alterations(UNFINISHED)
def test_a_training_tells_what_was_altered(campaign, tmp_path, name, alter):
    whole = campaign.undisturbed("full")[0]
    output = altered(campaign, whole, tmp_path / "output", name, alter)
    (output / "summary.json").unlink()
    codes = campaign.run("full", output, tmp_path / "log")
    file = name if not name.startswith(NEWEST) else Path(NEWEST).name
    file = str(output) if name in TOLD_BY_FOLDER else file
    if not check_told(codes, (tmp_path / "log").read_text(), file):
        return
    if name == "metrics.jsonl":  # the damaged line is dropped
        assert len(results.log_of(output)) == len(results.log_of(whole)) - 1
        shutil.copy(whole / name, output / name)
    results.check_same("full", output, whole)


@pytest.mark.skipif(not ALL, reason="one of the cases of make faults")
@pytest.mark.parametrize("alter", [empty, cut])
def test_a_training_tells_that_its_log_lost_lines(campaign, tmp_path, alter):
    whole = campaign.undisturbed("full")[0]
    output = altered(campaign, whole, tmp_path / "output", "metrics.jsonl", alter)
    (output / "summary.json").unlink()
    codes = campaign.run("full", output, tmp_path / "log")
    check_told(codes, (tmp_path / "log").read_text(), "metrics.jsonl")


@alterations(FINISHED)
def test_a_finished_training_tells_what_was_altered(campaign, tmp_path, name, alter):
    whole = campaign.undisturbed("full")[0]
    output = altered(campaign, whole, tmp_path / "output", name, alter)
    codes = campaign.run("full", output, tmp_path / "log")
    if check_told(codes, (tmp_path / "log").read_text(), name):
        results.check_same("full", output, whole)


@alterations(EVALUATED)
def test_an_evaluation_tells_what_was_altered_in_the_model(campaign, tmp_path, name, alter):
    run = altered(campaign, campaign.folder / "trained", tmp_path / "run", name, alter)
    command = campaign.commands["evaluation"]
    model = str(campaign.folder / "trained" / "model")
    words = tuple(str(run / "model") if word == model else word for word in command.flags)
    changed = {"evaluation": dataclasses.replace(command, flags=words)}
    codes = dataclasses.replace(campaign, commands=changed).run(
        "evaluation", tmp_path / "output", tmp_path / "log"
    )
    assert codes == [2] or "catalogue" in name, "altered weights must not be used"
    if check_told(codes, (tmp_path / "log").read_text(), name):
        results.check_same("evaluation", tmp_path / "output", campaign.undisturbed("evaluation")[0])


@pytest.fixture(scope="module")
def stopped(campaign, tmp_path_factory) -> Path:
    """Return the output of an evaluation that was killed when it had parts."""
    whole, count = campaign.undisturbed("evaluation")
    folder = tmp_path_factory.mktemp("stopped")
    for at in range(count * 2 // 3, 0, -1):
        shutil.rmtree(folder / "output", ignore_errors=True)
        fault = Fault(folder, folder / "journal", at)
        campaign.run("evaluation", folder / "output", folder / "log", fault)
        if list((folder / "output").glob("parts/*")):
            return folder / "output"
    raise AssertionError("there are no parts")


@alterations(PARTS)
def test_an_interrupted_evaluation_tells_what_was_altered(campaign, stopped, tmp_path, name, alter):
    output = altered(campaign, stopped, tmp_path / "output", name, alter)
    codes = campaign.run("evaluation", output, tmp_path / "log")
    if check_told(codes, (tmp_path / "log").read_text(), "part" if "parts" in name else name):
        results.check_same("evaluation", output, campaign.undisturbed("evaluation")[0])


@alterations(REPORTED)
def test_a_report_tells_what_was_altered(campaign, tmp_path, name, alter):
    """The report names the file or the run, and goes on without it."""
    from igd_ds.commands import report

    run = altered(campaign, campaign.folder / "trained", tmp_path / "altered", name, alter)
    good = campaign.folder / "trained"
    command = campaign.commands["report"]
    both = dataclasses.replace(command, flags=(str(good), str(run)))
    assert both.main is report.main
    codes = dataclasses.replace(campaign, commands={"report": both}).run(
        "report", tmp_path / "output", tmp_path / "log"
    )
    text = (tmp_path / "log").read_text()
    assert check_told(codes, text, "altered" if name in HARMLESS else name)
    assert (tmp_path / "output" / "index.html").is_file()
