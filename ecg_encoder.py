"""Stage 2a, the ECG (ECHOPulse section 3.2): read a file, clean it, find its beats, encode it (ST-MEM's ViT).

Every ECG becomes (L, N) millivolts at 250 Hz. The encoder (Na et al. 2024) cuts each lead into patches of 75
samples (0.3 s); only leads that are there are encoded. The output is a sequence: it keeps the beats' times.

    cleaned ECG (B, L, N), leads (L,)  ->  Z (B, L, N/75, D)

Run it to pretrain the encoder as a masked autoencoder, 75 % of the patches hidden; writes OUT/ecg_encoder.pt:

    python ecg_encoder.py --data=datasets/phantom --out=runs/ecg --minutes=10
"""
import copy
import re
import sys
import time
import warnings
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from scipy.ndimage import percentile_filter, uniform_filter1d
from scipy.signal import butter, find_peaks, lfilter, resample_poly, sosfiltfilt
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train_tokenizer as trainer
from data.clips import ECG_HZ, LEADS, Clips, RandomWindows, UserError, batches, parse_flags, run_main
from tokenizer import Block, parameter_count


@dataclass
class EcgConfig:
    samples: int = 600          # the longest window, samples at 250 Hz (2.4 s)
    patch: int = 75             # samples of one patch (0.3 s)
    dim: int = 128              # width of the encoder, D
    depth: int = 4              # its layers
    heads: int = 4              # its attention heads
    mlp_dim: int = 512          # hidden width of its MLP
    decoder_dim: int = 96       # width of the decoder, which only pretraining has
    decoder_depth: int = 2      # its layers


PRESETS = {"demo": {}, "paper": dict(samples=2250, dim=768, depth=12, heads=12, mlp_dim=3072, decoder_dim=256,
                                     decoder_depth=4)}


# ---------------------------------------------------------------------------- reading a file
# A reader returns signal (L, N), names of the leads ([]: none), Hz (0: unknown), mV of one unit (0: unknown).

HERTZ = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:hert[sz]|herc|hz|герц|赫|ヘルツ|헤르츠)", re.I)
NUMBERS = re.compile(r"(?=.*(?:\d|nan|inf))(?:[\d\s,;.+\-\"e]|nan|inf)+", re.I)
TIME = re.compile(r"\W*(?:time|t|s|sec|seconds|ms)(?![a-z\d])", re.I)
LEAD = re.compile(r"(?<![a-z\d])(?<!^-)(?:ML)?(III|II|I|aV[RLF]|V[1-6])(?![a-z\d])", re.I)
UNIT = re.compile(r"(?<![a-z])(?:([µμu]V|mi[ck]rovolt|мкВ)|mV|millivolt)s?(?![a-z\d])", re.I)
LOCALE = {0x2212: "-", 0x66B: ".", 0xA0: " ", 0x202F: " "}  # true minus, Arabic decimal mark, no-break spaces


def refuse(wrong, path, text):
    if wrong:
        raise UserError(f"{path}: {text}")


def lead_name(text):
    """'Ableitung I', 'lead_ii', 'MLII', 'v5 [mV]' -> the name in LEADS; a mere 'ECG' is I; else None."""
    found = LEAD.search(re.sub(r"^\W*(ecg|ekg|voltage|value|[mµμu]V)\W*$", "I", text, flags=re.I))
    return {name.lower(): name for name in LEADS}[found[1].lower()] if found else None


def unit_mv(text):
    """A text that names a unit -> millivolts of one unit, 0 where it names none."""
    found = UNIT.search(text)
    return (1e-3 if found[1] else 1) if found else 0


