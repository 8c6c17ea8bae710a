"""Attention of any framework is attention of every other, and rotated positions too."""

import functools
import itertools

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.composites import brainstate as of_brainstate
from interop.composites import equinox as of_equinox
from interop.composites import nnx as of_nnx

from .cases import array
from .conftest import NAMES, Framework

Q, K, V = array(2, 5, 6, seed=1), array(2, 3, 6, seed=2), array(2, 3, 6, seed=3)
MASK = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]], bool)


def parts(heads=2, kv_heads=2, depth=4, out=7, bias=True):
    """The arrays of a layer, by name, all of different sizes."""
    weights = {
        "query": array(6, heads, depth, seed=4),
        "key": array(6, kv_heads, depth, seed=5),
        "value": array(6, kv_heads, depth, seed=6),
        "out": array(heads, depth, out, seed=7),
    }
    biases = {
        name: array(*weight.shape[1:] if name != "out" else (out,), seed=8)
        for name, weight in weights.items()
    }
    return weights, biases if bias else dict.fromkeys(weights)


SCALES = {"query_ln": array(4, seed=9) + 2, "key_ln": array(4, seed=10) + 2}


def truth(q, k, v, mask, weights, biases, scales=None):
    """What a layer computes, head by head, in NumPy and float64."""

    def project(x, name):
        return np.einsum("bti,ihd->bhtd", x, np.float64(weights[name])) + (
            0 if biases[name] is None else np.float64(biases[name])[None, :, None, :]
        )

    def normalized(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.float64(scale)

    heads, kv_heads = weights["query"].shape[1], weights["key"].shape[1]
    q, k, v = (project(np.float64(x), n) for x, n in ((q, "query"), (k, "key"), (v, "value")))
    if scales:
        q, k = normalized(q, scales["query_ln"]), normalized(k, scales["key_ln"])
    outs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, shared].swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        if mask is not None:
            seen = np.broadcast_to(mask, (len(q), heads, *scores.shape[1:]))[:, head]
            scores = np.where(seen, scores, -np.inf)
            scores = np.where(seen.any(-1, keepdims=True), scores, 0.0)  # the mean of all
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        outs.append(weight / weight.sum(-1, keepdims=True) @ v[:, shared])
    y = np.einsum("hbtd,hdo->bto", np.stack(outs), np.float64(weights["out"]))
    return y if biases["out"] is None else y + np.float64(biases["out"])


