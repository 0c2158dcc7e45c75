r"""A cardiac MRI cine in short axis, drawn by a few lines: a set without an ECG that is no echo either.

    python -m sources.short_axis_mri --out=datasets/short_axis
    python train_tokenizer.py --data=datasets/short_axis --out=runs/mri --minutes=4
    python train_generator.py --condition=none --data=datasets/short_axis --weights=runs/mri --out=runs/mri \
        --minutes=8
    python sample.py --weights=runs/mri

The left ventricle is a bright pool in a dark ring that thickens as the pool shrinks (its area stays), with
two papillary muscles; the right ventricle is a crescent beside it. Lengths are shares of the picture's width.
"""
import os
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.ndimage import gaussian_filter

from common.flags import UserError, parse_flags, run_main
from data.writer import prepare


@dataclass
class ShortAxisConfig:
    out: str = "datasets/short_axis"  # folder to write
    clips: int = 2000              # clips in the train split
    val: int = 64                  # clips in the val split
    test: int = 64                 # clips in the test split
    size: int = 64                 # height and width in pixels
    fps: float = 20.0              # frames per second
    frames: int = 32               # frames a clip
    seed: int = 0                  # the same seed gives the same bytes
    workers: int = 0               # processes; 0: one a core


def make_clip(job, size=64, frames=32, fps=20.0):
    """(name, seed) -> a clip as Writer.add takes it: video (T, H, W, 1) uint8, mask of the pool (T, H, W)."""
    name, seed = job
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5)[:, None] / size - 0.5                             # 1 H W
    phase = (np.arange(frames) / fps / rng.uniform(0.6, 1.2) + rng.random())[:, None, None] % 1   # T 1 1
    # out within the first 0.38 of a beat, in again until 0.75 of it, then rest
    squeeze = np.sin(np.pi / 2 * np.clip(np.minimum(phase / 0.38, (0.75 - phase) / 0.37), 0, 1)) ** 2
    pool = rng.uniform(0.11, 0.16) * (1 - rng.uniform(0.1, 0.5) * squeeze)                  # radius, T 1 1
    muscle = np.sqrt(pool ** 2 + (pool.max() + rng.uniform(0.045, 0.08)) ** 2 - pool.max() ** 2)
    turned = (x + 1j * y - rng.uniform(-0.06, 0.06, 2) @ [1, 1j]) * np.exp(1j * rng.uniform(-0.5, 0.5))
    u, v = turned.real * rng.uniform(0.9, 1.1), turned.imag
    inside = lambda distance, radius: 1 / (1 + np.exp((distance - radius) * 1.5 * size))    # noqa: E731
    lv, heart = inside(np.hypot(u, v), pool), inside(np.hypot(u, v), muscle)
    right = inside(np.hypot((u + 0.16) / 1.1, v / 1.5), 0.13 * (1 - 0.35 * squeeze)) * (1 - heart)
    body = inside(np.hypot(x / 1.15, y / 0.9), rng.uniform(0.40, 0.46))
    texture = gaussian_filter(rng.standard_normal((size, size)), size / 20)
    image = body * (0.32 + 0.12 * texture / texture.std()).clip(0.05, 0.7)
    for shape, grey in ((right, 0.78), (heart, 0.22), (lv, 0.85)):
        image = image + shape * (grey * rng.uniform(0.9, 1.1) - image)
    for angle in rng.uniform(-0.4, 0.4, 2) + [0.8, -2.2]:
        at = 0.72 * pool * np.exp(1j * angle)
        image = image - 0.5 * inside(np.hypot(u - at.real, v - at.imag), 0.022)
    noise = rng.normal(0, rng.uniform(0.01, 0.03), (2, frames, size, size))                 # Rician
    image = np.hypot(image.clip(0) + noise[0], noise[1]).clip(0, 1)
    return dict(id=name, fps=fps, view="short axis", video=(255 * image).round().astype(np.uint8)[..., None],
                mask=(np.hypot(u, v) < pool).astype(np.uint8), text="short-axis MRI cine")


def main():
    cfg = parse_flags(ShortAxisConfig)
    counts = dict(train=cfg.clips, val=cfg.val, test=cfg.test)
    if min(counts.values()) < 0 or cfg.size < 16 or cfg.frames < 1 or cfg.fps <= 0:
        raise UserError("clips, val and test must be 0 or more, size 16 or more, frames and fps above 0")
    meta = dict(name=os.path.basename(cfg.out.rstrip("/")), fps=cfg.fps, height=cfg.size, width=cfg.size,
                channels=1, leads=[], source="short_axis_mri",
                command=" ".join(["sources.short_axis_mri", *sys.argv[1:]]))
    jobs = {split: [(f"{split}{i:06d}", (cfg.seed, s, i)) for i in range(n)]
            for s, (split, n) in enumerate(counts.items())}
    make = partial(make_clip, size=cfg.size, frames=cfg.frames, fps=cfg.fps)
    prepare(cfg.out, meta, jobs, make, cfg.workers)


if __name__ == "__main__":
    run_main(main)
