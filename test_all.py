"""Every test, on the CPU, offline: `python -m pytest test_all.py`. A docstring names the bug it catches."""
import copy
import csv
import gzip
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import imageio
from dataclasses import is_dataclass, replace

import numpy as np
import pytest
import scipy
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import ecg_encoder
import evaluate
import sample
import train_generator
import train_tokenizer
from common import checkpoint, picture, training
from common.flags import UserError, field_comments, parse_flags
from data import dicom_pixels
from data.dataset import (LEADS, UNTRACED, Clips, RandomWindows, as_video, batches, crop_or_pad,
                          random_affine_grid, random_shift_and_flip, random_view)
from data.ecg_files import READERS, read_ecg, read_recording
from data.ecg_signal import (augment_recorder_filter, clean_ecg, extend_periodic, find_disturbed,
                             find_r_peaks)
from data.ecg_times import fit_rate
from data.ecgsyn import RHYTHMS, ecg_of_beats, make_ecg, usual_systole
from data.frame_times import even_times, resample_frames
from data.screen_ecg import ScreenECG, erase_strip, read_screen_ecg
from data.screen_trace import Line, leave_out_text, take_back, trace_ecg
from data.writer import Writer, prepare
from ecg_encoder import EcgConfig, EcgEncoder, MaskedAutoencoder
from generator import (SCORERS, DecodingConfig, Generator, GeneratorConfig, build_condition,
                       classifier_free_guidance, compile_models, concat_unconditional, cosine_schedule,
                       draw_uniforms, halton_order, load_models, maskgit_decode, sample_categorical, stream_video)
from metrics import curves, ejection_fraction, frechet, image_quality, lv_segmenter, profiling, speed
from metrics.clip_ecg import AlignedEcg, aligned_ecg
from metrics.r_peak_table import ROWS, measure_row
from sources import (camus, dicom_cines, echonet_dynamic, echoxflow, mimic_iv_echo, short_axis_mri, video_ecg_folder,
                     video_folder)
from sources.phantom import PhantomConfig, list_jobs, make_clip
from tests import dicom_files, ecg_files, screen_cines, screen_table
from tests.numbered_clips import numbered
from tests import echoxflow_store as store
from tokenizer import (LFQ, Tokenizer, TokenizerConfig, add_lora, attend, bits_to_index,
                       index_to_bits, joint_code_probabilities, lora_state_dict, merge_lora, patchify)

HERE = Path(__file__).parent
WATCH = HERE.parent / "shared/real/ecg/apple_watch_digitized.csv"
GOLDEN = [2701, 5714, 486, 451, 5366, 1209, 4864, 6317]     # one row of tokens by the shipped weights
TINY = dict(dim=32, heads=2, mlp_dim=64)
SMALL = {"tokenizer": TINY | dict(depth_space=1, depth_time=1), "ecg_encoder": TINY | dict(depth=1),
         "generator": TINY | dict(depth=1, critic="self")}
TOKENIZER = "tokenizer", Tokenizer, TokenizerConfig
TRAINERS = {"tokenizer": train_tokenizer, "ecg_encoder": ecg_encoder, "generator": train_generator}
rng = lambda seed=0: torch.Generator().manual_seed(seed)
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def tiny():
    """Seeds every test. Untrained models; the branch of the local ECG, which starts at zero, has weight."""
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(**SMALL["generator"], ecg_dim=32))
    torch.nn.init.normal_(generator.local_out.weight)
    return SimpleNamespace(generator=generator, encoder=EcgEncoder(EcgConfig(**SMALL["ecg_encoder"])),
                           tokenizer=Tokenizer(TokenizerConfig(**SMALL["tokenizer"])).eval())


def ecg_condition(tiny, B=2, seed=0, start=-1.0, drop=None):
    """A condition from noise in place of an ECG."""
    return build_condition(
        tiny.generator.config, tiny.encoder, fps=torch.full((B,), 25.0),
        ecg=torch.randn(B, 1, 600, generator=rng(seed)), leads=torch.tensor([1]),
        ecg_start=torch.full((B,), start), drop=drop)


def overfit(model, loss, steps, lr):
    """Losses of AdamW on one batch, step by step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr), []
    for _ in range(steps):
        losses.append(loss())
        optimizer.zero_grad(), losses[-1].backward(), optimizer.step()
    return losses


def call(main, *args):
    """Run a script's main in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, args)])
        return main()


def run(*args, code=0):
    """Run python on args in the project's folder, as a process of its own; returns its stderr."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stderr


def refused(reason, function, *args):
    """function(*args) ends in the one line of a UserError that holds `reason`."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert reason in str(error.value) and "\n" not in str(error.value), args


# ---------------------------------------------------------------------------- tokenizer

def test_codes_to_indices_and_back():
    """A bit order that differs between two directions, or from that of the joint; a code out of the book."""
    index = torch.arange(2 ** 13)
    assert torch.equal(bits_to_index(index_to_bits(index, 13)), index)
    assert index_to_bits(torch.tensor(1), 13).tolist() == [1] + [-1] * 12         # bit 0 first
    assert torch.equal(joint_code_probabilities((index_to_bits(torch.arange(8), 3) > 0).float()), torch.eye(8))


def test_entropy_equals_brute_force():
    """The factorised entropies drift from the softmax over all codes that they stand for."""
    z = torch.randn(50, 13)
    found, p = LFQ(4, 13).entropies(z), (2 * z @ index_to_bits(torch.arange(8192), 13).T).softmax(1)  # N 2^13
    assert torch.allclose(found["entropy_sample"], -torch.special.xlogy(p, p).sum(1).mean(), atol=1e-4)
    assert torch.allclose(found["entropy_batch"], torch.special.entr(p.mean(0)).sum(), atol=1e-4)


@pytest.mark.parametrize("setting", [dict(bits=10), dict(bits=17), dict(bits=18, channels=3), dict(size=48),
                                     dict(frames=7, patch_t=3), dict(frames=1), dict(patch=16, channels=3)])
def test_other_sizes(setting):
    """A size, codebook or length that is a setting on paper only; a video of another size let in."""
    c = TokenizerConfig(**SMALL["tokenizer"] | setting)
    model, video = Tokenizer(c), torch.rand(2, c.channels, c.frames, c.size, c.size)
    reconstruction, index, losses = model(video)
    assert reconstruction.shape == video.shape
    assert index.shape == (2, model.latent_frames, model.grid, model.grid)
    assert index.max() < 2 ** c.bits and torch.equal(model.encode(video), index)
    assert torch.allclose(model.decode(index), reconstruction.clamp(0, 1), atol=1e-5)
    assert 0 < losses["entropy_batch"] < c.bits * np.log(2)
    refused("the video has", model.encode, torch.rand(2, 4 - c.channels, c.frames, c.size, c.size))
    refused("the video has", model.encode, torch.rand(2, c.channels, c.frames, c.size, c.size + 8))


def test_patchify_cuts_the_right_pixels():
    """Axes exchanged in the reshape: the picture is scrambled between places or between time and place."""
    video = torch.arange(2 * 3 * 4 * 16 * 16).reshape(2, 3, 4, 16, 16)
    patches = patchify(video, 2, 8)
    assert patches.shape == (2, 2, 4, 3 * 2 * 8 * 8)
    assert torch.equal(patches[1, 1, 2], video[1, :, 2:4, 8:16, 0:8].flatten())


def test_later_frames_cannot_change_earlier_tokens(tiny):
    """Missing causal mask or mixed-up axes in the temporal attention, of the encoder and of the decoder."""
    tokenizer, video = tiny.tokenizer, torch.rand(2, 1, 11, 64, 64)
    h, index = tokenizer.embed(video), tokenizer.encode(video)
    changed = tokenizer.embed(torch.cat([video[:, :, :9], torch.rand(2, 1, 2, 64, 64)], 2))
    assert torch.equal(h[:, :5], changed[:, :5]) and not torch.equal(h[:, 5], changed[:, 5])
    a, b = (tokenizer.decode(torch.cat([index[:, :5], index[:, 5:] ^ bit], 1)) for bit in (0, 1))
    assert torch.equal(a[:, :, :9], b[:, :, :9]) and not torch.equal(a[:, :, 9:], b[:, :, 9:])
    assert torch.equal(tokenizer.encode(video[:, :, :1]), index[:, :1])       # one frame is a clip, too


def test_tokenizer_overfits_one_batch(tiny):
    """A broken straight-through gradient or decoder: the loss of one batch would stay."""
    config = train_tokenizer.TrainConfig(**SMALL["tokenizer"])
    video = torch.nn.functional.interpolate(torch.rand(2, 1, 3, 8, 8), (3, 64, 64))
    def loss():
        reconstruction, _, lfq = tiny.tokenizer(video)
        errors.append((reconstruction - video).square().mean().item())
        return train_tokenizer.reconstruction_loss(config, video, reconstruction, None, None)[0] \
            + train_tokenizer.quantization_loss(config, lfq, 0)
    errors = []
    overfit(tiny.tokenizer, loss, 100, 3e-3)
    assert errors[-1] < 0.1 * errors[0]


def test_lora(tiny):
    """An adapter that changes the model before it has learned, trains its base too, or is lost in merging."""
    model, video = tiny.tokenizer, torch.rand(1, 1, 11, 64, 64)
    before, names, plain = model(video)[0], model.state_dict().keys(), copy.deepcopy(model)
    add_lora(model, rank=4)
    assert torch.equal(model(video)[0], before)
    assert all(n.endswith((".up", ".down")) == p.requires_grad for n, p in model.named_parameters())
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.05) if p.requires_grad else None
    adapted = model(video)[0]
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert merge_lora(copy.deepcopy(model)).keys() == names
    plain.load_state_dict(merge_lora(model))
    assert torch.allclose(plain(video)[0], adapted, atol=1e-5) and torch.equal(model(video)[0], adapted)
    demo = lora_state_dict(add_lora(Tokenizer(TokenizerConfig()), rank=16))
    assert 4 * sum(x.numel() for x in demo.values()) < 2e6                          # bytes


def test_discriminator(tiny):
    """A discriminator blind to the order of frames; Eq. 6 that does not level the two gradients."""
    video, judge, model = torch.rand(2, 1, 11, 64, 64), train_tokenizer.Discriminator(1), tiny.tokenizer
    assert not torch.allclose(judge(video).mean(), judge(video.flip(2)).mean(), atol=1e-5)
    config, reconstruction = train_tokenizer.TrainConfig(gan_weight=1), model(video)[0]
    loss = 50 * (reconstruction - video).square().mean()
    adversarial, parts = train_tokenizer.adversarial_loss(config, judge, reconstruction, loss, model)
    last = [*model.first_pixels.parameters(), *model.rest_pixels.parameters()]
    size = [torch.cat([g.flatten() for g in torch.autograd.grad(x, last, retain_graph=True)]).norm()
            for x in (loss, adversarial)]
    assert torch.allclose(*size, rtol=1e-3) and parts["adaptive_weight"] != 1
    judge.layers[-1].bias.data += 1
    better = train_tokenizer.adversarial_loss(config, judge, reconstruction, loss, model)[1]["adversarial"]
    assert better < parts["adversarial"] and not parts["adaptive_weight"].requires_grad
    hinge = train_tokenizer.discriminator_loss(config, judge, video, reconstruction)[1]
    assert hinge["verdict_real"] < 2 and judge.mean_verdict.abs().min() > 0         # LeCAM's averages move


def test_perceptual_loss(tmp_path):
    """Random weights under the name of VGG16, a layer left out, or frames compared with themselves."""
    widths, file = [3, 64, 64, 128, 128, 256, 256, 256] + [512] * 6, tmp_path / "vgg16.pth"
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]                      # torchvision's own
    saved = {f"features.{n}.{k}": v for n, a, b in zip(numbers, widths, widths[1:])
             for k, v in (("weight", torch.randn(b, a, 3, 3) / (4 * a) ** 0.5), ("bias", torch.zeros(b)))}
    torch.save(saved | {"classifier.0.bias": torch.zeros(4)}, file)
    vgg16, x = train_tokenizer.VGG16(str(file)), torch.rand(2, 1, 32, 32, requires_grad=True)
    assert [f.shape[1:3] for f in vgg16(x)] == [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]
    assert vgg16.distance(x, x) == 0 and vgg16.distance(x, torch.rand_like(x)) > 0.1
    vgg16.distance(x, torch.rand_like(x)).backward()
    assert x.grad.abs().min() > 0 and all(p.grad is None for p in vgg16.parameters())
    video, frame, config = torch.rand(2, 1, 3, 32, 32), torch.tensor([0, 2]), train_tokenizer.TrainConfig()
    (other := video.clone())[[0, 1], :, frame] = 0.5
    loss = lambda f: train_tokenizer.reconstruction_loss(config, video, other, vgg16, f)[1]["perceptual"]
    assert loss(frame) > 0.1 and loss(frame.flip(0)) == 0
    torch.save({"features.0.bias": torch.zeros(64)}, file)
    for path in (file, tmp_path / "missing.pth"):
        refused("--vgg16=", train_tokenizer.VGG16, str(path))


# ---------------------------------------------------------------------------- generator

def test_guidance(tiny):
    """Guidance that does nothing: s = 1 must be the conditional pass, the null context another one; a scale
    that is not the step's."""
    assert classifier_free_guidance(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), 3.0).tolist() == [[-3.0, -4.0]]
    generator, index = tiny.generator, torch.randint(0, 8192, (2, 6, 8, 8))
    masked, cond, drop = torch.rand(index.shape) < 0.5, ecg_condition(tiny), torch.ones(2, dtype=torch.bool)
    null = [generator.features(index, masked, ecg_condition(tiny, seed=s, drop=drop)) for s in (0, 1)]
    assert not torch.allclose(generator.features(index, masked, cond), null[0], atol=1e-3)
    assert torch.equal(*null)                                   # where nothing of the ECG is left
    alone, both = generator.context(cond), generator.guided_context(cond)
    long_way = generator.context(concat_unconditional(cond))
    twice = index.repeat(2, 1, 1, 1), masked.repeat(2, 1, 1, 1)
    assert torch.allclose(generator.transform(*twice, both), generator.transform(*twice, long_way), atol=1e-5)
    places, u = torch.arange(384).expand(2, -1), torch.rand(2, 2, 384)
    drawn = [generator.sample_tokens(index, places, context, u, guidance=s, temperature=1.0)[0]
             for s, context in ((None, alone), (1.0, both), (5.0, both))]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    scales = []
    generator.sample_tokens = lambda i, places, *a, guidance, **more: (scales.append(guidance),
                                                                       (places, places.float()))[1]
    for end in (0, 5):
        decoding = DecodingConfig(steps=3, guidance=1, guidance_end=end)
        maskgit_decode(generator, index, 0, cond, decoding, draw_uniforms(decoding, index, [rng()]))
    assert scales == [None, None, None, 1, 3, 5]


def test_high_bits_follow_low_bits(tiny):
    """A joint that is not the chain rule's: probabilities of all codes must sum to one."""
    generator, x = tiny.generator, torch.randn(1, 1, 32)
    high = generator.high_logits(x.expand(1, 128, 32), torch.arange(128)[None]).softmax(-1)[0]
    p = generator.to_low(x).softmax(-1)[0, 0, :, None] * high
    assert p.numel() == 8192 and abs(p.sum().item() - 1) < 1e-4


@pytest.mark.parametrize("steps, scorer", [(1, "random"), *((6, name) for name in SCORERS)])
def test_sampling_fills_all_and_keeps_the_known(tiny, steps, scorer):
    """A mask token left after the last step, or a known token overwritten."""
    index = torch.zeros(2, 6, 8, 8, dtype=torch.long)
    index[:, :2] = torch.randint(0, 8192, (2, 2, 8, 8))
    calls, sample_tokens = [], tiny.generator.sample_tokens
    tiny.generator.sample_tokens = lambda i, places, *a, **more: (calls.append(places.sort().values),
                                                                 sample_tokens(i, places, *a, **more))[1]
    decoding = DecodingConfig(steps, scorer, 1.5)
    out = maskgit_decode(tiny.generator, index.clone(), 2, ecg_condition(tiny), decoding,
                         draw_uniforms(decoding, index, [rng()]))
    # Two of six latent frames are known: four fifths of the steps
    assert torch.equal(out[:, :2], index[:, :2]) and len(calls) == {1: 1, 6: 5}[steps]
    assert (out[:, 2:] != 0).float().mean() > 0.99 and out.max() < 8192
    assert all(a.shape[1] > b.shape[1] for a, b in zip(calls, calls[1:]))           # fewer at every step
    assert calls[0].shape == (2, 256) and all(x.min() >= 128 and x.diff().min() > 0 for x in calls)


@pytest.mark.parametrize("scorer", SCORERS)
def test_decoding_does_not_wait_for_the_device(tiny, scorer):
    """A step that reads a value of a tensor, or whose shapes depend on one: a GPU would stand still. A tensor
    of the device "meta" has no values to read."""
    meta, generator, cond = torch.device("meta"), tiny.generator.to("meta"), ecg_condition(tiny)
    cond = cond._replace(**{name: x.to(meta) for name, x in cond._asdict().items()})
    decoding = DecodingConfig(3, scorer)
    tokens = torch.zeros(2, 6, 8, 8, dtype=torch.long, device=meta)
    out = maskgit_decode(generator, tokens, 2, cond, decoding, draw_uniforms(decoding, tokens, [rng()]))
    assert out.shape == (2, 6, 8, 8) and out.device == meta


def test_compiled_sampling_equals_eager(tiny):
    """Compiled parts that compute something else, or hold the result of another call."""
    def results(seed):
        torch.manual_seed(seed)
        cond, tokens = ecg_condition(tiny, seed=seed), torch.randint(0, 8192, (2, 6, 8, 8))
        context = tiny.generator.guided_context(cond)
        masked = torch.rand(tokens.shape) < 0.5
        features = tiny.generator.transform(tokens.repeat(2, 1, 1, 1), masked.repeat(2, 1, 1, 1), context)
        return cond.z, features, tiny.tokenizer.decode(tokens)
    with torch.no_grad():
        eager = [*results(0), *results(1)]
        for _ in range(2):                                                      # the second time: nothing to do
            compile_models(tiny.tokenizer, tiny.encoder, tiny.generator)
        compiled = [*results(0), *results(1)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(eager, compiled))
    assert not torch.allclose(compiled[1], compiled[4], atol=1e-2)


