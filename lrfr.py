# SPDX-License-Identifier: MIT
"""Low-resolution face recognition: multi-resolution augmentation (MAug) and the LogExp distance.

The method of "Dive into the Resolution Augmentations and Metrics in Low Resolution Face
Recognition: A Plain yet Effective New Baseline" (arXiv 2302.05621) in one file that needs only
torch, 2.6 or newer. It is written in the order in which the data flows: image -> MAug -> backbone
-> ArcFace head -> distance -> total loss. Then comes what loads and uses a trained backbone.
`python lrfr.py` checks the analytic gradient of the LogExp loss.

    paper         here                        shape, range
    x_hr, x_lr    sharp, degraded             (N, 3, 112, 112) RGB in [-1, 1]
    r             px                          7, 14 or 20 pixels, drawn for each image
    y             labels                      (N,) int64
    f_hr, f_lr    the halves of embeddings    (N, D) each, D = 512
    u_hr, u_lr    u_hr, u_lr                  (N, D): f / |f|, unit vectors
    p             p                           1 in Eq. (1) and (2), any p >= 1 in Eq. (3)
    lambda        weight                      300; the paper gives no value
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- 1. Resolution augmentation ------------------------------------------------------------------


def to_input(images: Tensor, device: torch.device | str) -> Tensor:
    """Turns (N, 3, H, W) uint8 RGB into floats in [-1, 1] on a device, channels-last in memory.

    ValueError if the pixels are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels must be a uint8 tensor, 0 to 255, got {images.dtype}")
    images = images.to(device).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last)


def degrade(images: Tensor, px: int | Tensor) -> Tensor:
    """Reduces each image to `px` rows of pixels, and columns in proportion, and enlarges it again.

    Bicubic, with antialiasing on the way down, as Pillow does it. `images` is not changed.

    images: (N, 3, H, W) floats in [-1, 1]. (Their range is not checked: the CPU would have
    to wait for the GPU.)
    px: an int, or an integer tensor (N,) on the CPU, one resolution per image; 2 or more. Where
    px >= H, an image stays as it is.
    Returns the same shape and dtype, in [-1, 1]. ValueError for pixels that are not floats, px < 2.
    """
    return at_each_resolution(images, px, resize_down_and_up)


def resize_down_and_up(images, size):
    """Bicubic; the overshoot of the cubic is clipped, as in an 8-bit image.

    torch's cubic is Pillow's with antialias=True only, which changes nothing else on the way up.
    """
    small = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
    large = F.interpolate(small, images.shape[2:], mode="bicubic", antialias=True)
    return large.clamp(-1, 1)


def at_each_resolution(images, px, function):
    """Replaces all images of a resolution r < H by function(images, (r, width in proportion))."""
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
    n, _, height, width = images.shape
    px = torch.as_tensor(px, device="cpu").expand(n)
    degraded = images.clone()
    for r in px.unique().tolist():
        if r < 2:  # torch's antialiased resize fails on CUDA at 1 px
            raise ValueError(f"a resolution must be 2 pixels or more, got {r}")
        if r >= height:
            continue
        chosen = (px == r).nonzero().squeeze(1)  # with a mask, the CPU would wait for a GPU
        chosen = to_device_of(images, chosen)
        size = (r, max(2, round(r * width / height)))
        with torch.autocast(images.device.type, enabled=False):  # float32 throughout
            degraded[chosen] = function(images[chosen].float(), size).to(images.dtype)
    return degraded


def to_device_of(images, tensor):
    """Sends a tensor from the CPU to where the images are; the CPU does not wait for a GPU."""
    if images.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(images.device, non_blocking=True)


# A camera in place of bicubic resizing: ours, not the paper's.


