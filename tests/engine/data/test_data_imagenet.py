"""ImageFolder trees: crops derive from (seed, epoch, index), whatever the workers, processes and resumes."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from engine.data import DataError, create_data, imagenet
from engine.data.imagenet import MEAN, STD, decode, random_resized_crop

SIZE = 24


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """3 classes x (5 training + 2 validation) JPEGs of different shapes; the name of a file holds its class."""
    root, rng = tmp_path_factory.mktemp("tree"), np.random.RandomState(0)
    for split, n in (("train", 5), ("val", 2)):
        for c, name in enumerate(("cat", "dog", "hen")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                small = rng.randint(0, 60, (5, 5, 3)) + np.array([60 * c + 20, 100, 200 - 60 * c])
                image = Image.fromarray(small.astype(np.uint8)).resize((40 + 7 * i, 60 - 5 * i))
                image = image.convert("L") if (c, i) == (1, 1) else image  # ImageNet has grey images too
                image.save(root / split / name / f"{name}_{i}.JPEG")
    return root


def open_tree(root, **options):
    options = {"batch_size": 4, "seed": 0, "device": "cpu", "image_size": SIZE, **options}
    return create_data("imagenet", root=root, **options)


def assert_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.global_size == b.global_size


def test_sizes_shapes_and_labels(tree):
    data = open_tree(tree)
    assert (data.train.num_samples, len(data.train), data.eval.num_samples, len(data.eval)) == (15, 4, 6, 2)
    assert (data.num_classes, data.image_shape, data.eval_split) == (3, (3, SIZE, SIZE), "test")
    batches = list(data.train.epoch(0))
    assert [len(batch.images) for batch in batches] == [batch.global_size for batch in batches] == [4, 4, 4, 3]
    assert batches[0].images.dtype == torch.float32
    assert batches[0].images.shape[1:] == data.image_shape
    assert torch.bincount(torch.cat([batch.labels for batch in batches])).tolist() == [5, 5, 5]
    red_minus_blue = torch.cat([b.images[:, 0].mean((1, 2)) - b.images[:, 2].mean((1, 2)) for b in batches])
    by_class = [red_minus_blue[torch.cat([b.labels for b in batches]) == c].mean() for c in range(3)]
    assert by_class[0] < by_class[2]  # the colour of a class goes with its label
    assert open_tree(tree, image_size=None).image_shape == (3, 224, 224)


def test_worker_processes_change_nothing_over_epochs_and_interruptions(tree):
    with_workers, without = open_tree(tree, workers=2).train, open_tree(tree).train
    state = torch.get_rng_state()
    first = list(with_workers.epoch(0))
    assert torch.equal(state, torch.get_rng_state())
    assert_same(first, without.epoch(0))
    next(with_workers.epoch(3))  # left in the middle
    assert_same(with_workers.epoch(1), without.epoch(1))
    assert not torch.equal(first[0].images, next(without.epoch(1)).images)
    assert not torch.equal(first[0].images, next(open_tree(tree, seed=1).train.epoch(0)).images)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(tree, world_size):
    ranks = [open_tree(tree, rank=rank, world_size=world_size) for rank in range(world_size)]
    for split in ("train", "eval"):
        parts = [getattr(data, split).epoch(1) for data in ranks]
        for whole, *shares in zip(getattr(open_tree(tree), split).epoch(1), *parts, strict=True):
            assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
            assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
            assert {share.global_size for share in shares} == {whole.global_size}


def test_a_resumed_epoch_decodes_its_tail_alone(tree, monkeypatch):
    loader = open_tree(tree).train
    whole = list(loader.epoch(2))
    opened = []
    monkeypatch.setattr(imagenet, "decode", lambda content: opened.append(content) or decode(content))
    assert_same(loader.epoch(2, start_step=2), whole[2:])
    assert len(opened) == 7


def test_evaluation_equals_torchvision(tree):
    data = open_tree(tree, eval_batch_size=6)
    (batch,) = data.eval.epoch(0)
    reference = transforms.Compose(
        [
            transforms.Resize(round(SIZE * 256 / 224)),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    files = sorted((tree / "val").rglob("*.JPEG"))
    expected = torch.stack([reference(Image.open(file).convert("RGB")) for file in files])
    torch.testing.assert_close(batch.images, expected, rtol=1e-5, atol=1e-5)
    assert batch.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_random_resized_crop_follows_the_law_of_torchvisions():
    """Area shares and aspect ratios of the crop, read off an image whose pixels hold their coordinates."""
    y, x = np.mgrid[0:200, 0:250]
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))
    areas, mirrored = [], 0
    for i in range(400):
        pixels = np.asarray(random_resized_crop(image, 32, random.Random(i))).astype(int)
        assert pixels.shape == (32, 32, 3)
        width, height = (
            np.abs(pixels[0, -1, 0] - pixels[0, 0, 0]) * 32 / 31,
            (pixels[-1, 0, 1] - pixels[0, 0, 1]) * 32 / 31,
        )
        areas.append(width * height / (200 * 250))
        mirrored += pixels[0, 0, 0] > pixels[0, -1, 0]
        assert 0.7 < width / height < 1.43
    reference = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(400)]
    assert np.mean(areas) == pytest.approx(np.mean([h * w for h, w in reference]) / (200 * 250), abs=0.06)
    assert 0.05 < min(areas) < 0.2
    assert max(areas) > 0.8
    assert 150 < mirrored < 250


def test_random_resized_crop_of_an_extreme_shape_is_central():
    assert random_resized_crop(Image.new("RGB", (600, 3)), 8, random.Random(0)).size == (8, 8)


def test_validation_is_disjoint_and_stratified(tree):
    data = open_tree(tree, validation=0.4)
    assert data.eval_split == "validation"
    assert (data.train.num_samples, data.eval.num_samples) == (9, 6)
    train, held_out = (set(loader.dataset.tree.files.tolist()) for loader in (data.train, data.eval))
    assert not train & held_out
    assert torch.bincount(torch.cat([batch.labels for batch in data.eval.epoch(0)])).tolist() == [2, 2, 2]


def test_channels_last(tree):
    data, plain = open_tree(tree), next(open_tree(tree).train.epoch(0))
    data.lay_out(torch.channels_last)
    batch = next(data.train.epoch(0))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images, plain.images)


@pytest.fixture
def own_tree(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / split / name / "1.JPEG")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "not an image"])
def test_a_corrupt_jpeg_is_named_in_one_sentence(own_tree, workers, damage):
    path = own_tree / "train" / "dog" / "1.JPEG"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"GIF or so")
    with pytest.raises(DataError) as error:
        list(open_tree(own_tree, batch_size=1, workers=workers).train.epoch(0))
    text = str(error.value)
    assert str(path) in text
    assert "not a readable image" in text
    assert "\n" not in text
    assert "Traceback" not in text


def remove(path):
    for child in path.iterdir() if path.is_dir() else ():
        remove(child)
    path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        ("", "train does not exist: dataset.root must hold train/ and val/"),
        ("train", "train does not exist"),
        ("val", "val does not exist"),
        ("train/dog/1.JPEG", "train has no images in one folder per class"),
        ("val/dog", "must have the same classes, but dog"),
    ],
)
def test_an_incomplete_tree_is_one_sentence(own_tree, removed, told):
    remove(own_tree / removed)
    with pytest.raises(DataError, match=told) as error:
        open_tree(own_tree)
    assert "\n" not in str(error.value)


def test_empty_folders_and_downloads_are_refused(own_tree):
    for name in ("cat", "dog"):
        remove(own_tree / "train" / name)
    with pytest.raises(DataError, match="train has no images"):
        open_tree(own_tree)
    with pytest.raises(DataError, match="cannot be downloaded"):
        open_tree(own_tree, download=True)


@pytest.mark.parametrize(  # PNG knows no CMYK
    ("form", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L")]
)
@pytest.mark.parametrize("size", [(1, 1), (17, 5), (40, 60)])
def test_images_are_decoded_to_pillows_bits(mode, form, size):
    content = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(content, form, quality=80)
    assert np.array_equal(decode(content.getvalue()), Image.open(content).convert("RGB"))
