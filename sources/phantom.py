"""The phantom: simulated echocardiograms with their 12-lead ECGs, data that needs no download.

    python -m sources.phantom --out=datasets/phantom --clips=1000 --seed=0
    # one core: 0.07 s a clip, with --size=128 0.25 s

A clip is made in six steps, and each step is a section of this file:

1. Rhythm and ECG (data/ecgsyn.py): beats drawn at random, their waves by ECGSYN (McSharry et al.,
   IEEE TBME 50:289, 2003), on 12 leads by Dower's matrix (J Electrocardiol 13:119, 1980).
2. Filling curve: the left ventricle (LV) is largest at the R peak, empties during systole (Weissler
   et al., Circulation 37:149, 1968), fills early, rests, and the atria fill it up after a P wave.
3. Anatomy: the sizes of one heart, and its place in the sector that the transducer sees.
4. Motion: where each point of the tissue is in each frame, given the LV volume.
5. Scatterers: random points in the tissue and in the blood, each with its echo in dB.
6. Image formation: point-spread function, noise, log compression, scan conversion.

The ejection fraction (EF) can be inferred from what is seen: QRS width, T wave, R amplitude, and a
large round LV. The volume is the method of disks on the drawn contour. So EF, masks and R peaks are
exact ground truth.

Units: cm, s, ml, dB, radians. The reference is the end of diastole.
A point of the plane is one complex number, because then a shift is a sum, a rotation is a product,
and the distance from the transducer is abs():
    image point  x + iy, from the transducer; y points down
    heart point  u + iv, from the LV apex; v points to the base. u < 0 is the septum's side
    image point = sector.apex + sector.turn * heart point
Shapes: N points, T frames, R x A cells of the polar grid.
"""
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_matrix

from common.flags import UserError, parse_flags, run_main
from data.dataset import LEADS
from data.ecgsyn import MARGIN_S, RHYTHMS, make_ecg, usual_systole
from data.writer import prepare


@dataclass
class PhantomConfig:
    """Flags of `python -m sources.phantom`."""
    out: str = "datasets/phantom"  # folder to write
    clips: int = 1000              # clips in the train split
    val: int = 64                  # clips in the val split
    test: int = 128                # clips in the test split
    size: int = 64                 # height and width in pixels
    fps: float = 25.0              # frames per second
    any_fps: float = 0.0           # share of the training clips with a random rate, 8 to 60 a second
    frames: int = 64               # frames a clip
    hr: float = 0.0                # heart rate of all clips, beats a minute; 0 = drawn
    any_hr: float = 0.0            # share of the training clips with any heart rate, 35 to 175 a minute
    any_qt: float = 0.0            # share of them with QT interval and systole 0.8 to 1.4 times the usual
    views: str = "A4C"             # of the clips, drawn from this list: A4C, A2C
    rhythm: str = ""               # of all clips: sinus, ectopic, pause, asystole, flat, af; empty = drawn
    seed: int = 0                  # the same seed gives the same bytes, whatever the number of workers
    workers: int = 0               # processes; 0 = one a core


DIASTASIS = 0.82    # filling without the atria; 1 = end of diastole, 0 = end of systole
VIEWS = ["A4C", "A2C"]
DISKS = (np.arange(100) + 0.5) / 100    # heights of the method of disks: 0 = apex, 1 = base


# ---------------------------------------------------------------------------- 2. filling curve

class Beat(NamedTuple):
    """One beat of the filling curve, from its R peak to the next; times in s, fillings 0..1."""
    r: float            # R peak
    next_r: float       # the next R peak
    systole: float      # length of ejection
    relax: float        # from the end of ejection to the begin of filling
    fill: float         # length of early filling
    kick: float         # when the atria contract
    begin: float        # filling at the R peak
    emptied: float      # filling after ejection
    rest: float         # filling after early filling
    has_kick: bool      # the atria contract only if the next beat has a P wave


