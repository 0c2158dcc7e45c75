"""An ECG goes in, an echocardiogram in step with it comes out (ECHOPulse section 3.3, progressive generation).

    python sample.py                                                # 64 frames from a built-in ECG
    python sample.py --ecg=watch.csv --frames=256                   # any ECG file that ecg_encoder.py reads
    python sample.py --ecg=beat.npy --ecg_hz=192 --image=echo.png   # a single beat, repeated; its first frame

Writes OUT/NAME.npy (T, H, W, C) uint8, NAME.gif and NAME.mp4 (the echo over its ECG), and report.json. ECG time 0
is video time 0. Frames go from the model to the files window by window: memory does not grow with the length.
"""
import json
import math
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import GifImagePlugin, Image
from tqdm import tqdm

from data.clips import ECG_HZ, LEADS, UserError, parse_flags, run_main
from data.phantom import make_ecg
from ecg_encoder import EcgConfig, EcgEncoder, clean_ecg, find_r_peaks, read_ecg
from evaluate import Segmenter, SegmenterConfig, cardiac_cycle, disk_volume, segment
from generator import Generator, GeneratorConfig, stream_video
from tokenizer import Tokenizer, TokenizerConfig
from train_tokenizer import load_weights


@dataclass
class SampleConfig:
    ecg: str = ""               # ECG file; flat = no heart beat; empty = a built-in ECG, drawn with --seed
    ecg_hz: float = 0           # sampling rate of an ECG file that does not say
    image: str = ""             # first frame: PNG, JPG, GIF or .npy
    frames: int = 64            # length of the video
    fps: float = 25             # frames per second
    weights: str = "weights"    # folder with tokenizer.pt, ecg_encoder.pt, generator.pt, segmenter.pt
    out: str = "out"            # folder to write
    steps: int = 8              # decoding steps of one window
    guidance: float = 1         # classifier-free guidance; 1 = off
    temperature: float = 1      # of drawing tokens
    overlap: int = 5            # frames that a window takes over from the one before; 1 + a multiple of P_t
    shift_ms: float = 0         # moves the ECG later by so many milliseconds
    seed: int = 0               # of the video and of the built-in ECG
    num: int = 1                # videos; they have the seeds seed, seed + 1, ...


# ---------------------------------------------------------------------------- what goes in

def go_on(ecg, first, samples):
    """Samples first .. first + samples of an ECG (L, N) that goes on before its sample 0 and after its last.

    There the stretch from its first to its last R peak comes again and again, so that the rhythm goes on; with
    fewer than two R peaks (a trace of about one beat) all of it does.
    """
    N, beats = ecg.shape[1], np.round(find_r_peaks(ecg) * ECG_HZ).astype(int)
    lo, hi = (beats[0], beats[-1]) if len(beats) > 1 else (0, N)
    at = np.arange(first, first + samples)
    at = np.where((at >= 0) & (at < N), at, lo + (at - lo) % (hi - lo))
    longer = ecg[:, at]
    for seam in np.flatnonzero(np.diff(at) != 1) + 1:       # a ramp of 48 ms, half a QRS, closes the step there
        ramp = np.linspace(0, 1, min(12, seam))
        longer[:, seam - len(ramp):seam] += (longer[:, seam] - longer[:, seam - 1])[:, None] * ramp
    return longer


def load_ecg(config, margin):
    """The ECG that the flags name, `margin` seconds longer than the video at both ends.

    -> cleaned ecg (L, N), names of its leads, time of its sample 0 and of its R peaks (seconds of the video).
    """
    seconds, shift = config.frames / config.fps, config.shift_ms / 1000
    first, samples = math.floor(-(margin + shift) * ECG_HZ), math.ceil((seconds + 2 * margin) * ECG_HZ)
    if config.ecg == "flat":
        ecg, leads = np.zeros((1, samples)), ["I"]
    elif not config.ecg:
        ecg, leads = make_ecg(config.seed, samples / ECG_HZ, start=first / ECG_HZ).ecg.T, list(LEADS)
    else:
        ecg, leads = read_ecg(config.ecg, config.ecg_hz)
        if (has := ecg.shape[1] / ECG_HZ) < seconds - shift:
            print(f"{config.ecg}: {has:.2f} s, repeated for {seconds:.2f} s of video", file=sys.stderr)
        ecg = go_on(ecg, first, samples)
    start = first / ECG_HZ + shift
    return clean_ecg(ecg), leads, start, start + find_r_peaks(ecg)


