"""The recipes, shipped as package data: one YAML a method."""
