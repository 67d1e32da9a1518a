# yolo-sos, AGPL-3.0
"""Two processes in Ultralytics' own loop, started by hand with torch.distributed.run; on the CPU, by gloo."""

from __future__ import annotations

import pytest
from two_processes import run_two

WORKER = """
import hashlib
from yolo_sos.core import SOS
from yolo_sos.yolo.heads import final_layers

told = []

class Trainer(TwoProcesses):
    def validate(self):
        return (None, None) if self.metrics is None else (dict(self.metrics), 0.0)

    def final_eval(self):
        pass

    def preprocess_batch(self, batch):
        self.files = [Path(f).name for f in batch["im_file"]]
        return super().preprocess_batch(batch)

def digest(model, names):
    return hashlib.sha256(b"".join(model.get_parameter(n).detach().numpy().tobytes() for n in names)).hexdigest()

def parameters(trainer):
    return [n for n, _ in unwrap_model(trainer.model).named_parameters()]

def shifted_weights(trainer):
    return sorted(f"{layer.name}.weight" for layer in final_layers(unwrap_model(trainer.model)))

def note(trainer):
    names, final = parameters(trainer), shifted_weights(trainer)
    models = {"model": unwrap_model(trainer.model), "ema": trainer.ema.ema}
    told[-1] |= {name: [digest(model, names), digest(model, final)] for name, model in models.items()}

def batch_end(trainer):
    final = shifted_weights(trainer)
    statistics = torch.cat([b.float().view(-1) for n, b in unwrap_model(trainer.model).named_buffers()])
    before, total = digest(trainer.ema.ema, final), float(statistics.sum())
    told.append({"files": trainer.files, "before": before, "statistics": total})

if how == "fail":
    real = SOS.shift
    def shift(*args, **kwargs):
        real(*args, **kwargs)
        raise ZeroDivisionError("of the shift")
    SOS.shift = shift

trainer = Trainer(json.loads(sys.argv[1]))
trainer.add_callback("on_train_batch_end", batch_end)
trainer.add_callback("on_train_epoch_end", note)
"""


@pytest.fixture
def launch(defaults, tmp_path):
    """``launch(how)`` returns what two workers noted."""
    settings = {**defaults, "amp": False, "batch": 12, "val": False}
    return lambda how: run_two(WORKER, settings, tmp_path, how)


@pytest.mark.feature("torch.distributed.run by hand", "works: model and EMA are equal on all ranks, bit for bit")
def test_ranks_that_see_different_images_have_the_same_weights(launch):
    first, second = launch("train")
    assert (first["error"], second["error"]) == (None, None)
    assert len(first["told"]) == len(second["told"]) == 2 * 2  # batches
    shifts = 0
    for a, b in zip(first["told"], second["told"], strict=True):
        assert not set(a["files"]) & set(b["files"])
        assert a["statistics"] != b["statistics"]  # what BatchNorm has seen differs, and so would a shift of each rank
        if "ema" in a:
            assert a["ema"] == b["ema"] and a["model"] == b["model"]
            assert a["ema"][1] != a["before"]
            shifts += 1
    assert shifts == 2


@pytest.mark.fault("a shift fails on rank 0 of two", "every rank stops with that error")
def test_every_rank_stops_with_the_error_of_rank_0(launch):
    first, second = launch("fail")
    assert first["error"] == "ZeroDivisionError: of the shift"
    assert second["error"] == "RuntimeError: The shift failed on rank 0: ZeroDivisionError: of the shift"
