"""ECG signals (L, N) at 250 Hz: clean them, find their beats, make them longer."""
import numpy as np
from scipy.ndimage import percentile_filter, uniform_filter1d
from scipy.signal import butter, find_peaks, lfilter, sosfiltfilt

from data.dataset import ECG_HZ

CLEAN_BAND = np.concatenate([butter(5, 0.67, "highpass", fs=ECG_HZ, output="sos"),
                             butter(5, 40, "lowpass", fs=ECG_HZ, output="sos")])
QRS_BAND = butter(2, (5, 20), "bandpass", fs=ECG_HZ, output="sos")
FLAT_MV = 0.03      # a smaller standard deviation is no heart beat: it must not become amplified noise


def clean_ecg(ecg):
    """ecg (L, N) mV -> (L, N) float32: 0.67 to 40 Hz, mean 0 and standard deviation 1 over leads and time."""
    x = sosfiltfilt(CLEAN_BAND, ecg, padlen=min(ecg.shape[1] - 1, ECG_HZ))      # 1 s: the high-pass settles
    return ((x - x.mean()) / max(x.std(), FLAT_MV)).astype(np.float32)


def redraw_ecg(ecg, rng, share):
    """A cleaned ECG (L, N) as another recorder would draw it, a `share` of the times: for training.

    The filters of monitors and echo machines smear the waves; here exponential tails of 8 to 300 ms do, one
    after and one before each wave, of either sign and at most 0.8 of its height. No R peak moves.
    """
    if rng.random() >= share:
        return ecg
    x = ecg
    for way in (1, -1):
        keep = np.exp(-1 / (ECG_HZ * np.exp(rng.uniform(*np.log([0.008, 0.3])))))
        tail = lfilter([1 - keep], [1, -keep], x[:, ::way])[:, ::way]
        x = x + rng.uniform(-0.8, 0.8) * tail * np.abs(x).max() / max(np.abs(tail).max(), 1e-6)
    return (x * (ecg.std() / max(x.std(), 1e-6))).astype(np.float32)


def find_r_peaks(ecg):
    """ecg (L, N) -> times of the R peaks, seconds after sample 0 (beats,), after Pan & Tompkins (1985).

    A QRS complex is where the slope of the 5 to 20 Hz band, over all leads, is steep against the other beats
    and against its surroundings, which keeps noise out of a pause. Any scale.
    """
    x = sosfiltfilt(QRS_BAND, ecg, padtype="even", padlen=min(ecg.shape[1] - 1, ECG_HZ))
    power = uniform_filter1d(np.square(np.gradient(x, axis=1)).mean(0), round(0.12 * ECG_HZ))
    slope = np.sqrt(power.clip(0))      # the filter's running sum falls below 0 by rounding
    peaks = find_peaks(np.pad(slope, 1), distance=round(0.25 * ECG_HZ))[0] - 1      # refractory 0.25 s
    strongest = [part.max() for part in np.array_split(slope, max(1, len(slope) // round(1.5 * ECG_HZ)))]
    beat = max(np.median(strongest), 0.2 * slope.max())     # the median is no ectopic beat and no artefact
    background = percentile_filter(slope, 30, 2 * ECG_HZ)
    peaks = [p for p in peaks if slope[p] > max(0.3 * beat, 3.2 * background[p], 1e-9)]
    # a T wave comes within 0.36 s and is half as steep as its QRS complex, or less
    peaks = [p for q, p in zip([-ECG_HZ, *peaks], peaks)
             if p - q > 0.36 * ECG_HZ or slope[p] > 0.5 * slope[q]]
    height, reach = np.square(x).sum(0), round(0.08 * ECG_HZ)
    starts = [max(p - reach, 0) for p in peaks]
    return np.unique([s + height[s:p + reach + 1].argmax() for s, p in zip(starts, peaks)]) / ECG_HZ


def go_on(ecg, first, samples):
    """Samples first .. first + samples of an ECG (L, N) that goes on before its start and after its end.

    There it repeats itself from the first R peak to the last, so that the rhythm stays, or as a whole where
    it has fewer than two R peaks (a trace of about one beat).
    """
    N, beats = ecg.shape[1], np.round(find_r_peaks(ecg) * ECG_HZ).astype(int)
    lo, hi = (beats[0], beats[-1]) if len(beats) > 1 else (0, N)
    at = np.arange(first, first + samples)
    at = np.where((at >= 0) & (at < N), at, lo + (at - lo) % (hi - lo))
    longer = ecg[:, at]
    for seam in np.flatnonzero(np.diff(at) != 1) + 1:
        ramp = np.linspace(0, 1, min(12, seam))             # closes the step within 48 ms, half a QRS
        longer[:, seam - len(ramp):seam] += (longer[:, seam] - longer[:, seam - 1])[:, None] * ramp
    return longer