def smoothstep(x):
    """0 below 0, 1 above 1, and an S-shaped curve between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def filling_of_beat(beat, t):
    """LV filling (0..1) at times t within a beat: ejection, early filling, atrial kick."""
    b = beat
    ejection = (b.emptied - b.begin) * smoothstep((t - b.r) / b.systole)
    early = (b.rest - b.emptied) * smoothstep((t - b.r - b.systole - b.relax) / b.fill)
    kick_length = max(b.next_r - b.kick, 0.03)
    atrial = (1 - b.rest) * b.has_kick * smoothstep((t - b.kick) / kick_length)
    return b.begin + ejection + early + atrial


def plan_beats(beats):
    """The Beats of a rhythm (data.ecgsyn). The first is the stillness before the first R peak."""
    full = 1.0 if beats.af else DIASTASIS
    r = [-1e3, *beats.r, 1e3]
    rr = [beats.rr0, *beats.rr]
    ectopic = [False, *beats.ectopic]
    has_kick = [*beats.p, False]
    begin = full
    for k in range(len(r) - 1):
        systole = usual_systole(rr[k]) * beats.qt
        relax = 0.2 * (min(beats.rr0, 0.8) - systole)
        fill = min(0.6 * (beats.rr0 - systole), 0.26 + 0.2 * beats.af)
        # A normal beat empties to 0. An early (ectopic) one ejects half, the stillness nothing.
        remaining = 0.0
        if ectopic[k]:
            remaining = 0.5
        if k == 0:
            remaining = 1.0
        emptied = begin * remaining
        kick = max(r[k + 1] - 0.12, r[k] + systole + relax)
        beat = Beat(r[k], r[k + 1], systole, relax, fill, kick, begin, emptied,
                    max(full, emptied), has_kick[k])
        yield beat
        # The next R peak ends this beat wherever its filling is
        begin = filling_of_beat(beat, r[k + 1])


def filling_curve(beats, at):
    """LV filling (1 end of diastole, 0 end of systole) and opening of the valves (0..1), (T,) each,
    at times `at` (T,) in s, for a rhythm of data.ecgsyn."""
    step = 0.002
    time = np.arange(at[0] - 4, at[-1] + 0.5, step)
    filling = np.full(len(time), np.nan)
    shut = np.zeros(len(time), bool)
    for k, beat in enumerate(plan_beats(beats)):
        now = (time >= beat.r) & (time < beat.next_r)
        filling[now] = filling_of_beat(beat, time[now])
        # Mitral and tricuspid valves are shut during ejection and half of relaxation
        shut[now] = (time[now] < beat.r + beat.systole + 0.5 * beat.relax) & (k > 0)
    filling = gaussian_filter1d(filling, 4)
    # An open valve opens further, the faster blood flows in
    inflow = np.clip(np.gradient(filling, step) / 2.5, 0, 1)
    opening = gaussian_filter1d(~shut * (0.3 + 0.7 * inflow), 10)
    return np.interp(at, time, filling), np.interp(at, time, opening)


# ---------------------------------------------------------------------------- 3. anatomy

@dataclass
class Heart:
    """The sizes of one heart at the reference, in cm unless stated otherwise."""
    length: float       # LV, apex to base
    belly: float        # height at which the LV is widest, share of its length
    power: float        # shape of the LV's outline: smaller is rounder
    wall: float         # thickness of the LV wall
    rv_width: float     # right ventricle; 0 in a two-chamber view
    la_length: float    # left atrium
    la_width: float     # half-width of the left atrium
    ra_length: float    # right atrium
    width: float        # largest half-width of the LV

    @property
    def edv(self):
        """End-diastolic volume in ml, by the method of disks."""
        return np.pi * self.length * np.mean((self.width * profile(self, DISKS)) ** 2)


class Sector(NamedTuple):
    """What the transducer sees, and where the heart lies in it."""
    apex: complex       # of the LV: image point, cm
    turn: complex       # rotation of the heart, a number of modulus 1
    half_angle: float   # of the sector, radians
    depth: float        # of the sector, cm
    pitch: float        # of the pixels, cm
    size: int           # height and width in pixels


def profile(heart, s, squeeze=0.0):
    """LV half-width at height s (0 apex .. 1 base), largest = 1.

    squeeze is how far the LV has contracted, 1 at EF 60. The mitral ring takes less part in it.
    """
    outline = np.clip(1 - (s / heart.belly - 1) ** 2, 0, 1) ** heart.power
    return outline * (1 + 0.25 * squeeze * np.clip(s, 0, 1) ** 3)


def draw_heart(rng, dilated):
    """A random heart. dilated (0..1): an ill LV is longer and rounder, and its wall thinner."""
    length = rng.uniform(7.6, 9.2) + 0.9 * dilated
    belly = rng.uniform(0.57, 0.66)
    power = rng.uniform(0.42, 0.55)
    wall = rng.uniform(0.8, 1.15) - 0.2 * dilated
    rv_width = rng.uniform(2.1, 3.3)
    la_length = rng.uniform(3.4, 4.6) + 0.8 * dilated
    la_width = rng.uniform(1.9, 2.5)
    ra_length = rng.uniform(3.2, 4.4)
    width = length * (0.265 + 0.085 * dilated + rng.normal(0, 0.008))
    return Heart(length, belly, power, wall, rv_width, la_length, la_width, ra_length, width)


def draw_sector(rng, heart, size):
    """A random Sector for a heart, in a square image of `size` pixels."""
    turn = complex(np.exp(-1j * np.deg2rad(rng.uniform(-11, 13))))
    top = rng.uniform(1.6, 3.0)
    # The middle of the LV lies a little right of the sector's axis
    middle = 0.55j * heart.length * turn
    right = float((top + middle.imag) * np.tan(rng.uniform(0, 0.16)) - middle.real)
    apex = 1j * top + right
    # The sector is wide enough to show the whole contour of the LV
    sides = np.array([[-1], [1]]) * heart.width * profile(heart, DISKS)     # 2 x 100
    contour = apex + (sides + 1j * DISKS * heart.length) * turn
    needed = 0.05 + np.abs(np.arctan2(contour.real, contour.imag)).max()
    half_angle = float(max(rng.uniform(0.63, 0.78), needed))
    depth = top + (heart.length + heart.la_length) * turn.real + rng.uniform(0.6, 2.2)
    pitch = depth * rng.uniform(1.0, 1.1) / size
    return Sector(apex, turn, half_angle, depth, pitch, size)


def arch(x):
    """A quarter circle: 1 at x = 0, 0 from x = 1 on."""
    return np.sqrt(np.clip(1 - x ** 2, 0, 1))


def layers(heart, v):
    """The borders at heights v (N,) of the reference, three half-widths or widths (N,) in cm: inside
    of the LV or left atrium, outside of its wall, and the right heart beside it."""
    s = v / heart.length
    below = np.maximum(v - heart.length, 0)     # cm behind the mitral ring

    # Inside: the LV, then an atrium that widens from the ring to la_width
    ring = heart.width * profile(heart, 1.0)
    widening = np.minimum(3 * below / heart.la_length, 1)
    atrium = arch(below / heart.la_length) * (ring + (heart.la_width - ring) * widening)
    inner = np.where(s < 1, heart.width * profile(heart, s), atrium)

    # Outside: the wall also covers the apex, and thins to 0.25 cm round the atrium
    height = (v + 0.8 * heart.wall) / (heart.length + 0.8 * heart.wall)
    around = (heart.width + heart.wall) * profile(heart, height)
    thick = (0.25 + (heart.wall - 0.25) * np.exp(-2 * below)) * arch(below / (heart.la_length + 0.3))
    outer = np.where(s < 1, around, atrium + thick)

    # The right ventricle ends before the apex, and its ring lies higher than the mitral one
    ventricle = np.clip(s / 0.75 - 0.267, 0, 1) ** 0.6
    right_atrium = arch((v - 0.95 * heart.length) / (heart.ra_length + 0.4))
    right = np.where(s < 0.95, ventricle, right_atrium)
    return inner, np.maximum(outer, inner), heart.rv_width * right


# ---------------------------------------------------------------------------- 4. motion

def beat_shape(heart, volume):
    """LV length (cm), half-width (cm) and squeeze of each frame, (3, T) float32: the shape whose
    method of disks gives `volume` (T,) in ml."""
    squeeze = (1 - volume / heart.edv) / 0.6
    # At EF 60 the base comes down by 16 %; the width makes up the rest of the volume
    length = heart.length * (volume / heart.edv) ** 0.19
    disks = profile(heart, DISKS[:, None], squeeze)                     # 100 x T
    width = np.sqrt(volume / (np.pi * length * np.mean(disks ** 2, 0)))
    return np.stack([length, width, squeeze]).astype(np.float32)


def move(heart, w, shape):
    """Where the material points w (N,), heart points at the reference, are in each frame: (N, T).

    shape (3, T) is beat_shape's.
    """
    length, width, squeeze = shape

    def column(x):
        """(N,) -> (N, 1), against the frames."""
        return x.astype(np.float32)[:, None]
    u, v = column(w.real), column(w.imag)
    inner, outer, right = map(column, layers(heart, w.imag))
    s = np.clip(v / heart.length, 0, 1)
    r = np.abs(u)
    beyond = np.clip(r - outer, 0, (u < 0) * right)                     # cm into the right heart
    fade = np.exp(-np.maximum(r - outer - beyond - 0.5, 0) / 1.5)       # far tissue stays still
    lv = np.exp(-np.maximum(v - heart.length, 0))                       # 1 in the LV, to 0 in the atria

    # Sideways: the cavity scales with the LV's width; the atria widen while the LV contracts
    ratio = width / heart.width * (1 + 0.25 * squeeze * s ** 3)
    scale = 1 + lv * (ratio - 1) + 0.1 * squeeze * (1 - lv)             # N T
    # The wall keeps its volume, a shell round the long axis: so it thickens as it shortens
    core = np.minimum(r, inner)
    shell = np.minimum(r, outer)
    stretch = 1 + lv * (heart.length / length - 1)
    grown = np.sqrt((core * scale) ** 2 + (shell ** 2 - core ** 2) * stretch)
    r = r + (grown - shell - 0.25 * squeeze * beyond) * fade

    # Along the axis: the base moves towards the apex, the right heart's ring a little more
    down = s * np.clip(1 - (v - heart.length) / heart.la_length, 0, 1) * (1 + 0.1 * beyond) * fade
    return np.sign(u) * r + 1j * (v + (length - heart.length) * down)


def draw_mask(heart, sector, shape, breath):
    """Inside of the LV contour in each frame: uint8 (T, H, W). breath (T,) shifts the heart."""
    length, width, squeeze = shape[:, :, None, None]                    # T 1 1 each
    row, column = np.mgrid[:sector.size, :sector.size]
    pixel = (column - (sector.size - 1) / 2 + 1j * row + 0.5j) * sector.pitch
    w = (pixel - sector.apex - breath[:, None, None]) / sector.turn     # T H W
    s = (w.imag / length).astype(np.float32)
    inside = np.abs(w.real) < width * profile(heart, s, squeeze)
    return ((s > 0) & (s < 1) & inside).astype(np.uint8)


# ---------------------------------------------------------------------------- 5. scatterers

class Scatterers(NamedTuple):
    """The points that reflect."""
    z: np.ndarray       # image points in each frame, (N, T) complex64
    db: np.ndarray      # level of the echo in dB, (N,)
    swirl: np.ndarray   # turns a second of the phase by itself, in blood only, (N,)


def echo_level(rng, heart, w):
    """Echo of reference points w (N,) in dB, and which of them are blood (N,)."""
    u, v = w.real, w.imag
    r = np.abs(u)
    s = v / heart.length
    inner, outer, right = layers(heart, v)
    outside = r - outer - (u < 0) * right               # cm beyond the free walls
    behind = v - heart.length - heart.la_length         # cm beyond the left atrium
    blood = (outside < 0) & ((r < inner) | (r >= outer))

    # Tissue: the first condition that holds gives the level; none holds in the lung
    septum, lateral, pericardium, lung, deep = rng.uniform([-10, -14, -7, -36, -7], [-4, -6, 3, -22, 1])
    lv_wall = np.where(u < 0, septum, lateral)
    regions = [
        (outside < 0, np.where(s < 1, lv_wall, -13)),                   # walls of LV and atria
        (outside < 0.3 * (u < 0), -13),                                 # free wall of the right heart
        ((outside < 0.4) & (s > 0.15) & (behind < 0), pericardium),
        ((v < -0.4) & (r < 4), -14),                                    # chest wall above the apex
        (behind > 0, deep - 4 * np.maximum(behind - 0.8, 0) - 3 * outside.clip(0, 4))]
    conditions, levels = zip(*regions)
    lung_db = lung + 12 * np.exp(-np.maximum(outside, 0) / rng.uniform(1, 3))
    db = np.select(conditions, levels, lung_db)

    # Tissue is uneven: a sum of six random waves
    patches = 0
    for along_u, along_v, phase in rng.normal(0, [1.2, 1.2, 9], (6, 3)):
        patches = patches + np.sin(along_u * u + along_v * v + phase)

    # Blood is dark, with trabeculae at the apex and, in 6 of 10 hearts, a papillary muscle
    pool = rng.uniform(-46, -37) + 12 * np.exp(-(s / 0.22) ** 2) * (r < inner)
    distance = ((u - 0.75 * inner) / 0.5) ** 2 + ((s - rng.uniform(.45, .6)) / .12) ** 2
    muscle = distance < (rng.random() < 0.6)
    level = np.where(blood, np.where(muscle, -18, pool), db)
    return level + rng.uniform(1.2, 3) * patches, blood


def leaflets(rng, heart, shape, opening, n):
    """Mitral and tricuspid leaflets, n points each: heart points (4 n, T). opening (T,) is 0..1."""
    # They hang on the rings, which move with the tissue; the tricuspid ring lies 0.5 cm higher
    (inner, _), (_, outer), (_, right) = layers(heart, heart.length - np.array([0, 0.5]))
    hinge = 0.97 * np.array([-inner, inner, -outer - right, -outer])
    ring = move(heart, hinge + 1j * (heart.length - np.array([0, 0, 0.5, 0.5])), shape)     # 4 T
    along = rng.random((n, 1))                          # place on the leaflet, 0 = hinge
    angle = np.deg2rad(14 + 60 * opening) * (1.15 - 0.3 * along)        # n T, from ring towards apex
    # Each leaflet points to the opposite hinge and has a share of the ring's width as its length
    leaves = []
    for k, (opposite, share) in enumerate([(1, 0.62), (0, 0.48), (3, 0.55), (2, 0.55)]):
        across = hinge[opposite] - hinge[k]
        direction = across * np.cos(angle) - 1j * abs(across) * np.sin(angle)
        leaves.append(ring[k] + share * along * direction)              # n T
    return np.concatenate(leaves) + rng.normal(0, 0.05, (4 * n, 2)) @ [[1], [1j]]


def draw_scatterers(rng, heart, sector, shape, *, opening, breath):
    """Random Scatterers of tissue and blood, of the valves, and of the haze near the transducer.

    shape (3, T), opening (T,) of the valves, breath (T,): shift of the heart in cm.
    """
    # 1. Tissue and blood, over the whole sector, a little denser near the transducer
    n = int(1.4 * sector.size ** 2 + 5000)
    t = rng.uniform(-sector.half_angle - 0.06, sector.half_angle + 0.06, n)
    r = (sector.depth + 0.5) * rng.random(n) ** 0.55
    tissue = (1j * r * np.exp(-1j * t) - sector.apex) / sector.turn
    db, blood = echo_level(rng, heart, tissue)

    # 2. Valves
    valves = leaflets(rng, heart, shape, opening, n // 80)

    # 3. Haze: reverberation within 5 cm of the transducer, which does not move
    near = 5 * rng.random(n // 10)
    haze = 1j * near * np.exp(-1j * rng.uniform(-sector.half_angle, sector.half_angle, len(near)))
    haze_db = (rng.uniform(-14, -5) - rng.uniform(4, 9) * near
               + 4 * np.sin(rng.uniform(3, 6) * near))

    # Together: the heart moves, turns into the image and shifts with breathing
    moving = np.concatenate([move(heart, tissue, shape), valves])       # heart points
    z = sector.apex + breath + sector.turn * moving                     # image points
    z = np.concatenate([z, haze[:, None].repeat(len(breath), 1)]).astype(np.complex64)
    db = np.concatenate([db, np.full(len(valves), rng.uniform(-16, -9)), haze_db])
    swirl = np.pad(3 * rng.standard_normal(n) * blood, (0, len(z) - n))
    return Scatterers(z, db, swirl)


# ---------------------------------------------------------------------------- 6. image formation

class PolarGrid(NamedTuple):
    """The beams: A angles with R samples each, and the size of the point-spread function (PSF)."""
    radius: np.ndarray  # of the samples, (R,) cm
    fine: np.ndarray    # twice as dense, in which scatterers are placed, (2 R or less,) cm
    angle: np.ndarray   # of the beams, (A,) radians
    sigma_r: float      # of the PSF along the beam, cm
    sigma_t: float      # and across, radians


def draw_polar_grid(rng, sector):
    """A PolarGrid for a sector. The PSF is wider than 1.5 pixels, so the image does not alias."""
    sigma_r = rng.uniform(0.8, 1.1) * (0.04 + 0.75 * sector.pitch)
    sigma_t = rng.uniform(0.85, 1.2) * (0.008 + 0.08 * sector.pitch)
    half = sector.half_angle
    fine = np.arange(0, sector.depth + max(0.5, 1.6 * sigma_r), sigma_r / 2.6)
    angle = np.arange(-half - 0.06, half + max(0.07, 1.3 * sigma_t), sigma_t / 1.25)
    return PolarGrid(fine[::2], fine, angle, sigma_r, sigma_t)


def received_echo(rng, grid, scatterers, fps):
    """The signal behind the transducer: [real part, imaginary part], (R, A, T) float32 each."""
    f4 = np.float32
    z, db, swirl = scatterers
    n, frames = z.shape
    shape = len(grid.fine), len(grid.angle), frames

    # 1. The cell of the fine grid in which each scatterer lies
    r = np.abs(z)
    t = np.arctan2(z.real, z.imag)
    i = (r / grid.fine[1] + 0.5).astype(int)
    j = ((t - grid.angle[0]) / (grid.angle[1] - grid.angle[0]) + 0.5).astype(int)
    good = (i < shape[0]) & (j >= 0) & (j < shape[1])
    cell = np.where(good, (i * shape[1] + j) * frames + np.arange(frames), 0).ravel()   # N * T

    # 2. Phase and amplitude. The carrier's phase turns as a scatterer moves along the beam, which
    #    makes speckle; that of blood also turns by itself.
    own = np.outer(swirl, np.arange(frames) / fps) + rng.random((n, 1))
    phase = r * (6.283 / (2.2 * grid.sigma_r)) + 6.283 * own.astype(f4)                 # N T
    amplitude = good * (10 ** (db / 20) * rng.rayleigh(0.7, n)).astype(f4)[:, None]

    # 3. Sum the scatterers of each cell, then blur by the PSF: along the beam, then across
    pulse = np.exp(-0.5 * ((grid.radius[:, None] - grid.fine) / grid.sigma_r) ** 2).astype(f4)
    beam = np.exp(-0.5 * ((grid.angle[:, None] - grid.angle) / grid.sigma_t) ** 2).astype(f4)
    echo = []
    for part in (np.cos, np.sin):
        field = np.bincount(cell, (amplitude * part(phase)).ravel(), shape[0] * shape[1] * frames)
        field = pulse @ field.astype(f4).reshape(shape[0], -1)                          # R, A * T
        echo.append(beam @ field.reshape(len(grid.radius), len(grid.angle), frames))    # R A T
    return echo


def draw_gain(rng, sector, grid):
    """Gain (R, A, 1) in dB: uneven contact, at times a lateral shadow, faint edges, and what the
    machine's depth compensation leaves."""
    angle = grid.angle
    smooth = 0.09 / (angle[1] - angle[0])
    uneven = gaussian_filter1d(rng.standard_normal(len(angle)), smooth, mode="wrap")
    shadow = np.exp(-((angle - rng.uniform(0.3, 0.6)) / rng.uniform(0.06, 0.14)) ** 2)
    contact = uneven / uneven.std() * rng.uniform(0.5, 2.5)
    gain = contact - rng.uniform(6, 14) * (rng.random() < 0.3) * shadow
    edges = 9 * smoothstep((np.abs(angle) / sector.half_angle - 0.65) / 0.35)
    gain = gain - edges - rng.uniform(2, 8)
    slope = rng.normal(0, 0.35)                         # dB a cm
    gain = gain + slope * (grid.radius[:, None] - sector.depth / 2)                     # R A
    return gain[..., None].astype(np.float32)


