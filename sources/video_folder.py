"""Any folder of video files as a prepared set; with WebVid's csv, with its captions.

    python -m sources.video_folder --src=FOLDER --out=datasets/NAME --size=128 --seed=0
    python -m sources.video_folder --src=FOLDER --csv=results_2M_train.csv --out=datasets/webvid \\
        --channels=1 --size=64
    python -m sources.video_folder --src=FOLDER --ecg=screen --channels=1 --out=datasets/NAME

Natural video trains the tokenizer before it sees an echo (ECHOPulse section 3.1). A video becomes
one clip: its first `frames` frames at `fps`, the middle square, scaled by ffmpeg.

With --ecg=screen the videos are recordings of an ultrasound machine's screen that shows an ECG. It is
read off the strip (data/screen_ecg.py); the picture is the sector alone, without the strip.
"""
import csv
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.flags import UserError, parse_flags, run_main
from data.dataset import LEADS
from data.ecg_files import refuse
from data.video_files import VIDEO_KINDS, read_video
from data.writer import draw_split, prepare
from sources.dicom_cines import cover_cine
from sources.video_ecg_folder import read_screen_video


@dataclass
class VideoFolderConfig:
    """Flags of `python -m sources.video_folder`."""
    src: str = ""               # folder of video files, searched with the folders in it
    csv: str = ""               # WebVid's csv (videoid, page_dir, name); empty = every video of the folder
    out: str = "datasets/webvid"  # folder to write
    ecg: str = "none"           # none, or screen: read the ECG off the strip in the picture
    leads: str = "II"           # the lead that the screen shows
    size: int = 128             # height and width in pixels
    channels: int = 3           # 1 = grey, 3 = colour
    fps: float = 8              # frames per second of the clips; 0 = the video's own
    frames: int = 64            # longest clip
    least: int = 11             # a video with fewer frames is left out
    val: float = 0.02           # share of the videos in the val split
    test: float = 0.02          # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


class Job(NamedTuple):
    """One video."""
    name: str       # its path in the folder
    path: Path
    text: str       # its caption, may be empty


def read_csv(path, src):
    """[(file, caption)] of WebVid's csv; UserError where it cannot be used."""
    found = []
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                video = src / row.get("page_dir", "") / f"{row['videoid']}.mp4"
                found.append((video, row["name"]))
        return found
    except OSError as error:
        reason = error.strerror
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no column {error}"
    raise UserError(f"--csv={path}: {reason}; WebVid's csv has videoid, page_dir, name")


def list_jobs(config):
    """{split: Jobs}: the rows of the csv, or all video files under the folder."""
    src = Path(config.src)
    if not config.src or not src.is_dir():
        raise UserError(f"--src={config.src}: a folder with video files is needed")
    if config.csv:
        found = read_csv(config.csv, src)
    else:
        files = sorted(src.rglob("*"))
        found = [(path, "") for path in files if path.suffix.lower() in VIDEO_KINDS]
    if not found:
        raise UserError(f"--src={config.src}: no video file in it ({' '.join(sorted(VIDEO_KINDS))})")
    # The split is drawn from the name: a video stays in its split when others are added
    jobs = {"train": [], "val": [], "test": []}
    for path, text in found:
        name = str(path.relative_to(src))
        jobs[draw_split(name, config)].append(Job(name, path, text))
    return jobs


def make_clip(job, config):
    """A Job -> the clip as Writer.add takes it; UserError where the video cannot be used."""
    name, path, text = job
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if config.ecg == "screen":
        clip = make_screen_clip(path, config)
    else:
        video, fps = read_video(path, config.size, config.channels, config.fps, config.frames)
        clip = dict(video=video, fps=fps)
    count = len(clip["video"])
    refuse(count < config.least, path, f"{count} frames, --least={config.least}")
    return dict(id=name, text=text, **clip)


def make_screen_clip(path, config):
    """video, fps, ecg and ecg_offset_s of a recording of a screen; UserError where no ECG is on it."""
    video, fps, screen = read_screen_video(path, config)                # T H W C
    refuse(isinstance(screen, UserError), path, screen)
    if config.fps:
        # The frame that the file shows at each time
        chosen = np.arange(int(len(video) * config.fps / fps)) * fps / config.fps
        video = video[np.floor(chosen + 1e-6).astype(int)]
        fps = config.fps
    video = video[:config.frames]
    ecg, start = cover_cine(path, screen, len(video) / fps)             # N 1
    return dict(video=video, fps=fps, ecg=ecg, ecg_offset_s=start)


def main():
    """Write the prepared set."""
    config = parse_flags(VideoFolderConfig)
    print(config)
    positive = config.size, config.frames, config.least
    if config.channels not in (1, 3) or min(positive) < 1 or config.fps < 0:
        raise UserError("channels is 1 or 3; size, frames and least are 1 or more, fps 0 or more")
    if config.ecg not in ("none", "screen") or config.leads not in LEADS:
        raise UserError(f"--ecg is none or screen; --leads is one of {' '.join(LEADS)}")
    leads = [config.leads] if config.ecg == "screen" else []
    jobs = list_jobs(config)
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=config.fps or None,
                height=config.size, width=config.size, channels=config.channels, leads=leads,
                source="video_folder",
                command=" ".join(["sources.video_folder", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
