"""Read an ECG: Apple Watch export, CSV, TXT, .npy, WFDB, DICOM.

    file  ->  ecg (L, N) float32, millivolts at 250 Hz, and the names of its leads
"""
import re
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from common.flags import UserError
from data.dataset import ECG_HZ, LEADS

# A reader returns signal (L, N), names of the leads ([]: none), Hz (0: unknown), mV of one unit (0: unknown).

HERTZ = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:hert[sz]|herc|hz|герц|赫|ヘルツ|헤르츠)", re.I)
NUMBERS = re.compile(r"(?=.*(?:\d|nan|inf))(?:[\d\s,;.+\-\"e]|nan|inf)+", re.I)
TIME = re.compile(r"\W*(?:time|t|s|sec|seconds|ms)(?![a-z\d])", re.I)
LEAD = re.compile(r"(?<![a-z\d])(?<!^-)(?:ML)?(III|II|I|aV[RLF]|V[1-6])(?![a-z\d])", re.I)
UNIT = re.compile(r"(?<![a-z])(?:([µμu]V|mi[ck]rovolt|мкВ)|mV|millivolt)s?(?![a-z\d])", re.I)
LOCALE = {0x2212: "-", 0x66B: ".", 0xA0: " ", 0x202F: " "}  # true minus, Arabic decimal mark, no-break spaces


def refuse(wrong, path, text):
    if wrong:
        raise UserError(f"{path}: {text}")


def lead_name(text):
    """'Ableitung I', 'lead_ii', 'MLII', 'v5 [mV]' -> the name in LEADS; a mere 'ECG' is I; else None."""
    found = LEAD.search(re.sub(r"^\W*(ecg|ekg|voltage|value|[mµμu]V)\W*$", "I", text, flags=re.I))
    return {name.lower(): name for name in LEADS}[found[1].lower()] if found else None


def unit_mv(text):
    """A text that names a unit -> millivolts of one unit, 0 where it names none."""
    found = UNIT.search(text)
    return (1e-3 if found[1] else 1) if found else 0


def read_text(path):
    """A table with a column a lead, or an Apple Watch export: `key,value` lines, then one number a line.

    The watch writes its user's locale unquoted: `Messrate,511,562 Hertz`, `-265,868`. Without any point, a
    comma is a decimal one if a rate but no column names stand above, or if something else parts the columns.
    """
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").translate(LOCALE).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    first = next((i for i, line in enumerate(lines) if NUMBERS.fullmatch(line)), len(lines))
    refuse(first == len(lines), path, "no line of numbers in it; a text file holds a column for each lead")
    header, title, body = "\n".join(lines[:first]), lines[first - 1] if first else "", lines[first:]
    words = re.split(r"[,;\t]", title.lstrip("# ")) if title else []
    rate = HERTZ.search(header)
    watch = rate and not all(lead_name(word) or TIME.match(word) for word in words)
    comma = not any("." in line for line in body) and (watch or re.search(r"[;\"]|\d\s+[-\d]", body[0]))
    cells = str.maketrans({",": "." if comma else " ", ";": " ", '"': " "})
    table = np.loadtxt([line.translate(cells) for line in body], comments=None, ndmin=2).T  # columns N
    words = title.split() if len(words) == 1 < len(table) else words
    if watch and len(table) == 1:
        words = LEAD.findall(header)[-1:]
    elif title.startswith("#") or len(words) != len(table) and not any(map(lead_name, words)):
        words = []                                              # a line of text, not the names of columns
    refuse(words and len(words) != len(table), path, f"{len(words)} names above {len(table)} columns")
    hz = float(rate[1].replace(",", ".")) if rate else 0
    for k in [k for k, name in enumerate(words) if TIME.match(name)][:1]:   # a column of times gives the rate
        step = np.diff(table[k]) * (1e-3 if "ms" in words[k].lower() else 1)
        refuse(not len(step) or not step.min() > 0 or step.max() > 2 * step.mean(), path,
               f"the times in column {words[k]!r} do not rise evenly; remove it and pass --ecg_hz=...")
        table, words, hz = np.delete(table, k, axis=0), words[:k] + words[k + 1:], 1 / step.mean()
    return table, words, hz, unit_mv(header)


def read_npy(path):
    """(N,), (L, N), or (N, L) where L <= 12 < N. Memory-mapped: no pickle and no file cut short opens so."""
    array = np.lib.format.open_memmap(path, mode="r")
    refuse(array.ndim not in (1, 2) or array.dtype.kind not in "iuf", path,
           f"numbers (N,) or (L, N) are expected, it holds {array.dtype} {array.shape}")
    array = np.atleast_2d(array)
    return array.T if array.shape[1] <= len(LEADS) < array.shape[0] else array, [], 0, 0


