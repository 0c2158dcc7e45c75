"""Stage 1, the video tokenizer (ECHOPulse section 3.1, Table 4): video -> tokens of 13 bits -> video.

A C-ViViT with lookup-free quantization. The first frame is cut into P x P patches, the T frames after it into
P_t x P x P patches. Self-attention inside each latent frame, then causal attention along time at each place,
so a token never sees a later frame; LFQ keeps the sign of 13 numbers; the decoder goes the same way back.

    video (B, C, T+1, H, W) in [0, 1]  <->  tokens (B, 1 + T/P_t, H/P, W/P) int64 in [0, 2^13)

Run it (`python tokenizer.py --preset=paper`) to see the settings, the number of parameters and the shapes.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from common.flags import UserError, parse_flags, run_main


@dataclass
class TokenizerConfig:
    size: int = 64              # height and width of a frame, pixels
    channels: int = 1           # 1 = grey (echo), 3 = colour
    frames: int = 11            # frames of one window, T + 1
    patch: int = 8              # P_h = P_w, pixels
    patch_t: int = 2            # P_t, frames of one latent frame after the first
    dim: int = 128              # width of the transformer
    heads: int = 4              # attention heads
    mlp_dim: int = 512          # hidden width of the MLP
    depth_space: int = 2        # spatial layers, in the encoder and again in the decoder
    depth_time: int = 2         # temporal layers, in the encoder and again in the decoder
    bits: int = 13              # the codebook has 2^bits codes


PRESETS = {"demo": {}, "paper": dict(size=128, channels=3, dim=512, heads=8, mlp_dim=2048,
                                     depth_space=4, depth_time=4)}


# ---------------------------------------------------------------------------- the transformer, written once

def rotate(x, time, shortest=2.0, longest=200.0):
    """Rotary position embedding (Su et al. 2021): attention sees differences of `time` only.

    x (B, heads, N, d), time (N,) or (B, N) in any unit; periods run from `shortest` to `longest` of it.
    """
    half = x.shape[-1] // 2
    step = torch.arange(half, device=x.device) / max(half - 1, 1)
    angle = time[..., None].float() * (2 * math.pi / shortest) * (shortest / longest) ** step
    angle = angle if time.dim() == 1 else angle[:, None]                       # [B 1] N d/2
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) over itself or over a context (B, M, context_dim)."""

    def __init__(self, dim, heads, context_dim=None, bias=False, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim or dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None, time=None, context_time=None):
        B, N, D = x.shape
        context, context_time = (x, time) if context is None else (context, context_time)
        q = self.q(x).reshape(B, N, self.heads, -1).transpose(1, 2)                         # B h N d
        kv = self.kv(context).reshape(B, context.shape[1], 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)                                                    # B h M d, twice
        if time is not None:
            q, k = rotate(q, time), rotate(k, context_time)
        if x.device.type == "cpu":      # there, attention is up to 3 times as fast in float32 as in bfloat16
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=self.causal)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention where a context is given, MLP."""

    def __init__(self, dim, heads, mlp_dim, context_dim=None, bias=False, causal=False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, bias=bias, causal=causal)
        if context_dim:
            self.norm_cross, self.cross = nn.LayerNorm(dim), Attention(dim, heads, context_dim, bias=bias)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim, mlp_dim)

    def forward(self, x, time=None, context=None, context_time=None):
        x = x + self.attn(self.norm1(x), time=time)
        if context is not None:
            x = x + self.cross(self.norm_cross(x), context, time, context_time)
        return x + self.mlp(self.norm2(x))


def parameter_count(model, trained=False):
    """Parameters, or those that are trained, in millions."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) / 1e6


# ---------------------------------------------------------------------------- low-rank adaptation

class LowRank(nn.Module):
    """LoRA (Hu et al. 2022) of one weight: W + up down, of rank r. up starts at zero and changes nothing."""

    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns ** 0.5)

    def forward(self, weight):
        return weight + (self.up @ self.down).reshape(weight.shape)


def add_lora(model, rank):
    """Freeze a model and adapt each of its linear layers, Unpatch among them: only `up` and `down` train."""
    model.requires_grad_(False)
    for layer in [m for m in model.modules() if isinstance(m, (nn.Linear, nn.ConvTranspose2d))]:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return model


def adapters(model):
    """State dict of the adapters alone; load_state_dict(..., strict=False) puts it back after add_lora."""
    return {name: x for name, x in model.state_dict().items() if name.endswith((".0.up", ".0.down"))}


def merge(model):
    """State dict in plain weights, the adapters folded in; the model stays as it is."""
    plain = {}
    for name, x in model.state_dict().items():
        layer, adapted, part = name.partition(".parametrizations.weight.")
        if part == "original":
            plain[f"{layer}.weight"] = model.get_submodule(layer).weight.detach()
        elif not adapted:
            plain[name] = x
    return plain


