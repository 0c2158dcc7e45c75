"""Read an ECG file of any common kind: used by sample.py, evaluate.py and the sources.

    file  ->  ecg (L, N) float32, millivolts at 250 Hz, and the names of its leads

Kinds: tables as text and the Apple Watch's export (data/ecg_tables.py), JSON of Health Auto Export
(data/ecg_json.py), .npy, WFDB (.hea), DICOM; HL7 aECG, Philips and GE MUSE XML, SCP-ECG, EDF, ISHNE
and MFER by the package ecgdatakit. The content tells the kind. The name is a hint.

Where values are missing, a gap of up to 0.2 s is bridged. In a longer one all leads are NaN.
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

# The name of a lead, such as MLII or aVR, within whatever a file calls it
LEAD = re.compile(r"(?<![a-z\d])(?<!^-)(?:ML)?(III|II|I|aV[RLF]|V[1-6])(?![a-z\d])", re.I)
# A signal that says only that it is an ECG or a voltage
ANY_ECG = re.compile(r"^\W*(ecg|ekg|voltage|value|[mµμu]V)\W*$", re.I)
# An ECG of an unknown lead, among other signals
SOME_ECG = re.compile(r"(?<![a-z])(?:ecg|ekg|mcl)(?![a-z])", re.I)
# What monitors and sleep laboratories record besides the ECG
OTHER_SIGNAL = re.compile(r"pleth|ppg|resp|spo2|pulse|bp|art|pap|cvp|icp|eeg|emg|eog|acc", re.I)
# Group 1 is there for microvolts only
UNIT = re.compile(r"(?<![a-z])(?:([µμu]V|mcV|mi[ck]rovolt|мкВ)|mV|millivolt)s?(?![a-z\d])",
                  re.I)
# A longer gap is no detail of a beat, and a straight line through it would be an invention
LONGEST_BRIDGE_S = 0.2
# First bytes of files that are given by mistake
MISTAKES = {
    rb"\x80[\x02-\x05]": "a pickle, which is never opened; save the array with np.save",
    rb"\x89PNG|\xff\xd8\xff|GIF8": "a picture",
    rb"RIFF|.{4}ftyp|\x1aE\xdf\xa3": "a video or a sound",
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf": "an archive or a workbook; unpack it, or export a .csv",
    rb"%PDF": "a PDF; export the ECG as .csv or .xml",
    rb"\x89HDF|MATLAB [57]": "an HDF5 or MATLAB file; export a .csv",
}
# EDF: version 0, and a date and a time at byte 168
EDF = re.compile(rb"0 {7}.{160}\d\d\.\d\d\.\d\d\d\d\.\d\d\.\d\d", re.S)


class Recording(NamedTuple):
    """What a reader finds in a file."""
    signal: np.ndarray              # (L, N), NaN where a value is missing
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


# ---------------------------------------------------------------------------- readers

def read_text(path):
    """A table, or an Apple Watch export."""
    from data.ecg_tables import read_table
    return read_table(path)


def read_json(path):
    """Health Auto Export, or a recording of a Kardia."""
    from data.ecg_json import read_health_export
    return read_health_export(path)


def read_devices(path):
    """What ecgographs and Holter recorders write."""
    from data.ecg_devices import read_device_file
    return read_device_file(path)


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
    name = str(wfdb_header(path).with_suffix("").absolute())
    check_wfdb_size(path, wfdb.rdheader(name, rd_segments=True))
    record = wfdb.rdrecord(name)
    mv = np.array([[unit_mv(unit)] for unit in record.units])                              # L 1
    names = [name or "" for name in record.sig_name]
    return Recording(record.p_signal.T, names, record.fs, mv)


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


def wfdb_header(path):
    """The .hea of the WFDB record that is named REC.hea, REC.dat or REC; None if it is none."""
    if path.suffix.lower() == ".hea":
        return path
    header = Path(f"{path}.hea")
    if not path.exists() and header.exists():
        return header
    header = path.with_suffix(".hea")
    # a signal file stands in its header by name
    if header.is_file() and path.name in header.read_text(errors="replace").split():
        return header
    return None


def check_wfdb_size(path, header):
    """UserError where a header promises far more samples than its files can hold.

    Memory is taken by the header's numbers, and a gap between segments needs no file.
    """
    folder = wfdb_header(path).parent
    stored = 0
    for part in [header, *(getattr(header, "segments", None) or [])]:
        for name in set(getattr(part, "file_name", None) or []):
            file = folder / name
            if file.is_file():
                stored += file.stat().st_size
    promised = (header.sig_len or 0) * (header.n_sig or 1)
    refuse(promised > 10_000_000 + 20 * stored, path,
           f"its header promises {promised} samples, its files have {stored} bytes")


# What counts as an ECG file by its name. The content tells which of the readers reads it.
READERS = {
    ".csv": read_text,
    ".txt": read_text,
    ".tsv": read_text,
    ".npy": read_npy,
    ".hea": read_wfdb,
    ".dcm": read_dicom,
    ".json": read_json,
    ".xml": read_devices,
    ".scp": read_devices,
    ".edf": read_devices,
    ".ecg": read_devices,
    ".mwf": read_devices,
}


# ---------------------------------------------------------------------------- kinds

def text_encoding(head):
    """The encoding of a text by its first bytes; None: these bytes are no text.

    What is not UTF-8 further down is taken for Latin-1 by decode_text.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    encoding = "utf-8-sig"
    if b"\0" in head:
        # every second byte of numbers in UTF-16 is 0
        zeros_after = head[1::2].count(0)
        encoding = "utf-16-le" if zeros_after > head[::2].count(0) else "utf-16-be"
    text = head.decode(encoding, errors="replace")
    odd = [char for char in text if not char.isprintable() and char not in "\t\r\n\f\v\xa0"]
    # the last character may be cut in two, and an old text may have a stray one
    if len(odd) > 1 + len(text) // 100:
        return None
    return encoding


