"""The hub: what goes there comes back and computes the same; the token stays where it is."""

import json
import socket

import pytest
import timm
import torch
from backbones import VIT_TINY, dense, random_plan
from hub import TOKEN, serving, use
from huggingface_hub import constants

import sidt
from sidt.export import to_timm
from sidt.export.hub import repository_in, upload
from sidt.export.models import create_model
from sidt.files import dump_json
from sidt.runs.card import push
from sidt.surgery.slicing import slice_model

REPOSITORY = "someone/vit-tiny-small"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as server:
        use(monkeypatch, server.url, tmp_path)
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a small sliced model."""
    model, space = dense(VIT_TINY)
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    sidt.save(slice_model(model, random_plan(space, 0)), path)
    return path


def test_a_checkpoint_goes_and_comes_back(hub, folder, tmp_path, capfd, monkeypatch):
    says = push(folder, REPOSITORY)
    assert says.endswith(f"{hub.url}/{REPOSITORY}") and "checkpoint of" in says
    assert len(hub.repositories[REPOSITORY]) == 2  # as it was made, and one commit
    assert set(hub.files(REPOSITORY)) == {"config.json", "plan.json", "model.safetensors", "README.md"}
    assert hub.files(REPOSITORY)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    images = VIT_TINY.images()
    there = sidt.load(folder)(images)
    for source in (f"hf-hub:{REPOSITORY}", f"hf_hub:{REPOSITORY}", REPOSITORY, f"{REPOSITORY}@main"):
        assert torch.equal(sidt.load(source)(images), there)
    out, err = capfd.readouterr()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    sent = b"".join(hub.files(REPOSITORY).values())
    assert kept and not any(TOKEN.encode() in text for text in (kept, sent, out.encode(), err.encode(), says.encode()))


def test_the_card_says_how_to_load_it(hub, folder):
    push(folder, REPOSITORY)
    text = hub.files(REPOSITORY)["README.md"].decode()
    model = sidt.load(folder)
    assert text.startswith("---\n") and "library_name: sidt" in text and "- pruning" in text
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line and line[0] != "#"]) <= 5
    found = {}
    exec(code, found)
    assert found["logits"].shape == (1, 10)


def test_a_folder_of_that_name_comes_first(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / REPOSITORY).symlink_to(folder)
    sidt.load(REPOSITORY)
    assert not hub.requests


def test_a_second_push_and_revisions(hub, folder, tmp_path, refused):
    push(folder, REPOSITORY)
    first = sidt.load(f"hf-hub:{REPOSITORY}")
    model = VIT_TINY.build(seed=3)
    sidt.save(model, tmp_path / "other")
    push(tmp_path / "other", REPOSITORY)
    images = VIT_TINY.images()
    assert torch.equal(sidt.load(REPOSITORY)(images), model(images))
    assert not torch.equal(sidt.load(REPOSITORY)(images), first(images))
    with refused(REPOSITORY, "revision"):
        sidt.load(f"{REPOSITORY}@nothing")


def test_what_was_loaded_once_needs_no_network(hub, folder, monkeypatch):
    push(folder, REPOSITORY)
    there = sidt.load(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(sidt.load(REPOSITORY).head.weight, there.head.weight)


def test_private(hub, folder, monkeypatch, refused):
    push(folder, REPOSITORY, private=True)
    assert hub.private[REPOSITORY]
    hub.add("someone/public", {})
    with refused("someone/public", "public", "--private"):
        push(folder, "someone/public", private=True)
    assert hub.files("someone/public") == {}
    monkeypatch.delenv("HF_TOKEN")
    with refused(REPOSITORY, "private", "hf auth login"):
        sidt.load(f"hf-hub:{REPOSITORY}")


def test_uploads_that_are_refused(hub, folder, tmp_path, monkeypatch, refused):
    for name in ("alone", "a/b/c", "a b/c", "-a/..b", ""):
        with refused(repr(name), "OWNER/NAME"):
            push(folder, name)
    hub.read_only = True
    with refused(REPOSITORY, "403", "write"):
        push(folder, REPOSITORY)
    with refused("no checkpoint"):
        push(tmp_path, REPOSITORY)
    monkeypatch.delenv("HF_TOKEN")
    with refused("token", "hf auth login", "HF_TOKEN"):
        push(folder, REPOSITORY)
    assert not hub.repositories


def test_repositories_that_are_no_checkpoint(hub, refused, tmp_path):
    with refused("someone/nothing", "the hub has no"):
        sidt.load("hf-hub:someone/nothing")
    with refused("there is no folder runs/typo", "the hub has no runs/typo"):
        sidt.load("runs/typo")
    hub.add("someone/empty", {"README.md": b"x"})
    with refused("someone/empty", "no SiDT checkpoint", "config.json"):
        sidt.load("hf-hub:someone/empty")
    hub.add("someone/other", {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": b"x"})
    with refused("someone/other", "config.json", "format"):
        sidt.load("hf-hub:someone/other")
    hub.add("someone/part", {"config.json": dump_json({"format": "sidt-checkpoint-1", "args": {}}).encode()})
    with refused("someone/part", "plan.json"):
        sidt.load("hf-hub:someone/part")
    assert not any("safetensors" in path for _, path in hub.requests)
    with refused("hf-hub:nothing", "OWNER/NAME"):
        sidt.load("hf-hub:nothing")
    for path in (tmp_path / "nowhere", "nowhere", "a/b/c"):
        with refused("nowhere" if "nowhere" in str(path) else "a/b/c", "config.json"):
            sidt.load(path)


def test_without_a_network(hub, folder, tmp_path, monkeypatch, refused):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    use(monkeypatch, nowhere, tmp_path)
    with refused(REPOSITORY, "cannot reach the hub"):
        sidt.load(f"hf-hub:{REPOSITORY}")
    with refused(REPOSITORY, "cannot reach the hub"):
        push(folder, REPOSITORY)
    for prefix in ("hf-hub", "hf_hub"):
        with refused("timm/vit_tiny_patch16_224.augreg", "cannot reach the hub"):
            create_model(f"{prefix}:timm/vit_tiny_patch16_224.augreg", {})
    with refused("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "cannot reach the hub"):
        create_model("vit_tiny_patch16_224", {}, pretrained=True)
    with refused("nothing", "source"):
        create_model("nothing:a/b", {})
    assert not hub.requests


def test_timms_models_of_the_hub(hub, tmp_path, refused):
    """A name of the hub is built as timm does, and its checkpoint needs the hub no longer."""
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"img_size": 32, "depth": 1}}
    cfg = {"input_size": [3, 32, 32], "fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    hub.add("someone/timms", {"config.json": json.dumps(config | {"pretrained_cfg": cfg}).encode()})
    model = create_model("hf-hub:someone/timms", {})
    assert (len(model.blocks), model.num_classes) == (1, 5)
    sidt.save(model, tmp_path, name="hf-hub:someone/timms", args={})
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "vit_tiny_patch16_224"
    hub.repositories.clear()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(sidt.load(tmp_path)(images), model.eval()(images))
    with refused("someone/timms", "the hub has no"):
        create_model("hf-hub:someone/timms", {})


def test_names(refused):
    assert repository_in("hf-hub:a/b@v1") == ("a/b", "v1")
    assert repository_in("a/b") == ("a/b", None)
    for name in ("a", "./a", "a/b/c", "/a/b", "a/b.c/", "../a/b"):
        assert repository_in(name) is None
    with refused("OWNER/NAME"):
        repository_in("hf-hub:a")


def test_a_token_in_an_answer_is_not_shown(hub, monkeypatch, refused):
    def fails(*_, **__):
        raise ValueError(f"cannot send {TOKEN}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fails)
    with refused("cannot send ...", REPOSITORY):
        upload(REPOSITORY, {"a": b"b"}, private=False, message="a")


def test_a_model_that_timm_builds_by_itself(hub, tmp_path):
    """One of uniform sizes; of any other, timm is not told to try."""
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, num_heads=2, depth=1, img_size=32, num_classes=3)
    to_timm(model, tmp_path / "small")
    push(tmp_path / "small", REPOSITORY)
    card = hub.files(REPOSITORY)["README.md"].decode()
    assert "library_name: timm" in card and f'timm.create_model("hf-hub:{REPOSITORY}", pretrained=True)' in card
    images = torch.randn(1, 3, 32, 32)
    expected = model.eval()(images)
    assert torch.equal(timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).eval()(images), expected)
    assert torch.equal(sidt.load(REPOSITORY)(images), expected)


def test_timm_does_not_build_what_its_constructors_do_not_take(folder):
    with pytest.raises((KeyError, RuntimeError)):
        timm.create_model(f"local-dir:{folder}")
