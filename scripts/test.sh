#!/usr/bin/env bash
# Set up, then check style, types and behaviour. --all also runs the slow tests; other arguments go to pytest.
# --lowest, as the first argument, runs only tests, in .venv-lowest, on the lowest versions that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv
if [ "${1:-}" = --lowest ]; then
    environment=.venv-lowest
    shift
    bash scripts/setup.sh --lowest
else
    bash scripts/setup.sh
fi
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "test: installing chromium, for the tests of the demo's page" >&2
    { apt-get -qq update && apt-get -qq install --yes chromium >/dev/null; } ||
        echo "test: chromium can't be installed; the browser tests are skipped" >&2
fi
# Style and types are checked on the newest versions only.
if [ "$environment" = .venv ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/lint-imports
    .venv/bin/pyright
fi
exec "$environment/bin/python" -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
