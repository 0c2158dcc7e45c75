"""Which time of the ECG each column of each frame shows. The second step of data/screen_ecg.py.

    fit_sweep, fit_cursor, fit_scroll (band (T, h, W), times (T,) s, Candidate) -> Clock

The pace and the place of the writing point, cursor or right edge are measured in each frame, to a
fraction of a pixel over all. Then `unfold` puts the columns of all frames at their own times, into
one long strip, and averages them there. The trace adds up; speckle under it moves in another way
and does not.

T frames; h x W pixels of a band of the screen; U columns of the long strip, one pixel each.
"""
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d, median_filter

from common.flags import UserError
from data.screen_search import change_map, find_ridges, line_sums, shift_correlation
from data.screen_trace import least_cost_path

REACH = 60          # pixels around the expected writing point in which it is looked for
SAME = 0.5          # alike before and after: a cursor has passed a trace, and no new sweep
CURSOR = 8          # pixels to both sides of a cursor that it may cover
LONGEST_GAP = 45    # pixels
SHARP = 4           # so many pixels behind its end a trace has less than 0.3 of its brightness
SIDE = 20           # pixels of trace before the writing point that are compared with the gap


class Clock(NamedTuple):
    """Which time of the ECG each column of the long strip shows, and of each frame."""
    tau: np.ndarray     # (U,) time of each column in s, on the frames' clock
    columns: np.ndarray  # (T, W) column of the long strip that each column of a frame shows, or -1
    pace: float         # columns a second
    x0: int             # first column of the trace on the screen
    x1: int             # behind the last
    match: float        # how well the frames agree with it, 0 to 1


class Sweep(NamedTuple):
    """The writing point is at column start + pace * time - length * (whole sweeps)."""
    pace: float
    start: float
    length: float       # pixels from one sweep to the next
    x0: int             # first column of the trace
    x1: int             # behind the last
    gap: float          # pixels after the writing point without a trace
    match: float        # by how much the trace is there before the writing point and not after it
    error: float        # pixels by which the writing point is off its line in half of the frames
    main: int           # whole sweeps before the one that most frames show
    is_measured: bool   # other sweeps are seen too, so the length is known; else it is a guess


def unfold(band, columns, U):
    """Mean (U, h) of band (T, h, W), column x of frame t at columns[t, x]; 0 where nothing is."""
    image = np.zeros((U, band.shape[1]), np.float32)
    counts = np.zeros(U)
    for t in range(len(band)):
        x = np.flatnonzero((columns[t] >= 0) & (columns[t] < U))
        u = columns[t, x]
        image[u] += band[t][:, x].T
        counts[u] += 1
    return image / np.maximum(counts, 1)[:, None]


def find_extent(pictures, crossed, percent, hole):
    """Columns (x0, x1) of the trace in pictures (n, h, W), around the columns (W,) that are
    crossed: half as bright as that percentile of them. Holes of up to `hole` pixels are bridged."""
    bright = gaussian_filter1d(find_ridges(np.stack(pictures)), 1, 1).max((0, 1))
    bright = median_filter(bright, 9)
    if not crossed.any():
        raise UserError("the writing point leaves the screen")
    return longest_run(bright > 0.5 * np.percentile(bright[crossed], percent), crossed, hole)


def longest_run(present, weight, hole):
    """(x0, x1) of the run of what is present (W,) that has the most weight (W,)."""
    x = np.flatnonzero(present)
    if not len(x):
        raise UserError("no trace is seen where something moves")
    runs = np.split(x, np.flatnonzero(np.diff(x) > hole) + 1)
    best = max(runs, key=lambda run: weight[run].sum())
    return int(best[0]), int(best[-1]) + 1


def crossed_columns(W, first, last):
    """(W,) bool, the columns from first to last."""
    x = np.arange(W)
    return (x >= first) & (x < last)


