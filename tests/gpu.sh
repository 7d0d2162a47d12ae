#!/usr/bin/env bash
# Proves the engine on one GPU, in under 8 minutes: tests/gpu.sh [WHEELS_FOLDER] [arguments of tests/gpu/run.py]
#
# WHEELS_FOLDER holds wheels of DeepSpeed (built with DS_BUILD_OPS=0) and of what it needs beside the machine's torch:
# hjson, pydantic, pydantic-core, annotated-types, typing-inspection, py-cpuinfo, msgpack. They are installed, without an
# index, into a folder of their own that goes before the packages of $PYTHON (default: python3) and is removed at the end.
# Without wheels these packages are used as they are; where DeepSpeed is not among them the checks that need it are
# skipped.
# DUALPIPE_GPU_CHECK=cpu runs the same code on the CPU, with small sizes.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    WHEELS=$1
    shift
    INSTALLED=$(mktemp -d)
    trap 'rm -rf "$INSTALLED"' EXIT
    "$PYTHON" -m pip install -q --no-index --no-deps --target "$INSTALLED" "$WHEELS"/*.whl
    PYTHONPATH="$INSTALLED${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ "${DUALPIPE_GPU_CHECK:-}" = cpu ]; then
    export DS_ACCELERATOR=cpu
fi
# Ranks share the machine's cores; TF32 would hide what the checks compare.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} NVIDIA_TF32_OVERRIDE=0 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" "$ROOT/tests/gpu/run.py" "$@"
