"""The left ventricle in a video: a small U-Net and its training; for evaluate, sample, sources.

    video (B, C, T, H, W) in [0, 1]  ->  masks (B, T, H, W), 1 = cavity of the left ventricle

Run it to train the U-Net on the masks of a set, in which all frames are traced or only a few. It
writes OUT/segmenter.pt and prints its Dice on the val split (evaluate.py segmenter: any split):

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

from common.checkpoint import check_folder, load_weights, save_weights
from common.flags import UserError, parse_flags, refuse_torchrun, run_main
from common.training import (Log, bfloat16, check_training, init_distributed, model_config,
                             schedule)
from data.dataset import UNTRACED, Clips, as_video, choose_clips, random_affine_grid
from metrics.ejection_fraction import ef_scores, measure_masks, median_or_nan
from tokenizer import Tokenizer, TokenizerConfig, parameter_count

WINDOW = 11         # frames of a clip that training reads together, if no tokenizer gives it


@dataclass
class SegmenterConfig:
    channels: int = 1           # of the video
    width: int = 16             # channels of the first level, doubled at each level below
    levels: int = 4             # resolutions
    context: int = 2            # frames seen before and after: blood flickers, the wall does not


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
    lr: float = 3e-3            # peak rate of AdamW; linear warm-up, then cosine to a twentieth
    warmup: int = 50            # steps of warm-up
    num: int = 0                # clips of the val split that are measured; 0 = all
    seed: int = 0               # of weights and data


# ---------------------------------------------------------------------------- the U-Net

def double_conv(inputs, width):
    """Twice: 3 x 3 convolution, group norm, ReLU; `inputs` channels to `width`."""
    layers = []
    for n in (inputs, width):
        layers.append(nn.Conv2d(n, width, 3, padding=1, bias=False))
        layers.append(nn.GroupNorm(8, width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """U-Net (Ronneberger et al. 2015): frames of any size, each with its neighbours."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = [config.width * 2 ** i for i in range(config.levels)]
        inputs = config.channels * (2 * config.context + 1)
        self.down = nn.ModuleList(map(double_conv, [inputs, *widths], widths))
        # From the lowest level up: each takes what comes from below and the skip of its own level.
        self.up = nn.ModuleList()
        for width, below in zip(widths[-2::-1], widths[:0:-1]):
            self.up.append(double_conv(width + below, width))
        self.head = nn.Conv2d(config.width, 1, 1)

    def forward(self, x):
        """x (B, C (2 context + 1), H, W) in [0, 1] -> logits (B, 1, H, W)."""
        skips = []
        for level, block in enumerate(self.down):
            if level > 0:
                x = F.max_pool2d(x, 2, ceil_mode=True)                              # B D H/2 W/2
            x = block(x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1]):
            # The size of the skip, not twice the size: an odd side was rounded up on the way down.
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return self.head(x)


class ScriptedSegmenter(nn.Module):
    """A network from a TorchScript file in the place of the U-Net, for labs that have their own.

    It takes single frames (N, 3, H, W) in [0, 1], grey ones repeated. It gives logits (N, 1, H, W),
    or a dict that has them under "out", as the networks of torchvision do.
    """

    def __init__(self, path, channels):
        super().__init__()
        try:
            self.net = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError):
            raise UserError(f"{path}: neither a folder of weights nor a TorchScript file") from None
        self.config = SegmenterConfig(channels=channels, context=0)
        self.register_buffer("three", torch.ones(3, 1, 1))

    def forward(self, x):
        """x (N, C, H, W) in [0, 1] -> logits (N, 1, H, W); UserError if it gives none."""
        N, _, H, W = x.shape
        try:
            logits = self.net(x * self.three)                               # N 1 H W
            if isinstance(logits, dict):
                logits = logits["out"]
            return logits.reshape(N, 1, H, W)
        except (RuntimeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"the TorchScript segmenter does not turn frames {N} x 3 x {H} x {W} "
                            f"into logits: {reason}") from None


def load_segmenter(path, channels):
    """The segmenter at `path`: a folder with a segmenter.pt, or a TorchScript file."""
    if Path(path).is_dir():
        return load_weights(path, "segmenter", Segmenter, SegmenterConfig).eval()
    return ScriptedSegmenter(path, channels).eval()


# ---------------------------------------------------------------------------- video to masks

def in_context(video, k):
    """Each frame of video (B, C, T, H, W) with k before and k after it: (B T, C (2k+1), H, W)."""
    B, C, T, H, W = video.shape
    # The first and the last frame stand for the frames that a video lacks at its ends.
    around = torch.arange(T)[:, None] + torch.arange(-k, k + 1)             # T 2k+1
    around = around.clamp(0, T - 1)
    windows = video[:, :, around]                                           # B C T 2k+1 H W
    return windows.transpose(1, 2).reshape(B * T, C * (2 * k + 1), H, W)


