# SPDX-License-Identifier: MIT
"""Low-resolution face verification and identification: python evaluate.py CHECKPOINT --lfw DIR

Every protocol is run at each resolution in two ways: both images degraded (what the paper plots), and
sharp against degraded (a camera against a passport photo). Verification: ten folds, the threshold of a
fold being the best of the other nine on the grid -1, -0.995 .. 1 of cosines, the highest of equals
(InsightFace's rule, in cosines). Identification: one sharp image per person in the gallery.
"""
import argparse
import ctypes
import io
import json
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

SIZE = 112
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses an image of over twice as many: a decompression bomb

# ------------------------------------------------------------------------------------------------
# Files


def read_image(source):
    """A path, or the bytes of an image file -> (3, 112, 112) uint8 RGB; ValueError if it is none."""
    name = "image" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image = image.convert("RGB")
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


# ------------------------------------------------------------------------------------------------
# Protocols


@dataclass
class Pairs:
    """A verification set: image sources, pairs of them, and whose face each image is (or None)."""

    name: str
    sources: list
    first: np.ndarray  # (P,) index of the first image of a pair
    second: np.ndarray  # (P,)
    same: np.ndarray  # (P,) bool; ten contiguous folds
    identity: np.ndarray | None = None  # (len(sources),)


def read_lfw(root, file="pairs.txt"):
    """LFW's View 2: `root`/pairs.txt and `root`/Name/Name_0001.jpg."""
    path = os.path.join(root, file)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; --lfw takes the folder that holds it and the images")
    index, rows = {}, []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split("\t") if "\t" in line else line.split()
            if number == 1 and len(fields) <= 2 or not fields:
                continue  # the header: folds and pairs per fold
            if len(fields) == 3:
                fields = [fields[0], fields[1], fields[0], fields[2]]
            try:
                people = [(fields[0], int(fields[1])), (fields[2], int(fields[3]))]
            except (ValueError, IndexError):
                raise ValueError(f"{path}, line {number}: not a pair: '{line.strip()}'") from None
            files = [os.path.join(root, name, f"{name}_{i:04d}.jpg") for name, i in people]
            for image in files:
                if image not in index and not os.path.isfile(image):
                    raise ValueError(f"{path}, line {number}: {image} is missing")
            rows.append([index.setdefault(image, len(index)) for image in files]
                        + [people[0][0] == people[1][0]])
    if len(rows) < 10:
        raise ValueError(f"{path}: {len(rows)} pairs; ten folds need at least ten")
    rows = np.array(rows)
    names = [os.path.basename(os.path.dirname(image)) for image in index]
    return Pairs("LFW", list(index), rows[:, 0], rows[:, 1], rows[:, 2].astype(bool),
                 np.unique(names, return_inverse=True)[1])


def make_pairs(name, sources, labels, limit=3000, seed=0):
    """A verification set from labelled images: as many pairs of one person as of two, in ten folds."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    first, second = np.triu_indices(len(labels), 1)
    same = labels[first] == labels[second]
    count = min(limit, same.sum(), (~same).sum()) // 10 * 10
    if not count:
        raise ValueError(f"{name}: too few held-out images to make ten folds of pairs")
    chosen = np.stack([rng.choice(np.flatnonzero(same == kind), count, replace=False)
                       for kind in (True, False)], 1).ravel()  # same, different, same, different, ...
    return Pairs(name, sources, first[chosen], second[chosen], same[chosen], labels)


GRID = np.linspace(-1, 1, 401)


def ten_folds(scores, same):
    """Cosines and truth of the pairs -> mean and standard deviation of the accuracy, mean threshold."""
    folds = np.array_split(np.arange(len(scores)), 10)
    right = np.stack([(scores >= t) == same for t in GRID])  # (thresholds, P)
    accuracies, thresholds = [], []
    for fold in folds:
        others = right.sum(1) - right[:, fold].sum(1)
        best = len(GRID) - 1 - np.argmax(others[::-1])  # of equals the highest
        accuracies.append(right[best, fold].mean())
        thresholds.append(GRID[best])
    return np.mean(accuracies), np.std(accuracies), np.mean(thresholds)


def tar_at_far(scores, same, far=1e-3):
    """Share of the same-person pairs above the lowest threshold that accepts at most `far` of the others."""
    impostors = np.sort(scores[~same])[::-1]
    return (scores[same] > impostors[int(far * len(impostors))]).mean()


def rank_1(gallery, probes, identity):
    """Share of the probes whose nearest gallery image is of the same person.

    gallery, probes: (n, D) embeddings of the same images; identity: (n,). The first image of each
    person is in the gallery; every other one is a probe.
    """
    in_gallery = np.zeros(len(identity), bool)
    in_gallery[np.unique(identity, return_index=True)[1]] = True
    nearest = (probes[~in_gallery] @ gallery[in_gallery].T).argmax(1).numpy()
    return (identity[in_gallery][nearest] == identity[~in_gallery]).mean()


# ------------------------------------------------------------------------------------------------
# Evaluation


def keep_memory():
    """Tells glibc to keep freed memory: a CPU step spends half its time on page faults otherwise."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1), libc.mallopt(-2, 2**28)  # mmap max, trim, top pad
    except (OSError, AttributeError):
        pass  # not Linux, or not glibc: nothing to do


