"""Read an ECG file of any common kind: used by sample.py, evaluate.py and the sources.

    file  ->  ecg (L, N) float32, millivolts at 250 Hz, and the names of its leads

Kinds: Apple Watch export (.csv), tables (.csv, .txt), .npy, WFDB (.hea), DICOM (.dcm).
"""
import re
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.signal import resample_poly

from common.flags import UserError
from data.dataset import ECG_HZ, LEADS

# A sampling rate as the Apple Watch writes it in several languages, "511,562 Hertz"
HERTZ = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:hert[sz]|herc|hz|герц|赫|ヘルツ|헤르츠)", re.I)
# A line of numbers and whatever separates them
NUMBERS = re.compile(r"(?=.*(?:\d|nan|inf))(?:[\d\s,;.+\-\"e]|nan|inf)+", re.I)
# The name of a column of times
TIME = re.compile(r"\W*(?:time|t|s|sec|seconds|ms)(?![a-z\d])", re.I)
LEAD = re.compile(r"(?<![a-z\d])(?<!^-)(?:ML)?(III|II|I|aV[RLF]|V[1-6])(?![a-z\d])", re.I)
# A column that says only that it is an ECG or a voltage
ANY_ECG = re.compile(r"^\W*(ecg|ekg|voltage|value|[mµμu]V)\W*$", re.I)
# Group 1 is there for microvolts only
UNIT = re.compile(r"(?<![a-z])(?:([µμu]V|mi[ck]rovolt|мкВ)|mV|millivolt)s?(?![a-z\d])", re.I)
# Characters of some locales: true minus, Arabic decimal mark, two no-break spaces
LOCALE = {0x2212: "-", 0x66B: ".", 0xA0: " ", 0x202F: " "}


class Recording(NamedTuple):
    """What a reader finds in a file."""
    signal: np.ndarray              # (L, N)
    names: list                     # of its leads, [] = the file names none
    hz: float                       # 0 = unknown
    mv: float | np.ndarray          # mV of one unit, for all leads or (L, 1); 0 = unknown


def refuse(wrong, path, text):
    """UserError about a file if something is wrong with it."""
    if wrong:
        raise UserError(f"{path}: {text}")


def lead_name(text):
    """'Ableitung I', 'lead_ii', 'MLII', 'v5 [mV]' -> the name in LEADS, else None; 'ECG' is I."""
    found = LEAD.search(ANY_ECG.sub("I", text))
    if not found:
        return None
    by_lower_case = {name.lower(): name for name in LEADS}
    return by_lower_case[found[1].lower()]


def unit_mv(text):
    """A text that names a unit -> millivolts of one unit, 0 if it names none."""
    found = UNIT.search(text)
    if not found:
        return 0
    return 1e-3 if found[1] else 1


# ---------------------------------------------------------------------------- text

def read_text(path):
    """A table with a column a lead, or an Apple Watch export.

    An export is lines of `key,value`, then one number a line.
    """
    header, body = split_header(path)
    title = header[-1] if header else ""
    header = "\n".join(header)
    words = []
    if title:
        words = re.split(r"[,;\t]", title.lstrip("# "))
    rate = HERTZ.search(header)
    # An Apple Watch export states a rate, and has no column names above its numbers.
    watch = rate and not all(lead_name(word) or TIME.match(word) for word in words)

    table = parse_table(body, bool(watch))                                                 # L N
    if watch and len(table) == 1:
        names = LEAD.findall(header)[-1:]
    else:
        names = column_names(title, words, len(table))
    refuse(names and len(names) != len(table), path,
           f"{len(names)} names above {len(table)} columns")

    hz = 0
    if rate:
        hz = float(rate[1].replace(",", "."))
    times = [k for k, name in enumerate(names) if TIME.match(name)]
    if times:
        k = times[0]
        hz = rate_of_times(path, names[k], table[k])
        table = np.delete(table, k, axis=0)
        names = names[:k] + names[k + 1:]
    return Recording(table, names, hz, unit_mv(header))


