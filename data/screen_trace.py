"""Follow the ECG through a long strip of the screen. The third step of data/screen_ecg.py.

    trace_ecg(image (U, h), pace) -> Trace: in which row the line is, in each of the U columns

The strip may show other lines, too: a breath, an axis. The ECG is the one with QRS complexes.
"""
from typing import NamedTuple

import numpy as np
from scipy.ndimage import (find_objects, gaussian_filter1d, label, maximum_filter1d, median_filter,
                           minimum_filter1d, uniform_filter1d)
from scipy.signal import butter, sosfiltfilt

from common.flags import UserError
from data.dataset import ECG_HZ

LINES = 4           # lines in the strip that are looked at
STEEP = 0.15        # cost of a step of one row through the dark, in columns of a dark line
QRS_BAND = butter(2, (5, 25), "bandpass", fs=ECG_HZ, output="sos")
LEAST_QRS = 2.5     # pixels: what is lower in that band is no QRS complex
LEAST_CREST = 5     # QRS complexes against the rest: an ECG has 8 or more, a breath less than 4
LEAST_SHARE = 0.4   # of the bright pixels that belong to the line
TOUCH = 6           # rows between two lines of which a path may go from one to the other
LONGEST_QRS_S = 0.12    # a QRS complex is shorter than this at half its height
LONGEST_WAVE_S = 0.3    # the waves of an ECG are shorter than this at half the height of R


class Line(NamedTuple):
    """One line in the long strip."""
    rows: np.ndarray    # (U,) NaN where it is not seen
    inked: np.ndarray   # (U, h) bool, its pixels
    level: float        # its brightness


class Trace(NamedTuple):
    """The ECG in the long strip."""
    rows: np.ndarray    # (U,) NaN where no line is seen
    crest: float        # how much the QRS complexes stand out
    y0: int             # first row of all that is drawn along with it
    y1: int             # behind the last


def trace_ecg(image, pace):
    """The Trace in a long strip (U, h) of `pace` columns a second; UserError: it shows no ECG."""
    U = len(image)
    image = even_brightness(image)
    left = image.copy()
    brightest = 0
    lines = []
    for _ in range(LINES):
        path = least_cost_path(left)
        strength = gaussian_filter1d(left[np.arange(U), path], 6)
        level = float(np.percentile(strength, 70))
        if level < max(0.3 * brightest, 3):
            break
        brightest = max(brightest, level)
        rows, inked = follow_line(left, path, level)
        rows[strength < 0.3 * level] = np.nan
        lines.append(Line(rows, inked, level))
        # The next path is another line
        for u in range(U):
            left[u, max(0, path[u] - 3):path[u] + 4] = 0
    line, crest = find_ecg(lines, pace)
    for other in lines:
        line = take_back(line, other, pace)
    y0, y1 = check_single_line(image > 0.9 * line.level, line.inked)
    return Trace(leave_out_text(line, pace), crest, y0, y1)


def find_ecg(lines, pace):
    """The Line that is the ECG, and how much its QRS complexes stand out; UserError: there is
    none."""
    brightest = max((line.level for line in lines), default=0)
    best = None
    best_height = 0
    for line in lines:
        height, crest = qrs_height(line.rows, pace)
        # The highest QRS complexes: an axis has what is left of S waves. A fainter path may jump
        # between lines.
        height *= line.level / brightest
        if crest > LEAST_CREST and height > 1.4 * best_height:
            best = line, crest
            best_height = height
    if best is None:
        raise UserError("no line with QRS complexes is found in what moves")
    return best


def take_back(line, other, pace):
    """The Line with what it has lost to another one.

    A path that meets another line at the foot of an S wave may go on along that line, and come
    back at a later beat. The other path then has the beats between.
    """
    # A faint path is speckle
    if other.level < 0.7 * line.level:
        return line
    own_waves = narrow_waves(line.rows, pace)                           # U
    other_waves = narrow_waves(other.rows, pace)                        # U
    # Half the height of a QRS complex
    least = 0.5 * np.percentile(own_waves, 99)
    meet = np.abs(line.rows - other.rows) <= TOUCH
    parts, _ = label(~meet)
    taken = np.zeros(len(meet), bool)
    for part in find_objects(parts):
        place = part[0]
        # Lines that never meet lose nothing to each other
        is_whole = place.stop - place.start == len(meet)
        is_seen = np.isfinite(other.rows[place]).mean() > 0.9
        is_lost = own_waves[place].max() < least < other_waves[place].max()
        taken[place] = is_lost and is_seen and not is_whole
    return Line(rows=np.where(taken, other.rows, line.rows),
                inked=np.where(taken[:, None], other.inked, line.inked), level=line.level)


