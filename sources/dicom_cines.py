"""Ultrasound cines in DICOM files as a prepared set, with their ECG if asked for.

    python -m sources.dicom_cines --src=FOLDER --out=datasets/NAME --size=112 --seed=0
    python -m sources.dicom_cines --src=FOLDER --out=datasets/NAME --ecg=screen
    # needs: pip install pydicom

Every file of several frames becomes a clip: the sector is cut out and scaled, and what lies outside
of it (text, bars, the trace of an ECG, a Doppler spectrum) is black. No patient is in two splits.

The times of the frames are the header's. Where a step is off the median by more than a twentieth,
the frames are resampled to the file's mean rate, linearly in time.

--ecg=waveform takes the ECG that the file carries. --ecg=screen takes it too, or else the one that
the machine drew on the screen (data/screen_ecg.py). With either, the rows of the trace are black in
the pictures: else the model could read the ECG there. Where the ECG is not known it is NaN.
"""
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_closing, binary_opening, gaussian_filter, label
from scipy.spatial import ConvexHull

from common.flags import UserError, parse_flags, run_main
from data.dataset import ECG_HZ, LEADS
from data.dicom_pixels import ECG_TRACE, IMAGE_2D, read_cine, read_header
from data.ecg_files import read_ecg, refuse
from data.frame_times import even_times, resample_frames
from data.screen_ecg import erase_strip, read_screen_ecg
from data.writer import draw_split, prepare


@dataclass
class DicomCinesConfig:
    """Flags of `python -m sources.dicom_cines`."""
    src: str = ""               # folder of DICOM files, searched with the folders in it
    out: str = "datasets/dicom"  # folder to write
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    least: int = 11             # a cine with fewer frames is left out
    ecg: str = ""               # waveform, screen, none; empty = waveform with --leads, else none
    leads: str = ""             # of the set, such as II (if empty); of a screen: which one it is
    val: float = 0.1            # share of the patients in the val split
    test: float = 0.1           # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


MOVES = 12          # grey levels, of 255, by which a pixel of the sector changes during a cine
LEAST_SECTOR = 0.01  # share of the picture: what moves on less is a number or a trace, no sector


# ---------------------------------------------------------------------------- the picture

def find_sector(video, box=None):
    """video (T, H, W) uint8 -> (H, W) bool, the convex hull of the largest region in which
    something moves; None where nothing does.

    box: (x0, y0, x1, y1) in which it lies, if the file says so. Text and scales stand still. The
    trace of an ECG moves, but it is thin or lies apart.
    """
    change = np.ptp(video, axis=0).astype(np.float32)                   # H W
    if box is not None:
        x0, y0, x1, y1 = box
        inside = np.zeros(change.shape, bool)
        inside[y0:y1, x0:x1] = True
        change[~inside] = 0
    moving = gaussian_filter(change, 1) > MOVES
    # Closing fills holes in the sector, opening removes thin things
    closed = binary_closing(moving, iterations=3)
    regions, count = label(binary_opening(closed, iterations=3))        # H W, 0 = no region
    if not count:
        return None
    sizes = np.bincount(regions.flat)[1:]
    if sizes.max() < LEAST_SECTOR * moving.size:
        return None
    return convex_hull(regions == sizes.argmax() + 1)


def convex_hull(region):
    """region (H, W) bool -> (H, W) bool, the smallest convex region that holds it."""
    # 1. Its corners are among the first and the last pixels of the rows
    rows = np.flatnonzero(region.any(1))                                # N
    first = region[rows].argmax(1)
    last = region.shape[1] - 1 - region[rows, ::-1].argmax(1)
    ends = np.concatenate([np.stack([rows, first], 1), np.stack([rows, last], 1)])      # 2 N, 2
    corners = ends[ConvexHull(ends).vertices]

    # 2. Inside is what lies on the same side of every edge
    y, x = np.indices(region.shape)
    inside = np.ones_like(region)
    for (y0, x0), (y1, x1) in zip(corners, np.roll(corners, -1, axis=0)):
        inside &= (y1 - y0) * (x - x0) - (x1 - x0) * (y - y0) >= 0
    return inside


def image_box(regions):
    """The box (x0, y0, x1, y1) of the 2D images among a header's regions, None if it has none."""
    boxes = np.array([region.box for region in regions if region.space == IMAGE_2D])   # N 4
    if not len(boxes):
        return None
    return *boxes[:, :2].min(0), *boxes[:, 2:].max(0)


