"""Your own data: a folder of videos, each with an ECG of the same stem, as a prepared set.

    python -m sources.video_ecg_folder --src=FOLDER --out=datasets/NAME
    python -m sources.video_ecg_folder --src=FOLDER --csv=labels.csv --ecg_hz=500 --ecg_leads=II --out=datasets/NAME

NAME.mp4 (or any other video) goes with NAME.csv (or .txt, .npy, .hea, .dcm: data/ecg_files.py). The csv, one
row a video, has name (the stem) and any of ecg_offset_s (when the ECG begins, seconds after the first frame),
ef, edv_ml, esv_ml, view, text, fps, patient, split. No patient is in two splits.
"""
import csv
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.flags import UserError, parse_flags, run_main
from data.dataset import ECG_HZ, LEADS
from data.ecg_files import READERS, read_ecg
from data.video_files import KINDS, read_video
from data.writer import draw_split, prepare


@dataclass
class PairedConfig:
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


NUMBERS = dict(ef=(0, 100), edv_ml=(1, 1000), esv_ml=(0, 1000), fps=(1, 500), ecg_offset_s=(-3600, 3600))


def labels(path):
    """{name: row} of the csv; UserError where it cannot be used."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"--csv={path}: {error.strerror}") from None
    if not rows or "name" not in rows[0]:
        raise UserError(f"--csv={path}: no column name, or no row")
    twice = [name for name, many in Counter(row["name"] for row in rows).items() if many > 1]
    if twice:
        raise UserError(f"--csv={path}: {twice[0]} is there twice")
    return {row["name"]: row for row in rows}


def pairs(src):
    """(name, video, ECG or None) of every video under the folder; a name is its path without the suffix."""
    src = Path(src)
    if not src.is_dir():
        raise UserError(f"--src={src}: a folder with videos and ECGs is needed")
    files = [path for path in sorted(src.rglob("*")) if path.is_file()]
    ecgs = {path.with_suffix(""): path for path in files if path.suffix.lower() in READERS}
    videos = [path for path in files if path.suffix.lower() in KINDS]
    found = [(str(path.relative_to(src).with_suffix("")), path, ecgs.get(path.with_suffix("")))
             for path in videos]
    names = Counter(name for name, *_ in found)
    twice = [name for name, many in names.items() if many > 1]
    if twice:
        raise UserError(f"--src={src}: two videos are called {twice[0]}")
    return found


def make_clip(job, size, channels, least, leads, ecg_hz, ecg_leads):
    """(name, video, ECG, row of the csv) -> the clip as Writer.add takes it."""
    name, path, ecg_path, row = job
    given = {key: row[key] for key in ("view", "text") if row.get(key)}
    for key, (low, high) in NUMBERS.items():
        if row.get(key):
            try:
                given[key] = float(row[key])
            except ValueError:
                raise UserError(f"{name}: {key} {row[key]!r} is no number") from None
            if not low <= given[key] <= high:
                raise UserError(f"{name}: {key} {given[key]:g} cannot be")
    if ecg_path is None:
        raise UserError(f"{path}: no ECG beside it ({' '.join(READERS)})")
    ecg, has = read_ecg(ecg_path, ecg_hz, ecg_leads.split(",") if ecg_leads else ())
    missing = [lead for lead in leads if lead not in has]
    if missing:
        raise UserError(f"{ecg_path}: no lead {' '.join(missing)}")
    video, fps = read_video(path, size, channels)
    fps, start = given.pop("fps", fps), given.pop("ecg_offset_s", 0.0)
    if len(video) < least:
        raise UserError(f"{path}: {len(video)} frames, --least={least}")
    end = start + ecg.shape[1] / ECG_HZ
    if start > 0 or end < len(video) / fps:
        raise UserError(f"{name}: the ECG lasts from {start:.2f} to {end:.2f} s, the video from 0 to "
                        f"{len(video) / fps:.2f} s")
    return dict(id=name, video=video, fps=fps, ecg=ecg[[has.index(lead) for lead in leads]].T,
                ecg_offset_s=start, **given)


def first_leads(found, config):
    """Leads of the first ECG that can be read."""
    reason = f"--src={config.src}: no video has an ECG beside it"
    for path in (ecg for *_, ecg in found if ecg):
        try:
            return read_ecg(path, config.ecg_hz, config.ecg_leads.split(",") if config.ecg_leads else ())[1]
        except UserError as error:
            reason = error
    raise UserError(f"no ECG can be read: {reason}")


def main():
    config = parse_flags(PairedConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least) < 1:
        raise UserError("channels is 1 or 3; size and least are 1 or more")
    found, rows = pairs(config.src), labels(config.csv) if config.csv else {}
    if not found:
        raise UserError(f"--src={config.src}: no video file in it ({' '.join(sorted(KINDS))})")
    leads = config.leads.split(",") if config.leads else first_leads(found, config)
    if set(leads) - set(LEADS):
        raise UserError(f"--leads={config.leads}: the leads are {' '.join(LEADS)}")
    jobs = {"train": [], "val": [], "test": []}
    for name, video, ecg in found:
        row = rows.pop(name, {})
        split = row.get("split") or draw_split(row.get("patient") or name, config)
        if split not in jobs:
            raise UserError(f"--csv={config.csv}: split {split!r} of {name}; it is train, val or test")
        jobs[split].append((name, video, ecg, row))
    if rows:
        print(f"--csv={config.csv}: {len(rows)} rows have no video, the first: {next(iter(rows))}",
              file=sys.stderr)
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None, height=config.size,
                width=config.size, channels=config.channels, leads=leads, source="video_ecg_folder",
                command=" ".join(["sources.video_ecg_folder", *sys.argv[1:]]))
    how = {key: getattr(config, key) for key in ("size", "channels", "least", "ecg_hz", "ecg_leads")}
    prepare(config.out, meta, jobs, partial(make_clip, leads=leads, **how), config.workers)


if __name__ == "__main__":
    run_main(main)
