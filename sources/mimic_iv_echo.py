"""MIMIC-IV-ECHO (Gow et al. 2026, PhysioNet, version 1.0) as a prepared set.

    python -m sources.mimic_iv_echo --src=mimic-iv-echo/1.0 --out=datasets/mimic --size=112 --seed=0
    # needs: pip install pydicom; and a PhysioNet account with credentials for the data

    SRC/echo-record-list.csv            subject_id, study_id, acquisition_datetime, dicom_filepath
    SRC/structured-measurement.csv.gz   subject_id, measurement_datetime, measurement, result,
                                        test_type
    SRC/files/pNN/pNNNNNNNN/sNNNNNNNN/NNNNNNNN_NNNN.dcm

The names of the columns are those that public programs use; the data themselves were not seen when
this was written. Tables may also be called .csv or .csv.gz, with _ for -. test_type may be missing.

- No patient (subject_id) is in two splits. A part of the files is enough.
- The files carry no ECG waveform. It is read off the screen, see sources/dicom_cines.py; lead II is
  assumed.
- Still images, colour and spectral Doppler and M-mode are left out by their header, before any
  pixel is read. The set has no view labels: every B-mode view is in it.
- EF: the reader's `lvef`, else `biplane_lvef`, else `lvef_3d`, of the transthoracic measurement
  that is nearest in time to the study, at most 2 days off. `lvef_upper` is not used: it is the
  upper end of a range, and often 100.
"""
import csv
import gzip
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from common.flags import UserError, parse_flags, run_main
from data.dicom_pixels import IMAGE_2D, one_line, read_cine, read_header, ultrasound_regions
from data.ecg_files import refuse
from data.writer import draw_split
from sources.dicom_cines import DicomCinesConfig, check_flags, clip_of, write_set


@dataclass
class MimicIvEchoConfig(DicomCinesConfig):
    """Flags of `python -m sources.mimic_iv_echo`."""
    src: str = ""               # folder with echo-record-list.csv and files/
    out: str = "datasets/mimic"  # folder to write
    ecg: str = "screen"         # screen = the trace that the machine drew; none; waveform: in none


EF_NAMES = "lvef", "biplane_lvef", "lvef_3d"    # the first that a measurement has
NEAR = timedelta(days=2)        # of a measurement to a study, as in the set's own list
OTHER_SPACES = {2: "M-mode", 3: "spectral Doppler"}     # RegionSpatialFormat
COLOUR_FLOW = 2                 # RegionDataType


# ---------------------------------------------------------------------------- tables

def find_table(src, name):
    """The path of a table of the set; UserError where there is none."""
    for stem in (name, name.replace("-", "_")):
        for suffix in (".csv", ".csv.gz"):
            path = Path(src) / f"{stem}{suffix}"
            if path.is_file():
                return path
    raise UserError(f"{Path(src) / name}.csv: no such file; --src is MIMIC-IV-ECHO's folder")


def read_columns(path, columns, optional=()):
    """The rows of a table, each as the texts of these columns; "" of a missing optional one.

    UserError where another is missing, or the file is damaged.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="", errors="replace") as file:
            rows = csv.reader(file)
            names = [name.strip().lower() for name in next(rows, [])]
            for name in columns:
                refuse(name not in names, path, f"no column {name}, only {' '.join(names)}")
            places = [names.index(name) if name in names else -1 for name in (*columns, *optional)]
            for row in rows:
                # A place of -1 is the end: an empty text
                row = [*row[:len(names)], ""]
                if len(row) == len(names) + 1:
                    yield [row[k].strip() for k in places]
    except (OSError, EOFError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def parse_time(text):
    """A date and time of the set -> datetime, None where it is none."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError:
        return None


def parse_ef(text):
    """The result of a measurement -> EF in percent, None where it is none."""
    try:
        ef = float(text.removesuffix("%"))
    except ValueError:
        return None
    return ef if 0 < ef <= 100 else None


