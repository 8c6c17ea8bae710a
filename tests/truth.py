"""What each layer computes, in NumPy and float64."""

import numpy as np


def linear(x, weight, bias=0.0):
    return np.float64(x) @ np.float64(weight) + np.float64(bias)


def layer_norm(x, scale, bias, epsilon):
    x = np.float64(x)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def conv(x, weight, bias=0.0, strides=(1, 1), pads=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """Channels last, two axes of space: a sum over the places of the kernel."""
    x, weight = np.float64(x), np.float64(weight)
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    high, wide, n_in, _ = weight.shape
    sizes = [
        (x.shape[1 + i] - (weight.shape[i] - 1) * dilation[i] - 1) // strides[i] + 1
        for i in range(2)
    ]
    parts = []
    for group in range(groups):
        inputs = x[..., group * n_in : (group + 1) * n_in]
        kernel = np.split(weight, groups, axis=-1)[group]
        y = 0.0
        for i in range(high):
            for j in range(wide):
                window = inputs[
                    :,
                    i * dilation[0] : i * dilation[0]
                    + (sizes[0] - 1) * strides[0]
                    + 1 : strides[0],
                    j * dilation[1] : j * dilation[1]
                    + (sizes[1] - 1) * strides[1]
                    + 1 : strides[1],
                ]
                y = y + window @ kernel[i, j]
        parts.append(y)
    return np.concatenate(parts, -1) + bias


def padded(x, pads, mode="zero", value=0.0):
    """Channels last, two axes of space: the number of the element that stands at each place."""
    for axis, (low, high) in enumerate(pads, start=1):
        n = x.shape[axis]
        at = np.arange(-low, n + high)
        inside = (at >= 0) & (at < n)
        if mode == "reflect":
            at = np.where(at < 0, -at, np.where(at >= n, 2 * n - 2 - at, at))
        if mode == "circular":
            at = at % n
        x = np.take(x, np.clip(at, 0, n - 1), axis)
        if mode == "zero":
            shape = [-1 if i == axis else 1 for i in range(x.ndim)]
            x = np.where(inside.reshape(shape), x, np.inf)
    return np.where(np.isinf(x), value, x)


def pooled(x, reduce, window, strides=(1, 1), pads=((0, 0), (0, 0)), fill=0.0):
    """Channels last, two axes of space: each window by itself."""
    x = np.pad(np.float64(x), [(0, 0), *pads, (0, 0)], constant_values=fill)
    rows = range(0, x.shape[1] - window[0] + 1, strides[0])
    columns = range(0, x.shape[2] - window[1] + 1, strides[1])
    parts = [
        [reduce(x[:, i : i + window[0], j : j + window[1]], axis=(1, 2)) for j in columns]
        for i in rows
    ]
    return np.moveaxis(np.array(parts), 2, 0)


def adapted(x, reduce, target):
    """Channels last, two axes of space: blocks of which the first ones are longer by one."""
    for axis, size in enumerate(target, start=1):
        if size is not None:
            blocks = np.array_split(x, size, axis)
            x = np.stack([reduce(block, axis=axis) for block in blocks], axis)
    return x


def lstm(xs, h, c, weight_x, weight_h, bias):
    """The hidden states over time, and the last cell state; gates in the order i, f, g, o."""
    outputs = []
    for x in np.float64(xs):
        gates = x @ np.float64(weight_x) + h @ np.float64(weight_h) + np.float64(bias)
        i, f, g, o = np.split(gates, 4, axis=-1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs), c


def simple(xs, h, weight_x, weight_h, bias, residual=False):
    """The hidden states over time of h = tanh(x W + h U + b), or of it with h added inside."""
    outputs = []
    for x in np.float64(xs):
        y = x @ np.float64(weight_x) + h @ np.float64(weight_h) + bias
        h = np.tanh(y + h if residual else y)
        outputs.append(h)
    return (np.stack(outputs),)


def gru(xs, h, weight_x, weight_h, bias, bias_n):
    """As cuDNN computes it: the reset gate, and then the hidden product; gates r, z, n."""
    outputs = []
    wr, wz, wn = np.split(np.float64(weight_h), 3, axis=-1)
    for x in np.float64(xs):
        r, z, n = np.split(x @ np.float64(weight_x) + bias, 3, axis=-1)
        r, z = _sigmoid(r + h @ wr), _sigmoid(z + h @ wz)
        n = np.tanh(n + r * (h @ wn + bias_n))
        h = (1 - z) * n + z * h
        outputs.append(h)
    return (np.stack(outputs),)


def gru_reset_first(xs, h, weight_x, weight_h, bias):
    """As Chung et al. write it: the product of the reset state; gates r, z, n."""
    outputs = []
    wr, wz, wn = np.split(np.float64(weight_h), 3, axis=-1)
    for x in np.float64(xs):
        r, z, n = np.split(x @ np.float64(weight_x) + bias, 3, axis=-1)
        r, z = _sigmoid(r + h @ wr), _sigmoid(z + h @ wz)
        n = np.tanh(n + (r * h) @ wn)
        h = (1 - z) * h + z * n
        outputs.append(h)
    return (np.stack(outputs),)


def mgu(xs, h, weight_x, weight_h, bias, bias_n=0.0, reset=True):
    """As Flax computes it; gates f, n."""
    outputs = []
    wf, wn = np.split(np.float64(weight_h), 2, axis=-1)
    for x in np.float64(xs):
        f, n = np.split(x @ np.float64(weight_x) + bias, 2, axis=-1)
        f = _sigmoid(f + h @ wf)
        n = np.tanh(n + (f if reset else 1) * (h @ wn + bias_n))
        h = (1 - f) * n + f * h
        outputs.append(h)
    return (np.stack(outputs),)


def mgu_reset_first(xs, h, weight_x, weight_h, bias):
    """As Zhou et al. write it; gates f, n."""
    outputs = []
    wf, wn = np.split(np.float64(weight_h), 2, axis=-1)
    for x in np.float64(xs):
        f, n = np.split(x @ np.float64(weight_x) + bias, 2, axis=-1)
        f = _sigmoid(f + h @ wf)
        n = np.tanh(n + (f * h) @ wn)
        h = (1 - f) * h + f * n
        outputs.append(h)
    return (np.stack(outputs),)


def urlstm(xs, h, c, weight_x, weight_h, bias):
    """Gates f, r, u, o; the bias has opposite signs in the first two."""
    outputs = []
    for x in np.float64(xs):
        y = x @ np.float64(weight_x) + h @ np.float64(weight_h)
        f, r, u, o = np.split(y, 4, axis=-1)
        f, r = _sigmoid(f + bias), _sigmoid(r - bias)
        g = 2 * r * f + (1 - 2 * r) * f**2
        c = g * c + (1 - g) * np.tanh(u)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs), c


