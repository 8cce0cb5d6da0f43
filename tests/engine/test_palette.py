"""The palette can be seen on its paper, and told apart without colour vision."""

import itertools

import numpy as np
import pytest

from engine.palette import DARK, DARK_PAPER, LIGHT, LIGHT_PAPER, contrast


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#777777") == 1


@pytest.mark.parametrize(("colours", "paper"), [(LIGHT, LIGHT_PAPER), (DARK, DARK_PAPER)])
def test_every_colour_stands_out_from_its_paper(colours, paper):
    assert len(set(colours)) == 8
    assert min(contrast(colour, paper) for colour in colours) >= 3


# Machado, Oliveira and Fernandes (2009), full severity, in linear RGB
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881))
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
FULL_VISION = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


@pytest.mark.parametrize("colours", [LIGHT, DARK])
@pytest.mark.parametrize("vision", [FULL_VISION, DEUTERANOPIA, PROTANOPIA])
def test_no_two_colours_look_alike(colours, vision):
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    seen = np.clip((np.array(vision) @ (rgb**2.2).T).T, 0, 1) ** (1 / 2.2)
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.2
