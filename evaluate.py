# SPDX-License-Identifier: MIT
"""Low-resolution face verification and identification: python evaluate.py CHECKPOINT --lfw DIR

Verification asks whether two images show the same person. It is measured at several resolutions,
with both images degraded ("both", which the paper plots) and with a sharp image against a degraded
one ("cross": the first sharp, like a passport photo, the second from a camera). Identification asks
whether the nearest image of a gallery shows the person of a probe. Errors, files and devices come
last, in section 6.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import itertools
import json
import os
import pickle
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import lrfr

SIZE = 112  # height and width of an aligned face
RESOLUTIONS = [7, 14, 20, SIZE]  # in pixels, to degrade faces to

# ---- 1. Benchmarks -------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """P pairs to verify: indices of both images, and the truth. Their order makes the ten folds."""

    first: np.ndarray
    second: np.ndarray
    genuine: np.ndarray  # bool: the same person


@dataclass
class Benchmark:
    """Faces to verify (pairs), to identify (gallery and probes), or both.

    A benchmark with pairs is run at several resolutions. One without them is taken as it is: its
    faces are small ones.
    """

    name: str
    sources: list  # of n images: paths, or the bytes of image files
    pairs: Pairs | None = None
    identity: np.ndarray | None = None  # (n,) whose face it is; -1 for distractors
    gallery: np.ndarray | None = None  # indices of images
    probes: dict = field(default_factory=dict)  # {name of a group: indices of images}
    thresholds: int = 401  # how many, from a cosine of -1 to 1: steps of .005, as officially

    def __post_init__(self):
        if self.pairs is None:
            if not any(self.count_mates(probes) for probes in self.probes.values()):
                raise UserError(f"{self.name}: no probe has a mate in the gallery")
            return
        genuine = self.pairs.genuine
        count = genuine.sum()
        others = len(genuine) - count
        if count == 0 or others == 0 or len(genuine) < 10:
            kinds = f"{count} genuine and {others} impostor pairs"
            raise UserError(f"{self.name}: {kinds}: a benchmark needs both, and ten pairs")
        for fold in np.array_split(genuine, 10):
            if len(fold) > 1 and len(set(fold)) == 1:
                text = "among ten folds in their order, some have pairs of one kind: mix both"
                warn_once(f"{self.name}: {text}")

    def count_mates(self, probes):
        """How many of these probes have an image of the same person in the gallery."""
        people = self.identity[self.gallery]
        in_gallery = np.isin(self.identity[probes], people)
        return int(in_gallery.sum())


def split_gallery(identity):
    """The first image of each person as the gallery, the others as one group of probes."""
    _, gallery = np.unique(identity, return_index=True)
    others = np.setdiff1d(np.arange(len(identity)), gallery)
    return gallery, {"all": others}


def read_lfw(root, name="LFW", pairs_file="pairs.txt", thresholds=401):
    """LFW: pairs.txt lists the pairs, and `root`/Name/Name_0001.jpg are the aligned images.

    Where there is no pairs.txt, a pairs.csv as on Kaggle is read. The first line may be a header.
    """
    path = Path(root, pairs_file)
    if not path.exists() and path.with_suffix(".csv").exists():
        path = path.with_suffix(".csv")
    lines = path.read_text("utf-8-sig", errors="replace").splitlines()
    separator = "," if path.suffix == ".csv" else None  # None: spaces
    place_of, pairs = {}, []  # place_of: image -> its place among the sources
    for line_number, line in enumerate(lines, 1):
        # Beside tabs, spaces are part of a name.
        fields = line.split("\t" if "\t" in line else separator)
        fields = [field.strip() for field in fields if field.strip()]
        if len(fields) == 3:  # name i j: two images of one person
            fields.insert(2, fields[0])
        try:
            person, i, other, j = fields
            image = find_face(root, person, int(i))
            other_image = find_face(root, other, int(j))
        except ValueError:
            no_numbers = not any(map(str.isdecimal, fields[2:]))
            if not fields or (line_number == 1 and no_numbers):
                continue  # an empty line, or a header
            text = f"expected 'name i j' or 'name i name j', i and j numbers, in {line[:80]!r}"
            raise UserError(f"{path}, line {line_number}: {text}") from None
        first = place_of.setdefault(image, len(place_of))
        second = place_of.setdefault(other_image, len(place_of))
        pairs.append((first, second, person == other))
    numbers = np.array(pairs, int).reshape(-1, 3)
    first, second, genuine = numbers.T
    folders = [os.path.dirname(image) for image in place_of]
    _, identity = np.unique(folders, return_inverse=True)
    pairs = Pairs(first, second, genuine.astype(bool))
    gallery, probes = split_gallery(identity)
    return Benchmark(name, list(place_of), pairs, identity, gallery, probes, thresholds)


def find_face(root, person, number):
    """The path of a person's image in a folder like LFW's, with one of IMAGE_ENDINGS."""
    stem = os.path.join(root, person, f"{person}_{number:04d}")
    for ending in IMAGE_ENDINGS:
        if os.path.exists(stem + ending):
            return stem + ending
    raise UserError(f"no image {stem}.jpg (or .png ...), which the list of pairs names")


def read_xqlfw(root):
    """XQLFW: like LFW, with xqlfw_pairs.txt and thresholds in steps of .001, as its own script.

    Its images are of low quality as they are: what it publishes is measured at 112 px.
    """
    return read_lfw(root, "XQLFW", "xqlfw_pairs.txt", thresholds=2001)


class PickledArray:
    """Whatever of numpy a pickle holds: keeps its bytes or its list, and makes nothing of them.

    An array is pickled as a call that makes an empty one, and its state: shape, type, bytes or
    list. (numpy itself can be made to take addresses of memory from there, and crashes or worse.)
    """

    def __init__(self, *parts):
        self.__setstate__(parts)

    def __setstate__(self, parts):
        for part in parts:
            if isinstance(part, (bytes, bytearray, list)):
                self.content = part  # the other parts are shape and type


class BinUnpickler(pickle.Unpickler):
    """Admits numpy's arrays, and bytes as protocols 0 to 2 write them, and nothing else."""

    def find_class(self, module, name):
        if module.partition(".")[0] == "numpy":
            return PickledArray
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def content_of(value):
    """The bytes of a pickled array, or its list of Python objects; other values as they are."""
    return getattr(value, "content", value)


