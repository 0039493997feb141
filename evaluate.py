# SPDX-License-Identifier: MIT
"""Low-resolution face verification and identification: python evaluate.py CHECKPOINT --lfw DIR

Every set is run at each resolution in two ways: both images degraded (what the paper plots), and
sharp against degraded (a passport photo against a camera). Verification: ten folds; the threshold
of a fold is the best of the other nine on the grid -1, -0.995 .. 1 of cosines, the highest of
equals, as in the official code. Identification: rank-1, one sharp image per person in the gallery.
"""
import argparse
import ctypes
import io
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lrfr import degrade, embed, load_backbone

SIZE = 112  # height and width of an aligned face
Image.MAX_IMAGE_PIXELS = 50_000_000  # of over twice as many Pillow refuses: a decompression bomb

# ---- 1. Files -----------------------------------------------------------------------------------


def read_image(source):
    """A path, or the bytes of an image file -> uint8 RGB (3, 112, 112), or a ValueError."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    name = "an image" if isinstance(source, bytes) else source
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image ({error})") from None
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_input(images, device):
    """uint8 images -> what a backbone takes: float in [-1, 1], channels last, on the device."""
    images = images.to(device, non_blocking=True).float() / 127.5 - 1  # (v / 255 - .5) / .5
    return images.contiguous(memory_format=torch.channels_last)


def write_file(path, data):
    """Writes bytes, or what torch.save takes, under a temporary name and moves it into place."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data) if isinstance(data, bytes) else torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# ---- 2. Protocols -------------------------------------------------------------------------------


@dataclass
class Pairs:
    """A verification set of P pairs, in ten contiguous folds."""

    name: str
    sources: list  # of images: paths, or the bytes of files
    first: np.ndarray  # (P,) index of the first image of a pair
    second: np.ndarray  # (P,)
    same: np.ndarray  # (P,) bool: one person, or two
    identity: np.ndarray | None = None  # (len(sources),) whose face it is, where that is known


def read_lfw(root):
    """LFW's View 2: `root`/pairs.txt, and the aligned images as `root`/Name/Name_0001.jpg."""
    path = os.path.join(root, "pairs.txt")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; it and the images belong into the folder of --lfw")
    index, people, rows = {}, [], []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number_, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) <= 2 and (number_ == 1 or not fields):
                continue  # the header: folds, and pairs of a kind per fold
            if len(fields) == 3:
                fields.insert(2, fields[0])  # one person, two images
            if len(fields) != 4 or not (fields[1] + fields[3]).isdecimal():
                raise ValueError(f"{path}, line {number_}: not a pair: '{line.strip()}'")
            row = []
            for name, i in (fields[:2], fields[2:]):
                image = os.path.join(root, name, f"{name}_{int(i):04d}.jpg")
                if image not in index:
                    if not os.path.isfile(image):
                        raise ValueError(f"{path}, line {number_}: {image} is missing")
                    index[image] = len(index)
                    people.append(name)
                row.append(index[image])
            rows.append([*row, fields[0] == fields[2]])
    if len(rows) < 10:
        raise ValueError(f"{path}: {len(rows)} pairs; ten folds need ten or more")
    first, second, same = np.array(rows).T
    return Pairs("LFW", list(index), first, second, same.astype(bool),
                 np.unique(people, return_inverse=True)[1])


def make_pairs(name, sources, labels, limit=3000, seed=0):
    """Pairs of labelled images: up to `limit` of one person and as many of two, taking turns."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    first, second = np.triu_indices(len(labels), 1)
    same = labels[first] == labels[second]
    count = min(limit, same.sum(), (~same).sum()) // 10 * 10
    if not count:
        raise ValueError(f"{name}: too few images to make ten folds of pairs")
    chosen = np.stack([rng.choice(np.flatnonzero(same == kind), count, replace=False)
                       for kind in (True, False)], 1).ravel()
    return Pairs(name, sources, first[chosen], second[chosen], same[chosen], labels)


GRID = np.linspace(-1, 1, 401)


def ten_folds(scores, same):
    """Cosines and truth of P pairs -> accuracy, standard deviation over folds, mean threshold."""
    right = np.stack([(scores >= threshold) == same for threshold in GRID])  # (thresholds, P)
    accuracies, thresholds = [], []
    for fold in np.array_split(np.arange(len(scores)), 10):
        others = right.sum(1) - right[:, fold].sum(1)
        best = len(GRID) - 1 - np.argmax(others[::-1])  # of equals the highest
        accuracies.append(right[best, fold].mean())
        thresholds.append(GRID[best])
    return np.mean(accuracies), np.std(accuracies), np.mean(thresholds)


def tar_at_far(scores, same, far=1e-3):
    """Share of the genuine pairs above the score that a share `far` of the impostors passes."""
    impostors = np.sort(scores[~same])[::-1]
    return (scores[same] > impostors[int(far * len(impostors))]).mean()


def rank_1(gallery, probes, identity):
    """Share of the probes whose nearest gallery image is of the same person.

    gallery, probes: (n, D) unit embeddings of the same n images, sharp and degraded; identity: (n,)
    whose. The first image of each person is in the gallery, every other one is a probe.
    """
    in_gallery = np.zeros(len(identity), bool)
    in_gallery[np.unique(identity, return_index=True)[1]] = True
    nearest = (probes[~in_gallery] @ gallery[in_gallery].T).argmax(1).numpy()
    return (identity[in_gallery][nearest] == identity[~in_gallery]).mean()


# ---- 3. Running a backbone ----------------------------------------------------------------------


def keep_memory():
    """Tells glibc to keep what is freed: on CPUs page faults cost half the time otherwise."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc: nothing to tell
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap max, trim and top pad
        mallopt(option, value)


