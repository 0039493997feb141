# SPDX-License-Identifier: MIT
"""Low-resolution face recognition: multi-resolution augmentation (MAug) and the LogExp distance.

The whole method of "Dive into the Resolution Augmentations and Metrics in Low Resolution Face
Recognition: A Plain yet Effective New Baseline" (arXiv 2302.05621), in one file that needs torch
alone, in the order the data flows: image -> MAug -> backbone -> ArcFace head -> distance -> total
loss. `python lrfr.py` checks the analytic gradient of the LogExp loss.

    paper               here                              shape, range
    x_hr, x_lr          sharp, degraded images            (N, 3, 112, 112) RGB in [-1, 1]
    r, MAug             px, MAug                          7, 14 or 20 pixels, one draw per image
    f_hr, f_lr          embeddings, the two in a row      (2N, D), D = 512
    L_LogExp, p         logexp_loss(x, y, p)              Eq. (3) of the paper; Eq. (1) is p = 1
    lambda              weight                            not in the paper; official code: 1
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# ---- 1. Resolution augmentation: what a camera far away would have seen -------------------------
def to_input(images, device):
    """(N, 3, H, W) uint8 RGB -> float in [-1, 1], channels last (fast convolutions), on device."""
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels are uint8, 0 to 255, got {images.dtype}")
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

def _matrices(old, new, channels, device):
    """The linear maps that resize (N, H, W * channels) from old = (H, W) to new as Pillow does: one
    to multiply from the left, one from the right. Resizing an identity matrix gives them."""
    down, across = (F.interpolate(torch.eye(o, device=device).float()[None, None], (n, o),
                    mode="bicubic", antialias=True)[0, 0] for o, n in zip(old, new))  # (n, o) each
    return down, torch.kron(across, torch.eye(channels, device=device).float()).T  # RGB, RGB ...

def degrade(images, px):
    """Bicubic down to `px` rows (antialiased) and back up, as Pillow does it; not in place.

    images: (N, 3, H, W) float in [-1, 1]. px: an int, or an integer tensor (N,), one resolution per
    image (if on the CPU, no GPU waits for it); px >= H changes nothing. Returns the same shape, in
    [-1, 1]. ValueError where px < 1. (Pillow also rounds and clips between rows and columns.)
    """
    if not images.is_floating_point():
        raise ValueError(f"images are floats in [-1, 1], got {images.dtype}")
    n, channels, height, width = images.shape
    px = torch.as_tensor(px, device="cpu").expand(n)
    rows = images.permute(0, 2, 3, 1).reshape(n, height, width * channels)  # channels last: a view
    out = torch.empty_like(images)
    for r in px.unique().tolist():
        if r < 1:
            raise ValueError(f"a resolution is at least 1 pixel, got {r}")
        size, small = (height, width), (r, max(1, round(r * width / height)))
        steps = [_matrices(size, small, channels, images.device),
                 _matrices(small, size, channels, images.device)] if r < height else []
        chosen = (px == r).nonzero().squeeze(1).to(images.device, non_blocking=images.is_cuda)
        for part in chosen.split(16 if images.is_cpu else n):  # 16 images fit a CPU's cache
            image = rows[part]
            with torch.autocast(images.device.type, enabled=False):
                for down, across in steps:
                    image = image.float()
                    image = down @ image @ across if len(down) == r else down @ (image @ across)
                    image.clamp_(-1, 1)  # bicubic overshoots
            out.permute(0, 2, 3, 1)[part] = image.to(images.dtype).view(-1, height, width, channels)
    return out

def parse_ratio(text):
    """The text "1:1:2" -> (1.0, 1.0, 2.0); ValueError, with the text, if it is not a ratio."""
    try:
        ratio = tuple(float(part) for part in text.split(":"))
    except ValueError:
        ratio = ()
    if not all(r >= 0 for r in ratio) or not 0 < sum(ratio) < math.inf:
        raise ValueError(f"not a ratio: '{text}' (numbers >= 0 joined by colons, such as 1:1:2)")
    return ratio

class MAug:
    """Degrades each image of a batch to its own resolution, drawn in the given ratio.

    7 px is the paper's extremely hard, 14 its hard, 20 its semi-hard. (The official script draws 7
    and 20 px half of the time each, 14 px never.) Draws come from torch's CPU generator: the same
    on every device, and a GPU never waits for them. Raises ValueError for what is not a ratio.
    """
    def __init__(self, resolutions=(7, 14, 20), ratio=(1, 1, 2)):
        if len(resolutions) != len(ratio):
            raise ValueError(f"{len(resolutions)} resolutions, but a ratio of {len(ratio)} numbers")
        parse_ratio(":".join(map(str, ratio)))
        self.resolutions = torch.tensor(resolutions, dtype=torch.int64, device="cpu")
        self.ratio = torch.tensor(ratio, dtype=torch.float64, device="cpu")

    def sample(self, n):
        """Resolutions for n images: (n,) int64 on the CPU."""
        return self.resolutions[torch.multinomial(self.ratio, n, replacement=True)]

    def __call__(self, images):
        return degrade(images, self.sample(len(images)))

# ---- 2. Backbone: InsightFace's IResNet, with its state-dict names, so that its weights load ----
DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3),
          100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}  # blocks in layer1..4; 10 is ours, for CPUs

class _PReLU(torch.autograd.Function):
    """PReLU of (N, C, H, W) on CPUs, where torch's own backward in bfloat16 is far slower."""
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope.to(x.dtype))
    @staticmethod
    def backward(ctx, grad):
        x, slope = ctx.saved_tensors
        grad_x = torch.ops.aten.threshold_backward(grad, x, 0)  # where x > 0, and 0 elsewhere
        grad_x.lerp_(grad.to(x.dtype), slope.to(x.dtype)[:, None, None])
        # sum of grad * min(x, 0): the weight gradient of a convolution with one tap per channel
        return grad_x, torch.nn.grad.conv2d_weight(
            x.clamp(max=0), (len(slope), 1, 1, 1), grad.to(x.dtype), groups=len(slope)).flatten()

