"""An ECG goes in, an echocardiogram in step with it comes out (ECHOPulse section 3.3).

    python sample.py                                              # 64 frames from a built-in ECG
    python sample.py --ecg=watch.csv --frames=256                 # an ECG file
    python sample.py --ecg=beat.npy --ecg_hz=192                  # a trace of one beat is repeated
    python sample.py --image=echo.png                             # starts from a first frame
    python sample.py --text="A4C view, EF 30" --weights=DIR       # by a generator trained with text

Writes OUT/NAME.npy (T, H, W, C) uint8, OUT/NAME.gif and OUT/NAME.mp4 (the echo over its ECG), and
OUT/report.json. Time 0 of the ECG is frame 0. Frames go from the model to the files window by
window, so memory does not grow with the length of the video.
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
from typing import NamedTuple

import imageio
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.flags import UserError, check_least, parse_flags, run_main
from common.picture import (draw_strip, gif_frame, index_colours, index_grey, load_image,
                            strip_curve)
from common.training import model_config
from data.dataset import ECG_HZ, LEADS
from data.ecg_signal import clean_ecg, extend_periodic, find_disturbed, find_r_peaks
from generator import DecodingConfig, check_decoding, load_models, stream_video

STRIP_HEIGHT = 64       # pixels of the ECG strip under the echo
PICTURE_SIDE = 256      # pixels of the echo in the GIF, about: a multiple of the model's own size


@dataclass
class SampleConfig(DecodingConfig):
    """Settings of a sampling; each is a flag."""
    ecg: str = ""               # ECG file; flat = no heart beat; empty = a built-in ECG, by --seed
    ecg_hz: float = 0           # sampling rate of an ECG file that does not say
    ecg_leads: str = ""         # its leads, such as II or I,V2; they win over the names in the file
    text: str = ""              # what to show, for a generator that was trained with text
    image: str = ""             # first frame: PNG, JPG, GIF or .npy
    frames: int = 64            # length of the video
    fps: float = 25             # frames per second
    weights: str = "weights"    # folder with the .pt files of tokenizer, encoder, generator, U-Net
    out: str = "out"            # folder to write
    shift_ms: float = 0         # moves the ECG later by so many milliseconds
    hide: str = ""              # hides the ECG between two seconds of the video, such as 1.5,3
    seed: int = 0               # of the video and of the built-in ECG
    num: int = 1                # videos; they have the seeds seed, seed + 1, ...
    batch: int = 8              # videos that are made together; each is as if it were made alone
    masks: bool = False         # also OUT/set: videos, ECGs, LV masks and EFs as a prepared set


# ---------------------------------------------------------------- what goes in

class Trace(NamedTuple):
    """The ECG of one video, from before its first frame to after its last one."""
    raw: np.ndarray             # (L, N) mV at 250 Hz
    clean: np.ndarray           # (L, N), as the model sees it
    disturbed: np.ndarray       # (N,) bool: gaps and artefacts, which the model must not see
    leads: list                 # names of the L leads
    start: float                # time of sample 0, seconds of the video
    r_peaks: np.ndarray         # (beats,) seconds of the video


def read_or_make_ecg(config, seconds, seed):
    """The ECG that the flags ask for: (L, N) mV at 250 Hz and the names of its leads."""
    # Imported here, so that a run loads only the files that it needs.
    # No heart beat at all: the heart must stand still.
    if config.ecg == "flat":
        return np.zeros((1, ECG_HZ)), ["I"]
    if not config.ecg:
        from data.ecgsyn import make_ecg
        # At least 10 s, so that the ECG of a seed is the same for all short videos.
        return make_ecg(seed, max(seconds, 10)).ecg.T, list(LEADS)
    from data.ecg_files import read_ecg
    names = config.ecg_leads.split(",") if config.ecg_leads else ()
    # The flags are used where the file does not give its rate or its leads.
    return read_ecg(config.ecg, config.ecg_hz, names)


def load_trace(config, margin, seed):
    """The Trace of a video, with `margin` seconds of ECG before and after it."""
    seconds = config.frames / config.fps
    shift = config.shift_ms / 1000
    # Millivolts; any leads from 1 to 12. The model takes what is there.
    ecg, leads = read_or_make_ecg(config, seconds, seed)

    # A recording that ends before the video is repeated, from R peak to R peak.
    recorded = ecg.shape[1] / ECG_HZ
    is_file = config.ecg not in ("", "flat")
    if is_file and recorded < seconds - shift:
        print(f"{config.ecg}: {recorded:.2f} s, repeated for {seconds:.2f} s of video",
              file=sys.stderr)

    # A later ECG (shift > 0) needs more of what came before.
    first = -math.ceil((margin + shift) * ECG_HZ)
    samples = math.ceil((seconds + 2 * margin) * ECG_HZ)
    ecg = extend_periodic(ecg, first, samples)

    # Shifting moves the times of the samples, not the samples.
    start = first / ECG_HZ + shift

    # A gap of the recording and an artefact are no heart: the model must not see them.
    disturbed = find_disturbed(ecg)
    # The user is told of those in the video. The ECG reaches farther, on both sides.
    times = start + np.arange(samples) / ECG_HZ
    in_video = disturbed[(times >= 0) & (times < seconds)]
    if in_video.any():
        print(f"{config.ecg}: {in_video.sum() / ECG_HZ:.2f} s of the ECG are a gap or disturbed, "
              "and hidden from the model", file=sys.stderr)
    return Trace(raw=ecg, clean=clean_ecg(ecg), disturbed=disturbed, leads=leads, start=start,
                 r_peaks=start + find_r_peaks(ecg))


def parse_hide(text):
    """--hide=1.5,3 -> its first and last second; (0, 0) for an empty one."""
    if not text:
        return 0.0, 0.0
    try:
        start, end = map(float, text.split(","))
    except ValueError:
        # Not two numbers. Nothing is less than nan, so the next line refuses it.
        start = end = math.nan
    if not start < end:
        raise UserError(f"--hide={text}: two seconds of the video, the first before the second")
    return start, end


def hidden_samples(config, trace):
    """Which samples (N,) of a Trace the model must not see: those of --hide and the disturbed."""
    begin, end = parse_hide(config.hide)
    times = trace.start + np.arange(len(trace.disturbed)) / ECG_HZ
    return trace.disturbed | ((times >= begin) & (times < end))


def check_flags(config, tokenizer, generator, span):
    """UserError where a flag makes no sense. span: seconds that the ECG encoder sees."""
    # A window must not last longer than the ECG that the encoder sees. Rounded up to a hundredth.
    slowest = math.ceil(100 * tokenizer.config.frames / span) / 100

    check_least(config, dict(frames=1, num=1, batch=1, ecg_hz=0, fps=slowest))

    # What generator.py asks of the decoding, and whether --hide is two seconds.
    check_decoding(config, generator.config, tokenizer.config)
    parse_hide(config.hide)


def check_condition(config, condition):
    """UserError where the flags ask for another condition than the generator was trained with."""
    if condition != "ecg" and (config.ecg or config.shift_ms or config.hide or config.masks):
        raise UserError("this generator was trained without an ECG: "
                        "no --ecg, --shift_ms, --hide or --masks")
    if condition == "text" and not config.text:
        raise UserError("this generator was trained with text: "
                        '--text="A4C view, EF 55, heart rate 72"')
    if condition != "text" and config.text:
        raise UserError("--text: these --weights were trained without text")


def check_files(config, names):
    """UserError where an output would overwrite an input, or a set that exists."""
    # resolve(): the same file may be named in two ways.
    inputs = [Path(path).resolve() for path in (config.ecg, config.image) if path]
    for name in names:
        for kind in (".npy", ".gif", ".mp4"):
            path = Path(config.out, name + kind)
            if path.resolve() in inputs:
                raise UserError(f"{path} would be overwritten, and it is an input; "
                                "choose another --out")
    if config.masks and Path(config.out, "set").exists():
        raise UserError(f"{config.out}/set exists already; remove it or choose another --out")


# ---------------------------------------------------------------- what comes out

class VideoFiles:
    """PATH.npy, .gif and .mp4, written frame by frame. trace None: there is no ECG to draw."""

    def __init__(self, path, config, tokenizer_config, trace, hidden):
        self.config = config
        self.trace = trace
        # Enlarged by a whole number, so that all pixels of the model are alike.
        size = tokenizer_config.size
        self.side = max(1, round(PICTURE_SIDE / size)) * size
        # Without a strip there may be no second part of the picture to index.
        self.grey = tokenizer_config.channels == 1 and trace is not None
        self.frame = 0              # frames written so far
        if trace is not None:
            # The strip shows the cleaned ECG, as the model sees it.
            self.times = trace.start + np.arange(len(hidden)) / ECG_HZ
            self.curve = strip_curve(trace.clean, trace.leads, hidden, STRIP_HEIGHT)

        # All files are closed together, also where an error comes between.
        self.files = ExitStack()
        self.npy = self.files.enter_context(open(f"{path}.npy", "wb"))
        self.gif = self.files.enter_context(open(f"{path}.gif", "wb"))

        # The MP4 needs a package of its own; without it there are the other two.
        self.mp4 = None
        if find_spec("imageio_ffmpeg"):
            # "superfast" takes a third of the usual time; the file is a quarter larger.
            mp4 = imageio.v2.get_writer(f"{path}.mp4", fps=config.fps, quality=8,
                                        macro_block_size=2, ffmpeg_params=["-preset", "superfast"])
            self.mp4 = self.files.enter_context(mp4)

        # The length is known, so the header can be written before the frames.
        shape = (config.frames, size, size, tokenizer_config.channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.npy, header)

    def write(self, frames):
        """Append frames (n, H, W, C) uint8."""
        # The .npy has the model's own pixels; GIF and MP4 are pictures of them, in three colours.
        self.npy.write(frames.tobytes())
        for frame in frames:
            picture = self.draw(frame)
            if self.grey:
                image = index_grey(picture, self.side)
            else:
                image = index_colours(picture)
            self.gif.write(gif_frame(image, self.frame, self.config.fps))
            if self.mp4 is not None:
                self.mp4.append_data(picture)
            self.frame += 1

    def draw(self, frame):
        """A frame (H, W, C), enlarged, over its ECG strip: uint8, in three colours."""
        size = (self.side, self.side)
        # Pillow wants a grey picture as (H, W).
        if frame.shape[-1] == 1:
            frame = frame[..., 0]
        image = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
        picture = np.asarray(image.convert("RGB"))

        # A video without an ECG has no strip.
        if self.trace is None:
            return picture
        now = self.frame / self.config.fps
        seconds = self.config.frames / self.config.fps
        strip = draw_strip(now, seconds, self.times, self.curve, self.trace.r_peaks,
                           STRIP_HEIGHT, self.side)
        return np.concatenate([picture, strip])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is None:
            self.gif.write(b";")        # the last byte of a GIF
        self.files.close()


def measure(path, segmenter):
    """LV area and volume of each frame, and the LV masks (T, H, W), of PATH.npy."""
    # The U-Net is loaded only where a video is measured.
    from metrics.ejection_fraction import disk_volume
    from metrics.lv_segmenter import masks_of

    # A U-Net marks the left ventricle; area is a count of pixels, volume is in pixels cubed.
    area = []
    volume = []
    masks = []
    # Block by block: neither the video nor its masks need to fit into memory as floats.
    for block in masks_of(segmenter, np.load(f"{path}.npy", mmap_mode="r")):
        area += block.sum((1, 2)).tolist()
        volume += disk_volume(block).tolist()
        masks.append(block)
    return area, volume, np.concatenate(masks)


def median(values):
    """The median to a tenth; None of none."""
    return round(float(np.median(values)), 1) if len(values) else None


def beats_and_ef(area, volume, r_peaks, frames, fps):
    """What the report says of the beats and the EF of a video; area, volume empty: not measured."""
    # ED: the ventricle is largest, near the R peak. ES: it is smallest, near the end of the T wave.
    cycle = {"ed_frames": [], "es_frames": [], "ef": None}
    if area:
        from metrics.ejection_fraction import cardiac_cycle
        cycle = cardiac_cycle(area, volume, fps)

    # The ECG reaches beyond the video; only R peaks within it are shown.
    shown = r_peaks[(r_peaks >= 0) & (r_peaks < frames / fps)]

    # For each R peak, how far the nearest end-diastolic frame is.
    late = []
    if cycle["ed_frames"]:
        ed_times = np.array(cycle["ed_frames"]) / fps
        late = [1000 * np.abs(ed_times - r).min() for r in shown]
    return {"r_peaks_s": shown.round(3).tolist(), "hr_bpm": median(60 / np.diff(r_peaks)), **cycle,
            "lv_area": area, "ed_error_ms": median(late)}


def add_to_set(dataset, name, *, fps, path, masks, trace, metrics):
    """Add a video with its ECG, masks and EF to a Writer's prepared set."""
    # A heart that stands still has no EF.
    ef = metrics["ef"]
    text = "A4C view, no heartbeat"
    if ef:
        text = f"A4C view, EF {ef:.0f}"
    # The ECG is stored as recorded, in millivolts: who reads the set cleans it again.
    dataset.add(id=name, fps=fps, video=np.load(f"{path}.npy"), mask=masks, ecg=trace.raw.T,
                ecg_offset_s=trace.start, r_peaks_s=metrics["r_peaks_s"], view="A4C",
                ef=ef or "", text=text)


