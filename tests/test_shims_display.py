"""What a shim looks like: one entry that names the guest and its parameters, in every host."""

import inspect

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import pytest
import treescope
from flax import nnx

import shims

from .live import X

KEY = jax.random.key(0)


def texts_in_nnx(shim, host):
    shim.eval()
    yield repr(shim)
    yield treescope.render_to_text(shim)
    yield treescope.render_to_text({"inside": nnx.Sequential(shim)})


def texts_in_equinox(shim, host):
    yield eqx.tree_pformat(shim)
    yield repr({"inside": shim})


def texts_in_brainstate(shim, host):
    yield repr(shim)
    yield repr(brainstate.nn.Sequential(shim))


def texts_in_linen(shim, host):
    table = nn.tabulate(shim, KEY, console_kwargs={"width": 400})
    yield repr(shim)
    yield table(X, deterministic=True)


TEXTS = {
    "brainstate": texts_in_brainstate,
    "equinox": texts_in_equinox,
    "linen": texts_in_linen,
    "nnx": texts_in_nnx,
}


@pytest.fixture
def hosted(source, target):
    target.needs("training")
    model = source.block(0.0)
    module, keywords = source.arguments(model)
    return module, target.Host(module, **keywords)


# treescope reads every name of NumPy.
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")
def test_a_shim_shows_its_guest_and_parameters(source, target, hosted):
    _, host = hosted
    rows = shims.explain(host.shim).rows
    names = {row.path.split(".")[-1] for row in rows if row.kind == "parameter"}
    for text in TEXTS[target.name](host.shim, host):
        assert "Block" in text
        assert all(name in text for name in names), text
        assert " object at 0x" not in text
        assert "_shim_link" not in text
        assert "_shim_cell" not in text


def test_the_signature_is_the_guests_with_the_hosts_keywords(source, target, hosted):
    module, host = hosted
    keywords = {
        "brainstate": [],
        "equinox": ["state", "key"],
        "linen": ["deterministic"],
        "nnx": ["rngs", "deterministic"],
    }[target.name]
    forward = type(module).update if source.name == "brainstate" else type(module).__call__
    own = [name for name in inspect.signature(forward).parameters if name != "self"]
    found = list(inspect.signature(host.shim).parameters)
    assert set(found) == {*own, *keywords}
    assert [name for name in found if name in own] == own


class Documented(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = brainstate.nn.Linear(3, 4)

    def update(self, x, *, gain=1.0):
        """Return the gain times what the layer computes."""
        return gain * self.linear(x)


@pytest.mark.parametrize("make", [shims.ToNNX, shims.ToLinen, shims.ToEquinox])
def test_the_documentation_is_the_guests_and_that_of_the_class_its_own(make):
    shim = make(Documented())
    assert inspect.getdoc(shim).startswith("Return the gain")
    assert "A live" in make.__doc__
    assert list(inspect.signature(shim).parameters)[0] == "x"
    assert inspect.signature(shim).parameters["gain"].default == 1.0
    assert next(iter(inspect.signature(make).parameters)) == "module"


def test_signatures_of_cells_are_the_hosts():
    cell = brainstate.nn.GRUCell(3, 4)
    equinox = shims.ToEquinox(cell)
    assert list(inspect.signature(equinox).parameters) == ["inputs", "carry", "state", "key"]
    own = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))
    assert list(inspect.signature(shims.FromNNX(own)).parameters) == ["inputs"]


def test_the_name_of_a_shims_class_tells_its_guest_and_names_no_variables():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return shims.ToLinen(brainstate.nn.Linear(3, 4))(x)

    assert list(Model().init(KEY, X)["params"]) == ["ToLinen_0"]
    layer, other = brainstate.nn.Linear(3, 4), nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    for shim in (shims.ToLinen(layer), shims.ToLinen(layer).copy(), shims.ToLinen(other)):
        assert type(shim).__name__ == "ToLinen(Linear)"
        assert isinstance(shim, shims.ToLinen)
    assert shims.ToLinen(layer) == shims.ToLinen(layer).clone()
    assert type(shims.ToNNX(layer)) is type(nnx.clone(shims.ToNNX(layer)))

    class Mine(shims.ToNNX):
        pass

    assert type(Mine(layer)) is Mine


def test_tabulate_has_one_row_for_a_shim_with_its_parameters():
    guest = brainstate.nn.Sequential(
        brainstate.nn.Linear(3, 4), brainstate.nn.Tanh(), brainstate.nn.Linear(4, 4)
    )
    wide = {"width": 400}
    model = nnx.Sequential(shims.ToNNX(guest), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    table = nnx.tabulate(model, X, console_kwargs=wide)
    row = [line for line in table.splitlines() if "ToNNX" in line]
    assert len(row) == 1
    assert "ToNNX(Sequential)" in row[0]
    assert "layers/0" in row[0]
    assert "36" in row[0]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(shims.ToLinen(guest, name="core")(x))

    lines = Model().tabulate(KEY, X, console_kwargs=wide).splitlines()
    assert len([line for line in lines if "ToLinen(Sequential)" in line]) == 1
    assert any("weight: \x1b[2mfloat32\x1b[0m[3,4]" in line for line in lines)
