"""Find where on the screen of a cine an ECG may be written. The first step of data/screen_ecg.py.

    find_candidates(feature (T, H, W) uint8, times (T,) s) -> [Candidate], the likeliest first

The search is for what moves evenly, each of three ways at a resolution of about 350 columns:

    sweep    the writing point changes the columns one after the other: in the plane of column and
             time the changes lie on a straight line, found by a Hough transform
    cursor   the same for pixels that are brighter for a moment than they usually are
    scroll   rows that look like themselves some time later, moved to the left

T frames, H x W pixels of the screen, h x w of the reduced one. A pace is in pixels a second.
"""
from typing import NamedTuple

import numpy as np
from scipy.fft import rfft, rfftfreq
from scipy.ndimage import uniform_filter, uniform_filter1d

PACES = np.exp(np.arange(np.log(38), np.log(720), 0.012))   # pixels a second that are tried
SIDE = 7            # pixels beside a line: it is brighter than their mean
NEXT = 7            # pixels from the middle of a line to the middle of these
BLOCK = 8           # rows of the reduced screen that are searched as one
# Scores of what is looked at further. Speckle and moving tissue reach 15, 20 and 35; the weakest
# phantom strips 19, 45 and 60.
LEAST_SCORE = dict(sweep=18, cursor=25, scroll=45)


class Candidate(NamedTuple):
    """A place where something moves evenly."""
    score: float
    kind: str               # sweep, cursor or scroll
    pace: float             # pixels a second
    start: float            # column of the writing point or cursor at time 0
    rows: tuple             # (y0, y1)


def find_candidates(feature, times, regions=()):
    """[Candidate] in feature (T, H, W) uint8, the likeliest first. regions: see read_screen_ecg."""
    T, H, W = feature.shape
    reduce = max(1, round(W / 350))
    h = H // reduce
    w = W // reduce
    x = np.zeros((T, h, w), np.float32)
    for y in range(reduce):
        for column in range(reduce):
            x += feature[:, y:h * reduce:reduce, column:w * reduce:reduce]
    x /= reduce ** 2
    x = x - uniform_filter(x, (1, 9, 9))
    changes, middles = change_map(x, times)
    found = [
        find_line("sweep", changes, middles, reduce),
        find_line("cursor", anomaly_map(x), times, reduce),
        find_scroll(x, times, reduce),
    ]
    found = [candidate for candidate in found if candidate.score > LEAST_SCORE[candidate.kind]]
    return sorted((prefer_regions(candidate, regions) for candidate in found), reverse=True)


def prefer_regions(candidate, regions):
    """The candidate, with a higher score if it lies in one of the regions (x0, y0, x1, y1)."""
    y0, y1 = candidate.rows
    for region in regions:
        if y0 < region[3] and y1 > region[1]:
            return candidate._replace(score=1.5 * candidate.score)
    return candidate


def find_ridges(feature):
    """How much brighter each pixel of feature (..., h, W) is than what is to both its sides, above
    and below or left and right: float32, 0 or more. So it shows lines.

    The edge of the sector is no line, since one of its sides is as bright.
    """
    x = feature.astype(np.float32)
    ridges = np.zeros_like(x)
    for axis in (-2, -1):
        side = uniform_filter1d(x, SIDE, axis)
        sides = np.maximum(np.roll(side, NEXT, axis), np.roll(side, -NEXT, axis))
        ridges = np.maximum(ridges, x - sides)
    return ridges


# ---------------------------------------------------------------------------- what moves

def change_map(x, times):
    """How much the pixels of x (T, h, w) change from each frame to the next, against their usual
    change: (T - 1, h, w), and the times between the frames (T - 1,)."""
    T = len(x)
    # Means over 0.12 s before and after: speckle changes less in the mean, a trace that is written
    # or erased as much
    window = max(1, round(0.12 * (T - 1) / times[-1]))
    total = np.concatenate([np.zeros_like(x[:1]), np.cumsum(x, 0)])
    i = np.arange(1, T)
    after = np.minimum(i + window, T)
    before = np.maximum(i - window, 0)
    change = (total[after] - total[i]) / (after - i)[:, None, None]
    change -= (total[i] - total[before]) / (i - before)[:, None, None]
    change **= 2
    change /= np.median(change, 0) + 9
    return np.minimum(change, 20), (times[1:] + times[:-1]) / 2


def anomaly_map(x):
    """How much brighter than usual each pixel of x (T, h, w) is, against its usual change."""
    excess = np.clip(x - np.median(x, 0), 0, None) ** 2
    excess /= np.median(excess, 0) + 0.5 * excess.mean(0) + 30
    return np.minimum(excess, 20)


