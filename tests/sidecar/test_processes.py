"""Dealer, server and sidecar as processes, asked by a client that others wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crypten_espn.bundle import Bundle, Description
from crypten_espn.masked.model import MaskedModel

from ..masked.cases import residual
from ..serving.commands import running
from .conftest import IMAGES, NAMES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tritonclient_gets_the_right_class_through_a_sidecar(
    guarded: MaskedModel, tmp_path: Path
) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    Bundle(guarded, Description(IMAGES, NAMES)).save(tmp_path / "net.espn")
    network, inputs = residual()
    x, logits = inputs.numpy(), network(inputs).numpy()
    folder = "--material", str(tmp_path / "client")
    with (
        running(["deal", "127.0.0.1:0"]) as dealer,
        running(
            [
                *("serve", str(tmp_path / "net.espn"), "127.0.0.1:0"),
                *("--dealer", dealer, "--material", str(tmp_path / "server")),
            ]
        ) as server,
        running(
            [
                *("sidecar", server, "--dealer", dealer, "--listen", "127.0.0.1:0"),
                *("--name", "resnet", "--input-name", "pixels", "--ahead", "3"),
                *folder,
            ]
        ) as address,
        triton.InferenceServerClient(address) as client,
    ):
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("resnet") and not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "crypten-espn"
        (about,) = client.get_model_metadata("resnet")["inputs"]
        assert about == {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 8, 8]}
        given = triton.InferInput("pixels", list(x.shape), "FP32")
        for binary in (True, False):
            given.set_data_from_numpy(x, binary_data=binary)
            output = triton.InferRequestedOutput("logits", binary_data=binary)
            found = client.infer("resnet", [given], outputs=[output], request_id="7")
            assert np.abs(found.as_numpy("logits") - logits).max() < 0.02
            assert found.get_response()["id"] == "7"
            output = triton.InferRequestedOutput("logits", binary, class_count=1)
            found = client.infer("resnet", [given], outputs=[output])
            texts = [
                text.decode() if isinstance(text, bytes) else text
                for text in found.as_numpy("logits")[:, 0]
            ]
            wanted = [NAMES[i] for i in logits.argmax(1)]
            assert [text.split(":")[2] for text in texts] == wanted
        found = client.infer("resnet", [given])  # no output named: in bytes
        assert np.abs(found.as_numpy("logits") - logits).max() < 0.02
        wild = triton.InferInput("pixels", list(x.shape), "FP32")
        wild.set_data_from_numpy(np.full_like(x, np.nan))
        with pytest.raises(
            Exception, match=r"RangeError: .*NaN or infinite"
        ) as refused:
            client.infer("resnet", [wild])
        assert type(refused.value).__name__ == "InferenceServerException"
