"""What runs are looked at with: the report, the comparison of objectives, the diagnosis of saved rollouts."""
