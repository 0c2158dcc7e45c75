"""The prepared data set: one folder format for every source, its writer and its memory-mapped reader.

    datasets/NAME/meta.json          name, fps, height, width, channels, leads, ecg_hz, source, command
    datasets/NAME/SPLIT/clips.csv    one row a clip (COLUMNS below; unknown = empty)
    datasets/NAME/SPLIT/video.npy    uint8 (sum of frames, H, W, C)
    datasets/NAME/SPLIT/ecg.npy      float32 (sum of samples, L), mV at 250 Hz; optional
    datasets/NAME/SPLIT/mask.npy     uint8 (sum of frames, H, W), 1 = left-ventricular cavity; optional
    datasets/NAME/SPLIT/volume.npy   float32 (sum of frames,), true LV volume in ml; optional

Frame k shows t = k / fps seconds, ECG sample j shows t = ecg_offset_s + j / 250. Every random draw of a
training is a function of (seed, item number): the same for any number of processes, resumed without state.

The command-line flags that all scripts share are parsed here too, from the comments of a dataclass.
"""
import csv
import inspect
import json
import math
import os
import re
import shutil
import sys
from dataclasses import fields
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

ECG_HZ = 250
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
COLUMNS = ("id", "start", "frames", "fps", "ecg_start", "ecg_samples", "ecg_offset_s", "view", "ef", "edv_ml",
           "esv_ml", "text", "r_peaks_s")
INTEGERS = ("start", "frames", "ecg_start", "ecg_samples")
REALS = ("fps", "ecg_offset_s", "ef", "edv_ml", "esv_ml")


# ---------------------------------------------------------------------------- flags and one-line errors

class UserError(Exception):
    """What the user can mend: shown as one line on stderr, exit code 2."""