def read_bin(path):
    """InsightFace's .bin: a pickle of (images, issame). Pair i is images 2 i and 2 i + 1.

    An image is the bytes of an image file, or a uint8 array of them.
    """
    with open(path, "rb") as file:
        try:
            images, labels = BinUnpickler(file, encoding="bytes").load()  # also of Python 2
            images = [bytes(memoryview(content_of(image))) for image in content_of(images)]
            labels = content_of(labels)
            if not isinstance(labels, list):  # bytes of booleans or integers, one a pair
                bytes_each = len(labels) // (len(images) // 2)
                labels = np.frombuffer(labels, f"<i{bytes_each}").tolist()
            labels = [content_of(label) for label in labels]
        except Exception as error:  # of a dozen kinds, for damaged files
            text = "not a verification set, as pickle.dump((files, same)) makes it"
            raise UserError(f"{path}: {text} ({error})") from None
    genuine = []
    for label in labels:
        if isinstance(label, (bytes, bytearray)):  # of a number of numpy's
            label = int.from_bytes(label, "little")
        if label not in (0, 1):
            raise UserError(f"{path}: label {label!r:.40}: expected True, False, 1 or 0")
        genuine.append(bool(label))
    if len(images) != 2 * len(genuine):
        raise UserError(f"{path}: {len(images)} images for {len(genuine)} pairs")
    first = np.arange(0, len(images), 2)
    pairs = Pairs(first, first + 1, np.array(genuine, bool))
    return Benchmark(Path(path).stem, images, pairs)


