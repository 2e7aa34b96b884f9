"""The fifteen corruptions of ImageNet-C by name, at five severities, as pure functions.

Source: Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations, with the constants of ImageNet-C, and of CIFAR-10-C for small images.

Results are close to those on the published files, but not equal. The differences are:

- Lengths scale with the shorter side of the image.
- Frost is drawn (see ``distortions.frost``).
- Values are rounded, not truncated.
- The corrupted images are not compressed; the files of ImageNet-C are JPEGs of quality 85.
- Blurs, zooms and clouds are computed with NumPy, SciPy and Pillow.
"""

from collections.abc import Iterable

import numpy as np

from ldae.data import distortions
from ldae.errors import InputError, unknown

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64  # images with a shorter side below this use CIFAR-10-C's constants

Table = dict[str, dict[str, tuple[float, ...]]]

# The image side for which the constants were chosen, and corruption -> constant -> values at the
# five severities.
_IMAGENET: tuple[int, Table] = (224, {
    "gaussian_noise": {"std": (0.08, 0.12, 0.18, 0.26, 0.38)},
    "shot_noise": {"photons": (60, 25, 12, 5, 3)},
    "impulse_noise": {"share": (0.03, 0.06, 0.09, 0.17, 0.27)},
    "defocus_blur": {"radius": (3, 4, 6, 8, 10), "alias": (0.1, 0.5, 0.5, 0.5, 0.5)},
    "glass_blur": {
        "sigma": (0.7, 0.9, 1, 1.1, 1.5), "reach": (1, 2, 2, 3, 4), "passes": (2, 1, 3, 2, 2)
    },
    "motion_blur": {"radius": (10, 15, 15, 15, 20), "sigma": (3, 5, 8, 12, 15)},
    "zoom_blur": {"stop": (1.11, 1.16, 1.21, 1.26, 1.31), "step": (0.01, 0.01, 0.02, 0.02, 0.03)},
    "snow": {
        "mean": (0.1, 0.2, 0.55, 0.55, 0.55),
        "std": (0.3, 0.3, 0.3, 0.3, 0.3),
        "zoom": (3, 2, 4, 4.5, 2.5),
        "threshold": (0.5, 0.5, 0.9, 0.85, 0.85),
        "radius": (10, 12, 12, 12, 12),
        "sigma": (4, 4, 8, 8, 12),
        "kept": (0.8, 0.7, 0.7, 0.65, 0.55),
    },
    "frost": {"image": (1, 0.8, 0.7, 0.65, 0.6), "ice": (0.4, 0.6, 0.7, 0.7, 0.75)},
    "fog": {"amount": (1.5, 2, 2.5, 2.5, 3), "decay": (2, 2, 1.7, 1.5, 1.4)},
    "brightness": {"added": (0.1, 0.2, 0.3, 0.4, 0.5)},
    "contrast": {"kept": (0.4, 0.3, 0.2, 0.1, 0.05)},
    "elastic_transform": {  # multiples of a side of 244, by which the authors meant 224
        "alpha": (488, 488, 12.2, 17.08, 29.28),
        "sigma": (170.8, 19.52, 2.44, 2.44, 2.44),
        "jitter": (24.4, 48.8, 4.88, 4.88, 4.88),
    },
    "pixelate": {"kept": (0.6, 0.5, 0.4, 0.3, 0.25)},
    "jpeg_compression": {"quality": (25, 18, 15, 10, 7)},
})  # fmt: skip

