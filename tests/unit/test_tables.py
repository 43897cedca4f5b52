"""Tables from figures made by hand: what is averaged, marked, left out, and how it is written."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from igd_ds.evaluation import metrics
from igd_ds.studies import significance
from igd_ds.studies.report.cells import marked
from igd_ds.studies.report.layout import Cell, Table
from igd_ds.studies.report.study import AT_ALPHA, Ranks, Run, Study, method_names
from igd_ds.studies.report.tables import all_tables
from igd_ds.studies.rounding import significant

DECILES = [0.1] * 10


def entry(value: float, **more) -> dict:
    """Figures of an α whose NDCG@10 is `value`, NDCG@5 half and HR twice of it.

    In token match every figure is 0.1 more.
    """
    match = {"ndcg@5": value / 2, "ndcg@10": value, "hr@5": value * 1.5, "hr@10": value * 2}
    found = {
        "item_match": match,
        "token_match": {measure: value + 0.1 for measure, value in match.items()},
        "first_token_repetition": 0.5,
        "score_entropy_bits": 2.5,
        "coverage": 0.3,
        "gini_index": 0.8,
    }
    return found | {"cold_share_of_listed": 0.01, "popularity_deciles": DECILES} | more


def make_run(
    method: str, seed: int, valid: dict[str, float], test: dict[str, float] | None, **changes
) -> Run:
    """A run with NDCG@10 by α; a run without test is a candidate that was not chosen."""
    settings = {"objective": method.split()[0]}
    settings |= {"igd_beta": float(method.split("β=")[1])} if "β=" in method else {}
    common = {
        "rows": 4,
        "popularity_baseline": {"ndcg@10": 0.01, "hr@10": 0.02},
        "target_popularity_deciles": DECILES,
    }
    run = Run(
        name=f"{method}-{seed}",
        dataset="toys",
        backbone="qwen",
        method=method,
        group=method,
        seed=seed,
        state="no test" if test is None else "finished",
        family=method.split()[0],
        settings=settings,
        valid=common | {"alpha": {alpha: entry(value) for alpha, value in valid.items()}},
        test=None
        if test is None
        else common | {"alpha": {alpha: entry(value) for alpha, value in test.items()}},
        seconds=1800.0,
        eval_seconds=360.0,
    )

    return replace(run, **changes)


def make_study() -> Study:
    """Two seeds each of uniform, three β of which 0.2 was chosen, igd-linear, and a baseline."""
    runs = []

    for seed, shift in ((0, -0.01), (1, 0.01)):
        runs += [
            make_run("uniform", seed, {"0.0": 0.20 + shift, "0.1": 0.19}, {"0.0": 0.20 + shift}),
            make_run("igd β=0.1", seed, {"0.0": 0.19 + shift, "0.1": 0.1}, None),
            make_run(
                "igd β=0.2",
                seed,
                {"0.0": 0.26 + shift, "0.1": 0.3},
                {"0.0": 0.25 + shift, "0.1": 0.30 + shift},
            ),
            make_run("igd β=0.3", seed, {"0.0": 0.22 + shift, "0.1": 0.1}, None),
            make_run(
                "igd-linear β=0.4", seed, {"0.0": 0.23 + shift, "0.1": 0.1}, {"0.0": 0.22 + shift}
            ),
            make_run(
                "SASRec",
                seed,
                {"0.0": 0.1},
                {"0.0": 0.28 + shift},
                backbone="",
                settings={"recommender": "sasrec"},
            ),
        ]
    return Study("s", "two seeds", runs)


def table(study: Study, name: str) -> Table:
    (found,) = [table for table in all_tables(study) if table.name == name]
    return found


def text(found: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in found.rows]


def test_main_results():
    found = table(make_study(), "main-toys")
    assert found.columns == [
        "Model",
        "Method",
        "α",
        "Seeds",
        "NDCG@5",
        "NDCG@10",
        "HR@5",
        "HR@10",
        "NDCG@10, token match",
        "HR@10, token match",
        "NDCG@10, 95 % interval",
        "vs uniform",
    ]

    lines = text(found)
    assert [line[:4] for line in lines] == [
        ["baseline", "popularity (expected)", "", "–"],
        ["baseline", "SASRec", "", "2"],
        ["qwen", "uniform", "0", "2"],
        ["qwen", "igd β=0.2", "0.1", "2"],
        ["qwen", "igd-linear β=0.4", "0", "2"],
        ["qwen", "improvement of igd β=0.2", "", "–"],
    ]

    sd = f"{0.02 / np.sqrt(2):.4f}"  # of 0.29 and 0.31
    assert (
        lines[3][5] == f"0.3000 ± {sd}"
        and lines[1][5] == f"0.2800 ± {sd}"
        and lines[0][4:8] == ["–", "0.0100", "–", "0.0200"]
    )
    assert [row[5].mark for row in found.rows] == ["", "second", "", "best", "", ""]
    assert [line[8][:6] for line in lines[:5]] == ["–", "0.3800", "0.3000", "0.4000", "0.3200"]
    # 0.3 over 0.2, and as token match 0.4 over 0.3 and 0.7 over 0.5.
    assert lines[5][4:] == ["+50.00%"] * 4 + ["+33.33%", "+40.00%", "", "–"]
    assert [line[11] for line in lines[:5]] == ["–", "–", "–", "+50.00%", "+10.00%"]


def test_results_over_another_baseline():
    """SASRec's 0.28 in place of uniform's 0.2: for all that generate, uniform too."""
    found = table(replace(make_study(), reference="SASRec"), "main-toys")
    assert found.columns[11] == "vs SASRec" and "marks a difference from SASRec" in found.caption
    assert {row[1].text: row[11].text for row in found.rows if row[11].value is not None} == {
        "uniform": "-28.57%", "igd β=0.2": "+7.14%", "igd-linear β=0.4": "-21.43%",
    }  # fmt: skip
    last = ["improvement of igd β=0.2", "", "–", *["+7.14%"] * 4, "+5.26%", "+6.06%", "", "–"]
    assert text(found)[-1][1:] == last
    tests = table(replace(make_study(), reference="SASRec"), "significance-toys")
    assert tests.columns[3] == "SASRec" and [row[1].text for row in tests.rows] == [
        "uniform",
        "igd β=0.2",
        "igd-linear β=0.4",
    ]


def test_the_beta_of_a_form_is_its_own_setting():
    """The method's name may go on with the settings in which it differs from another one."""
    study = make_study()
    runs = [
        replace(run, method=f"{run.method} learning_rate=0.001") if run.objective == "igd" else run
        for run in study.runs
    ]
    lines = text(table(replace(study, runs=runs), "linear-binary"))
    assert [line[:4] for line in lines] == [
        ["toys, qwen", "HR@10", "0.4", "0.2"],
        ["toys, qwen", "NDCG@10", "0.4", "0.2"],
    ]


