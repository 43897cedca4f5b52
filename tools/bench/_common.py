"""What the benchmarks share: the hardware line, a readable table, a measurement in a fresh process, the last line."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def hardware() -> str:
    """One line that names processor, cores this process may use, and memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def print_table(header: list[str], rows: list[list]) -> None:
    """Print rows under a header, the first column to the left, the others to the right; floats with 3 digits."""
    cells = [
        [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in [header, *rows]
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
        )


def peak_bytes() -> int:
    """Peak resident memory of this process so far (ru_maxrss)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_fresh(script: str, *args) -> dict:
    """Run `script args` in a fresh process of this Python and return the JSON object on its last stdout line."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, args)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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
