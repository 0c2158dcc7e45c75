"""Frames at uneven times -> frames at an even rate: for sources whose files store frame times.

    at, fps = even_times(times)             # times (T,) s after the first frame
    video = resample_frames(video, times, at)
"""
import math

import numpy as np

from common.flags import UserError

UNEVEN = 1 / 20     # share of the median step by which steps of an even cine may be off
PAUSE_S = 0.5       # a cine whose frames pause for longer is no cine


def check_steps(steps):
    """UserError where the times (s) from frame to frame cannot be those of a cine."""
    if not (steps > 0).all():
        raise UserError("the times of its frames do not rise")
    if steps.max() > PAUSE_S:
        raise UserError(f"its frames pause for {steps.max():.2f} s")


def is_even(times):
    """Whether frames at times (T,) come at an even rate, but for small errors."""
    steps = np.diff(times)
    middle = np.median(steps)
    own_step = times[-1] / (len(times) - 1)
    # Small errors of the steps can add up, so the times count as well.
    off = np.abs(steps - middle).max()
    drift = np.abs(times - np.arange(len(times)) * own_step).max()
    return max(off, drift) <= UNEVEN * middle


def even_times(times, fps=0):
    """Times (T,) s from the first frame -> times of the frames of the clip, and its rate.

    fps: the rate that is asked for, 0 = the cine's own. Even times are returned as they are.
    """
    own = (len(times) - 1) / times[-1]
    if not fps and is_even(times):
        return times, own
    fps = fps or own
    # The last frame may stand a rounding error before its time.
    return np.arange(math.floor(times[-1] * fps + 1e-3) + 1) / fps, fps


def between(times, at):
    """Where each of the instants `at` lies: the number of the entry before it, and the share (0..1)
    of the way from there to the next entry. times (n,) rise, n is 2 or more."""
    before = np.searchsorted(times, at, side="right") - 1
    before = before.clip(0, len(times) - 2)
    share = (at - times[before]) / (times[before + 1] - times[before])
    return before, share.clip(0, 1)


def resample_frames(video, times, at):
    """Frames (T, ...) uint8 at `times` -> frames at the instants `at` of even_times.

    A frame is the mean of its two neighbours, the nearer one counting more.
    """
    if at is times:
        return video
    before, share = between(times, at)
    out = np.empty((len(at), *video.shape[1:]), np.uint8)
    for k, (j, weight) in enumerate(zip(before, share)):
        out[k] = np.rint((1 - weight) * video[j] + weight * video[j + 1])
    return out
