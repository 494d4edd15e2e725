"""Replacement of the perceptrons inside a network by mixtures of experts."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from moe_heads.checks import check_at_least_one, check_flags
from moe_heads.experts import ACTIVATIONS, Activation
from moe_heads.moe_layer import MoELayer
from moe_heads.routed_module import RoutedModule
from moe_heads.routing import Router

__all__ = ["replace_mlp"]

_SET_BY_MLP = ("in_features", "out_features", "activation")


@dataclass(frozen=True)
class _Perceptron:
    """Two-layer perceptron found in a model.

    Attributes:
        first: First layer.
        second: Second layer.
        activation: Activation between them.
        dropout: Dropout probability after the activation.
    """

    first: nn.Linear
    second: nn.Linear
    activation: Activation
    dropout: float


def replace_mlp(model: nn.Module, every: int = 2, upcycle: bool = False, **options: Any) -> tuple[str, ...]:
    """Replace perceptrons inside a model by `MoELayer`, in place.

    A perceptron is a module that consists of two `torch.nn.Linear`, D → H → D, with ReLU, GELU or SiLU in between.
    Dropout is the only other module allowed. It may be of any class, such as ``Mlp`` of timm or ``MLPBlock`` of
    torchvision. Each candidate is called once, and left unchanged if it does not compute the chain of its layers, for
    example because of a residual connection. Perceptrons with another number of outputs, such as classifiers, are left
    unchanged too, and so are gated ones, which have three layers. Dropout after the second layer is dropped.

    Args:
        model: The model.
        every: n: the n-th perceptron in the order of the modules is replaced, the 2n-th, and so on. The default is
            every second one, as in V-MoE (Riquelme et al., arXiv 2106.05974).
        upcycle: Whether all experts start as copies of the perceptron (Komatsuzaki et al., arXiv 2212.05055), without
            shared experts. With k > 1 the model then starts with the same outputs.
        **options: Arguments of `MoELayer`, such as ``num_experts``. ``expert_width`` is H by default, and ``dropout``
            that of the perceptron. ``router`` is a function of (D, E) that builds a router, such as a class.

    Returns:
        The names of the new layers in the model.

    Raises:
        ValueError: If the model has fewer than ``every`` perceptrons or is on the meta device, or an option is invalid.

    Example:
        >>> import torch
        >>> from moe_heads import replace_mlp
        >>> mlp = lambda: torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> model = torch.nn.Sequential(mlp(), torch.nn.LayerNorm(8), mlp())
        >>> replace_mlp(model, every=2, num_experts=4)
        ('2',)
        >>> model(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """
    check_at_least_one(every=every)
    check_flags(upcycle=upcycle)
    fixed = (*_SET_BY_MLP, *(("expert_width", "num_shared_experts") if upcycle else ()))
    for name in fixed:
        if name in options:
            raise ValueError(
                f"{name}: expected no value, since the perceptron sets it, got {options[name]!r}. Remove it from the"
                " options."
            )
    if "router" in options and (isinstance(options["router"], Router) or not callable(options["router"])):
        raise ValueError(
            "router: expected a function that builds a router for each layer, such as the class BiasBalancedRouter, got"
            f" {options['router']!r}. A router serves one layer only."
        )
    found = _perceptrons(model)
    # a perceptron that is used in several places stays one layer
    chosen = list(dict.fromkeys(perceptron.first for perceptron in found.values()))[every - 1 :: every]
    names = [name for name, perceptron in found.items() if perceptron.first in chosen]
    if not names:
        raise ValueError(
            f"every: expected at most the number of perceptrons in the model, {len(found)}, got {every}. A perceptron"
            " is a module of two torch.nn.Linear, D → H → D, and a module for ReLU, GELU or SiLU. Layers in separate"
            " modules, and an activation that is a function of torch.nn.functional, are not recognized: put a MoELayer"
            " there yourself."
        )
    layers = {found[name].first: _layer(found[name], upcycle, options) for name in names}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        layer = layers[found[name].first].train(model.get_submodule(name).training)
        setattr(model.get_submodule(owner), attribute, layer)
    return tuple(names)


def _perceptrons(model: nn.Module) -> dict[str, _Perceptron]:
    """Return the outermost perceptrons inside a model by name, without those inside heads and layers."""
    found: dict[str, _Perceptron] = {}
    closed: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{outer}.") or not outer for outer in closed):
            continue
        perceptron = None if isinstance(module, RoutedModule) else _as_perceptron(module)
        if isinstance(module, RoutedModule):
            closed.append(name)
        elif perceptron is not None and name:
            closed.append(name)
            found[name] = perceptron
    return found


def _as_perceptron(module: nn.Module) -> _Perceptron | None:
    parts = [child for child in module.modules() if not list(child.children())]
    linear = [part for part in parts if isinstance(part, nn.Linear)]
    others = [part for part in parts if not isinstance(part, (nn.Linear, nn.Dropout, nn.Identity))]
    if len(linear) != 2 or len(others) != 1:
        return None
    first, second = linear
    own = sum(parameter.numel() for parameter in module.parameters())
    is_chain = first.out_features == second.in_features and first.in_features == second.out_features
    if not is_chain or own != sum(p.numel() for layer in linear for p in layer.parameters()):
        return None
    activation = _activation_of(module, first, second)
    if activation is None:
        return None
    dropouts = [part.p for part in parts[: parts.index(second)] if isinstance(part, nn.Dropout)]
    return _Perceptron(first, second, activation, dropouts[0] if dropouts else 0.0)


@torch.no_grad()
def _activation_of(module: nn.Module, first: nn.Linear, second: nn.Linear) -> Activation | None:
    """Return the activation with which two layers compute what the module computes, or None if there is none."""
    weight = first.weight
    if weight.is_meta:
        raise ValueError(
            "model: expected parameters with values, which show whether a module is a perceptron, got parameters on the"
            " meta device. Build the model on another device."
        )
    x = torch.randn(2, 3, first.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        found = module(x)
    except Exception:  # a container, or a call with other arguments
        return None
    finally:
        for part, training in modes:
            part.training = training
    if not isinstance(found, Tensor):
        return None
    names: tuple[Activation, ...] = get_args(Activation)
    return next((name for name in names if torch.equal(found, second(ACTIVATIONS[name](first(x))))), None)


def _layer(mlp: _Perceptron, upcycle: bool, options: Mapping[str, Any]) -> MoELayer:
    defaults = {"expert_width": mlp.first.out_features, "dropout": mlp.dropout}
    fixed: dict[str, Any] = {"activation": mlp.activation} | ({"num_shared_experts": 0} if upcycle else {})
    settings = defaults | dict(options) | fixed
    if "router" in options:
        num_experts = options.get("num_experts", inspect.signature(MoELayer).parameters["num_experts"].default)
        settings["router"] = options["router"](mlp.first.in_features, num_experts)
    layer = MoELayer(mlp.first.in_features, mlp.second.out_features, **settings)
    layer.to(mlp.first.weight.device, mlp.first.weight.dtype)
    if upcycle:
        layer.experts.copy_from(mlp.first, mlp.second)
    return layer
