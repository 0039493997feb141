# SPDX-License-Identifier: MIT
"""Train a face recogniser on sharp and degraded faces: python train.py --data ms1m --maug 1:1:2

Without --data it draws its own faces. `--maug none --loss none` is the paper's baseline. A run
leaves in its folder last.pt (weights, options, optimiser), log.jsonl, and faces.png: some of its
faces and their degraded versions.
"""

import argparse
import functools
import hashlib
import io
import json
import math
import os
import struct
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.utils import save_image

import evaluate
import lrfr
from evaluate import SIZE, UserError, number, warn_once

RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # how many processes torchrun has started
RANK = int(os.environ.get("RANK", "0"))  # which of them this one is

# ---- 1. Options ----------------------------------------------------------------------------------

DEMO = "--backbone r10 --width 16 --scale 32 --margin 0.3 --epochs 3 --batch-size 64 --lr 0.1"

# --loss -> the distance.
DISTANCES = {"logexp": lrfr.logexp_loss, "l1": lrfr.l1_loss, "l2": lrfr.l2_loss, "none": None}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=f"The demo has other defaults: {DEMO}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name, default, text, kind=None, **options):
        parser.add_argument(name, default=default, help=text, type=kind, **options)

    add("--data", "demo", "folder of identity/image.jpg, or of train.rec; demo: drawn faces")
    add("--maug", "1:1:2", "ratio of the resolutions; none: no degraded faces")
    pixels = number(int, 2, SIZE)
    add("--resolutions", [7, 14, 20], "resolutions of MAug, in pixels", pixels, nargs="+")
    text = "share of the degraded faces that a simulated camera degrades, not bicubic resizing"
    add("--camera", 0.0, text, number(float, 0, 1))
    add("--loss", "logexp", "distance of sharp and degraded embeddings", choices=[*DISTANCES])
    add("--p", 1.0, "exponent of the LogExp distance", number(float, 1, 10))
    text = "lambda; None: as strong as 300 of LogExp(1) in 512 dimensions"
    add("--weight", None, text, number(float, 0))
    add("--pull", "degraded", "embeddings that the distance moves", choices=["degraded", "both"])
    depths = [f"r{depth}" for depth in lrfr.DEPTHS]
    add("--backbone", "r50", "depth of the IResNet", choices=depths)
    add("--width", 64, "channels of its first layer", number(int, 1, 999))
    add("--scale", 64.0, "s of ArcFace", number(float, 0))
    add("--margin", 0.5, "m of ArcFace, in radians", number(float, 0, 1.5))
    add("--epochs", 20, "passes over the data", number(int, 1))
    add("--batch-size", 128, "faces in a step of one process", number(int, 2))
    add("--lr", 0.02, "highest learning rate", number(float, 0))
    text = "random turn, shift, scale, light, against overfitting; 1: to 9 degrees, 30 %% of light"
    add("--jitter", 0.0, text, number(float, 0, 3))
    text = "checkpoint or InsightFace weights to begin with, of any depth and width; new head"
    add("--init", None, text, metavar="FILE")
    text = "identities of an image folder to evaluate, not to train on; None: 5 %%, at most 100"
    add("--holdout", None, text, number(int, 0))
    text = "folder of the run; None: under runs/, named after the options; one for each data set"
    add("--out", None, text)
    add("--save-every", 2000, "steps between checkpoints; an epoch ends with one", number(int, 1))
    add("--seed", 0, "random seed", number(int, 0, 2**40))
    evaluate.add_device_options(parser)
    args = parser.parse_args(argv)
    if args.data == "demo":  # once more, with its defaults
        demo = parser.parse_args(DEMO.split())
        parser.set_defaults(**vars(demo))
        args = parser.parse_args(argv)
    if args.maug == "none" and (args.loss != "none" or args.camera > 0):
        parser.error("--maug none leaves no degraded faces: add --loss none, without --camera")
    if args.p != 1 and args.loss != "logexp":
        parser.error("--p is the exponent of --loss logexp")
    if args.weight is not None and args.loss == "none":
        parser.error("--weight is that of a distance: --loss none has none")
    records = Path(args.data, "train.rec").exists()
    if args.holdout and (records or args.data == "demo"):
        parser.error("--holdout is for image folders (beside a train.rec, put .bin sets)")
    try:
        make_maug(args)  # for its checks
    except ValueError as error:
        parser.error(f"--maug, --resolutions: {error}")
    if args.out is None:
        data = os.path.basename(os.path.realpath(args.data))
        ratio = args.maug.replace(":", "_")
        args.out = f"runs/{data}-{args.backbone}-{ratio}-{args.loss}"
        for name in ("p", "weight", "camera", "lr"):  # what one sweeps; the rest needs an --out
            value = getattr(args, name)
            if value != parser.get_default(name):
                args.out += f"-{name}{value:g}"
        args.out += f"-seed{args.seed}"
    return args


