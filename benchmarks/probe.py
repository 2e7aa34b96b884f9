"""Measure the sweep of a linear probe: all heads in one pass, one by one, and by online probes.

python benchmarks/probe.py [--data SOURCE] [--backbone NAME] [--heads N] [--device DEVICE]

The backbone is untrained, which does not change the times. The online probe augments the images
anew in every epoch, as the protocols mae and ldae do. A few epochs are measured, and scaled to the
epochs and the candidates of a sweep. --classes draws labels from that number of classes, to measure
heads of ImageNet's thousand classes on any images.
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
from ldae.devices import device_for
from ldae.evals.augmented import train_on_augmented
from ldae.evals.features import Encoder, extract_share
from ldae.evals.heads import Head, train_heads
from ldae.evals.taps import Tap
from ldae.files import write_json
from ldae.machine.timing import synchronize
from ldae.runs.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="scattered-digits:1024")
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="a timm name")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument(
        "--classes",
        type=int,
        default=0,
        help="number of classes of drawn labels; 0: the data's labels",
    )
    parser.add_argument("--epochs", type=int, default=CachedProtocol.epochs)
    parser.add_argument("--online-epochs", type=int, default=1, help="epochs to measure")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after one of burn-in")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/probe.json"))
    args = parser.parse_args()

    device = device_for(args.device)
    source = open_source(args.data, "train")
    backbone = load_backbone(args.backbone, random_init=True, img_size=args.img_size)
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    encoder = Encoder(backbone, device, args.precision, **loading)
    protocol = CachedProtocol(epochs=args.epochs)
    rates = np.geomspace(0.001, 10, args.heads).tolist()
    heads = [Head(Tap(), rate) for rate in rates]
    online = LDAEProtocol(epochs=args.online_epochs, warmup_epochs=0)

    def seconds(work: Callable[[], object], rounds: int) -> float:
        """Return the median of the rounds after one of burn-in; one round has no burn-in."""
        times = []
        for _ in range(rounds + 1 if rounds > 1 else 1):
            start = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[-rounds:])

    train = extract_share(encoder, source)
    if args.classes:
        train = train._replace(labels=torch.arange(len(source)) % args.classes)
    classes = int(train.labels.max()) + 1

    def learn(heads: list[Head]) -> None:
        train_heads(train, heads, classes, protocol, device)

    measured = {
        "extraction": seconds(lambda: extract_share(encoder, source), 1),
        "one head": seconds(lambda: learn(heads[:1]), args.rounds),
        "heads together": seconds(lambda: learn(heads), args.rounds),
        "heads one by one": seconds(lambda: [learn([head]) for head in heads], 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        total = seconds(lambda: train_on_augmented(encoder, source, online, Path(folder)), 1)
    epoch = total / args.online_epochs
    sweep = measured["extraction"] + measured["heads together"]
    record = {
        "what": "seconds of a linear probe's sweep over learning rates",
        "seconds": {name: round(value, 3) for name, value in measured.items()},
        "seconds_of_an_online_epoch": round(epoch, 3),
        "ratios": {
            "extraction and all heads over extraction and one": round(
                sweep / (measured["extraction"] + measured["one head"]), 3
            ),
            "heads one by one over together": round(
                measured["heads one by one"] / measured["heads together"], 2
            ),
            "an online probe for each candidate, computed from its epoch, over the sweep": round(
                args.heads * args.epochs * epoch / sweep, 1
            ),
        },
        "heads": args.heads,
        "images": len(source),
        "classes": classes,
        "epochs": args.epochs,
        "online_epochs_measured": args.online_epochs,
        "dim": encoder.dim,
        **{key: getattr(args, key) for key in ("backbone", "img_size", "precision", "data")},
        "environment": environment(device),
    }
    write_json(args.out, record)
    print(record["seconds"], record["ratios"])


if __name__ == "__main__":
    main()
