"""Laws of the choice: what more hours, more images, more memory or larger images may change."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from ldae.auto import rule
from ldae.auto.rule import NETWORKS, Images, Machine
from ldae.errors import InputError
from ldae.settings import OptimSettings, SystemSettings
from ldae.train.optim import peak_lr
from ldae.train.plan import plan_run

IMAGES = Images(count=50_000, side=32, decode_seconds=1e-4)
GPU = Machine(gpu=True, cores=16, memory=80 * 10**9)
CPU = Machine(gpu=False, cores=2, memory=16 * 10**9)
DEVICE = torch.device("cpu")
HOURS = (0.1, 1 / 3, 1, 4, 24, 168, 1000)
PARAMETERS = [24 * part.depth * part.embed_dim**2 for part in NETWORKS]


def pace_of(number):
    """A machine whose speed falls with the size of the network."""
    return 1e9 / PARAMETERS[number]


def network(hours, images=IMAGES, machine=GPU):
    return rule.choose_network(PARAMETERS, pace_of, images, machine, hours)[0]


def test_networks_are_in_the_order_of_their_sizes():
    assert PARAMETERS == sorted(PARAMETERS)
    assert [part.side for part in NETWORKS] == sorted(part.side for part in NETWORKS)
    for part in NETWORKS:
        assert part.embed_dim % part.num_heads == part.embed_dim // 2 % part.num_heads == 0


def test_more_hours_and_more_images_never_choose_a_smaller_network():
    by_hours = [network(hours) for hours in HOURS]
    assert by_hours == sorted(by_hours) and by_hours[0] == 0 < by_hours[-1]
    counts = [10**power for power in range(3, 8)]
    by_count = [network(10**5, replace(IMAGES, count=count)) for count in counts]
    assert by_count == sorted(by_count) and by_count[0] == 0 and by_count[-1] == len(NETWORKS) - 1


@pytest.mark.parametrize("hours", HOURS)
def test_a_larger_network_sees_enough_images(hours):
    chosen = network(hours)
    seen = min(rule.images_in(hours, pace_of(chosen)), 400 * IMAGES.count)
    assert chosen == 0 or seen >= 0.3 * PARAMETERS[chosen]


@pytest.mark.parametrize("hours", HOURS)
def test_no_network_is_measured_that_the_one_before_rules_out(hours):
    """A step of a large one takes minutes on a CPU."""
    asked = []

    def asking(number):
        asked.append(number)
        return pace_of(number)

    chosen, _ = rule.choose_network(PARAMETERS, asking, IMAGES, GPU, hours)
    assert asked == list(range(len(asked))) and chosen in asked[-2:]
    for number in asked[1:]:
        assert rule.images_in(hours, pace_of(number - 1)) >= 0.3 * PARAMETERS[number]


def test_the_reason_names_what_a_larger_network_lacks():
    """The network is chosen when that is enough."""
    for hours, count in itertools.product(HOURS, (10**3, 50_000, 10**7, 10**9)):
        images = replace(IMAGES, count=count)
        chosen, why = rule.choose_network(PARAMETERS, pace_of, images, GPU, hours)
        if chosen + 1 == len(PARAMETERS):
            continue
        needed = 0.3 * PARAMETERS[chosen + 1]
        at_most = rule.images_in(hours, pace_of(chosen))
        at_least = rule.images_in(hours, pace_of(chosen + 1))
        assert ("400 epochs" in why) == (needed > 400 * count)
        assert at_least < needed if "hours" in why else needed <= at_most
        enough = replace(images, count=int(needed / 400) + 1) if "epochs" in why else images
        longer = hours * max(1.01 * needed / at_least, 1)
        assert network(longer, enough) > chosen


@pytest.mark.parametrize("pace", [20.0, 3e4])
def test_hours_that_are_too_few_for_the_network_are_named_with_those_that_are_enough(pace):
    least = 0.3 * PARAMETERS[0] / rule.images_in(1, pace)
    for hours in (0.01 * least, 0.5 * least, 0.99 * least):
        sentence = rule.too_few_hours(PARAMETERS[0], pace, IMAGES, hours)
        (named,) = re.findall("; (.*) hours are enough$", sentence)
        assert least <= float(named) < 1.2 * least
    assert rule.too_few_hours(PARAMETERS[0], pace, IMAGES, 1.01 * least) == ""
    few = replace(IMAGES, count=10)  # more hours would not help
    assert rule.too_few_hours(PARAMETERS[0], pace, few, 0.5 * least) == ""


def test_a_network_has_room_in_the_memory():
    many = replace(IMAGES, count=10**9)
    for memory in (10**8, 10**9, 10**10, 10**11):
        chosen = network(10**6, many, replace(GPU, memory=memory))
        assert chosen == 0 or 16 * PARAMETERS[chosen] <= memory / 2
    chosen, why = rule.choose_network(
        PARAMETERS, lambda number: pace_of(number) * (number < 3), many, GPU, 10**6
    )
    assert chosen == 2 and "memory" in why


@pytest.mark.parametrize("part", NETWORKS)
def test_images_are_cut_into_whole_patches(part):
    sizes = []
    for side in (8, 28, 32, 63, 64, 96, 100, 224, 375, 4000):
        choices = rule.choose_sizes(part, side, {})
        img_size, patch_size = (choice.value for choice in choices.values())
        assert img_size % patch_size == 0 and 8 <= img_size // patch_size <= part.side
        assert img_size <= max(side, 32)  # enlarged only to the least size
        sizes.append(img_size)
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("part", NETWORKS)
def test_one_size_of_the_user_decides_the_other(part):
    for img_size in (28, 32, 96, 160, 256):
        found = rule.choose_sizes(part, 224, {"data.img_size": img_size})
        patch_size = found["model.patch_size"].value
        assert found["data.img_size"].value == img_size and img_size % patch_size == 0
        assert 4 <= img_size // patch_size <= 2 * part.side
    for patch_size in (2, 6, 14, 16):
        found = rule.choose_sizes(part, 224, {"model.patch_size": patch_size})
        img_size = found["data.img_size"].value
        assert img_size % patch_size == 0 and 4 <= img_size // patch_size <= part.side


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_a_run_ends_within_its_hours(machine):
    for step, hours, decode in itertools.product((10, 1e3, 1e5), HOURS, (1e-6, 1e-3, 0.1)):
        images = replace(IMAGES, decode_seconds=decode)
        pace = rule.pace(step, images, machine)
        assert pace <= step and pace <= machine.cores / decode
        epochs = rule.choose_epochs(pace, hours, images).value
        assert 0 < epochs <= 1600 and epochs * images.count / pace <= hours * 3600
        assert 0 < rule.choose_warmup(epochs).value < epochs / 4


def test_decoding_runs_beside_the_step_on_a_gpu_and_takes_its_cores_on_a_cpu():
    """Here a core decodes 50 images a second."""
    images = replace(IMAGES, decode_seconds=0.02)
    for step, cores, on_gpu, on_cpu in ((100, 1, 50, 100 / 3), (100, 4, 100, 200 / 3)):
        for gpu, expected in ((True, on_gpu), (False, on_cpu)):
            for ranks in (1, 3):
                machine = Machine(gpu, cores, memory=10**9, ranks=ranks)
                assert rule.pace(step, images, machine) == pytest.approx(ranks * expected)


def test_epochs_rise_with_the_hours_and_fall_with_the_images():
    by_hours = [rule.choose_epochs(300.0, hours, IMAGES).value for hours in HOURS]
    assert by_hours == sorted(by_hours) and by_hours[-1] == 1600
    counts = [10**power for power in range(3, 8)]
    by_count = [rule.choose_epochs(300.0, 4, replace(IMAGES, count=c)).value for c in counts]
    assert by_count == sorted(by_count, reverse=True) and by_count[0] == 1600


def test_too_few_hours_are_refused_with_those_that_are_enough():
    with pytest.raises(InputError, match="hours 0.0001 are too few.*takes 0.004 hours"):
        rule.choose_epochs(100.0, 1e-4, IMAGES)
    assert rule.choose_epochs(100.0, 0.004, IMAGES).value > 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_batch_is_split_over_the_ranks_and_has_one_peak_of_the_learning_rate(ranks):
    sizes = []
    for epochs in (0.02, 20, 200, 2000, 20_000):
        batch_size, why = rule.choose_batch(epochs, IMAGES, ranks)
        optim = OptimSettings(batch_size=batch_size, epochs=epochs)
        assert why.startswith(f"{plan_run(IMAGES.count, optim, SystemSettings(), DEVICE).steps:,} ")
        assert batch_size % ranks == 0 and 128 - ranks < batch_size <= 2048
        optim = OptimSettings(batch_size=batch_size, blr=rule.choose_blr(batch_size).value)
        assert peak_lr(optim) == pytest.approx(1e-3)
        sizes.append(batch_size)
    assert sizes == sorted(sizes)
    assert "from 40,000 steps of 128 on it grows" in why
    for steps, larger in ((39_000, False), (41_000, True)):
        batch_size, _ = rule.choose_batch(128 * steps / IMAGES.count, IMAGES, ranks)
        assert (batch_size > 128) == larger
    assert rule.choose_batch(1e6, replace(IMAGES, count=200), 1).value <= 200


def test_axes_keep_the_variance_within_their_bounds():
    for decay in (0.1, 0.5, 0.8, 0.9, 0.99, 1.0):
        variances = [decay**n for n in range(48)]
        count = rule.choose_axes(variances).value
        kept, total = sum(variances[:count]), sum(variances)
        assert 8 <= count <= 32 and (kept >= 0.95 * total or count == 32)
        assert sum(variances[: count - 1]) < 0.95 * total or count == 8
    assert rule.choose_axes([1.0, 1.0, 1.0]).value == 3
    assert rule.choose_axes([0.0] * 48).value == 8  # black images


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_workers_are_as_many_as_decoding_needs(machine):
    for decode in (1e-7, 1e-5, 1e-3, 1e-1):
        images = replace(IMAGES, decode_seconds=decode)
        pace = rule.pace(1000.0, images, machine)
        workers = rule.choose_workers(pace, images, machine).value
        most = machine.cores - (not machine.gpu)
        assert 0 <= workers <= most
        assert workers in (0, most) or workers >= pace * decode
        assert workers or pace * decode < 0.05


def test_a_pass_on_a_cpu_fits_into_its_memory():
    for batch_size, size in itertools.product((128, 384, 2048), (10**5, 10**8, 10**10)):
        found = rule.choose_device_batch(batch_size, size, CPU).value
        passed = batch_size if found == "auto" else found
        assert batch_size % passed == 0
        assert passed == 1 or passed * size <= CPU.memory / 2
    assert rule.choose_device_batch(2048, 10**12, GPU).value == "auto"  # searched by the loop


def test_every_choice_has_a_reason():
    pace = rule.pace(1000.0, IMAGES, GPU)
    choices = [
        *rule.choose_sizes(NETWORKS[0], 32, {}).values(),
        rule.choose_epochs(pace, 4, IMAGES),
        rule.choose_warmup(10.0),
        rule.choose_batch(20, IMAGES, 1),
        rule.choose_blr(128),
        rule.choose_axes([3.0, 2.0, 1.0]),
        rule.choose_workers(pace, IMAGES, GPU),
        rule.choose_device_batch(128, 1, CPU),
    ]
    assert all(choice.why for choice in choices)
    assert rule.choose_network(PARAMETERS, pace_of, IMAGES, GPU, 4)[1]


def test_a_size_without_a_fitting_patch_is_refused():
    with pytest.raises(InputError, match="data.img_size 97 has no patch .* such as 96"):
        rule.choose_sizes(NETWORKS[0], 224, {"data.img_size": 97})