def autocast(device, amp):
    """Autocast round a backbone; amp: "auto" (the device's fast one), "bf16", "fp16", "off"."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif amp == "auto":
        fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        amp = "bf16" if fast else "off"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def embed_sources(backbones, sources, resolutions, flip, device, amp, batch_size):
    """Each image decoded once -> {(backbone name, px): (n, D) float32 embeddings on the CPU}."""
    out = {(name, px): [] for name in backbones for px in resolutions}
    start = shown = time.time()
    with ThreadPoolExecutor(4) as pool, autocast(device, amp):
        for i in range(0, len(sources), batch_size):
            images = torch.stack(list(pool.map(read_image, sources[i:i + batch_size])))
            images = to_input(images, device)
            for px in resolutions:
                degraded = degrade(images, px)
                for name, backbone in backbones.items():
                    out[name, px].append(embed(backbone, degraded, flip).cpu())
            done, now = i + len(images), time.time()
            if now - shown > 5 or done == len(sources) and now - start > 5:
                shown, rate = now, done / (now - start)
                print(f"embedded {done:,} of {len(sources):,} images at {len(resolutions)} "
                      f"resolutions, {rate:.0f}/s, {clock((len(sources) - done) / rate)} left",
                      flush=True)
    return {key: torch.cat(parts) for key, parts in out.items()}


def verify(backbones, pairs, resolutions, flip, device, amp, batch_size=64):
    """{name: backbone in eval mode} -> a dict of results for each resolution and backbone."""
    wanted = sorted({*resolutions, SIZE})
    embeddings = embed_sources(backbones, pairs.sources, wanted, flip, device, amp, batch_size)
    rows = []
    for px in resolutions:
        for name in backbones:
            sharp, degraded = embeddings[name, SIZE], embeddings[name, px]
            row = {"set": pairs.name, "checkpoint": name, "px": px, "flip": flip,
                   "pairs": len(pairs.same)}
            for way, first in (("both", degraded), ("cross", sharp)):
                scores = (first[pairs.first] * degraded[pairs.second]).sum(1).double().numpy()
                keys = [f"{way}_{key}" for key in ("accuracy", "std", "threshold", "tar")]
                results = *ten_folds(scores, pairs.same), tar_at_far(scores, pairs.same)
                row |= zip(keys, map(float, results), strict=True)
            if pairs.identity is not None:
                row["rank1"] = float(rank_1(sharp, degraded, pairs.identity))
            rows.append(row)
    return rows


def print_table(rows):
    """One line per resolution and checkpoint, in %; cos >= is the threshold to accept from."""
    wide, row = max(10, *(len(row["checkpoint"]) for row in rows)), rows[0]
    print(f"\n{row['set']}: {row['pairs']:,} pairs, ten folds, flip test {row['flip']}, in %")
    print(f"{'':{wide + 5}} {'both degraded':^33} {'sharp against degraded':^33}")
    columns = f"{'accuracy (std)':>15} {'TAR@1e-3':>9} {'cos >=':>7} "
    print(f"{'px':>4} {'checkpoint':{wide}} {columns} {columns}  rank-1")
    for row in rows:
        print(f"{row['px']:4} {row['checkpoint']:{wide}}", end="")
        for way in ("both", "cross"):
            accuracy, std, tar = (100 * row[f"{way}_{key}"] for key in ("accuracy", "std", "tar"))
            threshold = row[f"{way}_threshold"]
            print(f" {accuracy:8.2f} ({std:4.2f}) {tar:9.2f} {threshold:7.3f} ", end="")
        print(f" {100 * row['rank1']:7.2f}" if "rank1" in row else "       -")
    print(flush=True)


# ---- 4. Command line ----------------------------------------------------------------------------


def number(kind, low):
    """An argparse type: an int or float that is finite and at least `low`."""
    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: at least {low} is needed")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def device(text):
    """An argparse type: a torch.device that this machine has."""
    try:
        return torch.zeros(0, device=text).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text}: no such device here") from None


def add_device_options(parser):
    parser.add_argument("--device", type=device, help="where to run: cpu, cuda, cuda:1 ...",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                        help="precision of the backbone; auto: what the device is fast at")


def run(main):
    """Calls main; what is wrong with the user's files becomes one line, and exit status 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        return f"error: {error}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="of train.py, or InsightFace weights")
    add("--lfw", metavar="DIR", required=True, help="folder with pairs.txt and the aligned images")
    add("--resolutions", type=number(int, 1), nargs="+", default=[7, 14, 20, SIZE], metavar="PX",
        help="to degrade to, in pixels")
    add("--flip", choices=["sum", "concat", "none"], default="sum",
        help="what the mirrored image adds to an embedding")
    add("--json", metavar="FILE", help="write the results here too")
    add("--batch-size", type=number(int, 1), default=64, help="images at a time")
    add_device_options(parser)
    args = parser.parse_args(argv)
    keep_memory()
    backbones = {}
    for path in args.checkpoints:
        backbone = load_backbone(path).to(args.device, memory_format=torch.channels_last)
        name = os.path.basename(os.path.dirname(path)) if path.endswith("last.pt") else path
        backbones[path if name in backbones else name] = backbone
    rows = verify(backbones, read_lfw(args.lfw), args.resolutions, args.flip, args.device, args.amp,
                  args.batch_size)
    print_table(rows)
    if args.json:
        write_file(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    sys.exit(run(main))