def nnx_layer(weights, biases, scales=None, rate=0.0, **options):
    layer = nnx.MultiHeadAttention(
        weights["query"].shape[1],
        6,
        weights["query"][0].size,
        weights["out"].shape[-1],
        weights["key"].shape[1],
        use_bias=biases["query"] is not None,
        normalize_qk=scales is not None,
        dropout_rate=rate,
        decode=False,
        param_dtype=weights["query"].dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    for name, weight in weights.items():
        getattr(layer, name).kernel.set_value(weight)
        if biases[name] is not None:
            getattr(layer, name).bias.set_value(biases[name])
    for name, scale in (scales or {}).items():
        getattr(layer, name).scale.set_value(scale)
    layer.eval()
    return layer


def linen_layer(weights, biases, scales=None, cls=nn.MultiHeadDotProductAttention, **options):
    layer = cls(
        weights["query"].shape[1],
        qkv_features=weights["query"][0].size,
        out_features=weights["out"].shape[-1],
        use_bias=biases["query"] is not None,
        normalize_qk=scales is not None,
        deterministic=True,
        **options,
    )
    params = {name: {"kernel": weight} for name, weight in weights.items()}
    for name, bias in biases.items():
        params[name] |= {} if bias is None else {"bias": bias}
    for name, scale in (scales or {}).items():
        params[name] = {"scale": scale}
    return layer, {"params": params}


def equinox_layer(weights, biases, **options):
    heads, depth = weights["query"].shape[1:]
    layer = eqx.nn.MultiheadAttention(
        heads,
        *(weights[name].shape[0] for name in ("query", "key", "value")),
        weights["out"].shape[-1],
        depth,
        weights["value"].shape[-1],
        *(biases[name] is not None for name in ("query", "key", "value", "out")),
        key=jax.random.key(0),
        inference=True,
        **options,
    )
    for name, weight in weights.items():
        own = f"{'output' if name == 'out' else name}_proj"
        n_in = weight.shape[0] * (weight.shape[1] if name == "out" else 1)
        layer = eqx.tree_at(
            lambda m, own=own: getattr(m, own).weight, layer, weight.reshape(n_in, -1).T
        )
        if biases[name] is not None:
            bias = biases[name].reshape(-1)
            layer = eqx.tree_at(lambda m, own=own: getattr(m, own).bias, layer, bias)
    return layer


LAYERS = {"nnx": nnx_layer, "linen": linen_layer, "equinox": equinox_layer}
PAIRS = [(a, b) for a, b in itertools.permutations(NAMES, 2) if a in LAYERS]
pairs = pytest.mark.parametrize(("name", "goal"), PAIRS)


def convert(name, goal, model):
    return Framework(goal).convert_from(Framework(name), model)


def call(goal, model, *inputs, mask=None):
    """The output for a batch, by each framework's own convention for a mask."""
    module, variables = model if isinstance(model, tuple) else (model, None)
    if goal == "linen":
        return module.apply(variables, *inputs, mask=mask)
    if goal == "equinox":
        own = None if mask is None else 0
        own = None if mask is not None and mask.ndim == 2 else own
        return jax.vmap(lambda m, *x: module(*x, mask=m), in_axes=(own, *[0] * len(inputs)))(
            mask, *inputs
        )
    with brainstate.environ.context(precision=32):
        return module(*inputs, mask=mask)


def close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(np.float64(found), np.float64(wanted), rtol=2e-6, atol=atol)


@pairs
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_computes_the_same(name, goal, bias):
    arrays = parts(bias=bias)
    converted = convert(name, goal, LAYERS[name](*arrays))
    close(call(goal, converted, Q, K, V), truth(Q, K, V, None, *arrays))


@pairs
def test_a_mask_hides_keys_and_a_query_without_any_gets_the_mean(name, goal):
    arrays = parts()
    converted = convert(name, goal, LAYERS[name](*arrays))
    close(call(goal, converted, Q, K, V, mask=MASK), truth(Q, K, V, MASK, *arrays))
    per_head = np.stack([np.stack([MASK, ~MASK]), np.stack([~MASK, MASK])])  # of each example
    found = call(goal, converted, Q, K, V, mask=per_head)
    close(found, truth(Q, K, V, per_head, *arrays))


@pytest.mark.parametrize("goal", [name for name in NAMES if name != "nnx"])
def test_grouped_queries_and_normalised_heads_convert(goal):
    arrays = parts(heads=4, kv_heads=2)
    model = nnx_layer(*arrays, scales=SCALES)
    converted = convert("nnx", goal, model)
    mask = np.stack([MASK[None]] * 2)
    close(call(goal, converted, Q, K, V, mask=mask), truth(Q, K, V, mask, *arrays, SCALES))
    back = convert(goal, "nnx", converted)
    assert type(back) is nnx.MultiHeadAttention
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, nnx.state(back, nnx.Param), nnx.state(model, nnx.Param))
    )


@pytest.mark.parametrize("goal", [name for name in NAMES if name != "equinox"])
def test_sizes_that_only_equinox_has_convert(goal):
    weights, biases = parts()
    weights |= {"key": array(5, 2, 4, seed=5), "value": array(3, 2, 6, seed=6)}
    weights |= {"out": array(2, 6, 7, seed=7)}
    biases |= {"query": None, "value": array(2, 6, seed=8), "out": None}
    k, v = K[..., :5], V[..., :3]
    model = equinox_layer(weights, biases)
    converted = convert("equinox", goal, model)
    close(call(goal, converted, Q, k, v), truth(Q, k, v, None, weights, biases))
    back, _ = convert(goal, "equinox", converted)
    assert eqx.tree_equal(back, eqx.nn.inference_mode(model))


def test_a_native_layer_is_built_where_it_is_exact():
    arrays = parts()
    kinds = {
        "nnx": nnx.MultiHeadAttention,
        "linen": nn.MultiHeadDotProductAttention,
        "equinox": eqx.nn.MultiheadAttention,
        "brainstate": of_brainstate.MultiHeadAttention,
    }
    for name, goal in PAIRS:
        converted = convert(name, goal, LAYERS[name](*arrays))
        assert type(converted[0] if isinstance(converted, tuple) else converted) is kinds[goal]


def test_in_a_stack_equinox_attends_to_its_one_input():
    arrays = parts(out=6)
    model = nnx.Sequential(nnx_layer(*arrays), jnp.tanh, nnx_layer(*arrays))
    converted = interop.convert(model, to="equinox")
    assert type(converted.layers[0]) is of_equinox.MultiHeadAttention
    close(jax.vmap(converted)(Q), model(Q))


