# SPDX-License-Identifier: MIT
"""Draws the paper's analysis figures, and measures what else RESULTS.md shows:

python .github/figures.py study CHECKPOINT... --lfw DIR --data FOLDER --out DIR
python .github/figures.py derivatives --out DIR
python .github/figures.py errors CHECKPOINT... --lfw DIR --out DIR
python .github/figures.py embeddings CHECKPOINT... --lfw DIR --out DIR
python .github/figures.py weights CHECKPOINT... --lfw DIR [--json FILE]
python .github/figures.py faces --out DIR
python .github/figures.py camera CHECKPOINT... --lfw DIR [--json FILE]
python .github/figures.py screen CHECKPOINT... --data FOLDER --holdout N [--json FILE]

Checkpoints are called after their folders. Drawing needs matplotlib.
"""

import argparse
import functools
import io
import json
import math
import os
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import lrfr
import train
from evaluate import SIZE, UserError

LOW = [7, 14, 20]  # the resolutions of the paper's MAug, in pixels

# ---- 1. What the figures share -------------------------------------------------------------------

# For the colour-blind: Martin Krzywinski's palette of twelve.
COLOURS = ["#008df9", "#e20134", "#009f81", "#8400cd", "#ffc33b", "#9f0162"]
COLOURS += ["#00c2f9", "#ff6e3a", "#ff5aaf", "#a40122", "#00fccf", "#ffb2fd"]
STYLES = ["-", "--", "-.", ":"]


def load_backbones(args):
    """The backbones of the checkpoints, {name of the folder: backbone}."""
    backbones = {}
    for path in args.checkpoints:
        name = Path(path).resolve().parent.name
        if name in backbones:
            raise UserError(f"{path}: the folder of another checkpoint is called {name} as well")
        backbone = evaluate.load_backbone(path)
        backbones[name] = backbone.to(args.device, memory_format=torch.channels_last)
    return backbones


def settings_of(args, flip="sum"):
    return evaluate.Settings(args.device, args.amp, args.workers, flip)


def evenly_spaced(items, count):
    """Up to `count` of the items, from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[i] for i in places.astype(int)]


def embed_lfw(args, resolutions):
    """{name: {px: unit embeddings}} of N (`--images`) of LFW's images, not mirrored."""
    sources = evenly_spaced(evaluate.read_lfw(args.lfw).sources, args.images)
    backbones = load_backbones(args)
    settings = settings_of(args, flip="none")
    embeddings = evaluate.embed_sources(backbones, "LFW", sources, resolutions, settings)
    by_name = {name: {} for name in backbones}
    for (name, px), unit in embeddings.items():
        by_name[name][px] = unit
    return by_name


def start_picture(height=3.6):
    """A picture that can be read at a width of 480 pixels, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure((4.8, height), layout="constrained")
    return figure, figure.add_subplot()


def save_picture(figure, path, dpi=200):
    with evaluate.new_file(path) as file:
        figure.savefig(file, dpi=dpi)
    print(path)


def draw_lines(path, curves, **options):
    """Draws {label: (x, y)}; options: of the axes, as matplotlib calls them."""
    figure, axes = start_picture()
    for i, (label, (x, y)) in enumerate(curves.items()):
        axes.plot(x, y, STYLES[i % 4], color=COLOURS[i % 12], label=label)
    axes.set(**options)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_picture(figure, path)


def print_table(headings, rows):
    """Prints a table in Markdown."""
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def write_lines(path, rows):
    """Writes one line of JSON for each row."""
    with evaluate.new_file(path) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


# ---- 2. The resolution study: accuracy and gradient against resolution ---------------------------

STUDY = [5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, SIZE]  # pixels
TICKS = [5, 7, 10, 14, 20, 28, 40, 56, SIZE]

# File, the entry of a row that it shows, and what that is.
PICTURES = [
    ("lfw-both.png", "both_accuracy", "accuracy, both images degraded"),
    ("lfw-cross.png", "cross_accuracy", "accuracy, one image degraded"),
    ("gradient.png", "gradient_norm", "norm of the classification gradient"),
]


def load_head(path, labels):
    """The head that was trained with a backbone; `labels` are those of the image folder."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "head" not in state or "args" not in state:
        raise UserError(f"{path}: holds no classifier, as a checkpoint of train.py does")
    options = state["args"]
    classes, embed_dim = state["head"]["weight"].shape
    images = int((labels < classes).sum())  # the identities that were held out come last
    if images != options["images"]:
        raise UserError(f"{path}: trained on {options['images']} images, but --data has {images}")
    head = lrfr.ArcFace(classes, embed_dim, options["scale"], options["margin"])
    head.load_state_dict(state["head"])
    return head