def test_halton_order_is_even():
    """An order that leaves holes: each eighth of the turns must reach each frame, row and column."""
    turn = halton_order(6, 8, 8, torch.device("cpu")).reshape(6, 8, 8)
    assert torch.equal(turn.flatten().sort()[0], torch.arange(384))
    for eighth in range(8):
        for at in (turn // 48 == eighth).nonzero().T:
            assert at.bincount().min() > 0 and at.bincount().max() < 15


@pytest.mark.parametrize("critic", ["self", "token"])
def test_critic(tiny, critic):
    """Labels that are wrong where a draw hits the real token; a gradient from critic to generator; no ECG."""
    u, logits = torch.rand(200_000), torch.tensor([0.0, 1.0, -1.0])
    share = sample_categorical(logits.expand(1, 200_000, 3), u[None])[0].bincount() / 200_000
    assert torch.allclose(share, logits.softmax(0), atol=0.01)
    generator = Generator(GeneratorConfig(**SMALL["generator"] | dict(critic=critic, ecg_dim=32)))
    index, cond = torch.randint(0, 8192, (2, 6, 8, 8)), ecg_condition(tiny)
    masked, u = torch.rand(index.shape) < 0.5, torch.rand(2, 2, 384)
    features = generator.features(index, masked, cond)
    loss, judged = generator.token_loss(features, index), generator.critic_input(features, index, masked, u)
    assert torch.equal(loss, generator(index, masked, cond)) and torch.equal(judged[~masked], index[~masked])
    assert (judged != index)[masked].float().mean() > 0.99
    torch.nn.init.zeros_(generator.to_low.weight), torch.nn.init.zeros_(generator.to_high.weight)
    with torch.no_grad():
        generator.to_low.bias[5], generator.to_high.bias[2] = 99, 99
    sure = generator.critic_input(features, torch.full_like(index, 5 + (2 << 7)), masked, u)
    assert (sure == 5 + (2 << 7)).all()                         # drawn, and still the real token
    score = generator.critic_logits(judged, cond)
    score.sum().backward()
    assert score.shape == index.shape and generator.to_low.weight.grad is None
    assert (generator.blocks[0].attn.q.weight.grad is None) == (critic == "token")
    positive = torch.rand(50) < 0.3
    score = torch.randn(50) + positive
    wins = (score[positive][:, None] > score[~positive]).float().mean()
    assert train_generator.auroc(score, positive) == pytest.approx(wins.item(), abs=1e-5)


def test_time_alignment(tiny):
    """A latent frame that does not know its part of the ECG: only a start moved alone may change it."""
    generator, index = tiny.generator, torch.randint(0, 8192, (1, 6, 8, 8))
    cond, late = ecg_condition(tiny, 1), ecg_condition(tiny, 1, start=-1.1)
    times, masked = generator.frame_times(cond.fps), torch.ones_like(index, dtype=torch.bool)
    assert times[0].tolist() == pytest.approx([0, .06, .14, .22, .30, .38])
    moved = late._replace(ecg=torch.roll(cond.ecg, 25, -1))                        # 0.1 s later in the array
    a, b, c = (generator.local_ecg(x, times)[0] for x in (cond, moved, late))
    assert torch.allclose(a[..., 50:-50], b[..., 50:-50]) and not torch.allclose(a, c)
    a, b = (generator.features(index, masked, cond._replace(ecg_start=x.ecg_start)) for x in (cond, late))
    assert not torch.allclose(a, b, atol=1e-3)


def test_hidden_ecg(tiny):
    """A hidden span that still reaches the tokens, by either way; hiding that changes nothing; a way that is
    shut off and is not."""
    generator, index = tiny.generator, torch.randint(0, 8192, (1, 6, 8, 8))
    hidden = train_generator.random_ecg_mask(torch.tensor([[0.1, 0.5, 0.4], [0.3, 0.5, 0.4]]), 600, p=0.2)
    assert hidden.sum(1).tolist() == [165, 0] and hidden[0, 158:323].all()
    ecg = torch.randn(2, 1, 2, 600)
    other = torch.where(hidden[:1, None], ecg[0], ecg[1])       # as the first, but for the hidden span

    def features(ecg, hidden, align="both"):
        generator.config.align = align
        cond = build_condition(generator.config, tiny.encoder, ecg=ecg, leads=torch.arange(2),
                               ecg_start=torch.tensor([-0.98]), fps=torch.tensor([25.]), ecg_hidden=hidden)
        return generator.features(index, torch.ones_like(index, dtype=torch.bool), cond)
    whole, a, b = features(ecg[0], None), features(ecg[0], hidden[:1]), features(ecg[1], hidden[:1])
    assert torch.equal(a, features(torch.where(hidden[:1, None], 9., ecg[0]), hidden[:1]))
    assert not torch.allclose(a, whole, atol=1e-3) and not torch.allclose(a, b, atol=1e-3)
    for align in ("local", "cross"):
        assert not torch.allclose(features(other, None, align), features(ecg[0], None, align), atol=1e-4)
        assert not torch.allclose(features(other, None, align), features(other, None), atol=1e-4)
    generator.config.align = "both"


def test_masks():
    """Known frames masked, or a share that is not the cosine schedule's."""
    config, noise = train_generator.TrainConfig(), torch.rand(400, 3 + 6 * 64)
    order = noise[:, 3:].unflatten(1, (6, 64))
    num_prefix = train_generator.random_num_prefix(config, noise[:, 0], noise[:, 2], 6)
    masked = train_generator.random_token_mask(num_prefix, noise[:, 1], order).any(-1)      # B T
    assert masked.any(-1).all() and abs(masked[:, 0].float().mean() - 0.15) < 0.06  # 15 %: nothing known
    one = torch.ones_like(num_prefix)
    share = train_generator.random_token_mask(one, noise[:, 1], order).float().mean((1, 2)) * 6 / 5
    assert torch.allclose(share, cosine_schedule(noise[:, 1]), atol=0.01)


def test_prefixes_are_as_sampling_has_them(tiny):
    """Training on prefixes cleaner than sampling's own, which fades; or other tokens changed with them."""
    index = tiny.tokenizer.encode(torch.rand(4, 1, 11, 64, 64))
    again = tiny.tokenizer.encode(tiny.tokenizer.decode(index))
    found = train_generator.reencode_prefix(tiny.tokenizer, index, torch.tensor([0, 1, 2, 5]))
    assert torch.equal(found[:2], index[:2]) and not torch.equal(again, index)
    assert all(torch.equal(found[i], torch.cat([again[i, :n], index[i, n:]])) for i, n in ((2, 2), (3, 5)))


def test_anchor(tiny):
    """A later window that does not see the first frame, or takes it for a frame of its own; an anchor in a
    first window; a fade that reaches the target or clips that are not to have it."""
    generator, index, cond = tiny.generator, torch.randint(0, 8192, (2, 6, 8, 8)), ecg_condition(tiny)
    masked, anchor = torch.ones_like(index, dtype=torch.bool), torch.randint(0, 8192, (2, 8, 8))
    ecg = torch.randn(2, 1, generator.local_samples)
    none, seen, late = (generator.features(index, masked, cond._replace(anchor=a, anchor_ecg=e))
                        for a, e in ((cond.anchor, ecg), (anchor, ecg), (anchor, ecg.roll(40, -1))))
    assert not torch.allclose(late, seen, atol=1e-4)
    assert none.shape == seen.shape and not torch.allclose(none, seen, atol=1e-3)
    known, noise = torch.tensor([0, 1, 2, 5]), torch.tensor([[0.1], [0.1], [0.95], [0.1]])
    chosen = train_generator.random_anchor(noise, torch.ones(4, 8, 8, dtype=torch.long), known, 0.9)
    assert chosen.amin((1, 2)).tolist() == [-1, -1, -1, 1]
    fade = train_generator.random_fade(torch.cat([torch.tensor([[0.1], [0.9]]), torch.rand(2, 16)], 1), 0.5)
    assert fade[0].min() >= 0.5 and fade[0].max() <= 1.2 and fade[0].std() > 0.05 and (fade[1] == 1).all()
    index = tiny.tokenizer.encode(torch.rand(2, 1, 11, 64, 64))
    a, b = (train_generator.reencode_prefix(tiny.tokenizer, index, torch.tensor([3, 3]), x) for x in (None, fade))
    assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(b[:, 3:], index[:, 3:])


@pytest.mark.parametrize("n, m", [(1100, 1100), (1100, 37), (300, 300)])
def test_attention_in_bfloat16(n, m):
    """Products of a long sequence that mix up heads or positions, or that leave out the scale; gradients of them."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, size, 16, generator=rng).requires_grad_() for size in (n, m, m))
    y = attend(*[x.bfloat16() for x in (q, k, v)], causal=False).float()
    true = torch.softmax(q @ k.mT / 4, -1) @ v
    assert (y - true).norm() < 0.02 * true.norm()
    for a, b in zip(torch.autograd.grad(y.square().sum(), (q, k, v)), torch.autograd.grad(true.square().sum(), (q, k, v))):
        assert (a - b).norm() < 0.03 * b.norm()


def test_generator_overfits_one_batch(tiny):
    """Logits that do not reach the loss, or a target that is not the token itself."""
    torch.nn.init.zeros_(tiny.generator.local_out.weight)                        # as training starts
    index = torch.randint(0, 8192, (1, 6, 8, 8))
    masked, cond = torch.rand(index.shape) < 0.3, ecg_condition(tiny, 1)
    cond = cond._replace(z=cond.z.detach())
    loss = lambda: train_generator.masked_mean(tiny.generator(index, masked, cond), masked)
    losses = overfit(tiny.generator, loss, 80, 1e-2)
    assert losses[0] > 8 and losses[-1] < 2


def test_stream_has_every_frame_once(tiny):
    """A chunk too long or missing between two windows; a different video for the same seed."""
    ecg = np.random.default_rng(0).standard_normal((1, 1, 1000)).astype(np.float32)
    models = tiny.tokenizer, tiny.encoder, tiny.generator
    stream = lambda n: torch.cat([*stream_video(
        *models, ecg=ecg, leads=[1], ecg_start=0.0, frames=n, fps=25,
        decoding=DecodingConfig(steps=2, guidance=1))], 2)
    a, b, c = stream(30), stream(30), stream(12)
    assert a.shape == (1, 1, 30, 64, 64) and torch.equal(a, b) and torch.equal(a[:, :, :12], c)


# ---------------------------------------------------------------------------- training

def train_flags(stage, data, weights, out):
    """The command line of a tiny training."""
    more = dict(weights=weights) if stage == "generator" else {}
    return [f"--{k}={v}" for k, v in (SMALL[stage] | dict(data=data, out=out, batch=4) | more).items()]


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A small prepared set, made by the command of the README."""
    out = tmp_path_factory.mktemp("datasets") / "phantom"
    run("-m", "sources.phantom", f"--out={out}", "--clips=6", "--val=4", "--test=2", "--frames=32",
        "--any_fps=0.34")
    return out


@pytest.fixture(scope="session")
def weights(phantom, tmp_path_factory):
    """A folder of tiny weights of all stages, each by the smallest real run of its script."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in SMALL:
        call(TRAINERS[stage].main, *train_flags(stage, phantom, out, out), "--steps=4")
    call(lv_segmenter.main, f"--data={phantom}", f"--weights={out}", f"--out={out}", "--steps=4")
    return out


def result(out, stage):
    """{step: [loss, adaptive weight]} of a training's log, and its last state."""
    lines = map(json.loads, (out / f"{stage}.jsonl").read_text().splitlines())
    losses = {x["step"]: [x["loss"], x.get("adaptive_weight", 0)] for x in lines if "loss" in x}
    return losses, torch.load(out / f"{stage}_state.pt")


ADVERSARIAL = ["--gan_weight=1", "--gan_warmup=0.3", "--lecam_weight=1"]


@pytest.mark.parametrize("stage", TRAINERS)
def test_resumed_equals_uninterrupted(stage, phantom, weights, tmp_path, monkeypatch):
    """State that --resume forgets (optimizer, EMA, place in the data): later losses differ in a last bit."""
    more = {"tokenizer": [*ADVERSARIAL, "--accumulate=2"], "generator": ["--accumulate=2"]}.get(stage, [])

    def train(name, *extra, stop=None):
        monkeypatch.setattr(TRAINERS[stage], "batches", lambda *args: islice(batches(*args), stop))
        call(TRAINERS[stage].main, *train_flags(stage, phantom, weights, tmp_path / name), "--steps=6",
             "--log_every=1", "--save_every=3", "--batch=2", *more, *extra)
    train("whole")
    with pytest.raises(StopIteration):                          # a crash two steps after the last save
        train("cut", stop=9 if more else 5)
    train("cut", "--resume")
    (losses, a), (resumed, b) = (result(tmp_path / name, stage) for name in ("whole", "cut"))
    assert losses == resumed and len(losses) == a["step"] == b["step"] == 6
    assert all(torch.equal(a[k][w], b[k][w]) for k in ("model", "ema") for w in a[k])


def test_generator_of_video_alone(weights, tmp_path):
    """--condition=none that still asks for an ECG, learns nothing, or cannot sample."""
    run("-m", "sources.short_axis_mri", f"--out={tmp_path / 'set'}", "--clips=4", "--val=4", "--test=1")
    clip = short_axis_mri.make_clip(("", (0, 0, 1)))
    assert (Clips(tmp_path / "set", "train").per_frame("video", 1) == clip["video"]).all()
    assert np.ptp(clip["mask"].sum((1, 2))) > 0.1 * clip["mask"][0].sum() > 10
    flags = train_flags("generator", tmp_path / "set", weights, tmp_path)
    call(train_generator.main, *flags, "--condition=none", "--steps=60", "--warmup=1", "--lr=3e-3",
         "--log_every=1", "--p_no_prefix=1", "--p_prefix=0")
    losses = [loss for loss, _ in result(tmp_path, "generator")[0].values()]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]) and not (tmp_path / "ecg_encoder.pt").exists()
    shutil.copy(weights / "tokenizer.pt", tmp_path)
    call(sample.main, f"--weights={tmp_path}", f"--out={tmp_path / 'out'}", "--frames=12", "--steps=2")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert np.load(tmp_path / "out/sample.npy").shape == (12, 64, 64, 1) and report["lv_area"] == []
    refused("without an ECG", call, sample.main, f"--weights={tmp_path}", "--shift_ms=200")


def test_text(phantom, weights, tmp_path, monkeypatch):
    """--condition=text that learns nothing of the text, forgets the encoder, or breaks without transformers;
    two views that are one."""
    flags = train_flags("generator", phantom, weights, tmp_path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        refused("pip install transformers", call, train_generator.main, *flags, "--condition=text")
    views = [make_clip(3, frames=2, view=view)["video"] for view in ("A4C", "A2C")]
    assert (views[0] == make_clip(3, frames=2)["video"]).all() and (views[0] != views[1]).mean() > 0.1
    pytest.importorskip("transformers")
    call(train_generator.main, *flags, "--condition=text", "--steps=8", "--init_from=" + str(weights))
    for name in ("tokenizer", "segmenter"):
        shutil.copy(weights / f"{name}.pt", tmp_path)
    tokenizer, encoder, generator = load_models(tmp_path, "cpu")
    z, nothing = encoder(["A4C view, EF 30", "A2C"])
    assert nothing.sum(1).tolist() == [0, 12] and z.shape == (2, 16, 32)
    assert torch.allclose(encoder(["A2C"])[0][0], z[1, :4], atol=1e-5)         # padding does not count
    index = torch.zeros(2, 6, 8, 8, dtype=torch.long)
    told = build_condition(generator.config, encoder, fps=torch.full((2,), 25.0),
                           text=["A4C view, EF 30", "A2C"])
    a, b = generator.features(index, index == 0, told)
    assert not torch.allclose(a, b, atol=1e-5)
    item = RandomWindows(Clips(phantom, "train"), 11, p_drop_phrase=0.5)
    said = {item[n]["text"] for n in range(20)}
    assert any("EF" in x and "A4C" not in x for x in said) and any("A4C" in x and "EF" not in x for x in said)
    out = f"--out={tmp_path / 'out'}"
    refused("trained with text", call, sample.main, f"--weights={tmp_path}", out)
    call(sample.main, f"--weights={tmp_path}", out, "--text=A4C view, EF 30", "--frames=12", "--steps=1")
    assert np.load(tmp_path / "out/sample.npy").shape == (12, 64, 64, 1)
    call(evaluate.main, "ef", f"--data={phantom}", f"--weights={tmp_path}", out, "--frames=12", "--steps=1")
    refused("--conditions", call, evaluate.main, "sync", f"--data={phantom}", out, "--conditions=flat,cut")
    refused("without an ECG", call, evaluate.main, "sync", f"--data={phantom}", f"--weights={tmp_path}", out)


def test_frozen_encoder(phantom, weights, tmp_path):
    """An encoder that is trained nevertheless, or one that never is."""
    trained = {}
    for flag in ("--freeze_encoder", "--freeze_encoder=0"):
        call(train_generator.main, *train_flags("generator", phantom, weights, out := tmp_path / flag),
             "--steps=12", flag)
        before, after = (checkpoint.read_file(x / "ecg_encoder.pt")["model"] for x in (weights, out))
        trained[flag] = any(not torch.equal(before[k], after[k]) for k in before)
    assert trained == {"--freeze_encoder": False, "--freeze_encoder=0": True}
    for bad in ("--align=both_ways", "--condition=words", "--critic=two"):
        refused("choose one of", call, train_generator.main,
                *train_flags("generator", phantom, weights, tmp_path), bad)


def test_cached_tokens_equal_fresh(phantom, weights, tmp_path):
    """Tokens of another window or frame than the training draws, or a cache that is made again at each start."""
    shutil.copytree(phantom, data := tmp_path / "set")
    losses, kept = {}, {}
    for name, *more in ("fresh",), ("first", "--cache_tokens"), ("second", "--cache_tokens"):
        call(train_generator.main, *train_flags("generator", data, weights, tmp_path / name), "--bf16=0", "--steps=3",
             "--log_every=1", *more)
        losses[name] = result(tmp_path / name, "generator")[0]
        files = {path: path.stat().st_mtime_ns for path in data.glob("train/tokens_*.npy")}
        assert len(files) == (name != "fresh") and (name != "second" or files == kept)
        kept = files
    assert losses["fresh"] == losses["first"] == losses["second"]
    flags = train_flags("generator", data, weights, tmp_path / "bad")
    refused("no window is the same twice", call, train_generator.main, *flags, "--cache_tokens", "--augment")
    wide = SimpleNamespace(config=SimpleNamespace(bits=17))
    refused("16 bits", train_generator.cache_tokens, SimpleNamespace(augment=False), None, wide, None)
    path, = kept
    path.write_bytes(path.read_bytes()[:-9000])
    refused("remove it", call, train_generator.main, *flags, "--cache_tokens")


@pytest.mark.parametrize("stage", TRAINERS)
def test_two_ranks_equal_one_process(stage, phantom, weights, tmp_path):
    """Entropy or masked mean not over all ranks, the same data on both ranks, or gradients not averaged."""
    more = {"tokenizer": ["--bf16=0", "--entropy_weight=1", "--accumulate=2", *ADVERSARIAL],
            "generator": ["--bf16=0", "--accumulate=2"]}
    flags = ["--steps=4", "--warmup=1", "--log_every=1", *more.get(stage, [])]
    call(TRAINERS[stage].main, *train_flags(stage, phantom, weights, tmp_path / "one"), *flags)
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAINERS[stage].__file__,
        *train_flags(stage, phantom, weights, tmp_path / "two"), *flags, "--batch=2")
    (losses, one), (halves, two) = (result(tmp_path / name, stage) for name in ("one", "two"))
    for name in {"model", "discriminator"} & one.keys():
        a, b = (torch.cat([v.flatten().float() for v in state[name].values()]) for state in (one, two))
        assert (a - b).norm() < 1e-3 * a.norm(), name
    assert all(halves[step] == pytest.approx(losses[step], rel=2e-4) for step in (0, 2))


def free_port():
    """A port that no one listens to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_gradients_are_averaged_once_a_step(stage, phantom, weights, tmp_path, monkeypatch):
    """DDP that sends its gradients after each of the accumulated batches."""
    class CountedDDP(DistributedDataParallel):
        sent = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, self.count)

        @staticmethod
        def count(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            CountedDDP.sent += bucket.is_last()
            return allreduce_hook(state, bucket)

    monkeypatch.setattr(TRAINERS[stage], "DistributedDataParallel", CountedDDP)
    monkeypatch.setattr(TRAINERS[stage], "evaluate", lambda *args, **kwargs: {})
    group = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    try:
        call(TRAINERS[stage].main, *train_flags(stage, phantom, weights, tmp_path), "--steps=2", "--batch=1",
             "--accumulate=3")
    finally:
        dist.destroy_process_group()
    assert CountedDDP.sent == 2


def two_nodes(stage, *args, own, kill=None):
    """A training as two nodes of one process run it, without torchrun: (exit code, stderr) of both.

    own: more flags of each. kill: the second is killed as soon as this file is there.
    """
    env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, TRAINERS[stage].__file__, *args, *own[k]], env=env | {"RANK": str(k)},
                              text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for k in range(2)]
    if kill:
        while not kill.exists() and ranks[1].poll() is None:
            time.sleep(0.05)
        ranks[1].kill()
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    return [(rank.returncode, error) for rank, error in zip(ranks, errors)]


def test_two_nodes_without_a_shared_disk(phantom, weights, tmp_path):
    """Nodes that start from different steps, take other settings, or wait for a rank that is gone."""
    flags = [*train_flags("ecg_encoder", phantom, weights, ""), "--batch=2", "--log_every=1", "--save_every=2"]
    own = [f"--out={tmp_path / 'a'}"], [f"--out={tmp_path / 'b'}"]
    files = [tmp_path / name / "ecg_encoder_state.pt" for name in "ab"]

    # 1. The second is killed, once it has saved: the first ends with one line, and no traceback.
    (code, error), (killed, _) = two_nodes("ecg_encoder", *flags, "--steps=10000", own=own, kill=files[1])
    assert (code, killed) == (2, -9) and "Traceback" not in error
    assert re.search(r"ecg_encoder.py: rank 0 lost another rank \(.*start all again with --resume\n", error), error

    # 2. The first has lost its state: it gets that of the other.
    files[0].unlink()
    step = torch.load(files[1])["step"]
    flags.append("--resume")
    ends = two_nodes("ecg_encoder", *flags, f"--steps={step + 2}", own=own)
    assert [code for code, _ in ends] == [0, 0], ends
    a, b = map(torch.load, files)
    assert a["step"] == b["step"] == step + 2
    assert all(torch.equal(a[k][w], b[k][w]) for k in ("model", "ema") for w in a[k])

    # 3. Another setting than the one that is saved.
    for code, error in two_nodes("ecg_encoder", *flags, "--lr=2", own=own):
        lines = [line for line in error.splitlines() if "it/s" not in line]
        assert code == 2 and len(lines) == 1 and "lr=0.001, now it is lr=2.0" in lines[0], error


def test_ranks_that_differ(monkeypatch):
    """A rank that was started with another setting, set or weights than the others."""
    parts = {"model": torch.nn.Linear(2, 2)}
    for name, differs in ("lr", True), ("clips", True), ("first weights", True), ("data", False), ("workers", False):
        with monkeypatch.context() as patch:
            patch.setattr(training, "gather", lambda x: [x, x | {name: "other"}] if isinstance(x, dict) else [x])
            settings = dict(lr=1e-3, clips="6 (1a2b)", data="here", workers=0)
            if differs:
                refused(f"rank 1 was started with {name}=other, rank 0", training.check_ranks_agree, settings, parts)
            else:
                training.check_ranks_agree(settings, parts)


@pytest.mark.parametrize("stage", TRAINERS)
def test_resume_with_other_settings(stage, phantom, weights, tmp_path, monkeypatch):
    """--resume that takes another setting without a word, or refuses one that may change."""
    monkeypatch.setattr(TRAINERS[stage], "evaluate", lambda *args, **kwargs: {}, raising=False)
    out = shutil.copytree(weights, tmp_path / "out")
    flags = [*train_flags(stage, phantom, weights, out), "--resume"]
    resumed = lambda *more: call(TRAINERS[stage].main, *flags, "--steps=4", *more)
    depth = "depth_space" if stage == "tokenizer" else "depth"
    for flag, old, new in (("dim", 32, 64), (depth, 1, 2), ("lr", 0.001, 0.5), ("seed", 0, 1), ("batch", 4, 2)):
        refused(f"was saved with {flag}={old}, now it is {flag}={new}", resumed, f"--{flag}={new}")
    refused("lr=0.001, now it is lr=2.0; with seed=0, now it is seed=3", resumed, "--lr=2", "--seed=3")
    few = shutil.copytree(phantom, tmp_path / "few")
    table = few / "train/clips.csv"
    table.write_text("".join(table.read_text().splitlines(True)[:-1]))
    refused("was saved with clips=6 (", resumed, f"--data={few}")
    resumed(f"--data={shutil.copytree(phantom, tmp_path / 'moved')}", "--minutes=9", "--workers=1", "--log_every=7")

    # A state of an older version has no settings.
    state = torch.load(out / f"{stage}_state.pt")
    del state["settings"]
    torch.save(state, out / f"{stage}_state.pt")
    resumed("--lr=2")


def test_one_process_only(phantom, tmp_path, monkeypatch):
    """Two processes of torchrun that write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "out"
    refused("runs in one process", call, lv_segmenter.main, f"--data={phantom}", f"--out={out}")
    refused("runs in one process", call, short_axis_mri.main, f"--out={out}", "--clips=1")
    refused("runs in one process", prepare, out, {}, {}, None)              # every source calls it
    assert not list(tmp_path.iterdir())


