"""EchoNet-Dynamic (Ouyang et al. 2020) as a prepared set, from the layout in which Stanford gives it.

    python -m sources.echonet_dynamic --src=EchoNet-Dynamic --out=datasets/echonet --size=112 --seed=0
    python -m sources.echonet_dynamic --src=EchoNet-Dynamic --out=datasets/echonet_ecg \\
        --segmenter=runs/echonet --every=2 --any_hr=0.5

--src holds FileList.csv, VolumeTracings.csv and Videos/*.avi. Splits are the official ones. EF and
volumes are the experts'. The two frames that they traced have masks.

EchoNet-Dynamic has no ECG. --segmenter=FOLDER makes one for each clip, in three steps:

1. find_beats: R peaks and ends of systole from the LV area. The area is the segmenter's, or the
   experts' where they traced every frame. The traced end-diastole is an R peak too.
2. at_rate, for a share --any_hr of the training clips: the video is played at another heart rate.
   So few patients teach more of how a heart follows its ECG.
3. ecg_of_beats (data/ecgsyn.py): ECGSYN's waves around these R peaks. The T wave comes at the end
   of systole, as in a recorded ECG. The waves do not depend on the EF unless --ecg_ef asks for it.

meta.json marks such an ECG "synthetic".
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
from scipy.signal import find_peaks

from common.flags import UserError, parse_flags, run_main
from data.dataset import LEADS, UNTRACED
from data.ecgsyn import MARGIN_S, ecg_of_beats, usual_systole
from data.lv_tracings import draw_outline, tracing_outline
from data.video_files import read_video
from data.writer import prepare
from metrics.curves import parabola_top
from metrics.ejection_fraction import amplitude, is_still, median_or_nan, smooth_curve
from metrics.lv_segmenter import is_traced, load_segmenter, masks_of


@dataclass
class EchonetDynamicConfig:
    """Flags of `python -m sources.echonet_dynamic`."""
    src: str = ""               # folder with FileList.csv, VolumeTracings.csv, Videos/
    out: str = "datasets/echonet"  # folder to write
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    every: int = 1              # keep each second, third, ... frame; beats are found in all frames
    least: int = 11             # a video of which fewer frames are kept is left out
    segmenter: str = ""         # a folder with a segmenter.pt, or a TorchScript file: makes ECGs
    ecg_ef: bool = False        # let the ECG show the EF
    any_hr: float = 0.0         # share of the training clips played at any heart rate, 45 to 150 a minute
    seed: int = 0               # of the ECGs; the splits are the official ones
    workers: int = 0            # processes; 0: one a core


FILES = ("FileName", "EF", "ESV", "EDV", "FPS", "NumberOfFrames", "Split")
CHORD = ("X1", "Y1", "X2", "Y2")    # pixels of the videos, which are PIXELS high and wide
PIXELS = 112
SAME_BEAT_S = 0.3       # an R peak nearer to the traced ED frame than this is of the same beat
MIN_FALL = 0.35         # a systole falls by more than this share of the area's amplitude
BEGUN = 0.08            # a fall has begun when it has done this share of its depth
RELAX_S = 0.03          # ejection ends so long before the smallest area (the phantom's median)


# ---------------------------------------------------------------------------- tables and tracings

def read_table(path, columns):
    """Rows of a csv as dicts; UserError where it is missing or has another layout."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --src is EchoNet-Dynamic's folder") from None
    if not rows:
        raise UserError(f"{path}: no row in it")
    for name in columns:
        if name not in rows[0]:
            raise UserError(f"{path}: no column {name}")
    return rows


def file_list(src):
    """Rows of FileList.csv, one a video."""
    path = Path(src) / "FileList.csv"
    rows = read_table(path, FILES)
    counts = Counter(row["FileName"] for row in rows)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"{path}: {name} is there twice")
    return rows


def tracings(src):
    """{video: {frame: chords}} of VolumeTracings.csv, {} where the file is missing.

    A chord is four numbers (CHORD). One chord of a frame is the long axis, as a rule the first.
    """
    path = Path(src) / "VolumeTracings.csv"
    if not path.exists():
        print(f"no {path}: the set has no masks", file=sys.stderr)
        return {}
    found = defaultdict(lambda: defaultdict(list))
    for row in read_table(path, ("FileName", "Frame", *CHORD)):
        try:
            chord = [float(row[key]) for key in CHORD]
            frame = int(row["Frame"])
            if not all(map(math.isfinite, chord)):
                raise ValueError
        except (TypeError, ValueError):
            raise UserError(f"{path}: a row of {row['FileName']} has no numbers in it") from None
        found[row["FileName"].removesuffix(".avi")][frame].append(chord)
    return {name: dict(frames) for name, frames in found.items()}


