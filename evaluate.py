# SPDX-License-Identifier: MIT
"""Low-resolution face verification and identification: python evaluate.py CHECKPOINT --lfw DIR

Verification is run at each resolution in two ways: both images degraded (what the paper plots), and
sharp against degraded (a passport photo against a camera), in ten folds; the threshold
of a fold is the best of the other nine on the grid -1, -0.995 .. 1 of cosines, the highest of
equals, as in the official code. Identification: rank-1, one sharp image per person in the gallery.
"""
import argparse
import ctypes
import io
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from PIL import Image

from lrfr import degrade, embed, load_backbone

SIZE = 112  # height and width of an aligned face
MAX_PIXELS = 50_000_000  # of an image; a larger one may be a decompression bomb
Image.MAX_IMAGE_PIXELS = None  # Pillow only warns, up to twice its own limit

# ---- 1. Files -----------------------------------------------------------------------------------


@cache
def say_once(text):
    print(text, file=sys.stderr, flush=True)


def read_image(source, name=None):
    """A path, or the bytes of an image file -> uint8 RGB (3, 112, 112), or a ValueError."""
    name, file = (name, io.BytesIO(source)) if isinstance(source, bytes) else (source, source)
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode.startswith("I"):  # 16 bits, which convert would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{name}: not a readable image ({reason})") from None
    if image.size != (SIZE, SIZE):
        say_once("some images are not 112 x 112: they are resized, and should show aligned faces")
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_input(images, device):
    """uint8 images -> what a backbone takes: float in [-1, 1], channels last, on the device."""
    images = images.to(device, non_blocking=True).float() / 127.5 - 1  # (v / 255 - .5) / .5
    return images.contiguous(memory_format=torch.channels_last)


def write_file(path, content, previous=None):
    """Writes bytes to a temporary file and moves it into place; the old one becomes `previous`."""
    temporary = f"{path}.{os.getpid()}"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from None
        raise


# ---- 2. Protocols -------------------------------------------------------------------------------


@dataclass
class Pairs:
    """A verification set of P pairs, in ten contiguous folds."""

    name: str
    sources: list  # of images: paths, or the bytes of image files
    first: np.ndarray  # (P,) index of the first image of a pair
    second: np.ndarray  # (P,)
    same: np.ndarray  # (P,) bool: one person, or two
    identity: np.ndarray | None = None  # (len(sources),) whose face it is, where that is known


NUMBERS = re.compile("[0-9]{1,8} [0-9]{1,8}")


def read_lfw(root, file="pairs.txt"):
    """LFW (or XQLFW): `root`/`file` lists pairs, `root`/Name/Name_0001.jpg are aligned images."""
    path, index, pairs = os.path.join(root, file), {}, []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for count, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) <= 2 and (count == 1 or not fields):
                continue  # the header: folds, and pairs of a kind per fold
            if len(fields) == 3:
                fields.insert(2, fields[0])  # one person, two images
            if len(fields) != 4 or not NUMBERS.fullmatch(" ".join(fields[1::2])):
                raise ValueError(f"{path}, line {count}: not a pair: {line.strip()[:80]!r}")
            images = [os.path.join(root, name, f"{name}_{int(i):04d}.jpg")
                      for name, i in (fields[:2], fields[2:])]
            for image in images:
                if image not in index and ("\0" in image or not os.path.isfile(image)):
                    raise ValueError(f"{path}, line {count}: {image[:200]} is missing")
            pairs += [index.setdefault(image, len(index)) for image in images]
    people = [os.path.basename(os.path.dirname(image)) for image in index]
    identity = np.unique(people, return_inverse=True)[1]
    first, second = np.array(pairs, int).reshape(-1, 2).T
    same = identity[first] == identity[second] if pairs else []
    name = "LFW" if file == "pairs.txt" else "XQLFW"
    return checked(Pairs(name, list(index), first, second, same, identity), path)


def checked(pairs, path):
    """The same pairs, if they can make ten folds."""
    pairs.same = np.asarray(pairs.same, bool)
    if len(pairs.same) < 10:
        raise ValueError(f"{path}: {len(pairs.same)} pairs; ten folds take at least ten")
    return pairs


BIN_CALLS = {  # what a .bin may call, and the harmless functions that it gets instead
    "_codecs.encode": lambda text, *_: text.encode("latin1"),  # how protocol 2 writes bytes
    "numpy.core.multiarray._reconstruct": lambda *_: np.ndarray(0, np.uint8),
    "numpy.core.multiarray.scalar": lambda dtype, content: any(content),
    "numpy.core.numeric._frombuffer": lambda content, *_: np.frombuffer(content, np.uint8),
    "numpy.dtype": lambda code, *_: np.dtype({"u1": "u1", "b1": "b1"}[
        code.decode() if isinstance(code, bytes) else code]),
    "numpy.ndarray": None}


