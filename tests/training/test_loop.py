"""The training loop: what it learns, how it resumes, and what it says when it cannot go on."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sidt.errors import InputError
from sidt.training.devices import resolve_device
from sidt.training.evaluation import check_classes, correct, top1
from sidt.training.loop import DivergedError, TrainConfig, finetune, fit

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def toy_model(seed: int = 0, width: int = 8, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, classes))
    model.num_classes = classes
    return model


class Toy(Dataset):
    """Three classes told apart by the brightest channel, with noise drawn anew every time."""

    classes = ("red", "green", "blue")

    def __init__(self, count: int = 60):
        self.count, self.reads, self.stop_at = count, 0, math.inf

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > self.stop_at:
            raise KeyboardInterrupt
        image = 0.3 * torch.randn(3, 2, 2)
        image[index % 3] += 1
        return image, index % 3


def quick(**options) -> TrainConfig:
    return TrainConfig(**{"epochs": 4, "batch_size": 16, "lr": 0.02, "device": "cpu", **options})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def without_time(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def test_it_learns_and_tells_how():
    model, data = toy_model(), Toy()
    assert top1(model, data, device="cpu") < 0.9
    history = fit(model, data, quick(epochs=6), val=Toy(30))
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert set(history[0]) == {"epoch", "loss", "lr", "top1", "seconds"}
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["top1"] > 0.9
    assert top1(model, data, device="cpu") > 0.9
    assert model.training and "forward" not in model.__dict__


def test_it_says_what_it_costs_before_it_begins(capsys):
    class Stop(Toy):
        def __getitem__(self, index):
            raise RuntimeError("no image was to be read yet")

    with pytest.raises(RuntimeError, match="no image"):
        fit(toy_model(), Stop(), quick(), label="fine-tune")
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "fine-tune: 4 epochs x 3 steps of 16, 60 images, 0.00 M parameters, on cpu"


def test_results_depend_on_the_seed_alone_and_leave_the_random_state_alone():
    runs = []
    for seed, workers in ((0, 0), (0, 2), (1, 0)):
        model = toy_model()
        torch.manual_seed(1000 + workers)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        fit(model, Toy(), quick(epochs=2, seed=seed, workers=workers))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()
        runs.append(weights(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("epochs", [1, 2, 10])
@pytest.mark.parametrize("sched", ["cosine", "constant"])
def test_the_learning_rate_warms_up_and_falls_to_almost_nothing(epochs, sched):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sidt.training.loop.create_optimizer_v2",
            lambda model, opt, lr, **_: Watched(model.parameters(), lr=lr),
        )
        fit(toy_model(), Toy(160), quick(epochs=epochs, sched=sched, warmup_epochs=1.0))
    peak = int(np.argmax(rates))
    assert len(rates) == 10 * epochs
    assert rates[0] == pytest.approx(0.02 / 100) and 0.85 * 0.02 < rates[peak] <= 0.02
    assert peak == min(10, 10 * epochs // 4) and rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[-1] < (0.02 * 0.11 if sched == "cosine" else 0.021)
    assert sched == "cosine" or rates[-1] == 0.02


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9},
        {"mixup": 0.4, "cutmix": 1.0},
        {"precision": "bf16"},
        {"opt": "sgd", "clip_grad": None},
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, options):
    config = quick(**options)
    whole, history = toy_model(), None
    history = fit(whole, Toy(), config, val=Toy(12))

    data = Toy()
    data.stop_at = 60 + 20  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        fit(toy_model(), data, config, val=Toy(12), folder=tmp_path)
    assert len(json.loads((tmp_path / "training.json").read_text())["history"]) == 1

    data.stop_at = math.inf
    resumed = toy_model()
    again = fit(resumed, data, config, val=Toy(12), folder=tmp_path)
    assert torch.equal(weights(resumed), weights(whole))
    assert without_time(again) == without_time(history)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "training-4.pt",
        "training-4.safetensors",
        "training.json",
    ]

    finished, reads = toy_model(), data.reads
    assert fit(finished, data, config, val=Toy(12), folder=tmp_path) == again
    assert data.reads == reads
    assert torch.equal(weights(finished), weights(whole))


def test_a_folder_belongs_to_one_run(tmp_path):
    fit(toy_model(), Toy(), quick(epochs=1), folder=tmp_path)
    for model, data, config, loss, named in (
        (toy_model(), Toy(), quick(epochs=1, lr=0.01), None, "its lr is 0.02, here 0.01"),
        (toy_model(width=9), Toy(), quick(epochs=1), None, "model is"),
        (toy_model(seed=5), Toy(), quick(epochs=1), None, "starting weights is"),
        (toy_model(), Toy(59), quick(epochs=1), None, "training data is '60 samples"),
        (toy_model(), Toy(), quick(epochs=1), lambda *_: torch.zeros(()), "loss is 'cross entropy', here"),
    ):
        with pytest.raises(InputError, match=named) as error:
            fit(model, data, config, folder=tmp_path, loss=loss)
        assert f"remove {tmp_path} or choose another folder" in str(error.value)
    fit(toy_model(), Toy(), quick(epochs=1, workers=1), folder=tmp_path)  # the same result: no other run


@pytest.mark.parametrize("name", ["training-1.pt", "training-1.safetensors", "training.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_state_is_told(tmp_path, name, damage):
    fit(toy_model(), Toy(), quick(epochs=1), folder=tmp_path)
    if damage == "cut":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    elif name != "training.json":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text("[]")
    with pytest.raises(InputError) as error:
        fit(toy_model(), Toy(), quick(epochs=1), folder=tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_state_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    fit(toy_model(), Toy(), quick(epochs=1), folder=tmp_path)
    torch.save({"optimizer": Evil()}, tmp_path / "training-1.pt")
    with pytest.raises(InputError, match="damaged") as error:
        fit(toy_model(), Toy(), quick(epochs=1), folder=tmp_path)
    assert "\n" not in str(error.value)


def test_a_diverging_loss_names_the_step_and_leaves_the_last_state(tmp_path):
    calls = []

    def loss(model, images, targets):
        calls.append(1)
        good = nn.functional.cross_entropy(model(images), targets)
        return good * float("nan") if len(calls) == 5 else good

    with pytest.raises(DivergedError, match=r"loss is nan at epoch 2, step 2, with lr 0\.0.*smaller lr"):
        fit(toy_model(), Toy(), quick(), loss=loss, folder=tmp_path)
    assert len(json.loads((tmp_path / "training.json").read_text())["history"]) == 1
    assert issubclass(DivergedError, InputError)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    calls = []

    def loss(model, images, targets):
        calls.append(1)
        value = nn.functional.cross_entropy(model(images), targets)
        if len(calls) == 3:  # the last step: a finite loss with a gradient that is not
            first = next(model.parameters())
            return value + 0 * (first - first.detach()).sum().sqrt()
        return value

    with pytest.raises(DivergedError, match="weights are not finite at epoch 1, step 3"):
        fit(toy_model(), Toy(), quick(epochs=1), loss=loss, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_ema_ends_with_the_averaged_weights():
    plain, averaged, slow = toy_model(), toy_model(), toy_model()
    start = weights(plain)
    fit(plain, Toy(), quick())
    fit(averaged, Toy(), quick(ema=1e-6))  # the average over one step: the weights themselves
    fit(slow, Toy(), quick(ema=0.99))
    assert torch.allclose(weights(averaged), weights(plain), atol=1e-5)
    assert 0 < (weights(slow) - start).norm() < (weights(plain) - start).norm()


def test_mixup_and_cutmix_give_soft_targets_to_the_loss():
    seen = []

    def loss(model, images, targets):
        seen.append(targets)
        return nn.functional.cross_entropy(model(images), targets)

    fit(toy_model(), Toy(), quick(epochs=1, mixup=1.0, cutmix=1.0, smoothing=0.0), loss=loss)
    targets = torch.cat(seen)
    assert targets.shape == (48, 3) and torch.allclose(targets.sum(1), torch.ones(48))
    assert (targets.max(1).values < 0.99).any()
    fit(toy_model(), Toy(7), quick(epochs=1, mixup=1.0))  # fewer than a batch, and odd
    with pytest.raises(ValidationError, match="even batch_size, not 5"):
        quick(mixup=1.0, batch_size=5)


def test_mixup_needs_the_number_of_classes():
    model = toy_model()
    del model.num_classes
    data = TensorDataset(torch.randn(16, 3, 2, 2), torch.zeros(16, dtype=torch.long))
    with pytest.raises(InputError, match="num_classes"):
        fit(model, data, quick(mixup=0.5))


def test_smoothing_raises_the_least_possible_loss():
    sharp, smooth = (fit(toy_model(), Toy(), quick(epochs=6, smoothing=s))[-1]["loss"] for s in (0.0, 0.3))
    assert smooth > sharp + 0.1


def test_a_model_with_several_heads():
    class Heads(nn.Module):
        def __init__(self, good):
            super().__init__()
            self.good, self.one, self.two = good, toy_model(1), toy_model(2)

        def forward(self, images):
            return self.one(images), self.two(images)

    model = Heads(True)
    fit(model, Toy(), quick(epochs=6))
    assert top1(model, Toy(), device="cpu") > 0.9
    assert top1(model.one, Toy(), device="cpu") > 0.8 and top1(model.two, Toy(), device="cpu") > 0.8


def test_a_timm_vit_trains():
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=2
    )
    data = TensorDataset(torch.cat([torch.zeros(8, 3, 8, 8), torch.ones(8, 3, 8, 8)]), torch.arange(16) // 8)
    fit(model, data, quick(epochs=6, batch_size=8))
    assert top1(model, data, device="cpu") == 1.0


def test_class_counts_must_agree():
    with pytest.raises(InputError, match="the model has 4 classes and the data has 3"):
        fit(toy_model(classes=4), Toy(), quick())
    with pytest.raises(InputError, match="the model has 2 classes and the data has 3"):
        top1(toy_model(classes=2), Toy(), device="cpu")
    check_classes(toy_model(classes=3), 3)
    check_classes(nn.Identity(), 3)


def test_an_empty_data_set():
    with pytest.raises(InputError, match="empty"):
        fit(toy_model(), Toy(0), quick())
    with pytest.raises(InputError, match="empty"):
        correct(toy_model(), Toy(0), device="cpu")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=rf"device is '{name}', but torch sees 0 CUDA devices; use"):
            fit(toy_model(), Toy(), quick(device=name))
    with pytest.raises(InputError, match="device is 'mps'"):
        resolve_device("mps")
    with pytest.raises(InputError, match="device is 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="'fp16', which needs a CUDA device"):
        fit(toy_model(), Toy(), quick(precision="fp16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(InputError, match="'cuda:1', but torch sees 1 CUDA"):
        resolve_device("cuda:1")


def test_precisions_follow_each_other_and_an_outer_accelerator_stays():
    AcceleratorState._reset_state(reset_partial_state=True)
    outer = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        for precision in ("no", "bf16", "no"):
            model = toy_model()
            fit(model, Toy(), quick(epochs=1, precision=precision))
            assert weights(model).dtype == torch.float32 and "forward" not in model.__dict__
            assert model(torch.zeros(1, 3, 2, 2)).dtype == torch.float32
        assert outer.mixed_precision == "bf16" and outer.state.num_processes == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    fit(toy_model(), Toy(), quick(epochs=1))
    assert not PartialState._shared_state


def test_no_epochs_change_nothing():
    model = toy_model()
    assert fit(model, Toy(), quick(epochs=0)) == []
    assert torch.equal(weights(model), weights(toy_model()))


def test_finetune_takes_options_and_names_bad_ones(tmp_path):
    model = toy_model()
    history = finetune(model, Toy(), epochs=2, batch_size=16, device="cpu", val=Toy(12), folder=tmp_path)
    assert len(history) == 2 and "top1" in history[0] and not torch.equal(weights(model), weights(toy_model()))
    for options, said in (
        ({"learning_rate": 1}, "no option 'learning_rate'; it has epochs, batch_size, lr"),
        ({"lr": -1}, "option lr=-1: Input should be greater than 0"),
        ({"opt": "adamq"}, "option opt='adamq': timm has no such optimiser"),
        ({"mixup": 1, "batch_size": 3}, "even batch_size, not 3"),
    ):
        with pytest.raises(InputError, match=said) as error:
            finetune(model, Toy(), **options)
        assert "\n" not in str(error.value)


def test_what_is_no_data_set_is_refused(refused):
    """A loader gives batches; it would be read as a data set whose samples are batches."""
    loader, data = DataLoader(Toy(), 4), Toy()
    for wrong, said in ((loader, "DataLoader"), (iter(data), "without a length"), (7, "int")):
        with refused(said, "data set"):
            finetune(toy_model(), wrong, epochs=1)
        with refused(said, "data set"):
            finetune(toy_model(), data, epochs=1, val=wrong)
        with refused(said, "data set"):
            correct(toy_model(), wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1},
        {"batch_size": 0},
        {"lr": math.inf},
        {"lr": 0},
        {"ema": 1.0},
        {"device": "gpu"},
        {"typo": 1},
    ],
    ids=str,
)
def test_configs_are_validated(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        TrainConfig(**options)
