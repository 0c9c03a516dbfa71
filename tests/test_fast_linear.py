"""Linear layers through oneDNN compute the same, in the models of a call and nowhere else, and only where that pays."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from exactness import check, plain
from test_alignment import make_network
from tiny import llama, ragged_batch
from torch import nn
from torch.nn import functional

from specformer import generate
from specformer.generation import backend_linear
from specformer.generation.backend_linear import ANY, FEW, LARGE, fast_linears, faster_rows, gain, plain_linears

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN"
)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN is taken to be faster for any number of rows; the shapes of the states of all its products."""
    seen, multiply = [], backend_linear.onednn_linear

    def counted(states, *args):
        seen.append(tuple(states.shape))
        return multiply(states, *args)

    monkeypatch.setattr(backend_linear, "gain", lambda rows, num_threads: 2.0)
    monkeypatch.setattr(backend_linear, "onednn_linear", counted)
    return seen


@pytest.fixture
def only_few_rows(products, monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN is taken to be faster for few rows and large weights, of 2,000 numbers here."""
    monkeypatch.setattr(backend_linear, "gain", lambda rows, num_threads: 2.0 if rows in FEW else 1.0)
    monkeypatch.setattr(backend_linear, "LARGE", 2000)
    return products


def forwards(model: nn.Module) -> int:
    """Modules of `model` with a forward of their own."""
    return sum("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def multiplied(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What `layer` answers inside."""
    with fast_linears(layer):
        return layer(states)


# ---- products


@needs_onednn
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 24), (1, 1, 24), (3, 5, 24), (2, 1, 33, 24), (200, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_same_products(shape: tuple[int, ...], has_bias: bool, products):
    states, layer = torch.randn(shape), nn.Linear(24, 40, bias=has_bias)
    torch.testing.assert_close(multiplied(layer, states), layer(states), rtol=1e-5, atol=1e-5)
    assert products == [shape]


@needs_onednn
def test_parts_that_are_not_contiguous(products):
    states, layer = torch.randn(6, 24, 5).transpose(1, 2)[:, ::2], nn.Linear(24, 40)
    layer.weight = nn.Parameter(torch.randn(24, 40).t())
    torch.testing.assert_close(multiplied(layer, states), layer(states), rtol=1e-5, atol=1e-5)
    assert products


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.double(),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.to("meta"),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().to_sparse_csr())),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.arange(80.0)[::2])),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(1))),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.full((1,), 2.0).expand(40))),
        lambda layer: setattr(layer, "forward", torch.relu),
    ],
    ids=["float64", "bfloat16", "meta", "sparse", "strided bias", "one bias", "expanded bias", "its own forward"],
)
def test_other_layers_stay_as_they_are(change, products):
    layer = nn.Linear(24, 40)
    change(layer)
    states = torch.randn(3, 24, dtype=layer.weight.dtype, device=layer.weight.device)
    with torch.no_grad():
        expected, found = layer(states), multiplied(layer, states)
    assert found.shape == expected.shape and (found.is_meta or torch.equal(found, expected))
    assert not products


class Adapter(nn.Linear):
    def forward(self, states):
        return super().forward(states) + 1


def test_layers_of_other_classes_stay_as_they_are(products):
    model = nn.Sequential(nn.Linear(4, 4), Adapter(4, 4))
    assert plain_linears(model) == [model[0]]


@pytest.mark.parametrize("states", [torch.randn(0, 24), torch.randn(3, 24).double(), torch.randn(3, 23)])
def test_other_states_are_left_to_torch(states: torch.Tensor, products):
    layer = nn.Linear(24, 40)
    try:
        expected = layer(states)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as found:
            multiplied(layer, states)
        assert str(found.value) == str(error)
    else:
        assert multiplied(layer, states).shape == expected.shape
    assert not products


def test_autocast_is_left_to_torch(products):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert multiplied(nn.Linear(24, 40), torch.randn(3, 24)).dtype == torch.bfloat16
    assert not products


