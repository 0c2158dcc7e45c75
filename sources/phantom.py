"""A procedural apical four-chamber echocardiogram with its 12-lead ECG: data that needs no download.

    python -m sources.phantom --out=datasets/phantom --clips=1000   # a core: 0.07 s a clip, --size=128 0.25 s

ECG: each beat is five Gaussian waves P Q R S T in its phase (ECGSYN: McSharry et al., IEEE TBME 50:289, 2003,
in closed form), each a dipole projected on 12 leads (Dower, J Electrocardiol 13:119, 1980). Echo: the left
ventricle (LV) is largest at the R peak, empties in electromechanical systole (Weissler et al., Circulation
37:149, 1968), fills early, rests, and is topped up by the atria after P. Scatterers move with the tissue; a
polar point-spread function, log compression and scan conversion make the image. The ejection fraction (EF)
follows from what can be seen: QRS width, T wave, R amplitude, a large round LV. Volume is the method of disks
on the drawn contour, so EF, masks and R peaks are exact ground truth.

Lengths are in cm. Points are complex: x + iy in the image, from the transducer, y down; u + iv in the heart,
from the LV apex, v to the base. "Reference" is the end of diastole. N points, T frames, R x A polar cells.
"""
import os
import sys
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_matrix

from common.flags import UserError, parse_flags, run_main
from data.dataset import LEADS
from data.ecgsyn import MARGIN_S, RHYTHMS, make_ecg, usual_systole
from data.writer import prepare


@dataclass
class PhantomConfig:
    out: str = "datasets/phantom"  # folder to write
    clips: int = 1000              # clips in the train split
    val: int = 64                  # clips in the val split
    test: int = 128                # clips in the test split
    size: int = 64                 # height and width in pixels
    fps: float = 25.0              # frames per second
    any_fps: float = 0.0           # share of the training clips with a rate of their own, 8 to 60 a second
    frames: int = 64               # frames a clip
    hr: float = 0.0                # heart rate of all clips, beats a minute; 0 = drawn
    any_hr: float = 0.0            # share of the training clips with any heart rate, 35 to 175 a minute
    any_qt: float = 0.0            # share of them with QT interval and systole 0.8 to 1.4 times the usual
    views: str = "A4C"             # of the clips, drawn from this list: A4C, A2C
    rhythm: str = ""               # sinus, ectopic, pause, asystole, flat or af for all clips; empty = drawn
    seed: int = 0                  # the same seed gives the same bytes, whatever the number of workers
    workers: int = 0               # processes; 0: one a core


DIASTASIS = 0.82                   # filling without the atria; 1 = end of diastole, 0 = end of systole
VIEWS = ["A4C", "A2C"]
DISKS = (np.arange(100) + 0.5) / 100             # heights of the method of disks, 0 apex .. 1 base


# ---------------------------------------------------------------------------- rhythm and ECG


# ---------------------------------------------------------------------------- the moving heart

