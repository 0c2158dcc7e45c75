"""Pictures of sample.py: the first frame it reads, the ECG strip under the echo, a GIF frame by frame."""
import imageio
import numpy as np
import torch
from PIL import GifImagePlugin, Image, ImageDraw
from torch.nn.functional import interpolate

from common.flags import UserError

SCROLL_S = 4.0      # a longer video shows so many seconds of its ECG, a shorter one all of it
BACK, GRID, AHEAD, PAST, PEAK, CURSOR = np.array(
    [(12, 15, 19), (25, 31, 38), (56, 100, 90), (104, 240, 174), (255, 176, 76), (232, 236, 240)], np.float32)


def load_image(path, size, channels):
    """A picture -> first frame (1, C, 1, size, size) in [0, 1]: grey, its middle square, scaled."""
    try:
        with open(path, "rb") as file:
            x = np.load(file) if path.endswith(".npy") else imageio.v3.imread(file, index=0)
        H, W, C = (x := np.atleast_3d(x[0] if x.ndim == 4 else x)).shape                    # 4: of a video
        x = x[..., :3 if C > 2 else 1] / (255 if x.dtype == np.uint8 else 1)                # without alpha
        grey = torch.from_numpy(x).float().mean(2)
    except Exception as error:      # each reader raises its own kinds
        reason = getattr(error, "strerror", None) or "damaged or not a picture"
        raise UserError(f"{path} cannot be read: {reason}") from None
    if min(H, W) < 16 or C > 4 or not (grey.min() >= 0 and grey.max() <= 1):                # NaN is neither
        raise UserError(f"{path} holds {H} x {W} x {C}: 16 x 16 x 1 or more, uint8 or in [0, 1], is needed")
    side = min(H, W)
    square = grey[None, None, (H - side) // 2:, (W - side) // 2:][..., :side, :side]
    first = interpolate(square, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return first.expand(1, channels, size, size)[:, :, None]


def strip_curve(lead, height):
    """Row of a strip, from its top, of each sample of an ECG lead (N,)."""
    low, high = np.quantile(lead, [0.001, 0.999])
    return height * (0.88 - 0.62 * np.clip((lead - low) / max(high - low, 1e-6), 0, 1))


def film(frames, title, side):
    """Frames (T, H, W, C) in [0, 1] in a row, uint8 (side, T side, 3), a title in the first one's corner."""
    row = [Image.fromarray((255 * np.broadcast_to(frame, (*frame.shape[:2], 3))).round().astype(np.uint8))
           .resize((side, side), Image.Resampling.BICUBIC) for frame in frames]
    ImageDraw.Draw(row[0]).text((4, 2), title)
    return np.concatenate([np.asarray(frame) for frame in row], axis=1)


def draw_strip(now, seconds, time, curve, r_peaks, height, width):
    """The ECG at `now` seconds, uint8 (height, width, 3): bright where shown, R peaks ticked, a cursor.

    curve (N,): row at the instants time (N,). A pixel takes on a colour as far as a shape covers it.
    """
    span = min(seconds, SCROLL_S)
    left = np.clip(now - span / 2, 0, seconds - span)
    x, row, image = np.arange(width) + 0.5, np.arange(height)[:, None], np.tile(BACK, (height, width, 1))
    cursor = (now - left) / span * width

    def paint(cover, colour, rows=slice(None)):
        image[rows] += np.clip(cover, 0, 1)[..., None] * (colour - image[rows])

    def upright(t, half):                                                                   # lines at t: w
        t = np.append(t[np.abs(t - now) <= span], 1e6)
        return np.clip(half + 0.5 - np.abs(x[:, None] - (t - left) / span * width).min(1), 0, 1)

    paint(upright(0.2 * np.arange(left // 0.2, (left + span) // 0.2 + 1), 0.5), GRID)
    # in each column the curve covers the rows from its lowest to its highest at nine instants
    y = np.interp(left + np.arange(8 * width + 1) / (8 * width) * span, time, curve)
    y = np.stack([y[i:i + 8 * width:8] for i in range(9)])                                  # 9 w
    past = np.clip(cursor - x + 0.5, 0, 1)[:, None]                                         # w 1
    cover = np.minimum(row + 1, y.max(0) + 0.8) - np.maximum(row, y.min(0) - 0.8)           # h w
    paint(cover, AHEAD + past * (PAST - AHEAD))
    paint(upright(r_peaks, 0.8), AHEAD + past * (PEAK - AHEAD), slice(3, 9))
    paint(0.6 * np.clip(1 - np.abs(x - cursor), 0, 1), CURSOR)
    paint(3.5 - np.hypot(x - cursor, row + 0.5 - np.interp(now, time, curve)), CURSOR)
    return image.round().astype(np.uint8)


def gif_frame(picture, k, fps):
    """Frame k of a GIF as bytes, from Pillow's parts: its whole writer keeps all frames until the end."""
    image = Image.fromarray(picture).quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    head = GifImagePlugin.getheader(image, info={"loop": 0})[0] if k == 0 else []
    ms = 10 * (round(100 * (k + 1) / fps) - round(100 * k / fps))   # GIF counts in 10 ms; no error adds up
    return b"".join(head + GifImagePlugin.getdata(image, duration=ms, include_color_table=True))
