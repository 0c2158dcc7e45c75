"""The left ventricle in a video: masks by a small U-Net, its volume, its beats, its ejection fraction.

    video (B, C, T, H, W) in [0, 1]  ->  masks (B, T, H, W)  ->  area, volume (T,)  ->  ED and ES frames, EF

Run it to train the U-Net on a set's masks, of all frames or of a few; writes OUT/segmenter.pt, prints its
Dice on the val split (evaluate.py segmenter measures it on any other):

    python -m metrics.lv_segmenter --data=datasets/phantom --weights=runs/demo --out=runs/demo
"""
import time
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, label
from torch import nn
from tqdm import tqdm

from common.checkpoint import load_weights, save_weights
from common.flags import UserError, parse_flags, run_main
from common.training import Log, bfloat16, init_distributed, model_config, schedule
from data.dataset import UNTRACED, Clips, as_video, chosen, moves
from metrics.ejection_fraction import cardiac_cycle, disk_volume, ef_scores, middle
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
