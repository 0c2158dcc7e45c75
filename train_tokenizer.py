"""Train the video tokenizer (ECHOPulse section 3.1; Eq. 2 to 6, and the entropy loss of LFQ).

    python train_tokenizer.py --data=datasets/phantom --out=runs/tokenizer                 # demo, CPU or GPU
    torchrun --nproc_per_node=8 train_tokenizer.py --preset=paper --data=datasets/NAME --out=runs/NAME
    python train_tokenizer.py --init_from=runs/natural --lora_rank=16 --data=datasets/echo --out=runs/echo

Reads windows of T+1 frames of a prepared set, writes OUT/tokenizer.pt (EMA weights), OUT/tokenizer_state.pt
(all that --resume needs) and OUT/tokenizer.jsonl (a line a logged step). With --lora_rank only low-rank
adapters train (domain transfer): OUT/tokenizer_lora.pt has them alone, OUT/tokenizer.pt merged into the rest.
With --vgg16 there is a perceptual loss, with --gan_weight a discriminator.
"""
import copy
import time
from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

import tokenizer
from common.checkpoint import (check_out, load_state, load_weights, read_file, save_state,
                               save_weights)
from common.flags import UserError, parse_flags, run_main
from common.training import (Log, all_mean, average, bfloat16, ema_update, init_distributed,
                             model_config, schedule, update)
from data.dataset import Clips, RandomWindows, batches, vary_video
from tokenizer import (Tokenizer, TokenizerConfig, adapters, add_lora, code_use, index_counts, merge,
                       parameter_count)


@dataclass
class TrainConfig(TokenizerConfig):
    data: str = "datasets/phantom"  # prepared data set; of several, A,B, each is drawn as often
    out: str = "runs/tokenizer"     # folder for weights, state and log
    init_from: str = ""             # start from the weights in this folder
    lora_rank: int = 0              # train adapters of this rank on those weights; 0 = train all weights
    decoder_only: bool = False      # train the decoder alone: the tokens stay, and a generator of them
    resume: bool = False            # go on from OUT's saved state
    steps: int = 0                  # stop after so many steps; 0 = after --minutes
    minutes: float = 25             # stop after so many minutes of training
    batch: int = 8                  # clips of one step in one process
    accumulate: int = 1             # batches whose gradients are added up for one step
    lr: float = 1e-3                # peak learning rate of AdamW; linear warm-up, then cosine to a twentieth
    warmup: int = 200               # steps of warm-up
    weight_decay: float = 0.01      # of AdamW
    clip_norm: float = 1.0          # gradient norm is clipped here
    ema: float = 0.98               # EMA of the weights, every 10 steps
    mse_weight: float = 50.0        # Eq. 2
    perceptual_weight: float = 1.0  # Eq. 3, where --vgg16 is given
    vgg16: str = ""                 # torchvision's vgg16-397923af.pth; hub = download it; empty = no Eq. 3
    commitment_weight: float = 0.25  # Eq. 4
    entropy_weight: float = 0.02    # LFQ entropy loss, falling to a tenth over the training
    gan_weight: float = 0.0         # Eq. 5, times the adaptive weight of Eq. 6; 0 = no discriminator
    gan_warmup: float = 0.3         # share of the training after which the discriminator comes in
    gan_epsilon: float = 1e-6       # Eq. 6: keeps the adaptive weight finite
    gan_cap: float = 1e4            # Eq. 6: and at most so large
    lecam_weight: float = 0.01      # regularisation of the discriminator
    augment: bool = False           # move, flip and brighten the windows at random, for a small set
    bf16: bool = True               # autocast to bfloat16, on a GPU or a CPU with AMX or AVX512-BF16
    compile: bool = False           # torch.compile
    workers: int = 0                # data loading processes
    log_every: int = 20             # steps between two lines of the log
    eval_every: int = 500           # steps between two validations
    save_every: int = 500           # steps between two checkpoints
    seed: int = 0                   # of weights and data


PRESETS = {"demo": {}, "paper": tokenizer.PRESETS["paper"] | dict(lr=1e-4, batch=16, compile=True, workers=8,
                                                                  vgg16="hub", gan_weight=1.0)}


# ---------------------------------------------------------------------------- losses of the tokenizer

class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman 2015) under torchvision's names of the weights."""

    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)   # 0 halves the size
    FILE = "vgg16-397923af.pth"

    def __init__(self, path):
        super().__init__()
        layers, inputs = [], 3
        for width in self.WIDTHS:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            inputs = width or inputs
        self.features = nn.Sequential(*layers)
        try:
            saved = torch.hub.load_state_dict_from_url(f"https://download.pytorch.org/models/{self.FILE}",
                                                       map_location="cpu", check_hash=True) \
                if path == "hub" else read_file(path)
            self.load_state_dict({k: v for k, v in saved.items() if k.startswith("features.")})
        except (OSError, RuntimeError, AttributeError, UserError) as error:
            raise UserError(f"--vgg16={path}: no VGG16 ({str(error).splitlines()[0]}); pass the path of "
                            f"torchvision's {self.FILE}, or --vgg16= for no perceptual loss") from None
        self.requires_grad_(False).eval()
        self.register_buffer("shift", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, x):
        """x (B, C, H, W) in [0, 1] -> its features at the end of each of the five sizes."""
        x, found = (x.expand(-1, 3, -1, -1) - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]

    def distance(self, x, y):
        """Mean squared distance of the features, each of unit length over its channels as in LPIPS."""
        both = zip(*([F.normalize(f.float(), dim=1) for f in self(z)] for z in (x, y)))
        return sum((a - b).square().sum(1).mean() for a, b in both) / 5


