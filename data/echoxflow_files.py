"""EchoXFlow's layout: its catalogue, its Zarr stores, their manifests; for sources.echoxflow.

    croissant.json                  record set "recordings": exam, id, path and arrays of each
    EXAM/NAME.zarr (or a zip)       a recording, with the attribute recording_manifest:
        data/2d_brightness_mode     (T, depth, angle) uint8
        data/ecg                    (N,) float32, unit unknown
        timestamps/NAME             times of data/NAME in s, all on one clock
    A strain recording's manifest links panels (4ch, 2ch, 3ch, ...) to the cines that it measures:
        data/4ch_contour            (F, points, 2), x and y in metres, on the cine's clock
        timestamps/4ch_ecg_qrs      QRS triggers
"""
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.flags import UserError
from data.beamspace import Sector
from data.ecg_files import refuse

FRAMES = "data/2d_brightness_mode"
VIEWS = {"4ch": "A4C", "2ch": "A2C", "3ch": "A3C"}
ROLES = {   # of a panel, as manifests write them in lower case with _, and the key of VIEWS
    "4ch": "4ch", "4_ch": "4ch", "4_chamber": "4ch", "apical_four_chamber": "4ch", "a4c": "4ch",
    "2ch": "2ch", "2_ch": "2ch", "2_chamber": "2ch", "apical_two_chamber": "2ch", "a2c": "2ch",
    "3ch": "3ch", "3_ch": "3ch", "3_chamber": "3ch", "apical_three_chamber": "3ch", "a3c": "3ch",
}
CONTOUR_LINES = 5       # a contour is points of 5 lines in turn; the first line is the endocardium
SAME_BEAT_S = 0.1       # QRS triggers that are nearer than this are one


class Strain(NamedTuple):
    """What a strain recording says of one cine."""
    path: Path          # its Zarr store
    role: str           # 4ch, 2ch, 3ch, rv, ...
    panel: dict         # of the manifest
    annotations: list   # of the manifest, those of this panel
    is_lv: bool         # of the left ventricle; otherwise of an atrium or the right ventricle


# ---------------------------------------------------------------------------- the catalogue

def record_set(catalogue, name):
    """Rows of a record set of croissant.json, without the prefix `name/` of their keys."""
    rows = []
    for part in catalogue.get("recordSet") or []:
        if part.get("@id") == name:
            for row in part.get("data") or []:
                rows.append({key.removeprefix(f"{name}/"): value for key, value in row.items()})
    return rows


def read_catalogue(src):
    """The recordings of croissant.json as dicts; UserError where there is none."""
    path = Path(src) / "croissant.json"
    if not src or not path.is_file():
        raise UserError(f"--src={src}: a folder with EchoXFlow's croissant.json is needed")
    try:
        rows = record_set(json.loads(path.read_text()), "recordings")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not read as a catalogue: {error}") from None
    whole = []
    for row in rows:
        names = {key: str(row.get(key) or "") for key in ("exam_id", "recording_id", "zarr_path")}
        if all(names.values()):
            whole.append(row | names)
    if len(whole) < len(rows):
        print(f"{path}: {len(rows) - len(whole)} recordings without exam, id or path are left out",
              file=sys.stderr)
    refuse(not whole, path, "no recording in it")
    return whole


def contents(row):
    """Names of what a recording of the catalogue holds: its arrays and content types."""
    names = [*(row.get("array_paths") or []), *(row.get("content_types") or [])]
    return [str(name).removeprefix("data/") for name in names]


def is_cine(row):
    """Whether a recording holds a single-plane B-mode alone, without Doppler, M-mode or volume."""
    names = contents(row)
    other = any("doppler" in name or name.startswith(("1d_", "3d_")) for name in names)
    return "2d_brightness_mode" in names and not other


def is_strain(row):
    """Whether a recording holds contours or strain of another."""
    return any("strain" in name or name.endswith("_contour") for name in contents(row))


# ---------------------------------------------------------------------------- Zarr stores

def open_store(path):
    """A Zarr store, folder or zip, as a group; UserError where it cannot be read."""
    import zarr
    refuse(not path.exists(), path, "no such file or folder; croissant.json names it")
    try:
        if path.is_file():
            return zarr.open_group(store=zarr.storage.ZipStore(path, mode="r"), mode="r")
        return zarr.open_group(str(path), mode="r")
    except Exception as error:
        # zarr and zipfile raise many kinds of error
        raise UserError(f"{path}: not read as a Zarr store: {one_line(error)}") from None


def one_line(error):
    """The text of an error as one line, or its kind where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def manifest_of(group):
    """The manifest of a recording, {} where it has none."""
    manifest = dict(group.attrs).get("recording_manifest")
    return manifest if isinstance(manifest, dict) else {}


def dicts(value):
    """The dicts of a list in a manifest; [] where it is no list."""
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict)]


def array_path(reference):
    """The path in a manifest's reference to an array, "" where there is none."""
    if not isinstance(reference, dict):
        return ""
    for key in ("array_path", "zarr_path", "path"):
        if reference.get(key):
            return str(reference[key]).strip("/")
    return ""


def numbers(group, path, *, ndim=1):
    """A small array of floats of a store; UserError where its shape is another."""
    array = np.asarray(group[path][:], float)
    if array.ndim != ndim:
        raise UserError(f"{path} has the shape {array.shape}")
    return array


# ---------------------------------------------------------------------------- strain recordings

def role_of(panel):
    """4ch, 2ch or 3ch where a panel's role or view is an apical one; else its role as it stands."""
    role = ""
    for key in ("role_id", "semantic_id", "view_code", "view"):
        text = str(panel.get(key) or "").strip().lower().replace("-", "_").replace(" ", "_")
        if text in ROLES:
            return ROLES[text]
        role = role or text
    return role


