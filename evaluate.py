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
import warnings
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets.folder import ImageFolder, is_image_file

from lrfr import ArcFace, degrade, embed, load_backbone, logexp_grad, to_input

SIZE = 112  # height and width of an aligned face
BATCH = 64  # images at a time
RESOLUTIONS = [7, 14, 20, SIZE]  # to degrade faces to
Image.MAX_IMAGE_PIXELS = 25_000_000  # Pillow refuses twice as many: they may be a bomb
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

# ---- 1. Files -----------------------------------------------------------------------------------
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF")  # EPS would start Ghostscript
say_once = cache(partial(print, file=sys.stderr, flush=True))

@contextmanager
def naming(what):
    """What a hostile file or a full disk leads to becomes a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:  # of a dozen kinds
        reason = getattr(error, "strerror", None) or str(error).split(" <")[0]  # no address
        raise ValueError(f"{what}: {reason[:200] or type(error).__name__}") from error

def read_image(source, name=None):
    """A path, or the bytes of an image file -> uint8 RGB (3, 112, 112), or a ValueError."""
    file, name = (io.BytesIO(source), name) if isinstance(source, bytes) else (source, source)
    with naming(f"{name}: not a readable image"), Image.open(file, formats=FORMATS) as image:
        if image.mode.startswith("I"):  # 16 bits, which convert would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        say_once("some images are not 112 x 112: they are resized, and should show aligned faces")
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def image_folder(root):
    """`root`/identity/image.jpg (or .png ...) -> paths (n,) and labels (n,), in sorted order."""
    some = any(entry.is_dir() for entry in os.scandir(root))
    samples = ImageFolder(root, allow_empty=True).samples if some else []
    labels = np.unique([label for _, label in samples], return_inverse=True)[1]
    return np.array([path for path, _ in samples], object), labels

def no_bomb(path):
    """The path, unless it is a zip file (each checkpoint is one) that unfolds to more than that."""
    with naming(path):
        parts = zipfile.ZipFile(path).filelist if zipfile.is_zipfile(path) else []
        if parts and sum(part.file_size for part in parts) > os.path.getsize(path):
            raise ValueError("compressed, which no checkpoint is: it may be a bomb")
    return path

def write_file(path, content, previous=None):
    """Writes bytes to a temporary file and moves it into place; the old one becomes `previous`."""
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous and os.path.exists(path):
                os.replace(path, previous)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

# ---- 2. Benchmarks ------------------------------------------------------------------------------
@dataclass
class Benchmark:
    """Faces to verify (P pairs, in ten contiguous folds), to identify (a gallery), or both."""
    name: str
    sources: list  # of n images: paths, or the bytes of image files
    pairs: tuple = ()  # (P,) index of one image, (P,) of the other, (P,) bool: one person
    identity: np.ndarray = ()  # (n,) whose face it is, -1: nobody's; (), if unknown
    part: np.ndarray = ()  # (n,) "gallery", or a name of probes; (): gallery is each person's first

    def __post_init__(self):
        if self.pairs and len(self.pairs[2]) < 10:
            raise ValueError(f"{self.name}: {len(self.pairs[2])} pairs; ten folds take ten or more")
        if len(self.part) < len(self.identity):  # of each person the first image is the gallery
            self.part = np.full(len(self.identity), "", "<U7")
            self.part[np.unique(self.identity, return_index=True)[1]] = "gallery"

def read_lfw(root, name="LFW", file="pairs.txt"):
    """LFW (or XQLFW): `root`/`file` lists pairs, `root`/Name/Name_0001.jpg are aligned images."""
    path, index, pairs = Path(root, file), {}, []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        if not line.strip() or number == 1 and len(line.split()) <= 2:
            continue  # the header: folds, and pairs of a kind per fold
        pair = re.fullmatch(r"\s*(\S+)\s+([0-9]{1,8})\s+(?:(\S+)\s+)?([0-9]{1,8})\s*", line)
        if not pair:
            raise ValueError(f"{path}, line {number}: not a pair: {line.strip()[:80]!r}")
        for person, i in ((pair[1], pair[2]), (pair[3] or pair[1], pair[4])):
            image = os.path.join(root, person, f"{person}_{int(i):04d}.jpg")
            if not os.path.isfile(image):
                raise ValueError(f"{path}, line {number}: {image[:200]} is missing")
            pairs.append(index.setdefault(image, len(index)))
    who = np.unique([os.path.dirname(image) for image in index], return_inverse=True)[1]
    first, second = np.array(pairs, int).reshape(-1, 2).T
    with naming(path):
        return Benchmark(name, [*index], (first, second, who[first] == who[second]), who)

BIN_CALLS = {  # what a .bin may call, and the harmless functions that it gets instead
    "_codecs.encode": lambda text, *_: text.encode("latin1"),  # how protocol 2 writes bytes
    "numpy.core.multiarray._reconstruct": lambda *_: np.ndarray(0, np.uint8),
    "numpy.core.multiarray.scalar": lambda dtype, content: any(content),
    "numpy.core.numeric._frombuffer": lambda content, *_: np.frombuffer(content, np.uint8),
    "numpy.dtype": lambda *_: np.dtype("u1"),  # bytes, whatever it asks for
    "numpy.ndarray": None}

class BinUnpickler(pickle._Unpickler):
    """Calls nothing but BIN_CALLS. (The unpickler in C takes whatever memory a file asks for.)"""
    dispatch = pickle._Unpickler.dispatch | {  # for a bytearray Python's own takes it, too
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8}
    def find_class(self, module, name):
        return BIN_CALLS[f"{module}.{name}".replace("numpy._core", "numpy.core")]

def read_bin(path):
    """InsightFace's .bin: a pickle of (images, issame); pair i is images 2 i and 2 i + 1."""
    content = io.BytesIO(Path(path).read_bytes())
    with naming(f"{path}: not a .bin: stops at, or asks for"):
        images, same = BinUnpickler(content, encoding="bytes").load()
        images = [image if isinstance(image, bytes) else image.tobytes() for image in images]
        same = np.array([bool(value) for value in same], bool)
    if len(images) != 2 * len(same):
        raise ValueError(f"{path}: {len(images)} images for {len(same)} pairs")
    first, second = np.arange(len(images)).reshape(-1, 2).T
    with naming(path):
        return Benchmark(Path(path).stem, images, (first, second, same))

