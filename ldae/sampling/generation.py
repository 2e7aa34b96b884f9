"""Generation of numbered samples from a run's method and a sampler's settings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ldae import draws, files
from ldae.backbones.open import label_names, load_classifier
from ldae.backbones.preprocessing import EvalTransform, preprocessing
from ldae.console import progress
from ldae.devices import report_low_memory
from ldae.errors import InputError, nearest
from ldae.method import LDAE
from ldae.precision import float32_products
from ldae.runs.kinds import settings_of
from ldae.sampling import samplers
from ldae.sampling.latent_gaussian import LatentGaussian, load_or_fit_gaussian
from ldae.sampling.samplers import SAMPLERS
from ldae.sampling.settings import SamplingSettings
from ldae.tokenizers import OrthonormalTokenizer, check_kind
from ldae.trajectory import row_of
from ldae.tree import taken_by

Generate = Callable[[torch.Tensor], torch.Tensor]
"""Numbers of samples, int64 (B,) on the device -> images, uint8 (B, C, H, W) on the CPU."""
_STEPS = 50  # one of the numbers of steps in DDIM's tables

# Below this gamma^2 / sigma^2, z_t is replaced by pure noise: latents of unit size then change z_t
# by less than a tenth of its standard deviation.
_MAX_SNR_OF_NOISE = 1e-2


@dataclass(frozen=True)
class ResolvedSettings:
    """The settings of a sampling, resolved for one run."""

    settings: SamplingSettings
    levels: list[int]
    labels: torch.Tensor | None = None
    """Class labels, int64 (L,). None for unconditional runs."""
    classifier: nn.Module | None = None
    targets: torch.Tensor | None = None
    """Classes of the classifier to guide to, int64 (L,)."""
    transform: EvalTransform | None = None
    """Preprocessing of the classifier."""

    def choose(self, classes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return one of the classes (L,) for each sample number n: at n mod L, or at random."""
        if self.settings.random_labels:
            chosen = draws.labels(self.settings.seed, numbers, len(classes))
        else:
            chosen = numbers % len(classes)
        return classes.to(numbers.device)[chosen]


def resolve(method: LDAE, classes: list[str], settings: SamplingSettings) -> ResolvedSettings:
    """Resolve the settings of a sampling for a run with these names of classes.

    Raises: InputError naming the setting that does not fit the run.
    """
    _check_fits(method, settings)
    conditional = bool(method.denoiser.num_classes)
    top = highest_level(method)
    levels = samplers.sub_sequence(top, settings.steps or min(_STEPS, top + 1), settings.spacing)
    labels = None
    if conditional:
        labels = torch.tensor(_class_indices(settings.labels, classes, "this run"))
    if not settings.classifier:
        return ResolvedSettings(settings, levels, labels)
    in_chans = method.tokenizer.in_chans
    classifier = load_classifier(settings.classifier, 3 if in_chans == 1 else in_chans)
    transform = preprocessing(classifier)
    if in_chans not in (1, transform.input_size[0]):
        raise InputError(
            f"classifier {settings.classifier} takes {transform.input_size[0]} channels, but this "
            f"run generates {in_chans}"
        )
    targets = torch.tensor(_targets(settings, classifier, classes, labels))
    return ResolvedSettings(settings, levels, labels, classifier, targets, transform)


def _check_fits(method: LDAE, settings: SamplingSettings) -> None:
    """Check that a run can be sampled with these settings.

    Raises: InputError naming the setting that does not fit the run.
    """
    conditional = bool(method.denoiser.num_classes)
    if method.objective.clean is None:
        raise InputError(
            f"a run with objective.target {method.objective.name} cannot be sampled, because its "
            "output does not determine z_0"
        )
    if settings.guidance != 1 and not conditional:
        raise InputError("guidance needs a run with model.class_conditional; it is off in this run")
    if settings.guidance != 1 and not method.label_dropout:
        raise InputError(
            "guidance needs a run that was also trained without labels, but its "
            "model.label_dropout is 0"
        )
    if (settings.labels or settings.random_labels) and not (conditional or settings.classifier):
        raise InputError(
            "labels need a run with model.class_conditional, or a --classifier that guides"
        )
    if settings.clip:
        check_kind(OrthonormalTokenizer, method.tokenizer, "clip")


