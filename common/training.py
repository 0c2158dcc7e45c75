"""What all trainings share: start, end, ranks, resume, learning rate, EMA, optimizer step, log.

Used by train_tokenizer.py, train_generator.py, ecg_encoder.py and metrics/lv_segmenter.py.
"""
import gc
import hashlib
import json
import math
import os
import re
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.checkpoint import differences, load_state, read_state
from common.flags import UserError, check_least, print_error, run_main


# ---------------------------------------------------------------------------- start

def model_config(config, cls):
    """The dataclass `cls` of a model's settings, filled from a training's settings."""
    return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


# The smallest value of each setting of a training that makes sense; a share is 0 to 1.
LEAST = dict(
    steps=0, batch=1, accumulate=1, warmup=1, log_every=1, eval_every=1, save_every=1, num=0,
    lr=0, weight_decay=0, clip_norm=0, gan_weight=0, ecg_before=0, ecg_after=0,
    heads=1, depth=0, depth_space=0, depth_time=0, patch=1, patch_t=1, bits=2, samples=1,
    width=8, levels=1, context=0)


def check_training(config):
    """UserError where a setting of a training makes no sense; a config may lack any of them."""
    check_least(config, LEAST)
    for name, value in vars(config).items():
        is_share = name.startswith("p_") or name == "ema"
        if is_share and not 0 <= value <= 1:
            raise UserError(f"--{name}={value:g}: a share, 0 to 1")
    if config.steps == 0 and config.minutes <= 0:
        raise UserError(f"--minutes={config.minutes:g}: must be above 0, or pass --steps")
    # A head has an even number of channels, which the rotary embedding turns in pairs.
    if hasattr(config, "heads") and config.dim % (2 * config.heads):
        raise UserError(f"--dim={config.dim}: must be a multiple of twice --heads={config.heads}")
    if hasattr(config, "width") and config.width % 8:
        raise UserError(f"--width={config.width}: must be a multiple of 8, the groups of GroupNorm")
    if hasattr(config, "samples") and config.samples % config.patch:
        raise UserError(f"--samples={config.samples}: must be a multiple of --patch={config.patch}")


def init_distributed(seed):
    """Join torchrun's process group if there is one; returns device, rank, world size."""
    # torchrun sets these three; a plain python run has none of them and is rank 0 of 1.
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = os.environ.get("LOCAL_RANK", 0)

    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device(f"cuda:{local_rank}")
        torch.cuda.set_device(device)
        # TF32 for the matrix products that stay in float32
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")

    # The same weights on every rank. All other random numbers come with the data.
    torch.manual_seed(seed)
    return device, rank, world


def run_training(main):
    """run_main of a trainer. Under torchrun it also ends the process, whatever has happened."""
    if "RANK" not in os.environ:
        run_main(main)      # never returns

    code = 0
    try:
        run_main(lambda: run_rank(main))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # main() is over, and so are its variables: the loader joins its workers.
    gc.collect()
    # After an error another rank may never come: then the end of the process closes the group.
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    # A thread of the group that wakes up while Python takes itself down would end the process with
    # "terminate called without an active exception". So Python does not take itself down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_rank(main):
    """main() of one rank; an error of the process group becomes one line: another rank has gone."""
    try:
        main()
        if dist.is_initialized():
            # The ranks leave together: one that goes first would close what another still uses.
            dist.barrier()
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, NCCL and the store raise a DistError.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        # Its first sentence, without the line of C++ that it begins with.
        reason = re.sub(r"^\[\S*\] ", "", str(error).strip()).splitlines()[0].partition(". ")[0]
        raise UserError(f"rank {os.environ['RANK']} lost another rank ({reason}), whose own last "
                        "line may say why; start all again with --resume") from None


# False: bfloat16() leaves everything in float32. evaluate.py speed --bf16=0 compares the two.
ALLOW_BFLOAT16 = True


def bfloat16(device, wanted=True):
    """Autocast to bfloat16 on hardware that is fast in it: a GPU, a CPU with AMX or AVX512-BF16."""
    fast = device.type == "cuda"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        fast = bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and fast and ALLOW_BFLOAT16)


