"""Linear layers through oneDNN compute the same, in the models of a call and nowhere else, and only where that pays."""

from __future__ import annotations

import gc
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from exactness import check, plain
from test_alignment import make_network
from tiny import llama, ragged_batch
from torch import nn
from torch.nn import functional

from specformer import generate
from specformer.generation import backend_linear as fast_linear
from specformer.generation.backend_linear import (
    FEW,
    fast_linears,
    linear,
    onednn_is_faster,
    onednn_is_faster_for_few_rows,
    plain_linears,
    with_rows,
)

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN"
)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN is taken to be faster; the shapes of the states of all its products."""
    seen, product = [], fast_linear.product
    # a generator that an earlier test left suspended, such as a distillation, may still be inside in this thread
    gc.collect()
    monkeypatch.setattr(fast_linear, "_here", threading.local())

    def counted(states, *args):
        seen.append(tuple(states.shape))
        return product(states, *args)

    monkeypatch.setattr(fast_linear, "onednn_is_faster", lambda num_threads: True)
    monkeypatch.setattr(fast_linear, "product", counted)
    return seen


def forwards(model: nn.Module) -> int:
    """Modules of `model` with a forward of their own."""
    return sum("forward" in vars(module) for module in model.modules())


@needs_onednn
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (3, 5, 24), (2, 1, 33, 24), (200, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_same_products(shape: tuple[int, ...], has_bias: bool, products):
    states, weight = torch.randn(shape), torch.randn(40, 24)
    bias = torch.randn(40) if has_bias else None
    found = linear(states, weight, bias)
    assert found.shape == (*shape[:-1], 40) and len(products) == 1
    torch.testing.assert_close(found, functional.linear(states, weight, bias), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_states_that_are_not_contiguous(products):
    states, weight = torch.randn(6, 24, 5).transpose(1, 2)[:, ::2], torch.randn(24, 40).t()
    torch.testing.assert_close(linear(states, weight), functional.linear(states, weight), rtol=1e-5, atol=1e-5)
    assert products


@needs_onednn
@pytest.mark.parametrize("frozen", ["states", "weight", "bias", None])
@pytest.mark.parametrize("rows", [5, 37])
def test_same_gradients(frozen: str | None, rows: int, products):
    torch.manual_seed(0)
    parts = {"states": torch.randn(rows, 24), "weight": torch.randn(40, 24), "bias": torch.randn(40)}
    upstream = torch.randn(rows, 40)

    def gradients(function):
        leaves = {name: part.clone().requires_grad_(name != frozen) for name, part in parts.items()}
        (function(**leaves) * upstream).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    expected = gradients(lambda states, weight, bias: functional.linear(states, weight, bias))
    found = gradients(linear)
    assert len(products) > 1
    for name, gradient in expected.items():
        assert (gradient is None) == (name == frozen) == (found[name] is None)
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "states",
    [torch.randn(3, 24, dtype=torch.float64), torch.randn(0, 24), torch.randn(3, 24, device="meta")],
    ids=["float64", "no rows", "meta"],
)
def test_others_are_left_to_torch(states: torch.Tensor, products):
    weight = torch.zeros(40, 24, dtype=states.dtype, device=states.device)
    assert linear(states, weight).shape == (len(states), 40)
    assert not products


@pytest.mark.parametrize(
    "bias",
    [torch.arange(80.0)[::2], torch.ones(1), torch.full((1,), 2.0).expand(40), torch.ones(40, dtype=torch.float64)],
    ids=["strided", "one number", "expanded", "float64"],
)
def test_any_bias(bias: torch.Tensor, products):
    states, weight = torch.randn(3, 24), torch.randn(40, 24)
    try:
        expected = functional.linear(states, weight, bias)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:20])):
            linear(states, weight, bias)
    else:
        torch.testing.assert_close(linear(states, weight, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_are_left_to_torch(products):
    states, weight = torch.randn(3, 24), torch.randn(40, 24)
    torch.testing.assert_close(linear(states, weight.to_sparse_csr()), states @ weight.t(), rtol=1e-5, atol=1e-5)
    assert not products


@needs_onednn
def test_results_may_be_changed_in_place(products):
    states, layer = torch.randn(3, 24), nn.Linear(24, 40)
    with fast_linears(layer):
        for rows in (3, 17):  # the latter is padded
            torch.relu_(layer(input=torch.randn(rows, 24))).sum().backward()
        frozen = layer.requires_grad_(False)(states.requires_grad_() * 1)
        frozen.mul_(2).sum().backward()
    assert products and states.grad.isfinite().all()


def test_autocast_is_left_to_torch(products):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(3, 24), torch.randn(40, 24)).dtype == torch.bfloat16
    assert not products


def test_few_kinds_of_products():
    """oneDNN generates code for every number of rows."""
    kinds = {len(with_rows(torch.zeros(rows, 1))) for rows in range(1, 257)}
    assert len(kinds) < 50 and set(range(1, 16)) <= kinds
    for rows in range(1, 1025):
        assert rows <= len(with_rows(torch.zeros(rows, 1))) <= rows * 1.125


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


def test_what_others_put_there_stays(products):
    layer = nn.Linear(4, 4)
    with fast_linears(layer):
        layer.forward = torch.relu
    assert layer.forward is torch.relu


class Adapter(nn.Linear):
    def forward(self, states):
        return super().forward(states) + 1


def test_only_plain_layers():
    hooked = nn.Linear(4, 4)
    hooked.forward = lambda states: states
    model = nn.Sequential(nn.Linear(4, 4), Adapter(4, 4), nn.Linear(4, 4, dtype=torch.float64), hooked)
    assert plain_linears(model) == [model[0]]
    assert plain_linears(model.bfloat16()) == []


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model.layers[1]], ids=["whole", "a layer"])
def test_compiled_models_stay_as_they_are(part):
    target = llama(torch.float32)
    part(target).compile(backend="eager")
    assert plain_linears(target) == []


@needs_onednn
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("drafted", [0, 3])
def test_same_text(drafted: int, sample: bool, products):
    target, batch = llama(torch.float32), ragged_batch()
    reference = plain(target, batch, max_new_tokens=16, do_sample=sample)
    assert not products
    network = make_network("anchor", target)
    check(target, batch, reference, network, drafted, max_new_tokens=16, do_sample=sample)
    widths = {shape[1] for shape in products}
    assert {target.config.hidden_size, target.config.intermediate_size} <= widths
    assert forwards(target) == forwards(network) == 0


@needs_onednn
def test_the_drafter_and_assistants_too(products):
    target, batch = llama(torch.float32), ragged_batch()
    small = llama(torch.float32, hidden_size=16, seed=1)
    generate(target, small, **batch, max_new_tokens=6, num_assistant_tokens=2)
    assert 16 in {shape[1] for shape in products}
    network = make_network("anchor", target)
    layer, seen = next(module for module in network.modules() if type(module) is nn.Linear), []
    layer.register_forward_hook(lambda module, *_: seen.append("forward" in vars(module)))
    generate(target, network, **batch, max_new_tokens=6, num_assistant_tokens=2)
    assert seen and all(seen)


@needs_onednn
@pytest.mark.parametrize(
    ("result", "seconds", "expected"), [(256.0, 0.0, True), (256.0, 0.01, False), (255.0, 0.0, False)]
)
def test_the_faster_one(result: float, seconds: float, expected: bool, monkeypatch):
    """Products that take no time, that take too long, and that are wrong, beside torch's own."""

    def taking(seconds: float, result: float):
        def multiply(states, weight):
            time.sleep(seconds)
            return torch.full((len(states), 1), result)

        return multiply

    monkeypatch.setattr(fast_linear, "product", taking(seconds, result))
    monkeypatch.setattr(fast_linear, "functional", SimpleNamespace(linear=taking(0.002, 256.0)))
    assert onednn_is_faster.__wrapped__(1) is expected
    assert onednn_is_faster_for_few_rows.__wrapped__(1) is expected


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError])
def test_torch_without_the_product(error: type[Exception], monkeypatch):
    def product(*args):
        raise error

    monkeypatch.setattr(fast_linear, "product", product)
    assert onednn_is_faster.__wrapped__(1) is onednn_is_faster_for_few_rows.__wrapped__(1) is False


