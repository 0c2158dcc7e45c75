"""Does the heart follow the ECG: beats, area curves, EF of generated clips; for evaluate.py.

Each function takes Records, one a clip, and returns {JSON key: value}; docs/metrics.md has all
keys. A median over clips is nan where there is none to take.
"""
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from metrics.curves import MATCH_S, lag_ms, match, pearson
from metrics.ejection_fraction import amplitude, ef_scores, median_or_nan, ratio

SHIFT_S = 0.2       # the ECG of the video "shifted" comes so much later, seconds
SETTLED_S = 1.0     # by then a heart that was caught in mid-beat has come to rest, seconds


@dataclass
class Record:
    """What is measured in the videos of one clip.

    Videos have names: "true" is the clip's own. "own" is generated under the clip's own ECG, and
    "again" with another seed. "shifted", "flat", "swapped" and "hidden" are generated under
    another ECG. "decoded" is the true video through the tokenizer alone. "traced" has no video: it
    stands for the masks of the set.
    """
    area: dict              # {video: LV area of each frame, (T,) in pixels}
    cycle: dict             # {video: what cardiac_cycle found: ed_frames, es_frames, ef}
    r_peaks: np.ndarray     # R peaks of the clip's own ECG, (P,) seconds after the first frame
    fps: float              # frames a second
    clip: int = 0           # number of the clip in its set
    donor: int = 0          # clip whose ECG "swapped" is generated under
    ef: float = np.nan      # EF of the clip according to the set, points; nan = unknown
    video: dict = field(default_factory=dict)   # {video: (C, T, H, W)}, where mode "ef" keeps them


# ---------------------------------------------------------------------------- under the own ECG

def ef_metrics(records):
    """EF of the generated video: ef_r2, ef_mae and ef_rmse against the EF of the true video.

    Both are measured alike. The same keys with _true: against the EF that the set states.
    """
    generated = [r.cycle["own"]["ef"] for r in records]
    measured = [r.cycle["true"]["ef"] for r in records]
    stated = [r.ef for r in records]
    return ef_scores(generated, measured) | ef_scores(generated, stated, "_true")


def countable_peaks(record, name):
    """Which R peaks (P,) of a record the video `name` is expected to show; bool.

    They lie MATCH_S or more from the ends of the video. The true video must have an ED frame for
    them: after an early ectopic beat, for example, the ventricle is not filled and shows none.
    This second rule does not apply to the true video itself, or where there is no true video.
    """
    end = (len(record.area[name]) - 1) / record.fps
    counts = (record.r_peaks >= MATCH_S) & (record.r_peaks <= end - MATCH_S)
    if name != "true" and "true" in record.cycle:
        true_times = np.array(record.cycle["true"]["ed_frames"]) / record.fps
        shown, _ = match(record.r_peaks, true_times)
        counts &= np.isin(np.arange(len(counts)), shown)
    return counts


def beat_metrics(records, name):
    """Beats of the video `name` against the R peaks.

    ed_error_ms_median, ed_error_ms_p95: |ED frame - R peak| of the beats that were found.
    beat_recall: beats found over countable R peaks. false_beats: ED frames that match no R peak at
    all, over countable R peaks. A missed beat has no error; it lowers beat_recall.
    """
    errors = []
    num_peaks = 0
    num_false = 0
    for record in records:
        counts = countable_peaks(record, name)                                      # P
        ed_times = np.array(record.cycle[name]["ed_frames"]) / record.fps           # E
        i, j = match(record.r_peaks, ed_times)
        error_ms = 1000 * np.abs(record.r_peaks[i] - ed_times[j])
        errors += error_ms[counts[i]].tolist()
        num_peaks += counts.sum()
        num_false += len(ed_times) - len(j)
    return {
        "ed_error_ms_median": median_or_nan(errors),
        "ed_error_ms_p95": median_or_nan(errors, partial(np.percentile, q=95)),
        "beat_recall": ratio(len(errors), num_peaks),
        "false_beats": ratio(num_false, num_peaks),
    }


