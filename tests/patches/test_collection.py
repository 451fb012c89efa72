"""The patches together: what each says, that applying twice is applying once."""

from __future__ import annotations

import crypten
import pytest
from crypten.common import rng

from crypten_espn import patches

from .cases import python, without


def test_each_patch_says_what_it_is_for() -> None:
    names = [patch.name for patch in patches.PATCHES]
    assert len(set(names)) == len(names)
    for patch in patches.PATCHES:
        assert patch.broke and patch.seen_on and patch.delete_when
        assert patches.get(patch.name) is patch


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="onnx_registration"):
        patches.get("nothing")


def test_import_is_silent_and_applies_what_is_needed() -> None:
    result = python("import crypten_espn")
    assert result.stdout == result.stderr == ""
    # torchvision's operators load by themselves beside a torch for CUDA.
    optional = {"torchvision_ops"}
    missing = {p.name for p in patches.PATCHES} - {p.name for p in patches.applied()}
    assert missing <= optional


def test_apply_twice_changes_nothing() -> None:
    before = crypten.nn.onnx_converter._to_crypten, rng.generate_random_ring_element
    patches.apply()
    assert before == (
        crypten.nn.onnx_converter._to_crypten,
        rng.generate_random_ring_element,
    )


# All but torchvision_ops, whose names stay defined once torchvision is imported.
@pytest.mark.parametrize("name", [patch.name for patch in patches.PATCHES[1:]])
def test_revert_uncovers_the_defect_and_apply_mends_it(name: str) -> None:
    patch = patches.get(name)
    with without(name):
        assert not patch.applied and patch.probe()
        patch.revert()
    assert patch.applied and not patch.probe()
