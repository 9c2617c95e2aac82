"""The teacher's loss: what it adds, by hand and on real blocks, and that it leaves both models as they were."""

import copy
import math

import pytest
import timm
import torch
import yaml
from backbones import DISTILLED, PVT, SWIN, VIT_TINY, dense, random_plan, shake
from click.testing import CliRunner
from pydantic import ValidationError
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import TensorDataset

import sidt
from sidt.cli.commands import cli
from sidt.export.checkpoint import save
from sidt.space.outputs import heads_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model
from sidt.training.distillation import TeacherConfig, dissimilarity, distillation_loss, divergence
from sidt.training.loop import TrainConfig, finetune, fit

FAMILIES = pytest.mark.parametrize("backbone", [VIT_TINY, SWIN, PVT], ids=str)
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
NAME = "deit_tiny_patch16_224"


def tiny(**options) -> nn.Module:
    torch.manual_seed(0)
    return shake(timm.create_model(NAME, **TINY | options))


def sliced(model: nn.Module) -> nn.Module:
    return slice_model(model, DimensionPlan(space_for(model), {"hidden.0": range(20), "heads.1": [1]}))


def toy(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 3)


def quick(**options) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "lr": 1e-3, "smoothing": 0.0, "device": "cpu", **options})


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def hooks_of(model: nn.Module) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]


def test_a_teacher_of_other_classes_is_refused(refused):
    teacher = tiny(num_classes=5)
    student = sliced(tiny())
    with refused("teacher has 5 classes", "student 3", "logits=0"):
        distillation_loss(teacher, student)
    assert fit(student, toy(), quick(epochs=1), loss=distillation_loss(teacher, student, logits=0))
    images, labels = toy(4).tensors
    loss = distillation_loss(nn.Sequential(teacher), nn.Sequential(student), features=0)  # which do not say it
    with refused("teacher has 5 classes", "student 3"):
        loss(nn.Sequential(student), images, labels)


# --- values --------------------------------------------------------------------------------------------------------


def test_the_divergence_by_hand():
    student = torch.zeros(2, 2)
    teacher = 3 * torch.tensor([[math.log(3), 0], [0, 0]])  # at temperature 3: (3/4, 1/4), and as the student
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(student, teacher, 3.0).item() == pytest.approx(9 * one / 2, rel=1e-5)
    assert divergence(teacher + 7, teacher, 3.0).item() == pytest.approx(0, abs=1e-6)
    assert divergence(student, teacher, 1.0).item() > divergence(student, teacher, 3.0).item() / 9


def test_the_dissimilarity_by_hand():
    a = torch.tensor([[1.0, 2.0, 3.0]])
    b = torch.tensor([[1.0, 3.0, 2.0]])
    assert dissimilarity(a, b, (1,)).item() == pytest.approx(1 - 0.5, abs=1e-5)  # Pearson's correlation is a half
    assert dissimilarity(a, -a, (1,)).item() == pytest.approx(2, abs=1e-5)
    assert dissimilarity(a, 5 * a + 3, (1,)).item() == pytest.approx(0, abs=1e-5)
    both = torch.cat([a, a]), torch.cat([b, -a])
    assert dissimilarity(*both, (1,)).item() == pytest.approx((0.5 + 2) / 2, abs=1e-5)  # the mean over what is left
    constant = torch.ones(1, 3, requires_grad=True)
    dissimilarity(constant, a, (1,)).backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backbone", [VIT_TINY, DISTILLED, PVT], ids=str)
def test_a_teacher_that_is_the_student_adds_nothing(backbone, training):
    student = backbone.build().train(training)
    if hasattr(student, "set_distilled_training"):
        student.set_distilled_training()
    images, targets = backbone.images(), torch.tensor([1, 3])
    heads = heads_of(student(images))
    assert len(heads) == (2 if training and backbone is DISTILLED else 1)
    task = torch.stack([functional.cross_entropy(head, targets) for head in heads]).mean()
    expected = gradients(task, student)
    total = distillation_loss(student, student, logits=10, features=10)(student, images, targets)
    assert total.item() == pytest.approx(task.item(), abs=1e-6)
    for seen, wanted in zip(gradients(total, student), expected, strict=True):
        assert_close(seen, wanted, atol=1e-5, rtol=1e-4)


