#!/usr/bin/env bash
# Make .venv and install the package in it, with what its tests need. Does nothing when that is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

python=""
for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: no Python 3.11 or newer found; install one, e.g. 'apt-get install python3 python3-venv'" >&2
    exit 1
fi

stamp=.venv/installed-from
if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
    exit 0
fi
echo "setup: installing into .venv (a few minutes, most of them for torch)" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
cp pyproject.toml "$stamp"