def scan_conversion(sector, grid):
    """From polar to Cartesian, bilinear, as a sparse matrix (H * W, R * A). The rows of pixels
    outside the sector are empty."""
    size = sector.size
    n = len(grid.angle)
    row, column = np.divmod(np.arange(size * size), size)
    x = (column - (size - 1) / 2) * sector.pitch
    y = (row + 0.5) * sector.pitch
    r = np.hypot(x, y)
    t = np.arctan2(x, y)
    inside = np.flatnonzero((np.abs(t) < sector.half_angle) & (r < sector.depth) & (r > 0.3))
    # Each pixel lies between four cells: two radii, two angles
    i, fi = np.divmod(r[inside] / grid.radius[1], 1)
    j, fj = np.divmod((t[inside] - grid.angle[0]) / (grid.angle[1] - grid.angle[0]), 1)
    weights = np.concatenate([(1 - fi) * (1 - fj), (1 - fi) * fj, fi * (1 - fj), fi * fj])
    cells = (i * n + j + np.array([[0], [1], [n], [n + 1]])).astype(int)
    entries = weights.astype(np.float32), (np.tile(inside, 4), cells.ravel())
    return csr_matrix(entries, (size * size, len(grid.radius) * n))


def render(rng, sector, scatterers, *, fps, noise):
    """The video of scatterers, uint8 (T, H, W). noise scales that of the receiver; 1 is usual."""
    f4 = np.float32
    size = sector.size
    frames = scatterers.z.shape[1]
    grid = draw_polar_grid(rng, sector)
    echo = received_echo(rng, grid, scatterers, fps)
    # 1. Bright tissue of frame 0 has power 1; the receiver's noise grows with depth
    unit = np.sqrt(np.percentile(echo[0][..., 0] ** 2 + echo[1][..., 0] ** 2, 97))
    floor_db = rng.uniform(-58, -48) + 8 * grid.radius / sector.depth
    floor = (noise * 10 ** (floor_db / 20)).astype(f4)[:, None, None]                   # R 1 1
    power = 0
    for x in echo:
        power = power + (x / unit + floor * rng.standard_normal(x.shape, f4)) ** 2
    # 2. Log compression: a dynamic range of 45 to 60 dB, and the machine's grey map
    level = 10 * np.log10(power + 1e-12) + draw_gain(rng, sector, grid)                 # R A T
    grey = np.clip(1 + level / rng.uniform(45, 60), 0, 1.2) ** rng.uniform(1.2, 1.7) * 230
    # 3. Scan conversion
    image = scan_conversion(sector, grid) @ grey.reshape(-1, frames)                    # H * W, T
    return np.clip(image.T.reshape(frames, size, size), 0, 255).round().astype(np.uint8)