@FAMILIES
def test_a_student_of_less_width_is_compared_with_the_channels_that_were_kept(backbone):
    teacher, space = dense(backbone)
    plan = random_plan(space, seed=1)
    student = slice_model(teacher, plan)
    images, targets = backbone.images(), torch.tensor([1, 3])
    blocks = [name for name, module in teacher.named_modules() if hasattr(module, "mlp")]
    caught = {}
    for model in (teacher, copy.deepcopy(student)):
        outputs = caught.setdefault(model is teacher, [])
        handles = [model.get_submodule(b).register_forward_hook(lambda m, i, o, x=outputs: x.append(o)) for b in blocks]
        outputs.append(model(images))
        for handle in handles:
            handle.remove()
    (*theirs, logits), (*mine, own) = caught[True], caught[False]
    apart = []
    for block, a, b in zip(blocks, mine, theirs, strict=True):
        width = "embed" if "embed" in space.dimensions else f"embed.{block.split('.')[1]}"
        assert a.shape[-1] < b.shape[-1]
        a, b = a.flatten(0, -2), b[..., torch.from_numpy(plan.keep[width])].flatten(0, -2)
        apart += [1 - torch.corrcoef(torch.stack([a[:, c], b[:, c]]))[0, 1] for c in range(a.shape[1])]
        apart[-a.shape[1] :] = [torch.stack(apart[-a.shape[1] :]).mean()]
    task = functional.cross_entropy(own, targets, label_smoothing=0.1)
    found = distillation_loss(teacher, student, logits=0, features=2, smoothing=0.1)(student, images, targets)
    assert len(apart) == len(blocks) and torch.stack(apart).mean() > 0.01
    assert_close(found, task + 2 * torch.stack(apart).mean(), atol=1e-4, rtol=1e-4)
    found = distillation_loss(teacher, student, logits=3, features=0, temperature=2, smoothing=0.1)
    wanted = task + 3 * divergence(own, logits, 2.0)
    assert_close(found(student, images, targets), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, task)


def test_a_model_sliced_once_teaches_one_sliced_twice():
    first = slice_model(tiny(), DimensionPlan(space_for(tiny()), {"embed": [0, 2, 3, 5, 7, 8, 10, 11]}))
    space = space_for(first)
    second = slice_model(first, DimensionPlan(space, {"embed": [1, 2, 4, 7]}))
    images, targets = toy().tensors
    twice = distillation_loss(first, second, logits=0, features=1)(second, images, targets)
    del first.sidt_plan, second.sidt_plan
    second.sidt_plan = DimensionPlan(space, {"embed": [1, 2, 4, 7]})
    assert torch.equal(twice, distillation_loss(first, second, logits=0, features=1)(second, images, targets))


def test_labels_are_smoothed_and_soft_targets_are_not():
    model = tiny().eval()
    images, targets = toy().tensors
    sharp, smooth = (distillation_loss(model, model, smoothing=s) for s in (0.0, 0.2))
    assert sharp(model, images, targets) != smooth(model, images, targets)
    soft = functional.one_hot(targets, 3).float()
    assert torch.equal(sharp(model, images, soft), smooth(model, images, soft))


# --- in training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_teacher_is_left_alone_and_runs_as_in_evaluation(precision):
    teacher, seen = tiny(drop_rate=0.5).train(), []

    def watch(module, inputs, output):
        seen.append((module.training, torch.is_grad_enabled(), output.requires_grad, output.dtype))

    handle = teacher.head.register_forward_hook(watch)
    student = sliced(tiny())
    loss = distillation_loss(teacher, student)
    handle.remove()
    seen.clear()  # the cost of the teacher was traced
    before, keys = copy.deepcopy(teacher.state_dict()), list(student.state_dict())
    fit(student, toy(), quick(precision=precision), loss=loss)
    assert set(seen) == {(False, False, False, torch.bfloat16 if precision == "bf16" else torch.float32)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert list(student.state_dict()) == keys and not hooks_of(student) and not hooks_of(teacher)


def test_no_hook_is_left_when_a_forward_is_stopped():
    student = tiny()
    loss = distillation_loss(tiny(), student)
    images, targets = toy().tensors

    def stop(module, inputs):
        raise KeyboardInterrupt

    handle = student.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        loss(student, images, targets)
    handle.remove()
    assert not hooks_of(student)


def test_a_wrapped_student_is_the_student():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, images):
            return self.module(images)

    student = sliced(tiny())
    loss = distillation_loss(tiny(), student)
    images, targets = toy().tensors
    assert torch.equal(loss(Wrapper(student), images, targets), loss(student, images, targets))


