"""Train the masked token transformer and the ECG encoder (ECHOPulse section 3.2; Eq. 7 to 10).

    python train_generator.py --data=datasets/phantom --weights=runs/demo --out=runs/demo
    torchrun --nproc_per_node=8 train_generator.py --preset=paper --data=DATA --weights=W --out=O

Needs tokenizer.pt and ecg_encoder.pt in --weights. With --condition=text a line of text stands in
the ECG's place, with --condition=none there is nothing in it: both need tokenizer.pt alone.

Reads windows of T+1 frames with the ECG around them. Writes OUT/generator.pt and OUT/ecg_encoder.pt
or text_encoder.pt (EMA weights), OUT/generator_state.pt (what --resume needs) and
OUT/generator.jsonl (one line a logged step).

Every validation also gives the loss with a wrong ECG, that of another clip. The gap between the two
losses shows that the model uses the ECG. It opens only after a few thousand clips, so a short run
shows nothing.
"""
import copy
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import generator
from common.checkpoint import (check_out, check_same, load_weights, read_file, save_state,
                               save_weights)
from common.flags import UserError, parse_flags
from common.text_encoder import TextConfig, TextEncoder
from common.training import (Log, all_mean, bfloat16, check_training, ema_update, first_of_node,
                             gradient_sync, init_distributed, optimizer_step, resume,
                             run_settings, run_training, schedule, state_hash)
from data.dataset import Clips, RandomWindows, batches, random_view
from data.ecg_signal import augment_recorder_filter, clean_ecg, find_disturbed
from data.token_cache import open_tokens, write_tokens
from generator import (Generator, GeneratorConfig, GeneratorSettings, build_condition, check_fits,
                       cosine_schedule, fit_config, load_encoder)
from tokenizer import Tokenizer, TokenizerConfig, parameter_count


@dataclass
class TrainConfig(GeneratorSettings):
    """Settings of a training; each is a flag."""
    data: str = "datasets/phantom"  # prepared data set; of several, A,B, each is drawn as often
    weights: str = "runs/demo"      # folder with tokenizer.pt and ecg_encoder.pt
    out: str = "runs/demo"          # folder for weights, state and log
    init_from: str = ""             # start from the generator in this folder
    leads: str = ""                 # ECG leads of all steps, such as I,II,V2; empty = drawn anew
    text_encoder: str = ""          # text: a trained T5 of transformers; empty = a new small one
    text_dim: int = 128             # text: width of a new encoder, where no --init_from says
    resume: bool = False            # go on from OUT's saved state
    steps: int = 0                  # stop after so many steps; 0 = after --minutes
    minutes: float = 60             # stop after so many minutes of training
    batch: int = 8                  # clips of one step in one process
    accumulate: int = 1             # batches whose gradients are added up for one step
    lr: float = 1e-3                # peak learning rate of AdamW; then cosine to a twentieth
    warmup: int = 300               # steps of linear warm-up
    weight_decay: float = 0.01      # of AdamW
    clip_norm: float = 1.0          # gradient norm is clipped here
    ema: float = 0.98               # EMA of the weights, every 10 steps
    p_no_prefix: float = 0.15       # share of clips of which no latent frame is known
    p_prefix: float = 0.50          # share with two or more known latent frames; the rest know one
    p_uncond: float = 0.10          # share whose ECG (or text) is replaced by the null context
    p_drop_phrase: float = 0.15     # share of the phrases of a text that are left out
    cache_tokens: bool = False    # encode all windows once, at first; kept beside the set
    augment: bool = False           # vary the contrast of each window; turn, scale and shift it
    p_recorder_filter: float = 0.40  # share whose ECG is filtered as by another recorder
    p_hide: float = 0.20            # share with a span of the ECG hidden
    p_anchor: float = 0.90          # share of the clips with a prefix that also see an anchor
    p_fade: float = 0.50            # share of prefixes of another brightness than their anchor
    freeze_encoder: bool = False    # leave the ECG encoder as it is
    critic_weight: float = 1.0      # Eq. 10, where there is a --critic
    bf16: bool = True               # autocast to bfloat16, on a GPU or a CPU that is fast in it
    compile: bool = False           # torch.compile
    workers: int = 0                # data loading processes
    log_every: int = 20             # steps between two lines of the log
    eval_every: int = 500           # steps between two validations
    save_every: int = 500           # steps between two checkpoints
    seed: int = 0                   # of weights and data


