"""Open an evaluation: its splits, its network and its process group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ldae.backbones.open import load_backbone, load_classifier
from ldae.backbones.preprocessing import preprocessing
from ldae.data.open import check_unseen, open_splits
from ldae.data.source import Source
from ldae.devices import device_for
from ldae.distributed import process_group
from ldae.errors import InputError
from ldae.evals.call import describe_call
from ldae.evals.embedded import EmbeddedBackbone, check_rows, images_or_embedded
from ldae.evals.embedded_file import is_embedded, open_embedded
from ldae.evals.evaluation import EncoderSetup, Evaluation, Setup
from ldae.evals.features import known_labels
from ldae.evals.naming import results_home
from ldae.evals.protocol import Protocol
from ldae.files import check_writable
from ldae.precision import float32_products
from ldae.runs import layout
from ldae.runs.kinds import kind_of

Splits = Callable[[str, str | None], tuple[Source | None, Source]]
Load = Callable[[str, Setup], nn.Module]

_kept: ContextVar[dict[tuple, nn.Module]] = ContextVar("the last network that was opened")


def data_of(backbone: str | Path, data: str | Path | None) -> str:
    """Return ``data``, by default the file of ``ldae embed`` in the backbone's place.

    Raises: InputError when there is neither.
    """
    if data is not None:
        return str(data)
    if not is_embedded(backbone):
        raise InputError("no images: name their source with --data SOURCE")
    open_embedded(Path(backbone))  # refuses another parquet file, which may hold images
    return str(backbone)


def labelled_splits(data: str, eval_data: str | None) -> tuple[Source, Source]:
    """Open the train and the evaluation split of labelled images, as ``open_splits`` does.

    Raises: InputError as it does, and for images without labels or of one class only.
    """
    train, test = open_splits(data, eval_data, images_or_embedded)
    for source in (train, test):
        known_labels(source)
    if len(known_labels(train).unique()) < 2:
        raise InputError(f"{train.spec} has one class only, which every backbone gets right")
    return train, test


@contextmanager
def keep_network() -> Iterator[None]:
    """Let graders that follow each other on one network open it once; only the last is kept."""
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def _open_once(load: Callable[..., nn.Module], spec: str, **settings: Any) -> nn.Module:
    """Return ``load(spec, **settings)``, or the network that ``keep_network`` has kept of it."""
    kept = _kept.get({})
    key = (load, str(spec), *settings.values())
    if key not in kept:
        kept.clear()  # the last network leaves before the next one takes memory
        kept[key] = load(spec, **settings)
    return kept[key]


def open_classifier(spec: str, setup: Setup) -> nn.Module:
    """Open a network with its classifier. Raises: InputError when it cannot be opened."""
    return _open_once(load_classifier, spec, in_chans=setup.in_chans, img_size=setup.img_size)


def open_backbone(spec: str, setup: EncoderSetup) -> nn.Module:
    """Open a network without its classifier, or a file of ``ldae embed`` in its place.

    Raises: InputError when it cannot be opened, and for settings that a file does not take.
    """
    if is_embedded(spec):
        for name in ("random_init", "in_chans", "img_size", "precision"):
            if getattr(setup, name) != getattr(EncoderSetup, name):
                flag = name.replace("_", "-")
                raise InputError(f"{spec} holds features: --{flag} is a setting of `ldae embed`")
        return _open_once(EmbeddedBackbone, spec)
    return _open_once(
        load_backbone,
        spec,
        random_init=setup.random_init,
        in_chans=setup.in_chans,
        img_size=setup.img_size,
        seed=setup.seed if setup.random_init else 0,
    )


def check_out(out: Path, task: str) -> None:
    """Check that an evaluation can write to a folder, before the work.

    Raises: InputError when it cannot, and when the folder is that of a run.
    """
    check_writable(out)
    if kind_of(out):
        raise InputError(
            f"--out {out} is the folder of a run, whose files the evaluation would replace: name "
            f"another folder, such as {out / layout.EVALS / task}"
        )


@contextmanager
def open_evaluation(
    task: str,
    spec: str | Path,
    data: str | Path,
    eval_data: str | Path | None,
    protocol: Protocol,
    setup: Setup,
    splits: Splits = labelled_splits,
    load: Load = open_backbone,
    in_run: bool = False,
    **options: object,
) -> Iterator[Evaluation]:
    """Join the process group, if one was launched, and open an evaluation.

    The seed of the setup becomes the seed of the protocol. Only a training that is an evaluation
    itself, ``in_run``, has its results in the folder of a run. ``options`` are the other settings
    of the command that decide the results, by name.

    Raises: InputError for a setting out of its range, for several seeds, for a run folder as
        ``out``, for images that are both learned from and graded, and as ``splits`` and ``load``
        do.
    """
    spec, data = str(spec), str(data)
    eval_data = None if eval_data is None else str(eval_data)
    command = task.partition("-")[0]  # without the name of a protocol
    settings = {"data": data, "eval_data": eval_data, "protocol": protocol, "setup": setup}
    call = describe_call(command, [spec], **settings, **options)
    if setup.seeds:
        raise InputError(f"{command} takes one --seed, not --seeds")
    if hasattr(protocol, "seed"):
        protocol = replace(protocol, seed=setup.seed)  # type: ignore[call-arg]  # as checked
    out = Path(setup.out or results_home(spec))
    if in_run:
        check_writable(out)
    else:
        check_out(out, task)
    device = device_for(setup.device)
    with float32_products(), process_group(device):
        train, test = splits(data, eval_data)
        if train not in (None, test):  # with leave-one-out, both are one source on purpose
            check_unseen(train, test)
        model = load(spec, setup)
        transform = preprocessing(model)
        if isinstance(model, EmbeddedBackbone):
            setup = replace(setup, random_init=model.random_init, precision=model.precision)
        check_rows(model, train, test)
        opened = (model, train, test, device, transform)
        yield Evaluation(task, spec, protocol, setup, *opened, call)
