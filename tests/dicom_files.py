"""DICOM cines of every kind of pixels, with regions and waveforms: written for the tests."""
import io

import numpy as np
from PIL import Image

from data.ecgsyn import make_ecg

SYNTAX = {"native": "1.2.840.10008.1.2.1", "jpeg": "1.2.840.10008.1.2.4.50", "rle": "1.2.840.10008.1.2.5",
          "jpeg 2000": "1.2.840.10008.1.2.4.91", "lossless": "1.2.840.10008.1.2.4.57"}


def beating(frames=12):
    """Frames (T, 96, 128): a sector with a bright ball that grows and shrinks in it, grey 0 to 255."""
    row, column = np.mgrid[:96, :128]
    sector = (np.abs(column - 64) < 0.6 * row) & (np.hypot(row, column - 64) < 90)
    radius = 25 + 12 * np.sin(2 * np.pi * np.arange(frames) / 11)
    ball = 1 / (1 + np.exp((np.hypot(row - 55, column - 64) - radius[:, None, None]) / 4))
    return np.rint((40 + 200 * ball) * sector).astype(int)


def write_dicom(path, pixels, syntax="native", data=None, **more):
    """A DICOM cine of pixels (T, H, W) or (T, H, W, 3), or of `data`, as the header `more` says."""
    import pydicom
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = SYNTAX[syntax]
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.3.1", "1.2"
    dataset = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    pixels = np.asarray(pixels)
    samples = pixels.shape[3] if pixels.ndim == 4 else 1
    bits = more.get("BitsStored", 8)
    about = dict(NumberOfFrames=len(pixels), Rows=pixels.shape[1], Columns=pixels.shape[2], FrameTime=40,
                 SamplesPerPixel=samples, BitsStored=bits, BitsAllocated=8 if bits <= 8 else 16,
                 HighBit=bits - 1, PixelRepresentation=0,
                 PhotometricInterpretation="RGB" if samples == 3 else "MONOCHROME2")
    if samples == 3:
        about["PlanarConfiguration"] = 0
    for key, value in (about | more).items():
        setattr(dataset, key, value)
    if data is None:
        kind = "i" if dataset.PixelRepresentation else "u"
        pixels = pixels.astype(f"<{kind}{dataset.BitsAllocated // 8}")
        data = pixels.tobytes()
        if syntax == "rle":
            data = [pydicom.pixels.encoders.RLELosslessEncoder.encode(x, transfer_syntax_uid=SYNTAX[syntax],
                    **pydicom.pixels.utils.as_pixel_options(dataset, number_of_frames=1)) for x in pixels]
        elif syntax != "native":
            data = [encode(x.astype(np.uint8) if bits == 8 else x, syntax) for x in pixels]
    dataset.PixelData = data if isinstance(data, bytes) else pydicom.encaps.encapsulate(data)
    dataset.save_as(path, enforce_file_format=True)


def encode(frame, syntax):
    """A frame as JPEG (colour: YBR 4:2:2) or lossless JPEG 2000, by Pillow."""
    file = io.BytesIO()
    how = dict(format="JPEG", quality=98, subsampling=1) if syntax == "jpeg" else \
        dict(format="JPEG2000", irreversible=False, no_jp2=True)
    Image.fromarray(frame).save(file, **how)
    return file.getvalue()


