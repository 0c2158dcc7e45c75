"""Train the masked token transformer and the ECG encoder (ECHOPulse section 3.2; Eq. 7 and 8).

    python train_generator.py --data=datasets/phantom --weights=runs/demo --out=runs/demo  # demo, CPU or GPU
    torchrun --nproc_per_node=8 train_generator.py --preset=paper --data=datasets/NAME --weights=DIR --out=OUT

Needs tokenizer.pt and ecg_encoder.pt in --weights; the first alone with --condition=none, for video of any
kind, and with --condition=text, a line in the ECG's place. Reads windows of T+1 frames with the ECG around
them, writes OUT/generator.pt and OUT/ecg_encoder.pt or text_encoder.pt (EMA weights), OUT/generator_state.pt
(all that --resume needs) and OUT/generator.jsonl (a line a logged step). Every validation also gives the
loss with a wrong ECG, another clip's: the gap between the two is the method's pulse. It opens late, after
some thousands of clips.
"""
import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import generator
from common.checkpoint import (check_out, check_same, load_state, load_weights, save_state,
                               save_weights)
from common.flags import parse_flags, run_main
from common.text_encoder import TextConfig, TextEncoder
from common.training import (Log, all_mean, bfloat16, ema_update, init_distributed, model_config,
                             schedule, update)
from data.dataset import Clips, RandomWindows, batches, vary_view
from data.ecg_signal import clean_ecg, redraw_ecg
from generator import ENCODERS, Generator, GeneratorConfig, check_fits, condition, masked_share
from tokenizer import Tokenizer, TokenizerConfig, parameter_count


@dataclass
class TrainConfig(GeneratorConfig):
    data: str = "datasets/phantom"  # prepared data set; of several, A,B, each is drawn as often
    weights: str = "runs/demo"      # folder with tokenizer.pt and ecg_encoder.pt
    out: str = "runs/demo"          # folder for weights, state and log
    init_from: str = ""             # start from the generator in this folder
    text_encoder: str = ""          # with condition=text: a trained T5 of transformers; empty = a small one
    resume: bool = False            # go on from OUT's saved state
    steps: int = 0                  # stop after so many steps; 0 = after --minutes
    minutes: float = 60             # stop after so many minutes of training
    batch: int = 8                  # clips of one step in one process
    accumulate: int = 1             # batches whose gradients are added up for one step
    lr: float = 1e-3                # peak learning rate of AdamW; linear warm-up, then cosine to a twentieth
    warmup: int = 300               # steps of warm-up
    weight_decay: float = 0.01      # of AdamW
    clip_norm: float = 1.0          # gradient norm is clipped here
    ema: float = 0.98               # EMA of the weights, every 10 steps
    none_share: float = 0.15        # clips trained without any known frame
    prefix_share: float = 0.50      # clips with two or more known latent frames; the rest know the first
    drop_ecg: float = 0.10          # clips whose ECG (or text) is replaced by the null context
    drop_phrase: float = 0.15       # phrases of a text that are left out
    augment: bool = False           # vary the contrast of each window; turn, scale and shift it
    redraw_share: float = 0.40      # clips whose ECG is drawn as by another recorder
    hide_share: float = 0.20        # clips with a span of the ECG hidden
    anchor_share: float = 0.90      # clips with a prefix that also see an anchor, another frame of the video
    fade_share: float = 0.50        # prefixes of another brightness than the anchor, which has the true one
    freeze_encoder: bool = False    # leave the ECG encoder as it is
    critic_weight: float = 1.0      # Eq. 10, where there is a --critic
    bf16: bool = True               # autocast to bfloat16, on a GPU or a CPU with AMX or AVX512-BF16
    compile: bool = False           # torch.compile
    workers: int = 0                # data loading processes
    log_every: int = 20             # steps between two lines of the log
    eval_every: int = 500           # steps between two validations
    save_every: int = 500           # steps between two checkpoints
    seed: int = 0                   # of weights and data


PRESETS = {"demo": {}, "paper": generator.PRESETS["paper"] | dict(lr=1e-4, batch=16, compile=True, workers=8)}