def make_maug(args):
    if args.maug == "none":
        return None
    return lrfr.MAug(args.resolutions, lrfr.parse_ratio(args.maug), args.camera)


def learning_rate(step, steps, peak):
    """Up linearly for the first twentieth of the steps, then linearly down to zero."""
    rise_steps = math.ceil(steps / 20)  # 1 at least
    fall_steps = steps - steps // 20
    share = min((step + 1) / rise_steps, (steps - step) / fall_steps)
    return peak * share


# ---- 2. Training ---------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run consists of, and how far it is."""

    args: argparse.Namespace
    faces: "Faces"
    benchmarks: list
    model: lrfr.LRFR
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # at work in float16 only
    step: int = 0  # steps done


def train(run):
    """Trains from run.step on to the end, and makes the table there."""
    args, model = run.args, run.model
    optimiser, scaler = run.optimiser, run.scaler
    network = model
    if RANKS > 1:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # Batch norm's statistics stay each process's own. (As an argument, torch 2.14 warns of it.)
        network.broadcast_buffers = False
    per_step = args.batch_size * RANKS
    per_epoch = len(run.faces) // per_step
    steps = per_epoch * args.epochs
    to_do = range(run.step, steps)
    sampler = batches(len(run.faces), args.batch_size, args.seed, to_do)
    on_gpu = args.device.type == "cuda"
    loader = DataLoader(
        run.faces,
        batch_sampler=sampler,
        num_workers=args.workers,
        pin_memory=on_gpu,
    )
    begin, started = run.step, time.monotonic()
    reported = started
    for images, labels in loader:
        # What is drawn depends on seed, step and rank alone: a resumed run draws the same.
        torch.manual_seed(args.seed * 1_000_003 + run.step + RANK * 7_919_000_003)
        lr = learning_rate(run.step, steps, args.lr)
        optimiser.param_groups[0]["lr"] = lr
        images = images.to(args.device, non_blocking=True).permute(0, 3, 1, 2)
        labels = labels.to(args.device, non_blocking=True)
        images = lrfr.to_input(images, args.device)
        images = jitter(images, args.jitter)
        with evaluate.autocast(args.device, args.amp):  # head and losses leave it, for float32
            loss, parts = network(images, labels)  # degrades, embeds, classifies: LRFR.forward
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(model.backbone.parameters(), 5.0)  # as InsightFace does
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        run.step += 1

        epoch_ends = run.step % per_epoch == 0
        saves = epoch_ends or run.step % args.save_every == 0
        if saves or time.monotonic() - reported > 10:
            if not loss.isfinite():  # here the CPU waits for a GPU
                raise UserError(f"loss {loss} at step {run.step}: give a lower --lr, a new --out")
            reported = time.monotonic()
            seconds = (reported - started) / (run.step - begin)
            left = timedelta(seconds=int((steps - run.step) * seconds))
            rate = per_step / max(seconds, 1e-9)
            epoch = math.ceil(run.step / per_epoch)
            entry = {"step": run.step, "lr": lr, "faces_per_s": rate}
            text = f"epoch {epoch}/{args.epochs}  step {run.step:,}/{steps:,}"
            for name, value in {"loss": loss, **parts}.items():
                entry[name] = value.item()
                text += f"  {name} {value:.3g}"
            text += f"  {rate:.0f} faces/s  {left} left"
            report(args, text, entry)
        if saves:
            save_last(run)
        if epoch_ends and isinstance(run.faces, RecordFaces) and run.step < steps:
            before = time.monotonic()
            run_benchmarks(run)  # the .bin sets
            started += time.monotonic() - before  # evaluation does not count in faces/s
    run_benchmarks(run)


