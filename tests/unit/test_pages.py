"""The report as a reader gets it: page, files and bytes, also of studies with incomplete runs."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import chromium
import pytest
import sample_study
from PIL import Image

from igd_ds.studies.report import pages
from igd_ds.studies.report.drawing import Figure
from igd_ds.studies.report.figures import all_figures
from igd_ds.studies.report.layout import Cell, Table
from igd_ds.studies.report.overview_tables import cost
from igd_ds.studies.report.pages import render
from igd_ds.studies.report.study import Run, load
from igd_ds.studies.report.tables import all_tables

FAILED = "RuntimeError: <b>out of memory</b> & more"


MEASURE = """<script>onload = () => {
  const measured = box => [box.scrollWidth - box.clientWidth, box.scrollHeight - box.clientHeight,
    getComputedStyle(box).overflowX]
  const boxes = [...document.querySelectorAll(".box")].map(measured)
  const page = document.documentElement
  document.title = JSON.stringify([page.scrollWidth - page.clientWidth, boxes])
}</script>"""
"""Puts into the title what sticks out of the page and of each box of a table, in pixels."""


class Reader(HTMLParser):
    """What a page holds: text of each table's cells, ids, links, and the tags it uses."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.ids, self.links, self.tags, self.text, self.in_cell = (
            [],
            [],
            [],
            set(),
            "",
            False,
        )
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [
            value for name, value in attributes.items() if name in ("href", "xlink:href", "src")
        ]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(filter(None, attributes.values())))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def study():
    study = sample_study.make(2)
    failed = dataclasses.replace(
        study.runs[0], name="books-failed", seed=8, state="failed", note=FAILED
    )
    large = [
        Run(
            f"books-full-{seed}",
            "books-full",
            "LLaMA3-8B",
            "igd β=0.1",
            "books-full",
            seed,
            "not run",
        )
        for seed in range(3)
    ]
    return dataclasses.replace(study, runs=[*study.runs, failed, *large])


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "report"
    render(study, folder, "make <everything> && make 'report'")
    return folder


@pytest.fixture(scope="module")
def small(study):
    """A study that is quick to draw."""
    return dataclasses.replace(study, runs=study.runs[:1], rows={})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_loads_in_a_browser(report, tmp_path, width):
    page = chromium.load((report / "index.html").as_uri(), tmp_path, width=width)
    assert page.console == [] and page.requests == []

    found, kept = Reader(page.dom), load(report / "data")
    left_out, *shown = found.tables
    assert left_out == [["run", "state", "why"], ["books-failed", "failed", FAILED]]

    tables = all_tables(kept)
    assert (
        shown
        == [
            [table.columns, *([cell.text for cell in row] for row in table.rows)]
            for table in tables
        ]
        and len(shown) > 10
    )

    texts = [
        text for thing in (*tables, *all_figures(kept)) for text in (thing.title, thing.caption)
    ]
    texts += [note for table in tables for note in table.notes]
    assert all(text in found.text for text in texts)
    assert found.tags.isdisjoint({"script", "img", "link", "iframe"})

    light = Image.open(page.screenshot).convert("L")
    dark = sum(light.histogram()[:128]) / (light.width * light.height)
    assert light.width >= width and 0.005 < dark < 0.5  # ink on paper


def sticking_out(folder: Path, tmp_path: Path, width: int) -> tuple[int, list[list]]:
    """Measure the page of a report in a window: see MEASURE."""
    text = re.sub(r"<meta http-equiv=.*>", "", (folder / "index.html").read_text())
    (tmp_path / "measured.html").write_text(text + MEASURE)
    page = chromium.load((tmp_path / "measured.html").as_uri(), tmp_path, width=width)
    [title] = re.findall(r"<title>(.*)</title>", page.dom)
    return json.loads(title)


def test_every_table_fits_1280_pixels_and_none_scrolls(study, tmp_path):
    """Also with all six measures, long names and words that no browser breaks by itself."""
    runs = []
    for run in study.runs:
        test = json.loads(json.dumps(run.test))
        for entry in test["alpha"].values() if test else ():
            entry["repeat_rate"] = {"first": 0.5, "top10": 0.25}
            for match in ("item_match", "token_match"):
                entry[match] |= {"ndcg@20": 0.123456, "hr@20": 0.123456}
        backbone = "Meta-Llama-3.1-8B-Instruct" if run.backbone else ""
        name = f"{run.name}-{'without_any_break' * 5}"
        runs.append(dataclasses.replace(run, name=name, backbone=backbone, test=test))
    shown = ["A title of " + "many words " * 12, "One" + "word" * 30, "Short"]
    example = {
        "dataset": "books-small", "backbone": runs[0].backbone, "row": 7, "history": shown,
        "target": "Short", "lists": {"uniform": shown, "SASRec": shown[::-1]},
    }  # fmt: skip
    wide = dataclasses.replace(study, runs=runs, examples=[example])
    render(wide, tmp_path / "report")

    page, boxes = sticking_out(tmp_path / "report", tmp_path, 1280)
    tables = all_tables(wide)
    assert max(len(table.columns) for table in tables) > 15 and len(boxes) == len(tables) + 1
    assert page == 0 and all(box == [0, 0, "visible"] for box in boxes)

    # A narrow window shows the page as it is and scrolls the tables that are wider.
    page, boxes = sticking_out(tmp_path / "report", tmp_path, 600)
    assert page == 0 and {how for *_, how in boxes} == {"auto"} and max(boxes)[0] > 0


