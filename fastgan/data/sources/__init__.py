"""The sources that are read as they are; prepared sets are in fastgan/data/prepared."""
