"""COCO scores of detectors: as pycocotools and MMDetection give them, in groups, and what is said about bad configs."""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import mmdet
import numpy as np
import pytest
import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sidt.detection.training import evaluation
from sidt.detection.training.evaluation import average_precision, score_file

CLASSES = ("cat", "dog")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 5, "name": "unused"}, {"id": 3, "name": "dog"}]  # not sorted by id
SIDE, IMAGES, EMPTY = 160, 14, (4, 9)
ALL = list(range(1, IMAGES + 1))


@MODELS.register_module()
class Oracle(BaseDetector):
    """Finds what there is, but not quite: moved, of the wrong class, not at all, or where nothing is."""

    def predict(self, inputs, samples, rescale=True):
        for sample in samples:
            generator = torch.Generator().manual_seed(sample.img_id)
            truth, count = sample.gt_instances, 3
            boxes = truth.bboxes * (1 + 0.1 * torch.rand(len(truth), 4, generator=generator))
            corners = 80 * torch.rand(count, 2, generator=generator)
            boxes = torch.cat((boxes, torch.cat((corners, corners + 40), dim=1)))
            masks = torch.from_numpy(truth.masks.to_ndarray()).bool().roll(2, dims=2)
            masks = torch.cat((masks, torch.zeros(count, SIDE, SIDE, dtype=torch.bool)))
            masks[-count:, 20:60, 20:60] = True
            labels = torch.cat((truth.labels, torch.arange(count) % 2))
            labels[torch.rand(len(labels), generator=generator) < 0.1] = 0
            scores = torch.rand(len(labels), generator=generator)
            keep = torch.rand(len(labels), generator=generator) < 0.9
            sample.pred_instances = InstanceData(bboxes=boxes, labels=labels, scores=scores, masks=masks)[keep]
        return samples

    def extract_feat(self, inputs): ...
    def loss(self, inputs, samples): ...
    def _forward(self, inputs, samples=None): ...


