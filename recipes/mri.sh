#!/usr/bin/env bash
# Video without an ECG (--condition=none), of anything: here a heart in MRI, from a set that a few
# lines draw.
#
#   bash recipes/mri.sh
#   MINUTES_SCALE=0.01 bash recipes/mri.sh        # a smoke run of every step, a minute
#
# Makes   datasets/short_axis, the weights runs/mri and four videos, runs/mri/sample/sample_0.gif to
#         _3.gif.
# Needs   requirements.txt; no download, no GPU.
# Takes   4 minutes of the tokenizer and 25 of the generator on two CPU cores with AMX.
# Expect  val loss 1.49 (measured after three runs of 25 minutes in all, the first 8 with the
#         default p_no_prefix and p_prefix). In the video a bright pool beats beside the
#         crescent of the right ventricle, inside body fat.
#
# A second start goes on where the first one stopped: a set that exists is skipped, trainings get
# --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
DATA=$DATASETS/short_axis
OUT=$RUNS/mri

once "$DATA" python -m sources.short_axis_mri --out="$DATA" \
    --clips="$(scaled 2000 16)" --val="$(scaled 64 4)" --test="$(scaled 64 4)"
python train_tokenizer.py --data="$DATA" --out="$OUT" --minutes="$(scaled 4)" --resume
python train_generator.py --condition=none --data="$DATA" --weights="$OUT" --out="$OUT" \
    --p_no_prefix=0.4 --p_prefix=0.4 --minutes="$(scaled 25)" --resume

# Without a condition there is no guidance (--guidance=1). The surest tokens first
# (--scorer=confidence) and a temperature below 1 give a first frame of one piece; in random order
# it is mottled.
python sample.py --weights="$OUT" --steps=16 --guidance=1 --scorer=confidence --temperature=0.8 \
    --fps=20 --num="$(scaled 4 1)" --out="$OUT/sample"

# The figures: what the tokenizer lets through; the generator's validation loss is in the last line
# of its log.
python evaluate.py reconstruction --data="$DATA" --weights="$OUT" --out="$OUT"
tail -n 1 "$OUT/generator.jsonl"
