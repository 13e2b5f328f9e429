"""The CUDA kernels' logic without a GPU: csrc/cuda compiled for the host, a host thread for each thread of a block."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import star_kernels as sk
from star_kernels import native
from star_kernels.policy import naive

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).with_name("cuda_emulation")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA library's functions, on CPU tensors."""
    tvm_ffi_cpp = pytest.importorskip("tvm_ffi.cpp")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    import tvm_ffi

    folder = tmp_path_factory.mktemp("emulated")
    source = (ROOT / "csrc/cuda/flow_policy.cu").read_text()
    source, launches = re.subn(r"(\w+)<<<(.*?)>>>\(", r"emulate(\1, \2)(", source)
    assert launches == 3
    (folder / "flow_policy.cpp").write_text(source)
    library = tvm_ffi_cpp.build(
        name="emulated",
        cpp_files=[str(folder / "flow_policy.cpp"), str(ROOT / "csrc/cuda/exports.cpp")],
        extra_cflags=["-O1", "-ffp-contract=off", "-pthread"],
        extra_include_paths=[str(EMULATION), str(ROOT / "csrc")],
        build_directory=str(folder),
    )
    return tvm_ffi.load_module(library)


class Case:
    """Random inputs of one shape, with the old log-probability of a slightly different model."""

    def __init__(self, shape, channel_dim, *, dtype=torch.float32, weights=None, kl=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator)

        batch = shape[0]
        self.channel_dim = channel_dim
        self.model_output = normal(*shape).to(dtype)
        self.sample = normal(*shape)
        self.coefficients = sk.flow_sde(
            torch.linspace(0.9, 0.4, batch), torch.linspace(0.8, 0.3, batch), sigma_max=0.95
        ).coefficients
        self.noise = normal(*shape)
        moved = self.model_output.float() + 1e-3 * normal(*shape)
        self.prev_sample, self.old_log_prob = naive.sample_transition(
            moved, self.sample, self.noise, self.coefficients, channel_dim
        )
        self.advantages = normal(batch)
        locations = [n for d, n in enumerate(shape) if d != channel_dim]
        self.weights = None
        if weights is not None:
            self.weights = torch.rand(batch, *(n // weights for n in locations[1:]), generator=generator)
        self.reference = normal(*shape).to(dtype) if kl else None

    def objective(self, per_location):
        return (
            self.model_output,
            self.sample,
            self.prev_sample,
            self.old_log_prob,
            self.advantages,
            self.coefficients,
            self.weights,
            self.reference,
            self.channel_dim,
            per_location,
            0.99,
            1.02,
            5.0,
            0.04,
        )

    def expected(self, per_location):
        """Loss, metrics and gradient of the definition, in float64."""
        objective = [
            t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in self.objective(per_location)
        ]
        objective[0].requires_grad_()
        loss, metrics = naive.weighted_policy_loss(*objective)
        return loss.detach(), metrics, torch.autograd.grad(loss, objective[0])[0]


CASES = {
    "two tiles and a bit": Case((3, 4, 19, 30), 1, weights=1, kl=True),
    "patch grid": Case((2, 5, 8, 12), 1, weights=2),
    "packed": Case((2, 300, 7), 2, weights=1),
    "video": Case((2, 3, 4, 6, 8), 1, weights=2, kl=True),
    "bfloat16": Case((1, 16, 9, 7), 1, dtype=torch.bfloat16, weights=1),
    "float16, one position": Case((5, 2, 1, 1), 1, dtype=torch.float16),
    "more samples than threads": Case((300, 1, 2, 1), 1),
}


@pytest.mark.parametrize("per_location", [False, True], ids=["sample", "location"])
@pytest.mark.parametrize("name", CASES)
def test_loss_metrics_and_gradient_are_those_of_the_definition(emulated, name, per_location):
    case = CASES[name]
    objective = case.objective(per_location)
    batch = case.model_output.shape[0]
    positions = case.old_log_prob[0].numel()
    partial = torch.full((emulated.policy_workspace_bytes(batch, positions),), 255, dtype=torch.uint8)
    counter = torch.zeros(1, dtype=torch.int32)
    loss, metrics, slope = torch.tensor(torch.nan), torch.full((6,), torch.nan), torch.full((batch,), torch.nan)
    emulated.policy_forward(*objective, partial, counter, loss, metrics, slope)
    gradient = torch.full_like(case.model_output, torch.nan)
    emulated.policy_backward(*objective, torch.tensor(0.5), slope, gradient)

    expected_loss, expected_metrics, expected_gradient = case.expected(per_location)
    assert counter.item() == 0
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(metrics.double(), expected_metrics, rtol=1e-5, atol=1e-7)
    error = (gradient.double() - 0.5 * expected_gradient).norm() / (0.5 * expected_gradient).norm()
    rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[gradient.dtype]
    assert error < rounding


@pytest.mark.parametrize("name", CASES)
def test_sampling_equals_the_cpu_kernel_and_the_ratio_of_an_unchanged_model_is_one(emulated, name):
    case = CASES[name]
    results = []
    for library, threads in ((emulated, ()), (native.cpu(), (1,))):
        prev_sample, log_prob = torch.full_like(case.sample, torch.nan), torch.full_like(case.old_log_prob, torch.nan)
        library.sample_transition(
            case.model_output,
            case.sample,
            case.noise,
            case.coefficients,
            case.channel_dim,
            *threads,
            prev_sample,
            log_prob,
        )
        results.append((prev_sample, log_prob))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)

    case_objective = list(case.objective(False))
    case_objective[2], case_objective[3] = results[0]
    batch, positions = case.model_output.shape[0], case.old_log_prob[0].numel()
    partial = torch.empty(emulated.policy_workspace_bytes(batch, positions), dtype=torch.uint8)
    loss, metrics, slope = torch.empty(()), torch.empty(6), torch.empty(batch)
    emulated.policy_forward(*case_objective, partial, torch.zeros(1, dtype=torch.int32), loss, metrics, slope)
    assert metrics[0].item() == 1.0
    assert metrics[1].item() == 1.0
