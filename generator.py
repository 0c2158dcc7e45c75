"""Stage 2b, the masked token transformer (ECHOPulse section 3.2, Table 5) and progressive sampling (3.3).

A bidirectional transformer fills in masked video tokens, told by the ECG: by cross-attention to the encoder's
sequence Z, with the seconds between a latent frame and an ECG patch in the rotary embedding, and by the ECG
samples around each latent frame, projected onto its tokens. The second places a beat to within a frame.

    tokens (B, T', h, w) with masked places (True = to be predicted) + ECG -> the distribution of each token

A token of 13 bits is predicted as its 7 low bits, then its 6 high bits given those: the exact joint of 8192
codes by the chain rule, with 192 outputs. Run the file to see the settings and the number of parameters.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.flags import UserError, parse_flags, run_main
from common.text_encoder import TextConfig, TextEncoder
from common.training import bfloat16
from data.dataset import ECG_HZ, LEADS, cut_ecg
from ecg_encoder import EcgConfig, EcgEncoder
from tokenizer import Block, index_to_bits, parameter_count

TIME_UNIT = 0.04        # seconds; rotary periods run from 2 to 200 of it, 80 ms to 8 s


@dataclass
class GeneratorConfig:
    dim: int = 192              # width of the transformer
    heads: int = 4              # attention heads
    mlp_dim: int = 768          # hidden width of the MLP
    depth: int = 4              # layers
    ecg_before: float = 0.8     # seconds of ECG before a latent frame that its tokens see directly
    ecg_after: float = 0.4      # and after it
    condition: str = "ecg"      # or text; or none: a generator of video alone
    align: str = "both"         # how the ECG reaches the tokens: cross (attention), local (its samples), both
    critic: str = "none"        # self: a head on the generator's trunk; token: a transformer of its own
    critic_depth: int = 2       # layers of a token critic
    bits: int = 13              # of the tokenizer
    grid: int = 8               # of the tokenizer: h = w
    latent_frames: int = 6      # of the tokenizer: T'
    patch_t: int = 2            # of the tokenizer: frames of one latent frame after the first
    ecg_dim: int = 128          # width of the ECG encoder's Z


SCORERS = "random", "halton", "confidence", "critic"
CHOICES = dict(condition=("ecg", "text", "none"), align=("both", "cross", "local"),
               critic=("none", "self", "token"))
ENCODERS = {"ecg": ("ecg_encoder", EcgEncoder, EcgConfig), "text": ("text_encoder", TextEncoder, TextConfig)}
PRESETS = {"demo": {}, "paper": dict(dim=512, heads=8, mlp_dim=2048, depth=6, grid=16, ecg_dim=768)}


def check_fits(config, tokenizer, encoder):
    """UserError where a GeneratorConfig is not for this tokenizer and ECG encoder."""
    fits = dict(bits=tokenizer.config.bits, grid=tokenizer.grid, latent_frames=tokenizer.latent_frames,
                patch_t=tokenizer.config.patch_t) | (dict(ecg_dim=encoder.config.dim) if encoder else {})
    for key, value in fits.items():
        if getattr(config, key) != value:
            raise UserError(f"the generator is for {key}={getattr(config, key)}, "
                            f"its tokenizer or encoder has {value}")


def check_scorer(config, scorer):
    """UserError where a GeneratorConfig cannot decode by this scorer."""
    if scorer not in SCORERS:
        raise UserError(f"--scorer={scorer}: choose one of {', '.join(SCORERS)}")
    if scorer == "critic" and config.critic == "none":
        raise UserError("--scorer=critic: this generator was trained without a critic")


class Condition(NamedTuple):
    """What the generator is told of the ECG. Times are seconds after the window's first frame."""
    z: torch.Tensor             # (B, L n, ecg_dim), the encoder's sequence
    z_time: torch.Tensor        # (B, L n), middle of each patch
    ecg: torch.Tensor           # (B, L, samples), cleaned
    leads: torch.Tensor         # (L,), indices into LEADS
    ecg_start: torch.Tensor     # (B,), time of ecg sample 0
    fps: torch.Tensor           # (B,)
    drop: torch.Tensor          # (B,) True = learned null context in the ECG's place
    hidden: torch.Tensor        # (B, samples) True = the ECG is not known there, the ECG mask
    z_hidden: torch.Tensor      # (B, L n) True = some of the patch is not
    anchor: torch.Tensor        # (B, h, w) tokens of a frame of the same video, whenever it was; -1 = none
    anchor_ecg: torch.Tensor    # (B, L, local samples), the ECG around it