def small(name: str, changes: dict) -> dict:
    """A detector of MMDetection with a Swin Transformer of 24 channels, and heads of 16."""
    model = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs/_base_/models" / name).model
    swin = {"type": "SwinTransformer", "embed_dims": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    body = {
        "backbone": {"_delete_": True, "window_size": 4, **swin},
        "neck": {"in_channels": [24, 48, 96, 192], "out_channels": 16},
    }
    model.merge(ConfigDict(body | changes))
    return model


HEAD, SHOW_ALL = {"in_channels": 16, "feat_channels": 16}, {"score_thr": 0.0, "max_per_img": 100}
ROI_HEAD = {
    "bbox_roi_extractor": {"out_channels": 16},
    "bbox_head": {"in_channels": 16, "fc_out_channels": 32, "num_classes": 2},
    "mask_roi_extractor": {"out_channels": 16},
    "mask_head": {"in_channels": 16, "conv_out_channels": 16, "num_classes": 2},
}
BUILDS = {
    "oracle": lambda: {"type": "Oracle", "data_preprocessor": {"type": "DetDataPreprocessor"}},
    "retinanet": lambda: small("retinanet_r50_fpn.py", {"bbox_head": HEAD | {"num_classes": 2}, "test_cfg": SHOW_ALL}),
    "mask_rcnn": lambda: small(
        "mask-rcnn_r50_fpn.py", {"rpn_head": HEAD, "roi_head": ROI_HEAD, "test_cfg": {"rcnn": SHOW_ALL}}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images with triangles of all sizes, two without any, and crowds; masks and boxes have different areas."""
    register_all_modules(init_default_scope=True)
    folder, rng, annotations = tmp_path_factory.mktemp("coco"), np.random.default_rng(0), []
    for image in ALL:
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{image}.png")
        for side in () if image in EMPTY else rng.permutation([20, 40, 60, 120, 150])[:4].tolist():
            x, y = rng.integers(0, SIDE - side, 2).tolist()
            one = {
                "image_id": image,
                "category_id": CATEGORIES[rng.choice(3, p=(0.4, 0.2, 0.4))]["id"],
                "bbox": [x, y, side, side],
                "iscrowd": 0,
            }
            polygon = [[x, y, x + side, y, x, y + side]]
            annotations.append(one | {"segmentation": polygon, "area": side * side / 2})
        if image % 5 == 1:
            area = SIDE * SIDE // 2  # its left half
            crowd = {"size": [SIDE, SIDE], "counts": [0, area, area]}
            box = {"image_id": image, "category_id": 3, "bbox": [0, 0, SIDE // 2, SIDE], "iscrowd": 1}
            annotations.append(box | {"segmentation": crowd, "area": area})
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in ALL],
        "annotations": [one | {"id": i} for i, one in enumerate(annotations, start=1)],
        "categories": CATEGORIES,
    }
    (folder / "instances.json").write_text(json.dumps(data))
    return folder


def make_config(folder: Path, work: Path, name: str = "oracle", metric=("bbox", "segm")) -> Config:
    loads = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}
    meta = ("img_id", "ori_shape", "img_shape", "scale_factor")
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (SIDE, SIDE), "keep_ratio": True},
        loads,
        {"type": "PackDetInputs", "meta_keys": meta},
    ]
    annotations = str(folder / "instances.json")
    dataset = {
        "type": "CocoDataset",
        "ann_file": annotations,
        "data_prefix": {"img": str(folder)},
        "metainfo": {"classes": CLASSES},
        "test_mode": True,
        "pipeline": pipeline,
    }
    return Config(
        {
            "default_scope": "mmdet",
            "work_dir": str(work),
            "experiment_name": f"{work.name}_{name}_{len(metric)}",
            "log_level": "WARNING",
            "model": BUILDS[name](),
            "test_cfg": {},
            "test_dataloader": {
                "batch_size": 4,
                "num_workers": 0,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "dataset": dataset,
            },
            "test_evaluator": {"type": "CocoMetric", "ann_file": annotations, "metric": list(metric)},
        }
    )


@pytest.fixture(scope="module", params=list(BUILDS))
def tested(request, folder, tmp_path_factory):
    """A detector, tested by ``evaluation.test``."""
    torch.manual_seed(1)
    work = tmp_path_factory.mktemp(request.param)
    config = make_config(folder, work, request.param, ("bbox",) if request.param == "retinanet" else ("bbox", "segm"))
    model = MODELS.build(deepcopy(config.model))
    torch.save({"state_dict": model.state_dict()}, work / "weights.pth")
    config.load_from = str(work / "weights.pth")
    scores = evaluation.test(config, work / "out", per_class=True)
    return SimpleNamespace(name=request.param, config=config, out=work / "out", scores=scores, model=model)


def by_pycocotools(annotations: Path, results: Path, iou_type: str) -> list[float | None]:
    """The six scores as anyone would compute them, with COCOeval's own settings."""
    detections = json.loads(results.read_text())
    if iou_type == "segm":
        for one in detections:
            del one["bbox"]
    coco = COCO(str(annotations))
    coco_eval = COCOeval(coco, coco.loadRes(detections), iou_type)
    coco_eval.params.catIds = [7, 3]
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return [None if value == -1 else value for value in coco_eval.stats[:6]]


def test_agrees_with_pycocotools(folder, tested):
    assert set(tested.scores) == {"bbox"} | ({"segm"} if tested.name != "retinanet" else set())
    for kind, scores in tested.scores.items():
        results = tested.out / f"results.{kind}.json"
        expected = by_pycocotools(folder / "instances.json", results, kind)
        assert [scores[name] for name in NAMES] == pytest.approx(expected, abs=1e-9)
        if tested.name == "oracle":
            assert all(0.05 < scores[name] < 0.95 for name in NAMES), scores
    assert sorted(path.name for path in tested.out.iterdir()) == [f"results.{kind}.json" for kind in tested.scores]


def test_agrees_with_coco_metric(tested):
    config = deepcopy(tested.config)
    config.experiment_name += "_by_mmdet"
    rounded = Runner.from_cfg(config).test()
    for kind, scores in tested.scores.items():
        for name, theirs in zip(NAMES, ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"), strict=True):
            assert scores[name] == pytest.approx(rounded[f"coco/{kind}_{theirs}"], abs=5.01e-4), (kind, name)


def test_classes_by_name(folder, tested):
    path = folder / "instances.json"
    for kind, scores in tested.scores.items():
        assert list(scores["classes"]) == ["dog", "cat"]
        for name, value in scores["classes"].items():
            assert value == score_file(path, tested.out / f"results.{kind}.json", kind, classes=(name,))["AP"]


def loader_of(config: Config):
    init_default_scope("mmdet")
    return Runner.build_dataloader(deepcopy(config.test_dataloader))


def test_average_precision_is_that_of_the_test(folder, tested):
    model, loader = tested.model.train(), loader_of(tested.config)
    first = next(iter(model.children()))
    first.eval()
    values = average_precision(model, loader, folder / "instances.json", CLASSES)
    assert values == pytest.approx([tested.scores["bbox"]["AP"]], abs=1e-9)
    assert model.training and not first.training


@pytest.mark.parametrize("tested", ["oracle"], indirect=True)
def test_groups_are_scored_apart_and_run_once(folder, tested, monkeypatch):
    path, loader = folder / "instances.json", loader_of(tested.config)
    batches, step = [], tested.model.test_step
    monkeypatch.setattr(tested.model, "test_step", lambda batch: batches.append(0) or step(batch))
    values = average_precision(tested.model, loader, path, CLASSES, folds=3)
    assert len(batches) == len(loader) > 1
    groups = evaluation._groups(path, json.loads(path.read_text()), (7, 3), ALL, 3, 0)
    expected = [
        score_file(path, tested.out / "results.bbox.json", "bbox", classes=CLASSES, image_ids=g)["AP"] for g in groups
    ]
    assert values == pytest.approx(expected, abs=1e-9)
    assert len(set(values)) == 3
    other = average_precision(tested.model, loader, path, CLASSES, folds=3, seed=1)
    assert not np.allclose(values, other)


@pytest.mark.parametrize("folds", [1, 2, 5, 12])
def test_groups_share_the_images_out(folder, folds):
    path = folder / "instances.json"
    data = json.loads(path.read_text())
    groups = evaluation._groups(path, data, (7, 3, 5), ALL, folds, 0)
    assert groups == evaluation._groups(path, data, (7, 3, 5), ALL, folds, 0)
    assert sorted(image for group in groups for image in group) == ALL
    for counts in ([len(g) for g in groups], [len(set(g) - set(EMPTY)) for g in groups]):
        assert max(counts) - min(counts) <= 1 and min(counts) > 0


def test_the_images_of_the_loader_are_scored(folder, tmp_path):
    config = make_config(folder, tmp_path, metric=("bbox",))
    config.test_dataloader.dataset.indices = 6
    scores = evaluation.test(config, tmp_path / "out")["bbox"]
    path = folder / "instances.json"
    assert scores == score_file(path, tmp_path / "out/results.bbox.json", "bbox", classes=CLASSES, image_ids=ALL[:6])
    values = average_precision(MODELS.build(config.model), loader_of(config), path, CLASSES)
    assert values == pytest.approx([scores["AP"]], abs=1e-9)


def test_other_metrics_beside_coco(folder, tmp_path):
    config = make_config(folder, tmp_path, metric=("bbox",))
    coco = dict(config.test_evaluator, type="mmdet.CocoMetric", metric="bbox")
    config.test_evaluator = [{"type": "DumpDetResults", "out_file_path": "x.pkl"}, coco]
    assert list(evaluation.test(config, tmp_path / "out")) == ["bbox"]


def test_a_bad_config_is_refused(folder, tmp_path, refused):
    def attempt(*words, **changes):
        config = make_config(folder, tmp_path)
        config.merge_from_dict(changes)
        with refused(*words):
            evaluation.test(config, tmp_path / "out")

    attempt("VOCMetric", "CocoMetric", test_evaluator={"_delete_": True, "type": "VOCMetric"})
    attempt("LVISMetric", test_evaluator={"type": "LVISMetric"})  # a subclass, with another AP
    attempt("test_dataloader", test_dataloader=None)
    attempt("metric=['proposal']", "segm", test_evaluator={"metric": ["proposal"]})
    attempt("ann_file", test_evaluator={"ann_file": None})
    attempt("nowhere.json", test_evaluator={"ann_file": "nowhere.json"})
    attempt("no masks", "segm", model={"_delete_": True, **BUILDS["retinanet"]()})
    two = [make_config(folder, tmp_path).test_evaluator] * 2
    attempt("CocoMetric, CocoMetric", "one CocoMetric", test_evaluator=two)
    (tmp_path / "file").touch()
    with refused("cannot write", tmp_path / "file"):
        evaluation.test(make_config(folder, tmp_path), tmp_path / "file" / "out")


def test_another_annotation_file_than_the_loaders_is_refused_before_it_runs(folder, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(Oracle, "predict", lambda *_: pytest.fail("the detector ran"))
    data = json.loads((folder / "instances.json").read_text())
    path = tmp_path / "part.json"
    path.write_text(json.dumps(data | {"images": data["images"][:10], "annotations": data["annotations"][:3]}))
    config = make_config(folder, tmp_path)
    config.test_evaluator.ann_file = str(path)
    with refused("4 of the 14 images", "id 11 first", path):
        evaluation.test(config, tmp_path / "out")
    with refused("4 of the 14 images", path):
        average_precision(MODELS.build(config.model), loader_of(config), path, CLASSES)
    path.write_text(json.dumps(data | {"categories": [{"id": i, "name": f"class {i}"} for i in (3, 5, 7)]}))
    with refused("lacks 2", "'class 3'"):
        evaluation.test(config, tmp_path / "out")


def test_average_precision_refuses(folder, tmp_path, refused):
    config, path = make_config(folder, tmp_path), folder / "instances.json"
    model, loader = MODELS.build(config.model), loader_of(config)
    with refused("13 groups of the 14 images", "12 have boxes"):
        average_precision(model, loader, path, ("cat", "unused", "dog"), folds=13)
    with refused("0 groups"):
        average_precision(model, loader, path, CLASSES, folds=0)
    with refused("class number 1", "there are 1 classes", "num_classes"):
        average_precision(model, loader, path, ("cat",))
