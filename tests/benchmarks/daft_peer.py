"""Peer: Daft as its documentation has image classification: download, decode, a class with a model.

usage: daft_peer.py IMAGES MODEL.onnx OUTDIR [BATCH]
"""

import sys
from typing import Any

import daft
import numpy as np
import onnxruntime as ort
from daft import DataType, Series
from torchvision import transforms

IMAGES, MODEL, OUT = sys.argv[1:4]
BATCH = int(sys.argv[4]) if len(sys.argv) > 4 else 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ANSWER = DataType.struct(
    {"index": DataType.list(DataType.int64()), "score": DataType.list(DataType.float32())}
)


@daft.cls(max_concurrency=1)
class Classify:
    """A session, and torchvision's transforms."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name
        self.transform = transforms.Compose(
            [
                *(transforms.ToPILImage(), transforms.Resize(256), transforms.CenterCrop(224)),
                *(transforms.ToTensor(), transforms.Normalize(MEAN, STD)),
            ]
        )

    @daft.method.batch(return_dtype=ANSWER, batch_size=BATCH)  # type: ignore[untyped-decorator]
    def __call__(self, images: Series) -> list[Any]:
        """The 5 best classes of each image."""
        pixels_NCHW = np.stack([self.transform(one).numpy() for one in images.to_pylist()])
        logits_NK = self.session.run(None, {self.name: pixels_NCHW})[0]
        exp_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
        scores_NK = exp_NK / exp_NK.sum(1, keepdims=True)
        best_N5 = np.argsort(-scores_NK, 1)[:, :5]
        return [
            {"index": best.tolist(), "score": scores[best].tolist()}
            for best, scores in zip(best_N5, scores_NK, strict=True)
        ]


def main() -> None:
    """Classify a folder."""
    found = daft.from_glob_path(f"{IMAGES}/*")
    images = found["path"].download().decode_image(mode="RGB")
    found = found.with_column("answer", Classify()(images)).select("path", "answer")
    found.write_json(OUT)


if __name__ == "__main__":
    main()
