"""Stage 2a, the ECG encoder (ECHOPulse section 3.2): ST-MEM's vision transformer, over an ECG.

ST-MEM (Na et al. 2024) cuts each lead into patches of 75 samples (0.3 s at 250 Hz). All patches of
all leads form one sequence. Any set of 1 to 12 leads can be encoded: a missing lead is left out.

    cleaned ECG (B, L, N), leads (L,) or (B, L)  ->  Z (B, L, n, D),  n = N / 75

Z is a sequence, not one vector, so that it keeps the time of each beat. Shapes in the comments:
L = leads, N = samples, n = patches of a lead, k = patches of a lead that are seen, D = width.

Run this file to pretrain the encoder as a masked autoencoder that sees 25 % of the patches. It
reads a prepared set with an ECG and writes OUT/ecg_encoder.pt (EMA weights),
OUT/ecg_encoder_state.pt (all that --resume needs) and OUT/ecg_encoder.jsonl (a line a logged step):

    python ecg_encoder.py --data=datasets/phantom --out=runs/ecg --minutes=10
    torchrun --nproc_per_node=8 ecg_encoder.py --preset=paper --data=datasets/NAME --out=runs/ecg
"""
import copy
import re
import time
from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import check_out, read_file, save_state, save_weights
from common.flags import UserError, parse_flags
from common.training import (Log, all_mean, check_training, ema_update, first_of_node,
                             init_distributed, model_config, optimizer_step, resume, run_settings,
                             run_training, schedule)
from data.dataset import LEADS, Clips, RandomWindows, batches
from data.ecg_signal import clean_ecg
from tokenizer import Block, parameter_count


@dataclass
class EcgConfig:
    """Sizes of the encoder, and of the decoder that only pretraining has. Defaults: the demo's."""
    samples: int = 600          # the longest window, samples at 250 Hz (2.4 s)
    patch: int = 75             # samples of one patch (0.3 s)
    dim: int = 128              # width of the encoder, D
    depth: int = 4              # layers of the encoder
    heads: int = 4              # attention heads of the encoder
    mlp_dim: int = 512          # hidden width of the encoder's MLP
    decoder_dim: int = 96       # width of the decoder
    decoder_depth: int = 2      # layers of the decoder


PRESETS = {
    "demo": {},
    # ViT-Base, the sizes of the released ST-MEM
    "paper": dict(samples=2250, dim=768, depth=12, heads=12, mlp_dim=3072,
                  decoder_dim=256, decoder_depth=4),
}


# ----------------------------------------------------------------- the encoder

