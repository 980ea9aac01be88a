"""What a recipe will cost: memory, FLOPs, time and money of each stage, from a config alone."""
