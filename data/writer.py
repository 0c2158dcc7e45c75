"""Write a prepared set (data/dataset.py has the format): used by every source, and by sample.py.

`prepare` makes clips in parallel and goes on after a crash. A set is never half there: it is
written under a temporary name and renamed when it is whole.
"""
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

from common.checkpoint import check_folder
from common.flags import UserError, refuse_torchrun
from data.dataset import ARRAYS, COLUMNS, ECG_HZ


class Writer:
    """Write a SPLIT folder clip by clip. It is FOLDER.part until close() renames it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.part = Path(f"{folder}.part")
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        self.files = {}         # of the arrays: {name: open file}
        self.shapes = {}        # what they hold so far: {name: [rows, ...]}
        self.rows = []          # of clips.csv

    def add(self, **clip):
        """Add a clip: add(video=(T, H, W, C) uint8, ecg=(N, L) mV, id="...", fps=25, ...).

        The arrays of ARRAYS, of which only the video is required; any other key is a column.
        """
        row = {}
        row["start"], row["frames"] = self.append("video", clip.pop("video"))
        ecg = clip.pop("ecg", None)
        if ecg is not None:
            row["ecg_start"], row["ecg_samples"] = self.append("ecg", ecg)
        for name in ("mask", "volume"):
            # They have a row for each frame, so the video's numbers hold for them too.
            array = clip.pop(name, None)
            if array is not None:
                self.append(name, array)
        for key, value in clip.items():
            # The reader takes each line of the table for a clip.
            if isinstance(value, str):
                value = " ".join(value.splitlines())
            row[key] = value
        self.rows.append(row)

    def append(self, name, array):
        """Append to NAME.npy; returns (first row, number of rows)."""
        array = np.ascontiguousarray(array, ARRAYS[name])
        if name not in self.files:
            self.files[name] = open(self.part / f"{name}.npy", "wb")
            self.shapes[name] = [0, *array.shape[1:]]
            self.write_header(name)
        start = self.shapes[name][0]
        self.shapes[name][0] += len(array)
        self.files[name].write(array.data)
        return start, len(array)

    def write_header(self, name):
        """Write the header of a .npy file, where the file stands.

        numpy leaves room in it for the first axis to grow. So it can be written over at the end.
        """
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(ARRAYS[name])),
            "fortran_order": False,
            "shape": tuple(self.shapes[name]),
        }
        np.lib.format.write_array_header_1_0(self.files[name], header)

    def close(self):
        """Finish the arrays, write the table, and give the folder its name."""
        for name, file in self.files.items():
            # only now is it known how many rows there are
            file.seek(0)
            self.write_header(name)
            file.close()
        with open(self.part / "clips.csv", "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, restval="")
            table.writeheader()
            table.writerows(self.rows)
        os.rename(self.part, self.folder)


def draw_split(who, config):
    """train, val or test for a patient or a file, by its name and the seed alone.

    So the split does not change when other files are added.
    """
    rng = np.random.default_rng((config.seed, zlib.crc32(who.encode())))
    share = rng.random()
    if share < config.val:
        return "val"
    if share < config.val + config.test:
        return "test"
    return "train"


# ---------------------------------------------------------------------------- prepare

def prepare(out, meta, jobs, make, workers=0, *, shard=2000):
    """Write the prepared set OUT: for every job of {split: jobs} the clip make(job), in parallel.

    make returns a clip as Writer.add takes it. If it raises UserError, the job is left out and
    listed in skipped.txt beside the clips. A split of more than `shard` clips becomes several
    folders; after a crash the same command goes on behind the last whole one.
    workers: number of processes, 0 = one a core.
    """
    refuse_torchrun()
    part = begin_set(Path(out), meta)
    folders = split_into_folders(jobs, shard)

    # Each worker is one thread: set before the workers start, because they inherit it.
    os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    bar = tqdm(total=sum(map(len, folders.values())), unit="clip")
    with get_context("spawn").Pool(workers or os.cpu_count()) as pool, bar:
        for name, todo in folders.items():
            if (part / name).exists():
                # whole already, written before a crash
                bar.update(len(todo))
                continue
            clips = pool.imap(partial(attempt, make), todo, chunksize=4)
            write_folder(part / name, clips, bar)
    finish_set(Path(out), part, folders)


def begin_set(out, meta):
    """Make the folder OUT.part with its meta.json, or take up the one that a crash has left."""
    part = Path(f"{out}.part")
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another --out")
    about = json.dumps(meta | {"ecg_hz": ECG_HZ}, indent=1) + "\n"
    path = part / "meta.json"
    check_folder(out)
    part.mkdir(parents=True, exist_ok=True)
    # meta.json holds the command: another one would mix two sets
    if path.exists() and path.read_text() != about:
        raise UserError(f"{part} was begun by another command; remove it or choose another --out")
    path.write_text(about)
    return part


def split_into_folders(jobs, shard):
    """{split: jobs} -> {folder name: jobs}, at most `shard` jobs a folder."""
    folders = {}
    for split, todo in jobs.items():
        for first in range(0, len(todo), shard):
            name = split
            if len(todo) > shard:
                name = f"{split}-{first // shard:05d}"
            folders[name] = todo[first:first + shard]
    return folders


def attempt(make, job):
    """make(job), or the UserError that says why there is no such clip."""
    try:
        return make(job)
    except UserError as error:
        # returned, not raised: one bad file must not end the work of all
        return error


def write_folder(folder, clips, bar):
    """Write the clips that `attempt` returns to a SPLIT folder; skipped.txt if some failed."""
    writer = Writer(folder)
    skipped = []
    for clip in clips:
        if isinstance(clip, UserError):
            skipped.append(str(clip))
        else:
            writer.add(**clip)
        bar.update()
    if skipped:
        (writer.part / "skipped.txt").write_text("\n".join(skipped) + "\n")
    writer.close()


def finish_set(out, part, folders):
    """Remove folders without a clip, rename OUT.part to OUT, and say what was left out."""
    skipped = []
    for path in sorted(part.glob("*/skipped.txt")):
        skipped += path.read_text().splitlines()
    for name in folders:
        if not (part / name / "video.npy").exists():
            # no clip: only the reasons stay; missing_ok, as a crash may have come between
            (part / name / "clips.csv").unlink(missing_ok=True)
            if not (part / name / "skipped.txt").exists():
                (part / name).rmdir()
    if not any(part.glob("*/video.npy")):
        shutil.rmtree(part)
        reason = skipped[0] if skipped else "no jobs"
        raise UserError(f"no clip could be made; the first reason: {reason}")
    os.rename(part, out)
    if skipped:
        print(f"{len(skipped)} left out, listed in {out}/SPLIT/skipped.txt; "
              f"the first: {skipped[0]}", file=sys.stderr)
