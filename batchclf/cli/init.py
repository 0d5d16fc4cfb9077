"""`batchclf init`: a commented job file to start from."""

from pathlib import Path

import click

from batchclf.cli.streams import say
from batchclf.errors import EnvironmentFailed, UsageError

TEMPLATE = """\
# yaml-language-server: $schema={schema}
# A batchclf job. Paths are relative to this file. Check it with `batchclf validate`, run it with
# `batchclf run`; running it again resumes. `batchclf schema` prints every key.

input: {input}                  # a folder, walked recursively; or instead:
# input: photos/1.jpg                       # one image
# input: photos/**/*.{{jpg,JPG}}              # a glob
# input: photos.txt                         # a list of paths, or .jsonl with `path` in each line
# input: "-"                                # a list on stdin
# input: [photos/cats, photos/dogs]         # several of any kind
# input: shards/*.tar                       # archives, read without being unpacked: also one .tar
# input: photos.zip
# input: shards/0000.tar.gz                 # compressed: read through from its beginning
# input: train.parquet                      # of Hugging Face, Spark or Ray; extra `parquet`
# input: {{parquet: train, column: image, id: key}}   # which columns, where it is not clear
# input: s3://bucket/photos                 # all below it; also gs:// and az://; extra `remote`
# input: s3://bucket/shards/*.tar           # read by ranges
# input: https://example.org/photos.zip     # one file of a web server; a list may name many
output: {output}                # folder for the results, created; or s3://bucket/runs/1

model:
  name: {model}                 # any torchvision classification model; timm/NAME; hf/FOLDER, as
                                # transformers saved it, or hf/OWNER/NAME of the hub
  weights: DEFAULT              # the library's name for them, path to a .pth or .safetensors file,
                                # or none (random, for benchmarks)
  # labels: labels.txt          # imagenet, or a text file with one name per line;
                                # default: the names that come with the weights
  # num_classes: 10             # of a fine-tuned head; inferred from a weights file when absent
  # preprocess:                 # default: the transforms that come with the weights
  #   resize: 256               # shorter edge in pixels, or [height, width]
  #   crop: 224                 # centre crop: the model's input size
  #   mean: [0.485, 0.456, 0.406]
  #   std: [0.229, 0.224, 0.225]
  #   interpolation: bilinear   # nearest, bilinear, bicubic or lanczos
  #   exif_transpose: false     # true: turn images as their EXIF orientation says
  # onnx: my.onnx               # instead of name and weights: your own ONNX classifier
  # bundle: exported/resnet50   # instead: what `batchclf export` wrote; needs no torch

provider: {provider}                   # cpu, cuda or openvino, or with more to say:
                                # {{name: openvino, device_type: GPU}}, or
                                # {{name: cuda, devices: [0, 1]}}; options: {{...}} go to its
                                # provider, allow_fallback: true lets the CPU stand in for it
precision: fp32                 # cpu: or int8; cuda: or fp16; openvino: or bf16, fp16, int8
# min_agreement: 0.93           # of another precision with fp32, on a sample of the images
batch_size: 16                  # handed over at once; a GPU wants 64 or more
top_k: 5                        # classes per record, best first

loader:
  workers: auto                 # images decoded at once
  # backend: auto               # threads, or processes: where more than 4 feed a GPU
  prefetch: auto                # batches decoded ahead; bounds the memory
  decode: exact                 # exact: torchvision's pixels; fast: close to them
  # max_pixels: 89478485        # a larger image is recorded as too_large
  # max_bytes: 2147483648       # a larger file is recorded as too_large_bytes, unread
  # max_memory: auto            # bytes that large images take at once; auto: 1/4 of what is free
  # max_seconds: 60             # a slower image is tried once more alone, then recorded as timeout
  # strict: false               # true: damaged images that still decode are recorded as corrupt
  # sixteen_bit: scale          # 16-bit grey; stretch: each image from black to white; clip at 255
  # allow_outside_links: false  # true: follow links that lead out of the input folder

runtime:
  streams: auto                 # batches inferred at the same time
  threads: auto                 # threads within one batch
  # part: auto                  # on a CPU: images of a batch that are inferred at once
# stall_timeout: 120            # seconds without progress before the job's process starts again

errors:
  max: null                     # null: record every bad image and go on;
                                # a count, or a rate such as "2%": stop when passed

engine: local
"""


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("job.yaml"))
@click.option("-i", "--input", "input_", default="images", show_default=True, help="Its input.")
@click.option("-o", "--output", default="results", show_default=True, help="Its output.")
@click.option("--model", default="resnet50", show_default=True, help="Its torchvision model.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "openvino"]),
    default="cpu",
    show_default=True,
    help="Its provider.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def command(
    path: Path, input_: str, output: str, model: str, provider: str, overwrite: bool
) -> None:
    """Write a commented job file to PATH (job.yaml).

    \b
      batchclf init jobs/birds.yaml -i ../photos/birds
    """
    import json
    from importlib.resources import files

    schema = Path(str(files("batchclf.spec") / "job.schema.json")).as_uri()

    def quoted(text: str) -> str:
        return json.dumps(text)  # JSON's quotes are YAML's too

    text = TEMPLATE.format(
        schema=schema,
        input=quoted(input_),
        output=quoted(output),
        model=quoted(model),
        provider=provider,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path}: is there already; --overwrite replaces it") from None
    except OSError as error:
        raise EnvironmentFailed(
            f"{path}: cannot be written: {error.strerror}; give another path: batchclf init PATH"
        ) from None
    done = f"batchclf: wrote {path}; next: batchclf validate {path}"
    say(done)
