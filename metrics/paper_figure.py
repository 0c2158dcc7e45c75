"""The paper's Fig. 3 as PNG and GIF: echoes above the ECGs that made them; for evaluate.py."""
from pathlib import Path
from typing import NamedTuple

import imageio
import numpy as np
from PIL import Image, ImageDraw

from common.picture import draw_strip, film, strip_curve
from data.dataset import ECG_HZ, choose_clips
from data.ecg_files import read_ecg
from data.ecg_signal import clean_ecg, extend_periodic, find_disturbed, find_r_peaks
from metrics.clip_ecg import aligned_ecg, pick_leads
from metrics.synchrony import SHIFT_S

COLUMNS = 8             # frames in a row of the PNG
SIDE = 128              # pixels of one
STRIP = 48              # height of an ECG strip
GIF_SIDE = 144          # pixels of an echo in the GIF
GIF_TITLE = 16          # height of its title
GIF_GAP = 6             # pixels between two echoes
GIF_FRAMES = 64         # at most
GIF_GREYS = 14          # grey levels of the echoes: fewer make a smaller file
GIF_COLOURS = 24        # colours of the strips

# The videos of the figure, by their titles in the PNG.
TRUE = "ground truth"
OWN_ECG = "its own ECG"
FLAT = "flat ECG"
LATER = f"its own ECG {1000 * SHIFT_S:.0f} ms later"
DONOR = "another clip's ECG"
# The echoes of the GIF from left to right, with their titles there.
GIF_TITLES = {TRUE: "true video", OWN_ECG: "generated: its ECG",
              LATER: f"ECG {1000 * SHIFT_S:.0f} ms later", FLAT: FLAT, DONOR: DONOR}


class Trace(NamedTuple):
    """An ECG under which a video is generated."""
    ecg: np.ndarray         # (L, N), cleaned
    disturbed: np.ndarray   # (N,) bool: what the model must not see
    leads: list             # names of its leads
    start: float            # time of its sample 0, seconds after the first frame

    def strip(self, now, seconds, width):
        """Its lead II, or first lead, with a cursor at `now` seconds: uint8 (STRIP, width, 3)."""
        instants = self.start + np.arange(self.ecg.shape[1]) / ECG_HZ
        r_peaks = self.start + find_r_peaks(self.ecg)
        curve = strip_curve(self.ecg, self.leads, self.disturbed, STRIP)
        return draw_strip(now, seconds, instants, curve, r_peaks, STRIP, width)


def figure_traces(config, clips, i, *, seconds, margin):
    """{title: Trace} of each row of the figure for clip i."""
    picked = pick_leads(clips, config.leads)
    leads = [clips.leads[k] for k in picked]
    # A window at an end of the video sees the ECG beyond it: hence the margin on both sides.
    span = dict(leads=picked, start=-margin, end=seconds + margin)
    (ecg,), (disturbed,) = aligned_ecg(clips, [i], **span)
    own = Trace(ecg, disturbed, leads, -margin)
    traces = {
        TRUE: own,
        OWN_ECG: own,
        FLAT: own._replace(ecg=0 * ecg, disturbed=np.zeros_like(disturbed)),
        LATER: own._replace(start=SHIFT_S - margin),
    }
    # A recording of one's own has no true video. It is repeated where it is too short.
    if config.ecg:
        names = config.ecg_leads.split(",") if config.ecg_leads else ()
        ecg, names = read_ecg(config.ecg, config.ecg_hz, names)
        samples = round((seconds + 2 * margin) * ECG_HZ)
        ecg = extend_periodic(ecg, -round(margin * ECG_HZ), samples)
        traces[Path(config.ecg).stem] = Trace(clean_ecg(ecg), find_disturbed(ecg), names, -margin)
    # The next clip that the seed would choose lends its ECG to the last echo of the GIF.
    donors = [k for k in choose_clips(clips, 2, config.seed) if k != i]
    if donors:
        (other,), (disturbed,) = aligned_ecg(clips, donors, **span)
        traces[DONOR] = Trace(other, disturbed, leads, -margin)
    return traces


def write_png(path, videos, traces, *, fps, shown):
    """The first `shown` seconds of each video as a row of frames above its ECG.

    videos {title: (C, T, H, W) in [0, 1]}, traces {title: Trace}. A frame stands over its time.
    """
    at = ((np.arange(COLUMNS) + 0.5) / COLUMNS * shown * fps).astype(int)
    parts = []
    for title, video in videos.items():
        frames = video[:, at].permute(1, 2, 3, 0).numpy()                       # n H W C
        parts.append(film(frames, title, SIDE))
        parts.append(traces[title].strip(shown, shown, COLUMNS * SIDE))
    imageio.imwrite(path, np.concatenate(parts))


def gif_cell(frame, title, strip):
    """An echo (H, W, C) in [0, 1] under its title and above its ECG strip, as a picture."""
    rgb = np.broadcast_to(frame, (*frame.shape[:2], 3))
    echo = Image.fromarray((255 * rgb).round().astype(np.uint8))
    echo = echo.resize((GIF_SIDE, GIF_SIDE), Image.Resampling.BICUBIC)
    cell = Image.new("RGB", (GIF_SIDE, GIF_TITLE + GIF_SIDE + STRIP))
    ImageDraw.Draw(cell).text((4, 2), title)
    cell.paste(echo, (0, GIF_TITLE))
    cell.paste(Image.fromarray(strip), (0, GIF_TITLE + GIF_SIDE))
    return cell


def gif_palette(strips):
    """A palette of GIF_GREYS greys and the GIF_COLOURS most useful colours of the strips."""
    greys = np.linspace(0, 255, GIF_GREYS).round().astype(np.uint8).repeat(3).tolist()
    sample = Image.fromarray(np.concatenate(strips))
    colours = sample.quantize(GIF_COLOURS, Image.Quantize.MAXCOVERAGE).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette(greys + colours[:3 * GIF_COLOURS])
    return palette


def write_gif(path, videos, traces, *, fps, titles):
    """Echoes side by side, moving, each above its ECG with a cursor.

    videos {name: (C, T, H, W) in [0, 1]}, traces {name: Trace}; titles {name: title}, in order.
    """
    T = min(videos[name].shape[1] for name in titles)
    width = len(titles) * (GIF_SIDE + GIF_GAP) - GIF_GAP
    pictures = []
    for k in range(min(T, GIF_FRAMES)):
        picture = Image.new("RGB", (width, GIF_TITLE + GIF_SIDE + STRIP), "white")
        for column, (name, title) in enumerate(titles.items()):
            frame = videos[name][:, k].permute(1, 2, 0).numpy()                 # H W C
            strip = traces[name].strip(k / fps, T / fps, GIF_SIDE)
            picture.paste(gif_cell(frame, title, strip), (column * (GIF_SIDE + GIF_GAP), 0))
        pictures.append(picture)
    # One small palette for all frames keeps the file small, and no grey flickers.
    # The strips at the start and at the end have all of its colours: what is ahead, what is past.
    strips = [traces[name].strip(now, T / fps, GIF_SIDE) for name in titles for now in (0, T / fps)]
    palette = gif_palette(strips)
    pictures = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0)