def read_scface(root):
    """SCface: 001_frontal.jpg is a mugshot; 001_cam1_2.jpg is subject, camera 1 to 5, distance.

    Distance 1, 2, 3 is 4.2, 2.6, 1.0 m. Profiles and the infrared cameras 6 to 8 are no part of it.
    UserError if an image is there twice, say original and cropped.
    """
    found, others = {}, []
    for path in images_below(root):
        name = Path(path).stem.lower()
        if not re.fullmatch(r"\d{3}_(frontal|cam[1-5]_[123])", name):
            others.append(path)
        elif name in found:
            raise UserError(f"which one is {name}: {found[name]} or {path}? Move one away")
        else:
            found[name] = path
    if not found:
        form = "names such as 001_frontal.jpg and 001_cam1_2.jpg (subject, camera, distance)"
        raise UserError(f"{root}: no images of SCface: expected {form}")
    if others:
        warn_once(f"SCface: {len(others)} images are no part of it, by name, such as {others[0]}")

    identity = np.array([int(name[:3]) for name in found])
    kinds = np.array([name.rpartition("_")[2] for name in found])
    gallery = np.flatnonzero(kinds == "frontal")
    probes = {}
    for distance in np.setdiff1d(kinds, "frontal"):
        probes[f"d{distance}"] = np.flatnonzero(kinds == distance)
    name = f"SCface, {len(gallery)} subjects"
    return Benchmark(name, list(found.values()), None, identity, gallery, probes)


def read_tinyface(root):
    """TinyFace: Testing_Set/{Probe,Gallery_Match,Gallery_Distractor}; 12_3.jpg is person 12.

    Probes without a mate in the gallery count as misses. (AdaFace's code leaves them out.)
    """
    probes = images_below(Path(root, "Testing_Set", "Probe"))
    mates = images_below(Path(root, "Testing_Set", "Gallery_Match"))
    distractors = images_below(Path(root, "Testing_Set", "Gallery_Distractor"))
    sources = probes + mates + distractors
    identity = np.full(len(sources), -1)  # the distractors are nobody's
    for i, path in enumerate(probes + mates):
        name = re.fullmatch(r"(\d{1,9})_.*", os.path.basename(path))
        if name is None:
            raise UserError(f"{path}: expected names such as 12_3.jpg, image 3 of person 12")
        identity[i] = int(name[1])
    gallery = np.arange(len(probes), len(sources))
    name = f"TinyFace, {len(distractors)} distractors"
    probes = {"all": np.arange(len(probes))}
    return Benchmark(name, sources, None, identity, gallery, probes)


# Option of the command line, without hyphens -> its reader, and what it reads.
BENCHMARKS = {
    "lfw": (read_lfw, "folder with pairs.txt and Name/Name_0001.jpg, aligned"),
    "xqlfw": (read_xqlfw, "folder with xqlfw_pairs.txt and Name/Name_0001.jpg"),
    "bin": (read_bin, "verification set of InsightFace"),
    "scface": (read_scface, "folder with 001_frontal.jpg, 001_cam1_1.jpg ... anywhere below it"),
    "tinyface": (read_tinyface, "folder with Testing_Set"),
}

# ---- 2. Scores -----------------------------------------------------------------------------------


def ten_folds(scores, genuine, thresholds):
    """Cosines and truth of P pairs -> accuracy, its standard deviation over ten folds, threshold.

    In each fold the threshold is the one that is best on the other nine; of equals the highest, as
    in the official code. The threshold returned is the mean of the ten.
    thresholds: how many to try, from -1 to 1.
    """
    grid = np.linspace(-1, 1, thresholds)[::-1]  # the highest first
    accepted = scores >= grid[:, None]
    correct = accepted == genuine  # (thresholds, P)
    total = correct.sum(1)
    accuracies, chosen = [], []
    for fold in np.array_split(np.arange(len(genuine)), 10):
        correct_elsewhere = total - correct[:, fold].sum(1)
        best = correct_elsewhere.argmax()  # the first of equals
        accuracies.append(correct[best, fold].mean())
        chosen.append(grid[best])
    accuracy = float(np.mean(accuracies))
    std = float(np.std(accuracies))
    return accuracy, std, float(np.mean(chosen))


