"""Train the video tokenizer (ECHOPulse section 3.1; Eq. 1 to 6, and the entropy loss of LFQ).

    python train_tokenizer.py --data=datasets/phantom --out=runs/tokenizer      # demo, CPU or GPU
    torchrun --nproc_per_node=8 train_tokenizer.py --preset=paper --data=datasets/NAME --out=OUT
    python train_tokenizer.py --init_from=runs/natural --lora_rank=16 --data=DATA --out=OUT

Reads windows of T+1 frames of a prepared set. Writes OUT/tokenizer.pt (EMA weights),
OUT/tokenizer_state.pt (what --resume needs) and OUT/tokenizer.jsonl (one line a logged step).

With --vgg16 there is a perceptual loss, with --gan_weight a discriminator. With --lora_rank only
low-rank adapters train (domain transfer): OUT/tokenizer_lora.pt has them alone, OUT/tokenizer.pt
merged into the other weights.
"""
import copy
import math
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
from common.checkpoint import check_out, load_weights, read_file, save_state, save_weights
from common.flags import UserError, parse_flags
from common.training import (Log, all_mean, average, bfloat16, check_training, ema_update,
                             first_of_node, gradient_sync, init_distributed, model_config,
                             optimizer_step, resume, run_settings, run_training, schedule)
from data.dataset import Clips, RandomWindows, batches, random_shift_and_flip
from tokenizer import (Tokenizer, TokenizerConfig, add_lora, codebook_usage, index_counts,
                       lora_state_dict, merge_lora, parameter_count)


@dataclass
class TrainConfig(TokenizerConfig):
    """Settings of a training; each is a flag."""
    data: str = "datasets/phantom"  # prepared data set; of several, A,B, each is drawn as often
    out: str = "runs/tokenizer"     # folder for weights, state and log
    init_from: str = ""             # start from the weights in this folder
    lora_rank: int = 0              # train adapters of this rank on those weights; 0 = all weights
    decoder_only: bool = False      # train the decoder alone: the tokens stay what they are
    resume: bool = False            # go on from OUT's saved state
    steps: int = 0                  # stop after so many steps; 0 = after --minutes
    minutes: float = 25             # stop after so many minutes of training
    batch: int = 8                  # clips of one step in one process
    accumulate: int = 1             # batches whose gradients are added up for one step
    lr: float = 1e-3                # peak learning rate of AdamW; then cosine to a twentieth
    warmup: int = 200               # steps of linear warm-up
    weight_decay: float = 0.01      # of AdamW
    clip_norm: float = 1.0          # gradient norm is clipped here
    ema: float = 0.98               # EMA of the weights, every 10 steps
    mse_weight: float = 50.0        # Eq. 2
    perceptual_weight: float = 1.0  # Eq. 3, where --vgg16 is given
    vgg16: str = ""                 # torchvision's vgg16-397923af.pth; hub = download it
    commitment_weight: float = 0.25  # Eq. 4
    entropy_weight: float = 0.02    # LFQ entropy loss, falling to a tenth over the training
    gan_weight: float = 0.0         # Eq. 5, times the weight of Eq. 6; 0 = no discriminator
    gan_warmup: float = 0.3         # share of the training after which the discriminator comes in
    gan_epsilon: float = 1e-6       # Eq. 6: keeps the adaptive weight finite
    gan_cap: float = 1e4            # Eq. 6: and at most so large
    lecam_weight: float = 0.01      # regularisation of the discriminator
    augment: bool = False           # move, flip and brighten the windows at random, for a small set
    bf16: bool = True               # autocast to bfloat16, on a GPU or a CPU that is fast in it
    compile: bool = False           # torch.compile
    workers: int = 0                # data loading processes
    log_every: int = 20             # steps between two lines of the log
    eval_every: int = 500           # steps between two validations
    save_every: int = 500           # steps between two checkpoints
    seed: int = 0                   # of weights and data


