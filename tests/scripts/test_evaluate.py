"""The evaluation loop and the command that uses it."""

import json

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from engine.evaluate import evaluate
from scripts import evaluate as command


def batches(images, labels, size):
    return [(images[i : i + size], labels[i : i + size], size) for i in range(0, len(labels), size)]


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 5, (10,), generator=generator)
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)), images, labels


def test_loss_and_accuracy_are_those_of_the_whole_set(problem):
    model, images, labels = problem
    model[1].eval()
    loss, top1 = evaluate(model, batches(images, labels, 4))  # the last batch is smaller
    assert [module.training for module in model] == [True, False, True, True]
    with torch.no_grad():
        logits = model.eval()(images)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert top1 == 100 * (logits.argmax(1) == labels).sum().item() / 10


def test_memory_format_and_autocast(problem):
    model, images, labels = problem
    plain = evaluate(model, batches(images, labels, 5))
    last = model.to(memory_format=torch.channels_last)
    moved = images.contiguous(memory_format=torch.channels_last)
    assert evaluate(last, batches(moved, labels, 5)) == pytest.approx(plain, rel=1e-5)
    loss, _ = evaluate(last, batches(moved, labels, 5), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert loss != plain[0]
    assert loss == pytest.approx(plain[0], rel=0.02)


def test_shares_of_two_processes_add_up(problem):
    model, images, labels = problem
    shares = []
    evaluate(model, batches(images[:7], labels[:7], 4), reduce=lambda sums: shares.append(sums) or sums)
    both = evaluate(model, batches(images[7:], labels[7:], 4), reduce=lambda sums: sums + shares[0])
    assert both == pytest.approx(evaluate(model, batches(images, labels, 4)))
    empty = evaluate(model, [], reduce=lambda sums: sums + shares[0])
    assert empty == pytest.approx(evaluate(model, batches(images[:7], labels[:7], 4)))


def test_one_wait_for_the_device(problem, monkeypatch):
    model, images, labels = problem
    waits = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() waits for the device"))
    evaluate(model, batches(images, labels, 2))
    assert len(waits) == 1


def test_no_images_are_refused(problem):
    with pytest.raises(ValueError, match="no images"):
        evaluate(problem[0], [])


@pytest.fixture
def run(tmp_path):
    """A run directory with half of a ResNet-20's last layer pruned."""
    from safetensors.torch import save_file

    from models import create_model

    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10)
    name, classifier = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        classifier.weight[:5].zero_()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    config = {
        "model": {"name": "resnet20", "pretrained": False, "weights": None, "options": {}},
        "dataset": {"name": "digits", "root": "data", "validation": 0.0},
        "trainer": {"batch_size": 64, "eval_batch_size": 100, "precision": "fp32"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path, f"{name}.weight", classifier.weight.numel()


def test_run_directory_and_bare_file_agree(run, capsys):
    directory, _, classifier_size = run
    assert command.main([str(directory), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prunable"], found["prunable"] - found["nonzeros"]) == (1_092_960 - 90 * 128, classifier_size // 2)
    assert found["dense_flops"] - found["flops"] == classifier_size // 2
    assert 0 <= found["top1"] <= 100
    bare = [str(directory / "model.safetensors"), "--model", "resnet20", "--dataset", "digits", "--device", "cpu"]
    assert command.main(bare) == 0
    printed = capsys.readouterr().out
    assert f"{found['top1']:.2f} %" in printed
    assert f"{found['nonzeros']:,} of 1,081,440" in printed


def test_finished_run_counts_its_own_prunable_weights(run, capsys):
    directory, name, size = run
    result = {"precision": "fp32", "layers": [{"name": name, "size": size, "zeros": size // 2}]}
    (directory / "result.json").write_text(json.dumps(result))
    assert command.main([str(directory), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prunable"], found["sparsity"]) == (size, 0.5)


def refused(capsys, *arguments):
    assert command.main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert len(told.err.splitlines()) == 1
    return told.err


def test_errors_are_one_sentence(run, tmp_path, capsys):
    directory, *_ = run
    model = directory / "model.safetensors"
    assert "does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "add --model and --dataset" in refused(capsys, model)
    assert "is no model" in refused(capsys, directory / "config.yaml")
    named = ["--dataset", "digits", "--model"]
    assert "Unknown model" in refused(capsys, model, *named, "resnet_20x")
    assert "does not fit" in refused(capsys, model, *named, "mobilenet_v1")
    assert "10 classes" in refused(capsys, model, *named, "resnet20", "--num-classes", 4)
    assert "--num-classes" in refused(capsys, model, *named, "resnet20", "--num-classes", 12)
    assert "Unknown data set" in refused(capsys, directory, "--dataset", "digit")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "cifar" in refused(capsys, directory, "--dataset", "cifar10", "--root", empty).lower()
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(capsys, directory, "--device", "cuda")
    (directory / "config.yaml").write_text("model: 3")
    assert "damaged" in refused(capsys, directory)
    model.write_bytes(b"nonsense")
    assert "not a readable" in refused(capsys, model, *named, "resnet20")
    model.unlink()
    assert "has no model.safetensors" in refused(capsys, directory)
