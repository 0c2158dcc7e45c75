"""EchoNet-Dynamic (Ouyang et al. 2020) as a prepared set, from the layout in which Stanford gives it out.

    python -m sources.echonet_dynamic --src=EchoNet-Dynamic --out=datasets/echonet --size=112

--src holds FileList.csv, VolumeTracings.csv and Videos/*.avi. Splits are the official ones; EF and volumes
are the experts'. The two frames that they traced have masks.

The set has no ECG. With --segmenter=FOLDER each clip gets one: R peaks at the traced end-diastole and at the
last maximum of the LV area (the segmenter's, or the experts' where they traced each frame) before each other
fall, and ECGSYN waves around them (sources/phantom.py), whose shape says nothing of the EF unless --ecg_ef asks
for it; where the T wave comes tells how long systole lasts, as in a recorded ECG. meta.json marks it
"synthetic". --every=K keeps each K-th frame; the beats are found in all of them. --any_hr lets a share of the
training clips beat at another rate: few patients then teach more of how a heart follows its ECG.
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

from common.flags import UserError, parse_flags, run_main
from data.dataset import LEADS, UNTRACED
from data.ecgsyn import MARGIN_S, ecg_of_beats, usual_systole
from data.video_files import read_video
from data.writer import prepare
from metrics.curves import parabola_top
from metrics.ejection_fraction import is_still, middle, smooth, swing
from metrics.lv_segmenter import is_traced, load_segmenter, masks_of


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
    any_hr: float = 0.0         # share of the training clips played at any heart rate, 45 to 150 a minute
    seed: int = 0               # of the ECGs; the splits are the official ones
    workers: int = 0            # processes; 0: one a core


FILES = ("FileName", "EF", "ESV", "EDV", "FPS", "NumberOfFrames", "Split")
CHORD = ("X1", "Y1", "X2", "Y2")    # pixels of the videos, which are PIXELS high and wide
PIXELS = 112
SAME_BEAT_S = 0.3                   # an R peak nearer to the traced ED frame than this is of the same beat
MIN_FALL = 0.35                     # of the area's swing: a systole falls by more
BEGUN = 0.08                        # of that fall: it has begun
RELAX_S = 0.03                      # before the smallest area ejection ends: the median of the phantom


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


def find_beats(area, fps):
    """R peaks (n,) and ends of systole (n,) in seconds, from an LV area (T,): the last maximum before each
    fall, and the minimum after it, both found between frames; nan where the video ends in the fall.

    Not the largest of the beat: after filling, the area often rests on a plateau of half a second, and which
    of its maxima is the largest is chance. An R peak there would come long before the contraction.
    """
    if is_still(area, fps):
        return np.zeros((2, 0))
    a, height, start, found = smooth(area, fps), swing(area, fps), 0, []
    for end in find_peaks(np.append(-a, -a.max()), prominence=MIN_FALL * height)[0]:
        level = (1 - BEGUN) * a[start:end + 1].max() + BEGUN * a[end]
        t = start + np.flatnonzero(a[start:end + 1] > level)[-1]
        if t:               # a fall from frame 0 on may have begun before it
            while t > start and a[t - 1] >= a[t]:
                t -= 1
            stop = end + parabola_top(-a, end) if end < len(a) - 1 else math.nan
            found.append((t + parabola_top(a, t), stop))
        start = end
    return np.array(found).reshape(-1, 2).T / fps


def at_rate(r_peaks, systole, frames, fps, hr):
    """The frames that show a video at heart rate hr, the R peaks (n,) then, and the systole, in seconds.

    Systoles get longer or shorter as usual_systole does with the rate, and diastoles take the rest.
    """
    gap = np.median(np.diff(r_peaks))
    short = systole * usual_systole(60 / hr) / usual_systole(gap)
    r = np.r_[r_peaks[0] - gap * np.arange(9, 0, -1), r_peaks, r_peaks[-1] + gap * np.arange(1, 10)]
    old = np.maximum.accumulate(np.ravel([r, r + systole], "F"))        # an early beat ends a systole
    new = np.maximum.accumulate(np.ravel([r * 60 / hr / gap, r * 60 / hr / gap + short], "F"))
    new -= np.interp(0, old, new)                                       # the first frame stays the first
    at = np.interp(np.arange(0, np.interp(frames / fps, old, new), 1 / fps), new, old)
    return (at * fps).round().astype(int).clip(0, frames - 1), np.interp(r_peaks, old, new), short


def read_clip(row, traced, src, size, channels, every):
    """The clip of a row of FileList.csv without its frames; those (T, H, W, C), all, and masks (T, H, W)."""
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
    if len(video) < stated:
        raise UserError(f"{path}: {len(video)} frames, FileList.csv says {stated}")
    if traced and not 0 <= min(traced) <= max(traced) < len(video):
        raise UserError(f"{name}: VolumeTracings.csv has frame {max(traced)}, the video {len(video)} frames")
    if any(len(chords) < 3 for chords in traced.values()):
        raise UserError(f"{name}: VolumeTracings.csv has an axis and fewer than two chords of it")
    clip = dict(id=name, fps=fps / every, view="A4C", ef=ef, esv_ml=esv, edv_ml=edv,
                text=f"A4C view, EF {ef:.0f}")
    return clip, video, draw_masks(traced, len(video), size)


def beats_of(video, mask, fps, segmenter):
    """R peaks (n,) and the length of systole, seconds (nan where none is whole), of a video (T, H, W, C) with
    the masks (T, H, W) that the experts traced."""
    traced = is_traced(mask)
    found = mask if traced.all() else np.concatenate(list(masks_of(segmenter, video)))
    r_peaks, ends = find_beats(found.sum((1, 2)), fps)
    systole = middle((ends - r_peaks)[~np.isnan(ends)]) - RELAX_S
    if traced.any() and not traced.all():
        ed = np.where(traced, mask.sum((1, 2)), 0).argmax() / fps
        r_peaks = np.sort(np.append(r_peaks[np.abs(r_peaks - ed) > SAME_BEAT_S], ed))
    return r_peaks, systole


def make_clip(job, src, size, channels, least, every=1, segmenter="", ecg_ef=False, any_hr=0.0, seed=0,
              masked=True):
    """(A row of FileList.csv, its tracings) -> the clip as Writer.add takes it."""
    row, traced = job
    clip, video, mask = read_clip(row, traced, src, size, channels, every)
    name, shown, fps = clip["id"], np.arange(len(video)), every * clip["fps"]
    if segmenter:
        r_peaks, systole = beats_of(video, mask, fps, segmenter_once(segmenter, channels))
        if not len(r_peaks):
            raise UserError(f"{name}: no beat is seen in it, so no ECG can be made")
        key = seed, zlib.crc32(name.encode())
        share, rate = np.random.default_rng((*key, 1)).random(2)
        if row["Split"].strip().lower() == "train" and share < any_hr:
            if len(r_peaks) < 2 or math.isnan(systole):
                raise UserError(f"{name}: no whole beat is seen in it, so it has no other rate")
            shown, r_peaks, systole = at_rate(r_peaks, systole, len(video), fps, 45 * (150 / 45) ** rate)
        ecg = ecg_of_beats(key, r_peaks, len(shown) / fps, systole, clip["ef"] if ecg_ef else None)
        clip |= dict(ecg=ecg, ecg_offset_s=-MARGIN_S, r_peaks_s=[round(float(t), 3) for t in r_peaks])
    shown = shown[::every]
    if len(shown) < least:
        raise UserError(f"{name}: {len(shown)} frames are kept, --least={least}")
    return clip | dict(video=video[shown]) | (dict(mask=mask[shown]) if masked else {})


def main():
    config = parse_flags(EchonetConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least, config.every) < 1:
        raise UserError("channels is 1 or 3; size, least and every are 1 or more")
    if not 0 <= config.any_hr <= bool(config.segmenter):
        raise UserError(f"--any_hr={config.any_hr:g} is a share, 0 to 1, and needs a --segmenter")
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
                command=" ".join(["sources.echonet_dynamic", *sys.argv[1:]]))
    keys = "src", "size", "channels", "least", "every", "segmenter", "ecg_ef", "any_hr", "seed"
    how = {key: getattr(config, key) for key in keys} | {"masked": bool(traced)}
    prepare(config.out, meta, jobs, partial(make_clip, **how), config.workers)


if __name__ == "__main__":
    run_main(main)
