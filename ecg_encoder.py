"""Stage 2a, the ECG encoder (ECHOPulse section 3.2): ST-MEM's ViT over the ECG that data/ecg_signal.py has cleaned.

Each lead is cut into patches of 75 samples, 0.3 s (Na et al. 2024); only leads that are there are encoded.
The output is a sequence: it keeps the beats' times.

    cleaned ECG (B, L, N), leads (L,)  ->  Z (B, L, N/75, D)

Run it to pretrain the encoder as a masked autoencoder, 75 % of the patches hidden; writes OUT/ecg_encoder.pt:

    python ecg_encoder.py --data=datasets/phantom --out=runs/ecg --minutes=10
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

from common import checkpoint, training
from common.flags import UserError, parse_flags, run_main
from data.dataset import LEADS, Clips, RandomWindows, batches
from data.ecg_signal import clean_ecg
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
        if N % self.config.patch or n + 2 > len(self.positions):
            raise UserError(f"the ECG encoder takes multiples of {self.config.patch} samples up to "
                            f"{self.config.samples}, not {N}")
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
        old = dict(checkpoint.read_file(path)["model"])
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
    data: str = "datasets/phantom"  # prepared data set; of several, A,B, each is drawn as often
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
    device, rank, world = training.init_distributed(config.seed)
    state_path = checkpoint.check_out(config, "ecg_encoder")

    # ---- data and model
    train = RandomWindows(Clips(config.data, "train"), 1, config.samples, clean_ecg, config.batch * world,
                          config.seed, len(LEADS) * config.samples // config.patch)
    raw = MaskedAutoencoder(training.model_config(config, EcgConfig)).to(device)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, "
              f"{len(train.clips)} clips, {device} x {world}")

    # ---- optimizer, EMA, resume, DDP
    optimizer = torch.optim.AdamW(raw.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay,
                                  fused=True)
    ema = copy.deepcopy(raw).eval()
    parts = {"model": raw, "ema": ema, "optimizer": optimizer}
    step, seconds = checkpoint.load_state(state_path, parts) if config.resume else (0, 0.0)
    model = DistributedDataParallel(raw) if dist.is_initialized() else raw

    # ---- loop
    log, loader = training.Log(config, "ecg_encoder", rank), \
        batches(train, config.batch, step, rank, world, config.workers)
    log.bar.update(step)
    began, results = time.time() - seconds, {}
    for step in count(step):
        seconds = time.time() - began
        done, lr = training.schedule(config, step, seconds, device)
        if rank == 0 and step > 0 and (done >= 1 or step % config.save_every == 0):
            checkpoint.save_weights(config.out, "ecg_encoder", ema.encoder, step)
            checkpoint.save_state(state_path, parts, step, seconds)
        if done >= 1:
            break
        batch = {k: v.to(device, non_blocking=True) for k, v in log.wait(loader).items()}
        loss = model(batch["ecg"], batch["leads"], batch["noise"])
        loss.backward()
        training.update(config, raw, optimizer, lr, step, train.clips, batch, state_path)
        if step % 10 == 0:
            training.ema_update(ema, raw, min(config.ema, step / (step + 100)))
        if step % config.log_every == 0:
            results = log.write(step, **training.all_mean({"loss": loss}, device),
                                **log.rate(step, config, world))
            log.bar.set_postfix(results)
        log.bar.update()

    log.close(f"ecg_encoder.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")


if __name__ == "__main__":
    run_main(main)