# ---------------------------------------------------------------------------- one clip, and the set

class Job(NamedTuple):
    """What fixes a clip of the set."""
    name: str
    seed: tuple     # of whole numbers
    fps: float
    view: str
    hr: float       # beats a minute, 0 = drawn
    qt: float       # times the usual


def random_job(config, split, i, clips):
    """The Job of clip i of `clips` in a split (0 train, 1 val, 2 test).

    Each choice has a generator of its own. So a flag changes nothing but its own choice.
    """
    def rng(choice):
        """The generator of a choice of this clip."""
        return np.random.default_rng((config.seed, split, i, choice))
    train = split == 0
    # The clips with a frame rate of their own come last
    fps = config.fps
    if train and i >= round(clips * (1 - config.any_fps)):
        fps = round(8 * 7.5 ** rng(1).random(), 2)
    view = str(rng(2).choice(config.views.split(",")))
    hr = config.hr
    share, rate = rng(3).random(2)
    if train and share < config.any_hr:
        hr = 35 * 5 ** rate
    qt = 1.0
    share, stretch = rng(4).random(2)
    if train and share < config.any_qt:
        qt = 0.8 + 0.6 * stretch
    name = f"{('train', 'val', 'test')[split]}{i:06d}"
    return Job(name, (config.seed, split, i), fps, view, hr, qt)


