"""Files of ecgographs and Holter recorders, read by the package ecgdatakit.

    HL7 aECG, Philips and GE MUSE .xml, SCP-ECG .scp, EDF .edf, ISHNE .ecg, MFER .mwf, Kardia .json
    ->  Recording: signals (L, N), their names, rate and units

Used by data/ecg_files.py. It needs `pip install ecgdatakit`.
"""
import numpy as np

from data.ecg_files import READERS, Recording, choose_signals, refuse

# The lowest 16-bit number: recorders write it where they have no value
NO_VALUE = -32768
# Millivolts of one unit, for the units that ecgdatakit writes
UNITS = {"nV": 1e-6, "uV": 1e-3, "mV": 1, "V": 1e3}


def read_device_file(path):
    """What ecgographs and Holter recorders write, by ecgdatakit: XML, SCP-ECG, EDF, ISHNE, MFER."""
    from ecgdatakit.parsing import FileParser
    refuse(not FileParser.detect_format(path), path,
           f"no ECG file of a known kind; these are {' '.join(READERS)}")
    # Its rates are rounded to whole numbers, and its millivolts know no missing values: both here.
    record = FileParser.parse(path, auto_scale=False)
    refuse(not record.leads, path, "this file holds no signals")
    names = [lead.label for lead in record.leads]
    rates = exact_rates(record)
    mv = [UNITS.get(lead.resolution_unit, 0) for lead in record.leads]

    # Signals may differ in their rates, as in EDF: those that are sampled as the ECG is.
    ecg = choose_signals(names, mv)[0]
    shape = record.leads[ecg].samples.shape
    alike = []
    for k, lead in enumerate(record.leads):
        if rates[k] == rates[ecg] and lead.samples.shape == shape:
            alike.append(k)
    signal = []
    for k in alike:
        lead = record.leads[k]
        counts = np.where(lead.samples == NO_VALUE, np.nan, lead.samples)
        signal.append(counts * lead.resolution + lead.offset)
    mv = np.array([[mv[k]] for k in alike])                                                # L 1
    return Recording(np.array(signal), [names[k] for k in alike], rates[ecg], mv)


def exact_rates(record):
    """The sampling rate of each lead of a record; ecgdatakit keeps them in several places."""
    by_name = record.raw_metadata.get("exact_sampling_rates", {})                          # EDF
    by_number = record.raw_metadata.get("sampling_rates")                                  # MFER
    of_all = record.raw_metadata.get("rhythm_time", {}).get("sampling_rate_exact")         # HL7
    if by_number:
        return by_number
    return [of_all or by_name.get(lead.label, lead.sampling_rate) for lead in record.leads]