PAPER = dict(lr=1e-4, batch=16, compile=True, workers=8, vgg16="hub", gan_weight=1.0)
PRESETS = {"demo": {}, "paper": tokenizer.PRESETS["paper"] | PAPER}


# ---------------------------------------------------------------- networks that judge a picture

class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman 2015), trained on ImageNet, for Eq. 3."""

    # Output channels of each convolution; 0 = a pooling that halves the size.
    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
    FILE = "vgg16-397923af.pth"

    def __init__(self, path):
        super().__init__()
        # Each layer at its place in torchvision's list, so that its weights load by name.
        layers = []
        inputs = 3
        for width in self.WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.load(path)
        self.requires_grad_(False).eval()

        # ImageNet's mean and standard deviation of each colour.
        shift = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        scale = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def load(self, path):
        """The weights of a file, or ("hub") of torchvision's download."""
        try:
            if path == "hub":
                url = f"https://download.pytorch.org/models/{self.FILE}"
                saved = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
            else:
                saved = read_file(path)
            # The classifier behind the convolutions is not needed.
            kept = {name: x for name, x in saved.items() if name.startswith("features.")}
            self.load_state_dict(kept)
        except (OSError, RuntimeError, AttributeError, UserError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--vgg16={path}: no VGG16 ({reason}); pass the path of torchvision's "
                            f"{self.FILE}, or --vgg16= for no perceptual loss") from None

    def forward(self, x):
        """x (B, C, H, W) in [0, 1] -> its features at the end of each of the five sizes."""
        # Grey is repeated to three colours.
        x = (x.expand(-1, 3, -1, -1) - self.shift) / self.scale
        features = []
        for layer in self.features:
            # What goes into a pooling is the last feature of its size.
            if isinstance(layer, nn.MaxPool2d):
                features.append(x)
            x = layer(x)
        return [*features, x]

    def distance(self, x, y):
        """Mean squared distance of the features, each of unit length over its channels (LPIPS)."""
        total = 0
        for a, b in zip(self(x), self(y)):
            a = F.normalize(a.float(), dim=1)
            b = F.normalize(b.float(), dim=1)
            total = total + (a - b).square().sum(1).mean()
        return total / 5


class Discriminator(nn.Module):
    """Judges places of a video (B, C, T, H, W), real or not, by convolutions over space and time.

    It sees motion. Without the spectral norm (Miyato et al. 2018) its gradient becomes very large.
    Eq. 6 then makes its weight almost 0, and the picture does not get sharper.
    """

    def __init__(self, channels, width=32):
        super().__init__()

        def conv(inputs, outputs, size=(3, 4, 4), stride=2):
            return spectral_norm(nn.Conv3d(inputs, outputs, size, stride, padding=1))

        # Halved three times in space and twice in time.
        self.layers = nn.Sequential(
            conv(channels, width, stride=(1, 2, 2)), nn.LeakyReLU(0.2),
            conv(width, 2 * width), nn.LeakyReLU(0.2),
            conv(2 * width, 4 * width), nn.LeakyReLU(0.2),
            conv(4 * width, 1, size=3, stride=1))
        self.register_buffer("mean_verdict", torch.zeros(2))        # of real, of reconstructed

    def forward(self, video):
        """video in [0, 1] -> verdicts (B, 1, t, h, w), high = real."""
        return self.layers(2 * video - 1)

    def lecam(self, real, fake):
        """LeCAM (Tseng et al. 2021): keeps verdicts near a moving average of the opposite ones."""
        # Only verdicts on real above the mean for fake count, and on fake below the mean for real.
        too_real = F.relu(real - self.mean_verdict[1]).square().mean()
        too_fake = F.relu(self.mean_verdict[0] - fake).square().mean()
        # The averages move by a hundredth a step, the same on all ranks.
        means = all_mean({"real": real.mean(), "fake": fake.mean()}, real.device)
        means = torch.tensor(list(means.values()), device=real.device)
        self.mean_verdict.lerp_(means, 0.01)
        return too_real + too_fake


