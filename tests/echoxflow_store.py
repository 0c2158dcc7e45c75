"""A small EchoXFlow: Zarr stores and croissant.json as the set has them, for tests and smoke runs.

    python -m tests.echoxflow_store FOLDER          # 32 phantom clips, for recipes/echoxflow.sh
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates

from sources.phantom import make_clip

GEOMETRY = dict(depth_start_m=0.01, depth_end_m=0.15, tilt_rad=0.1, width_rad=1.2)
CLOCK = 7.5         # s, of frame 0
BEATS = np.arange(-0.4, 4, 0.8)


def beam_spot(geometry, depth, angle, shape=(280, 120)):
    """A beamspace frame: grey 40, and a bright spot at a depth (m) and an angle (rad)."""
    half = geometry["width_rad"] / 2
    d = np.linspace(geometry["depth_start_m"], geometry["depth_end_m"], shape[0])[:, None]
    a = np.linspace(geometry["tilt_rad"] - half, geometry["tilt_rad"] + half, shape[1])
    distance = np.hypot(d - depth, depth * (a - angle))
    return (40 + 200 * np.exp(-(distance / 0.004) ** 2)).astype(np.uint8)


def spikes(times):
    """An ECG in units of no known size with R peaks at BEATS."""
    return 1e4 + 3e3 * np.exp(-((times[:, None] - BEATS) / 0.012) ** 2).sum(1)


def contours(frames):
    """Five circles (frames, 40 * 5, 2) around (1, 8) cm, the inner one of 2 cm; frame 0 is missing."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)[:, None] * (0.02 + 0.002 * np.arange(5)[:, None])
    points = np.tile(([0.01, 0.08] + circle).reshape(-1, 2), (frames, 1, 1))
    points[0] = np.nan
    return points


def write_store(path, manifest, zarr_format=3, **arrays):
    """A Zarr store, a zip where the path ends in .zip: arrays by their path with __ for /."""
    import zarr
    path.parent.mkdir(parents=True, exist_ok=True)
    place = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else str(path)
    group = zarr.create_group(store=place, overwrite=path.suffix != ".zip", zarr_format=zarr_format,
                              attributes=dict(recording_manifest=manifest))
    for name, array in arrays.items():
        group.create_array(name.replace("__", "/"), data=np.asarray(array))
    if path.suffix == ".zip":
        place.close()


def write_cine(src, exam, name, *, end="zarr", zarr_format=3, geometry=GEOMETRY, **change):
    """A recording of 75 frames at 25 a second, with arrays changed; returns its catalogue row."""
    times, ecg_times = np.arange(75) / 25, np.arange(-0.6, 3.6, 1 / 400)
    arrays = dict(data__2d_brightness_mode=np.tile(beam_spot(GEOMETRY, 0.1, 0.2), (75, 1, 1)),
                  timestamps__2d_brightness_mode=np.float32(CLOCK + times),
                  data__ecg=np.float32(spikes(ecg_times)), timestamps__ecg=np.float32(CLOCK + ecg_times))
    sector = dict(semantic_id="bmode", frames={"array_path": "data/2d_brightness_mode"}, geometry=geometry)
    path = f"{exam}/{name}.{end}"
    arrays = {key: value for key, value in (arrays | change).items() if value is not None}
    write_store(src / path, dict(sectors=[sector]), zarr_format, **arrays)
    return dict(exam_id=exam, recording_id=name, zarr_path=path, content_types=["2d_brightness_mode"],
                array_paths=[key.replace("__", "/") for key in arrays])


