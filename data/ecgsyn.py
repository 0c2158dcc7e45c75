"""Synthetic ECGs of 12 leads after ECGSYN (McSharry et al., IEEE Trans. Biomed. Eng. 2003).

Used by sample.py and evaluate.py (make_ecg), sources.phantom (make_ecg) and sources.echonet_dynamic
(ecg_of_beats).

ECGSYN draws a beat as five Gaussian waves, P Q R S T, each at its own phase of the beat. Here a
wave is a vector, the dipole of the heart, and the leads are projections of it: so all 12 leads
agree. Signs of a failing heart change the waves, so that the ECG says something about the EF.
"""
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from data.dataset import ECG_HZ

MARGIN_S = 1.0                     # ECG before the first and after the last frame
# The share of each rhythm in a set of phantoms
RHYTHMS = dict(sinus=0.76, ectopic=0.08, pause=0.05, asystole=0.04, flat=0.04, af=0.03)

# How much each sign of a failing heart takes from the EF: a wide QRS complex, a flat T wave,
# a low R wave, a dilated left ventricle (which shows in the video, not in the ECG)
SIGN_WEIGHTS = np.array([0.30, 0.25, 0.12, 0.33])

# The waves P Q R S T in the beat's phase, where the R peak is at 0 and a beat lasts 2 pi
ANGLE = np.deg2rad([-70, -15, 0, 15, 100])
WIDTH = np.array([0.25, 0.1, 0.1, 0.1, 0.4])        # standard deviation, radians
# The dipole of each wave in mV: towards the left, down, back
DIPOLE = np.array([
    [0.07, 0.11, -0.02],
    [-0.12, -0.02, -0.3],
    [1.1, 0.85, 0.25],
    [-0.18, -0.22, 0.45],
    [0.28, 0.22, -0.2],
])
# Dower's matrix: the leads I, II, V1 to V6 as projections of the dipole
DOWER = np.array([
    [0.632, -0.235, 0.059],
    [0.235, 1.066, -0.132],
    [-0.515, 0.157, -0.917],
    [0.044, 0.164, -1.387],
    [0.882, 0.098, -1.277],
    [1.213, 0.127, -0.601],
    [1.125, 0.127, -0.086],
    [0.831, 0.076, 0.230],
])
TWO_PI = 6.283      # to these digits: more would change every set that a seed has made


class Beats(NamedTuple):
    """The beats of an ECG. Times in seconds."""
    r: np.ndarray           # (beats,) times of the R peaks
    rr: np.ndarray          # (beats,) the interval before each, at most 1.15 of the usual one
    ectopic: np.ndarray     # (beats,) bool: early beats from a ventricle
    p: np.ndarray           # (beats,) bool: with a P wave
    rr0: float              # the usual interval
    af: bool                # atrial fibrillation: irregular, and without P waves
    qt: float               # time and width of the T wave, as a multiple of the usual


class SyntheticEcg(NamedTuple):
    """What make_ecg returns."""
    ecg: np.ndarray         # (N, 12) mV at 250 Hz
    r_peaks: np.ndarray     # seconds
    beats: Beats
    signs: np.ndarray       # (4,) of a failing heart, in the order of SIGN_WEIGHTS
    ef: float               # points
    hr: float               # beats a minute


def make_ecg(seed, seconds, start=0.0, *, hr=None, rhythm="sinus", ef=None, noise=1.0, qt=1.0):
    """An ECG of `seconds` from the time `start` on.

    hr (a minute) and ef (points): drawn if None; rhythm: a key of RHYTHMS; noise: 1 = usual;
    qt: time and width of the T wave, as a multiple of the usual. seed: a number or a generator.
    """
    rng = np.random.default_rng(seed)
    if not hr:
        hr = np.clip(rng.gamma(9, 4.5) + 38, 45, 140)
    hr = float(hr)
    signs, ef = draw_signs(rng, ef)
    end = start + seconds
    beats = draw_rhythm(rng, start, end, hr=hr, rhythm=rhythm, qt=qt)
    time = start + np.arange(round(seconds * ECG_HZ)) / ECG_HZ
    ecg = draw_ecg(rng, time, beats, signs, noise)
    r_peaks = beats.r[(beats.r >= start) & (beats.r < end)]
    return SyntheticEcg(ecg, r_peaks, beats, signs, ef, hr)


