"""What the playbooks ask of AWS: a file for each thing that is looked at; `cluster/ec2.py` asks."""
