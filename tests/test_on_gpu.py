"""What a GPU would run, checked without one: fake CUDA tensors have devices but no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ldae import trajectory
from ldae.method import build

ROWS = [row.name for row in (*trajectory.ROWS, *trajectory.BESIDE)]
GPU = torch.device("cuda:0")
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")

# Operations for which the host waits for the GPU.
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive"}


class NoWaiting(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        result = function(*args, **(kwargs or {}))
        copied = name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor)
        if name in _WAITS or (copied and _is_download(name, args, result)):
            raise AssertionError(f"{function} makes the host wait")
        return result


def _is_download(name, args, result):
    source = args[1] if name == "copy_" else args[0]
    return source.device.type == "cuda" and result.device.type == "cpu"


@pytest.fixture
def on_gpu(tiny):
    """on_gpu(row): the mode of fake tensors, and a method whose tensors are fake ones on a GPU."""

    def make(row="l_dae"):
        method, mode = build(tiny(row), num_classes=3, bf16=True).train(), FakeTensorMode()
        with mode:
            for module in method.modules():
                for name, part in module.named_parameters(recurse=False):
                    fake = torch.empty(part.shape, device=GPU)
                    setattr(module, name, torch.nn.Parameter(fake, part.requires_grad))
                for name, part in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty(part.shape, dtype=part.dtype, device=GPU)
        return mode, method

    return make


@pytest.mark.parametrize("row", ROWS)
def test_the_loss_of_each_row_is_computed_on_one_device_and_waits_for_nothing(row, on_gpu):
    """A backward pass of fake CUDA tensors needs a driver, so it is not a part of this."""
    mode, method = on_gpu(row)
    with mode:
        images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=GPU)
        positions, labels = torch.empty(2, 4, dtype=torch.int64, device=GPU)
        with NoWaiting():
            loss = method(images, positions, labels)
    assert loss.device == GPU and loss.shape == () and loss.dtype == torch.float32


def test_a_wait_would_be_seen(on_gpu):
    mode, _ = on_gpu()
    with mode, NoWaiting(), pytest.raises(AssertionError, match="makes the host wait"):
        torch.empty(3, device=GPU).cpu()


def test_the_residual_stream_is_in_bfloat16_and_the_loss_in_float32(method, images):
    """On a CPU, since autocast needs a real GPU."""
    one, seen = method(), []
    one.bf16 = True
    for block in (*one.denoiser.encoder, *one.denoiser.decoder):
        block.register_forward_hook(lambda block, given, output: seen.append(output.dtype))
    loss = one(images, torch.arange(len(images)))
    assert seen == [torch.bfloat16] * 4 and loss.dtype == torch.float32


@pytest.mark.parametrize(
    "model, tokens", [("vit_large_patch16_224", 256), ("vit_base_patch16_224", 64)]
)
def test_the_operations_of_a_step_are_those_of_the_closed_form(model, tokens, tiny):
    """Products of a forward pass: 24 W^2 + 4 N W a token and block, and the layers at both ends."""
    side = round(tokens**0.5)
    changes = {"model__name": model, "model__embed_dim": None, "model__num_heads": None}
    config = tiny(data__img_size=16 * side, model__patch_size=16, **changes)
    method = build(config, bf16=True).to("meta")
    images = torch.empty(2, 3, 16 * side, 16 * side, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        method.denoiser(torch.empty(2, tokens, 768, device="meta"), torch.zeros(2, device="meta"))
    width, blocks = method.denoiser.width, method.denoiser.stages
    condition = width // 4
    a_token = blocks * (24 * width**2 + 4 * tokens * width) + 2 * width * 768 * 2
    an_image = 2 * condition * ((6 * blocks + 2) * width + 256 + condition)
    assert counter.get_total_flops() == 2 * (tokens * a_token + an_image)
    assert method(images, torch.zeros(2, dtype=torch.int64, device="meta")).device.type == "meta"
