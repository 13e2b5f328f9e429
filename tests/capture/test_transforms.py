"""Forward-mode differentiation and torch.func transforms of a captured model: PyTorch's derivatives, or an error."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("diffusers")

from tiny_models import CASES

from star_kernels.capture import capture_maps

CASE = CASES["sd3"]


@pytest.fixture
def problem():
    """A model, its velocity as a function of the latent, a latent and a direction; attention has second derivatives."""
    model, inputs = CASE.make()
    model.requires_grad_(False)
    latent = inputs.pop("hidden_states")

    def velocity(x):
        return model(hidden_states=x, **inputs).sample

    with sdpa_kernel(SDPBackend.MATH):
        yield model, velocity, latent, torch.randn_like(latent)


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))


@pytest.mark.parametrize("jvp", [lambda f, x, t: torch.func.jvp(f, (x,), (t,)), dual], ids=["torch.func", "forward_ad"])
@pytest.mark.filterwarnings("ignore:a captured pass under forward-mode")
def test_a_captured_pass_keeps_its_tangents(problem, jvp):
    model, velocity, latent, direction = problem
    expected = jvp(velocity, latent, direction)[1]
    plain_maps = captured(model, velocity, latent)
    with capture_maps(model, CASE.selection) as maps:
        tangent = jvp(velocity, latent, direction)[1]
        torch.testing.assert_close(maps.take(), plain_maps, rtol=0, atol=1e-6)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(tangent, expected, rtol=1e-3, atol=1e-4)


def captured(model, velocity, latent):
    with torch.no_grad(), capture_maps(model, CASE.selection) as maps:
        velocity(latent)
        return maps.take()


@pytest.mark.filterwarnings("ignore:a captured pass under forward-mode")
def test_maps_have_tangents_too(problem):
    model, velocity, latent, direction = problem
    latent = latent.requires_grad_()
    with capture_maps(model, CASE.selection, detach=False) as maps:

        def loss(x):
            velocity(x)
            return maps.take()[:, 0].square().sum()

        (gradient,) = torch.autograd.grad(loss(latent), latent)
        _, tangent = torch.func.jvp(loss, (latent.detach(),), (direction,))
        transformed = torch.func.grad(loss)(latent.detach())
    torch.testing.assert_close(tangent, (gradient * direction).sum(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(transformed, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:a captured pass under forward-mode")
def test_the_gradients_of_torch_func_are_those_without_capture(problem):
    model, velocity, latent, direction = problem

    def loss(x):
        return velocity(x).square().mean()

    expected = torch.func.grad(loss)(latent), torch.func.jvp(torch.func.grad(loss), (latent,), (direction,))[1]
    with capture_maps(model, CASE.selection):
        found = torch.func.grad(loss)(latent), torch.func.jvp(torch.func.grad(loss), (latent,), (direction,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_pass_under_vmap_is_an_error_that_names_it(problem):
    model, velocity, latent, _ = problem
    with (
        capture_maps(model, CASE.selection),
        pytest.raises(ValueError, match=r"runs under torch\.vmap .*do not support"),
    ):
        torch.func.vmap(velocity)(latent[None])


def test_all_probabilities_are_materialised_with_a_warning(problem):
    from star_kernels.capture import transforms

    transforms._warn.cache_clear()
    model, velocity, latent, direction = problem
    with capture_maps(model, CASE.selection), pytest.warns(UserWarning, match="materialises all attention prob"):
        torch.func.jvp(velocity, (latent,), (direction,))
