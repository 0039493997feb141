# SPDX-License-Identifier: MIT
"""Every formula against a slow, obvious version, every command against its promise: pytest -q"""

import importlib
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import socket
import struct
import subprocess
import sys
from decimal import Decimal, getcontext
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

import evaluate
import lrfr
import train
from evaluate import UserError, read_bin, read_lfw, read_scface, read_tinyface
from lrfr import ArcFace, IResNet, MAug, degrade, embed, load_backbone, logexp_grad, logexp_loss

HERE = Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "faces"  # real faces, where a developer has them
README = (HERE / "README.md").read_text()
CPU = torch.device("cpu")
FLOAT32 = evaluate.Settings(CPU)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])  # of six images
# The official code's thresholds, the highest first: of equals it wins.
OFFICIAL = np.linspace(-1, 1, 401)[::-1]
MAGIC = struct.pack("<I", 0xCED7230A)  # begins each record of an MXNet RecordIO file
BOMB = b"cposix\nsystem\n(S'touch bomb-went-off'\ntR."  # a hostile pickle


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def files():
    """The image files of eight drawn people, four of each."""
    return train.demo_faces(8, 4, seed=5).sources


@pytest.fixture(scope="session")
def folder(files, tmp_path_factory):
    """Those files as identity/image.jpg, with a pairs.txt of 16 pairs, as of LFW."""
    root = tmp_path_factory.mktemp("faces")
    lines = ["10\t1"]
    for i, file in enumerate(files):
        write(f"{root}/P{i // 4}/P{i // 4}_000{i % 4 + 1}.jpg", file)
    for i in range(8):
        lines += [f"P{i}\t1\t2", f"P{i}\t3\tP{7 - i}\t4"]
    write(f"{root}/pairs.txt", "\n".join(lines).encode())
    return root


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def small_backbone():
    torch.manual_seed(0)
    return IResNet(10, 4, 16).eval()


def random_images(n):
    return torch.rand(n, 3, 112, 112) * 2 - 1


def command(**options):
    """The command line of a tiny run: save_every=3 becomes --save-every 3."""
    tiny = {"backbone": "r10", "width": 16, "epochs": 1, "batch_size": 8}
    tiny |= {"holdout": 0, "workers": 0, "device": "cpu", "out": "run"}
    words = []
    for name, value in (tiny | options).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def tiny_run(out="run", **options):
    """Trains, and returns the checkpoint that the run leaves in its folder."""
    train.main(command(out=out, **options))
    return saved(out)


def saved(out):
    return torch.load(f"{out}/last.pt", weights_only=True)


