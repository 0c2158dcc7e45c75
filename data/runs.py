"""What all trainings share: process group, schedule, weights and state on disk, the log."""
import json
import math
import os
import subprocess
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.clips import Clips
from data.flags import UserError


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


def bfloat16(device, wanted=True):
    """Autocast to bfloat16 where that is fast, on a GPU or a CPU with AMX or AVX512-BF16."""
    fast = device.type == "cuda" or any(map(torch.cpu.get_capabilities().get, ("amx_bf16", "avx512_bf16")))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and fast)


def average(tensor):
    """Mean over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_mean(values, device):
    """Mean over ranks of a dict of numbers."""
    numbers = torch.stack([torch.as_tensor(v, device=device).detach().float() for v in values.values()])
    return dict(zip(values, average(numbers).tolist()))


def schedule(config, step, seconds, device="cpu"):
    """(share of the training that is done, learning rate), the same on all ranks."""
    done = step / config.steps if config.steps else seconds / 60 / config.minutes
    if dist.is_initialized() and not config.steps:
        done = all_mean({"done": done}, device)["done"]
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


COMMIT = commit()       # of the code that runs, also where the checkout moves on meanwhile


def save_weights(folder, stage, model, step, state=None, **more):
    """FOLDER/STAGE.pt: {"stage", "config", "model", "step", "commit"}, and what else is to be known."""
    save_atomic({"stage": stage, "config": asdict(model.config), "model": state or model.state_dict(),
                 "step": step, "commit": COMMIT, **more}, Path(folder) / f"{stage}.pt")


def save_state(path, parts, step, seconds):
    """All that --resume needs; a random draw needs no state, it is a function of (seed, item number)."""
    save_atomic({name: part.state_dict() for name, part in parts.items()}
                | {"step": step, "seconds": seconds}, path)


def load_state(path, parts):
    """Back into the parts, {name: module or optimizer}; returns step and seconds, 0 if nothing is saved."""
    if not path.exists():
        print(f"{path}: nothing saved yet, starting from step 0")
        return 0, 0.0
    saved = read_file(path)
    for name, part in parts.items():
        if name not in saved:
            raise UserError(f"{path} has no {name}: it was saved by a training with other flags")
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


def check_same(path, config, expected):
    """UserError where the config of the weights in a file differs from the one that the flags give."""
    for key, value in asdict(expected).items():
        if value != getattr(config, key):
            raise UserError(f"{path} has {key}={getattr(config, key)}, the flags say {value}")


def load_weights(folder, stage, model_class, config_class, expected=None):
    """Model from FOLDER/STAGE.pt, its config from the file; UserError where `expected` differs from it."""
    path = Path(folder) / f"{stage}.pt"
    saved = read_file(path)
    if not isinstance(saved, dict) or saved.get("stage") != stage:
        raise UserError(f"{path} holds no {stage}")
    config = config_class(**saved["config"])
    check_same(path, config, expected or config)
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        total = config.steps or None
        self.bar = tqdm(total=total, disable=not self.on, dynamic_ncols=True, mininterval=2)
        self.last, self.waited, self.began = None, 0.0, time.time()

    def wait(self, loader):
        """The next batch; the time until it comes is counted."""
        began = time.time()
        batch = next(loader)
        self.waited += time.time() - began
        return batch

    def rate(self, step, config, world):
        """Since the last call: clips a second, and the share of the time spent waiting for data. The first
        call tells how long the first step took, which with --compile is mostly compilation."""
        if self.last is None:
            self.last, self.waited = (step, time.time()), 0.0
            return {"first_step_s": self.last[1] - self.began}
        (last, then), self.last = self.last, (step, time.time())
        seconds, waited, self.waited = self.last[1] - then, self.waited, 0.0
        clips = (step - last) * config.batch * getattr(config, "accumulate", 1) * world
        return {"clips_per_s": clips / seconds, "data_wait": waited / seconds}

    def write(self, step, **values):
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        return values

    def close(self, text):
        """Say what the training gave, and leave the process group."""
        self.bar.close()
        if self.on:
            print(f"{self.config.out}/{text}")
        if dist.is_initialized():
            dist.destroy_process_group()


def update(config, model, optimizer, lr, step, batch, state_path):
    """Clip the gradient's norm and step; where it is not finite, stop and name the clips."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not torch.isfinite(norm):
        clips = Clips(config.data, "train")
        raise UserError(f"step {step}: the loss or its gradient is not finite; last batch: "
                        f"{' '.join(clips[i]['id'] for i in batch['clip'].tolist())}; "
                        f"{state_path} keeps the last good state")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def check_out(config, stage):
    """Path of the saved state; refused where another training's would be overwritten."""
    state = Path(config.out) / f"{stage}_state.pt"
    if state.exists() and not config.resume:
        raise UserError(f"{state} exists: pass --resume to go on, or choose another --out")
    return state