class BinUnpickler(pickle._Unpickler):
    """Calls nothing but BIN_CALLS. (The unpickler in C takes whatever memory a file asks for.)"""

    def find_class(self, module, name):
        return BIN_CALLS[f"{module}.{name}".replace("numpy._core", "numpy.core")]


def read_bin(path):
    """InsightFace's .bin: a pickle of (images, issame); pair i is images 2 i and 2 i + 1."""
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        images, same = BinUnpickler(content, encoding="bytes").load()
        images = [image if isinstance(image, bytes) else image.tobytes() for image in images]
        same = [bool(value) for value in same]
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        raise ValueError(f"{path}: not a .bin of InsightFace: it stops at, or asks for, "
                         f"{str(error)[:100] or type(error).__name__}") from None
    if len(images) != 2 * len(same):
        raise ValueError(f"{path}: {len(images)} images for {len(same)} pairs")
    name, even = os.path.basename(path).removesuffix(".bin"), np.arange(0, len(images), 2)
    return checked(Pairs(name, images, even, even + 1, same), path)


@dataclass
class Search:
    """An identification set: whose is each probe? All images by path, native resolution."""

    name: str
    gallery: list
    gallery_identity: np.ndarray  # (G,)
    probes: dict  # {name of a probe set: (paths, (n,) identities)}


def images_below(root):
    """Paths of the images in a folder, however deep, sorted; aligned or cropped ones come first."""
    paths = [os.path.join(folder, file) for folder, _, files in os.walk(root) for file in files
             if file.lower().endswith((".jpg", ".jpeg", ".png", ".bmp"))]
    return sorted(paths, key=lambda path: (not re.search("align|crop", path.lower()), path))


def read_scface(root, subjects="all"):
    """SCface: 001_frontal.jpg; 001_cam1_1.jpg is subject, camera 1..5, distance 4.2, 2.6 or 1.0 m.

    subjects: "all" 130, or "test", the 80 from 051 on (050 and below are for fine-tuning).
    """
    found = {"frontal": {}, "1": {}, "2": {}, "3": {}}  # {distance: {(subject, camera): path}}
    for path in images_below(root):
        name = os.path.splitext(os.path.basename(path))[0].lower()
        parts = re.fullmatch("([0-9]{3})_(frontal|cam([1-5])_([123]))", name)
        if parts and (subjects == "all" or int(parts[1]) > 50):
            found[parts[4] or "frontal"].setdefault((int(parts[1]), parts[3]), path)
    mugshots = found.pop("frontal")
    known, seen = {who for who, _ in mugshots}, {who for keys in found.values() for who, _ in keys}
    if not known or known != seen:
        person = min(known ^ seen, default=1)
        raise ValueError(f"{root}: subject {person:03d} has no " + (
            f"surveillance image ({person:03d}_cam1_1.jpg)" if person in known else
            f"mugshot ({person:03d}_frontal.jpg)"))
    probes = {f"d{d}": (list(images.values()), np.array([person for person, _ in images]))
              for d, images in found.items() if images}
    return Search(f"SCface, {len(known)} subjects ({subjects})", list(mugshots.values()),
                  np.array([person for person, _ in mugshots]), probes)


def read_tinyface(root):
    """TinyFace: Testing_Set/{Probe,Gallery_Match,Gallery_Distractor}; 12_3.jpg is person 12."""
    inner = os.path.join(root, "Testing_Set")
    root = inner if os.path.isdir(inner) else root
    probe, match, distractors = (images_below(os.path.join(root, name)) for name in (
        "Probe", "Gallery_Match", "Gallery_Distractor"))
    if not probe or not match:
        raise ValueError(f"{root}: {len(probe)} images in Probe and {len(match)} in Gallery_Match")
    _, people = np.unique([os.path.basename(path).split("_")[0] for path in match + probe],
                          return_inverse=True)
    nobody = np.full(len(distractors), -1)
    note = f"{len(distractors):,} distractors" if distractors else "WITHOUT its distractors"
    return Search(f"TinyFace, {note}", match + distractors, np.concatenate(
        [people[:len(match)], nobody]), {"probes": (probe, people[len(match):])})


