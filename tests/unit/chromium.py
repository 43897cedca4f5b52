"""A headless Chromium for tests that look at a page: Debian's own, or installed from there.

The browser reaches only this machine: every other name resolves to nothing. The requests of a page
are reported.
"""

import functools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SETTINGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
)


@dataclass(frozen=True)
class Page:
    """A page as it was loaded.

    `dom` is its HTML after its scripts ran, `screenshot` a PNG of the window, `console` the
    lines of the console, `requests` the URLs that the page itself asked for over a network,
    loopback included.
    """

    dom: str
    screenshot: Path
    console: list[str]
    requests: list[str]


def load(
    url: str, folder: Path, width: int = 1200, height: int = 900, milliseconds: int = 5000
) -> Page:
    """Load a page in a new profile below `folder`.

    The page is read after `milliseconds` of its own (virtual) time. Where Chromium is missing and
    cannot be installed, the test is skipped; in CI it fails.
    """
    if problem := lacking():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)
    files = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]
    wanted = [
        f"--window-size={width},{height}",
        f"--virtual-time-budget={milliseconds}",
        "--dump-dom",
    ]
    command = ["chromium", *SETTINGS, *files, *wanted, f"--screenshot={folder / 'page.png'}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (folder / "page.png").is_file(), done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Page(done.stdout, folder / "page.png", console, requests_of(folder / "net.json"))


@functools.cache
def lacking() -> str | None:
    """Return why there is no Chromium, after trying to install Debian's; None: there is one."""
    if shutil.which("chromium"):
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "no chromium on this machine, and installing Debian's takes root and apt-get"
    update = subprocess.run(["apt-get", "update"], capture_output=True, text=True, timeout=600)
    words = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    install = subprocess.run(words, capture_output=True, text=True, timeout=900)
    said = (update.stderr + install.stderr)[-800:]
    return None if shutil.which("chromium") else f"apt-get could not install chromium: {said}"


def requests_of(log: Path) -> list[str]:
    """Return the URLs that the page asked for.

    Requests of the browser itself, such as the one for the page, have no origin.
    """
    record = json.loads(log.read_text())
    start = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event.get("params", {}) for event in record["events"] if event["type"] == start]
    return [job["url"] for job in jobs if "url" in job and job["initiator"] != "not an origin"]
