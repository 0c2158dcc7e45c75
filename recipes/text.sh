#!/usr/bin/env bash
# A line of text in the ECG's place, such as "A2C view, EF 30", two views (section 3.2, Table 2 of
# the paper).
#
#   bash recipes/text.sh
#   MINUTES_SCALE=0.01 bash recipes/text.sh       # a smoke run of every step, a minute or two
#
# Makes   datasets/views, the weights runs/text and the video runs/text/sample/sample.gif.
# Needs   requirements.txt and the package transformers; starts from the demo model in weights/.
# Takes   2.5 minutes for the set and 45 minutes of training, on two CPU cores with AMX.
# Expect  EF over the lines of 30 test clips of both views: R2 .27, MAE 9.3, RMSE 12.7 (the true
#         videos through the tokenizer: .95, 2.7, 3.3). Asked in A4C for an EF of 25, 45, 65 the
#         model gives 22, 31, 61 (means of four draws), in A2C 29, 26, 72. Ten of twelve A4C draws
#         show a right heart, ten of twelve A2C draws show none. (seed 0, commit 68b8623)
#
# A second start goes on where the first one stopped: a set that exists is skipped, the training
# gets --resume.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
python -c "import transformers" 2>/dev/null || {
    echo "recipes/text.sh: text needs the package transformers: pip install transformers" >&2
    exit 2
}
DATA=$DATASETS/views
OUT=$RUNS/text

once "$DATA" python -m sources.phantom --views=A4C,A2C --out="$DATA" \
    --clips="$(scaled 2500 24)" --val="$(scaled 64 4)" --test="$(scaled 64 4)"

# Half of the clips know no frame: the text must decide the view from nothing.
python train_generator.py --condition=text --data="$DATA" --weights=weights --init_from=weights \
    --out="$OUT" --p_no_prefix=0.5 --p_prefix=0.3 --lr=7e-4 --minutes="$(scaled 45)" --resume
cp weights/tokenizer.pt weights/segmenter.pt "$OUT"

# The first steps of the decoding decide EF and view. They need a strong guidance, and the later
# ones a weaker one: 8 at the first step, 2 at the last. With 6 to 1 the EF has R2 -.03, MAE 12.4,
# RMSE 15.2. With --guidance=3 --steps=12 it has -.31, 13.2, 17.1, and the views mix.
DECODING="--guidance=8 --guidance_end=2 --steps=24"
python sample.py --weights="$OUT" --text="A2C view, EF 30" $DECODING \
    --frames="$(scaled 64 11)" --out="$OUT/sample"

# The figures: EF of the generated videos against that of the clips that the lines describe.
python evaluate.py ef --data="$DATA" --weights="$OUT" --first=0 $DECODING --batch=8 \
    --num="$(scaled 32 2)" --frames="$(scaled 64 32)" --out="$OUT"
