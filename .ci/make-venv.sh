#!/bin/sh
# Create a virtual environment at $1 with Python 3.12 or 3.11, or say how to get one.
set -eu
venv=$1
[ -x "$venv/bin/python" ] && exit 0
for python in ${PYTHON:-} python3.12 python3.11 python3 python; do
    # A command of that name may exist and not run (version managers): ask it.
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
        echo "creating $venv with $("$python" --version)"
        exec "$python" -m venv "$venv"
    fi
done
if command -v uv >/dev/null 2>&1; then
    echo "creating $venv with uv"
    exec uv venv --seed --python 3.12 "$venv"
fi
echo "No Python 3.11 or 3.12 found. Install one (apt-get install python3.12-venv, brew install" >&2
echo "python@3.12), or uv (https://docs.astral.sh/uv), or name one: make PYTHON=/path/to/python3.12" >&2
exit 1