def robust_fit(design, values):
    """Least squares of values (T,) on design (T, n), outliers and NaN left out: the solution (n,)
    and the median error."""
    known = np.isfinite(values)
    if known.sum() < 5:
        raise UserError("the writing point is seen in too few frames")
    used = known
    for _ in range(5):
        solution = np.linalg.lstsq(design[used], values[used], rcond=None)[0]
        error = np.abs(values - design @ solution)
        typical = np.median(error[used])
        used = known & (error <= max(3 * typical, 1))
    return solution, float(np.median(error[known]))


def fit_sweep_lines(times, places, sweeps, length):
    """places (T,) = start + pace * times - length * sweeps: what of a Sweep follows from it.

    length: the answer if one sweep only is seen.
    """
    # 1. The longest sweep gives the pace
    known = np.isfinite(places)
    main = np.bincount(sweeps[known].astype(int)).argmax()
    design = np.stack([times, np.ones(len(times))], 1)
    solution, error = robust_fit(design, np.where(sweeps == main, places, np.nan))
    # 2. The others, by how much they are shifted against it, the length
    other = known & (sweeps != main)
    is_measured = other.sum() >= 3
    if is_measured:
        shift = (places - design @ solution)[other] / (main - sweeps[other])
        length = float(np.median(shift))
    pace, start = solution
    return dict(pace=float(pace), start=float(start + length * main), length=length, error=error,
                main=int(main), is_measured=bool(is_measured))


# ---------------------------------------------------------------------------- cursor

def fit_cursor(band, times, candidate):
    """Clock of a trace that stands still, along which a cursor moves."""
    T, h, W = band.shape
    still = np.median(band, 0)                                          # h W
    # 1. The pace of the cursor
    bright = find_ridges(np.maximum(band, still) - still).sum(1)        # T W
    line = candidate.start + candidate.pace * times
    design = np.stack([times, np.ones(T)], 1)
    for _ in range(2):
        solution, error = robust_fit(design, cursor_places(bright, line))
        line = design @ solution
    if error > 2:
        raise UserError("the cursor does not move evenly")
    pace, start = (float(value) for value in solution)

    # 2. The trace under it, the same before and after it has passed
    x0, x1 = find_extent([still], crossed_columns(W, line[0], line[-1]), 20, 12)
    under = min(x1, line[-1]) - max(x0, line[0])
    if under < 0.75 * (line[-1] - line[0]):
        raise UserError("no trace is under the moving cursor")
    same = same_after_passing(band, line, margin=0.1 * pace)
    if same < SAME:
        raise UserError("what the cursor passes does not stand still")

    # 3. The long strip is the strip on the screen, without the cursor
    x = np.arange(W)
    columns = np.tile(x - x0, (T, 1))
    columns[:, x1:] = -1
    columns[np.abs(x - line[:, None]) < CURSOR] = -1
    tau = (np.arange(x0, x1) - start) / pace
    return Clock(tau, columns, pace, x0, x1, min(1.0, same / 0.7))


def cursor_places(bright, line):
    """The column (T,) of the brightest thing in bright (T, W) near the line (T,); NaN: none."""
    x = np.arange(bright.shape[1])
    places = np.full(len(line), np.nan)
    for t in range(len(line)):
        near = np.abs(x - line[t]) < 14
        if near.sum() < 20:
            continue
        weight = np.where(near, bright[t], 0)
        weight = np.where(np.abs(x - weight.argmax()) < 6, weight, 0)
        if weight.any():
            places[t] = (weight * x).sum() / weight.sum()
    return places


def same_after_passing(band, line, margin):
    """How alike the band (T, h, W) is before and after the line (T,) has passed, 1 = the same."""
    ahead = np.arange(band.shape[2]) - line[:, None]                    # T W
    means = []
    known = True
    for chosen in (ahead > margin, ahead < -margin):
        counts = chosen.sum(0)
        known = known & (counts > 0)
        total = np.einsum("thw,tw->hw", band, chosen.astype(np.float32))
        means.append(total / np.maximum(counts, 1))
    if known.sum() < 10:
        return 0.0
    # The base of the ECG stays in its row in any case: rows are compared without their means
    means = find_ridges(np.stack(means))[:, :, known]
    before, after = means - means.mean(2, keepdims=True)
    # Against the greater: before the first sweep there may be ticks only
    power = max((before ** 2).sum(), (after ** 2).sum(), 1)
    return float((before * after).sum() / power)


