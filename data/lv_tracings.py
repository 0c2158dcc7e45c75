"""The tracing of a left ventricle by its long axis and chords: used by sources/echonet_dynamic.

    rows (X1, Y1, X2, Y2), one of them the long axis  ->  outline (2 N, 2)  ->  mask (H, W)

In a well-ordered tracing the long axis comes first, and the chords follow from the apex to the
base, each from its left end to its right one. Some tracings of the real file are not so: the axis
stands elsewhere, chords are shuffled, or their ends are swapped. Their outline would cross itself.
"""
import numpy as np
from PIL import Image, ImageDraw

from common.flags import UserError

FOLDED = 0.05       # share of an outline's area that may be folded back by noise of the tracing


def cross(a, b):
    """The cross product of vectors (..., 2)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def split_axis(rows):
    """rows (N + 1, 4) -> the long axis (2, 2), from its upper end, and the chords (N, 2, 2).

    Chords are parallel to each other. The axis is the row that is least parallel to the others.
    """
    lines = np.array(rows, float).reshape(-1, 2, 2)                     # N+1 2 2
    directions = lines[:, 1] - lines[:, 0]                              # N+1 2
    off = np.abs(cross(directions[:, None], directions))                # N+1 N+1
    place = off.sum(1).argmax()
    axis = lines[place]
    if tuple(axis[0, ::-1]) > tuple(axis[1, ::-1]):
        axis = axis[::-1]
    return axis, np.delete(lines, place, axis=0)


def tracing_outline(rows):
    """rows (N + 1, 4) of a tracing, in any order -> its outline (2 N, 2): down the left ends of the
    chords and up the right ones. UserError where that crosses itself."""
    axis, chords = split_axis(rows)
    along = axis[1] - axis[0]

    # 1. The left end of each chord first: seen down the axis, its cross product is the larger
    side = cross(along, chords - axis[0])                               # N 2
    swapped = side[:, 0] < side[:, 1]
    chords[swapped] = chords[swapped, ::-1]

    # 2. From the upper end of the axis to the lower one
    chords = chords[np.argsort(chords.sum(1) @ along, kind="stable")]
    left, right = chords[:, 0], chords[:, 1]                            # N 2

    # 3. Between two neighbours lie two triangles; all of them turn the same way
    upper = cross(right[:-1] - left[:-1], left[1:] - left[:-1])
    lower = cross(right[1:] - right[:-1], left[1:] - right[:-1])
    areas = np.concatenate([upper, lower]) / 2
    whole = np.abs(areas).sum()
    folded = (whole - np.abs(areas.sum())) / 2
    if not whole or folded > FOLDED * whole:
        raise UserError("the outline crosses itself")
    return np.concatenate([left, right[::-1]])                          # 2 N, 2


def draw_outline(outline, size):
    """An outline (2 N, 2) in pixels -> its mask (size, size) uint8."""
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in outline], fill=1, outline=1)
    return np.asarray(mask)
