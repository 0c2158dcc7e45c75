"""How well the ECG is read off drawn screens, of random looks: the table of docs/data.md.

    python -m tests.screen_table --seed=304 --cines=100     # two cores: four minutes
"""
from collections import Counter
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from common.flags import UserError, parse_flags, run_main
from data.ecg_signal import find_r_peaks
from data.screen_ecg import read_screen_ecg
from tests.screen_cines import COLOURS, Look, draw_cine

EDGE_S = 0.02       # beats nearer to the start or the end of a cine do not count
HIT_S = 0.02        # an R peak this near to a beat has found it
INVENTED_S = 0.08   # one that is farther than this from every beat lies in no QRS complex


@dataclass
class TableConfig:
    """Flags of the table."""
    seed: int = 304     # of the looks and the ECGs
    cines: int = 100    # how many are drawn


def random_look(rng):
    """A random Look of the three kinds."""
    kind = str(rng.choice(["sweep", "cursor", "scroll"]))
    place = str(rng.choice(["under", "over", "within"]))
    fps = float(rng.choice([8, 10, 15, 20, 25, 30, 40, 50, 60]))
    seconds = float(rng.uniform(1, 6 if fps <= 30 else 4))
    span = float(rng.uniform(2, 4))
    if kind == "cursor":
        span = max(span, seconds * rng.uniform(1.15, 1.4))
    width = int(rng.integers(300, 560))
    if kind == "cursor":
        width = int(np.clip(70 * span, width, 580))
    colour = str(rng.choice(list(COLOURS)))
    alpha = float(rng.uniform(0.45, 0.8)) if place == "within" else 1.0
    extras = "r_marks", "rate", "ticks", "axis", "breath"
    clutter = tuple(name for name in extras if rng.random() < 0.35)
    return Look(kind=kind, colour=colour, place=place, alpha=alpha, fps=fps, seconds=seconds,
                width=width, span=span, height=int(rng.integers(20, 60)),
                line=int(rng.integers(1, 4)), smooth=bool(rng.random() < 0.6),
                gap=int(rng.integers(5, 41)), marker=str(rng.choice(["bar", "dot", "triangle"])),
                blank=bool(rng.random() < 0.25), clutter=clutter,
                quality=int(rng.integers(75, 86)),
                rhythm=str(rng.choice(["sinus"] * 6 + ["ectopic", "af"])))


def measure_cine(n, seed):
    """Counts of cine n: cines, beats; if it is read also read, kind, beats_read, hit, invented."""
    rng = np.random.default_rng(seed)
    for _ in range(n + 1):
        look = random_look(rng)
    frames, times, r_peaks, _ = draw_cine(look, seed * 1000 + n)
    beats = r_peaks[(r_peaks >= EDGE_S) & (r_peaks <= times[-1] - EDGE_S)]
    counts = Counter(cines=1, beats=len(beats))
    try:
        screen = read_screen_ecg(frames, times)
    except UserError:
        return counts
    found = screen.start_s + find_r_peaks(screen.ecg[None].astype(float))
    found = found[(found >= -HIT_S) & (found <= times[-1] + HIT_S)]
    away = np.abs(found[:, None] - r_peaks)                             # found, beats
    hit = np.abs(found[:, None] - beats) <= HIT_S
    return counts + Counter(read=1, kind=int(screen.kind == look.kind), beats_read=len(beats),
                            hit=int(hit.any(0).sum()),
                            invented=int((away.min(1) > INVENTED_S).sum()))


def main():
    """Draw, read, and print one line."""
    config = parse_flags(TableConfig)
    total = Counter()
    with get_context("spawn").Pool() as pool:
        cines = pool.imap(partial(measure_cine, seed=config.seed), range(config.cines))
        for counts in tqdm(cines, total=config.cines, unit="cine"):
            total += counts
    print(f"seed {config.seed}: {total['read']} of {total['cines']} read, {total['kind']} of their "
          f"kinds right; R peaks within 20 ms {total['hit']} of {total['beats_read']}, "
          f"of all cines {total['hit']} of {total['beats']}; invented {total['invented']}")


if __name__ == "__main__":
    run_main(main)
