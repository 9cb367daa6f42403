"""Branches without kernels: found anywhere, replaced by their constant, equal, exported, rebuilt."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from networks import (
    Add,
    Head,
    conv,
    conv_bn,
    example,
    inverted,
    randomised,
    tiny,
    torchvision_network,
)
from torch import Tensor, nn

from wgates_plugin import ChannelSpace, trace
from wgates_plugin.closed_loop import relative_plan
from wgates_plugin.errors import PlanError
from wgates_plugin.plan import PruningPlan
from wgates_plugin.surgery import rebuild, remove
from wgates_plugin.transforms import apply_steps, constant_branches
from wgates_plugin.transforms.constant_branches import Constant2d, Hollow
from wgates_plugin.verification import relative_error


def silence(network: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name in names:
            network.get_submodule(name).weight.zero_()
    return network


@torch.no_grad()
def output(network: nn.Module, inputs: Tensor) -> Tensor:
    return network.eval()(inputs).clone()


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def check(
    network: nn.Module, side: int, expected_chains: list[list[str]], hollow: set[str]
) -> nn.Module:
    """Find and carry out the steps; compare, at another batch and image size too."""
    inputs = example(2, side)
    space = trace(network, inputs)
    before = copy.deepcopy(network.state_dict())
    wanted = output(network, inputs)
    steps = constant_branches.find(network, space, inputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [step["chain"] for step in steps] == expected_chains
    assert {name for step in steps for name in step["hollow"]} == hollow
    smaller = apply_steps(copy.deepcopy(network), json.loads(json.dumps(steps)))
    assert relative_error(output(smaller, inputs), wanted) <= 1e-5
    other = example(3, side + 5, seed=4)
    assert relative_error(output(smaller, other), output(network, other)) <= 1e-5
    assert count(smaller) < count(network)
    return smaller


def test_a_residual_branch() -> None:
    network = silence(tiny("residual"), "1.main.1")
    smaller = check(network, 8, [["1.main.1", "1.main.2"]], {"1.main.0.0", "1.main.0.1"})
    made = smaller.get_submodule("1.main.1")
    assert isinstance(made, Constant2d)
    old = network.get_submodule("1.main.2")
    scale = old.weight / (old.running_var + old.eps).sqrt()
    torch.testing.assert_close(made.bias, old.bias - old.running_mean * scale)
    assert isinstance(smaller.get_submodule("1.main.0.0"), Hollow)


def test_a_branch_with_a_stride_and_a_shortcut() -> None:
    network = silence(tiny("projection"), "1.main.1")
    check(network, 8, [["1.main.1", "1.main.2"]], {"1.main.0.0", "1.main.0.1"})


def test_a_depthwise_branch_whose_activations_work_in_place() -> None:
    """ReLU6 in place on what the stream holds would change the stream."""
    torch.manual_seed(0)
    main = inverted(6, 12)
    for block in (main[0], main[1]):
        block[2] = nn.ReLU6(inplace=True)
    network = nn.Sequential(conv(3, 6), Add(main, act=nn.Identity()), conv_bn(6, 8), Head(8))
    silence(randomised(network, 0), "1.main.2")
    names = {f"1.main.{block}.{part}" for block in (0, 1) for part in (0, 1)}
    check(network, 8, [["1.main.2", "1.main.3"]], names)


class Shared(nn.Module):
    """torchvision's bottleneck: one activation for all, in place, and an addition in place."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4, stride=stride), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(4, 8, 1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(conv(8, 8, 1, stride=stride), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.down(x)
        return self.relu(out)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_constant_goes_on_through_what_follows(stride: int) -> None:
    torch.manual_seed(0)
    network = randomised(nn.Sequential(conv_bn(3, 8), Shared(stride), Head(8)), 0)
    silence(network, "1.conv2")
    chain = ["1.conv2", "1.bn2", "1.relu", "1.conv3", "1.bn3"]
    smaller = check(network, 8, [chain], {"1.conv1", "1.bn1"})
    assert isinstance(smaller[1].conv3, Constant2d)
    assert isinstance(smaller[1].relu, nn.ReLU)
    again = silence(randomised(copy.deepcopy(network), 1), "1.conv3")
    check(again, 8, [chain], {"1.conv1", "1.bn1"})


def test_an_input_that_is_not_by_image_stays_as_it_is() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("residual")

        def forward(self, images: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = self.net(images * scale.view(1, -1, 1, 1))
            return out

    network, inputs = Scaled().eval(), (example(), torch.ones(example().shape[1]))
    space = trace(network, inputs)
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)][-1]
    silence(network, last)
    (step,) = constant_branches.find(network, space, inputs)
    assert step["chain"] == [last, "net.1.main.2"]


def test_two_branches_and_none() -> None:
    network = tiny("preactivation")
    space = trace(network, example())
    assert constant_branches.find(network, space, example()) == []
    silence(network, "1.main.5", "2.main.5")
    check(
        network,
        8,
        [["1.main.5"], ["2.main.5"]],
        {f"{block}.main.{part}" for block in (1, 2) for part in (2, 3)},
    )