# ---------------------------------------------------------------- losses

def reconstruction_loss(config, video, reconstruction, vgg16, frame):
    """Weighted sum of Eq. 2 and 3, and its parts, for video (B, C, T+1, H, W).

    VGG16 (None: no Eq. 3) sees one frame of each clip, drawn at random: frame (B,).
    """
    parts = {"mse": (reconstruction.float() - video).square().mean()}       # Eq. 2
    loss = config.mse_weight * parts["mse"]

    # VGG16 costs more than the tokenizer itself: one frame a clip is enough.
    if vgg16 is not None:
        each = torch.arange(len(video), device=video.device)
        fake = reconstruction[each, :, frame]                               # B C H W
        real = video[each, :, frame]                                        # B C H W
        parts["perceptual"] = vgg16.distance(fake, real)                    # Eq. 3
        loss = loss + config.perceptual_weight * parts["perceptual"]
    return loss, parts


def quantization_loss(config, lfq, done):
    """Commitment, Eq. 4, and entropy of LFQ's losses; done: share of the training so far."""
    # Early, entropy spreads the tokens over the codebook; late, the reconstruction has priority.
    entropy_weight = config.entropy_weight * (1 - 0.9 * min(done, 1))
    # Each token certain, all tokens together varied.
    entropy = lfq["entropy_sample"] - lfq["entropy_batch"]
    return config.commitment_weight * lfq["commitment"] + entropy_weight * entropy


