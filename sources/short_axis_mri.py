"""Drawn cardiac MRI cines in short axis: a set that has no ECG and is no echo.

    python -m sources.short_axis_mri --out=datasets/short_axis --size=64 --seed=0

It shows that the stages work without an ECG (train_generator.py --condition=none) and on another
kind of picture. The left ventricle is a bright pool in a dark ring of muscle, with two papillary
muscles; the right ventricle is a crescent beside it. The ring thickens as the pool shrinks, so that
its area stays. Lengths are shares of the picture's width.
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
class ShortAxisMriConfig:
    """Flags of `python -m sources.short_axis_mri`."""
    out: str = "datasets/short_axis"  # folder to write
    clips: int = 2000              # clips in the train split
    val: int = 64                  # clips in the val split
    test: int = 64                 # clips in the test split
    size: int = 64                 # height and width in pixels
    fps: float = 20.0              # frames per second
    frames: int = 32               # frames a clip
    seed: int = 0                  # the same seed gives the same bytes
    workers: int = 0               # processes; 0: one a core


def contraction(rng, frames, fps):
    """How far the heart has contracted in each frame, (T, 1, 1) in 0..1, at a random heart rate."""
    phase = np.arange(frames) / fps / rng.uniform(0.6, 1.2) + rng.random()
    phase = phase[:, None, None] % 1                                    # T 1 1
    # Out within the first 0.38 of a beat, in again until 0.75 of it, then rest
    ramp = np.minimum(phase / 0.38, (0.75 - phase) / 0.37)
    return np.sin(np.pi / 2 * np.clip(ramp, 0, 1)) ** 2


def soft_disk(distance, radius, size):
    """1 where distance < radius, 0 where it is larger, with a soft edge of about a pixel."""
    return 1 / (1 + np.exp((distance - radius) * 1.5 * size))


def list_jobs(config):
    """{split: [(name, seed)]}. The split is part of each seed, so no clip is in two splits."""
    jobs = {"train": [], "val": [], "test": []}
    counts = config.clips, config.val, config.test
    for number, (split, clips) in enumerate(zip(jobs, counts)):
        for i in range(clips):
            jobs[split].append((f"{split}{i:06d}", (config.seed, number, i)))
    return jobs


def make_clip(job, config=ShortAxisMriConfig()):
    """(name, seed) -> the clip as Writer.add takes it: video (T, H, W, 1), mask of the pool (T, H, W)."""
    name, seed = job
    size = config.size
    frames = config.frames
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5)[:, None] / size - 0.5         # 1 H W

    # 1. Radius of the pool, and that of the muscle, whose area stays
    squeeze = contraction(rng, frames, config.fps)                      # T 1 1
    pool = rng.uniform(0.11, 0.16) * (1 - rng.uniform(0.1, 0.5) * squeeze)
    widest = pool.max()
    muscle = np.sqrt(pool ** 2 + (widest + rng.uniform(0.045, 0.08)) ** 2 - widest ** 2)

    # 2. The heart lies off the middle, turned, and a little oval
    centre = rng.uniform(-0.06, 0.06, 2) @ [1, 1j]
    turned = (x + 1j * y - centre) * np.exp(1j * rng.uniform(-0.5, 0.5))
    u = turned.real * rng.uniform(0.9, 1.1)
    v = turned.imag

    # 3. Where each part is, 0..1 (T H W)
    lv = soft_disk(np.hypot(u, v), pool, size)
    heart = soft_disk(np.hypot(u, v), muscle, size)
    rv_radius = 0.13 * (1 - 0.35 * squeeze)
    rv = soft_disk(np.hypot((u + 0.16) / 1.1, v / 1.5), rv_radius, size) * (1 - heart)
    body = soft_disk(np.hypot(x / 1.15, y / 0.9), rng.uniform(0.40, 0.46), size)

    # 4. Paint them over each other, then the papillary muscles into the pool
    texture = gaussian_filter(rng.standard_normal((size, size)), size / 20)
    image = body * (0.32 + 0.12 * texture / texture.std()).clip(0.05, 0.7)
    for part, grey in ((rv, 0.78), (heart, 0.22), (lv, 0.85)):
        image = image + part * (grey * rng.uniform(0.9, 1.1) - image)
    for angle in rng.uniform(-0.4, 0.4, 2) + [0.8, -2.2]:
        at = 0.72 * pool * np.exp(1j * angle)
        image = image - 0.5 * soft_disk(np.hypot(u - at.real, v - at.imag), 0.022, size)

    # 5. Rician noise: the modulus of a complex signal with noise in both parts
    noise = rng.normal(0, rng.uniform(0.01, 0.03), (2, frames, size, size))
    image = np.hypot(image.clip(0) + noise[0], noise[1]).clip(0, 1)     # T H W
    video = (255 * image).round().astype(np.uint8)[..., None]           # T H W 1
    mask = (np.hypot(u, v) < pool).astype(np.uint8)
    return dict(id=name, video=video, mask=mask, fps=config.fps, view="short axis",
                text="short-axis MRI cine")


def main():
    """Write the prepared set."""
    config = parse_flags(ShortAxisMriConfig)
    print(config)
    counts = config.clips, config.val, config.test
    if min(counts) < 0 or config.size < 16 or config.frames < 1 or config.fps <= 0:
        raise UserError("clips, val and test must be 0 or more, size 16 or more, "
                        "frames and fps above 0")
    jobs = list_jobs(config)
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=config.fps,
                height=config.size, width=config.size, channels=1, leads=[],
                source="short_axis_mri",
                command=" ".join(["sources.short_axis_mri", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
