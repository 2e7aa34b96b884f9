"""The instances that a detector finds in the images of a source, in COCO's format of results."""

from itertools import chain

import torch

from ldae.console import progress
from ldae.data.instances import InstanceSource, Pictures, encode
from ldae.data.loader import eval_batches
from ldae.detection.jitter import ScaleJitter
from ldae.detection.network import Detector
from ldae.detection.scoring import Result
from ldae.devices import report_low_memory
from ldae.distributed import gather_values, share_of
from ldae.precision import float32_products


@torch.inference_mode()
def find_instances(
    detector: Detector,
    source: InstanceSource,
    transform: ScaleJitter,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> list[Result]:
    """Return the detections in all images, in the order of the images, on every rank.

    Each rank works on its share of the images, in float32. Classes of the detector are those of the
    source; a class without a category in its annotations is left out.

    Args:
        transform: at a scale of 1, without flips.

    Raises: BadImage for a bad image; InputError when a worker process dies, and when the device has
        too little memory.
    """
    training = detector.training
    detector.eval()
    share = share_of(len(source))
    found: list[tuple[int, list[Result]]] = []
    with progress(len(share), "detection") as bar, float32_products():
        batches = eval_batches(Pictures(source), transform, share, batch_size, workers)
        for images, _, indices in batches:
            numbers = indices.tolist()
            sizes = [source.size(i) for i in numbers]
            with report_low_memory(device, f"{len(numbers)} images", "system.eval_batch"):
                parts = detector.find(images.to(device).float().div_(255), sizes)
            found += [(i, _results(source, i, part)) for i, part in zip(numbers, parts)]
            bar.update(len(numbers))
    detector.train(training)
    by_image = dict(chain.from_iterable(gather_values(found)))
    return list(chain.from_iterable(by_image[i] for i in range(len(source))))


def _results(source: InstanceSource, i: int, found: dict[str, torch.Tensor]) -> list[Result]:
    """Return the detections in image ``i``, see ``Detector.find``."""
    found = {name: values.cpu() for name, values in found.items()}
    found["boxes"][:, 2:] -= found["boxes"][:, :2]
    results = []
    for number in range(len(found["scores"])):
        category = source.categories.get((source.classes or [])[int(found["labels"][number]) - 1])
        if category is None:
            continue
        result: Result = {
            "image_id": source.image_id(i),
            "category_id": category,
            "bbox": found["boxes"][number].tolist(),
            "score": float(found["scores"][number]),
        }
        if "masks" in found:
            result["segmentation"] = encode((found["masks"][number, 0] > 0.5).numpy())
        results.append(result)
    return results
