"""Figures of generated videos beside the true ones: beats, area curves, EF, and how they follow the ECG.

A record stands for a clip; evaluate.run_conditions makes it. It has clip and donor (numbers), fps, ef (the
set's), r_peaks (s), and under the name of each video ("true", "own", "shifted" ...) area (T,), the pixels of
the ventricle in each frame ("traced": in the set's own masks, where every frame has one), and cycle, what
metrics.lv_segmenter.cardiac_cycle says.
"""
from functools import partial

import numpy as np

from metrics.curves import MATCH_S, lag_ms, match, pearson
from metrics.ejection_fraction import ef_scores, middle, ratio, swing

SHIFT_S = 0.2       # by so much the ECG of condition "shifted" comes later
SETTLED_S = 1.0     # by then a heart that is caught in mid-beat has come to rest


def ef_figures(records):
    """EF of the generated video against the true one's, measured alike, and (_true) against the set's own."""
    found = [r.cycle["own"]["ef"] for r in records]
    return {**ef_scores(found, [r.cycle["true"]["ef"] for r in records]),
            **ef_scores(found, [r.ef for r in records], "_true")}


def beat_figures(records, name):
    """|ED frame - R peak| of the beats found; beats found, and extra ones, as shares of the R peaks.

    An R peak counts where it lies in the video, MATCH_S or more from its ends, and (but for the true video's
    figures, and where there is none) the true video has an ED frame for it: an early ectopic beat finds an
    unfilled ventricle. A missed one has no error, it lowers beats_found; an ED frame is extra if no R peak at
    all matches it.
    """
    errors, peaks, extra = [], 0, 0
    for record in records:
        times = np.array(record.cycle[name]["ed_frames"]) / record.fps
        end = (len(record.area[name]) - 1) / record.fps
        counts = (record.r_peaks >= MATCH_S) & (record.r_peaks <= end - MATCH_S)
        if name != "true" and "true" in record.cycle:
            shown = match(record.r_peaks, np.array(record.cycle["true"]["ed_frames"]) / record.fps)[0]
            counts &= np.isin(np.arange(len(counts)), shown)
        i, j = match(record.r_peaks, times)
        errors += (1000 * np.abs(record.r_peaks[i] - times[j]))[counts[i]].tolist()
        peaks, extra = peaks + counts.sum(), extra + len(times) - len(j)
    return {"ed_error_ms_median": middle(errors),
            "ed_error_ms_p95": middle(errors, partial(np.percentile, q=95)),
            "beats_found": ratio(len(errors), peaks), "extra_beats": ratio(extra, peaks)}


def shift_figures(records):
    """By how much the heart comes later, where the ECG does by SHIFT_S."""
    return {"shift_ms": middle([lag_ms(x.area["shifted"], x.area["own"], x.fps) for x in records])}


def flat_figures(records):
    """Under a flat ECG: the swing over that under the own one, of the whole video and of what follows
    SETTLED_S (a first frame of mid-beat has yet to come to rest), and whether the area drifts."""
    late = [[swing(x.area[name][round(SETTLED_S * x.fps):], x.fps) for name in ("flat", "own")]
            for x in records if len(x.area["own"]) > 2 * SETTLED_S * x.fps]
    a, b = np.reshape(late, (-1, 2)).T
    return {"flat_swing": swing_ratio(records, "flat", "own"),
            "flat_swing_settled": ratio(middle(a), middle(b)),
            "flat_drift": middle([area_drift(x.area["flat"]) for x in records])}


def swap_figures(records):
    """Under a donor's ECG: r with the donor's true curve and the own one, how often the first is higher."""
    true = {r.clip: r.area["true"] for r in records}
    r = np.array([[pearson(x.area["swapped"], true[i]) for i in (x.donor, x.clip)]
                  for x in records if x.donor in true and x.donor != x.clip]).reshape(-1, 2)
    return {"swap_follows_donor": middle(r[:, 0] > r[:, 1], np.mean), "swap_r_donor": middle(r[:, 0]),
            "swap_r_own": middle(r[:, 1])}


def in_middle(times, seconds):
    """Which of the times lie in the middle third of a video."""
    return (times >= seconds / 3) & (times < 2 * seconds / 3)


def hidden_figures(records):
    """With the ECG of the middle third hidden: r with the true curve outside of it and in it, and the swing
    in it over that under the whole ECG."""
    r, swings = [], []
    for record in records:
        true, own, area = (record.area[name] for name in ("true", "own", "hidden"))
        unseen = in_middle(np.arange(len(area)) / record.fps, len(area) / record.fps)
        r.append([pearson(area[part], true[part]) for part in (~unseen, unseen)])
        swings.append([swing(x[unseen], record.fps) for x in (area, own)])
    r, swings = np.reshape(r, (-1, 2)), np.reshape(swings, (-1, 2))
    return {"hidden_r_visible": middle(r[:, 0]), "hidden_r_unseen": middle(r[:, 1]),
            "hidden_swing": ratio(middle(swings[:, 0]), middle(swings[:, 1]))}


def area_drift(area):
    """Mean area of the last third over that of the first third."""
    third = max(1, len(area) // 3)
    return ratio(area[-third:].mean(), area[:third].mean())


def swing_ratio(records, name, reference):
    a, b = (middle([swing(x.area[k], x.fps) for x in records]) for k in (name, reference))
    return ratio(a, b)


def own_figures(records):
    """The video of a clip's own ECG: correlation of its LV area with the true one's, measured alike, and with
    that of the set's own masks (_traced), beats, swing, drift."""
    r, traced = ([pearson(x.area["own"], x.area[of]) for x in records if of in x.area]
                 for of in ("true", "traced"))
    return {"area_r_median": middle(r), "area_r_mean": middle(r, np.mean),
            "area_r_traced_median": middle(traced), "area_r_traced_mean": middle(traced, np.mean),
            **beat_figures(records, "own"),
            "swing": swing_ratio(records, "own", "true"),
            "drift": middle([area_drift(x.area["own"]) for x in records])}
