"""Fixtures of all tests.

Real data and reference outputs are not in the repository; tests that need them skip with a reason.
"""

import os
from pathlib import Path

# These must be set before torch is imported. Ranks are forked from this process: thread pools do
# not survive a fork, and asking whether there is a GPU must not start CUDA before it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from pretend_device import pretend_device  # noqa: E402

REPOSITORY = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests on the pretend accelerator after all others.

    A process that knows an accelerator behaves differently from then on, and it cannot forget it.
    For example, a backward pass starts a thread for the accelerator, and then autograd refuses to
    work in processes that are forked off, as the ranks of tests/dist are.
    """
    items.sort(key=lambda item: "pretend" in item.nodeid)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with the real data and golden outputs.

    It is $IGD_DS_SHARED, or `shared` beside the repository. In CI it must be there.
    """
    folder = Path(os.environ.get("IGD_DS_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        message = (
            f"no real data at {folder}; set IGD_DS_SHARED to the folder with data/ and golden/"
        )
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(params=["cpu", "pretend"])
def device(request) -> torch.device:
    """Return the CPU and, in a second test, a pretend accelerator."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    with pretend_device():
        yield torch.device("pretend")
