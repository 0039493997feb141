# SPDX-License-Identifier: MIT
"""Low-resolution face recognition with multi-resolution augmentation (MAug) and the LogExp distance.

The whole method of "Dive into the Resolution Augmentations and Metrics in Low Resolution Face
Recognition" (Ling et al., arXiv 2302.05621) in one file that needs torch alone. Read it from top to
bottom: image -> MAug -> backbone -> ArcFace head -> distance -> total loss. `python lrfr.py` checks the
analytic gradient of the LogExp loss.

    paper               here                              shape, range
    x_hr, x_lr          sharp, degraded images            (N, 3, 112, 112) RGB in [-1, 1]
    r, MAug             px, MAug                          7, 14 or 20 pixels, one draw per image
    f_hr, f_lr          sharp, degraded embeddings        (N, D), D = 512
    d_i = x_i - y_i     difference in one dimension       i = 1..D
    L_LogExp, p         logexp_loss(x, y, p)              Eq. (3) of the paper; Eq. (1) is p = 1
    lambda              weight                            not given in the paper; 1 in the official code
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------
# 1. Resolution augmentation: what a camera far away would have seen


def _resize_matrix(size, new_size, device):
    """(new_size, size) matrix of the antialiased bicubic resize of one axis, Pillow's kernel."""
    eye = torch.eye(size, device=device)[None, None]
    return F.interpolate(eye, (new_size, size), mode="bicubic", antialias=True)[0, 0]


def degrade(images, px):
    """Bicubic down to `px` rows (antialiased) and back up, as Pillow does it; edits nothing in place.

    images: (N, 3, H, W) float in [-1, 1]. px: an int, or an integer tensor (N,) with one resolution
    per image; px >= H leaves an image as it is. Returns the same shape, clamped to [-1, 1]. A `px`
    tensor on the CPU costs a GPU no synchronisation. Raises ValueError where px < 1.
    """
    height, width = images.shape[-2:]
    px = torch.as_tensor(px).expand(len(images))
    out = images.clone()
    for r in px.unique().tolist():
        if r < 1:
            raise ValueError(f"a resolution is at least 1 pixel, got {r}")
        if r >= height:
            continue
        chosen = (px == r).nonzero().squeeze(1).to(images.device, non_blocking=True)
        # A resize is linear along each axis: two small matrix products, kept out of autocast.
        with torch.autocast(images.device.type, enabled=False):
            columns = max(1, round(r * width / height))
            down_y, up_y = (_resize_matrix(a, b, images.device) for a, b in [(height, r), (r, height)])
            down_x, up_x = (_resize_matrix(a, b, images.device)
                            for a, b in [(width, columns), (columns, width)])
            small = (down_y @ (images[chosen].float() @ down_x.T)).clamp(-1, 1)  # (n, 3, r, columns)
            back = (up_y @ small @ up_x.T).clamp(-1, 1)  # (n, 3, H, W); bicubic overshoots, hence clamp
        out[chosen] = back.to(images.dtype)
    return out


def parse_ratio(text):
    """"1:1:2" -> (1.0, 1.0, 2.0). Raises ValueError, showing the text, for what is not a ratio."""
    try:
        ratio = tuple(float(part) for part in text.split(":"))
    except ValueError:
        ratio = ()
    if not all(0 <= r < math.inf for r in ratio) or not 0 < sum(ratio) < math.inf:
        raise ValueError(f"not a ratio: '{text}' (numbers >= 0 joined by colons, such as 1:1:2)")
    return ratio