def report(args, text, entry):
    """Prints a line for the reader, and adds one of JSON to the log."""
    if RANK == 0:
        with open(Path(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry, default=str) + "\n")
        print(text, flush=True)


def run_benchmarks(run):
    """Evaluates the backbone, in the first process."""
    if RANK > 0:
        return
    args, backbone = run.args, run.model.backbone
    settings = evaluate.Settings(args.device, args.amp, args.workers)
    backbone.eval()
    for benchmark in run.benchmarks:
        named = {args.out: backbone}
        try:
            rows = evaluate.evaluate(named, benchmark, evaluate.RESOLUTIONS, settings)
            report(args, evaluate.table(rows), {"step": run.step, "evaluation": rows})
        except UserError as error:
            warn_once(f"not evaluated at step {run.step:,}: {error}")
    backbone.train()


# ---- 3. Beginning and going on -------------------------------------------------------------------


def prepare(argv):
    """Makes a Run of the options. What cannot work is refused here."""
    args = parse_arguments(argv)
    check_folders(args)
    choose_device(args)
    args.processes = RANKS
    state = read_last(args)
    torch.manual_seed(args.seed)
    backbone = make_backbone(args, state)
    embed_dim = backbone.fc.out_features
    distance = DISTANCES[args.loss]
    if args.loss == "logexp":
        distance = functools.partial(lrfr.logexp_loss, p=args.p)
    if args.weight is None and distance is not None:
        args.weight = default_weight(distance, embed_dim)
    faces, benchmarks = open_data(args)
    args.images = len(faces)
    args.classes = faces.classes
    args.fingerprint = faces.fingerprint
    if state is not None:
        check_same(args, state)
    maug = make_maug(args)
    head = lrfr.ArcFace(args.classes, embed_dim, args.scale, args.margin)
    pull_both = args.pull == "both"
    model = lrfr.LRFR(backbone, head, maug, distance, args.weight, pull_both)
    model = model.train().to(args.device, memory_format=torch.channels_last)
    on_gpu = args.device.type == "cuda"
    optimiser = torch.optim.SGD(
        model.parameters(),
        args.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        fused=on_gpu,
    )
    fp16 = evaluate.precision(args.device, args.amp) == torch.float16
    scaler = torch.amp.GradScaler(args.device.type, enabled=fp16)
    run = Run(args, faces, benchmarks, model, optimiser, scaler)
    if state is not None:
        head.load_state_dict(state["head"])
        optimiser.load_state_dict(state["optimiser"])
        optimiser.param_groups[0]["fused"] = on_gpu  # whatever device the checkpoint was made on
        if state["scaler"]:  # in float16 only
            scaler.load_state_dict(state["scaler"])
        run.step = state["step"]
    steps = args.images // (args.batch_size * RANKS) * args.epochs
    if run.step > steps:
        text = f"is at step {run.step}, --epochs {args.epochs} end at step {steps}"
        raise UserError(f"{args.out}/last.pt {text}: give more, or another --out")
    return run


def check_folders(args):
    """Checks --data and --out, and gives --data one name, however it was spelled."""
    if args.data != "demo":
        if not os.path.isdir(args.data):
            text = "no such folder, of identity/image.jpg or train.rec (InsightFace's Dataset-Zoo)"
            raise UserError(f"--data {args.data}: {text}; --data demo needs none")
        args.data = os.path.realpath(args.data)
        if Path(args.out).resolve().is_relative_to(args.data):
            raise UserError(f"--out {args.out} lies in --data: its pictures would be trained on")
    os.makedirs(args.out, exist_ok=True)


def choose_device(args):
    if RANKS > 1 and args.device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"more processes than GPUs: give torchrun --nproc_per_node={gpus}")
        args.device = torch.device("cuda", local_rank)
    evaluate.use_device(args.device)
    torch.backends.cudnn.benchmark = True  # the shapes never change


