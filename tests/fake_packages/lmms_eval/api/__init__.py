"""Models and tasks."""
