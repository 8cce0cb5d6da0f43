"""Published figures are told with their source, and only beside what they can be compared with."""

from dataclasses import replace

from engine import published
from engine.results import Setting

FEATHER = Setting("resnet50", "imagenet", "feather", "global", "3", "auto", "100", "512", "bf16", "recipe inferred")


def test_every_figure_has_a_source_and_a_plausible_value():
    for figure in (*published.FIGURES, *published.NEIGHBOURS):
        assert figure.source.startswith(("README of the ", "paperswithcode board"))
        assert 50 < figure.top1 < 78
        assert 0 <= figure.sparsity < 1
        assert figure.reported_sparsity is None or abs(figure.reported_sparsity - figure.sparsity) < 0.02
    keys = [(f.name, f.model, f.sparsity, f.source) for f in published.FIGURES]
    assert len(set(keys)) == len(keys)
    # dense 2, Feather 1, Spartan 1, ST-3 and its sigma variant 10, STR 5, RigL 2 + 4, AC/DC 4, OptG 4, AC/DC + HAM 3
    assert len(keys) == 36


def test_feather_stands_beside_its_one_published_figure():
    (figure,) = published.beside(FEATHER, 0.9)
    assert (figure.top1, figure.source) == (76.93, "paperswithcode board of the paper")
    assert published.beside(FEATHER, 0.95) == []


def test_nothing_published_stands_beside_another_experiment():
    for other in (
        replace(FEATHER, scale="proxy"),
        replace(FEATHER, label="shortened: 8 of 100 epochs"),
        replace(FEATHER, p="2.5"),
        replace(FEATHER, theta="0.3"),
        replace(FEATHER, modifier="ham"),
        replace(FEATHER, model="resnet18"),
        replace(FEATHER, dataset="imagenette"),
    ):
        assert published.beside(other, 0.9) == []


def test_a_peer_stands_beside_its_figure_in_its_own_form_alone():
    rigl = replace(FEATHER, method="rigl", framework="erk", p="", theta="")
    assert [f.top1 for f in published.beside(rigl, 0.9)] == [73.07]  # not the one of five times the training
    assert published.beside(replace(rigl, framework="uniform"), 0.9) == []
    acdc = replace(FEATHER, method="acdc", p="", theta="")
    assert [f.top1 for f in published.beside(acdc, 0.8)] == [76.45]
    assert [f.top1 for f in published.beside(replace(acdc, modifier="ham"), 0.8)] == [77.20]


def test_the_papers_cifar_figures_are_unknown_and_the_neighbour_is_another_network():
    assert {published.exists("cifar100", m) for m in ("resnet20", "mobilenet_v1", "densenet40_24")} == {"unknown"}
    assert published.exists("digits", "resnet20") == "none"
    assert published.figures_for("cifar100", "resnet20") == []
    assert {f.model for f in published.neighbours_of("cifar100")} == {"resnet32"}