def ecg_of_beats(seed, r_peaks, seconds, systole=np.nan, ef=None):
    """An ECG (N, 12) in mV for a video of `seconds` with known r_peaks (s), one or more.

    It begins MARGIN_S before the video and ends MARGIN_S after it. There the beats go on at their
    median interval. systole: seconds from R to its end, which the T wave marks as in the phantom;
    nan = the usual one of the heart rate. ef: points that the waves show; None = they show a
    random one.
    """
    rng = np.random.default_rng(seed)
    start = -MARGIN_S
    end = seconds + MARGIN_S
    rr0 = 0.85
    if len(r_peaks) > 1:
        rr0 = float(np.median(np.diff(r_peaks)))

    # Beats before and after the known ones, to 2 s beyond both ends: their waves reach inside.
    before = np.arange(min(r_peaks[0] - rr0, 0), start - 2, -rr0)[::-1]
    after = np.arange(max(r_peaks[-1] + rr0, seconds), end + 2, rr0)
    r = np.concatenate([before, r_peaks, after])
    rr = np.minimum(np.diff(r, prepend=r[0] - rr0), 1.15 * rr0)
    ectopic = np.zeros(len(r), bool)
    qt = np.nan_to_num(systole / usual_systole(rr0), nan=1.0).clip(0.7, 1.5)
    beats = Beats(r, rr, ectopic, p=~ectopic, rr0=rr0, af=False, qt=qt)

    time = start + np.arange(round((end - start) * ECG_HZ)) / ECG_HZ
    signs, _ = draw_signs(rng, ef)
    return draw_ecg(rng, time, beats, signs, 1.0)


def usual_systole(rr):
    """Seconds from the R peak to the end of systole, in a beat `rr` seconds after the one before.

    Weissler's electromechanical systole QS2 at that heart rate, less 40 ms from Q to R.
    """
    return 0.506 - 0.0021 * min(60 / rr, 150)


def draw_signs(rng, ef=None):
    """Four signs of a failing heart in 0..1, and the EF in points that follows from them.

    ef: the EF that the signs must give; None = drawn.
    """
    if ef is None:
        severity = rng.beta(1.0, 1.4)
    else:
        severity = np.clip((74 - ef) / 60, 0, 1)
    # Each sign differs a little from the severity that they share.
    signs = np.clip(severity + 0.13 * rng.standard_normal(4), 0, 1)
    if ef is not None:
        # shifted, so that their weighted sum is the severity again
        return np.clip(signs + severity - SIGN_WEIGHTS @ signs, 0, 1), float(ef)
    ef = 74 - 60 * SIGN_WEIGHTS @ signs + 1.2 * rng.standard_normal()
    return signs, float(np.clip(ef, 15, 75))


# ---------------------------------------------------------------------------- when: the beats

def draw_rhythm(rng, start, end, *, hr, rhythm, qt):
    """Beats from before `start` to after `end` (s), at `hr` a minute, in a rhythm of RHYTHMS."""
    af = rhythm == "af"
    rr0 = 60 / hr
    r = draw_r_peaks(rng, start, end, rr0, af)
    # The rhythm shows where the video is.
    first = start + MARGIN_S
    last = end - MARGIN_S
    ectopic = np.zeros(len(r), bool)
    if rhythm == "ectopic":
        make_ectopic(rng, r, ectopic, first, last)

    # Beats in the silent part are left out. Its draws are made for every rhythm, used or not.
    stop = first + rng.uniform(0.15, 0.7) * (last - first)
    pause = max(rng.uniform(1.5, 3) - rr0, 0.8)
    stops_later = rng.integers(2) == 0
    silent = (0, 0)
    if rhythm == "flat":
        silent = (-np.inf, np.inf)
    elif rhythm == "pause":
        silent = (stop, stop + pause)
    elif rhythm == "asystole":
        # the heart stops, or it starts again
        silent = (stop, np.inf) if stops_later else (-np.inf, stop)
    beats = (r <= silent[0]) | (r >= silent[1])
    r = r[beats]
    ectopic = ectopic[beats]

    # After a pause comes a usual beat, not one stretched over the pause.
    rr = np.minimum(np.diff(r, prepend=r[:1] - rr0), 1.15 * rr0)
    return Beats(r, rr, ectopic, p=~ectopic & (not af), rr0=rr0, af=af, qt=qt)


def draw_r_peaks(rng, start, end, rr0, af):
    """Times of R peaks (s) from 4 s before `start` to 1 s after `end`; the heart rate varies."""
    r = [start - 4 + rng.random()]
    phase = rng.uniform(0, 6.28, 2)
    while r[-1] < end + 1:
        # The rate rises and falls with the breath (1.6 rad/s) and with blood pressure (0.6 rad/s).
        waves = [0.03, 0.02] @ np.sin(np.array([1.6, 0.6]) * r[-1] + phase)
        # In atrial fibrillation it varies by a fifth besides, from beat to beat.
        irregular = np.clip(0.22 * af * rng.standard_normal(), -0.42, 0.7)
        r.append(r[-1] + rr0 * (1 + irregular + waves))
    return np.array(r)


