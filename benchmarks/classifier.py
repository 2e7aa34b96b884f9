"""Train a small supervised classifier on a source's images, and write a folder that timm opens.

python benchmarks/classifier.py --data SOURCE [--eval-data SOURCE] --out FOLDER

Without VGG16 weights, its features are the perceptual network of the conv tokenizers. It also
judges the class of samples. The network is a ResNet-10-T of a third of its width at output stride
8, for 32 x 32 images; the recipe is AdamW, one cycle, random resized crops and flips.
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from ldae.data.loader import eval_batches, train_batches
from ldae.data.open import open_splits
from ldae.data.transforms import CropTransform
from ldae.devices import device_for
from ldae.files import write_json
from ldae.runs.environment import environment

_BATCH, _LR, _DECAY = 128, 4e-3, 0.05
_MODEL_ARGS = {"channels": (32, 64, 128, 256), "output_stride": 8}
# Any normalisation works, as long as all users of the folder read it there.
_MEAN = _STD = (0.5, 0.5, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    device = device_for("auto")
    train, evaluation = open_splits(args.data, args.eval_data)
    model_args = _MODEL_ARGS | {"num_classes": len(train.classes)}
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", **model_args).to(
        device, memory_format=torch.channels_last
    )
    steps = args.epochs * len(train) // _BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=_DECAY)
    annealing = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LR, total_steps=steps, pct_start=0.2
    )
    batches = train_batches(
        train,
        CropTransform(args.img_size, 3, "random", flip=True),
        seed=0,
        start=0,
        stop=steps * _BATCH,
        batch_size=_BATCH,
        workers=args.workers,
    )
    for step, batch in enumerate(batches):
        logits = model(normalise(batch.images, device))
        loss = F.cross_entropy(logits, batch.targets.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealing.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)

    top1 = accuracy(model.eval(), evaluation, args.img_size, device)
    print(f"top-1 {top1:.2f} on {evaluation.spec}")
    model.pretrained_cfg = model.pretrained_cfg | {
        "tag": "ldae_benchmark",
        "input_size": (3, args.img_size, args.img_size),
        "num_classes": len(train.classes),
        "mean": _MEAN,
        "std": _STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    timm.models.save_for_hf(
        model.to("cpu", memory_format=torch.contiguous_format),  # safetensors takes no other
        args.out,
        model_config={"label_names": train.classes},
        model_args=model_args,
        safe_serialization=True,
    )
    record = {"top1": top1, "data": train.spec, "eval_data": evaluation.spec}
    record |= {"epochs": args.epochs, "environment": environment(device)}
    write_json(args.out / "classifier.json", record)


def normalise(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    return images.to(device).float() / 127.5 - 1


@torch.inference_mode()
def accuracy(model: torch.nn.Module, source, img_size: int, device: torch.device) -> float:
    correct = 0
    batches = eval_batches(source, CropTransform(img_size), range(len(source)), 256, workers=0)
    for images, labels, _ in batches:
        correct += int((model(normalise(images, device)).argmax(1).cpu() == labels).sum())
    return 100 * correct / len(source)


if __name__ == "__main__":
    main()
