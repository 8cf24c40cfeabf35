#!/usr/bin/env bash
# Set up, then check style, types and behaviour. --all also runs the slow tests; other words go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
exec .venv/bin/python -m pytest "$@"