def largest_part(mask):
    """The largest connected region of a mask (H, W)."""
    parts, num_parts = label(mask)
    if num_parts <= 1:
        return mask
    sizes = np.bincount(parts.flat)[1:]         # without the background, which is part 0
    return parts == sizes.argmax() + 1


@torch.no_grad()
def segment(segmenter, video):
    """video (B, C, T, H, W) in [0, 1] -> masks (B, T, H, W) uint8, one region in each.

    Raises UserError where the segmenter was made for another number of channels.
    """
    channels = video.shape[1]
    config = segmenter.config
    if channels != config.channels:
        raise UserError(f"the segmenter takes {config.channels} channels, the video has {channels}")
    # A TorchScript network may have no parameters: then its buffers say where it is.
    device = next(chain(segmenter.buffers(), segmenter.parameters())).device
    masks = []
    for clip in video:
        frames = in_context(clip[None], config.context)                     # T C(2k+1) H W
        # A CPU convolves nearly twice as fast where the channels lie next to each other. (Training
        # is slower that way.)
        logits = segmenter(frames.to(device, memory_format=torch.channels_last))    # T 1 H W
        found = (logits > 0)[:, 0].cpu().numpy()                            # T H W
        masks.append([largest_part(mask) for mask in found])
    return np.stack(masks).astype(np.uint8)


def masks_of(segmenter, frames, block=64):
    """Masks of a long video, block by block: frames (T, H, W, C) uint8 -> yields (n, H, W).

    Each block is read with the frames around it, so that its masks equal those of the whole video.
    """
    k = segmenter.config.context
    for at in range(0, len(frames), block):
        begin = max(0, at - k)
        video = as_video(np.array(frames[begin:at + block + k]))            # C n+2k H W
        masks = segment(segmenter, video[None])[0]                          # n+2k H W
        yield masks[at - begin:][:block]


# ---------------------------------------------------------------------------- training data

def is_traced(mask):
    """Which of the masks (T, H, W) of a clip are known: (T,) bool."""
    return mask[:, 0, 0] != UNTRACED


def draw_windows(clips, config, rng, length):
    """Random windows with config.batch traced frames or more in all.

    Returns video (n, C, T, H, W) in [0, 1], masks (n, T, H, W), and which of the n T frames are
    traced.
    """
    videos, masks, traced = [], [], []
    # A clip that is traced in two frames gives only one or two: many windows may be needed.
    for _ in range(100 * config.batch):
        i = clips.draw(rng)
        frames = clips[i]["frames"]
        if frames < length:
            raise UserError(f"clip {clips[i]['id']} has fewer than the {length} frames "
                            "that are read together")
        mask = clips.per_frame("mask", i)                                   # frames H W
        known = np.flatnonzero(is_traced(mask))
        if len(known):
            # A traced frame stands at a random place of the window.
            start = int(np.clip(rng.choice(known) - rng.integers(length), 0, frames - length))
            videos.append(clips.per_frame("video", i, start, length))
            masks.append(mask[start:start + length])
            traced += is_traced(masks[-1]).tolist()
        if sum(traced) >= config.batch:
            break
    else:
        raise UserError("hardly a frame of the set is traced")
    video = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) / 255  # n C T H W
    masks = torch.from_numpy(np.stack(masks)).float()                       # n T H W
    return video, masks, traced


def random_place(video, masks, rng):
    """Windows (n, C, T, H, W) and their masks (n, T, H, W), turned, scaled and shifted alike."""
    grid = random_affine_grid(rng, len(video), video.shape[-2:])            # n H W 2
    moved = F.grid_sample(video.flatten(1, 2), grid, align_corners=False)   # n CT H W
    # Nearest: a mask has no values between 0, 1 and UNTRACED.
    masks = F.grid_sample(masks, grid, mode="nearest", align_corners=False)
    return moved.view_as(video), masks


def random_look(video, rng):
    """Windows (n, C, T, H, W) in [0, 1] with another gain, gamma and blur each."""
    video = video.numpy()
    lowest = [0.7, 0.7, 0]
    highest = [1.3, 1.4, 1]
    draws = rng.uniform(lowest, highest, (len(video), 3))                   # n 3
    gain, gamma, blur = draws.T.reshape(3, -1, 1, 1, 1, 1)                  # n 1 1 1 1, thrice
    smooth = gaussian_filter(video, 1.5, axes=(3, 4), mode="nearest")
    video = video + blur * (smooth - video)
    return torch.from_numpy((gain * video ** gamma).clip(0, 1)).float()


