"""Write a prepared set (data/dataset.py has the format): in parallel, resumed after a crash, never half."""
import csv
import json
import os
import shutil
import sys
import zlib
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.flags import UserError
from data.dataset import ARRAYS, COLUMNS, ECG_HZ


class Writer:
    """Write a SPLIT folder clip by clip, as FOLDER.part, renamed by close() when it is whole.

    add(video=(T, H, W, C) uint8, ecg=(N, L) mV, id=..., fps=..., ecg_offset_s=..., ...): the arrays of ARRAYS
    (video required), any other key is a column of clips.csv.
    """

    def __init__(self, folder):
        self.folder, self.part = Path(folder), Path(f"{folder}.part")
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        self.files, self.shapes, self.rows = {}, {}, []

    def add(self, **clip):
        starts = {name: self.append(name, clip.pop(name)) for name in ARRAYS if clip.get(name) is not None}
        row = {"start": starts["video"][0], "frames": starts["video"][1]} | clip
        if "ecg" in starts:
            row |= {"ecg_start": starts["ecg"][0], "ecg_samples": starts["ecg"][1]}
        self.rows.append({key: " ".join(value.splitlines()) if isinstance(value, str) else value
                          for key, value in row.items()})       # a clip is one line

    def append(self, name, array):
        """Append to NAME.npy; returns (first row, number of rows)."""
        array = np.ascontiguousarray(array, ARRAYS[name])
        if name not in self.files:
            self.files[name] = open(self.part / f"{name}.npy", "wb")
            self.shapes[name] = [0, *array.shape[1:]]
            self.header(name)
        start = self.shapes[name][0]
        self.shapes[name][0] += len(array)
        self.files[name].write(array.data)
        return start, len(array)

    def header(self, name):
        """numpy leaves room in the header for the first axis to grow, so it can be rewritten at the end."""
        descr = np.lib.format.dtype_to_descr(np.dtype(ARRAYS[name]))
        np.lib.format.write_array_header_1_0(self.files[name], {"descr": descr, "fortran_order": False,
                                                                "shape": tuple(self.shapes[name])})

    def close(self):
        for name, file in self.files.items():
            file.seek(0)
            self.header(name)
            file.close()
        with open(self.part / "clips.csv", "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, restval="")
            table.writeheader()
            table.writerows(self.rows)
        os.rename(self.part, self.folder)


def draw_split(who, config):
    """train, val or test by the seed and a name, of a patient or a file, alone."""
    share = np.random.default_rng((config.seed, zlib.crc32(who.encode()))).random()
    return "val" if share < config.val else "test" if share < config.val + config.test else "train"


def attempt(make, job):
    """make(job), or the UserError that says why there is no such clip."""
    try:
        return make(job)
    except UserError as error:
        return error


def prepare(out, meta, jobs, make, workers=0, shard=2000):
    """Write the prepared set OUT: the clip make(job), as Writer.add takes it, of every job of {split: jobs}.

    Works in parallel with a progress bar, on OUT.part, renamed when whole. A split of more than `shard` clips
    becomes several folders; after a crash the same command goes on behind the last whole one. A job that
    raises UserError is left out and listed in skipped.txt beside the clips.
    """
    out, part, meta = Path(out), Path(f"{out}.part"), meta | {"ecg_hz": ECG_HZ}
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another --out")
    about = json.dumps(meta, indent=1) + "\n"
    part.mkdir(parents=True, exist_ok=True)
    if (part / "meta.json").exists() and (part / "meta.json").read_text() != about:
        raise UserError(f"{part} was begun by another command; remove it or choose another --out")
    (part / "meta.json").write_text(about)
    shards = {f"{split}-{k // shard:05d}" if len(todo) > shard else split: todo[k:k + shard]
              for split, todo in jobs.items() for k in range(0, len(todo), shard)}
    os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}     # for the workers
    bar = tqdm(total=sum(map(len, shards.values())), unit="clip")
    with get_context("spawn").Pool(workers or os.cpu_count()) as pool, bar:
        for name, todo in shards.items():
            if (part / name).exists():
                bar.update(len(todo))
                continue
            writer, skipped = Writer(part / name), []
            for clip in pool.imap(partial(attempt, make), todo, chunksize=4):
                skipped.append(str(clip)) if isinstance(clip, UserError) else writer.add(**clip)
                bar.update()
            if skipped:
                (writer.part / "skipped.txt").write_text("\n".join(skipped) + "\n")
            writer.close()
    skipped = [line for file in sorted(part.glob("*/skipped.txt")) for line in file.read_text().splitlines()]
    for name in [name for name in shards if not (part / name / "video.npy").exists()]:
        shutil.rmtree(part / name)          # a shard without a clip
    if not any(part.glob("*/video.npy")):
        shutil.rmtree(part)
        raise UserError(f"no clip could be made; the first reason: {skipped[0] if skipped else 'no jobs'}")
    os.rename(part, out)
    if skipped:
        print(f"{len(skipped)} left out, listed in {out}/SPLIT/skipped.txt; the first: {skipped[0]}",
              file=sys.stderr)
