# SPDX-License-Identifier: MIT
"""Low-resolution face verification and identification: python evaluate.py CHECKPOINT --lfw DIR

Verification: at each resolution with both images degraded (what the paper plots), and across, with
a sharp image against a degraded one (a passport photo against a camera). Identification: is the
nearest image of a sharp gallery the probe's person?"""
import argparse
import ctypes
import io
import itertools
import json
import os
import pickle
import re
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial

import numpy as np
import torch
from PIL import Image

from lrfr import degrade, embed, load_backbone, to_input

SIZE = 112  # height and width of an aligned face
RESOLUTIONS = [7, 14, 20, SIZE]  # to degrade faces to
MAX_PIXELS, Image.MAX_IMAGE_PIXELS = 50_000_000, None  # more may be a bomb; Pillow only warns

# ---- 1. Files -----------------------------------------------------------------------------------
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF")  # EPS would start Ghostscript
say_once = cache(partial(print, file=sys.stderr, flush=True))

def read_image(source, name=None):
    """A path, or the bytes of an image file -> uint8 RGB (3, 112, 112), or a ValueError."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode.startswith("I"):  # 16 bits, which convert would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        name, reason = name if isinstance(source, bytes) else source, getattr(error, "strerror", 0)
        raise ValueError(f"{name}: not a readable image ({reason or error})") from None
    if image.size != (SIZE, SIZE):
        say_once("some images are not 112 x 112: they are resized, and should show aligned faces")
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def no_bomb(path):
    """The path, if it is no zip file (each checkpoint is one) that unfolds to more than it has."""
    try:
        parts = zipfile.ZipFile(path).filelist if zipfile.is_zipfile(path) else []
        if parts and sum(part.file_size for part in parts) > os.path.getsize(path):
            raise ValueError("compressed, which no checkpoint is: it may be a bomb")
    except Exception as error:  # of several kinds
        raise ValueError(f"{path}: {error}") from None
    return path

def write_file(path, content, previous=None):
    """Writes bytes to a temporary file and moves it into place; the old one becomes `previous`."""
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)

# ---- 2. Benchmarks ------------------------------------------------------------------------------
@dataclass
class Benchmark:
    """Faces to verify (P pairs, in ten contiguous folds), to identify (a gallery), or both."""
    name: str
    sources: list  # of n images: paths, or the bytes of image files
    pairs: tuple | None = None  # (P,) index of one image, (P,) of the other, (P,) bool: one person
    identity: np.ndarray | None = None  # (n,) whose face it is, -1: nobody's
    gallery: np.ndarray | None = None  # indices of images
    probes: dict = field(default_factory=dict)  # {name of a set of probes: indices of images}

def verification(name, sources, first, second, same, identity=None):
    """The benchmark of these pairs. Its gallery: one image of each person, where that is known."""
    same = np.asarray(same, bool)
    if len(same) < 10:
        raise ValueError(f"{name}: {len(same)} pairs; ten folds take at least ten")
    data = Benchmark(os.path.basename(name).removesuffix(".bin"), sources, (first, second, same))
    if identity is not None:
        data.identity, data.gallery = identity, np.unique(identity, return_index=True)[1]
        data.probes = {"": np.setdiff1d(np.arange(len(identity)), data.gallery)}
    return data

def read_lfw(root, file="pairs.txt"):
    """LFW (or XQLFW): `root`/`file` lists pairs, `root`/Name/Name_0001.jpg are aligned images."""
    path, index, pairs = os.path.join(root, file), {}, []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for count, line in enumerate(lines, 1):
            pair = re.fullmatch(r"\s*(\S+)\s+([0-9]{1,8})\s+(?:(\S+)\s+)?([0-9]{1,8})\s*", line)
            if not pair:
                if len(line.split()) <= 2 and (count == 1 or not line.strip()):
                    continue  # the header: folds, and pairs of a kind per fold
                raise ValueError(f"{path}, line {count}: not a pair: {line.strip()[:80]!r}")
            for name, i in ((pair[1], pair[2]), (pair[3] or pair[1], pair[4])):
                image = os.path.join(root, name, f"{name}_{int(i):04d}.jpg")
                if image not in index and not os.path.isfile(image):
                    raise ValueError(f"{path}, line {count}: {image[:200]} is missing")
                pairs.append(index.setdefault(image, len(index)))
    identity = np.unique([os.path.basename(os.path.dirname(image)) for image in index],
                         return_inverse=True)[1].astype(int)
    first, second = np.array(pairs, int).reshape(-1, 2).T
    data = verification(path, [*index], first, second, identity[first] == identity[second],
                        identity)
    data.name = "LFW" if file == "pairs.txt" else "XQLFW"
    return data

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
        reason = str(error)[:60] or type(error).__name__
        raise ValueError(f"{path}: not a .bin: stops at, or asks for, {reason}") from None
    if len(images) != 2 * len(same):
        raise ValueError(f"{path}: {len(images)} images for {len(same)} pairs")
    return verification(path, images, *np.arange(len(images)).reshape(-1, 2).T, same)

def images_below(root):
    """Paths of the images in a folder, however deep, sorted; aligned or cropped ones come first."""
    paths = [os.path.join(folder, file) for folder, _, files in os.walk(root) for file in files
             if file.lower().endswith((".jpg", ".jpeg", ".png", ".bmp"))]
    return sorted(paths, key=lambda path: (not re.search("align|crop", path.lower()), path))

def read_scface(root, subjects="all"):
    """SCface: 001_frontal.jpg; 001_cam1_1.jpg is subject, camera 1..5, distance 4.2, 2.6 or 1.0 m.

    subjects: "all" 130, or "test", the 80 from 051 on (050 and below are for fine-tuning).
    """
    found = {}  # {(subject, distance, camera): path}; 0 and 0 for a mugshot
    for path in images_below(root):
        stem = os.path.splitext(os.path.basename(path))[0].lower()
        parts = re.fullmatch("([0-9]{3})_(?:frontal|cam([1-5])_([123]))", stem)
        if parts and (subjects == "all" or int(parts[1]) > 50):
            found.setdefault((int(parts[1]), int(parts[3] or 0), int(parts[2] or 0)), path)
    person, distance, _ = np.array(list(found), int).reshape(-1, 3).T
    known, seen = set(person[distance == 0]), set(person[distance > 0])
    if not known or known != seen:
        lacking = min(known ^ seen, default=1)
        raise ValueError(f"{root}: subject {lacking:03d} has no mugshot ({lacking:03d}_frontal.jpg)"
                         f" or no surveillance image ({lacking:03d}_cam1_1.jpg)")
    return Benchmark(f"SCface, {len(known)} subjects ({subjects})", list(found.values()), None,
                     person, np.flatnonzero(distance == 0),
                     {f"d{d}": np.flatnonzero(distance == d) for d in (1, 2, 3) if d in distance})

def read_tinyface(root):
    """TinyFace: Testing_Set/{Probe,Gallery_Match,Gallery_Distractor}; 12_3.jpg is person 12."""
    root = next(filter(os.path.isdir, [os.path.join(root, "Testing_Set")]), root)
    folders = [images_below(os.path.join(root, name)) for name in (
        "Probe", "Gallery_Match", "Gallery_Distractor")]
    probe, match, distractors = map(len, folders)
    if not probe or not match:
        raise ValueError(f"{root}: {probe} images in Probe and {match} in Gallery_Match")
    paths = list(itertools.chain(*folders))
    people = [os.path.basename(path).split("_")[0] for path in paths[:probe + match]]
    identity = np.append(np.unique(people, return_inverse=True)[1], np.full(distractors, -1))
    note = f"{distractors:,} distractors" if distractors else "WITHOUT its distractors"
    return Benchmark(f"TinyFace, {note}", paths, None, identity, np.arange(probe, len(paths)),
                     {"probes": np.arange(probe)})

def make_pairs(name, sources, labels, limit=3000):
    """A benchmark of labelled images: up to `limit` pairs of one person and as many of two."""
    rng, labels = np.random.default_rng(0), np.asarray(labels)
    some = np.sort(rng.permutation(len(labels))[:4000])  # of them there are 8 million pairs
    first, second = np.triu_indices(len(some), 1)
    same = labels[some][first] == labels[some][second]
    count = min(limit, same.sum(), (~same).sum()) // 5 * 5
    chosen = np.stack([rng.choice(np.flatnonzero(same == kind), count, replace=False)
                       for kind in (True, False)], 1).ravel()  # in turn, so that folds have both
    return verification(name, [sources[i] for i in some], first[chosen], second[chosen],
                        same[chosen], labels[some])

# ---- 3. Scores ----------------------------------------------------------------------------------
GRID = np.linspace(-1, 1, 401)

def ten_folds(scores, same):
    """Cosines and truth of P pairs -> accuracy, its standard deviation over folds, mean threshold:
    in each fold the best of the other nine, of equals the highest, as in the official code."""
    right = np.stack([(scores >= threshold) == same for threshold in GRID])  # (thresholds, P)
    accuracies, thresholds = [], []
    for fold in np.array_split(np.arange(len(scores)), 10):
        others = right.sum(1) - right[:, fold].sum(1)
        best = len(GRID) - 1 - np.argmax(others[::-1])  # of equals the highest
        accuracies.append(right[best, fold].mean())
        thresholds.append(GRID[best])
    return tuple(map(float, (np.mean(accuracies), np.std(accuracies), np.mean(thresholds))))

def tar_at_far(scores, same, far=1e-3):
    """Share of the genuine pairs above the score that a share `far` of the impostors passes."""
    if same.all() or not same.any():
        return None
    impostors = np.sort(scores[~same])[::-1]
    return float((scores[same] > impostors[int(far * len(impostors))]).mean())

def ranks(gallery, gallery_identity, probes, probe_identity, block=64):
    """Unit embeddings, gallery (G, D), probes (n, D) -> (n,) rank, from 1, of the first gallery
    image of each probe's person; a huge one if none. Blocks of probes keep the memory small."""
    gallery_identity, found = torch.as_tensor(gallery_identity), []
    for part, who in zip(probes.split(block), torch.as_tensor(probe_identity).split(block),
                         strict=True):
        cosines = part @ gallery.T
        mates = who[:, None] == gallery_identity
        best = cosines.masked_fill(~mates, -2).amax(1, keepdim=True)
        rank = 1 + ((cosines >= best) & ~mates).sum(1)  # of equals the stranger comes first
        found.append(torch.where(mates.any(1), rank, 2**31))
    return torch.cat(found).numpy()

