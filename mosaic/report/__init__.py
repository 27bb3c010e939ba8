"""What users see of a compilation: the plan, ``explain``, and graphs as text."""
