"""What each position of each tower is, for one model and its inputs."""
