"""Read video files with ffmpeg: used by the sources that take a folder of videos."""
import logging

import numpy as np

from common.flags import UserError

VIDEO_KINDS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif"}


def read_video(path, size, channels, fps=0, frames=0):
    """A video file -> frames (T, size, size, channels) uint8 and frames per second; else UserError.

    The middle square of the picture, scaled. fps: resampled to that rate; frames: at most so many.
    0 = as the file has them.
    """
    # The shorter side becomes `size`, then the middle is cut out.
    filters = [f"scale={size}:{size}:force_original_aspect_ratio=increase:flags=area",
               f"crop={size}:{size}"]
    if fps:
        filters.insert(0, f"fps={fps}")
    # passthrough: each frame of the file once, none doubled or dropped to even out the time
    options = ["-vf", ",".join(filters), "-fps_mode", "passthrough"]
    if frames:
        options += ["-frames:v", str(frames)]

    data, about = run_ffmpeg(path, channels, options)
    return data.reshape(-1, size, size, channels), fps or about["fps"]


def read_frames(path):
    """A video file -> frames (T, H, W, 3) uint8 as they are stored, and frames per second; else
    UserError."""
    data, about = run_ffmpeg(path, 3, ["-fps_mode", "passthrough"])
    width, height = about["size"]
    return data.reshape(-1, height, width, 3), about["fps"]


def run_ffmpeg(path, channels, options):
    """The pixels of a video file (bytes of all frames,) uint8, and what ffmpeg says of it."""
    import imageio_ffmpeg
    # It warns of every video that is scaled.
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    pixels = {1: "gray", 3: "rgb24"}[channels]
    stream = imageio_ffmpeg.read_frames(str(path), pixels, channels, None, options)
    try:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        about = next(stream)
        return np.frombuffer(b"".join(stream), np.uint8), about
    except Exception as error:
        # ffmpeg fails in many ways; its last line says why
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: not read as a video: {reason}") from None
