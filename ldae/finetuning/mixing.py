"""Normalisation, random erasing, mixup and CutMix of the batches of a fine-tuning."""

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing

from ldae.backbones.preprocessing import EvalTransform
from ldae.data.augment import seed_global_rng
from ldae.data.workers import Batch
from ldae.errors import InputError
from ldae.finetuning.settings import AugmentSettings

# Third word of the seed. The loader seeds the augmentation of an image with two words only.
_MIXING = 1


class Mixing:
    """Normalisation, then timm's RandomErasing and Mixup, of batches on a device.

    Positions are cut into groups of ``mix_images``. One random draw mixes a group, each image with
    the image at the mirrored place of the group. The draw depends only on the seed and on the first
    position of the group. The result is thus the same for every division of a batch into ranks and
    micro batches.
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

    def check(self, micro_batch: int) -> None:
        """Check that a micro batch of so many images is a whole number of groups.

        Raises: InputError when it is not, or when images cannot be mixed in pairs.
        """
        group = self.augment.mix_images
        if self.mix and group % 2:
            raise InputError(f"augment.mix_images must be an even number, not {group}")
        if micro_batch % group:
            raise InputError(
                f"a micro batch of {micro_batch} images is not a multiple of augment.mix_images "
                f"{group}: change optim.batch_size, system.device_batch or augment.mix_images"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """Move a batch to the device and mix it.

        uint8 images (B, C, H, W) become normalised float32 images of the same shape. Labels, int64
        (B,), become soft targets, float32 (B, num_classes).
        """
        images = self.transform.normalize(batch.images.to(self.device, non_blocking=True))
        labels = batch.targets.to(self.device, non_blocking=True)
        groups = zip(*(part.split(self.augment.mix_images) for part in (images, labels)))
        starts = batch.positions[:: self.augment.mix_images].tolist()
        # Images are erased and mixed in place, so only the targets are new tensors.
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