def _targets(
    settings: SamplingSettings,
    classifier: nn.Module,
    classes: list[str],
    labels: torch.Tensor | None,
) -> list[int]:
    """Return the classes of the classifier to guide to.

    Those of a class-conditional run, which has ``labels`` (L,), are the classes of the same names.

    Raises: InputError when a class does not exist, or classes cannot be matched.
    """
    names = label_names(classifier)
    if labels is None:
        numbers = [str(number) for number in range(classifier.num_classes)]
        return _class_indices(settings.labels, names or numbers, settings.classifier)
    if names:
        requested = [classes[label] for label in labels]
        return _class_indices(requested, names, settings.classifier, by_number=False)
    if classifier.num_classes == len(classes):
        return labels.tolist()
    raise InputError(
        f"classifier {settings.classifier} has {classifier.num_classes} classes without names, "
        f"but this run has {len(classes)}: they cannot be matched"
    )


def highest_level(method: LDAE) -> int:
    """Return the highest level at which z_0 follows from the network's prediction.

    At gamma_t = 0 it does not follow from the noise or the score.
    """
    levels = torch.arange(len(method.gamma))
    if method.objective.patches is None:
        one, level = torch.ones_like(method.gamma), (method.gamma, method.sigma)
        clean = method.objective.clean(method.tokenizer, 0 * one, one, *level)
        levels = levels[clean.isfinite().cpu()]
    return int(levels[-1])


def is_pure_noise(method: LDAE, level: int) -> bool:
    """Return whether z_t at this level is close enough to pure noise to start from noise."""
    return bool(method.gamma[level] ** 2 < _MAX_SNR_OF_NOISE * method.sigma[level] ** 2)