def split_header(path):
    """The lines above the first line of numbers, and the lines from there on."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace").translate(LOCALE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for first, line in enumerate(lines):
        if NUMBERS.fullmatch(line):
            return lines[:first], lines[first:]
    raise UserError(f"{path}: no line of numbers in it; a text file holds a column for each lead")


def parse_table(body, watch):
    """Lines of numbers -> (columns, N).

    The watch writes in its user's locale without quotes: `-265,868` is one number in German, two
    columns elsewhere. Without any point in the table, a comma is a decimal one in an export of the
    watch, and if something else separates the columns.
    """
    point = any("." in line for line in body)
    separated = re.search(r"[;\"]|\d\s+[-\d]", body[0])
    decimal_comma = not point and (watch or separated)
    comma = "." if decimal_comma else " "
    cells = str.maketrans({",": comma, ";": " ", '"': " "})
    return np.loadtxt([line.translate(cells) for line in body], comments=None, ndmin=2).T


def column_names(title, words, columns):
    """Names of the columns from the line above them; [] if that line is something else.

    words: the title split at commas, semicolons and tabs.
    """
    # one word above several columns: the names are separated by spaces
    if len(words) == 1 < columns:
        words = title.split()
    comment = title.startswith("#")
    sentence = len(words) != columns and not any(map(lead_name, words))
    if comment or sentence:
        return []
    return words


def rate_of_times(path, name, times):
    """Samples a second, from a column of times in seconds (or in ms, if its name says so)."""
    unit = 1e-3 if "ms" in name.lower() else 1
    step = np.diff(times) * unit
    even = len(step) and step.min() > 0 and step.max() <= 2 * step.mean()
    refuse(not even, path, f"the times in column {name!r} do not rise evenly; "
                           "remove it and pass --ecg_hz=...")
    return 1 / step.mean()


# ---------------------------------------------------------------------------- other kinds

def read_npy(path):
    """(N,), (L, N), or (N, L) if L <= 12 < N."""
    # Memory-mapped, because neither a pickle nor a file that was cut short opens that way.
    array = np.lib.format.open_memmap(path, mode="r")
    refuse(array.ndim not in (1, 2) or array.dtype.kind not in "iuf", path,
           f"numbers (N,) or (L, N) are expected, it holds {array.dtype} {array.shape}")
    array = np.atleast_2d(array)
    if array.shape[1] <= len(LEADS) < array.shape[0]:
        array = array.T                                                                    # L N
    return Recording(array, [], 0, 0)


def read_wfdb(path):
    """A PhysioNet record: REC.hea names the files beside it."""
    import wfdb
    record = wfdb.rdrecord(str(path.with_suffix("").absolute()))
    mv = np.array([[unit_mv(unit)] for unit in record.units])                              # L 1
    return Recording(record.p_signal.T, record.sig_name, record.fs, mv)


def read_dicom(path):
    """The first group of a DICOM waveform."""
    import pydicom
    dataset = pydicom.dcmread(path)
    refuse("WaveformSequence" not in dataset, path, "this DICOM file carries no waveform")
    group = dataset.WaveformSequence[0]
    names = []
    mv = []
    for channel in group.ChannelDefinitionSequence:
        names.append(channel.ChannelSourceSequence[0].CodeMeaning)
        units = str(channel.get("ChannelSensitivityUnitsSequence", ""))
        mv.append([unit_mv(units)])
    signal = dataset.waveform_array(0).T                                                   # L N
    return Recording(signal, names, float(group.SamplingFrequency), np.array(mv))


READERS = {
    ".csv": read_text,
    ".txt": read_text,
    ".npy": read_npy,
    ".hea": read_wfdb,
    ".dcm": read_dicom,
}


# ---------------------------------------------------------------------------- any file

def read_ecg(path, ecg_hz=0, leads=()):
    """Any ECG file -> ecg (L, N) float32 mV (median 0) at 250 Hz, names of its leads.

    ecg_hz, leads: its sampling rate and the names of its leads, for a file that does not say.
    UserError if it cannot be read or is no ECG.
    """
    path = Path(path)
    recording = drop_other_signals(path, read_recording(path))
    signal = np.asarray(recording.signal, float)
    # one lead of unknown unit: none is scaled, to keep their proportions
    unit_known = np.all(recording.mv)
    if unit_known:
        signal = signal * recording.mv
    signal, leads = check_leads(path, signal, recording.names or leads)
    hz = check_rate(path, signal, recording.hz, ecg_hz)

    signal -= np.median(signal, axis=1, keepdims=True)
    peak = np.abs(signal).max()
    if not unit_known and not 0.005 <= peak <= 10:
        print(f"{path}: a peak of {peak:.3g} cannot be millivolts; scaled to 1 mV", file=sys.stderr)
        signal /= peak
    # A ratio of whole numbers also for 511.562 Hz: within 2 ms in 30 s.
    up, down = Fraction(ECG_HZ / hz).limit_denominator(10_000).as_integer_ratio()
    return resample_poly(signal, up, down, axis=1, padtype="line").astype(np.float32), leads


def read_recording(path):
    """The Recording that the reader of this kind of file gives; UserError if it cannot be read."""
    kind = path.suffix.lower()
    refuse(path.is_dir(), path, "this is a folder; name one ECG file")
    refuse(not path.exists(), path, "no such file")
    refuse(not path.stat().st_size, path, "the file is empty")
    refuse(kind not in READERS, path,
           f"ECG files are {' '.join(READERS)} (WFDB: .hea), never a pickle")
    try:
        with warnings.catch_warnings(action="ignore"):
            return READERS[kind](path)
    except UserError:
        raise
    except ImportError as error:
        needed = error.name
        raise UserError(f"{path}: reading it needs {needed}: pip install {needed}") from None
    except Exception as error:
        # the readers fail in many ways on a damaged file
        reason = " ".join(str(error).split(";")[0].split())
        raise UserError(f"{path}: cannot be read as {kind}, export it again: {reason}") from None


def drop_other_signals(path, recording):
    """The recording without signals that are no leads (pressures, pleth).

    If no name at all is that of a lead, all signals stay, for the checks to refuse them.
    """
    known = [k for k, name in enumerate(recording.names) if lead_name(name)]
    if len(known) in (0, len(recording.names)):
        return recording
    others = [name for name in recording.names if not lead_name(name)]
    print(f"{path}: no leads, left out: {' '.join(others)}", file=sys.stderr)
    mv = recording.mv
    if np.ndim(mv):
        mv = mv[known]
    names = [recording.names[k] for k in known]
    return recording._replace(signal=np.asarray(recording.signal)[known], names=names, mv=mv)


def check_leads(path, signal, names):
    """signal (L, N) and the names of its leads in LEADS, without constant leads (loose electrodes).

    Leads without names are I, II, III ...; UserError if it is no ECG.
    """
    L, N = signal.shape
    refuse(not 0 < L <= len(LEADS) or N < 2, path,
           f"1 to 12 leads are expected, it holds {L} x {N} samples")
    leads = np.array([lead_name(name) or name for name in names] or LEADS[:L])
    refuse(len(leads) != L, path, f"{len(leads)} names ({' '.join(leads)}) for {L} leads")
    unknown = [lead for lead in leads if lead not in LEADS]
    refuse(unknown, path, f"{', '.join(unknown)}: no lead; the leads are {' '.join(LEADS)}")
    refuse(len(set(leads)) < L, path, f"a lead is there twice: {' '.join(leads)}")

    bad = np.argwhere(~np.isfinite(signal))
    refuse(len(bad), path, f"{len(bad)} values missing or infinite, "
                           f"first (lead, sample): {bad[:1].tolist()}")
    alive = np.ptp(signal, axis=1) > 0
    refuse(not alive.any(), path,
           "the signal is constant, no beats in it (--ecg=flat asks for that)")
    return signal[alive], leads[alive].tolist()


def check_rate(path, signal, hz, ecg_hz):
    """The sampling rate: the file's own, or else the user's; UserError if it cannot be right."""
    refuse(hz and ecg_hz and abs(hz / ecg_hz - 1) > 0.01, path,
           f"it says {hz:g} Hz itself; drop --ecg_hz")
    hz = hz or ecg_hz
    refuse(not hz, path, "its sampling rate is unknown; pass --ecg_hz=...")
    refuse(not 50 <= hz <= 1e5, path,
           f"a sampling rate of {hz:g} Hz; pass --ecg_hz=... of 50 to 100000")
    seconds = signal.shape[1] / hz
    refuse(signal.shape[1] < 0.4 * hz, path, f"{seconds:.2f} s of ECG; 0.4 s or more are needed")
    return hz
