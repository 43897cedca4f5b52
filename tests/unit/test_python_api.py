"""The Python API: README's quickstart as it stands there, and errors that name the argument.

Trainings run in a process of their own, because a process group cannot be left again.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import tiny_run

import igd_ds
from igd_ds.errors import UsageError
from igd_ds.evaluation.metrics import table_lines

README = Path(__file__).parents[2] / "README.md"
PRETRAINED = '"HuggingFaceTB/SmolLM2-135M"'
STEPS = '"max_steps": 200'

AFTER_THE_QUICKSTART = """
import json, os, signal, sys
from igd_ds import locks
from igd_ds.commands import embed

# The process is as it was before.
def changed():
    return {name for name in BEFORE.keys() | os.environ if BEFORE.get(name) != os.environ.get(name)}

assert not changed(), changed()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not locks.held()
assert callable(igd_ds.train)

# A second call returns what is finished; other settings are another run.
again = igd_ds.train(dataset, model=MODEL, output="RUN", **settings)
try:
    igd_ds.train(dataset, model=MODEL, output="RUN", **settings, epochs=4)
except igd_ds.errors.UsageError as error:
    refusal = str(error)

# A random model of a config, evaluated at several α; without pandas it is a list.
other = igd_ds.train(
    dataset, "model.json", "OTHER", "uniform", tokenizer=MODEL, max_steps=1, epochs=1, quiet=True
)
frame = igd_ds.evaluate(other, "valid", alpha=(0, 0.2), num_beams=5, num_rows=6, quiet=True)
sys.modules["pandas"] = None
lines = igd_ds.evaluate(other, "valid", alpha=(0, 0.2), num_beams=5, num_rows=6, quiet=True)
embed.main(["--dataset", "DATASET", "--cooccurrence", "4", "--output", "VECTORS"])
assert not changed() and not locks.held(), changed()
result = {
    "run": str(run), "again": str(again), "refusal": refusal, "lines": lines,
    "frame": frame.to_dict("records"), "ids": [place.source_ids for place in
    recommender.recommend([history], k=10)[0]],
}
json.dump(result, open("result.json", "w"))
"""


def quickstart() -> str:
    """Return the lines of README that go from a table to recommended items."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "igd_ds.train(" in block]
    return block


def write_shop(path: Path) -> pandas.DataFrame:
    """Write and return a shop's orders: 20 users and 26 items, each named by a letter."""
    bought = [
        (user, visit, (7 * user + visit * visit) % 26) for user in range(20) for visit in range(6)
    ]
    orders = pandas.DataFrame(
        {
            "user": f"u-{user}",
            "item": f"sku-{item}",
            "timestamp": 1_700_000_000 + 86_400 * visit + user,
            "title": f"Product {chr(ord('a') + item)}",
        }
        for user, visit, item in bought
    )
    orders.to_csv(path, index=False)
    return orders


def test_twelve_lines_from_a_table_to_recommended_items(tmp_path):
    code = quickstart()
    assert len(code.splitlines()) <= 12
    assert code.count(PRETRAINED) == code.count(STEPS) == 1

    orders = write_shop(tmp_path / "shop.csv")
    model = tmp_path / "tiny"
    tiny_run.write_model(model)
    tiny_run.letter_tokenizer().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(config))

    code = code.replace(PRETRAINED, "MODEL").replace(STEPS, '"max_steps": 2')
    code = 'import os\nBEFORE, MODEL = dict(os.environ), "tiny"\n' + code + AFTER_THE_QUICKSTART
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(README.parent), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr

    # Ten items by the shop's own ids, each once, with the titles of the table.
    places = re.findall(r"^(\d+) \('(sku-\d+)',\) (.+)$", done.stdout, re.MULTILINE)
    names = dict(zip(orders["item"], orders["title"], strict=True))
    assert [int(rank) for rank, _, _ in places] == list(range(1, 11))
    assert len({item for _, item, _ in places}) == 10
    assert all(names[item] == title for _, item, title in places)

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ids"] == [[item] for _, item, _ in places]
    assert result["run"] == result["again"] == "RUN"
    assert (
        "--output_dir RUN belongs to another run; these settings differ: epochs"
        in (result["refusal"])
    )
    frame, lines = (pandas.DataFrame(result[name]) for name in ("frame", "lines"))
    assert frame.equals(lines)  # None in the list, NaN in the frame
    metrics = json.loads((tmp_path / "OTHER/eval/valid/metrics.json").read_text())
    assert result["lines"] == json.loads(json.dumps(table_lines(metrics)))
    of_kinds = {(line["alpha"], line["match"]) for line in result["lines"]}
    assert {(0.0, "item_match"), (0.2, "item_match"), (0.2, "token_match")} <= of_kinds
    assert "item_match" in done.stdout


def test_wrong_arguments_of_train_are_named(tmp_path):
    def refusal(*arguments, **settings) -> str:
        with pytest.raises(UsageError) as raised:
            igd_ds.train(*arguments, **settings)
        return str(raised.value)

    first = ("DATASET", "some/model", tmp_path / "RUN")
    assert refusal(*first, epoch=2) == (
        "igd_ds.train: unknown setting 'epoch', did you mean 'epochs'?"
    )
    assert refusal(*first, epochs=1.5) == "igd_ds.train: 'epochs' takes int, found 1.5"
    assert refusal(*first, schedule="flat").startswith("igd_ds.train: 'schedule' is one of cosine")
    assert refusal(*first, epochs=0) == "--epochs must be at least 1, found 0"
    assert "did you mean 'igd'" in refusal(*first, objective="idg")
    assert refusal(*first, weighting="uniform") == (
        "igd_ds.train: another argument sets 'objective' already: leave it out"
    )
    assert refusal("DATASET", "model.json", "RUN") == (
        "--model_config has no tokenizer of its own: give --tokenizer"
    )
    assert refusal(*first) == "--objective igd needs --igd_beta"
    assert "DATASET" in refusal(*first, igd_beta=0.1)
    assert not (tmp_path / "RUN").exists()


def test_wrong_arguments_of_evaluate_are_named(tmp_path):
    run = tiny_run.make(tmp_path)
    with pytest.raises(UsageError, match="igd_ds.evaluate: 'split' is one of train, valid, test"):
        igd_ds.evaluate(run, split="tests")
    with pytest.raises(UsageError, match="igd_ds.evaluate: unknown setting 'aplha', did you mean"):
        igd_ds.evaluate(run, aplha=0.1)
    with pytest.raises(UsageError, match=r"igd_ds.evaluate: 'alpha' takes float, found 'much'"):
        igd_ds.evaluate(run, alpha="much")
    with pytest.raises(UsageError, match="no config.yaml in"):
        igd_ds.evaluate(tmp_path / "nothing")
    assert not (run / "eval").exists()
