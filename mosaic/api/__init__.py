"""What users write: specs and methods; and the errors that they get."""
