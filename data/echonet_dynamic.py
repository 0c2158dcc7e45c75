"""EchoNet-Dynamic (Ouyang et al. 2020) as a prepared set, from the layout in which Stanford gives it out.

    python -m data.echonet_dynamic --src=EchoNet-Dynamic --out=datasets/echonet --size=112

--src holds FileList.csv and Videos/*.avi. Splits are the official ones; EF and volumes are the experts'.
"""
import csv
import os
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.flags import UserError, parse_flags, run_main
from data.prepare import prepare
from data.webvid import read_video


@dataclass
class EchonetConfig:
    src: str = ""               # folder with FileList.csv and Videos/
    out: str = "datasets/echonet"  # folder to write
    size: int = 112             # height and width in pixels
    channels: int = 1           # 1 = grey, 3 = colour
    least: int = 11             # a video with fewer frames is left out
    seed: int = 0               # nothing is drawn: the splits are the official ones
    workers: int = 0            # processes; 0: one a core


COLUMNS = ("FileName", "EF", "ESV", "EDV", "FPS", "NumberOfFrames", "Split")


def file_list(src):
    """Rows of FileList.csv as dicts; UserError where it is missing or has another layout."""
    path = Path(src) / "FileList.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --src is EchoNet-Dynamic's folder") from None
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"{path}: no column {missing[0]}" if rows else f"{path}: no row in it")
    twice = [name for name, many in Counter(row["FileName"] for row in rows).items() if many > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]} is there twice")
    return rows


def make_clip(row, src, size, channels, least):
    """A row of FileList.csv -> the clip as Writer.add takes it."""
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
    if len(video) < max(least, stated):
        raise UserError(f"{path}: {len(video)} frames, FileList.csv says {stated}, --least={least}")
    return dict(id=name, video=video, fps=fps, view="A4C", ef=ef, esv_ml=esv, edv_ml=edv,
                text=f"A4C view, EF {ef:.0f}")


def main():
    config = parse_flags(EchonetConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.least) < 1:
        raise UserError("channels is 1 or 3; size and least are 1 or more")
    jobs = {"train": [], "val": [], "test": []}
    for row in file_list(config.src):
        split = row["Split"].strip().lower()
        if split not in jobs:
            raise UserError(f"FileList.csv: split {row['Split']!r} of {row['FileName']}; TRAIN, VAL or TEST")
        jobs[split].append(row)
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None, height=config.size,
                width=config.size, channels=config.channels, leads=[], source="echonet_dynamic",
                command=" ".join(["data.echonet_dynamic", *sys.argv[1:]]))
    how = {key: getattr(config, key) for key in ("src", "size", "channels", "least")}
    prepare(config.out, meta, jobs, partial(make_clip, **how), config.workers)


if __name__ == "__main__":
    run_main(main)