def photograph(images: Tensor, px: int | Tensor) -> Tensor:
    """What a cheap camera makes of each image when the face covers `px` rows of its pixels.

    What happens, in this order; the strength of each step is drawn for each image, evenly within
    its range, from torch's CPU generator. In brackets, the ranges of published work. As there,
    "light" means sRGB values.

    lens           Gaussian blur, sigma 0.05 to 0.8 of the camera's pixels (BSRGAN: up to 0.7,
                   Real-ESRGAN: up to 0.75)
    sensor         a pixel is the average of the light on its area (Real-ESRGAN: "area")
    exposure       0.7 to 1.3 times the light (GFPGAN: 0.5 to 1.5)
    white balance  what it leaves of coloured light: red and blue 0.9 to 1.1 times (Brooks et al.:
                   gains within 12 % of the middle)
    noise          Gaussian: of the light, white being 100 to 3,200 photons, evenly in the logarithm
                   (BSRGAN: 100 to 10,000); of the electronics, standard deviation 0 to 12 of 255
                   (BSRGAN: 2 to 25, Real-ESRGAN: 1 to 30); then clipped, as by the sensor
    JPEG           simplified, quality 95 to 30, evenly in the size of its steps (BSRGAN,
                   Real-ESRGAN: 30 to 95)
    screen         enlarged bilinearly (GFPGAN)

    images, px, what is returned and refused: as for degrade.
    BSRGAN: Zhang et al. 2021. Real-ESRGAN, GFPGAN: Wang et al. 2021. Brooks et al. 2019:
    Unprocessing Images for Learned Raw Denoising.
    """
    return at_each_resolution(images, px, take_picture)


def take_picture(scene, size):
    """The steps of photograph, for a camera of size (h, w) pixels: (N, 3, H, W) -> the same."""
    height, width = scene.shape[2:]
    sigma = draw(scene, 0.05, 0.8) * height / size[0]  # in pixels of the scene
    row_weights = lens_and_sensor(sigma, height, size[0])  # (N, 1, h, H)
    column_weights = lens_and_sensor(sigma, width, size[1])  # (N, 1, w, W)
    on_sensor = row_weights @ scene @ column_weights.mT  # (N, 3, h, w)
    light = ((on_sensor + 1) / 2).clamp(0, 1)  # 0: black, 1: white, however it was rounded
    light = light * draw(scene, 0.7, 1.3)
    red = draw(scene, 0.9, 1.1)
    blue = draw(scene, 0.9, 1.1)
    green = torch.ones_like(red)
    light = light * torch.cat([red, green, blue], 1)
    photons = 10 ** draw(scene, 2, 3.5)
    electronics = draw(scene, 0, 12) / 255
    noise = to_device_of(scene, torch.randn(light.shape, device="cpu"))
    variance = light / photons + electronics**2
    light = light + noise * variance.sqrt()
    small = compress(2 * light.clamp(0, 1) - 1).clamp(-1, 1)
    return F.interpolate(small, (height, width), mode="bilinear")


def lens_and_sensor(sigma, length, pixels):
    """(N, 1, pixels, length): how much of each row (or column) of the scene a camera's row sees.

    sigma: (N, 1, 1, 1), in pixels of the scene.
    """
    place = torch.arange(length, device=sigma.device)
    distance = place - place[:, None]
    blur = torch.exp(-((distance / sigma) ** 2) / 2)
    blur = blur / blur.sum(-1, keepdim=True)  # row i: the weights of all rows in the blurred row i
    # A pixel averages the blurred rows on its area, and so their weights.
    return F.interpolate(blur, (pixels, length), mode="area")


# Rows: brightness (Y), blueness (Cb), redness (Cr), as JPEG makes them of red, green and blue.
TO_YCBCR = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]],
    device="cpu",
)
TO_RGB = torch.linalg.inv(TO_YCBCR)