def images_below(root):
    """Paths of the images in a folder, however deep, sorted; aligned or cropped ones come first."""
    paths = [path for path in Path(root).rglob("*") if is_image_file(path.name)]
    return sorted(paths, key=lambda path: (not re.search("align|crop", str(path).lower()), path))

def read_scface(root, subjects="all"):
    """SCface: 001_frontal.jpg; 001_cam1_2.jpg is subject, camera 1..5, distance 4.2, 2.6 or 1.0 m.
    subjects: "all" 130, or "test", the 80 from 051 on (those before are for fine-tuning)."""
    found = {}
    for path in images_below(root):
        name = re.fullmatch("([0-9]{3})_(frontal|cam[1-5]_[123])", path.stem.lower())
        if name and (subjects == "all" or name[1] > "050"):
            found.setdefault(name[0], str(path))
    person = np.array([int(name[:3]) for name in found])
    part = np.array(["gallery" if "frontal" in name else f"d{name[-1]}" for name in found])
    known, seen = {*person[part == "gallery"]}, {*person[part != "gallery"]}
    if not known or known != seen:
        raise ValueError(f"{root}: subject {min(known ^ seen, default=1):03d} has no mugshot "
                         "(like 001_frontal.jpg) or no surveillance image (001_cam1_1.jpg)")
    name = f"SCface, {len(known)} subjects ({subjects})"
    return Benchmark(name, [*found.values()], (), person, part)

def read_tinyface(root):
    """TinyFace: Testing_Set/{Probe,Gallery_Match,Gallery_Distractor}; 12_3.jpg is person 12."""
    root = next(filter(os.path.isdir, [os.path.join(root, "Testing_Set")]), root)
    folders = [images_below(os.path.join(root, name)) for name in (
        "Probe", "Gallery_Match", "Gallery_Distractor")]
    paths, folder = [*itertools.chain(*folders)], np.arange(3).repeat([*map(len, folders)])
    if not folders[0] or not folders[1]:
        raise ValueError(f"{root}: no images in Probe, or none in Gallery_Match")
    identity = np.unique([path.name.split("_")[0] for path in paths], return_inverse=True)[1]
    identity[folder == 2] = -1
    name = f"TinyFace, {(identity < 0).sum() or 'WITHOUT its'} distractors"
    part = np.where(folder == 0, "probes", "gallery")
    return Benchmark(name, [*map(str, paths)], (), identity, part)