def test_validation_of_many_ranks(phantom, weights):
    """A rank without a batch where ranks x batch are more than the items: its peers would wait for it."""
    tokenizer = checkpoint.load_weights(weights, *TOKENIZER).eval()
    data = train_tokenizer.make_data(train_tokenizer.TrainConfig(data=str(phantom)), "val")
    one, last = (train_tokenizer.evaluate(tokenizer, data, 2, device="cpu", rank=rank, world=world, items=4)
                 for rank, world in ((0, 1), (7, 8)))
    assert last["val_mse"] == pytest.approx(one["val_mse"], rel=0.5) and last["val_codes"] > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_equals_eager(phantom, tmp_path):
    """A graph that torch.compile cannot build, or one that Eq. 6 cannot ask twice for a gradient."""
    for name, *flag in ("eager",), ("compiled", "--compile"):
        call(train_tokenizer.main, *train_flags("tokenizer", phantom, "", tmp_path / name), "--steps=2",
             "--log_every=1", "--warmup=1", "--bf16=0", *ADVERSARIAL, "--gan_warmup=0", *flag)
    (losses, _), (compiled, _) = (result(tmp_path / name, "tokenizer") for name in ("eager", "compiled"))
    assert all(compiled[step] == pytest.approx(losses[step], rel=1e-3) for step in (0, 1))


def test_domain_transfer(phantom, weights, tmp_path, capfd):
    """Adapters that do not give the merged weights; a decoder trained alone whose encoder moves with it."""
    def train(name, *flags):
        call(train_tokenizer.main, *train_flags("tokenizer", phantom, "", tmp_path / name), "--steps=3",
             f"--init_from={weights}", "--warmup=1", "--save_every=1", *flags)
        return torch.load(tmp_path / name / "tokenizer.pt")
    base, merged = torch.load(weights / "tokenizer.pt")["model"], train("lora", "--lora_rank=2")
    saved = torch.load(tmp_path / "lora/tokenizer_lora.pt")
    model = Tokenizer(TokenizerConfig(**SMALL["tokenizer"]))
    model.load_state_dict(base)
    add_lora(model, saved["rank"]).load_state_dict(saved["model"], strict=False)
    assert all(torch.allclose(merge_lora(model)[k], v, atol=1e-6) for k, v in merged["model"].items())
    assert any(not torch.equal(base[k], v) for k, v in merged["model"].items())
    after = train("decoder", "--decoder_only", *ADVERSARIAL)
    kept = {k for k in base if torch.equal(base[k], after["model"][k])}
    assert kept == {k for k in base if re.match("embed|spatial_position|encode|lfq.project_in", k)}
    assert after["losses"] == "mse commitment entropy adversarial"
    assert "no perceptual loss" in capfd.readouterr().out
    fresh = [f"--data={phantom}", f"--out={tmp_path / 'fresh'}"]
    refused("pass --init_from", call, train_tokenizer.main, *fresh, "--lora_rank=2")
    refused("not finite; last batch: train00", train, "nan", "--mse_weight=1e38")
    refused("--vgg16=none: no VGG16", call, train_tokenizer.main, *fresh, "--vgg16=none")
    assert not (tmp_path / "fresh").exists()
    refused("the video has 1 x 11 x 64 x 64", call, train_tokenizer.main, *fresh, "--size=96")


