"""The ECG of a set's clips on the time axis of their videos; for evaluate.py."""
import re
from typing import NamedTuple

import numpy as np

from common.flags import UserError
from data.dataset import ECG_HZ, crop_or_pad
from data.ecg_signal import clean_ecg, find_disturbed, find_r_peaks


def r_peaks_of(clips, i):
    """R peaks of clip i in seconds after its first frame: the set's own, else found in its ECG."""
    known = clips[i].get("r_peaks_s")
    if known:
        return np.array(re.findall(r"[-+.\de]+", known), float)
    return find_r_peaks(clips.ecg(i)) + clips[i]["ecg_offset_s"]


def pick_leads(clips, names):
    """Indices into the set's leads of names such as "I,V2"; all of them for ""."""
    names = names.split(",") if names else clips.leads
    if not names or set(names) - set(clips.leads):
        known = " ".join(clips.leads) or "none"
        raise UserError(f"--leads={','.join(names)}: the set has {known}")
    return [clips.leads.index(name) for name in names]


class AlignedEcg(NamedTuple):
    """The ECGs of B clips in one span of time."""
    ecg: np.ndarray         # (B, L, N), cleaned
    disturbed: np.ndarray   # (B, N) bool: what the model must not see


def aligned_ecg(clips, numbers, leads, start, end):
    """AlignedEcg from `start` to `end` seconds after the first frame of each clip."""
    samples = round((end - start) * ECG_HZ)
    ecgs = []
    disturbed = []
    for i in numbers:
        raw = clips.ecg(i, leads)                                                   # L n
        first = round((start - clips[i]["ecg_offset_s"]) * ECG_HZ)
        ecgs.append(crop_or_pad(clean_ecg(raw), first, samples))
        disturbed.append(crop_or_pad(find_disturbed(raw), first, samples) > 0)
    return AlignedEcg(np.stack(ecgs), np.stack(disturbed))
