"""Tensors that reach the function another way than as arguments: closures, module parameters, swapped parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap

import implicitdiff as idf
from implicitdiff.inner_solvers import Anderson, Newton

D = torch.float64
START = torch.ones(2, dtype=D)
Y = torch.tensor([4.0, 9.0], dtype=D)


def root_with_closure(y: Tensor) -> Tensor:
    layer = idf.RootLayer(lambda x: x**2 - y, inner_solver=Newton(tol=1e-13), linear_solver=idf.Dense())
    return layer(START)


EXACT = {
    "first": torch.tensor([1 / 4, 1 / 6], dtype=D),
    "second": torch.tensor([-1 / 32, -1 / 108], dtype=D),
}


def test_a_closure_gets_first_and_second_derivatives() -> None:
    """Passing F(x*.detach(), ...) as an input would give the first and a wrong second one."""
    y = Y.clone().requires_grad_()
    (first,) = torch.autograd.grad(root_with_closure(y).sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y)
    torch.testing.assert_close(first.detach(), EXACT["first"], rtol=1e-10, atol=0)
    torch.testing.assert_close(second, EXACT["second"], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("transform", "want"),
    [
        (lambda f: grad(lambda y: f(y).sum())(Y), EXACT["first"]),
        (lambda f: jvp(f, (Y,), (torch.ones_like(Y),))[1], EXACT["first"]),
        (lambda f: jacfwd(f)(Y).diagonal(), EXACT["first"]),
        (lambda f: hessian(lambda y: f(y).sum())(Y).diagonal(), EXACT["second"]),
        (lambda f: jacfwd(jacfwd(lambda y: f(y).sum()))(Y).diagonal(), EXACT["second"]),
        (lambda f: vmap(grad(lambda y: f(y).sum()))(torch.stack([Y, Y]))[1], EXACT["first"]),
        (lambda f: grad(lambda y: vmap(f)(torch.stack([y, y])).sum())(Y), 2 * EXACT["first"]),
    ],
    ids=["grad", "jvp", "jacfwd", "hessian", "jacfwd jacfwd", "vmap grad", "grad vmap"],
)
def test_a_closure_under_transforms(transform: object, want: Tensor) -> None:
    torch.testing.assert_close(transform(root_with_closure), want, rtol=1e-9, atol=0)  # type: ignore[operator]


def test_a_dual_number_in_a_closure() -> None:
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        x = root_with_closure(forward_ad.make_dual(Y, torch.ones_like(Y)))
        torch.testing.assert_close(forward_ad.unpack_dual(x).tangent, EXACT["first"], rtol=1e-10, atol=0)


class Equilibrium(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=D)
        nn.init.orthogonal_(self.inner.weight, gain=0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z)) + x


def exact_gradients(module: Equilibrium, z: Tensor) -> tuple[Tensor, Tensor]:
    """Of z*.sum() in weight and bias, by the theorem in dense algebra."""
    slope = 1 - torch.tanh(module.inner(z)) ** 2
    A = torch.eye(3, dtype=D) - slope.unsqueeze(-1) * module.inner.weight
    bias = torch.linalg.solve(A.T, torch.ones(3, dtype=D)) * slope
    return torch.outer(bias, z), bias


def tight_layer(function: object) -> idf.FixedPointLayer:
    return idf.FixedPointLayer(function, inner_solver=Anderson(tol=1e-13), linear_solver=idf.Dense())  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["module", "closure over a module", "bound method"])
def test_parameters_of_a_module_get_gradients(how: str) -> None:
    torch.manual_seed(0)
    module, x = Equilibrium(), torch.randn(3, dtype=D)
    function = {
        "module": module,
        "closure over a module": lambda z, x: torch.tanh(module.inner(z)) + x,
        "bound method": module.forward,
    }[how]
    layer = tight_layer(function)
    z = layer(torch.zeros(3, dtype=D), x)
    z.sum().backward()
    weight, bias = exact_gradients(module, z.detach())
    torch.testing.assert_close(module.inner.weight.grad, weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(module.inner.bias.grad, bias.detach(), rtol=1e-9, atol=1e-12)
    assert (how == "module") == (len(list(layer.parameters())) == 2)


@pytest.mark.parametrize("how", ["module", "closure over a module"])
def test_functional_call_on_a_layer(how: str) -> None:
    """The derivative is taken after functional_call has put the module's own parameters back."""
    torch.manual_seed(0)
    module, x = Equilibrium(), torch.randn(3, dtype=D)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if how == "module":
                self.layer = tight_layer(module)
            else:
                self.module = module
                self.layer = tight_layer(lambda z, x: torch.tanh(self.module.inner(z)) + x)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.zeros(3, dtype=D), x)

    model = Model()
    other = {k: (v.detach() * 0.5).requires_grad_() for k, v in model.named_parameters()}
    z = functional_call(model, other, (x,))
    z.sum().backward()
    by_transform = grad(lambda p: functional_call(model, p, (x,)).sum())({k: v.detach() for k, v in other.items()})
    with torch.no_grad():
        module.inner.weight.mul_(0.5)
        module.inner.bias.mul_(0.5)
    weight, bias = exact_gradients(module, z.detach())
    name = "module.inner" if "module.inner.weight" in other else "layer.function.inner"
    torch.testing.assert_close(other[f"{name}.weight"].grad, weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_transform[f"{name}.weight"], weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_transform[f"{name}.bias"], bias.detach(), rtol=1e-9, atol=1e-12)


