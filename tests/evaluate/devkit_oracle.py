"""The devkit's rules, one detection at a time: slow and plain, in VOC's own 1-based inclusive coordinates."""

from __future__ import annotations

import math
from fractions import Fraction

from yolo_sos.evaluate import Detections, GroundTruth


def devkit(truth: GroundTruth, found: Detections, minoverlap: float) -> list[tuple[float, float]]:
    """Return (AP, AP07) of each class, NaN without positives, as VOCevaldet.m and VOCap.m go about it."""
    return [devkit_class(truth, found, k, minoverlap) for k in range(len(truth.classes))]


def devkit_class(truth: GroundTruth, found: Detections, k: int, minoverlap: float) -> tuple[float, float]:
    gt: dict[int, list[dict]] = {}
    npos = 0
    for i in range(len(truth.boxes)):
        if truth.label[i] == k:
            x1, y1, x2, y2 = truth.boxes[i]
            record = {"bb": (x1 + 1, y1 + 1, x2, y2), "diff": bool(truth.difficult[i]), "det": False}
            gt.setdefault(int(truth.image[i]), []).append(record)
            npos += not record["diff"]
    mine = [i for i in range(len(found)) if found.label[i] == k]
    mine.sort(key=lambda i: -found.score[i])  # stable, as MATLAB's sort
    tp, fp = [], []
    for i in mine:
        x1, y1, x2, y2 = found.boxes[i]
        bb = (x1 + 1, y1 + 1, x2, y2)
        ovmax, jmax = -math.inf, None
        for record in gt.get(int(found.image[i]), []):
            bbgt = record["bb"]
            iw = min(bb[2], bbgt[2]) - max(bb[0], bbgt[0]) + 1
            ih = min(bb[3], bbgt[3]) - max(bb[1], bbgt[1]) + 1
            if iw > 0 and ih > 0:
                area = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1)
                areagt = (bbgt[2] - bbgt[0] + 1) * (bbgt[3] - bbgt[1] + 1)
                ov = iw * ih / (area + areagt - iw * ih)
                if ov > ovmax:
                    ovmax, jmax = ov, record
        hit = [0, 0]
        if ovmax >= minoverlap:
            if not jmax["diff"]:
                hit = [0, 1] if jmax["det"] else [1, 0]
                jmax["det"] = True
        else:
            hit = [0, 1]
        tp.append(hit[0])
        fp.append(hit[1])
    if npos == 0:
        return math.nan, math.nan
    return average_precision(tp, fp, npos)


def average_precision(tp: list[int], fp: list[int], npos: int) -> tuple[float, float]:
    rec, prec = [], []
    for n in range(1, len(tp) + 1):
        found, false = sum(tp[:n]), sum(fp[:n])
        rec.append(Fraction(found, npos))
        prec.append(Fraction(found, found + false) if found + false else Fraction(0))
    ap07 = Fraction(0)
    for k in range(11):
        ap07 += max((p for r, p in zip(rec, prec, strict=True) if r >= Fraction(k, 10)), default=Fraction(0)) / 11
    mrec, mpre = [Fraction(0), *rec, Fraction(1)], [Fraction(0), *prec, Fraction(0)]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    ap = sum((mrec[i + 1] - mrec[i]) * mpre[i + 1] for i in range(len(mrec) - 1))
    return float(ap), float(ap07)
