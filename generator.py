"""Stage 2b, the masked token transformer (ECHOPulse sections 3.2 and 3.3, Table 5).

A bidirectional transformer predicts masked video tokens. The ECG reaches a token by two ways:

  cross-attention   to the ECG encoder's sequence Z; the rotary embedding knows how many seconds lie
                    between the token's latent frame and each ECG patch;
  local ECG         the samples around the latent frame, projected and added to all of its tokens.
                    This way places a beat to within a frame.

    tokens (B, T', h, w), masked (B, T', h, w), ECG  ->  a distribution for each token

Mask polarity: True = masked, to be predicted.

A token of 13 bits is predicted as its 7 low bits, then its 6 high bits given those. By the chain
rule this is the exact joint distribution of 8192 codes, from 128 + 64 outputs.
Eq. 7, 8 and 9 stand here, Eq. 10 in train_generator.py.

    python generator.py --preset=paper      # prints the settings and the number of parameters
"""
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoint import load_weights
from common.flags import UserError, check_least, parse_flags, run_main
from common.training import bfloat16
from data.dataset import ECG_HZ, LEADS, crop_or_pad
from ecg_encoder import EcgConfig, EcgEncoder
from tokenizer import (Block, Rotary, Tokenizer, TokenizerConfig, index_to_bits, parameter_count,
                       rotary_angles)

TIME_UNIT = 0.04        # seconds; the rotary periods run from 2 to 200 of it, 80 ms to 8 s


@dataclass
class GeneratorSettings:
    """What one may choose: the flags of a training."""
    dim: int = 192              # width of the transformer
    heads: int = 4              # attention heads
    mlp_dim: int = 768          # hidden width of the MLP
    depth: int = 4              # layers
    ecg_before: float = 0.8     # seconds of ECG before a latent frame that its tokens see directly
    ecg_after: float = 0.4      # and after it
    condition: str = "ecg"      # or text; or none: a generator of video alone
    align: str = "both"         # how the ECG reaches the tokens: cross, local, or by both ways
    critic: str = "none"   # self: a head on the generator's trunk; token: a transformer of its own
    critic_depth: int = 2       # layers of a token critic


@dataclass
class GeneratorConfig(GeneratorSettings):
    """The settings, and what follows from the tokenizer and encoder (`fit_config`): no flags."""
    bits: int = 13              # of a token
    grid: int = 8               # h = w, tokens along a side of a latent frame
    latent_frames: int = 6      # T', latent frames of one window
    patch_t: int = 2            # frames of one latent frame after the first
    ecg_dim: int = 128          # width of the encoder's Z


@dataclass
class DecodingConfig:
    """How tokens are decoded: the flags of sample.py and evaluate.py."""
    steps: int = 4              # decoding steps of the first window; a later one takes fewer
    scorer: str = "random"      # which tokens are masked again: random, halton, confidence, critic
    guidance: float = 1.5       # scale of classifier-free guidance; 1 = off
    guidance_end: float = 0     # its scale at the last step, linearly from the first; 0 = the same
    temperature: float = 1      # of sampling a token
    overlap: int = 5   # frames that a window takes over from the one before; 1 + a multiple of P_t
    compile: bool = False       # torch.compile the models: for many windows on a GPU


CHOICES = {
    "condition": ("ecg", "text", "none"),
    "align": ("both", "cross", "local"),
    "critic": ("none", "self", "token"),
}
PRESETS = {"demo": {}, "paper": dict(dim=512, heads=8, mlp_dim=2048, depth=6)}


# ---------------------------------------------------------------------- configs that fit each other

def derived_sizes(tokenizer, encoder):
    """{field of GeneratorConfig: value} for this tokenizer and encoder (None: there is none)."""
    # T' x h x w tokens of `bits` bits a window, as the tokenizer makes them.
    sizes = dict(bits=tokenizer.config.bits, grid=tokenizer.grid)
    sizes |= dict(latent_frames=tokenizer.latent_frames, patch_t=tokenizer.config.patch_t)
    if encoder is not None:
        sizes["ecg_dim"] = encoder.config.dim
    return sizes


def fit_config(settings, tokenizer, encoder):
    """GeneratorSettings -> the GeneratorConfig of a generator for this tokenizer and encoder."""
    chosen = {name: getattr(settings, name) for name in GeneratorSettings.__dataclass_fields__}
    return GeneratorConfig(**chosen, **derived_sizes(tokenizer, encoder))


def check_fits(config, tokenizer, encoder):
    """UserError where a loaded GeneratorConfig is not for this tokenizer and encoder."""
    for key, value in derived_sizes(tokenizer, encoder).items():
        if getattr(config, key) != value:
            raise UserError(f"the generator is for {key}={getattr(config, key)}, "
                            f"its tokenizer or encoder has {value}")


def check_decoding(decoding, config, tokenizer_config):
    """UserError where a DecodingConfig makes no sense for this generator and tokenizer."""
    check_least(decoding, dict(steps=1, guidance=0, guidance_end=0, temperature=0, overlap=1))
    if decoding.scorer not in SCORERS:
        raise UserError(f"--scorer={decoding.scorer}: choose one of {', '.join(SCORERS)}")
    if decoding.scorer == "critic" and config.critic == "none":
        raise UserError("--scorer=critic: this generator was trained without a critic")
    # The first latent frame holds one frame and each later one P_t: a prefix must end with a
    # latent frame.
    window = tokenizer_config.frames
    patch_t = tokenizer_config.patch_t
    if decoding.overlap >= window or (decoding.overlap - 1) % patch_t:
        raise UserError(f"--overlap={decoding.overlap}: must be 1 + a multiple of {patch_t}, "
                        f"below {window}")