class MAug:
    """Degrades each image of a batch to its own resolution, drawn in the given ratio.

    The paper's three difficulties are 7 px (extremely hard), 14 px (hard) and 20 px (semi-hard), best
    at 1:1:2. (The official script draws 7 and 20 px half of the time each and 14 px never.) Draws come
    from torch's CPU generator: the same on every device, and a GPU never waits for them.
    """

    def __init__(self, resolutions=(7, 14, 20), ratio=(1, 1, 2)):
        if len(resolutions) != len(ratio):
            raise ValueError(f"{len(resolutions)} resolutions {tuple(resolutions)} "
                             f"but {len(ratio)} numbers in the ratio {tuple(ratio)}")
        parse_ratio(":".join(map(str, ratio)))
        if not all(r == int(r) and r >= 1 for r in resolutions):
            raise ValueError(f"resolutions are whole pixels, at least 1, got {tuple(resolutions)}")
        self.resolutions = torch.tensor(resolutions, dtype=torch.int64)
        self.ratio = torch.tensor(ratio, dtype=torch.float64)

    def sample(self, n):
        """Resolutions for n images: (n,) int64 on the CPU."""
        return self.resolutions[torch.multinomial(self.ratio, n, replacement=True)]

    def __call__(self, images):
        return degrade(images, self.sample(len(images)))


# ------------------------------------------------------------------------------------------------
# 2. Backbone: InsightFace's IResNet, with its state-dict names, so that its weights load

DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3),
          100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}  # blocks in layer1..4; 10 is ours, for CPUs