def make_backbone(args, state):
    """A backbone of the checkpoint's depth and width, that of --init, or a new one."""
    if state is not None:  # whose shape may be that of an --init, not of --backbone and --width
        backbone = evaluate.load_backbone(Path(args.out, "last.pt"))
    elif args.init is not None:
        backbone = evaluate.load_backbone(args.init)
    else:
        backbone = lrfr.IResNet(int(args.backbone[1:]), args.width)
    width = backbone.conv1.out_channels
    if args.device.type == "cpu" and width < 16:  # oneDNN would write outside of its memory
        text = "cannot train on a CPU, 16 and more can (oneDNN issue 6035)"
        raise UserError(f"a backbone of width {width} {text}")
    return backbone


def default_weight(distance, embed_dim):
    """The weight with which a distance pulls as strongly as 300 of LogExp(1) in 512 dimensions."""
    pull = 300 * pull_of(lrfr.logexp_loss, 512)
    weight = pull / pull_of(distance, embed_dim)
    return float(f"{weight:.2g}")


def pull_of(distance, embed_dim):
    """The norm of a distance's gradient for unit embeddings at a cosine of one half."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(128, embed_dim, dtype=torch.float64, generator=generator)
    d = F.normalize(d)  # of length 1, as the difference of two unit vectors at 60 degrees
    d.requires_grad_()
    distance(d, torch.zeros_like(d)).backward()
    return d.grad.norm().item()


def read_last(args):
    """The checkpoint in the run's folder, None if there is none, or nothing trained in it."""
    path = Path(args.out, "last.pt")
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not state.keys() >= {"args", "step", "backbone", "head", "optimiser", "scaler"}:
            raise ValueError("something is missing")
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # of a dozen kinds, for a damaged file
        reason = evaluate.one_line(error)[:80]
        text = "is damaged, or not of train.py: move it away, or give another --out"
        raise UserError(f"{path} {text} ({reason})") from None
    if state["step"] == 0:
        return None
    return state


def check_same(args, state):
    """Refuses to go on with other options or data than the checkpoint's, wherever the data lies.

    Compares all that prepare has put on args as well, such as the number of processes.
    """
    may_change = {"data", "epochs", "out", "workers", "device", "amp", "save_every"}
    for key, old in state["args"].items():
        new = getattr(args, key, old)
        if key not in may_change and new != old:
            what = f"{key} {old}, not {new}"
            if key == "fingerprint":
                what = "other images or labels"
            text = f"{args.out}/last.pt was made with {what}"
            raise UserError(f"{text}: give the same, or another --out")


def check_alike(run):
    """Refuses processes that do not begin with the same data and at the same step."""
    everyone = [None] * RANKS
    distributed.all_gather_object(everyone, (run.step, run.args.fingerprint))
    if len(set(everyone)) > 1:
        text = "the processes differ in step or data: all machines need the same --out and --data"
        raise UserError(text)


def save_last(run):
    """Writes the run's checkpoint, in the first process."""
    if RANK == 0:
        state = {
            "step": run.step,
            "args": vars(run.args),
            "backbone": run.model.backbone.state_dict(),
            "head": run.model.head.state_dict(),
            "optimiser": run.optimiser.state_dict(),
            "scaler": run.scaler.state_dict(),
        }
        with evaluate.new_file(Path(run.args.out, "last.pt")) as file:
            torch.save(state, file)


def show_faces(run):
    """Draws faces.png: eight faces, each above its degraded versions."""
    if RANK > 0:
        return
    args = run.args
    places = np.linspace(0, len(run.faces) - 1, 8).astype(int)
    pixels, _ = default_collate([run.faces[i] for i in places])
    sharp = lrfr.to_input(pixels.permute(0, 3, 1, 2), "cpu")
    rows = [sharp]
    if args.maug != "none":
        for px in args.resolutions:
            maug = lrfr.MAug([px], [1], args.camera)
            rows.append(maug(sharp))
    picture = (torch.cat(rows) + 1) / 2
    with evaluate.new_file(Path(args.out, "faces.png")) as file:
        save_image(picture, file, "PNG", nrow=8, padding=0)