def load_encoder(folder, condition):
    """The encoder of a weights folder for this kind of condition; None where it is "none"."""
    if condition == "none":
        return None
    if condition == "text":
        # Imported here: only a text generator needs this module, which needs the package
        # transformers.
        from common.text_encoder import TextConfig, TextEncoder
        return load_weights(folder, "text_encoder", TextEncoder, TextConfig)
    return load_weights(folder, "ecg_encoder", EcgEncoder, EcgConfig)


def load_models(folder, device):
    """Tokenizer, encoder and generator of a weights folder, for sampling, on the device."""
    tokenizer = load_weights(folder, "tokenizer", Tokenizer, TokenizerConfig).eval().to(device)
    generator = load_weights(folder, "generator", Generator, GeneratorConfig).eval().to(device)
    encoder = load_encoder(folder, generator.config.condition)
    if encoder is not None:
        encoder = encoder.eval().to(device)
    check_fits(generator.config, tokenizer, encoder)
    return tokenizer, encoder, generator


# ------------------------------------------------------------------------- what the generator knows

class Condition(NamedTuple):
    """What the generator knows beside the tokens. Times are seconds after the window's first frame.

    L leads, n ECG patches a lead. A hidden part of the ECG (the paper's ECG mask) is True in a
    `hidden`.
    """
    fps: torch.Tensor           # (B,)
    drop: torch.Tensor      # (B,) True = the learned null context stands for the ECG, for guidance

    # for the cross-attention: the encoder's sequence
    z: torch.Tensor             # (B, L n, ecg_dim)
    z_time: torch.Tensor        # (B, L n), middle of each patch
    z_hidden: torch.Tensor      # (B, L n), some sample of the patch is hidden

    # for the local ECG: the samples themselves
    ecg: torch.Tensor           # (B, L, samples), cleaned
    leads: torch.Tensor         # (L,), indices into LEADS
    ecg_start: torch.Tensor     # (B,), time of ecg sample 0
    ecg_hidden: torch.Tensor    # (B, samples)

    # the anchor: one frame of the same video, which keeps a long video from drifting. In sampling
    # it is the first frame; in training any frame of the clip. The model does not know its time.
    anchor: torch.Tensor        # (B, h, w) its tokens; -1 = there is none
    anchor_ecg: torch.Tensor    # (B, L, local samples), the ECG around it


def null_condition(config, *, fps, anchor):
    """The null context throughout: the condition of video alone."""
    # One empty patch and one sample: they are dropped, so their values do not matter.
    zeros = torch.zeros(len(fps), 1, device=fps.device)                                 # B 1
    return Condition(
        fps=fps, drop=torch.ones_like(zeros[:, 0], dtype=torch.bool),
        z=zeros[..., None].expand(-1, 1, config.ecg_dim), z_time=zeros, z_hidden=zeros > 0,
        ecg=zeros[..., None], leads=zeros[0].long(), ecg_start=zeros[:, 0], ecg_hidden=zeros > 0,
        anchor=anchor, anchor_ecg=zeros[..., None])


def text_condition(config, encoder, text, *, fps, drop, anchor):
    """B lines of text in the ECG's place: the cross-attention sees their encoding, at time 0."""
    z, is_padding = encoder(text)                                               # B M ecg_dim
    # A text has no samples. The local way sees one sample of 0, or the null context where drop is
    # True.
    null = null_condition(config, fps=fps, anchor=anchor)
    return null._replace(z=z, z_time=0 * z[..., 0], z_hidden=is_padding, drop=drop)


def ecg_condition(encoder, ecg, leads, *, ecg_start, ecg_hidden, fps, drop, anchor, anchor_ecg):
    """An ECG (B, L, samples), encoded, with the time of each of its patches."""
    # A hidden sample must not reach the tokens by either way.
    ecg = ecg.masked_fill(ecg_hidden[:, None], 0)
    z = encoder(ecg, leads)                                                             # B L n D
    L, n = z.shape[1:3]

    # An ECG patch is `samples / n` samples long; its time is that of its middle.
    patch_middle = (torch.arange(n, device=fps.device) + 0.5) * (ecg.shape[-1] // n) / ECG_HZ
    z_time = (ecg_start[:, None] + patch_middle).repeat(1, L)                           # B L n
    z_hidden = ecg_hidden.unflatten(1, (n, -1)).any(2).repeat(1, L)                     # B L n

    if anchor_ecg is None:
        anchor_ecg = 0 * ecg[..., :1]
    return Condition(
        fps=fps, drop=drop, z=z.flatten(1, 2), z_time=z_time, z_hidden=z_hidden,
        ecg=ecg, leads=leads, ecg_start=ecg_start, ecg_hidden=ecg_hidden,
        anchor=anchor, anchor_ecg=anchor_ecg)


def build_condition(config, encoder, *, fps, ecg=None, leads=None, ecg_start=None, text=None,
                    drop=None, ecg_hidden=None, anchor=None, anchor_ecg=None):
    """The Condition of B clips for a generator of this config.

    fps (B,). condition=ecg: ecg (B, L, samples) cleaned, leads (L,), ecg_start (B,) seconds, and
    perhaps ecg_hidden (B, samples) bool. condition=text: text, B lines. drop (B,) bool: these
    clips get the null context. anchor (B, h, w) tokens of a frame of the video, anchor_ecg (B, L,
    local samples) around it.
    """
    if anchor is None:
        anchor = torch.full((len(fps), 1, 1), -1, device=fps.device)
    if drop is None:
        drop = torch.zeros(len(fps), dtype=torch.bool, device=fps.device)
    if config.condition == "none":
        return null_condition(config, fps=fps, anchor=anchor)
    if config.condition == "text":
        return text_condition(config, encoder, text, fps=fps, drop=drop, anchor=anchor)
    if ecg_hidden is None:
        ecg_hidden = torch.zeros_like(ecg[:, 0], dtype=torch.bool)
    return ecg_condition(encoder, ecg, leads, ecg_start=ecg_start, ecg_hidden=ecg_hidden, fps=fps,
                         drop=drop, anchor=anchor, anchor_ecg=anchor_ecg)


def concat_unconditional(cond):
    """A condition of B clips -> of 2 B: first as they are, then with the null context."""
    doubled = {}
    for name, value in cond._asdict().items():
        # The leads (L,) belong to all clips alike.
        doubled[name] = value if name == "leads" else torch.cat([value, value])
    doubled["drop"][len(cond.drop):] = True
    return Condition(**doubled)


def classifier_free_guidance(logits, scale):
    """Classifier-free guidance (Ho and Salimans 2022): uncond + s (cond - uncond).

    logits (2 B, ...), conditional half first, -> (B, ...). scale None: there is no guidance, the
    logits (B, ...) stay as they are.
    """
    if scale is None:
        return logits
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond)


