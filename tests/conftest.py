"""``source`` and ``target``: every framework that has a file in ``models/``, and all pairs."""

import ctypes
import importlib
import itertools
import pkgutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interop

from . import models


class Framework:
    """A file of ``models/``; asking it for what the framework lacks skips the test."""

    def __init__(self, name: str):
        self.name = name
        self._module: types.ModuleType = importlib.import_module(f"{models.__name__}.{name}")

    @property
    def lacks(self):
        """What the framework lacks, with the reasons."""
        return self._module.LACKS

    @property
    def channels_first(self) -> bool:
        """Whether models take the channels of images before the axes of space."""
        return getattr(self._module, "CHANNELS_FIRST", False)

    def needs(self, feature: str) -> None:
        """Skip the test, with the reason, where the framework lacks ``feature``."""
        if feature in self._module.LACKS:
            pytest.skip(f"{self.name}: {self._module.LACKS[feature]}")

    def __getattr__(self, name: str):
        self.needs(name)
        return getattr(self._module, name)

    def from_channels_last(self, x):
        """A batch in the layout that models of the framework take: images are moved."""
        moved = x.ndim > 2 and self.channels_first
        return jnp.moveaxis(x, -1, 1) if moved else x

    def to_channels_last(self, x):
        """A batch that a model of the framework returned, with its channels last."""
        moved = x.ndim > 2 and self.channels_first
        return jnp.moveaxis(x, 1, -1) if moved else x

    def call(self, model, x, **options):
        """The output of ``run`` alone."""
        return self.run(model, x, **options)[0]

    def convert_from(self, source, model, **options):
        """``model`` of the framework ``source``, converted to this one."""
        module, keywords = source.arguments(model)
        return self.receive(
            lambda: interop.convert(module, to=self.name, **keywords, **options)
        )


NAMES = sorted(info.name for info in pkgutil.iter_modules(models.__path__))


def pytest_generate_tests(metafunc):
    wanted = [name for name in ("source", "target") if name in metafunc.fixturenames]
    if wanted:
        pairs = list(itertools.permutations(NAMES, len(wanted)))
        metafunc.parametrize(
            wanted, pairs, indirect=True, ids=["-".join(pair) for pair in pairs]
        )


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_go_with_their_file():
    """All that the tests compile would be gigabytes, of which glibc would keep the most."""
    yield
    jax.clear_caches()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture
def source(request):
    return Framework(request.param)


@pytest.fixture
def target(request):
    return Framework(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