def write_strain(src, exam, cine, role, beats=BEATS, geometry=GEOMETRY, **change):
    """A strain recording of a cine, with contours of the frames 20 .. 44; returns its catalogue row."""
    times = np.float32(CLOCK + np.arange(20, 45) / 25)
    arrays = {f"data__{role}_contour": contours(25), f"timestamps__{role}_contour": times,
              f"data__{role}_ecg_qrs": np.ones(len(beats)),
              f"timestamps__{role}_ecg_qrs": np.float32(CLOCK + beats)} | change
    linked = dict(recording_id=cine, recording_zarr_path=f"{exam}/{cine}.zarr")
    annotation = dict(target=dict(semantic_id=role, field="contour_points"),
                      value={"zarr_path": f"data/{role}_contour"}, time={"zarr_path": f"timestamps/{role}_contour"})
    write_store(src / exam / f"{cine}_strain.zarr", dict(
        annotation_type="left_ventricular_strain", annotations=[annotation],
        linked_panels=[dict(role_id=role, view_code=role.upper(), geometry=geometry, linked_recording=linked)]),
        **arrays)
    return dict(exam_id=exam, recording_id=f"{cine}_strain", zarr_path=f"{exam}/{cine}_strain.zarr",
                content_types=["2d_left_ventricular_strain"], array_paths=[f"data/{role}_contour"])


def write_catalogue(src, rows):
    """croissant.json of recordings."""
    data = [{f"recordings/{key}": value for key, value in row.items()} for row in rows]
    (src / "croissant.json").write_text(json.dumps({"recordSet": [{"@id": "recordings", "data": data}]}))


# ---------------------------------------------------------------------------- phantom clips

DEPTH_M = 0.16
PHANTOM_GEOMETRY = dict(depth_start_m=0.0, depth_end_m=DEPTH_M, tilt_rad=0.0, width_rad=1.5)


def to_beamspace(video):
    """Square frames (T, S, S), the apex in the middle of the upper edge -> (T, 200, 96) uint8."""
    size = video.shape[1]
    depth = np.linspace(0, size, 200)[:, None]
    angle = np.linspace(-0.75, 0.75, 96)
    at = [depth * np.cos(angle) - 0.5, depth * np.sin(angle) + size / 2 - 0.5]
    return np.stack([map_coordinates(frame, at, order=1) for frame in video])


def to_contour(mask):
    """A mask (S, S) -> points (60 * 5, 2) in metres: down its left side, up its right one."""
    size = len(mask)
    spans = [(y, np.flatnonzero(line)) for y, line in enumerate(mask) if line.any()]
    left = [(x[0], y + 0.5) for y, x in spans]
    right = [(x[-1] + 1, y + 0.5) for y, x in spans]
    edge = np.array(left + right[::-1])
    edge = edge[np.linspace(0, len(edge) - 1, 60).round().astype(int)]      # 60 2
    # The five lines of a contour, from the endocardium outwards.
    middle = edge.mean(0)
    lines = middle + (edge - middle)[:, None] * np.linspace(1, 1.3, 5)[:, None]
    return ((lines - (size / 2, 0)) * DEPTH_M / size).reshape(-1, 2)


def write_phantoms(src, many=32):
    """Phantom clips of 2 s as recordings; three of four have a strain recording."""
    rows = []
    for i in range(many):
        exam, name = f"study{i:02d}", f"cine{i:02d}"
        clip = make_clip((9, i), frames=50, fps=25, rhythm="sinus")
        times = CLOCK + np.arange(50) / 25
        ecg = 1000 * clip["ecg"][:, 1]              # lead II, in units of its own
        ecg_times = CLOCK + clip["ecg_offset_s"] + np.arange(len(ecg)) / 250
        rows.append(write_cine(
            src, exam, name, geometry=PHANTOM_GEOMETRY,
            data__2d_brightness_mode=to_beamspace(clip["video"][..., 0]),
            timestamps__2d_brightness_mode=np.float32(times),
            data__ecg=np.float32(ecg), timestamps__ecg=np.float32(ecg_times)))
        if i % 4 != 3:
            contour = np.stack([to_contour(mask) for mask in clip["mask"][10:40]])
            rows.append(write_strain(
                src, exam, name, "4ch", beats=np.array(clip["r_peaks_s"]), geometry=PHANTOM_GEOMETRY,
                data__4ch_contour=contour, timestamps__4ch_contour=np.float32(times[10:40])))
    # A recording without its store, as after a download that broke off.
    shutil.rmtree(src / rows[-1]["zarr_path"])
    write_catalogue(src, rows)


if __name__ == "__main__":
    write_phantoms(Path(sys.argv[1]))
