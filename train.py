# SPDX-License-Identifier: MIT
"""Train a face recogniser on sharp and degraded faces: python train.py --data ms1m --maug 1:1:2

Without --data it draws its own faces. `--maug none --loss none` is the paper's baseline. A run
leaves in its folder: last.pt (weights and arguments), log.jsonl, and faces.png: what it learns.
"""
import argparse
import io
import json
import math
import os
import signal
import time
from datetime import timedelta
from errno import EINVAL
from functools import partial
from timeit import repeat

import numpy as np
import torch
from PIL import Image
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.utils import save_image

from evaluate import (RESOLUTIONS, SIZE, add_device_options, autocast, evaluate, image_folder,
                      keep_memory, make_pairs, no_bomb, number, precision, read_bin, read_image,
                      run, table, write_file)
from lrfr import (DEPTHS, LRFR, ArcFace, IResNet, MAug, degrade, l1_loss, l2_loss, load_backbone,
                  logexp_loss, parse_ratio, to_input)

RANK = int(os.environ.get("RANK", "0"))  # this one among torchrun's processes
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
MAGIC = 0xced7230a  # the first four bytes of each record of a RecordIO file
say = partial(print, flush=True) if RANK == 0 else lambda text: None
all_reduce = distributed.all_reduce if RANKS > 1 else lambda values: None  # sum over ranks

# ---- 1. Data ------------------------------------------------------------------------------------
class Faces(Dataset):
    """Labelled faces: item i is (3, 112, 112) uint8 RGB, its label, and a text: "", or what was
    wrong with image i; in place of one that cannot be read comes the next that can. read: one of
    `sources` -> a path, or the bytes of an image file; as they are, if left out."""
    def __init__(self, name, sources, labels, read=os.fspath):
        self.name, self.sources, self.labels, self.read = name, sources, np.asarray(labels), read

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        wrong = ""
        for j in np.arange(i, i + 100) % len(self):
            try:
                image = read_image(self.read(self.sources[j]), f"{self.name}, image {j}")
                return image, int(self.labels[j]), wrong
            except ValueError as error:
                wrong = wrong or str(error)  # of image i; the others have their turns
        return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), 0, wrong

def read_record(path, offset):
    """The image file in the record at a byte offset; opens anew, so that nothing is shared."""
    parts, flag = [], 1
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while flag in (1, 2):  # 0 is a whole record; 1, then some 2, then 3 are parts of one
            magic, word = np.frombuffer(file.read(8).ljust(8), "<u4").tolist()
            flag, length = divmod(word, 1 << 29)
            parts.append(file.read(length + -length % 4)[:length])  # padded to four bytes
            if magic != MAGIC or flag > 3 or len(parts[-1]) < length:
                raise ValueError(f"{path}: no whole record at byte {offset}")
    payload = MAGIC.to_bytes(4, "little").join(parts)  # it was split where it holds the magic
    return payload[24 + 4 * int.from_bytes(payload[:4], "little"):]  # behind its labels

def read_labels(path, offsets):
    """The first label of each of n records, (n,) float32, and whether there is an image, too."""
    heads = bytearray()
    with open(path, "rb", buffering=0) as file:
        for offset in offsets.tolist():
            file.seek(offset)
            heads += file.read(36).ljust(36)
    magic, length, count, label, *_, first = np.frombuffer(heads, "<u4").reshape(-1, 9).T
    if (magic != MAGIC).any():
        raise ValueError(f"{path}: no record at byte {offsets[magic != MAGIC][0]}: damaged?")
    return np.where(count, first, label).view("<f4"), length > 24 + 4 * count.astype(int)

