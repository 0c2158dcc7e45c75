"""The tokens of all windows of a set, computed once: train_generator.py --cache_tokens.

    NAME/SPLIT/tokens_HASH.npy    uint16 (sum of frames, T', h, w), HASH = that of the tokenizer

Row k, as in video.npy, has the tokens of the window that begins with frame k. The tokenizer is
causal, so the row's first latent frame is also the token of frame k by itself. Near the end of a
clip, where no whole window begins, a row has that one alone; the others are 0 and never read.
"""
import os

import numpy as np
import torch
from tqdm import tqdm

from common.flags import UserError
from data.dataset import as_video

WINDOWS = 16        # that are encoded together


def windows_of_clip(clips, i, frames, channels):
    """The windows of clip i that begin at each of its frames: (n, C, frames, H, W) in [0, 1].

    The last ones reach beyond the clip; its last frame stands for what is missing.
    """
    video = as_video(clips.per_frame("video", i), channels)                     # C n H W
    last = video.shape[1] - 1
    first = torch.arange(last + 1)[:, None]
    number = (first + torch.arange(frames)).clamp(max=last)                     # n frames
    return video[:, number].transpose(0, 1)


def tokens_of_clip(clips, i, tokenizer, device):
    """The rows of clip i in the cache, uint16 (n, T', h, w)."""
    c = tokenizer.config
    rows = []
    for windows in windows_of_clip(clips, i, c.frames, c.channels).split(WINDOWS):
        rows.append(tokenizer.encode(windows.to(device)).cpu().numpy())
    rows = np.concatenate(rows).astype(np.uint16)
    # A window that is not whole knows its first frame alone.
    rows[len(rows) - c.frames + 1:, 1:] = 0
    return rows


def write_shard(clips, shard, numbers, path, tokenizer, device):
    """Write PATH for a shard that holds the clips `numbers`; only a whole file gets its name."""
    grid = tokenizer.grid
    frames = len(shard.arrays["video"])
    shape = (frames, tokenizer.latent_frames, grid, grid)
    part = f"{path}.part"
    try:
        array = np.lib.format.open_memmap(part, "w+", np.uint16, shape)
    except OSError as error:
        raise UserError(f"--cache_tokens: cannot write {part}: {error.strerror}") from None
    for i in tqdm(numbers, desc=f"tokens of {shard.folder}", unit="clip"):
        row = clips[i]
        array[row["start"]:row["start"] + row["frames"]] = tokens_of_clip(
            clips, i, tokenizer, device)
    array.flush()
    os.replace(part, path)


def write_tokens(clips, tokenizer, name, device):
    """Write tokens_NAME.npy of each shard of the Clips that has none yet."""
    first = 0
    for shard in clips.shards:
        numbers = range(first, first + len(shard.lines))
        first = numbers.stop
        path = shard.folder / f"tokens_{name}.npy"
        if not path.exists():
            write_shard(clips, shard, numbers, path, tokenizer, device)


def open_tokens(clips, name):
    """Let the Clips read tokens_NAME.npy of each shard as their array "tokens"."""
    for shard in clips.shards:
        file = f"tokens_{name}.npy"
        try:
            shard.arrays["tokens"] = shard.open_array("tokens", file)
        except UserError:
            message = f"{shard.folder}/{file}: damaged, or of another set; remove it"
            raise UserError(message) from None