def condition(config, encoder, told, drop=None, hidden=None, anchor=None):
    """What a generator is told of B clips, from a dict of fps (B,) and, for its kind of condition,

    ecg: ecg (B, L, samples) and leads (L,) for an EcgEncoder, ecg_start (B,), anchor_ecg (with an anchor);
    text: B lines of text for a TextEncoder;
    none: nothing more, it is the null context throughout, as for the clips of drop (B,).
    hidden (B, samples): True where the ECG is masked; anchor (B, h, w).
    """
    fps, B = told["fps"], len(told["fps"])
    x = torch.zeros(B, 1, device=fps.device)
    anchor = torch.full((B, 1, 1), -1, device=fps.device) if anchor is None else anchor
    drop = x[:, 0] > 0 if drop is None else drop
    if config.condition == "ecg":
        hidden = torch.zeros_like(told["ecg"][:, 0], dtype=torch.bool) if hidden is None else hidden
        ecg = told["ecg"].masked_fill(hidden[:, None], 0)
        z = encoder(ecg, told["leads"])                                                     # B L n D
        n, L = z.shape[2], z.shape[1]
        time = (torch.arange(n, device=fps.device) + 0.5) * (ecg.shape[-1] // n) / ECG_HZ
        time = (told["ecg_start"][:, None] + time).repeat(1, L)                             # B L n
        return Condition(z.flatten(1, 2), time, ecg, told["leads"], told["ecg_start"], fps, drop, hidden,
                         hidden.unflatten(1, (n, -1)).any(2).repeat(1, L), anchor,
                         told.get("anchor_ecg", ecg[..., :1] * 0))
    null = Condition(x[..., None].expand(B, 1, config.ecg_dim), x, x[..., None], x[0].long(), x[:, 0], fps,
                     x[:, 0] == 0, x > 0, x > 0, anchor, x[..., None])
    if config.condition == "none":
        return null
    z, nothing = encoder(told["text"])
    return null._replace(z=z, z_time=0 * z[..., 0], z_hidden=nothing, drop=drop)


class Trunk(nn.Module):
    """Tokens and ECG -> features of each token: the transformer of the generator, and of a token critic."""

    def __init__(self, config, depth):
        super().__init__()
        c = self.config = config
        self.embed = nn.Linear(c.bits, c.dim)
        self.mask_token = nn.Parameter(0.3 * torch.randn(c.dim))
        self.place = nn.Parameter(0.3 * torch.randn(1, c.grid ** 2, c.dim))
        self.order = nn.Parameter(0.3 * torch.randn(c.latent_frames, 1, c.dim))
        self.order_anchor = nn.Parameter(0.3 * torch.randn(1, 1, c.dim))
        self.null_z = nn.Parameter(0.02 * torch.randn(c.ecg_dim))
        self.null_local = nn.Parameter(torch.zeros(c.dim))
        self.rate = nn.Linear(1, c.dim)
        self.local_in = nn.Linear(round((c.ecg_before + c.ecg_after) * ECG_HZ), c.dim)
        self.local_hidden = nn.Linear(self.local_in.in_features, c.dim, bias=False)
        self.local_lead = nn.Embedding(len(LEADS), c.dim)
        self.local_out = nn.Linear(c.dim, c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim, context_dim=c.ecg_dim)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(c.dim)
        for layer in (self.local_out, self.local_hidden, self.rate):
            for p in layer.parameters():
                nn.init.zeros_(p)                   # an unscaled branch stalls the learning

    def frame_times(self, fps):
        """fps (B,) -> (B, T') seconds of each latent frame's middle; the first is one frame, the rest P_t."""
        i, p = torch.arange(self.config.latent_frames, device=fps.device), self.config.patch_t
        return torch.where(i == 0, 0, (i - 1) * p + (p + 1) / 2) / fps[:, None]

    def local_ecg(self, cond, times):
        """The samples of ecg_before .. ecg_after seconds around each latent frame (B, L, T', samples), and
        where they are not known (B, 1, T', samples)."""
        first = ((times - self.config.ecg_before - cond.ecg_start[:, None]) * ECG_HZ).round().long()  # B T'
        at = first[..., None] + torch.arange(self.local_in.in_features, device=times.device)        # B T' W
        outside = (at < 0) | (at >= cond.ecg.shape[-1])
        at, T = at.clamp(0, cond.ecg.shape[-1] - 1), at.shape[1]
        hidden = (outside | cond.hidden[:, None].expand(-1, T, -1).gather(2, at))[:, None]         # B 1 T' W
        at = at[:, None].expand(-1, cond.ecg.shape[1], -1, -1)                              # B L T' W
        samples = cond.ecg[:, :, None].expand(-1, -1, T, -1).gather(3, at)
        return samples.masked_fill(hidden, 0), hidden.to(samples.dtype)

    def features(self, index, masked, cond):
        """index, masked (B, T', h, w) -> (B, T' hw, D). The anchor goes before them, and is not returned."""
        B, T, h, w = index.shape
        anchor = cond.anchor[:, None].expand(B, 1, h, w)
        index, masked = torch.cat([anchor.clamp(min=0), index], 1), torch.cat([anchor < 0, masked], 1)
        times = self.frame_times(cond.fps)                                                  # B T'
        samples, hidden = self.local_ecg(cond, times)
        samples = torch.cat([cond.anchor_ecg[:, :, None].expand_as(samples[:, :, :1]), samples], 2)
        hidden, times = F.pad(hidden, (0, 0, 1, 0)), F.pad(times, (1, 0))                   # 1 + T' from here
        local = self.local_in(samples) + self.local_hidden(hidden) + self.local_lead(cond.leads)[:, None]
        local = self.local_out(F.gelu(local).mean(1))                                       # B 1+T' D
        drop = cond.drop[:, None, None]
        local = torch.where(drop | (self.config.align == "cross"), self.null_local, local)
        drop = drop | cond.z_hidden[..., None] | (self.config.align == "local")
        z = torch.where(drop, self.null_z, cond.z)                                          # B M ecg_dim
        x = self.embed(index_to_bits(index, self.config.bits))
        x = torch.where(masked[..., None], self.mask_token, x).reshape(B, 1 + T, h * w, -1)
        local = local + self.rate((cond.fps / 25).log().float()[:, None, None])
        order = torch.cat([self.order_anchor, self.order])
        x = (x + self.place + order + local[:, :, None]).flatten(1, 2)                      # B (1+T')hw D
        time = times.repeat_interleave(h * w, dim=1) / TIME_UNIT                            # B (1+T')hw
        for block in self.blocks:
            x = block(x, time, z, cond.z_time / TIME_UNIT)
        return self.norm(x[:, h * w:])


class Generator(Trunk):
    def __init__(self, config):
        for key, choices in CHOICES.items():
            if getattr(config, key) not in choices:
                raise UserError(f"--{key}={getattr(config, key)}: choose one of {', '.join(choices)}")
        super().__init__(config, config.depth)
        c = config
        self.low_bits, self.high_bits = (c.bits + 1) // 2, c.bits // 2
        self.to_low = nn.Linear(c.dim, 2 ** self.low_bits)
        self.given_low = nn.Embedding(2 ** self.low_bits, c.dim)
        self.mix, self.to_high = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, 2 ** self.high_bits)
        if c.critic == "token":
            self.critic = Trunk(c, c.critic_depth)
        if c.critic != "none":
            self.to_fake = nn.Linear(c.dim, 1)

    def high_logits(self, x, low):
        """Logits of the high bits (B, N, 2^6) given the low bits (B, N)."""
        return self.to_high(F.gelu(self.mix(x) + self.given_low(low)))

    def forward(self, index, masked, cond, u=None):
        """Cross-entropy of every token, nats (B, T', h, w); Eq. 7 is its mean over the masked ones.

        With u (B, 2, T' hw), uniform numbers, also what the critic is to judge: the tokens, but in the masked
        places a draw from these very distributions. No gradient passes through the draw.
        """
        x = self.features(index, masked, cond)
        low, high = index.flatten(1) % 2 ** self.low_bits, index.flatten(1) >> self.low_bits
        to_low = self.to_low(x).float()
        loss = F.cross_entropy(to_low.transpose(1, 2), low, reduction="none") \
            + F.cross_entropy(self.high_logits(x, low).float().transpose(1, 2), high, reduction="none")
        if u is None:
            return loss.reshape(index.shape)
        with torch.no_grad():
            low = draw(to_low, u[:, 0])
            drawn = low + (draw(self.high_logits(x, low).float(), u[:, 1]) << self.low_bits)
        return loss.reshape(index.shape), torch.where(masked, drawn.reshape(index.shape), index)   # Eq. 9

    def score(self, index, cond):
        """Logit of each token (B, T', h, w), none of them masked, not to be the real one."""
        trunk = self.critic if self.config.critic == "token" else self
        x = trunk.features(index, torch.zeros_like(index, dtype=torch.bool), cond)
        return self.to_fake(x).float().reshape(index.shape)

    @torch.no_grad()
    def propose(self, index, masked, cond, guidance, temperature, rng):
        """Draw every token from its own distribution -> tokens, and their log-probabilities (B, T', h, w)."""
        shape = index.shape
        if guidance != 1:
            index, masked, cond = torch.cat([index, index]), torch.cat([masked, masked]), with_null(cond)
        x = self.features(index, masked, cond)
        low_logits = guide(self.to_low(x).float(), guidance)
        low = draw(low_logits / max(temperature, 1e-4), uniform(low_logits.shape[:2], rng))
        high_logits = guide(self.high_logits(x, low if guidance == 1 else low.repeat(2, 1)).float(), guidance)
        high = draw(high_logits / max(temperature, 1e-4), uniform(low.shape, rng))
        log_p = sum(logits.log_softmax(-1).gather(-1, part[..., None])[..., 0]
                    for logits, part in ((low_logits, low), (high_logits, high)))
        return (low + (high << self.low_bits)).reshape(shape), log_p.reshape(shape)