def adversarial_loss(config, discriminator, reconstruction, loss, model):
    """The tokenizer's loss against the discriminator, and its parts.

    Its weight scales it so that its gradient at the decoder's last layer is as large as that of
    `loss`, the reconstruction loss.
    """
    adversarial = -discriminator(reconstruction).mean()                     # Eq. 5
    # The two heads that write pixels: of the first frame and of the others.
    last_layer = [p for head in (model.first_pixels, model.rest_pixels)
                  for p in head.parameters() if p.requires_grad]
    norms = []
    for part in (loss, adversarial):
        gradients = torch.autograd.grad(part, last_layer, retain_graph=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        # Averaged over the ranks, so that all of them use the same weight.
        norms.append(average(flat).norm())
    # A number, not a graph: no gradient passes through the weight.
    weight = norms[0] / (norms[1] + config.gan_epsilon)                     # Eq. 6
    weight = weight.clamp(max=config.gan_cap)
    parts = {"adversarial": adversarial, "adaptive_weight": weight}
    return config.gan_weight * weight * adversarial, parts


def discriminator_loss(config, discriminator, video, reconstruction):
    """Hinge loss of the discriminator, the counterpart of Eq. 5, with LeCAM; and its parts."""
    # detach: the tokenizer is not to be trained by this loss.
    real = discriminator(video).float()
    fake = discriminator(reconstruction.detach()).float()
    hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    loss = hinge + config.lecam_weight * discriminator.lecam(real, fake)
    return loss, {"hinge": hinge, "verdict_real": real.mean(), "verdict_fake": fake.mean()}


def adversarial_step(config, discriminator, video, reconstruction, loss, model):
    """The tokenizer's adversarial loss; leaves the discriminator's own gradient in its weights."""
    # The tokenizer's loss must not train the discriminator.
    discriminator.requires_grad_(False)
    adversarial, parts = adversarial_loss(config, discriminator, reconstruction, loss, model)
    discriminator.requires_grad_(True)

    own_loss, own_parts = discriminator_loss(config, discriminator, video, reconstruction)
    (own_loss / config.accumulate).backward()
    return adversarial, parts | own_parts


def batch_loss(config, model, video, frame, *, raw, vgg16, discriminator, done):
    """Loss of one batch, Eq. 1 -> loss, tokens, {name: value} for the log.

    model: raw, perhaps compiled or in DDP; discriminator None: there is none, or not yet.
    """
    reconstruction, tokens, lfq = model(video)
    loss, parts = reconstruction_loss(config, video, reconstruction, vgg16, frame)
    if discriminator is not None:
        # `loss` is the reconstruction's alone here: Eq. 6 compares the two gradients.
        adversarial, more = adversarial_step(
            config, discriminator, video, reconstruction, loss, raw)
        loss = loss + adversarial
        parts |= more
    # Eq. 1: reconstruction (2, 3) + adversarial (5, 6) + quantization (4, and LFQ's entropy).
    loss = loss + quantization_loss(config, lfq, done)
    return loss, tokens, {"loss": loss, **parts, **lfq}


# ---------------------------------------------------------------- this trainer

def set_trainable(config, model):
    """Train all weights, the decoder's alone, or adapters alone."""
    if config.lora_rank and not config.init_from:
        raise UserError("--lora_rank adapts trained weights: pass --init_from=FOLDER")
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    if config.decoder_only:
        # The layers after the tokens. The tokens stay, so a generator of them stays valid.
        decoder = (model.lfq.project_out, model.decode_time, model.decode_space, model.norm,
                   model.first_pixels, model.rest_pixels)
        model.requires_grad_(False)
        for part in decoder:
            part.requires_grad_(True)


def save(config, model, step, **more):
    """OUT/tokenizer.pt in plain weights; of LoRA also the adapters alone."""
    if config.lora_rank:
        save_weights(config.out, "tokenizer_lora", model, step, lora_state_dict(model),
                     rank=config.lora_rank)
    save_weights(config.out, "tokenizer", model, step, merge_lora(model), **more)


@torch.no_grad()
def evaluate(model, data, batch, *, device, rank, world, items=64):
    """Mean squared error, codes in use and their perplexity, on fixed windows of the val split."""
    # The same windows each time, shared out over the ranks; every rank takes as many batches.
    error = 0.0
    counts = 0
    num_batches = math.ceil(items / (batch * world))
    for k in range(num_batches):
        start = (k * world + rank) * batch
        clips = [data[n]["video"] for n in range(start, start + batch)]
        video = torch.stack(clips).to(device)                               # B C T+1 H W
        tokens = model.encode(video)
        counts = counts + index_counts(tokens, model.config.bits)
        error += (model.decode(tokens) - video).square().mean().item() / num_batches
    results = {"val_mse": error}
    # The codes of all ranks together: one rank sees only a part of them.
    for name, value in codebook_usage(average(counts)).items():
        results[f"val_{name}"] = value
    return all_mean(results, device)


def make_data(config, split, augment_video=None):
    """Random windows of a split; one uniform number each says which frame VGG16 sees."""
    return RandomWindows(Clips(config.data, split), config.frames, seed=config.seed, uniforms=1,
                         channels=config.channels, augment_video=augment_video)


def main():
    """One training, from the flags to the weights on disk."""
    config = parse_flags(TrainConfig, PRESETS)
    check_training(config)

    # ---- distributed and seed
    device, rank, world = init_distributed(config.seed)
    state_path = check_out(config, "tokenizer")

    # ---- data
    train = make_data(config, "train", random_shift_and_flip if config.augment else None)
    val = make_data(config, "val")

    # ---- model
    shape = model_config(config, TokenizerConfig)
    if config.init_from:
        # The file must have the sizes of the flags.
        raw = load_weights(config.init_from, "tokenizer", Tokenizer, TokenizerConfig, shape)
    else:
        raw = Tokenizer(shape)
    raw = raw.to(device)
    set_trainable(config, raw)

    # ---- the networks that judge its pictures
    vgg16 = None
    if config.vgg16:
        vgg16 = VGG16(config.vgg16).to(device)
    # Both judge only in training: they are no part of the saved weights.
    discriminator = None
    if config.gan_weight:
        discriminator = Discriminator(config.channels).to(device)
    # Written into the checkpoint: what its weights were trained with.
    losses = "mse commitment entropy"
    losses += " perceptual" * bool(vgg16) + " adversarial" * bool(discriminator)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, "
              f"{parameter_count(raw, trained=True):.2f}M of them trained, "
              f"{len(train.clips)} clips, {device} x {world}; losses: {losses}")
        if not config.vgg16:
            print("no perceptual loss (Eq. 3): it needs torchvision's VGG16, "
                  "--vgg16=PATH or --vgg16=hub")

    # ---- optimizer and EMA
    # Frozen weights are left out: weight decay would move them, too.
    trained = [p for p in raw.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)
    ema = copy.deepcopy(raw).eval()
    parts = {"model": raw, "ema": ema, "optimizer": optimizer}
    if discriminator:
        # A short memory of the gradient (beta 0.5), as is usual for a discriminator.
        optimizer_d = torch.optim.AdamW(discriminator.parameters(), betas=(0.5, 0.9), fused=True)
        parts |= {"discriminator": discriminator, "optimizer_d": optimizer_d}

    # ---- resume: all ranks start from the same step, with the same settings, clips and weights
    settings = run_settings(config, world, train.clips)
    step, seconds = resume(settings, state_path, parts)

    # ---- compile and DDP: `model` is called, `raw` holds its parameters
    functorch.donated_buffer = False        # Eq. 6 asks the compiled graph twice for gradients
    model = torch.compile(raw) if config.compile else raw
    if dist.is_initialized():
        device_ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids)

    # ---- loop
    log = Log(config, "tokenizer", rank)
    log.bar.update(step)
    loader = batches(train, config.batch, step * config.accumulate, rank, world, config.workers)
    began = time.time() - seconds
    results = {}
    for step in count(step):
        # schedule: the share of the training that is done, and the learning rate
        seconds = time.time() - began
        done, lr = schedule(config, step, seconds, device)
        # The discriminator comes in late: before, every reconstruction is easily told from real.
        judge = discriminator if done >= config.gan_warmup else None

        # evaluate the EMA weights
        if step > 0 and (done >= 1 or step % config.eval_every == 0):
            results = evaluate(ema, val, config.batch, device=device, rank=rank, world=world)
            results = log.write(step, **results)

        # save
        if first_of_node() and step > 0 and (done >= 1 or step % config.save_every == 0):
            save(config, ema, step, losses=losses)
            save_state(state_path, parts, step=step, seconds=seconds, settings=settings)
        if done >= 1:
            break

        # accumulate the gradients of one or more batches; the ranks average them after the last
        for k in range(config.accumulate):
            batch = log.wait(loader)
            video = batch["video"].to(device, non_blocking=True)            # B C T+1 H W
            frame = (batch["uniform"][:, 0].to(device) * config.frames).long()
            with gradient_sync(model, wanted=k == config.accumulate - 1):
                with bfloat16(device, config.bf16):
                    loss, tokens, values = batch_loss(
                        config, model, video, frame, raw=raw, vgg16=vgg16, discriminator=judge,
                        done=done)
                (loss / config.accumulate).backward()

        # clip the gradient, step, EMA
        optimizer_step(config, raw, optimizer, lr=lr, step=step, clips=train.clips, batch=batch,
                       state_path=state_path)
        if judge is not None:
            # DDP averages only the tokenizer's gradients; those of the discriminator are averaged
            # here.
            for p in judge.parameters():
                average(p.grad)
            optimizer_step(config, judge, optimizer_d, lr=lr, step=step, clips=train.clips,
                           batch=batch, state_path=state_path)
        ema_update(config, ema, raw, step)

        # log
        if step % config.log_every == 0:
            values = all_mean(values, device)
            values |= codebook_usage(index_counts(tokens, config.bits))
            log.write(step, **values, lr=lr, seconds=seconds, **log.rate(step, config, world))
            log.bar.set_postfix({"loss": f"{values['loss']:.3f}", "mse": f"{values['mse']:.5f}",
                                 **results})
        log.bar.update()

    # ---- teardown
    log.close(f"tokenizer.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")


if __name__ == "__main__":
    run_training(main)
