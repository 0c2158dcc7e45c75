"""ECGs in JSON: the Apple Watch's recordings as the app Health Auto Export writes them.

    {"data": {"ecg": [{"samplingFrequency": 512, "voltageMeasurements":
        [{"date": 1714557600.0, "voltage": 12.3, "units": "mcV"}, ...]}]}}

Used by data/ecg_files.py. "data" may be missing; a date is a text or the seconds since 1970.
"""
import json
import re
import sys

import numpy as np

from data.ecg_files import Recording, decode_text, read_devices, refuse, unit_mv
from data.ecg_times import clock_seconds, fit_rate, open_gaps


def read_health_export(path):
    """A JSON file -> Recording of its first ECG: (1, N), by the watch lead I."""
    document = json.loads(decode_text(path.read_bytes()))
    if "recordedAt" in document:
        return read_devices(path)       # a Kardia
    recordings = [found for found in find_recordings(document) if found["voltageMeasurements"]]
    refuse(not recordings, path, "no ECG in this JSON file: no list of voltageMeasurements")
    if len(recordings) > 1:
        print(f"{path}: {len(recordings)} ECGs; the first is read", file=sys.stderr)
    recording = recordings[0]
    samples = recording["voltageMeasurements"]

    values = [sample.get("voltage") for sample in samples]
    signal = np.array([values], float)                      # 1 N; null becomes NaN
    unit = unit_mv(str(samples[0].get("units", "")))
    # The rate is a number, or a text such as "512 Hz"
    stated = re.search(r"\d+(\.\d+)?", str(recording.get("samplingFrequency", "")))
    if stated:
        return Recording(signal, [], float(stated[0]), unit)
    if "date" not in samples[0]:
        return Recording(signal, [], 0, unit)
    times = fit_rate(np.diff(seconds_of(path, samples)), is_date=True)
    refuse(times is None, path, "the dates of its samples do not rise evenly, and it states no "
                                "samplingFrequency")
    return Recording(open_gaps(path, signal, times.position), [], times.hz, unit)


def find_recordings(document):
    """All objects with voltageMeasurements in a JSON document, in its order."""
    if isinstance(document, dict):
        if isinstance(document.get("voltageMeasurements"), list):
            return [document]
        document = list(document.values())
    found = []
    if isinstance(document, list):
        for part in document:
            found += find_recordings(part)
    return found


def seconds_of(path, samples):
    """The dates of the samples -> seconds after the first (N,)."""
    dates = [sample["date"] for sample in samples]
    if isinstance(dates[0], str):
        return clock_seconds(path, dates)
    return np.array(dates, float) - float(dates[0])
