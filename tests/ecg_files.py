"""ECG files as tables, apps and devices write them: leads I and II of one 10 s ECG, for the tests."""
import base64
import json
import struct
from datetime import datetime, timedelta

import numpy as np

from data.ecgsyn import make_ecg

BEATS = make_ecg(0, 10, hr=70, noise=0.1)
START = datetime(2024, 5, 1, 23, 59, 57)


def ecg_at(hz):
    """(N, 2) mV: leads I and II of 10 s with known R peaks."""
    time = np.arange(int(10 * hz)) / hz
    return np.stack([np.interp(time, np.arange(2500) / 250, BEATS.ecg[:, k]) for k in (0, 1)], 1)


def rows(hz, line, *head):
    """A table: line(k, seconds, mV of lead I, mV of lead II) for each sample, under the lines of head."""
    return "\n".join([*head, *(line(k, k / hz, *x) for k, x in enumerate(ecg_at(hz)))])


def clock(seconds, how="%Y-%m-%dT%H:%M:%S.", digits=6):
    """A date as text, its fraction of a second cut to so many digits."""
    now = START + timedelta(seconds=seconds)
    return now.strftime(how) + f"{now.microsecond:06d}"[:digits]


def long_rows(line):
    """A row a value, all of lead I before all of lead II."""
    x = ecg_at(500)
    return "\n".join(line(lead, k, x[k, i]) for i, lead in enumerate(("I", "II")) for k in range(len(x)))


def health(hz=512, stated=True, date=lambda t: 1714557600 + t):
    """Health Auto Export's JSON."""
    samples = [dict(date=date(k / hz), voltage=1000 * x, units="mcV") for k, x in enumerate(ecg_at(hz)[:, 0])]
    return dict(classification="Sinus Rhythm", voltageMeasurements=samples) | (
        dict(samplingFrequency=hz) if stated else {})