def gradient_norm(args, backbone, head, images, labels):
    """The norm of the gradient of the mean cross-entropy with respect to the backbone's weights."""
    amp = args.amp
    if evaluate.precision(args.device, amp) == torch.float16:
        amp = "off"  # float16 is too narrow for gradients that are not scaled
    backbone.zero_grad()
    for x, y in zip(images.split(64), labels.split(64)):
        with evaluate.autocast(args.device, amp):
            logits = head(backbone(x), y)
        loss = F.cross_entropy(logits, y, reduction="sum") / len(labels)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(backbone.parameters(), math.inf)  # clips nothing
    return norm.item()


def gradient_norms(args, name, backbone, head, paths, labels):
    """{(name, px): norm} on 256 images of the identities that the head knows, in eval mode."""
    chosen = evenly_spaced(np.flatnonzero(labels < len(head.weight)), 256)
    pixels = evaluate.read_images([paths[i] for i in chosen])
    images = lrfr.to_input(pixels, args.device)
    targets = torch.from_numpy(labels[chosen]).to(args.device)
    head.to(args.device)
    norms = {}
    for px in STUDY:
        norm = gradient_norm(args, backbone, head, lrfr.degrade(images, px), targets)
        print(f"{name}: norm of the gradient {norm:.3f} at {px} px", flush=True)
        norms[name, px] = norm
    return norms


def study(args):
    """Draws lfw-both.png, lfw-cross.png and gradient.png, and writes their numbers, study.jsonl."""
    benchmark = evaluate.read_lfw(args.lfw)
    paths, labels = train.image_folder(args.data)
    backbones = load_backbones(args)
    heads = [load_head(path, labels) for path in args.checkpoints]
    norms = {}
    for (name, backbone), head in zip(backbones.items(), heads):
        norms |= gradient_norms(args, name, backbone, head, paths, labels)
    rows = evaluate.evaluate(backbones, benchmark, STUDY, settings_of(args))
    for row in rows:
        row["gradient_norm"] = norms[row["checkpoint"], row["px"]]
    print(evaluate.table(rows))
    write_lines(args.out / "study.jsonl", rows)
    axis = {"xlabel": "resolution in pixels", "xscale": "log"}
    axis |= {"xticks": TICKS, "xticklabels": TICKS}
    for file_name, key, ylabel in PICTURES:
        curves = {}
        for name in backbones:
            values = [row[key] for row in rows if row["checkpoint"] == name]
            curves[name] = (STUDY, values)
        draw_lines(args.out / file_name, curves, ylabel=ylabel, **axis)


# ---- 3. The distances ----------------------------------------------------------------------------


def derivatives(args):
    """Draws derivatives.png: how the gradient of each distance grows with the error.

    Across: |d_i| in one dimension of 512, the others being 1. Up: the gradient in that dimension,
    as a multiple of what it is where |d_i| is 1, too.
    """
    error = torch.linspace(0.01, 2.5, 250)
    x = torch.ones(250, 512)
    x[:, 0] = error
    y = torch.zeros(250, 512)
    slopes = {
        "LogExp(1)": lrfr.logexp_grad(x, y, 1)[:, 0],
        "LogExp(2)": lrfr.logexp_grad(x, y, 2)[:, 0],
        "L1": torch.ones(250),
        "L2": error,
    }
    curves = {}
    for name, slope in slopes.items():
        curves[name] = (error, slope / slope[99])  # error[99] is 1
    xlabel = "error $|d_i|$ in one dimension, 1 in all others"
    ylabel = "gradient there, in multiples of that at 1"
    draw_lines(args.out / "derivatives.png", curves, xlabel=xlabel, ylabel=ylabel, ylim=(0, 5))


