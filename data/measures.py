"""Figures of pictures (SSIM, edges, a rate-distortion bound) and of curves (correlation, lag, beats)."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import savgol_filter


# ---------------------------------------------------------------------------- pictures

def gaussian(x, size=11, sigma=1.5):
    """Gaussian filter without padding: (B, C, H, W) -> (B, C, H - size + 1, W - size + 1)."""
    C, t = x.shape[1], torch.arange(size, device=x.device) - size // 2
    k = torch.exp(-t.square() / (2 * sigma ** 2))
    k = (k / k.sum()).expand(C, 1, 1, size)
    return F.conv2d(F.conv2d(x, k, groups=C), k.transpose(2, 3), groups=C)


def ssim(x, y, K1=0.01, K2=0.03):
    """Structural similarity (Wang et al. 2004) of frames (B, C, H, W) in [0, 1] -> (B,)."""
    mx, my, xx, yy, xy = map(gaussian, (x, y, x * x, y * y, x * y))
    top = (2 * mx * my + K1 ** 2) * (2 * (xy - mx * my) + K2 ** 2)
    bottom = (mx * mx + my * my + K1 ** 2) * (xx - mx * mx + yy - my * my + K2 ** 2)
    return (top / bottom).mean((1, 2, 3))


def rate_distortion_bound(covariance, bits):
    """Least mean squared error, per number, of a Gaussian vector of covariance (n, n) at `bits` a vector.

    Reverse water-filling (Cover and Thomas, 10.3): components above the level theta keep an error of theta
    and share the bits, sum of max(0, log2(lambda / theta) / 2) = bits; the others are not coded at all.
    """
    lam = np.linalg.eigvalsh(covariance)[::-1].clip(1e-12)      # largest first
    # theta if just the k largest were coded; the right k is the one that needs the highest level
    theta = 2 ** ((np.cumsum(np.log2(lam)) - 2 * bits) / np.arange(1, len(lam) + 1))
    return np.minimum(theta.max(), lam).mean()


def edge_energy(x):
    """Sum of the squared differences of neighbouring pixels of frames (B, C, H, W)."""
    return x.diff(dim=-1).square().sum() + x.diff(dim=-2).square().sum()


# ---------------------------------------------------------------------------- curves

SMOOTH_S = 0.1      # half-width of the smoothing: a quadratic fit keeps the extremes that a mean cuts off
MATCH_S = 0.2       # an R peak and its ED frame are at most so far apart


def smooth(curve, fps):
    """Savitzky-Golay filter (quadratic, 2 SMOOTH_S long) of a curve (T,)."""
    return savgol_filter(np.asarray(curve, float), 2 * max(1, round(SMOOTH_S * fps)) + 1, 2, mode="nearest")


def swing(curve, fps):
    """95th minus 5th percentile of the smoothed curve."""
    return np.subtract(*np.percentile(smooth(curve, fps), [95, 5]))


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


def middle(values, statistic=np.median):
    """The median (or mean, ...) of values; nan of none."""
    return float(statistic(values)) if len(values) else math.nan


def ratio(a, b):
    return a / b if b else math.nan