class Stage2(nn.Module):
    """Encoder (or None) and generator as one module, as DDP wants it: its forward is the loss of every token
    and, with a critic, the critic's logit of every token and whether it is fake (B, T', h, w)."""

    def __init__(self, encoder, generator):
        super().__init__()
        self.encoder, self.generator = encoder, generator

    def forward(self, index, masked, batch, anchor, drop=None, hidden=None, u=None):
        cond = condition(self.generator.config, self.encoder, batch, drop, hidden, anchor)
        if u is None:
            return self.generator(index, masked, cond)
        loss, judged = self.generator(index, masked, cond, u)
        return loss, self.generator.score(judged, cond), judged != index


def start_from(folder, shape):
    """The generator of a folder with the sizes of `shape`. A critic that it had not starts anew."""
    old = load_weights(folder, "generator", Generator, GeneratorConfig)
    free = {key: getattr(old.config, key) for key in ("critic", "critic_depth", "condition")}
    check_same(f"{folder}/generator.pt", old.config, replace(shape, **free))
    model = Generator(shape)
    model.load_state_dict(old.state_dict(), strict=False)
    return model


def draws(noise, tokens):
    """The uniform numbers of a batch (B, K) by what they decide; for None how many it takes, K."""
    sizes = dict(masked=3 + tokens, critic=2 * tokens, fade=17, anchor=1, drop=1, hidden=3)
    return sum(sizes.values()) if noise is None else dict(zip(sizes, noise.split(list(sizes.values()), 1)))


def choose_masked(config, noise, T, N, known=None):
    """Masks of a batch from its uniform numbers, noise (B, 3 + T N) -> masked (B, T, N) bool, known (B,).

    Known latent frames (none, the first, or a prefix; `known` fixes how many) are never masked; of the other
    tokens the cosine schedule masks a share, at least one.
    """
    kind, share, length = noise[:, 0], noise[:, 1], noise[:, 2]
    prefix = 2 + (length * (T - 2)).long()                                                  # 2 .. T-1
    chosen = torch.where(kind < config.none_share, 0, torch.where(kind < 1 - config.prefix_share, 1, prefix))
    known = chosen if known is None else torch.full_like(chosen, known)                     # B
    free = (T - known) * N
    many = (masked_share(share) * free).ceil().clamp(min=1)                                 # B
    order = noise[:, 3:3 + T * N].reshape(-1, T, N)
    order = order.masked_fill(torch.arange(T, device=noise.device)[:, None] < known[:, None, None],
                              2).flatten(1)
    return (order.argsort(1).argsort(1) < many[:, None]).reshape(-1, T, N), known


def choose_hidden(noise, samples, share):
    """ECG mask: uniform numbers (B, 3) -> (B, samples) bool; in a `share` of the clips a span of a twentieth
    to a half of the ECG is hidden."""
    length, middle = (0.05 + 0.45 * noise[:, 1:2]) * samples, noise[:, 2:3] * samples       # B 1
    away = (torch.arange(samples, device=noise.device) - middle).abs()                      # B samples
    return (away < length / 2) & (noise[:, :1] < share)


def choose_anchor(noise, index, known, share):
    """Tokens (B, h, w) of the anchor frames, -1 where a clip sees none: a window that follows another one
    (two or more known latent frames) mostly has an anchor, the first has none. noise (B, 1) uniform."""
    return index.masked_fill(((noise[:, 0] > share) | (known < 2))[:, None, None], -1)


def choose_fade(noise, share):
    """Uniform numbers (B, 17) -> gains (B, 1, 1, 4, 4) of places in the picture: 0.5 to 1.2, or all 1."""
    gain = (0.5 + 0.7 * noise[:, 1:]).unflatten(1, (1, 1, 4, 4))
    return torch.where(noise[:, :1, None, None, None] < share, gain, 1)


def as_sampled(tokenizer, index, known, fade=None):
    """index (B, T, h, w) with known prefixes as sampling has them: encoded again from what was decoded, and
    faded by the gains of `fade` (B, 1, 1, 4, 4).

    Without it each window would take the small losses of the one before for the truth, and add its own.
    """
    frame, prefixed = torch.arange(index.shape[1], device=index.device), known > 1
    if not prefixed.any():
        return index
    again, video = index.clone(), tokenizer.decode(index[prefixed])                         # B C T H W
    if fade is not None:
        video = video * F.interpolate(fade[prefixed], size=(1, *video.shape[-2:]), mode="trilinear")
    again[prefixed] = tokenizer.encode(video.clamp(0, 1))
    prefix = (frame < known[:, None]) & prefixed[:, None]                                   # B T
    return torch.where(prefix[..., None, None], again, index)


