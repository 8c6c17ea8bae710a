"""Stacks."""

from __future__ import annotations

from brainstate import nn

from ... import specs
from ...composites.brainstate import Lambda
from ...walk import Building, Reading
from .adapter import adapter
from .norms import read_rms_norm_with_bias


@adapter.reads(nn.Sequential, specs.Sequential, state=("layers",))
def read_sequential(m: nn.Sequential, ctx: Reading) -> specs.Sequential:
    if [type(layer) for layer in m.layers] == [nn.RMSNorm, nn.OneToOne]:
        norm, affine = m.layers
        return read_rms_norm_with_bias(norm, affine, ctx)
    return specs.Sequential(layers=ctx.read_all(m.layers))


@adapter.builds(specs.Sequential)
def build_sequential(spec: specs.Sequential, ctx: Building) -> nn.Sequential:
    first, *rest = [ctx.build(layer) for layer in spec.layers]
    if not isinstance(first, nn.Module):  # BrainState takes plain callables after a module only
        first = Lambda(first)
    return nn.Sequential(first, *rest)
