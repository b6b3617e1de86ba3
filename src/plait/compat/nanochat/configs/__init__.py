"""The hybrid's configs: Python files of literals, read and never executed; README.md tells them apart."""
