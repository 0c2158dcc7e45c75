#!/usr/bin/env bash
# Real pairs: a model that learns from EchoXFlow, the first public set of echocardiograms that were
# recorded with their ECGs. From the downloaded folder to the figures, at the paper's sizes.
#
#   SRC=EchoXFlow bash recipes/echoxflow.sh               # all GPUs of the machine, one or eight
#   MINUTES_SCALE=0.01 bash recipes/echoxflow.sh          # a smoke run of every step, some minutes
#
# THIS HAS NOT BEEN TRAINED. What is known is that its steps run. No one knows the figures that it
# gives, and the minutes below are a guess for eight H100s; one GPU wants more (MINUTES_SCALE=8).
#
# Makes   the sets datasets/echoxflow (all B-mode cines) and datasets/echoxflow_4ch (those that the
#         set calls four-chamber views, with LV masks), and the weights OUT, runs/echoxflow:
#         tokenizer, ECG encoder, U-Net of the left ventricle, generator.
# Needs   requirements.txt and pip install zarr. SRC: the folder with croissant.json of
#         huggingface.co/datasets/Ahus-AIM/EchoXFlow. Its licence is CC BY-NC-SA 4.0: weights that
#         were trained on it inherit it (no commercial use, share alike).
#         VGG16 (Eq. 3): the preset fetches it; VGG16=PATH of torchvision's vgg16-397923af.pth where
#         there is no net, VGG16= for no perceptual loss.
# Flags   NPROC processes of torchrun (default: one a GPU). FPS of all clips (default 25): the cines
#         have many rates, and 11 frames must last as long in each.
# Smoke   Without SRC, a scale other than 1 writes a small set in EchoXFlow's layout from phantom
#         clips; its figures mean nothing. It goes without VGG16, and without a GPU with tiny
#         networks and gloo in place of NCCL.
#
# A second start goes on where the first one stopped: sets and U-Nets that exist are skipped,
# trainings get --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
OUT=${OUT:-$RUNS/echoxflow}
ALL=$DATASETS/echoxflow
FOUR=$DATASETS/echoxflow_4ch
SIZE=128
TOKENIZER="--vgg16=${VGG16-hub}"
ENCODER=
GENERATOR=
[ "$MINUTES_SCALE" = 1 ] || TOKENIZER="--vgg16=${VGG16:-}"
GPUS=$(python -c "import torch; print(torch.cuda.device_count())")
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}

# Without a GPU only the commands can be tried, with tiny networks and a few optimizer steps. Flags
# win over the preset, and --steps over --minutes.
if [ "$GPUS" = 0 ]; then
    if [ "$MINUTES_SCALE" = 1 ]; then
        echo "recipes/echoxflow.sh: no GPU; MINUTES_SCALE=0.01 tries the steps on the CPU" >&2
        exit 2
    fi
    SIZE=32
    TINY="--dim=32 --heads=2 --mlp_dim=64 --workers=0 --batch=2 --steps=$(scaled 500 5)"
    TOKENIZER="$TOKENIZER $TINY --size=$SIZE --depth_space=1 --depth_time=1 --compile=0"
    ENCODER="$TINY --depth=1"
    GENERATOR="$TINY --depth=1 --compile=0"
fi

if [ -z "${SRC:-}" ] && [ "$MINUTES_SCALE" != 1 ]; then
    echo "SRC is not set: phantom clips in EchoXFlow's layout stand for the real ones"
    SRC=$DATASETS/sources/echoxflow
    once "$SRC/croissant.json" python -m tests.echoxflow_store "$SRC"
fi
if [ ! -e "${SRC:-}/croissant.json" ]; then
    echo "recipes/echoxflow.sh: SRC must be EchoXFlow's folder, with croissant.json in it" >&2
    exit 2
fi

# 1. The data. Both sets have the same split of the exams, so nothing is tested that was trained on.
echoxflow() {
    once "$1" python -m sources.echoxflow --src="$SRC" --size="$SIZE" --fps="${FPS:-25}" \
        --out="$1" "${@:2}"
}
echoxflow "$ALL"
echoxflow "$FOUR" --views=4ch

# 2. The three stages. Of two sets each is drawn as often, so four-chamber views are half of the
#    clips. A cine lasts a few seconds: the encoder sees 3.6 s, not the paper's 9 s.
train() {
    torchrun --standalone --nproc_per_node="$NPROC" "$@" --preset=paper --data="$ALL,$FOUR" \
        --out="$OUT" --resume
}
train train_tokenizer.py --channels=1 $TOKENIZER --minutes="$(scaled 720)"
train ecg_encoder.py $ENCODER --samples=900 --minutes="$(scaled 120)"

# 3. The U-Net that reads the left ventricle, for the figures. Only frames with a contour count.
once "$OUT/segmenter.pt" python -m metrics.lv_segmenter --data="$FOUR" --weights="$OUT" \
    --out="$OUT" --minutes="$(scaled 20)"
train train_generator.py --weights="$OUT" $GENERATOR --minutes="$(scaled 1440)"

# 4. The figures, of exams that no training saw.
NUM=$(scaled 200 2)
python evaluate.py reconstruction --data="$ALL" --weights="$OUT" --num="$NUM" --out="$OUT"
python evaluate.py segmenter --data="$FOUR" --weights="$OUT" --num="$NUM" --out="$OUT"
python evaluate.py sync --data="$FOUR" --weights="$OUT" --num="$NUM" --out="$OUT"
python evaluate.py ef --data="$FOUR" --weights="$OUT" --num="$NUM" --out="$OUT"
echo "a video: python sample.py --weights=$OUT"
