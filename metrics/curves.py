"""Figures of pictures (SSIM, edges, a rate-distortion bound) and of curves (correlation, lag, beats)."""
import math

import numpy as np

from metrics.ejection_fraction import smooth


# ---------------------------------------------------------------------------- pictures


# ---------------------------------------------------------------------------- curves

MATCH_S = 0.2       # an R peak and its ED frame are at most so far apart


def pearson(x, y):
    """Correlation of two curves (T,); 0 where one of them is constant."""
    x, y = x - np.mean(x), y - np.mean(y)
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-9 else 0.0


def parabola_top(curve, at):
    """How far from a maximum of a curve (T,), in samples, the parabola through its neighbours has its top."""
    left, top, right = curve[at - 1:at + 2] if 0 < at < len(curve) - 1 else (0, 1, 0)
    return (left - right) / min(2 * (left - 2 * top + right), -1e-9)


def lag_ms(curve, reference, fps, longest_s=0.4):
    """Milliseconds that a curve (T,) comes after its reference: the lag of the best correlation.

    The search is symmetric, so that chance gives 0 in the median; of two lags a whole beat apart, which
    correlate alike, the shorter wins.
    """
    x, y = smooth(curve, fps), smooth(reference, fps)
    T, most = len(x), min(round(longest_s * fps), len(x) // 3)
    lags = np.arange(-most, most + 1)
    r = np.array([pearson(x[max(k, 0):T + min(k, 0)], y[max(-k, 0):T + min(-k, 0)]) for k in lags])
    best = int((r - 0.2 * np.abs(lags) / fps).argmax())
    return 1000 / fps * (lags[best] + parabola_top(r, best))


def match(peaks, times):
    """Indices of R peaks (P,) and ED times (E,) that are each other's nearest, at most MATCH_S apart."""
    if not len(peaks) or not len(times):
        return np.zeros((2, 0), int)
    gap = np.abs(peaks[:, None] - times)                                                    # P E
    i, j = np.arange(len(peaks)), gap.argmin(1)
    good = (gap.argmin(0)[j] == i) & (gap[i, j] <= MATCH_S)
    return i[good], j[good]


