"""An ECG goes in, an echocardiogram in step with it comes out (ECHOPulse section 3.3).

    python sample.py                                              # 64 frames from a built-in ECG
    python sample.py --ecg=watch.csv --frames=256                 # any ECG file that data/ecg_files.py reads
    python sample.py --text="A4C view, EF 30" --weights=DIR       # by a generator told by text
    python sample.py --ecg=beat.npy --ecg_hz=192 --image=echo.png # one beat, repeated; a first frame

Writes OUT/NAME.npy (T, H, W, C) uint8, NAME.gif and NAME.mp4 (the echo over its ECG), and report.json. Time 0
of the ECG is frame 0. Frames go from model to files window by window: memory does not grow with the length.
"""
import json
import math
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import imageio
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.flags import UserError, parse_flags, run_main
from common.picture import draw_strip, gif_frame, load_image, strip_curve
from data.dataset import ECG_HZ, LEADS
from data.ecg_files import read_ecg
from data.ecg_signal import clean_ecg, find_r_peaks, go_on
from data.ecgsyn import make_ecg
from data.writer import Writer
from metrics.ejection_fraction import cardiac_cycle, disk_volume
from metrics.lv_segmenter import masks_of
from evaluate import load_models
from generator import check_scorer, stream_video


@dataclass
class SampleConfig:
    ecg: str = ""               # ECG file; flat = no heart beat; empty = a built-in ECG, drawn with --seed
    ecg_hz: float = 0           # sampling rate of an ECG file that does not say
    leads: str = ""             # its leads, such as II or I,V2, where it does not say; empty = I, II, III ...
    text: str = ""              # what to show, for a generator told by text in the ECG's place
    image: str = ""             # first frame: PNG, JPG, GIF or .npy
    frames: int = 64            # length of the video
    fps: float = 25             # frames per second
    weights: str = "weights"    # folder with tokenizer.pt, ecg_encoder.pt, generator.pt, segmenter.pt
    out: str = "out"            # folder to write
    steps: int = 4              # decoding steps of one window
    scorer: str = "random"      # who says which tokens to draw again: random, halton, confidence, critic
    guidance: float = 1.5       # classifier-free guidance; 1 = off
    guidance_end: float = 0     # its scale at a window's last step, linearly from the first; 0 = the same
    temperature: float = 1      # of drawing tokens
    overlap: int = 5            # frames that a window takes over from the one before; 1 + a multiple of P_t
    shift_ms: float = 0         # moves the ECG later by so many milliseconds
    hide: str = ""              # seconds of the video whose ECG the model is not told, such as 1.5,3
    seed: int = 0               # of the video and of the built-in ECG
    num: int = 1                # videos; they have the seeds seed, seed + 1, ...
    masks: bool = False         # also OUT/set: the videos, ECGs, LV masks and EFs as a prepared set


# ---------------------------------------------------------------------------- what goes in

def load_ecg(config, margin, seed):
    """The ECG from `margin` seconds before the video to as many after it: (L, N) mV, the same cleaned, the
    names of its leads, the times (seconds of the video) of its sample 0 and of its R peaks."""
    seconds, shift = config.frames / config.fps, config.shift_ms / 1000
    first, samples = -math.ceil((margin + shift) * ECG_HZ), math.ceil((seconds + 2 * margin) * ECG_HZ)
    if config.ecg == "flat":
        ecg, leads = np.zeros((1, ECG_HZ)), ["I"]
    elif not config.ecg:            # at least 10 s: a seed's ECG is the same for all short videos
        ecg, leads = make_ecg(seed, max(seconds, 10)).ecg.T, list(LEADS)
    else:
        ecg, leads = read_ecg(config.ecg, config.ecg_hz, config.leads.split(",") if config.leads else ())
        if (has := ecg.shape[1] / ECG_HZ) < seconds - shift:
            print(f"{config.ecg}: {has:.2f} s, repeated for {seconds:.2f} s of video", file=sys.stderr)
    ecg, start = go_on(ecg, first, samples), first / ECG_HZ + shift
    return ecg, clean_ecg(ecg), leads, start, start + find_r_peaks(ecg)


