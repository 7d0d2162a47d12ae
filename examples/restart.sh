#!/usr/bin/env bash
# A run loses a rank and goes on from its last checkpoint, under torchrun and under the deepspeed launcher.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
    cat <<'TEXT'
usage: bash examples/restart.sh [FOLDER]

Trains three times on 2 GPUs, or 2 CPU processes: without a fault, and with rank 1 killed after 5 steps under torchrun
and under the deepspeed launcher. Both start the ranks again, which load the checkpoint after step 3. At the end the
losses stand side by side; a resumed loss that differs in one bit is an error.

FOLDER (default: runs/restart) takes losses, checkpoints and errors.log of each run; former ones are removed. The
active environment must have the package installed.
TEXT
    case "${1:-}" in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi

FOLDER=$(realpath -m "${1:-$ROOT/runs/restart}")
cd "$ROOT"
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
export TORCH_CPP_LOG_LEVEL=ERROR DS_LOG_LEVEL="${DS_LOG_LEVEL:-error}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
PORT=${MASTER_PORT:-29501}
RESTARTS=1
LOSE=(--lose-rank 1 --lose-at 5)

start() { # run, launcher and its arguments, "--", arguments of restart.py
    local run=$1 launcher=()
    shift
    while [ "$1" != -- ]; do launcher+=("$1"); shift; done
    shift
    "${launcher[@]}" examples/restart.py --deepspeed_config examples/gpt.json --folder "$FOLDER/$run" "$@" \
        2>>"$FOLDER/$run/errors.log"
}

under_torchrun() { # run, arguments: torchrun ends all ranks when one is lost, and starts them again
    # A store that the launcher shares with its ranks still holds the addresses of those that were lost.
    local run=$1
    shift
    start "$run" env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 python -m torch.distributed.run \
        --nproc-per-node 2 --max-restarts "$RESTARTS" --rdzv-backend c10d --rdzv-endpoint "127.0.0.1:$PORT" --local-addr 127.0.0.1 -- "$@"
}

under_deepspeed() { # run, arguments: the launcher ends all ranks when one is lost, and this loop starts them again
    local run=$1 restarts=0
    shift
    until start "$run" python -m deepspeed.launcher.runner --quiet --num_accelerators 2 --master_addr 127.0.0.1 \
        --master_port "$PORT" -- "$@"; do
        restarts=$((restarts + 1))
        [ "$restarts" -le "$RESTARTS" ] || return 1
        echo "restart $restarts"
    done
}

for run in uninterrupted torchrun deepspeed; do
    rm -rf "${FOLDER:?}/$run"
    mkdir -p "$FOLDER/$run"
done
trap 'echo "a run has failed, see $FOLDER/*/errors.log" >&2' ERR
echo "== without a fault"
under_torchrun uninterrupted
echo "== torchrun"
under_torchrun torchrun "${LOSE[@]}"
echo "== deepspeed"
under_deepspeed deepspeed "${LOSE[@]}"
trap - ERR
python examples/restart_losses.py "$FOLDER"