class PReLU(nn.PReLU):
    def forward(self, x):
        ours = x.is_cpu and x.ndim == 4 and torch.is_grad_enabled() and not torch.jit.is_tracing()
        return _PReLU.apply(x, self.weight) if ours else super().forward(x)

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
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))

class IResNet(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] -> embeddings (N, embed_dim), float32, not normalised.

    depth: 18, 34, 50, 100 or 200 as in InsightFace, or 10 for CPUs. width: channels of the first
    stage (64 there); each of the three later stages doubles it. dropout: before the last layer.
    """
    def __init__(self, depth=50, width=64, embed_dim=512, dropout=0.0):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"no IResNet of depth {depth}; there are {list(DEPTHS)}")
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = PReLU(width)
        outputs = width
        for stage, blocks in enumerate(DEPTHS[depth]):  # 112 -> 56 -> 28 -> 14 -> 7 pixels
            inputs, outputs = outputs, width * 2 ** stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(Block(inputs, outputs, 2), *(
                Block(outputs, outputs, 1) for _ in range(1, blocks))))
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(outputs * 7 * 7, embed_dim)
        self.features = nn.BatchNorm1d(embed_dim)
        self.features.weight.requires_grad_(False)  # frozen at 1, as in InsightFace
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.normal_(conv.weight, 0, 0.1)

    def forward(self, images):
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 8 width, 7, 7)
        x = self.dropout(self.bn2(x).flatten(1))
        with torch.autocast(x.device.type, enabled=False):  # float32, as half would round it
            return self.features(self.fc(x.to(self.fc.weight.dtype)))

OTHER_LAYOUTS = {"features.module.": "MagFace's", "input_layer.": "AdaFace's",
                 "layer1.0.bn2.": "torchvision's ResNet or the like", "": "none that is known"}

def load_backbone(path):
    """An IResNet in eval mode, on the CPU, from a checkpoint of train.py or an InsightFace file.

    Its tensors tell depth and width; no file can run code. A ValueError says what else it is.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("backbone", state.get("state_dict_backbone", state))  # InsightFace's runs
        state = {str(k).removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)
                 and not v.is_complex() and v.untyped_storage().nbytes() >= v.nbytes}  # no views
    except Exception as error:  # of a dozen kinds, for a file that is cut short, or holds code
        reason = getattr(error, "strerror", "") or "not a checkpoint, damaged, or more than tensors"
        raise ValueError(f"{path}: {reason}") from None
    blocks = tuple(len({name.split(".")[1] for name in state if name.startswith(layer)})
                   for layer in ("layer1.", "layer2.", "layer3.", "layer4."))
    depth = {blocks: depth for depth, blocks in DEPTHS.items()}.get(blocks)
    if depth is None or not {"conv1.weight", "prelu.weight", "fc.weight"} <= state.keys():
        likely = [what for mark, what in OTHER_LAYOUTS.items() if mark in " ".join(state)]
        raise ValueError(f"{path}: not InsightFace's IResNet; it looks like {likely[0]}")
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            backbone = IResNet(depth, len(state["conv1.weight"]), len(state["fc.weight"]))
        backbone.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: no IResNet: {str(error).split(chr(10))[-1].strip()}") from None
    return backbone.float().eval()