def compress(images):
    """What JPEG leaves of images (N, 3, h, w) in [-1, 1].

    In blocks of 8 x 8 pixels, it writes brightness and colour as sums of waves (discrete cosine
    transform), and rounds how much of each wave there is: of colour and of short waves more
    coarsely. (Here the steps grow evenly, where JPEG has tables, and colour keeps its resolution,
    where most cameras halve it.)
    """
    height, width = images.shape[2:]
    # Up to a multiple of 8.
    padded = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
    ycbcr = torch.einsum("ij, njhw -> nihw", to_device_of(images, TO_YCBCR), padded)
    blocks = ycbcr.unfold(2, 8, 8).unfold(3, 8, 8)  # (N, 3, h / 8, w / 8, 8, 8)

    n = torch.arange(8, device=images.device)  # pixels of a row
    k = n[:, None]  # half waves in a row
    waves = torch.cos((2 * n + 1) * k * math.pi / 16) / 2  # (8 waves, 8 pixels)
    waves[0] /= math.sqrt(2)  # so that they are orthonormal
    amounts = waves @ blocks @ waves.T

    steps = (10 + 6 * (k + k.T)) / 127.5  # roughly JPEG's for quality 50; of 255, where we have 2
    steps = steps * draw(images, 0.1, 1.7)  # 0.1: quality 95, 1.7: quality 30
    steps = torch.cat([steps, 2 * steps, 2 * steps], 1)  # (N, 3, 8, 8): brightness, colour, colour
    steps = steps[:, :, None, None]  # the same for all blocks
    amounts = (amounts / steps).round() * steps

    blocks = waves.T @ amounts @ waves
    ycbcr = blocks.transpose(3, 4).reshape(padded.shape)
    rgb = torch.einsum("ij, njhw -> nihw", to_device_of(images, TO_RGB), ycbcr)
    return rgb[:, :, :height, :width]


def draw(images, low, high):
    """A number from `low` to `high` for each of N images: (N, 1, 1, 1)."""
    numbers = torch.rand(len(images), 1, 1, 1, device="cpu")
    return low + (high - low) * to_device_of(images, numbers)


# Multi-resolution augmentation, which draws between the two.


def parse_ratio(text: str) -> tuple[float, ...]:
    """Reads "1:1:2" as (1.0, 1.0, 2.0). ValueError if these are not numbers joined by colons."""
    try:
        return tuple(float(number) for number in text.split(":"))
    except ValueError:
        raise ValueError(f"not a ratio: '{text}' (numbers joined by colons, as 1:1:2)") from None


class MAug:
    """Multi-resolution augmentation: degrades each image of a batch to a resolution of its own.

    The paper calls 7 px extremely hard, 14 hard and 20 semi-hard. (The official script draws 7 and
    20 px half of the time each, and never 14.) The draws come from torch's CPU generator, and are
    the same on every device.

    resolutions: integers of 2 or more, in pixels. ratio: how often each of them is drawn, numbers
    that are not negative, one for each resolution.
    camera: the probability, 0 to 1, that `photograph` degrades an image, in place of `degrade`. 0
    is the paper's augmentation.
    photograph: another camera, if you have one: (images, px) -> the same shape and dtype. px is an
    integer tensor (N,) on the CPU.
    ValueError for other values or lengths.
    """

    def __init__(
        self,
        resolutions: tuple = (7, 14, 20),
        ratio: tuple = (1, 1, 2),
        camera: float = 0.0,
        photograph=photograph,
    ):
        if len(resolutions) != len(ratio) or len(ratio) == 0:
            raise ValueError(f"{len(resolutions)} resolutions, but a ratio of {len(ratio)} numbers")
        if not (min(ratio) >= 0 and 0 < sum(ratio) < math.inf):
            raise ValueError(f"a ratio needs finite numbers >= 0, not all of them 0, got {ratio}")
        if min(resolutions) < 2 or any(px != int(px) for px in resolutions):
            raise ValueError(f"resolutions must be integers of 2 or more, got {resolutions}")
        if not 0 <= camera <= 1:
            raise ValueError(f"camera is a probability, from 0 to 1, got {camera}")
        self.resolutions = torch.tensor(resolutions, dtype=torch.int64, device="cpu")
        self.ratio = torch.tensor(ratio, dtype=torch.float64, device="cpu")
        self.camera = camera
        self.photograph = photograph

    def sample(self, n: int) -> Tensor:
        """Draws resolutions for n images: (n,) int64, on the CPU."""
        return self.resolutions[torch.multinomial(self.ratio, n, replacement=True)]

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1], N of 1 or more -> the same shape, degraded."""
        px = self.sample(len(images))
        degraded = degrade(images, px)
        if self.camera > 0:
            chosen = (torch.rand(len(px), device="cpu") < self.camera).nonzero().squeeze(1)
            if len(chosen) > 0:
                places = to_device_of(images, chosen)
                # A camera of one's own may know nothing of autocast.
                with torch.autocast(images.device.type, enabled=False):
                    degraded[places] = self.photograph(images[places], px[chosen])
        return degraded


# ---- 2. Backbone: the IResNet of InsightFace -----------------------------------------------------

# Blocks in layer1 to layer4. Depth 10 is ours, for CPUs; the others are InsightFace's.
DEPTHS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


class Block(nn.Module):
    """BN-conv-BN-PReLU-conv-BN plus a shortcut. The stride is in the second convolution."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x))
        out = self.conv2(self.prelu(self.bn2(out)))
        out = self.bn3(out)
        shortcut = x if self.downsample is None else self.downsample(x)
        return out + shortcut


