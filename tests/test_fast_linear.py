"""Linear layers through oneDNN compute the same, in the models of a call and nowhere else, and only where that pays."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from exactness import check, plain
from test_alignment import make_network
from tiny import llama, ragged_batch
from torch import nn
from torch.nn import functional

from specformer import generate
from specformer.generation import backend_linear, backend_packed
from specformer.generation.backend_linear import (
    ANY,
    FEW,
    LARGE,
    NONE,
    fast_linears,
    faster_rows,
    filling_gain,
    gain,
    plain_linears,
)

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN"
)


@pytest.fixture(params=["as they lie", "packed"])
def products(request, monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN is taken to be faster for any number of rows, with weights as they lie or with packed ones too; the
    shapes of the states of all its products."""
    seen, multiply = [], backend_linear.onednn_linear
    is_packed = request.param == "packed"

    def counted(states, *args):
        seen.append(tuple(states.shape))
        return multiply(states, *args)

    def gain(rows, num_threads, dtype=torch.float32, packed=False):
        return 2.0 if is_packed or not packed else 0.0

    monkeypatch.setattr(backend_linear, "gain", gain)
    monkeypatch.setattr(backend_packed, "free_memory", lambda: 2**40)
    monkeypatch.setattr(backend_linear, "onednn_linear", counted)
    return seen


@pytest.fixture
def packed_only(monkeypatch) -> None:
    """oneDNN is taken to be faster with packed weights, and only with those."""
    monkeypatch.setattr(backend_linear, "gain", lambda *_, packed=False: 2.0 if packed else 0.0)
    monkeypatch.setattr(backend_packed, "free_memory", lambda: 2**40)