def with_null(cond):
    """A condition of B clips -> of 2 B: with the ECG, and with the null context."""
    both = Condition(*(x if k == "leads" else torch.cat([x, x]) for k, x in cond._asdict().items()))
    both.drop[len(cond.drop):] = True
    return both


def guide(logits, scale):
    """Classifier-free guidance (Ho and Salimans 2022): uncond + s (cond - uncond); s = 1 is off.

    logits (2 B, ...), conditional half first, -> (B, ...); at s = 1 they are (B, ...) and stay as they are.
    """
    if scale == 1:
        return logits
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond)


def uniform(shape, rng):
    """Uniform numbers in (0, 1), drawn on the CPU so that a seed gives the same video on every device."""
    return torch.rand(shape, generator=rng).clamp(1e-7, 1 - 1e-7)


def draw(logits, u):
    """One draw from softmax(logits): (B, N, K) and uniform numbers (B, N) -> index (B, N)."""
    p = logits.softmax(-1).cumsum(-1)
    return (p < (u.to(p.device) * p[..., -1])[..., None]).sum(-1)


def masked_share(u):
    """Cosine schedule: the share of tokens that is masked at u in [0, 1]."""
    return torch.cos(math.pi / 2 * torch.as_tensor(u))                                      # Eq. 8


