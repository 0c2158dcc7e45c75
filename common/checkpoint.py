"""What all trainings share: process group, schedule, weights and state on disk, the log."""
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from common.flags import UserError


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


def check_out(config, stage):
    """Path of the saved state; refused where another training's would be overwritten."""
    state = Path(config.out) / f"{stage}_state.pt"
    if state.exists() and not config.resume:
        raise UserError(f"{state} exists: pass --resume to go on, or choose another --out")
    return state
