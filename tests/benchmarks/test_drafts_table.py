"""The table of drafts: what is written of one that passed and of one that did not."""

from drafts import measured, rows_of


def test_the_table(tmp_path):
    (one,) = measured(["vit_tiny_patch16_224"], tmp_path / "state.jsonl")
    assert one["checked"] and one["searched"] == ["heads", "mlp", "qk", "v", "width"]
    assert list(measured(["vit_tiny_patch16_224"], tmp_path / "state.jsonl")) == [one]  # as it was kept
    stopped = {"class": "x.B", "name": "b", "drafted": False, "checked": False, "why": "no | line"}
    assert rows_of([stopped]) == [["x.B", "b", "no", "no", "", "", "no / line"]]