def draw_masks(name, traced, frames, size):
    """{frame: chords} of a video -> masks (T, size, size) uint8, UNTRACED where there is none.

    UserError where an outline crosses itself, whatever the order of its chords and of their ends.
    """
    masks = np.full((frames, size, size), UNTRACED, np.uint8)
    for frame, chords in traced.items():
        try:
            outline = tracing_outline(chords)                           # 2 N, 2
        except UserError as error:
            raise UserError(f"{name}: frame {frame} in VolumeTracings.csv: {error}") from None
        masks[frame] = draw_outline(outline * size / PIXELS, size)
    return masks


def read_clip(row, traced, config):
    """The labels of a row of FileList.csv; its video (T, H, W, C), all frames; masks (T, H, W).

    traced: {frame: chords}. UserError where the tables and the video do not fit.
    """
    name = row["FileName"].removesuffix(".avi")
    try:
        ef, esv, edv, fps = (float(row[key]) for key in ("EF", "ESV", "EDV", "FPS"))
        stated = int(float(row["NumberOfFrames"]))
    except (TypeError, ValueError):
        raise UserError(f"{name}: EF, ESV, EDV, FPS or NumberOfFrames is no number "
                        "in FileList.csv") from None
    if not (0 <= ef <= 100 and fps > 0):
        raise UserError(f"{name}: EF {ef:g}, FPS {fps:g} in FileList.csv cannot be")

    path = Path(config.src) / "Videos" / f"{name}.avi"
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    video, _ = read_video(path, config.size, config.channels)
    if len(video) < stated:
        raise UserError(f"{path}: {len(video)} frames, FileList.csv says {stated}")

    if traced and not 0 <= min(traced) <= max(traced) < len(video):
        raise UserError(f"{name}: VolumeTracings.csv has frame {max(traced)}, "
                        f"the video {len(video)} frames")
    if any(len(chords) < 3 for chords in traced.values()):
        raise UserError(f"{name}: VolumeTracings.csv has an axis and fewer than two chords of it")
    clip = dict(id=name, fps=fps / config.every, view="A4C", ef=ef, esv_ml=esv, edv_ml=edv,
                text=f"A4C view, EF {ef:.0f}")
    masks = draw_masks(name, traced, len(video), config.size)
    return clip, video, masks


# ---------------------------------------------------------------------------- beats and their ECG

@lru_cache(1)
def segmenter_once(path, channels):
    """The segmenter, loaded once in each process."""
    return load_segmenter(path, channels)


def find_beats(area, fps):
    """R peaks (n,) and ends of systole (n,) in s, from an LV area (T,): the last maximum before each
    fall, and the minimum after it, both between frames. nan where the video ends during the fall.

    The R peak is not the largest area of the beat. After filling, the area often rests on a plateau
    of half a second, and which of its maxima is the largest is chance. An R peak there would come
    long before the contraction.
    """
    if is_still(area, fps):
        return np.zeros((2, 0))
    a = smooth_curve(area, fps)
    # The lowest point of each deep fall; the appended value lets the last frame be one too
    lowest = np.append(-a, -a.max())
    ends, _ = find_peaks(lowest, prominence=MIN_FALL * amplitude(area, fps))
    start = 0
    found = []
    for end in ends:
        # 1. Where the fall has begun: the last frame above a level just below its top
        level = (1 - BEGUN) * a[start:end + 1].max() + BEGUN * a[end]
        t = start + np.flatnonzero(a[start:end + 1] > level)[-1]
        # A fall that has begun in frame 0 may have begun before the video
        if t > 0:
            # 2. From there back up the slope to the last maximum
            while t > start and a[t - 1] >= a[t]:
                t -= 1
            # 3. Both times between frames, by a parabola
            r_peak = t + parabola_top(a, t)
            stop = math.nan
            if end < len(a) - 1:
                stop = end + parabola_top(-a, end)
            found.append((r_peak, stop))
        start = end
    return np.array(found).reshape(-1, 2).T / fps


def at_rate(r_peaks, systole, frames, fps, hr):
    """A video of so many `frames`, played at heart rate hr: the frames to show, then the R peaks
    (n,) and the systole, in s.

    Systoles get longer or shorter with the rate as usual_systole does. Diastoles take the rest.
    """
    gap = np.median(np.diff(r_peaks))
    new_systole = systole * usual_systole(60 / hr) / usual_systole(gap)
    # Nine more beats on each side, so that the whole video lies between two beats
    before = r_peaks[0] - gap * np.arange(9, 0, -1)
    after = r_peaks[-1] + gap * np.arange(1, 10)
    r = np.r_[before, r_peaks, after]
    new_r = r * 60 / hr / gap
    # R, end of systole, R, ... in the old time and in the new; an early beat ends a systole
    old = np.maximum.accumulate(np.ravel([r, r + systole], "F"))
    new = np.maximum.accumulate(np.ravel([new_r, new_r + new_systole], "F"))
    new -= np.interp(0, old, new)       # the first frame stays the first
    # Which frame each new instant shows
    end = np.interp(frames / fps, old, new)
    at = np.interp(np.arange(0, end, 1 / fps), new, old)
    shown = (at * fps).round().astype(int).clip(0, frames - 1)
    return shown, np.interp(r_peaks, old, new), new_systole


