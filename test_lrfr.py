# SPDX-License-Identifier: MIT
"""Every formula against a slow, obvious version, every command against its promise: pytest -q"""
import errno
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import evaluate
import lrfr
import train
from lrfr import (ArcFace, IResNet, LRFR, MAug, check_gradient, degrade, embed, l1_loss, l2_loss,
                  load_backbone, logexp_grad, logexp_loss, parse_ratio)

HERE = Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "faces"  # real faces, where a developer has them
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def drawn():
    """Eight drawn people with four pictures each."""
    return train.demo_faces(8, 4, seed=5)


@pytest.fixture(scope="session")
def folder(drawn, tmp_path_factory):
    """The same as a training folder, identity/image.jpg."""
    root = tmp_path_factory.mktemp("faces")
    for i, (source, label) in enumerate(zip(drawn.sources, drawn.labels, strict=True)):
        (root / f"{label:02d}").mkdir(exist_ok=True)
        (root / f"{label:02d}" / f"{i}.jpg").write_bytes(source)
    return root


@pytest.fixture(scope="session")
def lfw(drawn, tmp_path_factory):
    """The same as a tiny LFW: 40 pairs, of one person and of two in turn."""
    root, lines = tmp_path_factory.mktemp("lfw"), ["10\t2"]
    for i, (source, label) in enumerate(zip(drawn.sources, drawn.labels, strict=True)):
        (root / f"P{label}").mkdir(exist_ok=True)
        (root / f"P{label}" / f"P{label}_{i % 4 + 1:04d}.jpg").write_bytes(source)
    for i in range(20):
        lines += [f"P{i % 8}\t{i % 3 + 1}\t4", f"P{i % 8}\t1\tP{(i + 1) % 8}\t{i % 4 + 1}"]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A run on that folder by the command line, seconds long."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    done = cli("train.py", "--data", folder, "--backbone", "r10", "--width", 16, "--epochs", 2,
               "--batch-size", 8, "--holdout", 3, "--out", out, "--jitter", 0.5, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def cli(script, *arguments, cwd=HERE):
    return subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], check=False,
                          capture_output=True, text=True, cwd=cwd, timeout=900)


# ---- 1. Resolution augmentation -----------------------------------------------------------------


def pillow_degrade(pixels, px):
    small = Image.fromarray(pixels).resize((px, px), Image.Resampling.BICUBIC)
    return np.array(small.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC))


def test_degrade_is_what_pillow_does(drawn):
    pixels = [evaluate.read_image(source).permute(1, 2, 0).numpy() for source in drawn.sources]
    if REAL.is_dir():
        pixels += [np.array(Image.open(path)) for path in sorted(REAL.glob("lfw/A*/*.jpg"))[:60]]
    images = evaluate.to_input(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), CPU)
    for px in range(5, 57, 3):
        ours = (degrade(images, px) + 1) * 127.5
        theirs = torch.from_numpy(np.stack([pillow_degrade(p, px) for p in pixels]))
        difference = (ours.permute(0, 2, 3, 1) - theirs).abs()
        assert difference.mean() < 0.5, px
        assert (difference <= 4).float().mean() > 0.999, px


def test_degrade_takes_one_resolution_per_image():
    images = torch.rand(5, 3, 112, 112) * 2 - 1
    before, px = images.clone(), torch.tensor([7, 200, 20, 112, 7])
    together = degrade(images, px)
    for i in range(5):
        assert torch.allclose(together[i], degrade(images[i:i + 1], int(px[i]))[0], atol=1e-6)
    assert torch.equal(images, before) and together.abs().max() <= 1
    assert torch.equal(together[1], images[1]) and torch.equal(together[3], images[3])
    assert degrade(images, 7).std() < degrade(images, 20).std() < images.std()
    assert degrade(images[:0], 7).shape == (0, 3, 112, 112)


def test_degrade_keeps_shape_and_type():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        images = (torch.rand(2, 3, 48, 32) * 2 - 1).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = degrade(images, 12)
        assert out.shape == images.shape and out.dtype == dtype
    flat = torch.full((1, 3, 48, 32), 0.25)
    assert torch.allclose(degrade(flat, 7), flat, atol=1e-6)
    narrow = degrade(flat.contiguous(memory_format=torch.channels_last), 7)
    assert narrow.is_contiguous(memory_format=torch.channels_last)
    assert degrade(flat, 7).is_contiguous()
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        degrade(flat, 0)
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], got torch.uint8"):
        degrade(flat.byte(), 7)
    with pytest.raises(ValueError, match="pixels are uint8, 0 to 255"):
        lrfr.to_input(flat, "cpu")


def test_maug_whatever_torchs_defaults():
    """Draws stay on the CPU, and the resize matrices float32."""
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    expected = MAug()(images)
    with torch.device("meta"):
        maug = MAug()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(maug(images), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ratio():
    assert parse_ratio("1:1:2") == (1, 1, 2) and parse_ratio("0.5:0") == (0.5, 0)
    for bad in ("", "1:", "a:b", "1,1,2", "-1:2", "0:0", "nan:1", "inf:1", "1:1:x"):
        with pytest.raises(ValueError, match=re.escape(f"'{bad}'")):
            parse_ratio(bad)
    for ratio in ((1, 1), (1, -1, 1), (0, 0, 0), (1, math.nan, 1), ()):
        with pytest.raises(ValueError, match="ratio"):
            MAug((7, 14, 20), ratio)


def test_maug_draws_in_the_ratio_and_repeats():
    for ratio in ((1, 1, 2), (0, 1, 0), (2, 1, 1), (1, 0, 3)):
        torch.manual_seed(0)
        counts = Counter(MAug((7, 14, 20), ratio).sample(40000).tolist())
        for px, share in zip((7, 14, 20), ratio, strict=True):
            p = share / sum(ratio)
            assert abs(counts[px] / 40000 - p) <= 4 * math.sqrt(p * (1 - p) / 40000)
    maug, images = MAug(), torch.rand(6, 3, 32, 32) * 2 - 1
    torch.manual_seed(1)
    px = maug.sample(6)
    torch.manual_seed(1)
    first = maug(images)
    torch.manual_seed(1)
    assert torch.equal(first, maug(images)) and torch.equal(first, degrade(images, px))
    assert px.shape == (6,) and px.dtype == torch.int64


# ---- 2. Backbone --------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "blocks", "entries", "parameters"), [
    (18, (2, 2, 2, 2), 187, 24_025_600), (34, (3, 4, 6, 3), 331, 34_139_328),
    (50, (3, 4, 14, 3), 475, 43_590_848), (100, (3, 13, 30, 3), 925, 65_156_160),
    (200, (6, 26, 60, 6), 1807, 118_833_920)])
def test_iresnet_has_the_names_and_sizes_of_insightface(depth, blocks, entries, parameters):
    with torch.device("meta"):
        backbone = IResNet(depth)
    norm = [f".{name}" for name in ("weight", "bias", "running_mean", "running_var",
                                    "num_batches_tracked")]
    names = ["conv1.weight", *("bn1" + n for n in norm), "prelu.weight"]
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            parts = [["bn1", norm], ["conv1", norm[:1]], ["bn2", norm], ["prelu", norm[:1]],
                     ["conv2", norm[:1]], ["bn3", norm]]
            if i == 0:
                parts += [["downsample.0", norm[:1]], ["downsample.1", norm]]
            names += [f"layer{stage}.{i}.{part}{n}" for part, ending in parts for n in ending]
    names += ["bn2" + n for n in norm] + ["fc.weight", "fc.bias"] + ["features" + n for n in norm]
    state = backbone.state_dict()
    assert list(state) == names and len(names) == entries
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert state["fc.weight"].shape == (512, 25088) and not backbone.features.weight.requires_grad
    assert backbone.layer2[0].conv1.stride == (1, 1) and backbone.layer2[0].conv2.stride == (2, 2)


