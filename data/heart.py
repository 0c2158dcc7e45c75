"""The left ventricle in a video: masks by a small U-Net, its volume, its beats, its ejection fraction.

    video (B, C, T, H, W) in [0, 1]  ->  masks (B, T, H, W)  ->  area, volume (T,)  ->  ED and ES frames, EF

Run it to train the U-Net on a set's masks, of all frames or of a few; writes OUT/segmenter.pt, prints its
Dice on the val split (evaluate.py segmenter measures it on any other):

    python -m data.heart --data=datasets/phantom --weights=runs/demo --out=runs/demo
"""
import math
import time
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, label
from scipy.signal import find_peaks
from torch import nn
from tqdm import tqdm

from data.clips import UNTRACED, Clips, as_video, chosen, moves
from data.flags import UserError, parse_flags, run_main
from data.measures import middle, ratio, smooth, swing
from data.runs import Log, bfloat16, init_distributed, load_weights, model_config, save_weights, schedule
from tokenizer import Tokenizer, TokenizerConfig, parameter_count


# ---------------------------------------------------------------------------- masks

@dataclass
class SegmenterConfig:
    channels: int = 1           # of the video
    width: int = 16             # channels of the first level, doubled at each one below
    levels: int = 4             # resolutions
    context: int = 2            # frames before and after that it sees: blood flickers, the wall does not


