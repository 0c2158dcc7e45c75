"""EchoXFlow (Stenhede et al. 2026, arXiv 2605.05447) as a prepared set: echoes with their own ECGs.

    python -m sources.echoxflow --src=EchoXFlow --out=datasets/echoxflow --size=128 --seed=0
    python -m sources.echoxflow --src=EchoXFlow --out=datasets/echoxflow_4ch --views=4ch --fps=25
    # needs: pip install zarr

--src holds croissant.json, the catalogue, and a Zarr store (folder or zip) for each recording. A
recording with a single-plane B-mode and no Doppler becomes a clip:

- data/2d_brightness_mode (T, depth, angle) uint8 is scan-converted by the sector geometry of the
  recording's manifest: a square with the apex at the top, black outside of the sector.
- Frames at uneven times (a step that is off the median by more than a twentieth) are resampled to
  an even rate, with --fps all frames to that rate.
- data/ecg has its times on the same clock. It is resampled to 250 Hz, and NaN where it has a gap
  of more than 0.2 s. It is not in millivolts and its unit is not known: each ECG is scaled so that
  its highest deflection is 1 mV. The lead is not known either; it is called II, the usual choice.
- A strain recording names the views (A4C, A2C, A3C) of the cines that it measures. Its contours of
  the left ventricle become masks, in frames of at most a heart cycle or two; all other frames are
  UNTRACED (data/dataset.py). Its QRS triggers are the R peaks where they last as long as the cine.

The set has no ejection fraction and no volumes of its cines: these columns stay empty. No exam is
in two splits. An exam is not a patient: the set does not say which exams are of one patient.
"""
import math
import os
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.signal import resample_poly

from common.flags import UserError, parse_flags, run_main
from data.beamspace import draw_contour, fit_square, scan_conversion
from data.dataset import ECG_HZ, UNTRACED
from data.echoxflow_files import (FRAMES, VIEWS, array_path, find_sector, is_cine, manifest_of,
                                  numbers, one_line, open_store, read_catalogue, read_contour,
                                  read_geometry, read_triggers, strains_of_cines, view_of)
from data.frame_times import between, check_steps, even_times, resample_frames
from data.writer import draw_split, prepare


@dataclass
class EchoxflowConfig:
    """Flags of `python -m sources.echoxflow`."""
    src: str = ""               # folder with croissant.json and the Zarr stores
    out: str = "datasets/echoxflow"  # folder to write
    size: int = 128             # height and width in pixels
    views: str = ""             # 4ch,2ch,3ch: only cines of these views; empty = all, also unknown
    fps: float = 0.0            # frames per second of all clips; 0 = each recording's own rate
    least: int = 11             # a cine with fewer frames is left out
    val: float = 0.1            # share of the exams in the val split
    test: float = 0.1           # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


GAP_S = 0.2             # a longer gap of an ECG is unknown, a shorter one is bridged
ECG_PAUSE_S = 60        # an ECG with a longer pause has times that cannot be right
BLOCK = 32              # frames that are converted together


class Job(NamedTuple):
    """One recording."""
    name: str
    path: Path          # its Zarr store
    strains: list       # Strain recordings that measure it


# ---------------------------------------------------------------------------- the picture

