# yolo-sos, AGPL-3.0
"""Linear layers as matrices, and their inputs while a model runs."""

import pytest
import torch
from torch import nn

from yolo_sos.core import FinalLayer, InputCapture, input_rows, last_layer, select_layers, weight_matrix
from yolo_sos.core.layers import affine_matrix, check_linear, layer_output, output_rows, write_weight

# name: layer, shape of its input, rows of its input matrix
LAYERS = {
    "linear (n, d)": (lambda bias: nn.Linear(5, 3, bias=bias), (4, 5), 4),
    "linear (d,)": (lambda bias: nn.Linear(5, 3, bias=bias), (5,), 1),
    "linear (a, b, c, d)": (lambda bias: nn.Linear(5, 3, bias=bias), (2, 3, 4, 5), 24),
    "conv": (lambda bias: nn.Conv2d(5, 3, 1, bias=bias), (2, 5, 4, 6), 48),
    "conv stride 2": (lambda bias: nn.Conv2d(5, 3, 1, stride=2, bias=bias), (2, 5, 5, 6), 18),
    "conv stride (1, 3)": (lambda bias: nn.Conv2d(5, 3, 1, stride=(1, 3), bias=bias), (2, 5, 5, 7), 30),
    "conv unbatched": (lambda bias: nn.Conv2d(5, 3, 1, bias=bias), (5, 4, 6), 24),
    "conv unbatched stride 2": (lambda bias: nn.Conv2d(5, 3, 1, stride=2, bias=bias), (5, 5, 7), 12),
    "conv dilation 2": (lambda bias: nn.Conv2d(5, 3, 1, dilation=2, bias=bias), (2, 5, 4, 6), 48),
    "conv padding same": (lambda bias: nn.Conv2d(5, 3, 1, padding="same", bias=bias), (2, 5, 4, 6), 48),
}


def rows_of_output(module, z):
    """Return a layer's own output as ``(n, out)``."""
    if isinstance(module, nn.Linear):
        return z.reshape(-1, z.shape[-1])
    return z.movedim(-3, -1).reshape(-1, z.shape[-3])


def make(name, bias):
    """Return a float64 layer and an input for it."""
    layer, shape, n = LAYERS[name]
    g = torch.Generator().manual_seed(0)
    module = layer(bias).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(generator=g)
    return module, torch.randn(shape, generator=g, dtype=torch.float64), n


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_is_the_layers_output(name, bias, memory_format):
    module, x, n = make(name, bias)
    if x.ndim == 4:
        x, module = x.to(memory_format=memory_format), module.to(memory_format=memory_format)
    check_linear(module, name)
    z = rows_of_output(module, module(x))
    rows = input_rows(module, x)
    assert rows.shape == (n, 5)
    by_hand = rows @ module.weight.view(3, 5).T + (module.bias if bias else 0)
    assert torch.allclose(by_hand, z, rtol=1e-12, atol=1e-13)
    assert torch.allclose(rows @ weight_matrix(module).T + (module.bias if bias else 0), z, rtol=1e-12, atol=1e-13)
    assert torch.allclose(output_rows(module, rows), z, rtol=1e-12, atol=1e-13)


def test_rows_follow_images_then_lines_then_columns():
    x = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)  # image · 12 + channel · 4 + line · 2 + column
    rows = input_rows(nn.Conv2d(3, 1, 1), x)
    firsts = [0, 1, 2, 3, 12, 13, 14, 15]
    assert rows.tolist() == [[i, i + 4, i + 8] for i in firsts]


def test_outputs_are_computed_in_the_weights_dtype():
    module = nn.Linear(5, 3)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).half()
    z = output_rows(module, x)
    assert z.dtype == torch.float32
    assert torch.equal(z, module(x.float()))
    assert not z.requires_grad


