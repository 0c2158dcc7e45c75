"""Measure a trained model on a prepared set: reconstruction, ejection fraction, synchrony with the ECG.

    python evaluate.py reconstruction --data=datasets/phantom --weights=runs/demo       # the paper's Table 1
    python evaluate.py ef --data=datasets/phantom --weights=runs/demo                   # its Table 3
    python evaluate.py generation --inception=F --i3d=F --vgg=F --weights=runs/demo     # its Table 2
    python evaluate.py tables --data=datasets/NAME --weights=runs/NAME      # all three as OUT/tables.md
    python evaluate.py figure --ecg=watch.csv                               # its Fig. 3 as OUT/figure.png
    python evaluate.py segmenter --data=datasets/NAME --segmenter=runs/NAME             # Dice and EF
    python evaluate.py sync --data=datasets/phantom --weights=runs/demo --num=64        # the synchrony test
    python evaluate.py drift --weights=runs/demo --frames=2000                          # a long video
    python evaluate.py speed --weights=runs/demo                            # seconds and FLOPs of a video

Prints a table and writes OUT/eval_MODE.json. --target_KEY=x (--target_ssim=.8, --target_shift_ms=160) makes a
figure a check: exit code 1 where it is farther from its best value than x is. Area and volume curves come
from the U-Net of metrics/lv_segmenter.py, applied alike to true and generated video. Units: pixels, pixel^3, EF points.
"""
import json
import math
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import COMMIT, load_weights
from common.flags import UserError, parse_flags, parse_value, run_main
from common.picture import SCROLL_S, draw_strip, film, strip_curve
from common.training import init_distributed
from data.dataset import ECG_HZ, LEADS, Clips, as_video, chosen, cut_ecg
from data.ecg_files import read_ecg
from data.ecg_signal import clean_ecg, find_r_peaks, go_on
from data.ecgsyn import make_ecg
from metrics.ejection_fraction import cardiac_cycle, disk_volume, ef_scores, middle, ratio
from metrics.frechet import KINDS, Detector, Features, frechet, kernel_distance
from metrics.image_quality import edge_energy, rate_distortion_bound, ssim
from metrics.lv_segmenter import is_traced, load_segmenter, measure_segmenter, segment
from metrics.paper_tables import markdown
from metrics.profiling import clock, flops, matmul_rate, measure_parts, peak_memory
from metrics.synchrony import (SHIFT_S, beat_figures, ef_figures, flat_figures, hidden_figures,
                               in_middle, own_figures, shift_figures, swap_figures)
from generator import ENCODERS, Generator, GeneratorConfig, check_fits, check_scorer, stream_video
from tokenizer import Tokenizer, TokenizerConfig, code_use, index_counts, parameter_count, patchify


@dataclass
class EvalConfig:
    data: str = "datasets/phantom"  # prepared data set
    weights: str = "weights"        # folder with the trained weights
    out: str = "out"                # folder for eval_MODE.json
    segmenter: str = ""             # another one than the weights': a folder, or a TorchScript file
    split: str = "test"             # split that is measured
    num: int = 0                    # clips, drawn by --seed; 0 = all of the split (drift 8, speed 1 video)
    frames: int = 64                # sync, ef: frames of a clip, from its first one on
    first: bool = True              # sync, ef: its first frame is given; 0 = from the ECG alone
    conditions: str = "shifted,flat,swapped,hidden"  # sync: what becomes of the ECG
    leads: str = ""                 # sync, ef: ECG leads by name, such as II or I,V2; empty = all of the set
    steps: int = 0                  # sync, ef: decoding steps; 0 = the usual
    scorer: str = "random"          # sync, ef: order of decoding: random, halton, confidence, critic
    guidance: float = 1.5           # sync, ef: scale of classifier-free guidance; 1 = off
    guidance_end: float = 0         # sync, ef: its scale at the last step, linear in between; 0 = the same
    temperature: float = 1.0        # sync, ef: of the draws
    overlap: int = 5                # sync, ef: frames that a window knows of the one before
    ecg: str = ""                   # figure: a recording for its last row
    ecg_hz: float = 0               # figure: its samples a second, where the file does not say
    inception: str = ""             # generation: NVIDIA's TorchScript detectors, for FID and KID,
    i3d: str = ""                   # for FVD,
    vgg: str = ""                   # and for LPIPS
    batch: int = 16                 # clips or windows at a time
    seed: int = 0                   # of the choice of clips and of the draws


