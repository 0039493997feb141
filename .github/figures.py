# SPDX-License-Identifier: MIT
"""The paper's analysis figures, and two more measurements, weights and camera:

python .github/figures.py study CHECKPOINT... --lfw DIR --data FOLDER --out DIR
python .github/figures.py derivatives --out DIR
python .github/figures.py errors CHECKPOINT... --lfw DIR --out DIR
python .github/figures.py embeddings CHECKPOINT --lfw DIR --out DIR
python .github/figures.py weights CHECKPOINT... --lfw DIR [--json FILE]
python .github/figures.py camera CHECKPOINT... --lfw DIR [--json FILE] [--faces FILE.png]

Checkpoints are called after their folders. Needs matplotlib.
"""

import argparse
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import lrfr
import train

SIZE = evaluate.SIZE
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
            raise ValueError(f"{path}: the folder of another checkpoint is called {name} as well")
        backbone = lrfr.load_backbone(path)
        backbones[name] = backbone.to(args.device, memory_format=torch.channels_last)
    return backbones


def embed(args, backbones, title, sources, resolutions, flip="sum"):
    """{(name, px): (n, D) unit embeddings} of n images at several resolutions."""
    return evaluate.embed_sources(
        backbones, title, sources, resolutions, args.device, args.amp, flip
    )


def evenly_spaced(items, count):
    """Up to `count` of the items, from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[i] for i in places.astype(int)]


def embed_lfw(args, resolutions):
    """{name: {px: unit embeddings}} of N (`--images`) of LFW's images, not mirrored."""
    sources = evenly_spaced(evaluate.read_lfw(args.lfw).sources, args.images)
    backbones = load_backbones(args)
    by_name = {name: {} for name in backbones}
    for (name, px), unit in embed(args, backbones, "LFW", sources, resolutions, "none").items():
        by_name[name][px] = unit
    return by_name


