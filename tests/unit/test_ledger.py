"""The ledger of `igd report --published`: its rows, its marks, its file, and its stored form."""

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import yaml
from study_runs import ROWS, TITLES, draw, write_evaluation, write_run

from igd_ds.commands import report
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.studies.report.layout import Table
from igd_ds.studies.report.ledger import check_known, ledger, read_published
from igd_ds.studies.report.study import Run, Study, load

ENTRY = {
    "dataset": "toys",
    "method": "SASRec",
    "kind": "published",
    "metrics": {"ndcg@10": 0.1, "hr@10": 0.2},
    "source": "TIGER, Table 1",
}


def results(value: float, seen: str = "no", **changes) -> dict:
    """A metrics.json of a baseline whose NDCG@10 is `value` and whose HR@10 is twice as much."""
    match = {"item_match": {"ndcg@10": value, "hr@10": 2 * value}}
    found = {"search": "full ranking", "num_beams": 20, "rows": 1234, "num_rows": 0, "seed": 0}
    return found | {"exclude_seen": seen, "alpha": {"0.0": match}} | changes


def make_run(method: str, seed: int, test: float | None, **changes) -> Run:
    settings = {"recommender": "sasrec", "loss": "cross-entropy"}
    run = Run(
        name=f"{method}-{seed}",
        dataset="toys",
        backbone="",
        method=method,
        group=method,
        seed=seed,
        state="no test" if test is None else "finished",
        settings=settings,
        valid=results(0.1),
        test=None if test is None else results(test),
        seconds=1800.0 * (1 + seed),
        command=f"igd baseline --recommender sasrec --seed {seed}",
        protocol="leave-one-out",
    )
    return replace(run, **changes)


def table_of(runs: list[Run], *entries: dict) -> Table:
    (table,) = ledger(Study("s", "", runs, published=list(entries)))
    return table


def lines_of(table: Table) -> list[dict[str, str]]:
    return [
        dict(zip(table.columns, (cell.text for cell in row), strict=True)) for row in table.rows
    ]


def test_ours_below_published_and_reproduced_numbers():
    runs = [make_run("SASRec", seed, value) for seed, value in enumerate((0.08, 0.09, 0.1))]
    again = {"kind": "reproduced", "metrics": {"ndcg@10": 0.11}, "source": "cornac"}
    other = {"metrics": {"ndcg@10": 0.09}, "source": "S3-Rec", "protocol": "5-core"}
    table = table_of(runs, ENTRY, *(ENTRY | changes for changes in (again, other)))

    tiger, cornac, s3rec, ours = lines_of(table)
    assert tiger["Numbers of"] == "published: TIGER, Table 1"
    assert (tiger["NDCG@10"], tiger["HR@10"]) == ("0.1000", "0.2000")
    assert (tiger["Seeds"], tiger["Search"], tiger["Hours"]) == ("", "", "")
    assert cornac["Numbers of"] == "reproduced: cornac"
    assert (cornac["NDCG@10"], cornac["HR@10"]) == ("0.1100", "")
    assert (s3rec["Split"], s3rec["Ours / published"]) == ("5-core", "")

    assert (ours["Numbers of"], ours["Seeds"], ours["Rows"]) == ("ours", "3", "1,234")
    assert (ours["NDCG@10"], ours["HR@10"]) == ("0.0900 ± 0.0100", "0.1800 ± 0.0200")
    assert ours["Ours / published"] == "0.900 (NDCG@10)"  # of the larger number
    assert (ours["Split"], ours["Loss"]) == ("leave-one-out", "cross-entropy")
    assert (ours["Hours"], ours["Seen items"]) == ("1.00", "kept")
    assert ours["Search"] == "full ranking, 20"
    assert [source.label.split(", ")[-1] for source in table.sources] == [
        *("published", "reproduced", "published"),
    ]
    assert table.notes == [
        "More than 5% below the published number: toys, SASRec, full ranking, 20, seen items kept, "
        "1,234 rows: NDCG@10 −10.0%, HR@10 −10.0%."
    ]
    assert table.commands == {"toys, SASRec": "igd baseline --recommender sasrec --seed 0"}


@pytest.mark.parametrize(
    ("ours", "ratio", "gap"),
    [
        (0.095, "0.950 (NDCG@10)", ""),
        (0.0949, "0.949 (NDCG@10)", "NDCG@10 −5.1%"),
        (0.2, "2.000 (NDCG@10)", ""),
    ],
)
def test_a_mean_more_than_five_percent_below_the_published_one_is_named(ours, ratio, gap):
    table = table_of([make_run("SASRec", 0, ours)], ENTRY | {"metrics": {"ndcg@10": 0.1}})
    _, line = lines_of(table)
    assert line["Ours / published"] == ratio and line["NDCG@10"] == f"{ours:.4f}"
    assert len(table.notes) == bool(gap) and gap in "".join(table.notes)