# The figures of each mode; the best value of each, where it is not 0, gives its --target_KEY a direction
EF = "ef_r2 ef_mae ef_rmse ef_r2_true ef_mae_true ef_rmse_true"
EF_DECODED = "ef_r2_decoded ef_mae_decoded ef_rmse_decoded"
PARTS = "video", "tokenizer_encode", "tokenizer_decode", "encoder", "generator"     # timed by mode "speed"
COSTS = "seconds", "gflop", "share_of_matmul"
OWN = "area_r_median area_r_mean area_r_traced_median area_r_traced_mean ed_error_ms_median " \
      "ed_error_ms_p95 beats_found extra_beats swing drift"
FIGURES = {"reconstruction": "mse mae psnr ssim sharpness codes_used codebook_perplexity sector_perplexity "
                             "rd_bound_mse windows clips",
           "drift": "grey contrast area " + " ".join(f"{key}_{end}" for end in ("first", "last") for key in
                    ("ed_error_ms_median", "ed_error_ms_p95", "beats_found", "extra_beats")) + " clips",
           "segmenter": "dice ef_r2 ef_mae ef_rmse clips",
           "figure": "rows frames",
           "speed": " ".join(f"{part}_{key}" for part in PARTS for key in COSTS)
                    + " matmul_gflop_per_s parameters_m peak_memory_mb frames",
           "generation": "ssim lpips fid kid fvd clips frames_compared",
           "ef": f"{EF} {EF_DECODED} {OWN} diversity clips clips_excluded",
           "sync": f"{OWN} ed_error_ms_median_video beats_found_video shift_ms flat_swing flat_swing_settled "
                   "flat_drift swap_follows_donor swap_r_donor swap_r_own hidden_r_visible hidden_r_unseen "
                   f"hidden_swing {EF} clips clips_excluded"}
BEST = {"shift_ms": 200}
BEST |= dict.fromkeys("psnr codes_used codebook_perplexity sector_perplexity windows clips "
                      "matmul_gflop_per_s".split(), math.inf)
BEST |= dict.fromkeys("dice ssim sharpness ef_r2 ef_r2_true ef_r2_decoded area_r_median area_r_mean "
                      "area_r_traced_median area_r_traced_mean beats_found beats_found_video flat_drift "
                      "hidden_r_visible hidden_r_unseen hidden_swing swap_follows_donor swap_r_donor swing "
                      "drift diversity".split()
                      + [f"{part}_share_of_matmul" for part in PARTS], 1)


# ---------------------------------------------------------------------------- reading the set

