"""The ECG that an ultrasound machine draws on the screen, read back from the frames of a cine.

    read_screen_ecg(frames (T, H, W, 3) uint8, times (T,) s) -> ScreenECG, or UserError with one
    line that says why none is read

Machines draw the ECG in three ways:

    sweep    the trace is written from left to right over the sweep before, with a gap at the
             writing point
    cursor   the whole trace stands still, and a line or marker moves along it
    scroll   the trace moves to the left, and its newest part is at the right edge

In each of them a column of a frame shows a known time of the ECG, once the pace (pixels a second)
and the place of the writing point, cursor or right edge are known. The steps:

1. data/screen_search.py finds where something moves evenly.
2. data/screen_fit.py measures pace and place. Then the strips of all frames are averaged into one
   long strip, each column at its own time.
3. data/screen_trace.py follows the line with QRS complexes through it.
4. This file checks the result: the line is in all frames, and its beats are alike.

T frames, H x W pixels, h rows of a band, U columns of the long strip.
"""
from typing import NamedTuple

import numpy as np

from common.flags import UserError
from data.dataset import ECG_HZ
from data.ecg_signal import find_r_peaks
from data.screen_fit import fit_cursor, fit_scroll, fit_sweep, unfold
from data.screen_search import find_candidates, find_ridges
from data.screen_trace import to_signal, trace_ecg

LEAST_FRAMES = 8
LEAST_SECONDS = 0.7
LEAST_SIDE = 100        # pixels of height and width
MOST_FPS = 30           # of more frames a second, every second or third is looked at
COLOURED = 30           # difference of the colours of a pixel, of 255, above which it is not grey
MARGIN = 110            # rows that are looked at above and below what moves
NEAR = -1, 0, 1, -11, -10, -9, 9, 10, 11    # rows of a line, and of what is above and below
LEAST_CONFIDENCE = 0.6
LEAST_R = 5             # pixels: height of an R wave
SURE = 0.9              # a confidence with which the other feature is not looked at
LEAST_WHOLE = 0.75      # share of the cine for which the trace must be seen
FIT = dict(sweep=fit_sweep, cursor=fit_cursor, scroll=fit_scroll)


class ScreenECG(NamedTuple):
    """What read_screen_ecg returns."""
    ecg: np.ndarray         # (N,) float32 at 250 Hz, R peaks are about 1; NaN where it is not known
    start_s: float          # time of sample 0, seconds after the first frame; may be negative
    kind: str               # sweep, cursor or scroll
    confidence: float       # 0 to 1
    strip: tuple            # (x0, y0, x1, y1) in pixels, x1 and y1 not included


def read_screen_ecg(frames, times, regions=()):
    """The ECG on the screen of a cine; UserError (one line: why not) where none is read surely.

    frames (T, H, W) or (T, H, W, 3) uint8, times (T,) in seconds; regions: boxes (x0, y0, x1, y1)
    that are not the 2D image, hints of where the strip is.
    """
    times = np.asarray(times, float)
    times = times - times[:1]
    if len(frames) < LEAST_FRAMES or times[-1] < LEAST_SECONDS:
        raise UserError(f"no ECG is read off the screen: it takes {LEAST_FRAMES} frames and "
                        f"{LEAST_SECONDS} s")
    if min(frames.shape[1:3]) < LEAST_SIDE:
        raise UserError(f"no ECG is read off the screen: the picture has less than {LEAST_SIDE} "
                        "rows or columns")
    fps = (len(times) - 1) / times[-1]
    skip = max(1, int(fps / MOST_FPS + 0.01))
    reason = "no strip is found"
    times = times[::skip]
    features = []
    found = []
    for feature in make_features(frames[::skip]):
        features.append(feature)
        for candidate in find_candidates(feature, times, regions):
            try:
                found.append(read_candidate(features, times, candidate))
            except UserError as error:
                reason = error
                continue
            if found[-1].confidence > SURE:
                return found[-1]
    if not found:
        raise UserError(f"no ECG is read off the screen: {reason}")
    return max(found, key=lambda screen: screen.confidence)


def erase_strip(frames, strip):
    """The frames (T, H, W, ...) with the rows of the strip black over the whole width.

    Else a model could read the ECG, and the time within the beat, off the picture.
    """
    erased = frames.copy()
    erased[:, strip[1]:strip[3]] = 0
    return erased


def make_features(frames):
    """Yield (T, H, W) uint8: how coloured each pixel is, if some are, then how bright."""
    if frames.ndim == 3:
        yield frames
        return
    red, green, blue = np.moveaxis(frames, -1, 0)
    brightest = np.maximum(np.maximum(red, green), blue)
    coloured = brightest - np.minimum(np.minimum(red, green), blue)
    if (coloured[::4] > COLOURED).mean() > 3e-4:
        yield coloured
    yield brightest


