"""Cost model of a training run: time, communication and memory of each stage. It measures nothing itself."""