@pytest.mark.parametrize("name", ["linear (n, d)", "conv"])
def test_weight_is_a_view_and_is_written_in_place(name):
    module, x, _ = make(name, bias=True)
    parameter, address = module.weight, module.weight.data_ptr()
    bias, shape = module.bias.detach().clone(), module.weight.shape
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    assert weight_matrix(module).data_ptr() == address
    assert not weight_matrix(module).requires_grad
    new = torch.arange(15, dtype=torch.float64).view(5, 3).T  # (out, d), not contiguous
    write_weight(module, new)
    assert torch.equal(weight_matrix(module), new)
    assert module.weight is parameter
    assert module.weight.data_ptr() == address
    assert module.weight.shape == shape
    assert torch.equal(module.bias, bias)
    assert parameter.is_leaf
    assert parameter.requires_grad
    module(x).sum().backward()
    optimizer.step()  # the optimizer holds this very parameter
    assert not torch.equal(weight_matrix(module), new)


class Custom(nn.Module):
    """Neither of the two supported layers, though it has a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Conv2d(6, 4, 1, groups=2), ValueError, "groups=2"),
        (nn.Conv2d(5, 3, 3), ValueError, r"kernel_size=\(3, 3\)"),
        (nn.Conv2d(5, 3, (1, 3)), ValueError, r"kernel_size=\(1, 3\)"),
        (nn.Conv2d(5, 3, 1, padding=1), ValueError, r"padding=\(1, 1\)"),
        (nn.Conv2d(5, 3, 1, padding=(0, 1)), ValueError, r"padding=\(0, 1\)"),
        (nn.Conv1d(5, 3, 1), TypeError, "Conv1d"),
        (nn.Conv3d(5, 3, 1), TypeError, "Conv3d"),
        (nn.ConvTranspose2d(5, 3, 1), TypeError, "ConvTranspose2d"),
        (nn.Bilinear(5, 5, 3), TypeError, "Bilinear"),
        (nn.Embedding(5, 3), TypeError, "Embedding"),
        (nn.Sequential(nn.Linear(5, 3)), TypeError, "Sequential"),
        (Custom(), TypeError, "Custom"),
        (nn.Linear(5, 3).to(torch.complex64), TypeError, "torch.complex64"),
        (type("Adapted", (nn.Linear,), {"forward": lambda self, x: 2 * x})(5, 3), TypeError, "Adapted"),
        # What is written to these weights would be lost, without a word.
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), ValueError, "weight"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(5, 3, 1)), ValueError, "weight"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_other_layers_are_refused_by_name(module, error, message):
    for refuse in (check_linear, lambda module, name: FinalLayer(name, module)):
        with pytest.raises(error, match=rf"^model\.23\.cv2\.0\.2 .*{message}"):
            refuse(module, "model.23.cv2.0.2")


def test_a_layer_without_a_classifier_is_its_own():
    module = nn.Linear(5, 3)
    assert FinalLayer("fc", module).classifier == "fc"
    assert FinalLayer("fc", module, classifier="other").classifier == "other"
    assert (FinalLayer("fc", module).kind, FinalLayer("fc", module).level) == ("linear", 0)


# Capture --------------------------------------------------------------------------------------------------------------
class Branches(nn.Module):
    """Two convolutions and a linear layer on one stem; may skip the last, or fail between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3)
        self.a, self.b, self.fc = nn.Conv2d(5, 3, 1), nn.Conv2d(5, 4, 1, stride=2, bias=False), nn.Linear(5, 2)
        self.skip = self.fail = False

    def forward(self, x):
        x = self.stem(x)
        self.seen = x
        a, b = self.a(x), self.b(x)
        if self.fail:
            raise ArithmeticError("in forward")
        return (a, b) if self.skip else (a, b, self.fc(x.mean((2, 3))))


def branches():
    """Return the model, its final layers and a batch."""
    model = Branches()
    layers = [FinalLayer(name, getattr(model, name)) for name in ("a", "b", "fc")]
    return model, layers, torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(0))