def random_frames(clips, config, step, tokenizer=None):
    """Traced frames, in_context, and their masks (B, 1, H, W): a function of (seed, step)."""
    rng = np.random.default_rng((config.seed, step))
    length = tokenizer.config.frames if tokenizer else WINDOW
    video, masks, traced = draw_windows(clips, config, rng, length)
    if config.augment:
        video, masks = random_place(video, masks, rng)
    # Half of the windows go through the tokenizer. Generated video comes out of its decoder too,
    # and must be measured like true video.
    if tokenizer:
        device = next(tokenizer.parameters()).device
        tokens = tokenizer.encode(video[::2].to(device))
        video[::2] = tokenizer.decode(tokens).cpu()
    video = random_look(video, rng)
    frames = in_context(video, config.context)                              # nT C(2k+1) H W
    masks = masks.flatten(0, 1)                                             # nT H W
    return frames[traced], masks[traced][:, None]


# ---------------------------------------------------------------------------- loss and measures

def segmentation_loss(logits, masks):
    """Binary cross-entropy plus 1 - soft Dice; logits and masks (B, 1, H, W) -> scalar."""
    p = torch.sigmoid(logits)
    overlap = (p * masks).sum((1, 2, 3))                                    # B
    total = (p + masks).sum((1, 2, 3))                                      # B
    # The 1 keeps the Dice of a frame without a ventricle finite.
    dice = (2 * overlap + 1) / (total + 1)                                  # B
    return F.binary_cross_entropy_with_logits(logits, masks) + 1 - dice.mean()


def dice_scores(found, true):
    """Dice of masks (T, H, W) against the true ones, of the frames that have a ventricle: (n,)."""
    overlap = (found * true).sum((1, 2))                                    # T
    size = true.sum((1, 2), dtype=float)                                    # T
    dice = 2 * overlap / (size + found.sum((1, 2)) + 1e-9)
    return dice[size > 0]


def measure_segmenter(model, clips, numbers):
    """Dice of the traced frames, and EF of the found masks against that of the true ones.

    numbers: the clips. Where only some frames of a clip are traced, the target is the set's EF.
    """
    dice, found_ef, true_ef = [], [], []
    for i in tqdm(numbers, desc="val"):
        fps = clips[i]["fps"]
        true = clips.per_frame("mask", i)                                   # T H W
        video = as_video(clips.per_frame("video", i))                       # C T H W
        found = segment(model, video[None])[0]                              # T H W
        traced = is_traced(true)
        dice.append(dice_scores(found[traced], true[traced]))

        _, cycle = measure_masks(found, fps)
        target = clips[i]["ef"]
        if traced.all():
            target = measure_masks(true, fps)[1]["ef"]
        # A heart that stands still has no EF to be compared with.
        if target is not None:
            found_ef.append(cycle["ef"])
            true_ef.append(target)
    mean_dice = median_or_nan(np.concatenate(dice), np.mean)
    return {"dice": mean_dice, **ef_scores(found_ef, true_ef), "clips": len(numbers)}


def main():
    """Train the U-Net on one device; a few minutes are enough."""
    config = parse_flags(TrainConfig)
    refuse_torchrun()
    check_training(config)
    check_folder(config.out)

    # ---- device and seed
    device = init_distributed(config.seed)[0]

    # ---- data
    train = Clips(config.data, "train")
    val = Clips(config.data, "val")

    # ---- model
    shape = replace(model_config(config, SegmenterConfig), channels=train.meta["channels"])
    if config.init_from:
        model = load_weights(config.init_from, "segmenter", Segmenter, SegmenterConfig, shape)
    else:
        model = Segmenter(shape)
    model = model.to(device)
    # After the U-Net: building a model draws random numbers, and the U-Net must not depend on it.
    tokenizer = None
    if config.weights:
        tokenizer = load_weights(config.weights, "tokenizer", Tokenizer, TokenizerConfig)
        tokenizer = tokenizer.eval().to(device)
    print(f"{config}\n{parameter_count(model):.2f}M parameters, {len(train)} clips")

    # ---- optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)

    # ---- loop
    log = Log(config, "segmenter", 0)
    began = time.time()
    for step in count():
        # schedule
        done, lr = schedule(config, step, time.time() - began)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = lr

        # forward and backward
        frames, masks = random_frames(train, config, step, tokenizer)
        masks = masks.to(device)
        with bfloat16(device):
            logits = model(frames.to(device))
        loss = segmentation_loss(logits.float(), masks)

        # step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # log
        if step % 50 == 0:
            log.bar.set_postfix(log.write(step, loss=loss.item(), lr=lr))
        log.bar.update()

    # ---- teardown: save, measure, report
    save_weights(config.out, "segmenter", model, step)
    numbers = choose_clips(val, config.num, config.seed)
    metrics = measure_segmenter(model.eval(), val, numbers)
    log.close(f"segmenter.pt: {step} steps, {log.write(step, **metrics)}")


if __name__ == "__main__":
    run_main(main)
