"""Photographs: where they come from, how they are decoded, augmented and dealt out in batches."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from train_support import MEAN, STD, steady, write_folder

from thrifty.data import images as images_module
from thrifty.data.augment import crop_and_flip, normalise
from thrifty.data.images import ImageSet, read_images
from thrifty.data.loader import EvaluationLoader, TrainingLoader, sample, seed_of, split
from thrifty.data.sources import image_folder, load
from thrifty.errors import DataError


def numbered(count: int, size: int = 4) -> ImageSet:
    """Photographs whose pixels and label tell their number."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, size, size, 3).contiguous()
    return ImageSet(torch.arange(count), tuple(map(str, range(count))), range(count), pixels, size=size)


def save(path: Path, width: int, height: int, mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(width * 1000 + height)
    image = Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)
    image.save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------------------ sources


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path):
    root = write_folder(tmp_path, per_class=3)
    found = load("folder", root, "train")
    reference = datasets.ImageFolder(str(root / "train"))
    assert found.classes == tuple(reference.classes) == ("blue", "green", "red")
    assert found.labels.tolist() == reference.targets
    assert (found.size, found.names[0], len(found)) == (8, "blue/000.png", 9)
    for index, (picture, _) in enumerate(reference):
        assert torch.equal(found.pixels[index], torch.from_numpy(np.array(picture)))


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("size", [None, 8, 5, 11])
def test_streaming_gives_what_memory_gives(tmp_path, monkeypatch, kind, size):
    root = write_folder(tmp_path, per_class=4, kind=kind)
    held = image_folder(root / "train", size)
    monkeypatch.setattr(images_module, "MEMORY_LIMIT", 100)
    streamed = image_folder(root / "train", size)
    assert held.pixels is not None
    assert streamed.pixels is None
    assert (streamed.size, streamed.classes, list(streamed.names)) == (held.size, held.classes, list(held.names))
    chosen = torch.tensor([5, 0, 11, 5])
    assert torch.equal(streamed.images(chosen), held.images(chosen))
    for part, expected in zip(split(streamed, 0.25, 0), split(held, 0.25, 0), strict=True):
        assert torch.equal(part.labels, expected.labels)
        assert torch.equal(part.images(torch.arange(len(part))), expected.images(torch.arange(len(part))))
    batches = [list(TrainingLoader(part, 4, MEAN, STD, seed=1).epoch(2)) for part in (streamed, held)]
    for (x, y), (expected_x, expected_y) in zip(*batches, strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["streamed", "held"])
