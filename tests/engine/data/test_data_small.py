"""Small data sets: what a step sees depends on (seed, epoch, step) alone and equals torchvision's transforms."""

import hashlib
import pickle
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms import functional as TF

from engine.data import DataError, create_data, download
from engine.data.base import Normalize, Sharding, stratified_split
from engine.data.small import RECIPES, ResidentLoader, Split, load_split

MEAN, STD = (0.1, 0.4, 0.8), (0.2, 0.3, 0.5)


def make_loader(n=50, batch_size=16, rank=0, world_size=1, seed=3, size=8, **options):
    """Image i has label i, so that labels tell which image was read."""
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (n, size, size, 3), dtype=np.uint8))
    options = {"shuffle": True, "padding": 2, "flip": True, **options}
    normalize = Normalize(MEAN, STD, torch.device("cpu"))
    split = Split(images, torch.arange(n))
    return ResidentLoader(split, normalize, Sharding(n, batch_size, rank, world_size), seed=seed, **options), images


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for a, b in zip(batches, others, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.global_size == b.global_size


def digits(**options):
    return create_data("digits", **{"root": "", "batch_size": 128, "seed": 0, "device": "cpu", **options})


def labels_of(loader):
    return torch.cat([batch.labels for batch in loader.epoch(0)])


def test_an_epoch_visits_every_image_once_and_keeps_the_last_batch():
    loader, _ = make_loader()
    batches = list(loader.epoch(0))
    assert loader.num_samples == 50
    assert len(loader) == 4
    assert [batch.global_size for batch in batches] == [len(batch.images) for batch in batches] == [16, 16, 16, 2]
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(50))
    assert batches[0].images.dtype == torch.float32
    assert batches[0].labels.dtype == torch.int64


def test_equal_in_seed_and_epoch_and_different_otherwise():
    assert_same(make_loader()[0].epoch(4), make_loader()[0].epoch(4))
    one = next(make_loader()[0].epoch(4))
    for other in (next(make_loader()[0].epoch(5)), next(make_loader(seed=4)[0].epoch(4))):
        assert not torch.equal(one.labels, other.labels)


def test_the_global_random_state_is_neither_used_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = next(make_loader()[0].epoch(0))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.images, next(make_loader()[0].epoch(0)).images)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_a_resumed_epoch_is_the_tail_of_the_whole(start):
    loader, _ = make_loader()
    whole, tail = list(loader.epoch(2)), list(loader.epoch(2, start_step=start))
    assert len(tail) == 4 - start
    assert not tail or assert_same(whole[start:], tail) is None


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_the_batches_of_one(world_size, shuffle):
    options = {"n": 52, "shuffle": shuffle}
    ranks = [make_loader(rank=rank, world_size=world_size, **options)[0].epoch(1) for rank in range(world_size)]
    for whole, *shares in zip(make_loader(**options)[0].epoch(1), *ranks, strict=True):
        sizes = [len(share.images) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert {share.global_size for share in shares} == {sum(sizes)} == {whole.global_size}
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True), (0, False)])
def test_equals_torchvisions_transforms_at_the_same_offsets(padding, flip):
    loader, images = make_loader(padding=padding, flip=flip)
    index, top, left, mirrored = loader.plan(epoch=7)
    assert int(top.max()) <= 2 * padding
    assert bool(mirrored.any()) == flip
    if padding:
        assert set(top.tolist()) == set(left.tolist()) == set(range(2 * padding + 1))
    position = 0
    for batch in loader.epoch(7):
        for image, label in zip(batch.images, batch.labels, strict=True):
            assert label == index[position]
            expected = TF.pad(images[label].permute(2, 0, 1), [padding] * 4)
            expected = TF.crop(expected, int(top[position]), int(left[position]), 8, 8)
            expected = TF.hflip(expected) if mirrored[position] else expected
            expected = TF.normalize(TF.convert_image_dtype(expected), MEAN, STD)
            torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-6)
            position += 1