def autocast(device, amp):
    """Autocast round the backbone. amp: "auto", "bf16", "fp16" or "off"; auto takes what is fast."""
    device = torch.device(device)
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif amp == "auto":
        amp = "bf16" if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "off"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def embed_sources(backbones, sources, resolutions, flip="sum", device="cpu", amp="auto", batch_size=64):
    """Each image decoded once -> {(backbone name, px): (n, D) float32 embeddings on the CPU}."""
    out = {(name, px): [] for name in backbones for px in resolutions}
    start = shown = time.time()
    with ThreadPoolExecutor(4) as pool, autocast(device, amp):
        for i in range(0, len(sources), batch_size):
            chunk = sources[i:i + batch_size]
            images = to_input(torch.stack(list(pool.map(read_image, chunk))), device)
            for px in resolutions:
                degraded = degrade(images, px)
                for name, backbone in backbones.items():
                    out[name, px].append(embed(backbone, degraded, flip).cpu())
            done, now = i + len(chunk), time.time()
            if now - shown > 5 or done == len(sources) and now - start > 5:
                shown, rate = now, done / (now - start)
                print(f"embedded {done:,}/{len(sources):,} images at {len(resolutions)} resolutions, "
                      f"{rate:.0f}/s, {clock((len(sources) - done) / rate)} left", flush=True)
    return {key: torch.cat(parts) for key, parts in out.items()}


def verify(backbones, pairs, resolutions, flip="sum", device="cpu", amp="auto", batch_size=64):
    """Rows of results, one per resolution and backbone. backbones: {name: module in eval mode}."""
    wanted = sorted(set(resolutions) | {SIZE})
    embeddings = embed_sources(backbones, pairs.sources, wanted, flip, device, amp, batch_size)
    rows = []
    for px in resolutions:
        for name in backbones:
            sharp, degraded = embeddings[name, SIZE], embeddings[name, px]
            row = {"set": pairs.name, "checkpoint": name, "px": px, "flip": flip, "pairs": len(pairs.same)}
            for kind, reference in (("both", degraded), ("cross", sharp)):
                scores = (reference[pairs.first] * degraded[pairs.second]).sum(1).double().numpy()
                accuracy, std, threshold = ten_folds(scores, pairs.same)
                row |= {f"{kind}_accuracy": accuracy, f"{kind}_std": std, f"{kind}_threshold": threshold,
                        f"{kind}_tar": tar_at_far(scores, pairs.same)}
            if pairs.identity is not None:
                row["rank1"] = rank_1(sharp, degraded, pairs.identity)
            rows.append(row)
    return rows


def print_table(rows):
    """One line per resolution and checkpoint, in per cent; the threshold is the cosine to accept from."""
    width = max(10, *(len(row["checkpoint"]) for row in rows))
    row = rows[0]
    print(f"\n{row['set']}: {row['pairs']:,} pairs, flip test {row['flip']}, accuracy (std) in % over ten folds")
    print(f"{'':>{width + 5}}  {'both degraded':^32}  {'sharp against degraded':^32}")
    columns = f"{'accuracy':>14} {'TAR@1e-3':>9} {'cos >=':>7}"
    print(f"{'px':>4} {'checkpoint':<{width}}  {columns}  {columns}  rank-1")
    for row in rows:
        cells = "  ".join(f"{100 * row[k + '_accuracy']:7.2f} ({100 * row[k + '_std']:4.2f}) "
                          f"{100 * row[k + '_tar']:9.2f} {row[k + '_threshold']:7.3f}" for k in ("both", "cross"))
        rank = f"{100 * row['rank1']:6.2f}" if "rank1" in row else "     -"
        print(f"{row['px']:4d} {row['checkpoint']:<{width}}  {cells}  {rank}")
    print(flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--lfw", metavar="DIR", required=True, help="folder with pairs.txt and the aligned images")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[7, 14, 20, 112], metavar="PX")
    parser.add_argument("--flip", choices=["sum", "concat", "none"], default="sum", help="flip test")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto")
    args = parser.parse_args(argv)
    keep_memory()
    backbones = {}
    for path in args.checkpoints:
        backbone = load_backbone(path).to(args.device, memory_format=torch.channels_last)
        backbones[path.removesuffix("/last.pt").removeprefix("runs/")] = backbone
    rows = verify(backbones, read_lfw(args.lfw), args.resolutions, args.flip, args.device, args.amp, args.batch_size)
    print_table(rows)
    if args.json:
        write_file(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