def area_drift(area):
    """Mean of the last third of an area curve (T,) over that of the first third; 1 = no drift."""
    third = max(1, len(area) // 3)
    return ratio(area[-third:].mean(), area[:third].mean())


def amplitude_ratio(records, name, reference):
    """Median amplitude of the area of the video `name`, over that of the video `reference`."""
    ours = median_or_nan([amplitude(r.area[name], r.fps) for r in records])
    theirs = median_or_nan([amplitude(r.area[reference], r.fps) for r in records])
    return ratio(ours, theirs)


def own_metrics(records):
    """The video under a clip's own ECG.

    area_r: Pearson r of its LV area with that of the true video, measured alike. area_r_traced:
    with that of the set's own masks. amplitude: of the area, over that of the true video. drift:
    area_drift. And the keys of beat_metrics.
    """
    r = [pearson(x.area["own"], x.area["true"]) for x in records]
    traced = [pearson(x.area["own"], x.area["traced"]) for x in records if "traced" in x.area]
    return {
        "area_r_median": median_or_nan(r),
        "area_r_mean": median_or_nan(r, np.mean),
        "area_r_traced_median": median_or_nan(traced),
        "area_r_traced_mean": median_or_nan(traced, np.mean),
        **beat_metrics(records, "own"),
        "amplitude": amplitude_ratio(records, "own", "true"),
        "drift": median_or_nan([area_drift(x.area["own"]) for x in records]),
    }


# ---------------------------------------------------------------------------- under another ECG

def shift_metrics(records):
    """shift_ms: how much later the heart beats under an ECG that is SHIFT_S later; 200 is right."""
    lags = [lag_ms(x.area["shifted"], x.area["own"], x.fps) for x in records]
    return {"shift_ms": median_or_nan(lags)}


def flat_metrics(records):
    """Under a flat ECG the heart should stand still.

    flat_amplitude: amplitude of the area over that under the own ECG. flat_amplitude_settled: the
    same after SETTLED_S, when a heart that the first frame shows in mid-beat is at rest.
    flat_drift: area_drift.
    """
    flat = []
    own = []
    for x in records:
        settled = round(SETTLED_S * x.fps)
        if len(x.area["own"]) > 2 * SETTLED_S * x.fps:
            flat.append(amplitude(x.area["flat"][settled:], x.fps))
            own.append(amplitude(x.area["own"][settled:], x.fps))
    return {
        "flat_amplitude": amplitude_ratio(records, "flat", "own"),
        "flat_amplitude_settled": ratio(median_or_nan(flat), median_or_nan(own)),
        "flat_drift": median_or_nan([area_drift(x.area["flat"]) for x in records]),
    }


def swap_metrics(records):
    """Under the ECG of another clip, the donor, the heart should beat as the donor's does.

    swap_r_donor, swap_r_own: Pearson r of the area with the donor's true curve and with the clip's
    own. swap_follows_donor: share of the clips in which the first is higher.
    """
    true = {x.clip: x.area["true"] for x in records}
    r_donor = []
    r_own = []
    for x in records:
        # A donor whose true video shows no beats has no record.
        if x.donor in true and x.donor != x.clip:
            r_donor.append(pearson(x.area["swapped"], true[x.donor]))
            r_own.append(pearson(x.area["swapped"], true[x.clip]))
    follows = np.array(r_donor) > np.array(r_own)
    return {
        "swap_follows_donor": median_or_nan(follows, np.mean),
        "swap_r_donor": median_or_nan(r_donor),
        "swap_r_own": median_or_nan(r_own),
    }


def in_middle(times, seconds):
    """Which of the times (N,) lie in the middle third of a video of so many seconds; bool (N,)."""
    return (times >= seconds / 3) & (times < 2 * seconds / 3)


def hidden_metrics(records):
    """With the ECG of the middle third hidden from the model.

    hidden_r_visible, hidden_r_unseen: Pearson r with the true area outside of that third and
    inside. hidden_amplitude: amplitude inside, over that under the whole ECG.
    """
    r_visible = []
    r_unseen = []
    hidden = []
    own = []
    for x in records:
        area = x.area["hidden"]                                                     # T
        T = len(area)
        unseen = in_middle(np.arange(T) / x.fps, T / x.fps)                         # T
        r_visible.append(pearson(area[~unseen], x.area["true"][~unseen]))
        r_unseen.append(pearson(area[unseen], x.area["true"][unseen]))
        hidden.append(amplitude(area[unseen], x.fps))
        own.append(amplitude(x.area["own"][unseen], x.fps))
    return {
        "hidden_r_visible": median_or_nan(r_visible),
        "hidden_r_unseen": median_or_nan(r_unseen),
        "hidden_amplitude": ratio(median_or_nan(hidden), median_or_nan(own)),
    }


# ------------------------------------------------------------- two generated videos of a clip

def rms_difference(x, y):
    """Root mean square of the difference of two videos."""
    return (x - y).square().mean().sqrt()


def diversity(records):
    """RMS difference of two generated videos of a clip, over that of a generated and the true one.

    Samples of the true distribution differ from each other as from the true video: 1.
    """
    pairs = [(rms_difference(r.video["own"], r.video["again"]),
              rms_difference(r.video["own"], r.video["true"])) for r in records if r.video]
    return ratio(*np.mean(pairs, axis=0)) if pairs else np.nan
