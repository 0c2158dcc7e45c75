#!/usr/bin/env bash
# From nothing to a model of 128 x 128 pixels in ten minutes of one GPU.
#
#   bash recipes/gpu_demo.sh
#   MINUTES_SCALE=0.01 bash recipes/gpu_demo.sh     # a smoke run of every step, without a GPU too
#
# Makes   in the folder OUT (default out/gpu_demo), as it comes, so that a run that is cut short
#         leaves what it has reached: the weights in half precision, sample.gif, results.json (what
#         every step measured) and log.txt.
# Needs   one GPU like an H100, 16 CPU cores, 64 GB of memory, 20 GB of disk under DATASETS and
#         RUNS; Python 3.12 with torch, numpy, scipy, imageio and tqdm. No network.
# Takes   ten minutes, a bit more than six of them training.
#
# Unlike the other recipes it always starts anew, and it goes on after a step that fails: the log
# says which one. Each step has a time limit of its own. Steps that need different parts of the
# machine run side by side.
set -uo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
OUT=${OUT:-out/gpu_demo}
DATA=$DATASETS/gpu_demo
MORE=$DATASETS/gpu_demo_more
RUN=$RUNS/gpu_demo
rm -rf "$DATA"{,.part} "$MORE"{,.part} "$RUN"
mkdir -p "$OUT" "$RUN"
export PYTHONUNBUFFERED=1

# Sizes of the models: 32 MB in half precision. A CPU can only try the commands, with tiny ones.
SIZE=128
CORES=$(nproc)
WORKERS=$((CORES > 4 ? CORES - 4 : 0))
SPEED="--preset=paper --train_batch=16"
TOKENIZER="--dim=192 --heads=3 --mlp_dim=768 --depth_space=3 --depth_time=2 --batch=32 --compile"
ENCODER="--batch=128"
GENERATOR="--dim=256 --mlp_dim=1024 --depth=7 --batch=32 --lr=1.5e-3 --warmup=500 --compile"
VIDEOS=$(scaled 64 2)
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    SIZE=32
    TINY="--dim=32 --heads=2 --mlp_dim=64 --batch=2 --steps=$(scaled 500 5)"
    SPEED="--preset=demo --frames=16"
    TOKENIZER="$TINY --depth_space=1 --depth_time=1"
    ENCODER="$TINY --depth=1"
    GENERATOR="$TINY --depth=1"
fi

# stage NAME SECONDS COMMAND...: run it, for so many seconds at most. Its last lines and its time go
# to the log.
stage() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" > "$RUN/$name.log" 2>&1 || code=$?
    # A progress bar goes back to the start of its line.
    {
        echo "== $name, second $begin to $SECONDS, exit $code: $*"
        tr '\r' '\n' < "$RUN/$name.log" | grep -v '^ *$' | tail -n 25 | cut -c 1-400
    } >> "$OUT/log.txt"
    echo "== $name, second $begin to $SECONDS, exit $code"
    collect &
}

# What there is so far, to OUT.
collect() {
    flock "$RUN" python - "$RUN" "$OUT" << 'END' 2>> "$OUT/log.txt"
import json, shutil, sys
from pathlib import Path
from common.checkpoint import pack

run, out = map(Path, sys.argv[1:])
pack(run, out)
results = {}
for path in sorted(run.rglob("*.json")):
    results[f"{path.parent.name}/{path.stem}"] = json.loads(path.read_text())
for path in sorted(run.glob("*.jsonl")):
    results[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
(out / "results.json").write_text(json.dumps(results) + "\n")
if (run / "video/sample.gif").exists():
    shutil.copy(run / "video/sample.gif", out)
END
}

# 1. The GPU at the paper's sizes (matrix products, a training step of both stages, a window, a
#    video), and meanwhile the data on the CPU.
stage speed_paper 75 python evaluate.py speed $SPEED --out="$RUN/paper" &
stage phantom 150 python -m sources.phantom --out="$DATA" --size=$SIZE --any_fps=0.25 \
    --any_hr=0.4 --clips="$(scaled 2000 8)" --val=32 --test="$VIDEOS" \
    --workers=$((CORES > 4 ? CORES - 4 : CORES))
wait

# 2. Tokenizer. Beside it the ECG encoder, and more data.
stage phantom_more 150 nice python -m sources.phantom --out="$MORE" --size=$SIZE --any_fps=0.25 \
    --any_hr=0.4 --clips="$(scaled 4000 8)" --val=0 --test=0 --seed=1 \
    --workers=$((CORES > 4 ? CORES - 4 : CORES)) &
stage ecg_encoder 120 python ecg_encoder.py --data="$DATA" --out="$RUN" $ENCODER \
    --minutes="$(scaled 0.7)" --workers=$((WORKERS / 4)) &
stage tokenizer 220 python train_tokenizer.py --data="$DATA" --out="$RUN" --size=$SIZE $TOKENIZER \
    --minutes="$(scaled 2.3)" --workers=$((WORKERS / 2)) --eval_every=2000
wait

# 3. Generator. Beside it the U-Net; and every 40 seconds what there is goes to OUT.
[ -d "$MORE" ] || MORE=$DATA
stage segmenter 120 python -m metrics.lv_segmenter --data="$DATA" --weights="$RUN" --out="$RUN" \
    --minutes="$(scaled 1)" --num="$VIDEOS" &
while sleep 40; do collect; done &
collector=$!
stage generator 340 python train_generator.py --data="$DATA,$MORE" --weights="$RUN" --out="$RUN" \
    $GENERATOR --minutes="$(scaled 4.2)" --workers="$WORKERS" --eval_every=2000 --save_every=1000
kill $collector
wait

# 4. A video, and the figures.
stage sample 60 python sample.py --weights="$RUN" --out="$RUN/video" &
FIGURES="--data=$DATA --weights=$RUN --out=$RUN/figures --batch=$VIDEOS"
stage sync 100 python evaluate.py sync $FIGURES &
stage reconstruction 100 python evaluate.py reconstruction $FIGURES &
wait
stage ef 60 python evaluate.py ef $FIGURES --first=0
stage speed 60 python evaluate.py speed --weights="$RUN" --out="$RUN/figures"
wait
cat "$OUT/log.txt"