def record_file(root):
    """`root`/train.rec and train.idx -> byte offsets (n,) of images, labels (n,), and what reads an
    image. InsightFace's hold a header with the key behind the last image, the images, then a record
    for each identity with the key of its first: few reads tell all. im2rec's hold images alone."""
    path, index = os.path.join(root, "train.rec"), os.path.join(root, "train.idx")
    try:
        lines = np.loadtxt(index, np.int64, ndmin=2) if os.path.getsize(index) else np.empty(0)
        keys, offsets = lines.T
        if not 0 <= offsets.min() <= (last := offsets.max()) < os.path.getsize(path) - 7:
            raise ValueError("some are outside of train.rec; is it cut short?")
    except ValueError as error:
        raise ValueError(f"{index}: not lines of a key and a byte offset: {error}") from None
    if np.fromfile(path, "<u4", 2, offset=last)[1] < min(2**29, os.path.getsize(path) - last - 15):
        raise ValueError(f"{index}: cut short: {path} goes on behind its last record")
    (header,), (image,) = read_labels(path, offsets[:1])
    end = len(keys) if image else np.searchsorted(keys, header)  # of the images
    firsts = np.searchsorted(keys, read_labels(path, offsets[end:])[0])  # of each identity
    counts = np.diff(firsts, append=end)  # images of each
    if len(firsts) and keys[-1] < 2**24 and firsts[0] == 1 and (counts > 0).all():
        offsets, labels = offsets[1:end], read_labels(path, offsets[firsts])[0].repeat(counts)
    else:  # im2rec's, or keys that float32 cannot hold
        labels, images = read_labels(path, offsets)
        offsets, labels = offsets[images], labels[images]
    if not len(labels) or not ((labels >= 0) & (labels < len(labels)) & (labels % 1 == 0)).all():
        raise ValueError(f"{path}: labels out of range: expected 0 to {len(labels) - 1} or less")
    return offsets, labels.astype(np.int32), partial(read_record, path)

SKIN, HAIR, IRIS, LIPS, WHITE = range(5)
PALETTE = torch.tensor([[78, 60, 46], [30, 24, 18], [30, 28, 30], [68, 34, 34], [94, 94, 94]]) / 100
FACE = [  # which traits, colour, shade; x (twice, if not 0), y, half width and height; depth; bend
    (0, HAIR, 1.0, 0, -0.16, 0.7, 0.72, -0.6, 0), (1, HAIR, 1.0, 0, 0.1, 0.64, 0.7, -0.8, 0),
    (2, SKIN, 0.8, 0, 0.95, 0.34, 0.5, -0.8, 0), (2, SKIN, 0.85, 0.58, 0.02, 0.08, 0.16, -0.5, 0),
    (2, SKIN, 1.0, 0, 0.02, 0.56, 0.76, 0.2, 0), (3, SKIN, 1.0, 0, 0.34, 0.47, 0.44, 0.2, 0),
    (4, HAIR, 1.0, 0.06, -0.66, 0.5, 0.22, 0.1, -0.2),  # fringe; then round the eye, eye, pupil
    (5, SKIN, 0.8, 0.25, -0.08, 0.135, 0.09, 0.3, 0), (5, WHITE, 1, 0.25, -0.08, 0.1, 0.05, 0.4, 0),
    (5, IRIS, 1, 0.25, -0.08, 0.05, 0.05, 0.4, 0), (5, IRIS, 0.2, 0.25, -0.08, 0.02, 0.02, 0.4, 0),
    (6, HAIR, 0.8, 0.26, -0.24, 0.16, 0.03, 0.4, -0.8),  # brow; then nose, lips, and between them
    (7, SKIN, 1.06, 0, 0.12, 0.05, 0.2, 0.8, 0), (7, SKIN, 0.8, 0, 0.29, 0.1, 0.05, 0.9, 0),
    (8, LIPS, 1, 0, 0.53, 0.2, 0.055, 0.6, 0.5), (8, LIPS, 0.45, 0, 0.53, 0.17, 0.02, 0.6, 0.5)]