def run_main(main):
    """Call main(); a UserError becomes its one line and exit code 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def field_comments(config):
    """{field name: the comment on its line}, read from the source of a dataclass and those it extends."""
    comments = {}
    for cls in reversed(config.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(cls), re.M))
    return comments


def parse_value(key, text, kind):
    """The text of --key=text as an int, float, bool or str."""
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        name = {int: "a whole number", float: "a number", bool: "0 or 1"}[kind]
        raise UserError(f"--{key}={text}: expected {name}") from None


def parse_flags(config, presets=None, argv=None):
    """Fill the dataclass `config` from --key=value flags; --help lists its fields with their comments.

    presets: {name: {field: value}}, taken by --preset=NAME before all other flags.
    Raises UserError for an unknown key or a value of the wrong kind.
    """
    argv = sys.argv[1:] if argv is None else argv
    kinds, given = get_type_hints(config), {}
    if "--help" in argv or "-h" in argv:
        print(sys.modules[config.__module__].__doc__, "\nflags:")
        if presets:
            print(f"  --preset={'|'.join(presets)}")
        comments = field_comments(config)
        for f in fields(config):
            print(f"  --{f.name}={f.default:<24}  {comments.get(f.name, '')}" if isinstance(f.default, str)
                  else f"  --{f.name}={f.default!s:<24}  {comments.get(f.name, '')}")
        sys.exit(0)
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        known = key in kinds or (presets and key == "preset")
        if not (arg.startswith("--") and known):
            raise UserError(f"unknown argument {arg!r} (flags are --key=value; --help lists them)")
        if not equals and kinds.get(key) is not bool:
            raise UserError(f"{arg} needs a value: --{key}=...")
        given[key] = text if equals else "1"
    preset = given.pop("preset", None)
    if preset is not None and preset not in presets:
        raise UserError(f"--preset={preset}: choose one of {', '.join(presets)}")
    settings = dict(presets[preset]) if preset else {}
    return config(**settings | {key: parse_value(key, text, kinds[key]) for key, text in given.items()})


# ---------------------------------------------------------------------------- writing

ARRAYS = {"video": np.uint8, "ecg": np.float32, "mask": np.uint8, "volume": np.float32}


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
        self.rows.append(row)

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


# ---------------------------------------------------------------------------- reading

class Shard:
    """One SPLIT folder: the columns of clips.csv as lists, its arrays memory-mapped."""

    def __init__(self, folder, meta):
        self.folder, self.meta = folder, meta
        self.columns = self.read_table(folder / "clips.csv")
        self.arrays = {name: self.open(name) for name in ARRAYS if (folder / f"{name}.npy").exists()}
        if "video" not in self.arrays:
            raise UserError(f"{folder}/video.npy is missing: the set is not whole, write it again")

    def read_table(self, path):
        with open(path, newline="") as file:
            rows = csv.reader(file)
            names = next(rows, [])
            missing = [c for c in COLUMNS[:-1] if c not in names]
            if missing:
                raise UserError(f"{path}: column {missing[0]!r} is missing")
            columns = dict(zip(names, map(list, zip(*rows, strict=False)))) or {name: [] for name in names}
        if not columns["id"]:
            raise UserError(f"{path}: no clips in it")
        try:
            for name in INTEGERS:
                columns[name] = [int(x) if x else 0 for x in columns[name]]
            for name in REALS:
                columns[name] = [float(x) if x else math.nan for x in columns[name]]
        except ValueError as error:
            raise UserError(f"{path}: column {name!r}: {error}") from None
        return columns

    def open(self, name):
        path, columns = self.folder / f"{name}.npy", self.columns
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: damaged ({error}); write the set again") from None
        start, length = ("ecg_start", "ecg_samples") if name == "ecg" else ("start", "frames")
        end = max(s + n for s, n in zip(columns[start], columns[length]))
        if end > len(array) or array.dtype != ARRAYS[name]:
            raise UserError(f"{path}: {array.dtype} {array.shape}, but clips.csv asks for {end} rows of "
                            f"{np.dtype(ARRAYS[name])}; the set is damaged, write it again")
        return array


class Clips:
    """A split of a prepared set, its shards taken as one; only the clip asked for is read from disk.

    clips[i] is {column: value}; video, mask, volume and ecg return arrays (ecg as (L, N) in mV).
    """

    def __init__(self, folder, split):
        folder = Path(folder)
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}/meta.json: {getattr(error, 'strerror', None) or 'damaged'}; --data is"
                            " a folder made by a data module, such as python -m data.phantom") from None
        found = [f for f in sorted(folder.glob(f"{split}*")) if re.fullmatch(rf"{split}(-\d+)?", f.name)]
        self.shards = [Shard(f, self.meta) for f in found if (f / "clips.csv").exists()]
        if not self.shards:
            raise UserError(f"{folder}: no split {split!r} in it")
        self.ends = np.cumsum([len(s.columns["id"]) for s in self.shards])
        self.leads = self.meta.get("leads", [])

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, i):
        k = int(np.searchsorted(self.ends, i, side="right"))
        return self.shards[k], int(i - (self.ends[k - 1] if k else 0))

    def __getitem__(self, i):
        shard, j = self.locate(i)
        return {name: column[j] for name, column in shard.columns.items()}

    def per_frame(self, name, i, start=0, frames=None):
        """Frames start .. start + frames of clip i from video, mask or volume."""
        shard, j = self.locate(i)
        if name not in shard.arrays:
            raise UserError(f"{shard.folder}: the set has no {name}.npy")
        first, length = shard.columns["start"][j] + start, shard.columns["frames"][j] - start
        return np.array(shard.arrays[name][first:first + (length if frames is None else min(frames, length))])

    def ecg(self, i, leads=None):
        """ECG of clip i: (L, N) float32 in mV; leads: indices into this set's leads, all by default."""
        shard, j = self.locate(i)
        if "ecg" not in shard.arrays:
            raise UserError(f"{shard.folder}: the set has no ecg.npy")
        first, length = shard.columns["ecg_start"][j], shard.columns["ecg_samples"][j]
        ecg = np.array(shard.arrays["ecg"][first:first + length]).T
        return ecg if leads is None else ecg[leads]


def cut_ecg(ecg, first, samples):
    """Samples first .. first + samples of (..., N), zero (the baseline) where the recording has none."""
    out = np.zeros((*ecg.shape[:-1], samples), np.float32)
    lo, hi = max(first, 0), min(first + samples, ecg.shape[-1])
    if hi > lo:
        out[..., lo - first:hi - first] = ecg[..., lo:hi]
    return out


