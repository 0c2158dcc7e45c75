"""EF."""
import math

import numpy as np
from scipy.signal import find_peaks, savgol_filter

SMOOTH_S = 0.1      # half-width of the smoothing: a quadratic fit keeps the extremes that a mean cuts off


def smooth(curve, fps):
    """Savitzky-Golay filter (quadratic, 2 SMOOTH_S long) of a curve (T,)."""
    return savgol_filter(np.asarray(curve, float), 2 * max(1, round(SMOOTH_S * fps)) + 1, 2, mode="nearest")


def swing(curve, fps):
    """95th minus 5th percentile of the smoothed curve."""
    return np.subtract(*np.percentile(smooth(curve, fps), [95, 5]))


def middle(values, statistic=np.median):
    """The median (or mean, ...) of values; nan of none."""
    return float(statistic(values)) if len(values) else math.nan


def ratio(a, b):
    return a / b if b else math.nan
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
