"""What evaluate.py speed measures: a video, one window of it, and one step of both trainings.

It needs no data set: videos are generated from a built-in ECG, and trainings see random numbers.
Loading data is not measured. Every measurement ends when a GPU has done what it was given.
"""
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import torch

import ecg_encoder
import generator as generator_stage
import tokenizer as tokenizer_stage
import train_generator
import train_tokenizer
from common import training
from common.training import bfloat16, model_config, optimizer_step
from data.dataset import ECG_HZ, LEADS
from ecg_encoder import EcgConfig, EcgEncoder
from generator import (DecodingConfig, Generator, GeneratorSettings, build_condition, fit_config,
                       stream_video)
from metrics.ejection_fraction import ratio
from metrics.profiling import (clock, flops, matmul_rate, measure_parts, peak_memory,
                               reset_peak_memory)
from tokenizer import Tokenizer, TokenizerConfig, parameter_count

PARTS = ("video", "tokenizer_encode", "tokenizer_decode", "encoder", "generator")
COSTS = ("seconds", "gflop", "share_of_matmul")
KEYS = [*[f"{part}_{cost}" for part in PARTS for cost in COSTS],
        "round_trip_seconds", "forward_seconds", "forward_share_of_matmul",
        "window18_seconds", "window_shipped_seconds", "tokens_per_s", "video64_seconds",
        "train_step_seconds", "train_clips_per_s", "mfu",
        "train_tokenizer_step_seconds", "train_tokenizer_clips_per_s", "mfu_tokenizer",
        "compile_seconds", "matmul_gflop_per_s", "compute_bits", "parameters_m",
        "peak_memory_mb", "frames"]

WARM_UP = 2         # runs that do not count
RUNS = 5            # runs after them; their median counts
ENOUGH_S = 2        # a CPU begins no other run after so many seconds
LONG_S = 20         # a video that would take longer is timed by its first two windows
VIDEO_FRAMES = 64   # of video64_seconds
PAPER_DECODING = DecodingConfig(steps=18, guidance=3)


# ------------------------------------------------------------------------- the models

def paper_models(device):
    """Tokenizer, encoder and generator of the paper's sizes (Tables 4 and 5), with random weights.

    The encoder has the sizes of the released ST-MEM.
    """
    tokenizer = Tokenizer(TokenizerConfig(**tokenizer_stage.PRESETS["paper"]))
    encoder = EcgEncoder(EcgConfig(**ecg_encoder.PRESETS["paper"]))
    settings = GeneratorSettings(**generator_stage.PRESETS["paper"])
    generator = Generator(fit_config(settings, tokenizer, encoder))
    return tuple(model.eval().to(device) for model in (tokenizer, encoder, generator))


def forget_compiled(models):
    """Take the compiled methods off the models: what sampling compiles is not for training."""
    for model in models:
        for name in ("first_blocks", "unembed", "encode", "transform"):
            vars(model).pop(name, None)


# ------------------------------------------------------------------------- clocks

def run_seconds(device, run):
    """Seconds of one run()."""
    with clock(device) as read:
        run()
    return read()