def assert_equal_weights(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


# ---- 1. Augmentation and backbone ----------------------------------------------------------------


def test_degrade_does_to_each_image_what_pillow_does(files):
    images = lrfr.to_input(evaluate.read_images(files), "cpu")
    before = images.clone()
    resolutions = [2, 7, 14, 20, 33, 56, 112, 200] * 4
    ours = (degrade(images, torch.tensor(resolutions)) + 1) * 127.5
    assert degrade(images.sign(), 14).abs().max() <= 1  # of black and white, too
    assert torch.equal(images, before)
    for file, face, px in zip(files, ours, resolutions):
        size = min(px, 112)
        small = Image.open(io.BytesIO(file)).resize((size, size), Image.Resampling.BICUBIC)
        theirs = small.resize((112, 112), Image.Resampling.BICUBIC)
        difference = np.abs(face.permute(1, 2, 0).numpy() - np.array(theirs))
        assert difference.mean() < 0.5
        assert (difference <= 4).mean() > 0.99


@pytest.fixture
def without_jpeg(monkeypatch):
    """Leaves out a step of lrfr.photograph that rounds, and so enlarges small differences."""
    monkeypatch.setattr(lrfr, "compress", lambda images: images)


def photograph_slow(file, strengths, noise, px):
    """lrfr.photograph without JPEG by Pillow and numpy: a file -> (112, 112, 3) grey levels.

    strengths: six numbers from 0 to 1, as they are drawn. noise: (px, px, 3), normal.
    """
    sigma = 0.05 + 0.75 * strengths[0]
    exposure = 0.7 + 0.6 * strengths[1]
    red = 0.9 + 0.2 * strengths[2]
    blue = 0.9 + 0.2 * strengths[3]
    photons = 10 ** (2 + 1.5 * strengths[4])
    electronics = 12 * strengths[5] / 255
    image = Image.open(io.BytesIO(file))
    image = image.filter(ImageFilter.GaussianBlur(sigma * 112 / px))
    image = image.resize((px, px), Image.Resampling.BOX)
    light = np.asarray(image) / 255
    light = light * exposure * np.array([red, 1, blue])
    light = light + noise * np.sqrt(light / photons + electronics**2)
    pixels = (255 * light.clip(0, 1)).round()
    image = Image.fromarray(pixels.astype(np.uint8))
    return np.array(image.resize((112, 112), Image.Resampling.BILINEAR), float)


@pytest.mark.parametrize("px", [7, 14, 20])
@pytest.mark.usefixtures("without_jpeg")
def test_photograph_does_what_pillow_does_step_by_step(px, files):
    images = lrfr.to_input(evaluate.read_images(files), "cpu")
    before = images.clone()
    torch.manual_seed(0)
    ours = (lrfr.photograph(images, px) + 1) * 127.5
    assert torch.equal(images, before)
    torch.manual_seed(0)
    strengths = torch.stack([torch.rand(32) for _ in range(6)], 1).tolist()
    noise = torch.randn(32, 3, px, px).permute(0, 2, 3, 1).double().numpy()
    ours = ours.permute(0, 2, 3, 1).numpy()
    slow = []
    for file, strengths_of_one, noise_of_one in zip(files, strengths, noise):
        slow.append(photograph_slow(file, strengths_of_one, noise_of_one, px))
    difference = np.abs(ours - np.stack(slow))
    assert difference.mean() < 1  # Pillow's blur is made of boxes
    assert (difference <= 5).mean() > 0.99


@pytest.mark.usefixtures("without_jpeg")
def test_photograph_lights_and_disturbs_a_grey_wall_as_it_says():
    torch.manual_seed(0)
    wall = torch.zeros(400, 3, 112, 112)  # half of white
    shown = (lrfr.photograph(wall, 56) + 1) / 2
    red, green, blue = 2 * shown.mean((2, 3)).T
    gains = [(green, 1.3), (red / green, 1.1), (blue / green, 1.1)]
    for gain, largest in gains:
        even = torch.linspace(2 - largest, largest, 400)
        difference = gain.sort().values - even
        assert difference.abs().max() < 0.1 * (largest - 1)
    # Enlarged twice bilinearly, a pixel is 9/16, 3/16, 3/16 and 1/16 of four of the camera's.
    smoothed = math.sqrt(9**2 + 3**2 + 3**2 + 1**2) / 16
    noise = shown[:, 1].std((1, 2)) / smoothed
    fewest, most = 10**2, 10**3.5  # photons
    electronics = 12 / 255
    loudest = math.sqrt(0.5 * 1.3 / fewest + electronics**2)
    quietest = math.sqrt(0.5 * 0.7 / most)
    assert 0.95 * quietest < noise.min() < 2 * quietest
    assert 0.9 * loudest < noise.max() < 1.05 * loudest


def compress_slow(block, coarseness):
    """lrfr.compress for one block (3, 8, 8) and one draw, wave by wave in float64."""
    to_ycbcr = lrfr.TO_YCBCR.double().numpy()
    light_and_colour = np.tensordot(to_ycbcr, block, 1)
    result = np.zeros((3, 8, 8))
    middles = np.arange(8) + 0.5
    for channel, u, v in np.ndindex(3, 8, 8):
        down = np.cos(middles * u * np.pi / 8)
        across = np.cos(middles * v * np.pi / 8)
        wave = np.outer(down, across)
        wave = wave / np.linalg.norm(wave)
        step = coarseness * (10 + 6 * (u + v)) / 127.5
        if channel > 0:
            step = 2 * step
        amount = (light_and_colour[channel] * wave).sum()
        result[channel] += round(amount / step) * step * wave
    return np.tensordot(np.linalg.inv(to_ycbcr), result, 1)


def test_compress_rounds_the_waves_of_a_block(files):
    images = lrfr.to_input(evaluate.read_images(files[:4]), "cpu")
    images = images[:, :, ::16, ::16]  # (4, 3, 7, 7)
    torch.manual_seed(0)
    ours = lrfr.compress(images)
    torch.manual_seed(0)
    coarseness = 0.1 + 1.6 * torch.rand(4)
    for i, face in enumerate(images.double().numpy()):
        block = np.pad(face, ((0, 0), (0, 1), (0, 1)), "edge")
        slow = compress_slow(block, coarseness[i].item())
        difference = ours[i].numpy() - slow[:, :7, :7]
        assert np.abs(difference).max() < 1e-4


def compress_with(coarseness, images, monkeypatch):
    drawn = torch.full((len(images), 1, 1, 1), coarseness)
    monkeypatch.setattr(lrfr, "draw", lambda *_: drawn)
    return lrfr.compress(images)


def test_compress_takes_each_block_by_itself(monkeypatch):
    images = torch.rand(5, 3, 16, 24)
    whole = compress_with(1.0, images, monkeypatch)
    corner = compress_with(1.0, images[:, :, 8:, 16:], monkeypatch)
    assert torch.allclose(whole[:, :, 8:, 16:], corner, atol=1e-5)


@pytest.mark.parametrize(("quality", "coarseness"), [(30, 1.67), (50, 1.0), (90, 0.2)])
def test_compress_loses_about_as_much_as_jpeg(quality, coarseness, files, monkeypatch):
    pixels = evaluate.read_images(files)
    pixels = pixels[:, :, 1::5, 1::5]  # (32, 3, 23, 23)
    images = lrfr.to_input(pixels, "cpu")
    ours = compress_with(coarseness, images, monkeypatch)
    lost = (ours - images).abs().mean() * 127.5
    lost_by_jpeg = []
    for face in pixels.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(face).save(file, "JPEG", quality=quality)
        difference = np.array(Image.open(file), float) - face
        lost_by_jpeg.append(np.abs(difference).mean())
    assert lost == pytest.approx(np.mean(lost_by_jpeg), rel=0.4)


def test_photograph_compresses(files, monkeypatch):
    images = lrfr.to_input(evaluate.read_images(files[:2]), "cpu")
    monkeypatch.setattr(lrfr, "compress", lambda images: 0 * images - 2)
    assert torch.equal(lrfr.photograph(images, 7), torch.full_like(images, -1))


def test_photograph_draws_the_same_whatever_threads_and_precision_and_anew_for_each_image():
    images = random_images(6)
    images[3] = images[0]
    px = torch.tensor([7, 14, 20, 7, 112, 200])

    def photograph():
        torch.manual_seed(3)
        return lrfr.photograph(images, px)

    expected = photograph()
    threads = torch.get_num_threads()
    assert torch.equal(expected[4:], images[4:])  # from 112 px on, an image stays as it is
    assert not torch.equal(expected[0], expected[3])
    torch.set_num_threads(threads % 2 + 1)
    others = photograph()
    torch.set_num_threads(threads)
    assert torch.allclose(others, expected, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(photograph(), expected)
    half = lrfr.photograph(images.half(), px)
    assert half.dtype == torch.float16
    assert half.shape == images.shape
    assert half.abs().max() <= 1


def test_maug_draws_in_the_ratio():
    torch.manual_seed(0)
    px = MAug((7, 14, 20), lrfr.parse_ratio("1:0:3")).sample(40000)
    assert px.unique().tolist() == [7, 20]
    assert (px == 20).double().mean().item() == pytest.approx(0.75, abs=0.01)


def test_maug_photographs_a_share_and_without_a_camera_draws_nothing_more():
    def mark(images, px):
        assert px.tolist() == [7] * len(images)
        return 5 * torch.ones_like(images) @ torch.eye(8)  # a product, which autocast would round

    images = random_images(1).expand(2000, 3, 112, 112)[:, :, :8, :8]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        marked = MAug((7,), (1,), camera=0.3, photograph=mark)(images)[:, 0, 0, 0] == 5
    assert marked.double().mean().item() == pytest.approx(0.3, abs=0.04)
    torch.manual_seed(0)
    expected = degrade(images[:50], MAug().sample(50))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(MAug()(images[:50]), expected)
    assert torch.equal(torch.rand(1), after)


def test_iresnet_has_the_names_and_sizes_of_insightface():
    sizes = [  # depth, blocks in each layer, entries in the state dict, parameters
        (18, (2, 2, 2, 2), 187, 24_025_600),
        (34, (3, 4, 6, 3), 331, 34_139_328),
        (50, (3, 4, 14, 3), 475, 43_590_848),
        (100, (3, 13, 30, 3), 925, 65_156_160),
        (200, (6, 26, 60, 6), 1807, 118_833_920),
    ]
    for depth, blocks, entries, parameters in sizes:
        with torch.device("meta"):
            backbone = IResNet(depth)
        expected = {"conv1", "bn1", "prelu", "bn2", "fc", "features"}
        for layer, count in enumerate(blocks, 1):
            expected |= {f"layer{layer}.0.downsample.0", f"layer{layer}.0.downsample.1"}
            for part in ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3"):
                expected |= {f"layer{layer}.{i}.{part}" for i in range(count)}
        state = backbone.state_dict()
        assert {name.rpartition(".")[0] for name in state} == expected
        assert len(state) == entries
        assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
        assert not backbone.features.weight.requires_grad


def test_load_backbone_takes_the_usual_nestings_and_prefixes():
    state = small_backbone().state_dict()
    for prefix in ("", "module.", "model.", "_orig_mod.backbone."):
        named = {prefix + name: value for name, value in state.items()}
        contents = [named, {"backbone": named, "args": {"p": 1.0}, "epoch": np.int64(3)}]
        for key in ("state_dict_backbone", "state_dict", "model"):
            contents.append({key: named})
        for content in contents:
            torch.save(content, "net.pt")
            assert_equal_weights(load_backbone("net.pt").state_dict(), state)


def test_load_backbone_says_what_a_file_is_instead():
    state = small_backbone().state_dict()
    contents = [
        ({"state_dict": {"model.input_layer.0.weight": torch.zeros(1)}}, "AdaFace's network"),
        ({f"module.features.{name}": tensor for name, tensor in state.items()}, "may be MagFace's"),
        (torchvision.models.resnet18().state_dict(), "not InsightFace's IResNet: Error"),
        ({"a": torch.zeros(1)}, "0 blocks of an IResNet; known are"),
        ({"net": state}, r"no tensors, but \['net'\]: save the state dict alone"),
        (ArcFace(2), "it holds more than tensors: save model.state_dict"),
    ]
    for content, message in contents:
        torch.save(content, "net.pt")
        with pytest.raises(ValueError, match=f"^net.pt: .*{message}"):
            load_backbone("net.pt")
    files = [
        (Path("net.pt").read_bytes()[:200], "damaged"),
        (BOMB, "damaged"),
        (b"\x08\x07\x12\x07pytorch", "ONNX file: .github/from_onnx.py"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b"\x40" + bytes(7) + b'{"conv1.weight":', "safetensors"),
    ]
    for content, message in files:
        write("net.pth", content)
        with pytest.raises(ValueError, match=f"^net.pth: .*{message}"):
            load_backbone("net.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save("net.pth")
    with pytest.warns(), pytest.raises(ValueError, match="TorchScript: load it with"):
        load_backbone("net.pth")
    assert not Path("bomb-went-off").exists()


def test_embed_gives_unit_vectors_for_every_flip():
    backbone = small_backbone()
    images = random_images(3)
    with torch.no_grad():
        f = backbone(images)
        g = backbone(images.flip(3))
    both = torch.cat([F.normalize(f), F.normalize(g)], 1)
    for flip, expected in {"none": f, "sum": f + g, "concat": both}.items():
        expected = expected / expected.norm(dim=1, keepdim=True)
        assert torch.allclose(embed(backbone, images, flip), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own habits
def test_the_backbone_can_be_traced_and_quantised():
    backbone = small_backbone()
    images = random_images(3)
    expected = backbone(images).detach()
    traced = torch.fx.symbolic_trace(backbone)
    assert torch.allclose(traced(images), expected, atol=1e-5)
    quantised = torch.ao.quantization.quantize_dynamic(backbone, {torch.nn.Linear})
    assert F.cosine_similarity(quantised(images), expected).min() > 0.99


# ---- 2. Head, distances and total loss -----------------------------------------------------------


def arcface_slow(embeddings, weights, labels, scale, margin):
    """By trigonometry, in float64."""
    cosines = F.normalize(embeddings.double()) @ F.normalize(weights.double()).T
    logits = scale * cosines
    for i, label in enumerate(labels):
        theta = cosines[i, label].acos()
        logits[i, label] = scale * (theta + margin).cos()
        if theta + margin > math.pi:  # it goes on falling
            logits[i, label] = scale * (theta.cos() + math.cos(margin) - 1)
    return logits


def test_arcface_is_trigonometry_with_its_true_gradient():
    torch.manual_seed(0)
    head = ArcFace(7, 6, scale=30.0, margin=0.5)
    embeddings = torch.randn(40, 6)
    embeddings[:7] = 0.1 * torch.randn(7, 6) - 30 * head.weight.data  # beyond theta + m = pi
    embeddings.requires_grad_()
    labels = torch.arange(40) % 7
    logits = head(embeddings, labels)
    expected = arcface_slow(embeddings, head.weight, labels, 30, 0.5)
    assert torch.allclose(logits.double(), expected, atol=2e-4)
    factors = torch.randn(40, 7)
    inputs = (embeddings, head.weight)
    gradients = torch.autograd.grad((logits * factors).sum(), inputs)
    true_gradients = torch.autograd.grad((expected * factors).sum(), inputs)
    for gradient, true in zip(gradients, true_gradients):
        assert (gradient - true).norm() < 1e-3 * true.norm()


def test_draws_come_from_the_cpu_whatever_torchs_default_device_is():
    with torch.device("meta"):
        assert MAug().sample(3).device.type == "cpu"
        assert lrfr.check_gradient() < 1e-12


def logexp_slow(x, y, p):
    """Eq. (3) and its gradient by x, Eq. (2), as they are printed, with 60 digits."""
    getcontext().prec = 60
    n, width = x.shape
    losses, gradient = [], []
    for row in (x - y).tolist():
        d = [Decimal(value) for value in row]
        a = [abs(value) ** Decimal(p) for value in d]
        inside = 1 + sum(value.exp() - 1 for value in a)
        losses.append(float(inside.ln() / (Decimal(p) * width)))
        for d_i, a_i in zip(d, a):
            slope = abs(d_i) ** Decimal(p - 1) * a_i.exp() / inside / width / n
            gradient.append(math.copysign(float(slope), d_i))
    return sum(losses) / n, torch.tensor(gradient, dtype=torch.float64).view(n, width)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("largest", [1e-6, 1e-3, 0.05, 1.0, 8.0, 600.0])
def test_logexp_and_its_gradient_are_right_to_six_digits_over_their_range(p, largest):
    torch.manual_seed(0)
    largest = min(largest, 600 ** (1 / p))  # |d|^p up to 600
    x = largest * (2 * torch.rand(2, 40) - 1)
    y = torch.zeros(2, 40)
    x.requires_grad_()
    y.requires_grad_()
    slow_loss, slow_gradient = logexp_slow(x, y, p)
    loss = logexp_loss(x, y, p)
    assert loss.item() == pytest.approx(slow_loss, rel=1e-6, abs=0)
    for_x, for_y = torch.autograd.grad(loss, (x, y))
    for gradient in (for_x, -for_y, logexp_grad(x, y, p)):
        assert (gradient - slow_gradient).abs().max() <= 1e-6 * slow_gradient.abs().max()


def step(distance, weight=50.0, pull_both=False):
    """One forward of LRFR: the head, the loss, its parts, the backbone's embeddings."""
    outputs = []
    backbone = small_backbone()
    backbone.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    head = ArcFace(5, 16, scale=8.0, margin=0.2)
    model = lrfr.LRFR(backbone, head, MAug((7, 14), (1, 1)), distance, weight, pull_both)
    loss, parts = model(random_images(6), LABELS)
    outputs[0].retain_grad()
    return head, loss, parts, outputs[0]


def test_l1_and_l2_are_means():
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    y = torch.tensor([[1.0, 4.0], [4.0, 0.0]])
    assert lrfr.l1_loss(x, y) == (0 + 2 + 1 + 5) / 4
    assert lrfr.l2_loss(x, y) == (0 + 4 + 1 + 25) / 4


@pytest.mark.parametrize("distance", [logexp_loss, lrfr.l1_loss, lrfr.l2_loss])
def test_the_total_loss_is_the_papers(distance):
    head, loss, parts, embeddings = step(distance)
    f_hr, f_lr = embeddings.chunk(2)
    sharp = F.cross_entropy(head(f_hr, LABELS), LABELS)
    degraded = F.cross_entropy(head(f_lr, LABELS), LABELS)
    apart = distance(F.normalize(f_hr), F.normalize(f_lr)).float()
    assert torch.allclose(loss, (sharp + degraded) / 2 + 50 * apart, rtol=1e-5)
    expected = {"sharp": sharp, "degraded": degraded, "distance": apart}
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert torch.allclose(part, expected[name], rtol=1e-5), name


def test_the_distance_pulls_the_degraded_embeddings_or_both():
    def gradients(*options):
        _, loss, _, embeddings = step(*options)
        loss.backward()
        return embeddings.grad

    alone = gradients(None)
    assert alone.norm(dim=1).min() > 0  # both resolutions are classified
    sharp, degraded = (gradients(logexp_loss, 1000.0, True) - alone).chunk(2)
    assert sharp.norm(dim=1).min() > 0
    fixed, pulled = (gradients(logexp_loss, 1000.0, False) - alone).chunk(2)
    assert fixed.abs().max() < 1e-6 < pulled.norm(dim=1).min()
    assert torch.allclose(pulled, degraded, atol=1e-6)


def test_the_flips_of_the_two_resolutions_are_independent():
    lefts = []

    def network(images):
        lefts.extend(images[:, 0, 0, 0].tolist())
        return torch.ones(len(images), 4)

    images = torch.tensor([1.0, -1.0]).expand(200, 3, 2, 2)  # their left is 1, their right -1
    labels = torch.zeros(200, dtype=torch.int64)
    lrfr.LRFR(network, ArcFace(2, 4), maug=lambda images: images)(images, labels)
    draws = list(zip(lefts[:200], lefts[200:]))  # of the sharp and the degraded
    for draw in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        assert draws.count(draw) > 25


def test_embeddings_and_losses_are_not_rounded_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss, parts, embeddings = step(logexp_loss)
    for value in (embeddings, loss, *parts.values()):
        assert value.dtype == torch.float32


def test_what_is_out_of_range_is_refused():
    faces = random_images(1)
    backbone = small_backbone()
    refused = [
        (lambda: degrade(faces, 1), "a resolution must be 2 pixels or more, got 1"),
        (lambda: lrfr.photograph(faces, 1), "a resolution must be 2 pixels or more, got 1"),
        (lambda: MAug((1, 7), (1, 1)), "resolutions must be integers of 2 or more, got (1, 7)"),
        (lambda: MAug((7.9, 14), (1, 1)), "resolutions must be integers of 2 or more"),
        (lambda: MAug(camera=1.5), "camera is a probability, from 0 to 1, got 1.5"),
        (lambda: lrfr.LRFR(backbone, None, None, logexp_loss), "a distance needs degraded images"),
        (lambda: lrfr.to_input(faces, "cpu"), "must be a uint8 tensor, 0 to 255, got torch.float"),
        (lambda: degrade(faces.byte(), 7), "images must be floats in [-1, 1], got torch.uint8"),
        (lambda: embed(IResNet(10, 4), faces), "training mode: call backbone.eval() first"),
        (lambda: embed(backbone, faces, "mirror"), "got 'mirror'"),
        (lambda: embed(backbone, faces * 2.1), "not -1 to 1: see to_input"),  # ImageNet's
        (lambda: ArcFace(2, 4)(torch.zeros(2, 4), torch.zeros(1)), "(1,) labels for 2 embeddings"),
        (lambda: logexp_loss(faces, faces, 0.5), "p must be 1 or more"),
        (lambda: lrfr.l2_loss(faces, faces[:, :1]), "embeddings differ in shape"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


# ---- 3. Benchmarks -------------------------------------------------------------------------------


def test_read_image_takes_8_bits_of_any_kind_and_nothing_else():
    face = Image.effect_noise((112, 112), 64).convert("RGB")
    for mode in ("RGB", "L", "RGBA", "CMYK", "P", "1", "LA"):
        face.convert(mode).save("face.tif")
        assert np.array_equal(evaluate.read_face("face.tif"), face.convert(mode).convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6  # the face is stored sideways
    face.transpose(Image.Transpose.ROTATE_90).save("face.png", exif=exif)
    assert np.array_equal(evaluate.read_face("face.png"), face)
    for kind in ("uint16", "int32", "float32"):
        Image.fromarray(np.ones((112, 112), kind)).save("deep.tif")
        with pytest.raises(UserError, match=r"^deep.tif: pixels of mode [IF].*, not 8-bit"):
            evaluate.read_face("deep.tif")
    Image.new("1", (14_000, 14_000)).save("huge.png")
    with pytest.raises(UserError, match=r"^huge.png: not a readable image: damaged, far too large"):
        evaluate.read_face("huge.png")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n"  # for Ghostscript to run
    with pytest.raises(UserError, match="not a readable image"):
        evaluate.read_face(script)


def test_by_products_of_other_programs_are_no_faces_and_links_are_followed(folder, files):
    shutil.copytree(folder, "data")
    for name in (".ipynb_checkpoints/0.jpg", "__MACOSX/._0.jpg", "P0/._0.jpg", "P0/.Trash/0.jpg"):
        write(f"data/{name}", files[0])
    write("data/P8/notes.txt", b"no image")
    write("data/P7/more.JFIF", files[0])
    write("data/P7-/0.jpg", files[0])
    os.rename("data/P7", "elsewhere")
    os.symlink("../elsewhere", "data/P7")
    paths, labels = train.image_folder("data")
    assert np.bincount(labels).tolist() == [4] * 7 + [5, 1]
    assert labels.tolist() == sorted(labels)
    assert paths[-1] == "data/P7-/0.jpg"
    assert evaluate.images_below("data") == paths


def test_pairs_are_read_with_spaces_other_endings_and_from_kaggles_csv(folder):
    expected = read_lfw(folder)
    assert expected.pairs.genuine.tolist() == [True, False] * 8
    last = [expected.sources[images[15]] for images in expected.pairs[:2]]
    assert last == [f"{folder}/P7/P7_0003.jpg", f"{folder}/P0/P0_0004.jpg"]
    for path in folder.glob("*/*.jpg"):
        new = path.stem.replace("P0", "P 0")
        write(f"lfw/{new[:-5]}/{new}.png", path.read_bytes())
    pairs = (folder / "pairs.txt").read_text().replace("P0", "P 0")
    _, _, pairs = pairs.partition("\n")  # without the header
    write("lfw/pairs.txt", pairs.encode("utf-8-sig"))
    assert np.array_equal(read_lfw("lfw").pairs, expected.pairs)
    assert np.array_equal(np.bincount(read_lfw("lfw").identity), np.bincount(expected.identity))
    os.remove("lfw/pairs.txt")
    lines = ["name,imagenum1,imagenum2,"]
    for line in pairs.splitlines():
        fields = line.split("\t")
        lines.append(",".join(fields) + "," * (4 - len(fields)))
    write("lfw/pairs.csv", "\n".join(lines).encode())
    assert np.array_equal(read_lfw("lfw").pairs, expected.pairs)
    write("spaces/pairs.txt", (folder / "pairs.txt").read_text().replace("\t", " ").encode())
    for path in folder.glob("*/*.jpg"):
        write(f"spaces/{path.parent.name}/{path.name}", b"")
    assert np.array_equal(read_lfw("spaces").pairs, expected.pairs)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_bin_is_read_whoever_pickled_it(files, protocol):
    files = files[:20]
    truth = np.arange(10) % 2 == 1
    arrays = [np.frombuffer(file, np.uint8) for file in files]
    objects = np.array([*files, None], object)[:-1]
    contents = [(images, truth) for images in (files, arrays, objects)]
    for labels in (truth.tolist(), list(truth), truth * 1, (truth * 1).tolist()):
        contents.append((files, labels))
    for content in contents:
        write("set.bin", pickle.dumps(content, protocol))
        assert read_bin("set.bin").sources == files
        assert np.array_equal(read_bin("set.bin").pairs.genuine, truth)


def test_a_bin_of_python_2_is_read(files):
    """Its strings are bytes, as in InsightFace's own files."""
    files = files[:20]
    strings = b"".join(b"T" + struct.pack("<I", len(file)) + file for file in files)
    write("set.bin", b"\x80\x02(](" + strings + b"e](" + b"K\0K\x01" * 5 + b"et.")
    assert read_bin("set.bin").sources == files


TEN = [b"an image"] * 20  # in ten pairs
LFW_LINE = "expected 'name i j' or 'name i name j'"
BAD_SETS = [  # a file, its content, and why its set is refused
    ("lfw/pairs.txt", b"10\t300\nP0\t1\n", f"line 2: {LFW_LINE}"),
    ("lfw/pairs.txt", b"P0\t1\t2\nP0\tone\t2\n", f"line 2: {LFW_LINE}"),
    ("lfw/pairs.txt", b"\nP0/P0_0001.jpg P1/P1_0002.jpg 1\n", f"line 2: {LFW_LINE}"),
    ("lfw/pairs.txt", b"P0\t1\t9\n", "no image lfw/P0/P0_0009.jpg (or .png ...)"),
    ("lfw/pairs.txt", b"P0\t1\t2\n" * 20, "20 genuine and 0 impostor pairs"),
    ("lfw/pairs.txt", "P0\t1\t2\n\n".encode("utf-16"), f"line 2: {LFW_LINE}"),
    ("set.bin", b"", "not a verification set, as pickle.dump"),
    ("set.bin", BOMB, "makes it (it asks for posix.system)"),
    ("set.bin", pickle.dumps((TEN, [1, 0, 1] * 3)), "20 images for 9 pairs"),
    ("set.bin", pickle.dumps((TEN, [1, -1] * 5)), "label -1: expected True, False, 1 or 0"),
    ("set.bin", pickle.dumps((TEN, ["1", "0"] * 5)), "label '1': expected True, False, 1 or 0"),
    ("scface/face.jpg", b"", "no images of SCface: expected names such as 001_frontal.jpg and 001"),
    ("tinyface/Testing_Set/Probe/1_1.jpg", b"", "Set/Gallery_Match: no such folder, or no images"),
]


@pytest.mark.parametrize(("path", "content", "message"), BAD_SETS)
def test_a_set_that_cannot_be_used_is_named_with_the_reason(path, content, message, folder):
    shutil.copytree(folder, "lfw")
    write(path, content)
    root = path.split("/")[0]
    read, _ = evaluate.BENCHMARKS[root.replace("set.", "")]
    with pytest.raises(UserError, match=re.escape(message)):
        read(root)
    assert not Path("bomb-went-off").exists()


def test_scface_is_searched_distance_by_distance(files, capsys):
    """Probes at distance 3 are the mugshots themselves, the others those of another subject."""
    for n in range(8):
        subject = n + 48
        write(f"crops/mugshot_frontal_original_all/{subject:03d}_frontal.JPG", files[4 * n])
        for camera in range(1, 6):
            for distance, shown in ((1, n - 1), (2, n - 1), (3, n)):
                name = f"{subject:03d}_cam{camera}_{distance}.jpg"
                write(f"crops/surveillance_cameras_all/{name}", files[4 * shown])
    rows = evaluate.evaluate({"net": small_backbone()}, read_scface("crops"), [7], FLOAT32)
    assert [row["part"] for row in rows] == ["d1", "d2", "d3", "average"]
    assert [row["rank1"] for row in rows] == [0, 0, 1, 1 / 3]
    assert [row["probes"] for row in rows] == [40, 40, 40, None]
    assert rows[0]["set"] == "SCface, 8 subjects"
    assert rows[0]["px"] == 112  # taken as it is
    for name in ("050_cam1_1_0.png", "051_cam2_2-crop.jpg", "050_cam6_1.jpg", "050_L1.jpg"):
        write(f"crops/{name}", files[0])  # the last two are profiles and infrared images
    read_scface("crops")
    assert re.search(
        r"4 images are no part of it, by name, such as crops/05", capsys.readouterr().err
    )
    write("crops/unaligned/052_frontal.jpg", files[0])
    with pytest.raises(UserError, match=r"is 052_frontal: .* or .*/unaligned/052_frontal"):
        read_scface("crops")


def test_tinyface_counts_a_probe_without_a_mate_as_a_miss_and_says_so(files):
    for person in range(4):
        write(f"tiny/Testing_Set/Probe/{person}_1.jpg", files[4 * person])
        write(f"tiny/Testing_Set/Gallery_Match/{person + 1}_2.jpg", files[4 * person + 4])
        write(f"tiny/Testing_Set/Gallery_Distractor/{person}_3.jpg", files[4 * person + 16])
    (row,) = evaluate.evaluate({"net": small_backbone()}, read_tinyface("tiny"), [7], FLOAT32)
    assert row["set"] == "TinyFace, 4 distractors"
    assert row["probes"] == 4
    assert row["without_mate"] == 1
    assert row["rank1"] == 3 / 4
    assert "no mate" in evaluate.table([row])
    for path in Path("tiny/Testing_Set/Gallery_Match").iterdir():
        path.rename(path.with_name(f"9{path.name}"))
    with pytest.raises(UserError, match="no probe has a mate in the gallery"):
        read_tinyface("tiny")
    write("tiny/Testing_Set/Gallery_Match/img_1.jpg", files[0])
    with pytest.raises(UserError, match=r"img_1.jpg: expected names such as 12_3.jpg"):
        read_tinyface("tiny")


def ten_folds_slow(scores, genuine, thresholds):
    """In each fold, the first of the thresholds that are best on the other nine."""
    accuracies, chosen = [], []
    for fold in np.array_split(np.arange(len(genuine)), 10):
        others = np.delete(np.arange(len(genuine)), fold)
        rights = [((scores[others] >= t) == genuine[others]).sum() for t in thresholds]
        best = thresholds[rights.index(max(rights))]
        accuracies.append(((scores[fold] >= best) == genuine[fold]).mean())
        chosen.append(best)
    return np.mean(accuracies), np.std(accuracies), np.mean(chosen)


def test_ten_folds_are_those_of_the_official_code_and_of_xqlfws_own_script(folder):
    genuine = np.arange(60) % 2 == 0
    scores = np.random.default_rng(0).uniform(-0.5, 0.5, 60) + 0.3 * genuine
    found = evaluate.ten_folds(scores, genuine, read_lfw(folder).thresholds)
    assert found == pytest.approx(ten_folds_slow(scores, genuine, OFFICIAL))
    shutil.copytree(folder, "xqlfw")
    os.rename("xqlfw/pairs.txt", "xqlfw/xqlfw_pairs.txt")
    found = evaluate.ten_folds(scores, genuine, evaluate.read_xqlfw("xqlfw").thresholds)
    distances = 1 - scores
    thresholds = np.arange(0, 2, 0.001)
    accuracy, std, negated = ten_folds_slow(-distances, genuine, -thresholds)
    assert found == pytest.approx((accuracy, std, 1 + negated))


def test_verification_is_the_protocol_step_by_step(folder):
    backbone = small_backbone()
    benchmark = read_lfw(folder)
    (row,) = evaluate.evaluate(
        {"net": backbone}, benchmark, [7], evaluate.Settings(CPU, flip="none")
    )
    images = lrfr.to_input(evaluate.read_images(benchmark.sources), "cpu")
    sharp = embed(backbone, images, "none")
    degraded = embed(backbone, degrade(images, 7), "none")
    first, second, genuine = benchmark.pairs
    for kind, left in {"both": degraded, "cross": sharp}.items():
        scores = np.array([float(left[i] @ degraded[j]) for i, j in zip(first, second)])
        found = row[f"{kind}_accuracy"], row[f"{kind}_std"], row[f"{kind}_threshold"]
        assert found == pytest.approx(ten_folds_slow(scores, genuine, OFFICIAL))


def test_unaligned_images_are_warned_of(files, capsys):
    evaluate.warn_once.cache_clear()
    Image.open(io.BytesIO(files[0])).resize((250, 250)).save("large.jpg")
    assert evaluate.read_images([files[0], "large.jpg"]).shape == (2, 3, 112, 112)
    assert "images that are not 112 x 112 are resized" in capsys.readouterr().err


def test_a_degradation_of_ones_own_is_tested_like_bicubic(folder):
    """It is not called for sharp images, and once for all the networks."""
    calls = []

    def mirror(images, px):
        calls.append(px)
        return images.flip(3)

    networks = {"a": small_backbone(), "b": small_backbone()}
    (first, _, *others) = evaluate.evaluate(networks, read_lfw(folder), [7, 112], FLOAT32, mirror)
    assert calls == [7]
    assert first["both_accuracy"] == others[0]["both_accuracy"]  # the flip test sees no mirrors
    faces = read_lfw(folder).sources
    mirrored = evaluate.embed_sources(networks, "LFW", faces, [7, 112], FLOAT32, mirror)
    bicubic = evaluate.embed_sources(networks, "LFW", faces, [7], FLOAT32)
    assert torch.allclose(mirrored["a", 7], mirrored["a", 112], atol=1e-5)
    assert not torch.allclose(bicubic["a", 7], mirrored["a", 112], atol=1e-3)


def test_tar_at_far_is_of_one_threshold_over_all_impostors():
    impostor = np.linspace(-1, 0.55, 1000)
    genuine = np.linspace(0, 1, 11)
    scores = np.append(impostor, genuine)
    truth = np.arange(1011) >= 1000
    roc = evaluate.roc_curve(scores, truth)
    assert evaluate.FARS[0] == 1e-3
    assert roc[0] == 5 / 11  # 0.6 to 1.0
    for far, tar in zip(evaluate.FARS, roc):
        thresholds = [-math.inf, *scores]
        allowed = [t for t in thresholds if (impostor > t).sum() <= far * 1000]
        assert tar == pytest.approx((genuine > min(allowed)).mean())
    assert evaluate.roc_curve(scores[1:], truth[1:]) is None  # of 999 impostors


@pytest.mark.parametrize("in_turn", [True, False])
def test_pairs_sorted_by_kind_are_warned_of(in_turn, capsys):
    genuine = np.arange(20) % 2 == 0
    if not in_turn:
        genuine = np.arange(20) < 10
    pairs = evaluate.Pairs(np.arange(20), np.arange(20), genuine)
    evaluate.Benchmark("sorted", list(range(20)), pairs)
    warned = (
        "sorted: among ten folds in their order, some have pairs of one kind"
        in capsys.readouterr().err
    )
    assert warned != in_turn


def test_ranks_are_places_after_sorting():
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(30, 3))
    probes = F.normalize(torch.randn(150, 3))
    gallery[20:25] = gallery[10:15]  # equal cosines: strangers come first
    owners = np.random.default_rng(0).integers(-1, 6, 30)  # -1: of nobody
    people = np.arange(150) % 8  # 6, 7: without a mate
    hits = np.zeros(50)
    for probe, person in zip(probes, people):
        cosines = (gallery @ probe).tolist()
        order = sorted(range(30), key=lambda i: (-cosines[i], owners[i] == person))
        for k in range(1, 51):
            hits[k - 1] += person in owners[order[:k]]
    found = evaluate.identify(gallery, owners, probes, people)
    assert found == pytest.approx(hits / 150)


def test_one_command_puts_checkpoints_side_by_side(folder, capsys):
    pytest.importorskip("matplotlib")
    torch.save(small_backbone().state_dict(), "net.pt")
    shutil.copy("net.pt", "other.pt")
    faces = f"{folder}/P0/P0_0001.jpg {folder}/P1/P1_0001.jpg"
    line = f"net.pt other.pt --lfw {folder} --match {faces} --flip concat"
    line += " --resolutions 7 112 --amp off --json all.json --plots new/plots"
    evaluate.main(line.split())
    match, _, *rows = json.loads(Path("all.json").read_text())
    assert match["match"] == faces.split()
    order = [(7, "net.pt"), (7, "other.pt"), (112, "net.pt"), (112, "other.pt")]
    assert [(row["px"], row["checkpoint"]) for row in rows] == order
    assert rows[2]["both_accuracy"] == rows[2]["cross_accuracy"]  # nothing is degraded at 112 px
    shown = rf"  7 +net.pt +{100 * rows[0]['both_accuracy']:.2f} +\S+ +- "  # too few for a TAR
    assert re.search(shown, capsys.readouterr().out)
    assert os.listdir("new/plots") == ["LFW.png"]
    assert rows[0]["roc_far"] is None
    assert rows[0]["flip"] == "concat"
    assert rows[0]["precision"] == "float32"
    for option in ("lfw", "scface", "tinyface", "xqlfw"):  # does not swallow the checkpoint
        assert evaluate.parse_arguments([f"--{option}", "DIR", "net.pt"]).checkpoints == ["net.pt"]


# ---- 4. Training ---------------------------------------------------------------------------------


def test_drawn_faces_repeat_also_in_spawned_workers():
    """On macOS and Windows, and on Linux from Python 3.14 on, workers are sent the data set."""
    faces = train.demo_faces(2, 4, seed=5)
    again = train.demo_faces(2, 4, seed=5)
    loader = DataLoader(faces, 8, num_workers=1, multiprocessing_context="spawn")
    images, labels = next(iter(loader))
    assert np.array_equal(images, [again[i][0] for i in range(8)])
    assert np.array_equal(labels, again.labels)


def test_an_unreadable_image_is_named_once_and_the_next_readable_one_taken(files, capsys):
    faces = train.Faces([*files[:3], b"bad", b"worse"], np.arange(5), 5, b"")
    assert [faces[i][1] for i in (3, 4, 4)] == [0, 0, 0]  # after the last one comes the first
    printed = capsys.readouterr().err
    assert printed.count("image 4 is skipped: an image of 5 bytes: not a readable image") == 1
    faces = train.Faces([b"bad"] * 101 + files[:1], np.arange(102), 102, b"")
    assert faces[2][1] == 101
    with pytest.raises(UserError, match=r"a hundred images in a row cannot be read; image 99"):
        faces[0]


def test_the_last_identities_are_held_out(folder, files):
    def open_data(data, holdout):
        return train.open_data(train.parse_arguments(command(data=data, holdout=holdout)))

    faces, (benchmark,) = open_data(folder, 3)
    assert np.bincount(faces.labels).tolist() == [4] * 5
    first, second, genuine = benchmark.pairs
    assert genuine.tolist() == [True, False] * 15  # as many of both kinds, in turn
    assert len(set(zip(first, second))) == 30
    assert np.array_equal(benchmark.identity[first] == benchmark.identity[second], genuine)
    assert {Path(benchmark.sources[i]).parent.name for i in first} <= {"P5", "P6", "P7"}
    shutil.copytree(folder, "data")
    write("data/P7/P7_0001.jpg", b"bad")
    _, (benchmark,) = open_data("data", 3)
    assert [Path(source).name for source in benchmark.sources].count("P7_0001.jpg") == 0
    assert len(benchmark.sources) == 11
    for i in range(80):  # too few for a table: train without one
        write(f"few/{i % 40}/{i}.jpg", files[0])
    for data, holdout, people in (("few", 2, 38), (folder, 1, 7)):
        faces, benchmarks = open_data(data, holdout)
        assert faces.classes == people
        assert benchmarks == []


def write_records(payloads, keys):
    """ms1m/train.rec, split wherever a payload holds the magic number, and its index, backwards."""
    rec, idx = b"", ""
    for key, payload in zip(keys, payloads):
        idx = f"{key}\t{len(rec)}\n" + idx
        parts = payload.split(MAGIC)
        flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
        for flag, part in zip(flags, parts):
            rec += MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4)
    write("ms1m/train.rec", rec)
    write("ms1m/train.idx", idx.encode())


def record(labels, image=b""):
    """One label stands in the header, several behind it."""
    if len(labels) == 1:
        head = struct.pack("<IfQQ", 0, labels[0], 0, 0)
    else:
        head = struct.pack("<IfQQ", len(labels), 0, 0, 0)
        head += struct.pack(f"<{len(labels)}f", *labels)
    return head + image


def write_insightface(files, labels, first=1):
    """InsightFace's layout: a header, the images from key `first` on, one record an identity."""
    end = first + len(files)
    classes = sorted(set(labels))
    payloads = [record([end, end + len(classes)])]
    for file, label in zip(files, labels):
        labels_of_one = [label, 1] if label % 2 else [label]  # such files have both forms
        payloads.append(record(labels_of_one, file))
    for label in classes:
        begin = first + labels.index(label)
        payloads.append(record([begin, begin + labels.count(label)]))
    write_records(payloads, [0, *range(first, end + len(classes))])


def test_records_of_insightface_are_read(files):
    png = io.BytesIO()
    Image.open(io.BytesIO(files[1])).save(png, "PNG")
    files = [*files[:6], png.getvalue(), files[7] + MAGIC * 3 + b"abc" + MAGIC]
    layouts = [
        (1, [0, 0, 7, 7, 14, 14, 21, 21]),  # identities without images are none
        (1, [0, 0, 7, 14, 7, 14, 21, 21]),  # what counts is a record's own label
        (2**24, [0, 0, 1, 1, 2, 2, 3, 3]),
    ]
    for first, labels in layouts:
        write_insightface(files, labels, first)
        faces = train.RecordFaces("ms1m")
        for i in range(8):
            with open("ms1m/train.rec", "rb") as file:
                _, image = train.read_record(file, faces.sources[i])
            assert image == files[i]
            assert faces[i][1] == sorted(set(labels)).index(labels[i])
        assert len(faces) == 8
        assert faces.classes == 4
        assert np.array_equal(faces[6][0], faces[1][0])
    write("ms1m/property", b"3,112,112")  # says how many identities there are
    faces = train.RecordFaces("ms1m")
    assert faces.classes == 3
    with pytest.raises(UserError, match="label 3, of 3 identities"):
        faces.load(6)


def test_records_of_im2rec_are_read_in_the_order_of_their_keys(files):
    payloads = [record([label], files[i]) for i, label in enumerate((5, 0, 2, 5))]
    write_records(payloads, keys=[7, 3, 12, 5])
    index = Path("ms1m/train.idx").read_bytes()
    write("ms1m/train.idx", index * 2)  # of a writer that ran twice
    faces = train.RecordFaces("ms1m")
    assert len(faces) == 4
    assert [faces[i][1] for i in range(4)] == [0, 2, 2, 1]
    assert np.array_equal(faces[0][0], evaluate.read_face(files[1]))


def test_damaged_records_are_named(files):
    write_insightface(files[:8], [0] * 4 + [1] * 4)
    faces = train.RecordFaces("ms1m")
    write("ms1m/train.rec", Path("ms1m/train.rec").read_bytes()[: faces.sources[4]])
    with pytest.raises(UserError, match=r"^ms1m/train.rec: no whole record .* is it cut short\?"):
        faces.load(4)
    with pytest.raises(UserError, match=r"^ms1m/train.*no whole record .* is it cut short\?"):
        train.RecordFaces("ms1m")
    write("ms1m/train.idx", b"hello")
    with pytest.raises(UserError, match=r"^ms1m/train.idx"):
        train.RecordFaces("ms1m")


def test_batches_take_each_image_at_most_once_an_epoch_and_ranks_share_them(monkeypatch):
    def batches(begin, end, seed=1):
        return np.array(list(train.batches(23, 4, seed, range(begin, end))))

    first = batches(0, 5)
    second = batches(5, 10)
    assert len(np.unique(first)) == 20
    assert len(np.unique(second)) == 20
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batches(0, 5, seed=2))
    assert np.array_equal(first[3:], batches(3, 5))  # of a run that goes on
    monkeypatch.setattr(train, "RANKS", 2)
    share = batches(0, 2)
    monkeypatch.setattr(train, "RANK", 1)
    assert share.shape == (2, 4)
    assert len(np.unique([share, batches(0, 2)])) == 16


def test_jitter_moves_and_lights_each_image_by_itself():
    images = torch.full((8, 3, 112, 112), -0.5)
    images[:, :, 52:60, 52:60] = 0.5  # a square in the middle
    assert train.jitter(images, 0.0) is images
    torch.manual_seed(0)
    moved = train.jitter(images, 1.0)
    torch.manual_seed(0)
    assert torch.equal(train.jitter(images, 1.0), moved)
    rows = moved[:, 0].amax(2)  # the brightest pixel of each row
    brightness, row = rows.max(1)
    assert len(brightness.unique()) == 8
    assert len(row.unique()) > 3


def test_the_learning_rate_rises_for_a_twentieth_and_falls_to_zero():
    rates = [train.learning_rate(step, 100, 0.5) for step in range(100)]
    rise, fall = rates[:5], rates[5:]
    assert rise[4] == 0.5
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert 0 < rates[-1] < 0.01
    assert max(train.learning_rate(step, 30, 0.5) for step in range(30)) == 0.5


def test_a_run_leaves_what_it_promises(folder, capsys):
    state = tiny_run(data=folder, epochs=2, holdout=3, jitter=0.5)
    assert_equal_weights(load_backbone("run/last.pt").state_dict(), state["backbone"])
    printed = capsys.readouterr().out
    assert printed.startswith(
        "20 images of 5 identities, 8 in a step; loss logexp, weight 300.0; run: run, from step 0\n"
    )
    assert re.search(r"epoch 2/2  step 4/4  loss \S+  sharp \S+  degraded \S+  distance ", printed)
    options, *lines = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
    assert options["args"]["loss"] == "logexp"
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert [row["px"] for row in lines[2]["evaluation"]] == [7, 14, 20, 112]


# Options, and rows of faces.png: the sharp faces, and the degraded ones that training shows.
SHOWN = [({"maug": "none", "loss": "none"}, 1), ({}, 4)]


@pytest.mark.parametrize(("options", "rows"), SHOWN)
def test_faces_png_shows_what_training_shows(options, rows, folder):
    train.show_faces(train.prepare(command(data=folder, **options)))
    assert Image.open("run/faces.png").size == (8 * 112, rows * 112)


def test_faces_png_shows_the_camera_of_training(folder):
    pictures = []
    for camera in (0, 1):
        train.show_faces(train.prepare(command(data=folder, camera=camera)))
        pictures.append(np.asarray(Image.open("run/faces.png")))
    assert np.array_equal(pictures[0][:112], pictures[1][:112])
    assert not np.array_equal(pictures[0], pictures[1])


WIRING = [  # options, a part of the run, and what they make of it
    ({}, "model.weight", 300),
    ({"p": 2}, "model.weight", 720),
    ({"p": 1.5}, "model.weight", 430),
    ({"loss": "l1"}, "model.weight", 16),
    ({"loss": "l2"}, "model.weight", 180),
    ({"init": "small.pt"}, "model.weight", 78),  # of 128 dimensions
    ({"init": "small.pt", "loss": "l1"}, "model.weight", 8),
    ({"init": "small.pt", "loss": "l2"}, "model.weight", 45),
    ({"weight": 5}, "model.weight", 5),
    ({"loss": "l1"}, "model.distance", lrfr.l1_loss),
    ({"loss": "l2"}, "model.distance", lrfr.l2_loss),
    ({"loss": "none"}, "model.distance", None),
    ({"maug": "none", "loss": "none"}, "model.maug", None),
    ({}, "model.pull_both", False),
    ({"pull": "both"}, "model.pull_both", True),
    ({"scale": 5}, "model.head.scale", 5),
    ({"margin": 0.2}, "model.head.margin", 0.2),
    ({"width": 24}, "model.backbone.conv1.out_channels", 24),
]


@pytest.mark.parametrize(("options", "part", "expected"), WIRING)
def test_each_option_reaches_the_model(options, part, expected, folder):
    torch.save(IResNet(10, 16, 128).state_dict(), "small.pt")
    run = train.prepare(command(data=folder, **options))
    assert attrgetter(part)(run) == expected


def test_p_the_degradations_and_the_optimiser_are_those_of_the_options(folder):
    options = {"p": 2, "maug": "3", "resolutions": 9, "camera": 0.5, "backbone": "r18"}
    run = train.prepare(command(data=folder, **options))
    x, y = torch.arange(8.0).view(2, 1, 4)
    assert run.model.distance(x, y) == logexp_loss(x, y, 2)
    maug = run.model.maug
    assert maug.resolutions.tolist() == [9]
    assert maug.ratio.tolist() == [3]
    assert maug.camera == 0.5
    assert len(run.model.backbone.layer1) == 2
    (group,) = run.optimiser.param_groups
    assert group["weight_decay"] == 5e-4
    assert group["momentum"] == 0.9
    assert group["nesterov"] is True


def test_seed_jitter_and_precision_reach_a_step_of_training(folder):
    plain = {"data": folder, "batch_size": 32, "lr": 0, "amp": "off"}
    plain |= {"maug": "none", "loss": "none"}
    expected = tiny_run("plain", **plain)["backbone"]
    for option, value in {"seed": 1, "jitter": 3, "amp": "bf16"}.items():
        found = tiny_run(option, **plain | {option: value})["backbone"]
        name = "conv1.weight" if option == "seed" else "bn1.running_mean"
        assert not torch.equal(found[name], expected[name]), option


def test_each_step_and_seed_draws_anew(folder, monkeypatch):
    draws = []

    def draw(images, strength):
        draws.append(torch.rand(1).item())
        return images

    monkeypatch.setattr(train, "jitter", draw)
    tiny_run("zero", data=folder, seed=0, maug="none", loss="none")
    tiny_run("one", data=folder, seed=1, maug="none", loss="none")
    assert len(set(draws)) == 2 * 4


def test_gradients_are_clipped_to_a_norm_of_five_and_gone_after_a_step(folder):
    run = train.prepare(command(data=folder, lr=0.1, batch_size=32, amp="off"))
    run.model.head.scale = 1e6  # far too steep
    before = [p.detach().clone() for p in run.model.backbone.parameters()]
    train.train(run)
    squares = 0
    for old, new in zip(before, run.model.backbone.parameters()):
        squares += (new - old).square().sum().item()
    # Nesterov's momentum of 0.9 makes the first step 1.9 times as long.
    assert math.sqrt(squares) == pytest.approx(0.1 * 1.9 * 5, rel=0.02)
    assert all(p.grad is None for p in run.model.parameters())


def interrupt(*_):
    raise KeyboardInterrupt


def test_each_epoch_of_records_is_evaluated_and_a_finished_run_again(files, capsys, monkeypatch):
    write_insightface(files[:8], [0] * 4 + [1] * 4)
    write("ms1m/features.bin", b"features")
    write("ms1m/lfw.bin", pickle.dumps((files[:20], [1, 0] * 5)))
    tiny_run(data="ms1m", epochs=2)
    printed = capsys.readouterr()
    assert printed.out.count("\nlfw, flip test sum") == 2
    assert "features.bin: not a verification set" in printed.err
    with monkeypatch.context() as context:
        context.setattr(evaluate, "evaluate", interrupt)
        with pytest.raises(SystemExit, match="interrupted: the same command goes on"):
            tiny_run(data="ms1m", epochs=3)
    tiny_run(data="ms1m", epochs=3)  # is trained already
    entries = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
    assert [entry["step"] for entry in entries if "evaluation" in entry] == [1, 2, 3]


def test_a_run_goes_on_that_was_interrupted_before_its_first_checkpoint(folder, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(train, "jitter", interrupt)
        with pytest.raises(SystemExit, match="interrupted: the same command goes on"):
            tiny_run(data=folder)
    assert saved("run")["step"] == 0
    assert tiny_run(data=folder)["step"] == 4


def test_no_clock_can_end_a_run(folder, monkeypatch):
    monkeypatch.setattr(train.time, "monotonic", lambda: 1.0)  # no time passes
    monkeypatch.setattr(train.time, "time", None)  # may be set back at any moment
    tiny_run(data=folder)


def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(folder):
    options = {"data": folder, "batch_size": 4, "save_every": 3, "jitter": 0.5}
    whole = tiny_run("whole", **options)
    words = [sys.executable, HERE / "train.py", *command(**options)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step 6/8" in line:
            break
    process.kill()
    process.communicate()
    assert saved("run")["step"] in (3, 6)  # it may have been about to save
    killed = tiny_run(**options)
    assert_equal_weights(killed["backbone"], whole["backbone"])
    assert_equal_weights(killed["head"], whole["head"])


def test_resuming_refuses_contradictions_and_damage(folder):
    shutil.copytree(folder, "data")
    options = {"data": "data", "maug": "none", "loss": "none"}
    state = tiny_run(**options)
    for name, value in {"pull": "both", "width": 32, "lr": 0.5}.items():
        with pytest.raises(UserError, match=rf"last.pt was made with {name} .*, not {value}"):
            tiny_run(**options, **{name: value})
    os.rename("data/P0", "data/Q0")  # as many images and identities, other labels
    with pytest.raises(UserError, match=r"last.pt was made with other images or labels"):
        tiny_run(**options, epochs=2)
    os.rename("data/Q0", "data/P0")
    torch.save(state | {"step": 5}, "run/last.pt")
    with pytest.raises(UserError, match=r"last.pt .* 5.* --epochs .* 4"):
        tiny_run(**options)
    torch.save(state | {"args": state["args"] | {"processes": 2}}, "run/last.pt")
    with pytest.raises(UserError, match=r"last.pt was made with processes 2, not 1"):
        tiny_run(**options)
    write("run/last.pt", Path("run/last.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"last.pt is damaged"):
        tiny_run(**options)


def test_a_job_whose_data_move_goes_on(folder):
    """It begins with --init, which is not read again."""
    weights = IResNet(10, 16, 128).state_dict()
    torch.save(weights, "init.pt")
    shutil.copytree(folder, "here")
    options = {"batch_size": 24, "holdout": 2, "lr": 0}
    tiny_run(data="here", init="init.pt", **options)
    os.rename("here", "there")
    os.symlink("there", "link")
    os.remove("init.pt")
    tiny_run(data="link", init="init.pt", epochs=2, **options)
    state = tiny_run(data="there", init="init.pt", epochs=3, **options)
    assert state["step"] == 3
    assert torch.equal(state["backbone"]["fc.weight"], weights["fc.weight"])
    for other in ({"init": "other.pt"}, {}):
        with pytest.raises(
            UserError, match=r"last.pt was made with init init.pt, not (other|None)"
        ):
            train.prepare(command(data="there", epochs=3, **other, **options))


def test_before_the_first_step_options_may_change(folder):
    run = train.prepare(command(data=folder, batch_size=8))
    train.save_last(run)
    assert tiny_run(data=folder, batch_size=16)["step"] > 0


def test_a_loss_that_is_not_finite_ends_the_run(folder):
    with pytest.raises(UserError, match=r"loss .*(nan|inf) at step \d+: .*lower --lr"):
        tiny_run(data=folder, epochs=9, lr=1e9)


def test_ctrl_c_while_torch_writes_is_still_ctrl_c():
    """torch.save makes a RuntimeError of whatever ends it."""
    with pytest.raises(KeyboardInterrupt), evaluate.new_file("run/last.pt"):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 10 vs 9") from None
    assert not any(Path("run").iterdir())


@pytest.mark.parametrize("save", [pickle.dump, torch.save])
def test_a_full_disk_is_one_line_and_loses_nothing(save):
    """A limit on the size of files, as of a user's quota, is met like a full disk."""
    resource = pytest.importorskip("resource")
    write("run/last.pt", b"whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(UserError, match=r"^run/last.pt: File too large"),
            evaluate.new_file("run/last.pt") as file,
        ):
            save(torch.zeros(100_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("run/last.pt").read_bytes() == b"whole"
    assert os.listdir("run") == ["last.pt"]


def test_a_run_goes_on_in_float16_and_back(files):
    for i in range(4):  # few: many CPUs are slow in float16
        write(f"data/{i % 2}/{i}.jpg", files[i])
    for epochs, amp in enumerate(("off", "fp16", "bf16"), 1):
        state = tiny_run(
            data="data", batch_size=4, maug="none", loss="none", epochs=epochs, amp=amp
        )
        assert state["step"] == epochs
        assert bool(state["scaler"]) == (amp == "fp16")
        assert state["backbone"]["fc.weight"].isfinite().all()


# train.py with batch norm frozen, since each process has statistics of its own.
FROZEN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import train
prepare = train.prepare
def prepare_frozen(argv):
    run = prepare(argv)
    run.model.eval()
    return run
train.prepare = prepare_frozen
train.evaluate.run(train.main)
"""


def two_machines(**options):
    """Runs FROZEN on two nodes, in the folders a and b -> what each printed, and its status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank, place in enumerate("ab"):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        words += ["--master_addr=127.0.0.1", f"--master_port={port}", f"--node_rank={rank}"]
        words += ["--", "../frozen.py", HERE, *command(data="../data", **options)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        nodes.append(subprocess.Popen(words, cwd=place, text=True, **pipes))
    try:
        printed = [node.communicate(timeout=60) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return printed, [node.returncode for node in nodes]


def test_two_machines_train_like_one_process_and_refuse_to_go_on_apart():
    """In folders of their own, of which the first alone gets the checkpoint."""
    rng = np.random.default_rng(0)
    for i in range(32):  # pictures that no flip changes, since each process draws its own
        pixels = rng.integers(0, 256, (112, 1, 3), np.uint8).repeat(112, axis=1)
        os.makedirs(f"data/{i // 4}", exist_ok=True)
        Image.fromarray(pixels).save(f"data/{i // 4}/{i}.png")
    write("frozen.py", FROZEN.encode())
    os.mkdir("a")
    os.mkdir("b")
    options = {"p": 1, "resolutions": 7, "maug": 1, "amp": "off"}
    printed, codes = two_machines(batch_size=4, **options)
    assert codes == [0, 0], printed
    (first, _), (second, _) = printed
    assert "32 images of 8 identities, 8 in a step" in first
    assert second == ""
    assert not Path("b/run/last.pt").exists()
    words = [sys.executable, "frozen.py", HERE, *command(data="data", **options)]
    subprocess.run(words, check=True)
    two = saved("a/run")
    one = saved("run")
    for part in ("backbone", "head"):
        for name, value in one[part].items():
            assert torch.allclose(two[part][name], value, atol=1e-4), name
    printed, codes = two_machines(batch_size=4, epochs=2, **options)
    assert 0 not in codes
    for _, error in printed:
        assert "error: the processes differ in step or data: all machines need the same" in error


def test_the_demo_learns_from_end_to_end():
    train.main(["--epochs", "1", "--device", "cpu", "--out", "demo"])
    rows = json.loads(Path("demo/log.jsonl").read_text().splitlines()[-1])["evaluation"]
    assert rows[0]["cross_accuracy"] > 0.6  # at 7 px; chance is 0.5
    assert rows[0]["rank1"] > 0.05  # chance is 0.025


# ---- 5. What users type, and what the README says ------------------------------------------------

BAD_COMMANDS = [
    ("train.py --data nowhere", "--data nowhere: no such folder"),
    ("train.py --data high", "high/train/P0 holds images: expected "),
    ("train.py --data faces --out faces/run", "--out faces/run lies in --data"),
    ("train.py --data faces --maug 1:1", "3 resolutions, but a ratio of 2 numbers"),
    ("train.py --data faces --holdout 7", "--holdout 7: of 8 identities, two must be left"),
    ("train.py --maug 1:x:2", "not a ratio: '1:x:2'"),
    ("train.py --maug none", "--maug none leaves no degraded faces: add --loss none"),
    ("train.py --lr nan", "--lr: nan is not from 0"),
    ("train.py --data faces --batch-size 33", "32 images of 8 identities: --batch-size can be 32"),
    ("train.py --init net.pt", "a backbone of width 4 cannot"),
    ("train.py --loss l1 --p 2", "--p is the exponent of --loss logexp"),
    ("train.py --holdout 2", "--holdout is for image folders"),
    ("evaluate.py net.pt --lfw faces --match faces/P0/P0_0001.jpg", "or --match A B"),
    ("evaluate.py net.pt", "nothing to do: give --lfw"),
    ("evaluate.py net.pt --lfw faces --json net.pt", "--json net.pt: not the name of a file"),
    ("evaluate.py nan.pt --lfw faces", "nan.pt: not all its embeddings are finite"),
    ("evaluate.py faces --lfw faces", "faces: Is a directory"),
]


@pytest.mark.parametrize(("line", "message"), BAD_COMMANDS)
def test_a_bad_command_ends_in_one_line(line, message, folder, capsys):
    shutil.copytree(folder, "faces")
    shutil.copytree(folder, "high/train")
    state = small_backbone().state_dict()
    torch.save(state, "net.pt")
    torch.save(state | {"fc.bias": state["fc.bias"] * math.nan}, "nan.pt")
    script, *arguments = line.split()
    main = {"train.py": train.main, "evaluate.py": evaluate.main}[script]
    with pytest.raises(SystemExit) as stopped:
        evaluate.run(lambda: main(arguments))
    assert message in f"{stopped.value}{capsys.readouterr().err}"
    assert "\n" not in str(stopped.value)


def test_too_little_memory_is_one_line():
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SystemExit, match="error: out of memory"):
        evaluate.run(fill)


def test_any_stdout_will_do_and_a_bug_keeps_its_traceback(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    evaluate.run(lambda: print("run: \u4f60 \udcc4", flush=True))  # the latter from a GBK name
    assert terminal.buffer.getvalue() == b"run: \\u4f60 \\udcc4\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's cannot be reconfigured
    evaluate.run(print)
    monkeypatch.setattr(sys, "stdout", None)  # a daemon's
    evaluate.run(print)
    with pytest.raises(ValueError, match="could not be broadcast"):
        evaluate.run(lambda: np.zeros(2) + np.zeros(3))


def test_a_runs_name_says_what_was_swept():
    line = "--data demo --p 2 --lr 0.3 --weight 7 --camera 0.5"
    assert train.parse_arguments(line.split()).out == (
        "runs/demo-r10-1_1_2-logexp-p2-weight7-camera0.5-lr0.3-seed0"
    )
    assert train.parse_arguments([]).out == "runs/demo-r10-1_1_2-logexp-seed0"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_trains_and_evaluates_without_waiting(folder):
    state = tiny_run(data=folder, device="cuda", holdout=3, camera=0.5)
    assert state["backbone"]["fc.weight"].isfinite().all()
    run = train.prepare(command(data=folder, device="cuda", out="other"))
    images = random_images(8).to("cuda")
    labels = torch.arange(8).to("cuda")
    run.model(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    run.model(images, labels)
    torch.cuda.set_sync_debug_mode("default")


def test_lrfr_works_alone_in_an_empty_folder_and_notices_a_wrong_gradient():
    source = (HERE / "lrfr.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)) == {"math", "torch"}
    wrong = source.replace("return d.sign()", "return 2 * d.sign()")
    assert wrong != source
    for text, status in ((source, 0), (wrong, 1)):
        write("lrfr.py", text.encode())
        done = subprocess.run([sys.executable, "-I", "lrfr.py"], capture_output=True, check=False)
        assert done.returncode == status


def test_the_readmes_commands_parse():
    commands = r"^(?:python|torchrun .*--) (train|evaluate).py ?(.*)"
    found = re.findall(commands, README, re.MULTILINE)
    assert len(found) >= 5
    for name, line in found:
        script = {"train": train, "evaluate": evaluate}[name]
        assert script.parse_arguments(line.partition("#")[0].split())


def test_the_readmes_two_examples_run(files):
    training, embedding = re.findall(r"```py(?:thon)?\n(.*?)```", README, re.DOTALL)
    names = {"backbone": IResNet(10, 4), "images": random_images(4), "labels": torch.arange(4)}
    exec(training, names)
    assert names["loss"].isfinite()
    write("a.jpg", files[0])
    write("b.jpg", files[1])
    torch.save(small_backbone().state_dict(), "last.pt")
    exec(embedding, names)
    assert names["embeddings"].shape == (2, 16)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real faces beside the project")
def test_files_that_mxnet_has_written_are_read():
    faces = train.RecordFaces(REAL / "insightface")
    labels = set()
    for i in range(0, 3000, 10):
        _, label = faces.load(i)
        labels.add(label)
    assert labels == set(range(60))
    assert len(read_bin(REAL / "insightface" / "lfw_fold1.bin").pairs.genuine) == 600
    with pytest.raises(UserError, match="60 genuine and 0 impostor pairs"):
        read_bin(REAL / "insightface" / "lfw_ndarray.bin")


# ---- 6. The scripts behind RESULTS.md ------------------------------------------------------------


def script(name):
    """A script of the folder .github as a module."""
    folder = str(HERE / ".github")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def trained(files, tmp_path_factory):
    """faces, four pictures each of four people, and net, a tiny run on two of them."""
    root = tmp_path_factory.mktemp("trained")
    for i in range(16):
        write(f"{root}/faces/P{i // 4}/P{i // 4}_000{i % 4 + 1}.jpg", files[i])
    genuine = ["P0 1 2", "P0 1 3", "P0 1 4", "P1 2 3", "P1 2 4"]
    impostor = ["P0 1 P1 1", "P0 2 P1 2", "P0 3 P1 3", "P0 4 P1 4", "P0 1 P1 2"]
    write(f"{root}/faces/pairs.txt", "\n".join(genuine + impostor).encode())
    tiny_run(root / "net", data=root / "faces", holdout=2)
    return root


STUDIED = "gradient.png lfw-both.png lfw-cross.png study.jsonl"
FIGURES = [  # a command, the files that it writes, and how many lines of results are in them
    ("derivatives --out new", "derivatives.png", 0),
    ("errors net/last.pt --lfw faces --images 4 --out new", "errors.png", 0),
    ("embeddings net/last.pt --lfw faces --out new", "embeddings-net.png", 0),
    ("study net/last.pt --lfw faces --data faces --out new", STUDIED, 19),
    ("weights net/last.pt --lfw faces --images 4 --json new/a.jsonl", "a.jsonl", 3 * 2 * 4),
    ("faces --out new", "camera.png", 0),
    ("camera net/last.pt --lfw faces --json new/a.jsonl", "a.jsonl", 8),
    ("screen net/last.pt --data faces --holdout 2 --json new/a.jsonl", "a.jsonl", 8),
]


@pytest.mark.parametrize(("line", "written", "count"), FIGURES)
def test_each_command_of_figures_py_writes_what_it_says(line, written, count, trained):
    pytest.importorskip("matplotlib")
    os.symlink(trained / "faces", "faces")
    os.symlink(trained / "net", "net")
    script("figures").main(line.split())
    assert sorted(os.listdir("new")) == written.split()
    results = [path.read_text() for path in Path("new").glob("*.jsonl")]
    assert "".join(results).count("\n") == count


def test_speed_py_compares_the_steps_and_counts_images(files, capsys):
    speed = script("speed")
    options = "--width 16 --batch-size 2 --steps 1 --repeats 1 --device cpu"
    speed.main(["step", "10", *options.split()])
    printed = capsys.readouterr().out
    for text in ("optimiser", "r10, width 16, batch 2:", "this step is "):
        assert text in printed
    write("faces/P0/0.jpg", files[0])
    speed.main(["decode", "faces", "--repeats", "1"])
    assert capsys.readouterr().out.endswith(" images/s of 1\n")


# ---- 7. Weights out of ONNX files ----------------------------------------------------------------


@pytest.fixture
def from_onnx():
    pytest.importorskip("onnxscript")  # for exporting
    return script("from_onnx")


def export(backbone, path, exporter="insightface"):
    """Writes an ONNX file as InsightFace's torch2onnx.py does, or with torch's new exporter."""
    image = torch.zeros(2, 3, 112, 112)
    options = {"dynamo": False, "opset_version": 11, "keep_initializers_as_inputs": False}
    if exporter == "new":
        options = {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    torch.onnx.export(backbone, (image,), path, **options)


def train_step(backbone, images):
    """The embeddings in training mode, and the gradient of the first convolution."""
    embeddings = backbone.train()(images)
    torch.manual_seed(0)
    head = ArcFace(32, 32, scale=16, margin=0.1)
    labels = torch.arange(len(images)) % 32
    F.cross_entropy(head(embeddings, labels), labels).backward()
    return embeddings, backbone.conv1.weight.grad.flatten()


def trained_backbone(images):
    """A small IResNet after a few steps, with the statistics of these images."""
    torch.manual_seed(0)
    backbone = IResNet(10, 4, 32)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
        module.momentum = 1.0  # the statistics are those of the last batch
    optimiser = torch.optim.SGD(backbone.parameters(), 0.05, momentum=0.9)
    for batch in images.chunk(8):
        train_step(backbone, batch)
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        backbone.layer2[0].bn2.weight[0] = 0  # folds a filter of zeros
        backbone(images)
    return backbone.eval()


@pytest.mark.filterwarnings("ignore")  # torch warns of its old exporter
@pytest.mark.parametrize(("exporter", "norms"), [("insightface", 6), ("new", 5)])
def test_an_onnx_file_comes_back_as_a_network_that_trains_as_it_did(exporter, norms, from_onnx):
    faces = train.demo_faces(32, 8, seed=7)
    images = lrfr.to_input(evaluate.read_images(faces.sources), "cpu").contiguous()
    original = trained_backbone(images[:128])
    export(original, "net.onnx", exporter)
    kinds = [node.op_type for node in from_onnx.onnx.load("net.onnx").graph.node]
    assert kinds.count("BatchNormalization") == norms  # the others of 19 are folded
    for i, source in enumerate(faces.sources[:128]):
        write(f"faces/{i}.jpg", source)
    from_onnx.main(["net.onnx", "--images", "faces", "--out", "net.pth"])
    converted = load_backbone("net.pth")
    strangers = images[128:]
    with torch.no_grad():
        assert torch.allclose(converted(images[:8]), original(images[:8]), rtol=0, atol=1e-4)
    original.zero_grad()
    embeddings, gradient = train_step(converted, strangers)
    expected, expected_gradient = train_step(original, strangers)
    assert F.cosine_similarity(embeddings, expected).min() > 0.95
    assert F.cosine_similarity(gradient, expected_gradient, 0) > 0.9


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_graph_may_be_written_in_other_ways(from_onnx, folder):
    """MatMul and Add in place of Gemm, another epsilon; equal slopes of PReLU are one tensor."""
    onnx = from_onnx.onnx
    export(small_backbone(), "net.onnx")  # all slopes are 0.25
    model = onnx.load("net.onnx")
    nodes = []
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            node.attribute[0].f = 0.1  # epsilon
        if node.op_type == "Gemm":
            x, weight, bias = node.input
            (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == weight]
            transposed = onnx.numpy_helper.to_array(tensor).T.copy()
            tensor.CopyFrom(onnx.numpy_helper.from_array(transposed, weight))
            nodes.append(onnx.helper.make_node("MatMul", [x, weight], ["product"]))
            node = onnx.helper.make_node("Add", [bias, "product"], node.output)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, "net.onnx")
    from_onnx.main(["net.onnx", "--images", str(folder), "--out", "net.pth"])  # compares
    assert load_backbone("net.pth").features.running_var.min() > 0.1 - 1e-5


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_onnx_file_of_an_iresnet_is_named(from_onnx, files):
    write("one/0.jpg", files[0])
    write("faces/0.jpg", files[0])
    write("faces/1.jpg", files[1])
    backbone = small_backbone()
    export(backbone, "net.onnx")
    write("cut.onnx", Path("net.onnx").read_bytes()[:-10])
    write("empty.onnx", b"")
    block = backbone.layer2[0]
    block.conv1.stride = (2, 2)
    block.conv2.stride = (1, 1)
    export(backbone, "stride.onnx")
    export(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), "other.onnx")
    refused = {
        "cut.onnx": "cut.onnx: not an ONNX file, or a damaged one",
        "empty.onnx": "empty.onnx: not InsightFace's IResNet: the graph ends, where Conv was",
        "nowhere.onnx": "nowhere.onnx: No such file",
        "other.onnx": "node 2 of 2 is Relu .*, where PRelu was expected",
        "stride.onnx": "its embeddings are not those of an IResNet; nothing is written",
        "net.onnx --images none": "none: no such folder, or no images in it",
        "net.onnx --images one": "--images one: 1 images; 2 or more are needed",
    }
    for line, message in refused.items():
        with pytest.raises(UserError, match=message):
            from_onnx.main(["--images", "faces", "--out", "out.pth", *line.split()])
    assert not os.path.exists("out.pth")


def test_from_onnx_says_what_to_install_where_onnx_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit, match="pip install onnx"):
        runpy.run_path(str(HERE / ".github" / "from_onnx.py"))