def test_the_student_comes_nearer_to_its_teacher():
    teacher = tiny()
    student = sliced(teacher)
    images = toy().tensors[0]

    def distance():
        with torch.no_grad():
            return divergence(student(images), teacher(images), 1.0).item()

    start = distance()
    finetune(student, toy(), epochs=8, batch_size=8, device="cpu", loss=distillation_loss(teacher, student, logits=10))
    assert distance() < 0.8 * start


def test_mixup_and_several_heads():
    student = timm.create_model("deit_tiny_distilled_patch16_224", **TINY)
    student.set_distilled_training()
    targets = []
    loss = distillation_loss(student, student, smoothing=0.1)

    def watched(model, images, labels):
        targets.append(labels)
        return loss(model, images, labels)

    history = fit(student, toy(), quick(mixup=0.5, cutmix=0.5, smoothing=0.1), loss=watched)
    assert all(t.shape == (8, 3) for t in targets) and math.isfinite(history[-1]["loss"])


def test_an_interrupted_run_goes_on_to_the_same_bits_and_only_with_the_same_teacher(tmp_path):
    class Stopping(TensorDataset):
        reads = math.inf

        def __getitem__(self, index):
            self.reads -= 1
            if self.reads < 0:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    teacher, data = tiny(), Stopping(*toy().tensors)
    config = quick(mixup=0.3, precision="bf16")

    def run(folder=None, teacher=teacher, **options):
        student = sliced(tiny(drop_rate=0.2))
        fit(student, data, config, folder=folder, loss=distillation_loss(teacher, student, **options))
        return torch.cat([tensor.flatten() for tensor in student.state_dict().values()])

    whole = run()
    data.reads = 24 + 10
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    data.reads = math.inf
    other = tiny()
    other.head.bias.data += 1
    for changes, said in (
        ({"logits": 0.5}, "logits=0.5"),
        ({"features": 0.5}, "features=0.5"),
        ({"temperature": 5}, "temperature=5.0"),
        ({"smoothing": 0.2}, "smoothing=0.2"),
        ({"teacher": other}, "from teacher"),
    ):
        with pytest.raises(sidt.errors.InputError, match=f"another run: its loss is .*{said}") as error:
            run(tmp_path, **changes)
        assert "\n" not in str(error.value)
    assert torch.equal(run(tmp_path), whole)


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_options_are_checked(refused):
    model = tiny()
    with refused("option weight=1", "logits, features, temperature"):
        distillation_loss(model, model, weight=1)
    with refused("temperature=0", "greater than 0"):
        distillation_loss(model, model, temperature=0)
    with refused("both 0"):
        distillation_loss(model, model, logits=0, features=0)
    with pytest.raises(ValidationError, match="both 0"):
        TeacherConfig(logits=0, features=0)


def test_a_student_of_another_model_is_refused(refused):
    student = sliced(tiny(embed_dim=16))
    with refused("sliced from another", "features=0"):
        distillation_loss(tiny(), student)
    images, targets = toy().tensors
    distillation_loss(tiny(), student, features=0)(student, images, targets)  # logits can be compared
    with refused("[24, 5, 16]", "[24, 5, 12]"):
        unsliced = tiny(embed_dim=16)
        distillation_loss(tiny(), unsliced)(unsliced, images, targets)
    with refused("blocks.0", "not the given student"):
        distillation_loss(tiny(), sliced(tiny()))(tiny(), images, targets)


# --- by the command line -------------------------------------------------------------------------------------------


def test_finetune_with_a_teacher_by_the_command_line(tmp_path):
    args = {**TINY, "num_classes": 10}
    config = {
        "model": {"name": NAME, "args": args},
        "data": {"name": "digits", "image_size": 16},
        "budget": {"params": 0.9},
        "finetune": {"epochs": 1},
        "device": "cpu",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model = tiny(num_classes=10)
    save(model, tmp_path / "dense", name=NAME, args=args)
    save(sliced(model), tmp_path / "sliced", name=NAME, args=args)
    heads, states = [], []
    for words in ([], ["--teacher"], ["--teacher", "--set", "teacher.features=0.5"], ["--teacher"]):
        result = CliRunner().invoke(cli, ["finetune", str(tmp_path), *words], standalone_mode=False)
        assert result.exit_code == 0, result.exception
        heads.append(sidt.load(tmp_path).state_dict()["head.weight"])
        states.append([path.name for path in (tmp_path / "states").iterdir()])
    assert [len(found) for found in states] == [1, 1, 1, 1]
    assert len({found[0] for found in states}) == 3 and states[2] == states[3]  # the run folder knows its teacher
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    assert torch.equal(heads[2], heads[3])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["teacher"]["features"] == 0.5
