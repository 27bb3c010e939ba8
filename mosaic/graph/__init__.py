"""What passes work with: making nodes, running passes, modes and source lines of nodes."""