def test_channels_last_changes_the_layout_alone():
    (loader, _), plain = make_loader(), next(make_loader()[0].epoch(0))
    loader.normalize.memory_format = torch.channels_last
    last = next(loader.epoch(0))
    assert torch.equal(plain.images, last.images)
    assert plain.images.is_contiguous()
    assert last.images.is_contiguous(memory_format=torch.channels_last)


def test_images_are_held_as_uint8_without_a_padded_copy():
    loader, images = make_loader()
    assert loader.pixels.dtype == torch.uint8
    assert loader.pixels.numel() == images.numel() + 3


def test_digits_sizes_statistics_and_split():
    data = digits()
    assert (data.train.num_samples, data.eval.num_samples, data.num_classes) == (1438, 359, 10)
    assert data.image_shape == (3, 16, 16)
    assert data.eval_split == "test"
    images = load_split("digits", None, False, train=True).images
    assert int(images.min()) == 0
    assert int(images.max()) == 255
    pixels = images.double() / 255
    recipe = RECIPES["digits"]
    assert recipe.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-4)
    assert recipe.std[0] == pytest.approx(pixels.std().item(), abs=1e-4)
    assert not recipe.flip
    total, test = torch.bincount(torch.cat([labels_of(data.train), labels_of(data.eval)])), labels_of(data.eval)
    assert (torch.bincount(test) - 0.2 * total).abs().max() <= 0.5
    assert torch.equal(test, labels_of(digits(seed=9).eval))


def test_digits_show_their_label():
    """The nearest class mean classifies most test digits, so images and labels belong together."""
    data = digits(augment=False, batch_size=2000)
    (train,), (test,) = data.train.epoch(0), data.eval.epoch(0)
    means = torch.stack([train.images[train.labels == c].mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.images.flatten(1), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.85


def test_evaluation_has_a_fixed_order_and_no_augmentation():
    data = digits(eval_batch_size=100)
    assert len(data.eval) == 4
    assert_same(data.eval.epoch(0), data.eval.epoch(1))


def test_validation_is_held_out_of_training_stratified_and_fixed():
    data, other = digits(validation=0.1, augment=False), digits(validation=0.1, seed=5)
    assert data.eval_split == "validation"
    assert data.train.num_samples + data.eval.num_samples == 1438
    assert_same(data.eval.epoch(0), other.eval.epoch(0))
    full = torch.bincount(labels_of(digits().train))
    assert (torch.bincount(labels_of(data.eval)) - 0.1 * full).abs().max() <= 0.5
    rows = lambda loader: {image.numpy().tobytes() for batch in loader.epoch(0) for image in batch.images}  # noqa: E731
    assert not rows(data.train) & rows(data.eval)


def test_stratified_split_is_a_partition():
    labels = np.random.RandomState(0).randint(0, 5, 1000)
    kept, held_out = stratified_split(labels, 0.25)
    assert sorted([*kept, *held_out]) == list(range(1000))
    assert np.abs(np.bincount(labels[held_out]) - 0.25 * np.bincount(labels)).max() <= 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"validation": 1.0}, r"validation=1.0: must lie in \[0, 1\)"),
        ({"validation": 0.0001}, "0 evaluation images"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1, "world_size": 2}, "2 processes"),
        ({"batch_size": 1437, "world_size": 2}, "last batch of an epoch would have 1 images for 2 processes"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"workers": -1}, "workers=-1"),
        ({"image_size": 32}, "image_size=32"),
        ({"image_size": 5}, "image_size=5: .* 16 pixels"),
        ({"image_size": 0}, "image_size=0"),
    ],
)
def test_wrong_arguments_are_named(options, told):
    with pytest.raises(ValueError, match=told) as error:
        digits(**options)
    assert "\n" not in str(error.value)


def test_unknown_name_gets_the_closest():
    with pytest.raises(ValueError, match="'cifar1000': did you mean cifar100?"):
        create_data("cifar1000", root="", batch_size=1, seed=0, device="cpu")