def test_a_branch_at_the_solution_is_found() -> None:
    """At init the function uses one tensor, at the solution another: both must be followed."""
    a = torch.tensor(3.0, dtype=D, requires_grad=True)
    layer = idf.RootLayer(lambda x: x - a if float(x.detach()) > 1 else x - 2.0, inner_solver=Newton(tol=1e-12))
    layer(torch.zeros((), dtype=D)).backward()
    torch.testing.assert_close(a.grad, torch.ones((), dtype=D))
    branching = lambda a: idf.RootLayer(  # noqa: E731
        lambda x: torch.where(x > 1, x - a, x - 2.0), inner_solver=Newton(tol=1e-12)
    )(torch.zeros((), dtype=D))
    torch.testing.assert_close(grad(branching)(a.detach()), torch.ones((), dtype=D))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, v: Tensor) -> Tensor:
        return 2 * v.detach()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 2 * g


def test_a_capture_only_inside_a_custom_function_raises() -> None:
    a = torch.tensor(3.0, dtype=D, requires_grad=True)
    with pytest.raises(idf.ImplicitDiffError, match=r"custom autograd\.Function.*Pass the tensor as an argument"):
        idf.RootLayer(lambda x: x - Double.apply(a))(torch.zeros((), dtype=D))


def test_a_custom_function_of_arguments_is_fine() -> None:
    a = torch.tensor(3.0, dtype=D, requires_grad=True)
    idf.RootLayer(lambda x, a: x - Double.apply(a))(torch.zeros((), dtype=D), a).backward()
    assert a.grad == 2


def test_a_tensor_of_a_transform_that_has_ended_raises() -> None:
    leaked = []
    vmap(lambda v: leaked.append(v) or v)(torch.ones(2, dtype=D))
    with pytest.raises(idf.ImplicitDiffError, match="already ended"):
        grad(lambda t: idf.RootLayer(lambda x, t: x - t * leaked[0])(torch.zeros((), dtype=D), t))(
            torch.ones((), dtype=D)
        )


def test_a_closure_that_changed_before_the_derivative_raises() -> None:
    held = {"a": torch.tensor(3.0, dtype=D, requires_grad=True)}
    x = idf.RootLayer(lambda x: x - held["a"])(torch.zeros((), dtype=D))
    held["a"] = torch.tensor(5.0, dtype=D, requires_grad=True)
    with pytest.raises(idf.ImplicitDiffError, match="was replaced in between"):
        x.backward()


def test_running_statistics_stay_untouched() -> None:
    norm = nn.BatchNorm1d(3, dtype=D)
    layer = idf.FixedPointLayer(
        nn.Sequential(nn.Linear(3, 3, dtype=D), norm, nn.Tanh()),
        inner_solver=Anderson(max_iterations=5, on_failure="ignore"),
    )
    layer(torch.zeros(4, 3, dtype=D)).sum()
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(norm.running_mean, torch.zeros(3, dtype=D))


def test_a_layer_inside_the_function_of_a_layer() -> None:
    """x = √(√y): the inner square root is itself implicit, and its own argument is captured."""

    def fourth_root(y: Tensor) -> Tensor:
        inner = idf.RootLayer(lambda u, y: u**2 - y, inner_solver=Newton(tol=1e-13), linear_solver=idf.Dense())
        outer = idf.RootLayer(
            lambda x: x**2 - inner(torch.ones((), dtype=D), y),
            inner_solver=Newton(tol=1e-13),
            linear_solver=idf.Dense(),
        )
        return outer(torch.ones((), dtype=D))

    y = torch.tensor(16.0, dtype=D, requires_grad=True)
    fourth_root(y).backward()
    torch.testing.assert_close(y.grad, torch.tensor(1 / 32, dtype=D))
    torch.testing.assert_close(grad(fourth_root)(y.detach()), torch.tensor(1 / 32, dtype=D))
    torch.testing.assert_close(grad(grad(fourth_root))(y.detach()), torch.tensor(-3 / 16 * 16.0**-1.75, dtype=D))