PAPER = dict(lr=1e-4, batch=16, compile=True, workers=8, text_dim=768)
PRESETS = {"demo": {}, "paper": generator.PRESETS["paper"] | PAPER}


# ---------------------------------------------------------------- the random choices of a batch

def uniform_sizes(num_tokens):
    """How many uniform numbers each random choice takes for a clip of `num_tokens` tokens.

    The numbers come with the clip's data, as a function of (seed, item number). So --resume needs
    no random state, and two processes choose what one would.
    """
    return {
        "prefix_kind": 1,               # is no frame known, the first one, or a prefix?
        "mask_ratio": 1,                # where on the cosine schedule
        "prefix_length": 1,
        "mask_order": num_tokens,       # the tokens with the lowest numbers are masked
        "critic": 2 * num_tokens,       # the low and the high bits of the critic's input
        "fade": 1 + 16,                 # is there a fade? its gain at 4 x 4 places
        "anchor": 1,
        "drop": 1,                      # is the ECG replaced by the null context?
        "ecg_mask": 3,                  # is a span hidden? its length and its middle
    }


def split_uniforms(uniforms, num_tokens):
    """Uniform numbers (B, K) of a batch -> {choice: its numbers (B, size)}."""
    # The order of the table must stay: with another order an old seed would give other choices.
    sizes = uniform_sizes(num_tokens)
    return dict(zip(sizes, uniforms.split(list(sizes.values()), dim=1)))


def random_num_prefix(config, kind, length, T):
    """How many latent frames each clip knows: 0, 1 (its first frame) or 2 to T - 1 (a prefix).

    kind, length (B,) uniform numbers -> (B,) int64.
    """
    # At least one latent frame is left to be predicted.
    prefix = 2 + (length * (T - 2)).long()                                  # B

    # From the low numbers up: nothing known, the first frame known, a prefix known.
    is_prefix = kind >= 1 - config.p_prefix
    num_prefix = torch.where(is_prefix, prefix, 1)
    return torch.where(kind < config.p_no_prefix, 0, num_prefix)


def draw_num_prefix(config, batch, tokenizer):
    """random_num_prefix of a batch as it comes from the loader: (B,) int64, on the CPU."""
    T = tokenizer.latent_frames
    u = split_uniforms(batch["uniform"], T * tokenizer.grid ** 2)
    return random_num_prefix(config, u["prefix_kind"][:, 0], u["prefix_length"][:, 0], T)


def random_token_mask(num_prefix, ratio, order):
    """Which tokens are masked: bool (B, T, N); at least one, and none of a known latent frame.

    num_prefix (B,), ratio (B,) uniform, order (B, T, N) uniform.
    """
    B, T, N = order.shape
    # Eq. 8: the cosine schedule of a uniform number says which share of the free tokens is masked.
    free = (T - num_prefix) * N                                             # B
    num_masked = (cosine_schedule(ratio) * free).ceil().clamp(min=1)        # B

    # Known tokens come last in the order: no uniform number is 2.
    frame = torch.arange(T, device=order.device)[:, None]                   # T 1
    is_known = frame < num_prefix[:, None, None]                            # B T 1
    order = order.masked_fill(is_known, 2).flatten(1)                       # B TN

    # The num_masked lowest numbers of each clip are masked. Clips differ in how many, so their
    # ranks are compared, in place of one top-k for all.
    rank = order.argsort(1).argsort(1)
    return (rank < num_masked[:, None]).reshape(B, T, N)


def random_ecg_mask(u, samples, p):
    """The ECG mask: uniform numbers (B, 3) -> bool (B, samples), True = hidden.

    With probability p a span of a twentieth to a half of the ECG is hidden.
    """
    has_span = u[:, :1] < p                                                 # B 1
    length = (0.05 + 0.45 * u[:, 1:2]) * samples
    middle = u[:, 2:3] * samples
    # The span may reach beyond either end of the ECG.
    distance = (torch.arange(samples, device=u.device) - middle).abs()      # B samples
    return (distance < length / 2) & has_span