def test_datasets_whose_names_make_one_file_name_keep_their_tables(study, tmp_path):
    renamed = {"books-small": "книги", "instruments": "ноты"}
    runs = [dataclasses.replace(run, dataset=renamed.get(run.dataset, "x")) for run in study.runs]
    tables = all_tables(dataclasses.replace(study, runs=runs))
    names = [table.name for table in tables]
    assert len(set(names)) == len(names) and {"main", "main-2"} <= set(names)


def test_the_browser_tells_what_a_page_does(tmp_path):
    """What the test above trusts in."""
    (tmp_path / "page.html").write_text(
        '<img src="http://a.example/b.png"><p id=p></p>'
        '<script>p.innerHTML = "<b>now</b>"; no()</script>'
    )
    page = chromium.load((tmp_path / "page.html").as_uri(), tmp_path)
    assert page.requests == ["http://a.example/b.png"] and "<b>now</b>" in page.dom
    assert len(page.console) == 1 and "no is not defined" in page.console[0]


def test_links_and_ids_of_the_page(report):
    page = Reader((report / "index.html").read_text())
    assert len(set(page.ids)) == len(page.ids)
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside <= set(page.ids) and len(inside) > 30
    outside = {link for link in page.links if not link.startswith("#")}
    written = {
        str(path.relative_to(report))
        for name in ("tables", "figures")
        for path in (report / name).iterdir()
    }
    assert outside == written and not any(path.stat().st_size == 0 for path in report.rglob("*"))


def test_the_markdown_links_what_is_there(study, report):
    text = (report / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)]+)\)", text))
    assert linked == {"index.html", "data"} | {
        f"figures/{path.name}" for path in (report / "figures").glob("*.png")
    }
    assert all(table.markdown() in text for table in all_tables(load(report / "data")))
    assert "make <everything> && make 'report'" in text and study.budget in text
    assert r"* books-failed (failed): RuntimeError: \<b\>out of memory\</b\> \& more" in text


def test_every_table_is_written_three_times(report):
    tables = all_tables(load(report / "data"))
    assert {path.name for path in (report / "tables").iterdir()} == {
        f"{t.name}.{kind}" for t in tables for kind in ("csv", "md", "tex")
    }
    for table in tables:
        for kind, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
            assert (report / "tables" / f"{table.name}.{kind}").read_text() == text


def test_markup_in_names_is_shown_not_obeyed(small, tmp_path):
    evil = "<script>document.title = 'x'</script> *a* & \"b\" {{ 7 * 7 }}"
    run = dataclasses.replace(small.runs[0], name=evil, state="failed", note=evil)
    render(
        dataclasses.replace(small, name=evil, budget=evil, runs=[run]), tmp_path / "report", evil
    )
    page = Reader((tmp_path / "report" / "index.html").read_text())
    assert "script" not in page.tags and page.text.count(evil) >= 5


