#!/usr/bin/env bash
# Train a small GPT, DeepSeek-V3 or Qwen3-MoE on text under DualPipe. Sets up everything on the first run.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'TEXT'
usage: bash examples/quickstart.sh [FOLDER] [--model gpt|moe|qwen3-moe] [--schedule NAME] [--steps N] [--name RUN] [--resume]

Trains a byte-level GPT on the text files in FOLDER (default: the source files of Python's standard library), on all
GPUs if there are two or more, else on 4 CPU processes. Results go to runs/RUN: metrics.jsonl, trace.json (open it in
a Chrome trace viewer or with `dualpipe draw`), schedule.svg, report.html (a page to look at) and a checkpoint.

  --model NAME     gpt (default); moe: a small DeepSeek-V3 with multi-token prediction; qwen3-moe: a small Qwen3-MoE of
                   transformers, through DeepSpeed's AutoEP. Of both, two replicas of the pipeline share the experts
  --schedule NAME  dualpipe (default), dualpipev, zb1p, zbv, vhalf, vmin, 1f1b, interleaved, interleaved_zb, or
                   1f1b-deepspeed for DeepSpeed's own engine
  --steps N        training steps (default 120)
  --name RUN       name of the results folder (default: the schedule; of the others than gpt with a prefix)
  --resume         go on from the last checkpoint of runs/RUN, for N more steps
TEXT
}

ARGUMENTS=()
MODEL=gpt
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage; exit 0 ;;
    --model)
        case "${2:-}" in
        gpt | moe | qwen3-moe) MODEL=$2 ;;
        *) echo "--model is gpt, moe or qwen3-moe" >&2; usage >&2; exit 2 ;;
        esac
        shift 2 ;;
    --schedule | --steps | --name)
        [ $# -ge 2 ] || { echo "$1 needs a value" >&2; usage >&2; exit 2; }
        ARGUMENTS+=("$1" "$2"); shift 2 ;;
    --resume) ARGUMENTS+=("$1"); shift ;;
    -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
    *)
        [ -d "$1" ] || { echo "there is no folder $1" >&2; exit 2; }
        ARGUMENTS+=(--data "$(cd "$1" && pwd)"); shift ;;
    esac
done

EXTRAS=report
[ "$MODEL" = qwen3-moe ] && EXTRAS=report,hf
# shellcheck disable=SC1091
. "$ROOT/examples/setup_env.sh"
cd "$ROOT"
RANKS=4
if [ "$GPUS" -ge 2 ]; then
    RANKS=$((GPUS / 2 * 2))
    if [ "$MODEL" != gpt ]; then
        [ "$GPUS" -ge 4 ] || { echo "--model $MODEL needs 4 GPUs, or DS_ACCELERATOR=cpu" >&2; exit 2; }
        RANKS=$((GPUS / 4 * 4))
    fi
fi
export TORCH_CPP_LOG_LEVEL=ERROR DS_LOG_LEVEL="${DS_LOG_LEVEL:-error}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
exec python -m deepspeed.launcher.runner --num_accelerators "$RANKS" --master_addr 127.0.0.1 \
    --master_port "${MASTER_PORT:-29500}" \
    "examples/pretrain_${MODEL//-/_}.py" --deepspeed_config "examples/${MODEL//-/_}.json" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
