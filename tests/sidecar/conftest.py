"""A sidecar in this process, before a server and a dealer in it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import crypten_espn as espn
from crypten_espn.bundle import Bundle, Description, Preprocessing
from crypten_espn.masked.model import MaskedModel
from crypten_espn.masked.planning import masked_model
from crypten_espn.serving.client import connect
from crypten_espn.serving.dealer import DealerServer
from crypten_espn.serving.link import Limits, Link
from crypten_espn.serving.quota import Quota
from crypten_espn.serving.server import ModelServer
from crypten_espn.sidecar.limits import SidecarLimits
from crypten_espn.sidecar.running import Sidecar
from crypten_espn.sidecar.tensors import Model
from crypten_espn.wire.connect import parse_address

from ..masked.cases import Pair, residual
from ..serving.conftest import Run, heard, run  # noqa: F401

IMAGES = Preprocessing((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
NAMES = tuple(f"class {i}" for i in range(5))


def photo() -> bytes:
    """A PNG that the network's guard lets through."""
    draws = np.random.default_rng(0)
    pixels = draws.integers(80, 176, (12, 17, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Answered:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Beside:
    """A running sidecar, what it asks, and what the network answers in the clear."""

    sidecar: Sidecar
    server: ModelServer
    dealer: DealerServer
    network: torch.nn.Module
    inputs: torch.Tensor
    model: Model = field(repr=False)

    @property
    def address(self) -> str:
        return self.sidecar.address

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> Answered:
        """One request; an underscore in a header's name stands for a dash."""
        connection = http.client.HTTPConnection(
            *parse_address(self.address), timeout=60
        )
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answered(answer.status, found, answer.read())

    def infer(self, request: object, **headers: str) -> Answered:
        """One request for an inference, in JSON."""
        body = json.dumps(request).encode()
        return self.ask("POST", "/v2/models/model/infer", body, **headers)

    def request(self, x: torch.Tensor, **changes: object) -> dict[str, Any]:
        """A good request for these inputs, but for the changes to its input."""
        given = {
            "name": "input",
            "datatype": "FP32",
            "shape": list(x.shape),
            "data": x.flatten().tolist(),
            **changes,
        }
        return {"inputs": [given]}

    def is_right(self, x: torch.Tensor, answer: Answered) -> bool:
        """Whether an answer in JSON holds the network's logits."""
        (output,) = answer.json["outputs"]
        logits = torch.tensor(output["data"]).reshape(output["shape"])
        return float((logits - self.network(x)).abs().max()) < 0.02


Start = Callable[..., Beside]


@pytest.fixture(scope="session")
def guarded() -> MaskedModel:
    """The network with a guard and names, every kernel compiled."""
    network, inputs = residual()
    guard = espn.InputGuard.fit(inputs)
    model = masked_model(espn.convert(network, inputs, guard=guard))
    Pair(model).infer(inputs[:1])
    return model


@pytest.fixture
def start(guarded: MaskedModel, run: Run) -> Iterator[Start]:  # noqa: F811
    """Start a sidecar with these limits; all ends with the test."""
    with contextlib.ExitStack() as stack:

        def starting(
            *,
            limits: SidecarLimits | None = None,
            server_limits: Limits | None = None,
            quota: Quota | None = None,
            described: Description | None = None,
            size: int = 1,
            timeout: float = 20,
        ) -> Beside:
            limits = SidecarLimits() if limits is None else limits
            dealer = run(DealerServer("127.0.0.1:0", timeout=20))
            link = Link(dealer.address, timeout=20)
            bundle = Bundle(guarded, described or Description(IMAGES, NAMES))
            server = run(
                ModelServer(
                    bundle, "127.0.0.1:0", link=link, limits=server_limits, quota=quota
                )
            )
            asking = Link(dealer.address, timeout=timeout)
            sidecar = stack.enter_context(
                Sidecar(
                    lambda: connect(server.address, link=asking),
                    "127.0.0.1:0",
                    size=size,
                    limits=limits,
                )
            )
            model = Model(guarded.plan, bundle.description, batch=limits.batch)
            thread = threading.Thread(target=sidecar.run)
            thread.start()

            def end() -> None:
                sidecar.stop()
                thread.join(60)
                assert not thread.is_alive()

            stack.callback(end)
            network, inputs = residual()
            return Beside(sidecar, server, dealer, network, inputs, model)

        yield starting


@pytest.fixture
def beside(start: Start) -> Beside:
    return start()
