"""From a model's name or file to a bundle: model.onnx, which takes uint8 pixels, and model.json."""