FARS = np.logspace(-3, 0, 31)  # false acceptance rates of a ROC curve


def roc_curve(scores, genuine):
    """True acceptance rate (TAR) of genuine pairs at each of FARS, or None if there are too few.

    The threshold of a rate is the lowest that accepts at most that share of all impostor pairs.
    (InsightFace takes one in each fold, which makes its TAR a little lower.)
    """
    impostor = np.sort(scores[~genuine])[::-1]
    if len(impostor) < 1000:  # FAR 1e-3 would be less than one pair
        return None
    # At most k impostors lie above the one at place k, counted from 0; all lie above -inf.
    allowed = (FARS * len(impostor)).astype(int)
    thresholds = np.append(impostor, -np.inf)[allowed]
    accepted = scores[genuine] > thresholds[:, None]  # (rates, genuine pairs)
    return accepted.mean(1).tolist()


def identify(gallery, gallery_identity, probes, probe_identity):
    """Share of the probes whose person is among the k nearest of the gallery, for k = 1 to 50.

    gallery (G, D), probes (n, D): unit embeddings. A probe without a mate is a miss at every rank;
    of equal cosines, those of strangers come first.
    """
    hits = torch.zeros(50, dtype=torch.float64)
    gallery_identity = torch.from_numpy(gallery_identity)
    probe_identity = torch.from_numpy(probe_identity)
    # In blocks, since TinyFace's gallery is large.
    for block, people in zip(probes.split(64), probe_identity.split(64)):
        cosines = block @ gallery.T
        mates = people[:, None] == gallery_identity
        best = cosines.masked_fill(~mates, -2).amax(1, keepdim=True)  # -2: below every cosine
        strangers = (cosines >= best) & ~mates  # who come first
        rank = 1 + strangers.sum(1, keepdim=True)
        rank = rank[mates.any(1)]  # else probes without a mate would hit in a small gallery
        hit = rank <= torch.arange(1, 51)
        hits += hit.sum(0)
    return (hits / len(probes)).tolist()


# ---- 3. Running backbones on benchmarks ----------------------------------------------------------


class Settings(NamedTuple):
    """How embeddings are computed."""

    device: torch.device
    amp: str = "off"  # precision of the backbone, as --amp
    workers: int = 0  # processes that read images for a GPU
    flip: str = "sum"  # as in lrfr.embed


def embed_sources(backbones, title, sources, resolutions, settings, degrade=lrfr.degrade):
    """Embeds n images at several resolutions -> {(backbone's name, px): (n, D) unit embeddings}.

    backbones: {name: backbone in eval mode}. degrade: see evaluate.
    """
    on_gpu = settings.device.type == "cuda"
    loader = DataLoader(
        sources,
        batch_size=256 if on_gpu else 64,
        num_workers=settings.workers if on_gpu else 0,  # a CPU is busy with the network
        collate_fn=read_images,
    )
    parts = {key: [] for key in itertools.product(backbones, resolutions)}
    done = 0
    begin = shown = time.monotonic()
    for pixels in loader:
        images = lrfr.to_input(pixels, settings.device)
        for px in resolutions:
            degraded = images if px == SIZE else degrade(images, px)
            for name, backbone in backbones.items():
                with autocast(settings.device, settings.amp):
                    embeddings = lrfr.embed(backbone, degraded, settings.flip).cpu()
                if not embeddings.isfinite().all():
                    text = "not all its embeddings are finite numbers: give --amp off"
                    raise UserError(f"{name}: {text}")
                parts[name, px].append(embeddings)
        done += len(pixels)
        now = time.monotonic()
        if now - shown > 5:
            shown = now
            seconds = (len(sources) - done) * (now - begin) / done
            left = timedelta(seconds=int(seconds))
            print(f"{title}: {done:,} of {len(sources):,} images, {left} left", file=sys.stderr)
    return {key: torch.cat(embeddings) for key, embeddings in parts.items()}


