# yolo-sos, AGPL-3.0
"""Checkpoints of ours in a stock Ultralytics, where yolo_sos cannot be imported."""

from __future__ import annotations

import pickletools
import shutil
from zipfile import ZipFile

import pytest
import torch
from stock import run_stock
from ultralytics import YOLO

pytest.importorskip("onnx")
pytest.importorskip("onnxslim")
ort = pytest.importorskip("onnxruntime")

STOCK = """
from ultralytics import YOLO

best, last, data = sys.argv[1:]
settings = {"imgsz": 64, "device": "cpu", "plots": False}
model = YOLO(best)
told = {"map": float(model.val(data=data, batch=8, **settings).box.map)}
told["onnx"] = YOLO(best).export(format="onnx", imgsz=64, device="cpu")
resumed = YOLO(last)
resumed.train(resume=True)
told["epoch"] = resumed.trainer.epoch + 1
told["trainer"] = type(resumed.trainer).__name__
fresh = YOLO(best)
fresh.train(data=data, epochs=1, batch=8, workers=0, **settings)
told["finetuned"] = fresh.trainer.epoch + 1
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def broken(train, interrupt):
    """A run that was cut off after two of three epochs."""
    return train(sos=True, epochs=3, callbacks=interrupt("on_train_epoch_start", 3), error=KeyboardInterrupt)


@pytest.fixture(scope="module")
def told(shifted, broken, digits, tmp_path_factory):
    """What a stock process says of our checkpoints."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    best = shutil.copy(shifted.save_dir / "weights/best.pt", elsewhere)  # the export lies beside it
    return run_stock(STOCK, best, broken.save_dir / "weights/last.pt", digits, cwd=elsewhere)


def test_they_load_validate_resume_and_are_fine_tuned(told, shifted, digits):
    assert (told["trainer"], told["epoch"], told["finetuned"]) == ("DetectionTrainer", 3, 1)
    here = YOLO(shifted.save_dir / "weights/best.pt")
    metrics = here.val(data=str(digits), batch=8, imgsz=64, device="cpu", plots=False)
    assert told["map"] == pytest.approx(float(metrics.box.map), abs=1e-6)


def test_they_are_exported_with_the_shifted_weights(told, shifted):
    images = torch.rand(1, 3, 64, 64)
    model = YOLO(shifted.save_dir / "weights/best.pt").model.eval()
    with torch.no_grad():
        expected = model(images)[0].numpy()
    session = ort.InferenceSession(told["onnx"], providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert found.shape == expected.shape
    assert abs(found - expected).max() < 1e-2 * abs(expected).max()


def test_no_checkpoint_names_a_module_of_ours(shifted, broken):
    files = [*(shifted.save_dir / "weights").glob("*.pt"), *(broken.save_dir / "weights").glob("*.pt")]
    assert len(files) > 5
    for file in files:
        with ZipFile(file) as z:
            (name,) = (n for n in z.namelist() if n.endswith("/data.pkl"))
            ops = list(pickletools.genops(z.read(name)))
        texts = [arg for _, arg, _ in ops if isinstance(arg, str)]
        assert any("ultralytics.nn" in text for text in texts)  # modules are among them
        assert not [text for text in texts if text.split()[:1] and text.split()[0].split(".")[0] == "yolo_sos"]
