#!/usr/bin/env bash
# Domain transfer, as the paper goes from natural video to echo (its Table 1): a tokenizer that has
# only seen the phantom learns real echocardiograms, by low-rank adapters (LoRA) or by all of its
# weights.
#
#   SRC=EchoNet-Dynamic bash recipes/lora.sh
#   bash recipes/lora.sh                          # without SRC: another phantom set in its place
#   MINUTES_SCALE=0.01 bash recipes/lora.sh       # a smoke run of every step, some minutes
#
# Makes   datasets/phantom128, datasets/echonet and the tokenizers runs/phantom128 (before),
#         runs/lora_pass (LoRA, one pass over 70 clips), runs/lora (LoRA, 4 minutes) and runs/full
#         (all weights). A folder of a LoRA run has the adapters alone in tokenizer_lora.pt, and
#         tokenizer.pt with the adapters merged.
# Needs   requirements.txt. SRC: a folder with FileList.csv and Videos/*.avi, as EchoNet-Dynamic is
#         given out. Where SRC is not set, a second phantom set stands for it: two-chamber views,
#         another seed. It shows that the steps run; its figures say nothing of real
#         echocardiograms.
# Takes   15 + 0.1 + 4 + 28 minutes of training on two CPU cores with AMX.
# Expect  on the test clips, with a SRC of 99 EchoNet-Dynamic clips, 16 frames at 8 a second (70 for
#         training, 9 val, 20 test; seed 0; the originals that github HReynaud/EchoDiffusion shows):
#
#                                trained parameters    MSE       MAE
#             before             1.78M                 3.68e-3   .0353
#             LoRA, one pass     0.31M                 3.56e-3   .0337
#             LoRA, 4 minutes    0.31M                 3.27e-3   .0323
#             all weights        1.78M                 2.39e-3   .0267
#             paper, its own data                      2.89e-3   .0292
#
#         The whole of EchoNet-Dynamic has about 50 frames a second: EVERY=6 keeps each sixth, about
#         8 a second.
#
# A second start goes on where the first one stopped: sets that exist are skipped, trainings get
# --resume. The set datasets/echonet is also skipped when SRC has changed: remove it, and the runs,
# first.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
PHANTOM=$DATASETS/phantom128
REAL=$DATASETS/echonet

# 1. The two domains, both at the paper's 128 x 128.
once "$PHANTOM" python -m sources.phantom --size=128 --fps=8 --frames=16 --out="$PHANTOM" \
    --clips="$(scaled 3000 16)" --val="$(scaled 64 4)" --test="$(scaled 128 4)"
if [ -n "${SRC:-}" ]; then
    once "$REAL" python -m sources.echonet_dynamic --src="$SRC" --out="$REAL" \
        --size=128 --every="${EVERY:-1}"
else
    echo "SRC is not set: a second phantom set stands for the real clips"
    REAL=$DATASETS/phantom128_a2c
    once "$REAL" python -m sources.phantom --size=128 --fps=8 --frames=16 --out="$REAL" \
        --views=A2C --seed=1 \
        --clips="$(scaled 70 16)" --val="$(scaled 9 4)" --test="$(scaled 20 4)"
fi

# 2. Before: the phantom alone. 959 steps.
python train_tokenizer.py --data="$PHANTOM" --size=128 --out="$RUNS/phantom128" \
    --minutes="$(scaled 15)" --resume

# 3. LoRA, one pass over 70 clips; LoRA for 4 minutes (398 steps of 8); all weights (2,736 steps of
#    8).
START="--data=$REAL --size=128 --init_from=$RUNS/phantom128 --augment --resume"
python train_tokenizer.py $START --lora_rank=16 --batch=1 --steps="$(scaled 70 2)" \
    --lr=3e-4 --warmup=10 --out="$RUNS/lora_pass"
python train_tokenizer.py $START --lora_rank=16 --minutes="$(scaled 4)" --out="$RUNS/lora"
python train_tokenizer.py $START --minutes="$(scaled 28)" --out="$RUNS/full"

# 4. The figures. --split=val gives those of the val clips.
for run in phantom128 lora_pass lora full; do
    echo "== $run"
    python evaluate.py reconstruction --data="$REAL" --split=test \
        --weights="$RUNS/$run" --out="$RUNS/$run"
done
