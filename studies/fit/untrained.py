# yolo-sos, AGPL-3.0
"""How good is a detector whose class layers are fitted to a data set, without training, by number of images?

Every number of images is fitted with several seeds, which choose the images; the val split is scored. Names that match
classes of the model are set aside unless --known is given. A record per fit; those that exist are left as they are.

    python studies/fit/untrained.py --weights yolov8n.pt --data VOC07.yaml --imgsz 320 --name voc07-unknown
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from yolo_sos.files import as_json, read_json, write_text
from yolo_sos.yolo.classes import resized
from yolo_sos.yolo.fit import CheckpointFit

HERE = Path(__file__).parent


def fit(args: argparse.Namespace, images: int | str, seed: int) -> dict:
    """Return the record of one fit."""
    with TemporaryDirectory() as folder:
        weights = shutil.copy(args.weights, Path(folder) / "model.pt")
        job = CheckpointFit(weights, args.data, images=images, imgsz=args.imgsz, batch=16, seed=seed, device="cpu")
        if not args.known:
            names = {k: f"class {k}" for k in job.data.names}
            job.known = {}
            job.model = resized(job.checkpoint.model, names, seed)
            job.model.names, job.model.args = job.data.names, job.checkpoint.model.args
        report = job.run()
    return {
        "images": sum(report.images[name] for name in ("fit", "selection")),
        "heldout": report.images["heldout"],
        "seed": seed,
        "refusal": report.refusal,
        "explained": report.explained,
        "ridges": [layer.ridge for layer in report.layers],
        "heldout_before": report.heldout_before,
        "heldout_after": report.heldout_after,
        "metrics": report.metrics_after,
        "seconds": sum(report.milliseconds.values()) / 1e3,
    }


def main() -> None:
    """Fit, and write the records as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a pretrained checkpoint")
    parser.add_argument("--data", required=True, help="the data set")
    parser.add_argument("--imgsz", type=int, required=True)
    parser.add_argument("--name", required=True, help="of the record")
    parser.add_argument("--images", nargs="+", default=["50", "200", "1000", "all"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--known", action="store_true", help="names that the model knows are a prior")
    args = parser.parse_args()
    path = HERE / f"{args.name}.json"
    records = read_json(path) if path.exists() else {}
    for images in args.images:
        for seed in args.seeds:
            if (key := f"{images}-{seed}") not in records:
                records[key] = fit(args, images if images == "all" else int(images), seed)
                write_text(path, as_json(records))


if __name__ == "__main__":
    main()
