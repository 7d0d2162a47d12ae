#!/usr/bin/env bash
# Lint, type-check and run all tests; further arguments go to pytest. Installs what is missing.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=test
# shellcheck disable=SC1091
. "$ROOT/examples/setup_env.sh"
cd "$ROOT"
echo "== ruff"
python -m ruff check .
python -m ruff format --check .
echo "== mypy"
python -m mypy
echo "== pytest"
python -m pytest "$@"