def read_candidate(features, times, candidate):
    """The ScreenECG of a Candidate in the last of the features, (T, H, W) each; UserError where it
    shows none."""
    y0 = max(0, candidate.rows[0] - MARGIN)
    y1 = candidate.rows[1] + MARGIN
    bands = [feature[:, y0:y1] for feature in features]                 # T h W each
    clock = FIT[candidate.kind](bands[-1], times, candidate)
    # The trace may be coloured and its cursor white
    for band in bands:
        try:
            trace, ecg, start = read_trace(band, clock, times[-1])
            break
        except UserError:
            if band is bands[-1]:
                raise
    confidence = min(1.0, trace.crest / 10) * clock.match
    if confidence < LEAST_CONFIDENCE:
        raise UserError(f"the ECG is not sure enough ({confidence:.2f})")
    strip = clock.x0, max(0, y0 + trace.y0), clock.x1, min(features[0].shape[1], y0 + trace.y1)
    return ScreenECG(ecg, start, candidate.kind, confidence, strip)


def read_trace(band, clock, seconds):
    """The Trace in band (T, h, W), the ECG (N,), and the time of its sample 0."""
    # The mean first: speckle has ridges, its mean over time has none
    image = find_ridges(unfold(band, clock.columns, len(clock.tau)))
    trace = trace_ecg(image, clock.pace)
    check_whole(clock.tau[np.isfinite(trace.rows)], clock.pace, seconds)
    check_seen(band, clock.columns, trace.rows)
    ecg, start = to_signal(trace.rows, clock.tau)
    return trace, scale_beats(ecg), start


# ---------------------------------------------------------------------------- checks

def check_seen(band, columns, rows):
    """UserError where the trace is not in all frames that show some of it.

    band (T, h, W); columns (T, W): the column of the long strip that each of a frame shows, or -1;
    rows (U,): the row of the trace in each column of the long strip.
    """
    T, h, W = band.shape
    rows = np.where(np.isfinite(rows), rows, -1).round().astype(int)
    seen = np.full(T, np.nan)
    for t in range(T):
        x = np.flatnonzero((columns[t] >= 0) & (columns[t] < len(rows)))
        x = x[rows[columns[t, x]] >= 0]
        row = rows[columns[t, x]]
        # Speckle is bright, too: the rows of the line against those 10 above and 10 below
        near = [band[t, (row + shift).clip(0, h - 1), x].astype(float) for shift in NEAR]
        line, above, below = np.max(np.reshape(near, (3, 3, -1)), 1)
        if len(x):
            seen[t] = (line - np.maximum(above, below)).mean()
    # NaN is a frame of which no column has a time
    seen = seen[np.isfinite(seen)]
    gone = seen < 0.4 * np.percentile(seen, 80)
    if gone.mean() > 0.08:
        raise UserError(f"the trace is in {len(seen) - gone.sum()} of {len(seen)} frames only")


def check_whole(tau, pace, seconds):
    """UserError where the line, seen at times tau (U,), is broken or shorter than the cine."""
    if not len(tau) or len(tau) < LEAST_WHOLE * (tau[-1] - tau[0]) * pace:
        raise UserError("the line is broken")
    if ((tau > 0) & (tau < seconds)).sum() < LEAST_WHOLE * seconds * pace:
        raise UserError("the line is shorter than the cine")


def scale_beats(signal):
    """signal (N,) in pixels -> float32 with its R peaks at 1 on the median.

    UserError where it has no heart beats, or such as are not alike: then it is something else.
    """
    signal = signal - np.nanmedian(signal)
    filled = np.nan_to_num(signal)
    peaks = np.round(find_r_peaks(filled[None]) * ECG_HZ).astype(int)
    reach = round(0.2 * ECG_HZ)
    inside = peaks[(peaks >= reach) & (peaks < len(filled) - reach)]
    beats = [filled[peak - reach:peak + reach + 1] for peak in inside]
    if not len(beats):
        raise UserError("the trace has no heart beat")

    # 1. A QRS complex is higher than what comes before it, and than what follows
    beats = np.stack(beats)                                             # beats 0.4 s
    before = beats[:, reach] - np.median(beats[:, :reach // 2], 1)
    after = beats[:, reach] - np.median(beats[:, -(reach // 2):], 1)
    height = np.where(before * after > 0, np.minimum(np.abs(before), np.abs(after)), 0)
    if np.median(height) < LEAST_R:
        raise UserError("the trace has no heart beat")

    # 2. The QRS complexes are like each other
    complexes = beats[:, reach // 2:-(reach // 2)]
    complexes = complexes - complexes.mean(1, keepdims=True)
    typical = np.median(complexes, 0)
    norm = np.sqrt((complexes ** 2).sum(1) * (typical ** 2).sum())
    if np.median(complexes @ typical / np.maximum(norm, 1e-6)) < 0.85:
        raise UserError("the waves of the trace are not alike")
    scale = max(np.abs(np.median(filled[peaks])), LEAST_R)
    return (signal / scale).astype(np.float32)