@pairs
def test_half_precision_agrees_to_the_last_bit(name, goal):
    """The frameworks round at different places: then the formula is that of the source."""
    weights, biases = (jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree) for tree in parts())
    model = LAYERS[name](weights, biases)
    converted = convert(name, goal, model)
    half = [x.astype(jnp.bfloat16) for x in (Q, K, V)]
    found, wanted = call(goal, converted, *half), call(name, model, *half)
    assert found.dtype == wanted.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found), np.float32(wanted))
    found, wanted = call(goal, converted, Q, K, V), call(name, model, Q, K, V)
    assert found.dtype == wanted.dtype == jnp.float32
    close(found, wanted, atol=1e-5)


def test_linen_softmax_in_float32_stays_so():
    weights, biases = parts()
    model = linen_layer(
        weights, biases, dtype=jnp.bfloat16, force_fp32_for_softmax=True, precision="highest"
    )
    wanted = call("linen", model, Q, K, V)
    for goal in ("nnx", "equinox", "brainstate"):
        found = call(goal, convert("linen", goal, model), Q, K, V)
        assert found.dtype == wanted.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(found), np.float32(wanted))


@pairs
def test_gradients_agree_compiled(name, goal):
    arrays = parts()
    model = LAYERS[name](*arrays)
    converted = convert(name, goal, model)

    def gradient(fw, model):
        return jax.jit(jax.grad(lambda x: (call(fw, model, x, K, V) ** 2).sum()))(Q)

    close(gradient(goal, converted), gradient(name, model), atol=1e-4)


def test_weights_of_a_composite_get_the_gradients_of_the_source():
    arrays = parts(heads=4, kv_heads=2)
    model = nnx_layer(*arrays, scales=SCALES)
    converted = interop.convert(model, to="linen")

    def loss(params):
        return (converted[0].apply({"params": params}, Q, K, V) ** 2).sum()

    found = jax.grad(loss)(converted[1]["params"])
    wanted = nnx.grad(lambda m: (m(Q, K, V) ** 2).sum())(model)
    for name in ("query", "key", "value", "out"):
        close(found[name]["weight"], wanted[name]["kernel"].get_value(), atol=1e-3)
        close(found[name]["bias"], wanted[name]["bias"].get_value(), atol=1e-3)
    close(found["query_scale"], wanted["query_ln"]["scale"].get_value(), atol=1e-3)


def trained(goal, model, q, k, v, seed=0):
    """The output in training, of one draw."""
    if goal == "brainstate":
        brainstate.random.seed(seed)
        with brainstate.environ.context(fit=True):
            return model(q, k, v)
    if goal == "nnx":
        model.train()
        return model(q, k, v, rngs=nnx.Rngs(dropout=seed))
    if goal == "linen":
        module, rngs = model[0].clone(deterministic=False), {"dropout": jax.random.key(seed)}
        return module.apply(model[1], q, k, v, rngs=rngs)
    keys = jax.random.split(jax.random.key(seed), len(q))
    module = eqx.nn.inference_mode(model[0], False)
    return jax.vmap(lambda q, k, v, key: module(q, k, v, key=key))(q, k, v, keys)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("goal", NAMES)
def test_dropout_acts_on_the_weights_of_the_values(goal, shared):
    """With values of 1 and no biases an output is the sum of the weights that were kept."""
    weights = {name: jnp.ones_like(a) for name, a in parts(heads=2, depth=1, out=1)[0].items()}
    weights |= {"query": weights["query"] * 0, "value": weights["value"] / 6}
    weights |= {"out": jnp.array([[[1.0]], [[100.0]]])}  # which shows what each head kept
    arrays = weights, dict.fromkeys(weights)
    if goal == "nnx":
        model = linen_layer(*arrays, dropout_rate=0.25, broadcast_dropout=shared)
        model = convert("linen", "nnx", model)
    else:
        model = convert("nnx", goal, nnx_layer(*arrays, rate=0.25, broadcast_dropout=shared))
    ones = jnp.ones((3, 400, 6))
    y = np.asarray(trained(goal, model, ones, ones[:, :4], ones[:, :4]))[..., 0]
    # each of the 4 weights is 1/4, and those that are kept count 4/3 of it
    second, first = np.divmod(np.round(y * 3), 100)
    np.testing.assert_allclose(y * 3, first + 100 * second, atol=1e-3)
    np.testing.assert_allclose(first.mean(), 3, atol=0.2)
    assert {2, 3, 4} <= set(np.unique(first))
    assert (first == second).all() == shared
    if goal != "equinox" or not shared:  # a composite there draws for each example by its key
        assert (first[0] == first[1]).all() == shared


