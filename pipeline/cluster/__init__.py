"""What runs on hosts and asks EC2: the door, the watches, the looks."""
