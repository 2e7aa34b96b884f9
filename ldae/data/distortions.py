"""What each of the fifteen corruptions of ImageNet-C does to pixels."""

import math
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw
from scipy import fft, ndimage, signal

# All take float64 pixels (H, W, C) in [0, 1] and a generator, and return such pixels, clipped by the
# caller; lengths are in pixels. Written from the paper and from what the published images hold.
Pixels = np.ndarray
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
_SUBSAMPLES = 9  # on a side of a pixel, for the area that a disk covers
_FROST_TINT = (0.88, 0.95, 1.0)
_FERNS, _BRANCHES = 60, 60


def gaussian_noise(x: Pixels, rng: np.random.Generator, std: float) -> Pixels:
    return x + std * rng.standard_normal(x.shape)


def shot_noise(x: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    """``photons`` are counted, on average, where a channel is at its maximum."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Pixels, rng: np.random.Generator, share: float) -> Pixels:
    """A ``share`` of all values, each channel by itself, becomes 0 or 1."""
    chosen, salt = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(chosen, salt, x)


def defocus_blur(x: Pixels, rng: np.random.Generator, radius: float, alias: float) -> Pixels:
    """The mean over a disk, whose edge a Gaussian of std ``alias`` softens."""
    reach = math.ceil(radius) + 3
    fine = np.arange((2 * reach + 1) * _SUBSAMPLES) / _SUBSAMPLES - reach - 0.5 + 0.5 / _SUBSAMPLES
    inside = fine[:, None] ** 2 + fine**2 <= radius**2
    blocks = inside.reshape(2 * reach + 1, _SUBSAMPLES, 2 * reach + 1, _SUBSAMPLES)
    disk = blocks.mean((1, 3))
    return _filtered(x, ndimage.gaussian_filter(disk, alias, mode="constant"), "reflect")


def glass_blur(
    x: Pixels, rng: np.random.Generator, sigma: float, reach: float, passes: int
) -> Pixels:
    """Pixels, blurred before and after, take the colour of others up to ``reach`` away.

    They do so one after the other, the last ones first, so that colours also travel further. The
    published program means to swap the two, but its swap of two views copies one of them.
    """
    x = _gaussian(x, sigma)
    height, width = x.shape[:2]
    far = max(1, round(reach))
    rows, columns = np.arange(height - far, far, -1), np.arange(width - far, far, -1)
    takers = (rows[:, None] * width + columns).ravel()
    takers = takers[rng.random(len(takers)) < reach]  # below one pixel, only some of them
    source = list(range(height * width))
    for _ in range(int(passes)):
        down, right = rng.integers(-far, far, (2, len(takers)))
        givers = takers + down * width + right
        for taker, giver in zip(takers.tolist(), givers.tolist()):
            source[taker] = source[giver]
    return _gaussian(x.reshape(height * width, -1)[source].reshape(x.shape), sigma)


def motion_blur(x: Pixels, rng: np.random.Generator, radius: float, sigma: float) -> Pixels:
    return _streaked(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: Pixels, rng: np.random.Generator, stop: float, step: float) -> Pixels:
    """The mean of the image and of what zooms from 1 to below ``stop`` show of it."""
    zooms = np.arange(1, stop, step)
    return (x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


def snow(
    x: Pixels,
    rng: np.random.Generator,
    mean: float,
    std: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Pixels:
    """Flakes are noise, enlarged and cut off below ``threshold``, falling; the scene whitens."""
    height, width = x.shape[:2]
    fine = max(1.0, 1 / zoom)  # of flakes that are smaller than a pixel, several share one
    flakes = mean + std * rng.standard_normal((round(fine * height), round(fine * width), 1))
    flakes = _zoomed(flakes, max(1.0, zoom))
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _resized(flakes, (width, height), Image.Resampling.BOX)
    flakes = _streaked(flakes, radius, sigma, rng.uniform(-135, -45))
    whitened = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return kept * x + (1 - kept) * whitened + flakes + flakes[::-1, ::-1]


def frost(x: Pixels, rng: np.random.Generator, image: float, ice: float) -> Pixels:
    """``image`` times the image and ``ice`` times a layer of frost.

    The layer is not of the photographs that ImageNet-C cuts it from, which can not be shipped: it
    is drawn, ferns of ice on a cloudy film. Accuracies under it do not compare with published ones.
    """
    height, width, chans = x.shape
    film = plasma(height, width, 1.4, rng)
    layer = 0.1 + 0.5 * film + _ferns(height, width, rng) * (0.3 + 0.7 * film)
    tint = np.array(_FROST_TINT if chans == 3 else (1.0,))
    return image * x + ice * layer.clip(0, 1)[..., None] * tint


def fog(x: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    """A cloud is added; its octaves weaken by ``decay`` squared."""
    thick = amount * plasma(*x.shape[:2], decay, rng)[..., None]
    return (x + thick) * x.max() / (x.max() + amount)


def brightness(x: Pixels, rng: np.random.Generator, added: float) -> Pixels:
    """``added`` to the value of HSV; hue and saturation stay."""
    value = x.max(2, keepdims=True)
    wanted = np.minimum(value + added, 1)
    return np.where(value > 0, x * wanted / np.maximum(value, 1e-9), wanted)


def contrast(x: Pixels, rng: np.random.Generator, kept: float) -> Pixels:
    """Distances from the mean of each channel shrink."""
    mean = x.mean((0, 1), keepdims=True)
    return mean + kept * (x - mean)


def elastic_transform(
    x: Pixels, rng: np.random.Generator, alpha: float, sigma: float, jitter: float
) -> Pixels:
    """An affine map that moves three points by up to ``jitter``, then smooth local shifts.

    Shifts are uniform noise smoothed by ``sigma``, times ``alpha``. Both are one interpolation.
    """
    height, width = x.shape[:2]
    center, arm = np.array([height // 2, width // 2]), min(height, width) // 3
    points = center + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + rng.uniform(-jitter, jitter, points.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # (3, 2)
    shifts = [alpha * _smooth(rng.uniform(-1, 1, (height, width)), sigma) for _ in range(2)]
    rows, columns = np.indices((height, width)) + shifts
    places = np.stack([rows, columns, np.ones_like(rows)], 2) @ back
    planes = [
        ndimage.map_coordinates(plane, places.transpose(2, 0, 1), order=1, mode="mirror")
        for plane in x.transpose(2, 0, 1)
    ]
    return np.stack(planes, 2)


def pixelate(x: Pixels, rng: np.random.Generator, kept: float) -> Pixels:
    """``kept`` is of each side."""
    height, width = x.shape[:2]
    size = (max(1, int(width * kept)), max(1, int(height * kept)))
    return _resized(_resized(x, size, Image.Resampling.BOX), (width, height), Image.Resampling.BOX)


def jpeg_compression(x: Pixels, rng: np.random.Generator, quality: int) -> Pixels:
    """Three channels are a colour image; other numbers of channels are compressed one by one."""
    pixels = np.rint(x * 255).astype(np.uint8)
    images = [pixels] if pixels.shape[2] == 3 else pixels.transpose(2, 0, 1)
    return np.dstack([_through_jpeg(image, int(quality)) for image in images]) / 255


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloud (H, W) that fills [0, 1]: noise at every scale, each finer one weaker.

    Source: Fournier, Fussell, Carpenter 1982, with the smooth steps of an octave sum in the place of
    midpoints. The amplitude of an octave is the one before over decay squared, as it is in the
    published images, whose program multiplies by its amplitude twice.
    """
    cloud = np.zeros((height, width, 1))
    for octave in range(math.ceil(math.log2(max(height, width, 2)))):
        points = 2 ** (octave + 1) + 1
        grid = rng.uniform(-1, 1, (points, points, 1))
        cloud += decay ** (-2 * octave) * _resized(grid, (width, height), Image.Resampling.BICUBIC)
    cloud -= cloud.min()
    return cloud[..., 0] / max(cloud.max(), 1e-9)


def _ferns(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Ferns of ice (H, W): stems with branches at about 60 degrees, shorter towards the tip."""
    canvas = Image.new("L", (2 * width, 2 * height))  # twice as large, for smooth lines
    draw = ImageDraw.Draw(canvas)
    for _ in range(_FERNS):
        length = rng.uniform(0.1, 0.7) * min(canvas.size)
        place, angle, grey = rng.uniform(0, canvas.size), rng.uniform(0, 2 * np.pi), rng.uniform()
        stem = length * np.array([np.cos(angle), np.sin(angle)])
        parts = rng.uniform(0, 1, (_BRANCHES, 1))
        turns = angle + np.pi / 3 * rng.choice([-1, 1], parts.shape)
        turns = turns + rng.normal(0, 0.1, parts.shape)
        reach = 0.35 * length * (1 - parts) * rng.uniform(0.2, 1, parts.shape)
        starts = place + parts * stem
        ends = starts + reach * np.concatenate([np.cos(turns), np.sin(turns)], 1)
        greys = 255 * (0.25 + 0.5 * grey + 0.25 * rng.uniform(size=_BRANCHES))
        for line, shade in zip(np.concatenate([starts, ends], 1).tolist(), greys.tolist()):
            draw.line(line, int(shade))
        draw.line([*place, *(place + stem)], int(greys.max()), 2)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255


def _grey(x: Pixels) -> Pixels:
    return (x @ np.array(_LUMA) if x.shape[2] == 3 else x.mean(2))[..., None]


def _gaussian(x: Pixels, sigma: float) -> Pixels:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _smooth(field: np.ndarray, sigma: float) -> np.ndarray:
    """``field`` under a Gaussian of any width, mirrored at its edges: a product of cosine sums."""
    gains = [np.exp(-0.5 * (sigma * np.pi * np.arange(n) / n) ** 2) for n in field.shape]
    return fft.idctn(fft.dctn(field) * gains[0][:, None] * gains[1])


def _filtered(x: Pixels, kernel: np.ndarray, edge: str) -> Pixels:
    """``x`` under an odd kernel that sums to one; ``edge`` is a mode of numpy's pad."""
    top, left = (side // 2 for side in kernel.shape)
    padded = np.pad(x, ((top, top), (left, left), (0, 0)), edge)
    kernel = kernel / kernel.sum()
    return signal.fftconvolve(padded, kernel[..., None], "valid", axes=(0, 1))


def _streaked(x: Pixels, radius: float, sigma: float, angle: float) -> Pixels:
    """Motion blur as ImageMagick's: half a Gaussian of 2 radius + 1 points to one side."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    turn = math.radians(angle)
    down, right = (
        np.ceil(steps * part - 0.5).astype(int) for part in (math.sin(turn), math.cos(turn))
    )
    reach = len(steps)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    # A convolution takes a pixel from the other side of where the kernel puts it.
    np.add.at(kernel, (reach - down, reach - right), np.exp(-0.5 * (steps / sigma) ** 2))
    return _filtered(x, kernel, "edge")


def _zoomed(x: Pixels, zoom: float) -> Pixels:
    """The middle of ``x``, enlarged to its size."""
    height, width = x.shape[:2]
    edge_x, edge_y = (0.5 * side * (1 - 1 / zoom) for side in (width, height))
    box = (edge_x, edge_y, width - edge_x, height - edge_y)
    return _resized(x, (width, height), Image.Resampling.BILINEAR, box)


def _resized(
    x: Pixels,
    size: tuple[int, int],
    filter: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """``size`` is width, height, as Pillow's."""
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in x.transpose(2, 0, 1)]
    return np.stack([np.asarray(plane.resize(size, filter, box), float) for plane in planes], 2)