def test_lines_stand_in_the_order_of_the_file_then_of_the_runs():
    runs = [
        make_run("popularity", 0, 0.05, settings={"recommender": "popularity"}),
        make_run("SASRec", 0, 0.1),
        make_run("HSTU", 0, None, settings={"recommender": "hstu"}),
        make_run(
            "uniform",
            0,
            0.1,
            backbone="qwen",
            dataset="games",
            settings={"objective": "uniform"},
        ),
    ]
    entries = [
        ENTRY | {"dataset": "games", "method": "SASRec"},
        ENTRY | {"method": "GRU4Rec", "metrics": {"hr@5": 0.1}},
        ENTRY,
    ]
    lines = lines_of(table_of(runs, *entries))
    assert [(line["Dataset"], line["Method"], line["Numbers of"]) for line in lines] == [
        ("toys", "GRU4Rec", "published: TIGER, Table 1"),
        ("toys", "SASRec", "published: TIGER, Table 1"),
        ("toys", "SASRec", "ours"),
        ("toys", "popularity", "ours"),
        ("games", "SASRec", "published: TIGER, Table 1"),
        ("games", "qwen, uniform", "ours"),
    ]
    assert [name for name in lines[0] if "@" in name] == ["NDCG@10", "HR@5", "HR@10"]

    of_gru4rec, popularity = lines[0], lines[3]
    assert (of_gru4rec["HR@5"], of_gru4rec["HR@10"]) == ("0.1000", "")
    assert (popularity["NDCG@10"], popularity["HR@5"]) == ("0.0500", "–")
    assert (popularity["Ours / published"], popularity["Loss"]) == ("", "none")
    assert lines[-1]["Loss"] == "uniform"


def test_every_way_of_evaluating_has_a_row():
    others = [
        {"unseen": results(0.12 + seed / 100, "yes"), "again": results(0.3)} for seed in range(2)
    ]
    others[0] |= {"old": {"problem": "written by an older version"}}
    others[1] |= {"alpha": results(0.1) | {"alpha": {"0.2": {}}}}
    runs = [
        make_run("SASRec", seed, 0.1, other_tests=other, exact=results(0.1, rows=50))
        for seed, other in enumerate(others)
    ]
    table = table_of(runs, ENTRY | {"metrics": {"ndcg@10": 0.1}})
    ours = lines_of(table)[1:]
    shown = [(line["Seen items"], line["Rows"], line["NDCG@10"]) for line in ours]
    assert shown == [
        ("kept", "1,234", "0.1000 ± 0.0000"),  # eval/again repeats eval/test
        ("kept", "50", "0.1000 ± 0.0000"),
        ("left out", "1,234", "0.1250 ± 0.0071"),
    ]
    assert table.notes == [
        "Left out: eval/old of SASRec-0: written by an older version.",
        "Left out: eval/alpha of SASRec-1: it lacks α = 0.0, at which the run is reported.",
    ]


def test_a_search_says_in_what_it_differs():
    settings = {"objective": "uniform"}
    search = {"search": "beam", "softmax": "full", "temperature": 1.0}
    run = make_run("uniform", 0, None, backbone="qwen", settings=settings, state="finished")
    run = replace(
        run,
        test=results(0.1, **search),
        other_tests={"masked": results(0.2, **search | {"softmax": "masked"})},
    )
    lines = lines_of(table_of([run], ENTRY | {"method": "qwen, uniform"}))
    assert [line["Search"] for line in lines[1:]] == [
        "beam, 20, softmax=full",
        "beam, 20, softmax=masked",
    ]

    low = ENTRY | {"method": "qwen, uniform", "metrics": {"ndcg@10": 0.4}}
    assert table_of([run], low).notes == [
        "More than 5% below the published number: "
        "toys, qwen, uniform, beam, 20, softmax=full, seen items kept, 1,234 rows: NDCG@10 −75.0%; "
        "toys, qwen, uniform, beam, 20, softmax=masked, seen items kept, 1,234 rows: "
        "NDCG@10 −50.0%."
    ]