def read_text(path):
    """A table with a column a lead, or an Apple Watch export: `key,value` lines, then one number a line.

    The watch writes its user's locale unquoted: `Messrate,511,562 Hertz`, `-265,868`. Without any point, a
    comma is a decimal one if a rate but no column names stand above, or if something else parts the columns.
    """
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").translate(LOCALE).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    first = next((i for i, line in enumerate(lines) if NUMBERS.fullmatch(line)), len(lines))
    refuse(first == len(lines), path, "no line of numbers in it; a text file holds a column for each lead")
    header, title, body = "\n".join(lines[:first]), lines[first - 1] if first else "", lines[first:]
    words = re.split(r"[,;\t]", title.lstrip("# ")) if title else []
    rate = HERTZ.search(header)
    watch = rate and not all(lead_name(word) or TIME.match(word) for word in words)
    comma = not any("." in line for line in body) and (watch or re.search(r"[;\"]|\d\s+[-\d]", body[0]))
    cells = str.maketrans({",": "." if comma else " ", ";": " ", '"': " "})
    table = np.loadtxt([line.translate(cells) for line in body], comments=None, ndmin=2).T  # columns N
    words = title.split() if len(words) == 1 < len(table) else words
    if watch and len(table) == 1:
        words = LEAD.findall(header)[-1:]
    elif title.startswith("#") or len(words) != len(table) and not any(map(lead_name, words)):
        words = []                                              # a line of text, not the names of columns
    refuse(words and len(words) != len(table), path, f"{len(words)} names above {len(table)} columns")
    hz = float(rate[1].replace(",", ".")) if rate else 0
    for k in [k for k, name in enumerate(words) if TIME.match(name)][:1]:   # a column of times gives the rate
        step = np.diff(table[k]) * (1e-3 if "ms" in words[k].lower() else 1)
        refuse(not len(step) or not step.min() > 0 or step.max() > 2 * step.mean(), path,
               f"the times in column {words[k]!r} do not rise evenly; remove it and pass --ecg_hz=...")
        table, words, hz = np.delete(table, k, axis=0), words[:k] + words[k + 1:], 1 / step.mean()
    return table, words, hz, unit_mv(header)


def read_npy(path):
    """(N,), (L, N), or (N, L) where L <= 12 < N. Memory-mapped: no pickle and no file cut short opens so."""
    array = np.lib.format.open_memmap(path, mode="r")
    refuse(array.ndim not in (1, 2) or array.dtype.kind not in "iuf", path,
           f"numbers (N,) or (L, N) are expected, it holds {array.dtype} {array.shape}")
    array = np.atleast_2d(array)
    return array.T if array.shape[1] <= len(LEADS) < array.shape[0] else array, [], 0, 0


def read_wfdb(path):
    import wfdb
    record = wfdb.rdrecord(str(path.with_suffix("").absolute()))
    return record.p_signal.T, record.sig_name, record.fs, np.array([[unit_mv(u)] for u in record.units])


def read_dicom(path):
    import pydicom
    dataset = pydicom.dcmread(path)
    refuse("WaveformSequence" not in dataset, path, "this DICOM file carries no waveform")
    group = dataset.WaveformSequence[0]
    channels = group.ChannelDefinitionSequence
    units = np.array([[unit_mv(str(c.get("ChannelSensitivityUnitsSequence", "")))] for c in channels])
    names = [c.ChannelSourceSequence[0].CodeMeaning for c in channels]
    return dataset.waveform_array(0).T, names, float(group.SamplingFrequency), units


READERS = {".csv": read_text, ".txt": read_text, ".npy": read_npy, ".hea": read_wfdb, ".dcm": read_dicom}


