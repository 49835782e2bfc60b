"""A result: the matrix, what people look at, and the page that tells of the run."""