def check_flags(config, window, patch_t, span):
    """window: frames of one window, patch_t: of one latent frame; span: seconds that the ECG encoder sees."""
    slowest = math.ceil(100 * window / span) / 100      # no window may outlast the ECG that it sees
    least = dict(frames=1, steps=1, num=1, overlap=1, seed=0, ecg_hz=0, guidance=0, guidance_end=0,
                 temperature=0, fps=slowest)
    for key, value in least.items():
        if getattr(config, key) < value:
            raise UserError(f"--{key}={getattr(config, key):g}: must be at least {value}")
    if config.overlap >= window or (config.overlap - 1) % patch_t:
        raise UserError(f"--overlap={config.overlap}: must be 1 + a multiple of {patch_t}, below {window}")


def hidden_span(text):
    """Of --hide: its first and last second, (0, 0) for ""."""
    if not text:
        return 0.0, 0.0
    try:
        start, end = map(float, text.split(","))
    except ValueError:
        start = end = math.nan
    if not start < end:
        raise UserError(f"--hide={text}: two seconds of the video, the first before the second")
    return start, end


# ---------------------------------------------------------------------------- what comes out

def figures(area, volume, r_peaks, frames, fps):
    """Beats and EF of a video, for its report; None = there are none."""
    median = lambda x: round(float(np.median(x)), 1) if len(x) else None                    # noqa: E731
    cycle = cardiac_cycle(area, volume, fps) if area else {"ed_frames": [], "es_frames": [], "ef": None}
    shown, ed = r_peaks[(r_peaks >= 0) & (r_peaks < frames / fps)], cycle["ed_frames"]
    late = [1000 * min(abs(k / fps - r) for k in ed) for r in shown] if ed else []
    return {"r_peaks_s": shown.round(3).tolist(), "hr_bpm": median(60 / np.diff(r_peaks)), **cycle,
            "lv_area": area, "ed_error_ms": median(late)}


@torch.no_grad()
def make_video(config, models, trace, first, seed, path, dataset):
    """Sample one video into PATH.npy, .gif and .mp4, and a Writer's data set if given; returns its report."""
    (*stages, segmenter), (raw, ecg, leads, start, r_peaks) = models, trace
    began, c, fps = time.time(), models[0].config, config.fps
    side, height, seconds = max(1, round(256 / c.size)) * c.size, 64, config.frames / fps
    instants, lead = start + np.arange(ecg.shape[1]) / ECG_HZ, ecg[leads.index("II") if "II" in leads else 0]
    by_ecg = stages[2].config.condition == "ecg"
    begin, end = hidden_span(config.hide)
    hidden = (instants >= begin) & (instants < end)
    curve = strip_curve(np.where(hidden, 0, lead), height)      # the strip shows what the model sees
    chunks = stream_video(*stages, ecg[None], [LEADS.index(name) for name in leads], start, config.frames,
                          fps, first, config.overlap, seed, hidden, [config.text], scorer=config.scorer,
                          steps=config.steps, guidance=config.guidance, guidance_end=config.guidance_end,
                          temperature=config.temperature)
    with ExitStack() as files:
        npy, gif = (files.enter_context(open(f"{path}.{kind}", "wb")) for kind in ("npy", "gif"))
        mp4 = find_spec("imageio_ffmpeg") and files.enter_context(
            imageio.v2.get_writer(f"{path}.mp4", fps=fps, quality=8, macro_block_size=2))
        bar = files.enter_context(tqdm(total=config.frames, desc=path.name, unit="frame"))
        shape = (config.frames, c.size, c.size, c.channels)
        np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for video in chunks:                                                                # 1 C n H W
            frames = (video[0] * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()      # n H W C
            npy.write(frames.tobytes())
            for k, frame in enumerate(np.broadcast_to(frames, (*frames.shape[:3], 3)), bar.n):
                echo = Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)
                picture = np.asarray(echo)
                if by_ecg:
                    strip = draw_strip(k / fps, seconds, instants, curve, r_peaks, height, side)
                    picture = np.concatenate([picture, strip])
                gif.write(gif_frame(picture, k, fps))
                if mp4:
                    mp4.append_data(picture)
            bar.update(len(frames))
        gif.write(b";")
    area, volume, kept = [], [], []
    for masks in masks_of(segmenter, np.load(f"{path}.npy", mmap_mode="r")) if segmenter else ():
        area += masks.sum((1, 2)).tolist()
        volume += disk_volume(masks).tolist()
        kept += [masks] if dataset else []
    found = figures(area, volume, r_peaks, config.frames, fps)
    if dataset:
        dataset.add(id=path.name, fps=fps, video=np.load(f"{path}.npy"), mask=np.concatenate(kept), ecg=raw.T,
                    ecg_offset_s=start, r_peaks_s=found["r_peaks_s"], view="A4C", ef=found["ef"] or "",
                    text=f"A4C view, EF {found['ef']:.0f}" if found["ef"] else "A4C view, no heartbeat")
    return asdict(config) | found | {
        "name": path.name, "seed": seed, "leads": leads, "seconds": round(time.time() - began, 2),
        "ecg": config.ecg or "built-in" if by_ecg else "none",
        "device": str(next(models[0].parameters()).device)}