def narrow_waves(rows, pace):
    """How far a line (U,) of `pace` columns a second is from where it is around, (U,) pixels.

    A QRS complex is narrow; a breath and a T wave are wide.
    """
    known = np.isfinite(rows)
    filled = np.interp(np.arange(len(rows)), np.flatnonzero(known), rows[known])
    return np.abs(filled - median_filter(filled, 2 * round(LONGEST_WAVE_S * pace / 2) + 1))


def even_brightness(image):
    """The long strip (U, h) with 100 where a line is, however bright, and less where none is.

    A half transparent line is less bright over the sector than beside it.
    """
    # Half as bright as the lines around it will do, but not what all of the strip is full of
    usual = median_filter(image.max(1), 61)
    if not usual.any():
        raise UserError("no line is seen in what moves")
    noise = np.percentile(image[usual > 0], 90)
    full = np.maximum(0.5 * usual, 0.15 * np.percentile(usual, 80))
    full = np.maximum(full, 6 * noise) + 1e-3
    return 100 * np.minimum(image / full[:, None], 1)


def check_single_line(bright, inked):
    """Rows y0, y1 of all that is drawn around a line.

    bright (U, h) bool: the pixels of the strip, inked (U, h): those of the line. UserError where
    most of the strip is something else.
    """
    used = np.flatnonzero(inked.any(0))
    y0 = max(0, used[0] - 24)
    y1 = used[-1] + 25
    share = (inked & bright).sum() / max(bright[:, y0:y1].sum(), 1)
    if share < LEAST_SHARE:
        raise UserError("what moves is no single thin line")
    # R marks, ticks and an axis, up to 40 rows away, belong to the strip
    drawn = np.flatnonzero(bright.sum(0) > 2)
    y0, y1 = used[0], used[-1]
    for row in drawn[::-1]:
        if y0 - 14 < row < y0 and row > used[0] - 40:
            y0 = row
    for row in drawn:
        if y1 < row < y1 + 14 and row < used[-1] + 40:
            y1 = row
    return int(y0) - 4, int(y1) + 5


# ---------------------------------------------------------------------------- one line

def least_cost_path(image):
    """The row (U,) of the brightest connected path through image (U, h).

    A step up or down costs little along a bright line, and STEEP a row where it is dark.
    """
    U, h = image.shape
    full = max(np.median(image.max(1)), 1)
    dark = 1 - np.minimum(image / full, 1)                              # 0 on the line, 1 beside it
    # What the way down to each row costs, in each column
    ways = np.cumsum(STEEP * (dark + 0.05), 1)
    number = np.arange(h)
    total = dark[0]
    came_from = np.zeros((U, h), int)
    for u in range(1, U):
        # 1. The cheapest way from a row above: the running minimum of what it costs to start there
        cost = total - ways[u]
        above = np.minimum.accumulate(cost)
        row_above = np.maximum.accumulate(np.where(cost <= above, number, 0))
        # 2. From a row below
        cost = (total + ways[u])[::-1]
        below = np.minimum.accumulate(cost)
        row_below = h - 1 - np.maximum.accumulate(np.where(cost <= below, number, 0))
        # 3. The cheaper of the two
        above = above + ways[u]
        below = below[::-1] - ways[u]
        came_from[u] = np.where(above <= below, row_above, row_below[::-1])
        total = np.minimum(above, below) + dark[u]
    path = np.zeros(U, int)
    path[-1] = total.argmin()
    for u in range(U - 1, 0, -1):
        path[u - 1] = came_from[u, path[u]]
    return path


def follow_line(image, path, level):
    """Row (U,) of the line that the path goes along, and its pixels (U, h) bool. level: its
    brightness."""
    h = image.shape[1]
    top, bottom = line_ends(image > 0.35 * level, path)                 # U each
    row = np.arange(h)
    inked = (row >= top[:, None] - 1) & (row <= bottom[:, None] + 1)
    # Where the line is steep it runs through many rows of a column: at a peak the end of them
    # counts, on the way up or down the middle
    thickness = max(1, int(np.percentile(bottom - top, 25)))
    steep = bottom - top >= 2 * thickness
    base = np.median(path)
    highest = steep & (top <= minimum_filter1d(top, 3))
    lowest = steep & (bottom >= maximum_filter1d(bottom, 3))
    both = highest & lowest
    upwards = base - top > bottom - base
    highest &= ~both | upwards
    lowest &= ~both | ~upwards
    rows = (top + bottom) / 2
    rows[highest] = top[highest] + thickness / 2
    rows[lowest] = bottom[lowest] - thickness / 2
    # A thick line has wide peaks: a mean over as many columns puts their top in the middle
    return uniform_filter1d(rows, thickness), inked


