"""Train the video tokenizer (ECHOPulse section 3.1; Eq. 2 and 4, and the entropy loss of LFQ).

    python train_tokenizer.py --data=datasets/phantom --out=runs/tokenizer                 # demo, CPU or GPU
    torchrun --nproc_per_node=8 train_tokenizer.py --preset=paper --data=datasets/NAME --out=runs/NAME

Reads windows of T+1 frames of a prepared set, writes OUT/tokenizer.pt (EMA weights), OUT/tokenizer_state.pt
(all that --resume needs) and OUT/tokenizer.jsonl (a line a logged step). What trainers share is here once.
"""
import copy
import json
import math
import os
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import tokenizer
from data.clips import Clips, RandomWindows, UserError, batches, parse_flags, run_main
from tokenizer import Tokenizer, TokenizerConfig, parameter_count


@dataclass
class TrainConfig(TokenizerConfig):
    data: str = "datasets/phantom"  # prepared data set
    out: str = "runs/tokenizer"     # folder for weights, state and log
    init_from: str = ""             # start from the weights in this folder
    resume: bool = False            # go on from OUT's saved state
    steps: int = 0                  # stop after so many steps; 0 = after --minutes
    minutes: float = 25             # stop after so many minutes of training
    batch: int = 8                  # clips of one step in one process
    accumulate: int = 1             # steps whose gradients are added up before an update
    lr: float = 1e-3                # peak learning rate of AdamW; linear warm-up, then cosine to a twentieth
    warmup: int = 200               # steps of warm-up
    weight_decay: float = 0.01      # of AdamW
    clip_norm: float = 1.0          # gradient norm is clipped here
    ema: float = 0.98               # EMA of the weights, every 10 steps
    mse_weight: float = 50.0        # Eq. 2
    commitment_weight: float = 0.25  # Eq. 4
    entropy_weight: float = 0.02    # LFQ entropy loss, falling to a tenth over the training
    bf16: bool = True               # autocast to bfloat16
    compile: bool = False           # torch.compile
    workers: int = 0                # data loading processes
    log_every: int = 20             # steps between two lines of the log
    eval_every: int = 500           # steps between two validations
    save_every: int = 500           # steps between two checkpoints
    seed: int = 0                   # of weights and data


PRESETS = {"demo": {}, "paper": tokenizer.PRESETS["paper"] | dict(lr=1e-4, batch=16, compile=True, workers=8)}


# ---------------------------------------------------------------------------- shared by all trainers

def model_config(config, cls):
    """The fields of the dataclass cls out of a training's settings."""
    return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})


def init_distributed(seed):
    """Join torchrun's process group if there is one; returns device, rank, world size."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(seed)     # the same weights on every rank; all other draws come with the data
    return device, rank, world


def all_mean(values, device):
    """Mean over ranks of a dict of numbers."""
    total = torch.stack([torch.as_tensor(v, device=device).detach().float() for v in values.values()])
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return dict(zip(values, total.tolist()))


def schedule(config, step, seconds):
    """(share of the training that is done, learning rate)."""
    done = step / config.steps if config.steps else seconds / 60 / config.minutes
    cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * min(done, 1))) / 2
    return done, config.lr * cosine * min(1, (step + 1) / config.warmup)


@torch.no_grad()
def ema_update(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def save_atomic(content, path):
    """torch.save to a temporary file, synced and renamed: a crash leaves the old file or the new, whole."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def commit():
    """Commit of the code, or "" outside a git checkout."""
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def save_weights(folder, stage, model, step):
    """FOLDER/STAGE.pt: {"stage", "config", "model", "step", "commit"}."""
    save_atomic({"stage": stage, "config": asdict(model.config), "model": model.state_dict(), "step": step,
                 "commit": commit()}, Path(folder) / f"{stage}.pt")


def save_state(path, model, ema, optimizer, step, seconds):
    """All that --resume needs; a random draw needs no state, it is a function of (seed, item number)."""
    save_atomic({"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                 "step": step, "seconds": seconds}, path)


def load_state(path, model, ema, optimizer):
    """Back into the three; returns step and seconds."""
    saved = read_file(path)
    for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer)):
        part.load_state_dict(saved[name])
    return saved["step"], saved["seconds"]


def pack(source, target):
    """Copy the weights of a folder in half precision, as weights/ is shipped."""
    Path(target).mkdir(exist_ok=True)
    for stage in ("tokenizer", "ecg_encoder", "generator", "segmenter"):
        saved = read_file(Path(source) / f"{stage}.pt")
        saved["model"] = {k: v.half() if v.is_floating_point() else v for k, v in saved["model"].items()}
        save_atomic(saved, Path(target) / f"{stage}.pt")