def test_what_was_not_measured_is_no_figure_of_the_ablation():
    """If uniform was validated only at α = 0, its calibrated form is unknown."""
    runs = [
        make_run("uniform", 0, {"0.0": 0.2}, {"0.0": 0.2}),
        make_run("igd β=0.2", 0, {"0.0": 0.2, "0.1": 0.3}, {"0.1": 0.3}),
    ]
    runs[1].test["alpha"]["0.0"] = entry(0.25)
    ablation = {
        row[1].text: row[3].text for row in table(Study("s", "", runs), "ablation-igd").rows
    }
    assert ablation == {
        "igd β=0.2": "0.3000",
        "w/o w_d (α = 0)": "0.2500",
        "w/o w_t (uniform)": "–",
        "w/o both": "0.2000",
    }


def test_each_dataset_has_the_cutoffs_that_its_own_lists_reach():
    study = make_study()
    for run in study.runs:
        for found in (run.test or {"alpha": {}})["alpha"].values():
            found["item_match"]["ndcg@20"] = 0.4
    shorter = [
        replace(make_run("uniform", seed, {"0.0": 0.2}, {"0.0": 0.2}), dataset="books")
        for seed in (0, 1)
    ]
    study = replace(study, runs=[*study.runs, *shorter])
    at = {name: table(study, f"main-{name}").columns[4:-4] for name in ("toys", "books")}
    assert at["toys"] == ["NDCG@5", "NDCG@10", "NDCG@20", "HR@5", "HR@10"] and at["books"] == [
        "NDCG@5",
        "NDCG@10",
        "HR@5",
        "HR@10",
    ]