def to_device(batch, device):
    """A batch there; its clips share their leads."""
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    return batch | ({"leads": batch["leads"][0]} if "leads" in batch else {})


def load_encoder(config):
    """The encoder of what the generator is to be told, None for nothing; one of text may start anew."""
    if config.condition not in ENCODERS:
        return None
    if config.condition == "text" and not Path(config.init_from or "-", "text_encoder.pt").exists():
        return TextEncoder(TextConfig(config.text_encoder, config.ecg_dim))
    return load_weights(config.init_from if config.condition == "text" else config.weights,
                        *ENCODERS[config.condition])


def masked_mean(loss, masked):
    """Mean over the masked tokens of all ranks; DDP averages what the ranks return."""     # Eq. 7
    total = masked.sum().float()
    if dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return (loss * masked).sum() / total


def auroc(score, positive):
    """Area under the ROC curve of (N,): how often a positive one scores higher than another one."""
    rank = torch.empty_like(score)
    rank[score.argsort()] = torch.arange(1, len(score) + 1, device=score.device).float()
    many = positive.sum()
    return (rank[positive].sum() - many * (many + 1) / 2) / (many * (len(score) - many)).clamp(min=1)


def critic_loss(logits, fake, free):
    """Binary cross-entropy of the tokens that are not known, and the figures for the log."""
    bce = F.binary_cross_entropy_with_logits(logits, fake.float(), reduction="none")        # Eq. 10
    loss, logits, fake = masked_mean(bce, free), logits.detach()[free], fake[free]
    return loss, {"critic_bce": loss, "critic_accuracy": ((logits > 0) == fake).float().mean(),
                  "critic_auroc": auroc(logits, fake)}


