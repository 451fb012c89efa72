"""A small planned network with what clients are told of it."""

from __future__ import annotations

import pytest

from crypten_espn.bundle import Bundle, Description, Preprocessing
from crypten_espn.masked.model import MaskedModel

from ..masked.cases import planned, residual

IMAGES = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(scope="session")
def model() -> MaskedModel:
    network, inputs = residual()
    return planned(network, inputs)


@pytest.fixture(scope="session")
def bundle(model: MaskedModel) -> Bundle:
    (count,) = model.plan.output_shape
    names = tuple(f"class {i}" for i in range(count))
    return Bundle(model, Description(IMAGES, names))