def beats_of(video, mask, fps, segmenter):
    """R peaks (n,) and the length of systole in s (nan where no systole is whole) of a video
    (T, H, W, C) with the masks (T, H, W) that the experts traced."""
    traced = is_traced(mask)
    found = mask
    if not traced.all():
        found = np.concatenate(list(masks_of(segmenter, video)))
    r_peaks, ends = find_beats(found.sum((1, 2)), fps)
    systole = median_or_nan((ends - r_peaks)[~np.isnan(ends)]) - RELAX_S
    # The traced end-diastole, the larger of two masks, takes the place of an R peak near it
    if traced.any() and not traced.all():
        ed = np.where(traced, mask.sum((1, 2)), 0).argmax() / fps
        others = r_peaks[np.abs(r_peaks - ed) > SAME_BEAT_S]
        r_peaks = np.sort(np.append(others, ed))
    return r_peaks, systole


def synthetic_ecg(clip, video, mask, config, train):
    """The frames of a video to show, and what its ECG adds to the clip. train: any_hr applies."""
    name = clip["id"]
    fps = config.every * clip["fps"]        # of the video; the clip keeps only each `every`-th frame
    segmenter = segmenter_once(config.segmenter, config.channels)
    r_peaks, systole = beats_of(video, mask, fps, segmenter)
    if not len(r_peaks):
        raise UserError(f"{name}: no beat is seen in it, so no ECG can be made")

    # The random numbers of a clip come from its name: they do not change when others are added
    key = config.seed, zlib.crc32(name.encode())
    shown = np.arange(len(video))
    share, rate = np.random.default_rng((*key, 1)).random(2)
    if train and share < config.any_hr:
        if len(r_peaks) < 2 or math.isnan(systole):
            raise UserError(f"{name}: no whole beat is seen in it, so it has no other rate")
        hr = 45 * (150 / 45) ** rate
        shown, r_peaks, systole = at_rate(r_peaks, systole, len(video), fps, hr)
    ef = clip["ef"] if config.ecg_ef else None
    ecg = ecg_of_beats(key, r_peaks, len(shown) / fps, systole, ef)
    r_peaks_s = [round(float(t), 3) for t in r_peaks]
    return shown, dict(ecg=ecg, ecg_offset_s=-MARGIN_S, r_peaks_s=r_peaks_s)


# ---------------------------------------------------------------------------- one clip, and the set

def list_jobs(config):
    """{split: [(row of FileList.csv, its tracings)]}. In a set without tracings these are None."""
    rows = file_list(config.src)
    traced = tracings(config.src)
    jobs = {"train": [], "val": [], "test": []}
    for row in rows:
        split = row["Split"].strip().lower()
        if split not in jobs:
            raise UserError(f"FileList.csv: split {row['Split']!r} of {row['FileName']}; "
                            "TRAIN, VAL or TEST")
        name = row["FileName"].removesuffix(".avi")
        chords = traced.get(name, {}) if traced else None
        jobs[split].append((row, chords))
    return jobs


def make_clip(job, config):
    """(row of FileList.csv, its tracings or None) -> the clip as Writer.add takes it.

    UserError where the video cannot be used.
    """
    row, traced = job
    clip, video, mask = read_clip(row, traced or {}, config)
    shown = np.arange(len(video))
    if config.segmenter:
        train = row["Split"].strip().lower() == "train"
        shown, ecg = synthetic_ecg(clip, video, mask, config, train)
        clip |= ecg
    shown = shown[::config.every]
    if len(shown) < config.least:
        raise UserError(f"{clip['id']}: {len(shown)} frames are kept, --least={config.least}")
    clip["video"] = video[shown]                                        # T H W C
    # A set has masks of all its clips, UNTRACED where nothing was traced, or of none
    if traced is not None:
        clip["mask"] = mask[shown]                                      # T H W
    return clip


def main():
    """Write the prepared set."""
    config = parse_flags(EchonetDynamicConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least, config.every) < 1:
        raise UserError("channels is 1 or 3; size, least and every are 1 or more")
    if not 0 <= config.any_hr <= bool(config.segmenter):
        raise UserError(f"--any_hr={config.any_hr:g} is a share, 0 to 1, and needs a --segmenter")
    # A wrong --segmenter is refused before the work begins
    if config.segmenter:
        load_segmenter(config.segmenter, config.channels)
    jobs = list_jobs(config)
    leads = LEADS if config.segmenter else []
    ecg = "synthetic" if config.segmenter else "none"
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None,
                height=config.size, width=config.size, channels=config.channels, leads=leads,
                source="echonet_dynamic", ecg=ecg,
                command=" ".join(["sources.echonet_dynamic", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
