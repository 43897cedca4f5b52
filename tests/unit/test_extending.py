"""The code of the documentation works.

For docs/extending, a copy of the package is changed as the pages say, and tested.
"""

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs" / "extending").glob("*.md") if path.stem != "index")
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[str, str, str]]:
    """Return (language, file, text) of the blocks that name a file."""
    return BLOCK.findall(page.read_text())


def changed(text: str, difference: str) -> str:
    """Return a file's text with a difference carried out.

    Its lines begin with "+", "-" or a space; an empty line stands for an empty line. What the file
    has now must occur in it once.
    """
    lines = [(line[:1] or " ", line[1:]) for line in difference.splitlines()]
    assert {sign for sign, _ in lines} <= {" ", "+", "-"}
    before = "".join(f"{line}\n" for sign, line in lines if sign != "+")
    after = "".join(f"{line}\n" for sign, line in lines if sign != "-")
    assert text.count(before) == 1, f"found {text.count(before)} times:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of package and helpers of tests, changed as the pages say."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("igd_ds", "tests"):
        caches = shutil.ignore_patterns("__pycache__", "test_*.py")
        shutil.copytree(ROOT / name, copy / name, ignore=caches)

    for page in PAGES:
        for language, name, text in blocks_of(page):
            path = copy / name
            if language == "diff":
                text = changed(path.read_text(), text)
            else:
                assert not path.exists(), f"{page.name} writes {name}, which exists"
            path.write_text(text)
    return copy


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a Python module with the extended package."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_every_page_is_a_whole_example():
    assert {page.stem for page in PAGES} == {"objective", "backbone", "source", "metric"}
    for page in PAGES:
        names = [name for _, name, _ in blocks_of(page)]
        assert any(name.startswith("igd_ds/") for name in names)
        assert sum(name.startswith("tests/unit/test_") for name in names) == 1


def test_the_tests_of_the_pages_pass(extended):
    tests = sorted(path.name for path in (extended / "tests" / "unit").glob("test_*.py"))
    assert len(tests) == len(PAGES)
    words = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(extended)]
    done = run(extended, "pytest", *words, *(f"tests/unit/{name}" for name in tests))
    assert "skipped" not in done.stdout


def test_the_code_of_the_pages_is_like_all_other_code(extended):
    """The files pass ruff with the project's rules, line length included."""
    shutil.copy(ROOT / "pyproject.toml", extended)
    names = [name for page in PAGES for _, name, _ in blocks_of(page)]
    run(extended, "ruff", "check", "--no-cache", *names)
    run(extended, "ruff", "format", "--check", "--no-cache", *names)


def test_the_numbers_of_the_concepts_pages():
    """The example of the trie's page prints what the page and its figure say."""
    page = ROOT / "docs" / "concepts" / "trie.md"
    done = doctest.testfile(str(page), module_relative=False)
    assert done.attempted > 5 and not done.failed

    figure = (page.parent / "trie.svg").read_text()
    for number in re.findall(r"^\w+ \d+ \d+ (\d\.\d\d) ", page.read_text(), re.MULTILINE):
        assert f">{number}<" in figure
