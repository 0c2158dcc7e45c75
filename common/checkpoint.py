"""Weights and training states on disk: used by the trainers, sample.py, evaluate.py, lv_segmenter.

A weights folder holds one file a stage, STAGE.pt. A training writes its state beside it, as
STAGE_state.pt, so that --resume goes on as if the training had never stopped.
"""
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from common.flags import UserError

# Parameters that older checkpoints have under another name: old name -> name now.
RENAMED_KEYS = {
    "place": "spatial_position",
    "order": "temporal_position",
    "order_anchor": "anchor_position",
}


def current_commit():
    """Short git commit of the code, or "" outside a git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


# Asked once, at the start: the checkout may change while a long training runs.
COMMIT = current_commit()


# ---------------------------------------------------------------------------- files

def save_atomic(content, path):
    """torch.save to a temporary file that is then renamed.

    After a crash either the old file or the new file is there, never half a file.
    """
    # Two nodes that share a disk both write: each has a temporary file of its own.
    part = Path(f"{path}.{os.environ.get('RANK', 0)}.part")
    with open(part, "wb") as file:
        torch.save(content, file)
        # The bytes must be on the disk before the new name points to them.
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_file(path):
    """torch.load of tensors and plain values only; UserError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        message = f"{path} is missing; train it or choose another folder of weights"
        raise UserError(message) from None
    except Exception as error:
        # torch raises many kinds of errors for a file that is cut short
        reason = type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint ({reason})") from None


def rename_keys(state_dict):
    """A model's state dict, its parameters under the names that the code has now."""
    renamed = {}
    for key, value in state_dict.items():
        # Only the last part is the parameter's own name: "decoder.place" has "place".
        module, dot, name = key.rpartition(".")
        renamed[module + dot + RENAMED_KEYS.get(name, name)] = value
    return renamed


# ---------------------------------------------------------------------------- weights

def save_weights(folder, stage, model, step, state=None, **more):
    """Write FOLDER/STAGE.pt: {"stage", "config", "model", "step", "commit"} and what `more` adds.

    state: a state dict to save in place of the model's own.
    """
    content = {
        "stage": stage,
        "config": asdict(model.config),
        "model": state or model.state_dict(),
        "step": step,
        "commit": COMMIT,
    }
    save_atomic(content | more, Path(folder) / f"{stage}.pt")


def load_weights(folder, stage, model_class, config_class, expected=None):
    """Build the model of FOLDER/STAGE.pt with the config in the file, and load its weights.

    expected: a config that the one in the file must equal; UserError if they differ.
    """
    path = Path(folder) / f"{stage}.pt"
    saved = read_file(path)
    if not isinstance(saved, dict) or saved.get("stage") != stage:
        raise UserError(f"{path} holds no {stage}")
    try:
        config = config_class(**saved["config"])
        state = rename_keys(saved["model"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} holds no config and weights of a {stage}") from None
    if expected is not None:
        check_same(path, config, expected)

    model = model_class(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # The first line only says that loading failed; the second names the parameter.
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path} does not fit its own config: {reason}") from None
    return model


def check_same(path, config, expected):
    """UserError if the config of the weights in a file differs from the one that the flags give."""
    for key, value in asdict(expected).items():
        found = getattr(config, key)
        if value != found:
            raise UserError(f"{path} has {key}={found}, the flags say {value}")


def pack(source, target):
    """Copy the weights of a folder in half precision, which is how weights/ is shipped.

    A stage that the folder lacks is left out.
    """
    Path(target).mkdir(parents=True, exist_ok=True)
    for stage in ("tokenizer", "ecg_encoder", "generator", "segmenter"):
        path = Path(source) / f"{stage}.pt"
        if not path.exists():
            continue
        saved = read_file(path)
        for key, value in saved["model"].items():
            if value.is_floating_point():
                saved["model"][key] = value.half()
        save_atomic(saved, Path(target) / f"{stage}.pt")


# ---------------------------------------------------------------------------- training state

def check_folder(path):
    """UserError if a folder cannot be made at the path, or not written; makes nothing itself."""
    path = Path(path).absolute()
    # The nearest part of the path that is there must be a folder.
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise UserError(f"--out: {path} is no folder that can be written to")


def check_out(config, stage):
    """Path of a training's state; UserError if it would overwrite another training's."""
    check_folder(config.out)
    state = Path(config.out) / f"{stage}_state.pt"
    if state.exists() and not config.resume:
        raise UserError(f"{state} exists: pass --resume to go on, or choose another --out")
    return state


# Settings that do not make another training of it, so --resume takes new ones. The places of data
# and weights are among them: what lies there is compared, by its hash.
MAY_CHANGE = {"steps", "minutes", "workers", "compile", "log_every", "eval_every", "save_every",
              "data", "weights", "out", "resume", "init_from"}


def save_state(path, parts, *, step, seconds, settings):
    """Write all that --resume needs. parts: {name: module or optimizer}.

    settings: what the training was started with, {name: value}, from training.run_settings.
    Random generators have no state to save: each draw is a function of (seed, item number).
    """
    content = {name: part.state_dict() for name, part in parts.items()}
    more = {"step": step, "seconds": seconds, "settings": settings}
    save_atomic(content | more, path)


def differences(ours, theirs, ignored):
    """Names that two dicts of settings both have with different values, but for `ignored`."""
    common = [name for name in ours if name in theirs and name not in ignored]
    return [name for name in common if ours[name] != theirs[name]]


def read_state(path, settings):
    """The state that a training saved, None if there is none.

    UserError if it was saved with other settings than these.
    """
    if not path.exists():
        return None
    saved = read_file(path)
    if not isinstance(saved, dict) or not {"model", "step"} <= saved.keys():
        raise UserError(f"{path} holds no state of a training")
    # A state of an older version has no settings.
    before = saved.get("settings", {})
    changed = [f"{name}={before[name]}, now it is {name}={settings[name]}"
               for name in differences(settings, before, MAY_CHANGE)]
    if changed:
        raise UserError(f"{path} was saved with {'; with '.join(changed)}; give --resume the "
                        "same settings, or choose another --out")
    return saved


def load_state(path, parts, saved):
    """Load a state that was read from `path` back into `parts`; UserError if it does not fit."""
    for name, part in parts.items():
        if name not in saved:
            raise UserError(f"{path} has no {name}: it was saved by a training with other flags")
        state = saved[name]
        # An optimizer numbers its parameters, so only modules have names to bring up to date.
        if name in ("model", "ema"):
            state = rename_keys(state)
        try:
            part.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError):
            raise UserError(f"{path} was saved by a training with other flags: its {name} has "
                            "other sizes") from None
