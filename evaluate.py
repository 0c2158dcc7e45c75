"""Measure a trained model on a prepared set: reconstruction, EF, synchrony with the ECG, speed.

    python evaluate.py reconstruction --data=datasets/phantom --weights=runs/demo  # paper's Table 1
    python evaluate.py generation --inception=F --i3d=F --vgg=F --weights=runs/demo     # Table 2
    python evaluate.py ef --data=datasets/phantom --weights=runs/demo                   # Table 3
    python evaluate.py tables --data=datasets/NAME --weights=runs/NAME  # all three: OUT/tables.md
    python evaluate.py sync --data=datasets/phantom --weights=runs/demo --num=64  # follows the ECG?
    python evaluate.py figure --ecg=watch.csv           # Fig. 3: OUT/figure.png and OUT/figure.gif
    python evaluate.py segmenter --data=datasets/NAME --segmenter=runs/NAME     # Dice and EF
    python evaluate.py drift --weights=runs/demo --frames=2000                  # a long video
    python evaluate.py speed --weights=runs/demo    # seconds and FLOPs of sampling and training
    python evaluate.py speed --preset=paper         # the same at the paper's sizes, random weights

Each mode prints a table and writes OUT/eval_MODE.json. --target_KEY=x (such as --target_ssim=.8)
makes a metric a check: exit code 1 where it is farther from its best value than x is. Areas and
volumes come from the U-Net of metrics/lv_segmenter.py, applied alike to true and generated video.
Units: pixels, pixel^3, EF in points.
"""
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import COMMIT, check_folder, load_weights
from common.flags import UserError, check_least, parse_flags, parse_value, run_main
from common.picture import SCROLL_S
from common.training import init_distributed
from data.dataset import ECG_HZ, LEADS, Clips, as_video, choose_clips
from data.ecg_signal import clean_ecg
from data.ecgsyn import make_ecg
from generator import DecodingConfig, check_decoding, load_models, stream_video
from metrics.clip_ecg import AlignedEcg, aligned_ecg, pick_leads, r_peaks_of
from metrics.ejection_fraction import ef_scores, measure_masks, median_or_nan
from metrics.frechet import KINDS, Detector, Features, frechet, kernel_distance
from metrics.image_quality import edge_energy, frame_scores, rate_distortion_bound, ssim
from metrics.lv_segmenter import is_traced, load_segmenter, measure_segmenter, segment
from metrics.paper_figure import (DONOR, GIF_TITLES, TRUE, figure_traces, write_gif,
                                  write_png)
from metrics.paper_tables import markdown
from metrics.speed import KEYS, PARTS, paper_models
from metrics.speed import measure_speed as measure_models
from metrics.synchrony import (SHIFT_S, Record, beat_metrics, diversity, ef_metrics, flat_metrics,
                               hidden_metrics, in_middle, own_metrics, shift_metrics, swap_metrics)
from tokenizer import Tokenizer, TokenizerConfig, codebook_usage, index_counts, patchify


@dataclass
class EvalConfig(DecodingConfig):
    """The flags of all modes, those of decoding among them."""
    data: str = "datasets/phantom"  # prepared data set
    weights: str = "weights"        # folder with the trained weights
    out: str = "out"                # folder for eval_MODE.json
    segmenter: str = ""             # another than the weights': a folder, or a TorchScript file
    split: str = "test"             # split that is measured
    num: int = 0                    # clips, drawn by --seed; 0 = all (drift: 8, speed: 1 video)
    frames: int = 64                # frames of a clip, from its first one on
    first: bool = True              # its first frame is given; 0 = the ECG alone
    conditions: str = "shifted,flat,swapped,hidden"     # sync: what is done to the ECG
    leads: str = ""                 # leads of the set by name, such as II or I,V2; empty = all
    ecg: str = ""                   # figure: a recording for the last row of the PNG
    ecg_hz: float = 0               # its samples a second, where the file does not say
    ecg_leads: str = ""             # its leads, such as II or I,V2; they win over the file's
    inception: str = ""             # generation: NVIDIA's TorchScript detector for FID and KID
    i3d: str = ""                   # the same for FVD
    vgg: str = ""                   # the same for LPIPS
    preset: str = "demo"            # speed: demo = --weights, paper = random, of the paper's sizes
    train_batch: int = 1            # speed: clips of one step of a training
    bf16: bool = True               # speed: bfloat16 where the device is fast in it; 0 = float32
    batch: int = 16                 # clips or windows at a time
    seed: int = 0                   # of the choice of clips and of the generated videos


