"""Your own data as a prepared set: a folder of videos, each with an ECG file of the same name.

    python -m sources.video_ecg_folder --src=FOLDER --out=datasets/NAME --size=112 --seed=0
    python -m sources.video_ecg_folder --src=FOLDER --csv=labels.csv --ecg_hz=500 --ecg_leads=II \\
        --out=datasets/NAME
    python -m sources.video_ecg_folder --src=FOLDER --ecg=screen --out=datasets/NAME

NAME.mp4 (or any other kind of video) belongs to NAME.csv (or .txt, .npy, .hea, .dcm,
.xml ...: see data/ecg_files.py). The labels in --csv have one row a video: its name without the suffix, and any
of ecg_offset_s (when the ECG begins, in seconds after the first frame), ef, edv_ml, esv_ml, view,
text, fps, patient, split. No patient is in two splits.

With --ecg=screen the videos are recordings of an ultrasound machine's screen. Where no ECG file is
beside a video, its ECG is read off the strip that the machine drew (data/screen_ecg.py). The picture
is then the sector alone, and the rows of the strip are black: else a model could read the ECG off
the picture.
"""
import csv
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.flags import UserError, parse_flags, run_main
from data.dataset import ECG_HZ, LEADS
from data.ecg_files import READERS, read_ecg, refuse
from data.screen_ecg import erase_strip, read_screen_ecg
from data.video_files import VIDEO_KINDS, read_frames, read_video
from data.writer import draw_split, prepare
from sources.dicom_cines import cover_cine, cut_square, find_sector


@dataclass
class VideoEcgFolderConfig:
    """Flags of `python -m sources.video_ecg_folder`."""
    src: str = ""               # folder of the videos and ECGs, searched with the folders in it
    csv: str = ""               # csv of offsets and labels; empty = the ECGs begin with the videos
    out: str = "datasets/paired"  # folder to write
    ecg: str = "file"           # file: beside the video; screen: or else off the picture of the video
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    ecg_hz: float = 0           # sampling rate of ECG files that do not say
    ecg_leads: str = ""         # their leads, such as II or I,V2; they win over the names in the files
    leads: str = ""             # of the set, a clip without one is left out; empty = the first ECG's
    least: int = 11             # a video with fewer frames is left out
    val: float = 0.1            # share of the patients in the val split
    test: float = 0.1           # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


# Labels that are numbers, with the limits beyond which they cannot be true
NUMBERS = dict(ef=(0, 100), edv_ml=(1, 1000), esv_ml=(0, 1000), fps=(1, 500),
               ecg_offset_s=(-3600, 3600))


class Job(NamedTuple):
    """One pair of a video and an ECG."""
    name: str           # path in the folder without the suffix
    video: Path
    ecg: Path | None    # None where no ECG is beside the video
    row: dict           # of the csv, may be empty