@torch.no_grad()
def embed(backbone, images, flip="sum"):
    """(N, 3, 112, 112) in [-1, 1] -> unit embeddings (N, D); their dot product is the cosine.

    flip: what the mirrored image adds. "sum" adds its embedding, as InsightFace does; "concat" puts
    the two unit embeddings side by side, (N, 2D), as the official LRFR code does; "none".
    """
    if backbone.training:
        raise ValueError("the backbone is in training mode: call backbone.eval() first")
    embedding = backbone(images)
    if flip == "sum":
        embedding = embedding + backbone(images.flip(3))
    elif flip == "concat":
        embedding = torch.cat([F.normalize(embedding), F.normalize(backbone(images.flip(3)))], 1)
    elif flip != "none":
        raise ValueError(f"flip is 'sum', 'concat' or 'none', got '{flip}'")
    return F.normalize(embedding)

# ---- 3. Classifier ------------------------------------------------------------------------------
class ArcFace(nn.Module):
    """Additive angular margin head (Deng et al. 2019): (embeddings, labels) -> logits (N, classes).

    embeddings: (N, D), any length; labels: (N,) int64 in [0, num_classes). The logit of a class is
    scale * cos(theta), that of an image's own class scale * cos(theta + margin), in float32, with
    its true gradient (InsightFace's leaves out the factor sin(theta + m) / sin(theta)). Labels out
    of range are a ValueError on the CPU; on a GPU, CUDA's own index check stops.
    """
    def __init__(self, num_classes, embed_dim=512, scale=64.0, margin=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.normal(0, 0.01, (num_classes, embed_dim)))
        self.scale, self.margin = scale, margin

    def forward(self, embeddings, labels):
        if labels.device.type == "cpu" and ((labels < 0) | (labels >= len(self.weight))).any():
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to "
                             f"{len(self.weight) - 1}")
        with torch.autocast(embeddings.device.type, enabled=False):
            weight = self.weight.float()  # divided by below: a copy of a million classes is 2 GB
            cos = F.normalize(embeddings.float()) @ weight.T / weight.norm(dim=1).clamp(min=1e-12)
            own = cos.gather(1, labels.view(len(cos), 1))  # (N, 1) out of (N, classes)
            sin = (1 - own.square()).clamp(min=1e-6).sqrt()  # infinitely steep at theta = 0 and pi
            cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
            with_margin = own * cos_m - sin * sin_m  # cos(theta + m)
            # Past theta + m = pi that cosine would rise again: go on falling, in a straight line.
            with_margin = torch.where(own > -cos_m, with_margin, own + cos_m - 1)
            return self.scale * cos.scatter(1, labels[:, None], with_margin)

