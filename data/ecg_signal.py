"""ECG signals (L, N) at 250 Hz: clean them, find their R peaks, make them longer, augment them.

Used by the trainings (clean_ecg, augment_recorder_filter), sample.py and evaluate.py.
"""
import numpy as np
from scipy.ndimage import percentile_filter, uniform_filter1d
from scipy.signal import butter, find_peaks, lfilter, sosfiltfilt

from data.dataset import ECG_HZ

# What ST-MEM was trained on: above the wander of the baseline, below the muscles and the mains.
CLEAN_BAND = np.concatenate([
    butter(5, 0.67, "highpass", fs=ECG_HZ, output="sos"),
    butter(5, 40, "lowpass", fs=ECG_HZ, output="sos"),
])
QRS_BAND = butter(2, (5, 20), "bandpass", fs=ECG_HZ, output="sos")
# A smaller standard deviation is no heart beat, and must not become amplified noise.
FLAT_MV = 0.03


def clean_ecg(ecg):
    """ecg (L, N) mV -> (L, N) float32: 0.67 to 40 Hz, mean 0, standard deviation 1.

    Mean and deviation are taken over leads and time together, so that leads keep their proportions.
    """
    # 1 s of padding lets the high-pass settle before the recording begins.
    x = sosfiltfilt(CLEAN_BAND, ecg, padlen=min(ecg.shape[1] - 1, ECG_HZ))
    scale = max(x.std(), FLAT_MV)
    return ((x - x.mean()) / scale).astype(np.float32)


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


# ---------------------------------------------------------------------------- R peaks

def find_r_peaks(ecg):
    """ecg (L, N) -> times of the R peaks, seconds after sample 0 (beats,). Works at any scale.

    After Pan & Tompkins (1985): a QRS complex is where the slope of the ECG is steep.
    """
    # 1. Band-pass: 5 to 20 Hz keeps the QRS complex and weakens P and T waves, wander and noise.
    x = sosfiltfilt(QRS_BAND, ecg, padtype="even", padlen=min(ecg.shape[1] - 1, ECG_HZ))   # L N

    # 2. Differentiate, square, average over the leads and over 0.12 s, the length of a QRS complex.
    power = np.square(np.gradient(x, axis=1)).mean(0)                                      # N
    power = uniform_filter1d(power, round(0.12 * ECG_HZ))
    # The filter's running sum falls a little below 0 by rounding.
    slope = np.sqrt(power.clip(0))

    # 3. Candidates are local maxima 0.25 s apart: the heart cannot be excited again any sooner.
    candidates = find_peaks(np.pad(slope, 1), distance=round(0.25 * ECG_HZ))[0] - 1

    # 4. Thresholds, then what is left of T waves.
    peaks = steep_peaks(candidates, slope)
    peaks = drop_t_waves(peaks, slope)

    # 5. The slope is steepest beside the R peak: move to it.
    return np.unique(move_to_maximum(peaks, np.square(x).sum(0))) / ECG_HZ


def steep_peaks(candidates, slope):
    """Those candidates that are steep enough for a QRS complex."""
    # The typical beat: the median over stretches of 1.5 s, each of which holds a beat or more.
    # A median is not moved by an ectopic beat or an artefact.
    stretches = np.array_split(slope, max(1, len(slope) // round(1.5 * ECG_HZ)))
    beat = max(np.median([stretch.max() for stretch in stretches]), 0.2 * slope.max())
    # The second threshold is local. It keeps the noise in a pause from being taken for beats.
    background = percentile_filter(slope, 30, 2 * ECG_HZ)

    peaks = []
    for peak in candidates:
        if slope[peak] > max(0.3 * beat, 3.2 * background[peak], 1e-9):
            peaks.append(peak)
    return peaks


def drop_t_waves(peaks, slope):
    """The peaks without T waves, which follow within 0.36 s and are at most half as steep."""
    kept = []
    previous = None
    for peak in peaks:
        first = previous is None
        if first or peak - previous > 0.36 * ECG_HZ or slope[peak] > 0.5 * slope[previous]:
            kept.append(peak)
        # also a T wave is the predecessor of the next peak
        previous = peak
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
    longer = ecg[:, index]                                                                # L samples

    # Where two pieces meet there is a step. A ramp of 48 ms before it, half a QRS, closes it.
    for seam in np.flatnonzero(np.diff(index) != 1) + 1:
        ramp = np.linspace(0, 1, min(12, seam))
        step = longer[:, seam] - longer[:, seam - 1]                                       # L
        longer[:, seam - len(ramp):seam] += step[:, None] * ramp
    return longer
