"""What users write: specs, methods, ranks, the decorator; and the errors that they get."""
