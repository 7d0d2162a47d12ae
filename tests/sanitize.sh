#!/usr/bin/env bash
# Builds the C++ helper with AddressSanitizer and with ThreadSanitizer and runs the stress test under each (g++, Linux).
# Needs an environment with torch (tests/run.sh makes one). Usage: bash tests/sanitize.sh [TRANSFERS]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TRANSFERS=${1:-2000}
if [ -z "${VIRTUAL_ENV:-}" ]; then
    # shellcheck disable=SC1091
    . "$ROOT/.venv/bin/activate"
fi
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
read -r -a INCLUDES < <(python -c '
import sysconfig
from torch.utils.cpp_extension import include_paths
print(*(f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]))')
LIBRARIES=$(python -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))')

# torch, gloo and Python are not instrumented: TSan sees their memory accesses, but not all of their locks.
cat >"$WORK/suppressions" <<'END'
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libc10.so
race:libtorch_cpu.so
race:libtorch_python.so
race:libc10.so
END

for sanitizer in address thread; do
    echo "== $sanitizer"
    objects=()
    for source in ticket stream module; do
        g++ -std=c++17 -O1 -g1 -fPIC "-fsanitize=$sanitizer" -fno-omit-frame-pointer \
            -DTORCH_EXTENSION_NAME=dualpipe_comm "${INCLUDES[@]}" -c "$ROOT/csrc/$source.cpp" -o "$WORK/$source.o"
        objects+=("$WORK/$source.o")
    done
    g++ -shared "-fsanitize=$sanitizer" "${objects[@]}" -o "$WORK/dualpipe_comm.so" \
        "-L$LIBRARIES" "-Wl,-rpath,$LIBRARIES" -lc10 -ltorch_cpu -ltorch -ltorch_python
    runtime=$(g++ -print-file-name="lib${sanitizer:0:1}san.so")
    # Python itself leaks on purpose; the C++ library of the process must be there before the sanitizer's.
    ASAN_OPTIONS=detect_leaks=0 \
        TSAN_OPTIONS="suppressions=$WORK/suppressions ignore_noninstrumented_modules=1 exitcode=66" \
        OMP_NUM_THREADS=1 LD_PRELOAD="$runtime:$(g++ -print-file-name=libstdc++.so)" \
        python "$ROOT/tests/comm/stream_stress.py" "$WORK/dualpipe_comm.so" "$TRANSFERS"
done
