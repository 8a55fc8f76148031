"""The helpers of common.py, each against an oracle: plain torchvision, numpy or the closed formula."""
import io
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import make_dataset, script
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, models, transforms

import common


def lecture_format(image):
    """The lecture's transform, from Pillow and numpy alone."""
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    normal = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(normal.transpose(2, 0, 1))


def test_imagenet_format():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    assert torch.allclose(common.imagenet_format(image), lecture_format(image), atol=1e-6)


def test_imshow_undoes_the_normalization():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    plt.figure()
    common.imshow(common.imagenet_format(image), "a $title")
    shown = plt.gca().get_images()[0].get_array()
    assert np.allclose(shown, np.asarray(image) / 255, atol=1e-6)
    assert plt.gca().get_title() == "a $title"
    common.imshow(common.imagenet_format(image), ["cats", "dogs"])  # as the lecture does
    assert plt.gca().get_title() == "['cats', 'dogs']"
    plt.close()


def test_vgg16_is_torchvisions(vgg_file):
    oracle = models.vgg16()
    oracle.load_state_dict(torch.load(vgg_file, weights_only=True))
    model = common.load_vgg16("imagenet")
    inputs = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(model.eval()(inputs), oracle.eval()(inputs))
    assert all(param.requires_grad for param in model.parameters())


def test_untrained_is_always_the_same_and_leaves_no_meta_tensor():
    one, two = common.load_vgg16("untrained"), common.load_vgg16("untrained")
    assert common.weights_hash(one) == common.weights_hash(two)
    assert one.features[0].weight.std() > 0


def test_freeze_and_replace_head(vgg):
    trainable = {name: param.numel() for name, param in vgg.named_parameters() if param.requires_grad}
    assert trainable == {"classifier.6.weight": 2 * 4096, "classifier.6.bias": 2}
    with torch.inference_mode():
        outputs = vgg(torch.randn(1, 3, 224, 224))
    assert outputs.shape == (1, 2) and torch.allclose(outputs.exp().sum(), torch.tensor(1.0))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2), nn.LogSoftmax(dim=1))


def small_data(n=37):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def test_train_model_returns_the_mean_loss_per_image(capsys):
    """37 images in batches of 10: a mean of batch means would weigh the last 7 images too much."""
    model, data = small_model(), small_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    history = common.train_model(model, DataLoader(data, batch_size=10), optimizer, 2)
    outputs = model(data.tensors[0])
    loss = nn.functional.nll_loss(outputs, data.tensors[1]).item()
    accuracy = (outputs.argmax(1) == data.tensors[1]).float().mean().item()
    assert history == [pytest.approx((loss, accuracy), abs=1e-6)] * 2
    assert "epoch  1/2" in capsys.readouterr().out


def test_train_model_learns():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    history = common.train_model(model, DataLoader(small_data(), batch_size=10, shuffle=True), optimizer, 20)
    assert history[-1][0] < 0.5 * history[0][0] and history[-1][1] > 0.9


def test_train_model_is_sgd_to_the_last_bit():
    model, oracle, data = small_model(), small_model(), small_data()
    common.train_model(model, DataLoader(data, batch_size=10), torch.optim.SGD(model.parameters(), lr=0.1), 3)
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1)
    for _ in range(3):
        for inputs, classes in DataLoader(data, batch_size=10):
            optimizer.zero_grad()
            nn.NLLLoss()(oracle(inputs), classes).backward()
            optimizer.step()
    assert torch.equal(model[0].weight, oracle[0].weight)


def test_test_model_against_numpy():
    model, data = nn.Sequential(nn.Dropout(0.9), *small_model()), small_data()  # dropout must be off
    predictions, all_proba, all_classes, loss, accuracy = common.test_model(model, DataLoader(data, batch_size=10))
    logits = (data.tensors[0] @ model[1].weight.T + model[1].bias).detach().numpy()
    proba = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classes = data.tensors[1].numpy()
    assert np.allclose(all_proba, proba, atol=1e-6) and np.array_equal(predictions, proba.argmax(axis=1))
    assert np.array_equal(all_classes, classes)
    assert loss == pytest.approx(-np.log(proba[np.arange(37), classes]).mean(), abs=1e-6)
    assert accuracy == pytest.approx((proba.argmax(axis=1) == classes).mean())
    assert (predictions.dtype, all_proba.dtype, all_classes.dtype) == (np.int64, np.float32, np.int64)


def test_bfloat16_keeps_the_head_in_float32(vgg):
    inputs = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = vgg(inputs).exp()
        common.to_device(vgg, torch.device("cpu"), bf16=True)
        close = vgg(inputs.bfloat16()).exp()
    assert close.dtype == torch.float32 and vgg.classifier[6].weight.dtype == torch.float32
    assert 0 < (close - exact).abs().max() < 0.01  # 0.0004 when measured


def test_progress_hands_on_every_batch(capsys):
    batches = [("inputs", [0, 1]), ("inputs", [1])]
    assert list(common.progress(batches, 2)) == batches
    assert capsys.readouterr().err == ""  # quick work says nothing