def test_iresnet_forward():
    backbone = IResNet(10, 8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = backbone(torch.randn(2, 3, 112, 112))
    assert out.shape == (2, 32) and out.dtype == torch.float32
    out.square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="no IResNet of depth 51"):
        IResNet(51)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prelu_is_that_of_torch(dtype):
    x, g = torch.randn(2, 4, 3, 5, 5).to(dtype)
    ours, theirs = lrfr.PReLU(3), nn.PReLU(3)
    grads = []
    for layer in (ours, theirs):
        layer.weight.data = torch.tensor([0.25, -0.5, 1.5])
        inputs = x.clone().requires_grad_()
        out = layer(inputs) if layer is ours else F.prelu(inputs, layer.weight.to(dtype))
        out.backward(g)
        grads.append((out.float(), inputs.grad.float(), layer.weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=tolerance)
    flat = torch.randn(4, 3, requires_grad=True)  # not of pictures
    (grad,) = torch.autograd.grad(ours(flat).sum(), flat)
    assert torch.equal(grad, torch.autograd.grad(theirs(flat).sum(), flat)[0])


def test_load_backbone_takes_ours_and_insightface(tmp_path):
    torch.manual_seed(0)
    backbone, images = IResNet(18, 8, 16).eval(), torch.randn(2, 3, 112, 112)
    state, expected = backbone.state_dict(), backbone(images)
    files = {"ours.pt": {"backbone": state, "args": {"p": 1.0}}, "insightface.pth": state,
             "checkpoint_gpu_0.pt": {"epoch": 1, "state_dict_backbone": state},  # of InsightFace
             "module.pth": {f"module.{k}": v for k, v in state.items()}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        loaded = load_backbone(tmp_path / name)
        assert not loaded.training and torch.equal(loaded(images), expected)
        assert loaded.state_dict().keys() == state.keys()


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb-went-off",)


def test_load_backbone_refuses_everything_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = IResNet(10, 4, 8).state_dict()
    narrow = {**state, "fc.bias": torch.zeros(7)}
    with torch.device("meta"):
        shapes = IResNet(10, 2**16).state_dict()  # 50 TB, if they were more than views
    views = {key: torch.zeros(()).expand(value.shape) for key, value in shapes.items()}
    files = {
        "ada.pth": ({"model.input_layer.0.weight": torch.zeros(1)}, "AdaFace"),
        "mag.pth": ({f"features.module.{k}": v for k, v in state.items()}, "MagFace"),
        "resnet.pth": (torchvision.models.resnet18().state_dict(), "torchvision"),
        "list.pth": ([1, 2], "not a checkpoint"),
        "other.pth": ({"a": torch.zeros(1)}, "looks like none"),
        "views.pth": (views, "not InsightFace"),
        "narrow.pth": (narrow, "fc.bias"), "bomb.pth": (Bomb(), "not a checkpoint"),
        "text.pth": ("", "not a checkpoint"), "empty.pth": ("", "not a checkpoint")}
    for name, (content, message) in files.items():
        torch.save(content, name)
        if name in ("text.pth", "empty.pth"):
            Path(name).write_text("hello" * (name == "text.pth"))
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(name)
        assert str(error.value).startswith(name) and "\n" not in str(error.value)
    Path("short.pth").write_bytes(Path("narrow.pth").read_bytes()[:5000])
    for name in ("short.pth", "nowhere.pth", "."):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: "):
            load_backbone(name)
    assert not Path("bomb-went-off").exists()


def test_a_checkpoint_that_unfolds_is_refused(trained, tmp_path):
    """Deflated, a thousand times its size would fill the memory before torch looks at it."""
    packed, whole = tmp_path / "packed.pt", trained[0] / "last.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(len(old.read(name))) if "/data/" in name else old.read(name))
    assert packed.stat().st_size < whole.stat().st_size / 50
    load_backbone(packed)  # is what it says, as far as torch can see
    for program, *options in ((evaluate.main, packed, "--match", "a", "b"),
                              (train.main, "--init", packed, "--out", tmp_path / "run")):
        with pytest.raises(ValueError, match=r"packed.pt: compressed"):
            program(list(map(str, options)))
    assert evaluate.no_bomb(whole) == whole and evaluate.no_bomb("nothing.pt") == "nothing.pt"


def test_embed_gives_unit_vectors_for_every_flip():
    backbone, images = IResNet(10, 4, 16).eval(), torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        f, g = backbone(images), backbone(images.flip(3))
    expected = {"none": f, "sum": f + g, "concat": torch.cat([F.normalize(f), F.normalize(g)], 1)}
    for flip, e in expected.items():
        out = embed(backbone, images, flip)
        assert torch.allclose(out, e / e.norm(dim=1, keepdim=True), atol=1e-6)
        assert not out.requires_grad and out.shape == (3, 32 if flip == "concat" else 16)
    with pytest.raises(ValueError, match="'mirror'"):
        embed(backbone, images, "mirror")
    with pytest.raises(ValueError, match=r"training mode: call backbone.eval\(\) first"):
        embed(backbone.train(), images)


@pytest.mark.filterwarnings("ignore")  # torch would rather have one export it
def test_a_backbone_can_be_traced_and_cast():
    backbone, images = IResNet(10, 16, 16).eval(), torch.randn(2, 3, 112, 112)
    traced = torch.jit.trace(backbone, images)
    assert traced.save_to_buffer()
    with torch.no_grad():
        expected = backbone(images)
        assert torch.allclose(traced(images), expected, atol=1e-5)
        cast = backbone.bfloat16()(images.bfloat16())
    assert cast.dtype == torch.bfloat16
    assert F.cosine_similarity(cast.float(), expected).min() > 0.98


# ---- 3. Classifier ------------------------------------------------------------------------------


def arcface_loop(embeddings, weights, labels, scale, margin):
    """Trigonometry, number by number, in float64."""
    rows = []
    for e, label in zip(embeddings.tolist(), labels.tolist(), strict=True):
        row = []
        for c, w in enumerate(weights.tolist()):
            length = math.sqrt(sum(x * x for x in e) * sum(x * x for x in w))
            theta = math.acos(sum(a * b for a, b in zip(e, w, strict=True)) / length)
            target = math.cos(theta + margin)
            if theta + margin > math.pi:
                target = math.cos(theta) + math.cos(margin) - 1
            row.append(scale * (target if c == label else math.cos(theta)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def test_arcface_against_trigonometry():
    torch.manual_seed(0)
    head, embeddings = ArcFace(7, 6, scale=30.0, margin=0.5), torch.randn(40, 6)
    labels = torch.randint(7, (40,))
    embeddings[:7] = -3 * head.weight.data + 0.001 * torch.randn(7, 6)  # beyond theta + m = pi
    labels[:7] = torch.arange(7)
    expected = arcface_loop(embeddings.double(), head.weight.double(), labels, 30.0, 0.5)
    assert torch.allclose(head(embeddings, labels).double(), expected, atol=2e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(embeddings.bfloat16(), labels)
    assert logits.dtype == torch.float32 and logits.shape == (40, 7)


def test_arcface_has_the_true_gradient():
    torch.manual_seed(0)
    head, labels = ArcFace(5, 4, scale=2.0, margin=0.4), torch.tensor([0, 1, 4])
    e = torch.randn(3, 4, requires_grad=True)
    weights = torch.randn(3, 5, dtype=torch.float64)  # of the logits in a sum
    (head(e, labels).double() * weights).sum().backward()
    for i, j in itertools.product(range(3), range(4)):
        sums = []
        for sign in (1, -1):
            moved = e.detach().double()
            moved[i, j] += sign * 1e-6
            logits = arcface_loop(moved, head.weight.detach().double(), labels, 2.0, 0.4)
            sums.append((logits * weights).sum().item())
        assert e.grad[i, j].item() == pytest.approx((sums[0] - sums[1]) / 2e-6, abs=1e-4)


def test_arcface_at_its_ends():
    head = ArcFace(1, 2, scale=1.0, margin=0.5)
    head.weight.data = torch.tensor([[1.0, 0.0]])
    for angle in (0.0, math.pi):
        e = torch.tensor([[math.cos(angle), math.sin(angle) * (angle > 1e9)]], requires_grad=True)
        head(e, torch.tensor([0])).sum().backward()
        assert e.grad.isfinite().all()
    theta = torch.linspace(0, math.pi, 2001)
    logits = head(torch.stack([theta.cos(), theta.sin()], 1), torch.zeros(2001, dtype=torch.int64))
    assert (logits.diff(dim=0) < 1e-6).all()  # falls all the way, over the guard too
    assert logits.diff(dim=0).abs().max() < 0.01  # without a jump
    for bad in (-1, 1):
        with pytest.raises(ValueError, match=f"{bad}.*expected 0 to 0"):
            head(torch.randn(1, 2), torch.tensor([bad]))
    with pytest.raises(RuntimeError, match="invalid for input of size 1"):
        head(torch.randn(2, 2), torch.tensor([0]))  # twice as many embeddings: no margin for half


# ---- 4. Distances -------------------------------------------------------------------------------


def logexp_slow(x, y, p):
    """Eq. (3) as it is printed, in float64, one pair at a time."""
    values = []
    for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True):
        powers = [abs(s - t) ** p for s, t in zip(a, b, strict=True)]
        values.append(math.log1p(math.fsum(math.expm1(z) for z in powers)) / (p * len(powers)))
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 1.0, 8.0, 600.0])
def test_logexp_is_exact_over_its_range(p, size):
    """size: the largest |d|, or |d|^p where that would be more than 600."""
    torch.manual_seed(0)
    d = torch.rand(4, 512) * 2 - 1
    d[0, 0] = 1
    d, y = d * min(size, 600 ** (1 / p)), torch.zeros(4, 512)
    assert logexp_loss(d, y, p).item() == pytest.approx(logexp_slow(d, y, p), rel=2e-5)
    x = d.clone().requires_grad_()
    logexp_loss(x, y, p).backward()
    exact = logexp_grad(d.double(), y.double(), p)
    assert x.grad.isfinite().all()
    assert (x.grad - exact).abs().max() <= 2e-4 * exact.abs().max()
    assert (logexp_grad(d, y, p) - exact).abs().max() <= 2e-4 * exact.abs().max()


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_logexp_gradients(p):
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 5, dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(partial(logexp_loss, p=p), (x, y))
    logexp_loss(x, y, p).backward()
    assert torch.allclose(x.grad, logexp_grad(x, y, p), atol=1e-12)
    assert torch.allclose(y.grad, -x.grad)
    for i, j in itertools.product(range(3), range(5)):  # Eq. (2), for any p, as it is printed
        d = (x - y)[i].tolist()
        total = 1 + sum(math.exp(abs(z) ** p) - 1 for z in d)
        slow = (math.copysign(1, d[j]) * abs(d[j]) ** (p - 1) * math.exp(abs(d[j]) ** p)
                / total / 5 / 3)
        assert x.grad[i, j].item() == pytest.approx(slow, rel=1e-9)
    assert check_gradient(p) < 1e-8
    same = torch.randn(2, 4, requires_grad=True)
    logexp_loss(same, same.detach().clone(), p).backward()
    assert torch.equal(same.grad, torch.zeros(2, 4))
    assert torch.equal(logexp_grad(same, same, p), torch.zeros(2, 4))


def test_check_gradient_can_fail(monkeypatch):
    right = lrfr.logexp_grad
    monkeypatch.setattr(lrfr, "logexp_grad", lambda x, y, p: right(x, y, p) * 1.001)
    assert check_gradient(1.0) > 1e-6
    monkeypatch.undo()
    loss = lrfr.logexp_loss  # nan in the finite differences alone
    monkeypatch.setattr(lrfr, "logexp_loss", lambda x, y, p: loss(x, y, p) * (
        1 if x.is_leaf else math.nan))
    assert math.isnan(check_gradient(1.0))


def test_half_precision_embeddings_do_not_overflow():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((2, 8), 20.0, dtype=dtype, requires_grad=True)
        for p in (1.0, 2.0):
            loss = logexp_loss(x, torch.zeros_like(x), p)
            loss.backward()
            assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()
            assert loss.item() == pytest.approx(logexp_slow(x, torch.zeros(2, 8), p), rel=1e-5)


def test_logexp_refuses_what_it_cannot_do():
    for p in (0.5, 0, -1, math.nan):
        with pytest.raises(ValueError, match="p is at least 1"):
            logexp_loss(torch.zeros(1, 2), torch.zeros(1, 2), p)
    for loss in (logexp_loss, l1_loss, l2_loss):
        with pytest.raises(ValueError, match="differ in shape"):
            loss(torch.zeros(2, 3), torch.zeros(3))


def test_l1_and_l2():
    x, y = torch.randn(2, 4, 6)
    pairs = list(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
    assert l1_loss(x, y).item() == pytest.approx(sum(abs(a - b) for a, b in pairs) / 24, rel=1e-5)
    assert l2_loss(x, y).item() == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / 24, rel=1e-5)
    assert l2_loss(x.half(), y.half()).dtype == torch.float32


# ---- 5. Total loss ------------------------------------------------------------------------------


def parts_of(distance, weight, pull_both=False):
    """An LRFR in eval mode, labels, its loss, and the embeddings that its backbone gave."""
    torch.manual_seed(0)
    backbone, head = IResNet(10, 4, 16).eval(), ArcFace(5, 16, scale=8.0, margin=0.2)
    outputs = []
    backbone.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    model = LRFR(backbone, head, MAug((7, 14), (1, 1)), distance, weight, pull_both)
    images, labels = torch.rand(6, 3, 112, 112) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 0])
    torch.manual_seed(3)
    loss, parts = model(images, labels)
    outputs[0].retain_grad()
    return model, labels, loss, parts, outputs[0]