# ---- 4. Running a backbone ----------------------------------------------------------------------
def keep_memory():
    """Tells glibc to keep what is freed: on CPUs page faults cost half the time otherwise."""
    with suppress(OSError, AttributeError, TypeError):  # not glibc: nothing to tell
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # mmap max, trim and top pad
            ctypes.CDLL(None).mallopt(option, value)

def precision(device, amp):
    """The dtype of a backbone, None for float32; amp: "auto" (what the device is fast at) ..."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif amp == "auto" and device.type == "cpu":
        amp = "bf16" if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

def autocast(device, amp):
    """Autocast round a backbone, to its precision."""
    return torch.autocast(device.type, dtype := precision(device, amp), enabled=dtype is not None)

def embed_sources(backbones, name, sources, resolutions, device, amp, flip, batch_size):
    """Each image decoded once -> {(backbone name, px): (n, D) float32 embeddings on the CPU}."""
    out, start = {}, time.time()
    names, shown = [f"{name}, image {i}" for i in range(len(sources))], start
    with ThreadPoolExecutor(4) as pool, autocast(device, amp):
        for i in range(0, len(sources), batch_size):
            part = slice(i, i + batch_size)
            images = [*pool.map(read_image, sources[part], names[part])]
            images = to_input(torch.stack(images), device)
            for px in resolutions:
                degraded = degrade(images, px)
                for key, backbone in backbones.items():
                    embeddings = embed(backbone, degraded, flip).cpu()
                    out.setdefault((key, px), torch.empty(len(sources), embeddings.shape[1]))
                    out[key, px][part] = embeddings
            done, now = i + len(images), time.time()
            if now - shown > 5 or done == len(sources) and now - start > 5:
                shown, rate = now, done / (now - start)
                left = timedelta(0, (len(sources) - done) // rate)
                print(f"{name}: {done:,} of {len(sources):,} images at {resolutions} px, "
                      f"{rate:.0f}/s, {left} left", flush=True)
    return out

def evaluate(backbones, data, resolutions, device, amp, flip="sum", batch_size=64):
    """{name: backbone in eval mode} on a Benchmark -> rows of results, ready for JSON; pairs are
    degraded to each of `resolutions`, a benchmark without pairs is taken as it is."""
    resolutions = resolutions if data.pairs else [SIZE]
    embeddings = embed_sources(backbones, data.name, data.sources, sorted({*resolutions, SIZE}),
                               device, amp, flip, batch_size)
    rows = []
    for px, name in itertools.product(resolutions, backbones):
        sharp, degraded = embeddings[name, SIZE], embeddings[name, px]
        row = {"set": data.name, "checkpoint": name, "px": px, "flip": flip}
        if data.pairs:
            first, second, same = data.pairs
            row["pairs"] = len(same)
            for way, other in (("both", degraded), ("cross", sharp)):
                scores = (other[first] * degraded[second]).sum(1).double().numpy()
                row |= zip([f"{way}_{key}" for key in ("accuracy", "std", "threshold", "tar")],
                           [*ten_folds(scores, same), tar_at_far(scores, same)], strict=True)
        cmcs = {}  # share of the probes whose person is among the k nearest, k = 1 .. 50
        for part, probes in data.probes.items():
            found = ranks(sharp[data.gallery], data.identity[data.gallery], degraded[probes],
                          data.identity[probes])
            cmcs[part] = [float((found <= k).mean()) for k in range(1, 51)]
        if len(cmcs) > 1:
            cmcs["average"] = np.mean(list(cmcs.values()), 0).tolist()
        for part, cmc in cmcs.items():
            probes = len(data.probes.get(part, ())) or ""
            rows.append(row | {"part": part, "gallery": len(data.gallery), "probes": probes,
                               "rank1": cmc[0], "rank5": cmc[4], "rank20": cmc[19], "cmc": cmc})
        rows += [] if cmcs else [row]
    return rows

COLUMNS = {"px": "px", "checkpoint": "checkpoint", "both_accuracy": "both", "both_std": "std",
           "both_tar": "TAR", "both_threshold": "cos >=", "cross_accuracy": "cross",
           "cross_std": "std", "cross_tar": "TAR", "cross_threshold": "cos >=", "part": "part",
           "probes": "probes", "rank1": "rank-1", "rank5": "rank-5", "rank20": "rank-20"}

def table(rows):
    """Rows as a text; `both` images degraded, `cross`: a sharp one against a degraded one."""
    keys = [key for key in COLUMNS if rows[0].get(key, "") != ""]
    lines = [[COLUMNS[key] for key in keys]]
    for row in rows:
        lines.append([f"{row[key]:.3f}" if key.endswith("threshold") else f"{100 * row[key]:.2f}"
                      if isinstance(row[key], float) else str(row[key] or "-") for key in keys])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join([
        f"\n{rows[0]['set']}, flip test {rows[0]['flip']}; accuracy, its std over ten folds, TAR "
        "at FAR 1e-3\nand ranks in %; cos >= is the threshold to accept from",
        *("  ".join(map(str.rjust, line, widths)) for line in lines), ""])

# ---- 5. Command line ----------------------------------------------------------------------------
def number(kind, low, high=1e9):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse

def device(text):
    """An argparse type: a torch.device that this machine has."""
    try:
        torch.zeros(1, device=text).cpu()
        return torch.device(text)
    except (RuntimeError, AssertionError, ImportError):
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
    except torch.OutOfMemoryError:
        return "error: out of GPU memory: try a smaller --batch-size"
    except (OSError, ValueError, KeyboardInterrupt) as error:
        named = getattr(error, "filename", None)
        text = f"{named}: {error.strerror}" if named else str(error) or "interrupted"
        return "error: " + " ".join(text.split())  # one line, whatever names of files hold

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
    add("--resolutions", type=number(int, 1, SIZE), nargs="+", default=RESOLUTIONS, metavar="PX",
        help="to degrade pairs to, in pixels")
    add("--flip", choices=["sum", "concat", "none"], default="sum", help="test of mirrored images")
    add("--json", metavar="FILE", help="write the results here too")
    add("--batch-size", type=number(int, 1), default=64, help="images at a time")
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.json and not os.access(os.path.dirname(os.path.abspath(args.json)), os.W_OK):
        parser.error(f"--json {args.json}: its folder cannot be written to")
    sets = [(read_lfw, args.lfw), *((read_bin, path) for path in args.bin),
            (partial(read_lfw, file="xqlfw_pairs.txt"), args.xqlfw),
            (partial(read_scface, subjects=args.scface_subjects), args.scface),
            (read_tinyface, args.tinyface)]
    sets = [read(path) for read, path in sets if path]
    if not sets and len(args.match or []) < 2:
        parser.error("nothing to do: give --lfw, --xqlfw, --bin, --scface, --tinyface, --match A B")
    keep_memory()
    rows, backbones = [], {path: load_backbone(no_bomb(path)).to(
        args.device, memory_format=torch.channels_last) for path in args.checkpoints}
    options = args.device, args.amp, args.flip, args.batch_size
    if args.match:
        print("cosine similarities of what should be faces aligned to ArcFace's 112 x 112 template")
        embeddings = embed_sources(backbones, "--match", args.match, [SIZE], *options)
        for name, (i, a), (j, b) in ((name, *two) for name in backbones for two in
                                     itertools.combinations(enumerate(args.match), 2)):
            cosine = float(embeddings[name, SIZE][i] @ embeddings[name, SIZE][j])
            rows.append({"checkpoint": name, "match": [a, b], "cosine": cosine})
            print(f"{cosine:7.3f}  {a}  {b}  {name}")
    for data in sets:
        rows += (new := evaluate(backbones, data, args.resolutions, *options))
        print(table(new), flush=True)
    if args.json:
        write_file(args.json, json.dumps(rows, indent=1).encode())

if __name__ == "__main__":
    sys.exit(run(main))
