"""Any folder of video files as a prepared set; with WebVid's csv, with its captions.

    python -m sources.video_folder --src=FOLDER --out=datasets/NAME                        # colour, 128x128, 8 fps
    python -m sources.video_folder --src=FOLDER --csv=results_2M_train.csv --out=datasets/webvid --channels=1 --size=64

A video becomes one clip: its first `frames` frames at `fps`, the middle square, scaled. ffmpeg does it, in a
process for each core. Natural video trains the tokenizer before it meets an echo (ECHOPulse section 3.1).
"""
import csv
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.flags import UserError, parse_flags, run_main
from data.video_files import KINDS, read_video
from data.writer import draw_split, prepare


@dataclass
class WebvidConfig:
    src: str = ""               # folder of video files, searched with the folders in it
    csv: str = ""               # WebVid's csv (videoid, page_dir, name); empty = every video of the folder
    out: str = "datasets/webvid"  # folder to write
    size: int = 128             # height and width in pixels
    channels: int = 3           # 1 = grey, 3 = colour
    fps: float = 8              # frames per second of the clips; 0 = the video's own
    frames: int = 64            # longest clip
    least: int = 11             # a video with fewer frames is left out
    val: float = 0.02           # share of the videos in the val split
    test: float = 0.02          # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


def listed(config):
    """(file, caption) of every video: of the csv's rows, or of all video files under the folder."""
    src = Path(config.src)
    if not config.src or not src.is_dir():
        raise UserError(f"--src={config.src}: a folder with video files is needed")
    if not config.csv:
        return [(path, "") for path in sorted(src.rglob("*")) if path.suffix.lower() in KINDS]
    try:
        with open(config.csv, newline="") as file:
            return [(src / row.get("page_dir", "") / f"{row['videoid']}.mp4", row["name"])
                    for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--csv={config.csv}: {getattr(error, 'strerror', None) or f'no column {error}'}; "
                        "WebVid's csv has videoid, page_dir, name") from None


def make_clip(job, size, channels, fps, frames, least):
    """(id, file, caption) -> the clip as Writer.add takes it."""
    name, path, text = job
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    video, fps = read_video(path, size, channels, fps, frames)
    if len(video) < least:
        raise UserError(f"{path}: {len(video)} frames, --least={least}")
    return dict(id=name, video=video, fps=fps, text=text)


def main():
    config = parse_flags(WebvidConfig)
    print(config)
    if config.channels not in (1, 3) or min(config.size, config.frames, config.least) < 1 or config.fps < 0:
        raise UserError("channels is 1 or 3; size, frames and least are 1 or more, fps 0 or more")
    jobs, src = {"train": [], "val": [], "test": []}, Path(config.src)
    for path, text in listed(config):
        name = str(path.relative_to(src))
        jobs[draw_split(name, config)].append((name, path, text))
    if not any(jobs.values()):
        raise UserError(f"--src={config.src}: no video file in it ({' '.join(sorted(KINDS))})")
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=config.fps or None, height=config.size,
                width=config.size, channels=config.channels, leads=[], source="video_folder",
                command=" ".join(["sources.video_folder", *sys.argv[1:]]))
    how = {key: getattr(config, key) for key in ("size", "channels", "fps", "frames", "least")}
    prepare(config.out, meta, jobs, partial(make_clip, **how), config.workers)


if __name__ == "__main__":
    run_main(main)
