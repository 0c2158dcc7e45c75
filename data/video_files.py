"""Video files."""
import logging

import numpy as np

from common.flags import UserError

KINDS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif"}


def read_video(path, size, channels, fps=0, frames=0):
    """A video file -> frames (T, size, size, channels) uint8 and frames per second; else UserError.

    The middle square, scaled; fps: resampled to so many a second, frames: at most so many; 0 = all there are.
    """
    import imageio_ffmpeg
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)     # it warns of every video that is scaled
    scale = f"scale={size}:{size}:force_original_aspect_ratio=increase:flags=area"
    steps = [f"fps={fps}"] * bool(fps) + [scale, f"crop={size}:{size}"]
    more = ["-vf", ",".join(steps), "-fps_mode", "passthrough"] + ["-frames:v", str(frames)] * bool(frames)
    stream = imageio_ffmpeg.read_frames(str(path), {1: "gray", 3: "rgb24"}[channels], channels, None, more)
    try:
        if not path.stat().st_size:
            raise ValueError("the file is empty")
        about = next(stream)
        video = np.frombuffer(b"".join(stream), np.uint8).reshape(-1, size, size, channels)
    except Exception as error:      # ffmpeg's last words, and all that its reader raises
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: not read as a video: {reason}") from None
    return video, fps or about["fps"]