def read_ecg(path, ecg_hz=0, leads=()):
    """Any ECG file -> ecg (L, N) float32 mV (median 0) at 250 Hz, names of its leads; else UserError.

    ecg_hz, leads: its sampling rate and the names of its leads, for a file that does not say.
    """
    path = Path(path)
    kind = path.suffix.lower()
    refuse(path.is_dir(), path, "this is a folder; name one ECG file")
    refuse(not path.exists(), path, "no such file")
    refuse(not path.stat().st_size, path, "the file is empty")
    refuse(kind not in READERS, path, f"ECG files are {' '.join(READERS)} (WFDB: .hea), never a pickle")
    try:
        with warnings.catch_warnings(action="ignore"):
            signal, names, hz, mv = READERS[kind](path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: reading it needs {error.name}: pip install {error.name}") from None
    except Exception as error:      # the readers of damaged files raise anything
        reason = " ".join(str(error).split(";")[0].split())
        raise UserError(f"{path}: cannot be read as {kind}, export it again: {reason}") from None
    signal, leads = check_leads(path, np.asarray(signal, float) * (mv if np.all(mv) else 1), names or leads)
    refuse(hz and ecg_hz and abs(hz / ecg_hz - 1) > 0.01, path, f"it says {hz:g} Hz itself; drop --ecg_hz")
    hz = hz or ecg_hz
    refuse(not hz, path, "its sampling rate is unknown; pass --ecg_hz=...")
    refuse(not 50 <= hz <= 1e5, path, f"a sampling rate of {hz:g} Hz; pass --ecg_hz=... of 50 to 100000")
    refuse(signal.shape[1] < 0.4 * hz, path, f"{signal.shape[1] / hz:.2f} s of ECG; 0.4 s or more are needed")
    signal -= np.median(signal, axis=1, keepdims=True)
    peak = np.abs(signal).max()
    if not (np.all(mv) or 0.005 <= peak <= 10):
        print(f"{path}: a peak of {peak:.3g} cannot be millivolts; scaled to 1 mV", file=sys.stderr)
        signal /= peak
    ratio = Fraction(ECG_HZ / hz).limit_denominator(10_000)     # 511.562 Hz too: within 2 ms in 30 s
    return resample_poly(signal, *ratio.as_integer_ratio(), axis=1, padtype="line").astype(np.float32), leads


def check_leads(path, signal, names):
    """Refuse what is no ECG; leads without names are I, II, III ...; constant ones (loose electrodes) go."""
    L, N = signal.shape
    refuse(not 0 < L <= len(LEADS) or N < 2, path, f"1 to 12 leads are expected, it holds {L} x {N} samples")
    leads = np.array([lead_name(name) or name for name in names] or LEADS[:L])
    refuse(len(leads) != L, path, f"{len(leads)} names ({' '.join(leads)}) for {L} leads")
    unknown = [lead for lead in leads if lead not in LEADS]
    refuse(unknown, path, f"{', '.join(unknown)}: no lead; the leads are {' '.join(LEADS)}")
    refuse(len(set(leads)) < L, path, f"a lead is there twice: {' '.join(leads)}")
    bad = np.argwhere(~np.isfinite(signal))
    refuse(len(bad), path, f"{len(bad)} values missing or infinite, first (lead, sample): {bad[:1].tolist()}")
    alive = np.ptp(signal, axis=1) > 0
    refuse(not alive.any(), path, "the signal is constant, no beats in it (--ecg=flat asks for that)")
    return signal[alive], leads[alive].tolist()


# ---------------------------------------------------------------------------- cleaning, R peaks

CLEAN_BAND = np.concatenate([butter(5, 0.67, "highpass", fs=ECG_HZ, output="sos"),
                             butter(5, 40, "lowpass", fs=ECG_HZ, output="sos")])
QRS_BAND = butter(2, (5, 20), "bandpass", fs=ECG_HZ, output="sos")
FLAT_MV = 0.03      # a smaller standard deviation is no heart beat: it must not become amplified noise


def clean_ecg(ecg):
    """ecg (L, N) mV -> (L, N) float32: 0.67 to 40 Hz, mean 0 and standard deviation 1 over leads and time."""
    x = sosfiltfilt(CLEAN_BAND, ecg, padlen=min(ecg.shape[1] - 1, ECG_HZ))      # 1 s: the high-pass settles
    return ((x - x.mean()) / max(x.std(), FLAT_MV)).astype(np.float32)


def redraw_ecg(ecg, rng, share):
    """A cleaned ECG (L, N) as another recorder would draw it, a `share` of the times: for training.

    The filters of monitors and echo machines smear the waves; here exponential tails of 8 to 300 ms do, one
    after and one before each wave, of either sign and at most 0.8 of its height. No R peak moves.
    """
    if rng.random() >= share:
        return ecg
    x = ecg
    for way in (1, -1):
        keep = np.exp(-1 / (ECG_HZ * np.exp(rng.uniform(*np.log([0.008, 0.3])))))
        tail = lfilter([1 - keep], [1, -keep], x[:, ::way])[:, ::way]
        x = x + rng.uniform(-0.8, 0.8) * tail * np.abs(x).max() / max(np.abs(tail).max(), 1e-6)
    return (x * (ecg.std() / max(x.std(), 1e-6))).astype(np.float32)


def find_r_peaks(ecg):
    """ecg (L, N) -> times of the R peaks, seconds after sample 0 (beats,), after Pan & Tompkins (1985).

    A QRS complex is where the slope of the 5 to 20 Hz band, over all leads, is steep against the other beats
    and against its surroundings, which keeps noise out of a pause. Any scale.
    """
    x = sosfiltfilt(QRS_BAND, ecg, padtype="even", padlen=min(ecg.shape[1] - 1, ECG_HZ))
    slope = np.sqrt(uniform_filter1d(np.square(np.gradient(x, axis=1)).mean(0), round(0.12 * ECG_HZ)))
    peaks = find_peaks(np.pad(slope, 1), distance=round(0.25 * ECG_HZ))[0] - 1      # refractory 0.25 s
    strongest = [part.max() for part in np.array_split(slope, max(1, len(slope) // round(1.5 * ECG_HZ)))]
    beat = max(np.median(strongest), 0.2 * slope.max())     # the median is no ectopic beat and no artefact
    background = percentile_filter(slope, 30, 2 * ECG_HZ)
    peaks = [p for p in peaks if slope[p] > max(0.3 * beat, 3.2 * background[p], 1e-9)]
    # a T wave comes within 0.36 s and is half as steep as its QRS complex, or less
    peaks = [p for q, p in zip([-ECG_HZ, *peaks], peaks)
             if p - q > 0.36 * ECG_HZ or slope[p] > 0.5 * slope[q]]
    height, reach = np.square(x).sum(0), round(0.08 * ECG_HZ)
    starts = [max(p - reach, 0) for p in peaks]
    return np.unique([s + height[s:p + reach + 1].argmax() for s, p in zip(starts, peaks)]) / ECG_HZ


# ---------------------------------------------------------------------------- the encoder

def sincos_positions(n, dim):
    """(n + 2, dim): sines and cosines of the places of n patches; zeros for SEP at both ends."""
    angle = torch.arange(n)[:, None] / 10_000 ** (torch.arange(dim // 2) / (dim / 2))
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, 0, 1, 1))


class EcgEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Sequential(nn.Unflatten(2, (-1, c.patch)), nn.LayerNorm(c.patch),
                                   nn.Linear(c.patch, c.dim), nn.LayerNorm(c.dim))
        self.register_buffer("positions", sincos_positions(c.samples // c.patch, c.dim))
        self.sep = nn.Parameter(0.02 * torch.randn(c.dim))
        self.lead = nn.Parameter(0.02 * torch.randn(len(LEADS), c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim, bias=True) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim)

    def encode(self, ecg, leads, keep=None):
        """forward, with SEP at both ends of each lead; keep (B, L, k): the patches seen, all by default."""
        B, L, N = ecg.shape
        n = N // self.config.patch
        refuse(N % self.config.patch or n + 2 > len(self.positions), "ECG encoder", f"takes multiples of "
               f"{self.config.patch} samples up to {self.config.samples}, not {N}")
        x = self.embed(ecg) + self.positions[1:n + 1]                                       # B L n D
        if keep is not None:
            x = x.gather(2, keep[..., None].expand(-1, -1, -1, x.shape[-1]))                # B L k D
        left, right = ((self.sep + self.positions[end]).expand(B, L, 1, -1) for end in (0, -1))
        x = torch.cat([left, x, right], dim=2) + self.lead[leads].unsqueeze(-2)             # B L k+2 D
        x = x.flatten(1, 2)                                                                 # B L(k+2) D
        for block in self.blocks:
            x = block(x)
        return self.norm(x).unflatten(1, (L, -1))

    def forward(self, ecg, leads):
        """ecg (B, L, N) cleaned; leads (L,) or (B, L), indices into LEADS -> Z (B, L, N/patch, D)."""
        return self.encode(ecg, leads)[:, :, 1:-1]


ST_MEM_NAMES = (("to_patch_embedding", "embed"), ("^sep_embedding", "sep"), (r"block(\d+)", r"blocks.\1"),
                (r"attn\.norm", "norm1"), (r"ff\.norm", "norm2"), (r"fn\.to_out\.0", "out"),
                (r"ff\.fn\.net\.0", "mlp.fc1"), (r"ff\.fn\.net\.3", "mlp.fc2"))


def load_st_mem(path):
    """EcgEncoder with the weights of the released st_mem_vit_base_encoder.pth (CC BY-NC: never bundled)."""
    model = EcgEncoder(EcgConfig(**PRESETS["paper"]))
    try:
        old = dict(trainer.read_file(path)["model"])
        new = {"positions": old.pop("pos_embedding")[0],
               "lead": torch.stack([old.pop(f"lead_embeddings.{i}") for i in range(len(LEADS))])}
        for name, value in old.items():
            for theirs, ours in ST_MEM_NAMES:
                name = re.sub(theirs, ours, name)
            if "fn.to_qkv" in name:
                new[name.replace("fn.to_qkv", "q")], kv = value.tensor_split([len(value) // 3])
                name, value = name.replace("fn.to_qkv", "kv"), kv
            new[name] = value
        model.load_state_dict(new)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, RuntimeError):
        raise UserError(f"{path} does not hold ST-MEM's encoder (st_mem_vit_base_encoder.pth)") from None
    return model


# ---------------------------------------------------------------------------- masked autoencoder

class MaskedAutoencoder(nn.Module):
    """ST-MEM's pretraining (after MAE, He et al. 2022). Mask polarity: True = masked, to be predicted."""

    def __init__(self, config, mask_ratio=0.75):
        super().__init__()
        c, self.mask_ratio, self.encoder = config, mask_ratio, EcgEncoder(config)
        self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(c.decoder_dim))
        self.register_buffer("positions", sincos_positions(c.samples // c.patch, c.decoder_dim))
        self.decoder = nn.ModuleList(Block(c.decoder_dim, 4, 4 * c.decoder_dim, bias=True)
                                     for _ in range(c.decoder_depth))
        self.decoder_head = nn.Sequential(nn.LayerNorm(c.decoder_dim), nn.Linear(c.decoder_dim, c.patch))

    def patchify(self, ecg):
        return ecg.unflatten(2, (-1, self.encoder.config.patch))                            # B L n patch

    def random_masking(self, noise):
        """Uniform numbers (B, L, n) -> keep (B, L, k), patches seen, as many in each lead; mask (B, L, n)."""
        keep = noise.argsort(dim=2)[:, :, :max(1, int(noise.shape[2] * (1 - self.mask_ratio)))]
        return keep, torch.ones_like(noise, dtype=torch.bool).scatter(2, keep, False)

    def forward_encoder(self, ecg, leads, noise):
        B, L, n, _ = self.patchify(ecg).shape
        keep, mask = self.random_masking(noise[:, :L * n].reshape(B, L, n))
        return self.encoder.encode(ecg, leads, keep), keep, mask                            # B L k+2 D

    def forward_decoder(self, x, keep, n):
        """(B, L, k + 2, D) -> (B, L, n, patch), each lead alone: only the encoder joins the leads."""
        x = self.decoder_embed(x)
        B, L, _, d = x.shape
        full = self.mask_token.to(x.dtype).expand(B, L, n, d)
        full = full.scatter(2, keep[..., None].expand(-1, -1, -1, d), x[:, :, 1:-1])        # B L n d
        place = torch.cat([self.positions[:n + 1], self.positions[-1:]])
        x = (torch.cat([x[:, :, :1], full, x[:, :, -1:]], dim=2) + place).flatten(0, 1)     # BL n+2 d
        for block in self.decoder:
            x = block(x)
        return self.decoder_head(x)[:, 1:-1].unflatten(0, (B, L))

    def forward_loss(self, ecg, predicted, mask):
        """Mean squared error on the masked patches, each standardised by itself (norm_pix_loss)."""
        target = self.patchify(ecg)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (predicted.float() - target).square().mean(-1)                              # B L n
        return (error * mask).sum() / mask.sum()

    def forward(self, ecg, leads, noise):
        """ecg (B, L, N) cleaned, leads as in EcgEncoder, noise (B, L n or more) uniform -> loss."""
        x, keep, mask = self.forward_encoder(ecg, leads, noise)
        return self.forward_loss(ecg, self.forward_decoder(x, keep, mask.shape[2]), mask)


@dataclass
class TrainConfig(EcgConfig):
    data: str = "datasets/phantom"  # prepared data set
    out: str = "runs/ecg"       # folder for weights, state and log
    resume: bool = False        # go on from OUT's saved state
    steps: int = 0              # stop after so many steps; 0 = after --minutes
    minutes: float = 10         # stop after so many minutes of training
    batch: int = 32             # ECG windows of one step in one process
    lr: float = 1e-3            # peak learning rate of AdamW; linear warm-up, then cosine to a twentieth
    warmup: int = 200           # steps of warm-up
    weight_decay: float = 0.01  # of AdamW
    clip_norm: float = 1.0      # gradient norm is clipped here
    ema: float = 0.98           # EMA of the weights, every 10 steps
    workers: int = 0            # data loading processes
    log_every: int = 50         # steps between two lines of the log
    save_every: int = 500       # steps between two checkpoints
    seed: int = 0               # of weights, data and masks


def main():
    config = parse_flags(TrainConfig, {"demo": {}, "paper": PRESETS["paper"] | dict(lr=1e-4, workers=8)})

    # ---- distributed and seed
    device, rank, world = trainer.init_distributed(config.seed)
    state_path = trainer.check_out(config, "ecg_encoder")

    # ---- data and model
    train = RandomWindows(Clips(config.data, "train"), 1, config.samples, clean_ecg, config.batch * world,
                          config.seed, len(LEADS) * config.samples // config.patch)
    raw = MaskedAutoencoder(trainer.model_config(config, EcgConfig)).to(device)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, "
              f"{len(train.clips)} clips, {device} x {world}")

    # ---- optimizer, EMA, resume, DDP
    optimizer = torch.optim.AdamW(raw.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay,
                                  fused=True)
    ema = copy.deepcopy(raw).eval()
    parts = {"model": raw, "ema": ema, "optimizer": optimizer}
    step, seconds = trainer.load_state(state_path, parts) if config.resume else (0, 0.0)
    model = DistributedDataParallel(raw) if dist.is_initialized() else raw

    # ---- loop
    log, loader = trainer.Log(config, "ecg_encoder", rank), \
        batches(train, config.batch, step, rank, world, config.workers)
    log.bar.update(step)
    began, results = time.time() - seconds, {}
    for step in count(step):
        seconds = time.time() - began
        done, lr = trainer.schedule(config, step, seconds, device)
        if rank == 0 and step > 0 and (done >= 1 or step % config.save_every == 0):
            trainer.save_weights(config.out, "ecg_encoder", ema.encoder, step)
            trainer.save_state(state_path, parts, step, seconds)
        if done >= 1:
            break
        batch = {k: v.to(device, non_blocking=True) for k, v in log.wait(loader).items()}
        loss = model(batch["ecg"], batch["leads"], batch["noise"])
        loss.backward()
        trainer.update(config, raw, optimizer, lr, step, batch, state_path)
        if step % 10 == 0:
            trainer.ema_update(ema, raw, min(config.ema, step / (step + 100)))
        if step % config.log_every == 0:
            results = log.write(step, **trainer.all_mean({"loss": loss}, device),
                                **log.rate(step, config, world))
            log.bar.set_postfix(results)
        log.bar.update()

    log.close(f"ecg_encoder.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")


if __name__ == "__main__":
    run_main(main)
