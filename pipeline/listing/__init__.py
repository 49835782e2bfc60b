"""What lies below IMAGES: a listing of S3 or of a folder, or an S3 Inventory."""
