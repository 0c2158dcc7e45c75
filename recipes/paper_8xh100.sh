#!/usr/bin/env bash
# The paper's sizes (Tables 4 and 5, --preset=paper) on one machine with eight GPUs.
#
#   DATA=datasets/NAME bash recipes/paper_8xh100.sh
#   MINUTES_SCALE=0.01 bash recipes/paper_8xh100.sh     # a smoke run of every step
#
# THIS HAS NOT BEEN TRAINED. What is known is that its code runs. No one knows the figures that it
# gives, and the minutes below are a guess. Parameters: 52M (tokenizer), 85M (ECG encoder), 28M
# (generator).
#
# Makes   the weights OUT (default runs/paper).
# Needs   NPROC GPUs (default 8). DATA: a prepared set of 128 x 128 pixels with ECGs, best with 9 s
#         of ECG around each window; docs/data.md says how to make one. Where DATA is not set, a
#         phantom set stands for it. VGG16 (Eq. 3): the preset fetches it; VGG16=PATH of
#         torchvision's vgg16-397923af.pth where there is no net, VGG16= for no perceptual loss.
# Smoke   MINUTES_SCALE other than 1 goes without VGG16. Without a GPU it also takes tiny networks,
#         two processes and gloo in place of NCCL.
#
# A second start goes on where the first one stopped: a set that exists is skipped, trainings get
# --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
OUT=${OUT:-$RUNS/paper}
TOKENIZER="--vgg16=${VGG16-hub}"
ENCODER=
GENERATOR=
SIZE=128
[ "$MINUTES_SCALE" = 1 ] || TOKENIZER=--vgg16=

# Without a GPU only the commands can be tried, with tiny networks and a few optimizer steps. Flags
# win over the preset, and --steps over --minutes.
if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    if [ "$MINUTES_SCALE" = 1 ]; then
        echo "recipes/paper_8xh100.sh: no GPU; MINUTES_SCALE=0.01 tries the steps on the CPU" >&2
        exit 2
    fi
    NPROC=${NPROC:-2}
    SIZE=32
    TINY="--dim=32 --heads=2 --mlp_dim=64 --workers=0 --batch=2 --steps=$(scaled 500 5)"
    TOKENIZER="$TOKENIZER $TINY --size=$SIZE --depth_space=1 --depth_time=1 --compile=0"
    ENCODER="$TINY --depth=1"
    GENERATOR="$TINY --depth=1 --compile=0"
fi
NPROC=${NPROC:-8}

# The stand-in: 192 frames at 25 a second, with a second of ECG before and after, have the 9 s of
# the encoder.
if [ -z "${DATA:-}" ]; then
    DATA=$DATASETS/phantom_paper
    once "$DATA" python -m sources.phantom --size="$SIZE" --frames=192 --out="$DATA" \
        --any_fps=0.25 --any_hr=0.4 \
        --clips="$(scaled 4000 8)" --val="$(scaled 64 4)" --test="$(scaled 128 2)"
fi

# One process a GPU. --batch of the presets is 16 clips a process, 32 in the ECG encoder.
train() {
    torchrun --standalone --nproc_per_node="$NPROC" "$@" --preset=paper --data="$DATA" \
        --out="$OUT" --resume
}
train train_tokenizer.py --channels=1 $TOKENIZER --minutes="$(scaled 1440)"
train ecg_encoder.py $ENCODER --minutes="$(scaled 720)"
train train_generator.py --weights="$OUT" $GENERATOR --minutes="$(scaled 1440)"

# The figures. The shipped U-Net reads the ventricle: it has learned the phantom at 64 x 64. For a
# set with masks of its own train another one (python -m metrics.lv_segmenter) and pass its folder
# as SEGMENTER.
python evaluate.py reconstruction --data="$DATA" --weights="$OUT" --out="$OUT"
python evaluate.py sync --data="$DATA" --weights="$OUT" --segmenter="${SEGMENTER:-weights}" \
    --out="$OUT"
