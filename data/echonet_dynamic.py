"""EchoNet-Dynamic (Ouyang et al. 2020) as a prepared set, from the layout in which Stanford gives it out.

    python -m data.echonet_dynamic --src=EchoNet-Dynamic --out=datasets/echonet --size=112

--src holds FileList.csv, VolumeTracings.csv and Videos/*.avi. Splits are the official ones; EF and volumes
are the experts'. The two frames that they traced have masks.

The set has no ECG. With --segmenter=FOLDER each clip gets one: R peaks at the traced end-diastole and at the
last maximum of the LV area (the segmenter's, or the experts' where they traced each frame) before each other
fall, and ECGSYN waves around them (data/phantom.py), whose shape says nothing of the EF unless --ecg_ef asks
for it. meta.json marks it "synthetic". --every=K keeps each K-th frame; the beats are found in all of them.
"""
import csv
import math
import os
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.signal import find_peaks

from data.clips import LEADS, UNTRACED
from data.flags import UserError, parse_flags, run_main
from data.heart import is_still, is_traced, load_segmenter, masks_of
from data.measures import parabola_top, smooth, swing
from data.phantom import MARGIN_S, ecg_of_beats
from data.prepare import prepare
from data.webvid import read_video


@dataclass
class EchonetConfig:
    src: str = ""               # folder with FileList.csv, VolumeTracings.csv, Videos/
    out: str = "datasets/echonet"  # folder to write
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    every: int = 1              # keep each second, third, ... frame
    least: int = 11             # a video of which fewer frames are kept is left out
    segmenter: str = ""         # a folder with a segmenter.pt, or a TorchScript file: gives each clip an ECG
    ecg_ef: bool = False        # let the ECG show the EF
    seed: int = 0               # of the ECGs; the splits are the official ones
    workers: int = 0            # processes; 0: one a core


FILES = ("FileName", "EF", "ESV", "EDV", "FPS", "NumberOfFrames", "Split")
CHORD = ("X1", "Y1", "X2", "Y2")    # pixels of the videos, which are PIXELS high and wide
PIXELS = 112
SAME_BEAT_S = 0.3                   # an R peak nearer to the traced ED frame than this is of the same beat
MIN_FALL = 0.35                     # of the area's swing: a systole falls by more
BEGUN = 0.08                        # of that fall: it has begun


