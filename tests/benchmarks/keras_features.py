"""The features as Keras itself computes them: run by the benchmark `correctness`.

A process of its own, so that TensorFlow's memory goes with it. It reads uint8 pixels, shape
(n, size, size, 3), and writes float32 features, shape (n, 1280).
"""

from __future__ import annotations

import sys

import numpy as np
from keras.applications.mobilenet_v2 import MobileNetV2, preprocess_input

pixels_file, weights, features_file = sys.argv[1:]
pixels = np.load(pixels_file)
model = MobileNetV2(include_top=False, weights=weights, input_shape=pixels.shape[1:], pooling="avg")
np.save(features_file, model.predict(preprocess_input(pixels.astype(np.float32)), verbose=0))