def hooks(model):
    """Return the number of forward hooks of either kind in a model."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_captured_rows_give_the_layers_outputs():
    model, layers, x = branches()
    with InputCapture(layers) as capture:
        outputs = model(x)
        inputs = capture.take()
    assert list(inputs) == ["a", "b", "fc"]
    for layer, z in zip(layers, outputs, strict=True):
        rows = output_rows(layer.module, input_rows(layer.module, inputs[layer.name]))
        assert torch.allclose(rows, rows_of_output(layer.module, z), atol=1e-6)
        assert not inputs[layer.name].requires_grad
    assert inputs["a"].data_ptr() == model.seen.data_ptr()  # neither copied nor moved


def test_the_model_computes_the_same_with_hooks():
    model, layers, x = branches()
    plain = model(x)
    with InputCapture(layers):
        watched = model(x)
    assert all(torch.equal(p, w) for p, w in zip(plain, watched, strict=True))
    assert all(w.requires_grad for w in watched)


def test_inputs_by_keyword_are_seen():
    layers, x = [FinalLayer("a", nn.Linear(5, 3)), FinalLayer("b", nn.Conv2d(5, 3, 1))], torch.ones(1, 5, 2, 5)
    with InputCapture(layers) as capture:
        for layer in layers:
            layer.module(input=x)
        assert all(torch.equal(kept, x) for kept in capture.take().values())
    assert not any(layer.module._forward_pre_hooks for layer in layers)


def test_take_releases_what_it_returns():
    model, layers, x = branches()
    with InputCapture(layers) as capture:
        model(x)
        capture.clear()
        model(x + 1)
        assert torch.equal(capture.take()["a"], model.seen)
        with pytest.raises(RuntimeError, match="Layer 'a' ran 0 times"):
            capture.take()


def test_a_layer_that_does_not_run_once_is_named():
    model, layers, x = branches()
    model.skip = True
    with pytest.raises(RuntimeError, match=r"Layer 'fc' ran 0 times .*torch\.compile"), InputCapture(layers) as capture:
        model(x)
        capture.take()
    assert hooks(model) == 0
    model.skip = False
    with (
        pytest.raises(RuntimeError, match=r"Layer 'a' ran 2 times .*cannot be told apart"),
        InputCapture(layers) as capture,
    ):
        model(x)
        model(x)
        capture.take()
    assert hooks(model) == 0


def test_hooks_are_gone_after_the_block():
    model, layers, x = branches()
    capture = InputCapture(layers)
    assert hooks(model) == 0
    for _ in range(2):  # it can be entered again
        with capture:
            assert hooks(model) == 3
            model(x)
        assert hooks(model) == 0


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(error):
    model, layers, x = branches()
    model.fail = error is ArithmeticError
    capture = InputCapture(layers)
    with pytest.raises(error), capture:
        model(x)
        raise error
    assert hooks(model) == 0
    assert capture._inputs == {}


def test_hooks_of_others_stay():
    model, layers, x = branches()
    calls = []
    model.a.register_forward_pre_hook(lambda *_: calls.append(1))
    with InputCapture(layers):
        model(x)
    model(x)
    assert len(calls) == 2
    assert hooks(model) == 1


# Which layers ---------------------------------------------------------------------------------------------------------
def names(layers):
    return [layer.name for layer in layers]


def test_layers_are_selected_by_module_name_and_glob():
    model, own, _ = branches()
    for layers, expected in (
        ("a", ["a"]),
        (model.a, ["a"]),
        (own[0], ["a"]),
        ("[ab]", ["a", "b"]),
        ("*", ["stem", "a", "b", "fc"]),  # refused below, for the stem is a 3×3 convolution
        (["fc", model.a, own[1]], ["fc", "a", "b"]),
        (["a", "[ab]", model.a], ["a", "b"]),  # each once
    ):
        if layers == "*":
            with pytest.raises(ValueError, match=r"^stem has kernel_size=\(3, 3\)"):
                select_layers(model, layers)
            continue
        found = select_layers(model, layers)
        assert names(found) == expected
        assert all(layer.module is getattr(model, layer.name) for layer in found)


def test_a_given_layer_keeps_its_kind():
    model, *_ = branches()
    layer = FinalLayer("a", model.a, "box", 2, classifier="b")
    assert select_layers(model, [layer]) == [layer]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            "c",
            ValueError,
            r"layers='c' names no nn.Linear or nn.Conv2d of this Branches. Its last ones: stem, a, b, fc",
        ),
        ("head.*", ValueError, r"layers='head\.\*' names no"),
        ([], ValueError, "layers is empty"),
        (nn.Linear(2, 2), ValueError, r"Linear\(…\) is not a module of this Branches"),
        ("", TypeError, "Branches; a final layer is an nn.Linear"),  # the model itself
        (3, TypeError, "layers=3 is invalid"),
        ([None], TypeError, r"layers=\[None\] is invalid"),
    ],
)
def test_what_cannot_be_selected_is_named(layers, error, message):
    with pytest.raises(error, match=message):
        select_layers(branches()[0], layers)


class Registered(nn.Module):
    """Its head is registered first, and it has parameters of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.token = nn.Parameter(torch.zeros(4))
        self.body = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))

    def forward(self, x):
        return self.head(self.body(x) + self.token).relu()