# ---- 4. Distances between the two embeddings of a face, x and y, both (N, D) --------------------
def _difference(x, y):
    """x - y in float32, or in float64 if they come in it: float16 ends at 65504, about e^11."""
    if x.shape != y.shape:
        raise ValueError(f"embeddings differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    return x - y if x.dtype == torch.float64 else x.float() - y.float()

def _logexp_terms(x, y, p):
    """d, a = |d|^p, a shift m, and S with 1 + S = e^{-m} (1 + sum_i (e^{a_i} - 1)), in float32.

    float32 overflows at e^89, hence the shift m = max(0, max_i a_i - 60), 0 for all that are not
    huge; and it loses e^a - 1 where a is tiny, hence expm1 and log1p throughout.
    """
    if not p >= 1:
        raise ValueError(f"p is at least 1 (below, the gradient at d = 0 is infinite), got {p}")
    d = _difference(x, y)
    a = d.abs() if p == 1 else d.abs().pow(p)
    m = (a.detach().amax(-1, keepdim=True) - 60).clamp(min=0)
    total = torch.expm1(-m) + (torch.expm1(a - m) - torch.expm1(-m)).sum(-1, keepdim=True)
    return d, a, m, total

def logexp_loss(x, y, p=1.0):
    """Eq. (3): 1/(pD) log(1 + sum_i (e^{|x_i - y_i|^p} - 1)), averaged over the batch.

    x, y: (N, D) embeddings. Returns a scalar, exact from |x_i - y_i| = 1e-6 to |x_i - y_i|^p = 600.
    (The official code takes one log over the whole batch and does not divide by D.)
    """
    d, _, m, total = _logexp_terms(x, y, p)
    return (m + torch.log1p(total)).mean() / (p * d.shape[-1])  # Eq. (3)

def logexp_grad(x, y, p=1.0):
    """Analytic gradient (N, D) of `logexp_loss` with respect to x; with respect to y, its negative.

    Eq. (2) for any p: sign(d_i) |d_i|^(p-1) e^{|d_i|^p} / (1 + sum_j (e^{|d_j|^p} - 1)) / (D N).
    """
    d, a, m, total = _logexp_terms(x, y, p)
    return d.sign() * d.abs().pow(p - 1) * torch.exp(a - m) / (1 + total) / d.numel()

def l1_loss(x, y):
    """Mean over the batch and the dimensions of |x_i - y_i|; a float32 scalar."""
    return _difference(x, y).abs().mean()

def l2_loss(x, y):
    """Mean over the batch and the dimensions of (x_i - y_i)^2; a float32 scalar."""
    return _difference(x, y).square().mean()

def check_gradient(p=1.0):
    """Largest difference between analytic, autograd and finite-difference gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 16, dtype=torch.float64, generator=generator)
    (autograd,) = torch.autograd.grad(logexp_loss(x.requires_grad_(), y, p), x)
    steps = 1e-6 * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)  # one element each
    finite = torch.stack([logexp_loss(x + e, y, p) - logexp_loss(x - e, y, p) for e in steps])
    others = torch.stack([autograd, finite.view_as(x) / 2e-6])
    return (logexp_grad(x, y, p) - others).abs().max().item()  # nan, if any is

# ---- 5. The training step of the paper ----------------------------------------------------------
def random_flip(images):
    """Mirrors each image with probability one half."""
    mirrored = (torch.rand(len(images)) < 0.5).to(images.device, non_blocking=images.is_cuda)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)

class LRFR(nn.Module):
    """One backbone and one head that see every face twice: the total loss of the paper.

    L = 1/2 [CE(head(f_hr), y) + CE(head(f_lr), y)] + weight * distance(u_hr, u_lr), u = f / |f|

    maug: a callable that degrades a batch, or None for the plain baseline, L = CE(head(f_hr), y).
    distance: logexp_loss or another function of two (N, D) unit embeddings, or None. weight:
    lambda; 300 suits LogExp(1), and is as strong as 720 of LogExp(2), 16 of L1, 180 of L2.
    pull_both: the distance moves both embeddings, as in the paper, not the degraded one alone.
    """
    def __init__(self, backbone, head, maug=None, distance=None, weight=300.0, pull_both=False):
        super().__init__()
        self.backbone, self.head, self.maug = backbone, head, maug
        self.distance, self.weight, self.pull_both = distance, weight, pull_both

    def forward(self, images, labels):
        """images (N, 3, 112, 112) in [-1, 1], labels (N,) -> loss, {part of it: detached value}."""
        sharp = random_flip(images)
        if self.maug is None:
            loss = F.cross_entropy(self.head(self.backbone(sharp), labels), labels)
            return loss, {"sharp": loss.detach()}
        degraded = random_flip(self.maug(images))  # flips independently, as in the official code
        # One forward of both: batch norm then learns from the mixture that it meets when deployed
        # (the official code takes two), and one large batch is faster than two small ones.
        embeddings, labels = self.backbone(torch.cat([sharp, degraded])), labels.repeat(2)
        entropy = F.cross_entropy(self.head(embeddings, labels), labels, reduction="none")
        ce_hr, ce_lr = entropy.view(2, -1).mean(1)
        loss, parts = (ce_hr + ce_lr) / 2, {"sharp": ce_hr.detach(), "degraded": ce_lr.detach()}
        if self.distance is not None:
            # Of unit embeddings, as in the official code: nothing else about them is ever compared.
            u_hr, u_lr = F.normalize(embeddings).chunk(2)  # (N, D) each
            # u_hr is a fixed target: moving it as well cost accuracy at this weight.
            distance = self.distance(u_hr if self.pull_both else u_hr.detach(), u_lr)
            loss, parts["distance"] = loss + self.weight * distance, distance.detach()
        return loss, parts

if __name__ == "__main__":
    errors = [check_gradient(p) for p in (1.0, 2.0)]
    print("LogExp: analytic, autograd and finite-difference gradients differ by at most "
          "{:.1e} (p = 1) and {:.1e} (p = 2)".format(*errors))
    raise SystemExit(not all(error < 1e-8 for error in errors))