def halton(T, h, w, device):
    """Places in the order of Halton's sequence of bases 2, 3, 5 over time and space, early ones far apart:
    turn (1, T, h, w), int."""
    def radical_inverse(n, base):
        x, scale = np.zeros(len(n)), 1.0
        while n.any():
            scale /= base
            x, n = x + scale * (n % base), n // base
        return x
    n = np.arange(1, 64 * T * h * w)            # until each place has come
    at = [(radical_inverse(n, base) * size).astype(int) for base, size in ((5, T), (2, h), (3, w))]
    places, first = np.unique(np.ravel_multi_index(at, (T, h, w)), return_index=True)
    turn = np.full(T * h * w, len(n))
    turn[places] = first
    return torch.from_numpy(turn.argsort().argsort()).reshape(1, T, h, w).to(device)


def largest(rank, many):
    """The `many` largest of each item of rank (B, ...), True there."""
    return (rank.flatten(1).argsort(1, descending=True).argsort(1) < many).reshape(rank.shape)


@torch.no_grad()
def fill_in(generator, index, masked, cond, scorer="random", steps=4, guidance=1.0, guidance_end=0,
            temperature=1.0, noise=1.0, rng=None):
    """Masked parallel decoding (Chang et al. 2022): fills the masked places (B, T', h, w), equally many in
    every item; the other tokens never change.

    Each step draws all masked tokens, then masks again those that rank highest: in a fixed order (random,
    halton), the least likely ones of this step's (confidence), or, of all, the most fake ones (critic). The
    scale of guidance goes linearly from `guidance` at the first step to `guidance_end` (0: the same).
    """
    free, total = masked, int(masked[0].sum())
    order = halton(*index.shape[1:], index.device) if scorer == "halton" else \
        uniform(index.shape, rng).to(index.device)
    for step in range(steps):
        scale = guidance + ((guidance_end or guidance) - guidance) * step / max(steps - 1, 1)
        drawn, log_p = generator.propose(index, masked, cond, scale, temperature, rng)
        index = torch.where(masked, drawn, index)
        left = 1 - (step + 1) / steps
        rank, among = order.expand(index.shape).float(), masked
        if scorer == "confidence":
            gumbel = -(-uniform(index.shape, rng).log()).log().to(index.device)
            rank = -log_p - noise * left * gumbel
        elif scorer == "critic":
            both = (index, cond) if scale == 1 else (torch.cat([index, index]), with_null(cond))
            jitter = uniform(index.shape, rng).to(index.device) - 0.5
            rank, among = guide(generator.score(*both), scale) + noise * left * jitter, free
        many = int(total * masked_share((step + 1) / steps))                # none after the last step
        masked = largest(rank.masked_fill(~among, -math.inf), many)
    return index