def make_pairs(name, sources, labels, limit=3000, seed=0):
    """Pairs of labelled images: up to `limit` of one person and as many of two, taking turns."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    some = np.sort(rng.permutation(len(labels))[:4000])  # of them there are 8 million pairs
    sources, labels = sources[some], labels[some]
    first, second = np.triu_indices(len(labels), 1)
    same = labels[first] == labels[second]
    count = min(limit, same.sum(), (~same).sum()) // 10 * 10
    if not count:
        raise ValueError(f"{name}: too few images to make ten folds of pairs; --holdout 0 does "
                         "without")
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
    if same.all() or not same.any():
        return math.nan
    impostors = np.sort(scores[~same])[::-1]
    return (scores[same] > impostors[int(far * len(impostors))]).mean()


def ranks(gallery, gallery_identity, probes, probe_identity, block=256):
    """(n,) rank, from 1, of the first gallery image of each probe's person; a huge one if none.

    gallery (G, D), probes (n, D): unit embeddings. Blocks of probes keep the memory small.
    """
    gallery_identity, found = torch.as_tensor(gallery_identity), []
    for part, who in zip(probes.split(block), torch.as_tensor(probe_identity).split(block),
                         strict=True):
        cosines = part @ gallery.T
        mates = who[:, None] == gallery_identity
        best = cosines.masked_fill(~mates, -2).amax(1, keepdim=True)
        rank = 1 + ((cosines >= best) & ~mates).sum(1)  # of equals the stranger comes first
        found.append(torch.where(mates.any(1), rank, 2**31))
    return torch.cat(found).numpy()


def rank_1(gallery, probes, identity):
    """Share of the probes whose nearest gallery image is of the same person.

    gallery, probes: (n, D) unit embeddings of the same n images, sharp and degraded; identity: (n,)
    whose. The first image of each person is in the gallery, every other one is a probe.
    """
    first = np.unique(identity, return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(identity)), first)
    return (ranks(gallery[first], identity[first], probes[rest], identity[rest]) == 1).mean()


# ---- 3. Running a backbone ----------------------------------------------------------------------


def keep_memory():
    """Tells glibc to keep what is freed: on CPUs page faults cost half the time otherwise."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc: nothing to tell
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap max, trim and top pad
        mallopt(option, value)