def test_total_loss_is_the_papers():
    for distance in (logexp_loss, l1_loss, l2_loss, partial(logexp_loss, p=2.0)):
        model, labels, loss, parts, out = parts_of(distance, 50.0)
        f_hr, f_lr = out.detach().chunk(2)
        ce = [-model.head(f, labels).double().log_softmax(1)[range(6), labels].mean()
              for f in (f_hr, f_lr)]
        d = distance(F.normalize(f_hr), F.normalize(f_lr))
        assert loss.item() == pytest.approx(((ce[0] + ce[1]) / 2 + 50 * d).item(), rel=1e-5)
        assert parts["distance"].item() == pytest.approx(d.item(), rel=1e-5)
        assert parts["sharp"].item() == pytest.approx(ce[0].item(), rel=1e-5)
        assert parts["degraded"].item() == pytest.approx(ce[1].item(), rel=1e-5)


def test_the_distance_pulls_the_degraded_embeddings_or_both():
    def grad(*options):
        *_, loss, _, out = parts_of(*options)
        loss.backward()
        return out.grad
    alone = grad(None, 0.0)
    assert alone.norm(dim=1).min() > 0  # both resolutions are classified
    sharp, degraded = (grad(logexp_loss, 1000.0, True) - alone).chunk(2)
    assert sharp.norm(dim=1).min() > 0
    fixed, pulled = (grad(logexp_loss, 1000.0, False) - alone).chunk(2)
    assert fixed.abs().max() < 1e-6 < pulled.norm(dim=1).min()
    assert torch.allclose(pulled, degraded, atol=1e-6)


def test_baseline_sees_sharp_faces_only():
    backbone, head = IResNet(10, 4, 16).eval(), ArcFace(5, 16)
    images, labels = torch.rand(4, 3, 112, 112) * 2 - 1, torch.arange(4)
    torch.manual_seed(2)
    loss, parts = LRFR(backbone, head)(images, labels)
    torch.manual_seed(2)
    sharp = lrfr.random_flip(images)
    assert all(torch.equal(s, i) or torch.equal(s, i.flip(2))
               for s, i in zip(sharp, images, strict=True))
    assert list(parts) == ["sharp"]
    expected = F.cross_entropy(head(backbone(sharp), labels), labels)
    assert loss.item() == pytest.approx(expected.item())


def test_flips_of_the_two_resolutions_are_independent():
    seen = []
    model = LRFR(lambda x: seen.append(x) or torch.ones(len(x), 4, requires_grad=True),
                 lambda e, labels: e, lambda x: x)
    images = torch.rand(200, 3, 4, 4)
    model(images, torch.zeros(200, dtype=torch.int64))
    kept = [(half == images).flatten(1).all(1) for half in seen[0].chunk(2)]
    counts = Counter(zip(*(k.tolist() for k in kept), strict=True))
    assert len(counts) == 4 and min(counts.values()) > 25


def test_losses_stay_float32_under_autocast():
    model, labels, *_ = parts_of(logexp_loss, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = model(torch.rand(6, 3, 112, 112), labels)
    assert {loss.dtype, *(part.dtype for part in parts.values())} == {torch.float32}


# ---- 6. Protocols -------------------------------------------------------------------------------


def ten_folds_slow(scores, same):
    folds, accuracies, thresholds = [range(len(same) * k // 10, len(same) * (k + 1) // 10)
                                     for k in range(10)], [], []
    for fold in folds:
        best, chosen = -1, None
        for threshold in evaluate.GRID:
            right = sum((scores[i] >= threshold) == same[i]
                        for i in range(len(same)) if i not in fold)
            if right >= best:  # of equals the later, the higher
                best, chosen = right, threshold
        accuracies.append(sum((scores[i] >= chosen) == same[i] for i in fold) / len(fold))
        thresholds.append(chosen)
    mean = sum(accuracies) / 10
    return mean, math.sqrt(sum((a - mean) ** 2 for a in accuracies) / 10), sum(thresholds) / 10


def test_ten_folds():
    rng = np.random.default_rng(0)
    same = np.arange(60) % 2 == 0
    scores = np.clip(rng.normal(0.1, 0.3, 60) + 0.3 * same, -1, 1)
    assert evaluate.ten_folds(scores, same) == pytest.approx(ten_folds_slow(scores, same))
    perfect = np.where(same, 0.5, 0.2)  # every threshold in (0.2, 0.5] is right: the highest counts
    assert evaluate.ten_folds(perfect, same) == pytest.approx((1, 0, 0.5))


def test_tar_at_far():
    scores = np.concatenate([np.linspace(0, 1, 11), np.linspace(-1, 0.55, 1000)])
    same = np.arange(1011) < 11
    assert evaluate.tar_at_far(scores, same, [1e-3, 0.5, 1]) == pytest.approx([5 / 11, 1, 1])
    assert evaluate.FARS[0] == 1e-3 and evaluate.tar_at_far(scores, same)[0] == 5 / 11  # .6 .. 1
    assert evaluate.tar_at_far(np.array([0.5, 0.5]), np.array([True, False]))[0] == 0
    for far, tar in zip(evaluate.FARS, evaluate.tar_at_far(scores, same), strict=True):
        passed = [t for t in [*scores, -np.inf] if (scores[~same] > t).sum() <= far * 1000]
        assert tar == pytest.approx((scores[same] > min(passed)).mean())
    for kind in (True, False):  # None, and not NaN, which JSON does not have
        assert {*evaluate.tar_at_far(scores[:11], np.full(11, kind))} == {None}


def rank_1(gallery, probes, identity):
    data = evaluate.Benchmark("x", [], (), identity)
    first, rest = data.part == "gallery", data.part == ""
    return evaluate.identify(gallery[first], identity[first], probes[rest], identity[rest])[0]


def test_rank_1():
    """Of a sharp gallery, the first image of each person, and everything else as probes."""
    torch.manual_seed(0)
    identity = np.array([3, 3, 0, 1, 0, 3, 2, 1, 1])
    gallery, probes = F.normalize(torch.randn(2, 9, 4), dim=2)
    first = {label: list(identity).index(label) for label in identity}
    nearest = [max(first.values(), key=lambda g: float(gallery[g] @ probe)) for probe in probes]
    hits = [identity[nearest[i]] == identity[i] for i in range(9) if i not in first.values()]
    assert rank_1(gallery, probes, identity) == sum(hits) / len(hits)
    assert rank_1(torch.eye(4), torch.eye(4)[[0, 0, 2, 2]], np.array([0, 0, 1, 1])) == 1


def test_make_pairs():
    labels = [0] * 5 + [1] * 5 + [2] * 1
    pairs = evaluate.make_pairs("x", list("abcdefghijk"), labels)
    first, second, same = pairs.pairs
    assert "".join(pairs.sources) == "abcdefghijk"
    assert len(same) == 40 and same.sum() == 20
    assert same[:4].tolist() == [True, False, True, False]  # every fold has both kinds
    assert len({*zip(first, second, strict=True)}) == 40
    for a, b, genuine in zip(first, second, same, strict=True):
        assert (labels[a] == labels[b]) == genuine and a != b
    with pytest.raises(ValueError, match="0 pairs"):
        evaluate.make_pairs("x", ["a", "b"], [0, 1])
    many = evaluate.make_pairs("x", np.arange(9000), np.arange(9000) % 100)
    assert len(many.sources) == 4000
    assert np.array_equal(many.identity, np.array(many.sources) % 100)
    assert len(many.pairs[2]) == 6000 and many.pairs[2].sum() == 3000


def test_read_lfw(lfw):
    pairs = evaluate.read_lfw(lfw)
    first, second, same = pairs.pairs
    assert len(same) == 40 and same.sum() == 20 and len(set(pairs.sources)) == len(pairs.sources)
    assert pairs.sources[first[0]] == str(lfw / "P0" / "P0_0001.jpg")
    assert pairs.sources[second[0]] == str(lfw / "P0" / "P0_0004.jpg")
    assert pairs.sources[second[3]] == str(lfw / "P2" / "P2_0002.jpg")
    whose = [os.path.basename(os.path.dirname(source)) for source in pairs.sources]
    assert all((whose[i] == whose[j]) == (pairs.identity[i] == pairs.identity[j])
               for i in range(len(whose)) for j in range(len(whose)))


@pytest.mark.parametrize(("line", "message"), [
    ("P0\t1", "line 3: not a pair"), ("P0\tone\t2", "line 3: not a pair"),
    ("P0 1 P1 2 3", "line 3: not a pair"), ("P0\t1\t9", "line 3: .*P0_0009.jpg is missing")])
def test_read_lfw_names_the_line(lfw, tmp_path, line, message):
    shutil.copytree(lfw, tmp_path / "lfw")
    (tmp_path / "lfw" / "pairs.txt").write_text(f"10\t300\nP0\t1\t2\n{line}\n")
    with pytest.raises(ValueError, match=message):
        evaluate.read_lfw(tmp_path / "lfw")
    (tmp_path / "lfw" / "pairs.txt").write_text("10\t300\n")
    with pytest.raises(ValueError, match="0 pairs"):
        evaluate.read_lfw(tmp_path / "lfw")


def test_verify_is_the_protocol_step_by_step(lfw, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 5)
    torch.manual_seed(0)
    pairs, backbone = evaluate.read_lfw(lfw), IResNet(10, 4, 16).eval()
    ((row,), _) = evaluate.evaluate({"net": backbone}, pairs, [7], CPU, "off", "none")
    images = [evaluate.to_input(evaluate.read_image(s)[None], CPU) for s in pairs.sources]
    for way in ("both", "cross"):
        scores = []
        for i, j in zip(*pairs.pairs[:2], strict=True):
            a = images[i] if way == "cross" else degrade(images[i], 7)
            e, f = embed(backbone, a, "none"), embed(backbone, degrade(images[j], 7), "none")
            scores.append(float(e @ f.T))
        slow = ten_folds_slow(scores, pairs.pairs[2])
        keys = (f"{way}_accuracy", f"{way}_std", f"{way}_threshold")
        assert [row[key] for key in keys] == pytest.approx(slow, abs=1e-9)


def test_xqlfw_is_read_like_lfw(lfw, tmp_path):
    shutil.copytree(lfw, tmp_path / "xqlfw")
    (tmp_path / "xqlfw" / "pairs.txt").rename(tmp_path / "xqlfw" / "xqlfw_pairs.txt")
    pairs = evaluate.read_lfw(tmp_path / "xqlfw", "XQLFW", "xqlfw_pairs.txt")
    same = evaluate.read_lfw(lfw)
    assert pairs.name == "XQLFW"
    assert all(np.array_equal(*both) for both in zip(pairs.pairs, same.pairs, strict=True))


def test_ranks_against_sorting():
    torch.manual_seed(0)
    gallery, probes = F.normalize(torch.randn(30, 3), dim=1), F.normalize(torch.randn(50, 3), dim=1)
    gallery[20:25] = gallery[10:15]  # equal cosines: strangers come first
    rng = np.random.default_rng(0)
    mine, theirs = rng.integers(-1, 6, 30), rng.integers(0, 8, 50)  # -1, 6, 7: of nobody else
    found = evaluate.identify(gallery, mine, probes, theirs, block=7)
    ranks = []
    for i in range(50):
        cosines = (gallery @ probes[i]).tolist()
        order = sorted(range(30), key=lambda g: (-cosines[g], mine[g] == theirs[i]))
        hits = [rank for rank, g in enumerate(order, 1) if mine[g] == theirs[i]]
        ranks.append(hits[0] if hits else math.inf)
    assert found == pytest.approx([np.mean(np.array(ranks) <= k) for k in range(1, 51)])


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [bool, int, np.bool_])
@pytest.mark.parametrize("arrays", [False, True])
def test_read_bin(drawn, tmp_path, protocol, kind, arrays):
    files = list(drawn.sources[:20])
    content = [np.frombuffer(file, np.uint8) for file in files] if arrays else files
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((content, [kind(i % 2) for i in range(10)]), protocol))
    pairs = evaluate.read_bin(path)
    first, second, same = pairs.pairs
    assert pairs.sources == files and same.tolist() == [False, True] * 5
    assert first.tolist() == list(range(0, 20, 2)) and second[3] == 7