# ------------------------------------------------------------------- the metrics of each mode

BEATS = ["ed_error_ms_median", "ed_error_ms_p95", "beat_recall", "false_beats"]
EF = ["ef_r2", "ef_mae", "ef_rmse"]
# The video that is generated under a clip's own ECG, against the true one and the set's own values.
OWN = ["area_r_median", "area_r_mean", "area_r_traced_median", "area_r_traced_mean",
       *BEATS, "amplitude", "drift", *EF, *[f"{key}_true" for key in EF]]

# The keys of each mode, in the order in which they are printed. docs/metrics.md defines each.
METRICS = {
    "reconstruction": ["mse", "mae", "psnr", "ssim", "sharpness", "codes_used",
                       "codebook_perplexity", "sector_perplexity", "rd_bound_mse", "windows",
                       "clips"],
    "generation": ["ssim", "lpips", "fid", "kid", "fvd", "clips", "frames_compared"],
    "ef": [*OWN, *[f"{key}_decoded" for key in EF], "diversity", "clips", "clips_excluded"],
    "sync": [*OWN, "ed_error_ms_median_video", "beat_recall_video", "shift_ms",
             "flat_amplitude", "flat_amplitude_settled", "flat_drift",
             "swap_follows_donor", "swap_r_donor", "swap_r_own",
             "hidden_r_visible", "hidden_r_unseen", "hidden_amplitude", "clips", "clips_excluded"],
    "segmenter": ["dice", *EF, "clips"],
    "drift": ["grey", "contrast", "area", *[f"{key}_first" for key in BEATS],
              *[f"{key}_last" for key in BEATS], "clips"],
    "figure": ["rows", "frames"],
    "speed": KEYS,
}

# How --target_KEY=x reads. A metric passes if it is as near to its best value as x, or nearer.
# That value is 0 for each key that is not here, so that x is an upper bound.
BEST_VALUE = {
    # The larger, the better: x is a lower bound.
    **dict.fromkeys(["psnr", "codes_used", "codebook_perplexity", "sector_perplexity", "windows",
                     "clips", "matmul_gflop_per_s", "tokens_per_s", "train_clips_per_s",
                     "train_tokenizer_clips_per_s"], math.inf),
    # Correlations, shares, and ratios to the true video or to a machine's peak: best at 1.
    **dict.fromkeys(["dice", "ssim", "sharpness", "ef_r2", "ef_r2_true", "ef_r2_decoded",
                     "area_r_median", "area_r_mean", "area_r_traced_median", "area_r_traced_mean",
                     "beat_recall", "beat_recall_video", "amplitude", "drift", "diversity",
                     "flat_drift", "swap_follows_donor", "swap_r_donor",
                     "hidden_r_visible", "hidden_r_unseen", "hidden_amplitude",
                     "grey", "contrast", "area", "beat_recall_first", "beat_recall_last",
                     "mfu", "mfu_tokenizer",
                     *[f"{part}_share_of_matmul" for part in (*PARTS, "forward")]], 1),
    # The lag of the heart should be that of the ECG.
    "shift_ms": 200,
}
# Second names under which the JSON and --target_ know a key.
ALIASES = {"beats_found": "beat_recall", "extra_beats": "false_beats",
           "flat_swing": "flat_amplitude"}


# ------------------------------------------------------------------------- reading the set