def convert_frames(frames, sector, square, size):
    """A Zarr array of frames (T, R, A) uint8 -> (T, size, size) uint8, block by block.

    UserError where a piece of the store is missing.
    """
    T, R, A = frames.shape
    t, r, a = frames.chunks
    matrix = scan_conversion(sector, square, size, (R, A))
    video = np.empty((T, size, size), np.uint8)
    filled = np.zeros((math.ceil(T / t), math.ceil(R / r), math.ceil(A / a)))   # cells above 0
    for start in range(0, T, BLOCK):
        block = np.asarray(frames[start:start + BLOCK])                         # n R A
        columns = np.ascontiguousarray(block.reshape(len(block), R * A).T, np.float32)
        grey = (matrix @ columns).T                                             # n, size * size
        video[start:start + len(block)] = np.rint(grey).reshape(-1, size, size)
        cells = np.add.reduceat(block > 0, range(0, R, r), axis=1, dtype=int)
        cells = np.add.reduceat(cells, range(0, A, a), axis=2)
        np.add.at(filled, np.arange(start, start + len(block)) // t, cells)
    # Zarr reads a missing piece as zeros. It is dark there, but not at other times
    lost = (filled == 0) & ((filled.max(0) > 0.1 * t * r * a) | (filled.max() == 0))
    if lost.any():
        first = np.argwhere(lost)[0, 0] * t
        raise UserError(f"the frames from {first} on are black: the store is not whole")
    return video


# ---------------------------------------------------------------------------- time

def frame_times(group, sector, frames):
    """The times (T,) in s of the frames of a cine; UserError where they cannot be right."""
    path = array_path(sector.get("timestamps")) or "timestamps/2d_brightness_mode"
    if path not in group:
        raise UserError(f"no {path} in it")
    times = numbers(group, path)
    if len(times) != frames:
        raise UserError(f"{frames} frames, {len(times)} times of them")
    if not np.isfinite(times).all():
        raise UserError(f"{np.sum(~np.isfinite(times))} of the times of its frames are NaN")
    check_steps(np.diff(times))
    return times


def draw_masks(contour, at, step, square, size):
    """Masks (T, size, size) at the instants `at`, UNTRACED where no contour is within half a step.

    contour: times (F,) and points (F, N, 2) as read_contour gives them, or None.
    """
    masks = np.full((len(at), size, size), UNTRACED, np.uint8)
    if contour is None:
        return masks
    times, points = contour
    times, order = np.unique(times, return_index=True)
    points = points[order]
    if len(times) == 1:
        # A second copy, later than any frame: then `between` has two entries
        times = np.append(times, times[0] + 1e6)
        points = points.repeat(2, axis=0)
    before, share = between(times, at)
    for k, (j, weight) in enumerate(zip(before, share)):
        distance = np.abs(times[j:j + 2] - at[k]).min()
        if distance <= step / 2 + 1e-6:
            between_two = (1 - weight) * points[j] + weight * points[j + 1]     # N 2
            masks[k] = draw_contour(between_two, square, size)
    return masks


# ---------------------------------------------------------------------------- ECG

def read_ecg_samples(group):
    """The ECG of a recording: samples (N,) and their times (N,) in s, without missing samples."""
    names = ["ecg"] + sorted(name for name in group["data"] if name.endswith("_ecg"))
    for name in names:
        if f"data/{name}" in group and f"timestamps/{name}" in group:
            ecg = numbers(group, f"data/{name}")
            times = numbers(group, f"timestamps/{name}")
            break
    else:
        raise UserError("no ECG with times in it")
    if len(ecg) != len(times):
        raise UserError(f"{len(ecg)} samples of the ECG, {len(times)} times of them")
    if not len(ecg):
        raise UserError("its ECG is empty")
    if not np.isfinite(times).all():
        raise UserError(f"{np.sum(~np.isfinite(times))} of the times of its ECG are NaN")
    known = np.isfinite(ecg)
    ecg = ecg[known]
    times = times[known]
    if len(ecg) < 2 or not np.ptp(ecg):
        raise UserError("its ECG is constant, no beats in it")
    steps = np.diff(times)
    if (steps < 0).any() or times[-1] <= times[0]:
        raise UserError("the times of its ECG do not rise")
    if steps.max() > ECG_PAUSE_S:
        raise UserError(f"its ECG pauses for {steps.max():.0f} s")
    return ecg, times


def resample_ecg(ecg, times):
    """Samples (N,) at `times` (N,) -> (M,) float32 at 250 Hz, the first at times[0].

    NaN inside gaps of more than GAP_S. Scaled so that the largest deflection is 1.
    """
    steps = np.diff(times)
    hz = 1 / steps[steps <= GAP_S].mean()
    if not 50 <= hz <= 1e5:
        raise UserError(f"its ECG has {hz:.3g} samples a second")
    # 1. Even times of its own rate: a few stamps that are off do no harm, gaps are bridged
    count = round((times[-1] - times[0]) * hz) + 1
    even = np.interp(times[0] + np.arange(count) / hz, times, ecg)
    even -= np.median(ecg)
    # 2. The rate of all ECGs here
    up, down = Fraction(ECG_HZ / hz).limit_denominator(10_000).as_integer_ratio()
    out = resample_poly(even, up, down, padtype="line") / np.abs(ecg - np.median(ecg)).max()
    # 3. Gaps that are too long to be bridged
    at = times[0] + np.arange(len(out)) / ECG_HZ
    for k in np.flatnonzero(steps > GAP_S):
        out[(at > times[k]) & (at < times[k + 1])] = np.nan
    return out.astype(np.float32)


def cover_cine(ecg, start, seconds):
    """An ECG (M,) from `start` s on -> one that covers the cine of so many seconds, and its begin.

    Where it was not recorded it is NaN; up to GAP_S its first or last sample goes on. UserError
    where more than half of the cine has no ECG.
    """
    before = max(math.ceil(start * ECG_HZ), 0)
    start = start - before / ECG_HZ
    needed = math.ceil((seconds - start) * ECG_HZ)
    after = max(needed - before - len(ecg), 0)
    first, last = ecg[[0, -1]]
    ecg = np.pad(ecg, (before, after), constant_values=np.nan)
    if before <= GAP_S * ECG_HZ:
        ecg[:before] = first
    if after <= GAP_S * ECG_HZ:
        ecg[len(ecg) - after:] = last
    at = start + np.arange(len(ecg)) / ECG_HZ
    known = np.isfinite(ecg[(at >= 0) & (at < seconds)]).mean()
    if known < 0.5:
        raise UserError(f"its ECG covers {100 * known:.0f} % of the cine")
    return ecg, start


def whole_triggers(triggers, seconds):
    """The triggers (n,) in s after frame 0 if they last as long as the cine, else [].

    A strain recording often keeps those of one heart cycle alone. As a list of R peaks they would
    say that the heart has no other beats; without a list, R peaks are found in the ECG.
    """
    if len(triggers) < 2:
        return []
    longest = 1.5 * np.diff(triggers).max()
    if triggers[0] > longest or triggers[-1] < seconds - longest:
        return []
    return [round(float(t), 4) for t in triggers]


# ---------------------------------------------------------------------------- one clip, and the set

def wanted_views(config):
    """The keys of VIEWS in --views, [] = all cines; UserError where it names another."""
    if not config.views:
        return []
    views = config.views.lower().split(",")
    if set(views) - set(VIEWS):
        raise UserError(f"--views={config.views}: a list of {', '.join(VIEWS)}")
    return views


def list_jobs(config):
    """{split: Jobs} of the cines of the catalogue. No exam is in two splits."""
    rows = read_catalogue(config.src)
    strains = strains_of_cines(config.src, rows)
    wanted = wanted_views(config)
    jobs = {"train": [], "val": [], "test": []}
    cines = [row for row in rows if is_cine(row)]
    for row in cines:
        name = f"{row['exam_id']}/{row['recording_id']}"
        job = Job(name, Path(config.src) / row["zarr_path"], strains[row["recording_id"]])
        if not wanted or view_of(job.strains) in wanted:
            jobs[draw_split(row["exam_id"], config)].append(job)
    kept = sum(map(len, jobs.values()))
    print(f"{len(rows)} recordings, {len(cines)} of them B-mode cines, {kept} to prepare")
    if not kept:
        raise UserError(f"--src={config.src}: no B-mode cine in it, or none of "
                        f"--views={config.views}")
    return jobs


def make_clip(job, config, masks=True):
    """A Job -> the clip as Writer.add takes it; UserError where the recording cannot be used."""
    try:
        return read_recording(job, config, masks)
    except UserError as error:
        text = str(error)
        raise UserError(text if str(job.path) in text else f"{job.path}: {text}") from None
    except Exception as error:
        # Of a damaged store zarr raises any kind of error
        raise UserError(f"{job.path}: not read: {one_line(error)}") from None


def open_frames(group, least):
    """The frames (T, depth, angle) of a recording, a Zarr array; UserError if they are no cine."""
    if FRAMES not in group:
        raise UserError(f"no {FRAMES} in it")
    frames = group[FRAMES]
    if frames.ndim != 3 or frames.dtype != np.uint8 or min(frames.shape[1:]) < 2:
        raise UserError(f"{FRAMES} is {frames.dtype} {frames.shape}, not uint8 (T, depth, angle)")
    if frames.shape[0] < least:
        raise UserError(f"{frames.shape[0]} frames, --least={least}")
    return frames


def read_recording(job, config, masks):
    """A Job -> the clip. UserError (most without the path) or any other error where it fails."""
    # 1. What is there, and where the square lies
    group = open_store(job.path)
    frames = open_frames(group, config.least)
    manifest = manifest_of(group)
    sector = read_geometry(job.strains, manifest)
    square = fit_square(sector, config.size)

    # 2. Times of the frames from the first one on, and even ones
    times = frame_times(group, find_sector(manifest), frames.shape[0])
    origin = times[0]
    times = times - origin
    at, fps = even_times(times, config.fps)
    seconds = len(at) / fps
    if len(at) < config.least:
        raise UserError(f"{len(at)} frames at --fps={config.fps:g}, --least={config.least}")

    # 3. The ECG on the same clock: before the picture, which takes longer
    samples, ecg_times = read_ecg_samples(group)
    ecg = resample_ecg(samples, ecg_times)
    ecg, start = cover_cine(ecg, ecg_times[0] - origin, seconds)

    # 4. The picture
    video = convert_frames(frames, sector, square, config.size)                 # T H W
    video = resample_frames(video, times, at)
    clip = dict(id=job.name, video=video[..., None], fps=round(fps, 5),
                ecg=ecg[:, None], ecg_offset_s=round(start, 5))

    # 5. What strain recordings say of it
    view = VIEWS.get(view_of(job.strains), "")
    clip |= dict(view=view, text=f"{view} view" if view else "")
    clip["r_peaks_s"] = whole_triggers(read_triggers(job.strains, group) - origin, seconds) or ""
    if masks:
        contour = read_contour(job.strains, origin)
        clip["mask"] = draw_masks(contour, at, np.median(np.diff(times)), square, config.size)
    return clip


def main():
    """Write the prepared set."""
    if not find_spec("zarr"):
        raise UserError("EchoXFlow's stores need the package zarr: pip install zarr")
    config = parse_flags(EchoxflowConfig)
    print(config)
    if min(config.size, config.least) < 1 or config.fps < 0:
        raise UserError("size and least are 1 or more, fps is 0 or more")
    wanted_views(config)
    print("The unit of the ECGs is not millivolts: each is scaled to a largest deflection of 1 mV.")
    print("The splits keep exams apart. An exam is not a patient: two exams of one patient can be "
          "in two splits.")
    jobs = list_jobs(config)
    # A set has masks of all its clips or of none
    strains = [strain for part in jobs.values() for job in part for strain in job.strains]
    masks = any(strain.is_lv for strain in strains)
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=config.fps or None,
                height=config.size, width=config.size, channels=1, leads=["II"], source="echoxflow",
                ecg_unit="unknown", licence="CC BY-NC-SA 4.0",
                command=" ".join(["sources.echoxflow", *sys.argv[1:]]))
    make = partial(make_clip, config=config, masks=masks)
    prepare(config.out, meta, jobs, make, config.workers)


if __name__ == "__main__":
    run_main(main)