def find_line(kind, z, times, reduce):
    """The Candidate whose line, column = start + pace * time, has most of z (T, h, w) on it."""
    T, h, w = z.shape
    z = z[:, :h // BLOCK * BLOCK, :w // 2 * 2].reshape(T, h // BLOCK, BLOCK, w // 2, 2).mean((2, 4))
    # What is always bright would be bright on every line
    z = z - z.mean(0)                                                   # T blocks columns
    variance = np.cumsum(np.append(0, (z.std((0, 2)) + 0.01) ** 2))
    step = 2 * reduce                                                   # pixels of a column of z
    best = Candidate(0.0, kind, 0.0, 0.0, (0, 0))
    for pace in PACES:
        sums, counts, pad = line_sums(z, times, pace / step)            # blocks starts
        total = np.cumsum(np.pad(sums, ((1, 0), (0, 0))), 0)
        for blocks in (3, 6, 10):
            # The sum of that many blocks, in standard deviations of what chance would give
            score = total[blocks:] - total[:-blocks]
            spread = (variance[blocks:] - variance[:-blocks])[:, None] * np.maximum(counts, 1)
            score /= np.sqrt(spread)
            score[:, counts < 5] = 0
            # A low screen has fewer blocks: then there is no score.
            if score.max(initial=0) > best.score:
                block, column = np.unravel_index(score.argmax(), score.shape)
                start = float((column - pad) * step)
                best = Candidate(float(score.max()), kind, float(pace), start,
                                 block_rows(block, blocks, reduce))
    return best


def block_rows(first, blocks, reduce):
    """(y0, y1) in pixels of the screen, of some blocks of rows."""
    height = BLOCK * reduce
    return int(first * height), int((first + blocks) * height)


def line_sums(z, times, pace):
    """Sums of z (T, blocks, columns) along the lines column = start + pace * time: (blocks,
    starts); how many cells each line has (starts,); how many starts come before column 0."""
    T, blocks, columns = z.shape
    pad = int(pace * times[-1]) + 2
    sums = np.zeros((blocks, columns + pad), np.float32)
    counts = np.zeros(columns + pad)
    for t in range(T):
        first = pad - round(pace * times[t])
        sums[:, first:first + columns] += z[t]
        counts[first:first + columns] += 1
    return sums, counts, pad


# ---------------------------------------------------------------------------- what scrolls

def shift_correlation(x, times, lag, paces):
    """Correlation (h, paces) of the rows of x (T, h, w) with themselves `lag` seconds later, moved
    to the left at each of the paces (pixels of x a second)."""
    T, h, w = x.shape
    later = np.searchsorted(times, times + lag - 1e-6)
    first = np.flatnonzero(later < T)
    # In the spectrum a shift is a turn of the phase, so it needs no whole pixels
    spectrum = rfft(x, 2 * w)                                           # T h k
    frequency = 2 * np.pi * rfftfreq(2 * w)
    # The half that rfft leaves out counts as much
    weight = np.full(len(frequency), 2, np.float32)
    weight[0] = 1
    total = np.zeros((h, len(paces)))
    for i in first:
        seconds = times[later[i]] - times[i]
        cross = np.conj(spectrum[i]) * spectrum[later[i]] * weight      # h k
        turn = np.exp(-1j * np.outer(frequency, paces * seconds)).astype(np.complex64)
        total += (cross @ turn).real
    energy = (np.abs(spectrum) ** 2 * weight).sum(-1)                   # T h
    norm = np.sqrt(energy[first].sum(0) * energy[later[first]].sum(0))
    return total / np.maximum(norm, 1)[:, None]


def find_scroll(x, times, reduce):
    """The Candidate whose rows of x (T, h, w) move to the left at an even pace.

    Its score is the share of the movement that is explained so, in percent.
    """
    h = x.shape[1] // BLOCK * BLOCK
    x = x[:, :h].clip(0)
    x = x - np.median(x, 0)
    paces = PACES[::2]
    like = shift_correlation(x, times, 0.2, paces / reduce)             # h paces
    # Rows count by how much moves in them
    power = (x ** 2).sum((0, 2))
    like = (like * power[:, None]).reshape(h // BLOCK, BLOCK, -1).sum(1)
    power = power.reshape(h // BLOCK, BLOCK).sum(1) + x.shape[0] * x.shape[2]
    like = np.cumsum(np.pad(like, ((1, 0), (0, 0))), 0)
    power = np.cumsum(np.append(0, power))
    best = Candidate(0.0, "scroll", 0.0, 0.0, (0, 0))
    for blocks in (2, 4, 8):
        share = (like[blocks:] - like[:-blocks]) / (power[blocks:] - power[:-blocks])[:, None]
        # What stands still is like itself at the lowest pace, too
        score = 100 * (share - share[:, :1])
        if score.max(initial=0) > best.score:
            block, i = np.unravel_index(score.argmax(), score.shape)
            best = Candidate(float(score.max()), "scroll", float(paces[i]), 0.0,
                             block_rows(block, blocks, reduce))
    return best
