"""ECG signals (L, N) at 250 Hz: clean them, find their R peaks, make them longer, augment them.

Used by the trainings (clean_ecg, find_disturbed, augment_recorder_filter), sample.py and
evaluate.py. A gap of a recording is NaN. `python -m data.ecg_signal` prints how many R peaks are
found beside disturbances.
"""
import numpy as np
from scipy.ndimage import (binary_closing, binary_dilation, maximum_filter1d, median_filter,
                           minimum_filter1d, percentile_filter, uniform_filter1d)
from scipy.signal import butter, find_peaks, lfilter, sosfiltfilt

from data.dataset import ECG_HZ

# What ST-MEM was trained on: above the wander of the baseline, below the muscles and the mains.
CLEAN_BAND = np.concatenate([
    butter(5, 0.67, "highpass", fs=ECG_HZ, output="sos"),
    butter(5, 40, "lowpass", fs=ECG_HZ, output="sos"),
])
# Pan & Tompkins take 5 to 15 Hz. A wide QRS complex is seen better a little lower.
QRS_BAND = butter(2, (4.5, 20), "bandpass", fs=ECG_HZ, output="sos")
# A smaller standard deviation is no heart beat, and must not become amplified noise.
FLAT_MV = 0.03
# A smaller change from one sample to the next is no disturbance.
JUMP_MV = 0.15
BLOCK = ECG_HZ // 10        # samples of 0.1 s, the length of a QRS complex
STRETCH = 2 * ECG_HZ        # samples of 2 s, which hold a beat or more


def clean_ecg(ecg):
    """ecg (L, N) mV -> (L, N) float32: 0.67 to 40 Hz, mean 0, standard deviation 1.

    Mean and deviation are taken over leads and time together, so that leads keep their proportions.
    What is disturbed becomes level, and it does not count for mean and deviation.
    """
    ecg, disturbed = repair(ecg)
    # 1 s of padding lets the high-pass settle before the recording begins.
    x = sosfiltfilt(CLEAN_BAND, ecg, padlen=min(ecg.shape[1] - 1, ECG_HZ))
    seen = x
    if disturbed.any() and not disturbed.all():
        seen = x[:, ~disturbed]
    scale = max(seen.std(), FLAT_MV)
    return ((x - seen.mean()) / scale).astype(np.float32)


def augment_recorder_filter(ecg, rng, p):
    """A cleaned ECG (L, N) as another recorder would show it, with probability `p`.

    The filters of monitors and echo machines smear the waves. Two random filters imitate this: each
    wave gets an exponential tail after it and another before it, of 8 to 300 ms, of either sign and
    of at most 0.8 of the wave's height. R peaks stay where they are.
    """
    if rng.random() >= p:
        return ecg
    x = ecg
    # direction 1 filters forwards (a tail after each wave), -1 backwards (a tail before it)
    for direction in (1, -1):
        seconds = np.exp(rng.uniform(*np.log([0.008, 0.3])))
        decay = np.exp(-1 / (ECG_HZ * seconds))         # of the tail, from one sample to the next
        tail = lfilter([1 - decay], [1, -decay], x[:, ::direction])[:, ::direction]
        x = x + rng.uniform(-0.8, 0.8) * tail * np.abs(x).max() / max(np.abs(tail).max(), 1e-6)
    return (x * (ecg.std() / max(x.std(), 1e-6))).astype(np.float32)


# ---------------------------------------------------------------------------- disturbances

def find_disturbed(ecg):
    """ecg (L, N) mV -> bool (N,): True where the model must not see it.

    These are gaps (NaN) and what no heart makes: steps, pulses, bursts of noise, in any lead.
    Noise that lasts as long as the recording, pauses and flat lines are not disturbed.
    """
    return repair(ecg)[1]


