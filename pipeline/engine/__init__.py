"""The SparkSession, and what it runs on: Java, the jars of S3A, an archive of Spark's classes."""