def read_labels(path):
    """{name: row} of the csv; UserError where it cannot be used."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"--csv={path}: {error.strerror}") from None
    if not rows or "name" not in rows[0]:
        raise UserError(f"--csv={path}: no column name, or no row")
    counts = Counter(row["name"] for row in rows)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"--csv={path}: {name} is there twice")
    return {row["name"]: row for row in rows}


def find_pairs(src):
    """[(name, video, ECG or None)] of every video under the folder `src`."""
    src = Path(src)
    if not src.is_dir():
        raise UserError(f"--src={src}: a folder with videos and ECGs is needed")
    files = [path for path in sorted(src.rglob("*")) if path.is_file()]
    # Of several files of one name the kind that stands first in READERS counts.
    ecgs = {}
    for kind in READERS:
        for path in files:
            if path.suffix.lower() == kind:
                ecgs.setdefault(path.with_suffix(""), path)
    pairs = {}
    for video in files:
        if video.suffix.lower() not in VIDEO_KINDS:
            continue
        stem = video.with_suffix("")
        name = str(stem.relative_to(src))
        if name in pairs:
            raise UserError(f"--src={src}: two videos are called {name}")
        pairs[name] = name, video, ecgs.get(stem)
    return list(pairs.values())


def read_file_ecg(path, config):
    """The ECG (L, N) of a file, mV at 250 Hz, and its leads."""
    names = config.ecg_leads.split(",") if config.ecg_leads else ()
    return read_ecg(path, config.ecg_hz, names)


def first_leads(config):
    """Leads of the first ECG that can be read; UserError where none can."""
    if config.ecg == "screen":
        # Machines show lead II, if nothing else is chosen
        return (config.ecg_leads or "II").split(",")
    reason = f"--src={config.src}: no video has an ECG beside it"
    for _, _, ecg in find_pairs(config.src):
        if ecg is None:
            continue
        try:
            return read_file_ecg(ecg, config)[1]
        except UserError as error:
            reason = error
    raise UserError(f"no ECG can be read: {reason}")


def check_labels(name, row):
    """The labels of a row of the csv that are given, numbers as floats; UserError for a wrong one."""
    labels = {key: row[key] for key in ("view", "text") if row.get(key)}
    for key, (low, high) in NUMBERS.items():
        if not row.get(key):
            continue
        try:
            labels[key] = float(row[key])
        except ValueError:
            raise UserError(f"{name}: {key} {row[key]!r} is no number") from None
        if not low <= labels[key] <= high:
            raise UserError(f"{name}: {key} {labels[key]:g} cannot be")
    return labels


def list_jobs(config):
    """{split: Jobs} of every video in the folder, with its row of the csv."""
    pairs = find_pairs(config.src)
    rows = read_labels(config.csv) if config.csv else {}
    if not pairs:
        kinds = " ".join(sorted(VIDEO_KINDS))
        raise UserError(f"--src={config.src}: no video file in it ({kinds})")
    jobs = {"train": [], "val": [], "test": []}
    for name, video, ecg in pairs:
        row = rows.pop(name, {})
        # All videos of a patient are drawn into one split
        split = row.get("split") or draw_split(row.get("patient") or name, config)
        if split not in jobs:
            raise UserError(f"--csv={config.csv}: split {split!r} of {name}; "
                            "it is train, val or test")
        jobs[split].append(Job(name, video, ecg, row))
    if rows:
        print(f"--csv={config.csv}: {len(rows)} rows have no video, the first: {next(iter(rows))}",
              file=sys.stderr)
    return jobs


def make_clip(job, config):
    """A Job -> the clip as Writer.add takes it; UserError where the pair cannot be used.

    config.leads names the leads of the set.
    """
    name, path, ecg_path, row = job
    labels = check_labels(name, row)
    start = labels.pop("ecg_offset_s", 0.0)

    # 1. The video; a rate in the csv wins over the file's
    screen = None
    if config.ecg == "screen":
        video, fps, screen = read_screen_video(path, config, labels.pop("fps", 0))
    else:
        refuse(ecg_path is None, path, f"no ECG beside it ({' '.join(READERS)})")
        video, fps = read_video(path, config.size, config.channels)     # T H W C
        fps = labels.pop("fps", fps)
    refuse(len(video) < config.least, path, f"{len(video)} frames, --least={config.least}")
    seconds = len(video) / fps

    # 2. The ECG, with the leads of the set
    if ecg_path is None:
        refuse(isinstance(screen, UserError), path, screen)
        ecg, start = cover_cine(path, screen, seconds)                  # N 1
    else:
        ecg = read_set_leads(ecg_path, config)                          # N L

    # 3. It must cover the video
    end = start + len(ecg) / ECG_HZ
    if start > 0 or end < seconds:
        raise UserError(f"{name}: the ECG lasts from {start:.2f} to {end:.2f} s, "
                        f"the video from 0 to {seconds:.2f} s")
    return dict(id=name, video=video, fps=fps, ecg=ecg, ecg_offset_s=start, **labels)


def read_set_leads(path, config):
    """The leads of the set out of those of an ECG file: (N, L) mV at 250 Hz."""
    leads = config.leads.split(",")
    ecg, has = read_file_ecg(path, config)                              # L N
    missing = [lead for lead in leads if lead not in has]
    refuse(missing, path, f"no lead {' '.join(missing)}")
    return ecg[[has.index(lead) for lead in leads]].T


def read_screen_video(path, config, fps=0):
    """A recording of a screen -> the sector without the strip of the ECG (T, size, size, C), frames
    per second, and the ScreenECG, or the UserError that says why there is none.

    fps: wins over the file's, 0 = the file's.
    """
    frames, of_file = read_frames(path)                                 # T H W 3
    fps = fps or of_file
    try:
        screen = read_screen_ecg(frames, np.arange(len(frames)) / fps)
        frames = erase_strip(frames, screen.strip)
    except UserError as error:
        screen = error
    grey = frames.mean(-1).astype(np.uint8)                             # T H W
    sector = find_sector(grey)
    refuse(sector is None, path, "nothing moves in it, no sector is found")
    if config.channels == 1:
        frames = grey[..., None]
    return cut_square(frames, sector, config.size), fps, screen


def main():
    """Write the prepared set."""
    config = parse_flags(VideoEcgFolderConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least) < 1:
        raise UserError("channels is 1 or 3; size and least are 1 or more")
    if config.ecg not in ("file", "screen"):
        raise UserError(f"--ecg={config.ecg}: file or screen")
    jobs = list_jobs(config)
    # make_clip reads the leads of the set from config
    if not config.leads:
        config = replace(config, leads=",".join(first_leads(config)))
    leads = config.leads.split(",")
    if config.ecg == "screen" and len(leads) != 1:
        raise UserError(f"--leads={config.leads}: a screen shows one lead")
    if set(leads) - set(LEADS):
        raise UserError(f"--leads={config.leads}: the leads are {' '.join(LEADS)}")
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None,
                height=config.size, width=config.size, channels=config.channels, leads=leads,
                source="video_ecg_folder",
                command=" ".join(["sources.video_ecg_folder", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
