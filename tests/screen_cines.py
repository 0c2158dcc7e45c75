"""Phantom cines with an ECG strip on the screen, drawn as echo machines do."""
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from data.ecgsyn import make_ecg

COLOURS = dict(green=(40, 230, 60), white=(235, 235, 235), yellow=(240, 220, 40),
               blue=(70, 110, 255), cyan=(40, 220, 230))
SCALE = 3           # lines are drawn so much larger and then reduced: this smooths their edges


@dataclass
class Look:
    """How one machine draws its strip."""
    kind: str = "sweep"         # sweep, cursor, scroll; frozen: no cursor, none: no trace
    colour: str = "green"
    place: str = "under"        # under or over the sector, within it, or across its lower edge
    gain: float = 1.0           # how bright the sector is
    alpha: float = 1.0          # 1 = opaque
    fps: float = 25
    seconds: float = 3
    width: int = 400            # of the strip, pixels
    span: float = 3             # seconds that the strip shows
    height: int = 45            # of an R wave, pixels
    line: int = 1               # thickness, pixels
    smooth: bool = True         # antialiased
    gap: int = 15               # of a sweep, pixels
    marker: str = "bar"         # of the cursor: bar, dot, triangle
    marker_colour: str = ""     # that of the trace if empty
    blank: bool = False         # the first sweep begins in the middle of an empty strip
    clutter: tuple = ()         # of: r_marks, rate, ticks, axis, breath
    only_breath: bool = False   # no ECG but a respiration trace
    leaves: bool = False        # the strip is switched off half way
    quality: int = 80           # of JPEG
    rhythm: str = "sinus"
    hr: float = 0


def moving_sector(rng, times, rows, columns):
    """Speckle that moves with a beat and changes, in a sector: (T, rows, columns) float, 0 to 255."""
    y, x = np.mgrid[:rows, :columns]
    y = y + 5.0
    x = x - columns / 2
    inside = (np.hypot(x, y) < rows) & (np.abs(np.arctan2(x, y)) < 0.7)
    fields = [gaussian_filter(rng.standard_normal((rows, columns)), (1.3, 2.2)) for _ in range(4)]
    tissue = gaussian_filter(rng.standard_normal((rows, columns)), 18)
    tissue = 28 * tissue / tissue.std() + 70
    frames = []
    for t in times:
        turn = 3.0 * t + np.array([0, np.pi / 2])
        real, imaginary = np.cos(turn) @ np.reshape(fields, (2, 2, -1))
        level = 20 * np.log10(np.hypot(real, imaginary) * 8 + 1e-2).reshape(rows, columns)
        frame = np.roll(level * 2.2 + tissue - 10, round(6 * np.sin(7 * t)), 0)
        frames.append(frame.clip(0, 255) * inside)
    return np.stack(frames)


def trace_times(look, t):
    """ECG time of each column of the strip at frame time t (width,), NaN where nothing is drawn."""
    pace = look.width / look.span
    x = np.arange(0, look.width, 0.5)
    if look.kind == "scroll":
        return x, t - (look.width - x) / pace
    if look.kind in ("cursor", "frozen"):
        return x, x / pace - 0.1 * look.span
    now = ((t + 0.3 * look.span) * pace) % look.width
    shown = t - ((now - x) % look.width) / pace
    shown[(x - now) % look.width < look.gap] = np.nan
    if look.blank:
        shown[shown < -0.3 * look.span] = np.nan
    return x, shown


def draw_polyline(draw, x, y, line, colour):
    """Straight lines through the points, broken at NaN and where x jumps back."""
    pieces = np.split(np.arange(len(x)), np.flatnonzero(np.isnan(y)))
    for piece in pieces:
        piece = piece[~np.isnan(y[piece])]
        if len(piece) > 1:
            draw.line(list(zip(x[piece], y[piece])), fill=colour, width=line, joint="curve")