# ---------------------------------------------------------------------------- lookup-free quantization

def index_to_bits(index, bits):
    """int64 (...) -> float (..., bits) of -1 and 1; bit 0 first."""
    return (index[..., None] >> torch.arange(bits, device=index.device) & 1).float() * 2 - 1


def bits_to_index(z):
    """(..., bits) -> int64 (...): the sum over i of 2^i [z_i > 0]."""
    return ((z > 0).long() << torch.arange(z.shape[-1], device=z.device)).sum(-1)


def index_counts(index, bits):
    """How often each of the 2^bits codes stands in index (...), float (2^bits,)."""
    return torch.bincount(index.flatten(), minlength=2 ** bits).float()


def code_use(counts):
    """How often each code was drawn (2^bits,) -> {"codes": how many were, "perplexity": e^entropy}."""
    share = counts[counts > 0] / counts.sum()
    return {"codes": len(share), "perplexity": (-share * share.log()).sum().exp().item()}


def joint(p):
    """p (N, b), the probability of each bit to be 1 -> (N, 2^b), of each code (bits independent)."""
    codes = torch.ones_like(p[:, :1])
    for i in range(p.shape[1]):
        codes = torch.cat([codes * (1 - p[:, i:i + 1]), codes * p[:, i:i + 1]], dim=1)
    return codes