# name: (content, rate that the file tells or 0, leads, flags)
TABLES = {
    "counted": (rows(500, lambda k, t, a, b: f"{k},{a:.4f}", "Sample,Amplitude"), 0, ["I"], {}),
    "counted_mit": (rows(360, lambda k, t, a, b: f"{k},{b:.3f},{a:.3f}", "'sample #','MLII','V5'",
                         "'sample #','mV','mV'"), 0, ["II", "V5"], {}),
    "elapsed_mit.txt": (rows(360, lambda k, t, a, b: f"'{int(t) // 60}:{t % 60:06.3f}',{b:.3f},{a:.3f}",
                             "'Elapsed time','MLII','V5'", "'hh:mm:ss.mmm','mV','mV'"), 360, ["II", "V5"], {}),
    "blanks": (rows(360, lambda k, t, a, b: f"{k:10d}  {b:8.3f}  {a:8.3f}", "  sample #    MLII       V5"), 0,
               ["II", "V5"], {}),
    "nothing_named": (rows(500, lambda k, t, a, b: f"{t:.3f},{a:.4f},{b:.4f}"), 500, ["I", "II"], {}),
    "savetxt": (rows(500, lambda k, t, a, b: f"{t:.18e} {b:.18e}", "# time II"), 500, ["II"], {}),
    "lead_before_value": (long_rows(lambda lead, k, x: f"{lead},{x:.4f}"), 0, ["I", "II"], {}),
    "lead_time_value": ("lead,time,mV\n" + long_rows(lambda lead, k, x: f"{lead},{k / 500:.3f},{x:.4f}"), 500,
                        ["I", "II"], {}),
    "row_a_lead": ("\n".join([",".join([lead, *(f"{x:.4f}" for x in ecg_at(500)[:, i])])
                              for i, lead in enumerate(("I", "aVF"))]), 0, ["I", "aVF"], {}),
    "iso": (rows(499.31, lambda k, t, a, b: f"{clock(t)}Z,{b:.4f}", "timestamp,II"), 499.31, ["II"], {}),
    "iso_ms.tsv": (rows(499.31, lambda k, t, a, b: f"{clock(t, digits=3)}+02:00\t{b:.4f}", "Date\tII"), 499.31,
                   ["II"], {}),
    "iso_comma": (rows(256, lambda k, t, a, b: f"{clock(t, '%d.%m.%Y %H:%M:%S,')};" + f"{b:.4f}".replace(".", ","),
                       "Zeit;II"), 256, ["II"], {}),
    "iso_blank": (rows(250, lambda k, t, a, b: f"{clock(t, '%Y-%m-%d %H:%M:%S.')} {b:.4f}"), 250, ["I"], {}),
    "clock": (rows(250, lambda k, t, a, b: f"{clock(t, '%H:%M:%S.', 3)},{b:.4f}", "Time,II"), 250, ["II"], {}),
    "epoch": (rows(499.31, lambda k, t, a, b: f"{1714557600 + t:.6f},{b:.4f}", "unix,II"), 499.31, ["II"], {}),
    "epoch_ms": (rows(250, lambda k, t, a, b: f"{1714557600000 + 1000 * t:.0f},{b:.4f}", "Timestamp,II"), 250,
                 ["II"], {}),
    "epoch_us": (rows(499.31, lambda k, t, a, b: f"{1714557600000000 + round(1e6 * t)},{b:.4f}", "time_us,II"),
                 499.31, ["II"], {}),
    "nanoseconds": (rows(499.31, lambda k, t, a, b: f"{1714557600 * 10 ** 9 + round(1e9 * t)},{b:.4f}",
                         "timestamp,II"), 499.31, ["II"], {}),
    "polar": (rows(130, lambda k, t, a, b: ";".join([
        clock(k // 73 * 73 / 130, digits=3), str(599616197345345536 + round(1e9 * t)), f"{1000 * t:.6f}",
        f"{1000 * a:.0f}"]), "Phone timestamp;sensor timestamp [ns];timestamp [ms];ecg [uV]"), 130, ["I"], {}),
    "packets": (rows(130, lambda k, t, a, b: f"{clock(k // 13 * 13 / 130, digits=3)},{a:.4f}", "time,ecg"), 130,
                ["I"], {}),
    "name ECG 1": (rows(500, lambda k, t, a, b: f"{a:.4f}", "ECG 1"), 0, ["I"], {}),
    "name ECG [mV]": (rows(500, lambda k, t, a, b: f"{t:.3f},{a:.4f}", "time,ECG [mV]"), 500, ["I"], {}),
    "name MCL1": (rows(500, lambda k, t, a, b: f"{a:.4f}", "MCL1"), 0, ["V1"], dict(leads=["V1"])),
    "name col": (rows(500, lambda k, t, a, b: f"{k}, {a:.4f}, {b:.4f}", "n, col 0, col 1"), 0, ["II", "V2"],
                 dict(leads=["II", "V2"])),
    "flag_wins": (rows(500, lambda k, t, a, b: f"{a:.4f},{b:.4f}", "I,II"), 0, ["V1", "V2"],
                  dict(leads=["V1", "V2"])),
    "health.json": (json.dumps({"data": {"ecg": [health(), health()]}}), 512, ["I"], {}),
    "health_dates.json": (json.dumps({"ecg": [health(499.31, stated=False)]}), 499.31, ["I"], {}),
    "health_text.json": (json.dumps([health(256, date=lambda t: clock(t, "%Y-%m-%d %H:%M:%S +0200", 0))]), 256,
                         ["I"], {}),
    "health_seconds.json": (json.dumps([health(256, False, lambda t: clock(t, "%Y-%m-%d %H:%M:%S", 0))]), 256,
                            ["I"], {}),
}


# ---------------------------------------------------------------------------- devices

def counts(hz, per_mv=200):
    """{lead: int16 counts} of leads I and II."""
    return {lead: np.round(per_mv * x).astype("<i2") for lead, x in zip(("I", "II"), ecg_at(hz).T)}


def aecg(hz=499.31, unit="uV"):
    """HL7 annotated ECG."""
    sequences = "".join(
        f'''<component><sequence><code code="MDC_ECG_LEAD_{lead}" codeSystem="2.16.840.1.113883.6.24"/>
        <value xsi:type="SLIST_PQ"><origin value="0" unit="{unit}"/><scale value="5" unit="{unit}"/>
        <digits>{" ".join(map(str, x))}</digits></value></sequence></component>''' for lead, x in counts(hz).items())
    return f'''<?xml version="1.0" encoding="UTF-8"?>
<AnnotatedECG xmlns="urn:hl7-org:v3" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><component><series>
<code code="RHYTHM"/><component><sequenceSet><component><sequence><code code="TIME_RELATIVE"/>
<value xsi:type="GLIST_PQ"><head value="0" unit="s"/><increment value="{1 / hz:.12f}" unit="s"/></value></sequence>
</component>{sequences}</sequenceSet></component></series></component></AnnotatedECG>'''.encode()


def muse():
    """GE MUSE XML."""
    leads = "".join(f'''<LeadData><LeadByteCountTotal>{x.nbytes}</LeadByteCountTotal>
        <LeadSampleCountTotal>{len(x)}</LeadSampleCountTotal><LeadAmplitudeUnitsPerBit>5</LeadAmplitudeUnitsPerBit>
        <LeadAmplitudeUnits>MICROVOLTS</LeadAmplitudeUnits><LeadID>{lead}</LeadID><LeadSampleSize>2</LeadSampleSize>
        <WaveFormData>{base64.b64encode(x.tobytes()).decode()}</WaveFormData></LeadData>'''
                    for lead, x in counts(500).items())
    return f'''<?xml version="1.0" encoding="ISO-8859-1"?><!DOCTYPE RestingECG SYSTEM "restecg.dtd"><RestingECG>
<MuseInfo><MuseVersion>8</MuseVersion></MuseInfo><Waveform><WaveformType>Rhythm</WaveformType>
<SampleBase>500</SampleBase><SampleExponent>0</SampleExponent>{leads}</Waveform></RestingECG>'''.encode()


def philips():
    """Philips XML with plain samples."""
    x = counts(500)
    samples = " ".join(str(value) for lead in x.values() for value in lead)
    return f'''<?xml version="1.0" encoding="UTF-8"?><restingecgdata><documentinfo><documenttype>SierraECG</documenttype>
<documentversion>1.03</documentversion></documentinfo><dataacquisition><signalcharacteristics>
<samplingrate>500</samplingrate><resolution>5</resolution></signalcharacteristics></dataacquisition><waveforms>
<parsedwaveforms durationperchannel="10000" samplespersecond="500" resolution="5" leadlabels="I II"
numberofleads="2" dataencoding="Plain">{samples}</parsedwaveforms></waveforms></restingecgdata>'''.encode()


def edf(signals=("ECG I", "Resp"), hz=(256, 32), record_s=1):
    """EDF: an ECG beside a slower signal."""
    x = [counts(hz[0])["I"], np.zeros(10 * hz[1], "<i2")]
    fixed = ["0", "X X X X", "Startdate X X X X", "01.05.24", "10.00.00", str(256 * 3), "", "10", str(record_s), "2"]
    text = "".join(value.ljust(width) for value, width in zip(fixed, (8, 80, 80, 8, 8, 8, 44, 8, 8, 4)))
    fields = [signals, ("", ""), ("uV", "L"), ("-163840", "-1"), ("163835", "1"), ("-32768",) * 2, ("32767",) * 2,
              ("", ""), [str(n) for n in hz], ("", "")]
    for values, width in zip(fields, (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)):
        text += "".join(value.ljust(width) for value in values)
    blocks = [np.concatenate([signal.reshape(10, -1)[k] for signal in x]) for k in range(10)]
    return text.encode("ascii") + np.concatenate(blocks).tobytes()


def ishne():
    """ISHNE Holter: 2 leads, 5 microvolts a count, one lost value."""
    x = np.stack(list(counts(200).values()), 1)
    x[1000] = -32768
    header = bytearray(522)
    header[:8] = b"ISHNE1.0"
    struct.pack_into("<iiiih", header, 10, 0, len(x), 522, 522, 1)
    struct.pack_into("<h12h12h12h", header, 156, 2, 5, 6, *[-9] * 10, *[1] * 12, *[5000] * 12)
    struct.pack_into("<h", header, 272, 200)
    return bytes(header) + x.tobytes()


def scp():
    """SCP-ECG: sections 0, 3 and 6, the samples not compressed."""
    x = list(counts(500).values())
    leads = b"".join(struct.pack("<IIB", 1, len(x[0]), code) for code in (1, 2))
    body = {3: bytes([2, 0]) + leads,
            6: struct.pack("<HHBB2H", 5000, 2000, 0, 0, x[0].nbytes, x[1].nbytes) + x[0].tobytes() + x[1].tobytes()}
    section = lambda k, data: struct.pack("<HHIBB6s", 0, k, 16 + len(data), 20, 20, b"SCPECG" if k == 0 else b"") + data
    length = {0: 16 + 30} | {k: 16 + len(data) for k, data in body.items()}
    pointers = b""
    for k, start in zip((0, 3, 6), np.cumsum([7, length[0], length[3]])):
        pointers += struct.pack("<HII", k, length[k], start)
    record = section(0, pointers) + section(3, body[3]) + section(6, body[6])
    return struct.pack("<HI", 0, 6 + len(record)) + record


def mfer():
    """MFER: little-endian, 2 channels, 499.3 Hz, 5 microvolts a count."""
    x = list(counts(499.3).values())
    tag = lambda code, data: bytes([code, len(data)]) + data
    return b"".join([
        tag(0x40, b"MFR Standard 12 leads ECG".ljust(32)), tag(0x01, b"\1"), tag(0x0A, b"\0"), tag(0x05, b"\2"),
        tag(0x04, struct.pack("<H", len(x[0]))), tag(0x06, b"\1"), tag(0x0B, struct.pack("<BbH", 0, -1, 4993)),
        tag(0x0C, struct.pack("<BbH", 0, -6, 5)), b"\x3f\0\3" + tag(0x09, b"\1"), b"\x3f\1\3" + tag(0x09, b"\2"),
        b"\x1e\x84" + struct.pack(">I", 2 * x[0].nbytes) + x[0].tobytes() + x[1].tobytes()])


def kardia():
    """AliveCor Kardia's JSON."""
    x = {f"lead{lead}": value.tolist() for lead, value in counts(300).items()}
    return json.dumps(dict(recordedAt="2024-05-01T10:00:00Z", duration=10000, data=dict(raw=dict(
        frequency=300, amplitudeResolution=5000, numLeads=2, samples=x)))).encode()


# name: (content, rate, leads)
DEVICES = {"aecg.xml": (aecg(), 499.31, ["I", "II"]), "muse.xml": (muse(), 500, ["I", "II"]),
           "philips": (philips(), 500, ["I", "II"]), "sleep.edf": (edf(), 256, ["I"]),
           "other_names.edf": (edf(("EKG2-EKG1", "SpO2")), 256, ["I"]), "part": (edf(record_s=2), 128, ["I"]),
           "holter.ecg": (ishne(), 200, ["I", "II"]), "x.scp": (scp(), 500, ["I", "II"]),
           "x.mwf": (mfer(), 499.3, ["I", "II"]), "kardia.json": (kardia(), 300, ["I", "II"]),
           "utf16.xml": (aecg().decode().replace("UTF-8", "UTF-16").encode("utf-16"), 499.31, ["I", "II"])}


# ---------------------------------------------------------------------------- no ECG

BOMB = """<?xml version="1.0"?><!DOCTYPE AnnotatedECG [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;">]><{0}>&d;</{0}>"""
# name: (content, part of the line that refuses it)
MISTAKEN = {
    "pickle.npy": (b"\x80\x04]\x94(K\x01K\x02e.", "pickle"), "picture.csv": (b"\x89PNG\r\n\x1a\n" + bytes(99), "picture"),
    "video.dat": (b"\0\0\0\x20ftypisom" + bytes(99), "video"), "array.npz": (b"PK\x03\x04" + bytes(99), "archive"),
    "page.xml": (b"<!DOCTYPE html><html><body>1,2,3</body></html>", "known kind"), "noise": (bytes(range(256)), "known kind"),
    "bomb.xml": (BOMB.format("AnnotatedECG").encode(), "entit"), "bomb2.xml": (BOMB.format("restingecgdata").encode(), ""),
    "words.csv": (b"1.0\n2.0\nhello\n" * 300, "'hello' is no number"), "ragged.csv": (b"1,2\n" * 300 + b"1\n", "row 301"),
    "empty.json": (b"{}", "no ECG"), "cut.json": (b'{"data": {"ecg": [', "cannot be read"),
    "three.csv": (b"red,green,blue\n" + b"1,2,3\n2,1,3\n" * 300, "pass --ecg_leads"),
    "back.csv": (b"time,I\n" + b"1,2\n0,1\n" * 300, "rise evenly"), "inf.npy": (None, "missing"),
}
