"""Blood cells (BCCD, MIT) as ``configs/detection/bccd_swin.py`` expects them, from a clone of its authors' repository.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python examples/blood_cells.py BCCD_Dataset/BCCD data/bccd
    sidt detect train configs/detection/bccd_swin.py

Any folder in Pascal VOC's layout is read: Annotations/*.xml, JPEGImages/*.jpg, and in ImageSets/Main/ the lists
trainval.txt and test.txt. It takes seconds.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

CLASSES = ("RBC", "WBC", "Platelets")
SPLITS = {"train": "trainval", "test": "test"}


def coco_of(voc: Path, names: list[str], classes: tuple[str, ...]) -> dict[str, Any]:
    """COCO's annotations of some images, whose boxes VOC gives as corners."""
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, name in enumerate(names, 1):
        root = ElementTree.parse(voc / "Annotations" / f"{name}.xml").getroot()
        found = VOCDetection.parse_voc_xml(root)["annotation"]
        width, height = (int(found["size"][side]) for side in ("width", "height"))
        images.append({"id": number, "file_name": f"{name}.jpg", "width": width, "height": height})
        for thing in found["object"]:
            left, top, right, bottom = (float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax"))
            left, top = max(left - 1, 0.0), max(top - 1, 0.0)  # VOC counts pixels from 1, and the last one belongs
            box = [left, top, right - left, bottom - top]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": classes.index(thing["name"]) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": boxes, "categories": categories}


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voc", type=Path, help="the folder that has Annotations, ImageSets and JPEGImages")
    parser.add_argument("out", type=Path, help="where the images and COCO's files go")
    parser.add_argument("--classes", default=",".join(CLASSES), help="names in the XML, separated by commas")
    given = parser.parse_args()
    for split, names_file in SPLITS.items():
        names = (given.voc / "ImageSets" / "Main" / f"{names_file}.txt").read_text(encoding="utf-8").split()
        coco = coco_of(given.voc, names, tuple(given.classes.split(",")))
        (given.out / split).mkdir(parents=True, exist_ok=True)
        (given.out / "annotations").mkdir(exist_ok=True)
        for name in names:
            shutil.copy(given.voc / "JPEGImages" / f"{name}.jpg", given.out / split)
        file = given.out / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(coco), encoding="utf-8")
        print(f"{file}: {len(coco['images'])} images, {len(coco['annotations'])} boxes")


if __name__ == "__main__":
    main()