# ---- 4. Data -------------------------------------------------------------------------------------


class Faces(Dataset):
    """Labelled faces: item i is a (112, 112, 3) uint8 RGB array and its label.

    An image that cannot be read is named on stderr, and the next one is taken in its place.
    """

    def __init__(self, sources, labels, classes, listing):
        self.sources = sources  # paths or bytes of image files
        self.labels = labels
        self.classes = classes
        # listing: the bytes of paths and labels, or of train.idx; pixels are not compared
        self.fingerprint = hashlib.sha256(listing).hexdigest()[:16]

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i):
        for place in range(i, i + 100):
            place = place % len(self)
            try:
                return self.load(place)
            except UserError as error:
                last = f"image {place} is skipped: {error}"
                warn_once(last)
        raise UserError(f"a hundred images in a row cannot be read; {last}")

    def load(self, i):
        return evaluate.read_face(self.sources[i]), self.labels[i]


def image_folder(root):
    """`root`/identity/image.jpg -> paths, sorted by identity, and labels."""
    root = os.path.normpath(root)
    paths = evaluate.images_below(root)
    labels, number_of = [], {}
    for path in paths:
        folder = os.path.dirname(path)
        if os.path.dirname(folder) != root:
            raise UserError(f"{folder} holds images: expected {root}/identity/image.jpg alone")
        labels.append(number_of.setdefault(folder, len(number_of)))
    return paths, np.array(labels, int)


MAGIC = bytes.fromhex("0a23d7ce")  # begins each record of an MXNet RecordIO file


def read_record(file, offset):
    """The label, and the bytes of the image file, in the record at a byte offset.

    Where a payload holds the magic number itself, it was split into parts, flagged 1, 2 ... 2, 3,
    and the number left out. A whole payload has the flag 0.
    """
    file.seek(offset)
    parts = []
    flag = 1  # as if more parts followed
    while flag in (1, 2):
        magic = file.read(4)
        if magic != MAGIC:
            text = f"no whole record before byte {file.tell()}: is it cut short?"
            raise UserError(f"{file.name}: {text}")
        word = int.from_bytes(file.read(4), "little")
        flag = word >> 29
        length = word & (2**29 - 1)
        parts.append(file.read(length))
        file.read(-length % 4)  # padding
    payload = MAGIC.join(parts)
    # A count, a label and two ids; where the count is not 0, so many labels follow instead.
    head = payload[:28].ljust(28, b"\0")  # without labels and image, it ends after 24 bytes
    count, label, first = struct.unpack("<If16xf", head)
    if count > 0:
        label = first
    return label, payload[24 + 4 * count :]


