"""The sampling rate of an ECG from the times of its samples: clocks, dates, numbers in any unit.

    cells "10:00:00.004" or numbers (N,)  ->  seconds (N,)  ->  Times: the rate, and what is missing

Used by data/ecg_tables.py and data/ecg_json.py. The times may be rounded, may jitter, may leave out
samples, and may be those at which a phone received packets of samples.
"""
import re
from datetime import date
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from data.ecg_files import refuse

# The unit of a time, and how many of it make a second
TIME_UNITS = {
    re.compile(r"(?<![a-z])(?:ns|nano\w*)(?![a-z])", re.I): 1e9,
    re.compile(r"(?<![a-z])(?:[µμu]s|micro\w*)(?![a-z])", re.I): 1e6,
    re.compile(r"ms(?![a-z])|milli", re.I): 1e3,
    re.compile(r"(?<![a-z])(?:s|secs?|seconds?)(?![a-z])", re.I): 1,
}
# 2024-05-01T10:00:00.123Z, 2024-05-01 10:00:00,123 +0200, 1/5/2024 10:00:00 AM, 10:00:00, 0:00.123
CLOCK = re.compile(r"""
    (?: (\d{1,4}) [-/.] (\d{1,2}) [-/.] (\d{1,4}) [T\ ] \s* )?       # year, month, day
    (?: (\d{1,2}) : )? (\d{1,2}) : (\d\d) (?: [.,] (\d+) )?         # hours, minutes, seconds
    (?: \s* ([AP]) M )?
    (?: \s* (?: Z | UTC | ([+-]\d\d) :? (\d\d) ) )?                 # offset from UTC
    (?! [\d:] )
    """, re.I | re.X)
# Samples may arrive so much later than others; beyond that their times say nothing
LONGEST_DELAY_S = 0.25


class Times(NamedTuple):
    """What a column of times says."""
    hz: float                   # samples a second
    position: np.ndarray        # (N,) of each row among all samples, with those that are missing


# ---------------------------------------------------------------------------- seconds

def strip(cell):
    """A cell of a table without the blanks and quotes around it."""
    return cell.strip(" \t'\"")


def clock_seconds(path, cells):
    """Times of the day or dates -> seconds after the first (N,); UserError for anything else."""
    nanoseconds = []
    for row, cell in enumerate(map(strip, cells), 1):
        found = CLOCK.fullmatch(cell)
        refuse(not found, path, f"row {row}: {cell[:30]!r} is no time")
        nanoseconds.append(clock_nanoseconds(found))
    # whole numbers until here: a float of the seconds since 1970 knows no microseconds
    seconds = np.array([value - nanoseconds[0] for value in nanoseconds]) / 1e9
    # times of the day begin again at midnight
    midnights = np.cumsum(np.diff(seconds, prepend=0) < -43_200)
    return seconds + 86_400 * midnights


def clock_nanoseconds(found):
    """A match of CLOCK -> nanoseconds since some day, an int."""
    a, b, c, hour, minute, second, fraction, half, offset_hours, offset_minutes = found.groups()
    hour = int(hour or 0)
    if half:
        hour = hour % 12 + 12 * (half.upper() == "P")
    seconds = 3600 * hour + 60 * int(minute) + int(second)
    if offset_hours:
        seconds -= 3600 * int(offset_hours) + int(offset_hours[0] + offset_minutes) * 60
    if a:
        # the year is first or last; of day and month, the month is at most 12
        year, month, day = (a, b, c) if len(a) == 4 else (c, b, a)
        if int(month) > 12:
            month, day = day, month
        seconds += 86_400 * date(int(year), int(month), int(day)).toordinal()
    return seconds * 10 ** 9 + int((fraction or "0").ljust(9, "0")[:9])


def exact_numbers(cells):
    """Numbers as strings -> floats after the first (N,).

    Seconds since 1970, or a count of nanoseconds, have more digits than a float holds.
    """
    values = [Decimal(strip(cell).replace(",", ".")) for cell in cells]
    return np.array([float(value - values[0]) for value in values])


def time_unit(name, step):
    """Seconds of one unit of a column of times: by its name, or else by what rate is plausible."""
    for pattern, per_second in TIME_UNITS.items():
        if pattern.search(name):
            return 1 / per_second
    mean = step.mean()
    if not mean > 0 or 50 <= 1 / mean <= 1e5:
        return 1
    # the power of 1000 that brings the rate nearest to 300 Hz
    return min((1e-3, 1e-6, 1e-9), key=lambda unit: abs(np.log(unit * mean * 300)))


# ---------------------------------------------------------------------------- rate


def fit_rate(step, is_date):
    """Steps between times (N - 1,) seconds -> Times; None where the times do not rise evenly.

    is_date: a clock is written to a millisecond or so. A line through all times finds the rate in
    spite of that. Times that count from 0 are written in full, and their mean step will do.
    """
    if not len(step) or not step.min() >= 0 or not 0 < step.sum() < np.inf:
        return None
    position = np.arange(len(step) + 1)
    even = step.min() > 0 and step.max() <= 2 * step.mean()
    if even and not is_date:
        return Times(1 / step.mean(), position)
    if np.median(step) < 0.5 * step.mean():
        return fit_packets(step)
    if not even:
        position[1:] += np.cumsum(count_missing(step))
    times = np.concatenate([[0], np.cumsum(step)])
    line = np.polyfit(position, times, 1)
    if np.abs(times - np.polyval(line, position)).max() > LONGEST_DELAY_S:
        return None
    return Times(1 / line[0], position)


def count_missing(step):
    """How many samples are missing in each step (N - 1,).

    After a gap the times stay behind. After a sample that only arrived late they do not: the next
    ones come the sooner. So the times before a long step are compared with those after it.
    """
    late = step > 2 * np.median(step)
    usual = step[~late].mean()
    behind = np.concatenate([[0], np.cumsum(step / usual - 1)])         # samples behind even times
    missing = np.zeros(len(step), int)
    # so many long steps are no gaps: every sample arrives by chance
    if late.mean() > 0.05:
        return missing
    for k in np.flatnonzero(late):
        before = np.median(behind[max(k - 15, 0):k + 1])
        after = np.median(behind[k + 1:k + 17])
        # of an absurd gap it is enough to know that it is one
        missing[k] = np.clip(round(after - before), 0, 10 ** 9)
    return missing


def fit_packets(step):
    """Times of samples that a phone received in packets -> Times; None if these are not even."""
    # A packet begins after a long step: its samples follow each other at once.
    late = step > max(2 * np.median(step), 0.5 * step.mean())
    start = np.flatnonzero(late) + 1
    if len(start) < 3:
        return None
    arrival = np.cumsum(step)[start - 1]                                # seconds
    line = np.polyfit(start, arrival, 1)
    off = np.abs(arrival - np.polyval(line, start)).max()
    if off > 1.5 * np.median(step[late]):
        return None
    return Times(1 / line[0], np.arange(len(step) + 1))


def open_gaps(path, signal, position):
    """signal (L, N) -> (L, samples) with NaN where the times leave samples out."""
    L, N = signal.shape
    samples = int(position[-1]) + 1
    refuse(samples > 2 * N, path, f"its times leave out {samples - N} of {samples} samples")
    if samples == N:
        return signal
    opened = np.full((L, samples), np.nan)
    opened[:, position] = signal
    return opened