@torch.no_grad()
def sample_to_files(config, models, traces, *, first, seeds, paths):
    """Sample the videos of B traces in one batch -> PATH.npy, .gif and .mp4 of each."""
    tokenizer, encoder, generator = models
    # The part of each ECG that the model must not know
    hidden = np.stack([hidden_samples(config, trace) for trace in traces])              # B N
    if first is not None:
        first = first.expand(len(traces), -1, -1, -1, -1)                               # B C 1 H W

    # Nothing runs yet: each window is sampled when the loop asks for it.
    chunks = stream_video(
        tokenizer, encoder, generator, ecg=np.stack([trace.clean for trace in traces]),
        leads=[LEADS.index(name) for name in traces[0].leads], ecg_start=traces[0].start,
        frames=config.frames, fps=config.fps, decoding=model_config(config, DecodingConfig),
        first=first, seed=seeds, hidden=hidden, text=[config.text] * len(traces))

    # All files are closed together, also where an error comes between.
    with ExitStack() as stack:
        files = []
        for trace, path, unknown in zip(traces, paths, hidden):
            drawn = trace if generator.config.condition == "ecg" else None
            files.append(stack.enter_context(
                VideoFiles(path, config, tokenizer.config, drawn, unknown)))
        bar = stack.enter_context(tqdm(total=config.frames, desc=paths[0].name, unit="frame"))
        for video in chunks:                                                # B C n H W
            frames = (video * 255).round().byte()                           # B C n H W
            frames = frames.permute(0, 2, 3, 4, 1).cpu().numpy()            # B n H W C
            for one, part in zip(files, frames):
                one.write(part)
            bar.update(video.shape[2])


