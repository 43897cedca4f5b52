"""Fixtures of all tests. Real data and reference outputs live outside the repository; tests that need them skip with a reason."""

import os
from pathlib import Path

# Before torch is imported anywhere: ranks are forked from this process, and thread pools do not survive a fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
    "1"  # asking whether there is a GPU must not start CUDA before the forks
)

import pytest  # noqa: E402

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the real data and golden outputs: $IGD_DS_SHARED, or `shared` beside the repository. In CI it must be there."""
    folder = Path(os.environ.get("IGD_DS_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        message = f"real data not found at {folder}; set IGD_DS_SHARED to the folder that holds data/ and golden/"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