def test_igd_alone_is_reported_at_its_best_alpha():
    """Only IGD is reported at the α that validation prefers; the others are at α = 0."""
    runs = [
        make_run(method, seed, {"0.0": 0.2, "0.1": 0.3}, {"0.0": level + 0.01 * seed, "0.1": 0.9})
        for seed in range(2)
        for method, level in (("uniform", 0.2), ("cft", 0.25), ("igd β=0.2", 0.3))
    ]
    study = Study("s", "", runs)
    found = table(study, "main-toys")
    values = {
        row[1].text: (row[2].text, row[5].value)
        for row in found.rows
        if row[1].text in ("uniform", "cft", "igd β=0.2")
    }
    assert values == {
        "uniform": ("0", pytest.approx(0.205)),
        "cft": ("0", pytest.approx(0.255)),
        "igd β=0.2": ("0.1", 0.9),
    }
    assert [c.mean for c in significance.compare(study, "toys")] == pytest.approx([0.255, 0.9])

    ablation = {row[1].text: row[3].value for row in table(study, "ablation-igd").rows}
    assert ablation["w/o w_t (uniform)"] == 0.9 and ablation["w/o both"] == pytest.approx(0.205)
    assert all(
        AT_ALPHA in table(study, name).caption
        for name in ("main-toys", "significance-toys", "diversity-toys")
    )


def test_the_star_is_on_what_the_corrected_test_finds(monkeypatch):
    study = make_study()
    compared = significance.compare(study, "toys")
    assert [c.method for c in compared] == ["igd β=0.2", "igd-linear β=0.4"]
    changed = [replace(compared[0], users_holm=0.04), replace(compared[1], users_holm=0.06)]
    monkeypatch.setattr(significance, "compare", lambda *_: changed)
    stars = {
        row[1].text: [cell.star for cell in row[4:-2]] for row in table(study, "main-toys").rows
    }
    assert stars.pop("igd β=0.2") == [False, True, *4 * [False]] and not any(
        map(any, stars.values())
    )


def test_runs_that_are_not_whole_are_never_averaged_in():
    study = make_study()
    runs = [
        replace(run, state="unfinished", note="NaN") if run.name == "igd β=0.2-1" else run
        for run in study.runs
    ]
    found = table(replace(study, runs=runs), "main-toys")
    assert text(found)[3][:6] == [
        "qwen",
        "igd β=0.2",
        "0.1",
        "1",
        "0.1450",
        "0.2900",
    ]  # no deviation of one seed
    assert found.notes == [
        "qwen, igd β=0.2: mean of 1 of 2 runs (seed 1 unfinished).",
        "One seed, and so no standard deviation over seeds: igd β=0.2.",
    ]

    tests = table(replace(study, runs=runs), "significance-toys")
    assert [(row[1].text, row[2].text) for row in tests.rows] == [
        ("igd β=0.2", "1"),
        ("igd-linear β=0.4", "2"),
    ]
    elsewhere = [replace(run, seed=7) if "igd β" in run.method else run for run in runs]
    tests = table(replace(study, runs=elsewhere), "significance-toys")
    assert tests.notes[-1] == "Not tested, because no seed is shared with uniform: igd β=0.2."


def test_the_tests_say_what_so_few_seeds_can_show():
    found = table(make_study(), "significance-toys")
    assert found.notes == [
        "With 2 seeds per method, the p of the Mann–Whitney U test is at least 0.3333 before "
        "correction.",
        "Where there is no test over users, the ranks of single rows are not known, or all rows "
        "belong to one user.",
    ]
    line = dict(zip(found.columns, text(found)[0], strict=True))
    assert (line["Improvement"], line["p seeds"], line["p seeds, Holm"]) == (
        "+50.00%",
        "0.3333",
        "0.6667",
    )
    assert (line["p users"], line["95 % interval"]) == ("–", "")  # no ranks


def with_users(study: Study, split: str, ranks: dict[str, list[int]], users: list[int]) -> Study:
    """The study with ranks of its four rows by method, and with the user of each row."""
    rows, credit = np.arange(4, dtype=np.int32), np.ones(4)
    runs = [
        replace(run, ranks=run.ranks | {split: Ranks(rows, np.array(ranks[run.method]), credit)})
        if run.method in ranks
        else run
        for run in study.runs
    ]
    groups = {"user": np.array(users), "head": np.ones(4), "cold": rows < 0, "history": rows + 1}
    known = study.rows.get("toys", {}) | {split: groups}
    return replace(study, runs=runs, rows={"toys": known})


