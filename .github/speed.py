# SPDX-License-Identifier: MIT
"""What RESULTS.md says about speed, each comparison side by side in one run.

python .github/speed.py step 18             this project's training step against the plain one
python .github/speed.py step 10 --width 16  the same for a small network
python .github/speed.py head 100000         the ArcFace head of so many classes, and its memory
python .github/speed.py maug FOLDER         degrade against Pillow, on one core
python .github/speed.py decode FOLDER       reading training images against a loop of Pillow
python .github/speed.py embed FOLDER        evaluation against float32, image by image

FOLDER holds identity/image.jpg, for decode also train.rec. The plain step is the same network in
float32 and NCHW, with two forwards and torch's defaults. Each step runs in a process of its own,
since keep_memory changes a whole process.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import normalize, to_tensor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import evaluate
import lrfr
import train

CLASSES = 1000  # of the head in a step


def seconds(function, repeats=3):
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


# ---- A training step -----------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds of the parts of a step; waits for the device at each lap."""

    def __init__(self, device):
        self.device = device
        self.parts = {}
        self.last = time.perf_counter()

    def lap(self, part):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0) + now - self.last
        self.last = now


def our_step(args, images, labels, watch):
    """The step of train.py."""
    device = args.device
    evaluate.keep_memory()
    backbone, head = lrfr.IResNet(args.depth, args.width), lrfr.ArcFace(CLASSES)
    model = lrfr.LRFR(backbone, head, lrfr.MAug(), lrfr.logexp_loss)
    model = model.train().to(device, memory_format=torch.channels_last)
    backbone.register_forward_pre_hook(lambda *_: watch.lap("flips, MAug"))
    backbone.register_forward_hook(lambda *_: watch.lap("backbone, forward"))
    optimiser = torch.optim.SGD(
        model.parameters(), 0.02, momentum=0.9, nesterov=True, fused=device.type == "cuda"
    )

    def step():
        pixels = lrfr.to_input(images.to(device), device)
        with evaluate.autocast(device, args.amp):
            loss, _ = model(pixels, labels.to(device))
        watch.lap("head, losses")
        optimiser.zero_grad()
        loss.backward()
        watch.lap("backward")
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimiser.step()
        watch.lap("optimiser")

    return step


def plain_step(args, images, labels, watch):
    """The same in float32 and NCHW, with two forwards."""
    device = args.device
    backbone, head = (
        lrfr.IResNet(args.depth, args.width).to(device),
        lrfr.ArcFace(CLASSES).to(device),
    )
    maug = lrfr.MAug()
    optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.02, momentum=0.9)
    pixels = (images.to(device).float() / 127.5 - 1).contiguous()
    labels = labels.to(device)

    def step():
        degraded = maug(pixels)
        f_hr, f_lr = backbone(pixels), backbone(degraded)
        losses = [F.cross_entropy(head(f, labels), labels) for f in (f_hr, f_lr)]
        loss = sum(losses) / 2 + lrfr.logexp_loss(F.normalize(f_hr), F.normalize(f_lr))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        watch.lap("step")

    return step


def run_step(args):
    """Times one of the two steps in this process, and prints seconds for each of its parts."""
    torch.manual_seed(0)
    images = torch.randint(256, (args.batch_size, 3, 112, 112), dtype=torch.uint8)
    labels = torch.randint(CLASSES, (args.batch_size,))
    watch = Stopwatch(args.device)
    make = our_step if args.only == "ours" else plain_step
    step = make(args, images, labels, watch)
    step()
    watch.parts.clear()
    for _ in range(args.steps):
        step()
    for part, spent in watch.parts.items():
        print(f"{spent / args.steps:.5f} {part}")


def measure(args, which):
    """Runs one of the two steps in a new process -> {part: seconds}."""
    options = ["--width", args.width, "--batch-size", args.batch_size, "--steps", args.steps]
    command = [sys.executable, __file__, "step", args.depth, *options, "--only", which]
    command += ["--device", args.device, "--amp", args.amp]
    output = subprocess.check_output([str(word) for word in command], text=True)
    parts = {}
    for line in output.splitlines():
        spent, part = line.split(maxsplit=1)
        parts[part] = float(spent)
    return parts


def product_rate(args):
    """GFLOP/s of a large matrix product in the precision of a step."""
    dtype = evaluate.precision(args.device, args.amp)
    matrix = torch.randn(4096, 4096, device=args.device, dtype=dtype)

    def product():
        return (matrix @ matrix)[0, 0].item()  # waits for the device

    return 2e-9 * 4096**3 / seconds(product, 5), dtype