def test_progress_in_a_log_is_a_few_lines(monkeypatch, capsys):
    clock = iter(range(0, 100_000, 10))  # ten seconds a batch
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    list(common.progress([("inputs", [0] * 5)] * 100, 100))
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 6
    assert lines[0].split() == ["3%,", "15", "images,", "0.5", "images/s,", "0:16:10", "left"]


@pytest.mark.parametrize("text, fits", [("0", True), ("1e-9", True), ("-1", False), ("nan", False), ("inf", False)])
def test_numbers_out_of_range_are_wrong_options(monkeypatch, capsys, text, fits):
    parser = common.option_parser("doc")
    parser.add_argument("--lr", type=float)
    monkeypatch.setattr(sys, "argv", ["03", "--sample", "--lr", text])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    if fits:
        assert common.parse_options(parser).lr == float(text)
    else:
        with pytest.raises(SystemExit):
            common.parse_options(parser)
        assert "argument --lr: " in capsys.readouterr().err


def test_without_a_terminal(monkeypatch):
    """IDLE's and a notebook's stdout is no real file, and there may be no stdin at all."""
    monkeypatch.setattr(sys, "argv", ["03", "--sample"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stdin", None)
    assert common.parse_options(common.option_parser("doc")).data_dir == common.HERE / "sample"
    common.banner("a heading", 1175, pause=True)
    assert "video from 0:19:35, https://youtu.be/ZhC-DIrCe6A?t=1175" in sys.stdout.getvalue()


def test_sample_of_the_dataset_goes_before_the_bundled_one(monkeypatch, tmp_path):
    (tmp_path / "sample").mkdir()
    monkeypatch.setattr(sys, "argv", ["01", "--sample", "--data-dir", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    assert common.parse_options(common.option_parser("doc")).data_dir == tmp_path / "sample"


def test_get_device():
    assert common.get_device("cpu", bf16=True) == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(common.UserError, match="--device cuda"):
            common.get_device("cuda")


def test_workers_for_the_machine():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert common.loader_options(24, None, cpu)["num_workers"] == 0
    assert common.loader_options(23_000, None, cpu)["num_workers"] == 1
    assert 1 <= common.loader_options(23_000, None, cuda)["num_workers"] <= (common.os.cpu_count() or 1)
    assert common.loader_options(23_000, 3, cpu)["num_workers"] == 3


def test_order_is_imagefolders(tmp_path):
    """Features and predictions go by the order of sorted paths: cat.10 before cat.2."""
    make_dataset(tmp_path, train=11, valid=1)
    dset = datasets.ImageFolder(tmp_path / "train")
    names = [common.os.path.basename(path) for path, _ in dset.imgs]
    assert names[:4] == ["cat.0.jpg", "cat.1.jpg", "cat.10.jpg", "cat.2.jpg"]
    assert dset.classes == common.CLASSES


def test_files_hash_sees_names_sizes_and_times(dataset):
    def digest():
        return common.files_hash(datasets.ImageFolder(dataset / "train"))

    before, path = digest(), dataset / "train" / "cats" / "cat.0.jpg"
    assert digest() == before
    path.rename(path.with_name("cat.00.jpg"))
    renamed = digest()
    (dataset / "train" / "dogs" / "dog.0.jpg").touch()
    assert len({before, renamed, digest()}) == 3


def test_zero_shot_sums_against_numpy():
    outputs = np.random.default_rng(0).normal(0, 4, (6, 1000))
    probs = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    expected = np.stack([probs[:, 281:286].sum(1), probs[:, 151:269].sum(1)], axis=1)
    sums = script("02_vgg_imagenet").cat_and_dog_sums(torch.from_numpy(outputs)).numpy()
    assert np.allclose(sums[:, :2], expected) and np.allclose(sums.sum(axis=1), 1)


def test_zero_shot_classes_are_the_cats_and_dogs():
    names, two = common.IMAGENET.meta["categories"], script("02_vgg_imagenet")
    assert names[two.CATS] == ["tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"]
    dogs = names[two.DOGS]
    assert (len(dogs), dogs[0], dogs[-1]) == (118, "Chihuahua", "Mexican hairless")
    assert names[two.DOGS.start - 1] == "sea lion" and names[two.DOGS.stop] == "timber wolf"
    assert names[two.CATS.stop] == "cougar"


def test_the_sample_pictures_are_the_scripts_own(tmp_path):
    """tests/draw_sample.py draws what is in sample/: same names and, but for the JPEG encoder, the same pixels."""
    script("draw_sample").main(tmp_path)
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg"))
    assert drawn == sorted(path.relative_to(common.HERE / "sample") for path in (common.HERE / "sample").rglob("*.jpg"))
    assert len(drawn) == 24
    for path in drawn:
        assert (common.HERE / "sample" / path).stat().st_size < 25_000
        ours, theirs = (np.asarray(Image.open(folder / path), dtype=float) for folder in (common.HERE / "sample", tmp_path))
        assert np.abs(ours - theirs).mean() < 3


def test_transforms_are_the_contracts():
    kinds = [type(step) for step in common.imagenet_format.transforms]
    assert kinds == [transforms.CenterCrop, transforms.ToTensor, transforms.Normalize]
