"""The prepared data set: one folder format for every source, its writer and its memory-mapped reader.

    datasets/NAME/meta.json          name, fps, height, width, channels, leads, ecg_hz, source, command
    datasets/NAME/SPLIT/clips.csv    one row a clip (COLUMNS below; unknown = empty)
    datasets/NAME/SPLIT/video.npy    uint8 (sum of frames, H, W, C)
    datasets/NAME/SPLIT/ecg.npy      float32 (sum of samples, L), mV at 250 Hz; optional
    datasets/NAME/SPLIT/mask.npy     uint8 (sum of frames, H, W), 1 = left-ventricular cavity; a frame that
                                     nobody traced is all 255; optional
    datasets/NAME/SPLIT/volume.npy   float32 (sum of frames,), true LV volume in ml; optional

Frame k shows t = k / fps seconds, ECG sample j shows t = ecg_offset_s + j / 250. Every random draw of a
training is a function of (seed, item number): the same for any number of processes, resumed without state.
"""
import csv
import json
import mmap
import re
from itertools import count, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common.flags import UserError

ECG_HZ = 250
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
COLUMNS = ("id", "start", "frames", "fps", "ecg_start", "ecg_samples", "ecg_offset_s", "view", "ef", "edv_ml",
           "esv_ml", "text", "r_peaks_s")
INTEGERS = ("start", "frames", "ecg_start", "ecg_samples")
REALS = ("fps", "ecg_offset_s", "ef", "edv_ml", "esv_ml")
UNTRACED = 255      # all of a mask of a frame that nobody traced
ARRAYS = {"video": np.uint8, "ecg": np.float32, "mask": np.uint8, "volume": np.float32}


class Shard:
    """One SPLIT folder: its arrays memory-mapped; of clips.csv the whole numbers as columns and the lines as
    they stand, each read when its clip is asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.read_table(folder / "clips.csv")
        self.arrays = {name: self.open(name) for name in ARRAYS if (folder / f"{name}.npy").exists()}
        if "video" not in self.arrays:
            raise UserError(f"{folder}/video.npy is missing: the set is not whole, write it again")

    def read_table(self, path):
        lines = [line for line in path.read_text().split("\n") if line]
        self.names, self.lines = next(csv.reader(lines), []), lines[1:]
        missing = [c for c in COLUMNS[:-1] if c not in self.names]
        if missing:
            raise UserError(f"{path}: column {missing[0]!r} is missing")
        if not self.lines:
            raise UserError(f"{path}: no clips in it")
        self.row(-1)
        known = (line.replace(",,", ",0,").replace(",,", ",0,") for line in self.lines)     # 0 where unknown
        try:
            numbers = np.loadtxt(known, np.int64, delimiter=",", quotechar='"', comments=None, ndmin=2,
                                 usecols=[self.names.index(c) for c in INTEGERS], unpack=True)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        self.columns = dict(zip(INTEGERS, numbers))

    def row(self, j):
        """Clip j as {column: value}; an unknown number is nan."""
        fields = next(csv.reader([self.lines[j]]))
        if len(fields) != len(self.names):
            raise UserError(f"{self.folder}/clips.csv: a row is cut short; the set is damaged, write it anew")
        row = dict(zip(self.names, fields))
        try:
            return row | {c: float(row[c] or "nan") for c in REALS} | {c: int(row[c] or 0) for c in INTEGERS}
        except ValueError as error:
            raise UserError(f"{self.folder}/clips.csv: {error}") from None

    def open(self, name):
        path, columns = self.folder / f"{name}.npy", self.columns
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: damaged ({error}); write the set again") from None
        start, length = ("ecg_start", "ecg_samples") if name == "ecg" else ("start", "frames")
        end = (columns[start] + columns[length]).max()
        if end > len(array) or array.dtype != ARRAYS[name]:
            raise UserError(f"{path}: {array.dtype} {array.shape}, but clips.csv asks for {end} rows of "
                            f"{np.dtype(ARRAYS[name])}; the set is damaged, write it again")
        array.base.madvise(mmap.MADV_RANDOM)        # else a window of 45 kB reads megabytes around it
        return array

    def rows(self, name, first, many):
        """A copy of `many` rows of an array; one request asks the disk for all of them."""
        if name not in self.arrays:
            raise UserError(f"{self.folder}: the set has no {name}.npy")
        array = self.arrays[name]
        begin = array.offset + int(first) * array.strides[0]
        page = begin - begin % mmap.PAGESIZE
        if many > 0:
            array.base.madvise(mmap.MADV_WILLNEED, page, begin + int(many) * array.strides[0] - page)
        return np.array(array[first:first + many])


def open_set(folder, split):
    """meta.json of a prepared set, and the shards that it has of a split: none where it lacks the split."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/meta.json: {getattr(error, 'strerror', None) or 'damaged'}; --data is"
                        " a folder made by a data module, such as python -m sources.phantom") from None
    found = [f for f in sorted(folder.glob(f"{split}*")) if re.fullmatch(rf"{split}(-\d+)?", f.name)]
    return meta, [Shard(f) for f in found if (f / "clips.csv").exists()]


