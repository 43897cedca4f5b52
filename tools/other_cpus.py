"""Run tests as if this machine had an older processor.

    python tools/other_cpus.py [arguments of pytest]

Floating-point libraries choose their routines by the processor's instruction sets, and each choice
rounds differently. This script runs the tests marked `isa` under two of them:

* default: no instruction set beyond SSE4.2, the least that torch and numpy run on;
* avx2: no AVX-512. Skipped where the processor has no AVX-512: there it is what `make test` runs.

PyTorch, oneDNN, MKL, OpenBLAS, numpy, Arrow and the C library's own mathematics are all told so. On
processors other than x86-64 there is nothing to choose, and the script does nothing.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
TORCH_CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"

OTHER_CPUS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OPENBLAS_CORETYPE": "Prescott",
        "ARROW_USER_SIMD_LEVEL": "SSE4_2",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "ARROW_USER_SIMD_LEVEL": "AVX2",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F",
    },
}


def processor_flags() -> set[str]:
    """Return the instruction sets that the kernel reports; empty where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def numpy_features(name: str) -> list[str]:
    """Return which instruction sets numpy found here and has to leave out to be like `name`."""
    found = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    if name == "default":
        return found
    # X86_V4 is numpy's name for the common part of AVX-512.
    return [feature for feature in found if feature.startswith(("AVX512", "X86_V4"))]


def environment_of(name: str) -> dict[str, str]:
    """Return the environment under which a process computes as on the processor `name`."""
    disabled = " ".join(numpy_features(name))
    own = OTHER_CPUS[name] | {"NPY_DISABLE_CPU_FEATURES": disabled, "OMP_NUM_THREADS": "1"}
    return os.environ | own


def main() -> int:
    """Run the marked tests as on each other processor; return an exit code, 0 if all passed."""
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"{platform.machine()}: no other instruction sets to choose from")
        return 0

    flags, failure = processor_flags(), 0
    for name in OTHER_CPUS:
        if name == "avx2" and not {"avx2", "avx512f"} <= flags:
            print("== avx2: skipped, this processor has no AVX-512 to leave out", flush=True)
            continue

        environment = environment_of(name)
        python = [sys.executable, "-c", TORCH_CAPABILITY]
        capability = subprocess.check_output(python, env=environment, text=True).strip()
        assert capability.lower() == name, f"torch computes with {capability}, not {name}"

        print(f"== tests as on a processor with {name} instructions", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", "isa", *sys.argv[1:]]
        failure = subprocess.run(command, env=environment, cwd=REPOSITORY).returncode or failure
    return failure


if __name__ == "__main__":
    sys.exit(main())
