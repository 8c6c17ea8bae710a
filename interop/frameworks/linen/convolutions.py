"""Convolutions."""

from __future__ import annotations

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from ..nnx.convolutions import (
    conv_fields,
    conv_options,
    conv_transpose_fields,
    conv_transpose_options,
)
from .adapter import Node, adapter, node_of
from .variables import kernel_size


@adapter.reads(
    nn.Conv,
    specs.Conv,
    fixed={
        "conv_general_dilated": None,
        "conv_general_dilated_cls": None,
    },
)
def read_conv(node: Node, ctx: Reading) -> specs.Conv:
    m = node.module
    return specs.Conv(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        **conv_fields(m, ctx),
    )


_CONV = ("input_dilation", "mask", "dtype", "precision", "padding_mode")


@adapter.builds(specs.Conv, carries=_CONV)
def build_conv(spec: specs.Conv, ctx: Building) -> Node:
    module = nn.Conv(spec.weight.shape[-1], **conv_options(spec, ctx))
    return node_of(module, {"kernel": spec.weight, "bias": spec.bias})


@adapter.reads(
    nn.ConvLocal,
    specs.ConvLocal,
    fixed={
        "conv_general_dilated": None,
        "conv_general_dilated_cls": None,
        "feature_group_count": 1,
    },
)
def read_conv_local(node: Node, ctx: Reading) -> specs.ConvLocal:
    return specs.ConvLocal(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        kernel_size=kernel_size(node.module),
        **conv_fields(node.module, ctx),
    )


@adapter.builds(specs.ConvLocal, carries=_CONV)
def build_conv_local(spec: specs.ConvLocal, ctx: Building) -> Node:
    module = nn.ConvLocal(spec.weight.shape[-1], **conv_options(spec, ctx))
    return node_of(module, {"kernel": spec.weight, "bias": spec.bias})


@adapter.reads(nn.ConvTranspose, specs.ConvTranspose)
def read_conv_transpose(node: Node, ctx: Reading) -> specs.ConvTranspose:
    arrays = node.array("kernel"), node.array("bias")
    return specs.ConvTranspose(**conv_transpose_fields(node.module, *arrays, ctx))


@adapter.builds(specs.ConvTranspose, carries=(*_CONV[1:], "preferred_element_type"))
def build_conv_transpose(spec: specs.ConvTranspose, ctx: Building) -> Node:
    kernel, options = conv_transpose_options(spec, ctx)
    module = nn.ConvTranspose(spec.weight.shape[-1], **options)
    return node_of(module, {"kernel": kernel, "bias": spec.bias})