class Clips:
    """A split of a prepared set, or of several ("A,B"), all shards taken as one; only the clip asked for is
    read from disk.

    clips[i] is {column: value}; video, mask, volume and ecg return arrays (ecg as (L, N) in mV).
    """

    def __init__(self, folders, split):
        folders = [Path(folder) for folder in str(folders).split(",")]
        metas, shards = zip(*(open_set(folder, split) for folder in folders))
        self.meta, self.shards = metas[0], sum(shards, [])
        for key, (folder, meta) in product(("height", "width", "channels"), zip(folders, metas)):
            if meta.get(key) != self.meta.get(key):
                raise UserError(f"{folders[0]} and {folder} have not the same {key}")
        if not self.shards:
            raise UserError(f"{', '.join(map(str, folders))}: no split {split!r} in it")
        self.ends = np.cumsum([len(s.lines) for s in self.shards])
        sizes = [sum(len(s.lines) for s in some) for some in shards]
        self.sets = [range(end - size, end) for size, end in zip(sizes, np.cumsum(sizes)) if size]
        alike = all(meta.get("leads") == self.meta.get("leads") for meta in metas)
        self.leads = self.meta.get("leads", []) if alike else []

    def __len__(self):
        return int(self.ends[-1])

    def draw(self, rng):
        """A clip's number; of several sets each is drawn as often, whatever its size."""
        numbers = self.sets[rng.integers(len(self.sets))]
        return int(numbers[rng.integers(len(numbers))])

    def locate(self, i):
        k = int(np.searchsorted(self.ends, i, side="right"))
        return self.shards[k], int(i - (self.ends[k - 1] if k else 0))

    def __getitem__(self, i):
        shard, j = self.locate(i)
        return shard.row(j)

    def has(self, name, i):
        """Whether the set of clip i has that array."""
        return name in self.locate(i)[0].arrays

    def per_frame(self, name, i, start=0, frames=None):
        """Frames start .. start + frames of clip i from video, mask or volume."""
        shard, j = self.locate(i)
        first, length = shard.columns["start"][j] + start, shard.columns["frames"][j] - start
        return shard.rows(name, first, length if frames is None else min(frames, length))

    def ecg(self, i, leads=None):
        """ECG of clip i: (L, N) float32 in mV; leads: indices into this set's leads, all by default."""
        shard, j = self.locate(i)
        ecg = shard.rows("ecg", shard.columns["ecg_start"][j], shard.columns["ecg_samples"][j]).T
        return ecg if leads is None else ecg[leads]


def chosen(clips, num, seed):
    """Numbers of `num` clips, drawn by the seed; all where num is 0."""
    return sorted(np.random.default_rng(seed).permutation(len(clips))[:num or None].tolist())


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


def vary_contrast(video, rng):
    """A window (T, H, W, C) uint8, its contrast changed by up to a fifth."""
    return (video * rng.uniform(0.8, 1.2)).clip(0, 255).astype(np.uint8)


def vary_video(video, rng):
    """The same, moved by up to 8 pixels (round the edges) and flipped half of the times: few clips then teach
    a tokenizer more."""
    video = np.roll(video, rng.integers(-8, 9, 2), axis=(1, 2))[:, :, ::rng.choice([1, -1])]
    return vary_contrast(video, rng)


def moves(rng, many, size):
    """Grids (n, H, W, 2) for F.grid_sample: each picture is turned, scaled, shifted and bent a little."""
    bend = torch.from_numpy(rng.normal(0, 0.06, (many, 2, 5, 5)).astype(np.float32))
    turn, scale, right, down = rng.normal(0, [[0.2], [0.15], [0.12], [0.12]], (4, many))    # half pictures
    cos, sin = np.exp(scale) * np.cos(turn), np.exp(scale) * np.sin(turn)
    affine = torch.tensor(np.stack([cos, -sin, right, sin, cos, down], 1)).float().unflatten(1, (2, 3))
    bend = F.interpolate(bend, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.affine_grid(affine, (many, 1, *size), align_corners=False) + bend


def vary_view(video, rng):
    """A window (T, H, W, C) uint8 of varied contrast, as one whole turned, scaled and shifted."""
    x = torch.from_numpy(vary_contrast(video, rng)).permute(0, 3, 1, 2).float()             # T C H W
    grid = moves(rng, 1, x.shape[-2:]).expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, align_corners=False).byte().permute(0, 2, 3, 1).numpy()