def test_the_layer_that_runs_last_is_taken_not_the_one_registered_last():
    model = Registered()
    assert last_layer(model, lambda: model(torch.zeros(2, 5))).name == "head"
    assert hooks(model) == 0


def last_of(model, *shape):
    return lambda: last_layer(model, lambda: model(torch.zeros(shape)))


class LoRA(nn.Module):
    """As PEFT wraps a layer, or with the layer run after its adapter."""

    def __init__(self, base_last=False):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(2, 3)
        self.base_last = base_last

    def forward(self, x):
        if self.base_last:
            return self.lora_B(self.lora_A(x)) + self.base_layer(x)
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize(
    ("model", "shape", "error", "message"),
    [
        (nn.Sequential(nn.Linear(5, 5), LoRA()), (2, 5), TypeError, r"'1\.lora_B', part of an adapter, .*layers='…'"),
        (nn.Sequential(nn.Linear(5, 5), LoRA(True)), (2, 5), TypeError, r"'1\.base_layer', part of an adapter"),
        (nn.Sequential(nn.Linear(5, 5), nn.Conv1d(2, 3, 1)), (2, 5), TypeError, r"'1', a torch\.nn.*Conv1d"),
        (nn.Sequential(nn.Linear(5, 5), nn.Conv2d(2, 3, 3)), (2, 2, 5, 5), ValueError, r"^1 has kernel_size=\(3, 3\)"),
        (nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), (2, 5), TypeError, r"'1', a torch\.nn.*BatchNorm1d"),
        (nn.Sequential(nn.ReLU()), (2, 5), TypeError, "runs no module with weights"),
        (nn.Sequential(nn.Linear(5, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3, bias=False))), (2, 5),
         ValueError, "^1 computes its weight from other parameters"),
    ],
    ids=["adapter", "adapter first", "Conv1d", "3×3", "norm", "nothing", "weight norm"],
)  # fmt: skip
def test_what_runs_last_and_cannot_be_shifted_is_named(model, shape, error, message):
    with pytest.raises(error, match=message):
        last_of(model, *shape)()
    assert hooks(model) == 0


def test_a_quantized_head_is_named():
    if not set(torch.backends.quantized.supported_engines) - {"none"}:
        pytest.skip("this torch has no quantized engine")
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    model[2] = torch.ao.quantization.quantize_dynamic(nn.Sequential(model[2]), {nn.Linear}, torch.qint8)[0]
    with pytest.raises(TypeError, match=r"'2', a torch\.ao\.nn\.quantized\.dynamic.*, which cannot be shifted"):
        last_of(model, 2, 5)()


def test_hooks_are_gone_where_the_model_fails():
    model = Registered()
    with pytest.raises(RuntimeError):
        last_of(model, 2, 7)()
    assert hooks(model) == 0


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.Linear(3, 2, bias=False)])
def test_an_affine_matrix_writes_weight_and_bias(module):
    """``[V b]`` is written, and gives outputs, as V and b would; without a bias it is V."""
    x = torch.randn(4, 3) if isinstance(module, nn.Linear) else torch.randn(4, 3, 1, 1)
    other = type(module)(3, 2, 1) if isinstance(module, nn.Conv2d) else nn.Linear(3, 2, bias=module.bias is not None)
    matrix = affine_matrix(other)
    assert matrix.shape == (2, 3 if module.bias is None else 4)
    before = affine_matrix(module)
    torch.testing.assert_close(layer_output(FinalLayer("layer", module), matrix, x), other(x))
    assert torch.equal(affine_matrix(module), before)
    write_weight(module, matrix)
    assert torch.equal(module(x), other(x))