def double_conv(inputs, width):
    layers = []
    for n in (inputs, width):
        layers += [nn.Conv2d(n, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """U-Net (Ronneberger et al. 2015), any size: frames in_context -> logits (B, 1, H, W)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        widths = [c.width * 2 ** i for i in range(c.levels)]
        self.down = nn.ModuleList(map(double_conv, [c.channels * (2 * c.context + 1), *widths], widths))
        self.up = nn.ModuleList(double_conv(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1]))
        self.head = nn.Conv2d(c.width, 1, 1)

    def forward(self, x):
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if i else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1]):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return self.head(x)


class Scripted(nn.Module):
    """A TorchScript file in the U-Net's place: single frames (N, 3, H, W) in [0, 1], grey ones repeated, ->
    logits (N, 1, H, W), or a dict that has them under "out" as torchvision's networks do."""

    def __init__(self, path, channels):
        super().__init__()
        try:
            self.net = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError):
            raise UserError(f"{path}: neither a folder of weights nor a TorchScript file") from None
        self.config = SegmenterConfig(channels=channels, context=0)
        self.register_buffer("three", torch.ones(3, 1, 1))

    def forward(self, x):
        try:
            y = self.net(x * self.three)
            y = y["out"] if isinstance(y, dict) else y
            return y.reshape(len(x), 1, *x.shape[-2:])
        except (RuntimeError, KeyError, AttributeError) as error:
            raise UserError(f"the TorchScript segmenter does not turn frames {len(x)} x 3 x {x.shape[-2]} x "
                            f"{x.shape[-1]} into logits: {str(error).strip().splitlines()[-1]}") from None


def load_segmenter(path, channels):
    """The segmenter at `path`: a folder with a segmenter.pt, or a TorchScript file."""
    folder = Path(path).is_dir()
    return (load_weights(path, "segmenter", Segmenter, SegmenterConfig) if folder
            else Scripted(path, channels)).eval()


def largest_part(mask):
    """The largest connected region of a mask (H, W)."""
    parts, many = label(mask)
    return parts == np.bincount(parts.flat)[1:].argmax() + 1 if many > 1 else mask


def in_context(video, k):
    """Each frame of video (B, C, T, H, W) with k before and k after it: (B T, C (2 k + 1), H, W)."""
    T = video.shape[2]
    at = (torch.arange(T)[:, None] + torch.arange(-k, k + 1)).clamp(0, T - 1)               # T 2k+1
    return video[:, :, at].transpose(1, 2).flatten(0, 1).flatten(1, 2)


@torch.no_grad()
def segment(segmenter, video):
    """video (B, C, T, H, W) in [0, 1] -> masks (B, T, H, W) uint8, one region each."""
    B, C, T, H, W = video.shape
    if C != segmenter.config.channels:
        raise UserError(f"the segmenter takes {segmenter.config.channels} channels, the video has {C}")
    device, k = next(chain(segmenter.buffers(), segmenter.parameters())).device, segmenter.config.context
    masks = [(segmenter(in_context(clip[None], k).to(device)) > 0)[:, 0].cpu().numpy() for clip in video]
    return np.stack([[largest_part(m) for m in clip] for clip in masks]).astype(np.uint8)


def masks_of(segmenter, frames, block=64):
    """frames (T, H, W, C) uint8 -> LV masks (n, H, W), block by block, each seen with what lies around it."""
    k = segmenter.config.context
    for at in range(0, len(frames), block):
        begin = max(0, at - k)
        masks = segment(segmenter, as_video(np.array(frames[begin:at + block + k]))[None])[0]
        yield masks[at - begin:][:block]


# ---------------------------------------------------------------------------- volume, beats, EF

MIN_SWING = 0.05    # an area curve that swings by less than this share of its median shows no beats
MIN_DEPTH = 0.12    # a beat, an ectopic one too, falls and rises by this share of the curve's swing
EDGE_S = 0.12       # beats nearer than this to an end of the video do not count


def disk_volume(masks, disks=20):
    """Single-plane method of disks: masks (T, H, W) -> volumes (T,), pi/4 times the sum of d_i^2 h.

    The long axis is the mask's principal axis; d_i is a slice's mean diameter, its area over its height h.
    """
    volumes = np.zeros(len(masks))
    for t, mask in enumerate(masks):
        at = np.argwhere(mask).astype(float)                                                # N 2
        if len(at) < 3:
            continue
        at -= at.mean(0)
        along = at @ np.linalg.eigh(at.T @ at)[1][:, -1]                                    # N
        edges = np.linspace(along.min() - 0.5, along.max() + 0.5, disks + 1)
        # a pixel has a width: counting the centres in each slice would be wrong by up to 13 % at 64 x 64
        area = np.diff(np.clip(edges[:, None] - along + 0.5, 0, 1).sum(1))
        volumes[t] = math.pi / 4 * np.square(area).sum() / (edges[1] - edges[0])
    return volumes


def is_still(area, fps):
    """Whether an area curve (T,) hardly swings, or no more than its own noise makes it: it shows no beats."""
    a = smooth(area, fps)       # white noise alone gives a swing of 3.2 of its own
    return swing(area, fps) <= max(MIN_SWING * np.median(a), 6 * np.std(area - a))


def cardiac_cycle(area, volume, fps):
    """LV area and volume (T,) -> {"ed_frames", "es_frames": lists of int, "ef": points or None}.

    ED and ES are the prominent maxima and minima of the smoothed area, EDGE_S or more from its ends. EF is
    the median of (EDV - ESV) / EDV over neighbouring ED and ES, shallow (ectopic) beats left out. A curve
    that is still has no beats: a constant curve must not score.
    """
    if is_still(area, fps):
        return {"ed_frames": [], "es_frames": [], "ef": None}
    a, v, height, edge = smooth(area, fps), smooth(volume, fps), swing(area, fps), round(EDGE_S * fps)
    extremes = []
    for x in (a, -a):       # what came before the first frame is not known: there, to fall is enough
        at = find_peaks(np.append(x.min(), x), prominence=MIN_DEPTH * height)[0] - 1
        extremes.append(at[(at >= edge) & (at < len(a) - edge)].tolist())
    ed, es = extremes
    order = sorted(ed + es)
    pairs = [sorted(pair, key=a.__getitem__) for pair in zip(order, order[1:])]
    efs = [100 * (v[d] - v[s]) / v[d] for s, d in pairs if a[d] - a[s] > 0.3 * height and v[d] > 0]
    return {"ed_frames": ed, "es_frames": es, "ef": float(np.median(efs)) if efs else None}


def ef_scores(found, target, suffix=""):
    """R2, MAE, RMSE of EFs, points. Unknown targets are left out; a video without beats ejects nothing."""
    pairs = np.array([(f or 0, t) for f, t in zip(found, target) if not math.isnan(t)]).reshape(-1, 2)
    error = pairs[:, 0] - pairs[:, 1]
    mse = middle(np.square(error), np.mean)
    return {f"ef_r2{suffix}": 1 - ratio(mse, middle(pairs[:, 1], np.var)),
            f"ef_mae{suffix}": middle(np.abs(error), np.mean), f"ef_rmse{suffix}": mse ** 0.5}


# ---------------------------------------------------------------------------- training the U-Net

@dataclass
class TrainConfig(SegmenterConfig):
    data: str = "datasets/phantom"  # prepared data set with masks, or several: A,B
    weights: str = ""           # folder with a tokenizer.pt: half of the frames go through it first
    out: str = "runs/demo"      # folder for segmenter.pt
    init_from: str = ""         # start from the U-Net in this folder
    augment: bool = False       # turn, shift and scale the windows: for a set of few clips
    steps: int = 0              # stop after so many steps; 0 = after --minutes
    minutes: float = 5          # stop after so many minutes of training
    batch: int = 44             # frames of one step
    lr: float = 3e-3            # peak learning rate of AdamW; linear warm-up, then cosine to a twentieth
    warmup: int = 50            # steps of warm-up
    num: int = 0                # clips of the val split that are measured; 0 = all
    seed: int = 0               # of weights and data


WINDOW = 11         # frames of a clip that are read together, where no tokenizer says how many


def is_traced(mask):
    """Which of the masks (T, H, W) of a clip are known: (T,) bool."""
    return mask[:, 0, 0] != UNTRACED


def random_frames(clips, config, step, tokenizer=None):
    """Traced frames in_context and their masks (B, 1, H, W), a function of (seed, step).

    Gain, gamma and blur vary, with --augment also place and size, and half of the windows are as the
    tokenizer gives them back, so that true and generated video are measured alike.
    """
    rng, T = np.random.default_rng((config.seed, step)), tokenizer.config.frames if tokenizer else WINDOW
    videos, masks, known = [], [], []
    for _ in range(100 * config.batch):     # a clip that is traced in two frames gives one or two, not T
        i = clips.draw(rng)
        mask, frames = clips.per_frame("mask", i), clips[i]["frames"]
        if frames < T:
            raise UserError(f"clip {clips[i]['id']} has fewer than the {T} frames that are read together")
        traced = np.flatnonzero(is_traced(mask))
        if len(traced):
            t = int(np.clip(rng.choice(traced) - rng.integers(T), 0, frames - T))
            videos.append(clips.per_frame("video", i, t, T))
            masks.append(mask[t:t + T])
            known += is_traced(masks[-1]).tolist()
        if sum(known) >= config.batch:
            break
    else:
        raise UserError("hardly a frame of the set is traced")
    x = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) / 255                     # n C T H W
    y = torch.from_numpy(np.stack(masks)).float()                                           # n T H W
    if config.augment:
        grid = moves(rng, len(x), x.shape[-2:])                                             # n H W 2
        x = F.grid_sample(x.flatten(1, 2), grid, align_corners=False).view_as(x)
        y = F.grid_sample(y, grid, mode="nearest", align_corners=False)
    if tokenizer:
        x[::2] = tokenizer.decode(tokenizer.encode(x[::2]))
    x = x.numpy()
    gain, gamma, soft = rng.uniform([.7, .7, 0], [1.3, 1.4, 1], (len(x), 3)).T.reshape(3, -1, 1, 1, 1, 1)
    x = x + soft * (gaussian_filter(x, 1.5, axes=(3, 4), mode="nearest") - x)
    x = torch.from_numpy((gain * x ** gamma).clip(0, 1)).float()
    return in_context(x, config.context)[known], y.flatten(0, 1)[known][:, None]