def sincos_positions(n, dim):
    """Fixed position embeddings (n + 2, dim) of n patches, and zeros for SEP at both ends."""
    # dim/2 wavelengths, from 2 pi to 10,000 times as many patches.
    wavelength = 10_000 ** (torch.arange(dim // 2) / (dim / 2))             # dim/2
    angle = torch.arange(n)[:, None] / wavelength                           # n dim/2
    positions = torch.cat([angle.sin(), angle.cos()], dim=1)                # n dim
    return nn.functional.pad(positions, (0, 0, 1, 1))                       # n+2 dim


class EcgEncoder(nn.Module):
    """ST-MEM's vision transformer (section 3.2), for any set of the 12 leads.

    Its own terms: SEP is a learned vector at both ends of each lead, which separates the leads in
    the sequence. A lead embedding is added to all patches of a lead and says which lead it is.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config
        # Samples to patches, and each patch to a vector. The first norm removes a patch's own
        # mean and scale.
        self.embed = nn.Sequential(nn.Unflatten(2, (-1, c.patch)), nn.LayerNorm(c.patch),
                                   nn.Linear(c.patch, c.dim), nn.LayerNorm(c.dim))
        self.register_buffer("positions", sincos_positions(c.samples // c.patch, c.dim))
        # SEP, and one embedding for each of the 12 leads.
        self.sep = nn.Parameter(0.02 * torch.randn(c.dim))
        self.lead = nn.Parameter(0.02 * torch.randn(len(LEADS), c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.mlp_dim, bias=True)
                                    for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim)

    def encode(self, ecg, leads, keep=None):
        """ecg (B, L, N) -> (B, L, k + 2, D), with SEP at both ends of each lead.

        keep (B, L, k): numbers of the patches to encode; None encodes all of them, k = n. The
        others never enter the encoder. UserError if N does not fit.
        """
        B, L, N = ecg.shape
        c = self.config
        n = N // c.patch
        if N % c.patch or n + 2 > len(self.positions):
            raise UserError(f"the ECG encoder takes multiples of {c.patch} samples up to "
                            f"{c.samples}, not {N}")

        # 1. Patches to vectors. Positions come before the choice: a patch keeps its own time.
        x = self.embed(ecg) + self.positions[1:n + 1]                       # B L n D
        if keep is not None:
            x = x.gather(2, keep[..., None].expand(-1, -1, -1, c.dim))      # B L k D

        # 2. SEP at both ends of each lead, then the lead embedding.
        left = (self.sep + self.positions[0]).expand(B, L, 1, -1)           # B L 1 D
        right = (self.sep + self.positions[-1]).expand(B, L, 1, -1)         # B L 1 D
        x = torch.cat([left, x, right], dim=2)                              # B L k+2 D
        x = x + self.lead[leads].unsqueeze(-2)

        # 3. One sequence: each patch attends to all patches of all leads.
        x = x.flatten(1, 2)                                                 # B L(k+2) D
        for block in self.blocks:
            x = block(x)
        return self.norm(x).unflatten(1, (L, -1))                           # B L k+2 D

    def forward(self, ecg, leads):
        """ecg (B, L, N) cleaned; leads (L,) or (B, L), indices into LEADS -> Z (B, L, n, D)."""
        # SEP was for the attention alone.
        return self.encode(ecg, leads)[:, :, 1:-1]


# ----------------------------------------------------------------- the released weights of ST-MEM

# Pattern in a name of the released checkpoint -> our part of the name.
ST_MEM_NAMES = {
    "to_patch_embedding": "embed",
    "^sep_embedding": "sep",
    r"block(\d+)": r"blocks.\1",
    r"attn\.norm": "norm1",
    r"ff\.norm": "norm2",
    r"fn\.to_out\.0": "out",
    r"ff\.fn\.net\.0": "mlp.fc1",
    r"ff\.fn\.net\.3": "mlp.fc2",
}


def rename_st_mem(weights):
    """State dict of the released ST-MEM -> state dict of EcgEncoder."""
    weights = dict(weights)
    renamed = {}

    # 1. Positions have a batch dimension there; each lead has a parameter of its own there.
    renamed["positions"] = weights.pop("pos_embedding")[0]                  # n+2 D
    leads = [weights.pop(f"lead_embeddings.{i}") for i in range(len(LEADS))]
    renamed["lead"] = torch.stack(leads)                                    # 12 D

    for name, value in weights.items():
        # 2. Our names.
        for pattern, ours in ST_MEM_NAMES.items():
            name = re.sub(pattern, ours, name)

        # 3. Queries, keys and values are one matrix there, 3 D rows. Ours has the queries apart.
        if "fn.to_qkv" in name:
            q, kv = value.tensor_split([len(value) // 3])
            renamed[name.replace("fn.to_qkv", "q")] = q
            renamed[name.replace("fn.to_qkv", "kv")] = kv
        else:
            renamed[name] = value
    return renamed


def load_st_mem(path):
    """EcgEncoder with the weights of the released file st_mem_vit_base_encoder.pth.

    Its licence is CC BY-NC, so this project does not ship it. UserError if the file holds
    something else.
    """
    model = EcgEncoder(EcgConfig(**PRESETS["paper"]))
    try:
        model.load_state_dict(rename_st_mem(read_file(path)["model"]))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, RuntimeError):
        # What another file lacks shows itself in many ways.
        message = f"{path} does not hold ST-MEM's encoder (st_mem_vit_base_encoder.pth)"
        raise UserError(message) from None
    return model


# ----------------------------------------------------------------- masked autoencoder

class MaskedAutoencoder(nn.Module):
    """ST-MEM's pretraining, after MAE (He et al. 2022): predict the masked patches from the others.

    Mask polarity: True = masked, to be predicted.
    """

    def __init__(self, config, mask_ratio=0.75):
        super().__init__()
        c = config
        self.mask_ratio = mask_ratio
        self.encoder = EcgEncoder(c)

        # The decoder is narrower and shallower: after pretraining only the encoder is kept.
        self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
        # Stands for each masked patch; its position tells the decoder which patch is meant.
        self.mask_token = nn.Parameter(0.02 * torch.randn(c.decoder_dim))
        self.register_buffer("positions", sincos_positions(c.samples // c.patch, c.decoder_dim))
        self.decoder = nn.ModuleList(Block(c.decoder_dim, 4, 4 * c.decoder_dim, bias=True)
                                     for _ in range(c.decoder_depth))
        self.decoder_head = nn.Sequential(nn.LayerNorm(c.decoder_dim),
                                          nn.Linear(c.decoder_dim, c.patch))

    def patchify(self, ecg):
        """ecg (B, L, N) -> (B, L, n, patch)."""
        return ecg.unflatten(2, (-1, self.encoder.config.patch))

    def random_masking(self, uniform):
        """Uniform numbers (B, L, n) -> keep (B, L, k), mask (B, L, n).

        keep: the numbers of the patches that are seen, equally many in each lead.
        """
        n = uniform.shape[2]
        num_keep = max(1, int(n * (1 - self.mask_ratio)))
        # The order of random numbers is a random order of the patches: keep the first k of it.
        shuffled = uniform.argsort(dim=2)                                   # B L n
        keep = shuffled[:, :, :num_keep]                                    # B L k
        mask = torch.ones_like(uniform, dtype=torch.bool)
        mask = mask.scatter(2, keep, False)                                 # B L n
        return keep, mask

    def forward_encoder(self, ecg, leads, uniform):
        """ecg (B, L, N) -> x (B, L, k + 2, D), keep (B, L, k), mask (B, L, n).

        uniform (B, L n or more): uniform numbers, of which the first L n are used.
        """
        B, L, n, _ = self.patchify(ecg).shape
        # The set gives each clip enough numbers for all 12 leads.
        keep, mask = self.random_masking(uniform[:, :L * n].reshape(B, L, n))
        x = self.encoder.encode(ecg, leads, keep)
        return x, keep, mask

    def forward_decoder(self, x, keep, n):
        """x (B, L, k + 2, D) -> predicted patches (B, L, n, patch)."""
        x = self.decoder_embed(x)
        B, L, _, d = x.shape                                                # B L k+2 d

        # Patches that were seen go to their own places, the mask token to all others.
        seen = x[:, :, 1:-1]                                                # B L k d
        full = self.mask_token.to(x.dtype).expand(B, L, n, d)               # B L n d
        full = full.scatter(2, keep[..., None].expand(-1, -1, -1, d), seen)

        # SEP back to both ends. The last position is that of the right SEP.
        x = torch.cat([x[:, :, :1], full, x[:, :, -1:]], dim=2)             # B L n+2 d
        x = x + torch.cat([self.positions[:n + 1], self.positions[-1:]])

        # Each lead is a sequence of its own: only the encoder may relate one lead to another.
        x = x.flatten(0, 1)                                                 # BL n+2 d
        for block in self.decoder:
            x = block(x)
        patches = self.decoder_head(x)[:, 1:-1]                             # BL n patch
        return patches.unflatten(0, (B, L))                                 # B L n patch

    def forward_loss(self, ecg, predicted, mask):
        """Mean squared error on the masked patches, each standardised by itself (norm_pix_loss)."""
        # Standardised: the shape of a wave counts as much in a small patch as in a large one.
        target = self.patchify(ecg)                                         # B L n patch
        mean = target.mean(-1, keepdim=True)
        variance = target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()

        error = (predicted.float() - target).square().mean(-1)              # B L n
        # A patch that was seen would be easy to copy, so it does not count.
        return (error * mask).sum() / mask.sum()

    def forward(self, ecg, leads, uniform):
        """ecg (B, L, N) cleaned, leads as in EcgEncoder, uniform (B, L n or more) -> loss."""
        x, keep, mask = self.forward_encoder(ecg, leads, uniform)
        predicted = self.forward_decoder(x, keep, mask.shape[2])
        return self.forward_loss(ecg, predicted, mask)


# ----------------------------------------------------------------- the training

@dataclass
class TrainConfig(EcgConfig):
    """Flags of the pretraining."""
    data: str = "datasets/phantom"  # prepared data set; of several, A,B, each is drawn as often
    out: str = "runs/ecg"       # folder for weights, state and log
    resume: bool = False        # go on from OUT's saved state
    steps: int = 0              # stop after so many steps; 0 = after --minutes
    minutes: float = 10         # stop after so many minutes of training
    batch: int = 32             # ECG windows of one step in one process
    lr: float = 1e-3            # peak learning rate of AdamW; linear warm-up, then cosine to 5 %
    warmup: int = 200           # steps of warm-up
    weight_decay: float = 0.01  # of AdamW
    clip_norm: float = 1.0      # gradient norm is clipped here
    ema: float = 0.98           # EMA of the weights, every 10 steps
    workers: int = 0            # data loading processes
    log_every: int = 50         # steps between two lines of the log
    save_every: int = 500       # steps between two checkpoints
    seed: int = 0               # of weights, data and masks


TRAIN_PRESETS = {
    "demo": {},
    "paper": PRESETS["paper"] | dict(lr=1e-4, workers=8),
}


def main():
    """One pretraining, from the flags to the weights on disk."""
    config = parse_flags(TrainConfig, TRAIN_PRESETS)
    check_training(config)

    # ---- distributed and seed
    device, rank, world = init_distributed(config.seed)
    state_path = check_out(config, "ecg_encoder")

    # ---- data: windows of one frame, for the ECG around it; uniform numbers for the masks
    max_patches = len(LEADS) * config.samples // config.patch
    train = RandomWindows(Clips(config.data, "train"), 1, ecg_samples=config.samples,
                          clean=clean_ecg, group=config.batch * world, seed=config.seed,
                          uniforms=max_patches)

    # ---- model
    raw = MaskedAutoencoder(model_config(config, EcgConfig)).to(device)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, "
              f"{len(train.clips)} clips, {device} x {world}")

    # ---- optimizer and EMA
    optimizer = torch.optim.AdamW(raw.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=config.weight_decay, fused=True)
    ema = copy.deepcopy(raw).eval()
    parts = {"model": raw, "ema": ema, "optimizer": optimizer}

    # ---- resume: all ranks start from the same step, with the same settings, clips and weights
    settings = run_settings(config, world, train.clips)
    step, seconds = resume(settings, state_path, parts)

    # ---- DDP
    model = raw
    if dist.is_initialized():
        device_ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids)

    # ---- loop
    log = Log(config, "ecg_encoder", rank)
    log.bar.update(step)
    loader = batches(train, config.batch, step, rank, world, config.workers)
    began = time.time() - seconds
    results = {}
    for step in count(step):
        # schedule: the share of the training that is done, and the learning rate
        seconds = time.time() - began
        done, lr = schedule(config, step, seconds, device)

        # save the encoder alone, and the state with the decoder
        if first_of_node() and step > 0 and (done >= 1 or step % config.save_every == 0):
            save_weights(config.out, "ecg_encoder", ema.encoder, step)
            save_state(state_path, parts, step=step, seconds=seconds, settings=settings)
        if done >= 1:
            break

        # the gradient of one batch
        batch = log.wait(loader)
        batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
        loss = model(batch["ecg"], batch["leads"], batch["uniform"])
        loss.backward()

        # clip the gradient, step, EMA
        optimizer_step(config, raw, optimizer, lr=lr, step=step, clips=train.clips, batch=batch,
                       state_path=state_path)
        ema_update(config, ema, raw, step)

        # log
        if step % config.log_every == 0:
            values = all_mean({"loss": loss}, device)
            results = log.write(step, **values, **log.rate(step, config, world))
            log.bar.set_postfix(results)
        log.bar.update()

    # ---- teardown
    log.close(f"ecg_encoder.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")


if __name__ == "__main__":
    run_training(main)