def read_strains(path, row):
    """[(linked recording dict, Strain)] of the panels of a strain recording."""
    manifest = manifest_of(open_store(path))
    kind = " ".join([str(manifest.get("annotation_type")), *contents(row)])
    is_lv = "left_ventricular" in kind
    found = []
    for panel in dicts(manifest.get("linked_panels")):
        role = role_of(panel)
        names = role, panel.get("role_id")
        own = []
        for annotation in dicts(manifest.get("annotations")):
            target = annotation.get("target")
            if isinstance(target, dict) and target.get("semantic_id") in names:
                own.append(annotation)
        linked = panel.get("linked_recording")
        if isinstance(linked, dict):
            found.append((linked, Strain(path, role, panel, own, is_lv)))
    return found


def strains_of_cines(src, rows):
    """{recording id: [Strain]} of all strain recordings; those that cannot be read are said."""
    by_path = {str(row["zarr_path"]).strip("/"): row["recording_id"] for row in rows}
    strains = defaultdict(list)
    for row in filter(is_strain, rows):
        try:
            found = read_strains(Path(src) / row["zarr_path"], row)
        except UserError as error:
            print(f"its views and contours are left out: {error}", file=sys.stderr)
            continue
        for linked, strain in found:
            path = str(linked.get("recording_zarr_path") or "").strip("/")
            strains[linked.get("recording_id") or by_path.get(path)].append(strain)
    return strains


def view_of(strains):
    """The key of VIEWS that the strain recordings of a Job name, "" where none does."""
    for strain in strains:
        if strain.role in VIEWS:
            return strain.role
    return ""


def find_contour(strain):
    """Paths of a strain recording's contour points and of their times; None where it has none."""
    for annotation in strain.annotations:
        points = array_path(annotation.get("value"))
        times = array_path(annotation.get("time"))
        field = str(annotation["target"].get("field"))
        if points and times and ("contour" in field or points.endswith("_contour")):
            return points, times
    return None


def read_contour(strains, origin):
    """Endocardium of the left ventricle: times (F,) in s after `origin`, points (F, N, 2) in m.

    None where no strain recording has it.
    """
    for strain in strains:
        paths = find_contour(strain)
        if not strain.is_lv or strain.role not in VIEWS or paths is None:
            continue
        group = open_store(strain.path)
        if paths[0] not in group or paths[1] not in group:
            continue
        points = numbers(group, paths[0], ndim=3)                               # F N 2
        times = numbers(group, paths[1])                                        # F
        F, N, xy = points.shape
        if len(times) != F or N < 3 or xy != 2:
            raise UserError(f"{strain.path}: contours {points.shape}, {len(times)} times of them")
        if N % CONTOUR_LINES == 0:
            points = points[:, ::CONTOUR_LINES]
        known = np.isfinite(points).all((1, 2)) & np.isfinite(times)
        if known.any():
            return times[known] - origin, points[known]
    return None


def triggers_in(mapping):
    """QRS triggers (n,) that a part of a manifest lists."""
    found = []
    for part in (mapping, mapping.get("metadata")):
        for key in ("ecg_qrs_trigger_times", "qrs_trigger_times"):
            if isinstance(part, dict) and part.get(key):
                found.append(np.ravel(np.asarray(part[key], float)))
    return found


def read_triggers(strains, group):
    """QRS triggers (n,) in s on the clock of the frames, a recording's own and its strains'."""
    places = [(group, ["ecg_qrs"])]
    found = triggers_in(manifest_of(group)) + triggers_in(find_sector(manifest_of(group)))
    for strain in strains:
        places.append((open_store(strain.path), [f"{strain.role}_ecg_qrs", f"{strain.role}_qrs"]))
        found += triggers_in(strain.panel) + triggers_in(strain.panel["linked_recording"])
    for store, names in places:
        for name in names:
            # The times; where there are none, the values are times
            for path in (f"timestamps/{name}", f"data/{name}"):
                if path in store:
                    found.append(numbers(store, path))
                    break
    times = np.concatenate([*found, []])
    times = np.unique(times[np.isfinite(times)])
    # One trigger may be in two lists, rounded otherwise
    return times[np.diff(times, prepend=-math.inf) > SAME_BEAT_S]


# ---------------------------------------------------------------------------- geometry

def find_sector(manifest):
    """The part of the manifest that describes the B-mode; {} where there is none."""
    sectors = dicts(manifest.get("sectors"))
    for sector in sectors:
        if array_path(sector.get("frames")) == FRAMES:
            return sector
    for sector in sectors:
        name = str(sector.get("semantic_id") or sector.get("sector_role_id"))
        if name == "bmode" or name.startswith("sector_") and "_b_mode" in name:
            return sector
    return {}


def read_geometry(strains, manifest):
    """The Sector of a recording, by its own manifest or by that of a strain recording of it."""
    panels = [strain.panel for strain in strains]
    for part in [find_sector(manifest), *panels]:
        values = part.get("geometry")
        if not isinstance(values, dict):
            continue
        # depth_start_m and DepthStart are two spellings of one thing
        value = {}
        for key, number in values.items():
            value[key.lower().replace("_", "").removesuffix("m").removesuffix("rad")] = number
        try:
            near = float(value["depthstart"])
            far = float(value["depthend"])
            if "anglestart" in value:
                left, right = float(value["anglestart"]), float(value["angleend"])
            else:
                half = float(value["width"]) / 2
                middle = float(value.get("tilt") or value.get("angle") or 0)
                left, right = middle - half, middle + half
        except (KeyError, TypeError, ValueError):
            continue
        if 0 <= near < far < math.inf and -math.pi <= left < right <= math.pi:
            return Sector(near, far, left, right)
    raise UserError("its manifest has no geometry of the sector")
