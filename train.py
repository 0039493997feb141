# SPDX-License-Identifier: MIT
"""Train a face recogniser on sharp and degraded faces: python train.py --data ms1m --maug 1:1:2

Without --data it draws its own faces. `--maug none --loss none` is the paper's baseline. A run
leaves in its folder last.pt (weights, options, optimiser), log.jsonl, and faces.png: some of its
faces and their degraded versions.
"""

import argparse
import functools
import io
import json
import math
import os
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import save_image

from evaluate import (
    RESOLUTIONS,
    SIZE,
    Benchmark,
    Pairs,
    add_device_options,
    autocast,
    evaluate,
    images_below,
    is_hidden,
    keep_memory,
    number,
    precision,
    read_bin,
    read_image,
    run,
    split_gallery,
    table,
    warn_once,
    write_file,
)
from lrfr import (
    DEPTHS,
    LRFR,
    ArcFace,
    IResNet,
    MAug,
    degrade,
    l1_loss,
    l2_loss,
    load_backbone,
    logexp_loss,
    parse_ratio,
    to_input,
)

UNDER_TORCHRUN = "LOCAL_RANK" in os.environ
RANKS = int(os.environ["WORLD_SIZE"]) if UNDER_TORCHRUN else 1  # how many processes it has started
RANK = int(os.environ["RANK"]) if UNDER_TORCHRUN else 0  # which of them this one is

# ---- 1. Data -------------------------------------------------------------------------------------


class Faces(Dataset):
    """Labelled faces: item i is a (112, 112, 3) uint8 RGB array and its label.

    An image that cannot be read is named on stderr, and the next one is taken in its place.
    """

    def __init__(self, sources, labels, classes):
        self.sources = sources  # paths or bytes of image files
        self.labels = labels
        self.classes = classes

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i):
        try:
            return self.load(i)
        except ValueError as error:
            warn_once(f"image {i} is skipped: {error}")
            return self.load((i + 1) % len(self))

    def load(self, i):
        return read_image(self.sources[i]), self.labels[i]


def image_folder(root):
    """`root`/identity/image.jpg -> sorted paths, and labels; empty folders do not count."""
    paths, labels, classes = [], [], 0
    for identity in sorted(os.listdir(root)):
        folder = os.path.join(root, identity)
        if is_hidden(identity) or not os.path.isdir(folder):
            continue
        images = images_below(folder)
        if any(os.path.dirname(image) != folder for image in images):
            raise ValueError(
                f"{folder} holds folders of images: should --data be that folder? Else move them up"
            )
        if images:
            paths += images
            labels += [classes] * len(images)
            classes += 1
    return paths, np.array(labels, int)


MAGIC = 0xCED7230A  # begins each record of an MXNet RecordIO file


def read_head(file):
    """The flag and the length of the record, or part of a record, that begins at the position."""
    magic, word = struct.unpack("<II", file.read(8).ljust(8, b"\0"))
    if magic != MAGIC:
        raise ValueError(
            f"{file.name}: no whole record before byte {file.tell()}: is it cut short?"
        )
    return word >> 29, word & (2**29 - 1)


def read_label(file, offset):
    """The label of the record at a byte offset, and whether it holds an image (not read here)."""
    file.seek(offset)
    _, length = read_head(file)
    # A count, a label and two ids; where the count is not 0, so many labels follow instead.
    count, label, first = struct.unpack("<If16xf", file.read(28).ljust(28, b"\0"))
    if count > 0:
        label = first
    return label, length > 24 + 4 * count


def read_record(path, offset):
    """The bytes of the image file in the record at a byte offset.

    Where a payload holds the magic number itself, it was split into parts, flagged 1, 2 ... 2, 3,
    and the number left out. A whole payload has the flag 0.
    """
    parts, flag = [], 1  # as if more parts followed
    with open(path, "rb") as file:  # opened anew, so that processes share no position in it
        file.seek(offset)
        while flag in (1, 2):
            flag, length = read_head(file)
            parts.append(file.read(length))
            file.read(-length % 4)  # padding
    payload = struct.pack("<I", MAGIC).join(parts)
    count = int.from_bytes(payload[:4], "little")
    return payload[24 + 4 * count :]