class PReLU(nn.PReLU):
    """nn.PReLU written with relu: on CPUs torch's own bfloat16 kernel takes three times as long."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        positive = F.relu(x)
        return positive + self.weight.to(x.dtype)[:, None, None] * (x - positive)


class Block(nn.Module):
    """BN-conv-BN-PReLU-conv-BN plus a shortcut; the stride sits in the second convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.conv1(self.bn1(x))
        out = self.bn3(self.conv2(self.prelu(self.bn2(out))))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] -> embeddings (N, embed_dim), float32, not normalised.

    depth: 18, 34, 50, 100 or 200 as in InsightFace, or 10 for CPUs. width: channels of the first
    stage (64 there); each of the three later stages doubles it. dropout: before the last layer.
    """

    def __init__(self, depth=50, width=64, embed_dim=512, dropout=0.0):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"no IResNet of depth {depth}; there are {', '.join(map(str, DEPTHS))}")
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = PReLU(width)
        inputs = width
        for stage, blocks in enumerate(DEPTHS[depth]):  # 112 -> 56 -> 28 -> 14 -> 7 pixels
            outputs = width * 2 ** stage
            layer = [Block(inputs if i == 0 else outputs, outputs, 2 if i == 0 else 1)
                     for i in range(blocks)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
            inputs = outputs
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(outputs * 7 * 7, embed_dim)
        self.features = nn.BatchNorm1d(embed_dim)
        self.features.weight.requires_grad_(False)  # frozen at 1, as in InsightFace
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, images):
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 8 width, 7, 7)
        x = self.dropout(self.bn2(x).flatten(1))
        with torch.autocast(x.device.type, enabled=False):  # a 25,088-term sum overflows float16
            return self.features(self.fc(x.float()))


def load_backbone(path):
    """The backbone of a checkpoint of train.py: an IResNet in eval mode, on the CPU."""
    state = torch.load(path, map_location="cpu", weights_only=True)["backbone"]
    blocks = tuple(len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")})
                   for i in (1, 2, 3, 4))
    depth = next(d for d, b in DEPTHS.items() if b == blocks)
    backbone = IResNet(depth, state["conv1.weight"].shape[0], state["fc.weight"].shape[0])
    backbone.load_state_dict(state)
    return backbone.eval()


@torch.no_grad()
def embed(backbone, images, flip="sum"):
    """(N, 3, 112, 112) in [-1, 1] -> unit embeddings (N, D); their dot product is the cosine.

    flip: what the mirrored image adds. "sum" adds its embedding, as InsightFace does; "concat" puts
    the two unit embeddings side by side, (N, 2D), as the official LRFR code does; "none".
    """
    embedding = backbone(images)
    if flip == "sum":
        embedding = embedding + backbone(images.flip(3))
    elif flip == "concat":
        mirrored = F.normalize(backbone(images.flip(3)))
        embedding = torch.cat([F.normalize(embedding), mirrored], 1)
    elif flip != "none":
        raise ValueError(f"flip is 'sum', 'concat' or 'none', got '{flip}'")
    return F.normalize(embedding)


# ------------------------------------------------------------------------------------------------
# 3. Classifier


class ArcFace(nn.Module):
    """Additive angular margin head (Deng et al. 2019): (embeddings, labels) -> logits (N, classes).

    embeddings: (N, D), any length; labels: (N,) int64 in [0, num_classes). The logit of a class is
    scale * cos(theta), that of an image's own class scale * cos(theta + margin), in float32. The
    gradient is that of the formula (InsightFace passes 1 instead of sin(theta + m) / sin(theta)).
    Raises ValueError for labels out of range on the CPU; on a GPU, CUDA's own index check stops.
    """

    def __init__(self, num_classes, embed_dim=512, scale=64.0, margin=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.normal(0, 0.01, (num_classes, embed_dim)))
        self.scale, self.margin = scale, margin

    def forward(self, embeddings, labels):
        if labels.device.type == "cpu" and len(labels):
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high >= len(self.weight):
                raise ValueError(f"labels from {low} to {high}, but the head has "
                                 f"{len(self.weight)} classes: 0 to {len(self.weight) - 1}")
        with torch.autocast(embeddings.device.type, enabled=False):
            cos = F.normalize(embeddings.float()) @ F.normalize(self.weight.float()).T  # (N, classes)
            own = cos.gather(1, labels[:, None])  # (N, 1)
            sin = (1 - own.square()).clamp(min=1e-6).sqrt()  # its slope is infinite at theta = 0 and pi
            cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
            with_margin = own * cos_m - sin * sin_m  # cos(theta + m)
            # Past theta + m = pi that cosine would rise again: go on falling, in a straight line.
            with_margin = torch.where(own > -cos_m, with_margin, own + cos_m - 1)
            return self.scale * cos.scatter(1, labels[:, None], with_margin)


# ------------------------------------------------------------------------------------------------
# 4. Distances between the two embeddings of a face, x and y, both (N, D)


def _at_least_float32(x, y):
    if x.shape != y.shape:
        raise ValueError(f"two batches of embeddings differ in shape: {tuple(x.shape)}, {tuple(y.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _logexp_terms(x, y, p):
    """d, a = |d|^p, a shift m that keeps e^a finite, and sum_i (e^{a_i} - 1) + 1 - 1, times e^{-m}.

    float32 overflows at e^89, and loses e^a - 1 where a is tiny. With m = max(0, max_i a_i - 60)
    nothing overflows, and m = 0, which changes nothing, wherever it can be.
    """
    if not p >= 1:
        raise ValueError(f"p is at least 1 (below, the gradient at d = 0 is infinite), got {p}")
    x, y = _at_least_float32(x, y)
    d = x - y
    a = d.abs() if p == 1 else d.abs().pow(p)
    m = (a.detach().amax(-1, keepdim=True) - 60).clamp(min=0)
    total = torch.expm1(-m) + (torch.expm1(a - m) - torch.expm1(-m)).sum(-1, keepdim=True)
    return d, a, m, total  # 1 + total = e^{-m} (1 + sum_i (e^{a_i} - 1))


def logexp_loss(x, y, p=1.0):
    """Eq. (3): 1/(pD) log(1 + sum_i (e^{|x_i - y_i|^p} - 1)), averaged over the batch.

    x, y: (N, D) embeddings. Returns a scalar, at least float32. Exact from |d| = 1e-6 to |d|^p = 600.
    (The official code takes one log over the whole batch and does not divide by D.)
    """
    d, _, m, total = _logexp_terms(x, y, p)
    return (m + torch.log1p(total)).mean() / (p * d.shape[-1])  # Eq. (3)


def logexp_grad(x, y, p=1.0):
    """Analytic gradient of `logexp_loss` with respect to x, (N, D); with respect to y it is its negative.

    Eq. (2), for any p: 1/D sign(d_i) |d_i|^(p-1) e^{|d_i|^p} / (1 + sum_j (e^{|d_j|^p} - 1)), over N.
    """
    d, a, m, total = _logexp_terms(x, y, p)
    return d.sign() * d.abs().pow(p - 1) * torch.exp(a - m) / (1 + total) / d.numel()


def l1_loss(x, y):
    """Mean over the batch and the dimensions of |x_i - y_i|."""
    return F.l1_loss(*_at_least_float32(x, y))


def l2_loss(x, y):
    """Mean over the batch and the dimensions of (x_i - y_i)^2."""
    return F.mse_loss(*_at_least_float32(x, y))


def check_gradient(p=1.0):
    """Largest difference between analytic, autograd and finite-difference gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 16, dtype=torch.float64, generator=generator)
    analytic = logexp_grad(x, y, p)
    x.requires_grad_()
    (autograd,) = torch.autograd.grad(logexp_loss(x, y, p), x)
    eps, finite = 1e-6, torch.zeros_like(analytic)
    for i in range(x.numel()):
        step = torch.zeros_like(finite)
        step.view(-1)[i] = eps
        finite.view(-1)[i] = (logexp_loss(x + step, y, p) - logexp_loss(x - step, y, p)).item() / (2 * eps)
    return max((analytic - autograd).abs().max().item(), (analytic - finite).abs().max().item())