class LFQ(nn.Module):
    """Lookup-free quantization (Yu et al. 2023): the code is the sign of `bits` numbers; no codebook.

    The entropy loss asks for codes certain one by one, E[H(p)] low, and varied together, H(E[p]) high.
    P(bit i = 1) = sigmoid(4 z_i) is the softmax over the two codes -1 and 1 of twice their product with z_i.
    """

    def __init__(self, dim, bits):
        super().__init__()
        self.bits = bits
        self.project_in, self.project_out = nn.Linear(dim, bits), nn.Linear(bits, dim)

    def project(self, h):
        """h (..., dim) -> z (..., bits), in float32 also under autocast."""
        with torch.autocast(h.device.type, enabled=False):
            return self.project_in(F.layer_norm(h.float(), h.shape[-1:]))

    def forward(self, h):
        """h (..., dim) -> h quantised, index (...), {"commitment", "entropy_sample", "entropy_batch"}."""
        z = self.project(h)
        with torch.autocast(h.device.type, enabled=False):
            code = torch.where(z > 0, 1.0, -1.0)
            losses = {"commitment": F.mse_loss(z, code), **self.entropies(z.flatten(0, -2))}  # Eq. 4
            straight = z + (code - z).detach()              # the gradient passes the sign untouched
            return self.project_out(straight), bits_to_index(z), losses

    def entropies(self, z):
        """z (N, bits) -> mean entropy of one token's bits and entropy of the mean token, in nats.

        The first factorises over the bits. The second needs the joint of all bits: one matrix product of the
        probabilities of two groups of bits, (N x 2^6)^T (N x 2^7), never N x 2^13.
        """
        sample = (F.softplus(4 * z) - 4 * z * torch.sigmoid(4 * z)).sum(-1).mean()
        low, high = torch.sigmoid(4 * z).split([(self.bits + 1) // 2, self.bits // 2], dim=1)
        mean = joint(high).T @ joint(low) / len(z)                                          # 2^6 2^7
        if dist.is_initialized():       # over all ranks; DDP averages the gradients, so each keeps its own
            total = mean.detach().clone()
            dist.all_reduce(total)
            mean = mean + (total / dist.get_world_size() - mean.detach())
        return {"entropy_sample": sample, "entropy_batch": -(mean * (mean + 1e-10).log()).sum()}

    def decode(self, index):
        """index (...) -> (..., dim)."""
        return self.project_out(index_to_bits(index, self.bits))


# ---------------------------------------------------------------------------- the tokenizer

def patchify(video, p_t, p):
    """(B, C, T, H, W) -> (B, T/p_t, H/p * W/p, C * p_t * p * p)."""
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T // p_t, p_t, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, T // p_t, H // p * (W // p), C * p_t * p * p)


class Unpatch(nn.Module):
    """Latent frames to pixels, as a lapped transform: each token writes a 2P x 2P square and the squares add
    up, so that no edge of the patch grid is left to see."""

    def __init__(self, config, p_t):
        super().__init__()
        p, self.p_t, self.channels = config.patch, p_t, config.channels
        self.to_pixels = nn.ConvTranspose2d(config.dim, config.channels * p_t, 2 * p,
                                            stride=p, padding=p // 2)

    def forward(self, h, grid):
        B, T, N, D = h.shape
        x = self.to_pixels(h.reshape(B * T, grid, grid, D).permute(0, 3, 1, 2))             # BT C*p_t H W
        x = x.reshape(B, T, self.channels, self.p_t, *x.shape[-2:]).transpose(1, 2)         # B C T p_t H W
        return x.flatten(2, 3)


class Stack(nn.Module):
    """Layers over space (B T, hw, D) or, causally, over time (B hw, T, D)."""

    def __init__(self, config, depth, over_time):
        super().__init__()
        self.over_time = over_time
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.mlp_dim, causal=over_time)
                                    for _ in range(depth))

    def forward(self, h):
        B, T, N, D = h.shape
        h = h.transpose(1, 2).reshape(B * N, T, D) if self.over_time else h.reshape(B * T, N, D)
        time = torch.arange(T, device=h.device) if self.over_time else None
        for block in self.blocks:
            h = block(h, time)
        return h.reshape(B, N, T, D).transpose(1, 2) if self.over_time else h.reshape(B, T, N, D)


class Tokenizer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.size % c.patch or (c.frames - 1) % c.patch_t:
            raise UserError(f"size {c.size} must be a multiple of patch {c.patch}, and "
                            f"frames - 1 = {c.frames - 1} of patch_t {c.patch_t}")
        self.grid = c.size // c.patch
        pixels = c.channels * c.patch ** 2
        self.embed_first, self.embed_rest = nn.Linear(pixels, c.dim), nn.Linear(pixels * c.patch_t, c.dim)
        self.place = nn.Parameter(0.02 * torch.randn(2, self.grid ** 2, c.dim))     # of encoder and decoder
        self.encode_space, self.encode_time = Stack(c, c.depth_space, False), Stack(c, c.depth_time, True)
        self.lfq = LFQ(c.dim, c.bits)
        self.decode_time, self.decode_space = Stack(c, c.depth_time, True), Stack(c, c.depth_space, False)
        self.norm = nn.LayerNorm(c.dim)
        self.first_pixels, self.rest_pixels = Unpatch(c, 1), Unpatch(c, c.patch_t)

    @property
    def latent_frames(self):
        return 1 + (self.config.frames - 1) // self.config.patch_t

    def embed(self, video):
        """video (B, C, T+1, H, W) -> (B, 1 + T/p_t, hw, D) before quantization."""
        B, C, T, H, W = video.shape
        c = self.config
        if (C, H, W) != (c.channels, c.size, c.size) or (T - 1) % c.patch_t:
            raise UserError(f"the tokenizer takes {c.channels} x (1 + a multiple of {c.patch_t}) "
                            f"x {c.size} x {c.size} (channels, frames, height, width), "
                            f"the video has {C} x {T} x {H} x {W}")
        first = self.embed_first(patchify(video[:, :, :1], 1, c.patch))                     # B 1 hw D
        rest = self.embed_rest(patchify(video[:, :, 1:], c.patch_t, c.patch))               # B T/p_t hw D
        return self.encode_time(self.encode_space(torch.cat([first, rest], dim=1) + self.place[0]))

    def unembed(self, h):
        """(B, T', hw, D) -> video (B, C, 1 + (T'-1) p_t, H, W)."""
        h = self.norm(self.decode_space(self.decode_time(h + self.place[1])))
        first, rest = self.first_pixels(h[:, :1], self.grid), self.rest_pixels(h[:, 1:], self.grid)
        return torch.cat([first, rest], dim=2)

    def forward(self, video):
        """video (B, C, T+1, H, W) -> reconstruction of the same shape, index (B, T', h, w), LFQ losses."""
        h, index, losses = self.lfq(self.embed(video))
        return self.unembed(h), index.unflatten(-1, (self.grid, self.grid)), losses

    @torch.no_grad()
    def encode(self, video):
        """video (B, C, T+1, H, W) in [0, 1] -> index (B, T', h, w)."""
        return bits_to_index(self.lfq.project(self.embed(video))).unflatten(-1, (self.grid, self.grid))

    @torch.no_grad()
    def decode(self, index):
        """index (B, T', h, w) -> video (B, C, T+1, H, W) in [0, 1]."""
        return self.unembed(self.lfq.decode(index.flatten(-2))).float().clamp(0, 1)


def main():
    config = parse_flags(TokenizerConfig, PRESETS)
    model = Tokenizer(config)
    video = torch.rand(1, config.channels, config.frames, config.size, config.size)
    index = model.encode(video)
    print(f"{config}\n{parameter_count(model):.2f}M parameters; video {tuple(video.shape)} -> tokens "
          f"{tuple(index.shape)} of {config.bits} bits -> video {tuple(model.decode(index).shape)}")


if __name__ == "__main__":
    run_main(main)