@torch.no_grad()
def evaluate(model, tokenizer, data, config, device, rank, world, items=64):
    """Loss with the right and another clip's ECG (or text), knowing the first frame or half of the clip."""
    which = ("none",) if config.condition == "none" else ("right", "wrong")
    sums = {f"val_{known}_{ecg}": 0.0 for known in ("first", "prefix") for ecg in which}
    for start in range(rank * config.batch, items, config.batch * world):
        batch = [data[n] for n in range(start, start + config.batch)]
        batch = to_device(torch.utils.data.default_collate(batch), device)
        index = tokenizer.encode(batch["video"])
        u = draws(batch["noise"], index[0].numel())
        wrong = batch | {k: [x[-1], *x[:-1]] if k == "text" else x.roll(1, 0) for k, x in batch.items()
                         if k in ("ecg", "ecg_start", "anchor_ecg", "text")}
        for name, known in (("first", 1), ("prefix", index.shape[1] // 2)):
            masked, many = choose_masked(config, u["masked"], index.shape[1], index[0, 0].numel(), known)
            given, masked = as_sampled(tokenizer, index, many), masked.reshape(index.shape)
            anchor = choose_anchor(u["anchor"], tokenizer.encode(batch["anchor"])[:, 0], many, 1)
            for ecg, told in zip(which, (batch, wrong)):
                loss = masked_mean(model(given, masked, told, anchor), masked)
                sums[f"val_{name}_{ecg}"] += loss.item() * config.batch * world / items
    return all_mean(sums, device)


def main():
    config = parse_flags(TrainConfig, PRESETS)

    # ---- distributed and seed
    device, rank, world = init_distributed(config.seed)
    state_path = check_out(config, "generator")

    # ---- tokenizer and data
    tokenizer = load_weights(config.weights, "tokenizer", Tokenizer, TokenizerConfig).eval().to(device)
    encoder = load_encoder(config)
    samples = encoder.config.samples if config.condition == "ecg" else 0
    check_fits(config, tokenizer, encoder)
    T, N = tokenizer.latent_frames, tokenizer.grid ** 2
    vary, text = partial(redraw_ecg, share=config.redraw_share), config.condition == "text"
    train, val = (RandomWindows(Clips(config.data, split), tokenizer.config.frames, samples, clean_ecg,
                                config.batch * world, config.seed, draws(None, T * N), vary,
                                tokenizer.config.channels, anchor=(config.ecg_before, config.ecg_after),
                                text=left_out if text else None, vary_video=view)
                  for split, vary, left_out, view in (
                      ("train", vary, config.drop_phrase, vary_view if config.augment else None),
                      ("val", None, 0, None)))

    # ---- model
    shape = model_config(config, GeneratorConfig)
    raw = Stage2(encoder, start_from(config.init_from, shape) if config.init_from else Generator(shape))
    raw = raw.to(device)
    if config.freeze_encoder and encoder:
        encoder.requires_grad_(False)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, {parameter_count(raw.generator):.2f}M of "
              f"them the generator's, {len(train.clips)} clips, {device} x {world}")

    # ---- optimizer and EMA
    optimizer = torch.optim.AdamW(raw.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)
    ema = copy.deepcopy(raw).eval()
    parts = {"model": raw, "ema": ema, "optimizer": optimizer}

    # ---- resume
    step, seconds = load_state(state_path, parts) if config.resume else (0, 0.0)

    # ---- compile and DDP
    model = torch.compile(raw) if config.compile else raw
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    # ---- loop
    log, loader = Log(config, "generator", rank), \
        batches(train, config.batch, step * config.accumulate, rank, world, config.workers)
    log.bar.update(step)
    began, results = time.time() - seconds, {}
    for step in count(step):
        seconds = time.time() - began
        done, lr = schedule(config, step, seconds, device)

        # evaluate and save
        if step > 0 and (done >= 1 or step % config.eval_every == 0):
            results = log.write(step, **evaluate(ema, tokenizer, val, config, device, rank, world))
        if rank == 0 and step > 0 and (done >= 1 or step % config.save_every == 0):
            save_weights(config.out, "generator", ema.generator, step)
            if encoder:
                save_weights(config.out, f"{config.condition}_encoder", ema.encoder, step)
            save_state(state_path, parts, step, seconds)
        if done >= 1:
            break

        # accumulate
        for _ in range(config.accumulate):
            batch = to_device(log.wait(loader), device)
            with bfloat16(device, config.bf16):
                index = tokenizer.encode(batch["video"])                                    # B T' h w
                u = draws(batch["noise"], T * N)
                masked, known = choose_masked(config, u["masked"], T, N)
                fade = choose_fade(u["fade"], config.fade_share)
                index, masked = as_sampled(tokenizer, index, known, fade), masked.reshape(index.shape)
                anchor = tokenizer.encode(batch["anchor"])[:, 0]
                anchor = choose_anchor(u["anchor"], anchor, known, config.anchor_share)
                hidden = choose_hidden(u["hidden"], samples, config.hide_share)
                told = batch, anchor, u["drop"][:, 0] < config.drop_ecg, hidden
                if config.critic == "none":
                    loss, values = masked_mean(model(index, masked, *told), masked), {}
                else:
                    each, logits, fake = model(index, masked, *told, u["critic"].unflatten(1, (2, -1)))
                    free = torch.arange(T, device=device)[:, None, None] >= known[:, None, None, None]
                    bce, values = critic_loss(logits, fake, free.expand_as(fake))
                    loss = masked_mean(each, masked) + config.critic_weight * bce
            (loss / config.accumulate).backward()

        # clip, step, EMA
        update(config, raw, optimizer, lr, step, train.clips, batch, state_path)
        if step % 10 == 0:
            ema_update(ema, raw, min(config.ema, step / (step + 100)))

        # log
        if step % config.log_every == 0:
            values = all_mean({"loss": loss, "masked": masked.float().mean(), **values}, device)
            log.write(step, **values, lr=lr, seconds=seconds, **log.rate(step, config, world),
                      leads=len(batch["leads"]) if samples else 0)
            log.bar.set_postfix({"loss": f"{values['loss']:.3f}", **results})
        log.bar.update()

    log.close(f"generator.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")


if __name__ == "__main__":
    run_main(main)
