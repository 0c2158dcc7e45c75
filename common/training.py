"""What all trainings share."""
import json
import math
import os
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.flags import UserError


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


def update(config, model, optimizer, lr, step, clips, batch, state_path):
    """Clip the gradient's norm and step; where it is not finite, stop and name the clips."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not torch.isfinite(norm):
        raise UserError(f"step {step}: the loss or its gradient is not finite; last batch: "
                        f"{' '.join(clips[i]['id'] for i in batch['clip'].tolist())}; "
                        f"{state_path} keeps the last good state")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