def make_layer(in_channels, out_channels, blocks):
    """A stage of so many blocks, of which the first halves height and width."""
    layers = [Block(in_channels, out_channels, 2)]
    for _ in range(blocks - 1):
        layers.append(Block(out_channels, out_channels, 1))
    return nn.Sequential(*layers)


class IResNet(nn.Module):
    """(N, 3, 112, 112) RGB in [-1, 1] -> embeddings (N, embed_dim), not normalised.

    The names in its state dict are InsightFace's, so that weights in that format load. Height and
    width must be 112. The embeddings have the dtype of the weights, under autocast as well.

    depth: 18, 34, 50, 100 or 200 as in InsightFace, or 10, for CPUs; else a ValueError.
    width: channels of the first layer, 64 in InsightFace; layer2, 3 and 4 have 2, 4, 8 times as
    many. (In channels-last order on a CPU, training with fewer than 16 crashes: oneDNN issue 6035.)
    """

    def __init__(self, depth: int = 50, width: int = 64, embed_dim: int = 512):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"no IResNet of depth {depth}; there are {list(DEPTHS)}")
        blocks = DEPTHS[depth]
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.layer1 = make_layer(width, width, blocks[0])
        self.layer2 = make_layer(width, 2 * width, blocks[1])
        self.layer3 = make_layer(2 * width, 4 * width, blocks[2])
        self.layer4 = make_layer(4 * width, 8 * width, blocks[3])
        self.bn2 = nn.BatchNorm2d(8 * width)
        self.fc = nn.Linear(8 * width * 7 * 7, embed_dim)  # 7 = 112 / 2^4
        self.features = nn.BatchNorm1d(embed_dim)
        self.features.weight.requires_grad_(False)  # stays 1, as in InsightFace
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))  # (N, width, 112, 112)
        x = self.layer1(x)  # (N, width, 56, 56)
        x = self.layer2(x)  # (N, 2 width, 28, 28)
        x = self.layer3(x)  # (N, 4 width, 14, 14)
        x = self.layer4(x)  # (N, 8 width, 7, 7)
        x = self.bn2(x).flatten(1)
        # The last layer is in float32 under autocast, too, since half precision would round the
        # embedding. Device and dtype are read from a buffer: torch.fx cannot trace those of x, and
        # a quantised fc has no weight to ask.
        buffer = self.features.running_mean
        with torch.autocast(buffer.device.type, enabled=False):
            return self.features(self.fc(x.to(buffer.dtype)))


# ---- 3. Classification head ----------------------------------------------------------------------