# ------------------------------------------------------------------------------------------------
# 5. The training step of the paper


def random_flip(images):
    """Mirrors each image with probability one half."""
    mirrored = (torch.rand(len(images)) < 0.5).to(images.device, non_blocking=True)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


DISTANCES = {"logexp": logexp_loss, "l1": l1_loss, "l2": l2_loss}


class LRFR(nn.Module):
    """One backbone and one head that see every face twice: the total loss of the paper.

    L = 1/2 [CE(head(f_hr), y) + CE(head(f_lr), y)] + weight * distance(f_hr, f_lr)

    maug: a callable that degrades a batch, or None for the plain baseline, L = CE(head(f_hr), y).
    distance: "logexp", "l1", "l2" or None.
    """

    def __init__(self, backbone, head, maug=None, distance=None, weight=1.0, p=1.0):
        super().__init__()
        if distance is not None and maug is None:
            raise ValueError("a distance compares sharp with degraded faces: it needs an augmentation")
        self.backbone, self.head, self.maug = backbone, head, maug
        self.distance, self.weight, self.p = distance, weight, p

    def forward(self, images, labels):
        """images (N, 3, 112, 112) in [-1, 1], labels (N,) -> loss, {part of it: value}."""
        sharp = random_flip(images)
        if self.maug is None:
            loss = F.cross_entropy(self.head(self.backbone(sharp), labels), labels)
            return loss, {"sharp": loss.detach()}
        degraded = random_flip(self.maug(images))  # the two flips are independent, as in the official code
        # One forward of both batches: batch norm sees the mixture that it will meet when deployed.
        f_hr, f_lr = self.backbone(torch.cat([sharp, degraded])).chunk(2)  # 2 x (N, D)
        ce_hr = F.cross_entropy(self.head(f_hr, labels), labels)
        ce_lr = F.cross_entropy(self.head(f_lr, labels), labels)
        loss, parts = (ce_hr + ce_lr) / 2, {"sharp": ce_hr.detach(), "degraded": ce_lr.detach()}
        if self.distance is not None:
            # On unit embeddings, as in the official code: only their direction is ever compared.
            pair = F.normalize(f_hr.float()), F.normalize(f_lr.float())
            d = logexp_loss(*pair, self.p) if self.distance == "logexp" else DISTANCES[self.distance](*pair)
            loss, parts["distance"] = loss + self.weight * d, d.detach()
        return loss, parts


if __name__ == "__main__":
    errors = {p: check_gradient(p) for p in (1.0, 2.0)}
    for p, error in errors.items():
        print(f"LogExp p = {p:g}: analytic, autograd and finite-difference gradients differ by {error:.1e}")
    raise SystemExit(any(not error < 1e-8 for error in errors.values()))