def measure_video(config, segmenter, trace, *, path, dataset):
    """What the report says of a video; it is added to the dataset, if there is one."""
    area = []
    volume = []
    masks = None
    if segmenter:
        area, volume, masks = measure(path, segmenter)
    metrics = beats_and_ef(area, volume, trace.r_peaks, config.frames, config.fps)
    if dataset:
        add_to_set(dataset, path.name, fps=config.fps, path=path, masks=masks, trace=trace,
                   metrics=metrics)
    return metrics


def make_videos(config, models, segmenter, traces, *, first, seeds, paths, dataset):
    """Make the videos of some traces in one batch -> the report of each."""
    # ---- 1. sample, window by window, and write
    began = time.time()
    sample_to_files(config, models, traces, first=first, seeds=seeds, paths=paths)
    seconds = (time.time() - began) / len(traces)

    # ---- 2. measure the left ventricle, and report: the settings and what was measured and used
    ecg = "none"
    if models[2].config.condition == "ecg":
        ecg = config.ecg or "built-in"
    device = str(next(models[0].parameters()).device)
    reports = []
    for trace, seed, path in zip(traces, seeds, paths):
        began = time.time()
        metrics = measure_video(config, segmenter, trace, path=path, dataset=dataset)
        about = {"name": path.name, "seed": seed, "leads": trace.leads,
                 "seconds": round(seconds + time.time() - began, 2), "ecg": ecg, "device": device}
        reports.append(asdict(config) | metrics | about)
    return reports