def start_picture(xlabel, ylabel):
    """A picture that can be read at a width of 480 pixels, and its axes."""
    figure = Figure((4.8, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def save_picture(figure, path):
    png = io.BytesIO()
    figure.savefig(png, dpi=200)
    evaluate.write_file(path, png.getvalue())
    print(path)


def draw_lines(path, curves, xlabel, ylabel, log_ticks=None):
    """Draws {label: (x, y)}; log_ticks are those of a logarithmic x axis."""
    figure, axes = start_picture(xlabel, ylabel)
    for i, (label, (x, y)) in enumerate(curves.items()):
        axes.plot(x, y, STYLES[i % 4], color=COLOURS[i % 12], label=label)
    if log_ticks is not None:
        axes.set(xscale="log", xticks=log_ticks, xticklabels=log_ticks)
        axes.minorticks_off()
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
    lines = [json.dumps(row) + "\n" for row in rows]
    evaluate.write_file(path, "".join(lines).encode())


# ---- 2. The resolution study: accuracy and gradient against resolution ---------------------------

STUDY = [5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, SIZE]  # pixels
TICKS = [5, 7, 10, 14, 20, 28, 40, 56, SIZE]

# File, the entry of a row that it shows, and the labels of both axes.
PICTURES = [
    ("lfw-both.png", "both_accuracy", "resolution of both images in pixels", "accuracy"),
    ("lfw-cross.png", "cross_accuracy", "resolution of one image in pixels", "accuracy"),
    (
        "gradient.png",
        "gradient_norm",
        "resolution in pixels",
        "norm of the classification gradient",
    ),
]


def load_head(path, labels):
    """The head that was trained with a backbone; `labels` are those of the image folder."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "head" not in state or "args" not in state:
        raise ValueError(f"{path}: holds no classifier, as a checkpoint of train.py does")
    options = state["args"]
    classes, embed_dim = state["head"]["weight"].shape
    images = int((labels < classes).sum())  # the identities that were held out come last
    if images != options["images"]:
        raise ValueError(f"{path}: trained on {options['images']} images, but --data has {images}")
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
    rows = evaluate.evaluate(backbones, benchmark, STUDY, args.device, args.amp)
    for row in rows:
        row["gradient_norm"] = norms[row["checkpoint"], row["px"]]
    print(evaluate.table(rows))
    write_lines(args.out / "study.jsonl", rows)
    for file_name, key, xlabel, ylabel in PICTURES:
        curves = {}
        for name in backbones:
            values = [row[key] for row in rows if row["checkpoint"] == name]
            curves[name] = (STUDY, values)
        draw_lines(args.out / file_name, curves, xlabel, ylabel, TICKS)


# ---- 3. The distances ----------------------------------------------------------------------------


def derivatives(args):
    """Draws derivatives.png: how steep each distance is in one dimension, the others being 1."""
    error = torch.linspace(0.005, 1.5, 300)
    x = torch.ones(300, 512)
    x[:, 0] = error
    y = torch.zeros(300, 512)
    slopes = {
        "L1": torch.ones(300),
        "smooth L1": error.clamp(max=1),
        "L2": error,
        "LogExp(1)": lrfr.logexp_grad(x, y, 1)[:, 0],
        "LogExp(2)": lrfr.logexp_grad(x, y, 2)[:, 0],
    }
    curves = {}
    for name, slope in slopes.items():
        curves[name] = (error, slope / slope[199])  # error[199] is 1
    xlabel = "distance in one of 512 dimensions"
    ylabel = "first derivative, over that at 1"
    draw_lines(args.out / "derivatives.png", curves, xlabel, ylabel)


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
    draw_lines(args.out / "errors.png", curves, xlabel, "density")


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
    backbones = load_backbones(args)
    (name,) = backbones
    resolutions = [*LOW, SIZE]
    unit = embed(args, backbones, "LFW", sources, resolutions)
    x = torch.cat([unit[name, px] for px in resolutions])
    x = x - x.mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    first, second = directions[:2] @ x.T
    figure, axes = start_picture("first principal component", "second principal component")
    markers = zip(resolutions, "ovsD", first.chunk(4), second.chunk(4))
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


# ---- 5. A cheap camera ---------------------------------------------------------------------------


def photograph(pixels, px, rng):
    """Shows a face, (112, 112, 3) uint8 RGB, as a cheap camera with `px` rows of pixels on it does.

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


class Photographs:
    """Faces as the camera shows them: item i is a PNG file in memory, the same in every run."""

    def __init__(self, sources, px):
        self.sources = sources
        self.px = px

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i):
        rng = np.random.default_rng([i, self.px])
        png = io.BytesIO()
        pixels = evaluate.read_image(self.sources[i])
        photograph(pixels, self.px, rng).save(png, "PNG", compress_level=1)
        return png.getvalue()


def draw_faces(path):
    """Draws eight faces of the demo, each above its photographs."""
    files = train.demo_faces(8, 1, seed=3).sources
    rows = list(files)
    for px in LOW:
        photographs = Photographs(files, px)
        rows += [photographs[i] for i in range(8)]
    faces = make_grid(evaluate.read_images(rows), nrow=8, padding=0)
    figure = Figure((4.8, 2.35), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(faces.permute(1, 2, 0))
    middle = SIZE * (np.arange(4) + 0.5)
    axes.set(xticks=[], yticks=middle, yticklabels=["sharp", "7 px", "14 px", "20 px"])
    save_picture(figure, path)


def camera(args):
    """Verifies LFW's pairs as a cheap camera shows them, beside bicubic degradation."""
    benchmark = evaluate.read_lfw(args.lfw)
    backbones = load_backbones(args)
    if args.faces:
        draw_faces(args.faces)
    bicubic = embed(args, backbones, "LFW", benchmark.sources, [*LOW, SIZE])
    rows = []
    for px in LOW:
        photographs = Photographs(benchmark.sources, px)
        photographed = embed(args, backbones, f"camera, {px} px", photographs, [SIZE])
        for name in backbones:
            sharp = bicubic[name, SIZE]
            versions = {"bicubic": bicubic[name, px], "camera": photographed[name, SIZE]}
            for degradation, degraded in versions.items():
                row = {"set": "LFW", "checkpoint": name, "px": px, "degradation": degradation}
                row |= evaluate.verify(degraded, degraded, benchmark, "both")
                row |= evaluate.verify(sharp, degraded, benchmark, "cross")
                rows.append(row)
    if args.json:
        write_lines(args.json, rows)
    print("\nLFW: accuracy, its standard deviation over ten folds, TAR at FAR 1e-3, in %\n")
    headings = ["px", "checkpoint", "degraded by", "both", "std", "TAR", "cross", "std", "TAR"]
    keys = ["px", "checkpoint", "degradation", "both_accuracy", "both_std", "both_tar"]
    keys += ["cross_accuracy", "cross_std", "cross_tar"]
    lines = []
    for row in rows:
        lines.append([evaluate.cell(key, row[key]) for key in keys])
    print_table(headings, lines)


# ---- 6. Command line -----------------------------------------------------------------------------


def add_command(commands, function, checkpoints="+"):
    """Adds a subcommand that is called like its function -> its parser."""
    text = function.__doc__.split("\n\n")[0]
    command = commands.add_parser(function.__name__, help=text, description=text)
    command.set_defaults(function=function, json=None, out=None)
    if checkpoints:
        command.add_argument("checkpoints", nargs=checkpoints, metavar="CHECKPOINT")
        text = "folder with pairs.txt and Name/Name_0001.jpg, aligned"
        command.add_argument("--lfw", metavar="DIR", required=True, help=text)
        evaluate.add_device_options(command)
    return command


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    drawing = {
        "study": add_command(commands, study),
        "derivatives": add_command(commands, derivatives, checkpoints=None),
        "errors": add_command(commands, errors),
        "embeddings": add_command(commands, embeddings, checkpoints=1),
    }
    for command in drawing.values():
        command.add_argument("--out", metavar="DIR", type=Path, required=True, help="draw here")
    text = "the image folder that the checkpoints were trained on"
    drawing["study"].add_argument("--data", metavar="FOLDER", required=True, help=text)
    measuring = {
        "weights": add_command(commands, weights),
        "camera": add_command(commands, camera),
    }
    for command in measuring.values():
        text = "write the numbers here, too, as lines of JSON"
        command.add_argument("--json", metavar="FILE", help=text)
    text = "draw eight of the demo's faces and their photographs here"
    measuring["camera"].add_argument("--faces", metavar="FILE.png", help=text)
    images = evaluate.number(int, 1)
    for command in (drawing["errors"], measuring["weights"]):
        text = "how many images of LFW to take (default: 512)"
        command.add_argument("--images", metavar="N", type=images, default=512, help=text)
    args = parser.parse_args(argv)
    if args.out:  # what cannot be written fails now, not after an hour
        args.out.mkdir(parents=True, exist_ok=True)
    if args.json:
        open(args.json, "ab").close()
    evaluate.keep_memory()
    args.function(args)


if __name__ == "__main__":
    evaluate.run(main)