def as_video(frames, channels=0):
    """(T, H, W, C) uint8 -> (C, T, H, W) in [0, 1]; channels: grey repeated to 3, colour averaged to 1."""
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255
    return video if channels in (0, len(video)) else video.mean(0, keepdim=True).expand(channels, -1, -1, -1)


def vary_video(video, rng):
    """A window (T, H, W, C) uint8 moved by up to 8 pixels (round the edges), its contrast changed by up to a
    fifth, flipped half of the times: few clips then teach a tokenizer more."""
    video = np.roll(video, rng.integers(-8, 9, 2), axis=(1, 2))[:, :, ::rng.choice([1, -1])]
    return (video * rng.uniform(0.8, 1.2)).clip(0, 255).astype(np.uint8)


class RandomWindows(Dataset):
    """Random windows of T frames, each with the ECG of its own time span and what lies around it.

    Item n: video (C, T, H, W) float in [0, 1], C as asked for (`channels`) or as the set has it; fps; clip
    index; noise (K,) uniform numbers for the training's draws; with samples > 0 also ecg (L, samples)
    cleaned, centred on the window; leads (L,) indices into LEADS; ecg_start, seconds of ecg sample 0 after
    the window's first frame. Items of one `group` (a step's batch over all processes) share leads: half of
    the groups see one lead, a quarter 2 or 3, the rest all.
    vary(ecg, rng) alters a cleaned ECG, vary_video(video, rng) the frames (T, H, W, C) uint8.
    """

    def __init__(self, clips, frames, samples=0, clean=None, group=1, seed=0, noise=0, vary=None, channels=0,
                 vary_video=None):
        self.clips, self.frames, self.samples, self.clean, self.vary = clips, frames, samples, clean, vary
        self.group, self.seed, self.noise = group, seed, noise
        self.channels, self.vary_video = channels, vary_video
        shortest = min(min(s.columns["frames"]) for s in clips.shards)
        if shortest < frames:
            raise UserError(f"a clip of the set has {shortest} frames, fewer than the {frames} of one window")

    def choose_leads(self, n):
        """Indices into the set's leads, the same for all items of a group."""
        rng, total = np.random.default_rng((self.seed, n // self.group, 1)), len(self.clips.leads)
        many = rng.choice([1, int(rng.integers(2, 4)), total], p=[0.5, 0.25, 0.25])
        return np.sort(rng.permutation(total)[:many])

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, n))
        i = int(rng.integers(len(self.clips)))
        row = self.clips[i]
        start = int(rng.integers(row["frames"] - self.frames + 1))
        video = self.clips.per_frame("video", i, start, self.frames)               # T H W C
        noise = torch.from_numpy(rng.random(self.noise, np.float32))
        video = self.vary_video(video, rng) if self.vary_video else video
        item = {"video": as_video(video, self.channels), "clip": i, "fps": row["fps"], "noise": noise}
        if self.samples:
            leads = self.choose_leads(n)
            ecg = self.clean(self.clips.ecg(i, leads))
            ecg = self.vary(ecg, rng) if self.vary else ecg
            middle = (start + self.frames / 2) / row["fps"] - row["ecg_offset_s"]
            first = round(middle * ECG_HZ) - self.samples // 2
            item |= {"ecg": torch.from_numpy(cut_ecg(ecg, first, self.samples)),
                     "leads": torch.tensor([LEADS.index(self.clips.leads[k]) for k in leads]),
                     "ecg_start": row["ecg_offset_s"] + first / ECG_HZ - start / row["fps"]}
        return item


def batches(dataset, batch, step=0, rank=0, world=1, workers=0):
    """Endless batches from `step` on; batch s of this rank holds the items (s * world + rank) * batch + j."""
    numbers = (range((s * world + rank) * batch, (s * world + rank + 1) * batch) for s in count(step))
    return iter(DataLoader(dataset, batch_sampler=numbers, num_workers=workers,
                           pin_memory=torch.cuda.is_available()))
