"""Stage 1, the video tokenizer (ECHOPulse section 3.1, Table 4): video -> tokens -> video.

A C-ViViT (Villegas et al. 2023, Phenaki) with lookup-free quantization, LFQ.

    encoder   The first frame is cut into P x P patches, the T frames after it into P_t x P x P
              patches. P_t frames together are one latent frame, so there are T' = 1 + T / P_t.
              Self-attention inside each latent frame, then causal self-attention along time.
    LFQ       The sign of 13 numbers is the token. The commitment loss is Eq. 4.
    decoder   The same way back: attention along time, then inside each frame, then pixels.

    video (B, C, T+1, H, W) in [0, 1]  <->  tokens (B, T', H/P, W/P) int64 in [0, 2^13)

Shapes in the comments: D = width, h = w = H/P tokens along a side, hw = h * w, N = sequence length.
train_tokenizer.py trains it. Run this file to see the settings, the parameters and the shapes:

    python tokenizer.py --preset=paper
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from common.flags import UserError, parse_flags, run_main


@dataclass
class TokenizerConfig:
    """Sizes of the tokenizer. The defaults are the demo's."""
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


PRESETS = {
    "demo": {},
    # Table 4
    "paper": dict(size=128, channels=3, dim=512, heads=8, mlp_dim=2048,
                  depth_space=4, depth_time=4),
}


# ----------------------------------------------------------------- the transformer of all stages

class Rotary(NamedTuple):
    """The angles of a rotary position embedding. All layers use the same ones."""
    cos: torch.Tensor           # ([B 1] N, d/2), float32
    sin: torch.Tensor


def rotary_angles(time, d, shortest=2.0, longest=200.0):
    """time (N,) or (B, N), in any unit -> the Rotary of heads of d numbers.

    The d/2 pairs of numbers of a head turn at d/2 frequencies, evenly spaced on a log scale: their
    periods go from `shortest` to `longest`.
    """
    half = d // 2
    step = torch.arange(half, device=time.device) / max(half - 1, 1)        # d/2, from 0 to 1
    fastest = time[..., None].float() * (2 * math.pi / shortest)            # [B] N 1
    angle = fastest * (shortest / longest) ** step                          # [B] N d/2
    if time.dim() == 2:
        angle = angle[:, None]                                              # B 1 N d/2
    return Rotary(angle.cos(), angle.sin())


def rotary_embedding(x, rotary):
    """Rotary position embedding (Su et al. 2021): attention sees differences of time only.

    x (B, heads, N, d) are queries or keys. Returns x, its pairs of numbers turned by the angles.
    """
    # Number i and number i + d/2 of a head are the two coordinates that turn together.
    half = x.shape[-1] // 2
    cos = rotary.cos.to(x.dtype)
    sin = rotary.sin.to(x.dtype)
    x1 = x[..., :half]
    x2 = x[..., half:]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)    # B heads N d


