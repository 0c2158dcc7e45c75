"""Ultrasound cines in DICOM files as a prepared set, with the ECG of their waveform if asked for.

    python -m sources.dicom_cines --src=FOLDER --out=datasets/NAME --size=112 --seed=0
    # needs: pip install pydicom

Every file of several frames becomes a clip: the sector is cut out and scaled, and what lies outside
of it (text, bars, the trace of an ECG, a Doppler spectrum) is black. The times of the frames are the
header's. No patient is in two splits.
"""
import os
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import binary_closing, binary_opening, gaussian_filter, label
from scipy.spatial import Delaunay

from common.flags import UserError, parse_flags, run_main
from data.dataset import ECG_HZ
from data.ecg_files import read_ecg, refuse
from data.writer import draw_split, prepare


@dataclass
class DicomCinesConfig:
    """Flags of `python -m sources.dicom_cines`."""
    src: str = ""               # folder of DICOM files, searched with the folders in it
    out: str = "datasets/dicom"  # folder to write
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    least: int = 11             # a cine with fewer frames is left out
    leads: str = ""             # of the set, such as II: only files whose waveform has them; empty = no ECG
    val: float = 0.1            # share of the patients in the val split
    test: float = 0.1           # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


MOVES = 12          # grey levels, of 255, by which a pixel of the sector changes during a cine


def find_sector(video):
    """video (T, H, W) uint8 -> (H, W) bool, the convex hull of the largest region in which something
    moves; None where nothing does.

    Text and scales stand still. The trace of an ECG moves, but it is thin or lies apart.
    """
    moving = gaussian_filter(np.ptp(video, axis=0).astype(np.float32), 1) > MOVES
    # Closing fills holes in the sector, opening removes thin things
    closed = binary_closing(moving, iterations=3)
    regions, count = label(binary_opening(closed, iterations=3))        # H W, 0 = no region
    if not count:
        return None
    largest = np.bincount(regions.flat)[1:].argmax() + 1
    hull = Delaunay(np.argwhere(regions == largest))
    every_pixel = np.argwhere(np.ones_like(moving))                     # H * W, 2
    return (hull.find_simplex(every_pixel) >= 0).reshape(moving.shape)


def cut_square(video, sector, size):
    """The sector of video (T, H, W, C), in the middle of a black square: (T, size, size, C) uint8."""
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


def frame_rate(dataset):
    """Frames per second by the header, 0 where it does not say."""
    # FrameTimeVector has the time since the last frame of each, FrameTime one for all, in ms
    steps = np.atleast_1d(dataset.get("FrameTimeVector") or 0).astype(float)[1:]
    if len(steps):
        step = steps.mean()
    else:
        step = float(dataset.get("FrameTime") or 0)
    if step:
        return 1000 / step
    return float(dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate") or 0)


def read_cine(path, least):
    """A DICOM file -> its header, video (T, H, W, 1 or 3) uint8, grey video (T, H, W), sector (H, W)
    or None, frames per second. UserError where it is no cine."""
    import pydicom
    try:
        dataset = pydicom.dcmread(path)
        frames = int(dataset.get("NumberOfFrames") or 1)
        fps = frame_rate(dataset)
        refuse(frames < least, path, f"{frames} frames, --least={least}")
        refuse(not fps, path, "it does not say its frame time")
        video = pydicom.pixels.pixel_array(dataset)                     # T H W, or T H W 3 (RGB)
        refuse(video.dtype != np.uint8, path, f"its pixels are {video.dtype}, not 8 bits")
        if video.ndim < 4:
            video = video[..., None]
        grey = video.mean(-1).astype(np.uint8)                          # T H W
        return dataset, video, grey, find_sector(grey), fps
    except UserError:
        raise
    except Exception as error:
        # Of a damaged file pydicom raises any kind of error
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not read as DICOM: {reason}") from None


def read_waveform(path, dataset, leads, seconds):
    """The ECG (N, L) in mV of a DICOM file, and when it begins, in s after the first frame.

    UserError where it lacks one of the leads, or does not last all the `seconds` of the cine.
    """
    ecg, has = read_ecg(path)                                           # L N
    missing = set(leads) - set(has)
    refuse(missing, path, f"its ECG has {' '.join(has)}, not {' '.join(leads)}")
    start = float(dataset.WaveformSequence[0].get("MultiplexGroupTimeOffset") or 0) / 1000
    refuse(start > 0 or start + ecg.shape[1] / ECG_HZ < seconds, path,
           "its ECG does not last as long as the cine")
    return ecg[[has.index(lead) for lead in leads]].T, start            # N L


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
    dataset, video, grey, sector, fps = read_cine(path, config.least)
    refuse(sector is None, path, "nothing moves in it, no sector is found")
    if config.channels == 1:
        video = grey[..., None]                                         # T H W 1
    else:
        video = np.broadcast_to(video, (*video.shape[:3], 3))           # T H W 3
    clip = dict(id=name, video=cut_square(video, sector, config.size), fps=fps)
    if config.leads:
        leads = config.leads.split(",")
        ecg, start = read_waveform(path, dataset, leads, len(video) / fps)
        clip |= dict(ecg=ecg, ecg_offset_s=start)
    return clip


def main():
    """Write the prepared set."""
    if not find_spec("pydicom"):
        raise UserError("DICOM needs the package pydicom: pip install pydicom")
    config = parse_flags(DicomCinesConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least) < 1:
        raise UserError("channels is 1 or 3; size and least are 1 or more")
    jobs = list_jobs(config)
    leads = config.leads.split(",") if config.leads else []
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None,
                height=config.size, width=config.size, channels=config.channels, leads=leads,
                source="dicom_cines",
                command=" ".join(["sources.dicom_cines", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