def random_anchor(u, tokens, num_prefix, p):
    """The anchors of a batch: their tokens (B, h, w), -1 where a clip sees none.

    With probability p a window that follows another one (it knows two or more latent frames) has an
    anchor. The first window of a video has none. u (B, 1) uniform.
    """
    # -1 is no token; the generator puts its mask token there.
    no_anchor = (u[:, 0] > p) | (num_prefix < 2)
    return tokens.masked_fill(no_anchor[:, None, None], -1)


def random_fade(u, p):
    """Uniform numbers (B, 17) -> gains (B, 1, 1, 4, 4) of places in the picture.

    With probability p they are 0.5 to 1.2, else 1. A prefix is faded and its anchor is not. So the
    model learns to look at the anchor for the brightness, and a long video does not drift.
    """
    # 4 x 4 places, which reencode_prefix interpolates over the picture.
    gain = (0.5 + 0.7 * u[:, 1:]).unflatten(1, (1, 1, 4, 4))
    has_fade = u[:, :1, None, None, None] < p
    return torch.where(has_fade, gain, 1)


class BatchChoices(NamedTuple):
    """All random choices of a batch of B clips."""
    masked: torch.Tensor            # (B, T', h, w) True = to be predicted
    fade: torch.Tensor              # (B, 1, 1, 4, 4) gains of the prefix
    anchor: torch.Tensor            # (B, h, w) tokens, -1 = none
    drop: torch.Tensor              # (B,) True = the null context in the ECG's place
    ecg_hidden: torch.Tensor        # (B, samples) True = hidden
    critic_uniforms: torch.Tensor   # (B, 2, T' h w) for the critic's input


def random_choices(config, uniforms, num_prefix, tokens, anchor_tokens, samples):
    """BatchChoices from the uniform numbers (B, K) that come with a batch.

    num_prefix (B,) known latent frames, tokens (B, T', h, w), anchor_tokens (B, h, w), samples of
    the ECG (0: there is none).
    """
    T, h, w = tokens.shape[1:]
    u = split_uniforms(uniforms, T * h * w)

    # The mask and the anchor depend on how many frames are known.
    mask_order = u["mask_order"].unflatten(1, (T, h * w))
    masked = random_token_mask(num_prefix, u["mask_ratio"][:, 0], mask_order)
    return BatchChoices(
        masked=masked.reshape(tokens.shape),
        fade=random_fade(u["fade"], config.p_fade),
        anchor=random_anchor(u["anchor"], anchor_tokens, num_prefix, config.p_anchor),
        drop=u["drop"][:, 0] < config.p_uncond,
        ecg_hidden=random_ecg_mask(u["ecg_mask"], samples, config.p_hide),
        critic_uniforms=u["critic"].unflatten(1, (2, -1)))


def reencode_prefix(tokenizer, tokens, num_prefix, fade=None):
    """tokens (B, T', h, w) with prefixes as sampling has them: decoded, and encoded again.

    Decoding and encoding lose some detail. A model that has only seen clean prefixes would add up
    these errors from window to window. fade (B, 1, 1, 4, 4): gains of the decoded video.
    num_prefix (B,) below 2: nothing changes, since the first frame is given as it is. It lies on
    the CPU, which then knows the shapes below without waiting for a GPU.
    """
    rows = (num_prefix > 1).nonzero()[:, 0].to(tokens.device)               # b clips with a prefix
    if len(rows) == 0:
        return tokens
    # The decoder is causal, so the later tokens do not change the prefix's frames.
    video = tokenizer.decode(tokens[rows])                                  # b C T H W
    if fade is not None:
        # Smooth gains over the picture, the same in each frame.
        gain = F.interpolate(fade[rows], size=(1, *video.shape[-2:]), mode="trilinear")
        video = video * gain
    reencoded = tokens.clone()
    reencoded[rows] = tokenizer.encode(video.clamp(0, 1))

    # Only the known latent frames change. The masked ones keep the true tokens as their target.
    frame = torch.arange(tokens.shape[1])                                   # T'
    in_prefix = (frame < num_prefix[:, None]) & (num_prefix > 1)[:, None]   # B T'
    in_prefix = in_prefix.to(tokens.device)
    return torch.where(in_prefix[..., None, None], reencoded, tokens)