def errors(args):
    """Draws errors.png: how the distance is spread over the dimensions, at 7 px."""
    curves = {}
    for name, unit in embed_lfw(args, [7, SIZE]).items():
        error = (unit[SIZE] - unit[7]).abs()
        error = error * math.sqrt(error.shape[1])
        density, edges = np.histogram(error.numpy(), 60, (0, 4), density=True)
        middles = (edges[:-1] + edges[1:]) / 2
        curves[name] = (middles, density)
    xlabel = "distance in a dimension, times the root of their number"
    draw_lines(args.out / "errors.png", curves, xlabel=xlabel, ylabel="density")


def most_pictured(identity):
    """Up to eight images each of the twelve people with the most -> {index of image: colour}."""
    people = np.bincount(identity).argsort()[::-1]
    colours = {}
    for person, colour in zip(people, COLOURS):
        images = np.flatnonzero(identity == person)
        for image in images[:8]:
            colours[image] = colour
    return colours


def embeddings(args):
    """Draws embeddings-NAME.png: twelve people at four resolutions, in two dimensions."""
    benchmark = evaluate.read_lfw(args.lfw)
    colours = most_pictured(benchmark.identity)
    sources = [benchmark.sources[image] for image in colours]
    resolutions = [*LOW, SIZE]
    backbones = load_backbones(args)
    unit = evaluate.embed_sources(backbones, "LFW", sources, resolutions, settings_of(args))
    for name in backbones:
        x = torch.cat([unit[name, px] for px in resolutions])
        x = x - x.mean(0)
        _, _, directions = torch.linalg.svd(x, full_matrices=False)
        first, second = (directions[:2] @ x.T).numpy()
        figure, axes = start_picture()
        axes.set(xlabel="first principal component", ylabel="second principal component")
        axes.grid(alpha=0.3)
        markers = zip(resolutions, "ovsD", np.split(first, 4), np.split(second, 4))
        for px, marker, across, up in markers:
            axes.scatter(across, up, 16, list(colours.values()), marker=marker)
            axes.scatter([], [], 16, "black", marker=marker, label=f"{px} px")  # for the legend
        axes.legend(fontsize="small")
        save_picture(figure, args.out / f"embeddings-{name}.png")


# ---- 4. Why the form of the distance does not matter on unit embeddings --------------------------


