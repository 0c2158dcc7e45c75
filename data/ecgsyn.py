"""ECGSYN."""
from types import SimpleNamespace

import numpy as np
from scipy.spatial.transform import Rotation

from data.dataset import ECG_HZ

MARGIN_S = 1.0                     # ECG before the first and after the last frame
RHYTHMS = dict(sinus=0.76, ectopic=0.08, pause=0.05, asystole=0.04, flat=0.04, af=0.03)   # shares
SIGNS = np.array([0.30, 0.25, 0.12, 0.33])       # weight in EF of QRS width, T wave, R amplitude, LV dilation
# ECGSYN's waves P Q R S T: angle and width in radians of the beat's phase, dipole (left, down, back) in mV
ANGLE, WIDTH = np.deg2rad([-70, -15, 0, 15, 100]), np.array([0.25, 0.1, 0.1, 0.1, 0.4])
DIPOLE = np.array([[.07, .11, -.02], [-.12, -.02, -.3], [1.1, .85, .25], [-.18, -.22, .45], [.28, .22, -.2]])
DOWER = np.array([[.632, -.235, .059], [.235, 1.066, -.132], [-.515, .157, -.917], [.044, .164, -1.387],
                  [.882, .098, -1.277], [1.213, .127, -.601], [1.125, .127, -.086], [.831, .076, .230]])


def draw_signs(rng, ef=None):
    """Four signs of a failing heart in 0..1 and the EF in points that follows from them."""
    severity = rng.beta(1.0, 1.4) if ef is None else np.clip((74 - ef) / 60, 0, 1)
    signs = np.clip(severity + 0.13 * rng.standard_normal(4), 0, 1)
    if ef is not None:
        return np.clip(signs + severity - SIGNS @ signs, 0, 1), float(ef)
    return signs, float(np.clip(74 - 60 * SIGNS @ signs + 1.2 * rng.standard_normal(), 15, 75))


def draw_rhythm(rng, start, end, hr, rhythm, qt):
    """Beats from before `start` to after `end` (s): R times r, interval before rr, ectopic, p (has a P)."""
    af, rr0, r, phase = rhythm == "af", 60 / hr, [start - 4 + rng.random()], rng.uniform(0, 6.28, 2)
    while r[-1] < end + 1:
        breath_and_slow = [0.03, 0.02] @ np.sin(np.array([1.6, 0.6]) * r[-1] + phase)
        r.append(r[-1] + rr0 * (1 + np.clip(0.22 * af * rng.standard_normal(), -0.42, 0.7) + breath_and_slow))
    r, first, last = np.array(r), start + MARGIN_S, end - MARGIN_S
    ectopic = np.zeros(len(r), bool)
    if rhythm == "ectopic":                      # early; the next beat at its own time: compensatory pause
        inside = np.flatnonzero((r > first + 0.1) & (r < last))[rng.integers(2)::2]
        for k in rng.permutation(inside)[:2]:
            r[k], ectopic[k] = r[k - 1] + rng.uniform(0.6, 0.75) * (r[k] - r[k - 1]), True
    stop = first + rng.uniform(0.15, 0.7) * (last - first)
    silent = {"flat": (-np.inf, np.inf), "pause": (stop, stop + max(rng.uniform(1.5, 3) - rr0, 0.8)),
              "asystole": [(stop, np.inf), (-np.inf, stop)][rng.integers(2)]}.get(rhythm, (0, 0))
    r, ectopic = (x[(r <= silent[0]) | (r >= silent[1])] for x in (r, ectopic))
    rr = np.minimum(np.diff(r, prepend=r[:1] - rr0), 1.15 * rr0)        # after a pause, a usual beat
    return SimpleNamespace(r=r, rr=rr, ectopic=ectopic, p=~ectopic & (not af), rr0=rr0, af=af, qt=qt)


