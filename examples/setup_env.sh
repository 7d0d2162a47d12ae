# Sourced by quickstart.sh and tests/run.sh: an environment that has all the project needs.
# It uses the active virtual environment, else .venv in the repository root, and installs only when something changed.
# Expects ROOT (the repository root) and, optionally, EXTRAS (extras of pyproject.toml, such as test).

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x "$ROOT/.venv/bin/python" ]; then
        echo "setup: making $ROOT/.venv"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "setup: Python 3.10 or newer is needed, found $(python3 --version 2>&1)" >&2
            exit 1
        }
        python3 -m venv "$ROOT/.venv"
    fi
    # shellcheck disable=SC1091
    . "$ROOT/.venv/bin/activate"
fi

GPUS=0
if command -v nvidia-smi >/dev/null 2>&1; then
    GPUS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi

_setup_step() { # what, command...
    echo "setup: $1"
    shift
    "$@" >"$VIRTUAL_ENV/setup.log" 2>&1 || {
        cat "$VIRTUAL_ENV/setup.log" >&2
        echo "setup: '$*' failed" >&2
        exit 1
    }
}

_setup_stamp="$VIRTUAL_ENV/dualpipe_engine-$(printf '%s' "${EXTRAS:-} $ROOT" | cat - "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT"/csrc/* |
    python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')"
if [ ! -e "$_setup_stamp" ]; then
    _setup_step "installing build tools" python -m pip install -q "setuptools>=77" wheel ninja numpy
    if ! python -c 'import torch' 2>/dev/null; then
        if [ "$GPUS" -gt 0 ]; then
            _setup_step "installing torch" python -m pip install -q torch
        else
            _setup_step "installing torch (CPU)" python -m pip install -q torch==2.13.0
        fi
    fi
    # What follows must not replace this torch.
    python -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' \
        >"$VIRTUAL_ENV/constraints.txt"
    _setup_step "installing deepspeed and the other dependencies" \
        env DS_BUILD_OPS=0 PIP_CONSTRAINT="$VIRTUAL_ENV/constraints.txt" \
        python -m pip install -q --no-build-isolation -e "$ROOT${EXTRAS:+[$EXTRAS]}"
    touch "$_setup_stamp"
fi
if [ "$GPUS" -eq 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
# What DeepSpeed compiles at its first use is built against this environment: another one would build it anew, in turns.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
