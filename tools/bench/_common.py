"""What the benchmarks share: hardware line, table, measurement in a new process, closing JSON."""

import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

REPOSITORY = Path(__file__).resolve().parents[2]


def hardware() -> str:
    """Return one line that names the processor, the cores this process may use, and the memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        model = names[0] if names else model

    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header; the first column is aligned left, floats have 3 digits."""
    cells = [
        [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in [header, *rows]
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    for row in cells:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *numbers]))


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far (ru_maxrss)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_fresh(script: str, *args: Any) -> dict[str, Any]:
    """Run `script args` in a new Python process; return the JSON object on its last stdout line."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, args)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_fork(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a fork of this process, so that the imports are paid once.

    The parent must not have computed anything before: thread pools do not survive a fork.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def finish(name: str, figures: dict[str, float], quick: bool) -> None:
    """Print the closing JSON object; a full run also writes it to docs/benchmarks/NAME.json."""
    figures = {key: float(f"{value:.4g}") for key, value in figures.items()}
    result = {"bench": name, "hardware": hardware(), "figures": figures}

    if not quick:
        path = REPOSITORY / "docs" / "benchmarks" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, path)

    print(json.dumps(result), flush=True)