# ---------------------------------------------------------------- the model of this stage

class Stage2(nn.Module):
    """Encoder (None: there is none) and generator as one module, as DDP wants it."""

    def __init__(self, encoder, generator):
        super().__init__()
        self.encoder = encoder
        self.generator = generator

    def forward(self, tokens, masked, critic_uniforms=None, **known):
        """What the losses need of a batch, a dict of tensors (B, T', h, w):

            token_loss              of every token
            critic_logits, fake     the critic's logit that a token is fake, and whether it is;
                                    with critic_uniforms (B, 2, T' h w)

        known: the arguments of build_condition.
        """
        cond = build_condition(self.generator.config, self.encoder, **known)
        features = self.generator.features(tokens, masked, cond)                # B T'hw D
        result = {"token_loss": self.generator.token_loss(features, tokens)}
        # The transformer has run once for the loss and the samples. The critic's runs once more.
        if critic_uniforms is not None:
            judged = self.generator.critic_input(features, tokens, masked, critic_uniforms)  # Eq. 9
            result["critic_logits"] = self.generator.critic_logits(judged, cond)
            # A sample that hits the true token is no fake, though its place was masked.
            result["fake"] = judged != tokens
        return result


def make_encoder(config):
    """The encoder of the ECG or the text; None for a generator of video alone."""
    if config.condition != "text":
        return load_encoder(config.weights, config.condition)
    if config.init_from and Path(config.init_from, "text_encoder.pt").exists():
        return load_encoder(config.init_from, "text")
    # A new text encoder takes the place of the ECG encoder: as wide as the generator expects.
    width = config.text_dim
    if config.init_from:
        width = read_file(Path(config.init_from, "generator.pt"))["config"]["ecg_dim"]
    return TextEncoder(TextConfig(config.text_encoder, width))


def start_from(folder, shape, tokenizer, encoder):
    """The generator of a folder, which must have the sizes of `shape`. A new critic starts anew."""
    old = load_weights(folder, "generator", Generator, GeneratorConfig)
    check_fits(old.config, tokenizer, encoder)
    # A training may add a critic, or go on from ECGs to text.
    free = {key: getattr(old.config, key) for key in ("critic", "critic_depth", "condition")}
    if shape.condition == "none":
        # Nothing is encoded, so the width of Z is that of the old weights, whatever it was.
        shape = replace(shape, ecg_dim=old.config.ecg_dim)
    check_same(f"{folder}/generator.pt", old.config, replace(shape, **free))
    model = Generator(shape)
    # strict=False: the old weights know nothing of a critic that is new.
    model.load_state_dict(old.state_dict(), strict=False)
    return model


def compile_transformer(generator):
    """Compile the transformer of a generator, and of its critic, once for any number of leads."""
    for trunk in {generator, generator.critic_trunk}:
        graph = torch.compile(trunk.transform)

        def transform(tokens, masked, context, graph=graph):
            """Trunk.transform, compiled."""
            # The keys and values of Z are as many as the leads, which change from batch to batch.
            # What else depends on the leads is small, and stays outside of what is compiled.
            for keys, values in context.keys_values:
                torch._dynamo.mark_dynamic(keys, 2)
                torch._dynamo.mark_dynamic(values, 2)
            return graph(tokens, masked, context)
        trunk.transform = transform


# ---------------------------------------------------------------- losses

def masked_mean(loss, masked):
    """Eq. 7: the mean of the token losses, over the masked tokens of all ranks.

    DDP averages what the ranks return, so each divides by the mean number of masked tokens.
    """
    # Ranks mask different numbers of tokens. A mean of their means would weigh these unequally.
    total = masked.sum().float()
    if dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return (loss * masked).sum() / total                                    # Eq. 7


def auroc(score, positive):
    """Area under the ROC curve: how often a positive of (N,) scores higher than a negative one."""
    # The sum of the positives' ranks minus its smallest possible value (Mann and Whitney's U).
    rank = torch.empty_like(score)
    rank[score.argsort()] = torch.arange(1, len(score) + 1, device=score.device).float()
    positives = positive.sum()
    wins = rank[positive].sum() - positives * (positives + 1) / 2
    return wins / (positives * (len(score) - positives)).clamp(min=1)