def attend(q, k, v, causal):
    """softmax(q k^T / sqrt(d)) v, for q (B, heads, N, d), k and v (B, heads, M, d).

    causal=True masks every later position: step n sees the steps 0 to n. The temporal layers of
    the tokenizer are causal, so a token depends on its own latent frame and on earlier ones only.
    Extending a video needs this (section 3.3). Sampling takes the last frames of one window,
    encodes them again (as the first latent frame of a window is a single frame), and gives their
    tokens to the next window as its prefix. The frames after the prefix do not exist yet. In
    training they do exist: the whole window is encoded at once. Without the mask the prefix tokens
    of training would hold traces of the later frames, and the generator would learn to rely on a
    hint that sampling cannot give. With the mask, the tokens of a prefix are the same whether the
    rest of the window is there or not.
    """
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            # A CPU's own attention is up to 3 times as fast in float32 as in bfloat16. Of a long
            # sequence in bfloat16, two matrix products for each head take two thirds of that.
            if q.dtype == torch.bfloat16 and q.shape[2] > 1024 and not causal:
                q = q / q.shape[-1] ** 0.5
                heads = [(q[:, h] @ k[:, h].mT).softmax(-1) @ v[:, h] for h in range(q.shape[1])]
                return torch.stack(heads, dim=1)                            # B heads N d
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    # is_causal makes the triangular mask inside the kernel.
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) over itself or over a context (B, M, context_dim).

    The keys and values of a context are made apart, so that sampling can keep them over its steps.
    """

    def __init__(self, dim, heads, context_dim=None, *, bias=False, causal=False):
        super().__init__()
        self.heads = heads
        self.causal = causal
        # Keys and values come from the context, which may have another width.
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim or dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, context, rotary=None):
        """Keys and values (B, heads, M, d) of a context (B, M, context_dim), d = D / heads.

        rotary: the angles of its times. Without them, attention ignores the order.
        """
        B, M = context.shape[:2]
        kv = self.kv(context).reshape(B, M, 2, self.heads, -1)              # B M 2 heads d
        k, v = kv.permute(2, 0, 3, 1, 4)                                    # B heads M d, each
        if rotary is not None:
            k = rotary_embedding(k, rotary)
        return k, v

    def forward(self, x, rotary=None, keys_values=None):
        """x (B, N, D) -> (B, N, D). rotary: the angles of the times of x.

        x attends to the keys and values of a context, or without them to itself.
        """
        B, N, D = x.shape
        q = self.q(x).reshape(B, N, self.heads, -1).transpose(1, 2)         # B heads N d
        if rotary is not None:
            q = rotary_embedding(q, rotary)
        k, v = keys_values or self.keys_values(x, rotary)                   # B heads M d, each

        y = attend(q, k, v, self.causal)                                    # B heads N d
        y = y.transpose(1, 2).reshape(B, N, D)                              # B N D
        return self.out(y)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, for each position alone."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        """x (..., dim) -> (..., dim)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention if there is a context, MLP.

    bias: whether queries, keys and values have one. causal: of the self-attention, see attend().
    """

    def __init__(self, dim, heads, mlp_dim, context_dim=None, *, bias=False, causal=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, bias=bias, causal=causal)
        if context_dim:
            self.norm_cross = nn.LayerNorm(dim)
            self.cross = Attention(dim, heads, context_dim, bias=bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x, rotary=None, keys_values=None, null_result=None):
        """x (B, N, D) -> (B, N, D). Each part adds its result to x (a residual connection).

        rotary: the angles of the times of x. keys_values, null_result: of a context, see
        read_context; None: there is no context.
        """
        x = x + self.attn(self.norm1(x), rotary)
        if keys_values is not None:
            x = x + self.read_context(x, rotary, keys_values, null_result)
        return x + self.mlp(self.norm2(x))

    def read_context(self, x, rotary, keys_values, null_result=None):
        """What x (B, N, D) reads of a context.

        keys_values: of the first b clips, made by self.cross.keys_values. null_result (D,): what
        all others read, made by self.null_result; None: there are no others, b = B.
        """
        if null_result is None:
            return self.cross(self.norm_cross(x), rotary, keys_values)
        b = len(keys_values[0])
        angles = Rotary(rotary.cos[:b], rotary.sin[:b])
        read = self.cross(self.norm_cross(x[:b]), angles, keys_values)
        others = null_result.to(read.dtype).expand_as(x[b:])
        return torch.cat([read, others])

    def null_result(self, vector):
        """What is read of a context of which every vector is the same, (context_dim,) -> (D,).

        All values are the same, so their mean is this value. Keys and queries do not matter.
        """
        _, value = self.cross.kv(vector).chunk(2)
        return self.cross.out(value)


def parameter_count(model, trained=False):
    """Number of parameters in millions: all of them, or only those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) / 1e6


# ----------------------------------------------------------------- LoRA: adapting trained weights

