"""The pictures of a DICOM cine and their times: used by the sources that read DICOM.

    file  ->  its header  ->  frames (T, H, W, 1 or 3) uint8, times (T,) s, regions of the screen

Frames at uneven times are resampled to the file's mean rate, linearly in time.

| pixels in the file | become |
|---|---|
| MONOCHROME2, RGB of 8 bits | as they are: the grey levels of the screen |
| MONOCHROME1 (bright is 0) | inverted |
| PALETTE COLOR | the colours of the file's table |
| YBR_FULL, YBR_FULL_422, YBR_ICT, YBR_RCT | RGB |
| 1 to 16 bits, signed too | 8 bits: the file's window, or else the whole range of its bits |

pydicom reads uncompressed and RLE pixels by itself, JPEG and JPEG 2000 by Pillow. Each other kind
needs the packages of PACKAGES.
"""
import math
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.flags import UserError
from data.frame_times import check_steps

GREY = "MONOCHROME1", "MONOCHROME2"
COLOUR = "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"
PALETTE = "PALETTE COLOR"
# By words in the name of a transfer syntax: what pydicom decodes it with
PACKAGES = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG-LS": "pylibjpeg pylibjpeg-libjpeg",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
}
IMAGE_2D = 1        # RegionSpatialFormat (PS3.3 C.8.5.5.1.1): 2 M-mode, 3 spectral, 4 waveform
ECG_TRACE = 10      # RegionDataType (PS3.3 C.8.5.5.1.2): 1 tissue, 2 colour flow


class Region(NamedTuple):
    """One of a header's SequenceOfUltrasoundRegions."""
    box: tuple          # (x0, y0, x1, y1) in pixels, x1 and y1 not included
    space: int          # RegionSpatialFormat
    data: int           # RegionDataType


class Cine(NamedTuple):
    """What read_cine returns."""
    path: Path
    header: object      # a pydicom Dataset
    frames: np.ndarray  # (T, H, W, 1 or 3) uint8
    times: np.ndarray   # (T,) of the frames, seconds after the first
    fps: float          # their rate, the mean rate where they are uneven
    regions: list       # of Region


@contextmanager
def one_line(path):
    """Any error as a UserError that begins with the path. pydicom raises all kinds."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not read as DICOM: {reason}") from None


# ---------------------------------------------------------------------------- header and times

def read_header(path, least):
    """A DICOM file -> its header, without the pixels; UserError where it is no cine."""
    import pydicom
    with one_line(path):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        frames = int(header.get("NumberOfFrames") or 1)
        if frames < least:
            raise UserError(f"{frames} frames, --least={least}")
    return header


def ultrasound_regions(header):
    """The Regions of a header, without those that do not lie in the picture."""
    regions = []
    for item in header.get("SequenceOfUltrasoundRegions") or []:
        names = "MinX0", "MinY0", "MaxX1", "MaxY1"
        corners = [item.get(f"RegionLocation{name}") for name in names]
        if None in corners:
            continue
        x0, y0, x1, y1 = corners
        if 0 <= x0 < x1 <= header.Columns and 0 <= y0 < y1 <= header.Rows:
            box = (x0, y0, x1 + 1, y1 + 1)
            regions.append(Region(box, item.get("RegionSpatialFormat"), item.get("RegionDataType")))
    return regions


def frame_steps(header):
    """Times (T - 1,) in ms from each frame to the next, as far as a FrameTimeVector tells."""
    vector = np.atleast_1d(header.get("FrameTimeVector") or 0).astype(float)
    # Its first entry is 0: no frame comes before the first
    return vector[1:int(header.NumberOfFrames)]


def frame_rate(header):
    """Frames per second by the header, of uneven frames the mean; UserError if it does not say."""
    steps = frame_steps(header)
    if len(steps):
        step = steps.mean()
    else:
        # One time for all frames, in ms
        step = float(header.get("FrameTime") or 0)
    if step:
        fps = 1000 / step
    else:
        fps = float(header.get("CineRate") or header.get("RecommendedDisplayFrameRate") or 0)
    if not 0 < fps < math.inf:
        raise UserError("it does not say its frame time")
    return fps


def frame_times(header, fps):
    """Times (T,) of the frames in s after the first; fps: their rate by frame_rate. UserError where
    they do not rise, or where the frames pause."""
    frames = int(header.NumberOfFrames)
    steps = frame_steps(header) / 1000
    if not len(steps):
        return np.arange(frames) / fps
    check_steps(steps)
    if len(steps) + 1 < frames:
        raise UserError(f"{frames} frames, {len(steps) + 1} times of them")
    return np.append(0, steps.cumsum())


# ---------------------------------------------------------------------------- pixels

def packages_for(syntax):
    """The packages to install for a transfer syntax; None: none reads it."""
    for word, packages in PACKAGES.items():
        if word in syntax.name:
            return packages
    return None


def check_decoder(syntax):
    """UserError where pydicom cannot decode this transfer syntax, with what to install."""
    from pydicom.pixels import get_decoder
    packages = packages_for(syntax)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(f"its pixels are {syntax.name}, which pydicom does not read") from None
    if not decoder.is_available:
        raise UserError(f"its pixels are {syntax.name}: pip install {packages}")


def windowed(levels, header):
    """Grey levels (N,) -> 0 to 1 by the header's window (PS3.3 C.11.2.1.2), or by their range."""
    if header.get("VOILUTSequence") or header.get("VOILUTFunction") == "SIGMOID":
        raise UserError("its grey levels need a VOI LUT, which is not read")
    width = np.ravel(header.get("WindowWidth") or 0)[0]
    if not width:
        return (levels - levels.min()) / (levels.max() - levels.min())
    center = np.ravel(header.WindowCenter)[0]
    share = (levels - (float(center) - 0.5)) / max(float(width) - 1, 1) + 0.5
    return share.clip(0, 1)


