"""Fruits!: from fruit photos on S3 to a PCA matrix, on a Spark cluster of your own."""

__version__ = "0.1.0"