class LoRA(nn.Module):
    """Low-rank adaptation of one weight (Hu et al. 2022): W becomes W + up @ down.

    W (rows, columns), up (rows, rank), down (rank, columns). A small rank has few numbers to train.
    """

    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        # `up` starts at zero, so the adapted model starts as the model that it adapts.
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns ** 0.5)

    def forward(self, weight):
        """The frozen weight -> the adapted weight, of the same shape."""
        return weight + (self.up @ self.down).reshape(weight.shape)


def add_lora(model, rank):
    """Freeze a model and adapt its linear and transposed convolution layers; returns the model."""
    model.requires_grad_(False)
    # List the layers first: registering a LoRA adds modules to the model.
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.ConvTranspose2d))]
    for layer in layers:
        # From now on layer.weight is LoRA.forward(the frozen weight), computed at each use.
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    return model


def lora_state_dict(model):
    """State dict of the LoRA parameters alone, a small file.

    To load it: add_lora(model, rank), then model.load_state_dict(..., strict=False).
    """
    # torch names them LAYER.parametrizations.weight.0.up and .0.down
    suffixes = (".0.up", ".0.down")
    return {name: x for name, x in model.state_dict().items() if name.endswith(suffixes)}


def merge_lora(model):
    """State dict of a plain model that has W + up @ down as its weights; `model` keeps its LoRA."""
    merged = {}
    for name, value in model.state_dict().items():
        layer, is_adapted, part = name.partition(".parametrizations.weight.")
        if not is_adapted:
            merged[name] = value
        elif part == "original":
            # Reading the layer's weight runs LoRA.forward, which adds up @ down.
            merged[f"{layer}.weight"] = model.get_submodule(layer).weight.detach()
    return merged


# ----------------------------------------------------------------- lookup-free quantization

def index_to_bits(index, bits):
    """Token (...) int64 -> code (..., bits) float, each number -1 or 1; bit 0 comes first."""
    shift = torch.arange(bits, device=index.device)
    binary = index[..., None] >> shift & 1                                  # ... bits, 0 or 1
    return binary.float() * 2 - 1


def bits_to_index(z):
    """z (..., bits) -> token (...) int64: the sum over i of 2^i [z_i > 0]."""
    shift = torch.arange(z.shape[-1], device=z.device)
    binary = (z > 0).long()                                                 # ... bits, 0 or 1
    return (binary << shift).sum(-1)


def index_counts(index, bits):
    """How often each of the 2^bits codes occurs in index (...): float (2^bits,)."""
    return torch.bincount(index.flatten(), minlength=2 ** bits).float()


def codebook_usage(counts):
    """How evenly codes are used, from their counts (2^bits,).

    Returns {"codes": number of codes that occur, "perplexity": e^entropy}. The perplexity is the
    number of codes that would have the same entropy if all were equally frequent.
    """
    # Only codes that occur: the logarithm of 0 is not finite.
    share = counts[counts > 0] / counts.sum()
    entropy = (-share * share.log()).sum()
    return {"codes": len(share), "perplexity": entropy.exp().item()}


def joint_code_probabilities(p):
    """Probability of each bit to be 1, p (N, b) -> probability of each code (N, 2^b).

    The bits are independent, so the probability of a code is a product over its bits.
    """
    codes = torch.ones_like(p[:, :1])                                       # N 1
    for i in range(p.shape[1]):
        # Bit i doubles the codes: those with bit i = 0, then those with bit i = 1.
        p_i = p[:, i:i + 1]                                                 # N 1
        codes = torch.cat([codes * (1 - p_i), codes * p_i], dim=1)          # N 2^(i+1)
    return codes


