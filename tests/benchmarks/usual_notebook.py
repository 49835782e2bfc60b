"""The way this case is usually solved, as a baseline: run by the benchmark `notebook`.

Written after the notebooks that people publish: `binaryFile`, the label from the path,
`repartition(20)`, a pandas UDF that builds Keras's MobileNetV2 and gives it the broadcast weights,
MLlib's PCA, CSV. In two ways, by the first argument:

- `published`: as the best documented of them does it, on 67,692 images (DavidScanu's
  oc-ai-engineer-p11): Arrow batches of 32 images, the model built for each of them, `predict` one
  image at a time, and a second run of the network when the frame of features is used again.
- `mended`: without those three faults. The model is built once for each of the 20 partitions,
  `predict` gets all of a batch, and the PCA reads features that were written to Parquet.

Timed from the reading of the images to the written CSV. Not timed, in its favour: imports, the
start of the application, and the building of the model on the driver.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import pandas as pd
from PIL import Image
from pyspark.ml.feature import PCA
from pyspark.ml.functions import array_to_vector
from pyspark.sql.functions import col, element_at, pandas_udf, split
from tensorflow.keras.applications.mobilenet_v2 import MobileNetV2, preprocess_input
from tensorflow.keras.preprocessing.image import img_to_array

from pipeline.engine.session import make_session
from tests.benchmarks._common import USUAL_JAVA

way, images_path, output_path, weights_path, components = sys.argv[1:]
published = {"published": True, "mended": False}[way]

spark = make_session("usual notebook", settings=USUAL_JAVA)
spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "32" if published else "1024")

model = MobileNetV2(
    weights=weights_path, include_top=False, input_shape=(224, 224, 3), pooling="avg"
)
# As bytes: with spark.io.encryption.enabled, PySpark 4.3 cannot broadcast large NumPy arrays.
broadcast_weights = spark.sparkContext.broadcast(pickle.dumps(model.get_weights()))


def model_fn() -> MobileNetV2:
    """Return the network with the broadcast weights."""
    model = MobileNetV2(weights=None, include_top=False, input_shape=(224, 224, 3), pooling="avg")
    for layer in model.layers:
        layer.trainable = False
    model.set_weights(pickle.loads(broadcast_weights.value))
    return model


def preprocess(content: bytes) -> np.ndarray:
    """Return the pixels as the network wants them."""
    image = Image.open(io.BytesIO(content)).resize([224, 224])
    return preprocess_input(img_to_array(image))


def featurize_series(model: MobileNetV2, content_series: pd.Series) -> pd.Series:
    """Return the features of a series of images."""
    pixels = np.stack(content_series.map(preprocess))
    features = model.predict(pixels)
    return pd.Series([row.flatten() for row in features])


@pandas_udf("array<float>")
def featurize_batch_udf(content_series: pd.Series) -> pd.Series:
    """Return the features of a series, with a model of its own and one image at a time."""
    model = model_fn()
    pixels = content_series.map(preprocess)
    return pixels.map(lambda image: model.predict(image[np.newaxis], verbose=0).flatten())


@pandas_udf("array<float>")
def featurize_udf(content_series_iter: Iterator[pd.Series]) -> Iterator[pd.Series]:
    """Return the features of all series of a partition, with one model for all of them."""
    model = model_fn()
    for content_series in content_series_iter:
        yield featurize_series(model, content_series)


began = time.monotonic()
images = (
    spark.read.format("binaryFile")
    .option("pathGlobFilter", "*.jpg")
    .option("recursiveFileLookup", "true")
    .load(images_path)
)
images = images.withColumn("label", element_at(split(images["path"], "/"), -2))
featurize = featurize_batch_udf if published else featurize_udf
features_df = images.repartition(20).select(
    col("path"), col("label"), featurize("content").alias("features")
)
features_df.write.mode("overwrite").parquet(f"{output_path}/features")
features_done = time.monotonic()

df = features_df if published else spark.read.parquet(f"{output_path}/features")
df = df.withColumn("vectors", array_to_vector("features"))
df.cache()  # by MLlib's passes over the data; the notebooks do so, too
pca = PCA(k=int(components), inputCol="vectors", outputCol="pca").fit(df)
result = pca.transform(df).select("path", "label", col("pca").cast("string"))
result.write.mode("overwrite").csv(f"{output_path}/pca", header=True)
done = time.monotonic()

rows = spark.read.csv(f"{output_path}/pca", header=True).count()
spark.stop()
told = {
    "rows": rows,
    "features": features_done - began,
    "pca": done - features_done,
    "total": done - began,
}
print(json.dumps(told))
