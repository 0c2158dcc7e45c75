"""ECGs written as text: tables, rows that begin with a lead's name, the Apple Watch's export.

    text  ->  Recording: numbers (L, N), names of the leads, sampling rate, unit

    time,I,II           'sample #','MLII'       I,0.11      Phone timestamp;timestamp [ms];ecg [uV]
    0.000,0.11,0.14     0,0.11                  II,0.14     2024-05-01T10:00:00.000;0.0;110

Used by data/ecg_files.py. A column of times gives the sampling rate; a gap in the times becomes
NaN. A column that counts the samples is left out.
"""
import csv
import re
import sys
from typing import NamedTuple

import numpy as np

from common.flags import UserError
from data.ecg_files import LEAD, UNIT, Recording, decode_text, lead_name, refuse, unit_mv
from data.ecg_times import (CLOCK, clock_seconds, exact_numbers, fit_rate, open_gaps, strip,
                            time_unit)

# A sampling rate as the Apple Watch writes it in several languages, "511,562 Hertz"
HERTZ = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:hert[sz]|herc|hz|герц|赫|ヘルツ|헤르츠)",
                   re.I)
# Characters of some locales: true minus, Arabic decimal mark, two no-break spaces
LOCALE = {0x2212: "-", 0x66B: ".", 0xA0: " ", 0x202F: " "}
NUMBER = re.compile(r"[+-]?(?:\d+[.,]?\d*|[.,]\d+)(?:e[+-]?\d+)?|nan", re.I)
DAY = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}")
# What is written where a value is missing
MISSING = {"", "nan", "-nan", "na", "n/a", "null", "none", "-", "--", "?"}

# The name of a column of times: it begins with a short word, or has a longer one in it
TIME = re.compile(r"\W*(?:time|t|s|sec|seconds|ms)(?![a-z\d])|"
                  r".*(?<![a-z])(?:date|time|timestamps?|datetime|elapsed|epoch|unix|clock|"
                  r"(?:nano|micro|milli)?seconds|[nµμu]s|zeit|temps|tiempo)(?![a-z])", re.I)
# The name of a column that counts the samples
COUNTER = re.compile(r"\W*(?:samples?(?:[ _]?(?:number|index|count|no|nr|id))?|index|idx|row|"
                     r"n|no|nr|count|counter|number|unnamed: ?\d+)\W*", re.I)


class Column(NamedTuple):
    """One column of a table."""
    name: str                   # "" = it has none
    mv: float                   # millivolts of one unit; 0 = unknown
    cells: tuple                # (N,) strings, as written
    values: np.ndarray          # (N,) numbers, NaN where one is missing; seconds of a clock
    is_clock: bool              # its cells are times of the day or dates


# ---------------------------------------------------------------------------- a table

def read_table(path):
    """A text file -> Recording. UserError where it is no table of an ECG."""
    header, body = split_header(path)
    text = "\n".join(header)
    # An Apple Watch export states a rate, and has no column names above its numbers.
    rate = HERTZ.search(text)
    watch = bool(rate) and not is_title(header)

    # 1. Columns of strings, with their names and units
    table = split_columns(path, body, watch)
    if LEAD.fullmatch(strip(table[0][0])):
        names, units, table = spread_leads(path, header, table)
    elif watch and len(table) == 1:
        names = LEAD.findall(text)[-1:] or [""]
        units = [""]
    else:
        names, units, table = name_columns(path, header, table)

    # 2. Columns of numbers. A day without a time says nothing about the rate.
    columns = []
    for name, unit, cells in zip(names, units, table):
        if DAY.fullmatch(strip(cells[0])):
            continue
        is_clock = bool(CLOCK.fullmatch(strip(cells[0])))
        read_cells = clock_seconds if is_clock else numbers
        mv = unit_mv(unit) or unit_mv(text)
        columns.append(Column(name, mv, cells, read_cells(path, cells), is_clock))

    # 3. Times give the rate; what is neither time nor count is signal
    columns, times = sort_columns(path, columns)
    refuse(not columns, path, "it holds times and no signal")
    signal = np.array([column.values for column in columns])                               # L N
    hz = 0
    if rate:
        hz = float(rate[1].replace(",", "."))
    if times:
        hz, position = read_times(path, times)
        signal = open_gaps(path, signal, position)
    names = [column.name for column in columns]
    if not any(names):
        names = []
    return Recording(signal, names, hz, np.array([[column.mv] for column in columns]))