def share_of_top_tenth(gradient, error):
    """How much of the L1 norm of a gradient falls on the tenth of the dimensions that err most.

    gradient, error: (N, D), not negative. Mean over the N pairs.
    """
    top = error.topk(error.shape[1] // 10).indices
    shares = gradient.gather(1, top).sum(1) / gradient.sum(1)
    return shares.mean().item()


def weigh(sharp, degraded, scale, p):
    """How LogExp(p) weighs the dimensions of embeddings times a scale -> entries of a JSON row.

    By Eq. (2) its gradient is that of L_p, 1/p sum |d_i|^p, times weights proportional to
    e^{|d_i|^p}. ratio: the largest weight of a pair over its smallest. Where |d_i| is large, a few
    pairs dominate its mean, and the median says more.
    """
    x = scale * sharp
    y = scale * degraded
    error = (x - y).abs()
    exponents = error.pow(p)
    ratio = (exponents.amax(1) - exponents.amin(1)).exp()
    gradient = lrfr.logexp_grad(x, y, p).abs()
    gradient_of_lp = error.pow(p - 1)
    return {
        "p": p,
        "scale": scale,
        "ratio_mean": ratio.mean().item(),
        "ratio_median": ratio.median().item(),
        "share": share_of_top_tenth(gradient, error),
        "share_of_lp": share_of_top_tenth(gradient_of_lp, error),
    }


def weights_line(rows):
    """A line of the table from the rows of one px and p at every scale."""
    first = rows[0]
    line = [f"{first['px']}", f"{first['mean_error']:.3f}, {first['max_error']:.3f}"]
    line.append(f"{first['p']}")
    for row in rows:
        line.append(f"{row['ratio_mean']:.3g} / {row['ratio_median']:.3g}")
    line.append(f"{first['share_of_lp']:.1%}")
    for row in rows:
        line.append(f"{row['share']:.1%}")
    return line


def weights(args):
    """Prints how LogExp weighs the dimensions of LFW's images, sharp against degraded."""
    headings = ["px", "mean, max of \\|d_i\\|", "p"]
    headings += ["ratio, s = 1", "s = 5", "s = √D", "s = 2 √D"]
    headings += ["share, L_p", "share, s = 1", "s = 5", "s = √D", "s = 2 √D"]
    everything = []
    for name, unit in embed_lfw(args, [*LOW, SIZE]).items():
        sharp = unit[SIZE].double()
        root = math.sqrt(sharp.shape[1])
        lines = []
        for px in LOW:
            degraded = unit[px].double()
            error = (sharp - degraded).abs()
            common = {"checkpoint": name, "images": len(sharp), "px": px}
            common["mean_error"] = error.mean().item()
            common["max_error"] = error.max().item()
            for p in (1, 2):
                rows = []
                for scale in (1, 5, root, 2 * root):
                    rows.append(common | weigh(sharp, degraded, scale, p))
                lines.append(weights_line(rows))
                everything += rows
        print(f"\n{name}, {len(sharp)} images. ratio: of the largest to the smallest weight of a")
        print("pair, mean / median. share: of the gradient, on the tenth of the dimensions that")
        print("err most.\n")
        print_table(headings, lines)
    if args.json:
        write_lines(args.json, everything)


# ---- 5. Cameras instead of bicubic resizing ------------------------------------------------------


def test_camera(pixels, px, rng):
    """Shows a face, (112, 112, 3) uint8 RGB, as a cheap camera with `px` rows of pixels on it does.

    This is the camera that tests; no setting is chosen by it. lrfr.photograph, which trains, takes
    the same steps in code of its own, within equal or wider ranges.

    The steps, in this order; how strong they are is drawn uniformly for each image:

    optical blur    Gaussian, sigma 0.3 to 0.7 pixels of the small image. (BSRGAN and Real-ESRGAN:
                    up to 2.8 and 3 of an image four times as large, 0.7 and 0.75 of the small one)
    area averaging  one of Real-ESRGAN's ways to shrink
    exposure        0.7 to 1.3 (GFPGAN: 0.5 to 1.5)
    white balance   red and blue, 0.9 to 1.1 each (gains in Brooks et al.: 12 % about the middle)
    shot noise      100 to 1,000 photons for white, log-uniform (BSRGAN: 100 to 10,000)
    read noise      standard deviation 2 to 10 of 255 (BSRGAN: 2 to 25, Real-ESRGAN: 1 to 30)
    JPEG            quality 30 to 50 (BSRGAN, Real-ESRGAN: 30 to 95), 4:2:0
    enlarging       bilinear (GFPGAN)

    Each range lies within the published one in brackets: for blur and JPEG at its bad end, for
    noise where a camera is cheap, not broken. Every step is taken each time, on sRGB values, as
    there. XQLFW shrinks LFW 2, 4 and 8 times, to about 14 pixels on a face: 7 are beyond it.
    BSRGAN: Zhang et al. 2021, utils/utils_blindsr.py. Real-ESRGAN: Wang et al. 2021,
    options/train_realesrgan_x4plus.yml. GFPGAN: Wang et al. 2021, gfpgan/data. Brooks et al. 2019:
    Unprocessing Images. XQLFW: Knoche et al. 2021, martlgap.github.io/xqlfw.
    """
    sigma = rng.uniform(0.3, 0.7) * SIZE / px
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma))
    image = image.resize((px, px), Image.Resampling.BOX)
    light = np.asarray(image) / 255
    light = light * rng.uniform(0.7, 1.3)
    light[:, :, 0] *= rng.uniform(0.9, 1.1)
    light[:, :, 2] *= rng.uniform(0.9, 1.1)
    photons = 10 ** rng.uniform(2, 3)
    light = rng.poisson(light * photons) / photons
    read_noise = rng.uniform(2, 10) / 255
    light = rng.normal(light, read_noise)
    small = (255 * light.clip(0, 1)).round().astype(np.uint8)
    jpeg = io.BytesIO()
    quality = int(rng.integers(30, 51))
    Image.fromarray(small).save(jpeg, "JPEG", quality=quality)
    return Image.open(jpeg).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def screening_camera(pixels, px, rng):
    """Shows a face as a third camera does, by which the settings of lrfr.photograph were chosen.

    None of its steps is of the same kind as theirs. Strengths are drawn uniformly for each image:

    defocus     a disc, radius 0.2 to 0.7 of the camera's pixels
    position    shifted by up to half a pixel of the camera in each direction
    gamma       0.7 to 1.4
    shrinking   Lanczos
    noise       uniform, standard deviation 0.01 to 0.08 of white
    WebP        quality 30 to 70
    enlarging   Hamming
    """
    radius = rng.uniform(0.2, 0.7) * SIZE / px
    y, x = np.mgrid[-56:56, -56:56]
    from_middle = np.hypot(x, y)
    disc = (from_middle <= radius).astype(float)
    disc = disc / disc.sum()
    defocus = np.fft.rfft2(np.fft.ifftshift(disc))
    down = rng.uniform(-0.5, 0.5) * SIZE / px
    right = rng.uniform(-0.5, 0.5) * SIZE / px
    vertical = np.fft.fftfreq(SIZE)[:, None]
    horizontal = np.fft.rfftfreq(SIZE)
    shift = np.exp(-2j * np.pi * (vertical * down + horizontal * right))
    lens = (defocus * shift)[:, :, None]
    spectrum = np.fft.rfft2(pixels / 255, axes=(0, 1))
    light = np.fft.irfft2(lens * spectrum, (SIZE, SIZE), axes=(0, 1))
    light = light.clip(0, 1) ** rng.uniform(0.7, 1.4)
    large = (255 * light).round().astype(np.uint8)
    image = Image.fromarray(large).resize((px, px), Image.Resampling.LANCZOS)
    light = np.asarray(image) / 255
    noise = rng.uniform(0.01, 0.08)
    light = light + 1.7 * rng.uniform(-noise, noise, light.shape)  # 1.7: about the root of 3
    small = (255 * light.clip(0, 1)).round().astype(np.uint8)
    webp = io.BytesIO()
    quality = int(rng.integers(30, 71))
    Image.fromarray(small).save(webp, "WEBP", quality=quality)
    return Image.open(webp).convert("RGB").resize((SIZE, SIZE), Image.Resampling.HAMMING)