def find_images(file, keys, offsets):
    """Which records are images, as a slice, and the labels that occur.

    keys, offsets: (n,), of all records. im2rec's file holds images alone. InsightFace's file:

    key                 label                         image
    0                   end                           none
    1 to end - 1        that of the identity          a face
    end and more        key of an identity's first    none
    """
    end_key, has_image = read_label(file, offsets[0])
    if has_image:  # im2rec
        return slice(0, len(keys)), {read_label(file, offset)[0] for offset in offsets}
    end = int(np.searchsorted(keys, end_key))
    # A label is a float32, which cannot hold each key above 2^24: it may be too low or too high.
    while end < len(keys) and read_label(file, offsets[end])[1]:
        end += 1
    while end > 1 and not read_label(file, offsets[end - 1])[1]:
        end -= 1
    first_keys = [read_label(file, offset)[0] for offset in offsets[end:]]
    if not first_keys:
        raise ValueError("there are no records of identities: is train.idx cut short?")
    if keys[-1] > 2**24:  # first_keys are not exact either: take it that the labels are 0 to n - 1
        return slice(1, end), range(len(first_keys))
    firsts = np.searchsorted(keys[:end], first_keys)
    firsts = firsts[firsts < end]  # the last identities may have no image
    return slice(1, end), {read_label(file, offset)[0] for offset in offsets[firsts]}


class RecordFaces(Faces):
    """Faces of `root`/train.rec and train.idx, as InsightFace or im2rec writes them.

    `sources` are byte offsets. What counts is the label in an image's own record, not the ranges
    of keys in the records of identities. Labels are renumbered from 0.
    """

    def __init__(self, root):
        self.path, index = os.path.join(root, "train.rec"), os.path.join(root, "train.idx")
        try:
            keys, offsets = np.loadtxt(index, np.int64, ndmin=2).T
            keys, places = np.unique(keys, return_index=True)  # sorted
            offsets = offsets[places]
            with open(self.path, "rb", buffering=0) as file:
                images, labels = find_images(file, keys, offsets)
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{index}, or the train.rec beside it: {error}") from None
        self.number_of = {label: i for i, label in enumerate(sorted(labels))}
        super().__init__(offsets[images], None, len(self.number_of))

    def load(self, i):
        offset = int(self.sources[i])
        with open(self.path, "rb") as file:
            label, _ = read_label(file, offset)
        if label not in self.number_of:
            raise ValueError(f"{self.path}: label {label:g} of image {i} is none of its identities")
        return read_image(read_record(self.path, offset)), self.number_of[label]


# The ellipses of a drawn face, from back to front: colour; x, y, half width, half height, in
# pixels. With x > 0 there are two of them, x to the left and to the right of the middle.
FACE = [
    ((77, 61, 46), 0, 48, 33, 35),  # hair
    ((153, 117, 89), 0, 100, 15, 24),  # neck
    ((168, 128, 99), 27, 57, 4, 7),  # ears
    ((199, 153, 117), 0, 58, 27, 37),  # face
    ((77, 61, 46), 0, 24, 24, 10),  # fringe
    ((240, 240, 240), 12, 52, 5, 3),  # eyes
    ((64, 64, 77), 12, 52, 2, 2),  # pupils
    ((66, 51, 38), 13, 44, 8, 2),  # brows
    ((168, 128, 97), 0, 66, 3, 8),  # nose
    ((173, 87, 87), 0, 82, 10, 3),  # mouth
]