def test_one_seed_has_an_interval_over_users_too():
    """NDCG 1, 0, 1, 0 of four users: mean 0.5, s = 0.577, s / √4 = 0.289."""
    runs = [
        make_run("uniform", 0, {"0.0": 0.2}, {"0.0": 0.2}),
        make_run("cft", 0, {"0.0": 0.2}, {"0.0": 0.2}),
    ]
    study = with_users(Study("s", "", runs), "test", {"uniform": [1, 0, 1, 0]}, [5, 6, 7, 8])
    found = table(study, "main-toys")
    assert found.columns[-2] == "NDCG@10, 95 % interval"
    margin = 1.96 * np.std([1, 0, 1, 0], ddof=1) / 2
    assert {row[1].text: row[-2].text for row in found.rows} == {
        "popularity (expected)": "",
        "uniform": f"[0.0000, {0.5 + margin:.4f}]",
        "cft": "",
        "improvement of cft": "",
    }
    assert "generalises to other users, not to other trainings" in found.caption


def test_the_choice_of_alpha_says_how_sure_it_is():
    runs = [
        make_run("igd β=0.2", 0, {"0.0": 0.1, "0.1": 0.55, "0.2": 0.8, "0.3": 0.52}, {"0.2": 0.8}),
    ]
    certain = {"igd β=0.2": [1, 1, 2, 2]}  # a standard error of about 0.1
    study = with_users(Study("s", "", runs), "valid", certain, [5, 6, 7, 8])
    error = significance.standard_error(np.array([1, 1, 1 / np.log2(3), 1 / np.log2(3)]), range(4))
    [note] = table(study, "alpha").notes
    assert note == (
        "toys, qwen, igd β=0.2: on 4 valid rows of toys, validation chose α = 0.2. The standard "
        f"error of NDCG@10 is {error:.4f}; α = 0.2 is alone within one standard error of the best "
        "mean."
    )

    study = with_users(Study("s", "", runs), "valid", {"igd β=0.2": [1, 0, 1, 0]}, [5, 6, 7, 8])
    [note] = table(study, "alpha").notes
    assert note.endswith(
        "0.2887; α = 0.1, 0.2, 0.3 lie within one standard error of the best mean."
    )
    unknown = replace(study, rows={})
    assert table(unknown, "alpha").notes == []


def test_every_table_of_accuracy_says_how_many_rows_out_of_all():
    study = make_study()
    sizes = {"kind": "text", "items": 9, "valid_rows": 1500, "test_rows": 2000}
    study = replace(study, catalogues={"toys": sizes})
    for run in study.runs:
        if run.test:
            run.test["alpha"].setdefault("0.0", entry(0.2))["relaxed_match"] = {
                "1": {"ndcg@5": 0.1}
            }
    study = with_users(
        study, "test", {run.method: [1, 2, 0, 0] for run in study.runs}, [1, 2, 3, 4]
    )
    found = {made.name: made.caption for made in all_tables(study)}
    on_valid = {"selection", "beta", "alpha"}
    on_test = found.keys() - on_valid - {"runs", "statistics"}
    assert on_valid < found.keys() and {
        "main-toys", "significance-toys", "ablation-igd", "linear-binary", "groups-toys",
        "diversity-toys", "relaxed-toys",
    } <= on_test  # fmt: skip
    assert all("4 of 1,500 valid rows of toys" in found[name] for name in on_valid)
    assert all("4 of 2,000 test rows of toys" in found[name] for name in on_test)


def test_what_is_shown_as_0_is_neither_best_nor_second():
    block = [[Cell(0.00004)], [Cell(0.0)], [Cell(0.2)]]
    assert [row[0].mark for row in marked(block, 0)] == ["", "", "best"]
    assert [row[0].mark for row in marked(block, 0, smallest=(0,))] == ["second", "best", ""]


def test_selection_is_shown_and_checked():
    study = make_study()
    found = table(study, "selection")
    assert [(row[1].text, row[3].text, row[4].text[:6], row[4].mark) for row in found.rows] == [
        ("igd β=0.1", "", "0.1900", ""),
        ("igd β=0.2", "yes", "0.2600", "best"),
        ("igd β=0.3", "", "0.2200", "second"),
    ]
    assert found.notes == []
    tested = [
        replace(run, state="finished", test=run.valid) if run.method == "igd β=0.3" else run
        for run in study.runs
    ]
    note = "toys, qwen: igd β=0.3 was tested, but validation prefers igd β=0.2."
    assert table(replace(study, runs=tested), "selection").notes == [note]
    apart = [replace(run, family="another") if run.method == "igd β=0.3" else run for run in tested]
    found = table(replace(study, runs=apart), "selection")
    assert found.notes == [] and "igd β=0.3" not in {row[1].text for row in found.rows}