class ArcFace(nn.Module):
    """Additive angular margin head (Deng et al. 2019): (embeddings, labels) -> logits (N, classes).

    The logit of a class is scale * cos(theta), that of an image's own class
    scale * cos(theta + margin), in float32 and with its true gradient. Where
    theta + margin > pi, that cosine rises again; there the logit is
    scale * (cos(theta) + cos(margin) - 1), which goes on falling.
    (Today's InsightFace leaves the factor sin(theta + margin) / sin(theta) out of the gradient, and
    lets the cosine rise: at theta = pi its logit is 15.7 higher than this one, at scale 64.)

    embeddings: (N, D) of any length. labels: (N,) int64 in [0, num_classes), else torch stops.
    scale, margin: s and m of the ArcFace paper, m in radians.
    ValueError if there are not as many labels as embeddings.
    """

    def __init__(
        self, num_classes: int, embed_dim: int = 512, scale: float = 64.0, margin: float = 0.5
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim))
        nn.init.normal_(self.weight, 0, 0.01)
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"{tuple(labels.shape)} labels for {len(embeddings)} embeddings")
        with torch.autocast(embeddings.device.type, enabled=False):
            # Dividing by the classes' norms needs less memory than normalising a copy of them.
            weight = self.weight.float()
            norms = weight.norm(dim=1).clamp(min=1e-12)
            unit = F.normalize(embeddings.float())
            cosines = unit @ weight.T / norms  # (N, classes)
            own = cosines.gather(1, labels[:, None])  # (N, 1): cos(theta)
            # The clamp bounds the gradient, which is infinite at theta = 0 and pi.
            sine = (1 - own.square()).clamp(min=1e-6).sqrt()
            cos_m = math.cos(self.margin)
            sin_m = math.sin(self.margin)
            with_margin = own * cos_m - sine * sin_m  # cos(theta + m)
            beyond_pi = own + cos_m - 1  # both are -1 at theta + m = pi
            with_margin = torch.where(own > -cos_m, with_margin, beyond_pi)
            cosines = cosines.scatter(1, labels[:, None], with_margin)
            return self.scale * cosines


# ---- 4. Distances between embeddings x and y, (N, D) each, of the same N faces -------------------


