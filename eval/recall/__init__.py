"""Tasks that a model can only do by remembering its context: seeded generators, one file a task."""