class Discriminator(nn.Module):
    """Judges places of a video (B, C, T, H, W), real or not, by convolutions over space and time: it sees
    motion. Without the spectral norm (Miyato et al. 2018) it wins: its gradient grows, Eq. 6 weighs it down
    to nothing, and nothing gets sharper. LeCAM (Tseng et al. 2021) keeps its verdicts near a moving average
    of the opposite ones."""

    def __init__(self, channels, width=32):
        super().__init__()
        def conv(inputs, outputs, size=(3, 4, 4), stride=2):
            return spectral_norm(nn.Conv3d(inputs, outputs, size, stride, padding=1))
        self.layers = nn.Sequential(conv(channels, width, stride=(1, 2, 2)), nn.LeakyReLU(0.2),
                                    conv(width, 2 * width), nn.LeakyReLU(0.2),
                                    conv(2 * width, 4 * width), nn.LeakyReLU(0.2),
                                    conv(4 * width, 1, size=3, stride=1))
        self.register_buffer("mean_verdict", torch.zeros(2))        # of real, of reconstructed

    def forward(self, video):
        return self.layers(2 * video - 1)

    def lecam(self, real, fake):
        loss = F.relu(real - self.mean_verdict[1]).square().mean() \
            + F.relu(self.mean_verdict[0] - fake).square().mean()
        means = all_mean({"real": real.mean(), "fake": fake.mean()}, real.device)
        self.mean_verdict.lerp_(torch.tensor(list(means.values()), device=real.device), 0.01)
        return loss


def reconstruction_loss(config, video, reconstruction, vgg16, frame):
    """Weighted sum and its parts for video (B, C, T+1, H, W); frame (B,) is the one that VGG16 sees."""
    parts = {"mse": (reconstruction.float() - video).square().mean()}                       # Eq. 2
    loss = config.mse_weight * parts["mse"]
    if vgg16 is not None:
        each = torch.arange(len(video), device=video.device)
        parts["perceptual"] = vgg16.distance(reconstruction[each, :, frame], video[each, :, frame])   # Eq. 3
        loss = loss + config.perceptual_weight * parts["perceptual"]
    return loss, parts


def quantization_loss(config, lfq, done):
    """Commitment, Eq. 4, and entropy; the weight of the latter falls to a tenth over the training."""
    entropy = lfq["entropy_sample"] - lfq["entropy_batch"]
    return config.commitment_weight * lfq["commitment"] \
        + config.entropy_weight * (1 - 0.9 * min(done, 1)) * entropy


def adversarial_loss(config, discriminator, reconstruction, loss, model):
    """Hinge loss of the generator, weighted so that its gradient at the decoder's last layer is as large as
    that of `loss`, the reconstruction's."""
    adversarial = -discriminator(reconstruction).mean()                                     # Eq. 5
    last = [p for head in (model.first_pixels, model.rest_pixels) for p in head.parameters()
            if p.requires_grad]
    size = []
    for part in (loss, adversarial):
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(part, last, retain_graph=True)])
        size.append(average(gradient).norm())
    weight = (size[0] / (size[1] + config.gan_epsilon)).clamp(max=config.gan_cap)           # Eq. 6
    return config.gan_weight * weight * adversarial, {"adversarial": adversarial, "adaptive_weight": weight}


def discriminator_loss(config, discriminator, video, reconstruction):
    """Hinge loss of the discriminator, the counterpart of Eq. 5, and LeCAM."""
    real, fake = discriminator(video).float(), discriminator(reconstruction.detach()).float()
    hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return hinge + config.lecam_weight * discriminator.lecam(real, fake), \
        {"hinge": hinge, "verdict_real": real.mean(), "verdict_fake": fake.mean()}


# ---------------------------------------------------------------------------- this trainer

def set_trainable(config, model):
    """All weights, the decoder's alone, or adapters alone."""
    if config.lora_rank and not config.init_from:
        raise UserError("--lora_rank adapts trained weights: pass --init_from=FOLDER")
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    if config.decoder_only:
        model.requires_grad_(False)
        for part in (model.lfq.project_out, model.decode_time, model.decode_space, model.norm,
                     model.first_pixels, model.rest_pixels):
            part.requires_grad_(True)


def save(config, model, step, **more):
    """OUT/tokenizer.pt in plain weights; of LoRA also the adapters alone."""
    if config.lora_rank:
        save_weights(config.out, "tokenizer_lora", model, step, adapters(model), rank=config.lora_rank)
    save_weights(config.out, "tokenizer", model, step, merge(model), **more)