_CIFAR: tuple[int, Table] = (32, {
    "gaussian_noise": {"std": (0.04, 0.06, 0.08, 0.09, 0.1)},
    "shot_noise": {"photons": (500, 250, 100, 75, 50)},
    "impulse_noise": {"share": (0.01, 0.02, 0.03, 0.05, 0.07)},
    "defocus_blur": {"radius": (0.3, 0.4, 0.5, 1, 1.5), "alias": (0.4, 0.5, 0.6, 0.2, 0.1)},
    "glass_blur": {
        "sigma": (0.05, 0.25, 0.4, 0.25, 0.4), "reach": (1, 1, 1, 1, 1), "passes": (1, 1, 1, 2, 2)
    },
    "motion_blur": {"radius": (6, 6, 6, 8, 9), "sigma": (1, 1.5, 2, 2, 2.5)},
    "zoom_blur": {"stop": (1.06, 1.11, 1.16, 1.21, 1.26), "step": (0.01, 0.01, 0.01, 0.01, 0.01)},
    "snow": {
        "mean": (0.1, 0.1, 0.15, 0.25, 0.3),
        "std": (0.2, 0.2, 0.3, 0.3, 0.3),
        "zoom": (1, 1, 1.75, 2.25, 1.25),
        "threshold": (0.6, 0.5, 0.55, 0.6, 0.65),
        "radius": (8, 10, 10, 12, 14),
        "sigma": (3, 4, 4, 6, 12),
        "kept": (0.95, 0.9, 0.9, 0.85, 0.8),
    },
    "frost": {"image": (1, 1, 0.9, 0.85, 0.75), "ice": (0.2, 0.3, 0.4, 0.4, 0.45)},
    "fog": {"amount": (0.2, 0.5, 0.75, 1, 1.5), "decay": (3, 3, 2.5, 2, 1.75)},
    "brightness": {"added": (0.05, 0.1, 0.15, 0.2, 0.3)},
    "contrast": {"kept": (0.75, 0.5, 0.4, 0.3, 0.15)},
    "elastic_transform": {
        "alpha": (0, 1.6, 2.56, 3.2, 3.2),
        "sigma": (0, 6.4, 1.92, 1.28, 0.96),
        "jitter": (2.56, 2.24, 1.92, 1.6, 0.96),
    },
    "pixelate": {"kept": (0.95, 0.9, 0.85, 0.75, 0.65)},
    "jpeg_compression": {"quality": (80, 65, 58, 50, 40)},
})  # fmt: skip

NAMES = tuple(_IMAGENET[1])

# The power of the image's side with which each length grows. Noise smoothed over twice the length
# is half as strong, so alpha grows with the square for shifts that grow with the image. The zoom of
# snow is the size of a flake.
_EXPONENTS = {"radius": 1, "alias": 1, "reach": 1, "sigma": 1, "jitter": 1, "zoom": 1, "alpha": 2}


def constants(name: str, severity: int, side: int) -> dict[str, float]:
    """Return the constants of a corruption for images with a shorter side of ``side`` pixels.

    Raises: InputError for an unknown corruption or severity.
    """
    name = resolve_names((name,))[0]
    if severity not in SEVERITIES:
        raise InputError(f"severity must be 1, 2, 3, 4 or 5, not {severity}")
    table_side, table = _CIFAR if side < SMALL else _IMAGENET
    scale = side / table_side
    values = {key: row[severity - 1] for key, row in table[name].items()}
    return {key: value * scale ** _EXPONENTS.get(key, 0) for key, value in values.items()}


def resolve_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the named corruptions in the order of ``NAMES``; ``all`` means all fifteen.

    Raises: InputError for an unknown name; the message has the nearest name.
    """
    names = tuple(names)
    for name in names:
        if name not in (*NAMES, "all"):
            raise unknown("there is no corruption", name, (*NAMES, "all"))
    return NAMES if "all" in names else tuple(name for name in NAMES if name in names)


def corrupt(pixels: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Return a corrupted copy of an image, uint8 (H, W, C), with any number of channels.

    The random numbers are a function of ``seed`` and ``name``, so all severities of a corruption
    use the same ones.

    Raises: InputError as ``constants`` does.
    """
    values = constants(name, severity, min(pixels.shape[:2]))
    rng = np.random.default_rng([seed, NAMES.index(name)])
    distorted = getattr(distortions, name)(pixels / 255, rng, **values)
    return np.rint(distorted.clip(0, 1) * 255).astype(np.uint8)