def draw_face(person, rng):
    """A new picture of a person, (112, 112) pixels.

    person: (10, 7) numbers in [-1, 1], how each of the ten ellipses differs from FACE.
    """
    grey = int(rng.integers(90, 170))
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE), (grey, grey, grey))  # twice as large at first
    canvas = ImageDraw.Draw(image)
    turn, nod = rng.normal(0, 0.5, 2)  # of the head: what lies nearer to the camera moves more
    for depth, (part, own) in enumerate(zip(FACE, person)):
        colour, x, y, width, height = part
        red, green, blue = (colour + 10 * own[:3]).astype(int)
        width, height = width * (1 + 0.2 * own[3]), height * (1 + 0.2 * own[4])
        y = y + 3 * own[5] + (depth - 5) * nod
        if x > 0:
            x = x + 3 * own[6]
        for side in (-1, 1):
            middle = SIZE / 2 + side * x + (depth - 5) * turn
            box = np.array([middle - width, y - height, middle + width, y + height])
            canvas.ellipse(list(2 * box), fill=(red, green, blue))
    image = image.rotate(rng.normal(0, 5), Image.Resampling.BICUBIC, fillcolor=(grey, grey, grey))
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))
    light = rng.uniform(0.7, 1.3, 3)  # red, green, blue
    pixels = pixels * light + rng.normal(0, 8, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def demo_faces(people, pictures, seed):
    """Drawn people, with so many pictures of each, as JPEG files in memory."""
    rng = np.random.default_rng(seed)
    files = []
    for person in rng.uniform(-1, 1, (people, len(FACE), 7)):
        for _ in range(pictures):
            file = io.BytesIO()
            draw_face(person, rng).save(file, "JPEG", quality=90)
            files.append(file.getvalue())
    return Faces(files, np.arange(people).repeat(pictures), people)


def open_data(args):
    """--data -> Faces to train on, benchmarks for each epoch, benchmarks for the end of the run."""
    if args.data == "demo":
        return open_demo(args)
    if os.path.exists(os.path.join(args.data, "train.rec")):
        return open_records(args)
    return open_folder(args)


def open_demo(args):
    people, pictures = 150, 16
    check_size(args, people * pictures, people)
    if RANK == 0:
        print("drawing faces", file=sys.stderr, flush=True)
    strangers = demo_faces(40, 10, seed=2)
    final = hold_out("people not seen in training", strangers.sources, strangers.labels)
    return demo_faces(people, pictures, seed=1), [], final


def open_records(args):
    if args.holdout:
        raise ValueError("--holdout is for image folders; put .bin sets beside a train.rec")
    faces = RecordFaces(args.data)
    check_size(args, len(faces), faces.classes)
    benchmarks = []
    for name in sorted(os.listdir(args.data)):
        if name.endswith(".bin"):
            try:
                benchmarks.append(read_bin(os.path.join(args.data, name)))
            except ValueError as error:
                warn_once(f"passed over, though it ends in .bin: {error}")
    return faces, benchmarks, []


def open_folder(args):
    paths, labels = image_folder(args.data)
    identities = len(set(labels))
    holdout = args.holdout
    if holdout is None:  # up to 5 %; of few identities none
        holdout = min(100, identities // 40 * 2)
    if holdout > max(0, identities - 2):
        raise ValueError(f"--holdout {holdout}: of {identities} identities, two must be left")
    classes = identities - holdout  # the last ones are held out
    kept = int((labels < classes).sum())
    check_size(args, kept, classes)
    final = []
    if holdout > 0:
        final = hold_out("held-out identities", paths[kept:], labels[kept:])
    return Faces(paths[:kept], labels[:kept], classes), [], final


def check_size(args, images, classes):
    if classes < 2:
        raise ValueError(
            f"{args.data}: {images} images of {classes} identities to train on: two identities or "
            "more are needed, as identity/image.jpg or train.rec with train.idx"
        )
    if args.batch_size * RANKS > images:
        raise ValueError(
            f"--batch-size {args.batch_size}: {images} images are there, for {RANKS} processes: at "
            f"most {images // RANKS}"
        )


def hold_out(name, sources, labels):
    """A benchmark of identities that are not trained on, in a list; [] if there are too few.

    It has up to 3,000 pairs of one person and as many of two, of at most 4,000 images.
    """
    rng = np.random.default_rng(0)
    chosen = []
    for i in np.sort(rng.permutation(len(labels))[:4000]):
        try:
            read_image(sources[i])
            chosen.append(i)
        except ValueError as error:
            print(f"left out of the {name}: {error}", file=sys.stderr)
    identity = labels[chosen]
    first, second = np.triu_indices(len(chosen), 1)
    same = identity[first] == identity[second]
    count = min(3000, same.sum(), (~same).sum()) // 5 * 5  # both kinds together fill ten folds
    if count == 0:
        warn_once(f"no table at the end: the {name} make fewer than five pairs of one kind")
        return []
    genuine = rng.choice(np.flatnonzero(same), count, replace=False)
    impostor = rng.choice(np.flatnonzero(~same), count, replace=False)
    order = np.stack([genuine, impostor], 1).ravel()  # in turn, so that each fold has both kinds
    pairs = Pairs(first[order], second[order], same[order])
    chosen_sources = [sources[i] for i in chosen]
    gallery, probes = split_gallery(identity)
    return [Benchmark(name, chosen_sources, pairs, identity, gallery, probes)]


def jitter(images, strength):
    """Turns, scales, shifts and lights each of (N, 3, H, W) in [-1, 1] at random.

    Against overfitting on small sets. strength 1: up to 9 degrees, 5 % of the size, 15 % of scale,
    30 % of brightness and contrast. Drawn on the CPU, so that they are the same on every device.
    """
    if strength == 0:
        return images
    draws = strength * (2 * torch.rand(6, len(images)) - 1)
    angle, zoom, x, y, brightness, contrast = draws.to(images.device, non_blocking=images.is_cuda)
    angle = math.radians(9) * angle
    cos, sin = (1 + 0.15 * zoom) * angle.cos(), (1 + 0.15 * zoom) * angle.sin()
    matrices = torch.stack([cos, -sin, 0.1 * x, sin, cos, 0.1 * y], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)  # grey outside
    brightness = 1 + 0.3 * brightness.view(-1, 1, 1, 1)
    contrast = 1 + 0.3 * contrast.view(-1, 1, 1, 1)
    images = ((images + 1) * brightness - 1).clamp(-1, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean).clamp(-1, 1)
    return images.contiguous(memory_format=torch.channels_last)


def batches(count, batch_size, seed, steps):
    """Yields the indices of this process's images, out of `count`, in each of `steps`.

    Every epoch has an order of its own; what is left over at its end is passed over.
    """
    per_step = batch_size * RANKS
    for step in steps:
        epoch, i = divmod(step, count // per_step)
        if i == 0 or step == steps[0]:
            order = np.random.default_rng([seed, epoch]).permutation(count)
        yield order[i * per_step : (i + 1) * per_step][RANK::RANKS].tolist()


# ---- 2. Options ----------------------------------------------------------------------------------

# The demo's defaults.
DEMO = {
    "backbone": "r10",
    "width": 16,
    "scale": 32.0,
    "margin": 0.3,
    "epochs": 3,
    "batch_size": 64,
    "lr": 0.1,
}

# --loss -> the distance, and the default of its --weight (chosen as LRFR's docstring says).
DISTANCES = {
    "logexp": (logexp_loss, 300.0),
    "l1": (l1_loss, 16.0),
    "l2": (l2_loss, 180.0),
    "none": (None, 0.0),
}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.epilog = "The demo has other defaults:"
    for name, value in DEMO.items():
        parser.epilog += f" --{name.replace('_', '-')} {value}"

    def add(name, default, text, kind=None, **options):
        if default is not None:
            text += f" (default: {default})"
        parser.add_argument(name, default=default, help=text, type=kind, **options)

    px = number(int, 2, SIZE)
    add("--data", "demo", "folder of identity/image.jpg, or of train.rec; demo: drawn faces")
    add("--maug", "1:1:2", "ratio of the resolutions, or none")
    add("--resolutions", None, "of MAug, in pixels (default: 7 14 20)", px, nargs="+")
    add("--loss", "logexp", "distance of sharp and degraded embeddings", choices=[*DISTANCES])
    add("--p", 1.0, "exponent of the LogExp distance", number(float, 1))
    text = "lambda (default: logexp 300, l1 16, l2 180; give 720 with --p 2)"
    add("--weight", None, text, number(float, 0))
    add("--pull", "degraded", "embeddings that the distance moves", choices=["degraded", "both"])
    add("--backbone", "r50", "depth of the IResNet", choices=[f"r{depth}" for depth in DEPTHS])
    add("--width", 64, "channels of its first layer", number(int, 1, 999))
    add("--scale", 64.0, "s of ArcFace", number(float, 0))
    add("--margin", 0.5, "m of ArcFace, in radians", number(float, 0, 1.5))
    add("--epochs", 20, "passes over the data", number(int, 1))
    add("--batch-size", 128, "faces in a step of one process", number(int, 2))
    add("--lr", 0.02, "highest learning rate", number(float, 0))
    text = "random affine, brightness and contrast, against overfitting on small sets"
    add("--jitter", 0.0, text, number(float, 0, 3))
    text = "checkpoint or InsightFace weights for the backbone, whatever --backbone and --width say"
    add("--init", None, text, metavar="FILE")
    text = "last identities of an image folder, for a table (default: up to 5 %%, at most 100)"
    add("--holdout", None, text, number(int, 0))
    text = "folder of the run (default: runs/DATA-BACKBONE-RATIO-LOSS-SEED)"
    add("--out", None, text)
    add("--save-every", 2000, "steps between checkpoints; an epoch ends with one", number(int, 1))
    workers = min(4, os.cpu_count() or 1)
    add("--workers", workers, "processes that decode images", number(int, 0, 256))
    add("--seed", 0, "random seed", number(int, 0, 2**40))
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.data == "demo":  # once more, with its defaults
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    if args.maug == "none" and args.loss != "none":
        parser.error("--maug none leaves no degraded faces to compare with: add --loss none")
    if args.p != 1 and args.loss != "logexp":
        parser.error("--p is the exponent of --loss logexp")
    args.resolutions = args.resolutions or [7, 14, 20]
    if args.weight is None:
        _, args.weight = DISTANCES[args.loss]
    if args.out is None:
        data = os.path.basename(os.path.realpath(args.data))
        ratio = args.maug.replace(":", "_")
        args.out = f"runs/{data}-{args.backbone}-{ratio}-{args.loss}-seed{args.seed}"
    return args


def check_folders(args):
    """Checks --data and --out, and gives --data one name, however it was spelled."""
    if args.data != "demo":
        if not os.path.isdir(args.data):
            raise ValueError(
                f"--data {args.data}: no such folder, of identity/image.jpg or train.rec; MS1M: "
                "github.com/deepinsight/insightface/wiki/Dataset-Zoo; or try --data demo"
            )
        args.data = os.path.realpath(args.data)
        if Path(os.path.realpath(args.out)).is_relative_to(args.data):
            raise ValueError(f"--out {args.out} lies in --data: its pictures would be trained on")
    os.makedirs(args.out, exist_ok=True)


def learning_rate(step, steps, peak):
    """Up linearly for the first twentieth of the steps, then linearly down to zero."""
    rise = (step + 1) / math.ceil(steps / 20)
    fall = (steps - step) / (steps - steps // 20)
    return peak * min(rise, fall)


# ---- 3. Training ---------------------------------------------------------------------------------


def setup(args):
    """Gets the device and the processes ready, and refuses what cannot work."""
    keep_memory()
    args.processes = RANKS
    if RANKS > 1:
        backend = "gloo"
        if args.device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            local_rank = int(os.environ["LOCAL_RANK"])
            gpus = torch.cuda.device_count()
            if local_rank >= gpus:
                raise ValueError(f"more processes than GPUs: give torchrun --nproc_per_node={gpus}")
            args.device = torch.device("cuda", local_rank)
        # The others wait while rank 0 evaluates.
        distributed.init_process_group(backend, timeout=timedelta(hours=3))
    if args.device.type == "cuda":
        if args.device.index is not None:
            torch.cuda.set_device(args.device)  # else some memory of GPU 0 is taken as well
        torch.backends.cudnn.benchmark = True  # the shapes never change


def read_last(args):
    """The checkpoint in the run's folder, None if there is none; it must agree with the options."""
    path = os.path.join(args.out, "last.pt")
    if not os.path.exists(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = dict(state["args"])
    except PermissionError:
        raise
    except Exception:  # of a dozen kinds, for a damaged file
        raise ValueError(f"{path} is damaged: move it away, or give another --out") from None
    check_agreement(args, old)
    return state


def check_agreement(args, old):
    """Refuses to go on with other options than those of the checkpoint."""
    may_change = {"epochs", "out", "workers", "device", "amp", "save_every"}
    for key, new in vars(args).items():
        if key not in may_change and old.get(key) != new:
            raise ValueError(
                f"{args.out}/last.pt was made with {key} {old.get(key)}, not {new}: give the same, "
                "or another --out"
            )


def make_backbone(args):
    if args.init is not None:
        backbone = load_backbone(args.init)
    else:
        backbone = IResNet(int(args.backbone[1:]), args.width)
    if args.device.type == "cpu" and backbone.conv1.out_channels < 16:
        raise ValueError(
            f"a backbone of width {backbone.conv1.out_channels} cannot train on a CPU: below 16 "
            "channels, oneDNN's channels-last convolutions write outside of their memory (oneDNN "
            "issue 6035): give --width 16 or more"
        )
    return backbone


def make_maug(args):
    if args.maug == "none":
        return None
    return MAug(args.resolutions, parse_ratio(args.maug))


def make_distance(args):
    distance, _ = DISTANCES[args.loss]
    if args.loss == "logexp":
        distance = functools.partial(logexp_loss, p=args.p)
    return distance


def describe(args, faces, left):
    """The first line of a run."""
    return (
        f"{len(faces):,} images of {faces.classes:,} identities, {args.batch_size * RANKS} in a "
        f"step: about {left} on this machine; run: {args.out}"
    )


def report(args, text, entry):
    """Prints a line for the reader, and adds one of JSON to the log."""
    if RANK == 0:
        print(text, flush=True)
        with open(os.path.join(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry, default=str) + "\n")


def report_step(args, step, per_epoch, losses, lr, rate, left):
    """A line of progress."""
    epoch, steps = math.ceil(step / per_epoch), args.epochs * per_epoch
    text = "  ".join(f"{name} {value:.3g}" for name, value in losses.items())
    report(
        args,
        f"epoch {epoch}/{args.epochs}  step {step:,}/{steps:,}  {text}  {rate:.0f} faces/s  "
        f"{left} left",
        {"step": step, **losses, "lr": lr, "faces_per_s": rate},
    )


def run_benchmarks(args, backbone, benchmarks, step):
    """Evaluates the backbone, in the first process; an unreadable benchmark is passed over."""
    if RANK > 0:
        return
    backbone.eval()
    for benchmark in benchmarks:
        try:
            rows = evaluate({args.out: backbone}, benchmark, RESOLUTIONS, args.device, args.amp)
        except ValueError as error:
            warn_once(f"not evaluated: {error}")
            continue
        report(args, table(rows), {"step": step, "evaluation": rows})
    backbone.train()


def show_faces(args, faces):
    """Draws faces.png: eight faces, each above its degraded versions."""
    chosen = [faces[i][0] for i in np.linspace(0, len(faces) - 1, 8).astype(int)]
    sharp = to_input(torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2), "cpu")
    rows = [sharp] + [degrade(sharp, px) for px in args.resolutions]
    png = io.BytesIO()
    save_image((torch.cat(rows) + 1) / 2, png, "PNG", nrow=8, padding=0)
    write_file(os.path.join(args.out, "faces.png"), png.getvalue())


def train(args, model, faces, benchmarks, state):
    """Trains from a checkpoint's state on, or from the beginning if it is None."""
    on_gpu = args.device.type == "cuda"
    optimiser = torch.optim.SGD(
        model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4, fused=on_gpu
    )
    fp16 = precision(args.device, args.amp) == torch.float16
    scaler = torch.amp.GradScaler(args.device.type, enabled=fp16)
    kept = {
        "backbone": model.backbone,
        "head": model.head,
        "optimiser": optimiser,
        "scaler": scaler,
    }
    begin = restore(kept, state)
    saved = begin
    parallel = model
    if RANKS > 1:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # Batch norm's statistics stay each process's own. (As an argument, torch 2.14 warns of it.)
        parallel.broadcast_buffers = False
    per_step = args.batch_size * RANKS
    per_epoch = len(faces) // per_step
    steps = per_epoch * args.epochs
    if begin > steps:
        raise ValueError(f"{args.out}/last.pt has done {begin} steps, --epochs makes {steps} only")
    order = batches(len(faces), args.batch_size, args.seed, range(begin, steps))
    loader = DataLoader(faces, batch_sampler=order, num_workers=args.workers, pin_memory=on_gpu)
    if state is None:
        if RANK == 0 and os.path.exists(os.path.join(args.out, "last.pt")):
            raise ValueError(f"{args.out}: another run has begun there meanwhile: give --out")
        save_last(args, kept, 0)  # a full disk is noticed now, and a second run here is refused
    described = False
    started = shown = time.time()
    try:
        for step, (images, labels) in enumerate(loader, begin):
            # What is drawn depends on seed, step and rank alone: a resumed run draws the same.
            torch.manual_seed(args.seed * 1_000_003 + step + RANK * 7_919_000_003)
            lr = learning_rate(step, steps, args.lr)
            optimiser.param_groups[0]["lr"] = lr
            images = images.to(args.device, non_blocking=on_gpu).permute(0, 3, 1, 2)
            labels = labels.to(args.device, non_blocking=on_gpu)
            images = jitter(to_input(images, args.device), args.jitter)
            with autocast(args.device, args.amp):  # head and losses leave it again
                loss, terms = parallel(images, labels)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            torch.nn.utils.clip_grad_norm_(model.backbone.parameters(), 5.0)
            scaler.step(optimiser)
            scaler.update()

            done = step + 1
            epoch_ends = done % per_epoch == 0
            soon = done == begin + 5  # the first steps tell how long the run will take
            saves = epoch_ends or done % args.save_every == 0
            if saves or soon or time.time() - shown > 10:
                losses = read_losses(loss, terms, done)
                rate = (done - begin) * per_step / (time.time() - started)
                left = timedelta(seconds=(steps - done) * per_step // rate)
                if not described:
                    report(args, describe(args, faces, left), {"args": vars(args)})
                    described = True
                report_step(args, done, per_epoch, losses, lr, rate, left)
                shown = time.time()
            if saves:
                save_last(args, kept, done)
                saved = done
            if epoch_ends:
                run_benchmarks(args, model.backbone, benchmarks, done)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted: the same command goes on from step {saved:,}") from None
    return steps


def read_losses(loss, terms, step):
    """The loss and its terms as numbers, for which the CPU waits for a GPU."""
    losses = {"loss": loss.item()}
    for name, value in terms.items():
        losses[name] = value.item()
    if not math.isfinite(losses["loss"]):
        raise ValueError(
            f"the loss is {losses['loss']} at step {step}: lower --lr, and give another --out"
        )
    return losses


def restore(kept, state):
    """Loads the parts of a run from its checkpoint, if there is one -> the number of steps done."""
    if state is None:
        return 0
    for name, part in kept.items():
        if state[name]:  # the scaler has a state in float16 only
            part.load_state_dict(state[name])
    return state["step"]


def save_last(args, kept, step):
    """Writes the run's checkpoint, in the first process."""
    if RANK == 0:
        state = {name: part.state_dict() for name, part in kept.items()}
        content = io.BytesIO()
        torch.save({**state, "step": step, "args": vars(args)}, content)
        write_file(os.path.join(args.out, "last.pt"), content.getbuffer())


def main(argv=None):
    """The whole run, from the options to the last table."""
    args = parse_arguments(argv)
    setup(args)
    check_folders(args)
    state = read_last(args)
    torch.manual_seed(args.seed)
    backbone, maug = make_backbone(args), make_maug(args)
    faces, every_epoch, final = open_data(args)
    args.images, args.classes = len(faces), faces.classes
    if state is not None:  # images and classes are known only now
        check_agreement(args, state["args"])
        if RANK == 0:
            print(f"going on from step {state['step']:,}", flush=True)
    head = ArcFace(args.classes, backbone.fc.out_features, args.scale, args.margin)
    model = LRFR(backbone, head, maug, make_distance(args), args.weight, args.pull == "both")
    model = model.train().to(args.device, memory_format=torch.channels_last)
    if RANK == 0:
        show_faces(args, faces)
    steps = train(args, model, faces, every_epoch, state)
    run_benchmarks(args, backbone, final, steps)
    if RANK == 0:
        print(f"the weights: {args.out}/last.pt")
    if RANKS > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
