"""Open the pre-training in a folder: read its metrics, denoise images, generate samples."""

import copy
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ldae import devices
from ldae.backbones.run import load_method
from ldae.data.image import from_pillow
from ldae.data.transforms import CropTransform
from ldae.errors import InputError, quoted
from ldae.precision import float32_products, recorded_gradients, unchanged_generators
from ldae.pretraining.images import sample_images
from ldae.runs.kinds import KINDS, pretraining_in, settings_of
from ldae.runs.metrics import read_records
from ldae.sampling.generation import generate_batches, prepare_generation
from ldae.sampling.settings import SamplingSettings, check_settings
from ldae.tree import COUNT

_DENOISING = "pretraining"  # the kind of run that can denoise and be sampled


class Denoised(NamedTuple):
    """Images before and after denoising, float32 (B, C, H, W) in [0, 1] on the CPU."""

    clean: torch.Tensor
    noised: torch.Tensor
    """The noised latents z_t, decoded."""
    denoised: torch.Tensor
    """The network's prediction of the clean images."""


class Run:
    """A pre-training in a folder, as ``load_run`` opens it and ``pretrain`` returns it.

    It has the run's settings, its metrics, and its last checkpoint's network. The checkpoint is
    read when it is first needed, and is then kept: open the run again to see a newer one.
    """

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        # Absolute, since the working folder may change.
        self.folder, self.device = Path(os.path.expanduser(folder)).absolute(), device

    def __getstate__(self) -> dict:
        """Pickle where the run is: its network, which may hold functions, is read again."""
        return {"folder": self.folder, "device": self.device}

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @cached_property
    def kind(self) -> str:
        """The kind of pre-training: ``pretraining`` by denoising, or a rival such as ``mae``."""
        return pretraining_in(self.folder)

    @cached_property
    def config(self) -> Any:
        """The settings, as in config.yaml."""
        return settings_of(self.folder, self.kind)

    @cached_property
    @recorded_gradients()
    def _loaded(self) -> tuple[Any, dict]:
        method, state = load_method(self.folder, self.kind)
        method.to(devices.device_for(self.device)).requires_grad_(False)
        # Kept for as long as the run is, so without the weights, which the method has, and without
        # the optimizer's moments.
        facts = {name: state[name] for name in ("images_seen", "describe")}
        return method, facts | {"average": bool(state["average"])}

    @property
    def method(self) -> nn.Module:
        """The whole network of the last checkpoint, in eval mode: tokenizer, encoder, decoder.

        Where the run averages its weights, this is the average.

        Raises: InputError when there is no checkpoint yet.
        """
        return self._loaded[0]

    @property
    def images_seen(self) -> int:
        """The number of images that the last checkpoint has seen."""
        return self._loaded[1]["images_seen"]

    @property
    def row(self) -> str:
        """The name of the recipe in the records."""
        return self._loaded[1]["describe"]["row"]

    @property
    def classes(self) -> list[str]:
        """The names of the classes of the training images; empty without labels."""
        return self._loaded[1]["describe"]["classes"]

    def metrics(self) -> list[dict[str, float]]:
        """Return the records of metrics.jsonl: images seen, loss and so on, oldest first.

        Examples:
            >>> losses = [record["loss"] for record in run.metrics()]
        """
        return read_records(self.folder)

    def images(self, count: int = 12) -> torch.Tensor:
        """Return images of the run's data, uint8 (count, C, H, W), of its evaluation split if any.

        Raises: InputError when the data cannot be read.
        """
        COUNT.check("count", count)
        return sample_images(self.config.data, torch.device("cpu"), count)

    @recorded_gradients()
    def backbone(self) -> nn.Module:
        """Return the encoder as graders see it: normalised (B, C, H, W) -> features (B, D).

        It is that of ``method``, on its device. ``ldae.load_backbone`` opens the newest by the name
        of the folder.
        """
        method = copy.deepcopy(self.method).cpu()
        with unchanged_generators():
            backbone: Any = KINDS[self.kind].functions().backbone(method, True)
        backbone.images_seen = self.images_seen
        return backbone.to(devices.device_for(self.device)).eval()

    def denoise(self, images: torch.Tensor | Sequence[Image.Image], t: int) -> Denoised:
        """Noise images at level ``t``, and let the network predict the clean ones.

        Args:
            images: uint8 (B, C, H, W) of the run's size, such as ``images()`` returns; or pictures
                of any size, which are read and cropped as evaluation images are.
            t: the noise level, from 0, the least noise, to the number of levels less one.

        Raises: InputError for a run that does not denoise, for a level that it does not have, and
            for images that do not fit.
        """
        method = self._denoising()
        levels = len(method.sigma)
        if isinstance(t, bool) or t not in range(levels):
            raise InputError(
                f"t {t} is not in 0 .. {levels - 1}, the noise levels of {self.folder}"
            )
        pixels = self._pixels(images).to(method.sigma.device)
        positions = torch.arange(len(pixels), device=pixels.device)
        with float32_products():
            return Denoised(
                *(part.cpu() for part in method.denoise_images(pixels, positions, int(t)))
            )

    def sample(
        self,
        images: int = 16,
        sampling: SamplingSettings = SamplingSettings(),
        *,
        data: str | Path | None = None,
        batch_size: int = 64,
        workers: int = 4,
    ) -> torch.Tensor:
        """Generate images, uint8 (images, C, H, W) on the CPU: those of ``ldae.sample``, not saved.

        Args:
            images: number of images; image n depends only on the run, the settings and n.
            sampling: the sampler and its settings.
            data: for rows that do not end in pure noise, the images to fit the Gaussian of latents
                to, as in ``ldae.sample``; by default the training images.
            batch_size: images at a time.
            workers: processes that decode images for that Gaussian, which is kept in the run
                folder.

        Raises: InputError for a run that cannot be sampled, and for settings that do not fit it.

        Examples:
            >>> run.sample(4, ldae.SamplingSettings(sampler="heun", steps=20))
        """
        check_settings(sampling)
        COUNT.check("images", images)
        COUNT.check("batch_size", batch_size)
        method = self._denoising()
        device, data = method.sigma.device, None if data is None else str(data)
        try:
            generate, _, _ = prepare_generation(
                self.folder, method, self._loaded[1], sampling, device, data, workers
            )
            batches = generate_batches(generate, range(images), batch_size, device)
            return torch.cat([pictures for _, pictures in batches])
        finally:
            method.bf16 = False

    def _denoising(self) -> Any:
        """Return the method. Raises: InputError when it does not denoise."""
        settings_of(self.folder, _DENOISING)  # refuses runs of other kinds
        return self.method

    def _pixels(self, images: torch.Tensor | Sequence[Image.Image]) -> torch.Tensor:
        """Return images as uint8 (B, C, H, W) of the run's size. Raises: InputError."""
        data = self.config.data
        wanted = (data.in_chans, data.img_size, data.img_size)
        if not isinstance(images, torch.Tensor):
            pictures = images if isinstance(images, Sequence) else ()
            if not pictures or not all(isinstance(part, Image.Image) for part in pictures):
                raise InputError(
                    f"images must be a tensor or a list of Pillow pictures, not {quoted(images)}"
                )
            crop, rng = CropTransform(data.img_size, data.in_chans), np.random.default_rng(0)
            return torch.stack([crop(from_pillow(picture), rng) for picture in pictures])
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise InputError(
                f"images must be uint8 of shape (B, {', '.join(map(str, wanted))}), not "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        return images


def load_run(folder: str | Path, device: str = "auto") -> Run:
    """Open the pre-training in a folder: metrics, denoising, sampling and the backbone.

    Args:
        folder: the run folder.
        device: auto, cpu, cuda or cuda:N, for the network.

    Raises: InputError when the folder holds no pre-training.

    Examples:
        >>> run = ldae.load_run("runs/l_dae")
        >>> run.config.optim.epochs, run.images_seen, run.metrics()[-1]["loss"]
        >>> clean, noised, denoised = run.denoise(run.images(8), t=500)
        >>> pictures = run.sample(16)
        >>> features = run.backbone()(normalised_images)
    """
    run = Run(folder, device)
    _ = run.kind  # refuses another folder
    return run