@torch.no_grad()
def stream_video(tokenizer, encoder, generator, ecg, leads, ecg_start, frames, fps, first=None, overlap=5,
                 seed=0, hidden=None, text=None, **how):
    """Progressive sampling: yields the video in chunks (B, C, n, H, W) in [0, 1], `frames` frames in all.

    ecg (B, L, N) cleaned, numpy, sample 0 at ecg_start seconds; leads (L,); first (B, C, 1, H, W) or None;
    hidden (N,) bool or None, samples that the model is not to know; text: B lines, for a generator told by
    text; encoder None for one of video alone. Each window re-encodes the last `overlap` frames (1 + a
    multiple of P_t), slides the ECG to its own time span, keeps the video's first frame in view as its
    anchor, and goes on: the memory does not grow with the length. `how` goes to fill_in.
    """
    c, device = generator.config, next(generator.parameters()).device
    rng, B = torch.Generator().manual_seed(seed), len(ecg)
    size = encoder.config.samples if c.condition == "ecg" else 0
    window = tokenizer.config.frames
    fps_b, leads = torch.full((B,), float(fps), device=device), torch.as_tensor(leads, device=device)
    hidden = np.zeros(ecg.shape[-1], bool) if hidden is None else hidden
    known, begin, done = first, 0, 0        # frames that the window knows, its first frame, frames yielded
    anchor, near = None, round((-c.ecg_before - ecg_start) * ECG_HZ)
    near = torch.from_numpy(cut_ecg(ecg * ~hidden, near, generator.local_in.in_features)).to(device)
    while done < frames:
        cut = round(((begin + window / 2) / fps - ecg_start) * ECG_HZ) - size // 2
        start = torch.full((B,), ecg_start + cut / ECG_HZ - begin / fps, device=device)
        seen, unseen = (torch.from_numpy(cut_ecg(x, cut, size)).to(device) for x in (ecg, hidden))
        told = dict(fps=fps_b, ecg=seen, leads=leads, ecg_start=start, anchor_ecg=near, text=text)
        index = torch.zeros(B, c.latent_frames, c.grid, c.grid, dtype=torch.long, device=device)
        masked = torch.ones_like(index, dtype=torch.bool)
        if known is not None:
            prefix = tokenizer.encode(known)
            index[:, :prefix.shape[1]], masked[:, :prefix.shape[1]] = prefix, False
        with bfloat16(device):
            cond = condition(c, encoder, told, None, (unseen > 0).expand(B, -1), anchor)
            index = fill_in(generator, index, masked, cond, rng=rng, **how)
        anchor = anchor if done else index[:, 0]
        video = tokenizer.decode(index)                                                     # B C window H W
        fresh = video[:, :, done - begin:][:, :, :frames - done]
        yield fresh
        done, begin, known = done + fresh.shape[2], begin + window - overlap, video[:, :, -overlap:]


def main():
    config = parse_flags(GeneratorConfig, PRESETS)
    print(f"{config}\n{parameter_count(Generator(config)):.2f}M parameters")


if __name__ == "__main__":
    run_main(main)
