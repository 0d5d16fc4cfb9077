"""Make the digits sample: 300 image files and the small classifier that reads them.

The images are the 1,797 handwritten digits that scikit-learn carries (8x8 greyscale
scans from the UCI repository). Thirty of each digit are held out: they are written
as files under ``digits/<digit>/`` and never trained on. The rest train a torchvision
``shufflenet_v2_x0_5``, whose weights go to ``digits.safetensors`` and whose class
names go to ``digits.txt``. At the end the written weights are loaded back and scored
on the written files.

The scans come from 13 people, and the split mixes their digits, so the score says how
well the model reads these writers and not how well it reads a stranger's hand.

Everything is seeded. With the same package versions and the same kind of processor,
running the script again writes the same bytes::

    pip install torch torchvision scikit-learn pillow safetensors
    python samples/train_digits.py

``--output`` writes somewhere other than next to the script.
"""

import argparse
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torchvision import transforms  # type: ignore[import-untyped, unused-ignore]
from torchvision.models import (  # type: ignore[import-untyped, unused-ignore]
    shufflenet_v2_x0_5,
)

SEED = 20240229
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_PER_DIGIT = 30
SIDE = 64
JPEG_QUALITY = 95
EPOCHS = 40
BATCH = 64
PEAK_LEARNING_RATE = 4e-3
REQUIRED_ACCURACY = 0.97

# What inference does to a decoded RGB image, step for step. At run time the images
# are already 64x64, so the first two steps change nothing here; they are kept because
# photos of another size go through them.
PREPROCESS = transforms.Compose(
    [
        transforms.Resize(SIDE, antialias=True),
        transforms.CenterCrop(SIDE),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
    ]
)

# Small moves only: the scans are already centred and upright, and a large turn would
# make a 6 of a 9. New corners are filled with white, the colour of the paper.
AUGMENT = transforms.RandomAffine(
    degrees=10,
    translate=(0.08, 0.08),
    scale=(0.88, 1.08),
    shear=6,
    interpolation=transforms.InterpolationMode.BILINEAR,
    fill=255,
)


@dataclass(frozen=True)
class Scan:
    """One digit of the data set, enlarged."""

    index: int
    digit: int
    image: Image.Image


def load_scans() -> list[Scan]:
    """Return all scans as dark ink on white, enlarged so that a person can see them."""
    data = load_digits()
    scans = []
    for index, (ink, digit) in enumerate(zip(data.images, data.target, strict=True)):
        grey = np.rint(255.0 * (1.0 - ink / 16.0)).astype(np.uint8)
        large = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        scans.append(Scan(index, int(digit), large))
    return scans


def split(scans: Sequence[Scan]) -> tuple[list[Scan], list[Scan]]:
    """Return (training, held out), with the same number of each digit held out."""
    random = np.random.default_rng(SEED)
    held_out: set[int] = set()
    for digit in range(len(NAMES)):
        indices = [scan.index for scan in scans if scan.digit == digit]
        chosen = random.choice(indices, HELD_OUT_PER_DIGIT, replace=False)
        held_out.update(int(index) for index in chosen)
    return (
        [scan for scan in scans if scan.index not in held_out],
        [scan for scan in scans if scan.index in held_out],
    )


def encode(image: Image.Image, suffix: str) -> bytes:
    """Return the bytes of an image file of the kind that the suffix names."""
    stream = io.BytesIO()
    if suffix == ".jpg":
        image.save(stream, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def decode(file: bytes) -> Tensor:
    """Return the model's input for the bytes of an image file."""
    with Image.open(io.BytesIO(file)) as image:
        tensor: Tensor = PREPROCESS(image.convert("RGB"))
    return tensor


def write_files(scans: Sequence[Scan], folder: Path) -> list[tuple[Path, int]]:
    """Write the scans, every second one as PNG; return each file with its digit."""
    written = []
    for digit in range(len(NAMES)):
        subfolder = folder / str(digit)
        subfolder.mkdir(parents=True, exist_ok=True)
        of_digit = [scan for scan in scans if scan.digit == digit]
        for position, scan in enumerate(of_digit):
            suffix = ".png" if position % 2 else ".jpg"
            path = subfolder / f"{scan.index:04d}{suffix}"
            path.write_bytes(encode(scan.image, suffix))
            written.append((path, digit))
    return written


def training_batch(scans: Sequence[Scan]) -> tuple[Tensor, Tensor]:
    """Return inputs and labels, each image moved a little and passed through a file."""
    inputs = []
    for scan in scans:
        # Half of the images carry JPEG's artefacts, as half of the files do.
        suffix = ".jpg" if torch.rand(()).item() < 0.5 else ".png"
        inputs.append(decode(encode(AUGMENT(scan.image), suffix)))
    return torch.stack(inputs), torch.tensor([scan.digit for scan in scans])


def train(scans: Sequence[Scan]) -> nn.Module:
    """Return a model trained on the scans, from random weights."""
    model: nn.Module = shufflenet_v2_x0_5(weights=None, num_classes=len(NAMES))
    steps = len(scans) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps
    )
    loss_of = nn.CrossEntropyLoss()
    model.train()
    for epoch in range(EPOCHS):
        # The few scans left over by whole batches differ from epoch to epoch.
        order = torch.randperm(len(scans))[: steps * BATCH]
        total = 0.0
        for chosen in order.reshape(steps, BATCH).tolist():
            inputs, labels = training_batch([scans[index] for index in chosen])
            optimizer.zero_grad()
            loss: Tensor = loss_of(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2d}/{EPOCHS}  loss {total / steps:.4f}", flush=True)
    return model


def write_checkpoint(model: nn.Module, path: Path) -> None:
    """Write the weights, and with them what is needed to build the model again."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    # One entry only: safetensors writes several in an order that changes between runs.
    description = f"torchvision shufflenet_v2_x0_5, num_classes={len(NAMES)}, Apache-2.0"
    path.write_bytes(save(state, metadata={"description": description}))


def score(checkpoint: Path, files: Sequence[tuple[Path, int]]) -> float:
    """Return the share of the files that the written checkpoint gets right."""
    model: nn.Module = shufflenet_v2_x0_5(weights=None, num_classes=len(NAMES))
    model.load_state_dict(load_file(checkpoint))
    model.eval()
    right = 0
    for path, digit in files:
        with torch.inference_mode():
            answer = int(model(decode(path.read_bytes()).unsqueeze(0)).argmax())
        if answer == digit:
            right += 1
        else:
            print(f"wrong: {path.parent.name}/{path.name} read as {answer}")
    return right / len(files)


def main() -> None:
    """Write the files, train, write the weights and print the score."""
    parser = argparse.ArgumentParser(description="Make the digits sample.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    output: Path = parser.parse_args().output

    # Sums taken by several threads may differ in their last bit from run to run.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)

    training, held_out = split(load_scans())
    files = write_files(held_out, output / "digits")
    print(f"{len(training)} scans to train on, {len(files)} held out and written")

    started = time.perf_counter()
    model = train(training)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    checkpoint = output / "digits.safetensors"
    write_checkpoint(model, checkpoint)
    (output / "digits.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")

    accuracy = score(checkpoint, files)
    print(f"held-out accuracy: {accuracy:.2%} of {len(files)} files")
    if accuracy < REQUIRED_ACCURACY:
        raise SystemExit(f"too low: at least {REQUIRED_ACCURACY:.0%} is wanted")


if __name__ == "__main__":
    main()