def evaluate(backbones, benchmark, resolutions, settings, degrade=lrfr.degrade):
    """Runs {name: backbone in eval mode} on a benchmark -> rows of results, ready for JSON.

    Pairs are degraded to each of the resolutions; a benchmark without pairs is taken as it is.
    degrade: a function of (N, 3, 112, 112) images in [-1, 1] and px -> the same degraded, such as
    lrfr.degrade or lrfr.photograph (which draws: seed torch first). At 112 px it is not called.
    """
    if benchmark.pairs is None:
        resolutions = [SIZE]
    every_px = sorted({*resolutions, SIZE})  # the sharp ones are for "cross"
    title, sources = benchmark.name, benchmark.sources
    try:
        embeddings = embed_sources(backbones, title, sources, every_px, settings, degrade)
    except UserError as error:
        raise UserError(f"{title}: {one_line(error)}") from None
    dtype = str(precision(settings.device, settings.amp)).removeprefix("torch.")
    rows = []
    for px, name in itertools.product(resolutions, backbones):
        sharp = embeddings[name, SIZE]  # (n, D)
        degraded = embeddings[name, px]
        row = {"set": title, "checkpoint": name, "px": px}
        row["flip"] = settings.flip
        row["precision"] = dtype
        if benchmark.pairs is not None:
            row["pairs"] = len(benchmark.pairs.genuine)
            row |= verify(degraded, degraded, benchmark, "both")
            row |= verify(sharp, degraded, benchmark, "cross")
        if benchmark.probes:
            rows += [row | result for result in search(sharp, degraded, benchmark)]
        else:
            rows.append(row)
    return rows


def verify(left, right, benchmark, kind):
    """Verifies the pairs of two sets of embeddings (n, D) -> entries of a row of results."""
    first, second, genuine = benchmark.pairs
    products = left[first] * right[second]
    cosines = products.sum(1)
    scores = cosines.double().numpy()
    accuracy, std, threshold = ten_folds(scores, genuine, benchmark.thresholds)
    roc = roc_curve(scores, genuine)
    return {
        f"{kind}_accuracy": accuracy,
        f"{kind}_std": std,
        f"{kind}_tar": roc[0] if roc else None,
        f"{kind}_threshold": threshold,
        f"{kind}_roc": roc,
        "roc_far": FARS.tolist() if roc else None,
    }


def search(sharp, degraded, benchmark):
    """Identifies each group of probes in the sharp gallery -> entries of rows, one row a group."""
    identity, gallery = benchmark.identity, benchmark.gallery
    rows = []
    for part, probes in benchmark.probes.items():
        cmc = identify(sharp[gallery], identity[gallery], degraded[probes], identity[probes])
        mates = benchmark.count_mates(probes)
        row = {"part": part, "probes": len(probes)}
        row["without_mate"] = len(probes) - mates
        for k in (1, 5, 20):
            row[f"rank{k}"] = cmc[k - 1]
        rows.append(row | {"cmc": cmc})
    if len(rows) > 1:
        average = {"part": "average", "probes": None, "without_mate": None}
        for key in ("rank1", "rank5", "rank20"):
            rates = [row[key] for row in rows]
            average[key] = sum(rates) / len(rates)
        rows.append(average)
    return rows


# ---- 4. Tables and plots -------------------------------------------------------------------------