def test_process_heads_is_a_call_option_of_composites():
    weights, biases = parts()
    model = equinox_layer(weights, biases)
    rope = eqx.nn.RotaryPositionalEmbedding(4)

    def rotate(q, k, v):
        turn = jax.vmap(rope, in_axes=1, out_axes=1)
        return turn(q), turn(k), v

    wanted = jax.vmap(lambda q, k, v: model(q, k, v, process_heads=rotate))(Q, K, V)
    converted = interop.convert(model, to="nnx")
    composite = of_nnx.MultiHeadAttention(
        interop.convert(model, to="brainstate").spec, rngs=nnx.Rngs(0), deterministic=True
    )
    assert type(converted) is nnx.MultiHeadAttention
    close(composite(Q, K, V, process_heads=jax.vmap(rotate)), wanted)
    single = of_equinox.MultiHeadAttention(composite.spec)
    close(jax.vmap(lambda q, k, v: single(q, k, v, process_heads=rotate))(Q, K, V), wanted)


def test_a_causal_call_sees_no_later_keys():
    arrays = parts()
    model = nnx_layer(*arrays)
    converted = interop.convert(model, to="brainstate")
    wanted = truth(Q, Q, Q, np.tril(np.ones((5, 5), bool)), *arrays)
    close(model(Q, is_causal=True), wanted)
    close(converted(Q, is_causal=True), wanted)
    keep = np.array([1, 0, 1, 1, 0], bool)
    both = model(Q, mask=np.broadcast_to(keep, (2, 1, 5, 5)), is_causal=True)
    close(converted(Q, mask=np.broadcast_to(keep, (2, 1, 5, 5)), is_causal=True), both)


def test_values_without_keys_are_an_error():
    converted = interop.convert(nnx_layer(*parts()), to="brainstate")
    with pytest.raises(interop.ArgumentError, match="inputs_v is given without inputs_k"):
        converted(Q, inputs_v=V)


def test_linen_aliases_convert():
    arrays = parts()
    for cls in (nn.MultiHeadAttention, nn.SelfAttention):
        module, variables = linen_layer(*arrays, cls=cls)
        converted = interop.convert(module, to="nnx", params=variables)
        close(converted(Q), truth(Q, Q, Q, None, *arrays), atol=1e-5)


@pytest.mark.parametrize("goal", NAMES)
def test_another_attention_function_is_refused_by_name(goal):
    def attend(*args, **keywords):
        return nnx.dot_product_attention(*args, **keywords)

    if goal != "nnx":
        with pytest.raises(interop.UnsupportedLayerError, match="attention_fn"):
            convert("nnx", goal, nnx_layer(*parts(), attention_fn=attend))
    else:
        with pytest.raises(interop.UnsupportedLayerError, match="attention_fn"):
            convert("linen", goal, linen_layer(*parts(), attention_fn=attend))


def test_a_part_that_is_replaced_is_refused():
    model = nnx_layer(*parts())
    model.query = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    with pytest.raises(interop.UnsupportedLayerError, match="only a LinearGeneral converts"):
        interop.convert(model, to="brainstate")


def test_wrong_arrays_of_a_linen_layer_are_told_together():
    module, variables = linen_layer(*parts(), scales=SCALES)
    del variables["params"]["key"]["bias"]
    variables["params"]["out"]["kernel"] = jnp.zeros((2, 5, 7))
    with pytest.raises(interop.ConversionError) as e:
        interop.convert(module, to="nnx", params=variables)
    assert e.value.missing == ("params/key/bias",)
    assert e.value.mismatched == ("params/out/kernel has shape (2, 5, 7), wanted (2, 4, 7)",)


# -- rotated positions --


def rotated(x, positions, theta):
    """Each pair as a complex number, turned by its angle, in float64."""
    half = x.shape[-1] // 2
    pairs = np.float64(x[..., :half]) + 1j * np.float64(x[..., half:])
    angles = np.float64(positions)[..., None] * theta ** (-np.arange(half) / half)
    y = pairs * np.exp(1j * angles)
    return np.concatenate([y.real, y.imag], axis=-1)


