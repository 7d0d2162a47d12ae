#!/usr/bin/env bash
# Lint, type-check and run the tests. Installs what is missing.
#
#   bash tests/run.sh                    what every change has to pass; minutes
#   bash tests/run.sh --all              everything, the tests marked `all` too: whole grids, fault matrix, soak
#   bash tests/run.sh --shuffle SEED     in another order (pytest-randomly)
#
# Further arguments go to pytest: bash tests/run.sh tests/schedule -k zbv
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
-h | --help)
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
ORDER=(-p no:randomly)
if [ "${1:-}" = --shuffle ]; then
    ORDER=(--randomly-seed="${2:?--shuffle needs a number}")
    shift 2
fi
EXTRAS=test
case " $* " in *" --all "*) EXTRAS=test,docs,trl ;; esac  # the site is built, TRL trains
# shellcheck disable=SC1091
. "$ROOT/examples/setup_env.sh"
cd "$ROOT"
trap wait EXIT # one that ends while it compiles leaves a lock behind
python tests/compile_first.py >/dev/null &
echo "== ruff"
python -m ruff check .
python -m ruff format --check .
echo "== mypy"
python -m mypy
echo "== pytest"
# A file's tests run in one process, so that what they share is made once; two files at a time hide each other's waits.
python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "${ORDER[@]}" "$@"
