"""Steps of a stage as compiled programs: how they are built beside training, and how training uses them."""
