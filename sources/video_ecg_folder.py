"""Your own data as a prepared set: a folder of videos, each with an ECG file of the same name.

    python -m sources.video_ecg_folder --src=FOLDER --out=datasets/NAME --size=112 --seed=0
    python -m sources.video_ecg_folder --src=FOLDER --csv=labels.csv --ecg_hz=500 --ecg_leads=II \\
        --out=datasets/NAME

NAME.mp4 (or any other kind of video) belongs to NAME.csv (or .txt, .npy, .hea, .dcm: see
data/ecg_files.py). The labels in --csv have one row a video: its name without the suffix, and any
of ecg_offset_s (when the ECG begins, in seconds after the first frame), ef, edv_ml, esv_ml, view,
text, fps, patient, split. No patient is in two splits.
"""
import csv
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.flags import UserError, parse_flags, run_main
from data.dataset import ECG_HZ, LEADS
from data.ecg_files import READERS, read_ecg
from data.video_files import VIDEO_KINDS, read_video
from data.writer import draw_split, prepare


@dataclass
class VideoEcgFolderConfig:
    """Flags of `python -m sources.video_ecg_folder`."""
    src: str = ""               # folder of the videos and ECGs, searched with the folders in it
    csv: str = ""               # csv of offsets and labels; empty = the ECGs begin with the videos
    out: str = "datasets/paired"  # folder to write
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    ecg_hz: float = 0           # sampling rate of ECG files that do not say
    ecg_leads: str = ""         # their leads, such as II or I,V2, where they do not say
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
    ecgs = {path.with_suffix(""): path for path in files if path.suffix.lower() in READERS}
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

    # 1. The leads of the set, out of those of the file
    if ecg_path is None:
        raise UserError(f"{path}: no ECG beside it ({' '.join(READERS)})")
    leads = config.leads.split(",")
    ecg, has = read_file_ecg(ecg_path, config)                          # L N
    missing = [lead for lead in leads if lead not in has]
    if missing:
        raise UserError(f"{ecg_path}: no lead {' '.join(missing)}")
    ecg = ecg[[has.index(lead) for lead in leads]].T                    # N L

    # 2. The video; a rate in the csv wins over the file's
    video, fps = read_video(path, config.size, config.channels)         # T H W C
    fps = labels.pop("fps", fps)
    if len(video) < config.least:
        raise UserError(f"{path}: {len(video)} frames, --least={config.least}")

    # 3. The ECG must cover the video
    start = labels.pop("ecg_offset_s", 0.0)
    end = start + len(ecg) / ECG_HZ
    seconds = len(video) / fps
    if start > 0 or end < seconds:
        raise UserError(f"{name}: the ECG lasts from {start:.2f} to {end:.2f} s, "
                        f"the video from 0 to {seconds:.2f} s")
    return dict(id=name, video=video, fps=fps, ecg=ecg, ecg_offset_s=start, **labels)


def main():
    """Write the prepared set."""
    config = parse_flags(VideoEcgFolderConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least) < 1:
        raise UserError("channels is 1 or 3; size and least are 1 or more")
    jobs = list_jobs(config)
    # make_clip reads the leads of the set from config
    if not config.leads:
        config = replace(config, leads=",".join(first_leads(config)))
    leads = config.leads.split(",")
    if set(leads) - set(LEADS):
        raise UserError(f"--leads={config.leads}: the leads are {' '.join(LEADS)}")
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None,
                height=config.size, width=config.size, channels=config.channels, leads=leads,
                source="video_ecg_folder",
                command=" ".join(["sources.video_ecg_folder", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