# ---------------------------------------------------------------------------- ranks

def average(tensor):
    """Mean over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_mean(values, device):
    """Mean over ranks of a dict of numbers, in one message."""
    numbers = [torch.as_tensor(v, device=device).detach().float() for v in values.values()]
    means = average(torch.stack(numbers)).tolist()
    return dict(zip(values, means))


def gather(value):
    """The values that all ranks have given, by rank: any that pickle can write."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_of_node():
    """Is this the first process of its machine? It writes the files and says what is wrong."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def end_together(reason):
    """If any rank has a reason to stop (None = it has none), all end with the first one's line."""
    reasons = gather(reason)
    stopped = [rank for rank, why in enumerate(reasons) if why is not None]
    if not stopped:
        return
    line = reasons[stopped[0]]
    if not dist.is_initialized():
        raise UserError(line)
    if len(stopped) < len(reasons):
        line = f"rank {stopped[0]}: {line}"
    if first_of_node():
        print_error(line)
    # torchrun ends all ranks as soon as one has gone: none goes before the line is printed.
    dist.barrier()
    sys.exit(2)


def gradient_sync(model, wanted):
    """A context for a forward and a backward; DDP averages the gradients in it only if wanted."""
    if wanted or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


# ---------------------------------------------------------------------------- resume

# What may differ between ranks: places on a node's own disk (what lies there is compared), workers.
MAY_DIFFER = {"out", "data", "weights", "init_from", "workers"}


def state_hash(*states):
    """12 hex digits that tell whether all tensors of some state dicts are the same."""
    digest = hashlib.sha256()
    for state in states:
        for name, tensor in state.items():
            digest.update(name.encode())
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(content.numpy())
    return digest.hexdigest()[:12]


def run_settings(config, world, clips, tokenizer=None):
    """{name: value} of all that makes a training what it is. The state on disk keeps them.

    The flags, the number of ranks, which clips there are, and which tokenizer, if one is given.
    """
    settings = asdict(config) | {"ranks": world, "clips": clips.fingerprint()}
    if "vgg16" in settings:
        # wherever the file lies
        settings["vgg16"] = bool(config.vgg16)
    if tokenizer is not None:
        settings["tokenizer"] = state_hash(tokenizer.state_dict())
    return settings


def check_ranks_agree(settings, parts):
    """All ranks end with one line if they differ in their settings, clips or weights."""
    states = [part.state_dict() for part in parts.values() if isinstance(part, torch.nn.Module)]
    everyone = gather(settings | {"first weights": state_hash(*states)})
    reason = None
    for rank, theirs in enumerate(everyone):
        for name in differences(everyone[0], theirs, MAY_DIFFER):
            reason = (f"rank {rank} was started with {name}={theirs[name]}, "
                      f"rank 0 with {name}={everyone[0][name]}")
    end_together(reason)


def resume(settings, path, parts):
    """Where the training starts, (step, seconds), the same on all ranks; both 0 for a new one.

    settings: from run_settings. With --resume the saved state is loaded into `parts`. Nodes may
    have disks of their own, and rank numbers may swap between nodes from one start to the next. So
    ranks without a state, or with an older one, get it from the rank that has the highest step.
    """
    check_ranks_agree(settings, parts)
    if not settings["resume"]:
        return 0, 0.0

    # 1. Each rank reads what it finds. One that cannot must not leave the others waiting.
    saved = None
    reason = None
    try:
        saved = read_state(path, settings)
    except UserError as error:
        reason = str(error)
    end_together(reason)
    if saved is not None and "settings" not in saved and first_of_node():
        print(f"{path}: an older state, which does not keep its settings: they are not compared")

    # 2. What have the others found? The hash is that of the weights.
    found = (-1, "")
    if saved is not None:
        found = (saved["step"], state_hash(saved["model"]))
    everyone = gather(found)
    newest = max(everyone)
    if newest[0] < 0:
        if first_of_node():
            print(f"{path}: nothing saved yet, starting from step 0")
        return 0, 0.0

    # 3. All load the same state.
    if everyone != [newest] * len(everyone):
        source = everyone.index(newest)
        if first_of_node():
            print(f"{path}: the state of step {newest[0]} comes from rank {source}")
        message = [saved]
        dist.broadcast_object_list(message, src=source)
        saved = message[0]
    load_state(path, parts, saved)
    return saved["step"], saved["seconds"]


