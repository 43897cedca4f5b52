"""A launcher of igd_ds/studies/sweep.py that stands in for train.py, eval.py and baseline.py: it leaves their files, or obeys $FAKE_PLAN.

That is config.yaml of train.py, and of eval.py request.json without the hashes.

The plan is a folder: `scores.json` has validation NDCG@10 by row; `ROW.SCRIPT` (train, valid, test, test-exact) what to do
instead: "fail", "stop" (exit 85), "hang" (until a signal) or "meet" (wait for another row that meets).
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from igd_ds.config.options import EvalConfig, TrainConfig, parse


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def flags_of(words: list[str]) -> dict[str, list[str]]:
    flags = {}
    for word in words:
        if word.startswith("--"):
            last = flags.setdefault(word[2:], [])
        else:
            last.append(word)
    return flags


def main() -> int:
    plan, script, flags = (
        Path(os.environ["FAKE_PLAN"]),
        Path(sys.argv[1]).name,
        flags_of(sys.argv[2:]),
    )
    output = Path(flags["output_dir"][0])
    if script == "baseline.py":
        write(output / "summary.json", {})
        output = output / "eval" / flags["splits"][0]
    part = "train" if script == "train.py" else output.name
    row = output.name if script == "train.py" else output.parents[1].name
    with open(plan / "calls.jsonl", "a") as file:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(
            json.dumps(
                {"row": row, "part": part, "gpu": gpu, "flags": flags, "script": sys.argv[1]}
            )
            + "\n"
        )
    if script != "baseline.py":
        settings = dataclasses.asdict(
            parse(TrainConfig if part == "train" else EvalConfig, sys.argv[2:])
        )
        settings["max_length"] = settings["max_length"] or TrainConfig.max_length
        write(
            output / ("config.yaml" if part == "train" else "request.json"), settings
        )  # JSON is YAML
    order = plan / f"{row}.{part}"
    order = order.read_text() if order.is_file() else ""
    if order == "fail":
        print(
            "100 %\rTraceback (most recent call last):\nValueError: the model is broken\ntorchrun: ChildFailedError: rank 0",
            flush=True,
        )
        return 1
    if order == "stop":
        return 85
    if order == "hang":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(
                number, lambda number, _: (write(output / f"saved-on-{number}", ""), os._exit(85))
            )
        (plan / "hanging").touch()
        time.sleep(60)
    if order == "meet":
        (plan / f"{row}.here").touch()
        deadline = time.monotonic() + 20
        while len(list(plan.glob("*.here"))) < 2:
            assert time.monotonic() < deadline, "nobody came"
            time.sleep(0.02)
    if part == "train":
        write(output / "summary.json", {})
    else:
        value = json.loads((plan / "scores.json").read_text())[row]
        write(output / "metrics.json", {"alpha": {"0.0": {"token_match": {"ndcg@10": value}}}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