def test_read_bin_of_python_2(drawn, tmp_path):
    """Its str is bytes: opcodes BINSTRING (T), as InsightFace's own files hold them."""
    path, files = tmp_path / "old.bin", list(drawn.sources[:20])
    strings = b"".join(b"T" + len(file).to_bytes(4, "little") + file for file in files)
    path.write_bytes(b"\x80\x02(" + b"](" + strings + b"e](" + b"K\x01K\0" * 5 + b"et.")
    assert evaluate.read_bin(path).sources == files


def test_read_bin_refuses_what_is_none(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = pickle.dumps((list(drawn.sources[:20]), [True, False] * 5), 2)
    huge = b"\x80\x04r\xff\xff\xff\x7f."  # LONG_BINPUT 2^31 - 1: 16 GB for the unpickler in C
    long = b"\x80\x05\x96" + (2**42).to_bytes(8, "little")  # BYTEARRAY8: 4 TB for Python's own
    files = {
        "empty": (b"", "not a .bin"), "cut": (whole[:3000], "not a .bin"),
        "text": (b"hello", "not a .bin"), "shape": (pickle.dumps([1, 2, 3]), "not a .bin"),
        "odd": (pickle.dumps((list(drawn.sources[:19]), [True] * 10)), "19 images for 10 pairs"),
        "few": (pickle.dumps((list(drawn.sources[:2]), [True])), "1 pairs"),
        "ints": (pickle.dumps(([9] * 20, [1] * 10)), "int"),
        "bomb": (pickle.dumps(Bomb()), "asks for: 'posix.system'"), "huge": (huge, "not a .bin"),
        "long": (long, "not a .bin: stops at, or asks for: EOFError"),
        "eval": (b"cbuiltins\neval\n(S'open(\"bomb-went-off\", \"w\")'\ntR.", "builtins.eval")}
    for name, (content, message) in files.items():
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(message)}") as error:
            evaluate.read_bin(name)
        assert "\n" not in str(error.value)
    assert not Path("bomb-went-off").exists()


def scface(root, files, subjects, *skip):
    """The SCface of those subjects, in the folders of the CD."""
    for n, subject in enumerate(subjects):
        names = {f"mugshot_frontal_original_all/{subject:03d}_frontal.JPG": n}
        names |= {f"surveillance_cameras_distance_{d}/{subject:03d}_cam{c}_{d}.jpg": n + d * (d < 3)
                  for c in range(1, 6) for d in range(1, 4)}
        names[f"surveillance_cameras_IR_cam8/{subject:03d}_cam8.jpg"] = 0  # not of the protocol
        for name, picture in names.items():
            if os.path.basename(name) not in skip:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(files[picture % len(files)])


def test_scface(drawn, tmp_path):
    """Probes at d3 are the mugshots themselves; at d1 and d2 those of the subjects after them."""
    scface(tmp_path / "sc", drawn.sources[::4], range(48, 56))
    search = evaluate.read_scface(tmp_path / "sc")
    assert Counter(search.part.tolist()) == {"gallery": 8, "d1": 40, "d2": 40, "d3": 40}
    assert search.name == "SCface, 8 subjects (all)"
    assert [int(os.path.basename(p)[:3]) for p in search.sources] == search.identity.tolist()
    rows, _ = evaluate.evaluate({"net": IResNet(10, 4, 16).eval()}, search, [7], CPU, "off")
    assert [row["part"] for row in rows] == ["d1", "d2", "d3", "average"]
    assert [row["rank1"] for row in rows] == pytest.approx([0, 0, 1, 1 / 3])
    assert all(row["px"] == 112 and row["cmc"][0] == row["rank1"] for row in rows)
    assert all(row["cmc"][7] == 1 and np.all(np.diff(row["cmc"]) >= 0) for row in rows)
    assert [row["probes"] for row in rows] == [40, 40, 40, ""]
    test = evaluate.read_scface(tmp_path / "sc", "test")
    assert sorted({*test.identity.tolist()}) == [51, 52, 53, 54, 55]
    crops = tmp_path / "sc" / "aligned"
    crops.mkdir()
    (crops / "050_frontal.jpg").write_bytes(drawn.sources[0])
    search = evaluate.read_scface(tmp_path / "sc")
    assert str(crops / "050_frontal.jpg") in search.sources and len(search.sources) == 128


def test_scface_names_what_is_missing(drawn, tmp_path):
    scface(tmp_path / "a", drawn.sources, range(51, 54), "052_frontal.JPG")
    with pytest.raises(ValueError, match=r"a: subject 052 has no mugshot"):
        evaluate.read_scface(tmp_path / "a")
    gone = [f"053_cam{c}_{d}.jpg" for c in range(1, 6) for d in range(1, 4)]
    scface(tmp_path / "b", drawn.sources, range(51, 54), *gone)
    with pytest.raises(ValueError, match=r"subject 053 .* or no surveillance image"):
        evaluate.read_scface(tmp_path / "b")
    with pytest.raises(ValueError, match="has no mugshot"):
        evaluate.read_scface(tmp_path / "nowhere")


def test_tinyface(drawn, tmp_path, monkeypatch):
    """Persons 0 .. 3 of drawn, two probes and two mates each; persons 4 .. 7 are distractors."""
    root = tmp_path / "tiny" / "Testing_Set"
    for folder in ("Probe", "Gallery_Match", "Gallery_Distractor"):
        (root / folder).mkdir(parents=True)
    for i, file in enumerate(drawn.sources):
        kind = "Gallery_Distractor" if i >= 16 else ("Probe", "Gallery_Match")[i % 2]
        (root / kind / f"{i // 4}_{i}.jpg").write_bytes(file)
    search = evaluate.read_tinyface(tmp_path / "tiny")
    gallery = search.part == "gallery"
    assert gallery.sum() == 24 and search.name == "TinyFace, 16 distractors"
    names = [os.path.basename(source) for source in search.sources]
    people = [-1 if "Distractor" in source else int(name.split("_")[0])
              for source, name in zip(search.sources, names, strict=True)]
    assert all((people[i] == people[j]) == (search.identity[i] == search.identity[j])
               for i in range(32) for j in range(32)) and (search.identity == -1).sum() == 16
    backbone = IResNet(10, 4, 16).eval()
    monkeypatch.setattr(evaluate, "BATCH", 5)
    ((row,), _) = evaluate.evaluate({"net": backbone}, search, [7], CPU, "off", "none")

    def unit(path):
        return embed(backbone, evaluate.to_input(evaluate.read_image(path)[None], CPU), "none")[0]

    units = torch.stack([unit(path) for path in search.sources])
    firsts = []
    for probe in np.flatnonzero(search.part == "probes"):
        order = (units[gallery] @ units[probe]).argsort(descending=True).tolist()
        mates = np.flatnonzero(search.identity[gallery] == search.identity[probe])
        firsts.append(min(order.index(mate) + 1 for mate in mates))
    assert row["cmc"] == pytest.approx([np.mean(np.array(firsts) <= k) for k in range(1, 51)])
    shutil.rmtree(root / "Gallery_Distractor")
    assert evaluate.read_tinyface(root).name == "TinyFace, WITHOUT its distractors"
    shutil.rmtree(root / "Gallery_Match")
    with pytest.raises(ValueError, match=r"tiny.*: no images in Probe, or none in Gallery_Match"):
        evaluate.read_tinyface(root)