@torch.no_grad()
def evaluate(model, data, batch, device, rank, world, items=64):
    """Mean squared error, codes in use and their perplexity on fixed windows of the validation split."""
    error, counts = 0.0, 0
    for start in range(rank * batch, items, batch * world):
        video = torch.stack([data[n]["video"] for n in range(start, start + batch)]).to(device)
        index = model.encode(video)
        counts = counts + index_counts(index, model.config.bits)
        error += (model.decode(index) - video).square().mean().item() * batch * world / items
    use = code_use(average(counts))
    return all_mean({"val_mse": error, **{f"val_{key}": value for key, value in use.items()}}, device)


def main():
    config = parse_flags(TrainConfig, PRESETS)

    # ---- distributed and seed
    device, rank, world = init_distributed(config.seed)
    state_path = check_out(config, "tokenizer")

    # ---- data
    train, val = (RandomWindows(Clips(config.data, split), config.frames, seed=config.seed, noise=1,
                                channels=config.channels, vary_video=vary)
                  for split, vary in (("train", vary_video if config.augment else None), ("val", None)))

    # ---- model
    shape = model_config(config, TokenizerConfig)
    raw = load_weights(config.init_from, "tokenizer", Tokenizer, TokenizerConfig, shape) if config.init_from \
        else Tokenizer(shape)
    set_trainable(config, raw.to(device))
    vgg16 = VGG16(config.vgg16).to(device) if config.vgg16 else None
    discriminator = Discriminator(config.channels).to(device) if config.gan_weight else None
    losses = "mse commitment entropy" + " perceptual" * bool(vgg16) + " adversarial" * bool(discriminator)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, {parameter_count(raw, trained=True):.2f}M "
              f"of them trained, {len(train.clips)} clips, {device} x {world}; losses: {losses}")
        if not config.vgg16:
            print("no perceptual loss (Eq. 3): it needs torchvision's VGG16, --vgg16=PATH or --vgg16=hub")

    # ---- optimizer and EMA
    optimizer = torch.optim.AdamW([p for p in raw.parameters() if p.requires_grad], lr=config.lr,
                                  betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    ema = copy.deepcopy(raw).eval()
    parts = {"model": raw, "ema": ema, "optimizer": optimizer}
    if discriminator:
        optimizer_d = torch.optim.AdamW(discriminator.parameters(), betas=(0.5, 0.9), fused=True)
        parts |= {"discriminator": discriminator, "optimizer_d": optimizer_d}

    # ---- resume
    step, seconds = load_state(state_path, parts) if config.resume else (0, 0.0)

    # ---- compile and DDP
    functorch.donated_buffer = False        # Eq. 6 asks the compiled graph twice for gradients
    model = torch.compile(raw) if config.compile else raw
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    # ---- loop
    log, loader = Log(config, "tokenizer", rank), \
        batches(train, config.batch, step * config.accumulate, rank, world, config.workers)
    log.bar.update(step)
    began, results = time.time() - seconds, {}
    for step in count(step):
        seconds = time.time() - began
        done, lr = schedule(config, step, seconds, device)

        # evaluate and save
        if step > 0 and (done >= 1 or step % config.eval_every == 0):
            results = log.write(step, **evaluate(ema, val, config.batch, device, rank, world))
        if rank == 0 and step > 0 and (done >= 1 or step % config.save_every == 0):
            save(config, ema, step, losses=losses)
            save_state(state_path, parts, step, seconds)
        if done >= 1:
            break

        # accumulate
        for _ in range(config.accumulate):
            batch = log.wait(loader)
            video = batch["video"].to(device, non_blocking=True)
            frame = (batch["noise"][:, 0].to(device) * config.frames).long()
            with bfloat16(device, config.bf16):
                reconstruction, index, lfq = model(video)
                loss, values = reconstruction_loss(config, video, reconstruction, vgg16, frame)
                if adversary := discriminator if done >= config.gan_warmup else None:
                    adversary.requires_grad_(False)
                    adversarial, more = adversarial_loss(config, adversary, reconstruction, loss, raw)
                    loss, values = loss + adversarial, values | more
                    adversary.requires_grad_(True)
                    loss_d, more = discriminator_loss(config, adversary, video, reconstruction)
                    (loss_d / config.accumulate).backward()
                    values |= more
                loss = loss + quantization_loss(config, lfq, done)
            (loss / config.accumulate).backward()

        # clip, step, EMA
        update(config, raw, optimizer, lr, step, train.clips, batch, state_path)
        if adversary:
            for p in adversary.parameters():
                average(p.grad)
            update(config, adversary, optimizer_d, lr, step, train.clips, batch, state_path)
        if step % 10 == 0:
            ema_update(ema, raw, min(config.ema, step / (step + 100)))

        # log
        if step % config.log_every == 0:
            values = all_mean({"loss": loss, **values, **lfq}, device)
            values |= code_use(index_counts(index, config.bits))
            log.write(step, **values, lr=lr, seconds=seconds, **log.rate(step, config, world))
            log.bar.set_postfix({"loss": f"{values['loss']:.3f}", "mse": f"{values['mse']:.5f}", **results})
        log.bar.update()

    log.close(f"tokenizer.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")


if __name__ == "__main__":
    run_main(main)
