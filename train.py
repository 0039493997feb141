# SPDX-License-Identifier: MIT
"""Train a face recogniser on sharp and degraded faces: python train.py --data ms1m --maug 1:1:2 --loss logexp

Needs nothing but a folder of identities; without --data it draws its own faces. `--maug none --loss none`
is the paper's baseline.
"""
import argparse
import io
import json
import os
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from evaluate import (SIZE, autocast, clock, keep_memory, make_pairs, print_table, read_image, to_input,
                      verify, write_file)
from lrfr import ArcFace, DEPTHS, DISTANCES, IResNet, LRFR, MAug, degrade, load_backbone, parse_ratio

# ------------------------------------------------------------------------------------------------
# Data: `sources` are paths or the bytes of image files, `labels` their identities


class Faces(Dataset):
    """Images with labels 0 .. classes - 1; item i is (3, 112, 112) uint8 and its label."""

    def __init__(self, sources, labels):
        self.sources, self.labels = sources, np.asarray(labels)
        self.classes = int(self.labels.max()) + 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return read_image(self.sources[i]), int(self.labels[i])

    def split(self, count):
        """The first identities for training, the last `count` held out: two sets."""
        kept = self.labels < self.classes - count
        parts = [[i for i in np.flatnonzero(mask)] for mask in (kept, ~kept)]
        train, held = ([self.sources[i] for i in part] for part in parts)
        return Faces(train, self.labels[parts[0]]), Faces(held, self.labels[parts[1]] - self.classes + count)


def image_folder(root):
    """root/identity/image -> Faces; identities and images in sorted order."""
    sources, labels, classes = [], [], 0
    for identity in sorted(entry.path for entry in os.scandir(root) if entry.is_dir()):
        images = sorted(e.path for e in os.scandir(identity)
                        if e.name.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".webp")))
        sources += images
        labels += [classes] * len(images)
        classes += bool(images)
    if classes < 2:
        raise ValueError(f"{root}: {len(sources)} images of {classes} identities; expected "
                         f"{os.path.join(root, 'identity', 'image.jpg')}, two identities or more")
    return Faces(sources, labels)


def open_data(name):
    for root in (name, os.path.join("data", name)):
        if os.path.isdir(root):
            return image_folder(root)
    raise ValueError(f"--data {name}: neither a folder {name} nor {os.path.join('data', name)}; "
                     "put the aligned 112 x 112 faces there as identity/image.jpg, or use --data demo")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="demo", help="a folder root/identity/image, a name under data/, or demo: drawn faces")
    add("--maug", default="1:1:2", help="ratio of the resolutions, or none")
    add("--resolutions", type=int, nargs="+", default=[7, 14, 20], metavar="PX")
    add("--loss", choices=[*DISTANCES, "none"], default="logexp", help="distance between sharp and degraded")
    add("--p", type=float, default=1.0, help="exponent of the LogExp distance")
    add("--weight", type=float, default=1.0, help="lambda, weight of the distance")
    add("--backbone", choices=[f"r{d}" for d in DEPTHS], default="r10")
    add("--width", type=int, default=32, help="channels of the first stage")
    add("--dropout", type=float, default=0.0)
    add("--scale", type=float, default=32.0, help="ArcFace scale s")
    add("--margin", type=float, default=0.4, help="ArcFace margin m, radians")
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=0.1, help="peak learning rate")
    add("--weight-decay", type=float, default=5e-4)
    add("--jitter", type=float, default=0.0)
    add("--holdout", type=int, default=0)
    add("--init", metavar="FILE", help="checkpoint to start from")
    add("--out", help="folder of the run")
    add("--workers", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto")
    add("--test", default=None)
    args = parser.parse_args(argv)
    keep_memory()
    torch.manual_seed(args.seed)
    data = open_data(args.data)
    train, held = data.split(args.holdout) if args.holdout else (data, None)
    backbone = IResNet(int(args.backbone[1:]), args.width, dropout=args.dropout)
    head = ArcFace(train.classes, scale=args.scale, margin=args.margin)
    maug = None if args.maug == "none" else MAug(args.resolutions, parse_ratio(args.maug))
    model = LRFR(backbone, head, maug, None if args.loss == "none" else args.loss, args.weight, args.p)
    model.to(args.device, memory_format=torch.channels_last).train()
    opt = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay, nesterov=True)
    steps = len(train) // args.batch_size
    total = steps * args.epochs
    step, start, shown = 0, time.time(), 0
    print(len(train), train.classes, steps, flush=True)
    for epoch in range(args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(train))[:steps * args.batch_size]
        loader = DataLoader(train, args.batch_size, sampler=order.tolist(), num_workers=args.workers)
        for images, labels in loader:
            lr = args.lr * min(1, (step + 1) / (0.05 * total)) * (1 - step / total)
            for group in opt.param_groups:
                group["lr"] = lr
            torch.manual_seed(args.seed * 1_000_003 + step)
            images = to_input(images, args.device)
            if args.jitter:
                n, j = len(images), args.jitter
                r = torch.rand(n, 6) * 2 - 1
                theta = torch.zeros(n, 2, 3)
                s = 1 + .15 * j * r[:, 0]
                a = .15 * j * r[:, 1]
                theta[:, 0, 0] = s * a.cos(); theta[:, 0, 1] = -s * a.sin(); theta[:, 1, 0] = s * a.sin(); theta[:, 1, 1] = s * a.cos()
                theta[:, :, 2] = .1 * j * r[:, 2:4]
                images = torch.nn.functional.grid_sample(images, torch.nn.functional.affine_grid(theta, images.shape, align_corners=False), padding_mode="border", align_corners=False)
                images = ((images * (1 + .3 * j * r[:, 4, None, None, None])) + .3 * j * r[:, 5, None, None, None]).clamp(-1, 1)
            with autocast(args.device, args.amp):
                loss, parts = model(images, labels.to(args.device))
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
            opt.step()
            step += 1
            if time.time() - shown > 10:
                shown = time.time()
                rate = step / (shown - start)
                print(f"epoch {epoch + 1} step {step}/{total} loss {loss.item():.3f} " + " ".join(f"{k} {v.item():.4f}" for k, v in parts.items()) + f" lr {lr:.4f} {rate * args.batch_size:.0f} img/s {clock((total - step) / rate)} left", flush=True)
        write_file(os.path.join(args.out, "last.pt"), {"backbone": backbone.state_dict(), "head": head.state_dict(), "args": vars(args), "step": step})
    print("trained in", clock(time.time() - start))
    if held:
        rows = verify({"x": backbone.eval()}, make_pairs("held-out identities", held.sources, held.labels), [7, 14, 20, 112])
        print_table(rows)
    if args.test:
        from evaluate import read_lfw
        print_table(verify({args.out: backbone.eval()}, read_lfw(args.test), [7, 14, 20, 112]))


if __name__ == "__main__":
    main()