def make_ectopic(rng, r, ectopic, first, last):
    """Make one or two of the beats r between `first` and `last` ectopic, in place.

    An ectopic beat comes early and the next at its own time: the compensatory pause.
    """
    inside = np.flatnonzero((r > first + 0.1) & (r < last))
    # every second beat: no two ectopic beats follow each other
    inside = inside[rng.integers(2)::2]
    for k in rng.permutation(inside)[:2]:
        r[k] = r[k - 1] + rng.uniform(0.6, 0.75) * (r[k] - r[k - 1])
        ectopic[k] = True


# ---------------------------------------------------------------------------- what: the waves

def draw_ecg(rng, time, beats, signs, noise):
    """ECG (N, 12) in mV at `time` (N,) s.

    signs: of a failing heart (draw_signs); noise: as a multiple of the usual.
    """
    dipole = draw_dipole(rng, time, beats, signs)                                          # N 3
    ecg = dipole @ DOWER.T + noise * draw_noise(rng, time, beats.af)                       # N 8
    # The other limb leads follow from I and II (Einthoven, Goldberger), noise included.
    i = ecg[:, 0]
    ii = ecg[:, 1]
    limb = np.stack([i, ii, ii - i, -(i + ii) / 2, i - ii / 2, ii - i / 2], 1)             # N 6
    return np.concatenate([limb, ecg[:, 2:]], 1).astype(np.float32)                        # N 12


def draw_dipole(rng, time, beats, signs):
    """The heart's dipole (N, 3) in mV at `time` (N,): the sum of the waves of all beats."""
    wide_qrs, flat_t, low_r = signs[:3]
    # The electrical axis differs from person to person.
    turn = Rotation.from_rotvec(rng.normal(0, 0.2, 3)).as_matrix()
    qrs_height = 1.25 - 0.65 * low_r
    p_height = rng.uniform(0.7, 1.3)
    height = np.array([p_height, qrs_height, qrs_height, qrs_height, 1.15 - 1.5 * flat_t])
    usual = DIPOLE * height[:, None] @ turn.T                                              # 5 3
    # A beat from a ventricle has its own axis, no P wave, and a T wave against its QRS complex.
    axis = turn @ rng.normal([-0.6, 0.9, -0.7], 0.15)
    strange = np.outer([0, -0.1, 1.4, 0.1, -0.45], axis)                                   # 5 3

    dipole = np.zeros((len(time), 3))
    for r, rr, ectopic, p in zip(beats.r, beats.rr, beats.ectopic, beats.p):
        # The waves of a beat lie within 1 s of its R peak.
        near = np.abs(time - r) < 1
        # ECGSYN: angles and widths follow the square root of the heart rate, HR / 60.
        h = np.sqrt(1 / rr)
        qrs_width = 1.9 if ectopic else 0.75 + 0.75 * wide_qrs
        # seconds a radian of each wave
        stretch = np.array([1, qrs_width, qrs_width, qrs_width, beats.qt]) * rr / TWO_PI
        centre = r + ANGLE * [h ** .5, h, 1, h, h ** .5] * stretch
        distance = (time[near, None] - centre) / (WIDTH * h * stretch)                     # near 5
        waves = np.exp(-0.5 * distance ** 2) * [p, 1, 1, 1, 1]
        vectors = strange if ectopic else usual
        # The lungs move the heart: the height follows the breath.
        dipole[near] += waves @ vectors * (1 + 0.03 * np.sin(1.6 * r))                     # near 3
    return dipole


def draw_noise(rng, time, af):
    """Noise (N, 8) in mV of the leads I, II, V1 to V6."""
    # Four tones: the mains, two of the wandering baseline, and the atria if they fibrillate.
    hz = [rng.choice([50, 60]), *rng.uniform([0.15, 0.05, 5], [0.35, 0.5, 8])]
    tones = np.sin(TWO_PI * (np.outer(time, hz) + rng.random(4)))                          # N 4
    tones *= [*rng.uniform(0, [0.008, 0.08, 0.08]), 0.04 * af]
    muscle = rng.normal(0, rng.uniform(0.004, 0.025), (len(time), 8))                      # N 8
    # each lead has the tones at its own strength
    return tones @ rng.standard_normal((4, 8)) + muscle