def main():
    config = parse_flags(SampleConfig)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = load_models(config.weights, device)
    c, condition = models[0].config, models[2].config.condition
    if condition != "ecg" and (config.ecg or config.shift_ms or config.hide or config.masks):
        raise UserError("this generator was trained without an ECG: no --ecg, --shift_ms, --hide or --masks")
    if bool(config.text) != (condition == "text"):
        raise UserError('this generator is told by text: --text="A4C view, EF 55, heart rate 72"'
                        if condition == "text" else "--text: these --weights were trained without text")
    span = models[1].config.samples / ECG_HZ if condition == "ecg" else config.frames / config.fps + 1
    check_flags(config, c.frames, c.patch_t, span)
    check_scorer(models[2].config, config.scorer)
    hidden_span(config.hide)
    told = config if condition == "ecg" else replace(config, ecg="flat")
    traces = [load_ecg(told, span + 1, config.seed + i) for i in range(1 if config.ecg else config.num)]
    first = load_image(config.image, c.size, c.channels).to(device) if config.image else None
    stem = Path(config.ecg or "sample").stem
    names = [stem] if config.num == 1 else [f"{stem}_{i}" for i in range(config.num)]
    for path in (Path(config.out, name + kind) for name in names for kind in (".npy", ".gif", ".mp4")):
        if path.resolve() in [Path(source).resolve() for source in (config.ecg, config.image) if source]:
            raise UserError(f"{path} would be overwritten, and it is an input; choose another --out")
    if config.masks and Path(config.out, "set").exists():
        raise UserError(f"{config.out}/set exists already; remove it or choose another --out")
    if not find_spec("imageio_ffmpeg"):
        print("no .mp4 is written: pip install imageio-ffmpeg", file=sys.stderr)
    try:        # all files move to OUT together at the end, or vanish where there is an error
        os.makedirs(config.out, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".part", dir=config.out) as part:
            dataset = Writer(Path(part, "set", "train")) if config.masks else None
            reports = [make_video(config, models, traces[i % len(traces)], first, config.seed + i,
                                  Path(part, name), dataset) for i, name in enumerate(names)]
            if dataset:
                dataset.close()
                meta = dict(name="set", fps=config.fps, height=c.size, width=c.size, channels=c.channels,
                            leads=traces[0][2], ecg_hz=ECG_HZ, source="sample",
                            command=" ".join(["sample.py", *sys.argv[1:]]))
                Path(part, "set", "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
            report = reports[0] if config.num == 1 else {"videos": reports}
            Path(part, "report.json").write_text(json.dumps(report, indent=1) + "\n")
            for file in os.listdir(part):
                os.replace(Path(part, file), Path(config.out, file))
    except OSError as error:
        raise UserError(f"cannot write {config.out}: {error.strerror or error}") from None
    for r in reports:
        print(f"""{config.out}/{r["name"]}: {r["frames"]} frames in {r["seconds"]} s on {r["device"]}
  heart rate  {r["hr_bpm"] or "-"} a minute
  beats       {len(r["r_peaks_s"])} R peaks, {len(r["ed_frames"])} ED frames
  |ED - R|    {r["ed_error_ms"] or "-"} ms, median
  EF          {f'{r["ef"]:.1f}' if r["ef"] else "-"}""")


if __name__ == "__main__":
    run_main(main)