# ---------------------------------------------------------------------------- sweep

def fit_sweep(band, times, candidate):
    """Clock of a trace that is written over the sweep before."""
    W = band.shape[2]
    first = candidate.start
    last = candidate.start + candidate.pace * times[-1]
    line = first + candidate.pace * times
    if same_after_passing(band, line, margin=0.1 * candidate.pace) > SAME:
        raise UserError("what the writing point passes is not written anew")
    parts = np.array_split(band, np.clip(len(band) // 4, 2, 6))
    parts = [part.mean(0) for part in parts]
    x0, x1 = find_extent(parts, crossed_columns(W, first, last), 50, REACH)
    # What is always there, such as an axis, shows no gap
    band = band - band.min(0)
    ridges = find_ridges(band)
    other, activity = find_length(ridges, times, candidate)
    length = abs(other)
    # The end of the later of the two: some of it must be in the strip
    end = min(first, first + other) + candidate.pace * times[-1]
    whole = length > 0 and end > x0 + 0.6 * candidate.pace
    if not whole:
        length = x1 - x0
    elif x1 - x0 > length + LONGEST_GAP:
        # A text beside the trace: it does not change
        total = np.cumsum(np.append(0, activity))
        places = np.arange(x0, x1 - length + 1)
        x0 = int(places[(total[places + length] - total[places]).argmax()])
        x1 = x0 + length
    sweep = Sweep(pace=candidate.pace, start=first, length=float(length), x0=x0, x1=x1, gap=0.0,
                  match=0.0, error=0.0, main=0, is_measured=False)
    for settled_s in (0.35, 0.2, 0.1, 0.1, 0.1, 0.1):
        before = sweep
        sweep = refine_sweep(band, ridges, times, sweep, settled_s)
        moved = abs(sweep.start - before.start) + abs(sweep.length - before.length)
        if settled_s == 0.1 and moved < 1:
            break
    if sweep.error > 2:
        raise UserError("the writing point does not move evenly")
    if sweep.match < 0.35:
        raise UserError("no gap moves along the trace")

    columns, age = sweep_columns(sweep, times, W)
    # Next to the writing point there is half a trace, or none, or a bar
    columns[(age < 4) | (age > sweep.length - sweep.gap - 3)] = -1
    # When another sweep was written follows from the length
    now = sweep.start + sweep.pace * times - sweep.x0                   # T
    if not whole or not sweep.is_measured:
        # Right of the writing point is the sweep before
        columns[np.arange(W) > (now % sweep.length + sweep.x0)[:, None]] = -1
    if not sweep.is_measured:
        number = now // sweep.length
        columns[number - number[0] != sweep.main] = -1
    U = strip_length(sweep, times)
    tau = (np.arange(U) - round(sweep.length)) / sweep.pace
    return Clock(tau, columns, sweep.pace, x0, x1, sweep.match)


def strip_length(sweep, times):
    """Columns of the long strip, which begins a sweep before time 0."""
    return round(sweep.length) + int(sweep.pace * times[-1]) + 2


def sweep_columns(sweep, times, W):
    """Column of the long strip of each column of each frame (T, W), -1 outside of the trace; and
    how many pixels ago it was written (T, W)."""
    x = np.arange(W)
    now = sweep.start + sweep.pace * times[:, None]                     # T 1
    age = (now - x) % sweep.length
    columns = np.round(now - age - sweep.start).astype(int) + round(sweep.length)
    columns[:, (x < sweep.x0) | (x >= sweep.x1)] = -1
    return columns, age


def find_length(band, times, candidate):
    """Pixels from the candidate's line to that of another sweep, before it (+) or after it (-);
    0 if there is none. And how much each column changes (W,)."""
    # Every second row will do
    changes, middles = change_map(band[:, ::2], times)
    z = changes.mean(1)[:, None]                                        # T - 1, 1, W
    activity = z.mean((0, 1))
    z = z - z.mean(0)
    sums, counts, pad = line_sums(z, middles, candidate.pace)
    line = gaussian_filter1d(sums[0], 3)
    mean = line / np.maximum(counts, 4)
    own = int(np.clip(round(candidate.start) + pad, 8, len(line) - 9))
    own += line[own - 8:own + 9].argmax() - 8
    distance = np.abs(np.arange(len(mean)) - own)
    mean[(distance < 150) | (distance > 1000) | (counts < 4)] = 0
    other = mean.argmax()
    if mean[other] < 0.4 * line[own] / max(counts[own], 4):
        return 0, activity
    return int(other - own), activity


def refine_sweep(band, ridges, times, sweep, settled_s):
    """The Sweep with the pace, start, length and gap that the frames show.

    band (T, h, W) without what is always there, ridges (T, h, W): the lines in it. settled_s: what
    was written so many seconds ago is there, however wrong the start is.
    """
    # 1. How the trace will look
    columns, age = sweep_columns(sweep, times, band.shape[2])
    settled = (age > settled_s * sweep.pace) & (age < 0.8 * sweep.length)
    image = unfold(band, np.where(settled, columns, -1), strip_length(sweep, times))
    image = find_ridges(image)
    # Most of the rest is speckle
    image[image < 0.5 * image.max(1, keepdims=True)] = 0

    # 2. How much of it is there already, around the writing point
    match = match_around(ridges, times, sweep, image)                   # T 2 * REACH
    enough = np.isfinite(match).sum(1) > 40
    if enough.sum() < 5:
        raise UserError("the writing point is seen in too few frames")
    some = np.isfinite(match).any(0)
    profile = np.zeros(2 * REACH)
    profile[some] = np.nanmedian(match[:, some], 0)
    # Speckle is like the trace to some degree, too
    level = np.percentile(profile[some], 10).clip(0, 0.6)
    edge, gap = find_gap((profile - level) / (1 - level))
    match = (match - level) / (1 - level)
    inside = profile[edge + 1:edge + max(3, gap - 1)]
    contrast = profile[max(edge - SIDE, 0):edge - 2].mean() - inside.mean()

    # 3. The writing point of each frame, and the straight lines through them, one a sweep
    now = sweep.start + sweep.pace * times                              # T
    sweeps = np.floor((now - sweep.x0) / sweep.length)
    sweeps -= sweeps[0]
    places = np.full(len(times), np.nan)
    for t in np.flatnonzero(enough):
        places[t] = now[t] + find_edge(match[t], gap, edge) - REACH - sweeps[t] * sweep.length
    sweep = sweep._replace(gap=float(gap), match=float(np.clip(contrast, 0, 1)),
                           **fit_sweep_lines(times, places, sweeps, sweep.length))
    if not 100 < sweep.length < 2000 or sweep.pace < 20:
        raise UserError("the writing point does not move evenly")
    return sweep


def match_around(band, times, sweep, image):
    """How much of the long strip (U, h) is there in each frame, REACH pixels to both sides of the
    writing point: (T, 2 * REACH), 1 = all, NaN where it is not known."""
    offset = np.arange(-REACH, REACH)
    match = np.full((len(times), 2 * REACH), np.nan)
    power = (image ** 2).sum(1)
    for t in range(len(times)):
        now = sweep.start + sweep.pace * times[t]
        place = (now - sweep.x0) % sweep.length + sweep.x0              # in the present sweep
        x = np.round(place + offset).astype(int)
        u = np.round(now + offset - sweep.start).astype(int) + round(sweep.length)
        known = (x >= sweep.x0) & (x < sweep.x1) & (u >= 0) & (u < len(image))
        known[known] = power[u[known]] > 0
        product = (band[t][:, x[known]].T * image[u[known]]).sum(1)
        match[t, known] = (product / np.maximum(power[u[known]], 1)).clip(-0.2, 1.2)
    return match


def find_gap(profile):
    """Where in a profile (2 * REACH,) of 1 = trace a gap begins, and how long it is."""
    best = -np.inf
    for gap in range(3, LONGEST_GAP + 1):
        # behind the gap there is the sweep before
        total = np.cumsum(np.append(0, profile - 0.5))
        edge = np.arange(SIDE, len(profile) - gap - 8)
        score = edge_score(total, edge, gap) + total[edge + gap + 8] - total[edge + gap]
        if score.max() > best:
            best = score.max()
            found = int(edge[score.argmax()]), gap
    return found


def find_edge(profile, gap, about):
    """Where in the profile of one frame the gap begins; `about` is where it does in most."""
    total = np.cumsum(np.append(0, np.nan_to_num(profile, nan=0.5) - 0.5))
    edge = np.arange(SIDE, len(profile) - gap - 8)
    score = edge_score(total, edge, gap) - 0.05 * np.abs(edge - about)
    return int(edge[score.argmax()])


def edge_score(total, edge, gap):
    """How much trace there is before each edge and how little in the gap; total: running sum."""
    before = total[edge] - total[edge - SIDE]
    return before - (total[edge + gap] - total[edge])


# ---------------------------------------------------------------------------- scroll

def steady(bright, width):
    """Where a trace of the brightness (W,) is, and that brightness, both smoothed by `width`."""
    smooth = gaussian_filter1d(bright, width)
    return smooth > 0.5 * np.percentile(smooth, 80), smooth


def right_edge(bright, x0, x1):
    """The column near x1 at which the brightness (W,) of a trace from x0 on falls to the half.

    UserError where it does not fall at once. JPEG stores colours with half the rows and half the
    columns, so the colour of a thin trace may end before the trace.
    """
    level = np.median(bright[max(x0, x1 - 60):max(x1 - 15, x0 + 1)])
    near = np.arange(max(x0, x1 - 20), min(len(bright), x1 + 20))
    # The split that leaves most of the trace to its left and least to its right
    gain = np.cumsum(bright[near] - 0.5 * level)
    edge = int(near[gain.argmax()]) + 1
    if (bright[edge + SHARP:edge + 3 * SHARP] > 0.3 * level).any():
        raise UserError("the right edge of what scrolls is not sharp")
    return edge


def fit_scroll(band, times, candidate):
    """Clock of a trace that moves to the left, the newest part at the right edge."""
    T, h, W = band.shape
    ridges = find_ridges(band)
    # 1. The pace, from ever longer lags
    moving = ridges - np.median(ridges, 0)
    pace = candidate.pace
    for lag, width in ((0.2, 0.06), (0.5, 0.02), (0.9, 0.006)):
        if lag < 0.7 * times[-1]:
            paces = pace * np.linspace(1 - width, 1 + width, 41)
            power = (moving ** 2).sum((0, 2))
            like = power @ shift_correlation(moving, times, lag, paces)
            pace = float(paces[like.argmax()])

    # 2. Where on the screen the trace is: along its path all else is darker
    columns = np.round(np.arange(W) + pace * times[:, None]).astype(int)
    U = int(columns.max()) + 1
    path = least_cost_path(find_ridges(unfold(band, columns, U)))
    on_path = [ridges[t, path[columns[t]], np.arange(W)] for t in range(T)]
    bright = np.mean(on_path, 0)                                        # W
    x0, x1 = longest_run(*steady(bright, 6), 30)
    x1 = right_edge(gaussian_filter1d(bright, 1.5), x0, x1)

    # 3. The long strip of the trace alone
    columns[:, :x0] = -1
    columns[:, x1:] = -1
    tau = (np.arange(U) + 0.5 - x1) / pace
    return Clock(tau, columns, pace, x0, x1, min(1.0, candidate.score / 75))