def test_photographs_of_different_sizes_need_a_size(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(images_module, "MEMORY_LIMIT", limit)
    root = write_folder(tmp_path, per_class=2)
    save(root / "train" / "green" / "odd.png", 9, 8)
    with pytest.raises(DataError, match=r"green/odd\.png has 9 x 8 px where 8 x 8 were expected\. Give a size"):
        image_folder(root / "train").images(torch.arange(7))
    assert image_folder(root / "train", 6).images(torch.arange(7)).shape == (7, 6, 6, 3)
    save(root / "train" / "blue" / "000.png", 9, 8)
    with pytest.raises(DataError, match=r"blue/000\.png has 9 x 8 px, which is not square"):
        image_folder(root / "train")


def test_test_and_val_and_plain_directories(tmp_path):
    root = write_folder(tmp_path / "set", per_class=1)
    with pytest.raises(DataError, match="has no test or val directory"):
        load("folder", root, "test")
    (root / "train").rename(root / "val")
    assert len(load("folder", root, "test")) == 3
    with pytest.raises(DataError, match="has no train directory"):
        load("folder", root, "train")
    assert len(load("folder", root / "val", "train")) == 3


def test_missing_and_empty_and_wrong_places(tmp_path):
    for use, says in (
        (lambda: load("folder", tmp_path / "none", "train"), "no directory .*none"),
        (lambda: load("folder", None), "needs a root directory"),
        (lambda: load("imagenet", tmp_path), "no data source 'imagenet'. Choose one of: folder, cifar10"),
        (lambda: load("folder", tmp_path, "validation"), "split is 'validation'"),
        (lambda: load("sample", None, "train"), "test photographs only"),
        (lambda: image_folder(tmp_path), "is not a directory of photographs"),
        (lambda: image_folder(tmp_path / "file"), "is not a directory of photographs"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=says) as found:
            use()
        assert "\n" not in str(found.value)
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="cats"):
        image_folder(tmp_path)


@pytest.mark.parametrize(("source", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar(tmp_path, monkeypatch, source, folder):
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source]
    random = np.random.default_rng(0)
    (tmp_path / folder).mkdir()
    key = "labels" if source == "cifar10" else "fine_labels"
    parts = kind.train_list + kind.test_list
    data = {name: random.integers(0, 255, (2, 3072), dtype=np.uint8) for name, _ in parts}
    for number, (name, pixels) in enumerate(data.items()):
        (tmp_path / folder / name).write_bytes(pickle.dumps({"data": pixels, key: [number, 1]}))
    meta = {kind.meta["key"]: ["aquarium", "bee", "cat", "d", "e", "f", "g"]}
    (tmp_path / folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(kind, "download", lambda self: None)
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    found = load(source, tmp_path, "train")
    assert (len(found), found.size) == (2 * len(kind.train_list), 32)
    assert found.classes[:2] == ("aquarium", "bee")
    assert found.labels.tolist()[:4] == ([0, 1, 1, 1] if source == "cifar10" else [0, 1])
    first = data[kind.train_list[0][0]][0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert torch.equal(found.images(torch.tensor([0]))[0], torch.from_numpy(first.copy()))
    assert len(load(source, tmp_path, "test", 32)) == 2
    with pytest.raises(DataError, match="32 px photographs, 64 px were asked for"):
        load(source, tmp_path, "test", 64)


def test_cifar_that_cannot_be_had(tmp_path, monkeypatch):
    def download(_self):
        raise OSError("no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    with pytest.raises(DataError, match="could it be downloaded: no network"):
        load("cifar10", tmp_path)


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(("width", "height"), [(30, 20), (20, 30), (20, 20), (41, 20), (5, 9), (1, 300)])
def test_the_largest_centred_square_is_resized(tmp_path, width, height):
    path = save(tmp_path / "a.png", width, height)
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    with Image.open(path) as image:
        box = (left, top, left + edge, top + edge)
        expected = np.array(image.resize((10, 10), Image.Resampling.BILINEAR, box))
    assert np.array_equal(read_images([path], 10)[0].numpy(), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "palette with transparency"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode.startswith("palette"):
        save(path, 8, 8, "P", transparency=b"\x00\x80\xff")
    else:
        save(path, 8, 8, mode)
    found = read_images([path], 8)
    assert (found.shape, found.dtype) == ((1, 8, 8, 3), torch.uint8)
    if mode == "L":
        assert torch.equal(found[..., 0], found[..., 2])


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_images([tmp_path / "a.png"], 8)[0, ..., 1].numpy(), values >> 8)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_of_unknown_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="save it with 8 or 16 bits"):
        read_images([tmp_path / "a.tif"], 8)


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_images([tmp_path / "a.png"], 8)[0].numpy(), np.rot90(pixels, -1))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_damaged_files_are_named(tmp_path, kind):
    good, bad = save(tmp_path / f"good.{kind}", 40, 40), save(tmp_path / f"bad.{kind}", 40, 40)
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"bad\.{kind} cannot be read as an image") as found:
        read_images([good, bad], 40)
    assert "\n" not in str(found.value)
    with pytest.raises(DataError, match=r"no file .*gone\.jpg"):
        read_images([good, tmp_path / "gone.jpg"], 40)
    (tmp_path / "text.jpg").write_text("not a photograph")
    with pytest.raises(DataError, match=r"text\.jpg cannot be read"):
        read_images([tmp_path / "text.jpg"], 40)
    assert read_images([], 40).shape == (0, 40, 40, 3)


@steady
@given(st.sampled_from(["png", "jpg"]), st.data())
def test_files_with_changed_bytes_are_read_or_refused(tmp_path_factory, kind, data):
    path = save(tmp_path_factory.mktemp("fuzz") / f"a.{kind}", 12, 12)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_images([path], 12)
    except DataError as error:
        message = str(error)
    else:
        message = f"{path}" if found.shape == (1, 12, 12, 3) else ""
    assert str(path) in message


def test_sets_whose_parts_do_not_match():
    with pytest.raises(DataError, match="2 photographs, 3 labels and 2 names"):
        ImageSet(torch.arange(3), ("a",), ["x", "y"], torch.zeros(2, 4, 4, 3, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------------- augmentation


@steady
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.booleans(), st.integers(0, 99))
def test_crops_and_flips_are_those_of_one_photograph_at_a_time(count, height, width, padding, flip, seed):
    random = np.random.default_rng(seed)
    images = random.integers(1, 255, (count, height, width, 3), dtype=np.uint8)
    before = images.copy()
    generator = torch.Generator().manual_seed(seed)
    found = crop_and_flip(torch.from_numpy(images), padding, flip, generator).numpy()
    assert np.array_equal(images, before)
    generator = torch.Generator().manual_seed(seed)
    top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)[:, 0].tolist()
    left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)[:, 0].tolist()
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5)[:, 0].tolist()
    for index, image in enumerate(images):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = padded[top[index] : top[index] + height, left[index] : left[index] + width]
        expected = crop[:, ::-1] if flip and mirrored[index] else crop
        assert np.array_equal(found[index], expected)


def test_each_photograph_has_its_own_place_and_all_places_occur():
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4, 1).expand(4000, 4, 4, 3)
    found = crop_and_flip(image, 1, True, torch.Generator().manual_seed(0))
    kinds, counts = torch.unique(found[..., 0].reshape(4000, 16), dim=0, return_counts=True)
    assert len(kinds) == 9 * 2
    assert counts.min() > 150  # 222 are expected, with a standard deviation of 14
    assert (found == 0).any()


