"""What a run knows of its outputs: a chain of three steps on files of a few bytes."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sidt.runs.provenance import Chain, Step, digest_of, inputs, record

CHAIN = Chain(
    "tool",
    {
        "make": Step("model", "a", ("a/w.safetensors",)),
        "judge": Step("scores", "b", ("b/w.safetensors", "b/list.json"), ("make",)),
        "choose": Step("plan", "c.json", ("c.json",), ("judge",)),
        "tell": Step("report", "d.json", ("d.json",), ("make", "choose")),
    },
)


def put(path, value):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        save_file({"w": torch.tensor([float(value)])}, path)


def do(folder, name, value):
    """A step: it checks, writes and records."""
    made_of = inputs(folder, CHAIN, name)
    for file in CHAIN.steps[name].files:
        put(folder / file, value)
    record(folder, CHAIN, name, made_of)


@pytest.fixture
def run(tmp_path):
    for value, name in enumerate(CHAIN.steps):
        do(tmp_path, name, value)
    return tmp_path


def test_the_first_that_is_stale_is_named_until_all_are_made_again(run, refused):
    do(run, "make", 9)
    for name in ("choose", "tell"):
        with refused(run / "b", "another model", run / "a", f"`tool judge {run}`"):
            inputs(run, CHAIN, name)
    inputs(run, CHAIN, "judge")  # it reads what is there now
    do(run, "judge", 9)
    with refused(run / "c.json", "another scores", f"`tool choose {run}`"):
        inputs(run, CHAIN, "tell")
    do(run, "choose", 2)
    inputs(run, CHAIN, "tell")


def test_the_same_output_again_makes_nothing_stale(run):
    do(run, "make", 0)
    (run / "c.json").write_text(json.dumps(2, indent=3) + "\n")
    assert inputs(run, CHAIN, "tell")


def test_what_is_not_recorded_is_not_known(run):
    """Runs of earlier versions, and files that were put there by hand, or taken away."""
    put(run / "a" / "w.safetensors", 9)
    record_of_judge = run / "provenance" / "judge.json"
    record_of_judge.unlink()
    inputs(run, CHAIN, "tell")
    do(run, "make", 0)
    do(run, "judge", 1)
    put(run / "c.json", [7])  # by hand
    do(run, "judge", 5)
    inputs(run, CHAIN, "tell")
    (run / "b" / "w.safetensors").unlink()
    (run / "a" / "w.safetensors").unlink()
    inputs(run, CHAIN, "tell")


def test_a_step_that_was_stopped_between_its_files_is_named(run, refused):
    put(run / "b" / "w.safetensors", 9)
    with refused(run / "b" / "w.safetensors", "list.json", "not of one `tool judge`"):
        inputs(run, CHAIN, "choose")
    put(run / "b" / "list.json", 9)  # stopped before its record: all is new, and nothing is known of it
    assert inputs(run, CHAIN, "choose")
    do(run, "make", 9)
    inputs(run, CHAIN, "choose")


def test_an_output_that_was_not_there_yet(run, refused, tmp_path):
    (run / "a" / "w.safetensors").rename(tmp_path / "away")
    do(run, "tell", 3)
    (tmp_path / "away").rename(run / "a" / "w.safetensors")
    after = Chain("tool", {**CHAIN.steps, "print": Step("print", "e", ("e.json",), ("tell",))})
    with refused(run / "d.json", "without the model", "tool tell"):
        inputs(run, after, "print")


def test_a_digest_is_of_the_contents(tmp_path):
    tensors = {"a": torch.arange(5.0), "b": torch.zeros(2, 3, dtype=torch.float16)}
    digests = set()
    for n in range(6):  # safetensors writes metadata in any order
        save_file(tensors, tmp_path / f"{n}.safetensors", metadata={"format": "pt", "x": "1", "y": "2", "z": str(n)})
        digests.add(digest_of(tmp_path / f"{n}.safetensors"))
    assert len(digests) == 1
    for other in ({"a": tensors["a"].flip(0), "b": tensors["b"]}, {"a": tensors["a"], "c": tensors["b"]},
                  {"a": tensors["a"], "b": tensors["b"].reshape(3, 2)}):  # fmt: skip
        save_file(other, tmp_path / "other.safetensors")
        assert digest_of(tmp_path / "other.safetensors") not in digests


def test_a_file_that_changes_within_a_process_is_seen(tmp_path):
    path = tmp_path / "a.json"
    put(path, 1)
    before, seen = digest_of(path), path.stat()
    put(path, 2)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
    assert digest_of(path) != before


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]"])
def test_damaged_files_are_refused(run, refused, content):
    (run / "a" / "w.safetensors").write_bytes(content)
    with refused("w.safetensors", "truncated"):
        inputs(run, CHAIN, "judge")
    (run / "a" / "w.safetensors").unlink()
    (run / "provenance" / "judge.json").write_text("[1]")
    with refused("judge.json", "damaged", "remove it"):
        inputs(run, CHAIN, "choose")