# --- CIFAR, on a tiny archive in the official format whose md5s stand in for the official ones


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """A root whose `cifar-100-python/` holds 12 training and 6 test images, official to torchvision."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, n in (("train", 12), ("test", 6)):
        content = {"data": random.randint(0, 256, (n, 3072), dtype=np.uint8), "fine_labels": [i % 3 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c"]}))
    source = torchvision.datasets.CIFAR100
    monkeypatch.setattr(source, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(source, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(folder / "meta")})

    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return tmp_path / "data"


def open_cifar(root, **options):
    return create_data("cifar100", **{"root": root, "batch_size": 4, "seed": 0, "device": "cpu", **options})


def test_cifar_images_keep_their_labels_and_layout(tiny_cifar):
    data = open_cifar(tiny_cifar, augment=False)
    assert (data.train.num_samples, data.eval.num_samples, data.num_classes) == (12, 6, 100)
    assert data.image_shape == (3, 32, 32)
    (test,) = open_cifar(tiny_cifar, eval_batch_size=6).eval.epoch(0)
    raw = pickle.loads((tiny_cifar / "cifar-100-python" / "test").read_bytes())
    expected = torch.from_numpy(raw["data"]).view(6, 3, 32, 32)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = TF.normalize(TF.convert_image_dtype(expected), mean, std)
    torch.testing.assert_close(test.images, expected, rtol=1e-5, atol=1e-6)
    assert test.labels.tolist() == raw["fine_labels"]
    assert open_cifar(tiny_cifar).train.padding == 4
    assert open_cifar(tiny_cifar).train.flip


def test_smaller_images_are_averages_with_shifts_in_proportion(tiny_cifar):
    (test,) = open_cifar(tiny_cifar, eval_batch_size=6, image_size=16).eval.epoch(0)
    raw = pickle.loads((tiny_cifar / "cifar-100-python" / "test").read_bytes())
    pixels = raw["data"].reshape(6, 3, 16, 2, 16, 2).astype(np.float64).mean((3, 5)).round()
    expected = TF.normalize(torch.from_numpy(pixels).float() / 255, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    torch.testing.assert_close(test.images, expected, rtol=1e-5, atol=1e-6)
    data = open_cifar(tiny_cifar, image_size=16)
    assert data.image_shape == (3, 16, 16)
    assert data.train.padding == 2


def assert_one_sentence(error, *told):
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert ". " not in text
    for part in told:
        assert str(part) in text


def test_missing_cifar_says_what_where_and_how(tmp_path):
    with pytest.raises(DataError) as error:
        open_cifar(tmp_path)
    archive = tmp_path / "cifar-100-python.tar.gz"
    assert_one_sentence(error, "lacks train, test, meta", "dataset.download=true", archive)


def test_damaged_cifar_is_named(tiny_cifar):
    with (tiny_cifar / "cifar-100-python" / "test").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError) as error:
        open_cifar(tiny_cifar)
    assert_one_sentence(error, "test in", "is damaged", "dataset.download=true")


def test_failed_download_is_one_sentence(tiny_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
    with pytest.raises(DataError) as error:
        open_cifar(tmp_path / "empty", download=True)
    assert_one_sentence(error, "the download failed", "no route to host", "put the official archive at")


def test_an_archive_put_into_place_is_unpacked_without_a_network(tiny_cifar, tmp_path, monkeypatch):
    root = tmp_path / "other"
    root.mkdir()
    archive = root / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tiny_cifar / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", md5(archive))
    assert open_cifar(root).train.num_samples == 12

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", "0" * 32)
    (root / "cifar-100-python" / "train").unlink()
    with pytest.raises(DataError) as error:
        open_cifar(root)
    assert_one_sentence(error, "lacks train", f"{archive} is not the official archive")


def test_cifar10_constants():
    recipe = RECIPES["cifar10"]
    assert recipe.num_classes == 10
    assert recipe.padding == 4
    assert recipe.flip
    assert recipe.mean == (0.4914, 0.4822, 0.4465)
    assert recipe.std == (0.2470, 0.2435, 0.2616)