@needs_onednn
@pytest.mark.parametrize("frozen", ["states", "weight", "bias", None])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_same_gradients(frozen: str | None, shape: tuple[int, ...], products):
    torch.manual_seed(0)
    layer, states, upstream = nn.Linear(24, 40), torch.randn(shape), torch.randn(*shape[:-1], 40)
    leaves = {"states": states, **dict(layer.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)

    def gradients() -> dict[str, torch.Tensor | None]:
        for leaf in leaves.values():
            leaf.grad = None
        (layer(states).mul_(2) * upstream).sum().backward()  # results may be changed in place
        return {name: leaf.grad for name, leaf in leaves.items()}

    expected = gradients()
    assert not products
    with fast_linears(layer):
        found = gradients()
    assert len(products) > 1
    for name, gradient in expected.items():
        assert (gradient is None) == (name == frozen) == (found[name] is None)
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


# ---- nothing is left behind


def test_models_are_left_as_they_were(products):
    target = llama(torch.float32)
    with pytest.raises(KeyboardInterrupt), fast_linears(target, None, target):
        assert forwards(target) == len(plain_linears(llama(torch.float32))) > 0
        raise KeyboardInterrupt
    assert forwards(target) == 0


def test_one_within_another(products):
    target = llama(torch.float32)
    with fast_linears(target):
        many = forwards(target)
        with fast_linears(target):
            assert forwards(target) == many
        assert forwards(target) == many
    assert forwards(target) == 0


@needs_onednn
@torch.no_grad()
def test_threads_leave_and_enter(products):
    """The layers stay fast until the last thread has left, and are those of torch for all others."""
    target, inside, leave = llama(torch.float32), threading.Event(), threading.Event()
    tokens = torch.ones(1, 3, dtype=torch.long)

    def other():
        with fast_linears(target):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    target(tokens)
    assert not products and forwards(target)
    with fast_linears(target):
        leave.set()
        thread.join()
        target(tokens)
        assert products
    assert forwards(target) == 0


@needs_onednn
@torch.no_grad()
def test_only_the_layers_of_a_call(products):
    """A thread that is inside with one model runs another, with which somebody else is inside, as torch does."""
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    entered = fast_linears(theirs)
    thread = threading.Thread(target=entered.__enter__)
    thread.start()
    thread.join()
    with fast_linears(ours):
        theirs(torch.randn(5, 4))
        assert not products
        ours(torch.randn(5, 4))
        assert products
    entered.__exit__(None, None, None)
    assert not forwards(theirs)


@torch.no_grad()
def test_what_others_put_there_stays(products):
    layer, states = nn.Linear(4, 4), torch.randn(5, 4)
    with fast_linears(layer):
        inner = layer.forward
        layer.forward = lambda states: inner(states) + 1
    assert torch.equal(layer(states), functional.linear(states, layer.weight, layer.bias) + 1)
    assert not products


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model.layers[1]], ids=["whole", "a layer"])
def test_compiled_models_stay_as_they_are(part):
    target = llama(torch.float32)
    part(target).compile(backend="eager")
    assert plain_linears(target) == []


# ---- texts


@needs_onednn
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("drafted", [0, 1, 2, 3])
def test_same_text(drafted: int, sample: bool, products):
    target, batch = llama(torch.float32), ragged_batch()
    reference = plain(target, batch, max_new_tokens=16, do_sample=sample)
    assert not products
    network = make_network("anchor", target)
    check(target, batch, reference, network, drafted, max_new_tokens=16, do_sample=sample)
    widths = {shape[-1] for shape in products}
    assert {target.config.hidden_size, target.config.intermediate_size} <= widths
    assert forwards(target) == forwards(network) == 0