GREY = beating()
RGB = np.stack([GREY, GREY * 3 // 4, 255 - GREY], -1)
SHUFFLED = np.random.default_rng(0).permutation(256)            # what each stored number looks like
STORED = np.argsort(SHUFFLED)


def ybr(rgb):
    """YBR_FULL (PS3.3 C.7.6.3.1.2) of colours."""
    to_ybr = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return np.rint(rgb @ to_ybr.T + [0, 128, 128]).clip(0, 255).astype(int)


def ybr_422(rgb):
    """The bytes of native YBR_FULL_422: Y Y Cb Cr of each two pixels."""
    full = ybr(rgb)
    pairs = np.stack([full[:, :, ::2, 0], full[:, :, 1::2, 0], full[:, :, ::2, 1], full[:, :, ::2, 2]], -1)
    return pairs.astype(np.uint8).tobytes()


def palette(bits):
    """A colour table of 8 or 16 bits: red as SHUFFLED, green half of it, blue inverted."""
    about = dict(PhotometricInterpretation="PALETTE COLOR")
    columns = SHUFFLED, SHUFFLED // 2, 255 - SHUFFLED
    for name, column in zip(("Red", "Green", "Blue"), columns):
        about[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        entries = column.astype("<u1") if bits == 8 else (column * 257).astype("<u2")
        about[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    return about


BY_PALETTE = np.stack([GREY, GREY // 2, 255 - GREY], -1)
MONOCHROME1 = dict(PhotometricInterpretation="MONOCHROME1")
# name: (pixels to store, what they must look like, syntax, header)
PIXELS = {
    "inverted": (255 - GREY, GREY, "native", MONOCHROME1),
    "inverted, 12 bits": (4095 - 16 * GREY, GREY, "native", MONOCHROME1 | dict(BitsStored=12)),
    "palette of 8 bits": (STORED[GREY], BY_PALETTE, "native", palette(8)),
    "palette of 16 bits": (STORED[GREY], BY_PALETTE, "native", palette(16)),
    "16 bits": (257 * GREY, GREY, "native", dict(BitsStored=16)),
    "12 bits": (16 * GREY, GREY, "native", dict(BitsStored=12)),
    "10 bits": (4 * GREY, GREY, "native", dict(BitsStored=10)),
    "signed": (16 * GREY - 2048, GREY, "native", dict(BitsStored=12, PixelRepresentation=1)),
    "signed, 8 bits": (GREY - 128, GREY, "native", dict(BitsStored=8, PixelRepresentation=1)),
    "window": (1000 + 2 * GREY, GREY, "native", dict(BitsStored=12, WindowCenter=1255.5, WindowWidth=511)),
    "window, rescaled": (500 + 2 * GREY, GREY, "native", dict(
        BitsStored=12, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=[510.5, 9], WindowWidth=[1021, 9])),
    "window beside 8 bits": (GREY, GREY, "native", dict(WindowCenter=10, WindowWidth=9)),
    "planar": (RGB, RGB, "native", dict(PlanarConfiguration=1)),
    "16-bit colours": (257 * RGB, RGB, "native", dict(BitsStored=16)),
    "ybr": (ybr(RGB), RGB, "native", dict(PhotometricInterpretation="YBR_FULL")),
    "ybr 4:2:2": (RGB, RGB, "native", dict(PhotometricInterpretation="YBR_FULL_422")),
    "rle": (RGB, RGB, "rle", {}),
    "rle, 12 bits": (16 * GREY, GREY, "rle", dict(BitsStored=12)),
    "rle, palette": (STORED[GREY], BY_PALETTE, "rle", palette(16)),
    "jpeg": (GREY, GREY, "jpeg", {}),
    "jpeg, ybr 4:2:2": (RGB, RGB, "jpeg", dict(PhotometricInterpretation="YBR_FULL_422")),
    "jpeg that calls itself RGB": (RGB, RGB, "jpeg", {}),
    "jpeg, inverted": (255 - GREY, GREY, "jpeg", MONOCHROME1),
    "jpeg 2000": (GREY, GREY, "jpeg 2000", {}),
    "jpeg 2000, colour": (RGB, RGB, "jpeg 2000", dict(PhotometricInterpretation="YBR_RCT")),
    "jpeg 2000, 16 bits": (257 * GREY, GREY, "jpeg 2000", dict(BitsStored=16)),
}


def regions_of(*regions):
    """SequenceOfUltrasoundRegions of (x0, y0, x1, y1, RegionSpatialFormat, RegionDataType)."""
    import pydicom
    dataset = pydicom.dataset.Dataset
    sequence = []
    for x0, y0, x1, y1, space, data in regions:
        item = dataset()
        item.RegionLocationMinX0, item.RegionLocationMinY0 = x0, y0
        item.RegionLocationMaxX1, item.RegionLocationMaxY1 = x1 - 1, y1 - 1
        item.RegionSpatialFormat, item.RegionDataType = space, data
        sequence.append(item)
    return dict(SequenceOfUltrasoundRegions=sequence)


def waveform():
    """A WaveformSequence of lead II, 2 s at 250 Hz."""
    import pydicom
    dataset = pydicom.dataset.Dataset
    channel, source, unit, group = dataset(), dataset(), dataset(), dataset()
    source.CodeMeaning, unit.CodeValue, unit.CodeMeaning = "Lead II", "uV", "microvolt"
    channel.ChannelSourceSequence, channel.ChannelSensitivityUnitsSequence = [source], [unit]
    channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor = 1, 1
    channel.ChannelBaseline, channel.WaveformBitsStored = 0, 16
    group.ChannelDefinitionSequence, group.SamplingFrequency = [channel], 250
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = 1, 500
    group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
    group.WaveformData = np.rint(1000 * make_ecg(0, 2, hr=70).ecg[:500, 1]).astype("<i2").tobytes()
    return dict(WaveformSequence=[group])
