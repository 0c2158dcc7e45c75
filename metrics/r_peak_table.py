"""How many R peaks find_r_peaks finds beside disturbances: a table, on synthetic ECGs.

    python -m data.ecg_signal

A row is a disturbance, added to lead II of recordings of 20 s (data/ecgsyn.py) that differ in heart
rate, rhythm and waves. A peak within 50 ms of a beat is right, and each beat has one peak. Beats
and peaks inside a stretch of noise do not count. A peak on a pulse, a step or a spike is false.
"""
import numpy as np

from data.dataset import ECG_HZ
from data.ecg_signal import find_r_peaks
from data.ecgsyn import ANGLE, TWO_PI, WIDTH, make_ecg

SECONDS = 20
TOLERANCE_S = 0.05
# The rhythm of each seed in turn
RHYTHMS = ("sinus", "sinus", "sinus", "ectopic", "sinus", "sinus", "af", "pause")
# Seeds that the detector was not tuned on
SEEDS = range(200, 224)


def noise(x, rng, *, mv, start=0, end=SECONDS):
    """x with white noise of `mv` from `start` to `end` seconds."""
    part = slice(start * ECG_HZ, end * ECG_HZ)
    x[part] += rng.normal(0, mv, len(x[part]))


def pulse(x, rng):
    """x with a pulse of 40 ms and 50 mV."""
    at = rng.integers(2 * ECG_HZ, 18 * ECG_HZ)
    x[at:at + 10] += 50


def step_and_spike(x, rng):
    """x with a step of 4 mV, and a spike of one sample and 8 mV after it."""
    x[rng.integers(2 * ECG_HZ, 9 * ECG_HZ):] += 4
    x[rng.integers(11 * ECG_HZ, 18 * ECG_HZ)] += 8


def pacing_spikes(x, beats):
    """x with a spike of one sample and 4 mV 0.18 s before each beat."""
    at = np.round((beats.r - 0.18) * ECG_HZ).astype(int)
    x[at[(at >= 0) & (at < len(x))]] += 4


def tall_t_waves(x, beats):
    """x with T waves as tall as the R waves: a Gaussian is added where ECGSYN has its T wave."""
    time = np.arange(len(x)) / ECG_HZ
    wave = np.zeros(len(x))
    for r, rr in zip(beats.r, beats.rr):
        h = np.sqrt(1 / rr)
        stretch = beats.qt * rr / TWO_PI
        centre = r + ANGLE[4] * np.sqrt(h) * stretch
        wave += np.exp(-0.5 * ((time - centre) / (WIDTH[4] * h * stretch)) ** 2)

    inside = beats.r[(beats.r > 0.5) & (beats.r < SECONDS - 1)]
    tallest = []
    for r in inside:
        at = round(r * ECG_HZ)
        tallest.append([x[at - 5:at + 6].max(), x[at + 25:at + 150].max()])
    r_height, t_height = np.median(tallest, axis=0) - np.median(x)
    x += (r_height - max(t_height, 0)) * wave


def disturb(name, ecg, seed):
    """Lead II (1, N) of a SyntheticEcg with the disturbance `name`, and its span that does not
    count: (start, end) in seconds."""
    rng = np.random.default_rng([seed, 99])
    x = ecg.ecg[:, 1].astype(float)
    span = (0, 0)
    if name == "noise 3 mV, first 4 s":
        span = (0, 4)
        noise(x, rng, mv=3, start=0, end=4)
    elif name == "noise 30 mV, last 4 s":
        span = (16, 20)
        noise(x, rng, mv=30, start=16, end=20)
    elif name == "pulse 40 ms, 50 mV":
        pulse(x, rng)
    elif name == "step 4 mV, spike 8 mV":
        step_and_spike(x, rng)
    elif name == "T wave as tall as R":
        tall_t_waves(x, ecg.beats)
    elif name == "white noise .3 mV":
        noise(x, rng, mv=0.3)
    elif name == "pacing spikes 4 mV":
        pacing_spikes(x, ecg.beats)
    return x[None], span


# Each row with its number of disturbances; those that last all the time have none.
ROWS = {
    "none": 0,
    "noise 3 mV, first 4 s": 1,
    "noise 30 mV, last 4 s": 1,
    "pulse 40 ms, 50 mV": 1,
    "step 4 mV, spike 8 mV": 2,
    "T wave as tall as R": 0,
    "white noise .3 mV": 0,
    "pacing spikes 4 mV": 0,
}


def score(found, beats, span):
    """Peaks found (s) against the true beats (s) -> beats found, all beats, false peaks."""
    start, end = span
    free = list(found)
    right = 0
    total = 0
    for beat in beats:
        distance = np.abs(np.array(free) - beat)
        hit = len(free) > 0 and distance.min() <= TOLERANCE_S
        if hit:
            free.pop(int(distance.argmin()))
        # Only beats of the recording count; those around it explain peaks at its ends.
        in_noise = end > start and start - TOLERANCE_S <= beat <= end + TOLERANCE_S
        if 0 <= beat < SECONDS and not in_noise:
            total += 1
            right += hit
    false = [peak for peak in free if not (end > start and start <= peak + TOLERANCE_S
                                           and peak - TOLERANCE_S <= end)]
    return right, total, len(false)


def measure_row(name, seeds, detect=find_r_peaks):
    """Beats found, all beats, false peaks of a row over all seeds."""
    sums = np.zeros(3, int)
    for seed in seeds:
        ecg = make_ecg(seed, SECONDS, rhythm=RHYTHMS[seed % len(RHYTHMS)])
        disturbed, span = disturb(name, ecg, seed)
        near = (ecg.beats.r > -TOLERANCE_S) & (ecg.beats.r < SECONDS + TOLERANCE_S)
        sums += score(detect(disturbed), ecg.beats.r[near], span)
    return sums.tolist()


def print_table():
    """Print the table."""
    print(f"{len(SEEDS)} recordings of {SECONDS} s, lead II, within {1000 * TOLERANCE_S:.0f} ms")
    for name in ROWS:
        right, total, false = measure_row(name, SEEDS)
        print(f"  {name:<24}{right:>5} of {total} beats found ({100 * right / total:.1f} %), "
              f"{false} false ({100 * false / total:.1f} %)")
