"""Pictures: the first frame that sample.py reads, the ECG strip under an echo, the frames of a GIF.

Used by sample.py and by `evaluate.py figure`.
"""
import imageio
import numpy as np
import torch
from PIL import GifImagePlugin, Image, ImageDraw
from torch.nn.functional import interpolate

from common.flags import UserError

SCROLL_S = 4.0      # a longer video shows so many seconds of its ECG, a shorter one all of it

# Colours of the strip, red green blue
BACKGROUND = np.array((12, 15, 19), np.float32)
GRID = np.array((25, 31, 38), np.float32)           # a line every 0.2 s
AHEAD = np.array((56, 100, 90), np.float32)         # the ECG that is still to come
PAST = np.array((104, 240, 174), np.float32)        # the ECG up to now
R_PEAK = np.array((255, 176, 76), np.float32)
CURSOR = np.array((232, 236, 240), np.float32)


# ---------------------------------------------------------------------------- in

def read_pixels(path):
    """A picture, or the first frame of a .npy video -> (H, W, C), as the file has it."""
    with open(path, "rb") as file:
        if path.endswith(".npy"):
            pixels = np.load(file)
        else:
            pixels = imageio.v3.imread(file, index=0)
    if pixels.ndim == 4:
        pixels = pixels[0]
    return np.atleast_3d(pixels)


