# SPDX-License-Identifier: MIT
"""Train a face recogniser on sharp and degraded faces: python train.py --data ms1m --maug 1:1:2

Without --data it draws its own faces. `--maug none --loss none` is the paper's baseline. A run
leaves in its folder: last.pt (weights and arguments), log.jsonl, and faces.png: what it learns.
"""
import argparse
import glob
import io
import json
import math
import os
import signal
import struct
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from evaluate import (SIZE, add_device_options, autocast, clock, keep_memory, make_pairs, number,
                      precision, print_table, read_bin, read_image, run, to_input, verify,
                      write_file)
from lrfr import (DEPTHS, LRFR, ArcFace, IResNet, MAug, degrade, l1_loss, l2_loss, load_backbone,
                  logexp_loss, parse_ratio)

RANK, RANKS = (int(os.environ.get(key, low)) for key, low in (("RANK", "0"), ("WORLD_SIZE", "1")))
STOP_SIGNALS = []  # those that have come in


def say(text):
    """Prints on the first of the processes that torchrun started, or on the only one."""
    if RANK == 0:
        print(text, flush=True)


# ---- 1. Data ------------------------------------------------------------------------------------


class Faces(Dataset):
    """Faces with labels 0 .. classes - 1: item i is (3, 112, 112) uint8 RGB, its label, and None.

    A face that cannot be read is None, and the reason stands in the last place. sources: an array
    of paths or of the bytes of image files, or Records.
    """

    def __init__(self, name, sources, labels):
        self.name, self.sources, self.labels = name, sources, np.asarray(labels)
        self.classes = int(self.labels.max()) + 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        try:
            image = read_image(self.sources[i], f"{self.name}, image {i}")
            return image, int(self.labels[i]), None
        except ValueError as error:
            return None, int(self.labels[i]), str(error)

    def split(self, count):
        """Two sets: all but the last `count` identities, and those."""
        first = self.classes - count
        kept, rest = np.flatnonzero(self.labels < first), np.flatnonzero(self.labels >= first)
        return (Faces(self.name, self.sources[kept], self.labels[kept]),
                Faces(self.name, self.sources[rest], self.labels[rest] - first))


def collate(items):
    """Items of Faces -> images, labels, and what was wrong with those that are left out."""
    good = [(image, label) for image, label, error in items if error is None]
    images, labels = zip(*good, strict=True) if good else ((torch.zeros(3, SIZE, SIZE),), (0,))
    return torch.stack(images), torch.tensor(labels), [error for *_, error in items if error]


def image_folder(root):
    """`root`/identity/image.jpg (or .png ...) -> Faces, identities and images in sorted order."""
    sources, labels = [], []
    for identity in sorted(entry.path for entry in os.scandir(root) if entry.is_dir()):
        images = sorted(entry.path for entry in os.scandir(identity) if entry.name.lower().endswith(
            (".jpg", ".jpeg", ".png", ".bmp", ".webp")))
        labels += [labels[-1] + 1 if labels else 0] * len(images)
        sources += images
    if len(set(labels)) < 2:
        raise ValueError(f"{root}: {len(sources)} images of {len(set(labels))} identities; two or "
                         f"more are needed, as {os.path.join(root, 'identity', 'image.jpg')}")
    return Faces(root, np.array(sources, object), labels)


class Records:
    """Images in a RecordIO file: [i] is the bytes of the i-th, [array of indices] a part of them.

    Every read opens the file anew, so that processes and threads share nothing.
    """

    def __init__(self, path, offsets):
        self.path, self.offsets = path, offsets

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        offset = self.offsets[i]
        return Records(self.path, offset) if np.ndim(offset) else self.read(offset)[1]

    def read(self, offset):
        """The labels of the record at a byte offset, and its image file; b"" if it has none."""
        parts, flag, magic = [], 1, struct.pack("<I", 0xced7230a)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(offset)
            while flag in (1, 2):  # 0 is a whole record; 1, then some 2, then 3 are parts of one
                head = file.read(8)
                word = int.from_bytes(head[4:], "little")
                flag, length = word >> 29, word & (1 << 29) - 1
                if (head[:4] != magic or flag not in ((2, 3) if parts else (0, 1))
                        or length > size - file.tell()):
                    raise ValueError(f"{self.path}: no whole record at byte {offset}; the file is "
                                     "damaged, or cut short, or not that of its .idx")
                parts.append(file.read(length))
                file.seek(-length % 4, os.SEEK_CUR)
        payload = magic.join(parts)  # the writer splits a record where it holds the magic
        count = int.from_bytes(payload[:4], "little")
        if len(payload) < 24 + 4 * count:
            raise ValueError(f"{self.path}: the record at byte {offset} is shorter than its header")
        labels = np.frombuffer(payload, "<f4", max(count, 1), 24 if count else 4)
        return labels, payload[24 + 4 * count:]