def test_what_was_chosen_and_not_tested_yet_is_validated_and_missed():
    runs = [
        replace(run, state="no test", test=None) if run.name == "igd β=0.2-1" else run
        for run in make_study().runs
    ]
    study = replace(make_study(), runs=runs)
    assert (
        "qwen, igd β=0.2: mean of 1 of 2 runs (seed 1 no test)." in table(study, "main-toys").notes
    )
    assert {row[1].text: row[2].text for row in table(study, "selection").rows}["igd β=0.2"] == "2"


def test_beta_sensitivity_and_its_effective_range():
    found = table(make_study(), "beta")
    assert [(row[1].text, row[2].text, row[4].text[:6]) for row in found.rows] == [
        ("uniform", "–", "0.2000"),
        ("igd", "0.1", "0.1900"),
        ("igd", "0.2", "0.2600"),
        ("igd", "0.3", "0.2200"),
    ]
    assert found.notes == ["toys, qwen, igd: effective β: 0.2, 0.3."]

    study = make_study()
    longer = [
        replace(
            run, method=f"{run.method} epochs=2", valid=make_run("igd", 0, {"0.0": 0.1}, None).valid
        )
        for run in study.runs
        if run.method in ("igd β=0.1", "igd β=0.2")
    ]
    found = table(replace(study, runs=[*study.runs, *longer]), "beta")
    assert found.notes[1:] == ["toys, qwen, igd epochs=2: effective β: none."]
    assert [row[4].text[:6] for row in found.rows[1:4]] == [
        "0.1900",
        "0.2600",
        "0.2200",
    ]  # as without the others


def test_ablation_of_igd():
    found = table(make_study(), "ablation-igd")
    assert [(row[1].text, row[3].text[:6]) for row in found.rows] == [
        ("igd β=0.2", "0.3000"),
        ("w/o w_d (α = 0)", "0.2500"),
        ("w/o w_t (uniform)", "0.2000"),
        ("w/o both", "0.2000"),
    ]


def test_linear_and_binary_weights_are_compared_at_alpha_0():
    found = table(make_study(), "linear-binary")
    assert [cell.text[:6] for cell in found.rows[1]] == [
        "toys, ",
        "NDCG@1",
        "0.4",
        "0.2",
        "0.2000",
        "0.2200",
        "0.2500",
    ]
    assert [cell.mark for cell in found.rows[1]][4:] == ["", "", "best"]


def test_the_alpha_grid_of_validation():
    study = make_study()
    for run in study.runs:
        for alpha, figures in run.valid["alpha"].items():
            figures["first_token_repetition"] = 0.5 - float(alpha)
    found = table(study, "alpha")
    lines = [row for row in found.rows if row[1].text == "igd β=0.2"]
    assert [(row[2].text, row[3].text, row[5].text[:6]) for row in lines] == [
        ("0", "0.500 ± 0.000", "0.2600"), ("0.1", "0.400 ± 0.000", "0.3000"),
    ]  # fmt: skip
    assert [row[3].mark for row in lines] == ["second", "best"]  # less repetition is better
    assert "SASRec" not in {row[1].text for row in found.rows}


def test_groups_are_weighted_means_over_rows():
    known = {
        "head": np.array([1.0, 0.5, 0.0, 0.5]),
        "cold": np.array([False, False, True, False]),
        "history": np.array([1, 5, 6, 10]),
    }
    # NDCG 1, 0, 0.5, 1; the third target shares its path with another item.
    study, rank = make_study(), np.array([1, 0, 3, 1], np.int32)
    ranks = Ranks(np.arange(4, dtype=np.int32), rank, np.array([1, 0, 0.5, 1]))
    run = replace(study.runs[0], ranks={"test": ranks})
    found = table(replace(study, runs=[run], rows={"toys": {"test": known}}), "groups-toys")

    assert found.columns == [
        "Model",
        "Method",
        "head",
        "tail",
        "warm",
        "cold",
        "history 1–5",
        "history 6–10",
    ]
    assert text(found)[0][2:] == ["2", "2", "3", "1", "2", "2"]
    assert [cell.value for cell in found.rows[1][2:]] == pytest.approx(
        [1.5 / 2, 0.75 / 2, 2 / 3, 0.25, 0.5, 0.625]
    )