# Entry of a row -> heading of its column.
COLUMNS = {
    "px": "px",
    "checkpoint": "checkpoint",
    "both_accuracy": "both",
    "both_std": "std",
    "both_tar": "TAR",
    "both_threshold": "threshold",
    "cross_accuracy": "cross",
    "cross_std": "std",
    "cross_tar": "TAR",
    "cross_threshold": "threshold",
    "part": "part",
    "probes": "probes",
    "without_mate": "no mate",
    "rank1": "rank-1",
    "rank5": "rank-5",
    "rank20": "rank-20",
}


def cell(key, value):
    """An entry of the table as text. Floats are shares, shown in %, except thresholds."""
    if value is None:
        return "-"
    if key.endswith("threshold"):
        return f"{value:.3f}"
    if isinstance(value, float):
        return f"{100 * value:.2f}"
    return str(value)


def table(rows):
    """The rows of one benchmark as a text with a heading."""
    first = rows[0]
    keys = [key for key in COLUMNS if key in first]
    if first.get("part") == "all":
        keys.remove("part")
    cells = [[COLUMNS[key] for key in keys]]
    for row in rows:
        cells.append([cell(key, row[key]) for key in keys])
    text = f"\n{first['set']}, flip test {first['flip']}, {first['precision']}; shares in %\n"
    if "pairs" in first:
        text += f"{first['pairs']} pairs; std: of the accuracy over ten folds; TAR: at FAR 1e-3; "
        text += "threshold: the cosine from which to accept, for the best accuracy\n"
    widths = np.char.str_len(cells).max(axis=0)  # of the columns
    for line in np.char.rjust(cells, widths):
        text += "  ".join(line) + "\n"
    return text


def plot(folder, rows):
    """Draws what is in the rows of one benchmark: accuracy over resolution, ROC, CMC."""
    from matplotlib.figure import Figure

    figure = Figure((15, 5), layout="constrained")
    accuracy, roc, cmc = figure.subplots(1, 3)
    accuracy.set(xscale="log", xlabel="resolution in pixels", ylabel="accuracy")
    roc.set(xscale="log", xlabel="false acceptance rate", ylabel="true acceptance rate, cross")
    cmc.set(xlabel="rank", ylabel="identification rate")
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        own = [row for row in rows if row["checkpoint"] == name]
        name = name.replace("$", r"\$")  # which matplotlib takes for mathematics
        for kind in ("both", "cross"):
            if f"{kind}_accuracy" in own[0]:
                px = [row["px"] for row in own]
                shares = [row[f"{kind}_accuracy"] for row in own]
                accuracy.plot(px, shares, marker="o", label=f"{name}, {kind}")
        for row in own:
            label = f"{name}, {row['px']} px"
            if row.get("part", "all") != "all":
                label = f"{name}, {row['part']}"
            if row.get("cross_roc"):
                roc.plot(FARS, row["cross_roc"], label=label)
            if "cmc" in row:
                cmc.plot(range(1, 51), row["cmc"], label=label)
    for axes in (accuracy, roc, cmc):
        if axes.lines:
            axes.legend(fontsize="small")
        else:  # such as the ROC of fewer than 1,000 impostor pairs
            axes.set_title("not measured on this set")
    file_name = re.sub(r"[^\w.]+", "-", rows[0]["set"]) + ".png"
    with new_file(os.path.join(folder, file_name)) as file:
        figure.savefig(file)


