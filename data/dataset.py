"""The prepared data set and the random windows of it that a training sees. Every stage reads it.

    NAME/meta.json          name, fps, height, width, channels, leads, ecg_hz, source, command
    NAME/SPLIT/clips.csv    one row a clip (COLUMNS below; unknown = empty)
    NAME/SPLIT/video.npy    uint8 (sum of frames, H, W, C)
    NAME/SPLIT/ecg.npy      float32 (sum of samples, L), mV at 250 Hz; optional
    NAME/SPLIT/mask.npy     uint8 (sum of frames, H, W), 1 = left-ventricular cavity; a frame that
                            nobody traced is all 255; optional
    NAME/SPLIT/volume.npy   float32 (sum of frames,), true LV volume in ml; optional

SPLIT is train, val or test; a large split is SPLIT-00000, SPLIT-00001, ... (see data/writer.py).
Frame k shows t = k / fps seconds, ECG sample j shows t = ecg_offset_s + j / 250. Every random draw
of a training is a function of (seed, item number). So the draws are the same for any number of
processes, and a training that is resumed needs no saved random state.
"""
import csv
import hashlib
import json
import math
import mmap
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from common.flags import UserError

ECG_HZ = 250
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
COLUMNS = ("id", "start", "frames", "fps", "ecg_start", "ecg_samples", "ecg_offset_s", "view", "ef",
           "edv_ml", "esv_ml", "text", "r_peaks_s")
INTEGERS = ("start", "frames", "ecg_start", "ecg_samples")
REALS = ("fps", "ecg_offset_s", "ef", "edv_ml", "esv_ml")
# The columns that are read when a set is opened; all others when their clip is asked for.
INDEX = np.dtype([(name, np.int64) for name in INTEGERS] + [("fps", np.float64)])
ARRAYS = {"video": np.uint8, "ecg": np.float32, "mask": np.uint8, "volume": np.float32,
          "tokens": np.uint16}      # tokens: only of a training (data/token_cache.py)
UNTRACED = 255      # all of a mask of a frame that nobody traced
ECG_PATCH = 75      # an ECG encoder's window is a whole number of such patches (0.3 s)


# ---------------------------------------------------------------------------- reader

class Shard:
    """One SPLIT folder. Its arrays are memory-mapped, so that a clip costs only its own bytes.

    A table of a million clips must open in seconds: only the columns of INDEX are read as numbers
    at once. The lines stay text, and `row` reads one of them when its clip is asked for.
    """

    def __init__(self, folder):
        self.folder = folder
        self.read_table(folder / "clips.csv")
        self.arrays = {}
        for name in ARRAYS:
            if (folder / f"{name}.npy").exists():
                self.arrays[name] = self.open_array(name)
        if "video" not in self.arrays:
            raise UserError(f"{folder}/video.npy is missing: the set is not whole, write it again")

    def read_table(self, path):
        """Read clips.csv into names (of its columns), lines (of text) and columns (of numbers)."""
        try:
            lines = [line for line in path.read_text().split("\n") if line]
        except UnicodeDecodeError:
            raise UserError(f"{path}: damaged; write the set again") from None
        self.names = next(csv.reader(lines), [])
        self.lines = lines[1:]
        # r_peaks_s, the last column, was added later: older sets lack it.
        for column in COLUMNS[:-1]:
            if column not in self.names:
                raise UserError(f"{path}: column {column!r} is missing")
        if not self.lines:
            raise UserError(f"{path}: no clips in it")
        # A table that was cut short ends in a damaged row.
        self.row(-1)

        # loadtxt takes no empty cells. Each becomes 0; the second pass is for neighbours (",,,").
        filled = (line.replace(",,", ",0,").replace(",,", ",0,") for line in self.lines)
        wanted = [self.names.index(column) for column in INDEX.names]
        try:
            columns = np.loadtxt(filled, INDEX, delimiter=",", quotechar='"', comments=None,
                                 ndmin=1, usecols=wanted, unpack=True)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        self.columns = dict(zip(INDEX.names, columns))

    def row(self, j):
        """Clip j as {column: value}. An unknown real number is nan, an unknown integer 0."""
        cells = next(csv.reader([self.lines[j]]))
        if len(cells) != len(self.names):
            raise UserError(f"{self.folder}/clips.csv: a row is cut short; "
                            "the set is damaged, write it anew")
        row = dict(zip(self.names, cells))
        try:
            for column in REALS:
                row[column] = float(row[column] or "nan")
            for column in INTEGERS:
                row[column] = int(row[column] or 0)
        except ValueError as error:
            raise UserError(f"{self.folder}/clips.csv: {error}") from None
        return row

    def open_array(self, name, file=None):
        """The array of FILE, by default NAME.npy, memory-mapped.

        UserError if it is damaged or shorter than the table says.
        """
        path = self.folder / (file or f"{name}.npy")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: damaged ({error}); write the set again") from None

        start, length = ("ecg_start", "ecg_samples") if name == "ecg" else ("start", "frames")
        end = (self.columns[start] + self.columns[length]).max()
        if end > len(array) or array.dtype != ARRAYS[name]:
            raise UserError(f"{path}: {array.dtype} {array.shape}, but clips.csv asks for {end} "
                            f"rows of {np.dtype(ARRAYS[name])}; the set is damaged, write it again")
        # Without this hint a read of 45 kB loads megabytes around it.
        array.base.madvise(mmap.MADV_RANDOM)
        return array

    def rows(self, name, first, many):
        """A copy of `many` rows of an array, from row `first` on."""
        if name not in self.arrays:
            raise UserError(f"{self.folder}: the set has no {name}.npy")
        array = self.arrays[name]
        if many > 0:
            # One request to the disk for all pages of the rows, rather than one a page.
            row_bytes = array.strides[0]
            begin = array.offset + int(first) * row_bytes
            end = begin + int(many) * row_bytes
            page = begin - begin % mmap.PAGESIZE
            array.base.madvise(mmap.MADV_WILLNEED, page, end - page)
        return np.array(array[first:first + many])