@pytest.fixture
def only_few_rows(monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN is taken to be faster for few rows and large weights, of 2,000 numbers here."""
    seen, multiply = [], backend_linear.onednn_linear
    monkeypatch.setattr(backend_linear, "gain", lambda rows, *_, packed=False: 2.0 if rows in FEW and not packed else 0)
    monkeypatch.setattr(backend_linear, "onednn_linear", lambda *given: seen.append(given[0].shape) or multiply(*given))
    monkeypatch.setattr(backend_linear, "LARGE", 2000)
    return seen


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
    torch.testing.assert_close(multiplied(layer, states), layer(states), rtol=1e-5, atol=1e-5)
    assert len(products) == 1
    layer.weight = nn.Parameter(torch.randn(24, 40).t())
    torch.testing.assert_close(multiplied(layer, states), layer(states), rtol=1e-5, atol=1e-5)
    assert len(products) == 2


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.double(),
        lambda layer: layer.to("meta"),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().to_sparse_csr())),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.arange(80.0)[::2])),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(1))),
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.full((1,), 2.0).expand(40))),
        lambda layer: setattr(layer, "forward", torch.relu),
    ],
    ids=["float64", "meta", "sparse", "strided bias", "one bias", "expanded bias", "its own forward"],
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


# ---- packed weights


HALVES = [torch.bfloat16, torch.float32]


@needs_onednn
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 1, 24), (1, 3, 24), (4, 24), (5, 24), (3, 2, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_rows_are_filled_up_where_that_takes_no_longer(shape, has_bias: bool, packed_only, monkeypatch):
    seen, multiply = [], backend_linear.onednn_linear
    monkeypatch.setattr(backend_linear, "onednn_linear", lambda *given: seen.append(given[0].shape) or multiply(*given))
    monkeypatch.setattr(backend_linear, "filling_gain", lambda num_threads, dtype: 1.0)
    monkeypatch.setattr(backend_linear, "LARGE", 24 * 40)
    states, layer = torch.randn(shape), nn.Linear(24, 40, bias=has_bias)
    found, small = multiplied(layer, states), nn.Linear(24, 39)
    torch.testing.assert_close(found, layer(states), rtol=1e-5, atol=1e-5)
    assert seen.pop() == ((5, 24) if states.numel() < 5 * 24 else shape)
    assert multiplied(small, states).shape == (*shape[:-1], 39) and seen.pop() == shape
    monkeypatch.setattr(backend_linear, "filling_gain", lambda num_threads, dtype: 0.9)
    assert multiplied(layer, states).shape == found.shape and seen.pop() == shape


@needs_onednn
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(40, 24), (7, 3), (33, 5), (1, 1), (64, 64), (300, 130)])
@pytest.mark.parametrize("rows", [1, 2, 5, 17, 200])
@torch.no_grad()
def test_packed_weights_multiply_as_they_lie(dtype: torch.dtype, shape: tuple[int, int], rows: int, packed_only):
    layer = nn.Linear(*reversed(shape), dtype=dtype)
    states = torch.randn(rows, shape[1], dtype=dtype)
    with fast_linears(layer) as entered:
        found = layer(states)
    assert entered[0].packed is not None
    torch.testing.assert_close(found.double(), layer.double()(states.double()), rtol=0.02, atol=0.02)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "uncounted": lambda layer: layer.weight.data.mul_(2),
    "one number, uncounted": lambda layer: layer.weight.data[-1].fill_(3),
    "two rows, uncounted": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "loaded": lambda layer: layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight.detach())),
    "other data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.detach()),
}


@needs_onednn
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_changed_weight_is_packed_again(change, dtype: torch.dtype, packed_only):
    layer, states = nn.Linear(24, 40, dtype=dtype), torch.randn(3, 24, dtype=dtype)
    with fast_linears(layer) as entered:
        layer(states)
        first = entered[0].packed[1]
    with fast_linears(layer) as entered:
        assert entered[0].packed[1] is first  # kept from call to call
    change(layer)
    with fast_linears(layer) as entered:
        found = layer(states)
        assert entered[0].packed[1] is not first
    torch.testing.assert_close(found, layer(states), rtol=0.02, atol=0.02)


@needs_onednn
@torch.no_grad()
def test_a_weight_that_changes_in_a_call(packed_only):
    """Training steps and merged adapters between two passes."""
    layer, states = nn.Linear(24, 40), torch.randn(3, 24)
    with fast_linears(layer):
        for change in [CHANGES["in place"], CHANGES["another parameter"], CHANGES["other data"]]:
            change(layer)
            assert torch.equal(layer(states), functional.linear(states, layer.weight, layer.bias))


@needs_onednn
@torch.no_grad()
def test_another_thread_brings_the_newest_weight(packed_only):
    layer, states = nn.Linear(24, 40), torch.randn(3, 24)
    with fast_linears(layer):
        layer.weight.data.mul_(2)
        found = []
        thread = threading.Thread(target=lambda: found.append(multiplied(layer, states)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], layer(states))


@needs_onednn
@pytest.mark.parametrize("dtype", HALVES)
def test_a_weight_packed_in_inference_mode_serves_all(dtype: torch.dtype, packed_only):
    layer, states = nn.Linear(24, 40, dtype=dtype), torch.randn(3, 24, dtype=dtype)
    with torch.inference_mode():
        expected = multiplied(layer, states)
    assert torch.equal(multiplied(layer, states), expected)
    with fast_linears(layer):
        layer(states.requires_grad_()).sum().backward()
    assert torch.allclose(states.grad, layer.weight.sum(dim=0).expand(3, -1), atol=1e-2)


@needs_onednn
def test_threads_pack_once(packed_only, monkeypatch):
    layer, packed, pack = nn.Linear(240, 400), [], backend_packed.pack
    monkeypatch.setattr(backend_packed, "pack", lambda weight: packed.append(weight) or time.sleep(0.1) or pack(weight))
    threads = [threading.Thread(target=multiplied, args=(layer, torch.randn(3, 240))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1


@needs_onednn
def test_packed_weights_go_with_their_layer(packed_only):
    layer = nn.Linear(24, 40)
    with fast_linears(layer):
        pass
    assert layer in backend_packed._packed
    gone, many = weakref.ref(backend_packed._packed[layer][2]), len(backend_packed._packed)
    del layer
    gc.collect()
    assert gone() is None and len(backend_packed._packed) < many


@needs_onednn
@torch.no_grad()
def test_short_of_memory_nothing_is_packed(packed_only, monkeypatch):
    model, states = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24)), torch.randn(3, 24)
    size = sum(layer.weight.nbytes for layer in model)
    monkeypatch.setattr(backend_packed, "free_memory", lambda: backend_packed.KEPT_FREE + size - 1)
    with fast_linears(model) as entered:
        assert entered == [] and torch.equal(model(states), model[1](model[0](states)))
    monkeypatch.setattr(backend_packed, "free_memory", lambda: backend_packed.KEPT_FREE + size)
    with fast_linears(model) as entered:
        assert [forward.layer for forward in entered] == list(model)
    monkeypatch.setattr(backend_packed, "free_memory", lambda: 0)
    with fast_linears(model) as entered:
        assert len(entered) == 2  # what is packed already needs no more


def test_memory_that_is_free(monkeypatch, tmp_path):
    limit, statistics, memory = tmp_path / "max", tmp_path / "stat", tmp_path / "meminfo"
    monkeypatch.setattr(backend_packed, "CONTAINERS", [(str(limit), str(statistics), "anon")])
    monkeypatch.setattr(backend_packed, "MEMORY", str(memory))
    assert backend_packed.free_memory() == 0  # nothing tells
    memory.write_text("MemTotal:       90 kB\nMemAvailable:   8 kB\nHugePages_Total:       0\n")
    assert backend_packed.free_memory() == 8192
    statistics.write_text("anon 3000\nfile 70000\n")
    limit.write_text("max\n")
    assert backend_packed.free_memory() == 8192
    limit.write_text("5000\n")
    assert backend_packed.free_memory() == 2000


@needs_onednn
@torch.no_grad()
def test_weights_in_training_are_not_packed(packed_only):
    """A fused optimizer's step is not counted: what is packed would be out of date inside."""
    layer, states = nn.Linear(24, 40), torch.randn(3, 24)
    with fast_linears(layer, in_training=True) as entered:
        assert entered == []
        layer.weight.data.mul_(2)
        assert torch.equal(layer(states), functional.linear(states, layer.weight, layer.bias))


@needs_onednn
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_that_are_not_packed(dtype: torch.dtype, packed_only):
    strided, inference = nn.Linear(24, 40, dtype=dtype), nn.Linear(24, 40, dtype=dtype)
    strided.weight = nn.Parameter(torch.randn(24, 40, dtype=dtype).t())
    with torch.inference_mode():
        inference.weight = nn.Parameter(torch.randn(40, 24, dtype=dtype))
    with fast_linears(strided, inference) as entered:
        assert entered == []


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
        ({3: 0.9, 10: 2.4}, NONE, FEW),
        ({3: 0.9, 10: 1.1}, NONE, NONE),
        ({3: 0.0, 10: 0.0}, NONE, NONE),
    ],
    ids=["AMD EPYC", "Intel Xeon", "neither", "no oneDNN"],
)
def test_kinds_of_machines(gains: dict, small: range, large: range, monkeypatch):
    monkeypatch.setattr(backend_linear, "gain", lambda rows, num_threads: gains[rows])
    assert faster_rows(torch.empty(1, LARGE - 1), 2) == small
    assert faster_rows(torch.empty(1, LARGE), 2) == large
    assert faster_rows(torch.empty(1, LARGE, dtype=torch.bfloat16), 2) == NONE


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
    assert gain.__wrapped__(3, 1) == gain.__wrapped__(10, 1) == filling_gain.__wrapped__(1, torch.float32) == 0.0


def test_where_it_does_not_pay_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(backend_linear, "gain", lambda *_, **__: 1.0)
    with fast_linears(llama(torch.float32)) as entered:
        assert entered == []
