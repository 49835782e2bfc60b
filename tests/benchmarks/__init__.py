"""What the project promises in figures, each measured on a loopback cluster: `make bench`."""
