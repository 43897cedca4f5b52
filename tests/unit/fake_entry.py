"""A launcher for `igd sweep` that replaces train.py, eval.py and baseline.py.

It writes the files that they would leave: config.yaml of train.py, and request.json of eval.py
without the hashes. Or it does what the folder $FAKE_PLAN says: `scores.json` has the validation
NDCG@10 of each row, `defaults.json` the default settings of the scripts by name. A file
`ROW.SCRIPT` (train, valid, test, test-exact) names another action: "fail", "stop" (exit 85), "hang"
(until a signal), "launch" (as torchrun: start another process that hangs, and die of a signal) or
"meet" (wait until another row meets).

It imports nothing slow, because tests start it hundreds of times. The flags are checked by the test
that reads `calls.jsonl`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LONGEST_WAIT = 20  # seconds


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def flags_of(words: list[str]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            last = flags.setdefault(word[2:], [])
        else:
            last.append(word)
    return flags


def settings_of(flags: dict[str, list[str]], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a script: those of the flags, and the defaults of the others."""
    settings = dict(defaults)
    for name, words in flags.items():
        if not words:
            settings[name.removeprefix("no-")] = not name.startswith("no-")
            continue
        values = [value_of(word) for word in words]
        is_list = isinstance(defaults.get(name), list)
        settings[name] = values if is_list else values[0]
    return settings


def value_of(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def obey(order: str, plan: Path, row: str, output: Path) -> int | None:
    """Do what the plan orders; return the exit code, or None to go on as usual."""
    if order == "fail":
        print("100 %\rTraceback (most recent call last):\nValueError: the model is broken")
        print("torchrun: ChildFailedError: rank 0", flush=True)
        return 1
    if order == "stop":
        return 85

    if order == "hang":

        def save(number: int, _: object) -> None:
            time.sleep(0.5)
            write(output / f"saved-on-{number}", "")
            os._exit(85)

        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, save)
        (plan / "hanging").touch()
        time.sleep(60)

    if order == "launch":
        rank = os.environ | {"FAKE_ORDER": "hang"}
        subprocess.Popen([sys.executable, *sys.argv], env=rank, start_new_session=True)
        time.sleep(60)

    if order == "meet":
        (plan / f"{row}.here").touch()
        deadline = time.monotonic() + LONGEST_WAIT
        while len(list(plan.glob("*.here"))) < 2:
            assert time.monotonic() < deadline, "nobody came"
            time.sleep(0.02)
    return None


def likelihood_of(description: Path) -> dict[str, Any]:
    if description.is_file():
        found: dict[str, Any] = json.loads(description.read_text())["likelihood"]
        return found
    return {"softmax": "full", "temperature": 1.0}


def main() -> int:
    plan, script = Path(os.environ["FAKE_PLAN"]), Path(sys.argv[1]).name
    flags = flags_of(sys.argv[2:])
    output = Path(flags["output_dir"][0])
    if script == "baseline.py":
        write(output / "summary.json", {})
        output = output / "eval" / flags["splits"][0]
    part = "train" if script == "train.py" else output.name
    row = output.name if script == "train.py" else output.parents[1].name

    call = {"row": row, "part": part, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    with open(plan / "calls.jsonl", "a") as file:
        file.write(json.dumps(call | {"flags": flags, "words": sys.argv[1:]}) + "\n")
    if script != "baseline.py":
        defaults = json.loads((plan / "defaults.json").read_text())[script]
        settings = settings_of(flags, defaults)
        settings["max_length"] = settings["max_length"] or 512
        if script == "eval.py":  # as the model was trained
            likelihood = likelihood_of(output.parents[1] / "model/igd_ds.json")
            for key, asked in (("softmax", "auto"), ("temperature", None)):
                settings[key] = likelihood[key] if settings[key] == asked else settings[key]
        name = "config.yaml" if part == "train" else "request.json"  # JSON is YAML
        write(output / name, settings)

    path = plan / f"{row}.{part}"
    order = path.read_text() if path.is_file() else ""
    code = obey(os.environ.get("FAKE_ORDER", order), plan, row, output)
    if code is not None:
        return code
    if part == "train":
        write(output / "summary.json", {})
    else:
        value = json.loads((plan / "scores.json").read_text())[row]
        write(output / "metrics.json", {"alpha": {"0.0": {"item_match": {"ndcg@10": value}}}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