def record_file(root):
    """`root`/train.rec and train.idx, as InsightFace or im2rec makes them -> Faces.

    InsightFace: record 0 holds (a, b), 1 .. a-1 are images, a .. b-1 identities with their first
    image, so that few reads tell all labels. im2rec: every record is an image with its label.
    """
    path, index = os.path.join(root, "train.rec"), os.path.join(root, "train.idx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what numpy says of text that is no number
        try:
            keys, offsets = np.fromfile(index, np.int64, sep=" ").reshape(-1, 2).T
        except (ValueError, DeprecationWarning):
            raise ValueError(f"{index}: not lines of a key and a byte offset") from None
    order = np.argsort(keys, kind="stable")
    keys, offsets, size = keys[order], offsets[order], os.path.getsize(path)
    if len(keys) < 2 or offsets.min() < 0 or offsets.max() > size - 8:
        raise ValueError(f"{index}: {len(keys)} records, up to byte {offsets.max(initial=0)}, but "
                         f"{path} has {size} bytes: cut short, or of another .idx")
    read = Records(path, None).read
    (header, image), start, end = read(offsets[0]), 0, len(keys)
    if not image:
        if len(header) < 2 or not 1 < header[0] <= keys[-1] + 2:
            raise ValueError(f"{path}: record 0 holds {header}, not the number of images")
        start, end = 1, min(np.searchsorted(keys, int(header[0])), len(keys))
        while end > 1 and not read(offsets[end - 1])[1]:
            end -= 1  # float32 is not exact above 2^24: look where the images really end
        while end < len(keys) and read(offsets[end])[1]:
            end += 1
    if end < len(keys) and keys[-1] < 2**24:
        firsts = np.array([read(offset)[0][0] for offset in offsets[end:]])
        if firsts[0] != keys[start] or (np.diff(firsts) <= 0).any() or firsts[-1] > keys[end - 1]:
            raise ValueError(f"{path}: its identity records do not tell the first image of each")
        own = np.array([read(offset)[0][0] for offset in offsets[np.searchsorted(keys, firsts)]])
        labels = own[np.searchsorted(firsts, keys[start:end], side="right") - 1]
    else:
        labels = np.array([read(offset)[0][0] for offset in offsets[start:end]])
    classes = len(labels)
    if os.path.isfile(os.path.join(root, "property")):
        with open(os.path.join(root, "property")) as file:
            classes = int(file.read().split(",")[0])
    if not len(labels) or not ((labels >= 0) & (labels < classes) & (labels % 1 == 0)).all():
        raise ValueError(f"{path}: labels out of range: expected 0 to {classes - 1}")
    return Faces(path, Records(path, offsets[start:end]), labels.astype(np.int32))


def draw_faces(traits, rng):
    """Traits (N, 24) of people, in [-1, 1] -> (N, 112, 112, 3) uint8, one picture of each.

    The traits are what makes a person; pose, expression, light, background and noise come from rng.
    A face is a pile of soft ellipses, in units where the picture reaches from -1 to 1.
    """
    n, t = len(traits), traits.view(len(traits), -1, 1, 1).unbind(1)  # 24 times (N, 1, 1)
    yaw, pitch, roll, near, right, down, smile, gaze, lit_x, lit_y, bright, warm = torch.randn(
        12, n, 1, 1, generator=rng).clamp(-2, 2)
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    x, y, size = u - 0.05 * right, v - 0.05 * down - 0.05, 1.15 + 0.06 * near
    cos, sin = (0.1 * roll).cos() / size, (0.1 * roll).sin() / size
    x, y = x * cos + y * sin, y * cos - x * sin
    canvas = (0.5 + 0.2 * torch.randn(n, 1, 1, 1, generator=rng)
              + 0.1 * torch.randn(n, 3, 1, 1, generator=rng)
              + 0.1 * (v * lit_y + u * lit_x)[:, None])

    def rgb(*channels):
        return torch.stack(channels, 1)  # (N, 3, 1, 1)

    def ellipse(cx, cy, rx, ry, colour, depth=0.0, tilt=0.0, bend=0.0, edge=0.03):
        nonlocal canvas
        dx = x - cx - 0.06 * depth * yaw  # what is nearer moves further when the head turns
        dy = y - cy - 0.05 * depth * pitch
        dx, dy = dx + tilt * dy, dy - tilt * dx
        outside = ((dx / rx).square() + ((dy + bend * dx.square()) / ry).square()).sqrt() - 1
        radius = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
        canvas = torch.lerp(canvas, colour, torch.sigmoid(-3 * outside * radius / edge)[:, None])

    tone, dark = 0.66 + 0.08 * t[0], 0.26 + 0.12 * t[2]
    skin = rgb(tone + 0.12, tone - 0.06 + 0.015 * t[1], tone - 0.2 - 0.025 * t[1])
    hair = rgb(dark + 0.06, dark + 0.03 * t[3], dark - 0.08 + 0.025 * t[3])
    lips = rgb(0.68 + 0.15 * t[0], 0.32 + 0.1 * t[0], 0.34 + 0.1 * t[0])
    iris = rgb(0.3 + 0.12 * t[17], 0.28 + 0.1 * t[17], 0.28 - 0.2 * t[17])
    wide, tall, nose, mouth = (0.56 + 0.07 * t[4], 0.76 + 0.07 * t[5], 0.1 + 0.03 * t[23],
                               0.2 + 0.05 * t[1])
    ellipse(0, -0.16, wide + 0.13 + 0.06 * t[7], 0.72 + 0.06 * t[7], hair, -0.6)
    ellipse(0, 0.25, wide + 0.1, 0.42 + 0.5 * t[8], hair, -0.8)  # down to the ears, or to the neck
    ellipse(0, 0.95, 0.34 + 0.05 * t[4], 0.5, skin * 0.8, -0.8)  # neck
    for side in (-1, 1):
        ellipse(side * (wide + 0.02), 0.02, 0.08, 0.16 + 0.04 * t[9], skin * 0.85, -0.5)
    ellipse(0, 0.02, wide, tall, skin, 0.2)
    ellipse(0, 0.34, wide * (0.82 + 0.12 * t[10]), tall * 0.58, skin, 0.2)  # jaw
    ellipse(0.25 * t[11], 0.14 * t[6] - 0.66, wide * 0.98, 0.24, hair, 0.1, bend=-0.3 * t[12])
    beard = F.relu(t[13] - 0.2)
    ellipse(0, 0.58, wide * 0.75, 0.26 + 0.1 * beard,
            torch.where(beard[:, None] > 0, hair, skin), 0.3, edge=0.12)
    eye_x, eye_y, eye, lid = (0.25 + 0.045 * t[14], 0.04 * t[15] - 0.08, 0.1 + 0.022 * t[16],
                              0.055 + 0.012 * t[18] + 0.008 * gaze)
    for side in (-1, 1):
        ellipse(side * eye_x, eye_y, eye + 0.035, lid + 0.035, skin * 0.82, 0.35)
        ellipse(side * eye_x, eye_y, eye, lid, 0 * skin + 0.94, 0.4, 0.15 * side * t[19], edge=0.02)
        for radius, colour in ((0.05, iris), (0.024, iris * 0.2)):
            ellipse(side * eye_x + 0.02 * gaze, eye_y, radius, radius, colour, 0.4, edge=0.02)
        ellipse(side * eye_x * 1.02, eye_y - 0.16 - 0.04 * t[20] - 0.01 * smile, 0.16,
                0.03 + 0.016 * t[21], hair * 0.8, 0.4, side * (0.18 * t[22] - 0.05), bend=-0.8)
        ellipse(side * nose * 0.5, 0.31 + 0.03 * t[5], 0.028, 0.018, skin * 0.5, 0.9)
    ellipse(0, 0.12, nose * 0.5, 0.2, skin * 1.06, 0.8, edge=0.05)
    ellipse(0, 0.28 + 0.03 * t[5], nose, 0.06, skin * 0.9, 0.9)
    ellipse(0, 0.53, mouth + 0.015 * smile, 0.055 + 0.02 * t[3], lips, 0.6, bend=0.6 * smile + 0.5)
    ellipse(0, 0.53, mouth * 0.85, 0.016 + 0.012 * F.relu(smile), lips * 0.45, 0.6,
            bend=0.6 * smile + 0.5)
    light = (1 + 0.2 * bright + 0.25 * lit_x * u + 0.15 * lit_y * v)[:, None]
    canvas = canvas * light * (1 + 0.07 * rgb(warm, 0 * warm, -warm))
    canvas = canvas + 0.03 * torch.randn(canvas.shape, generator=rng)
    return (canvas.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)


def demo_faces(people, pictures, seed):
    """Synthetic people, with so many pictures of each, as Faces whose sources are JPEG files."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(people).repeat_interleave(pictures)
    traits = (torch.rand(people, 24, generator=rng) * 2 - 1)[labels]

    def jpeg(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
        return file.getvalue()

    with ThreadPoolExecutor(4) as pool:
        files = [jpg for part in traits.split(32) for jpg in pool.map(jpeg, draw_faces(part, rng))]
    return Faces("demo", np.array(files, object), labels)


def open_data(name, holdout):
    """--data -> the identities to train on, those held out (or None), and paths of .bin sets."""
    if name == "demo":
        say("drawing the demo's faces")
        return demo_faces(300, 20, seed=1), demo_faces(40, 10, seed=2), []
    root = next((path for path in (name, os.path.join("data", name)) if os.path.isdir(path)), None)
    if root is None:
        raise ValueError(
            f"--data {name}: no folder {name}, no {os.path.join('data', name)}; put train.rec and "
            "train.idx there (MS1M: github.com/deepinsight/insightface/wiki/Dataset-Zoo), or "
            "aligned 112 x 112 faces as identity/image.jpg, or try --data demo")
    packed = os.path.exists(os.path.join(root, "train.rec"))
    faces = record_file(root) if packed else image_folder(root)
    count = holdout
    if holdout is None:  # two or more, or none where they are few
        count = min(100, faces.classes // 20) * (faces.classes >= 40)
    if count > faces.classes - 2:
        raise ValueError(f"--holdout {count} of {faces.classes} identities leaves fewer than two")
    return (*(faces.split(count) if count else (faces, None)),
            sorted(glob.glob(os.path.join(glob.escape(root), "*.bin"))) if packed else [])


def batches(images, batch_size, seed, steps):
    """Yields the images of each of `steps`; every epoch has a new order, every rank its share."""
    per_epoch, ordered = images // batch_size, None
    for step in steps:
        epoch, i = divmod(step, per_epoch)
        if ordered != epoch:
            order, ordered = np.random.default_rng([seed, epoch]).permutation(images), epoch
        yield order[i * batch_size:][:batch_size][RANK::RANKS]


def jitter(images, strength):
    """Random scale, turn, shift, contrast and brightness: fewer people are learnt by heart."""
    scale, turn, right, down, contrast, bright = strength * (torch.rand(6, len(images)) * 2 - 1)
    cos, sin = (1 + 0.15 * scale) * (0.15 * turn).cos(), (1 + 0.15 * scale) * (0.15 * turn).sin()
    affine = torch.stack([cos, -sin, 0.1 * right, sin, cos, 0.1 * down], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine.to(images.device), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, offset = (0.3 * z.view(-1, 1, 1, 1).to(images.device) for z in (contrast, bright))
    return (images * (1 + gain) + offset).clamp(-1, 1)


def save_faces(path, faces, resolutions):
    """A picture of eight training faces, each beside its degraded versions."""
    images, *_ = collate([faces[i] for i in np.linspace(0, len(faces) - 1, 8).astype(int)])
    sharp = to_input(images[torch.arange(8) % len(images)], "cpu")  # some may be unreadable
    tiles = torch.stack([sharp, *(degrade(sharp, px) for px in resolutions)], 1)  # (8, R, 3, y, x)
    tiles = tiles.unflatten(0, (4, 2)).permute(0, 4, 1, 2, 5, 3)  # rows, y, columns, R, x, colour
    pixels = ((tiles + 1) * 127.5).round().byte().flatten(2, 4).flatten(0, 1)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    write_file(path, file.getvalue())


# ---- 2. Training --------------------------------------------------------------------------------

RECIPE = {  # option: (for real data, for the demo)
    "backbone": ("r50", "r10"), "width": (64, 16), "scale": (64.0, 32.0), "margin": (0.5, 0.3),
    "epochs": (20, 3), "batch_size": (128, 64), "lr": (0.02, 0.1)}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def add(name, text, **options):
        key = name[2:].replace("-", "_")
        if key in RECIPE:
            options["default"] = argparse.SUPPRESS
            text += f" (default: {RECIPE[key][0]}; with the demo: {RECIPE[key][1]})"
        parser.add_argument(name, help=text, **options)

    add("--data", "folder of identity/image.jpg, or of train.rec, or demo: drawn faces",
        default="demo")
    add("--maug", "ratio of the resolutions, or none", default="1:1:2")
    add("--resolutions", "of MAug, in pixels", type=number(int, 1, SIZE), nargs="+",
        default=[7, 14, 20], metavar="PX")
    add("--loss", "distance between sharp and degraded", choices=["logexp", "l1", "l2", "none"],
        default="logexp")
    add("--p", "exponent of the LogExp distance", type=number(float, 1), default=1.0)
    add("--weight", "lambda, weight of the distance", type=number(float, 0), default=1.0)
    add("--backbone", "depth of the IResNet", choices=[f"r{depth}" for depth in DEPTHS])
    add("--width", "channels of its first stage; InsightFace: 64; under 16 oneDNN crashes",
        type=number(int, 16))
    add("--dropout", "before the last layer", type=number(float, 0), default=0.0)
    add("--scale", "s of ArcFace", type=number(float, 0))
    add("--margin", "m of ArcFace, in radians", type=number(float, 0, 1.5))
    add("--epochs", "passes over the data", type=number(int, 1))
    add("--batch-size", "faces per step", type=number(int, 2))
    add("--lr", "highest learning rate", type=number(float, 0))
    add("--weight-decay", "of all parameters", type=number(float, 0), default=5e-4)
    add("--jitter", "strength of random crops and light", type=number(float, 0), default=0.0)
    add("--init", "checkpoint, or InsightFace weights, to start from", metavar="FILE")
    add("--holdout", "identities kept for the final table (default: 5 %% of them, at most 100)",
        type=number(int, 0), default=argparse.SUPPRESS)
    add("--out", "folder of the run (default: runs/ and a name made of the arguments)",
        default=argparse.SUPPRESS)
    add("--save-every", "steps between checkpoints; each epoch ends with one too",
        type=number(int, 1), default=2000)
    add("--workers", "processes that decode images", type=number(int, 0), default=1)
    add("--seed", "of everything random", type=number(int, 0), default=0)
    add_device_options(parser)
    args = parser.parse_args(argv)
    for key, (real, demo) in RECIPE.items():
        vars(args).setdefault(key, demo if args.data == "demo" else real)
    vars(args).setdefault("holdout", None)
    args.seed %= 2**40  # torch takes 64 bits, and each step its own part of them
    if args.maug == "none" and args.loss != "none":
        parser.error(f"--loss {args.loss} compares sharp with degraded faces; --maug none has only "
                     "sharp ones: add --loss none")
    name = os.path.basename(os.path.normpath(args.data))
    distance = f"{args.loss}{args.p:g}" if args.loss == "logexp" else args.loss
    vars(args).setdefault("out", os.path.join("runs", "-".join([
        name, args.backbone, args.maug.replace(":", "_"), distance, f"seed{args.seed}"])))
    return args


def build(args, classes):
    """Arguments and number of identities -> the model that computes the loss, on the device."""
    backbone = IResNet(int(args.backbone[1:]), args.width, dropout=args.dropout)
    if args.init:
        try:
            backbone.load_state_dict(load_backbone(args.init).state_dict())
        except RuntimeError:
            raise ValueError(f"--init {args.init}: its weights are of another shape than "
                             f"--backbone {args.backbone} --width {args.width}") from None
    distance = {"logexp": partial(logexp_loss, p=args.p), "l1": l1_loss, "l2": l2_loss}
    maug = None if args.maug == "none" else MAug(args.resolutions, parse_ratio(args.maug))
    head = ArcFace(classes, scale=args.scale, margin=args.margin)
    model = LRFR(backbone, head, maug, distance.get(args.loss), args.weight)
    return model.to(args.device, memory_format=torch.channels_last)


def learning_rate(step, steps, peak):
    """Up linearly for the first twentieth of the steps, then linearly down to zero."""
    return peak * min((step + 1) / math.ceil(steps / 20), (steps - step) / (steps - steps // 20))


def resume(args, model, optimiser, scaler):
    """Loads the newest whole checkpoint of the run; the step to go on from, or 0."""
    for path in (os.path.join(args.out, name) for name in ("last.pt", "previous.pt")):
        if not os.path.exists(path):
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            step, old = state["step"], state["args"]
            parts = [state[key] for key in ("backbone", "head", "optimiser", "scaler")]
        except OSError:
            raise
        except Exception:  # torch raises a dozen kinds for a damaged file
            say(f"{path} is damaged: passed over")
            continue
        for key in vars(args).keys() - {"epochs", "out", "init", "workers", "device", "amp",
                                        "save_every"}:
            if old.get(key) != vars(args)[key]:
                raise ValueError(f"{path} was made with {key} {old.get(key)}, not "
                                 f"{vars(args)[key]}: give the same, or another --out")
        if len(parts[1]["weight"]) != len(model.head.weight):
            raise ValueError(f"{path} has {len(parts[1]['weight'])} identities, --data {args.data} "
                             f"{len(model.head.weight)}: give the same data, or another --out")
        for part, saved in zip((model.backbone, model.head, optimiser, scaler), parts, strict=True):
            part.load_state_dict(saved)
        say(f"going on from step {step:,} of {path}")
        return step
    if os.path.exists(os.path.join(args.out, "last.pt")):
        raise ValueError(f"no checkpoint in {args.out} is whole: remove it, or give another --out")
    return 0


def open_log(path, step):
    """The run's log, opened to append, without what a killed run wrote after `step`."""
    lines = []
    if step and os.path.exists(path):
        with open(path) as file:
            lines = [line for line in file if line.endswith("}\n")
                     and json.loads(line).get("step", 0) <= step]
    write_file(path, "".join(lines).encode())
    return open(path, "a")


def ignore_signals(_):
    """In a worker: leaves it to the training process to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train(args):
    """The whole run, from the data to the last table; returns the trained model."""
    torch.manual_seed(args.seed)
    faces, held_out, bins = open_data(args.data, args.holdout)
    each_epoch = [read_bin(path) for path in bins]
    at_the_end = []
    if held_out:
        whole = np.array([i for i in range(len(held_out)) if held_out[i][2] is None], int)
        at_the_end = [make_pairs("held-out identities", held_out.sources[whole],
                                 held_out.labels[whole])]
    model = build(args, faces.classes)
    per_epoch = len(faces) // args.batch_size
    if not per_epoch or args.batch_size < 2 * RANKS:
        raise ValueError(f"--batch-size {args.batch_size}, but there are {len(faces)} images, and "
                         f"processes, each of which takes two or more: {RANKS}")
    steps, last = per_epoch * args.epochs, os.path.join(args.out, "last.pt")
    optimiser = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True,
                                weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type,
                                  enabled=precision(args.device, args.amp) == torch.float16)
    args.images = len(faces)  # of which a checkpoint has to know the same number
    begin = resume(args, model, optimiser, scaler)
    begins = [begin] * RANKS
    if RANKS > 1:
        distributed.all_gather_object(begins, begin)
    if len(set(begins)) > 1:
        raise ValueError(f"the processes find checkpoints of different steps, {begins}: --out must "
                         "be a folder that all machines share")
    parallel = DistributedDataParallel(model) if RANKS > 1 else model
    loader = DataLoader(
        faces, batch_sampler=batches(len(faces), args.batch_size, args.seed, range(begin, steps)),
        collate_fn=collate, num_workers=args.workers, worker_init_fn=ignore_signals,
        pin_memory=args.device.type == "cuda")
    arguments = {**vars(args), "device": str(args.device)}
    say(f"{len(faces):,} images of {faces.classes:,} identities, {per_epoch:,} steps an epoch; the "
        f"run goes to {args.out}")
    if RANK == 0:
        os.makedirs(args.out, exist_ok=True)
        save_faces(os.path.join(args.out, "faces.png"), faces, args.resolutions)
    log_file = open_log(os.path.join(args.out, "log.jsonl"), begin) if RANK == 0 else None

    def log(entry):
        if RANK == 0:
            print(json.dumps(entry), file=log_file, flush=True)

    def save(step):
        if RANK == 0:
            file = io.BytesIO()
            torch.save({"backbone": model.backbone.state_dict(), "head": model.head.state_dict(),
                        "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict(),
                        "step": step, "args": arguments}, file)
            write_file(last, file.getbuffer(), previous=os.path.join(args.out, "previous.pt"))

    def evaluate(sets, step):
        model.eval()
        for pairs in sets if RANK == 0 else []:
            rows = verify({os.path.basename(os.path.normpath(args.out)): model.backbone}, pairs,
                          [7, 14, 20, SIZE], "sum", args.device, args.amp)
            print_table(rows)
            log({"step": step, "evaluation": rows})
        model.train()

    log({"args": arguments, "begin": begin})
    model.train()
    handlers = {name: signal.signal(name, lambda name, _: STOP_SIGNALS.append(name))
                for name in (signal.SIGINT, signal.SIGTERM)}
    begun = logged = time.time()
    bad, since, sums = set(), 0, 0  # steps, and sums of the loss and its parts, since the last line
    for step, (images, labels, errors) in enumerate(loader, begin + 1):
        for error in set(errors) - bad:
            bad.add(error)
            print(f"skipped: {error}", flush=True)
            log({"step": step, "skipped": error})
            if len(bad) > len(faces) / 1000:
                raise ValueError(f"{len(bad)} of {len(faces):,} images cannot be read, more than 1 "
                                 f"in 1,000; the last: {error}")
        # What is drawn depends on seed, step and rank alone: a resumed run draws the same.
        torch.manual_seed((args.seed * 1_000_003 + step - 1 + RANK * 7_919_000_003) % 2**63)
        lr = optimiser.param_groups[0]["lr"] = learning_rate(step - 1, steps, args.lr)
        images = to_input(images, args.device)
        labels = labels.to(args.device, non_blocking=True)
        if args.jitter:
            images = jitter(images, args.jitter)
        with autocast(args.device, args.amp):
            loss, parts = parallel(images, labels)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(model.backbone.parameters(), 5.0)
        scaler.step(optimiser)
        scaler.update()

        since, sums = since + 1, sums + torch.stack([loss.detach(), *parts.values()])
        epoch_ends, save_now = step % per_epoch == 0, step % args.save_every == 0
        if since == 20 or epoch_ends or save_now or (STOP_SIGNALS and RANKS == 1):
            if RANKS > 1:
                distributed.all_reduce(sums)
            means = (sums / since / RANKS).tolist()  # the only place that waits for the device
            if not math.isfinite(means[0]) and scaler.get_scale() <= 1:  # float16's scaler may help
                raise ValueError(f"the loss is {means[0]} at step {step}, learning rate {lr:.3g}: "
                                 f"try a lower --lr. The last good checkpoint: {last}")
            now = time.time()
            rate = since / (now - logged)
            line = {"epoch": (step - 1) // per_epoch + 1, "step": step,
                    **dict(zip(["loss", *parts], means, strict=True)), "lr": lr,
                    "images_per_s": rate * args.batch_size, "seconds": now - begun}
            log(line)
            shown = ", ".join(f"{key} {line[key]:.3g}" for key in parts)
            say(f"epoch {line['epoch']}/{args.epochs}  step {step:,}/{steps:,}  loss "
                f"{means[0]:.3f} ({shown})  lr {lr:.4f}  {line['images_per_s']:.0f} images/s  "
                f"{clock((steps - step) / rate)} left")
            since, sums, logged = 0, 0, now
            stop = torch.tensor(len(STOP_SIGNALS), device=args.device)
            if RANKS > 1:
                distributed.all_reduce(stop)
            if epoch_ends or save_now or stop:
                save(step)
            if stop and step < steps:
                say(f"stopped at step {step}, saved in {last}: the same command goes on from there")
                raise SystemExit(128 + (STOP_SIGNALS or [signal.SIGTERM])[0])
            if epoch_ends:
                evaluate(each_epoch, step)
                logged = time.time()
    for name, handler in handlers.items():
        signal.signal(name, handler)
    evaluate(at_the_end, steps)
    say(f"done in {clock(time.time() - begun)}; the weights: {last}")
    return model


def main(argv=None):
    args = parse_arguments(argv)
    keep_memory()
    if RANKS > 1:
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo",
                                       timeout=timedelta(hours=3))  # rank 0 evaluates alone
    return train(args)


if __name__ == "__main__":
    sys.exit(run(main))