def test_every_set_in_one_command(trained, lfw, folder, drawn, tmp_path):
    scface(tmp_path / "sc", drawn.sources, range(51, 53))
    packed = tmp_path / "set.bin"
    packed.write_bytes(pickle.dumps((list(drawn.sources[:20]), [True, False] * 5)))
    faces = sorted(folder.rglob("*.jpg"))[:3]
    done = cli("evaluate.py", trained[0] / "last.pt", "--lfw", lfw, "--bin", packed, "--scface",
               tmp_path / "sc", "--resolutions", 14, "--match", *faces, "--device", "cpu",
               "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ +-?\d\.\d{3}  \S+jpg  \S+jpg  \S+/tiny/last.pt$", done.stdout,
                          re.MULTILINE)) == 3
    rows = json.loads((tmp_path / "all.json").read_text())
    assert [row["match"] for row in rows[:3]] == [
        list(map(str, two)) for two in itertools.combinations(faces, 2)]
    assert [row["set"] for row in rows[3:]] == [
        "LFW", "set", *["SCface, 2 subjects (all)"] * 4]
    assert "average" in done.stdout and "aligned" in done.stdout


def test_plots_show_what_was_measured(trained, lfw, folder, tmp_path):
    pytest.importorskip("matplotlib")
    done = cli("evaluate.py", trained[0] / "last.pt", "--lfw", lfw, "--resolutions", 7, 112,
               "--study", folder, "--plots", tmp_path / "new" / "plots", "--json",
               tmp_path / "all.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "all.json").read_text())
    plots = {path.stem: json.loads(path.read_text()) for path in
             (tmp_path / "new" / "plots").glob("*.json")}
    assert {*plots} == {"gradient", "distances", "LFW-ROC", "LFW-CMC", "LFW-both", "LFW-cross",
                        "LFW-errors"}
    for path in (tmp_path / "new" / "plots").glob("*.png"):
        assert Image.open(path).size == (960, 720)
    name = str(trained[0] / "last.pt")
    norms = rows.pop(0)
    assert norms["gradient_norms"] == plots["gradient"][norms["checkpoint"]]
    assert [row["px"] for row in rows] == evaluate.STUDY
    for way in ("both", "cross"):
        assert plots[f"LFW-{way}"][name] == [[r["px"], r[f"{way}_accuracy"]] for r in rows]
    assert plots["LFW-CMC"][f"{name}, 5 px"] == [[k, y] for k, y in enumerate(rows[0]["cmc"], 1)]
    assert plots["LFW-ROC"][f"{name}, 112 px"][0] == [1e-3, rows[-1]["cross_tar"]]
    ((_, errors),) = plots["LFW-errors"].items()
    assert 0.99 < sum(y for _, y in errors) / 15 <= 1.001  # a density


def test_sets_of_one_name_are_told_apart(trained, lfw, tmp_path):
    shutil.copytree(lfw, tmp_path / "other")
    sets = ["--lfw", str(lfw), str(lfw), str(tmp_path / "other")]
    evaluate.main([str(trained[0] / "last.pt"), *sets, "--resolutions", "7", "7", "--json",
                   str(tmp_path / "x.json")])
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["set"] for row in rows] == ["LFW", f"LFW of {tmp_path / 'other'}"]


