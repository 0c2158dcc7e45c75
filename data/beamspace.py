"""Pictures in beamspace (depth x angle) as squares, contours as masks; for sources.echoxflow.

    matrix = scan_conversion(sector, square, size, (R, A))      # sparse, (size * size, R * A)
    picture = (matrix @ beamspace.ravel()).reshape(size, size)

Metres and radians. The transducer is at (0, 0), y points down, and angle 0 points straight down. A
beamspace picture (R, A) has its rows at even depths and its columns at even angles; the first and
last ones lie on the sector's edge. A square has the sector's upper edge at its top; it is black
outside of the sector.
"""
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.sparse import csr_matrix


class Sector(NamedTuple):
    """Geometry of a beamspace picture."""
    near: float         # depth of the first row
    far: float          # depth of the last row
    left: float         # angle of the first column
    right: float        # angle of the last column


class Square(NamedTuple):
    """Place of a square picture."""
    x: float            # its left edge
    y: float            # its upper edge
    pitch: float        # size of a pixel


def fit_square(sector, size):
    """The Square that holds the sector: its upper edge at the top, its middle in the middle."""
    # The outermost points are at the corners, or where an arc crosses an axis
    angles = [sector.left, sector.right]
    angles += [a for a in (-math.pi / 2, 0, math.pi / 2) if sector.left < a < sector.right]
    x = np.outer([sector.near, sector.far], np.sin(angles))
    y = np.outer([sector.near, sector.far], np.cos(angles))
    side = max(np.ptp(x), np.ptp(y))
    return Square((x.min() + x.max() - side) / 2, y.min(), side / size)


def scan_conversion(sector, square, size, shape):
    """From beamspace to a square, as a sparse matrix (size * size, R * A); shape = (R, A).

    Bilinear. A pixel is the mean of k x k points, so that fine rows of the beamspace do not alias.
    Points outside of the sector are black.
    """
    R, A = shape
    row_m = (sector.far - sector.near) / (R - 1)
    k = min(max(math.ceil(square.pitch / row_m), 1), 8)
    fine = (np.arange(size * k) + 0.5) * square.pitch / k
    x = square.x + fine[None, :]
    y = square.y + fine[:, None]
    depth = np.hypot(x, y)
    angle = np.arctan2(x, y)
    inside = (depth >= sector.near) & (depth <= sector.far)
    inside &= (angle >= sector.left) & (angle <= sector.right)
    v, u = np.nonzero(inside)                       # n fine points
    pixel = v // k * size + u // k

    # Each point lies between two rows and two columns of the beamspace
    row = (depth[v, u] - sector.near) / row_m
    column = (angle[v, u] - sector.left) / (sector.right - sector.left) * (A - 1)
    i = np.minimum(row.astype(int), R - 2)
    j = np.minimum(column.astype(int), A - 2)
    weights = []
    cells = []
    for down in (0, 1):
        for across in (0, 1):
            weights.append((1 - abs(row - i - down)) * (1 - abs(column - j - across)) / k ** 2)
            cells.append((i + down) * A + j + across)
    weights = np.concatenate(weights).astype(np.float32)
    where = np.tile(pixel, 4), np.concatenate(cells)
    return csr_matrix((weights, where), (size * size, R * A))


def draw_contour(points, square, size):
    """A contour (N, 2) in metres -> mask (size, size) uint8: pixels that it covers by half."""
    fine = 8
    at = (points - (square.x, square.y)) / square.pitch * fine - 0.5            # N 2
    picture = Image.new("L", (size * fine, size * fine))
    ImageDraw.Draw(picture).polygon([tuple(point) for point in at], fill=1)
    covered = np.asarray(picture).reshape(size, fine, size, fine).mean((1, 3))
    return (covered >= 0.5).astype(np.uint8)
