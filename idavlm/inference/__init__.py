"""Uses of trained models beyond one question: films."""