def test_plots_without_matplotlib(trained, lfw, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        evaluate.main([str(trained[0] / "last.pt"), "--lfw", str(lfw), "--plots", "x"])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_read_image_takes_every_kind(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    assert np.array_equal(evaluate.read_image(tmp_path / "rgb.png").permute(1, 2, 0), pixels)
    assert torch.equal(evaluate.read_image((tmp_path / "rgb.png").read_bytes()),
                       evaluate.read_image(tmp_path / "rgb.png"))
    for mode in ("L", "RGBA", "CMYK", "P", "1", "LA"):
        name = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.fromarray(pixels).convert(mode).resize((50, 70)).save(name)
        image = evaluate.read_image(name)
        assert image.shape == (3, 112, 112) and image.dtype == torch.uint8
    grey = np.arange(112 * 112, dtype=np.uint16).reshape(112, 112) * 5
    Image.fromarray(grey).save(tmp_path / "sixteen.png")
    assert np.array_equal(evaluate.read_image(tmp_path / "sixteen.png")[0], grey >> 8)
    Image.new("L", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge.png: not a readable image: .* \(81000000 pixels\)"):
        evaluate.read_image(tmp_path / "huge.png")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n"  # for Ghostscript to run
    for content in (b"", b"no image", (tmp_path / "rgb.png").read_bytes()[:500], script):
        with pytest.raises(ValueError, match="not a readable image"):
            evaluate.read_image(content)
    with pytest.raises(ValueError, match="cannot identify"):  # not even looked at
        evaluate.read_image(script)


def test_write_file_keeps_the_old_one_when_it_fails(tmp_path):
    path = tmp_path / "new" / "file"
    evaluate.write_file(path, b"old")
    with pytest.raises(ValueError, match=f"^{path}: .*not 'str'"):
        evaluate.write_file(path, "text")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path / "new") == ["file"]
    evaluate.write_file(path, b"new", previous=tmp_path / "new" / "before")
    assert path.read_bytes() == b"new" and (tmp_path / "new" / "before").read_bytes() == b"old"


def mutated(content, rng):
    """The same bytes, damaged in up to five places."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        near = min(len(content), 300) if rng.random() < 0.5 else len(content)
        i, n = int(rng.integers(near + 1)), int(rng.integers(1, 40))
        kind = rng.integers(4)
        if kind == 0:
            content[i:i + n] = rng.bytes(n)
        elif kind == 1:
            content[i:i + 4] = [b"\xff\xff\xff\x7f", b"\0\0\0\0", b"-1\t", b"99999999999"][n % 4]
        elif kind == 2:
            del content[i:i + n]
        elif rng.random() < 0.2:
            del content[i:]
    return bytes(content)


@pytest.mark.parametrize("kind", ["rec", "idx", "bin", "pairs", "checkpoint"])
def test_fuzz(kind, drawn, lfw, tmp_path):
    """Whatever stands in a file, its reader ends soon, with a result or one line of complaint."""
    def read_records():
        faces = records(tmp_path / "rec")
        return [faces[i] for i in range(min(len(faces), 5))]

    insightface(tmp_path / "rec", list(drawn.sources), drawn.labels.tolist())
    shutil.copytree(lfw, tmp_path / "lfw")
    (tmp_path / "a.bin").write_bytes(pickle.dumps((list(drawn.sources[:20]), [True, False] * 5), 2))
    torch.save(IResNet(10, 2, 4).state_dict(), tmp_path / "c.pt")
    path, read = {
        "rec": (tmp_path / "rec" / "train.rec", read_records),
        "idx": (tmp_path / "rec" / "train.idx", read_records),
        "bin": (tmp_path / "a.bin", lambda: evaluate.read_bin(tmp_path / "a.bin")),
        "pairs": (tmp_path / "lfw" / "pairs.txt", lambda: evaluate.read_lfw(tmp_path / "lfw")),
        "checkpoint": (tmp_path / "c.pt", lambda: load_backbone(tmp_path / "c.pt"))}[kind]
    rng, content, refused = np.random.default_rng(0), path.read_bytes(), 0
    for _ in range(60):
        path.write_bytes(mutated(content, rng))
        start = time.time()
        try:
            read()
        except (ValueError, OSError) as error:
            refused += 1
            assert str(path.parent) in str(error) and "\n" not in str(error)
        assert time.time() - start < 5
    assert refused


def test_gradient_norms(trained, folder):
    """The norm of the mean gradient, image by image, in float64."""
    path = trained[0] / "last.pt"
    curve = evaluate.gradient_norms(path, load_backbone(path), folder, CPU, "off", count=20)
    assert [px for px, _ in curve] == evaluate.STUDY
    state, backbone = torch.load(path, weights_only=True), load_backbone(path)
    head = ArcFace(5, 512, state["args"]["scale"], state["args"]["margin"])
    head.load_state_dict(state["head"])
    known = [(p, i) for i in range(5) for p in sorted((folder / f"{i:02d}").iterdir())]  # 20 images
    for px, norm in (curve[2], curve[-1]):
        backbone.zero_grad()
        for file, label in known:
            x = degrade(evaluate.to_input(evaluate.read_image(file)[None], CPU), px)
            loss = F.cross_entropy(head(backbone(x), torch.tensor([label])), torch.tensor([label]))
            (loss / 20).backward()
        total = sum(p.grad.double().square().sum() for p in backbone.parameters()
                    if p.grad is not None)
        assert norm == pytest.approx(math.sqrt(total), rel=1e-3)


def test_slopes_are_the_derivatives():
    curves = evaluate.slopes()
    for name, loss in {"L1": l1_loss, "L2": l2_loss, "LogExp(1)": logexp_loss,
                       "LogExp(2)": partial(logexp_loss, p=2),
                       "smooth L1": F.smooth_l1_loss}.items():
        values = []
        for d in (1.0, *(d for d, _ in curves[name][::50])):
            x = torch.ones(1, 512, dtype=torch.float64)
            x[0, 0] = d
            loss(x.requires_grad_(), torch.zeros_like(x)).backward()
            values.append(x.grad[0, 0].item())
        expected = [value / values[0] for value in values[1:]]
        assert [y for _, y in curves[name][::50]] == pytest.approx(expected, rel=1e-5)


def test_spread_is_the_principal_components():
    torch.manual_seed(0)
    identity = np.repeat(np.arange(14), np.arange(23, 9, -1))  # the first twelve have the most
    embeddings = {px: torch.randn(len(identity), 16, dtype=torch.float64) for px in (7, 112)}
    curves = evaluate.spread(identity, embeddings)
    assert list(curves)[:2] == ["7 px", "_7 px, person 1"] and list(curves)[12] == "112 px"
    points = np.array([*curves.values()]).reshape(-1, 2)  # 2 resolutions, 12 people, 8 of each
    first8 = [i for who in range(12) for i in np.flatnonzero(identity == who)[:8]]
    x = np.concatenate([embeddings[px][first8] for px in (7, 112)])
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    expected = (x - x.mean(0)) @ vectors[:, :-3:-1]
    assert np.allclose(np.abs(points), np.abs(expected)) and len(curves) == 24
    assert points.var(0) == pytest.approx(values[:-3:-1])


# ---- 7. Training --------------------------------------------------------------------------------


def test_a_worker_that_is_not_forked_gives_the_same_faces(drawn):
    """On macOS and Windows, and on Linux from Python 3.14 on, workers are sent the data set."""
    loader = torch.utils.data.DataLoader(drawn, 8, num_workers=1, multiprocessing_context="spawn")
    images, labels, errors = next(iter(loader))
    assert torch.equal(images, torch.stack([drawn[i][0] for i in range(8)]))
    assert labels.tolist() == drawn.labels[:8].tolist() and not any(errors)


def test_drawn_faces_are_people(drawn):
    again = train.demo_faces(8, 4, seed=5)
    assert [*again.sources] == [*drawn.sources] and max(drawn.labels) == 7 and len(drawn) == 32
    images = torch.stack([drawn[i][0].float() for i in range(32)])
    assert len(set(drawn.sources)) == 32  # no picture twice
    distance = torch.cdist(images.flatten(1), images.flatten(1))
    same = torch.as_tensor(drawn.labels)[:, None] == torch.as_tensor(drawn.labels)
    within = distance[same & (distance > 0)].mean()
    assert 0 < within < distance[~same].mean()


def test_image_folder_and_split(folder, tmp_path):
    faces = train.Faces(folder, *evaluate.image_folder(folder))
    assert Counter(faces.labels.tolist()) == dict.fromkeys(range(8), 4)
    kept, held_out, _ = train.open_data(str(folder), 3)
    assert {*kept.labels} == {*range(5)} and {*held_out.labels} == {*range(3)}
    assert len(kept) == 20 and [*kept.sources, *held_out.sources] == [*faces.sources]
    (tmp_path / "only" / "nothing").mkdir(parents=True)
    for empty in (tmp_path, tmp_path / "only", tmp_path / "only" / "nothing"):
        with pytest.raises(ValueError, match="0 images of 0 identities"):
            train.open_data(str(empty), None)


MAGIC = 0xced7230a


def write_records(root, payloads, keys=None):
    """A RecordIO file by the letter of the format: split wherever a payload holds the magic."""
    root.mkdir(parents=True, exist_ok=True)
    keys, magic = keys or range(len(payloads)), MAGIC.to_bytes(4, "little")
    with open(root / "train.rec", "wb") as rec, open(root / "train.idx", "w") as idx:
        for key, payload in zip(keys, payloads, strict=True):
            idx.write(f"{key}\t{rec.tell()}\n")
            cuts = [i for i in range(0, len(payload) - 3, 4) if payload[i:i + 4] == magic]
            starts, ends = [0, *(i + 4 for i in cuts)], [*cuts, len(payload)]
            for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
                flag = 0 if not cuts else 1 if n == 0 else 3 if n == len(cuts) else 2
                rec.write(magic + (flag << 29 | end - start).to_bytes(4, "little"))
                rec.write(payload[start:end] + b"\0" * (-(end - start) % 4))


def record(labels, image=b"", flag=None):
    """IRHeader, then the image; several labels stand behind the header."""
    if flag is None and len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], 0, 0) + image
    return struct.pack(f"<IfQQ{len(labels)}f", len(labels), 0, 0, 0, *labels) + image


def insightface(root, files, labels):
    """InsightFace's layout: header, images, one identity record for each class."""
    classes = max(labels) + 1
    firsts = [labels.index(c) + 1 for c in range(classes)] + [len(files) + 1]
    payloads = [record([len(files) + 1, len(files) + 1 + classes])]
    payloads += [record([label], file) if i % 3 else record([label, 1], file)  # both ways are seen
                 for i, (file, label) in enumerate(zip(files, labels, strict=True))]
    write_records(root, payloads + [record(firsts[c:c + 2]) for c in range(classes)])
    (root / "property").write_text(f"{classes},112,112\n")


def records(root):
    return train.Faces(root, *train.record_file(root))


def test_records_of_insightface(drawn, tmp_path):
    png = io.BytesIO()
    Image.open(io.BytesIO(drawn.sources[1])).save(png, "PNG")
    magic = MAGIC.to_bytes(4, "little")
    files = [*drawn.sources[:30], png.getvalue(), drawn.sources[31] + magic * 3 + b"abc" + magic]
    insightface(tmp_path, files, drawn.labels.tolist())
    faces = records(tmp_path)
    assert faces.labels.tolist() == drawn.labels.tolist()
    assert [faces.read(offset) for offset in faces.sources] == files
    assert torch.equal(faces[30][0], evaluate.read_image(drawn.sources[1]))
    kept, rest, _ = train.open_data(str(tmp_path), 2)
    assert len(kept) == 24 and rest.labels.tolist() == [0] * 4 + [1] * 4
    assert rest.read(rest.sources[7]) == files[31]


def test_records_of_im2rec(drawn, tmp_path):
    """No header record: every record is an image, and keys need not be in order."""
    labels = [1, 0, 2, 1]
    write_records(tmp_path, [record([label], file) for label, file in zip(
        labels, drawn.sources[:4], strict=True)], keys=[7, 3, 12, 5])
    faces = records(tmp_path)
    assert faces.labels.tolist() == labels
    assert [faces.read(offset) for offset in faces.sources] == [*drawn.sources[:4]]


def test_an_identity_that_begins_behind_the_images(drawn, tmp_path):
    """Its record is damaged: labels come from the images."""
    insightface(tmp_path, list(drawn.sources), drawn.labels.tolist())
    content = (tmp_path / "train.rec").read_bytes()
    assert content.count(record([29, 33])) == 1
    (tmp_path / "train.rec").write_bytes(content.replace(record([29, 33]), record([40, 41])))
    assert records(tmp_path).labels.tolist() == drawn.labels.tolist()


def test_an_index_that_is_cut_short_at_a_line(drawn, tmp_path):
    insightface(tmp_path, list(drawn.sources), drawn.labels.tolist())
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    for kept in (20, len(lines) - 1):
        (tmp_path / "train.idx").write_text("".join(lines[:kept]))
        with pytest.raises(ValueError, match=r"train.idx: cut short: .*train.rec goes on behind"):
            records(tmp_path)


def test_records_of_more_images_than_float32_can_count(drawn, tmp_path, monkeypatch):
    """Above 2^24 record 0 and the identities are off by one or two: labels come from the images."""
    n, start = 6, 2**24 + 3
    payloads = [record([start + n + 1, start + n + 3])]
    payloads += [record([i // 3], drawn.sources[i]) for i in range(n)]
    payloads += [record([start, start + 3]), record([start + 3, start + n])]
    write_records(tmp_path, payloads, keys=[0, *range(start, start + n + 2)])
    faces = records(tmp_path)
    assert faces.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.skipif(not REAL.is_dir(), reason="no real faces beside the project")
def test_real_samples():
    faces = records(REAL / "insightface")
    assert len(faces) == 3000 and {*faces.labels.tolist()} == {*range(60)}
    assert all(faces[i][2] == "" for i in range(0, 3000, 50))
    for name, count in (("lfw_fold1", 600), ("lfw_ndarray", 60)):
        pairs = evaluate.read_bin(REAL / "insightface" / f"{name}.bin")
        assert len(pairs.pairs[2]) == count and evaluate.read_image(pairs.sources[0]).any()


def test_damaged_records(drawn, tmp_path):
    def broken(message, change):
        shutil.rmtree(tmp_path / "rec", ignore_errors=True)
        insightface(tmp_path / "rec", list(drawn.sources), drawn.labels.tolist())
        rec, idx = tmp_path / "rec" / "train.rec", tmp_path / "rec" / "train.idx"
        rec_bytes, lines = bytearray(rec.read_bytes()), idx.read_text().splitlines()
        rec_bytes, lines = change(rec_bytes, lines)
        rec.write_bytes(rec_bytes)
        idx.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            records(tmp_path / "rec")

    broken("outside of train.rec; is it cut short", lambda rec, idx: (rec[:5000], idx))
    broken("outside of train.rec", lambda rec, idx: (rec, [*idx, "99\t999999999"]))
    broken("not lines of a key", lambda rec, idx: (rec, [*idx, "99\t-5"]))
    broken("not lines of a key", lambda rec, idx: (rec, [*idx, "hello"]))
    broken("not lines of a key", lambda rec, idx: (rec, [*idx, f"99\t{2**62}"]))
    broken("not lines of a key", lambda rec, idx: (rec, [*idx, "99"]))
    broken("not lines of a key", lambda rec, idx: (rec, []))
    broken("no record at byte 0", lambda rec, idx: (b"\0\0" + rec[2:], idx))
    broken("cut short", lambda rec, idx: (rec, [*idx[:-1], idx[-1][:-1]]))
    insightface(tmp_path / "rec", list(drawn.sources), drawn.labels.tolist())
    rec = tmp_path / "rec" / "train.rec"
    faces = records(tmp_path / "rec")
    content = bytearray(rec.read_bytes())
    content[faces.sources[3] + 4:faces.sources[3] + 8] = b"\xff\xff\xff\x1f"  # 512 MB long
    content[faces.sources[5]] = 0
    rec.write_bytes(content)
    assert "no whole record at byte" in faces[3][2] and "no whole record" in faces[5][2]
    assert torch.equal(faces[3][0], faces[4][0]) and faces[3][1] == faces[4][1]
    for labels in ((5, 6, 7), (0, -1, 1), (0, 0.5, 1), (0, math.nan, 1)):
        write_records(tmp_path / "rec", [record([label], b"image") for label in labels])
        with pytest.raises(ValueError, match="labels out of range: expected 0 to 2"):
            records(tmp_path / "rec")
    write_records(tmp_path / "rec", [record([2, 3]), record([1])])
    with pytest.raises(ValueError, match="labels out of range"):
        records(tmp_path / "rec")


def test_training_on_records_with_sets_beside_them(drawn, tmp_path):
    insightface(tmp_path / "ms1m", list(drawn.sources), drawn.labels.tolist())
    content = (list(drawn.sources[:20]), [True, False] * 5)
    (tmp_path / "ms1m" / "lfw.bin").write_bytes(pickle.dumps(content, 2))
    done = cli("train.py", "--data", tmp_path / "ms1m", "--backbone", "r10", "--width", 16,
               "--epochs", 2, "--batch-size", 8, "--holdout", 3, "--out", tmp_path / "run",
               "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    evaluated = [line["evaluation"][0]["set"] for line in lines if "evaluation" in line]
    assert evaluated == ["lfw", "lfw", "held-out identities"]
    assert done.stdout.count("\nlfw, flip test sum") == 2


def test_unreadable_images_are_skipped_up_to_one_in_a_thousand(drawn, tmp_path, capsys):
    def root(images, bad):
        for i in range(images):
            (tmp_path / "data" / str(i % 2)).mkdir(parents=True, exist_ok=True)
            content = b"not an image" if i < bad else drawn.sources[i % 32]
            (tmp_path / "data" / str(i % 2) / f"{i:04d}.jpg").write_bytes(content)

    options = ["--data", str(tmp_path / "data"), "--backbone", "r10", "--width", "16",
               "--holdout", "0", "--batch-size", "100", "--epochs", "1", "--maug", "none",
               "--loss", "none", "--out", str(tmp_path / "run")]
    root(1000, 1)
    train.main(options)
    printed = capsys.readouterr().out
    assert "skipped: " + str(tmp_path / "data" / "0" / "0000.jpg") in printed
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert log.count("skipped") == 1 and "not a readable image" in log
    root(1000, 4)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match=r"more than 1 in 1,000 of 1,000 images are bad: .*jpg"):
        train.main(options)


def test_batches_take_each_image_once_an_epoch(monkeypatch):
    def of(seed=1, steps=range(9)):
        return [batch.tolist() for batch in train.batches(23, 5, seed, steps)]

    first, second = itertools.chain(*of()[:4]), itertools.chain(*of()[4:8])
    assert len(of()) == 9 and all(len(batch) == 5 for batch in of())
    first, second = list(first), list(second)
    assert len(set(first)) == len(set(second)) == 20 and first != second
    assert of() == of() and of(2) != of() and of(steps=range(6, 9)) == of()[6:]
    monkeypatch.setattr(train, "RANKS", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append(of())
    monkeypatch.undo()
    assert all(sorted(a + b) == sorted(whole) for a, b, whole in zip(*shares, of(), strict=True))


def test_learning_rate():
    rates = [train.learning_rate(step, 100, 0.5) for step in range(100)]
    assert max(rates) == 0.5 and rates.index(0.5) == 4
    assert np.all(np.diff(rates[:5]) > 0) and np.all(np.diff(rates[5:]) < 0)
    assert 0 < rates[-1] < 0.01
    assert all(0 < train.learning_rate(s, n, 1.0) <= 1 for n in range(1, 50) for s in range(n))


def test_jitter():
    """Each image moves and is lit by itself, within the bounds; the same under the same seed."""
    torch.manual_seed(0)
    images = torch.zeros(8, 3, 112, 112, dtype=torch.uint8) + 60
    images[:, :, 52:60, 52:60] = 200  # a square in the middle
    assert train.jitter(images, 0.0) is images
    moved = train.jitter(images, 1.0)
    torch.manual_seed(0)
    assert torch.equal(train.jitter(torch.cat([images]), 1.0), moved)
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    centres = [torch.nonzero(image[0] == image[0, 30:80, 30:80].max()).float().mean(0) - 55.5
               for image in moved]
    assert len({tuple(centre.tolist()) for centre in centres}) == 8
    assert all(centre.abs().max() < 8 for centre in centres)
    assert len({int(image[0, 30:80, 30:80].max()) for image in moved}) > 4


def test_a_run_leaves_what_it_promises(trained):
    out, printed = trained
    assert re.search(r"epoch 2/2  step 4/4  loss [\d.]+, sharp [\d.]+, degraded [\d.]+, distance "
                     r"[\d.]+  lr 0\.\d+  \d+ images/s  0:00:00 left", printed)
    assert "held-out identities" in printed and "rank-1" in printed
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["step"] == 4 and checkpoint["args"]["width"] == 16
    assert checkpoint["head"]["weight"].shape == (5, 512)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[0]["args"]["loss"] == "logexp" and lines[1]["step"] == 2 and lines[2]["epoch"] == 2
    assert {row["px"] for row in lines[-1]["evaluation"]} == {7, 14, 20, 112}
    faces = Image.open(out / "faces.png")
    assert faces.size == (8 * 112, 4 * 112)
    assert np.array(faces)[:112].std() > np.array(faces)[112:224].std()


def test_runs_repeat_and_can_start_from_others(folder, trained, tmp_path):
    def weights(*options):
        arguments = ["--data", folder, "--backbone", "r10", "--width", 16, "--epochs", 1,
                     "--holdout", 0, "--batch-size", 8, "--device", "cpu",
                     "--out", tmp_path / "run", *options]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        train.main(list(map(str, arguments)))
        return torch.load(tmp_path / "run" / "last.pt", weights_only=True)["backbone"]

    one, same, other = weights("--workers", 0), weights("--workers", 2), weights("--seed", 1)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    start = load_backbone(trained[0] / "last.pt").state_dict()
    tuned = weights("--init", trained[0] / "last.pt", "--lr", 0)
    assert torch.equal(tuned["conv1.weight"], start["conv1.weight"])
    baseline = weights("--maug", "none", "--loss", "none")
    assert not torch.equal(baseline["fc.weight"], one["fc.weight"])


TINY = ["--backbone", "r10", "--width", "16", "--batch-size", "8", "--holdout", "0",
        "--device", "cpu"]


def weights_of(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)


def test_a_killed_run_ends_bit_for_bit_like_another(folder, tmp_path):
    """SIGKILL at three moments, in and between epochs; then the same command goes on to the end."""
    command = [sys.executable, HERE / "train.py", "--data", folder, *TINY, "--epochs", "6",
               "--save-every", "3", "--jitter", "0.5", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    out, begun = tmp_path / "killed", []
    for steps in (4, 10, 17):
        process = subprocess.Popen([*command, out], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            begun += re.findall(r"going on from step (\d+)", line)
            if (step := re.search(r"step (\d+)/24", line)) and int(step[1]) >= steps:
                break
        process.kill()
        process.wait()
    done = subprocess.run([*command, out], check=True, capture_output=True, text=True)
    begun += re.findall(r"going on from step (\d+)", done.stdout)
    assert len(begun) == 3 and all(int(step) % 3 == 0 or int(step) % 4 == 0 for step in begun)
    one, other = weights_of(tmp_path / "whole"), weights_of(out)
    for part in ("backbone", "head"):
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line]
    assert sorted(set(logged)) == sorted({*range(3, 25, 3), *range(4, 25, 4)})  # some twice
    assert logged[-1] == 24


def test_resume_passes_over_damage_and_refuses_contradictions(folder, tmp_path, capsys):
    options = ["--data", str(folder), *TINY, "--out", str(tmp_path / "run")]
    train.main([*options, "--epochs", "2"])
    state = weights_of(tmp_path / "run")
    odds = {"step": "x"}, {"args": [1]}, {"backbone": {}}, {"optimiser": None}
    for n, odd in enumerate(odds):
        (tmp_path / str(n)).mkdir()
        torch.save({**state, **odd}, tmp_path / str(n) / "last.pt")
        again = [*options, "--epochs", "2", "--out", str(tmp_path / str(n))]
        if n < 2:
            train.main(again)
            assert "last.pt is damaged: passed over" in capsys.readouterr().out
            assert weights_of(tmp_path / str(n), "last.pt.damaged")["args"]  # nothing is lost
        else:
            with pytest.raises(ValueError, match=f"{n}: its checkpoint does not fit this model"):
                train.main(again)
    content = (tmp_path / "run" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(content[:len(content) // 2])
    capsys.readouterr()
    train.main([*options, "--epochs", "3"])
    printed = capsys.readouterr().out
    assert "last.pt is damaged: passed over" in printed
    assert re.search(r"going on from step 4 of \S+previous.pt", printed)
    assert weights_of(tmp_path / "run")["step"] == 12
    for change, message in ((["--loss", "l1"], "made with loss logexp, not l1"),
                            (["--width", "32"], "made with width 16, not 32"),
                            (["--lr", "0.5"], "made with lr 0.02, not 0.5"),
                            (["--maug", "1:1:1"], "made with maug 1:1:2, not 1:1:1")):
        with pytest.raises(ValueError, match=message):
            train.main([*options, *change])
    shutil.copytree(folder, tmp_path / "more")
    shutil.copytree(folder / "00", tmp_path / "more" / "99")
    state = weights_of(tmp_path / "run")
    state["args"] |= {"data": str(tmp_path / "more"), "images": 36}
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match=r"made with classes 8, not 9"):
        train.main(["--data", str(tmp_path / "more"), *TINY, "--out", str(tmp_path / "run")])


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize(("number", "launcher", "send"), [
    (signal.SIGTERM, [], os.killpg), (signal.SIGINT, [], os.killpg),  # to the workers, too, as a
    (signal.SIGTERM, TORCHRUN, os.kill)])  # terminal, timeout or scancel does; torchrun passes on
def test_a_signal_saves_and_says_how_to_go_on(folder, tmp_path, number, launcher, send):
    command = [sys.executable, *launcher, HERE / "train.py", "--data", folder, *TINY, "--epochs",
               "500", "--workers", "2", "--out", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    for line in process.stdout:
        if "epoch 2/" in line:
            send(process.pid, number)
            break
    out, err = process.communicate(timeout=60)
    assert launcher or process.returncode == 128 + number and err == ""
    (step,) = re.findall(r"stopped at step (\d+), saved in \S+: the same command goes on", out)
    assert weights_of(tmp_path / "run")["step"] == int(step)


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    options = ["--data", str(folder), *TINY, "--epochs", "9", "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at step \d+, .*last.pt"):
        train.main([*options, "--lr", "1e9"])


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    evaluate.write_file(path, b"whole")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    text = evaluate.run(lambda: evaluate.write_file(path, b"new", tmp_path / "previous.pt"))
    assert text == f"error: {path}: No space left on device"
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["last.pt"]


def test_a_run_goes_on_in_float16_and_back(folder, tmp_path):
    """The scaler's state is in the checkpoint where there is one, and is not missed where not."""
    options = ["--data", str(folder), *TINY, "--maug", "none", "--loss", "none",
               "--out", str(tmp_path / "run")]
    scales = []
    for epochs, amp in ((1, "off"), (2, "fp16"), (3, "bf16")):
        train.main([*options, "--epochs", str(epochs), "--amp", amp])
        state = weights_of(tmp_path / "run")
        scales.append(state["scaler"].get("scale"))
        assert all(value.isfinite().all() for value in state["backbone"].values())
    assert scales[0] is scales[2] is None and scales[1] > 1


def torchrun(*arguments):
    return subprocess.run([sys.executable, *TORCHRUN, *map(str, arguments)], check=False, text=True,
                          capture_output=True, cwd=HERE, timeout=900)


def test_two_processes_train_like_one(folder, tmp_path):
    """Weights agree on both ranks; rank 0 alone writes; a single process goes on from there."""
    script = tmp_path / "two.py"
    script.write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(HERE)!r})
        import torch, train
        from torch import distributed
        model = train.main(sys.argv[1:])
        for value in (*model.parameters(), *model.buffers()):
            both = [torch.empty_like(value) for _ in range(2)]
            distributed.all_gather(both, value.data.contiguous())
            if value.requires_grad:
                assert torch.equal(*both)
        distributed.destroy_process_group()""")
    options = ["--data", folder, *TINY, "--out", tmp_path / "run"]
    done = torchrun(script, *options, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 8/8") == 1 and weights_of(tmp_path / "run")["step"] == 8
    done = cli("train.py", *options, "--epochs", 3)
    assert done.returncode == 0 and "going on from step 8" in done.stdout


def test_gradient_of_two_processes_is_that_of_the_joined_batch(tmp_path):
    """With batch norm in eval mode, as both batches have the same statistics only then."""
    script = tmp_path / "gradient.py"
    script.write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(HERE)!r})
        import torch
        import lrfr
        from lrfr import *
        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        torch.manual_seed(0)
        lrfr.random_flip = lambda images: images
        model = LRFR(IResNet(10, 16), ArcFace(5), lambda x: degrade(x, 7), logexp_loss, 100.0)
        model.eval()
        images, labels = torch.rand(8, 3, 112, 112) * 2 - 1, torch.arange(8) % 5
        model(images, labels)[0].backward()
        whole = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        parallel = DistributedDataParallel(model)
        parallel(images[rank::2], labels[rank::2])[0].backward()
        for p, expected in zip((p for p in model.parameters() if p.requires_grad), whole):
            assert torch.allclose(p.grad, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())
        print("equal", flush=True)
        distributed.destroy_process_group()""")
    done = torchrun(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2


def test_evaluate_compares_checkpoints(trained, lfw, tmp_path):
    other = tmp_path / "other.pt"
    shutil.copy(trained[0] / "last.pt", other)
    done = cli("evaluate.py", trained[0] / "last.pt", other, "--lfw", lfw, "--resolutions", 7, 112,
               "--flip", "concat", "--json", tmp_path / "out.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["px"], row["checkpoint"]) for row in rows] == [
        (px, str(name)) for px in (7, 112) for name in (trained[0] / "last.pt", other)]
    assert "LFW, flip test concat; accuracy" in done.stdout
    assert rows[2]["both_accuracy"] == rows[2]["cross_accuracy"] == rows[3]["both_accuracy"]
    assert f"{100 * rows[0]['cross_accuracy']:.2f}" in done.stdout


def test_lrfr_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(HERE / "lrfr.py", tmp_path)
    done = subprocess.run([sys.executable, "-I", "lrfr.py"], check=False, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("LogExp: analytic, autograd")
    broken = (tmp_path / "lrfr.py").read_text().replace("return d.sign()", "return 2 * d.sign()")
    (tmp_path / "lrfr.py").write_text(broken)
    done = subprocess.run([sys.executable, "-I", "lrfr.py"], check=False, cwd=tmp_path)
    assert done.returncode == 1
    imports = set(re.findall(r"^(?:import|from) (\w+)", broken, re.MULTILINE))
    assert imports == {"math", "torch"}


def test_the_demo_from_end_to_end(tmp_path):
    """One epoch of the demo: 7 px is far above chance, which is 50 and 2.5 %."""
    done = cli("train.py", "--epochs", 1, "--out", tmp_path / "demo", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "demo" / "log.jsonl").read_text().splitlines()[-1])["evaluation"]
    assert rows[0]["px"] == 7 and rows[0]["cross_accuracy"] > 0.6 and rows[0]["rank1"] > 0.05
    assert rows[3]["both_accuracy"] > 0.6


BAD_COMMANDS = [
    ("train.py --data nowhere", 1, r"--data nowhere: no folder nowhere, no data/nowhere"),
    ("train.py --data {empty}", 1, r"0 images of 0 identities"),
    ("train.py --data {folder} --maug 1:1", 1, r"3 resolutions, but a ratio of 2 numbers"),
    ("train.py --data {folder} --maug 1:x:2", 1, r"not a ratio: '1:x:2'"),
    ("train.py --maug none", 2, r"--maug none leaves no degraded faces to compare"),
    ("train.py --p 0.5", 2, r"--p: 0.5 is not from 1"),
    ("train.py --resolutions 7 14 200", 2, r"200 is not from 1 to 112"),
    ("train.py --margin 28.6", 2, r"--margin: 28.6 is not from 0 to 1.5"),
    ("train.py --width 8", 2, r"--width: 8 is not from 16"),
    ("train.py --width 99999", 2, r"--width: 99999 is not from 16 to 999"),
    ("train.py --workers 99999", 2, r"--workers: 99999 is not from 0 to 256"),
    ("train.py --device meta", 2, r"--device: meta: no such device"),
    ("train.py --device hpu", 2, r"--device: hpu: no such device"),
    ("evaluate.py {run} --match {folder}/00/0.jpg", 2, r"nothing to do: .* --match A B"),
    ("train.py --epochs 0", 2, r"--epochs: 0 is not from 1"),
    ("train.py --lr nan", 2, r"--lr: nan"),
    ("train.py --backbone r51", 2, r"invalid choice: '?r51"),
    ("train.py --batch-size many", 2, r"invalid int value: 'many'"),
    ("train.py --device tpu9", 2, r"--device: tpu9: no such device"),
    ("train.py --data {folder} --batch-size 1000", 1, r"there are 32 images"),
    ("train.py --data {folder} --holdout 7", 1, r"--holdout 7: two or more must be left"),
    ("train.py --data {folder} --init {folder}/00/0.jpg", 1, r"0.jpg: not a checkpoint"),
    ("evaluate.py {run}", 2, r"nothing to do: give --lfw"),
    ("evaluate.py {run} --lfw {empty}", 1, r"pairs.txt: No such file"),
    ("evaluate.py nothing.pt --lfw {lfw}", 1, r"nothing.pt: No such file"),
    ("evaluate.py {run} --lfw {lfw} --resolutions 0", 2, r"0 is not from 1"),
    ("evaluate.py {run} --lfw {lfw} --json {run}/x.json", 1, r"last.pt: (File exists|Not a dir)"),
    ("evaluate.py {run} --study {empty}", 1, r"last.pt holds no classifier, or not of the ident"),
    ("evaluate.py {run} --study nowhere", 1, r"nowhere: No such file"),
    ("evaluate.py {run} --study {other}", 1, r"last.pt holds no classifier, or not of the ident"),
    ("evaluate.py {run} --scface nowhere", 1, r"nowhere: No such file"),
    ("evaluate.py {run} --lfw {lfw} --json {lfw}", 1, r"lfw0: Is a directory"),
    ("evaluate.py {nan} --lfw {lfw}", 1, r"nan.pt: its embeddings are not finite numbers"),
    ("evaluate.py {nan} --study {folder}", 1, r"nan.pt holds no classifier"),
    ("evaluate.py {bare} --study {folder}", 1, r"bare.pt holds no classifier"),
    ("evaluate.py {run} --lfw {lfw} --flip up", 2, r"invalid choice: 'up'"),
]


@pytest.mark.parametrize(("command", "status", "message"), BAD_COMMANDS)
def test_bad_command_lines(command, status, message, folder, lfw, trained, tmp_path, capfd,
                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "other")  # as many people, one image more
    shutil.copy(next(folder.glob("00/*.jpg")), tmp_path / "other" / "00" / "more.jpg")
    state = load_backbone(trained[0] / "last.pt").state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"backbone": {**state, "fc.bias": state["fc.bias"] * math.nan}, "head": 5},
               tmp_path / "nan.pt")
    script, *arguments = command.format(folder=folder, lfw=lfw, run=trained[0] / "last.pt",
                                        empty=tmp_path / "empty", bare=tmp_path / "bare.pt",
                                        nan=tmp_path / "nan.pt", other=tmp_path / "other").split()
    main = {"train.py": train.main, "evaluate.py": evaluate.main}[script]
    with pytest.raises(SystemExit) as stopped:
        sys.exit(evaluate.run(partial(main, arguments)))
    if status == 2:
        assert stopped.value.code == 2
        text = capfd.readouterr().err.strip().splitlines()[-1]
    else:  # sys.exit prints a text and exits with 1
        text = stopped.value.code
        assert text.startswith("error: ") and "\n" not in text
    assert re.search(message, text), text


def test_bad_input_of_a_real_process(tmp_path):
    done = cli("train.py", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: --data nowhere") and os.listdir(tmp_path) == []


def test_an_error_is_one_line_whatever_the_names_of_files_hold():
    assert evaluate.run(partial(train.main, ["--data", "a\nb"])).startswith("error: --data a b: no")
    assert evaluate.run(partial(open, "no\nfile")) == "error: no file: No such file or directory"


# ---- 8. What the README says --------------------------------------------------------------------


def test_help_shows_every_default():
    text = subprocess.run([sys.executable, HERE / "train.py", "--help"], check=True,
                          capture_output=True, text=True).stdout
    text = re.sub(r"\s+", " ", text.split("options:")[1])
    for option in re.findall(r" (--[a-z-]+)[ ,]", text):
        if option not in ("--help", "--init", "--out", "--holdout", "--weight"):
            assert re.search(rf"{option} .*?\(default: .+?\)", text), option


def test_readme_commands_parse():
    """Each `python train.py ...` of the README is a command line that train.py takes."""
    commands = re.findall(r"^python train\.py(.*)$", (HERE / "README.md").read_text(), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        assert train.parse_arguments(command.split("#")[0].split()).out


def test_readme_example_runs(tmp_path, monkeypatch):
    """The README's ten lines for one's own code are run as they stand."""
    (code,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"backbone": IResNet(10, 4), "images": torch.rand(4, 3, 112, 112) * 2 - 1,
             "labels": torch.arange(4), "head": ArcFace(4)}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].isfinite() and names["backbone"].fc.weight.grad is not None
