"""Ultrasound cines in DICOM files as a prepared set.

    python -m sources.dicom_cines --src=FOLDER --out=datasets/NAME        # pip install pydicom

Every file of several frames becomes a clip: the sector is cut out and scaled, and what lies outside it (text,
bars, the trace of an ECG, a Doppler spectrum) is black. Frame times are the header's; no patient is in two
splits.
"""
import os
import sys
from dataclasses import dataclass
from functools import partial
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
class DicomConfig:
    src: str = ""               # folder of DICOM files, searched with the folders in it
    out: str = "datasets/dicom"  # folder to write
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    least: int = 11             # a cine with fewer frames is left out
    leads: str = ""             # with an ECG: take the files whose waveform has these leads, such as II
    val: float = 0.1            # share of the patients in the val split
    test: float = 0.1           # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


MOVES = 12          # grey levels, of 255, by which a pixel of the sector changes during a cine


def find_sector(video):
    """video (T, H, W) uint8 -> (H, W) bool, the convex hull of the largest region in which something moves;
    None where nothing does.

    Text and scales stand still; the trace of an ECG moves, but is thin or lies apart.
    """
    moving = gaussian_filter(np.ptp(video, axis=0).astype(np.float32), 1) > MOVES
    parts, many = label(binary_opening(binary_closing(moving, iterations=3), iterations=3))
    if not many:
        return None
    at = np.argwhere(parts == np.bincount(parts.flat)[1:].argmax() + 1)
    return (Delaunay(at).find_simplex(np.argwhere(np.ones_like(moving))) >= 0).reshape(moving.shape)


def cut_square(video, sector, size):
    """The sector of video (T, H, W, C), in the middle of a black square: (T, size, size, C) uint8."""
    rows, columns = (np.flatnonzero(sector.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    cut = (video * sector[:, :, None])[:, *box]                                             # T h w C
    T, h, w, C = cut.shape
    y, x = (max(h, w) - h) // 2, (max(h, w) - w) // 2
    whole = np.zeros((T, max(h, w), max(h, w), C), np.uint8)
    whole[:, y:y + h, x:x + w] = cut
    frames = [Image.fromarray(frame.squeeze()).resize((size, size), Image.Resampling.BOX) for frame in whole]
    return np.stack([np.asarray(frame).reshape(size, size, C) for frame in frames])


def frame_rate(dataset):
    """Frames per second by the header, 0 where it does not say."""
    vector = np.atleast_1d(dataset.get("FrameTimeVector") or 0).astype(float)[1:]           # milliseconds
    if step := vector.mean() if len(vector) else float(dataset.get("FrameTime") or 0):
        return 1000 / step
    return float(dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate") or 0)


def make_clip(job, size, channels, least, leads):
    """(name, file) -> the clip as Writer.add takes it."""
    import pydicom
    name, path = job
    try:
        dataset = pydicom.dcmread(path)
        many, fps = int(dataset.get("NumberOfFrames") or 1), frame_rate(dataset)
        refuse(many < least, path, f"{many} frames, --least={least}")
        refuse(not fps, path, "it does not say its frame time")
        video = pydicom.pixels.pixel_array(dataset)                                         # T H W (3), RGB
        refuse(video.dtype != np.uint8, path, f"its pixels are {video.dtype}, not 8 bits")
        video = video if video.ndim == 4 else video[..., None]
        grey = video.mean(-1).astype(np.uint8)
        sector = find_sector(grey)
    except UserError:
        raise
    except Exception as error:      # of a damaged file pydicom raises anything
        raise UserError(f"{path}: not read as DICOM: {' '.join(str(error).split())}") from None
    refuse(sector is None, path, "nothing moves in it, no sector is found")
    video = grey[..., None] if channels == 1 else np.broadcast_to(video, (*video.shape[:3], 3))
    clip = dict(id=name, video=cut_square(video, sector, size), fps=fps)
    if leads:
        ecg, has = read_ecg(path)
        refuse(set(leads) - set(has), path, f"its ECG has {' '.join(has)}, not {' '.join(leads)}")
        start = float(dataset.WaveformSequence[0].get("MultiplexGroupTimeOffset") or 0) / 1000
        refuse(start > 0 or start + ecg.shape[1] / ECG_HZ < len(video) / fps, path,
               "its ECG does not last as long as the cine")
        clip |= dict(ecg=ecg[[has.index(lead) for lead in leads]].T, ecg_offset_s=start)
    return clip


def main():
    try:
        import pydicom
    except ImportError:
        raise UserError("DICOM needs the package pydicom: pip install pydicom") from None
    config = parse_flags(DicomConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least) < 1:
        raise UserError("channels is 1 or 3; size and least are 1 or more")
    jobs, src = {"train": [], "val": [], "test": []}, Path(config.src)
    if not config.src or not src.is_dir():
        raise UserError(f"--src={config.src}: a folder with DICOM files is needed")
    for path in sorted(path for path in src.rglob("*") if path.is_file()):
        try:
            who = str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).PatientID)
        except Exception:           # what is no DICOM file is listed with the reason later
            who = ""
        name = str(path.relative_to(src).with_suffix(""))
        jobs[draw_split(who or name, config)].append((name, path))
    if not any(jobs.values()):
        raise UserError(f"--src={config.src}: no file in it")
    leads = config.leads.split(",") if config.leads else []
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None, height=config.size,
                width=config.size, channels=config.channels, leads=leads, source="dicom_cines",
                command=" ".join(["sources.dicom_cines", *sys.argv[1:]]))
    how = {key: getattr(config, key) for key in ("size", "channels", "least")}
    prepare(config.out, meta, jobs, partial(make_clip, leads=leads, **how), config.workers)


if __name__ == "__main__":
    run_main(main)