# ---------------------------------------------------------------------------- the transformer

class Context(NamedTuple):
    """What the transformer reads of a Condition.

    It does not depend on the tokens: sampling computes it once a window, for all decoding steps.
    For guidance it is of 2 B clips: first B under the ECG, then the same under the null context.
    """
    anchor: torch.Tensor        # (B, h, w) tokens; -1 = there is none
    local: torch.Tensor         # (B, 1+T', D), the ECG around the anchor and each latent frame
    rotary: Rotary              # of the times of the anchor's and the window's tokens
    # for each block
    keys_values: list           # the keys and the values of the sequence Z, of the first B clips
    null_results: list          # what the others read in its place; None where there are none


class Trunk(nn.Module):
    """Tokens and condition -> features of each token: a generator's, or a token critic's."""

    def __init__(self, config, depth):
        super().__init__()
        c = self.config = config
        # Tokens and their positions. At 0.02, the usual scale, learning stalled; 0.3 works.
        self.embed = nn.Linear(c.bits, c.dim)
        self.mask_token = nn.Parameter(0.3 * torch.randn(c.dim))
        self.spatial_position = nn.Parameter(0.3 * torch.randn(1, c.grid ** 2, c.dim))
        self.temporal_position = nn.Parameter(0.3 * torch.randn(c.latent_frames, 1, c.dim))
        self.anchor_position = nn.Parameter(0.3 * torch.randn(1, 1, c.dim))

        # What stands in the ECG's place where there is none: the null context of guidance.
        self.null_z = nn.Parameter(0.02 * torch.randn(c.ecg_dim))
        self.null_local = nn.Parameter(torch.zeros(c.dim))

        # The frame rate, and the ECG samples around a latent frame.
        self.rate = nn.Linear(1, c.dim)
        self.local_samples = round((c.ecg_before + c.ecg_after) * ECG_HZ)
        self.local_in = nn.Linear(self.local_samples, c.dim)
        self.local_hidden = nn.Linear(self.local_samples, c.dim, bias=False)
        self.local_lead = nn.Embedding(len(LEADS), c.dim)
        self.local_out = nn.Linear(c.dim, c.dim)

        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim, context_dim=c.ecg_dim)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(c.dim)

        # These branches start at zero. With a usual start they are too large beside the tokens, and
        # learning stalls.
        for layer in (self.local_out, self.local_hidden, self.rate):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def features(self, tokens, masked, cond):
        """tokens, masked (B, T', h, w), Condition -> features (B, T' h w, D), float."""
        return self.transform(tokens, masked, self.context(cond))

    def context(self, cond):
        """Condition -> Context: all that is computed without the tokens."""
        nothing = [None] * len(self.blocks)
        return Context(*self.window_inputs(cond), self.keys_values(cond), nothing)

    def guided_context(self, cond):
        """Condition of B clips -> Context of 2 B clips, for guidance."""
        # All vectors that the null context shows are the same: no attention is needed.
        null_results = [block.null_result(self.null_z) for block in self.blocks]
        inputs = self.window_inputs(concat_unconditional(cond))
        return Context(*inputs, self.keys_values(cond), null_results)

    def window_inputs(self, cond):
        """Condition -> anchor, local ECG and rotary angles, as a Context has them."""
        c = self.config
        times = self.frame_times(cond.fps)                                              # B T'
        local = self.local_features(cond, times)                                        # B 1+T' D

        # The seconds go into the rotary embedding. The anchor has no place in the window: it gets
        # time 0, and a position embedding of its own.
        times = F.pad(times, (1, 0))                                                    # B 1+T'
        x_time = times.repeat_interleave(c.grid ** 2, dim=1) / TIME_UNIT        # B (1+T')hw
        # One shape, whether there is an anchor or not: compiled code is for given shapes.
        anchor = cond.anchor.expand(-1, c.grid, c.grid).contiguous()                    # B h w
        return anchor, local, rotary_angles(x_time, c.dim // c.heads)

    def keys_values(self, cond):
        """Condition -> for each block, the keys and the values of the sequence Z."""
        rotary = rotary_angles(cond.z_time / TIME_UNIT, self.config.dim // self.config.heads)
        z = self.cross_context(cond)                                            # B Ln ecg_dim
        return [block.cross.keys_values(z, rotary) for block in self.blocks]

    def transform(self, tokens, masked, context):
        """tokens, masked (B, T', h, w), Context -> features (B, T' h w, D), float."""
        x = self.first_blocks(tokens, masked, context)                          # B (1+T')hw D
        x = self.blocks[-1](x, context.rotary, context.keys_values[-1], context.null_results[-1])
        # Only the window's own tokens are predicted, not the anchor's.
        return self.norm(x[:, self.config.grid ** 2:])                                  # B T'hw D

    def first_blocks(self, tokens, masked, context):
        """All but the last block: tokens, masked (B, T', h, w), Context -> x (B, (1+T') h w, D)."""
        B, T, h, w = tokens.shape

        # 1. The anchor goes before the window's latent frames. Where there is none, it is masked.
        anchor = context.anchor[:, None]                                        # B 1 h w
        tokens = torch.cat([anchor.clamp(min=0), tokens], dim=1)                # B 1+T' h w
        masked = torch.cat([anchor < 0, masked], dim=1)                         # B 1+T' h w

        # 2. Token embedding: the bits of the code, or the mask token.
        x = self.embed(index_to_bits(tokens, self.config.bits))
        x = torch.where(masked[..., None], self.mask_token, x)
        x = x.reshape(B, 1 + T, h * w, -1)                                      # B 1+T' hw D

        # 3. Position in space and in time, and the ECG around each latent frame.
        temporal_position = torch.cat([self.anchor_position, self.temporal_position])   # 1+T' 1 D
        x = x + self.spatial_position + temporal_position + context.local[:, :, None]
        x = x.flatten(1, 2)                                                     # B (1+T')hw D

        # 4. Transformer blocks: self-attention over all tokens, cross-attention to Z, both with the
        #    seconds in the rotary embedding.
        each = zip(self.blocks[:-1], context.keys_values, context.null_results)
        for block, keys_values, null_result in each:
            x = block(x, context.rotary, keys_values, null_result)
        return x

    def last_block(self, x, places, context):
        """What transform does after first_blocks, for the n tokens at `places` (B, n) alone.

        x (B, (1+T') h w, D) -> features (B, n, D), float.
        """
        def at_places(every):
            """every (B, (1+T') h w, ...) -> (B, n, ...). The anchor's tokens come first."""
            rows = places + self.config.grid ** 2
            return every.gather(1, rows[..., None].expand(-1, -1, every.shape[-1]))

        block = self.blocks[-1]
        rotary = Rotary(*[at_places(angles[:, 0])[:, None] for angles in context.rotary])
        # These tokens still attend to all tokens: the keys and values are of all of them.
        h = block.norm1(x)
        keys_values = block.attn.keys_values(h, context.rotary)
        x = at_places(x) + block.attn(at_places(h), rotary, keys_values)
        x = x + block.read_context(x, rotary, context.keys_values[-1], context.null_results[-1])
        x = x + block.mlp(block.norm2(x))
        return self.norm(x)

    def frame_times(self, fps):
        """fps (B,) -> (B, T'), the middle of each latent frame in seconds.

        The first latent frame is one frame, at time 0; each later one is P_t frames.
        """
        i = torch.arange(self.config.latent_frames, device=fps.device)
        patch_t = self.config.patch_t
        middle = torch.where(i == 0, 0, (i - 1) * patch_t + (patch_t + 1) / 2)  # T', frames
        return middle / fps[:, None]

    def local_ecg(self, cond, times):
        """The ECG from ecg_before to ecg_after seconds around each latent frame, W samples.

        times (B, T') -> samples (B, L, T', W), hidden ones zero, and where they are hidden
        (B, 1, T', W), 0 or 1. What lies outside the recording is hidden, too.
        """
        L, N = cond.ecg.shape[1:]
        T = times.shape[1]
        start = (times - self.config.ecg_before - cond.ecg_start[:, None]) * ECG_HZ
        at = start.round().long()[..., None] + torch.arange(self.local_samples, device=times.device)
        outside = (at < 0) | (at >= N)                                                  # B T' W
        at = at.clamp(0, N - 1)

        hidden = cond.ecg_hidden[:, None].expand(-1, T, -1).gather(2, at)
        hidden = (outside | hidden)[:, None]                                            # B 1 T' W
        ecg = cond.ecg[:, :, None].expand(-1, -1, T, -1)                                # B L T' N
        samples = ecg.gather(3, at[:, None].expand(-1, L, -1, -1))                      # B L T' W
        return samples.masked_fill(hidden, 0), hidden.to(samples.dtype)

    def local_features(self, cond, times):
        """times (B, T') -> what is added to all tokens of the anchor and of each latent frame, (B,
        1+T', D).

        This is how a beat's time reaches a token.
        """
        samples, hidden = self.local_ecg(cond, times)
        anchor_ecg = cond.anchor_ecg[:, :, None].expand_as(samples[:, :, :1])           # B L 1 W
        samples = torch.cat([anchor_ecg, samples], dim=2)                       # B L 1+T' W
        hidden = F.pad(hidden, (0, 0, 1, 0))                                    # B 1 1+T' W

        # Each lead is projected under its own lead embedding, then the leads are averaged.
        leads = self.local_lead(cond.leads)[:, None]                                    # L 1 D
        local = self.local_in(samples) + self.local_hidden(hidden) + leads      # B L 1+T' D
        local = self.local_out(F.gelu(local).mean(1))                                   # B 1+T' D

        is_null = cond.drop[:, None, None] | (self.config.align == "cross")
        local = torch.where(is_null, self.null_local, local)
        rate = (cond.fps / 25).log().float()[:, None, None]                             # B 1 1
        return local + self.rate(rate)

    def cross_context(self, cond):
        """Z (B, L n, ecg_dim), the null context where a clip is dropped or a patch is hidden."""
        is_null = cond.drop[:, None, None] | cond.z_hidden[..., None]
        is_null = is_null | (self.config.align == "local")
        return torch.where(is_null, self.null_z, cond.z)


class Generator(Trunk):
    """The masked token transformer, and its critic if it has one."""

    def __init__(self, config):
        for key, choices in CHOICES.items():
            value = getattr(config, key)
            if value not in choices:
                raise UserError(f"--{key}={value}: choose one of {', '.join(choices)}")
        super().__init__(config, config.depth)
        c = config

        # 2^7 outputs for the low bits and 2^6 for the high ones, in place of 2^13 for the whole
        # code.
        self.low_bits = (c.bits + 1) // 2
        self.high_bits = c.bits // 2
        self.to_low = nn.Linear(c.dim, 2 ** self.low_bits)
        self.given_low = nn.Embedding(2 ** self.low_bits, c.dim)
        self.mix = nn.Linear(c.dim, c.dim)
        self.to_high = nn.Linear(c.dim, 2 ** self.high_bits)

        # A token critic is a transformer of its own; a self critic judges by the generator's
        # features.
        if c.critic == "token":
            self.critic = Trunk(c, c.critic_depth)
        if c.critic != "none":
            self.to_fake = nn.Linear(c.dim, 1)

    def low_logits(self, x):
        """Features (B, N, D) -> logits of the low bits (B, N, 2^7), float32."""
        return self.to_low(x).float()

    def high_logits(self, x, low):
        """Features (B, N, D), low bits (B, N) -> logits of the high bits given them (B, N, 2^6)."""
        return self.to_high(F.gelu(self.mix(x) + self.given_low(low))).float()

    def forward(self, tokens, masked, cond):
        """The loss of every token, nats (B, T', h, w)."""
        return self.token_loss(self.features(tokens, masked, cond), tokens)

    def token_loss(self, x, tokens):
        """Features (B, N, D), true tokens (B, T', h, w) -> cross-entropy of every token, nats,
        same shape.

        Eq. 7 is its mean over the masked tokens (train_generator.masked_mean).
        """
        low = tokens.flatten(1) % 2 ** self.low_bits                                    # B N
        high = tokens.flatten(1) >> self.low_bits                                       # B N
        # Eq. 7, -log p(low) - log p(high | low). cross_entropy wants the classes in dimension 1.
        low_logits = self.low_logits(x)                                         # B N 2^7
        high_logits = self.high_logits(x, low)                                  # B N 2^6
        loss_low = F.cross_entropy(low_logits.transpose(1, 2), low, reduction="none")
        loss_high = F.cross_entropy(high_logits.transpose(1, 2), high, reduction="none")
        return (loss_low + loss_high).reshape(tokens.shape)

    @torch.no_grad()
    def critic_input(self, x, tokens, masked, uniforms):
        """What the critic judges: the tokens, with a sample in each masked place. No gradient
        passes.

        Features x (B, N, D) of these tokens and masked (B, T', h, w); uniforms (B, 2, N).
        """
        low = sample_categorical(self.low_logits(x), uniforms[:, 0])
        high = sample_categorical(self.high_logits(x, low), uniforms[:, 1])
        sampled = (low + (high << self.low_bits)).reshape(tokens.shape)
        return torch.where(masked, sampled, tokens)                                     # Eq. 9

    @property
    def critic_trunk(self):
        """The transformer of the critic: its own, or the generator's."""
        return self.critic if self.config.critic == "token" else self

    def critic_logits(self, tokens, cond):
        """Logit that each token (B, T', h, w) is fake. No token is masked here."""
        return self.judge(tokens, self.critic_trunk.context(cond))

    def judge(self, tokens, context):
        """The same with the Context of the critic's transformer."""
        nothing = torch.zeros_like(tokens, dtype=torch.bool)
        x = self.critic_trunk.transform(tokens, nothing, context)
        return self.to_fake(x).float().reshape(tokens.shape)

    @torch.no_grad()
    def sample_tokens(self, tokens, places, context, uniforms, *, guidance, temperature):
        """Sample the masked tokens from their distributions -> tokens, log-probabilities (B, n).

        tokens (B, T', h, w); places (B, n): which of the T' h w are masked; uniforms (2, B, T' h w)
        in (0, 1). With guidance the context is of 2 B clips, made by guided_context.
        """
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked.flatten(1).scatter_(1, places, True)                                     # B T' h w
        copies = 1
        if guidance is not None:
            # One batch of twice the size: under the ECG, and under the null context
            copies = 2
        x = self.first_blocks(tokens.repeat(copies, 1, 1, 1), masked.repeat(copies, 1, 1, 1),
                              context)
        # From here on the masked tokens are enough.
        x = self.last_block(x, places.repeat(copies, 1), context)               # [2]B n D
        temperature = max(temperature, 1e-4)

        # Sample the low bits.
        low_logits = classifier_free_guidance(self.low_logits(x), guidance)             # B n 2^7
        low = sample_categorical(low_logits / temperature, uniforms[0].gather(1, places))

        # Sample the high bits, given the low ones just sampled.
        high_logits = self.high_logits(x, low.repeat(copies, 1))
        high_logits = classifier_free_guidance(high_logits, guidance)                   # B n 2^6
        high = sample_categorical(high_logits / temperature, uniforms[1].gather(1, places))

        # Log-probability of the whole code, of which a scorer makes its confidence.
        log_low = low_logits.log_softmax(-1).gather(-1, low[..., None])[..., 0]
        log_high = high_logits.log_softmax(-1).gather(-1, high[..., None])[..., 0]
        return low + (high << self.low_bits), log_low + log_high


# ------------------------------------------------------------------------- masked parallel decoding

def sample_categorical(logits, u):
    """One sample of softmax(logits): (B, N, K) and uniform numbers (B, N) -> index (B, N).

    The index is where the cumulative distribution passes u.
    """
    # In place of torch.multinomial: the uniform numbers come from outside, so a seed is enough to
    # repeat it.
    cumulative = logits.softmax(-1).cumsum(-1)
    # The last value is 1 except for rounding; a threshold above it would give an index too large.
    threshold = u * cumulative[..., -1]
    return (cumulative < threshold[..., None]).sum(-1)


def cosine_schedule(u):
    """The share of tokens that is masked at u in [0, 1]: 1 at 0, falling to 0 at 1."""
    return torch.cos(math.pi / 2 * torch.as_tensor(u))                                  # Eq. 8


def radical_inverse(n, base):
    """Van der Corput's sequence: the digits of whole numbers n (N,), mirrored at the point."""
    x = np.zeros(len(n))
    scale = 1.0
    while n.any():
        scale /= base
        x = x + scale * (n % base)
        n = n // base
    return x


@lru_cache
def halton_order(T, h, w, device):
    """The turn of each place in Halton's sequence, int (T h w,). Early ones lie far apart."""
    n = np.arange(1, 64 * T * h * w)            # long enough for each place to come
    # Three coprime bases, so that the three coordinates never fall into step.
    t = (radical_inverse(n, 5) * T).astype(int)
    row = (radical_inverse(n, 2) * h).astype(int)
    column = (radical_inverse(n, 3) * w).astype(int)
    places, first = np.unique(np.ravel_multi_index([t, row, column], (T, h, w)), return_index=True)
    # A place that never comes is last; `first` is when each of the others comes for the first time.
    turn = np.full(T * h * w, len(n))
    turn[places] = first
    # argsort twice turns the first appearance of each place into its rank
    return send(torch.from_numpy(turn.argsort().argsort()), device)


class Uniforms(NamedTuple):
    """All random numbers of one window, uniform in (0, 1). S decoding steps, N = T' h w tokens."""
    order: torch.Tensor         # (B, N), for a random order of the places
    tokens: torch.Tensor        # (S, 2, B, N), for the low and the high bits of the tokens
    noise: torch.Tensor         # (S, B, N), for the noise of the scorer


def draw_uniforms(decoding, tokens, rngs):
    """The Uniforms of a window of tokens (B, T', h, w).

    rngs: one torch.Generator for all videos, or one for each.

    They come from the CPU: a seed gives the same video on every device. They are drawn and sent
    together, as a GPU that waits for the CPU in each step would stand still.
    """
    # Which scorer needs which decides how many are drawn, and so what a seed gives.
    orders = 0 if decoding.scorer == "halton" else 1
    kinds = 3 if decoding.scorer in ("confidence", "critic") else 2
    B, N = tokens.flatten(1).shape
    shape = (orders + decoding.steps * kinds, B // len(rngs), N)
    u = torch.cat([torch.rand(shape, generator=rng) for rng in rngs], dim=1)            # ... B N
    u = send(u.clamp(1e-7, 1 - 1e-7), tokens.device)
    steps = u[orders:].unflatten(0, (decoding.steps, kinds))                        # S kinds B N
    # What a scorer has no use for is never read.
    return Uniforms(order=u[0], tokens=steps[:, :2], noise=steps[:, -1])


def send(x, device):
    """Copy a tensor of the CPU to the device. A GPU takes it while the CPU goes on."""
    if device.type == "cuda":
        # From pinned memory only: it cannot be moved while the GPU reads it.
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Draft(NamedTuple):
    """A decoding after one of its steps: what a scorer looks at. It doubts n of the N = T' h w."""
    tokens: torch.Tensor        # (B, T', h, w), all of them filled
    log_prob: torch.Tensor      # (B, n), of this step's samples
    places: torch.Tensor        # (B, n), which tokens it may doubt
    context: Context            # of the critic
    guidance: float             # its scale at this step; None = off
    remaining: float            # share of the steps that are still to come; 0 after the last
    order: torch.Tensor         # (B, N), a fixed order of the places
    noise: torch.Tensor         # (B, N), uniform in (0, 1)


def order_doubt(generator, draft):
    """A fixed order, whatever was sampled."""
    return draft.order.gather(1, draft.places)


def confidence_doubt(generator, draft):
    """The least likely samples, with Gumbel noise that fades out (MaskGIT, Chang et al. 2022)."""
    u = draft.noise.gather(1, draft.places)
    gumbel = -(-u.log()).log()
    return -draft.log_prob - draft.remaining * gumbel


def critic_doubt(generator, draft):
    """The tokens that the critic takes for fake, with noise that fades out (Lezama et al. 2022)."""
    tokens = draft.tokens
    if draft.guidance is not None:
        tokens = torch.cat([tokens, tokens])
    logits = classifier_free_guidance(generator.judge(tokens, draft.context), draft.guidance)
    jitter = draft.noise - 0.5
    doubt = logits.flatten(1) + draft.remaining * jitter                                # B N
    return doubt.gather(1, draft.places)


# Each says how much it doubts the tokens of a Draft in its places: float (B, n). The most doubted
# are masked again.
SCORERS = {
    "random": order_doubt,
    "halton": order_doubt,
    "confidence": confidence_doubt,
    "critic": critic_doubt,
}


def guidance_scales(decoding):
    """The scale of guidance at each step, linear from the first to the last; None = off."""
    first = decoding.guidance
    last = decoding.guidance_end or first
    if first == 1 and last == 1:
        return [None] * decoding.steps
    last_step = max(decoding.steps - 1, 1)
    return [first + (last - first) * step / last_step for step in range(decoding.steps)]


def count_steps(steps, num_prefix, T):
    """How many decoding steps a window of T latent frames takes: all, or in proportion to the
    frames that it does not know, if it knows more than its first one."""
    share = (T - num_prefix) / max(T - 1, 1)
    return min(steps, math.ceil(steps * share))


@torch.no_grad()
def maskgit_decode(generator, tokens, num_prefix, cond, decoding, uniforms):
    """Masked parallel decoding (Chang et al. 2022): the latent frames after num_prefix are masked.

    tokens (B, T', h, w), of which the first num_prefix latent frames are known and stay; a
    DecodingConfig; the Uniforms of this window. Returns all tokens.
    """
    B, T, h, w = tokens.shape
    decoding = replace(decoding, steps=count_steps(decoding.steps, num_prefix, T))
    # All numbers of tokens are known here: no step waits for a GPU to tell them.
    first_masked = torch.arange(num_prefix * h * w, T * h * w, device=tokens.device).expand(B, -1)
    total = first_masked.shape[1]
    places = first_masked                                                               # B n
    order = uniforms.order
    if decoding.scorer == "halton":
        order = halton_order(T, h, w, tokens.device).expand(B, -1)

    # What does not depend on the tokens is computed once for all steps.
    scales = guidance_scales(decoding)
    guided = scales[0] is not None

    def context_of(trunk):
        """The Context of a transformer."""
        return trunk.guided_context(cond) if guided else trunk.context(cond)

    context = critic_context = context_of(generator)
    if decoding.scorer == "critic":
        critic_context = context_of(generator.critic_trunk)

    for step, guidance in enumerate(scales):
        # 1. Sample every masked token from its own distribution, all of them in parallel.
        sampled, log_prob = generator.sample_tokens(
            tokens, places, context, uniforms.tokens[step], guidance=guidance,
            temperature=decoding.temperature)
        tokens = tokens.flatten(1).scatter(1, places, sampled).reshape(B, T, h, w)

        # 2. The cosine schedule says how many are masked again; none after the last step (Eq. 8).
        done = (step + 1) / decoding.steps
        num_masked = int(total * cosine_schedule(done))

        # 3. Those that the scorer doubts most go back under the mask. The critic may take back any
        #    token that was masked at the start, the others only samples of this step.
        if decoding.scorer == "critic":
            places = first_masked
        draft = Draft(tokens=tokens, log_prob=log_prob, places=places, context=critic_context,
                      guidance=guidance, remaining=1 - done, order=order,
                      noise=uniforms.noise[step])
        doubt = SCORERS[decoding.scorer](generator, draft)                              # B n
        places = places.gather(1, doubt.topk(num_masked, dim=1).indices)
    return tokens


# ---------------------------------------------------------------- progressive sampling, section 3.3

def tokens_of_prefix(tokenizer, prefix, batch, device):
    """The tokens (B, T', h, w) that a window starts with, and how many latent frames are known.

    prefix (B, C, k, H, W): the frames that the window knows; None: it knows none.
    """
    grid = tokenizer.grid
    shape = (batch, tokenizer.latent_frames, grid, grid)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    if prefix is None:
        return tokens, 0
    # The tokenizer is causal: the tokens of k frames are those of a whole window that begins
    # with them
    known = tokenizer.encode(prefix)                                                    # B k' h w
    num_prefix = known.shape[1]
    tokens[:, :num_prefix] = known
    return tokens, num_prefix


def cut_ecg(ecg, hidden, *, ecg_start, middle, samples, device):
    """The ECG that one window sees: `samples` samples around `middle` seconds, on the device.

    ecg (B, L, N), hidden (B, N) numpy, sample 0 at ecg_start seconds -> ecg (B, L, samples), hidden
    (B, samples), and the time of the first of these samples, seconds of the video.
    """
    first = round((middle - ecg_start) * ECG_HZ) - samples // 2
    ecg = torch.from_numpy(crop_or_pad(ecg, first, samples))
    hidden = torch.from_numpy(crop_or_pad(hidden, first, samples)) > 0
    return send(ecg, device), send(hidden, device), ecg_start + first / ECG_HZ


def compiled(function):
    """A function of tensors, compiled; on a GPU it is recorded as one CUDA graph."""
    graph = torch.compile(function, mode="reduce-overhead", dynamic=False)

    def call(*inputs):
        # A CUDA graph writes its results to the same place each time: take a copy of them, and say
        # that the place is free again.
        torch.compiler.cudagraph_mark_step_begin()
        return graph(*inputs).clone()
    return call


def compile_models(tokenizer, encoder, generator):
    """Compile what has the same shapes in all steps and windows, where that is not done yet.

    A window is thousands of small kernels, which the CPU starts more slowly than a GPU runs them.
    The first window takes the time of the compilation.
    """
    parts = [(generator, "first_blocks"), (generator.critic_trunk, "first_blocks")]
    parts.append((tokenizer, "unembed"))
    if generator.config.condition == "ecg":
        parts.append((encoder, "encode"))
    for model, name in parts:
        # A compiled method is an attribute of the model itself, not of its class.
        if name not in vars(model):
            setattr(model, name, compiled(getattr(model, name)))


def cut_anchor_ecg(generator, ecg, hidden, *, ecg_start):
    """The ECG around frame 0 of the videos, (B, L, local samples), on the generator's device.

    ecg (B, L, N), hidden (B, N) numpy, sample 0 at ecg_start seconds. What is hidden is zero.
    """
    first = round((-generator.config.ecg_before - ecg_start) * ECG_HZ)
    around = crop_or_pad(ecg * ~hidden[:, None], first, generator.local_samples)
    return torch.from_numpy(around).to(next(generator.parameters()).device)


def decode_window(tokenizer, tokens):
    """Tokens (B, T', h, w) -> video (B, C, T+1, H, W) in [0, 1]; on a GPU in bfloat16.

    Frames are always encoded in float32: bfloat16 would flip some signs of LFQ.
    """
    with bfloat16(tokens.device, wanted=tokens.device.type == "cuda"):
        return tokenizer.decode(tokens)


@torch.no_grad()
def stream_video(tokenizer, encoder, generator, *, ecg, leads, ecg_start, frames, fps, decoding,
                 first=None, seed=0, hidden=None, text=None):
    """Progressive sampling: yields chunks (B, C, n, H, W) in [0, 1], `frames` frames in all.

    ecg (B, L, N) cleaned, numpy, its sample 0 at ecg_start seconds; leads (L,); decoding, a
    DecodingConfig; first (B, C, 1, H, W) or None; hidden (N,) or (B, N) bool or None, samples to
    hide; text: B lines, for a text generator; encoder None for a generator of video alone. seed: a
    number, or one for each video: then each is as if it were made alone.

    Each window knows the last `overlap` frames of the one before, the ECG of its own time span, and
    the video's first frame as its anchor. Memory does not grow with the length.
    """
    config = generator.config
    device = next(generator.parameters()).device
    B = len(ecg)
    rngs = [torch.Generator().manual_seed(s) for s in np.atleast_1d(seed).tolist()]
    window = tokenizer.config.frames
    samples = encoder.config.samples if config.condition == "ecg" else 0
    leads = torch.as_tensor(leads, device=device)
    if hidden is None:
        hidden = np.zeros(ecg.shape[-1], bool)
    hidden = np.broadcast_to(hidden, (B, ecg.shape[-1]))
    if decoding.compile:
        compile_models(tokenizer, encoder, generator)

    # The anchor is frame 0 of the video; its tokens come with the first window, its ECG now.
    anchor = None
    anchor_ecg = cut_anchor_ecg(generator, ecg, hidden, ecg_start=ecg_start)    # B L local_samples
    prefix = first
    begin = 0                   # the window's first frame
    done = 0                    # frames that were yielded
    while done < frames:
        # 1. Cut the ECG: the encoder's samples, centred on this window.
        window_ecg, window_hidden, start = cut_ecg(
            ecg, hidden, ecg_start=ecg_start, middle=(begin + window / 2) / fps, samples=samples,
            device=device)                                                      # B L samples

        # 2. Encode the prefix: the first frame, or the last frames of the window before.
        tokens, num_prefix = tokens_of_prefix(tokenizer, prefix, B, device)

        # 3. Build the condition, and decode the masked tokens under it.
        uniforms = draw_uniforms(decoding, tokens, rngs)
        with bfloat16(device):
            cond = build_condition(
                config, encoder, fps=torch.full((B,), float(fps), device=device), anchor=anchor,
                ecg=window_ecg, leads=leads, ecg_hidden=window_hidden, anchor_ecg=anchor_ecg,
                ecg_start=torch.full((B,), start - begin / fps, device=device), text=text)
            tokens = maskgit_decode(generator, tokens, num_prefix, cond, decoding, uniforms)
        if anchor is None:
            anchor = tokens[:, 0]                                               # B h w

        # 4. Tokens to pixels; yield the frames that are new.
        video = decode_window(tokenizer, tokens)                                # B C window H W
        new = video[:, :, done - begin:][:, :, :frames - done]
        yield new

        # 5. Slide on: the next window begins with the last frames of this one.
        done = done + new.shape[2]
        begin = begin + window - decoding.overlap
        prefix = video[:, :, -decoding.overlap:]


def main():
    """Print settings and parameters. Nothing is loaded: the derived sizes are flags here, too."""
    paper = PRESETS["paper"] | dict(grid=16, ecg_dim=768)
    config = parse_flags(GeneratorConfig, PRESETS | {"paper": paper})
    print(f"{config}\n{parameter_count(Generator(config)):.2f}M parameters")


if __name__ == "__main__":
    run_main(main)