def difference(x, y):
    """x - y in float64, which Apple's GPUs lack."""
    if x.shape != y.shape:
        raise ValueError(f"embeddings differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    return x.double() - y.double()


def powers(x, y, p):
    """d = x - y and a = |d|^p."""
    if not p >= 1:
        raise ValueError(f"p must be 1 or more (the gradient at 0 would be infinite), got {p}")
    d = difference(x, y)
    return d, d.abs().pow(p)


def logexp_loss(x: Tensor, y: Tensor, p: float = 1.0) -> Tensor:
    """LogExp distance, Eq. (3): 1/(pD) log(1 + sum_i (e^{|x_i - y_i|^p} - 1)), mean over the batch.

    x, y: (N, D) embeddings. Returns a float64 scalar, accurate for the smallest differences (hence
    expm1 and log1p) and up to |x_i - y_i|^p = 700 (float32 would overflow at 89).
    ValueError if p < 1 or the shapes differ.
    (The official code: log(1 + sum over batch B and dimensions) / (p B), not divided by D.)
    """
    d, a = powers(x, y, p)
    return torch.log1p(torch.expm1(a).sum(-1)).mean() / (p * d.shape[-1])


def logexp_grad(x: Tensor, y: Tensor, p: float = 1.0) -> Tensor:
    """Analytic gradient (N, D) of logexp_loss by x, in float64. By y, negate it. Errors as there.

    Eq. (2), here for any p and with the mean over the N pairs:
    sign(d_i) |d_i|^(p-1) e^{|d_i|^p} / (1 + sum_j (e^{|d_j|^p} - 1)) / (D N), d = x - y.
    """
    d, a = powers(x, y, p)
    weights = torch.exp(a) / (1 + torch.expm1(a).sum(-1, keepdim=True))  # of each dimension
    return d.sign() * d.abs().pow(p - 1) * weights / d.numel()


def l1_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean of |x_i - y_i| over batch and dimensions: a float64 scalar."""
    return difference(x, y).abs().mean()


def l2_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean of (x_i - y_i)^2 over batch and dimensions: a float64 scalar."""
    return difference(x, y).square().mean()


# ---- 5. Total loss -------------------------------------------------------------------------------


def random_flip(images: Tensor) -> Tensor:
    """Mirrors each image of (N, 3, H, W) with a probability of one half."""
    mirror = to_device_of(images, torch.rand(len(images), device="cpu") < 0.5)
    return torch.where(mirror[:, None, None, None], images.flip(3), images)


class LRFR(nn.Module):
    """The paper's training step: one backbone and one head see every face sharp and degraded.

    L = 1/2 [CE(head(f_hr), y) + CE(head(f_lr), y)] + weight * distance(u_hr, u_lr), u = f / |f|

    backbone: images -> (N, D). head: (embeddings, labels) -> logits.
    maug: degrades a batch of images; None for the paper's baseline, L = CE(head(f_hr), y).
    distance: a function of two (N, D) tensors, such as logexp_loss; None for no distance.
    weight: lambda. The default is for LogExp(1) and D = 512; 1000 when fine-tuning. As strong, at a
    cosine of 0.5: 720 for LogExp(2), 16 for L1, 180 for L2. For other D, let the weight grow in
    proportion to D, that of L1 to the root of D.
    pull_both: the distance moves the sharp embedding as well, as in the official code.
    maug and the flips draw from torch's CPU generator: seed each process differently.
    ValueError for a distance without maug.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        maug=None,
        distance=None,
        weight: float = 300.0,
        pull_both: bool = False,
    ):
        super().__init__()
        if maug is None and distance is not None:
            raise ValueError("a distance needs degraded images: give maug, or no distance")
        self.backbone = backbone
        self.head = head
        self.maug = maug
        self.distance = distance
        self.weight = weight
        self.pull_both = pull_both

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
        """images (N, 3, 112, 112) in [-1, 1] (not checked), labels (N,) int64.

        Returns the total loss, a float32 scalar, and its parts, detached: "sharp"; with maug
        "degraded"; with a distance "distance", without its weight.
        """
        sharp = random_flip(images)
        if self.maug is None:
            logits = self.head(self.backbone(sharp), labels)
            loss = F.cross_entropy(logits, labels)
            return loss, {"sharp": loss.detach()}
        degraded = random_flip(self.maug(images))  # flipped independently, as in the official code
        # One forward of both, so that batch norm learns from the mixture that it will meet in use.
        # (The official code takes two forwards: see "two forwards" in .github/RESULTS.md.)
        embeddings = self.backbone(torch.cat([sharp, degraded]))  # (2N, D)
        logits = self.head(embeddings, labels.repeat(2))
        sharp_logits, degraded_logits = logits.chunk(2)
        sharp_loss = F.cross_entropy(sharp_logits, labels)
        degraded_loss = F.cross_entropy(degraded_logits, labels)
        loss = (sharp_loss + degraded_loss) / 2
        parts = {"sharp": sharp_loss.detach(), "degraded": degraded_loss.detach()}
        if self.distance is not None:
            # Of unit embeddings, as in the official code, since cosines are all that is compared
            # later. |d_i| is then 0.02 to 0.05 on average, 0.25 at most, so that LogExp weighs the
            # dimensions nearly alike, and acts like L1 (measured in .github/RESULTS.md).
            unit = F.normalize(embeddings.float())
            u_hr, u_lr = unit.chunk(2)  # (N, D) each
            if not self.pull_both:
                u_hr = u_hr.detach()  # a fixed target, which cost no rank-1 in RESULTS.md
            distance = self.distance(u_hr, u_lr).float()
            loss = loss + self.weight * distance
            parts["distance"] = distance.detach()
        return loss, parts


# ---- 6. Using a trained backbone -----------------------------------------------------------------


def load_backbone(path: str) -> IResNet:
    """Loads an IResNet, in eval mode on the CPU, from a file of train.py or of InsightFace.

    Depth and width are inferred from the tensor shapes. The state dict may be nested, as under
    "state_dict" or "backbone", and its names may have a prefix, such as "module.". No code in the
    file is run.
    ValueError, with the path, if the file cannot be read or holds anything else.
    """
    state = read_state_dict(path)
    others = ("features.module.", "features.layer1.", "input_layer.")  # MagFace twice, AdaFace
    if any(other in name for name in state for other in others):
        raise ValueError(
            f"{path}: may be MagFace's or AdaFace's network, not InsightFace's IResNet"
        )
    first_block = "layer1.0.bn1.weight"
    prefixes = [name.removesuffix(first_block) for name in state if name.endswith(first_block)]
    if len(prefixes) > 1:
        raise ValueError(f"{path}: holds several networks: {', '.join(prefixes)}: save one alone")
    prefix = prefixes[0] if prefixes else ""
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    depth_of = {sum(blocks): depth for depth, blocks in DEPTHS.items()}
    block_count = sum(name.endswith(".conv2.weight") for name in state)
    if block_count not in depth_of:
        raise ValueError(f"{path}: {block_count} blocks of an IResNet; known are {list(depth_of)}")
    try:
        width = len(state["conv1.weight"])
        embed_dim = len(state["fc.weight"])
        with torch.device("meta"):  # allocates nothing: the file's tensors take the places
            backbone = IResNet(depth_of[block_count], width, embed_dim)
        backbone.load_state_dict(state, assign=True)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not InsightFace's IResNet: {reason}") from None
    return backbone.float().eval()


def read_state_dict(path):
    """The named tensors of a checkpoint, in whichever of the usual nestings they are."""
    try:
        with torch.serialization.safe_globals(numpy_scalars()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:  # of many kinds, for a file that is damaged or no checkpoint
        raise ValueError(f"{path}: {what_is_wrong(path, error)}") from None
    for key in ("model", "model_state_dict", "state_dict", "state_dict_backbone", "backbone"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a state dict")
    tensors = {str(name): value for name, value in state.items() if torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f"{path}: no tensors, but {list(state)[:5]}: save the state dict alone")
    return tensors


def what_is_wrong(path, error):
    """Why torch.load has failed, by the first bytes of the file."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: git lfs pull brings it"
    if start.lstrip().startswith(b"<"):
        return "a web page saved in the place of the file: download it again"
    if start.startswith(b"\x08"):
        return "damaged, or an ONNX file: .github/from_onnx.py makes weights of it"
    if start[8:10] == b'{"':
        return (
            "safetensors: load it with safetensors.torch, and save the state dict with torch.save"
        )
    if "TorchScript" in str(error):
        return "TorchScript: load it with torch.jit.load, and save its state_dict() with torch.save"
    return "damaged, or it holds more than tensors: save model.state_dict() alone"


def numpy_scalars():
    """What a numpy scalar such as epoch=np.int64(3) is pickled with, for torch.load to admit."""
    try:
        import numpy as np
    except ImportError:
        return []
    types = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    scalar = np.int64(0).__reduce__()[0]
    return [np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *types]  # as in numpy 1


@torch.no_grad()
def embed(backbone: nn.Module, images: Tensor, flip: str = "sum") -> Tensor:
    """(N, 3, 112, 112) RGB in [-1, 1] -> unit embeddings (N, D), whose dot products are cosines.

    flip: what the mirrored image contributes. "sum" adds its embedding, as InsightFace does;
    "concat" puts the two unit embeddings side by side, (N, 2D), as the official LRFR code does;
    "none" leaves it out.
    ValueError for values outside of [-1, 1] (0 to 1 goes unnoticed, and gives wrong embeddings:
    take 2 * x - 1), another flip, or a backbone in training mode.
    """
    if flip not in ("sum", "concat", "none"):
        raise ValueError(f"flip must be 'sum', 'concat' or 'none', got '{flip}'")
    if backbone.training:
        raise ValueError("the backbone is in training mode: call backbone.eval() first")
    if images.numel() and not images.abs().amax() <= 1:  # so that nan is refused, too
        low, high = images.amin(), images.amax()
        raise ValueError(f"pixel values from {low:.4g} to {high:.4g}, not -1 to 1: see to_input")
    embeddings = backbone(images).float()
    if flip == "sum":
        embeddings = embeddings + backbone(images.flip(3))
    if flip == "concat":
        mirrored = backbone(images.flip(3)).float()
        embeddings = torch.cat([F.normalize(embeddings), F.normalize(mirrored)], 1)
    return F.normalize(embeddings)


# ---- 7. Checking the gradient --------------------------------------------------------------------


def check_gradient(p: float = 1.0) -> float:
    """The largest difference between logexp_grad and autograd, in float64."""
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(4, 16, dtype=torch.float64, device="cpu", generator=generator)
    y = torch.randn(4, 16, dtype=torch.float64, device="cpu", generator=generator)
    x.requires_grad_()
    (autograd,) = torch.autograd.grad(logexp_loss(x, y, p), x)
    return (logexp_grad(x, y, p) - autograd).abs().max().item()


if __name__ == "__main__":
    for exponent in (1.0, 2.0):
        error = check_gradient(exponent)
        print(f"p = {exponent:.0f}: logexp_grad and autograd differ by at most {error:.1e}")
        if not error < 1e-12:
            raise SystemExit("the analytic gradient of LogExp is wrong")
