"""From a batch of uint8 images and labels to the mixed one that a network is fine-tuned on."""

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.augment import seed_global_rng
from ldae.data.loader import Batch
from ldae.errors import InputError
from ldae.finetuning.settings import AugmentSettings

_MIXING = 1  # third word of the seed; with two, the loader draws an image's augmentation


class Mixing:
    """Normalise, erase, mix: timm's RandomErasing and Mixup on a device.

    Positions are cut into groups of ``mix_images``. A group is mixed by one draw, each image with the
    one at the mirrored place, and its draw is a pure function of the seed and of its first position.
    So it is the same for every division of a batch into ranks and micro batches. The labels become
    targets, float32 (B, num_classes).
    """

    def __init__(
        self,
        augment: AugmentSettings,
        transform: EvalTransform,
        num_classes: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.augment, self.transform, self.seed, self.device = augment, transform, seed, device
        self.num_classes = num_classes
        self.mix = None
        if (augment.mixup or augment.cutmix) and augment.mix_prob:
            self.mix = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )
        self.erase = RandomErasing(augment.erasing, mode="pixel", device=device)

    def check(self, piece: int) -> None:
        """Raises: InputError when ``piece`` images, a micro batch, are no whole number of groups."""
        group = self.augment.mix_images
        if self.mix and group % 2:
            raise InputError(f"augment.mix_images must be an even number, not {group}")
        if piece % group:
            raise InputError(
                f"a micro batch of {piece} images is not a multiple of augment.mix_images {group}: "
                "change optim.batch_size, system.device_batch or augment.mix_images"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """float32 images on the device, and targets, of uint8 images and labels on the CPU."""
        images = self.transform.normalise(batch.images.to(self.device, non_blocking=True))
        labels = batch.targets.to(self.device, non_blocking=True)
        groups = zip(*(part.split(self.augment.mix_images) for part in (images, labels)))
        starts = batch.positions[:: self.augment.mix_images].tolist()
        # In place where mixing is, so that only the targets are new.
        targets = [self._mix(start, *group) for start, group in zip(starts, groups, strict=True)]
        return batch._replace(images=images, targets=torch.cat(targets))

    def _mix(self, start: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, start, _MIXING])
        with seed_global_rng(rng, self.device):
            if self.augment.erasing:
                self.erase(images)
            if self.mix:
                return self.mix(images, labels)[1]
        return mixup_target(labels, self.num_classes, smoothing=self.augment.label_smoothing)
