"""The real TensorBoard server on run folders: what it reads back over HTTP, and its pages in a browser."""

import dataclasses
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import chromium
import datasets
import pytest
import tiny_run
import torch
import yaml

from igd_ds import distributed, eval
from igd_ds.runlog import LAYOUT, RunLog

LOSSES = [3.0, 2.0, 1.5]
ALPHAS = ("0.0", "0.3", "0.6")


class Server:
    """A running TensorBoard: `get` answers of its HTTP API."""

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
    """Leave what a training writes of itself."""
    settings = {
        "output_dir": str(run),
        "weighting": "igd",
        "igd_beta": 0.1,
        "lora_r": None,
        "betas": [1, 2],
        **settings,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    log = RunLog(run, enabled=True, resume_step=0)
    for step, loss in enumerate(LOSSES, 1):
        log.log(
            step,
            {
                "train/loss": loss,
                "train/nll_zero_gain": loss / 2,
                "train/nll_nonzero_gain": 2 * loss,
                "valid/nll": loss,
            },
        )
    log.hparams(settings, {"best_validation": min(LOSSES)})
    log.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with two evaluations, and one that was only trained."""
    folder = tmp_path_factory.mktemp("runs")
    run, other = tiny_run.make(folder / "first"), folder / "second" / "run"
    train(run, dataset=str(run.parent / "data"))
    other.mkdir(parents=True)
    train(other, igd_beta=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(distributed, "init", lambda: None)
        patch.setattr(distributed, "device", lambda: torch.device("cpu"))
        usual = ["--model", run / "model", "--dataset", run.parent / "data", "--num_beams", 5]
        patch.setattr(
            "sys.argv",
            list(
                map(
                    str,
                    ["eval.py", *usual, "--alpha", *ALPHAS, "--output_dir", run / "eval" / "grid"],
                )
            ),
        )
        assert eval.main() == 0
        # As --alpha_from does, which wants lists of 10 items; this catalogue has 9.
        chosen = {"alpha": [0.0, 0.3], "alpha_from": str(run / "eval" / "grid")}
        patch.setattr(
            eval, "with_chosen_alpha", lambda config: dataclasses.replace(config, **chosen)
        )
        patch.setattr(
            "sys.argv", list(map(str, ["eval.py", *usual, "--output_dir", run / "eval" / "test"]))
        )
        assert eval.main() == 0
    return folder


@pytest.fixture(scope="module")
def server(runs):
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(runs),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    with open(runs / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert process.poll() is None, (runs / "server.log").read_text()
            if found := re.search(r"http://127\.0\.0\.1:\d+", (runs / "server.log").read_text()):
                server = Server(found[0])
                if (
                    len(server.get("runs")) == 8
                ):  # 2 trainings, 2 evaluations, each with its hparams
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"TensorBoard does not show the runs: {(runs / 'server.log').read_text()}")
        yield server
    finally:
        process.kill()
        process.wait()


def results(runs, name):
    return json.loads((runs / "first" / "run" / "eval" / name / "metrics.json").read_text())[
        "alpha"
    ]


def test_scalars(server, runs):
    tags = server.get("plugin/scalars/tags")
    assert {"train/loss", "train/nll_zero_gain", "valid/nll"} <= set(tags["first/run/tensorboard"])
    points = server.get("plugin/scalars/scalars", run="second/run/tensorboard", tag="train/loss")
    assert [(step, value) for _, step, value in points] == list(enumerate(LOSSES, 1))
    points = server.get(
        "plugin/scalars/scalars", run="first/run/eval/grid/tensorboard", tag="eval/ndcg@5"
    )
    found = {str(step / 1000): value for _, step, value in points}
    assert found == pytest.approx(
        {alpha: results(runs, "grid")[alpha]["token_match"]["ndcg@5"] for alpha in ALPHAS}
    )


def test_the_layout_groups_the_curves(server):
    layout = server.get("plugin/custom_scalars/layout")
    found = {
        c["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in c["chart"]}
        for c in layout["category"]
    }
    assert found == {
        name: {title: tags for title, (_, tags) in charts.items()}
        for name, charts in LAYOUT.items()
    }
    pattern = LAYOUT["loss by token group"]["training: zero and non-zero gain"][1][0]
    both = server.get("plugin/custom_scalars/scalars", run="first/run/tensorboard", tag=pattern)[
        "tag_to_events"
    ]
    assert set(both) == {"train/nll_zero_gain", "train/nll_nonzero_gain"}


def test_runs_are_compared_with_their_final_metrics(server, runs):
    asked = {
        "allowedStatuses": ["STATUS_UNKNOWN"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = {
        group["name"]: group
        for group in server.get("plugin/hparams/session_groups", asked)["sessionGroups"]
    }
    assert set(groups) == {
        str(runs / "first" / "run"),
        str(runs / "second" / "run"),
    }  # one row a run, whatever evaluated it
    trained, evaluated = groups[str(runs / "second" / "run")], groups[str(runs / "first" / "run")]
    assert trained["hparams"]["igd_beta"] == 0.5 and evaluated["hparams"]["igd_beta"] == 0.1
    assert evaluated["hparams"]["betas"] == "[1, 2]" and "lora_r" not in evaluated["hparams"]
    values = [
        {v["name"]["tag"]: v["value"] for v in group["metricValues"]}
        for group in (trained, evaluated)
    ]
    assert values[0] == {"best_validation": min(LOSSES)}
    expected = {"best_validation": min(LOSSES)}
    grid, test = results(runs, "grid"), results(runs, "test")
    best = max(ALPHAS, key=lambda alpha: grid[alpha]["token_match"]["ndcg@5"])
    for metric in ("hr@5", "ndcg@5"):
        expected[f"grid/{metric}"], expected[f"grid/{metric} at chosen alpha"] = (
            grid[a]["token_match"][metric] for a in ("0.0", best)
        )
        expected[f"test/{metric}"], expected[f"test/{metric} at chosen alpha"] = (
            test[a]["token_match"][metric] for a in ("0.0", "0.3")
        )
    assert values[1] == pytest.approx(expected)
    columns = {
        info["name"]["tag"] for info in server.get("plugin/hparams/experiment", {})["metricInfos"]
    }
    assert columns == set(expected)  # no curve among them


def test_figures_and_lists_of_an_evaluation(server, runs):
    where = "first/run/eval/grid/tensorboard"
    assert set(server.get("plugin/images/tags")[where]) == {
        f"eval/{n}" for n in ("alpha_grid", "popularity_deciles", "prefix_entropy")
    }
    (image,) = server.get("plugin/images/images", run=where, tag="eval/alpha_grid", sample=0)
    png = server.get(f"plugin/images/individualImage?{image['query']}&x")
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    texts = {
        text["step"]: text["text"]
        for text in server.get("plugin/text/text", run=where, tag="eval/lists/text_summary")
    }
    assert sorted(texts) == [0, 300, 600]
    assert texts[0].count("<strong>Row") == 5 and texts[0].count("<li>") == 25
    plain = tiny_run.Plain(runs / "first" / "run")
    split, shown = (
        plain.dataset.splits["test"],
        re.findall(r"<strong>Row (\d+)</strong>: (.+)</p>", texts[0]),
    )
    for row, said in shown:
        items = [*split.history(int(row))[-5:], split.targets[int(row)]]
        *history, target = (f"<code>{tiny_run.TITLES[item]}</code>" for item in items)
        assert said == f"{' → '.join(history)} → target {target}"
    assert len(shown) == 5 and max(said.count("→") for _, said in shown) == 4


def test_pages_in_a_browser(server, tmp_path):
    """Each chart of the layout asks for its curves (they lie in shadow trees); a tab without those names its cards in the DOM."""
    (tmp_path / "charts").mkdir()
    page = chromium.load(f"{server.url}/#custom_scalars", tmp_path / "charts", 1400, 1400, 8_000)
    asked = [
        urllib.parse.parse_qs(url.partition("?")[2])
        for url in page.requests
        if "custom_scalars/scalars" in url
    ]
    patterns = {
        pattern for charts in LAYOUT.values() for _, tags in charts.values() for pattern in tags
    }
    assert {query["tag"][0] for query in asked} == patterns
    (tmp_path / "series").mkdir()
    page = chromium.load(f"{server.url}/#timeseries", tmp_path / "series", 1400, 3500, 8_000)
    for name in ("best_validation", "eval/ndcg@5", "eval/alpha_grid", "eval/prefix_entropy"):
        assert f'title="{name}"' in page.dom, name
    assert "second/run/tensorboard" in page.dom and all(
        url.startswith(server.url) for url in page.requests
    )