def load_image(path, size, channels):
    """A picture file -> the first frame of a video, (1, C, 1, size, size) in [0, 1].

    Colours become grey; the middle square is scaled to `size`. UserError if it is no such picture.
    """
    try:
        pixels = read_pixels(path)
        H, W, C = pixels.shape
        scale = 255 if pixels.dtype == np.uint8 else 1
        colours = 3 if C > 2 else 1         # leaves out the opacity of 2 or 4 channels
        grey = torch.from_numpy(pixels[..., :colours] / scale).float().mean(2)             # H W
    except Exception as error:
        # each reader raises its own kinds
        reason = getattr(error, "strerror", None) or "damaged or not a picture"
        raise UserError(f"{path} cannot be read: {reason}") from None
    # NaN fails both comparisons
    in_range = grey.min() >= 0 and grey.max() <= 1
    if min(H, W) < 16 or C > 4 or not in_range:
        raise UserError(f"{path} holds {H} x {W} x {C}: "
                        "16 x 16 x 1 or more, uint8 or in [0, 1], is needed")

    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    square = grey[None, None, top:top + side, left:left + side]                            # 1 1 s s
    first = interpolate(square, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return first.expand(1, channels, size, size)[:, :, None]                              # 1 C 1 s s


# ---------------------------------------------------------------------------- the ECG strip

def strip_curve(ecg, leads, hidden, height):
    """An ECG (L, N) -> the row of the strip, from its top, for each sample.

    Lead II is drawn, where P waves and QRS are tall, or else the first of `leads`. The curve is
    flat where hidden (N,) is True: the model does not see the ECG there.
    """
    shown = leads.index("II") if "II" in leads else 0
    lead = np.where(hidden, 0, ecg[shown])
    # quantiles, so that one artefact does not flatten all beats
    low, high = np.quantile(lead, [0.001, 0.999])
    share = np.clip((lead - low) / max(high - low, 1e-6), 0, 1)
    return height * (0.88 - 0.62 * share)


def paint(image, cover, colour):
    """Mix `colour` into image (h, w, 3), in place; cover (h, w) or (w,): 0 = not, 1 = fully."""
    image += np.clip(cover, 0, 1)[..., None] * (colour - image)


def line_cover(x, at, half_width):
    """How far vertical lines at the columns `at` cover the pixels at the columns x: (w,)."""
    if not len(at):
        return np.zeros(len(x))
    distance = np.abs(x[:, None] - at).min(1)                                              # w
    return np.clip(half_width + 0.5 - distance, 0, 1)


def curve_cover(row, y):
    """How far a curve covers each pixel, (h, w). y (9, w): its row at nine instants a column."""
    # In each column it covers the rows from its lowest to its highest instant, and 0.8 around them.
    top = np.maximum(row, y.min(0) - 0.8)
    bottom = np.minimum(row + 1, y.max(0) + 0.8)
    return bottom - top


def draw_strip(now, seconds, time, curve, r_peaks, height, width):
    """The ECG strip at `now` seconds of a video of `seconds`, uint8 (height, width, 3).

    The past is bright, what comes is dark; R peaks are ticked, a cursor stands at `now`.
    curve (N,): the rows of strip_curve at the instants time (N,). r_peaks: in seconds.
    All shapes are smooth: a pixel takes a colour as far as the shape covers it.
    """
    span = min(seconds, SCROLL_S)
    left = np.clip(now - span / 2, 0, seconds - span)       # seconds at the left edge
    x = np.arange(width) + 0.5
    row = np.arange(height)[:, None]
    image = np.tile(BACKGROUND, (height, width, 1))                                        # h w 3

    def columns(instants):
        """Column of each instant, those far outside the strip left out."""
        near = instants[np.abs(instants - now) <= span]
        return (near - left) / span * width

    # 1. The grid
    grid = 0.2 * np.arange(left // 0.2, (left + span) // 0.2 + 1)
    paint(image, line_cover(x, columns(grid), 0.5), GRID)

    # 2. The curve at nine instants a column, the last of which is the next column's first
    instants = left + np.arange(8 * width + 1) / (8 * width) * span
    y = np.interp(instants, time, curve)
    y = np.stack([y[i:i + 8 * width:8] for i in range(9)])                                 # 9 w
    cursor = (now - left) / span * width
    past = np.clip(cursor - x + 0.5, 0, 1)[:, None]                                        # w 1
    paint(image, curve_cover(row, y), AHEAD + past * (PAST - AHEAD))

    # 3. A tick above each R peak
    paint(image[3:9], line_cover(x, columns(r_peaks), 0.8), AHEAD + past * (R_PEAK - AHEAD))

    # 4. The cursor: a thin line, and a dot of radius 3 on the curve
    paint(image, 0.6 * np.clip(1 - np.abs(x - cursor), 0, 1), CURSOR)
    centre = np.interp(now, time, curve)
    paint(image, 3.5 - np.hypot(x - cursor, row + 0.5 - centre), CURSOR)
    return image.round().astype(np.uint8)


# ---------------------------------------------------------------------------- out

def film(frames, title, side):
    """Frames (T, H, W, C) in [0, 1] side by side, uint8 (side, T side, 3), with a title."""
    row = []
    for frame in frames:
        H, W = frame.shape[:2]
        pixels = (255 * np.broadcast_to(frame, (H, W, 3))).round().astype(np.uint8)
        row.append(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))
    ImageDraw.Draw(row[0]).text((4, 2), title)
    return np.concatenate([np.asarray(frame) for frame in row], axis=1)


def ramp(start, end, steps):
    """Colours from start to end, the start left out: (steps, 3)."""
    share = np.arange(1, steps + 1)[:, None] / steps
    return start + share * (end - start)


def as_palette(colours):
    """Colours (up to 256, 3) in [0, 255] -> an image that holds nothing but this palette."""
    image = Image.new("P", (1, 1))
    image.putpalette(np.round(colours).astype(np.uint8).tobytes())
    return image


# The palette of a GIF of grey frames over an ECG strip: every second grey, then what draw_strip
# mixes. One palette for all frames, because finding one for a frame takes 6 ms.
GREYS = np.linspace(0, 255, 128)[:, None].repeat(3, axis=1)
STRIP_COLOURS = np.concatenate([
    BACKGROUND[None], ramp(BACKGROUND, GRID, 7), ramp(BACKGROUND, AHEAD, 24),
    ramp(BACKGROUND, PAST, 32), ramp(BACKGROUND, R_PEAK, 24), ramp(BACKGROUND, CURSOR, 20),
    ramp(PAST, CURSOR, 20)])
STRIP_PALETTE = as_palette(STRIP_COLOURS)
GREY_PALETTE = as_palette(np.concatenate([GREYS, STRIP_COLOURS]))


def index_grey(picture, side):
    """A picture (h, w, 3), a grey echo of `side` rows over its strip -> the image of a GIF."""
    echo = picture[:side, :, 0] // 2
    strip = Image.fromarray(picture[side:])
    strip = strip.quantize(palette=STRIP_PALETTE, dither=Image.Dither.NONE)
    index = np.concatenate([echo, np.asarray(strip) + len(GREYS)]).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(GREY_PALETTE.getpalette())
    return image


def index_colours(picture):
    """A picture (h, w, 3) of any colours -> the image of a GIF, with a palette of its own."""
    image = Image.fromarray(picture)
    return image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def gif_frame(image, k, fps):
    """Frame k of a GIF as bytes, from an image with a palette.

    It is made of Pillow's parts, because Pillow's own writer keeps all frames in memory to the end.
    """
    # A GIF counts in 10 ms. Differences of rounded times add no error up over a long video.
    begin = round(100 * k / fps)
    end = round(100 * (k + 1) / fps)
    parts = GifImagePlugin.getdata(image, duration=10 * (end - begin), include_color_table=True)
    if k == 0:
        header, _ = GifImagePlugin.getheader(image, info={"loop": 0})
        parts = header + parts
    return b"".join(parts)