@needs_onednn
def test_the_drafter_and_assistants_too(products):
    target, batch = llama(torch.float32), ragged_batch()
    small = llama(torch.float32, hidden_size=16, seed=1)
    generate(target, small, **batch, max_new_tokens=6, num_assistant_tokens=2)
    assert 16 in {shape[-1] for shape in products}
    network = make_network("anchor", target)
    layer, seen = next(module for module in network.modules() if type(module) is nn.Linear), []
    layer.register_forward_hook(lambda module, *_: seen.append("forward" in vars(module)))
    generate(target, network, **batch, max_new_tokens=6, num_assistant_tokens=2)
    assert seen and all(seen)


@pytest.mark.filterwarnings("ignore:TF32")
def test_switched_off(products):
    target, batch = llama(torch.float32), ragged_batch()
    with torch.backends.mkldnn.flags(enabled=False):
        expected = plain(target, batch, max_new_tokens=8)
        check(target, batch, expected, make_network("anchor", target), 3, max_new_tokens=8)
    assert not products
    check(target, batch, expected, make_network("anchor", target), 3, max_new_tokens=8)
    assert products


# ---- where it pays


@needs_onednn
@torch.no_grad()
def test_only_few_rows_and_large_weights(only_few_rows):
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 39))
    for shape in ((3, 40), (16, 40), (2, 8, 40), (0, 40), (40,)):
        states = torch.randn(shape)
        assert torch.equal(multiplied(model, states), model(states))
    assert not only_few_rows
    for shape in ((4, 40), (3, 5, 40)):
        states = torch.randn(shape)
        torch.testing.assert_close(multiplied(model, states), model(states))
    assert only_few_rows == [(4, 40), (3, 5, 40)]


@needs_onednn
def test_same_text_where_only_few_rows_are_faster(only_few_rows):
    target, batch = llama(torch.float32), ragged_batch()  # a head of 64 tokens and 32 channels
    reference = plain(target, batch, max_new_tokens=16)
    check(target, batch, reference, make_network("anchor", target), 3, max_new_tokens=16)
    assert {torch.Size(shape[:-1]).numel() for shape in only_few_rows} <= set(FEW) and only_few_rows


@pytest.mark.parametrize(
    ("gains", "small", "large"),
    [
        ({3: 4.0, 10: 3.0}, ANY, ANY),
        ({3: 0.9, 10: 2.4}, None, FEW),
        ({3: 0.9, 10: 1.1}, None, None),
        ({3: 0.0, 10: 0.0}, None, None),
    ],
    ids=["AMD EPYC", "Intel Xeon", "neither", "no oneDNN"],
)
def test_kinds_of_machines(gains: dict, small: range | None, large: range | None, monkeypatch):
    monkeypatch.setattr(backend_linear, "gain", lambda rows, num_threads: gains[rows])
    assert faster_rows(LARGE - 1, 2) == small
    assert faster_rows(LARGE, 2) == large


@pytest.mark.parametrize(("seconds", "faster"), [(0.0, True), (0.02, False)])
def test_the_faster_one(seconds: float, faster: bool, monkeypatch):
    """Beside products of torch that take some milliseconds: one that takes no time, and one that takes too long."""

    def taking(seconds: float):
        return lambda *args: time.sleep(seconds)

    monkeypatch.setattr(backend_linear, "onednn_linear", taking(seconds))
    monkeypatch.setattr(backend_linear.functional, "linear", taking(0.004))
    assert (gain.__wrapped__(3, 1) > 1) is faster


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError])
def test_torch_without_the_product(error: type[Exception], monkeypatch):
    def multiply(*args):
        raise error

    monkeypatch.setattr(backend_linear, "onednn_linear", multiply)
    assert gain.__wrapped__(3, 1) == gain.__wrapped__(10, 1) == 0.0


def test_where_it_does_not_pay_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(backend_linear, "gain", lambda rows, num_threads: 1.0)
    with fast_linears(llama(torch.float32)) as entered:
        assert entered == []