def read_wfdb(path):
    import wfdb
    record = wfdb.rdrecord(str(path.with_suffix("").absolute()))
    return record.p_signal.T, record.sig_name, record.fs, np.array([[unit_mv(u)] for u in record.units])


def read_dicom(path):
    import pydicom
    dataset = pydicom.dcmread(path)
    refuse("WaveformSequence" not in dataset, path, "this DICOM file carries no waveform")
    group = dataset.WaveformSequence[0]
    channels = group.ChannelDefinitionSequence
    units = np.array([[unit_mv(str(c.get("ChannelSensitivityUnitsSequence", "")))] for c in channels])
    names = [c.ChannelSourceSequence[0].CodeMeaning for c in channels]
    return dataset.waveform_array(0).T, names, float(group.SamplingFrequency), units


READERS = {".csv": read_text, ".txt": read_text, ".npy": read_npy, ".hea": read_wfdb, ".dcm": read_dicom}


def read_ecg(path, ecg_hz=0, leads=()):
    """Any ECG file -> ecg (L, N) float32 mV (median 0) at 250 Hz, names of its leads; else UserError.

    ecg_hz, leads: its sampling rate and the names of its leads, for a file that does not say.
    """
    path = Path(path)
    kind = path.suffix.lower()
    refuse(path.is_dir(), path, "this is a folder; name one ECG file")
    refuse(not path.exists(), path, "no such file")
    refuse(not path.stat().st_size, path, "the file is empty")
    refuse(kind not in READERS, path, f"ECG files are {' '.join(READERS)} (WFDB: .hea), never a pickle")
    try:
        with warnings.catch_warnings(action="ignore"):
            signal, names, hz, mv = READERS[kind](path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: reading it needs {error.name}: pip install {error.name}") from None
    except Exception as error:      # the readers of damaged files raise anything
        reason = " ".join(str(error).split(";")[0].split())
        raise UserError(f"{path}: cannot be read as {kind}, export it again: {reason}") from None
    known = [k for k, name in enumerate(names) if lead_name(name)]
    if 0 < len(known) < len(names):         # pressures, pleth, Frank leads
        others = [name for name in names if not lead_name(name)]
        print(f"{path}: no leads, left out: {' '.join(others)}", file=sys.stderr)
        signal, names = np.asarray(signal)[known], [names[k] for k in known]
        mv = mv[known] if np.ndim(mv) else mv
    signal, leads = check_leads(path, np.asarray(signal, float) * (mv if np.all(mv) else 1), names or leads)
    refuse(hz and ecg_hz and abs(hz / ecg_hz - 1) > 0.01, path, f"it says {hz:g} Hz itself; drop --ecg_hz")
    hz = hz or ecg_hz
    refuse(not hz, path, "its sampling rate is unknown; pass --ecg_hz=...")
    refuse(not 50 <= hz <= 1e5, path, f"a sampling rate of {hz:g} Hz; pass --ecg_hz=... of 50 to 100000")
    refuse(signal.shape[1] < 0.4 * hz, path, f"{signal.shape[1] / hz:.2f} s of ECG; 0.4 s or more are needed")
    signal -= np.median(signal, axis=1, keepdims=True)
    peak = np.abs(signal).max()
    if not (np.all(mv) or 0.005 <= peak <= 10):
        print(f"{path}: a peak of {peak:.3g} cannot be millivolts; scaled to 1 mV", file=sys.stderr)
        signal /= peak
    ratio = Fraction(ECG_HZ / hz).limit_denominator(10_000)     # 511.562 Hz too: within 2 ms in 30 s
    return resample_poly(signal, *ratio.as_integer_ratio(), axis=1, padtype="line").astype(np.float32), leads


def check_leads(path, signal, names):
    """Refuse what is no ECG; leads without names are I, II, III ...; constant ones (loose electrodes) go."""
    L, N = signal.shape
    refuse(not 0 < L <= len(LEADS) or N < 2, path, f"1 to 12 leads are expected, it holds {L} x {N} samples")
    leads = np.array([lead_name(name) or name for name in names] or LEADS[:L])
    refuse(len(leads) != L, path, f"{len(leads)} names ({' '.join(leads)}) for {L} leads")
    unknown = [lead for lead in leads if lead not in LEADS]
    refuse(unknown, path, f"{', '.join(unknown)}: no lead; the leads are {' '.join(LEADS)}")
    refuse(len(set(leads)) < L, path, f"a lead is there twice: {' '.join(leads)}")
    bad = np.argwhere(~np.isfinite(signal))
    refuse(len(bad), path, f"{len(bad)} values missing or infinite, first (lead, sample): {bad[:1].tolist()}")
    alive = np.ptp(signal, axis=1) > 0
    refuse(not alive.any(), path, "the signal is constant, no beats in it (--ecg=flat asks for that)")
    return signal[alive], leads[alive].tolist()
