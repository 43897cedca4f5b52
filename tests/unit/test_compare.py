"""The comparison table: α chosen on validation, runs evaluated alike only."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import compare  # noqa: E402

VALUES = {"hr@1": 0.1, "hr@5": 0.2, "hr@10": 0.3, "ndcg@5": 0.15, "ndcg@10": 0.2}


def make_run(folder: Path, valid: dict[str, float], rows: int = 7) -> Path:
    for split in ("valid", "test"):
        alphas = {a: {"token_match": VALUES | ({"ndcg@10": v} if split == "valid" else {})} for a, v in valid.items()}
        metrics = {"dataset": "toys", "rows": rows, "num_rows": 0, "seed": 0, "num_beams": 10, "length_penalty": 0.0,
                   "popularity_baseline": VALUES, "alpha": alphas}  # fmt: skip
        (folder / "eval" / split).mkdir(parents=True)
        (folder / "eval" / split / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.yaml").write_text("weighting: igd\nigd_beta: 0.1\nseed: 3\n")
    return folder


def test_the_chosen_alpha_is_marked(tmp_path, capsys):
    run = make_run(tmp_path / "a", {"0.0": 0.1, "0.2": 0.3, "0.4": 0.3})
    assert compare.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7 test rows of toys, 10 beams")
    assert lines[4].startswith("| popularity ") and "0.1000" in lines[4]
    assert [line.split("|")[2].strip() for line in lines[5:]] == ["0.0", "0.2 *", "0.4"]  # the smaller α wins a tie
    assert all("igd β=0.1, seed 3" in line for line in lines[5:])


def test_runs_that_differ_are_refused(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", {"0.0": 0.1}), make_run(tmp_path / "b", {"0.0": 0.1}, rows=8)]
    assert compare.main([str(run) for run in runs]) == 2
    assert "not evaluated alike: rows differ" in capsys.readouterr().err


def test_a_run_without_evaluation_names_the_command(tmp_path, capsys):
    assert compare.main([str(tmp_path)]) == 2
    assert "igd_ds/eval.py --model" in capsys.readouterr().err