def windows(clips, numbers, frames, channels):
    """Each clip cut into consecutive windows: yields (windows, channels, frames, H, W)."""
    # Whole windows only: what is left at the end of a clip is not used.
    lengths = {i: clips[i]["frames"] // frames for i in numbers}
    if not any(lengths.values()):
        raise UserError(f"no clip of the set has the {frames} frames of one window")
    for i in tqdm([i for i in numbers if lengths[i]], desc="windows"):
        whole = clips.per_frame("video", i, 0, lengths[i] * frames)
        video = as_video(whole, channels)                                   # C n*frames H W
        yield video.unflatten(1, (-1, frames)).transpose(0, 1)              # n C frames H W


def group_clips(clips, config):
    """Clips that one call can generate: yields fps, frames, their numbers, and a donor for each.

    They have one frame rate and length. The donor of a clip, for "swapped", is the next one.
    """
    # stream_video has one frame rate and one length a batch, so that clips are sorted by both.
    alike = defaultdict(list)
    for i in choose_clips(clips, config.num, config.seed):
        frames = min(clips[i]["frames"], config.frames)
        alike[clips[i]["fps"], frames].append(i)
    for (fps, frames), numbers in alike.items():
        donors = numbers[1:] + numbers[:1]
        for at in range(0, len(numbers), config.batch):
            yield fps, frames, numbers[at:at + config.batch], donors[at:at + config.batch]


# ------------------------------------------------------------------- mode reconstruction: Table 1

BOUND_CLIPS = 256   # clips of the train split that give the patch covariance
PICTURE_CLIPS = 8   # clips that eval_reconstruction.png shows


def patch_covariance(videos, p_t, p):
    """Covariance of all p_t x p x p patches after the first frame of videos (B, C, T+1, H, W)."""
    # Sums alone are kept, in float64: all patches of a set would not fit the memory.
    total = 0
    outer = 0
    many = 0
    for video in videos:
        x = patchify(video[:, :, 1:], p_t, p).flatten(0, 2).double()                # N C*p_t*p*p
        total = total + x.sum(0)
        outer = outer + x.T @ x
        many += len(x)
    return (outer / many - torch.outer(total, total) / many ** 2).numpy()


def in_sector(video, index, p):
    """Which tokens (B, T', h, w) are not black in all of their window (B, C, T, H, W); bool."""
    brightest = video.amax((1, 2))[:, None]                                         # B 1 H W
    return (F.max_pool2d(brightest, p) > 0.05).expand_as(index)                     # B T' h w


def as_frames(video):
    """Video (B, C, T, H, W) -> its frames (B T, C, H, W)."""
    return video.transpose(1, 2).flatten(0, 1)


def train_covariance(config, c):
    """patch_covariance of some clips of the train split; c: the TokenizerConfig."""
    train = Clips(config.data, "train")
    numbers = choose_clips(train, BOUND_CLIPS, config.seed)
    return patch_covariance(windows(train, numbers, c.frames, c.channels), c.patch_t, c.patch)


def write_pairs(out, pairs):
    """OUT/eval_reconstruction.png: frames above their reconstructions (C, 2H, W), side by side."""
    row = torch.cat(pairs, dim=2).expand(3, -1, -1).permute(1, 2, 0)                # 2H n*W 3
    out.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(out / "eval_reconstruction.png", (row * 255).byte().numpy())


@torch.no_grad()
def measure_reconstruction(config, device):
    """Consecutive windows through the tokenizer: means over frames, and the codes of all tokens.

    Writes OUT/eval_reconstruction.png: frames of some clips above their reconstructions.
    """
    tokenizer = load_weights(config.weights, "tokenizer", Tokenizer, TokenizerConfig)
    tokenizer = tokenizer.eval().to(device)
    c = tokenizer.config
    clips = Clips(config.data, config.split)
    numbers = choose_clips(clips, config.num, config.seed)
    # What no tokenizer of so many bits can fall below, if patches were Gaussian and independent.
    bound = rate_distortion_bound(train_covariance(config, c), c.bits)

    scores, pictures, edges = [], [], 0
    used = torch.zeros(2 ** c.bits)
    used_in_sector = torch.zeros(2 ** c.bits)
    for whole in windows(clips, numbers, c.frames, c.channels):
        for video in whole.to(device).split(config.batch):                          # B C T H W
            index = tokenizer.encode(video)                                         # B T' h w
            used += index_counts(index, c.bits).cpu()
            # Outside of the ultrasound's sector all is black, and a few codes are enough.
            lit = index[in_sector(video, index, c.patch)]                           # N
            used_in_sector += index_counts(lit, c.bits).cpu()
            x = as_frames(video)                                                    # BT C H W
            y = as_frames(tokenizer.decode(index))                                  # BT C H W
            scores.append(frame_scores(x, y).cpu())
            edges = edges + torch.stack([edge_energy(x), edge_energy(y)])
        # For the picture: the middle frame of the last window, above its reconstruction.
        middle = c.frames // 2
        pictures.append(torch.cat([x[middle], y[middle]], dim=1).cpu())             # C 2H W
    write_pairs(Path(config.out), pictures[:PICTURE_CLIPS])

    scores = torch.cat(scores, dim=1)                                               # 4 frames
    mse, mae, psnr, similarity = scores.mean(1).tolist()
    codes = codebook_usage(used)
    return {
        "mse": mse, "mae": mae, "psnr": psnr, "ssim": similarity,
        "sharpness": (edges[1] / edges[0]).item(),
        "codes_used": codes["codes"], "codebook_perplexity": codes["perplexity"],
        "sector_perplexity": codebook_usage(used_in_sector)["perplexity"],
        "rd_bound_mse": bound,
        "windows": scores.shape[1] // c.frames, "clips": len(numbers),
    }


# --------------------------------------------------- clips, generated under one or several ECGs

@dataclass
class Batch:
    """Clips that were generated together."""
    numbers: list       # of the clips
    donors: list        # for each, the clip whose ECG it gets under "swapped"
    fps: float          # of all of them
    videos: dict        # {"true" or the name of a condition: (B, C, T, H, W) in [0, 1]}


def load_checked(config, device, allowed=("ecg",)):
    """Tokenizer, encoder and generator of --weights, whose condition must be an allowed one."""
    tokenizer, encoder, generator = load_models(config.weights, device)
    if generator.config.condition not in allowed:
        raise UserError("this generator was trained without an ECG: there is no beat to follow")
    check_decoding(config, generator.config, tokenizer.config)
    return tokenizer, encoder, generator


def load_lv(config, channels, device):
    """The U-Net of --segmenter, or else of --weights."""
    return load_segmenter(config.segmenter or config.weights, channels).to(device)


def ecg_margin(encoder):
    """Seconds of ECG to read before and after a video, so that each window has all of its own."""
    return encoder.config.samples / ECG_HZ


def whole_video(chunks):
    """The chunks (B, C, n, H, W) of a video as one (B, C, T, H, W), on the CPU."""
    return torch.cat([chunk.cpu() for chunk in chunks], dim=2)


def check_rate(config, tokenizer, encoder, fps):
    """UserError where a window of frames at fps lasts longer than the ECG that the encoder sees."""
    window = tokenizer.config.frames / fps
    span = encoder.config.samples / ECG_HZ
    if window > span:
        raise UserError(f"{config.data}: a window lasts {window:.4g} s at {fps:g} frames a second, "
                        f"the ECG encoder sees {span:g} s")


def decode_again(tokenizer, video):
    """video (B, C, T, H, W) encoded and decoded by windows: yields chunks (B, C, n, H, W)."""
    window = tokenizer.config.frames
    T = video.shape[2]
    for at in range(0, T, window):
        # The last window ends with the video, and overlaps the one before.
        begin = max(0, min(at, T - window))
        decoded = tokenizer.decode(tokenizer.encode(video[:, :, begin:begin + window]))
        yield decoded[:, :, at - begin:]


class Inputs(NamedTuple):
    """What a batch of clips gives the generator."""
    own: AlignedEcg     # the clips' own ECGs
    other: AlignedEcg   # those of their donors
    leads: list         # L indices into LEADS
    margin: float       # seconds of ECG before the first frame and after the last
    text: list | None   # B lines, for a text generator


def read_inputs(clips, group, encoder, picked):
    """Inputs of a group of clips (fps, frames, numbers, donors).

    encoder: None without an ECG; picked: indices into the set's leads.
    """
    fps, frames, numbers, donors = group
    # A text generator has no ECG. A blank one gives stream_video the batch size.
    if encoder is None:
        zeros = np.zeros((len(numbers), 1))
        blank = AlignedEcg(zeros[:, None], zeros > 0)
        return Inputs(blank, blank, [], 0, [clips[i]["text"] for i in numbers])
    leads = [LEADS.index(clips.leads[k]) for k in picked]
    margin = ecg_margin(encoder)
    end = frames / fps + margin
    own = aligned_ecg(clips, numbers, picked, -margin, end)
    other = aligned_ecg(clips, donors, picked, -margin, end)
    return Inputs(own, other, leads, margin, None)


def generate_conditions(config, models, inputs, true, *, fps, seed, conditions):
    """The videos of a batch under each condition: {name: (B, C, T, H, W)}; true (B, C, T, H, W).

    All start from the same seed and the same first frame: nothing differs but what is listed here.
    """
    tokenizer, _, generator = models
    device = next(generator.parameters()).device
    frames = true.shape[2]
    own = inputs.own
    instants = np.arange(own.ecg.shape[-1]) / ECG_HZ - inputs.margin                # N
    # What each condition changes. Under "own", and where a table lacks a name, nothing is changed.
    flat = AlignedEcg(np.zeros_like(own.ecg), np.zeros_like(own.disturbed))
    ecgs = {"flat": flat, "swapped": inputs.other}
    start = {"shifted": SHIFT_S - inputs.margin}
    hidden = {"hidden": in_middle(instants, frames / fps)}
    seeds = {"again": seed + 1000}

    first = true[:, :, :1].to(device) if config.first else None
    videos = {}
    for name in conditions:
        if name == "decoded":
            videos[name] = whole_video(decode_again(tokenizer, true.to(device)))
            continue
        in_span = hidden.get(name, np.zeros(len(instants), bool))                   # N
        given = ecgs.get(name, own)
        chunks = stream_video(
            *models, ecg=given.ecg, leads=inputs.leads, hidden=in_span | given.disturbed,
            ecg_start=start.get(name, -inputs.margin), text=inputs.text, first=first,
            frames=frames, fps=fps, seed=seeds.get(name, seed), decoding=config)
        videos[name] = whole_video(chunks)
    return videos


def generate_batches(config, device, clips, conditions, allowed=("ecg", "text")):
    """Generate the clips under each of the conditions: yields a Batch at a time.

    "own": the clip's own ECG; "again": the same with another seed, in the first batch alone;
    "shifted", "flat", "swapped", "hidden": see metrics/synchrony.py; "decoded": the true video
    through the tokenizer alone.
    """
    # A text generator is measured like any other, where the mode allows it.
    models = load_checked(config, device, allowed)
    by_ecg = models[2].config.condition == "ecg"
    if not by_ecg and "text" not in clips[0]:
        raise UserError(f"{config.data}: the clips of the set have no text")
    encoder = None
    picked = []
    if by_ecg:
        encoder = models[1]
        picked = pick_leads(clips, config.leads)
    groups = list(group_clips(clips, config))
    for fps, *_ in groups:
        if by_ecg:
            check_rate(config, models[0], encoder, fps)
    for k, group in enumerate(tqdm(groups, desc="batches")):
        fps, frames, numbers, donors = group
        inputs = read_inputs(clips, group, encoder, picked)
        true = [as_video(clips.per_frame("video", i, 0, frames)) for i in numbers]
        true = torch.stack(true)                                                    # B C T H W
        # A second video of some clips is enough for diversity.
        names = [name for name in conditions if name != "again" or k == 0]
        videos = generate_conditions(config, models, inputs, true, fps=fps,
                                     seed=config.seed + numbers[0], conditions=names)
        yield Batch(numbers, donors, fps, {"true": true, **videos})


def measure_batch(clips, batch, segmenter):
    """A Record (metrics/synchrony.py) of each clip of a Batch."""
    masks = {name: segment(segmenter, video) for name, video in batch.videos.items()}   # B T H W
    for b, i in enumerate(batch.numbers):
        area, cycle, video = {}, {}, {}
        for name in batch.videos:
            area[name], cycle[name] = measure_masks(masks[name][b], batch.fps)
        # The set's own masks count where every frame has one.
        if clips.has("mask", i):
            traced = clips.per_frame("mask", i, 0, len(area["true"]))               # T H W
            if is_traced(traced).all():
                area["traced"] = traced.sum((1, 2), dtype=float)
        # Videos are kept only where diversity is measured: they take memory.
        if "again" in batch.videos:
            video = {name: videos[b] for name, videos in batch.videos.items()}
        r_peaks = r_peaks_of(clips, i) if clips.leads else np.array([])
        yield Record(area=area, cycle=cycle, r_peaks=r_peaks, fps=batch.fps, clip=i,
                     donor=batch.donors[b], ef=clips[i]["ef"], video=video)


def measure_clips(config, device, conditions, allowed=("ecg", "text")):
    """Records of the clips, generated under the conditions, and {"clips", "clips_excluded"}.

    A clip whose true video shows no beats (a pause, a flat ECG) has no ED, no EF and no
    correlation: it is left out.
    """
    clips = Clips(config.data, config.split)
    segmenter = load_lv(config, clips.meta["channels"], device)
    # Only records are kept, not the videos: memory does not grow with the set.
    records = []
    for batch in generate_batches(config, device, clips, conditions, allowed):
        records += measure_batch(clips, batch, segmenter)
    beating = [r for r in records if r.cycle["true"]["ef"] is not None]
    return beating, {"clips": len(records), "clips_excluded": len(records) - len(beating)}


# ------------------------------------------------------------------- mode generation: Table 2

def measure_generation(config, device):
    """SSIM and LPIPS against the true frames, FID and KID of all frames, FVD of all videos.

    A metric whose detector is not given is not computed.
    """
    # Load the detectors first: a wrong path should end the run before videos are generated.
    detectors = {kind: Detector(getattr(config, kind), kind, device)
                 for kind in KINDS if getattr(config, kind)}
    clips = Clips(config.data, config.split)
    # Of the true and of the generated ones. FVD has one feature a video, the others one a frame.
    frame_features = [Features(), Features()]
    video_features = [Features(), Features()]
    similarity, distance, num_clips = [], [], 0
    for batch in generate_batches(config, device, clips, ["own"]):
        num_clips += len(batch.numbers)
        videos = [batch.videos["true"], batch.videos["own"]]                        # B C T H W
        frames = [as_frames(video) for video in videos]                             # BT C H W

        # Each generated frame against the true frame of the same time.
        similarity += ssim(*frames).tolist()

        # Distributions: sums over all batches, from which the distances are computed at the end.
        if "inception" in detectors:
            for features, x in zip(frame_features, frames):
                features.add(detectors["inception"](x))
        if "i3d" in detectors:
            for features, x in zip(video_features, videos):
                features.add(detectors["i3d"](x))
        if "vgg" in detectors:
            difference = detectors["vgg"](frames[0]) - detectors["vgg"](frames[1])  # BT K
            distance += difference.square().sum(1).tolist()
    return {
        "ssim": median_or_nan(similarity, np.mean),
        "lpips": median_or_nan(distance, np.mean),
        "fid": frechet(*frame_features),
        "kid": kernel_distance(*frame_features),
        "fvd": frechet(*video_features),
        "clips": num_clips,
        "frames_compared": len(similarity),
    }


# ------------------------------------------------------------------- mode ef: Table 3

def measure_ef(config, device):
    """EF, beats and area of the generated video; EF through the tokenizer alone, its bound."""
    records, counts = measure_clips(config, device, ["own", "decoded", "again"])
    # No generator can be more exact in EF than the tokenizer lets through.
    decoded = [r.cycle["decoded"]["ef"] for r in records]
    true = [r.cycle["true"]["ef"] for r in records]
    return {
        **ef_metrics(records),
        **ef_scores(decoded, true, "_decoded"),
        **own_metrics(records),
        **counts,
        "diversity": diversity(records),
    }


# ------------------------------------------------------------------- mode sync

CONDITION_METRICS = {"shifted": shift_metrics, "flat": flat_metrics, "swapped": swap_metrics,
                     "hidden": hidden_metrics}


def measure_sync(config, device):
    """Does the heart follow the ECG: its own, a later, a flat, another clip's, a hidden one?"""
    names = config.conditions.split(",") if config.conditions else []
    if set(names) - set(CONDITION_METRICS):
        raise UserError(f"--conditions={config.conditions}: "
                        f"a list of {', '.join(CONDITION_METRICS)}")
    # Under its own ECG a clip should beat as its true video does.
    records, counts = measure_clips(config, device, ["own", *names], allowed=("ecg",))
    metrics = {**own_metrics(records), **ef_metrics(records), **counts}
    # The true video by the same measure: what the segmenter and the frame rate allow at best.
    video = beat_metrics(records, "true")
    metrics["ed_error_ms_median_video"] = video["ed_error_ms_median"]
    metrics["beat_recall_video"] = video["beat_recall"]
    # Under another ECG its heart should follow that ECG.
    for name in names:
        metrics |= CONDITION_METRICS[name](records)
    return metrics


# ------------------------------------------------------------------- mode segmenter

def measure_lv(config, device):
    """Dice and EF of the segmenter on the set's own masks."""
    clips = Clips(config.data, config.split)
    model = load_lv(config, clips.meta["channels"], device)
    return measure_segmenter(model, clips, choose_clips(clips, config.num, config.seed))


# ------------------------------------------------------------------- mode figure: Fig. 3

@torch.no_grad()
def draw_figure(config, device):
    """OUT/figure.png and OUT/figure.gif: a clip, and its first frame under several ECGs.

    These are its own ECG, a flat one, its own SHIFT_S later, --ecg's (PNG) and another clip's
    (GIF).
    """
    models = load_checked(config, device)
    clips = Clips(config.data, config.split)
    i = choose_clips(clips, 1, config.seed)[0]
    fps = clips[i]["fps"]
    check_rate(config, models[0], models[1], fps)
    frames = min(clips[i]["frames"], config.frames)
    # The clip itself is the first row, its first frame the start of all others.
    true = as_video(clips.per_frame("video", i, 0, frames))[None]                   # 1 C T H W
    first = true[:, :, :1].to(device) if config.first else None
    traces = figure_traces(config, clips, i, seconds=frames / fps, margin=ecg_margin(models[1]))

    # The seed is the same in all rows: nothing differs but the ECG.
    videos = {}
    for title, trace in tqdm(traces.items(), desc="rows"):
        chunks = [true]
        if title != TRUE:
            leads = [LEADS.index(name) for name in trace.leads]
            chunks = stream_video(*models, ecg=trace.ecg[None], hidden=trace.disturbed,
                                  leads=leads, ecg_start=trace.start, frames=frames, fps=fps,
                                  first=first, seed=config.seed, decoding=config)
        videos[title] = whole_video(chunks)[0]                                      # C T H W

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = {title: video for title, video in videos.items() if title != DONOR}
    write_png(out / "figure.png", rows, traces, fps=fps, shown=min(frames / fps, SCROLL_S))
    titles = {name: title for name, title in GIF_TITLES.items() if name in videos}
    write_gif(out / "figure.gif", videos, traces, fps=fps, titles=titles)
    return {"rows": len(rows), "frames": frames}


# ------------------------------------------------- modes drift and speed: videos of built-in ECGs

ENDS_S = 10         # seconds at the start and at the end of a long video that are compared
FPS = 25            # frames a second of these videos


def built_in(config, margin, many):
    """`many` built-in ECGs (data/ecgsyn.py), and stream_video's arguments for a video of each."""
    # Each has another seed, heart rate and morphology.
    seconds = config.frames / FPS + 2 * margin
    traces = [make_ecg(config.seed + i, seconds, -margin) for i in range(many)]
    ecg = np.stack([clean_ecg(trace.ecg.T) for trace in traces])                    # B L N
    arguments = dict(ecg=ecg, leads=range(len(LEADS)), ecg_start=-margin, frames=config.frames,
                     fps=FPS, seed=config.seed, decoding=config)
    return traces, arguments


def measure_end(video, traces, segmenter, begin):
    """A part of some videos, (B, C, n, H, W) uint8 from frame `begin` on -> its Records and levels.

    The levels (B, 3): mean grey, contrast (standard deviation over a frame), mean LV area.
    """
    records = []
    levels = []
    for clip, trace in zip(video, traces):
        frames = clip[None].float() / 255                                           # 1 C n H W
        area, cycle = measure_masks(segment(segmenter, frames)[0], FPS)
        r_peaks = trace.r_peaks - begin / FPS
        records.append(Record(area={"own": area}, cycle={"own": cycle}, r_peaks=r_peaks, fps=FPS))
        levels.append([frames.mean(), frames.std((1, 3, 4)).mean(), area.mean()])
    return records, np.array(levels)


@torch.no_grad()
def measure_drift(config, device):
    """Does a video of --frames, from a built-in ECG alone, end as it began? --num of them (0 = 8).

    grey, contrast, area: the level of the last ENDS_S seconds over that of the first, the median
    over the videos. Beats are measured in both.
    """
    models = load_checked(config, device)
    segmenter = load_lv(config, models[0].config.channels, device)
    traces, arguments = built_in(config, ecg_margin(models[1]), config.num or 8)
    # As bytes: a long video as floats would fill the memory.
    chunks = tqdm(stream_video(*models, **arguments), desc="windows")
    video = whole_video((255 * chunk).byte() for chunk in chunks)                   # B C T H W

    # The two ends do not overlap in a short video.
    n = min(ENDS_S * FPS, config.frames // 2)
    begin = config.frames - n
    records_first, first = measure_end(video[:, :, :n], traces, segmenter, 0)
    records_last, last = measure_end(video[:, :, begin:], traces, segmenter, begin)
    metrics = dict(zip(("grey", "contrast", "area"), np.median(last / first, axis=0).tolist()))
    for end, records in (("first", records_first), ("last", records_last)):
        for key, value in beat_metrics(records, "own").items():
            metrics[f"{key}_{end}"] = value
    return metrics | {"clips": len(traces)}


def measure_speed(config, device):
    """Seconds, FLOPs and memory of sampling and training, see metrics/speed.py.

    The video has --frames from a built-in ECG alone, --num at a time (0 = 1).
    """
    if config.preset not in ("demo", "paper"):
        raise UserError(f"--preset={config.preset}: choose one of demo, paper")
    check_least(config, dict(train_batch=1))
    if config.preset == "paper":
        models = paper_models(device)
        check_decoding(config, models[2].config, models[0].config)
    else:
        models = load_checked(config, device)
    _, arguments = built_in(config, ecg_margin(models[1]), config.num or 1)
    return measure_models(config, models, arguments, device)


# ------------------------------------------------------------------------- command line

MODES = {"reconstruction": measure_reconstruction, "generation": measure_generation,
         "ef": measure_ef, "sync": measure_sync, "segmenter": measure_lv, "drift": measure_drift,
         "figure": draw_figure, "speed": measure_speed}
TABLES = ["reconstruction", "generation", "ef"]     # the modes that mode "tables" runs
DETECTOR = {"fid": "inception", "kid": "inception", "fvd": "i3d", "lpips": "vgg"}


def split_targets(argv, keys):
    """Arguments -> ({key: x} of every --target_KEY=x, the other arguments)."""
    # They are not fields of EvalConfig: each mode has its own.
    targets = {}
    others = []
    for arg in argv:
        if not arg.startswith("--target_"):
            others.append(arg)
            continue
        key, _, text = arg.removeprefix("--target_").partition("=")
        key = ALIASES.get(key, key)
        if key not in keys:
            raise UserError(f"{arg}: this mode has no such metric; it has {' '.join(keys)}")
        targets[key] = parse_value(f"target_{key}", text, float)
    return targets, others


def falls_short(key, value, target):
    """Whether a metric is farther from its best value than the target is, or was not computed."""
    if value is None:
        return True
    best = BEST_VALUE.get(key, 0)
    # Infinity is best: no distance to it can be computed, so the values are compared themselves.
    if best == math.inf:
        return value < target
    return abs(value - best) > abs(target - best)


def rounded(value):
    """A number for the JSON: six digits, or whole; None for nan."""
    if math.isnan(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def print_metric(key, value, targets):
    """One line of a mode's table."""
    if value is not None:
        shown = f"{value:12.5g}"
    elif key in DETECTOR:
        shown = f"not computed (pass --{DETECTOR[key]}=...)"
    else:
        shown = f"{'-':>12}"
    target = f"   target {targets[key]:g}" if key in targets else ""
    print(f"  {key:<26}{shown}{target}")


def report(mode, config, device, targets):
    """Measure one mode, print its table, write OUT/eval_MODE.json; returns what it wrote."""
    began = time.time()
    # Each mode returns {key: number}; nan is a number that could not be computed.
    measured = MODES[mode](config, device)
    # All keys of the mode are there, also where a flag left some out: a reader finds null.
    metrics = {key: rounded(measured.get(key, math.nan)) for key in METRICS[mode]}
    for key, value in metrics.items():
        print_metric(key, value, targets)
    # The JSON has the settings too, so that a number can be traced to its run.
    content = asdict(config) | metrics
    content |= {alias: metrics[key] for alias, key in ALIASES.items() if key in metrics}
    content["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    content["commit"] = COMMIT
    content["seconds"] = round(time.time() - began, 1)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    path = Path(config.out) / f"eval_{mode}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def write_tables(config, reports):
    """OUT/tables.md from the reports of the modes of TABLES."""
    about = (f"{config.data} ({config.split}), weights {config.weights}, {reports[0]['device']}, "
             f"seed {config.seed}, commit {COMMIT}")
    (Path(config.out) / "tables.md").write_text(markdown(reports, about))
    print(f"{config.out}/tables.md")


def main():
    """Run the mode that the first argument names; exit code 1 where a target is missed."""
    # ---- config
    mode, *argv = sys.argv[1:] or [""]
    if {"--help", "-h"} & {mode, *argv}:
        parse_flags(EvalConfig, argv=["--help"])
    if mode not in (*MODES, "tables"):
        raise UserError(f"the first argument is the mode, one of {' '.join(MODES)} tables; "
                        f"not {mode!r}")
    modes = TABLES if mode == "tables" else [mode]
    keys = [key for name in modes for key in METRICS[name]]
    targets, argv = split_targets(argv, keys)
    config = parse_flags(EvalConfig, argv=argv)
    check_least(config, dict(batch=1, frames=2, num=0))

    # ---- measure; a folder that cannot be written is refused before the work, not after it
    check_folder(config.out)
    device = init_distributed(config.seed)[0]
    reports = [report(name, config, device, targets) for name in modes]
    if mode == "tables":
        write_tables(config, reports)

    # ---- compare with the targets
    missed = False
    for name, content in zip(modes, reports):
        for key in METRICS[name]:
            if key in targets and falls_short(key, content[key], targets[key]):
                print(f"{key} = {content[key]} misses the target {targets[key]:g}", file=sys.stderr)
                missed = True
    return int(missed)


if __name__ == "__main__":
    run_main(main)