def draw_ecg(rng, time, beats, signs, noise):
    """ECG (N, 12) in mV at `time` (N,) s. Noise comes before the limb leads are derived: Einthoven holds."""
    wide, flat_t, low = signs[:3]
    turn = Rotation.from_rotvec(rng.normal(0, 0.2, 3)).as_matrix()       # the electrical axis of this person
    height = np.array([rng.uniform(0.7, 1.3), *[1.25 - 0.65 * low] * 3, 1.15 - 1.5 * flat_t])
    usual, dipole = DIPOLE * height[:, None] @ turn.T, np.zeros((len(time), 3))
    strange = np.outer([0, -0.1, 1.4, 0.1, -0.45], turn @ rng.normal([-0.6, 0.9, -0.7], 0.15))
    for r, rr, ectopic, p in zip(beats.r, beats.rr, beats.ectopic, beats.p):
        h, near = np.sqrt(1 / rr), np.abs(time - r) < 1                  # ECGSYN: shape follows sqrt(HR / 60)
        stretch = np.array([1, *[1.9 if ectopic else 0.75 + 0.75 * wide] * 3, beats.qt]) * rr / 6.283
        centre = r + ANGLE * [h ** .5, h, 1, h, h ** .5] * stretch
        waves = np.exp(-0.5 * ((time[near, None] - centre) / (WIDTH * h * stretch)) ** 2) * [p, 1, 1, 1, 1]
        dipole[near] += waves @ (strange if ectopic else usual) * (1 + 0.03 * np.sin(1.6 * r))
    hz = [rng.choice([50, 60]), *rng.uniform([0.15, 0.05, 5], [0.35, 0.5, 8])]   # mains, wander, atria
    tones = np.sin(6.283 * (np.outer(time, hz) + rng.random(4)))
    tones *= [*rng.uniform(0, [0.008, 0.08, 0.08]), 0.04 * beats.af]
    muscle = rng.normal(0, rng.uniform(0.004, 0.025), (len(time), 8))
    ecg = dipole @ DOWER.T + noise * (tones @ rng.standard_normal((4, 8)) + muscle)
    i, ii = ecg[:, 0], ecg[:, 1]
    limb = np.stack([i, ii, ii - i, -(i + ii) / 2, i - ii / 2, ii - i / 2], 1)
    return np.concatenate([limb, ecg[:, 2:]], 1).astype(np.float32)


def make_ecg(seed, seconds, start=0.0, hr=None, rhythm="sinus", ef=None, noise=1.0, qt=1.0):
    """An ECG alone: ecg (N, 12) mV at 250 Hz, r_peaks (s), beats, signs (4,), ef in points, hr a minute.

    qt: when the T wave comes, and how wide it is, over the usual.
    """
    rng = np.random.default_rng(seed)
    hr, (signs, ef) = float(hr or np.clip(rng.gamma(9, 4.5) + 38, 45, 140)), draw_signs(rng, ef)
    beats = draw_rhythm(rng, start, start + seconds, hr, rhythm, qt)
    ecg = draw_ecg(rng, start + np.arange(round(seconds * ECG_HZ)) / ECG_HZ, beats, signs, noise)
    r_peaks = beats.r[(beats.r >= start) & (beats.r < start + seconds)]
    return SimpleNamespace(ecg=ecg, r_peaks=r_peaks, beats=beats, signs=signs, ef=ef, hr=hr)


def usual_systole(rr):
    """Seconds from R to the end of systole in a beat after `rr` seconds: Weissler's QS2 less 40 ms Q to R."""
    return 0.506 - 0.0021 * min(60 / rr, 150)


def ecg_of_beats(seed, r_peaks, seconds, systole=np.nan, ef=None):
    """An ECG (N, 12) in mV for a video of `seconds` that shows its R peaks at r_peaks (s), one or more: from
    MARGIN_S before it to MARGIN_S behind it, where the beats go on at their median interval.

    systole: seconds from R to its end, which the T wave marks as in the phantom; nan = the rate's.
    ef: points that the morphology shows; None = it says nothing of the EF.
    """
    rng, start, end = np.random.default_rng(seed), -MARGIN_S, seconds + MARGIN_S
    rr0 = float(np.median(np.diff(r_peaks))) if len(r_peaks) > 1 else 0.85
    before = np.arange(min(r_peaks[0] - rr0, 0), start - 2, -rr0)[::-1]
    r = np.concatenate([before, r_peaks, np.arange(max(r_peaks[-1] + rr0, seconds), end + 2, rr0)])
    rr, none = np.minimum(np.diff(r, prepend=r[0] - rr0), 1.15 * rr0), np.zeros(len(r), bool)
    qt = np.nan_to_num(systole / usual_systole(rr0), nan=1.0).clip(0.7, 1.5)
    beats = SimpleNamespace(r=r, rr=rr, ectopic=none, p=~none, rr0=rr0, af=False, qt=qt)
    time = start + np.arange(round((end - start) * ECG_HZ)) / ECG_HZ
    return draw_ecg(rng, time, beats, draw_signs(rng, ef)[0], 1.0)