def test_equal_studies_give_equal_bytes(report, study, tmp_path):
    code = "import sys; from pathlib import Path\n"
    code += "from igd_ds.studies.report.pages import render\n"
    code += "from igd_ds.studies.report.study import load\n"
    code += "render(load(Path(sys.argv[1])), Path(sys.argv[2]))"
    environment = os.environ | {"PYTHONHASHSEED": "3", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    command = [sys.executable, "-c", code, report / "data", tmp_path / "again"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "again") == bytes_of(report)


def test_a_report_is_replaced_whole_or_not_at_all(small, tmp_path, monkeypatch):
    folder = tmp_path / "report"
    render(small, folder)
    before = bytes_of(folder)
    monkeypatch.setattr(pages, "markdown", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        render(dataclasses.replace(small, name="other"), folder)
    assert bytes_of(folder) == before and list(tmp_path.iterdir()) == [folder]
    monkeypatch.undo()
    render(dataclasses.replace(small, catalogues={}), folder)
    assert "figures/purity.png" in before and not (folder / "figures/purity.png").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_the_old_report_is_whole_until_the_new_one_is_in_its_place(small, tmp_path, monkeypatch):
    folder = tmp_path / "report"
    render(small, folder)
    before, rename = bytes_of(folder), os.rename

    def killed(source, target):
        if Path(target) == folder:
            raise OSError("killed")
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(OSError, match="killed"):
        render(dataclasses.replace(small, name="other"), folder)
    [old] = tmp_path.iterdir()
    assert old.name == ".report.replaced-by-igd" and bytes_of(old) == before

    monkeypatch.undo()
    render(small, folder)
    assert list(tmp_path.iterdir()) == [folder] and bytes_of(folder) == before


def test_an_old_report_that_the_user_keeps_is_not_touched(small, tmp_path):
    folder, kept = tmp_path / "report", tmp_path / "report.old"
    render(small, folder)
    folder.rename(kept)
    before = bytes_of(kept)
    for _ in range(2):  # where no report is, and where one is replaced
        render(small, folder)
        assert bytes_of(kept) == before and sorted(tmp_path.iterdir()) == [folder, kept]


@pytest.mark.parametrize("other", ["notes.txt", "data/items.parquet", "index.html"])
def test_a_folder_with_something_else_is_refused(study, tmp_path, other):
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("mine")
    with pytest.raises(
        ValueError, match=f"not empty and holds no report, but {other.split('/')[0]}"
    ):
        render(study, tmp_path)
    assert (tmp_path / other).read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        render(study, tmp_path / other)


def unfinished(run: Run) -> Run:
    return dataclasses.replace(
        run,
        state="unfinished",
        valid=None,
        test=None,
        ranks={},
        note="the training has not finished",
    )


def with_nan(run: Run) -> Run:
    curves = {tag: [[step, math.nan] for step, _ in points] for tag, points in run.curves.items()}
    return dataclasses.replace(
        run, curves=curves, state="unfinished", note="eval/test: alpha.0.0 is not finite"
    )


@pytest.mark.parametrize("change", [unfinished, with_nan])
def test_what_is_whole_is_shown_beside_what_is_not(study, tmp_path, monkeypatch, change):
    monkeypatch.setattr(
        Figure, "render", lambda figure, kind: b"<svg />"
    )  # test_figures draws them
    some = [
        change(run) if run.dataset == "instruments" or run.seed == 1 else run for run in study.runs
    ]
    render(dataclasses.replace(study, runs=some), tmp_path / "report")
    page = Reader((tmp_path / "report" / "index.html").read_text())
    assert "One seed" in page.text and change(study.runs[0]).note in page.text
    figures = {path.stem for path in (tmp_path / "report" / "figures").iterdir()}
    assert "books-small-qwen2-1m-beta" in figures and not any(
        name.startswith("instruments") for name in figures
    )


@pytest.mark.parametrize("count", [0, 5])
def test_nothing_whole_is_a_report_too(study, tmp_path, count):
    runs = [unfinished(run) for run in study.runs[:count]]
    tables, figures = render(
        dataclasses.replace(study, runs=runs, catalogues={}, rows={}), tmp_path / "report"
    )
    assert (
        figures == []
        and "No run has data for a figure yet." in (tmp_path / "report" / "index.html").read_text()
    )
    assert [table.name for table in tables] == ["runs"] * (count > 0)


def test_cost_adds_up(study):
    one, two, silent, failed = (
        dataclasses.replace(study.runs[0], seconds=s, eval_seconds=e, rank_seconds=r)
        for s, e, r in (
            (3600.0, 1800.0, 5400.0),
            (7200.0, None, 28800.0),
            (None, 60.0, None),
            (None, None, None),
        )
    )
    assert (
        cost([one])
        == "1.5 h of wall time (1.0 h training, 30.0 min evaluation), 1.5 h over all ranks"
    )
    together = "3.5 h of wall time (3.0 h training, 30.0 min evaluation), 9.5 h over all ranks"
    missing = "; training time is missing for 1 run"
    assert cost([one, two]) == together and cost([one, two, failed]) == together + missing
    assert cost([silent]) == "1.0 min of wall time (0.0 min training, 1.0 min evaluation)" + missing
    assert "ranks" not in cost([one, silent])


def test_columns_of_numbers_stand_right():
    rows = [
        [Cell("a"), Cell(0.5), Cell(None), Cell("x" * 99)],
        [Cell("b"), Cell(None), Cell(None), Cell("y")],
    ]
    assert pages.column_classes(Table("n", "t", "c", list("abcd"), rows)) == [
        "",
        "number",
        "number",
        "wide",
    ]