@pytest.mark.filterwarnings("ignore:TF32")
def test_switched_off(products):
    target = llama(torch.float32)
    with torch.backends.mkldnn.flags(enabled=False), fast_linears(target):
        assert forwards(target) == 0


@pytest.fixture
def only_few_rows(products, monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN is taken to be faster for few rows and large weights, of 2,000 numbers here."""
    monkeypatch.setattr(fast_linear, "onednn_is_faster", lambda num_threads: False)
    monkeypatch.setattr(fast_linear, "onednn_is_faster_for_few_rows", lambda num_threads: True)
    monkeypatch.setattr(fast_linear, "LARGE", 2000)
    return products


@needs_onednn
def test_only_few_rows_and_large_weights(only_few_rows):
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 39))
    for shape in ((3, 40), (16, 40), (2, 8, 40), (0, 40), (40,)):
        states = torch.randn(shape)
        expected = model(states)
        with fast_linears(model):
            assert torch.equal(model(states), expected)
    assert not only_few_rows
    with fast_linears(model):
        for shape in ((4, 40), (3, 5, 40)):
            states = torch.randn(shape)
            torch.testing.assert_close(
                model(states),
                functional.linear(functional.linear(states, *model[0].parameters()), *model[1].parameters()),
            )
    assert only_few_rows == [(4, 40), (15, 40)]


@needs_onednn
def test_same_text_where_only_few_rows_are_faster(only_few_rows):
    target, batch = llama(torch.float32), ragged_batch()  # a head of 64 tokens and 32 channels
    reference = plain(target, batch, max_new_tokens=16)
    check(target, batch, reference, make_network("anchor", target), 3, max_new_tokens=16)
    assert {shape[0] for shape in only_few_rows} <= set(FEW) and only_few_rows


@pytest.mark.parametrize("large", [2000, 10**9], ids=["large", "small"])
def test_where_it_does_not_pay_nothing_is_touched(large: int, products, monkeypatch):
    monkeypatch.setattr(fast_linear, "onednn_is_faster", lambda num_threads: False)
    monkeypatch.setattr(fast_linear, "onednn_is_faster_for_few_rows", lambda num_threads: large > 2000)
    monkeypatch.setattr(fast_linear, "LARGE", large)
    target, batch = llama(torch.float32), ragged_batch()
    check(target, batch, plain(target, batch, max_new_tokens=8), make_network("anchor", target), 3, max_new_tokens=8)
    assert not products