def list_jobs(config):
    """{split: Jobs}. The split is part of each seed, so no clip is in two splits."""
    jobs = {}
    for number, split in enumerate(("train", "val", "test")):
        clips = (config.clips, config.val, config.test)[number]
        jobs[split] = [random_job(config, number, i, clips) for i in range(clips)]
    return jobs


def make_clip(seed, *, size=64, frames=64, fps=25.0, hr=None, ef=None, rhythm=None, noise=1.0,
              view="A4C", qt=1.0):
    """One clip as Writer.add takes it: video (T, H, W, 1) uint8, mask (T, H, W) uint8, volume (T,)
    ml, ecg (N, 12) mV from 1 s before the first frame to 1 s after the last, and its labels.

    seed: a whole number or a tuple of them. hr (a minute), ef (points) and rhythm (a key of
    RHYTHMS) are drawn if None. Systole lasts qt times the usual, and the T wave comes with its end.
    A two-chamber view (A2C) is the same heart without its right half.
    """
    # 1. Rhythm and ECG, whose morphology shows the EF
    rng = np.random.default_rng(seed)
    rhythm = rhythm or rng.choice(list(RHYTHMS), p=list(RHYTHMS.values()))
    seconds = frames / fps + 2 * MARGIN_S
    e = make_ecg(rng, seconds, start=-MARGIN_S, hr=hr, rhythm=rhythm, ef=ef, noise=noise, qt=qt)

    # 2. A heart, the fourth sign of whose failure is dilation, and its place in the image
    heart = draw_heart(rng, float(e.signs[3]))
    sector = draw_sector(rng, heart, size)
    if view != "A4C":
        heart.rv_width = 0.0

    # 3. Its volume over time, and the shape that has this volume
    time = np.arange(frames) / fps
    filling, opening = filling_curve(e.beats, time)
    volume = heart.edv * (1 - e.ef / 100 * (1 - filling))
    shape = beat_shape(heart, volume)
    rocking = np.sin(6.283 * (rng.uniform(.15, .35) * time + rng.random()))
    breath = rocking * (rng.normal(0, .08, 2) @ [1, 1j])

    # 4. Scatterers that move with it, and their image
    scatterers = draw_scatterers(rng, heart, sector, shape, opening=opening, breath=breath)
    video = render(rng, sector, scatterers, fps=fps, noise=noise)[..., None]            # T H W 1
    clip = dict(video=video, ecg=e.ecg, mask=draw_mask(heart, sector, shape, breath),
                volume=volume, fps=fps, ecg_offset_s=-MARGIN_S, view=view,
                r_peaks_s=[round(float(r), 3) for r in e.r_peaks])

    # 5. Labels; a heart that stands still has no EF
    if rhythm == "flat":
        return clip | dict(text=f"{view} view, no heartbeat")
    text = f"{view} view, EF {e.ef:.0f}, heart rate {e.hr:.0f}"
    esv = heart.edv * (1 - e.ef / 100)
    return clip | dict(text=text, ef=round(e.ef, 2), edv_ml=round(heart.edv, 2), esv_ml=round(esv, 2))


