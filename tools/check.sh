#!/usr/bin/env bash
# All checks that change nothing: lint, format, types, spelling. CI, `make lint` and pre-commit run this file.
set -euo pipefail
cd "$(dirname "$0")/.."

ruff check .
ruff format --check .
mypy          # the package and its commands; settings and untyped libraries: pyproject.toml
codespell