def decode_text(data):
    """The bytes of a text file -> str."""
    encoding = text_encoding(data[:4096]) or "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("latin-1")


def find_reader(path):
    """The reader for a file, by its first bytes; UserError where it is certainly no ECG.

    The name only helps where the bytes do not tell: REC.hea, and DICOM without its mark.
    """
    if wfdb_header(path):
        return read_wfdb
    with open(path, "rb") as file:
        head = file.read(4096)
    for start, mistake in MISTAKES.items():
        refuse(re.match(start, head, re.S), path, f"this is {mistake}")

    if head.startswith(b"\x93NUMPY"):
        return read_npy
    if head[128:132] == b"DICM" or path.suffix.lower() == ".dcm":
        return read_dicom

    # a header of EDF looks like text
    encoding = text_encoding(head)
    if EDF.match(head) or not encoding:
        return read_devices
    start = head.decode(encoding, errors="replace").lstrip("\ufeff \t\r\n")
    if start.startswith("<"):
        return read_devices
    # "[Header]" begins a table
    if re.match(r"\{|\[\s*[{\[\d\"-]", start):
        return read_json
    return read_text


def read_recording(path):
    """The Recording that the reader of this kind of file gives; UserError if it cannot be read."""
    refuse(path.is_dir(), path, "this is a folder; name one ECG file")
    refuse(not path.exists() and not wfdb_header(path), path, "no such file")
    refuse(path.exists() and not path.stat().st_size, path, "the file is empty")
    try:
        reader = find_reader(path)
        with warnings.catch_warnings(action="ignore"):
            return reader(path)
    except UserError:
        raise
    except ImportError as error:
        needed = (error.name or str(error)).split(".")[0]
        raise UserError(f"{path}: reading it needs {needed}: pip install {needed}") from None
    except Exception as error:
        # the readers fail in many ways on a damaged file
        reason = " ".join(str(error).split(";")[0].split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read, export it again: {reason}") from None


# ---------------------------------------------------------------------------- any file

def read_ecg(path, ecg_hz=0, leads=()):
    """Any ECG file -> ecg (L, N) float32 mV (median 0) at 250 Hz, names of its leads.

    ecg_hz: its sampling rate, for a file that does not say. leads: the names of its leads, which
    win over those in the file. A gap of more than 0.2 s is NaN in all leads.
    UserError if it cannot be read or is no ECG.
    """
    path = Path(path)
    recording = name_leads(path, read_recording(path), leads)
    signal = np.array(recording.signal, float)                                             # L N
    # one lead of unknown unit: none is scaled, to keep their proportions
    unit_known = np.all(recording.mv)
    if unit_known:
        signal = signal * recording.mv
    signal, leads = check_leads(path, signal, recording.names)
    hz = check_rate(path, signal, recording.hz, ecg_hz)

    signal -= np.nanmedian(signal, axis=1, keepdims=True)
    peak = np.nanmax(np.abs(signal))
    if not unit_known and not 0.005 <= peak <= 10:
        print(f"{path}: a peak of {peak:.3g} cannot be millivolts; scaled to 1 mV", file=sys.stderr)
        signal /= peak
    signal, hidden = bridge_gaps(path, signal, hz)
    return resample(signal, hidden, hz), leads


def choose_signals(names, mv):
    """Which signals are an ECG: known leads, or else what is called an ECG, or else voltages."""
    known = [k for k, name in enumerate(names) if lead_name(name)]
    called = [k for k, name in enumerate(names) if SOME_ECG.search(name)]
    voltages = [k for k, unit in enumerate(mv) if unit]
    return known or called or voltages or list(range(len(names)))


def name_leads(path, recording, leads):
    """The recording with the names of LEADS, without signals that are no leads (pressures, pleth).

    leads: the user's names, () = the file's own.
    """
    L = len(recording.signal)
    names = list(recording.names)
    mv = np.broadcast_to(recording.mv, (L, 1))
    if names and len(leads) != L:
        chosen = choose_signals(names, mv)
        others = [names[k] for k in range(L) if k not in chosen]
        if others:
            print(f"{path}: no leads, left out: {' '.join(others)}", file=sys.stderr)
            names = [names[k] for k in chosen]
            signal = np.asarray(recording.signal)[chosen]
            recording = recording._replace(signal=signal, mv=mv[chosen])
    if leads:
        names = list(leads)
    elif len(names) == 1 and not lead_name(names[0]) and not OTHER_SIGNAL.search(names[0]):
        print(f"{path}: {names[0]!r} is taken for lead I; if it is another, pass --ecg_leads=...",
              file=sys.stderr)
        names = ["I"]
    return recording._replace(names=names)


def check_leads(path, signal, names):
    """signal (L, N) and the names of its leads in LEADS, without those that hold no ECG.

    These are constant (loose electrodes), or most of their values are missing. Leads without names
    are I, II, III ...; UserError if it is no ECG.
    """
    L, N = signal.shape
    refuse(not 0 < L <= len(LEADS) or N < 2, path,
           f"1 to 12 leads are expected, it holds {L} x {N} samples")
    leads = np.array([lead_name(name) or name for name in names] or LEADS[:L])
    refuse(len(leads) != L, path, f"{len(leads)} names ({' '.join(leads)}) for {L} leads")
    unknown = [repr(str(lead)) for lead in leads if lead not in LEADS]
    refuse(unknown, path, f"{', '.join(unknown)}: no lead; pass --ecg_leads=..., for each of its "
                          f"{L} signals one of {' '.join(LEADS)}")
    refuse(len(set(leads)) < L, path, f"a lead is there twice: {' '.join(leads)}")

    # neither infinity nor a damaged number that float32 cannot hold is a value
    signal[~(np.abs(signal) < 1e30)] = np.nan
    missing = np.isnan(signal).mean(axis=1)                                                # L
    refuse(missing.min() > 0.5, path, f"{missing.min():.0%} of its values are missing")
    for lead, share in zip(leads, missing):
        if share > 0.5:
            print(f"{path}: {share:.0%} of lead {lead} is missing: left out", file=sys.stderr)
    signal = signal[missing <= 0.5]
    leads = leads[missing <= 0.5]
    alive = np.nanmax(signal, axis=1) > np.nanmin(signal, axis=1)
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


# ---------------------------------------------------------------------------- gaps and rates

def bridge_gaps(path, signal, hz):
    """signal (L, N) with straight lines for NaN, and hidden (N,): where a gap is too long for one.

    UserError where most of the recording lies in such gaps.
    """
    missing = np.isnan(signal)
    hidden = np.zeros(signal.shape[1], bool)
    bridged = 0
    for lead, lost in zip(signal, missing):
        if not lost.any():
            continue
        known = np.flatnonzero(~lost)
        lead[lost] = np.interp(np.flatnonzero(lost), known, lead[known])
        edges = np.flatnonzero(np.diff(lost, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2):
            if end - start > LONGEST_BRIDGE_S * hz:
                hidden[start:end] = True
            else:
                bridged += end - start
    if bridged:
        print(f"{path}: {bridged} missing values bridged", file=sys.stderr)
    if hidden.any():
        first = hidden.argmax() / hz
        print(f"{path}: {hidden.sum() / hz:.2f} s are missing, the first at {first:.2f} s; "
              "hidden from the model", file=sys.stderr)
    refuse(hidden.mean() > 0.5, path,
           f"{hidden.mean():.0%} of it is missing, in one lead or another")
    return signal, hidden


def resample(signal, hidden, hz):
    """signal (L, N) without NaN -> (L, samples) float32 at 250 Hz, NaN where it is hidden."""
    # A ratio of whole numbers also for 511.562 Hz: within 2 ms in 30 s.
    up, down = Fraction(ECG_HZ / hz).limit_denominator(10_000).as_integer_ratio()
    ecg = resample_poly(signal, up, down, axis=1, padtype="line").astype(np.float32)
    if hidden.any():
        # a sample is unknown where it lies between two of which one is hidden
        position = np.arange(ecg.shape[1]) * down / up
        before = np.floor(position).astype(int).clip(0, len(hidden) - 1)
        after = np.ceil(position).astype(int).clip(0, len(hidden) - 1)
        ecg[:, hidden[before] | hidden[after]] = np.nan
    return ecg