@torch.no_grad()
def generate(
    method: LDAE, resolved: ResolvedSettings, gaussian: LatentGaussian | None, numbers: torch.Tensor
) -> torch.Tensor:
    """Generate the samples of these numbers, int64 (B,), as uint8 (B, C, H, W) on the CPU.

    Sample n depends only on the method, the settings and n. Without a ``gaussian``, samplers start
    from pure noise.

    Raises: InputError when a sample is not finite.
    """
    settings, tokenizer = resolved.settings, method.tokenizer
    gamma, sigma = method.gamma.double().cpu(), method.sigma.double().cpu()
    top, last = resolved.levels[0], torch.full_like(numbers, resolved.levels[-1])
    labels = None if resolved.labels is None else resolved.choose(resolved.labels, numbers)
    plain = partial(method.denoise, labels=labels)
    denoise = _guided(method, resolved, plain, gamma, sigma, numbers)
    if settings.clip:
        denoise = _clipped(method, denoise)

    def draw(step: int) -> torch.Tensor:
        shape = (tokenizer.num_tokens, tokenizer.dim)
        return draws.normal(settings.seed, numbers, shape, draws.SAMPLING + step).to(method.gamma)

    start = draw(0)  # step k uses stream k
    # With TF32 a sample would depend on the batch size.
    with float32_products():
        if gaussian is None:
            z = float(sigma[top]) * start
        else:
            z = gaussian.sample_noised(start, float(gamma[top]), float(sigma[top]))
        sampler = SAMPLERS[settings.sampler]
        options = taken_by(sampler, asdict(settings))
        z = sampler(denoise, z, resolved.levels, gamma, sigma, draw, **options)
        if denoise is plain:
            images = method.predict_image(z, last, labels)
        else:
            images = method.decode(denoise(z, last))
            if method.objective.patches is not None:
                # Guidance acts on z_0. The predicted image holds details beyond z_0: add them.
                images = (
                    images + method.predict_image(z, last, labels) - method.decode(plain(z, last))
                )
    finite = images.flatten(1).isfinite().all(1)
    if not finite.all():
        raise InputError(f"sample {numbers[~finite][0]} in {settings.precision} is not finite")
    return (tokenizer.denormalize(images).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def generate_batches(
    generate: Generate, numbers: Sequence[int], batch_size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield numbers of samples, int64 (B,), and the samples, with a progress bar.

    Raises: InputError when the device has too little memory, and as ``generate``.
    """
    with progress(len(numbers), "samples") as bar:
        for start in range(0, len(numbers), batch_size):
            batch = torch.tensor(numbers[start : start + batch_size])
            with report_low_memory(device, f"{len(batch)} samples", "--batch-size"):
                images = generate(batch.to(device))
            yield batch, images
            bar.update(len(batch))


def _guided(
    method: LDAE,
    resolved: ResolvedSettings,
    denoise: samplers.Denoise,
    gamma: torch.Tensor,
    sigma: torch.Tensor,
    numbers: torch.Tensor,
) -> samplers.Denoise:
    """Return the denoiser with the guidance that the settings ask for."""
    settings = resolved.settings
    if settings.guidance != 1:
        denoise = samplers.classifier_free(denoise, method.denoise, settings.guidance)
    if resolved.classifier is None:
        return denoise
    classifier = resolved.classifier.to(numbers.device)
    targets = resolved.choose(resolved.targets, numbers)[:, None]

    def log_likelihood(z_0: torch.Tensor) -> torch.Tensor:
        images = method.tokenizer.denormalize(method.decode(z_0))
        logits = classifier(resolved.transform.transform_tensor(images))
        return logits.log_softmax(-1).gather(1, targets)[:, 0]

    return samplers.classifier_guided(
        denoise, log_likelihood, settings.classifier_scale, gamma, sigma
    )


def _clipped(method: LDAE, denoise: samplers.Denoise) -> samplers.Denoise:
    """Return the denoiser with its predicted images clipped to the range of pixels.

    Source: Ho et al. 2020, in the code.
    """
    ends = torch.tensor([0, 255], dtype=torch.uint8, device=method.gamma.device)
    ends = ends[:, None, None, None].expand(2, method.tokenizer.in_chans, 1, 1)
    lowest, highest = method.tokenizer.normalize(ends)

    def clipped(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return method.encode(method.decode(denoise(z_t, t)).clamp(lowest, highest))

    return clipped


def _class_indices(
    requested: tuple[str, ...] | list[str], names: list[str], owner: str, by_number: bool = True
) -> list[int]:
    """Return the indices of the requested classes, or of all classes when none are requested.

    Args:
        requested: names of classes, or with ``by_number`` also their indices.
        owner: the run or the classifier that has these classes, for messages.

    Raises: InputError, with the nearest name, for a class that does not exist.
    """
    indices = []
    for label in requested or names:
        if label in names:
            indices.append(names.index(label))
        elif by_number and label.isdecimal() and int(label) < len(names):
            indices.append(int(label))
        else:
            raise InputError(
                f"{label!r} is none of the {len(names)} classes of {owner}; "
                f"the nearest is {nearest(label, names)!r}"
            )
    return indices


def prepare_generation(
    run: Path,
    method: LDAE,
    state: dict,
    settings: SamplingSettings,
    device: torch.device,
    data: str | None = None,
    workers: int = 4,
) -> tuple[Generate, ResolvedSettings, dict]:
    """Prepare the generation of samples from a run.

    Args:
        method: method of the run, from ``load_method``; it is moved to ``device``.
        state: checkpoint of the run, from ``load_method``.
        data: source of the images for the Gaussian of latents; by default the run's source.
        workers: processes that decode these images.

    Returns: the function that generates samples from their numbers, the resolved settings, and the
        record of everything that determines the samples.

    Raises: InputError for settings that do not fit the run.
    """
    resolved = resolve(method, state["describe"]["classes"], settings)
    method.to(device).requires_grad_(False)
    method.bf16 = settings.precision == "bf16"
    config, gaussian = settings_of(run, "pretraining"), None
    if not is_pure_noise(method, resolved.levels[0]):
        gaussian = load_or_fit_gaussian(run, config, method, device, data, workers)
    row = row_of(config)
    record = asdict(settings) | {
        "run": run.resolve().name,
        "weights": files.state_hash(method.state_dict()),
        "images_seen": state["images_seen"],
        "training": {
            "row": row.name if row else None,
            "class_conditional": config.model.class_conditional,
            "ema": config.optim.ema if state["average"] else 0.0,
            "ema_warmup": config.optim.ema_warmup,
        },
        "steps": len(resolved.levels),
        "latents": dict(sorted(gaussian.record.items())) if gaussian else None,
    }
    return partial(generate, method, resolved, gaussian), resolved, record