def split_header(path):
    """The lines above the first row of values, and the lines from there on."""
    text = decode_text(path.read_bytes()).translate(LOCALE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for first, line in enumerate(lines):
        if is_row(line):
            return lines[:first], lines[first:]
    raise UserError(f"{path}: no line of numbers in it; a text file holds a column for each lead")


def is_row(line):
    """Whether a line holds values: numbers and times, maybe after the name of a lead."""
    separator = find_separator([line], watch=False)
    cells = [strip(cell) for cell in split_line(line, separator)]
    if LEAD.fullmatch(cells[0]):
        cells = cells[1:]
    for cell in cells:
        known = NUMBER.fullmatch(cell) or CLOCK.fullmatch(cell) or DAY.fullmatch(cell)
        if not known and cell.lower() not in MISSING:
            return False
    return any(NUMBER.fullmatch(cell) for cell in cells)


def is_title(header):
    """Whether the last line of the header is nothing but names of leads and times."""
    words = re.split(r"[,;\t]", header[-1].lstrip("# "))
    return all(lead_name(word) or TIME.match(word) for word in words)


# ---------------------------------------------------------------------------- cells

def find_separator(body, watch):
    """What separates the cells of a table: ";", ",", a tab, or None for blanks.

    The watch writes in its user's locale without quotes: `-265,868` is one number in German, two
    columns elsewhere. Without any point in the table, a comma is a decimal one in an export of the
    watch, and if something else separates the columns.
    """
    # points, commas and blanks in a time do not count
    if ":" in body[0]:
        body = [CLOCK.sub("0", line) for line in body]
    row = body[0]
    point = any("." in line for line in body)
    separated = re.search(r";|\"[^\",]*,[^\",]*\"|\d\s+[-\d]", row)
    decimal_comma = not point and bool(watch or separated)
    if decimal_comma:
        row = re.sub(r"\d,\d", "0", row)
    for separator in ";,\t":
        if separator in row:
            return separator
    return None


def split_line(line, separator):
    """The cells of one line."""
    if separator is None:
        # the blank within a date separates no cells
        return re.sub(r"(\d[-/.]\d{1,2}[-/.]\d{1,4}) +(?=\d{1,2}:\d\d)", r"\1T", line).split()
    if '"' not in line:
        return line.split(separator)
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True))


def split_columns(path, body, watch):
    """Lines -> columns, tuples of N strings."""
    separator = find_separator(body, watch)
    rows = [split_line(line, separator) for line in body]
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        # separators at the end of a line
        while len(row) > width and not strip(row[-1]):
            row.pop()
        refuse(len(row) != width, path,
               f"row {number} of the numbers has {len(row)} values, the first row {width}")
    return list(zip(*rows))


def numbers(path, cells):
    """Strings -> numbers (N,), NaN where one is missing; UserError for anything else."""
    try:
        return np.array(cells, float)
    except ValueError:
        # a value is missing, in quotes, or with a decimal comma
        pass
    values = np.full(len(cells), np.nan)
    for k, cell in enumerate(map(strip, cells)):
        if cell.lower() in MISSING:
            continue
        refuse(not NUMBER.fullmatch(cell), path, f"row {k + 1}: {cell[:30]!r} is no number")
        values[k] = float(cell.replace(",", "."))
    return values


# ---------------------------------------------------------------------------- names

