"""The fifteen corruptions of ImageNet-C as functions of pixels and random numbers."""

import math
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw
from scipy import fft, ndimage, signal

# Each corruption takes float64 pixels (H, W, C) in [0, 1] and a generator, and returns pixels of
# that shape, which the caller clips to [0, 1]. Lengths are in pixels. The functions were written
# from the paper and from measurements of the published images.
Pixels = np.ndarray
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
_SUBSAMPLES = 9  # per side of a pixel, to measure the area that a disk covers
_FROST_TINT = (0.88, 0.95, 1.0)
_FERNS, _BRANCHES = 60, 60  # branches are per fern


def gaussian_noise(x: Pixels, rng: np.random.Generator, std: float) -> Pixels:
    """Add Gaussian noise."""
    return x + std * rng.standard_normal(x.shape)


def shot_noise(x: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    """Replace values by Poisson counts; ``photons`` is the mean count at the value 1."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Pixels, rng: np.random.Generator, share: float) -> Pixels:
    """Set a ``share`` of all values to 0 or 1, independently in each channel."""
    chosen, salt = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(chosen, salt, x)


def defocus_blur(x: Pixels, rng: np.random.Generator, radius: float, alias: float) -> Pixels:
    """Average over a disk; a Gaussian of std ``alias`` softens the edge of the disk."""
    reach = math.ceil(radius) + 3
    fine = np.arange((2 * reach + 1) * _SUBSAMPLES) / _SUBSAMPLES - reach - 0.5 + 0.5 / _SUBSAMPLES
    covered = fine[:, None] ** 2 + fine**2 <= radius**2
    blocks = covered.reshape(2 * reach + 1, _SUBSAMPLES, 2 * reach + 1, _SUBSAMPLES)
    disk = blocks.mean((1, 3))
    return _convolve(x, ndimage.gaussian_filter(disk, alias, mode="constant"), "reflect")


def glass_blur(
    x: Pixels, rng: np.random.Generator, sigma: float, reach: float, passes: int
) -> Pixels:
    """Give each pixel the colour of a random pixel up to ``reach`` away, between two blurs.

    Pixels are replaced one after the other, the last ones first, so colours can travel further than
    that. The authors' program means to swap two pixels, but its swap of two views copies one.
    """
    x = _gaussian_blur(x, sigma)
    height, width = x.shape[:2]
    far = max(1, round(reach))
    rows, columns = np.arange(height - far, far, -1), np.arange(width - far, far, -1)
    targets = (rows[:, None] * width + columns).ravel()
    targets = targets[rng.random(len(targets)) < reach]  # below 1, only this share moves
    indices = list(range(height * width))
    for _ in range(int(passes)):
        down, right = rng.integers(-far, far, (2, len(targets)))
        sources = targets + down * width + right
        for target, source in zip(targets.tolist(), sources.tolist()):
            indices[target] = indices[source]
    return _gaussian_blur(x.reshape(height * width, -1)[indices].reshape(x.shape), sigma)


def motion_blur(x: Pixels, rng: np.random.Generator, radius: float, sigma: float) -> Pixels:
    """Blur in one random direction within 45 degrees of horizontal."""
    return _blur_along(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: Pixels, rng: np.random.Generator, stop: float, step: float) -> Pixels:
    """Average the image and its zooms by factors from 1 to below ``stop``."""
    factors = np.arange(1, stop, step)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


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
    """Whiten the scene and add falling flakes: enlarged noise, 0 below ``threshold``, blurred."""
    height, width = x.shape[:2]
    detail = max(1.0, 1 / zoom)  # several flakes that are smaller than a pixel share the pixel
    flakes = mean + std * rng.standard_normal((round(detail * height), round(detail * width), 1))
    flakes = _zoom(flakes, max(1.0, zoom))
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _resize(flakes, (width, height), Image.Resampling.BOX)
    flakes = _blur_along(flakes, radius, sigma, rng.uniform(-135, -45))
    whitened = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return kept * x + (1 - kept) * whitened + flakes + flakes[::-1, ::-1]


def frost(x: Pixels, rng: np.random.Generator, image: float, ice: float) -> Pixels:
    """Add ``image`` times the image and ``ice`` times a layer of frost.

    ImageNet-C crops the layer from photographs that cannot be redistributed. Here the layer is
    drawn: ferns of ice on a cloudy film. Accuracies do not compare with published ones.
    """
    height, width, chans = x.shape
    film = plasma(height, width, 1.4, rng)
    layer = 0.1 + 0.5 * film + _ferns(height, width, rng) * (0.3 + 0.7 * film)
    tint = np.array(_FROST_TINT if chans == 3 else (1.0,))
    return image * x + ice * layer.clip(0, 1)[..., None] * tint


def fog(x: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    """Add a cloud; ``decay`` is explained in :func:`plasma`."""
    cloud = amount * plasma(*x.shape[:2], decay, rng)[..., None]
    return (x + cloud) * x.max() / (x.max() + amount)


def brightness(x: Pixels, rng: np.random.Generator, added: float) -> Pixels:
    """Add ``added`` to the value of HSV and keep hue and saturation."""
    value = x.max(2, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-9), raised)


def contrast(x: Pixels, rng: np.random.Generator, kept: float) -> Pixels:
    """Multiply deviations from the mean of each channel by ``kept``."""
    mean = x.mean((0, 1), keepdims=True)
    return mean + kept * (x - mean)


def elastic_transform(
    x: Pixels, rng: np.random.Generator, alpha: float, sigma: float, jitter: float
) -> Pixels:
    """Apply an affine map that moves three points by up to ``jitter``, and smooth local shifts.

    Shifts are uniform noise, smoothed by ``sigma``, times ``alpha``. Pixels are interpolated once.
    """
    height, width = x.shape[:2]
    center, offset = np.array([height // 2, width // 2]), min(height, width) // 3
    points = center + offset * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + rng.uniform(-jitter, jitter, points.shape)
    inverse = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # (3, 2)
    shifts = [alpha * _smooth(rng.uniform(-1, 1, (height, width)), sigma) for _ in range(2)]
    rows, columns = np.indices((height, width)) + shifts
    coordinates = np.stack([rows, columns, np.ones_like(rows)], 2) @ inverse
    planes = [
        ndimage.map_coordinates(plane, coordinates.transpose(2, 0, 1), order=1, mode="mirror")
        for plane in x.transpose(2, 0, 1)
    ]
    return np.stack(planes, 2)


def pixelate(x: Pixels, rng: np.random.Generator, kept: float) -> Pixels:
    """Shrink the image to the share ``kept`` of each side and enlarge it again."""
    height, width = x.shape[:2]
    size = (max(1, int(width * kept)), max(1, int(height * kept)))
    return _resize(_resize(x, size, Image.Resampling.BOX), (width, height), Image.Resampling.BOX)


def jpeg_compression(x: Pixels, rng: np.random.Generator, quality: int) -> Pixels:
    """Compress three channels as a colour image, other numbers of channels one by one."""
    pixels = np.rint(x * 255).astype(np.uint8)
    images = [pixels] if pixels.shape[2] == 3 else pixels.transpose(2, 0, 1)
    return np.dstack([_compress_jpeg(image, int(quality)) for image in images]) / 255


def _compress_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a cloud (H, W) that spans [0, 1]: a sum of noise octaves, weaker at finer scales.

    Each octave's amplitude is the previous one divided by ``decay`` squared. The published images
    have the square because the authors' program multiplies by the amplitude twice.

    Source: Fournier, Fussell, Carpenter 1982, with a sum of smooth octaves in place of midpoints.
    """
    cloud = np.zeros((height, width, 1))
    for octave in range(math.ceil(math.log2(max(height, width, 2)))):
        points = 2 ** (octave + 1) + 1
        grid = rng.uniform(-1, 1, (points, points, 1))
        cloud += decay ** (-2 * octave) * _resize(grid, (width, height), Image.Resampling.BICUBIC)
    cloud -= cloud.min()
    return cloud[..., 0] / max(cloud.max(), 1e-9)


def _ferns(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ferns (H, W) in [0, 1]: stems with branches at about 60 degrees, shorter at the tip."""
    canvas = Image.new("L", (2 * width, 2 * height))  # twice as large, for smooth lines
    draw = ImageDraw.Draw(canvas)
    for _ in range(_FERNS):
        length = rng.uniform(0.1, 0.7) * min(canvas.size)
        root, angle, grey = rng.uniform(0, canvas.size), rng.uniform(0, 2 * np.pi), rng.uniform()
        stem = length * np.array([np.cos(angle), np.sin(angle)])
        parts = rng.uniform(0, 1, (_BRANCHES, 1))
        angles = angle + np.pi / 3 * rng.choice([-1, 1], parts.shape)
        angles = angles + rng.normal(0, 0.1, parts.shape)
        lengths = 0.35 * length * (1 - parts) * rng.uniform(0.2, 1, parts.shape)
        starts = root + parts * stem
        ends = starts + lengths * np.concatenate([np.cos(angles), np.sin(angles)], 1)
        greys = 255 * (0.25 + 0.5 * grey + 0.25 * rng.uniform(size=_BRANCHES))
        for line, shade in zip(np.concatenate([starts, ends], 1).tolist(), greys.tolist()):
            draw.line(line, int(shade))
        draw.line([*root, *(root + stem)], int(greys.max()), 2)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255


def _grey(x: Pixels) -> Pixels:
    return (x @ np.array(_LUMA) if x.shape[2] == 3 else x.mean(2))[..., None]


def _gaussian_blur(x: Pixels, sigma: float) -> Pixels:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _smooth(field: np.ndarray, sigma: float) -> np.ndarray:
    """Blur ``field`` with a Gaussian of any width, mirrored at the edges, by a cosine transform."""
    gains = [np.exp(-0.5 * (sigma * np.pi * np.arange(n) / n) ** 2) for n in field.shape]
    return fft.idctn(fft.dctn(field) * gains[0][:, None] * gains[1])


def _convolve(x: Pixels, kernel: np.ndarray, edge: str) -> Pixels:
    """Convolve with a kernel of odd size, scaled to the sum 1; ``edge`` is a mode of ``np.pad``."""
    top, left = (side // 2 for side in kernel.shape)
    padded = np.pad(x, ((top, top), (left, left), (0, 0)), edge)
    kernel = kernel / kernel.sum()
    return signal.fftconvolve(padded, kernel[..., None], "valid", axes=(0, 1))


def _blur_along(x: Pixels, radius: float, sigma: float, angle: float) -> Pixels:
    """Blur along ``angle`` in degrees as ImageMagick does: half a Gaussian to one side.

    The half has 2 radius + 1 points.
    """
    steps = np.arange(2 * math.ceil(radius) + 1)
    slope = math.radians(angle)
    down, right = (
        np.ceil(steps * part - 0.5).astype(int) for part in (math.sin(slope), math.cos(slope))
    )
    reach = len(steps)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    # A convolution mirrors its kernel.
    np.add.at(kernel, (reach - down, reach - right), np.exp(-0.5 * (steps / sigma) ** 2))
    return _convolve(x, kernel, "edge")


def _zoom(x: Pixels, factor: float) -> Pixels:
    """Enlarge the middle of ``x`` to the size of ``x``."""
    height, width = x.shape[:2]
    edge_x, edge_y = (0.5 * side * (1 - 1 / factor) for side in (width, height))
    box = (edge_x, edge_y, width - edge_x, height - edge_y)
    return _resize(x, (width, height), Image.Resampling.BILINEAR, box)


def _resize(
    x: Pixels,
    size: tuple[int, int],
    filter: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """Resize to ``size``, (width, height), as Pillow does."""
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in x.transpose(2, 0, 1)]
    return np.stack([np.asarray(plane.resize(size, filter, box), float) for plane in planes], 2)
