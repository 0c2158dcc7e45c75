#!/usr/bin/env bash
# Real echocardiograms that follow an ECG: a few clips of one's own, learned beside the phantom,
# which knows how a heart follows an ECG. The tokenizer and the generator never see two of
# the real clips. These two are generated from their first frames and ECGs, and measured.
#
#   NINE=real/nine GIF=real/gif EXTRA=real/extra bash recipes/real_clips.sh
#   MINUTES_SCALE=0.01 bash recipes/real_clips.sh    # a smoke run of every step, without real clips
#
# Makes   the sets nine, nineall, nineall2, nineall4, nine2 to nine6, any2 to any6, gif, gifall,
#         gif1, extra, extra1, extra2, phantom1500 and qt in datasets/, and the weights runs/real,
#         with the U-Nets runs/seven (never saw the two clips), runs/all9, runs/reader and
#         runs/seven2.
# Needs   requirements.txt, the demo model in weights/, and three folders that you provide. Each has
#         the layout of EchoNet-Dynamic: Videos/NAME.avi; FileList.csv with the columns FileName,
#         EF, ESV, EDV, FPS, NumberOfFrames, Split, in this order or with others between them,
#         FileName first; and, where frames are traced, VolumeTracings.csv with the columns
#         FileName, X1, Y1, X2, Y2, Frame, in pixels of 112 x 112. EF, ESV and EDV must be numbers,
#         but nothing here uses them. The clips themselves may not be handed on.
#
#         NINE    the nine clips that github echonet/dynamic shows with the authors' masks at 50
#                 frames a second, every frame traced. Split is VAL for 0X18BA5512BE5D6FFA and
#                 0X1E12EEE43FD913E5, TRAIN for the other seven.
#         GIF     the originals that github HReynaud/EchoDiffusion shows as GIFs: 100 patients, 16
#                 frames at 8 a second; not its "factual" clips, which a model drew. Split TRAIN for
#                 all.
#         EXTRA   three clips, in this order in FileList.csv: echonet/dynamic's Example1, the real
#                 clip of HReynaud/EchoNet-Synthetic, and the example of echonet/echo_CLIP. Split
#                 TRAIN for all.
#
# Takes   119 minutes of training on two cores of an AMD EPYC with AVX512-BF16, and some for the
#         sets and figures.
# Expect  the figures beside each step, and of the result (seeds 10 to 14, means of the two clips;
#         commit 1e9f6b3)
#
#         frames a second  area_r_traced_mean       mean  area_r_mean              shift_ms
#         12.5 (nine4)     .82, .89, .84, .83, .85  .85   .79, .85, .82, .81, .82  196 to 205
#         25 (nine2)       .80, .83, .81, .86, .87  .83   .77, .83, .78, .84, .83  211 to 224
#
#         with all beats found and none added (beat_recall 1, false_beats 0). Read by runs/seven2,
#         which never saw the two clips and is a poorer judge: .77 at 12.5 and .80 at 25. Settings
#         of the decoding: guidance 2, temperature 0.5, confidence, overlap 1. They were chosen on
#         an earlier model with seeds 0 and 1 of the same two clips. The pictures keep the anatomy
#         of the first frame, but are blurred.
#
# Without NINE, GIF and EXTRA a smoke run writes a stand-in of phantom clips in that layout. Its
# figures mean nothing. A second start goes on where the first one stopped: sets and U-Nets that
# exist are skipped, trainings get --resume. The set phantom1500 has the name "phantom" in older
# notes; demo.sh's set of that name is another one.
set -euo pipefail
cd "$(dirname "$0")/.."
. recipes/scale.sh
D=$DATASETS
SOURCES=$DATASETS/sources       # layouts that this script derives from NINE, GIF and EXTRA

# ------------------------------------------------------- the folders of real clips

