# SPDX-License-Identifier: MIT
"""The comparisons in the README's section on speed, each side by side in one run:

python .github/speed.py step 18|50          a plain float32 training step, batch 32
python .github/speed.py head CLASSES        the ArcFace head's own step, its memory
python .github/speed.py maug FOLDER         degrade against Pillow and torchvision, one core
python .github/speed.py decode FOLDER       reading against a loop of Pillow alone, one core
python .github/speed.py embed FOLDER 18|50  evaluation against float32 image by image
"""
import glob
import io
import os
import resource
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import evaluate
import lrfr
import train


def seconds(function, repeats=3):
    """The median, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]


def step(depth):
    lrfr.PReLU = torch.nn.PReLU  # torch's own
    backbone, head, maug = lrfr.IResNet(int(depth)), lrfr.ArcFace(343), lrfr.MAug()
    optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.02, momentum=0.9)
    images, labels = torch.rand(32, 3, 112, 112) * 2 - 1, torch.randint(343, (32,))

    def plain():
        f_hr, f_lr = backbone(images), backbone(maug(images))
        ce = [F.cross_entropy(head(f, labels), labels) for f in (f_hr, f_lr)]
        loss = sum(ce) / 2 + lrfr.logexp_loss(F.normalize(f_hr), F.normalize(f_lr))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"r{depth}, float32, NCHW, two forwards, torch's PReLU: {seconds(plain, 9):.2f} s a step")


def head(classes):
    evaluate.keep_memory()
    layer, embeddings = lrfr.ArcFace(int(classes)), torch.randn(64, 512, requires_grad=True)
    optimiser = torch.optim.SGD(layer.parameters(), 0.02, momentum=0.9, nesterov=True)
    labels = torch.randint(int(classes), (64,))

    def once():
        optimiser.zero_grad()
        F.cross_entropy(layer(embeddings, labels), labels).backward()
        optimiser.step()
    spent = seconds(once)
    print(f"{classes} classes, 64 embeddings: {spent:.4f} s a step, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def pillow(image, px):  # as data sets elsewhere do it, image by image
    image = image.resize((px, px), Image.BICUBIC).resize((112, 112), Image.BICUBIC)
    return normalize(to_tensor(image), [0.5] * 3, [0.5] * 3)[None]


def files(folder, count):
    found = sorted(glob.glob(os.path.join(folder, "*", "*.jpg")))[:count]
    if not found:
        raise ValueError(f"{folder}: no images as identity/image.jpg")
    return found


def maug(folder):
    torch.set_num_threads(1)
    evaluate.keep_memory()
    opened = [Image.open(path).convert("RGB") for path in files(folder, 256)]
    images = lrfr.to_input(torch.stack([*map(evaluate.read_image, files(folder, 256))]), "cpu")
    px = lrfr.MAug().sample(len(opened)).tolist()
    theirs = seconds(lambda: torch.cat([*map(pillow, opened, px)]))
    resizes = seconds(lambda: [image.resize((r, r), Image.BICUBIC).resize((112, 112), Image.BICUBIC)
                               for image, r in zip(opened, px)])
    ours = seconds(lambda: lrfr.degrade(images, torch.tensor(px)))
    print(f"{len(px)} images: Pillow to tensors {theirs:.4f} s, its resizes alone {resizes:.4f}, "
          f"degrade {ours:.4f}: {theirs / ours:.1f} and {resizes / ours:.1f} times as fast")


def decode(folder):
    torch.set_num_threads(1)
    packed = os.path.exists(os.path.join(folder, "train.rec"))
    faces = (train.record_file(folder) if packed else
             train.Faces(folder, *evaluate.image_folder(folder)))
    count = min(3000, len(faces))
    sources = faces.sources[:count]
    sources = [io.BytesIO(faces.read(source)) for source in sources] if packed else sources
    theirs = seconds(lambda: [np.asarray(Image.open(s).convert("RGB")) for s in sources])
    ours = seconds(lambda: [faces[i] for i in range(count)])
    print(f"{count} images: Pillow {count / theirs:.0f} a second, ours {count / ours:.0f}, "
          f"{theirs / ours:.0%}")


def embed(folder, depth, width=64):
    evaluate.keep_memory()
    backbone, paths = lrfr.IResNet(int(depth), int(width)).eval(), files(folder, 32)
    one, cpu = partial(lrfr.embed, backbone), torch.device("cpu")
    theirs = seconds(lambda: [one(pillow(Image.open(path).convert("RGB"), px)) for path in paths
                              for px in evaluate.RESOLUTIONS])
    backbone.to(memory_format=torch.channels_last)
    ours = seconds(lambda: evaluate.embed_sources({"": backbone}, "", paths, evaluate.RESOLUTIONS,
                                                  cpu, "auto", "sum"))
    print(f"{len(paths)} images at four resolutions: float32 one at a time {theirs:.2f} s, "
          f"ours {ours:.2f}: {theirs / ours:.1f} times as fast")


if __name__ == "__main__":
    commands = {"step": step, "head": head, "maug": maug, "decode": decode, "embed": embed}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    sys.exit(evaluate.run(partial(commands[sys.argv[1]], *sys.argv[2:])))
