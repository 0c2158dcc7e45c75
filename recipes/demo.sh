#!/usr/bin/env bash
# The demo model, from nothing: an echocardiogram of 64 x 64 pixels that follows an ECG.
#
#   bash recipes/demo.sh
#   MINUTES_SCALE=0.01 bash recipes/demo.sh       # a smoke run of every step, some minutes
#
# Makes   datasets/phantom (4.7 GB) and the weights runs/critic: tokenizer, ECG encoder, generator
#         with critic, U-Net of the left ventricle.
# Needs   requirements.txt, 6 GB of disk; no download, no GPU.
# Takes   241 minutes of training, 7 for the set and 13 for the figures, on two CPU cores with AMX,
#         which do 2.9 steps of stage 2 a second. Two cores of an AMD EPYC do 1.6 with AVX512-BF16
#         and 0.7 to 1.1 in float32: multiply the minutes by 2 to 4. A second busy process halves
#         the speed of a training or worse.
# Expect  the figures beside each step (seed 0); of the result, the table in README.md under
#         "Results".
#
# A second start goes on where the first one stopped: sets that exist are skipped, trainings get
# --resume. To train a stage anew, remove its folder in runs/.
#
# The weights in weights/ come from the same steps, with four differences:
#   - In the first 60 minutes of the generator every training clip had 25 frames a second. The other
#     rates (--any_fps) came after them.
#   - The other heart rates (--any_hr) came in the last 33 of the 141 minutes only.
#   - 62 of the 141 minutes were without anchors (--p_anchor).
#   - Two trainings with a critic, of 9 and 5 minutes, lay between.
# They are kept in half precision:
#   python -c "from common.checkpoint import pack; pack('runs/critic', 'weights')"
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
DATA=$DATASETS/phantom

# 1. The data: a simulator draws clips with their ECGs, LV masks and ejection fractions. A quarter
#    of the training clips have a frame rate of their own, 0.4 of them any heart rate.
once "$DATA" python -m sources.phantom --out="$DATA" --any_fps=0.25 --any_hr=0.4 \
    --clips="$(scaled 8000 40)" --val="$(scaled 64 4)" --test="$(scaled 128 4)"

# 2. Stage 1, the tokenizer (Eq. 1 to 6, here without VGG16 and without discriminator).
#    Expected: val_mse 4.46e-3, 4,866 codes.
python train_tokenizer.py --data="$DATA" --out="$RUNS/demo" --minutes="$(scaled 20)" --resume

# 3. Stage 2a, the ECG encoder as a masked autoencoder. Expected: loss 0.90.
python ecg_encoder.py --data="$DATA" --out="$RUNS/demo" --minutes="$(scaled 3)" --resume

# 4. Stage 2b, the generator (Eq. 7 and 8). Its log has the validation loss with the right ECG and
#    with another clip's. The gap between the two shows that the model uses the ECG. Expected: loss
#    of the clips that know their first frame 3.21, with a wrong ECG 4.00.
python train_generator.py --data="$DATA" --weights="$RUNS/demo" --out="$RUNS/demo" \
    --minutes="$(scaled 60)" --resume

# 5. A sharper decoder of the same tokens: the discriminator (Eq. 5 and 6) trains the decoder alone,
#    so that the generator of step 4 still fits. Expected: val_mse 4.72e-3, and a sharper picture.
python train_tokenizer.py --data="$DATA" --init_from="$RUNS/demo" --out="$RUNS/final" \
    --decoder_only --gan_weight=2 --gan_warmup=0.05 --lr=5e-4 --minutes="$(scaled 6)" --resume

# 6. The U-Net that reads the left ventricle. Half of its frames went through the tokenizer first,
#    so that it reads true and generated video alike. Expected: Dice .974.
once "$RUNS/final/segmenter.pt" python -m metrics.lv_segmenter --data="$DATA" \
    --weights="$RUNS/final" --out="$RUNS/final" --minutes="$(scaled 6)"

# 7. The generator goes on, with more of the random filters that stand for other recorders of the
#    ECG. Expected: 3.08, with a wrong ECG 3.91.
once "$RUNS/final/ecg_encoder.pt" cp "$RUNS/demo/ecg_encoder.pt" "$RUNS/final"
python train_generator.py --data="$DATA" --weights="$RUNS/final" --init_from="$RUNS/demo" \
    --out="$RUNS/final" --lr=7e-4 --p_recorder_filter=0.5 --minutes="$(scaled 141)" --resume

# 8. The last minutes with a critic (Eq. 9 and 10).
#    Expected: 3.10, with a wrong ECG 3.97; AUROC of the critic .88.
python train_generator.py --data="$DATA" --weights="$RUNS/final" --init_from="$RUNS/final" \
    --out="$RUNS/critic" --critic=self --lr=3e-4 --p_recorder_filter=0.5 \
    --minutes="$(scaled 5)" --resume
cp "$RUNS/final/tokenizer.pt" "$RUNS/final/segmenter.pt" "$RUNS/critic"

# 9. The figures: does the heart follow the ECG?
python evaluate.py sync --data="$DATA" --weights="$RUNS/critic" --batch=8 --out="$RUNS/critic"
echo "a video: python sample.py --weights=$RUNS/critic"
