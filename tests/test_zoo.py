"""Architectures that people have: a change of what runs, or of its cost, shows."""

from __future__ import annotations

import pytest

from . import zoo


@pytest.mark.parametrize("name", [n for n in zoo.SMALL if n in zoo.baseline()])
def test_a_network_runs_or_is_refused_as_recorded(name):
    assert zoo.line(name) == zoo.baseline()[name], "python -m tests.zoo " + name


def test_the_page_on_conversion_has_the_recorded_lines():
    assert zoo.in_page(zoo.PAGE.read_text())[0] == zoo.table()


def test_every_line_is_of_a_network_of_the_zoo():
    assert len({**zoo.TORCHVISION, **zoo.TIMM}) == 70
    assert {*zoo.baseline()} <= {*zoo.TORCHVISION, *zoo.TIMM}
