"""Steps of a stage as compiled programs, or captured whole: how they are made, and how training uses them."""
