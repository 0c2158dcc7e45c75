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
#         set, the same on both. OUT: a folder. DATA and OUT may lie on one disk that both machines
#         see, or on a disk of each: both machines write the weights and the state of a training
#         there. Only rank 0 writes the log.
# Smoke   MINUTES_SCALE other than 1 goes without VGG16. Without HEAD it starts two agents on
#         127.0.0.1 in place of two machines, each one process, on a small phantom. Each has a
#         folder of its own, OUT/node1 and OUT/node2, as two machines without a shared disk have.
#         Without a GPU it takes tiny networks and gloo.
#
# A second start on both machines goes on where the first one stopped: trainings get --resume. A
# machine that has lost its state, or has an older one, gets it from the other.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
OUT=${OUT:-$RUNS/two_nodes}
TOKENIZER="--vgg16=${VGG16-hub}"
ENCODER=
GENERATOR=
SIZE=128
NODES=("$OUT")  # the folders of the agents that this script starts
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
    NODES=("$OUT/node1" "$OUT/node2")
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

# agent FOLDER SCRIPT FLAGS...: one agent a machine starts the processes of its GPUs. The agents find
# each other by torchrun's c10d rendezvous on HEAD. The generator reads the tokenizer and the ECG
# encoder from the machine's own folder.
agent() {
    local folder=$1
    shift
    [ "$1" = train_generator.py ] && set -- "$@" --weights="$folder"
    torchrun --nnodes=2 --nproc_per_node="${NPROC:-8}" --rdzv_backend=c10d \
        --rdzv_endpoint="$HEAD:${PORT:-29500}" --rdzv_id="${1%.py}" $LOCAL \
        "$@" --preset=paper --data="$DATA" --out="$folder" --resume
}

# train SCRIPT FLAGS...: start this machine's agent (of a smoke run both) and wait for it.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
train() {
    local agents=() folder pid
    for folder in "${NODES[@]}"; do
        agent "$folder" "$@" &
        agents+=($!)
    done
    for pid in "${agents[@]}"; do
        wait "$pid"
    done
}
train train_tokenizer.py --channels=1 $TOKENIZER --minutes="$(scaled 1440)"
train ecg_encoder.py $ENCODER --minutes="$(scaled 720)"
train train_generator.py $GENERATOR --minutes="$(scaled 1440)"

# The figures, on each machine in a folder of its own; see paper_8xh100.sh for SEGMENTER.
WEIGHTS=${NODES[0]}
FIGURES=$WEIGHTS/eval_$(hostname)
python evaluate.py reconstruction --data="$DATA" --weights="$WEIGHTS" --out="$FIGURES"
python evaluate.py sync --data="$DATA" --weights="$WEIGHTS" --segmenter="${SEGMENTER:-weights}" \
    --out="$FIGURES"