def precision(device, amp):
    """The dtype for a backbone; amp: "auto" (the device's fast one), "bf16", "fp16" or "off"."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif amp == "auto":
        fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        amp = "bf16" if fast else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def autocast(device, amp):
    """Autocast round a backbone, to its precision."""
    dtype = precision(device, amp)
    return torch.autocast(device.type, dtype if dtype != torch.float32 else torch.bfloat16,
                          enabled=dtype != torch.float32)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def embed_sources(backbones, name, sources, resolutions, flip, device, amp, batch_size):
    """Each image decoded once -> {(backbone name, px): (n, D) float32 embeddings on the CPU}."""
    out, start = {}, time.time()
    names, shown = [f"{name}, image {i}" for i in range(len(sources))], start
    with ThreadPoolExecutor(4) as pool, autocast(device, amp):
        for i in range(0, len(sources), batch_size):
            chunk = slice(i, i + batch_size)
            images = torch.stack(list(pool.map(read_image, sources[chunk], names[chunk])))
            images = to_input(images, device)
            for px in resolutions:
                degraded = degrade(images, px)
                for key, backbone in backbones.items():
                    embeddings = embed(backbone, degraded, flip).cpu()
                    if i == 0:
                        out[key, px] = torch.empty(len(sources), embeddings.shape[1])
                    out[key, px][chunk] = embeddings
            done, now = i + len(images), time.time()
            if now - shown > 5 or done == len(sources) and now - start > 5:
                shown, rate = now, done / (now - start)
                print(f"{name}: {done:,} of {len(sources):,} images, {len(resolutions)} "
                      f"resolution{'s' * (len(resolutions) > 1)}, {rate:.0f}/s, "
                      f"{clock((len(sources) - done) / rate)} left", flush=True)
    return out


def verify(backbones, pairs, resolutions, flip, device, amp, batch_size=64):
    """{name: backbone in eval mode} -> a dict of results for each resolution and backbone."""
    wanted = sorted({*resolutions, SIZE})
    embeddings = embed_sources(backbones, pairs.name, pairs.sources, wanted, flip, device, amp,
                               batch_size)
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


def identify(backbones, search, flip, device, amp, batch_size=64):
    """{name: backbone in eval mode} -> a dict of results for each backbone and probe set."""
    rows, parts = [], [search.gallery, *(paths for paths, _ in search.probes.values())]
    embeddings = embed_sources(backbones, search.name, list(itertools.chain(*parts)), [SIZE], flip,
                               device, amp, batch_size)
    for name in backbones:
        gallery, *probes = embeddings[name, SIZE].split([len(part) for part in parts])
        for (key, (_, identity)), probe in zip(search.probes.items(), probes, strict=True):
            found = ranks(gallery, search.gallery_identity, probe, identity)
            rows.append({"set": search.name, "checkpoint": name, "probe_set": key, "flip": flip,
                         "gallery": len(gallery), "probes": len(probe),
                         "cmc": [float((found <= rank).mean()) for rank in range(1, 51)]})
    return rows


def print_search(rows):
    """One line per checkpoint and probe set, rank-1, 5 and 20 in %, and the average of rank-1."""
    wide, row = max(10, *(len(row["checkpoint"]) for row in rows)), rows[0]
    print(f"\n{row['set']}: gallery of {row['gallery']:,} images, flip test {row['flip']}, in %;\n"
          "images as they lie there: another alignment moves these numbers by tens of points")
    print(f"{'checkpoint':{wide}}     part  probes  rank-1  rank-5 rank-20")
    for name, own in itertools.groupby(rows, lambda row: row["checkpoint"]):
        rank1 = []
        for row in own:
            rank1.append(100 * row["cmc"][0])
            print(f"{name:{wide}} {row['probe_set']:>8} {row['probes']:7,} {rank1[-1]:7.2f} "
                  f"{100 * row['cmc'][4]:7.2f} {100 * row['cmc'][19]:7.2f}")
        if len(rank1) > 1:
            print(f"{name:{wide}} {'average':>8} {'':7} {sum(rank1) / len(rank1):7.2f}")
    print(flush=True)


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


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: at least {low}" + (
                f" and at most {high}" if high < math.inf else "") + " is needed")
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
    except ValueError as error:
        return f"error: {error}"
    except torch.OutOfMemoryError:
        return "error: out of GPU memory: try a smaller --batch-size"
    except KeyboardInterrupt:
        return "error: interrupted"
    except OSError as error:
        return f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="of train.py, or InsightFace weights")
    add("--lfw", metavar="DIR", help="folder with pairs.txt and the aligned images")
    add("--xqlfw", metavar="DIR", help="folder with xqlfw_pairs.txt and the aligned images")
    add("--bin", metavar="FILE", nargs="+", default=[], help="verification sets of InsightFace")
    add("--scface", metavar="DIR", help="folder with mugshots and surveillance images")
    add("--scface-subjects", choices=["all", "test"], default="all", help="130, or 051 to 130")
    add("--tinyface", metavar="DIR", help="TinyFace, or its Testing_Set")
    add("--match", metavar="IMAGE", nargs="+", help="cosine similarities of aligned faces")
    add("--resolutions", type=number(int, 1, SIZE), nargs="+", default=[7, 14, 20, SIZE],
        metavar="PX", help="to degrade verification sets to, in pixels")
    add("--flip", choices=["sum", "concat", "none"], default="sum",
        help="what the mirrored image adds to an embedding")
    add("--json", metavar="FILE", help="write the results here too")
    add("--batch-size", type=number(int, 1), default=64, help="images at a time")
    add_device_options(parser)
    args = parser.parse_args(argv)
    sets = [(read_lfw, args.lfw), *((read_bin, path) for path in args.bin),
            (partial(read_lfw, file="xqlfw_pairs.txt"), args.xqlfw),
            (partial(read_scface, subjects=args.scface_subjects), args.scface),
            (read_tinyface, args.tinyface)]
    sets = [read(path) for read, path in sets if path]
    if not sets and not args.match:
        parser.error("nothing to do: give --lfw, --xqlfw, --bin, --scface, --tinyface or --match")
    keep_memory()
    backbones, rows = {}, []
    for path in args.checkpoints:
        backbone = load_backbone(path).to(args.device, memory_format=torch.channels_last)
        name = os.path.basename(os.path.dirname(path)) if path.endswith("last.pt") else path
        backbones[path if name in backbones else name] = backbone
    options = args.flip, args.device, args.amp, args.batch_size
    if args.match:
        print("cosine similarities of what should be faces aligned to ArcFace's 112 x 112 template")
        embeddings = embed_sources(backbones, "--match", args.match, [SIZE], *options)
        for name in backbones:
            cosines = embeddings[name, SIZE] @ embeddings[name, SIZE].T
            for (i, a), (j, b) in itertools.combinations(enumerate(args.match), 2):
                print(f"{cosines[i, j]:7.3f}  {a}  {b}  {name}")
    for data in sets:
        if isinstance(data, Pairs):
            print_table(new := verify(backbones, data, args.resolutions, *options))
        else:
            print_search(new := identify(backbones, data, *options))
        rows += new
    if args.json:
        write_file(args.json, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    sys.exit(run(main))