def make_job_clip(job, config):
    """A Job -> the clip as Writer.add takes it. In the other sources this is make_clip."""
    clip = make_clip(job.seed, size=config.size, frames=config.frames, fps=job.fps, view=job.view,
                     hr=job.hr or None, qt=job.qt, rhythm=config.rhythm or None)
    return {"id": job.name} | clip


def check_config(config):
    """UserError where a flag has a value that cannot be."""
    counts = config.clips, config.val, config.test
    if min(counts) < 0 or config.size < 16 or config.frames < 1 or config.fps <= 0:
        raise UserError("clips, val and test must be 0 or more, size 16 or more, frames and fps above 0")
    for key in ("any_fps", "any_hr", "any_qt"):
        share = getattr(config, key)
        if not 0 <= share <= 1:
            raise UserError(f"--{key}={share:g} is a share, 0 to 1")
    if config.rhythm and config.rhythm not in RHYTHMS or config.hr and not 20 <= config.hr <= 220:
        raise UserError(f"--rhythm is one of {', '.join(RHYTHMS)}; --hr 20 to 220 a minute, or 0")
    if set(config.views.split(",")) - set(VIEWS):
        raise UserError(f"--views={config.views}: a list of {', '.join(VIEWS)}")


def main():
    """Write the prepared set."""
    config = parse_flags(PhantomConfig)
    print(config)
    check_config(config)
    jobs = list_jobs(config)
    meta = dict(name=os.path.basename(config.out.rstrip("/")), fps=config.fps,
                height=config.size, width=config.size, channels=1, leads=LEADS, source="phantom",
                command=" ".join(["sources.phantom", *sys.argv[1:]]))
    prepare(config.out, meta, jobs, partial(make_job_clip, config=config), config.workers)


if __name__ == "__main__":
    run_main(main)
