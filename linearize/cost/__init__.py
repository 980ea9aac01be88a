"""What a recipe will cost before anything is loaded: memory, FLOPs, time and money of each stage, from a config alone."""
