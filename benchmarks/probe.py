"""What a sweep of a linear probe costs: many heads in one pass, one by one, and one online probe each.

python benchmarks/probe.py [--data SOURCE] [--backbone NAME] [--heads N] [--device DEVICE]

The backbone is untrained, which changes no time. The online probe augments the images anew in every
epoch, as the protocols mae and ldae do: a few epochs are measured, and a sweep is as many times longer
as it has epochs and candidates more. --classes draws labels among so many: what the heads of ImageNet's
thousand classes cost is seen on any images.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ldae.backbones.open import load_backbone
from ldae.commands.linear import CachedProtocol, LDAEProtocol
from ldae.data.open import open_source
from ldae.distributed import device_for
from ldae.evals.features import Encoder, extract_share
from ldae.evals.heads import Head, train_heads
from ldae.evals.online import train_online
from ldae.evals.taps import Tap
from ldae.files import write_json
from ldae.runs.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="scattered-digits:1024")
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="a timm name")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--classes", type=int, default=0, help="of drawn labels; 0: the data's own")
    parser.add_argument("--epochs", type=int, default=CachedProtocol.epochs)
    parser.add_argument("--online-epochs", type=int, default=1, help="that are measured")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3, help="after one of burn-in")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/probe.json"))
    asked = parser.parse_args()

    device = device_for(asked.device)
    source = open_source(asked.data, "train")
    backbone = load_backbone(asked.backbone, random_init=True, img_size=asked.img_size)
    encoder = Encoder(backbone, device, asked.precision)
    how = (asked.batch_size, asked.workers)
    protocol = CachedProtocol(epochs=asked.epochs)
    rates = np.geomspace(0.001, 10, asked.heads).tolist()
    heads = [Head(Tap(), rate) for rate in rates]
    online = LDAEProtocol(epochs=asked.online_epochs, warmup_epochs=0)

    def seconds(work: Callable[[], object], rounds: int) -> float:
        """The median of the rounds after one of burn-in; of the long ones, one round alone."""
        found = []
        for _ in range(rounds + 1 if rounds > 1 else 1):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
        return statistics.median(found[-rounds:])

    train = extract_share(encoder, source, *how)
    if asked.classes:
        train = train._replace(labels=torch.arange(len(source)) % asked.classes)
    classes = int(train.labels.max()) + 1

    def learn(wanted: list[Head]) -> None:
        train_heads(train, wanted, classes, protocol, device)

    found = {
        "extraction": seconds(lambda: extract_share(encoder, source, *how), 1),
        "one head": seconds(lambda: learn(heads[:1]), asked.rounds),
        "heads together": seconds(lambda: learn(heads), asked.rounds),
        "heads one by one": seconds(lambda: [learn([head]) for head in heads], 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        whole = seconds(lambda: train_online(encoder, source, online, *how, Path(folder)), 1)
    epoch = whole / asked.online_epochs
    sweep = found["extraction"] + found["heads together"]
    record = {
        "what": "seconds of a linear probe's sweep over learning rates",
        "seconds": {name: round(value, 3) for name, value in found.items()},
        "seconds_of_an_online_epoch": round(epoch, 3),
        "ratios": {
            "extraction and all heads over extraction and one": round(
                sweep / (found["extraction"] + found["one head"]), 3
            ),
            "heads one by one over together": round(
                found["heads one by one"] / found["heads together"], 2
            ),
            "an online probe for each candidate, computed from its epoch, over the sweep": round(
                asked.heads * asked.epochs * epoch / sweep, 1
            ),
        },
        "heads": asked.heads,
        "images": len(source),
        "classes": classes,
        "epochs": asked.epochs,
        "online_epochs_measured": asked.online_epochs,
        "dim": encoder.dim,
        **{key: getattr(asked, key) for key in ("backbone", "img_size", "precision", "data")},
        "environment": environment(device),
    }
    write_json(asked.out, record)
    print(record["seconds"], record["ratios"])


if __name__ == "__main__":
    main()
