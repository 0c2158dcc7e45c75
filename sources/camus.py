"""CAMUS (Leclerc et al. 2019) as a prepared set: half beats from ED to ES with masks, no ECG.

    python -m sources.camus --src=CAMUS --out=datasets/camus --size=112 --seed=0
    # needs: pip install nibabel

--src is the NIfTI release. It holds, at any depth, patientXXXX_4CH_half_sequence.nii.gz, the same
with _gt, Info_4CH.cfg beside them, and 2CH likewise. Splits are the official ones where --src has
subgroup_training.txt and the other two lists. Otherwise they are drawn.
"""
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.flags import UserError, parse_flags, run_main
from data.ecg_files import refuse
from data.writer import draw_split, prepare


@dataclass
class CamusConfig:
    """Flags of `python -m sources.camus`."""
    src: str = ""               # CAMUS's folder
    out: str = "datasets/camus"  # folder to write
    size: int = 112             # height and width in pixels
    views: str = "4CH,2CH"      # of the clips
    val: float = 0.1            # share of the patients in the val split, where no list says
    test: float = 0.1           # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


VIEWS = {"4CH": "A4C", "2CH": "A2C"}
LISTS = dict(train="subgroup_training.txt", val="subgroup_validation.txt",
             test="subgroup_testing.txt")
LV = 1              # label of the cavity


class Job(NamedTuple):
    """One sequence."""
    name: str
    path: Path      # of its frames
    view: str       # a key of VIEWS


def read_info(path):
    """EF in points and frames per second, from an Info_*.cfg of lines `key: number`."""
    pattern = r"^\s*(\w+)\s*:\s*([-+.\d]+)\s*$"
    found = dict(re.findall(pattern, path.read_text(errors="replace"), re.M))
    info = {key: float(value) for key, value in found.items()}
    for key in ("EF", "FrameRate"):
        refuse(key not in info, path, f"no number for {key}")
    ef = info["EF"]
    fps = info["FrameRate"]
    refuse(not (0 <= ef <= 100 and fps > 0), path, f"EF {ef:g}, FrameRate {fps:g} cannot be")
    return ef, fps


def read_nifti(path):
    """A NIfTI file -> array (T, H, W) and its spacing, mm of a row and of a column."""
    import nibabel
    try:
        image = nibabel.load(path)
        array = np.asarray(image.dataobj).T                             # T H W
    except Exception as error:
        # nibabel and gzip raise many kinds of error
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not read as NIfTI: {reason}") from None
    return array, image.header.get_zooms()[1::-1]


def as_square(frames, spacing, size, resample):
    """Frames (T, H, W) in the middle of a square, (T, size, size) uint8, true to their shape.

    spacing: mm of a row, of a column. They differ in CAMUS.
    """
    # Size in mm, then in pixels of the square
    h, w = (n * step for n, step in zip(frames.shape[1:], spacing))
    h, w = (max(1, round(size * n / max(h, w))) for n in (h, w))
    out = np.zeros((len(frames), size, size), np.uint8)
    y = (size - h) // 2
    x = (size - w) // 2
    for k, frame in enumerate(frames):
        out[k, y:y + h, x:x + w] = Image.fromarray(frame).resize((w, h), resample)
    return out


def official_splits(src):
    """{patient: split} by the lists of the release, {} where they are not there."""
    splits = {}
    for split, file in LISTS.items():
        for path in src.rglob(file):
            for patient in path.read_text().split():
                splits[patient] = split
    return splits


def list_jobs(config):
    """{split: Jobs} of every sequence in the folder. No patient is in two splits."""
    src = Path(config.src)
    if not config.src or not src.is_dir():
        raise UserError(f"--src={config.src}: CAMUS's folder is needed")
    official = official_splits(src)
    jobs = {"train": [], "val": [], "test": []}
    for view in config.views.split(","):
        for path in sorted(src.rglob(f"*_{view}_half_sequence.nii*")):
            patient = path.name.split(f"_{view}_")[0]
            split = official.get(patient) or draw_split(patient, config)
            jobs[split].append(Job(f"{patient}_{view}", path, view))
    if not any(jobs.values()):
        raise UserError(f"--src={config.src}: no patientXXXX_4CH_half_sequence.nii.gz in it")
    return jobs


def make_clip(job, config):
    """A Job -> the clip as Writer.add takes it; UserError where a file cannot be used."""
    name, path, view = job
    truth = Path(str(path).replace(".nii", "_gt.nii"))
    info = path.parent / f"Info_{view}.cfg"
    for needed in (truth, info):
        refuse(not needed.exists(), needed, "no such file")
    ef, fps = read_info(info)
    frames, _ = read_nifti(path)                                        # T H W
    labels, spacing = read_nifti(truth)                                 # T H W
    refuse(frames.ndim != 3 or frames.shape != labels.shape, path,
           f"frames {frames.shape}, masks {labels.shape}")
    # A mask has no values between 0 and 1, so it takes the nearest pixel and no mean
    video = frames.clip(0, 255).astype(np.uint8)
    video = as_square(video, spacing, config.size, Image.Resampling.BOX)[..., None]     # T H W 1
    mask = (labels == LV).astype(np.uint8)
    mask = as_square(mask, spacing, config.size, Image.Resampling.NEAREST)              # T H W
    return dict(id=name, video=video, mask=mask, fps=fps, view=VIEWS[view], ef=ef,
                text=f"{VIEWS[view]} view, EF {ef:.0f}")


def main():
    """Write the prepared set."""
    if not find_spec("nibabel"):
        raise UserError("NIfTI needs the package nibabel: pip install nibabel")
    config = parse_flags(CamusConfig)
    print(config)
    if config.size < 1 or set(config.views.split(",")) - set(VIEWS):
        raise UserError(f"size is 1 or more, --views a list of {', '.join(VIEWS)}")
    jobs = list_jobs(config)
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None,
                height=config.size, width=config.size, channels=1, leads=[], source="camus",
                command=" ".join(["sources.camus", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