# ---------------------------------------------------------------------------- steps

def schedule(config, step, seconds, device="cpu"):
    """(share of the training that is done, learning rate), the same on all ranks.

    The rate rises linearly over `warmup` steps and falls as a cosine to 5 % of `lr` at the end.
    """
    if config.steps:
        done = step / config.steps
    else:
        done = seconds / 60 / config.minutes
        # Clocks differ between ranks. All must agree on when the training ends.
        if dist.is_initialized():
            done = all_mean({"done": done}, device)["done"]
    cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * min(done, 1))) / 2
    warmup = min(1, (step + 1) / config.warmup)
    return done, config.lr * cosine * warmup


@torch.no_grad()
def ema_update(config, ema, model, step):
    """Exponential moving average of the weights, at every tenth step.

    ema = decay * ema + (1 - decay) * model, in place.
    """
    if step % 10 == 0:
        # A short average early on, since the first weights are far from the later ones.
        decay = min(config.ema, step / (step + 100))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def optimizer_step(config, model, optimizer, *, lr, step, clips, batch, state_path):
    """Clip the norm of the gradient and take one step of the optimizer.

    UserError if the gradient is not finite. It names the clips of the batch, which are looked up
    in `clips`, the Clips of the training.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not torch.isfinite(norm):
        # Raised before the step, so that the saved state stays good.
        names = " ".join(clips[i]["id"] for i in batch["clip"].tolist())
        message = f"step {step}: the loss or its gradient is not finite; last batch: {names}"
        if Path(state_path).exists():
            message += f"; {state_path} keeps the last good state"
        raise UserError(message)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------- log

class Log:
    """Progress bar and OUT/STAGE.jsonl, both on rank 0 only."""

    def __init__(self, config, stage, rank):
        self.config = config
        self.on = rank == 0
        self.path = Path(config.out) / f"{stage}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {config.out}: {error.strerror}") from None
        # A training of so many minutes has no total: the bar then only counts steps.
        total = config.steps or None
        self.bar = tqdm(total=total, disable=not self.on, dynamic_ncols=True, mininterval=2)
        self.last = None            # (step, time) of the last call of rate()
        self.waited = 0.0           # seconds of waiting for data since then
        self.began = time.time()

    def wait(self, loader):
        """The next batch; the time until it comes is counted."""
        began = time.time()
        batch = next(loader)
        self.waited += time.time() - began
        return batch

    def rate(self, step, config, world):
        """Clips a second and the share of the time spent waiting for data, since the last call.

        The first call tells how long the first step took. With --compile most of it is compilation.
        """
        previous = self.last
        waited = self.waited
        self.last = (step, time.time())
        self.waited = 0.0
        if previous is None:
            return {"first_step_s": self.last[1] - self.began}

        last_step, last_time = previous
        seconds = self.last[1] - last_time
        clips_per_step = config.batch * getattr(config, "accumulate", 1) * world
        clips = (step - last_step) * clips_per_step
        return {"clips_per_s": clips / seconds, "data_wait": waited / seconds}

    def write(self, step, **values):
        """Append a line to the log; returns the values as logged, reals rounded to 6 digits."""
        for key, value in values.items():
            if isinstance(value, float):
                values[key] = round(value, 6)
        if self.on:
            line = json.dumps({"step": step, **values})
            with open(self.path, "a") as file:
                file.write(line + "\n")
        return values

    def close(self, text):
        """Print what the training wrote."""
        self.bar.close()
        if self.on:
            print(f"{self.config.out}/{text}")
