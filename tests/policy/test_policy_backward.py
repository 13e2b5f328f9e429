"""``PolicyLoss.backward``, and the gradient that an ordinary call computes in its forward pass."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from problems import BATCH, MEMORY, SIGMA, Problem, make, patch_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from star_kernels import PolicyLoss, weighted_nft_loss, weighted_policy_loss
from star_kernels.policy import direct
from star_kernels.policy import loss as losses

pytestmark = pytest.mark.native
LOSSES = ["sample", "location", "nft"]
SCALES = [1.0, 1, 0.3, torch.tensor(1.0), torch.tensor([4096.0], dtype=torch.float64)]


@cache
def rollout() -> Problem:
    return make(("native", "cpu"))


def compute(kind: str, output: Tensor, **options: Any) -> PolicyLoss:
    """A loss of a rollout that does not depend on the output."""
    problem = rollout()
    rest = (problem.sample, problem.prev_sample)
    if kind == "nft":
        return weighted_nft_loss(output, *rest, problem.advantages, SIGMA, **options)
    options = {"ratio": kind, "clip_range": 0.9, **options}
    return weighted_policy_loss(output, *rest, problem.old_log_prob, problem.advantages, problem.transition, **options)


def output_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return rollout().model_output.detach().clone().to(dtype).requires_grad_()


class Scene:
    """A model and its input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = nn.Conv2d(16, 16, 3, padding=1).to(dtype)
        self.sample = rollout().sample.to(dtype)

    def gradients(self, backward: Callable[[PolicyLoss], None], kind: str, times: int = 1, **options: Any) -> list:
        self.model.zero_grad()
        for _ in range(times):
            backward(compute(kind, self.model(self.sample), **options))
        return [p.grad.clone() for p in self.model.parameters()]


@pytest.fixture
def kernels() -> Iterator[list[str]]:
    """The backward kernels that were called."""
    called: list[str] = []
    with (
        mock.patch.object(direct.POLICY, "backward_kernel", _noting("policy", called, direct.POLICY.backward_kernel)),
        mock.patch.object(direct.NFT, "backward_kernel", _noting("nft", called, direct.NFT.backward_kernel)),
    ):
        yield called


def _noting(name: str, called: list[str], kernel: Callable[..., None]) -> Callable[..., None]:
    def noting(*arguments: Any) -> None:
        called.append(name)
        kernel(*arguments)

    return noting