@pytest.mark.parametrize("name", ["concat", "squeeze-excite", "grouped", "reused", "transposed"])
def test_whatever_is_silent_the_output_stays(name: str) -> None:
    """One layer after another: what cannot be replaced safely is left as it is."""
    base = tiny(name)
    space = trace(base, example())
    for reader in {slot.module: None for g in space.groups for slot in g.slots_as("consumer")}:
        network = silence(copy.deepcopy(base), reader)
        wanted = output(network, example())
        steps = constant_branches.find(network, space, example())
        found = output(apply_steps(copy.deepcopy(network), steps), example())
        assert relative_error(found, wanted) <= 1e-5, reader


def test_a_border_that_shrinks_the_image_is_left_alone() -> None:
    torch.manual_seed(0)
    main = nn.Sequential(conv(8, 6, padding=0), nn.ReLU(), conv(6, 8, padding=2))
    network = randomised(nn.Sequential(conv_bn(3, 8), Add(main), Head(8)), 0)
    silence(network, "1.main.2")
    assert constant_branches.find(network, trace(network, example()), example()) == []


def test_training_mode_trains_the_constant() -> None:
    network = silence(tiny("residual"), "1.main.1")
    space = trace(network, example())
    smaller = apply_steps(network, constant_branches.find(network, space, example())).train()
    smaller(example()).square().sum().backward()
    made = smaller.get_submodule("1.main.1")
    assert bool((made.bias.grad != 0).any())
    assert not bool(made.weight.grad.any())


@pytest.mark.parametrize(
    ("name", "silent"),
    [
        ("resnet18", ["layer2.0.conv2", "layer3.1.conv2"]),
        ("resnet50", ["layer2.1.conv2", "layer3.0.conv3"]),
        ("mobilenet_v2", ["features.3.conv.2", "features.9.conv.2"]),
    ],
)
def test_torchvision_cut_exported_traced_again_and_rebuilt(name: str, silent: list[str]) -> None:
    network = silence(torchvision_network(name), *silent)
    inputs = example(1, 64)
    space: ChannelSpace = trace(network, inputs)
    kept = tuple(tuple(range(0, group.units, 2)) for group in space.groups)
    plan = PruningPlan(space, kept, {"strategy": "gdp"})
    smaller = remove(copy.deepcopy(network), plan, inputs)
    wanted = output(smaller, inputs)
    steps = constant_branches.find(smaller, space, inputs)
    assert len(steps) == 2
    smaller = apply_steps(smaller, steps)
    found = output(smaller, inputs)
    assert relative_error(found, wanted) <= 1e-5
    noted = PruningPlan(space, kept, {**plan.note, "after": steps})
    noted = PruningPlan.from_json(json.loads(json.dumps(noted.to_json())))
    again = rebuild(torchvision_network(name, seed=1), noted, smaller.state_dict())
    assert torch.equal(output(again, inputs), found)
    # The streams are known under their names as before: a network that is cut can be cut further.
    left = trace(smaller, inputs)
    assert set(left.names) < set(space.names)
    exported = _run_onnx(smaller, inputs)
    assert relative_error(exported, found) <= 1e-4


def test_what_is_left_can_be_cut_further() -> None:
    """A plan inside the first one, narrower in the stream and in the branch that is gone."""
    network, inputs = silence(tiny("residual"), "1.main.1"), example()
    space = trace(network, inputs)
    first = PruningPlan.leading(space, [width - 2 for width in space.full_widths])
    smaller = remove(copy.deepcopy(network), first, inputs)
    steps = constant_branches.find(smaller, space, inputs)
    smaller = apply_steps(smaller, steps)
    outer = PruningPlan(space, first.kept, {"after": steps})
    inner = PruningPlan(space, tuple(kept[1:] for kept in first.kept), outer.note)
    left = trace(smaller, inputs)
    remove(smaller, relative_plan(inner, outer, left), inputs)
    again = rebuild(tiny("residual"), inner, smaller.state_dict())
    assert torch.equal(output(again, inputs), output(smaller, inputs))
    unknown = PruningPlan(space, outer.kept)
    with pytest.raises(PlanError, match="trace the network"):
        relative_plan(inner, unknown, left)


def _run_onnx(network: nn.Module, inputs: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    from wgates_plugin.latency.onnx_export import export_torchscript

    model: Any = export_torchscript(network, inputs)
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return torch.from_numpy(found)


def test_a_step_for_another_network_is_refused() -> None:
    with pytest.raises(PlanError, match=r"`9.conv`, which is not in"):
        apply_steps(
            tiny("plain"), [{"transform": "constant_branches", "chain": ["9.conv"], "hollow": []}]
        )
    with pytest.raises(PlanError, match="does not fit"):
        apply_steps(tiny("plain"), [{"transform": "constant_branches", "links": []}])


def test_a_scripted_function_ends_a_chain() -> None:
    """It takes no hooks; what stands before it is found all the same."""
    main = nn.Sequential(conv_bn(8, 6), conv(6, 8), nn.BatchNorm2d(8))
    blocks = (Add(main, act=torch.jit.script(nn.ReLU())), torch.jit.script(nn.ReLU()))
    network = randomised(nn.Sequential(conv_bn(3, 8), *blocks, Head(8)), 0)
    silence(network, "1.main.1")
    steps = constant_branches.find(network, trace(network, example()), example())
    assert [step["chain"] for step in steps] == [["1.main.1", "1.main.2"]]
    assert not any(
        module._forward_hooks
        for module in network.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    )