def load_image(path, size, channels):
    """A picture -> first frame (1, C, 1, size, size) in [0, 1]: grey, its middle square, scaled."""
    if not Path(path).is_file():
        raise UserError(f"{path} {'is a folder' if Path(path).is_dir() else 'does not exist'}; name a picture")
    try:
        x = np.load(path, mmap_mode="r") if path.endswith(".npy") else imageio.v3.imread(path, index=0)
        x = x[0] if x.ndim == 4 or x.ndim == 3 and x.shape[2] > 4 else x                    # of a video
        x = torch.from_numpy(np.atleast_3d(x) / (255 if x.dtype == np.uint8 else 1)).float()
        H, W, C = x.shape
    except Exception:               # each reader raises its own kinds
        raise UserError(f"{path} is damaged or not a picture") from None
    if min(H, W) < 16 or not 1 <= C <= 4 or not (x.min() >= 0 and x.max() <= 1):            # NaN is neither
        raise UserError(f"{path}: {H} x {W} x {C}; at least 16 x 16 pixels are needed, uint8 or in [0, 1]")
    side, grey = min(H, W), x[..., :3 if C > 2 else 1].mean(2)                              # without alpha
    square = grey[None, None, (H - side) // 2:, (W - side) // 2:][..., :side, :side]
    first = F.interpolate(square, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return first.expand(1, channels, size, size)[:, :, None]


def load_models(folder, device):
    """tokenizer, encoder, generator, segmenter or None."""
    stages = [("tokenizer", Tokenizer, TokenizerConfig), ("ecg_encoder", EcgEncoder, EcgConfig),
              ("generator", Generator, GeneratorConfig), ("segmenter", Segmenter, SegmenterConfig)]
    if not Path(folder, "segmenter.pt").exists():
        print(f"{folder} has no segmenter.pt: LV area and EF are not measured", file=sys.stderr)
    models = [load_weights(folder, *stage).eval().to(device) for stage in stages
              if stage[0] != "segmenter" or Path(folder, "segmenter.pt").exists()]
    tokenizer, encoder, generator = models[:3]
    for key, value in dict(bits=tokenizer.config.bits, grid=tokenizer.grid, patch_t=tokenizer.config.patch_t,
                           latent_frames=tokenizer.latent_frames, ecg_dim=encoder.config.dim).items():
        if (own := getattr(generator.config, key)) != value:
            raise UserError(f"{folder}: generator.pt is for {key}={own}, the other weights have {value}")
    return models if len(models) == 4 else models + [None]


def check_flags(config, window, patch_t, span):
    """window: frames of one window of the tokenizer; span: seconds that the ECG encoder sees."""
    least = dict(frames=1, steps=1, num=1, seed=0, ecg_hz=0, guidance=0, temperature=0, overlap=1,
                 fps=math.ceil(100 * window / span) / 100)      # a window must not outlast the ECG that it sees
    for key, value in least.items():
        if getattr(config, key) < value:
            raise UserError(f"--{key}={getattr(config, key):g}: must be at least {value}")
    if config.overlap >= window or (config.overlap - 1) % patch_t:
        raise UserError(f"--overlap={config.overlap}: must be 1 + a multiple of {patch_t}, below {window}")


# ---------------------------------------------------------------------------- what comes out

SCROLL_S = 4.0      # a longer video shows so many seconds of its ECG, a shorter one all of it
BACK, GRID, AHEAD, PAST, PEAK, CURSOR = np.array(
    [(12, 15, 19), (25, 31, 38), (48, 84, 76), (104, 240, 174), (255, 176, 76), (232, 236, 240)], np.float32)


def draw_strip(now, seconds, time, curve, r_peaks, height, width):
    """The ECG at `now` seconds, uint8 (height, width, 3): bright where shown, R peaks ticked, a cursor.

    curve (N,) in 0 .. 1 at the instants time (N,). A pixel takes on a colour as far as a shape covers it.
    """
    span = min(seconds, SCROLL_S)
    left = np.clip(now - span / 2, 0, seconds - span)
    x, row, image = np.arange(width) + 0.5, np.arange(height)[:, None], np.tile(BACK, (height, width, 1))
    column = lambda t: (t - left) / span * width                                            # noqa: E731
    lines = lambda t, half: np.clip(half + .5 - np.abs(x[:, None] - column(np.append(t, 1e6))).min(1), 0, 1)

    def paint(cover, colour, rows=slice(None)):
        image[rows] += np.clip(cover, 0, 1)[..., None] * (colour - image[rows])

    paint(lines(np.arange(left // 0.2, (left + span) // 0.2 + 1) * 0.2, 0.5), GRID)
    # in each column the curve covers the rows from its lowest to its highest at nine instants
    y = np.interp(left + np.arange(8 * width + 1) / (8 * width) * span, time, height * (0.88 - 0.62 * curve))
    y = np.stack([y[i:i + 8 * width:8] for i in range(9)])                                  # 9 w
    past = np.clip(column(now) - x + 0.5, 0, 1)                                             # w
    paint(np.minimum(row + 1, y.max(0) + 0.8) - np.maximum(row, y.min(0) - 0.8), AHEAD + past[:, None] * (PAST - AHEAD))
    paint(lines(r_peaks, 0.8) * (0.4 + 0.6 * past), PEAK, slice(3, 9))
    paint(0.6 * lines(now, 0.5), CURSOR)
    paint(3.5 - np.hypot(x - column(now), row + 0.5 - height * (0.88 - 0.62 * np.interp(now, time, curve))), CURSOR)
    return image.round().astype(np.uint8)


def gif_frame(picture, k, fps):
    """Frame k of a GIF as bytes, from Pillow's parts: every whole GIF writer keeps all frames until the end."""
    image = Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE)
    head = GifImagePlugin.getheader(image, info={"loop": 0})[0] if k == 0 else []
    ms = 10 * (round(100 * (k + 1) / fps) - round(100 * k / fps))       # GIF counts in 10 ms; no error adds up
    return b"".join(head + GifImagePlugin.getdata(image, duration=ms, include_color_table=True))


def open_mp4(path, fps):
    """imageio's writer; None, and a line on stderr, where there is no ffmpeg."""
    try:
        import imageio_ffmpeg
        imageio_ffmpeg.get_ffmpeg_exe()
        return imageio.v2.get_writer(path, fps=fps, quality=8, macro_block_size=2)
    except (ImportError, RuntimeError):
        print("no .mp4 without ffmpeg: pip install imageio-ffmpeg", file=sys.stderr)
        return nullcontext()


def figures(area, volume, r_peaks, frames, fps):
    """Beats and EF of a video, for its report; None = not known."""
    median = lambda x: round(float(np.median(x)), 1) if len(x) else None                    # noqa: E731
    cycle = cardiac_cycle(area, volume, fps) if area else {"ed_frames": None, "es_frames": None, "ef": None}
    shown = r_peaks[(r_peaks >= 0) & (r_peaks < frames / fps)]
    late = [1000 * min(abs(k / fps - r) for k in cycle["ed_frames"]) for r in shown] if cycle["ed_frames"] else []
    return {"r_peaks_s": shown.round(3).tolist(), "hr_bpm": median(60 / np.diff(r_peaks)), **cycle,
            "lv_area": area or None, "ed_error_ms": median(late)}


@torch.no_grad()
def make_video(config, models, ecg, leads, start, r_peaks, first, seed, path):
    """Sample one video into PATH.npy, .gif and .mp4; returns its report."""
    tokenizer, encoder, generator, segmenter = models
    began, c, fps, k, area, volume = time.time(), tokenizer.config, config.fps, 0, [], []
    zoom, seconds = max(1, round(256 / c.size)), config.frames / config.fps
    instants = start + np.arange(ecg.shape[1]) / ECG_HZ
    curve = ecg[leads.index("II") if "II" in leads else 0]
    low, high = np.quantile(curve, [0.001, 0.999])
    curve = np.clip((curve - low) / max(high - low, 1e-6), 0, 1)
    chunks = stream_video(tokenizer, encoder, generator, ecg[None], [LEADS.index(name) for name in leads], start,
                          config.frames, fps, first, config.overlap, seed, steps=config.steps,
                          guidance=config.guidance, temperature=config.temperature)
    with open(f"{path}.npy", "wb") as npy, open(f"{path}.gif", "wb") as gif, open_mp4(f"{path}.mp4", fps) as mp4, \
            tqdm(total=config.frames, desc=path.name) as bar:
        shape = (config.frames, c.size, c.size, c.channels)
        np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for video in chunks:                                                                # 1 C n H W
            frames = (video[0] * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()      # n H W C
            npy.write(frames.tobytes())
            for frame in np.broadcast_to(frames, (*frames.shape[:3], 3)):
                echo = Image.fromarray(frame).resize((zoom * c.size, zoom * c.size), Image.Resampling.BICUBIC)
                strip = draw_strip(k / fps, seconds, instants, curve, r_peaks, 64, zoom * c.size)
                picture = np.concatenate([echo, strip])
                gif.write(gif_frame(picture, k, fps))
                if mp4:
                    mp4.append_data(picture)
                k += 1
            if segmenter:
                masks = segment(segmenter, video)[0]                                        # n H W
                area, volume = area + masks.sum((1, 2)).tolist(), volume + disk_volume(masks).tolist()
            bar.update(len(frames))
        gif.write(b";")
    return asdict(config) | figures(area, volume, r_peaks, config.frames, fps) | {
        "name": path.name, "seed": seed, "ecg": config.ecg or "built-in", "leads": leads,
        "seconds": round(time.time() - began, 2), "device": str(next(generator.parameters()).device)}


def main():
    config = parse_flags(SampleConfig)
    print(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = load_models(config.weights, device)
    c, span = models[0].config, models[1].config.samples / ECG_HZ
    check_flags(config, c.frames, c.patch_t, span)
    ecg = load_ecg(config, margin=span + 1)
    first = load_image(config.image, c.size, c.channels).to(device) if config.image else None
    stem = "flat" if config.ecg == "flat" else Path(config.ecg or "sample").stem
    names = [stem] if config.num == 1 else [f"{stem}_{i}" for i in range(config.num)]
    if {Path(x).resolve() for x in (config.ecg, config.image) if x} & {
            Path(config.out, name + kind).resolve() for name in names for kind in (".npy", ".gif", ".mp4")}:
        raise UserError(f"--out={config.out} holds an input under a name that is to be written; choose another")
    try:        # all files move to OUT together at the end, or vanish where there is an error
        os.makedirs(config.out, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".part", dir=config.out) as part:
            reports = [make_video(config, models, *ecg, first, config.seed + i, Path(part, name))
                       for i, name in enumerate(names)]
            report = reports[0] if config.num == 1 else {"videos": reports}
            Path(part, "report.json").write_text(json.dumps(report, indent=1) + "\n")
            for file in os.listdir(part):
                os.replace(Path(part, file), Path(config.out, file))
    except OSError as error:
        raise UserError(f"cannot write {config.out}: {error.strerror or error}") from None
    for r in reports:
        print(f"""{config.out}/{r["name"]}.*
  heart rate   {r["hr_bpm"]} a minute, {len(r["r_peaks_s"])} R peaks, {len(r["ed_frames"] or [])} ED frames found
  |ED - R|     {r["ed_error_ms"]} ms, median
  EF           {r["ef"]}
  time         {r["seconds"]} s for {r["frames"]} frames on {r["device"]}""")


if __name__ == "__main__":
    run_main(main)