class RandomWindows(Dataset):
    """Random windows of T frames, each with the ECG of its own time span and what lies around it.

    Item n: video (C, T, H, W) float in [0, 1], C as asked for (`channels`) or as the set has it; fps; clip
    index; noise (K,) uniform numbers for the training's draws; with samples > 0 also ecg (L, samples)
    cleaned, centred on the window; leads (L,) indices into LEADS; ecg_start, seconds of ecg sample 0 after
    the window's first frame. With `anchor`, seconds before and after: anchor (C, 1, H, W), any frame of the
    clip, and anchor_ecg, the ECG around it. With `text`: the clip's text, each phrase left out at that share.
    Items of one `group` (a step's batch over all processes) share leads: half of the groups see one lead, a
    quarter 2 or 3, the rest all. vary(ecg, rng) alters a cleaned ECG, vary_video(video, rng) the frames
    (T, H, W, C) uint8.
    """

    def __init__(self, clips, frames, samples=0, clean=None, group=1, seed=0, noise=0, vary=None, channels=0,
                 vary_video=None, anchor=None, text=None):
        self.clips, self.frames, self.samples, self.clean, self.vary = clips, frames, samples, clean, vary
        self.group, self.seed, self.noise = group, seed, noise
        self.channels, self.vary_video, self.anchor, self.text = channels, vary_video, anchor, text
        if text is not None and any("text" not in s.names for s in clips.shards):
            raise UserError("the clips of the set have no text")
        if samples and not clips.leads:
            raise UserError("the set has no ECG; of several, one has none, or other leads than another")
        shortest = min(int(s.columns["frames"].min()) for s in clips.shards)
        if shortest < frames:
            raise UserError(f"a clip of the set has {shortest} frames, fewer than the {frames} of one window")

    def choose_leads(self, n):
        """Indices into the set's leads, the same for all items of a group."""
        rng, total = np.random.default_rng((self.seed, n // self.group, 1)), len(self.clips.leads)
        many = rng.choice([1, int(rng.integers(2, 4)), total], p=[0.5, 0.25, 0.25])
        return np.sort(rng.permutation(total)[:many])

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, n))
        i = self.clips.draw(rng)
        row = self.clips[i]
        start = int(rng.integers(row["frames"] - self.frames + 1))
        video = self.clips.per_frame("video", i, start, self.frames)               # T H W C
        noise = torch.from_numpy(rng.random(self.noise, np.float32))
        frame = int(rng.integers(row["frames"])) if self.anchor else 0
        if self.anchor:             # at the end of the window, so that whatever varies it varies both
            video = np.concatenate([video, self.clips.per_frame("video", i, frame, 1)])
        video = as_video(self.vary_video(video, rng) if self.vary_video else video, self.channels)
        item = {"video": video[:, :self.frames], "clip": i, "fps": row["fps"], "noise": noise}
        if self.samples:
            leads = self.choose_leads(n)
            ecg = self.clean(self.clips.ecg(i, leads))
            ecg = self.vary(ecg, rng) if self.vary else ecg
            middle = (start + self.frames / 2) / row["fps"] - row["ecg_offset_s"]
            first = round(middle * ECG_HZ) - self.samples // 2
            item |= {"ecg": torch.from_numpy(cut_ecg(ecg, first, self.samples)),
                     "leads": torch.tensor([LEADS.index(self.clips.leads[k]) for k in leads]),
                     "ecg_start": row["ecg_offset_s"] + first / ECG_HZ - start / row["fps"]}
        if self.anchor:
            item["anchor"], (before, after) = video[:, self.frames:], self.anchor
            if self.samples:
                first = round((frame / row["fps"] - before - row["ecg_offset_s"]) * ECG_HZ)
                item["anchor_ecg"] = torch.from_numpy(cut_ecg(ecg, first, round((before + after) * ECG_HZ)))
        if self.text is not None:
            said = [phrase for phrase in row["text"].split(", ") if rng.random() >= self.text]
            item["text"] = ", ".join(said)
        return item


def batches(dataset, batch, step=0, rank=0, world=1, workers=0):
    """Endless batches from `step` on; batch s of this rank holds the items (s * world + rank) * batch + j."""
    numbers = (range((s * world + rank) * batch, (s * world + rank + 1) * batch) for s in count(step))
    return iter(DataLoader(dataset, batch_sampler=numbers, num_workers=workers,
                           pin_memory=torch.cuda.is_available()))