def test_checkpoint_cut_in_half_is_refused(weights, tmp_path):
    """A damaged or foreign file of weights that ends in a traceback."""
    whole, foreign = ((weights / f"{stage}.pt").read_bytes() for stage in ("tokenizer", "generator"))
    for content, reason in ((whole[:len(whole) // 2], "damaged"), (foreign, "holds no tokenizer")):
        (tmp_path / "tokenizer.pt").write_bytes(content)
        refused(reason, checkpoint.load_weights, tmp_path, *TOKENIZER)
    refused("dim=32, the flags say 128", checkpoint.load_weights, weights, *TOKENIZER, TokenizerConfig())


# ---------------------------------------------------------------------------- data

def test_prepared_set(phantom):
    """A reader that mixes up clips, or a window whose ECG is not of its own time span."""
    clips = Clips(phantom, "train")
    assert len(clips) == 6 and clips.leads == list(LEADS) and clips.meta["ecg_hz"] == 250
    item, again = (RandomWindows(clips, 11, ecg_samples=600, clean=lambda x: x, seed=3)[5] for _ in range(2))
    assert all(torch.equal(torch.as_tensor(item[k]), torch.as_tensor(again[k])) for k in item)
    i, row, whole = item["clip"], clips[item["clip"]], clips.per_frame("video", item["clip"])
    video = (item["video"] * 255).round().byte().permute(1, 2, 3, 0).numpy()
    start, = [s for s in range(len(whole) - 10) if np.array_equal(whole[s:s + 11], video)]
    first = round((item["ecg_start"] + start / 25 - row["ecg_offset_s"]) * 250)
    assert np.array_equal(item["ecg"][0].numpy(), crop_or_pad(clips.ecg(i), first, 600)[item["leads"][0]])
    assert item["ecg_start"] < 0 < item["ecg_start"] + 600 / 250 - 10 / 25         # what lies around it, too
    colour = RandomWindows(clips, 11, seed=3, channels=3)[5]["video"]              # grey and colour are one
    assert colour.shape == (3, 11, 64, 64) and torch.equal(colour[2], item["video"][0])
    darker = RandomWindows(clips, 11, seed=3, augment_video=lambda x, rng: x // 2,
                           anchor_seconds=(0.8, 0.4))[5]
    assert darker["video"].shape[1] == 11 and darker["anchor"].shape == (1, 1, 64, 64)
    assert 0 < darker["anchor"].max() <= 0.5 and darker["video"].max() <= 0.5       # both or neither
    for vary in (random_shift_and_flip, random_view):
        varied = RandomWindows(clips, 11, seed=3, augment_video=vary)[5]["video"]
        assert varied.shape == item["video"].shape and not torch.allclose(varied, item["video"], atol=0.1)
        assert varied.std() == pytest.approx(item["video"].std().item(), rel=0.4)
        still = vary(np.repeat(whole[:1], 3, 0), np.random.default_rng(0))
        assert (still[0] == still[2]).all()                                        # the window moves as one
    grid = random_affine_grid(np.random.default_rng(0), 2, (64, 64))
    assert 1e-3 < grid.diff(n=2, dim=1).abs().max() < 0.1                          # bent, and gently
    assert torch.allclose(as_video(np.uint8([[[[0, 51, 102]]]]), 1), torch.tensor(0.2))


def test_damaged_set_is_refused(phantom, tmp_path):
    """A half-written set that is read as far as it goes."""
    shutil.copytree(phantom, copy := tmp_path / "copy")
    os.truncate(copy / "val/video.npy", 5000)
    (copy / "test/clips.csv").write_text("id,start\n")
    refused("python -m sources.phantom", Clips, tmp_path, "train")
    refused("no split 'other'", Clips, copy, "other")
    refused("video.npy: damaged", Clips, copy, "val")
    refused("column 'frames' is missing", Clips, copy, "test")
    table = copy / "train/clips.csv"
    table.write_text(table.read_text().rstrip().rsplit(",", 8)[0])
    refused("a row is cut short", Clips, copy, "train")
    refused("exists already", prepare, phantom, {}, {}, numbered)


def test_table_of_clips(tmp_path):
    """A comma, quote or line end in a text, an unknown number, columns in another order, a blank line or a
    word for a number, read as something else or ending in a traceback."""
    writer, said = Writer(tmp_path / "train"), 'A4C, "good"\n, EF,, 60'
    for i in range(2):
        writer.add(**numbered(i), text=said, edv_ml=99.5, r_peaks_s=[0.1, 0.7])
    writer.close()
    (tmp_path / "meta.json").write_text("{}")
    table, clips = tmp_path / "train/clips.csv", Clips(tmp_path, "train")
    row, rows = clips[1], list(csv.DictReader(open(table, newline="")))
    assert row["id"] == "clip 1" and row["text"] == said.replace("\n", " ")
    assert (row["start"], row["frames"], row["ecg_start"], row["fps"], row["edv_ml"]) == (4, 4, 0, 25, 99.5)
    assert np.isnan(row["ef"]) and np.isnan(row["esv_ml"]) and json.loads(row["r_peaks_s"]) == [0.1, 0.7]
    with open(table, "w", newline="") as file:
        other = csv.DictWriter(file, list(row)[::-1])
        other.writeheader()
        other.writerows(rows)
        file.write("\r\n")
    again = Clips(tmp_path, "train")
    assert len(again) == 2 and str(again[1]) == str(dict(reversed(row.items())))
    table.write_text(table.read_text().replace("99.5", "99,5"))
    refused("a row is cut short", Clips, tmp_path, "train")
    table.write_text(table.read_text().replace("99,5", "much"))
    refused("'much'", Clips, tmp_path, "train")
    table.write_text("")
    refused("column 'id' is missing", Clips, tmp_path, "train")


def test_several_sets(tmp_path):
    """A small set that drowns beside a large one, clips of one read as the other's, a split that only one of
    them has, sets of another size."""
    def write(name, numbers, split="train", height=8):
        writer = Writer(tmp_path / name / split)
        for i in numbers:
            writer.add(**numbered(i))
        writer.close()
        (tmp_path / name / "meta.json").write_text(json.dumps({"leads": [], "height": height}))
        return str(tmp_path / name)
    a, b, rng = write("a", range(3)), write("b", [9]), np.random.default_rng(0)
    both = Clips(f"{a},{b}", "train")
    assert [both.per_frame("video", i).max() for i in range(4)] == [0, 1, 2, 9] and len(both) == 4
    for sets, share in ((f"{a},{b}", 1 / 2), (f"{a},{b},{b}", 2 / 3), (a, 0)):
        drawn = [Clips(sets, "train").draw(rng) >= 3 for _ in range(300)]
        assert np.mean(drawn) == pytest.approx(share, abs=0.09)
    write("b", [7, 8], "val")
    val = Clips(f"{a},{b}", "val")
    assert len(val) == 2 and {val.draw(rng) for _ in range(20)} == {0, 1}
    refused("has no ECG", lambda: RandomWindows(both, 4, ecg_samples=600))
    refused("not the same height", Clips, f"{a},{write('c', [1], height=9)}", "train")


def test_prepare_goes_on_after_a_crash(tmp_path, monkeypatch, capfd):
    """A set half-written, a clip twice or lost after a crash, shards misread, a bad file that ends all."""
    out, jobs = tmp_path / "set", {"train": range(8), "val": [9]}
    make = lambda command: prepare(out, {"leads": [], "command": command}, jobs, numbered, 2, shard=3)
    with pytest.raises(MemoryError):
        make("a")
    assert not out.exists() and (made := tmp_path / "set.part/train-00000/video.npy").exists()
    refused("another command", make, "b")
    before = made.stat().st_mtime_ns
    monkeypatch.setenv("GO_ON", "1")
    make("a")
    train, val = Clips(out, "train"), Clips(out, "val")
    assert [train.per_frame("video", i).max() for i in range(7)] == [0, 1, 2, 3, 5, 6, 7] and len(val) == 1
    assert (out / "train-00000/video.npy").stat().st_mtime_ns == before and train[3]["id"] == "clip 3"
    assert (out / "train-00001/skipped.txt").read_text() == "clip 4: damaged\n"
    # A split without a clip keeps the reasons, and is no split
    prepare(tmp_path / "few", {"leads": [], "command": "c"}, {"train": [0], "test": [4], "val": []}, numbered, 2)
    assert (tmp_path / "few/test/skipped.txt").read_text() == "clip 4: damaged\n"
    assert not (tmp_path / "few/val").exists()
    refused("no split 'test'", Clips, tmp_path / "few", "test")
    assert "clip 4" in capfd.readouterr().err


@pytest.fixture(scope="session")
def echonet(tmp_path_factory):
    """EchoNet-Dynamic's layout: five videos, of which one is cut short, one missing and one of EF 120; the
    others are traced in frames 3 and 12."""
    src = tmp_path_factory.mktemp("echonet")
    (src / "Videos").mkdir()
    table = ["FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split"]
    chords = ["FileName,X1,Y1,X2,Y2,Frame"]
    for i, split in enumerate(("TRAIN", "VAL", "TEST", "TRAIN", "TRAIN", "TRAIN")):
        clip, name = make_clip((5, i), frames=20, rhythm="sinus"), f"0X{i}"
        table.append(f"{name},{120 if i == 3 else clip['ef']},40,90,64,64,50,{30 if i == 4 else 20},{split}")
        if i != 5:
            imageio.mimwrite(src / f"Videos/{name}.avi", clip["video"].repeat(3, 3), fps=50, codec="mjpeg",
                             quality=10, macro_block_size=8)
        for frame in (3, 12):
            rows = [(x.min(), y, x.max() + 1, y) for y, line in enumerate(clip["mask"][frame])
                    if len(x := np.flatnonzero(line))]
            axis = (*rows[0][:2], *rows[-1][:2])                # the long axis comes first
            chords += [f"{name}.avi,{','.join(f'{1.75 * z}' for z in row)},{frame}" for row in (axis, *rows)]
    (src / "FileList.csv").write_text("\n".join(table) + "\n")
    (src / "VolumeTracings.csv").write_text("\n".join(chords) + "\n")
    return src


def test_echonet_dynamic(echonet, tmp_path):
    """Frames or tracings lost or scrambled between source and set, splits mixed up, a damaged file that ends
    all; a U-Net that learns from frames that nobody traced."""
    run("-m", "sources.echonet_dynamic", f"--src={echonet}", f"--out={tmp_path / 'set'}", "--size=64")
    for i, split in enumerate(("train", "val", "test")):
        clips, true = Clips(tmp_path / "set", split), make_clip((5, i), frames=20, rhythm="sinus")
        assert len(clips) == 1 and clips[0]["id"] == f"0X{i}" and clips[0]["fps"] == 50
        assert clips[0]["ef"] == pytest.approx(true["ef"])
        found = clips.per_frame("video", 0).astype(float)
        assert found.shape == (20, 64, 64, 1) and np.abs(found - true["video"]).mean() < 4
        mask = clips.per_frame("mask", 0)
        assert np.flatnonzero(lv_segmenter.is_traced(mask)).tolist() == [3, 12]
        for k in (3, 12):
            both, size = (mask[k] & true["mask"][k]).sum(), mask[k].sum() + true["mask"][k].sum()
            assert 2 * both / size > 0.9
    x, y = lv_segmenter.random_frames(clips, lv_segmenter.TrainConfig(batch=9, augment=True), 0)
    assert len(x) == len(y) >= 9 and y.max() == 1 and y.mean() < 0.5
    assert lv_segmenter.measure_segmenter(lv_segmenter.Segmenter(lv_segmenter.SegmenterConfig(width=8)), clips, [0])["dice"] < 1
    skipped = (tmp_path / "set/train/skipped.txt").read_text()
    assert all(reason in skipped for reason in ("EF 120", "0X4.avi: 20 frames", "0X5.avi: no such file"))
    row, traced = echonet_dynamic.file_list(echonet)[0], {99: echonet_dynamic.tracings(echonet)["0X0"][3]}
    config = echonet_dynamic.EchonetDynamicConfig(src=str(echonet), size=64)
    refused("fewer than two", echonet_dynamic.make_clip, (row, {3: [[1] * 4]}), config)
    refused("has frame 99, the video 20 frames", echonet_dynamic.make_clip, (row, traced), config)
    refused("No such", call, echonet_dynamic.main, f"--src={tmp_path}", "--out=x")
    (tmp_path / "FileList.csv").write_text("FileName,EF\n0X1,50\n")
    refused("no column ESV", call, echonet_dynamic.main, f"--src={tmp_path}", "--out=x")
    (tmp_path / "FileList.csv").write_text(",".join(echonet_dynamic.FILES) + 2 * "\n0X1,50,40,90,50,20,VAL")
    refused("0X1 is there twice", call, echonet_dynamic.main, f"--src={tmp_path}", "--out=x")
    (tmp_path / "VolumeTracings.csv").write_text("FileName,X1,Y1,X2,Y2,Frame\n0X1,1,2,nan,4,5\n")
    refused("row of 0X1", echonet_dynamic.tracings, tmp_path)


class Bright(torch.nn.Module):
    """A segmenter: what is bright."""

    def forward(self, x):
        return 10 * (x.mean(1, keepdim=True) - 0.5)


def test_ecg_for_echonet(tmp_path):
    """R peaks that are not at the last maximum before the ventricle contracts (but where it is largest: by
    chance, long before), or not where the experts traced ED; a T wave that says nothing of the systole; a
    TorchScript segmenter that is not asked, or asked where all is traced; an ECG for a heart that stands
    still; beats that --every moves; a heart at another rate that leaves its R peaks."""
    def curve(r_peaks):         # 1 at the end of each systole, below 0 as it begins, and more so long before
        wave = [np.sin(np.pi * ((np.arange(110) / 50 - r_peaks[:, None] + early) / 0.4).clip(0, 1)) ** 2
                for early in (0, 0.2, 0.55)]
        return np.tensordot([1, -0.12, -0.16], wave, 1).sum(0)

    (tmp_path / "Videos").mkdir()
    y, x = np.mgrid[:112, :112] - 56
    table, beats = ["FileName,EF,ESV,EDV,FPS,NumberOfFrames,Split"], 0.3 + 0.8 * np.arange(3)
    for name, depth in (("a", 16), ("still", 0)):
        radius = 33 - depth * curve(beats)
        video = (np.hypot(x, y) < radius[:, None, None]).astype(np.uint8)[..., None] * 200
        imageio.mimwrite(tmp_path / f"Videos/{name}.avi", video.repeat(3, 3), fps=50, codec="mjpeg")
        table.append(f"{name},50,40,90,50,110,TRAIN")
    (tmp_path / "FileList.csv").write_text("\n".join(table))
    chords = [f"a.avi,{x},20,{x + 1},90,{k}" for k, right in ((57, 60), (76, 40)) for x in (30, 30, right)]
    (tmp_path / "VolumeTracings.csv").write_text("\n".join(["FileName,X1,Y1,X2,Y2,Frame", *chords]))
    torch.jit.script(Bright()).save(str(tmp_path / "net.pt"))
    flags = [f"--src={tmp_path}", "--size=64", "--workers=1"]
    call(echonet_dynamic.main, *flags, f"--segmenter={tmp_path / 'net.pt'}", f"--out={tmp_path / 'set'}")
    clips = Clips(tmp_path / "set", "train")
    beats[1] = 57 / 50                                          # the traced one
    found = find_r_peaks(clips.ecg(0)) + clips[0]["ecg_offset_s"]
    assert clips.meta["ecg"] == "synthetic" and len(clips) == 1
    assert found[(found > 0) & (found < 2.2)] == pytest.approx(beats, abs=0.04)
    assert "no beat is seen" in (tmp_path / "set/train/skipped.txt").read_text()
    half = 28 - 16 * curve(np.array([0.5, 1.3]))                                # the experts saw it beat
    traced = {k: [[56, 20, 56, 90], *([56 - w, y, 56 + w, y] for y in (20, 90))] for k, w in enumerate(half)}
    row = echonet_dynamic.file_list(tmp_path)[1]
    config = echonet_dynamic.EchonetDynamicConfig(src=str(tmp_path), size=64,
                                                  segmenter=str(tmp_path / "net.pt"))
    for every, frames in ((1, 110), (4, 28)):
        clip = echonet_dynamic.make_clip((row, traced), replace(config, every=every))
        assert clip["r_peaks_s"] == pytest.approx([0.5, 1.3], abs=0.04)
        assert len(clip["video"]) == len(clip["mask"]) == frames and clip["fps"] == 50 / every
    other = echonet_dynamic.make_clip((row, traced), replace(config, any_hr=1))
    found, frames = echonet_dynamic.find_beats(other["mask"].sum((1, 2)), 50)[0], len(other["video"])
    assert found == pytest.approx(other["r_peaks_s"], abs=0.05)
    assert np.diff(found) == pytest.approx(0.8 * frames / 110, abs=0.1) and abs(frames - 110) > 10
    own = echonet_dynamic.make_clip((row | {"Split": "VAL"}, traced), replace(config, any_hr=1))
    assert len(own["video"]) == 110                             # val and test beat as they do
    shown, r_peaks, _ = echonet_dynamic.at_rate(np.array([0.5, 0.85, 1.25, 2.1]), 0.5, 130, 50, 60)
    assert (np.diff(shown) >= 0).all() and (np.diff(r_peaks) > 0).all()         # also where a beat is early
    refused("needs a --segmenter", call, echonet_dynamic.main, *flags, "--any_hr=1")
    beats, late = 0.5 + np.arange(6), np.arange(50, 150)        # seconds; samples after R where T is
    for qt in (0.8, 1, 1.3):
        ecg = ecg_of_beats(0, beats, 6.5, qt * usual_systole(1))[:, 1]
        t_wave = np.mean([ecg[round(250 * (1 + r)) + late] for r in beats], 0).argmax() + 50
        assert t_wave / 250 == pytest.approx(0.278 * qt, abs=0.02)
        slow = make_clip(5, fps=50, frames=128, size=32, hr=60, rhythm="sinus", qt=qt)
        systole = echonet_dynamic.beats_of(slow["video"], slow["mask"], 50, None)[1]
        assert systole == pytest.approx(0.38 * qt, abs=0.05)
    refused("TorchScript", lv_segmenter.load_segmenter, tmp_path / "FileList.csv", 1)


def test_webvid(echonet, tmp_path):
    """A video read at another rate, size or colour than asked for; its caption lost; a text file decoded."""
    src, out = tmp_path / "src", tmp_path / "set"
    flags = [f"--src={src}", f"--out={out}", "--size=32", "--val=0", "--test=0"]
    (src / "000").mkdir(parents=True)
    shutil.copy(echonet / "Videos/0X0.avi", src / "000/7.mp4")
    (src / "000/8.mp4").write_text("no video")
    (tmp_path / "list.csv").write_text("videoid,page_dir,name\n7,000,A heart\n8,000,Text\n9,000,Missing\n")
    call(video_folder.main, *flags, f"--csv={tmp_path / 'list.csv'}", "--fps=25", "--least=8", "--frames=9")
    clips = Clips(tmp_path / "set", "train")
    assert len(clips) == 1 and (clips[0]["text"], clips[0]["fps"]) == ("A heart", 25)
    assert clips.per_frame("video", 0).shape == (9, 32, 32, 3)      # of 20 frames at 50 fps
    skipped = (tmp_path / "set/train/skipped.txt").read_text()
    assert "8.mp4: not read as a video" in skipped and "9.mp4: no such file" in skipped
    shutil.rmtree(tmp_path / "set")
    call(video_folder.main, *flags, "--fps=0", "--channels=1")
    assert Clips(tmp_path / "set", "train").per_frame("video", 0).shape == (20, 32, 32, 1)
    (empty := tmp_path / "empty").mkdir()
    refused("no video file", call, video_folder.main, f"--src={empty}", "--out=x")


def test_paired(echonet, tmp_path):
    """An ECG put to another time or lead than its own, a label lost, or believed that cannot be; a damaged
    pair that is taken, or that ends the rest."""
    src, ecg = tmp_path / "src", np.random.default_rng(0).standard_normal((2, 500))
    src.mkdir()
    for name in "abcdefg":
        shutil.copy(echonet / "Videos/0X0.avi", src / f"{name}.avi")
        np.save(src / f"{name}.npy", ecg + 0.0)
    np.save(src / "c.npy", ecg[:, :120])                        # of 20 frames at 50 a second: too short
    (src / "d.npy").unlink()
    (src / "e.avi").write_text("no video")
    (tmp_path / "x.csv").write_text("name,ecg_offset_s,ef,view,split\na,-0.5,55,A4C,val\nb,-0.5,5,,\n"
                                    "f,-0.5,155,,\ng,-0.5,many,,\nc,-0.1,,,\nz,0,,,\n")
    flags = [f"--src={src}", "--ecg_hz=250", "--ecg_leads=II,V5", "--size=32", "--val=0", "--test=0"]
    call(video_ecg_folder.main, *flags, f"--csv={tmp_path / 'x.csv'}", f"--out={tmp_path / 'set'}", "--leads=V5")
    train, val = (Clips(tmp_path / "set", split) for split in ("train", "val"))
    assert len(train) == 1 and train[0]["id"] == "b" and train.leads == ["V5"]
    assert (val[0]["ef"], val[0]["view"], val[0]["ecg_offset_s"]) == (55, "A4C", -0.5)
    assert np.allclose(val.ecg(0)[0], ecg[1] - np.median(ecg[1]), atol=1e-5)
    skipped = (tmp_path / "set/train/skipped.txt").read_text()
    reasons = "c: the ECG lasts", "d.avi: no ECG", "e.avi: not read", "ef 155", "'many'"
    assert all(reason in skipped for reason in reasons)
    shutil.copy(src / "a.avi", src / "a.mp4")
    refused("two videos are called a", call, video_ecg_folder.main, *flags, "--out=x")
    (tmp_path / "x.csv").write_text("name\na\na\n")
    (src / "a.mp4").unlink()
    refused("a is there twice", call, video_ecg_folder.main, *flags, f"--csv={tmp_path / 'x.csv'}", "--out=x")
    refused("no lead I", call, video_ecg_folder.main, *flags, f"--out={tmp_path / 'y'}", "--leads=I")


def test_camus(tmp_path):
    """A mask beside its frames, a picture squeezed, rows taken for columns, a patient in two splits; a
    damaged file that ends all."""
    nibabel = pytest.importorskip("nibabel")
    clip = make_clip(1, frames=6, rhythm="sinus")
    src, video, mask = tmp_path / "src", clip["video"][:, ::2, :, 0], clip["mask"][:, ::2]  # high rows
    for i, view in ((0, "4CH"), (0, "2CH"), (1, "4CH"), (2, "4CH"), (3, "4CH"), (4, "4CH")):
        folder = src / f"patient000{i}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"Info_{view}.cfg").write_text(f"ED: 1\nES: 6\nSex: F\nEF: {[55.5, 50, 150, 50, 50][i]}\n"
                                                 "FrameRate: 44.5\n")
        for end, array in (("", video), ("_gt", 2 - mask)):             # 1 = cavity
            image = nibabel.Nifti1Image(array.T.astype(np.uint8), np.diag([0.3, 0.6, 1, 1]))
            nibabel.save(image, folder / f"patient000{i}_{view}_half_sequence{end}.nii.gz")
    (src / "patient0003/patient0003_4CH_half_sequence_gt.nii.gz").unlink()
    (src / "patient0004/patient0004_4CH_half_sequence.nii.gz").write_bytes(b"no NIfTI")
    (src / "subgroup_testing.txt").write_text("patient0000\n")
    (src / "subgroup_training.txt").write_text("patient0001\npatient0002\npatient0003\npatient0004\n")
    call(camus.main, f"--src={src}", f"--out={tmp_path / 'set'}", "--size=64")
    train, test = (Clips(tmp_path / "set", split) for split in ("train", "test"))
    assert len(train) == 1 and [c["view"] for c in test] == ["A4C", "A2C"]
    assert (test[0]["ef"], test[0]["fps"], test[0]["id"]) == (55.5, 44.5, "patient0000_4CH")
    assert np.abs(test.per_frame("video", 0)[:, ::2, :, 0].astype(int) - video).mean() < 1
    assert (test.per_frame("mask", 0)[:, ::2] == mask).all()
    skipped = (tmp_path / "set/train/skipped.txt").read_text()
    assert all(reason in skipped for reason in ("EF 150", "no such file", "not read as NIfTI"))
    refused("half_sequence", call, camus.main, f"--src={src / 'patient0004'}", "--out=x", "--views=2CH")


def test_dicom(tmp_path):
    """Text beside the sector that stays in the picture, a wrong frame time, a damaged file that ends all."""
    pydicom = pytest.importorskip("pydicom")
    row, column = np.mgrid[:96, :128]
    sector = (np.abs(column - 64) < 0.6 * row) & (np.hypot(row, column - 64) < 90)
    video = np.random.default_rng(0).integers(60, 200, (12, 96, 128)) * sector
    video[:, 2:12, 2:40], video[:, 85:94, 100:126] = 255, 128           # text, a bar

    def write(name, pixels, **more):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.3.1", "1.2"
        data = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        about = dict(PatientID="p", NumberOfFrames=len(pixels), Rows=96, Columns=128, SamplesPerPixel=1,
                     BitsStored=8, BitsAllocated=8, HighBit=7, PixelRepresentation=0,
                     PhotometricInterpretation="MONOCHROME2")
        for key, value in (about | more).items():
            setattr(data, key, value)
        data.PixelData = pixels.astype(np.uint8).tobytes()
        data.save_as(tmp_path / "src" / name, enforce_file_format=True)
    (tmp_path / "src").mkdir()
    write("a.dcm", video, FrameTime=40)
    write("b.dcm", video, FrameTimeVector=[0, *[20] * 11])
    write("still.dcm", video[:1].repeat(12, 0), FrameTime=40)
    write("when.dcm", video)
    write("short.dcm", video[:3], FrameTime=40)
    write("cut.dcm", video, FrameTime=40)
    (tmp_path / "src/cut.dcm").write_bytes((tmp_path / "src/cut.dcm").read_bytes()[:9000])
    (tmp_path / "src/readme.txt").write_text("no DICOM")
    flags = [f"--src={tmp_path / 'src'}", "--size=64"]
    call(dicom_cines.main, *flags, f"--out={tmp_path / 'set'}")
    clips = Clips(tmp_path / "set", split := os.listdir(tmp_path / "set")[0].replace("meta.json", "train"))
    found = clips.per_frame("video", 0)
    assert [clip["fps"] for clip in clips] == [25, 50] and found.shape == (12, 64, 64, 1)
    assert found[:, :8, :8].max() == found[:, -3:, -3:].max() == 0 and found[:, 30:50, 25:40].std() > 20
    skipped = (tmp_path / "set" / split / "skipped.txt").read_text()
    reasons = "nothing moves", "its frame time", "3 frames", "cut.dcm", "readme.txt: not read"
    assert all(reason in skipped for reason in reasons)
    refused("no clip could be made", call, dicom_cines.main, *flags, f"--out={tmp_path / 'x'}", "--leads=II")


def test_phantom(phantom):
    """A heart out of step with its ECG, a mask not the volume's, or a seed that does not fix the bytes."""
    clip = make_clip((0, 2, 1), rhythm="sinus", hr=70, ef=60)
    volume, ecg = clip["volume"], clip["ecg"].T
    assert np.corrcoef(volume, clip["mask"].sum((1, 2), dtype=float))[0, 1] > 0.99
    peaks = [r for r in clip["r_peaks_s"] if 0.3 < r < 2.2]
    for r in peaks:                                             # largest at the R peak, EF as stated
        near = slice(round(25 * r) - 5, round(25 * r) + 6)
        assert abs((near.start + volume[near].argmax()) / 25 - r) <= 0.06
    assert len(peaks) >= 2 and abs(100 * (1 - volume.min() / volume.max()) - 60) < 3
    flat = make_clip(3, rhythm="flat")
    assert np.ptp(flat["volume"]) < 0.01 * flat["volume"].max() and not flat["r_peaks_s"]
    assert np.allclose(ecg[2:4], [ecg[1] - ecg[0], -(ecg[0] + ecg[1]) / 2], atol=1e-5)     # III, aVR
    rates = [Clips(phantom, "train")[i]["fps"] for i in range(6)]
    assert rates[:4] == [25] * 4 and all(8 <= rate <= 60 and rate != 25 for rate in rates[4:])
    jobs = list_jobs(PhantomConfig(clips=200, val=50, test=0, any_hr=0.3))
    rates = np.array([job[4] for job in jobs["train"]])
    assert 40 < (rates > 0).sum() < 80 and 35 <= rates[rates > 0].min() < 45 and 150 < rates.max() <= 175
    assert not any(job[4] for job in jobs["val"])
    qt = np.array([job[5] for job in list_jobs(PhantomConfig(clips=200, val=9, test=0, any_qt=0.3))["train"]])
    assert 40 < (qt != 1).sum() < 80 and 0.8 <= qt.min() < 0.85 and 1.35 < qt.max() <= 1.4
    assert (Clips(phantom, "test").per_frame("video", 1) == make_clip((0, 2, 1), frames=32)["video"]).all()


# ---------------------------------------------------------------------------- ECG

def check_peaks(ecg, truth, seconds, within):
    """The R peaks found are the true ones, each to `within` seconds; 0.3 s at both ends do not count."""
    found, truth = (x[(x > 0.3) & (x < seconds - 0.3)] for x in (find_r_peaks(ecg), truth))
    assert len(found) == len(truth) and np.abs(found - truth).max() < within


def check_file(path, names, write, hz=512, **how):
    """write(path, (N, 2) mV of leads I and II) makes a file; read_ecg finds its beats and its leads."""
    e, time = make_ecg(0, 8, hr=70, noise=0.3), np.arange(8 * hz) / hz
    write(path, np.stack([np.interp(time, np.arange(2000) / 250, e.ecg[:, k]) for k in (0, 1)], 1))
    ecg, found = read_ecg(path, **how)
    check_peaks(ecg, e.r_peaks, 8, within=0.02)
    assert found == names and 0.2 < np.abs(ecg).max() < 4                          # in mV
    return ecg


def test_ecg_formats(tmp_path):
    """A rate, unit, decimal comma or lead name misread: beats at wrong times, or the wrong lead embedding."""
    def text(*head, row):
        return lambda path, x: path.write_text("\n".join([*head, *map(row, np.arange(len(x)) / 512, *x.T)]))
    german = text("Name,", "Messrate,512,0 Hertz", "Ableitung,Ableitung I", "Einheit,µV", "",
                  row=lambda t, v, w: f"{1000 * v:.3f}".replace(".", ","))
    english = text("Sample Rate,512 hertz", "Lead,Lead I", "Unit,µV", row=lambda t, v, w: f"{1000 * v:.3f}")
    assert np.array_equal(*(check_file(tmp_path / "watch.csv", ["I"], write) for write in (german, english)))
    table = text("time,II,V5", row=lambda t, v, w: f"{t:.5f},{w:.4f},{v:.4f}")
    check_file(tmp_path / "table.csv", ["II", "V5"], table)
    check_file(tmp_path / "trace.npy", ["I", "V2"], np.save, ecg_hz=512, leads=["I", "V2"])


def test_wfdb_and_dicom(tmp_path):
    """The readers of other packages called wrongly; skipped where those are not installed."""
    wfdb, names, out = pytest.importorskip("wfdb"), ["I", "II"], str(tmp_path)
    write = lambda path, x: wfdb.wrsamp("rec", 500, ["mV"] * 2, names, x, fmt=["16"] * 2, write_dir=out)
    check_file(tmp_path / "rec.hea", names, write, hz=500)
    extra = np.array([["mV", "MLII"], ["mmHg", "ABP"]])             # a pressure is no lead: left out
    wfdb.wrsamp("two", 250, *extra.T.tolist(), np.stack([np.sin(np.arange(500.)), np.arange(500.)], 1),
                fmt=["16"] * 2, write_dir=out)
    ecg, leads = read_ecg(tmp_path / "two.hea")
    assert leads == ["II"] and np.abs(ecg).max() == pytest.approx(1, abs=0.01)
    data = pytest.importorskip("pydicom.data")
    ecg, leads = read_ecg(data.get_testdata_file("waveform_ecg.dcm", download=False))
    assert leads == list(LEADS) and ecg.shape == (12, 2500) and len(find_r_peaks(ecg)) == 10


@pytest.mark.parametrize("hr", [45, 75, 140])
@pytest.mark.parametrize("leads", [[0], [1], range(12)])
def test_r_peaks(hr, leads):
    """A beat missed or one too many (T waves taken for beats, noise in a pause), or found off its R peak."""
    e = make_ecg(hr, 20, hr=hr)
    check_peaks(e.ecg.T[list(leads)], e.r_peaks, 20, within=0.03)


def test_clean_ecg():
    """A flat lead blown up to noise of unit size, baseline wander left in, or beats lost to exact zeros."""
    beats = make_ecg(0, 10, noise=0).ecg[:, 1]
    clean = clean_ecg(np.stack([beats, beats + np.sin(1.2 * np.arange(2500) / 250)]))
    assert abs(clean.std() - 1) < 1e-3 and np.corrcoef(clean)[0, 1] > 0.98
    assert clean_ecg(1e-3 * np.random.default_rng(0).standard_normal((1, 2500))).std() < 0.1
    assert np.allclose(find_r_peaks(crop_or_pad(clean, -400, 3300)) - 1.6, find_r_peaks(clean))


def test_redrawn_ecg_keeps_its_beats():
    """An augmentation that moves or hides the QRS complex: the generator would learn a wrong delay."""
    e = make_ecg(0, 20, hr=70)
    clean, beats = clean_ecg(e.ecg.T[1:2]), (e.r_peaks[1:-1, None] * 250 + np.arange(-75, 76)).astype(int)
    for seed in range(40):
        x = augment_recorder_filter(clean, np.random.default_rng(seed), p=1)
        steepest = np.abs(np.gradient(x[0]))[beats].argmax(1) - 75
        assert np.abs(steepest).max() <= 0.06 * 250 and np.abs(x - clean).max() > 0.1
    assert augment_recorder_filter(clean, np.random.default_rng(0), p=0) is clean


def test_ecg_encoder():
    """Leads mixed up, SEP left in the output, or masked patches that reach the autoencoder's encoder."""
    config, leads = EcgConfig(**SMALL["ecg_encoder"]), torch.tensor([0, 1])
    encoder, model, ecg = EcgEncoder(config), MaskedAutoencoder(config), torch.randn(2, 2, 600)
    z, flipped = encoder(ecg, leads), encoder(ecg.flip(1), leads.flip(0))
    assert z.shape == (2, 2, 8, 32) and torch.allclose(z, flipped.flip(1), atol=1e-5)
    assert not torch.allclose(z, encoder(ecg, torch.tensor([0, 2])), atol=1e-3)
    x, keep, mask = model.forward_encoder(ecg, leads, torch.rand(2, 96))
    assert x.shape == (2, 2, 2 + 2, 32) and mask.float().mean() == 0.75
    hidden = torch.where(mask.repeat_interleave(75, 2), torch.randn_like(ecg), ecg)
    assert torch.equal(x, model.encoder.encode(hidden, leads, keep))


def test_st_mem_weights_load(tmp_path, monkeypatch):
    """Names of the released weights mapped to the wrong place: a checkpoint of its layout must load whole."""
    monkeypatch.setitem(ecg_encoder.PRESETS, "paper", small := TINY | dict(samples=2250, depth=2))
    ours = EcgEncoder(EcgConfig(**small)).state_dict()
    theirs = {f"lead_embeddings.{i}": v for i, v in enumerate(ours["lead"])}
    theirs |= {"pos_embedding": ours["positions"][None], "sep_embedding": ours["sep"]}
    for name in ours.keys() - {"lead", "positions", "sep"}:
        value, kv = ours[name], ours.get(name.replace(".q.", ".kv."))
        for pair in (".norm1 .attn.norm", ".attn.out .attn.fn.to_out.0", ".norm2 .ff.norm", "blocks. block",
                     ".mlp.fc1 .ff.fn.net.0", ".mlp.fc2 .ff.fn.net.3", "embed. to_patch_embedding.",
                     ".attn.q .attn.fn.to_qkv"):
            name = name.replace(*pair.split())
        if ".kv." not in name:
            theirs[name] = torch.cat([value, kv]) if "to_qkv" in name else value
    torch.save({"model": theirs}, tmp_path / "st_mem.pth")
    loaded = ecg_encoder.load_st_mem(tmp_path / "st_mem.pth").state_dict()
    assert all(torch.equal(loaded[k], ours[k]) for k in ours)


def chords_of(count=20):
    """A tracing as EchoNet-Dynamic has it: the long axis, tilted, then chords from the apex to the base."""
    along, across = np.array([0.2, 0.98]), np.array([0.98, -0.2])
    tracing = [[50, 15, *(50, 15) + 70 * along]]
    for t in np.linspace(0.02, 0.98, count):
        middle, half = (50, 15) + 70 * t * along, 18 * np.sin(np.pi * t * 0.8) ** 0.5
        tracing.append([*(middle - half * across), *(middle + 1.1 * half * across)])
    return np.array(tracing)


def test_tracings_in_any_order():
    """A bow tie of a mask where a chord has its ends swapped, chords stand in another order, or the long axis is
    not the first row: wrong EF and masks, without a word."""
    rng, tracing = np.random.default_rng(0), chords_of()
    draw = lambda rows: echonet_dynamic.draw_masks("0X1", {1: rows.tolist()}, 2, 112)
    good = draw(tracing)
    assert (good[0] == UNTRACED).all() and 2100 < good[1].sum() < 2300
    ends_swapped = tracing.copy()
    ends_swapped[9] = ends_swapped[9, [2, 3, 0, 1]]
    others = [ends_swapped, np.roll(tracing, -1, 0), tracing[::-1], np.vstack([tracing[:1], tracing[:0:-1]])]
    for _ in range(50):
        mixed, swapped = rng.permutation(tracing), rng.random(len(tracing)) < 0.5
        mixed[swapped] = mixed[swapped][:, [2, 3, 0, 1]]
        others.append(mixed)
    assert all((draw(rows) == good).all() for rows in others)
    crossed = np.vstack([tracing[:1], [[20, 20 + 8 * k, 90, 90 - 8 * k] for k in range(8)]])
    refused("0X1: frame 1 in VolumeTracings.csv: the outline crosses itself", draw, crossed)
    refused("crosses itself", draw, np.ones((4, 4)))


# ---------------------------------------------------------------------------- DICOM cines, MIMIC-IV-ECHO

@pytest.mark.parametrize("name", dicom_files.PIXELS)
def test_pixels(name, tmp_path):
    """Pixels taken as they are stored: an inverted picture, the numbers of a palette, YBR as RGB, 16 bits cut
    to their low byte, planes taken for pixels."""
    pytest.importorskip("pydicom")
    stored, looks, syntax, header = dicom_files.PIXELS[name]
    data = None
    if name == "planar":
        data = stored.transpose(0, 3, 1, 2).astype(np.uint8).tobytes()
    if name == "ybr 4:2:2":
        data = dicom_files.ybr_422(stored)
    dicom_files.write_dicom(tmp_path / "a.dcm", stored, syntax, data, **header)
    cine = dicom_pixels.read_cine(tmp_path / "a.dcm", dicom_pixels.read_header(tmp_path / "a.dcm", 11))
    looks = looks if looks.ndim == 4 else looks[..., None]
    off = np.abs(cine.frames.astype(int) - looks)
    assert cine.frames.dtype == np.uint8 and cine.frames.shape == looks.shape
    # Chroma of 4:2:2 is off at the sharp edges of the sector only
    assert off.max() <= 2 if "ybr" not in name and syntax != "jpeg" else off.mean() < 2.5, (off.max(), off.mean())


def test_pixels_that_cannot_be_read(tmp_path, monkeypatch):
    """A traceback, or no word about the package that is missing; a cut file that passes as a shorter one."""
    pixels = pytest.importorskip("pydicom").pixels
    path = tmp_path / "a.dcm"

    def read(*reasons, syntax="native", data=None, stored=dicom_files.GREY, **header):
        dicom_files.write_dicom(path, stored, syntax, data, **header)
        refused(" ".join(reasons), lambda: dicom_pixels.read_cine(path, dicom_pixels.read_header(path, 11)))
    frames = [dicom_files.encode(x.astype(np.uint8), "jpeg") for x in dicom_files.GREY]
    read("11 frames are in it, its header says 12", syntax="jpeg", data=frames[:11])
    read("damaged", syntax="jpeg", data=[*frames[:11], frames[11][:200]])
    read("damaged", data=bytes(9000))
    read("YBR_PARTIAL_420, which is not read", stored=dicom_files.RGB, PhotometricInterpretation="YBR_PARTIAL_420")
    read("32 bits, not 1 to 16", data=bytes(12 * 96 * 128 * 4), BitsStored=32, BitsAllocated=32)
    read("need a VOI LUT", BitsStored=12, VOILUTFunction="SIGMOID")
    monkeypatch.setattr(pixels, "get_decoder", lambda syntax: SimpleNamespace(is_available=False))
    read("JPEG Lossless", syntax="lossless", data=frames)
    with pytest.raises(UserError, match="pip install pylibjpeg pylibjpeg-libjpeg$"):
        dicom_pixels.read_cine(path, dicom_pixels.read_header(path, 11))


UNEVEN = [0, *[20, 60] * 5, 20]
# name: (header of 12 frames, times (ms) that their pictures show or None, reason why they are refused)
TIMES = {
    "one time": (dict(FrameTime=40), 40 * np.arange(12), None),
    "even vector": (dict(FrameTimeVector=[0, *[20.5, 20] * 5, 20]), np.cumsum([0, *[20.5, 20] * 5, 20]), None),
    "uneven": (dict(FrameTimeVector=UNEVEN), np.cumsum(UNEVEN), None),
    "backwards": (dict(FrameTimeVector=[0, *[20, -20] * 5, 20]), None, "do not rise"),
    "a pause": (dict(FrameTimeVector=[0, 900, *[20] * 10]), None, "pause for 0.90 s"),
    "too few": (dict(FrameTimeVector=UNEVEN[:7]), None, "12 frames, 7 times"),
    "rate of none": (dict(FrameTime=None, CineRate="0"), None, "does not say its frame time"),
}


@pytest.mark.parametrize("name", TIMES)
def test_frame_times(name, tmp_path):
    """Uneven frames taken for even ones: a heart that jumps, and an ECG out of step with it."""
    pytest.importorskip("pydicom")
    header, times, reason = TIMES[name]
    dicom_files.write_dicom(tmp_path / "a.dcm", dicom_files.GREY, **dict(FrameTime=None) | header)
    if reason:
        return refused(reason, dicom_cines.make_clip, ("a", tmp_path / "a.dcm"), dicom_cines.DicomCinesConfig())
    read = dicom_pixels.read_cine(tmp_path / "a.dcm", dicom_pixels.read_header(tmp_path / "a.dcm", 11))
    # Grey levels that say when they were seen
    clock = np.zeros((12, 4, 4, 1), np.uint8) + np.rint(times / 4).astype(np.uint8)[:, None, None, None]
    seen = resample_frames(clock, read.times, even_times(read.times)[0])[:, 0, 0, 0]
    assert read.fps == pytest.approx(1000 / np.diff(times).mean())
    assert 4.0 * seen == pytest.approx(1000 * np.arange(len(seen)) / read.fps, abs=4) and len(seen) >= 12
    clip = dicom_cines.make_clip(("a", tmp_path / "a.dcm"), dicom_cines.DicomCinesConfig())
    assert clip["fps"] == read.fps and len(clip["video"]) == len(seen)


def strip_region():
    """Regions of a 2D picture and of an ECG under it."""
    return dicom_files.regions_of((0, 0, 128, 96, 1, 1), (0, 70, 128, 90, 4, 10))


@pytest.mark.parametrize("flags, header, offset, black", [
    (dict(), dict, None, False),
    (dict(ecg="none", leads="II"), dict, None, False),
    (dict(leads="II"), dicom_files.waveform, 0, True),
    (dict(ecg="waveform"), dicom_files.waveform, 0, True),
    (dict(ecg="screen"), dicom_files.waveform, 0, True),
    (dict(ecg="screen"), dict, -0.3, True),
    (dict(ecg="screen", leads="V1"), strip_region, -0.3, True)])
def test_ecg_of_a_cine(flags, header, offset, black, tmp_path, monkeypatch):
    """An ECG that is drawn on the picture and stays in it, so that the model reads it there; the trace on the
    screen taken where the file carries a waveform; gaps that are filled up; an ECG that does not cover it."""
    pytest.importorskip("pydicom")
    header = header()
    strip = (0, 76, 128, 84)                # half way into the sector, whose lower edge is row 89
    ecg = np.where(np.arange(150) < 20, np.nan, 0.5).astype(np.float32)
    asked = []

    def read_screen(frames, times, regions):
        asked.append((frames.shape, times[-1], list(regions)))
        return ScreenECG(ecg, -0.3, "sweep", 1.0, strip)
    monkeypatch.setattr(dicom_cines, "read_screen_ecg", read_screen)
    drawn = dicom_files.GREY.copy()
    drawn[::2, 80:82], drawn[1::2, 80:82] = 255, 0
    dicom_files.write_dicom(tmp_path / "a.dcm", drawn, **header)
    config = dicom_cines.DicomCinesConfig(size=96, **flags)
    dicom_cines.check_flags(config)
    clip = dicom_cines.make_clip(("a", tmp_path / "a.dcm"), config)
    assert (clip["video"].max() < 250) == black and clip["video"].max() > 100
    assert clip.get("ecg_offset_s") == (offset if offset is None else pytest.approx(offset))
    if offset == -0.3:
        seconds, hints = 12 * 0.04, [(0, 70, 128, 90)] if header else []
        assert asked == [((12, 96, 128), pytest.approx(11 * 0.04), hints)]
        assert np.isnan(clip["ecg"][:20]).all() and len(clip["ecg"]) / 250 - 0.3 >= seconds
        ecg[75:-20] = np.nan
        refused("covers", dicom_cines.make_clip, ("a", tmp_path / "a.dcm"), config)
        monkeypatch.undo()
        refused("a.dcm: ", dicom_cines.make_clip, ("a", tmp_path / "a.dcm"), config)
    for wrong, reason in ((dict(ecg="both"), "waveform, screen or none"), (dict(ecg="screen", leads="I,II"), "one lead")):
        refused(reason, dicom_cines.check_flags, dicom_cines.DicomCinesConfig(**wrong))


def test_sector_by_its_region(tmp_path):
    """A Doppler spectrum that moves more than the sector taken for it, where the header says which is which; a
    number that changes on a screen of text taken for a sector."""
    pytest.importorskip("pydicom")
    video = np.concatenate([dicom_files.GREY, np.random.default_rng(0).integers(0, 255, (12, 96, 128))], 1)
    dicom_files.write_dicom(tmp_path / "a.dcm", video, **dicom_files.regions_of((0, 0, 128, 96, 1, 1), (0, 96, 128, 192, 3, 3)))
    clip = dicom_cines.make_clip(("a", tmp_path / "a.dcm"), dicom_cines.DicomCinesConfig(size=96))
    dicom_files.write_dicom(tmp_path / "b.dcm", dicom_files.GREY)
    alone = dicom_cines.make_clip(("b", tmp_path / "b.dcm"), dicom_cines.DicomCinesConfig(size=96))
    assert np.abs(clip["video"].astype(int) - alone["video"]).mean() < 2
    text = np.zeros((12, 192, 256))
    text[:, 20:40, 20:200], text[::2, 100:112, 20:44] = 255, 255
    dicom_files.write_dicom(tmp_path / "c.dcm", text)
    refused("no sector", dicom_cines.make_clip, ("c", tmp_path / "c.dcm"), dicom_cines.DicomCinesConfig())


def test_mimic_iv_echo(tmp_path, capsys):
    """A patient in two splits, Doppler or a still in the set, the EF of another study or of the range's upper
    end, a missing table or file that ends all."""
    pytest.importorskip("pydicom")
    src = tmp_path / "src"
    records = ["subject_id,study_id,acquisition_datetime,dicom_filepath"]
    kinds = {"0001": {}, "0002": dict(UltrasoundColorDataPresent=1), "0003": dicom_files.regions_of((0, 0, 128, 96, 3, 3)),
             "0004": dicom_files.regions_of((0, 0, 128, 96, 1, 2)), "0005": dict(still=True), "0006": None,
             "0007": dicom_files.regions_of((0, 0, 128, 96, 4, 10)), "0008": "no DICOM"}
    for patient, study, day in ((10000001, 90000001, 1), (10000001, 90000002, 9), (10000002, 90000003, 1)):
        folder = f"files/p10/p{patient}/s{study}"
        (src / folder).mkdir(parents=True)
        for name, header in kinds.items():
            file = f"{folder}/{study}_{name}.dcm"
            records.append(f"{patient},{study},2170-03-0{day} 10:0{name[-1]}:00,{file}")
            if isinstance(header, str):
                (src / file).write_text(header)
            elif header is not None:
                still = "still" in header
                dicom_files.write_dicom(src / file, dicom_files.GREY[:1] if still else dicom_files.GREY, **{} if still else header)
    records.append("10000009,90000009,2170-03-01 10:00:00,files/p10/p10000009/s90000009/90000009_0001.dcm")
    (src / "echo-record-list.csv").write_text("\n".join(records) + "\n")
    config = mimic_iv_echo.MimicIvEchoConfig(src=str(src), ecg="none", seed=4, val=0.3, test=0.3)
    jobs = mimic_iv_echo.list_jobs(config)
    said = capsys.readouterr().err
    assert "structured-measurement.csv: no such file" in said and "24 of the 25 files" in said
    assert all(ef is None for split in jobs.values() for _, _, ef in split)

    measured = ["subject_id,measurement_id,measurement_datetime,test_type,measurement,measurement_description,result,unit"]
    for patient, measured_at, test, name, value in (
            (10000001, "2170-03-02 09:00:00", "tte", "lvef", "55"),
            (10000001, "2170-03-02 09:00:00", "tte", "lvef_upper", "100"),
            (10000001, "2170-03-02 09:00:00", "tte", "biplane_lvef", "51"),
            (10000001, "2170-03-01 09:00:00", "stress", "lvef", "70"),
            (10000001, "2170-03-05 09:00:00", "tte", "lvef", "20"),
            (10000002, "2170-03-01 11:00:00", "tte", "lvef", "unknown"),
            (10000002, "2170-03-01 11:00:00", "tte", "lvef_3d", "33"), (1, "", "tte", "lvef", "44")):
        measured.append(f'{patient},7,{measured_at},{test},{name},"LV, ejection",{value},%')
    with gzip.open(src / "structured-measurement.csv.gz", "wt") as file:
        file.write("\n".join(measured) + "\n")
    call(mimic_iv_echo.main, f"--src={src}", f"--out={tmp_path / 'set'}", "--size=64", "--ecg=none", "--seed=4",
         "--val=0.3", "--test=0.3", "--workers=1")
    found, skipped = {}, ""
    for folder in (tmp_path / "set").iterdir():
        if folder.is_dir():
            patients = set()
            for clip in csv.DictReader(open(folder / "clips.csv")):
                found[clip["id"]] = clip["ef"], clip["text"]
                patients.add(clip["id"].split("/")[0])
            skipped += (folder / "skipped.txt").read_text()
            assert len(patients) == 1, "a patient in two splits, or both in one"
    assert found == {"p10000001/s90000001/90000001_0001": ("55.0", "EF 55"),
                     "p10000001/s90000002/90000002_0001": ("", ""),
                     "p10000002/s90000003/90000003_0001": ("33.0", "EF 33")}
    for reason in ("0002.dcm: colour Doppler", "0003.dcm: spectral Doppler", "0004.dcm: colour Doppler",
                   "0005.dcm: 1 frames", "0006.dcm: no such file", "0007.dcm: its header has no 2D picture",
                   "0008.dcm: not read as DICOM"):
        assert skipped.count(reason) == 3, reason
    refused("echo-record-list.csv: no such file", call, mimic_iv_echo.main, f"--src={tmp_path}", "--out=x")
    (src / "echo-record-list.csv").write_text("subject_id,file\n1,2\n")
    refused("no column study_id", call, mimic_iv_echo.main, f"--src={src}", "--out=x")


# ---------------------------------------------------------------------------- R peaks, disturbances, gaps

@pytest.mark.parametrize("name", ROWS)
def test_r_peak_table(name):
    """Beats lost beside a disturbance, or disturbances, T waves and pacing spikes taken for beats."""
    right, total, false = measure_row(name, range(300, 308))
    share, extra = {"white noise .3 mV": (.92, .04), "pacing spikes 4 mV": (.95, .03)}.get(name, (.97, 0))
    assert right >= share * total and false <= max(extra * total, 8 * ROWS[name], 1)


@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_undisturbed_ecgs_stay(rhythm):
    """An ectopic beat, a pause, a flat line or constant noise hidden: the model would not see what is there."""
    for seed in range(4):
        e = make_ecg(seed, 10, rhythm=rhythm, qt=0.8 + 0.2 * seed)
        noisy = e.ecg[:, 1] + np.random.default_rng(seed).normal(0, 0.3, len(e.ecg))
        for ecg in (e.ecg.T, e.ecg.T[1:2], noisy[None], np.zeros((1, 2500))):
            assert not find_disturbed(ecg).any()


def burst(seed=0, seconds=20, start=8, end=11, mv=20, leads=(0, 1)):
    """Two leads with a burst of noise between two seconds -> ecg without it, ecg with it, R peaks."""
    e = make_ecg(seed, seconds, hr=70)
    clean, ecg = e.ecg.T[list(leads)], e.ecg.T[list(leads)].copy()
    ecg[0, 250 * start:250 * end] += np.random.default_rng(seed).normal(0, mv, 250 * (end - start))
    return clean, ecg, e.r_peaks


def test_a_disturbance_is_hidden_and_sets_no_scale():
    """A burst of noise that the model sees, or that shrinks all beats of the recording to a flat line."""
    clean, ecg, r = burst()
    hidden = find_disturbed(ecg)
    assert hidden[250 * 8:250 * 11].all() and hidden.sum() < 250 * 3.6
    seen, wanted = clean_ecg(ecg), clean_ecg(clean)
    away = np.r_[0:250 * 7, 250 * 12:5000]
    assert np.abs(seen - wanted)[:, away].max() < 0.2 * wanted.max() and np.abs(seen).max() < 1.3 * wanted.max()
    pulse = clean.copy()
    pulse[:, 1000:1010] += 50
    step = clean.copy()
    step[:, 1000:] += 4
    for x in (pulse, step):                    # a step leaves no trace after itself
        assert find_disturbed(x)[1000:1002].all() and find_disturbed(x).sum() < 75
        assert np.abs(clean_ecg(x) - wanted)[:, 1100:].max() < 0.1 * wanted.max()


def test_pacing_spikes_are_taken_out_and_hide_nothing():
    """A pacemaker's spike that stays in the ECG, is taken for a beat, or hides the beat after it."""
    e = make_ecg(1, 10, hr=70)
    paced = e.ecg.T[1:2].copy()
    paced[:, ((e.r_peaks[e.r_peaks > 0.2] - 0.18) * 250).round().astype(int)] += 4
    assert not find_disturbed(paced).any()
    assert np.abs(clean_ecg(paced) - clean_ecg(e.ecg.T[1:2])).max() < 0.3
    assert np.allclose(find_r_peaks(paced), find_r_peaks(e.ecg.T[1:2]), atol=0.01)


def test_gaps_in_a_signal():
    """NaN that reaches a filter (all becomes NaN), beats lost beside a gap, or a gap that is not hidden."""
    clean, ecg, r = burst()
    ecg[:, 2000:2750] = np.nan
    hidden, cleaned = find_disturbed(ecg), clean_ecg(ecg)
    assert hidden[2000:2750].all() and hidden.sum() < 850 and np.isfinite(cleaned).all()
    found, far = find_r_peaks(ecg), r[(r < 7.8) | (r > 11.2)]
    assert all(np.abs(found - beat).min() < 0.03 for beat in far)
    assert abs(cleaned[:, ~hidden].std() - 1) < 0.01
    assert np.isnan(extend_periodic(ecg, -500, 6000)).any(0).sum() >= 750
    for x in (np.full((2, 300), np.nan), np.full((1, 100), np.nan), np.zeros((1, 20))):
        assert len(find_r_peaks(x)) == 0 and np.isfinite(clean_ecg(x)).all()
    ends = clean.copy()                         # gaps at both ends, of one lead alone
    ends[0, :500] = ends[1, -500:] = np.nan
    assert find_disturbed(ends)[[0, 499, 4500, 4999]].all() and np.isfinite(clean_ecg(ends)).all()


@pytest.mark.parametrize("seconds", [0.4, 0.9, 3])
def test_short_traces(seconds):
    """A trace of one beat that is too short for a filter or a median, or whose beat is not found."""
    e = make_ecg(3, 10, hr=70)
    begin = round((e.r_peaks[2] - 0.2) * 250)
    ecg = e.ecg.T[:2, begin:begin + round(250 * seconds)]
    assert np.abs(find_r_peaks(ecg) - 0.2).min() < 0.03 and not find_disturbed(ecg).any()
    assert np.allclose(find_r_peaks(1e-3 * ecg), find_r_peaks(ecg))


def test_training_hides_what_is_disturbed(tmp_path):
    """A training that sees an artefact or a gap, as input or beside the anchor, or that loses its other draws."""
    _, ecg, _ = burst(seconds=6, start=2, end=4)
    ecg[:, 300:350] = np.nan
    writer = Writer(tmp_path / "train")
    writer.add(id="a", fps=25, video=np.zeros((100, 8, 8, 1), np.uint8), ecg=ecg.T, ecg_offset_s=-1)
    writer.close()
    meta = dict(name="x", fps=25, height=8, width=8, channels=1, leads=["I", "II"], ecg_hz=250)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    clips = Clips(tmp_path, "train")
    make = lambda **how: RandomWindows(clips, 11, ecg_samples=600, clean=clean_ecg, anchor_seconds=(.2, .4),
                                       leads="I,II", **how)
    hidden, anchors = 0, 0
    for n in range(20):
        item, plain = make(find_disturbed=find_disturbed)[n], make()[n]
        assert torch.equal(item["ecg"], plain["ecg"]) and "ecg_disturbed" not in plain
        assert item["ecg_disturbed"].shape == (600,) and item["ecg_disturbed"].dtype == torch.bool
        assert torch.isfinite(item["ecg"]).all() and torch.isfinite(item["anchor_ecg"]).all()
        hidden += item["ecg_disturbed"].float().mean().item() / 20
        anchors += (item["anchor_ecg"] == 0).all(0).any().item()
    assert 0.2 < hidden < 0.8 and anchors > 3
    ecgs, disturbed = aligned_ecg(clips, [0], [0, 1], 0, 4)
    assert ecgs.shape == (1, 2, 1000) and disturbed.shape == (1, 1000) and disturbed[0, 250:750].all()


def test_evaluation_hides_what_is_disturbed(tiny, monkeypatch):
    """A clip of a batch that is generated with the ECG, or the disturbance, of another clip than its condition says."""
    calls = []
    monkeypatch.setattr(evaluate, "stream_video",
                        lambda *models, **given: calls.append(given) or [torch.zeros(2, 1, 8, 4, 4)])
    ecg, own = np.ones((2, 1, 500)), np.zeros((2, 500), bool)
    own[1, 100:200] = True
    inputs = evaluate.Inputs(AlignedEcg(ecg, own), AlignedEcg(2 * ecg, ~own), [1], 0.0, None)
    evaluate.generate_conditions(evaluate.EvalConfig(), (tiny.tokenizer, tiny.encoder, tiny.generator), inputs,
                                 torch.zeros(2, 1, 8, 4, 4), fps=25, seed=0, conditions=["own", "swapped", "flat"])
    hidden = [call["hidden"] for call in calls]
    assert (hidden[0] == own).all() and (hidden[1] == ~own).all() and not np.any(hidden[2])
    assert [np.unique(call["ecg"]).tolist() for call in calls] == [[1], [2], [0]]


def test_training_masks_the_disturbed_samples():
    """A loss that changes with what is under the ECG mask: the model would learn from artefacts."""
    batch = {"fps": torch.tensor([25.]), "ecg": torch.zeros(1, 1, 600), "leads": torch.tensor([0]),
             "ecg_disturbed": torch.arange(600)[None] < 100, "ecg_start": torch.zeros(1)}
    assert train_generator.known_of(batch)["ecg_hidden"] is batch["ecg_disturbed"]
    two = {name: torch.cat([x, x]) for name, x in batch.items()}
    two["ecg_disturbed"][1] = False
    assert train_generator.with_wrong_ecg(two)["ecg_disturbed"][1, :100].all()


def test_sample_hides_what_is_disturbed(tmp_path, capsys):
    """sample.py that shows the model an artefact or a gap, or does not say that it hides one."""
    _, ecg, _ = burst(seconds=8, start=2, end=4)
    np.save(tmp_path / "x.npy", ecg)
    config = sample.SampleConfig(ecg=str(tmp_path / "x.npy"), ecg_hz=250, ecg_leads="I,II", frames=100, hide="0.5,1")
    trace = sample.load_trace(config, 2, 0)
    hidden = sample.hidden_samples(config, trace)
    times = trace.start + np.arange(len(hidden)) / 250
    assert hidden[(times > 2.01) & (times < 3.99)].all() and hidden[(times >= 0.5) & (times < 1)].all()
    assert not hidden[(times > 1.05) & (times < 1.8)].any() and "hidden from the model" in capsys.readouterr().err
    quiet = sample.load_trace(sample.SampleConfig(), 2, 0)
    assert not quiet.disturbed.any() and not capsys.readouterr().err


# ---------------------------------------------------------------------------- ECG files

@pytest.mark.parametrize("name", ecg_files.TABLES)
def test_text_ecg(name, tmp_path):
    """A rate, a column of times or counts, a lead's name or a unit misread; the kind told by the name alone."""
    text, hz, leads, flags = ecg_files.TABLES[name]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    # dates cut to milliseconds know the rate of 10 s a little less well
    assert read_recording(path).hz == pytest.approx(hz, abs=3e-3 if name == "iso_ms.tsv" else 1e-3)
    rate = {"counted_mit": 360, "blanks": 360}.get(name, 500)
    ecg, found = read_ecg(path, ecg_hz=0 if hz else rate, **flags)
    assert found == leads and abs(ecg.shape[1] - 2500) < 6 and 0.2 < np.abs(ecg).max() < 4        # mV
    check_peaks(ecg, ecg_files.BEATS.r_peaks, 10, within=0.02)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("name", ["x.csv", "x.dat", "x", "x.log"])
def test_text_encodings(name, encoding, tmp_path, capsys):
    """A unit that is lost with its letter, so that an ECG of 5 mV is scaled to 1 mV; a kind told by its suffix."""
    text = ecg_files.rows(500, lambda k, t, a, b: f"{t:.3f};{5000 * a:.0f}", "Zeit [s];Ableitung I [µV]")
    (tmp_path / name).write_bytes(text.encode(encoding))
    ecg, leads = read_ecg(tmp_path / name)
    expected = ecg_files.ecg_at(500)[:, 0]
    assert leads == ["I"] and np.ptp(ecg) == pytest.approx(5 * np.ptp(expected), rel=0.05)
    assert not capsys.readouterr().err


def hole(start, end, hz=250, leads=(0, 1)):
    """(2, N) mV with NaN from start to end, seconds, in the leads."""
    ecg = ecg_files.ecg_at(hz).T.copy()
    ecg[list(leads), round(start * hz):round(end * hz)] = np.nan
    return ecg


def save_and_read(folder, ecg, hz):
    """read_ecg of an array in a .npy."""
    np.save(folder / "x.npy", ecg)
    return read_ecg(folder / "x.npy", hz)


@pytest.mark.parametrize("hz", [250, 130, 500])
def test_gaps(hz, tmp_path, capsys):
    """A record refused for three lost samples; NaN that spreads by resampling, or moves the other samples."""
    whole, leads = save_and_read(tmp_path, ecg_files.ecg_at(hz).T, hz)
    short, _ = save_and_read(tmp_path, hole(3, 3.15, hz, [0]), hz)
    assert np.isfinite(short).all() and "bridged" in capsys.readouterr().err
    far = np.abs(np.arange(2500) / 250 - 3.1) > 0.2
    assert np.abs(short - whole)[:, far].max() < 0.02
    # a longer one in one lead hides all leads, and no more than itself
    gap, _ = save_and_read(tmp_path, hole(3, 4, hz, [0]), hz)
    assert np.array_equal(np.isnan(gap[0]), np.isnan(gap[1])) and "hidden" in capsys.readouterr().err
    nan = np.flatnonzero(np.isnan(gap[0])) / 250
    assert 2.98 <= nan.min() <= 3.01 and 3.97 <= nan.max() <= 4.02 and len(nan) == pytest.approx(250, abs=3)
    far = np.abs(np.arange(2500) / 250 - 3.5) > 0.6
    assert np.nanmax(np.abs(gap - whole)[:, far]) < 0.02
    # a lead that is mostly missing is left out; a record that is, refused
    ecg, leads = save_and_read(tmp_path, hole(1, 8, hz, [0]), hz)
    assert leads == ["II"] and np.allclose(ecg[0], whole[1], atol=1e-5)
    refused("missing", save_and_read, tmp_path, hole(1, 8, hz), hz)


def test_gap_in_times(tmp_path, capsys):
    """Samples that the recorder left out closed up: every later beat comes too early. Empty cells refused."""
    lines = ecg_files.rows(250, lambda k, t, a, b: f"{t:.3f},{a:.4f},{b:.4f}").split("\n")
    (tmp_path / "x.csv").write_text("\n".join(["time,I,II", *lines[:500], *lines[750:]]))
    ecg, _ = read_ecg(tmp_path / "x.csv")
    assert ecg.shape == (2, 2500) and np.flatnonzero(np.isnan(ecg[0])).tolist() == list(range(500, 750))
    (tmp_path / "y.csv").write_text("time,I,II\n" + "\n".join(
        [*lines[:700], *(f"{k / 250:.3f},," for k in range(700, 705)), *lines[705:]]))
    ecg, _ = read_ecg(tmp_path / "y.csv")
    assert ecg.shape == (2, 2500) and np.isfinite(ecg).all()
    (tmp_path / "z.csv").write_text("\n".join(["time,I,II", *lines[:200], "9999,1,1", *lines[200:]]))
    refused("rise evenly", read_ecg, tmp_path / "z.csv")


def test_wfdb_by_any_name(tmp_path):
    """A user who names REC.dat, or REC; two segments with a gap between them; signals of unknown leads."""
    wfdb = pytest.importorskip("wfdb")
    mv = ecg_files.ecg_at(250)
    mv[700:1000] = np.nan
    wfdb.wrsamp("rec", 250, ["mV"] * 2, ["MLII", "V5"], mv, fmt=["16"] * 2, write_dir=str(tmp_path))
    by_name = [read_ecg(tmp_path / name) for name in ("rec.hea", "rec.dat", "rec")]
    for ecg, leads in by_name:
        assert leads == ["II", "V5"] and np.array_equal(ecg, by_name[0][0], equal_nan=True)
        assert np.flatnonzero(np.isnan(ecg[0])).tolist() == list(range(700, 1000))
    wfdb.wrsamp("two", 250, ["mV", "mmHg"], ["MCL1", "ABP"], ecg_files.ecg_at(250), fmt=["16"] * 2, write_dir=str(tmp_path))
    assert read_ecg(tmp_path / "two.hea")[1] == ["I"]
    assert read_ecg(tmp_path / "two.hea", leads=["V1"])[1] == ["V1"]
    wfdb.wrsamp("col", 250, ["mV"] * 2, ["ECG 1", "ECG_2"], ecg_files.ecg_at(250), fmt=["16"] * 2, write_dir=str(tmp_path))
    refused("pass --ecg_leads=", read_ecg, tmp_path / "col.hea")
    refused("3 names", read_ecg, tmp_path / "col.hea", 0, ["I", "II", "III"])
    assert read_ecg(tmp_path / "col.hea", leads=["II", "V2"])[1] == ["II", "V2"]
    (tmp_path / "big.hea").write_text("big/2 1 250 9000000000\nbig_1 1000\n~ 8999999000\n")
    (tmp_path / "big_1.hea").write_text("big_1 1 250 1000\nbig.dat 16 200/mV 16 0 0 0 0 II\n")
    (tmp_path / "big.dat").write_bytes(bytes(2000))
    refused("promises", read_ecg, tmp_path / "big.hea")


@pytest.mark.parametrize("name", ecg_files.DEVICES)
def test_device_files(name, tmp_path, capsys):
    """A wrong unit, lead or rate out of ecgdatakit: 499.31 Hz rounded to 499, a lost value as a peak of -164 mV."""
    pytest.importorskip("ecgdatakit")
    content, hz, leads = ecg_files.DEVICES[name]
    (tmp_path / name).write_bytes(content)
    assert read_recording(tmp_path / name).hz == pytest.approx(hz, abs=1e-3)
    ecg, found = read_ecg(tmp_path / name)
    assert found == leads
    if name == "part":
        return
    expected = ecg_files.ecg_at(250)[:, :len(leads)].T
    assert np.abs(ecg[:, 100:2400] - (expected - np.median(expected, 1, keepdims=True))[:, 100:2400]).max() < 0.08
    check_peaks(ecg, ecg_files.BEATS.r_peaks, 10, within=0.02)
    assert "scaled" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ecg_files.MISTAKEN)
def test_no_ecg_is_one_line(name, tmp_path):
    """A traceback, or a pickle opened, where a file is no ECG; an XML file that grows in memory."""
    pytest.importorskip("ecgdatakit")
    content, reason = ecg_files.MISTAKEN[name]
    if content is None:
        np.save(buffer := io.BytesIO(), np.full(900, np.inf))
        content = buffer.getvalue()
    (tmp_path / name).write_bytes(content)
    refused(reason, read_ecg, tmp_path / name, 0 if name.endswith("csv") and name != "back.csv" else 250)


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    """A traceback where the optional reader is not installed."""
    monkeypatch.setitem(sys.modules, "ecgdatakit.parsing", None)
    (tmp_path / "x").write_bytes(ecg_files.muse())
    refused("pip install ecgdatakit", read_ecg, tmp_path / "x")


def test_pleth_is_no_ecg(tmp_path):
    """The only signal of a record taken for lead I although it is a pulse wave."""
    (tmp_path / "x.csv").write_text(ecg_files.rows(250, lambda k, t, a, b: f"{a:.3f}", "PLETH"))
    refused("'PLETH': no lead", read_ecg, tmp_path / "x.csv", 250)
    assert ".mwf" in READERS and ".CSV".lower() in READERS and set(LEADS) > {"I"}


def arrivals(hz=130, n=3900):
    """{case: (times of samples, how many are missing)}."""
    rng, t = np.random.default_rng(0), np.arange(n) / hz
    in_order = np.maximum.accumulate
    packets = np.repeat(t[12::13] + rng.uniform(0, 0.05, n // 13), 13)
    late = t.copy()
    late[2000:2003] = late[2003]
    return {"jitter": (in_order(t + rng.random(n) / hz), 0), "delays": (in_order(t + rng.exponential(1 / hz, n)), 0),
            "packets": (packets, 0), "packets_spread": (packets + 1e-4 * (np.arange(n) % 13), 0),
            "gap": (np.delete(t, range(1000, 1300)), 300), "late": (late, 0), "cut_to_ms": (np.floor(1e3 * t) / 1e3, 0),
            "gaps": (np.delete(t, (np.arange(20)[:, None] * 170 + 100 + np.arange(10)).ravel()), 200),
            "to_10_ms": (np.round(t, 2), 0), "seconds": (np.floor(t), 0), "back": (np.concatenate([t, t]), None),
            "random": (np.cumsum(rng.exponential(1 / hz, 20 * n)), None), "still": (0 * t, None)}


@pytest.mark.parametrize("case", arrivals())
def test_rate_of_uneven_times(case):
    """Packets or late samples taken for gaps, gaps for packets: a rate that is wrong by some percent, unseen."""
    times, missing = arrivals()[case]
    found = fit_rate(np.diff(times), is_date=True)
    if missing is None:
        assert found is None
    else:
        assert found.hz == pytest.approx(130, rel=1e-3) and found.position[-1] + 1 - len(times) == missing


# ---------------------------------------------------------------------------- the ECG on the screen

# What each machine draws, and how its frames come
LOOKS = {
    "sweep, green": dict(kind="sweep", clutter=("rate", "ticks")),
    "sweep over the sector, white": dict(kind="sweep", colour="white", place="over", line=2, fps=30),
    "sweep, few frames": dict(kind="sweep", colour="cyan", fps=8, seconds=4, gap=25),
    "cursor, yellow": dict(kind="cursor", colour="yellow", marker="bar", clutter=("r_marks",)),
    "cursor, dot": dict(kind="cursor", colour="green", marker="dot", fps=20),
    "scroll, blue": dict(kind="scroll", colour="blue", clutter=("breath",)),
    "scroll over the sector, many frames": dict(kind="scroll", place="over", fps=60, seconds=2),
    "scroll, half transparent": dict(kind="scroll", place="within", alpha=0.7, line=2),
    # The curved edge of the sector and a breath are lines, too
    "cursor across the edge of the sector": dict(kind="cursor", colour="yellow", place="edge", alpha=0.55, line=2,
                                                 marker_colour="white", clutter=("breath",)),
    "cursor upon a bright sector": dict(kind="cursor", place="edge", alpha=0.5, fps=15, gain=1.4, marker_colour="white"),
    "sweep, white upon speckle": dict(kind="sweep", colour="white", place="within", alpha=0.55, line=2, fps=30, seconds=4,
                                      height=60, width=480, gain=1.2),
    "sweep, white across the edge": dict(kind="sweep", colour="white", place="edge", alpha=0.5, line=2, fps=30, seconds=4,
                                         height=60, width=480, gain=1.2),
}
NO_STRIP = {
    "no trace": dict(kind="none", clutter=("rate", "ticks")),
    "a breath": dict(kind="sweep", only_breath=True),
    "it stands still": dict(kind="frozen"),
    "it leaves the screen": dict(kind="sweep", leaves=True),
}


@pytest.mark.parametrize("name", LOOKS)
def test_screen_ecg(name):
    """An ECG off the screen that is late, has beats of its own, or is read in the wrong way."""
    look = screen_cines.Look(**LOOKS[name])
    frames, times, r_peaks, strip = screen_cines.draw_cine(look, seed=7)
    found = read_screen_ecg(frames, times)
    assert found.kind == look.kind and 0 < found.confidence <= 1
    at = found.start_s + find_r_peaks(np.nan_to_num(found.ecg)[None])
    inside = r_peaks[(r_peaks > 0.05) & (r_peaks < times[-1] - 0.05)]
    assert len(inside) and all(np.abs(at - beat).min() <= 0.02 for beat in inside)
    assert all(np.abs(r_peaks - beat).min() < 0.05 for beat in at if 0.05 < beat < times[-1] - 0.05)
    # The R peaks are 1 mV, and the rows of the strip can be made black.
    assert 0.7 < np.nanmax(found.ecg) < 1.6
    x0, y0, x1, y1 = found.strip
    assert strip[1] - 12 <= y0 < y1 <= strip[3] + 30
    assert not erase_strip(frames, found.strip)[:, y0:y1].any()


def test_colours_blur_the_right_edge():
    """A thin trace whose colour ends 8 pixels before its brightness, as JPEG stores it: all R peaks come 90 ms late."""
    counts = screen_table.measure_cine(87, seed=304)
    assert counts["hit"] == counts["beats"] == 4 and not counts["invented"]


def test_breath_beside_the_ecg():
    """A breath taller than the ECG that is taken for it, or that keeps the beats between two S waves that it touches."""
    u = np.arange(800)
    ecg = np.full(800, 40.0)
    for peak in range(60, 800, 90):
        ecg[peak - 3:peak + 8] = [33, 25, 17, 12, 17, 25, 33, 43, 48, 48, 43]       # R and S waves
    breath = 102 - 42 * np.cos(2 * np.pi * u / 400)
    image = np.zeros((800, 150), np.float32)
    for rows in (ecg, breath):
        ends = np.sort([rows, np.roll(rows, -1)], 0).astype(int)
        for k in u:
            image[k, ends[0, k]:ends[1, k] + 2] = 100
    rows = trace_ecg(image, pace=100).rows
    assert np.isfinite(rows).all() and np.abs(rows - ecg).mean() < 2

    # Two paths that change lines at the S waves of the second and the fifth beat
    breath = 52 + 2 * np.sin(2 * np.pi * u / 400)
    away = (u > 155) & (u < 425)
    lines = [Line(np.where(away, a, b), np.zeros((800, 150), bool), 100.0) for a, b in ((breath, ecg), (ecg, breath))]
    rows = take_back(*lines, pace=100).rows
    assert np.array_equal(rows[60:800:90], ecg[60:800:90]) and np.abs(rows - ecg).mean() < 0.2


def test_text_beside_the_line_is_no_heart_beat():
    """An R peak where the line that was followed goes over to a text, or T waves as tall as R taken for a text."""
    def drawn(rows):
        """A Line whose pixels go from each row to the next."""
        inked = np.zeros((600, 80), bool)
        for u, (a, b) in enumerate(zip(rows, np.roll(rows, -1))):
            inked[u, int(min(a, b)):int(max(a, b)) + 1] = True
        return Line(rows, inked, 100.0)

    rows = np.full(600, 50.0)
    rows[30::100] = rows[31::100] = rows[32::100] = 10                  # R waves
    for u in range(50, 600, 100):
        rows[u:u + 20] = 18                                             # T waves
    assert np.array_equal(leave_out_text(drawn(rows), pace=100), rows)
    with_text = rows.copy()
    with_text[533:575] = 12
    left = leave_out_text(drawn(with_text), pace=100)
    assert np.isnan(left[528:580]).all() and np.array_equal(left[:510], rows[:510])
    # A text as short as a T wave, to which the line jumps
    with_text = rows.copy()
    with_text[480:498] = 12
    line = drawn(with_text)
    line.inked[479, :48] = False
    left = leave_out_text(line, pace=100)
    assert np.isnan(left[480:498]).all() and np.array_equal(left[:460], rows[:460])


@pytest.mark.parametrize("name", NO_STRIP)
def test_no_ecg_on_the_screen(name):
    """An ECG that is invented where the screen shows none, or none that lasts."""
    look = screen_cines.Look(**NO_STRIP[name])
    frames, times, _, _ = screen_cines.draw_cine(look, seed=7)
    refused("no ECG is read off the screen", read_screen_ecg, frames, times)


@pytest.mark.parametrize("shape", [(27, 54, 108), (20, 5, 3, 3), (30, 120, 700, 3), (12, 700, 110), (1, 200, 300, 3)])
def test_screens_of_any_size(shape):
    """A traceback, which would end the preparation of all files, where a screen is small, low or narrow."""
    random = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for frames in (random, np.zeros_like(random)):
        refused("no ECG is read off the screen", read_screen_ecg, frames, np.arange(len(frames)) / 15)


# ---------------------------------------------------------------------------- EchoXFlow

def only_clip(src, rows, **flags):
    """The clip of the first recording of `rows`."""
    store.write_catalogue(src, rows)
    config = echoxflow.EchoxflowConfig(src=str(src), size=96, val=0, test=0, **flags)
    return echoxflow.make_clip(echoxflow.list_jobs(config)["train"][0], config)


@pytest.mark.parametrize("end, zarr_format", [("zarr", 3), ("zarr", 2), ("zarr.zip", 3)])
@pytest.mark.parametrize("geometry, depth, angle", [
    (store.GEOMETRY, 0.1, 0.2),
    (dict(depth_start_m=0.0, depth_end_m=0.2, tilt_rad=0.0, width_rad=1.6), 0.15, -0.6),
    (dict(DepthStart=0.04, DepthEnd=0.12, Tilt=-0.2, Width=0.5), 0.05, -0.3)])
def test_scan_conversion(end, zarr_format, geometry, depth, angle, tmp_path):
    """A picture mirrored, tilted the wrong way, squeezed, off by a pixel; a store that is not opened."""
    pytest.importorskip("zarr")
    meters = geometry if "tilt_rad" in geometry else dict(zip(store.GEOMETRY, geometry.values()))
    frames = np.tile(store.beam_spot(meters, depth, angle), (75, 1, 1))
    row = store.write_cine(tmp_path, "e", "a", end=end, zarr_format=zarr_format, geometry=geometry,
                     data__2d_brightness_mode=frames)
    picture = only_clip(tmp_path, [row])["video"][5, ..., 0].astype(float)
    # The square: as wide as the sector's box or as high, that box at the top and in the middle
    near, far, tilt, width = meters.values()
    edges = np.array([tilt - width / 2, 0, tilt + width / 2])
    x, y = np.outer([near, far], np.sin(edges)), np.outer([near, far], np.cos(edges))
    pitch = max(np.ptp(x), np.ptp(y)) / 96
    left, top = x.mean(where=(x == x.min()) | (x == x.max())) - 48 * pitch, y.min()
    at = np.array([depth * np.cos(angle) - top, depth * np.sin(angle) - left]) / pitch - 0.5
    bright = np.clip(picture - 60, 0, None)
    assert np.abs([(bright * n).sum() / bright.sum() for n in np.mgrid[:96, :96]] - at).max() < 0.3
    assert abs((picture > 20).sum() * pitch ** 2 / ((far ** 2 - near ** 2) * width / 2) - 1) < 0.02
    assert picture.max() > 180 and abs(np.median(picture[picture > 30]) - 40) < 2


def test_echoxflow_clip(tmp_path):
    """An ECG off the frames' clock; a gap that is filled; contours in the wrong frames or place."""
    pytest.importorskip("zarr")
    times = np.arange(-0.6, 3.6, 1 / 400)
    kept = (times < 1.35) | (times > 1.9)                               # a gap over the beat at 1.6 but one
    kept &= (times < 0.1) | (times > 0.2)                               # and one that is bridged
    row = store.write_cine(tmp_path, "e", "a", data__ecg=store.spikes(times)[kept], timestamps__ecg=store.CLOCK + times[kept])
    clip = only_clip(tmp_path, [row, store.write_strain(tmp_path, "e", "a", "4ch")])
    ecg, start = clip["ecg"][:, 0], clip["ecg_offset_s"]
    at = start + np.arange(len(ecg)) / 250
    unknown = at[np.isnan(ecg)]
    assert abs(start + 0.6) < 1e-4 and abs(unknown[0] - 1.35) < 0.006 and abs(unknown[-1] - 1.9) < 0.006
    assert len(unknown) == np.sum((at >= unknown[0]) & (at <= unknown[-1])) and np.nanmax(np.abs(ecg)) < 1.02
    for beat in (-0.4, 0.4, 1.2, 2.0, 2.8):
        near = np.abs(at - beat) < 0.1
        assert abs(at[near][np.nanargmax(ecg[near])] - beat) <= 0.004
    assert np.allclose(clip["r_peaks_s"], store.BEATS, atol=0.002)
    assert (clip["fps"], clip["view"], clip["text"]) == (25, "A4C", "A4C view")
    traced = np.flatnonzero(clip["mask"][:, 0, 0] != UNTRACED)
    assert traced.tolist() == list(range(21, 45)) and (clip["mask"][0] == UNTRACED).all()
    mask = clip["mask"][30]
    pitch = 0.15 * (np.sin(0.7) + np.sin(0.5)) / 96
    assert abs(mask.sum() * pitch ** 2 / (np.pi * 0.02 ** 2) - 1) < 0.03
    row, column = np.argwhere(mask).mean(0)
    middle = 0.15 * (np.sin(0.7) - np.sin(0.5)) / 2
    assert abs((column + 0.5 - 48) * pitch + middle - 0.01) < pitch / 2
    assert abs((row + 0.5) * pitch + 0.01 * np.cos(0.7) - 0.08) < pitch / 2
    # Triggers of one heart cycle are no list of all R peaks
    strain = store.write_strain(tmp_path, "e", "a", "4ch", beats=store.BEATS[1:3])
    assert only_clip(tmp_path, [store.write_cine(tmp_path, "e", "a"), strain])["r_peaks_s"] == ""


def test_uneven_frames(tmp_path):
    """Uneven frame times that are averaged; a slow drift; --fps; an ECG that begins after frame 0."""
    pytest.importorskip("zarr")
    steps = np.where(np.arange(75) % 2, 0.02, 0.06)
    drift = np.where(np.arange(75) < 40, 0.041, 0.0395)
    for step, fps, even in ((steps, 0, False), (drift, 0, False), (np.full(75, 0.04), 0, True), (steps, 30.0, False)):
        times = np.cumsum(step) - step[0]
        grey = np.full((75, 280, 120), 20 + 60 * times[:, None, None])
        late = np.arange(0.5, 3.6, 1 / 250)
        row = store.write_cine(tmp_path, "e", "a", data__2d_brightness_mode=np.rint(grey).astype(np.uint8),
                         timestamps__2d_brightness_mode=store.CLOCK + times,
                         data__ecg=store.spikes(late), timestamps__ecg=store.CLOCK + late)
        clip = only_clip(tmp_path, [row], fps=fps)
        video = clip["video"][:, 40:60, 40:60].mean((1, 2, 3))
        assert abs(clip["fps"] - (fps or 74 / times[-1])) < 1e-3
        assert np.abs(video - 20 - 60 * np.arange(len(video)) / clip["fps"]).max() < 1
        assert abs(len(video) / clip["fps"] - 75 / 74 * times[-1]) < 0.06
        ecg = clip["ecg"][:, 0]
        assert np.isnan(ecg[:124]).all() and np.isfinite(ecg[126:]).all() and -0.004 < clip["ecg_offset_s"] <= 0
        assert abs(find_r_peaks(ecg[None, 126:])[0] + 126 / 250 + clip["ecg_offset_s"] - 1.2) <= 0.004


def test_echoxflow_set(tmp_path, capfd):
    """A damaged store that ends all or goes in; Doppler taken for B-mode; an exam in two splits."""
    pytest.importorskip("zarr")
    src, nan = tmp_path / "src", np.array([np.nan])
    t = np.float32(store.CLOCK + np.arange(75) / 25)
    bad = {
        "empty": (dict(data__ecg=np.zeros(0, np.float32), timestamps__ecg=np.zeros(0)), "its ECG is empty"),
        "flat": (dict(data__ecg=np.zeros(1680)), "its ECG is constant"),
        "late": (dict(timestamps__ecg=np.float32(store.CLOCK + 2.5 + np.arange(1680) / 400)), "covers 17 %"),
        "nan": (dict(timestamps__2d_brightness_mode=np.append(t[:-1], nan)), "1 of the times of its frames are NaN"),
        "back": (dict(timestamps__2d_brightness_mode=t[::-1].copy()), "do not rise"),
        "few": (dict(timestamps__2d_brightness_mode=t[:9]), "75 frames, 9 times"),
        "pause": (dict(timestamps__2d_brightness_mode=t + (np.arange(75) > 9)), "pause for 1.04 s"),
        "black": (dict(data__2d_brightness_mode=np.zeros((75, 8, 8), np.uint8)), "frames from 0 on are black"),
        "float": (dict(data__2d_brightness_mode=np.zeros((75, 8, 8))), "float64"),
        "plane": (dict(geometry=dict(depth_end_m=0.1)), "no geometry"),
        "mute": (dict(data__ecg=None, timestamps__ecg=None), "no ECG"),
    }
    rows = [store.write_cine(src, f"exam{i % 4}", f"r{i}", end=("zarr", "zarr.zip")[i % 2]) for i in range(8)]
    rows += [store.write_cine(src, "exam0", name, **change) for name, (change, _) in bad.items()]
    rows.append(store.write_cine(src, "exam0", "cut", end="zarr.zip"))
    cut = src / rows[-1]["zarr_path"]
    cut.write_bytes(cut.read_bytes()[:3000])
    rows.append(store.write_cine(src, "exam0", "lost"))
    pieces = [path for path in (src / "exam0/lost.zarr/data/2d_brightness_mode").rglob("*") if "c" in path.parts]
    max(path for path in pieces if path.is_file()).unlink()
    rows.append(rows[0] | dict(recording_id="gone", zarr_path="exam0/gone.zarr"))
    rows.append(rows[0] | dict(recording_id="colour", content_types=["2d_color_doppler"]))
    rows += [store.write_strain(src, "exam0", "r0", "4ch"), store.write_strain(src, "exam1", "r1", "2ch"), dict(exam_id="x")]
    rows.append(rows[-2] | dict(zarr_path="exam0/gone_strain.zarr", recording_id="gone_strain"))
    store.write_catalogue(src, rows)
    flags = [f"--src={src}", "--size=32", "--val=0.3", "--test=0.2", "--seed=5", "--workers=2"]
    call(echoxflow.main, *flags, f"--out={tmp_path / 'set'}")
    said = capfd.readouterr()
    assert all(text in said.out for text in ("An exam is not a patient", "not millivolts", "26 recordings, 22 of"))
    assert "1 recordings without exam" in said.err and "gone_strain.zarr: no such file" in said.err
    assert "Traceback" not in said.err
    splits = {split.name: Clips(tmp_path / "set", split.name) for split in (tmp_path / "set").iterdir()
              if (split / "video.npy").exists()}
    exams = [{clip["id"].split("/")[0] for clip in clips} for clips in splits.values()]
    assert sum(map(len, splits.values())) == 8 and sum(map(len, exams)) == len(set().union(*exams)) == 4
    views = {clip["id"]: clip["view"] for clips in splits.values() for clip in clips}
    assert views["exam0/r0"] == "A4C" and views["exam1/r1"] == "A2C" and views["exam2/r2"] == ""
    assert all(clips.per_frame("mask", 0).shape == (75, 32, 32) and clips.leads == ["II"] for clips in splits.values())
    skipped = "".join(path.read_text() for path in (tmp_path / "set").glob("*/skipped.txt")).splitlines()
    reasons = {name: reason for name, (_, reason) in bad.items()} | dict(cut="not read as a Zarr", gone="no such file",
                                                                            lost="are black: the store is not whole")
    assert len(skipped) == len(reasons)
    for name, reason in reasons.items():
        assert any(f"exam0/{name}." in line and reason in line for line in skipped), name

    call(echoxflow.main, *flags, f"--out={tmp_path / 'four'}", "--views=4ch")
    (clips,) = (Clips(tmp_path / "four", path.parent.name) for path in (tmp_path / "four").glob("*/clips.csv"))
    assert [clip["id"] for clip in clips] == ["exam0/r0"]


def test_echoxflow_refusals(tmp_path, monkeypatch):
    """A traceback in place of a line: no catalogue, a damaged one, none of a view, no zarr."""
    pytest.importorskip("zarr")
    refused("croissant.json", call, echoxflow.main, f"--src={tmp_path}")
    for text, reason in (("{", "not read as a catalogue"), ('{"recordSet": []}', "no recording"),
                         ("[]", "not read as a catalogue")):
        (tmp_path / "croissant.json").write_text(text)
        refused(reason, call, echoxflow.main, f"--src={tmp_path}")
    store.write_catalogue(tmp_path, [dict(exam_id="e", recording_id="r", zarr_path="r", content_types=["2d_brightness_mode"])])
    refused("none of --views=2ch", call, echoxflow.main, f"--src={tmp_path}", "--views=2ch")
    refused("a list of 4ch", call, echoxflow.main, f"--src={tmp_path}", "--views=A4C")
    monkeypatch.setattr(echoxflow, "find_spec", lambda name: None)
    refused("pip install zarr", call, echoxflow.main)


# ---------------------------------------------------------------------------- command lines

def test_sample_writes_what_it_says(weights, tmp_path):
    """A frame lost between the model and the files, or a report that does not describe them."""
    call(sample.main, f"--weights={weights}", f"--out={tmp_path}", "--frames=20", "--steps=2", "--seed=4")
    video, report = np.load(tmp_path / "sample.npy"), json.loads((tmp_path / "report.json").read_text())
    assert video.shape == (20, 64, 64, 1) and video.dtype == np.uint8
    assert all(len(imageio.v3.imread(tmp_path / f"sample.{kind}")) == 20 for kind in ("gif", "mp4"))
    assert report["frames"] == len(report["lv_area"]) == 20 and report["fps"] == 25 and report["seed"] == 4
    assert set("seconds r_peaks_s hr_bpm ed_frames es_frames ef weights device".split()) <= set(report)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "sample.gif", "sample.mp4", "sample.npy"}
    imageio.imwrite(tmp_path / "frame.png", np.pad(video[0, ..., 0], ((0, 0), (20, 20))))   # middle square
    first = sample.load_image(str(tmp_path / "frame.png"), 64, 1)
    assert torch.allclose(first[0, 0, 0] * 255, torch.from_numpy(video[0, ..., 0]).float(), atol=1)


def test_gif_has_the_colours_of_the_video():
    """Bands of grey in the echo, or a colour of the strip that its palette lacks."""
    echo = np.arange(64 * 64 * 4).reshape(64, 256, 1).repeat(3, 2) // 64 % 256      # every grey
    time = np.arange(500) / 100
    strip = picture.draw_strip(2.5, 5.0, time, 32 + 20 * np.sin(9 * time), np.array([1.0, 4.0]), 64, 256)
    drawn = np.concatenate([echo.astype(np.uint8), strip])
    shown = np.asarray(picture.index_grey(drawn, 64).convert("RGB")).astype(int)
    error = abs(shown - drawn)
    assert error[:64].max() <= 1 and error[64:].max() <= 40 and error[64:].mean() < 1
    assert abs(np.asarray(picture.index_colours(drawn).convert("RGB")).astype(int) - drawn).mean() < 1


def test_sample_writes_a_set(weights, tmp_path):
    """A set whose masks, ECGs or beats are another video's; a video that depends on the ones before it."""
    flags = [f"--weights={weights}", f"--out={tmp_path}", "--frames=20", "--steps=1", "--seed=3"]
    call(sample.main, *flags, "--num=2", "--masks=1")
    clips, report = Clips(tmp_path / "set", "train"), json.loads((tmp_path / "report.json").read_text())
    for i, report in enumerate(report["videos"]):
        assert np.array_equal(clips.per_frame("video", i), np.load(tmp_path / f"sample_{i}.npy"))
        assert clips.per_frame("mask", i).sum((1, 2)).tolist() == report["lv_area"]
        assert evaluate.r_peaks_of(clips, i).tolist() == report["r_peaks_s"]
        peaks = find_r_peaks(clips.ecg(i)) + clips[i]["ecg_offset_s"]
        assert set(report["r_peaks_s"]) == set(peaks[(peaks >= 0) & (peaks < 0.8)].round(3))
    assert RandomWindows(clips, 11, ecg_samples=600, clean=clean_ecg)[0]["ecg"].shape[-1] == 600
    refused("set exists already", call, sample.main, *flags, "--masks=1")
    call(sample.main, *flags, "--seed=4")
    assert np.array_equal(np.load(tmp_path / "sample.npy"), clips.per_frame("video", 1))


array = lambda *x: lambda path: np.save(path, np.array(*x), allow_pickle=True)
pickled = lambda path: path.write_bytes(b"\x80\x04]\x94(K\x01K\x02e.")      # [1, 2]
BAD = {"missing.csv": lambda path: None, "folder": Path.mkdir, "empty.csv": Path.touch, "pickle.npy": pickled,
       "words.csv": lambda path: path.write_text("1.0\n2.0\nhello\n" * 300), "pickle.pkl": pickled,
       "nan.npy": array([0.5, np.nan] * 450), "constant.npy": array([0.7] * 900),
       "short.npy": array([1, 2, 3.0]), "object.npy": array([{}, 1], object), "rate.npy": array(range(900))}


@pytest.mark.parametrize("name", BAD)
def test_bad_ecg_is_one_line(name, weights, tmp_path):
    """A traceback, or files half-written, where a user's ECG cannot be read."""
    BAD[name](path := tmp_path / name)
    hz = 0 if name == "rate.npy" or name.endswith(".csv") else 250
    refused(name, call, sample.main, f"--ecg={path}", f"--ecg_hz={hz}", f"--weights={weights}",
            f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_one_line(weights, tmp_path):
    """The same for flags, pictures and weights."""
    shutil.copytree(weights, cut := tmp_path / "cut")
    os.truncate(cut / "generator.pt", 5000)
    for bad in ("--frames=0", "--frames=ten", "--frame=3", "frames=3", "--fps=nan", "--num=0", "--overlap=4",
                "--steps=0", "--overlap=11", "--hide=2,1", "--hide=1", f"--weights={cut}",
                f"--weights={tmp_path}", f"--image={tmp_path}", f"--image={cut / 'generator.pt'}",
                f"--out={cut / 'generator.pt'}"):
        refused("", call, sample.main, f"--weights={weights}", f"--out={tmp_path / 'out'}", bad)
    assert not (tmp_path / "out").exists()
    refused("two seconds", call, sample.main, f"--weights={weights}", "--hide=1")
    refused("first argument", call, evaluate.main, "everything")
    stderr = run("sample.py", "--frames=0", f"--weights={weights}", code=2)        # and as a process
    assert stderr.count("\n") == 1 and "Traceback" not in stderr


def test_bad_settings_are_one_line(phantom, weights, tmp_path):
    """A value that makes no sense, accepted or ending in a traceback, in a training or an evaluation."""
    out = tmp_path / "out"
    for stage in TRAINERS:
        for bad in ("--batch=0", "--steps=-1", "--seed=-1", "--warmup=0", "--heads=5", "--ema=2", "--lr=-1",
                    "--log_every=0"):
            refused(bad.partition("=")[0], call, TRAINERS[stage].main, *train_flags(stage, phantom, weights, out), bad)
    generator_flags = train_flags("generator", phantom, weights, out)
    other = tmp_path / "other"                                  # a tokenizer of another grid
    call(train_tokenizer.main, *train_flags("tokenizer", phantom, "", other), "--steps=1", "--patch=16")
    shutil.copy(weights / "ecg_encoder.pt", other)
    for bad in ("--p_hide=2", "--leads=I,XX", "--hide_share=0.2", "--bits=14"):
        refused(bad.partition("=")[0], call, train_generator.main, *generator_flags, bad)
    refused("is for grid=8, its tokenizer or encoder has 4", call, train_generator.main,
            *train_flags("generator", phantom, other, out), f"--init_from={weights}")
    refused("--width", call, lv_segmenter.main, f"--data={phantom}", f"--out={out}", "--width=12")
    refused("has no ECG", call, train_generator.main, *generator_flags, "--condition=none", "--leads=I")
    refused("--samples", call, ecg_encoder.main, *train_flags("ecg_encoder", phantom, weights, out), "--samples=100")
    refused("--fps=0", call, sample.main, f"--weights={weights}", f"--out={out}", "--fps=0")
    refused("XX", call, evaluate.main, "ef", f"--data={phantom}", f"--weights={weights}", f"--out={out}", "--leads=I,XX")
    assert not out.exists()
    (tmp_path / "file").write_text("")
    refused("no folder", call, evaluate.main, "speed", f"--weights={weights}", f"--out={tmp_path / 'file/x'}")


def test_ecg_window_covers_the_frames(weights, tmp_path):
    """A training on windows longer than the ECG that the encoder sees."""
    run("-m", "sources.phantom", f"--out={tmp_path / 'slow'}", "--clips=2", "--val=2", "--test=1", "--frames=12", "--fps=4")
    refused("2.75 s", call, train_generator.main, *train_flags("generator", tmp_path / "slow", weights, tmp_path / "out"))
    refused("2.75 s", call, evaluate.main, "ef", f"--data={tmp_path / 'slow'}", f"--weights={weights}", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_leads_of_a_training(phantom):
    """--leads that does not fix the leads, or changes what else is drawn."""
    clips = Clips(phantom, "train")
    drawn, fixed = (RandomWindows(clips, 11, ecg_samples=600, clean=clean_ecg, seed=3, uniforms=5, leads=leads)
                    for leads in ("", "I,II,V2"))
    for n in range(6):
        assert fixed[n]["leads"].tolist() == [0, 1, 7] and fixed[n]["ecg"].shape == (3, 600)
        assert torch.equal(fixed[n]["video"], drawn[n]["video"]) and torch.equal(fixed[n]["uniform"], drawn[n]["uniform"])
    refused("no lead V9", lambda: RandomWindows(clips, 11, ecg_samples=600, clean=clean_ecg, leads="I,V9"))


def test_old_checkpoints_load(weights, tmp_path):
    """Weights under the names that parameters had before: they must load, and mean the same."""
    old = {"spatial_position": "place", "temporal_position": "order", "anchor_position": "order_anchor"}
    for stage, classes in (("tokenizer", (Tokenizer, TokenizerConfig)), ("generator", (Generator, GeneratorConfig))):
        saved = torch.load(weights / f"{stage}.pt")
        saved["model"] = {old.get(name, name): x for name, x in saved["model"].items()}
        assert "place" in saved["model"]
        torch.save(saved, tmp_path / f"{stage}.pt")
        before, after = (checkpoint.load_weights(folder, stage, *classes).state_dict() for folder in (weights, tmp_path))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_sample_imports_few_files():
    """sample.py that pulls in half of the project."""
    code = "import sys, sample; print(*[m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert 8 <= len([x for x in done.stdout.split() if x.startswith(str(HERE))]) <= 12


def test_flags():
    """A setting that --help or a preset does not reach."""
    flags = ["--preset=paper", "--dim=64", "--resume"]
    config = parse_flags(train_tokenizer.TrainConfig, train_tokenizer.PRESETS, flags)
    assert (config.dim, config.size, config.resume) == (64, 128, True)
    configs = sample.SampleConfig, evaluate.EvalConfig, ecg_encoder.TrainConfig, train_generator.TrainConfig
    assert all(set(field_comments(x)) == set(x.__dataclass_fields__) for x in configs)      # on every field


PAGES = [HERE / "README.md", HERE / "weights/README.md", *sorted((HERE / "docs").glob("*.md"))]
RECIPES = sorted((HERE / "recipes").glob("*.sh"))


def test_readme_is_true():
    """A file, an equation or a metric in the README that is not there; a README that grows."""
    readme = (HERE / "README.md").read_text()
    assert len(readme.split()) <= 1500
    assert all((HERE / name).exists() for name in re.findall(r"(?:\w+/)?\w+\.py\b", readme))
    table = "".join(re.findall(r"^\|.*", readme, re.M))
    for name in re.findall(r"`(\w+\.(?!py`)[\w.]+)`", table):
        resolve_name(name)
    code = "".join(path.read_text() for path in HERE.glob("*.py") if path.name != "test_all.py")
    for equation in range(1, 11):
        assert re.search(rf"# Eq\. {equation}\b", code), equation
        assert re.search(rf"Eq\. {equation},", table), equation
    keys = sum(map(list, evaluate.METRICS.values()), [])
    rows = re.findall(r"^\|.*\| (`[^|]*`) \|$", readme[readme.index("JSON key"):], re.M)
    assert len(rows) >= 10 and set(re.findall(r"`(\w+)`", "".join(rows[:10]))) <= set(keys)


def heading_anchor(heading):
    """The anchor that a web page makes of a Markdown heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(HERE).as_posix())
def test_links(page):
    """A link to a file, a heading or a picture that is not there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if target.suffix == ".md" and anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in map(heading_anchor, headings), link


def linked_lines():
    """(page, the link, what it should be) of every link to a line, [module.name](../module.py#L1)."""
    for page in PAGES:
        for link, name, path in re.findall(r"(\[([\w.]+)\]\(([\w./]+\.py)#L\d+\))", page.read_text()):
            last = name.split(".")[-1]
            scope = name.split(".")[-2] if name.split(".")[-2][0].isupper() else ""
            lines = (page.parent / path).read_text().splitlines()
            start = next((k for k, x in enumerate(lines) if re.match(rf"class {scope}\b", x)), 0) if scope else 0
            found = [k for k, x in enumerate(lines[start:], start + 1)
                     if re.match(rf"\s*(def|class) {last}\b|{last} = ", x)]
            assert found, f"{page.name}: no {name}"
            yield page, link, f"[{name}]({path}#L{found[0]})"


def test_links_to_lines():
    """A link that shows another function than it names; `python test_all.py --links` mends it."""
    links = list(linked_lines())
    wrong = [right for _, link, right in links if link != right]
    assert len(links) >= 15 and not wrong, "python test_all.py --links mends them"


def documented_commands(path):
    """(script or module, arguments) of each python command in a page or a recipe."""
    text = re.sub(r"\\\n", " ", path.read_text())
    text = re.sub(r"\"?\$\(scaled ([\d.]+)[^)]*\)\"?", r"\1", text)           # scaled 20 -> 20
    for line in text.splitlines():
        found = re.search(r"(?:python|torch\.distributed\.run|torchrun)\b.*?(?:-m ((?:sources|metrics)\.\w+)|(\w+)\.py)"
                          r"([ =].*|$)", line)
        if found and not re.match(r"\s*(#|echo)|.*(`| MODE )", line):
            module = found[1] or found[2]
            rest = re.split(r"\s[>|&;]|\s#", " " + found[3])[0]
            if "$ecg" not in line and module != "test_all":
                yield module, [x for x in shlex.split(rest) if x not in (")", ";")]


def config_of(module):
    """The settings and the presets of a script."""
    presets = getattr(module, "TRAIN_PRESETS", getattr(module, "PRESETS", None))
    own = [x for x in vars(module).values() if is_dataclass(x) and x.__module__ == module.__name__]
    named = {x.__name__: x for x in own if x.__name__.endswith("Config")}
    for name in ("TrainConfig", "EvalConfig", "SampleConfig"):
        if name in named:
            return named[name], presets
    return list(named.values())[-1], presets


def test_documented_commands_are_found():
    """A pattern that finds none of the commands, so that the next test could not fail."""
    assert sum(len(list(documented_commands(path))) for path in [*PAGES, *RECIPES]) >= 100


@pytest.mark.parametrize("path", [*PAGES, *RECIPES], ids=lambda path: path.relative_to(HERE).as_posix())
def test_documented_commands(path):
    """A flag in a page or a recipe that its script does not know, or a value that it does not take."""
    for name, argv in documented_commands(path):
        config, presets = config_of(resolve_name(name))
        argv = [x for x in argv if not re.match(r"--target_|--help|--links|--recipes", x)]
        if name == "evaluate":
            assert argv.pop(0) in (*evaluate.MODES, "tables"), path
        argv = [re.sub(r"=\$.*|=[A-Z]$", "=1", x) for x in argv if not x.startswith("$")]
        parse_flags(config, presets, [x for x in argv if x.startswith("--")])


def test_readme_commands_run(weights, tmp_path, monkeypatch):
    """A sample.py command of the README that does not run (here short, by tiny weights)."""
    e = make_ecg(0, 8).ecg[:, 1]
    (tmp_path / "watch.csv").write_text("\n".join(["Sample Rate,250 hertz", "Lead,Lead I", "Unit,mV", *map(str, e)]))
    np.save(tmp_path / "trace.npy", e[:200])
    imageio.imwrite(tmp_path / "frame.png", np.full((64, 64), 99, np.uint8))
    monkeypatch.chdir(tmp_path)
    commands = [argv for name, argv in documented_commands(HERE / "README.md") if name == "sample"]
    assert len(commands) >= 6
    for argv in commands:
        call(sample.main, *argv, f"--weights={weights}", "--frames=12", "--steps=1")


# ---------------------------------------------------------------------------- measures, the shipped weights

def test_measures():
    """A metric that a constant or a wrong curve would pass."""
    x, ssim = torch.rand(2, 1, 32, 32), image_quality.ssim
    assert torch.allclose(ssim(x, x), torch.ones(2)) and (ssim(x, torch.rand_like(x)) < 0.2).all()
    t = torch.arange(48, dtype=torch.float64)[:, None] / 48
    a = ((9 * t).sin() @ (7 * t * t).cos().T + 1) / 2
    b, c = a + 0.15 * (40 * t).sin() @ (31 * t).cos().T, 0.8 * a ** 2
    for x, y, stored in ((a, b, 0.702568), (a, c, 0.619820)):     # scikit-image, gaussian_weights, sigma 1.5
        assert ssim(x[None, None].float(), y[None, None].float()).item() == pytest.approx(stored, abs=1e-4)
    assert image_quality.rate_distortion_bound(np.eye(4), 8) == pytest.approx(2 ** -4)      # D = 2^(-2 R / n)
    y, x = np.mgrid[:64, :64] - 32.0
    ellipse = (x / 12) ** 2 + (y / 24) ** 2 < 1
    assert ejection_fraction.disk_volume(ellipse[None])[0] == pytest.approx(4 / 3 * np.pi * 12 * 12 * 24, rel=0.03)
    time, noise = np.arange(128) / 25, np.random.default_rng(0).standard_normal(128)
    area = 400 + 100 * np.cos(2 * np.pi * 1.2 * (time - 0.3)) + 4 * noise
    cycle = ejection_fraction.cardiac_cycle(area, area ** 1.5, 25)
    assert np.array(cycle["ed_frames"]) / 25 == pytest.approx(0.3 + np.arange(6) / 1.2, abs=0.05)
    assert cycle["ef"] == pytest.approx(100 * (1 - (300 / 500) ** 1.5), abs=4)
    assert ejection_fraction.cardiac_cycle(400 + 4 * noise, 400 + noise, 25)["ed_frames"] == []
    assert curves.lag_ms(np.roll(area, 5), area, 25) == pytest.approx(200, abs=10)


@pytest.mark.parametrize("mode, target, missed, figures", [
    ("reconstruction", "mse=9", "mse=1e-9", "mae psnr ssim codes_used codebook_perplexity rd_bound_mse"),
    ("segmenter", "clips=2", "clips=3", "dice ef_r2 ef_mae ef_rmse"),
    ("figure", "rows=9", "rows=1", "frames"),
    ("drift", "clips=2", "clips=3", "grey contrast area beat_recall_first ed_error_ms_median_last"),
    ("speed", "parameters_m=9", "parameters_m=0", "video_seconds generator_gflop encoder_share_of_matmul "
                                               "train_step_seconds"),
    ("ef", "clips=2", "clips=3", "ef_r2 ef_mae ef_rmse ef_r2_true ef_mae_true ef_mae_decoded diversity"),
    ("sync", "clips=2", "clips=3", "area_r_median area_r_traced_mean ed_error_ms_median ed_error_ms_p95 "
                                   "extra_beats shift_ms flat_swing hidden_amplitude hidden_r_visible clips "
                                   "device weights")])
def test_evaluate_modes(mode, target, missed, figures, phantom, weights, tmp_path, monkeypatch):
    """A mode that ends in a traceback, a figure that is missing, or a target that cannot fail."""
    monkeypatch.setattr(speed, "ENOUGH_S", 0)
    flags = [mode, f"--data={phantom}", f"--weights={weights}", f"--out={tmp_path}", "--steps=1"]
    flags += ["--num=2"] if mode == "drift" else []
    assert [call(evaluate.main, *flags, f"--target_{x}") for x in (target, missed)] == [0, 1]
    assert set(figures.split()) <= json.loads((tmp_path / f"eval_{mode}.json").read_text()).keys()


class Pooled(torch.nn.Module):
    """What stands for NVIDIA's detectors: the same interface, features of a few numbers."""

    def forward(self, x, return_features: bool = False, rescale: bool = False, resize: bool = False,
                resize_images: bool = True, return_lpips: bool = False):
        assert x.shape[1] == 3 and x.max() > 2
        if return_lpips:
            return x.flatten(1)[:, ::97] / 255
        x = x.flatten(2) / 255
        return torch.cat([x.mean(2), x.std(2)], 1)


def test_frechet(phantom, weights, tmp_path, capsys):
    """A distance that is not Fréchet's, also of singular covariances; a detector that is not asked; figures
    without one."""
    def features(x):
        found = frechet.Features()
        for part in torch.as_tensor(x).double().split(7):
            found.add(part)
        return found
    sides, shift = torch.tensor([[1.0, 2, 3], [2.0, 2, 1]]), torch.tensor([1.0, 0, -2])
    a, b = (3 ** 0.5 * torch.cat([s.diag(), -s.diag()]) for s in sides)         # mean 0, variances s^2
    assert frechet.frechet(features(a), features(b + shift)) == pytest.approx(1 + 4 + 1 + 4)
    for n in (400, 5):                                                          # 5: singular
        x, y = torch.randn(n, 8) @ torch.randn(8, 8), torch.randn(n, 8) + 0.5
        (m, A), (k, B) = ((v.mean(0).numpy(), np.cov(v.numpy(), rowvar=False, bias=True)) for v in (x, y))
        root = scipy.linalg.sqrtm(A.astype(complex) @ B).real
        expected = ((m - k) ** 2).sum() + np.trace(A + B - 2 * root)
        assert frechet.frechet(features(x), features(y)) == pytest.approx(expected, rel=1e-3)
        assert frechet.frechet(features(y), features(x)) == pytest.approx(expected, rel=1e-3)
        assert frechet.frechet(features(x), features(x)) == pytest.approx(0, abs=1e-4)
    x, y = torch.randn(2, 2000, 8)
    assert abs(frechet.kernel_distance(features(x), features(y))) < 0.02
    assert frechet.kernel_distance(features(x), features(y + 1)) > 1
    torch.jit.script(Pooled()).save(str(net := tmp_path / "net.pt"))
    flags = ["generation", f"--data={phantom}", f"--weights={weights}", f"--out={tmp_path}", "--steps=1"]
    call(evaluate.main, *flags, "--frames=12")
    assert "not computed (pass --i3d=...)" in capsys.readouterr().out
    asked = [f"--{kind}={net}" for kind in frechet.KINDS]
    assert call(evaluate.main, *flags, "--frames=12", *asked, "--target_fid=0") == 1
    found = json.loads((tmp_path / "eval_generation.json").read_text())
    assert found["fid"] > 0 and found["fvd"] > 0 and found["lpips"] > 0 and found["frames_compared"] == 24
    refused("10 frames or more", call, evaluate.main, *flags, "--frames=9", f"--i3d={net}")
    refused("TorchScript", call, evaluate.main, *flags, f"--vgg={phantom}/meta.json")
    call(evaluate.main, "tables", *flags[1:], "--frames=12", "--num=1")
    tables = (tmp_path / "tables.md").read_text()
    assert "| ECHOPulse, quoted | 0.85 | 2.5 | 2.9 |" in tables
    assert "| measured here, 1 clips | not computed | not computed | 0." in tables


def test_flops_of_the_parts():
    """Attention that is not counted, on a CPU; a part that goes on being measured."""
    layer, q, x = torch.nn.Linear(8, 3), torch.randn(1, 1, 5, 8), torch.randn(5, 8)
    linear, attention = 2 * 5 * 8 * 3, 2 * 2 * 5 * 5 * 8
    def run():
        layer(x)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        layer(x)
    with torch.no_grad():
        work = profiling.measure_parts(run, [(layer, "forward")], profiling.flops)
    assert work == [2 * linear + attention, 2 * linear] and "forward" not in vars(layer)


def test_flops_of_the_backward_pass():
    """Attention whose backward pass is not counted: FLOPs of a training step that are too few."""
    q, x, layer = torch.randn(1, 1, 5, 8, requires_grad=True), torch.randn(5, 8), torch.nn.Linear(8, 3)
    y = torch.nn.functional.scaled_dot_product_attention(q, q, q).sum() + layer(x).sum()
    with profiling.flops() as read:
        y.backward()
    # Of attention five products (the scores are computed again), of a layer on data that of its weight.
    assert read() == 5 * 2 * 5 * 5 * 8 + 2 * 5 * 8 * 3


def test_flops_of_a_video(tiny):
    """FLOPs of two windows that do not stand for those of a whole video."""
    models = tiny.tokenizer, tiny.encoder, tiny.generator
    methods = [(tiny.tokenizer, "encode"), (tiny.tokenizer, "decode"), (tiny.generator, "sample_tokens")]
    for frames in (11, 18):                                 # one window, three
        arguments = dict(ecg=np.zeros((1, 2, 2000)), leads=[0, 1], ecg_start=-2.4, frames=frames, fps=25,
                         decoding=DecodingConfig(steps=1))
        whole = profiling.measure_parts(lambda: speed.make_video(models, arguments), methods, profiling.flops)
        assert speed.video_costs(models, arguments, methods=methods, meter=profiling.flops, run_windows=2) == whole


def small_papers(monkeypatch):
    """Every paper preset of evaluate.py speed in tiny, and a CPU that runs each measurement once."""
    monkeypatch.setattr(speed, "ENOUGH_S", 0)
    monkeypatch.setitem(profiling.MATRIX_SIZE, "cpu", 64)
    stages = {"tokenizer": speed.tokenizer_stage, "ecg_encoder": ecg_encoder, "generator": speed.generator_stage}
    for stage, module in stages.items():
        monkeypatch.setitem(module.PRESETS, "paper", SMALL[stage])


@pytest.mark.parametrize("bits", (16, 32))
def test_speed_without_weights(bits, tmp_path, monkeypatch):
    """A key of mode speed that is missing or no number; another unit than its name says; --bf16=0 that a part
    does not see: two precisions under one name."""
    small_papers(monkeypatch)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    linear = torch.nn.functional.linear
    seen = set()
    def spy(x, *args):
        y = linear(x, *args)
        seen.add(y.dtype)
        return y
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    call(evaluate.main, "speed", "--preset=paper", f"--out={tmp_path}", "--train_batch=3", "--frames=12",
         "--steps=1", f"--bf16={bits == 16:d}")
    found = json.loads((tmp_path / "eval_speed.json").read_text())
    # In a video the tokenizer computes in float32, whatever the device.
    assert found["compute_bits"] == bits and training.ALLOW_BFLOAT16
    assert seen == ({torch.float32, torch.bfloat16} if bits == 16 else {torch.float32})
    # Only a GPU has an MFU, and only --compile seconds of compilation.
    nulls = {key for key in speed.KEYS if found[key] is None}
    assert nulls == {"mfu", "mfu_tokenizer", "compile_seconds"}
    assert all(found[key] > 0 for key in set(speed.KEYS) - nulls)
    assert found["tokens_per_s"] * found["window_shipped_seconds"] == pytest.approx(6 * 8 * 8, rel=1e-3)
    for stage in ("train", "train_tokenizer"):
        assert found[f"{stage}_clips_per_s"] * found[f"{stage}_step_seconds"] == pytest.approx(3, rel=1e-3)
    assert found["video64_seconds"] > found["window_shipped_seconds"] > found["forward_seconds"]


def test_a_measured_step_does_not_train(tiny, tmp_path):
    """A step that moves the weights: with each run the model that is measured is another one."""
    config = SimpleNamespace(train_batch=2, compile=False)
    device = torch.device("cpu")
    models = tiny.tokenizer, tiny.encoder, tiny.generator
    before = [copy.deepcopy(model.state_dict()) for model in models]
    works = speed.generator_training(config, models, device), speed.tokenizer_training(config, models[0], device)
    for work in works:
        cost = speed.measure_training(config, work, device)
        assert cost.seconds > 0 and cost.flop > 0 and cost.peak_memory > 0
    for model, old in zip(models, before):
        assert all(torch.equal(x, old[name]) for name, x in model.state_dict().items())
    refused("choose one of", call, evaluate.main, "speed", "--preset=big", f"--out={tmp_path}")
    refused("at least 1", call, evaluate.main, "speed", "--train_batch=0", f"--out={tmp_path}")


def test_bfloat16_only_where_it_is_fast(monkeypatch):
    """A CPU that computes in bfloat16 without instructions for it: a hundredth of the speed of float32."""
    for has, bits in (("amx_bf16", 16), ("avx512_bf16", 16), ("avx2", 32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
        with training.bfloat16(torch.device("cpu")):
            assert torch.nn.Linear(4, 4)(torch.ones(4)).dtype.itemsize == bits // 8


def test_shipped_tokens_and_size():
    """Weights that no longer fit the code: the tokens of a clip of the phantom, as they were when shipped."""
    assert sum(f.stat().st_size for f in (HERE / "weights").iterdir()) < 16 * 2 ** 20
    model = checkpoint.load_weights(HERE / "weights", *TOKENIZER).eval()
    video = as_video(make_clip((0, 2, 0), frames=11)["video"])[None]
    index = model.encode(video)
    assert index[0, 3, 3].tolist() == GOLDEN and (model.decode(index) - video).square().mean() < 0.01


@pytest.mark.skipif(not WATCH.exists(), reason="the recording is not there")
def test_real_ecg(tmp_path):
    """The heart does not follow a real ECG: a contraction for every R peak, none extra, within 80 ms."""
    call(sample.main, f"--ecg={WATCH}", "--frames=128", f"--out={tmp_path}")
    report = json.loads((tmp_path / "report.json").read_text())
    ed, r = np.array(report["ed_frames"]) / 25, np.array(report["r_peaks_s"])
    i, j = curves.match(r, ed)
    assert len(j) == len(ed) and set(np.flatnonzero((r > 0.15) & (r < 127 / 25 - 0.15))) <= set(i)
    assert len(ed) >= 5 and np.median(np.abs(r[i] - ed[j])) <= 0.08


# ---------------------------------------------------------------------------- python test_all.py --recipes, --links

def run_recipes():
    """Every recipe as a smoke run, in a temporary folder; prints the seconds of each."""
    for recipe in RECIPES:
        if recipe.name == "scale.sh":
            continue
        with tempfile.TemporaryDirectory() as folder:
            where = dict(DATASETS=f"{folder}/datasets", RUNS=f"{folder}/runs")
            began = time.time()
            code = subprocess.run(["bash", str(recipe)], cwd=HERE,
                                  env=os.environ | {"MINUTES_SCALE": "0.01"} | where).returncode
            print(f"== {recipe.name}: exit {code}, {time.time() - began:.0f} s", flush=True)
            if code:
                sys.exit(1)


def fix_links():
    """Set the line numbers of the pages' links to lines anew."""
    for page, link, right in list(linked_lines()):
        page.write_text(page.read_text().replace(link, right))


if __name__ == "__main__":
    {"--recipes": run_recipes, "--links": fix_links}[sys.argv[1]]()