# ---- 5. Command line -----------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="of train.py, or InsightFace weights")
    for option, (_, text) in BENCHMARKS.items():
        add(f"--{option}", metavar="PATH", action="append", default=[], help=text)
    text = "print cosines of aligned faces"
    add("--match", metavar="IMAGE", nargs="+", action="extend", default=[], help=text)
    text = "pixels to degrade pairs to (default: 7 14 20 112)"
    px = number(int, 2, SIZE)
    add("--resolutions", type=px, nargs="+", default=RESOLUTIONS, metavar="PX", help=text)
    text = "what is done with the mirrored image's embedding (default: sum, as in InsightFace)"
    add("--flip", choices=["sum", "concat", "none"], default="sum", help=text)
    add("--json", metavar="FILE.json", help="write the results here, too")
    add("--plots", metavar="DIR", help="draw accuracy, ROC and CMC here; needs matplotlib")
    add_device_options(parser)
    args = parser.parse_args(argv)
    args.resolutions = sorted(set(args.resolutions))
    if args.json and (not args.json.endswith(".json") or os.path.isdir(args.json)):
        parser.error(f"--json {args.json}: not the name of a file that ends in .json")
    if args.plots and not find_spec("matplotlib"):
        parser.error("--plots needs matplotlib, which is optional: pip install matplotlib")
    sets = [getattr(args, option) for option in BENCHMARKS]
    if len(args.match) == 1 or not (args.match or any(sets)):
        parser.error("nothing to do: give --lfw or another benchmark, or --match A B")
    return args


def match(backbones, images, settings):
    """The cosine of each pair of the images -> rows of results."""
    embeddings = embed_sources(backbones, "--match", images, [SIZE], settings)
    rows = []
    for name in backbones:
        pairs = itertools.combinations(zip(images, embeddings[name, SIZE]), 2)
        for (a, x), (b, y) in pairs:
            cosine = float(x @ y)
            rows.append({"checkpoint": name, "match": [a, b], "cosine": cosine})
    return rows


def main(argv=None):
    args = parse_arguments(argv)
    use_device(args.device)
    settings = Settings(args.device, args.amp, args.workers, args.flip)
    backbones = {}
    for path in args.checkpoints:
        backbone = load_backbone(path)
        backbones[path] = backbone.to(args.device, memory_format=torch.channels_last)
    benchmarks = []
    for option, (read, _) in BENCHMARKS.items():
        for path in getattr(args, option):
            benchmark = read(path)
            if any(benchmark.name == other.name for other in benchmarks):
                benchmark.name += f" of {path}"
            benchmarks.append(benchmark)
    if args.plots:
        os.makedirs(args.plots, exist_ok=True)
    if args.json and not os.path.exists(args.json):
        save_rows(args, [])  # a new file that cannot be written fails now, not after hours
    rows = []
    if args.match:
        rows += match(backbones, args.match, settings)
        save_rows(args, rows)
        print("cosine similarities; the faces should be aligned to ArcFace's 112 x 112 template")
        for row in rows:
            print(f"{row['cosine']:7.3f}", *row["match"], row["checkpoint"], sep="  ")
    for benchmark in benchmarks:
        new = evaluate(backbones, benchmark, args.resolutions, settings)
        rows += new
        save_rows(args, rows)  # before printing, which can fail
        print(table(new), flush=True)
        if args.plots:
            plot(args.plots, new)


def save_rows(args, rows):
    if args.json:
        with new_file(args.json) as file:
            file.write(json.dumps(rows).encode())


# ---- 6. What train.py uses as well: errors, files, devices, options ------------------------------


class UserError(Exception):
    """What the user can mend. It is shown as one line, without a traceback."""


