"""Fixtures of the unit tests."""

import oracle
import pytest


@pytest.fixture(params=["cpu", "pretend"])
def searched_on(request, monkeypatch) -> str:
    """Let `oracle.run_search` search on the CPU and, in a second test, on a pretend accelerator."""
    monkeypatch.setattr(oracle, "DEVICE", request.param)
    return request.param