def make_pairs(name, sources, labels, limit=3000):
    """A benchmark of labelled images: up to `limit` pairs of one person and as many of two."""
    rng, labels = np.random.default_rng(0), np.asarray(labels)
    some = np.sort(rng.permutation(len(labels))[:4000])  # of them there are 8 million pairs
    first, second = np.triu_indices(len(some), 1)
    same = labels[some][first] == labels[some][second]
    count = min(limit, same.sum(), (~same).sum()) // 5 * 5
    chosen = np.stack([rng.choice(np.flatnonzero(same == kind), count, replace=False)
                       for kind in (True, False)], 1).ravel()  # in turn, so that folds have both
    pairs = first[chosen], second[chosen], same[chosen]
    return Benchmark(name, [sources[i] for i in some], pairs, labels[some])

# ---- 3. Scores ----------------------------------------------------------------------------------
GRID = np.linspace(-1, 1, 401)

def ten_folds(scores, same):
    """Cosines and truth of P pairs -> accuracy, its standard deviation over folds, mean threshold:
    in each fold the best of the other nine, of equals the highest, as in the official code."""
    right = (scores >= GRID[:, None]) == same  # (thresholds, P)
    folds = np.array_split(right, 10, axis=1)
    others = [right.sum(1) - fold.sum(1) for fold in folds]
    best = [np.flatnonzero(count == count.max())[-1] for count in others]
    accuracies = [fold[i].mean() for i, fold in zip(best, folds)]
    return float(np.mean(accuracies)), float(np.std(accuracies)), float(GRID[best].mean())

FARS = np.logspace(-3, 0, 31)  # of a ROC curve; the first is that of TAR

def tar_at_far(scores, same, far=FARS):
    """Share of the genuine pairs above the score that a share `far` of the impostors passes."""
    if same.all() or not same.any():
        return [None] * len(far)
    impostors = np.append(np.sort(scores[~same])[::-1], -np.inf)
    limits = impostors[(np.asarray(far) * (len(impostors) - 1)).astype(int)]
    return (scores[same] > limits[:, None]).mean(1).tolist()

def identify(gallery, gallery_identity, probes, probe_identity, block=64):
    """Unit embeddings, gallery (G, D), probes (n, D), and whose they are -> the share of the probes
    whose person is among the k nearest, k = 1 .. 50. Blocks keep the memory small."""
    hits = torch.zeros(50, dtype=torch.float64)
    for i in range(0, len(probes), block):
        cosines = probes[i:i + block] @ gallery.T
        mates = torch.from_numpy(probe_identity[i:i + block, None] == gallery_identity)
        best = cosines.masked_fill(~mates, -2).amax(1, keepdim=True)
        rank = 1 + ((cosines >= best) & ~mates).sum(1)  # of equals the stranger comes first
        hits += (rank[mates.any(1), None] <= torch.arange(1, 51)).sum(0)
    return (hits / len(probes)).tolist()

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