def one_line(error):
    """The message of an exception; of one in a DataLoader's process, without its traceback."""
    text = str(error) or repr(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    if "Traceback" in text:
        last = text.strip().splitlines()[-1]
        text = last.partition(": ")[2] or text
    return " ".join(text.split())


def run(main):
    """Calls main; what is wrong with the user's files or machine becomes one line and status 1."""
    if hasattr(sys.stdout, "reconfigure"):  # not so in notebooks, nor in a daemon
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that no terminal can show
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {one_line(error)}") from None
    except torch.OutOfMemoryError:
        text = "out of memory: in train.py, a smaller --batch-size needs less"
        raise SystemExit(f"error: {text}") from None


@functools.cache  # so that a process prints the same text once
def warn_once(text):
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def new_file(path):
    """Opens a temporary file that takes the place of `path` when it is whole."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # torch.save puts one upon an OSError, or a Ctrl-C
            error = error.__context__ or error
        if not isinstance(error, OSError):
            raise error from None
        raise UserError(f"{path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")  # not EPS, which runs Ghostscript


def read_face(source):
    """Reads a path, or the bytes of an image file -> (112, 112, 3) uint8 RGB, upright.

    UserError if it is not a readable image of 8-bit pixels.
    """
    name = file = source
    if isinstance(source, bytes):
        name = f"an image of {len(source)} bytes"
        file = io.BytesIO(source)
    try:
        image = Image.open(file, formats=FORMATS)
        mode = image.mode
        image = ImageOps.exif_transpose(image).convert("RGB")  # cameras store faces sideways
    except Exception as error:  # of a dozen kinds, for damaged files
        reason = getattr(error, "strerror", None) or "damaged, far too large, or of another format"
        raise UserError(f"{name}: not a readable image: {reason}") from None
    if mode.startswith(("I", "F")):  # convert would have made them black or white
        raise UserError(f"{name}: pixels of mode {mode}, not 8-bit: save it as 8-bit RGB or grey")
    if image.size != (SIZE, SIZE):
        warn_once("images that are not 112 x 112 are resized: they should be aligned faces")
    return np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def read_images(sources):
    """Reads n faces from paths or the bytes of image files -> (n, 3, 112, 112) uint8 RGB."""
    faces = [read_face(source) for source in sources]
    pixels = torch.from_numpy(np.stack(faces))
    return pixels.permute(0, 3, 1, 2)


def images_below(root):
    """Paths of the images in a folder, however deep, sorted folder by folder.

    Hidden files and folders are passed over, and those of Synology's disks, such as @eaDir.
    """
    paths = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "@")))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("."):
                paths.append(os.path.join(folder, name))
    if not paths:
        raise UserError(f"{root}: no such folder, or no images in it")
    return paths


def load_backbone(path):
    """lrfr.load_backbone, with its ValueError as a UserError."""
    try:
        return lrfr.load_backbone(path)
    except ValueError as error:
        raise UserError(error) from None


def use_device(device):
    """Sets the process up for its device."""
    if device.type == "cpu":
        keep_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)  # else some memory of GPU 0 is taken as well


def keep_memory():
    """Tells glibc to keep freed memory, which makes a CPU up to 1.8 times as fast."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # elsewhere than in glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings for single blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow in large steps


def precision(device, amp):
    """The dtype of a backbone; "auto": bf16 where supported, else fp16 on GPUs, float32 on CPUs."""
    if amp == "auto" and device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        amp = "bf16" if ampere else "fp16"
    elif amp == "auto" and torch.cpu._is_avx512_bf16_supported():
        amp = "bf16"
    if amp == "bf16":
        return torch.bfloat16
    if amp == "fp16":
        return torch.float16
    return torch.float32


def autocast(device, amp):
    """A context that runs a backbone in that precision."""
    dtype = precision(device, amp)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def number(kind, low, high=1e9):
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def existing_device(text):
    """An argparse type: the CPU, or a CUDA GPU that this machine has."""
    count = torch.cuda.device_count()
    known = [f"cuda:{i}" for i in range(count)]
    if count > 0:
        known.append("cuda")
    if text not in ("cpu", *known):
        raise argparse.ArgumentTypeError(f"{text}: there are the CPU and {count} CUDA GPUs here")
    return torch.device(text)


def add_device_options(parser):
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    text = "cpu, cuda, cuda:1 ... (default: %(default)s)"
    add("--device", type=existing_device, default=default, help=text)
    text = "precision of the backbone; auto: bf16 where supported, else fp16 on GPUs, off on CPUs "
    text += "(default: %(default)s)"
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help=text)
    default = min(4, os.cpu_count() or 1)
    text = "processes that read images; evaluation on a CPU needs none (default: %(default)s)"
    add("--workers", type=number(int, 0, 256), default=default, help=text)


if __name__ == "__main__":
    run(main)