@pytest.mark.parametrize("read", [False, True], ids=["", "loss read"])
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
def test_it_is_the_backward_pass_of_the_scaled_loss(
    kind: str, dtype: torch.dtype, scale: float | Tensor, read: bool
) -> None:
    scene = Scene(dtype)

    def backward(result: PolicyLoss) -> None:
        if read:
            result.loss.item()
        result.backward(scale)

    got = scene.gradients(backward, kind, times=2)
    expected = scene.gradients(lambda result: (result.loss * scale).sum().backward(), kind, times=2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", LOSSES)
def test_no_kernel_runs_in_a_first_backward_pass_without_a_scale(kind: str, kernels: list[str]) -> None:
    compute(kind, output_of()).backward()
    compute(kind, output_of()).loss.backward()
    compute(kind, output_of(), reduction="none").loss.sum().backward()
    assert not kernels
    compute(kind, output_of()).backward(0.5)
    (compute(kind, output_of()).loss * 2).backward()
    assert len(kernels) == 2


@pytest.mark.parametrize("kind", LOSSES)
def test_a_second_backward_pass_through_a_retained_graph_gives_memory_of_its_own(kind: str, kernels: list[str]) -> None:
    output = output_of()
    result = compute(kind, output)
    (first,) = torch.autograd.grad(result.loss, output, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(result.loss, output, retain_graph=True)
    assert torch.equal(second, expected)
    result.backward()
    assert torch.equal(output.grad, expected)
    assert len(kernels) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_upstream_gradients_are_those_of_each() -> None:
    output = output_of()
    loss = compute("sample", output).loss
    (both,) = torch.autograd.grad(loss, output, torch.tensor([1.0, -2.0]), is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(both, torch.stack([one, -2 * one]))


def test_without_grad_no_gradient_is_computed(peak_memory: Callable) -> None:
    output = output_of()
    with torch.no_grad():
        assert peak_memory(lambda: compute("sample", output)) < output.nbytes
    assert peak_memory(lambda: compute("sample", output.detach())) < output.nbytes
    assert peak_memory(lambda: compute("sample", output)) >= output.nbytes


@pytest.mark.parametrize("kind", LOSSES)
def test_hooks_of_the_output_are_called_and_its_gradient_is_retained(kind: str) -> None:
    scene, seen = Scene(), []
    output = scene.model(scene.sample)
    output.retain_grad()
    output.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
    compute(kind, output).backward()
    doubled = [p.grad for p in scene.model.parameters()]
    expected = scene.gradients(lambda result: result.loss.backward(), kind)
    for got, gradient in zip(doubled, expected, strict=True):
        torch.testing.assert_close(got, 2 * gradient)
    assert len(seen) == 1
    assert torch.equal(output.grad, 2 * seen[0])


def test_a_gradient_scaler_scales_half_precision_without_underflow() -> None:
    scene, scaler = Scene(torch.float16), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    one = torch.ones(())
    got = scene.gradients(lambda result: result.backward(scaler.scale(one)), "sample")
    expected = scene.gradients(lambda result: scaler.scale(result.loss).backward(), "sample")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(bool(g.any()) for g in got)


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_passes_through_a_checkpointed_model(reentrant: bool) -> None:
    scene = Scene()
    sample = scene.sample.clone().requires_grad_()
    compute("sample", checkpoint(scene.model, sample, use_reentrant=reentrant)).backward()
    got = [p.grad.clone() for p in scene.model.parameters()]
    expected = scene.gradients(lambda result: result.loss.backward(), "sample")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_inputs_are_saved_with_the_hooks_of_saved_tensors() -> None:
    output, packed, unpacked = output_of(), [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.shape) or t.clone(), lambda t: unpacked.append(t.shape) or t
    ):
        loss = compute("sample", output).loss
    assert len(packed) == 6
    loss.backward()
    assert unpacked == packed


READ = pytest.mark.parametrize("read", [False, True], ids=["", "loss read"])


@READ
@pytest.mark.parametrize("through", ["PolicyLoss", "loss"])
def test_an_input_changed_in_place_is_an_error_of_the_backward_pass_only(read: bool, through: str) -> None:
    output = output_of()
    problem = rollout()
    weights = patch_weights(problem, [24, 20])
    result = compute("sample", output, weights=weights)
    if read:
        assert result.loss.requires_grad
    weights.mul_(2)
    assert result.loss.isfinite() or through == "PolicyLoss"  # reading the loss is no error
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation" + ("" if read else ".*weights")):
        result.backward() if through == "PolicyLoss" else result.loss.backward()


@READ
def test_a_second_call_is_the_error_of_a_freed_graph(read: bool) -> None:
    result = compute("sample", output_of())
    value = result.loss.item() if read else None
    result.backward()
    for again in (result.backward, result.loss.backward) if read else (result.backward,):
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            again()
    assert result.loss.item() == (compute("sample", output_of()).loss.item() if value is None else value)
    result = compute("sample", output_of())
    result.loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        result.backward()


@pytest.mark.parametrize("backend", ["naive", "native"])
def test_what_cannot_be_differentiated_is_an_error(backend: str) -> None:
    for result in (compute("sample", output_of().detach(), backend=backend),):
        with pytest.raises(RuntimeError, match=r"does not require grad; model_output must require grad"):
            result.backward()
    with torch.no_grad():
        result = compute("nft", output_of(), backend=backend)
    with pytest.raises(RuntimeError, match="does not require grad"):
        result.backward()
    with pytest.raises(RuntimeError, match=rf"must be one number, got one of shape \[{BATCH}\]"):
        compute("sample", output_of(), reduction="none", backend=backend).backward()
    with pytest.raises(TypeError, match="scale must be a number, got 'two'"):
        compute("sample", output_of(), backend=backend).backward("two")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale must be a number or a tensor of one element, got \[2\]"):
        compute("sample", output_of(), backend=backend).backward(torch.ones(2))


def test_a_scale_may_have_a_gradient() -> None:
    scale, result = torch.tensor(0.5, requires_grad=True), compute("sample", output_of())
    result.backward(scale)
    assert torch.equal(scale.grad, compute("sample", output_of()).loss.detach())


@pytest.mark.parametrize("scale", [-1e39, float("nan")])
def test_a_scale_beyond_float32_is_that_of_the_scaled_loss(scale: float) -> None:
    output, expected = output_of(), output_of()
    compute("sample", output).backward(scale)
    (compute("sample", expected).loss * scale).backward()
    torch.testing.assert_close(output.grad, expected.grad, equal_nan=True)


@pytest.mark.parametrize("read", [False, True], ids=["", "loss read"])
@pytest.mark.parametrize(
    "scale", [torch.complex(torch.ones(()), torch.tensor(2.0)).conj().imag, torch._efficientzerotensor(())], ids=str
)
def test_a_scale_may_be_a_negated_view_or_a_zero_without_memory(scale: Tensor, read: bool) -> None:
    output, expected = output_of(), output_of()
    result = compute("sample", output)
    assert not read or result.loss.requires_grad
    result.backward(scale)
    compute("sample", expected).backward(float(scale))
    assert torch.equal(output.grad, expected.grad)


def test_a_complex_scale_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="only for real scalar outputs"):
        compute("sample", output_of()).backward(torch.tensor(1j))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_detection_names_the_loss(kind: str) -> None:
    result = compute(kind, output_of() * float("nan"))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"Function 'weighted_\w+_lossBackward'"):
        result.backward()


def test_a_transform_of_torch_func_that_reads_a_loss_first_is_an_error() -> None:
    result = compute("sample", output_of())
    with pytest.raises(RuntimeError, match="loss must be read before a transform"):
        torch.func.grad(lambda x: x * result.loss)(torch.ones(()))
    value = result.loss.detach()
    assert torch.equal(torch.func.grad(lambda x: x * result.loss)(torch.ones(())), value)