def open_set(folder, split):
    """meta.json of a prepared set, and its shards of a split ([] if it lacks the split)."""
    try:
        meta = dict(json.loads((folder / "meta.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise UserError(f"{folder}/meta.json: {reason}; --data is a folder made by a source, "
                        "such as python -m sources.phantom") from None
    shards = []
    for path in sorted(folder.iterdir()):
        # "train" and "train-00003", but not "training"
        if re.fullmatch(rf"{re.escape(split)}(-\d+)?", path.name) and (path / "clips.csv").exists():
            shards.append(Shard(path))
    return meta, shards


class Clips:
    """A split of a prepared set, or of several sets ("A,B"), as one list of clips.

    clips[i] is {column: value}. `per_frame` and `ecg` read a clip's arrays.
    """

    def __init__(self, folders, split):
        folders = [Path(folder) for folder in str(folders).split(",")]
        metas = []
        self.shards = []
        self.sets = []          # the numbers of the clips of each set
        total = 0
        for folder in folders:
            meta, shards = open_set(folder, split)
            size = sum(len(shard.lines) for shard in shards)
            metas.append(meta)
            self.shards += shards
            if size:
                self.sets.append(range(total, total + size))
            total += size

        self.meta = metas[0]
        for key in ("height", "width", "channels"):
            for folder, meta in zip(folders, metas):
                if meta.get(key) != self.meta.get(key):
                    raise UserError(f"{folders[0]} and {folder} have not the same {key}")
        if not self.shards:
            raise UserError(f"{', '.join(map(str, folders))}: no split {split!r} in it")
        # ends[k]: number of clips in the shards 0 .. k
        self.ends = np.cumsum([len(shard.lines) for shard in self.shards])
        # Sets with different leads cannot be mixed: then there are no leads to train on.
        self.leads = self.meta.get("leads", [])
        if any(meta.get("leads") != self.meta.get("leads") for meta in metas):
            self.leads = []

    def __len__(self):
        return int(self.ends[-1])

    def fingerprint(self):
        """How many clips, and a hash of their tables: "6 (1a2b3c4d5e6f)". The same on any disk."""
        digest = hashlib.sha256()
        for shard in self.shards:
            for line in (",".join(shard.names), *shard.lines):
                digest.update(line.encode() + b"\n")
        return f"{len(self)} ({digest.hexdigest()[:12]})"

    def draw(self, rng):
        """A random clip's number. Each set is drawn equally often, whatever its size."""
        numbers = self.sets[rng.integers(len(self.sets))]
        return int(numbers[rng.integers(len(numbers))])

    def locate(self, i):
        """The shard of clip i and the clip's number in it."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        before = self.ends[k - 1] if k else 0
        return self.shards[k], int(i - before)

    def __getitem__(self, i):
        shard, j = self.locate(i)
        return shard.row(j)

    def has(self, name, i):
        """Whether the set of clip i has the array `name`."""
        shard, _ = self.locate(i)
        return name in shard.arrays

    def per_frame(self, name, i, start=0, frames=None):
        """Frames start .. start + frames of a clip's video, mask or volume, by default all."""
        shard, j = self.locate(i)
        many = shard.columns["frames"][j] - start
        if frames is not None:
            many = min(frames, many)
        return shard.rows(name, shard.columns["start"][j] + start, many)

    def ecg(self, i, leads=None):
        """ECG of clip i, (L, N) float32 in mV; leads: indices into the set's leads, default all."""
        shard, j = self.locate(i)
        first = shard.columns["ecg_start"][j]
        ecg = shard.rows("ecg", first, shard.columns["ecg_samples"][j]).T                  # L N
        return ecg if leads is None else ecg[leads]


def choose_clips(clips, num, seed):
    """Numbers of `num` clips, drawn by the seed; all clips if num is 0."""
    numbers = np.random.default_rng(seed).permutation(len(clips))
    return sorted(numbers[:num or None].tolist())


# ---------------------------------------------------------------------------- arrays of one clip

def crop_or_pad(ecg, first, samples):
    """Samples first .. first + samples of (..., N), zero (the baseline) outside the recording."""
    out = np.zeros((*ecg.shape[:-1], samples), np.float32)
    begin = max(first, 0)
    end = min(first + samples, ecg.shape[-1])
    if end > begin:
        out[..., begin - first:end - first] = ecg[..., begin:end]
    return out


def as_video(frames, channels=0):
    """(T, H, W, C) uint8 -> (C, T, H, W) float in [0, 1].

    channels: grey is repeated to 3, colour averaged to 1; 0 = as it is.
    """
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255                     # C T H W
    if channels in (0, len(video)):
        return video
    return video.mean(0, keepdim=True).expand(channels, -1, -1, -1)


def random_contrast(video, rng):
    """A window (T, H, W, C) uint8, its contrast changed by up to a fifth."""
    return (video * rng.uniform(0.8, 1.2)).clip(0, 255).astype(np.uint8)


def random_shift_and_flip(video, rng):
    """A window (T, H, W, C) uint8, shifted by up to 8 pixels, in half of the cases mirrored.

    The shift wraps round the edges. A tokenizer learns more from few clips this way.
    """
    video = np.roll(video, rng.integers(-8, 9, 2), axis=(1, 2))
    video = video[:, :, ::rng.choice([1, -1])]
    return random_contrast(video, rng)


def random_affine_grid(rng, many, size):
    """Grids (n, H, W, 2) for F.grid_sample that turn, scale, shift and bend n pictures a little."""
    # The bend: 5 x 5 random offsets, in units of half a picture, interpolated to all pixels.
    bend = torch.from_numpy(rng.normal(0, 0.06, (many, 2, 5, 5)).astype(np.float32))
    spread = [[0.2], [0.15], [0.12], [0.12]]    # radians, log of the scale, half pictures
    turn, scale, right, down = rng.normal(0, spread, (4, many))
    cos = np.exp(scale) * np.cos(turn)
    sin = np.exp(scale) * np.sin(turn)
    affine = np.stack([cos, -sin, right, sin, cos, down], 1)                               # n 6
    affine = torch.tensor(affine).float().unflatten(1, (2, 3))                             # n 2 3
    bend = F.interpolate(bend, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.affine_grid(affine, (many, 1, *size), align_corners=False) + bend             # n H W 2


def random_view(video, rng):
    """A window (T, H, W, C) uint8 of varied contrast, all its frames turned and bent alike."""
    x = torch.from_numpy(random_contrast(video, rng)).permute(0, 3, 1, 2).float()          # T C H W
    grid = random_affine_grid(rng, 1, x.shape[-2:]).expand(len(x), -1, -1, -1)
    x = F.grid_sample(x, grid, align_corners=False)
    return x.byte().permute(0, 2, 3, 1).numpy()                                            # T H W C


# ---------------------------------------------------------------------------- windows of a training

class Window(NamedTuple):
    """The random place of one item: a clip, the window's first frame, and the anchor frame."""
    clip: int
    row: dict               # of clips.csv
    start: int
    anchor: int | None      # None = the items have no anchor


@dataclass(eq=False)
class RandomWindows(Dataset):
    """Random windows of T frames, each with the ECG of its own time and of what lies around it.

    Item n is a dict:
        video (C, T, H, W)       in [0, 1]
        clip, fps                the clip's number and frame rate
        uniform (uniforms,)      uniform random numbers, for the training's own draws
    with ecg_samples > 0 also:
        ecg (L, ecg_samples)     cleaned, centred on the window
        leads (L,)               indices into LEADS
        ecg_start                seconds of ECG sample 0 after the window's first frame
        ecg_disturbed (ecg_samples,)    True = the model must not see it, if there is find_disturbed
    with anchor_seconds:
        anchor (C, 1, H, W)      any frame of the clip
        anchor_ecg (L, samples)  the ECG around that frame, if ecg_samples > 0
    with cached_tokens, in place of video and anchor:
        tokens (T', h, w)        of the window
        anchor_tokens (h, w)     of the anchor frame
    with p_drop_phrase:
        text                     the clip's line of text
    UserError if the set lacks what the items need.
    """
    clips: Clips
    frames: int                             # T, frames of a window
    _: KW_ONLY
    ecg_samples: int = 0                    # samples of a window's ECG; 0 = items without an ECG
    clean: Callable | None = None           # clean(ecg in mV) -> ecg as the model reads it
    find_disturbed: Callable | None = None  # find_disturbed(ecg in mV) -> bool (N,)
    group: int = 1                          # items of a step's batch over all processes
    seed: int = 0
    uniforms: int = 0                       # how many uniform numbers an item has
    leads: str = ""                         # "I,II,V2" = the leads of every item; "" = drawn anew
    augment_ecg: Callable | None = None     # augment_ecg(cleaned ecg, rng) -> ecg
    augment_video: Callable | None = None   # augment_video((T, H, W, C) uint8, rng) -> the same
    channels: int = 0                       # of the video, see as_video
    anchor_seconds: tuple | None = None     # seconds of ECG (before, after) the anchor frame
    p_drop_phrase: float | None = None      # probability that a phrase of the text is left out
    cached_tokens: bool = False             # the clips have tokens (data/token_cache.py)

    def __post_init__(self):
        shards = self.clips.shards
        if self.p_drop_phrase is not None and any("text" not in shard.names for shard in shards):
            raise UserError("the clips of the set have no text")
        if self.ecg_samples and not self.clips.leads:
            raise UserError("the set has no ECG; of several, one has none, "
                            "or other leads than another")
        shortest = min(int(shard.columns["frames"].min()) for shard in shards)
        if shortest < self.frames:
            raise UserError(f"a clip of the set has {shortest} frames, "
                            f"fewer than the {self.frames} of one window")
        if self.ecg_samples:
            self.check_ecg_window()
        self.fixed_leads = self.find_leads()

    def check_ecg_window(self):
        """UserError if a window of frames can last longer than the ECG that the encoder sees."""
        slowest = min(float(shard.columns["fps"].min()) for shard in self.clips.shards)
        if not slowest > 0:
            raise UserError("a clip of the set has no frame rate, so its ECG has no place in time")
        seconds = self.frames / slowest
        if seconds > self.ecg_samples / ECG_HZ:
            needed = ECG_PATCH * math.ceil(seconds * ECG_HZ / ECG_PATCH)
            raise UserError(f"the ECG encoder sees {self.ecg_samples / ECG_HZ:g} s, "
                            f"a window of {self.frames} frames at {slowest:g} frames a second "
                            f"lasts {seconds:.4g} s: pretrain the encoder with --samples={needed} "
                            "or more, or prepare the set at a higher frame rate")

    def find_leads(self):
        """"I,II,V2" -> indices into the set's leads; None for ""."""
        if not self.leads:
            return None
        names = self.leads.split(",")
        for name in names:
            if name not in self.clips.leads:
                known = " ".join(self.clips.leads) or "none"
                raise UserError(f"--leads={self.leads}: the set has no lead {name}, "
                                f"its leads are {known}")
        return np.unique([self.clips.leads.index(name) for name in names])

    def random_leads(self, n):
        """Indices into the set's leads: one lead for half of the groups, 2 or 3 for a quarter, all
        for the rest. A batch stacks its items, so all items of a group have the same leads."""
        rng = np.random.default_rng((self.seed, n // self.group, 1))
        total = len(self.clips.leads)
        few = int(rng.integers(2, 4))
        many = rng.choice([1, few, total], p=[0.5, 0.25, 0.25])
        return np.sort(rng.permutation(total)[:many])

    def __getitem__(self, n):
        # All draws of an item, in this order, come from a generator of its own.
        rng = np.random.default_rng((self.seed, n))
        clip = self.clips.draw(rng)
        row = self.clips[clip]
        start = int(rng.integers(row["frames"] - self.frames + 1))
        uniform = rng.random(self.uniforms, np.float32)
        anchor = None
        if self.anchor_seconds is not None:
            anchor = int(rng.integers(row["frames"]))

        window = Window(clip, row, start, anchor)
        item = {"clip": clip, "fps": row["fps"], "uniform": torch.from_numpy(uniform)}
        if self.cached_tokens:
            item |= self.token_items(window)
        else:
            item |= self.video_items(window, rng)
        if self.ecg_samples:
            item |= self.ecg_items(window, n, rng)
        if self.p_drop_phrase is not None:
            item["text"] = self.drop_phrases(row["text"], rng)
        return item

    def video_items(self, window, rng):
        """The window's frames and its anchor frame."""
        frames = self.clips.per_frame("video", window.clip, window.start, self.frames)     # T H W C
        if window.anchor is not None:
            # Joined to the window while it is augmented, so that both change in the same way.
            anchor = self.clips.per_frame("video", window.clip, window.anchor, 1)
            frames = np.concatenate([frames, anchor])                                    # T+1 H W C
        if self.augment_video:
            frames = self.augment_video(frames, rng)
        video = as_video(frames, self.channels)                                            # C T H W
        items = {"video": video[:, :self.frames]}
        if window.anchor is not None:
            items["anchor"] = video[:, self.frames:]                                       # C 1 H W
        return items

    def token_items(self, window):
        """The tokens of the window and of its anchor frame, from the cache."""
        items = {"tokens": self.clips.per_frame("tokens", window.clip, window.start, 1)}
        if window.anchor is not None:
            # The first latent frame of a window is the frame with which it begins.
            anchor = self.clips.per_frame("tokens", window.clip, window.anchor, 1)
            items["anchor_tokens"] = anchor[:, 0]
        return {name: torch.from_numpy(x[0].astype(np.int64)) for name, x in items.items()}

    def ecg_items(self, window, n, rng):
        """The ECG of the window and of its anchor frame, both cut out of the clip's cleaned ECG."""
        leads = self.fixed_leads
        if leads is None:
            leads = self.random_leads(n)
        raw = self.clips.ecg(window.clip, leads)
        ecg = self.clean(raw)                                                              # L N
        if self.augment_ecg:
            ecg = self.augment_ecg(ecg, rng)

        # The middle of the ECG is the middle of the window of frames.
        fps = window.row["fps"]
        offset = window.row["ecg_offset_s"]
        middle = (window.start + self.frames / 2) / fps - offset        # seconds after ECG sample 0
        first = round(middle * ECG_HZ) - self.ecg_samples // 2
        items = {
            "ecg": torch.from_numpy(crop_or_pad(ecg, first, self.ecg_samples)),
            "leads": torch.tensor([LEADS.index(self.clips.leads[k]) for k in leads]),
            "ecg_start": offset + first / ECG_HZ - window.start / fps,
        }
        if self.find_disturbed:
            disturbed = self.find_disturbed(raw)                                           # N
            in_window = crop_or_pad(disturbed, first, self.ecg_samples) > 0
            items["ecg_disturbed"] = torch.from_numpy(in_window)
            # The ECG of the anchor has no mask: it is zero there, as in sampling.
            ecg = ecg * ~disturbed
        if window.anchor is not None:
            before, after = self.anchor_seconds
            first = round((window.anchor / fps - before - offset) * ECG_HZ)
            around = crop_or_pad(ecg, first, round((before + after) * ECG_HZ))
            items["anchor_ecg"] = torch.from_numpy(around)
        return items

    def drop_phrases(self, text, rng):
        """"A4C view, EF 55", each phrase left out at random: a model then learns any part of it."""
        kept = [phrase for phrase in text.split(", ") if rng.random() >= self.p_drop_phrase]
        return ", ".join(kept)


def batches(dataset, batch, step=0, rank=0, world=1, workers=0):
    """Endless batches from `step` on. Batch s of a rank: items (s * world + rank) * batch + j."""
    def item_numbers():
        for s in count(step):
            first = (s * world + rank) * batch
            yield range(first, first + batch)

    loader = DataLoader(dataset, batch_sampler=item_numbers(), num_workers=workers,
                        pin_memory=torch.cuda.is_available())
    return iter(loader)