def read_file(path):
    """torch.load of tensors and plain values only; UserError where the file is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; train it or choose another folder of weights") from None
    except Exception as error:      # torch raises many kinds for a file cut short
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None


def load_weights(folder, stage, model_class, config_class, expected=None):
    """Model from FOLDER/STAGE.pt, its config from the file; UserError where `expected` differs from it."""
    path = Path(folder) / f"{stage}.pt"
    saved = read_file(path)
    if not isinstance(saved, dict) or saved.get("stage") != stage:
        raise UserError(f"{path} holds no {stage}")
    config = config_class(**saved["config"])
    if expected is not None and config != expected:
        key = next(k for k, v in asdict(expected).items() if v != saved["config"][k])
        raise UserError(f"{path} has {key}={saved['config'][key]}, the flags say {getattr(expected, key)}")
    model = model_class(config)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own config: {str(error).splitlines()[1].strip()}") from None
    return model


class Log:
    """Progress bar and OUT/STAGE.jsonl, on rank 0."""

    def __init__(self, config, stage, rank):
        self.config, self.on = config, rank == 0
        self.path = Path(config.out) / f"{stage}.jsonl"
        total = config.steps or None
        self.bar = tqdm(total=total, disable=not self.on, dynamic_ncols=True, mininterval=2)
        self.last = None

    def rate(self, step):
        """Steps a second since the last call."""
        last, self.last = self.last, (step, time.time())
        return (step - last[0]) / (self.last[1] - last[1]) if last else 0.0

    def write(self, step, **values):
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        return values


def clip_gradient(config, model, step, batch, state_path):
    """Clip the gradient's norm; where it is not finite, stop and name the clips."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not torch.isfinite(norm):
        raise UserError(f"step {step}: loss or gradient is not finite, clips {batch['clip'].tolist()}; "
                        f"{state_path} keeps the last good state")


def check_out(config, stage):
    """OUT made; refused where another training's state would be overwritten."""
    state = Path(config.out) / f"{stage}_state.pt"
    if state.exists() and not config.resume:
        raise UserError(f"{state} exists: pass --resume to go on, or choose another --out")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    return state


# ---------------------------------------------------------------------------- this trainer

def losses_of(config, model, video, done):
    """Weighted sum and its parts for video (B, C, T+1, H, W)."""
    reconstruction, index, lfq = model(video)
    parts = {"mse": (reconstruction.float() - video).square().mean(), **lfq}                # Eq. 2
    entropy = parts["entropy_sample"] - parts["entropy_batch"]
    loss = (config.mse_weight * parts["mse"] + config.commitment_weight * parts["commitment"]
            + config.entropy_weight * (1 - 0.9 * min(done, 1)) * entropy)
    return loss, parts, index


@torch.no_grad()
def evaluate(model, data, batch, device, rank, world, items=64):
    """Mean squared error and codes in use on fixed windows of the validation split."""
    error, index = 0.0, []
    for start in range(rank * batch, items, batch * world):
        video = torch.stack([data[n]["video"] for n in range(start, start + batch)]).to(device)
        index.append(model.encode(video))
        error += (model.decode(index[-1]) - video).square().mean().item() * batch * world / items
    return all_mean({"val_mse": error, "val_codes": torch.cat(index).unique().numel()}, device)


def main():
    config = parse_flags(TrainConfig, PRESETS)

    # ---- distributed and seed
    device, rank, world = init_distributed(config.seed)
    state_path = check_out(config, "tokenizer")

    # ---- data
    train, val = (RandomWindows(Clips(config.data, split), config.frames, seed=config.seed,
                                group=config.batch * world) for split in ("train", "val"))

    # ---- model
    shape = model_config(config, TokenizerConfig)
    raw = load_weights(config.init_from, "tokenizer", Tokenizer, TokenizerConfig, shape) if config.init_from \
        else Tokenizer(shape)
    raw.to(device)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, "
              f"{len(train.clips)} clips, {device} x {world}")

    # ---- optimizer and EMA
    optimizer = torch.optim.AdamW(raw.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)
    ema = copy.deepcopy(raw).eval()

    # ---- resume
    step, seconds = 0, 0.0
    if config.resume:
        step, seconds = load_state(state_path, raw, ema, optimizer)

    # ---- compile and DDP
    model = torch.compile(raw) if config.compile else raw
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    # ---- loop
    log, loader = Log(config, "tokenizer", rank), \
        batches(train, config.batch, step, rank, world, config.workers)
    log.bar.update(step)
    began, results = time.time() - seconds, {}
    for step in count(step):
        seconds = time.time() - began
        done, lr = schedule(config, step, seconds)
        for group in optimizer.param_groups:
            group["lr"] = lr
        finished = all_mean({"done": done}, device)["done"] >= 1

        # evaluate and save
        if step > 0 and (finished or step % config.eval_every == 0):
            results = log.write(step, **evaluate(ema, val, config.batch, device, rank, world))
        if rank == 0 and step > 0 and (finished or step % config.save_every == 0):
            save_weights(config.out, "tokenizer", ema, step)
            save_state(state_path, raw, ema, optimizer, step, seconds)
        if finished:
            break

        # accumulate, clip, step, EMA
        batch = next(loader)
        video = batch["video"].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss, parts, index = losses_of(config, model, video, done)
        (loss / config.accumulate).backward()
        if (step + 1) % config.accumulate == 0:
            clip_gradient(config, raw, step, batch, state_path)
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            ema_update(ema, raw, min(config.ema, step / (step + 100)))

        # log
        if step % config.log_every == 0:
            values = all_mean({"loss": loss, **parts}, device)
            log.write(step, **values, lr=lr, seconds=seconds,
                      clips_per_s=log.rate(step) * config.batch * world, codes=index.unique().numel())
            log.bar.set_postfix({"loss": f"{values['loss']:.3f}", "mse": f"{values['mse']:.5f}", **results})
        log.bar.update()

    # ---- teardown
    log.bar.close()
    if rank == 0:
        print(f"{config.out}/tokenizer.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
