"""What people look at beside the report: notebook, slides, deliverables."""