def draw_faces(traits, rng):
    """Traits (N, 13, 5) of people, in [-1, 1] -> (N, 112, 112, 3) uint8, one picture of each: soft
    ellipses, in units of half a picture, with pose, expression, light, background and noise."""
    n, t = len(traits), traits[..., None, None]  # each trait is (N, 1, 1)
    yaw, pitch, roll, near, right, down, smile, lit_x, lit_y, bright, warm = torch.randn(
        11, n, 1, 1, generator=rng).clamp(-2, 2)
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    x, y, size = u - 0.05 * right, v - 0.05 * down - 0.05, 1.15 + 0.06 * near
    cos, sin = (0.1 * roll).cos() / size, (0.1 * roll).sin() / size
    x, y = x * cos + y * sin, y * cos - x * sin
    palette = PALETTE * (1 + 0.2 * traits[:, 9, :, None]) + 0.02 * traits[:, 10:13].mT
    canvas = 0.5 + 0.2 * torch.randn(n, 3, 1, 1, generator=rng) + 0.1 * (v * lit_y)[:, None]
    for group, colour, shade, x0, y0, wide, tall, depth, bend in FACE:
        move_x, move_y, wider, taller, bent = t[:, group].unbind(1)
        rx, ry = wide * (1 + 0.16 * wider), tall * (1 + 0.2 * taller)
        bend = bend + 0.2 * bent + 0.6 * smile * (colour == LIPS)
        for side in (1, -1) if x0 else (1,):  # what is nearer moves further when the head turns
            dx = x - side * x0 * (1 + 0.16 * move_x) - 0.06 * depth * yaw
            dy = y - y0 - 0.04 * move_y - 0.05 * depth * pitch
            outside = ((dx / rx).square() + ((dy + bend * dx.square()) / ry).square()).sqrt() - 1
            inside = torch.sigmoid(-100 * outside * torch.minimum(rx, ry))
            canvas = torch.lerp(canvas, shade * palette[:, colour, :, None, None], inside[:, None])
    light = 1 + 0.2 * bright + 0.25 * lit_x * u + 0.15 * lit_y * v
    canvas = canvas * torch.stack([light + 0.07 * warm, light, light - 0.07 * warm], 1)
    canvas = canvas + 0.03 * torch.randn(canvas.shape, generator=rng)
    return (canvas.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)

def demo_faces(people, pictures, seed):
    """Synthetic people, with so many pictures of each, as Faces whose sources are JPEG files."""
    rng, files = torch.Generator().manual_seed(seed), []
    traits = torch.rand(people, 13, 5, generator=rng) * 2 - 1
    for part in traits.repeat_interleave(pictures, 0).split(32):
        for pixels in draw_faces(part, rng).numpy():
            Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=90)
            files.append(file.getvalue())
    return Faces("demo", np.array(files, object), np.arange(people).repeat(pictures))