def load_unet(config, tokenizer, condition, device):
    """The U-Net that measures the video; None where video alone was trained and there is none."""
    # Video of anything else than a heart has no ventricle to be measured.
    if condition == "none" and not Path(config.weights, "segmenter.pt").exists():
        return None
    from metrics.lv_segmenter import load_segmenter
    return load_segmenter(config.weights, tokenizer.config.channels).to(device)


def write_meta(folder, config, tokenizer, leads):
    """meta.json of the prepared set of --masks."""
    c = tokenizer.config
    meta = dict(name="set", fps=config.fps, height=c.size, width=c.size, channels=c.channels,
                leads=leads, ecg_hz=ECG_HZ, source="sample",
                command=" ".join(["sample.py", *sys.argv[1:]]))
    Path(folder, "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def make_all(config, models, segmenter, traces, first, names):
    """Make all videos, and move their files to OUT together -> their reports.

    The files are made in a temporary folder in OUT, which vanishes where there is an error.
    """
    os.makedirs(config.out, exist_ok=True)
    with tempfile.TemporaryDirectory(suffix=".part", dir=config.out) as part:
        dataset = None
        if config.masks:
            from data.writer import Writer
            # A prepared set has splits; these videos are all for training.
            dataset = Writer(Path(part, "set", "train"))
        reports = []
        for i in range(0, config.num, config.batch):
            some = range(i, min(i + config.batch, config.num))
            # A recording is one trace for all videos; a built-in ECG goes with its seed.
            reports += make_videos(
                config, models, segmenter, [traces[k % len(traces)] for k in some], first=first,
                seeds=[config.seed + k for k in some], paths=[Path(part, names[k]) for k in some],
                dataset=dataset)
        if dataset:
            dataset.close()
            write_meta(Path(part, "set"), config, models[0], traces[0].leads)
        report = reports[0]
        if config.num > 1:
            report = {"videos": reports}
        Path(part, "report.json").write_text(json.dumps(report, indent=1) + "\n")
        # A rename within OUT: either all of a file is there or none of it.
        for file in os.listdir(part):
            os.replace(Path(part, file), Path(config.out, file))
    return reports


def show(out, report):
    """Print what came out."""
    # "-" stands for what could not be measured, such as the EF of a heart without beats.
    ef = "-"
    if report["ef"]:
        ef = f"{report['ef']:.1f}"
    print(f"{out}/{report['name']}: {report['frames']} frames in {report['seconds']} s "
          f"on {report['device']}")
    print(f"  heart rate  {report['hr_bpm'] or '-'} a minute")
    print(f"  beats       {len(report['r_peaks_s'])} R peaks, {len(report['ed_frames'])} ED frames")
    print(f"  |ED - R|    {report['ed_error_ms'] or '-'} ms, median")
    print(f"  EF          {ef}")


def main():
    """From the flags to the files."""
    config = parse_flags(SampleConfig)
    # A seed gives the same video on both, but for rounding.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # TF32 for the matrix products that stay in float32
        torch.set_float32_matmul_precision("high")

    # ---- models, and whether the flags fit them
    models = load_models(config.weights, device)
    tokenizer, encoder, generator = models
    condition = generator.config.condition
    check_condition(config, condition)
    if config.fps <= 0:
        raise UserError(f"--fps={config.fps:g}: must be above 0")

    # Seconds of ECG that a window sees. Without an ECG any length will do.
    span = config.frames / config.fps + 1
    if condition == "ecg":
        span = encoder.config.samples / ECG_HZ
    check_flags(config, tokenizer, generator, span)
    segmenter = load_unet(config, tokenizer, condition, device)

    # ---- ECGs and the first frame. A model without an ECG gets a flat one, which it does not read.
    source = config
    if condition != "ecg":
        source = replace(config, ecg="flat")
    num_traces = config.num
    if config.ecg:
        num_traces = 1
    traces = [load_trace(source, span + 1, config.seed + i) for i in range(num_traces)]
    first = None
    if config.image:
        first = load_image(config.image, tokenizer.config.size, tokenizer.config.channels)
        first = first.to(device)

    # ---- names of the files
    stem = Path(config.ecg or "sample").stem
    names = [stem]
    if config.num > 1:
        names = [f"{stem}_{i}" for i in range(config.num)]
    check_files(config, names)
    # Said before the work begins, not after it.
    if not find_spec("imageio_ffmpeg"):
        print("no .mp4 is written: pip install imageio-ffmpeg", file=sys.stderr)

    # ---- videos
    try:
        reports = make_all(config, models, segmenter, traces, first, names)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {config.out}: {reason}") from None
    for report in reports:
        show(config.out, report)


if __name__ == "__main__":
    run_main(main)