def test_mtc_ablation_relaxed_match_and_quantizers():
    runs, level = [], 0.2
    for dataset in ("rq data", "pq data"):
        for method in ("uniform", "frequency", "multi-target", "multi-target + curriculum cT=2"):
            level += 0.01
            settings = {"objective": method.split()[0]} | (
                {"curriculum_cT": 2.0} if "curriculum" in method else {}
            )
            run = make_run(
                method, 0, {"0.0": level}, {"0.0": level}, dataset=dataset, settings=settings
            )
            run.test["alpha"]["0.0"]["relaxed_match"] = {"1": {"ndcg@5": 0.4}, "2": {"ndcg@5": 0.3}}
            runs.append(run)
    catalogue = {"kind": "semantic-id", "filtering_ratio": [0.9, 0.5], "zero_ig_share": 0.0}
    catalogue |= dict.fromkeys(
        ("items", "train_rows", "valid_rows", "test_rows", "target_tokens", "zero_ig_tokens"), 1234
    )
    made_by = {
        "rq data": catalogue | {"quantizer": "rq-vae"},
        "pq data": catalogue | {"quantizer": "pq", "filtering_ratio": [0.7]},
    }
    study = Study("s", "", runs, made_by)
    relaxed = table(study, "relaxed-rq-data")
    assert relaxed.columns[2:] == ["top-1", "top-2", "whole ID"] and text(relaxed)[0][2:] == [
        "0.4000",
        "0.3000",
        "0.2050",
    ]

    quantizers = [[cell.text for cell in row[1:5]] for row in table(study, "quantizers").rows]
    assert quantizers[:2] == [
        ["rq-vae", "uniform", "0.1050", "0.2100"],
        ["rq-vae", "multi-target + curriculum cT=2", "0.1200", "0.2400"],
    ]
    assert (
        quantizers[2] == ["rq-vae", "improvement", "+14.29%", "+14.29%"]
        and quantizers[3][0] == "pq"
    )
    assert text(table(study, "filtering-ratio")) == [
        ["rq data", "90.00%", "50.00%"],
        ["pq data", "70.00%", "–"],
    ]
    assert text(table(study, "statistics"))[0][2:] == ["1,234"] * 6 + ["0.00%"]


def test_mtc_ablation_has_a_line_for_each_part():
    base = {
        "objective": "multi-target",
        "mixing": "learned",
        "curriculum_c": None,
        "mixing_form": "loss",
    }
    many = {
        "uniform": {"objective": "uniform"},
        "front-greater → CE": base | {"mixing": "fg-ce", "mixing_form": None},
        "front-greater → CE → frequency": base | {"mixing": "fg-ce-fr", "mixing_form": None},
        "multi-target": base,
        "multi-target + curriculum": base | {"curriculum_c": 1e-5},
        "worse": base | {"curriculum_c": 2e-5},
        "front-greater": {"objective": "front-greater"},
        "frequency": {"objective": "frequency"},
        "multi-target on logits": base | {"mixing_form": "logits"},
        "multi-target + curriculum on logits": base
        | {"mixing_form": "logits", "curriculum_c": 1e-5},
    }
    level = {name: 0.3 - 0.01 * place for place, name in enumerate(many)}
    runs = [
        make_run(
            method, 0, {"0.0": level[name], "0.1": 0.9}, {"0.0": level[name]}, settings=settings
        )
        for (name, settings), method in zip(
            many.items(), method_names(list(many.values())), strict=True
        )
    ]
    study = Study("s", "", runs[::-1])
    found = table(study, "ablation-mtc")
    assert [(row[1].text, row[4].value) for row in found.rows] == [
        (name, significant(level[name])) for name in many if name != "worse"
    ]
    assert len({row[2].text for row in found.rows}) == 9 and found.columns[2] == "Method"

    without = [run for run in study.runs if run.settings.get("mixing") != "fg-ce"]
    assert [row[1].text for row in table(replace(study, runs=without), "ablation-mtc").rows][
        1
    ] == "front-greater → CE → frequency"


def test_datasets_show_their_interactions_where_they_know_them():
    catalogue = {"kind": "text", "zero_ig_share": 0.5}
    catalogue |= dict.fromkeys(
        ("items", "train_rows", "valid_rows", "test_rows", "target_tokens", "zero_ig_tokens"), 1
    )
    found = table(
        Study("s", "", [], {"a": catalogue | {"users": 4, "interactions": 30}, "b": catalogue}),
        "statistics",
    )
    assert (
        found.columns[-3:] == ["Users", "Interactions", "Per user"]
        and "MTC Table 2" in found.caption
    )
    assert [line[-3:] for line in text(found)] == [["4", "30", "7.50"], ["–", "–", "–"]]
    assert "MTC" not in table(Study("s", "", [], {"b": catalogue}), "statistics").caption