def cut_square(video, sector, size):
    """The sector of video (T, H, W, C), in the middle of a black square (T, size, size, C)."""
    rows = np.flatnonzero(sector.any(1))
    columns = np.flatnonzero(sector.any(0))
    cut = (video * sector[:, :, None])[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    T, h, w, C = cut.shape
    side = max(h, w)
    y = (side - h) // 2
    x = (side - w) // 2
    square = np.zeros((T, side, side, C), np.uint8)
    square[:, y:y + h, x:x + w] = cut
    frames = []
    for frame in square:
        # Pillow takes grey frames without a channel axis
        image = Image.fromarray(frame.squeeze()).resize((size, size), Image.Resampling.BOX)
        frames.append(np.asarray(image).reshape(size, size, C))
    return np.stack(frames)


# ---------------------------------------------------------------------------- the ECG

def find_ecg(cine, config):
    """The ECG of a Cine as {ecg, ecg_offset_s}, and the boxes of the screen in which it is drawn.

    UserError where there is no ECG as the flags ask for it.
    """
    leads = wanted_leads(config)
    seconds = len(cine.frames) / cine.fps
    strips = [region.box for region in cine.regions if region.data == ECG_TRACE]
    others = [region.box for region in cine.regions if region.space != IMAGE_2D]
    frames = cine.frames
    if frames.shape[-1] == 1:
        frames = frames[..., 0]
    reason = None
    try:
        # With a waveform too, because a trace on the screen must not stay there
        screen = read_screen_ecg(frames, cine.times, strips or others)
        strips = [*strips, screen.strip]
    except UserError as error:
        reason = error

    if config.ecg != "screen" or "WaveformSequence" in cine.header:
        ecg, start = read_waveform(cine.path, cine.header, leads, seconds)      # N L
    else:
        refuse(reason, cine.path, reason)
        ecg, start = cover_cine(cine.path, screen, seconds)             # N 1
    return dict(ecg=ecg, ecg_offset_s=start), strips


def cover_cine(path, screen, seconds):
    """A ScreenECG -> its ECG (N, 1), NaN at the ends so that it covers the cine, and its begin.

    UserError where less than half of the cine has its ECG.
    """
    before = max(math.ceil(screen.start_s * ECG_HZ), 0)
    start = screen.start_s - before / ECG_HZ
    needed = math.ceil((seconds - start) * ECG_HZ)
    after = max(needed - before - len(screen.ecg), 0)
    ecg = np.pad(screen.ecg, (before, after), constant_values=np.nan)
    at = start + np.arange(len(ecg)) / ECG_HZ
    known = np.isfinite(ecg[(at >= 0) & (at < seconds)]).mean()
    refuse(known < 0.5, path, f"the ECG on its screen covers {100 * known:.0f} % of the cine")
    return ecg[:, None], start


def read_waveform(path, header, leads, seconds):
    """The ECG (N, L) in mV of a DICOM file, and when it begins, in s after the first frame.

    UserError where it lacks one of the leads, or does not last all the `seconds` of the cine.
    """
    ecg, has = read_ecg(path)                                           # L N
    missing = set(leads) - set(has)
    refuse(missing, path, f"its ECG has {' '.join(has)}, not {' '.join(leads)}")
    start = float(header.WaveformSequence[0].get("MultiplexGroupTimeOffset") or 0) / 1000
    refuse(start > 0 or start + ecg.shape[1] / ECG_HZ < seconds, path,
           "its ECG does not last as long as the cine")
    return ecg[[has.index(lead) for lead in leads]].T, start            # N L


def wanted_leads(config):
    """The leads of the set, [] = it has no ECG; UserError where the flags contradict each other."""
    kind = config.ecg or ("waveform" if config.leads else "none")
    if kind not in ("waveform", "screen", "none"):
        raise UserError(f"--ecg={config.ecg}: waveform, screen or none")
    if kind == "none":
        return []
    leads = (config.leads or "II").split(",")
    if kind == "screen" and (len(leads) > 1 or leads[0] not in LEADS):
        raise UserError(f"--leads={config.leads}: a screen shows one lead, of {' '.join(LEADS)}")
    return leads


# ---------------------------------------------------------------------------- one clip, and the set

def clip_of(cine, config):
    """A Cine -> what Writer.add takes, without the id; UserError if it cannot be."""
    frames = cine.frames                                                # T H W C
    clip = {}
    if wanted_leads(config):
        clip, strips = find_ecg(cine, config)
        for strip in strips:
            frames = erase_strip(frames, strip)

    grey = np.stack([frame.mean(-1).astype(np.uint8) for frame in frames])  # T H W
    sector = find_sector(grey, image_box(cine.regions))
    refuse(sector is None, cine.path, "nothing moves in it, no sector is found")
    if config.channels == 1:
        frames = grey[..., None]                                        # T H W 1
    else:
        frames = np.broadcast_to(frames, (*frames.shape[:3], 3))        # T H W 3
    video = cut_square(frames, sector, config.size)
    at, _ = even_times(cine.times)
    return clip | dict(video=resample_frames(video, cine.times, at), fps=cine.fps)


def list_jobs(config):
    """{split: [(name, file)]} of every file in the folder. No patient is in two splits."""
    import pydicom
    src = Path(config.src)
    if not config.src or not src.is_dir():
        raise UserError(f"--src={config.src}: a folder with DICOM files is needed")
    jobs = {"train": [], "val": [], "test": []}
    for path in sorted(path for path in src.rglob("*") if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
            patient = str(header.PatientID)
        except Exception:
            # make_clip refuses what is no DICOM file, and says why
            patient = ""
        name = str(path.relative_to(src).with_suffix(""))
        jobs[draw_split(patient or name, config)].append((name, path))
    if not any(jobs.values()):
        raise UserError(f"--src={config.src}: no file in it")
    return jobs


def make_clip(job, config):
    """(name, file) -> the clip as Writer.add takes it; UserError where the file cannot be used."""
    name, path = job
    cine = read_cine(path, read_header(path, config.least))
    return dict(id=name) | clip_of(cine, config)


def check_flags(config):
    """UserError where pydicom is missing or a flag cannot be."""
    if not find_spec("pydicom"):
        raise UserError("DICOM needs the package pydicom: pip install pydicom")
    if config.channels not in (1, 3) or min(config.size, config.least) < 1:
        raise UserError("channels is 1 or 3; size and least are 1 or more")
    wanted_leads(config)


def write_set(source, config, jobs, make):
    """Write the prepared set of jobs (prepare in data/writer.py); source: the module's name."""
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None,
                height=config.size, width=config.size, channels=config.channels,
                leads=wanted_leads(config), source=source,
                command=" ".join([f"sources.{source}", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make, config=config), config.workers)


def main():
    """Write the prepared set."""
    config = parse_flags(DicomCinesConfig)
    print(config)
    check_flags(config)
    write_set("dicom_cines", config, list_jobs(config), make_clip)


if __name__ == "__main__":
    run_main(main)