def line_ends(mask, path):
    """First and last row (U,) each, of the line in every column of mask (U, h)."""
    U = len(path)
    # No run of pixels goes beyond the ends
    mask = np.pad(mask, ((0, 0), (1, 1)))
    ends = np.stack([path, path], 1)
    found = np.zeros(U, bool)
    for u in range(U):
        run = touching_run(mask[u], path[u] - 1, path[u] + 1)
        if run:
            ends[u] = run
            found[u] = True
    # A wave that the path cuts off touches the line in the next column, to the left or to the right
    for order in (range(1, U), range(U - 2, -1, -1)):
        for u in order:
            before = u - order.step
            if found[u] or not found[before]:
                continue
            run = touching_run(mask[u], ends[before, 0] - 1, ends[before, 1] + 1)
            if run:
                ends[u] = run
                found[u] = True
    return ends.T.astype(float)


def touching_run(mask, first, last):
    """First and last row of the pixels of a column that touch its rows first..last; None if none.

    mask: (1 + h + 1,), with an empty row before and after the column.
    """
    near = np.flatnonzero(mask[max(first, 0) + 1:last + 2])
    if not len(near):
        return None
    y0 = max(first, 0) + near[0]
    y1 = max(first, 0) + near[-1]
    while mask[y0]:
        y0 -= 1
    while mask[y1 + 2]:
        y1 += 1
    return y0, y1


def leave_out_text(line, pace):
    """The rows (U,) of a Line of `pace` columns a second, NaN where it has left the ECG.

    A path that runs into a text or onto another line stays away from the base of the ECG, to which
    a QRS complex comes back at once. The QRS complex from which it has left is hidden, too.
    """
    rows = line.rows
    distance = np.abs(rows - np.nanmedian(rows))                        # U
    # Half the height of a QRS complex; NaN is not away
    away = distance > 0.5 * np.percentile(narrow_waves(rows, pace), 98)
    is_cut = find_cuts(line)                                            # U + 1
    margin = round(LONGEST_WAVE_S * pace / 2)
    left = rows.copy()
    runs, _ = label(away)
    for run in find_objects(runs):
        start, stop = run[0].start, run[0].stop
        # A line that jumps to where it is, or ends there, is no wave
        longest = LONGEST_WAVE_S
        if is_cut[start] or is_cut[stop]:
            longest = LONGEST_QRS_S
        if stop - start > longest * pace:
            left[max(0, start - margin):stop + margin] = np.nan
    return left


def find_cuts(line):
    """Where a Line begins, ends or jumps: (U + 1,) bool, True = between columns u - 1 and u."""
    U, h = line.inked.shape
    row = np.arange(h)
    top = np.where(line.inked, row, h).min(1)                           # U
    bottom = np.where(line.inked, row, -1).max(1)                       # U
    # The pixels of a line touch those of the next column
    jumps = (top[1:] > bottom[:-1] + TOUCH) | (bottom[1:] < top[:-1] - TOUCH)
    known = np.isfinite(line.rows)
    is_cut = np.ones(U + 1, bool)
    is_cut[1:U] = jumps | ~known[1:] | ~known[:-1]
    return is_cut


# ---------------------------------------------------------------------------- the signal

def to_signal(rows, tau):
    """Rows (U,) at times tau (U,) s -> how high the line is (N,) at 250 Hz, NaN where it is not
    known, and the time of sample 0."""
    known = np.isfinite(rows)
    tau = tau[known]
    time = np.arange(int((tau[-1] - tau[0]) * ECG_HZ) + 1) / ECG_HZ + tau[0]
    # 6 ms smooth the steps from pixel to pixel
    signal = gaussian_filter1d(-np.interp(time, tau, rows[known]), 1.5)
    after = np.searchsorted(tau, time).clip(1, len(tau) - 1)
    distance = np.minimum(np.abs(time - tau[after]), np.abs(time - tau[after - 1]))
    signal[distance > 0.03] = np.nan
    return signal, float(tau[0])


def qrs_height(rows, pace):
    """Height in pixels of the QRS complexes of a line (U,), and how many times the rest it is."""
    if np.isfinite(rows).sum() < pace / 2:
        return 0.0, 0.0
    signal, _ = to_signal(rows, np.arange(len(rows)) / pace)
    signal = np.where(np.isfinite(signal), signal, np.nanmedian(signal))
    x = np.abs(sosfiltfilt(QRS_BAND, signal))
    height = float(np.percentile(x, 99))
    if height < LEAST_QRS:
        return height, 0.0
    return height, float(height / max(np.median(x), 0.25))