def test_backbones_side_by_side():
    runs = [
        replace(run, backbone="llama", name=f"l{run.name}")
        for run in make_study().runs
        if not run.is_baseline
    ]
    found = table(replace(make_study(), runs=[*make_study().runs, *runs]), "backbones")
    assert [(row[1].text, row[2].text) for row in found.rows] == [
        (backbone, method)
        for backbone in ("qwen", "llama")
        for method in ("uniform", "igd β=0.2", "improvement")
    ]


def test_beam_beside_exact():
    study = make_study()
    missed = ({"1": 0.0, "10": 2.0}, {"1": 0.5, "10": 4.0})
    exact = [
        {
            "rows": 3,
            "alpha": {"0.0": entry(0.3, proof_share=0.5, beam=entry(0.2, missed_of_true_top=m))},
        }
        for m in missed
    ]
    runs = [
        replace(run, exact=exact[run.seed]) if run.method == "igd β=0.2" else run
        for run in study.runs
    ]
    found = table(replace(study, runs=runs), "beam-exact")
    line = dict(zip(found.columns, [cell.value for cell in found.rows[0]], strict=True))

    assert (line["α"], line["Rows"], line["NDCG@10 beam"], line["NDCG@10 exact"]) == (
        "0",
        3,
        0.3,
        0.4,
    )  # α = 0.1, the chosen one, is not there
    assert (line["HR@10 beam"], line["HR@10 exact"], line["Proven"]) == (0.5, 0.7, 0.5)
    assert (line["Missed of top 1"], line["Missed of the list"]) == (0.25, 3.0)


def test_exact_lists_have_their_own_tests():
    study = make_study()
    exact = {"uniform": 0.2, "igd β=0.2": 0.5}
    runs = [
        replace(run, exact={"rows": 3, "alpha": {"0.0": entry(exact[run.method])}})
        if run.method in exact
        else run
        for run in study.runs
    ]
    assert not [one for one in all_tables(study) if "exact" in one.name]
    found = table(replace(study, runs=runs), "significance-exact-toys")
    (line,) = [dict(zip(found.columns, row, strict=True)) for row in text(found)]
    assert found.title == "Tests of exact lists: toys" and found.caption.startswith("3 test rows")
    assert "exact search under the full softmax" in found.caption
    assert (line["Method"], line["uniform"], line["NDCG@10"], line["Improvement"]) == (
        "igd β=0.2",
        "0.2000 ± 0.0000",
        "0.5000 ± 0.0000",
        "+150.00%",
    )
    assert "exact" not in table(replace(study, runs=runs), "significance-toys").caption


def test_all_runs_with_states_and_cost():
    study = make_study()
    failed = replace(
        study.runs[0],
        name="f",
        state="failed",
        note="out of memory",
        valid=None,
        test=None,
        seconds=None,
    )
    found = table(replace(study, runs=[*study.runs, failed]), "runs")
    assert "two seeds" in found.caption and len(found.rows) == 13

    line = dict(zip(found.columns, text(found)[-1], strict=True))
    assert (line["State"], line["Note"], line["α"], line["Training (s)"]) == (
        "failed",
        "out of memory",
        "",
        "–",
    )
    assert found.notes == [
        "Total cost: 7.3 h of wall time (6.0 h training, 1.3 h evaluation); "
        "training time is missing for 1 run.",
        "Runs: 8 finished, 4 no test, 1 failed.",
    ]


def test_examples_mark_the_target():
    example = {
        "dataset": "toys",
        "backbone": "qwen",
        "row": 7,
        "history": ["a", "b|c"],
        "target": "x_y",
    }
    found = table(
        replace(
            make_study(),
            examples=[example | {"lists": {"uniform": ["d"], "igd β=0.2": ["e", "x_y"]}}],
        ),
        "example-toys-qwen-7",
    )

    assert text(found) == [["uniform", "d", ""], ["igd β=0.2", "e", "x_y"]]
    assert (
        found.rows[1][2].mark == "best"
        and "a; b|c" in found.caption
        and r"b\|c" in found.markdown()
    )


def test_an_older_version_without_a_figure_leaves_its_cell_empty():
    study = make_study()
    for entry_ in study.runs[0].test["alpha"].values():
        del entry_["gini_index"], entry_["popularity_deciles"]
    lines = {line[1]: line for line in text(table(study, "diversity-toys"))}
    assert (
        lines["uniform"][3] == "–"
        and lines["uniform"][5:] == ["–"] * 10
        and lines["igd β=0.2"][3] == "0.8000 ± 0.0000"
    )