def repair(ecg):
    """ecg (L, N) mV -> the ECG with its disturbances made level (L, N), and find_disturbed (N,).

    A spike of one or two samples, as a pacemaker makes it, is only bridged: it hides nothing. An
    ECG without a disturbance comes back as it is.
    """
    # Each lead in one piece of memory: twice as fast, which counts in a training.
    filled, gap = fill_gaps(np.ascontiguousarray(ecg))

    # 1. Jumps: spikes, steps, the edges of pulses, bursts of noise. Those less than 0.1 s apart are
    #    one disturbance, with all that lies between.
    bad = close_holes(find_jumps(filled) | gap, BLOCK)
    level, hidden = make_level(filled, bad)

    # 2. What is left may still be too tall or too steep for a heart.
    bursts = find_bursts(level)
    if bursts.any():
        bad = bad | bursts
        level, hidden = make_level(filled, bad)
    if not bad.any():
        return ecg, hidden.any(0)

    # 3. Less than 0.5 s between two disturbances of a lead shows no beat.
    if hidden.any():
        bad = bad | close_holes(hidden, ECG_HZ // 2)
        level, hidden = make_level(filled, bad)

    # 4. What is disturbed in any lead is hidden, and 0.1 s around it.
    hidden = hidden.any(0)                                                                 # N
    if hidden.any():
        hidden = binary_dilation(hidden, iterations=BLOCK)
        hidden = close_holes(hidden[None], ECG_HZ // 2)[0]
    return level, hidden


def fill_gaps(ecg):
    """ecg (L, N) -> the ECG with the value after a gap (NaN) in it, bool (L, N): the gaps.

    In a gap at the end it is the value before; a lead that is all gap becomes 0.
    """
    gap = ~np.isfinite(ecg)
    if not gap.any():
        return ecg, gap
    N = ecg.shape[1]
    # The number of the next known sample; at the end, that of the last one.
    known = np.where(gap, N, np.arange(N))
    known = np.minimum.accumulate(known[:, ::-1], axis=1)[:, ::-1]
    last = N - 1 - (~gap)[:, ::-1].argmax(1)
    filled = np.take_along_axis(ecg, np.minimum(known, last[:, None]), axis=1)
    return np.nan_to_num(filled, posinf=0, neginf=0), gap


def close_holes(mask, samples):
    """mask (L, N) with the holes of up to `samples` samples between two True closed."""
    if not mask.any():
        return mask
    closed = np.pad(mask, ((0, 0), (samples, samples)))
    closed = binary_closing(closed, np.ones((1, samples + 1)))
    return closed[:, samples:-samples]


def find_jumps(ecg):
    """ecg (L, N) -> bool (L, N), True where the change from the sample before is a jump."""
    change = np.diff(ecg, axis=1, prepend=ecg[:, :1])
    size = np.abs(change)
    # How steep QRS complexes are: two samples one after the other rise or fall. A spike goes up and
    # down at once, so that it does not count. A median over stretches of 2 s is not moved by one
    # that is disturbed.
    steep = np.minimum(size[:, 1:], size[:, :-1]) * (change[:, 1:] * change[:, :-1] > 0)
    usual = np.median(stretches(steep).max(2), axis=1)                                     # L
    limit = np.maximum(4 * np.maximum(usual, np.median(usual) / 2), JUMP_MV)
    jumps = size > limit[:, None]
    if not jumps.any():
        return jumps
    # In one sample no QRS complex rises by half of the height around it.
    around = 2 * BLOCK + 1
    height = maximum_filter1d(ecg, around, axis=1) - minimum_filter1d(ecg, around, axis=1)
    return jumps & (size > 0.5 * height)


def find_bursts(ecg):
    """ecg (L, N) -> bool (L, N), True in blocks of 0.1 s too tall or too steep for a heart."""
    bursts = np.zeros(ecg.shape, bool)
    N = ecg.shape[1] // BLOCK * BLOCK
    if N < STRETCH:
        return bursts
    blocks = ecg[:, :N].reshape(len(ecg), -1, BLOCK)                                       # L n 25
    # Height above or below the baseline, which is the median of a second.
    baseline = median_filter(blocks.mean(2), (1, 11), mode="nearest")                      # L n
    height = np.maximum(blocks.max(2) - baseline, baseline - blocks.min(2))                # L n
    steep = np.sqrt(np.square(np.diff(blocks, axis=2)).mean(2))                            # L n

    # A beat is tall and steep for a block or two of ten: longer is noise, or a loose electrode.
    tallest = typical_maximum(height)                                                      # L 1
    steepest = typical_maximum(steep)                                                      # L 1
    # No ectopic beat is so much taller, not even in a lead that hardly shows the others.
    found = height > 9 * tallest.max()
    tall = height > 3 * tallest
    if tall.any():
        found |= percentile_filter(tall, 40, (1, 10), mode="reflect")
    too_steep = steep > 1.5 * steepest
    if too_steep.any():
        found |= percentile_filter(too_steep, 40, (1, 10), mode="reflect")

    # Where beats do not stand out of what is around them, nothing can be said.
    found &= tallest > 3 * np.median(height, axis=1, keepdims=True)
    bursts[:, :N] = found.repeat(BLOCK, axis=1)
    bursts[:, N:] = found[:, -1:]
    # The change out of a burst belongs to it, too.
    bursts[:, 1:] |= bursts[:, :-1].copy()
    return bursts


def stretches(x):
    """x (L, N) -> (L, n, STRETCH); what is left at the end is dropped, a short x is one stretch."""
    n = x.shape[1] // STRETCH
    if n == 0:
        return x[:, None]
    return x[:, :n * STRETCH].reshape(len(x), n, STRETCH)


def typical_maximum(blocks):
    """blocks (L, n) of 0.1 s -> (L, 1): the median over stretches of 2 s of their maxima."""
    many = STRETCH // BLOCK
    n = blocks.shape[1] // many * many
    maxima = blocks[:, :n].reshape(len(blocks), -1, many).max(2)
    return np.median(maxima, axis=1, keepdims=True)


def make_level(ecg, bad):
    """ecg (L, N) without its bad changes (L, N), and the bad samples that hide the ECG (L, N).

    The ECG goes on after a disturbance from the level before it, so that a step leaves no trace. A
    spike is bridged by a straight line, and hides nothing.
    """
    hidden = bad.copy()
    level = ecg
    if bad.any():
        level = ecg.copy()
    for lead in np.flatnonzero(bad.any(1)):
        x = ecg[lead]
        change = np.diff(x, prepend=x[:1])
        borders = np.flatnonzero(np.diff(np.pad(bad[lead], 1)))
        spikes = []
        for start, end in borders.reshape(-1, 2):
            if is_spike(change[start:end]):
                spikes.append((start, end))
                hidden[lead, start:end] = False
        x = x - np.cumsum(np.where(hidden[lead], change, 0))
        for start, end in spikes:
            # The last of a spike's changes leads back: sample end - 1 is a good one again.
            x[start - 1:end] = np.linspace(x[start - 1], x[end - 1], end - start + 1)
        level[lead] = x
    return level, hidden


def is_spike(change):
    """Whether the changes (n,) of a disturbance are a spike: at most 16 ms, up and down again."""
    return len(change) <= 5 and abs(change.sum()) < 0.3 * np.abs(change).max()


# ---------------------------------------------------------------------------- R peaks

def find_r_peaks(ecg):
    """ecg (L, N) -> times of the R peaks, seconds after sample 0 (beats,). Works at any scale.

    After Pan & Tompkins (1985): band-pass, power, and a threshold between the beats and the noise
    that follows the signal. What is disturbed is made level first.
    """
    ecg, disturbed = repair(ecg)

    # 1. Band-pass: 4.5 to 20 Hz keeps the QRS complex and weakens P and T waves, wander and noise.
    x = sosfiltfilt(QRS_BAND, ecg, padtype="even", padlen=min(ecg.shape[1] - 1, ECG_HZ))   # L N

    # 2. Square, average over the leads and over 0.12 s, the length of a QRS complex.
    power = uniform_filter1d(np.square(x).mean(0), round(0.12 * ECG_HZ))                   # N
    # The filter's running sum falls a little below 0 by rounding.
    height = np.sqrt(power.clip(0))

    # 3. Candidates are local maxima 0.25 s apart: the heart cannot be excited again any sooner.
    candidates = find_peaks(np.pad(height, 1), distance=round(0.25 * ECG_HZ))[0] - 1

    # 4. Thresholds, then what is left of T waves: they are high, but not as steep.
    peaks = candidates[height[candidates] > threshold(height, disturbed)[candidates]]
    slope = np.square(np.gradient(x, axis=1)).mean(0)                                      # N
    slope = np.sqrt(uniform_filter1d(slope, round(0.12 * ECG_HZ)).clip(0))
    peaks = drop_t_waves(peaks, slope)

    # 5. The power is averaged: move to the R peak itself.
    return np.unique(move_to_maximum(peaks, np.square(x).sum(0))) / ECG_HZ


def threshold(height, disturbed):
    """What a peak of height (N,) must exceed, (N,); it follows the signal. disturbed: bool (N,)."""
    # Stretches of 1.5 s hold a beat or more: the highest is a beat, the 30th percentile the rest.
    parts = np.array_split(height, max(1, len(height) // round(1.5 * ECG_HZ)))
    undisturbed = np.array_split(np.where(disturbed, 0, height), len(parts))
    highest = np.array([part.max() for part in undisturbed])
    rest = np.array([np.percentile(part, 30) for part in parts])

    # A median of stretches is not moved by an ectopic beat or an artefact: that over 5 of them
    # follows a signal that gets weaker, that over all ignores a series of artefacts.
    wide = min(len(parts), 21)
    beat = np.minimum(median_filter(highest, 5, mode="nearest"), np.median(highest))
    rest = median_filter(rest, wide, mode="nearest")
    # In a pause there is no beat: a third of the higher ones around.
    beat = np.maximum(beat, 0.35 * percentile_filter(highest, 80, wide, mode="nearest"))
    level = 0.22 * beat + 1.4 * rest

    # Noise alone has maxima, too, 2 to 3 times the rest. Where those of the stretches are no higher
    # a beat must stand out by itself.
    in_noise = beat < (2.5 + 0.9 / np.sqrt(wide)) * rest
    level[in_noise] = np.maximum(level, 3.8 * rest)[in_noise]
    level = np.maximum(level, 1e-9)
    middle = (np.arange(len(parts)) + 0.5) * len(height) / len(parts)
    return np.interp(np.arange(len(height)), middle, level)


def drop_t_waves(peaks, slope):
    """The peaks without T waves, which follow within 0.4 s and are at most half as steep."""
    kept = []
    if len(peaks) == 0:
        return kept
    # The first peak may be the T wave of a beat just before the recording.
    previous = 0
    previous_slope = np.median(slope[peaks])
    for peak in peaks:
        if peak - previous > 0.4 * ECG_HZ or slope[peak] > 0.5 * previous_slope:
            kept.append(peak)
        # also a T wave is the predecessor of the next peak
        previous = peak
        previous_slope = slope[peak]
    return kept


def move_to_maximum(peaks, height):
    """Each peak moved to the maximum of height (N,) within 80 ms."""
    reach = round(0.08 * ECG_HZ)
    moved = []
    for peak in peaks:
        start = max(peak - reach, 0)
        moved.append(start + height[start:peak + reach + 1].argmax())
    return moved


# ---------------------------------------------------------------------------- longer

def extend_periodic(ecg, first, samples):
    """Samples first .. first + samples of an ECG (L, N), continued before and after itself.

    The part from its first R peak to its last is repeated, so that the rhythm goes on. A trace with
    fewer than two R peaks (about one beat) is repeated as a whole.
    """
    N = ecg.shape[1]
    beats = np.round(find_r_peaks(ecg) * ECG_HZ).astype(int)
    begin, end = 0, N
    if len(beats) > 1:
        begin, end = beats[0], beats[-1]

    # Where each sample comes from: from the recording itself, or from its periodic continuation.
    index = np.arange(first, first + samples)
    inside = (index >= 0) & (index < N)
    index = np.where(inside, index, begin + (index - begin) % (end - begin))
    longer = ecg[:, index]                                                          # L samples

    # Where two pieces meet there is a step. A ramp of 48 ms before it, half a QRS, closes it.
    for seam in np.flatnonzero(np.diff(index) != 1) + 1:
        ramp = np.linspace(0, 1, min(12, seam))
        step = longer[:, seam] - longer[:, seam - 1]                                       # L
        # beside a gap (NaN) there is no step to close
        step = np.nan_to_num(step)
        longer[:, seam - len(ramp):seam] += step[:, None] * ramp
    return longer


if __name__ == "__main__":
    # Imported here, since the table itself imports this module.
    from metrics.r_peak_table import print_table
    print_table()