def critic_loss(logits, fake, free):
    """Binary cross-entropy of the tokens that are not known, and its metrics for the log.

    logits, fake, free (B, T', h, w); free: all but the known latent frames.
    """
    bce = F.binary_cross_entropy_with_logits(logits, fake.float(), reduction="none")
    loss = masked_mean(bce, free)                                           # Eq. 10
    # Metrics for the log, without a gradient.
    logits = logits.detach()[free]
    fake = fake[free]
    accuracy = ((logits > 0) == fake).float().mean()
    return loss, {"critic_bce": loss, "critic_accuracy": accuracy,
                  "critic_auroc": auroc(logits, fake)}


def known_of(batch):
    """What a batch of the loader says of the ECG or text, as build_condition takes it."""
    names = "fps", "ecg", "leads", "ecg_start", "anchor_ecg", "text"
    known = {name: batch[name] for name in names if name in batch}
    if "ecg" in batch:
        # What is disturbed is under the ECG mask, in training as in sampling.
        known["ecg_hidden"] = batch["ecg_disturbed"]
    return known


def tokens_of(batch, tokenizer):
    """Tokens of the window (B, T', h, w) and of the anchor (B, h, w), encoded or cached."""
    if "tokens" in batch:
        return batch["tokens"], batch["anchor_tokens"]
    return tokenizer.encode(batch["video"]), tokenizer.encode(batch["anchor"])[:, 0]


def batch_loss(config, model, tokenizer, batch, num_prefix, samples):
    """Loss of one batch -> loss, {name: value} for the log. samples: of the ECG encoder, or 0.

    num_prefix (B,): the known latent frames of each clip, on the CPU.
    """
    # 1. The tokens of the window and of the anchor, and the random choices.
    tokens, anchor_tokens = tokens_of(batch, tokenizer)
    known_frames = num_prefix.to(tokens.device)                             # B
    choices = random_choices(config, batch["uniform"], known_frames, tokens, anchor_tokens, samples)
    masked = choices.masked

    # 2. Prefixes as sampling will have them.
    tokens = reencode_prefix(tokenizer, tokens, num_prefix, choices.fade)

    # 3. The loss of the masked tokens.
    known = known_of(batch) | dict(anchor=choices.anchor, drop=choices.drop)
    if "ecg" in batch:
        known["ecg_hidden"] = choices.ecg_hidden | batch["ecg_disturbed"]
    # Without these numbers the critic does not judge.
    uniforms = choices.critic_uniforms if config.critic != "none" else None
    result = model(tokens, masked, uniforms, **known)
    loss = masked_mean(result["token_loss"], masked)
    log = {"masked": masked.float().mean(), "token_loss": loss}

    # 4. The critic judges all tokens but the known ones.
    if config.critic != "none":
        frame = torch.arange(tokens.shape[1], device=tokens.device)[:, None, None]
        free = frame >= known_frames[:, None, None, None]
        bce, critic_log = critic_loss(result["critic_logits"], result["fake"],
                                      free.expand_as(masked))
        loss = loss + config.critic_weight * bce
        log |= critic_log
    return loss, log


# ---------------------------------------------------------------- this trainer

def to_device(batch, device):
    """A batch there. All its clips have the same leads, so they become (L,)."""
    moved = dict(batch)
    for name, value in batch.items():
        # A text is a list of lines and stays where it is.
        if torch.is_tensor(value):
            moved[name] = value.to(device, non_blocking=True)
    # Every clip of a batch brings the same leads: one row is enough.
    if "leads" in moved:
        moved["leads"] = moved["leads"][0]
    return moved


def with_wrong_ecg(batch):
    """The same clips, each with the ECG (or text) of the clip before it."""
    # Only the ECG's own entries move; video, tokens and masks stay.
    wrong = dict(batch)
    for name in ("ecg", "ecg_start", "ecg_disturbed", "anchor_ecg"):
        if name in wrong:
            wrong[name] = wrong[name].roll(1, 0)
    if "text" in wrong:
        wrong["text"] = [batch["text"][-1], *batch["text"][:-1]]
    return wrong