# write_stand_in FOLDER: FOLDER/nine, gif and extra in EchoNet-Dynamic's layout, from the phantom.
write_stand_in() {
    python - "$1" <<'PYTHON'
import sys
from pathlib import Path

import imageio
import numpy as np

from sources.phantom import make_clip

CODED = 112 / 64            # tracings are in pixels of 112 x 112, the phantom has 64 x 64


def tracing(mask):
    """Chords (N, 4) of a mask (H, W): the long axis first, then one a row."""
    rows = []
    for y, line in enumerate(mask):
        x = np.flatnonzero(line)
        if len(x):
            rows.append((x.min(), y, x.max() + 1, y))
    axis = (*rows[0][:2], *rows[-1][:2])
    return CODED * np.array([axis, *rows])


def write_folder(folder, splits, *, frames, fps, seed, traced=False):
    """A clip for each of the splits; traced: every frame of it is."""
    (folder / "Videos").mkdir(parents=True, exist_ok=True)
    table = ["FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split"]
    chords = ["FileName,X1,Y1,X2,Y2,Frame"]
    for i, split in enumerate(splits):
        clip = make_clip((seed, i), frames=frames, fps=fps, hr=80 + 4 * i, rhythm="sinus")
        name = f"0X{seed}{i}"
        table.append(f"{name},{clip['ef']},40,90,112,112,{fps},{frames},{split}")
        video = clip["video"].repeat(3, 1).repeat(3, 2)                 # T 192 192 1
        imageio.mimwrite(folder / f"Videos/{name}.avi", video, fps=fps, codec="mjpeg", quality=10,
                         macro_block_size=8)
        for frame, mask in enumerate(clip["mask"] if traced else []):
            chords += [f"{name}.avi,{','.join(map(str, chord))},{frame}" for chord in tracing(mask)]
    if traced:
        (folder / "VolumeTracings.csv").write_text("\n".join(chords) + "\n")
    (folder / "FileList.csv").write_text("\n".join(table) + "\n")


out = Path(sys.argv[1])
write_folder(out / "nine", 7 * ["TRAIN"] + 2 * ["VAL"], frames=200, fps=50, seed=1,
             traced=True)
write_folder(out / "gif", 6 * ["TRAIN"], frames=16, fps=8, seed=2)
write_folder(out / "extra", 3 * ["TRAIN"], frames=100, fps=50, seed=3)
PYTHON
}

# keep_clips SRC OUT NAME...: OUT is SRC with these clips alone.
keep_clips() {
    local src=$1 out=$2
    shift 2
    mkdir -p "$out"
    ln -sfn "$(realpath "$src/Videos")" "$out/Videos"
    [ ! -e "$src/VolumeTracings.csv" ] || cp "$src/VolumeTracings.csv" "$out"
    awk -F, -v names=" $* " '{ name = $1; sub(/\.avi$/, "", name) }
        NR == 1 || index(names, " " name " ")' "$src/FileList.csv" > "$out/FileList.csv"
}