def measure_segmenter(model, clips, numbers):
    """Dice of the traced frames that have a ventricle; EF against that of the true masks, measured alike, or
    where few frames are traced against the set's own."""
    dice, found, drawn = [], [], []
    for i in tqdm(numbers, desc="val"):
        mask, fps = clips.per_frame("mask", i), clips[i]["fps"]                             # T H W
        guess = segment(model, as_video(clips.per_frame("video", i))[None])[0]
        known = is_traced(mask)
        x, y = guess[known], mask[known]
        size = y.sum((1, 2), dtype=float)
        dice.append((2 * (x * y).sum((1, 2)) / (size + x.sum((1, 2)) + 1e-9))[size > 0])
        ef = [cardiac_cycle(m.sum((1, 2)), disk_volume(m), fps)["ef"] for m in (guess, mask) if known.all()]
        ef = ef or [cardiac_cycle(guess.sum((1, 2)), disk_volume(guess), fps)["ef"], clips[i]["ef"]]
        if ef[1] is not None:       # a heart that stands still has none
            found.append(ef[0]), drawn.append(ef[1])
    return {"dice": middle(np.concatenate(dice), np.mean), **ef_scores(found, drawn), "clips": len(numbers)}


def main():
    config = parse_flags(TrainConfig)
    device = init_distributed(config.seed)[0]
    train, val = (Clips(config.data, split) for split in ("train", "val"))
    shape = replace(model_config(config, SegmenterConfig), channels=train.meta["channels"])
    model = load_weights(config.init_from, "segmenter", Segmenter, SegmenterConfig, shape) \
        if config.init_from else Segmenter(shape)
    model = model.to(device)
    tokenizer = load_weights(config.weights, "tokenizer", Tokenizer, TokenizerConfig).eval() \
        if config.weights else None
    print(f"{config}\n{parameter_count(model):.2f}M parameters, {len(train)} clips")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    log, began = Log(config, "segmenter", 0), time.time()
    for step in count():
        done, lr = schedule(config, step, time.time() - began)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = lr
        x, y = (v.to(device) for v in random_frames(train, config, step, tokenizer))
        with bfloat16(device):
            logits = model(x)
        logits = logits.float()
        p = torch.sigmoid(logits)
        dice = (2 * (p * y).sum((1, 2, 3)) + 1) / ((p + y).sum((1, 2, 3)) + 1)              # B
        loss = F.binary_cross_entropy_with_logits(logits, y) + 1 - dice.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            log.bar.set_postfix(log.write(step, loss=loss.item(), lr=lr))
        log.bar.update()
    save_weights(config.out, "segmenter", model, step)
    figures = measure_segmenter(model.eval(), val, chosen(val, config.num, config.seed))
    log.close(f"segmenter.pt: {step} steps, {log.write(step, **figures)}")


if __name__ == "__main__":
    run_main(main)
