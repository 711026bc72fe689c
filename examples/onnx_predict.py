"""Masks from an exported model, without iddc: onnx_predict.py model.onnx photo.jpg mask.png."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, photo, mask = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
names, colours = json.loads(about["id2label"]), json.loads(about["colours"])
image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
(probs,) = session.run(["probs"], {"image": np.asarray(image)[None]})
clusters = probs[0].argmax(0)
for cluster, pixels in zip(*np.unique(clusters, return_counts=True), strict=True):
    print(f"{pixels / clusters.size:6.1%}  {names[str(cluster)]}")
palette = np.array([[*bytes.fromhex(code[1:])] for code in colours.values()], np.uint8)
Image.fromarray(palette[clusters]).save(mask)
