#!/usr/bin/env bash
# Lint and format check, no fixing: what CI and pre-commit run.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
