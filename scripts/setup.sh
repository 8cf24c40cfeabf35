#!/usr/bin/env bash
# Create .venv and install the package and its test dependencies in it. Does nothing if .venv is up to date.
# --lowest creates .venv-lowest instead: the oldest Python and the lowest versions that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.venv
candidates=(python3 python3.13 python3.12 python3.11)
if [ "${1:-}" = --lowest ]; then
    folder=.venv-lowest
    candidates=(python3.11 python3)
fi
python=""
for candidate in "${candidates[@]}"; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: no Python 3.11 or newer found; install one, e.g. 'apt-get install python3 python3-venv'" >&2
    exit 1
fi

stamp=$folder/installed-from
if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
    exit 0
fi
echo "setup: installing into $folder (a few minutes, most of them for torch)" >&2
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
if [ "$folder" = .venv ]; then
    "${pip[@]}" --editable '.[dev]'
else
    # pip always takes the highest versions; uv can take the lowest. --upgrade follows a bound that was lowered.
    "${pip[@]}" 'uv>=0.13'
    "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --upgrade --resolution lowest-direct --editable '.[dev]'
fi
cp pyproject.toml "$stamp"