def gigaflops(args):
    """Arithmetic of the backbone in a step: forward, and twice as much backward, of both views."""
    backbone, images = lrfr.IResNet(args.depth, args.width), torch.zeros(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter:
        backbone.eval()(images)
    return 3 * 2 * args.batch_size * counter.get_total_flops() / 1e9


def step(args):
    if args.only:
        run_step(args)
        return
    ratios, parts = [], {}
    for _ in range(args.repeats):
        plain, ours = measure(args, "plain"), measure(args, "ours")
        for part, spent in ours.items():
            parts.setdefault(part, []).append(spent)
        ratios.append(sum(plain.values()) / sum(ours.values()))
        print(
            f"plain {sum(plain.values()):.3f} s, ours {sum(ours.values()):.3f} s: "
            f"{ratios[-1]:.2f} times as fast",
            flush=True,
        )
    total = sum(statistics.median(values) for values in parts.values())
    for part, values in parts.items():
        spent = statistics.median(values)
        print(f"{part:>20} {1000 * spent:8.1f} ms {spent / total:6.1%}")
    work = gigaflops(args)
    rate, dtype = product_rate(args)
    print(
        f"r{args.depth}, width {args.width}, batch {args.batch_size}: "
        f"{args.batch_size / total:.1f} pairs/s, {work / total:,.0f} GFLOP/s, "
        f"{work / total / rate:.0%} of a matrix product's {rate:,.0f} in {dtype}\n"
        f"this step is {statistics.median(ratios):.2f} times as fast as the plain one "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {args.repeats} repeats)"
    )


# ---- Other parts ---------------------------------------------------------------------------------


def head(args):
    evaluate.keep_memory()
    layer, embeddings = lrfr.ArcFace(args.classes), torch.randn(64, 512, requires_grad=True)
    optimiser = torch.optim.SGD(layer.parameters(), 0.02, momentum=0.9, nesterov=True)
    labels = torch.randint(args.classes, (64,))

    def once():
        optimiser.zero_grad()
        F.cross_entropy(layer(embeddings, labels), labels).backward()
        optimiser.step()

    spent = seconds(once)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{args.classes} classes, 64 embeddings: {spent:.4f} s a step, {memory:.1f} GB")


def pillow_resize(image, px):
    return image.resize((px, px), Image.BICUBIC).resize((112, 112), Image.BICUBIC)


def pillow_degrade(image, px):
    """What data sets elsewhere do, image by image."""
    return normalize(to_tensor(pillow_resize(image, px)), [0.5] * 3, [0.5] * 3)


def maug(args):
    torch.set_num_threads(1)
    evaluate.keep_memory()
    paths = train.image_folder(args.folder)[0][:256]
    opened = [Image.open(path).convert("RGB") for path in paths]
    images = lrfr.to_input(evaluate.read_images(paths), "cpu")
    px = lrfr.MAug().sample(len(paths))
    pairs = list(zip(opened, px.tolist()))
    theirs = seconds(lambda: torch.stack([pillow_degrade(image, r) for image, r in pairs]))
    resizes = seconds(lambda: [pillow_resize(image, r) for image, r in pairs])
    ours = seconds(lambda: lrfr.degrade(images, px))
    print(
        f"{len(paths)} images: Pillow to tensors {theirs:.4f} s, its resizes alone {resizes:.4f}, "
        f"degrade {ours:.4f}: {theirs / ours:.1f} and {resizes / ours:.1f} times as fast"
    )


def decode(args):
    torch.set_num_threads(1)
    if os.path.exists(os.path.join(args.folder, "train.rec")):
        faces = train.RecordFaces(args.folder)
        files = [train.read_record(faces.path, offset) for offset in faces.sources[:3000]]
        sources = [evaluate.io.BytesIO(file) for file in files]
    else:
        paths, labels = train.image_folder(args.folder)
        faces = train.Faces(paths, labels, len(set(labels)))
        sources = paths[:3000]
    count = len(sources)
    theirs = seconds(lambda: [np.asarray(Image.open(source).convert("RGB")) for source in sources])
    ours = seconds(lambda: [faces[i] for i in range(count)])
    print(
        f"{count} images: Pillow {count / theirs:.0f} a second, ours {count / ours:.0f}, "
        f"{theirs / ours:.0%}"
    )


def embed(args):
    evaluate.keep_memory()
    backbone = lrfr.IResNet(args.depth, args.width).eval()
    paths, px = train.image_folder(args.folder)[0][:32], evaluate.RESOLUTIONS
    cpu = torch.device("cpu")

    def one_by_one():
        for path in paths:
            for r in px:
                lrfr.embed(backbone, pillow_degrade(Image.open(path).convert("RGB"), r)[None])

    theirs = seconds(one_by_one)
    backbone.to(memory_format=torch.channels_last)
    ours = seconds(
        lambda: evaluate.embed_sources({"": backbone}, "", paths, px, cpu, "auto", "sum")
    )
    print(
        f"{len(paths)} images at four resolutions: float32, one at a time {theirs:.2f} s, ours "
        f"{ours:.2f}: {theirs / ours:.1f} times as fast"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def add(function, *positional):
        command = commands.add_parser(function.__name__)
        for name, kind in positional:
            command.add_argument(name, type=kind)
        command.set_defaults(function=function)
        return command

    positive = evaluate.number(int, 1)
    command = add(step, ("depth", int))
    command.add_argument("--width", type=evaluate.number(int, 16), default=64)
    command.add_argument("--batch-size", type=evaluate.number(int, 2), default=32)
    command.add_argument("--steps", type=positive, default=3, help="timed in each process")
    command.add_argument("--repeats", type=positive, default=5)
    command.add_argument("--only", choices=["ours", "plain"], help=argparse.SUPPRESS)
    evaluate.add_device_options(command)
    add(head, ("classes", evaluate.number(int, 2)))
    add(maug, ("folder", str))
    add(decode, ("folder", str))
    command = add(embed, ("folder", str))
    command.add_argument("--depth", type=int, default=18)
    command.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    evaluate.run(main)