@steady
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 6))
def test_normalise_against_float64(seed, count, size):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, size, size + 1, 3), dtype=np.uint8)
    mean, std = random.uniform(0, 1, 3), random.uniform(0.05, 1, 3)
    found = normalise(torch.from_numpy(images), mean.tolist(), std.tolist())
    assert (found.dtype, found.shape) == (torch.float32, (count, 3, size, size + 1))
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = ((images.astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert np.abs(found.numpy() - expected).max() <= 4e-7 / std.min()


# ------------------------------------------------------------------------------------------------------------ loaders


def numbers(loader: TrainingLoader, epoch: int, start: int = 0) -> list[list[int]]:
    batches = []
    for x, y in loader.epoch(epoch, start):
        pixel = (x[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(pixel, y), "photographs and labels belong together"
        batches.append(y.tolist())
    return batches


def plain(images: ImageSet, **options) -> TrainingLoader:
    settings = {"batch_size": 6, "mean": (0, 0, 0), "std": (1, 1, 1), "seed": 3, "padding": 0} | options
    return TrainingLoader(images, **settings)


def test_order_is_a_function_of_seed_and_epoch():
    loader = plain(numbered(32))
    first = numbers(loader, 0)
    assert (len(first), len(loader)) == (5, 5)
    flat = [number for batch in first for number in batch]
    assert len(set(flat)) == 30
    assert flat != sorted(flat)
    torch.rand(5)  # the global random state plays no part
    assert numbers(plain(numbered(32)), 0) == first
    assert numbers(loader, 1) != first
    assert numbers(plain(numbered(32), seed=4), 0) != first
    assert numbers(loader, 0, 3) == first[3:]
    assert numbers(loader, 0, 5) == []


def test_starting_within_an_epoch_changes_no_pixel():
    images = ImageSet(torch.arange(20), ("a",) * 20, range(20), torch.randint(0, 255, (20, 6, 6, 3), dtype=torch.uint8))
    loader = plain(images, padding=2)
    whole = list(loader.epoch(1))
    for start in range(len(loader)):
        for (x, y), (expected, labels) in zip(loader.epoch(1, start), whole[start:], strict=True):
            assert torch.equal(x, expected)
            assert torch.equal(y, labels)
    other = list(loader.epoch(2))
    assert not torch.equal(other[0][0], whole[0][0])


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_processes_share_each_batch(world):
    images = ImageSet(torch.arange(20), ("a",) * 20, range(20), torch.randint(0, 255, (20, 6, 6, 3), dtype=torch.uint8))
    whole = list(plain(images, padding=2).epoch(1))
    parts = [list(plain(images, padding=2, rank=rank, world=world).epoch(1)) for rank in range(world)]
    assert all(len(x) == 6 // world for part in parts for x, _ in part)
    for index, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([part[index][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[index][1] for part in parts]), y)


def test_batches_that_do_not_fit():
    with pytest.raises(DataError, match="5 photographs don't fill one batch of 6"):
        plain(numbered(5))
    with pytest.raises(DataError, match="a batch of 6 can't be shared evenly by 4 processes"):
        plain(numbered(8), world=4)


@steady
@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 5))
def test_a_split_is_disjoint_and_complete(count, share, seed):
    held = round(count * share)
    if held == count:
        with pytest.raises(DataError, match="leaves nothing to train on"):
            split(numbered(count), share, seed)
        return
    rest, validation = split(numbered(count), share, seed)
    assert (len(rest), len(validation)) == (count - held, held)
    assert sorted(rest.labels.tolist() + validation.labels.tolist()) == list(range(count))
    for part in (rest, validation):
        assert torch.equal(part.images(torch.arange(len(part)))[:, 0, 0, 0].long(), part.labels)
        assert list(part.names) == part.labels.tolist()


def test_a_split_follows_its_seed():
    first, again, other = (split(numbered(50), 0.3, seed)[1].labels.tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert seed_of("a", 1) == seed_of("a", 1) != seed_of("a", 2)
    assert 0 <= seed_of("a") < 1 << 63


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_evaluation_covers_all_once_in_order(count):
    images = numbered(count)
    loader = EvaluationLoader(images, (0, 0, 0), (1, 1, 1), batch_size=4)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(count))
    assert torch.equal((torch.cat([x for x, _ in batches])[:, 1, 2, 3] * 255).round().long(), images.labels)


def test_an_error_while_loading_ahead_reaches_the_reader_and_ends_the_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MEMORY_LIMIT", 0)
    root = write_folder(tmp_path, per_class=4)
    images = image_folder(root / "train")
    images.paths[0].unlink()
    with pytest.raises(DataError, match="there is no file"):
        list(TrainingLoader(images, 4, MEAN, STD, seed=1).epoch(0))


def test_a_sample_has_all_classes() -> None:
    images = ImageSet(
        torch.arange(600) // 60, tuple("abcdefghij"), [str(i) for i in range(600)], torch.zeros(600, 2, 2, 3).byte()
    )
    few = sample(images, 64)
    assert len(few) == 64
    assert set(few.labels.tolist()) == set(range(10))
    assert sample(images, 64).names == few.names
    assert sorted(sample(images, 1000).names) == sorted(images.names)