def draw_strip(look, t, signal, r_peaks, height):
    """The strip at time t: colour (height, width, 3) and opacity (height, width) 0 to 1."""
    scale = SCALE if look.smooth else 1
    canvas = Image.new("L", (look.width * scale, height * scale))
    second = canvas.copy()
    third = canvas.copy()
    draw = ImageDraw.Draw(canvas)
    x, shown = trace_times(look, t)
    line = look.line * scale
    base = height * 0.62
    y = base - look.height * signal(shown)
    breath = height * 0.85 - 5 * np.sin(1.7 * shown)
    # A sweep jumps at the writing point: nothing joins its ends
    cut = np.flatnonzero(np.diff(shown) < 0)
    y[cut] = np.nan
    breath[cut] = np.nan
    if look.kind != "none" and not look.only_breath:
        draw_polyline(draw, x * scale, y * scale, line, 255)
    if "breath" in look.clutter or look.only_breath:
        draw_polyline(ImageDraw.Draw(second), x * scale, breath * scale, line, 255)
    draw_clutter(look, draw, scale, x, shown, r_peaks, height)
    if look.kind == "cursor":
        at = (t + 0.1 * look.span) * look.width / look.span
        row = np.interp(at, x, y) if look.marker == "dot" else height - 6
        reach = {"bar": (0.7, height), "dot": (3, 3), "triangle": (4, 5)}[look.marker]
        box = [at - reach[0], row - reach[1], at + reach[0], row + reach[1]]
        ImageDraw.Draw(third).rectangle([v * scale for v in box], fill=255)
    layers = [np.asarray(im.reduce(scale)) / 255.0 * look.alpha for im in (canvas, second, third)]
    colours = [look.colour, "white", look.marker_colour or look.colour]
    return [(layer, np.array(COLOURS[colour])) for layer, colour in zip(layers, colours)]


def draw_clutter(look, draw, scale, x, shown, r_peaks, height):
    """R marks, heart rate, ticks and an axis."""
    if "r_marks" in look.clutter:
        for r in r_peaks:
            near = np.nan_to_num(np.abs(shown - r), nan=9)
            if near.min() < 0.02:
                at = x[near.argmin()]
                draw.line([at * scale, 2 * scale, at * scale, 7 * scale], 255, scale)
    if "ticks" in look.clutter:
        for at in np.arange(0, look.width, look.width / look.span / 5):
            draw.line([at * scale, (height - 4) * scale, at * scale, height * scale], 255, scale)
    if "axis" in look.clutter:
        draw.line([0, (height - 2) * scale, look.width * scale, (height - 2) * scale], 255, scale)


def draw_cine(look, seed, rows=440, columns=600):
    """A cine: frames (T, H, W, 3) uint8, times (T,), R peaks (s), strip (x0, y0, x1, y1)."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(look.fps * look.seconds)) / look.fps
    lead = make_ecg(rng, look.seconds + 2 * look.span + 2, -look.span - 1, hr=look.hr or None,
                    rhythm=look.rhythm)
    clock = -look.span - 1 + np.arange(len(lead.ecg)) / 250
    trace = lead.ecg[:, 1] / np.percentile(np.abs(lead.ecg[:, 1]), 99.5)

    def signal(t):
        return np.interp(t, clock, trace)
    height = look.height + 45
    top = {"under": rows - height - 8, "over": 8, "within": rows - height - 60,
           "edge": rows - height - 8}[look.place]
    left = round((columns - look.width) * rng.uniform(0.2, 0.9))
    sector_rows = rows - height - 26 if look.place in ("under", "over") else rows - 40
    sector = moving_sector(rng, times, sector_rows, min(columns - 60, sector_rows * 5 // 4))
    sector = (look.gain * sector).clip(0, 255)
    y0 = height + 16 if look.place == "over" else 8
    x0 = (columns - sector.shape[2]) // 2
    frames = []
    for t, inner in zip(times, sector):
        frame = np.zeros((rows, columns, 3))
        frame[y0:y0 + sector.shape[1], x0:x0 + sector.shape[2]] = inner[..., None]
        if not (look.leaves and t > look.seconds / 2):
            for opacity, colour in draw_strip(look, t, signal, lead.r_peaks, height):
                part = frame[top:top + height, left:left + look.width]
                part += opacity[..., None] * (colour - part)
        picture = Image.fromarray(frame.round().astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        draw.text((4, 4), f"A4C  MI 1.2\nFR {look.fps:.0f}\n{t:.1f} s", fill=(200, 200, 200))
        if "rate" in look.clutter:
            draw.text((left + look.width - 30, top - 2), f"{lead.hr + np.sin(t):.0f} bpm", fill=(90, 230, 90))
        for k in range(60):
            draw.line([columns - 14, 120 + 2 * k, columns - 6, 120 + 2 * k], fill=(255 - 4 * k,) * 3, width=2)
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=look.quality)
        frames.append(np.asarray(Image.open(stored)))
    return np.stack(frames), times, lead.r_peaks, (left, top, left + look.width, top + height)