def test_a_method_is_called_without_its_settings_where_that_is_clear():
    tuned = "SASRec dropout=0.2 learning_rate=0.003"
    runs = [make_run(tuned, 0, 0.1), make_run("SASRec dropout=0.5", 0, None)]
    for method in ("SASRec", tuned):
        entry = ENTRY | {"method": method}
        check_known([entry], Study("s", "", runs), Path("f.yaml"))
        lines = lines_of(table_of(runs, entry))
        assert [(line["Method"], line["NDCG@10"]) for line in lines] == [("SASRec", "0.1000")] * 2

    both = [runs[0], make_run("SASRec dropout=0.5", 0, 0.2)]
    lines = lines_of(table_of(both, ENTRY | {"method": tuned}))
    assert [line["Method"] for line in lines] == [tuned, tuned, "SASRec dropout=0.5"]
    with pytest.raises(
        UsageError, match=f"entry 1: method: 'SASRec' may be any of {tuned}, SASRec"
    ):
        check_known([ENTRY], Study("s", "", both), Path("f.yaml"))


def test_sources_are_linked_and_commands_are_code():
    linked = ENTRY | {"url": "https://a.example/b_(c)", "protocol": "5-core", "note": "width 64"}
    table = table_of([make_run("SASRec", 0, 0.1, command="igd baseline --x '`*a*`'")], linked)
    (source,) = table.sources
    assert source.text == "toys, SASRec, published: TIGER, Table 1. 5-core; width 64."
    markdown = table.markdown()
    assert "published: [TIGER, Table 1](<https://a.example/b_(c)>). 5-core; width 64." in markdown
    assert "* toys, SASRec: `` igd baseline --x '`*a*`' ``\n" in markdown
    assert source.text in table.latex() and "a.example" not in table.latex()
    assert "igd baseline" not in table.latex()


def test_without_published_numbers_there_is_no_ledger():
    assert ledger(Study("s", "", [make_run("SASRec", 0, 0.1)])) == []


