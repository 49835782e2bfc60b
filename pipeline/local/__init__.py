"""What a laptop has: a cluster and an S3 on loopback, the demo, the lab."""