def read_efs(src, patients):
    """{patient: {time: EF in percent}} of the patients, {} where the set lacks the measurements."""
    found = defaultdict(dict)           # {patient: {time: (place in EF_NAMES, EF)}}
    try:
        path = find_table(src, "structured-measurement")
        columns = "subject_id", "measurement_datetime", "measurement", "result"
        for patient, time, name, result, test in read_columns(path, columns, ["test_type"]):
            # Some twenty million rows: the cheap questions first
            if name.lower() not in EF_NAMES or patient not in patients:
                continue
            if test.lower() not in ("", "tte"):
                continue
            time = parse_time(time)
            ef = parse_ef(result)
            if time and ef:
                rank = EF_NAMES.index(name.lower())
                found[patient][time] = min((rank, ef), found[patient].get(time, (rank, ef)))
    except UserError as error:
        print(f"{error}; the set has no EF", file=sys.stderr)
        return {}
    efs = {}
    for patient, measured in found.items():
        efs[patient] = {time: ef for time, (_, ef) in measured.items()}
    return efs


def nearest_ef(efs, time):
    """The EF of {time: EF} that was measured nearest to a time, None where none is NEAR."""
    if not efs or not time:
        return None
    nearest = min(efs, key=lambda measured: abs(measured - time))
    return efs[nearest] if abs(nearest - time) <= NEAR else None


# ---------------------------------------------------------------------------- clips

def list_jobs(config):
    """{split: [(name, file, EF or None)]} by the record list; no DICOM file is opened."""
    src = Path(config.src)
    columns = "subject_id", "study_id", "dicom_filepath"
    path = find_table(src, "echo-record-list")
    records = list(read_columns(path, columns, ["acquisition_datetime"]))
    study_times = {}                    # {study: its first time}
    for _, study, _, time in records:
        time = parse_time(time)
        if time:
            study_times[study] = min(time, study_times.get(study, time))
    efs = read_efs(src, {patient for patient, *_ in records})

    jobs = {"train": [], "val": [], "test": []}
    there = {}                          # {folder of a study: whether it is there}
    for patient, study, file, _ in records:
        folder = (src / file).parent
        if folder not in there:
            there[folder] = folder.is_dir()
        if there[folder]:
            # files/p10/p10000000/s90000000/90000000_0001.dcm is p10000000/s90000000/90000000_0001
            name = "/".join(Path(file).with_suffix("").parts[-3:])
            ef = nearest_ef(efs.get(patient), study_times.get(study))
            jobs[draw_split(patient, config)].append((name, src / file, ef))
    count = sum(map(len, jobs.values()))
    print(f"{count} of the {len(records)} files of {path.name} are in folders that are here; "
          "the set has no view labels, all views are taken", file=sys.stderr)
    refuse(not count, src, f"no folder of {path.name} is in it")
    return jobs


def check_b_mode(path, header):
    """UserError where the header says that this is not a cine in B-mode alone."""
    with one_line(path):
        regions = ultrasound_regions(header)
        colour = bool(header.get("UltrasoundColorDataPresent"))
    spaces = [region.space for region in regions]
    for space, name in OTHER_SPACES.items():
        refuse(space in spaces, path, f"{name}, no B-mode")
    colour |= any(region.data == COLOUR_FLOW for region in regions)
    refuse(colour, path, "colour Doppler, no B-mode")
    refuse(spaces and IMAGE_2D not in spaces, path, "its header has no 2D picture")


def make_clip(job, config):
    """(name, file, EF or None) -> the clip as Writer.add takes it; UserError if it is left out."""
    name, path, ef = job
    refuse(not path.is_file(), path, "no such file")
    header = read_header(path, config.least)
    check_b_mode(path, header)
    clip = dict(id=name) | clip_of(read_cine(path, header), config)
    if ef:
        clip |= dict(ef=ef, text=f"EF {ef:.0f}")
    return clip


def main():
    """Write the prepared set."""
    config = parse_flags(MimicIvEchoConfig)
    print(config)
    check_flags(config)
    write_set("mimic_iv_echo", config, list_jobs(config), make_clip)


if __name__ == "__main__":
    run_main(main)