# train_on_all SRC OUT: OUT is SRC, and its VAL clips are there a second time, for training, under
# other names.
train_on_all() {
    python - "$1" "$2" <<'PYTHON'
import csv
import sys
from pathlib import Path

src, out = map(Path, sys.argv[1:])
(out / "Videos").mkdir(parents=True, exist_ok=True)


def link(name, copy):
    """Videos/COPY.avi of OUT is Videos/NAME.avi of SRC."""
    path = out / "Videos" / f"{copy}.avi"
    if not path.is_symlink():
        path.symlink_to((src / "Videos" / f"{name}.avi").resolve())


def table(name):
    """Rows of a csv of SRC, and a function that writes rows with the same columns to OUT."""
    with open(src / name, newline="") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames

    def write(rows):
        with open(out / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return rows, write


clips, write_clips = table("FileList.csv")
chords, write_chords = table("VolumeTracings.csv")
more_clips, more_chords = [], []
for clip in clips:
    name = clip["FileName"].removesuffix(".avi")
    link(name, name)
    if clip["Split"].strip().lower() == "val":
        copy = f"{name}_train"
        link(name, copy)
        more_clips.append(clip | {"FileName": copy, "Split": "TRAIN"})
        for chord in chords:
            if chord["FileName"].removesuffix(".avi") == name:
                more_chords.append(chord | {"FileName": f"{copy}.avi"})
write_clips(clips + more_clips)
write_chords(chords + more_chords)
PYTHON
}

# regular_beats SET: names of the clips whose beats last 0.4 to 1.6 s, the longest less than 1.4
# times the shortest.
regular_beats() {
    python - "$1" <<'PYTHON'
import json
import sys

import numpy as np

from data.dataset import Clips

clips = Clips(sys.argv[1], "train")
for i in range(len(clips)):
    beats = np.diff(json.loads(clips[i]["r_peaks_s"]))
    if len(beats) and 0.4 <= beats.min() and beats.max() <= 1.6 and beats.max() < 1.4 * beats.min():
        print(clips[i]["id"])
PYTHON
}

if [ -z "${NINE:-}" ] && [ "$MINUTES_SCALE" != 1 ]; then
    echo "NINE is not set: phantom clips in EchoNet-Dynamic's layout stand for the real ones"
    once "$SOURCES/stand_in/extra/FileList.csv" write_stand_in "$SOURCES/stand_in"
    NINE=$SOURCES/stand_in/nine
    GIF=$SOURCES/stand_in/gif
    EXTRA=$SOURCES/stand_in/extra
fi
for name in NINE GIF EXTRA; do
    if [ ! -e "${!name:-}/FileList.csv" ]; then
        echo "recipes/real_clips.sh: $name must be a folder with a FileList.csv, as the head of" \
            "this script describes" >&2
        exit 2
    fi
done

# ------------------------------------------------------- sets without ECG, tokenizer, U-Nets

# echonet SRC NAME FLAGS...: the prepared set NAME, 64 x 64, from a folder in EchoNet-Dynamic's
# layout.
echonet() {
    local src=$1 name=$2
    shift 2
    once "$D/$name" python -m sources.echonet_dynamic --src="$src" --size=64 --out="$D/$name" "$@"
}
echonet "$NINE" nine
echonet "$GIF" gif
echonet "$EXTRA" extra
once "$SOURCES/nineall/VolumeTracings.csv" train_on_all "$NINE" "$SOURCES/nineall"
echonet "$SOURCES/nineall" nineall
echonet "$SOURCES/nineall" nineall2 --every=2
echonet "$SOURCES/nineall" nineall4 --every=4
once "$D/phantom1500" python -m sources.phantom --any_fps=0.25 --any_hr=0.4 --val=0 --test=0 \
    --clips="$(scaled 1500 16)" --out="$D/phantom1500"

# The demo's tokenizer learns the real pictures. Each set of a list is drawn as often, whatever its
# size. Expected: val_mse 3.18e-3.
python train_tokenizer.py --data="$D/nine,$D/gif,$D/extra,$D/phantom1500" --init_from=weights \
    --augment --lr=5e-4 --minutes="$(scaled 14)" --out="$RUNS/real" --resume

# unet NAME MINUTES SETS START: the U-Net runs/NAME that reads the left ventricle in SETS, from the
# one in START on.
unet() {
    once "$RUNS/$1/segmenter.pt" python -m metrics.lv_segmenter --data="$3" --init_from="$4" \
        --weights="$RUNS/real" --augment --minutes="$(scaled "$2")" --out="$RUNS/$1"
}
unet seven 10 "$D/nine,$D/nine,$D/phantom1500" weights              # Dice .906
unet all9 6 "$D/nineall,$D/nineall,$D/phantom1500" weights          # Dice .947

# ------------------------------------------------------- sets with an ECG, generator

# EchoNet-Dynamic has no ECG. all9 finds where the ventricle begins to contract, and an ECG is drawn
# with its R peaks there and its T waves where systole ends. --every=K keeps each K-th frame, after
# the beats are found at all 50 a second. --any_hr=1 plays each training clip at another heart rate,
# so that seven hearts show many rates.
ECG="--segmenter=$RUNS/all9"
for k in 2 3 4 6; do
    echonet "$NINE" "nine$k" $ECG --every=$k
    echonet "$NINE" "any$k" $ECG --every=$k --any_hr=1 --seed=$k
done

# The clips of GIF in which the U-Net finds a regular beat: 69 of 100.
echonet "$GIF" gifall $ECG
regular=$(regular_beats "$D/gifall")
if [ -z "$regular" ]; then
    echo "recipes/real_clips.sh: no clip of $D/gifall has a regular beat" >&2
    exit 1
fi
echo "$(echo "$regular" | wc -l) clips of $GIF have a regular beat"
keep_clips "$GIF" "$SOURCES/gif1" $regular
echonet "$SOURCES/gif1" gif1 $ECG

# The first two clips of EXTRA, at two frame rates.
first_two=$(sed -n 2,3p "$EXTRA/FileList.csv" | cut -d, -f1 | sed 's/\.avi$//')
keep_clips "$EXTRA" "$SOURCES/extra12" $first_two
echonet "$SOURCES/extra12" extra1 $ECG --every=1
echonet "$SOURCES/extra12" extra2 $ECG --every=2

# Phantoms whose QT interval varies: systole then follows from the T wave, not from the heart rate
# alone.
once "$D/qt" python -m sources.phantom --any_fps=0.25 --any_hr=0.4 --any_qt=0.7 --val=0 --test=0 \
    --clips="$(scaled 1500 16)" --out="$D/qt"

# The generator goes on from the demo's. gif1 and qt stand three times in the list: they are drawn
# three times as often. Expected: loss of the two clips 3.90, with a wrong ECG 4.22.
SETS=$(echo "$D"/{nine,any}{2,3,4,6} "$D"/gif1{,,} "$D"/extra{1,2} "$D"/qt{,,} | tr ' ' ,)
once "$RUNS/real/ecg_encoder.pt" cp weights/ecg_encoder.pt "$RUNS/real"
python train_generator.py --data="$SETS" --weights="$RUNS/real" --init_from=weights --augment \
    --p_recorder_filter=0.5 --lr=5e-4 --minutes="$(scaled 70)" --out="$RUNS/real" --resume

# ------------------------------------------------------- the figures

# Two U-Nets read the videos: reader has learned the nine clips at these frame rates, seven2 only
# the seven.
unet reader 12 "$D/nineall,$D/nineall2,$D/nineall4" "$RUNS/all9"    # Dice .958
unet seven2 7 "$D/nine,$D/nine2,$D/nine4" "$RUNS/seven"             # Dice .906

SEEDS=$(seq 10 $((9 + $(scaled 5 1))))
for reader in reader seven2; do
    for set in nine4 nine2; do
        for seed in $SEEDS; do
            echo "== $set read by $reader, seed $seed"
            python evaluate.py sync --data="$D/$set" --split=val --weights="$RUNS/real" \
                --segmenter="$RUNS/$reader" --guidance=2 --temperature=0.5 --scorer=confidence \
                --overlap=1 --conditions=shifted --seed="$seed" \
                --out="$RUNS/real/eval_${reader}_${set}_$seed"
        done
    done
done

# Means over the seeds.
python - "$RUNS/real" $SEEDS <<'PYTHON'
import json
import sys

import numpy as np

KEYS = "area_r_traced_mean", "area_r_mean", "beat_recall", "false_beats", "shift_ms"
run, *seeds = sys.argv[1:]
print("U-Net   set  ", *KEYS)
for reader in "reader", "seven2":
    for name in "nine4", "nine2":
        rows = []
        for seed in seeds:
            with open(f"{run}/eval_{reader}_{name}_{seed}/eval_sync.json") as file:
                metrics = json.load(file)
            rows.append([np.nan if metrics[key] is None else metrics[key] for key in KEYS])
        means = np.array(rows, float).mean(0)
        print(f"{reader}  {name}", *(f"{mean:{len(key)}.3f}" for key, mean in zip(KEYS, means)))
PYTHON
