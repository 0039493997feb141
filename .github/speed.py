# SPDX-License-Identifier: MIT
"""What RESULTS.md says about speed.

python .github/speed.py step 18             this project's training step against the plain one
python .github/speed.py step 10 --width 16  the same for a small network
python .github/speed.py decode FOLDER       reading training images, of identity/image.jpg

The plain step is the same network in float32 and NCHW, with two forwards and torch's defaults,
without flips, clipping and Nesterov's momentum. Both run in turn, each in a process of its own,
since train.choose_device changes a whole process.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import evaluate
import lrfr
import train

CLASSES = 1000  # of the head in a step


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
    """The step of train.py, without weight decay and loss scaler."""
    device = args.device
    train.choose_device(args)
    backbone, head = lrfr.IResNet(args.depth, args.width), lrfr.ArcFace(CLASSES)
    model = lrfr.LRFR(backbone, head, lrfr.MAug(), lrfr.logexp_loss)
    model = model.train().to(device, memory_format=torch.channels_last)
    backbone.register_forward_pre_hook(lambda *_: watch.lap("pixels, flips, MAug"))
    backbone.register_forward_hook(lambda *_: watch.lap("backbone, forward"))
    optimiser = torch.optim.SGD(
        model.parameters(), 0.02, momentum=0.9, nesterov=True, fused=device.type == "cuda"
    )

    def step():
        pixels = lrfr.to_input(images.to(device), device)
        with evaluate.autocast(device, args.amp):
            loss, _ = model(pixels, labels.to(device))
        watch.lap("head, losses")
        loss.backward()
        watch.lap("backward")
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad()
        watch.lap("optimiser")

    return step


def plain_step(args, images, labels, watch):
    device = args.device
    backbone = lrfr.IResNet(args.depth, args.width).to(device)
    head = lrfr.ArcFace(CLASSES).to(device)
    maug = lrfr.MAug()
    optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.02, momentum=0.9)

    def step():
        pixels = images.to(device).float() / 127.5 - 1
        targets = labels.to(device)
        degraded = maug(pixels)
        f_hr, f_lr = backbone(pixels), backbone(degraded)
        losses = [F.cross_entropy(head(f, targets), targets) for f in (f_hr, f_lr)]
        distance = lrfr.logexp_loss(F.normalize(f_hr).detach(), F.normalize(f_lr))
        loss = sum(losses) / 2 + 300 * distance
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
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
    size = 2048 if args.device.type == "cpu" else 8192  # enough to keep it busy
    matrix = torch.randn(size, size, device=args.device, dtype=dtype)
    times = []
    for _ in range(1 + args.repeats):  # the first is to warm up
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return 2e-9 * size**3 / statistics.median(times[1:]), dtype


def gigaflops(args):
    """Arithmetic of the backbone in a step: forward, and twice as much backward, of both views."""
    backbone, images = lrfr.IResNet(args.depth, args.width), torch.zeros(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter:
        backbone.eval()(images)
    return 3 * 2 * args.batch_size * counter.get_total_flops() / 1e9


def compare_steps(args):
    if args.only:
        run_step(args)
        return
    ratios, parts = [], {}
    for _ in range(args.repeats):
        plain = measure(args, "plain")
        ours = measure(args, "ours")
        for part, spent in ours.items():
            parts.setdefault(part, []).append(spent)
        plain_total = sum(plain.values())
        total = sum(ours.values())
        ratio = plain_total / total
        ratios.append(ratio)
        text = f"plain {plain_total:.3f} s, ours {total:.3f} s: {ratio:.2f} times as fast"
        print(text, flush=True)
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


# ---- Reading images ------------------------------------------------------------------------------


def decode(args):
    """Prints how many training images of an image folder one core reads in a second."""
    paths, _ = train.image_folder(args.folder)
    paths = paths[:3000]
    times = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        for path in paths:
            evaluate.read_face(path)
        times.append(time.perf_counter() - begin)
    print(f"{len(paths) / statistics.median(times):,.0f} images/s of {len(paths):,}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    positive = evaluate.number(int, 1)
    command = commands.add_parser("step")
    command.set_defaults(function=compare_steps)
    command.add_argument("depth", type=int, choices=[*lrfr.DEPTHS])
    command.add_argument("--width", type=evaluate.number(int, 16), default=64)
    command.add_argument("--batch-size", type=evaluate.number(int, 2), default=32)
    command.add_argument("--steps", type=positive, default=3, help="timed in each process")
    command.add_argument("--only", choices=["ours", "plain"], help=argparse.SUPPRESS)
    evaluate.add_device_options(command)
    decode_command = commands.add_parser("decode")
    decode_command.set_defaults(function=decode)
    decode_command.add_argument("folder")
    for parser_of_one in (command, decode_command):
        parser_of_one.add_argument("--repeats", type=positive, default=5)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    evaluate.run(main)