def degrade_by(photograph, images, px):
    """Degrades a batch as lrfr.degrade does, but by a function like the two above.

    A face's own pixels seed what is drawn for it, so that it looks the same in every run.
    """
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    shown = []
    for face in pixels.cpu().numpy():
        rng = np.random.default_rng([zlib.crc32(face.tobytes()), px])
        shown.append(np.array(photograph(face, px, rng)))
    pixels = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
    return lrfr.to_input(pixels, images.device)


def faces(args):
    """Draws camera.png: eight faces of the demo, each above its degraded versions."""
    files = train.demo_faces(8, 1, seed=3).sources
    sharp = lrfr.to_input(evaluate.read_images(files), "cpu")
    torch.manual_seed(0)  # for lrfr.photograph
    rows, labels = [sharp], ["sharp"]
    for px in LOW:
        rows += [lrfr.degrade(sharp, px), lrfr.photograph(sharp, px)]
        rows += [degrade_by(test_camera, sharp, px)]
        labels += [f"{px} px, bicubic", "training camera", "test camera"]
    picture = make_grid((torch.cat(rows) + 1) / 2, nrow=8, padding=0)
    middles = SIZE * (np.arange(len(rows)) + 0.5)
    figure, axes = start_picture(height=4.3)
    axes.imshow(picture.permute(1, 2, 0).numpy(), aspect="auto")
    for row in (1, 4, 7):
        axes.axhline(row * SIZE, color="white", linewidth=4)
    axes.set(xticks=[], yticks=middles, yticklabels=labels, frame_on=False)
    axes.tick_params(length=0)
    save_picture(figure, args.out / "camera.png", dpi=150)  # noise makes large files


def mean_degraded_accuracy(rows):
    """The mean accuracy of rows at 7, 14 and 20 px, of both images degraded and of one."""
    accuracies = []
    for row in rows:
        if row["px"] in LOW:
            accuracies += [row["both_accuracy"], row["cross_accuracy"]]
    return float(np.mean(accuracies))