def refusal(path: Path, content) -> str:
    """Return the message for a file with this content, without the file's name."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    study = Study("s", "", [make_run("SASRec", 0, 0.1)])
    with pytest.raises(UsageError) as raised:
        check_known(read_published(path), study, path)
    message = str(raised.value)
    assert message.startswith(f"{path}")
    return message.removeprefix(f"{path}").removeprefix(": ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "toy"}, "unknown dataset 'toy', did you mean 'toys'?; known: toys"),
        ({"method": "SASrec"}, "unknown method 'SASrec', did you mean 'SASRec'?; known: SASRec; "),
        ({"kind": "publish"}, "unknown kind 'publish', did you mean 'published'?"),
        ({"metrics": {"ndgc@10": 0.1}}, "unknown metric 'ndgc@10', did you mean 'ndcg@10'?"),
        ({"metrics": {"ndcg@10": 7.4}}, "ndcg@10: expected a number from 0 to 1, found 7.4"),
        ({"metrics": {"ndcg@10": -0.1}}, "ndcg@10: expected a number from 0 to 1, found -0.1"),
        ({"metrics": {"ndcg@10": float("nan")}}, "expected a number from 0 to 1, found nan"),
        ({"metrics": {"ndcg@10": True}}, "ndcg@10: expected a number from 0 to 1, found True"),
        ({"metrics": {"ndcg@10": "0,1"}}, "ndcg@10: expected a number from 0 to 1, found '0,1'"),
        ({"metrics": {}}, "metrics: expected values such as {hr@10: 0.06}, found {}"),
        ({"sources": "x"}, "unknown key 'sources', did you mean 'source'?; known: dataset; "),
        ({"source": 1}, "source: expected a text, found 1"),
        ({"note": ""}, "note: expected a text, found ''"),
        ({"url": "javascript:x"}, "url: expected an address that begins with https://"),
        ({"url": "https://a b"}, "url: expected an address that begins with https://"),
    ],
)
def test_a_bad_entry_is_refused_by_name(changes, message, tmp_path):
    said = refusal(tmp_path / "f.yaml", [ENTRY, ENTRY | {"source": "other"} | changes])
    assert said.startswith("entry 2: ") and message in said


def test_a_bad_file_is_refused_by_name(tmp_path):
    path = tmp_path / "f.yaml"
    for content in ("", "dataset: toys", "[]"):
        assert refusal(path, content).startswith("expected a list of entries with the keys dataset")
    assert refusal(path, ["SASRec"]).startswith("entry 1: expected 'key: value' lines, found 'SAS")
    assert "(line 2: key 'kind' occurs twice" in refusal(path, "- kind: a\n  kind: b")
    assert refusal(path, [ENTRY, ENTRY | {"metrics": {"hr@5": 0.1}}]) == (
        "entry 2 has the dataset, method, kind and source of entry 1: put their metrics into one "
        "entry"
    )
    without = {key: value for key, value in ENTRY.items() if key != "kind"}
    assert refusal(path, [without]).startswith("entry 1: kind is missing")
    with pytest.raises(UsageError, match="--published: no file "):
        read_published(tmp_path / "gone.yaml")


@pytest.fixture
def made(tmp_path):
    """Two seeds of SASRec, with and without seen items, and a generative run."""
    source = tiny_run.make(tmp_path / "source", TITLES)
    dataset, folder = InteractionDataset.load(source.parent / "data"), tmp_path / "runs"
    for seed in range(2):
        ranks = draw(np.random.default_rng(seed))
        settings = {"recommender": "sasrec", "loss": "bce", "seed": seed}
        run = write_run(folder / f"sasrec-{seed}", source, settings, ranks)
        env = json.loads((run / "env.json").read_text())
        command = ["/home/me/igd_ds/baseline.py", "--output_dir", "a b"]
        (run / "env.json").write_text(json.dumps(env | {"command": command}))
        unseen = draw(np.random.default_rng(10 + seed))["test"]
        write_evaluation(run / "eval/unseen", dataset, "test", unseen, {"exclude_seen": "yes"})
    write_evaluation(run / "eval/valid-again", dataset, "valid", ranks["valid"], {})
    (run / "eval" / "cut").mkdir()
    (run / "eval" / "cut" / "metrics.json").write_text('{"split": ')
    settings = {"objective": "uniform", "seed": 0}
    write_run(folder / "uniform", source, settings, draw(np.random.default_rng(5)))
    return folder


def test_runs_to_a_ledger_and_the_same_from_the_stored_study(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "published.yaml"
    entry = ENTRY | {"dataset": "toy", "method": "SASRec, bce", "url": "https://a.example/"}
    file.write_text(yaml.safe_dump([entry | {"metrics": {"ndcg@10": 0.9}}]))
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    published = ["--published", str(file)]
    assert report.main([str(made), *published, "-o", str(first), "--command", "make it"]) == 0
    assert report.main([str(first / "data"), *published, "-o", str(second)]) == 0
    assert report.main([str(first / "data"), "-o", str(third)]) == 0  # the study keeps them
    for path in (path for path in first.rglob("*") if path.is_file()):
        name = path.relative_to(first)
        assert (second / name).read_bytes() == (third / name).read_bytes() == path.read_bytes()

    lines = csv.DictReader((first / "tables/ledger.csv").read_text().splitlines())
    tiger, kept, left_out, uniform = lines
    for line, folder in ((kept, "test"), (left_out, "unseen")):
        tests = [
            json.loads((made / f"sasrec-{seed}/eval/{folder}/metrics.json").read_text())
            for seed in range(2)
        ]
        values = [test["alpha"]["0.0"]["item_match"]["ndcg@10"] for test in tests]
        mean, spread = float(line["NDCG@10"]), float(line["NDCG@10 sd"])
        assert mean == pytest.approx(statistics.mean(values), rel=1e-5)  # six digits
        assert spread == pytest.approx(statistics.stdev(values), rel=1e-5)
        assert (line["Seeds"], line["Rows"]) == ("2", str(len(ROWS["test"])))
        assert line["Ours / published"].endswith(" (NDCG@10)")
    assert (kept["Seen items"], left_out["Seen items"]) == ("kept", "left out")
    assert (tiger["NDCG@10"], tiger["Seeds"]) == ("0.9", "")
    assert (uniform["Method"], uniform["Ours / published"]) == ("q, uniform", "")

    for name in ("index.html", "README.md", "tables/ledger.md"):
        text = (first / name).read_text()
        assert "https://a.example/" in text and "igd baseline --output_dir" in text
        assert "eval/cut of sasrec-1: eval/cut/metrics.json is not JSON" in text
    assert '<a href="https://a.example/">TIGER, Table 1</a>' in (first / "index.html").read_text()
    assert (first / "tables" / "ledger.tex").read_text().startswith(r"\begin{table}")
    assert set(load(first / "data").runs[0].other_tests) == {"unseen"}


def test_a_bad_file_is_refused_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "f.yaml").write_text(yaml.safe_dump([ENTRY]))
    words = [str(made), "--published", str(tmp_path / "f.yaml"), "-o", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="entry 1: unknown dataset 'toys', did you mean 'toy'"):
        report.main(words)
    assert not (tmp_path / "out").exists()