def embed_sources(backbones, name, sources, resolutions, device, amp, flip):
    """Each image decoded once -> {(backbone name, px): (n, D) float32 embeddings on the CPU}."""
    parts, shown = defaultdict(list), (start := time.time())
    with ThreadPoolExecutor(4) as pool, autocast(device, amp):
        for i in range(0, len(sources), BATCH):
            images = [*pool.map(read_image, sources[i:i + BATCH],
                                (f"{name}, image {j}" for j in itertools.count(i)))]
            images = to_input(torch.stack(images), device)
            for px, key in itertools.product(resolutions, backbones):
                embeddings = embed(backbones[key], degrade(images, px), flip).cpu()
                if not embeddings.isfinite().all():
                    raise ValueError(f"{key}: its embeddings are not finite numbers")
                parts[key, px].append(embeddings.float())
            done, now = i + len(images), time.time()
            if now - shown > 5 or done == len(sources) and now - start > 5:
                shown, rate = now, done / (now - start)
                left = timedelta(0, (len(sources) - done) // rate)
                print(f"{name}: {done:,} of {len(sources):,} images, {rate:.0f}/s, {left} left",
                      flush=True)
    return {key: torch.cat(parts.pop(key)) for key in [*parts]}  # frees what is joined

def evaluate(backbones, data, resolutions, device, amp, flip="sum"):
    """{name: backbone in eval mode} on a Benchmark -> rows of results, ready for JSON, and curves,
    {name of a picture: {label: [(x, y), ...]}}. Pairs are degraded to each of `resolutions`; a
    benchmark without pairs is taken as it is."""
    resolutions, rows, plots = resolutions if data.pairs else [SIZE], [], defaultdict(dict)
    lowest, highest = min(resolutions), max(resolutions)
    embeddings = embed_sources(backbones, data.name, data.sources, sorted({*resolutions, SIZE}),
                               device, amp, flip)
    parts = {part: np.flatnonzero(data.part == part) for part in sorted({*data.part})}
    gallery = parts.pop("gallery", None)
    for px, name in itertools.product(resolutions, backbones):
        sharp, degraded = embeddings[name, SIZE], embeddings[name, px]  # (n, D) each
        row = {"set": data.name, "checkpoint": name, "px": px, "flip": flip}
        for way, other in (("both", degraded), ("cross", sharp)) if data.pairs else ():
            first, second, same = data.pairs
            scores = (other[first] * degraded[second]).sum(1).double().numpy()
            accuracy, std, threshold = ten_folds(scores, same)
            roc = tar_at_far(scores, same)
            row |= {"pairs": len(same), f"{way}_accuracy": accuracy, f"{way}_std": std,
                    f"{way}_threshold": threshold, f"{way}_tar": roc[0]}
            plots[f"{data.name}, {way}"].setdefault(name, []).append((px, accuracy))
            if px in (lowest, highest) and roc[0] is not None:
                plots[f"{data.name}, ROC"][f"{name}, {px} px"] = [*zip(FARS, roc)]
        found = {part: identify(sharp[gallery], data.identity[gallery], degraded[probes],
                                data.identity[probes]) for part, probes in parts.items()}
        if len(found) > 1:  # over distances, however many probes each has
            found["average"] = np.mean([*found.values()], 0).tolist()
        rows += [] if found else [row]
        for part, cmc in found.items():
            rows.append(row | {
                "part": part, "gallery": len(gallery), "probes": len(parts.get(part, ())) or "",
                "rank1": cmc[0], "rank5": cmc[4], "rank20": cmc[19], "cmc": cmc})
            if px in (lowest, highest):
                plots[f"{data.name}, CMC"][f"{name}, {part or f'{px} px'}"] = [*enumerate(cmc, 1)]
        if px == lowest < SIZE:
            error = (sharp - degraded).abs().numpy() * sharp.shape[1] ** 0.5
            density, edges = np.histogram(error, 60, (0, 4), density=True)
            curve = np.stack([(edges[:-1] + edges[1:]) / 2, density], 1)
            plots[f"{data.name}, errors"][f"{name}, {px} px"] = curve.tolist()
        if px == lowest and len({*data.identity}) > 12:
            plots[f"{data.name}, {name}, embeddings"] = spread(data.identity, {
                px: embeddings[name, px] for px in RESOLUTIONS if (name, px) in embeddings})
    return rows, plots

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
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join([
        f"\n{rows[0]['set']}, flip test {rows[0]['flip']}; accuracy, its std over ten folds, TAR "
        "at FAR 1e-3\nand ranks in %; cos >= is the threshold to accept from",
        *("  ".join(map(str.rjust, line, widths)) for line in lines), ""])

# ---- 5. The paper's studies and figures ---------------------------------------------------------
STUDY = [5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, SIZE]  # resolutions
TICKS = [5, 7, 10, 14, 20, 28, 40, 56, SIZE]
AXES = {  # of a picture whose name ends so: ticks on a logarithmic axis, and the labels of both
    "both": (TICKS, "resolution of both images in pixels", "accuracy"),
    "cross": (TICKS, "resolution of one image of a pair in pixels", "accuracy"),
    "gradient": (TICKS, "resolution in pixels", "norm of the classification gradient"),
    "ROC": ([0.001, 0.01, 0.1, 1], "false acceptance rate", "true acceptance rate"),
    "CMC": ([1, 2, 5, 10, 20, 50], "rank", "identification rate"),
    "errors": ((), "distance in a dimension, times the root of their number", "density"),
    "distances": ((), "distance in one of 512 dimensions", "first derivative, over that at 1"),
    "embeddings": ((), "first principal component", "second principal component")}
COLOURS = ["#008df9", "#e20134", "#009f81", "#8400cd", "#ffc33b", "#9f0162", "#00c2f9", "#ff6e3a",
           "#ff5aaf", "#a40122", "#00fccf", "#ffb2fd"]  # for the colour-blind (Krzywinski)

def gradient_norms(path, backbone, root, device, amp, count=256):
    """[(px, || d/dw mean_i CE(head(backbone(degrade(x_i, px))), y_i) ||)], the paper's study, over
    all parameters w of the backbone in eval mode, with the checkpoint's own head and `count` images
    x_i (or all, if fewer) spread evenly over `root`, the image folder that it was trained on."""
    sources, labels = image_folder(root)
    with naming(f"--study: {path} holds no classifier, or not of the identities in {root}"):
        state = torch.load(path, "cpu", weights_only=True)
        scale, margin = (float(state["args"][key]) for key in ("scale", "margin"))
        head = ArcFace(len(state["head"]["weight"]), backbone.fc.out_features, scale, margin)
        head.load_state_dict(state["head"])
        known = (labels < len(head.weight)).sum()  # those held out come behind
        if known != state["args"]["images"]:
            raise ValueError(f"{known} images, not {state['args']['images']}")
    chosen = np.linspace(0, known - 1, min(count, known)).astype(int)
    images = to_input(torch.stack([read_image(source) for source in sources[chosen]]), device)
    labels, head = torch.from_numpy(labels[chosen]).to(device), head.to(device)
    amp = "off" if precision(device, amp) == torch.float16 else amp  # too narrow without a scaler
    curve = []
    for px in STUDY:
        backbone.zero_grad()
        for x, y in zip(degrade(images, px).split(BATCH), labels.split(BATCH)):
            with autocast(device, amp):
                loss = F.cross_entropy(head(backbone(x), y), y, reduction="sum") / len(chosen)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(backbone.parameters(), torch.inf)  # clips nothing
        curve.append((px, norm.item()))
    return curve

def slopes():
    """{distance: [(d, its derivative at d over that at 1)]} in one dimension; the others stay 1."""
    x = torch.ones(300, 512)
    d = x[:, 0] = torch.linspace(0.005, 1.5, 300)
    curves = {"L1": d ** 0, "smooth L1": d.clamp(max=1), "L2": d}
    curves |= {f"LogExp({p})": logexp_grad(x, 0 * x, p)[:, 0] for p in (1, 2)}
    return {name: [*zip(d.tolist(), (y / y[199]).tolist())] for name, y in curves.items()}

def spread(identity, embeddings):
    """{px: embeddings (n, D)}, and whose they are (n,) -> the points of the twelve people with the
    most images in two principal components, {label: [(x, y), ...]}."""
    people = np.bincount(identity[identity >= 0]).argsort()[:-13:-1]
    chosen = np.concatenate([np.flatnonzero(identity == who)[:8] for who in people])
    x = torch.stack([values[chosen] for values in embeddings.values()])  # (resolutions, images, D)
    x = x - x.mean((0, 1))
    x = x @ torch.linalg.svd(x.flatten(0, 1), full_matrices=False)[2][:2].T
    return {f"{px} px" if who == people[0] else f"_{px} px, person {who}": part[
        identity[chosen] == who].tolist() for px, part in zip(embeddings, x) for who in people}

def draw(folder, name, curves):
    """{label: [(x, y), ...]} -> a picture, and its numbers in a .json beside it."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (optional: imported where it is used)
    picture, kind = Figure((4.8, 3.6), layout="constrained"), name.split()[-1]
    ticks, xlabel, ylabel = AXES[kind]
    axes = picture.add_subplot(xlabel=xlabel, ylabel=ylabel)
    for i, (label, points) in enumerate(curves.items()):
        marker = {"marker": "ovsD"[i // 12], "ls": "", "ms": 4} if kind == "embeddings" else {}
        label = re.sub(r"\S*?([^/]+)/last\.pt", r"\1", label)  # begins with _: not in the legend
        axes.plot(*zip(*points), color=COLOURS[i % 12], label=label, **marker)
    if ticks:
        axes.set(xscale="log", xticks=ticks, xticklabels=ticks)
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    picture.savefig(file := io.BytesIO(), dpi=200)
    path = os.path.join(folder, re.sub(r"\W+", "-", name))
    write_file(f"{path}.png", file.getbuffer())
    write_file(f"{path}.json", json.dumps(curves).encode())

# ---- 6. Command line ----------------------------------------------------------------------------
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
    except (OSError, ValueError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        named = getattr(error, "filename", None)
        text = f"{named}: {error.strerror}" if named else str(error) or "interrupted"
        return "error: " + " ".join(text.split())  # one line, whatever names of files hold

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="of train.py, or InsightFace weights")
    def add_set(option, read, text):
        add(option, metavar="PATH", nargs="+", action="extend", default=[], help=text, dest="sets",
            type=lambda path: (read, path))
    add_set("--lfw", read_lfw, "folder with pairs.txt and the aligned images")
    add_set("--xqlfw", partial(read_lfw, name="XQLFW", file="xqlfw_pairs.txt"), "XQLFW, likewise")
    add_set("--bin", read_bin, "verification set of InsightFace")
    add_set("--scface", read_scface, "folder with mugshots and surveillance images")
    add_set("--tinyface", read_tinyface, "TinyFace, or its Testing_Set")
    add("--match", metavar="IMAGE", nargs="+", default=[], help="cosines of aligned faces")
    add("--scface-subjects", choices=["all", "test"], default="all", help="130, or 051 to 130")
    add("--resolutions", type=number(int, 1, SIZE), nargs="+", default=RESOLUTIONS, metavar="PX",
        help="to degrade pairs to, in pixels")
    add("--study", metavar="DIR", help="the paper's: 19 resolutions, and gradient norms on DIR, "
        "the image folder that the checkpoints were trained on")
    add("--flip", choices=["sum", "concat", "none"], default="sum", help="test of mirrored images")
    add("--json", metavar="FILE", help="write the results here too")
    add("--plots", metavar="DIR", help="draw them here; needs matplotlib")
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.plots and not find_spec("matplotlib"):
        parser.error("--plots needs matplotlib, which is optional: pip install matplotlib")
    if len(args.match) == 1 or not (args.sets or args.study or args.match):
        parser.error("nothing to do: give --lfw or another set, --study, or --match A B")
    sets = []
    for read, path in dict.fromkeys(args.sets):
        os.stat(path)  # an error, if there is none
        data = read(path, args.scface_subjects) if read is read_scface else read(path)
        if data.name in [other.name for other in sets]:
            data.name += f" of {path}"
        sets.append(data)
    if args.json:  # what cannot be written fails now, not after hours
        write_file(args.json, Path(args.json).read_bytes() if os.path.exists(args.json) else b"")
    keep_memory()
    backbones = {path: load_backbone(no_bomb(path)).to(
        args.device, memory_format=torch.channels_last) for path in args.checkpoints}
    options, rows, norms = (args.device, args.amp, args.flip), [], {}
    if args.plots:
        draw(args.plots, "distances", slopes())
    def report(text, new, plots):  # after each part, so that little is lost
        print(text, flush=True)
        rows.extend(new)
        if args.json:
            write_file(args.json, json.dumps(rows).encode())
        for name, curves in plots.items() if args.plots else ():
            draw(args.plots, name, curves)
    for name, backbone in backbones.items() if args.study else ():
        norms[name] = gradient_norms(name, backbone, args.study, args.device, args.amp)
        text = ", ".join(f"{norm:.3g} at {px} px" for px, norm in norms[name])
        report(f"{name}: norm of the classification gradient {text}",
               [{"checkpoint": name, "gradient_norms": norms[name]}], {"gradient": norms})
    if args.match:
        print("cosine similarities of what should be faces aligned to ArcFace's 112 x 112 template")
        embeddings = embed_sources(backbones, "--match", args.match, [SIZE], *options)
        for name in backbones:
            pairs = itertools.combinations(zip(args.match, embeddings[name, SIZE]), 2)
            new = [{"checkpoint": name, "match": [a, b], "cosine": float(x @ y)}
                   for (a, x), (b, y) in pairs]
            line = "{cosine:7.3f}  {match[0]}  {match[1]}  {checkpoint}"
            report("\n".join(line.format(**row) for row in new), new, {})
    px = STUDY if args.study else [*dict.fromkeys(args.resolutions)]
    for data in sets:
        new, plots = evaluate(backbones, data, px, *options)
        report(table(new), new, plots)

if __name__ == "__main__":
    sys.exit(run(main))