def smoothstep(x):
    """0 below 0, 1 above 1, an S between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def filling_curve(beats, at):
    """LV filling (1 end of diastole, 0 end of systole) and opening of the valves (0..1) at times `at` (s)."""
    time, rest = np.arange(at[0] - 4, at[-1] + 0.5, 0.002), 1.0 if beats.af else DIASTASIS
    filling, shut = np.full(len(time), rest), np.zeros(len(time), bool)
    # Beat 0 is the stillness before the first one
    rr, ectopic, p = [beats.rr0, *beats.rr], [False, *beats.ectopic], [*beats.p, False]
    level, r = rest, [-1e3, *beats.r, 1e3]
    for k in range(len(r) - 1):
        systole = usual_systole(rr[k]) * beats.qt
        relax = 0.2 * (min(beats.rr0, 0.8) - systole)
        fill = min(0.6 * (beats.rr0 - systole), 0.26 + 0.2 * beats.af)
        left = level * (1.0 if k == 0 else 0.5 if ectopic[k] else 0.0)   # an early beat empties badly
        top, kick = max(rest, left), max(r[k + 1] - 0.12, r[k] + systole + relax)

        def curve(t):
            """Ejection, early filling, and the atrial kick only a P wave brings; the next beat ends it."""
            return (level + (left - level) * smoothstep((t - r[k]) / systole)
                    + (top - left) * smoothstep((t - r[k] - systole - relax) / fill)
                    + (1 - top) * p[k] * smoothstep((t - kick) / max(r[k + 1] - kick, 0.03)))
        now = (time >= r[k]) & (time < r[k + 1])
        filling[now], shut[now] = curve(time[now]), (time[now] < r[k] + systole + 0.5 * relax) & (k > 0)
        level = curve(r[k + 1])
    filling = gaussian_filter1d(filling, 4)
    opening = gaussian_filter1d(~shut * (0.3 + 0.7 * np.clip(np.gradient(filling, 0.002) / 2.5, 0, 1)), 10)
    return np.interp(at, time, filling), np.interp(at, time, opening)


def profile(a, s, squeeze=0.0):
    """LV half-width at height s (0 apex .. 1 base), largest = 1; squeeze (contraction) spares the ring."""
    return np.clip(1 - (s / a.belly - 1) ** 2, 0, 1) ** a.power * (1 + 0.25 * squeeze * np.clip(s, 0, 1) ** 3)


def draw_anatomy(rng, dilated):
    """One heart at the reference: sizes in cm, edv in ml, and its place in a sector of half-angle `half`."""
    sizes = dict(length=(7.6, 9.2), belly=(0.57, 0.66), power=(0.42, 0.55), wall=(0.8, 1.15), rv=(2.1, 3.3),
                 la=(3.4, 4.6), la_width=(1.9, 2.5), ra=(3.2, 4.4))
    a = SimpleNamespace(**{name: rng.uniform(*limits) for name, limits in sizes.items()})
    a.length, a.wall, a.la = a.length + 0.9 * dilated, a.wall - 0.2 * dilated, a.la + 0.8 * dilated
    a.width = a.length * (0.265 + 0.085 * dilated + rng.normal(0, 0.008))           # rounder when ill
    a.edv = np.pi * a.length * np.mean((a.width * profile(a, DISKS)) ** 2)
    a.turn, top = complex(np.exp(-1j * np.deg2rad(rng.uniform(-11, 13)))), rng.uniform(1.6, 3.0)
    # The middle of the LV lies a little right of the sector's axis; the sector opens as far as the LV needs
    middle = 0.55j * a.length * a.turn
    a.apex = 1j * top + float((top + middle.imag) * np.tan(rng.uniform(0, 0.16)) - middle.real)
    contour = a.apex + (np.array([[-1], [1]]) * a.width * profile(a, DISKS) + 1j * DISKS * a.length) * a.turn
    a.half = float(max(rng.uniform(0.63, 0.78), 0.05 + np.abs(np.arctan2(contour.real, contour.imag)).max()))
    a.depth = top + (a.length + a.la) * a.turn.real + rng.uniform(0.6, 2.2)
    return a


def beat_shape(a, volume):
    """LV length, half-width (cm) and squeeze per frame, whose method of disks gives `volume` (T,) in ml."""
    squeeze = (1 - volume / a.edv) / 0.6
    length = a.length * (volume / a.edv) ** 0.19                         # EF 60: the base comes down by 16 %
    width = np.sqrt(volume / (np.pi * length * np.mean(profile(a, DISKS[:, None], squeeze) ** 2, 0)))
    return np.stack([length, width, squeeze]).astype(np.float32)


def layers(a, v):
    """Reference heights v: half-width of LV or left atrium, of its outer wall, width of the right heart."""
    s, below, ring = v / a.length, np.maximum(v - a.length, 0), a.width * profile(a, 1.0)
    arch = lambda x: np.sqrt(np.clip(1 - x ** 2, 0, 1))
    atrium = arch(below / a.la) * (ring + (a.la_width - ring) * np.minimum(3 * below / a.la, 1))
    inner = np.where(s < 1, a.width * profile(a, s), atrium)
    around = (a.width + a.wall) * profile(a, (v + 0.8 * a.wall) / (a.length + 0.8 * a.wall))
    thick = (0.25 + (a.wall - 0.25) * np.exp(-2 * below)) * arch(below / (a.la + 0.3))
    outer = np.where(s < 1, around, atrium + thick)
    right_atrium = arch((v - 0.95 * a.length) / (a.ra + 0.4))
    right = np.where(s < 0.95, np.clip(s / 0.75 - 0.267, 0, 1) ** 0.6, right_atrium)
    return inner, np.maximum(outer, inner), a.rv * right


def move(a, w, shape):
    """Material points w (N,), complex heart coordinates at the reference -> where they are, (N, T)."""
    length, width, squeeze = shape
    u, v, inner, outer, right = (x.astype(np.float32)[:, None] for x in (w.real, w.imag, *layers(a, w.imag)))
    s, r = np.clip(v / a.length, 0, 1), np.abs(u)
    beyond = np.clip(r - outer, 0, (u < 0) * right)                      # how far into the right heart
    fade = np.exp(-np.maximum(r - outer - beyond - 0.5, 0) / 1.5)        # far tissue stays where it is
    lv = np.exp(-np.maximum(v - a.length, 0))                            # 1 in the LV, fading into the atria
    scale = 1 + lv * (width / a.width * (1 + 0.25 * squeeze * s ** 3) - 1) + 0.1 * squeeze * (1 - lv)
    # The cavity scales; the wall keeps its volume (a shell round the long axis): it thickens as it shortens
    core, shell = np.minimum(r, inner), np.minimum(r, outer)
    grown = np.sqrt((core * scale) ** 2 + (shell ** 2 - core ** 2) * (1 + lv * (a.length / length - 1)))
    r = r + (grown - shell - 0.25 * squeeze * beyond) * fade
    down = s * np.clip(1 - (v - a.length) / a.la, 0, 1) * (1 + 0.1 * beyond) * fade
    return np.sign(u) * r + 1j * (v + (length - a.length) * down)


def draw_mask(a, size, pitch, shape, breath):
    """Inside of the LV contour: uint8 (T, H, W)."""
    length, width, squeeze = shape[:, :, None, None]
    row, column = np.mgrid[:size, :size]
    w = ((column - (size - 1) / 2 + 1j * row + 0.5j) * pitch - a.apex - breath[:, None, None]) / a.turn
    s = (w.imag / length).astype(np.float32)
    return ((s > 0) & (s < 1) & (np.abs(w.real) < width * profile(a, s, squeeze))).astype(np.uint8)


# ---------------------------------------------------------------------------- what reflects, and its image

def echo_level(rng, a, w):
    """Reflection of reference points w (N,) in dB, and where it is blood (N,)."""
    u, v, r, s, (inner, outer, right) = w.real, w.imag, np.abs(w.real), w.imag / a.length, layers(a, w.imag)
    outside = r - outer - (u < 0) * right                                # cm beyond the free walls
    behind = v - a.length - a.la                                         # cm beyond the left atrium
    blood = (outside < 0) & ((r < inner) | (r >= outer))
    septum, lateral, pericardium, lung, deep = rng.uniform([-10, -14, -7, -36, -7], [-4, -6, 3, -22, 1])
    db = np.select([outside < 0, outside < 0.3 * (u < 0), (outside < 0.4) & (s > 0.15) & (behind < 0),
                    (v < -0.4) & (r < 4), behind > 0],
                   [np.where(s < 1, np.where(u < 0, septum, lateral), -13), -13, pericardium,
                    -14, deep - 4 * np.maximum(behind - 0.8, 0) - 3 * outside.clip(0, 4)],
                   lung + 12 * np.exp(-np.maximum(outside, 0) / rng.uniform(1, 3)))
    patches = sum(np.sin(k[0] * u + k[1] * v + k[2]) for k in rng.normal(0, [1.2, 1.2, 9], (6, 3)))
    pool = rng.uniform(-46, -37) + 12 * np.exp(-(s / 0.22) ** 2) * (r < inner)        # trabeculae at the apex
    muscle = ((u - 0.75 * inner) / 0.5) ** 2 + ((s - rng.uniform(.45, .6)) / .12) ** 2 < (rng.random() < 0.6)
    return np.where(blood, np.where(muscle, -18, pool), db) + rng.uniform(1.2, 3) * patches, blood


def leaflets(rng, a, shape, opening, n):
    """Mitral and tricuspid leaflets (4 n, T), heart coordinates; they hang on moving points of the rings."""
    (inner, _), (_, outer), (_, right) = layers(a, a.length - np.array([0, 0.5]))
    hinge = 0.97 * np.array([-inner, inner, -outer - right, -outer])
    ring = move(a, hinge + 1j * (a.length - np.array([0, 0, 0.5, 0.5])), shape)
    along, leaves = rng.random((n, 1)), []
    angle = np.deg2rad(14 + 60 * opening) * (1.15 - 0.3 * along)         # from the ring towards the apex
    for k, (other, share) in enumerate([(1, 0.62), (0, 0.48), (3, 0.55), (2, 0.55)]):
        across = hinge[other] - hinge[k]
        leaves.append(ring[k] + share * along * (across * np.cos(angle) - 1j * abs(across) * np.sin(angle)))
    return np.concatenate(leaves) + rng.normal(0, 0.05, (4 * n, 2)) @ [[1], [1j]]


def scan_conversion(a, size, pitch, radius, angle):
    """Polar to Cartesian, bilinear, as a sparse matrix (H * W, R * A); rows outside the sector are empty."""
    row, column = np.divmod(np.arange(size * size), size)
    x, y = (column - (size - 1) / 2) * pitch, (row + 0.5) * pitch
    r, t, n = np.hypot(x, y), np.arctan2(x, y), len(angle)
    inside = np.flatnonzero((np.abs(t) < a.half) & (r < a.depth) & (r > 0.3))
    i, fi = np.divmod(r[inside] / radius[1], 1)
    j, fj = np.divmod((t[inside] - angle[0]) / (angle[1] - angle[0]), 1)
    weights = np.concatenate([(1 - fi) * (1 - fj), (1 - fi) * fj, fi * (1 - fj), fi * fj]).astype(np.float32)
    cells = (i * n + j + np.array([[0], [1], [n], [n + 1]])).astype(int)
    return csr_matrix((weights, (np.tile(inside, 4), cells.ravel())), (size * size, len(radius) * n))


def draw_gain(rng, a, radius, angle):
    """Gain (R, A, 1) in dB: uneven contact, faint edges, at times a lateral shadow, what the TGC leaves."""
    uneven = gaussian_filter1d(rng.standard_normal(len(angle)), 0.09 / (angle[1] - angle[0]), mode="wrap")
    shadow = np.exp(-((angle - rng.uniform(0.3, 0.6)) / rng.uniform(0.06, 0.14)) ** 2)
    gain = uneven / uneven.std() * rng.uniform(0.5, 2.5) - rng.uniform(6, 14) * (rng.random() < 0.3) * shadow
    gain = gain - 9 * smoothstep((np.abs(angle) / a.half - 0.65) / 0.35) - rng.uniform(2, 8)
    return (gain + rng.normal(0, 0.35) * (radius[:, None] - a.depth / 2))[..., None].astype(np.float32)


def render(rng, a, size, pitch, z, db, swirl, fps, noise):
    """Scatterers at image points z (N, T), level db (N,), turning at swirl (N,) Hz -> uint8 (T, H, W)."""
    (n, frames), f4 = z.shape, np.float32
    sigma_r = rng.uniform(0.8, 1.1) * (0.04 + 0.75 * pitch)              # PSF in cm, radians: > 1.5 pixels
    sigma_t = rng.uniform(0.85, 1.2) * (0.008 + 0.08 * pitch)
    fine = np.arange(0, a.depth + max(0.5, 1.6 * sigma_r), sigma_r / 2.6)
    angle = np.arange(-a.half - 0.06, a.half + max(0.07, 1.3 * sigma_t), sigma_t / 1.25)
    radius, r, t = fine[::2], np.abs(z), np.arctan2(z.real, z.imag)
    i, j = (r / fine[1] + 0.5).astype(int), ((t - angle[0]) / (angle[1] - angle[0]) + 0.5).astype(int)
    good = (i < len(fine)) & (j >= 0) & (j < len(angle))
    cell = np.where(good, (i * len(angle) + j) * frames + np.arange(frames), 0).ravel()
    # The carrier's phase turns as a scatterer moves along the beam: speckle; blood also turns on its own
    own = np.outer(swirl, np.arange(frames) / fps) + rng.random((n, 1))
    phase = r * (6.283 / (2.2 * sigma_r)) + 6.283 * own.astype(f4)
    amplitude = good * (10 ** (db / 20) * rng.rayleigh(0.7, n)).astype(f4)[:, None]
    pulse = np.exp(-0.5 * ((radius[:, None] - fine) / sigma_r) ** 2).astype(f4)
    beam, echo = np.exp(-0.5 * ((angle[:, None] - angle) / sigma_t) ** 2).astype(f4), []
    for part in (np.cos, np.sin):                                        # real, imaginary
        field = np.bincount(cell, (amplitude * part(phase)).ravel(), len(fine) * len(angle) * frames)
        field = pulse @ field.astype(f4).reshape(len(fine), -1)                                # R, A * T
        echo.append(beam @ field.reshape(len(radius), len(angle), frames))                     # R A T
    unit = np.sqrt(np.percentile(echo[0][..., 0] ** 2 + echo[1][..., 0] ** 2, 97))         # bright in frame 0
    floor = (noise * 10 ** ((rng.uniform(-58, -48) + 8 * radius / a.depth) / 20)).astype(f4)   # receiver
    power = sum((x / unit + floor[:, None, None] * rng.standard_normal(x.shape, f4)) ** 2 for x in echo)
    level = 10 * np.log10(power + 1e-12) + draw_gain(rng, a, radius, angle)
    grey = np.clip(1 + level / rng.uniform(45, 60), 0, 1.2) ** rng.uniform(1.2, 1.7) * 230
    image = scan_conversion(a, size, pitch, radius, angle) @ grey.reshape(-1, frames)          # H * W, T
    return np.clip(image.T.reshape(frames, size, size), 0, 255).round().astype(np.uint8)


# ---------------------------------------------------------------------------- one clip, and the set

def make_clip(seed, size=64, frames=64, fps=25.0, hr=None, ef=None, rhythm=None, noise=1.0, view="A4C",
              qt=1.0):
    """One clip as Writer.add takes it; hr, ef, rhythm (a key of RHYTHMS), noise can be fixed. Systole lasts
    qt times the usual, and the T wave with it.

    A two-chamber view (A2C) is the same heart without its right half.

    video (T, H, W, 1) uint8, mask (T, H, W) uint8, volume (T,) ml, ecg (N, 12) mV from 1 s before the first
    frame to 1 s after the last. seed: a whole number or a tuple of them.
    """
    rng = np.random.default_rng(seed)
    rhythm = rhythm or rng.choice(list(RHYTHMS), p=list(RHYTHMS.values()))
    e = make_ecg(rng, frames / fps + 2 * MARGIN_S, -MARGIN_S, hr, rhythm, ef, noise, qt)
    a, time = draw_anatomy(rng, float(e.signs[3])), np.arange(frames) / fps
    a.rv *= view == "A4C"
    filling, opening = filling_curve(e.beats, time)
    volume = a.edv * (1 - e.ef / 100 * (1 - filling))
    shape, pitch = beat_shape(a, volume), a.depth * rng.uniform(1.0, 1.1) / size
    breath = np.sin(6.283 * (rng.uniform(.15, .35) * time + rng.random())) * (rng.normal(0, .08, 2) @ [1, 1j])
    n = int(1.4 * size ** 2 + 5000)
    t, r = rng.uniform(-a.half - 0.06, a.half + 0.06, n), (a.depth + 0.5) * rng.random(n) ** 0.55
    tissue = (1j * r * np.exp(-1j * t) - a.apex) / a.turn
    db, blood = echo_level(rng, a, tissue)
    valves = leaflets(rng, a, shape, opening, n // 80)
    near = 5 * rng.random(n // 10)                                       # still reverberation near the probe
    haze = 1j * near * np.exp(-1j * rng.uniform(-a.half, a.half, len(near)))
    haze_db = rng.uniform(-14, -5) - rng.uniform(4, 9) * near + 4 * np.sin(rng.uniform(3, 6) * near)
    z = a.apex + breath + a.turn * np.concatenate([move(a, tissue, shape), valves])
    z = np.concatenate([z, haze[:, None].repeat(frames, 1)]).astype(np.complex64)
    db = np.concatenate([db, np.full(len(valves), rng.uniform(-16, -9)), haze_db])
    swirl = np.pad(3 * rng.standard_normal(n) * blood, (0, len(z) - n))
    video = render(rng, a, size, pitch, z, db, swirl, fps, noise)[..., None]
    clip = dict(video=video, ecg=e.ecg, mask=draw_mask(a, size, pitch, shape, breath), volume=volume, fps=fps,
                ecg_offset_s=-MARGIN_S, view=view, r_peaks_s=[round(float(x), 3) for x in e.r_peaks])
    if rhythm == "flat":                                                 # a heart that stands still has no EF
        return clip | dict(text=f"{view} view, no heartbeat")
    return clip | dict(text=f"{view} view, EF {e.ef:.0f}, heart rate {e.hr:.0f}", ef=round(e.ef, 2),
                       edv_ml=round(a.edv, 2), esv_ml=round(a.edv * (1 - e.ef / 100), 2))


def numbered_clip(job, **how):
    name, seed, fps, view, hr, qt = job
    return {"id": name} | make_clip(seed, fps=fps, view=view, hr=hr or None, qt=qt, **how)


def list_jobs(cfg):
    """(name, seed, fps, view, hr or 0, qt) of every clip by split. The split is part of the seed, so no
    clip of one split can be in another; the clips with frames at a rate of their own come last."""
    def draw(*key):
        return np.random.default_rng((cfg.seed, *key))
    def fps(s, i, n):
        own = s == 0 and i >= round(n * (1 - cfg.any_fps))
        return round(8 * 7.5 ** draw(s, i, 1).random(), 2) if own else cfg.fps
    def view(s, i):
        return str(draw(s, i, 2).choice(cfg.views.split(",")))
    def hr(s, i):
        share, rate = draw(s, i, 3).random(2)
        return 35 * 5 ** rate if s == 0 and share < cfg.any_hr else cfg.hr
    def qt(s, i):
        share, stretch = draw(s, i, 4).random(2)
        return 0.8 + 0.6 * stretch if s == 0 and share < cfg.any_qt else 1.0
    counts = dict(train=cfg.clips, val=cfg.val, test=cfg.test)
    return {split: [(f"{split}{i:06d}", (cfg.seed, s, i), fps(s, i, n), view(s, i), hr(s, i), qt(s, i))
                    for i in range(n)] for s, (split, n) in enumerate(counts.items())}


def main():
    cfg = parse_flags(PhantomConfig)
    print(cfg)
    if min(cfg.clips, cfg.val, cfg.test) < 0 or cfg.size < 16 or cfg.frames < 1 or cfg.fps <= 0:
        raise UserError("clips, val and test must be 0 or more, size 16 or more, frames and fps above 0")
    if not all(0 <= share <= 1 for share in (cfg.any_fps, cfg.any_hr, cfg.any_qt)):
        raise UserError(f"--any_fps={cfg.any_fps:g}, --any_hr={cfg.any_hr:g} and --any_qt={cfg.any_qt:g} are "
                        "shares, 0 to 1")
    meta = dict(name=os.path.basename(cfg.out.rstrip("/")), fps=cfg.fps, height=cfg.size, width=cfg.size,
                channels=1, leads=LEADS, source="phantom", command=" ".join(["sources.phantom", *sys.argv[1:]]))
    if cfg.rhythm and cfg.rhythm not in RHYTHMS or cfg.hr and not 20 <= cfg.hr <= 220:
        raise UserError(f"--rhythm is one of {', '.join(RHYTHMS)}; --hr 20 to 220 a minute, or 0")
    if set(cfg.views.split(",")) - set(VIEWS):
        raise UserError(f"--views={cfg.views}: a list of {', '.join(VIEWS)}")
    make = partial(numbered_clip, size=cfg.size, frames=cfg.frames, rhythm=cfg.rhythm or None)
    prepare(cfg.out, meta, list_jobs(cfg), make, cfg.workers)


if __name__ == "__main__":
    run_main(main)