def median_seconds(device, run):
    """Median seconds of run(): of RUNS runs after WARM_UP others; a CPU may take fewer."""
    seconds = []
    began = time.perf_counter()
    for _ in range(WARM_UP + RUNS):
        seconds.append(run_seconds(device, run))
        # A CPU is slow, and needs less warming up.
        if device.type == "cpu" and time.perf_counter() - began > ENOUGH_S:
            break
    skipped = min(WARM_UP, len(seconds) // 2)
    return median(seconds[skipped:])


# ------------------------------------------------------------------------- sampling

def make_video(models, arguments, **changes):
    """Generate a video by stream_video's arguments and throw it away."""
    for _ in stream_video(*models, **(arguments | changes)):
        pass


def count_windows(models, arguments):
    """How many windows a video has."""
    window = models[0].config.frames
    later_frames = arguments["frames"] - window                 # of all windows after the first
    new_frames = window - arguments["decoding"].overlap         # of each of them
    return 1 + max(0, math.ceil(later_frames / new_frames))


def video_costs(models, arguments, *, methods, meter, run_windows):
    """What a video costs, and its parts: the sums over its windows, listed as measure_parts does.

    The first run_windows windows run. Each other window costs as much as the last of them.
    """
    stream = stream_video(*models, **arguments)
    total = count_windows(models, arguments)
    costs = []
    for _ in range(min(run_windows, total)):
        # stream_video makes a window when it is asked for it.
        costs.append(measure_parts(partial(next, stream), methods, meter))
    costs += [costs[-1]] * (total - len(costs))
    return [sum(part) for part in zip(*costs)]


def video_seconds(models, arguments, *, methods, device, window_s):
    """Seconds of a video and of its parts; window_s: those of one window, more or less."""
    total = count_windows(models, arguments)
    run_windows = total if total * window_s < LONG_S else 2
    costs = partial(video_costs, models, arguments, methods=methods, meter=partial(clock, device),
                    run_windows=run_windows)
    # On a GPU the run of three whose whole is the median.
    runs = sorted(costs() for _ in range(3 if device.type == "cuda" else 1))
    return runs[len(runs) // 2]


def round_trip(tokenizer, device):
    """A function that takes one window of random video through the tokenizer, there and back."""
    c = tokenizer.config
    video = torch.rand(1, c.channels, c.frames, c.size, c.size, device=device)

    def run():
        """11 frames to tokens to 11 frames."""
        with torch.no_grad(), bfloat16(device):
            tokenizer.decode(tokenizer.encode(video))
    return run


def forward_pass(models, device):
    """A function that runs the generator once over the tokens of one window, all of them masked.

    Its ECG, of 12 leads, is encoded here, once.
    """
    tokenizer, encoder, generator = models
    shape = (1, tokenizer.latent_frames, tokenizer.grid, tokenizer.grid)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    masked = torch.ones(shape, dtype=torch.bool, device=device)
    with torch.no_grad(), bfloat16(device):
        cond = build_condition(
            generator.config, encoder, fps=torch.full((1,), 25.0, device=device),
            ecg=torch.randn(1, len(LEADS), encoder.config.samples, device=device),
            leads=torch.arange(len(LEADS), device=device),
            ecg_start=torch.zeros(1, device=device))

    def run():
        """One pass."""
        with torch.no_grad(), bfloat16(device):
            generator(tokens, masked, cond)
    return run


def compile_sampling(models, arguments, forward, device):
    """Seconds of the first runs of a compiled generator, in which torch.compile compiles it."""
    # Two windows: the first has no anchor, the second has one.
    frames = models[0].config.frames + 1
    video = partial(make_video, models, arguments, frames=frames)
    return run_seconds(device, video) + run_seconds(device, forward)


def measure_windows(models, arguments, device):
    """One window by the paper's decoding and by the default one, and 11 frames there and back."""
    tokenizer = models[0]
    window = partial(make_video, models, arguments, frames=tokenizer.config.frames)
    shipped = median_seconds(device, partial(window, decoding=DecodingConfig()))
    return {
        "round_trip_seconds": median_seconds(device, round_trip(tokenizer, device)),
        "window18_seconds": median_seconds(device, partial(window, decoding=PAPER_DECODING)),
        "window_shipped_seconds": shipped,
        "tokens_per_s": tokenizer.latent_frames * tokenizer.grid ** 2 / shipped,
    }


def measure_video64(models, arguments, device, window_s):
    """Seconds of 64 frames."""
    arguments = arguments | dict(frames=VIDEO_FRAMES)
    if device.type == "cuda":
        # Without a clock inside: a GPU would wait for each. On a CPU clocks cost nothing.
        return median_seconds(device, partial(make_video, models, arguments))
    return video_seconds(models, arguments, methods=[], device=device, window_s=window_s)[0]


def measure_sampling(config, models, arguments, device):
    """The video of `arguments` and its parts, one forward pass, one window, and 64 frames."""
    tokenizer, encoder, generator = models
    # In the order of PARTS, after the whole video.
    methods = [(tokenizer, "encode"), (tokenizer, "decode"), (encoder, "forward"),
               (generator, "sample_tokens")]
    single = arguments | dict(ecg=arguments["ecg"][:1])
    forward = forward_pass(models, device)

    # 1. FLOPs, before anything is compiled: compiled code does not show its operations. Two
    #    windows are enough, and counting takes long.
    work = video_costs(models, arguments, methods=methods, meter=flops, run_windows=2)
    with flops() as read:
        forward()
    forward_work = read()

    # 2. Seconds. stream_video itself compiles the models where --compile=1 says so.
    metrics = {"compile_seconds": math.nan}
    if config.compile:
        metrics["compile_seconds"] = compile_sampling(models, arguments, forward, device)
    forward_s = median_seconds(device, forward)
    rate = matmul_rate(device)
    metrics |= measure_windows(models, single, device)
    window_s = metrics["window_shipped_seconds"]
    seconds = video_seconds(models, arguments, methods=methods, device=device, window_s=window_s)
    metrics["video64_seconds"] = seconds[0]
    is_video64 = len(arguments["ecg"]) == 1 and arguments["frames"] == VIDEO_FRAMES
    if device.type == "cuda" or not is_video64:
        metrics["video64_seconds"] = measure_video64(models, single, device, window_s)
    forget_compiled(models)

    # 3. Share of the machine's rate = (operations / seconds) / rate.
    metrics["matmul_gflop_per_s"] = rate / 1e9
    metrics["forward_seconds"] = forward_s
    metrics["forward_share_of_matmul"] = ratio(forward_work, forward_s * rate)
    for part, flop, s in zip(PARTS, work, seconds):
        metrics[f"{part}_seconds"] = s
        metrics[f"{part}_gflop"] = flop / 1e9
        metrics[f"{part}_share_of_matmul"] = ratio(flop, s * rate)
    return metrics


# ------------------------------------------------------------------------- training

class Training(NamedTuple):
    """A training that can take steps on one batch."""
    config: object              # its TrainConfig
    model: torch.nn.Module      # what it trains
    loss_of: Callable           # loss_of(model, perhaps compiled) -> the loss of the batch
    batch: dict                 # the batch
    compile: Callable           # compile() -> the model, compiled as its trainer compiles it


class StepCost(NamedTuple):
    """What one step of a training costs."""
    seconds: float
    flop: int
    compile_seconds: float      # nan without --compile
    peak_memory: float          # bytes


def random_uniforms(clips, num_tokens):
    """The uniform numbers (B, K) of a batch, of which half the clips have a prefix of many frames.

    Prefixes are encoded again, which takes time. So their number must not change from run to run.
    """
    sizes = train_generator.uniform_sizes(num_tokens)
    u = {name: torch.rand(clips, size) for name, size in sizes.items()}
    u["prefix_kind"] = (torch.arange(clips)[:, None] + 0.5) / clips
    return torch.cat(list(u.values()), dim=1)


def random_batch(clips, models):
    """A batch as the loader of train_generator.py makes it, of random numbers; ECG of 12 leads."""
    tokenizer, encoder, generator = models
    c = tokenizer.config
    samples = encoder.config.samples
    num_tokens = tokenizer.latent_frames * tokenizer.grid ** 2
    frames = torch.rand(clips, c.channels, c.frames + 1, c.size, c.size)
    return {
        "video": frames[:, :, 1:], "anchor": frames[:, :, :1],
        "clip": torch.zeros(clips, dtype=torch.long),
        "fps": torch.full((clips,), 25.0, dtype=torch.float64),
        "uniform": random_uniforms(clips, num_tokens),
        "ecg": torch.randn(clips, len(LEADS), samples),
        "leads": torch.arange(len(LEADS)).expand(clips, -1),
        "ecg_start": torch.full((clips,), -samples / ECG_HZ / 2, dtype=torch.float64),
        "ecg_disturbed": torch.zeros(clips, samples, dtype=torch.bool),
        "anchor_ecg": torch.randn(clips, len(LEADS), generator.local_samples),
    }


def generator_training(config, models, device):
    """Stage 2: the ECG encoder and the generator, by train_generator's own loss."""
    tokenizer, encoder, generator = models
    settings = model_config(generator.config, GeneratorSettings)
    train = train_generator.TrainConfig(**vars(settings), batch=config.train_batch)
    batch = random_batch(train.batch, models)
    num_prefix = train_generator.draw_num_prefix(train, batch, tokenizer)
    batch = train_generator.to_device(batch, device)

    def loss_of(model):
        """Encode the video, encode the prefixes again, and the loss of the masked tokens."""
        return train_generator.batch_loss(train, model, tokenizer, batch, num_prefix,
                                          encoder.config.samples)[0]
    raw = train_generator.Stage2(encoder, generator)

    def compiled():
        """The transformer is compiled in its place."""
        train_generator.compile_transformer(generator)
        return raw
    return Training(train, raw, loss_of, batch, compiled)


def tokenizer_training(config, tokenizer, device):
    """Stage 1, by train_tokenizer's own loss, without VGG16 and without a discriminator."""
    train = train_tokenizer.TrainConfig(**vars(tokenizer.config), batch=config.train_batch)
    c = tokenizer.config
    video = torch.rand(train.batch, c.channels, c.frames, c.size, c.size, device=device)
    batch = {"video": video, "clip": torch.zeros(train.batch, dtype=torch.long)}

    def loss_of(model):
        """Reconstruct the video, and the losses of Eq. 2 and Eq. 4 and of the entropy."""
        # Only VGG16 would look at a frame of its own.
        return train_tokenizer.batch_loss(train, model, video, None, raw=tokenizer, vgg16=None,
                                          discriminator=None, done=0.0)[0]
    return Training(train, tokenizer, loss_of, batch, partial(torch.compile, tokenizer))


def measure_training(config, work, device):
    """StepCost of a Training: loss, backward, and AdamW with its norm of the gradient; no EMA."""
    raw = work.model.train()
    optimizer = torch.optim.AdamW(raw.parameters(), lr=0.0, betas=(0.9, 0.99),
                                  weight_decay=work.config.weight_decay, fused=True)

    def step(model):
        """One step, as the trainers take it. Its rate is 0, so that the weights stay."""
        with bfloat16(device):
            loss = work.loss_of(model)
        loss.backward()
        optimizer_step(work.config, raw, optimizer, lr=0.0, step=0, clips=[{"id": "random"}],
                       batch=work.batch, state_path="")

    # FLOPs before compilation, as in sampling.
    with flops() as read:
        step(raw)
    flop = read()
    model = raw
    compile_seconds = math.nan
    if config.compile:
        model = work.compile()
        compile_seconds = run_seconds(device, partial(step, model))
    reset_peak_memory(device)
    seconds = median_seconds(device, partial(step, model))
    raw.eval()
    return StepCost(seconds, flop, compile_seconds, peak_memory(device))


# ------------------------------------------------------------------------- all of it

def measure_speed(config, models, arguments, device):
    """All KEYS: sampling by stream_video's arguments, then a step of each training.

    config: evaluate.py's. --bf16=0 is float32 throughout.
    """
    with patch.object(training, "ALLOW_BFLOAT16", config.bf16):
        metrics = measure_sampling(config, models, arguments, device)
        stage2 = measure_training(config, generator_training(config, models, device), device)
        stage1 = measure_training(config, tokenizer_training(config, models[0], device), device)
        with bfloat16(device):
            is_bfloat16 = torch.is_autocast_enabled(device.type)
    # mfu compares with the rate of bfloat16, whatever --bf16 says.
    peak_rate = matmul_rate(device) if device.type == "cuda" else math.nan

    metrics["compile_seconds"] += stage1.compile_seconds + stage2.compile_seconds
    return metrics | {
        "train_step_seconds": stage2.seconds,
        "train_clips_per_s": config.train_batch / stage2.seconds,
        "mfu": stage2.flop / stage2.seconds / peak_rate,
        "train_tokenizer_step_seconds": stage1.seconds,
        "train_tokenizer_clips_per_s": config.train_batch / stage1.seconds,
        "mfu_tokenizer": stage1.flop / stage1.seconds / peak_rate,
        "compute_bits": 16 if is_bfloat16 else 32,
        "parameters_m": sum(map(parameter_count, models)),
        "peak_memory_mb": stage2.peak_memory / 1e6,
        "frames": arguments["frames"],
    }
