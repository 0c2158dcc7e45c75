"""Two curves compared: correlation, lag, matched beats; for synchrony and echonet_dynamic."""
import math

import numpy as np

from metrics.ejection_fraction import smooth_curve

MATCH_S = 0.2       # an R peak and its ED frame are at most this far apart, seconds
LAG_COST = 0.2      # taken off the correlation for each second of lag: short lags are preferred


def pearson(x, y):
    """Pearson correlation of two curves (T,); 0 where one of them is constant."""
    x = x - np.mean(x)
    y = y - np.mean(y)
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 1e-9 else 0.0


def parabola_top(curve, at):
    """Samples from a maximum of a curve (T,), at index `at`, to the top of a parabola fitted there.

    The parabola goes through the maximum and its two neighbours. At an end of the curve it is 0.
    """
    if not 0 < at < len(curve) - 1:
        return 0.0
    left, top, right = curve[at - 1:at + 2]
    # The second difference is negative at a maximum. The bound avoids a division by 0 on a plateau.
    bend = min(2 * (left - 2 * top + right), -1e-9)
    return (left - right) / bend


def lag_ms(curve, reference, fps, longest_s=0.4):
    """Milliseconds by which a curve (T,) comes after its reference: the lag of best correlation.

    Lags up to longest_s are tried in both directions. Two unrelated curves give 0 in the median.
    """
    x = smooth_curve(curve, fps)
    y = smooth_curve(reference, fps)
    T = len(x)
    longest = min(round(longest_s * fps), T // 3)
    lags = np.arange(-longest, longest + 1)                                 # K

    # Correlate what overlaps after a shift by k frames.
    correlations = []
    for k in lags:
        later = x[max(k, 0):T + min(k, 0)]
        earlier = y[max(-k, 0):T + min(-k, 0)]
        correlations.append(pearson(later, earlier))
    correlations = np.array(correlations)                                   # K

    # Lags a whole beat apart correlate alike: the cost makes the shorter one win.
    best = int((correlations - LAG_COST * np.abs(lags) / fps).argmax())
    return 1000 / fps * (lags[best] + parabola_top(correlations, best))


def match(peaks, times):
    """Pairs of R peaks (P,) and ED times (E,), seconds, that belong to each other.

    Returns indices into peaks and indices into times, of equal length. Each of a pair is the
    nearest to the other, and they are at most MATCH_S apart.
    """
    if not len(peaks) or not len(times):
        return np.zeros((2, 0), int)
    gap = np.abs(peaks[:, None] - times)                                    # P E
    i = np.arange(len(peaks))                                               # P
    nearest_time = gap.argmin(1)                                            # P
    nearest_peak = gap.argmin(0)                                            # E
    mutual = nearest_peak[nearest_time] == i
    good = mutual & (gap[i, nearest_time] <= MATCH_S)
    return i[good], nearest_time[good]
