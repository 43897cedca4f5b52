"""The real TensorBoard server on run folders: its answers over HTTP, and its pages in a browser.

pytest.approx compares with its relative default, 1e-6: TensorBoard keeps scalars in fp32.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import chromium
import pytest
import tiny_run
import torch
import yaml

from igd_ds import distributed, eval
from igd_ds.runlog import LAYOUT, RunLog

LOSSES = [3.0, 2.0, 1.5]
ALPHAS = ("0.0", "0.3", "0.6")


class Server:
    """A running TensorBoard; `get` returns answers of its HTTP API."""

    def __init__(self, url):
        self.url = url

    def get(self, path, body=None, **arguments):
        query = urllib.parse.urlencode(arguments)
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/data/{path}?{query}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if "json" in answer.headers["Content-Type"] else content


def train(run, **settings):
    """Write the settings and the log that a training writes."""
    settings = {
        "output_dir": str(run),
        "objective": "igd",
        "igd_beta": 0.1,
        "lora_r": None,
        "betas": [1, 2],
        **settings,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))

    log = RunLog(run, enabled=True, resume_step=0)
    for step, loss in enumerate(LOSSES, 1):
        values = {
            "train/loss": loss,
            "train/nll_zero_gain": loss / 2,
            "train/nll_nonzero_gain": 2 * loss,
            "valid/nll": loss,
        }
        log.log(step, values)
    log.hparams(settings, {"best_validation": min(LOSSES)})
    log.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make a run with two evaluations, and one that was only trained."""
    folder = tmp_path_factory.mktemp("runs")
    run, other = tiny_run.make(folder / "first"), folder / "second" / "run"
    train(run, dataset=str(run.parent / "data"))
    other.mkdir(parents=True)
    train(other, igd_beta=0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(distributed, "init", lambda *_: None)
        patch.setattr(distributed, "device", lambda: torch.device("cpu"))

        def evaluate(name, *flags):
            model = ["--model", run / "model", "--dataset", run.parent / "data", "--num_beams", 5]
            words = ["eval.py", *model, *flags, "--output_dir", run / "eval" / name]
            patch.setattr("sys.argv", list(map(str, words)))
            assert eval.main() == 0

        evaluate("grid", "--alpha", *ALPHAS)
        # As --alpha_from does, which needs lists of 10 items; this catalogue has 9.
        chosen = {"alpha": (0.0, 0.3), "alpha_from": str(run / "eval" / "grid")}
        patch.setattr(eval, "with_chosen_alpha", lambda c: dataclasses.replace(c, **chosen))
        evaluate("test")
    return folder


@pytest.fixture(scope="module")
def server(runs):
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs)]
    command += ["--host", "127.0.0.1", "--port", "0"]
    log_file = runs / "server.log"
    with open(log_file, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield wait_for(process, log_file)
    finally:
        process.kill()
        process.wait()


def wait_for(process, log_file) -> Server:
    """Return the server once it shows all runs."""
    for _ in range(240):
        assert process.poll() is None, log_file.read_text()
        if found := re.search(r"http://127\.0\.0\.1:\d+", log_file.read_text()):
            server = Server(found[0])
            # Two trainings and two evaluations, each with its hparams.
            if len(server.get("runs")) == 8:
                return server
        time.sleep(0.5)
    pytest.fail(f"TensorBoard does not show the runs: {log_file.read_text()}")


def results(runs, name):
    """Return the metrics of an evaluation, by α."""
    path = runs / "first" / "run" / "eval" / name / "metrics.json"
    return json.loads(path.read_text())["alpha"]


def test_scalars(server, runs):
    tags = server.get("plugin/scalars/tags")
    assert {"train/loss", "train/nll_zero_gain", "valid/nll"} <= set(tags["first/run/tensorboard"])
    points = server.get("plugin/scalars/scalars", run="second/run/tensorboard", tag="train/loss")
    assert [(step, value) for _, step, value in points] == list(enumerate(LOSSES, 1))

    grid = {"run": "first/run/eval/grid/tensorboard", "tag": "eval/ndcg@5"}
    points = server.get("plugin/scalars/scalars", **grid)
    found = {str(step / 1000): value for _, step, value in points}
    values = results(runs, "grid")
    expected = {alpha: values[alpha]["item_match"]["ndcg@5"] for alpha in ALPHAS}
    assert found == pytest.approx(expected)

    points = server.get("plugin/scalars/scalars", **grid | {"tag": "eval/token_match_ndcg@5"})
    found = {str(step / 1000): value for _, step, value in points}
    expected = {alpha: values[alpha]["token_match"]["ndcg@5"] for alpha in ALPHAS}
    assert found == pytest.approx(expected)


def test_the_layout_groups_the_curves(server):
    layout = server.get("plugin/custom_scalars/layout")
    found = {
        category["title"]: {c["title"]: c["multiline"]["tag"] for c in category["chart"]}
        for category in layout["category"]
    }
    expected = {
        name: {title: tags for title, (_, tags) in charts.items()}
        for name, charts in LAYOUT.items()
    }
    assert found == expected

    pattern = LAYOUT["loss by token group"]["training: zero and non-zero gain"][1][0]
    asked = {"run": "first/run/tensorboard", "tag": pattern}
    both = server.get("plugin/custom_scalars/scalars", **asked)["tag_to_events"]
    assert set(both) == {"train/nll_zero_gain", "train/nll_nonzero_gain"}


def hparams(server) -> dict:
    """Return the rows of the HParams table, by run."""
    asked = {
        "allowedStatuses": ["STATUS_UNKNOWN"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = server.get("plugin/hparams/session_groups", asked)["sessionGroups"]
    return {group["name"]: group for group in groups}


def metric_values(group) -> dict:
    return {entry["name"]["tag"]: entry["value"] for entry in group["metricValues"]}


def test_runs_are_compared_with_their_final_metrics(server, runs):
    groups = hparams(server)
    first, second = (str(runs / name / "run") for name in ("first", "second"))
    assert set(groups) == {first, second}  # one row for each run, whatever evaluated it

    trained, evaluated = groups[second], groups[first]
    assert trained["hparams"]["igd_beta"] == 0.5
    assert evaluated["hparams"]["igd_beta"] == 0.1
    assert evaluated["hparams"]["betas"] == "[1, 2]"
    assert "lora_r" not in evaluated["hparams"]

    grid, test = results(runs, "grid"), results(runs, "test")
    best = max(ALPHAS, key=lambda alpha: grid[alpha]["token_match"]["ndcg@5"])
    expected = {"best_validation": min(LOSSES)}
    for metric in ("hr@5", "ndcg@5"):
        for match, prefix in (("item_match", ""), ("token_match", "token_match_")):
            name = prefix + metric
            expected[f"grid/{name}"] = grid["0.0"][match][metric]
            expected[f"grid/{name} at chosen alpha"] = grid[best][match][metric]
            expected[f"test/{name}"] = test["0.0"][match][metric]
            expected[f"test/{name} at chosen alpha"] = test["0.3"][match][metric]
    assert metric_values(trained) == {"best_validation": min(LOSSES)}
    assert metric_values(evaluated) == pytest.approx(expected)

    columns = server.get("plugin/hparams/experiment", {})["metricInfos"]
    assert {info["name"]["tag"] for info in columns} == set(expected)  # no curve among them


def test_figures_of_an_evaluation(server):
    where = "first/run/eval/grid/tensorboard"
    names = ("alpha_grid", "popularity_deciles", "prefix_entropy")
    assert set(server.get("plugin/images/tags")[where]) == {f"eval/{name}" for name in names}

    (image,) = server.get("plugin/images/images", run=where, tag="eval/alpha_grid", sample=0)
    png = server.get(f"plugin/images/individualImage?{image['query']}&x")
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5000


def test_lists_of_an_evaluation(server, runs):
    where = {"run": "first/run/eval/grid/tensorboard", "tag": "eval/lists/text_summary"}
    texts = {text["step"]: text["text"] for text in server.get("plugin/text/text", **where)}
    assert sorted(texts) == [0, 300, 600]
    assert texts[0].count("<strong>Row") == 5
    assert texts[0].count("<li>") == 25

    split = tiny_run.Plain(runs / "first" / "run").dataset.splits["test"]
    shown = re.findall(r"<strong>Row (\d+)</strong>: (.+)</p>", texts[0])
    for row, line in shown:
        items = [*split.history(int(row))[-5:], split.targets[int(row)]]
        *history, target = (f"<code>{tiny_run.TITLES[item]}</code>" for item in items)
        assert line == f"{' → '.join(history)} → target {target}"
    assert len(shown) == 5
    assert max(line.count("→") for _, line in shown) == 4


def test_charts_in_a_browser(server, tmp_path):
    """Each chart of the layout asks for its curves. (Its own elements lie in shadow trees.)"""
    page = chromium.load(f"{server.url}/#custom_scalars", tmp_path, 1400, 1400, 8_000)
    asked = [
        urllib.parse.parse_qs(url.partition("?")[2])
        for url in page.requests
        if "custom_scalars/scalars" in url
    ]
    charts = [chart for charts in LAYOUT.values() for chart in charts.values()]
    patterns = {pattern for _, tags in charts for pattern in tags}
    assert {query["tag"][0] for query in asked} == patterns


def test_cards_in_a_browser(server, tmp_path):
    """The tab with all time series names its cards in the DOM."""
    page = chromium.load(f"{server.url}/#timeseries", tmp_path, 1400, 3500, 8_000)
    for name in ("best_validation", "eval/ndcg@5", "eval/alpha_grid", "eval/prefix_entropy"):
        assert f'title="{name}"' in page.dom, name
    assert "second/run/tensorboard" in page.dom
    assert all(url.startswith(server.url) for url in page.requests)