@torch.no_grad()
def evaluate(model, tokenizer, data, config, *, device, rank, world, items=64):
    """Validation losses with the right and a wrong ECG, knowing the first frame or half a clip."""
    ecgs = ("right", "wrong")
    if config.condition == "none":
        ecgs = ("none",)
    sums = {f"val_{known}_{ecg}": 0.0 for known in ("first", "prefix") for ecg in ecgs}
    # The same items each time, shared out over the ranks; every rank takes as many batches.
    num_batches = math.ceil(items / (config.batch * world))
    for k in range(num_batches):
        start = (k * world + rank) * config.batch
        clips = [data[n] for n in range(start, start + config.batch)]
        batch = to_device(torch.utils.data.default_collate(clips), device)
        tokens, anchor_tokens = tokens_of(batch, tokenizer)
        B, T, h, w = tokens.shape
        u = split_uniforms(batch["uniform"], T * h * w)
        for name, length in (("first", 1), ("prefix", T // 2)):
            # All clips know as many frames; the masks come from their own uniform numbers.
            num_prefix = torch.full((B,), length)
            known_frames = num_prefix.to(device)
            order = u["mask_order"].unflatten(1, (T, h * w))
            masked = random_token_mask(known_frames, u["mask_ratio"][:, 0], order)
            masked = masked.reshape(tokens.shape)
            # As in sampling, but without a fade, and always with an anchor.
            given = reencode_prefix(tokenizer, tokens, num_prefix)
            anchor = random_anchor(u["anchor"], anchor_tokens, known_frames, p=1)
            for ecg, shown in zip(ecgs, (batch, with_wrong_ecg(batch))):
                result = model(given, masked, anchor=anchor, **known_of(shown))
                loss = masked_mean(result["token_loss"], masked)
                sums[f"val_{name}_{ecg}"] += loss.item() / num_batches
    return all_mean(sums, device)


def cache_tokens(config, data, tokenizer, device):
    """Let RandomWindows give tokens in place of video; those of a set and tokenizer are kept."""
    if config.augment:
        raise UserError("--cache_tokens: with --augment no window is the same twice")
    if tokenizer.config.bits > 16:
        raise UserError(f"--cache_tokens keeps 16 bits a token, this tokenizer has "
                        f"{tokenizer.config.bits}")
    name = state_hash(tokenizer.state_dict())
    # The first process of a machine writes, the others wait for it.
    if first_of_node():
        write_tokens(data.clips, tokenizer, name, device)
    if dist.is_initialized():
        dist.barrier()
    open_tokens(data.clips, name)
    data.cached_tokens = True


def make_data(config, split, *, tokenizer, samples, group, is_train):
    """Random windows of a split; only those of the training are augmented."""
    num_tokens = tokenizer.latent_frames * tokenizer.grid ** 2

    # A set that is validated on is read as it is.
    augment_ecg = None
    augment_video = None
    p_drop_phrase = 0
    if is_train:
        augment_ecg = partial(augment_recorder_filter, p=config.p_recorder_filter)
        augment_video = random_view if config.augment else None
        p_drop_phrase = config.p_drop_phrase
    # None: the clips of the set need no text.
    if config.condition != "text":
        p_drop_phrase = None
    return RandomWindows(
        Clips(config.data, split), tokenizer.config.frames, ecg_samples=samples, clean=clean_ecg,
        find_disturbed=find_disturbed, group=group, seed=config.seed,
        uniforms=sum(uniform_sizes(num_tokens).values()), leads=config.leads,
        augment_ecg=augment_ecg, augment_video=augment_video, channels=tokenizer.config.channels,
        p_drop_phrase=p_drop_phrase, anchor_seconds=(config.ecg_before, config.ecg_after))


def main():
    """One training, from the flags to the weights on disk."""
    config = parse_flags(TrainConfig, PRESETS)
    check_training(config)
    if config.leads and config.condition != "ecg":
        raise UserError(f"--leads={config.leads}: --condition={config.condition} has no ECG")

    # ---- distributed and seed
    device, rank, world = init_distributed(config.seed)
    state_path = check_out(config, "generator")

    # ---- the models of the stages before; the tokenizer stays as it is, the encoder trains on
    tokenizer = load_weights(config.weights, "tokenizer", Tokenizer, TokenizerConfig)
    tokenizer = tokenizer.eval().to(device)
    encoder = make_encoder(config)
    # Without an ECG no samples are cut from the set.
    samples = encoder.config.samples if config.condition == "ecg" else 0

    # ---- data
    # A group is the batch of one step over all ranks; its clips share their leads.
    windows = partial(make_data, config, tokenizer=tokenizer, samples=samples,
                      group=config.batch * world)
    train = windows("train", is_train=True)
    val = windows("val", is_train=False)
    if config.cache_tokens:
        cache_tokens(config, train, tokenizer, device)

    # ---- model
    shape = fit_config(config, tokenizer, encoder)
    if config.init_from:
        model = start_from(config.init_from, shape, tokenizer, encoder)
    else:
        model = Generator(shape)
    raw = Stage2(encoder, model).to(device)
    if config.freeze_encoder and encoder is not None:
        encoder.requires_grad_(False)
    if rank == 0:
        print(f"{config}\n{parameter_count(raw):.2f}M parameters, "
              f"{parameter_count(raw.generator):.2f}M of them the generator's, "
              f"{len(train.clips)} clips, {device} x {world}")

    # ---- optimizer and EMA
    optimizer = torch.optim.AdamW(raw.parameters(), lr=config.lr, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)
    ema = copy.deepcopy(raw).eval()
    parts = {"model": raw, "ema": ema, "optimizer": optimizer}

    # ---- resume: all ranks start from the same step, with the same settings, clips and weights
    settings = run_settings(config, world, train.clips, tokenizer)
    step, seconds = resume(settings, state_path, parts)

    # ---- compile and DDP: `model` is called, `raw` holds its parameters
    if config.compile:
        compile_transformer(raw.generator)
    model = raw
    if dist.is_initialized():
        device_ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids)

    # ---- loop
    log = Log(config, "generator", rank)
    log.bar.update(step)
    loader = batches(train, config.batch, step * config.accumulate, rank, world, config.workers)
    began = time.time() - seconds
    results = {}
    for step in count(step):
        # schedule: the share of the training that is done, and the learning rate
        seconds = time.time() - began
        done, lr = schedule(config, step, seconds, device)

        # evaluate the EMA weights
        if step > 0 and (done >= 1 or step % config.eval_every == 0):
            results = evaluate(ema, tokenizer, val, config, device=device, rank=rank, world=world)
            results = log.write(step, **results)

        # save
        if first_of_node() and step > 0 and (done >= 1 or step % config.save_every == 0):
            save_weights(config.out, "generator", ema.generator, step)
            if encoder is not None:
                save_weights(config.out, f"{config.condition}_encoder", ema.encoder, step)
            save_state(state_path, parts, step=step, seconds=seconds, settings=settings)
        if done >= 1:
            break

        # accumulate the gradients of one or more batches; the ranks average them after the last
        for k in range(config.accumulate):
            batch = log.wait(loader)
            num_prefix = draw_num_prefix(config, batch, tokenizer)
            batch = to_device(batch, device)
            with gradient_sync(model, wanted=k == config.accumulate - 1):
                with bfloat16(device, config.bf16):
                    loss, values = batch_loss(config, model, tokenizer, batch, num_prefix, samples)
                (loss / config.accumulate).backward()

        # clip the gradient, step, EMA
        optimizer_step(config, raw, optimizer, lr=lr, step=step, clips=train.clips, batch=batch,
                       state_path=state_path)
        ema_update(config, ema, raw, step)

        # log
        if step % config.log_every == 0:
            values = all_mean({"loss": loss, **values}, device)
            num_leads = len(batch["leads"]) if samples else 0
            log.write(step, **values, lr=lr, seconds=seconds, **log.rate(step, config, world),
                      leads=num_leads)
            log.bar.set_postfix({"loss": f"{values['loss']:.3f}", **results})
        log.bar.update()

    # ---- teardown
    log.close(f"generator.pt: {step} steps, {seconds / 60:.1f} minutes, {results}")


if __name__ == "__main__":
    run_training(main)
