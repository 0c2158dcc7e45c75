"""Every test, on the CPU, without network: `python -m pytest test_all.py`. A docstring names the bug that it catches."""
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch

import ecg_encoder
import evaluate
import sample
import train_generator
import train_tokenizer
from data.clips import LEADS, Clips, RandomWindows, UserError, Writer, batches, cut_ecg, field_comments, parse_flags
from data.phantom import make_clip, make_ecg
from ecg_encoder import EcgConfig, EcgEncoder, MaskedAutoencoder, clean_ecg, find_r_peaks, load_st_mem, read_ecg
from generator import Generator, GeneratorConfig, condition, fill_in, guide, masked_share, stream_video
from tokenizer import LFQ, Tokenizer, TokenizerConfig, bits_to_index, index_to_bits, joint, patchify
from train_tokenizer import load_weights, model_config

HERE = Path(__file__).parent
TINY = dict(dim=32, heads=2, mlp_dim=64, depth_space=1, depth_time=1)
TINY_FLAGS = [f"--{k}={v}" for k, v in TINY.items()]
GOLDEN = [2701, 5714, 486, 451, 5366, 1209, 4864, 6317]     # one row of tokens by the shipped weights
torch.set_num_threads(2)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(**TINY)).eval()


@pytest.fixture
def stage2():
    torch.manual_seed(0)
    encoder = EcgEncoder(EcgConfig(dim=32, heads=2, mlp_dim=64, depth=1))
    return train_generator.Stage2(encoder, Generator(GeneratorConfig(dim=32, heads=2, mlp_dim=64, depth=1, ecg_dim=32)))


def ecg_condition(stage2, B=2, drop=None, seed=0):
    """A condition from noise in place of an ECG."""
    rng = torch.Generator().manual_seed(seed)
    ecg = torch.randn(B, 1, stage2.ecg_encoder.config.samples, generator=rng)
    start, fps = torch.full((B,), -1.0), torch.full((B,), 25.0)
    return condition(stage2.ecg_encoder, ecg, torch.tensor([1]), start, fps, drop)


def open_up(stage2):
    """The branch of the local ECG starts at zero; give it weight, as training does."""
    torch.nn.init.normal_(stage2.generator.local_out.weight)
    return stage2


# ---------------------------------------------------------------------------- tokenizer

def test_codes_to_indices_and_back():
    """A bit order that differs between the two directions, or an index outside the codebook."""
    index = torch.arange(2 ** 13)
    assert torch.equal(bits_to_index(index_to_bits(index, 13)), index)
    assert index_to_bits(torch.tensor(1), 13).tolist() == [1] + [-1] * 12         # bit 0 first


def test_joint_of_bits_is_in_index_order():
    """Codes of the joint that are not numbered as indices are: the entropy would still look right, guidance not."""
    bits = index_to_bits(torch.arange(8), 3)
    assert torch.equal(joint((bits > 0).float()), torch.eye(8))


def test_entropy_equals_brute_force():
    """The factorised entropies drift from the softmax over all codes that they stand for."""
    z = torch.randn(50, 6)
    found = LFQ(4, 6).entropies(z)
    p = (2 * z @ index_to_bits(torch.arange(64), 6).T).softmax(1)                 # N 2^6
    assert torch.allclose(found["entropy_sample"], -(p * p.log()).sum(1).mean(), atol=1e-4)
    assert torch.allclose(found["entropy_batch"], -(p.mean(0) * p.mean(0).log()).sum(), atol=1e-4)


def test_patchify_cuts_the_right_pixels():
    """Axes exchanged in the reshape: the picture would be scrambled between places or between time and place."""
    video = torch.arange(2 * 3 * 4 * 16 * 16).reshape(2, 3, 4, 16, 16)
    patches = patchify(video, 2, 8)
    assert patches.shape == (2, 2, 4, 3 * 2 * 8 * 8)
    assert torch.equal(patches[1, 1, 2], video[1, :, 2:4, 8:16, 0:8].flatten())


def test_later_frames_cannot_change_earlier_tokens(tokenizer):
    """Missing causal mask or mixed-up axes in the temporal attention, of the encoder and of the decoder."""
    video = torch.rand(2, 1, 11, 64, 64)
    late = video.clone()
    late[:, :, 9:] = torch.rand(2, 1, 2, 64, 64)
    h, changed = tokenizer.embed(video), tokenizer.embed(late)
    assert torch.equal(h[:, :5], changed[:, :5]) and not torch.equal(h[:, 5], changed[:, 5])
    index, other = tokenizer.encode(video), tokenizer.encode(late)
    assert torch.equal(index[:, :5], other[:, :5])
    other[:, 5] ^= 1
    a, b = tokenizer.decode(index), tokenizer.decode(other)
    assert torch.equal(a[:, :, :9], b[:, :, :9]) and not torch.equal(a[:, :, 9:], b[:, :, 9:])
    assert torch.equal(tokenizer.encode(video[:, :, :1]), index[:, :1])           # one frame is a clip of its own