def windows(clips, numbers, frames, channels):
    """Each clip cut into consecutive windows: yields (windows, channels, frames, H, W)."""
    lengths = {i: clips[i]["frames"] // frames for i in numbers}
    if not any(lengths.values()):
        raise UserError(f"no clip of the set has the {frames} frames of one window")
    for i in tqdm([i for i in numbers if lengths[i]], desc="windows"):
        video = as_video(clips.per_frame("video", i, 0, lengths[i] * frames), channels)     # C T H W
        yield video.unflatten(1, (-1, frames)).transpose(0, 1)


def r_peaks_of(clips, i):
    """R peaks of clip i in seconds after its first frame: the set's own, else found in its ECG."""
    known = clips[i].get("r_peaks_s")
    return np.array(re.findall(r"[-+.\de]+", known), float) if known \
        else find_r_peaks(clips.ecg(i)) + clips[i]["ecg_offset_s"]


def pick_leads(clips, names):
    """Indices into the set's leads of names such as "I,V2"; all of them for ""."""
    names = names.split(",") if names else clips.leads
    if not names or set(names) - set(clips.leads):
        raise UserError(f"--leads={','.join(names)}: the set has {' '.join(clips.leads) or 'none'}")
    return [clips.leads.index(name) for name in names]


def aligned_ecg(clips, numbers, leads, start, end):
    """Cleaned ECG (B, L, N) of several clips, from `start` to `end` seconds after the first frame of each."""
    first = [round((start - clips[i]["ecg_offset_s"]) * ECG_HZ) for i in numbers]
    return np.stack([cut_ecg(clean_ecg(clips.ecg(i, leads)), at, round((end - start) * ECG_HZ))
                     for i, at in zip(numbers, first)])


# ---------------------------------------------------------------------------- reconstruction

BOUND_CLIPS = 256   # clips of the train split that give the patch covariance


def patch_covariance(videos, p_t, p):
    """Covariance of all p_t x p x p patches after the first frame of videos (B, C, T+1, H, W)."""
    total, outer, many = 0, 0, 0
    for video in videos:
        x = patchify(video[:, :, 1:], p_t, p).flatten(0, 2).double()                        # N C*p_t*p*p
        total, outer, many = total + x.sum(0), outer + x.T @ x, many + len(x)
    return (outer / many - torch.outer(total, total) / many ** 2).numpy()


def in_sector(video, index, p):
    """Tokens (B, T', h, w) bool of places that are not black in all of their window (B, C, T, H, W)."""
    bright = F.max_pool2d(video.amax((1, 2))[:, None], p) > 0.05                            # B 1 h w
    return bright.expand_as(index)


@torch.no_grad()
def reconstruction(config, device):
    """Consecutive windows through the tokenizer; means over frames, codes of all tokens. Writes
    OUT/eval_reconstruction.png: frames of eight clips above their reconstructions."""
    tokenizer = load_weights(config.weights, "tokenizer", Tokenizer, TokenizerConfig).eval().to(device)
    c, clips, train = tokenizer.config, Clips(config.data, config.split), Clips(config.data, "train")
    numbers, scores, edges, picture = chosen(clips, config.num, config.seed), [], 0, []
    used, inside = torch.zeros(2, 2 ** c.bits)
    for whole in windows(clips, numbers, c.frames, c.channels):
        for video in whole.to(device).split(config.batch):
            index = tokenizer.encode(video)
            used += index_counts(index, c.bits).cpu()
            inside += index_counts(index[in_sector(video, index, c.patch)], c.bits).cpu()
            x, y = (v.transpose(1, 2).flatten(0, 1) for v in (video, tokenizer.decode(index)))  # BT C H W
            mse, mae = (x - y).square().mean((1, 2, 3)), (x - y).abs().mean((1, 2, 3))
            scores.append(torch.stack([mse, mae, -10 * mse.clamp(min=1e-10).log10(), ssim(x, y)]).cpu())
            edges = edges + torch.stack([edge_energy(x), edge_energy(y)])
        picture.append(torch.cat([x[c.frames // 2], y[c.frames // 2]], dim=1).cpu())        # C 2H W
    Path(config.out).mkdir(parents=True, exist_ok=True)
    rows = torch.cat(picture[:8], dim=2).expand(3, -1, -1).permute(1, 2, 0)
    imageio.imwrite(Path(config.out) / "eval_reconstruction.png", (rows * 255).byte().numpy())
    scores, codes = torch.cat(scores, dim=1), code_use(used)                                # 4 BT
    patches = windows(train, chosen(train, BOUND_CLIPS, config.seed), c.frames, c.channels)
    return {**dict(zip(("mse", "mae", "psnr", "ssim"), scores.mean(1).tolist())),
            "sharpness": (edges[1] / edges[0]).item(), "codes_used": codes["codes"],
            "codebook_perplexity": codes["perplexity"], "sector_perplexity": code_use(inside)["perplexity"],
            "rd_bound_mse": rate_distortion_bound(patch_covariance(patches, c.patch_t, c.patch), c.bits),
            "windows": scores.shape[1] // c.frames, "clips": len(numbers)}


# ---------------------------------------------------------------------------- generation under several ECGs

def load_models(folder, device, segmenter=""):
    """Tokenizer, ECG (or text) encoder, generator and segmenter of a weights folder, on the device; another
    segmenter if given. A generator of video alone has no encoder (None) and needs no segmenter."""
    load = lambda *part: load_weights(folder, *part).eval().to(device)                      # noqa: E731
    tokenizer = load("tokenizer", Tokenizer, TokenizerConfig)
    generator = load("generator", Generator, GeneratorConfig)
    alone = generator.config.condition not in ENCODERS
    encoder = None if alone else load(*ENCODERS[generator.config.condition])
    check_fits(generator.config, tokenizer, encoder)
    if alone and not segmenter and not Path(folder, "segmenter.pt").exists():
        return tokenizer, encoder, generator, None
    segmenter = load_segmenter(segmenter or folder, tokenizer.config.channels).to(device)
    return tokenizer, encoder, generator, segmenter


def groups(clips, config):
    """Batches that one call can generate: fps, frames, clip numbers, and for each its donor, the next."""
    alike = defaultdict(list)
    for i in chosen(clips, config.num, config.seed):
        alike[clips[i]["fps"], min(clips[i]["frames"], config.frames)].append(i)
    for (fps, frames), numbers in alike.items():
        donors = numbers[1:] + numbers[:1]
        for at in range(0, len(numbers), config.batch):
            yield fps, frames, numbers[at:at + config.batch], donors[at:at + config.batch]


def sampler(config, device, text=False):
    """stream_video with the models and settings of a config, tokenizer, segmenter, and the seconds of ECG
    that it wants before and after the video; None of a generator told by text, where `text` allows one."""
    tokenizer, encoder, generator, segmenter = load_models(config.weights, device, config.segmenter)
    if generator.config.condition not in ("ecg", "text" if text else ""):
        raise UserError("this generator was trained without an ECG: there is no beat to follow")
    c = tokenizer.config
    if not 1 <= config.overlap < c.frames or (config.overlap - 1) % c.patch_t:
        raise UserError(f"--overlap={config.overlap}: 1 + a multiple of {c.patch_t}, below {c.frames}")
    check_scorer(generator.config, config.scorer)
    keys = "scorer", "guidance", "guidance_end", "temperature", "overlap"
    how = {key: getattr(config, key) for key in keys}
    how |= {"steps": config.steps} if config.steps else {}
    stream = partial(stream_video, tokenizer, encoder, generator, **how)
    told = generator.config.condition == "ecg"
    return stream, tokenizer, segmenter, encoder.config.samples / ECG_HZ if told else None


def decode_again(tokenizer, video):
    """video (B, C, T, H, W) encoded and decoded window by window: what the tokenizer lets through."""
    window, T = tokenizer.config.frames, video.shape[2]
    for at in range(0, T, window):
        begin = max(0, min(at, T - window))         # the last window ends with the video
        yield tokenizer.decode(tokenizer.encode(video[:, :, begin:begin + window]))[:, :, at - begin:]


def generated(config, device, conditions, by_ecg=False):
    """Generate the clips under each of the `conditions`, batch by batch: yields a namespace of numbers and
    donors (the clips, and those whose ECG "swapped" has), fps, and videos, {"true" or condition: (B, C, T, H,
    W)}; and the set and the segmenter. "again" is "own" with another seed, in the first batch alone.
    """
    stream, tokenizer, segmenter, margin = sampler(config, device, not by_ecg)
    clips, by_text, margin = Clips(config.data, config.split), margin is None, margin or 0
    if by_text and "text" not in clips[0]:
        raise UserError(f"{config.data}: the clips of the set have no text")
    picked = [] if by_text else pick_leads(clips, config.leads)
    stream = partial(stream, leads=[LEADS.index(clips.leads[k]) for k in picked])
    for k, (fps, frames, numbers, donors) in enumerate(tqdm(list(groups(clips, config)), desc="batches")):
        span = -margin, frames / fps + margin
        true = torch.stack([as_video(clips.per_frame("video", i, 0, frames)) for i in numbers])  # B C T H W
        own, other = (np.zeros((len(n), 1, 1)) if by_text else aligned_ecg(clips, n, picked, *span)
                      for n in (numbers, donors))
        told = {"flat": np.zeros_like(own), "swapped": other}
        unseen = in_middle(np.arange(own.shape[-1]) / ECG_HZ - margin, frames / fps)
        videos, seed = {"true": true}, config.seed + numbers[0]
        first = true[:, :, :1].to(device) if config.first else None
        for name in conditions:     # the same seed: nothing but the ECG differs
            if name == "decoded":
                chunks = decode_again(tokenizer, true.to(device))
            elif name == "again" and k:
                continue
            else:
                chunks = stream(told.get(name, own), ecg_start=SHIFT_S * (name == "shifted") - margin,
                                frames=frames, fps=fps, first=first, seed=seed + 1000 * (name == "again"),
                                hidden=unseen if name == "hidden" else None,
                                text=[clips[i]["text"] for i in numbers] if by_text else None)
            videos[name] = torch.cat([chunk.cpu() for chunk in chunks], dim=2)
        yield SimpleNamespace(numbers=numbers, donors=donors, fps=fps, videos=videos), clips, segmenter


def run_conditions(config, device, conditions, by_ecg=False):
    """Records of the generated clips, as metrics/synchrony.py has them, and numbers of clips. Where there is
    "again", those of the first batch also have their videos (C, T, H, W). Clips whose true video shows no
    beats (a pause, a flat ECG) have no ED, no EF and no r: they are left out.
    """
    records = []
    for batch, clips, segmenter in generated(config, device, conditions, by_ecg):
        masks = {name: segment(segmenter, video) for name, video in batch.videos.items()}   # B T H W
        for b, (i, donor) in enumerate(zip(batch.numbers, batch.donors)):
            area = {name: m[b].sum((1, 2), dtype=float) for name, m in masks.items()}
            cycle = {name: cardiac_cycle(area[name], disk_volume(m[b]), batch.fps)
                     for name, m in masks.items()}
            mask = clips.per_frame("mask", i, 0, len(area["true"])) if clips.has("mask", i) else None
            if mask is not None and is_traced(mask).all():
                area["traced"] = mask.sum((1, 2), dtype=float)
            records.append(SimpleNamespace(
                clip=i, donor=donor, fps=batch.fps, ef=clips[i]["ef"], area=area, cycle=cycle,
                r_peaks=r_peaks_of(clips, i) if clips.leads else np.array([]),
                video={name: v[b] for name, v in batch.videos.items()} if "again" in batch.videos else {}))
    beating = [r for r in records if r.cycle["true"]["ef"] is not None]
    return beating, {"clips": len(records), "clips_excluded": len(records) - len(beating)}


def ejection_fraction(config, device):
    """EF, beats and area of the generated video; EF through the tokenizer alone (_decoded), its ceiling.

    diversity: RMS difference of two draws over that of a draw and the true video. As drawn from the true
    distribution, both are alike and it is 1.
    """
    records, counts = run_conditions(config, device, ["own", "decoded", "again"])
    decoded = ef_scores([r.cycle["decoded"]["ef"] for r in records], [r.cycle["true"]["ef"] for r in records],
                        "_decoded")
    pairs = [[(r.video["own"] - r.video[name]).square().mean().sqrt() for name in ("again", "true")]
             for r in records if r.video]
    return ef_figures(records) | decoded | own_figures(records) | counts \
        | {"diversity": ratio(*np.mean(pairs, axis=0)) if pairs else math.nan}


def segmenter_figures(config, device):
    """Dice and EF of the segmenter on the set's own masks."""
    clips = Clips(config.data, config.split)
    model = load_segmenter(config.segmenter or config.weights, clips.meta["channels"]).to(device)
    return measure_segmenter(model, clips, chosen(clips, config.num, config.seed))


# ---------------------------------------------------------------------------- picture quality

def generation(config, device):
    """The paper's Table 2: SSIM and LPIPS of each frame against the true one, FID and KID of all frames, FVD
    of all videos. A figure whose detector is not given is not computed."""
    nets = {kind: Detector(getattr(config, kind), kind, device) for kind in KINDS if getattr(config, kind)}
    of_frames, of_videos = ([Features(), Features()] for _ in range(2))
    similar, distance, clips = [], [], 0
    for batch, *_ in generated(config, device, ["own"]):
        videos = batch.videos["true"], batch.videos["own"]                                  # B C T H W
        frames = [video.transpose(1, 2).flatten(0, 1) for video in videos]                  # BT C H W
        similar += ssim(*frames).tolist()
        clips += len(batch.numbers)
        if "inception" in nets:
            for found, x in zip(of_frames, frames):
                found.add(nets["inception"](x))
        if "i3d" in nets:
            for found, x in zip(of_videos, videos):
                found.add(nets["i3d"](x))
        if "vgg" in nets:
            distance += (nets["vgg"](frames[0]) - nets["vgg"](frames[1])).square().sum(1).tolist()
    return {"ssim": middle(similar, np.mean), "lpips": middle(distance, np.mean),
            "fid": frechet(*of_frames), "kid": kernel_distance(*of_frames), "fvd": frechet(*of_videos),
            "clips": clips, "frames_compared": len(similar)}


COLUMNS, SIDE = 8, 128      # of the figure: frames in a row, pixels of one


@torch.no_grad()
def figure(config, device):
    """The paper's Fig. 3, as OUT/figure.png: frames of a clip, and of what its first frame becomes under its
    own ECG, a flat one, its own SHIFT_S later, and --ecg's; each row above its ECG, a frame over its time."""
    stream, _, _, margin = sampler(config, device)
    clips = Clips(config.data, config.split)
    i, picked = chosen(clips, 1, config.seed)[0], pick_leads(clips, config.leads)
    fps, frames = clips[i]["fps"], min(clips[i]["frames"], config.frames)
    span, shown = frames / fps + 2 * margin, min(frames / fps, SCROLL_S)
    true = as_video(clips.per_frame("video", i, 0, frames))[None]                           # 1 C T H W
    own = aligned_ecg(clips, [i], picked, -margin, frames / fps + margin)[0], [clips.leads[k] for k in picked]
    rows = [("ground truth", *own, 0), ("its own ECG", *own, 0), ("flat ECG", 0 * own[0], own[1], 0),
            (f"its own ECG {1000 * SHIFT_S:.0f} ms later", *own, SHIFT_S)]
    if config.ecg:
        ecg, leads = read_ecg(config.ecg, config.ecg_hz, config.leads.split(",") if config.leads else ())
        ecg = clean_ecg(go_on(ecg, -round(margin * ECG_HZ), round(span * ECG_HZ)))
        rows.append((Path(config.ecg).stem, ecg, leads, 0))
    parts, at = [], ((np.arange(COLUMNS) + 0.5) / COLUMNS * shown * fps).astype(int)
    for title, ecg, leads, shift in tqdm(rows, desc="rows"):
        start = shift - margin
        chunks = [true] if title == rows[0][0] else stream(
            ecg=ecg[None], leads=[LEADS.index(name) for name in leads], ecg_start=start, frames=frames,
            fps=fps, first=true[:, :, :1].to(device) if config.first else None, seed=config.seed)
        video = torch.cat([chunk.cpu() for chunk in chunks], dim=2)[0][:, at]               # C n H W
        lead = ecg[leads.index("II") if "II" in leads else 0]
        strip = draw_strip(shown, shown, start + np.arange(len(lead)) / ECG_HZ, strip_curve(lead, 48),
                           start + find_r_peaks(ecg), 48, COLUMNS * SIDE)
        parts += [film(video.permute(1, 2, 3, 0).numpy(), title, SIDE), strip]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    imageio.imwrite(Path(config.out) / "figure.png", np.concatenate(parts))
    return {"rows": len(rows), "frames": frames}


# ---------------------------------------------------------------------------- synchrony

def sync(config, device):
    """Does the heart follow the ECG: its own, moved by 200 ms, flat, another clip's, in part hidden?"""
    figures = dict(shifted=shift_figures, flat=flat_figures, swapped=swap_figures, hidden=hidden_figures)
    asked = config.conditions.split(",") if config.conditions else []
    if set(asked) - set(figures):
        raise UserError(f"--conditions={config.conditions}: a list of {', '.join(figures)}")
    records, counts = run_conditions(config, device, ["own", *asked], by_ecg=True)
    video = beat_figures(records, "true")       # what the segmenter and the frame rate allow
    found = own_figures(records) | ef_figures(records) | counts \
        | {f"{key}_video": video[key] for key in ("ed_error_ms_median", "beats_found")}
    for name in asked:
        found |= figures[name](records)
    return found


# ---------------------------------------------------------------------------- videos from built-in ECGs

ENDS_S = 10         # so many seconds at the start of a long video are compared with as many at its end
FPS = 25            # of them


def built_in(config, margin, many):
    """The traces of `many` built-in ECGs, and what stream_video is to be told for a video of each."""
    seconds = config.frames / FPS + 2 * margin
    traces = [make_ecg(config.seed + i, seconds, -margin) for i in range(many)]
    return traces, dict(ecg=np.stack([clean_ecg(t.ecg.T) for t in traces]), leads=range(len(LEADS)),
                        ecg_start=-margin, frames=config.frames, fps=FPS, seed=config.seed)


@torch.no_grad()
def drift(config, device):
    """Does a video of --frames, from a built-in ECG alone, end as it began? `num` of them (0 = 8), no set.

    Mean grey level, contrast (standard deviation over a frame) and LV area of the last ENDS_S seconds over
    those of the first, medians; beats found and |ED - R| in both.
    """
    stream, _, segmenter, margin = sampler(config, device)
    traces, told = built_in(config, margin, config.num or 8)
    chunks = tqdm(stream(**told), desc="windows")
    video = torch.cat([(255 * x).byte().cpu() for x in chunks], dim=2)                      # B C T H W
    n = min(ENDS_S * FPS, config.frames // 2)
    sums, found = defaultdict(list), {}
    for end, part in (("first", slice(0, n)), ("last", slice(config.frames - n, None))):
        records = []
        for clip, trace in zip(video[:, :, part], traces):
            frames = clip[None].float() / 255                                               # 1 C n H W
            mask = segment(segmenter, frames)[0]
            area = mask.sum((1, 2), dtype=float)
            cycle, at = cardiac_cycle(area, disk_volume(mask), FPS), trace.r_peaks - part.start / FPS
            records.append(SimpleNamespace(area={"own": area}, cycle={"own": cycle}, r_peaks=at, fps=FPS))
            sums[end].append([frames.mean(), frames.std((1, 3, 4)).mean(), area.mean()])
        found |= {f"{key}_{end}": x for key, x in beat_figures(records, "own").items()}
    ratios = np.median(np.array(sums["last"]) / np.array(sums["first"]), axis=0).tolist()
    return dict(zip(("grey", "contrast", "area"), ratios)) | found | {"clips": len(traces)}


@torch.no_grad()
def speed(config, device):
    """A video of --frames from a built-in ECG alone, --num at a time (0 = 1), and the parts of it: seconds,
    GFLOP, share of the machine's matmul rate. The FLOPs are counted in a video before, which is not timed."""
    stream, _, _, margin = sampler(config, device)
    tokenizer, encoder, generator = stream.args
    told = built_in(config, margin, config.num or 1)[1]
    methods = (tokenizer, "encode"), (tokenizer, "decode"), (encoder, "forward"), (generator, "propose")
    work, seconds = (measure_parts(lambda: [*stream(**told)], methods, meter)
                     for meter in (flops, partial(clock, device)))
    rate = matmul_rate(device)
    found = {"matmul_gflop_per_s": rate / 1e9, "parameters_m": sum(map(parameter_count, stream.args)),
             "peak_memory_mb": peak_memory(device) / 1e6, "frames": config.frames}
    for part, flop, s in zip(PARTS, work, seconds):
        found |= {f"{part}_{key}": x for key, x in zip(COSTS, (s, flop / 1e9, ratio(flop, s * rate)))}
    return found


# ---------------------------------------------------------------------------- command line

MODES = {"reconstruction": reconstruction, "generation": generation, "ef": ejection_fraction, "sync": sync,
         "drift": drift, "segmenter": segmenter_figures, "figure": figure, "speed": speed}
TABLES = "reconstruction", "generation", "ef"       # the modes that mode "tables" runs
DETECTOR = {"fid": "inception", "kid": "inception", "fvd": "i3d", "lpips": "vgg"}


def split_targets(argv, keys):
    """Arguments -> ({key: x} of every --target_KEY=x, the others)."""
    targets, rest = {}, []
    for arg in argv:
        key, _, text = arg.removeprefix("--target_").partition("=")
        if not arg.startswith("--target_"):
            rest.append(arg)
        elif key not in keys:
            raise UserError(f"{arg}: this mode has no such figure; it has {' '.join(keys)}")
        else:
            targets[key] = parse_value(f"target_{key}", text, float)
    return targets, rest


def falls_short(key, value, target):
    """Is a figure farther from its best value than the target is? One that could not be measured is."""
    best = BEST.get(key, 0)
    return value is None or (value < target if best == math.inf else abs(value - best) > abs(target - best))


def report(mode, config, device, targets):
    """Measure, print, and write OUT/eval_MODE.json, whose content it returns."""
    began, measured = time.time(), MODES[mode](config, device)
    measured = {key: measured.get(key, math.nan) for key in FIGURES[mode].split()}
    figures = {key: None if math.isnan(x) else x if isinstance(x, int) else float(f"{x:.6g}")
               for key, x in measured.items()}
    for key, value in figures.items():
        target = f"   target {targets[key]:g}" if key in targets else ""
        shown = f"{value:12.5g}" if value is not None else \
            f"not computed (pass --{DETECTOR[key]}=...)" if key in DETECTOR else f"{'-':>12}"
        print(f"  {key:<26}{shown}{target}")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = asdict(config) | figures
    about |= {"device": gpu, "commit": COMMIT, "seconds": round(time.time() - began, 1)}
    Path(config.out).mkdir(parents=True, exist_ok=True)
    (Path(config.out) / f"eval_{mode}.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def main():
    mode, *argv = sys.argv[1:] or [""]
    if {"--help", "-h"} & {mode, *argv}:
        parse_flags(EvalConfig, argv=["--help"])
    if mode not in (*MODES, "tables"):
        raise UserError(f"the first argument is the mode, one of {' '.join(MODES)} tables; not {mode!r}")
    modes = TABLES if mode == "tables" else [mode]
    targets, argv = split_targets(argv, [key for name in modes for key in FIGURES[name].split()])
    config = parse_flags(EvalConfig, argv=argv)
    if config.batch < 1 or config.frames < 2 or config.num < 0:
        raise UserError("--batch must be at least 1, --frames at least 2, --num at least 0")
    device = init_distributed(config.seed)[0]
    found = [report(name, config, device, targets) for name in modes]
    if mode == "tables":
        about = f"{config.data} ({config.split}), weights {config.weights}, {found[0]['device']}, " \
                f"seed {config.seed}, commit {COMMIT}"
        (Path(config.out) / "tables.md").write_text(markdown(found, about))
        print(f"{config.out}/tables.md")
    missed = [(key, figures[key]) for name, figures in zip(modes, found) for key in FIGURES[name].split()
              if key in targets and falls_short(key, figures[key], targets[key])]
    for key, value in missed:
        print(f"{key} = {value} misses the target {targets[key]:g}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    run_main(main)