class RecordFaces(Faces):
    """Faces of `root`/train.rec and train.idx, as InsightFace or im2rec writes them.

    `sources` are byte offsets. In InsightFace's, record 0 is no image: its label is the first key
    behind the images, and the file `property` says how many identities there are, labelled from 0.
    Where either is missing, all records are read for their labels, and renumbered from 0. (Above
    2^24 keys, that float32 can be a few too high or too low; what is no image is then skipped.)
    """

    def __init__(self, root):
        self.path = os.path.join(root, "train.rec")
        index = os.path.join(root, "train.idx")
        properties = Path(root, "property")
        try:
            keys, offsets = np.loadtxt(index, np.int64, ndmin=2).T
            keys, places = np.unique(keys, return_index=True)  # sorted
            offsets = offsets[places]
            with open(self.path, "rb") as file:
                end, image = read_record(file, offsets[0])
                if not image:
                    offsets = offsets[(keys > keys[0]) & (keys < end)]  # what holds an image
                if not image and properties.exists():
                    classes, _, _ = properties.read_text().partition(",")
                    if not 0 < int(classes) <= len(offsets):
                        raise ValueError(f"{classes} identities, but {len(offsets)} images")
                    labels = range(int(classes))  # as keys, 0 and the records' 0.0 are equal
                else:
                    labels = {read_record(file, offset)[0] for offset in offsets}
        except ValueError as error:
            raise UserError(f"{index}, or property beside it: {error}") from None
        self.number_of = {label: i for i, label in enumerate(sorted(labels))}
        listing = Path(index).read_bytes()
        super().__init__(offsets, None, len(self.number_of), listing)

    def load(self, i):
        with open(self.path, "rb") as file:  # opened anew, so that processes share no position
            label, image = read_record(file, self.sources[i])
        if label not in self.number_of:
            raise UserError(f"{self.path}: label {label:g}, of {self.classes} identities")
        return evaluate.read_face(image), self.number_of[label]


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
    background = (grey, grey, grey)
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE), background)  # twice as large at first
    canvas = ImageDraw.Draw(image)
    turn, nod = rng.normal(0, 0.5, 2)  # of the head: what lies nearer to the camera moves more
    for i, own in enumerate(person):
        colour, x, y, width, height = FACE[i]
        depth = i - 5
        fill = (colour + 10 * own[:3]).astype(int)
        width *= 1 + 0.2 * own[3]
        height *= 1 + 0.2 * own[4]
        y += 3 * own[5]
        y += depth * nod
        if x > 0:
            x += 3 * own[6]
        for side in (-x, x):
            middle = SIZE / 2 + side + depth * turn
            left, right = middle - width, middle + width
            top, bottom = y - height, y + height
            box = [2 * left, 2 * top, 2 * right, 2 * bottom]
            canvas.ellipse(box, fill=tuple(fill))
    angle = rng.normal(0, 5)
    image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=background)
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    light = rng.uniform(0.7, 1.3, 3)  # red, green, blue
    noise = rng.normal(0, 8, (SIZE, SIZE, 3))
    pixels = np.asarray(image) * light + noise
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
    return Faces(files, np.arange(people).repeat(pictures), people, b"demo")


def open_data(args):
    """--data -> faces to train on, and benchmarks."""
    if args.data == "demo":
        faces, benchmarks = open_demo()
    elif Path(args.data, "train.rec").exists():
        faces, benchmarks = open_records(args)
    else:
        faces, benchmarks = open_folder(args)
    found = f"{args.data}: {len(faces)} images of {faces.classes} identities"
    if faces.classes < 2:
        raise UserError(f"{found}: two are needed, as identity/image.jpg or train.rec, train.idx")
    most = len(faces) // RANKS
    if args.batch_size > most:
        raise UserError(f"{found}: --batch-size can be {most} at most, with {RANKS} processes")
    return faces, benchmarks


def open_demo():
    warn_once("drawing faces")
    faces = demo_faces(150, 16, seed=1)
    strangers = demo_faces(40, 10, seed=2)
    return faces, hold_out("people not seen in training", strangers.sources, strangers.labels)


def open_records(args):
    args.holdout = 0
    benchmarks = []
    for path in sorted(Path(args.data).glob("*.bin")):
        try:
            benchmarks.append(evaluate.read_bin(path))
        except (UserError, OSError) as error:
            text = evaluate.one_line(error)
            warn_once(f"passed over, though it ends in .bin: {text}")
    return RecordFaces(args.data), benchmarks