def test_item_probabilities_and_their_calibration():
    study = make_study()
    assert "calibration" not in [made.name for made in all_tables(study)]
    probability, hit = np.linspace(0.01, 0.1, 20), np.arange(20) % 4 == 3
    for run in study.runs:
        if run.method == "uniform" and run.test:
            run.test.update(target_nll=7.5, target_perplexity_per_token=2.0)
            for entry_ in run.test["alpha"].values():
                entry_["mean_coverage"] = 0.25
                entry_["calibration"] = metrics.calibration(probability, hit)
    mean, hits = text(table(study, "calibration"))
    assert mean[1:3] == ["uniform", "7.500 ± 0.000"] and mean[4] == "0.2500 ± 0.0000"
    assert mean[6:8] == ["p", "0.0124"] and hits[6:9] == ["hits", "0.0000", "0.5000"]


def test_how_often_lists_repeat_a_history():
    study = make_study()
    before = table(study, "diversity-toys")
    for run in study.runs:
        for entry_ in run.test["alpha"].values() if run.test else ():
            entry_["repeat_rate"] = {"first": 0.5, "top10": 0.25}
        if run.test:
            run.test.update(exclude_seen="no", target_repeat_rate=0.02)
    found = table(study, "diversity-toys")
    assert found.columns[4:8] == ["Cold", "Seen", "Seen, first place", "D1"]
    lines = {line[1]: line for line in text(found)}
    assert lines["targets"][5:7] == ["0.0200", "0.0200"]
    assert lines["SASRec"][5:7] == lines["uniform"][5:7] == ["0.2500 ± 0.0000", "0.5000 ± 0.0000"]
    assert before.columns[4:6] == ["Cold", "D1"], "runs of earlier versions do not know"
    assert [line[:5] + line[7:] for line in text(found)] == text(before)

    assert "the whole catalogue is ranked" in table(study, "main-toys").caption
    for run in study.runs:
        (run.test or {}).update(exclude_seen="yes")
    main = table(study, "main-toys")
    assert "but the items that the user had met before" in main.caption
    assert text(main)[0][1] == "popularity (expected, seen items kept)"


def test_an_empty_study_has_its_list_of_runs_alone():
    waiting = replace(make_run("uniform", 0, {"0.0": 0.1}, None), state="unfinished", valid=None)
    assert [found.name for found in all_tables(Study("s", "", [waiting]))] == ["runs"]
    assert all_tables(Study("s", "", [])) == []


SMALL = Table(
    "small", "A & B", "50 % of β_1", ["Method", "NDCG@10"],
    [
        [Cell("a|b_c"), Cell(0.123456789, 0.01, mark="best", star=True)], [Cell("d"), Cell(None)],
        [Cell("e"), Cell(0.1, mark="second")],
    ],
    ["x < y"],
)  # fmt: skip


def test_markdown():
    assert SMALL.markdown() == (
        "### A & B\n\n50 % of β\\_1\n\n| Method | NDCG@10 |\n| --- | --- |\n"
        "| a\\|b\\_c | **0.1235 ± 0.0100 \\*** |\n| d | – |\n"
        "| e | <u>0.1000</u> |\n\n* x \\< y\n"
    )


def test_plain_text_is_aligned():
    assert (
        SMALL.text()
        == "A & B\nMethod  NDCG@10\na|b_c   0.1235 ± 0.0100 *\nd       –\ne       0.1000\n"
    )


def test_csv_has_six_significant_digits():
    assert list(csv.reader(io.StringIO(SMALL.csv()))) == [
        ["Method", "NDCG@10", "NDCG@10 sd"],
        ["a|b_c", "0.123457", "0.01"],
        ["d", "", ""],
        ["e", "0.1", ""],
    ]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_csv_holds_no_formula(text):
    table = Table("small", "A", "", [text, "B"], [[Cell(text), Cell(-0.5)]])
    assert list(csv.reader(io.StringIO(table.csv()))) == [[f"'{text}", "B"], [f"'{text}", "-0.5"]]


def test_latex():
    assert SMALL.latex() == "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\caption{A \& B. 50 \% of $\beta$\_1 x \textless{} y}",
            r"\label{tab:small}",
            r"\begin{tabular}{lr}",
            r"\toprule",
            r"Method & NDCG@10 \\",
            r"\midrule",
            r"a\textbar{}b\_c & \textbf{0.1235 $\pm$ 0.0100 *} \\",
            r"d & -- \\",
            r"e & \underline{0.1000} \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def test_a_row_of_another_length_is_a_mistake():
    with pytest.raises(AssertionError, match="small: the length of a row"):
        replace(SMALL, rows=[[Cell("a")]])
