"""What a GPU would run, checked without one: fake CUDA tensors have devices but no values."""

import pytest
import torch
from torch._inductor import cudagraph_trees
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ldae import trajectory
from ldae.data.workers import Batch
from ldae.method import build
from ldae.settings import OptimSettings, SystemSettings
from ldae.train.optim import adamw
from ldae.train.state import State
from ldae.train.update import Update

ROWS = [row.name for row in trajectory.ALL]
GPU = torch.device("cuda:0")
pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]

# Operations for which the host waits for the GPU.
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive"}


class NoWaiting(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, refused = function.__name__.split(".")[0], f"{function} makes the host wait"
        if name in ("select", "_local_scalar_dense") and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():  # values on the host stay real
                return function(*args, **(kwargs or {}))
        if name in _WAITS and args[0].device.type == "cuda":
            raise AssertionError(refused)
        result = function(*args, **(kwargs or {}))
        copied = name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor)
        if copied and _blocks(name, args, kwargs or {}, result):
            raise AssertionError(refused)
        return result


def _blocks(name, args, kwargs, result):
    """Return whether a copy is a download, or an upload that blocks."""
    source, device = (args[1] if name == "copy_" else args[0]).device.type, result.device.type
    non_blocking = kwargs.get("non_blocking", name == "copy_" and args[2:3] == (True,))
    return (source, device) == ("cuda", "cpu") or (
        (source, device) == ("cpu", "cuda") and not non_blocking
    )


@pytest.fixture
def apart(on_ranks):
    """apart(function): call a function in a process of its own.

    After a fake CUDA tensor or a backward pass on the meta device, autograd starts threads for
    devices, and a process with such threads cannot fork for other tests.
    """

    def run(function):
        assert on_ranks(function, ranks=1) == [""]

    return run


def fake_on_gpu(method):
    """Replace the tensors of a method by fake ones on a GPU, and return their mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in method.modules():
            for name, part in module.named_parameters(recurse=False):
                fake = torch.empty(part.shape, device=GPU)
                setattr(module, name, torch.nn.Parameter(fake, part.requires_grad))
            for name, part in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(part.shape, dtype=part.dtype, device=GPU)
    return mode


@pytest.fixture
def on_gpu(tiny):
    """on_gpu(row): the mode of fake tensors, and a method whose tensors are fake ones on a GPU."""

    def make(row="l_dae"):
        method = build(tiny(row), num_classes=3, bf16=True).train()
        return fake_on_gpu(method), method

    return make


def loss_of(output):
    """Return the loss; a method with a feature target also returns its two parts."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("row", ROWS)
def test_the_loss_of_each_row_is_computed_on_one_device_and_waits_for_nothing(row, on_gpu, apart):
    """A backward pass of fake CUDA tensors needs a driver, so it is not a part of this."""

    def work():
        mode, method = on_gpu(row)
        with mode:
            images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device=GPU)
            positions, labels = torch.empty(2, 4, dtype=torch.int64, device=GPU)
            with NoWaiting():
                loss = loss_of(method(images, positions, labels))
        assert loss.device == GPU and loss.shape == () and loss.dtype == torch.float32

    apart(work)


@pytest.mark.parametrize("row", ROWS)
def test_the_backward_pass_of_each_row_waits_for_nothing(row, method, apart):
    """Tensors of the meta device have no values, so all that waits for values raises there."""
    one = method(row, num_classes=3, system__checkpoint_activations=row == "l_dae").to("meta")
    images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    positions, labels = torch.empty(2, 4, dtype=torch.int64, device="meta")

    def work():
        loss_of(one.train()(images, positions, labels)).backward()
        assert all(part.grad.is_meta for part in one.parameters() if part.requires_grad)

    apart(work)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_three_updates_wait_for_nothing(cuda_graphs, on_gpu, apart, monkeypatch):
    """From batches on the host to new weights and their average; all but the backward pass is
    real, for which autograd's engine needs a driver."""
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long()
    batches = [Batch(images, labels, torch.arange(n, n + 4), []) for n in (0, 4)]

    def work():
        mode, method = on_gpu()
        trained = [part for part in method.parameters() if part.requires_grad]

        def backward(loss):
            assert loss.device == GPU and loss.requires_grad
            for part in trained:
                part.grad = torch.empty_like(part) + (0 if part.grad is None else part.grad)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        marked = cudagraph_trees.MarkStepBox.mark_step_counter
        with mode:
            state = State(method, OptimSettings(ema=0.9), SystemSettings(), GPU, False, adamw)
            state.cuda_graphs = cuda_graphs  # without compiling anything
            with NoWaiting():
                for _ in range(3):
                    losses = Update(state, clip_grad=1.0)(batches, 0.9)
        assert losses["loss"].device == GPU
        steps = {moments["step"].device for moments in state.optimizer.state.values()}
        assert steps == {GPU} and len(state.optimizer.state) == len(trained)
        assert marked - cudagraph_trees.MarkStepBox.mark_step_counter == 6 * cuda_graphs

    apart(work)


def test_waits_would_be_seen(on_gpu, apart):
    def work():
        mode, _ = on_gpu()
        with mode:
            device, host = torch.empty(3, device=GPU), torch.empty(3)
            waits = (device.cpu, device.nonzero, lambda: host.to(GPU), lambda: device.copy_(host))
            for wait in waits:
                with NoWaiting(), pytest.raises(AssertionError, match="makes the host wait"):
                    wait()
            with NoWaiting():
                host.to(GPU, non_blocking=True)
                device.copy_(host, non_blocking=True)

    apart(work)


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