def open_folder(args):
    paths, labels = image_folder(args.data)
    identities = len(set(labels))
    if args.holdout is None:  # up to 5 %; of few identities none
        args.holdout = min(100, identities // 40 * 2)  # never 1, which makes no impostor pairs
    if args.holdout > max(0, identities - 2):
        raise UserError(f"--holdout {args.holdout}: of {identities} identities, two must be left")
    classes = identities - args.holdout
    kept = np.count_nonzero(labels < classes)  # the identities that are held out come last
    benchmarks = []
    if args.holdout > 0:
        benchmarks = hold_out("held-out identities", paths[kept:], labels[kept:])
    paths, labels = paths[:kept], labels[:kept]
    lines = []
    for path, label in zip(paths, labels):
        lines.append(f"{path.removeprefix(args.data)} {label}")
    listing = "\n".join(lines)
    return Faces(paths, labels, classes, os.fsencode(listing)), benchmarks


def hold_out(name, sources, labels):
    """A benchmark of identities that are not trained on, in a list; [] if there are too few.

    It has up to 3,000 pairs of one person and as many of two, of at most 4,000 images.
    """
    rng = np.random.default_rng(0)
    chosen = []
    for i in np.sort(rng.permutation(len(labels))[:4000]):
        try:
            evaluate.read_face(sources[i])  # only to see whether it can be read
            chosen.append(i)
        except UserError as error:
            warn_once(f"left out of the {name}: {error}")
    identity = labels[chosen]
    first, second = np.triu_indices(len(chosen), 1)
    same = identity[first] == identity[second]
    genuine = np.flatnonzero(same)
    impostor = np.flatnonzero(~same)
    count = min(3000, len(genuine), len(impostor))
    count = count // 5 * 5  # both kinds together fill ten folds
    if count == 0:
        warn_once(f"no table at the end: the {name} make fewer than five pairs of one kind")
        return []
    genuine = rng.choice(genuine, count, replace=False)
    impostor = rng.choice(impostor, count, replace=False)
    in_turn = np.stack([genuine, impostor], 1)  # so that each fold has both kinds
    order = in_turn.ravel()
    pairs = evaluate.Pairs(first[order], second[order], same[order])
    chosen_sources = [sources[i] for i in chosen]
    gallery, probes = evaluate.split_gallery(identity)
    return [evaluate.Benchmark(name, chosen_sources, pairs, identity, gallery, probes)]


def jitter(images, strength):
    """Turns, scales, shifts and lights each of (N, 3, H, W) in [-1, 1] at random.

    strength 1: up to 9 degrees, 5 % of the size, 15 % of scale, 30 % of brightness and contrast.
    Drawn on the CPU, so that they are the same on every device.
    """
    if strength == 0:
        return images
    draws = strength * (2 * torch.rand(6, len(images), device="cpu") - 1)
    angle, zoom, x, y, brightness, contrast = lrfr.to_device_of(images, draws)
    angle = math.radians(9) * angle
    scale = 1 + 0.15 * zoom
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    upper = torch.stack([cos, -sin, 0.1 * x], 1)  # coordinates are from -1 to 1
    lower = torch.stack([sin, cos, 0.1 * y], 1)
    matrices = torch.stack([upper, lower], 1)  # (N, 2, 3)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)  # grey outside
    brightness = 1 + 0.3 * brightness.view(-1, 1, 1, 1)
    light = (images + 1) * brightness
    images = (light - 1).clamp(-1, 1)
    contrast = 1 + 0.3 * contrast.view(-1, 1, 1, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast + mean
    images = images.clamp(-1, 1)
    return images.contiguous(memory_format=torch.channels_last)


def batches(count, batch_size, seed, steps):
    """Yields the indices of this process's images, out of `count`, in each of `steps`.

    Every epoch has an order of its own; what is left over at its end is passed over.
    """
    per_step = batch_size * RANKS
    for step in steps:
        epoch, i = divmod(step, count // per_step)
        if i == 0 or step == steps[0]:  # in the middle of an epoch, if the run goes on
            order = np.random.default_rng([seed, epoch]).permutation(count)
        together = order[i * per_step : (i + 1) * per_step]
        yield together[RANK::RANKS].tolist()


# ---- 5. Command line -----------------------------------------------------------------------------


def main(argv=None):
    if RANKS > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # The others wait while the first one evaluates.
        distributed.init_process_group(backend, timeout=timedelta(hours=3))
    run = prepare(argv)
    if RANKS > 1:
        check_alike(run)
    save_last(run)  # a full disk is noticed now
    show_faces(run)
    args = run.args
    text = f"{args.images:,} images of {args.classes:,} identities"
    text += f", {args.batch_size * RANKS} in a step; loss {args.loss}, weight {args.weight}"
    text += f"; run: {args.out}, from step {run.step:,}"
    report(args, text, {"args": vars(args)})
    try:
        train(run)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on from the last checkpoint") from None
    if RANK == 0:
        print(f"the weights: {args.out}/last.pt")
    if RANKS > 1:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    evaluate.run(main)