def lookup_table(header):
    """What each stored number looks like: (2 ** bits, 1 or 3) uint8; and the lowest number."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut
    bits = header.BitsStored
    kind = header.PhotometricInterpretation
    lowest = -2 ** (bits - 1) if header.PixelRepresentation else 0
    stored = np.arange(lowest, lowest + 2 ** bits)                      # N
    if kind == PALETTE:
        colours = apply_color_lut(stored, header)[:, :3]                # N 3
        # Entries of 16 bits; some files keep 8 bits in them
        if colours.max() > 255:
            colours = colours >> 8
        return colours.astype(np.uint8), lowest

    levels = stored
    if kind in GREY and bits > 8:
        levels = apply_modality_lut(stored, header).astype(float)
        share = windowed(levels, header)
    else:
        # A window beside 8 bits is for reports: these are the screen's own levels
        share = (levels - lowest) / (2 ** bits - 1)
    if kind == "MONOCHROME1":
        share = 1 - share
    return np.rint(255 * share).astype(np.uint8)[:, None], lowest       # N 1


def decode(path, header):
    """The frames of a file, each (H, W, 1 or 3), as they are stored, RGB where they are YBR."""
    from pydicom.pixels import iter_pixels, pixel_array
    syntax = header.file_meta.TransferSyntaxUID
    check_decoder(syntax)
    try:
        # One by one saves memory, but of uncompressed YBR_FULL_422 pydicom 3.0 then loses its place
        frames = iter_pixels(path) if syntax.is_encapsulated else pixel_array(path)
        for frame in frames:
            yield frame if frame.ndim == 3 else frame[..., None]
    except Exception as error:
        reason = " ".join(str(error).split())
        # Pillow has no JPEG of more than 8 bits and no JPEG 2000 of more than 8 bits in colour
        if "Pillow does not support" in reason or "Pillow cannot" in reason:
            raise UserError(f"its pixels are {syntax.name} of {header.BitsStored} bits: "
                            f"pip install {packages_for(syntax)}") from None
        raise UserError(f"its pixels are damaged: {reason}") from None


def read_pixels(path, header):
    """A DICOM file and its header -> frames (T, H, W, 1 or 3) uint8; else UserError."""
    kind = header.PhotometricInterpretation
    bits = header.BitsStored
    if kind not in (*GREY, *COLOUR, PALETTE):
        raise UserError(f"its pixels are {kind}, which is not read")
    if not 1 <= bits <= 16:
        raise UserError(f"its pixels have {bits} bits, not 1 to 16")

    table = None
    if kind in ("MONOCHROME1", PALETTE) or bits != 8 or header.PixelRepresentation:
        table, lowest = lookup_table(header)                            # N C
    count = int(header.get("NumberOfFrames") or 1)
    video = None
    done = 0
    for frame in islice(decode(path, header), count):                   # H W C
        if table is not None:
            # Colours of more than 8 bits share one table, the others have one sample a pixel
            seen = table[frame.astype(np.int32) - lowest]               # H W C, 1 or 3
            frame = seen[..., 0] if kind in COLOUR else seen[..., 0, :]
        if video is None:
            video = np.empty((count, *frame.shape), np.uint8)
        video[done] = frame
        done += 1
    # A cut file may decode as far as it goes
    if done < count:
        raise UserError(f"{done} frames are in it, its header says {count}")
    return video                                                        # T H W C


def read_cine(path, header):
    """A DICOM file and its header (read_header) -> its Cine; UserError where it cannot be read."""
    with one_line(path):
        fps = frame_rate(header)
        times = frame_times(header, fps)
        regions = ultrasound_regions(header)
        return Cine(path, header, read_pixels(path, header), times, fps, regions)
