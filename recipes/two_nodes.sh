#!/usr/bin/env bash
# The paper's sizes (--preset=paper) on two machines with eight GPUs each. Start it on both, with
# the same HEAD:
#
#   HEAD=10.0.0.1 DATA=/shared/datasets/NAME OUT=/shared/runs/paper bash recipes/two_nodes.sh
#   MINUTES_SCALE=0.01 bash recipes/two_nodes.sh        # a smoke run: both agents on this machine
#
# THIS HAS NOT BEEN TRAINED; see recipes/paper_8xh100.sh, which has the same steps on one machine.
#
# Makes   the weights OUT.
# Needs   two machines with NPROC GPUs each (default 8). HEAD: the name or address of one of them,
#         the same on both, whose port PORT (default 29500) the other can reach. DATA: a prepared
#         set that both can read. OUT: a folder on a disk that BOTH machines see. Rank 0 alone
#         writes the training's state there. A machine that does not find the state starts at
#         step 0 with --resume, while the other goes on from the saved step: the two then wait for
#         each other without end. The generator also reads the tokenizer from OUT.
# Smoke   MINUTES_SCALE other than 1 goes without VGG16. Without HEAD it starts two agents on
#         127.0.0.1 in place of two machines, each one process, on its own small phantom. Without a
#         GPU it takes tiny networks and gloo.
#
# A second start on both machines goes on where the first one stopped: trainings get --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
OUT=${OUT:-$RUNS/two_nodes}
TOKENIZER="--vgg16=${VGG16-hub}"
ENCODER=
GENERATOR=
SIZE=128
AGENTS=1        # that this script starts
[ "$MINUTES_SCALE" = 1 ] || TOKENIZER=--vgg16=

if [ "$MINUTES_SCALE" = 1 ] && [ -z "${HEAD:-}" -o -z "${DATA:-}" ]; then
    echo "recipes/two_nodes.sh: set HEAD and DATA; MINUTES_SCALE=0.01 tries the steps here" >&2
    exit 2
fi
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    SIZE=32
    TINY="--dim=32 --heads=2 --mlp_dim=64 --workers=0 --batch=2 --steps=$(scaled 500 5)"
    TOKENIZER="$TOKENIZER $TINY --size=$SIZE --depth_space=1 --depth_time=1 --compile=0"
    ENCODER="$TINY --depth=1"
    GENERATOR="$TINY --depth=1 --compile=0"
fi

# In a smoke run this machine is both nodes. The port is any free one, so that two smoke runs do not
# meet.
LOCAL=
if [ -z "${HEAD:-}" ]; then
    AGENTS=2
    NPROC=1
    HEAD=127.0.0.1
    LOCAL=--local_addr=127.0.0.1
    PORT=$(python -c "import socket; print(socket.create_server(('', 0)).getsockname()[1])")
fi
if [ -z "${DATA:-}" ]; then
    DATA=$DATASETS/phantom_two_nodes
    once "$DATA" python -m sources.phantom --size="$SIZE" --frames=192 --out="$DATA" \
        --clips="$(scaled 4000 8)" --val="$(scaled 64 4)" --test="$(scaled 128 2)"
fi

# One agent a machine starts the processes of its GPUs. The agents find each other by torchrun's
# c10d rendezvous on HEAD.
agent() {
    torchrun --nnodes=2 --nproc_per_node="${NPROC:-8}" --rdzv_backend=c10d \
        --rdzv_endpoint="$HEAD:${PORT:-29500}" --rdzv_id="${1%.py}" $LOCAL \
        "$@" --preset=paper --data="$DATA" --out="$OUT" --resume
}

# train SCRIPT FLAGS...: start this machine's agent (of a smoke run both) and wait for it.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
train() {
    local agents=() pid
    for _ in $(seq "$AGENTS"); do
        agent "$@" &
        agents+=($!)
    done
    for pid in "${agents[@]}"; do
        wait "$pid"
    done
}
train train_tokenizer.py --channels=1 $TOKENIZER --minutes="$(scaled 1440)"
train ecg_encoder.py $ENCODER --minutes="$(scaled 720)"
train train_generator.py --weights="$OUT" $GENERATOR --minutes="$(scaled 1440)"

# The figures, on each machine in a folder of its own; see paper_8xh100.sh for SEGMENTER.
FIGURES=$OUT/eval_$(hostname)
python evaluate.py reconstruction --data="$DATA" --weights="$OUT" --out="$FIGURES"
python evaluate.py sync --data="$DATA" --weights="$OUT" --segmenter="${SEGMENTER:-weights}" \
    --out="$FIGURES"
