"""S3 as its clients see it: how it is reached, what its listings and its errors say."""