def conv_lstm(xs, h, c, weight_x, weight_h, bias_x, bias_h, pads):
    """Gates i, g, f, o, and 1 added to f."""
    outputs = []
    for x in np.float64(xs):
        y = conv(x, weight_x, bias_x, pads=pads) + conv(h, weight_h, bias_h, pads=pads)
        i, g, f, o = np.split(y, 4, axis=-1)
        c = _sigmoid(f + 1) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs), c


def rms_norm(x, scale, epsilon):
    x = np.float64(x)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def group_norm(x, scale, bias, groups, epsilon):
    """Channels last: each group of channels over all of space, example by example."""
    x = np.float64(x)
    parts = np.split(x, groups, axis=-1)
    over = tuple(range(1, x.ndim))
    normal = [
        (p - p.mean(over, keepdims=True)) / np.sqrt(p.var(over, keepdims=True) + epsilon)
        for p in parts
    ]
    return np.concatenate(normal, -1) * scale + bias


def batch_norm(x, scale, bias, mean, var, epsilon):
    """In evaluation; in training with the batch's own ``mean`` and ``var``."""
    x, mean, var = np.float64(x), np.float64(mean), np.float64(var)
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def updated_statistics(x, mean, var, momentum):
    """The running mean and (biased) variance after a training call on ``x``."""
    x = np.float64(x)
    keep, take = momentum, 1 - momentum
    return keep * mean + take * x.mean(0), keep * var + take * x.var(0)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _erf_normal_cdf(x):
    from math import erf

    return np.vectorize(lambda v: (1 + erf(v / np.sqrt(2))) / 2)(x)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

ACTIVATIONS = {
    "celu": lambda x, alpha=1.0: np.maximum(x, 0) + np.minimum(alpha * np.expm1(x / alpha), 0),
    "elu": lambda x, alpha=1.0: np.where(x > 0, x, alpha * np.expm1(x)),
    "gelu": lambda x, approximate=True: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        if approximate
        else x * _erf_normal_cdf(x)
    ),
    "glu": lambda x: x[..., : x.shape[-1] // 2] * _sigmoid(x[..., x.shape[-1] // 2 :]),
    "hard_shrink": lambda x, lambd=0.5: np.where(np.abs(x) > lambd, x, 0),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x, min_val=-1.0, max_val=1.0: np.clip(x, min_val, max_val),
    "identity": lambda x: x,
    "leaky_relu": lambda x, negative_slope=0.01: np.where(x > 0, x, negative_slope * x),
    "log_sigmoid": lambda x: -np.log1p(np.exp(-x)),
    "log_softmax": lambda x: np.log(_softmax(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: _SELU_SCALE * np.where(x > 0, x, _SELU_ALPHA * np.expm1(x)),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "soft_shrink": lambda x, lambd=0.5: np.sign(x) * np.maximum(np.abs(x) - lambd, 0),
    "soft_sign": lambda x: x / (1 + np.abs(x)),
    "softmax": _softmax,
    "softmax_2d": lambda x: np.moveaxis(_softmax(np.moveaxis(x, -3, -1)), -1, -3),
    "softmin": lambda x: _softmax(-x),
    "softplus": lambda x: np.logaddexp(x, 0),  # which does not overflow
    "tanh": np.tanh,
    "tanh_shrink": lambda x: x - np.tanh(x),
    "threshold": lambda x, threshold, value: np.where(x > threshold, x, value),
}