def test_tokenizer_overfits_one_batch():
    """A broken straight-through gradient or decoder: the loss of one batch would stay."""
    torch.manual_seed(0)
    config = train_tokenizer.TrainConfig(**TINY)
    model, video = Tokenizer(model_config(config, TokenizerConfig)), torch.rand(2, 1, 3, 8, 8)
    video = torch.nn.functional.interpolate(video, (3, 64, 64))
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=3e-3), None
    for _ in range(100):
        loss, parts, _ = train_tokenizer.losses_of(config, model, video, 0)
        first = first or parts["mse"].item()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert parts["mse"] < 0.1 * first


# ---------------------------------------------------------------------------- generator

def test_guidance(stage2):
    """Guidance that does nothing: s = 1 must be the conditional pass, and the null context must differ from it."""
    both = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert torch.equal(guide(both, 1.0), both) and torch.equal(guide(both, 3.0), torch.tensor([[-3.0, -4.0]]))
    model, index = open_up(stage2), torch.randint(0, 8192, (2, 6, 8, 8))
    masked = torch.rand(index.shape) < 0.5
    told = model.generator.features(index, masked, ecg_condition(model))
    null = [model.generator.features(index, masked, ecg_condition(model, drop=torch.ones(2, dtype=torch.bool), seed=s))
            for s in (0, 1)]
    assert not torch.allclose(told, null[0], atol=1e-3)
    assert torch.equal(*null)                                   # nothing of the ECG is left under the null context
    drawn = [model.generator.propose(index, masked, ecg_condition(model), s, 1.0, torch.Generator().manual_seed(0))[0]
             for s in (1.0, 1.0 + 1e-6, 5.0)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_high_bits_follow_low_bits(stage2):
    """A joint that is not the chain rule's: probabilities of all codes must sum to one."""
    generator, x = stage2.generator, torch.randn(1, 1, 32)
    low = torch.arange(128)[None]
    p = generator.to_low(x).softmax(-1)[0, 0, :, None] * generator.high_logits(x.expand(1, 128, 32), low).softmax(-1)[0]
    assert p.numel() == 8192 and abs(p.sum().item() - 1) < 1e-4


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_sampling_fills_all_and_keeps_the_known(stage2, steps):
    """A mask token left after the last step, or a known token overwritten."""
    index, masked = torch.zeros(2, 6, 8, 8, dtype=torch.long), torch.ones(2, 6, 8, 8, dtype=torch.bool)
    index[:, :2], masked[:, :2] = torch.randint(0, 8192, (2, 2, 8, 8)), False
    calls = []
    propose = stage2.generator.propose
    stage2.generator.propose = lambda i, m, *a: (calls.append(m.sum(dim=(1, 2, 3))), propose(i, m, *a))[1]
    out = fill_in(stage2.generator, index.clone(), masked, ecg_condition(stage2), steps=steps,
                  rng=torch.Generator().manual_seed(0))
    assert torch.equal(out[:, :2], index[:, :2]) and len(calls) == steps
    assert (out[:, 2:] != 0).float().mean() > 0.99 and out.max() < 8192
    assert all(a[0] > b[0] and a[0] == a[1] for a, b in zip(calls, calls[1:]))      # fewer at every step


def test_time_alignment(stage2):
    """A latent frame that does not know its own part of the ECG: shifting the recording and its start by the same
    time must change nothing; shifting the start alone must."""
    model, index = open_up(stage2), torch.randint(0, 8192, (1, 6, 8, 8))
    masked, n = torch.ones_like(index, dtype=torch.bool), model.ecg_encoder.config.samples
    ecg, fps, leads = torch.randn(1, 1, n), torch.tensor([25.0]), torch.tensor([1])
    of = lambda e, start: model.generator.local_ecg(condition(model.ecg_encoder, e, leads, torch.tensor([start]), fps),
                                                    model.generator.frame_times(fps))
    moved = torch.roll(ecg, 25, -1)                             # 0.1 s later in the array
    assert torch.allclose(of(ecg, -1.0)[..., 50:-50], of(moved, -1.1)[..., 50:-50])
    assert not torch.allclose(of(ecg, -1.0), of(ecg, -1.1))
    assert model.generator.frame_times(fps)[0].tolist() == pytest.approx([0, .06, .14, .22, .30, .38])
    a, b = (model.generator.features(index, masked, ecg_condition(model, 1)._replace(ecg_start=torch.tensor([s])))
            for s in (-1.0, -0.9))
    assert not torch.allclose(a, b, atol=1e-3)


def test_masks():
    """Known frames masked, or a share that is not the cosine schedule's."""
    config, noise = train_generator.TrainConfig(), torch.rand(400, 3 + 6 * 64)
    masked = train_generator.choose_masked(config, noise, 6, 64)
    known = ~masked.any(-1)                                                        # B T
    assert masked.any(-1).any(-1).all()
    assert abs((~known[:, 0]).float().mean() - 0.15) < 0.06                        # nothing known
    share = train_generator.choose_masked(config, noise, 6, 64, known=1).float().mean((1, 2)) * 6 / 5
    assert torch.allclose(share, masked_share(noise[:, 1]), atol=0.01)


def test_generator_overfits_one_batch(stage2):
    """Logits that do not reach the loss, or a target that is not the token itself."""
    torch.manual_seed(0)
    index = torch.randint(0, 8192, (1, 6, 8, 8))
    masked, cond = torch.rand(index.shape) < 0.3, ecg_condition(stage2, 1)
    optimizer = torch.optim.AdamW(stage2.generator.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        losses.append(train_generator.masked_mean(stage2.generator(index, masked, cond._replace(z=cond.z.detach())),
                                                  masked))
        optimizer.zero_grad(), losses[-1].backward(), optimizer.step()
    assert losses[0] > 8 and losses[-1] < 2


def test_stream_has_every_frame_once(tokenizer, stage2):
    """A chunk too long or missing between two windows; a different video for the same seed."""
    ecg = np.random.default_rng(0).standard_normal((1, 1, 1000)).astype(np.float32)
    videos = [torch.cat(list(stream_video(tokenizer, stage2.ecg_encoder, stage2.generator, ecg, [1], 0.0, frames, 25,
                                          steps=2, overlap=5)), 2) for frames in (30, 30, 12)]
    assert videos[0].shape == (1, 1, 30, 64, 64) and torch.equal(videos[0], videos[1])
    assert torch.equal(videos[0][:, :, :12], videos[2])


# ---------------------------------------------------------------------------- training

@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A small prepared set, made by the command of the README."""
    out = tmp_path_factory.mktemp("datasets") / "phantom"
    run("-m", "data.phantom", f"--out={out}", "--clips=6", "--val=4", "--test=2", "--frames=32")
    return out


@pytest.fixture(scope="session")
def weights(phantom, tmp_path_factory):
    """A folder of tiny weights of all stages, each by the smallest real run of its script."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train_tokenizer_for(phantom, out, "--steps=4")
    run("ecg_encoder.py", f"--data={phantom}", f"--out={out}", "--steps=4", "--batch=4", *STAGE2_FLAGS[:4])
    run("evaluate.py", "segmenter", f"--data={phantom}", f"--out={out}", "--steps=4")
    train_generator_for(phantom, out, out, "--steps=4")
    return out


STAGE2_FLAGS = ["--dim=32", "--heads=2", "--mlp_dim=64", "--depth=1"]


def run(*args, code=0, env=None):
    """Run python on args in the project's folder; returns (stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "2"} | (env or {}))
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout, done.stderr


def train_tokenizer_for(data, out, *flags, launch=("train_tokenizer.py",)):
    run(*launch, f"--data={data}", f"--out={out}", "--batch=4", *TINY_FLAGS, *flags)


def train_generator_for(data, weights, out, *flags, launch=("train_generator.py",)):
    run(*launch, f"--data={data}", f"--weights={weights}", f"--out={out}", "--batch=4", *STAGE2_FLAGS, "--ecg_dim=32",
        *flags)


def log_lines(out, stage):
    """{step: loss} of the log, and its last line."""
    lines = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_resumed_equals_uninterrupted(stage, phantom, weights, tmp_path, monkeypatch):
    """State that --resume forgets (optimizer, EMA, place in the data): later losses would differ in the last bit."""
    module = {"tokenizer": train_tokenizer, "generator": train_generator}[stage]
    more = TINY_FLAGS if stage == "tokenizer" else [*STAGE2_FLAGS, "--ecg_dim=32", f"--weights={weights}"]
    flags = [f"--data={phantom}", "--batch=4", "--steps=6", "--log_every=1", "--eval_every=99", "--save_every=3", *more]

    def train(out, *extra, stop=None):
        def some(*args):
            for step, batch in enumerate(batches(*args)):
                if stop and step == stop:
                    raise KeyboardInterrupt                     # a crash two steps after the last save
                yield batch
        monkeypatch.setattr(module, "batches", some)
        monkeypatch.setattr(sys, "argv", [f"train_{stage}.py", f"--out={out}", *flags, *extra])
        module.main()

    train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop=5)
    train(tmp_path / "cut", "--resume")
    assert log_lines(tmp_path / "cut", stage) == log_lines(tmp_path / "whole", stage)
    a, b = (torch.load(tmp_path / name / f"{stage}_state.pt") for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 6
    assert all(torch.equal(a[k][w], b[k][w]) for k in ("model", "ema") for w in a[k])


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_two_ranks_equal_one_process(stage, phantom, weights, tmp_path):
    """Entropy or masked mean not over all ranks, the same data on both ranks, or gradients not averaged."""
    def train(out, batch, launch):
        flags = [f"--batch={batch}", "--steps=4", "--bf16=0", "--warmup=1"]
        if stage == "tokenizer":
            train_tokenizer_for(phantom, out, *flags, "--entropy_weight=1", launch=(*launch, "train_tokenizer.py"))
        else:
            train_generator_for(phantom, weights, out, *flags, launch=(*launch, "train_generator.py"))
        return torch.load(out / f"{stage}_state.pt")["model"]
    one = train(tmp_path / "one", 4, ())
    two = train(tmp_path / "two", 2, ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    size = lambda x: torch.cat([v.flatten().float() for v in x.values()]).norm()
    assert size({k: one[k] - two[k] for k in one}) < 1e-3 * size(one)
    assert log_lines(tmp_path / "two", stage)[0] == pytest.approx(log_lines(tmp_path / "one", stage)[0], rel=1e-4)


def test_checkpoint_cut_in_half_is_refused(weights, tmp_path):
    """A damaged or foreign file of weights that ends in a traceback."""
    whole = (weights / "tokenizer.pt").read_bytes()
    (tmp_path / "tokenizer.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_weights(tmp_path, "tokenizer", Tokenizer, TokenizerConfig)
    (tmp_path / "tokenizer.pt").write_bytes((weights / "generator.pt").read_bytes())
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_weights(tmp_path, "tokenizer", Tokenizer, TokenizerConfig)
    with pytest.raises(UserError, match="has dim=32, the flags say 128"):
        load_weights(weights, "tokenizer", Tokenizer, TokenizerConfig, TokenizerConfig())


# ---------------------------------------------------------------------------- data

def test_prepared_set(phantom):
    """A reader that mixes up clips, or a window whose ECG is not of its own time span."""
    clips = Clips(phantom, "train")
    assert len(clips) == 6 and clips.leads == list(LEADS) and clips.meta["ecg_hz"] == 250
    item = RandomWindows(clips, 11, 600, clean=lambda x: x, seed=3)[5]
    again = RandomWindows(clips, 11, 600, clean=lambda x: x, seed=3)[5]
    assert all(torch.equal(torch.as_tensor(item[k]), torch.as_tensor(again[k])) for k in item)
    i, start = item["clip"], None
    whole = clips.per_frame("video", i)
    video = (item["video"] * 255).round().byte().permute(1, 2, 3, 0).numpy()
    starts = [s for s in range(len(whole) - 10) if np.array_equal(whole[s:s + 11], video)]
    assert len(starts) == 1
    start, row = starts[0], clips[i]
    ecg, lead = clips.ecg(i), LEADS[item["leads"][0]]
    first = round((item["ecg_start"] + start / 25 - row["ecg_offset_s"]) * 250)
    assert np.array_equal(item["ecg"][0].numpy(), cut_ecg(ecg, first, 600)[LEADS.index(lead)])
    assert item["ecg_start"] < 0 < item["ecg_start"] + 600 / 250 - 10 / 25         # what lies around it, too


def test_damaged_set_is_refused(phantom, tmp_path):
    """A half-written set that is read as far as it goes."""
    with pytest.raises(UserError, match="python -m data.phantom"):
        Clips(tmp_path, "train")
    with pytest.raises(UserError, match="no split 'other'"):
        Clips(phantom, "other")
    copy = tmp_path / "copy"
    shutil.copytree(phantom, copy)
    video = (copy / "val/video.npy").read_bytes()
    (copy / "val/video.npy").write_bytes(video[:len(video) // 2])
    with pytest.raises(UserError, match="video.npy: damaged"):
        Clips(copy, "val")
    table = (copy / "test/clips.csv").read_text()
    (copy / "test/clips.csv").write_text(table.replace("frames", "fremes", 1))
    with pytest.raises(UserError, match="column 'frames' is missing"):
        Clips(copy, "test")
    with pytest.raises(UserError, match="exists already"):
        Writer(phantom, {})


def test_shards_are_one_split(tmp_path):
    """Clips of the second shard read from the first."""
    for shard in range(2):
        with Writer(tmp_path / f"set{shard}", {"leads": []}) as writer:
            for i in range(3):
                writer.add("train", video=np.full((4, 8, 8, 1), 10 * shard + i), id=f"{shard}-{i}", fps=25)
    (tmp_path / "set1/train").rename(tmp_path / "set0/train-00001")
    (tmp_path / "set0/train").rename(tmp_path / "set0/train-00000")
    clips = Clips(tmp_path / "set0", "train")
    assert [int(clips.per_frame("video", i)[0, 0, 0, 0]) for i in range(6)] == [0, 1, 2, 10, 11, 12]
    assert clips[4]["id"] == "1-1"


def test_phantom(phantom):
    """A heart out of step with its ECG, a mask that is not the volume's, or a seed that does not fix the bytes."""
    clip = make_clip((0, 2, 1), rhythm="sinus", hr=70, ef=60)
    assert np.array_equal(clip["video"], make_clip((0, 2, 1), rhythm="sinus", hr=70, ef=60)["video"])
    volume, area = clip["volume"], clip["mask"].sum((1, 2), dtype=float)
    assert np.corrcoef(volume, area)[0, 1] > 0.99
    peaks = [r for r in clip["r_peaks_s"] if 0.3 < r < 2.2]
    for r in peaks:                                             # largest at the R peak, EF as stated
        near = slice(round(25 * r) - 5, round(25 * r) + 6)
        assert abs((near.start + volume[near].argmax()) / 25 - r) <= 0.06
    assert len(peaks) >= 2 and abs(100 * (1 - volume.min() / volume.max()) - 60) < 3
    flat = make_clip(3, rhythm="flat")
    assert np.ptp(flat["volume"]) < 0.01 * flat["volume"].max() and not flat["r_peaks_s"]
    ecg = clip["ecg"]                                           # Einthoven and Goldberger
    assert np.allclose(ecg[:, 2], ecg[:, 1] - ecg[:, 0], atol=1e-5)
    assert np.allclose(ecg[:, 3], -(ecg[:, 0] + ecg[:, 1]) / 2, atol=1e-5)
    stored = Clips(phantom, "test")                             # the set is made of these clips
    assert np.array_equal(stored.per_frame("video", 1), make_clip((0, 2, 1), frames=32)["video"])


# ---------------------------------------------------------------------------- ECG

def ecg_file(path, seconds=8, hz=250, hr=70, seed=0):
    """An ECG of lead I and II (N, 2) in mV at hz, its R peaks in seconds."""
    e = make_ecg(seed, seconds, hr=hr, noise=0.3)
    return np.stack([np.interp(np.arange(seconds * hz) / hz, np.arange(len(e.ecg)) / 250, x) for x in e.ecg[:, :2].T],
                    1), e.r_peaks


def close_peaks(path, r_peaks, **how):
    """read_ecg finds the file's R peaks to within 20 ms; returns the leads."""
    ecg, leads = read_ecg(path, **how)
    inside = lambda x: x[(x > 0.3) & (x < 7.7)]
    assert np.allclose(inside(find_r_peaks(ecg)), inside(r_peaks), atol=0.02)
    return leads


def test_ecg_formats(tmp_path):
    """A rate, unit, decimal comma or lead name misread: beats at wrong times, or the wrong lead embedding."""
    at = lambda name, text: (tmp_path / name).write_text(text) and tmp_path / name
    x, r = ecg_file(tmp_path, hz=512)
    watch = "Name,\nMessrate,512,0 Hertz\nAbleitung,Ableitung I\nEinheit,µV\n\n"
    german = watch + "\n".join(f"{1000 * v:.3f}".replace(".", ",") for v in x[:, 0])
    assert close_peaks(at("german.csv", german), r) == ["I"]
    english = "Sample Rate,512 hertz\nLead,Lead I\nUnit,µV\n" + "\n".join(f"{1000 * v:.3f}" for v in x[:, 0])
    assert close_peaks(at("english.csv", english), r) == ["I"]
    a, b = (read_ecg(tmp_path / f"{name}.csv")[0] for name in ("german", "english"))
    assert np.array_equal(a, b) and 0.2 < np.abs(a).max() < 4                      # in mV
    table = "time,II,V5\n" + "\n".join(f"{i / 512:.5f},{v:.4f},{w:.4f}" for i, (w, v) in enumerate(x))
    assert close_peaks(at("table.csv", table), r) == ["II", "V5"]
    np.save(tmp_path / "trace.npy", x.astype(np.float32))
    assert close_peaks(tmp_path / "trace.npy", r, ecg_hz=512, leads=["I", "V2"]) == ["I", "V2"]


def test_wfdb_and_dicom(tmp_path):
    """The readers of other packages called wrongly; skipped where those are not installed."""
    wfdb, x = pytest.importorskip("wfdb"), ecg_file(tmp_path, hz=500)
    wfdb.wrsamp("rec", fs=500, units=["mV", "mV"], sig_name=["I", "II"], p_signal=x[0], fmt=["16", "16"],
                write_dir=str(tmp_path))
    assert close_peaks(tmp_path / "rec.hea", x[1]) == ["I", "II"]
    data = pytest.importorskip("pydicom.data")
    ecg, leads = read_ecg(data.get_testdata_file("waveform_ecg.dcm", download=False))
    assert leads == list(LEADS) and ecg.shape == (12, 2500) and len(find_r_peaks(ecg)) == 10


@pytest.mark.parametrize("hr", [45, 75, 140])
@pytest.mark.parametrize("leads", [[0], [1], range(12)])
def test_r_peaks(hr, leads):
    """A beat missed or one too many (T waves taken for beats, noise in a pause), or found beside its R peak."""
    e = make_ecg(hr, 20, hr=hr)
    inside = lambda x: x[(x > 0.3) & (x < 19.7)]
    found = inside(find_r_peaks(e.ecg.T[list(leads)]))
    assert len(found) == len(inside(e.r_peaks)) and np.abs(found - inside(e.r_peaks)).max() < 0.03


def test_clean_ecg():
    """A flat lead blown up to noise of unit size, or baseline wander left in."""
    time = np.arange(2500) / 250
    beats = make_ecg(0, 10, noise=0).ecg[:, 1]
    clean = clean_ecg(np.stack([beats, beats + np.sin(1.2 * time)]))
    assert abs(clean.std() - 1) < 1e-3 and np.corrcoef(clean)[0, 1] > 0.98
    assert clean_ecg(1e-3 * np.random.default_rng(0).standard_normal((1, 2500))).std() < 0.1


def test_ecg_encoder():
    """Leads mixed up, SEP left in the output, or masked patches that reach the encoder of the masked autoencoder."""
    torch.manual_seed(0)
    config = EcgConfig(dim=32, heads=2, mlp_dim=64, depth=1)
    encoder, ecg = EcgEncoder(config), torch.randn(2, 2, 600)
    assert encoder(ecg, torch.tensor([0, 1])).shape == (2, 2, 8, 32)
    a, b = encoder(ecg, torch.tensor([0, 1])), encoder(ecg.flip(1), torch.tensor([1, 0])).flip(1)
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, encoder(ecg, torch.tensor([0, 2])), atol=1e-3)
    model = MaskedAutoencoder(config)
    x, keep, mask = model.forward_encoder(ecg, torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert x.shape == (2, 2, 2 + 2, 32) and mask.float().mean() == 0.75
    hidden = torch.where(mask.repeat_interleave(75, 2), torch.randn_like(ecg), ecg)
    assert torch.equal(x, model.encoder.encode(hidden, torch.tensor([0, 1]), keep))


def test_st_mem_weights_load(tmp_path, monkeypatch):
    """Names of the released weights mapped to the wrong place: a checkpoint of its layout must load whole."""
    monkeypatch.setitem(ecg_encoder.PRESETS, "paper", small := dict(samples=2250, dim=32, depth=2, mlp_dim=64))
    ours, theirs = EcgEncoder(EcgConfig(**small)).state_dict(), {}
    for name, value in ours.items():
        if name == "lead":
            theirs |= {f"lead_embeddings.{i}": v for i, v in enumerate(value)}
        elif name == "positions":
            theirs["pos_embedding"] = value[None]
        elif ".attn.q." in name:
            theirs[name.replace("blocks.", "block").replace("attn.q", "attn.fn.to_qkv")] = torch.cat(
                [value, ours[name.replace(".q.", ".kv.")]])
        elif ".kv." not in name:
            for a, b in ((".norm1", ".attn.norm"), (".attn.out", ".attn.fn.to_out.0"), (".norm2", ".ff.norm"),
                         (".mlp.fc1", ".ff.fn.net.0"), (".mlp.fc2", ".ff.fn.net.3"), ("blocks.", "block"),
                         ("embed.", "to_patch_embedding.")):
                name = name.replace(a, b)
            theirs["sep_embedding" if name == "sep" else name] = value
    torch.save({"model": theirs}, tmp_path / "st_mem.pth")
    loaded = load_st_mem(tmp_path / "st_mem.pth").state_dict()
    assert all(torch.equal(loaded[k], ours[k]) for k in ours)


# ---------------------------------------------------------------------------- command lines

def call(monkeypatch, main, *args):
    """Run a script's main in this process."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, args)])
    return main()


def test_sample_writes_what_it_says(weights, tmp_path, monkeypatch):
    """A frame lost between the model and the files, or a report that does not describe them."""
    call(monkeypatch, sample.main, f"--weights={weights}", f"--out={tmp_path}", "--frames=20", "--steps=2", "--seed=4")
    video, report = np.load(tmp_path / "sample.npy"), json.loads((tmp_path / "report.json").read_text())
    assert video.shape == (20, 64, 64, 1) and video.dtype == np.uint8
    assert len(imageio.v3.imread(tmp_path / "sample.gif")) == len(imageio.v3.imread(tmp_path / "sample.mp4")) == 20
    assert report["frames"] == len(report["lv_area"]) == 20 and report["fps"] == 25 and report["seed"] == 4
    assert {"seconds", "r_peaks_s", "hr_bpm", "ed_frames", "es_frames", "ef", "weights", "device"} <= set(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "sample.gif", "sample.mp4", "sample.npy"]
    imageio.imwrite(tmp_path / "frame.png", np.pad(video[0, ..., 0], ((0, 0), (20, 20))))       # its middle square
    first = sample.load_image(str(tmp_path / "frame.png"), 64, 1)
    assert torch.allclose(first[0, 0, 0] * 255, torch.from_numpy(video[0, ..., 0]).float(), atol=1)


BAD = {
    "missing.csv": None, "folder": None, "empty.csv": b"", "words.csv": b"1.0\n2.0\nhello\n" * 300,
    "nan.npy": np.r_[np.random.rand(900), np.nan], "constant.npy": np.full(900, 0.7), "short.npy": np.random.rand(3),
    "pickle.npy": pickle.dumps([1, 2]), "pickle.pkl": pickle.dumps([1, 2]), "object.npy": np.array([{}, 1], object),
    "rate.npy": np.random.rand(900)}


@pytest.mark.parametrize("name", BAD)
def test_bad_ecg_is_one_line(name, weights, tmp_path, monkeypatch):
    """A traceback, or files half-written, where a user's ECG cannot be read."""
    content, path = BAD[name], tmp_path / name
    if name == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    flags = [] if name == "rate.npy" or name.endswith(".csv") else ["--ecg_hz=250"]
    with pytest.raises(UserError) as error:
        call(monkeypatch, sample.main, f"--ecg={path}", f"--weights={weights}", f"--out={tmp_path / 'out'}", *flags)
    assert "\n" not in str(error.value) and name in str(error.value) and not (tmp_path / "out").exists()


def test_other_bad_input_is_one_line(weights, tmp_path, monkeypatch):
    """The same for flags, pictures and weights."""
    cut, text = tmp_path / "cut", tmp_path / "text.png"
    shutil.copytree(weights, cut)
    (cut / "generator.pt").write_bytes((weights / "generator.pt").read_bytes()[:5000])
    text.write_text("no picture")
    for bad in ("--frames=0", "--frames=ten", "--frame=3", "frames=3", "--fps=nan", "--num=0", "--overlap=4", "--steps=0",
                "--overlap=11", f"--weights={cut}", f"--weights={tmp_path}", f"--image={text}", f"--image={tmp_path}",
                f"--out={text}"):
        with pytest.raises(UserError) as error:
            call(monkeypatch, sample.main, f"--weights={weights}", f"--out={tmp_path / 'out'}", bad)
        assert "\n" not in str(error.value), bad
    assert not (tmp_path / "out").exists()
    out, err = run("sample.py", "--frames=0", f"--weights={weights}", code=2)      # and as a process
    assert err.count("\n") == 1 and "Traceback" not in err
    with pytest.raises(UserError, match="first argument"):
        call(monkeypatch, evaluate.main, "everything")


def test_flags():
    """A setting that --help or a preset does not reach."""
    config = parse_flags(train_tokenizer.TrainConfig, train_tokenizer.PRESETS, ["--preset=paper", "--dim=64", "--resume"])
    assert (config.dim, config.size, config.resume) == (64, 128, True)
    for module in (sample.SampleConfig, train_generator.TrainConfig, ecg_encoder.TrainConfig, evaluate.EvalConfig):
        assert set(field_comments(module)) == {f.name for f in fields(module)}     # a comment on every field


def test_readme_is_true():
    """A file, an equation's function or a command in the README that is not there."""
    readme = (HERE / "README.md").read_text()
    for name in set(re.findall(r"`((?:data/)?\w+\.py)`", readme)):
        assert (HERE / name).exists(), name
    for module, path in re.findall(r"^\|.*`(\w+)\.(\w+(?:\.\w+)?)`", readme, re.M):
        thing = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
    for equation in (2, 4, 7, 8):
        assert any(f"# Eq. {equation}" in path.read_text() for path in HERE.glob("*.py")), equation


# ---------------------------------------------------------------------------- measures

def test_measures():
    """A metric that a constant or a wrong curve would pass."""
    x = torch.rand(2, 1, 32, 32)
    assert torch.allclose(evaluate.ssim(x, x), torch.ones(2)) and (evaluate.ssim(x, torch.rand_like(x)) < 0.2).all()
    assert evaluate.rate_distortion_bound(np.eye(4), 8) == pytest.approx(2 ** -4)      # D = 2^(-2 R / n)
    y, x = np.mgrid[:64, :64] - 32.0
    ellipse = (x / 12) ** 2 + (y / 24) ** 2 < 1
    assert evaluate.disk_volume(ellipse[None])[0] == pytest.approx(4 / 3 * np.pi * 12 * 12 * 24, rel=0.03)
    time, noise = np.arange(128) / 25, np.random.default_rng(0).standard_normal(128)
    area = 400 + 100 * np.cos(2 * np.pi * 1.2 * (time - 0.3)) + 4 * noise
    cycle = evaluate.cardiac_cycle(area, area ** 1.5, 25)
    expected = 0.3 + np.arange(6) / 1.2
    assert len(cycle["ed_frames"]) == 6 and np.abs(np.array(cycle["ed_frames"]) / 25 - expected).max() < 0.05
    assert cycle["ef"] == pytest.approx(100 * (1 - (300 / 500) ** 1.5), abs=4)
    assert evaluate.cardiac_cycle(400 + 4 * noise, 400 + noise, 25)["ed_frames"] == []
    assert evaluate.lag_ms(np.roll(area, 5), area, 25) == pytest.approx(200, abs=10)


def test_evaluate_modes(phantom, weights, tmp_path, monkeypatch):
    """A mode that ends in a traceback, a figure that is missing, or a target that cannot fail."""
    flags = [f"--data={phantom}", f"--weights={weights}", f"--out={tmp_path}"]
    assert call(monkeypatch, evaluate.main, "reconstruction", *flags, "--target_mse=9") == 0
    assert call(monkeypatch, evaluate.main, "reconstruction", *flags, "--target_mse=1e-9") == 1
    found = json.loads((tmp_path / "eval_reconstruction.json").read_text())
    assert {"mse", "mae", "psnr", "ssim", "codes_used", "codebook_perplexity", "rd_bound_mse"} <= set(found)
    assert call(monkeypatch, evaluate.main, "sync", *flags, "--steps=1", "--frames=32", "--target_beats_found=0") in (0, 1)
    found = json.loads((tmp_path / "eval_sync.json").read_text())
    assert {"area_r_median", "ed_error_ms_median", "ed_error_ms_p95", "beats_found", "extra_beats", "shift_ms",
            "flat_swing", "swap_follows_donor", "clips", "seed", "device", "weights"} <= set(found)


# ---------------------------------------------------------------------------- the shipped weights

def test_shipped_tokens_and_size():
    """Weights that no longer fit the code: the tokens of one clip of the phantom, as they were when shipped."""
    assert sum(f.stat().st_size for f in (HERE / "weights").iterdir()) < 16 * 2 ** 20
    model = load_weights(HERE / "weights", "tokenizer", Tokenizer, TokenizerConfig).eval()
    video = torch.from_numpy(make_clip((0, 2, 0), frames=11)["video"]).permute(3, 0, 1, 2)[None].float() / 255
    index = model.encode(video)
    assert (index[0, 3, 3].tolist() == GOLDEN) and (model.decode(index) - video).square().mean() < 0.01


def test_real_ecg(tmp_path, monkeypatch):
    """The heart does not follow a real ECG: a contraction for every R peak, none extra, within 80 ms."""
    watch = HERE.parent / "shared/real/ecg/apple_watch_digitized.csv"
    if not watch.exists():
        pytest.skip("the recording is not there")
    call(monkeypatch, sample.main, f"--ecg={watch}", "--frames=128", f"--out={tmp_path}")
    report = json.loads((tmp_path / "report.json").read_text())
    ed, r = np.array(report["ed_frames"]) / 25, np.array(report["r_peaks_s"])
    inside = r[(r > 0.15) & (r < 127 / 25 - 0.15)]
    nearest = np.abs(inside[:, None] - ed).min(1)
    assert len(ed) == len(inside) and np.median(nearest) <= 0.08
