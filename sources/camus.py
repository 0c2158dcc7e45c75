"""CAMUS (Leclerc et al. 2019) as a prepared set, from its NIfTI release: half beats from ED to ES with masks.

    python -m sources.camus --src=CAMUS --out=datasets/camus        # pip install nibabel

--src holds, at any depth, patientXXXX/patientXXXX_4CH_half_sequence.nii.gz, the same with _gt, Info_4CH.cfg,
and 2CH likewise. Splits are the official ones where --src has subgroup_training.txt and its like, else drawn.
"""
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from common.flags import UserError, parse_flags, run_main
from data.ecg_files import refuse
from data.writer import draw_split, prepare


@dataclass
class CamusConfig:
    src: str = ""               # CAMUS's folder
    out: str = "datasets/camus"  # folder to write
    size: int = 112             # height and width in pixels
    views: str = "4CH,2CH"      # of the clips
    val: float = 0.1            # share of the patients in the val split, where no list says
    test: float = 0.1           # share in the test split
    seed: int = 0               # of the split
    workers: int = 0            # processes; 0: one a core


VIEWS = {"4CH": "A4C", "2CH": "A2C"}
LISTS = dict(train="subgroup_training.txt", val="subgroup_validation.txt", test="subgroup_testing.txt")
LV = 1              # label of the cavity


def read_info(path):
    """{key: number} of an Info_*.cfg."""
    found = re.findall(r"^\s*(\w+)\s*:\s*([-+.\d]+)\s*$", path.read_text(errors="replace"), re.M)
    return {key: float(value) for key, value in found}


def as_square(frames, spacing, size, resample):
    """frames (T, H, W) with `spacing` (mm of a row, of a column) -> (T, size, size), its true shape kept."""
    h, w = (n * step for n, step in zip(frames.shape[1:], spacing))
    h, w = (max(1, round(size * n / max(h, w))) for n in (h, w))
    out = np.zeros((len(frames), size, size), np.uint8)
    y, x = (size - h) // 2, (size - w) // 2
    for k, frame in enumerate(frames):
        out[k, y:y + h, x:x + w] = Image.fromarray(frame).resize((w, h), resample)
    return out


def make_clip(job, size):
    """(name, sequence file, view) -> the clip as Writer.add takes it."""
    import nibabel
    name, path, view = job
    truth, info = Path(str(path).replace(".nii", "_gt.nii")), path.parent / f"Info_{view}.cfg"
    for needed in (truth, info):
        refuse(not needed.exists(), needed, "no such file")
    about = read_info(info)
    for key in ("EF", "FrameRate"):
        refuse(key not in about, info, f"no number for {key}")
    ef, fps = about["EF"], about["FrameRate"]
    refuse(not (0 <= ef <= 100 and fps > 0), info, f"EF {ef:g}, FrameRate {fps:g} cannot be")
    arrays = []
    for file in (path, truth):
        try:
            image = nibabel.load(file)
            arrays.append(np.asarray(image.dataobj).T)                                      # T H W
        except Exception as error:      # nibabel and gzip raise many kinds
            raise UserError(f"{file}: not read as NIfTI: {' '.join(str(error).split())}") from None
    refuse(arrays[0].ndim != 3 or arrays[0].shape != arrays[1].shape, path,
           f"frames {arrays[0].shape}, masks {arrays[1].shape}")
    video, mask = arrays[0].clip(0, 255).astype(np.uint8), (arrays[1] == LV).astype(np.uint8)
    spacing = image.header.get_zooms()[1::-1]
    return dict(id=name, video=as_square(video, spacing, size, Image.Resampling.BOX)[..., None], fps=fps,
                mask=as_square(mask, spacing, size, Image.Resampling.NEAREST), view=VIEWS[view], ef=ef,
                text=f"{VIEWS[view]} view, EF {ef:.0f}")


def official_splits(src):
    """{patient: split} by the lists of the release, {} where they are not there."""
    return {name: split for split, file in LISTS.items() for path in src.rglob(file)
            for name in path.read_text().split()}


def main():
    if not find_spec("nibabel"):
        raise UserError("NIfTI needs the package nibabel: pip install nibabel")
    config = parse_flags(CamusConfig)
    print(config)
    src, views = Path(config.src), config.views.split(",")
    if not config.src or not src.is_dir():
        raise UserError(f"--src={config.src}: CAMUS's folder is needed")
    if config.size < 1 or set(views) - set(VIEWS):
        raise UserError(f"size is 1 or more, --views a list of {', '.join(VIEWS)}")
    jobs, official = {"train": [], "val": [], "test": []}, official_splits(src)
    for view in views:
        for path in sorted(src.rglob(f"*_{view}_half_sequence.nii*")):
            name = path.name.split(f"_{view}_")[0]
            jobs[official.get(name) or draw_split(name, config)].append((f"{name}_{view}", path, view))
    if not any(jobs.values()):
        raise UserError(f"--src={config.src}: no patientXXXX_4CH_half_sequence.nii.gz in it")
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=None, height=config.size,
                width=config.size, channels=1, leads=[], source="camus",
                command=" ".join(["sources.camus", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, size=config.size), config.workers)


if __name__ == "__main__":
    run_main(main)