def compare(args, benchmark, photograph):
    """Verifies under bicubic degradation and under a camera, and prints both."""
    backbones = load_backbones(args)
    degradations = {"bicubic": lrfr.degrade, "camera": functools.partial(degrade_by, photograph)}
    everything, means = [], []
    for degradation, degrade in degradations.items():
        rows = evaluate.evaluate(
            backbones, benchmark, [*LOW, SIZE], settings_of(args), degrade=degrade
        )
        for row in rows:
            row["degradation"] = degradation
        everything += rows
        print(f"\nDegraded by: {degradation}")
        print(evaluate.table(rows), flush=True)
        for name in backbones:
            mean = mean_degraded_accuracy([row for row in rows if row["checkpoint"] == name])
            means.append([name, degradation, f"{100 * mean:.2f}"])
    if args.json:
        write_lines(args.json, everything)
    print_table(["checkpoint", "degraded by", "mean of both and cross at 7, 14, 20 px"], means)


def camera(args):
    """Verifies LFW's pairs as a cheap camera shows them, beside bicubic degradation."""
    compare(args, evaluate.read_lfw(args.lfw), test_camera)


def screen(args):
    """Verifies held-out people as a third camera shows them, to choose training options by."""
    paths, labels = train.image_folder(args.data)
    classes = len(set(labels)) - args.holdout
    if classes < 2:
        raise UserError(f"--holdout {args.holdout}: {args.data} has {len(set(labels))} people")
    for path in args.checkpoints:
        head = load_head(path, labels)
        if len(head.weight) != classes:
            raise UserError(f"{path}: trained on {len(head.weight)} people, not {classes}")
    kept = int((labels < classes).sum())  # the identities that were held out come last
    benchmarks = train.hold_out("held-out identities", paths[kept:], labels[kept:])
    if benchmarks:
        compare(args, benchmarks[0], screening_camera)


# ---- 6. Command line -----------------------------------------------------------------------------

# Command -> its options, apart from checkpoints and device.
COMMANDS = {
    study: ["lfw", "data", "out"],
    derivatives: ["out"],
    faces: ["out"],
    errors: ["lfw", "images", "out"],
    embeddings: ["lfw", "out"],
    weights: ["lfw", "images", "json"],
    camera: ["lfw", "json"],
    screen: ["data", "holdout", "json"],
}

# Option -> what argparse is told of it.
POSITIVE = evaluate.number(int, 1)
LFW_HELP = "folder with pairs.txt and Name/Name_0001.jpg, aligned"
DATA_HELP = "the image folder that the checkpoints were trained on"
IMAGES_HELP = "how many images of LFW to take (default: 512)"
OPTIONS = {
    "lfw": {"metavar": "DIR", "required": True, "help": LFW_HELP},
    "data": {"metavar": "FOLDER", "required": True, "help": DATA_HELP},
    "holdout": {"metavar": "N", "required": True, "type": POSITIVE, "help": "as for train.py"},
    "images": {"metavar": "N", "default": 512, "type": POSITIVE, "help": IMAGES_HELP},
    "out": {"metavar": "DIR", "required": True, "type": Path, "help": "draw here"},
    "json": {"metavar": "FILE", "help": "write the numbers here, too, as lines of JSON"},
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, options in COMMANDS.items():
        text = function.__doc__.split("\n\n")[0]
        command = commands.add_parser(function.__name__, help=text, description=text)
        command.set_defaults(function=function, out=None, json=None)
        if function not in (derivatives, faces):
            command.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
            evaluate.add_device_options(command)
        for name in options:
            command.add_argument(f"--{name}", **OPTIONS[name])
    args = parser.parse_args(argv)
    # What cannot be drawn or written fails now, not after an hour.
    if args.out and not find_spec("matplotlib"):
        raise UserError("drawing needs matplotlib, which is optional: pip install matplotlib")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.json and not os.path.exists(args.json):
        write_lines(args.json, [])
    if "device" in args:
        evaluate.use_device(args.device)
    args.function(args)


if __name__ == "__main__":
    evaluate.run(main)