def open_data(name, holdout):
    """--data -> the identities to train on, those held out, and the .bin sets beside them."""
    if name == "demo":
        say("drawing the demo's faces")
        return demo_faces(300, 20, seed=1), demo_faces(40, 10, seed=2), []
    root = next(filter(os.path.isdir, (name, os.path.join("data", name))), None)
    if root is None:
        raise ValueError(f"--data {name}: no folder {name}, no data/{name} with identity/"
                         "image.jpg or train.rec; MS1M: github.com/deepinsight/insightface/wiki/"
                         "Dataset-Zoo; or try --data demo")
    packed = os.path.exists(os.path.join(root, "train.rec"))
    sources, labels, *read = record_file(root) if packed else image_folder(root)
    classes = int(labels.max(initial=-1)) + 1
    holdout = min(100, classes // 20) * (classes >= 40) if holdout is None else holdout
    first = classes - holdout  # of those held out: by default two or more, or none of few
    if first < 2 or labels.min() >= first:
        raise ValueError(f"{root}: {len(labels)} images of {classes} identities, --holdout "
                         f"{holdout}: two or more must be left, as identity/image.jpg")
    kept = labels < first
    bins = [read_bin(os.path.join(root, x)) for x in sorted(os.listdir(root))
            if packed and x.endswith(".bin")]
    return (Faces(root, sources[kept], labels[kept], *read),
            Faces(root, sources[~kept], labels[~kept] - first, *read), bins)

def jitter(images, strength):
    """Turns, shifts, scales, lights each of (N, 3, H, W) uint8: few faces are learnt by heart."""
    change = v2.Compose([v2.RandomAffine(9 * strength, [strength / 20] * 2, (
        1 - 0.15 * strength, 1 + 0.15 * strength), interpolation=v2.InterpolationMode.BILINEAR,
        fill=127), v2.ColorJitter(0.3 * strength, 0.3 * strength)])
    return torch.cat([change(image) for image in images.split(1)]) if strength else images

def batches(images, batch_size, seed, steps):
    """Yields the images of each of `steps`; every epoch has a new order, every rank its share."""
    for step in steps:
        epoch, i = divmod(step, images // batch_size)
        if i == 0 or step == steps[0]:
            order = np.random.default_rng([seed, epoch]).permutation(images)
        yield order[i * batch_size:][:batch_size][RANK::RANKS]

# ---- 2. Training --------------------------------------------------------------------------------
DEMO = "--backbone r10 --width 16 --scale 32 --margin 0.3 --epochs 5 --batch-size 64 --lr 0.1"
WEIGHTS = {"logexp": 300.0, "l1": 16.0, "l2": 180.0}  # as strong as each other at a cosine of 0.5

def parse_arguments(argv):
    parser = argparse.ArgumentParser(epilog=f"With the demo: {DEMO}", description=__doc__.split(
        "\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    def add(name, default, text, kind=None, **options):
        parser.add_argument(name, default=default, help=text, type=kind, **options)
    add("--data", "demo", "folder of identity/image.jpg, or of train.rec; demo: drawn faces")
    add("--maug", "1:1:2", "ratio of the resolutions, or none")
    add("--resolutions", [7, 14, 20], "of MAug, in pixels", number(int, 1, SIZE), nargs="+")
    add("--loss", "logexp", "distance between the two", choices=["logexp", "l1", "l2", "none"])
    add("--p", 1.0, "exponent of the LogExp distance", number(float, 1))
    add("--weight", None, f"lambda of the distance; None: {WEIGHTS}", number(float, 0))
    add("--pull", "degraded", "embeddings that the distance moves", choices=["degraded", "both"])
    add("--backbone", "r50", "depth of the IResNet", choices=[f"r{depth}" for depth in DEPTHS])
    add("--width", 64, "channels of its first stage; oneDNN crashes under 16", number(int, 16, 999))
    add("--scale", 64.0, "s of ArcFace", number(float, 0))
    add("--margin", 0.5, "m of ArcFace, in radians", number(float, 0, 1.5))
    add("--epochs", 20, "passes over the data", number(int, 1))
    add("--batch-size", 128, "faces per step, over all processes", number(int, 2))
    add("--lr", 0.02, "highest learning rate", number(float, 0))
    add("--jitter", 0.0, "strength of random crops and light", number(float, 0, 5))
    add("--init", None, "checkpoint, or InsightFace weights, to begin with", metavar="FILE")
    add("--holdout", None, "identities for the final table; None: 5 %%, up to 100", number(int, 0))
    add("--out", None, "folder of the run; None: runs/ and a name made of the arguments")
    add("--save-every", 2000, "steps between checkpoints; epochs end with one", number(int, 1))
    add("--workers", 1, "processes that decode images", number(int, 0, 256))
    add("--seed", 0, "of everything random", number(int, 0, 2**40))
    add("--profile", 0, "time so many steps, show where the time goes, and end", number(int, 0))
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.data == "demo":  # other defaults
        args = parser.parse_args(argv, parser.parse_args(DEMO.split()))
    if args.maug == "none" and args.loss != "none":
        parser.error("--maug none leaves no degraded faces to compare with: add --loss none")
    args.weight = WEIGHTS.get(args.loss, 0.0) if args.weight is None else args.weight
    data, maug = os.path.basename(os.path.normpath(args.data)), args.maug.replace(":", "_")
    args.out = args.out or f"runs/{data}-{args.backbone}-{maug}-{args.loss}-seed{args.seed}"
    return args

def learning_rate(step, steps, peak):
    """Up linearly for the first twentieth of the steps, then linearly down to zero."""
    return peak * min((step + 1) / math.ceil(steps / 20), (steps - step) / (steps - steps // 20))

def resume(args, parts):
    """Loads the run's newest whole checkpoint, which must agree with args -> its step, or 0."""
    found, free = [{"step": 0}], {"epochs", "out", "workers", "device", "amp", "save_every"}
    paths = [os.path.join(args.out, name) for name in ("last.pt", "previous.pt")]
    for path in filter(os.path.exists, paths if RANK == 0 else ()):
        try:
            state = torch.load(no_bomb(path), map_location="cpu", weights_only=True)
            step, old = int(state["step"]), dict(state["args"])
        except Exception as error:  # of a dozen kinds, for a damaged file
            if isinstance(error, MemoryError) or getattr(error, "errno", EINVAL) != EINVAL:
                raise  # it may be whole, but for EINVAL: torch seeks before the begin of a cut one
            os.replace(path, f"{path}.damaged")
            say(f"{path} is damaged: passed over, and set aside as {path}.damaged")
            continue
        for key, new in vars(args).items():
            if key not in free and old.get(key) != new:
                raise ValueError(f"{path} was made with {key} {old.get(key)}, not {new}: give the "
                                 "same, or another --out")
        say(f"going on from step {step:,} of {path}")
        found = [state]
        break
    if RANKS > 1:  # all go on from what the first has found
        distributed.broadcast_object_list(found)
    try:
        for key, part in parts.items() if found[0]["step"] else ():
            if key != "scaler" or found[0][key]:  # it has a state in float16 alone
                part.load_state_dict(found[0][key])
    except Exception:  # of a dozen kinds again
        raise ValueError(f"{args.out}: its checkpoint does not fit this model") from None
    return found[0]["step"]

def show_profile(ends, args, model, images, labels):
    """Where the time of the last steps went; their arithmetic, compared with a matrix product's."""
    parts, ends = zip(*ends[-6 * args.profile - 1:])  # a step has six parts
    spent = np.diff(ends).reshape(-1, 6).mean(0)
    seconds = spent.sum()
    for part, own in zip(parts[1:], spent):
        say(f"{part:>24} {1000 * own:9.1f} ms {own / seconds:6.1%}")
    with FlopCounterMode(display=False) as counter, autocast(args.device, args.amp):
        model(images, labels)
    work = 3e-9 * counter.get_total_flops()  # GFLOP; backward takes twice what forward takes
    matrix = torch.randn(4096, 4096, device=args.device, dtype=precision(args.device, args.amp))
    products = repeat(lambda: float((matrix @ matrix)[0, 0]), number=1, repeat=7)  # float waits
    rate = 2e-9 * 4096 ** 3 / np.median(products)
    say(f"{seconds:.3f} s a step, {len(images) / seconds:.1f} pairs/s, {work:,.0f} GFLOP: "
        f"{work / seconds:,.0f} GFLOP/s, {work / seconds / rate:.0%} of a matrix product's "
        f"{rate:,.0f} in {matrix.dtype}")

def on_signal(handler, *_):
    """Sets what Ctrl-C and SIGTERM do, in a worker, too: they may go to the whole group."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, handler)

def main(argv=None):
    """The whole run, from the arguments to the last table; returns the trained model."""
    if RANKS > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    args = parse_arguments(argv)
    keep_memory()
    if RANKS > 1:
        args.device = torch.device(args.device.type)  # each has its own, whichever was named
        backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=3))  # rank 0 may evaluate
    torch.manual_seed(args.seed)
    faces, held_out, bins = open_data(args.data, args.holdout)
    args.images, args.classes = len(faces), int(faces.labels.max()) + 1
    per_epoch = len(faces) // args.batch_size
    whole = [i for i in range(len(held_out)) if not held_out[i][2]]  # readable ones
    files = [held_out.read(held_out.sources[i]) for i in whole]
    at_the_end = [make_pairs("held-out identities", files, held_out.labels[whole])] if files else []
    backbone = (load_backbone(no_bomb(args.init)) if args.init else  # a file tells depth and width
                IResNet(int(args.backbone[1:]), args.width))
    head = ArcFace(args.classes, backbone.fc.out_features, args.scale, args.margin)
    maug = None if args.maug == "none" else MAug(args.resolutions, parse_ratio(args.maug))
    distances = {"logexp": partial(logexp_loss, p=args.p), "l1": l1_loss, "l2": l2_loss}
    model = LRFR(backbone, head, maug, distances.get(args.loss), args.weight, args.pull == "both")
    model = model.train().to(args.device, memory_format=torch.channels_last)
    if not per_epoch or args.batch_size < 2 * RANKS or args.batch_size % RANKS:
        raise ValueError(f"--batch-size {args.batch_size}: there are {len(faces)} images, and "
                         f"{RANKS} processes, each of which takes as many, two or more")
    optimiser = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    fp16 = precision(args.device, args.amp) == torch.float16
    scaler = torch.amp.GradScaler(args.device.type, enabled=fp16)
    parts = {"backbone": backbone, "head": head, "optimiser": optimiser, "scaler": scaler}
    begin = 0 if args.profile else resume(args, parts)
    steps = args.profile + 5 if args.profile else per_epoch * args.epochs  # five steps warm up
    parallel = model if RANKS == 1 else torch.nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True)
    order = batches(len(faces), args.batch_size, args.seed, range(begin, steps))
    loader = DataLoader(faces, batch_sampler=order, pin_memory=args.device.type == "cuda",
                        num_workers=args.workers, worker_init_fn=partial(on_signal, signal.SIG_IGN))
    last, arguments = os.path.join(args.out, "last.pt"), {**vars(args), "device": str(args.device)}
    if RANK == 0 and not args.profile:  # a picture of eight faces, each above its degraded versions
        chosen = [faces[i][0] for i in np.linspace(0, len(faces) - 1, 8).astype(int)]
        sharp = to_input(torch.stack(chosen), "cpu")
        rows = torch.cat([sharp, *(degrade(sharp, px) for px in args.resolutions)])
        save_image((rows + 1) / 2, png := io.BytesIO(), "PNG", nrow=8, padding=0)
        write_file(os.path.join(args.out, "faces.png"), png.getvalue())

    def report(text, **entry):
        """A line for the reader, and one of JSON for the log."""
        if RANK == 0 or "skipped" in entry:
            print(text, flush=True)
        if RANK == 0 and not args.profile:
            with open(os.path.join(args.out, "log.jsonl"), "a") as file:
                print(json.dumps(entry), file=file)

    def test(benchmarks, step):
        trained = {args.out: backbone.eval()}
        for data in benchmarks if RANK == 0 else []:
            rows, _ = evaluate(trained, data, RESOLUTIONS, args.device, args.amp)
            report(table(rows), step=step, evaluation=rows)
        backbone.train()

    def lap(part, *_):
        if args.profile:
            torch.zeros(1, device=args.device).item()  # waits for the device
            ends.append((part, time.perf_counter()))

    report(f"{len(faces):,} images of {args.classes:,} identities; run: {args.out}", args=arguments)
    stops, ends = [], []  # signals that have come in; when which part of a step was done
    if args.profile:
        backbone.register_forward_pre_hook(partial(lap, "crops, flips and MAug"))
        backbone.register_forward_hook(partial(lap, "backbone, forward"))
        backbone.register_full_backward_pre_hook(partial(lap, "head and losses"))
    else:
        on_signal(lambda name, _: stops.append(name))
    logged, bad, losses = time.time(), set(), []  # last line; what was wrong; losses since the line
    for step, (images, labels, errors) in enumerate(loader, begin + 1):
        for error in {*errors} - {"", *bad}:
            bad.add(error)
            report(f"skipped: {error}", step=step, skipped=error, bad=len(bad))
            if len(bad) > len(faces) / 1000:
                raise ValueError(f"more than 1 in 1,000 of {len(faces):,} images are bad: {error}")
        lap("reading and decoding")
        # What is drawn depends on seed, step and rank alone: a resumed run draws the same.
        torch.manual_seed((args.seed * 1_000_003 + step - 1 + RANK * 7_919_000_003) % 2**63)
        lr = optimiser.param_groups[0]["lr"] = learning_rate(step - 1, steps, args.lr)
        images, labels = (x.to(args.device, non_blocking=x.is_pinned()) for x in (images, labels))
        images = to_input(jitter(images, args.jitter), args.device)
        with autocast(args.device, args.amp):
            loss, values = parallel(images, labels)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        lap("backbone, backward")
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        scaler.step(optimiser)
        scaler.update()
        lap("optimiser")
        losses.append(torch.stack([loss.detach(), *values.values()]))
        epoch, epoch_ends = math.ceil(step / per_epoch), step % per_epoch == 0
        save_now = epoch_ends or step % args.save_every == 0
        stop = torch.tensor(len(stops))  # on the CPU, so that no GPU waits for it
        all_reduce(stop)  # a signal to one stops all
        if args.profile or not (len(losses) == 20 or save_now or stop):
            continue
        means = torch.stack(losses).mean(0) / RANKS
        all_reduce(means)
        values = dict(zip(["loss", *values], means.tolist()))  # waits for the device
        if not math.isfinite(values["loss"]) and scaler.get_scale() <= 1:  # float16's may help
            raise ValueError(f"loss is {values['loss']} at step {step}, learning rate {lr:.3g}; "
                             f"lower it, in a new --out. Last good checkpoint, if any: {last}")
        shown = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
        rate = len(losses) * args.batch_size / (time.time() - logged)
        left = timedelta(0, (steps - step) * args.batch_size // rate)
        report(f"epoch {epoch}/{args.epochs}  step {step:,}/{steps:,}  {shown}  lr {lr:.4f}  "
               f"{rate:.0f} images/s  {left} left",
               epoch=epoch, step=step, **values, lr=lr, images_per_s=rate)
        if RANK == 0 and (save_now or stop):
            state = {key: part.state_dict() for key, part in parts.items()}
            with io.BytesIO() as file:  # frees its memory
                torch.save({**state, "step": step, "args": arguments}, file)
                write_file(last, file.getvalue(), previous=os.path.join(args.out, "previous.pt"))
        if epoch_ends:
            test(bins, step)
        if stop:
            say(f"stopped at step {step}, saved in {last}: the same command goes on from there")
            all_reduce(stop)  # the others wait until it is saved
            raise SystemExit(128 + (stops or [signal.SIGTERM])[0])  # it may be another rank's
        losses, logged = [], time.time()
    if args.profile:
        return show_profile(ends, args, model, images, labels)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # both end it at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    test(at_the_end, steps)
    say(f"the weights: {last}")
    return model

if __name__ == "__main__":
    status = run(main)
    if status is None and distributed.is_initialized():
        distributed.destroy_process_group()
    raise SystemExit(status)