def test_a_loss_of_another_way_has_the_same_method() -> None:
    output = output_of()
    compute("sample", output, backend="naive").backward(0.5)
    expected = output_of()
    (compute("sample", expected, backend="naive").loss * 0.5).backward()
    assert torch.equal(output.grad, expected.grad)
    result = compute("sample", output_of())
    changed = PolicyLoss(result.loss * 2, result.metrics)
    changed.backward()


def test_it_unpacks_and_pickles_like_a_pair() -> None:
    result = compute("sample", output_of())
    loss, metrics = result
    assert result[0] is loss is result.loss
    assert result[-1] is metrics is result.metrics
    assert len(result) == 2
    for other in (pickle.loads(pickle.dumps(compute("sample", output_of().detach()))), copy.copy(result)):
        assert torch.equal(other.loss, loss)
        assert other.metrics.keys() == metrics.keys()
    with pytest.raises(AttributeError, match="no attribute 'lost'"):
        result.lost  # noqa: B018


def test_the_loss_is_part_of_the_graph_wherever_it_is_first_read() -> None:
    with torch.no_grad():
        assert not compute("sample", output_of()).loss.requires_grad
    result = compute("sample", output_of())
    with torch.no_grad():
        assert result.loss.requires_grad
    result = compute("sample", output_of())
    with torch.inference_mode():
        assert result.loss.requires_grad
    result.loss.backward()


def test_a_tensor_of_inference_mode_is_the_error_of_autograd() -> None:
    problem = rollout()
    with torch.inference_mode():
        weights = patch_weights(problem, [24, 20])
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        compute("sample", output_of(), weights=weights)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_function_may_return_it(compiler: str) -> None:
    problem, output = rollout(), output_of()

    def step(output: Tensor, *rest: Any) -> PolicyLoss:
        return weighted_policy_loss(output, *rest, clip_range=0.9)

    torch._dynamo.reset()
    result = torch.compile(step, fullgraph=True, backend=compiler)(output, *problem.positional[1:])
    result.backward(0.5)
    expected = output_of()
    step(expected, *problem.positional[1:]).backward(0.5)
    torch.testing.assert_close(output.grad, expected.grad)
    assert isinstance(result, PolicyLoss)
    assert set(result.metrics) == set(losses.naive.METRICS) - {"kl_new_old_mean"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_transform_of_torch_func_may_return_it() -> None:
    output = output_of().detach()
    result = torch.func.vmap(lambda o: compute("sample", o))(torch.stack([output, output]))
    assert result.loss.shape == (2,)
    assert result.metrics["kl_loss"].shape == (2,)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "phrases": {"weights": torch.rand(BATCH, 2, 24, 20), "advantages": torch.randn(BATCH, 2)},
    "dense": {"advantages": torch.randn(BATCH, 24, 20)},
    "all": {
        "weights": torch.rand(BATCH, 12, 10),
        "mask": torch.ones(BATCH, 24, 20, dtype=torch.bool),
        "step_weights": torch.rand(BATCH),
        "ref_model_output": torch.randn(BATCH, 16, 24, 20),
        "old_model_output": torch.randn(BATCH, 16, 24, 20),
        "kl_coef": 0.1,
    },
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("call", CALLS)
def test_ordinary_calls_need_no_checks_in_python(call: str, memory: str) -> None:
    problem, options = rollout(), dict(CALLS[call])
    latents = [MEMORY[memory](t) for t in (problem.model_output, problem.sample, problem.prev_sample)]
    advantages = torch.stack([options.pop("advantages", problem.advantages)] * 2, dim=1)[:, 1]  # not contiguous
    arguments = (*latents, problem.old_log_prob, advantages, problem.transition)
    with mock.patch.object(losses, "check_tensors", side_effect=AssertionError("not an ordinary call")):
        weighted_policy_loss(*arguments, **options)
        weighted_policy_loss(latents[0].detach().requires_grad_(), *arguments[1:], **options).backward()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("advantages", torch.ones(2, BATCH), r"advantages must have shape \[B, G\] = \[4, 2\]"),
        ("advantages", torch.ones(BATCH, 1), r"advantages must have shape \[B\]"),
        ("step_weights", torch.ones(BATCH, 1), r"step_weights must have shape \[B\]"),
        ("weights", torch.ones(BATCH, 5), r"weights must have shape \[B, \*locations\] = \[4, 65\]"),
    ],
)
def test_shapes_of_the_right_size_are_errors_too(name: str, value: Tensor, text: str) -> None:
    """Shapes that a check of the number of elements would accept."""
    problem = make(("native", "cpu"), "rows")
    options: dict[str, Any] = {name: value}
    if value.shape == (2, BATCH):
        options["weights"] = torch.ones(BATCH, 2, 65)
    positional = list(problem.positional)
    positional[4] = options.pop("advantages", positional[4])
    with pytest.raises(ValueError, match=text):
        weighted_policy_loss(*positional, **options)
