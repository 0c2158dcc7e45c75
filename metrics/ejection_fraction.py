"""LV area and volume curves -> beats and EF; for lv_segmenter, evaluate.py, sample.py, sources.

    masks (T, H, W)  ->  area and volume (T,)  ->  ED frames, ES frames, EF

ED (end-diastole) is the largest ventricle of a beat, ES (end-systole) the smallest. Areas are in
pixels, volumes in pixel^3, EF in points (percent).
"""
import math

import numpy as np
from scipy.signal import find_peaks, savgol_filter

SMOOTH_S = 0.1          # half-width of the smoothing filter, seconds
MIN_AMPLITUDE = 0.05    # a smaller amplitude, as a share of the median area, shows no beats
MIN_DEPTH = 0.12        # every beat, an ectopic one too, falls and rises by this share of it
FULL_DEPTH = 0.3        # only a beat deeper than this share of the amplitude counts for EF
EDGE_S = 0.12           # beats nearer than this to an end of the video do not count, seconds


# ---------------------------------------------------------------------------- statistics

def smooth_curve(curve, fps):
    """Savitzky-Golay filter of a curve (T,): a quadratic fit over SMOOTH_S on both sides."""
    # A moving mean would cut off the maxima and minima. The quadratic fit keeps them.
    half_width = max(1, round(SMOOTH_S * fps))
    return savgol_filter(np.asarray(curve, float), 2 * half_width + 1, 2, mode="nearest")


def amplitude(curve, fps):
    """95th minus 5th percentile of the smoothed curve (T,)."""
    high, low = np.percentile(smooth_curve(curve, fps), [95, 5])
    return high - low


def median_or_nan(values, statistic=np.median):
    """The median of values, or another statistic such as np.mean; nan where there are no values."""
    return float(statistic(values)) if len(values) else math.nan


def ratio(a, b):
    """a / b; nan where b is 0."""
    return a / b if b else math.nan


# ---------------------------------------------------------------------------- masks to curves

def long_axis_positions(mask):
    """Where the pixels of a mask (H, W) lie along its longest direction: (N,), 0 at the centre."""
    pixels = np.argwhere(mask).astype(float)                                # N 2
    pixels -= pixels.mean(0)
    # The eigenvector of the largest eigenvalue comes last.
    _, axes = np.linalg.eigh(pixels.T @ pixels)                             # 2 2
    return pixels @ axes[:, -1]                                             # N


def disk_volume(masks, disks=20):
    """Volume by the single-plane method of disks: masks (T, H, W) -> (T,), pixel^3.

    The long axis is the principal axis of the mask. It is cut into `disks` slices of height h.
    Slice i is a disk whose diameter d_i is its area over h. The volume is pi / 4 times the sum of
    d_i^2 h.
    """
    volumes = np.zeros(len(masks))
    for t, mask in enumerate(masks):
        if np.count_nonzero(mask) < 3:
            continue
        along = long_axis_positions(mask)                                   # N
        edges = np.linspace(along.min() - 0.5, along.max() + 0.5, disks + 1)  # disks+1
        height = edges[1] - edges[0]
        # A pixel at an edge belongs to two slices in part. Counting pixel centres instead would be
        # wrong by up to 13 % at 64 x 64.
        below = np.clip(edges[:, None] - along + 0.5, 0, 1).sum(1)          # disks+1
        area = np.diff(below)                                               # disks
        volumes[t] = math.pi / 4 * np.square(area).sum() / height
    return volumes


# ---------------------------------------------------------------------------- beats and EF

def is_still(area, fps):
    """Whether an area curve (T,) shows no beats: it hardly changes, or only by noise."""
    smoothed = smooth_curve(area, fps)
    # White noise has an amplitude of about 3.2 standard deviations, below the threshold of 6.
    noise = np.std(area - smoothed)
    return amplitude(area, fps) <= max(MIN_AMPLITUDE * np.median(smoothed), 6 * noise)


def find_maxima(curve, prominence, edge):
    """Frames of the prominent maxima of a curve (T,), `edge` or more from its ends; a list."""
    # Put the lowest value before frame 0: then a curve that only falls has a maximum at frame 0.
    padded = np.append(curve.min(), curve)
    at = find_peaks(padded, prominence=prominence)[0] - 1
    inside = (at >= edge) & (at < len(curve) - edge)
    return at[inside].tolist()


def beat_fractions(area, volume, extremes, min_depth):
    """EF in points of each pair of neighbouring extremes that differ by more than min_depth.

    area and volume (T,), smoothed; extremes: ED and ES frames in order. Returns a list.
    """
    fractions = []
    for pair in zip(extremes, extremes[1:]):
        es, ed = sorted(pair, key=area.__getitem__)
        # Two maxima or two minima in a row differ little, as do the shallow (ectopic) beats.
        if area[ed] - area[es] > min_depth and volume[ed] > 0:
            fractions.append(100 * (volume[ed] - volume[es]) / volume[ed])
    return fractions


def cardiac_cycle(area, volume, fps):
    """LV area and volume (T,) -> {"ed_frames": list, "es_frames": list, "ef": points or None}.

    ED and ES are the prominent maxima and minima of the smoothed area, EDGE_S or more from its
    ends. EF is the median of (EDV - ESV) / EDV over neighbouring ED and ES. Shallow (ectopic)
    beats are left out.
    """
    # 1. A constant curve has no beats. Without this check its noise would score.
    if is_still(area, fps):
        return {"ed_frames": [], "es_frames": [], "ef": None}

    # 2. Smooth both curves. The depth of a beat is judged against the amplitude of the area.
    height = amplitude(area, fps)
    area = smooth_curve(area, fps)
    volume = smooth_curve(volume, fps)

    # 3. Find the beats in the area. The volume is noisier: it needs the long axis too.
    edge = round(EDGE_S * fps)
    ed_frames = find_maxima(area, MIN_DEPTH * height, edge)
    es_frames = find_maxima(-area, MIN_DEPTH * height, edge)

    # 4. EF from the volumes at these frames.
    fractions = beat_fractions(area, volume, sorted(ed_frames + es_frames), FULL_DEPTH * height)
    ef = float(np.median(fractions)) if fractions else None
    return {"ed_frames": ed_frames, "es_frames": es_frames, "ef": ef}


def measure_masks(masks, fps):
    """LV masks (T, H, W) of one video -> its area (T,) in pixels, and its cardiac_cycle."""
    area = masks.sum((1, 2), dtype=float)
    return area, cardiac_cycle(area, disk_volume(masks), fps)


def ef_scores(found, target, suffix=""):
    """R2, MAE and RMSE of EFs `found` against `target` (lists, points), as {"ef_r2" + suffix: ...}.

    A pair whose target is unknown (nan) is left out. A video without beats (None) has an EF of 0.
    """
    pairs = [(f or 0, t) for f, t in zip(found, target) if not math.isnan(t)]
    pairs = np.array(pairs).reshape(-1, 2)                                  # N 2
    error = pairs[:, 0] - pairs[:, 1]
    mse = median_or_nan(np.square(error), np.mean)
    variance = median_or_nan(pairs[:, 1], np.var)
    return {
        f"ef_r2{suffix}": 1 - ratio(mse, variance),
        f"ef_mae{suffix}": median_or_nan(np.abs(error), np.mean),
        f"ef_rmse{suffix}": mse ** 0.5,
    }