@pytest.mark.parametrize("goal", [name for name in NAMES if name != "equinox"])
def test_rotation_is_computed_from_the_layers_own_theta(goal):
    """Equinox itself takes the tables of the first layer of one size for all."""
    fw, x = Framework(goal), array(2, 5, 6)
    eqx.nn.RotaryPositionalEmbedding(6, theta=10.0)(x[0])
    converted = convert("equinox", goal, eqx.nn.RotaryPositionalEmbedding(6, theta=100.0))
    close(fw.call(converted, x), rotated(x, np.arange(5), 100.0))
    assert fw.call(converted, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    back = convert(goal, "equinox", converted)
    close(Framework("equinox").call(back, x), rotated(x, np.arange(5), 100.0))


def test_rotation_takes_positions():
    layer = interop.convert(eqx.nn.RotaryPositionalEmbedding(6), to="brainstate")
    x, positions = array(2, 3, 6), jnp.array([[0, 2, 7], [1, 1, 4]])
    close(layer(x, input_positions=positions), rotated(x, positions, 1e4))


@pytest.mark.filterwarnings("ignore:'.value' access")  # by a layer with tables itself
@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="nnx.RoPE is new in flax 0.12.9")
@pytest.mark.parametrize("goal", [name for name in NAMES if name != "nnx"])
@pytest.mark.parametrize("options", [{}, {"embedding_size": 6, "max_seq_len": 9}])
def test_rotation_of_nnx_converts_and_returns(goal, options):
    fw, x = Framework(goal), array(2, 5, 6)
    model = nnx.RoPE(theta=100.0, **options)
    converted = convert("nnx", goal, model)
    close(fw.call(converted, x), rotated(x, np.arange(5), 100.0))
    assert fw.call(converted, x.astype(jnp.bfloat16)).dtype == jnp.float32
    back = convert(goal, "nnx", converted)
    assert type(back) is nnx.RoPE
    assert (back.cached_sin is None) == (not options)
    close(back(x), model(x))


@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="nnx.RoPE is new in flax 0.12.9")
@pytest.mark.parametrize("goal", [name for name in NAMES if name != "nnx"])
def test_attention_with_rotated_heads_converts_and_returns(goal):
    weights, biases = parts(heads=4, kv_heads=2)

    rope = nnx.RoPE(theta=100.0)
    attend = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
    model = nnx_layer(weights, biases, attention_fn=attend)
    converted = convert("nnx", goal, model)
    found = call(goal, converted, Q, K, V)
    close(found, model(Q, K, V))
    assert np.abs(found - nnx_layer(weights, biases)(Q, K, V)).max() > 0.1
    back = convert(goal, "nnx", converted)
    assert type(back) is nnx.MultiHeadAttention
    close(back(Q, K, V), model(Q, K, V))


@pytest.mark.parametrize(
    ("name", "goal"),
    [("linen", "brainstate"), ("linen", "nnx"), ("nnx", "brainstate"), ("nnx", "linen")],
)
def test_a_cache_goes_on_where_it_is(name, goal):
    """Steps of a sequence, of which the first are taken before the conversion."""
    kv_heads = 1 if name == "nnx" else 2
    arrays = parts(kv_heads=kv_heads)
    causal = np.tri(5, dtype=bool)
    wanted = truth(Q, Q, Q, causal, *arrays, SCALES)
    if name == "nnx":
        model = nnx_layer(*arrays, SCALES)
        model.set_attributes(decode=True)
        model.init_cache(Q.shape)
        for i in range(2):
            model(Q[:, i : i + 1])
    else:
        layer, params = linen_layer(*arrays, SCALES, decode=True)
        start = layer.init(jax.random.key(0), Q)["cache"]
        cache = {"cache": start}
        for i in range(2):
            _, cache = layer.apply(params | cache, Q[:, i : i + 1], mutable=["cache"])
        model = layer, params | cache
    fw = Framework(goal)
    converted = fw.convert_from(Framework(name), model)
    found = []
    for i in range(2, 5):
        x = Q[:, i : i + 1]
        if goal == "linen":
            module, variables = converted
            y, cache = module.apply(variables, x, mutable=["cache", "batch_stats"])
            converted = module, {**variables, **cache}
        else:
            y = converted(x)
        found.append(y)
    close(jnp.concatenate(found, 1), wanted[:, 2:])
    back = Framework(name).convert_from(fw, converted)
    is_native = isinstance(back[0] if name == "linen" else back, ATTENTION[name])
    assert is_native
    index = back[1]["cache"]["cache_index"] if name == "linen" else back.cache_index
    assert int(index[...]) == 5


ATTENTION = {"linen": nn.MultiHeadDotProductAttention, "nnx": nnx.MultiHeadAttention}


def test_a_cache_of_a_batch_is_refused_by_equinox_and_a_missing_one_is_an_error():
    model = nnx_layer(*parts())
    model.set_attributes(decode=True)
    with pytest.raises(interop.UnsupportedLayerError, match="decode=True") as e:
        interop.convert(model, to="equinox")
    assert e.value.option == "decode"
    with pytest.raises(interop.ArgumentError, match="no cache"):
        interop.from_nnx(model)(Q[:, :1])
    model.init_cache(Q.shape)
    with pytest.raises(interop.ArgumentError, match="one step"):
        interop.from_nnx(model)(Q)