def read_table(path, columns):
    """Rows of a csv as dicts; UserError where it is missing or has another layout."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --src is EchoNet-Dynamic's folder") from None
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"{path}: no column {missing[0]}" if rows else f"{path}: no row in it")
    return rows


def file_list(src):
    """Rows of FileList.csv."""
    path = Path(src) / "FileList.csv"
    rows = read_table(path, FILES)
    twice = [name for name, many in Counter(row["FileName"] for row in rows).items() if many > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]} is there twice")
    return rows


def tracings(src):
    """{video: {frame: chords}} of VolumeTracings.csv, each chord its CHORD; the first is the long axis."""
    path, found = Path(src) / "VolumeTracings.csv", defaultdict(lambda: defaultdict(list))
    if not path.exists():
        print(f"no {path}: the set has no masks", file=sys.stderr)
        return {}
    try:
        for row in read_table(path, ("FileName", "Frame", *CHORD)):
            chord = [float(row[key]) for key in CHORD]
            if not all(map(math.isfinite, chord)):
                raise ValueError
            found[row["FileName"].removesuffix(".avi")][int(row["Frame"])].append(chord)
    except (TypeError, ValueError):
        raise UserError(f"{path}: a row of {row['FileName']} has no numbers in it") from None
    return {name: dict(frames) for name, frames in found.items()}


def draw_masks(traced, frames, size):
    """{frame: chords} -> masks (T, size, size) uint8, UNTRACED where there is none."""
    masks = np.full((frames, size, size), UNTRACED, np.uint8)
    for frame, chords in traced.items():
        left, right = np.split(np.array(chords[1:]) * size / PIXELS, 2, axis=1)             # N 2 each
        outline, mask = np.concatenate([left, right[::-1]]), Image.new("L", (size, size))
        ImageDraw.Draw(mask).polygon([tuple(point) for point in outline], fill=1, outline=1)
        masks[frame] = mask
    return masks


@lru_cache(1)
def segmenter_once(path, channels):
    return load_segmenter(path, channels)


def ends_of_diastole(area, fps):
    """R peaks (n,) in seconds: the last maximum of the LV area (T,) before each fall, found between frames.

    Not the largest of the beat: after filling, the area often rests on a plateau of half a second, and which
    of its maxima is the largest is chance. An R peak there would come long before the contraction.
    """
    if is_still(area, fps):
        return np.array([])
    a, height, start, found = smooth(area, fps), swing(area, fps), 0, []
    for end in find_peaks(np.append(-a, -a.max()), prominence=MIN_FALL * height)[0]:
        level = (1 - BEGUN) * a[start:end + 1].max() + BEGUN * a[end]
        t = start + np.flatnonzero(a[start:end + 1] > level)[-1]
        if t:               # a fall from frame 0 on may have begun before it
            while t > start and a[t - 1] >= a[t]:
                t -= 1
            found.append((t + parabola_top(a, t)) / fps)
        start = end
    return np.array(found)


def make_clip(job, src, size, channels, least, every=1, segmenter="", ecg_ef=False, seed=0, masked=True):
    """(A row of FileList.csv, its tracings) -> the clip as Writer.add takes it."""
    row, traced = job
    name = row["FileName"].removesuffix(".avi")
    try:
        ef, esv, edv, fps = (float(row[key]) for key in ("EF", "ESV", "EDV", "FPS"))
        stated = int(float(row["NumberOfFrames"]))
    except (TypeError, ValueError):
        raise UserError(f"{name}: EF, ESV, EDV, FPS or NumberOfFrames is no number in FileList.csv") from None
    if not (0 <= ef <= 100 and fps > 0):
        raise UserError(f"{name}: EF {ef:g}, FPS {fps:g} in FileList.csv cannot be")
    path = Path(src) / "Videos" / f"{name}.avi"
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    video, _ = read_video(path, size, channels)
    kept = video[::every]
    if len(video) < stated or len(kept) < least:
        raise UserError(f"{path}: {len(video)} frames, FileList.csv says {stated}; {len(kept)} kept, "
                        f"--least={least}")
    clip = dict(id=name, video=kept, fps=fps / every, view="A4C", ef=ef, esv_ml=esv, edv_ml=edv,
                text=f"A4C view, EF {ef:.0f}")
    if traced and not 0 <= min(traced) <= max(traced) < len(video):
        raise UserError(f"{name}: VolumeTracings.csv has frame {max(traced)}, the video {len(video)} frames")
    if any(len(chords) < 3 for chords in traced.values()):
        raise UserError(f"{name}: VolumeTracings.csv has an axis and fewer than two chords of it")
    mask = draw_masks(traced, len(video), size)
    if masked:
        clip["mask"] = mask[::every]
    if segmenter:
        whole = is_traced(mask).all()
        found = mask if whole else np.concatenate(list(masks_of(segmenter_once(segmenter, channels), video)))
        r_peaks = ends_of_diastole(found.sum((1, 2)), fps)
        if traced and not whole:
            ed = max(traced, key=lambda k: mask[k].sum()) / fps
            r_peaks = np.sort(np.append(r_peaks[np.abs(r_peaks - ed) > SAME_BEAT_S], ed))
        if not len(r_peaks):
            raise UserError(f"{name}: no beat is seen in it, so no ECG can be made")
        key = seed, zlib.crc32(name.encode())
        clip |= dict(ecg=ecg_of_beats(key, r_peaks, len(video) / fps, ef if ecg_ef else None),
                     ecg_offset_s=-MARGIN_S, r_peaks_s=[round(float(t), 3) for t in r_peaks])
    return clip


def main():
    config = parse_flags(EchonetConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least, config.every) < 1:
        raise UserError("channels is 1 or 3; size, least and every are 1 or more")
    if config.segmenter:        # before the work begins
        load_segmenter(config.segmenter, config.channels)
    jobs, rows, traced = {"train": [], "val": [], "test": []}, file_list(config.src), tracings(config.src)
    for row in rows:
        split = row["Split"].strip().lower()
        if split not in jobs:
            raise UserError(f"FileList.csv: split {row['Split']!r} of {row['FileName']}; TRAIN, VAL or TEST")
        jobs[split].append((row, traced.get(row["FileName"].removesuffix(".avi"), {})))
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None, height=config.size,
                width=config.size, channels=config.channels, source="echonet_dynamic",
                leads=LEADS if config.segmenter else [], ecg="synthetic" if config.segmenter else "none",
                command=" ".join(["data.echonet_dynamic", *sys.argv[1:]]))
    keys = "src", "size", "channels", "least", "every", "segmenter", "ecg_ef", "seed"
    how = {key: getattr(config, key) for key in keys} | {"masked": bool(traced)}
    prepare(config.out, meta, jobs, partial(make_clip, **how), config.workers)


if __name__ == "__main__":
    run_main(main)