class LFQ(nn.Module):
    """Lookup-free quantization (Yu et al. 2023): the code is the sign of `bits` numbers.

    No codebook is stored: the 2^bits codes are the corners of a cube. In the entropy losses a bit
    is uncertain, with P(bit i = 1) = sigmoid(4 z_i). This is the softmax over the two codes c = -1
    and c = 1 of 2 c z_i.
    """

    def __init__(self, dim, bits):
        super().__init__()
        self.bits = bits
        self.project_in = nn.Linear(dim, bits)
        self.project_out = nn.Linear(bits, dim)

    def project(self, h):
        """h (..., dim) -> z (..., bits), the numbers whose signs are the code."""
        # Float32 also under autocast: rounding near zero would flip a sign.
        with torch.autocast(h.device.type, enabled=False):
            h = F.layer_norm(h.float(), h.shape[-1:])
            return self.project_in(h)

    def forward(self, h):
        """h (..., dim) -> quantized h (..., dim), token (...), losses.

        losses: {"commitment", "entropy_sample", "entropy_batch"}, one number each.
        """
        z = self.project(h)                                                 # ... bits
        with torch.autocast(h.device.type, enabled=False):
            # 1. Quantize: each number becomes -1 or 1.
            code = torch.where(z > 0, 1.0, -1.0)                            # ... bits

            # 2. Losses that pull z towards its code and spread the codes.
            losses = {"commitment": F.mse_loss(z, code)}                    # Eq. 4
            losses |= self.entropies(z.flatten(0, -2))

            # 3. Straight-through gradient. The sign has derivative 0, so nothing would reach the
            #    encoder. This sum equals the code, and its derivative by z is 1.
            straight_through = z + (code - z).detach()
            return self.project_out(straight_through), bits_to_index(z), losses

    def entropies(self, z):
        """z (N, bits) -> {"entropy_sample", "entropy_batch"}, in nats.

        sample: E[H(p)], mean entropy of a single token; low when each code is certain.
        batch: H(E[p]), entropy of the mean over tokens; high when all codes are used.
        The trainer adds their difference, sample - batch, to the loss.
        """
        # 1. Bits are independent: the entropy of a token is the sum over its bits. For one bit,
        #    H(sigmoid(x)) = softplus(x) - x sigmoid(x), which stays finite for any x.
        bit_entropy = F.softplus(4 * z) - 4 * z * torch.sigmoid(4 * z)      # N bits
        entropy_sample = bit_entropy.sum(-1).mean()

        # 2. The entropy of the mean is no sum over bits. It needs the probabilities of all codes, a
        #    table of N x 2^13. Two groups of bits, 2^7 and 2^6 codes, avoid that table: a code's
        #    probability is a product of two, and a matrix product sums it over the N tokens.
        p = torch.sigmoid(4 * z)                                            # N bits
        low, high = p.split([(self.bits + 1) // 2, self.bits // 2], dim=1)  # N 7, N 6
        p_high = joint_code_probabilities(high)                             # N 2^6
        p_low = joint_code_probabilities(low)                               # N 2^7
        mean = p_high.T @ p_low / len(z)                                    # 2^6 2^7

        # 3. The mean over all ranks. Only the value is exchanged, each rank keeps its own gradient:
        #    DistributedDataParallel averages the gradients afterwards.
        if dist.is_initialized():
            total = mean.detach().clone()
            dist.all_reduce(total)
            mean = mean + (total / dist.get_world_size() - mean.detach())

        # 4. Entropy of the mean. 1e-10 keeps the logarithm of an unused code finite.
        entropy_batch = -(mean * (mean + 1e-10).log()).sum()
        return {"entropy_sample": entropy_sample, "entropy_batch": entropy_batch}

    def decode(self, index):
        """Token (...) -> quantized h (..., dim), as forward gives it."""
        return self.project_out(index_to_bits(index, self.bits))


# ----------------------------------------------------------------- the tokenizer

def patchify(video, p_t, p):
    """Cut a video into patches: (B, C, T, H, W) -> (B, T/p_t, H/p * W/p, C * p_t * p * p)."""
    B, C, T, H, W = video.shape
    # Split each of the three axes into (number of patches, place inside the patch).
    x = video.reshape(B, C, T // p_t, p_t, H // p, p, W // p, p)            # B C T' p_t h p w p
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)                                   # B T' h w C p_t p p
    return x.reshape(B, T // p_t, H // p * (W // p), C * p_t * p * p)


class Unpatchify(nn.Module):
    """Latent frames to pixels; p_t frames of pixels from each latent frame.

    Patches that only touch leave edges in the picture. Here each token writes a square of 2P x 2P
    pixels, twice the patch, and overlapping squares add up (a lapped transform).
    """

    def __init__(self, config, p_t):
        super().__init__()
        p = config.patch
        self.p_t = p_t
        self.channels = config.channels
        self.to_pixels = nn.ConvTranspose2d(config.dim, config.channels * p_t, kernel_size=2 * p,
                                            stride=p, padding=p // 2)

    def forward(self, h, grid):
        """h (B, T', hw, D), grid = tokens along a side -> pixels (B, C, T' * p_t, H, W)."""
        B, T, N, D = h.shape
        # The frames of a latent frame leave the convolution as C * p_t channels.
        x = h.reshape(B * T, grid, grid, D).permute(0, 3, 1, 2)             # BT' D h w
        x = self.to_pixels(x)                                               # BT' C*p_t H W
        H, W = x.shape[-2:]
        x = x.reshape(B, T, self.channels, self.p_t, H, W).transpose(1, 2)  # B C T' p_t H W
        return x.flatten(2, 3)                                              # B C T'*p_t H W


class SpatialTransformer(nn.Module):
    """Layers inside each latent frame: a token attends to the tokens of its own frame."""

    def __init__(self, config, depth):
        super().__init__()
        c = config
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim) for _ in range(depth))

    def forward(self, h):
        """h (B, T', hw, D) -> the same shape."""
        B, T, N, D = h.shape
        # All frames stand in the batch dimension, so none sees another.
        h = h.reshape(B * T, N, D)                                          # BT' hw D
        # No `time` here: the learned spatial positions, added before, say where a token is.
        for block in self.blocks:
            h = block(h)
        return h.reshape(B, T, N, D)                                        # B T' hw D


class TemporalTransformer(nn.Module):
    """Layers along time: a token attends to its own place in its own and earlier latent frames.

    Causal, so that the tokens of a prefix do not change when frames are added: see attend().
    """

    def __init__(self, config, depth):
        super().__init__()
        c = config
        self.heads = c.heads
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim, causal=True)
                                    for _ in range(depth))

    def forward(self, h):
        """h (B, T', hw, D) -> the same shape."""
        B, T, N, D = h.shape
        time = torch.arange(T, device=h.device)                             # latent frames
        rotary = rotary_angles(time, D // self.heads)
        # All places stand in the batch dimension, so none sees another.
        h = h.transpose(1, 2).reshape(B * N, T, D)                          # B*hw T' D
        for block in self.blocks:
            h = block(h, rotary)
        return h.reshape(B, N, T, D).transpose(1, 2)                        # B T' hw D


class Tokenizer(nn.Module):
    """C-ViViT encoder, LFQ and decoder (section 3.1). encode and decode are what others use."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config
        if c.size % c.patch or (c.frames - 1) % c.patch_t:
            raise UserError(f"size {c.size} must be a multiple of patch {c.patch}, and "
                            f"frames - 1 = {c.frames - 1} of patch_t {c.patch_t}")
        self.grid = c.size // c.patch                   # h = w, tokens along a side
        pixels = c.channels * c.patch ** 2              # numbers in a patch of one frame

        # The first frame has its own layers, in and out: it is one frame, not P_t, so that a
        # single image is a video, too.
        self.embed_first = nn.Linear(pixels, c.dim)
        self.embed_rest = nn.Linear(pixels * c.patch_t, c.dim)
        # [0] is added at the start of the encoder, [1] at the start of the decoder.
        self.spatial_position = nn.Parameter(0.02 * torch.randn(2, self.grid ** 2, c.dim))

        self.encode_space = SpatialTransformer(c, c.depth_space)
        self.encode_time = TemporalTransformer(c, c.depth_time)
        self.lfq = LFQ(c.dim, c.bits)
        self.decode_time = TemporalTransformer(c, c.depth_time)
        self.decode_space = SpatialTransformer(c, c.depth_space)

        self.norm = nn.LayerNorm(c.dim)
        self.first_pixels = Unpatchify(c, 1)
        self.rest_pixels = Unpatchify(c, c.patch_t)

    @property
    def latent_frames(self):
        """T', latent frames of one window."""
        return 1 + (self.config.frames - 1) // self.config.patch_t

    def embed(self, video):
        """The encoder before LFQ: video (B, C, T+1, H, W) -> h (B, T', hw, D)."""
        B, C, T, H, W = video.shape
        c = self.config
        if (C, H, W) != (c.channels, c.size, c.size) or (T - 1) % c.patch_t:
            raise UserError(f"the tokenizer takes {c.channels} x (1 + a multiple of {c.patch_t}) "
                            f"x {c.size} x {c.size} (channels, frames, height, width), "
                            f"the video has {C} x {T} x {H} x {W}")

        # Patches to vectors, the first frame alone and the others P_t at a time.
        first = self.embed_first(patchify(video[:, :, :1], 1, c.patch))             # B 1 hw D
        rest = self.embed_rest(patchify(video[:, :, 1:], c.patch_t, c.patch))       # B T'-1 hw D
        h = torch.cat([first, rest], dim=1)                                         # B T' hw D

        # Attention ignores the order, so a learned position is added to each token.
        h = h + self.spatial_position[0]
        h = self.encode_space(h)
        return self.encode_time(h)

    def unembed(self, h):
        """The decoder after LFQ: h (B, T', hw, D) -> video (B, C, T+1, H, W), not clamped."""
        # The encoder's steps in reverse order.
        h = h + self.spatial_position[1]
        h = self.decode_time(h)
        h = self.decode_space(h)
        h = self.norm(h)

        # The first latent frame is one frame of video, each later one is P_t frames.
        first = self.first_pixels(h[:, :1], self.grid)                      # B C 1 H W
        rest = self.rest_pixels(h[:, 1:], self.grid)                        # B C T H W
        return torch.cat([first, rest], dim=2)                              # B C T+1 H W

    def forward(self, video):
        """video (B, C, T+1, H, W) -> reconstruction of that shape, token (B, T', h, w), losses."""
        h, index, losses = self.lfq(self.embed(video))
        index = index.unflatten(-1, (self.grid, self.grid))                 # B T' h w
        return self.unembed(h), index, losses

    @torch.no_grad()
    def encode(self, video):
        """video (B, C, T+1, H, W) in [0, 1] -> token (B, T', h, w)."""
        z = self.lfq.project(self.embed(video))                             # B T' hw bits
        index = bits_to_index(z)                                            # B T' hw
        return index.unflatten(-1, (self.grid, self.grid))                  # B T' h w

    @torch.no_grad()
    def decode(self, index):
        """token (B, T', h, w) -> video (B, C, T+1, H, W) in [0, 1]."""
        h = self.lfq.decode(index.flatten(-2))                              # B T' hw D
        return self.unembed(h).float().clamp(0, 1)


def main():
    """Print the settings, the number of parameters and the shapes of one window."""
    config = parse_flags(TokenizerConfig, PRESETS)
    model = Tokenizer(config)
    video = torch.rand(1, config.channels, config.frames, config.size, config.size)
    index = model.encode(video)
    reconstruction = model.decode(index)
    print(config)
    print(f"{parameter_count(model):.2f}M parameters; video {tuple(video.shape)} -> tokens "
          f"{tuple(index.shape)} of {config.bits} bits -> video {tuple(reconstruction.shape)}")


if __name__ == "__main__":
    run_main(main)