def name_columns(path, header, table):
    """Names and units of the columns from the lines above them ("" = none), and the columns.

    A column without any value comes from a separator at the end of the lines, and is left out.
    """
    full = [k for k, cells in enumerate(table) if any(map(strip, cells))]
    columns = len(full)
    words = []
    units = []
    if header:
        words = title_words(header[-1], len(table))
    # A second line may give the units: 'sample #','mV','mV'
    if len(header) > 1 and len(words) == len(table) and any(map(UNIT.fullmatch, words)):
        above = title_words(header[-2], len(table))
        if len(above) == len(table):
            units = words
            words = above
    if len(words) == len(table) > columns:
        words = [words[k] for k in full]
        units = [units[k] for k in full if units]

    known = [bool(lead_name(word) or TIME.match(word) or COUNTER.fullmatch(word)) for word in words]
    comment = header and header[-1].startswith("#") and not (len(words) == columns and all(known))
    sentence = len(words) != columns and not any(map(lead_name, words))
    if comment or sentence:
        words = [""] * columns
        units = []
    refuse(len(words) != columns, path, f"{len(words)} names above {columns} columns")
    return words, units or words, [table[k] for k in full]


def title_words(title, columns):
    """A line split into words, if possible into as many as there are columns."""
    title = title.lstrip("# ")
    words = re.split(r"[,;\t]", title)
    # one word above several columns: the names are separated by blanks
    if len(words) == 1 < columns:
        words = re.split(r"\s{2,}", title)
        if len(words) != columns:
            words = title.split()
    return [strip(word) for word in words]


def spread_leads(path, header, table):
    """A table whose first column names leads -> names, units and columns, one a lead.

    Each lead has a row, `I,0.1,0.2,0.3`, or each value has one: `I,0.1`, or `I,TIME,0.1`.
    """
    labels = [strip(cell) for cell in table[0]]
    leads = list(dict.fromkeys(labels))
    if len(leads) == len(labels):
        rows = list(zip(*table[1:]))
        return leads, [""] * len(leads), rows

    rows_of = {lead: [] for lead in leads}
    for row, lead in enumerate(labels):
        rows_of[lead].append(row)
    lengths = {len(rows) for rows in rows_of.values()}
    refuse(len(lengths) > 1, path, f"its leads have {min(lengths)} to {max(lengths)} values each")
    # the times of the first lead are those of all
    times = [tuple(cells[row] for row in rows_of[leads[0]]) for cells in table[1:-1]]
    values = [tuple(table[-1][row] for row in rows) for rows in rows_of.values()]
    names = title_words(header[-1], len(table))[1:-1] if header else []
    if len(names) != len(times):
        names = [""] * len(times)
    return names + leads, [""] * (len(times) + len(leads)), times + values


def sort_columns(path, columns):
    """The columns that hold signals, and those that hold times; those that count are left out."""
    signals = []
    times = []
    counts = []
    for number, column in enumerate(columns, 1):
        is_lead = bool(lead_name(column.name))
        # no ECG rises all the time
        step = np.diff(column.values)
        rises = len(step) > 1 and not is_lead and bool(np.all(step > 0))
        by_name = bool(TIME.match(column.name)) and not is_lead
        if column.is_clock or by_name:
            times.append(column)
        elif COUNTER.fullmatch(column.name) or rises and np.all(step == 1):
            counts.append(column)
        elif rises and len(columns) > 1:
            print(f"{path}: column {number} rises all the time: taken for times", file=sys.stderr)
            times.append(column)
        else:
            signals.append(column)
    # a column "sample" alone is the signal
    return signals or counts, times


# ---------------------------------------------------------------------------- times

def read_times(path, columns):
    """Columns of times -> Times of the first of them that is even; UserError if none is.

    A sensor's own clock is asked first, that of the phone which received the samples last.
    """
    def rank(column):
        name = column.name.lower()
        return "phone" in name, "sensor" not in name

    for column in sorted(columns, key=rank):
        times = even_times(column)
        if times:
            return times
    raise UserError(f"{path}: the times in column {columns[0].name!r} do not rise evenly; "
                    "remove it and pass --ecg_hz=...")


def even_times(column):
    """The Times of a column; None where they do not rise evenly."""
    if column.is_clock:
        return fit_rate(np.diff(column.values), is_date=True)
    # Times that count from 0 are small.
    is_date = abs(column.values[0]) > 1e6
    if is_date:
        step = np.diff(exact_numbers(column.cells))
    else:
        step = np.diff(column.values)
    return fit_rate(step * time_unit(column.name, step), is_date)
